import math

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from rlrc_ros.motion import rotated

turns = st.tuples(*[st.floats(-7.0, 7.0)] * 3)


@given(turns)
@example((0.0, 0.0, 2.2e-313))  # the reciprocal of which is infinite
def test_a_turned_vector_keeps_its_length_and_its_part_along_the_axis(turn):
    vector = (0.3, -0.4, 1.2)
    found = rotated(vector, turn)
    assert math.isclose(math.hypot(*found), 1.3, abs_tol=1e-9)
    assert math.isclose(np.dot(found, turn), np.dot(vector, turn), abs_tol=1e-9)
