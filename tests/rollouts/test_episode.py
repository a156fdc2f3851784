import json

import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.definitions import message_definition
from rlrc_ros.rollouts.episode import (
    Episode,
    Label,
    check_episode_id,
    label,
    read_episode,
    write_episode,
)
from tests.rollouts.bags import installed


def test_an_episode_comes_back_from_its_file(tmp_path):
    episode = Episode(
        episode_id="e1",
        score=40.0,
        labels=[Label(time="2026-01-01T00:00:00+00:00", outcome="partial", score=40.0)],
        message_counts={"/a": 3},
        metadata={"seed": 7, "nested": {"list": [1, "ü"]}},
    )
    write_episode(tmp_path, episode)
    assert read_episode(tmp_path) == episode
    assert [path.name for path in tmp_path.iterdir()] == ["episode.json"]


def test_labels_are_kept_and_the_last_one_counts(tmp_path):
    write_episode(tmp_path, Episode(episode_id="e1", termination_reason="timeout"))
    label(tmp_path, "success", 12.0, "looked good")
    episode = label(tmp_path, "partial", 60.0, "on the video it did not")
    assert read_episode(tmp_path) == episode
    assert (episode.outcome, episode.score, episode.notes) == (
        "partial",
        60.0,
        "on the video it did not",
    )
    assert [(entry.outcome, entry.score) for entry in episode.labels] == [
        ("success", None),
        ("partial", 60.0),
    ]
    assert episode.termination_reason == "timeout"


@pytest.mark.parametrize(
    ("outcome", "score", "words"),
    [
        ("great", None, "'great' is none of success, failure, partial"),
        ("unlabelled", None, "is none of"),
        ("partial", None, "between 0 and 100"),
        ("partial", -1.0, "between 0 and 100"),
        ("partial", float("nan"), "between 0 and 100"),
    ],
)
def test_a_label_that_makes_no_sense_changes_nothing(tmp_path, outcome, score, words):
    write_episode(tmp_path, Episode(episode_id="e1"))
    with pytest.raises(UserError, match=words):
        label(tmp_path, outcome, score)
    assert read_episode(tmp_path).labels == []


def test_a_file_that_is_no_episode_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        label(tmp_path, "success")
    (tmp_path / "episode.json").write_text(json.dumps({"episode_id": "e1", "outcom": "success"}))
    with pytest.raises(UserError, match="did you mean 'outcome'"):
        read_episode(tmp_path)


@pytest.mark.parametrize("good", ["e1", "2026-11-22T20.31.07_A", "x" * 100])
def test_ids_that_are_safe_as_names_are_taken(good):
    assert check_episode_id(good) == good


@pytest.mark.parametrize(
    "bad",
    [
        "",
        ".",
        "..",
        "../e",
        "a/b",
        "/a",
        "a\\b",
        "a b",
        "a\n",
        "é",
        ".e",
        "-e",
        "x.partial",
        "x" * 101,
    ],
)
def test_ids_that_could_leave_the_directory_are_refused(bad):
    with pytest.raises(UserError, match="episode id"):
        check_episode_id(bad)


def test_a_definition_holds_every_type_inside_it():
    text = installed("rlrc/msg/PolicyCommand")
    inside = [line for line in text.splitlines() if line.startswith("MSG: ")]
    assert inside == [
        "MSG: std_msgs/Header",
        "MSG: builtin_interfaces/Time",
        "MSG: geometry_msgs/Twist",
        "MSG: geometry_msgs/Vector3",
    ]


@pytest.mark.parametrize(
    "bad", ["nothing/msg/Nothing", "sensor_msgs/msg/../../../passwd", "x", "sensor_msgs/srv/X"]
)
def test_a_type_without_a_definition_is_refused(bad):
    with pytest.raises(UserError, match=r"no definition of|is not the name"):
        message_definition(bad)
