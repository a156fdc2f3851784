"""From a trial's directory to its reports: reads the log and the bags, and writes HTML and PDF."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.profile import load_profile
from rlrc_ros.trials.media import Clip, Footage, frame_strip, read_footage, side_by_side
from rlrc_ros.trials.pdf import write_pdf
from rlrc_ros.trials.plan import Plan
from rlrc_ros.trials.records import EpisodeRecord
from rlrc_ros.trials.report import Report, write_report
from rlrc_ros.trials.session import read_trial
from rlrc_ros.trials.smoothness import path_sparc
from rlrc_ros.trials.state import INTERRUPTED, SIMULATOR, TrialView
from rlrc_ros.trials.summary import Summary, summarise

_BAD_BAGS_SHOWN = 5


@dataclasses.dataclass
class _Found:
    """What the bags held."""

    records: list[EpisodeRecord]
    clips: dict[str, list[Clip]]
    """By candidate."""
    strips: dict[str, Any]
    notes: list[str]


def summaries(view: TrialView, records: Sequence[EpisodeRecord]) -> dict[str, Summary]:
    """The comparison of every candidate with the reference, corrected for their number."""
    plan = view.plan
    return {
        candidate: summarise(
            records,
            (plan.reference, candidate),
            margin=plan.margin,
            alpha=plan.alpha / len(plan.candidates),
            stopping=plan.stopping,
        )
        for candidate in plan.candidates
    }


def write_dossier(
    directory: Path,
    out: Path,
    policies: Mapping[str, Mapping[str, Any]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    commands: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, tuple[Summary, list[Path]]]:
    """Write the reports of a trial, one HTML file and one PDF for every candidate.

    Args:
        directory: the trial, unblinded.
        out: the HTML file; the PDF lies beside it. With several candidates their names are added.
        policies: for each arm what `rlrc inspect --json` prints.
        title: heading; empty: the plan's name.
        notes: what a reader should know besides.
        tables: heading and rows of further tables.
        commands: the command lines that make this trial and report again.
        progress: told what goes on.

    Returns:
        For every candidate the comparison, and the files.

    Raises:
        UserError: there is no such trial, it is blinded, or a file of it is damaged.
    """
    view = read_trial(directory)
    plan = view.plan
    found = _look_at_bags(directory, view, progress)
    written = {}
    for candidate, summary in summaries(view, found.records).items():
        arms = (plan.reference, candidate)
        records = [r for r in found.records if r.arm in arms]
        path = out
        if len(plan.candidates) > 1:
            path = out.with_name(f"{out.stem}-{candidate}{out.suffix}")
        report = Report(
            title=title or plan.name,
            summary=summary,
            records=records,
            policies=policies,
            frames=found.strips.get(candidate),
            clips=found.clips.get(candidate, []),
            plan=plan_lines(view),
            notes=[*_notes(view), *found.notes, *notes],
            exclusions=exclusions(view),
            failures=failures(view, records, arms),
            tables=tables or {},
            commands=commands,
        )
        progress(f"writing {path.name} and {path.with_suffix('.pdf').name}")
        write_report(path, report)
        write_pdf(path.with_suffix(".pdf"), report)
        written[candidate] = (summary, [path, path.with_suffix(".pdf")])
    return written


def plan_lines(view: TrialView) -> list[tuple[str, str]]:
    """The plan, as keys and values to read."""
    plan = view.plan
    rule = {
        "fixed": f"{plan.pairs} pairs, looked at once",
        "anytime": f"anytime-valid betting test after every pair, {plan.pairs} pairs at most",
    }[plan.stopping]
    lines = [
        ("plan's SHA-256", plan.sha256),
        ("registered", f"{view.opened} (first line of the trial's log)"),
        ("robot", plan.robot),
        *((f"arm {name}", f"{arm.policy}, hash {arm.hash}") for name, arm in plan.arms.items()),
        ("stopping", rule),
        ("margin δ", f"{100 * plan.margin:.3g} percentage points"),
        ("α", f"{plan.alpha:g}, two-sided" + _shared_alpha(plan)),
        ("power", f"{plan.power:g} wanted where both arms succeed in {plan.assumed_success:g}"),
        ("longest episode", f"{plan.max_duration:g} s"),
        ("seed", str(plan.seed)),
        ("exclusion rules", "; ".join(plan.exclusions) or "none"),
    ]
    for task in plan.tasks:
        starts = f"{len(task.starts)} initial states"
        told = filter(None, (task.instruction, task.rubric, starts))
        lines.append((f"task {task.name}", ". ".join(told)))
    return lines


def exclusions(view: TrialView) -> dict[str, list[dict[str, Any]]]:
    """Trials that were left out, and labels that were changed."""

    def row(trial: Any) -> dict[str, Any]:
        arm = view.allocation[view.steps[trial.step].policy_label]
        return {
            "trial": trial.number,
            "pair": trial.pair,
            "policy": arm,
            "begun": _time(trial.started),
        }

    left_out = [
        {
            **row(trial),
            "why": trial.excluded or trial.message,
            "ended": trial.termination_reason,
            "outcome": trial.outcome,
            "notes": trial.exclusion_notes,
        }
        for trial in view.trials
        if trial.excluded or trial.termination_reason == INTERRUPTED
    ]
    corrected = [
        {
            **row(trial),
            "from": before.outcome,
            "to": label.outcome,
            "why": label.reason,
            "by": label.operator,
            "corrected": _time(label.time),
        }
        for trial in view.trials
        for before, label in zip(trial.labels, trial.labels[1:], strict=False)
    ]
    return {
        "Trials left out, and run again in the same place": left_out,
        "Labels corrected before unblinding": corrected,
    }


def failures(
    view: TrialView, records: Sequence[EpisodeRecord], arms: tuple[str, str]
) -> list[dict[str, Any]]:
    """How episodes failed, by how they ended and what was noted, most frequent first."""
    labels = {t.episode_id: t.labels[-1] for t in view.trials if t.labels}
    modes: Counter[tuple[str, str]] = Counter()
    for record in records:
        if record.outcome in ("success", "unlabelled"):
            continue
        label = labels[record.episode_id]
        # What a simulator writes into every label tells no modes apart.
        noted = "" if label.operator == SIMULATOR else label.notes or label.reason
        told = [record.outcome, record.termination_reason, noted or record.message]
        modes[": ".join(filter(None, told)), record.arm] += 1
    names = sorted({name for name, _ in modes}, key=lambda n: -sum(modes[n, a] for a in arms))
    return [{"how": name, **{arm: modes[name, arm] for arm in arms}} for name in names]


def _time(stamp: str) -> str:
    """An ISO 8601 time to the second; all are in UTC."""
    return stamp[:19].replace("T", " ")


def _shared_alpha(plan: Plan) -> str:
    if len(plan.candidates) == 1:
        return ""
    return f", shared by {len(plan.candidates)} candidates (Bonferroni)"


def _notes(view: TrialView) -> list[str]:
    lines = []
    progress = view.progress()
    if view.finished:
        lines.append(
            f"The trial ended after {progress.pairs_done} of at most {progress.pairs} pairs: "
            f"{view.finished}."
        )
    hashes = [arm.hash for arm in view.plan.arms.values()]
    if len(set(hashes)) < len(hashes):
        lines.append("Arms have the same bundle: a trial of a policy against itself.")
    return lines


def _look_at_bags(directory: Path, view: TrialView, progress: Callable[[str], None]) -> _Found:
    """Smoothness, frames and clips; one pair's pictures are held at a time."""
    plan = view.plan
    profile = load_profile(plan.robot)
    by_pair: dict[int, list[EpisodeRecord]] = {}
    for record in view.records():
        by_pair.setdefault(record.pair, []).append(record)
    found = _Found([], {name: [] for name in plan.candidates}, {}, [])
    best: dict[str, int] = {}
    bad = []
    for done, (pair, records) in enumerate(sorted(by_pair.items()), start=1):
        footage: dict[str, Footage] = {}
        for record in records:
            sparc = None
            try:
                if not record.bag_uri:
                    raise UserError(f"{record.episode_id}: nothing was recorded")
                one = footage[record.arm] = read_footage(directory / record.bag_uri, profile)
                sparc = path_sparc(one.pose_times, one.positions)
            except UserError as error:
                bad.append(str(error))
            found.records.append(dataclasses.replace(record, sparc=sparc))
        for candidate in plan.candidates:
            arms = [plan.reference, candidate]
            shown = {arm: footage[arm] for arm in arms if arm in footage}
            if len(shown) < 2:
                continue
            ends = {r.arm: (r.outcome, r.duration_s) for r in records if r.arm in arms}
            outcomes = [ends[arm][0] for arm in arms]
            caption = f"pair {pair}: {records[0].instruction or records[0].task}"
            caption += f" ({' | '.join(outcomes)})"
            if clip := side_by_side(pair, caption, shown, ends):
                found.clips[candidate].append(clip)
            # The strip shows a pair that both solved, or else the one with most successes.
            successes = outcomes.count("success")
            if successes > best.get(candidate, -1) and (strip := frame_strip(pair, shown, ends)):
                best[candidate], found.strips[candidate] = successes, strip
        if done % 10 == 0 or done == len(by_pair):
            progress(f"{done} of {len(by_pair)} pairs looked at")
    if bad:
        more = f" and {len(bad) - _BAD_BAGS_SHOWN} more" if len(bad) > _BAD_BAGS_SHOWN else ""
        found.notes.append(
            "Recordings that are missing or cannot be read, so that these episodes have neither "
            f"pictures nor smoothness: {'; '.join(bad[:_BAD_BAGS_SHOWN])}{more}."
        )
    return found
