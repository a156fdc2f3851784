"""A bag of a live episode gives back what the live node saw, to the last bit."""

import contextlib
import time
from dataclasses import replace

import numpy as np
import pytest
import rclpy
from geometry_msgs.msg import PoseStamped, TransformStamped
from rclpy.action.client import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.serialization import deserialize_message
from rlrc.action import RunEpisode
from rlrc.srv import LabelEpisode
from sensor_msgs.msg import Image, JointState
from tf2_msgs.msg import TFMessage

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.nodes.common import LATCHED_QOS, SENSOR_QOS
from rlrc_ros.nodes.sensors import listen, listen_as_asked
from rlrc_ros.profile import load_profile
from rlrc_ros.rollouts.alignment import AlignedEpisode, Contract
from rlrc_ros.rollouts.bag import open_bag, read_messages
from rlrc_ros.vla import load_policy
from tests.ros.conftest import DISCOVERY_TIME, a_tester, starting

INSTRUCTION = "put the red cube on the blue plate"
CAMERA, JOINTS, POSE = "/camera/front/image_raw", "/joint_states", "/ee_pose"


@pytest.fixture(scope="module")
def contract(posed_bundle):
    """Of a policy that takes all that there is, the end effector's pose by way of tf."""
    profile = replace(load_profile("sim"), ee_frame="tool", ee_pose_source="tf")
    return Contract(posed_bundle.config, profile)


def broadcast(ros, topic):
    """Send the poses of a topic on as transforms, as a driver's broadcaster and the URDF would."""
    static = ros.node.create_publisher(TFMessage, "/tf_static", LATCHED_QOS)
    fixed = TransformStamped(child_frame_id="tool")
    fixed.header.frame_id, fixed.transform.translation.z = "hand", 0.03
    static.publish(TFMessage(transforms=[fixed]))
    moving = ros.node.create_publisher(TFMessage, "/tf", 100)

    def send(pose):
        hand = TransformStamped(header=pose.header, child_frame_id="hand")
        place = pose.pose.position
        hand.transform.translation.x, hand.transform.translation.y = place.x, place.y
        hand.transform.translation.z, hand.transform.rotation = place.z, pose.pose.orientation
        moving.publish(TFMessage(transforms=[hand]))

    ros.node.create_subscription(PoseStamped, topic, send, SENSOR_QOS)


@pytest.fixture(scope="module")
def bag(ros_environment, posed_bundle, contract, tmp_path_factory):
    """The bag of an episode that real nodes have run and recorded."""
    directory = tmp_path_factory.mktemp("live")
    policies = {"A": str(posed_bundle.path)}
    specs = bringup.nodes(contract.profile, output_dir=str(directory / "bags"), policies=policies)
    for spec in specs:  # a busy machine may be late; what is late here is recorded as late
        if spec.executable == "policy_node":
            ages = dict.fromkeys(("joint_states_max_age", "ee_pose_max_age"), 0.5)
            spec.parameters |= {"cameras": [f"front={CAMERA},raw,0.5"], **ages}
        if spec.executable == "sim_arm_node":
            spec.remappings["ee_pose"] = "drivers_pose"
    with starting(ros_environment, directory) as start, a_tester() as ros:
        broadcast(ros, "drivers_pose")
        for spec in specs:
            start(spec.command())
        action = ActionClient(ros.node, RunEpisode, "policy/run_episode")
        assert ros.until(action.server_is_ready, 60.0)

        def begin():
            goal = RunEpisode.Goal(instruction=INSTRUCTION, max_duration=3.0, record=True)
            future = action.send_goal_async(goal)
            assert ros.until(future.done)
            return future.result() if future.result().accepted else None

        handle = ros.until(begin, 60.0)
        result = handle.get_result_async()
        assert ros.until(result.done, 60.0)
        uri = result.result().result.bag_uri
        assert uri, result.result().result.message
        assert ros.call(LabelEpisode, "recorder/label", uri=uri, outcome="success").success
        action.destroy()
    (found,) = (directory / "bags").iterdir()
    return found


def test_the_policy_answers_the_exported_observations_as_it_did_live(bag, contract, posed_bundle):
    aligned = AlignedEpisode(bag, contract)
    steps = list(aligned.steps())
    policy = load_policy(posed_bundle.path)
    commands = [m for _, m, _ in read_messages(bag, ["/policy_command"])][:-1]
    sources = ["front", "joint_states", "ee_pose"]
    assert all(list(m.observed_sources) == sources for m in commands)
    assert len(steps) == len(commands) - aligned.lost.total() and len(steps) >= 5
    if aligned.lost:
        pytest.skip("the recorder's own subscription missed an image that the policy saw")
    for step, command in zip(steps, commands, strict=True):
        acted = policy.act(step.observation).actions[0]
        np.testing.assert_allclose(step.action, acted, rtol=1e-12, atol=1e-15)
        assert to_nanoseconds(command.observation_stamp) == min(step.stamps.values())


def arrived(executor, buffer, config, stamps):
    """The buffer's snapshot once it is made of the messages with these stamps."""
    end = time.monotonic() + DISCOVERY_TIME
    while time.monotonic() < end:
        executor.spin_once(timeout_sec=0.02)
        with contextlib.suppress(UserError):
            live = buffer.snapshot(config, max(stamps.values()))
            if live.stamps == stamps:
                return live
    return pytest.fail("the replayed messages have not come")


def test_a_bag_replayed_through_the_live_nodes_subscriptions_gives_the_same_bits(
    ros_environment, bag, contract
):
    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=rclpy.SignalHandlerOptions.NO)
    cameras = rclpy.Parameter("cameras", value=[f"front={CAMERA},raw,3.0"])
    limits = [rclpy.Parameter(f"{name}_max_age", value=2.0) for name in ("joint_states", "ee_pose")]
    node = rclpy.create_node(
        "replayed", context=context, parameter_overrides=[cameras, *limits],
        automatically_declare_parameters_from_overrides=False,
    )  # fmt: skip
    buffer = listen(node, contract.profile.base_frame)
    listen_as_asked(node, buffer, contract.config)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    kinds = {CAMERA: Image, JOINTS: JointState, POSE: PoseStamped}
    with open_bag(bag) as reader:
        recorded = [
            (c.topic, deserialize_message(bytes(data), kinds[c.topic]))
            for c, _, data in reader.messages()
            if c.topic in kinds
        ]
    by_stamp = {(topic, to_nanoseconds(m.header.stamp)): m for topic, m in recorded}
    try:
        with a_tester() as ros:
            publishers = {
                topic: ros.publisher(kind, topic, SENSOR_QOS) for topic, kind in kinds.items()
            }
            for step in AlignedEpisode(bag, contract).steps():
                for source, topic in contract.topics().items():
                    topic = "/" + topic.lstrip("/")
                    publishers[topic].publish(by_stamp[topic, step.stamps[source]])
                live = arrived(executor, buffer, contract.config, step.stamps)
                seen = live.decode(contract.config, contract.gripper, INSTRUCTION)
                assert seen.instruction == step.observation.instruction
                image = step.observation.images["front"]
                np.testing.assert_array_equal(seen.images["front"], image)
                assert seen.proprioception.tobytes() == step.observation.proprioception.tobytes()
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()
