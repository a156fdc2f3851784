"""`rlrc eval`: success and latency of a policy over many scenes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError

HELP = "evaluate a policy over many simulated scenes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--policy", required=True, help="bundle directory, or the short name of a shipped bundle"
    )
    parser.add_argument("--env", choices=["tabletop"], default="tabletop", help="where")
    parser.add_argument("--episodes", type=int, default=100, help="how many scenes (default 100)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the first scene's seed; the others follow"
    )
    parser.add_argument(
        "--swap-instruction",
        action="store_true",
        help="show another valid instruction of the scene; success is still judged by its own",
    )
    parser.add_argument(
        "--against", help="a second policy on the same scenes: adds the paired difference"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--engine", default="auto", choices=["auto", "eager", "unrolled"], help="default auto"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="default auto"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a processor)")
    parser.add_argument(
        "--log", type=Path, help="keep every episode in this file (JSON lines); resumes from it"
    )


def main(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    from rlrc_ros.vla.bundle import resolve
    from training.evaluate import Evaluation, compare, evaluate, summarise

    if arguments.episodes < 1:
        raise UserError(f"--episodes {arguments.episodes}: must be at least 1")
    task = Evaluation(
        policy=resolve(arguments.policy),
        episodes=arguments.episodes,
        seed=arguments.seed,
        swap_instruction=arguments.swap_instruction,
        engine=arguments.engine,
        dtype=arguments.dtype,
    )
    results = evaluate(task, arguments.device, arguments.workers, arguments.log)
    summary: dict[str, Any] = {
        "policy": arguments.policy,
        "env": arguments.env,
        "seed": arguments.seed,
    }
    summary |= summarise(results)
    if arguments.against:
        log = arguments.log and arguments.log.with_name(
            f"{arguments.log.stem}-against{arguments.log.suffix}"
        )
        other = evaluate(
            replace(task, policy=resolve(arguments.against)),
            arguments.device,
            arguments.workers,
            log,
        )
        summary["against"] = {"policy": arguments.against, **summarise(other)}
        summary["paired_difference"] = compare(results, other)
    emit(arguments, summary, _for_people(summary))
    return 0


def _for_people(summary: dict[str, Any]) -> str:
    lines = []
    for facts in filter(None, [summary, summary.get("against")]):
        lines.append(f"{facts['policy']}: {_rate(facts)}")
        lines += [f"  {family:<6} {_rate(rate)}" for family, rate in facts["families"].items()]
        latency = facts["latency_ms"]
        if latency["p50"] is not None:
            lines.append(f"  latency p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms")
    if "paired_difference" in summary:
        d = summary["paired_difference"]
        low, high = (100 * x for x in d["ci95"])
        lines.append(
            f"{summary['policy']} minus {summary['against']['policy']}, same scenes: "
            f"{100 * d['difference']:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"
        )
    return "\n".join(lines)


def _rate(facts: dict[str, Any]) -> str:
    low, high = (100 * x for x in facts["ci95"])
    return (
        f"{100 * facts['success_rate']:.1f}% of {facts['episodes']} episodes "
        f"(95% interval {low:.1f} to {high:.1f})"
    )
