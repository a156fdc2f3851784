"""The tabletop as a Gymnasium environment: one image, an instruction, end-effector deltas."""

from __future__ import annotations

import string
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from rlrc_ros.errors import UserError
from rlrc_ros.sim.world import World

CONTROL_RATE = 10  # Hz
ACTION_LOW = np.array([-0.03] * 3 + [-0.15] * 3 + [0], dtype=np.float32)
ACTION_HIGH = np.array([0.03] * 3 + [0.15] * 3 + [1], dtype=np.float32)
_LETTERS = string.ascii_lowercase + " "


class TabletopEnv(gym.Env[dict[str, Any], np.ndarray]):
    """One episode is one instruction in one scene.

    Observation: `image` (H, W, 3) uint8 from the front camera; `proprioception` (8,) float32, seven
    joint positions in radians and the gripper's opening from 0 to 1; `instruction`, text.

    Action (7,) float32, for one step: the end effector's translation in metres and its rotation
    vector in radians, both in the base frame, and the gripper's opening to go to. It is clipped to
    ACTION_LOW and ACTION_HIGH, and executed as the arm's driver executes a command: as a constant
    twist, delta × CONTROL_RATE.

    Reward: 1 on the step that satisfies the scene's own instruction, and ends the episode; else 0.

    Info: `success`; from `reset` also `scene`, as JSON-able values.

    `reset(seed=…)`: the scene depends on the seed alone; `options={"family": "push"}` asks the same
    scene for an instruction of that family. Without a seed one is drawn.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_RATE,
    }

    def __init__(
        self,
        image_size: int = 128,
        max_steps: int = 120,
        latency: tuple[float, float] = (0.0, 0.0),
        render_mode: str | None = None,
    ):
        """image_size: pixels, height and width of the image. max_steps: truncation.

        latency: seconds (low, high) until a step's command takes effect, drawn uniformly for every
        step, reproducibly for the seed; the command before goes on until then, as when a policy
        takes its time. render_mode: "rgb_array" has `render` show the scene to people.
        Raises UserError if the latency is no interval within a step.
        """
        if not 0 <= latency[0] <= latency[1] <= 1 / CONTROL_RATE:
            raise UserError(
                f"latency is (low, high) seconds with 0 <= low <= high <= {1 / CONTROL_RATE}, "
                f"not {latency}"
            )
        self.world = World(image_size)
        self.max_steps = max_steps
        self.latency = latency
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Dict(
            {
                "image": gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "proprioception": gym.spaces.Box(
                    np.array([-4] * 7 + [0], np.float32), np.array([4] * 7 + [1], np.float32)
                ),
                "instruction": gym.spaces.Text(60, charset=_LETTERS),
            }
        )
        self.action_space = gym.spaces.Box(ACTION_LOW, ACTION_HIGH)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Set up the scene of the seed. Raises UserError for an unknown family."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.world.reset(seed, (options or {}).get("family"))
        self._delays = np.random.default_rng([seed, 1])
        self._steps = 0
        info = {"success": False, "scene": self.world.scene.to_dict()}
        return self._observation(), info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Simulate 1 / CONTROL_RATE seconds. Raises UserError for an action that is not finite."""
        action = np.clip(np.asarray(action, dtype=float), ACTION_LOW, ACTION_HIGH)
        delay = float(self._delays.uniform(*self.latency))
        self.world.advance(delay)
        self.world.set_twist(action[:6] * CONTROL_RATE)
        self.world.set_gripper(action[6])
        self.world.advance(1 / CONTROL_RATE - delay)
        self._steps += 1
        success = self.world.success()
        truncated = not success and self._steps >= self.max_steps
        info = {"success": success}
        return self._observation(), float(success), success, truncated, info

    def render(self) -> np.ndarray | None:
        """The scene from the wide camera, (480, 640, 3), in render mode "rgb_array"."""
        return self.world.render("wide", (480, 640)) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Free the OpenGL contexts."""
        self.world.close()

    def _observation(self) -> dict[str, Any]:
        world = self.world
        proprioception = np.append(world.joint_positions(), world.gripper_opening())
        return {
            "image": world.render(),
            "proprioception": proprioception.astype(np.float32),
            "instruction": world.scene.instruction,
        }
