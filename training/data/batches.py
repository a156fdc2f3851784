"""Random batches of demonstration steps, from memory on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlrc_ros.errors import UserError
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.processor import Processor
from training import augmentation
from training.data.demonstrations import Demonstrations, read
from training.ranks import ALONE, Ranks


@dataclass
class Batch:
    """Steps of demonstrations.

    Attributes:
        inputs: what the policy sees.
        bins: (B, D) the action's tokens.
        grounding: (B, G) positions in m, NaN where they are not known.
        chunk: (B, chunk, D) the actions from this step on, scaled and in [-1, 1]; beyond the end
            of the episode its last one. None where the policy gives single actions.
    """

    inputs: Inputs
    bins: Tensor
    grounding: Tensor
    chunk: Tensor | None = None

    def __getitem__(self, rows: slice) -> Batch:
        chunk = None if self.chunk is None else self.chunk[rows]
        return Batch(self.inputs[rows], self.bins[rows], self.grounding[rows], chunk)

    def __len__(self) -> int:
        return len(self.inputs)


class DemonstrationBatches:
    """Random batches of demonstration steps, kept on the device.

    Attributes:
        processor: how the policy looks at images.
    """

    CHECKED = ("images", "proprioception", "bins")
    """What must have the same shape in all demonstrations."""

    def __init__(self, processor: Processor, codec: ActionCodec, device: torch.device) -> None:
        self.processor, self._codec, self._device = processor, codec, device
        self._instructions: dict[str, int] = {}
        self._steps: dict[str, Tensor] = {}
        architecture = processor.config.architecture
        self._images, self._head = architecture.images, architecture.action_head
        self._taken: list[Path] = []

    def take(self, place: Path, ranks: Ranks = ALONE) -> None:
        """Add a directory of demonstrations, unless it has been taken before.

        ranks: only the first of them has the directory; the others get what is in it.
        """
        if place not in self._taken:
            self.add(_received(read(place) if ranks.first else None, ranks))
            self._taken.append(place)

    def add(self, data: Demonstrations) -> None:
        """Add steps; joined on the device, where there is room and copying takes no time.

        Raises:
            UserError: their images, proprioception or actions have another shape than those before;
                or there are images of more or fewer cameras than the policy looks through.
        """
        cameras = data.images.shape[1] if data.images.ndim == 5 else 1
        if cameras != self._images:
            raise UserError(
                f"the policy looks through {self._images} cameras, and the demonstrations hold the "
                f"frames of {cameras}; export rollouts for this policy"
            )
        for text in data.instructions:
            self._instructions.setdefault(text, len(self._instructions))
        numbers = np.array([self._instructions[text] for text in data.instructions])
        arrays = self._arrays(data) | {"prompts": numbers[data.prompts]}
        for name in self.CHECKED if self._steps else ():
            here, there = tuple(self._steps[name].shape[1:]), arrays[name].shape[1:]
            if here != there:
                raise UserError(
                    f"the demonstrations do not go together: {name} of shapes {here} and {there}; "
                    "export rollouts for the policy that was trained on the others"
                )
        for name, array in arrays.items():
            new = torch.from_numpy(array).to(self._device)
            old = self._steps.pop(name, new[:0])
            if name == "grounding":  # a recording of a real arm knows nothing of it
                width = max(old.shape[1], new.shape[1])
                old, new = (F.pad(x, (0, width - x.shape[1]), value=math.nan) for x in (old, new))
            self._steps[name] = torch.cat([old, new])
        ids, mask = self.processor.batch_token_ids(list(self._instructions))
        self._ids = ids.to(self._device)
        self._mask = None if mask is None else mask.to(self._device)

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._steps["prompts"])

    @property
    def one_length(self) -> bool:
        """Whether all prompts have the same length, so that no batch has a mask."""
        return self._mask is None

    def _arrays(self, data: Demonstrations) -> dict[str, NDArray[Any]]:
        """What is kept of each step, apart from its prompt."""
        arrays: dict[str, NDArray[Any]] = {
            "images": data.images,
            "proprioception": data.proprioception,
            "bins": self._codec.encode(data.actions.astype(np.float64)),
            "grounding": data.grounding,
        }
        if self._head is not None:
            scaled = self._codec.scale(data.actions.astype(np.float64)).clip(-1.0, 1.0)
            arrays |= {"actions": scaled.astype(np.float32), "ends": self._ends(data)}
        return arrays

    def _ends(self, data: Demonstrations) -> NDArray[np.int64]:
        """The place of the last step of each step's episode, among all steps."""
        steps = [facts["steps"] for facts in data.episodes]
        before = len(self._steps["ends"]) if self._steps else 0
        return before + np.repeat(np.cumsum(steps) - 1, steps)

    @property
    def grounding_size(self) -> int:
        """How many grounding values a step has."""
        return self._steps["grounding"].shape[1]

    def sample(
        self,
        size: int,
        brightness: float = 0.0,
        shift: int = 0,
        as_openvla: bool = False,
    ) -> Batch:
        """`size` steps, drawn with the device's global generator.

        brightness: each image is scaled by up to this share, and its contrast about its mean too.
        shift: each image is moved by up to so many pixels down or up, right or left.
        as_openvla: change them as OpenVLA does instead.
        """
        # Drawn on the device: a copy to it would wait for everything before.
        steps = self._steps
        rows = torch.randint(len(self), (size,), device=self._device)
        inputs = self._inputs(rows, self._pixels(rows, brightness, shift, as_openvla))
        return Batch(inputs, steps["bins"][rows], steps["grounding"][rows], self._chunks(rows))

    def _pixels(
        self, rows: Tensor, brightness: float, shift: int, as_openvla: bool = False
    ) -> Tensor:
        """The steps' images, normalised, changed at random; (B · images, C, H, W)."""
        # Of several cameras one after the other.
        images = self._steps["images"][rows].flatten(0, -4)
        if as_openvla:
            return self.processor.pixel_values(augmentation.as_openvla(images))
        if shift:
            by = torch.randint(-shift, shift + 1, (2, len(images)), device=self._device)
            images = augmentation.shifted(images, by)
        if (share := self.processor.config.center_crop) != 1.0:
            images = augmentation.centre_cropped(images, share)
        pixels = self.processor.pixel_values(images)
        if brightness:
            change = 2 * torch.rand(2, len(images), 1, 1, 1, device=self._device) - 1
            gain, contrast = 1 + brightness * change
            mean = pixels.mean((2, 3), keepdim=True)
            pixels = mean * gain + (pixels - mean) * contrast
        return pixels

    def _inputs(self, rows: Tensor, pixels: Tensor) -> Inputs:
        prompts = self._steps["prompts"][rows]
        return Inputs(
            self._ids[prompts],
            None if self._mask is None else self._mask[prompts],
            self._arranged(pixels, len(rows)),
            self.processor.normalise_proprioception(self._steps["proprioception"][rows])
            if self.processor.config.proprioception
            else None,
        )

    def _arranged(self, pixels: Tensor, size: int) -> Tensor:
        """(B · images, C, H, W) -> as `Inputs.pixel_values` has it."""
        return pixels.reshape(size, -1, *pixels.shape[2:])

    def _chunks(self, rows: Tensor) -> Tensor | None:
        if self._head is None:
            return None
        following = rows[:, None] + torch.arange(self._head.chunk, device=self._device)
        return self._steps["actions"][following.minimum(self._steps["ends"][rows][:, None])]


def _received(data: Demonstrations | None, ranks: Ranks) -> Demonstrations:
    """What the first process has read."""
    if not ranks.many:
        assert data is not None
        return data
    found = None
    if data is not None:
        tensors = {name: torch.from_numpy(getattr(data, name)) for name in _ARRAYS}
        found = tensors, {"instructions": data.instructions, "episodes": data.episodes}
    shared = ranks.from_first(found)
    assert shared is not None
    tensors, facts = shared
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Demonstrations(**arrays, **facts)


_ARRAYS = ("images", "proprioception", "actions", "grounding", "prompts")
"""Of demonstrations, what is an array."""
