import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlrc_ros.cli.demo import _claim
from rlrc_ros.errors import UserError
from rlrc_ros.trials.summary import summarise
from rlrc_ros.trials.table import text_table
from tests.trials.test_summary import ARMS, paired, policies

WIDTH = 100


def files(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def make(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")


def test_other_peoples_files_are_left_alone(tmp_path):
    make(tmp_path, "trial/thesis.tex", "notes.txt")
    before = files(tmp_path)
    with pytest.raises(UserError, match="holds other files; name a new or an empty directory"):
        _claim(tmp_path)
    assert files(tmp_path) == before


def test_an_empty_or_a_new_directory_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/below"):
        _claim(tmp_path / name)
        assert files(tmp_path / name) == [".rlrc-demo"]


def test_a_demo_that_was_stopped_keeps_its_stages_and_starts_the_trial_again(tmp_path):
    _claim(tmp_path)
    make(tmp_path, "compress/original/model.safetensors", "trial/episodes.jsonl")
    _claim(tmp_path)
    assert (tmp_path / "compress" / "original" / "model.safetensors").exists()
    assert not (tmp_path / "trial").exists()


def test_a_finished_demo_is_made_anew(tmp_path):
    _claim(tmp_path)
    make(tmp_path, "compress/summary.json", "trial/episodes.jsonl", "report.html", "my notes.txt")
    _claim(tmp_path)
    assert files(tmp_path) == [".rlrc-demo", "my notes.txt"]


@pytest.mark.parametrize("table", [(17, 1, 0, 2), (100, 20, 30, 50), (0, 0, 0, 1), (10, 0, 0, 0)])
def test_the_table_fits_a_terminal(table):
    summary = summarise(paired(*table), ARMS)
    text = text_table(summary, policies(), width=WIDTH)
    assert max(map(len, text.splitlines())) <= WIDTH
    # Nothing is lost: the same words as without a limit.
    assert sorted(text.split()) == sorted(text_table(summary, policies()).split())


def test_nodes_end_with_a_demo_that_was_killed(tmp_path):
    pytest.importorskip("rlrc.msg", reason="the ROS interfaces are not built")
    code = f"""
import time
from pathlib import Path
from rlrc_ros.bringup import NodeSpec
from rlrc_ros.trials.simulated import running_nodes
spec = NodeSpec("recorder_node", {{"output_dir": {str(tmp_path / "bags")!r}}})
with running_nodes([spec], Path({str(tmp_path / "logs")!r})):
    print("started", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as demo:
        assert demo.stdout.readline() == b"started\n"
        time.sleep(2)  # for the node to get beyond the start of Python
        children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()
        demo.kill()
    nodes = [Path(f"/proc/{child}/stat") for child in children]
    assert nodes
    deadline = time.monotonic() + 20
    while any(_runs(node) for node in nodes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(node) for node in nodes)


def _runs(stat):
    """Whether a process is there, and not only waiting to be reaped."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
