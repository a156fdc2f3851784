"""OpenVLA-OFT against what upstream's own modules gave (`oft_upstream.py` says how)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlrc_ros.vla import Observation, load_policy
from tests.vla import oft_upstream

EXPECTED = json.loads((Path(__file__).parent / "data" / "openvla_oft.json").read_text())
PARTS = ("action_head", "proprio_projector")
TWO, ONE = oft_upstream.VARIANTS
TOLERANCE = 1e-5


def write_checkpoint(path, variant=TWO, prefix="module."):
    """As upstream lays it out: the VLA in safetensors, the parts pickled apart."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(oft_upstream.config()))
    (path / "preprocessor_config.json").write_text(json.dumps(oft_upstream.preprocessor_config()))
    tensors = {
        name: torch.from_numpy(oft_upstream.weights(name, tuple(shape)))
        for name, shape in EXPECTED["tensors"].items()
    }
    apart = {part: {} for part in PARTS}
    for name in list(tensors):
        if (part := name.partition(".")[0]) in PARTS:
            apart[part][prefix + name.partition(".")[2]] = tensors.pop(name)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for part, content in apart.items():
        if part == "action_head" or oft_upstream.VARIANTS[variant]["proprioception"]:
            torch.save(content, path / f"{part}--150000_checkpoint.pt")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("published") / "oft")


def act(policy, case, images):
    seen, ids, state = oft_upstream.observation(case, images)
    policy.processor.token_ids = lambda _: ids
    cameras = [camera.name for camera in policy.config.cameras]
    takes = policy.config.proprioception is not None
    pictures = dict(zip(cameras, seen, strict=False))
    return policy.act(Observation(pictures, "go", state if takes else None)).actions


def expected(variant, case, key):
    (found,) = (
        result
        for result in EXPECTED["results"]
        if (result["variant"], result["case"], result["unnorm_key"]) == (variant, case, key)
    )
    actions = np.array(found["actions"])
    actions[:, -1] = actions[:, -1].clip(0.0, 1.0)  # a gripper's opening, which `act` bounds
    return actions


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("key", oft_upstream.KEYS)
def test_it_gives_what_upstream_gives(checkpoint, key, engine):
    policy = load_policy(checkpoint, unnorm_key=key, engine=engine)
    for case in range(oft_upstream.CASES):
        actions = act(policy, case, 2)
        assert actions.shape == (8, 7)
        np.testing.assert_allclose(actions, expected(TWO, case, key), atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_graph_gives_what_upstream_gives(checkpoint):
    key = oft_upstream.KEYS[0]
    policy = load_policy(checkpoint, "cuda", "graph", "float32", unnorm_key=key)
    policy.warm_up()
    for case in range(oft_upstream.CASES):
        actions = act(policy, case, 2)
        np.testing.assert_allclose(actions, expected(TWO, case, key), atol=1e-3, rtol=0)
