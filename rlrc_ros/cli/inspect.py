"""`rlrc inspect`: what a bundle is, from its files alone."""

from __future__ import annotations

import argparse
from typing import Any

from rlrc_ros.cli.output import emit

HELP = "show a policy bundle: sizes by part, widths by layer, where it comes from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("policy", help="bundle directory, or the short name of a shipped bundle")


def main(arguments: argparse.Namespace) -> int:
    """Print it."""
    from rlrc_ros.vla.inspection import inspect

    facts = inspect(arguments.policy)
    emit(arguments, facts, _for_people(facts))
    return 0


def _for_people(facts: dict[str, Any]) -> str:
    lines = [f"{facts['name']}  {facts['hash'][:12]}  {facts['bundle_bytes'] / 1e6:.1f} MB"]
    lines.append(f"{'part':<12}{'parameters':>14}{'stored':>12}")
    for part, count in facts["parameters"].items():
        lines.append(f"{part:<12}{count:>14,}{facts['bytes'][part] / 1e6:>9.2f} MB")
    method = facts["quantization"] and facts["quantization"]["method"]
    lines.append(f"stored as {facts['dtype']}{f', {method} in part' if method else ''}")
    for name, layers in (("decoder", facts["layers"]), ("expert", facts["expert_layers"] or [])):
        if layers:
            lines.append(f"{name} layers (query heads / kv heads / feed-forward):")
        for i, widths in enumerate(layers):
            heads = f"{widths['heads']:>3} /{widths['kv_heads']:>3}"
            lines.append(f"  {i:>2}  {heads} /{widths['ffn']:>6}")
    provenance = facts["provenance"]
    stages = [stage["stage"] for stage in provenance.get("stages", [])]
    lines.append(f"made by: {provenance.get('command', 'unknown')}")
    parent = str(provenance.get("parent") or "none")[:12]
    lines.append(f"stages: {' -> '.join(stages) or 'unknown'}; parent: {parent}")
    return "\n".join(lines)
