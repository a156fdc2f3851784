"""`rlrc eval`: success and latency of a policy over many scenes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrc_ros.cli.arguments import seed, whole_number
from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError
from rlrc_ros.timing import percentiles, synthetic_observation, timed

if TYPE_CHECKING:
    from training.evaluate import EpisodeResult, Evaluation, Films

HELP = "evaluate a policy over many simulated scenes"

LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PERTURBED = ("lan", "object", "swap", "task")
ENVIRONMENTS = (
    *("tabletop", *LIBERO, *(f"{suite}_{kind}" for suite in LIBERO for kind in PERTURBED)),
    "libero_object+libero_spatial",
)
"""As `training.envs.registry` has them, which is slow to import."""

LATENCY_SAMPLES = 200
"""On a GPU, after the episodes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--policy", required=True, help="bundle directory, or the short name of a shipped bundle"
    )
    parser.add_argument(
        "--env",
        choices=ENVIRONMENTS,
        metavar="ENV",
        default="tabletop",
        help=f"where: {', '.join(ENVIRONMENTS)} (default tabletop)",
    )
    parser.add_argument(
        "--episodes",
        type=whole_number(1),
        default=100,
        help="how many scenes (default 100; a LIBERO suite has 500, ten in a row are its ten "
        "tasks)",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="the first scene's seed; the others follow (default 0)"
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
        "--engine",
        default="auto",
        choices=["auto", "eager", "unrolled"],
        help="how the arithmetic is run, on a CPU (default auto: unrolled)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="in which precision, on a CPU (default auto: float32)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        help="processes, or environments on a GPU (default: one a processor, or 128; or two of "
        "LIBERO's a processor)",
    )
    parser.add_argument(
        "--log", type=Path, help="keep every episode in this file (JSON lines); resumes from it"
    )
    parser.add_argument(
        "--video",
        type=seed,
        nargs="+",
        default=[],
        metavar="SEED",
        help="film these scenes, into LOG's name and -videos/SEED.webm; takes --log",
    )


def main(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    from rlrc_ros.vla.bundle import resolve
    from training.evaluate import Evaluation, compare, evaluate

    task = Evaluation(
        policy=resolve(arguments.policy),
        episodes=arguments.episodes,
        seed=arguments.seed,
        environment=arguments.env,
        swap_instruction=arguments.swap_instruction,
        engine=arguments.engine,
        dtype=arguments.dtype,
    )
    against = replace(task, policy=resolve(arguments.against)) if arguments.against else None
    log = arguments.log
    results = evaluate(task, arguments.device, arguments.workers, log, _films(arguments, log))
    summary: dict[str, Any] = {
        "policy": arguments.policy,
        "env": arguments.env,
        "seed": arguments.seed,
        **_summary(task, results, arguments),
    }
    if against:
        if log:
            log = log.with_name(f"{log.stem}-against{log.suffix}")
        films = _films(arguments, log)
        other = evaluate(against, arguments.device, arguments.workers, log, films)
        summary["against"] = {
            "policy": arguments.against,
            **_summary(against, other, arguments),
        }
        summary["paired_difference"] = compare(results, other)
    emit(arguments, summary, _for_people(summary))
    return 0


def _films(arguments: argparse.Namespace, log: Path | None) -> Films:
    from training.evaluate import Films

    if not arguments.video:
        return Films()
    if log is None:
        raise UserError("--video: the videos are kept beside the log; add --log FILE")
    return Films(tuple(arguments.video), log.with_name(f"{log.stem}-videos"))


def _summary(
    task: Evaluation, results: list[EpisodeResult], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Success and latency; where episodes shared batches, the latency of single observations."""
    from rlrc_ros.vla import load_policy
    from training.common import pick_device
    from training.evaluate import summarise

    summary = summarise(results)
    if summary["latency_ms"]["p50"] is None:
        policy = load_policy(task.policy, str(pick_device(arguments.device)))
        seen = [
            synthetic_observation(policy.config, result.instruction, result.seed)
            for result in results[:LATENCY_SAMPLES]
        ]
        times = [timed(policy, seen[i % len(seen)]) for i in range(10 + LATENCY_SAMPLES)]
        p50, p99 = percentiles(times[10:])
        summary["latency_ms"] = {"p50": p50, "p99": p99}
    return summary


def _for_people(summary: dict[str, Any]) -> str:
    lines = []
    for facts in filter(None, [summary, summary.get("against")]):
        lines.append(f"{facts['policy']}: {_rate(facts)}")
        lines += [f"  {family:<6} {_rate(rate)}" for family, rate in facts["families"].items()]
        latency = facts["latency_ms"]
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
