"""What a trial showed, in numbers."""

from __future__ import annotations

import dataclasses
import statistics as stdlib_statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.trials.records import EpisodeRecord, Pairing, pairs
from rlrc_ros.trials.sequential import anytime_difference, anytime_p, decided
from rlrc_ros.trials.statistics import (
    Interval,
    Stopping,
    Verdict,
    barnard,
    clopper_pearson,
    fewest_pairs,
    holm,
    mcnemar_exact,
    noninferiority,
)


@dataclass(frozen=True)
class SuccessRate:
    """Successes among labelled episodes, with Clopper–Pearson's interval; no rate without any."""

    successes: int
    labelled: int
    rate: float | None
    interval: Interval


@dataclass(frozen=True)
class ArmSummary:
    """One policy's episodes.

    Args:
        episodes: how many were run, labelled or not.
        success: over the labelled ones; a partial outcome is not a success.
        partial: how many outcomes were partial.
        unlabelled: how many have no outcome yet.
        latency_ms_p50: median over episodes of the episode's median latency, in milliseconds.
        latency_ms_p99: median over episodes of the episode's 99th percentile.
        latency_ms_p99_worst: the greatest 99th percentile of any episode.
        steps: control steps taken in all episodes.
        deadline_misses: how many of them came later than one control period.
        skipped_steps: steps not taken because an observation was missing or too old.
        duration_s: median over episodes, in seconds.
        time_to_success_s: median over successful episodes, in seconds.
        sparc: median over episodes of the path's smoothness; nearer to 0 is smoother.
        guard: what the command guard did, summed over episodes, counter by counter.
        terminations: how many episodes ended for which reason.

    """

    episodes: int
    success: SuccessRate
    partial: int
    unlabelled: int
    latency_ms_p50: float | None
    latency_ms_p99: float | None
    latency_ms_p99_worst: float | None
    steps: int
    deadline_misses: int
    skipped_steps: int
    duration_s: float | None
    time_to_success_s: float | None
    sparc: float | None
    guard: dict[str, int]
    terminations: dict[str, int]


@dataclass(frozen=True)
class PairedComparison:
    """The candidate against the reference over the pairs with both outcomes labelled.

    Args:
        pairs: how many there are; the next four counts add up to it.
        both: pairs in which both policies succeeded.
        only_reference: pairs in which only the reference did.
        only_candidate: pairs in which only the candidate did.
        neither: pairs in which neither did.
        difference: success rate of the candidate minus the reference's, in [−1, 1].
        interval: of that difference, two-sided at 1 − alpha: Tango's, or with the anytime rule the
            betting one.
        mcnemar_p: McNemar's exact test, two-sided.
        mcnemar_p_worse: the same one-sided, against the candidate being worse.
        noninferiority_p: of the hypothesis that the candidate is worse by the margin or more,
            one-sided: compare with alpha / 2. Tango's score test, or the betting test.
        verdict: noninferior, inferior or inconclusive at the margin; inconclusive too where the
            reference never succeeded and the candidate is not better.

    """

    pairs: int
    both: int
    only_reference: int
    only_candidate: int
    neither: int
    difference: float
    interval: Interval
    mcnemar_p: float
    mcnemar_p_worse: float
    noninferiority_p: float
    verdict: Verdict


@dataclass(frozen=True)
class Summary:
    """Everything the records of one trial say, ready for `json.dumps(summary.to_dict())`.

    Args:
        trial_id: the trial; empty without records.
        arms: the reference's label and the candidate's.
        margin: non-inferiority margin, a difference of success rates in (0, 1).
        alpha: the intervals are two-sided at 1 − alpha.
        stopping: "fixed" where the number of pairs was fixed beforehand, else "anytime".
        fewest_pairs: pairs below which the margin cannot be met by agreeing in every pair.
        by_arm: every episode of each arm, repeated ones left out.
        by_task: success by task and arm.
        comparison: None as long as no pair has both outcomes.
        task_comparisons: the same task by task, where there are several; the p-values are adjusted
            by Holm's method for the number of tasks, the verdicts follow from them.
        barnard_p: Barnard's exact test, where there are labelled episodes but no pair of them.
        partial: episodes with a partial outcome.
        unlabelled: episodes without an outcome.
        unlabelled_pairs: complete pairs left out of the comparison because of such an episode.
        incomplete_pairs: pairs of which only one episode has been run.
        repeated: episodes run in a place that an earlier one had filled.
        mismatched_pairs: pairs whose episodes differ in seed, task or instruction.

    """

    trial_id: str
    arms: tuple[str, str]
    margin: float
    alpha: float
    stopping: Stopping
    fewest_pairs: int
    by_arm: dict[str, ArmSummary]
    by_task: dict[str, dict[str, SuccessRate]]
    comparison: PairedComparison | None
    task_comparisons: dict[str, PairedComparison]
    barnard_p: float | None
    partial: tuple[str, ...]
    unlabelled: tuple[str, ...]
    unlabelled_pairs: tuple[int, ...]
    incomplete_pairs: tuple[int, ...]
    repeated: tuple[str, ...]
    mismatched_pairs: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain objects that JSON knows."""
        return dataclasses.asdict(self)


def summarise(
    records: Iterable[EpisodeRecord],
    arms: tuple[str, str],
    *,
    margin: float = 0.03,
    alpha: float = 0.05,
    stopping: Stopping = "fixed",
) -> Summary:
    """Success, latency and safety of both arms, and the paired comparison.

    A partial outcome counts as not success. Unlabelled episodes are left out of the success rates,
    and their pairs out of the comparison. Episodes that were stopped or timed out stay in.

    Args:
        records: the episodes of one trial; those of other arms are left out.
        arms: the reference's label and the candidate's.
        margin: non-inferiority margin, fixed before the trial; 0.03 is 3 percentage points.
        alpha: intervals are two-sided at 1 − alpha; where several candidates are compared, already
            divided by their number.
        stopping: "anytime" where somebody looked at the results before the end.

    Raises:
        UserError: records without any of `arms`, records of several trials, or a margin or alpha
            outside (0, 1).

    """
    records = list(records)
    reference, candidate = arms
    if reference == candidate:
        raise UserError(f"both arms are {reference!r}: a comparison needs two different ones")
    if not 0 < alpha < 1:
        raise UserError(f"alpha is {alpha:g}: it must lie between 0 and 1, both excluded")
    if records and not {record.arm for record in records} & set(arms):
        raise UserError(f"the records have neither an arm {reference} nor {candidate}")
    records = [record for record in records if record.arm in arms]
    pairing = pairs(records)
    repeated = {record.episode_id for record in pairing.repeated}
    counted = [record for record in records if record.episode_id not in repeated]
    labelled = [record for record in counted if record.outcome != "unlabelled"]
    counted_pairs, unlabelled_pairs = _labelled_pairs(pairing)
    outcomes = _outcomes(counted_pairs, arms)
    tasks = sorted({record.task for record in counted})
    comparison = _compare(outcomes, margin, alpha, stopping)
    rates = {arm: _rate([r for r in labelled if r.arm == arm], 1 - alpha) for arm in arms}
    unpaired = [n for rate in rates.values() for n in (rate.successes, rate.labelled)]
    return Summary(
        trial_id=records[0].trial_id if records else "",
        arms=arms,
        margin=margin,
        alpha=alpha,
        stopping=stopping,
        fewest_pairs=fewest_pairs(margin, alpha),
        by_arm={arm: _arm([r for r in counted if r.arm == arm], 1 - alpha) for arm in arms},
        by_task={
            task: {
                arm: _rate([r for r in labelled if (r.task, r.arm) == (task, arm)], 1 - alpha)
                for arm in arms
            }
            for task in tasks
        },
        comparison=comparison,
        task_comparisons=_by_task(counted_pairs, tasks, arms, margin, alpha, stopping),
        barnard_p=barnard(*unpaired) if labelled and comparison is None else None,
        partial=tuple(r.episode_id for r in counted if r.outcome == "partial"),
        unlabelled=tuple(r.episode_id for r in counted if r.outcome == "unlabelled"),
        unlabelled_pairs=tuple(unlabelled_pairs),
        incomplete_pairs=tuple(pairing.incomplete),
        repeated=tuple(record.episode_id for record in pairing.repeated),
        mismatched_pairs=pairing.mismatched,
    )


def _arm(records: Sequence[EpisodeRecord], confidence: float) -> ArmSummary:
    p99 = [r.latency_ms_p99 for r in records if r.latency_ms_p99 is not None]
    guard: Counter[str] = Counter()
    for record in records:
        guard.update(record.guard)
    return ArmSummary(
        episodes=len(records),
        success=_rate([r for r in records if r.outcome != "unlabelled"], confidence),
        partial=sum(r.outcome == "partial" for r in records),
        unlabelled=sum(r.outcome == "unlabelled" for r in records),
        latency_ms_p50=_median([r.latency_ms_p50 for r in records if r.latency_ms_p50 is not None]),
        latency_ms_p99=_median(p99),
        latency_ms_p99_worst=max(p99, default=None),
        steps=sum(r.steps for r in records),
        deadline_misses=sum(r.deadline_misses for r in records),
        skipped_steps=sum(r.skipped_steps for r in records),
        duration_s=_median([r.duration_s for r in records]),
        time_to_success_s=_median([r.duration_s for r in records if r.outcome == "success"]),
        sparc=_median([r.sparc for r in records if r.sparc is not None]),
        guard=dict(sorted(guard.items())),
        terminations=dict(sorted(Counter(r.termination_reason for r in records).items())),
    )


def _rate(labelled: Sequence[EpisodeRecord], confidence: float) -> SuccessRate:
    n = len(labelled)
    successes = sum(record.outcome == "success" for record in labelled)
    interval = clopper_pearson(successes, n, confidence)
    return SuccessRate(successes, n, successes / n if n else None, interval)


def outcome_counts(
    records: Iterable[EpisodeRecord], arms: tuple[str, str]
) -> tuple[int, int, int, int]:
    """Pairs in which both succeeded, only the reference, only the candidate, and neither."""
    pairing = pairs(record for record in records if record.arm in arms)
    return _outcomes(_labelled_pairs(pairing)[0], arms)


_Pair = Mapping[str, EpisodeRecord]


def _labelled_pairs(pairing: Pairing) -> tuple[list[_Pair], list[int]]:
    """The pairs with both outcomes, and the numbers of the complete ones without."""
    labelled: list[_Pair] = []
    others = []
    for number, pair in pairing.complete.items():
        if any(record.outcome == "unlabelled" for record in pair.values()):
            others.append(number)
        else:
            labelled.append(pair)
    return labelled, others


def _outcomes(pairs_: Iterable[_Pair], arms: tuple[str, str]) -> tuple[int, int, int, int]:
    counts: Counter[tuple[bool, ...]] = Counter(
        tuple(pair[arm].outcome == "success" for arm in arms) for pair in pairs_
    )
    both, neither = counts[True, True], counts[False, False]
    return both, counts[True, False], counts[False, True], neither


def _compare(
    outcomes: tuple[int, int, int, int], margin: float, alpha: float, stopping: Stopping
) -> PairedComparison | None:
    both, only_reference, only_candidate, neither = outcomes
    result = noninferiority(*outcomes, margin, alpha)
    if not (n := sum(outcomes)):
        return None
    difference, p_value, verdict = result.difference, result.p_value, result.verdict
    if stopping == "anytime":
        difference = anytime_difference(*outcomes, confidence=1 - alpha)
        p_value = anytime_p(only_reference, only_candidate, n, margin)
        verdict = decided(*outcomes, margin, alpha) or "inconclusive"
    if verdict == "noninferior" and both + only_reference == 0 and difference.interval.low <= 0:
        verdict = "inconclusive"  # to be no worse than what never succeeds means nothing
    return PairedComparison(
        pairs=n,
        both=both,
        only_reference=only_reference,
        only_candidate=only_candidate,
        neither=neither,
        difference=difference.estimate,
        interval=difference.interval,
        mcnemar_p=mcnemar_exact(only_reference, only_candidate),
        mcnemar_p_worse=mcnemar_exact(only_reference, only_candidate, "less"),
        noninferiority_p=p_value,
        verdict=verdict,
    )


def _by_task(
    pairs_: Sequence[_Pair],
    tasks: Sequence[str],
    arms: tuple[str, str],
    margin: float,
    alpha: float,
    stopping: Stopping,
) -> dict[str, PairedComparison]:
    """The comparison within each task, its intervals and tests corrected for their number.

    Intervals at 1 − alpha / tasks (Bonferroni) hold for all tasks at once; p-values are Holm's.
    """
    if len(tasks) < 2:
        return {}
    found = {}
    for task in tasks:
        outcomes = _outcomes([p for p in pairs_ if p[arms[0]].task == task], arms)
        comparison = _compare(outcomes, margin, alpha / len(tasks), stopping)
        if comparison is not None:
            found[task] = comparison
    adjusted: dict[str, dict[str, float]] = {
        name: holm({task: getattr(comparison, name) for task, comparison in found.items()})
        for name in ("mcnemar_p", "mcnemar_p_worse", "noninferiority_p")
    }
    return {
        task: dataclasses.replace(
            comparison,
            mcnemar_p=adjusted["mcnemar_p"][task],
            mcnemar_p_worse=adjusted["mcnemar_p_worse"][task],
            noninferiority_p=adjusted["noninferiority_p"][task],
        )
        for task, comparison in found.items()
    }


def _median(values: Sequence[float]) -> float | None:
    return stdlib_statistics.median(values) if values else None
