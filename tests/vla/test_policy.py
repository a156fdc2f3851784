import dataclasses

import numpy as np
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.vla import load_policy
from rlrc_ros.vla.bundle import write_bundle


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "nf4"])
def test_acting_gives_bounded_actions_and_how_long_it_took(make_bundle, observation, quantized):
    policy = load_policy(make_bundle(quantized=quantized).path)
    chunk = policy.act(observation)
    assert chunk.actions.shape == (1, 7)
    assert (np.abs(chunk.actions[0, :3]) <= 0.03).all()
    assert (np.abs(chunk.actions[0, 3:6]) <= 0.15).all()
    assert 0 <= chunk.actions[0, 6] <= 1
    assert set(chunk.latency_ms) == {"preprocess", "inference", "total"}
    again = policy.act(observation)
    assert (again.actions == chunk.actions).all()


def test_engines_agree(make_bundle, observation):
    path = make_bundle().path
    eager, unrolled = (load_policy(path, engine=engine) for engine in ("eager", "unrolled"))
    assert (eager.act(observation).actions == unrolled.act(observation).actions).all()


def test_the_instruction_reaches_the_action(make_bundle, observation):
    policy = load_policy(make_bundle().path)
    actions = {
        tuple(policy.act(dataclasses.replace(observation, instruction=text)).actions[0])
        for text in (
            "put the red cube on the blue plate",
            "push the green cylinder into the square",
        )
    }
    assert len(actions) == 2


def test_sizes_count_what_is_held(make_bundle):
    plain = load_policy(make_bundle("a").path)
    small = load_policy(make_bundle("b", quantized=True).path)
    assert plain.parameters == small.parameters
    assert plain.weight_bytes()["llm"] > 2 * small.weight_bytes()["llm"]
    assert plain.weight_bytes()["total"] == sum(
        plain.weight_bytes()[part] for part in ("vision", "projector", "llm")
    )


def test_a_device_that_is_not_there(make_bundle):
    with pytest.raises(UserError, match="device 'cuda:9' cannot be used"):
        load_policy(make_bundle().path, device="cuda:9")
    with pytest.raises(UserError, match="device 'toaster' cannot be used"):
        load_policy(make_bundle().path, device="toaster")


def test_weights_that_give_nan_never_become_an_action(make_bundle, observation):
    bundle = make_bundle()
    tensors = bundle.tensors()
    tensors["projector.fc2.bias"][3] = float("nan")
    write_bundle(bundle.path, bundle.config, tensors, bundle.tokenizer(), {})
    for engine in ("eager", "unrolled"):
        with pytest.raises(UserError, match="not finite"):
            load_policy(bundle.path, engine=engine).act(observation)
