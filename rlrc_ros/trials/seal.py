"""What the operator should not see before unblinding, in an envelope.

The envelope keeps from seeing by accident: no file, topic or listing shows what is inside. It is
not encryption, since the policy node on the same machine has to open it: whoever decodes it does so
on purpose. That it was not exchanged, the hash in the log's first line shows.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import secrets
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.schema import read_json
from rlrc_ros.trials.plan import Plan

FILE = "sealed.json"
_NOTE = (
    "Which policy runs at which step of this trial. Opening it unblinds the trial: "
    "`rlrc trial unblind` does that, once, and writes it down."
)


@dataclass(frozen=True)
class SealedPolicy:
    """The policy of one step."""

    arm: str
    policy: str
    """Bundle directory or short name."""
    hash: str


def seal(values: Any) -> str:
    """Put JSON-able values into an envelope."""
    return base64.b64encode(zlib.compress(json.dumps(values).encode())).decode()


def unseal(text: str) -> Any:
    """What is in an envelope.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(zlib.decompress(base64.b64decode(text, validate=True)))
    except zlib.error as error:
        raise ValueError(str(error)) from None


def draw(plan: Plan, directory: Path) -> str:
    """Draw the order of the arms within every pair and seal it; returns the file's SHA-256.

    The order depends on a secret besides the plan's seed, so that the plan does not tell it.
    """
    secret = secrets.token_hex(16)
    rng = random.Random(f"{plan.sha256} {secret}")
    policies = {}
    for pair in range(plan.pairs):
        for place, arm in enumerate(rng.sample(list(plan.arms), len(plan.arms))):
            bundle = plan.arms[arm]
            label = policy_label(pair * len(plan.arms) + place)
            policies[label] = {"arm": arm, "policy": bundle.policy, "hash": bundle.hash}
    content = json.dumps({"note": _NOTE, "sealed": seal({"secret": secret, "policies": policies})})
    path = directory / FILE
    temporary = path.with_name(f".{FILE}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return hashlib.sha256(content.encode()).hexdigest()


def policy_label(step: int) -> str:
    """The label that the policy of a step has on the topics; each step has its own."""
    return f"step-{step + 1:04d}"


def sealed_policies(path: Path) -> dict[str, SealedPolicy]:
    """The policies by label.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    values = read_json(path)
    try:
        policies = unseal(values["sealed"])["policies"]
        return {label: SealedPolicy(**policy) for label, policy in policies.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; restore it, without it the trial is lost") from None


def file_hash(path: Path) -> str:
    """SHA-256 of the sealed file.

    Raises:
        UserError: it is missing.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; restore it, without it the trial is lost") from None
