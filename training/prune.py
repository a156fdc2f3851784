"""Structured pruning of the decoder: whole layers, then heads and channels of the others.

    rlrc prune CONFIG --policy BUNDLE --demonstrations DIR --out BUNDLE

Which ones go is decided by importance: first-order Taylor, |weight × gradient| of the SFT loss
summed over a group of coupled weights (LLM-Pruner, Ma et al., arXiv 2305.11627, as RLRC uses it),
or the weights' magnitude. torch-pruning finds the groups and cuts them; the residual width stays,
so embedding, head and vision are not touched.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import ArchitectureConfig, LayerWidths
from rlrc_ros.vla.openvla import OpenVLA, layer_widths
from training.bundles import Trainable
from training.common import seed_everything
from training.config import PruneConfig
from training.sft import DemonstrationBatches, bc_loss


@dataclass(frozen=True)
class Plan:
    """What pruning will leave.

    Attributes:
        layers: indices of the decoder layers that stay, ascending.
        widths: what each of them is cut to.
        removed: share of the decoder layers' parameters that goes.
        removed_of_llm: the same amount as a share of the whole LLM, embedding and head included.
    """

    layers: tuple[int, ...]
    widths: tuple[LayerWidths, ...]
    removed: float
    removed_of_llm: float


def layer_parameters(hidden: int, head_dim: int, widths: LayerWidths) -> int:
    """Weights of one decoder layer's projections."""
    return hidden * head_dim * 2 * (widths.heads + widths.kv_heads) + 3 * hidden * widths.ffn


def plan(config: PruneConfig, architecture: ArchitectureConfig, layer_scores: list[float]) -> Plan:
    """Choose layers by score, the first and the last always, and one width for all of them.

    Heads and feed-forward are kept in the same proportion as nearly as the budget allows.

    Raises:
        UserError: the share cannot be removed while anything is left of every kept layer.
    """
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
    gone = total - len(kept) * layer_parameters(hidden, head, chosen)
    whole = total + 2 * decoder.vocab_size * hidden + (2 * len(decoder.layers) + 1) * hidden
    return Plan(kept, (chosen,) * len(kept), gone / total, gone / whole)


def accumulate_gradients(model: OpenVLA, batches: DemonstrationBatches, samples: int) -> None:
    """Leave the gradient of the SFT loss over `samples` steps in every parameter's `grad`."""
    model.zero_grad(set_to_none=True)
    size = min(64, samples)
    for _ in range(max(1, samples // size)):
        bc_loss(model, batches.sample(size)).backward()


def score_layers(model: OpenVLA, importance: str) -> list[float]:
    """How much each whole layer matters: the sum of its weights' importance."""
    scores = []
    for layer in model.language_model.model.layers:
        weights = [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        scores.append(
            sum(_weight_importance(weight, importance).sum().item() for weight in weights)
        )
    return scores


def _weight_importance(weight: Tensor, importance: str) -> Tensor:
    if importance == "taylor":
        assert weight.grad is not None
        return (weight * weight.grad).abs()
    if importance == "magnitude":
        return weight.abs()
    return torch.rand_like(weight)


def prune(model: OpenVLA, batches: DemonstrationBatches, config: PruneConfig) -> Plan:
    """Prune in place.

    Raises:
        UserError: the share cannot be reached; or the cut left widths other than the planned ones.
    """
    if config.importance == "taylor":
        accumulate_gradients(model, batches, config.calibration_samples)
    chosen = plan(config, model.config, score_layers(model, config.importance))
    decoder = model.language_model.model
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in chosen.layers)
    decoder.config.num_hidden_layers = len(chosen.layers)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # where it finds its keys and values in the cache
    _cut(model, chosen.widths, config.importance)
    if layer_widths(model.language_model) != chosen.widths:
        raise UserError(
            f"prune: torch-pruning left {layer_widths(model.language_model)} instead of "
            f"{chosen.widths}"
        )
    model.config = replace(
        model.config,
        decoder=replace(model.config.decoder, layers=layer_widths(model.language_model)),
    )
    model.zero_grad(set_to_none=True)
    return chosen


def _cut(model: OpenVLA, widths: tuple[LayerWidths, ...], importance: str) -> None:
    """Cut each layer to the given widths, the least important heads and channels first."""
    decoder = model.language_model.model
    example = torch.zeros(1, 4, decoder.config.hidden_size, device=decoder.norm.weight.device)
    with _quiet():
        graph = tp.DependencyGraph().build_dependency(
            decoder, example_inputs={"inputs_embeds": example, "use_cache": False}
        )
    for layer, target in zip(decoder.layers, widths, strict=True):
        _cut_heads(layer.self_attn, target, importance)
        gate = layer.mlp.gate_proj
        group = graph.get_pruning_group(
            gate, tp.prune_linear_out_channels, list(range(gate.out_features))
        )
        drop = _lowest(_group_importance(group, importance), gate.out_features - target.ffn)
        if drop:
            graph.get_pruning_group(gate, tp.prune_linear_out_channels, drop).prune()
        layer.mlp.intermediate_size = gate.out_features


def _cut_heads(attention: Any, target: LayerWidths, importance: str) -> None:
    """Cut key-value heads, each with the query heads that share it.

    torch-pruning's own graph couples these correctly with one query head to a key-value head (a
    test compares), and never ends with several, so the coupling is spelt out here.
    """
    head = attention.head_dim
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    kv_heads = k.out_features // head
    rows = q.out_features // kv_heads
    # Rows of q, k and v, and columns of o, belong to the heads.
    weights = [_weight_importance(m.weight, importance) for m in (q, k, v)]
    weights.append(_weight_importance(o.weight, importance).T)
    scores = torch.stack([weight.reshape(kv_heads, -1).sum(1) for weight in weights]).sum(0)
    drop = _lowest(scores, kv_heads - target.kv_heads)
    if not drop:
        return
    kv_channels = [i * head + j for i in drop for j in range(head)]
    q_channels = [i * rows + j for i in drop for j in range(rows)]
    tp.prune_linear_out_channels(k, kv_channels)
    tp.prune_linear_out_channels(v, kv_channels)
    tp.prune_linear_out_channels(q, q_channels)
    tp.prune_linear_in_channels(o, q_channels)


def _lowest(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort()[:count].tolist())


def _group_importance(group: tp.Group, importance: str) -> Tensor:
    if importance == "random":
        return torch.rand(len(group[0].idxs))
    if importance == "magnitude":
        return tp.importance.GroupMagnitudeImportance(p=1, group_reduction="sum", normalizer=None)(
            group
        )
    return tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)(group)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch-pruning warns of the norms' weights, which the kept residual width never touches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(
    config: PruneConfig,
    trainable: Trainable,
    batches: DemonstrationBatches,
    *,
    seed: int,
) -> dict[str, Any]:
    """Prune with gradients of the SFT loss over demonstrations; returns the stage's facts."""
    seed_everything(seed)
    chosen = prune(trainable.model, batches, config)
    return {
        "seed": seed,
        **asdict(config),
        "layers_kept": list(chosen.layers),
        "removed_of_layers": chosen.removed,
        "removed_of_llm": chosen.removed_of_llm,
    }
