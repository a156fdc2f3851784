"""Which recorded episodes become training data, and in what form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.alignment import AlignedEpisode, Contract, Step
from rlrc_ros.rollouts.episode import FILE, OUTCOMES, UNLABELLED, Episode, read_episode
from rlrc_ros.rollouts.recording import PARTIAL

Encoded = TypeVar("Encoded")
"""What a writer makes of a step: a long episode's images do not fit into memory as they are."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which episodes to take.

    Attributes:
        outcomes: any of these.
        tasks: instructions that contain any of these, whatever their case; empty: every one.
        policies: labels, or beginnings of bundle hashes; empty: every one.
    """

    outcomes: Collection[str] = ("success",)
    tasks: Collection[str] = ()
    policies: Collection[str] = ()

    def __post_init__(self) -> None:
        known = (*OUTCOMES, UNLABELLED)
        if unknown := [outcome for outcome in self.outcomes if outcome not in known]:
            raise UserError(f"outcome {unknown[0]!r} is none of {', '.join(known)}")

    def refusal(self, episode: Episode) -> str:
        """Why an episode is not taken; empty where it is."""
        if episode.outcome not in self.outcomes:
            return f"outcome {episode.outcome}"
        instruction = episode.instruction.lower()
        if self.tasks and not any(task.lower() in instruction for task in self.tasks):
            return "another task"
        by_label = episode.policy_label in self.policies
        by_hash = any(len(p) >= 6 and episode.bundle_hash.startswith(p) for p in self.policies)
        if self.policies and not (by_label or by_hash):
            return "another policy"
        return ""


@dataclass
class Rollout(Generic[Encoded]):
    """One exported episode.

    Attributes:
        instruction: what the policy was to do.
        facts: what episode.json says, in short, and what the alignment found.
        steps: its steps, encoded.
    """

    instruction: str
    facts: dict[str, Any]
    steps: list[Encoded]


@dataclass
class ExportReport:
    """What was taken and what was not; fills up while `rollouts` runs.

    Attributes:
        episodes: how many were taken.
        steps: control steps in them.
        missed: control periods in them in which no command came.
        lost: control steps that could not be put together again, by reason.
        refused: episodes that the filters left out, by reason.
        unusable: why a bag that the filters want was left out, by bag.
    """

    episodes: int = 0
    steps: int = 0
    missed: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    unusable: dict[str, str] = field(default_factory=dict)


def find_bags(paths: Iterable[Path]) -> list[Path]:
    """Episodes' bags: those given, and those in the directories given, by name.

    Raises:
        UserError: a path is neither a bag nor a directory with bags in it.
    """
    bags: dict[Path, None] = {}
    for path in paths:
        if (path / FILE).is_file():
            found = [path]
        else:
            found = sorted(file.parent for file in path.glob(f"*/{FILE}"))
        if not found:
            raise UserError(
                f"{path}: neither an episode's bag nor a directory with such bags in it"
            )
        bags |= dict.fromkeys(found)
    return list(bags)


def rollouts(
    bags: Iterable[Path],
    contract: Contract,
    filters: Filters,
    encode: Callable[[Step], Encoded],
    report: ExportReport,
) -> Iterator[Rollout[Encoded]]:
    """The episodes that the filters want, one at a time; what is left out goes into the report."""
    contract.topics()  # a robot without the policy's cameras fits no bag at all
    for bag in bags:
        try:
            if bag.name.endswith(PARTIAL):
                raise UserError(f"its recording was cut off: `rlrc bag repair {bag}`")
            if reason := filters.refusal(read_episode(bag)):
                report.refused[reason] += 1
                continue
            aligned = AlignedEpisode(bag, contract)
            steps = [encode(step) for step in aligned.steps()]
            if not steps:
                reasons = "; ".join(aligned.lost)
                raise UserError(f"no step of it could be put together again: {reasons}")
        except UserError as error:
            report.unusable[str(bag)] = str(error)
            continue
        report.episodes += 1
        report.steps += len(steps)
        report.missed += aligned.missed
        report.lost.update(aligned.lost)
        yield Rollout(aligned.episode.instruction, _facts(aligned), steps)


def _facts(aligned: AlignedEpisode) -> dict[str, Any]:
    episode = aligned.episode
    return {
        "source": "rollout",
        "episode_id": episode.episode_id,
        "instruction": episode.instruction,
        "outcome": episode.outcome,
        "success": episode.outcome == "success",
        "policy_label": aligned.policy_label,
        "bundle_hash": episode.bundle_hash,
        "missed_periods": aligned.missed,
        "lost_steps": aligned.lost.total(),
    }
