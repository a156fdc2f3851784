import dataclasses
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.episode import Episode, read_episode, write_episode
from rlrc_ros.trials import log as logs
from rlrc_ros.trials import seal
from rlrc_ros.trials.plan import Arm, Draft, DraftTask, Plan, Start, lock, read_plan
from rlrc_ros.trials.session import Ended, TrialSession, read_trial

RULE = "a cable came loose"


@pytest.fixture
def bundles(make_bundle):
    return {name: make_bundle(name, seed=seed) for seed, name in enumerate(("full", "pruned"))}


@pytest.fixture
def plan(bundles):
    return make_plan(bundles)


def make_plan(bundles, pairs=3, **changes):
    tasks = tuple(
        DraftTask(name=name, rubric="in place: success", family=name, first_seed=first)
        for name, first in (("put", 100), ("push", 200))
    )
    draft = Draft(
        name="test",
        robot="sim",
        margin=0.2,
        max_duration=5.0,
        exclusions=(RULE,),
        arms={name: str(bundle.path) for name, bundle in bundles.items()},
        tasks=tasks,
        pairs=pairs,
    )
    return lock(dataclasses.replace(draft, **changes), Path())


@pytest.fixture
def session(plan, tmp_path):
    with TrialSession.create(tmp_path / "trial", plan, "ann") as session:
        yield session


def run(session, outcome="success", **measurements):
    """One whole trial."""
    trial = session.start()
    session.stop(trial.number, Ended(termination_reason="finished", measurements=measurements))
    return session.label(trial.number, outcome)


def test_a_trial_from_the_first_step_to_the_records(session):
    assert session.state == "ready" and session.progress().steps == 6
    for i in range(6):
        step = session.current()
        assert (step.index, step.pair, step.place) == (i, i // 2, i % 2)
        trial = session.start("do it")
        assert session.state == "running" and session.current() == step
        session.stop(trial.number, Ended(termination_reason="timeout", duration=5.0))
        assert session.state == "stopped" and session.current() == step
        assert session.progress().done == i
        assert session.label(trial.number, "success").outcome == "success"
        assert session.progress().done == i + 1
        assert session.progress().pairs_done == (i + 1) // 2
    assert session.state == "complete" and session.current() is None
    allocation = session.unblind()
    assert session.state == "unblinded"
    assert sorted(allocation.values()) == ["full"] * 3 + ["pruned"] * 3
    records = session.records()
    assert [(r.pair, r.order) for r in records] == [(i // 2, i % 2) for i in range(6)]
    for pair in range(3):
        first, second = records[2 * pair : 2 * pair + 2]
        assert {first.arm, second.arm} == {"full", "pruned"}
        assert (first.seed, first.task) == (second.seed, second.task)
    assert {r.instruction for r in records} == {"do it"}
    assert read_trial(session.directory).records() == records


def test_what_the_operator_can_read_names_no_policy_before_unblinding(plan, tmp_path):
    directory = tmp_path / "trial"
    with TrialSession.create(directory, plan) as session:
        for _ in range(3):
            run(session, latency_ms_p50=123.25, steps=77)
        words = [w for name, arm in plan.arms.items() for w in (name, arm.hash, arm.policy)]
        words += ["123.25", "latency"]
        for path in directory.rglob("*"):
            assert not any(word in path.name for word in words)
            if path.is_file() and path.name != "plan.yaml":
                text = path.read_text()
                assert not any(word in text for word in words), path
        assert not any(w in repr((session.trials, session.progress())) for w in words)
        assert (directory / seal.FILE).stat().st_mode & 0o077 == 0
        with pytest.raises(UserError, match="blinded"):
            session.records()
        session.unblind("enough for a test")
        assert session.records()[0].latency_ms_p50 == 123.25
        assert session.records()[0].steps == 77


def test_the_order_is_random_and_the_plan_does_not_tell_it(plan, tmp_path):
    orders = set()
    for i in range(8):
        with TrialSession.create(tmp_path / str(i), plan) as session:
            allocation = session.unblind("only drawn")
            orders.add(tuple(allocation.values()))
    assert len(orders) > 1


def test_calls_out_of_turn_are_refused_and_change_nothing(session):
    def refused(call, says):
        before = session._log.path.read_bytes()
        with pytest.raises(UserError, match=says):
            call()
        assert session._log.path.read_bytes() == before

    ended = Ended(termination_reason="finished")
    refused(lambda: session.stop(1, ended), "no trial 1")
    refused(lambda: session.label(1, "success"), "no trial 1")
    session.start()
    refused(session.start, "trial 1 is running")
    refused(lambda: session.label(1, "success"), "trial 1 is running")
    refused(lambda: session.exclude(1, RULE), "trial 1 is running")
    refused(lambda: session.unblind("now"), "trial 1 is running")
    refused(lambda: session.stop(1, Ended(termination_reason="")), "how it ended")
    session.stop(1, ended)
    refused(lambda: session.stop(1, ended), "has ended already: finished")
    refused(session.start, "trial 1 has no label")
    refused(lambda: session.correct(1, "success", reason="x"), "no label to correct")
    refused(lambda: session.label(1, "won"), "outcome 'won' is none of")
    refused(lambda: session.label(1, "partial"), "score from 0 to 100")
    refused(lambda: session.label(1, "partial", float("nan")), "score from 0 to 100")
    refused(lambda: session.exclude(1, "bad luck"), f"no exclusion rule .* {RULE}")
    session.label(1, "partial", 40.0)
    refused(lambda: session.label(1, "failure", operator="bob"), "labelled partial by ann already")
    refused(lambda: session.correct(1, "success"), "needs a reason")
    refused(session.unblind, "1 of 6 trials are done")
    session.unblind("the arm broke")
    refused(lambda: session.correct(1, "success", reason="oh"), "unblinded")
    refused(lambda: session.exclude(1, RULE), "unblinded")
    refused(session.start, "unblinded")


def test_a_correction_keeps_what_was_said_before(session):
    run(session, "failure")
    trial = session.correct(1, "partial", 50.0, reason="seen on the video", operator="bob")
    assert [label.outcome for label in trial.labels] == ["failure", "partial"]
    assert (trial.labels[1].reason, trial.labels[1].operator) == ("seen on the video", "bob")
    assert session.progress().done == 1
    session.unblind("enough")
    assert [(r.outcome, r.score) for r in session.records()] == [("partial", 50.0)]


def test_an_excluded_trial_stays_in_the_data_and_its_step_is_run_again(session):
    run(session)
    run(session)
    step = session.trials[0].step
    session.exclude(1, RULE, "camera")
    assert session.current().index == step == 0
    again = run(session, "failure")
    assert (again.number, again.step) == (3, 0)
    assert session.current().index == 2
    session.unblind("enough")
    assert [r.episode_id for r in session.records()] == [t.episode_id for t in session.trials[1:]]
    assert session.trials[0].excluded == RULE and session.trials[0].exclusion_notes == "camera"


def test_a_request_that_is_sent_again_labels_once(session):
    session.start()
    session.stop(1, Ended(termination_reason="finished"))
    first = session.label(1, "success", request="r1")
    assert session.label(1, "success", request="r1") == first
    assert len(session.trials[0].labels) == 1


def test_of_many_who_label_at_once_one_is_heard(session):
    session.start()
    session.stop(1, Ended(termination_reason="finished"))
    heard, refused = [], []

    def label(operator):
        try:
            heard.append(session.label(1, "success", operator=operator))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=label, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heard) == 1 and len(refused) == 7
    assert all("labelled success by" in line for line in refused)


def test_a_second_process_is_refused_and_told_who_has_it(session):
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is running this trial"):
        TrialSession.open(session.directory)
    assert read_trial(session.directory).state == "ready"


def test_bags_get_the_labels_and_only_at_unblinding_the_bundle(session, plan):
    bag = session.bags / "trial-1"
    bag.mkdir(parents=True)
    write_episode(bag, Episode(episode_id="trial-1"))
    session.start()
    session.stop(1, Ended(termination_reason="finished", bag="trial-1"))
    session.label(1, "failure", notes="dropped it")
    session.correct(1, "success", reason="it was in place")
    episode = read_episode(bag)
    assert [label.outcome for label in episode.labels] == ["failure", "success"]
    assert (episode.outcome, episode.bundle_hash, episode.metadata) == ("success", "", {})
    arm = session.unblind("enough")["step-0001"]
    assert read_episode(bag).bundle_hash == plan.arms[arm].hash
    assert read_episode(bag).metadata["arm"] == arm
    write_episode(bag, episode)  # as where it was killed in between
    session.close()
    TrialSession.open(session.directory).close()
    assert read_episode(bag).metadata["arm"] == arm


def test_three_arms_are_run_in_every_block(make_bundle, tmp_path):
    bundles = {name: make_bundle(name, seed=i) for i, name in enumerate("abc")}
    with TrialSession.create(tmp_path / "trial", make_plan(bundles, pairs=2)) as session:
        assert session.progress().steps == 6
        while session.state == "ready":
            run(session)
        session.unblind()
        for pair in range(2):
            assert {r.arm for r in session.records() if r.pair == pair} == set("abc")


def test_an_anytime_trial_ends_when_it_is_decided(bundles, tmp_path):
    plan = make_plan(bundles, pairs=200, stopping="anytime")
    with TrialSession.create(tmp_path / "trial", plan) as session:
        while session.state == "ready":
            run(session)
        done = session.progress().pairs_done
        assert session.state == "complete" and 10 < done < 60
        with pytest.raises(UserError, match="all trials are done"):
            session.start()
        session.correct(1, "failure", reason="does not start it again")
        assert session.state == "complete"
    assert read_trial(tmp_path / "trial").finished == "the sequential rule has decided"


# Crashes


def test_every_prefix_of_the_log_resumes_with_nothing_lost_or_doubled(plan, tmp_path):
    directory = tmp_path / "trial"
    with TrialSession.create(directory, plan) as session:
        run(session)
        run(session, "failure")
        session.exclude(2, RULE)
        run(session, "failure")
        run(session)
    content = (directory / "log.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    cuts = {*ends, *(end - 1 for end in ends), *random.Random(0).sample(range(len(content)), 60)}
    for cut in sorted(cut for cut in cuts if cut >= ends[0]):
        (directory / "log.jsonl").write_bytes(content[:cut])
        with TrialSession.open(directory) as session:
            whole = [
                json.loads(line)
                for line in content[:cut].splitlines()[: sum(e <= cut for e in ends)]
            ]
            started = [event["step"] for event in whole if event["event"] == "started"]
            assert [trial.step for trial in session.trials] == started
            if session.state == "stopped":
                session.label(len(session.trials), "failure")
            while session.state == "ready":
                run(session)
            assert session.state == "complete"
            counted = [trial.step for trial in session.trials if trial.counts]
            assert sorted(counted) == list(range(6))


def test_a_trial_that_was_cut_off_is_run_again_with_the_same_policy(plan, tmp_path):
    with TrialSession.create(tmp_path / "trial", plan) as session:
        label = session.current().policy_label
        session.start()
    with TrialSession.open(tmp_path / "trial") as session:
        assert session.trials[0].termination_reason == "interrupted"
        assert session.state == "ready" and session.current().policy_label == label
        assert session.progress().interrupted == 1
        with pytest.raises(UserError, match="interrupted; its step is run again"):
            session.label(1, "success")


def work(directory):
    """Run a trial as fast as it goes, in a process that will be killed."""
    with TrialSession.open(directory) as session:
        while (state := session.state) in ("ready", "stopped"):
            if state == "ready":
                trial = session.start()
                time.sleep(random.uniform(0, 0.01))
                session.stop(trial.number, Ended(termination_reason="finished"))
            time.sleep(random.uniform(0, 0.005))
            session.label(len(session.trials), random.choice(["success", "failure"]))


def test_kill_9_at_random_moments_loses_and_doubles_nothing(bundles, tmp_path):
    directory = tmp_path / "trial"
    with TrialSession.create(directory, make_plan(bundles, pairs=200)) as session:
        drawn = seal.sealed_policies(directory / seal.FILE)
        assert session.state == "ready"
    rng, acknowledged = random.Random(1), {}
    for _ in range(6):
        worker = multiprocessing.get_context("fork").Process(target=work, args=(directory,))
        worker.start()
        time.sleep(rng.uniform(0.05, 0.4))
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        view = read_trial(directory)
        labels = {t.number: t.labels for t in view.trials if t.labels}
        assert labels.items() >= acknowledged.items(), "a label was lost or changed"
        acknowledged = labels
    with TrialSession.open(directory) as session:
        if session.state == "stopped":
            session.label(len(session.trials), "failure")
        while session.state == "ready":
            run(session)
        allocation = session.unblind()
    assert allocation == {label: policy.arm for label, policy in drawn.items()}
    records = read_trial(directory).records()
    assert len(records) == 400 == len({(r.pair, r.arm) for r in records})


# Damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lines: [lines[0], *lines[2:]], r"log.jsonl:2: this line does not follow"),
        (lambda lines: [*lines[:2], lines[2].replace(b"success", b"failure"), *lines[3:]], ":4: "),
        (lambda lines: [*lines[:1], b"{}\n", *lines[1:]], ":2: not an entry"),
        (lambda lines: [b"\xff\xfe\n", *lines], ":1: not an entry"),
    ],
)
def test_a_log_that_was_edited_names_the_line(plan, tmp_path, damage, says):
    with TrialSession.create(tmp_path / "trial", plan) as session:
        session.start()
        session.stop(1, Ended(termination_reason="finished", judged="success"))
        session.label(1, "success")
    path = tmp_path / "trial" / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(damage(lines)))
    for reader in (TrialSession.open, read_trial):
        with pytest.raises(UserError, match=says) as error:
            reader(tmp_path / "trial")
        assert "\n" not in str(error.value)


def test_a_plan_a_seal_or_a_bundle_that_changed_is_refused(plan, bundles, tmp_path):
    directory = tmp_path / "trial"
    TrialSession.create(directory, plan).close()
    sealed = (directory / seal.FILE).read_text()
    (directory / seal.FILE).write_text(sealed.replace("A", "B"))
    with (
        TrialSession.open(directory) as session,
        pytest.raises(UserError, match="not the one that was"),
    ):
        session.unblind("look")
    (directory / seal.FILE).write_text(sealed)

    text = (directory / "plan.yaml").read_text()
    (directory / "plan.yaml").write_text(text.replace("margin: 0.2", "margin: 0.3"))
    with pytest.raises(UserError, match="edited after it was locked"):
        TrialSession.open(directory)
    lines = text.splitlines(keepends=True)
    first = lines.index("  full:\n")
    swapped = [*lines[:first], *lines[first + 3 : first + 6], *lines[first : first + 3]]
    (directory / "plan.yaml").write_text("".join(swapped + lines[first + 6 :]))
    with pytest.raises(UserError, match="edited after it was locked"):
        TrialSession.open(directory)
    dataclasses.replace(plan, margin=0.3).write(directory / "plan.yaml")
    with pytest.raises(UserError, match="not the plan that this trial began with"):
        TrialSession.open(directory)
    plan.write(directory / "plan.yaml")

    weights = bundles["pruned"].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(UserError, match="differs from its checksum"):
        TrialSession.open(directory)


def test_a_bundle_that_was_exchanged_is_refused(plan, bundles, make_bundle, tmp_path):
    TrialSession.create(tmp_path / "trial", plan).close()
    make_bundle("pruned", seed=9)
    with pytest.raises(UserError, match="arm 'pruned' has changed since the plan was locked"):
        TrialSession.open(tmp_path / "trial")


def test_a_clock_that_was_set_back_is_said(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "now", lambda: "2999-01-01T00:00:00.000000+00:00")
    TrialSession.create(tmp_path / "trial", plan).close()
    monkeypatch.undo()
    with pytest.raises(UserError, match="in the future: this machine's clock was set back"):
        TrialSession.open(tmp_path / "trial")


def test_a_full_disk_costs_no_more_than_the_line(session, monkeypatch):
    run(session)
    before = session._log.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs.os, "fsync", full)
    with pytest.raises(UserError, match="'started' could not be written"):
        session.start()
    assert session._log.path.read_bytes() == before
    monkeypatch.undo()
    assert run(session).number == 2


def test_a_directory_without_a_trial_and_one_that_has_one(plan, tmp_path):
    with pytest.raises(UserError, match="holds no trial"):
        TrialSession.open(tmp_path / "none")
    with pytest.raises(UserError, match="there is no such file"):
        read_trial(tmp_path / "none")
    TrialSession.create(tmp_path / "trial", plan).close()
    with pytest.raises(UserError, match="holds a trial already"):
        TrialSession.create(tmp_path / "trial", plan)
    # Killed before the first line was there: nothing has begun.
    path = tmp_path / "trial" / "log.jsonl"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="holds no trial"):
        TrialSession.open(tmp_path / "trial")
    TrialSession.create(tmp_path / "trial", plan).close()


def test_reference_images_are_copied_and_checked(bundles, tmp_path):
    (tmp_path / "plans" / "images").mkdir(parents=True)
    image = tmp_path / "plans" / "images" / "a.png"
    image.write_bytes(b"picture")
    task = DraftTask(
        name="pick", rubric="r", instruction="pick it", starts=(Start(image="images/a.png"),)
    )
    draft = Draft(
        name="real",
        robot="ur5e",
        margin=0.2,
        max_duration=5.0,
        pairs=2,
        tasks=(task,),
        arms={name: str(bundle.path) for name, bundle in bundles.items()},
    )
    plan = lock(draft, tmp_path / "plans")
    with TrialSession.create(tmp_path / "trial", plan, images=tmp_path / "plans") as session:
        assert (session.directory / "images" / "a.png").read_bytes() == b"picture"
    image.write_bytes(b"another")
    with pytest.raises(UserError, match="reference image has changed"):
        TrialSession.create(tmp_path / "other", plan, images=tmp_path / "plans")


def test_a_plan_survives_its_file(plan, tmp_path):
    plan.write(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan
    assert isinstance(plan, Plan) and isinstance(plan.arms["full"], Arm)
