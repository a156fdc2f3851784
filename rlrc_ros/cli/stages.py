"""What the verbs of single training stages share: `rlrc sft`, `prune`, `rl` and `quantize`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError

Stage = Callable[[argparse.Namespace, Any, Any], dict[str, Any]]
"""(arguments, configuration, trainable policy) -> facts for the provenance; trains in place."""


def add_stage_arguments(
    parser: argparse.ArgumentParser, *, data: bool = True, policy: bool = True
) -> None:
    """Add the arguments every stage takes."""
    parser.add_argument(
        "config", type=Path, help="the pipeline's YAML; the stage's section is used"
    )
    parser.add_argument("--policy", required=policy, help="bundle to start from")
    parser.add_argument("--out", type=Path, required=True, help="the new bundle's directory")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    if data:
        parser.add_argument(
            "--demonstrations",
            type=Path,
            nargs="+",
            required=True,
            metavar="DIR",
            help="directories of shards",
        )
        parser.add_argument("--seed", type=int, default=0, help="of the training (default 0)")


def run_stage(arguments: argparse.Namespace, name: str, stage: Stage) -> int:
    """Load, train, save, and say what was made; an existing bundle is not replaced."""
    from training.bundles import load_trainable, new_trainable
    from training.common import pick_device, seed_everything
    from training.config import load_config

    if arguments.out.exists():
        raise UserError(f"{arguments.out}: is there already; name another directory, or delete it")
    config = load_config(arguments.config)
    device = pick_device(arguments.device)
    if arguments.policy:
        trainable = load_trainable(arguments.policy, device)
    else:
        seed_everything(arguments.seed)
        trainable = new_trainable(config.model, demonstrations(arguments), device)
    facts = stage(arguments, config, trainable)
    bundle = trainable.save(arguments.out, name, **facts)
    emit(
        arguments,
        {"bundle": str(bundle.path), "hash": bundle.hash, **facts},
        _text(bundle.path, bundle.hash, facts),
    )
    return 0


def demonstrations(arguments: argparse.Namespace) -> Any:
    """Everything in the directories given."""
    from training.data.demonstrations import join, read

    return join([read(directory) for directory in arguments.demonstrations])


def work_directory(arguments: argparse.Namespace) -> Path:
    """Where logs, checkpoints and corrections of a stage go: beside the bundle."""
    return arguments.out.with_name(f"{arguments.out.name}-work")


def _text(path: Path, digest: str, facts: dict[str, Any]) -> str:
    return f"{path}  {digest[:12]}\n{json.dumps(facts, indent=1)}"
