import contextlib
import mmap
import re
import signal
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def ports(process, domain):
    """The shared memory of its domain that a process hears by: it holds their locks."""
    first, found = 7400 + 250 * domain, set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held = re.search(r"fast\w+_port(\d+)_el$", str(descriptor.readlink()))
            if held and first <= int(held[1]) < first + 250:
                found.add(held[0].removesuffix("_el"))
    return found


def test_ports_of_the_dead_that_are_still_written_to_are_left_alone(
    ros_environment, start, tmp_path
):
    domain = int(ros_environment["ROS_DOMAIN_ID"])

    def start_one():
        process = start("recorder_node", {"output_dir": tmp_path / "bags"})
        deadline = time.monotonic() + 30.0
        while "bags go to" not in process.output and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # it lets go of the locks that it holds while it starts
        return process, ports(process, domain)

    def kill(process):
        process.send(signal.SIGKILL)
        process.wait()

    process, first = start_one()
    assert first, "it hears by no shared memory"
    files = [(SHARED_MEMORY / port).open("rb") for port in first]
    # As a writer does that takes the dead one for alive.
    open_ports = [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for file in files]
    kill(process)
    process, second = start_one()
    assert second and not first & second
    for opened in (*open_ports, *files):
        opened.close()
    kill(process)
    assert start_one()[1] == first, "nobody writes to it any more, and it is left alone"
