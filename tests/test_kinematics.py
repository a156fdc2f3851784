import math
import re

import numpy as np
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.kinematics import Chain
from rlrc_ros.motion import turn_between
from rlrc_ros.sim.model import JOINT_NAMES
from rlrc_ros.sim.world import World

QUARTER = math.pi / 2
# frankaemika.github.io/docs/control_parameters.html, as franka_description has it.
PANDA = [
    ("0 0 0.333", "0 0 0"),
    ("0 0 0", f"{-QUARTER} 0 0"),
    ("0 -0.316 0", f"{QUARTER} 0 0"),
    ("0.0825 0 0", f"{QUARTER} 0 0"),
    ("-0.0825 0.384 0", f"{-QUARTER} 0 0"),
    ("0 0 0", f"{QUARTER} 0 0"),
    ("0.088 0 0", f"{QUARTER} 0 0"),
]


def joint(name, parent, child, kind="revolute", xyz="0 0 0", rpy="0 0 0", more=""):
    return (
        f'<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>'
        f'<origin xyz="{xyz}" rpy="{rpy}"/><axis xyz="0 0 1"/>{more}</joint>'
    )


def panda(tip_from_flange="0 0 0.22"):
    joints = [
        joint(name, f"link{i}", f"link{i + 1}", xyz=xyz, rpy=rpy)
        for i, (name, (xyz, rpy)) in enumerate(zip(JOINT_NAMES, PANDA, strict=True))
    ]
    hand = joint("hand", "link7", "tcp", "fixed", tip_from_flange, f"0 0 {-math.pi / 4}")
    return f'<robot name="panda">{"".join(joints)}{hand}</robot>'


def test_it_agrees_with_the_simulated_arm():
    world = World()
    chain = Chain(panda(), "link0", "tcp")
    assert chain.names == list(JOINT_NAMES)
    for seed in range(5):
        world.reset(seed)
        world.set_twist(np.array([0.05, 0.1 * (-1) ** seed, -0.05, 0.3, 0.2, 0.5]))
        world.advance(0.5)
        positions = dict(zip(JOINT_NAMES, world.joint_positions().tolist(), strict=True))
        position, orientation = chain.pose(positions)
        assert position == pytest.approx(world.ee_position(), abs=1e-6)
        assert turn_between(orientation, tuple(world.ee_quaternion())) < 1e-6


def test_a_part_of_the_chain_prismatic_and_mimic_joints():
    more = '<mimic joint="finger" multiplier="-2" offset="0.1"/>'
    urdf = (
        '<robot name="gripper">'
        + joint("turn", "world", "hand", "continuous", "0 0 1", f"0 0 {QUARTER}")
        + joint("finger", "hand", "left", "prismatic", "0.1 0 0")
        + joint("other", "left", "right", "prismatic", more=more)
        + "</robot>"
    )
    assert Chain(urdf, "hand", "left").pose({"finger": 0.02})[0] == (0.1, 0.0, 0.02)
    chain = Chain(urdf, "world", "right")
    assert chain.names == ["turn", "finger"]
    position, orientation = chain.pose({"turn": QUARTER, "finger": 0.02})
    assert position == pytest.approx((-0.1, 0.0, 1.0 + 0.02 + 0.06), abs=1e-12)
    assert orientation == pytest.approx((0.0, 0.0, 1.0, 0.0), abs=1e-12)
    assert Chain(urdf, "hand", "hand").names == []


@pytest.mark.parametrize(
    ("urdf", "base", "tip", "words"),
    [
        ("<robot", "link0", "tcp", "robot_description is no URDF"),
        ('<!DOCTYPE r [<!ENTITY a "aa">]><robot/>', "link0", "tcp", "defines XML entities"),
        (panda(tip_from_flange="0 0"), "link0", "tcp", "is no URDF"),
        (panda(tip_from_flange="0 0 nan"), "link0", "tcp", "'0 0 nan' is not finite"),
        (panda(), "link0", "tool0", "no way from link0 to tool0: there is no link tool0"),
        (panda(), "base", "tcp", "no way from base to tcp: there is no link base"),
        (panda(), "tcp", "link0", "no way from tcp to link0: tcp is not on the way from it"),
        (panda().replace("revolute", "floating"), "link0", "tcp", "a floating joint before link1"),
    ],
)
def test_what_has_no_chain_is_one_line(urdf, base, tip, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        Chain(urdf, base, tip)
    assert "\n" not in str(error.value)
