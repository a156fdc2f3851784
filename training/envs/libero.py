"""LIBERO and LIBERO-PRO (arXiv 2306.03310, 2510.03827) over a list of scenes, for rollouts.

The published protocol: ten steps in which things settle, the image of the `agentview` camera
turned by half a turn, the suite's step limit, and the benchmark's own initial states. Here each of
a suite's 10 tasks and 50 initial states has a number below 500; every number from there on is a
scene sampled anew, so that no demonstration can share one with the evaluation. Where several suites
are one environment, the benchmark's scenes of the second are those from 500 on, and so forth.

Needs the extra `libero`, which brings every asset.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlrc_ros.errors import UserError
from rlrc_ros.sim.cameras import make_renderer
from rlrc_ros.sim.model import mujoco
from training.config import BENCHMARK_SCENES, benchmark_scenes, suites_of
from training.data.demonstrations import encode_png
from training.envs.tabletop import TEXT_BYTES, encode_text

STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
"""Control steps of an episode, as OpenVLA's evaluation has them (run_libero_eval.py)."""
PERTURBATIONS = ("lan", "object", "swap", "task")
"""LIBERO-PRO's: other words, other looks, exchanged places, another task in the same scene."""
SUITES = (*STEP_LIMITS, *(f"{suite}_{kind}" for suite in STEP_LIMITS for kind in PERTURBATIONS))
TASKS, STATES = 10, 50
SCENES_PER_TASK = 100
"""Of the sampled scenes, so many in a row are of one task: changing it takes a second."""
SETTLING_STEPS = 10
ARM_NOISE = 0.02
"""Standard deviation of a sampled scene's joint positions, rad: robosuite's default."""
CONTROL_RATE = 20
HAND_ROOM = 0.14
"""Metres from the grip site, within which nothing is displaced: the hand may touch it."""
FINGER_STROKE = 0.04
"""Metres that one finger moves."""

# What the controller takes for 1: robosuite's osc_pose.json.
TRANSLATION, ROTATION = 0.05, 0.5
ACTION_LOW = np.array([-TRANSLATION] * 3 + [-ROTATION] * 3 + [0], np.float32)
ACTION_HIGH = np.array([TRANSLATION] * 3 + [ROTATION] * 3 + [1], np.float32)
_SETTLE = np.array([0.0] * 6 + [-1.0])


class Scene(NamedTuple):
    """Which suite and task, and which of its initial states; None where it is sampled."""

    suite: str
    task: int
    state: int | None


def scene_of(environment: str, seed: int) -> Scene:
    """The scene with a number: consecutive ones of the benchmark are of different tasks.

    environment: one of SUITES, or several joined by "+".
    """
    suites = suites_of(environment)
    if seed < benchmark_scenes(environment):
        place, number = divmod(seed, BENCHMARK_SCENES)
        return Scene(suites[place], number % TASKS, number // TASKS)
    turn, task = divmod(seed // SCENES_PER_TASK, TASKS)
    return Scene(suites[turn % len(suites)], task, None)


def sampled_scenes(environment: str, first: int, count: int) -> list[int]:
    """Numbers of so many sampled scenes from `first` on, as many of each task as of any other."""
    tasks = TASKS * len(suites_of(environment))
    turns, rest = divmod(count, tasks * SCENES_PER_TASK)
    whole = turns * tasks * SCENES_PER_TASK
    numbers = list(range(first, first + whole))
    for task in range(tasks):
        start = first + whole + task * SCENES_PER_TASK
        numbers += range(start, start + len(range(task, rest, tasks)))
    return numbers


@dataclass(frozen=True)
class Task:
    """One of a suite's tasks.

    Attributes:
        name: the benchmark's.
        instruction: what the policy is told.
        bddl: the file that defines it.
        states: the file of its initial states.
    """

    name: str
    instruction: str
    bddl: Path
    states: Path


@lru_cache
def tasks(suite: str) -> tuple[Task, ...]:
    """The tasks of a suite, in the benchmark's order.

    The instruction is the published one, which is in the file's name, unless a perturbation has
    changed the one in the file.
    """
    from libero.libero import get_libero_path
    from libero.libero.benchmark import task_maps

    folder, states = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
    base, found = _unperturbed(suite), []
    for task in task_maps[suite].values():
        bddl = folder / suite / task.bddl_file
        told, original = _language(bddl), _language(folder / base / task.bddl_file)
        file = states / suite / f"{task.init_states_file}.npz"
        found.append(Task(task.name, task.language if told == original else told, bddl, file))
    return tuple(found)


def _unperturbed(suite: str) -> str:
    kinds = ("", *(f"_{kind}" for kind in PERTURBATIONS))
    return next(name for name in STEP_LIMITS if suite in {name + kind for kind in kinds})


def _language(bddl: Path) -> str:
    match = re.search(r"\(:language\s+(.*?)\s*\)", bddl.read_text())
    assert match is not None
    return match[1].lower()


def vocabulary() -> list[str]:
    """Every word of every suite's instructions, perturbed ones too: what a policy must read."""
    texts = (task.instruction for suite in SUITES for task in tasks(suite))
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})


class World:
    """The simulation of one task.

    Args:
        suite: one of SUITES.
        number: which of its tasks.
        image_size: pixels, height and width.
    """

    def __init__(self, suite: str, number: int, image_size: int = 256) -> None:
        self.suite, self.number, self.image_size = suite, number, image_size
        self.task = tasks(suite)[number]
        with _quiet():
            from libero.libero.envs.env_wrapper import ControlEnv

            self.control = ControlEnv(
                bddl_file_name=str(self.task.bddl),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
                hard_reset=False,  # the model stays, and with it what the renderer knows of it
            )
        self.env = self.control.env
        self.robot = self.env.robots[0]
        self.model: mujoco.MjModel = self.env.sim.model._model
        self.data: mujoco.MjData = self.env.sim.data._data
        with np.load(self.task.states, allow_pickle=False) as file:
            self._states = file["states"]
        self._renderer: mujoco.Renderer | None = None

    def reset(self, seed: int, environment: str = "") -> None:
        """Set up a scene of this task and let it settle.

        What the scene does not say (of the benchmark's, where the furniture stands) follows from
        its number too.

        Args:
            seed: the scene's number.
            environment: that it is a number of; the suite if not given.
        """
        state = scene_of(environment or self.suite, seed).state
        # Furniture is placed relative to where the model has it, which the last scene has changed.
        for fixture in self.env.fixtures_dict.values():
            if (body := mujoco.mj_name2id(self.model, _BODY, fixture.root_body)) >= 0:
                self.model.body_pos[body] = 0
                self.model.body_quat[body] = (1, 0, 0, 0)
        with _global_generator(seed if state is None else state), _quiet():
            self.control.reset()
        if state is not None:
            self.control.set_init_state(self._states[state])
        else:  # robosuite's own noise would displace the posture that the controller goes back to
            noise = np.random.default_rng([seed, 3]).normal(0, ARM_NOISE, 7)
            self.data.qpos[self.robot._ref_joint_pos_indexes] += noise
            self.env.sim.forward()
        self.robot.gripper.current_action = np.zeros(2)  # robosuite forgets this one
        for _ in range(SETTLING_STEPS):
            self.control.step(_SETTLE)

    def step(self, action: NDArray[np.floating]) -> None:
        """One control step: (7,) in metres, radians and gripper opening, base frame.

        The controller's goal is that far from where the end effector is; the gripper opens from 0.5
        on, else it closes.

        Raises:
            UserError: the action is not finite.
        """
        if not np.isfinite(action).all():
            raise UserError(f"the action is not finite: {np.asarray(action).tolist()}")
        a = np.clip(np.asarray(action, float), ACTION_LOW, ACTION_HIGH)
        self.control.step(np.r_[a[:3] / TRANSLATION, a[3:6] / ROTATION, 1 - 2 * a[6]])

    def success(self) -> bool:
        """Whether the task's goal holds."""
        return bool(self.control.check_success())

    def proprioception(self) -> NDArray[np.float32]:
        """(8,): seven joint positions in rad, the gripper's opening from 0 to 1."""
        joints = self.data.qpos[self.robot._ref_joint_pos_indexes]
        return np.append(joints, self.gripper_opening()).astype(np.float32)

    def gripper_opening(self) -> float:
        """From 0, closed, to 1."""
        left, right = self.data.qpos[self.robot._ref_gripper_joint_pos_indexes]
        return float(np.clip((left - right) / (2 * FINGER_STROKE), 0, 1))

    def grounding(self) -> NDArray[np.float64]:
        """(6,): where the thing to move and the place for it are, m in the base frame."""
        goal = self.goal
        return np.concatenate([self.position(name) for name in goal]) - np.tile(self.base, 2)

    @property
    def base(self) -> NDArray[np.float64]:
        """(3,) where the arm stands, m; its axes are the world's."""
        return np.asarray(self.robot.base_pos)

    @property
    def goal(self) -> tuple[str, str]:
        """Bodies that the first condition of the goal names; one alone is named twice."""
        _, *names = self.env.parsed_problem["goal_state"][0]
        first, last = (self._body_of(name) for name in (names[0], names[-1]))
        return first, last

    def _body_of(self, name: str) -> str:
        """The object itself, or the one that a region belongs to."""
        bodies = self.env.obj_body_id
        return name if name in bodies else next(body for body in bodies if name.startswith(body))

    def position(self, name: str) -> NDArray[np.float64]:
        """(3,) of an object's body, m in the world's frame."""
        return np.array(self.data.xpos[self.env.obj_body_id[name]])

    def displace(self, rng: np.random.Generator, spread: float) -> bool:
        """Put the thing to move, or the place for it, somewhere near, as long as the hand is not.

        Returns whether it stands there: not where it would be in something else.

        spread: standard deviation along each horizontal axis, m.
        """
        body = self.env.obj_body_id[self.goal[rng.integers(2)]]
        shift = rng.normal(0, spread, 2)
        joint = self.model.body_jntadr[body]
        hand = self.data.site_xpos[self.robot.eef_site_id]
        near = np.linalg.norm(hand - self.data.xpos[body]) < HAND_ROOM
        if near or joint < 0 or self.model.jnt_type[joint] != mujoco.mjtJoint.mjJNT_FREE:
            return False
        start = self.model.jnt_qposadr[joint]
        before, pressed = self.data.qpos[start : start + 2].copy(), self._pressed(body)
        self.data.qpos[start : start + 2] += shift
        self.env.sim.forward()
        stands = self._pressed(body) < pressed + 0.001
        if not stands:
            self.data.qpos[start : start + 2] = before
            self.env.sim.forward()
        return stands

    def _pressed(self, body: int) -> float:
        """How deep a body is in others, m."""
        contacts, geoms = self.data.contact, self.model.geom_bodyid
        mine = (self.model.body_rootid[geoms[contacts.geom]] == body).any(1)
        return float(-contacts.dist[mine].min(initial=0.0))

    def render(self) -> NDArray[np.uint8]:
        """(image_size, image_size, 3) RGB of `agentview`, as the published evaluation shows it.

        Raises:
            UserError: OpenGL is missing.
        """
        if self._renderer is None:
            size = self.image_size
            self._renderer = make_renderer(self.model, size, size, max_geom=1000)
        self._renderer.update_scene(self.data, "agentview", _OPTIONS)
        # OpenGL's picture is upside down; half a turn makes it upright, and swaps left and right.
        return np.ascontiguousarray(self._renderer.render()[:, ::-1])

    def close(self) -> None:
        """Free what OpenGL holds."""
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = None


_BODY = mujoco.mjtObj.mjOBJ_BODY
_OPTIONS = mujoco.MjvOption()
_OPTIONS.geomgroup[0] = 0  # collision shapes


class SeededLibero(gym.Env):
    """One or several suites, their scenes taken from a list of numbers, one a reset.

    Observations are the tabletop's: `image`, `proprioception`, `instruction` as bytes. The reward
    is 1 on the step that reaches the goal, and ends the episode; else 0.

    Args:
        environment: one of SUITES, or several joined by "+".
        seeds: what to go through, see `scene_of`; when they are used up, resets repeat the last
            scene and `info["exhausted"]` is set. `set_seeds` replaces them.
        label: put what a demonstration needs into the infos of reset and step: `expert_action`,
            `grounding`, and the image as a PNG file, `png`.
        max_steps: the scene's suite's limit by default.
        image_size: pixels, height and width.
    """

    def __init__(
        self,
        environment: str,
        seeds: Iterable[int],
        label: bool = False,
        max_steps: int | None = None,
        image_size: int = 256,
    ) -> None:
        self.environment, self.image_size = environment, image_size
        self._seeds: Iterator[int] = iter(seeds)
        self._label = label
        self._max_steps = max_steps
        self._seed, self._exhausted = 0, False
        self._world: World | None = None
        self._expert: Any = None
        self.observation_space = gym.spaces.Dict(
            {
                "image": gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "proprioception": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32),
                "instruction": gym.spaces.Box(0, 255, (TEXT_BYTES,), np.uint8),
            }
        )
        self.action_space = gym.spaces.Box(ACTION_LOW, ACTION_HIGH)

    @property
    def world(self) -> World:
        """The simulation of the task that the current scene is of."""
        assert self._world is not None
        return self._world

    def set_seeds(self, seeds: Iterable[int]) -> None:
        """Take scenes from another list from the next reset on."""
        self._seeds = iter(seeds)

    def reset(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the next scene's episode; what Gymnasium's reset takes is not used."""
        following = next(self._seeds, None)
        self._exhausted = following is None
        self._seed = self._seed if following is None else following
        scene = scene_of(self.environment, self._seed)
        suite, number = scene.suite, scene.task
        if self._world is None or (self._world.suite, self._world.number) != (suite, number):
            self.close()
            gc.collect()  # a task's textures and meshes are hundreds of megabytes, in cycles
            self._world = World(suite, number, self.image_size)
        self.world.reset(self._seed, self.environment)
        self._limit = self._max_steps or STEP_LIMITS[_unperturbed(suite)]
        if self._label:
            from training.envs.libero_expert import Expert

            self._expert = Expert(self.world)
        self._steps = 0
        return self._seen(), self._told()

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step."""
        self.world.step(action)
        self._steps += 1
        success = self.world.success()
        truncated = not success and self._steps >= self._limit
        return self._seen(), float(success), success, truncated, self._told()

    def close(self) -> None:
        """Free the renderer."""
        if self._world is not None:
            self._world.close()
        self._world = self._expert = None

    def _seen(self) -> dict[str, Any]:
        self._image = self.world.render()
        return {
            "image": self._image,
            "proprioception": self.world.proprioception(),
            "instruction": encode_text(self.world.task.instruction),
        }

    def _told(self) -> dict[str, Any]:
        world = self.world
        told: dict[str, Any] = {"success": world.success(), "seed": self._seed}
        told |= {"family": world.task.name, "instruction": world.task.instruction}
        told["exhausted"] = self._exhausted
        if self._label:
            told |= {"expert_action": self._expert.action(), "grounding": world.grounding()}
            told["png"] = encode_png(self._image)
        return told


@contextlib.contextmanager
def _global_generator(seed: int) -> Iterator[None]:
    """NumPy's global generator, which LIBERO samples with, seeded; afterwards as it was."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without robosuite's advice on its macros, and LIBERO's prints."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logging.disable(logging.NOTSET)
