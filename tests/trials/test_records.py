import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.trials.records import OUTCOMES, EpisodeRecord, append, pairs, read
from tests.trials.example import record, trial

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = texts.filter(bool)
counts = st.integers(0, 2**64 - 1)
measures = st.floats(0, 1e9)
records = st.builds(
    EpisodeRecord,
    trial_id=names,
    pair=st.integers(0, 10_000),
    order=st.integers(0, 1),
    arm=names,
    episode_id=names,
    seed=counts,
    task=texts,
    instruction=texts,
    outcome=st.sampled_from(OUTCOMES),
    score=st.none() | st.floats(0, 100),
    termination_reason=names,
    steps=counts,
    duration_s=measures,
    latency_ms_p50=st.none() | measures,
    latency_ms_p99=st.none() | measures,
    deadline_misses=counts,
    skipped_steps=counts,
    guard=st.dictionaries(texts, counts, max_size=3),
    bag_uri=st.just("bags/1"),
    message=texts,
)


@given(records)
def test_a_record_survives_one_line_of_json(episode):
    line = episode.to_json()
    assert "\n" not in line
    assert EpisodeRecord.from_json(line) == episode
    assert EpisodeRecord.from_json(line.encode()) == episode


def test_what_is_appended_is_read_back_in_order(tmp_path):
    log = tmp_path / "new directory" / "episodes.jsonl"
    episodes = trial(5)
    for i, episode in enumerate(episodes):
        append(log, episode)
        assert read(log) == episodes[: i + 1]


def test_a_label_that_comes_later_replaces_the_outcome_in_place(tmp_path):
    log = tmp_path / "episodes.jsonl"
    first, second = record(0, outcome="unlabelled"), record(1)
    labelled = dataclasses.replace(first, outcome="partial", score=30.0)
    for episode in (first, second, labelled):
        append(log, episode)
    assert read(log) == [labelled, second]
    assert len(log.read_text().splitlines()) == 3


def test_a_torn_last_line_is_left_out_and_said(tmp_path, caplog):
    log = tmp_path / "episodes.jsonl"
    append(log, record(0))
    whole = log.read_bytes()
    append(log, record(1))
    both = log.read_bytes()
    # Cut anywhere inside the second line, its end included: the first must come back every time.
    for length in range(len(whole) + 1, len(both) - 1):
        caplog.clear()
        log.write_bytes(both[:length])
        assert read(log) == [record(0)]
        assert f"{log}:2" in caplog.text


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path, caplog):
    log = tmp_path / "episodes.jsonl"
    log.write_text(record(0).to_json())
    assert read(log) == [record(0)]
    append(log, record(1))
    assert read(log) == [record(0), record(1)]
    assert not caplog.text


@pytest.mark.parametrize("tail", [b'{"trial_id": "torn', b"\0\0\0\0", b'{"message": "\xc3'])
def test_appending_after_a_crash_does_not_glue_two_records_together(tmp_path, tail):
    log = tmp_path / "episodes.jsonl"
    append(log, record(0))
    with log.open("ab") as file:
        file.write(tail)
    append(log, record(1))
    assert read(log) == [record(0), record(1)]
    assert tail not in log.read_bytes()


def _without(name):
    values = json.loads(record(1).to_json())
    del values[name]
    return json.dumps(values)


def _with(**values):
    return json.dumps({**json.loads(record(1).to_json()), **values})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        (_without("seed"), "seed missing"),
        (_with(colour="red"), "unknown field 'colour'"),
        (_with(pair="1"), "pair is '1'"),
        (_with(pair=True), "pair is True"),
        (_with(pair=1.0), "pair is 1.0"),
        (_with(seed=-1), "seed is -1"),
        (_with(order=2), "order is 2"),
        (_with(arm=""), "arm is empty"),
        (_with(arm=None), "arm is None"),
        (_with(outcome="won"), "outcome is 'won', not one of success, failure"),
        (_with(score=101), "score is 101"),
        (_with(score="50"), "score is '50'"),
        (_with(duration_s=math.nan), "duration_s is nan"),
        (_with(duration_s=10**400), "duration_s is 1000"),
        (_with(latency_ms_p50=-1.0), "latency_ms_p50 is -1.0"),
        (_with(guard=[1]), "guard is [1]"),
        (_with(guard={"rejected_stale": -1}), "guard.rejected_stale is -1"),
        (_with(bag_uri="../other/bag"), "inside the trial's directory"),
        (_with(bag_uri="bags/../../x"), "inside the trial's directory"),
        (_with(bag_uri="/etc/passwd"), "inside the trial's directory"),
        (_with(bag_uri="..\\x"), "inside the trial's directory"),
        (_with(bag_uri="file:///etc"), "inside the trial's directory"),
        (_with(instruction="\ud800"), "Unicode"),
        (_with(episode_id=record(0).episode_id), "is already trial trial-1, pair 0, arm original"),
    ],
    ids=lambda value: value[:30] if "{" not in value else "line",
)
def test_a_malformed_line_is_one_error_that_names_the_place(tmp_path, line, says):
    log = tmp_path / "episodes.jsonl"
    log.write_text("\n".join([record(0).to_json(), line, record(2).to_json()]) + "\n")
    with pytest.raises(UserError) as error:
        read(log)
    message = str(error.value)
    assert message.startswith(f"{log}:2: ")
    assert says in message
    assert "\n" not in message


def test_a_log_that_is_not_there_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")


def test_an_empty_log_has_no_records(tmp_path):
    (tmp_path / "episodes.jsonl").touch()
    assert read(tmp_path / "episodes.jsonl") == []


@pytest.mark.parametrize("latency", [math.nan, math.inf])
def test_a_latency_that_was_never_measured_is_none(latency):
    episode = record(latency_ms_p50=latency, latency_ms_p99=latency)
    assert episode.latency_ms_p50 is None
    assert episode.latency_ms_p99 is None


def test_pairs_put_every_record_in_one_place():
    episodes = [
        record(1, "compressed"),
        record(0),
        record(0, "compressed"),
        record(0, episode_id="again", outcome="failure"),
        record(1, "compressed", episode_id="once more"),
        record(2),
        record(2, "compressed", seed=7),
    ]
    pairing = pairs(episodes)
    assert pairing.complete == {
        0: {"original": episodes[1], "compressed": episodes[2]},
        2: {"original": episodes[5], "compressed": episodes[6]},
    }
    assert pairing.incomplete == {1: episodes[0]}
    assert pairing.repeated == (episodes[3], episodes[4])
    assert pairing.mismatched == (2,)


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["original", "compressed"]))))
def test_pairs_lose_no_record(places):
    episodes = [record(pair, arm, episode_id=str(i)) for i, (pair, arm) in enumerate(places)]
    pairing = pairs(episodes)
    found = [r.episode_id for arms in pairing.complete.values() for r in arms.values()]
    found += [r.episode_id for r in pairing.incomplete.values()]
    found += [r.episode_id for r in pairing.repeated]
    assert sorted(found) == sorted(r.episode_id for r in episodes)


def test_two_trials_or_three_arms_are_not_paired():
    with pytest.raises(UserError, match="trial_id"):
        pairs([record(0), record(1, trial_id="other")])
    with pytest.raises(UserError, match="arm"):
        pairs([record(0, arm) for arm in ("original", "compressed", "third")])
