"""A scripted expert for every instruction: one function of the state as it is, with no memory.

So it says what to do in any state that another policy got into, and recovers from a slipped object,
a missed grasp or a push aside. How often it succeeds:

    python -m rlrc_ros.sim.expert --episodes 100 --family push --seed 10000 [--noise]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from rlrc_ros.sim import rotations
from rlrc_ros.sim.model import FINGER_STROKE
from rlrc_ros.sim.tabletop import TabletopEnv
from rlrc_ros.sim.tasks import FAMILIES, PLATE_THICKNESS, Goal
from rlrc_ros.sim.world import World

GAIN = 0.6  # of the remaining error, per control step
DESCENT_GAIN = 0.45  # lower: what is executed late goes on into the table
MAX_STEP = 0.025  # metres a control step, 0.25 m/s
PUSH_STEP = 0.018
MAX_TURN = 0.12  # radians a control step
MAX_TILT = 0.06  # radians from upright that are let be: every arm leans a little while it moves
SLOPE = 4.0  # metres of height per metre still to go sideways
CLEARANCE = 0.018  # metres between what passes over and what stands
LOWEST = 0.020  # metres, end effector above the table
PUSH_STOP = 0.020  # metres from the square's centre
PUSH_RUN_UP = 0.028  # metres from where the fingers come down to where they touch

# What `--noise` adds to every action: metres, radians, probability of the opposite opening.
NOISE_TRANSLATION, NOISE_YAW, NOISE_GRIPPER = 0.006, 0.03, 0.05


def expert_action(world: World, instruction: str | None = None) -> np.ndarray:
    """What to do now: (7,) float32, as `TabletopEnv.step` takes it.

    instruction: any valid one of the scene, its own by default; UserError for any other.
    """
    goal = world.scene.goal(instruction or world.scene.instruction)
    return _push(world, goal) if goal.family == "push" else _pick_and_place(world, goal)


def _pick_and_place(world: World, goal: Goal) -> np.ndarray:
    thing, positions = world.scene.objects[goal.object], world.object_positions()
    position = positions[goal.object]
    here, yaw, opening = world.ee_position(), _yaw(world), world.gripper_opening()
    width = thing.size / (2 * FINGER_STROKE)  # as an opening
    if goal.family == "put":
        plate = world.scene.targets[goal.target]
        place = np.array([*plate.position, PLATE_THICKNESS + thing.size / 2])
        tolerance = 0.6 * plate.size
    else:
        base = world.scene.objects[goal.target]
        place = positions[goal.target] + (0, 0, (base.size + thing.size) / 2)
        tolerance = 0.012
    off_place = float(np.hypot(*(place - position)[:2]))

    if off_place < tolerance and abs(position[2] - place[2]) < 0.006:
        # It lies where it should: let go, then rise.
        rise = MAX_STEP * np.clip((opening - width - 0.08) / 0.1, 0, 1)
        return _action(world, np.array([0, 0, rise]), yaw, 1.0)

    grasp = np.array([*position[:2], max(position[2], LOWEST)])
    grasp_yaw = _grasp_yaw(thing.shape, world.object_rotations()[goal.object], yaw)
    turn = abs(grasp_yaw - yaw)
    offset = np.abs(_in_gripper(position - here, yaw))
    # The fingers centre what they close on, so the tolerance grows while they do.
    closing = np.clip((1 - opening) / 0.2, 0, 1)
    between = (
        offset[0] < 0.009 + 0.007 * closing
        and offset[1] < 0.011 + 0.006 * closing
        and offset[2] < 0.010 + 0.010 * closing
        and turn < 0.15 + 0.25 * closing
        and opening > width - 0.08  # else they have closed on nothing
    )
    if between and opening > width + 0.06:
        return _action(world, GAIN * (grasp - here), grasp_yaw, 0.0)

    others = [i for i in range(len(positions)) if i != goal.object]
    over_others = _top(world, positions, others) + CLEARANCE
    if between:
        height = max(place[2] + CLEARANCE, over_others + thing.size / 2)
        step = _over_and_down(position, place, max(off_place - 0.008, 0), height)
        return _action(world, step, yaw, 0.0)

    # Open fingers pass on both sides of the object: it may lie off along them, less so across.
    off_grasp = float(np.hypot(max(offset[0] - 0.012, 0), max(offset[1] - 0.009, 0)))
    # Stay above until the gripper is turned and open.
    off_grasp += 0.05 * turn + 0.05 * float(np.clip((width + 0.25 - opening) / 0.2, 0, 1))
    height = max(over_others, position[2] + thing.size / 2 + CLEARANCE) + 0.01
    return _action(world, _over_and_down(here, grasp, off_grasp, height), grasp_yaw, 1.0)


def _push(world: World, goal: Goal) -> np.ndarray:
    thing, positions = world.scene.objects[goal.object], world.object_positions()
    position = positions[goal.object]
    here, yaw, opening = world.ee_position(), _yaw(world), world.gripper_opening()
    remaining = np.array(world.scene.targets[goal.target].position) - position[:2]
    distance = float(np.hypot(*remaining))
    if distance < PUSH_STOP:
        return _action(world, np.zeros(3), yaw, 0.0)

    forward = remaining / distance
    sideways = np.array([-forward[1], forward[0]])
    # The closed fingers are nearly square: turn one of their four sides to the object.
    push_yaw = _nearest(np.arctan2(forward[1], forward[0]), np.pi / 2, 0.8 * yaw)
    turn = abs(push_yaw - yaw)
    touching = 0.010 + thing.size / 2  # metres between the end effector and the object's centre
    behind = float((position[:2] - here[:2]) @ forward)
    beside = float((here[:2] - position[:2]) @ sideways)
    low = here[2] < LOWEST + 0.015
    if low and behind > touching - 0.01 and abs(beside) < 0.014 and turn < 0.3:
        speed = min(PUSH_STEP, distance - PUSH_STOP + 0.0015)
        speed *= np.clip(1.5 - abs(beside) / 0.008, 0, 1)
        across = speed * forward - GAIN * beside * sideways
        return _action(world, np.array([*across, GAIN * (LOWEST - here[2])]), push_yaw, 0.0)

    # An object that got between the fingers must not be lifted: open them first.
    width = thing.size / (2 * FINGER_STROKE)
    offset = np.abs(_in_gripper(position - here, yaw))
    between = offset.max() < 0.035 and opening > width - 0.1
    if between and opening < width + 0.2:
        return _action(world, np.zeros(3), yaw, 1.0)
    start = np.array([*(position[:2] - (touching + PUSH_RUN_UP) * forward), LOWEST])
    off_start = max(float(np.hypot(*(start - here)[:2])) - 0.008, 0) + 0.05 * max(turn - 0.1, 0)
    height = _top(world, positions, range(len(positions))) + CLEARANCE + 0.01
    step = _over_and_down(here, start, off_start, height)
    return _action(world, step, push_yaw, 1.0 if between else 0.0)


def _over_and_down(here: np.ndarray, there: np.ndarray, off: float, height: float) -> np.ndarray:
    """A step (3,) from here to there, at a height on the way; `off` metres say how near it is."""
    target = there.copy()
    target[2] = min(there[2] + SLOPE * off, max(height, there[2]))
    error = target - here
    step = GAIN * error
    step[2] = max(step[2], DESCENT_GAIN * error[2])
    step[:2] *= np.clip(1.3 - error[2] / 0.03, 0, 1)  # first up, then across
    return step


def _action(world: World, step: np.ndarray, yaw: float, opening: float) -> np.ndarray:
    """Limit a step, and turn the gripper upright and to a yaw."""
    upright = rotations.pointing_down(yaw)
    turn = GAIN * rotations.difference(upright, np.roll(world.ee_quaternion(), 1))
    if np.hypot(*turn[:2]) < GAIN * MAX_TILT:
        turn[:2] = 0
    step = step * min(1, MAX_STEP / max(float(np.linalg.norm(step)), 1e-9))
    turn = turn * min(1, MAX_TURN / max(float(np.linalg.norm(turn)), 1e-9))
    return np.array([*step, *turn, opening], dtype=np.float32)


def _top(world: World, positions: np.ndarray, indices: range | list[int]) -> float:
    """Height of the highest of some objects, metres."""
    return max(float(positions[i, 2]) + world.scene.objects[i].size / 2 for i in indices)


def _yaw(world: World) -> float:
    """Angle of the gripper's x axis about the base's z, within half a turn."""
    x, y, _, _ = world.ee_quaternion()
    return _nearest(2 * np.arctan2(y, x), 2 * np.pi, 0.0)


def _grasp_yaw(shape: str, rotation: np.ndarray, yaw: float) -> float:
    """Gripper yaw for the pads to lie flat on a cube, or to take a fallen cylinder across."""
    if shape == "cube":
        # Any horizontal axis will do, whichever face it lies on.
        axis = rotation[:, np.argmin(np.abs(rotation[2]))]
        return _nearest(np.arctan2(axis[1], axis[0]), np.pi / 2, 0.8 * yaw)
    if abs(rotation[2, 2]) > 0.7:
        return 0.0
    return _nearest(np.arctan2(rotation[1, 2], rotation[0, 2]), np.pi, 0.8 * yaw)


def _nearest(angle: float, period: float, reference: float) -> float:
    """Of the angles equal to `angle` modulo `period`, the nearest to the reference."""
    return float(angle - period * np.round((angle - reference) / period))


def _in_gripper(vector: np.ndarray, yaw: float) -> np.ndarray:
    """A vector of the base frame as (along the pads' width, from finger to finger, up)."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    x, y, z = vector
    return np.array([cos * x + sin * y, cos * y - sin * x, z])


def rollout(env: TabletopEnv, seed: int, family: str, noise: bool = False) -> tuple[bool, int]:
    """One episode of the expert: whether it succeeded, and in how many steps.

    noise: disturb every action, reproducibly for the seed.
    """
    _, info = env.reset(seed=seed, options={"family": family})
    rng = np.random.default_rng([seed, 2])
    steps, done = 0, False
    while not done:
        action = expert_action(env.world)
        if noise:
            action[:3] += rng.normal(0, NOISE_TRANSLATION, 3)
            action[5] += rng.normal(0, NOISE_YAW)
            if rng.random() < NOISE_GRIPPER:
                action[6] = 1 - action[6]
        _, _, terminated, truncated, info = env.step(action)
        steps += 1
        done = terminated or truncated
    return bool(info["success"]), steps


def main() -> None:
    """Measure the expert, with the latency that training uses, and print a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--episodes", type=int, default=100, help="per family")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=10_000, help="of the first scene")
    parser.add_argument("--noise", action="store_true", help="disturb every action")
    args = parser.parse_args()

    env = TabletopEnv(latency=(0.0, 0.08))
    print("family  solved    steps p50  p90  max  steps/s  failed seeds")
    for family in args.family or FAMILIES:
        start = time.perf_counter()
        results = {
            seed: rollout(env, seed, family, args.noise)
            for seed in range(args.seed, args.seed + args.episodes)
        }
        rate = sum(steps for _, steps in results.values()) / (time.perf_counter() - start)
        failed = [seed for seed, (success, _) in results.items() if not success]
        steps = [steps for success, steps in results.values() if success] or [0]
        p50, p90 = np.percentile(steps, [50, 90])
        print(
            f"{family:6}  {args.episodes - len(failed):3} of {args.episodes:<3}  "
            f"{p50:8.0f}  {p90:3.0f}  {max(steps):3}  {rate:7.0f}  {failed or '-'}"
        )
    env.close()


if __name__ == "__main__":
    main()
