"""A whole study of the smallest size, stopped on the way and taken up again."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.paths import config_file
from rlrc_ros.schema import from_dict, read_yaml
from rlrc_ros.vla.bundle import open_bundle
from training import study as study_module
from training.data.collect import collect_demonstrations
from training.study import Study
from training.study_config import StudyConfig, load_study

TINY = config_file("study", "tiny")


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    place = tmp_path_factory.mktemp("study") / "demonstrations"
    config = load_study(TINY).demonstrations
    collect_demonstrations(place, replace(config, episodes=1), workers=1)
    return place


def small(**changes):
    """The tiny study with a structured and a sparse method, one of them out of reach."""
    raw = read_yaml(TINY)
    raw["environments"] = [{"name": "tabletop", "episodes": 1, "first_seed": 0}]
    raw["methods"][0]["ratios"] = [0.5, 0.99]
    raw["methods"][1] = {"name": "Wanda 2:4", "sparse": {"method": "wanda", "pattern": "2:4"}}
    return from_dict(StudyConfig, {**raw, **changes}, "study")


def start(config, out, demonstrations):
    return Study(config, out, "cpu", lambda line: None, demonstrations=[demonstrations], workers=1)


def test_a_study_goes_on_where_it_was_stopped(tmp_path, demonstrations, monkeypatch):
    real, calls = study_module.evaluate, []

    def evaluate(task, *others):
        calls.append(task.policy.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(task, *others)

    monkeypatch.setattr(study_module, "evaluate", evaluate)
    out = tmp_path / "study"
    with pytest.raises(KeyboardInterrupt):
        start(small(), out, demonstrations).run()
    assert sorted(file.stem for file in (out / "cells").iterdir()) == ["original", "original-nf4"]
    made = (out / "bundles" / "taylor-0.5" / "SHA256SUMS").read_text()
    summary = start(small(), out, demonstrations).run()
    names = ("taylor-0.5", "taylor-0.5", "taylor-0.5-nf4", "wanda-2-4-0.5", "wanda-2-4-0.5-nf4")
    assert tuple(calls[2:]) == names
    assert (out / "bundles" / "taylor-0.5" / "SHA256SUMS").read_text() == made

    with (out / "study.csv").open(newline="") as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert list(rows) == [row["cell"] for row in summary["cells"]] and len(rows) == 8
    for name in ("taylor-0.99", "taylor-0.99-nf4"):
        assert "at most" in rows[name]["unreachable"] and not rows[name]["success_rate"]
    taylor, wanda = rows["taylor-0.5"], rows["wanda-2-4-0.5"]
    assert float(taylor["removed_of_layers"]) >= 0.5 > float(taylor["zeros_of_layers"])
    assert float(wanda["zeros_of_layers"]) == pytest.approx(0.5, abs=1e-3)  # recovery kept them
    assert float(taylor["llm_bytes_of_original"]) < 0.6 < 1 == float(wanda["llm_bytes_of_original"])
    assert float(rows["wanda-2-4-0.5-nf4"]["llm_bytes_of_original"]) < 0.4
    assert all(float(row["latency_p50_ms"]) > 0 for row in rows.values() if row["successes"])
    stages = open_bundle(out / "bundles" / "taylor-0.5-nf4").provenance["stages"]
    assert [stage["stage"] for stage in stages[-2:]] == ["pruned", "compressed"]
    assert stages[-2]["recovery"]["steps"] == 2

    again = start(small(), out, demonstrations).run()  # nothing left to do
    assert again == json.loads(json.dumps(summary)) and len(calls) == 7
    with pytest.raises(UserError, match="holds a run of another configuration"):
        start(small(seed=1), out, demonstrations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": []}, "'ratios' is empty"),
        ({"quantizations": ["nf4"]}, "must have 'none'"),
        ({"methods": [{"name": "A"}]}, "'A' must be either 'structured' or 'sparse'"),
        ({"methods": [{"name": "Original", "structured": {}}]}, "cannot be called 'original'"),
        (
            {"methods": [{"name": n, "structured": {}} for n in ("A b", "a-B")]},
            "two methods or environments are called 'a-b'",
        ),
        (
            {
                "methods": [{"name": "A", "sparse": {"method": "wanda", "pattern": "2:4"}}],
                "ratios": [0.7],
            },
            r"2:4 is a sparsity of 0\.5",
        ),
        ({"environments": [{"name": "a", "episodes": 0}]}, "environment 'a': 'episodes' is 0"),
        ({"methods": [{"name": "A", "structured": {"depth": 3}}]}, "unknown key 'methods"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        small(**change)


def test_the_packages_own_studies_can_be_read():
    for file in Path(TINY).parent.glob("*.yaml"):
        config = load_study(file)
        names = [cell.name for cell in config.cells]
        assert names[0] == "original" and len(set(names)) == len(names)


def test_a_quantized_policy_cannot_be_studied(tmp_path):
    with pytest.raises(UserError, match="is quantized; study its parent"):
        Study(small(policy="tabletop-compressed"), tmp_path / "out", "cpu", lambda line: None)
    assert not (tmp_path / "out").exists()
