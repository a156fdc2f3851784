import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from rlrc_ros.errors import UserError
from rlrc_ros.motion import turn_between, turn_quaternion
from rlrc_ros.transforms import KEPT, Frames, Transform

SECOND = 1_000_000_000
NO_TURN = (0.0, 0.0, 0.0, 1.0)


def at(seconds, position=(0.0, 0.0, 0.0), turn=(0.0, 0.0, 0.0)):
    return Transform(round(seconds * SECOND), position, turn_quaternion(turn))


def moving(frames, parent, child, *transforms):
    for transform in transforms:
        frames.add(parent, child, transform, static=False)


def matrix(transform):
    result = np.eye(4)
    result[:3, :3] = Rotation.from_quat(transform.orientation).as_matrix()
    result[:3, 3] = transform.position
    return result


triples = st.tuples(*[st.floats(-3.0, 3.0)] * 3)
steps = st.lists(st.tuples(triples, triples, st.booleans()), max_size=4)


@given(steps, steps)
def test_a_pose_is_the_product_of_what_lies_between_whichever_way_it_goes(to_tool, to_base):
    """Both hang on one frame, by as many steps each."""
    frames, expected = Frames("base", "tool"), {}
    moving(frames, "root", "above", at(3.0, (1.0, 2.0, 3.0)))
    for tip, chain in (("tool", to_tool), ("base", to_base)):
        names = ["above", *(f"{tip}{i}" for i in range(len(chain))), tip]
        product = np.eye(4)
        for i, (position, turn, static) in enumerate([*chain, ((0.1, 0.0, 0.0),) * 2 + (False,)]):
            transform = at(5.0, position, turn)
            frames.add(names[i], names[i + 1], transform, static)
            product = product @ matrix(transform)
        expected[tip] = product
    pose = frames.pose()
    assert pose.stamp_ns == 5 * SECOND
    assert matrix(pose) == pytest.approx(
        np.linalg.inv(expected["base"]) @ expected["tool"], abs=1e-9
    )


def test_the_stamp_is_the_slowest_frames_and_the_others_are_taken_from_between():
    frames = Frames("base", "tool")
    moving(frames, "arm", "tool", *(at(s / 10, (s / 10, 0.0, 0.0)) for s in range(10, 21)))
    moving(frames, "base", "arm", at(1.0), at(1.25, (0.0, 1.0, 0.0)))
    pose = frames.pose()
    assert pose.stamp_ns == 1.25 * SECOND
    assert pose.position == pytest.approx((1.25, 1.0, 0.0))


@given(triples, triples, st.floats(0.0, 1.0))
def test_between_two_orientations_it_turns_steadily_by_the_shorter_way(first, second, share):
    frames = Frames("base", "tool")
    moving(frames, "base", "arm", at(1.0, turn=first), at(2.0, turn=second))
    moving(frames, "arm", "tool", at(1.0 + share))
    ends = turn_quaternion(first), turn_quaternion(second)
    turned = frames.pose().orientation
    whole = turn_between(*ends)
    assert math.hypot(*turned) == pytest.approx(1.0)
    if whole < 3.1:  # at half a turn both ways are as short
        assert turn_between(ends[0], turned) == pytest.approx(share * whole, abs=1e-6)
        assert turn_between(turned, ends[1]) == pytest.approx((1 - share) * whole, abs=1e-6)


def test_static_transforms_count_for_any_time_and_names_may_begin_with_a_slash():
    frames = Frames("base", "tool")
    frames.add("/flange", "/tool", at(0.0, (0.0, 0.0, 0.1)), static=True)
    moving(frames, "base", "flange", at(7.0, turn=(math.pi, 0.0, 0.0)))
    pose = frames.pose()
    assert pose.stamp_ns == 7 * SECOND and pose.position == pytest.approx((0.0, 0.0, -0.1))


@pytest.mark.parametrize(
    ("added", "why"),
    [
        ([], "no way between base and tool: above tool there is 'tool', above base 'base'"),
        ([("hand", "tool"), ("world", "base")], "above tool there is 'hand', above base 'world'"),
        ([("a", "tool"), ("b", "a"), ("a", "b")], "the transforms above 'a' go round in a circle"),
    ],
)
def test_no_way_is_said_with_what_there_is(added, why):
    frames = Frames("base", "tool")
    for parent, child in added:
        moving(frames, parent, child, at(1.0))
    with pytest.raises(UserError) as raised:
        frames.pose()
    assert why in str(raised.value)


def test_a_tool_that_nothing_moves_and_a_frame_far_behind_give_no_pose():
    frames = Frames("base", "tool")
    frames.add("base", "tool", at(1.0), static=True)
    with pytest.raises(UserError, match="nothing moves between base and tool"):
        frames.pose()
    frames.add("arm", "tool", at(1.0), static=True)
    moving(frames, "base", "rail", at(1.0))
    moving(frames, "rail", "arm", *(at(1.0 + i / 10) for i in range(41)))
    with pytest.raises(UserError, match="between base and tool have no time in common"):
        frames.pose()


@pytest.mark.parametrize(
    ("position", "orientation"),
    [
        ((0.0, math.nan, 0.0), NO_TURN),
        ((0.0, 0.0, math.inf), NO_TURN),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.0), (0.0, math.nan, 0.0, 1.0)),
    ],
)
def test_what_is_no_rigid_motion_is_refused_and_changes_nothing(position, orientation):
    frames = Frames("base", "tool")
    moving(frames, "base", "tool", at(1.0))
    with pytest.raises(UserError, match="the transform of 'tool' in 'base' is no rigid motion"):
        frames.add("base", "tool", Transform(2 * SECOND, position, orientation), static=False)
    assert frames.pose().stamp_ns == SECOND


def test_old_transforms_are_passed_over_unless_the_clock_has_been_set_back():
    frames = Frames("base", "tool")
    moving(frames, "base", "tool", at(100.0), at(99.9, (1.0, 0.0, 0.0)))
    assert frames.pose() == at(100.0)
    moving(frames, "base", "tool", at(99.0 - KEPT, (2.0, 0.0, 0.0)))
    assert frames.pose() == at(99.0 - KEPT, (2.0, 0.0, 0.0))


def test_a_frame_that_is_hung_elsewhere_leaves_its_past_behind():
    frames = Frames("base", "tool")
    moving(frames, "base", "tool", at(1.0))
    moving(frames, "left", "tool", at(1.5, (1.0, 0.0, 0.0)))
    moving(frames, "base", "left", at(1.5, (0.0, 1.0, 0.0)))
    assert frames.pose().position == (1.0, 1.0, 0.0)


def test_it_agrees_with_tf2s_own_buffer():
    tf2_py = pytest.importorskip("tf2_py", reason="comes with apt's ROS 2")
    from geometry_msgs.msg import TransformStamped
    from rclpy.duration import Duration
    from rclpy.time import Time

    random, core = np.random.default_rng(0), tf2_py.BufferCore(Duration(seconds=10))
    frames = Frames("base", "tool")
    links = [("world", "base"), ("world", "rail"), ("rail", "arm"), ("arm", "tool")]
    compared = 0
    for i in range(400):
        parent, child = links[random.integers(len(links))]
        static, stamp_ns = child == "arm", round((1000.0 + i * 0.01) * SECOND)
        transform = at(stamp_ns / SECOND, random.normal(size=3), random.normal(size=3))
        transform = Transform(stamp_ns, tuple(map(float, transform.position)), transform[2])
        frames.add(parent, child, transform, static)
        message = TransformStamped(child_frame_id=child)
        message.header.frame_id = parent
        message.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        place, q = message.transform.translation, message.transform.rotation
        place.x, place.y, place.z = transform.position
        q.x, q.y, q.z, q.w = map(float, transform.orientation)
        (core.set_transform_static if static else core.set_transform)(message, "test")
        try:
            pose = frames.pose()
        except UserError:
            continue
        theirs = core.lookup_transform_core("base", "tool", Time())
        compared += 1
        place, q = theirs.transform.translation, theirs.transform.rotation
        assert Time.from_msg(theirs.header.stamp).nanoseconds == pose.stamp_ns
        assert pose.position == pytest.approx((place.x, place.y, place.z), abs=1e-6)
        assert turn_between(pose.orientation, (q.x, q.y, q.z, q.w)) < 1e-6
    assert compared > 300
