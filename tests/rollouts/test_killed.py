"""SIGKILL at any moment of a recording, of its end and of its repair."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.rollouts.repair import repair
from rlrc_ros.rollouts.verify import verify

ROOT = Path(__file__).parents[2]

# Records in children that kill themselves at the N-th line of rlrc_ros.rollouts that they run: at
# the N-th of all lines at first, which are counted in a child that lives.
KILLED_AT_LINES = """
    import os, signal, sys, threading
    from pathlib import Path
    from tests.rollouts.bags import record

    out, share, shares = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

    def run(directory, last):
        count = 0
        def trace(frame, event, argument):
            nonlocal count
            if "rollouts" not in frame.f_code.co_filename:
                return None
            count += event == "line"
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        threading.settrace(trace)
        sys.settrace(trace)
        record(directory, ["x"] * 3, instruction="wave")
        sys.settrace(None)
        return count

    total = run(out / "whole", -1)
    for last in range(1 + share, total, shares):
        child = os.fork()
        if not child:
            run(out / str(last), last)
            os._exit(0)
        os.waitpid(child, 0)
    print(total)
"""


def python(script, *words):
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, words)]


def test_at_whatever_line_a_recorder_dies_its_bag_can_be_opened(tmp_path):
    command = python(KILLED_AT_LINES, tmp_path, 3, 12)
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(done.stdout) > 300
    found = {"nothing": 0, "empty": 0, "repaired": 0, "whole": 0}
    for directory in tmp_path.iterdir():
        kind, bag = _opened(directory)
        found[kind] += 1
        assert kind in ("nothing", "empty") or bag.episode.instruction == "wave", directory
    assert found["repaired"] > 5 and found["whole"] > 0, found


def _opened(directory):
    """What a recorder left, after repair where it needs it."""
    left = list(directory.iterdir()) if directory.exists() else []
    if not left:
        return "nothing", None
    (bag,) = left
    kind = "whole"
    if bag.name == "e1.partial":
        try:
            kind, bag = "repaired", Path(repair(bag).uri)
        except UserError as error:
            assert "nothing was recorded" in str(error), error
            return "empty", None
    report = verify(bag)
    assert report.ok, (directory, report.problems)
    assert kind == "repaired" or report.messages == 3
    return kind, report


def test_no_more_than_a_second_is_lost(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        from tests.rollouts.test_recording import begin, string
        recording, channel = begin(Path(sys.argv[1]))
        while True:
            now = time.time_ns()
            recording.write(channel, now, now, string("x" * 20_000))
            print(now, flush=True)
            time.sleep(0.002)
    """
    for number, life in enumerate((0.3, 0.8, 1.3)):
        out = tmp_path / str(number)
        with subprocess.Popen(python(script, out), cwd=ROOT, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(life)
            process.send_signal(signal.SIGKILL)
            sent = [int(line) for line in process.stdout if line.endswith(b"\n")]
        bag = Path(repair(out / "e1.partial").uri)
        assert verify(bag).ok
        read = [stamp for *_, stamp in read_messages(bag)]
        assert read == sorted(read)
        last = read[-1] if read else sent[0]
        assert sent[-1] - last < 1e9, f"{(sent[-1] - last) * 1e-9} s lost"


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_repair_that_is_killed_can_be_made_again(tmp_path, moment):
    """At each rename: after copying, between setting the original aside and naming the new one."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from tests.rollouts.bags import record
        from rlrc_ros.rollouts.repair import repair
        partial = record(Path(sys.argv[1]), ["one", "two"]).rename(Path(sys.argv[1]) / "e1.partial")
        (partial / "metadata.yaml").unlink()
        moment, renamed = int(sys.argv[2]), Path.rename
        def rename(path, target):
            global moment
            moment -= 1
            if not moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return renamed(path, target)
        Path.rename = rename
        repair(partial)
    """
    status = subprocess.run(python(script, tmp_path, moment), cwd=ROOT).returncode
    assert status == (-signal.SIGKILL if moment < 3 else 0)
    if moment < 3:
        repaired = repair(tmp_path / "e1.partial")
        assert (repaired.uri, repaired.messages) == (str(tmp_path / "e1"), 2)
    assert verify(tmp_path / "e1").ok
    assert [m.data for _, m, _ in read_messages(tmp_path / "e1")] == ["one", "two"]
    assert not list(tmp_path.glob("*.repairing")) and (tmp_path / "e1.damaged").is_dir()
    assert json.loads((tmp_path / "e1" / "episode.json").read_text())["episode_id"] == "e1"
