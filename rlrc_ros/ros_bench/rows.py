"""What was noted, as rows of a table: each with what was measured, its bar, and whether it is met.

The bars are those of this project's issue on the ROS 2 runtime; an idle machine is meant.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlrc_ros.ros_bench.processes import Usage

MEDIAN_BAR, P99_BAR = 2.0, 3.0
"""Times the relay's latency."""
JITTER_BAR = 2.0
"""ms."""
STOP_MARGIN = 20.0
"""ms, to which two of the guard's periods are added."""
SWAP_BAR = 50.0
"""ms."""
CPU_BAR = 0.25
"""Of one core."""
GROWTH_BAR = 0.01
"""Of the memory held after the run's first tenth."""
RESAMPLES = 1000
"""Of the bootstrap."""


class Sent(NamedTuple):
    """A command, by its own stamps, in ns since the epoch."""

    published: int
    observed: int
    """The oldest sensor stamp it is for."""


class Speed(NamedTuple):
    """What the guard sent to the controller."""

    published: int
    """ns since the epoch."""
    speed: float
    """Norm of the twist's six numbers: 0 says stop."""


def latencies(commands: Sequence[Sent]) -> list[float]:
    """The time from the oldest sensor stamp to the command, ms."""
    return [(command.published - command.observed) * 1e-6 for command in commands]


def without_inference(
    commands: Sequence[Sent], began: Sequence[int], ended: Sequence[int]
) -> list[float]:
    """The same in ms, less what the policy itself took for it.

    Args:
        commands: The policy node's.
        began: When each action of the policy began, ns, in order.
        ended: And when it ended.

    A command belongs to the last action that had ended when it was published. The first action is
    left out, as the policy node does: it warms up.
    """
    times = []
    for command in commands:
        k = bisect_right(ended, command.published) - 1
        if k >= 1:
            inference = ended[k] - began[k]
            times.append((command.published - command.observed - inference) * 1e-6)
    return times


def latency_row(
    policy: Sequence[float], at_rate: Sequence[float], on_arrival: Sequence[float]
) -> dict[str, Any]:
    """Camera stamp to command published, against both relays; arguments in ms."""
    found: dict[str, Any] = {
        "policy_ms": quantiles(policy),
        "relay_at_rate_ms": quantiles(at_rate),
        "relay_on_arrival_ms": quantiles(on_arrival),
    }
    for name, relay in (("at_rate", at_rate), ("on_arrival", on_arrival)):
        found[f"against_relay_{name}"] = {
            "median": float(np.median(policy) / np.median(relay)),
            "median_ci95": _ratio_interval(policy, relay, 50),
            "p99": float(np.percentile(policy, 99) / np.percentile(relay, 99)),
            "p99_ci95": _ratio_interval(policy, relay, 99),
        }
    ratio = found["against_relay_at_rate"]
    met = ratio["median"] <= MEDIAN_BAR and ratio["p99"] <= P99_BAR
    return {**found, "bar": {"median": MEDIAN_BAR, "p99": P99_BAR}, "met": bool(met)}


def images_row(
    sent: Mapping[int, Sequence[int]], got: Mapping[int, Sequence[int]], seconds: float
) -> dict[str, Any]:
    """Images by their stamps, by camera: what the cameras sent, what the policy node was given.

    Those that were lost are counted by the second since the first one was sent, too.
    """
    missing = {camera: set(stamps) - set(got.get(camera, ())) for camera, stamps in sent.items()}
    lost = {camera: len(stamps) for camera, stamps in missing.items()}
    total = sum(map(len, sent.values()))
    start = min((stamp for stamps in sent.values() for stamp in stamps), default=0)
    at = Counter(int((stamp - start) * 1e-9) for stamps in missing.values() for stamp in stamps)
    return {
        "seconds": seconds,
        "sent": total,
        "lost": sum(lost.values()),
        "lost_by_camera": [lost[camera] for camera in sorted(lost)],
        "lost_by_second": dict(sorted(at.items())),
        "bar": {"lost": 0},
        "met": total > 0 and not sum(lost.values()),
    }


def jitter_row(published: Sequence[int], rate: float) -> dict[str, Any]:
    """The guard's intervals against its period; when it published in ns, its rate in Hz."""
    intervals = np.diff(np.asarray(published, np.int64)) * 1e-6
    off = np.abs(intervals - 1e3 / rate)
    jitter = quantiles(off)
    found = {"intervals": len(intervals), "rate": rate, "jitter_ms": jitter}
    return {**found, "bar": {"p99_ms": JITTER_BAR}, "met": jitter["p99"] <= JITTER_BAR}


def braking(speeds: Sequence[Speed], killed: int) -> tuple[float, float] | None:
    """The time from the kill until the guard began to brake, and until it commanded zero, ms.

    It brakes from the command on after which speeds only fall to zero. None where it never came to
    stand, or stood when the policy was killed.
    """
    after = [k for k, sent in enumerate(speeds) if sent.published > killed]
    zero = next((k for k in after if speeds[k].speed == 0), None)
    if zero is None or zero == after[0]:
        return None
    last_full = zero
    while last_full > after[0] and speeds[last_full - 1].speed > speeds[last_full].speed:
        last_full -= 1
    first = speeds[min(last_full + 1, zero)].published
    return (first - killed) * 1e-6, (speeds[zero].published - killed) * 1e-6


def stop_row(
    kills: Sequence[tuple[float, float]],
    silences: Sequence[float],
    inconclusive: int,
    rate: float,
) -> dict[str, Any]:
    """SIGKILL of the policy to the guard's stop.

    Args:
        kills: What `braking` gave for each.
        silences: ms from the last command of the policy to the first of the braking, for each.
        inconclusive: Kills that came while the arm stood.
        rate: The guard's, Hz.
    """
    bar = 2e3 / rate + STOP_MARGIN
    begins = [begin for begin, _ in kills]
    return {
        "kills": len(kills),
        "inconclusive": inconclusive,
        "kill_to_braking_ms": quantiles(begins),
        "kill_to_standstill_ms": quantiles([zero for _, zero in kills]),
        "last_command_to_braking_ms": quantiles(silences),
        "bar": {"worst_ms": bar},
        "met": bool(begins) and max(begins) <= bar,
    }


def swap_row(calls: Sequence[float], inside: Sequence[float]) -> dict[str, Any]:
    """Swaps of two resident policies: the service call as its client sees it, and the swap in it.

    Both in ms.
    """
    return {
        "swaps": len(calls),
        "call_ms": quantiles(calls),
        "inside_ms": quantiles(inside),
        "bar": {"worst_ms": SWAP_BAR},
        "met": bool(calls) and max(calls) <= SWAP_BAR,
    }


def recorder_row(
    sent: Mapping[str, int],
    recorded: Mapping[str, int],
    dropped: Mapping[str, int],
    cpu: float,
    seconds: float,
) -> dict[str, Any]:
    """Messages by topic, s of CPU time of the recorder's process over so many s.

    Those dropped are the lost ones that had reached the recorder, and its disk was too slow for.
    """
    lost = {topic: count - recorded.get(topic, 0) for topic, count in sent.items()}
    share = cpu / seconds if seconds else 0.0
    return {
        "seconds": seconds,
        "sent": sum(sent.values()),
        "lost": sum(lost.values()),
        "lost_by_topic": lost,
        "dropped": sum(dropped.values()),
        "share_of_one_core": share,
        "bar": {"lost": 0, "share_of_one_core": CPU_BAR},
        "met": bool(sent) and not any(lost.values()) and share <= CPU_BAR,
    }


def soak_row(usages: Mapping[str, Sequence[Usage]]) -> dict[str, Any]:
    """Growth of each process's memory, without what it shares, and of its threads and descriptors.

    From the median over the second tenth of the samples (the first is a start) to that over the
    last tenth.
    """
    found: dict[str, Any] = {}
    met = bool(usages)
    for name, samples in usages.items():
        tenth = max(1, len(samples) // 10)
        early, late = samples[tenth : 2 * tenth] or samples[:1], samples[-tenth:]
        growth = {
            key: _median(late, key) - _median(early, key)
            for key in ("rss", "anonymous", "shared", "threads", "descriptors")
        }
        own = _median(early, "rss") - _median(early, "shared")
        share = (growth["rss"] - growth["shared"]) / own
        found[name] = {
            "rss_mb": _median(early, "rss") / 1e6,
            "own_mb": own / 1e6,
            "own_growth": share,
            "rss_growth": growth["rss"] / _median(early, "rss"),
            "anonymous_growth_mb": growth["anonymous"] / 1e6,
            "thread_growth": growth["threads"],
            "descriptor_growth": growth["descriptors"],
        }
        steady = growth["threads"] <= 0 and growth["descriptors"] <= 0
        met = met and steady and share <= GROWTH_BAR
    seconds = max((s[-1].time - s[0].time for s in usages.values() if s), default=0.0)
    bar = {"own_growth": GROWTH_BAR, "thread_growth": 0, "descriptor_growth": 0}
    return {"seconds": seconds, "processes": found, "bar": bar, "met": met}


def quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 99th percentile and greatest; NaN where there are none."""
    if not len(values):
        return dict.fromkeys(("median", "p99", "max"), float("nan"))
    p50, p99, most = np.percentile(values, [50, 99, 100])
    return {"median": float(p50), "p99": float(p99), "max": float(most)}


def _median(samples: Sequence[Usage], key: str) -> float:
    return float(np.median([getattr(sample, key) for sample in samples]))


def _ratio_interval(values: Sequence[float], reference: Sequence[float], q: float) -> list[float]:
    """95% interval of the ratio of two percentiles, by the bootstrap (percentile method)."""
    rng = np.random.default_rng(0)
    a, b = np.asarray(values), np.asarray(reference)
    ratios = [
        np.percentile(rng.choice(a, len(a)), q) / np.percentile(rng.choice(b, len(b)), q)
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return [float(low), float(high)]
