"""Rollouts as a LeRobotDataset v3 (https://huggingface.co/docs/lerobot/lerobot-dataset-v3).

Frames are PNGs inside the Parquet files (feature type `image`), so that nothing is lost and no
video decoder is needed; numbers are float32. lerobot itself is not: it does not install beside this
project's PyTorch, and its format is Parquet and JSON. The layout and the metadata are those that
lerobot 0.4 writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.rollouts.alignment import Contract, Step
from rlrc_ros.rollouts.export import Rollout

CODEBASE_VERSION = "v3.0"
CHUNK_FILES = 1000
FILE_BYTES = 100_000_000
"""Of one data file, about; lerobot's own default."""
_PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
ACTION_NAMES = ("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "gripper")
"""m and rad (rotation vector) per control step, gripper 0 closed to 1 open."""
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_COUNTERS = ("frame_index", "episode_index", "index", "task_index")


class Frame(NamedTuple):
    """A control step as a row holds it."""

    images: dict[str, bytes]
    """PNG files by camera."""
    shapes: dict[str, tuple[int, ...]]
    histograms: dict[str, NDArray[np.int64]]
    """(3, 256) by camera: how many pixels have a value, by channel."""
    state: NDArray[np.float32] | None
    action: NDArray[np.float32]


def encode(step: Step) -> Frame:
    """Images to PNGs; they stay what the camera sent."""
    observation = step.observation
    pngs, shapes, histograms = {}, {}, {}
    for name, image in observation.images.items():
        bgr = np.ascontiguousarray(image[..., ::-1])
        pngs[name] = cv2.imencode(".png", bgr)[1].tobytes()
        shapes[name] = image.shape
        counts = [np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)]
        histograms[name] = np.stack(counts).astype(np.int64)
    values = observation.proprioception
    state = None if values is None else values.astype(np.float32)
    return Frame(pngs, shapes, histograms, state, step.action.astype(np.float32))


@dataclass
class LeRobotWriter:
    """Writes a data set, an episode at a time.

    Args:
        directory: where; it is there and empty.
        contract: of the observations.

    Raises:
        UserError: the control rate is no whole number, which lerobot wants.
    """

    directory: Path
    contract: Contract
    _features: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    _tasks: dict[str, int] = field(init=False, default_factory=dict)
    _episodes: list[dict[str, Any]] = field(init=False, default_factory=list)
    _values: dict[str, list[NDArray[Any]]] = field(init=False, default_factory=dict)
    _frames: int = field(init=False, default=0)
    _writer: pq.ParquetWriter | None = field(init=False, default=None)
    _file: int = field(init=False, default=-1)
    _bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        rate = self.contract.config.control_rate
        if rate != round(rate):
            raise UserError(f"lerobot takes whole frames per second, and the policy acts {rate:g}")

    def write(self, rollouts: Iterable[Rollout[Frame]]) -> None:
        """Write all episodes, and then what describes them."""
        for rollout in rollouts:
            self._write_episode(rollout)
        if self._writer is not None:
            self._writer.close()
        if self._episodes:
            self._write_metadata()

    def _write_episode(self, rollout: Rollout[Frame]) -> None:
        frames = rollout.steps
        features = self._features_of(frames)
        self._features = self._features or features
        if features != self._features:
            name = next(key for key, value in features.items() if value != self._features[key])
            raise UserError(
                f"{rollout.facts['episode_id']}: {name} has shape {features[name]['shape']}, and "
                f"{self._features[name]['shape']} in the episodes before: export them apart"
            )
        number, count = len(self._episodes), len(frames)
        task = self._tasks.setdefault(rollout.instruction, len(self._tasks))
        values = _values(frames, number, task, self._frames, self.contract.config.control_rate)
        images = {
            f"observation.images.{camera.name}": [frame.images[camera.name] for frame in frames]
            for camera in self.contract.config.cameras
        }
        self._open_file(sum(len(png) for pngs in images.values() for png in pngs))
        assert self._writer is not None
        self._writer.write_table(_table(self._schema(), images, values))
        statistics = _statistics(frames, values)
        flat = {
            f"stats/{key}/{name}": value
            for key, stats in statistics.items()
            for name, value in stats.items()
        }
        place = {"data/chunk_index": self._file // CHUNK_FILES}
        place["data/file_index"] = self._file % CHUNK_FILES
        self._episodes.append(
            {
                "episode_index": number,
                "tasks": [rollout.instruction],
                "length": count,
                **place,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + count,
                **{name: rollout.facts[name] for name in ("episode_id", "outcome", "policy_label")},
                **flat,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        for key, array in values.items():
            self._values.setdefault(key, []).append(array)
        for camera, histogram in _histograms(frames).items():
            self._values.setdefault(f"observation.images.{camera}", []).append(histogram)
        self._frames += count

    def _features_of(self, frames: list[Frame]) -> dict[str, dict[str, Any]]:
        config = self.contract.config
        features: dict[str, dict[str, Any]] = {}
        for camera in config.cameras:
            shapes = {frame.shapes[camera.name] for frame in frames}
            if len(shapes) > 1:
                raise UserError(f"camera '{camera.name}' changed its size: {sorted(shapes)}")
            names = ["height", "width", "channels"]
            shape = list(shapes.pop())
            features[f"observation.images.{camera.name}"] = _feature("image", shape, names)
        if (contract := config.proprioception) is not None:
            names = contract.names
            features["observation.state"] = _feature("float32", [len(names)], names)
        features["action"] = _feature("float32", [len(ACTION_NAMES)], list(ACTION_NAMES))
        features["timestamp"] = _feature("float32", [1], None)
        return features | {name: _feature("int64", [1], None) for name in _COUNTERS}

    def _schema(self) -> pa.Schema:
        kinds = {"float32": pa.float32(), "int64": pa.int64()}
        columns = []
        for name, feature in self._features.items():
            if feature["dtype"] == "image":
                kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            elif feature["shape"] == [1]:
                kind = kinds[feature["dtype"]]
            else:
                kind = pa.list_(kinds[feature["dtype"]], feature["shape"][0])
            columns.append((name, kind))
        return pa.schema(columns)

    def _open_file(self, size: int) -> None:
        """A new data file where the one before would become too large."""
        if self._writer is not None and self._bytes + size <= FILE_BYTES:
            self._bytes += size
            return
        if self._writer is not None:
            self._writer.close()
        self._file, self._bytes = self._file + 1, size
        name = _PATH.format(
            chunk_index=self._file // CHUNK_FILES, file_index=self._file % CHUNK_FILES
        )
        path = self.directory / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(path, self._schema(), compression="snappy")

    def _write_metadata(self) -> None:
        meta = self.directory / "meta"
        path = meta / "episodes" / _PATH.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), path)
        pq.write_table(_tasks_table(self._tasks), meta / "tasks.parquet")
        statistics = {}
        for key, arrays in self._values.items():
            if key.startswith("observation.images."):
                statistics[key] = _image_statistics(np.sum(arrays, 0), self._frames)
            else:
                statistics[key] = _number_statistics(np.concatenate(arrays))
        write_atomically(meta / "stats.json", json.dumps(statistics, indent=4))
        info = {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.contract.profile.name,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": FILE_BYTES // 1_000_000,
            "video_files_size_in_mb": 200,
            "fps": round(self.contract.config.control_rate),
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": f"data/{_PATH}",
            "video_path": None,
            "features": self._features,
        }
        write_atomically(meta / "info.json", json.dumps(info, indent=4, ensure_ascii=False))


def _feature(dtype: str, shape: list[int], names: list[str] | None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "names": names}


def _values(
    frames: list[Frame], number: int, task: int, first: int, rate: float
) -> dict[str, NDArray[Any]]:
    """The columns of numbers of an episode, (T, …) each."""
    steps = np.arange(len(frames))
    columns: dict[str, NDArray[Any]] = {}
    states = [frame.state for frame in frames if frame.state is not None]
    if states:
        columns["observation.state"] = np.stack(states)
    columns["action"] = np.stack([frame.action for frame in frames])
    columns["timestamp"] = (steps / rate).astype(np.float32)
    columns["frame_index"] = steps
    columns["episode_index"] = np.full(len(frames), number)
    columns["index"] = first + steps
    columns["task_index"] = np.full(len(frames), task)
    return columns


def _table(
    schema: pa.Schema, images: Mapping[str, list[bytes]], values: Mapping[str, NDArray[Any]]
) -> pa.Table:
    arrays = []
    for column in schema:
        if column.name in images:
            rows = [{"bytes": png, "path": None} for png in images[column.name]]
            arrays.append(pa.array(rows, column.type))
        elif values[column.name].ndim == 2:
            flat = pa.array(values[column.name].ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=column.type))
        else:
            arrays.append(pa.array(values[column.name], column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """Indexed by the instruction, as lerobot reads it with pandas."""
    index = "__index_level_0__"
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), index: list(tasks)})
    kinds = {"task_index": ("int64", "int64"), index: ("unicode", "object")}
    columns = [
        {
            "name": None if column == index else column,
            "field_name": column,
            "pandas_type": kind,
            "numpy_type": numpy_type,
            "metadata": None,
        }
        for column, (kind, numpy_type) in kinds.items()
    ]
    pandas = {"index_columns": [index], "column_indexes": [], "columns": columns}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _histograms(frames: list[Frame]) -> dict[str, NDArray[np.int64]]:
    """(3, 256) by camera, over all frames."""
    cameras = frames[0].histograms
    return {name: np.sum([frame.histograms[name] for frame in frames], 0) for name in cameras}


def _statistics(
    frames: list[Frame], values: Mapping[str, NDArray[Any]]
) -> dict[str, dict[str, Any]]:
    statistics = {
        f"observation.images.{camera}": _image_statistics(histogram, len(frames))
        for camera, histogram in _histograms(frames).items()
    }
    return statistics | {key: _number_statistics(array) for key, array in values.items()}


def _number_statistics(array: NDArray[Any]) -> dict[str, list[float]]:
    """By dimension over the rows of (N, D) or (N,)."""
    rows = array.reshape(len(array), -1).astype(np.float64)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    found |= {name: np.quantile(rows, q, axis=0) for name, q in _QUANTILES.items()}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(rows)]}


def _image_statistics(histogram: NDArray[np.int64], frames: int) -> dict[str, list[Any]]:
    """By channel over every pixel, scaled to [0, 1] and shaped (3, 1, 1) as lerobot has it."""
    levels = np.arange(256) / 255
    shares = histogram / histogram.sum(1, keepdims=True)
    mean = shares @ levels
    found = {
        "min": levels[(histogram > 0).argmax(1)],
        "max": levels[255 - (histogram[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1)),
    }
    cumulative = shares.cumsum(1)
    found |= {name: levels[(cumulative >= q - 1e-12).argmax(1)] for name, q in _QUANTILES.items()}
    shaped = {name: value.reshape(3, 1, 1).tolist() for name, value in found.items()}
    return shaped | {"count": [frames]}
