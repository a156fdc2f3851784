import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rlrc_ros.errors import UserError
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.config import ActionCodecConfig

LOW, HIGH = np.array([-0.03, -0.15, 0.0]), np.array([0.03, 0.15, 1.0])
CODEC = ActionCodec(ActionCodecConfig(q01=tuple(LOW), q99=tuple(HIGH), mask=(True,) * 3))
BIN = (HIGH - LOW) / 255


@given(arrays.arrays(np.float64, (5, 3), elements=st.floats(0, 1)))
def test_what_is_in_range_comes_back_within_half_a_bin(shares):
    actions = LOW + shares * (HIGH - LOW)
    assert (np.abs(CODEC.decode(CODEC.encode(actions)) - actions) <= BIN / 2 + 1e-12).all()


@given(arrays.arrays(np.float64, (4, 3), elements=st.floats(-10, 10)))
def test_whatever_goes_in_a_valid_bin_and_a_bounded_action_come_out(actions):
    bins = CODEC.encode(actions)
    assert bins.min() >= 0 and bins.max() <= 255
    decoded = CODEC.decode(bins)
    assert (decoded >= LOW).all() and (decoded <= HIGH).all()


@given(st.integers(0, 255))
def test_decoding_then_encoding_changes_no_bin_but_the_doubled_first(number):
    bins = np.full((1, 3), number)
    again = CODEC.encode(CODEC.decode(bins))
    # 256 tokens share 255 centres: OpenVLA decodes the lowest two tokens alike.
    assert (again == max(number, 1)).all() or (again == min(number, 254)).all()


def test_agrees_with_the_formula_openvla_publishes():
    config = ActionCodecConfig(q01=(-0.5, 0.0), q99=(0.4, 1.0), mask=(True, False))
    codec, vocabulary = ActionCodec(config), 32000
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    tokens = np.array([[31999, 31744], [31900, 31800]])
    scaled = centres[np.clip(vocabulary - tokens - 1, 0, 254)]
    expected = np.where([True, False], 0.5 * (scaled + 1) * (0.4 + 0.5) - 0.5, scaled)
    np.testing.assert_allclose(codec.decode(tokens - (vocabulary - 256)), expected, atol=1e-12)


def test_quantiles_the_wrong_way_round_are_refused():
    with pytest.raises(UserError, match="q01 must be below q99"):
        ActionCodecConfig(q01=(1.0,), q99=(0.0,), mask=(True,))
