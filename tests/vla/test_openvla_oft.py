"""OpenVLA-OFT against what upstream's own modules gave (`oft_upstream.py` says how)."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlrc_ros.errors import UserError
from rlrc_ros.vla import Observation, load_policy, quantization
from rlrc_ros.vla.bundle import open_bundle, provenance, write_bundle
from rlrc_ros.vla.chunk_engine import EagerChunkEngine, GraphChunkEngine
from rlrc_ros.vla.config import EE_POSE_NAMES, QuantizationConfig
from rlrc_ros.vla.conversion import convert
from rlrc_ros.vla.inspection import inspect
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.parity import parity
from rlrc_ros.vla.policy import load_model
from rlrc_ros.vla.processor import Processor, center_crop, word_tokenizer
from tests.vla import oft_upstream

EXPECTED = json.loads((Path(__file__).parent / "data" / "openvla_oft.json").read_text())
PARTS = ("action_head", "proprio_projector")
TWO, ONE = oft_upstream.VARIANTS
TOLERANCE = 1e-5


def write_checkpoint(path, variant=TWO, prefix="module."):
    """As upstream lays it out: the VLA in safetensors, the parts pickled apart."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(oft_upstream.config()))
    (path / "preprocessor_config.json").write_text(json.dumps(oft_upstream.preprocessor_config()))
    tensors = {
        name: torch.from_numpy(oft_upstream.weights(name, tuple(shape)))
        for name, shape in EXPECTED["tensors"].items()
    }
    apart = {part: {} for part in PARTS}
    for name in list(tensors):
        if (part := name.partition(".")[0]) in PARTS:
            apart[part][prefix + name.partition(".")[2]] = tensors.pop(name)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    word_tokenizer(["in", "out", "go"]).save(str(path / "tokenizer.json"))
    for part, content in apart.items():
        if part == "action_head" or oft_upstream.VARIANTS[variant]["proprioception"]:
            torch.save(content, path / f"{part}--150000_checkpoint.pt")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("published") / "oft")


def act(policy, case, images):
    seen, ids, state = oft_upstream.observation(case, images)
    policy.processor.token_ids = lambda _: ids
    cameras = [camera.name for camera in policy.config.cameras]
    takes = policy.config.proprioception is not None
    pictures = dict(zip(cameras, seen, strict=False))
    return policy.act(Observation(pictures, "go", state if takes else None)).actions


def expected(variant, case, key):
    (found,) = (
        result
        for result in EXPECTED["results"]
        if (result["variant"], result["case"], result["unnorm_key"]) == (variant, case, key)
    )
    actions = np.array(found["actions"])
    actions[:, -1] = actions[:, -1].clip(0.0, 1.0)  # a gripper's opening, which `act` bounds
    return actions


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("key", oft_upstream.KEYS)
def test_it_gives_what_upstream_gives(checkpoint, key, engine):
    policy = load_policy(checkpoint, unnorm_key=key, engine=engine)
    for case in range(oft_upstream.CASES):
        actions = act(policy, case, 2)
        assert actions.shape == (8, 7)
        np.testing.assert_allclose(actions, expected(TWO, case, key), atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_graph_gives_what_upstream_gives(checkpoint):
    key = oft_upstream.KEYS[0]
    policy = load_policy(checkpoint, "cuda", "graph", "float32", unnorm_key=key)
    policy.warm_up()
    for case in range(oft_upstream.CASES):
        actions = act(policy, case, 2)
        np.testing.assert_allclose(actions, expected(TWO, case, key), atol=1e-3, rtol=0)


KEY = oft_upstream.KEYS[1]


@pytest.mark.parametrize("variant", oft_upstream.VARIANTS)
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_bundle_of_it_acts_alike(tmp_path, variant, engine):
    images = oft_upstream.VARIANTS[variant]["images"]
    source = write_checkpoint(tmp_path / "oft", variant, prefix="")
    cameras = ["scene", "hand"][:images]
    bundle = convert(f"{source}#{KEY}", tmp_path / "bundle", cameras=cameras, control_rate=20.0)
    assert [camera.name for camera in bundle.config.cameras] == cameras
    assert bundle.config.control_rate == 20.0
    assert not list((tmp_path / "bundle").glob("*.pt"))
    policy = load_policy(tmp_path / "bundle", engine=engine)
    policy.warm_up()
    for case in range(oft_upstream.CASES):
        actions = act(policy, case, images)
        np.testing.assert_allclose(actions, expected(variant, case, KEY), atol=TOLERANCE, rtol=0)


def test_names_and_chunk_can_be_told(checkpoint, tmp_path):
    joints = [f"joint{i}" for i in range(8)]
    bundle = convert(checkpoint, tmp_path / "b", unnorm_key=KEY, joints=joints, chunk=3)
    assert bundle.config.proprioception.joints == tuple(joints)
    assert act(load_policy(bundle.path), 0, 2).shape == (3, 7)


def test_liberos_state_is_the_end_effectors_pose_and_two_fingers(checkpoint, tmp_path):
    fingers = ["panda_finger_joint1", "panda_finger_joint2"]
    bundle = convert(checkpoint, tmp_path / "b", unnorm_key=KEY, joints=fingers, ee_pose=True)
    assert open_bundle(bundle.path).config.proprioception.names == [*EE_POSE_NAMES, *fingers]
    assert act(load_policy(bundle.path), 0, 2).shape == (8, 7)


def test_prompts_of_any_length_and_padding_change_nothing(checkpoint):
    model = load_model(open_bundle(checkpoint))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 12, 56, 56, generator=generator)
    joints = torch.randn(2, 8, generator=generator)
    ids = torch.randint(3, 31000, (2, 9), generator=generator)
    mask = torch.tensor([[i < n for i in range(9)] for n in (9, 6)])
    inputs = Inputs(ids * mask, mask, pixels, joints)
    with torch.no_grad():
        both = model(inputs)
        for row, length in enumerate((9, 6)):
            alone = inputs[slice(row, row + 1)]
            alone.input_ids, alone.attention_mask = alone.input_ids[:, :length], None
            torch.testing.assert_close(model(alone)[0], both[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 9, 30, 70])
def test_the_graph_engine_gives_eager_actions(checkpoint, length):
    bundle = open_bundle(f"{checkpoint}#{KEY}")
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 31000, (1, length), generator=generator)
    images = torch.randint(0, 256, (2, 56, 56, 3), generator=generator, dtype=torch.uint8)
    joints = torch.randn(1, 8, generator=generator)
    normalised = Processor(bundle.config, None).stacked(images)
    eager = EagerChunkEngine(load_model(bundle)).chunk(Inputs(ids, None, normalised, joints))
    found = GraphChunkEngine(load_model(bundle)).chunk(Inputs(ids, None, images[None], joints))
    torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["bitsandbytes-nf4", "bitsandbytes-int8"])
def test_quantized_it_is_smaller_and_acts_nearly_alike(checkpoint, tmp_path, method):
    source = open_bundle(f"{checkpoint}#{KEY}")
    model = load_model(source)
    config = QuantizationConfig(method=method, parts=("llm",))
    quantization.quantize(model, config)
    made = dataclasses.replace(source.config, quantization=config)
    origin = provenance(source, "compressed")
    write_bundle(tmp_path / "b", made, quantization.stored(model), source.tokenizer(), origin)
    whole, small = load_policy(source.path, unnorm_key=KEY), load_policy(tmp_path / "b")
    graph = load_policy(tmp_path / "b", engine="graph")
    assert small.weight_bytes()["llm"] < whole.weight_bytes()["llm"]
    assert small.weight_bytes()["action_head"] == whole.weight_bytes()["action_head"]
    a, b, c = (act(policy, 0, 2) for policy in (whole, small, graph))
    assert 0 < np.abs(a - b).max() < 0.5 * np.ptp(a)
    if method == "bitsandbytes-nf4":  # of int8 the graph engine rounds no inputs
        np.testing.assert_allclose(b, c, atol=1e-4)


def test_images_are_cropped_as_upstream_does_it():
    upstream = json.loads((Path(__file__).parent / "data" / "center_crop.json").read_text())
    image = oft_upstream.cropped()
    assert (center_crop(image, 0.9) == np.array(upstream["image"])).all()
    assert (center_crop(image, 1.0) == image).all()


def test_a_bundle_crops_where_it_says_so(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "b", unnorm_key=KEY, center_crop=0.9)
    policy = load_policy(tmp_path / "b")
    (first, second), _, state = oft_upstream.observation(0, 2)
    images = {"front": first, "wrist": second}
    seen = policy.processor.images(Observation(images, "go", state))
    assert (seen[0] == center_crop(first, 0.9)).all() and (seen[0] != first).any()
    assert not np.allclose(act(policy, 0, 2), expected(TWO, 0, KEY), atol=1e-3)


def test_parts_are_told_apart(checkpoint):
    facts = inspect(checkpoint)
    assert facts["chunk"] == 8 and set(facts["bytes"]) == {
        *("vision", "projector", "llm", "action_head", "total")
    }
    assert all(facts["bytes"][part] == 4 * n for part, n in facts["parameters"].items())


def test_what_decodes_tokens_is_refused(checkpoint):
    for engine in ("unrolled", "openvino"):
        with pytest.raises(UserError, match=f"the {engine} engine cannot; take engine 'eager' or"):
            load_policy(checkpoint, unnorm_key=KEY, engine=engine)
    with pytest.raises(UserError, match="is an OpenVLA-OFT checkpoint, and parity compares action"):
        parity(checkpoint)
    with pytest.raises(UserError, match="chunks of continuous actions"):
        load_model(open_bundle(checkpoint)).generate(None)


HEAD, PROPRIO = (f"{part}--150000_checkpoint.pt" for part in PARTS)


def repickle(file, edit):
    def damage(path):
        content = torch.load(path / file, weights_only=True)
        torch.save(edit(content) or content, path / file)

    return damage


def evil(path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (path / "ran",))

    torch.save({"module.model.fc1.weight": Evil()}, path / HEAD)


def truncate(path):
    (path / HEAD).write_bytes((path / HEAD).read_bytes()[:-4000])


def statistics(**changes):
    def damage(path):
        config = json.loads((path / "config.json").read_text())
        config["norm_stats"] = {KEY: {**config["norm_stats"][KEY], **changes}}
        (path / "config.json").write_text(json.dumps(config))

    return damage


FC2 = "module.model.fc2"
DAMAGES = {
    "a pickle that runs code": (evil, f"{HEAD}: not a readable file of tensors"),
    "truncated": (truncate, f"{HEAD}: not a readable file of tensors"),
    "text": (lambda p: (p / HEAD).write_text("oops"), f"{HEAD}: not a readable file of tensors"),
    "a list": (repickle(HEAD, lambda _: [torch.ones(2)]), f"{HEAD}: holds other things than tens"),
    "a number inside": (repickle(HEAD, lambda c: c.update(step=3)), "holds other things than tens"),
    "two heads": (
        lambda p: shutil.copy(p / HEAD, p / "action_head--5000_checkpoint.pt"),
        "has several of one part",
    ),
    "no head": (lambda p: (p / HEAD).unlink(), "and no action_head--"),
    "diffusion": (
        lambda p: shutil.copy(p / PROPRIO, p / "noisy_action_projector--150000_checkpoint.pt"),
        r"denoises \(DDIM\)",
    ),
    "FiLM": (
        lambda p: shutil.copy(p / PROPRIO, p / "vision_backbone--150000_checkpoint.pt"),
        r"modulated by the instruction \(FiLM\)",
    ),
    "two arms": (
        repickle(HEAD, lambda c: c.update({f"{FC2}.bias": torch.ones(14)})),
        "gives 14 numbers an action",
    ),
    "another head": (
        repickle(HEAD, lambda c: c.pop(f"{FC2}.bias") is None),
        "has no tensor model.fc2.bias",
    ),
    "a missing tensor": (
        repickle(HEAD, lambda c: c.pop(f"{FC2}.weight") is None),
        "missing: action_head.model.fc2.weight",
    ),
    "a tensor where blocks belong": (
        repickle(HEAD, lambda c: c.update({"model.mlp_resnet_blocks": torch.ones(1)})),
        "unknown: action_head.model.mlp_resnet_blocks",
    ),
    "an extra tensor": (
        repickle(HEAD, lambda c: c.update({"module.more": torch.ones(1)})),
        "unknown: action_head.more",
    ),
    "a wrong shape": (
        repickle(HEAD, lambda c: c.update({"module.model.fc1.weight": torch.ones(32, 7)})),
        r"wrong shape: action_head.model.fc1.weight is \(32, 7\) instead of \(32, 224\)",
    ),
    "integers": (
        repickle(HEAD, lambda c: c.update({f"{FC2}.weight": torch.ones(7, 32, dtype=torch.int64)})),
        "action_head.model.fc2.weight is torch.int64",
    ),
    "a projector of another length": (
        repickle(PROPRIO, lambda c: c.update({"module.fc1.weight": torch.ones(32, 9)})),
        "its proprio needs 9 values each",
    ),
    "no statistics of proprioception": (statistics(proprio=None), "has no 'proprio', and the poli"),
    "statistics without quantiles": (statistics(proprio={"min": [0] * 8}), "lacks q01 and q99"),
    "quantiles upside down": (
        statistics(proprio={"q01": [1.0] * 8, "q99": [0.0] * 8}),
        "a q01 above its q99",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_is_said_in_one_line(checkpoint, tmp_path, damage, message):
    damaged = shutil.copytree(checkpoint, tmp_path / "oft")
    damage(damaged)
    with pytest.raises(UserError, match=message) as refusal:
        load_policy(damaged, unnorm_key=KEY)
    assert "\n" not in str(refusal.value) and str(damaged) in str(refusal.value)
    assert not (damaged / "ran").exists()
    with pytest.raises(UserError):
        convert(damaged, tmp_path / "bundle", unnorm_key=KEY)
    assert not list(tmp_path.glob("bundle*"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"unnorm_key": "libero"}, "norm_stats has no 'libero'; there are: libero_object"),
        ({}, "scales actions differently by data set"),
        ({"unnorm_key": KEY, "joints": ["a"]}, "takes 8 proprioception values, 1 are named"),
        ({"unnorm_key": KEY, "ee_pose": True}, "takes 8 proprioception values, 6 are named"),
        ({"unnorm_key": KEY, "cameras": ["a", "a"]}, "a camera is named twice"),
    ],
)
def test_what_does_not_fit_is_not_converted(checkpoint, tmp_path, asked, message):
    with pytest.raises(UserError, match=message):
        convert(checkpoint, tmp_path / "bundle", **asked)
    assert not list(tmp_path.iterdir())


def test_an_instruction_longer_than_the_context(checkpoint):
    processor = load_policy(checkpoint, unnorm_key=KEY).processor
    processor._tokenizer = word_tokenizer(["red"])
    processor._unknown = None
    room = 2048 - 2 * 16 - 1 - 57  # two images of 16 patches, proprioception, places and stop
    with pytest.raises(UserError, match=rf"takes 30.. tokens, and .* has room for {room}"):
        processor.token_ids("red " * 3000)


def test_a_missing_camera_is_named(checkpoint):
    policy = load_policy(checkpoint, unnorm_key=KEY)
    policy.processor.token_ids = lambda _: [1, 29871]
    seen = np.zeros((56, 56, 3), np.uint8)
    with pytest.raises(UserError, match="looks through camera 'wrist', and the observation has: f"):
        policy.act(Observation({"front": seen}, "go", np.zeros(8)))
