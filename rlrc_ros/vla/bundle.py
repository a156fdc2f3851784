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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from rlrc_ros.errors import UserError
from rlrc_ros.schema import from_dict, read_json
from rlrc_ros.vla.config import BundleConfig

SHIPPED = Path(__file__).resolve().parent.parent / "bundles"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "provenance.json")
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose checksums are right; weights are not loaded."""

    path: Path
    config: BundleConfig
    provenance: dict[str, Any]
    hash: str

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            UserError: its file cannot be read.
        """
        file = self.path / "tokenizer.json"
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more specific
            raise UserError(f"{file}: not a readable tokenizer ({error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors, read from the header alone."""
        with _open(self.path / "model.safetensors") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def sizes(self) -> dict[str, int]:
        """Bytes of the stored tensors."""
        return {name: tensor.nbytes for name, tensor in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, memory-mapped."""
        with _open(self.path / "model.safetensors") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


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


def open_bundle(policy: str | Path) -> Bundle:
    """Open and verify a bundle.

    Raises:
        UserError: it does not exist, a file is missing, differs from its checksum, or does not
            parse.
    """
    path = resolve(policy)
    digest = _verify(path)
    config = from_dict(BundleConfig, read_json(path / "config.json"), str(path / "config.json"))
    origin = read_json(path / "provenance.json")
    if not isinstance(origin, dict):
        raise UserError(f"{path / 'provenance.json'}: expected keys and values")
    return Bundle(path, config, origin, digest)


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
