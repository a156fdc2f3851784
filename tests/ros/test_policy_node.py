"""The policy node alone: the test plays its camera, its joints, its guard and its recorder."""

import itertools
import math
import re
import shutil
import signal
import time

import numpy as np
import pytest
import rclpy
from action_msgs.msg import GoalStatus
from action_msgs.srv import CancelGoal
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.action.client import ActionClient
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, PolicyCommand, PolicyStatus
from rlrc.srv import ListPolicies, LoadPolicy, StartRecording, StopRecording
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger

from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import command_arrays
from rlrc_ros.messages.image import rgb_to_image
from rlrc_ros.messages.joint_state import joint_state
from rlrc_ros.messages.stamps import to_nanoseconds, to_stamp
from rlrc_ros.nodes.common import SENSOR_QOS
from rlrc_ros.nodes.sensors import listen
from tests.ros.conftest import a_tester

JOINTS = [*(f"joint{i}" for i in range(1, 8)), "finger_joint"]
INSTRUCTION = "put the red cube on the blue plate"
numbers = itertools.count()


class Robot:
    """What the policy node stands between: sensors that can be broken, and an ear for commands."""

    def __init__(self, ros, process):
        self.ros, self.process = ros, process
        self.repair()
        node = ros.node
        self._images = node.create_publisher(Image, "image", SENSOR_QOS)
        self._joints = node.create_publisher(JointState, "joint_states", SENSOR_QOS)
        self.guard = node.create_publisher(GuardStatus, "command_guard/status", 10)
        node.create_timer(1 / 30, self._look)
        node.create_timer(1 / 50, self._feel)
        node.create_timer(0.1, self._guarded)
        self.commands = ros.collect(PolicyCommand, "policy_command")
        self.states = ros.collect(PolicyStatus, "policy/status")
        self._action = ActionClient(node, RunEpisode, "policy/run_episode")
        self.feedback = []

    def ready(self):
        """Everything has found everything."""
        assert self.ros.until(self._action.server_is_ready, 90.0)
        assert self.ros.until(lambda: self._images.get_subscription_count() > 0)
        assert self.ros.until(lambda: self._joints.get_subscription_count() > 0)
        assert self.ros.until(lambda: self.guard.get_subscription_count() > 0)
        assert self.ros.until(lambda: self.states)
        return self

    def repair(self):
        self.seeing, self.encoding, self.names = True, "rgb8", JOINTS
        self.size, self.guarding, self.holder = (64, 64), True, ""
        self.frozen_at = None
        self.positions = np.linspace(-0.4, 0.4, len(JOINTS))

    def stamp(self):
        return self.ros.node.get_clock().now().to_msg()

    def _look(self):
        if self.seeing:
            picture = np.random.default_rng(0).integers(0, 255, (*self.size, 3), np.uint8)
            image = rgb_to_image(picture, self.frozen_at or self.stamp(), "camera")
            image.encoding = self.encoding
            self._images.publish(image)

    def _guarded(self):
        if self.guarding:
            self.guard.publish(GuardStatus(state="active", episode_id=self.holder, accepted=9))

    def _feel(self):
        positions = self.positions[: len(self.names)]
        self._joints.publish(joint_state(self.names, positions, [], self.stamp()))

    def ask(self, instruction=INSTRUCTION, label="", seconds=20.0, record=False, episode_id=""):
        """Ask for an episode: the goal handle's future."""
        self.feedback.clear()
        goal = RunEpisode.Goal(
            instruction=instruction,
            max_duration=seconds,
            policy_label=label,
            episode_id=episode_id,
            record=record,
        )
        return self._action.send_goal_async(goal, lambda m: self.feedback.append(m.feedback))

    def send(self, **goal):
        """Ask for an episode: its id and its goal handle."""
        episode_id = f"episode{next(numbers)}"
        future = self.ask(episode_id=episode_id, **goal)
        assert self.ros.until(future.done)
        return episode_id, future.result()

    def result(self, handle, future=None):
        """How the episode ended: status and result."""
        future = future or handle.get_result_async()
        assert self.ros.until(future.done, 40.0), "the episode does not end"
        return future.result().status, future.result().result

    def run(self, **goal):
        episode_id, handle = self.send(**goal)
        assert handle.accepted
        status, result = self.result(handle)
        self.ros.spin(0.1)
        return episode_id, status, result

    def of(self, episode_id):
        """The commands of an episode."""
        return [message for _, message in self.commands if message.episode_id == episode_id]

    def acts(self, episode_id, steps=3):
        assert self.ros.until(lambda: len(self.of(episode_id)) >= steps), "no commands come"

    def stands(self, episode_id):
        """Its last command is a stop, and nothing comes after it."""
        self.ros.spin(0.3)
        commands = self.of(episode_id)
        assert commands and not command_arrays(commands[-1]).twist.any()
        self.ros.spin(0.3)
        return len(self.of(episode_id)) == len(commands)

    def load(self, label, policy=""):
        return self.ros.call(LoadPolicy, "policy/load_policy", label=label, policy=policy)

    def policies(self):
        listed = self.ros.call(ListPolicies, "policy/list_policies").policies
        return {info.label: info for info in listed}

    def change(self, transition):
        request = Transition(id=transition)
        return self.ros.call(ChangeState, "policy/change_state", transition=request).success

    def state(self):
        return self.ros.call(GetState, "policy/get_state").current_state.label


def parameters(bundles, **changes):
    given = [f"{label}={bundle.path}" for label, bundle in bundles.items()]
    return {
        "policies": str(given),
        "cameras": "[front=image]",
        "joint_states_max_age": 0.5,
        "autostart": "true",
        **changes,
    }


@pytest.fixture(scope="module")
def shared_robot(start_shared, bundles):
    process = start_shared("policy_node", parameters(bundles), remappings={"__ns": "/shared"})
    with a_tester("shared") as ros:
        yield Robot(ros, process).ready()


@pytest.fixture
def robot(shared_robot, bundles):
    """The robot that the tests of this module share, in order and with 'original' active."""
    shared_robot.repair()
    assert shared_robot.ros.until(lambda: shared_robot.states[-1][1].state == "idle")
    for label in ("compressed", "original"):
        assert shared_robot.load(label).success
    shared_robot.commands.clear()
    return shared_robot


@pytest.fixture
def own_robot(start, bundles):
    """own_robot(parameters …) → Robot with a policy node of the test's own."""
    with a_tester(name := f"own{next(numbers)}") as ros:

        def make(**changes):
            process = start(
                "policy_node", parameters(bundles, **changes), remappings={"__ns": f"/{name}"}
            )
            return Robot(ros, process)

        yield make


def test_the_policies_are_listed_as_loaded(robot, bundles):
    listed = robot.policies()
    assert set(listed) == {"original", "compressed"}
    for label, bundle in bundles.items():
        assert listed[label].bundle_hash == bundle.hash and listed[label].loaded
        assert listed[label].control_rate == bundle.config.control_rate
    assert listed["original"].active and not listed["compressed"].active
    assert listed["original"].parameters > listed["compressed"].parameters > 0
    assert listed["original"].weight_bytes > listed["compressed"].weight_bytes > 0
    for info in listed.values():
        assert 0.0 < info.inference_ms < 1e3 * info.load_seconds


def test_an_episode_runs_until_its_time_is_up(robot):
    episode_id, status, result = robot.run(seconds=2.0)
    assert status == GoalStatus.STATUS_SUCCEEDED, result.message
    assert (result.episode_id, result.termination_reason) == (episode_id, "timeout")
    assert (result.outcome, result.bag_uri) == ("unlabelled", "")
    assert 5 <= result.steps <= 21
    assert 0.0 < result.latency_ms_p50 <= result.latency_ms_p99
    *steps, stop = robot.of(episode_id)
    assert [m.step for m in steps] == list(range(result.steps))
    for message in steps:
        assert message.period == pytest.approx(0.1)
        twist, gripper = command_arrays(message)
        assert np.isfinite(twist).all() and 0.0 <= gripper <= 1.0
        assert (message.policy_label, message.header.frame_id) == ("original", "base_link")
        age = to_nanoseconds(message.header.stamp) - to_nanoseconds(message.observation_stamp)
        assert 0 <= age < 1e9
    assert any(command_arrays(m).twist.any() for m in steps)
    assert not command_arrays(stop).twist.any() and stop.gripper == steps[-1].gripper
    assert robot.feedback and robot.feedback[-1].step == result.steps
    assert 2.0 < max(f.rate for f in robot.feedback) <= 12.0
    assert 0.0 < robot.feedback[-1].observation_age < 1.0


def test_status_tells_of_the_episode(robot, bundles):
    episode_id, handle = robot.send(label="compressed")
    robot.acts(episode_id)
    assert robot.ros.until(lambda: robot.states[-1][1].step > 2)
    status = robot.states[-1][1]
    assert (status.state, status.episode_id) == ("running", episode_id)
    assert (status.policy_label, status.instruction) == ("compressed", INSTRUCTION)
    assert status.bundle_hash == bundles["compressed"].hash
    assert status.inference_ms > 0.0 and status.total_ms >= status.inference_ms
    assert robot.ros.call(Trigger, "policy/finish_episode").success
    status, result = robot.result(handle)
    assert status == GoalStatus.STATUS_SUCCEEDED and result.termination_reason == "finished"
    assert robot.stands(episode_id)
    late = robot.ros.call(Trigger, "policy/finish_episode")
    assert not late.success and late.message == "no episode is running"


def test_cancelling_stops_the_arm(robot):
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    future = handle.cancel_goal_async()
    assert robot.ros.until(future.done) and future.result().goals_canceling
    status, result = robot.result(handle)
    assert status == GoalStatus.STATUS_CANCELED
    assert result.termination_reason == "operator_stop" and result.steps >= 3
    assert robot.stands(episode_id)


def test_one_episode_at_a_time_and_no_swap_inside_it(robot, bundles):
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    _, second = robot.send()
    assert not second.accepted
    for label, policy in (("compressed", ""), ("third", str(bundles["compressed"].path))):
        refused = robot.load(label, policy)
        assert not refused.success
        assert refused.message == "an episode is running; policies are swapped between episodes"
    before = len(robot.of(episode_id))
    robot.acts(episode_id, before + 3)
    assert robot.ros.call(Trigger, "policy/finish_episode").success
    assert robot.result(handle)[1].termination_reason == "finished"
    assert "third" not in robot.policies() and robot.policies()["original"].active
    assert {m.policy_label for m in robot.of(episode_id)} == {"original"}


def test_every_command_carries_the_label_that_was_swapped_to(robot, bundles):
    for label in ("original", "compressed", "original"):
        episode_id, _, result = robot.run(label=label, seconds=0.6)
        assert result.termination_reason == "timeout", result.message
        assert {m.policy_label for m in robot.of(episode_id)} == {label}
    response = robot.load("compressed")
    assert response.success and response.bundle_hash == bundles["compressed"].hash
    episode_id, _, _ = robot.run(seconds=0.6)
    assert {m.policy_label for m in robot.of(episode_id)} == {"compressed"}


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({"label": "third"}, "no policy is loaded under the label 'third'; loaded: compressed, or"),
        ({"instruction": " "}, "the instruction is empty; say what the robot should do"),
        ({"instruction": "fry the egg"}, "does not know these words of the instruction: fry, egg"),
        ({"seconds": math.nan}, "max_duration is nan s; it must be above 0"),
        ({"seconds": 0.0}, "max_duration is 0 s; it must be above 0"),
        ({"seconds": math.inf}, "max_duration is inf s; it must be above 0 and at most 3600 s"),
        ({"record": True}, "there is no /shared/recorder/start; start recorder_node, or set"),
    ],
)
def test_a_goal_that_makes_no_sense_ends_in_one_line(robot, goal, words):
    episode_id, status, result = robot.run(**goal)
    assert status == GoalStatus.STATUS_ABORTED
    assert result.termination_reason == "policy_error" and words in result.message
    assert "\n" not in result.message
    assert result.steps == 0 and not robot.of(episode_id)
    assert robot.policies()["original"].active


def broken(robot, episode_id, status, result):
    assert status == GoalStatus.STATUS_ABORTED
    assert "\n" not in result.message
    assert result.steps == 0 and not robot.of(episode_id), "commanded from bad input"
    return f"{result.termination_reason}: {result.message}"


def test_a_camera_that_never_comes_is_named(robot):
    robot.seeing = False
    said = broken(robot, *robot.run())
    assert said == "observation_lost: nothing has come on /shared/image ('front')"


def test_an_encoding_that_is_no_picture_is_named(robot):
    robot.encoding = "16UC1"
    said = broken(robot, *robot.run())
    assert said.startswith("policy_error: observation: camera 'front': image encoding '16UC1'")
    assert "accepted: rgb8" in said


def test_a_missing_joint_is_named(robot):
    robot.names = JOINTS[:-1]
    said = broken(robot, *robot.run())
    assert said.startswith("policy_error: observation: joint state lacks finger_joint; it has joi")


def test_a_joint_that_is_not_finite_is_named(robot):
    robot.positions = np.full(len(JOINTS), np.nan)
    said = broken(robot, *robot.run())
    assert said.startswith("policy_error: observation: joint state is not finite: joint1 nan")


def test_a_camera_that_stops_ends_the_episode(robot):
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    robot.seeing = False
    began = time.monotonic()
    status, result = robot.result(handle)
    assert time.monotonic() - began < 5.0
    assert status == GoalStatus.STATUS_ABORTED
    assert result.termination_reason == "observation_lost" and result.skipped_steps > 0
    assert result.message.startswith("/shared/image ('front') is ")
    assert result.message.endswith(" s old, 0.2 s are allowed")
    assert robot.stands(episode_id)
    robot.repair()
    assert robot.run(seconds=0.5)[2].termination_reason == "timeout"


def test_a_stop_of_the_guards_ends_the_episode(robot):
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    robot.guard.publish(GuardStatus(state="stopped", reason="emergency stop"))
    _, result = robot.result(handle)
    assert (result.termination_reason, result.message) == ("guard_stop", "emergency stop")
    assert robot.stands(episode_id)


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


def test_a_flood_of_goals_disturbs_neither_the_episode_nor_the_node(robot):
    episode_id, handle = robot.send(seconds=4.0)
    robot.acts(episode_id)
    futures = [robot.ask() for _ in range(1000)]
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


def test_simulated_time_that_jumps_is_survived_and_that_stands_still_ends_the_episode(own_robot):
    robot = own_robot(use_sim_time="true", joint_states_max_age=1.0, cameras="['front=image,,1.0']")
    clock = SimulatedClock(robot.ros)
    robot.stamp = lambda: to_stamp(clock.now)
    robot.ready()
    for jump in (100.0, -100.0):
        episode_id, handle = robot.send()
        robot.acts(episode_id, 5)
        clock.now += jump
        robot.acts(episode_id, len(robot.of(episode_id)) + 5)
        seen = to_nanoseconds(robot.of(episode_id)[-1].observation_stamp) * 1e-9
        assert 0.0 <= clock.now - seen < 1.0
        assert robot.ros.call(Trigger, "policy/finish_episode").success
        assert robot.result(handle)[1].termination_reason == "finished"
    episode_id, handle = robot.send()
    robot.acts(episode_id, 5)
    clock.runs = False
    _, result = robot.result(handle)
    assert result.termination_reason == "observation_lost"
    assert robot.stands(episode_id)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda bundle: (bundle / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda bundle: (bundle / "tokenizer.json").write_text("{"), "differs from its checksum"),
        (shutil.rmtree, "no such bundle directory"),
    ],
)
def test_a_damaged_bundle_is_refused_and_nothing_changes(robot, bundles, tmp_path, damage, words):
    bundle = tmp_path / "damaged"
    shutil.copytree(bundles["original"].path, bundle)
    damage(bundle)
    response = robot.load("compressed", str(bundle))
    assert not response.success and words in response.message
    assert str(bundle) in response.message and "\n" not in response.message
    listed = robot.policies()
    assert listed["original"].active
    assert listed["compressed"].bundle_hash == bundles["compressed"].hash
    assert robot.run(seconds=0.5)[2].termination_reason == "timeout"


def test_deactivating_ends_the_episode_and_cleaning_up_lets_go_of_the_policies(robot):
    episode_id, handle = robot.send()
    robot.acts(episode_id)
    assert robot.change(Transition.TRANSITION_DEACTIVATE)
    status, result = robot.result(handle)
    assert status == GoalStatus.STATUS_ABORTED and result.termination_reason == "node_deactivated"
    assert robot.stands(episode_id)
    assert not robot.send()[1].accepted, "inactive"
    assert robot.change(Transition.TRANSITION_CLEANUP)
    assert robot.state() == "unconfigured" and not robot.policies()
    assert robot.change(Transition.TRANSITION_CONFIGURE)
    assert not robot.send()[1].accepted, "not active yet"
    assert robot.change(Transition.TRANSITION_ACTIVATE)
    assert set(robot.policies()) == {"original", "compressed"}
    assert robot.run(label="original", seconds=0.5)[2].termination_reason == "timeout"


class Recorder:
    """A recorder that takes its time."""

    def __init__(self, ros, meanwhile):
        self.meanwhile, self.stopped = meanwhile, []
        node = ros.node
        self.services = [
            node.create_service(StartRecording, "recorder/start", self._start),
            node.create_service(StopRecording, "recorder/stop", self._stop),
        ]

    def _start(self, request, response):
        self.request = request
        self.meanwhile()
        response.success, response.uri = True, f"/bags/{request.episode_id}"
        return response

    def _stop(self, request, response):
        self.stopped.append(request.termination_reason)
        response.success = True
        return response


def test_cancelling_before_the_first_step_is_not_forgotten(own_robot, bundles):
    robot = own_robot().ready()
    with a_tester(robot.ros.node.get_namespace().strip("/")) as other:
        cancel = "policy/run_episode/_action/cancel_goal"
        recorder = Recorder(robot.ros, lambda: other.call(CancelGoal, cancel))
        robot.ros.published("policy/status")
        robot.ros.spin(1.0)  # the node finds the recorder
        episode_id, status, result = robot.run(record=True)
    assert status == GoalStatus.STATUS_CANCELED
    assert result.termination_reason == "operator_stop" and result.steps == 0
    assert result.bag_uri == f"/bags/{episode_id}" and recorder.stopped == ["operator_stop"]
    assert recorder.request.policy_label == "original"
    assert recorder.request.bundle_hash == bundles["original"].hash
    assert not robot.of(episode_id)


def test_sigterm_stops_the_arm_closes_the_bag_and_gives_the_result(own_robot):
    robot = own_robot().ready()
    recorder = Recorder(robot.ros, lambda: None)
    robot.ros.spin(1.0)  # the node finds the recorder
    episode_id, handle = robot.send(record=True)
    future = handle.get_result_async()
    robot.acts(episode_id)
    robot.process.send(signal.SIGTERM)
    status, result = robot.result(handle, future)
    assert status == GoalStatus.STATUS_ABORTED and result.termination_reason == "node_deactivated"
    assert recorder.stopped == ["node_deactivated"]
    assert robot.process.wait() == 0
    assert robot.stands(episode_id)


def test_without_autostart_it_waits_to_be_told(own_robot, bundles, tmp_path):
    bundle = tmp_path / "incomplete"
    shutil.copytree(bundles["original"].path, bundle)
    (bundle / "config.json").unlink()
    robot = own_robot(policies=f"[original={bundle}]", autostart="false").ready()
    assert robot.state() == "unconfigured" and not robot.policies()
    assert not robot.change(Transition.TRANSITION_CONFIGURE)
    assert robot.state() == "unconfigured" and not robot.policies()
    (line,) = [line for line in robot.process.output.splitlines() if "ERROR" in line]
    assert f"{bundle}/config.json is missing; the bundle is incomplete, copy it again" in line

    shutil.copy(bundles["original"].path / "config.json", bundle)
    assert robot.change(Transition.TRANSITION_CONFIGURE) and robot.state() == "inactive"
    assert not robot.send()[1].accepted
    assert robot.change(Transition.TRANSITION_ACTIVATE)
    episode_id, handle = robot.send(label="original")
    robot.acts(episode_id)
    assert robot.change(Transition.TRANSITION_ACTIVE_SHUTDOWN)
    assert robot.result(handle)[1].termination_reason == "node_deactivated"
    assert robot.stands(episode_id)
    assert robot.process.stop() == 0


def test_with_autostart_a_bundle_without_a_file_ends_the_node(start, bundles, tmp_path):
    bundle = tmp_path / "incomplete"
    shutil.copytree(bundles["original"].path, bundle)
    (bundle / "model.safetensors").unlink()
    node = start("policy_node", parameters({}, policies=f"[original={bundle}]"))
    assert node.wait(30.0) == 2
    (line,) = node.output.splitlines()
    assert f"{bundle}/model.safetensors is missing; the bundle is incomplete" in line


def test_equal_gripper_positions_are_refused_in_one_line(start, bundles):
    node = start("policy_node", parameters(bundles, gripper_open="0.0"))
    assert node.wait(30.0) == 2
    said = "policy_node: gripper_open and gripper_closed are both 0: they must differ"
    assert node.output.splitlines() == [said]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("cameras", ["front=image,raw,nan"], "'front=image,raw,nan' is not name=topic,raw|compres"),
        ("cameras", ["front=image,raw,-1"], "'front=image,raw,-1' is not"),
        ("cameras", ["front=image,depth"], "parameter cameras: 'front=image,depth' is not"),
        ("cameras", ["front="], "parameter cameras: 'front=' is not name=topic"),
        ("cameras", ["=image"], "parameter cameras: '=image' is not"),
        ("cameras", ["joint_states=image"], "parameter cameras: 'joint_states=image' is not"),
        ("cameras", ["front=an image"], "parameter cameras: 'front=an image' is not"),
        ("max_skew", math.nan, "parameter max_skew (s between the parts of an observation) must"),
        ("joint_states_max_age", 0.0, "joint_states_max_age (oldest joint state that will do, s)"),
    ],
)
def test_a_sensor_parameter_that_makes_no_sense_is_refused(ros, name, value, words):
    override = rclpy.Parameter(name, value=value)
    node = rclpy.create_node("policy", context=ros.context, parameter_overrides=[override])
    with pytest.raises(UserError, match=re.escape(words)) as error:
        listen(node)
    node.destroy_node()
    assert "\n" not in str(error.value)
