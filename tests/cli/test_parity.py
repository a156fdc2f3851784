import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.vla.checkpoints import write_checkpoint, write_expected, write_json

SHAPES = {
    "heads": {"dino": (128, 3), "siglip": (72, 2), "hidden": 48, "heads": 3, "kv_heads": 3},
    "grouped queries": {"hidden": 64, "heads": 4, "kv_heads": 2, "layers": 3, "ffn": 96},
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "openvla"
    write_expected(path, write_checkpoint(path, shards=2, seed=1, **request.param))
    return path


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "openvla")


def edit_case(path, **changes):
    cases = json.loads((path / "expected.json").read_text())
    cases[1] |= changes
    write_json(path / "expected.json", cases)


def test_what_upstream_would_give_is_what_comes_out(rlrc, checkpoint):
    status, out, _ = rlrc("parity", checkpoint, "--json")
    result = json.loads(out)
    assert status == 0 and result["agree"] is True
    assert [case["image"] for case in result["cases"]] == ["image_0.png", "image_1.png"]
    for case in result["cases"]:
        assert case["tokens_equal"] is True and case["max_action_diff"] <= 1e-6
        assert case["max_logit_diff"] <= 1e-3 and case["max_pixel_stat_diff"] <= 1e-5
        assert len(case) == 5


def test_people_get_a_table(rlrc, checkpoint):
    status, out, _ = rlrc("parity", checkpoint)
    assert status == 0 and out.endswith("agrees with upstream\n") and out.count("equal") == 2


@pytest.mark.parametrize(
    ("changes", "field", "difference"),
    [
        ({"generated": [31999] * 7}, "tokens_equal", False),
        ({"pixel_values_mean": 9.0}, "max_pixel_stat_diff", 9.0),
        ({"actions": {"toy_arm": [5.0] * 7}}, "max_action_diff", 5.0),
        ({"first_logits_top5": {"ids": [31999], "values": [1e3]}}, "max_logit_diff", 1e3),
    ],
)
def test_each_disagreement_is_found(rlrc, copied, changes, field, difference):
    edit_case(copied, **changes)
    status, out, _ = rlrc("parity", copied, "--json")
    result = json.loads(out)
    assert status == 1 and result["agree"] is False
    assert result["cases"][1][field] == pytest.approx(difference, rel=0.6)
    assert "does NOT agree" in rlrc("parity", copied)[1]


def noise(shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def save_16_bit_colour(path):
    import cv2

    cv2.imwrite(str(path), noise((30, 40, 3), np.uint16))


IMAGES = {
    "alpha": (lambda p: Image.fromarray(noise((30, 40, 4))).save(p), "is RGBA; convert it to RGB"),
    "grey": (lambda p: Image.fromarray(noise((30, 40))).save(p), "is L; convert it to RGB"),
    "grey, 16 bits": (
        lambda p: Image.fromarray(noise((30, 40), np.uint16)).save(p),
        r"is I;16 \(16 bits\); convert it",
    ),
    "colour, 16 bits": (save_16_bit_colour, r"is RGB \(16 bits\); convert it"),
    "noise": (lambda p: p.write_bytes(b"\x89PNG" * 9), "not a readable image"),
    "nothing": (lambda p: p.unlink(), "there is no such file"),
}


@pytest.mark.parametrize(("make", "message"), IMAGES.values(), ids=IMAGES)
def test_images_that_are_not_rgb_of_8_bits(refused, copied, make, message):
    make(copied / "image_1.png")
    line = refused("parity", copied)
    assert "image_1.png: " in line
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "../image_0.png"}, "is not a file of this directory"),
        ({"input_ids": [1, 40_000]}, "outside the vocabulary of 32064"),
        ({"input_ids": []}, "input_ids or first_logits_top5 are empty"),
        ({"generated": "31999"}, "generated"),
        ({"actions": {"libero": [0.0] * 7}}, "no 'libero'; there are: bridge_orig, toy_arm"),
        ({"actions": {"toy_arm": [0.0] * 6}}, "expected 7 values for each data set"),
        ({"input_ids": [1] * 2100}, "context has room for"),
    ],
)
def test_expectations_that_make_no_sense(refused, copied, changes, message):
    edit_case(copied, **changes)
    assert message in refused("parity", copied)


def test_a_checkpoint_without_expectations_and_a_bundle(refused, copied, policies):
    (copied / "expected.json").unlink()
    assert "expected.json: there is no such file" in refused("parity", copied)
    assert "is a bundle; parity compares" in refused("parity", policies / "tabletop-original")
