import re
from pathlib import Path

import pytest
import yaml

from rlrc_ros.errors import UserError
from rlrc_ros.profile import load_profile

CONFIG = Path(__file__).parent.parent / "config" / "robots"


def profile(tmp_path, *path, **changes):
    """The simulated robot's profile with keys at a path changed, or removed where None."""
    data = yaml.safe_load((CONFIG / "sim.yaml").read_text())
    place = data
    for key in path:
        place = place[key]
    for key, value in changes.items():
        if value is None:
            del place[key]
        else:
            place[key] = value
    file = tmp_path / "robot.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.parametrize("file", sorted(CONFIG.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_profile_of_the_package_loads(file):
    loaded = load_profile(file.stem)
    assert loaded == load_profile(file) and loaded.name == file.stem


def test_whole_numbers_will_do_for_floats(tmp_path):
    file = profile(tmp_path, "guard", workspace_min=[0, -1, 0], max_linear_speed=1)
    limits = load_profile(file).guard
    assert limits.workspace_min == (0.0, -1.0, 0.0)
    assert all(type(x) is float for x in (*limits.workspace_min, limits.max_linear_speed))


NAN = float("nan")


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ((), {"base_fram": "base"}, "unknown key 'base_fram'; did you mean 'base_frame'?"),
        (("guard",), {"max_speed": 1.0}, "unknown key 'guard.max_speed'; did you mean"),
        (("cameras", "front"), {"topics": "x"}, "unknown key 'cameras.front.topics'; did you mean"),
        ((), {"ee_pose": None}, "'ee_pose' is missing"),
        (
            (),
            {"ee_pose_max_age": 0.0},
            "ee_pose_max_age is 0.0: it must be s above 0 and at most 2",
        ),
        (("joint_states",), {"gripper_joint": None}, "'joint_states.gripper_joint' is missing"),
        (("guard",), {"max_angular_speed": None}, "'guard.max_angular_speed' is missing"),
        ((), {"cameras": "front"}, "cameras"),
        ((), {"guard": [1.0]}, "expected keys and values at 'guard', found list"),
        (("guard",), {"max_linear_speed": "fast"}, "guard.max_linear_speed"),
        (("guard",), {"max_linear_speed": True}, "guard.max_linear_speed"),
        (("guard",), {"workspace_min": ["a", "b", "c"]}, "guard.workspace_min"),
        (("guard",), {"max_linear_speed": 0.0}, "guard: max_linear_speed is 0.0: it must be"),
        (("guard",), {"max_linear_speed": -0.1}, "guard: max_linear_speed is -0.1"),
        (("guard",), {"max_angular_speed": NAN}, "guard: max_angular_speed is nan"),
        (("guard",), {"max_linear_acceleration": float("inf")}, "guard: max_linear_accelerati"),
        (("guard",), {"max_gripper_rate": -1.0}, "guard: max_gripper_rate is -1.0"),
        (
            ("guard",),
            {"workspace_min": [0.0, 0.0]},
            "guard: workspace_min and workspace_max",
        ),
        (("guard",), {"workspace_max": [NAN, 1.0, 1.0]}, "guard: workspace_min and workspace_max"),
        (("guard",), {"workspace_max": [0.0, 0.0, 0.0]}, "must be less than workspace_max"),
        (("cameras", "front"), {"max_age": NAN}, "cameras.front.max_age is nan: it must be s"),
        (("cameras", "front"), {"topic": ""}, "cameras.front.topic is empty"),
        (("joint_states",), {"max_age": -1.0}, "joint_states.max_age is -1.0"),
        (("joint_states",), {"gripper_open": 0.0}, "gripper_open and gripper_closed must differ"),
        (("joint_states",), {"gripper_open": NAN}, "joint_states.gripper_open is nan"),
        (("cameras", "front"), {"min_rate": 0.0}, "cameras.front.min_rate is 0.0: it must be Hz"),
        ((), {"max_skew": 0.0}, "max_skew is 0.0: it must be s above 0"),
        ((), {"ee_command_type": "joints"}, "ee_command_type"),
        ((), {"ee_pose_source": "tf"}, "ee_frame is empty: ee_pose_source tf needs the tool's"),
        ((), {"ee_pose_source": "camera", "ee_frame": "tool"}, "ee_pose_source"),
        ((), {"gripper_command_type": "servo"}, "gripper_command_type"),
        ((), {"gripper_command_type": "action"}, "the simulated arm takes an array, on a topic"),
        ((), {"gripper_max_effort": -1.0}, "gripper_max_effort is -1.0: give 0 to 1000"),
        ((), {"gripper_max_effort": NAN}, "gripper_max_effort is nan: give 0 to 1000"),
        ((), {"gripper_command_closed": 1.0}, "gripper_command_open and gripper_command_closed"),
        (("guard",), {"max_tilt": 4.0}, "guard: max_tilt is 4.0: it must be an angle in"),
        (("guard",), {"cone_axis": [0.0, 0.0, 0.0]}, "guard: cone_axis is"),
        (("guard",), {"controller_timeout": 0.0}, "guard: controller_timeout is 0.0"),
        ((), {"cameras": {}}, "cameras: name at least one"),
        ((), {"base_frame": " "}, "base_frame is empty"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path, path, changes, words):
    file = profile(tmp_path, *path, **changes)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load_profile(file)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", ":1: not valid YAML"),
        ("a: 1\n  b: 2\n", ":2: not valid YAML"),
        ("", ": expected keys and values, found NoneType"),
        ("- a\n", ": expected keys and values, found list"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_what_is_no_profile_is_named_with_its_line(tmp_path, text, words):
    file = tmp_path / "robot.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load_profile(file)
    message = str(error.value)
    assert message.startswith(str(file)) and "\n" not in message


def test_a_profile_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UserError, match=r"absent: no such file, and not among .*sim"):
        load_profile("absent")
    with pytest.raises(UserError, match="no such file"):
        load_profile("../robots/sim")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    file = tmp_path / "robot.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read") as error:
        load_profile(file)
    assert str(file) in str(error.value)
