"""What a trial showed, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from rlrc_ros.trials.summary import Summary
from rlrc_ros.trials.table import points


def verdict(summary: Summary) -> str:
    """What the trial showed, in one sentence that claims no more than the interval allows."""
    reference, candidate = summary.arms
    c = summary.comparison
    if c is None:
        return (
            "No pair of episodes has an outcome for both policies yet, so this trial says nothing "
            "about success."
        )
    margin = f"{100 * summary.margin:.3g} points"
    level = f"{100 * (1 - summary.alpha):.3g}%"
    low, high = c.interval
    counts = (
        f"{candidate} succeeded in {c.both + c.only_candidate} of "
        f"{_count(c.pairs, 'pair')} and {reference} in {c.both + c.only_reference}"
    )
    interval = (
        f"{level} interval of the difference {points(low, sign=True)} to "
        f"{points(high, sign=True)} points"
    )
    if c.both + c.only_reference == 0 and low <= 0:
        return (
            f"This trial cannot tell the policies apart: {reference} never succeeded, and to be no "
            f"worse than that means nothing ({counts})."
        )
    if c.verdict == "noninferior":
        if low > 0:
            claim = f"{candidate} is better than {reference}"
        elif high < 0:
            claim = f"{candidate} is worse than {reference}, but by less than {margin}"
        else:
            claim = f"{candidate} is not worse than {reference} by {margin} or more"
        return f"Shown: {claim} ({counts}; {interval})."
    if c.verdict == "inferior":
        claim = f"{candidate} is worse than {reference} by more than {margin}"
        return f"Shown: {claim} ({counts}; {interval})."
    if high < 0:
        can = f"{candidate} is worse, by {points(-high)} to {points(-low)} points"
    else:
        can = (
            f"{candidate} is at most {points(-low)} points worse and at most "
            f"{points(high)} points better"
        )
    can = f"what it shows, at {level} confidence, is that {can} ({counts})"
    aim = f"{candidate} is less than {margin} worse than {reference} (non-inferiority)"
    if c.pairs < summary.fewest_pairs:
        few = "pair is" if c.pairs == 1 else "pairs are"
        return (
            f"This trial cannot show that {aim}: {c.pairs} {few} too few, as it takes "
            f"{summary.fewest_pairs} even when both policies end alike in every pair; {can}."
        )
    return f"This trial does not show that {aim}; {can}."


def remarks(summary: Summary) -> list[str]:
    """How episodes were counted and what was left out, one plain sentence each."""
    lines = []
    c = summary.comparison
    if c is not None and c.both == c.pairs:
        lines.append(
            "Every episode succeeded: the tasks may be too easy to show a difference that harder "
            "ones would."
        )
    if summary.partial:
        lines.append(f"Partial outcomes count as not successful: {_listed(summary.partial)}.")
    if summary.unlabelled:
        lines.append(
            "Unlabelled episodes are left out of the success rates, which is fair only if nobody "
            f"chose which to label: {_listed(summary.unlabelled)}."
        )
    if summary.unlabelled_pairs:
        lines.append(
            "Pairs left out of the comparison because an episode is unlabelled: "
            f"{_listed(summary.unlabelled_pairs)}."
        )
    if summary.incomplete_pairs:
        lines.append(
            "Pairs left out of the comparison because only one episode was run: "
            f"{_listed(summary.incomplete_pairs)}."
        )
    if summary.repeated:
        lines.append(
            "Episodes left out because the first one run in a place counts: "
            f"{_listed(summary.repeated)}."
        )
    if summary.mismatched_pairs:
        lines.append(
            "Pairs whose episodes differ in seed, task or instruction, though the comparison "
            f"takes them as alike: {_listed(summary.mismatched_pairs)}."
        )
    return lines


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _listed(items: Sequence[object], most: int = 10) -> str:
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
