"""Tensors on disk: one safetensors file, or the shards that an index names.

Never a pickle, which can run code when it is read; the parts of OpenVLA-OFT, which upstream pickles
apart, are read by torch's own reader of tensors and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlrc_ros.errors import UserError
from rlrc_ros.schema import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
MAPPED_BYTES = 16 << 20
"""How much of a file is mapped at a time while it is read."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors names them."""


@dataclass(frozen=True)
class WeightFiles:
    """Where each tensor is stored.

    Attributes:
        path: the file, or the directory of the shards.
        files: the file that holds a tensor, by the tensor's name.
        stored_as: the name in the file, of those tensors that are known by another.
        pickled: those of them that are in no safetensors file, memory-mapped.
    """

    path: Path
    files: dict[str, Path]
    stored_as: dict[str, str] = field(default_factory=dict)
    pickled: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def find(cls, directory: Path) -> WeightFiles:
        """The weights in a directory; reads the files' headers, no tensor.

        Raises:
            UserError: there are none, they are pickled, a shard is missing or damaged, or the index
                and the shards contradict each other.
        """
        if (directory / INDEX).is_file():
            return cls(directory, _indexed(directory))
        single = directory / SINGLE
        if not single.is_file():
            pickles = sorted(f.name for pattern in PICKLES for f in directory.glob(pattern))
            raise UserError(
                f"{directory}: its weights are pickled ({', '.join(pickles[:3])}), and a pickle "
                f"can run code when it is read; convert them to {SINGLE} where you trust them"
                if pickles
                else f"{directory}: there is neither {SINGLE} nor {INDEX}"
            )
        return cls(single, dict.fromkeys(_names(single), single))

    def under(self, names: dict[str, str]) -> WeightFiles:
        """Some of the tensors, by other names: each new name with the one that it has now."""
        files = {name: self.files[stored] for name, stored in names.items()}
        return replace(self, files=files, stored_as=names)

    def with_part(self, name: str, file: Path) -> WeightFiles:
        """These, and a pickled part's tensors as `name.…`; reads none of them.

        Raises:
            UserError: the file holds anything but tensors.
        """
        tensors = {f"{name}.{key}": tensor for key, tensor in _unpickled(file).items()}
        files = {**self.files, **dict.fromkeys(tensors, file)}
        return replace(self, files=files, pickled={**self.pickled, **tensors})

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype (as safetensors names it) of each tensor; reads no tensor."""
        found = {
            name: (tuple(tensor.shape), DTYPES.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in self.pickled.items()
        }
        for file, names in self._by_file().items():
            with opened(file) as stored:
                for name in names:
                    entry = stored.get_slice(self.stored_as.get(name, name))
                    found[name] = (tuple(entry.get_shape()), entry.get_dtype())
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, read from the headers alone."""
        return {name: shape for name, (shape, _) in self.headers().items()}

    def mapped(self) -> dict[str, Tensor]:
        """All tensors, memory-mapped."""
        return dict(self._read(unmap_at=None))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor after another, memory-mapped; little stays mapped of those that are let go."""
        return self._read(unmap_at=MAPPED_BYTES)

    def _read(self, unmap_at: int | None) -> Iterator[tuple[str, Tensor]]:
        yield from self.pickled.items()
        for file, names in self._by_file().items():
            left = names[::-1]
            while left:
                read = 0
                with opened(file) as stored:
                    while left and (unmap_at is None or read < unmap_at):
                        name = left.pop()
                        tensor = stored.get_tensor(self.stored_as.get(name, name))
                        read += tensor.nbytes
                        yield name, tensor
                        del tensor

    def _by_file(self) -> dict[Path, list[str]]:
        names = defaultdict(list)
        for name, file in self.files.items():
            if name not in self.pickled:
                names[file].append(name)
        return names


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _unpickled(file: Path) -> dict[str, Tensor]:
    """A state dict that `torch.save` wrote, memory-mapped, names without DDP's prefix."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a broken pickle provokes whatever it likes
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: not a readable file of tensors ({first})") from None
    pairs = content.items() if isinstance(content, dict) else ((None, content),)
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise UserError(f"{file}: holds other things than tensors by name")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def _names(file: Path) -> list[str]:
    with opened(file) as stored:
        return list(stored.keys())


def _indexed(directory: Path) -> dict[str, Path]:
    index = directory / INDEX
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise UserError(f"{index}: expected a 'weight_map' from tensors to files")
    shards = sorted(set(listed.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index}: '{shard}' is no safetensors file of this directory")
    if absent := [shard for shard in shards if not (directory / shard).is_file()]:
        raise UserError(
            f"{index}: names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not "
            "there; copy the checkpoint again"
        )
    held = {name: shard for shard in shards for name in _names(directory / shard)}
    if wrong := sorted(
        name for name in listed.keys() | held.keys() if listed.get(name) != held.get(name)
    ):
        name = wrong[0]
        raise UserError(
            f"{index}: puts {name} in {listed.get(name, 'no file')}, and it is in "
            f"{held.get(name, 'none of the shards')} ({len(wrong)} such tensors); copy the "
            "checkpoint again"
        )
    return {name: directory / shard for name, shard in held.items()}
