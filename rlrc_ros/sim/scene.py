"""A scene: what lies where, in which colours and light, and what to do.

Its seed decides all of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from rlrc_ros.errors import UserError
from rlrc_ros.sim.tasks import COLOURS, FAMILIES, Goal, goals

# Metres, in the base frame: what the camera sees, and where everything starts.
WORKSPACE_X = (0.36, 0.68)
WORKSPACE_Y = (-0.25, 0.25)

OBJECT_SIZE = (0.041, 0.049)  # metres: edge of a cube; diameter and height of a cylinder
PLATE_RADIUS = (0.050, 0.058)
SQUARE_HALF = (0.056, 0.060)
OBJECT_YAW = np.radians(25)
OBJECT_REACH = 0.035  # metres from an object's centre to its farthest vertical edge
GAP = 0.01  # metres between things that must not touch
OBJECT_SPACING = 0.105  # metres between centres: an open gripper fits beside a neighbour
PUSH_LENGTH = (0.11, 0.28)  # metres from an object to the square it is pushed into
PUSH_BACK = np.cos(np.radians(50))  # of its length, the most that a push comes back to the arm
PUSH_RUN_UP = 0.09  # metres behind the object where the gripper comes down
PUSH_HALF_WIDTH = 0.07  # metres from the line of a push to the centre of an object beside it

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class ObjectSpec:
    """A cube or an upright cylinder; position (x, y) in metres, yaw in radians."""

    shape: str
    colour: str
    rgb: Rgb
    size: float  # metres: edge; or diameter and height
    position: tuple[float, float]
    yaw: float


@dataclass(frozen=True)
class TargetSpec:
    """A round plate to put things on, or a square painted on the table, its sides along x and y."""

    shape: str
    colour: str
    rgb: Rgb
    size: float  # metres: radius; or half the side
    position: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """One scene; every number is a plain float, so that JSON keeps it exactly.

    gripper: where the end effector starts, x, y, z in metres and yaw in radians. light: brightness
    of the lamp, ambient: of what comes from everywhere. camera_shift (3,) metres and camera_turn
    (3,) radians displace the front camera.
    """

    seed: int
    family: str
    instruction: str
    objects: tuple[ObjectSpec, ...]
    targets: tuple[TargetSpec, ...]
    gripper: tuple[float, float, float, float]
    light_direction: tuple[float, float, float]
    light: float
    ambient: float
    camera_shift: tuple[float, float, float]
    camera_turn: tuple[float, float, float]

    @cached_property
    def goals(self) -> dict[str, Goal]:
        """Every valid instruction and what it asks for."""
        return goals(self)

    @property
    def instructions(self) -> tuple[str, ...]:
        """Every valid instruction in this scene, its own among them."""
        return tuple(self.goals)

    def goal(self, instruction: str) -> Goal:
        """What a valid instruction asks for. Raises UserError for any other text."""
        if instruction not in self.goals:
            raise UserError(
                f"scene {self.seed} has no instruction '{instruction}'; "
                f"it has: {', '.join(self.goals)}"
            )
        return self.goals[instruction]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values, with every valid instruction under `instructions`."""
        return {**asdict(self), "instructions": list(self.instructions)}


def sample_scene(seed: int, family: str | None = None) -> Scene:
    """The scene of a seed.

    Nothing but the instruction depends on the family: what lies where, in which colours and light,
    is the same for all three. Every scene has two cubes, a plate, and a square into which an object
    can be pushed with nothing in the way.
    Raises UserError for an unknown family or a negative seed.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(f"no task family '{family}'; there are: {', '.join(FAMILIES)}")
    if seed < 0:
        raise UserError(f"a scene's seed must not be negative, not {seed}")
    rng = np.random.default_rng(seed)
    drawn_family = str(rng.choice(FAMILIES))
    colours = [str(name) for name in rng.permutation(list(COLOURS))]
    shapes = ["cube", "cube", str(rng.choice(["cube", "cylinder"]))]
    kinds = ["plate", "square", str(rng.choice(["plate", "square"]))]
    object_sizes = rng.uniform(*OBJECT_SIZE, len(shapes))
    target_sizes = [
        float(rng.uniform(*(PLATE_RADIUS if kind == "plate" else SQUARE_HALF))) for kind in kinds
    ]
    while True:
        layout = _place(rng, kinds, target_sizes)
        if layout is None:
            continue
        objects_xy, targets_xy = layout
        pushes = _free_pushes(objects_xy, targets_xy, kinds, target_sizes)
        if pushes:
            break

    objects = tuple(
        ObjectSpec(
            shape=shape,
            colour=colour,
            rgb=_jittered(rng, colour),
            size=float(size),
            position=(float(xy[0]), float(xy[1])),
            yaw=float(rng.uniform(-OBJECT_YAW, OBJECT_YAW)),
        )
        for shape, colour, size, xy in zip(
            shapes, colours[:3], object_sizes, objects_xy, strict=True
        )
    )
    targets = tuple(
        TargetSpec(
            shape=kind,
            colour=colour,
            rgb=_jittered(rng, colour),
            size=size,
            position=(float(xy[0]), float(xy[1])),
        )
        for kind, colour, size, xy in zip(kinds, colours[3:], target_sizes, targets_xy, strict=True)
    )
    gripper = _floats(rng.uniform((0.38, -0.05, 0.17, -0.15), (0.44, 0.05, 0.20, 0.15)))
    scene = Scene(
        seed=int(seed),
        family=family or drawn_family,
        instruction="",
        objects=objects,
        targets=targets,
        gripper=gripper,
        **_view(rng),
    )
    push = Goal("push", *pushes[rng.integers(len(pushes))])
    choice = rng.random()
    candidates = [
        text
        for text, goal in scene.goals.items()
        if goal.family == scene.family and (goal.family != "push" or goal == push)
    ]
    instruction = candidates[int(choice * len(candidates))]
    return replace(scene, instruction=instruction)


def with_other_view(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene in another light and from a camera displaced otherwise."""
    return replace(scene, **_view(rng))


def _view(rng: np.random.Generator) -> dict[str, Any]:
    tilt = rng.uniform(-0.5, 0.5, 2)
    return {
        "light_direction": (float(tilt[0]), float(tilt[1]), -1.0),
        "light": float(rng.uniform(0.40, 0.65)),
        "ambient": float(rng.uniform(0.30, 0.45)),
        "camera_shift": _floats(rng.uniform(-0.01, 0.01, 3)),
        "camera_turn": _floats(rng.uniform(-1, 1, 3) * np.radians(1)),
    }


def _floats(values: np.ndarray) -> tuple[Any, ...]:
    return tuple(float(value) for value in values)


def _jittered(rng: np.random.Generator, colour: str) -> Rgb:
    return _floats(np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.06, 0.06, 3), 0, 1))


def _place(
    rng: np.random.Generator, kinds: list[str], sizes: list[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Centres of objects (3, 2) and targets (3, 2), apart from each other; None if out of luck."""
    low = np.array([WORKSPACE_X[0], WORKSPACE_Y[0]])
    high = np.array([WORKSPACE_X[1], WORKSPACE_Y[1]])
    targets: list[np.ndarray] = []
    for i, kind in enumerate(kinds):
        for xy in rng.uniform(low + sizes[i], high - sizes[i], (10, 2)):
            if all(
                _target_gap(xy, kind, sizes[i], targets[j], kinds[j], sizes[j]) >= GAP
                for j in range(i)
            ):
                targets.append(xy)
                break
        else:
            return None
    objects: list[np.ndarray] = []
    for _ in range(3):
        for xy in rng.uniform(low + OBJECT_REACH, high - OBJECT_REACH, (10, 2)):
            if all(np.hypot(*(xy - other)) >= OBJECT_SPACING for other in objects) and all(
                _target_distance(xy, kind, size, target) >= OBJECT_REACH + GAP
                for kind, size, target in zip(kinds, sizes, targets, strict=True)
            ):
                objects.append(xy)
                break
        else:
            return None
    return np.array(objects), np.array(targets)


def _target_distance(point: np.ndarray, kind: str, size: float, target: np.ndarray) -> float:
    """From a point to the border of a target; negative inside (then, of a square, not exact)."""
    if kind == "plate":
        return float(np.hypot(*(point - target)) - size)
    beyond = np.abs(point - target) - size
    return float(np.hypot(*np.maximum(beyond, 0)) + min(beyond.max(), 0))


def _target_gap(
    a: np.ndarray, kind_a: str, size_a: float, b: np.ndarray, kind_b: str, size_b: float
) -> float:
    if kind_b == "plate":
        return _target_distance(b, kind_a, size_a, a) - size_b
    if kind_a == "plate":
        return _target_distance(a, kind_b, size_b, b) - size_a
    return float(np.abs(a - b).max() - size_a - size_b)


def _free_pushes(
    objects: np.ndarray, targets: np.ndarray, kinds: list[str], sizes: list[float]
) -> list[tuple[int, int]]:
    """The pairs (object, square) with nothing in the way of it or of the gripper behind it."""
    pairs = []
    for i, start in enumerate(objects):
        for j, end in enumerate(targets):
            length = float(np.hypot(*(end - start)))
            if kinds[j] != "square" or not PUSH_LENGTH[0] <= length <= PUSH_LENGTH[1]:
                continue
            if end[0] - start[0] < -PUSH_BACK * length:
                continue  # the hand would hide the object from the camera
            behind = start - (end - start) / length * PUSH_RUN_UP
            clear_of_objects = all(
                _segment_distance(objects[k], behind, end) >= PUSH_HALF_WIDTH
                for k in range(len(objects))
                if k != i
            )
            # A plate's rim would stop the object.
            clear_of_plates = all(
                _segment_distance(targets[k], start, end) >= sizes[k] + OBJECT_REACH
                for k in range(len(targets))
                if kinds[k] == "plate"
            )
            if clear_of_objects and clear_of_plates:
                pairs.append((i, j))
    return pairs


def _segment_distance(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    along = np.clip((point - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    return float(np.hypot(*(point - start - along * (end - start))))
