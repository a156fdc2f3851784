"""Others' demonstrations as shards, from small files in the others' formats."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts import lerobot
from rlrc_ros.rollouts.alignment import AlignedEpisode
from rlrc_ros.rollouts.export import ExportReport, Filters, rollouts
from tests.rollouts.episodes import INSTRUCTION, contract, record_episode
from training.data.convert import convert, libero_actions, read_lerobot
from training.data.demonstrations import read

STEPS = 5


@pytest.fixture
def demo(tmp_path):
    """demo(**instead) → a file as LIBERO publishes them, with two demonstrations."""
    h5py = pytest.importorskip("h5py")

    def make(name="pick_up_the_milk_and_place_it_in_the_basket_demo.hdf5", **instead):
        rng = np.random.default_rng(0)
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            for number in (10, 2):
                actions = rng.uniform(-1, 1, (STEPS, 7))
                actions[:, 6] = [-1, -1, 1, 1, 1]
                actions[1, :6] = 0  # nothing commanded
                actions[2, :6] = 0  # the gripper closes
                columns = {
                    "actions": actions,
                    "obs/agentview_rgb": rng.integers(0, 256, (STEPS, 32, 32, 3), dtype=np.uint8),
                    "obs/joint_states": rng.normal(size=(STEPS, 7)),
                    "obs/gripper_states": np.tile([0.02, -0.02], (STEPS, 1)),
                }
                for key, value in (columns | instead).items():
                    if value is not None:
                        file[f"data/demo_{number}/{key}"] = value
        return path

    return make


def test_liberos_own_files(tmp_path, demo):
    path = demo()
    import h5py

    assert convert([path], tmp_path / "out", 32) == 2
    data = read(tmp_path / "out")
    assert [facts["source"].rpartition(":")[2] for facts in data.episodes] == ["demo_2", "demo_10"]
    assert data.instructions == ["pick up the milk and place it in the basket"]
    kept = [0, 2, 3, 4]
    with h5py.File(path) as file:
        first = file["data/demo_2"]
        image = first["obs/agentview_rgb"][0]
        np.testing.assert_array_equal(data.images[0], image[::-1, ::-1])
        np.testing.assert_allclose(
            data.proprioception[:4, :7], first["obs/joint_states"][:][kept], atol=1e-6
        )
        actions = first["actions"][:][kept]
    np.testing.assert_allclose(data.proprioception[:, 7], 0.5)
    np.testing.assert_allclose(data.actions[:4, :3], 0.05 * actions[:, :3], atol=1e-6)
    np.testing.assert_allclose(data.actions[:4, 3:6], 0.5 * actions[:, 3:6], atol=1e-6)
    assert data.actions[:4, 6].tolist() == [1, 0, 0, 0]
    assert np.isnan(data.grounding).all()


def test_liberos_long_names_lose_their_scene(tmp_path, demo):
    path = demo("KITCHEN_SCENE10_turn_on_the_stove_demo.hdf5")
    convert([path], tmp_path / "out", 16)
    data = read(tmp_path / "out")
    assert data.instructions == ["turn on the stove"]
    assert data.images.shape[1:] == (16, 16, 3)


@pytest.mark.parametrize(
    "instead, told",
    [
        ({"obs/joint_states": None}, "not a file of LIBERO's demonstrations"),
        ({"obs/joint_states": np.full((STEPS, 7), np.nan)}, "not finite"),
    ],
)
def test_a_damaged_file_leaves_nothing_behind(tmp_path, demo, instead, told):
    path = demo(**instead)
    with pytest.raises(UserError, match=told):
        convert([path], tmp_path / "out", 32)
    assert list(tmp_path.iterdir()) == [path]


def test_no_hdf5_at_all_is_one_line(tmp_path, demo):
    file = tmp_path / "x_demo.hdf5"
    file.write_text("notes")
    config = "config/training/tiny.yaml"
    words = ["-m", "training.data.convert", file, "--out", tmp_path / "out", "--config", config]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, timeout=120)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert f"{file}: not a file of LIBERO's".encode() in done.stderr
    assert not (tmp_path / "out").exists()


def test_controller_units_become_metres_radians_and_opening():
    given = np.array([[1, -1, 0.5, 2, 0, -0.5, 1], [0, 0, 0, 0, 0, 0, -1]])
    expected = [[0.05, -0.05, 0.025, 0.5, 0, -0.25, 0], [0, 0, 0, 0, 0, 0, 1]]
    np.testing.assert_allclose(libero_actions(given), expected, atol=1e-7)


def test_what_this_project_exported_comes_back(tmp_path):
    bags = [record_episode(tmp_path, "e1", steps=4)[0]]
    bags.append(record_episode(tmp_path, "e2", steps=3, instruction="push the green cube")[0])
    (tmp_path / "set").mkdir()
    found = rollouts(bags, contract(), Filters(), lerobot.encode, ExportReport())
    lerobot.LeRobotWriter(tmp_path / "set", contract()).write(found)
    steps = [step for bag in bags for step in AlignedEpisode(bag, contract()).steps()]
    size = steps[0].observation.images["front"].shape[0]

    assert convert([tmp_path / "set"], tmp_path / "out", size) == 2
    data = read(tmp_path / "out")
    assert [facts["steps"] for facts in data.episodes] == [4, 3]
    assert [facts["instruction"] for facts in data.episodes] == [INSTRUCTION, "push the green cube"]
    for i, step in enumerate(steps):
        np.testing.assert_array_equal(data.images[i], step.observation.images["front"])
        np.testing.assert_allclose(data.proprioception[i], step.observation.proprioception, 1e-6)
        np.testing.assert_allclose(data.actions[i], step.action, atol=1e-6)


def video_set(directory, **features):
    """Two episodes of 3 and 2 frames in one video, the second's frames brighter."""
    key = "observation.images.image"
    told = {"dtype": "float32", "shape": [8], "names": None}
    kinds = {key: {"dtype": "video", "shape": [32, 32, 3]}, "observation.state": told}
    info = {"codebase_version": "v3.0", "fps": 10, "features": kinds | features}
    for place in ("meta/episodes/chunk-000", "data/chunk-000", f"videos/{key}/chunk-000"):
        (directory / place).mkdir(parents=True)
    (directory / "meta" / "info.json").write_text(json.dumps(info))
    episodes, rows, start = [], [], 0
    for number, length in enumerate((3, 2)):
        place = {"data/chunk_index": 0, "data/file_index": 0}
        place |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
        place[f"videos/{key}/from_timestamp"] = start / 10
        span = {"dataset_from_index": start, "dataset_to_index": start + length}
        facts = {"episode_index": number, "tasks": [f"task {number}"], "length": length}
        episodes.append(facts | place | span)
        for i in range(start, start + length):
            rows.append({"index": i, "observation.state": [0.1 * i] * 8, "action": [1.0] * 7})
        start += length
    file = "chunk-000/file-000"
    pq.write_table(pa.Table.from_pylist(episodes), directory / f"meta/episodes/{file}.parquet")
    pq.write_table(pa.Table.from_pylist(rows), directory / f"data/{file}.parquet")
    codec = cv2.VideoWriter.fourcc(*"mp4v")
    path = directory / f"videos/{key}/{file}.mp4"
    video = cv2.VideoWriter(str(path), codec, 10, (32, 32))
    for i in range(start):
        video.write(np.full((32, 32, 3), 40 * i, np.uint8))
    video.release()
    return directory


def test_videos_are_cut_into_their_episodes(tmp_path):
    convert([video_set(tmp_path / "set")], tmp_path / "out", 32, controller_units=True)
    data = read(tmp_path / "out")
    assert [facts["steps"] for facts in data.episodes] == [3, 2]
    np.testing.assert_allclose(data.images.mean((1, 2, 3)), [0, 40, 80, 120, 160], atol=4)
    np.testing.assert_allclose(data.actions[0], [0.05] * 3 + [0.5] * 3 + [0], atol=1e-6)


@pytest.mark.parametrize(
    "features, told",
    [
        (
            {"observation.state": {"dtype": "float32", "names": {"motors": ["x", "y", "roll"]}}},
            r"end effector's pose \(roll, x, y\)",
        ),
        ({"observation.images.wrist": {"dtype": "image"}}, "several cameras; name one"),
    ],
)
def test_what_policies_do_not_look_at_is_refused(tmp_path, features, told):
    with pytest.raises(UserError, match=told):
        list(read_lerobot(video_set(tmp_path / "set", **features), 32))


def test_an_older_version_is_refused(tmp_path):
    video_set(tmp_path / "set")
    info = tmp_path / "set" / "meta" / "info.json"
    info.write_text(info.read_text().replace("v3.0", "v2.1"))
    with pytest.raises(UserError, match=r"LeRobotDataset v2\.1"):
        convert([tmp_path / "set"], tmp_path / "out", 32)
