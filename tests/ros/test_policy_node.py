"""The policy node alone: the test plays its camera, its joints, its guard and its recorder."""

import math
import re
import shutil
import signal
import time

import cv2
import numpy as np
import pytest
import rclpy
from action_msgs.msg import GoalStatus
from action_msgs.srv import CancelGoal
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from rlrc.msg import GuardStatus
from rlrc.srv import StartRecording, StopRecording
from sensor_msgs.msg import CompressedImage
from std_srvs.srv import Trigger

from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import command_arrays
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.nodes.common import SENSOR_QOS
from rlrc_ros.nodes.sensors import listen
from rlrc_ros.vla import quantization
from rlrc_ros.vla.bundle import provenance, write_bundle
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS, bundle_config, chunked, random_model
from tests.ros.conftest import a_tester
from tests.ros.policy_robot import INSTRUCTION, JOINTS, broken, parameters


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
    said = robot.ros.collect(DiagnosticArray, "/diagnostics")
    assert robot.state() == "unconfigured" and not robot.policies()
    assert not robot.change(Transition.TRANSITION_CONFIGURE)
    assert robot.state() == "unconfigured" and not robot.policies()
    (line,) = [line for line in robot.process.output.splitlines() if "ERROR" in line]
    assert f"{bundle}/config.json is missing; the bundle is incomplete, copy it again" in line

    shutil.copy(bundles["original"].path / "config.json", bundle)
    said.clear()
    assert robot.change(Transition.TRANSITION_CONFIGURE) and robot.state() == "inactive"

    def steps():  # they may come later than the answer, and from others too
        statuses = [status for _, message in said for status in message.status]
        mine = robot.ros.node.get_namespace().strip("/")
        return [status.message for status in statuses if status.name.startswith(mine)][:2]

    assert robot.ros.until(lambda: len(steps()) == 2)
    assert steps() == ["loading original, 1 of 1", f"warming up {bundle}"]
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
    assert node.wait(90.0) == 2
    (line,) = node.output.splitlines()
    assert f"{bundle}/model.safetensors is missing; the bundle is incomplete" in line


def test_equal_gripper_positions_are_refused_in_one_line(start, bundles):
    node = start("policy_node", parameters(bundles, gripper_open="0.0"))
    assert node.wait(90.0) == 2
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
        ("cameras", ["ee_pose=image"], "parameter cameras: 'ee_pose=image' is not"),
        ("cameras", ["front=an image"], "parameter cameras: 'front=an image' is not"),
        ("max_skew", math.nan, "parameter max_skew (s between the parts of an observation) must"),
        ("joint_states_max_age", 0.0, "joint_states_max_age (oldest joint state that will do, s)"),
    ],
)
def test_a_sensor_parameter_that_makes_no_sense_is_refused(ros, name, value, words):
    override = rclpy.Parameter(name, value=value)
    node = rclpy.create_node("policy", context=ros.context, parameter_overrides=[override])
    with pytest.raises(UserError, match=re.escape(words)) as error:
        listen(node, "base")
    node.destroy_node()
    assert "\n" not in str(error.value)


def test_a_policy_that_gives_chunks_looks_once_for_several_steps(robot, tmp_path):
    config = chunked(bundle_config())
    tensors, origin = quantization.stored(random_model(config)), provenance(None, "original")
    write_bundle(tmp_path / "chunks", config, tensors, word_tokenizer(WORDS), origin)
    assert robot.load("chunks", str(tmp_path / "chunks")).success
    episode_id, status, result = robot.run(seconds=3.0, label="chunks")
    assert status == GoalStatus.STATUS_SUCCEEDED, result.message
    assert result.termination_reason == "timeout" and result.steps > 8
    *steps, stop = robot.of(episode_id)
    assert [m.step for m in steps] == list(range(result.steps))
    looked = [to_nanoseconds(m.observation_stamp) for m in steps]
    assert looked == sorted(looked) and 2 <= len(set(looked)) <= len(looked) / 2
    assert all(np.isfinite(command_arrays(m).twist).all() for m in steps)
    assert not command_arrays(stop).twist.any()


def test_two_cameras_one_of_them_compressed_are_looked_through_together(own_robot, tmp_path):
    config = chunked(bundle_config(), images=2)
    tensors, origin = quantization.stored(random_model(config)), provenance(None, "two")
    bundle = write_bundle(tmp_path / "two", config, tensors, word_tokenizer(WORDS), origin)
    cameras = "['front=image,raw,0.5', 'wrist=wrist/compressed,compressed,0.5']"
    robot = own_robot(policies=f"[two={bundle.path}]", cameras=cameras, max_skew=1.0).ready()
    _, jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))
    wrist = robot.ros.node.create_publisher(CompressedImage, "wrist/compressed", SENSOR_QOS)

    def look():
        image = CompressedImage(format="jpeg", data=jpeg.tobytes())
        image.header.stamp = robot.stamp()
        wrist.publish(image)

    timer = robot.ros.node.create_timer(1 / 30, look)
    episode_id, handle = robot.send()
    robot.acts(episode_id, 10)
    assert set(robot.of(episode_id)[0].observed_sources) >= {"front", "wrist"}
    timer.cancel()
    _, result = robot.result(handle)
    assert result.termination_reason == "observation_lost"
    assert "/wrist/compressed ('wrist') is" in result.message
    assert robot.stands(episode_id)
