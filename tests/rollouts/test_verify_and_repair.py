import json
import os
import shutil

import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.rollouts.episode import Episode, read_episode
from rlrc_ros.rollouts.recording import Recording
from rlrc_ros.rollouts.repair import INTERRUPTED, repair
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


def texts(bag):
    return [message.data for _, message, _ in read_messages(bag)]


def test_a_whole_bag_is_ok_and_described(tmp_path):
    bag = record(tmp_path, ["x"] * 21, period=SECOND // 20)
    report = verify(bag)
    assert report.ok and report.problems == report.losses == []
    assert report.messages == 21 and report.duration == pytest.approx(1.0)
    (topic,) = report.topics
    assert (topic.topic, topic.type, topic.messages) == ("/text", "std_msgs/msg/String", 21)
    assert topic.rate == pytest.approx(20.0) and topic.gaps == 0
    assert topic.longest_interval == pytest.approx(0.05)


def test_gaps_are_counted(tmp_path):
    recording = Recording(tmp_path, Episode(episode_id="e1"))
    channel = recording.add_topic("/text", STRING, STRING_DEFINITION, [QOS], STRING_HASH)
    for k in [*range(10), *range(15, 30), *range(40, 50)]:
        recording.write(channel, k * SECOND // 10, 0, string("x"))
    recording.close("finished")
    (topic,) = verify(recording.uri).topics
    assert topic.gaps == 2 and topic.longest_interval == pytest.approx(1.1)


@pytest.mark.parametrize("cut", [1, 8, 40, 300])
def test_a_truncated_file_is_said_to_be_one_in_one_line(tmp_path, cut):
    bag = record(tmp_path, ["x"] * 5)
    damage(bag, cut)
    report = verify(bag)
    assert not report.ok
    (problem,) = report.problems
    assert "e1_0.mcap is truncated or damaged" in problem and "5 messages are whole" in problem
    assert f"`rlrc bag repair {bag}`" in problem and "\n" not in problem


def test_counts_that_differ_are_problems(tmp_path):
    bag = record(tmp_path, ["x"] * 5)
    episode = json.loads((bag / "episode.json").read_text())
    episode["message_counts"]["/text"] = 6
    (bag / "episode.json").write_text(json.dumps(episode))
    metadata = (bag / "metadata.yaml").read_text()
    (bag / "metadata.yaml").write_text(metadata.replace("message_count: 5", "message_count: 4"))
    assert verify(bag).problems == [
        "metadata.yaml says 4 messages of /text, there are 5",
        "episode.json says 6 messages of /text, there are 5",
    ]


def test_a_bag_under_another_name_is_a_problem(tmp_path):
    bag = record(tmp_path, ["x"]).rename(tmp_path / "other")
    assert verify(bag).problems == ["episode.json is of another episode: e1"]


def test_an_episode_file_that_is_none_is_a_problem(tmp_path):
    bag = record(tmp_path, ["x"])
    (bag / "episode.json").write_text("{")
    (problem,) = verify(bag).problems
    assert "episode.json:1: not valid JSON" in problem


@pytest.mark.parametrize("damaged", ["missing", "empty"])
def test_metadata_that_is_missing_or_empty_is_a_problem(tmp_path, damaged):
    bag = record(tmp_path, ["x"])
    (bag / "metadata.yaml").unlink()
    if damaged == "empty":
        (bag / "metadata.yaml").write_text("")
    problems = verify(bag).problems
    assert problems and all("metadata" in problem for problem in problems)


def test_what_is_no_bag_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such bag directory"):
        verify(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"has no \.mcap file"):
        verify(tmp_path)


def test_a_truncated_bag_is_repaired_in_its_place_and_the_original_kept(tmp_path):
    bag = record(tmp_path, ["one", "two"])
    file = damage(bag, 40)
    before = file.read_bytes()
    repaired = repair(bag)
    assert repaired.uri == str(bag) and repaired.messages == 2 and repaired.lost_bytes > 0
    assert verify(bag).ok and texts(bag) == ["one", "two"]
    assert (tmp_path / "e1.damaged" / "e1_0.mcap").read_bytes() == before
    episode = read_episode(bag)
    assert episode.termination_reason == "finished" and "repaired" in episode.recording_error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e1", "e1.damaged"]


def test_a_recording_that_was_cut_off_becomes_a_bag(tmp_path):
    partial = record(tmp_path, ["one", "two"]).rename(tmp_path / "e1.partial")
    damage(partial, 40)
    (partial / "metadata.yaml").unlink()
    (partial / "episode.json").write_text('{"episode_id": "e1", "instruction": "wave"}')
    (partial / "reserve").write_bytes(bytes(100))
    repaired = repair(partial)
    bag = tmp_path / "e1"
    assert repaired.uri == str(bag) and texts(bag) == ["one", "two"]
    report = verify(bag)
    assert report.ok and len(report.losses) == 1
    assert report.episode.instruction == "wave"
    assert report.episode.termination_reason == INTERRUPTED
    assert report.episode.stop_time.startswith("1970-01-01T00:01:40.1")
    assert not (bag / "reserve").exists()


def test_a_recording_killed_before_its_metadata_is_repaired(tmp_path):
    partial = record(tmp_path, ["one"]).rename(tmp_path / "e1.partial")
    (partial / "metadata.yaml").unlink()
    assert "cut off" in verify(partial).problems[0]
    assert repair(partial).lost_bytes == 0
    assert texts(tmp_path / "e1") == ["one"]


def test_a_split_bag_of_another_recorder_is_repaired(tmp_path):
    bag = record(tmp_path, ["one", "two"])
    (bag / "episode.json").unlink()
    shutil.copy(bag / "e1_0.mcap", bag / "e1_1.mcap")
    os.truncate(bag / "e1_1.mcap", (bag / "e1_1.mcap").stat().st_size - 40)
    assert repair(bag).messages == 4
    assert texts(bag) == ["one", "two", "one", "two"]


def test_what_needs_no_repair_is_left_alone(tmp_path):
    bag = record(tmp_path, ["one"])
    with pytest.raises(UserError, match="is whole: there is nothing to repair"):
        repair(bag)
    damage(bag, 40)
    (tmp_path / "e1.damaged").mkdir()
    with pytest.raises(UserError, match=r"e1\.damaged exists already"):
        repair(bag)
    shutil.copytree(bag, tmp_path / "e2.partial")
    (tmp_path / "e2").mkdir()
    with pytest.raises(UserError, match="e2 exists already"):
        repair(tmp_path / "e2.partial")


def test_a_recording_that_is_going_on_is_not_touched(tmp_path):
    recording = Recording(tmp_path, Episode(episode_id="e1"))
    with pytest.raises(UserError, match="is being recorded right now"):
        repair(tmp_path / "e1.partial")
    recording.close("finished")
    assert verify(recording.uri).ok


def test_a_topic_that_is_not_there_is_named(tmp_path):
    bag = record(tmp_path, ["one"])
    with pytest.raises(UserError, match="has no topic /nothing; it has /text"):
        list(read_messages(bag, ["/nothing"]))
    with pytest.raises(UserError, match="there is no such bag"):
        list(read_messages(tmp_path / "nothing"))
    (bag / "metadata.yaml").unlink()
    with pytest.raises(UserError, match=r"no metadata\.yaml; look at `rlrc bag verify"):
        list(read_messages(bag))


def test_a_truncated_bag_cannot_be_read_and_says_so(tmp_path):
    bag = record(tmp_path, ["one"])
    damage(bag, 40)
    with pytest.raises(UserError, match=r"cannot be read.*rlrc bag verify"):
        list(read_messages(bag))
