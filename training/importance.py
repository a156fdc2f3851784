"""How much heads, feed-forward channels and whole layers of the decoder matter.

Four measures of a single weight; a group of coupled weights scores their sum:

    taylor      |weight × gradient| of the SFT loss, first order (LLM-Pruner, Ma et al., arXiv
                2305.11627, as RLRC uses it)
    magnitude   |weight|
    activation  |weight| × norm of what it is multiplied with (Wanda, Sun et al., arXiv 2306.11695)
    random      what the others have to beat
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlrc_ros.vla.openvla import OpenVLA
from training.config import PruneConfig
from training.data.batches import Batch, DemonstrationBatches
from training.sft import bc_loss

BATCH = 64
"""Steps at a time in calibration, unless the configuration says otherwise."""

Measure = Callable[[nn.Linear], Tensor]
"""The importance of each weight of a layer, in the shape of its matrix."""


@dataclass(frozen=True)
class GroupScores:
    """Importance of one decoder layer's prunable parts.

    Attributes:
        groups: (kv_heads,) key-value heads, each with the query heads that share it.
        heads: (heads,) query heads alone: their rows of q and columns of o.
        channels: (ffn,) feed-forward channels.
    """

    groups: Tensor
    heads: Tensor
    channels: Tensor


def decoder_linears(model: OpenVLA) -> list[nn.Linear]:
    """Every projection of the decoder's layers."""
    layers = model.language_model.model.layers
    return [module for module in layers.modules() if isinstance(module, nn.Linear)]


@contextlib.contextmanager
def measuring(
    model: OpenVLA, batches: DemonstrationBatches | None, config: PruneConfig
) -> Iterator[Measure]:
    """A measure of weights, calibrated on demonstrations where it takes them; else without any.

    Memory: `taylor` holds one gradient for every weight of the decoder's layers, and none for the
    rest of the model, until the context ends; `activation` runs forward only and holds one number
    for each input channel.
    """
    size = min(config.calibration_batch or BATCH, config.calibration_samples)
    count = max(1, config.calibration_samples // size)

    def drawn() -> Iterator[Batch]:
        assert batches is not None
        for _ in tqdm(range(count), f"calibration ({config.importance})", unit="batch"):
            yield batches.sample(size)

    if config.importance == "taylor":
        with _gradients_of_layers_only(model):
            for batch in drawn():
                bc_loss(model, batch).backward()
            yield _taylor
        model.zero_grad(set_to_none=True)
    elif config.importance == "magnitude":
        yield lambda linear: linear.weight.abs()
    elif config.importance == "random":
        yield lambda linear: torch.rand_like(linear.weight)
    else:
        norms = input_norms(model, drawn())
        yield lambda linear: linear.weight.abs() * norms[linear]


def _taylor(linear: nn.Linear) -> Tensor:
    assert linear.weight.grad is not None
    return (linear.weight * linear.weight.grad).abs()


@contextlib.contextmanager
def _gradients_of_layers_only(model: OpenVLA) -> Iterator[None]:
    """Meanwhile only the decoder layers' projections ask for gradients; then everything does."""
    model.zero_grad(set_to_none=True)
    try:
        model.requires_grad_(False)
        for linear in decoder_linears(model):
            linear.weight.requires_grad_(True)
        yield
    finally:
        model.requires_grad_(True)


class SeenTokens:
    """While open, tells which rows of a decoder projection's input are no padding."""

    def __init__(self, model: OpenVLA) -> None:
        self._mask: Tensor | None = None
        decoder = model.language_model.model
        self._handles = [
            model.register_forward_pre_hook(self._note_inputs),
            decoder.register_forward_pre_hook(self._note_mask, with_kwargs=True),
        ]

    def _note_inputs(self, model: Any, given: tuple[Any, ...]) -> None:
        """An OpenVLA runs its decoder's layers without a mask: what is padding comes last."""
        mask = given[0].attention_mask
        if mask is not None:
            more = model.config.context + model.action_tokens - 1
            places = torch.arange(mask.shape[1] + more, device=mask.device)
            mask = places < mask.sum(1, keepdim=True) + more
        self._mask = mask

    def _note_mask(self, _: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        self._mask = given["attention_mask"]

    @property
    def mask(self) -> Tensor | None:
        """Of the pass that runs now: (B, L), or None where nothing is padding."""
        mask = self._mask  # (B, 1, 1, L) where every token sees every other
        return mask[:, 0, 0] if mask is not None and mask.ndim == 4 else mask

    def __enter__(self) -> SeenTokens:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, C) as (tokens, C) in float32, without padding."""
    return (x.flatten(0, 1) if mask is None else x[mask]).float()


@torch.no_grad()
def input_norms(model: OpenVLA, batches: Iterable[Batch]) -> dict[nn.Linear, Tensor]:
    """The L2 norm of every input channel of the decoder's projections, padding left out."""
    sums: dict[nn.Linear, Tensor] = {}
    with SeenTokens(model) as seen, contextlib.ExitStack() as hooks:

        def add(linear: Any, arguments: tuple[Tensor, ...]) -> None:
            square = rows(arguments[0], seen.mask).square().sum(0)
            sums[linear] = sums[linear] + square if linear in sums else square

        for linear in decoder_linears(model):
            hooks.callback(linear.register_forward_pre_hook(add).remove)
        for batch in batches:
            bc_loss(model, batch)
    return {linear: total.sqrt() for linear, total in sums.items()}


@torch.no_grad()
def score_layers(model: OpenVLA, measure: Measure) -> list[float]:
    """How much each whole layer matters: the sum of its weights' importance."""
    layers = model.language_model.model.layers
    return [
        sum(measure(m).sum().item() for m in layer.modules() if isinstance(m, nn.Linear))
        for layer in layers
    ]


@torch.no_grad()
def score_groups(layer: Any, measure: Measure) -> GroupScores:
    """How much each head and channel of a decoder layer matters."""
    attention, mlp = layer.self_attn, layer.mlp
    head = attention.head_dim
    kv_heads = attention.k_proj.out_features // head
    heads = attention.q_proj.out_features // head
    # Rows of q, k and v, and columns of o, belong to the heads.
    q, k, v = (measure(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    o = measure(attention.o_proj).T
    groups = torch.stack([weight.reshape(kv_heads, -1).sum(1) for weight in (q, k, v, o)]).sum(0)
    own = q.reshape(heads, -1).sum(1) + o.reshape(heads, -1).sum(1)
    # Summed as torch-pruning's group importance does, to the last bit, which a test holds.
    weights = (measure(mlp.gate_proj), measure(mlp.up_proj), measure(mlp.down_proj).T)
    channels = torch.zeros(mlp.gate_proj.out_features, device=groups.device)
    for weight in weights:
        channels += weight.sum(1)
    return GroupScores(groups, own, channels)
