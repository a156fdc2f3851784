"""What the nodes share: how one is run, its parameters, QoS profiles and diagnostics."""

from __future__ import annotations

import faulthandler
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from rlrc_ros.errors import UserError
from rlrc_ros.nodes import dead_ports

N = TypeVar("N", bound=Node)

RCLError = rclpy_implementation.RCLError

SENSOR_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
"""The latest measurement and no other (REP-2003)."""

CAMERA_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
"""Room for the images that come while a node is held up, up to a third of a second at 30 Hz. The
newest is what a policy looks at; that none is lost on the way can be counted."""

COMMAND_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
"""The latest command, delivered."""

POLICY_QOS = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    liveliness=LivelinessPolicy.AUTOMATIC,
    liveliness_lease_duration=Duration(seconds=0.012),
)
"""The latest command of a policy, and a promise to the command guard: a sign of life of the process
every 12 ms. Fast DDS sends one every 8 ms, from a thread that neither inference nor Python's lock
holds up; a process that was killed or frozen sends none."""

LATCHED_QOS = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
"""What was said last, for those who come later too."""

STEADY_CLOCK = Clock(clock_type=ClockType.STEADY_TIME)
"""For timers that must not stop or jump with simulated time."""


TEARDOWN_TIME = 5.0
"""s that destroying a node may take. Fast DDS can deadlock there: TCP channels of 3.2 do (see
`rlrc_ros.bringup`)."""
HANG_TIME = 60.0
"""s that a callback may hold a node up; then its process is taken for hung, and ends. Fast DDS can
deadlock where an endpoint is taken down just as a dead process's lease ends (its issue 6502)."""
LINGER_TIME = 0.2
"""s for what was answered last to go out and to arrive, before a process ends."""


def run(make_node: Callable[[], N], before_shutdown: Callable[[N], None] | None = None) -> int:
    """Run a node until SIGINT or SIGTERM, and return the process's exit status.

    The signals do not shut the ROS context down, so that `before_shutdown` can still publish; no
    callback runs beside it, unless it spins `node.executor` itself. The process ends within
    TEARDOWN_TIME after that, whatever the middleware does. Where it hangs before, the process says
    "Timeout" and where every thread stands, and ends after HANG_TIME, with status 1. A UserError of
    the node's is printed as one line, with status 2.
    """
    stopping = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        try:
            rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        except RuntimeError as error:  # ROS arguments that rcl cannot parse
            raise UserError(str(error).splitlines()[0]) from None
        try:
            with dead_ports.avoided():
                node = make_node()
        except RCLError as error:  # security that is asked for and cannot be had
            raise UserError(str(error).splitlines()[0]) from None
    except UserError as error:
        _say(error)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    # What exists by now stays: without it a collection stalls the timers for several ms.
    gc.collect()
    gc.freeze()
    watched = -math.inf
    try:
        while not stopping:
            if time.monotonic() - watched > HANG_TIME / 10:
                # From a thread of its own, without the interpreter's lock.
                faulthandler.dump_traceback_later(HANG_TIME, exit=True)
                watched = time.monotonic()
            executor.spin_once(timeout_sec=0.1)
    except UserError as error:
        _say(error)
        return 2
    finally:
        if before_shutdown is not None:
            before_shutdown(node)
        # Outputs are closed. The kernel ends what hangs from here on: a deadlock in the middleware
        # holds the interpreter's lock, and no Python code would run.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, TEARDOWN_TIME)
        faulthandler.cancel_dump_traceback_later()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


async def until(node: Node, condition: Callable[[], bool], seconds: float) -> bool:
    """Wait in a callback's coroutine for a condition; whether it came to hold in time."""
    held: Future[bool] = Future(executor=node.executor)
    deadline = time.monotonic() + seconds

    def look() -> None:
        holds = condition()
        if not held.done() and (holds or time.monotonic() > deadline):
            held.set_result(holds)

    look()
    timer = node.create_timer(0.02, look, clock=STEADY_CLOCK)
    result = await held
    node.destroy_timer(timer)
    return bool(result)


def linger(node: Node) -> None:
    """Serve callbacks for LINGER_TIME: nothing tells when a service's answer has arrived."""
    executor, deadline = node.executor, time.monotonic() + LINGER_TIME
    assert executor is not None
    while (left := deadline - time.monotonic()) > 0:
        executor.spin_once(timeout_sec=left)


@contextmanager
def interruptible() -> Iterator[None]:
    """Allow a callback to take long.

    SIGINT and SIGTERM end the process from within it, as cleanly as ever, and it is not taken for
    hung.
    """

    def leave(_signal: int, _frame: object) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    faulthandler.cancel_dump_traceback_later()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_ahead(priority: int) -> str:
    """Put every thread of this process, the middleware's too, ahead of those of ordinary processes.

    Args:
        priority: Of SCHED_FIFO (sched(7)), 1 to 99.

    Returns:
        Why it is not allowed, empty where it is.
    """
    try:
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(priority))
    except OSError as error:
        return str(error)
    return ""


def _say(error: UserError) -> None:
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)


def number(
    node: Node, name: str, default: float, description: str, low: float, high: float
) -> float:
    """Declare a float parameter within [low, high], fixed once the node runs; return its value."""
    range_ = [FloatingPointRange(from_value=low, to_value=high)]
    kind = f"a number between {low} and {high}, with a decimal point"
    return _declare(node, name, default, description, kind, floating_point_range=range_)


def integer(node: Node, name: str, default: int, description: str, low: int, high: int) -> int:
    """Declare an integer parameter within [low, high], fixed once the node runs."""
    range_ = [IntegerRange(from_value=low, to_value=high)]
    kind = f"an integer between {low} and {high}"
    return _declare(node, name, default, description, kind, integer_range=range_)


def text(node: Node, name: str, default: str, description: str) -> str:
    """Declare a string parameter, fixed once the node runs; return its value."""
    return _declare(node, name, default, description, "a string")


def flag(node: Node, name: str, default: bool, description: str) -> bool:
    """Declare a bool parameter, fixed once the node runs; return its value."""
    return _declare(node, name, default, description, "true or false")


def numbers(node: Node, name: str, description: str) -> list[float]:
    """Declare a list of floats, empty where nobody sets it, fixed once the node runs."""
    kind = "a list of numbers with decimal points"
    return list(_declare(node, name, Parameter.Type.DOUBLE_ARRAY, description, kind) or [])


def texts(node: Node, name: str, description: str) -> list[str]:
    """Declare a list of strings, empty where nobody sets it, fixed once the node runs."""
    kind = "a list of strings"
    return list(_declare(node, name, Parameter.Type.STRING_ARRAY, description, kind) or [])


def _declare(
    node: Node, name: str, default: Any, description: str, kind: str, **constraints: Any
) -> Any:
    descriptor = ParameterDescriptor(description=description, read_only=True, **constraints)
    try:
        return node.declare_parameter(name, default, descriptor).value
    except (InvalidParameterTypeException, InvalidParameterValueException):
        raise UserError(f"parameter {name} ({description}) must be {kind}") from None


def diagnostics(
    node: Node, level: bytes, message: str, values: Mapping[str, object]
) -> DiagnosticArray:
    """A diagnostic_msgs/DiagnosticArray with one status, named after the node.

    Args:
        node: Whose status it is.
        level: DiagnosticStatus.OK, WARN, ERROR or STALE.
        message: One line for the operator.
        values: Numbers and names beside it.
    """
    status = DiagnosticStatus(
        level=level,
        name=node.get_fully_qualified_name().lstrip("/"),
        message=message,
        hardware_id="",
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
    )
    array = DiagnosticArray(status=[status])
    array.header.stamp = node.get_clock().now().to_msg()
    return array
