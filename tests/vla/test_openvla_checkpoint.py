import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlrc_ros.errors import UserError
from rlrc_ros.vla import Observation, load_policy
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.inspection import inspect
from rlrc_ros.vla.policy import load_model
from rlrc_ros.vla.processor import word_tokenizer
from tests.vla.checkpoints import KEYS, architecture, write_checkpoint, write_json

SHAPES = {
    "as published": {},
    "grouped queries, deeper": {"hidden": 64, "heads": 4, "kv_heads": 2, "layers": 3, "ffn": 96},
    "wide towers": {"dino": (128, 3), "siglip": (144, 2)},
    "one tower": {"dino": None},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "openvla"
    write_checkpoint(path)
    return path


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy to damage, in three shards."""
    path = tmp_path / "openvla"
    path.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(checkpoint / file, path)
    tensors, index = load_file(checkpoint / "model.safetensors"), {}
    for i in range(3):
        names = sorted(tensors)[i::3]
        save_file({name: tensors[name] for name in names}, path / shard(i))
        index |= dict.fromkeys(names, shard(i))
    write_json(path / "model.safetensors.index.json", {"weight_map": index})
    return path


def shard(i):
    return f"model-{i + 1:05}-of-00003.safetensors"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_tensor_arrives_under_its_own_name(tmp_path, shape, shards):
    model = write_checkpoint(tmp_path / "openvla", shards, **shape)
    bundle = open_bundle(tmp_path / "openvla")
    assert bundle.config.architecture == architecture(**shape)
    loaded = load_model(bundle).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_sizes_that_config_json_leaves_out_come_from_the_shapes(damaged):
    config = json.loads((damaged / "config.json").read_text())
    heads = config["text_config"]["num_attention_heads"]
    config["text_config"] = {"model_type": "llama", "num_attention_heads": heads}
    write_json(damaged / "config.json", config)
    assert open_bundle(damaged).config.architecture == architecture()


def test_it_acts_in_the_units_of_the_chosen_data_set(damaged):
    word_tokenizer(["in", "out", "action", "the", "lift", "cup"]).save(
        str(damaged / "tokenizer.json")
    )
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    policies = [load_policy(f"{damaged}#{KEYS[0]}"), load_policy(damaged, unnorm_key=KEYS[1])]
    actions = []
    for policy in policies:
        # Words of the template that the toy tokenizer does not know are not what is tested here.
        policy.processor.token_ids = lambda _: [1, 5, 29871]
        actions.append(policy.act(Observation({"front": image}, "lift the cup")).actions)
    assert actions[0].shape == (1, 7) and not np.allclose(actions[0], actions[1])
    codec = policies[0].config.action_codec
    assert (actions[0][0, :6] >= np.array(codec.q01)[:6]).all()
    assert (actions[0][0, :6] <= np.array(codec.q99)[:6]).all()


def test_without_a_data_set_it_loads_and_refuses_to_act(checkpoint):
    policy = load_policy(checkpoint)
    for act in (policy.warm_up, lambda: policy.act(Observation({}, "go"))):
        with pytest.raises(UserError, match=r"openvla#KEY; there are: bridge_orig, toy_arm"):
            act()


def test_an_unknown_data_set_is_answered_with_the_known_ones(checkpoint):
    with pytest.raises(UserError, match="no 'libero'; there are: bridge_orig, toy_arm"):
        load_policy(checkpoint, unnorm_key="libero")


def test_statistics_of_a_fine_tuning_rule(damaged):
    mine = {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7}}
    write_json(damaged / "dataset_statistics.json", {"mine": mine})
    codec = open_bundle(damaged).config.action_codec
    assert codec.q01 == (-2.0,) * 7 and codec.mask == (True,) * 7


def test_a_dimension_that_never_moved_decodes_to_its_one_value(damaged):
    still = {"action": {"q01": [-1.0] * 6 + [0.5], "q99": [1.0] * 6 + [0.5]}}
    write_json(damaged / "dataset_statistics.json", {"mine": still})
    from rlrc_ros.vla.action_codec import ActionCodec

    codec = ActionCodec(open_bundle(damaged).config.action_codec)
    assert (
        codec.decode(np.array([[0] * 7]))[0, 6] == codec.decode(np.array([[200] * 7]))[0, 6] == 0.5
    )
    assert np.isfinite(codec.encode(np.full((1, 7), 0.5))).all()


def test_the_hash_names_the_weights(damaged):
    before = open_bundle(damaged).hash
    file = damaged / shard(1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert open_bundle(damaged).hash != before


def test_inspecting_needs_no_data_set(checkpoint):
    facts = inspect(checkpoint)
    assert facts["bytes"]["total"] == 4 * facts["parameters"]["total"]
    assert facts["provenance"]["stages"][0]["stage"] == "original"


def drop(name):
    def damage(path):
        rewrite(path, lambda tensors: tensors.pop(name))

    return damage


def change(name, tensor):
    def damage(path):
        rewrite(path, lambda tensors: tensors.update({name: tensor}))

    return damage


def rewrite(path, edit):
    """Into one file, after an edit."""
    tensors = {k: v for i in range(3) for k, v in load_file(path / shard(i)).items()}
    edit(tensors)
    for file in (*map(shard, range(3)), "model.safetensors.index.json"):
        (path / file).unlink()
    save_file(tensors, path / "model.safetensors")


def truncate(path):
    file = path / shard(1)
    file.write_bytes(file.read_bytes()[:-100])


def noise(path):
    (path / shard(2)).write_bytes(b"\x93NUMPY" * 100)


def point_elsewhere(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"projector.fc1.weight": "../../secret.safetensors"}
    write_json(path / "model.safetensors.index.json", index)


def misplace(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["projector.fc1.weight"] = shard(0)
    index["weight_map"]["projector.fc2.weight"] = shard(0)
    write_json(path / "model.safetensors.index.json", index)


def pickled(name):
    def damage(path):
        for file in path.glob("model*"):
            file.unlink()
        torch.save({}, path / name)

    return damage


def setting(file, **changes):
    def damage(path):
        write_json(path / file, json.loads((path / file).read_text()) | changes)

    return damage


LAYER = "language_model.model.layers.1"
DAMAGES = {
    "truncated shard": (truncate, f"{shard(1)}: not a readable safetensors file"),
    "noise for a shard": (noise, f"{shard(2)}: not a readable safetensors file"),
    "absent shard": (lambda p: (p / shard(1)).unlink(), f"names {shard(1)}, which is not there"),
    "index that leaves the directory": (point_elsewhere, "is no safetensors file of this directo"),
    "index that is wrong": (misplace, r"puts projector.fc. in|puts projector.fc..weight in"),
    "no weights": (
        lambda p: [f.unlink() for f in p.glob("model*")],
        "there is neither model.safet",
    ),
    "pickle": (pickled("pytorch_model.bin"), r"weights are pickled \(pytorch_model.bin\)"),
    "other pickle": (pickled("model.pt"), r"weights are pickled \(model.pt\)"),
    "an empty part": (
        lambda p: (p / "action_head--5000_checkpoint.pt").touch(),
        "action_head--5000_checkpoint.pt: not a readable file of tensors",
    ),
    "missing key": (drop(f"{LAYER}.mlp.up_proj.weight"), f"missing: {LAYER}.mlp.up_proj.weight"),
    "missing embedding": (
        drop("language_model.model.embed_tokens.weight"),
        "has no tensor language_model.model.embed_tokens.weight",
    ),
    "extra key": (change("value_head.weight", torch.ones(2)), "unknown: value_head.weight"),
    "wrong shape": (
        change(f"{LAYER}.mlp.up_proj.weight", torch.ones(40, 32)),
        r"wrong shape: .*up_proj.weight is \(40, 32\) instead of \(48, 32\)",
    ),
    "integers": (
        change("projector.fc2.bias", torch.ones(32, dtype=torch.int64)),
        "projector.fc2.bias is I64; expected one of float32",
    ),
    "no preprocessing": (
        lambda p: (p / "preprocessor_config.json").unlink(),
        "preprocessor_config.json: there is no such file",
    ),
    "letterbox": (
        setting("preprocessor_config.json", image_resize_strategy="letterbox"),
        "letterb",
    ),
    "means of one tower": (setting("preprocessor_config.json", means=[[0, 0, 0]]), "has 1 means"),
    "no statistics": (setting("config.json", norm_stats={}), "has no norm_stats"),
    "statistics of no action": (setting("config.json", norm_stats={"a": {}}), "a.action.q01"),
    "text_config of another size": (
        setting("config.json", text_config={"num_attention_heads": 2, "intermediate_size": 64}),
        "wrong shape",
    ),
    "words for numbers": (setting("config.json", n_action_bins="many"), "'n_action_bins' makes no"),
    "scaled rope": (
        setting(
            "config.json", text_config={"num_attention_heads": 2, "rope_scaling": {"factor": 2}}
        ),
        "rope_scaling",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_is_said_in_one_line(damaged, damage, message):
    damage(damaged)
    with pytest.raises(UserError, match=message) as refusal:
        load_policy(damaged)
    assert "\n" not in str(refusal.value) and str(damaged) in str(refusal.value)


def test_an_instruction_longer_than_the_context(checkpoint):
    policy = load_policy(checkpoint, unnorm_key=KEYS[0])
    policy.processor._tokenizer = word_tokenizer(["red"])
    policy.processor._unknown = None
    with pytest.raises(UserError, match=r"takes 30.. tokens, and .* has room for"):
        policy.processor.token_ids("red " * 3000)


def test_without_a_tokenizer_it_says_what_to_copy(checkpoint):
    with pytest.raises(UserError, match=r"no tokenizer\.json.*copy it"):
        load_policy(checkpoint, unnorm_key=KEYS[0]).processor.token_ids("lift the cup")
