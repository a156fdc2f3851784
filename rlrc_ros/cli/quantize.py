"""`rlrc quantize`: a policy's linear layers to NF4 or int8."""

from __future__ import annotations

import argparse
from typing import Any

from rlrc_ros.cli.stages import add_stage_arguments, run_stage

HELP = "quantize a policy to NF4 or int8 with bitsandbytes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_stage_arguments(parser, data=False)


def main(arguments: argparse.Namespace) -> int:
    """Quantize."""
    return run_stage(arguments, "compressed", _stage, _load)


def _load(arguments: argparse.Namespace, config: Any, device: Any) -> Any:
    from training.quantize import load_quantized

    return load_quantized(arguments.policy, config.quantize, device)


def _stage(_: argparse.Namespace, __: Any, trainable: Any) -> dict[str, Any]:
    from training import quantize

    return quantize.facts(trainable)
