import json
import os
import subprocess

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts import lerobot
from rlrc_ros.rollouts.alignment import AlignedEpisode
from rlrc_ros.rollouts.export import ExportReport, Filters, rollouts
from tests.rollouts.episodes import INSTRUCTION, contract, record_episode

# Prints what the real lerobot reads of a data set, by way of its own loader and a DataLoader.
READ = """
import sys, torch, numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
data = LeRobotDataset("local/rollouts", root=sys.argv[1], delta_timestamps={"action": [0.0, 0.1]})
loader = torch.utils.data.DataLoader(data, batch_size=4)
for batch in loader: assert batch["action"].shape[1:] == (2, 7), batch["action"].shape
rows = [data[i] for i in range(len(data))]
np.savez(sys.argv[2], frames=len(data), episodes=data.num_episodes, fps=data.fps,
    images=np.stack([row["observation.images.front"].numpy() for row in rows]),
    states=np.stack([row["observation.state"].numpy() for row in rows]),
    actions=np.stack([row["action"][0].numpy() for row in rows]),
    times=np.array([float(row["timestamp"]) for row in rows]),
    tasks=np.array([row["task"] for row in rows]),
    mean=np.array(data.meta.stats["observation.images.front"]["mean"]),
    q99=np.array(data.meta.stats["action"]["q99"]))
"""


@pytest.fixture
def bags(tmp_path):
    return [
        record_episode(tmp_path, "e1", steps=4)[0],
        record_episode(tmp_path, "e2", steps=3, instruction="push the green cube")[0],
        record_episode(tmp_path, "e3", steps=2)[0],
    ]


def written(directory, bags, the_contract):
    directory.mkdir()
    report = ExportReport()
    episodes = rollouts(bags, the_contract, Filters(), lerobot.encode, report)
    lerobot.LeRobotWriter(directory, the_contract).write(episodes)
    assert not report.unusable
    return directory


def steps_of(bags):
    return [step for bag in bags for step in AlignedEpisode(bag, contract()).steps()]


def test_rows_are_the_steps(tmp_path, bags):
    out = written(tmp_path / "set", bags, contract())
    rows = pq.read_table(out / "data" / "chunk-000" / "file-000.parquet").to_pylist()
    steps = steps_of(bags)
    assert [row["episode_index"] for row in rows] == [0] * 4 + [1] * 3 + [2] * 2
    assert [row["task_index"] for row in rows] == [0] * 4 + [1] * 3 + [0] * 2
    assert [row["index"] for row in rows] == list(range(9))
    for row, step in zip(rows, steps, strict=True):
        png = np.frombuffer(row["observation.images.front"]["bytes"], np.uint8)
        image = cv2.imdecode(png, cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(image, step.observation.images["front"])
        state = step.observation.proprioception.astype(np.float32)
        np.testing.assert_array_equal(np.float32(row["observation.state"]), state)
        np.testing.assert_array_equal(np.float32(row["action"]), np.float32(step.action))


def test_statistics_are_those_of_the_data(tmp_path, bags):
    out = written(tmp_path / "set", bags, contract())
    statistics = json.loads((out / "meta" / "stats.json").read_text())
    steps = steps_of(bags)
    pixels = np.stack([step.observation.images["front"] for step in steps]) / 255
    image = statistics["observation.images.front"]
    for name, of in {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}.items():
        np.testing.assert_allclose(
            np.ravel(image[name]), of(pixels, axis=(0, 1, 2)), rtol=1e-9, err_msg=name
        )
    np.testing.assert_allclose(
        np.ravel(image["q10"]), np.quantile(pixels, 0.1, axis=(0, 1, 2)), atol=1 / 255
    )
    actions = np.stack([np.float32(step.action) for step in steps]).astype(np.float64)
    np.testing.assert_allclose(statistics["action"]["std"], actions.std(0), rtol=1e-9, atol=1e-12)


def test_files_stay_small(tmp_path, bags, monkeypatch):
    monkeypatch.setattr(lerobot, "FILE_BYTES", 1)
    monkeypatch.setattr(lerobot, "CHUNK_FILES", 2)
    out = written(tmp_path / "set", bags, contract())
    files = sorted(str(p.relative_to(out / "data")) for p in out.glob("data/*/*"))
    assert files == [
        "chunk-000/file-000.parquet", "chunk-000/file-001.parquet", "chunk-001/file-000.parquet",
    ]  # fmt: skip
    episodes = pq.read_table(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    places = zip(
        episodes["data/chunk_index"].to_pylist(), episodes["data/file_index"].to_pylist(),
        strict=True,
    )  # fmt: skip
    assert list(places) == [(0, 0), (0, 1), (1, 0)]


def test_a_rate_that_lerobot_cannot_have(tmp_path):
    with pytest.raises(UserError, match=r"whole frames per second, and the policy acts 7\.5"):
        lerobot.LeRobotWriter(tmp_path, contract(control_rate=7.5))


def test_a_camera_of_another_size_is_refused(tmp_path, bags):
    other, _ = record_episode(tmp_path, "e4", steps=2, size=32)
    with pytest.raises(UserError, match=r"e4: observation\.images\.front has shape"):
        written(tmp_path / "set", [*bags, other], contract())


def test_the_real_lerobot_reads_the_same(tmp_path, bags):
    python = os.environ.get("LEROBOT_PYTHON")
    if not python:
        pytest.skip("LEROBOT_PYTHON names no Python that has lerobot (0.4 on 3.11, torch < 2.11)")
    out = written(tmp_path / "set", bags, contract())
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [python, "-c", READ, out, tmp_path / "read.npz"], check=True, env=os.environ | offline
    )
    read, steps = np.load(tmp_path / "read.npz"), steps_of(bags)
    assert (read["frames"], read["episodes"], read["fps"]) == (9, 3, 10)
    seen = np.stack([step.observation.images["front"] for step in steps])
    np.testing.assert_array_equal(
        np.round(read["images"] * 255).astype(np.uint8), seen.transpose(0, 3, 1, 2)
    )
    states = np.stack([step.observation.proprioception for step in steps])
    np.testing.assert_array_equal(read["states"], states.astype(np.float32))
    np.testing.assert_array_equal(read["actions"], np.float32([step.action for step in steps]))
    np.testing.assert_allclose(read["times"], np.float32([0, 1, 2, 3, 0, 1, 2, 0, 1]) / 10)
    tasks = [INSTRUCTION] * 4 + ["push the green cube"] * 3 + [INSTRUCTION] * 2
    assert read["tasks"].tolist() == tasks
    assert read["mean"].shape == (3, 1, 1) and read["q99"].shape == (7,)
