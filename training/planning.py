"""What pruning will leave: widths and layers, chosen by importance, within a budget.

A plan gives every layer that is not protected the same widths, so that the kernels of one serve
all, and drops whole layers. Of all such plans within the budget the one that keeps the most
importance is taken; there are some hundred thousand, and all are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import ArchitectureConfig, DecoderConfig, LayerWidths
from training.config import PruneConfig
from training.importance import GroupScores


@dataclass(frozen=True)
class Plan:
    """What pruning will leave.

    Attributes:
        layers: indices of the decoder layers that stay, ascending.
        widths: what each of them is cut to.
        removed: share of the decoder layers' parameters that goes.
        removed_of_llm: the same amount as a share of the whole LLM, embedding and head included.
        latency: device, budget, prediction and measurement, where latency was the target.
    """

    layers: tuple[int, ...]
    widths: tuple[LayerWidths, ...]
    removed: float
    removed_of_llm: float
    latency: dict[str, Any] | None = None


def decoders_of(architecture: ArchitectureConfig) -> dict[str, DecoderConfig]:
    """What may be pruned, by part: `llm`, and of pi0 also `expert`, as a decoder without words."""
    found = {"llm": architecture.decoder}
    if (expert := architecture.expert) is not None:
        found["expert"] = replace(
            architecture.decoder, hidden_size=expert.hidden_size, layers=expert.layers
        )
    return found


def layer_parameters(hidden: int, head_dim: int, widths: LayerWidths) -> int:
    """Weights of one decoder layer's projections."""
    return hidden * head_dim * 2 * (widths.heads + widths.kv_heads) + 3 * hidden * widths.ffn


def make_plan(decoder: DecoderConfig, layers: Sequence[int], widths: Sequence[LayerWidths]) -> Plan:
    """A plan with its shares worked out."""
    hidden, head = decoder.hidden_size, decoder.head_dim
    total = sum(layer_parameters(hidden, head, layer) for layer in decoder.layers)
    gone = total - sum(layer_parameters(hidden, head, layer) for layer in widths)
    whole = total + 2 * decoder.vocab_size * hidden + (2 * len(decoder.layers) + 1) * hidden
    return Plan(tuple(layers), tuple(widths), gone / total, gone / whole)


def uniform_plan(
    config: PruneConfig, architecture: ArchitectureConfig, layer_scores: list[float]
) -> Plan:
    """Choose layers by score, the first and the last always, and one width for all of them.

    Heads and feed-forward are kept in the same proportion as nearly as the budget allows.

    Raises:
        UserError: the share cannot be removed while anything is left of every kept layer.
    """
    assert config.remove is not None and config.keep_layers is not None
    decoder = architecture.decoder
    hidden, head = decoder.hidden_size, decoder.head_dim
    if config.keep_layers > len(decoder.layers):
        raise UserError(
            f"prune: keep_layers is {config.keep_layers}, and the policy has {len(decoder.layers)}"
        )
    inner = range(1, len(decoder.layers) - 1)
    best = sorted(inner, key=lambda i: layer_scores[i], reverse=True)[: config.keep_layers - 2]
    kept = tuple(sorted({0, len(decoder.layers) - 1, *best}))
    total = sum(layer_parameters(hidden, head, widths) for widths in decoder.layers)
    budget = (1 - config.remove) * total / len(kept)
    full = decoder.layers[0]
    group = full.heads // full.kv_heads
    candidates = []
    for kv_heads in range(1, full.kv_heads + 1):
        attention = (
            layer_parameters(hidden, head, LayerWidths(kv_heads * group, kv_heads, 1)) - 3 * hidden
        )
        room = int(
            (budget - attention) // (3 * hidden) // config.ffn_multiple * config.ffn_multiple
        )
        if room >= config.ffn_multiple:
            widths = LayerWidths(kv_heads * group, kv_heads, min(room, full.ffn))
            candidates.append(widths)
    if not candidates:
        smallest = LayerWidths(group, 1, config.ffn_multiple)
        possible = 1 - len(kept) * layer_parameters(hidden, head, smallest) / total
        raise UserError(
            f"prune: {config.remove:.1%} of the decoder's layers cannot be removed with "
            f"{len(kept)} of them kept; "
            f"at most {possible:.1%} can. Keep fewer layers, or remove less"
        )
    chosen = min(candidates, key=lambda w: abs(w.kv_heads / full.kv_heads - w.ffn / full.ffn))
    return make_plan(decoder, kept, (chosen,) * len(kept))


class Cost(Protocol):
    """What is kept within a budget."""

    @property
    def fixed(self) -> float:
        """What is there whatever is pruned."""
        ...

    @property
    def idle(self) -> int:
        """Of the layers that may be cut, how many cost nothing but their part of `fixed`."""
        ...

    def attention(self, heads: int, kv_heads: int) -> float:
        """One layer's share that its attention causes, and what every layer has."""
        ...

    def channels(self, ffn: int) -> float:
        """One layer's share that its feed-forward causes."""
        ...

    def shortfall(self, least: float) -> str:
        """One clause: the budget, and the least that can be reached."""
        ...


@dataclass(frozen=True)
class StorageCost:
    """Parameters or bytes.

    Attributes:
        decoder: whose.
        layer_unit: of one weight of a layer's projections.
        other_unit: of one value of embedding, head and norms.
        target: the configuration's key, and its value, to tell of.
    """

    decoder: DecoderConfig
    layer_unit: float
    other_unit: float
    target: tuple[str, float]
    idle = 0

    @property
    def fixed(self) -> float:
        """Embedding, head, final norm."""
        hidden = self.decoder.hidden_size
        return self.other_unit * (2 * self.decoder.vocab_size * hidden + hidden)

    def attention(self, heads: int, kv_heads: int) -> float:
        """Projections of the attention, and the layer's norms."""
        hidden = self.decoder.hidden_size
        weights = hidden * self.decoder.head_dim * 2 * (heads + kv_heads)
        return self.layer_unit * weights + self.other_unit * 2 * hidden

    def channels(self, ffn: int) -> float:
        """Gate, up and down."""
        return self.layer_unit * 3 * self.decoder.hidden_size * ffn

    @property
    def total(self) -> float:
        """Of the decoder as it is."""
        return self.fixed + sum(
            self.attention(w.heads, w.kv_heads) + self.channels(w.ffn) for w in self.decoder.layers
        )

    def shortfall(self, least: float) -> str:
        """The target, and the least that can be reached."""
        name, value = self.target
        if name == "max_bytes":
            return f"the LLM cannot be cut to {value:,.0f} bytes, at the least to {least:,.0f}"
        of = "the LLM's parameters" if name == "remove_of_llm" else "the decoder's layers"
        possible = 1 - least / self.total
        return f"{value:.1%} of {of} cannot be removed, at most {possible:.1%} can"


def storage_cost(config: PruneConfig, decoder: DecoderConfig) -> tuple[StorageCost, float]:
    """The cost that a share or a number of bytes speaks of, and its budget."""
    if config.max_bytes is not None:
        bits = config.weight_bits or 16
        target = ("max_bytes", float(config.max_bytes))
        return StorageCost(decoder, bits / 8, 2, target), config.max_bytes
    if config.remove_of_llm is not None:
        cost = StorageCost(decoder, 1, 1, ("remove_of_llm", config.remove_of_llm))
        return cost, (1 - config.remove_of_llm) * cost.total
    assert config.remove is not None
    cost = StorageCost(decoder, 1, 0, ("remove", config.remove))
    return cost, (1 - config.remove) * cost.total


def best_plan(
    config: PruneConfig,
    decoder: DecoderConfig,
    scores: Sequence[GroupScores],
    cost: Cost,
    budget: float,
) -> Plan:
    """The plan that keeps the most importance within the budget.

    The `protect` first and last layers stay whole.

    Raises:
        UserError: no plan of this granularity is within the budget, with what can be reached; the
            decoder is too short for so many protected layers, or was pruned before.
    """
    inner = inner_layers(config, decoder)
    full = decoder.layers[inner[0]]
    attention, ffn = _options(config, decoder, full)
    values = _importance(config, [scores[i] for i in inner], attention, ffn, full)
    prices = np.add.outer(
        [cost.attention(heads, kv_heads) for heads, kv_heads in attention],
        [cost.channels(width) for width in ffn],
    )
    whole = [layer for i, layer in enumerate(decoder.layers) if i not in inner]
    start = cost.fixed + sum(
        cost.attention(w.heads, w.kv_heads) + cost.channels(w.ffn) for w in whole
    )
    fewest = 0 if config.granularity != "width" and whole else 1
    if config.granularity == "width":
        fewest = len(inner)
    counts = np.arange(fewest, len(inner) + 1)
    # (counts, attention, ffn): keeping the best layers of each shape
    ranked = -np.sort(-values, axis=0)
    kept = np.concatenate([np.zeros_like(ranked[:1]), ranked.cumsum(0)])[counts]
    spent = start + (counts[:, None, None] - cost.idle) * prices
    if not (spent <= budget * (1 + 1e-12)).any():
        raise UserError(
            f"prune: {cost.shortfall(float(spent.min()))} with granularity '{config.granularity}' "
            f"and {len(whole)} layers protected. Ask for less, protect fewer, or choose another "
            "granularity"
        )
    kept = np.where(spent <= budget * (1 + 1e-12), kept, -np.inf)
    # Of equally important plans the cheapest, and of those the first.
    best = np.lexsort((spent.ravel(), -kept.ravel()))[0]
    count, a, f = np.unravel_index(best, kept.shape)
    stay = np.argsort(-values[:, a, f], kind="stable")[: counts[count]]
    (heads, kv_heads), chosen = attention[a], set(stay.tolist())
    left = [i for i in range(len(decoder.layers)) if i not in inner or i - inner[0] in chosen]
    cut = LayerWidths(heads, kv_heads, ffn[f])
    return make_plan(decoder, left, [cut if i in inner else decoder.layers[i] for i in left])


def inner_layers(config: PruneConfig, decoder: DecoderConfig) -> range:
    """The layers that may be cut.

    Raises:
        UserError: there is none, or they differ in width.
    """
    protect = 1 if config.protect is None else config.protect
    inner = range(protect, len(decoder.layers) - protect)
    if not inner:
        raise UserError(
            f"prune: 'protect' is {protect}, and the policy has {len(decoder.layers)} layers"
        )
    if len({decoder.layers[i] for i in inner}) > 1:
        raise UserError("prune: the policy's layers differ in width; prune the original instead")
    return inner


def _options(
    config: PruneConfig, decoder: DecoderConfig, full: LayerWidths
) -> tuple[list[tuple[int, int]], list[int]]:
    """Widths to choose from: (heads, kv_heads) of the attention, and of the feed-forward."""
    if config.granularity == "depth":
        return [(full.heads, full.kv_heads)], [full.ffn]
    per_group, multiple = full.heads // full.kv_heads, config.attention_multiple or decoder.head_dim
    if config.attention == "heads":
        options = [(full.kv_heads * n, full.kv_heads) for n in range(1, per_group + 1)]
        aligned = [o for o in options[:-1] if o[0] * decoder.head_dim % multiple == 0]
    else:
        options = [(n * per_group, n) for n in range(1, full.kv_heads + 1)]
        aligned = [o for o in options[:-1] if o[1] * decoder.head_dim % multiple == 0]
    widths = range(config.ffn_multiple, full.ffn, config.ffn_multiple)
    return [*aligned, options[-1]], [*widths, full.ffn]


def _importance(
    config: PruneConfig,
    scores: Sequence[GroupScores],
    attention: Sequence[tuple[int, int]],
    ffn: Sequence[int],
    full: LayerWidths,
) -> NDArray[np.float64]:
    """What a layer keeps of its importance at each width: (layers, attention, ffn)."""

    def kept(values: Any, per_group: bool = False) -> NDArray[np.float64]:
        """Sums of the largest 0, 1, 2, … values, or of the largest in each group."""
        array = values.double().cpu().numpy()
        if per_group:
            ordered = -np.sort(-array.reshape(full.kv_heads, -1), axis=1)
            array = ordered.sum(0)
        else:
            array = -np.sort(-array)
        return np.array([0.0, *accumulate(array)])

    tables = []
    for score in scores:
        if config.attention == "heads":
            # What every group keeps, its keys and values, no choice of heads changes.
            heads = kept(score.heads, per_group=True) + float(
                score.groups.sum() - score.heads.sum()
            )
            a = heads[[h // kv for h, kv in attention]]
        else:
            a = kept(score.groups)[[kv for _, kv in attention]]
        tables.append(np.add.outer(a, kept(score.channels)[list(ffn)]))
    return np.stack(tables)
