"""The three task families: their instructions, and when an instruction is satisfied.

put    "put the red cube on the blue plate"
push   "push the green cylinder into the yellow square"
stack  "stack the red cube on the blue cube"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rlrc_ros.sim.scene import Scene

FAMILIES = ("put", "push", "stack")
# sRGB in [0, 1]; far apart in hue, and all of them from the grey of the table.
COLOURS = {
    "red": (0.85, 0.08, 0.08),
    "green": (0.10, 0.62, 0.12),
    "blue": (0.08, 0.20, 0.90),
    "yellow": (0.95, 0.85, 0.05),
    "purple": (0.60, 0.10, 0.75),
    "cyan": (0.15, 0.85, 0.90),
}
OBJECT_SHAPES = ("cube", "cylinder")
TARGET_SHAPES = ("plate", "square")
VOCABULARY = tuple(
    sorted({*FAMILIES, "the", "on", "into", *COLOURS, *OBJECT_SHAPES, *TARGET_SHAPES})
)

STILL_LINEAR = 0.02  # m/s
STILL_ANGULAR = 0.3  # rad/s
HEIGHT_TOLERANCE = 0.004  # metres, of a resting object's centre
PLATE_THICKNESS = 0.006  # metres
FLAT = np.cos(np.radians(8))  # cosine of the tilt under which an object lies flat
PUSH_MARGIN = 0.015  # metres that a pushed object's centre must be inside the square's border
PUSH_MAX_LIFT = 0.02  # metres above its initial height: higher was carried, not pushed
STACK_OFFSET = 0.018  # metres between the centres of stacked cubes, horizontally


@dataclass(frozen=True)
class Goal:
    """What an instruction asks for: an index into `Scene.objects`, one into `Scene.targets`.

    For the family "stack" `target` too is an index into `Scene.objects`: the cube below.
    """

    family: str
    object: int
    target: int


@dataclass(frozen=True)
class TableState:
    """What the predicates look at; row i belongs to `Scene.objects[i]`.

    position (3, 3): metres, of the centres. vertical (3, 3): the world's up in the object's frame.
    linear_speed (3,): m/s. angular_speed (3,): rad/s. touched (3,): bool, by hand or fingers.
    lift (3,): metres, the highest that the centre has been above where it began.
    """

    position: np.ndarray
    vertical: np.ndarray
    linear_speed: np.ndarray
    angular_speed: np.ndarray
    touched: np.ndarray
    lift: np.ndarray


def goals(scene: Scene) -> dict[str, Goal]:
    """Every valid instruction of the scene, in a fixed order, and what it asks for."""
    found = {}
    for i, thing in enumerate(scene.objects):
        for j, target in enumerate(scene.targets):
            if target.shape == "plate":
                text = f"put the {thing.colour} {thing.shape} on the {target.colour} plate"
                found[text] = Goal("put", i, j)
            else:
                text = f"push the {thing.colour} {thing.shape} into the {target.colour} square"
                found[text] = Goal("push", i, j)
        for j, base in enumerate(scene.objects):
            if i != j and thing.shape == base.shape == "cube":
                text = f"stack the {thing.colour} cube on the {base.colour} cube"
                found[text] = Goal("stack", i, j)
    return found


def satisfied(scene: Scene, goal: Goal, state: TableState) -> bool:
    """Whether the goal is reached: the object rests where it should, and nothing holds it."""
    i = goal.object
    thing = scene.objects[i]
    position = state.position[i]
    if state.linear_speed[i] > STILL_LINEAR or state.angular_speed[i] > STILL_ANGULAR:
        return False

    if goal.family == "push":
        square = scene.targets[goal.target]
        inside = np.abs(position[:2] - square.position) <= square.size - PUSH_MARGIN
        return bool(
            inside.all()
            and _rests_at(position, thing.size / 2)
            and state.vertical[i, 2] > FLAT
            and state.lift[i] < PUSH_MAX_LIFT
        )

    if state.touched[i] or not _lies_flat(state.vertical[i]):
        return False
    if goal.family == "put":
        plate = scene.targets[goal.target]
        return _over(position, plate.position, plate.size) and _rests_at(
            position, PLATE_THICKNESS + thing.size / 2
        )
    base = scene.objects[goal.target]
    under = state.position[goal.target]
    return (
        _over(position, under[:2], STACK_OFFSET)
        and _rests_at(position, base.size + thing.size / 2)
        and _rests_at(under, base.size / 2)
    )


def _over(position: np.ndarray, centre: np.ndarray | tuple[float, float], radius: float) -> bool:
    return bool(np.hypot(*(position[:2] - centre)) <= radius)


def _rests_at(position: np.ndarray, height: float) -> bool:
    return bool(abs(position[2] - height) <= HEIGHT_TOLERANCE)


def _lies_flat(vertical: np.ndarray) -> bool:
    # On any face of a cube, on an end or on the side of a cylinder.
    return bool(np.abs(vertical).max() > FLAT or abs(vertical[2]) < np.sqrt(1 - FLAT**2))
