"""Check the trials' statistics by simulation: errors, coverage, power, and A against A.

    python docs/results/trials/simulate.py --out docs/results/trials/simulation.json

Every share comes with its exact 95% interval (Clopper and Pearson). One-sided tests are at 2.5%.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from rlrc_ros.paths import config_file
from rlrc_ros.trials.plan import lock, read_draft
from rlrc_ros.trials.power import assumed_discordance, pair_probabilities, pairs_needed, power
from rlrc_ros.trials.sequential import anytime_difference, decided, log_capital
from rlrc_ros.trials.session import Ended, TrialSession
from rlrc_ros.trials.statistics import clopper_pearson, paired_difference, tango_score
from rlrc_ros.trials.summary import summarise

ALPHA = 0.05
SIZES = (10, 20, 30, 60, 100, 200, 500)
CASES = ((0.1, 0.1), (0.1, 0.3), (0.2, 0.2), (0.2, 0.4))
"""Margin and share of pairs in which only one arm succeeds."""
FIRST_LOOK = 10


def main() -> int:
    """Do it; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--trials", type=int, default=2000, help="simulated trials a row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    result: dict[str, Any] = {"seed": arguments.seed, "trials": arguments.trials}
    for name, part in (
        ("type_1_error", type_1_error),
        ("coverage", coverage),
        ("power", power_against_promise),
    ):
        result[name] = part(rng, arguments.trials)
        print(name, *map(json.dumps, result[name]), sep="\n  ", flush=True)
    result["a_against_a"] = a_against_a(rng)
    print(json.dumps(result["a_against_a"], indent=1))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    broken = [
        row
        for row in result["type_1_error"]
        if row["betting, every pair"]["interval"][0] > ALPHA / 2
    ]
    return 1 if broken else 0


def share(count: int, n: int) -> dict[str, Any]:
    """A rate with its interval."""
    low, high = clopper_pearson(count, n)
    return {"rate": round(count / n, 5), "interval": [round(low, 5), round(high, 5)]}


def paths(
    rng: np.random.Generator, trials: int, n: int, discordance: float, difference: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that only the reference and only the candidate won, after every pair: (trials, n)."""
    outcomes = rng.choice(3, p=pair_probabilities(discordance, difference), size=(trials, n))
    return np.cumsum(outcomes == 0, axis=1), np.cumsum(outcomes == 1, axis=1)


def tango_shows(worse: np.ndarray, better: np.ndarray, n: int, margin: float) -> np.ndarray:
    """Whether Tango's test shows non-inferiority, for the counts of many trials of n pairs."""
    cells, where = np.unique(np.stack([worse, better], axis=1), axis=0, return_inverse=True)
    enough = -float(ndtri(ALPHA / 2))
    scores = [tango_score(0, a, b, n - a - b, -margin) for a, b in cells.tolist()]
    return (np.array(scores) > enough)[where.ravel()]


def type_1_error(rng: np.random.Generator, trials: int) -> list[dict[str, Any]]:
    """Non-inferiority shown of a candidate worse by the margin, with and without peeking."""
    rows = []
    for margin, discordance in CASES:
        worse, better = paths(rng, trials, max(SIZES), discordance, -margin)
        looks = np.arange(1, max(SIZES) + 1)
        capital = np.vstack(  # in blocks, for the memory it takes
            [
                log_capital(worse[i : i + 100], better[i : i + 100], looks, -margin)
                >= math.log(2 / ALPHA)
                for i in range(0, trials, 100)
            ]
        )
        peeked = np.zeros(trials, bool)
        at = {}
        for n in range(FIRST_LOOK, max(SIZES) + 1):
            shown = tango_shows(worse[:, n - 1], better[:, n - 1], n, margin)
            peeked |= shown
            if n in SIZES:
                at[n] = (shown.copy(), peeked.copy())
        for n, (once, ever) in at.items():
            rows.append(
                {
                    "pairs": n,
                    "margin": margin,
                    "discordance": discordance,
                    "Tango, once, exact": round(power(n, margin, ALPHA, discordance, -margin), 5),
                    "Tango, once": share(int(once.sum()), trials),
                    "Tango, every pair from the 10th": share(int(ever.sum()), trials),
                    "betting, every pair": share(int(capital[:, :n].any(axis=1).sum()), trials),
                }
            )
    return rows


def coverage(rng: np.random.Generator, trials: int) -> list[dict[str, Any]]:
    """How often 95% intervals hold the truth: Tango's at n, the betting one at every look."""
    trials = min(trials, 1000)
    rows = []
    for difference, discordance in ((0.0, 0.1), (0.0, 0.3), (-0.1, 0.3)):
        worse, better = paths(rng, trials, 200, discordance, difference)
        for n in (10, 30, 60, 100, 200):
            pairs = list(zip(worse[:, n - 1].tolist(), better[:, n - 1].tolist(), strict=True))
            known = {p: paired_difference(0, *p, n - sum(p)).interval for p in set(pairs)}
            held = sum(known[p].low <= difference <= known[p].high for p in pairs)
            lower = log_capital(worse, better, np.arange(1, 201), difference)[:, :n].max(axis=1)
            upper = log_capital(better, worse, np.arange(1, 201), -difference)[:, :n].max(axis=1)
            always = np.maximum(lower, upper) < math.log(2 / ALPHA)
            betting = {p: anytime_difference(0, *p, n - sum(p)).interval for p in set(pairs)}
            rows.append(
                {
                    "pairs": n,
                    "difference": difference,
                    "discordance": discordance,
                    "Tango": share(held, trials),
                    "betting, at every look": share(int(always.sum()), trials),
                    "width, Tango": _mean_width([known[p] for p in pairs]),
                    "width, betting": _mean_width([betting[p] for p in pairs]),
                }
            )
    for p in (0.5, 0.8, 0.95):
        for n in (10, 60, 500):
            successes = Counter(rng.binomial(n, p, trials).tolist())
            held = sum(k for s, k in successes.items() if _holds(clopper_pearson(s, n), p))
            rows.append({"n": n, "success": p, "Clopper-Pearson": share(held, trials)})
    return rows


def _holds(interval: tuple[float, float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def _mean_width(intervals: list[Any]) -> float:
    return round(float(np.mean([high - low for low, high in intervals])), 4)


def power_against_promise(rng: np.random.Generator, trials: int) -> list[dict[str, Any]]:
    """The share of trials of the planned n that show non-inferiority, arms being equal."""
    rows = []
    for margin, success in ((0.15, 0.9), (0.2, 0.8), (0.1, 0.95)):
        d = assumed_discordance(success)
        for stopping in ("fixed", "anytime"):
            n = pairs_needed(margin, ALPHA, 0.8, success, None, stopping)  # type: ignore[arg-type]
            worse, better = paths(rng, trials, n, d, 0.0)
            if stopping == "fixed":
                shown = tango_shows(worse[:, -1], better[:, -1], n, margin)
                used = float(n)
            else:
                enough = log_capital(worse, better, np.arange(1, n + 1), -margin)
                enough = enough >= math.log(2 / ALPHA)
                shown = enough.any(axis=1)
                used = float(np.where(shown, enough.argmax(axis=1) + 1, n).mean())
            promised = power(n, margin, ALPHA, d, stopping=stopping)  # type: ignore[arg-type]
            rows.append(
                {
                    "margin": margin,
                    "success": success,
                    "stopping": stopping,
                    "pairs": n,
                    "promised": round(promised, 4),
                    "found": share(int(shown.sum()), trials),
                    "mean pairs used": round(used, 1),
                }
            )
    return rows


def a_against_a(rng: np.random.Generator) -> dict[str, Any]:
    """200 whole trials of 30 pairs of a policy against itself, through log, seal and analysis."""
    draft = read_draft(config_file("trials", "tabletop"))
    arms = dict.fromkeys(("reference", "candidate"), draft.arms["original"])
    plan = lock(replace(draft, arms=arms, pairs=30), Path())
    trials, success = 200, 0.8
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        for i in range(trials):
            with TrialSession.create(Path(directory) / str(i), plan) as session:
                while session.state == "ready":
                    trial = session.start()
                    session.stop(trial.number, Ended(termination_reason="finished"))
                    session.label(trial.number, "success" if rng.random() < success else "failure")
                session.unblind()
                records = session.records()
            summary = summarise(records, ("reference", "candidate"), margin=plan.margin)
            c = summary.comparison
            assert c is not None
            found["inferior at the margin"] += c.verdict == "inferior"
            found["interval below 0"] += c.interval.high < 0
            found["McNemar, worse, at 2.5%"] += c.mcnemar_p_worse <= ALPHA / 2
            outcomes = (c.both, c.only_reference, c.only_candidate, c.neither)
            found["betting, inferior at the margin"] += decided(*outcomes, plan.margin, ALPHA) == (
                "inferior"
            )
    return {
        "trials": trials,
        "pairs": plan.pairs,
        "success": success,
        "margin": plan.margin,
        **{f"worse: {name}": share(found[name], trials) for name in sorted(found)},
    }


if __name__ == "__main__":
    sys.exit(main())
