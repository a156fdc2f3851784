"""`rlrc bench --ros`, as short as can be: that every row is measured, not what it says."""

import json
import subprocess
import sys

from tests.ros.conftest import BIN


def test_every_row_is_measured(bundles, tmp_path):
    out = tmp_path / "out.json"
    words = ["--ros", "--policy", bundles["original"].path, "--out", out, "--json"]
    words += ["--policy", bundles["compressed"].path]
    words += ["--duration", "2", "--kills", "1", "--soak", "2"]
    command = [sys.executable, BIN / "rlrc", "bench", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert set(rows) == {"latency", "images", "guard", "stop", "swap", "recorder", "soak"}
    assert all(row["bar"] and isinstance(row["met"], bool) for row in rows.values())
    assert rows["latency"]["policy_ms"]["median"] > 0
    assert rows["latency"]["against_relay_on_arrival"]["median"] > 1
    assert rows["images"]["sent"] > 100 and rows["guard"]["intervals"] > 100
    assert rows["stop"]["kills"] + rows["stop"]["inconclusive"] == 1
    assert rows["swap"]["swaps"] == 8 and rows["swap"]["inside_ms"]["max"] > 0
    assert rows["swap"]["inside_ms"]["max"] < rows["swap"]["call_ms"]["max"]
    assert rows["recorder"]["sent"] > 300 and 0 < rows["recorder"]["share_of_one_core"] < 2
    assert set(rows["soak"]["processes"]) == {"policy", "guard", "recorder"}
    assert len(json.loads(out.read_text())["raw"]["usages"]["guard"]) >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "bags and logs are gone"


def test_a_policy_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, BIN / "rlrc", "bench", "--ros", "--policy", "absent"]
    command += ["--out", tmp_path / "out.json"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
