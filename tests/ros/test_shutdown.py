"""How `common.run` ends a process, whatever the node does."""

import re
import signal
import sys
import time

import pytest

from rlrc_ros.nodes.common import TEARDOWN_TIME

NODE = """
import ctypes, sys, time
from rclpy.node import Node
from rlrc_ros.errors import UserError
from rlrc_ros.nodes import common

class {name}(Node):
    def __init__(self):
        super().__init__("ending")
        self.create_timer(0.1, self.tick)

    def tick(self):
        print("ticking")

    def leave(self):
        print("left")

{body}

common.HANG_TIME = 2.0
sys.exit(common.run({name}, {name}.leave))
"""
BODIES = {
    "Sound": "",
    # As a deadlock in the middleware does it: with the interpreter's lock held.
    "Deadlocked": """
    def destroy_node(self):
        ctypes.PyDLL(None).sleep(60)
""",
    "Hung": """
    def tick(self):
        print("ticking")
        ctypes.PyDLL(None).sleep(600)
""",
    "Loading": """
    def tick(self):
        with common.interruptible():
            print("ticking")
            time.sleep(60)
""",
    "Mistaken": """
    def tick(self):
        raise UserError("there is no GPU")
""",
}


@pytest.fixture
def ending(start, ros):
    def ending(name):
        code = NODE.format(name=name, body=BODIES[name])
        process = start([sys.executable, "-c", code])
        if name != "Mistaken":
            assert ros.until(lambda: "ticking" in process.output)
        return process

    return ending


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["Sound", "Loading"])
def test_a_signal_ends_a_node_with_its_outputs_closed(ending, name, number):
    process = ending(name)
    time.sleep(3.0)  # for longer than it may hang
    process.send(number)
    assert process.wait() == 0
    assert process.output.splitlines()[-1] == "left"


def test_a_deadlock_in_the_middleware_cannot_keep_a_process(ending):
    process = ending("Deadlocked")
    process.send(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(TEARDOWN_TIME + 10.0) == -signal.SIGALRM
    assert time.monotonic() - began > TEARDOWN_TIME / 2
    assert process.output.splitlines()[-1] == "left"


def test_a_node_that_hangs_while_it_runs_ends_and_says_where(ending):
    process = ending("Hung")
    assert process.wait(90.0) == 1
    assert "Timeout (0:00:02)!" in process.output
    assert re.search(r"^  File .* in tick$", process.output, re.MULTILINE)
    assert "left" not in process.output


def test_a_users_mistake_found_while_running_is_one_line(ending):
    process = ending("Mistaken")
    assert process.wait(90.0) == 2
    assert process.output.splitlines() == ["-c: there is no GPU", "left"]
