import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import yaml
from mcap.reader import make_reader
from rosbags.highlevel import AnyReader

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts import recording as recordings
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.rollouts.episode import Episode, read_episode
from rlrc_ros.rollouts.recording import Recording
from rlrc_ros.rollouts.repair import repair
from rlrc_ros.rollouts.verify import verify
from tests.rollouts.bags import (
    QOS,
    SECOND,
    STRING,
    STRING_DEFINITION,
    STRING_HASH,
    damage,
    record,
    string,
)


def begin(directory, episode_id="e1"):
    recording = Recording(directory, Episode(episode_id=episode_id))
    channel = recording.add_topic("/text", STRING, STRING_DEFINITION, [QOS], STRING_HASH)
    return recording, channel


def test_a_bag_is_read_with_its_own_definitions(tmp_path):
    bag = record(tmp_path, ["one", "two"], instruction="wave", metadata={"seed": 3})
    read = list(read_messages(bag))
    assert [(topic, message.data) for topic, message, _ in read] == [
        ("/text", "one"),
        ("/text", "two"),
    ]
    assert [stamp for *_, stamp in read] == [100 * SECOND, 100 * SECOND + SECOND // 10]
    with AnyReader([bag]) as reader:
        (connection,) = reader.connections
        assert connection.digest == STRING_HASH
        (qos,) = connection.ext.offered_qos_profiles
        assert qos.reliability.name == "RELIABLE" and qos.deadline.sec == 9223372036
    assert sorted(file.name for file in bag.iterdir()) == [
        "e1_0.mcap",
        "episode.json",
        "metadata.yaml",
    ]


def test_metadata_has_what_rosbag2_reads(tmp_path):
    bag = record(tmp_path, ["one", "two"])
    text = yaml.safe_load((bag / "metadata.yaml").read_text())
    information = text["rosbag2_bagfile_information"]
    assert information["version"] == 9 and information["storage_identifier"] == "mcap"
    assert information["relative_file_paths"] == ["e1_0.mcap"]
    assert information["message_count"] == 2
    assert information["duration"] == {"nanoseconds": SECOND // 10}
    assert information["starting_time"] == {"nanoseconds_since_epoch": 100 * SECOND}
    (topic,) = information["topics_with_message_count"]
    assert topic == {
        "topic_metadata": {
            "name": "/text",
            "type": STRING,
            "serialization_format": "cdr",
            "offered_qos_profiles": [QOS],
            "type_description_hash": STRING_HASH,
        },
        "message_count": 2,
    }
    (file,) = information["files"]
    assert file["path"] == "e1_0.mcap" and file["message_count"] == 2


def test_the_episode_says_how_it_went(tmp_path):
    episode = read_episode(record(tmp_path, ["one"], policy_label="A", metadata={"seed": 3}))
    assert (episode.policy_label, episode.metadata) == ("A", {"seed": 3})
    assert episode.start_time < episode.stop_time
    assert episode.message_counts == {"/text": 1}
    assert episode.termination_reason == "finished" and episode.outcome == "unlabelled"
    assert episode.software["python"] and episode.software["rlrc-ros"]


def test_the_mcap_file_alone_says_what_it_is(tmp_path):
    fields = {"policy_label": "A", "metadata": {"seed": 3}, "robot_profile": {"name": "sim"}}
    bag = record(tmp_path, ["one"], instruction="wave", **fields)
    with (bag / "e1_0.mcap").open("rb") as file:
        found = {record.name: record.metadata for record in make_reader(file).iter_metadata()}
    start, end = found["rlrc_episode"], found["rlrc_episode_end"]
    assert (start["instruction"], start["policy_label"]) == ("wave", "A")
    assert json.loads(start["metadata"]) == {"seed": 3}
    assert json.loads(start["robot_profile"]) == {"name": "sim"}
    assert json.loads(start["software"])["python"] and start["start_time"] < end["stop_time"]
    assert end["termination_reason"] == "finished"
    # and again where the file was cut off and repaired: what was known when it began
    damage(bag, 40)
    repair(bag)
    with (bag / "e1_0.mcap").open("rb") as file:
        names = [record.name for record in make_reader(file).iter_metadata()]
    assert names == ["rlrc_episode", "rlrc_episode_end"]


def test_jumps_of_the_clock_are_noted(tmp_path, monkeypatch):
    recording, _ = begin(tmp_path)
    before = recordings._clock_offset
    monkeypatch.setattr(recordings, "_clock_offset", lambda: before() - 30.0)
    end = time.monotonic() + 5.0
    while not recording.episode.clock_jumps and time.monotonic() < end:
        time.sleep(0.05)
    recording.close("finished")
    (jump,) = read_episode(recording.uri).clock_jumps
    assert jump.seconds == pytest.approx(-30.0, abs=0.05)
    report = verify(recording.uri)
    assert report.ok and "the clock jumped by -30" in report.losses[0]


def test_a_slow_sync_delays_no_message(tmp_path, monkeypatch):
    syncing, free = threading.Event(), threading.Event()

    def sync(_):
        syncing.set()
        free.wait(20.0)

    monkeypatch.setattr(recordings.McapWriter, "sync", sync)
    recording, channel = begin(tmp_path)
    assert syncing.wait(10.0)
    recording.write(channel, 1, 1, string("here I am"))
    file, end = tmp_path / "e1.partial" / "e1_0.mcap", time.monotonic() + 10.0
    while b"here I am" not in file.read_bytes() and time.monotonic() < end:
        time.sleep(0.02)
    assert b"here I am" in file.read_bytes()
    free.set()
    recording.close("finished")


def test_an_episode_without_messages_is_a_bag_too(tmp_path):
    recording = Recording(tmp_path, Episode(episode_id="e1"))
    assert recording.close("operator_stop") == 0
    assert list(read_messages(recording.uri)) == []
    assert verify(recording.uri).ok


def test_nothing_has_the_bags_name_before_it_is_whole(tmp_path):
    recording, channel = begin(tmp_path)
    recording.write(channel, 1, 1, string("one"))
    assert not recording.uri.exists() and (tmp_path / "e1.partial").is_dir()
    recording.close("finished")
    assert recording.uri.is_dir() and not (tmp_path / "e1.partial").exists()


def test_an_id_that_is_taken_is_refused(tmp_path):
    record(tmp_path, ["one"])
    with pytest.raises(UserError, match="e1 exists already: choose another"):
        Recording(tmp_path, Episode(episode_id="e1"))
    (tmp_path / "e2.partial").mkdir()
    with pytest.raises(UserError, match=r"rlrc bag repair .*e2\.partial"):
        Recording(tmp_path, Episode(episode_id="e2"))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot record to .*file/e1\.partial: Not a directory"):
        Recording(tmp_path / "file", Episode(episode_id="e1"))


def test_what_came_is_written_out_twice_a_second(tmp_path):
    recording, channel = begin(tmp_path)
    file = tmp_path / "e1.partial" / "e1_0.mcap"
    recording.write(channel, 1, 1, string("here I am"))
    end = time.monotonic() + 1.0
    while b"here I am" not in file.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.02)
    recording.close("finished")


def test_messages_that_the_disk_is_too_slow_for_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "QUEUE_SIZE", 100)
    recording, channel = begin(tmp_path)
    for _ in range(50):
        recording.write(channel, 1, 1, string("x" * 20))
    written = recording.close("finished")
    dropped = recording.dropped["/text"]
    assert dropped > 0 and written == 50 - dropped
    assert read_episode(recording.uri).dropped_messages == {"/text": dropped}
    report = verify(recording.uri)
    assert report.ok and report.losses == [
        f"/text: {dropped} messages were dropped, the disk was too slow"
    ]


def test_a_file_that_may_not_grow_ends_the_recording_cleanly(tmp_path):
    """The size limit of a process stands for a full disk where none can be mounted."""
    script = textwrap.dedent("""
        import json, resource, sys, time
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
        from tests.rollouts.test_recording import begin, string
        recording, channel = begin(Path(sys.argv[1]))
        for k in range(2000):
            recording.write(channel, k, k, string("x" * 50_000))
            if recording.failure:
                break
            time.sleep(0.001)
        time.sleep(0.1)
        early = recording.uri.is_dir()
        messages = recording.close("guard_stop")
        print(json.dumps([recording.failure, early, messages]))
    """)
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    failure, early, messages = json.loads(out.stdout)
    assert failure == "recording ended early: File too large" and early
    report = verify(tmp_path / "e1")
    assert report.ok and report.messages == messages > 100
    assert report.losses == [failure]
    assert report.episode.termination_reason == "guard_stop"
