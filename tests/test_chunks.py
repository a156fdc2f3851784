import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.chunks import BLEND_STEPS, ActionPlan

PERIOD = 0.1


def chunk(value, steps=8, gripper=0.0):
    actions = np.full((steps, 7), float(value))
    actions[:, -1] = gripper
    return actions


def taken(plan, count):
    return [plan.take()[0] for _ in range(count)]


def test_single_actions_are_never_left_out_nor_mixed():
    plan = ActionPlan(PERIOD)
    for value in (1.0, -1.0):
        plan.add(chunk(value, steps=1), 5, age=0.7)
        action, stamp = plan.take()
        assert action[0] == value and stamp == 5
        assert plan.take() is None and plan.wants_more


def test_a_chunk_is_asked_for_after_half_of_the_last_or_as_many_steps_as_told():
    for steps, parameters in ((4, {}), (2, {"replan_steps": 2})):
        plan = ActionPlan(PERIOD, **parameters)
        assert plan.wants_more
        plan.add(chunk(0.0), 0, age=0.0)
        for _ in range(steps):
            assert not plan.wants_more
            plan.take()
        assert plan.wants_more and len(plan) == 8 - steps


@pytest.mark.parametrize(("age", "late"), [(0.0, 0), (0.04, 0), (0.11, 1), (0.36, 4), (9.0, 7)])
def test_what_is_over_when_a_chunk_arrives_is_left_out(age, late):
    plan = ActionPlan(PERIOD)
    plan.add(np.arange(8.0)[:, None] * np.ones(7), 0, age)
    assert plan.take()[0][0] == late and plan.skipped == late


actions = st.lists(
    st.lists(st.floats(-0.05, 0.05), min_size=7, max_size=7), min_size=8, max_size=8
).map(np.array)


@settings(max_examples=100)
@given(chunks=st.lists(actions, min_size=2, max_size=5), age=st.floats(0.0, 0.3))
def test_the_jump_at_a_splice_is_bounded_and_the_new_chunk_has_taken_over_in_the_end(chunks, age):
    plan = ActionPlan(PERIOD)
    plan.add(chunks[0], 0, age)
    for new in chunks[1:]:
        taken(plan, 3)
        planned = [slot.action for slot in plan._slots]
        plan.add(new, 0, age)
        late = plan.skipped
        first = plan._slots[0].action
        if planned:
            difference = np.abs(new[late, :6] - planned[0][:6])
            bound = difference / (BLEND_STEPS + 1) + 1e-12
            assert (np.abs(first[:6] - planned[0][:6]) <= bound).all()
        assert first[-1] == new[late, -1], "the gripper is not blended"
        if len(plan._slots) > BLEND_STEPS:
            assert np.array_equal(plan._slots[BLEND_STEPS].action, new[late + BLEND_STEPS])


def test_two_constant_chunks_are_spliced_in_equal_steps():
    plan = ActionPlan(PERIOD)
    plan.add(chunk(0.0), 0, age=0.0)
    last = taken(plan, 4)[-1]
    plan.add(chunk(1.0), 0, age=0.0)
    steps = [last, *taken(plan, 5)]
    jumps = [b[0] - a[0] for a, b in itertools.pairwise(steps)]
    assert max(jumps) == pytest.approx(1 / (BLEND_STEPS + 1)) and steps[-1][0] == 1.0


def test_an_ensemble_is_the_weighted_mean_of_all_predictions_of_a_step():
    plan = ActionPlan(PERIOD, ensemble=True)
    for value in (0.0, 1.0, 2.0):
        plan.add(chunk(value, gripper=value / 2), 0, age=0.0)
    weights = np.exp(-0.01 * np.arange(3))
    expected = weights @ [0.0, 1.0, 2.0] / weights.sum()
    assert plan.take()[0] == pytest.approx([expected] * 6 + [expected / 2])
