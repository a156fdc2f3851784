"""What the verbs of single training stages share: `rlrc sft`, `prune`, `rl` and `quantize`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlrc_ros.cli.arguments import seed
from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError

Stage = Callable[[argparse.Namespace, Any, Any], dict[str, Any]]
"""(arguments, configuration, trainable policy) -> facts for the provenance; trains in place."""
Load = Callable[[argparse.Namespace, Any, Any], Any]
"""(arguments, configuration, device) -> policy, where it is not the whole one in float32."""


def add_stage_arguments(
    parser: argparse.ArgumentParser,
    *,
    data: bool = True,
    policy: bool = True,
    demonstrations: bool = True,
) -> None:
    """Add the arguments every stage takes; `demonstrations`: whether there must be some."""
    parser.add_argument(
        "config",
        help="the pipeline's YAML, of which the stage's section is used: a file, or the "
        "name of one of the package's own (tabletop, tiny, pi0_tabletop, libero)",
    )
    parser.add_argument(
        "--policy",
        required=policy,
        help="bundle to start from: a directory, or the short name of a shipped one",
    )
    parser.add_argument("--out", type=Path, required=True, help="the new bundle's directory")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    if data:
        parser.add_argument(
            "--demonstrations",
            type=Path,
            nargs="+",
            required=demonstrations,
            default=[],
            metavar="DIR",
            help="directories of shards",
        )
        parser.add_argument("--seed", type=seed, default=0, help="of the training (default 0)")


def run_stage(
    arguments: argparse.Namespace,
    name: str,
    stage: Stage,
    load: Load | None = None,
    *,
    together: bool = False,
) -> int:
    """Load, train, save, and say what was made; an existing bundle is not replaced.

    together: whether several processes can do it, of which the first one saves.
    """
    import numpy as np

    from rlrc_ros.paths import config_file
    from training.bundles import load_trainable, new_trainable
    from training.common import forget_checkpoints, pick_device, seed_everything
    from training.config import load_config
    from training.data.demonstrations import read_proprioception
    from training.ranks import join, refuse_launch

    if not together:
        refuse_launch(arguments.verb)
    ranks = join(arguments.device)
    if arguments.out.exists():
        raise UserError(f"{arguments.out}: is there already; name another directory, or delete it")
    config = load_config(config_file("training", arguments.config))
    device = pick_device(arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=arguments.out.parent):
        pass  # better to find out before the training than after it
    if load:
        trainable = load(arguments, config, device)
    elif arguments.policy:
        trainable = load_trainable(arguments.policy, device, pi0=True)
    else:
        seed_everything(arguments.seed)
        seen = np.concatenate([read_proprioception(d) for d in arguments.demonstrations])
        trainable = new_trainable(config.model, seen, device, config.environment)
    facts = stage(arguments, config, trainable)
    ranks.leave()
    if not ranks.first:
        return 0
    bundle = trainable.save(arguments.out, name, **facts)
    forget_checkpoints(_work(arguments))
    emit(
        arguments,
        {"bundle": str(bundle.path), "hash": bundle.hash, **facts},
        _text(bundle.path, bundle.hash, facts),
    )
    return 0


def batches(arguments: argparse.Namespace, trainable: Any) -> Any:
    """Everything in the directories given, on the device; for pi0 with chunks of actions."""
    from training.common import pick_device
    from training.flow import batches_for

    found = batches_for(trainable, pick_device(arguments.device))
    for directory in arguments.demonstrations:
        found.take(directory)
    return found


def work_directory(arguments: argparse.Namespace, config: Any, trainable: Any) -> Path:
    """Where logs, checkpoints and corrections of a stage go: beside the bundle.

    Raises:
        UserError: what an earlier command left there was made from something else.
    """
    from training.common import claim
    from training.config import stated
    from training.ranks import join

    work = _work(arguments)
    made_from = {
        "policy": trainable.parent and trainable.parent.hash,
        "demonstrations": [str(directory) for directory in arguments.demonstrations],
        "seed": arguments.seed,
        "config": stated(config),
    }
    if join(arguments.device).first:
        claim(work, made_from)
    return work


def _work(arguments: argparse.Namespace) -> Path:
    return arguments.out.with_name(f"{arguments.out.name}-work")


def _text(path: Path, digest: str, facts: dict[str, Any]) -> str:
    return "\n".join(
        [f"{path}  {digest[:12]}", *(f"  {name}: {_short(value)}" for name, value in facts.items())]
    )


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
