"""`rlrc trial`: a blinded A/B trial, from the plan to the report."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrc_ros.cli import trial_console
from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError

if TYPE_CHECKING:
    from rlrc_ros.trials.plan import Draft, Plan
    from rlrc_ros.trials.session import TrialSession
    from rlrc_ros.trials.state import Trial, TrialView

HELP = "run a blinded A/B trial: plan, run, unblind, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do, each with its own arguments."""
    parser.epilog = "Every action takes --json."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text)

    plan = action("plan", "lock a draft into a plan, and say what it can detect")
    plan.add_argument("draft", help="a YAML file, or the name of one in config/trials")
    plan.add_argument("--out", type=Path, required=True, help="the plan's file")
    plan.add_argument("--pairs", type=int, help="instead of what the draft says")

    begin = action("begin", "draw the order of the policies, before nodes are launched")
    begin.add_argument("directory", type=Path, help="the trial's directory")
    begin.add_argument("--plan", type=Path, required=True, help="the locked plan")
    begin.add_argument("--operator", default=getpass.getuser(), help="who begins it")

    run = action("run", "begin a trial, or resume it")
    run.add_argument("directory", type=Path, help="the trial's directory")
    run.add_argument("--plan", type=Path, help="the locked plan, for a trial that is to begin")
    run.add_argument(
        "--unattended",
        action="store_true",
        help="on the simulated arm: its state judges every episode, nobody is asked",
    )
    run.add_argument(
        "--attach", action="store_true", help="use nodes that run already (trial.launch.py)"
    )
    run.add_argument("--operator", default=getpass.getuser(), help="who labels (default: you)")

    trial_console.add_arguments(action("console", trial_console.HELP))

    status = action("status", "say how far a trial has come, without its lock")
    status.add_argument("directory", type=Path, help="the trial's directory")

    correct = action("correct", "change the label of a trial; the earlier ones stay in the log")
    correct.add_argument("directory", type=Path, help="the trial's directory")
    correct.add_argument("trial", type=int, help="its number")
    correct.add_argument("outcome", choices=("success", "failure", "partial"))
    correct.add_argument("--score", type=float, help="0 to 100, where it is partial")
    correct.add_argument("--reason", required=True, help="why")
    correct.add_argument("--operator", default=getpass.getuser(), help="who says so")

    unblind = action("unblind", "end a trial and say which policy ran when")
    unblind.add_argument("directory", type=Path, help="the trial's directory")
    unblind.add_argument("--reason", default="", help="why it ends before it is complete")

    report = action("report", "write the report of an unblinded trial: HTML and PDF")
    report.add_argument("directory", type=Path, help="the trial's directory")
    report.add_argument("--out", type=Path, help="the HTML file (default: DIRECTORY/report.html)")


def main(arguments: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    return {
        "plan": _plan,
        "begin": _begin,
        "run": _run,
        "console": trial_console.main,
        "status": _status,
        "correct": _correct,
        "unblind": _unblind,
        "report": _report,
    }[arguments.action](arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict, replace

    from rlrc_ros.paths import config_file
    from rlrc_ros.trials.plan import lock, read_draft

    path = config_file("trials", arguments.draft)
    draft = read_draft(path)
    if arguments.pairs is not None:
        draft = replace(draft, pairs=arguments.pairs)
    plan = lock(draft, path.parent)
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; a plan is never overwritten, name another")
    if path.parent.resolve() != arguments.out.parent.resolve() and _images(plan):
        raise UserError(f"{arguments.out}: write it beside the draft, where the images are")
    promise = _promise(draft, plan)
    plan.write(arguments.out)
    text = "\n".join([*promise["lines"], f"locked: {arguments.out}, SHA-256 {plan.sha256}"])
    emit(arguments, {"plan": asdict(plan), "sha256": plan.sha256, **promise["numbers"]}, text)
    return 0


def _images(plan: Plan) -> bool:
    return any(start.image for task in plan.tasks for start in task.starts)


def _promise(draft: Draft, plan: Plan) -> dict[str, Any]:
    """What the plan can detect, in words and numbers."""
    from rlrc_ros.trials import power
    from rlrc_ros.trials.statistics import fewest_pairs

    comparisons = len(plan.candidates)
    alpha, p = plan.alpha / comparisons, plan.assumed_success
    d = power.assumed_discordance(p, plan.assumed_discordance)
    n, margin = plan.pairs, plan.margin

    def reached(difference: float) -> float:
        return power.power(n, margin, alpha, d, difference, plan.stopping)

    numbers = {
        "pairs": n,
        "episodes": n * len(plan.arms),
        "power_equal": reached(0.0),
        "power_half_margin_worse": reached(-margin / 2),
        "error_at_margin": reached(-margin),
        "detectable_margin": power.detectable_margin(n, alpha, plan.power, d),
        "fewest_pairs": fewest_pairs(margin, alpha),
        "longest_hours": n * len(plan.arms) * plan.max_duration / 3600,
    }
    chosen = "as given" if draft.pairs else f"by power analysis for {plan.power:.0%}"
    most = "at most " if plan.stopping == "anytime" else ""
    lines = [
        f"{plan.name}: {', '.join(plan.candidates)} against {plan.reference}",
        f"{most}{n} pairs ({chosen}), {n * len(plan.arms)} episodes, at most "
        f"{numbers['longest_hours']:.1f} h of motion",
        f"assumed: both succeed in {p:.0%}, and differ in {d:.0%} of the pairs",
        f"non-inferiority at {100 * margin:g} points (one-sided {alpha / 2:.3g}) is then shown "
        f"with probability {numbers['power_equal']:.0%};",
        f"with a candidate {50 * margin:g} points worse {numbers['power_half_margin_worse']:.0%}, "
        f"and wrongly, with one {100 * margin:g} points worse, {numbers['error_at_margin']:.1%}",
        f"so many pairs, looked at once, show a margin of "
        f"{100 * numbers['detectable_margin']:.1f} points with {plan.power:.0%}",
    ]
    if plan.stopping == "anytime":
        times = power.decision_times(n, margin, alpha, d)
        numbers["median_pairs"] = float(sorted(times)[len(times) // 2])
        lines.append(
            f"with equal arms half of all trials end by pair {numbers['median_pairs']:.0f}; "
            "probabilities are simulated, the error is bounded by proof"
        )
    if n < numbers["fewest_pairs"]:
        lines.append(
            f"WARNING: {n} pairs are too few: showing this margin takes {numbers['fewest_pairs']} "
            "even when both arms end alike in every pair"
        )
    return {"lines": lines, "numbers": numbers}


def _begin(arguments: argparse.Namespace) -> int:
    with open_session(arguments) as session:
        text = f"{session.trial_id}, {session.state}: launch the nodes, then `rlrc trial run`"
        emit(arguments, {"trial_id": session.trial_id, "state": session.state}, text)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    # Before anything else: what is missing should be said at once.
    import rlrc_ros.trials.client  # noqa: F401
    from rlrc_ros.profile import load_profile

    with open_session(arguments) as session:
        profile = load_profile(session.plan.robot)
        if arguments.unattended and not profile.simulated:
            raise UserError(f"{profile.name} is a real arm: nobody but a person can label there")
        if session.state in ("ready", "stopped"):
            _run_rest(arguments, session, profile)
        progress = session.progress()
        done = session.state in ("complete", "unblinded")
        text = f"{progress.done} of {progress.steps} trials are done; "
        place = arguments.directory
        text += f"next: rlrc trial {'unblind' if done else 'run'} {place}"
        emit(arguments, {"state": session.state, **vars(progress)}, text)
    return 0


def open_session(arguments: argparse.Namespace) -> TrialSession:
    """The trial, begun or resumed."""
    from rlrc_ros.trials.plan import read_plan
    from rlrc_ros.trials.session import TrialSession, is_begun

    directory, path = arguments.directory, arguments.plan
    begun = is_begun(directory)
    if not begun and path is None:
        raise UserError(f"{directory} holds no trial; begin one with --plan PLAN.yaml")
    if not begun:
        plan = read_plan(path)
        return TrialSession.create(directory, plan, arguments.operator, path.parent)
    session = TrialSession.open(directory, arguments.operator)
    if path is not None and read_plan(path) != session.plan:
        session.close()
        raise UserError(f"{directory} holds a trial of another plan than {path}")
    return session


def _run_rest(arguments: argparse.Namespace, session: TrialSession, profile: Any) -> None:
    from rlrc_ros.trials.operator import Operator
    from rlrc_ros.trials.simulated import run_rest, running_robot

    with running_robot(session, profile, attach=arguments.attach) as robot:
        if arguments.unattended:
            run_rest(session, robot, _progress(session))
        else:
            Operator(session, robot, simulated=profile.simulated).run()


def _progress(session: TrialSession) -> Any:
    def say(trial: Trial) -> None:
        progress = session.progress()
        left = progress.seconds_left
        more = "" if left is None else f"  {left / 60:.0f} min left"
        print(
            f"{progress.done:>4}/{progress.steps} {trial.outcome:<7} {trial.duration:5.1f} s"
            f"{more}  {trial.instruction}",
            file=sys.stderr,
            flush=True,
        )

    return say


def _status(arguments: argparse.Namespace) -> int:
    from rlrc_ros.trials.session import read_trial

    view = read_trial(arguments.directory)
    progress = view.progress()
    lines = [
        f"{view.trial_id}, {view.state}: {progress.done} of {progress.steps} trials done, "
        f"{progress.excluded} excluded, {progress.interrupted} interrupted"
    ]
    lines += [_line(trial) for trial in view.trials]
    emit(arguments, {"state": view.state, **vars(progress)}, "\n".join(lines))
    return 0


def _line(trial: Trial) -> str:
    ended = trial.termination_reason or "running"
    told = f"excluded: {trial.excluded}" if trial.excluded else trial.outcome
    return f"{trial.number:>4}  {trial.started[:19]}  {told:<10} {ended:<14} {trial.instruction}"


def _correct(arguments: argparse.Namespace) -> int:
    from rlrc_ros.trials.session import TrialSession

    with TrialSession.open(arguments.directory, arguments.operator) as session:
        trial = session.correct(
            arguments.trial, arguments.outcome, arguments.score, reason=arguments.reason
        )
    emit(arguments, {"trial": trial.number, "outcome": trial.outcome}, _line(trial))
    return 0


def _unblind(arguments: argparse.Namespace) -> int:
    from rlrc_ros.trials.session import TrialSession

    with TrialSession.open(arguments.directory) as session:
        allocation = session.unblind(arguments.reason)
    lines = [f"{label}: {arm}" for label, arm in allocation.items()]
    emit(arguments, allocation, "\n".join(lines))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rlrc_ros.trials.dossier import write_dossier
    from rlrc_ros.trials.session import read_trial
    from rlrc_ros.trials.verdict import verdict

    directory: Path = arguments.directory
    view = read_trial(directory)
    out = arguments.out or directory / "report.html"
    written = write_dossier(
        directory,
        out,
        _policies(view),
        commands=[f"rlrc trial report {directory}"],
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    data = {
        name: {"report": [str(path) for path in paths], "trial": summary.to_dict()}
        for name, (summary, paths) in written.items()
    }
    lines = []
    for summary, paths in written.values():
        lines += [verdict(summary), *map(str, paths)]
    emit(arguments, data, "\n".join(lines))
    return 0


def _policies(view: TrialView) -> dict[str, dict[str, Any]]:
    """Facts of the bundles, as far as they are still there as they were."""
    from rlrc_ros.vla import load_policy
    from rlrc_ros.vla.inspection import inspect

    found: dict[str, dict[str, Any]] = {}
    for name, arm in view.plan.arms.items():
        found[name] = {"name": arm.policy, "hash": arm.hash}
        with contextlib.suppress(UserError):
            facts = inspect(arm.policy)
            if facts["hash"] == arm.hash:
                found[name] = {**facts, "memory": load_policy(arm.policy).weight_bytes()}
    return found
