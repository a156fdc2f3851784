"""Demonstrations of others as shards: LIBERO's own HDF5 files, and LeRobotDatasets v3.

    python -m training.data.convert --config config/training/libero.yaml --out DIR *.hdf5
    python -m training.data.convert --config config/training/tabletop.yaml --out DIR DATASET

The configuration says how large the policy's images are. Nothing of RLDS or TensorFlow is needed.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.schema import read_json
from training.config import load_config
from training.data.demonstrations import Episode, encode_png, write_shards
from training.envs.libero import FINGER_STROKE, ROTATION, TRANSLATION

STILL = 1e-4
"""An action below that in every dimension, with the gripper as before, is none (OpenVLA's rule)."""
_FILE = "chunk-{:03d}/file-{:03d}"
_POSE = {"x", "y", "z", "roll", "pitch", "yaw", "ee_x", "eef_x", "axis_angle1"}


def libero_actions(actions: NDArray[np.floating]) -> NDArray[np.float32]:
    """(T, 7) of LIBERO's controller to metres, radians and the gripper's opening from 0 to 1."""
    scale = [TRANSLATION] * 3 + [ROTATION] * 3
    moved = np.clip(actions[:, :6], -1, 1) * scale
    return np.column_stack([moved, (1 - np.sign(actions[:, 6])) / 2]).astype(np.float32)


def read_libero(path: Path, image_size: int) -> Iterator[Episode]:
    """Episodes of one of LIBERO's `TASK_demo.hdf5`.

    Images are turned by half a turn, as the published evaluation shows them; steps in which nothing
    is commanded are left out. The instruction is the one in the file's name, as in evaluation.

    Raises:
        UserError: the file is none of LIBERO's.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading it needs h5py; pip install -e '.[libero]'") from None
    words = path.stem.removesuffix("_demo").split("_SCENE")[-1]
    instruction = re.sub(r"^\d+_", "", words).replace("_", " ")
    try:
        with h5py.File(path, "r") as file:
            names = sorted(file["data"], key=lambda name: int(name.rpartition("_")[2]))
            for name in names:
                demo = file["data"][name]
                yield _libero_episode(demo, path, name, instruction, image_size)
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a file of LIBERO's demonstrations ({error})") from None


def _libero_episode(demo: Any, path: Path, name: str, instruction: str, size: int) -> Episode:
    actions = demo["actions"][:]
    commanded = np.abs(actions[:, :6]).max(1) >= STILL
    commanded |= np.diff(actions[:, 6], prepend=actions[0, 6] + 1) != 0
    images, seen = demo["obs/agentview_rgb"], demo["obs"]
    pngs = [encode_png(_resized(images[t][::-1, ::-1], size)) for t in np.flatnonzero(commanded)]
    fingers = seen["gripper_states"][:][commanded]
    opening = np.clip((fingers[:, 0] - fingers[:, 1]) / (2 * FINGER_STROKE), 0, 1)
    joints = seen["joint_states"][:][commanded]
    return _episode(
        pngs,
        np.column_stack([joints, opening]),
        libero_actions(actions[commanded]),
        {"instruction": instruction, "success": True, "source": f"{path.name}:{name}"},
    )


def read_lerobot(
    directory: Path, image_size: int, camera: str | None = None, controller_units: bool = False
) -> Iterator[Episode]:
    """Episodes of a LeRobotDataset v3, images or videos.

    Args:
        directory: has `meta/info.json`.
        image_size: pixels, height and width.
        camera: which, where there are several; `observation.images.` may be left out.
        controller_units: actions are LIBERO's controller's, not metres, radians and opening.

    Raises:
        UserError: it is another version, is damaged, or holds something else than this project's
            policies observe: joint positions and the gripper's opening.
    """
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(
            f"{directory}: reading it needs pyarrow; pip install -e '.[lerobot]'"
        ) from None
    info = read_json(directory / "meta" / "info.json")
    key, is_video = _check_features(directory, info, camera)
    files = sorted((directory / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(f"{directory}: no meta/episodes there; the data set is not whole")
    columns = ["observation.state", "action", "index", *([] if is_video else [key])]
    place, rows = None, {}
    for entry in (row for file in files for row in pq.read_table(file).to_pylist()):
        if place != (wanted := _FILE.format(entry["data/chunk_index"], entry["data/file_index"])):
            place = wanted
            table = pq.read_table(directory / "data" / f"{place}.parquet", columns=columns)
            rows = {row["index"]: row for row in table.to_pylist()}
        try:
            span = range(entry["dataset_from_index"], entry["dataset_to_index"])
            steps = [rows[i] for i in span]
        except KeyError as error:
            number = entry["episode_index"]
            raise UserError(f"{directory}: episode {number} is not whole ({error})") from None
        if is_video:
            images = _video_frames(directory, key, entry, info["fps"])
        else:
            images = (_decoded(row[key]["bytes"], directory) for row in steps)
        actions = np.array([row["action"] for row in steps], np.float32)
        yield _episode(
            [encode_png(_resized(image, image_size)) for image in images],
            np.array([row["observation.state"] for row in steps]),
            libero_actions(actions) if controller_units else actions,
            {
                "instruction": entry["tasks"][0],
                "success": entry.get("outcome", "success") == "success",
                "source": f"{directory.name}:{entry['episode_index']}",
            },
        )


def _check_features(directory: Path, info: Any, camera: str | None) -> tuple[str, bool]:
    """The camera's feature, and whether it is a video."""
    version = info.get("codebase_version")
    if version != "v3.0":
        raise UserError(f"{directory}: is a LeRobotDataset {version}; convert it to v3.0 first")
    features = info["features"]
    cameras = [name for name, told in features.items() if told["dtype"] in ("image", "video")]
    wanted = [n for n in cameras if camera in (None, n, n.removeprefix("observation.images."))]
    if len(wanted) != 1:
        named = f"no camera '{camera}'" if camera else "several cameras; name one with --camera"
        raise UserError(f"{directory}: {named}; there are: {', '.join(cameras) or 'none'}")
    if "observation.state" not in features:
        raise UserError(f"{directory}: has no observation.state, which policies here look at")
    names = features["observation.state"].get("names") or []
    flat = chain.from_iterable(names.values()) if isinstance(names, dict) else names
    if pose := sorted(_POSE & {str(name).lower() for name in flat}):
        raise UserError(
            f"{directory}: observation.state is the end effector's pose ({', '.join(pose)}), and "
            "policies here look at joint positions and the gripper's opening"
        )
    return wanted[0], features[wanted[0]]["dtype"] == "video"


def _video_frames(
    directory: Path, key: str, entry: dict[str, Any], rate: float
) -> Iterator[NDArray[np.uint8]]:
    """The frames of an episode, from the video that holds several."""
    name = _FILE.format(entry[f"videos/{key}/chunk_index"], entry[f"videos/{key}/file_index"])
    path = directory / "videos" / key / f"{name}.mp4"
    video = cv2.VideoCapture(str(path))
    try:
        first = round(entry[f"videos/{key}/from_timestamp"] * rate)
        for number in range(first + entry["length"]):
            read, frame = video.read()
            if not read:
                raise UserError(f"{path}: frame {number} cannot be decoded by this OpenCV")
            if number >= first:
                yield frame[..., ::-1].astype(np.uint8, copy=False)
    finally:
        video.release()


def _decoded(data: bytes, directory: Path) -> NDArray[np.uint8]:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"{directory}: an image cannot be decoded")
    return image[..., ::-1].astype(np.uint8, copy=False)


def _resized(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """As `Processor.resized` does it."""
    if image.shape[:2] == (size, size):
        return image
    scaled = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(scaled)


def _episode(
    pngs: list[bytes],
    proprioception: NDArray[np.floating],
    actions: NDArray[np.floating],
    facts: dict[str, Any],
) -> Episode:
    # Nobody tells where the things are.
    grounding = np.full((len(pngs), 1), np.nan, np.float32)
    seen, done = proprioception.astype(np.float32), actions.astype(np.float32)
    finite = np.isfinite(seen).all() and np.isfinite(done).all()
    if not len(pngs) == len(seen) == len(done) > 0 or not finite:
        raise UserError(f"{facts['source']}: is empty, cut off, or has a value that is not finite")
    return Episode(pngs, seen, done, grounding, facts)


def convert(
    sources: Iterable[Path],
    out: Path,
    image_size: int,
    camera: str | None = None,
    controller_units: bool = False,
) -> int:
    """Write all episodes of the sources into a new directory, which is whole or not there.

    Returns how many.

    Raises:
        UserError: a source cannot be read, or the directory is there already.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; name another directory, or delete it")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    def episodes() -> Iterator[Episode]:
        for source in sources:
            if source.is_dir():
                found = read_lerobot(source, image_size, camera, controller_units)
            else:
                found = read_libero(source, image_size)
            yield from tqdm(found, source.name, unit="episode")

    try:
        count = write_shards(partial, episodes())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(out)
    return count


def main() -> None:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", help="HDF5 files, or data set directories")
    parser.add_argument("--out", type=Path, required=True, help="a new directory for the shards")
    parser.add_argument("--config", type=Path, required=True, help="of the policy to be trained")
    parser.add_argument("--camera", help="of a LeRobotDataset, where there are several")
    parser.add_argument(
        "--controller-units",
        action="store_true",
        help="a LeRobotDataset's actions are LIBERO's controller's (-1 to 1, gripper 1 closed)",
    )
    arguments = parser.parse_args()
    size = load_config(arguments.config).model.tower.image_size
    try:
        count = convert(
            arguments.sources, arguments.out, size, arguments.camera, arguments.controller_units
        )
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{count} episodes in {arguments.out}")


if __name__ == "__main__":
    main()
