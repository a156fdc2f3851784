"""What the training scripts share: devices, seeds, metrics, checkpoints without pickle."""

from __future__ import annotations

import csv
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically

Job = TypeVar("Job")
Result = TypeVar("Result")


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def fork_server() -> multiprocessing.context.BaseContext:
    """Where worker processes come from: forked from one that has the slow imports behind it.

    The simulator is among them; its renderer connects to the GPU when first used, after the fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.data.collect"])
    return context


def parallel_map(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    start: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """`function` of each job, in worker processes; results in the order of the jobs.

    The workers end with this process, even if it is killed, and at once when it is interrupted.

    Args:
        function: importable by name.
        jobs: its arguments.
        workers: how many processes.
        start: called first in each worker, with `arguments`.
        arguments: of `start`.

    Raises:
        UserError: a worker was killed.
    """
    with ProcessPoolExecutor(
        workers, fork_server(), initializer=_start_worker, initargs=(start, arguments)
    ) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a worker process has ended; if memory ran out, take fewer workers"
                ) from None
            raise


def _start_worker(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    leave_ctrl_c_to_parent()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if start:
        start(*arguments)


def leave_ctrl_c_to_parent() -> None:
    """Ignore the terminal's interrupt, which all processes get; the parent ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def render_on(number: int) -> None:
    """Let a worker process draw on one of the GPUs: the workers take turns with them.

    Nothing happens with one GPU, or where MUJOCO_EGL_DEVICE_ID says which.
    """
    if (gpus := torch.cuda.device_count()) > 1:
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(number % gpus))


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one, the GPU if there is one.

    Raises:
        UserError: it cannot be used.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{device}' cannot be used ({reason})") from None
    return torch.device(device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 stable-baselines3 shuffles with the global generator
    torch.manual_seed(seed)


class MetricsLog:
    """One CSV row an update.

    Rows of steps from `resume_at` on, written before a kill, are dropped.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        self._path = path
        self._fields: list[str] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < resume_at]
            path.unlink()
            for row in rows:
                self.write(**row)

    def write(self, **values: Any) -> None:
        """Append a row; the first one decides the columns. `step` must be among them."""
        new = not self._fields
        self._fields = self._fields or list(values)
        with self._path.open("a", newline="") as file:
            # A log that an earlier version began keeps its columns.
            writer = csv.DictWriter(file, self._fields, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )


def save_checkpoint(directory: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able facts; an earlier checkpoint stays until the new one is whole."""
    partial, old = (
        directory.with_name(f"{directory.name}.partial"),
        directory.with_name(f"{directory.name}.old"),
    )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
        partial / "state.safetensors",
    )
    (partial / "facts.json").write_text(json.dumps(facts))
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def forget_checkpoints(work: Path) -> None:
    """Delete what a stage needed only to be resumed; it is larger than its bundle."""
    for place in work.glob("checkpoint*"):
        shutil.rmtree(place)


def claim(directory: Path, configuration: dict[str, Any]) -> None:
    """Note what a directory is for, or check that it is what it was made for.

    Raises:
        UserError: it holds a run of another configuration.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file, text = directory / "config.json", json.dumps(configuration, indent=1)
    if not file.exists():
        write_atomically(file, text)
    elif file.read_text(errors="replace") != text:
        raise UserError(
            f"{directory}: holds a run of another configuration; name another directory, or "
            "delete it"
        )


def load_checkpoint(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest whole checkpoint, or None."""
    for place in (directory, directory.with_name(f"{directory.name}.old")):
        if (place / "facts.json").exists():
            return load_file(place / "state.safetensors"), json.loads(
                (place / "facts.json").read_text()
            )
    return None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer"
) -> dict[str, Tensor]:
    """An AdamW optimizer's state as flat tensors."""
    return {
        f"{prefix}.{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer"
) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            _, index, name = key.rsplit(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def numpy_rng_tensors() -> dict[str, Tensor]:
    """The state of NumPy's global generator."""
    _, keys, *rest, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    words = np.concatenate([np.asarray(keys).astype(np.int64), np.asarray(rest, np.int64)])
    return {
        "rng.numpy": torch.from_numpy(words),
        "rng.gauss": torch.tensor([gauss], dtype=torch.float64),
    }


def restore_numpy_rng(tensors: dict[str, Tensor]) -> None:
    """Put back what `numpy_rng_tensors` took."""
    *keys, place, has_gauss = tensors["rng.numpy"].tolist()
    state = ("MT19937", np.asarray(keys, np.uint32), place, has_gauss)
    np.random.set_state((*state, float(tensors["rng.gauss"])))  # noqa: NPY002


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """Torch's random state, to resume exactly."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_rng(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_tensors` took."""
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
