import shutil

import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.episode import Episode, label
from rlrc_ros.rollouts.export import ExportReport, Filters, find_bags, rollouts
from tests.rollouts.bags import damage, record
from tests.rollouts.episodes import contract, record_episode


@pytest.mark.parametrize(
    ("filters", "refusal"),
    [
        ({}, ""),
        ({"outcomes": ("failure", "partial")}, "outcome success"),
        ({"tasks": ("RED cube",)}, ""),
        ({"tasks": ("green", "blue plate")}, ""),
        ({"tasks": ("green",)}, "another task"),
        ({"policies": ("B",)}, "another policy"),
        ({"policies": ("B", "A")}, ""),
        ({"policies": ("abcdef01",)}, ""),
        ({"policies": ("abc",)}, "another policy"),  # too short to tell hashes apart
    ],
)
def test_filters(filters, refusal):
    episode = Episode(
        episode_id="e", instruction="Put the red cube on the blue plate", outcome="success",
        policy_label="A", bundle_hash="abcdef0123",
    )  # fmt: skip
    assert Filters(**filters).refusal(episode) == refusal


def test_an_outcome_that_there_is_not():
    with pytest.raises(UserError, match="'sucess' is none of success, failure"):
        Filters(outcomes=("sucess",))


def test_bags_are_found_by_themselves_and_in_directories(tmp_path):
    one = record(tmp_path / "runs", ["x"], "one")
    two = record(tmp_path / "runs", ["x"], "two")
    (tmp_path / "runs" / "notes").mkdir()
    assert find_bags([two, tmp_path / "runs"]) == [two, one]
    with pytest.raises(UserError, match="neither an episode's bag nor a directory"):
        find_bags([tmp_path / "runs" / "notes"])


def test_what_is_taken_and_left_out_is_told(tmp_path):
    record_episode(tmp_path, "done", steps=3)
    record_episode(tmp_path, "failed", steps=3, outcome="failure")
    record_episode(tmp_path, "unsaid", steps=3, outcome="unlabelled")
    cut_off, _ = record_episode(tmp_path, "cut-off", steps=3)
    shutil.copytree(cut_off, tmp_path / "later.partial")
    damage(cut_off, 2000)
    strange = record(tmp_path, ["x"], "strange", instruction="wave")
    label(strange, "success")

    report = ExportReport()
    taken = list(
        rollouts(find_bags([tmp_path]), contract(), Filters(), lambda step: step.action, report)
    )
    assert [(r.facts["episode_id"], len(r.steps)) for r in taken] == [("done", 3)]
    assert taken[0].facts["success"] and taken[0].facts["policy_label"] == "A"
    assert (report.episodes, report.steps) == (1, 3)
    assert dict(report.refused) == {"outcome failure": 1, "outcome unlabelled": 1}
    names = {bag.rpartition("/")[2]: reason for bag, reason in report.unusable.items()}
    assert set(names) == {"cut-off", "strange", "later.partial"}
    assert "rlrc bag verify" in names["cut-off"] and "rlrc bag repair" in names["later.partial"]
    assert "wanted one topic policy_command" in names["strange"]


def test_a_robot_without_the_policys_camera_fits_no_bag(an_episode):
    from rlrc_ros.vla.config import CameraConfig

    wrist = contract(cameras=(CameraConfig(name="wrist", height=64, width=64),))
    with pytest.raises(UserError, match="camera 'wrist'; cameras here: front"):
        list(rollouts([an_episode[0]], wrist, Filters(), str, ExportReport()))
