"""The policy bundle: one directory that is a policy, complete and checked.

config.json        architecture, codec, contract with the robot (rlrc_ros.vla.config)
model.safetensors  weights
tokenizer.json     the tokenizer
provenance.json    the parent bundle's hash, the command, seeds, versions, metrics of the stage
SHA256SUMS         of all of them; the bundle's hash is the hash of this file
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from rlrc_ros.errors import UserError
from rlrc_ros.schema import from_dict, read_json
from rlrc_ros.vla import oft_checkpoint, openvla_checkpoint, pi0_checkpoint
from rlrc_ros.vla.config import BundleConfig
from rlrc_ros.vla.weights import WeightFiles

SHIPPED = Path(__file__).resolve().parent.parent / "bundles"
TOKENIZER = "tokenizer.json"
FILES = ("config.json", "model.safetensors", TOKENIZER, "provenance.json")
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose checksums are right; weights are not loaded."""

    path: Path
    config: BundleConfig
    provenance: dict[str, Any]
    hash: str
    unnorm_keys: tuple[str, ...] = ()
    """Data sets whose statistics an OpenVLA checkpoint has, where none of them was chosen."""

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def has_tokenizer(self) -> bool:
        """Whether it can read an instruction; a checkpoint may come without a tokenizer."""
        return (self.path / TOKENIZER).is_file()

    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            UserError: its file cannot be read.
        """
        file = self.path / TOKENIZER
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more specific
            raise UserError(f"{file}: not a readable tokenizer ({error})") from None

    def require_action_scale(self) -> None:
        """Refuse a checkpoint of which nobody has said how its actions are scaled.

        Raises:
            UserError: it has several sets of statistics, and none was chosen.
        """
        if self.unnorm_keys:
            raise UserError(
                f"{self.path}: scales actions differently by data set, so choose one as "
                f"{self.path.name}#KEY; there are: {', '.join(self.unnorm_keys)}"
            )

    @cached_property
    def weights(self) -> WeightFiles:
        """Where its tensors are stored.

        Raises:
            UserError: the files cannot be read.
        """
        found = WeightFiles.find(self.path)
        if self.config.architecture.expert is not None:
            return pi0_checkpoint.renamed(found)
        bundled = (self.path / SUMS).is_file()
        return found if bundled else oft_checkpoint.with_parts(found, self.path)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, memory-mapped."""
        return self.weights.mapped()

    def sizes(self) -> dict[str, int]:
        """Bytes of the stored tensors."""
        return {name: tensor.nbytes for name, tensor in self.weights.stream()}


def resolve(policy: str | Path) -> Path:
    """The directory of a policy given as a path or as a shipped bundle's short name.

    Raises:
        UserError: there is neither.
    """
    path = Path(policy).expanduser()
    if path.is_dir():
        return path.resolve()
    names = sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []
    if str(policy) in names:
        return SHIPPED / str(policy)
    known = f"; shipped bundles: {', '.join(names)}" if names else ""
    raise UserError(f"{policy}: no such bundle directory{known}")


def open_bundle(policy: str | Path, unnorm_key: str | None = None) -> Bundle:
    """Open and verify a bundle, or a checkpoint directory as OpenVLA or pi0 is published.

    Args:
        policy: a directory, or the short name of a shipped bundle. `DIR#KEY` also says which
            `unnorm_key` of a checkpoint to take.
        unnorm_key: the data set of `norm_stats` that scales an OpenVLA checkpoint's actions; not
            needed where there is only one. A bundle has its own scale.

    Raises:
        UserError: it does not exist, a file is missing, differs from its checksum, or does not
            parse; there are no statistics of that name.
    """
    if unnorm_key is None and not Path(policy).expanduser().is_dir() and "#" in str(policy):
        policy, _, unnorm_key = str(policy).rpartition("#")
    path = resolve(policy)
    if not (path / SUMS).is_file():
        if openvla_checkpoint.is_checkpoint(path):
            return _open_checkpoint(path, unnorm_key)
        if pi0_checkpoint.is_checkpoint(path):
            return _open_pi0_checkpoint(path, unnorm_key)
    digest = _verify(path)
    config = from_dict(BundleConfig, read_json(path / "config.json"), str(path / "config.json"))
    if unnorm_key is not None:
        raise UserError(
            f"{path}: is a bundle, whose actions have one scale; leave out '{unnorm_key}'"
        )
    origin = read_json(path / "provenance.json")
    if not isinstance(origin, dict):
        raise UserError(f"{path / 'provenance.json'}: expected keys and values")
    return Bundle(path, config, origin, digest)


def _open_checkpoint(path: Path, unnorm_key: str | None) -> Bundle:
    checkpoint = openvla_checkpoint.read_checkpoint(path)
    config = checkpoint.bundle_config(unnorm_key)
    parts = [*map(path.joinpath, openvla_checkpoint.FILES), *checkpoint.weights.files.values()]
    keys = tuple(checkpoint.statistics)
    scale = keys[0] if unnorm_key is None and len(keys) == 1 else unnorm_key
    origin = {"parent": None, "stages": [{"stage": "original", "unnorm_key": scale}]}
    ambiguous = unnorm_key is None and len(keys) > 1
    return Bundle(path, config, origin, _hash_of(parts), keys if ambiguous else ())


def _open_pi0_checkpoint(path: Path, unnorm_key: str | None) -> Bundle:
    if unnorm_key is not None:
        raise UserError(
            f"{path}: is a pi0 checkpoint, whose actions have one scale; leave out '{unnorm_key}'"
        )
    checkpoint = pi0_checkpoint.read_checkpoint(path)
    origin = {"parent": None, "stages": [{"stage": "original"}]}
    parts = [*checkpoint.files, *checkpoint.weights.files.values()]
    return Bundle(path, checkpoint.config, origin, _hash_of(parts))


def _hash_of(parts: Sequence[Path]) -> str:
    """Of those of the files that exist, by name, as a bundle's `SHA256SUMS` would list them."""
    files = sorted({file for file in parts if file.is_file()})
    with ThreadPoolExecutor() as pool:
        sums = zip(files, pool.map(sha256, files), strict=True)
        text = "".join(f"{digest}  {file.name}\n" for file, digest in sums)
    return hashlib.sha256(text.encode()).hexdigest()


def _verify(path: Path) -> str:
    """Check every file against SHA256SUMS; returns the bundle's hash."""
    sums_file = path / SUMS
    if not sums_file.is_file():
        raise UserError(f"{path}: not a policy bundle, it has no {SUMS}")
    listed = {}
    for number, line in enumerate(sums_file.read_text(errors="replace").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or Path(name).name != name:
            raise UserError(f"{sums_file}:{number}: not a checksum of a file in this directory")
        listed[name] = digest
    for name in dict.fromkeys((*FILES, *listed)):
        if name not in listed:
            raise UserError(
                f"{sums_file}: no checksum for {name}; the bundle is incomplete, copy it again"
            )
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing; the bundle is incomplete, copy it again")
        if sha256(path / name) != listed[name]:
            raise UserError(
                f"{path / name} differs from its checksum in {SUMS}; the file is damaged, copy "
                "the bundle again"
            )
    return sha256(sums_file)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_bundle(
    path: Path,
    config: BundleConfig,
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer,
    provenance: dict[str, Any],
) -> Bundle:
    """Write a bundle beside `path`, then rename it into place.

    An earlier bundle there is replaced whole.
    """
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_json(partial / "config.json", config.to_dict())
    save_file(tensors, str(partial / "model.safetensors"), metadata={"format": "pt"})
    # safetensors makes it readable to its owner alone, and robots have more users.
    shutil.copymode(partial / "config.json", partial / "model.safetensors")
    tokenizer.save(str(partial / "tokenizer.json"))
    _write_json(partial / "provenance.json", provenance)
    sums = "".join(f"{sha256(partial / name)}  {name}\n" for name in FILES)
    (partial / SUMS).write_text(sums, encoding="utf-8")
    for name in (*FILES, SUMS):
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    return open_bundle(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def provenance(parent: Bundle | None, stage: str, **facts: Any) -> dict[str, Any]:
    """What a bundle records of how it was made.

    Parent, stage, command, versions, and the stage's own facts.
    """
    packages = (
        "torch",
        "transformers",
        "torch-pruning",
        "bitsandbytes",
        "stable-baselines3",
        "peft",
        "accelerate",
        "mujoco",
        "numpy",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    earlier = parent.provenance.get("stages", []) if parent else []
    this = {"stage": stage, **facts}
    return {
        "parent": parent.hash if parent else None,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": versions,
        "stages": [*earlier, this],
    }
