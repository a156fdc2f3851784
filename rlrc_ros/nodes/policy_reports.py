"""What the policy node says of an episode. In a blinded trial nothing tells the policies apart."""

from __future__ import annotations

from rlrc.action import RunEpisode
from rlrc.msg import PolicyStatus

from rlrc_ros.execution import Episode


def fill_result(result: RunEpisode.Result, episode: Episode) -> None:
    """How the episode ended and what it counted."""
    statistics = episode.statistics
    result.termination_reason, result.message = episode.termination_reason, episode.message
    result.steps = statistics.steps
    result.deadline_misses = statistics.deadline_misses
    result.skipped_steps = statistics.skipped_steps
    result.latency_ms_p50 = statistics.percentile(50)
    result.latency_ms_p99 = statistics.percentile(99)


def feedback(episode: Episode, blind: bool) -> RunEpisode.Feedback:
    """How far it is."""
    statistics = episode.statistics
    return RunEpisode.Feedback(
        step=statistics.steps,
        rate=0.0 if blind else statistics.rate(),
        observation_age=0.0 if blind else statistics.observation_age,
    )


def fill_status(status: PolicyStatus, episode: Episode, blind: bool) -> None:
    """The running episode."""
    statistics = episode.statistics
    status.state, status.policy_label = "running", episode.label
    status.episode_id, status.instruction = episode.episode_id, episode.instruction
    status.step = statistics.steps
    if blind:
        return
    status.bundle_hash = episode.policy.hash
    status.observation_age = statistics.observation_age
    status.preprocess_ms = statistics.last_ms.get("preprocess", 0.0)
    status.inference_ms = statistics.last_ms.get("inference", 0.0)
    status.total_ms = statistics.last_ms.get("total", 0.0)
    status.total_ms_p50 = statistics.percentile(50)
    status.total_ms_p99 = statistics.percentile(99)
    status.deadline_misses = statistics.deadline_misses
    status.skipped_steps = statistics.skipped_steps
    status.skip_reason = statistics.skip_reason


def diagnostic_values(episode: Episode) -> dict[str, object]:
    """What the running episode has counted, for diagnostics; never of a blinded trial."""
    statistics = episode.statistics
    return {
        "steps": statistics.steps,
        "deadline misses": statistics.deadline_misses,
        "skipped steps": statistics.skipped_steps,
        "latency p50 ms": round(statistics.percentile(50), 1),
        "latency p99 ms": round(statistics.percentile(99), 1),
    }
