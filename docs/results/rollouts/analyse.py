"""What `compare.sh` found: success of every policy, and paired differences.

    python docs/results/rollouts/analyse.py EPISODES BEFORE > result.json

EPISODES holds ARM-SEED.jsonl, BEFORE is the log of the policy that training began with. Of a single
policy the difference has Tango's interval; of an arm with all its seeds it is the mean over seeds
in each scene, with a bootstrap over scenes (10,000 draws, percentiles), as the seeds share them.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rlrc_ros.trials.statistics import clopper_pearson, paired_difference

ARMS = ("base", "rollouts", "corrections", "recorded")


def _read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["seed"]: line for line in lines if "success" in line}


def _against(after, before):
    scenes = sorted(before)
    assert sorted(after) == scenes
    won = [(before[s]["success"], after[s]["success"]) for s in scenes]
    table = [won.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]
    found = paired_difference(*table)
    return {"difference": found.estimate, "interval": found.interval, "table": table}


def _bootstrap(values):
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(axis=1)
    return {
        "difference": float(values.mean()),
        "interval": np.percentile(means, (2.5, 97.5)).tolist(),
    }


def _rates(runs):
    scenes = sorted(runs[0])
    return np.array([[run[s]["success"] for s in scenes] for run in runs], float).mean(axis=0)


directory, before = Path(sys.argv[1]), _read(Path(sys.argv[2]))
policies, arms = {}, {}
runs = {arm: [_read(p) for p in sorted(directory.glob(f"{arm}-[0-9].jsonl"))] for arm in ARMS}
for arm in ARMS:
    for seed, run in enumerate(runs[arm]):
        successes = sum(line["success"] for line in run.values())
        families = {line["family"] for line in run.values()}
        policies[f"{arm}-{seed}"] = {
            "successes": successes,
            "episodes": len(run),
            "interval": clopper_pearson(successes, len(run)),
            "mean_steps": float(np.mean([line["steps"] for line in run.values()])),
            "families": {
                name: sum(line["success"] for line in run.values() if line["family"] == name)
                for name in sorted(families)
            },
            "against_before": _against(run, before),
        }
        if arm != "base" and seed < len(runs["base"]):
            policies[f"{arm}-{seed}"]["against_base"] = _against(run, runs["base"][seed])
    if runs[arm]:
        rates = _rates(runs[arm])
        seeds = min(len(runs[arm]), len(runs["base"]))
        arms[arm] = {
            "seeds": len(runs[arm]),
            "success": float(rates.mean()),
            "against_before": _bootstrap(rates - _rates([before])),
        }
        if arm != "base":
            both = _rates(runs[arm][:seeds]) - _rates(runs["base"][:seeds])
            arms[arm]["against_base"] = _bootstrap(both)
        if arm == "corrections":
            seeds = min(len(runs[arm]), len(runs["rollouts"]))
            both = _rates(runs[arm][:seeds]) - _rates(runs["rollouts"][:seeds])
            arms[arm]["against_rollouts"] = _bootstrap(both)
print(json.dumps({"arms": arms, "policies": policies}, indent=1))
