import colorsys

import numpy as np
import torch

from rlrc_ros.vla.processor import center_crop
from tests.training.conftest import batches_of
from training.augmentation import as_openvla, centre_cropped, cropped, recoloured, shifted
from training.config import SftConfig
from training.rollout import Batcher
from training.sft import run

RNG = np.random.default_rng(0)


def test_shifted_images_move_by_whole_pixels():
    images = torch.arange(3 * 5 * 7 * 2, dtype=torch.uint8).reshape(3, 5, 7, 2)
    moved = shifted(images, torch.tensor([[0, 2, -1], [0, -1, 3]]))
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, 2:, :-1], images[1, :-2, 1:])
    assert torch.equal(moved[1, :2, :-1], images[1, :1, 1:].expand(2, -1, -1))  # border repeated
    assert torch.equal(moved[2, :-1, 3:], images[2, 1:, :-3])


def test_the_centre_is_cropped_as_the_running_policy_crops_it():
    images = RNG.integers(0, 256, (2, 33, 33, 3), dtype=np.uint8)
    found = centre_cropped(torch.from_numpy(images), 0.9).numpy()
    expected = np.stack([center_crop(image, 0.9) for image in images]).astype(np.float32)
    assert np.abs(found - expected).max() < 1.01  # which rounds to 8 bits


def test_a_crop_starts_in_its_corner_and_ends_in_the_opposite_one():
    images = torch.arange(2 * 5 * 5 * 3, dtype=torch.float32).reshape(2, 5, 5, 3)
    corners = torch.tensor([[0.0, 0.0], [0.5, 0.25]])
    found = cropped(images, corners, 0.25)  # half of each side: two pixels and the one between
    torch.testing.assert_close(found[0, ::2, ::2], images[0, :3, :3][::1, ::1])
    torch.testing.assert_close(found[1, ::2, ::2], images[1, 2:, 1:4])


def test_colours_turn_as_in_the_standard_library():
    colours = RNG.uniform(size=(200, 3))
    colours[:3] = [[0.5] * 3, [0.0] * 3, [1.0, 0.0, 0.0]]
    scale, turn = RNG.uniform(0.8, 1.2, 200), RNG.uniform(-0.05, 0.05, 200)
    expected = []
    for colour, by, angle in zip(colours, scale, turn, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        expected.append(colorsys.hsv_to_rgb((hue + angle) % 1, min(1, saturation * by), value))
    found = recoloured(*(torch.from_numpy(x) for x in (colours, scale, turn)))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_every_image_is_changed_in_its_own_way_and_stays_one():
    images = torch.from_numpy(RNG.integers(0, 256, (1, 24, 24, 3), dtype=np.uint8))
    torch.manual_seed(0)
    changed = as_openvla(images.expand(16, -1, -1, -1))
    assert changed.dtype == torch.float32 and changed.shape == (16, 24, 24, 3)
    assert changed.min() >= 0 and changed.max() <= 255
    assert len({float(image.mean()) for image in changed}) == 16
    grey = torch.full((64, 8, 8, 3), 128, dtype=torch.uint8)
    means = as_openvla(grey).mean((1, 2, 3)) / 255 - 128 / 255
    assert 0.15 < means.abs().max() < 0.2 + 1e-4  # brightness alone changes a grey image


def test_a_policy_that_learnt_from_crops_looks_at_the_centre(trainable, demonstrations, tmp_path):
    policy = trainable()
    data = batches_of(demonstrations, policy)
    config = SftConfig(
        steps=2, batch_size=4, learning_rate=1e-3, warmup_steps=1, augmentation="openvla"
    )
    cpu = torch.device("cpu")
    facts = run(config, policy, data, seed=0, device=cpu, work=tmp_path, latency=(0.0, 0.0))
    assert facts["augmentation"] == "openvla" and "micro_batch" not in facts
    assert policy.config.center_crop == 0.9
    images = demonstrations.images[:2]
    seen = {
        "image": images,
        "proprioception": demonstrations.proprioception[:2],
        "instruction": np.stack([np.frombuffer(b"push".ljust(64, b"\0"), np.uint8)] * 2),
    }
    expected = policy.processor.pixel_values(centre_cropped(torch.from_numpy(images), 0.9))
    assert torch.equal(Batcher(policy.processor, cpu)(seen).pixel_values, expected)
    torch.manual_seed(0)
    rows = torch.randint(60, (4,))
    torch.manual_seed(0)
    shown = centre_cropped(torch.from_numpy(demonstrations.images)[rows], 0.9)
    assert torch.equal(data.sample(4).inputs.pixel_values, policy.processor.pixel_values(shown))


def test_the_pixels_alone_are_augmented(trainable, batches):
    source, samples = batches(trainable()), []
    for augmentation in ({}, {"shift": 4, "brightness": 0.2}, {"as_openvla": True}):
        torch.manual_seed(3)
        samples.append(source.sample(16, **augmentation))
    plain, *augmented = samples
    for changed in augmented:
        assert torch.equal(plain.bins, changed.bins)
        assert torch.equal(plain.inputs.proprioception, changed.inputs.proprioception)
        assert not torch.equal(plain.inputs.pixel_values, changed.inputs.pixel_values)
