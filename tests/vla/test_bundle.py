import json
import shutil
import subprocess
import sys

import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.vla import load_policy
from rlrc_ros.vla.bundle import FILES, SUMS, open_bundle, provenance, sha256
from rlrc_ros.vla.inspection import inspect
from tests.conftest import bundle_config, posed_config


def seal(path):
    """Make the checksums right again after tampering."""
    (path / SUMS).write_text("".join(f"{sha256(path / name)}  {name}\n" for name in FILES))


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))
    seal(path)


def test_a_bundle_reads_back_as_it_was_written(make_bundle):
    bundle = make_bundle()
    again = open_bundle(bundle.path)
    assert again.config == bundle.config == bundle_config()
    assert again.hash == bundle.hash
    assert sorted(p.name for p in bundle.path.iterdir()) == sorted((*FILES, SUMS))


def test_the_hash_names_the_content(make_bundle):
    assert make_bundle("a").hash != make_bundle("b", seed=1).hash


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(make_bundle, name):
    bundle = make_bundle()
    (bundle.path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_policy(bundle.path)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(make_bundle, name):
    bundle = make_bundle()
    data = bytearray((bundle.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle.path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} differs from its checksum"):
        load_policy(bundle.path)


def test_more_layers_than_there_are(make_bundle):
    bundle = make_bundle()
    architecture = bundle.config.to_dict()["architecture"]
    decoder = {**architecture["decoder"], "layers": [*architecture["decoder"]["layers"]] * 2}
    edit_config(bundle.path, architecture={**architecture, "decoder": decoder})
    with pytest.raises(UserError, match="asks for 6 decoder layers, the file holds 3"):
        load_policy(bundle.path)


def test_wrong_widths_are_listed(make_bundle):
    bundle = make_bundle()
    architecture = bundle.config.to_dict()["architecture"]
    layers = [{**layer, "ffn": 128} for layer in architecture["decoder"]["layers"]]
    decoder = {**architecture["decoder"], "layers": layers}
    edit_config(bundle.path, architecture={**architecture, "decoder": decoder})
    with pytest.raises(UserError, match=r"wrong shape: .*gate_proj.weight is \(64, 64\) instead"):
        load_policy(bundle.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 3}, "unknown key 'speed'"),
        ({"control_rat": 3.0}, "did you mean 'control_rate'"),
        ({"control_rate": "fast"}, "control_rate"),
        ({"control_rate": -1.0}, "control_rate must be positive"),
        ({"instruction_template": "do it"}, "must contain {instruction}"),
        ({"format_version": 99}, "newer than this program"),
        ({"proprioception": None}, "takes 8 proprioception values, the contract names 0"),
    ],
)
def test_a_config_that_makes_no_sense(make_bundle, changes, message):
    bundle = make_bundle()
    edit_config(bundle.path, **changes)
    with pytest.raises(UserError, match=message) as refusal:
        open_bundle(bundle.path)
    assert "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_bundle_without_the_end_effectors_pose_is_written_as_before_there_was_one(make_bundle):
    written = json.loads((make_bundle().path / "config.json").read_text())["proprioception"]
    assert sorted(written) == ["gripper", "joints", "limit", "mean", "std"]
    changes = vars(posed_config(layers=((2, 2, 64),) * 3))
    posed = make_bundle(**{key: changes[key] for key in ("architecture", "proprioception")})
    assert open_bundle(posed.path).config.proprioception.names[5:8] == ["ee_rz", "joint1", "joint2"]


def test_a_truncated_weights_file(make_bundle):
    bundle = make_bundle()
    weights = bundle.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    seal(bundle.path)
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        load_policy(bundle.path)


def test_checksums_may_not_name_files_elsewhere(make_bundle):
    bundle = make_bundle()
    with (bundle.path / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  ../secret\n")
    with pytest.raises(UserError, match="not a checksum of a file in this directory"):
        open_bundle(bundle.path)


def test_neither_a_directory_nor_a_shipped_bundle(tmp_path):
    with pytest.raises(UserError, match="no such bundle directory"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a policy bundle"):
        open_bundle(tmp_path / "empty")


def test_replacing_a_bundle_leaves_nothing_behind(make_bundle):
    make_bundle(seed=0)
    second = make_bundle(seed=1)
    assert open_bundle(second.path).hash == second.hash
    assert [p.name for p in second.path.parent.iterdir()] == [second.path.name]


def test_provenance_names_the_parent_and_keeps_the_stages(make_bundle):
    parent = make_bundle()
    record = provenance(parent, "pruned", removed=0.9)
    assert record["parent"] == parent.hash
    assert [stage["stage"] for stage in record["stages"]] == ["original", "pruned"]
    assert record["stages"][-1]["removed"] == 0.9
    assert record["versions"]["torch"]


def test_a_bundle_changed_on_disk_does_not_change_a_loaded_policy(make_bundle, observation):
    bundle = make_bundle()
    policy = load_policy(bundle.path)
    before = policy.act(observation).actions
    weights = bundle.path / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\xff" * 20_000)
    assert (policy.act(observation).actions == before).all()
    shutil.rmtree(bundle.path)
    assert (policy.act(observation).actions == before).all()


def test_inspecting_tells_sizes_without_loading_weights(make_bundle):
    plain, small = inspect(make_bundle("a").path), inspect(make_bundle("b", quantized=True).path)
    assert plain["parameters"] == small["parameters"]
    assert plain["parameters"]["total"] == sum(
        plain["parameters"][part] for part in ("vision", "projector", "llm")
    )
    assert plain["bytes"]["llm"] == 4 * plain["parameters"]["llm"]
    assert small["bytes"]["llm"] < plain["bytes"]["llm"]
    assert small["quantization"]["method"] == "bitsandbytes-nf4"
    assert len(plain["layers"]) == 3


def test_loading_needs_no_training_dependency(make_bundle):
    """A robot has neither them nor ROS nor a simulator to load a policy with."""
    path = make_bundle(quantized=True).path
    code = f"""
import sys
from rlrc_ros.vla import load_policy
load_policy({str(path)!r}).warm_up()
heavy = {{"training", "stable_baselines3", "torch_pruning", "mujoco", "gymnasium", "rclpy"}}
sys.exit(f"imported: {{heavy & set(sys.modules)}}" if heavy & set(sys.modules) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
