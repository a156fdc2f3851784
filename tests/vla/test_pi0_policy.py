import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rlrc_ros.errors import UserError
from rlrc_ros.schema import from_dict
from rlrc_ros.vla import Observation, load_policy, quantization
from rlrc_ros.vla.bundle import provenance, write_bundle
from rlrc_ros.vla.config import BundleConfig, ExpertConfig, QuantizationConfig
from rlrc_ros.vla.pi0_processor import Pi0Processor
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS, bundle_config, tower
from tests.vla.pi0_policies import CAMERAS, architecture, pi0_config, random_pi0

EVERY_WIDTH = {
    "layers": ((4, 1, 128), (1, 1, 64), (2, 1, 64)),
    "expert": ((2, 1, 64), (4, 1, 64), (1, 1, 128)),
}


@pytest.fixture
def make_pi0(tmp_path):
    """make_pi0(quantized=(method, parts), …) → Bundle."""

    def make(quantized=None, name="pi0", **shape):
        config = pi0_config(**shape)
        model = random_pi0(config.architecture)
        if quantized:
            method, parts = quantized
            how = QuantizationConfig(method=f"bitsandbytes-{method}", parts=parts)
            quantization.quantize(model, how)
            config = replace(config, quantization=how)
        origin = provenance(None, "original")
        tensors = quantization.stored(model)
        return write_bundle(tmp_path / name, config, tensors, word_tokenizer(WORDS), origin)

    return make


def observation(seed=0, **changes):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (24, 40, 3), dtype=np.uint8) for name in CAMERAS}
    fields = {"instruction": "put the red cube on the blue plate", "images": images}
    return Observation(**{**fields, "proprioception": rng.normal(size=8), **changes})


@pytest.mark.parametrize("shape", [{}, EVERY_WIDTH, {"proprioception": 0}], ids=str)
def test_a_bundle_acts_alike_in_either_engine_and_every_time(make_pi0, shape):
    path = make_pi0(**shape).path
    eager, graph = (load_policy(path, engine=engine) for engine in ("auto", "graph"))
    assert (eager.engine.name, graph.engine.name) == ("eager", "graph")
    assert graph.warm_up() > 0 and eager.warm_up() > 0
    actions = eager.act(observation()).actions
    assert actions.shape == (6, 7) and actions.dtype == np.float64
    assert np.array_equal(eager.act(observation()).actions, actions)
    np.testing.assert_allclose(graph.act(observation()).actions, actions, atol=1e-6)
    assert not np.allclose(eager.act(observation(1)).actions, actions)
    assert (actions[:, -1] >= 0).all() and (actions[:, -1] <= 1).all()


def test_every_camera_the_state_and_the_words_matter(make_pi0):
    policy = load_policy(make_pi0().path)
    base = policy.act(observation()).actions
    changed = [observation(instruction="push the green cylinder into the red square")]
    for name in CAMERAS:
        images = observation().images
        changed.append(observation(images=images | {name: 255 - images[name]}))
    changed.append(observation(proprioception=np.zeros(8)))
    assert all(np.abs(policy.act(seen).actions - base).max() > 1e-5 for seen in changed)


@pytest.mark.parametrize("quantized", [("nf4", ("llm",)), ("int8", ("llm",))], ids=str)
def test_a_quantized_bundle(make_pi0, quantized):
    whole, small = (
        load_policy(make_pi0(quantized=q, name=str(i)).path)
        for i, q in enumerate((None, quantized))
    )
    sizes = whole.weight_bytes(), small.weight_bytes()
    assert sizes[1]["llm"] < sizes[0]["llm"] and sizes[1]["expert"] == sizes[0]["expert"]
    assert whole.parameters == small.parameters
    difference = whole.act(observation()).actions - small.act(observation()).actions
    assert 0 < np.abs(difference).max() < 0.2  # of the gripper's 1


def test_a_part_that_the_policy_has_not():
    from tests.conftest import random_model

    model = random_model(bundle_config())
    how = QuantizationConfig(method="bitsandbytes-nf4", parts=("expert",))
    with pytest.raises(UserError, match="this policy has no part 'expert'"):
        quantization.quantize(model, how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "looks through camera 'base_0_rgb', and the observation has: none"),
        ({"proprioception": np.zeros(7)}, "takes 8 proprioception values"),
        ({"proprioception": np.full(8, np.nan)}, "not finite"),
        ({"instruction": " "}, "the instruction is empty"),
        ({"instruction": "sing"}, "does not know these words of the instruction: sing"),
    ],
)
def test_observations_that_do_not_fit(make_pi0, changes, message):
    policy = load_policy(make_pi0().path)
    with pytest.raises(UserError, match=message):
        policy.act(observation(**changes))


def test_an_instruction_without_room(make_pi0):
    policy = load_policy(make_pi0().path)
    with pytest.raises(UserError, match="1200 tokens, and the policy's context has room for 448"):
        policy.act(observation(instruction="red " * 1199))


def test_a_picture_stays_whole_within_a_square():
    processor = Pi0Processor(pi0_config(), None)
    image = np.full((24, 48, 3), 200, np.uint8)
    small = processor.resized(image)
    assert small.shape == (32, 32, 3)
    assert (small[8:24] == 200).all() and (small[:8] == 0).all() and (small[24:] == 0).all()
    assert (processor.resized(np.ascontiguousarray(image.transpose(1, 0, 2)))[:, :8] == 0).all()
    rng = np.random.default_rng(0)
    square = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(processor.resized(square), expected)


def test_prompts_as_openpi_has_them():
    tokenizer = word_tokenizer(["put", "it", "down"])
    processor = Pi0Processor(pi0_config(), tokenizer)
    ids = [tokenizer.token_to_id(word) for word in ("put", "it", "down")]
    assert processor.token_ids(" put_it\ndown ") == [2, *ids]


def test_pixels_of_every_camera_are_normalised():
    processor = Pi0Processor(pi0_config(), None)
    images = np.zeros((2, 3, 32, 32, 3), np.uint8)
    images[1, 2] = 255
    pixels = processor.pixel_values(images)
    assert pixels.shape == (2, 3, 3, 32, 32)
    assert (pixels[0] == -1).all() and (pixels[1, 2] == 1).all()


def test_configurations_round_trip():
    for config in (pi0_config(), pi0_config(**EVERY_WIDTH), bundle_config()):
        assert from_dict(BundleConfig, json.loads(json.dumps(config.to_dict())), "") == config


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: architecture(expert=((4, 1, 64),) * 2), "as many layers and in each the same"),
        (lambda: architecture(expert=((4, 2, 64),) * 3), "the same kv_heads"),
        (lambda: architecture(proprioception=13), "state_width of 12"),
        (lambda: pi0_config(action_width=6), "the expert's action_width is 6"),
        (lambda: replace(architecture(), towers=(tower(),)), "one vision tower, 'paligemma'"),
        (lambda: replace(architecture(), expert=None), "takes an expert beside it"),
        (lambda: ExpertConfig(hidden_size=31, layers=()), "hidden_size is 31, and must be even"),
        (lambda: architecture(steps=0), "steps is 0"),
        (lambda: architecture(min_period=5.0), "min_period must be above 0"),
    ],
)
def test_configurations_that_make_no_sense(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantized", [None, ("nf4", ("llm", "vision", "expert"))])
def test_a_bundle_on_a_gpu(make_pi0, quantized):
    path = make_pi0(quantized).path
    eager, graph = (
        load_policy(path, "cuda", engine, dtype="float32") for engine in ("eager", "graph")
    )
    graph.warm_up()
    expected = eager.act(observation()).actions
    np.testing.assert_allclose(graph.act(observation()).actions, expected, atol=1e-4)
