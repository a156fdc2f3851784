"""The real command, where it is about processes: streams, Ctrl-C, and being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RLRC = Path(sys.executable).parent / "rlrc"


@pytest.fixture
def start(tmp_path):
    """start(words…) → a process group of its own; output goes to the files `out` and `err`."""
    processes = []

    def run(*words):
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [RLRC, *words], stdout=out, stderr=err, env=environment, start_new_session=True
            )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def alive(session):
    """Processes of a session that are not waiting to be reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def episodes(log):
    return log.read_text().count("\n") - 1 if log.exists() else 0


def evaluation(policies, log, count):
    words = ["eval", "--policy", policies / "tabletop-original", "--env", "tabletop"]
    words += ["--episodes", str(count), "--seed", "40", "--json", "--device", "cpu"]
    return [*words, "--workers", "2", "--log", log]


def test_eval_prints_json_alone_interrupted_killed_and_resumed(start, policies, tmp_path):
    log = tmp_path / "log.jsonl"

    process = start(*evaluation(policies, log, 300))
    wait_until(lambda: episodes(log) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(20) == 130
    err = (tmp_path / "err").read_text()
    assert err.endswith("rlrc eval: interrupted\n") and "Traceback" not in err
    assert (tmp_path / "out").read_text() == ""

    before = episodes(log)
    process = start(*evaluation(policies, log, 300))
    wait_until(lambda: episodes(log) >= before + 2, process)
    process.kill()  # it alone: its workers have to notice
    process.wait()
    deadline = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(process.pid) == []

    header, *rest = log.read_text().splitlines(keepends=True)
    log.write_text("".join([json.dumps({**json.loads(header), "episodes": 3}) + "\n", *rest[:2]]))
    process = start(*evaluation(policies, log, 3))
    assert process.wait(60) == 0
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["episodes"] == 3 and 0 <= found["success_rate"] <= 1
    assert found["ci95"][0] <= found["success_rate"] <= found["ci95"][1]
    assert found["latency_ms"]["p99"] >= found["latency_ms"]["p50"] > 0
    assert "3/3" in err  # progress


def test_a_killed_worker_is_told_in_one_line(start, policies, tmp_path):
    log = tmp_path / "log.jsonl"
    process = start(*evaluation(policies, log, 300))
    wait_until(lambda: episodes(log) >= 2, process)
    parents = {pid: int(_stat(pid)[1]) for pid in alive(process.pid)}
    server = next(parent for parent in parents.values() if parents.get(parent) == process.pid)
    worker = next(pid for pid, parent in parents.items() if parent == server)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(60) == 2
    err = (tmp_path / "err").read_text()
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("rlrc eval: a worker process has ended; if memory")


def _stat(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
