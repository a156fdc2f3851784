"""A scripted expert for libero_object and libero_spatial: it puts one thing in or on another.

From ground-truth poses and collision shapes. What it does is a function of the state as it is; all
it keeps is how it means to grasp, until the thing has moved. So it says what to do in any state
that another policy got into, and tries again after a slip. How often it succeeds, and how often
somebody would who does the same and knows less well where the thing is:

    python -m training.envs.libero_expert libero_object --states 10 [--sampled] [--noise] [--unsure]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlrc_ros.errors import UserError
from rlrc_ros.sim.model import mujoco
from rlrc_ros.trials.statistics import clopper_pearson
from training.envs.libero import ROTATION, SCENES_PER_TASK, STATES, STEP_LIMITS, TASKS, World

SUITES = ("libero_object", "libero_spatial")
FIRST_SAMPLED = 9_000_000  # what `--sampled` begins with

GAIN = 1.6  # of the remaining error, per control step: the controller goes about half the way
MAX_STEP = 0.05  # metres a control step
CAREFUL = 0.025  # metres a control step, where the fingers are about to close, or to let go
GENTLE = 0.010  # metres a control step, where a thing is set down: time to get over the place
SLOPE = 2.5  # metres of height per metre still to go sideways
CLEARANCE = 0.03  # metres between what passes over and what stands
TIPS = 0.012  # metres from the grip site down to the fingertips
PALM = 0.038  # metres from the grip site up to the palm
WIDEST = 0.070  # metres; what is wider is held by its rim
MOST_TURNED = 1.8  # rad from home; the last joint reaches 2.1 one way and 3.7 the other
REACH = 0.74  # metres from the base, hand pointing down; at 0.76 the elbow is straight
RIM_SIDE = -0.75 * np.pi  # rad; where a rim is held if it can be: to the right, and near the base
RIM_DEPTH = 0.012  # metres that the grip site goes below a rim
RIM_INSET = 0.004  # metres from the outermost of a rim to the middle of the wall there
STILL = 0.03  # m/s; slower than that, closing fingers have met something
EMPTY = 0.012  # gripper opening below which nothing is between the fingers
PLACED = 0.025  # metres off the place within which it is let go: 0.030 is what counts
DROP = 0.012  # metres above the place, from where it is let go: a straight arm gets no lower
AT_PLACE = 0.016  # metres off the place within which it is lowered
WHOLE_SLACK = (0.008, 0.010)  # metres off, across and along the fingers, at which they may close
RIM_SLACK = (0.016, 0.012)
GUESSES = 7  # of where a thing is, that an unsure student has

# Half sizes of what must be free around a grasp: across (from finger to finger), along, and from
# where to where above the grip site; metres.
_HAND = (0.115, 0.045, 0.05, 0.30)
_FINGERS = (0.056, 0.016, -0.008, 0.05)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Grasp:
    """How to take a thing, in its own frame.

    Attributes:
        position: (3,) of the grip site, m.
        axis: (3,) unit vector from finger to finger.
        orientation: (3, 3) the thing's, when this was planned.
        at: (3,) its position then, m.
        slack: m that the fingers may be off when they close, across and along them.
    """

    position: Floats
    axis: Floats
    orientation: Floats
    at: Floats
    slack: tuple[float, float]


class Expert:
    """What to do in a world, from its state.

    Raises:
        UserError: the suite is none that the expert can do.
    """

    def __init__(self, world: World) -> None:
        if world.suite not in SUITES:
            raise UserError(
                f"the scripted expert does {' and '.join(SUITES)}, not {world.suite}; take "
                "demonstrations from elsewhere"
            )
        self._world, self._model, self._data = world, world.model, world.data
        thing, place = world.goal
        self._thing = world.env.obj_body_id[thing]
        self._place = world.env.obj_body_id[place]
        self._inside = world.suite == "libero_object"
        roots = self._model.body_rootid
        robot = {
            int(roots[body])
            for body in range(self._model.nbody)
            if self._model.body(body).name.startswith(("robot0", "gripper0", "mount0"))
        }
        own, place_ = int(roots[self._thing]), int(roots[self._place])
        self._own = _Cloud(self._model, {own})
        self._under = _Cloud(self._model, {place_})
        self._others = _Cloud(self._model, {int(root) for root in roots} - robot - {0, own})
        self._walls = _walls(self._model, self._thing)
        self._grasp: Grasp | None = None

    def action(self) -> NDArray[np.float64]:
        """(7,), as `World.step` takes it."""
        self._see()
        way = self._to_place()
        if np.hypot(*way[:2]) < PLACED and way[2] > -DROP:
            # Whatever the fingers do by now: who only sees them must not have to guess.
            return self._move(np.zeros(3), 0.0, 1.0, CAREFUL)
        return self._carry(way) if self._holding() else self._take()

    def _see(self) -> None:
        """What is where."""
        data, site = self._data, self._world.robot.eef_site_id
        self._here = data.site_xpos[site].copy()
        self._hand = data.site_xmat[site].reshape(3, 3).copy()
        self._opening = self._world.gripper_opening()
        self._at = data.xpos[self._thing].copy()
        self._turned = data.xmat[self._thing].reshape(3, 3).copy()
        self._shape, self._around = self._own.seen(data), self._others.seen(data)
        self._target = self._under.seen(data)

    def _fingers(self) -> Floats:
        """(2,) horizontal unit vector from the left finger to the right one, y at home."""
        left, right = (
            self._data.body(f"gripper0_{side}finger").xpos[:2] for side in ("left", "right")
        )
        return (right - left) / np.linalg.norm(right - left)

    # Taking

    def _plan(self) -> Grasp:
        """The grasp to go for; another one once the thing has moved."""
        old = self._grasp
        if old is not None:
            moved = float(np.linalg.norm(self._at - old.at))
            turned = np.arccos(np.clip((np.trace(self._turned @ old.orientation.T) - 1) / 2, -1, 1))
            if moved < 0.02 and turned < 0.2:
                return old
        middle = (0.0, self._shape.mean(0), np.append(self._fingers(), 0.0))
        whole = self._across()
        candidates = whole or self._at_rim() or [middle]
        _, position, axis = min(candidates, key=lambda candidate: candidate[0])
        self._grasp = Grasp(
            self._turned.T @ (position - self._at),
            self._turned.T @ axis,
            self._turned,
            self._at,
            WHOLE_SLACK if whole else RIM_SLACK,
        )
        return self._grasp

    def _across(self) -> list[tuple[float, Floats, Floats]]:
        """Costs, positions and finger axes of grasps that have the whole thing between them."""
        shape, found = self._shape, []
        low, high = float(shape[:, 2].min()), float(shape[:, 2].max())
        height = max(high - min(0.035, 0.6 * (high - low)), low + TIPS)
        for angle in np.deg2rad(np.arange(-90, 90, 7.5)):
            across = np.array([-np.sin(angle), np.cos(angle), 0.0])
            along = np.array([np.cos(angle), np.sin(angle), 0.0])
            a, b = shape @ across, shape @ along
            width = float(np.ptp(a))
            if width > WIDEST:
                continue
            middle = across * (a.max() + a.min()) / 2 + along * (b.max() + b.min()) / 2
            position = middle + np.array([0.0, 0.0, height])
            cost = width + 0.01 * abs(angle) + self._blocked(position, across)
            cost += self._far(position)
            found.append((cost, position, across))
        return found

    def _at_rim(self) -> list[tuple[float, Floats, Floats]]:
        """Costs, positions and finger axes of grasps with one finger on either side of a rim."""
        points, found = (self._shape - self._at) @ self._turned, []
        top = points[:, 2].max()
        radius = np.hypot(*points[points[:, 2] > top - 0.005][:, :2].T).max() - RIM_INSET
        for angle in self._walls:
            outward = np.array([np.cos(angle), np.sin(angle), 0.0])
            normal = self._turned @ outward
            across = normal * (1, 1, 0)
            if np.linalg.norm(across) < 0.7:
                continue
            across /= np.linalg.norm(across)
            edge = radius * outward + np.array([0.0, 0.0, top])
            position = self._turned @ edge + self._at - (0, 0, RIM_DEPTH)
            # Always the same piece of the rim, if one can: whoever learns from this, and does not
            # see every millimetre, must not have to guess which one is meant.
            aside = np.arctan2(normal[1], normal[0]) - RIM_SIDE
            cost = 0.05 * abs((aside + np.pi) % (2 * np.pi) - np.pi) + 0.3 * abs(normal[2])
            cost += self._blocked(position, across) + self._far(position)
            # Nothing of the thing itself may be where the palm goes.
            reach = (self._shape - position) @ np.column_stack(_frame(across))
            own = (np.abs(reach[:, 0]) < 0.1) & (np.abs(reach[:, 1]) < 0.03) & (reach[:, 2] > PALM)
            found.append((cost + 10.0 * own.any(), position, across))
        return found

    def _blocked(self, position: Floats, across: Floats) -> float:
        """How much of what stands around is where hand and fingers would be."""
        reach = (self._around - position) @ np.column_stack(_frame(across))
        hit = np.zeros(len(reach), bool)
        for wide, deep, low, high in (_HAND, _FINGERS):
            hit |= (
                (np.abs(reach[:, 0]) < wide)
                & (np.abs(reach[:, 1]) < deep)
                & (reach[:, 2] > low)
                & (reach[:, 2] < high)
            )
        return 10.0 * bool(hit.any()) + 0.002 * float(hit.sum())

    def _far(self, position: Floats) -> float:
        """How far out of reach the hand would be, here or where it takes the thing."""
        there = position + self._data.xpos[self._place] - self._at
        far = max(np.linalg.norm((place - self._world.base)[:2]) for place in (position, there))
        return 20 * max(float(far) - REACH, 0)

    def _goal_of(self, grasp: Grasp) -> tuple[Floats, float, Floats]:
        """Where the grip site goes, how far the hand must still turn, and the way to there."""
        goal = self._turned @ grasp.position + self._at
        axis = self._turned @ grasp.axis
        # The gripper has two equal sides, and its last joint a range: stay within a quarter turn.
        turned = _angle(self._fingers())
        wanted = _half_turn(_angle(axis)) + np.array([-np.pi, 0, np.pi])
        wanted = wanted[np.abs(wanted) < MOST_TURNED]
        # Of two that are equally far, always the same one.
        turn = float(wanted[np.abs(wanted - turned + 0.1).argmin()] - turned)
        return goal, turn, goal - self._here

    def _off(self, way: Floats) -> Floats:
        """(3,) m: across the fingers, along them, and up, without signs."""
        across = self._fingers()
        return np.abs([across @ way[:2], across[0] * way[1] - across[1] * way[0], way[2]])

    def _holding(self) -> bool:
        """Whether the fingers have closed, with force, and the thing is between them."""
        if self._grasp is None or self._opening < EMPTY:
            return False
        robot = self._world.robot
        speed = np.abs(self._data.qvel[robot._ref_gripper_joint_vel_indexes]).max()
        squeezed = robot.gripper.current_action[0] < -0.99 and speed < STILL
        off = self._off(self._goal_of(self._grasp)[2])
        return bool(squeezed and off.max() < 0.03)

    def _take(self) -> Floats:
        grasp = self._plan()
        goal, turn, way = self._goal_of(grasp)
        wide, deep = grasp.slack
        across, along, up = self._off(way)
        # What closes centres the thing, so tolerances grow meanwhile.
        closing = np.clip((0.95 - self._opening) / 0.3, 0, 1) * (self._opening > EMPTY)
        slack = 1 + 1.5 * closing
        near = max(across / wide, along / deep, up / 0.008) < slack and abs(turn) < 0.12 * slack
        if near and self._opening > EMPTY:
            return self._move(way, turn, 0.0, CAREFUL)
        off = np.hypot(max(across - wide / 2, 0), max(along - deep / 2, 0)) + 0.06 * abs(turn)
        off += 0.10 * float(np.clip(0.9 - self._opening, 0, 1))
        height = max(self._top(self._here, goal, 0.08), self._shape[:, 2].max()) + CLEARANCE + TIPS
        # Fingers that have closed on nothing open above: down here they would close again.
        missed = self._opening < EMPTY and max(across, along) < 0.045 and up < 0.025
        return self._over_and_down(goal, off, height, turn, 0.0 if missed else 1.0)

    # Placing

    def _to_place(self) -> Floats:
        """(3,) m: how far the hand must go for the thing to be set down."""
        target = self._target
        down = float(target[:, 2].min() - self._shape[:, 2].min())
        if self._inside:  # as deep as the hand may go
            down = max(down + 0.015, target[:, 2].max() - 0.01 - self._here[2])
        else:
            down += 0.004
        return np.append(self._data.xpos[self._place][:2] - self._at[:2], down)

    def _carry(self, way: Floats) -> Floats:
        off = float(np.hypot(*way[:2]))
        if off < AT_PLACE and way[2] > -0.03:
            return self._move(way, 0.0, 0.0, GENTLE)
        size = np.linalg.norm(self._shape[:, :2] - self._at[:2], axis=1).max()
        top = self._top(self._at, self._data.xpos[self._place], float(size) + 0.02)
        over = max(top, self._target[:, 2].max()) + CLEARANCE
        over += self._here[2] - self._shape[:, 2].min()
        return self._over_and_down(self._here + way, max(off - AT_PLACE, 0), over, 0.0, 0.0)

    def _top(self, start: Floats, end: Floats, wide: float) -> float:
        """Height of the highest that stands within `wide` m of a way, m."""
        way = end[:2] - start[:2]
        share = (self._around[:, :2] - start[:2]) @ way / max(float(way @ way), 1e-9)
        nearest = start[:2] + np.clip(share, 0, 1)[:, None] * way
        aside = np.linalg.norm(self._around[:, :2] - nearest, axis=1)
        return float(self._around[aside < wide, 2].max(initial=-np.inf))

    # Moving

    def _over_and_down(
        self, goal: Floats, off: float, height: float, turn: float, opening: float
    ) -> Floats:
        """A step to a goal, at a height on the way; `off` metres say how near it is."""
        target = goal.copy()
        target[2] = min(goal[2] + SLOPE * off, max(height, goal[2]))
        way = target - self._here
        way[:2] *= np.clip(1.3 - way[2] / 0.03, 0, 1)  # first up, then across
        fast = MAX_STEP if off > 0.01 else CAREFUL
        return self._move(way, turn, opening, fast)

    def _move(self, way: Floats, turn: float, opening: float, fast: float) -> Floats:
        """Limit a step, and keep the hand pointing down."""
        step = GAIN * way
        step[:2] *= min(1, fast / max(float(np.hypot(*step[:2])), 1e-9))
        step[2] = np.clip(step[2], -fast, fast)
        tilt = np.cross(self._hand[:, 2], (0, 0, -1))
        rotation = np.array([*np.clip(tilt[:2], -0.25, 0.25), np.clip(0.7 * turn, -0.35, 0.35)])
        return np.array([*step, *np.clip(rotation, -ROTATION, ROTATION), opening])


class _Guess(Expert):
    """One who takes the thing to be `shift` m (3,) from where it is, and plans anew every step."""

    def __init__(self, world: World, shift: Floats) -> None:
        super().__init__(world)
        self._shift = shift

    def _see(self) -> None:
        super()._see()
        self._at, self._shape = self._at + self._shift, self._shape + self._shift
        if self._opening > 0.6:
            self._grasp = None


class Unsure:
    """Somebody who has learned from the expert and does not see exactly where the thing is.

    Does the median of what experts would with different ideas of that. A stand-in for a policy that
    can be tried before there is one: what it cannot do, cloning will hardly teach.

    Args:
        world: where.
        spread: standard deviation of the ideas, horizontally, m.
        rng: draws them, once.
    """

    def __init__(self, world: World, spread: float, rng: np.random.Generator) -> None:
        shifts = np.append(rng.normal(0, spread, (GUESSES, 2)), np.zeros((GUESSES, 1)), axis=1)
        self._guesses = [_Guess(world, shift) for shift in shifts]

    def action(self) -> NDArray[np.float64]:
        """(7,), as `World.step` takes it."""
        return np.median([guess.action() for guess in self._guesses], axis=0)


def _frame(across: Floats) -> tuple[Floats, Floats, Floats]:
    """Axes of a gripper that points down: across its fingers, along them, up."""
    return across, np.array([-across[1], across[0], 0.0]), np.array([0.0, 0.0, 1.0])


def _angle(axis: Floats) -> float:
    """Angle (rad) of an axis from finger to finger about the vertical; at home it is 0."""
    return float(np.arctan2(-axis[0], axis[1]))


def _half_turn(angle: float) -> float:
    """An angle modulo half a turn, from -pi/2 to pi/2."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


class _Cloud:
    """Points of the collision shapes of some bodies, which move with them."""

    def __init__(self, model: mujoco.MjModel, roots: set[int]) -> None:
        points: dict[int, list[Floats]] = {}
        for geom in range(model.ngeom):
            body = int(model.geom_bodyid[geom])
            touches = model.geom_contype[geom] or model.geom_conaffinity[geom]
            if touches and int(model.body_rootid[body]) in roots:
                points.setdefault(body, []).append(_points(model, geom))
        self._parts = [(body, np.concatenate(parts)) for body, parts in points.items()]

    def seen(self, data: mujoco.MjData) -> Floats:
        """(N, 3) where they are, m in the world's frame."""
        return np.concatenate(
            [points @ data.xmat[b].reshape(3, 3).T + data.xpos[b] for b, points in self._parts]
        )


def _walls(model: mujoco.MjModel, body: int) -> Floats:
    """Angles (rad, about the body's z) of the middles of the pieces that a bowl's rim is made of.

    Fingers that close on an edge between two of them slip.
    """
    mine = (model.geom_bodyid == body) & (model.geom_contype > 0)
    middles = model.geom_pos[mine]
    radius = np.hypot(middles[:, 0], middles[:, 1])
    outer = middles[radius > 0.9 * radius.max()]
    return np.arctan2(outer[:, 1], outer[:, 0])


def _points(model: mujoco.MjModel, geom: int) -> Floats:
    """(N, 3) points of a shape in its body's frame: a mesh's vertices, else a grid of 15 mm."""
    kind, size = mujoco.mjtGeom(int(model.geom_type[geom])), model.geom_size[geom]
    types = mujoco.mjtGeom
    if kind == types.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        start = model.mesh_vertadr[mesh]
        local = model.mesh_vert[start : start + model.mesh_vertnum[mesh]].astype(float)
    else:
        half = {
            types.mjGEOM_SPHERE: size[[0, 0, 0]],
            types.mjGEOM_CYLINDER: size[[0, 0, 1]],
            types.mjGEOM_CAPSULE: np.array([size[0], size[0], size[1] + size[0]]),
            types.mjGEOM_PLANE: np.zeros(3),  # the floor: nothing stands below it
        }.get(kind, size)
        counts = np.clip(np.ceil(half / 0.0075).astype(int) + 1, 2, 30)
        axes = [np.linspace(-h, h, n) for h, n in zip(half, counts, strict=True)]
        local = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    turn = np.empty(9)
    mujoco.mju_quat2Mat(turn, model.geom_quat[geom])
    return local @ turn.reshape(3, 3).T + model.geom_pos[geom]


def rollout(
    world: World, seed: int, limit: int, noise: float = 0.0, unsure: float = 0.0
) -> tuple[bool, int]:
    """One episode of the expert: whether it succeeded, and in how many steps.

    noise: standard deviation of what is added to the translation, m a control step; reproducible
    for the seed. unsure: of the ideas of where the thing is, m; see `Unsure`.
    """
    world.reset(seed)
    rng = np.random.default_rng([seed, 2])
    expert = Unsure(world, unsure, rng) if unsure else Expert(world)
    for step in range(limit):
        action = expert.action()
        action[:3] += rng.normal(0, noise, 3)
        world.step(action)
        if world.success():
            return True, step + 1
    return False, limit


def main() -> None:
    """Measure the expert: a JSON line for every episode, a table on standard error."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--states", type=int, default=10, help="scenes of each task (default 10)")
    parser.add_argument("--sampled", action="store_true", help="not the benchmark's own")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="on translations, m a control step"
    )
    parser.add_argument(
        "--unsure", type=float, default=0.0, help="about where the thing is, m; as a student is"
    )
    arguments = parser.parse_args()
    suite, count = arguments.suite, arguments.states
    if not 1 <= count <= (SCENES_PER_TASK if arguments.sampled else STATES):
        parser.error(f"--states: from 1 to {STATES}, or to {SCENES_PER_TASK} with --sampled")
    results = []
    for number in range(TASKS):
        world = World(suite, number)
        seeds = [number + TASKS * k for k in range(count)]
        if arguments.sampled:
            seeds = [FIRST_SAMPLED + SCENES_PER_TASK * number + k for k in range(count)]
        for seed in seeds:
            how = {"noise": arguments.noise, "unsure": arguments.unsure}
            success, steps = rollout(world, seed, STEP_LIMITS[suite], **how)
            results.append(success)
            row = {"suite": suite, "task": world.task.name, "seed": seed, **how}
            print(json.dumps({**row, "success": success, "steps": steps}), flush=True)
        _report(world.task.name, results[-count:])
    _report(suite, results)


def _report(name: str, results: list[bool]) -> None:
    low, high = clopper_pearson(sum(results), len(results))
    print(
        f"{name}: {sum(results)} of {len(results)} "
        f"(95% interval {100 * low:.0f} to {100 * high:.0f}%)",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
