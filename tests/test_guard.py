import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.guard import (
    ACTIVE,
    HOLD_TIME,
    HOLDING,
    LONGEST_SILENCE,
    REACTION_TIME,
    STOPPED,
    WAITING,
    Command,
    Guard,
    Pose,
)
from rlrc_ros.limits import Limits
from rlrc_ros.motion import ZERO, angle_between, multiplied, turn_quaternion, z_axis

PERIOD = 0.01
BOX = {"workspace_min": (-0.5, -0.4, 0.0), "workspace_max": (0.5, 0.4, 0.6)}
CENTRE = (0.0, 0.0, 0.3)


def command(
    linear=(0.1, 0.0, 0.0),
    angular=ZERO,
    gripper=0.5,
    age=0.0,
    frame_id="base_link",
    policy_label="A",
    episode_id="e1",
    publisher="",
    **more,
):
    return Command(
        linear, angular, gripper, age, frame_id, policy_label, episode_id, publisher, **more
    )


DOWN = (1.0, 0.0, 0.0, 0.0)
"""The orientation of a tool whose z axis points down."""
NO_JERK_LIMIT = {"max_linear_jerk": math.inf, "max_angular_jerk": math.inf}


def pose(position=CENTRE, age=0.0, frame_id="base_link", orientation=DOWN):
    return Pose(position, age, frame_id, orientation)


class Run:
    """A guard stepped at its rate; without a limit on jerk, so that ramps are straight."""

    def __init__(self, **limits):
        self.guard = Guard(Limits(**{**NO_JERK_LIMIT, **limits}))
        self.now = 100.0

    def step(self, command=None, pose=None):
        self.now += PERIOD
        return self.guard.step(self.now, command, pose)

    def steps(self, seconds, command=None, pose=None):
        """Every output of so many seconds, with the same command and pose at every step."""
        return [self.step(command, pose) for _ in range(round(seconds / PERIOD))]


def length(vector):
    return math.hypot(*vector)


def difference(a, b):
    return math.dist(a, b)


# Laws, whatever comes in

anything = st.floats(allow_nan=True, allow_infinity=True)
small = st.floats(-2.0, 2.0)
number = st.one_of(small, anything)
vector = st.tuples(number, number, number)
age = st.one_of(st.just(0.0), st.floats(-0.3, 0.3), anything)
commands = st.builds(
    command,
    linear=vector,
    angular=vector,
    gripper=number,
    age=age,
    frame_id=st.sampled_from(["base_link", "base_link", "base_link", "camera"]),
    policy_label=st.sampled_from(["A", "A", "A", "B", ""]),
    episode_id=st.sampled_from(["e1", "e1", "e2", ""]),
    observation_age=age,
    period=st.one_of(st.just(0.1), number),
)
orientations = st.one_of(
    st.just(DOWN),
    st.tuples(small, small, small).map(lambda turn: multiplied(turn_quaternion(turn), DOWN)),
    st.tuples(number, number, number, number),
)
poses = st.builds(
    pose,
    position=vector,
    age=age,
    frame_id=st.sampled_from(["base_link", "base_link", "map"]),
    orientation=orientations,
)
intervals = st.one_of(
    st.just(PERIOD), st.floats(0.0, 0.1), st.floats(-1.0, 30.0), st.floats(-1e9, 1e9)
)
events = st.sampled_from(
    [None] * 12 + ["stop", "emergency", "press", "let go", "release", "dead", "alive"]
)
jerks = st.one_of(st.just(math.inf), st.floats(2.0, 500.0))
steps = st.lists(
    st.tuples(intervals, st.none() | commands, st.none() | poses, events), min_size=1, max_size=60
)


@settings(max_examples=300)
@given(steps=steps, box=st.booleans(), cone=st.booleans(), jerk=jerks)
def test_whatever_comes_in_outputs_are_finite_and_within_the_limits(steps, box, cone, jerk):
    more = {"max_tilt": 0.5} if cone else {}
    limits = Limits(**(BOX if box else {}), **more, max_linear_jerk=jerk, max_angular_jerk=4 * jerk)
    guard = Guard(limits)
    now, last, last_now = 0.0, None, 0.0
    emergency = False
    before = None  # the accelerations between the last two outputs, and how far these lay apart
    for interval, a_command, a_pose, event in steps:
        now += interval
        if event == "stop":
            guard.stop("asked to")
        elif event == "emergency":
            guard.emergency_stop()
        elif event in ("press", "let go"):
            guard.press(event == "press")
        elif event in ("dead", "alive"):
            guard.hear(event == "alive")
        elif event == "release" and not guard.release(now):
            emergency = False
        emergency |= event in ("emergency", "press")
        output = guard.step(now, a_command, a_pose)
        if output is None:
            assert last is None or last.linear == last.angular == ZERO
            continue
        assert all(map(math.isfinite, (*output.linear, *output.angular, output.gripper)))
        assert length(output.linear) <= limits.max_linear_speed + 1e-9
        assert length(output.angular) <= limits.max_angular_speed + 1e-9
        assert 0.0 <= output.gripper <= 1.0
        stalled = interval > limits.controller_timeout
        if emergency:
            assert output.linear == output.angular == ZERO
        elif last is not None:
            # A stall lets the arm stand, then begin from there.
            time = min(max(now - last_now, 0.0), PERIOD + REACTION_TIME)
            change = difference(output.linear, ZERO if stalled else last.linear)
            turn = difference(output.angular, ZERO if stalled else last.angular)
            grip = abs(output.gripper - last.gripper)
            assert change <= limits.max_linear_acceleration * time + 1e-9
            assert turn <= limits.max_angular_acceleration * time + 1e-9
            assert grip <= limits.max_gripper_rate * time + 1e-9
        if emergency or stalled or last is None:
            before = None
        elif time > 1e-6:
            linear, angular = (
                tuple((a - b) / time for a, b in zip(new, old, strict=True))
                for new, old in ((output.linear, last.linear), (output.angular, last.angular))
            )
            if before is not None:
                apart = (time + before[2]) / 2
                rounding = 1e-9 / min(time, before[2])
                assert difference(linear, before[0]) <= jerk * apart + rounding
                assert difference(angular, before[1]) <= 4 * jerk * apart + rounding
            before = (linear, angular, time)
        last, last_now = output, now


@settings(max_examples=150)
@given(
    start=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.4, 0.4), st.floats(0.0, 0.6)),
    delay=st.floats(0.0, REACTION_TIME),
    ticks=st.lists(
        st.tuples(
            st.one_of(st.just(PERIOD), st.floats(PERIOD, PERIOD + REACTION_TIME)),
            st.floats(0.0, 0.1),
        ),
        min_size=20,
        max_size=120,
    ),
    wanted=st.lists(st.tuples(small, small, small), min_size=1, max_size=6),
    acceleration=st.floats(0.05, 5.0),
    jerk=jerks,
)
def test_an_arm_that_follows_late_and_is_measured_late_stays_in_the_box(
    start, delay, ticks, wanted, acceleration, jerk
):
    guard = Guard(
        Limits(
            **BOX,
            max_linear_speed=0.5,
            max_linear_acceleration=acceleration,
            max_linear_jerk=jerk,
        )
    )
    now = 0.0
    outputs = [(-1.0, ZERO)]  # since when, which velocity

    def arm(time):
        """Where the arm is, which follows the outputs `delay` later."""
        position = list(start)
        ends = [t for t, _ in outputs[1:]] + [math.inf]
        for (begin, velocity), end in zip(outputs, ends, strict=True):
            duration = min(end, time - delay) - begin
            if duration > 0:
                position = [p + v * duration for p, v in zip(position, velocity, strict=True)]
        return tuple(position)

    for k, (interval, pose_age) in enumerate(ticks):
        now += interval
        target = wanted[k * len(wanted) // len(ticks)]
        output = guard.step(now, command(linear=target), pose(arm(now - pose_age), pose_age))
        change = difference(output.linear, outputs[-1][1])
        assert k == 0 or change <= acceleration * interval + 1e-9
        outputs.append((now, output.linear))
        for low, value, high in zip(
            BOX["workspace_min"], arm(now), BOX["workspace_max"], strict=True
        ):
            assert low - 1e-9 <= value <= high + 1e-9


@settings(max_examples=100)
@given(
    tilt=st.floats(0.0, 0.5),
    around=st.floats(-3.0, 3.0),
    delay=st.integers(0, 5),
    wanted=st.lists(st.tuples(small, small, small), min_size=1, max_size=6),
    acceleration=st.floats(1.0, 20.0),
    jerk=st.one_of(st.just(math.inf), st.floats(20.0, 500.0)),
)
def test_a_tool_that_turns_late_stays_in_its_cone(tilt, around, delay, wanted, acceleration, jerk):
    limits = Limits(max_tilt=0.5, max_angular_acceleration=acceleration, max_angular_jerk=jerk)
    guard, now = Guard(limits), 0.0
    axis = (math.cos(around), math.sin(around), 0.0)
    orientation = multiplied(turn_quaternion(tuple(tilt * x for x in axis)), DOWN)
    queue = [ZERO] * delay  # periods that the arm follows late
    for k in range(150):
        now += PERIOD
        target = wanted[k * len(wanted) // 150]
        output = guard.step(now, command(angular=target), pose(orientation=orientation))
        queue.append(output.angular)
        turn = turn_quaternion(tuple(PERIOD * w for w in queue.pop(0)))
        orientation = multiplied(turn, orientation)
        assert angle_between(limits.cone_axis, z_axis(orientation)) <= 0.5 + 1e-9


def test_a_tool_at_the_wall_of_its_cone_may_spin_about_itself_and_turn_back():
    tilted = pose(orientation=multiplied(turn_quaternion((0.5, 0.0, 0.0)), DOWN))
    tool = z_axis(tilted.orientation)
    run = Run(max_tilt=0.4)
    assert run.steps(0.5, command(angular=(0.5, 0.0, 0.0)), tilted)[-1].angular == ZERO
    assert run.guard.counts.limited_orientation == 50
    spin = tuple(0.5 * x for x in tool)
    assert run.steps(0.5, command(angular=spin), tilted)[-1].angular == pytest.approx(spin)
    back = (-0.5, 0.0, 0.0)
    assert run.steps(0.8, command(angular=back), tilted)[-1].angular == pytest.approx(back)


def test_a_tool_turned_outwards_comes_close_to_the_wall_of_its_cone():
    run, tilt = Run(max_tilt=0.5), 0.0
    for _ in range(600):
        orientation = multiplied(turn_quaternion((tilt, 0.0, 0.0)), DOWN)
        output = run.step(command(angular=(1.0, 0.0, 0.0)), pose(orientation=orientation))
        tilt += output.angular[0] * PERIOD
    assert 0.48 < tilt <= 0.5


def test_a_jerk_limit_rounds_the_ramp_off_and_still_comes_to_rest():
    run = Run(max_linear_acceleration=1.0, max_linear_jerk=10.0)
    outputs = run.steps(1.0, command(linear=(0.2, 0.0, 0.0)))
    speeds = [0.0, *(o.linear[0] for o in outputs)]
    changes = [b - a for a, b in itertools.pairwise(speeds)]
    assert max(abs(b - a) for a, b in itertools.pairwise(changes)) <= 10.0 * PERIOD**2 + 1e-12
    assert speeds[-1] == 0.2 and run.guard.counts.limited_jerk > 20
    run.guard.stop("operator")
    assert run.steps(1.0)[-1].linear == ZERO and not run.guard.moving


def test_an_arm_pushed_against_a_wall_comes_close_to_it():
    run, position = Run(**BOX), 0.0
    for _ in range(600):
        output = run.step(command(linear=(0.25, 0.0, 0.0)), pose((position, 0.0, 0.3)))
        position += output.linear[0] * PERIOD
    assert 0.49 < position <= 0.5


def test_an_arm_driven_into_a_corner_brakes_on_three_axes_at_once():
    run = Run(workspace_min=ZERO, workspace_max=(0.4,) * 3, max_linear_acceleration=0.1)
    position = (0.0,) * 3
    for _ in range(800):
        output = run.step(command(linear=(0.2, 0.2, 0.2)), pose(position))
        position = tuple(p + PERIOD * v for p, v in zip(position, output.linear, strict=True))
        assert max(position) <= 0.4
    assert min(position) > 0.38


# What is let through


def test_nothing_is_published_before_the_first_valid_command():
    run = Run()
    for bad in (None, command(policy_label=""), command(linear=(math.nan, 0.0, 0.0))):
        assert run.steps(0.1, bad) == [None] * 10
    assert run.guard.state == WAITING
    assert run.step(command()) is not None
    assert run.guard.state == ACTIVE and run.guard.reason == ""


def test_a_command_within_the_limits_arrives_unchanged():
    run = Run()
    wanted = command(linear=(0.1, -0.1, 0.05), angular=(0.2, 0.0, -0.3), gripper=0.7)
    output = run.steps(1.0, wanted)[-1]
    assert output.linear == wanted.linear and output.angular == wanted.angular
    assert output.gripper == 0.7
    assert run.guard.counts.limited_linear_speed == run.guard.counts.limited_gripper == 0


def test_a_fast_command_is_slowed_down_along_its_path():
    run = Run()
    output = run.steps(2.0, command(linear=(3.0, 4.0, 0.0), angular=(0.0, 0.0, 2.0)))[-1]
    assert output.linear == pytest.approx((0.15, 0.2, 0.0))
    assert output.angular == pytest.approx((0.0, 0.0, 0.1))
    assert run.guard.counts.limited_linear_speed == run.guard.counts.limited_angular_speed == 200


def test_speed_builds_up_at_the_acceleration_limit():
    run = Run(max_linear_acceleration=1.0)
    outputs = run.steps(0.1, command(linear=(0.2, 0.0, 0.0)))
    assert [o.linear[0] for o in outputs] == pytest.approx([0.01 * k for k in range(1, 11)])
    assert run.guard.counts.limited_acceleration == 10


def test_the_gripper_moves_no_faster_than_allowed_and_keeps_its_width_when_the_arm_stops():
    run = Run(max_gripper_rate=2.0)
    run.step(command(gripper=0.0))
    opening = [o.gripper for o in run.steps(0.1, command(gripper=1.0))]
    assert opening == pytest.approx([0.02 * k for k in range(1, 11)])
    silent = [o.gripper for o in run.steps(0.5)]
    assert silent[20:] == [silent[20]] * 30 and silent[20] < 1.0


def test_a_gripper_out_of_range_is_clamped_and_counted():
    run = Run()
    assert run.step(command(gripper=1.5)).gripper == 1.0
    assert run.guard.counts.limited_gripper == 1


# What is dropped


@pytest.mark.parametrize(
    ("bad", "counter", "words"),
    [
        (command(linear=(math.nan, 0.0, 0.0)), "rejected_not_finite", "not finite"),
        (command(angular=(0.0, math.inf, 0.0)), "rejected_not_finite", "not finite"),
        (command(gripper=math.nan), "rejected_not_finite", "not finite"),
        (command(age=0.5), "rejected_stale", "0.5 s old"),
        (command(age=-5.0), "rejected_stale", "-5 s old"),
        (command(age=math.nan), "rejected_stale", "nan"),
        (command(observation_age=3.0), "rejected_stale", "for what was seen 3 s ago"),
        (command(observation_age=math.nan), "rejected_stale", "nan"),
        (command(period=math.inf), "rejected_not_finite", "not finite"),
        (command(frame_id="camera"), "rejected_frame", "'camera', not 'base_link'"),
        (command(policy_label=""), "rejected_source", "no policy_label"),
        (command(episode_id=""), "rejected_source", "no episode_id"),
        (command(policy_label="C"), "rejected_source", "'C' is not among the allowed"),
        (command(policy_label="B"), "rejected_source", "'A' has the arm"),
        (command(episode_id="e2"), "rejected_source", "'e1'"),
        (command(publisher="other"), "rejected_source", "another publisher"),
    ],
)
def test_a_bad_command_changes_nothing_and_is_counted(bad, counter, words):
    run = Run(labels=("A", "B"))
    good = run.steps(0.3, command())[-1]
    assert words in run.guard.submit(run.now, bad)
    assert run.step() == good
    assert getattr(run.guard.counts, counter) == 1
    assert run.guard.counts.accepted == 30


def test_bad_commands_do_not_hide_silence():
    run = Run()
    run.steps(0.5, command())
    outputs = run.steps(0.5, command(linear=(math.nan,) * 3))
    assert run.guard.state == HOLDING and outputs[-1].linear == ZERO


# Silence


def test_silence_brakes_at_the_limit_then_sends_zeros_then_gives_the_arm_up():
    run = Run(command_timeout=0.195, max_linear_acceleration=1.0)
    run.steps(0.5, command(linear=(0.2, 0.0, 0.0)))
    outputs = run.steps(2.0)
    speeds = [o.linear[0] for o in outputs if o is not None]
    assert speeds[:19] == pytest.approx([0.2] * 19)
    assert speeds[19:39] == pytest.approx([0.2 - 0.01 * k for k in range(1, 21)])
    zeros = speeds[39:]
    assert set(zeros) == {0.0} and len(zeros) == pytest.approx(HOLD_TIME / PERIOD, abs=2)
    assert outputs[-1] is None and run.guard.state == WAITING
    assert run.guard.counts.stops_on_silence == 1


@pytest.mark.parametrize(
    ("period", "silence"),
    [(0.05, 0.1), (0.2, 0.4), (9.0, LONGEST_SILENCE), (0.0, 0.25), (-1, 0.25)],
)
def test_a_policy_is_waited_for_two_of_its_periods(period, silence):
    run = Run(command_timeout=0.25, max_linear_acceleration=50.0)
    run.step(command(period=period))
    outputs = run.steps(1.0)
    moving = [output for output in outputs if output is not None and output.linear != ZERO]
    assert len(moving) == pytest.approx(silence / PERIOD, abs=1.5)


def test_a_dead_policy_is_not_waited_for():
    run = Run(max_linear_acceleration=1.0)
    run.steps(0.5, command(linear=(0.2, 0.0, 0.0), period=0.2))
    run.guard.hear(alive=False)
    speeds = [o.linear[0] for o in run.steps(0.2)]
    assert speeds == pytest.approx([0.2 - 0.01 * k for k in range(1, 21)])
    assert run.guard.state == HOLDING and "no sign of life" in run.guard.reason
    assert run.guard.counts.liveliness_lost == 1 and run.guard.counts.stops_on_silence == 0
    assert run.steps(1.0)[-1] is None and run.guard.state == WAITING
    assert run.guard.submit(run.now, command(policy_label="B", episode_id="e2")) == ""
    run.step()
    assert run.guard.state == ACTIVE, "another policy takes over"


def test_death_that_is_heard_of_after_the_silence_counts_too():
    run = Run(command_timeout=0.195, max_linear_acceleration=1.0)
    run.steps(0.5, command(linear=(0.2, 0.0, 0.0)))
    run.steps(0.25)
    assert run.guard.state == HOLDING and run.guard.counts.stops_on_silence == 1
    run.guard.hear(alive=False)
    run.steps(1.0)
    assert run.guard.counts.liveliness_lost == 1 and run.guard.counts.stops_on_silence == 1


@pytest.mark.parametrize("again", ["signs of life", "a command"])
def test_a_policy_that_was_taken_for_dead_goes_on(again):
    run = Run()
    good = command(linear=(0.1, 0.0, 0.0), period=0.2)
    run.steps(0.5, good)
    run.guard.hear(alive=False)
    run.step()
    assert run.guard.state == HOLDING
    if again == "a command":
        run.step(good)
    else:
        run.guard.hear(alive=True)
        run.step()
    assert run.guard.state == ACTIVE


def test_a_waiting_guard_does_not_mind_who_dies():
    run = Run()
    run.guard.hear(alive=False)
    assert run.steps(0.1) == [None] * 10 and run.guard.state == WAITING
    assert run.guard.counts.liveliness_lost == 0
    run.step(command())
    assert run.guard.state == ACTIVE


def test_a_guard_that_was_held_up_begins_from_standstill():
    run = Run(command_timeout=2.0, max_linear_acceleration=1.0, max_linear_jerk=10.0)
    run.steps(0.5, command(linear=(0.2, 0.0, 0.0)))
    run.now += 0.3
    assert run.step().linear[0] < 0.06 and run.guard.counts.stalls == 1
    assert run.steps(0.5, command(linear=(0.2, 0.0, 0.0)))[-1].linear[0] == 0.2
    assert run.guard.counts.stalls == 1


def test_another_policy_may_take_a_standing_arm_but_not_a_moving_one():
    run = Run(command_timeout=0.2, max_linear_acceleration=1.0)
    run.steps(0.5, command(linear=(0.2, 0.0, 0.0)))
    run.steps(0.3)
    other = command(policy_label="B", episode_id="e2")
    assert "'A' has the arm" in run.guard.submit(run.now, other)
    run.steps(0.2)
    assert run.guard.submit(run.now, other) == ""
    run.step()
    assert run.guard.state == ACTIVE


def test_the_same_policy_may_go_on_after_silence():
    run = Run()
    run.steps(0.5, command())
    run.steps(0.3)
    assert run.guard.state == HOLDING
    assert run.steps(0.5, command())[-1].linear == (0.1, 0.0, 0.0)
    still = [o for o in run.steps(2.0) if o is not None and o.linear == ZERO]
    assert len(still) == pytest.approx(HOLD_TIME / PERIOD, abs=2)


# Stops


def test_a_stop_brakes_and_stays_until_it_is_released():
    run = Run(max_linear_acceleration=1.0)
    run.steps(0.5, command(linear=(0.2, 0.0, 0.0)))
    run.guard.stop("operator")
    assert run.step().linear == pytest.approx((0.19, 0.0, 0.0))
    assert "braked" in run.guard.release(run.now)
    outputs = run.steps(3.0)
    assert outputs[-1].linear == ZERO and run.guard.state == STOPPED
    assert run.guard.reason == "operator"
    assert run.guard.release(run.now) == ""
    assert run.step() is None and run.guard.state == WAITING


def test_commands_are_dropped_and_counted_while_stopped():
    run = Run()
    run.steps(0.5, command())
    run.guard.stop("operator")
    run.steps(0.5, command())
    assert run.guard.counts.rejected_stopped == 50 and run.guard.state == STOPPED


def test_an_emergency_stop_is_zero_at_once():
    run = Run()
    run.steps(0.5, command(linear=(0.25, 0.0, 0.0), angular=(1.0, 0.0, 0.0)))
    run.guard.press(True)
    output = run.step(command())
    assert output.linear == output.angular == ZERO
    assert run.guard.state == STOPPED and run.guard.reason == "emergency stop"


def test_an_emergency_stop_without_a_button_is_released_without_one():
    run = Run()
    run.steps(0.5, command())
    run.guard.emergency_stop()
    assert run.step(command()).linear == ZERO
    run.steps(0.3)
    assert run.guard.release(run.now) == ""


def test_release_is_refused_while_the_button_is_pressed_or_commands_have_speed():
    run = Run()
    run.steps(0.5, command())
    run.guard.press(True)
    run.steps(0.5)
    assert "still true" in run.guard.release(run.now)
    run.guard.press(False)
    assert run.guard.state == STOPPED
    run.step(command())
    assert "still coming in" in run.guard.release(run.now)
    run.steps(0.3, command(linear=ZERO))
    assert run.guard.release(run.now) == ""
    assert run.guard.release(run.now) == "nothing is stopped"


def test_an_arm_that_was_never_moved_gets_nothing_while_stopped():
    run = Run()
    run.guard.press(True)
    assert run.steps(0.1, command()) == [None] * 10
    assert run.guard.state == STOPPED


# Workspace


def test_without_a_pose_nothing_moves_and_the_reason_is_said():
    run = Run(**BOX)
    assert run.steps(0.1, command()) == [None] * 10
    assert "no ee_pose yet" in run.guard.reason


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "older than 0.1 s"),
        (pose(age=0.5), "older than"),
        (pose(age=-5.0), "of the future"),
        (pose((math.nan, 0.0, 0.0)), "not finite"),
        (pose(frame_id="map"), "frame 'map'"),
        (pose(orientation=(0.0, 0.0, 0.0, 0.0)), "no unit quaternion"),
    ],
)
def test_a_pose_that_is_of_no_use_brakes_the_arm_until_it_is(bad, words):
    run = Run(**BOX)
    run.steps(0.5, command(), pose())
    assert run.steps(0.5, command(), bad)[-1].linear == ZERO
    assert run.guard.state == HOLDING and words in run.guard.reason
    assert run.steps(0.5, command(), pose())[-1].linear == (0.1, 0.0, 0.0)


def test_outside_the_box_the_arm_may_only_move_back_in():
    outside = pose((0.6, 0.0, 0.3))
    out, back = command(linear=(0.1, 0.1, 0.0)), command(linear=(-0.1, 0.1, 0.0))
    run = Run(**BOX)
    assert run.steps(0.5, out, outside)[-1].linear == pytest.approx((0.0, 0.1, 0.0))
    assert run.guard.counts.limited_workspace == 50
    assert run.steps(0.5, back, outside)[-1].linear == pytest.approx((-0.1, 0.1, 0.0))
    assert run.guard.counts.limited_workspace == 50


def test_a_pose_that_jumps_outside_brakes_the_arm_at_the_limit():
    run = Run(**BOX, max_linear_acceleration=1.0)
    run.steps(0.5, command(linear=(0.2, 0.0, 0.0)), pose())
    outputs = run.steps(0.5, command(linear=(0.2, 0.0, 0.0)), pose((0.7, 0.0, 0.3)))
    speeds = [0.2, *(o.linear[0] for o in outputs)]
    assert all(a - b <= 0.01 + 1e-9 for a, b in itertools.pairwise(speeds))
    assert speeds[-1] == 0.0


# Limits


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"rate": 0.0}, "rate is 0.0"),
        ({"max_linear_speed": -1.0}, "max_linear_speed is -1.0"),
        ({"command_timeout": math.nan}, "command_timeout is nan"),
        ({"max_gripper_rate": math.inf}, "max_gripper_rate is inf"),
        ({"max_linear_jerk": 0.0}, "max_linear_jerk is 0.0"),
        ({"max_angular_jerk": math.nan}, "max_angular_jerk is nan"),
        ({"max_tilt": 4.0}, "max_tilt is 4.0"),
        ({"cone_axis": ZERO}, "cone_axis is"),
        ({"cone_axis": (0.0, math.nan, 1.0)}, "cone_axis is"),
        ({"base_frame": ""}, "base_frame"),
        ({"labels": ("A", "")}, "empty label"),
        ({"workspace_min": (0.0, 0.0, 0.0)}, "both or neither"),
        ({"workspace_min": (0.0, 0.0), "workspace_max": (1.0, 1.0)}, "3 finite numbers"),
        ({**BOX, "workspace_max": (0.5, -0.4, 0.6)}, "less than"),
    ],
)
def test_limits_that_guard_nothing_are_refused(bad, words):
    with pytest.raises(UserError, match=words):
        Limits(**bad)
