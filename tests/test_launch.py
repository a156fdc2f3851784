"""The launch files; they need ROS's own `launch`, which is not on PyPI."""

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

# Not "launch": Python takes the directory of that name for a package.
pytest.importorskip("launch_ros.actions")

from launch import LaunchContext
from launch.launch_description_sources import get_launch_description_from_python_launch_file
from launch.utilities import normalize_to_list_of_substitutions, perform_substitutions
from launch_ros.actions import Node

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.profile import load_profile
from rlrc_ros.trials.plan import Draft, DraftTask, lock
from rlrc_ros.trials.session import TrialSession

logging.setLoggerClass(logging.Logger)  # as in conftest.py

LAUNCH = Path(__file__).parent.parent / "launch"
NODES = ["sim_arm_node", "command_guard_node", "recorder_node", "policy_node"]


def text(context, value):
    return perform_substitutions(context, normalize_to_list_of_substitutions(value))


def launched(file, **arguments):
    """The nodes that a launch file would start: [(executable, parameters, remappings, env)]."""
    context = LaunchContext(argv=[f"{name}:={value}" for name, value in arguments.items()])
    context.launch_configurations.update(arguments)
    waiting = [get_launch_description_from_python_launch_file(str(LAUNCH / file))]
    found = []
    while waiting:
        entity = waiting.pop(0)
        if not isinstance(entity, Node):
            waiting = [*(entity.visit(context) or []), *waiting]
            continue
        assert entity.node_package == "rlrc"
        first, *words = [text(context, word) for word in entity.cmd[1:]]
        assert first == "--ros-args"
        words = [word for word in words if word != "--ros-args"]  # launch_ros adds one more
        settings = {"-p": {}, "-r": {}}
        for flag, word in zip(words[::2], words[1::2], strict=True):
            name, _, value = word.partition(":=")
            settings[flag][name] = json.loads(value) if flag == "-p" else value
        environment = {
            text(context, name): text(context, value) for name, value in entity.additional_env
        }
        found.append((entity.node_executable, settings["-p"], settings["-r"], environment))
    return found


def test_sim_starts_what_the_profile_names_in_the_transport_environment():
    expected = [
        (spec.executable, spec.parameters, spec.remappings, bringup.TRANSPORT_ENVIRONMENT)
        for spec in bringup.nodes(load_profile("sim"), output_dir="rollouts")
    ]
    assert launched("sim.launch.py") == expected
    assert [executable for executable, *_ in expected] == NODES


def test_arguments_reach_the_nodes():
    nodes = {
        executable: parameters
        for executable, parameters, *_ in launched(
            "sim.launch.py",
            policies="1=some dir/a, B=b=c",
            output_dir="2026",
            record_topics="/joint_states, camera/front/image_raw",
            dry_run="true",
        )
    }
    assert nodes["policy_node"]["policies"] == ["1=some dir/a", "B=b=c"]
    assert nodes["recorder_node"]["output_dir"] == "2026"
    assert nodes["recorder_node"]["topics"] == ["/joint_states", "camera/front/image_raw"]
    assert nodes["command_guard_node"]["dry_run"] is True


def test_a_real_robot_gets_no_simulated_arm_and_its_own_topics():
    profile = load_profile("ur5e")
    nodes = {
        name: remapped for name, _, remapped, _ in launched("bringup.launch.py", profile="ur5e")
    }
    assert list(nodes) == NODES[1:]
    assert nodes["command_guard_node"]["ee_command"] == profile.ee_command
    topics = {"joint_states": profile.joint_states.topic, "ee_pose": profile.ee_pose}
    assert nodes["policy_node"] == topics


def test_sim_never_takes_the_profile_of_a_real_robot():
    assert launched("sim.launch.py", profile="ur5e") == launched("sim.launch.py")


def test_record_starts_the_recorder_alone():
    ((executable, parameters, _, environment),) = launched(
        "record.launch.py", profile="fr3", output_dir="demos", record_topics="/a,/b"
    )
    assert executable == "recorder_node" and environment == bringup.TRANSPORT_ENVIRONMENT
    assert (parameters["output_dir"], parameters["topics"]) == ("demos", ["/a", "/b"])


def test_device_and_simulated_time_reach_the_nodes_and_an_arm_without_a_pose_gets_one():
    nodes = {
        executable: parameters
        for executable, parameters, *_ in launched(
            "bringup.launch.py", profile="xarm7", device="cuda:1", use_sim_time="true"
        )
    }
    assert nodes["policy_node"]["device"] == "cuda:1"
    assert nodes["ee_pose_node"]["ee_frame"] == "link_tcp"
    assert all(parameters["use_sim_time"] for parameters in nodes.values())


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.launch.py")), ids=lambda file: file.name)
def test_every_argument_is_described(file):
    description = get_launch_description_from_python_launch_file(str(file))
    declared = description.get_launch_arguments()
    assert declared and all(len(argument.description) > 20 for argument in declared)


def test_a_trials_nodes_get_its_sealed_policies_and_its_directory(make_bundle, tmp_path):
    arms = {name: str(make_bundle(name).path) for name in ("a", "b")}
    task = DraftTask(name="any", rubric="in place", first_seed=1)
    draft = Draft(
        name="test", robot="sim", margin=0.2, max_duration=5.0, arms=arms, tasks=(task,), pairs=2
    )
    TrialSession.create(tmp_path / "trial", lock(draft, tmp_path)).close()
    nodes = {
        name: parameters
        for name, parameters, *_ in launched("trial.launch.py", dir=str(tmp_path / "trial"))
    }
    assert list(nodes) == NODES
    assert nodes["policy_node"]["policies"] == []
    assert nodes["policy_node"]["sealed"] == str(tmp_path / "trial" / "sealed.json")
    assert nodes["recorder_node"]["output_dir"] == str(tmp_path / "trial" / "bags")
    with pytest.raises(UserError, match="there is no such file"):
        launched("trial.launch.py", dir=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"profile": "ur99"}, "ur99: no such file, and not among"),
        ({"profile": "BAD"}, "unknown key 'base_fram'; did you mean 'base_frame'?"),
        ({"policies": "A"}, "policies: 'A' is not LABEL=BUNDLE"),
        ({"policies": "A=x,A=y"}, "policies: there are two called 'A'"),
        ({"dryrun": "true"}, "there is no argument 'dryrun'; did you mean 'dry_run'?"),
        ({"dry_run": "yes"}, '"dry_run" provided value "yes" is not valid'),
        ({"profile": None}, '"profile" was not provided'),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nbase_fram: y\n")
    arguments = {"profile": "sim", **arguments}
    if arguments["profile"] is None:
        del arguments["profile"]
    elif arguments["profile"] == "BAD":
        arguments["profile"] = str(bad)
    with pytest.raises((UserError, RuntimeError)) as raised:
        launched("bringup.launch.py", **arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def in_workspace():
    """Whether a sourced workspace has this package, as `ros2 launch` needs it."""
    if shutil.which("ros2") is None:
        return False
    from ament_index_python.packages import PackageNotFoundError, get_package_prefix

    try:
        return (Path(get_package_prefix("rlrc")) / "lib" / "rlrc" / "policy_node").is_file()
    except PackageNotFoundError:
        return False


@pytest.fixture
def ros2_launch(tmp_path):
    """ros2_launch(words …) → (process, its output's file)."""
    environment = {
        "ROS_DOMAIN_ID": str(random.SystemRandom().randint(1, 101)),
        "ROS_LOG_DIR": str(tmp_path / "log"),
        "PYTHONUNBUFFERED": "1",
    }
    log, processes = tmp_path / "output", []

    def launch(*words):
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ros2", "launch", "rlrc", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                cwd=tmp_path,
                start_new_session=True,
            )
        processes.append(process)
        return process, log

    yield launch
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(not in_workspace(), reason="needs a sourced workspace with this package")
def test_ros2_launch_brings_everything_up_and_down(make_bundle, tmp_path, ros2_launch):
    bundle = make_bundle("a bundle").path
    process, log = ros2_launch("sim.launch.py", f"policies:=A={bundle}", "dry_run:=true")
    deadline = time.monotonic() + 180
    while "ready for episodes" not in log.read_text() and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    assert "ready for episodes" in log.read_text(), log.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    printed = log.read_text()
    assert f"bags go to {tmp_path / 'rollouts'}" in printed
    assert printed.count("process has finished cleanly") == len(NODES), printed


@pytest.mark.skipif(not in_workspace(), reason="needs a sourced workspace with this package")
def test_a_node_that_ends_by_itself_ends_all_of_them_and_fails_the_launch(ros2_launch):
    process, log = ros2_launch("sim.launch.py", "policies:=A=/nowhere")
    assert process.wait(180) == 1
    printed = log.read_text()
    assert "/nowhere: no such bundle directory" in printed
    assert "policy_node-4 has ended, and all nodes are stopped" in printed
    assert printed.count("process has finished cleanly") == len(NODES) - 1, printed
