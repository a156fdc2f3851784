import json

import pytest

from tests.vla import oft_upstream
from tests.vla.test_openvla_oft import KEY, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("published") / "oft")


def test_a_checkpoint_becomes_a_bundle(rlrc, checkpoint, tmp_path):
    out = tmp_path / "bundle"
    options = ["--unnorm-key", KEY, "--cameras", "scene", "hand", "--control-rate", "20", "--json"]
    status, printed, _ = rlrc("convert", checkpoint, "--out", out, *options)
    facts = json.loads(printed)
    assert status == 0 and facts["chunk"] == 8 and facts["control_rate"] == 20.0
    assert [camera["name"] for camera in facts["cameras"]] == ["scene", "hand"]
    assert [stage["stage"] for stage in facts["provenance"]["stages"]] == ["original", "converted"]
    assert json.loads(rlrc("inspect", out, "--json")[1])["hash"] == facts["hash"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "scales actions differently by data set, so choose one"),
        (["--unnorm-key", "libero"], f"there are: {', '.join(oft_upstream.KEYS)}"),
        (["--unnorm-key", KEY, "--control-rate", "nan"], "'nan' is not a rate"),
        (["--unnorm-key", KEY, "--chunk", "0"], "is not a whole number from 1 up"),
        (["--unnorm-key", KEY, "--center-crop", "90"], "center_crop is 90.0, and must be above 0"),
    ],
)
def test_what_cannot_be_converted(refused, checkpoint, tmp_path, words, message):
    assert message in refused("convert", checkpoint, "--out", tmp_path / "bundle", *words)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(refused, checkpoint, tmp_path):
    said = refused("convert", checkpoint, "--out", tmp_path, "--unnorm-key", KEY)
    assert "is there already" in said
