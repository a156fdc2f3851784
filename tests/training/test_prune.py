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


def config(remove=0.8, keep_layers=3, importance="magnitude", ffn_multiple=16):
    return PruneConfig(
        remove=remove, keep_layers=keep_layers, importance=importance, ffn_multiple=ffn_multiple
    )


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 96)), min_size=1, max_size=3
    ),
    st.integers(0, 100),
)
def test_cutting_equals_masking(targets, seed):
    """What is left computes what the whole does with the removed heads and channels at zero."""
    layers = tuple((3 * group, 3, 96) for _, group, _ in targets)
    model, masked = (random_model(bundle_config(layers), seed) for _ in range(2))
    widths = tuple(LayerWidths(kv * group, kv, ffn) for kv, group, ffn in targets)
    heads, channels = [], []
    for layer, target in zip(masked.language_model.model.layers, widths, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        groups = sum(
            module.weight.abs().reshape(3, -1).sum(1)
            for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        ) + attention.o_proj.weight.abs().T.reshape(3, -1).sum(1)
        heads.append(groups.argsort()[: 3 - target.kv_heads])
        sums = mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1)
        channels.append((sums + mlp.down_proj.weight.abs().sum(0)).argsort()[: 96 - target.ffn])
    with torch.no_grad():
        for layer, head, channel in zip(
            masked.language_model.model.layers, heads, channels, strict=True
        ):
            layer.self_attn.o_proj.weight.view(64, 3, -1)[:, head] = 0
            layer.mlp.down_proj.weight[:, channel] = 0
    prune._cut(model, widths, "magnitude")
    assert layer_widths(model.language_model) == widths
    with torch.no_grad():
        torch.testing.assert_close(
            model.state(batch()), masked.state(batch()), atol=1e-4, rtol=1e-4
        )


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


@pytest.mark.parametrize("importance", ["taylor", "magnitude", "random"])
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


def test_a_share_that_cannot_be_removed_says_what_can():
    architecture = bundle_config(((4, 4, 128),) * 5).architecture
    with pytest.raises(UserError, match=r"99.0% .* cannot be removed .* at most 88.2% can"):
        prune.plan(config(remove=0.99), architecture, [1.0] * 5)


def test_more_layers_than_there_are():
    with pytest.raises(UserError, match="keep_layers is 9, and the policy has 5"):
        prune.plan(config(keep_layers=9), bundle_config(((4, 4, 128),) * 5).architecture, [1.0] * 5)


def test_the_most_important_inner_layers_stay():
    architecture = bundle_config(((4, 4, 128),) * 5).architecture
    assert prune.plan(config(), architecture, [0, 1, 3, 2, 0]).layers == (0, 2, 4)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 0.97), st.integers(2, 5))
def test_plans_meet_their_share_or_say_that_they_cannot(remove, keep):
    architecture = bundle_config(((4, 2, 128),) * 5).architecture
    try:
        plan = prune.plan(config(remove, keep), architecture, [1.0] * 5)
    except UserError as error:
        assert "cannot be removed" in str(error)
        return
    assert plan.removed >= remove - 1e-9
    for widths in plan.widths:
        assert widths.ffn % 16 == 0 and widths.heads == 2 * widths.kv_heads
