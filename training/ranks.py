"""Processes that train together, each on a device of its own.

    accelerate launch --num_processes 2 -m rlrc_ros.cli.main sft CONFIG …
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_endpoint HOST:29500 -m rlrc_ros.cli.main sft …

Whoever is not started so trains alone, and nothing here does anything. docs/training.md says more.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from training.common import seed_everything

PATIENCE = timedelta(hours=12)
"""How long processes wait for one that collects corrections, or loads a large policy."""
SPACING = 1_000_003
"""Between the seeds of processes."""


class Ranks:
    """This process among those that train together.

    Attributes:
        count: how many there are.
        number: this one's, from 0.
        sharded: whether each holds a part of the weights (FSDP2) instead of all of them (DDP).
    """

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes if accelerator else 1
        self.number: int = accelerator.process_index if accelerator else 0
        self.sharded = self.many and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"

    @property
    def first(self) -> bool:
        """Whether this is the one that logs, saves and collects."""
        return self.number == 0

    @property
    def many(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    @property
    def facts(self) -> dict[str, Any]:
        """What a bundle's provenance says of them: nothing of one that was alone."""
        sharded = {"sharded": True} if self.sharded else {}
        return {"processes": self.count, **sharded} if self.many else {}

    def share_of(self, total: int, what: str) -> int:
        """This process's part of a number.

        Raises:
            UserError: it cannot be divided evenly.
        """
        if total % self.count:
            raise UserError(
                f"{what} is {total}, and cannot be divided among {self.count} processes"
            )
        return total // self.count

    def wrap(self, module: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
        """The module to be called, so that its gradients are averaged: DDP's, or sharded in place.

        Parameters are the first process's from here on. With FSDP2 they are others than before, and
        all of them must come from the same weights.

        blocks: parts of it that are gathered one after another where it is sharded.
        """
        if not self.many:
            return module
        if not self.sharded:
            # Blocks are compiled one by one, between which DDP sends gradients as it is.
            torch._dynamo.config.optimize_ddp = False
            return self._accelerator.prepare(module)
        from torch.distributed.device_mesh import init_device_mesh  # these take half a second
        from torch.distributed.fsdp import fully_shard

        # Not through `prepare`, which shards on GPUs only, and wants to be told the blocks by name.
        mesh = init_device_mesh(self._accelerator.device.type, (self.count,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def gathering(self, wrapped: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around a backward pass: only that of a batch's last part averages what was added up."""
        if last or self.sharded or not self.many:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(wrapped)

    def unshard(self, module: nn.Module) -> None:
        """Give a module that was sharded all of its weights back, on every process."""
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if in_parts(parameter):
                    part.register_parameter(name, nn.Parameter(whole(parameter.detach())))

    def reseed(self) -> None:
        """Let this process draw something else than the others, who had the same seed until now."""
        if self.number:
            seed_everything((torch.initial_seed() + SPACING * self.number) % 2**32)

    def wait(self) -> None:
        """For all the others to come here."""
        if self.many:
            self._accelerator.wait_for_everyone()

    def leave(self) -> None:
        """All are done."""
        if self.many:
            self.wait()
            self._accelerator.end_training()

    def mean(self, values: Tensor) -> Tensor:
        """Over all processes."""
        if not self.many:
            return values
        total = values.detach().to(self._accelerator.device).clone()
        dist.all_reduce(total)
        return (total / self.count).to(values.device)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """For modules that are not wrapped: one message with the gradients of all parameters."""
        if not self.many:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        places = flat.split([gradient.numel() for gradient in gradients])
        for gradient, place in zip(gradients, places, strict=True):
            gradient.copy_(place.view_as(gradient))

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every process's, in order; all have the same shape."""
        if not self.many:
            return [value]
        mine = value.to(self._accelerator.device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine)
        return [each.to(value.device) for each in found]

    def everyones(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that differ between processes, under names of their own."""
        return {
            self._name(name, number): value
            for name, tensor in tensors.items()
            for number, value in enumerate(self.gather(tensor))
        }

    def mine(self, tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Of what `everyones` made, this process's."""
        return {name: tensors[self._name(name, self.number)] for name in names}

    def require(self, count: int, checkpoint: Path) -> None:
        """Refuse to go on with more or fewer processes: each has drawn its own samples so far.

        Raises:
            UserError: there are not as many.
        """
        if count != self.count:
            raise UserError(
                f"{checkpoint}: is of a run of {count} processes, and now there are {self.count}; "
                "start as many, or delete it to begin anew"
            )

    @staticmethod
    def _name(name: str, number: int) -> str:
        return f"rank{number}.{name}" if number else name

    def from_first(
        self, found: tuple[dict[str, Tensor], Any] | None
    ) -> tuple[dict[str, Tensor], Any] | None:
        """What the first process has, tensors and JSON-able facts, or None; others give None."""
        if not self.many:
            return found
        tensors, facts = found or ({}, None)
        shapes = {n: (str(t.dtype).removeprefix("torch."), t.shape) for n, t in tensors.items()}
        header = json.dumps({"there": found is not None, "facts": facts, "shapes": shapes}).encode()
        size = int(self._broadcast(torch.tensor(len(header))))
        text = torch.zeros(size, dtype=torch.uint8)
        if self.first:
            text = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        told = json.loads(self._broadcast(text).numpy().tobytes())
        for name, (dtype, shape) in told["shapes"].items():
            mine = tensors[name] if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            tensors[name] = self._broadcast(mine)
        return (tensors, told["facts"]) if told["there"] else None

    def _broadcast(self, tensor: Tensor) -> Tensor:
        there = tensor.to(self._accelerator.device).contiguous()
        dist.broadcast(there, 0)
        return there.to(tensor.device)


def in_parts(tensor: Any) -> bool:
    """Whether it is a DTensor, of which with FSDP2 every process has a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if in_parts(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """This process's part of it, in the same memory."""
    return tensor.to_local() if in_parts(tensor) else tensor


def like(full: Tensor, tensor: Any) -> Tensor:
    """A whole tensor in parts as another one has them, if it has."""
    if not in_parts(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(tensor.device), tensor.device_mesh, tensor.placements)


ALONE = Ranks()


def launched() -> bool:
    """Whether a launcher started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@functools.cache
def join(device: str | None) -> Ranks:
    """Find the others, and take this process's own device as torch's current one.

    device: `cpu` if it shall be that.
    """
    if not launched():
        return ALONE
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError("FSDP 1 is not there; launch with --fsdp_version 2")
    settings = [
        InitProcessGroupKwargs(timeout=PATIENCE),
        # Pretrained towers have layers behind the one that is looked at.
        DistributedDataParallelKwargs(find_unused_parameters=True),
    ]
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    return Ranks(Accelerator(cpu=on_cpu, kwargs_handlers=settings))


def refuse_launch(verb: str) -> None:
    """Say that a stage is done by one process.

    Raises:
        UserError: this is one of several.
    """
    if launched():
        raise UserError(f"{verb} is done by one process; launch sft and rl, and run this alone")
