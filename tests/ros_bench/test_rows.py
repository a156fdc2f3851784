import numpy as np
import pytest

from rlrc_ros.ros_bench import rows
from rlrc_ros.ros_bench.processes import Usage
from rlrc_ros.ros_bench.rows import Sent, Speed
from rlrc_ros.ros_bench.stamps import StampWriter, read_stamps

MS = 1_000_000


def usages(own, threads=(5,), descriptors=(9,), shared=(50,)):
    """A hundred samples, each list stretched over them."""
    lists = (own, shared, threads, descriptors)
    stretched = [np.repeat(values, 100 // len(values)) for values in lists]
    return [
        Usage(t, int(o + s), int(o), int(s), int(n), int(d))
        for t, (o, s, n, d) in enumerate(zip(*stretched, strict=True))
    ]


def test_a_command_is_less_the_last_action_that_had_ended():
    # actions of 10, 20 and 30 ms that end at 100, 200 and 300 ms
    ended = [100 * MS, 200 * MS, 300 * MS]
    began = [90 * MS, 180 * MS, 270 * MS]
    commands = [Sent(101 * MS, 60 * MS), Sent(203 * MS, 150 * MS), Sent(301 * MS, 250 * MS)]
    # the first warms up
    assert rows.without_inference(commands, began, ended) == pytest.approx([33.0, 21.0])
    assert rows.latencies(commands) == pytest.approx([41.0, 53.0, 51.0])


def test_latency_is_compared_with_the_relays():
    rng = np.random.default_rng(0)
    relay = rng.uniform(10, 20, 500)
    row = rows.latency_row(1.5 * relay, relay, relay / 10)
    assert row["met"] and row["against_relay_at_rate"]["median"] == pytest.approx(1.5)
    low, high = row["against_relay_at_rate"]["median_ci95"]
    assert 1.4 < low < 1.5 < high < 1.6
    assert row["against_relay_on_arrival"]["p99"] == pytest.approx(15)
    assert not rows.latency_row(2.1 * relay, relay, relay)["met"]


def test_images_are_matched_by_their_stamps():
    sent = {0: [1, 2, 3, 4], 1: [5, 6, 7]}
    row = rows.images_row(sent, {0: [4, 2, 1], 1: [5, 6, 7], 10: [9]}, 1.0)
    assert (row["sent"], row["lost"], row["lost_by_camera"]) == (7, 1, [1, 0])
    assert row["lost_by_second"] == {0: 1}
    assert not row["met"] and rows.images_row(sent, sent, 1.0)["met"]
    assert not rows.images_row({}, {}, 1.0)["met"], "nothing sent proves nothing"


def test_jitter_is_how_far_intervals_are_off():
    row = rows.jitter_row([0, 10 * MS, 20 * MS, 33 * MS], 100.0)
    assert row["intervals"] == 3 and row["jitter_ms"]["max"] == pytest.approx(3.0)
    assert not row["met"] and rows.jitter_row(list(range(0, 900 * MS, 10 * MS)), 100.0)["met"]


@pytest.mark.parametrize(
    ("after", "times"),
    [
        ([1, 1, 1, 0, 0], (40, 40)),  # at once
        ([1, 1, 0.6, 0.2, 0, 0], (30, 50)),  # with a ramp
        ([0.5, 0.9, 1, 0.5, 0], (40, 50)),  # still speeding up when the policy died
        ([0, 0, 0], None),  # stood already
        ([1, 1, 1], None),  # never stopped
    ],
)
def test_braking_is_found_in_what_the_guard_sent(after, times):
    speeds = [Speed(k * 10 * MS, 1.0) for k in range(-5, 1)]
    speeds += [Speed((k + 1) * 10 * MS, speed) for k, speed in enumerate(after)]
    found = rows.braking(speeds, 1)
    assert found == (times and pytest.approx(times, abs=1e-4))


def test_the_worst_of_all_kills_counts():
    row = rows.stop_row([(20.0, 30.0), (39.0, 60.0)], [200.0, 210.0], 0, 100.0)
    assert row["met"] and row["bar"] == {"worst_ms": 40.0}
    assert not rows.stop_row([(20.0, 30.0), (41.0, 60.0)], [200.0, 210.0], 0, 100.0)["met"]
    assert not rows.stop_row([], [], 3, 100.0)["met"], "no kill proves nothing"


def test_the_recorder_may_lose_nothing_and_take_a_quarter_of_a_core():
    sent = {"/a": 10, "/b": 5}
    assert rows.recorder_row(sent, {"/a": 10, "/b": 5, "/c": 1}, {}, 2.4, 10.0)["met"]
    lost = rows.recorder_row(sent, {"/a": 9}, {"/b": 4}, 2.4, 10.0)
    assert lost["lost_by_topic"] == {"/a": 1, "/b": 5} and lost["dropped"] == 4
    assert not lost["met"]
    assert not rows.recorder_row(sent, sent, {}, 2.6, 10.0)["met"]


def test_growth_is_from_the_second_tenth_to_the_last():
    steady = usages([50, *[1000] * 9])  # the start does not count
    row = rows.soak_row({"guard": steady})
    assert row["met"] and row["processes"]["guard"]["own_growth"] == 0 and row["seconds"] == 99
    growing = rows.soak_row({"guard": steady, "policy": usages(np.linspace(1000, 1100, 100))})
    assert not growing["met"]
    assert growing["processes"]["policy"]["own_growth"] == pytest.approx(0.08, abs=0.01)
    touching = rows.soak_row({"guard": usages([1000], shared=[50, 80])})
    assert touching["met"] and touching["processes"]["guard"]["rss_growth"] > 0
    assert not rows.soak_row({"guard": usages([1000], threads=[5, 6])})["met"]
    assert not rows.soak_row({"guard": usages([1000], descriptors=[9, 12])})["met"]
    assert not rows.soak_row({})["met"]


def test_stamps_come_back_and_half_an_entry_is_left_out(tmp_path):
    path = tmp_path / "notes"
    writer = StampWriter(path)
    for source, stamp in ((0, 5), (1, -1), (0, 2**62)):
        writer.write(source, stamp)
    writer.flush()
    path.write_bytes(path.read_bytes() + b"half")
    assert read_stamps(path) == {0: [5, 2**62], 1: [-1]}


def test_the_slowest_swap_decides():
    assert rows.swap_row([3.0, 49.0], [0.1, 0.2])["met"]
    slow = rows.swap_row([3.0, 51.0], [0.1, 0.2])
    assert not slow["met"] and slow["swaps"] == 2 and slow["call_ms"]["max"] == 51.0
    assert not rows.swap_row([], [])["met"]
