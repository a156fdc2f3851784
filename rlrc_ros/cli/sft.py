"""`rlrc sft`: supervised fine-tuning of a new or a pruned policy."""

from __future__ import annotations

import argparse
from typing import Any

from rlrc_ros.cli.stages import add_stage_arguments, batches, run_stage, work_directory

HELP = "fine-tune a policy on demonstrations: a new one, or with --policy a pruned one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_stage_arguments(parser, policy=False)


def main(arguments: argparse.Namespace) -> int:
    """Train."""
    return run_stage(arguments, "recovered" if arguments.policy else "original", _stage)


def _stage(arguments: argparse.Namespace, config: Any, trainable: Any) -> dict[str, Any]:
    from training import sft
    from training.common import pick_device

    return sft.run(
        config.recovery if arguments.policy else config.sft,
        trainable,
        batches(arguments, trainable),
        seed=arguments.seed,
        device=pick_device(arguments.device),
        work=work_directory(arguments, config, trainable),
        latency=config.demonstrations.latency,
        environment=config.environment,
    )
