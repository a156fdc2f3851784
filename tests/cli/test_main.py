import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlrc_ros.cli.main import VERBS, main

RLRC = Path(sys.executable).parent / "rlrc"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(rlrc, verb):
    status, out, err = rlrc(verb, "--help")
    assert status == 0 and err == ""
    assert out.startswith(f"usage: rlrc {verb}") and "--json" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_help_lists_every_verb_and_imports_nothing_slow():
    code = f"""
import sys
from rlrc_ros.cli.main import main
for words in ([], *([verb] for verb in {VERBS!r})):
    try:
        main([*words, "--help"])
    except SystemExit:
        pass
slow = {{"torch", "rclpy", "mujoco", "transformers", "matplotlib"}} & set(sys.modules)
sys.exit(f"imported: {{slow}}" if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"\n    {verb} " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: VERB; see rlrc --help"),
        (["compres"], "invalid choice: 'compres'"),
        (["eval"], "the following arguments are required: --policy; see rlrc eval --help"),
        (["eval", "--policy", "p", "--episodes", "0"], "'0' is not a whole number from 1 up"),
        (["eval", "--policy", "p", "--episodes", "ten"], "'ten' is not a whole number"),
        (["eval", "--policy", "p", "--seed", "-1"], "'-1' is not a whole number from 0 to"),
        (["eval", "--policy", "p", "--workers", "0"], "--workers"),
        (["eval", "--policy", "p", "--env", "kitchen"], "invalid choice: 'kitchen'"),
        (["eval", "--policy", "p", "--engine", "warp"], "invalid choice: 'warp'"),
        (["bench", "--policy", "p", "--rounds", "9"], "'9' is not a whole number from 10 up"),
        (["bench", "--policy", "p", "--threads", "0"], "--threads"),
        (["demo", "--out", "x", "--pairs", "0"], "--pairs"),
        (["compress", "tiny"], "--out"),
        (["inspect"], "policy"),
        (["bag", "mend", "x"], "invalid choice: 'mend'"),
        (["inspect", "--speed", "x"], "unrecognized arguments: --speed"),
    ],
)
def test_a_wrong_command_line_is_one_line(refused, words, message):
    assert message in refused(*words)


def test_the_executable_says_one_line_and_exits_2(tmp_path):
    done = subprocess.run(
        [RLRC, "inspect", tmp_path / "nothing"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no such bundle directory" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(policies):
    command = f"{RLRC} inspect {policies / 'tabletop-original'} | head -n 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_json_leaves_standard_output_as_it_was(rlrc, policies, capfd):
    rlrc("inspect", policies / "tabletop-original", "--json")
    os.write(1, b"still here\n")
    assert capfd.readouterr().out == "still here\n"


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("mujoco", "pip install -e '.[sim]'"),
        ("torch_pruning", "pip install -e '.[train]'"),
        ("rclpy", "pip install -e '.[ros]'"),
        ("rlrc.msg", "the ROS interfaces are not built"),
    ],
)
def test_a_package_that_is_not_installed(refused, policies, monkeypatch, module, hint):
    from rlrc_ros.vla import inspection

    def missing(_):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(inspection, "inspect", missing)
    assert hint in refused("inspect", policies / "tabletop-original")


def test_a_bug_is_not_hidden(monkeypatch, policies):
    """Only what the user can mend is said in one line."""
    from rlrc_ros.vla import inspection

    def broken(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(inspection, "inspect", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", str(policies / "tabletop-original")])
