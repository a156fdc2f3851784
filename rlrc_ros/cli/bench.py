"""`rlrc bench`: latency and memory of several policies on this machine, in one run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrc_ros.cli import bench_ros
from rlrc_ros.cli.arguments import whole_number
from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.timing import (
    INSTRUCTION,
    interleaved,
    machine,
    percentiles,
    ratio_interval,
)

if TYPE_CHECKING:
    from rlrc_ros.vla import Policy

HELP = "measure latency and memory of policies, interleaved round by round"

ENGINES = ("auto", "eager", "unrolled", "graph", "openvino")
SHAPES = ("openvla-7b", "openvla-7b-oft", "pi0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--policy",
        action="append",
        help="bundle directory, or the short name of a shipped bundle; give it once a policy: the "
        "others are compared with the first",
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="instead of policies: this architecture with random weights, against what Hugging "
        "Face's transformers does",
    )
    parser.add_argument(
        "--variants",
        help="of the shape, separated by commas (default: the most telling ones)",
    )
    parser.add_argument(
        "--engine",
        nargs="+",
        default=["auto"],
        choices=ENGINES,
        metavar="ENGINE",
        help=f"run every policy with each of these (default auto): {', '.join(ENGINES)}",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["auto"],
        choices=["auto", "float32", "bfloat16"],
        help="and in each of these (default auto: float32 on a CPU, else bfloat16)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--rounds",
        type=whole_number(10),
        default=200,
        help="how often each one acts, one after another in random order (default 200)",
    )
    parser.add_argument(
        "--threads", type=whole_number(1), default=1, help="of torch on the CPU (default 1)"
    )
    parser.add_argument(
        "--instruction", default=INSTRUCTION, help=f"what to ask for (default: {INSTRUCTION})"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write every time and the machine's facts as JSON"
    )
    bench_ros.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise UserError(f"{arguments.out}: there is no directory {arguments.out.parent}")
    if arguments.ros:
        return bench_ros.main(arguments)
    if bool(arguments.policy) == bool(arguments.shape):
        raise UserError(
            "name either policies with --policy, or an architecture with --shape, or --ros"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.shape:
            return _measure_shape(arguments)
        contestants = _contestants(arguments)
        load_before = os.getloadavg()[0]
        _measure(contestants, arguments.rounds, arguments.instruction)
        facts = {"machine": machine(), "load_average": [load_before, os.getloadavg()[0]]}
    finally:
        torch.set_num_threads(before)
    facts |= {"rounds": arguments.rounds, "instruction": arguments.instruction}
    summaries = summarise(contestants)
    if arguments.out is not None:
        raw = [
            {**summary, "times_ms": contestant.times_ms}
            for summary, contestant in zip(summaries, contestants, strict=True)
        ]
        write_atomically(arguments.out, json.dumps({**facts, "policies": raw}) + "\n")
    text = f"{_table(summaries)}\n{_footnote(facts)}"
    if arguments.out is not None:
        text += f"\ntimes: {arguments.out}"
    emit(arguments, {**facts, "policies": summaries}, text)
    return 0


def _measure_shape(arguments: argparse.Namespace) -> int:
    import torch

    from rlrc_ros.cli import bench_pi0, bench_shape

    bench: Any = bench_pi0 if arguments.shape in bench_pi0.SHAPES else bench_shape
    variants = (arguments.variants or bench.DEFAULT).split(",")
    if unknown := sorted(set(variants) - set(bench.VARIANTS)):
        known = ", ".join(bench.VARIANTS)
        raise UserError(f"there is no variant '{unknown[0]}'; there are: {known}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    where = machine()

    def save(facts: dict[str, Any]) -> None:
        if arguments.out is not None:
            write_atomically(arguments.out, json.dumps({"machine": where, **facts}) + "\n")

    facts = bench.measure(arguments.shape, variants, arguments.rounds, device, save)
    brief = [{k: v for k, v in row.items() if k != "times_ms"} for row in facts["variants"]]
    emit(arguments, {"machine": where, **facts, "variants": brief}, bench.table(facts))
    return 0


@dataclass
class Contestant:
    """One policy in one engine and one dtype.

    Attributes:
        name: of the policy, as it was given.
        label: differs from all others'.
        policy: loaded and ready.
        times_ms: of one action each, a value a round.
    """

    name: str
    label: str
    policy: Policy
    times_ms: list[float] = field(default_factory=list)


def _contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """Every policy in every engine and dtype asked for."""
    import torch

    from rlrc_ros.vla import load_policy

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    contestants: list[Contestant] = []
    seen: Counter[str] = Counter()
    for name in arguments.policy:
        for engine in dict.fromkeys(arguments.engine):
            for dtype in dict.fromkeys(arguments.dtype):
                policy = load_policy(name, device, engine, dtype)
                policy.processor.token_ids(arguments.instruction)  # or say now what is wrong
                label = f"{name} {policy.engine.name} {_dtype(policy)}"
                seen[label] += 1
                if seen[label] > 1:  # one against itself shows what the measurement is worth
                    label += f" #{seen[label]}"
                contestants.append(Contestant(name, label, policy))
    return contestants


def _measure(contestants: list[Contestant], rounds: int, instruction: str) -> None:
    """Fill in the times."""
    from tqdm import tqdm

    timing = interleaved([c.policy for c in contestants], instruction, rounds)
    for times in tqdm(timing, "bench", rounds, unit="round", file=sys.stderr, leave=False):
        for contestant, elapsed in zip(contestants, times, strict=True):
            contestant.times_ms.append(elapsed)


def summarise(contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """What each is and took, and under `against_first` its share of what the first one took."""
    first = contestants[0]
    rows = []
    for contestant in contestants:
        policy, memory = contestant.policy, contestant.policy.weight_bytes()
        p50, p99 = percentiles(contestant.times_ms)
        row: dict[str, Any] = {
            "label": contestant.label,
            "policy": contestant.name,
            "hash": policy.hash,
            "engine": policy.engine.name,
            "dtype": _dtype(policy),
            "device": str(policy.device),
            "latency_ms": {"p50": p50, "p99": p99},
            "memory_bytes": {"llm": memory["llm"], "total": memory["total"]},
        }
        if contestant is not first:
            reference = first.policy.weight_bytes()
            row["against_first"] = {
                "latency_p50": p50 / percentiles(first.times_ms)[0],
                "latency_p50_ci95": list(ratio_interval(contestant.times_ms, first.times_ms)),
                "memory_llm": memory["llm"] / reference["llm"],
                "memory_total": memory["total"] / reference["total"],
            }
        rows.append(row)
    return rows


def _dtype(policy: Policy) -> str:
    return str(policy.dtype).removeprefix("torch.")


def _table(summaries: list[dict[str, Any]]) -> str:
    from rlrc_ros.trials.table import quantity

    lines = [("", "p50 ms", "p99 ms", "against the first", "LLM MB", "", "model MB", "")]
    for row in summaries:
        latency, memory, ratio = row["latency_ms"], row["memory_bytes"], row.get("against_first")
        lines.append(
            (
                row["label"],
                quantity(latency["p50"]),
                quantity(latency["p99"]),
                _speed(ratio) if ratio else "",
                quantity(memory["llm"] / 1e6),
                f"{ratio['memory_llm']:.2f}×" if ratio else "",
                quantity(memory["total"] / 1e6),
                f"{ratio['memory_total']:.2f}×" if ratio else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(w)}" for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def _speed(ratio: dict[str, Any]) -> str:
    low, high = ratio["latency_p50_ci95"]
    return f"{ratio['latency_p50']:.3f}× ({low:.3f}–{high:.3f})"


def _footnote(facts: dict[str, Any]) -> str:
    where = facts["machine"]
    gpu = f"{where['gpu']}, " if where["gpu"] else ""
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    before, after = facts["load_average"]
    lines = [
        f"{gpu}{where['cpu']}, {threads}, torch {where['torch']}; {facts['rounds']} rounds; ratios "
        "with 95% intervals; memory is that of the weights as held"
    ]
    if max(before, after) > where["processors"] + 0.5:
        lines.append(
            f"load average {before:.1f} to {after:.1f} on {where['processors']} processors: other "
            "programs were running, which p99 shows most"
        )
    return "\n".join(lines)
