"""Records episodes: one bag from `~/start` to `~/stop`, labelled by `~/label` at any time after.

    ros2 run rlrc recorder_node --ros-args -p output_dir:=runs/rollouts

Messages go into the bag as the bytes that came; nothing is deserialised. What is in a bag and how
it is written stands in `rlrc_ros.rollouts.recording`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo
from rclpy.topic_or_service_is_hidden import topic_or_service_is_hidden
from rlrc.srv import LabelEpisode, StartRecording, StopRecording

from rlrc_ros.errors import UserError
from rlrc_ros.nodes import common
from rlrc_ros.rollouts import episode as episodes
from rlrc_ros.rollouts.definitions import message_definition
from rlrc_ros.rollouts.recording import Recording

if TYPE_CHECKING:
    from rclpy.subscription import MessageInfo

MATCHING_TIME = 2.0
"""How long `~/start` waits at most until every publisher has been matched, in s."""
QUEUE_DEPTH = 100
"""Messages of a topic that may wait while the process is busy with others."""
_NOT_RECORDED = ("/rosout", "/parameter_events")
_TYPE_NAME = re.compile(r"\w+/msg/\w+")


class _Topic(NamedTuple):
    channel: int
    subscription: Subscription[Any]


class RecorderNode(Node):
    """Topics in, bags out."""

    def __init__(self) -> None:
        super().__init__("recorder")
        directory = common.text(self, "output_dir", "rollouts", "where the bags go")
        topics = common.texts(self, "topics", "topics to record; empty: every one there is")
        self._output_dir = Path(directory).expanduser().resolve()
        self._wanted = [self.resolve_topic_name(topic) for topic in topics]
        self._recording: Recording | None = None
        self._topics: dict[str, _Topic] = {}
        self._reported_failure = ""

        self.create_service(StartRecording, "~/start", self._on_start)
        self.create_service(StopRecording, "~/stop", self._on_stop)
        self.create_service(LabelEpisode, "~/label", self._on_label)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(0.5, self._look_after_recording, clock=common.STEADY_CLOCK)
        self.create_timer(1.0, self._publish_diagnostics, clock=common.STEADY_CLOCK)
        self.get_logger().info(f"bags go to {self._output_dir}")

    def finish(self) -> None:
        """Close the bag that is open, if one is."""
        if self._recording is not None:
            self._close(self._recording, "recorder_shutdown")

    def _on_start(
        self, request: StartRecording.Request, response: StartRecording.Response
    ) -> StartRecording.Response:
        try:
            self._start(request)
        except UserError as error:
            response.success, response.message = False, str(error)
            return response
        assert self._recording is not None
        response.success, response.uri = True, str(self._recording.uri)
        response.message = f"recording {len(self._topics)} topics"
        return response

    def _start(self, request: StartRecording.Request) -> None:
        if self._recording is not None:
            raise UserError(f"{self._recording.uri.name} is being recorded: stop that first")
        episode = episodes.Episode(
            episode_id=request.episode_id,
            instruction=request.instruction,
            policy_label=request.policy_label,
            bundle_hash=request.bundle_hash,
            metadata=_metadata(request.metadata_json),
        )
        self._recording = Recording(self._output_dir, episode)
        self._reported_failure = ""
        self._discover(self._recording)
        deadline = time.monotonic() + MATCHING_TIME
        while time.monotonic() < deadline and not self._all_matched():
            time.sleep(0.005)
        self.get_logger().info(f"recording {self._recording.uri}, {len(self._topics)} topics")

    def _on_stop(
        self, request: StopRecording.Request, response: StopRecording.Response
    ) -> StopRecording.Response:
        recording = self._recording
        if recording is None:
            response.success, response.message = False, "nothing is being recorded"
            return response
        response.messages = self._close(recording, request.termination_reason)
        response.success = not recording.failure
        response.message = recording.failure or _drops(recording) or "recorded"
        response.uri = str(recording.uri)
        return response

    def _on_label(
        self, request: LabelEpisode.Request, response: LabelEpisode.Response
    ) -> LabelEpisode.Response:
        try:
            directory = self._own_bag(request.uri)
            episode = episodes.label(directory, request.outcome, request.score, request.notes)
        except (UserError, OSError) as error:
            response.success, response.message = False, str(error)
            return response
        response.success = True
        response.message = f"{episode.episode_id}: {episode.outcome}"
        return response

    def _own_bag(self, uri: str) -> Path:
        """The directory of a bag of this recorder's; nothing outside its output is written to."""
        directory = Path(uri).expanduser().resolve()
        if directory.parent != self._output_dir:
            raise UserError(f"{uri} is not a bag in {self._output_dir}")
        if self._recording is not None and directory == self._recording.uri:
            raise UserError(f"{uri} is being recorded: label it when it has ended")
        return directory

    def _close(self, recording: Recording, termination_reason: str) -> int:
        for topic in self._wanted:
            if topic not in self._topics:
                recording.unrecorded.setdefault(topic, "nobody published it")
        self._stop_listening(recording)
        messages = recording.close(termination_reason)
        self._recording = None
        for line in filter(None, (recording.failure, _drops(recording))):
            self.get_logger().error(line)
        self.get_logger().info(f"recorded {messages} messages to {recording.uri}")
        return messages

    def _stop_listening(self, recording: Recording) -> None:
        for topic in self._topics.values():
            self._unsubscribe(recording, topic)
        self._topics.clear()

    def _unsubscribe(self, recording: Recording, topic: _Topic) -> None:
        """Take what has come and waits for its callback, and end the subscription."""
        subscription = topic.subscription
        for _ in range(QUEUE_DEPTH):
            with subscription.handle:
                taken = subscription.handle.take_message(subscription.msg_type, True)
            if taken is None:
                break
            _write(recording, topic.channel, *taken)
        self.destroy_subscription(subscription)

    def _look_after_recording(self) -> None:
        recording = self._recording
        if recording is None:
            return
        if not recording.failure:
            self._discover(recording)
        elif not self._reported_failure:
            self._reported_failure = recording.failure
            self.get_logger().error(f"{recording.failure} ({recording.uri})")
            self._stop_listening(recording)

    def _discover(self, recording: Recording) -> None:
        """Subscribe to what is published by now and should be recorded."""
        for name, types in self.get_topic_names_and_types():
            if not self._is_wanted(name) or name in recording.unrecorded:
                continue
            publishers = self.get_publishers_info_by_topic(name)
            if not publishers:
                continue
            try:
                self._subscribe(recording, name, types, publishers)
            except UserError as error:
                recording.unrecorded[name] = str(error)
                self.get_logger().warning(f"{name} is not recorded: {error}")

    def _is_wanted(self, name: str) -> bool:
        if self._wanted:
            return name in self._wanted
        return name not in _NOT_RECORDED and not topic_or_service_is_hidden(name)

    def _subscribe(
        self,
        recording: Recording,
        name: str,
        types: Sequence[str],
        publishers: Sequence[TopicEndpointInfo],
    ) -> None:
        qos = _matching_qos([publisher.qos_profile for publisher in publishers])
        known = self._topics.get(name)
        if known is not None:
            profile = known.subscription.qos_profile
            if (profile.reliability, profile.durability) == (qos.reliability, qos.durability):
                return
            # A publisher has come that the subscription as it is would not hear.
            channel, message_type = known.channel, known.subscription.msg_type
            self._unsubscribe(recording, known)
        else:
            if len(types) > 1:
                raise UserError(f"it is published with more than one type: {', '.join(types)}")
            message_type = _message_type(types[0])
            channel = recording.add_topic(
                name,
                types[0],
                message_definition(types[0]),
                [_as_rosbag2(publisher.qos_profile) for publisher in publishers],
                str(publishers[0].topic_type_hash),
            )
        write = partial(_write, recording, channel)
        subscription = self.create_subscription(message_type, name, write, qos, raw=True)
        self._topics[name] = _Topic(channel, subscription)

    def _all_matched(self) -> bool:
        return all(
            topic.subscription.get_publisher_count() >= self.count_publishers(name)
            for name, topic in self._topics.items()
        )

    def _publish_diagnostics(self) -> None:
        recording = self._recording
        level, message, values = DiagnosticStatus.OK, "idle", {}
        if recording is not None:
            received, dropped = recording.received.total(), _drops(recording)
            level = DiagnosticStatus.WARN if dropped else DiagnosticStatus.OK
            message = dropped or f"recording {recording.uri.name}"
            values = {"episode": recording.uri.name, "topics": len(self._topics)}
            values |= {"messages": received, "dropped": recording.dropped.total()}
            if recording.failure:
                level, message = DiagnosticStatus.ERROR, recording.failure
        self._diagnostics_publisher.publish(common.diagnostics(self, level, message, values))


def _write(recording: Recording, channel: int, data: bytes, info: MessageInfo) -> None:
    received = info["received_timestamp"] or time.time_ns()
    recording.write(channel, received, info["source_timestamp"] or received, data)


def _metadata(text: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"metadata_json is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise UserError("metadata_json is not a JSON object")
    return metadata


def _drops(recording: Recording) -> str:
    topics = ", ".join(f"{count} of {topic}" for topic, count in recording.dropped.items())
    return f"dropped, the disk is too slow: {topics}" if topics else ""


def _message_type(type_name: str) -> Any:
    if not _TYPE_NAME.fullmatch(type_name):
        raise UserError(f"{type_name!r} is not a message type")
    package, _, name = type_name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError):
        raise UserError(f"its type {type_name} is not installed here") from None


def _matching_qos(offered: Sequence[QoSProfile]) -> QoSProfile:
    """The most that every publisher offers, so that all of them are heard."""
    reliable = all(qos.reliability == ReliabilityPolicy.RELIABLE for qos in offered)
    latched = all(qos.durability == DurabilityPolicy.TRANSIENT_LOCAL for qos in offered)
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=QUEUE_DEPTH,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def _as_rosbag2(qos: QoSProfile) -> dict[str, Any]:
    """A profile as rosbag2 writes it down."""

    def duration(nanoseconds: int) -> dict[str, int]:
        sec, nsec = divmod(nanoseconds, 1_000_000_000)
        return {"sec": sec, "nsec": nsec}

    return {
        "history": qos.history.name.lower(),
        "depth": qos.depth,
        "reliability": qos.reliability.name.lower(),
        "durability": qos.durability.name.lower(),
        "deadline": duration(qos.deadline.nanoseconds),
        "lifespan": duration(qos.lifespan.nanoseconds),
        "liveliness": qos.liveliness.name.lower(),
        "liveliness_lease_duration": duration(qos.liveliness_lease_duration.nanoseconds),
        "avoid_ros_namespace_conventions": qos.avoid_ros_namespace_conventions,
    }


def main() -> int:
    """Run the node."""
    return common.run(RecorderNode, RecorderNode.finish)


if __name__ == "__main__":
    sys.exit(main())
