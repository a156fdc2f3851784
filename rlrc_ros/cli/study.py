"""`rlrc study`: a grid of pruning methods, ratios and quantizations, each made and evaluated."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from rlrc_ros.cli.arguments import whole_number
from rlrc_ros.cli.output import emit

HELP = "study compression: prune, quantize and evaluate over a grid; writes a table and figures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "config",
        help="the study's YAML: a file, or tabletop or tiny for the package's own",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the study's directory; a study that was stopped goes on",
    )
    parser.add_argument("--policy", help="another policy to compress than the configuration's")
    parser.add_argument(
        "--demonstrations",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="directories of shards to calibrate and recover with (default: some are recorded)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        help="of the evaluation: processes, or environments on a GPU (default: one a processor, "
        "or 128)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run it and print the table and the findings."""
    from rlrc_ros.paths import config_file
    from training.study import Study
    from training.study_config import load_study

    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    config = load_study(config_file("study", arguments.config))
    if arguments.policy:
        config = replace(config, policy=arguments.policy)
    study = Study(
        config,
        arguments.out,
        arguments.device,
        say,
        demonstrations=arguments.demonstrations,
        workers=arguments.workers,
    )
    summary = study.run()
    text = "\n".join((arguments.out / name).read_text() for name in ("table.txt", "findings.txt"))
    emit(arguments, summary, f"{text}written to {arguments.out}")
    return 0
