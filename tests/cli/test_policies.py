"""What the verbs say about policies that are missing, damaged, or make no sense."""

import json
import re
import shutil

import pytest

from rlrc_ros.vla.bundle import FILES, SUMS
from tests.cli.conftest import seal


def edit(path, name, change):
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))
    seal(path)


def flip(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "model.safetensors").write_bytes(data)


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def truncate_and_seal(path):
    truncate(path)
    seal(path)


def more_layers(path):
    def change(config):
        config["architecture"]["decoder"]["layers"] *= 2

    edit(path, "config.json", change)


def climb(path):
    with (path / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  ../../etc/passwd\n")


def write(name, content, sealed=True):
    def damage(path):
        (path / name).write_bytes(content)
        if sealed:
            seal(path)

    return damage


DAMAGES = {
    "no such directory": (shutil.rmtree, "no such bundle directory"),
    "no checksums": (lambda p: (p / SUMS).unlink(), "not a policy bundle"),
    "checksums are noise": (write(SUMS, b"\xff\xfe\x00", False), "SHA256SUMS:1: not a checksum"),
    **{
        f"no {name}": (lambda p, name=name: (p / name).unlink(), f"{name} is missing")
        for name in FILES
    },
    "flipped byte": (flip, "model.safetensors differs from its checksum"),
    "truncated weights": (truncate, "model.safetensors differs from its checksum"),
    "truncated weights, sealed": (truncate_and_seal, "not a readable safetensors file"),
    "more layers": (more_layers, "asks for 6 decoder layers, the file holds 3"),
    "path traversal": (climb, "not a checksum of a file in this directory"),
    "no config": (write("config.json", b"{"), "config.json:1: not valid JSON"),
    "deep config": (write("config.json", b"[" * 100_000), "config.json: cannot be read"),
    "no provenance": (write("provenance.json", b"[]"), "provenance.json: expected keys"),
}
VERBS = {
    "inspect": ["inspect", "POLICY"],
    "eval": ["eval", "--policy", "POLICY", "--episodes", "1"],
    "against": ["eval", "--policy", "GOOD", "--episodes", "1", "--against", "POLICY"],
    "bench": ["bench", "--policy", "POLICY", "--rounds", "10"],
    "sft": ["sft", "tiny", "--policy", "POLICY", "--out", "OUT", "--demonstrations", "DEMOS"],
    "prune": ["prune", "tiny", "--policy", "POLICY", "--out", "OUT", "--demonstrations", "DEMOS"],
    "rl": ["rl", "tiny", "--policy", "POLICY", "--out", "OUT", "--demonstrations", "DEMOS"],
    "quantize": ["quantize", "tiny", "--policy", "POLICY", "--out", "OUT"],
}


def command(verb, policy, tmp_path, policies):
    names = {
        "POLICY": policy,
        "GOOD": policies / "tabletop-original",
        "OUT": tmp_path / "out",
        "DEMOS": tmp_path / "demonstrations",
    }
    return [names.get(word, word) for word in VERBS[verb]]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "against"])
def test_a_damaged_bundle_is_refused(refused, policy, policies, tmp_path, verb, damage):
    apply, message = DAMAGES[damage]
    apply(policy)
    assert message in refused(*command(verb, policy, tmp_path, policies))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_name_lists_the_short_names(refused, shipped, policies, tmp_path, verb):
    line = refused(*command(verb, "tabletop-orignal", tmp_path, policies))
    assert "tabletop-orignal: no such bundle directory" in line
    assert "tabletop-compressed, tabletop-original" in line


@pytest.mark.parametrize("name", ["../tabletop-original", "tabletop-original/../../x", "/etc"])
def test_a_name_does_not_climb_out(refused, shipped, name):
    assert any(
        reason in refused("inspect", name) for reason in ("no such bundle", "not a policy bundle")
    )


def test_a_tokenizer_that_cannot_be_read(refused, policy):
    write("tokenizer.json", b"{}")(policy)
    assert "tokenizer.json: not a readable tokenizer" in refused("bench", "--policy", policy)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("decoder", "hidden_size", -1, "decoder: hidden_size is -1, and must be at least 1"),
        ("decoder", "head_dim", 31, "head_dim is 31, and must be even"),
        ("decoder", "vocab_size", True, "'architecture.decoder.vocab_size' must be a number"),
        ("decoder", "rms_norm_eps", True, "must be a number, found true"),
        ("decoder", "bos_token_id", 9999, "a token id is outside the 320"),
        ("decoder", "layers", [], "'layers' is empty"),
        ("tower", "heads", 0, "vision tower: heads is 0"),
        ("tower", "patch", 0, "vision tower: patch is 0"),
        ("tower", "mean", [0.5], "mean and std need three values each"),
        ("tower", "std", [0.0, 1.0, 1.0], "those of std positive"),
        ("codec", "n_bins", 0, "n_bins is 0, and must be at least 2"),
        ("top", "cameras", [], "'cameras' is empty"),
        ("top", "control_rate", "fast", "control_rate"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(refused, policy, part, key, value, message):
    def change(config):
        places = {
            "decoder": config["architecture"]["decoder"],
            "tower": config["architecture"]["towers"][0],
            "codec": config["action_codec"],
            "top": config,
        }
        places[part][key] = value

    edit(policy, "config.json", change)
    line = refused("inspect", policy)
    assert message in line and "config.json" in line


@pytest.mark.parametrize("verb", ["eval", "bench", "prune", "quantize"])
def test_a_device_that_is_not_there(refused, policies, tmp_path, verb):
    words = command(verb, policies / "tabletop-original", tmp_path, policies)
    assert "device 'toaster' cannot be used" in refused(*words, "--device", "toaster")


@pytest.mark.parametrize("verb", ["sft", "prune", "rl", "quantize"])
def test_a_quantized_policy_cannot_be_trained(refused, policies, tmp_path, verb):
    words = command(verb, policies / "tabletop-compressed", tmp_path, policies)
    assert re.search("is quantized; (train|quantize) its parent instead", refused(*words))


def test_inspect_tells_all_as_json(rlrc, shipped):
    status, out, err = rlrc("inspect", "tabletop-compressed", "--json")
    facts = json.loads(out)
    assert status == 0 and err == "" and out.count("\n") == 1
    assert facts["parameters"]["llm"] > 0 and facts["bytes"]["llm"] > 0
    assert facts["layers"] == [{"heads": 1, "kv_heads": 1, "ffn": 64}] * 3
    assert len(facts["hash"]) == 64 and facts["provenance"]["stages"][0]["stage"] == "original"


def test_inspect_tells_people_the_same(rlrc, shipped):
    status, out, _ = rlrc("inspect", "tabletop-original")
    facts = json.loads(rlrc("inspect", "tabletop-original", "--json")[1])
    assert status == 0 and facts["hash"][:12] in out
    assert f"{facts['parameters']['llm']:,}" in out
