"""Kill `rlrc trial run` 50 times at random moments, over real nodes, and count what is lost.

    python docs/results/trials/kill.py --out runs/kill --result docs/results/trials/kill.json

The nodes run on; the process that runs the trial gets SIGKILL after a random time and is started
again. After every kill the log is compared with what had been acknowledged before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import rlrc_ros.trials.client
import rlrc_ros.vla.bundle  # noqa: F401, for the processes that are forked
from rlrc_ros.cli.main import main as command_line
from rlrc_ros.paths import config_file
from rlrc_ros.profile import load_profile
from rlrc_ros.trials import seal
from rlrc_ros.trials.plan import lock, read_draft
from rlrc_ros.trials.runner import trial_nodes
from rlrc_ros.trials.session import LOG, TrialSession, read_trial
from rlrc_ros.trials.simulated import running_nodes

EPISODE = 1.5
"""s, so that many episodes fit between the kills."""
SOONEST, LATEST = 0.0, 8.0
"""s from the moment the process has resumed the trial to its kill."""


def main() -> int:
    """Do it; 1 where anything was lost, doubled or reassigned."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the trial's directory")
    parser.add_argument("--result", type=Path, required=True, help="JSON file")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draft = read_draft(config_file("trials", "tabletop"))
    plan = lock(replace(draft, pairs=arguments.pairs, max_duration=EPISODE), Path())
    directory = arguments.out
    with TrialSession.create(directory, plan) as session:
        specs = trial_nodes(session, load_profile("sim"))
    drawn = {k: p.arm for k, p in seal.sealed_policies(directory / seal.FILE).items()}
    rng = random.Random(arguments.seed)
    problems: list[str] = []
    moments: Counter[str] = Counter()
    known: dict[int, tuple[object, ...]] = {}
    with running_nodes(specs, directory / "nodes") as alive:
        time.sleep(10)
        for kill in range(arguments.kills):
            alive()
            after = rng.uniform(SOONEST, LATEST)
            killed = _run(directory, after)
            view = read_trial(directory)
            moments[view.state if killed else "had ended"] += 1
            now = {t.number: (t.step, t.episode_id, t.labels) for t in view.trials}
            for number, before in known.items():
                # Of a trial that was running or unlabelled only the labels may be new.
                if now.get(number, ())[:2] != before[:2] or (before[2] and now[number] != before):
                    problems.append(f"kill {kill}: trial {number} was {before}")
            known = now
            print(f"{kill + 1}/{arguments.kills} {view.state} {view.progress()}", flush=True)
            if not killed:
                break
        while not problems and read_trial(directory).state != "complete":
            _run(directory, None)
    with TrialSession.open(directory) as session:
        allocation = session.unblind()
        records, trials = session.records(), session.trials
    places = Counter((r.pair, r.arm) for r in records)
    wanted = {(pair, arm) for pair in range(plan.pairs) for arm in plan.arms}
    lost = [place for place in wanted if not places[place]]
    doubled = [place for place in wanted if places[place] > 1]
    reassigned = [label for label, arm in drawn.items() if allocation[label] != arm]
    result = {
        "kills": sum(moments.values()) - moments["had ended"],
        "state_at_kill": dict(moments),
        "trials": len(trials),
        "interrupted": sum(t.termination_reason == "interrupted" for t in trials),
        "analysed": len(records),
        "expected": len(wanted),
        "lost": lost,
        "doubled": doubled,
        "reassigned": reassigned,
        "changed": problems,
        "seed": arguments.seed,
    }
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if lost or doubled or reassigned or problems else 0


def _run(directory: Path, kill_after: float | None) -> bool:
    """Run the command in a process; whether it had to be killed.

    Forked from this one, where everything is imported already: imports take most of the time that
    a new process needs, and in them nothing can be lost.
    """
    runs = _resumed(directory)
    words = ["trial", "run", str(directory), "--attach", "--unattended"]
    process = multiprocessing.get_context("fork").Process(target=command_line, args=(words,))
    process.start()
    if kill_after is None:
        process.join()
        return False
    deadline = time.monotonic() + 60
    while process.is_alive() and _resumed(directory) == runs and time.monotonic() < deadline:
        time.sleep(0.01)
    process.join(kill_after)
    if not process.is_alive():
        return False
    process.kill()
    process.join()
    return True


def _resumed(directory: Path) -> int:
    return (directory / LOG).read_bytes().count(b'"resumed"')


if __name__ == "__main__":
    sys.exit(main())
