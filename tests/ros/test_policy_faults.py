"""Faults around the policy node alone: the test plays its camera, its joints and its guard."""

import math
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.srv import SetParameters
from rlrc.msg import GuardStatus
from rlrc.srv import LabelEpisode
from rosgraph_msgs.msg import Clock
from std_msgs.msg import String
from std_srvs.srv import Trigger

from rlrc_ros.messages.stamps import to_nanoseconds, to_stamp
from rlrc_ros.nodes.attendance import attending
from rlrc_ros.nodes.common import SENSOR_QOS
from rlrc_ros.profile import CameraSource, load_profile
from rlrc_ros.rollouts.alignment import AlignedEpisode, Contract
from rlrc_ros.rollouts.verify import verify
from tests.ros.policy_robot import CLIENT, JOINTS, broken


@pytest.fixture
def start_client(robot, start):
    """start_client(episode's id) → Process that runs an episode and prints how it ended."""
    node = robot.ros.node
    label = node.create_service(LabelEpisode, "recorder/label", lambda _, response: response)

    def start_client(episode_id):
        client = start(
            [sys.executable, "-c", CLIENT, episode_id, "--ros-args", "-r", "__ns:=/shared"]
        )
        robot.acts(episode_id, 13)
        return client

    yield start_client
    node.destroy_service(label)


def test_a_guard_that_dies_ends_the_episode_and_without_one_there_is_none(robot):
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    robot.guarding = False
    _, result = robot.result(handle)
    assert result.termination_reason == "guard_stop"
    assert result.message.startswith("nothing has come from the command guard for ")
    assert robot.stands(episode_id)
    said = broken(robot, *robot.run())
    assert said == "policy_error: no command guard is heard; start command_guard_node"
    robot.guarding = True
    assert robot.run(seconds=0.5)[2].termination_reason == "timeout"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (GuardStatus(state="waiting", accepted=0), "the command guard has been restarted"),
        (GuardStatus(state="active", episode_id="other", accepted=9), "'other' has the arm"),
    ],
)
def test_a_guard_that_follows_others_ends_the_episode(robot, status, words):
    episode_id, handle = robot.send()
    robot.acts(episode_id, 13)
    robot.guard.publish(status)
    _, result = robot.result(handle)
    assert (result.termination_reason, result.message) == ("guard_stop", words)
    assert robot.stands(episode_id)


GONE = "client_lost the process that ran it is gone"
SILENT = "guard_stop nothing has come from the command guard for 1.0 s"


@pytest.mark.parametrize(
    ("number", "reasons"),
    [
        (signal.SIGKILL, [GONE]),
        # Seen once in some dozens of runs: the guard's word failed to come for 1 s too. Likely, not
        # proved: one that is frozen with a lock of DDS's shared memory holds up the others.
        (signal.SIGSTOP, [GONE, SILENT]),
        (signal.SIGINT, []),
    ],
)
def test_an_episode_ends_with_the_process_that_runs_it(robot, start_client, number, reasons):
    episode_id = f"attended by {number.name}"
    client = start_client(episode_id)
    client.send(number)
    assert robot.ros.until(lambda: robot.states[-1][1].state == "idle", 30.0), client.output
    assert robot.stands(episode_id)
    said = robot.ros.collect(DiagnosticArray, "/diagnostics")
    assert robot.ros.until(lambda: said)
    ended = [f"ready; {episode_id}: {reason}" for reason in reasons] or ["ready"]
    messages = [status.message for _, message in said for status in message.status]
    assert robot.ros.until(lambda: said[-1][1].status[0].message in ended, 5.0), messages
    client.send(signal.SIGKILL)


def test_a_process_that_was_frozen_for_long_still_gets_its_episodes_result(robot, start_client):
    """After 5 s it is out of the graph, and what it is answered does not reach it."""
    client = start_client("frozen for long")
    client.send(signal.SIGSTOP)
    assert robot.ros.until(lambda: robot.states[-1][1].state == "idle", 30.0)
    robot.ros.spin(15.0)  # left to itself, rclpy keeps a result for 10 s
    client.send(signal.SIGCONT)
    assert robot.ros.until(lambda: client.popen.poll() is not None, 30.0), client.output
    assert client.output.splitlines()[-1] in ("client_lost", "guard_stop")


def test_only_an_episodes_own_client_is_missed_and_only_while_it_lasts(robot):
    node = robot.ros.node
    mine, others = (attending(node, "policy") for _ in range(2))
    mine.publish(String(data="all of them"))
    for client in (others, mine):
        episode_id, handle = robot.send(attended_on=client.topic_name)
        robot.acts(episode_id)
        assert robot.ros.call(Trigger, "policy/finish_episode").success
        assert robot.result(handle)[1].termination_reason == "finished"
    episode_id, handle = robot.send(attended_on=mine.topic_name)
    robot.acts(episode_id)
    node.destroy_publisher(others)
    robot.ros.spin(1.5)
    robot.acts(episode_id, len(robot.of(episode_id)) + 5)
    node.destroy_publisher(mine)
    _, result = robot.result(handle)
    assert result.termination_reason == "client_lost" and robot.stands(episode_id)


def test_nothing_moves_for_a_client_that_has_left_before_its_episode_begins(robot):
    episode_id, status, result = robot.run(attended_on="/shared/policy/attended/nobody")
    said = broken(robot, episode_id, status, result)
    assert said == "client_lost: nothing has come on /shared/policy/attended/nobody within 5 s"
    said = broken(robot, *robot.run(attended_on="a b"))
    assert said.startswith("policy_error: attended_on: 'a b' is no topic: ")


def test_a_camera_that_changes_its_resolution_ends_the_episode(robot):
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    robot.size = (48, 64)
    _, result = robot.result(handle)
    assert result.termination_reason == "policy_error"
    assert result.message == "observation: camera 'front' has changed from 64×64 to 64×48"
    assert robot.stands(episode_id)
    said = robot.ros.collect(DiagnosticArray, "/diagnostics")
    assert robot.ros.until(lambda: said)
    problem = f"ready; {episode_id}: policy_error {result.message}"
    assert robot.ros.until(lambda: problem in [s.message for _, m in said for s in m.status])


def test_a_camera_that_repeats_an_old_stamp_ends_the_episode(robot):
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    robot.frozen_at = robot.stamp()
    _, result = robot.result(handle)
    assert result.termination_reason == "observation_lost" and result.skipped_steps > 0
    assert result.message.startswith("/shared/image ('front') is ")
    assert robot.stands(episode_id)


def test_joints_in_another_order_are_the_same_and_one_that_turns_nan_ends_the_episode(robot):
    robot.names, robot.positions = JOINTS[::-1], robot.positions[::-1]
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    robot.positions = np.full(len(JOINTS), np.nan)
    _, result = robot.result(handle)
    assert result.termination_reason == "policy_error"
    assert result.message.startswith("observation: joint state is not finite: joint1 nan")
    assert robot.stands(episode_id)


def test_a_policy_that_takes_the_end_effectors_pose_acts_on_a_good_one_alone(robot, posed_bundle):
    node, pose = robot.ros.node, PoseStamped()
    publisher = node.create_publisher(PoseStamped, "ee_pose", SENSOR_QOS)

    def feel():
        pose.header.stamp = robot.stamp()
        publisher.publish(pose)

    assert robot.load("posed", str(posed_bundle.path)).success
    timer = node.create_timer(1 / 50, feel)
    pose.pose.orientation.w = 1.0
    for frame, x, words in [
        (
            "base",
            0.3,
            "/shared/ee_pose ('ee_pose'): it is in frame 'base', base_frame is 'base_link'",
        ),
        ("base_link", math.nan, "/shared/ee_pose ('ee_pose'): it is not finite, or"),
        (None, 0.3, "/shared/ee_pose ('ee_pose') is "),
    ]:
        pose.header.frame_id, pose.pose.position.x = "base_link", 0.3
        episode_id, handle = robot.send(label="posed")
        robot.acts(episode_id)
        pose.header.frame_id, pose.pose.position.x = frame or "base_link", x
        if frame is None:
            timer.cancel()
        _, result = robot.result(handle)
        assert result.termination_reason == "observation_lost" and result.skipped_steps > 0
        assert result.message.startswith(words) and robot.stands(episode_id)
    node.destroy_timer(timer), node.destroy_publisher(publisher)


def test_a_flood_of_goals_disturbs_neither_the_episode_nor_the_node(robot):
    episode_id, handle = robot.send(seconds=8.0)
    robot.acts(episode_id)
    futures = []
    for _ in range(50):
        futures += [robot.ask() for _ in range(20)]
        robot.ros.spin(0.1)  # sensors and guard are this process's too
    # DDS keeps ten requests of a service: the others are lost on the way.
    assert robot.ros.until(lambda: any(future.done() for future in futures))
    _, result = robot.result(handle)
    assert result.termination_reason == "timeout" and result.steps > 10
    assert not any(future.done() and future.result().accepted for future in futures)
    assert robot.run(seconds=0.5)[2].termination_reason == "timeout"


def test_a_bundle_that_changes_on_disk_does_not_change_the_policy_that_runs(
    robot, bundles, tmp_path
):
    bundle = tmp_path / "changing"
    shutil.copytree(bundles["original"].path, bundle)
    assert robot.load("changing", str(bundle)).success
    episode_id, handle = robot.send(label="changing")
    robot.acts(episode_id)
    for file in bundles["compressed"].path.iterdir():
        shutil.copy(file, bundle)  # in place, as rsync --inplace does
    robot.acts(episode_id, len(robot.of(episode_id)) + 5)
    assert robot.states[-1][1].bundle_hash == bundles["original"].hash
    assert robot.ros.call(Trigger, "policy/finish_episode").success
    assert robot.result(handle)[1].termination_reason == "finished"
    assert robot.policies()["changing"].bundle_hash == bundles["original"].hash
    reloaded = robot.load("changing", str(bundle))
    assert reloaded.success and reloaded.bundle_hash == bundles["compressed"].hash


def test_parameters_cannot_be_set_to_nonsense_while_it_runs(robot):
    parameters = [
        rclpy.Parameter("device", value="toaster").to_parameter_msg(),
        rclpy.Parameter("gripper_open", value=math.nan).to_parameter_msg(),
        rclpy.Parameter("max_skew", value="wide").to_parameter_msg(),
    ]
    response = robot.ros.call(SetParameters, "policy/set_parameters", parameters=parameters)
    assert len(response.results) == 3
    assert not any(result.successful for result in response.results)
    assert robot.run(seconds=0.5)[2].termination_reason == "timeout"


class SimulatedClock:
    """/clock of the test's own, which can stand still and jump."""

    def __init__(self, ros):
        self.now, self.runs = 1000.0, True
        self._publisher = ros.node.create_publisher(Clock, "/clock", 10)
        self._last = time.monotonic()
        ros.node.create_timer(0.01, self._tick)

    def _tick(self):
        now = time.monotonic()
        self.now += (now - self._last) * self.runs
        self._last = now
        self._publisher.publish(Clock(clock=to_stamp(self.now)))


def simulated_seconds(bag, config):
    """How far the stamps of what is exported of a bag in simulated time lie apart."""
    report, profile = verify(bag), load_profile("sim")
    assert report.ok and "/clock" in [topic.topic for topic in report.topics if topic.messages]
    joints = replace(profile.joint_states, max_age=1.0)
    cameras = {"front": CameraSource(topic="image", max_age=1.0)}
    contract = Contract(config, replace(profile, cameras=cameras, joint_states=joints))
    steps = list(AlignedEpisode(bag, contract).steps())
    stamps = [stamp * 1e-9 for step in steps for stamp in step.stamps.values()]
    assert len(steps) >= 8 and min(stamps) >= 1000.0 and max(stamps) < 2000.0
    return max(stamps) - min(stamps)


def test_simulated_time_that_jumps_is_survived_and_that_stands_still_ends_the_episode(
    own_robot, start, bundles, tmp_path
):
    robot = own_robot(use_sim_time="true", joint_states_max_age=1.0, cameras="['front=image,,1.0']")
    # Listed, for the shared robot's topics are there too.
    topics = "['image','joint_states','policy_command','/clock']"
    recorder = start(
        "recorder_node",
        {"output_dir": tmp_path / "bags", "use_sim_time": "true", "topics": topics},
        remappings={"__ns": robot.ros.node.get_namespace()},
    )
    clock = SimulatedClock(robot.ros)
    robot.stamp = lambda: to_stamp(clock.now)
    robot.ready()
    assert robot.ros.until(lambda: "bags go to" in recorder.output)
    for jump in (100.0, -100.0):
        episode_id, handle = robot.send(record=jump > 0.0)
        robot.acts(episode_id, 5)
        clock.now += jump
        robot.acts(episode_id, len(robot.of(episode_id)) + 5)
        seen = to_nanoseconds(robot.of(episode_id)[-1].observation_stamp) * 1e-9
        assert -1e-6 <= clock.now - seen < 1.0  # stamps are whole nanoseconds
        assert robot.ros.call(Trigger, "policy/finish_episode").success
        _, result = robot.result(handle)
        assert result.termination_reason == "finished"
        if jump > 0.0:
            assert simulated_seconds(Path(result.bag_uri), bundles["original"].config) > jump
    episode_id, handle = robot.send()
    robot.acts(episode_id, 5)
    clock.runs = False
    _, result = robot.result(handle)
    assert result.termination_reason == "observation_lost"
    assert robot.stands(episode_id)
