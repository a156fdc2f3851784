"""`rlrc rl`: recovery by PPO with critic warm-up and BC regularization."""

from __future__ import annotations

import argparse
from typing import Any

from rlrc_ros.cli.stages import add_stage_arguments, batches, run_stage, work_directory

HELP = "recover a policy by PPO with critic warm-up and BC regularization"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_stage_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Train."""
    return run_stage(arguments, "rl", _stage, together=True)


def _stage(arguments: argparse.Namespace, config: Any, trainable: Any) -> dict[str, Any]:
    from training import rl
    from training.common import pick_device
    from training.ranks import join

    return rl.run(
        config.rl,
        trainable,
        batches(arguments, trainable),
        seed=arguments.seed,
        device=pick_device(arguments.device),
        work=work_directory(arguments, config, trainable),
        latency=config.demonstrations.latency,
        environment=config.environment,
        ranks=join(arguments.device),
    )
