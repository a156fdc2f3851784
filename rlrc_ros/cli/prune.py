"""`rlrc prune`: structured pruning of a policy's decoder."""

from __future__ import annotations

import argparse
from typing import Any

from rlrc_ros.cli.stages import add_stage_arguments, batches, run_stage

HELP = "prune a policy's decoder: whole layers, then heads and feed-forward channels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_stage_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Prune."""
    return run_stage(arguments, "pruned", _stage)


def _stage(arguments: argparse.Namespace, config: Any, trainable: Any) -> dict[str, Any]:
    from training import prune

    return prune.run(config.prune, trainable, batches(arguments, trainable), seed=arguments.seed)
