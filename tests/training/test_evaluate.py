import json

import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.sim.tabletop import TabletopEnv
from rlrc_ros.sim.tasks import VOCABULARY
from rlrc_ros.vla import quantization
from rlrc_ros.vla.bundle import provenance, write_bundle
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import bundle_config, posed_config, random_model, tower
from training.envs.tabletop import SeededTabletop, decode_text, encode_text
from training.evaluate import EpisodeResult, Evaluation, compare, evaluate, summarise


@pytest.fixture
def bundle(tmp_path):
    """A policy for the tabletop that can do nothing."""
    base = bundle_config(((1, 1, 32),))
    architecture = type(base.architecture)(
        towers=(tower(image_size=128),), decoder=base.architecture.decoder, proprioception=8
    )
    config = bundle_config(((1, 1, 32),), architecture=architecture)
    tokenizer = word_tokenizer([*VOCABULARY, "in", ":", "out"])
    tensors = quantization.stored(random_model(config))
    return write_bundle(tmp_path / "bundle", config, tensors, tokenizer, provenance(None, "x"))


def test_the_same_scenes_whatever_the_workers_and_resumable(bundle, tmp_path):
    log = tmp_path / "log.jsonl"
    task = Evaluation(policy=bundle.path, episodes=3, seed=70)
    results = evaluate(task, "cpu", workers=1, log=log)
    assert [r.seed for r in results] == [70, 71, 72]
    assert all(r.steps == 120 or r.success for r in results)
    lines = log.read_text().splitlines(keepends=True)
    # A kill in the middle of a line, after the first episode.
    log.write_text("".join(lines[:2]) + lines[2][:20])
    again = evaluate(task, "cpu", workers=2, log=log)
    assert [(r.seed, r.success, r.steps) for r in again] == [
        (r.seed, r.success, r.steps) for r in results
    ]
    assert again[0] == results[0]  # not run again: even its latencies are the same
    assert len(log.read_text().splitlines()) == 4


def test_a_log_of_another_evaluation_is_not_continued(bundle, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"policy": "another"}) + "\n")
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluate(Evaluation(policy=bundle.path, episodes=1, seed=0), "cpu", log=log)


def test_a_policy_that_takes_a_pose_is_not_fed_joints(make_bundle):
    posed = posed_config(joints=1)  # as many values as the environment gives
    fields = {"architecture": posed.architecture, "proprioception": posed.proprioception}
    task = Evaluation(policy=make_bundle(**fields).path, episodes=1, seed=0)
    with pytest.raises(UserError, match="takes the end effector's pose, and tabletop gives"):
        evaluate(task, "cpu")


def results(successes):
    return [
        EpisodeResult(i, "put", "", bool(s), 10, (50.0, 1.0, 2.0)) for i, s in enumerate(successes)
    ]


def test_the_summary_leaves_the_cold_first_step_out():
    summary = summarise(results([1, 1, 0, 1]))
    assert summary["success_rate"] == 0.75 and summary["episodes"] == 4
    assert summary["ci95"][0] == pytest.approx(0.1941, abs=1e-4)
    assert summary["latency_ms"] == {"p50": 1.5, "p99": 2.0}


def test_the_comparison_is_first_minus_second():
    found = compare(results([1, 1, 1, 0]), results([1, 0, 0, 0]))
    assert found["difference"] == 0.5 and found["first_only"] == 2 and found["neither"] == 1
    assert found["ci95"][0] < 0.5 < found["ci95"][1]


def test_a_swapped_instruction_is_another_valid_one_of_the_scene():
    env, plain = SeededTabletop([], (0.0, 0.0), swap_instruction=True), TabletopEnv()
    for seed in range(20):
        env.set_seeds([seed])
        seen, told = env.reset()
        plain.reset(seed=seed)
        scene = plain.world.scene
        assert told["instruction"] != scene.instruction
        assert told["instruction"] in scene.instructions
        assert decode_text(seen["instruction"]) == told["instruction"]


def test_text_survives_the_journey():
    for text in ("", "put the red cube on the blue plate"):
        assert decode_text(encode_text(text)) == text
