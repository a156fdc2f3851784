"""Real nodes as real processes over real DDS, each module of tests in a domain of its own."""

import contextlib
import fcntl
import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("rclpy") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    from rlrc_ros.bringup import TRANSPORT_ENVIRONMENT
    from rlrc_ros.sim import tasks
    from rlrc_ros.vla import quantization
    from rlrc_ros.vla.bundle import provenance, write_bundle
    from rlrc_ros.vla.processor import word_tokenizer
    from tests.conftest import WORDS, bundle_config, posed_config, random_model
    from tests.ros.policy_robot import Robot, numbers, parameters

BIN = Path(sys.executable).parent
DISCOVERY_TIME = 60.0
"""How long processes may take to start and to find each other on a busy machine, in s."""


@pytest.fixture(scope="module")
def ros_environment(tmp_path_factory):
    """Environment variables for every process of this module's tests, set in this one too."""
    with contextlib.ExitStack() as stack:
        variables = {
            **TRANSPORT_ENVIRONMENT,
            "ROS_DOMAIN_ID": str(_free_domain(stack)),
            "ROS_LOG_DIR": str(tmp_path_factory.mktemp("ros_log")),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        before = dict(os.environ)
        os.environ.update(variables)
        yield variables
        for name in variables:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


_used_domains = set()


def _free_domain(stack):
    """A domain that nobody on this machine tests in, at random; from 102 on ports may collide.

    Never one of before: processes that were killed there have left shared memory behind, on which
    those that come after may wait in vain for each other.
    """
    domains = [domain for domain in range(1, 101) if domain not in _used_domains]
    for domain in random.sample(domains, len(domains)):
        path = Path(tempfile.gettempdir()) / f"rlrc_test_domain_{domain}.lock"
        lock = stack.enter_context(path.open("w"))
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _used_domains.add(domain)
            _forget_ports(domain)
            return domain
    pytest.fail("other test sessions hold every ROS domain")


def _forget_ports(domain):
    """Remove the shared memory of what was killed in this domain by an earlier test session.

    DDS gives every domain 250 ports, from 7400 on.
    """
    first = 7400 + 250 * domain
    for path in Path("/dev/shm").glob("*fast*_port*"):  # where Fast DDS puts it
        if first <= int(re.search(r"_port(\d+)", path.name)[1]) < first + 250:
            path.unlink(missing_ok=True)


class Process:
    """A process and what it has printed."""

    def __init__(self, command, log, **keywords):
        self.log = log
        with log.open("w") as file:
            self.popen = subprocess.Popen(
                [str(word) for word in command],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                **keywords,
            )

    @property
    def pid(self):
        return self.popen.pid

    @property
    def output(self):
        return self.log.read_text()

    def send(self, number):
        self.popen.send_signal(number)

    def wait(self, timeout=10.0):
        """The exit status."""
        return self.popen.wait(timeout)

    def stop(self):
        """SIGINT, as from a launch file; the exit status."""
        self.send(signal.SIGINT)
        return self.wait()

    def kill(self):
        """SIGINT, or else SIGABRT, which prints where it hangs, or else SIGKILL.

        A killed process leaves shared memory of Fast DDS's behind.
        """
        for number in (signal.SIGINT, signal.SIGABRT):
            self.send(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(5.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()


@contextlib.contextmanager
def starting(base, directory):
    """start(executable or words, parameters, …) → Process; all of them die at the end."""
    processes = []

    def start(command, parameters=None, environment=None, remappings=None, **keywords):
        words = [BIN / command] if isinstance(command, str) else list(command)
        if isinstance(command, str):
            words.append("--ros-args")
            for name, value in (parameters or {}).items():
                words += ["-p", f"{name}:={value}"]
            for name, other in (remappings or {}).items():
                words += ["-r", f"{name}:={other}"]
        variables = os.environ | base | (environment or {})
        log = directory / f"process_{len(processes)}.log"
        processes.append(Process(words, log, env=variables, **keywords))
        return processes[-1]

    try:
        yield start
    finally:
        for process in processes:
            process.kill()
            print(f"--- {process.popen.args}: {process.popen.returncode}\n{process.output}")


@pytest.fixture
def start(ros_environment, tmp_path):
    """start(executable or words, parameters, …) → Process; all of them die with the test."""
    with starting(ros_environment, tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def start_shared(ros_environment, tmp_path_factory):
    """The same for processes that the tests of a module share."""
    with starting(ros_environment, tmp_path_factory.mktemp("shared")) as start:
        yield start


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Two tiny random policies that fit the simulated arm: {"original": …, "compressed": …}."""
    directory = tmp_path_factory.mktemp("bundles")
    made = {}
    for seed, (label, ffn) in enumerate({"original": 64, "compressed": 32}.items()):
        config = bundle_config(layers=((2, 2, ffn),) * 2)
        made[label] = random_bundle(directory / label, config, seed)
    return made


@pytest.fixture(scope="session")
def posed_bundle(tmp_path_factory):
    """One that takes the end effector's pose beside the joints."""
    config = posed_config(layers=((2, 2, 32),) * 2)
    return random_bundle(tmp_path_factory.mktemp("bundles") / "posed", config)


def random_bundle(path, config, seed=0):
    tensors = quantization.stored(random_model(config, seed))
    tokenizer = word_tokenizer(WORDS + list(tasks.VOCABULARY))
    return write_bundle(path, config, tensors, tokenizer, provenance(None, path.name))


class Tester:
    """A node in the test's own process."""

    def __init__(self, namespace=""):
        self.context = rclpy.Context()
        rclpy.init(context=self.context, signal_handler_options=rclpy.SignalHandlerOptions.NO)
        self.node = rclpy.create_node("tester", context=self.context, namespace=namespace)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.clients = {}

    def close(self):
        self.executor.shutdown()
        self.node.destroy_node()
        self.context.try_shutdown()

    def spin(self, seconds):
        """Serve callbacks for so long."""
        self.until(lambda: False, seconds)

    def until(self, condition, timeout=DISCOVERY_TIME):
        """Serve callbacks until the condition holds; whether it came to hold in time."""
        end = time.monotonic() + timeout
        while not (held := condition()) and (left := end - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=min(left, 0.02))
        return held

    def collect(self, type_, topic, qos=10):
        """A list that fills with (time.monotonic(), message)."""
        messages = []
        self.node.create_subscription(
            type_, topic, lambda message: messages.append((time.monotonic(), message)), qos
        )
        return messages

    def publisher(self, type_, topic, qos=10):
        """A publisher that somebody listens to."""
        publisher = self.node.create_publisher(type_, topic, qos)
        assert self.until(lambda: publisher.get_subscription_count() > 0), f"nobody hears {topic}"
        return publisher

    def published(self, topic, publishers=1):
        """Wait until so many publish the topic, and give the endpoints time to match."""
        assert self.until(lambda: self.node.count_publishers(topic) >= publishers), topic
        self.spin(0.1)

    def call(self, type_, name, timeout=DISCOVERY_TIME, **fields):
        """The response of a service."""
        if name not in self.clients:
            client = self.clients[name] = self.node.create_client(type_, name)
            assert self.until(client.service_is_ready), f"there is no service {name}"
            # It may not know yet where to answer a client that has just appeared.
            self.spin(0.2)
        future = self.clients[name].call_async(type_.Request(**fields))
        assert self.until(future.done, timeout), f"{name} did not answer"
        return future.result()


@pytest.fixture
def ros(ros_environment):
    """A Tester."""
    with a_tester() as tester:
        yield tester


@contextlib.contextmanager
def a_tester(namespace=""):
    """A Tester whose relative names are in a namespace."""
    tester = Tester(namespace)
    try:
        yield tester
    finally:
        tester.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def shared_robot(start_shared, bundles):
    process = start_shared("policy_node", parameters(bundles), remappings={"__ns": "/shared"})
    with a_tester("shared") as ros:
        yield Robot(ros, process).ready()


@pytest.fixture
def robot(shared_robot, bundles):
    """The robot that the tests of this module share, in order and with 'original' active."""
    shared_robot.repair()
    assert shared_robot.ros.until(lambda: shared_robot.states[-1][1].state == "idle")
    for label in ("compressed", "original"):
        assert shared_robot.load(label).success
    shared_robot.commands.clear()
    return shared_robot


@pytest.fixture
def own_robot(start, bundles):
    """own_robot(parameters …) → Robot with a policy node of the test's own."""
    with a_tester(name := f"own{next(numbers)}") as ros:

        def make(**changes):
            process = start(
                "policy_node", parameters(bundles, **changes), remappings={"__ns": f"/{name}"}
            )
            return Robot(ros, process)

        yield make
