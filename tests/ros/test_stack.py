"""All the nodes together, as a robot profile lists them."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.action.client import ActionClient
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import command_arrays, twist_array
from rlrc_ros.nodes.common import COMMAND_QOS, SENSOR_QOS
from rlrc_ros.profile import load_profile
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.rollouts.verify import verify
from rlrc_ros.trials.records import read
from rlrc_ros.trials.simulated import SimulatedTrial, run_trial, running_nodes
from tests.ros.conftest import a_tester


@pytest.fixture
def profile():
    """The simulated robot; its sensors may be late, as they are on a machine busy with tests."""
    profile = load_profile("sim")
    cameras = {"front": replace(profile.cameras["front"], max_age=0.5)}
    return replace(
        profile, cameras=cameras, joint_states=replace(profile.joint_states, max_age=0.5)
    )


def test_the_arm_stops_when_the_policy_node_is_killed(start, bundles, profile, tmp_path):
    policies = {"original": str(bundles["original"].path)}
    specs = bringup.nodes(profile, output_dir=str(tmp_path / "bags"), policies=policies)
    processes = {
        spec.executable: start([*spec.command(), "-r", "__ns:=/killed"])
        for spec in specs
        if spec.executable != "recorder_node"
    }
    with a_tester("killed") as ros:
        twists = ros.collect(TwistStamped, "ee_command", COMMAND_QOS)
        poses = ros.collect(PoseStamped, "ee_pose", SENSOR_QOS)
        states = ros.collect(GuardStatus, "command_guard/status")
        action = ActionClient(ros.node, RunEpisode, "policy/run_episode")
        assert ros.until(action.server_is_ready)
        assert ros.until(lambda: poses and states)

        def begin():
            """The node takes no goals before its policies are loaded."""
            goal = RunEpisode.Goal(instruction="put the red cube on the blue plate")
            goal.max_duration, goal.episode_id = 60.0, "killed"
            future = action.send_goal_async(goal)
            return ros.until(future.done) and future.result().accepted

        assert ros.until(begin)
        assert ros.until(lambda: any(twist_array(m.twist).any() for _, m in twists))
        assert states[-1][1].stops_on_silence == 0
        processes["policy_node"].send(signal.SIGKILL)
        processes["policy_node"].wait()

        assert ros.until(lambda: states[-1][1].stops_on_silence == 1, 5.0)
        assert states[-1][1].state in ("holding", "waiting")
        assert ros.until(lambda: not twist_array(twists[-1][1].twist).any(), 5.0)
        ros.spin(0.5)  # the arm comes to rest
        twists.clear(), poses.clear()
        ros.spin(1.0)
        assert not any(twist_array(m.twist).any() for _, m in twists)
        points = [m.pose.position for _, m in poses]
        assert max(p.x for p in points) - min(p.x for p in points) < 1e-3
        assert max(p.z for p in points) - min(p.z for p in points) < 1e-3


def test_a_trial_leaves_whole_labelled_bags_of_every_episode(
    ros_environment, bundles, profile, tmp_path
):
    arms = {label: str(bundle.path) for label, bundle in bundles.items()}
    trial = SimulatedTrial(arms=arms, pairs=1, first_seed=7, max_duration=1.5)
    told = []
    memory = run_trial(trial, profile, tmp_path, told.append)
    assert set(memory) == set(arms) and memory["original"] > memory["compressed"] > 0
    records = read(tmp_path / "episodes.jsonl")
    assert records == told and {record.arm for record in records} == set(arms)
    hashes = set()
    for record in records:
        assert (record.termination_reason, record.outcome) == ("timeout", "failure")
        assert record.steps >= 3 and record.guard["accepted"] >= 3
        bag = tmp_path / record.bag_uri
        report = verify(bag)
        assert report.ok and not report.losses, (report.problems, report.losses)
        episode = report.episode
        assert (episode.instruction, episode.outcome) == (record.instruction, "failure")
        assert episode.termination_reason == "timeout"
        assert episode.policy_label in ("A", "B"), "the arm's name would unblind the trial"
        hashes.add(episode.bundle_hash)
        rates = {topic.topic: topic.rate for topic in report.topics}
        assert rates["/joint_states"] > 20 and rates["/camera/front/image_raw"] > 10
        commands = [m for _, m, _ in read_messages(bag, ["/policy_command"])]
        assert {m.policy_label for m in commands} == {episode.policy_label}
        assert {m.episode_id for m in commands} == {record.episode_id}
        assert not command_arrays(commands[-1]).twist.any(), "the last command is a stop"
        assert episode.message_counts["/ee_command"] > 10
    assert hashes == {bundle.hash for bundle in bundles.values()}
    for log in (tmp_path / "logs").glob("*.log"):
        assert "Traceback" not in log.read_text(), log


def test_a_trial_of_a_bundle_that_is_not_there_ends_in_one_line(
    ros_environment, bundles, profile, tmp_path
):
    arms = {"original": str(bundles["original"].path), "compressed": str(tmp_path / "absent")}
    trial = SimulatedTrial(arms=arms, pairs=1, first_seed=7)
    with pytest.raises(UserError) as error:
        run_trial(trial, profile, tmp_path, print)
    message = str(error.value)
    assert message.startswith("policy_node has ended (2): ") and "\n" not in message
    assert f"{tmp_path}/absent: no such bundle directory" in message
    assert message.endswith(f"see {tmp_path}/logs/policy_node.log")


def test_nodes_end_and_the_environment_is_as_before_where_one_cannot_start(
    ros_environment, monkeypatch, tmp_path
):
    monkeypatch.setenv("ROS_DOMAIN_ID", "101")
    recorder = bringup.NodeSpec("recorder_node", {"output_dir": str(tmp_path)})
    specs = [recorder, bringup.NodeSpec("absent_node")]
    with pytest.raises(UserError, match="absent_node"), running_nodes(specs, tmp_path / "logs"):
        pytest.fail("started")
    assert bringup.os.environ["ROS_DOMAIN_ID"] == "101"
    command = str(Path(recorder.command()[0]))
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(command.encode() in line and str(tmp_path).encode() in line for line in running)
