"""Images changed at random, on the device: a policy should not know its demonstrations by heart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CROP = 0.9
"""Share of an image's area that OpenVLA's augmentation leaves; what is then acted on is its centre,
see `BundleConfig.center_crop`."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.2, 0.2, 0.2, 0.05
"""Upstream's settings (`image_augment_kwargs` in openvla/prismatic/vla/datasets/datasets.py)."""


def shifted(images: Tensor, by: Tensor) -> Tensor:
    """Each image moved by whole pixels, its border repeated: (B, H, W, C), (2, B) -> (B, H, W, C).

    by: how far down, and how far right.
    """
    height, width = images.shape[1:3]
    down, right = by[:, :, None]
    rows = (torch.arange(height, device=images.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right).clamp(0, width - 1)
    each = torch.arange(len(images), device=images.device)
    return images[each[:, None, None], rows[:, :, None], columns[:, None, :]]


def cropped(images: Tensor, corners: Tensor, share: float) -> Tensor:
    """A share of each image's area, scaled up to the whole: (B, H, W, C) -> float32, same shape.

    Bilinear, with corners on corners, as TensorFlow's `crop_and_resize` does it.

    corners: (B, 2) the upper left corner, down and right, as shares of height and width.
    """
    side = math.sqrt(share)
    height, width = images.shape[1:3]
    device = images.device
    down, right = (
        2 * (corners[:, i, None] + side * torch.linspace(0, 1, size, device=device)) - 1
        for i, size in enumerate((height, width))
    )
    shape = (len(images), height, width)
    grid = torch.stack([right[:, None].expand(shape), down[:, :, None].expand(shape)], 3)
    pixels = images.permute(0, 3, 1, 2).float()
    found = F.grid_sample(pixels, grid, "bilinear", "border", align_corners=True)
    return found.permute(0, 2, 3, 1)


def centre_cropped(images: Tensor, share: float) -> Tensor:
    """The centre of each image: what `rlrc_ros.vla.processor.center_crop` does, on the device."""
    corners = torch.full((len(images), 2), (1 - math.sqrt(share)) / 2, device=images.device)
    return cropped(images, corners, share)


def as_openvla(images: Tensor) -> Tensor:
    """A random crop, then brightness, contrast, saturation and hue, in upstream's order and limits.

    As `augment` of kvablack/dlimp does it, apart from its rounding to 8 bits, and that here every
    change is drawn by itself.

    images: (B, H, W, 3) in [0, 255]; so is what is returned, as float32.
    """
    device, count = images.device, len(images)

    def drawn(limit: float) -> Tensor:
        return (2 * torch.rand(count, 1, 1, 1, device=device) - 1) * limit

    corners = torch.rand(count, 2, device=device) * (1 - math.sqrt(CROP))
    x = cropped(images, corners, CROP) / 255
    x = (x + drawn(BRIGHTNESS)).clamp(0, 1)
    mean = x.mean((1, 2), keepdim=True)
    x = (mean + (x - mean) * (1 + drawn(CONTRAST))).clamp(0, 1)
    x = recoloured(x, 1 + drawn(SATURATION)[..., 0], drawn(HUE)[..., 0])
    return 255 * x


def recoloured(rgb: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """(…, 3) RGB in [0, 1], its saturation scaled and its hue turned; both broadcast to (…,).

    hue: turns by this share of the circle.
    """
    red, green, blue = rgb.unbind(-1)
    value, lowest = rgb.amax(-1), rgb.amin(-1)
    range_ = value - lowest
    width = range_.clamp(min=1e-12)
    sixth = torch.where(
        value == red,
        (green - blue) / width,
        torch.where(value == green, 2 + (blue - red) / width, 4 + (red - green) / width),
    )
    chroma = value * (range_ / value.clamp(min=1e-12) * saturation).clamp(0, 1)
    channels = []
    for n in (5, 3, 1):  # red, green, blue
        k = (n + sixth + 6 * hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, -1)
