import base64
import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.trials.frames import EpisodeFrames, FrameStrip, jpeg_uri
from rlrc_ros.trials.report import Report, write_report
from rlrc_ros.trials.summary import summarise
from rlrc_ros.trials.verdict import verdict
from tests.trials.example import ARMS, STAGES, policies, record, strip, trial

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}$\\frac{$<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """A page taken apart, its tags checked to close in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text, self.css = [], [], [], ""
        self.sections, self.section = {}, "before the first"
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.css += data
        else:
            self.text.append(data)
            self.sections[self.section] = self.sections.get(self.section, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self):
        return " ".join(" ".join(self.text).split())

    def images(self, kind):
        prefix = f"data:image/{kind};base64,"
        uris = [image["src"] for image in self.all("img") if image["src"].startswith(prefix)]
        return [base64.b64decode(uri[len(prefix) :], validate=True) for uri in uris]


def report(tmp_path, records, arms=ARMS, **options):
    path = tmp_path / "report.html"
    options = {"title": "A trial", "policies": policies(), **options}
    write_report(path, Report(summary=summarise(records, arms), records=records, **options))
    return Page(path.read_text(encoding="utf-8"))


def full(tmp_path, records=None, **options):
    options = {
        "frames": strip(3),
        "notes": ["Scored from video."],
        "tables": {"Stages": STAGES},
        "commands": ["rlrc trial report runs/trial-1"],
        **options,
    }
    return report(tmp_path, records or trial(10), **options)


def assert_self_contained(page):
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "srcset", "data", "action", "poster"}:
                assert value.startswith("data:image/")
            if name == "href":
                assert value.startswith("#")
    assert "url(" not in page.css
    assert "@import" not in page.css
    for svg in page.images("svg+xml"):
        root = ElementTree.fromstring(svg)
        for element in root.iter():
            assert not element.tag.endswith("}script")
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:"))


def test_the_report_is_one_file_that_needs_nothing_else(tmp_path):
    assert_self_contained(full(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_contents_come_in_order(tmp_path):
    page = full(tmp_path)
    order = ["results", "plots", "frames", "pairs", "stages", "provenance", "reproduce"]
    assert [section["id"] for section in page.all("section")] == order
    words = page.words()
    assert words.index(verdict(summarise(trial(10), ARMS))) < words.index("latency p50 (ms)")
    for section, text in zip(
        order,
        [
            "Scored from video.",
            "Success",
            "at equal time intervals",
            "pick up the red block",
            "quantize",
            "rlrc compress openvla-7b",
            "rlrc trial report runs/trial-1",
        ],
        strict=True,
    ):
        assert text in page.sections[section]


def test_it_can_be_read_without_seeing_it(tmp_path):
    page = full(tmp_path)
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"].strip() for image in page.all("img"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert max(np.diff(levels)) == 1
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    success = page.all("img")[0]["alt"]
    assert "original: " in success
    assert "%" in success


def test_every_image_can_be_decoded(tmp_path):
    page = full(tmp_path)
    assert len(page.images("svg+xml")) == 4
    frames = page.images("jpeg")
    assert len(frames) == 16
    for frame in frames:
        picture = cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (96, 128, 3)


def test_every_pair_is_listed_with_outcome_ending_and_bag(tmp_path):
    records = trial(4)
    records[2] = dataclasses.replace(
        records[2], outcome="partial", score=40.0, message="dropped it"
    )
    records.append(record(4, "compressed", outcome="unlabelled", termination_reason="guard_stop"))
    words = full(tmp_path, records).words()
    for r in records:
        assert r.bag_uri in words
        assert r.instruction in words
        assert str(r.seed) in words
    for text in ("partial 40/100", "dropped it", "guard_stop", "not run"):
        assert text in words


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_trial_that_has_hardly_begun_has_a_report(tmp_path, pairs):
    records = trial(1)[:pairs]
    page = report(tmp_path, records, policies={})
    assert "says nothing about success" in page.words()
    assert_self_contained(page)


@pytest.mark.parametrize(
    "strange",
    [
        {},
        {"original": {}, "compressed": {}},
        {"original": {"bytes": {"vision": 5}, "layers": [{"ffn": 3}, {}], "provenance": None}},
        {"original": {"layers": "none", "parameters": 7, "bytes": [], "quantization": {"bits": 4}}},
        {"compressed": {"layers": [{"ffn": 0, "heads": 0}], "provenance": {"a": [1, {"b": None}]}}},
        {"compressed": {"layers": [], "bytes": {"total": 0}, "hash": None}},
    ],
)
def test_missing_and_strange_facts_about_a_policy_cost_only_themselves(tmp_path, strange):
    page = report(tmp_path, trial(3), policies=strange)
    assert "Provenance" in page.words()
    assert_self_contained(page)


def test_hostile_text_stays_text(tmp_path):
    arms = (HOSTILE, HOSTILE + "2")
    records = [
        dataclasses.replace(
            r,
            arm=arms[ARMS.index(r.arm)],
            trial_id=HOSTILE,
            episode_id=r.episode_id + HOSTILE,
            task=HOSTILE + str(r.pair % 2),
            instruction=HOSTILE,
            termination_reason=HOSTILE,
            message=HOSTILE,
            bag_uri=HOSTILE.replace("\\", ""),
            guard={HOSTILE: 1},
            outcome="partial",
        )
        for r in trial(2)
    ]
    frames = FrameStrip(
        [0.0], {arm: EpisodeFrames([np.zeros((4, 4, 3), np.uint8)], HOSTILE, 1.0) for arm in arms}
    )
    facts = {**policies()["compressed"], "name": HOSTILE, "provenance": {HOSTILE: [HOSTILE]}}
    page = report(
        tmp_path,
        records,
        arms,
        title=HOSTILE,
        policies=dict.fromkeys(arms, facts),
        frames=frames,
        notes=[HOSTILE],
        tables={HOSTILE: [{HOSTILE: HOSTILE}]},
        commands=[HOSTILE],
    )
    assert_self_contained(page)
    assert page.text.count(HOSTILE) >= 8
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in full(tmp_path).tags}


@pytest.mark.parametrize(
    "task",
    ["拿起红色方块", "a\x00b\x1b\ufffe", "$x_{$", "t" * 500],
    ids=["Chinese", "control characters", "formula", "long"],
)
def test_any_task_name_can_be_plotted(tmp_path, task, recwarn):
    records = [dataclasses.replace(r, task=task + str(r.pair % 2)) for r in trial(4)]
    assert_self_contained(report(tmp_path, records))
    assert not recwarn.list


def test_text_that_is_no_unicode_does_not_cost_the_report(tmp_path):
    assert "a ? note" in report(tmp_path, trial(2), notes=["a \ud800 note"]).words()


def test_the_same_records_give_the_same_report(tmp_path):
    full(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    full(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path):
    full(tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    class Refuses:
        def __str__(self):
            raise RuntimeError("no text")

    with pytest.raises(RuntimeError):
        full(tmp_path, notes=[Refuses()])
    assert (tmp_path / "report.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reader_of_the_earlier_report_is_not_disturbed(tmp_path):
    full(tmp_path)
    with (tmp_path / "report.html").open("rb") as file:
        begun = file.read(1000)
        full(tmp_path, trial(20))
        earlier = begun + file.read()
    assert Page(earlier.decode()).words().count("finished, ") == sum(
        r.termination_reason == "finished" for r in trial(10)
    )


def test_a_thousand_pairs_are_no_large_report(tmp_path):
    report(tmp_path, trial(1000))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_wide_stage_tables_keep_every_column(tmp_path):
    words = full(tmp_path).words()
    assert "stage seconds parameters success loss" in words
    assert "sft 3600 2,100,000,000 0.71 0.213" in words
    assert "rl 7200 2,100,000,000 0.88 –" in words


# Frames


def picture(value):
    return np.full((6, 8, 3), value, np.uint8)


def shown(frames, arm):
    return [
        (int(frame[0, 0, 0]), ended)
        for frame, ended in (frames.frame(arm, time) for time in frames.columns())
    ]


def test_an_episode_that_ended_earlier_repeats_its_last_frame():
    frames = FrameStrip(
        [0.0, 1.0, 2.0, 3.0],
        {
            "original": EpisodeFrames([picture(i) for i in range(4)], "success", 3.0),
            "compressed": EpisodeFrames([picture(10), picture(11)], "failure", 1.5),
            "repeated": EpisodeFrames([picture(20 + i) for i in range(4)], "failure", 1.5),
        },
    )
    assert frames.columns() == [0.0, 1.0, 2.0, 3.0]
    assert shown(frames, "original") == [(0, False), (1, False), (2, False), (3, False)]
    assert shown(frames, "compressed") == [(10, False), (11, False), (11, True), (11, True)]
    assert shown(frames, "repeated") == [(20, False), (21, False), (21, True), (21, True)]


def test_many_uneven_frames_are_shown_at_a_few_equal_intervals():
    times = sorted(np.random.default_rng(0).uniform(0, 60, 300))
    frames = FrameStrip(
        times, {"original": EpisodeFrames([picture(i % 256) for i in range(300)], "success", 60.0)}
    )
    columns = frames.columns()
    assert len(columns) == 8
    assert np.ptp(np.diff(columns)) < 1e-9
    for column in columns:
        frame, ended = frames.frame("original", column)
        newest = max(i for i, t in enumerate(times) if t <= column + 1e-3)
        assert frame[0, 0, 0] == newest % 256
        assert not ended


@pytest.mark.parametrize(
    ("times", "pictures", "says"),
    [
        ([], [picture(0)], "times"),
        ([0.0, 0.0], [picture(0)], "rise"),
        ([0.0], [], "0 frames for 1"),
        ([0.0], [picture(0)] * 2, "2 frames for 1"),
        ([0.0], [np.zeros((6, 8), np.uint8)], r"shape \(6, 8\)"),
        ([0.0], [np.zeros((6, 8, 3))], "float64"),
    ],
)
def test_a_strip_that_cannot_be_shown_is_a_users_error(times, pictures, says):
    with pytest.raises(UserError, match=says):
        FrameStrip(times, {"original": EpisodeFrames(pictures, "success", 1.0)})


def test_frames_keep_their_colours_and_shape_and_become_small():
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[..., 0] = 200
    data = base64.b64decode(jpeg_uri(frame[:, ::-1]).split(",")[1])
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (240, 320, 3)
    blue, _, red = decoded[120, 160]
    assert red > 190
    assert blue < 10


def test_the_strip_shows_the_original_above_the_compressed(tmp_path):
    page = full(tmp_path)
    alts = [image["alt"] for image in page.all("img") if " at " in image["alt"]]
    assert [alt.split()[0] for alt in alts] == ["original"] * 8 + ["compressed"] * 8
    assert alts[-1] == "compressed at 7.0 s, after its end"
    assert "compressed: ✗ failure after 5.2 s" in page.words()
    assert [text for text in page.text if text == "ended"] == ["ended"] * 2
