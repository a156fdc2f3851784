import pytest
import torch
import torch_pruning as tp

from training.config import PruneConfig
from training.importance import decoder_linears, input_norms, measuring, score_groups
from training.sft import bc_loss

LAYERS = ((4, 2, 96),) * 3


def config(importance):
    return PruneConfig(
        remove=0.5,
        keep_layers=2,
        importance=importance,
        calibration_samples=24,
        calibration_batch=8,
    )


def graph(model):
    example = {"inputs_embeds": torch.zeros(1, 4, 64), "use_cache": False}
    return tp.DependencyGraph().build_dependency(model.language_model.model, example_inputs=example)


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_channels_score_what_torch_pruning_says_to_the_last_bit(trainable, batches, importance):
    policy = trainable(LAYERS)
    layer = policy.model.language_model.model.layers[1]
    kind = {
        "taylor": tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None),
        "magnitude": tp.importance.GroupMagnitudeImportance(
            p=1, group_reduction="sum", normalizer=None
        ),
    }[importance]
    with measuring(policy.model, batches(policy), config(importance)) as measure:
        ours = score_groups(layer, measure).channels
        gradients = {linear: linear.weight.grad for linear in decoder_linears(policy.model)}
    for linear, gradient in gradients.items():
        linear.weight.grad = gradient
    group = graph(policy.model).get_pruning_group(
        layer.mlp.gate_proj, tp.prune_linear_out_channels, list(range(96))
    )
    assert torch.equal(ours, kind(group))


def test_heads_of_a_group_are_part_of_its_score(trainable, batches):
    policy = trainable(LAYERS)
    layer = policy.model.language_model.model.layers[0]
    with measuring(policy.model, batches(policy), config("magnitude")) as measure:
        scores = score_groups(layer, measure)
    q, o = layer.self_attn.q_proj.weight.abs(), layer.self_attn.o_proj.weight.abs()
    expected = q.view(4, -1).sum(1) + o.T.reshape(4, -1).sum(1)
    torch.testing.assert_close(scores.heads, expected)
    keys = layer.self_attn.k_proj.weight.abs().view(2, -1).sum(1)
    values = layer.self_attn.v_proj.weight.abs().view(2, -1).sum(1)
    torch.testing.assert_close(scores.groups, expected.view(2, 2).sum(1) + keys + values)


def test_taylor_leaves_no_gradients_and_asks_none_of_the_rest(trainable, batches):
    policy = trainable(LAYERS)
    with measuring(policy.model, batches(policy), config("taylor")) as measure:
        asked = {n for n, p in policy.model.named_parameters() if p.grad is not None}
        assert asked and all(".layers." in n and "_proj" in n for n in asked)
        assert measure(policy.model.language_model.model.layers[2].mlp.up_proj).sum() > 0
    assert all(p.grad is None and p.requires_grad for p in policy.model.parameters())


def test_taylor_sums_gradients_over_batches(trainable, batches):
    policy, again = trainable(LAYERS), trainable(LAYERS)
    torch.manual_seed(5)
    with measuring(policy.model, batches(policy), config("taylor")) as measure:
        found = measure(policy.model.language_model.model.layers[1].mlp.up_proj)
    torch.manual_seed(5)
    source = batches(again)
    for _ in range(3):
        bc_loss(again.model, source.sample(8)).backward()
    weight = again.model.language_model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(found, (weight * weight.grad).abs())


def test_input_norms_leave_padding_out(trainable, batches):
    policy = trainable(LAYERS)
    batch = batches(policy).sample(4)
    mask = torch.ones_like(batch.inputs.input_ids, dtype=torch.bool)
    mask[1, -3:] = False
    batch.inputs.attention_mask = mask
    plain = input_norms(policy.model, [batch])
    batch.inputs.input_ids[1, -3:] = 7  # what stands in the padding does not matter
    other = input_norms(policy.model, [batch])
    for linear, norm in plain.items():
        torch.testing.assert_close(norm, other[linear])
    assert set(plain) == set(decoder_linears(policy.model))
