"""Training files that make no sense, and places that cannot be written to."""

import dataclasses
import json
import re
import shutil

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.paths import config_file
from rlrc_ros.sim.tasks import VOCABULARY
from rlrc_ros.timing import INSTRUCTION, synthetic_observation
from rlrc_ros.vla import load_policy
from rlrc_ros.vla.bundle import open_bundle, provenance, write_bundle
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS
from tests.vla.pi0_policies import pi0_config, random_pi0
from training.bundles import load_trainable
from training.config import load_config
from training.data.collect import collect_demonstrations

TINY = config_file("training", "tiny").read_text()


@pytest.fixture
def compress(refused, tmp_path):
    """compress(text of the YAML) → the line that tells what is wrong with it."""

    def run(text):
        file = tmp_path / "run.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        line = refused("compress", file, "--out", tmp_path / "out")
        assert str(file) in line
        assert not (tmp_path / "out").exists()
        return line

    return run


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  steps: 40", "  stepz: 40", "unknown key 'sft.stepz'; did you mean 'steps'?"),
        ("at_step: 20", "on_step: 20", "unknown key 'sft.corrections[0].on_step'"),
        ("\nseed: 0\n", "\nseed: 0\nspeed: 3\n", "unknown key 'speed'"),
        ("  hidden_size: 128\n", "", "'model.hidden_size' is missing"),
        ("\nseed: 0", "\nseed: zero", '"seed"'),
        ("\nseed: 0", "\nseed: -1", "'seed' is -1"),
        ("\nseed: 0", "\nseed: true", "'seed' must be a number, found true"),
        ("steps: 40", "steps: 0", "sft: 'steps' is 0, and must be above 0"),
        ("steps: 40", "steps: 15", "corrections are due at step 20, and there are 15 steps"),
        ("learning_rate: 1.0e-3", "learning_rate: .nan", "'learning_rate' is nan"),
        ("remove: 0.9", "remove: 1.5", "'remove' is a share"),
        ("keep_layers: 3", "keep_layers: 1", "'keep_layers' must be at least 2"),
        ("seeds: [0]", "seeds: []", "'seeds' must name at least one"),
        ("seeds: [0]", "seeds: [1, 1]", "and each once"),
        ("environments: 2", "environments: 0", "rl: 'environments' is 0"),
        ("heads: 3,", "heads: 5,", "96 into 5 heads"),
        ("nf4", "nf5", "method"),
        ("environment: tabletop", "environment: kitchen", "environment"),
        ("episodes: 12", "episodes: 0", "demonstrations: 'episodes' is 0"),
        ("episodes: 2\n", "episodes: -2\n", "evaluate: 'episodes' is -2"),
    ],
)
def test_a_mistake_in_a_training_file_is_named(compress, old, new, message):
    assert old in TINY
    assert message in compress(TINY.replace(old, new))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "not valid YAML"),
        ("- a\n- b", "expected keys and values, found list"),
        ("", "expected keys and values, found NoneType"),
        (b"\xff\xfe\xfa", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("seed: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("a: 1\n\tb: 2", ":2: not valid YAML"),
    ],
)
def test_what_is_no_training_file(compress, text, message):
    assert message in compress(text)


def test_a_training_file_that_is_not_there_lists_the_packages_own(refused, tmp_path):
    line = refused("compress", "tabeltop", "--out", tmp_path / "out")
    assert "tabeltop: no such file, and not among" in line and "tabletop, tiny" in line


def test_a_run_of_another_configuration_is_not_continued(refused, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    line = refused("compress", "tiny", "--out", tmp_path, "--device", "cpu")
    assert "holds a run of another configuration" in line
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("verb", ["compress", "quantize", "demo"])
def test_out_below_a_file(refused, policies, tmp_path, verb):
    if verb == "demo":
        pytest.importorskip("rlrc.msg", reason="the ROS interfaces are not built")
    (tmp_path / "file").touch()
    words = {
        "compress": ["compress", "tiny"],
        "quantize": ["quantize", "tiny", "--policy", policies / "tabletop-original"],
        "demo": ["demo"],
    }[verb]
    line = refused(*words, "--out", tmp_path / "file" / "out")
    assert f"{tmp_path / 'file'}" in line
    assert "Not a directory" in line or "File exists" in line


def test_an_existing_bundle_is_not_replaced(refused, policies, tmp_path):
    policy = policies / "tabletop-original"
    line = refused("quantize", "tiny", "--policy", policy, "--out", tmp_path)
    assert "is there already" in line


@pytest.mark.parametrize("verb", ["compress", "quantize"])
def test_a_place_that_cannot_be_written_to_is_found_out_first(refused, policies, disk, verb):
    place = disk("ro") / "out"
    words = {
        "compress": ["compress", "tiny"],
        "quantize": ["quantize", "tiny", "--policy", policies / "tabletop-original"],
    }[verb]
    assert "Read-only file system" in refused(*words, "--out", place)


def test_a_full_disk(refused, policies, disk):
    place = disk("size=64k")
    words = ["quantize", "tiny", "--policy", policies / "tabletop-original"]
    line = refused(*words, "--out", place / "small")
    assert "No space left on device" in line
    assert not (place / "small").exists()


def test_demonstrations_that_are_not_there(refused, policies, tmp_path):
    policy = policies / "tabletop-original"
    words = ["prune", "tiny", "--policy", policy, "--out", tmp_path / "out"]
    line = refused(*words, "--demonstrations", tmp_path / "none")
    assert f"{tmp_path / 'none'}: no demonstrations there" in line


def test_stages_one_by_one_and_a_checkpoint_of_something_else(rlrc, refused, tmp_path):
    data, file = tmp_path / "demonstrations", tmp_path / "run.yaml"
    short = TINY.replace("steps: 40", "steps: 4").replace("steps: 20", "steps: 4")
    file.write_text(re.sub(r"  corrections:\n.*\n", "", short))
    config = load_config(file).demonstrations
    collect_demonstrations(data, dataclasses.replace(config, episodes=2), workers=1)

    def words(verb, out, *more):
        places = ["--demonstrations", data] if verb != "quantize" else []
        return [verb, file, "--out", tmp_path / out, "--device", "cpu", *places, *more]

    # An earlier command was stopped, and its checkpoint was made with another seed.
    (tmp_path / "original-work").mkdir()
    (tmp_path / "original-work" / "config.json").write_text('{"seed": 7}')
    assert "holds a run of another configuration" in refused(*words("sft", "original"))
    shutil.rmtree(tmp_path / "original-work")

    assert rlrc(*words("sft", "original"))[0] == 0
    assert rlrc(*words("prune", "pruned", "--policy", tmp_path / "original"))[0] == 0
    assert rlrc(*words("sft", "recovered", "--policy", tmp_path / "pruned"))[0] == 0
    assert rlrc(*words("rl", "refined", "--policy", tmp_path / "recovered"))[0] == 0
    status, printed, _ = rlrc(*words("quantize", "small", "--policy", tmp_path / "refined"))
    assert status == 0 and printed.startswith(str(tmp_path / "small"))
    facts = json.loads(rlrc("inspect", tmp_path / "small", "--json")[1])
    made = [stage["stage"] for stage in facts["provenance"]["stages"]]
    assert made == ["original", "pruned", "recovered", "rl", "compressed"]
    left = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    works = {"original-work", "recovered-work", "refined-work"}
    bundles = {"original", "pruned", "recovered", "refined", "small"}
    assert left == {"demonstrations"} | works | bundles
    assert not list(tmp_path.rglob("checkpoint*"))


def test_quantizing_gives_a_smaller_policy(rlrc, policies, tmp_path):
    policy, out = policies / "tabletop-original", tmp_path / "small"
    status, printed, _ = rlrc("quantize", "tiny", "--policy", policy, "--out", out, "--json")
    made = json.loads(printed)
    assert status == 0 and made["bundle"] == str(out) and made["method"] == "bitsandbytes-nf4"
    before, after = (json.loads(rlrc("inspect", p, "--json")[1]) for p in (policy, out))
    assert after["hash"] == made["hash"] and after["provenance"]["parent"] == before["hash"]
    assert after["bytes"]["llm"] < before["bytes"]["llm"]
    assert (out / "model.safetensors").stat().st_mode & 0o777 == (
        out / "config.json"
    ).stat().st_mode & 0o777


@pytest.fixture
def pi0_bundle(tmp_path):
    config = pi0_config(("front",))
    model = random_pi0(config.architecture)
    origin = provenance(None, "original")
    tokenizer = word_tokenizer(WORDS)
    return write_bundle(tmp_path / "pi0", config, model.state_dict(), tokenizer, origin)


def with_prune_section(path, text):
    begin, end = TINY.index("prune:"), TINY.index("recovery:")
    path.write_text(f"{TINY[:begin]}prune:\n{text}\n{TINY[end:]}")
    return path


def test_pi0_pruned_then_quantized(rlrc, pi0_bundle, tmp_path):
    lines = "  remove: 0.3\n  granularity: both\n  importance: magnitude\n  ffn_multiple: 16\n"
    file = with_prune_section(tmp_path / "run.yaml", lines + "  part: expert\n")
    words = [file, "--device", "cpu", "--json"]
    pruned, small = tmp_path / "pruned", tmp_path / "small"
    status, printed, _ = rlrc("prune", *words, "--policy", pi0_bundle.path, "--out", pruned)
    assert status == 0 and json.loads(printed)["part"] == "expert"
    status, _, _ = rlrc("quantize", *words, "--policy", pruned, "--out", small)
    assert status == 0
    status, printed, _ = rlrc("inspect", small, "--json")
    facts = json.loads(printed)
    assert status == 0 and facts["quantization"]["parts"] == ["llm"]
    assert facts["expert_layers"] != [{"heads": 4, "kv_heads": 1, "ffn": 64}] * 3
    assert "expert layers (query heads" in rlrc("inspect", small)[1]
    assert load_policy(small).act(synthetic_observation(open_bundle(small).config, INSTRUCTION, 0))


def test_pi0_fine_tuned(rlrc, tmp_path):
    architecture = pi0_config(("front",)).architecture
    tower = dataclasses.replace(architecture.towers[0], image_size=128, patch=32)
    config = dataclasses.replace(
        pi0_config(("front",)), architecture=dataclasses.replace(architecture, towers=(tower,))
    )
    text, data = TINY.replace("steps: 20", "steps: 2"), tmp_path / "demonstrations"
    file = tmp_path / "run.yaml"
    file.write_text(text)
    wanted = dataclasses.replace(load_config(file).demonstrations, episodes=1)
    collect_demonstrations(data, wanted, workers=1)
    origin, tokenizer = provenance(None, "original"), word_tokenizer([*VOCABULARY, "in", "out"])
    weights = random_pi0(config.architecture).state_dict()
    bundle = write_bundle(tmp_path / "pi0", config, weights, tokenizer, origin)
    words = ["sft", file, "--policy", bundle.path, "--out", tmp_path / "trained"]
    status, printed, _ = rlrc(*words, "--demonstrations", data, "--device", "cpu", "--json")
    assert status == 0 and json.loads(printed)["loss"] > 0
    trained = open_bundle(tmp_path / "trained")
    assert trained.config.architecture == config.architecture
    assert trained.provenance["parent"] == bundle.hash


def test_what_pi0_takes_to_be_pruned(refused, pi0_bundle, tmp_path):
    file = with_prune_section(tmp_path / "run.yaml", "  remove: 0.4\n  granularity: both")
    words = [file, "--policy", pi0_bundle.path, "--out", tmp_path / "out", "--device", "cpu"]
    assert "importance 'taylor' is measured on demonstrations; name some" in refused(
        "prune", *words
    )


def test_a_pi0_is_no_teacher_of_tokens(pi0_bundle):
    with pytest.raises(UserError, match="is a pi0 policy; this takes one that decides by action"):
        load_trainable(pi0_bundle.path, torch.device("cpu"))
