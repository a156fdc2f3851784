"""A trial's numbers as text, side by side for both policies."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlrc_ros.trials.summary import SuccessRate, Summary

MISSING = "–"


@dataclass(frozen=True)
class Row:
    """One metric as text: its value for each arm, and what changed from reference to candidate."""

    metric: str
    reference: str
    candidate: str
    change: str = ""


def headline_rows(
    summary: Summary, policies: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Row]:
    """Success, latency and size: what the terminal's table shows.

    `policies` holds for each arm what `rlrc inspect --json` prints, of which `bundle_bytes` is the
    bundle's size on the disk, and under `memory` the bytes of weights that the running policy
    holds, by part. What is missing shows as "–".
    """
    reference, candidate = (summary.by_arm[arm] for arm in summary.arms)
    c = summary.comparison
    success = Row(
        "success",
        rate_text(reference.success),
        rate_text(candidate.success),
        MISSING
        if c is None
        else f"{points(c.difference, sign=True)} points "
        f"({points(c.interval.low, sign=True)} to {points(c.interval.high, sign=True)}) "
        f"over {c.pairs} pair{'' if c.pairs == 1 else 's'}",
    )
    rows = [success]
    for name, attribute in (("p50", "latency_ms_p50"), ("p99", "latency_ms_p99")):
        values = [getattr(arm, attribute) for arm in (reference, candidate)]
        rows.append(_ratio_row(f"latency {name} (ms)", values, "faster", "slower"))
    for name, keys in (
        ("bundle size (MB)", ("bundle_bytes",)),
        ("LLM in memory (MB)", ("memory", "llm")),
        ("model in memory (MB)", ("memory", "total")),
    ):
        sizes = [number(policies or {}, arm, *keys) for arm in summary.arms]
        values = [None if size is None else size / 1e6 for size in sizes]
        rows.append(_ratio_row(name, values, "smaller", "larger"))
    return rows


def detail_rows(summary: Summary) -> list[Row]:
    """Everything else that is counted by arm."""
    reference, candidate = (summary.by_arm[arm] for arm in summary.arms)

    def row(metric: str, attribute: str) -> Row:
        return Row(metric, *(quantity(getattr(arm, attribute)) for arm in (reference, candidate)))

    rows = [
        row("worst latency p99 of any episode (ms)", "latency_ms_p99_worst"),
        row("median duration (s)", "duration_s"),
        row("median time to success (s)", "time_to_success_s"),
        row("path smoothness, SPARC (0 is smoothest)", "sparc"),
        row("control steps", "steps"),
        row("deadline misses", "deadline_misses"),
        row("skipped steps", "skipped_steps"),
        row("episodes", "episodes"),
        row("partial outcomes", "partial"),
        row("unlabelled", "unlabelled"),
    ]
    for prefix, attribute in (("ended", "terminations"), ("guard", "guard")):
        counters = [getattr(arm, attribute) for arm in (reference, candidate)]
        rows += [
            Row(f"{prefix}: {name}", *(str(counter.get(name, 0)) for counter in counters))
            for name in sorted(set().union(*counters))
            if any(counter.get(name, 0) for counter in counters)
        ]
    return rows


def text_table(
    summary: Summary,
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    width: int | None = None,
) -> str:
    """The headline rows as aligned plain text; for `policies` see `headline_rows`.

    width: wrap the last column so that no line is longer than this many characters.
    """
    lines = [("", *summary.arms, "difference or ratio")]
    lines += [dataclasses.astuple(row) for row in headline_rows(summary, policies)]
    *widths, last = (max(map(len, column)) for column in zip(*lines, strict=True))
    indent = sum(widths) + 2 * len(widths)
    if width is not None:
        last = min(last, max(16, width - indent))
    rows = []
    for *cells, change in lines:
        start = "".join(cell.ljust(w) + "  " for cell, w in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(change, last) or [""]
        rows += [(start + wrapped[0]).rstrip(), *(" " * indent + more for more in wrapped[1:])]
    return "\n".join(rows)


def number(values: Mapping[str, Any], *keys: str) -> float | None:
    """A finite number from 0 up in nested mappings; None where there is none under these keys."""
    value: Any = values
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if 0 <= value <= sys.float_info.max else None


def rate_text(success: SuccessRate) -> str:
    """Successes of tries, the rate and its interval: "18/20 = 90% (68–99%)"."""
    if success.rate is None:
        return MISSING
    decimals = 1 if success.labelled > 100 else 0
    rate, low, high = (f"{100 * share:.{decimals}f}" for share in (success.rate, *success.interval))
    return f"{success.successes}/{success.labelled} = {rate}% ({low}–{high}%)"


def quantity(value: float | None) -> str:
    """A number to three significant digits, never in exponent notation; whole numbers whole."""
    if value is None:
        return MISSING
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}".replace("-", "−")
    decimals = 0 if value == 0 else max(0, 2 - int(f"{value:e}".split("e")[1]))
    return f"{value:.{decimals}f}".replace("-", "−")


def points(difference: float, *, sign: bool = False) -> str:
    """A difference of proportions in percentage points to one decimal."""
    text = f"{100 * difference:{'+' if sign else ''}.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _ratio_row(metric: str, values: Sequence[float | None], less: str, more: str) -> Row:
    reference, candidate = values
    change = MISSING
    if reference and candidate:
        ratio = max(reference / candidate, candidate / reference)
        change = f"{quantity(ratio)}× {less if candidate < reference else more}"
        if f"{ratio:.2f}" == "1.00":
            change = "the same"
    return Row(metric, quantity(reference), quantity(candidate), change)
