"""`rlrc prune`: structured pruning of a policy's decoder."""

from __future__ import annotations

import argparse
from typing import Any

from rlrc_ros.cli.stages import add_stage_arguments, batches, run_stage
from rlrc_ros.errors import UserError

HELP = "prune a policy's decoder: whole layers, then heads and feed-forward channels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_stage_arguments(parser, demonstrations=False)


def main(arguments: argparse.Namespace) -> int:
    """Prune."""
    return run_stage(arguments, "pruned", _stage, _load)


def _load(arguments: argparse.Namespace, config: Any, device: Any) -> Any:
    from training.bundles import load_trainable

    if config.prune.importance in ("taylor", "activation") and not arguments.demonstrations:
        raise UserError(
            f"prune: importance '{config.prune.importance}' is measured on demonstrations; name "
            "some with --demonstrations, or take 'magnitude'"
        )
    return load_trainable(arguments.policy, device, pi0=True)


def _stage(arguments: argparse.Namespace, config: Any, trainable: Any) -> dict[str, Any]:
    from training import prune, prune_pi0

    found = batches(arguments, trainable) if arguments.demonstrations else None
    pi0 = trainable.config.architecture.expert is not None
    return (prune_pi0 if pi0 else prune).run(config.prune, trainable, found, seed=arguments.seed)
