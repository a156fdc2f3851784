"""Unstructured and 2:4 sparsity: single weights of the decoder's layers become zero.

The baselines that structured pruning is compared with. The matrices keep their shapes, so nothing
gets smaller or faster by this alone.

    magnitude   the smallest weights of each matrix
    wanda       the smallest |weight| × norm of the input, row by row (Sun et al., arXiv 2306.11695)
    sparsegpt   what can best be made up for by the weights that stay, which change (Frantar and
                Alistarh, arXiv 2301.00774)

Layer by layer: each is calibrated on what the sparse layers before it give, and only one layer's
statistics are held at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlrc_ros.vla.openvla import OpenVLA
from training.config import SparsifyConfig
from training.data.batches import Batch, DemonstrationBatches
from training.importance import SeenTokens, decoder_linears, rows
from training.sft import bc_loss

BLOCK = 128
"""Columns that SparseGPT decides on together."""
DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to it."""


def sparsify(model: OpenVLA, batches: DemonstrationBatches, config: SparsifyConfig) -> None:
    """Set weights of the decoder's layers to zero, in place."""
    size = min(config.calibration_batch, config.calibration_samples)
    count = max(1, config.calibration_samples // size)
    layers = model.language_model.model.layers
    if config.method == "magnitude":
        for layer in tqdm(layers, "magnitude", unit="layer"):
            for linear in _linears(layer):
                _zero_smallest(linear.weight, linear.weight.abs(), config, whole_matrix=True)
        return
    flow = _Flow(model, (batches.sample(size) for _ in range(count)))
    for layer in tqdm(layers, config.method, unit="layer"):
        if config.method == "wanda":
            for linear, norm in flow.statistics(layer, _squares):
                _zero_smallest(linear.weight, linear.weight.abs() * norm.sqrt(), config)
        else:
            for linear, hessian in flow.statistics(layer, _products):
                sparsegpt(linear.weight, hessian, config)
        flow.advance(layer)


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(0)


def _products(x: Tensor) -> Tensor:
    return x.T @ x


class _Reached(Exception):
    """The first layer was reached, and the rest of the pass is not wanted."""


class _Flow:
    """What flows through the decoder's layers in calibration, layer by layer."""

    @torch.no_grad()
    def __init__(self, model: OpenVLA, batches: Iterable[Batch]) -> None:
        # (hidden states, mask of what is no padding, the layer's other arguments) of each batch
        self._held: list[tuple[Tensor, Tensor | None, dict[str, Any]]] = []

        def catch(_: nn.Module, arguments: tuple[Tensor, ...], others: dict[str, Any]) -> None:
            self._held.append((arguments[0], seen.mask, others))
            raise _Reached

        first = model.language_model.model.layers[0]
        with SeenTokens(model) as seen, contextlib.ExitStack() as hooks:
            hooks.callback(first.register_forward_pre_hook(catch, with_kwargs=True).remove)
            for batch in batches:
                with contextlib.suppress(_Reached):
                    bc_loss(model, batch)

    @torch.no_grad()
    def statistics(self, layer: nn.Module, of: Any) -> Iterator[tuple[nn.Linear, Tensor]]:
        """Each projection of the layer with the sum of `of` (tokens, inputs) over its inputs."""
        sums: dict[nn.Linear, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            mask: Tensor | None = None

            def add(linear: Any, arguments: tuple[Tensor, ...]) -> None:
                found = of(rows(arguments[0], mask))
                sums[linear] = sums[linear] + found if linear in sums else found

            for linear in _linears(layer):
                hooks.callback(linear.register_forward_pre_hook(add).remove)
            for hidden, mask, others in self._held:  # noqa: B007 `add` reads the mask
                layer(hidden, **others)
        while sums:  # each is needed once, and SparseGPT's are large
            yield sums.popitem()

    @torch.no_grad()
    def advance(self, layer: nn.Module) -> None:
        """Pass on to the next layer what this one gives now."""
        self._held = [
            (layer(hidden, **others), mask, others) for hidden, mask, others in self._held
        ]


@torch.no_grad()
def _zero_smallest(
    weight: Tensor, scores: Tensor, config: SparsifyConfig, whole_matrix: bool = False
) -> None:
    """Zero the lowest scores: of every four, of the matrix, or of each row."""
    if config.pattern == "2:4":
        weight.masked_fill_(_lowest_two_of_four(scores), 0)
        return
    flat = scores.reshape(1, -1) if whole_matrix else scores
    count = int(flat.shape[1] * config.sparsity)
    lowest = flat.argsort(dim=1, stable=True)[:, :count]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, lowest, True)
    weight.masked_fill_(mask.view_as(weight), 0)


def _lowest_two_of_four(scores: Tensor) -> Tensor:
    """Mask of the two lowest of every four neighbours in a row; a rest of a row stays."""
    whole = scores.shape[1] // 4 * 4
    lowest = scores[:, :whole].unflatten(1, (-1, 4)).argsort(dim=2, stable=True)[..., :2]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[:, :whole].unflatten(1, (-1, 4)).scatter_(2, lowest, True)
    return mask


@torch.no_grad()
def sparsegpt(weight: Tensor, hessian: Tensor, config: SparsifyConfig) -> None:
    """Make one matrix sparse, in place, changing what stays to make up for it.

    Args:
        weight: (outputs, inputs).
        hessian: (inputs, inputs), the sum of x xᵀ over inputs x of the layer.
        config: how sparse.
    """
    w = weight.float()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        block, within = w[:, start:end], factor[start:end, start:end]
        errors = torch.zeros_like(block)
        if config.pattern == "unstructured":
            scores = block.square() / within.diagonal().square()
            count = int(scores.numel() * config.sparsity)
            mask = torch.zeros_like(block, dtype=torch.bool)
            mask.view(-1)[scores.flatten().argsort(stable=True)[:count]] = True
        for i in range(end - start):
            if config.pattern == "2:4" and i % 4 == 0:
                scores = block[:, i : i + 4].square() / within.diagonal()[i : i + 4].square()
                four = _lowest_two_of_four(scores)
            gone = four[:, i % 4] if config.pattern == "2:4" else mask[:, i]
            kept = block[:, i].masked_fill(gone, 0)
            errors[:, i] = (block[:, i] - kept) / within[i, i]
            block[:, i] = kept
            block[:, i + 1 :] -= errors[:, i, None] * within[i, i + 1 :]
        w[:, end:] -= errors @ factor[start:end, end:]
    weight.copy_(w)


@contextlib.contextmanager
def zeros_held(model: OpenVLA) -> Iterator[None]:
    """Meanwhile weights of the decoder's layers that are zero stay zero in training.

    Without a gradient AdamW does not move them: its moments stay zero, and decay shrinks nothing.
    """
    with contextlib.ExitStack() as hooks:
        for linear in decoder_linears(model):
            alive = linear.weight.detach() != 0
            hooks.callback(linear.weight.register_hook(lambda g, alive=alive: g * alive).remove)
        yield


def zeros(model: OpenVLA) -> dict[str, float]:
    """Share of zeros among the weights of the decoder's layers, and of the whole LLM."""
    linears = decoder_linears(model)
    count = sum(int((linear.weight == 0).sum()) for linear in linears)
    llm = sum(parameter.numel() for parameter in model.language_model.parameters())
    return {
        "zeros_of_layers": count / sum(linear.weight.numel() for linear in linears),
        "zeros_of_llm": count / llm,
    }
