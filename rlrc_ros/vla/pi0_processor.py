"""The preprocessing of pi0: several cameras, each picture whole within a square."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rlrc_ros.vla.processor import Processor


class Pi0Processor(Processor):
    """As openpi's training does it (`openpi/src/openpi/models/{model,tokenizer}.py`).

    Every camera's image stays apart in `Inputs.pixel_values`, (B, images, 3, H, W). Proprioception
    is normalised here, and padded by the model.
    """

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

    def stacked(self, images: NDArray[np.uint8], as_bytes: bool = False) -> Tensor:
        """`Inputs.pixel_values` of one observation's images, (images, H, W, 3) uint8."""
        return torch.tensor(images[None]) if as_bytes else self.pixel_values(images[None])

    def pixel_values(self, images: NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalised images, float32: (…, H, W, 3) uint8 -> (…, 3, H, W)."""
        pixels = torch.as_tensor(images)
        return super().pixel_values(pixels.flatten(0, -4)).unflatten(0, pixels.shape[:-3])

    def _words(self, instruction: str) -> str:
        return instruction.strip().replace("_", " ").replace("\n", " ")
