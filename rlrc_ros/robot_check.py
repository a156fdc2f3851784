"""Compares a robot profile with the live ROS graph, before anything moves. Publishes nothing.

Looks at topics, types, QoS compatibility, rates, stamps, frames and joint names, and at who else
commands the arm.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.duration import Infinite
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image, JointState

from rlrc_ros.errors import UserError
from rlrc_ros.messages.ee_pose import pose_problem
from rlrc_ros.messages.image import image_to_rgb
from rlrc_ros.messages.joint_state import ordered_positions
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.nodes import ee_pose_source
from rlrc_ros.nodes.common import COMMAND_QOS, SENSOR_QOS
from rlrc_ros.profile import RobotProfile
from rlrc_ros.vla.config import BundleConfig

MIN_POSE_RATE = 20.0
"""Hz; the guard does without a pose for 0.1 s."""
COMMAND_TYPES = {
    "twist": "geometry_msgs/msg/TwistStamped",
    "pose": "geometry_msgs/msg/PoseStamped",
}
GRIPPER_GOAL = "control_msgs/action/GripperCommand_SendGoal"
"""The type of the service that an action of grippers takes its goals by."""


@dataclass(frozen=True)
class Finding:
    """One thing that was compared.

    Attributes:
        part: what of the profile it is about, as its key.
        topic: as it is on the graph.
        problem: what is wrong and what to do; empty where it fits.
        detail: what was seen.
    """

    part: str
    topic: str
    problem: str
    detail: str


class _Seen:
    """What has come of one source."""

    def __init__(self, node: Node) -> None:
        self.count, self.last, self.oldest = 0, None, 0.0
        self._node, self._times = node, (0.0, 0.0)

    def take(self, message: Any) -> None:
        """Count it, and note when it came and how far its stamp is from now."""
        now = time.monotonic()
        self._times = (self._times[0] if self.count else now, now)
        self.count, self.last = self.count + 1, message
        age = self._node.get_clock().now().nanoseconds - to_nanoseconds(message.header.stamp)
        self.oldest = max(self.oldest, abs(age * 1e-9))

    def forget(self) -> None:
        """Count from now on."""
        self.count, self.oldest = 0, 0.0

    @property
    def rate(self) -> float:
        """Hz, between the first message and the last."""
        first, last = self._times
        return (self.count - 1) / (last - first) if last > first else 0.0


class _Listener(_Seen):
    """What has come on one topic."""

    def __init__(self, node: Node, topic: str, kind: type) -> None:
        super().__init__(node)
        self.subscription = node.create_subscription(kind, topic, self.take, SENSOR_QOS)


class _ComputedPose(_Seen):
    """Poses as `ee_pose_node`, which the launch file starts, is going to compute them."""

    def __init__(self, node: Node, profile: RobotProfile) -> None:
        super().__init__(node)
        self.source, self.complaint = profile.ee_pose_source, ""
        frames = profile.base_frame, profile.ee_frame
        topic = profile.joint_states.topic
        ee_pose_source.listen(node, self.source, *frames, self.take, self._complain, topic)

    def _complain(self, problem: str) -> None:
        self.complaint = problem

    def problem(self, node: Node, seconds: float) -> str:
        """Why there is none; empty where there is."""
        if self.count:
            return ""
        origins = {"tf": "/tf", "joint_states": node.resolve_topic_name("robot_description")}
        if not node.count_publishers(origins[self.source]):
            return f"nobody publishes {origins[self.source]}, which it is computed from"
        return (
            self.complaint or f"it could not be computed in {seconds:g} s: {self.source} is silent"
        )


def check(
    profile: RobotProfile,
    policies: Mapping[str, BundleConfig],
    seconds: float = 3.0,
    discovery: float = 2.0,
) -> list[Finding]:
    """Every comparison, good or bad.

    Args:
        profile: the robot.
        policies: what the policies that are to run need, by label.
        seconds: how long to listen.
        discovery: s for the graph to become known before that.
    """
    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("rlrc_robot_check", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        inputs: dict[str, tuple[str, type]] = {
            f"cameras.{name}": (camera.topic, CompressedImage if camera.compressed else Image)
            for name, camera in profile.cameras.items()
        }
        inputs["joint_states"] = profile.joint_states.topic, JointState
        if not profile.ee_frame:
            inputs["ee_pose"] = profile.ee_pose, PoseStamped
        listeners = {part: _Listener(node, *source) for part, source in inputs.items()}
        computed = _ComputedPose(node, profile) if profile.ee_frame else None
        seen: list[_Seen] = [*listeners.values(), *filter(None, [computed])]
        _spin(executor, discovery)
        for source in seen:
            source.forget()
        _spin(executor, seconds)
        findings = [
            _input(node, profile, part, listener, seconds) for part, listener in listeners.items()
        ]
        if computed is not None:
            findings.append(_computed_pose(node, profile, computed, seconds))
        wanted = {"ee_command": COMMAND_TYPES[profile.ee_command_type]}
        if profile.gripper_command_type == "array":
            wanted["gripper_command"] = "std_msgs/msg/Float64MultiArray"
        for part, kind in wanted.items():
            findings.append(_output(node, part, getattr(profile, part), kind))
        if profile.gripper_command_type == "action":
            findings.append(_gripper_action(node, profile.gripper_command))
        findings += [_policy(profile, listeners, *item) for item in policies.items()]
        return [*findings, _button(node)]
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


def report(findings: list[Finding]) -> dict[str, Any]:
    """As `rlrc robot check --json` prints it."""
    problems = sum(bool(finding.problem) for finding in findings)
    return {
        "ok": not problems,
        "problems": problems,
        "findings": [asdict(finding) for finding in findings],
    }


def _spin(executor: SingleThreadedExecutor, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        executor.spin_once(timeout_sec=min(left, 0.05))


def _input(
    node: Node, profile: RobotProfile, part: str, listener: _Listener, seconds: float
) -> Finding:
    topic = node.resolve_topic_name(listener.subscription.topic_name)
    problem = _unconnected(node, topic, listener)
    if not problem and not listener.count:
        problem = f"it is published, but nothing came in {seconds:g} s; is the driver running?"
    if problem or listener.last is None:
        return Finding(part, topic, problem, "")
    return _judged(profile, part, topic, listener)


def _computed_pose(
    node: Node, profile: RobotProfile, seen: _ComputedPose, seconds: float
) -> Finding:
    topic = f"{profile.ee_frame} by {seen.source}"
    if problem := seen.problem(node, seconds):
        return Finding("ee_pose", topic, problem, "")
    return _judged(profile, "ee_pose", topic, seen)


def _judged(profile: RobotProfile, part: str, topic: str, listener: _Seen) -> Finding:
    """Whether what came will do, and came often and young enough."""
    detail = f"{listener.rate:.1f} Hz, stamps at most {listener.oldest:.3f} s old"
    if part == "ee_pose":
        judge: Callable[[], str] = partial(_pose_problem, profile, listener.last)
        rate, age = MIN_POSE_RATE, profile.ee_pose_max_age
    elif part == "joint_states":
        judge = partial(_joints_problem, listener.last, [profile.joint_states.gripper_joint])
        rate, age = profile.joint_states.min_rate, profile.joint_states.max_age
    else:
        camera = profile.cameras[part.partition(".")[2]]
        judge = partial(_image_problem, listener.last)
        rate, age = camera.min_rate, camera.max_age
    problem = judge()
    if not problem and listener.rate < rate:
        problem = f"it comes at {listener.rate:.1f} Hz; {rate:g} are wanted"
    if not problem and listener.oldest > age:
        problem = (
            f"a stamp was {listener.oldest:.2f} s away from now, {age:g} s are allowed; "
            "synchronise the clocks, or raise max_age"
        )
    return Finding(part, topic, problem, detail)


def _unconnected(node: Node, topic: str, listener: _Listener) -> str:
    """Why nothing can come on a topic; empty where it can."""
    kind = listener.subscription.msg_type
    wanted = f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}"
    publishers = node.get_publishers_info_by_topic(topic)
    if not publishers:
        return f"nobody publishes it{_similar(node, wanted)}"
    types = {info.topic_type for info in publishers}
    if wanted not in types:
        return f"it is of type {', '.join(sorted(types))}, not {wanted}"
    reasons = [_incompatible(info.qos_profile, SENSOR_QOS) for info in publishers]
    return "" if "" in reasons else f"QoS does not fit: {reasons[0]}"


def _similar(node: Node, kind: str) -> str:
    """Topics of the type, for who wrote the wrong name."""
    names = [
        name
        for name, types in node.get_topic_names_and_types()
        if kind in types and node.count_publishers(name)
    ]
    return f"; of its type there are {', '.join(sorted(names)[:5])}" if names else ""


def _incompatible(publisher: QoSProfile, subscription: QoSProfile) -> str:
    ends = [_as_discovered(profile) for profile in (publisher, subscription)]
    compatibility, reason = qos_check_compatible(*ends)
    return reason.strip("; ") if compatibility == QoSCompatibility.ERROR else ""


def _as_discovered(profile: QoSProfile) -> QoSProfile:
    """The profile with no deadline and no lease as the graph writes them; zero means the same."""
    same = {name.lstrip("_"): getattr(profile, name) for name in profile.__slots__}
    for name in ("deadline", "liveliness_lease_duration"):
        if same[name].nanoseconds == 0:
            same[name] = Infinite
    return QoSProfile(**same)


def _image_problem(message: Any) -> str:
    try:
        image_to_rgb(message)
    except UserError as error:
        return str(error)
    return ""


def _joints_problem(message: Any, names: list[str]) -> str:
    try:
        ordered_positions(message, names)
    except UserError as error:
        return str(error)
    return ""


def _pose_problem(profile: RobotProfile, message: Any) -> str:
    if problem := pose_problem(message, profile.base_frame):
        return problem
    position, limits = message.pose.position, profile.guard
    place = (position.x, position.y, position.z)
    corners = zip(limits.workspace_min, place, limits.workspace_max, strict=True)
    if any(not low <= value <= high for low, value, high in corners):
        where = ", ".join(f"{value:.3f}" for value in place)
        return f"the arm is outside of its workspace, at {where}: it could only move back in"
    return ""


def _output(node: Node, part: str, name: str, wanted: str) -> Finding:
    topic = node.resolve_topic_name(name)
    listeners = node.get_subscriptions_info_by_topic(topic)
    others = Counter(
        f"{info.node_namespace.rstrip('/')}/{info.node_name}"
        for info in node.get_publishers_info_by_topic(topic)
    )
    guards = [other for other in others if other.endswith("/command_guard")]
    detail = f"{len(listeners)} listen"
    types = {info.topic_type for info in listeners}
    reasons = [_incompatible(COMMAND_QOS, info.qos_profile) for info in listeners]
    if not listeners:
        problem = "nobody listens to it; is the controller loaded and active?"
    elif wanted not in types:
        problem = f"it is of type {', '.join(sorted(types))}, not {wanted}"
    elif "" not in reasons:
        problem = f"QoS does not fit: {reasons[0]}"
    elif strangers := sorted(set(others) - set(guards)):
        problem = f"{', '.join(strangers)} may command the arm too; only the guard should"
    elif sum(others[guard] for guard in guards) > 1:
        problem = "there is more than one command guard"
    else:
        problem = ""
    return Finding(part, topic, problem, detail)


def _gripper_action(node: Node, name: str) -> Finding:
    action = node.resolve_topic_name(name)
    services = dict(node.get_service_names_and_types())
    kinds = services.get(f"{action}/_action/send_goal", [])
    if not kinds:
        problem = "nobody offers this action; is the gripper's driver running?"
    elif GRIPPER_GOAL not in kinds:
        problem = f"it is of type {', '.join(kinds)}, not {GRIPPER_GOAL}"
    else:
        problem = ""
    return Finding("gripper_command", action, problem, "an action")


def _policy(
    profile: RobotProfile,
    listeners: Mapping[str, _Listener],
    label: str,
    config: BundleConfig,
) -> Finding:
    """Whether the robot has the cameras and joints that a policy was trained with."""
    part = f"policies.{label}"
    missing = [camera.name for camera in config.cameras if camera.name not in profile.cameras]
    problem = ""
    if missing:
        problem = f"it looks through {', '.join(missing)}; cameras: {', '.join(profile.cameras)}"
    contract, state = config.proprioception, listeners["joint_states"].last
    if not problem and contract is not None and contract.takes_joint_states:
        problem = "its joints cannot be compared: no joint state came"
        if state is not None:
            problem = _joints_problem(state, list(contract.joints))
    cameras = ", ".join(camera.name for camera in config.cameras)
    joints = len(contract.joints) if contract is not None else 0
    pose = "the end effector's pose, " if contract is not None and contract.ee_pose else ""
    detail = f"cameras {cameras}; {pose}{joints} joints; {config.control_rate:g} Hz"
    return Finding(part, listeners["joint_states"].subscription.topic_name, problem, detail)


def _button(node: Node) -> Finding:
    topic = node.resolve_topic_name("emergency_stop")
    count = node.count_publishers(topic)
    detail = f"{count} publish it" if count else "no button; ~/emergency_stop is what there is"
    return Finding("emergency_stop", topic, "", detail)
