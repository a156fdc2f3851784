"""`rlrc bench --ros`: the running nodes, measured as real processes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlrc_ros.cli.arguments import whole_number
from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically

POLICY, OTHER = "tabletop-compressed", "tabletop-original"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `--ros`."""
    parser.add_argument(
        "--ros",
        action="store_true",
        help="measure the ROS 2 nodes instead: latency against a bare relay, images lost, the"
        " guard's jitter and stop, swaps of two policies, the recorder, a soak; exit status 1 where"
        " a bar is missed",
    )
    group = parser.add_argument_group("with --ros")
    group.add_argument(
        "--duration",
        type=_seconds(3600.0),
        default=20.0,
        help="s of latency and jitter (default 20)",
    )
    group.add_argument(
        "--kills",
        type=whole_number(1),
        default=3,
        help="how often the policy node is killed (default 3)",
    )
    group.add_argument(
        "--soak",
        type=_seconds(86_400.0),
        default=20.0,
        help="s of images, recorder and soak, in bags of up to 600 s of 56 MB/s each that are"
        " deleted when counted (default 20)",
    )


def _seconds(most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 2.0 <= seconds <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not from 2 to {most:g} s")
        return seconds

    return parse


def main(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rlrc_ros.ros_bench.run import Plan, measure
    from rlrc_ros.timing import machine

    policies = arguments.policy or [POLICY]
    if len(policies) > 2:
        raise UserError(
            "--ros measures the nodes with one policy, and swaps it with a second: give no third"
        )
    out: Path | None = arguments.out
    load_before = os.getloadavg()[0]
    # Beside the output: /tmp may be too small for the bags, or in memory.
    directory = Path(tempfile.mkdtemp(prefix=".rlrc-bench-", dir=out.parent if out else None))
    plan = Plan(
        policy=policies[0],
        other=policies[1] if len(policies) > 1 else OTHER,
        instruction=arguments.instruction,
        duration=arguments.duration,
        kills=arguments.kills,
        soak=arguments.soak,
        directory=directory,
    )
    try:
        rows, raw = measure(plan, lambda line: print(line, file=sys.stderr, flush=True))
    except BaseException:
        left = directory / "bags" if (directory / "logs").exists() else directory
        shutil.rmtree(left, ignore_errors=True)  # the logs are left to be read
        raise
    shutil.rmtree(directory)
    facts: dict[str, Any] = {
        "machine": machine(),
        "load_average": [load_before, os.getloadavg()[0]],
        "policy": plan.policy,
        "other": plan.other,
        "duration": plan.duration,
        "kills": plan.kills,
        "soak": plan.soak,
        "rows": rows,
    }
    if out is not None:
        write_atomically(out, json.dumps({**facts, "raw": raw}) + "\n")
    emit(arguments, facts, _table(facts))
    return 0 if all(row["met"] for row in rows.values()) else 1


def _table(facts: dict[str, Any]) -> str:
    """A line a row: what, how much, the bar, and whether it is met."""
    rows = facts["rows"]
    latency, guard, stop = rows["latency"], rows["guard"], rows["stop"]
    images, recorder, soak = rows["images"], rows["recorder"], rows["soak"]
    swap = rows["swap"]
    at_rate, arrival = latency["against_relay_at_rate"], latency["against_relay_on_arrival"]
    low, high = at_rate["median_ci95"]
    cells = {
        "latency": (
            f"camera stamp to command, less inference: median {_ms(latency['policy_ms'])},"
            f" {at_rate['median']:.2f}× ({low:.2f}–{high:.2f}) a relay's at the same rate, p99"
            f" {at_rate['p99']:.2f}×; {arrival['median']:.1f}× that of a relay of every image",
            f"median ≤ {latency['bar']['median']:g}×, p99 ≤ {latency['bar']['p99']:g}×",
        ),
        "images": (
            f"{images['lost']} of {images['sent']} images lost in {images['seconds']:.0f} s",
            "0",
        ),
        "guard": (
            f"jitter at {guard['rate']:g} Hz, {'' if guard['realtime'] else 'not '}real-time: p99"
            f" {guard['jitter_ms']['p99']:.2f} ms of {guard['intervals']} intervals; the policy"
            f" {guard['false_alarms']} times taken for dead",
            f"≤ {guard['bar']['p99_ms']:g} ms",
        ),
        "stop": (
            f"{stop['kills']} SIGKILLs of the policy to the guard's braking: median"
            f" {_ms(stop['kill_to_braking_ms'])}, worst {stop['kill_to_braking_ms']['max']:.0f} ms",
            f"≤ {stop['bar']['worst_ms']:g} ms",
        ),
        "swap": (
            f"{swap['swaps']} swaps between episodes, {facts['other']} resident too: median"
            f" {_ms(swap['call_ms'])} a call, worst {swap['call_ms']['max']:.1f} ms",
            f"≤ {swap['bar']['worst_ms']:g} ms",
        ),
        "recorder": (
            f"{recorder['lost']} of {recorder['sent']} messages lost in"
            f" {recorder['seconds']:.0f} s, {recorder['share_of_one_core']:.1%} of one core",
            f"0, ≤ {recorder['bar']['share_of_one_core']:.0%}",
        ),
        "soak": (
            f"{soak['seconds']:.0f} s: memory "
            + ", ".join(f"{n} {p['own_growth']:+.2%}" for n, p in soak["processes"].items())
            + "; threads and descriptors "
            + ", ".join(
                f"{n} {p['thread_growth']:+g}, {p['descriptor_growth']:+g}"
                for n, p in soak["processes"].items()
            ),
            f"≤ {soak['bar']['own_growth']:.0%}, 0, 0",
        ),
    }
    lines = [
        f"{'met   ' if rows[name]['met'] else 'MISSED'}  {text}  (bar: {bar})"
        for name, (text, bar) in cells.items()
    ]
    before, after = facts["load_average"]
    where = facts["machine"]
    lines.append(
        f"{where['cpu']}, {where['processors']} processors, load average {before:.1f} to"
        f" {after:.1f}; policy {facts['policy']}"
    )
    return "\n".join(lines)


def _ms(found: dict[str, float]) -> str:
    return f"{found['median']:.1f} ms"
