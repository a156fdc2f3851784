import pytest

from rlrc_ros.rollouts import preroll as prerolls
from rlrc_ros.rollouts.preroll import Preroll


@pytest.fixture
def clock(monkeypatch):
    """A steady clock that stands until it is set."""

    class Clock:
        now = 1000.0

        @staticmethod
        def monotonic():
            return Clock.now

    monkeypatch.setattr(prerolls, "time", Clock)
    return Clock


def stamps(preroll):
    return [message.received for message in preroll.take()]


def test_what_is_too_old_is_let_go_and_the_order_is_kept(clock):
    preroll = Preroll(2.0)
    for second in range(5):
        clock.now = 1000.0 + second
        preroll.add("/a", second, second, b"x")
    assert stamps(preroll) == [2, 3, 4]
    assert stamps(preroll) == [], "taken once"
    preroll.add("/a", 9, 9, b"x")
    clock.now += 3.0
    assert stamps(preroll) == [], "too old by the time it is taken"


def test_it_holds_no_more_bytes_than_it_may(clock):
    preroll = Preroll(2.0, size=30)
    for k in range(10):
        preroll.add("/a", k, k, bytes(10))
    assert stamps(preroll) == [7, 8, 9]
    preroll.add("/a", 10, 10, bytes(31))
    assert stamps(preroll) == [], "larger than all of it"
    preroll.add("/a", 11, 11, bytes(10))
    assert stamps(preroll) == [11]


def test_messages_are_kept_by_when_they_came_not_by_a_clock_that_may_be_set(clock):
    preroll = Preroll(2.0)
    preroll.add("/a", 10**18, 0, b"the clock was wrong")
    clock.now += 1.0
    preroll.add("/b", 5, 0, b"and was set")
    assert stamps(preroll) == [10**18, 5]
