"""Forward kinematics of a serial chain, from the robot's URDF (wiki.ros.org/urdf/XML)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from rlrc_ros.errors import UserError
from rlrc_ros.motion import (
    Quaternion,
    Vector,
    added,
    multiplied,
    scaled,
    turn_quaternion,
    turned,
    unit,
)


@dataclass(frozen=True)
class _Joint:
    parent: str
    child: str
    kind: str
    position: Vector
    orientation: Quaternion
    axis: Vector
    source: str
    """The joint whose position moves it, itself but for a mimic."""
    multiplier: float
    offset: float


class Chain:
    """From one link of a robot to another farther out.

    Args:
        urdf: the robot's description, as on the topic `robot_description`.
        base: the link that poses are given in.
        tip: the link whose pose it is.

    Raises:
        UserError: the description is no URDF, a link is missing, or the way between them has a
            joint with more than one axis.
    """

    def __init__(self, urdf: str, base: str, tip: str) -> None:
        if "<!ENTITY" in urdf:
            raise UserError("robot_description defines XML entities: run it through xacro first")
        try:
            root = ElementTree.fromstring(urdf)  # noqa: S314, nothing can grow without entities
            joints = {joint.child: joint for joint in map(_joint, root.iterfind("joint"))}
        except (ElementTree.ParseError, AttributeError, KeyError, ValueError) as error:
            raise UserError(f"robot_description is no URDF ({error})") from None
        self._joints: list[_Joint] = []
        link = tip
        while link != base:
            if link not in joints or len(self._joints) > len(joints):
                ends = ", ".join(sorted({tip, base} - _links(joints)))
                why = f"there is no link {ends}" if ends else f"{base} is not on the way from it"
                raise UserError(f"robot_description: no way from {base} to {tip}: {why}")
            self._joints.insert(0, joints[link])
            link = joints[link].parent
        for joint in self._joints:
            if joint.kind not in ("fixed", "revolute", "continuous", "prismatic"):
                raise UserError(f"robot_description: a {joint.kind} joint before {joint.child}")

    @property
    def names(self) -> list[str]:
        """The joints whose positions it takes."""
        moving = (joint.source for joint in self._joints if joint.kind != "fixed")
        return list(dict.fromkeys(moving))

    def pose(self, positions: Mapping[str, float]) -> tuple[Vector, Quaternion]:
        """Where the tip is, in the base link: m, and a unit quaternion x, y, z, w.

        Args:
            positions: of at least `names`, in rad or m.
        """
        position: Vector = (0.0, 0.0, 0.0)
        orientation: Quaternion = (0.0, 0.0, 0.0, 1.0)
        for joint in self._joints:
            position = added(position, turned(joint.position, orientation))
            orientation = multiplied(orientation, joint.orientation)
            if joint.kind == "fixed":
                continue
            moved = scaled(joint.axis, joint.multiplier * positions[joint.source] + joint.offset)
            if joint.kind == "prismatic":
                position = added(position, turned(moved, orientation))
            else:
                orientation = multiplied(orientation, turn_quaternion(moved))
        return position, orientation


def _joint(element: ElementTree.Element) -> _Joint:
    origin, mimic = element.find("origin"), element.find("mimic")
    place = {} if origin is None else origin.attrib
    roll, pitch, yaw = _numbers(place.get("rpy", "0 0 0"))
    orientation = multiplied(
        turn_quaternion((0.0, 0.0, yaw)),
        multiplied(turn_quaternion((0.0, pitch, 0.0)), turn_quaternion((roll, 0.0, 0.0))),
    )
    axis_element = element.find("axis")
    axis = _numbers("1 0 0" if axis_element is None else axis_element.attrib["xyz"])
    if not any(axis):
        raise ValueError(f"joint {element.attrib['name']} has an axis without a direction")
    return _Joint(
        parent=element.find("parent").attrib["link"],  # type: ignore[union-attr]
        child=element.find("child").attrib["link"],  # type: ignore[union-attr]
        kind=element.attrib["type"],
        position=_numbers(place.get("xyz", "0 0 0")),
        orientation=orientation,
        axis=unit(axis),
        source=element.attrib["name"] if mimic is None else mimic.attrib["joint"],
        multiplier=1.0 if mimic is None else float(mimic.attrib.get("multiplier", "1")),
        offset=0.0 if mimic is None else float(mimic.attrib.get("offset", "0")),
    )


def _numbers(text: str) -> Vector:
    x, y, z = map(float, text.split())
    if not all(map(math.isfinite, (x, y, z))):
        raise ValueError(f"'{text}' is not finite")
    return x, y, z


def _links(joints: Mapping[str, _Joint]) -> set[str]:
    return {*joints, *(joint.parent for joint in joints.values())}
