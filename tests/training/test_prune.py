import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import LayerWidths
from rlrc_ros.vla.openvla import layer_widths
from tests.conftest import bundle_config, random_model
from tests.vla.test_openvla import batch
from training import prune
from training.config import PruneConfig
from training.prune import LayerCut


def config(remove=0.8, keep_layers=3, importance="magnitude", ffn_multiple=16, **changes):
    return PruneConfig(
        remove=remove,
        keep_layers=keep_layers,
        importance=importance,
        ffn_multiple=ffn_multiple,
        **changes,
    )


def planned(granularity="both", importance="magnitude", **changes):
    changes = changes or {"remove_of_llm": 0.3}
    return PruneConfig(
        granularity=granularity,
        importance=importance,
        ffn_multiple=16,
        calibration_samples=32,
        calibration_batch=16,
        **changes,
    )


KV, FFN = 3, 96


@st.composite
def layer_cuts(draw, per_group):
    """What may go from a layer of 3 key-value heads, `per_group` queries each, and 96 channels."""
    channels = draw(st.sets(st.integers(0, FFN - 1), max_size=FFN - 1))
    groups = draw(st.sets(st.integers(0, KV - 1), max_size=KV - 1))
    heads = []
    if not groups:
        fewer = draw(st.integers(0, per_group - 1))
        for group in range(KV):
            inside = draw(st.permutations(range(per_group)))[:fewer]
            heads += [group * per_group + i for i in inside]
    return LayerCut(tuple(sorted(groups)), tuple(sorted(heads)), tuple(sorted(channels)))


@st.composite
def plans(draw):
    """(query heads per group, layers that stay, their cuts) of a decoder of 3 layers."""
    per_group = draw(st.integers(1, 3))
    layers = draw(st.sets(st.integers(0, 2), min_size=1))
    return per_group, sorted(layers), [draw(layer_cuts(per_group)) for _ in layers]


@settings(max_examples=25)
@given(plans(), st.integers(0, 100))
def test_cutting_equals_masking(plan, seed):
    """What is left computes what the whole does with all that was removed at zero."""
    per_group, layers, cuts = plan
    whole = bundle_config(((KV * per_group, KV, FFN),) * 3)
    model, masked = (random_model(whole, seed) for _ in range(2))
    with torch.no_grad():
        for index, layer in enumerate(masked.language_model.model.layers):
            heads = layer.self_attn.o_proj.weight.view(64, KV * per_group, 32)
            if index not in layers:
                heads.zero_()
                layer.mlp.down_proj.weight.zero_()
                continue
            chosen = cuts[layers.index(index)]
            heads.view(64, KV, -1)[:, list(chosen.groups)] = 0
            heads[:, list(chosen.heads)] = 0
            layer.mlp.down_proj.weight[:, list(chosen.channels)] = 0
    prune.cut(model, layers, cuts)
    for width, chosen in zip(layer_widths(model.language_model), cuts, strict=True):
        kv, gone = KV - len(chosen.groups), len(chosen.heads)
        assert width == LayerWidths(kv * per_group - gone, kv, FFN - len(chosen.channels))
    assert model.config.decoder.layers == layer_widths(model.language_model)
    with torch.no_grad():
        torch.testing.assert_close(
            model.state(batch()), masked.state(batch()), atol=1e-4, rtol=1e-4
        )
        assert torch.equal(model.generate(batch())[0], masked.generate(batch())[0])


def test_torch_pruning_couples_heads_as_we_do():
    decoder = random_model(bundle_config()).language_model.model
    example = {"inputs_embeds": torch.zeros(1, 4, 64), "use_cache": False}
    graph = tp.DependencyGraph().build_dependency(decoder, example_inputs=example)
    attention = decoder.layers[1].self_attn
    group = graph.get_pruning_group(attention.q_proj, tp.prune_linear_out_channels, [0, 1])
    coupled = {
        (dependency.target.module, dependency.handler.__name__)
        for dependency, _ in group
        if isinstance(dependency.target.module, torch.nn.Linear)
    }
    rows = {(getattr(attention, f"{p}_proj"), "prune_out_channels") for p in "qkv"}
    assert coupled == {*rows, (attention.o_proj, "prune_in_channels")}


def by_torch_pruning_alone(model, heads, kv_heads):
    """Three quarters of heads and channels away, as torch-pruning's documentation does it."""
    decoder = model.language_model.model
    counts = {}
    for layer in decoder.layers:
        attention = layer.self_attn
        counts |= {attention.q_proj: heads, attention.k_proj: kv_heads, attention.v_proj: kv_heads}
    outputs = [m for x in decoder.layers for m in (x.self_attn.o_proj, x.mlp.down_proj)]
    pruner = tp.pruner.BasePruner(
        decoder,
        {"inputs_embeds": torch.zeros(1, 4, 64), "use_cache": False},
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.75,
        head_pruning_ratio=0.75,
        num_heads=counts,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[decoder.norm, *outputs],
    )
    for group in pruner.step(interactive=True):
        group.prune()


def test_heads_that_torch_pruning_leaves_with_grouped_queries_are_caught():
    """Asked for a quarter, its own pruner keeps all of them, and says nothing."""
    single, grouped = (random_model(bundle_config(((8, kv, 128),) * 2)) for kv in (8, 2))
    by_torch_pruning_alone(single, 8, 8)
    by_torch_pruning_alone(grouped, 8, 2)
    prune.refuse_other_widths(layer_widths(single.language_model), (LayerWidths(2, 2, 32),) * 2)
    assert layer_widths(grouped.language_model) == (LayerWidths(8, 2, 32),) * 2
    with pytest.raises(UserError, match=r"left layer 0 .*heads=8.* not .*heads=4"):
        prune.refuse_other_widths(
            layer_widths(grouped.language_model), (LayerWidths(4, 1, 32),) * 2
        )


def test_a_cut_that_does_nothing_is_caught_on_the_way(monkeypatch, trainable, batches):
    monkeypatch.setattr(prune, "cut_heads", lambda attention, chosen: None)
    policy = trainable(((4, 2, 128),) * 5)
    with pytest.raises(UserError, match=r"torch-pruning left layer 0 .*heads=4.* not .*heads=2"):
        prune.prune(policy.model, batches(policy), config())


@pytest.mark.parametrize("importance", ["taylor", "magnitude", "activation", "random"])
@pytest.mark.parametrize("layers", [((4, 4, 128),) * 5, ((4, 2, 128),) * 5], ids=["mha", "gqa"])
def test_at_least_the_asked_share_goes_and_the_policy_still_runs(
    trainable, batches, importance, layers
):
    policy = trainable(layers)
    before = sum(p.numel() for p in policy.model.language_model.model.layers.parameters())
    norms = 2 * 64 * 5
    chosen = prune.prune(policy.model, batches(policy), config(importance=importance))
    kept = policy.model.language_model.model.layers
    after = sum(p.numel() for p in kept.parameters()) - 2 * 64 * len(kept)
    assert len(kept) == 3 and chosen.layers[0] == 0 and chosen.layers[-1] == 4
    assert 1 - after / (before - norms) == pytest.approx(chosen.removed) and chosen.removed >= 0.8
    assert chosen.removed_of_llm < chosen.removed
    assert policy.model.config.decoder.layers == chosen.widths
    bins, _, _ = policy.model.generate(batch())
    logits, _ = policy.model(batch(), bins)
    logits.sum().backward()
    assert all(parameter.requires_grad for parameter in policy.model.parameters())


@pytest.mark.parametrize("granularity", ["width", "depth", "both"])
@pytest.mark.parametrize("importance", ["taylor", "activation"])
@pytest.mark.parametrize(
    ("layers", "attention"), [((4, 4, 128), None), ((4, 2, 128), None), ((4, 1, 128), "heads")]
)
def test_planned_pruning_meets_its_target_and_the_ends_stay_whole(
    trainable, batches, granularity, importance, layers, attention
):
    policy = trainable((layers,) * 5)
    llm = sum(p.numel() for p in policy.model.language_model.parameters())
    ends = [policy.model.language_model.model.layers[i].mlp.down_proj.weight for i in (0, 4)]
    asked = planned(granularity, importance, attention=attention, remove_of_llm=0.3)
    chosen = prune.prune(policy.model, batches(policy), asked)
    left = sum(p.numel() for p in policy.model.language_model.parameters())
    # A dropped layer takes its norms along, which the share does not count as removed.
    norms = 2 * 64 * (5 - len(chosen.layers))
    assert 1 - (left + norms) / llm == pytest.approx(chosen.removed_of_llm)
    assert 1 - left / llm >= 0.3
    now = policy.model.language_model.model.layers
    assert now[0].mlp.down_proj.weight is ends[0] and now[-1].mlp.down_proj.weight is ends[1]
    if granularity == "width":
        assert len(now) == 5
    if granularity == "depth":
        assert set(chosen.widths) == {LayerWidths(*layers)}
    if attention == "heads":
        assert {width.kv_heads for width in chosen.widths} == {1}
    policy.model.generate(batch())


def test_taylor_keeps_what_the_loss_depends_on(trainable, batches):
    policy = trainable(((4, 4, 64),) * 3)
    layer = policy.model.language_model.model.layers[1]
    with torch.no_grad():  # the third head is all that reaches the output, greatly
        layer.self_attn.o_proj.weight.view(64, 4, 32)[:, [0, 1, 3]] *= 1e-3
        marker = layer.self_attn.v_proj.weight[64:96].clone()
    prune.prune(policy.model, batches(policy), config(0.5, 3, "taylor"))
    assert (
        policy.model.language_model.model.layers[1].self_attn.v_proj.weight[:32] == marker
    ).all()


def test_every_way_of_counting_is_reported(trainable, batches):
    policy = trainable(((4, 4, 128),) * 5)
    asked = planned("width", remove_of_llm=0.2)
    facts = prune.run(asked, policy, batches(policy), seed=0)
    inside, layers, llm = (
        facts[f"removed_of_{name}"] for name in ("unprotected_layers", "layers", "llm")
    )
    assert inside > layers > llm >= 0.2
    assert layers == pytest.approx(inside * 3 / 5)
    assert "max_bytes" not in facts and "keep_layers" not in facts


def test_facts_of_pruning_as_it_was_before_there_were_plans(trainable, batches):
    policy = trainable(((4, 4, 128),) * 5)
    facts = prune.run(config(), policy, batches(policy), seed=0)
    assert list(facts) == [
        *("seed", "remove", "keep_layers", "importance", "ffn_multiple", "calibration_samples"),
        *("layers_kept", "removed_of_layers", "removed_of_llm"),
    ]
