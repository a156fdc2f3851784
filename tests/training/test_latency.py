import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla.bundle import provenance, write_bundle
from rlrc_ros.vla.config import LayerWidths
from rlrc_ros.vla.policy import build_model
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS, bundle_config, chunked
from tests.vla.pi0_policies import architecture, pi0_config, random_pi0
from training import latency, prune, prune_pi0
from training.bundles import Trainable
from training.config import PruneConfig
from training.planning import decoders_of

LAYERS = ((4, 2, 128),) * 6
EXPERT = ((4, 1, 64),) * 6
UNEVEN = ((4, 1, 64), (1, 1, 32)) * 3
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


def pi0_table(engine="graph", **changes):
    """Of a policy of `pi0_policies`, a layer of it 3 ms."""
    facts = {
        "kind": "pi0",
        "engine": engine,
        "head_dim": 16,
        "tokens": 16 + 3 * 16,
        "action_tokens": 6,
        "steps": 4,
        "full": LayerWidths(4, 1, 128),
        "attention": ((1, 1, 2.6), (2, 1, 2.8), (4, 1, 3.0)),
        "ffn": ((32, 2.2), (128, 3.0)),
        "expert": latency.Blocks(
            hidden_size=32,
            full=LayerWidths(4, 1, 64),
            attention=((1, 1, 2.7), (4, 1, 3.0)),
            ffn=((32, 2.6), (64, 3.0)),
        ),
    }
    return table(**{**facts, **changes})


@pytest.fixture
def file(tmp_path):
    """file(table) → where it was written."""

    def write(found):
        path = tmp_path / "robot.json"
        path.write_text(json.dumps(asdict(found)))
        return str(path)

    return write


def planned(granularity="both", **changes):
    return PruneConfig(granularity=granularity, importance="magnitude", ffn_multiple=16, **changes)


def oft():
    config = chunked(bundle_config(LAYERS))
    return Trainable(build_model(config), config, word_tokenizer(WORDS), None)


def pi0(layers=((4, 1, 128),) * 6, expert=EXPERT):
    config = pi0_config(layers=layers, expert=expert)
    return Trainable(random_pi0(config.architecture), config, word_tokenizer(WORDS), None)


def test_between_measured_widths_latency_is_interpolated():
    def of(*widths):
        layers = {"llm": [LayerWidths(*w) for w in widths]}
        return table().of_policy(latency.with_layers(bundle_config().architecture, layers))

    assert of(*[(4, 2, 128)] * 3) == pytest.approx(2 + 3 * 2.0)
    assert of((4, 2, 96)) == pytest.approx(2 + 1.8)
    assert of((2, 1, 64)) == pytest.approx(2 + 1.5 - 0.4)
    assert of((2, 2, 64)) == pytest.approx(2 + 1.7 - 0.4)


def test_a_wider_block_that_measured_faster_counts_as_no_faster():
    blocks = table(ffn=((1, 1.0), (64, 2.4), (128, 2.0)))
    assert blocks.of_channels(64) == blocks.of_channels(128) == 0


def test_a_table_from_another_machine_is_planned_with(trainable, batches, file):
    policy = trainable(LAYERS)
    config = planned(max_latency_ms=9.0, latency_of=file(table()))
    plan = prune.prune(policy.model, batches(policy), config)
    assert plan.latency["device"] == "a robot" and plan.latency["predicted_ms"] <= 9.0
    assert table().of_policy(policy.model.config) == plan.latency["predicted_ms"]
    assert len(policy.model.language_model.model.layers) == len(plan.layers) < 6


def test_a_policy_of_chunks_is_planned_with_a_table_of_chunks(file):
    policy, of_tokens = oft(), file(table(action_tokens=56))
    config = planned(max_latency_ms=9.0, latency_of=of_tokens)
    with pytest.raises(UserError, match="kind openvla, the policy has openvla-oft"):
        prune.run(config, policy, None, seed=0)
    of_chunks = table(action_tokens=56, kind="openvla-oft", engine="eager")
    file(of_chunks)
    facts = prune.run(config, policy, None, seed=0)
    assert facts["latency"]["predicted_ms"] == of_chunks.of_policy(policy.model.config) <= 9.0
    with pytest.raises(UserError, match="chunk of actions cannot take at most 3 ms on a robot, at"):
        prune.run(replace(config, max_latency_ms=3.0), oft(), None, seed=0)


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("part", ["llm", "expert"])
@pytest.mark.parametrize("granularity", ["width", "depth", "both"])
@pytest.mark.parametrize("protect", [None, 0])
def test_of_pi0_every_budget_is_met_or_the_least_is_told(engine, part, granularity, protect, file):
    """By the table's time of what is left; and what is told as the least can be reached."""
    found = pi0_table(engine)
    config = planned(
        granularity, part=part, protect=protect, max_latency_ms=1, latency_of=file(found)
    )
    with pytest.raises(UserError, match="chunk of actions cannot take at most 1 ms") as error:
        prune_pi0.run(config, pi0(), None, seed=0)
    least = float(str(error.value).partition("at the least about ")[2].split()[0])
    whole = found.of_policy(pi0().model.config)
    for budget in (least + 0.01, (least + whole) / 2, whole):
        policy = pi0()
        asked = replace(config, max_latency_ms=budget)
        facts = prune_pi0.run(asked, policy, None, seed=0)
        left = found.of_policy(policy.model.config)
        assert facts["latency"]["predicted_ms"] == pytest.approx(left) and left <= budget + 1e-9
        if budget < least + 0.02:
            assert left > least - 0.02
    decoder, expert = policy.model.config.decoder.layers, policy.model.config.expert.layers
    assert len(decoder) == len(expert) == 6 and set(expert) == {LayerWidths(4, 1, 64)}


@pytest.mark.parametrize("part", ["llm", "expert"])
@pytest.mark.parametrize("granularity", ["width", "depth", "both"])
def test_of_pi0_what_the_other_part_takes_is_counted(part, granularity, file):
    """Whose layers differ in width: those with less beside them are the first to go."""
    shape = {"layers": ((4, 1, 128),) * 6, "expert": EXPERT}
    shape |= {"llm": {"expert": UNEVEN}, "expert": {"layers": UNEVEN}}[part]
    found = pi0_table()
    for saved in (0.5, 1.0, 2.0, 4.6) if granularity != "width" else (0.5, 1.0):
        policy = pi0(**shape)
        budget = found.of_policy(policy.model.config) - saved
        config = planned(granularity, part=part, max_latency_ms=budget, latency_of=file(found))
        facts = prune_pi0.run(config, policy, None, seed=0)
        left = found.of_policy(policy.model.config)
        assert facts["latency"]["predicted_ms"] == pytest.approx(left) and left <= budget + 1e-9
        assert granularity != "width" or left > budget - 0.5


def test_on_a_gpu_the_last_layer_of_pi0s_language_model_takes_what_it_takes():
    shape = architecture(layers=((4, 1, 128), (4, 1, 128), (1, 1, 32)))
    assert pi0_table("graph").of_policy(shape) == pytest.approx(2 + 3 * 3.0)
    assert pi0_table("eager").of_policy(shape) == pytest.approx(2 + 3 * 3.0 - 0.4 - 0.8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "measured with hidden_size 32, the policy has 64"),
        ({"action_tokens": 3}, "measured with action_tokens 3, the policy has 7"),
        ({"tokens": 49}, "measured with tokens 49, the policy has 33"),
        ({"kind": "openvla-oft"}, "measured with kind openvla-oft, the policy has openvla"),
        (
            {"full": LayerWidths(2, 2, 64)},
            r"the llm were measured up to LayerWidths\(heads=2.*, the policy's go up to .*ffn=128",
        ),
    ],
)
def test_a_table_of_another_policy_is_refused(trainable, file, change, message):
    with pytest.raises(UserError, match=message):
        latency.read_table(Path(file(table(**change))), trainable(LAYERS).model)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (table(action_tokens=6, head_dim=16), "measured with kind openvla, the policy has pi0"),
        (pi0_table(steps=10), "measured with steps 10, the policy has 4"),
        (
            pi0_table(expert=replace(pi0_table().expert, hidden_size=48)),
            "measured with expert.hidden_size 48, the policy has 32",
        ),
        ({"full": {"heads": 8, "kv_heads": 1, "ffn": 64}}, "lack the times of a block of Layer"),
        ({"expert": None}, "'expert' is what a table of kind 'pi0' has"),
    ],
)
def test_a_table_that_is_not_of_this_pi0_is_refused(tmp_path, found, message):
    path = tmp_path / "robot.json"
    if isinstance(found, dict):
        found = asdict(pi0_table()) | found
    path.write_text(json.dumps(found if isinstance(found, dict) else asdict(found)))
    with pytest.raises(UserError, match=message):
        latency.read_table(path, random_pi0(architecture()))


def test_a_budget_out_of_reach_says_what_can_be_reached(trainable, batches, file):
    policy = trainable(LAYERS)
    config = planned(max_latency_ms=3.0, latency_of=file(table()))
    with pytest.raises(
        UserError, match="an action cannot take at most 3 ms on a robot, at the least about 6 ms"
    ):
        prune.prune(policy.model, batches(policy), config)


@pytest.mark.parametrize("slower", [1.0, 1.4])
def test_a_plan_that_measures_too_slow_is_tightened(trainable, batches, monkeypatch, slower):
    """Real time is replaced by the table's, and whole plans take longer than their blocks say."""
    monkeypatch.setattr(latency, "measure", lambda model, device: table())
    monkeypatch.setattr(
        latency, "median", lambda found, model, device: slower * table().of_policy(found)
    )
    policy, threads = trainable(LAYERS), torch.get_num_threads()
    config = planned(max_latency_ms=12.0, latency_of="cpu")
    plan = prune.prune(policy.model, batches(policy), config)
    assert plan.latency["measured_ms"] <= 12.0 and plan.latency["measured_ms"] > 9.0
    assert 0 < plan.removed < 1 and torch.get_num_threads() == threads
    assert policy.model.config.decoder.layers == plan.widths


def test_the_least_that_is_told_is_what_whole_plans_would_take(trainable, batches, monkeypatch):
    monkeypatch.setattr(latency, "measure", lambda model, device: table())
    monkeypatch.setattr(
        latency, "median", lambda found, model, device: 1.5 * table().of_policy(found)
    )
    policy = trainable(LAYERS)
    with pytest.raises(UserError, match=r"at most 7 ms on a robot, at the least about 9\.\d+ ms"):
        prune.prune(policy.model, batches(policy), planned(max_latency_ms=7.0, latency_of="cpu"))


def test_a_device_that_keeps_no_promise_is_an_error(trainable, batches, monkeypatch):
    monkeypatch.setattr(latency, "measure", lambda model, device: table())
    monkeypatch.setattr(latency, "median", lambda found, model, device: 12.5)
    policy = trainable(LAYERS)
    config = planned(max_latency_ms=12.0, latency_of="cpu")
    with pytest.raises(UserError, match=r"should take 12 ms took 12\.5 ms on a robot"):
        prune.prune(policy.model, batches(policy), config)


@pytest.mark.parametrize(
    ("device", "engine"),
    [("cpu", "eager"), ("cpu", "graph"), pytest.param("cuda", "graph", marks=on_gpu)],
)
@pytest.mark.parametrize("kind", ["openvla-oft", "pi0"])
def test_measured_where_it_runs(kind, device, engine, monkeypatch):
    """Within a budget that it meets as it is, a policy stays as it is."""
    monkeypatch.setattr(latency, "ROUNDS", 3)
    # On a CPU the graphs' code runs without graphs.
    monkeypatch.setattr(latency, "usual_engine", lambda *_: engine)
    policy, stage = (pi0(), prune_pi0) if kind == "pi0" else (oft(), prune)
    before = policy.model.config
    config = planned(protect=0, max_latency_ms=60_000, latency_of=device)
    facts = stage.run(config, policy, None, seed=0)
    assert 0 < facts["latency"]["measured_ms"] < 60_000 and facts["removed_of_layers"] == 0
    assert policy.model.config == before


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize(
    ("kind", "engine"), [("openvla", "unrolled"), ("openvla-oft", "eager"), ("pi0", "eager")]
)
def test_measuring_by_command(kind, engine, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "ROUNDS", 3)
    policy = {"openvla-oft": oft, "pi0": pi0}.get(kind)
    config = policy().config if policy else bundle_config(LAYERS)
    tensors, origin = build_model(config).state_dict(), provenance(None, "original")
    write_bundle(tmp_path / "policy", config, tensors, word_tokenizer(WORDS), origin)
    out = tmp_path / "here.json"
    argv = ["latency", str(tmp_path / "policy"), "--device", device, "--out", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    threads = torch.get_num_threads()
    latency.main()
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert (found["kind"], found["engine"]) == (kind, engine if device == "cpu" else "graph")
    parts = {"llm": found} | ({"expert": found["expert"]} if kind == "pi0" else {})
    for part, decoder in decoders_of(config.architecture).items():
        full = decoder.layers[0]
        assert parts[part]["full"] == asdict(full)
        heads = {(1, 1), (2, 1), (4, 1)} if kind == "pi0" else {(2, 1), (2, 2), (4, 2)}
        assert {tuple(row[:2]) for row in parts[part]["attention"]} == heads
        assert [row[0] for row in parts[part]["ffn"]] == [n for n in (32, 64, 128) if n <= full.ffn]
        assert all(row[-1] > 0 for row in parts[part]["attention"] + parts[part]["ffn"])
    assert latency.read_table(out, build_model(config)).of_policy(config.architecture) > 0
    monkeypatch.setattr("sys.argv", [*argv[:1], "nowhere", *argv[2:]])
    with pytest.raises(SystemExit, match="nowhere"):
        latency.main()
