"""Records episodes: one bag from `~/start` to `~/stop`, labelled by `~/label` at any time after.

    ros2 run rlrc recorder_node --ros-args -p output_dir:=runs/rollouts -p profile:=my_arm.yaml

Messages go into the bag as the bytes that came; nothing is deserialised. A bag begins with what
came in the `preroll` seconds before its episode. What is in it and how it is written stands in
`rlrc_ros.rollouts.recording`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.topic_or_service_is_hidden import topic_or_service_is_hidden
from rlrc.msg import RecorderStatus
from rlrc.srv import LabelEpisode, StartRecording, StopRecording

from rlrc_ros.errors import UserError
from rlrc_ros.nodes import common
from rlrc_ros.nodes.attendance import Attendance
from rlrc_ros.nodes.recorder_topics import Topics
from rlrc_ros.profile import RobotProfile, load_profile
from rlrc_ros.rollouts import episode as episodes
from rlrc_ros.rollouts.preroll import Preroll
from rlrc_ros.rollouts.profile_topics import OWN_TOPICS, profile_topics
from rlrc_ros.rollouts.recording import Recording
from rlrc_ros.schema import from_dict

MATCHING_TIME = 2.0
"""How long `~/start` waits at most until every publisher has been matched, in s."""
LITTLE_ROOM = 1 << 30
"""Bytes left on the disk below which diagnostics warn."""
LOOK_PERIOD = 0.5
"""s, at which the recorder looks after a recording."""
FORSAKEN_LOOKS = 10
"""So many looks in a row without a sign of life of who asked for it end a recording. Not one: who
was frozen may thaw, and if the recorder itself was, the other is found anew and may have more to
say."""
FAREWELL_TIME = 2.0
"""s that who asked for a recording has to say how it ended, when the process is to end."""
IDLE, RECORDING, FAILED = "idle", "recording", "failed"
_NOT_RECORDED = ("/rosout", "/parameter_events")


class RecorderNode(Node):
    """Topics in, bags out."""

    def __init__(self) -> None:
        super().__init__("recorder")
        directory = common.text(self, "output_dir", "rollouts", "where the bags go")
        topics = common.texts(self, "topics", "topics to record; empty: every one there is")
        self._profile = _profile(
            common.text(
                self, "profile", "", "the robot, kept in every bag: a profile's name, file or JSON"
            )
        )
        profile_only = common.flag(
            self, "profile_topics_only", False, "record the profile's topics and this package's own"
        )
        preroll = common.number(
            self, "preroll", 1.0, "s before an episode that its bag begins; 0: not before", 0.0, 60
        )
        self._output_dir = Path(directory).expanduser().resolve()
        if profile_only and self._profile is None:
            raise UserError("parameter profile_topics_only: name a robot's profile as well")
        # Without the policies: their paths would tell who is who in a blinded trial.
        self._robot = asdict(replace(self._profile, policies={})) if self._profile else {}
        if self._profile is not None and (profile_only or not topics):
            robots = [topic.topic for topic in profile_topics(self._profile)]
        else:
            robots = []
        self._expected = [self.resolve_topic_name(topic) for topic in [*topics, *robots]]
        """Said to be missing where nobody publishes them."""
        own = [self.resolve_topic_name(topic) for topic in OWN_TOPICS] if profile_only else []
        self._wanted = {*self._expected, *own} if topics or profile_only else set()
        """Empty: every topic."""
        self._preroll = preroll
        self._recording: Recording | None = None
        self._client: Attendance | None = None
        """Whoever asked for it."""
        self._forsaken = 0
        """Looks since that client was there."""
        self._topics = Topics(self, self._is_wanted, Preroll(preroll) if preroll else None)
        self._failure = ""
        """Of the last recording; empty where it went well."""

        self.create_service(StartRecording, "~/start", self._on_start)
        self.create_service(StopRecording, "~/stop", self._on_stop)
        self.create_service(LabelEpisode, "~/label", self._on_label)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._status_publisher = self.create_publisher(RecorderStatus, "~/status", 10)
        self.create_timer(LOOK_PERIOD, self._look_after_recording, clock=common.STEADY_CLOCK)
        self.create_timer(1.0, self._report, clock=common.STEADY_CLOCK)
        self.get_logger().info(f"bags go to {self._output_dir}")

    def leave(self) -> None:
        """Before the process ends: close the bag that is open, if one is.

        Whoever asked for it, told to end by the same Ctrl-C, gets to say how the episode ended.
        """
        attended = self._client is not None
        executor, deadline = self.executor, time.monotonic() + FAREWELL_TIME
        assert executor is not None
        while self._client is not None and self._client.attends and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.1)
        if self._recording is not None:
            lost = self._client is not None and self._client.lost
            self._close(self._recording, "client_lost" if lost else "recorder_shutdown")
        if attended:
            common.linger(self)

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
            if request.episode_id == self._recording.uri.name:
                return  # asked again by somebody whom no answer has reached
            raise UserError(f"{self._recording.uri.name} is being recorded: stop that first")
        episode = episodes.Episode(
            episode_id=request.episode_id,
            instruction=request.instruction,
            policy_label=request.policy_label,
            bundle_hash=request.bundle_hash,
            metadata=_metadata(request.metadata_json),
            preroll=self._preroll,
            robot_profile=self._robot,
        )
        client = Attendance(self, request.attended_on)
        try:
            self._recording = Recording(self._output_dir, episode)
        except UserError:
            client.close()
            raise
        self._client, self._forsaken = client, 0
        self._failure = ""
        self._topics.begin(self._recording)
        deadline = time.monotonic() + MATCHING_TIME
        while time.monotonic() < deadline and not self._topics.all_matched():
            time.sleep(0.005)
        self._publish_status()
        self.get_logger().info(f"recording {self._recording.uri}, {len(self._topics)} topics")

    def _on_stop(
        self, request: StopRecording.Request, response: StopRecording.Response
    ) -> StopRecording.Response:
        recording, wanted = self._recording, request.episode_id
        if recording is None or wanted not in ("", recording.uri.name):
            missing = f"{wanted} is not" if wanted else "nothing is"
            response.success, response.message = False, f"{missing} being recorded"
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
        for topic in self._expected:
            if topic not in self._topics and not recording.failure:
                recording.unrecorded.setdefault(topic, "nobody published it")
        self._topics.end()
        messages = recording.close(termination_reason)
        self._recording = None
        if self._client is not None:
            self._client.close()
            self._client = None
        self._failure = recording.failure
        for line in filter(None, (recording.failure, _drops(recording))):
            self.get_logger().error(line)
        self.get_logger().info(f"recorded {messages} messages to {recording.uri}")
        self._publish_status()
        return messages

    def _look_after_recording(self) -> None:
        recording = self._recording
        present = self._client is None or self._client.present
        self._forsaken = 0 if present else self._forsaken + 1
        if recording is not None and self._forsaken > FORSAKEN_LOOKS:
            self.get_logger().error(f"who asked for {recording.uri.name} is gone")
            self._close(recording, "client_lost")
        elif recording is None or not recording.failure:
            self._topics.discover()
        elif not self._failure:
            self._failure = recording.failure
            self.get_logger().error(f"{recording.failure} ({recording.uri})")
            self._topics.end()
            self._publish_status()

    def _is_wanted(self, name: str) -> bool:
        if self._wanted:
            return name in self._wanted
        return name not in _NOT_RECORDED and not topic_or_service_is_hidden(name)

    def _report(self) -> None:
        self._publish_status()
        self._publish_diagnostics()

    def _publish_status(self) -> None:
        recording = self._recording
        status = RecorderStatus(state=IDLE, free_bytes=self._free_bytes())
        status.header.stamp = self.get_clock().now().to_msg()
        if recording is not None:
            status.state = FAILED if recording.failure else RECORDING
            status.episode_id = recording.uri.name
            status.message = recording.failure or _drops(recording)
            status.messages = recording.received.total()
            status.dropped = recording.dropped.total()
        self._status_publisher.publish(status)

    def _publish_diagnostics(self) -> None:
        recording, free = self._recording, self._free_bytes()
        level, message = DiagnosticStatus.OK, "idle"
        values: dict[str, object] = {"free GB": f"{free * 1e-9:.1f}"}
        if self._failure:
            level, message = DiagnosticStatus.WARN, f"idle; the last episode: {self._failure}"
        if recording is not None:
            level, message = DiagnosticStatus.OK, f"recording {recording.uri.name}"
            values |= {"episode": recording.uri.name, "topics": len(self._topics)}
            values |= {"messages": recording.received.total()}
            values |= {"dropped": recording.dropped.total()}
            if drops := _drops(recording):
                level, message = DiagnosticStatus.WARN, drops
            if jumps := recording.episode.clock_jumps:
                level, message = (
                    DiagnosticStatus.WARN,
                    f"the clock jumped by {jumps[-1].seconds:+g} s",
                )
        if free < LITTLE_ROOM and level == DiagnosticStatus.OK:
            level, message = DiagnosticStatus.WARN, f"{message}; only {free * 1e-9:.1f} GB are free"
        if recording is not None and recording.failure:
            level, message = DiagnosticStatus.ERROR, recording.failure
        self._diagnostics_publisher.publish(common.diagnostics(self, level, message, values))

    def _free_bytes(self) -> int:
        place = next(
            path for path in (self._output_dir, *self._output_dir.parents) if path.exists()
        )
        return shutil.disk_usage(place).free


def _profile(text: str) -> RobotProfile | None:
    """The profile that the parameter names or is."""
    if not text.strip():
        return None
    if not text.lstrip().startswith("{"):
        return load_profile(Path(text).expanduser())
    try:
        return from_dict(RobotProfile, json.loads(text), "parameter profile")
    except json.JSONDecodeError as error:
        raise UserError(f"parameter profile is not JSON: {error}") from None


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


def main() -> int:
    """Run the node."""
    return common.run(RecorderNode, RecorderNode.leave)


if __name__ == "__main__":
    sys.exit(main())
