import json
from dataclasses import asdict, replace

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import LayerWidths
from training import latency, prune
from training.config import PruneConfig

LAYERS = ((4, 2, 128),) * 6


def table(**changes):
    facts = {
        "device": "a robot",
        "dtype": "float32",
        "hidden_size": 64,
        "head_dim": 32,
        "tokens": 33,
        "action_tokens": 7,
        "fixed_ms": 2.0,
        "full": LayerWidths(4, 2, 128),
        "attention": ((2, 1, 1.5), (2, 2, 1.7), (4, 2, 2.0)),
        "ffn": ((1, 1.0), (64, 1.6), (128, 2.0)),
    }
    return latency.BlockLatencies(**{**facts, **changes})


def planned(**changes):
    return PruneConfig(granularity="both", importance="magnitude", ffn_multiple=16, **changes)


def test_between_measured_widths_latency_is_interpolated():
    cost = latency.LatencyCost(table(), 10)
    assert cost.of([LayerWidths(4, 2, 128)] * 3) == pytest.approx(2 + 3 * 2.0)
    assert cost.of([LayerWidths(4, 2, 96)]) == pytest.approx(2 + 1.8)
    assert cost.of([LayerWidths(2, 1, 64)]) == pytest.approx(2 + 1.5 - 0.4)
    assert cost.of([LayerWidths(2, 2, 64)]) == pytest.approx(2 + 1.7 - 0.4)


def test_a_wider_block_that_measured_faster_counts_as_no_faster():
    cost = latency.LatencyCost(table(ffn=((1, 1.0), (64, 2.4), (128, 2.0))), 10)
    assert cost.channels(64) == cost.channels(128) == 0


def test_a_table_from_another_machine_is_planned_with(trainable, batches, tmp_path):
    policy, file = trainable(LAYERS), tmp_path / "robot.json"
    file.write_text(json.dumps(asdict(table())))
    config = planned(max_latency_ms=9.0, latency_of=str(file))
    plan = prune.prune(policy.model, batches(policy), config)
    assert plan.latency["device"] == "a robot" and plan.latency["predicted_ms"] <= 9.0
    assert latency.LatencyCost(table(), 9.0).of(plan.widths) <= 9.0
    assert len(policy.model.language_model.model.layers) == len(plan.layers) < 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "measured with hidden_size 32, the policy has 64"),
        ({"action_tokens": 3}, "measured with action_tokens 3, the policy has 7"),
    ],
)
def test_a_table_of_another_policy_is_refused(trainable, tmp_path, change, message):
    file = tmp_path / "robot.json"
    file.write_text(json.dumps(asdict(replace(table(), **change))))
    with pytest.raises(UserError, match=message):
        latency.read_table(file, trainable(LAYERS).model)


def test_a_budget_out_of_reach_says_what_can_be_reached(trainable, batches, tmp_path):
    policy, file = trainable(LAYERS), tmp_path / "robot.json"
    file.write_text(json.dumps(asdict(table())))
    with pytest.raises(UserError, match="at most 3 ms on a robot, at the least about 6 ms"):
        prune.prune(
            policy.model, batches(policy), planned(max_latency_ms=3.0, latency_of=str(file))
        )


@pytest.mark.parametrize("slower", [1.0, 1.4])
def test_a_plan_that_measures_too_slow_is_tightened(trainable, batches, monkeypatch, slower):
    """Real time is replaced by the table's, and whole plans take longer than their blocks say."""
    truth = latency.LatencyCost(table(), 12.0)
    monkeypatch.setattr(latency, "measure", lambda model, device: table())
    monkeypatch.setattr(
        latency, "median", lambda found, model, device: slower * truth.of(found.decoder.layers)
    )
    policy, threads = trainable(LAYERS), torch.get_num_threads()
    config = planned(max_latency_ms=12.0, latency_of="cpu")
    plan = prune.prune(policy.model, batches(policy), config)
    assert plan.latency["measured_ms"] <= 12.0 and plan.latency["measured_ms"] > 9.0
    assert 0 < plan.removed < 1 and torch.get_num_threads() == threads
    assert policy.model.config.decoder.layers == plan.widths


def test_a_device_that_keeps_no_promise_is_an_error(trainable, batches, monkeypatch):
    monkeypatch.setattr(latency, "measure", lambda model, device: table())
    monkeypatch.setattr(latency, "median", lambda found, model, device: 12.5)
    policy = trainable(LAYERS)
    config = planned(max_latency_ms=12.0, latency_of="cpu")
    with pytest.raises(UserError, match=r"should take 12 ms took 12\.5 ms on a robot"):
        prune.prune(policy.model, batches(policy), config)


def test_measuring_by_command(make_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "ROUNDS", 3)
    bundle, out = make_bundle(layers=LAYERS), tmp_path / "here.json"
    argv = ["latency", str(bundle.path), "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    threads = torch.get_num_threads()
    latency.main()
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["full"] == {"heads": 4, "kv_heads": 2, "ffn": 128}
    assert {tuple(row[:2]) for row in found["attention"]} == {(2, 1), (2, 2), (4, 2)}
    assert all(row[-1] > 0 for row in found["attention"] + found["ffn"])
    monkeypatch.setattr("sys.argv", [*argv[:1], "nowhere", *argv[2:]])
    with pytest.raises(SystemExit, match="nowhere"):
        latency.main()
