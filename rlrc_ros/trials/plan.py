"""A trial's plan: what will be run and how it will be judged, fixed before the first trial.

People write a draft (`config/trials/*.yaml`); `lock` turns it into a plan with the bundles' hashes,
every initial state and the number of pairs in it. The plan's file carries the SHA-256 of its
content, and the trial's log begins with the same: what was registered cannot change unseen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.rollouts.episode import LONGEST_EPISODE
from rlrc_ros.schema import from_dict, read_yaml
from rlrc_ros.trials.power import assumed_discordance, pairs_needed
from rlrc_ros.trials.statistics import Stopping

HASH = "sha256"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_HEADER = (
    "# A locked trial plan. Any change makes it invalid: write a draft and lock that instead.\n"
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the policies that are compared."""

    policy: str
    """A bundle's directory, or a shipped bundle's short name."""
    hash: str
    """The bundle's hash; the trial refuses any other content."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """An initial state: a simulated scene, or what a person has to set up."""

    seed: int | None = None
    """Of the simulated scene."""
    image: str = ""
    """Reference image to overlay on the live camera, relative to the plan's directory."""
    image_sha256: str = ""
    """The image's hash, filled in when the plan is locked."""
    note: str = ""
    """How to set it up, in words."""

    def __post_init__(self) -> None:
        if self.seed is None and not self.image and not self.note:
            raise UserError("a start needs a seed, an image or a note")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"a start's seed is {self.seed}: seeds go from 0 up")
        path = PurePosixPath(self.image)
        if path.is_absolute() or ".." in path.parts or "\\" in self.image:
            raise UserError(f"image {self.image!r} must lie in the plan's directory")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the policies are to do, from where, and what counts as done."""

    name: str
    rubric: str
    """What counts as success, as failure, and as partial with which score."""
    instruction: str = ""
    """What the policy is told; empty in simulation: the scene's own."""
    family: str = ""
    """Task family of the simulated scenes; empty: each seed's own."""
    starts: tuple[Start, ...]
    """Initial states, used in turn; the two episodes of a pair have the same."""


@dataclass(frozen=True, kw_only=True)
class DraftTask:
    """A task as people write it: simulated scenes may be given by the first one's seed."""

    name: str
    rubric: str
    instruction: str = ""
    family: str = ""
    starts: tuple[Start, ...] = ()
    first_seed: int | None = None
    """Of as many simulated scenes as the task gets pairs."""

    def __post_init__(self) -> None:
        if bool(self.starts) == (self.first_seed is not None):
            raise UserError(f"task {self.name!r}: give either starts or first_seed")


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """What a draft and a plan share."""

    name: str
    robot: str
    """Robot profile: a name in config/robots, or a file."""
    margin: float
    """Non-inferiority margin δ, a difference of success rates: 0.1 is 10 percentage points."""
    alpha: float = 0.05
    """Intervals are two-sided at 1 − alpha; non-inferiority errs in alpha / 2, at most with the
    anytime rule, about with a fixed number (docs/results/trials.md has the worst cases)."""
    power: float = 0.8
    """Wanted probability to show non-inferiority where both arms are equally good."""
    assumed_success: float = 0.8
    """Success rate of both arms for the power analysis."""
    assumed_discordance: float | None = None
    """Share of pairs in which only one arm succeeds; None: as if the episodes of a pair were
    independent, 2p(1 − p), which is the most cautious assumption short of opposition."""
    stopping: Stopping = "fixed"
    """fixed: look once, after all pairs. anytime: stop as soon as the betting test of
    `rlrc_ros.trials.sequential` decides, at `pairs` pairs at the latest."""
    seed: int = 0
    """Of the order of tasks and starts; the order of arms has a secret besides."""
    max_duration: float
    """s after which an episode times out."""
    exclusions: tuple[str, ...] = ()
    """The only reasons for which a trial may be excluded and run again."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("name is empty")
        if self.margin == 0:
            raise UserError(
                "margin is 0: that one policy is no worse at all takes endless trials to show; "
                "name the largest loss of success that would not matter, such as 0.1"
            )
        for key in ("margin", "alpha", "power", "assumed_success"):
            if not 0 < getattr(self, key) < 1:
                raise UserError(
                    f"{key} is {getattr(self, key):g}: it lies between 0 and 1, both excluded"
                )
        if self.power <= self.alpha / 2:
            raise UserError(f"power is {self.power:g}: chance alone gives alpha / 2")
        assumed_discordance(self.assumed_success, self.assumed_discordance)
        if not 0 < self.max_duration <= LONGEST_EPISODE:
            raise UserError(
                f"max_duration is {self.max_duration:g} s: it must be above 0 and at most "
                f"{LONGEST_EPISODE:g}"
            )
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: seeds go from 0 up")
        _refuse_repeated("exclusions", self.exclusions)


@dataclass(frozen=True, kw_only=True)
class Draft(_Terms):
    """A plan as people write it."""

    arms: dict[str, str]
    """Bundles by arm, the reference first."""
    tasks: tuple[DraftTask, ...]
    pairs: int | None = None
    """How many; None: as the power analysis says (with `stopping: anytime`, the most)."""


@dataclass(frozen=True, kw_only=True)
class Plan(_Terms):
    """A locked plan."""

    arms: dict[str, Arm]
    """The reference first. With more than two, every other one is compared with it."""
    tasks: tuple[Task, ...]
    pairs: int
    """How many times every arm is tried; with `stopping: anytime` at most. With more than two arms
    a "pair" holds one episode of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.arms) < 2:
            raise UserError(f"arms: {len(self.arms)} given; a comparison needs two or more")
        for name in (*self.arms, *(task.name for task in self.tasks)):
            if not _NAME.fullmatch(name):
                raise UserError(f"{name!r}: names of arms and tasks are 1 to 40 of A-Za-z0-9._-")
        if not self.tasks:
            raise UserError("tasks: name at least one")
        _refuse_repeated("tasks", [task.name for task in self.tasks])
        for task in self.tasks:
            if not task.rubric.strip():
                raise UserError(f"task {task.name!r}: rubric is empty; say what counts as success")
            if not task.starts:
                raise UserError(f"task {task.name!r}: there are no starts")
        if self.pairs < 2:
            raise UserError(
                f"pairs is {self.pairs}: from a single pair nothing follows; plan for more"
            )

    @property
    def sha256(self) -> str:
        """Hash of the content, whatever the file's layout."""
        # Not sorted: which arm is first says which is the reference.
        content = json.dumps(dataclasses.asdict(self), allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms))

    @property
    def candidates(self) -> tuple[str, ...]:
        """The other arms."""
        return tuple(self.arms)[1:]

    def schedule(self) -> list[tuple[Task, Start]]:
        """Task and initial state of every pair, in the order in which they are run.

        Every start is used once before any is used again, the tasks in turn as long as they have
        unused ones; then the pairs are shuffled.
        """
        most = max(len(task.starts) for task in self.tasks)
        turns = [
            (task, task.starts[i])
            for i in range(most)
            for task in self.tasks
            if i < len(task.starts)
        ]
        pairs = list(itertools.islice(itertools.cycle(turns), self.pairs))
        random.Random(self.seed).shuffle(pairs)
        return pairs

    def write(self, path: Path) -> None:
        """Write the plan's file, in one step."""
        values = {HASH: self.sha256, **dataclasses.asdict(self)}
        text = yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True, width=100)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _HEADER + text)

    def check_bundles(self) -> None:
        """Compare the bundles with their hashes.

        Raises:
            UserError: one is missing, damaged, or another than was planned.
        """
        from rlrc_ros.vla.bundle import open_bundle

        for name, arm in self.arms.items():
            found = open_bundle(arm.policy).hash
            if found != arm.hash:
                raise UserError(
                    f"{arm.policy}: the bundle of arm {name!r} has changed since the plan was "
                    f"locked (hash {found[:12]}, planned {arm.hash[:12]}); restore it, or lock a "
                    "new plan"
                )

    def check_images(self, directory: Path) -> None:
        """Compare the reference images below a directory with their hashes.

        Raises:
            UserError: one is missing or has changed.
        """
        for task in self.tasks:
            for start in task.starts:
                if start.image and _image_hash(directory, start.image) != start.image_sha256:
                    raise UserError(
                        f"{directory / start.image}: the reference image has changed since the "
                        "plan was locked; restore it, or lock a new plan"
                    )


def read_draft(path: Path) -> Draft:
    """A draft of a plan.

    Raises:
        UserError: the file cannot be read, or something in it makes no sense.
    """
    values = read_yaml(path)
    if isinstance(values, Mapping) and HASH in values:
        raise UserError(f"{path} is locked already; run it with `rlrc trial run`")
    return from_dict(Draft, values, str(path))


def read_plan(path: Path) -> Plan:
    """A locked plan.

    Raises:
        UserError: the file cannot be read, or was edited after it was locked.
    """
    values = read_yaml(path)
    if not isinstance(values, dict) or HASH not in values:
        raise UserError(f"{path}: not a locked plan; `rlrc trial plan` makes one from a draft")
    locked = values.pop(HASH)
    plan = from_dict(Plan, values, str(path))
    if plan.sha256 != locked:
        raise UserError(
            f"{path} was edited after it was locked (content {plan.sha256[:12]}, locked "
            f"{str(locked)[:12]}); restore it, or lock a new plan for a new trial"
        )
    return plan


def lock(draft: Draft, directory: Path) -> Plan:
    """The plan of a draft: bundles and images hashed, n by the power analysis, seeds written out.

    directory: what the images' paths are relative to.

    Raises:
        UserError: a bundle or an image is missing, or something makes no sense.
    """
    from rlrc_ros.vla.bundle import open_bundle

    pairs = draft.pairs
    if pairs is None:
        # Corrected for how many candidates are compared, as the analysis will be.
        pairs = pairs_needed(
            draft.margin,
            draft.alpha / max(1, len(draft.arms) - 1),
            draft.power,
            draft.assumed_success,
            draft.assumed_discordance,
            draft.stopping,
        )
    each = math.ceil(pairs / max(1, len(draft.tasks)))
    shared = {field.name: getattr(draft, field.name) for field in dataclasses.fields(_Terms)}
    return Plan(
        **shared,
        arms={
            name: Arm(policy=path, hash=open_bundle(path).hash) for name, path in draft.arms.items()
        },
        tasks=tuple(_locked_task(task, each, directory) for task in draft.tasks),
        pairs=pairs,
    )


def _locked_task(task: DraftTask, pairs: int, directory: Path) -> Task:
    starts = task.starts
    if task.first_seed is not None:
        starts = tuple(Start(seed=task.first_seed + i) for i in range(pairs))
    starts = tuple(
        dataclasses.replace(start, image_sha256=_image_hash(directory, start.image))
        if start.image
        else start
        for start in starts
    )
    return Task(
        name=task.name,
        rubric=task.rubric,
        instruction=task.instruction,
        family=task.family,
        starts=starts,
    )


def _image_hash(directory: Path, name: str) -> str:
    path = directory / name
    if not path.is_file():
        raise UserError(f"{path}: there is no such reference image")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _refuse_repeated(key: str, texts: Any) -> None:
    for text, count in Counter(texts).items():
        if not text.strip() or count > 1:
            raise UserError(f"{key}: {text!r} is {'empty' if not text.strip() else 'there twice'}")


def _plain(value: Any) -> Any:
    """The same without tuples, which YAML's safe writer does not know, and without empty fields."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner not in ("", None)}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
