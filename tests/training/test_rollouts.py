"""Recorded rollouts as demonstrations: by the real commands, from bags to a trained policy."""

import json

import numpy as np
import pytest
import torch
import yaml

from rlrc_ros.cli.main import main
from rlrc_ros.errors import UserError
from rlrc_ros.paths import config_file
from rlrc_ros.rollouts.alignment import AlignedEpisode
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.processor import Processor, word_tokenizer
from tests.conftest import WORDS, bundle_config, tower
from tests.rollouts.episodes import INSTRUCTION, contract, record_episode
from tests.training.conftest import batches_of
from training.data.demonstrations import Episode, encode_png, read, write_shard


class Trained:
    """Whose data they are."""

    processor = Processor(bundle_config(), word_tokenizer(WORDS))
    codec = ActionCodec(bundle_config().action_codec)


@pytest.fixture
def bags(tmp_path):
    """Images of 96 px, which a policy of 64 px has to have made smaller."""
    for name, steps in {"e1": 4, "e2": 3}.items():
        record_episode(tmp_path / "bags", name, steps=steps, size=96)
    record_episode(tmp_path / "bags", "e3", steps=3, size=96, outcome="failure")
    return tmp_path / "bags"


def export(bags, bundle, out, *words):
    words = ["bag", "export", bags, "--contract", bundle, "--profile", "sim", "--out", out, *words]
    return main([str(word) for word in words])


def test_shards_hold_what_the_policys_towers_saw_and_what_it_did(
    tmp_path, bags, make_bundle, capfd
):
    out = tmp_path / "rollouts"
    assert export(bags, make_bundle().path, out, "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["episodes"], told["steps"], told["refused"]) == (2, 7, {"outcome failure": 1})
    data = read(out)
    steps = [
        step for name in ("e1", "e2") for step in AlignedEpisode(bags / name, contract()).steps()
    ]
    processor = Processor(bundle_config(), None)
    for k, step in enumerate(steps):
        np.testing.assert_array_equal(data.images[k], processor.images(step.observation)[0])
        seen = step.observation.proprioception.astype(np.float32)
        np.testing.assert_array_equal(data.proprioception[k], seen)
        np.testing.assert_array_equal(data.actions[k], step.action.astype(np.float32))
    assert data.images.shape == (7, 64, 64, 3)
    assert data.instructions == [INSTRUCTION]
    assert [facts["episode_id"] for facts in data.episodes] == ["e1", "e2"]
    assert np.isnan(data.grounding).all()


def test_filters_and_an_existing_directory(tmp_path, bags, make_bundle, capfd):
    bundle, out = make_bundle().path, tmp_path / "rollouts"
    assert export(bags, bundle, out, "--outcome", "success", "failure", "--json") == 0
    assert json.loads(capfd.readouterr().out)["episodes"] == 3
    assert export(bags, bundle, out) == 2
    assert "is there already" in capfd.readouterr().err
    assert export(bags, bundle, tmp_path / "none", "--task", "green") == 2
    error = capfd.readouterr().err
    assert "none of 3 bags was exported (2 with another task; 1 with outcome failure)" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bags", "bundle", "rollouts"]


def test_joined_with_demonstrations_that_know_where_things_are(tmp_path, bags, make_bundle):
    export(bags, make_bundle().path, tmp_path / "rollouts")
    rng = np.random.default_rng(0)
    pngs = [encode_png(image) for image in rng.integers(0, 256, (5, 64, 64, 3), np.uint8)]
    numbers = [rng.normal(size=(5, n)).astype(np.float32) for n in (8, 7, 21)]
    (tmp_path / "demos").mkdir()
    facts = {"instruction": "push the red cube", "success": True}
    write_shard(tmp_path / "demos" / "shard-00000.safetensors", [Episode(pngs, *numbers, facts)])
    batches = batches_of(read(tmp_path / "rollouts"), Trained)
    batches.take(tmp_path / "demos")
    torch.manual_seed(0)
    grounding = batches.sample(200).grounding
    known = ~grounding.isnan()
    assert grounding.shape == (200, 21) and 0 < known.all(1).sum() < 200
    assert (known.all(1) | ~known.any(1)).all()
    expected = {tuple(row) for row in numbers[2].tolist()}
    assert {tuple(row) for row in grounding[known.all(1)].tolist()} == expected


def test_data_for_another_policy_do_not_join(tmp_path, bags, make_bundle):
    architecture = bundle_config().architecture
    small = type(architecture)(
        towers=(tower(image_size=32),), decoder=architecture.decoder, proprioception=8
    )
    export(bags, make_bundle("a").path, tmp_path / "64")
    export(bags, make_bundle("b", architecture=small).path, tmp_path / "32")
    with pytest.raises(UserError, match=r"images of shapes \(64, 64, 3\) and \(32, 32, 3\)"):
        batches_of(read(tmp_path / "64"), Trained).take(tmp_path / "32")


def test_sft_learns_from_rollouts_alone(tmp_path, bags, make_bundle):
    bundle = make_bundle().path
    export(bags, bundle, tmp_path / "rollouts")
    config = yaml.safe_load(config_file("training", "tiny").read_text())
    config["recovery"] |= {"steps": 30, "warmup_steps": 2, "corrections": [], "batch_size": 7}
    config["recovery"] |= {"grounding": 1.0, "checkpoint_every": 1000}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["sft", tmp_path / "config.yaml", "--policy", bundle, "--out", tmp_path / "trained"]
    words += ["--demonstrations", tmp_path / "rollouts", "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    log = (tmp_path / "trained-work" / "log.csv").read_text().splitlines()
    losses = [
        float(dict(zip(log[0].split(","), row.split(","), strict=True))["loss"]) for row in log[1:]
    ]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 2
    assert torch.get_num_threads() == 1
