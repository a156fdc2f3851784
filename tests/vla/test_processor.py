import dataclasses

import numpy as np
import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla.processor import Processor, word_tokenizer
from tests.conftest import WORDS, bundle_config

PROCESSOR = Processor(bundle_config(), word_tokenizer(WORDS))


def test_an_observation_becomes_a_batch_of_one(observation):
    inputs = PROCESSOR(observation)
    assert inputs.input_ids[0, 0] == 1 and inputs.input_ids.shape == (1, 13)
    assert inputs.pixel_values.shape == (1, 3, 64, 64)
    expected = (observation.images["front"].transpose(2, 0, 1) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(inputs.pixel_values[0], expected, atol=1e-5)
    np.testing.assert_allclose(inputs.proprioception[0], observation.proprioception, atol=1e-6)


def test_larger_images_are_resized(observation):
    flat = np.full((480, 640, 3), 200, np.uint8)
    inputs = PROCESSOR(dataclasses.replace(observation, images={"front": flat}))
    torch.testing.assert_close(
        inputs.pixel_values, torch.full((1, 3, 64, 64), (200 / 255 - 0.5) / 0.25)
    )


def test_capitals_and_blanks_do_not_matter():
    plain = PROCESSOR.token_ids("put the red cube on the blue plate")
    assert PROCESSOR.token_ids("  Put the RED cube on the blue plate ") == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": ""}, "instruction is empty"),
        ({"instruction": "   "}, "instruction is empty"),
        ({"instruction": "put the red mug on the sofa"}, "does not know these words.*mug, sofa"),
        ({"instruction": "red " * 200}, "context has room for"),
        ({"images": {}}, "camera 'front'.*has: none"),
        ({"images": {"wrist": np.zeros((64, 64, 3), np.uint8)}}, "camera 'front'.*has: wrist"),
        ({"images": {"front": np.zeros((64, 64), np.uint8)}}, "expected .height, width, 3. uint8"),
        ({"images": {"front": np.zeros((64, 64, 3))}}, "uint8 RGB, got .64, 64, 3. float64"),
        ({"images": {"front": np.zeros((0, 64, 3), np.uint8)}}, "expected"),
        ({"proprioception": None}, "takes 8 proprioception values.*gripper.*got none"),
        ({"proprioception": np.zeros(7)}, r"got shape \(7,\)"),
        ({"proprioception": np.full(8, np.nan)}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(observation, changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        PROCESSOR(dataclasses.replace(observation, **changes))
    assert "\n" not in str(refusal.value)


def test_prompts_of_different_lengths_are_padded_and_masked():
    texts = ["put the red cube on the blue plate", "push the cube"]
    ids, mask = PROCESSOR.batch_token_ids(texts)
    for row, text in enumerate(texts):
        own = PROCESSOR.token_ids(text)
        assert ids[row, mask[row]].tolist() == own
        assert mask[row].sum() == len(own)
    assert PROCESSOR.batch_token_ids(texts[:1] * 3)[1] is None
