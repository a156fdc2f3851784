"""From what a robot sees to what the model takes.

Image, proprioception and instruction to tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import BundleConfig
from rlrc_ros.vla.openvla import Inputs


@dataclass
class Observation:
    """What a policy acts on.

    Attributes:
        images: (H, W, 3) uint8 RGB by camera name, as the bundle's `cameras` name them.
        proprioception: (P,) as the bundle's `ProprioceptionConfig` names them; None where it takes
            none.
        instruction: what to do, in plain words.
    """

    images: dict[str, NDArray[np.uint8]]
    instruction: str
    proprioception: NDArray[np.floating] | None = field(default=None)


class Processor:
    """The preprocessing of one bundle."""

    def __init__(self, config: BundleConfig, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._unknown = tokenizer.token_to_id("<unk>") if tokenizer else None
        self._token_ids: dict[str, list[int]] = {}
        self._constants: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def __call__(self, observation: Observation, as_bytes: bool = False) -> Inputs:
        """A batch of one.

        as_bytes: leave the images uint8, for an engine that normalises them.

        Raises:
            UserError: a camera or the proprioception is missing or has the wrong shape, a value is
                not finite, or the instruction is empty or has words the policy does not know.
        """
        ids = torch.tensor([self.token_ids(observation.instruction)])
        pixels = self.stacked(self.images(observation), as_bytes)
        return Inputs(ids, None, pixels, self._proprioception(observation))

    def stacked(self, images: NDArray[np.uint8], as_bytes: bool = False) -> Tensor:
        """`Inputs.pixel_values` of one observation's images, (images, H, W, 3) uint8."""
        batch = images if len(images) == 1 else images[None]
        return torch.tensor(batch) if as_bytes else self.pixel_values(batch)

    def token_ids(self, instruction: str) -> list[int]:
        """The prompt's token ids, BOS first.

        Raises:
            UserError: the instruction is empty, has words the policy does not know, or is too long
                for it.
        """
        if instruction in self._token_ids:
            return self._token_ids[instruction]
        words = self._words(instruction)
        if not words:
            raise UserError("the instruction is empty; say what the robot should do")
        if self._tokenizer is None:
            raise UserError(
                "this policy has no tokenizer.json, so it cannot read an instruction; copy it "
                "from the checkpoint"
            )
        decoder = self.config.architecture.decoder
        prompt = self.config.instruction_template.format(instruction=words)
        encoded = self._tokenizer.encode(prompt, add_special_tokens=False)
        spans = zip(encoded.offsets, encoded.ids, strict=True)
        if unknown := [prompt[start:end] for (start, end), i in spans if i == self._unknown]:
            raise UserError(
                f"the policy does not know these words of the instruction: {', '.join(unknown)}"
            )
        ids = [decoder.bos_token_id, *encoded.ids]
        if (
            self.config.prompt_suffix_token is not None
            and ids[-1] != self.config.prompt_suffix_token
        ):
            ids.append(self.config.prompt_suffix_token)
        head = self.config.architecture.action_head
        actions = head.places + 1 if head else 16
        room = decoder.max_positions - self.config.architecture.context - actions
        if len(ids) > room:
            raise UserError(
                f"the instruction takes {len(ids)} tokens, and the policy's context has room for "
                f"{room}"
            )
        if len(self._token_ids) >= 10_000:
            self._token_ids.clear()
        self._token_ids[instruction] = ids
        return ids

    def _words(self, instruction: str) -> str:
        """The instruction as the policy was trained to read it."""
        return instruction.strip().lower()

    def batch_token_ids(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(B, T) ids padded at the end, and the (B, T) mask.

        None where all have the same length.
        """
        rows = [self.token_ids(instruction) for instruction in instructions]
        longest = max(map(len, rows))
        pad = self.config.architecture.decoder.pad_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        if all(len(row) == longest for row in rows):
            return ids, None
        return ids, torch.tensor([[i < len(row) for i in range(longest)] for row in rows])

    def pixel_values(self, images: NDArray[np.uint8] | Tensor) -> Tensor:
        """`Inputs.pixel_values` of images of the towers' size, normalised, float32.

        images: (B, H, W, 3) uint8, or (B, images, H, W, 3).
        """
        if images.ndim == 5:
            each = self.pixel_values(images.reshape(-1, *images.shape[2:]))
            return each.reshape(len(images), -1, *each.shape[2:])
        if isinstance(images, np.ndarray) and not images.flags.writeable:
            images = images.copy()  # from a message; torch wants to be able to write
        pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
        towers = []
        for tower in self.config.architecture.towers:
            mean, std = (
                self._constant(v, pixels.device).view(1, -1, 1, 1) for v in (tower.mean, tower.std)
            )
            towers.append((pixels - mean) / std)
        return torch.cat(towers, 1)

    def normalise_proprioception(self, values: NDArray[np.floating] | Tensor) -> Tensor:
        """(…, P) -> (…, P) float32 with the bundle's mean and standard deviation."""
        contract = self.config.proprioception
        assert contract is not None
        x = torch.as_tensor(values, dtype=torch.float32)
        mean, std = (self._constant(v, x.device) for v in (contract.mean, contract.std))
        x = (x - mean) / std
        return x if contract.limit is None else x.clamp(-contract.limit, contract.limit)

    def _constant(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        """As a float32 tensor; made once, for a copy to a GPU waits for all that runs there."""
        key = (values, device)
        if key not in self._constants:
            self._constants[key] = torch.tensor(values, device=device)
        return self._constants[key]

    def images(self, observation: Observation) -> NDArray[np.uint8]:
        """What the towers see, camera by camera: (images, H, W, 3) uint8 of their size.

        Raises:
            UserError: a camera is missing, or its picture is none.
        """
        cameras = self.config.cameras[: self.config.architecture.images]
        return np.stack([self._image(observation, camera.name) for camera in cameras])

    def _image(self, observation: Observation, camera: str) -> NDArray[np.uint8]:
        image = observation.images.get(camera)
        if image is None:
            there = ", ".join(sorted(observation.images)) or "none"
            raise UserError(
                f"the policy looks through camera '{camera}', and the observation has: {there}"
            )
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(
                f"camera '{camera}': expected (height, width, 3) uint8 RGB, got "
                f"{image.shape} {image.dtype}{_remedy(image)}"
            )
        share = self.config.center_crop
        return self.resized(image) if share == 1.0 else center_crop(self.resized(image), share)

    def resized(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB -> the towers' size: bicubic with antialias, not keeping the aspect.

        As upstream's training does it ('resize-naive').
        """
        size = self.config.architecture.towers[0].image_size
        if image.shape[:2] == (size, size):
            return image
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))

    def _proprioception(self, observation: Observation) -> Tensor | None:
        contract = self.config.proprioception
        if contract is None:
            return None
        values = observation.proprioception
        expected = len(contract.mean)
        if values is None or values.shape != (expected,):
            names = ", ".join(contract.names)
            found = "none" if values is None else f"shape {values.shape}"
            raise UserError(
                f"the policy takes {expected} proprioception values ({names}), got {found}"
            )
        if not np.isfinite(values).all():
            raise UserError("the proprioception has a value that is not finite")
        return self.normalise_proprioception(values[None])


def center_crop(image: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    """That share of a square image's area, about its centre, scaled up to the whole, (H, H, 3).

    Bilinear and in the order and precision of TensorFlow's `crop_and_resize`, with which upstream
    does it (`center_crop_image` of openvla-oft/experiments/robot/openvla_utils.py).
    """
    last, side = np.float32(len(image) - 1), np.sqrt(np.float32(share))
    first = (1 - side) / 2
    step = (first + side - first) * last / last
    at = first * last + np.arange(len(image), dtype=np.float32) * step
    low, high = np.floor(at).astype(int), np.ceil(at).astype(int)
    part = (at - low).astype(np.float32)
    x = image.astype(np.float32) * np.float32(1 / 255)
    x = x[:, low] + (x[:, high] - x[:, low]) * part[None, :, None]
    x = x[low] + (x[high] - x[low]) * part[:, None, None]
    return (x.clip(0, 1) * np.float32(255.5)).astype(np.uint8)


def _remedy(image: NDArray[Any]) -> str:
    """What to do about an image that is not RGB of 8 bits, where that can be told."""
    if image.dtype == np.uint16:
        return "; scale its 16 bits to 8"
    if image.ndim == 2 or image.shape[2:] == (1,):
        return "; it is grey, and the policy was trained on colours"
    return "; drop its alpha channel" if image.shape[2:] == (4,) else ""


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """One token a word, for policies trained from nothing on a small vocabulary."""
    from tokenizers import models, normalizers, pre_tokenizers

    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", *sorted(set(words))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
