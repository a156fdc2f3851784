import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlrc_ros.errors import UserError
from rlrc_ros.vla import Observation, load_policy
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.conversion import convert
from rlrc_ros.vla.inspection import inspect
from rlrc_ros.vla.pi0 import Pi0, start_noise
from rlrc_ros.vla.pi0_upstream import upstream_config, upstream_model, upstream_name
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS
from tests.vla.pi0_policies import CAMERAS, architecture, random_pi0

MEAN, STD = [0.01] * 6 + [0.5], [0.02] * 6 + [0.4]
STATE_MEAN, STATE_STD = [0.1] * 8, [0.5] * 8


def heads_of_256(**changes):
    """lerobot's configuration tells no head sizes: they are Gemma's and SigLIP's."""
    config = architecture(((2, 1, 96),) * 2, ((1, 1, 64),) * 2, images=2, **changes)
    tower = replace(config.towers[0], width=72, heads=1)
    return replace(config, towers=(tower,), decoder=replace(config.decoder, head_dim=256))


def lerobot_name(name):
    """As lerobot's recent checkpoints have it."""
    for ours, theirs in (
        ("vision_backbone.", "paligemma.model.vision_tower.vision_model."),
        ("projector.", "paligemma.model.multi_modal_projector."),
        ("language_model.model.embed_tokens.weight", "paligemma.lm_head.weight"),
        ("language_model.model.", "paligemma.model.language_model."),
        ("expert.model.", "gemma_expert.model."),
    ):
        if name.startswith(ours):
            return f"model.paligemma_with_expert.{theirs}{name[len(ours) :]}"
    return f"model.{name.removeprefix('expert.')}"


def older_lerobot_name(name):
    """As they were named before transformers moved PaliGemma's parts."""
    name = lerobot_name(name).removeprefix("model.")
    for now, before in (("model.vision_tower.", "vision_tower."), ("model.multi_", "multi_")):
        name = name.replace(f"paligemma.{now}", f"paligemma.{before}")
    name = name.replace("paligemma.model.language_model.", "paligemma.language_model.model.")
    return name.replace("paligemma.lm_head.", "paligemma.language_model.lm_head.")


def write_transformers(path, model):
    path.mkdir()
    upstream_model(model).save_pretrained(path)
    held = {"actions_mean": MEAN, "actions_std": STD}
    held |= {"state_mean": STATE_MEAN, "state_std": STATE_STD, "processor_class": "PI0Processor"}
    (path / "processor_config.json").write_text(json.dumps(held))


def write_lerobot(path, model, rename=lerobot_name, method="MEAN_STD", **changes):
    path.mkdir()
    tensors = {rename(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    head = torch.zeros(96, model.config.expert.hidden_size)
    prefix = "model." * (rename is lerobot_name) + "paligemma_with_expert."
    tensors[f"{prefix}gemma_expert.lm_head.weight"] = head
    save_file({**tensors, **changes}, path / "model.safetensors")
    expert = model.config.expert
    config = {"type": "pi0", "chunk_size": expert.chunk, "num_steps": expert.steps}
    config["input_features"] = {
        "observation.images.front": {"type": "VISUAL", "shape": [3, 48, 64]},
        "observation.state": {"type": "STATE", "shape": [8]},
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, 32, 32]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 480, 640]},
    }
    (path / "config.json").write_text(json.dumps(config))
    pairs = {
        "MEAN_STD": ("mean", "std", MEAN, STD),
        "QUANTILES": ("q01", "q99", *spread(MEAN, STD)),
    }
    low, high, first, second = pairs[method]
    for pre, step, stats in (
        (
            "pre",
            "normalizer",
            {"observation.state.mean": STATE_MEAN, "observation.state.std": STATE_STD},
        ),
        ("post", "unnormalizer", {f"action.{low}": first, f"action.{high}": second}),
    ):
        file = f"policy_{pre}processor_step_0_{step}_processor.safetensors"
        save_file({name: torch.tensor(values) for name, values in stats.items()}, path / file)
        norms = {"STATE": "MEAN_STD", "ACTION": method}
        steps = [{"registry_name": "device_processor", "config": {}}]
        steps.append(
            {
                "registry_name": f"{step}_processor",
                "config": {"norm_map": norms},
                "state_file": file,
            }
        )
        text = json.dumps({"name": f"policy_{pre}processor", "steps": steps})
        (path / f"policy_{pre}processor.json").write_text(text)


def spread(mean, std):
    pairs = list(zip(mean, std, strict=True))
    return [m - s for m, s in pairs], [m + s for m, s in pairs]


def observation(cameras, size=(48, 64), seed=0):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for name in cameras}
    return Observation(images, "put the red cube on the blue plate", rng.normal(size=8))


def test_a_checkpoint_of_transformers_acts_like_its_model(tmp_path):
    model = random_pi0(architecture())
    write_transformers(tmp_path / "pi0", model)
    word_tokenizer([*WORDS, "put"]).save(str(tmp_path / "pi0" / "tokenizer.json"))
    policy = load_policy(tmp_path / "pi0")
    assert tuple(c.name for c in policy.config.cameras) == CAMERAS
    assert policy.config.architecture == model.config
    seen = observation(CAMERAS, (32, 32))
    actions = policy.act(seen).actions
    inputs = policy.processor(seen)
    state = (seen.proprioception - STATE_MEAN) / (np.array(STATE_STD) + 1e-8)
    torch.testing.assert_close(inputs.proprioception[0], torch.tensor(state).float())
    chunk = model.generate(inputs, start_noise(model.config.expert)[None])
    expected = chunk[0, :, :7].double().numpy() * STD + MEAN
    expected[:, -1] = expected[:, -1].clip(0, 1)
    assert actions.shape == (6, 7)
    np.testing.assert_allclose(actions, expected, atol=1e-6)


@pytest.mark.parametrize("method", ["MEAN_STD", "QUANTILES"])
@pytest.mark.parametrize("rename", [lerobot_name, older_lerobot_name])
def test_a_checkpoint_of_lerobot(tmp_path, rename, method):
    model = random_pi0(heads_of_256())
    write_lerobot(tmp_path / "pi0", model, rename, method)
    bundle = open_bundle(tmp_path / "pi0")
    decoder = replace(model.config.decoder, max_positions=8192)  # Gemma's; lerobot does not say
    assert bundle.config.architecture == replace(model.config, decoder=decoder)
    cameras = [(c.name, c.height, c.width) for c in bundle.config.cameras]
    assert cameras == [("front", 48, 64), ("wrist", 32, 32)]
    policy = load_policy(tmp_path / "pi0")
    state = policy.engine._model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    codec, joints = bundle.config.action_codec, bundle.config.proprioception
    np.testing.assert_allclose([codec.q01, codec.q99], spread(MEAN, STD), atol=1e-6)
    np.testing.assert_allclose([joints.mean, joints.std], [STATE_MEAN, STATE_STD], atol=1e-6)
    with pytest.raises(UserError, match="this policy has no tokenizer"):
        policy.act(observation(["front", "wrist"]))


def test_it_can_be_inspected(tmp_path):
    model = random_pi0(heads_of_256())
    write_lerobot(tmp_path / "pi0", model)
    facts = inspect(tmp_path / "pi0")
    counts = {part: sum(p.numel() for p in m.parameters()) for part, m in model.parts.items()}
    assert facts["parameters"] == counts | {"total": sum(counts.values())}
    assert facts["bytes"] == {k: 4 * v for k, v in facts["parameters"].items()}
    assert facts["chunk"] == 6
    assert facts["expert_layers"] == [{"heads": 1, "kv_heads": 1, "ffn": 64}] * 2


def test_converted_it_says_what_the_robot_has_to_know(tmp_path):
    write_lerobot(tmp_path / "pi0", random_pi0(heads_of_256()))
    word_tokenizer(WORDS).save(str(tmp_path / "pi0" / "tokenizer.json"))
    numbered = open_bundle(tmp_path / "pi0")
    assert numbered.config.proprioception.joints == tuple(f"state_{i}" for i in range(8))
    assert numbered.config.control_rate == 20.0
    names = [f"joint{i}" for i in range(8)]
    fields = {"cameras": ["top", "hand"], "joints": names, "control_rate": 15.0}
    bundle = convert(tmp_path / "pi0", tmp_path / "bundle", **fields)
    assert bundle.config.proprioception.joints == tuple(names)
    assert [camera.name for camera in bundle.config.cameras] == ["top", "hand"]
    assert bundle.config.control_rate == 15.0
    seen = observation(["top", "hand"])
    renamed = dict(zip(("front", "wrist"), seen.images.values(), strict=True))
    expected = load_policy(tmp_path / "pi0").act(replace(seen, images=renamed)).actions
    np.testing.assert_array_equal(load_policy(bundle.path).act(seen).actions, expected)
    with pytest.raises(UserError, match="a bundle already"):
        convert(bundle.path, tmp_path / "again")
    with pytest.raises(UserError, match="no chunks to choose"):
        convert(tmp_path / "pi0", tmp_path / "again", chunk=5)


def change(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def drop(path, name):
    from safetensors.torch import load_file

    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


PREFIX = "model.paligemma_with_expert"
BROKEN = {
    "no statistics": (
        lambda path: (path / "policy_postprocessor.json").unlink(),
        "neither policy_postprocessor.json nor processor_config.json has statistics",
    ),
    "a file outside": (
        lambda path: change(
            path / "policy_postprocessor.json",
            steps=[{"registry_name": "unnormalizer_processor", "state_file": "../x.safetensors"}],
        ),
        "names '../x.safetensors', which is no file of this directory",
    ),
    "a tensor too few": (
        lambda path: drop(path / "model.safetensors", "model.action_out_proj.bias"),
        "missing: expert.action_out_proj.bias",
    ),
    "no way out of the expert": (
        lambda path: drop(path / "model.safetensors", "model.action_out_proj.weight"),
        "has no tensor expert.action_out_proj.weight, which every pi0 has",
    ),
    "no expert": (
        lambda path: drop(path / "model.safetensors", "model.state_proj.weight"),
        "has no tensor expert.state_proj.weight, which every pi0 has",
    ),
    "a layer missing": (
        lambda path: drop(
            path / "model.safetensors",
            f"{PREFIX}.paligemma.model.language_model.layers.1.input_layernorm.weight",
        ),
        "missing: language_model.model.layers.1.input_layernorm.weight",
    ),
}


@pytest.mark.parametrize(("breaking", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_said_before_anything_is_read(tmp_path, breaking, message):
    write_lerobot(tmp_path / "pi0", random_pi0(heads_of_256()))
    breaking(tmp_path / "pi0")
    with pytest.raises(UserError, match=message.replace("..", r"\.\.")):
        load_policy(tmp_path / "pi0")


def test_a_tensor_too_many_and_one_of_another_shape(tmp_path):
    model = random_pi0(heads_of_256())
    extra = {"model.time_mlp_in.weight": torch.zeros(2, 2)}
    extra["model.action_out_proj.bias"] = torch.zeros(11)
    write_lerobot(tmp_path / "pi0", model, **extra)
    with pytest.raises(UserError) as refused:
        load_policy(tmp_path / "pi0")
    assert "unknown: model.time_mlp_in.weight" in str(refused.value)
    assert "expert.action_out_proj.bias is (11,) instead of (10,)" in str(refused.value)


def test_actions_of_another_robot_are_refused(tmp_path):
    model = random_pi0(architecture(action_width=16))
    write_transformers(tmp_path / "pi0", model)
    file = tmp_path / "pi0" / "processor_config.json"
    change(file, actions_mean=[0.0] * 14, actions_std=[1.0] * 14)
    inspect(tmp_path / "pi0")
    with pytest.raises(UserError, match="its actions have 14 values; this program commands"):
        load_policy(tmp_path / "pi0")


def test_engines_that_pi0_has_not(tmp_path):
    write_transformers(tmp_path / "pi0", random_pi0(architecture()))
    with pytest.raises(UserError, match="take engine 'eager' or 'graph'"):
        load_policy(tmp_path / "pi0", engine="unrolled")


def test_the_names_are_those_that_transformers_gives():
    with torch.device("meta"):
        from transformers import PI0ForConditionalGeneration

        config = architecture()
        theirs = PI0ForConditionalGeneration(upstream_config(config)).state_dict()
        ours = Pi0(config).state_dict()
    assert {upstream_name(name) for name in ours} == {*theirs} - {"model.dit.embed_tokens.weight"}
