import pytest
import torch
from scipy.stats import chisquare

from rlrc_ros.vla import matrices, quantization
from rlrc_ros.vla.engine import EagerEngine, Unrolled, UnrolledEngine
from rlrc_ros.vla.openvla import Inputs
from tests.conftest import NF4, bundle_config, random_model
from tests.vla.test_openvla import SHAPES, batch


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_the_unrolled_engine_gives_eager_tokens(layers, quantized):
    config = bundle_config(layers)
    models = [random_model(config), random_model(config)]
    if quantized:
        for model in models:
            quantization.quantize(model, NF4)
    eager, unrolled = EagerEngine(models[0]), UnrolledEngine(models[1])
    for seed in range(8):
        inputs = batch(1, seed=seed)
        assert torch.equal(eager.bins(inputs), unrolled.bins(inputs)), seed


def test_a_longer_prompt_makes_room_and_changes_nothing_for_shorter_ones():
    config = bundle_config()
    eager, unrolled = EagerEngine(random_model(config)), UnrolledEngine(random_model(config))
    for tokens in (9, 119, 9):
        inputs = batch(1, tokens)
        assert torch.equal(eager.bins(inputs), unrolled.bins(inputs)), tokens


@pytest.mark.parametrize("operations", [None, matrices])
def test_batches_and_samples_agree_with_the_model(operations):
    model, inputs = random_model(bundle_config()), batch(5)
    unrolled = Unrolled(model, 5, operations)
    with torch.no_grad():
        assert torch.equal(unrolled(inputs)[0], model.generate(inputs)[0])
        noise = -torch.empty(5, 7, 256).exponential_().log()
        bins, log_probability, state = unrolled(inputs, 1.5, noise)
        logits, forced_state = model(inputs, bins)
    log_p = (logits / 1.5).log_softmax(-1).gather(-1, bins[..., None]).sum((1, 2))
    torch.testing.assert_close(log_p, log_probability, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forced_state, state, atol=1e-4, rtol=1e-3)


def test_prompts_of_different_lengths_agree_with_the_model():
    model, inputs = random_model(bundle_config()), batch(4)
    counts = torch.tensor([[9], [6], [9], [3]])
    inputs.attention_mask = torch.arange(inputs.input_ids.shape[1]) < counts
    unrolled = Unrolled(model, 4, matrices)
    assert unrolled.takes_masks and not Unrolled(model, 4).takes_masks
    with torch.no_grad():
        bins, _, state = unrolled(inputs)
        expected, _, forced_state = model.generate(inputs)
    assert torch.equal(bins, expected)
    torch.testing.assert_close(state, forced_state, atol=1e-4, rtol=1e-3)


def test_samples_follow_the_distribution():
    model, inputs = random_model(bundle_config()), batch(1)
    many = Inputs(
        inputs.input_ids.expand(4000, -1),
        None,
        inputs.pixel_values.expand(4000, -1, -1, -1),
        inputs.proprioception.expand(4000, -1),
    )
    torch.manual_seed(0)
    noise = -torch.empty(4000, 7, 256).exponential_().log()
    with torch.no_grad():
        bins = Unrolled(model, 4000)(many, 3.0, noise)[0][:, 0]
        expected = (model(inputs, torch.zeros(1, 7, dtype=torch.long))[0][0, 0] / 3.0).softmax(-1)
    # Pearson's test wants at least five expected in a cell: the rare bins share one.
    common = expected * 4000 >= 5
    cells = [
        torch.cat([counts[common], counts[~common].sum()[None]]).double().numpy()
        for counts in (torch.bincount(bins, minlength=256), expected * 4000)
    ]
    assert len(cells[0]) > 20
    assert chisquare(cells[0], cells[1] * cells[0].sum() / cells[1].sum()).pvalue > 1e-4


def test_refreshing_takes_over_changed_weights():
    model, inputs = random_model(bundle_config()), batch(3)
    unrolled = Unrolled(model, 3)
    before = unrolled(inputs)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    unrolled.refresh()
    after = unrolled(inputs)[0]
    assert torch.equal(after, model.generate(inputs)[0])
    assert not torch.equal(after, before)


def test_weights_are_counted_once():
    config = bundle_config()
    model = random_model(config)
    expected = {name: quantization.weight_bytes(part) for name, part in model.parts.items()}
    eager = EagerEngine(model).weight_bytes()
    assert eager == expected
    unrolled = UnrolledEngine(random_model(config)).weight_bytes()
    assert unrolled["vision"] == eager["vision"]
    # Of the 320 rows of the head the unrolled engine keeps the 256 of the action tokens.
    assert eager["llm"] - unrolled["llm"] == 64 * 64 * 4
