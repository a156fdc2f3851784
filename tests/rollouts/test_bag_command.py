import argparse
import json

import pytest

from rlrc_ros.cli import bag as command
from tests.rollouts.bags import damage, record


def run(capsys, *words, as_json=False):
    """Exit status and output of `rlrc bag` with these words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    command.add_arguments(parser)
    status = command.main(parser.parse_args([*(["--json"] if as_json else []), *map(str, words)]))
    return status, capsys.readouterr().out


def test_a_whole_bag_is_ok(tmp_path, capsys):
    bag = record(tmp_path, ["x"] * 20, instruction="wave", policy_label="A")
    status, output = run(capsys, "verify", bag)
    assert status == 0 and output.endswith("ok\n")
    assert "20 messages" in output and "/text" in output and "10.0 Hz" in output
    assert "A: wave; ended: finished, outcome: unlabelled" in output


def test_a_truncated_bag_is_verified_repaired_and_ok(tmp_path, capsys):
    bag = record(tmp_path, ["x"] * 20)
    damage(bag, 40)
    status, output = run(capsys, "verify", bag)
    assert status == 1 and f"`rlrc bag repair {bag}`" in output
    status, output = run(capsys, "repair", bag)
    assert status == 0 and "is whole, 20 messages" in output
    assert run(capsys, "verify", bag)[0] == 0


def test_json_is_one_object_and_nothing_else(tmp_path, capsys):
    bag = record(tmp_path, ["x"] * 20)
    status, output = run(capsys, "verify", bag, as_json=True)
    report = json.loads(output)
    assert status == 0 and report["ok"] and report["topics"][0]["messages"] == 20
    assert report["episode"]["episode_id"] == "e1"
    damage(bag, 40)
    status, output = run(capsys, "repair", bag, as_json=True)
    assert status == 0 and json.loads(output)["messages"] == 20


def test_another_action_is_refused(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "mend", "bag")
