import pytest
import torch

from rlrc_ros.vla.pi0 import Pi0, start_noise
from rlrc_ros.vla.pi0_upstream import upstream_inputs, upstream_model
from tests.vla.pi0_policies import architecture, noise, observed, random_pi0

SHAPES = {
    "whole": {},
    "two key-value heads": {"layers": ((4, 2, 64),) * 2, "expert": ((2, 2, 32),) * 2},
    "no proprioception": {"proprioception": 0},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_actions_are_those_of_transformers(shape):
    config = architecture(**shape)
    model = random_pi0(config)
    inputs, start = observed(config), noise(config)
    expected = upstream_model(model).sample_actions(
        noise=start.clone(), **upstream_inputs(config, inputs)
    )
    found = model.generate(inputs, start)
    assert (found - start).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_prompts_of_different_lengths_in_one_batch():
    config = architecture()
    model = random_pi0(config)
    inputs, start = observed(config, tokens=9, batch=3, lengths=(9, 4, 6)), noise(config, 3)
    together = model.generate(inputs, start)
    expected = upstream_model(model).sample_actions(
        noise=start.clone(), **upstream_inputs(config, inputs)
    )
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)
    for row, length in enumerate((9, 4, 6)):
        alone = inputs[row : row + 1]
        alone.input_ids, alone.attention_mask = alone.input_ids[:, :length], None
        torch.testing.assert_close(
            model.generate(alone, start[row : row + 1])[0], together[row], atol=1e-5, rtol=0
        )


def test_the_flow_is_that_of_transformers_in_training():
    config = architecture()
    model = random_pi0(config)
    inputs, start = observed(config, batch=2), noise(config, 2)
    actions, time = noise(config, 2, seed=5), torch.tensor([0.2, 0.9])
    expected = upstream_model(model)(
        noise=start, timestep=time, actions=actions, **upstream_inputs(config, inputs)
    )
    when = time[:, None, None]
    noisy = when * start + (1 - when) * actions
    flow = model.velocity(model.prefix(inputs), inputs.proprioception, noisy, time)
    torch.testing.assert_close(flow, expected.logits, atol=1e-5, rtol=0)
    loss = torch.nn.functional.mse_loss(flow, start - actions)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()  # through the prefix's keys and values too
    assert all(
        parameter.grad is not None
        for layer in model.language_model.model.layers[:-1]
        for parameter in layer.parameters()
    )


def test_layers_have_widths_of_their_own():
    config = architecture(
        layers=((4, 1, 128), (1, 1, 64), (2, 1, 32)), expert=((2, 1, 64), (4, 1, 32), (1, 1, 64))
    )
    model = random_pi0(config)
    actions = model.generate(observed(config), noise(config))
    assert actions.shape == (1, 6, 10) and actions.isfinite().all()


def test_built_without_memory_and_filled_it_acts_alike():
    config = architecture()
    model = random_pi0(config)
    with torch.device("meta"):
        other = Pi0(config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.rebuild_buffers()
    other.to("cpu").eval()
    inputs, start = observed(config), noise(config)
    assert torch.equal(other.generate(inputs, start), model.generate(inputs, start))


def test_the_noise_is_the_same_every_time():
    expert = architecture().expert
    assert torch.equal(start_noise(expert), start_noise(expert))
    assert start_noise(expert).shape == (6, 10)
    assert not torch.equal(start_noise(expert), start_noise(expert, seed=1))
