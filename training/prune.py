"""Structured pruning of the decoder: whole layers, attention heads, feed-forward channels.

    rlrc prune CONFIG --policy BUNDLE --demonstrations DIR --out BUNDLE

Which ones go is decided by importance (`training.importance`), how many by the target
(`training.planning`). torch-pruning finds the coupled weights and cuts them; the residual width
stays, so embedding, head and vision are not touched.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import DecoderConfig, LayerWidths
from rlrc_ros.vla.openvla import OpenVLA, layer_widths
from training.bundles import Trainable
from training.common import seed_everything
from training.config import PruneConfig, stated
from training.data.batches import DemonstrationBatches
from training.importance import GroupScores, measuring, score_groups, score_layers
from training.latency import latency_plan
from training.planning import (
    Plan,
    best_plan,
    inner_layers,
    layer_parameters,
    storage_cost,
    uniform_plan,
)


@dataclass(frozen=True)
class LayerCut:
    """What goes from one decoder layer: indices in ascending order.

    Attributes:
        groups: key-value heads, each with all query heads that share it.
        heads: query heads alone, as many in every group; only where `groups` is empty.
        channels: of the feed-forward.
    """

    groups: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()


def prune(model: OpenVLA, batches: DemonstrationBatches | None, config: PruneConfig) -> Plan:
    """Prune in place.

    Raises:
        UserError: the target cannot be reached; or the cut left widths other than the planned ones.
    """
    decoder = model.language_model.model
    with measuring(model, batches, config) as measure:
        if config.granularity is None:
            chosen = uniform_plan(config, model.config, score_layers(model, measure))
            layers = [decoder.layers[i] for i in chosen.layers]
            scores = [score_groups(layer, measure) for layer in layers]
        else:
            every = [score_groups(layer, measure) for layer in decoder.layers]
            chosen = _planned(model, every, config)
            scores = [every[i] for i in chosen.layers]
    cuts = [choose(score, width) for score, width in zip(scores, chosen.widths, strict=True)]
    cut(model, chosen.layers, cuts)
    refuse_other_widths(layer_widths(model.language_model), chosen.widths)
    return chosen


def _planned(model: OpenVLA, scores: Sequence[GroupScores], config: PruneConfig) -> Plan:
    """The plan for a configuration with a granularity."""
    decoder = model.config.decoder
    if config.max_latency_ms is None:
        return best_plan(config, decoder, scores, *storage_cost(config, decoder))
    return latency_plan(config, model, decoder, scores)


def choose(scores: GroupScores, target: LayerWidths) -> LayerCut:
    """What goes to bring one layer to these widths: the least important of each kind."""
    kv_heads, heads = len(scores.groups), len(scores.heads)
    channels = _lowest(scores.channels, len(scores.channels) - target.ffn)
    if target.kv_heads < kv_heads:
        return LayerCut(
            groups=_lowest(scores.groups, kv_heads - target.kv_heads), channels=channels
        )
    share, fewer = heads // kv_heads, (heads - target.heads) // kv_heads
    worst = scores.heads.reshape(kv_heads, share).argsort(1)[:, :fewer].tolist()
    drop = sorted(group * share + i for group, inside in enumerate(worst) for i in inside)
    return LayerCut(heads=tuple(drop), channels=channels)


def _lowest(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(scores.argsort()[:count].tolist()))


def cut(model: OpenVLA, layers: Sequence[int], cuts: Sequence[LayerCut]) -> None:
    """Keep these decoder layers, in place, and take out of each what its cut says."""
    decoder = model.language_model.model
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in layers)
    decoder.config.num_hidden_layers = len(layers)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # where it finds its keys and values in the cache
    model.zero_grad(set_to_none=True)
    example = torch.zeros(1, 4, decoder.config.hidden_size, device=decoder.norm.weight.device).to(
        decoder.norm.weight.dtype
    )
    with _quiet():
        graph = tp.DependencyGraph().build_dependency(
            decoder, example_inputs={"inputs_embeds": example, "use_cache": False}
        )
    pairs = zip(decoder.layers, cuts, strict=True)
    for layer, chosen in tqdm(pairs, "pruning", total=len(cuts), unit="layer"):
        cut_heads(layer.self_attn, chosen)
        gate = layer.mlp.gate_proj
        if chosen.channels:
            drop = list(chosen.channels)
            graph.get_pruning_group(gate, tp.prune_linear_out_channels, drop).prune()
        layer.mlp.intermediate_size = gate.out_features
    widths = layer_widths(model.language_model)
    model.config = replace(model.config, decoder=replace(model.config.decoder, layers=widths))


def cut_heads(attention: Any, chosen: LayerCut) -> None:
    """Cut key-value heads, each with the query heads that share it, or query heads alone.

    torch-pruning's own graph couples these correctly with one query head to a key-value head (a
    test compares), and never ends with several, so the coupling is spelt out here.
    """
    head = attention.head_dim
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    rows = q.out_features // (k.out_features // head)
    if chosen.groups:
        kv_channels = [i * head + j for i in chosen.groups for j in range(head)]
        tp.prune_linear_out_channels(k, kv_channels)
        tp.prune_linear_out_channels(v, kv_channels)
    q_channels = [i * rows + j for i in chosen.groups for j in range(rows)]
    q_channels += [i * head + j for i in chosen.heads for j in range(head)]
    if q_channels:
        tp.prune_linear_out_channels(q, q_channels)
        tp.prune_linear_in_channels(o, q_channels)
    attention.num_key_value_groups = q.out_features // k.out_features


def refuse_other_widths(found: Sequence[LayerWidths], planned: Sequence[LayerWidths]) -> None:
    """Catch a cut that did nothing: with grouped queries torch-pruning's own pruner leaves heads.

    Raises:
        UserError: naming the first layer that differs.
    """
    for index, (is_now, should_be) in enumerate(zip(found, planned, strict=True)):
        if is_now != should_be:
            raise UserError(f"prune: torch-pruning left layer {index} {is_now}, not {should_be}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch-pruning warns of the norms' weights, which the kept residual width never touches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def facts_of(plan: Plan, config: PruneConfig, before: DecoderConfig) -> dict[str, Any]:
    """The plan in numbers, with each way of counting what '90% pruned' means."""
    facts: dict[str, Any] = {
        "layers_kept": list(plan.layers),
        "removed_of_layers": plan.removed,
        "removed_of_llm": plan.removed_of_llm,
    }
    if config.granularity:
        hidden, head = before.hidden_size, before.head_dim
        inner = inner_layers(config, before)
        was = sum(layer_parameters(hidden, head, before.layers[i]) for i in inner)
        kept = zip(plan.layers, plan.widths, strict=True)
        left = sum(layer_parameters(hidden, head, width) for i, width in kept if i in inner)
        facts["removed_of_unprotected_layers"] = 1 - left / was
    if plan.latency:
        facts["latency"] = plan.latency
    return facts


def run(
    config: PruneConfig,
    trainable: Trainable,
    batches: DemonstrationBatches | None,
    *,
    seed: int,
) -> dict[str, Any]:
    """Prune, calibrated on demonstrations where the importance takes them.

    Returns the stage's facts.
    """
    if config.part is not None:
        raise UserError("prune: 'part' is for pi0 policies, and this is none; leave it out")
    seed_everything(seed)
    before = trainable.model.config.decoder
    chosen = prune(trainable.model, batches, config)
    return {"seed": seed, **stated(config), **facts_of(chosen, config, before)}
