"""The simulated arm over its table: physics, and Cartesian velocity control by inverse kinematics.

Frames follow REP-103: the base frame is the world frame, x forward from the arm, y left, z up, the
table's top at z = 0. The end-effector frame is the gripper's: z out of it, so down over the table,
and the fingers along y.
"""

from __future__ import annotations

import math

import numpy as np

from rlrc_ros.errors import UserError
from rlrc_ros.sim import rotations
from rlrc_ros.sim.cameras import Cameras
from rlrc_ros.sim.model import (
    FINGER_STROKE,
    HOME,
    JOINT_NAMES,
    N_OBJECTS,
    N_TARGETS,
    SERVO_LAG,
    TIMESTEP,
    TIP_BELOW_EE,
    compile_model,
    mujoco,
)
from rlrc_ros.sim.scene import ObjectSpec, Scene, TargetSpec, sample_scene, with_other_view
from rlrc_ros.sim.tasks import PLATE_THICKNESS, TableState, satisfied

CONTROL_PERIOD = 0.01  # seconds between solutions of the inverse kinematics
STEPS_PER_PERIOD = round(CONTROL_PERIOD / TIMESTEP)

MAX_LINEAR = 0.5  # m/s; a faster command is slowed down, its direction kept
MAX_ANGULAR = 2.5  # rad/s
MAX_JOINT_SPEED = 2.1  # rad/s, the slowest joint of the Panda
MAX_LEAD = 0.03  # metres that the commanded pose may be ahead of the actual one
MAX_LEAD_ANGLE = math.radians(10)
MAX_TILT = math.radians(35)  # of the commanded gripper, from straight down
REACH_LOW = np.array([0.28, -0.30, TIP_BELOW_EE + 0.003])  # metres, of the commanded position
REACH_HIGH = np.array([0.72, 0.30, 0.32])
GRIPPER_SPEED = 2.5  # openings per second: 0.1 m/s for each finger, as the Franka Hand
GRIPPER_LEAD = 0.3  # openings that the command may be ahead of the fingers: 18 N

DAMPING = 0.03**2 * np.eye(6)  # of the least-squares inverse, against singular poses
POSTURE_GAIN = 0.05  # of the redundant axis towards HOME, per control period

OBJECT_DENSITY = 600.0  # kg/m³, soft wood

_ARM = slice(0, 7)  # in qpos, qvel and ctrl; the fingers follow, then the objects
_FINGERS = slice(7, 9)


class World:
    """One arm over one table, at first with the scene of seed 0.

    Not thread-safe; render only in the thread that rendered first, which is OpenGL's rule.
    """

    joint_names = JOINT_NAMES

    def __init__(self, image_size: int = 128):
        """image_size: pixels, of the square image that `render` gives by default."""
        self.image_size = image_size
        self.model = compile_model()
        self.data = mujoco.MjData(self.model)
        self._cameras = Cameras(self.model)
        self._ee = self.model.site("ee").id
        self._objects = [self.model.geom(f"object{i}").id for i in range(N_OBJECTS)]
        self._targets = [self.model.geom(f"target{i}").id for i in range(N_TARGETS)]
        self._hand = np.flatnonzero(self.model.geom_contype == 4)
        self._joint_low, self._joint_high = self.model.jnt_range[_ARM].T.copy()
        self._jacobian = np.zeros((6, self.model.nv))
        self._object_poses = self.data.qpos[9:].reshape(N_OBJECTS, 7)
        self._object_velocities = self.data.qvel[9:].reshape(N_OBJECTS, 6)
        self.reset(0)

    def reset(self, seed: int, family: str | None = None) -> Scene:
        """Set up the scene of a seed, bit for bit the same every time, at rest, its time at zero.

        Raises UserError for an unknown family or a negative seed.
        """
        scene = self.scene = sample_scene(seed, family)
        for geom, thing in zip(self._objects, scene.objects, strict=True):
            self._write_object(geom, thing)
        for geom, target in zip(self._targets, scene.targets, strict=True):
            self._write_target(geom, target)
        self._cameras.place(scene)
        # Masses changed, and with them what the solver derives from them.
        mujoco.mj_setConst(self.model, self.data)
        mujoco.mj_resetData(self.model, self.data)

        for pose, thing in zip(self._object_poses, scene.objects, strict=True):
            pose[:3] = (*thing.position, thing.size / 2)
            pose[3:] = rotations.from_vector(np.array([0.0, 0.0, thing.yaw]))
        self._first_height = self._object_poses[:, 2].copy()
        self._max_height = self._first_height.copy()
        self._start_arm(*scene.gripper)
        self._elapsed = 0.0
        self._periods = 0
        return scene

    def change_view(self, rng: np.random.Generator) -> None:
        """Render the scene in another light, and from a camera displaced otherwise, from now on."""
        self._cameras.place(with_other_view(self.scene, rng))

    def _write_object(self, geom: int, thing: ObjectSpec) -> None:
        model, size, half = self.model, thing.size, thing.size / 2
        if thing.shape == "cube":
            model.geom_type[geom] = mujoco.mjtGeom.mjGEOM_BOX
            model.geom_size[geom] = half
            model.geom_rbound[geom] = half * math.sqrt(3)
            mass = OBJECT_DENSITY * size**3
            inertia = mass * size**2 / 6 * np.ones(3)
        else:
            model.geom_type[geom] = mujoco.mjtGeom.mjGEOM_CYLINDER
            model.geom_size[geom] = (half, half, 0)
            model.geom_rbound[geom] = half * math.sqrt(2)
            mass = OBJECT_DENSITY * math.pi * half**2 * size
            across = half**2 / 4 + size**2 / 12
            inertia = mass * np.array([across, across, half**2 / 2])
        model.geom_aabb[geom] = (0, 0, 0, half, half, half)
        model.geom_rgba[geom, :3] = thing.rgb
        body = model.geom_bodyid[geom]
        model.body_mass[body] = mass
        model.body_inertia[body] = inertia

    def _write_target(self, geom: int, target: TargetSpec) -> None:
        model = self.model
        if target.shape == "plate":
            model.geom_type[geom] = mujoco.mjtGeom.mjGEOM_CYLINDER
            model.geom_size[geom] = (target.size, PLATE_THICKNESS / 2, 0)
            model.geom_contype[geom] = 1
            height = PLATE_THICKNESS / 2
        else:
            # Paint: it touches nothing, and stands out of the table by what the eye needs.
            model.geom_type[geom] = mujoco.mjtGeom.mjGEOM_BOX
            model.geom_size[geom] = (target.size, target.size, 0.001)
            model.geom_contype[geom] = 0
            height = 0.0
        model.geom_rbound[geom] = np.linalg.norm(model.geom_size[geom])
        model.geom_aabb[geom, 3:] = np.linalg.norm(model.geom_size[geom])
        model.geom_rgba[geom, :3] = target.rgb
        model.body_pos[model.geom_bodyid[geom]] = (*target.position, height)

    def _start_arm(self, x: float, y: float, z: float, yaw: float) -> None:
        """Put the end effector there, pointing down, the gripper open, everything at rest."""
        data = self.data
        self._twist: np.ndarray = np.zeros(6)
        self._velocity = np.zeros(6)  # of the commanded pose
        self._position = np.array([x, y, z])  # of the commanded pose
        self._quaternion = rotations.pointing_down(yaw)
        self._gripper_goal = self._gripper_command = 1.0
        data.qpos[_ARM] = HOME
        data.qpos[_FINGERS] = data.ctrl[_FINGERS] = FINGER_STROKE
        for _ in range(30):  # far more than it takes to converge
            mujoco.mj_fwdPosition(self.model, data)
            data.ctrl[_ARM] = data.qpos[_ARM] = self._joint_targets()
        mujoco.mj_fwdPosition(self.model, data)

    # Commands

    def set_twist(self, twist: np.ndarray) -> None:
        """Velocity of the end effector from now on: (6,) m/s and rad/s, in the base frame.

        It moves a commanded pose that the arm follows, and that waits for an arm that is held up.
        Speeds are limited to MAX_LINEAR and MAX_ANGULAR, the commanded pose to REACH_LOW,
        REACH_HIGH and MAX_TILT. Raises UserError unless all six numbers are finite.
        """
        twist = np.asarray(twist, dtype=float).copy()
        if twist.shape != (6,) or not np.isfinite(twist).all():
            raise UserError(f"a twist is six finite numbers, m/s and rad/s, not {twist}")
        twist[:3] = _limited(twist[:3], MAX_LINEAR)
        twist[3:] = _limited(twist[3:], MAX_ANGULAR)
        self._twist = twist

    def set_gripper(self, opening: float) -> None:
        """Where the fingers go at their own speed: 0 closed, 1 open; clipped to that.

        Raises UserError unless finite.
        """
        if not math.isfinite(opening):
            raise UserError(f"a gripper opening is a number from 0 to 1, not {opening}")
        self._gripper_goal = min(max(float(opening), 0.0), 1.0)

    def advance(self, seconds: float) -> None:
        """Simulate, in whole control periods of 10 ms; the rest counts towards the next call.

        Raises UserError for a time that is negative or not finite.
        """
        if not 0 <= seconds < math.inf:
            raise UserError(f"time advances by seconds from 0 up, not by {seconds}")
        self._elapsed += seconds
        periods = round(self._elapsed / CONTROL_PERIOD)
        while self._periods < periods:
            self._periods += 1
            # Between the two halves of a step positions and velocities belong together.
            mujoco.mj_step1(self.model, self.data)
            self._control()
            mujoco.mj_step2(self.model, self.data)
            mujoco.mj_step(self.model, self.data, STEPS_PER_PERIOD - 1)
            np.maximum(self._max_height, self._object_poses[:, 2], out=self._max_height)
        mujoco.mj_fwdPosition(self.model, self.data)

    def _control(self) -> None:
        self._move_commanded_pose()
        self.data.ctrl[_ARM] = self._joint_targets()

        step = GRIPPER_SPEED * CONTROL_PERIOD
        command, opening = self._gripper_command, self.gripper_opening()
        command += min(max(self._gripper_goal - command, -step), step)
        command = min(max(command, opening - GRIPPER_LEAD), opening + GRIPPER_LEAD)
        self._gripper_command = command
        self.data.ctrl[_FINGERS] = command * FINGER_STROKE

    def _move_commanded_pose(self) -> None:
        """Integrate the twist, and hold the result within reach and near the actual pose."""
        before, here = self._position, self.data.site_xpos[self._ee]
        position = before + self._twist[:3] * CONTROL_PERIOD
        position = here + _limited(position - here, MAX_LEAD)
        self._position = np.minimum(np.maximum(position, REACH_LOW), REACH_HIGH)
        self._velocity[:3] = (self._position - before) / CONTROL_PERIOD

        self._velocity[3:] = self._twist[3:]
        turn = rotations.from_vector(self._twist[3:] * CONTROL_PERIOD)
        quaternion = rotations.multiply(turn, self._quaternion)
        w, x, y, z = quaternion
        approach = (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y))
        tilt = math.acos(min(max(-approach[2], -1.0), 1.0))
        if tilt > MAX_TILT:
            back = np.array([-approach[1], approach[0], 0.0])
            back *= (tilt - MAX_TILT) / max(math.hypot(*back), 1e-9)
            quaternion = rotations.multiply(rotations.from_vector(back), quaternion)
            self._velocity[3:] = 0
        actual = self._ee_quaternion()
        lead = rotations.difference(quaternion, actual)
        if math.hypot(*lead) > MAX_LEAD_ANGLE:
            lead = _limited(lead, MAX_LEAD_ANGLE)
            quaternion = rotations.multiply(rotations.from_vector(lead), actual)
            self._velocity[3:] = 0
        self._quaternion = quaternion

    def _joint_targets(self) -> np.ndarray:
        """Joint positions (7,) that bring the end effector to the commanded pose.

        Damped least squares, the redundant axis drawn to HOME (Siciliano et al., Robotics, 2009,
        section 3.5), plus what makes up for the servos' lag at the commanded velocity.
        """
        data = self.data
        mujoco.mj_jacSite(self.model, data, self._jacobian[:3], self._jacobian[3:], self._ee)
        jacobian = self._jacobian[:, _ARM]
        q = data.qpos[_ARM]
        error = SERVO_LAG * self._velocity
        error[:3] += self._position - data.site_xpos[self._ee]
        error[3:] += rotations.difference(self._quaternion, self._ee_quaternion())
        posture = POSTURE_GAIN * (HOME - q)
        weights = np.linalg.solve(jacobian @ jacobian.T + DAMPING, error - jacobian @ posture)
        move = posture + jacobian.T @ weights
        # A servo that is this far behind its target moves at MAX_JOINT_SPEED.
        move *= min(1.0, SERVO_LAG * MAX_JOINT_SPEED / float(np.abs(move).max()))
        return np.minimum(np.maximum(q + move, self._joint_low), self._joint_high)

    # State

    @property
    def time(self) -> float:
        """Seconds simulated since the reset."""
        return self._periods * CONTROL_PERIOD

    def joint_positions(self) -> np.ndarray:
        """(7,) radians."""
        return self.data.qpos[_ARM].copy()

    def joint_velocities(self) -> np.ndarray:
        """(7,) rad/s."""
        return self.data.qvel[_ARM].copy()

    def gripper_opening(self) -> float:
        """0 closed, 1 open, which is 8 cm."""
        left, right = self.data.qpos[_FINGERS]
        return min(max(float(left + right) / (2 * FINGER_STROKE), 0.0), 1.0)

    def ee_position(self) -> np.ndarray:
        """(3,) metres, in the base frame: between the fingers, 1 cm above their tips."""
        return self.data.site_xpos[self._ee].copy()

    def ee_quaternion(self) -> np.ndarray:
        """(4,) x, y, z, w: the gripper's frame in the base frame."""
        return np.roll(self._ee_quaternion(), -1)

    def _ee_quaternion(self) -> np.ndarray:
        return rotations.from_matrix(self.data.site_xmat[self._ee])

    def object_positions(self) -> np.ndarray:
        """(3, 3) metres: the centres of `scene.objects`, in the base frame."""
        return self._object_poses[:, :3].copy()

    def object_rotations(self) -> np.ndarray:
        """(3, 3, 3): the rotation matrices of `scene.objects`, in the base frame."""
        return self.data.geom_xmat[self._objects].reshape(N_OBJECTS, 3, 3)

    def grounding(self) -> np.ndarray:
        """Where the things are that words can mean: (21,) metres, in the base frame.

        Three for what the scene's instruction moves, three for where to (of a stack, the centre of
        the cube at the bottom), three for the gripper, and x and y of the thing of each colour, in
        alphabetical order.
        """
        scene, centres = self.scene, self.object_positions()
        goal = scene.goal(scene.instruction)
        stacked = goal.family == "stack"
        place = centres[goal.target] if stacked else (*scene.targets[goal.target].position, 0.0)
        by_colour = {t.colour: t.position for t in scene.targets}
        by_colour |= {t.colour: c[:2] for t, c in zip(scene.objects, centres, strict=True)}
        spots = [by_colour[colour] for colour in sorted(by_colour)]
        return np.concatenate([centres[goal.object], place, self.ee_position(), *spots])

    def table_state(self) -> TableState:
        """What the success predicates look at."""
        pairs = self.data.contact.geom
        by_hand = pairs[np.isin(pairs, self._hand).any(axis=1)]
        return TableState(
            position=self.object_positions(),
            vertical=self.object_rotations()[:, 2],
            linear_speed=np.linalg.norm(self._object_velocities[:, :3], axis=1),
            angular_speed=np.linalg.norm(self._object_velocities[:, 3:], axis=1),
            touched=np.isin(self._objects, by_hand),
            lift=self._max_height - self._first_height,
        )

    def success(self) -> bool:
        """Whether the scene's own instruction is satisfied now."""
        return self.success_of(self.scene.instruction)

    def success_of(self, instruction: str) -> bool:
        """Whether a valid instruction of the scene is satisfied now; UserError for any other."""
        return satisfied(self.scene, self.scene.goal(instruction), self.table_state())

    def render(self, camera: str = "front", size: tuple[int, int] | None = None) -> np.ndarray:
        """What a camera sees now: (height, width, 3) uint8 RGB, upright.

        camera: "front", the policy's, or "wide", for people. size: (height, width), by default
        `image_size` squared. Raises UserError for another camera, and where EGL is missing.
        """
        return self._cameras.render(self.data, camera, size or (self.image_size, self.image_size))

    def close(self) -> None:
        """Free the OpenGL contexts; a later `render` makes new ones."""
        self._cameras.close()


def _limited(vector: np.ndarray, limit: float) -> np.ndarray:
    # Scaled first: the length of a finite vector may not be finite.
    largest = float(np.abs(vector).max())
    if largest > limit:
        vector = vector / largest
    length = math.hypot(*vector)
    return vector if length <= limit and largest <= limit else vector * (limit / length)
