"""The operator's console in a real Chromium, with real nodes behind it."""

import contextlib
import json
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rlrc_ros.trials.plan import Draft, DraftTask, Start, lock
from rlrc_ros.trials.session import read_trial
from tests.ros.conftest import BIN, starting

CHROMIUM, DRIVER = (
    next(filter(None, map(shutil.which, names)), None)
    for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
)
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no Chromium with chromedriver here (Debian: apt install chromium chromium-driver)",
)
PATIENCE = 40.0
RULE = "a cable came loose"
ESCAPE = "\ue00c"


@pytest.fixture(scope="module")
def trial(ros_environment, bundles, tmp_path_factory):
    """A trial of 40 steps whose console runs: its address and its directory."""
    import cv2
    import numpy as np

    place = tmp_path_factory.mktemp("console")
    cv2.imwrite(str(place / "start.png"), np.full((64, 64, 3), 128, np.uint8))
    starts = tuple(Start(seed=seed, image="start.png", note="as shown") for seed in range(20))
    draft = Draft(
        name="Cubes", robot="sim", margin=0.2, max_duration=120.0, pairs=20, exclusions=(RULE,),
        arms={name: str(bundle.path) for name, bundle in bundles.items()},
        tasks=(DraftTask(name="put", family="put", rubric="on the plate", starts=starts),),
    )  # fmt: skip
    lock(draft, place).write(place / "plan.yaml")
    directory = place / "trial"
    words = ["trial", "console", directory, "--plan", place / "plan.yaml", "--operator", "ann"]
    with starting(ros_environment, place) as start:
        process = start([BIN / "rlrc", *words, "--port", "0", "--json"])
        deadline = time.monotonic() + PATIENCE
        while not process.output.startswith("{"):
            assert process.popen.poll() is None and time.monotonic() < deadline, process.output
            time.sleep(0.05)
        address = json.loads(process.output.splitlines()[0])["url"]
        yield address, directory
        process.stop()
        assert "Traceback" not in process.output


class Tab:
    """One open page, in a browser of its own."""

    def __init__(self, address):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(word)
        options.add_argument("--window-size=1280,900")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.get(address)

    def close(self):
        self.driver.quit()

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition):
        """The value of a JavaScript expression once it is truthy."""
        end = time.monotonic() + PATIENCE
        script = f"return typeof view !== 'undefined' && view && ({condition})"
        while not (value := self.run(script)):
            assert time.monotonic() < end, (condition, self.run("return JSON.stringify(view)"))
            time.sleep(0.02)
        return value

    def click(self, identity):
        self.until(f"isShown('{identity}') && performance.now() > armed")
        self.driver.find_element("id", identity).click()

    def key(self, key, shown=None):
        if shown:
            self.until(f"isShown('{shown}') && performance.now() > armed")
        self.driver.find_element("tag name", "body").send_keys(key)

    def write(self, identity, text):
        self.driver.find_element("id", identity).send_keys(text)

    def text(self, identity):
        return self.run("return $(arguments[0]).textContent", identity)

    def offline(self, off):
        self.driver.execute_cdp_cmd("Network.enable", {})
        rate = 0 if off else -1
        self.driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": off, "latency": 0, "downloadThroughput": rate, "uploadThroughput": rate},
        )

    def to_label(self):
        """Run the next trial until it waits for its label; its number."""
        number = self.until("view.state === 'ready' && view.next_trial")
        self.key("s", "start")
        self.until("view.state === 'running'")
        self.key("f", "finish")
        self.until("view.state === 'stopped'")
        return number


@pytest.fixture(scope="module")
def browser(trial):
    with contextlib.closing(Tab(trial[0])) as tab:
        yield tab


@pytest.fixture
def tab(browser):
    """The module's page, in whatever trial comes next."""
    browser.offline(False)
    browser.driver.refresh()
    if browser.until("view.state") != "ready":  # a test before has failed
        browser.run("ask('finish', {trial: runningTrial()}, false)")
        browser.until("view.state === 'stopped'")
        browser.run("label('failure', null, new Event('click'))")
    browser.until("view.state === 'ready' && view.ready && !$('start').disabled")
    return browser


def logged(trial, number):
    return read_trial(trial[1]).trial(number)


def test_a_trial_by_keyboard_with_a_reload_in_every_state(tab, trial):
    number = tab.until("view.next_trial")
    assert tab.run("return getComputedStyle(document.querySelector('figure img')).opacity") == "0.5"
    assert tab.until("document.querySelector('figure img').naturalWidth") == 64
    assert tab.text("note") == "as shown" and tab.text("rubric") == "on the plate"
    tab.key("s", "start")
    tab.until("view.state === 'running'")
    assert tab.run("return document.querySelector('figure img').hidden"), "it would hide the arm"
    tab.driver.refresh()
    assert tab.until("view.state === 'running' && $('clock').hidden === false")
    assert tab.text("instruction").startswith("put the ")
    tab.key(" ", "stop")
    tab.until("view.state === 'stopped'")
    assert "stopped by the operator" in tab.text("ended")
    tab.write("notes", "fell 1 2 3 s")  # none of these is a command here
    tab.driver.refresh()
    tab.until("view.state === 'stopped' && $('notes').value === 'fell 1 2 3 s'")
    tab.key("2", "failure")
    tab.until(f"view.state === 'ready' && view.next_trial === {number + 1}")
    done = logged(trial, number)
    assert (done.outcome, done.termination_reason) == ("failure", "operator_stop")
    assert [(label.notes, label.operator) for label in done.labels] == [("fell 1 2 3 s", "ann")]
    assert (trial[1] / "bags" / done.bag / "metadata.yaml").is_file()


def test_partial_then_corrected_with_an_audit_trail_then_excluded(tab, trial):
    number = tab.to_label()
    tab.click("partial")
    tab.run("$('score').value = 35; showScore()")
    tab.click("judge-ok")
    tab.until(f"view.state === 'ready' && view.next_trial === {number + 1} && !judging")
    tab.run("document.querySelector('#results button').click()")
    tab.run("document.querySelector('[name=outcome][value=success]').click()")
    tab.click("judge-ok")
    tab.until("$('judge-problem').textContent.includes('needs a reason')")
    tab.write("reason", "it was on the plate")
    tab.click("judge-ok")
    tab.until("!judging")
    labels = logged(trial, number).labels
    assert [(one.outcome, one.score, one.reason) for one in labels] == [
        ("partial", 35.0, ""),
        ("success", None, "it was on the plate"),
    ]

    step = tab.until("view.step").get("index")
    number = tab.to_label()
    tab.click("exclude")
    tab.click("judge-ok")
    tab.until("view.state === 'ready' && !judging")
    assert logged(trial, number).excluded == RULE
    assert tab.run("return view.step.index") == step, "its step is run again"


def test_two_pages_cannot_do_the_same_thing_twice(tab, trial):
    with contextlib.closing(Tab(trial[0])) as other:
        number = other.until("view.ready && view.next_trial")
        ask = "return ask('start', {trial: arguments[0]}, false)"
        answers = [page.run(ask, number) for page in (tab, other)]
        assert sorted(answers)[0] == "" and any(answers), answers
        other.until("view.state === 'running'")
        tab.key("f", "finish")
        for page in (tab, other):
            page.until("view.state === 'stopped'")
        # the other page does not hear yet that it is labelled
        stale = {"trial": number, "outcome": "failure", "score": None, "request": "other"}
        tab.click("success")
        other.until(f"view.next_trial === {number + 1} && view.state === 'ready'")
        told = other.run("return ask('label', arguments[0], false)", {**stale, "operator": "bob"})
        assert "is labelled success by ann already" in told
        assert [label.outcome for label in logged(trial, number).labels] == ["success"]
        refused = other.run("return ask('start', {trial: arguments[0]}, false)", number)
        assert "cannot start now: this page was behind" in refused
        assert other.run("return view.state") == "ready"


def test_a_label_that_is_given_without_a_connection_arrives_once(tab, trial):
    number = tab.to_label()
    tab.offline(True)
    tab.key("1", "success")
    tab.until("$('banner').textContent.includes('sending it again')")
    assert logged(trial, number).outcome == "unlabelled"
    tab.offline(False)
    tab.until("view.state === 'ready'")
    assert [label.outcome for label in logged(trial, number).labels] == ["success"]
    tab.until("$('banner').hidden")


def test_a_start_is_never_sent_late(tab):
    number = tab.until("view.next_trial")
    tab.offline(True)
    tab.key("s", "start")
    tab.until("$('banner').textContent.includes('see what happened')")
    tab.offline(False)
    time.sleep(1.5)
    assert tab.run("return [view.state, view.next_trial]") == ["ready", number]


def test_the_emergency_stop_is_always_there_and_holds_until_released(tab, trial):
    number = tab.until("view.next_trial")
    tab.key("s", "start")
    tab.until("view.state === 'running'")
    tab.key(ESCAPE)
    tab.until("view.state === 'stopped' && view.guard.state === 'stopped'")
    assert logged(trial, number).termination_reason == "guard_stop"
    tab.click("partial")  # a dialog is open
    assert (
        tab.run(
            "const box = $('emergency').getBoundingClientRect();"
            "return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2).id"
        )
        == "emergency"
    )
    tab.click("judge-cancel")
    tab.key("2", "failure")
    tab.until("view.state === 'ready'")
    assert tab.run("return $('start').disabled")
    assert "the arm is not free" in tab.run("return ask('start', {trial: view.next_trial}, false)")
    tab.driver.find_element("id", "release").click()
    tab.driver.switch_to.alert.dismiss()
    assert tab.run("return view.guard.state") == "stopped"
    tab.driver.find_element("id", "release").click()
    tab.driver.switch_to.alert.accept()
    tab.until("view.guard.state === 'free' && !$('start').disabled")


def test_pictures_are_live_and_say_so_when_they_are_not(tab):
    tab.until("document.querySelector('canvas').width === 128")
    tab.until("!document.querySelector('figure').classList.contains('stale')")
    # as when the network is gone: nothing comes, and no new connection succeeds
    tab.run("window.again = connect; window.connect = () => {}; socket.onmessage = null")
    tab.until("$('banner').textContent.includes('No connection') && $('start').disabled")
    assert tab.text("connection") == "○ no connection"
    tab.until("document.querySelector('figcaption').textContent.startsWith('front: not live')")
    tab.key("s")
    tab.run("window.connect = again; connect()")
    tab.until("!document.querySelector('figure').classList.contains('stale') && live()")
    assert tab.until("view.state") == "ready", "nothing was started blindly"


def test_nothing_that_the_page_gets_tells_the_policies_apart(tab, trial, bundles):
    tab.to_label()
    told = tab.run("return JSON.stringify(view)")
    tab.key("1", "success")
    tab.until("view.state === 'ready'")
    told += tab.run("return JSON.stringify(view) + document.documentElement.outerHTML")
    secrets = [*bundles, *(bundle.hash[:8] for bundle in bundles.values()), "latency", "step-0"]
    secrets += [str(bundle.path) for bundle in bundles.values()]
    assert not [secret for secret in secrets if secret in told]


@pytest.mark.parametrize(
    ("path", "body", "status", "problem"),
    [
        ("label", "not JSON", 400, "no JSON object"),
        ("label", "[1]", 400, "no JSON object"),
        ("label", '{"trial": "1"}', 409, "trial must be a whole number"),
        ("label", '{"trial": 1, "outcome": 5}', 409, "outcome must be a text"),
        ("label", '{"trial": 1, "outcome": "partial", "score": true}', 409, "score must be"),
        ("label", '{"trial": 9999, "outcome": "success"}', 409, "there is no trial 9999"),
        ("stop", '{"trial": 9999}', 409, "trial 9999 is not running"),
        ("exclude", '{"trial": 1, "rule": "I felt like it"}', 409, "is no exclusion rule"),
        ("label", '{"notes": "' + "x" * 20_000 + '"}', 413, ""),
        ("unblind", "{}", 404, ""),
    ],
)
def test_requests_that_make_no_sense(trial, path, body, status, problem):
    address = trial[0].rstrip("/")
    request = urllib.request.Request(
        f"{address}/api/{path}", body.encode(), {"Origin": address}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == status and problem in refused.value.read().decode()


def test_only_the_current_steps_image_is_served(tab, trial):
    step = tab.until("view.step")["index"]
    with urllib.request.urlopen(f"{trial[0]}api/reference/{step}") as answer:
        assert answer.read() == (Path(trial[1]) / "start.png").read_bytes()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{trial[0]}api/reference/{step + 1}")
