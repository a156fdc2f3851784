"""`rlrc sft`: supervised fine-tuning of a new or a pruned policy."""

from __future__ import annotations

import argparse
from typing import Any

from rlrc_ros.cli.stages import add_stage_arguments, batches, run_stage, work_directory

HELP = "fine-tune a policy on demonstrations: a new one, or with --policy a pruned one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_stage_arguments(parser, policy=False)
    parser.add_argument(
        "--teacher",
        help="bundle whose distributions `distillation` imitates: the policy before it was pruned",
    )


def main(arguments: argparse.Namespace) -> int:
    """Train."""
    name = "recovered" if arguments.policy else "original"
    return run_stage(arguments, name, _stage, together=True)


def _stage(arguments: argparse.Namespace, config: Any, trainable: Any) -> dict[str, Any]:
    from training import flow, sft
    from training.bundles import load_trainable
    from training.common import pick_device
    from training.ranks import join

    device = pick_device(arguments.device)
    where: dict[str, Any] = {
        "seed": arguments.seed,
        "device": device,
        "work": work_directory(arguments, config, trainable),
        "ranks": join(arguments.device),
    }
    settings = config.recovery if arguments.policy else config.sft
    if trainable.config.architecture.expert is not None:
        return flow.run(settings, trainable, batches(arguments, trainable), **where)
    return sft.run(
        settings,
        trainable,
        batches(arguments, trainable),
        **where,
        latency=config.demonstrations.latency,
        teacher=load_trainable(arguments.teacher, device).model if arguments.teacher else None,
        environment=config.environment,
    )
