import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.trials.records import OUTCOMES
from rlrc_ros.trials.statistics import (
    clopper_pearson,
    mcnemar_exact,
    noninferiority,
    paired_difference,
)
from rlrc_ros.trials.summary import summarise
from rlrc_ros.trials.table import detail_rows, headline_rows, number, quantity, text_table
from rlrc_ros.trials.verdict import remarks, verdict
from tests.trials.example import ARMS, policies, record, trial


def paired(both, only_reference, only_candidate, neither):
    """Records with exactly these outcomes."""
    kinds = [(True, True)] * both + [(True, False)] * only_reference
    kinds += [(False, True)] * only_candidate + [(False, False)] * neither
    return [
        record(pair, arm, outcome="success" if success else "failure")
        for pair, outcomes in enumerate(kinds)
        for arm, success in zip(ARMS, outcomes, strict=True)
    ]


def test_counts_and_tests_are_those_of_the_statistics():
    summary = summarise(paired(20, 3, 7, 10), ARMS, margin=0.1, alpha=0.1)
    assert summary.by_arm["original"].success.successes == 23
    assert summary.by_arm["original"].success.interval == clopper_pearson(23, 40, 0.9)
    assert summary.by_arm["compressed"].success.rate == pytest.approx(27 / 40)
    c = summary.comparison
    assert (c.pairs, c.both, c.only_reference, c.only_candidate, c.neither) == (40, 20, 3, 7, 10)
    expected = noninferiority(20, 3, 7, 10, margin=0.1, alpha=0.1)
    assert (c.interval, c.noninferiority_p) == (expected.difference.interval, expected.p_value)
    assert c.difference == pytest.approx(0.1)
    assert c.mcnemar_p == mcnemar_exact(3, 7)
    assert c.mcnemar_p_worse == mcnemar_exact(3, 7, "less")


def test_exchanging_the_arms_turns_the_difference_round():
    records = paired(20, 3, 7, 10)
    forth, back = summarise(records, ARMS).comparison, summarise(records, ARMS[::-1]).comparison
    assert back.difference == -forth.difference
    assert back.interval == pytest.approx((-forth.interval.high, -forth.interval.low), abs=1e-9)


def test_partial_is_not_success_and_is_named():
    records = paired(2, 0, 0, 0)
    records[0] = dataclasses.replace(records[0], outcome="partial", score=99.0)
    summary = summarise(records, ARMS)
    assert summary.by_arm["original"].success.successes == 1
    assert summary.by_arm["original"].success.labelled == 2
    assert summary.comparison.only_candidate == 1
    assert summary.partial == (records[0].episode_id,)
    assert any("not successful" in r and records[0].episode_id in r for r in remarks(summary))


def test_unlabelled_incomplete_and_repeated_episodes_are_left_out_and_named():
    records = paired(5, 0, 0, 0)
    records[0] = dataclasses.replace(records[0], outcome="unlabelled")
    records.append(record(5, "original", outcome="failure"))
    records.append(record(1, "compressed", episode_id="second try", outcome="failure", steps=9999))
    records[4] = dataclasses.replace(records[4], seed=1)
    summary = summarise(records, ARMS)
    assert summary.comparison.pairs == 4
    assert summary.by_arm["original"].success.labelled == 5
    assert summary.by_arm["original"].episodes == 6
    assert summary.by_arm["compressed"].success.rate == 1.0
    assert summary.by_arm["compressed"].steps == 500
    assert summary.unlabelled == (records[0].episode_id,)
    assert summary.unlabelled_pairs == (0,)
    assert summary.incomplete_pairs == (5,)
    assert summary.repeated == ("second try",)
    assert summary.mismatched_pairs == (2,)
    said = " ".join(remarks(summary))
    for what in (
        "0000-original",
        "unlabelled: 0.",
        "one episode was run: 5.",
        "second try",
        ": 2.",
    ):
        assert what in said


def test_long_lists_are_shortened_in_words_but_not_in_the_summary():
    summary = summarise([dataclasses.replace(r, outcome="unlabelled") for r in trial(30)], ARMS)
    assert len(summary.unlabelled) == 60
    assert any("and 50 more" in remark for remark in remarks(summary))


def test_a_plain_trial_needs_no_remarks():
    assert remarks(summarise(trial(10), ARMS)) == []


def test_latency_steps_guard_and_terminations_are_gathered_by_arm():
    records = [
        record(
            pair,
            latency_ms_p50=p50,
            latency_ms_p99=p99,
            deadline_misses=2,
            guard={"rejected_stale": pair, "limited_workspace": 0},
            termination_reason="timeout" if pair else "finished",
            duration_s=10.0 + pair,
        )
        for pair, (p50, p99) in enumerate([(10.0, 20.0), (30.0, 90.0), (None, None), (50.0, 60.0)])
    ]
    arm = summarise(records, ARMS).by_arm["original"]
    assert (arm.latency_ms_p50, arm.latency_ms_p99, arm.latency_ms_p99_worst) == (30.0, 60.0, 90.0)
    assert (arm.steps, arm.deadline_misses, arm.duration_s) == (400, 8, 11.5)
    assert arm.guard == {"limited_workspace": 0, "rejected_stale": 6}
    assert arm.terminations == {"finished": 1, "timeout": 3}


def test_success_by_task_adds_up():
    summary = summarise(trial(31), ARMS)
    assert sorted(summary.by_task) == ["pick", "place"]
    for arm in ARMS:
        rates = [rates[arm] for rates in summary.by_task.values()]
        assert sum(r.successes for r in rates) == summary.by_arm[arm].success.successes
        assert sum(r.labelled for r in rates) == 31


def test_a_summary_of_nothing_says_so():
    summary = summarise([], ARMS)
    assert summary.comparison is None
    assert summary.by_arm["original"].success.interval == (0.0, 1.0)
    assert "says nothing about success" in verdict(summary)
    json.dumps(summary.to_dict(), allow_nan=False)


@given(st.lists(st.tuples(st.sampled_from(OUTCOMES), st.sampled_from(OUTCOMES)), max_size=12))
def test_every_trial_has_a_summary_a_sentence_a_table_and_json(outcomes):
    records = [
        record(pair, arm, outcome=outcome)
        for pair, both in enumerate(outcomes)
        for arm, outcome in zip(ARMS, both, strict=True)
    ]
    summary = summarise(records, ARMS)
    json.dumps(summary.to_dict(), allow_nan=False)
    assert verdict(summary).count(". ") == 0
    assert verdict(summary).endswith(".")
    assert len(headline_rows(summary)) == 6
    assert detail_rows(summary)
    if summary.comparison:
        c = summary.comparison
        assert c.both + c.only_reference + c.only_candidate + c.neither == c.pairs


@pytest.mark.parametrize(
    ("arms", "options", "says"),
    [
        (("original", "original"), {}, "two different"),
        (("first", "pruned"), {}, "neither an arm first nor pruned"),
        (ARMS, {"margin": 3.0}, "margin"),
        (ARMS, {"alpha": 0.0}, "alpha"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_a_users_error(arms, options, says):
    with pytest.raises(UserError, match=says):
        summarise(trial(2), arms, **options)


# The sentence


def test_ten_pairs_cannot_show_three_points_and_the_verdict_says_what_they_can():
    text = verdict(summarise(paired(10, 0, 0, 0), ARMS))
    assert text.startswith("This trial cannot show that compressed is less than 3 points worse")
    assert "10 pairs are too few, as it takes 125" in text
    assert "at most 27.8 points worse and at most 27.8 points better" in text
    assert "succeeded in 10 of 10 pairs and original in 10" in text


@pytest.mark.parametrize(
    ("table", "starts", "holds"),
    [
        (
            (125, 0, 0, 0),
            "Shown: compressed is not worse than original by 3 points or more",
            "difference {low:+.1f} to {high:+.1f} points",
        ),
        (
            (300, 10, 60, 30),
            "Shown: compressed is better than original (compressed succeeded in 360 of 400",
            "difference {low:+.1f} to {high:+.1f} points",
        ),
        (
            (2900, 60, 20, 20),
            "Shown: compressed is worse than original, but by less than 3 points",
            "difference {low:+.1f} to {high:+.1f} points",
        ),
        (
            (300, 60, 10, 30),
            "Shown: compressed is worse than original by more than 3 points",
            "difference {low:+.1f} to {high:+.1f} points",
        ),
        ((124, 0, 0, 0), "This trial cannot show", "124 pairs are too few"),
        ((0, 1, 0, 0), "This trial cannot show", "1 pair is too few"),
        (
            (150, 20, 20, 10),
            "This trial does not show",
            "compressed is at most {worse:.1f} points worse and at most {high:.1f} points better",
        ),
        (
            (150, 20, 6, 24),
            "This trial does not show",
            "compressed is worse, by {least:.1f} to {worse:.1f} points",
        ),
    ],
)
def test_the_verdict_claims_what_the_interval_allows(table, starts, holds):
    low, high = (100 * end for end in paired_difference(*table).interval)
    text = verdict(summarise(paired(*table), ARMS)).replace("−", "-")
    assert text.startswith(starts)
    assert holds.format(low=low, high=high, worse=-low, least=-high) in text


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(any), st.sampled_from([0.01, 0.05, 0.2]))
def test_the_verdict_says_shown_only_when_it_is(table, margin):
    summary = summarise(paired(*table), ARMS, margin=margin)
    low, high = summary.comparison.interval
    c = summary.comparison
    # To be no worse than a reference that never succeeds is no finding, unless it is better.
    says_something = c.both + c.only_reference > 0 or low > 0
    shown = says_something and (low > -margin or high < -margin)
    assert verdict(summary).startswith("Shown") == shown


# The table


def test_the_printed_table_is_aligned_and_complete():
    lines = text_table(summarise(paired(17, 1, 0, 2), ARMS), policies()).splitlines()
    assert re.split(r"  +", lines[0].strip()) == [*ARMS, "difference or ratio"]
    starts = [lines[0].index(name) for name in (*ARMS, "difference or ratio")]
    for line in lines:
        assert all(line[start - 1] == " " and line[start] != " " for start in starts)
    assert [line[: starts[0]].strip() for line in lines[1:]] == [
        "success",
        "latency p50 (ms)",
        "latency p99 (ms)",
        "bundle size (MB)",
        "LLM in memory (MB)",
        "model in memory (MB)",
    ]
    assert "18/20 = 90% (68–99%)" in lines[1]
    assert "17/20 = 85% (62–97%)" in lines[1]
    assert "−5.0 points" in lines[1]
    assert "over 20 pairs" in lines[1]
    assert "the same" in lines[2]
    assert "7.97× smaller" in lines[4]


def test_ratios_say_which_way(capsys):
    slow = [
        dataclasses.replace(r, latency_ms_p50=10.0 * (1 + 2 * (r.arm == "compressed")))
        for r in paired(3, 0, 0, 0)
    ]
    rows = {row.metric: row for row in headline_rows(summarise(slow, ARMS))}
    assert rows["latency p50 (ms)"].change == "3.00× slower"
    rows = {row.metric: row for row in headline_rows(summarise(slow, ARMS[::-1]))}
    assert rows["latency p50 (ms)"].change == "3.00× faster"


@pytest.mark.parametrize(
    "strange",
    [
        {},
        {"original": {}},
        {"original": {"memory": None}, "compressed": {"memory": {"total": "x"}}},
        {"original": {"memory": {"total": float("nan")}, "bundle_bytes": -1}},
    ],
)
def test_what_nobody_knows_shows_as_a_dash(strange):
    rows = headline_rows(summarise([], ARMS), strange)
    assert all((row.reference, row.candidate, row.change) == ("–", "–", "–") for row in rows[1:])


def test_a_rate_just_below_all_is_not_rounded_up_to_all():
    row = headline_rows(summarise(paired(399, 1, 0, 0), ARMS))[0]
    assert row.candidate.startswith("399/400 = 99.8%")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.0, "0"),
        (7, "7"),
        (15082.3, "15,082"),
        (99.96, "100.0"),
        (32.04, "32.0"),
        (8.283, "8.28"),
        (0.01234, "0.0123"),
        (1_000_000, "1,000,000"),
    ],
)
def test_quantities_keep_three_digits(value, text):
    assert quantity(value) == text


def test_numbers_are_found_only_where_they_are_numbers():
    values = {"a": {"b": 3}, "c": True, "d": "4"}
    assert number(values, "a", "b") == 3
    assert number(values, "a") is None
    assert number(values, "a", "x") is None
    assert number(values, "c") is None
    assert number(values, "d") is None
