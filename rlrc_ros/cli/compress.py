"""`rlrc compress`: demonstrations to quantized policy, every stage."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rlrc_ros.cli.output import emit

HELP = "run the whole pipeline: demonstrations, SFT, pruning, recovery by SFT and PPO, quantization"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "config",
        help="the run's YAML: a file, or the name of one of the package's own (tabletop, tiny, "
        "pi0_tabletop, libero)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the run's directory; a run that was stopped goes on",
    )
    parser.add_argument(
        "--skip-evaluation",
        action="store_true",
        help="only make the bundles; run again without it to evaluate them, here or elsewhere",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def main(arguments: argparse.Namespace) -> int:
    """Run it and print a table of the stages."""
    from rlrc_ros.paths import config_file
    from training.compress import Pipeline
    from training.config import load_config
    from training.ranks import refuse_launch

    refuse_launch("compress")
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    config = load_config(config_file("training", arguments.config))
    pipeline = Pipeline(config, arguments.out, arguments.device, say)
    summary = pipeline.run(not arguments.skip_evaluation)
    emit(arguments, summary, f"{table(summary)}\nbundles and summary.json: {arguments.out}")
    return 0


def table(summary: dict[str, Any]) -> str:
    """The stages, one line each."""
    lines = [f"{'stage':<14}{'LLM parameters':>15}{'bundle MB':>11}{'success':>9}   95% interval"]
    for stage in summary["stages"]:
        line = f"{stage['name']:<14}{stage['parameters']['llm']:>15,}"
        line += f"{stage['bundle_bytes'] / 1e6:>11.2f}"
        if "success_rate" in stage:
            low, high = (100 * x for x in stage["ci95"])
            line += f"{100 * stage['success_rate']:>8.1f}%   "
            line += f"{low:.1f} to {high:.1f}% of {stage['episodes']}"
        lines.append(line)
    return "\n".join(lines)
