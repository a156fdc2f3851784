import json

import pytest
import yaml

from rlrc_ros.trials.plan import read_plan
from rlrc_ros.trials.session import Ended, TrialSession

DRAFT = {
    "name": "test",
    "robot": "sim",
    "arms": {"original": "tabletop-original", "compressed": "tabletop-compressed"},
    "tasks": [
        {"name": "put", "family": "put", "rubric": "in place", "first_seed": 1},
        {"name": "push", "family": "push", "rubric": "in place", "first_seed": 9},
    ],
    "pairs": 4,
    "margin": 0.2,
    "max_duration": 5.0,
    "exclusions": ["a cable came loose"],
}


@pytest.fixture
def draft(tmp_path, shipped):
    """draft(key=value, …) → a draft's file; None leaves a key out."""

    def write(**changes):
        values = {key: value for key, value in {**DRAFT, **changes}.items() if value is not None}
        path = tmp_path / "draft.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture
def trial(draft, rlrc, tmp_path):
    """A trial's directory with two of its four pairs run."""
    assert rlrc("trial", "plan", draft(), "--out", tmp_path / "plan.yaml")[0] == 0
    with TrialSession.create(tmp_path / "trial", read_plan(tmp_path / "plan.yaml")) as session:
        for i in range(4):
            number = session.start("put it there").number
            session.stop(number, Ended(termination_reason="timeout", duration=4.0))
            session.label(number, "failure" if i == 3 else "success", notes="slipped")
    return tmp_path / "trial"


def test_a_plan_says_what_it_can_detect_and_is_locked(rlrc, draft, tmp_path):
    status, out, _ = rlrc("trial", "plan", draft(pairs=None), "--out", tmp_path / "plan.yaml")
    assert status == 0
    plan = read_plan(tmp_path / "plan.yaml")
    assert f"{plan.pairs} pairs (by power analysis for 80%)" in out
    assert f"SHA-256 {plan.sha256}" in out and "non-inferiority at 20 points" in out
    assert sum(len(task.starts) for task in plan.tasks) >= plan.pairs
    places = plan.schedule()
    assert len(places) == plan.pairs == len({(t.name, s.seed) for t, s in places})


def test_a_plan_as_json(rlrc, draft, tmp_path):
    status, out, _ = rlrc("trial", "plan", draft(), "--out", tmp_path / "plan.yaml", "--json")
    told = json.loads(out)
    assert status == 0 and told["pairs"] == 4 and told["episodes"] == 8
    assert told["power_equal"] < 0.05 and told["fewest_pairs"] == 16
    assert told["sha256"] == read_plan(tmp_path / "plan.yaml").sha256


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"margin": 0}, "margin is 0: that one policy is no worse at all takes endless trials"),
        ({"margin": 15}, "margin is 15: it lies between 0 and 1"),
        ({"pairs": 1}, "pairs is 1: from a single pair nothing follows"),
        ({"alpha": 0.0}, "alpha is 0: it lies between 0 and 1"),
        ({"power": 0.01}, "power is 0.01: chance alone gives alpha / 2"),
        ({"arms": {"a": "tabletop-original"}}, "a comparison needs two or more"),
        ({"arms": {"a": "tabletop-original", "b": "none"}}, "none: no such bundle directory"),
        ({"arms": {"a/b": "tabletop-original", "b": "tabletop-original"}}, "'a/b': names of arms"),
        ({"tasks": []}, "tasks: name at least one"),
        ({"tasks": [DRAFT["tasks"][0]] * 2}, "tasks: 'put' is there twice"),
        ({"tasks": [{"name": "x", "rubric": "", "first_seed": 1}]}, "rubric is empty"),
        ({"tasks": [{"name": "x", "rubric": "r"}]}, "give either starts or first_seed"),
        ({"tasks": [{"name": "x", "rubric": "r", "starts": [{}]}]}, "a seed, an image or a note"),
        (
            {"tasks": [{"name": "x", "rubric": "r", "starts": [{"image": "../../etc/passwd"}]}]},
            "must lie in the plan's directory",
        ),
        (
            {"tasks": [{"name": "x", "rubric": "r", "starts": [{"image": "a.png"}]}]},
            "a.png: there is no such reference image",
        ),
        ({"assumed_discordance": 0.9}, "can differ in more than 0 and at most 0.4 of the pairs"),
        ({"max_duration": 0.0}, "max_duration is 0 s"),
        ({"stopping": "whenever"}, "stopping"),
        ({"exclusions": ["a", "a"]}, "exclusions: 'a' is there twice"),
        ({"margn": 0.1}, "unknown key 'margn'; did you mean 'margin'?"),
    ],
)
def test_a_draft_that_makes_no_sense_is_one_line(refused, draft, tmp_path, changes, says):
    assert says in refused("trial", "plan", draft(**changes), "--out", tmp_path / "plan.yaml")
    assert not (tmp_path / "plan.yaml").exists()


def test_a_plan_is_never_overwritten_nor_locked_twice(rlrc, refused, draft, tmp_path):
    plan = tmp_path / "plan.yaml"
    rlrc("trial", "plan", draft(), "--out", plan)
    assert "a plan is never overwritten" in refused("trial", "plan", draft(), "--out", plan)
    assert "is locked already" in refused("trial", "plan", plan, "--out", tmp_path / "other.yaml")


def test_an_edited_plan_and_none_are_refused(rlrc, refused, draft, tmp_path):
    pytest.importorskip("rlrc.msg", reason="the ROS interfaces are not built")
    plan = tmp_path / "plan.yaml"
    rlrc("trial", "plan", draft(), "--out", plan)
    plan.write_text(plan.read_text().replace("pairs: 4", "pairs: 5"))
    line = refused("trial", "run", tmp_path / "trial", "--plan", plan, "--unattended")
    assert "was edited after it was locked" in line
    assert "begin one with --plan" in refused("trial", "run", tmp_path / "trial")
    assert "not a locked plan" in refused("trial", "run", tmp_path / "trial", "--plan", draft())
    assert not (tmp_path / "trial").exists()


def test_status_correct_unblind_and_report(rlrc, refused, trial):
    status, out, _ = rlrc("trial", "status", trial)
    assert status == 0 and "4 of 8 trials done" in out and out.count("put it there") == 4
    assert "original" not in out and "compressed" not in out
    assert "is blinded" in refused("trial", "report", trial)
    assert "4 of 8 trials are done" in refused("trial", "unblind", trial)
    assert rlrc("trial", "correct", trial, "4", "success", "--reason", "seen again")[0] == 0
    assert "has no label" not in rlrc("trial", "status", trial, "--json")[1]
    status, out, _ = rlrc("trial", "unblind", trial, "--reason", "the arm broke", "--json")
    assert status == 0 and set(json.loads(out).values()) == {"original", "compressed"}
    status, out, _ = rlrc("trial", "report", trial)
    assert status == 0 and "This trial cannot show" in out.splitlines()[0]
    page = (trial / "report.html").read_text()
    for words in ("the arm broke", "seen again", "a cable came loose", "nothing was recorded"):
        assert words in page
    assert read_plan(trial / "plan.yaml").sha256 in page
    assert (trial / "report.pdf").read_bytes().startswith(b"%PDF-")


def test_three_arms_get_a_report_for_each_candidate(rlrc, draft, tmp_path):
    arms = {"original": "tabletop-original", "a": "tabletop-compressed", "b": "tabletop-original"}
    rlrc("trial", "plan", draft(arms=arms, pairs=3), "--out", tmp_path / "plan.yaml")
    with TrialSession.create(tmp_path / "trial", read_plan(tmp_path / "plan.yaml")) as session:
        while session.state == "ready":
            number = session.start().number
            session.stop(number, Ended(termination_reason="finished"))
            session.label(number, "success")
        session.unblind()
    status, out, _ = rlrc("trial", "report", tmp_path / "trial", "--json")
    told = json.loads(out)
    assert status == 0 and set(told) == {"a", "b"}
    for name in told:
        assert told[name]["trial"]["alpha"] == 0.025
        assert told[name]["trial"]["comparison"]["pairs"] == 3
        page = (tmp_path / "trial" / f"report-{name}.html").read_text()
        assert "shared by 2 candidates (Bonferroni)" in page
        assert "Arms have the same bundle" in page


def test_begin_draws_and_run_goes_on(rlrc, refused, draft, tmp_path):
    plan = tmp_path / "plan.yaml"
    rlrc("trial", "plan", draft(), "--out", plan)
    status, out, _ = rlrc("trial", "begin", tmp_path / "trial", "--plan", plan, "--json")
    assert status == 0 and json.loads(out)["state"] == "ready"
    assert (tmp_path / "trial" / "sealed.json").exists()
    rlrc("trial", "plan", draft(margin=0.3), "--out", tmp_path / "other.yaml")
    line = refused("trial", "begin", tmp_path / "trial", "--plan", tmp_path / "other.yaml")
    assert "holds a trial of another plan" in line


def test_a_second_process_is_told_who_has_the_trial(refused, trial):
    with TrialSession.open(trial):
        line = refused("trial", "correct", trial, "1", "failure", "--reason", "x")
    assert "is running this trial; one writes at a time" in line


def test_all_successes_and_all_failures_are_said_for_what_they_are(rlrc, draft, tmp_path):
    rlrc("trial", "plan", draft(pairs=40), "--out", tmp_path / "plan.yaml")
    plan = read_plan(tmp_path / "plan.yaml")
    expected = {"success": "Shown: compressed is not worse", "failure": "cannot tell"}
    for outcome, says in expected.items():
        directory = tmp_path / outcome
        with TrialSession.create(directory, plan) as session:
            while session.state == "ready":
                number = session.start().number
                session.stop(number, Ended(termination_reason="finished"))
                session.label(number, outcome)
            session.unblind()
        status, out, _ = rlrc("trial", "report", directory)
        assert status == 0 and says in out
    assert "may be too easy" in (tmp_path / "success" / "report.html").read_text()
