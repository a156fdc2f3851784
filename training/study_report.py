"""What a study found: a CSV, a table, figures, and the paper's findings put to the test."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlrc_ros.files import write_atomically
from rlrc_ros.trials.statistics import PairedDifference, paired_difference

Result = dict[str, Any]

MARGIN = 0.05
"""Share of episodes: a loss of success that counts as none."""

COLUMNS = (
    *("cell", "method", "kind", "ratio", "quantization", "environment", "episodes", "successes"),
    *("success_rate", "ci_low", "ci_high", "removed_of_layers", "removed_of_llm"),
    *("zeros_of_layers", "zeros_of_llm", "llm_bytes", "llm_bytes_of_original", "model_bytes"),
    *("latency_p50_ms", "latency_p99_ms", "latency_of_original", "latency_ci_low"),
    *("latency_ci_high", "unreachable"),
)

# Okabe and Ito (2008), Color Universal Design: told apart with every common colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
    # The same figures from the same results, byte for byte.
    "svg.hashsalt": "rlrc",
}


def write_report(out: Path, results: Sequence[Result]) -> dict[str, Any]:
    """Write everything into the study's directory; returns what `summary.json` holds."""
    rows = [row for result in results for row in flat(result)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "study.csv", buffer.getvalue())
    write_atomically(out / "table.txt", table(rows))
    found = findings(results)
    lines = [f"{f['verdict']:<13}{f['finding']}\n{'':<13}{f['numbers']}\n" for f in found]
    write_atomically(out / "findings.txt", "".join(lines))
    done = [result for result in results if "unreachable" not in result]
    for name, draw in (
        ("success", success_figure),
        ("latency-and-memory", cost_figure),
        ("quantization-gain", gain_figure),
    ):
        _save(out / f"{name}.svg", draw, done)
    summary = {"cells": rows, "findings": found}
    write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def flat(result: Result) -> list[Result]:
    """One row an environment, of numbers and words only."""
    shared = {key: result[key] for key in COLUMNS if key in result}
    if "unreachable" in result:
        return [shared]
    low, high = result["latency_of_original_ci95"]
    shared |= {
        "llm_bytes": result["memory_bytes"]["llm"],
        "llm_bytes_of_original": result["memory_of_original"]["llm"],
        "model_bytes": result["memory_bytes"]["total"],
        "latency_p50_ms": result["latency_ms"]["p50"],
        "latency_p99_ms": result["latency_ms"]["p99"],
        "latency_ci_low": low,
        "latency_ci_high": high,
    }
    return [
        shared
        | {key: judged[key] for key in ("episodes", "successes", "success_rate")}
        | {"environment": name, "ci_low": judged["ci95"][0], "ci_high": judged["ci95"][1]}
        for name, judged in result["environments"].items()
    ]


def table(rows: Iterable[Result]) -> str:
    """The rows for people."""
    lines = [
        (
            "cell",
            "environment",
            "success % (95%)",
            "of LLM removed",
            "LLM MB",
            "p50 ms",
            "of original",
        )
    ]
    for row in rows:
        if "unreachable" in row:
            lines.append((row["cell"], "–", "not reachable", "", "", "", ""))
            continue
        low, high = 100 * row["ci_low"], 100 * row["ci_high"]
        lines.append(
            (
                row["cell"],
                row["environment"],
                f"{100 * row['success_rate']:.1f} ({low:.1f}–{high:.1f})",
                f"{100 * row['removed_of_llm']:.1f}%",
                f"{row['llm_bytes'] / 1e6:.2f}",
                f"{row['latency_p50_ms']:.2f}",
                f"{row['latency_of_original']:.3f}×",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(c.ljust(w) for c, w in zip(line[:2], widths[:2], strict=True))
        + "".join(f"  {c.rjust(w)}" for c, w in zip(line[2:], widths[2:], strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text) + "\n"


def _pooled(pairs: Iterable[tuple[Result, Result]]) -> PairedDifference | None:
    """First minus second in success over the same scenes of all pairs, with Tango's interval.

    Cells that share scenes are not independent, so the interval is somewhat too narrow.
    """
    counts = np.zeros((2, 2), int)
    for first, second in pairs:
        for place, judged in first["environments"].items():
            other = second["environments"][place]["success"]
            np.add.at(counts, (np.array(judged["success"], int), np.array(other, int)), 1)
    if not counts.sum():
        return None
    return paired_difference(*(int(counts[i]) for i in ((1, 1), (0, 1), (1, 0), (0, 0))))


def findings(results: Sequence[Result]) -> list[dict[str, str]]:
    """The four findings of RLRC's study (arXiv 2506.17639): confirmed, contradicted or open."""
    done = [result for result in results if "unreachable" not in result]
    cells = {(r["method"], r["ratio"], r["quantization"]): r for r in done}

    def quantized(*kinds: str) -> list[tuple[Result, Result]]:
        """(quantized, the same not quantized)."""
        return [
            (r, cells[r["method"], r["ratio"], "none"])
            for r in done
            if r["quantization"] != "none" and r["kind"] in kinds
        ]

    return [
        _quantization_is_cheap(quantized("original", "structured", "sparse")),
        _structured_is_faster(done),
        _they_combine(quantized("structured")),
        _gain_shrinks(quantized("original", "structured")),
    ]


def _finding(finding: str, verdict: str, numbers: str) -> dict[str, str]:
    return {"finding": finding, "verdict": verdict, "numbers": numbers}


def _open(finding: str, lacking: str) -> dict[str, str]:
    return _finding(finding, "open", f"the grid has no {lacking}")


def _points(found: PairedDifference) -> str:
    low, high = 100 * found.interval.low, 100 * found.interval.high
    return f"{100 * found.estimate:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"


def _harmless(found: PairedDifference) -> str:
    """Whether a difference in success is above minus the margin."""
    if found.interval.low >= -MARGIN:
        return "confirmed"
    return "contradicted" if found.interval.high < -MARGIN else "open"


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _quantization_is_cheap(pairs: list[tuple[Result, Result]]) -> dict[str, str]:
    finding = "Quantization hardly hurts success, cuts memory much and time little"
    found = _pooled(pairs)
    if found is None:
        return _open(finding, "quantized cells")
    memory = _median(q["memory_bytes"]["llm"] / n["memory_bytes"]["llm"] for q, n in pairs)
    latency = _median(q["latency_of_original"] / n["latency_of_original"] for q, n in pairs)
    verdict = _harmless(found)
    if verdict == "confirmed" and (memory > 0.6 or latency < memory):
        verdict = "contradicted"
    return _finding(
        finding,
        verdict,
        f"success {_points(found)}; LLM memory {memory:.2f}×, latency {latency:.2f}× (medians)",
    )


def _structured_is_faster(done: list[Result]) -> dict[str, str]:
    finding = "Unstructured pruning hurts less, structured is faster"
    plain = [r for r in done if r["quantization"] == "none"]
    pairs = [
        (sparse, structured)
        for sparse in plain
        for structured in plain
        if (sparse["kind"], structured["kind"]) == ("sparse", "structured")
        and sparse["ratio"] == structured["ratio"]
    ]
    found = _pooled(pairs)
    if found is None:
        return _open(finding, "structured and sparse cells of the same ratio")
    latency = _median(b["latency_of_original"] / a["latency_of_original"] for a, b in pairs)
    if found.interval.low > 0:
        verdict = "confirmed" if latency < 1 else "contradicted"
    else:
        verdict = "contradicted" if found.interval.high < 0 or latency >= 1 else "open"
    return _finding(
        finding,
        verdict,
        f"success of sparse minus structured {_points(found)} at the same ratio; structured takes "
        f"{latency:.2f}× the time of sparse (median)",
    )


def _they_combine(pairs: list[tuple[Result, Result]]) -> dict[str, str]:
    finding = "Structured pruning and quantization combine"
    found = _pooled(pairs)
    if found is None:
        return _open(finding, "cells that are structured and quantized")
    memory = min(q["memory_of_original"]["llm"] for q, _ in pairs)
    alone = min(n["memory_of_original"]["llm"] for _, n in pairs)
    verdict = _harmless(found)
    if verdict == "confirmed" and memory >= alone:
        verdict = "contradicted"
    return _finding(
        finding,
        verdict,
        f"quantizing pruned policies: success {_points(found)}; least LLM memory {alone:.3f}× of "
        f"the original's pruned, {memory:.3f}× with quantization",
    )


def _gain_shrinks(pairs: list[tuple[Result, Result]]) -> dict[str, str]:
    finding = "Quantization's gain in speed shrinks as sparsity grows"
    series = _gains(pairs)
    long = {key: points for key, points in series.items() if len(points) > 1}
    if not long:
        return _open(finding, "quantized cells of several ratios")
    words, shrinks = [], []
    for (method, quantization), points in long.items():
        (least, before), (most, after) = points[0], points[-1]
        shrinks.append(after < before)
        words.append(
            f"{method} {quantization}: {before:.2f}× as fast with {least:.0%} of the LLM removed, "
            f"{after:.2f}× with {most:.0%}"
        )
    verdict = "confirmed" if all(shrinks) else "open" if any(shrinks) else "contradicted"
    return _finding(finding, verdict, "; ".join(words))


def _gains(pairs: list[tuple[Result, Result]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """By method and quantization: share of the LLM removed, and how much faster it got."""
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    methods = dict.fromkeys(q["method"] for q, _ in pairs if q["kind"] == "structured")
    for method in methods:
        for quantized, plain in pairs:
            if quantized["method"] in (method, "original"):
                gain = plain["latency_of_original"] / quantized["latency_of_original"]
                key = (method, quantized["quantization"])
                series.setdefault(key, []).append((plain["removed_of_llm"], gain))
    return {key: sorted(points) for key, points in series.items()}


def success_figure(figure: Figure, results: list[Result]) -> None:
    """Success against sparsity by method; a panel for each quantization and environment."""
    quantizations = list(dict.fromkeys(r["quantization"] for r in results))
    places = list(dict.fromkeys(place for r in results for place in r["environments"]))
    methods = list(dict.fromkeys(r["method"] for r in results if r["kind"] != "original"))
    figure.set_size_inches(4.2 * len(quantizations), 3.4 * len(places) + 0.4)
    grid: Any = figure.subplots(
        len(places), len(quantizations), sharex=True, sharey=True, squeeze=False
    )
    for row, place in zip(grid, places, strict=True):
        for axes, quantization in zip(row, quantizations, strict=True):
            for i, method in enumerate(methods):
                shown = [
                    r
                    for r in results
                    if r["quantization"] == quantization and r["method"] in (method, "original")
                ]
                _series(axes, i, method, sorted(shown, key=lambda r: r["ratio"]), place)
            axes.set_title(f"{place}, {quantization}" if quantization != "none" else place)
            axes.set_ylim(0, 103)
            axes.grid(axis="y", alpha=0.3)
            axes.set_xlabel("of the layers' weights removed or zero (%)")
        row[0].set_ylabel("success (%), 95% interval")
    if methods:
        grid[0][0].legend(fontsize=8)


def _series(axes: Axes, i: int, label: str, shown: list[Result], place: str) -> None:
    rates = np.array([100 * r["environments"][place]["success_rate"] for r in shown])
    ends = 100 * np.array([r["environments"][place]["ci95"] for r in shown]).reshape(-1, 2)
    axes.errorbar(
        [100 * r["ratio"] for r in shown],
        rates,
        np.abs(ends.T - rates),
        label=label,
        color=_COLOURS[i % len(_COLOURS)],
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=5,
        linewidth=1.2,
        elinewidth=0.8,
    )


def cost_figure(figure: Figure, results: list[Result]) -> None:
    """Latency and memory of every configuration."""
    figure.set_size_inches(8, 0.8 + 0.26 * len(results))
    left, right = figure.subplots(1, 2, sharey=True)
    names, places = [r["cell"] for r in results], range(len(results))
    colours = [
        {"none": _COLOURS[0], "nf4": _COLOURS[1]}.get(r["quantization"], _COLOURS[2])
        for r in results
    ]
    # Against the original's beside it: a machine's own speed changes from one cell to the next.
    times = np.array([r["latency_of_original"] for r in results])
    ends = np.array([r["latency_of_original_ci95"] for r in results]).T
    left.barh(places, times, xerr=abs(ends - times), color=colours, error_kw={"linewidth": 1})
    right.barh(places, [r["memory_bytes"]["llm"] / 1e6 for r in results], color=colours)
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlabel("latency against the original's, 95% interval")
    right.set_xlabel("LLM in memory (MB)")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)


def gain_figure(figure: Figure, results: list[Result]) -> None:
    """How much quantization speeds up and shrinks, as sparsity grows."""
    figure.set_size_inches(8, 3.4)
    left, right = figure.subplots(1, 2)
    plain = {(r["method"], r["ratio"]): r for r in results if r["quantization"] == "none"}
    pairs = [
        (r, plain[r["method"], r["ratio"]])
        for r in results
        if r["quantization"] != "none" and r["kind"] != "sparse"
    ]
    for i, ((method, quantization), points) in enumerate(_gains(pairs).items()):
        style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        x, gain = np.array(points).T
        left.plot(100 * x, gain, label=f"{method}, {quantization}", **style)
        memory = sorted(
            (p["removed_of_llm"], p["memory_bytes"]["llm"] / q["memory_bytes"]["llm"])
            for q, p in pairs
            if q["quantization"] == quantization and q["method"] in (method, "original")
        )
        right.plot(*(np.array(memory).T * [[100], [1]]), **style)
    left.set_ylabel("times faster by quantization")
    right.set_ylabel("times less LLM memory by quantization")
    for axes in (left, right):
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xlabel("of the LLM removed (%)")
        axes.grid(alpha=0.3)
    if pairs:
        left.legend(fontsize=8)


def _save(path: Path, draw: Callable[[Figure, list[Result]], None], results: list[Result]) -> None:
    """Draw on a figure of its own, outside pyplot's global state."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        draw(figure, results)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    write_atomically(path, text.getvalue())
