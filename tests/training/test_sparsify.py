import pytest
import torch

from rlrc_ros.errors import UserError
from training.config import SftConfig, SparsifyConfig
from training.importance import decoder_linears, input_norms
from training.sft import Trainer
from training.sparsify import sparsegpt, sparsify, zeros, zeros_held

LAYERS = ((4, 2, 96),) * 3


def config(method, sparsity=0.5, pattern="unstructured", **changes):
    return SparsifyConfig(
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        calibration_samples=24,
        calibration_batch=8,
        **changes,
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.75), ("2:4", 0.5)])
def test_as_many_weights_are_zero_as_asked(trainable, batches, method, pattern, sparsity):
    policy = trainable(LAYERS)
    sparsify(policy.model, batches(policy), config(method, sparsity, pattern))
    for linear in decoder_linears(policy.model):
        gone = linear.weight == 0
        assert gone.float().mean() == pytest.approx(sparsity, abs=1e-3)
        if pattern == "2:4":
            assert (gone.unflatten(1, (-1, 4)).sum(2) == 2).all()
        if method == "wanda":
            assert (gone.sum(1) == int(sparsity * gone.shape[1])).all()
    found = zeros(policy.model)
    assert found["zeros_of_layers"] == pytest.approx(sparsity, abs=1e-3)
    assert 0 < found["zeros_of_llm"] < found["zeros_of_layers"]
    assert (policy.model.language_model.lm_head.weight != 0).all()


def test_wanda_drops_what_weighs_least_on_its_inputs(trainable, batches):
    policy, before = trainable(LAYERS), trainable(LAYERS)
    torch.manual_seed(3)
    source = batches(before)
    norms = input_norms(before.model, [source.sample(8) for _ in range(3)])
    torch.manual_seed(3)
    sparsify(policy.model, batches(policy), config("wanda"))
    # The first layer's queries, keys and values see what no zero has changed yet.
    for name in ("q_proj", "k_proj", "v_proj"):
        was = getattr(before.model.language_model.model.layers[0].self_attn, name)
        now = getattr(policy.model.language_model.model.layers[0].self_attn, name)
        scores = was.weight.abs() * norms[was]
        bar = scores.median(1, keepdim=True).values
        assert torch.equal(now.weight == 0, scores <= bar)


def test_later_layers_are_calibrated_on_what_sparse_ones_give(trainable, batches, monkeypatch):
    """The last layer, whose inputs all zeros before it have changed, against a pass of its own."""
    policy = trainable(LAYERS)
    torch.manual_seed(3)
    sparsify(policy.model, batches(policy), config("wanda"))
    again = trainable(LAYERS)
    last = again.model.language_model.model.layers[2].self_attn.q_proj
    for mine, sparse in zip(
        decoder_linears(again.model)[:14], decoder_linears(policy.model)[:14], strict=True
    ):
        mine.weight.data.copy_(sparse.weight)
    torch.manual_seed(3)
    source = batches(again)
    norms = input_norms(again.model, [source.sample(8) for _ in range(3)])
    scores = last.weight.abs() * norms[last]
    expected = scores <= scores.median(1, keepdim=True).values
    found = policy.model.language_model.model.layers[2].self_attn.q_proj.weight == 0
    assert (found == expected).float().mean() > 0.999


def correlated(tokens=400, inputs=64):
    torch.manual_seed(0)
    return torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) * 0.2


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_makes_up_for_what_it_removes(pattern):
    x, weight = correlated(), torch.randn(32, 64)
    ours = weight.clone()
    sparsegpt(ours, x.T @ x, config("sparsegpt", pattern=pattern))
    plain = torch.where(ours == 0, 0, weight)  # the same zeros, and nothing made up for
    error, unmended = (((x @ (w - weight).T) ** 2).sum() for w in (ours, plain))
    assert error < 0.8 * unmended


def test_sparsegpt_is_magnitude_where_inputs_are_unrelated():
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    ours = weight.clone()
    sparsegpt(ours, torch.eye(64), config("sparsegpt"))
    lowest = weight.abs() <= weight.abs().flatten().sort().values[16 * 32 - 1]
    assert torch.equal(ours == 0, lowest)
    torch.testing.assert_close(ours[~lowest], weight[~lowest])


def test_an_input_that_is_always_zero_loses_its_weights():
    x = correlated()
    x[:, 5] = 0
    weight = torch.randn(32, 64)
    sparsegpt(weight, x.T @ x, config("sparsegpt"))
    assert weight.isfinite().all() and (weight[:, 5] == 0).all()


def test_zeros_survive_training_while_they_are_held(trainable, batches, tmp_path):
    policy = trainable(LAYERS)
    sparsify(policy.model, batches(policy), config("magnitude"))
    gone = [linear.weight.detach() == 0 for linear in decoder_linears(policy.model)]
    before = [linear.weight.detach().clone() for linear in decoder_linears(policy.model)]
    sft = SftConfig(steps=4, batch_size=8, learning_rate=1e-2, warmup_steps=1)
    with zeros_held(policy.model):
        Trainer(policy.model, batches(policy), sft, torch.device("cpu"), tmp_path / "a").run()
    for linear, mask, old in zip(decoder_linears(policy.model), gone, before, strict=True):
        assert (linear.weight[mask] == 0).all() and (linear.weight != old).any()
    Trainer(policy.model, batches(policy), sft, torch.device("cpu"), tmp_path / "b").run()
    assert any(
        (linear.weight[mask] != 0).any()
        for linear, mask in zip(decoder_linears(policy.model), gone, strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, "'sparsity' is a share"),
        ({"sparsity": 0.7, "pattern": "2:4"}, r"2:4 is a sparsity of 0\.5, not 0\.7"),
    ],
)
def test_sparsities_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config("wanda", **changes)
