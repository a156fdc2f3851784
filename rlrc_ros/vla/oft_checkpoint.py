"""What OpenVLA-OFT's checkpoints have beside OpenVLA's: parts pickled apart, and more inputs.

`action_head--N_checkpoint.pt` and `proprio_projector--N_checkpoint.pt` are state dicts. Widths are
read off them; the length of a chunk and the number of images stand nowhere, and are upstream's
constants for the robot whose numbers fit (prismatic/vla/constants.py and
experiments/robot/libero/run_libero_eval.py of openvla-oft).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import ActionHeadConfig, DecoderConfig, ProprioceptionConfig, TowerConfig
from rlrc_ros.vla.weights import WeightFiles

MORE_CAMERAS = ("wrist",)
"""Behind the one that every OpenVLA looks through, in upstream's order."""
ARM_DIMENSIONS = 7
CHUNKS = {8: 8, 7: 5}
"""Actions in a chunk by the length of proprioception: 8 LIBERO's, 7 BridgeData's."""
LIBERO_CHUNK = 8
"""Where there is no proprioception: upstream's own default."""
REFUSED = {
    "noisy_action_projector": "its action head denoises (DDIM)",
    "vision_backbone": "its towers are modulated by the instruction (FiLM)",
}
"""Parts of kinds of OpenVLA-OFT that this program does not run."""


def with_parts(weights: WeightFiles, directory: Path) -> WeightFiles:
    """The weights with those of the parts beside them; none of them is read.

    Raises:
        UserError: there are several of a part, one is of a kind that cannot be run, or holds
            anything but tensors; or there is a projector and no head.
    """
    found = {name: _part(directory, name) for name in ("action_head", "proprio_projector")}
    for name, why in REFUSED.items():
        if file := _part(directory, name):
            raise UserError(
                f"{file}: {why}, and this program runs OpenVLA-OFT with an L1 regression head and "
                "plain towers only"
            )
    if found["proprio_projector"] and not found["action_head"]:
        raise UserError(
            f"{directory}: has {found['proprio_projector'].name} and no action_head--*_checkpoint"
            ".pt; copy the checkpoint again"
        )
    for name, file in found.items():
        if file:
            weights = weights.with_part(name, file)
    return weights


def _part(directory: Path, name: str) -> Path | None:
    files = sorted(directory.glob(f"{name}--*checkpoint*.pt"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{directory}: has several of one part ({names}); leave one of them there")
    return files[0] if files else None


def architecture(
    weights: WeightFiles, towers: Sequence[TowerConfig], decoder: DecoderConfig
) -> dict[str, Any]:
    """The fields of `ArchitectureConfig` that the parts decide; none where there are none.

    Raises:
        UserError: a part is of a shape that no such part has.
    """
    head = {name: t for name, t in weights.pickled.items() if name.startswith("action_head.")}
    if not head:
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.pickled.items()}
    outputs = shapes.get("action_head.model.fc2.bias", ())
    if not outputs:
        file = weights.files[next(iter(head))]
        raise UserError(
            f"{file}: has no tensor model.fc2.bias, which the L1 regression head of OpenVLA-OFT has"
        )
    file = weights.files["action_head.model.fc2.bias"]
    if outputs != (ARM_DIMENSIONS,):
        raise UserError(
            f"{file}: gives {' × '.join(map(str, outputs))} numbers an action, and this program "
            f"commands one arm with {ARM_DIMENSIONS}"
        )
    prefix = "action_head.model.mlp_resnet_blocks."
    blocks = {name.split(".")[3] for name in head if name.startswith(prefix)}
    joints = shapes.get("proprio_projector.fc1.weight", (decoder.hidden_size, 0))
    if len(joints) != 2:
        file = weights.files["proprio_projector.fc1.weight"]
        raise UserError(f"{file}: fc1.weight is {joints}, expected 2 dimensions")
    chunk = CHUNKS.get(joints[1], LIBERO_CHUNK)
    return {
        "proprioception": joints[1],
        "images": len(towers),  # upstream takes two only through two towers
        "action_head": ActionHeadConfig(
            chunk=chunk, dimensions=ARM_DIMENSIONS, blocks=max(1, len(blocks))
        ),
    }


def proprioception(statistics: Any, where: str, length: int) -> ProprioceptionConfig:
    """How a data set scales proprioception: its quantiles to ± 1, and clipped there.

    Args:
        statistics: of the data set.
        where: they stand.
        length: of the policy's proprioception.

    Raises:
        UserError: there are no such statistics, or not of this length.
    """
    found = statistics.get("proprio") if isinstance(statistics, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{where}: has no 'proprio', and the policy takes {length} such values")
    mask = found.get("mask") or [True] * length
    try:
        low, high = ([float(value) for value in found[key]] for key in ("q01", "q99"))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{where}: its proprio lacks q01 and q99, lists of {length} numbers"
        ) from None
    if not len(low) == len(high) == len(mask) == length:
        raise UserError(f"{where}: its proprio needs {length} values each of q01 and q99")
    # 2 · (x - q01) / (q99 - q01 + 1e-8) - 1, as upstream has it
    half = [(b - a + 1e-8) / 2 for a, b in zip(low, high, strict=True)]
    if min(half) <= 0:
        raise UserError(f"{where}: its proprio has a q01 above its q99")
    return ProprioceptionConfig(
        joints=_names(length),
        gripper=False,
        mean=tuple(a + h if m else 0.0 for a, h, m in zip(low, half, mask, strict=True)),
        std=tuple(h if m else 1.0 for h, m in zip(half, mask, strict=True)),
        limit=1.0,
    )


def unscaled(length: int) -> ProprioceptionConfig:
    """Where no data set is chosen: then the policy does not act either."""
    return ProprioceptionConfig(
        joints=_names(length), gripper=False, mean=(0.0,) * length, std=(1.0,) * length
    )


def _names(length: int) -> tuple[str, ...]:
    """Upstream does not say what the values are (LIBERO's: position, rotation vector, fingers)."""
    return tuple(f"state_{i}" for i in range(length))
