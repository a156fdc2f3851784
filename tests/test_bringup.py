import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rlrc_ros import bringup
from rlrc_ros.bringup import NodeSpec
from rlrc_ros.errors import UserError
from rlrc_ros.profile import CameraSource, load_profile


def specs(profile="sim", **changes):
    listed = bringup.nodes(replace(load_profile(profile), **changes), output_dir="/bags")
    return {spec.executable: spec for spec in listed}


def test_the_simulated_arm_is_started_for_a_simulated_robot_only():
    others = {"command_guard_node", "recorder_node", "policy_node"}
    assert set(specs()) == {"sim_arm_node", *others}
    assert set(specs(simulated=False)) == others


def test_every_limit_of_the_profile_reaches_the_guard():
    limits, parameters = load_profile("sim").guard, specs()["command_guard_node"].parameters
    for name, value in vars(limits).items():
        assert parameters[name] == (list(value) if isinstance(value, tuple) else value)
    assert parameters["base_frame"] == "base" and parameters["dry_run"] is False


def test_all_agree_on_frame_and_topics():
    listed = specs(base_frame="world", ee_pose="pose", ee_command="twist", gripper_command="grip")
    for name in ("sim_arm_node", "command_guard_node"):
        remappings = listed[name].remappings
        assert remappings["ee_pose"] == "pose" and remappings["ee_command"] == "twist"
        assert remappings["gripper_command"] == "grip"
    for name in ("sim_arm_node", "command_guard_node", "policy_node"):
        assert listed[name].parameters["base_frame"] == "world"


def test_a_controller_of_poses_the_grippers_unit_and_the_arms_pose_reach_the_nodes():
    guard = specs("fr3")["command_guard_node"].parameters
    assert guard["output"] == "pose" and guard["gripper_command_open"] == 1.0
    assert guard["cone_axis"] == [0.0, 0.0, -1.0] and guard["max_tilt"] == 0.6
    listed = specs("so101")
    assert listed["ee_pose_node"].parameters == {
        "base_frame": "world",
        "ee_frame": "gripper",
        "source": "joint_states",
    }
    assert listed["ee_pose_node"].remappings["ee_pose"] == "/ee_pose"
    assert listed["command_guard_node"].parameters["gripper_command_closed"] == -0.17


def test_a_gripper_behind_an_action_is_a_parameter_since_actions_cannot_be_remapped():
    assert "gripper_action" not in specs("ur5e")["command_guard_node"].parameters
    action = {"gripper_command": "/gripper/gripper_cmd", "gripper_command_type": "action"}
    guard = specs("ur5e", **action, gripper_max_effort=20.0)["command_guard_node"].parameters
    assert guard["gripper_action"] == "/gripper/gripper_cmd"
    assert guard["gripper_max_effort"] == 20.0 and guard["gripper_command_closed"] == 0.8


def test_device_and_simulated_time_are_the_callers():
    listed = bringup.nodes(load_profile("sim"), output_dir="x", device="cuda", use_sim_time=True)
    assert all(spec.parameters["use_sim_time"] is True for spec in listed)
    assert listed[-1].parameters["device"] == "cuda"
    assert all("use_sim_time" not in spec.parameters for spec in specs().values())


def test_every_node_takes_the_enclave_of_its_name():
    listed = bringup.nodes(load_profile("xarm7"), output_dir="x", enclave="/rlrc")
    enclaves = {spec.executable: spec.ros_arguments()[:2] for spec in listed}
    assert enclaves == {
        f"{name}_node": ["--enclave", f"/rlrc/{name}"]
        for name in ("ee_pose", "command_guard", "recorder", "policy")
    }
    assert all("--enclave" not in spec.ros_arguments() for spec in specs().values())
    for name in ("rlrc", "/", "/a//b", "/a b", "/a/"):
        with pytest.raises(UserError, match="is no absolute name such as /rlrc"):
            bringup.nodes(load_profile("sim"), output_dir="x", enclave=name)


def test_cameras_and_policies_reach_the_policy_node():
    cameras = {
        "front": CameraSource(topic="a/image"),
        "wrist": CameraSource(topic="b/image", compressed=True, max_age=0.5),
    }
    parameters = specs(cameras=cameras, policies={"A": "one", "B": "/two"})[
        "policy_node"
    ].parameters
    assert parameters["cameras"] == ["front=a/image,raw,0.2", "wrist=b/image,compressed,0.5"]
    assert parameters["policies"] == ["A=one", "B=/two"] and parameters["autostart"] is True


def test_given_policies_take_the_place_of_the_profiles():
    profile = load_profile("sim")
    listed = bringup.nodes(
        profile, output_dir="/bags", policies={"X": "x"}, record_topics=["/a"], dry_run=True
    )
    by_name = {spec.executable: spec.parameters for spec in listed}
    assert by_name["policy_node"]["policies"] == ["X=x"]
    robot = json.loads(by_name["recorder_node"].pop("profile"))
    assert robot["name"] == "sim" and not robot["policies"], "a bag must not say who is who"
    assert by_name["recorder_node"] == {"output_dir": "/bags", "topics": ["/a"]}
    assert by_name["command_guard_node"]["dry_run"] is True


def test_parameters_come_back_from_the_command_line_with_their_types():
    parameters = {
        "a": 1.0, "b": 1, "c": True, "d": "1.0", "e": "yes: no, 'maybe' \"so\"", "f": [0.25, -1e-7],
        "g": ["true", "x=y"], "h": "",
    }  # fmt: skip
    words = NodeSpec("node", parameters, {"in": "out"}).ros_arguments()
    assert words[-2:] == ["-r", "in:=out"] and words[:-2:2] == ["-p"] * len(parameters)
    for word, (name, value) in zip(words[1:-2:2], parameters.items(), strict=True):
        key, _, text = word.partition(":=")
        back = yaml.safe_load(text)
        assert key == name
        if name != "f":  # PyYAML takes 1e-07 for text, where rcl does not
            assert back == value and type(back) is type(value)


def test_an_executable_that_is_not_installed_is_named():
    with pytest.raises(UserError, match=r"absent_node is neither in .* nor in ") as error:
        NodeSpec("absent_node").command()
    assert "\n" not in str(error.value)
    if Path(sys.executable).with_name("policy_node").is_file():
        assert NodeSpec("policy_node").command()[0].endswith("policy_node")


def test_the_transport_profile_gives_shared_memory_for_an_image_and_no_tcp():
    (file,) = (v for k, v in bringup.TRANSPORT_ENVIRONMENT.items() if k.endswith("_PROFILES_FILE"))
    root = ElementTree.parse(file).getroot()
    space = {"dds": root.tag.partition("}")[0].strip("{")}
    kinds = {e.text for e in root.iterfind(".//dds:transport_descriptor/dds:type", space)}
    assert kinds == {"SHM", "UDPv4"}
    (segment,) = root.iterfind(".//dds:segment_size", space)
    assert int(segment.text) >= 2 * 3 * 1280 * 720
