import json

import pytest


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"policy": "another"}\n', "\x00\n"])
def test_a_log_of_something_else_is_left_alone(refused, shipped, tmp_path, content):
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    line = refused("eval", "--policy", "tabletop-original", "--device", "cpu", "--log", log)
    assert f"{log}: holds another evaluation" in line
    assert log.read_text() == content


def test_the_difference_of_two_policies_and_a_log_cut_off_in_its_first_line(
    rlrc, shipped, tmp_path
):
    log = tmp_path / "logs" / "eval.jsonl"
    words = ["eval", "--policy", "tabletop-original", "--against", "tabletop-compressed"]
    words += ["--episodes", "1", "--device", "cpu", "--workers", "1", "--log", log, "--video", "0"]
    status, printed, _ = rlrc(*words, "--json")
    found = json.loads(printed)
    assert status == 0 and found["policy"] == "tabletop-original"
    assert found["against"]["policy"] == "tabletop-compressed"
    assert found["paired_difference"]["difference"] == 0
    assert found["latency_ms"]["p50"] > 0 and found["against"]["latency_ms"]["p50"] > 0

    whole = log.read_text()
    log.write_text(whole[:30])
    status, printed, _ = rlrc(*words)
    assert status == 0
    assert log.read_text().splitlines()[0] == whole.splitlines()[0]
    assert "tabletop-original minus tabletop-compressed, same scenes: +0.0 points" in printed
    logs = ["eval-against.jsonl", "eval.jsonl"]
    assert sorted(p.name for p in log.parent.glob("*.*")) == logs
    for name in ("eval-videos", "eval-against-videos"):
        (video,) = (log.parent / name).iterdir()
        assert video.name == "0.webm" and video.stat().st_size > 1000


def test_a_policy_that_does_not_fit_the_scenes_is_told_in_one_line(rlrc, tmp_path, make_bundle):
    """Found out by the workers, so there is progress on standard error before it."""
    policy = make_bundle("for another kitchen").path
    status, printed, err = rlrc("eval", "--policy", policy, "--episodes", "40", "--device", "cpu")
    assert status == 2 and printed == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("rlrc eval: the policy does not know these words of the instruction")


@pytest.mark.parametrize(
    "words, told",
    [
        (["--video", "3"], "the videos are kept beside the log; add --log FILE"),
        (["--env", "libero_goal", "--seed", "450"], "asks for 450 to 549"),
        (["--env", "kitchen"], "invalid choice: 'kitchen'"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_line(refused, shipped, words, told):
    assert told in refused("eval", "--policy", "tabletop-original", "--device", "cpu", *words)


def test_a_scene_that_was_not_filmed_is_not_filmed_later(refused, shipped, tmp_path, rlrc):
    log = tmp_path / "eval.jsonl"
    words = ["eval", "--policy", "tabletop-original", "--episodes", "1", "--device", "cpu"]
    words += ["--seed", "7", "--log", log]
    assert rlrc(*words)[0] == 0
    line = refused(*words, "--video", "7")
    assert "scene 7 cannot be filmed: it is in the log already; name another" in line
    assert "scene 8 cannot be filmed: it is not evaluated" in refused(*words, "--video", "8")
