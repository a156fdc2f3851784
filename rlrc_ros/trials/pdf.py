"""The report of a trial as a PDF, for those who file or print it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from fpdf import FPDF
from fpdf.enums import TableBordersLayout
from fpdf.fonts import FontFace

from rlrc_ros.trials.plots import WIDTH
from rlrc_ros.trials.report import Report, content

_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# DejaVu has every sign that the report uses, and matplotlib brings it along.
_STYLES = {"": "DejaVuSans.ttf", "B": "DejaVuSans-Bold.ttf"}
_INK, _SOFT, _LINE = (27, 27, 27), (85, 85, 85), (213, 213, 213)
_COLOURS = {"noninferior": (0, 158, 115), "inferior": (213, 94, 0)}
_WORDS = {
    "noninferior": "Non-inferior",
    "inferior": "Inferior",
    "inconclusive": "Inconclusive",
    "": "No result",
}


class _Paper(FPDF):
    """A4 with the report's fonts and page numbers."""

    def __init__(self, title: str) -> None:
        super().__init__(format="A4")
        for style, file in _STYLES.items():
            self.add_font("DejaVu", style, _FONTS / file)
        self.set_margin(16)
        self.set_auto_page_break(True, 18)
        self.set_title(title)
        self.set_lang("en")

    def footer(self) -> None:
        """Page numbers."""
        self.set_y(-13)
        self.set_font("DejaVu", size=7)
        self.set_text_color(*_SOFT)
        self.cell(0, 6, f"{self.page_no()} of {{nb}}", align="R")

    def words(self, text: str, size: float = 9, bold: bool = False, soft: bool = False) -> None:
        """A paragraph."""
        self.set_font("DejaVu", "B" if bold else "", size)
        self.set_text_color(*(_SOFT if soft else _INK))
        # Text from people may hold what no PDF can.
        text = text.encode(errors="replace").decode()
        self.multi_cell(0, size * 0.5, text, align="L", new_x="LMARGIN", new_y="NEXT")
        self.ln(1.2)

    def heading(self, text: str, room: float = 40) -> None:
        """A section's heading, with so many mm of room for what follows it."""
        if self.will_page_break(room):
            self.add_page()
        self.ln(3)
        self.words(text, 12, bold=True)

    def rows(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[float] | None
    ) -> None:
        """A table."""
        self.set_font("DejaVu", size=7)
        self.set_text_color(*_INK)
        self.set_draw_color(*_LINE)
        with self.table(
            col_widths=None if widths is None else tuple(widths),
            borders_layout=TableBordersLayout.HORIZONTAL_LINES,
            headings_style=FontFace(emphasis="BOLD"),
            text_align="LEFT",
            line_height=3.6,
            padding=0.6,
            first_row_as_headings=bool(any(head)),
        ) as table:
            for row in [head, *rows] if any(head) else rows:
                table.row([cell.encode(errors="replace").decode() for cell in row])
        self.ln(2)


def write_pdf(path: Path, report: Report) -> None:
    """Write a report as a PDF, replaced in one step. It has all but the videos.

    Raises:
        OSError: the file cannot be written.
    """
    page = content(report)
    paper = _Paper(page["title"])
    paper.add_page()
    paper.words(page["title"], 16, bold=True)
    _verdict(paper, page)
    _results(paper, page)
    _pictures(paper, page)
    _pairs(paper, page)
    _origins(paper, page)
    data = bytes(paper.output())
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _verdict(paper: _Paper, page: dict[str, Any]) -> None:
    comparison = page["summary"].comparison
    kind = comparison.verdict if comparison else ""
    top = paper.get_y()
    paper.set_left_margin(20)
    paper.words(_WORDS[kind], 9, bold=True)
    paper.words(page["verdict"], 10.5)
    paper.set_left_margin(16)
    paper.set_x(16)
    paper.set_fill_color(*_COLOURS.get(kind, (119, 119, 119)))
    paper.rect(16, top, 1.4, paper.get_y() - top, style="F")
    paper.set_fill_color(255)
    paper.ln(2)


def _results(paper: _Paper, page: dict[str, Any]) -> None:
    arms = [page["reference"], page["candidate"]]
    paper.heading("Results")
    rows = [[r.metric, r.reference, r.candidate, r.change] for r in page["headline"]]
    paper.rows(["metric", *arms, "difference or ratio"], rows, (30, 34, 34, 42))
    if c := page["summary"].comparison:
        paper.words(
            f"Of {c.pairs} pairs both succeeded in {c.both}, only {arms[0]} in "
            f"{c.only_reference}, only {arms[1]} in {c.only_candidate}, neither in {c.neither}. "
            f"Non-inferiority at {page['margin']} points: one-sided p = {c.noninferiority_p:.3g}, "
            f"shown below {page['summary'].alpha / 2:.3g}. Any difference: p = {c.mcnemar_p:.3g} "
            "(McNemar's exact test)."
        )
    tables = [("Task by task", page["task_table"]), ("How episodes failed", page["failures"])]
    for heading, table in [*tables, *page["exclusions"].items()]:
        if table is not None:
            paper.words(heading, 9.5, bold=True)
            paper.rows(table.columns, table.rows, None)
    for remark in page["remarks"]:
        paper.words(f"• {remark}", 8)
    details = [[r.metric, r.reference, r.candidate] for r in page["details"]]
    paper.words("Everything else that was counted", 9.5, bold=True)
    paper.rows(["metric", *arms], details, (60, 40, 40))


def _pictures(paper: _Paper, page: dict[str, Any]) -> None:
    paper.heading("Plots", room=90)
    for plot in page["plots"]:
        _plot(paper, plot)
    if page["frames"]:
        rows = page["frames"]
        width = paper.epw / len(page["times"])
        paper.heading(f"Frames of pair {page['pair']} at equal time intervals", room=90)
        for row in rows:
            if paper.will_page_break(width + 14):
                paper.add_page()
            paper.words(f"{row.arm}: {row.outcome} after {row.duration}", 8, bold=True)
            top = paper.get_y()
            for i, (time, cell) in enumerate(zip(page["times"], row.cells, strict=True)):
                x = paper.l_margin + i * width
                paper.set_xy(x, top)
                paper.set_font("DejaVu", size=6)
                paper.cell(width, 3, time + (", ended" if cell.ended else ""))
                picture = base64.b64decode(cell.uri.partition(",")[2])
                placed = paper.image(
                    io.BytesIO(picture), x, top + 3.2, width - 1, alt_text=cell.alt
                )
            paper.set_xy(paper.l_margin, top + 4.5 + placed.rendered_height)


def _plot(paper: _Paper, plot: Any) -> None:
    width = 0.6 * paper.epw
    if paper.will_page_break(width * plot.height / WIDTH + 8):
        paper.add_page()
    paper.words(plot.title, 9.5, bold=True)
    paper.image(io.BytesIO(plot.png()), w=width, alt_text=plot.alt)
    paper.ln(2)


def _pairs(paper: _Paper, page: dict[str, Any]) -> None:
    paper.heading("Pairs")
    rows = []
    for number, first, episodes in page["pairs"]:
        cells = []
        for episode in episodes:
            if episode is None:
                cells.append("not run")
                continue
            mark = page["marks"].get(episode.outcome, "")
            mark = {"✓": "✔", "✗": "✘"}.get(mark, mark)
            told = f"{mark} {episode.outcome}: {episode.termination_reason}"
            cells.append(f"{told}, {episode.duration_s:.1f} s")
        what = ": ".join(filter(None, (first.task, first.instruction)))
        rows.append([str(number), *cells, what, str(first.seed), first.arm])
    head = ["pair", page["reference"], page["candidate"], "task", "seed", "run first"]
    paper.rows(head, rows, (9, 34, 34, 42, 15, 20))


def _origins(paper: _Paper, page: dict[str, Any]) -> None:
    for heading, table in page["tables"].items():
        paper.heading(heading)
        paper.rows(table.columns, table.rows, None)
    if page["plan"]:
        paper.heading("The plan, fixed before the first episode")
        paper.rows(["", ""], [list(line) for line in page["plan"]], (1, 3))
    paper.heading("Provenance")
    if page["parts"]:
        paper.rows(page["parts"].columns, page["parts"].rows, None)
    if page["widths"]:
        _plot(paper, page["widths"])
    for arm, lines in page["provenance"].items():
        paper.words(arm, 9.5, bold=True)
        if lines:
            paper.rows(["", ""], [[key, value[:2000]] for key, value in lines], (1, 3))
        else:
            paper.words("Nothing is known about this policy's bundle.")
    paper.heading("How to reproduce")
    for command in page["commands"]:
        paper.words(command, 8)
    paper.words(f"Trial {page['summary'].trial_id}; {page['versions']}", 8, soft=True)
