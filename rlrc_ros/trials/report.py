"""The report of a trial: one HTML file that needs nothing but a browser, without a network."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from rlrc_ros.files import write_atomically
from rlrc_ros.trials.frames import FrameStrip, jpeg_uri
from rlrc_ros.trials.media import Clip
from rlrc_ros.trials.plots import PARTS, latency_plot, size_plot, success_plot, width_plot
from rlrc_ros.trials.records import EpisodeRecord
from rlrc_ros.trials.summary import Summary
from rlrc_ros.trials.table import MISSING, detail_rows, headline_rows, number, points, quantity
from rlrc_ros.trials.verdict import remarks, verdict

_TEMPLATE = Path(__file__).with_name("report.html")
# A shape beside the colour and the word, for print and for colour-blind readers.
_MARKS = {"success": "✓", "failure": "✗", "partial": "◐", "unlabelled": "?"}
_PACKAGES = ("rlrc-ros", "numpy", "scipy", "torch")


@dataclass(frozen=True)
class _Cell:
    """One frame of the strip."""

    uri: str
    alt: str
    ended: bool


@dataclass(frozen=True)
class _FrameRow:
    arm: str
    outcome: str
    duration: str
    cells: list[_Cell]


@dataclass(frozen=True)
class _Table:
    """A table of text: the columns' heads and the rows."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report tells.

    Args:
        title: its heading.
        summary: what `summarise` made of the records.
        records: every episode, in the order in which they were run.
        policies: for each arm what `rlrc inspect --json` prints; missing keys are left out.
        frames: camera frames of one pair.
        clips: both episodes of pairs side by side.
        plan: what was registered before the trial, as keys and values.
        notes: what a reader should know, one paragraph each.
        exclusions: heading and rows of what was left out or changed after the fact.
        failures: rows that say how episodes failed.
        tables: heading and rows of further tables, such as the stages of the compression.
        commands: the command lines that make this trial and report again.

    """

    title: str
    summary: Summary
    records: Sequence[EpisodeRecord]
    policies: Mapping[str, Mapping[str, Any]]
    frames: FrameStrip | None = None
    clips: Sequence[Clip] = ()
    plan: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    exclusions: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    failures: Sequence[Mapping[str, Any]] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    commands: Sequence[str] = ()


def write_report(path: str | Path, report: Report) -> None:
    """Writes a report: self-contained HTML, no script, replaced in one step.

    Raises:
        OSError: the file cannot be written.

    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate in a note must not cost the report.
    write_atomically(path, template.render(content(report)), errors="replace")


def content(report: Report) -> dict[str, Any]:
    """Everything that a report's page shows, in words, tables and pictures."""
    summary, policies, arms = report.summary, report.policies, report.summary.arms
    counted = [r for r in report.records if r.episode_id not in set(summary.repeated)]
    plots = [success_plot(summary), latency_plot(counted, summary), size_plot(policies, arms)]
    strip, tables = report.frames, {**report.tables}
    return {
        "title": report.title,
        "summary": summary,
        "reference": arms[0],
        "candidate": arms[1],
        "verdict": verdict(summary),
        "confidence": f"{100 * (1 - summary.alpha):.3g}%",
        "margin": f"{100 * summary.margin:.3g}",
        "headline": headline_rows(summary, policies),
        "details": detail_rows(summary),
        "task_table": _task_table(summary),
        "remarks": [*remarks(summary), *report.notes],
        "plots": [plot for plot in plots if plot is not None],
        "pair": None if strip is None else strip.pair,
        "times": [] if strip is None else [f"{time:.1f} s" for time in strip.columns()],
        "frames": [] if strip is None else _frame_rows(strip, arms),
        "clips": report.clips,
        "failures": _table(report.failures) if report.failures else None,
        "exclusions": {name: _table(rows) for name, rows in report.exclusions.items() if rows},
        "pairs": _pairs(counted, arms),
        "marks": _MARKS,
        "tables": {heading: _table(rows) for heading, rows in tables.items() if rows},
        "plan": report.plan,
        "parts": _parts(policies, arms),
        "widths": width_plot(policies, arms),
        "provenance": {arm: _provenance(policies.get(arm, {})) for arm in arms},
        "commands": list(report.commands),
        "seeds": _ranges({record.seed for record in report.records}),
        "versions": _versions(),
    }


def _task_table(summary: Summary) -> _Table | None:
    """The comparison within each task; None where there is but one."""
    columns = ["task", "pairs", *summary.arms, "difference (points)", "p, non-inferior", "p, any"]
    rows = []
    for task, c in summary.task_comparisons.items():
        successes = (c.both + c.only_reference, c.both + c.only_candidate)
        low, high = (points(end, sign=True) for end in c.interval)
        difference = f"{points(c.difference, sign=True)} ({low} to {high})"
        p_values = [f"{p:.3g}" for p in (c.noninferiority_p, c.mcnemar_p)]
        counts = [f"{n}/{c.pairs}" for n in successes]
        rows.append([task, str(c.pairs), *counts, difference, *p_values])
    return _Table(columns, rows) if rows else None


def _frame_rows(strip: FrameStrip, arms: Sequence[str]) -> list[_FrameRow]:
    rows = []
    for arm in arms:
        if arm not in strip.episodes:
            continue
        episode = strip.episodes[arm]
        cells = []
        for time in strip.columns():
            frame, ended = strip.frame(arm, time)
            alt = f"{arm} at {time:.1f} s" + (", after its end" if ended else "")
            cells.append(_Cell(jpeg_uri(frame), alt, ended))
        rows.append(_FrameRow(arm, episode.outcome, f"{episode.duration_s:.1f} s", cells))
    return rows


def _pairs(
    records: Iterable[EpisodeRecord], arms: Sequence[str]
) -> list[tuple[int, EpisodeRecord, list[EpisodeRecord | None]]]:
    """Pair number, the episode run first (for what both share), and each arm's episode."""
    by_pair: dict[int, dict[str, EpisodeRecord]] = {}
    for record in records:
        by_pair.setdefault(record.pair, {})[record.arm] = record
    return [
        (pair, min(episodes.values(), key=lambda r: r.order), [episodes.get(arm) for arm in arms])
        for pair, episodes in sorted(by_pair.items())
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> _Table:
    """Rows as text; the columns in the order in which they first come up."""
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    texts = [{str(key): _text(value) for key, value in row.items()} for row in rows]
    return _Table(columns, [[row.get(column, MISSING) for column in columns] for row in texts])


def _parts(policies: Mapping[str, Mapping[str, Any]], arms: Sequence[str]) -> _Table | None:
    """Parameters and bytes of weights by part."""
    rows = []
    for part in (*PARTS, "total"):
        numbers = [
            number(policies, arm, key, part) for key in ("parameters", "bytes") for arm in arms
        ]
        if any(value is not None for value in numbers):
            texts = [quantity(None if value is None else value / 1e6) for value in numbers]
            rows.append([part, *texts])
    columns = ["part", *(f"{arm}, {unit}" for unit in ("10⁶ parameters", "MB") for arm in arms)]
    return _Table(columns, rows) if rows else None


def _provenance(policy: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known about a bundle's origin."""
    lines = [
        (key, _exact(policy[key])) for key in ("name", "hash", "quantization") if key in policy
    ]
    provenance = policy.get("provenance")
    return lines + (list(_flat(provenance)) if isinstance(provenance, Mapping) else [])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as one list, their keys joined by dots."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _exact(value)


def _text(value: object) -> str:
    """A table's cell: numbers to five digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"
    return _exact(value)


def _exact(value: object) -> str:
    """A value as it was written down."""
    if value is None or value == "":
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _ranges(numbers: Iterable[int]) -> str:
    """Whole numbers with runs drawn together: 1–3, 7."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs) or MISSING


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
