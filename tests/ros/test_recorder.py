import signal
import sys
import time
from pathlib import Path

import pytest
from geometry_msgs.msg import PoseStamped
from rlrc.msg import RecorderStatus
from rlrc.srv import LabelEpisode, StartRecording, StopRecording
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from rlrc_ros.nodes.common import LATCHED_QOS, SENSOR_QOS
from rlrc_ros.rollouts.bag import open_bag, read_messages
from rlrc_ros.rollouts.episode import read_episode
from rlrc_ros.rollouts.repair import INTERRUPTED, repair
from rlrc_ros.rollouts.verify import verify

TALKER = Path(__file__).with_name("talker.py")
SLEEPER = Path(__file__).with_name("sleeper.py")
READER = Path(__file__).with_name("reader.py")


class Recorder:
    def __init__(self, ros, start, output_dir, environment=None, **parameters):
        self.ros = ros
        parameters = {"output_dir": output_dir, **parameters}
        self.process = start("recorder_node", parameters, environment)

    def start(self, episode_id="e1", **fields):
        return self.ros.call(StartRecording, "recorder/start", episode_id=episode_id, **fields)

    def stop(self, reason="finished"):
        return self.ros.call(StopRecording, "recorder/stop", termination_reason=reason)

    def label(self, uri, outcome, score=0.0, notes=""):
        return self.ros.call(
            LabelEpisode, "recorder/label", uri=uri, outcome=outcome, score=score, notes=notes
        )


@pytest.fixture
def recorder(ros, start, tmp_path):
    return Recorder(ros, start, tmp_path / "bags")


def talk(start, subscribers, seconds, *cameras):
    return start([sys.executable, TALKER, subscribers, seconds, *cameras])


def sent(ros, talker):
    """How many images and joint states it has published, when it is done."""
    assert ros.until(lambda: "sent" in talker.output, 30.0)
    return [int(word) for word in talker.output.split()[1:]]


def test_what_waited_for_a_busy_process_does_not_stay_in_its_memory(ros, start):
    image = 640 * 480 * 3
    sleeper = start([sys.executable, SLEEPER])
    images, _ = sent(ros, talk(start, 1, 4.0, "1"))
    assert ros.until(lambda: f"image {images} " in sleeper.output, 30.0)
    slept, *_, last = sleeper.output.strip().splitlines()
    before, after = map(int, slept.split()[1:])
    assert after - before > 15 * image
    assert int(last.split()[2]) - before < 5 * image


def test_a_process_that_is_held_up_for_a_quarter_of_a_second_loses_no_image(ros, start):
    reader = start([sys.executable, READER])
    talker = talk(start, 1, 3.0, "1", "2")
    assert ros.until(lambda: "image 10\n" in reader.output, 30.0)
    reader.send(signal.SIGSTOP)
    time.sleep(0.25)
    reader.send(signal.SIGCONT)
    images, _ = sent(ros, talker)
    assert ros.until(lambda: f"image {2 * images}\n" in reader.output, 5.0)


def test_every_message_is_in_the_bag_byte_by_byte(ros, start, tmp_path):
    recorder = Recorder(ros, start, tmp_path / "bags", preroll=0.0)
    talker = talk(start, 2, 3.0, "1")
    ros.published("joint_states")
    heard = {"/camera1/image": [], "/joint_states": []}
    for type_, topic in ((Image, "/camera1/image"), (JointState, "/joint_states")):
        ros.node.create_subscription(type_, topic, heard[topic].append, 100, raw=True)
    response = recorder.start(
        instruction="put the cup on the plate",
        policy_label="A",
        bundle_hash="abc",
        metadata_json='{"seed": 7}',
    )
    assert response.success, response.message
    images, joints = sent(ros, talker)
    ros.spin(0.2)
    stopped = recorder.stop()
    assert stopped.success, stopped.message
    assert stopped.uri == response.uri

    recorded = {"/camera1/image": [], "/joint_states": []}
    with open_bag(response.uri) as reader:
        for connection, _, data in reader.messages():
            if connection.topic in recorded:
                recorded[connection.topic].append(data)
    seen = [m.header.stamp.sec for _, m, _ in read_messages(response.uri, ["/camera1/image"])]
    assert seen == list(range(images)) and len(recorded["/joint_states"]) == joints
    assert recorded == heard

    positions = [m.position[0] for _, m, _ in read_messages(response.uri, ["/joint_states"])]
    assert positions == list(range(joints))
    report = verify(response.uri)
    assert report.ok and not report.losses, (report.problems, report.losses)
    assert report.messages == stopped.messages
    rates = {topic.topic: topic.rate for topic in report.topics}
    assert rates["/joint_states"] == pytest.approx(100, rel=0.05)
    assert rates["/camera1/image"] == pytest.approx(30, rel=0.05)
    # latched, published before the recording began
    assert [m.data for _, m, _ in read_messages(response.uri, ["/robot_description"])] == [
        "<robot/>"
    ]
    episode = read_episode(Path(response.uri))
    assert (episode.instruction, episode.policy_label) == ("put the cup on the plate", "A")
    assert (episode.bundle_hash, episode.metadata) == ("abc", {"seed": 7})
    assert (episode.termination_reason, episode.outcome) == ("finished", "unlabelled")
    assert episode.message_counts["/joint_states"] == joints
    assert not {"/rosout", "/parameter_events"} & set(episode.message_counts)


def test_a_bag_begins_before_its_episode(ros, start, tmp_path):
    recorder = Recorder(ros, start, tmp_path / "bags", preroll=2.0)
    statuses = ros.collect(RecorderStatus, "recorder/status")
    latched = ros.node.create_publisher(String, "robot_description", LATCHED_QOS)
    latched.publish(String(data="<robot/>"))
    text = ros.publisher(String, "text")
    for number in range(3):
        text.publish(String(data=str(number)))
        ros.spin(0.1)
    for k, heard in enumerate((["0", "1", "2", "in e0"], ["between", "in e1"])):
        response = recorder.start(f"e{k}")
        assert response.success, response.message
        text.publish(String(data=f"in e{k}"))
        ros.spin(0.2)
        assert recorder.stop().success
        bag = Path(response.uri)
        assert [m.data for _, m, _ in read_messages(bag, ["/text"])] == heard
        # said once, before the first episode, and in the bag of each
        descriptions = read_messages(bag, ["/robot_description"])
        assert [m.data for _, m, _ in descriptions] == ["<robot/>"]
        assert verify(bag).ok and read_episode(bag).preroll == 2.0
        text.publish(String(data="between"))
        ros.spin(0.1)
    states = [(status.state, status.episode_id) for _, status in statuses]
    assert ("recording", "e0") in states and states[-1] == ("idle", "")
    assert statuses[-1][1].free_bytes > 0


def test_a_profile_says_what_to_record_and_stands_in_the_bag(ros, start, tmp_path):
    parameters = {"profile": "sim", "profile_topics_only": "true"}
    recorder = Recorder(ros, start, tmp_path / "bags", **parameters)
    other = ros.node.create_publisher(String, "other", 10)
    pose = ros.publisher(PoseStamped, "ee_pose", SENSOR_QOS)
    uri = Path(recorder.start().uri)
    other.publish(String(data="not of the robot"))
    pose.publish(PoseStamped())
    ros.spin(0.2)
    assert recorder.stop().success
    episode = read_episode(uri)
    assert episode.message_counts["/ee_pose"] == 1 and "/other" not in episode.message_counts
    assert "/recorder/status" not in episode.message_counts
    assert episode.unrecorded_topics["/joint_states"] == "nobody published it"
    assert episode.robot_profile["name"] == "sim"
    assert episode.robot_profile["guard"]["workspace_max"] == [0.75, 0.33, 0.4]


def test_a_recorder_with_a_profile_that_is_none_ends_in_one_line(start, tmp_path):
    for profile, line in (("absent", "absent: no such file"), ("{", "profile is not JSON")):
        process = start("recorder_node", {"output_dir": tmp_path, "profile": f"'{profile}'"})
        assert process.wait(90.0) == 2
        assert line in process.output and "Traceback" not in process.output


def test_after_sigkill_repair_brings_back_all_but_the_last_second(ros, start, recorder, tmp_path):
    talker = talk(start, 1, 30.0, "1")
    ros.published("joint_states")
    uri = Path(recorder.start().uri)
    heard = ros.collect(JointState, "joint_states")
    assert ros.until(lambda: heard and heard[-1][1].position[0] > 250)
    recorder.process.send(signal.SIGKILL)
    recorder.process.wait()
    last = heard[-1][1].position[0]
    talker.kill()

    partial = uri.with_name("e1.partial")
    report = verify(partial)
    assert not report.ok and len(report.problems) == 1
    assert "truncated" in report.problems[0] and "rlrc bag repair" in report.problems[0]
    repaired = repair(partial)
    assert repaired.uri == str(uri) and Path(repaired.original).is_dir()
    positions = [m.position[0] for _, m, _ in read_messages(uri, ["/joint_states"])]
    assert positions == list(range(len(positions)))
    assert len(positions) > last - 100 > 100
    report = verify(uri)
    assert report.ok, report.problems
    assert report.episode.termination_reason == INTERRUPTED


def test_labels_can_be_corrected_and_all_are_kept(recorder):
    uri = recorder.start().uri
    assert "is being recorded" in recorder.label(uri, "success").message
    recorder.stop("timeout")
    assert recorder.label(uri, "success").success
    assert recorder.label(uri, "partial", 40.0, "dropped at the end").success
    assert "between 0 and 100" in recorder.label(uri, "partial", 140.0).message
    assert "none of success, failure, partial" in recorder.label(uri, "great").message
    episode = read_episode(Path(uri))
    assert (episode.outcome, episode.score) == ("partial", 40.0)
    assert episode.notes == "dropped at the end"
    assert episode.termination_reason == "timeout"
    assert [label.outcome for label in episode.labels] == ["success", "partial"]
    assert episode.labels[0].time < episode.labels[1].time


def test_nothing_is_written_outside_the_output_directory(recorder, tmp_path):
    for episode_id in ("../e1", "/tmp/e1", "a/b", "..", "", ".hidden", "e1.partial", "x" * 200):
        response = recorder.start(episode_id)
        assert not response.success and "episode id" in response.message
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "episode.json").write_text('{"episode_id": "outside"}')
    before = (outside / "episode.json").read_text()
    for uri in (str(outside), str(tmp_path / "bags" / ".." / "outside"), "/"):
        response = recorder.label(uri, "success")
        assert not response.success and "is not a bag in" in response.message
    assert (outside / "episode.json").read_text() == before


def test_requests_at_the_wrong_time_are_refused_in_one_line(recorder):
    assert recorder.stop().message == "nothing is being recorded"
    assert "not JSON" in recorder.start(metadata_json="{").message
    assert "not a JSON object" in recorder.start(metadata_json="[1]").message
    started = recorder.start("e1")
    again = recorder.start("e1")
    assert started.success and again.success and again.uri == started.uri, "no answer had come"
    assert "e1 is being recorded" in recorder.start("e2").message
    assert recorder.stop().success
    assert "exists already" in recorder.start("e1").message


def test_a_topic_that_appears_later_is_recorded_too(ros, recorder):
    uri = recorder.start().uri
    publisher = ros.publisher(String, "late")
    publisher.publish(String(data="hello"))
    ros.spin(0.2)
    recorder.stop()
    assert [m.data for _, m, _ in read_messages(uri, ["/late"])] == ["hello"]


def test_a_publisher_of_lesser_qos_that_comes_later_is_heard(ros, recorder):
    first = ros.node.create_publisher(String, "mixed", 10)
    ros.published("mixed")
    uri = recorder.start().uri
    assert ros.until(lambda: first.get_subscription_count() > 0)
    first.publish(String(data="reliable"))
    ros.spin(0.2)
    second = ros.publisher(String, "mixed", SENSOR_QOS)
    second.publish(String(data="best effort"))
    ros.spin(0.2)
    recorder.stop()
    assert [m.data for _, m, _ in read_messages(uri, ["/mixed"])] == ["reliable", "best effort"]


def test_only_the_listed_topics_are_recorded_and_missing_ones_are_named(ros, start, tmp_path):
    recorder = Recorder(ros, start, tmp_path / "bags", topics="[wanted, absent]", profile="sim")
    wanted = ros.node.create_publisher(String, "wanted", 10)
    ros.node.create_publisher(String, "other", 10)
    uri = Path(recorder.start().uri)
    assert ros.until(lambda: wanted.get_subscription_count() > 0)
    wanted.publish(String(data="hello"))
    ros.spin(0.2)
    recorder.stop()
    episode = read_episode(uri)
    assert episode.message_counts == {"/wanted": 1}
    assert episode.unrecorded_topics == {"/absent": "nobody published it"}


def test_a_topic_of_a_type_that_is_not_installed_is_named(ros, start, tmp_path):
    # Hides the package from the recorder alone.
    hidden = tmp_path / "site" / "trajectory_msgs"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not installed')")
    environment = {"PYTHONPATH": str(hidden.parent)}
    recorder = Recorder(ros, start, tmp_path / "bags", environment)
    ros.node.create_publisher(JointTrajectory, "strange", 10)
    uri = Path(recorder.start().uri)
    ros.spin(1.0)
    assert recorder.stop().success
    episode = read_episode(uri)
    why = "its type trajectory_msgs/msg/JointTrajectory is not installed here"
    assert episode.unrecorded_topics["/strange"] == why
    assert "/strange" not in episode.message_counts
    assert f"/strange was not recorded: {why}" in verify(uri).losses


def test_sigterm_closes_the_bag(ros, recorder):
    uri = Path(recorder.start().uri)
    recorder.process.send(signal.SIGTERM)
    assert recorder.process.wait() == 0
    assert verify(uri).ok
    assert read_episode(uri).termination_reason == "recorder_shutdown"


def test_a_full_disk_ends_the_recording_and_nothing_else(ros, start, small_disk):
    recorder = Recorder(ros, start, small_disk)
    statuses = ros.collect(RecorderStatus, "recorder/status")
    talk(start, 1, 60.0, "1", "2")
    ros.published("joint_states")
    uri = Path(recorder.start().uri)
    assert ros.until(uri.is_dir, 40.0), "the bag is finished when the disk is full"
    full = "recording ended early: No space left on device"
    assert ros.until(lambda: (statuses[-1][1].state, statuses[-1][1].message) == ("failed", full))
    stopped = recorder.stop("operator_stop")
    assert not stopped.success and stopped.uri == str(uri)
    assert stopped.message == "recording ended early: No space left on device"
    assert recorder.process.output.count("No space left on device") <= 2
    report = verify(uri)
    assert report.ok, report.problems
    assert report.messages == stopped.messages > 10
    assert report.losses == ["recording ended early: No space left on device"]
    assert report.episode.termination_reason == "operator_stop"
    assert recorder.label(str(uri), "failure").success
    # The node lives on, and does not begin what it could not finish.
    with pytest.raises(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(1 << 20))
    again = recorder.start("e2")
    assert not again.success and "No space left" in again.message
    (small_disk / "ballast").unlink()
    assert recorder.start("e2").success
