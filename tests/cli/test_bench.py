import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.timing import percentiles, ratio_interval, synthetic_observation, timed
from rlrc_ros.vla import load_policy

times = st.lists(st.floats(0.1, 100), min_size=10, max_size=40)


@settings(max_examples=20)
@given(times, st.floats(0.1, 10))
def test_a_constant_ratio_is_found_whatever_the_drift(reference, factor):
    low, high = ratio_interval([factor * t for t in reference], reference)
    assert low == pytest.approx(factor) and high == pytest.approx(factor)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        a, b = rng.lognormal(0, 0.2, (2, 60))
        low, high = ratio_interval(1.5 * a, b)
        covered += low <= 1.5 <= high
    assert 88 <= covered <= 100


def test_percentiles():
    assert percentiles(range(1, 102)) == (51, 100)


@pytest.mark.parametrize("engine", ["eager", "unrolled"])
def test_observations_fit_the_policy_and_differ(policies, engine):
    policy = load_policy(policies / "tabletop-original", engine=engine)
    seen = [synthetic_observation(policy.config, "stack the red cube", seed) for seed in (0, 1, 0)]
    assert seen[0].images["front"].shape == (64, 64, 3)
    assert (seen[0].images["front"] == seen[2].images["front"]).all()
    assert (seen[0].images["front"] != seen[1].images["front"]).any()
    assert seen[0].proprioception.shape == (8,)


def test_every_policy_in_every_engine(rlrc, shipped, tmp_path):
    before = torch.get_num_threads()
    out = tmp_path / "times.json"
    words = ["bench", "--policy", "tabletop-original", "--policy", "tabletop-compressed"]
    options = ["--engine", "eager", "unrolled", "--rounds", "12", "--out", out, "--threads", "2"]
    status, printed, _ = rlrc(*words, *options, "--json")
    found = json.loads(printed)
    assert status == 0
    assert [row["label"] for row in found["policies"]] == [
        f"tabletop-{name} {engine} float32"
        for name in ("original", "compressed")
        for engine in ("eager", "unrolled")
    ]
    assert found["machine"]["threads"] == 2 and torch.get_num_threads() == before
    first, *others = found["policies"]
    assert "against_first" not in first
    for row in others:
        ratio = row["against_first"]
        low, high = ratio["latency_p50_ci95"]
        assert low <= high and ratio["latency_p50"] == pytest.approx(
            row["latency_ms"]["p50"] / first["latency_ms"]["p50"]
        )
    assert all(r["latency_ms"]["p99"] >= r["latency_ms"]["p50"] > 0 for r in found["policies"])
    assert others[1]["against_first"]["memory_llm"] < 0.8
    assert others[1]["memory_bytes"]["llm"] < others[1]["memory_bytes"]["total"]

    raw = json.loads(out.read_text())
    assert [len(row["times_ms"]) for row in raw["policies"]] == [12] * 4
    assert raw["machine"] == found["machine"] and raw["machine"]["cpu"]
    row = raw["policies"][0]
    assert percentiles(row["times_ms"])[0] == row["latency_ms"]["p50"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("times")] == ["times.json"]


def test_a_policy_against_itself_has_two_labels_and_one_speed(rlrc, shipped):
    words = ["bench", "--policy", "tabletop-original", "--policy", "tabletop-original"]
    status, printed, _ = rlrc(*words, "--rounds", "40", "--json")
    first, second = json.loads(printed)["policies"]
    assert status == 0 and second["label"] == f"{first['label']} #2"
    assert 0.5 < second["against_first"]["latency_p50"] < 2
    assert second["against_first"]["memory_total"] == 1


def test_dtypes_are_told_apart(rlrc, shipped):
    words = ["bench", "--policy", "tabletop-original", "--dtype", "float32", "bfloat16"]
    status, printed, _ = rlrc(*words, "--rounds", "10")
    assert status == 0
    assert "tabletop-original unrolled float32" in printed
    assert "tabletop-original unrolled bfloat16" in printed
    assert "0.5" in printed.splitlines()[2]  # of the memory


def test_the_table_is_for_people(rlrc, shipped):
    words = ["bench", "--policy", "tabletop-original", "--policy", "tabletop-compressed"]
    status, printed, _ = rlrc(*words, "--rounds", "10")
    head, first, second = printed.splitlines()[:3]
    assert status == 0 and len(head) == len(first.ljust(len(head))) == len(second) <= 110
    assert "p50 ms" in head and "×" in second and "×" not in first


@pytest.mark.parametrize(
    ("instruction", "message"),
    [("", "the instruction is empty"), ("sing a song", "does not know these words")],
)
def test_an_instruction_that_the_policy_cannot_read(refused, shipped, instruction, message):
    assert message in refused(
        "bench", "--policy", "tabletop-original", "--instruction", instruction
    )


def test_a_file_that_cannot_be_written_is_said_before_the_measurement(refused, shipped, tmp_path):
    words = ["bench", "--policy", "tabletop-original", "--out", tmp_path / "none" / "times.json"]
    assert f"there is no directory {tmp_path / 'none'}" in refused(*words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(rlrc, shipped):
    words = ["bench", "--policy", "tabletop-original", "--device", "cuda", "--rounds", "10"]
    status, printed, _ = rlrc(*words, "--json")
    row = json.loads(printed)["policies"][0]
    assert status == 0 and row["device"].startswith("cuda") and row["dtype"] == "bfloat16"


def test_one_action_takes_time(policies):
    policy = load_policy(policies / "tabletop-original")
    observation = synthetic_observation(policy.config, "stack the red cube", 0)
    assert 0 < timed(policy, observation) < 10_000


@pytest.fixture
def small_shape(monkeypatch):
    from rlrc_ros.cli import bench_shape
    from rlrc_ros.vla.config import ActionHeadConfig, LayerWidths
    from tests.conftest import bundle_config
    from tests.vla.checkpoints import architecture

    def shape():
        config = architecture(layers=8)
        whole = dataclasses.replace(config.decoder, layers=(LayerWidths(2, 2, 1280),) * 8)
        config = dataclasses.replace(config, decoder=whole)
        return bundle_config(architecture=config, proprioception=None)

    def oft():
        config = shape()
        head = ActionHeadConfig(chunk=8, dimensions=7)
        inside = dataclasses.replace(config.architecture, images=2, action_head=head)
        cameras = tuple(dataclasses.replace(config.cameras[0], name=name) for name in "ab")
        return dataclasses.replace(config, architecture=inside, cameras=cameras)

    monkeypatch.setitem(bench_shape.SHAPES, "openvla-7b", shape)
    monkeypatch.setitem(bench_shape.SHAPES, "openvla-7b-oft", oft)


def test_an_architecture_with_random_weights(rlrc, small_shape, tmp_path):
    out = tmp_path / "shape.json"
    words = ["--shape", "openvla-7b", "--rounds", "10", "--device", "cpu", "--out", out]
    status, printed, _ = rlrc("bench", *words, "--json")
    assert status == 0
    facts, raw = json.loads(printed), json.loads(out.read_text())
    names = ["generate", "full", "pruned", "pruned-nf4", "planned", "planned-nf4"]
    assert [row["variant"] for row in facts["variants"]] == names
    generate, full, pruned, pruned_nf4, planned, _ = facts["variants"]
    assert len(pruned["layers"]) == 8 and len(planned["layers"]) < 8
    for small in (pruned, planned):
        assert small["parameters"]["llm"] < full["parameters"]["llm"]
    assert planned["parameters"]["llm"] <= pruned["parameters"]["llm"]
    assert pruned_nf4["bytes"]["total"] < pruned["bytes"]["total"] < full["bytes"]["total"]
    assert full["against_eager"]["share_of_tokens_different"] == 0.0
    assert generate["against_generate"]["times_faster"] == 1.0
    for row, saved in zip(facts["variants"], raw["variants"], strict=True):
        low, high = row["against_generate"]["times_faster_ci95"]
        assert 0 < low <= high and row["floor_ms"] > 0
        assert len(saved["times_ms"]) == (1 if row is generate else 10)


@pytest.fixture
def small_pi0(monkeypatch):
    from rlrc_ros.cli import bench_pi0
    from tests.vla.pi0_policies import pi0_config

    shape = {"layers": ((10, 1, 1280),) * 3, "expert": ((10, 1, 1280),) * 3, "proprioception": 0}
    monkeypatch.setitem(bench_pi0.SHAPES, "pi0", lambda: pi0_config(**shape))


def test_pi0_with_random_weights(rlrc, small_pi0, tmp_path):
    out = tmp_path / "shape.json"
    words = ["--shape", "pi0", "--rounds", "10", "--device", "cpu", "--out", out]
    variants = ["full", "full-nf4", "pruned", "pruned-both", "pruned-nf4", "shallow"]
    status, printed, _ = rlrc("bench", *words, "--variants", ",".join(variants), "--json")
    assert status == 0
    rows, raw = json.loads(printed)["variants"], json.loads(out.read_text())["variants"]
    assert [row["variant"] for row in rows] == ["transformers", *variants]
    reference, full, nf4, pruned, both, _, shallow = rows
    compared = full["against_transformers_actions"]
    assert compared["max_difference"] < 1e-4 < compared["mean_distance_from_noise"]
    assert full["parameters"] == reference["parameters"]
    assert nf4["bytes"]["total"] < full["bytes"]["total"] < reference["bytes"]["total"]
    assert pruned["llm_layers"] == [[10, 1, 1280], [1, 1, 128], [10, 1, 1280]]
    assert pruned["parameters"]["expert"] == full["parameters"]["expert"]
    assert both["parameters"]["expert"] < full["parameters"]["expert"]
    assert len(shallow["llm_layers"]) == len(shallow["expert_layers"]) == 1
    for row, saved in zip(rows, raw, strict=True):
        low, high = row["against_transformers"]["times_faster_ci95"]
        assert 0 < low <= high and row["floor_ms"] > 0 and len(saved["times_ms"]) == 10


def test_an_architecture_that_gives_chunks(rlrc, small_shape):
    words = ["--shape", "openvla-7b-oft", "--variants", "full,pruned-nf4", "--device", "cpu"]
    status, printed, _ = rlrc("bench", *words, "--rounds", "10", "--json")
    assert status == 0
    forward, full, pruned = json.loads(printed)["variants"]
    assert full["against_eager"]["max_action_diff"] < 1e-4 < full["against_eager"]["action_std"]
    assert full["bytes"]["action_head"] == 4 * full["parameters"]["action_head"] > 0
    assert pruned["bytes"]["total"] < full["bytes"]["total"]
    assert forward["against_forward"]["times_faster"] == 1.0
    for row in (forward, full, pruned):
        assert row["floor_ms"] > 0 and row["latency_ms"]["p50"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "pi0", "--variants", "planned"], "there is no variant 'planned'; there are: "),
        ([], "name either policies with --policy, or an architecture with --shape, or --ros"),
        (["--shape", "openvla-7b", "--variants", "full,tiny"], "there is no variant 'tiny'; there"),
        (["--shape", "openvla-70b"], "invalid choice: 'openvla-70b'"),
    ],
)
def test_a_shape_that_is_none(refused, words, message):
    assert message in refused("bench", *words)
