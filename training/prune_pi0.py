"""Structured pruning of pi0: of its language model, or of its action expert.

    rlrc prune CONFIG --policy BUNDLE --out BUNDLE [--demonstrations DIR]

Query heads and feed-forward channels go from either; whole layers from both at once, since layer i
of the expert attends to the keys and values of layer i of the language model. What they share, the
key-value heads and the head size, stays, and so do the residual widths, embedding, vision, and what
leads to actions and from them. docs/pruning.md says more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import DecoderConfig, LayerWidths
from rlrc_ros.vla.openvla import layer_widths
from rlrc_ros.vla.pi0 import Pi0
from rlrc_ros.vla.policy import parameter_counts
from training.bundles import Trainable
from training.common import seed_everything
from training.config import PruneConfig, stated
from training.flow import FlowBatches, flow_loss
from training.importance import BATCH, GroupScores, Measure, score_groups
from training.latency import latency_plan
from training.planning import Plan, best_plan, decoders_of, layer_parameters, storage_cost
from training.prune import LayerCut, choose, cut_heads, refuse_other_widths

PARTS = ("llm", "expert")


def prune(model: Pi0, config: PruneConfig, batches: FlowBatches | None) -> Plan:
    """Prune one part in place; `batches` for the importance that is measured on demonstrations.

    Nothing is ever used of the language model's last layer but its keys and values. So where it is
    protected, its queries and feed-forward go first: no action changes by it.

    Raises:
        UserError: the target cannot be reached, or is none that pi0 has; or there are no
            demonstrations, and the importance takes them.
    """
    refuse_what_pi0_has_not(config)
    part = config.part or "llm"
    with measuring(model, batches, config) as measure:
        scores = {
            name: [score_groups(layer, measure) for layer in _layers(model, name)] for name in PARTS
        }
    whole, weighed = decoders_of(model.config)[part], scores[part]
    start = whole
    if part == "llm" and config.protect != 0:
        start = _without_unused(whole, config.ffn_multiple)
    if config.granularity != "width":  # a layer that goes takes the other part's along
        others = scores["expert" if part == "llm" else "llm"]
        weighed = [_with(own, other) for own, other in zip(weighed, others, strict=True)]
    heads_alone = replace(config, attention="heads")
    if config.max_latency_ms is None:
        plan = best_plan(heads_alone, start, weighed, *storage_cost(config, whole))
    else:
        plan = latency_plan(heads_alone, model, start, weighed, part)
    cuts = [choose(scores[part][i], w) for i, w in zip(plan.layers, plan.widths, strict=True)]
    cut(model, plan.layers, **{part: cuts})
    module = model.language_model if part == "llm" else model.expert
    refuse_other_widths(layer_widths(module), plan.widths)
    return plan


def _without_unused(decoder: DecoderConfig, ffn_multiple: int) -> DecoderConfig:
    """The last layer with as few queries and channels as can be."""
    *layers, last = decoder.layers
    least = LayerWidths(last.kv_heads, last.kv_heads, min(ffn_multiple, last.ffn))
    return replace(decoder, layers=(*layers, least))


def refuse_what_pi0_has_not(config: PruneConfig) -> None:
    """Say that a way of pruning is not there for pi0.

    Raises:
        UserError: naming it.
    """
    if config.granularity is None or (config.remove is None and config.max_latency_ms is None):
        raise UserError(
            "prune: of a pi0 policy give 'remove' or 'max_latency_ms', with 'granularity'"
        )
    if config.attention == "groups":
        raise UserError(
            "prune: 'attention: groups' would remove key-value heads, which pi0's language model "
            "and action expert share; leave it out, or take 'heads'"
        )
    if config.importance == "activation":
        raise UserError("prune: pi0 has importance 'taylor', 'magnitude' and 'random'")


def _layers(model: Pi0, part: str) -> Any:
    return (model.language_model if part == "llm" else model.expert).model.layers


def _with(own: GroupScores, other: GroupScores) -> GroupScores:
    """A layer's scores with the other part's whole layer added to what no choice of heads changes.

    That is where `best_plan` looks for it, in the difference of groups and heads.
    """
    whole = other.groups.sum() + other.channels.sum()
    groups = own.groups.clone()
    groups[0] += whole
    return replace(own, groups=groups)


def cut(
    model: Pi0,
    layers: Sequence[int],
    llm: Sequence[LayerCut] | None = None,
    expert: Sequence[LayerCut] | None = None,
) -> None:
    """Keep these layers of both parts, in place, and take out of each what its cut says.

    llm, expert: of each layer that stays; none: whole. They hold no key-value heads.
    """
    for module, cuts in ((model.language_model, llm), (model.expert, expert)):
        decoder: Any = module.model
        decoder.layers = nn.ModuleList(decoder.layers[i] for i in layers)
        decoder.config.num_hidden_layers = len(layers)
        pairs = zip(decoder.layers, cuts or [LayerCut()] * len(layers), strict=True)
        for index, (layer, chosen) in enumerate(tqdm(pairs, "pruning", len(layers), unit="layer")):
            assert not chosen.groups
            layer.self_attn.layer_idx = index  # where it finds its keys and values in the cache
            cut_heads(layer.self_attn, chosen)
            if chosen.channels:
                drop = list(chosen.channels)
                for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    tp.prune_linear_out_channels(projection, drop)
                tp.prune_linear_in_channels(layer.mlp.down_proj, drop)
            layer.mlp.intermediate_size = layer.mlp.gate_proj.out_features
    assert model.config.expert is not None
    model.config = replace(
        model.config,
        decoder=replace(model.config.decoder, layers=layer_widths(model.language_model)),
        expert=replace(model.config.expert, layers=layer_widths(model.expert)),
    )


@contextlib.contextmanager
def measuring(model: Pi0, batches: FlowBatches | None, config: PruneConfig) -> Iterator[Measure]:
    """A measure of weights; for `taylor` calibrated on demonstrations, by the flow's loss.

    Memory: `taylor` holds one gradient for every weight of both parts' layers until the end.
    """
    if config.importance == "magnitude":
        yield lambda linear: linear.weight.detach().abs()
    elif config.importance == "random":
        yield lambda linear: torch.rand_like(linear.weight)
    else:
        if batches is None:
            raise UserError("prune: importance 'taylor' is measured on demonstrations; give them")
        size = min(config.calibration_batch or BATCH, config.calibration_samples)
        linears = [
            module
            for part in PARTS
            for module in _layers(model, part).modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            model.requires_grad_(False)
            for linear in linears:
                linear.weight.requires_grad_(True)
            count = max(1, config.calibration_samples // size)
            for _ in tqdm(range(count), "calibration (taylor)", unit="batch"):
                flow_loss(model, batches.sample(size)).backward()
            yield _taylor
        finally:
            model.requires_grad_(True)
            model.zero_grad(set_to_none=True)


def _taylor(linear: nn.Linear) -> torch.Tensor:
    if linear.weight.grad is None:  # of the last layer of the language model, never used
        return torch.zeros_like(linear.weight)
    return (linear.weight * linear.weight.grad).detach().abs()


def run(
    config: PruneConfig, trainable: Trainable, batches: FlowBatches | None, *, seed: int
) -> dict[str, Any]:
    """Prune; returns the stage's facts."""
    seed_everything(seed)
    model = trainable.model
    part = config.part or "llm"
    before, counts = decoders_of(model.config)[part], parameter_counts(model)
    plan = prune(model, config, batches)
    hidden, head = before.hidden_size, before.head_dim

    def weights(layers: Sequence[LayerWidths]) -> int:
        return sum(layer_parameters(hidden, head, widths) for widths in layers)

    facts = {
        "seed": seed,
        **stated(config),
        "part": part,
        "layers_kept": list(plan.layers),
        "removed_of_layers": 1 - weights(plan.widths) / weights(before.layers),
        "removed_of_policy": 1 - parameter_counts(model)["total"] / counts["total"],
    }
    return facts | ({"latency": plan.latency} if plan.latency else {})
