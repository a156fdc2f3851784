"""The preprocessing of pi0: several cameras, each picture whole within a square."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rlrc_ros.vla.processor import Observation, Processor


class Pi0Processor(Processor):
    """As openpi's training does it (`openpi/src/openpi/models/{model,tokenizer}.py`).

    Images are (cameras, H, W, 3), in the order of the bundle's `cameras`. Proprioception is
    normalised here, and padded by the model.
    """

    def image(self, observation: Observation) -> NDArray[np.uint8]:
        """What the tower sees: (cameras, H, W, 3) uint8 of its size.

        Raises:
            UserError: a camera is missing, or its picture is none.
        """
        return np.stack([self._seen_by(camera, observation) for camera in self.config.cameras])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of what `image` gives."""
        return len(self.config.cameras), *super().image_shape

    def resized(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB -> the size of the tower, bilinear, aspect kept, black around it."""
        size = self.config.architecture.towers[0].image_size
        height, width = image.shape[:2]
        if height == width == size:
            return image
        ratio = max(height, width) / size
        inner = max(1, int(width / ratio)), max(1, int(height / ratio))
        canvas = Image.new("RGB", (size, size))
        picture = Image.fromarray(image).resize(inner, Image.Resampling.BILINEAR)
        canvas.paste(picture, ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return np.asarray(canvas)

    def pixel_values(self, images: NDArray[np.uint8] | Tensor) -> Tensor:
        """(B, cameras, H, W, 3) uint8 -> (B, cameras, 3, H, W) float32, normalised."""
        pixels = torch.as_tensor(images)
        return super().pixel_values(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])

    def _words(self, instruction: str) -> str:
        return instruction.strip().replace("_", " ").replace("\n", " ")

    @property
    def _patches(self) -> int:
        return len(self.config.cameras) * super()._patches
