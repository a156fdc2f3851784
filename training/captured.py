"""A training step as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor


class CapturedStep:
    """A training step that becomes one CUDA graph, so that the GPU never waits for the host.

    Small policies take less time on a GPU than Python takes to launch their kernels.

    Args:
        step: draws its batch and its randomness on the device, and takes numbers that change from
            step to step from tensors; returns a tensor.
    """

    WARM_UP = 4
    """Steps outside a graph first: what is compiled or allocated once is by then."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self._step, self._key, self._left = step, object(), self.WARM_UP
        self._stream = torch.cuda.Stream()

    def __call__(self, key: object) -> Tensor:
        """Take one step; captured anew when `key` differs from the one before."""
        if key != self._key:
            self._key, self._left, self._graph = key, self.WARM_UP, None
            gc.collect()  # what is left of an earlier backward pass binds gradients to its stream
        if self._left:
            self._left -= 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._result = self._step()
        self._graph.replay()
        return self._result
