import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.trials.records import pairs
from tests.trials.example import record


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pair": "1"}, "pair is '1'"),
        ({"pair": True}, "pair is True"),
        ({"pair": 1.0}, "pair is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"order": -1}, "order is -1"),
        ({"arm": ""}, "arm is empty"),
        ({"arm": None}, "arm is None"),
        ({"outcome": "won"}, "outcome is 'won', not one of success, failure"),
        ({"score": 101}, "score is 101"),
        ({"score": "50"}, "score is '50'"),
        ({"duration_s": math.nan}, "duration_s is nan"),
        ({"duration_s": 10**400}, "duration_s is 1000"),
        ({"latency_ms_p50": -1.0}, "latency_ms_p50 is -1.0"),
        ({"guard": [1]}, "guard is [1]"),
        ({"guard": {"rejected_stale": -1}}, "guard.rejected_stale is -1"),
        ({"bag_uri": "../other/bag"}, "inside the trial's directory"),
        ({"bag_uri": "bags/../../x"}, "inside the trial's directory"),
        ({"bag_uri": "/etc/passwd"}, "inside the trial's directory"),
        ({"bag_uri": "..\\x"}, "inside the trial's directory"),
        ({"bag_uri": "file:///etc"}, "inside the trial's directory"),
        ({"instruction": "\ud800"}, "Unicode"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_value_that_makes_no_sense_is_one_error_that_names_it(changes, says):
    with pytest.raises(UserError) as error:
        dataclasses.replace(record(0), **changes)
    assert says in str(error.value) and "\n" not in str(error.value)


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
