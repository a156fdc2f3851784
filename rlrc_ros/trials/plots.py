"""The report's plots: SVG images as data URIs, each with a text that says the same."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from rlrc_ros.trials.records import EpisodeRecord
from rlrc_ros.trials.summary import SuccessRate, Summary
from rlrc_ros.trials.table import number, quantity, rate_text

PARTS = ("vision", "projector", "llm")

# Okabe and Ito (2008), Color Universal Design: told apart with every common colour vision.
_ARM_COLOURS = ("#0072B2", "#D55E00")
_PART_COLOURS = ("#56B4E9", "#E69F00", "#009E73")
_PART_HATCHES = ("", "//", "..")
WIDTH = 5.2  # inches; as wide as a column of the report, so that text keeps its size
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    # Task names come from people: no formulas in them, and their glyphs from the reader's fonts.
    "text.parse_math": False,
    "svg.fonttype": "none",
    # The same report from the same records, byte for byte.
    "svg.hashsalt": "rlrc",
}


@dataclass(frozen=True)
class Plot:
    """An image and its words.

    Args:
        title: what stands beside it.
        alt: what it shows, in words.
        height: inches; all are equally wide.
        draw: draws it on a figure.

    """

    title: str
    alt: str
    height: float
    draw: Callable[[Figure], None]

    @property
    def uri(self) -> str:
        """As a data URI of SVG."""
        svg = self._saved(format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()

    def png(self) -> bytes:
        """As a PNG for print."""
        return self._saved(format="png")

    def _saved(self, **options: Any) -> bytes:
        """Draws on a figure of its own, outside pyplot's global state, and encodes it."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
            self.draw(figure)
            figure.savefig(buffer, dpi=150, **options)
        return buffer.getvalue()


def success_plot(summary: Summary) -> Plot:
    """Success rates with their intervals, over all episodes and by task."""
    groups: list[tuple[str, Mapping[str, SuccessRate]]] = [
        ("all episodes", {arm: summary.by_arm[arm].success for arm in summary.arms})
    ]
    if len(summary.by_task) > 1:
        groups += [(task or "(no task)", rates) for task, rates in summary.by_task.items()]
    rows = [(group, arm, rates[arm]) for group, rates in groups for arm in summary.arms]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        positions = [i + 0.8 * (i // 2) for i in range(len(rows))]
        for i, (y, (group, _, success)) in enumerate(zip(positions, rows, strict=True)):
            second = i % 2
            if not second:
                axes.text(0, y - 0.75, _short(group), va="center", fontweight="bold")
            if success.rate is not None:
                colour = _ARM_COLOURS[second]
                low, high = (100 * end for end in success.interval)
                axes.plot([low, high], [y, y], color=colour, linewidth=2)
                axes.plot(100 * success.rate, y, "os"[second], color=colour, markersize=7)
            axes.text(103, y, f"{success.successes}/{success.labelled}", va="center")
        axes.set_yticks(positions, [_short(arm) for _, arm, _ in rows])
        axes.set_ylim(positions[-1] + 0.6, -1.2)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"success (%), {100 * (1 - summary.alpha):.3g}% Clopper–Pearson interval")
        axes.grid(axis="x", alpha=0.3)

    alt = "; ".join(f"{group}, {arm}: {rate_text(success)}" for group, arm, success in rows)
    return Plot("Success", f"Success. {alt}.", 1.0 + 0.45 * len(rows), draw)


def latency_plot(records: Sequence[EpisodeRecord], summary: Summary) -> Plot | None:
    """Every episode's median and 99th percentile of latency; None where nothing was measured."""
    rows = []
    for i, arm in enumerate(summary.arms):
        for name in ("p50", "p99"):
            values = [getattr(r, f"latency_ms_{name}") for r in records if r.arm == arm]
            rows.append((i, arm, name, np.array([v for v in values if v is not None], float)))
    measured = np.concatenate([values for *_, values in rows])
    if not measured.size:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        jitter = np.random.default_rng(0)
        for y, (i, _, name, values) in enumerate(rows):
            if not values.size:
                continue
            face = _ARM_COLOURS[i] if name == "p50" else "none"
            axes.scatter(
                values,
                y + jitter.uniform(-0.18, 0.18, values.size),
                s=16,
                marker="os"[i],
                facecolors=face,
                edgecolors=_ARM_COLOURS[i],
                alpha=0.6,
                rasterized=values.size > 200,
            )
            median = float(np.median(values))
            axes.plot([median, median], [y - 0.3, y + 0.3], color="black", linewidth=1.5)
            axes.annotate(
                quantity(median), (median, y - 0.32), ha="center", va="bottom", fontsize=9
            )
        axes.set_yticks(range(len(rows)), [f"{_short(arm)} {name}" for _, arm, name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.75)
        positive = measured[measured > 0]
        if positive.size == measured.size and positive.max() > 10 * positive.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(_plain)
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel("latency (ms), one mark an episode; bar: median")
        axes.grid(axis="x", alpha=0.3)

    alt = "; ".join(
        f"{arm} {name}: median {quantity(float(np.median(values)))} ms over {values.size} episodes"
        for _, arm, name, values in rows
        if values.size
    )
    return Plot("Latency", f"Latency. {alt}.", 3.4, draw)


def size_plot(policies: Mapping[str, Mapping[str, Any]], arms: tuple[str, str]) -> Plot | None:
    """Bytes of weights by part; None where neither policy says."""
    sizes = {
        arm: [(number(policies, arm, "bytes", part) or 0) / 1e6 for part in PARTS] for arm in arms
    }
    totals = {
        arm: (number(policies, arm, "bytes", "total") or 1e6 * sum(sizes[arm])) / 1e6
        for arm in arms
    }
    if not any(totals.values()):
        return None
    most = max(totals.values())

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for y, arm in enumerate(arms):
            left = 0.0
            for part, size in enumerate(sizes[arm]):
                axes.barh(
                    y,
                    size,
                    left=left,
                    height=0.5,
                    color=_PART_COLOURS[part],
                    hatch=_PART_HATCHES[part],
                    edgecolor="black",
                    linewidth=0.6,
                    label=PARTS[part] if y == 0 else None,
                )
                left += size
            # What no part accounts for is left blank rather than added to one of them.
            axes.barh(
                y,
                max(totals[arm] - left, 0),
                left=left,
                height=0.5,
                fill=False,
                edgecolor="black",
                linewidth=0.6,
            )
            axes.text(
                max(totals[arm], left) + most / 50, y, f"{quantity(totals[arm])} MB", va="center"
            )
            parts = zip(PARTS, sizes[arm], strict=True)
            axes.text(
                0,
                y + 0.3,
                " + ".join(f"{part} {quantity(size)}" for part, size in parts if size),
                va="top",
                fontsize=9,
            )
        axes.set_yticks(range(2), [_short(arm) for arm in arms])
        axes.set_ylim(1.7, -0.4)
        axes.set_xlim(0, 1.22 * most)
        axes.set_xlabel("weights as stored (MB)")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_plain)
        figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False)

    alt = "; ".join(
        f"{arm}: {quantity(totals[arm])} MB in all"
        + "".join(f", {part} {quantity(s)} MB" for part, s in zip(PARTS, sizes[arm], strict=True))
        for arm in arms
    )
    return Plot("Size", f"Weights as stored. {alt}.", 2.6, draw)


def width_plot(policies: Mapping[str, Mapping[str, Any]], arms: tuple[str, str]) -> Plot | None:
    """Feed-forward width and attention heads of every LLM layer; None where neither policy says."""
    panels = []
    for key, name in (("ffn", "feed-forward width"), ("heads", "attention heads")):
        lines = []
        for i, arm in enumerate(arms):
            widths = [number(layer, key) for layer in _rows(policies.get(arm, {}).get("layers"))]
            if widths and None not in widths:
                lines.append((i, arm, np.array(widths, float)))
        if lines:
            panels.append((name, lines))
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        for axes, (name, lines) in zip(
            np.atleast_1d(figure.subplots(len(panels), 1, sharex=True)), panels, strict=True
        ):
            _draw_widths(axes, name, lines)
        axes.set_xlabel("layer of the language model")

    alt = "; ".join(
        f"{arm}, {name}: {quantity(int(widths.min()))} to {quantity(int(widths.max()))} "
        f"over {len(widths)} layers"
        for name, lines in panels
        for _, arm, widths in lines
    )
    return Plot("Widths by layer", f"Widths by layer. {alt}.", 1.2 + 1.6 * len(panels), draw)


def _draw_widths(axes: Axes, name: str, lines: Sequence[tuple[int, str, np.ndarray]]) -> None:
    most = max(float(widths.max()) for *_, widths in lines)
    top = 0.0
    for i, arm, widths in lines:
        colour = _ARM_COLOURS[i]
        layers = np.arange(len(widths))
        axes.plot(layers, widths, "os"[i] + ("-", "--")[i], color=colour, markersize=4)
        middle = len(widths) // 2
        near = slice(max(0, middle - 4), middle + 5)
        # Above its own line, unless the other label stands there already.
        below = i == 1 and len(lines) > 1 and abs(top - widths[near].max()) < 0.2 * most
        top = widths[near].max()
        axes.annotate(
            _short(arm),
            (layers[middle], widths[near].min() if below else top),
            xytext=(0, -6 if below else 6),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            color=colour,
        )
    axes.set_ylim(0, 1.25 * most or 1)
    axes.set_ylabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(_plain)
    axes.grid(axis="y", alpha=0.3)


def _plain(value: float, _position: float) -> str:
    """A tick's label: thousands apart, no exponent and no needless decimals."""
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _rows(value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(row, Mapping) for row in value):
        return []
    return list(value)


def _short(text: str, most: int = 24) -> str:
    """A label that fits beside an axis; characters that no XML may hold are replaced."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"
