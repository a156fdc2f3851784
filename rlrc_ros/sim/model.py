"""The MJCF of the tabletop: 7-axis arm, parallel gripper, table, three objects, three targets.

It is compiled once. A scene writes sizes, colours and poses into it (see `world.py`), so that the
renderer, which is expensive to make, stays.
"""

from __future__ import annotations

import os

import numpy as np

from rlrc_ros.errors import UserError

# Everything in rlrc_ros.sim takes `mujoco` from here, where it is imported with care.
__all__ = ["compile_model", "mujoco"]

APT_LINE = "apt-get install -y libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri"

# MuJoCo picks its OpenGL while it is imported. EGL needs no display, and with Mesa no GPU either.
os.environ.setdefault("MUJOCO_GL", "egl")
try:
    import mujoco
except ModuleNotFoundError as error:
    raise UserError("the simulated arm needs MuJoCo: pip install 'rlrc-ros[sim]'") from error
except (ImportError, AttributeError, OSError) as error:
    raise UserError(f"MuJoCo found no OpenGL ({error}); run: {APT_LINE}") from error

JOINT_NAMES = tuple(f"joint{i}" for i in range(1, 8))
# Gripper pointing down over the workspace; also the posture that the redundant axis is drawn to.
HOME = np.array([0.0, -0.55, 0.0, -2.55, 0.0, 2.0, 0.785])
SERVO_LAG = 0.055  # seconds: kv / kp of the joint servos
FINGER_STROKE = 0.04  # metres that one finger moves; the gripper opens by twice that
TIP_BELOW_EE = 0.010  # metres from the end-effector frame down to the fingertips
N_OBJECTS = 3
N_TARGETS = 3
TIMESTEP = 0.005  # seconds of one physics step

_TARGETS = "".join(
    f'<body name="target{i}"><geom name="target{i}" class="target"/></body>'
    for i in range(N_TARGETS)
)
_OBJECTS = "".join(
    f'<body name="object{i}" pos="0.5 {0.1 * i} 0.03"><freejoint/>'
    f'<geom name="object{i}" class="object"/></body>'
    for i in range(N_OBJECTS)
)

# Kinematics, joint ranges and torque limits are the Franka Emika Panda's
# (frankaemika.github.io/docs/control_parameters.html); the shapes are primitives.
# Collision bits: 1 table and plates, 2 objects, 4 hand and fingers. Links touch nothing: the limits
# of the workspace keep them off the table. The table's friction overrides the pads', or a
# fingertip that touches it would stick; its rolling friction stops a cylinder that fell over.
# Armature is what damps a servo at its torque limit, where implicit integration does not.
_XML = f"""
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="10"
          iterations="20"/>
  <statistic center="0.5 0 0.1" extent="1"/>
  <visual>
    <quality offsamples="0" numslices="16" numstacks="8" shadowsize="0"/>
    <headlight diffuse="0.25 0.25 0.25" specular="0 0 0"/>
    <map znear="0.05" zfar="10"/>
  </visual>
  <asset>
    <texture type="skybox" builtin="gradient" rgb1="0.62 0.66 0.70" rgb2="0.30 0.33 0.37"
             width="32" height="192"/>
    <material name="shell" rgba="0.93 0.93 0.93 1" specular="0.2" shininess="0.2"/>
    <material name="joint" rgba="0.30 0.32 0.35 1" specular="0.2" shininess="0.2"/>
    <material name="finger" rgba="0.06 0.06 0.07 1" specular="0"/>
    <material name="table" rgba="0.52 0.50 0.48 1" specular="0"/>
    <material name="floor" rgba="0.25 0.27 0.30 1" specular="0"/>
  </asset>
  <default>
    <geom contype="0" conaffinity="0" material="shell" solref="0.01 1"/>
    <joint axis="0 0 1" armature="0.5" damping="0.5"/>
    <position kp="2000" kv="{2000 * SERVO_LAG}" forcerange="-87 87"/>
    <default class="dark"><geom material="joint"/></default>
    <default class="wrist">
      <joint armature="0.3"/>
      <position kp="600" kv="{600 * SERVO_LAG}" forcerange="-12 12"/>
    </default>
    <default class="finger">
      <joint type="slide" range="0 {FINGER_STROKE}" armature="0.1" damping="2"
             solreflimit="0.01 1"/>
      <geom type="box" size="0.010 0.005 0.0425" material="finger" mass="0.04"
            contype="4" conaffinity="1" condim="4" friction="0.2 0.005 0.0001" priority="1"/>
      <default class="pad">
        <geom size="0.009 0.002 0.0415" mass="0.01" friction="1.2 0.02 0.0001"/>
      </default>
      <position kp="1500" kv="25" ctrlrange="0 {FINGER_STROKE}"/>
    </default>
    <default class="object">
      <geom type="box" size="0.0225 0.0225 0.0225" mass="0.06" contype="2" conaffinity="7"
            condim="4" friction="0.6 0.01 0.001"/>
    </default>
    <default class="surface">
      <geom contype="1" condim="6" friction="0.5 0.01 0.002" priority="2"/>
      <default class="target"><geom type="cylinder" size="0.05 0.003"/></default>
    </default>
  </default>
  <worldbody>
    <light name="lamp" pos="0.9 0 2" dir="0 0 -1" directional="true" castshadow="false"
           specular="0.2 0.2 0.2"/>
    <camera name="front"/>
    <camera name="wide" fovy="41"/>
    <geom name="floor" class="surface" type="plane" pos="0 0 -0.75" size="4 4 1" material="floor"/>
    <geom name="table" class="surface" type="box" pos="0.35 0 -0.02" size="0.55 0.6 0.02"
          material="table"/>
    <geom name="legs" type="box" pos="0.35 0 -0.39" size="0.45 0.5 0.35" material="floor"/>

    <body name="link0">
     <geom type="cylinder" fromto="0 0 0 0 0 0.05" size="0.10" class="dark"/>
     <geom type="capsule" fromto="0 0 0.05 0 0 0.14" size="0.07"/>
     <body name="link1" pos="0 0 0.333" gravcomp="1">
      <joint name="joint1" range="-2.8973 2.8973"/>
      <geom type="capsule" fromto="0 0 -0.16 0 0 -0.04" size="0.062" mass="3"/>
      <geom type="cylinder" fromto="0 -0.075 0 0 0.075 0" size="0.06" class="dark" mass="0.5"/>
      <body name="link2" quat="1 -1 0 0" gravcomp="1">
       <joint name="joint2" range="-1.7628 1.7628"/>
       <geom type="capsule" fromto="0 -0.02 0 0 -0.20 0" size="0.058" mass="3"/>
       <body name="link3" pos="0 -0.316 0" quat="1 1 0 0" gravcomp="1">
        <joint name="joint3" range="-2.8973 2.8973"/>
        <geom type="capsule" fromto="0 0 -0.10 0.03 0 -0.03" size="0.055" mass="2"/>
        <geom type="cylinder" fromto="0.0825 -0.065 0 0.0825 0.065 0" size="0.052" class="dark"
              mass="0.5"/>
        <body name="link4" pos="0.0825 0 0" quat="1 1 0 0" gravcomp="1">
         <joint name="joint4" range="-3.0718 -0.0698"/>
         <geom type="capsule" fromto="0 0 0 -0.0825 0.09 0" size="0.05" mass="2"/>
         <body name="link5" pos="-0.0825 0.384 0" quat="1 -1 0 0" gravcomp="1" childclass="wrist">
          <joint name="joint5" range="-2.8973 2.8973"/>
          <geom type="capsule" fromto="0 0 -0.27 0 0.02 -0.05" size="0.048" mass="2"/>
          <geom type="cylinder" fromto="0 -0.055 0 0 0.055 0" size="0.048" class="dark" mass="0.5"/>
          <body name="link6" quat="1 1 0 0" gravcomp="1">
           <joint name="joint6" range="-0.0175 3.7525"/>
           <geom type="capsule" fromto="0 0 0 0.088 0 0" size="0.040" mass="1"/>
           <body name="link7" pos="0.088 0 0" quat="1 1 0 0" gravcomp="1">
            <joint name="joint7" range="-2.8973 2.8973"/>
            <geom type="cylinder" fromto="0 0 -0.04 0 0 0.107" size="0.03" class="dark" mass="0.5"/>
            <body name="hand" pos="0 0 0.107" quat="0.9238795 0 0 -0.3826834" gravcomp="1">
             <geom name="palm" type="box" pos="0 0 0.020" size="0.018 0.056 0.020" mass="0.5"
                   contype="4" conaffinity="1"/>
             <site name="ee" pos="0 0 0.113" group="5"/>
             <body name="left_finger" pos="0 0 0.038" gravcomp="1" childclass="finger">
              <joint name="left_finger" axis="0 1 0"/>
              <geom name="left_finger" pos="0 0.007 0.0425"/>
              <geom name="left_pad" pos="0 0.002 0.0415" class="pad"/>
             </body>
             <body name="right_finger" pos="0 0 0.038" gravcomp="1" childclass="finger">
              <joint name="right_finger" axis="0 -1 0"/>
              <geom name="right_finger" pos="0 -0.007 0.0425"/>
              <geom name="right_pad" pos="0 -0.002 0.0415" class="pad"/>
             </body>
            </body>
           </body>
          </body>
         </body>
        </body>
       </body>
      </body>
     </body>
    </body>
    {_TARGETS}
    {_OBJECTS}
  </worldbody>
  <contact><exclude body1="left_finger" body2="right_finger"/></contact>
  <actuator>
    <position joint="joint1"/>
    <position joint="joint2"/>
    <position joint="joint3"/>
    <position joint="joint4"/>
    <position joint="joint5" class="wrist"/>
    <position joint="joint6" class="wrist"/>
    <position joint="joint7" class="wrist"/>
    <position joint="left_finger" class="finger"/>
    <position joint="right_finger" class="finger"/>
  </actuator>
</mujoco>
"""


def compile_model() -> mujoco.MjModel:
    """A fresh `mujoco.MjModel` of the tabletop, to be filled in by `World.reset`."""
    return mujoco.MjModel.from_xml_string(_XML)
