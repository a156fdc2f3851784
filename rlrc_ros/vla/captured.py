"""What engines for a GPU share: inputs in fixed places, and one CUDA graph a length of prompt.

A graph begins with the copies of its inputs from page-locked memory of the host and ends with the
copy of its answer to there, so that an action is one call. The same code runs without a graph: on a
CPU, and for prompts longer than any that was captured.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrc_ros.vla import matrices
from rlrc_ros.vla.openvla import Inputs

log = logging.getLogger(__name__)


def operations_for(device: torch.device, head_dim: int) -> ModuleType:
    """Triton kernels where they can run, else the same in plain PyTorch."""
    if device.type == "cuda" and head_dim & (head_dim - 1) == 0:
        try:
            from rlrc_ros.vla import kernels
        except ImportError as error:
            log.warning("Triton is not installed (%s); actions will take longer", error)
        else:
            return kernels
    return matrices


@lru_cache
def side_stream(device: torch.device, _number: int) -> torch.cuda.Stream:
    """The same for all engines, since cuBLAS keeps 32 MiB for every stream that it meets."""
    return torch.cuda.Stream(device)


@dataclass
class Slots:
    """Where an action's inputs are put, for one length of prompt.

    Attributes:
        images: (N, H, W, 3) uint8.
        words: the prompt, embedded and padded, (tokens, hidden).
        count: how many tokens of the prompt are no padding, (1,) int64.
        state: proprioception, (1, P), if the policy takes some.
        prompt: the tokens that are in `words`, on the host; None where none are yet.
    """

    images: Tensor
    words: Tensor
    count: Tensor
    state: Tensor | None
    prompt: Tensor | None = None

    @property
    def _tensors(self) -> list[Tensor]:
        found = [self.images, self.words, self.count]
        return found if self.state is None else [*found, self.state]

    def on(self, device: torch.device) -> Slots:
        """A copy there; itself, if it is there."""
        state = None if self.state is None else self.state.to(device)
        return Slots(self.images.to(device), self.words.to(device), self.count.to(device), state)

    def send(self, to: Slots) -> None:
        """Copy into others."""
        for source, target in zip(self._tensors, to._tensors, strict=True):
            target.copy_(source, non_blocking=True)


@dataclass(frozen=True)
class Room:
    """Where keys and values lie, for prompts up to some length.

    Attributes:
        caches: of each layer, (2, kv_heads, capacity, head_dim), or nothing.
        positions: 0, 1, ..., (capacity,).
        cos: of the rotary embedding, (capacity, head_dim) float32, as is `sin`.
    """

    caches: list[Tensor]
    positions: Tensor
    cos: Tensor
    sin: Tensor


class CapturedEngine(ABC):
    """One observation at a time, in one graph for each length of prompt.

    Args:
        device: where its weights are.
        dtype: of states and words.
        embedding: of all words. Some rows of it an action are looked up on the host, and a GPU has
            room for other things.
        images: the shape of an observation's, (N, H, W, 3).
        state: numbers of proprioception, if it takes some.
        lengths: of prompts that graphs are captured for; none on a CPU.
    """

    name = "graph"
    takes_bytes = True
    _padding_id = 0

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        embedding: Tensor,
        images: tuple[int, ...],
        state: int | None,
        lengths: Sequence[int],
    ) -> None:
        self._device, self._dtype, self._embedding = device, dtype, embedding.detach().cpu()
        self._images, self._state = images, state
        self._on_gpu = device.type == "cuda"
        self._lengths = sorted(lengths) if self._on_gpu else []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Slots, Tensor, Slots]] = {}
        self._room: Room

    @abstractmethod
    def _act(self, slots: Slots) -> Tensor:
        """Everything between the inputs and the numbers that go back to the host."""

    @abstractmethod
    def _needed(self, length: int) -> int:
        """Places that a prompt of `length` tokens takes, with all that belongs to it."""

    @abstractmethod
    def _make_room(self, length: int) -> Room:
        """As many places."""

    def _words(self, length: int) -> int:
        """Rows of `Slots.words` for a prompt of `length`."""
        return length

    def prepare(self) -> float:
        """Capture every graph, so that no robot waits for one.

        Returns the seconds it took.
        """
        start = time.perf_counter()
        with self._current_device():
            for length in reversed(self._lengths):
                if length not in self._graphs:
                    self._capture(length)
        return time.perf_counter() - start

    @torch.inference_mode()
    def _out(self, inputs: Inputs) -> Tensor:
        """What `_act` gives for one observation on the CPU, its images in bytes."""
        if len(inputs) != 1 or inputs.pixel_values.dtype != torch.uint8:
            raise ValueError("the graph engine takes one observation at a time, its image in bytes")
        with self._current_device():
            return self._run(inputs)

    def _run(self, inputs: Inputs) -> Tensor:
        """By the smallest graph that has room; without one where none has."""
        length = inputs.input_ids.shape[1]
        fitting = [number for number in self._lengths if number >= length]
        if fitting:
            if fitting[0] not in self._graphs:
                self._capture(fitting[0])
            graph, staged, answer, _ = self._graphs[fitting[0]]
            self._fill(staged, inputs)
            graph.replay()
            torch.cuda.current_stream().synchronize()
            return answer.clone()  # which the next one overwrites
        if self._lengths:
            log.warning(
                "a prompt of %d tokens is longer than any that was prepared for (%d): this action "
                "takes longer",
                length,
                self._lengths[-1],
            )
        slots = self._slots(length)
        self._fill(slots, inputs)
        return self._beyond(slots.on(self._device), length).cpu()

    def _slots(self, length: int) -> Slots:
        """On the host, page-locked where a GPU is to fetch from them."""
        kind: dict[str, Any] = {"dtype": self._dtype, "pin_memory": self._on_gpu}
        whole: dict[str, Any] = {**kind, "dtype": torch.uint8}
        count: dict[str, Any] = {**kind, "dtype": torch.long}
        return Slots(
            torch.zeros(self._images, **whole),
            torch.zeros(self._words(length), self._embedding.shape[1], **kind),
            torch.full((1,), length, **count),
            torch.zeros(1, self._state, **kind) if self._state else None,
        )

    def _fill(self, slots: Slots, inputs: Inputs) -> None:
        ids = inputs.input_ids[0]
        slots.images.copy_(inputs.pixel_values.reshape(slots.images.shape))
        if slots.prompt is None or not torch.equal(ids, slots.prompt):  # it rarely changes
            padded = F.pad(ids, (0, len(slots.words) - len(ids)), value=self._padding_id)
            torch.index_select(self._embedding, 0, padded, out=slots.words)
            slots.count.fill_(len(ids))
            slots.prompt = ids.clone()
        if slots.state is not None and inputs.proprioception is not None:
            slots.state[:, : inputs.proprioception.shape[1]] = inputs.proprioception

    def _current_device(self) -> AbstractContextManager[Any]:
        """Triton and graphs use whichever GPU is current."""
        return torch.cuda.device(self._device) if self._on_gpu else nullcontext()

    def _capture(self, length: int) -> None:
        staged = self._slots(length)
        slots = staged.on(self._device)
        with torch.inference_mode():
            stream = side_stream(self._device, 0)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # kernels are compiled, libraries get ready
                    out = self._act(slots)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize(self._device)
            answer = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            del out
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                staged.send(slots)
                out = self._act(slots)
                answer.copy_(out, non_blocking=True)
        self._graphs[length] = (graph, staged, answer, slots)  # its slots are kept for it

    def _beyond(self, slots: Slots, length: int) -> Tensor:
        """Without a graph; where the prompt has no room, in other places for this once."""
        kept = self._room
        if self._needed(length) <= len(kept.positions):
            return self._act(slots)
        try:
            self._room = self._make_room(length)
            return self._act(slots)
        finally:
            if self._graphs:
                self._room = kept
