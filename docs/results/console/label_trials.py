"""Labels a whole trial in a real Chromium and compares the log with what was pressed.

    .venv/bin/python docs/results/console/label_trials.py --out docs/results/console/labels.json

Real nodes, the simulated arm, the shipped policies. By turns the mouse and the keyboard; the page
is reloaded after every tenth trial, and a second page is open all the time. Measured by the page's
own performance timeline, from the click to the server's word that the label is on the disk
(fsynced).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

from rlrc_ros.trials.plan import Draft, DraftTask, lock
from rlrc_ros.trials.session import read_trial

KEYS = {"success": "1", "failure": "2", "partial": "3"}
PATIENCE = 60.0
"""s for anything at all."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        directory = Path(place) / "trial"
        address = stack.enter_context(console(Path(place), directory, arguments.pairs))
        page = stack.enter_context(contextlib.closing(Page(address)))
        began = time.monotonic()
        pressed = [one_trial(page, number) for number in range(1, 2 * arguments.pairs + 1)]
        seconds = time.monotonic() - began
        trials = read_trial(directory).trials
    logged = [(t.labels[-1].outcome, t.labels[-1].score, t.labels[-1].notes) for t in trials]
    wanted = [(one["outcome"], one["score"], one["notes"]) for one in pressed]
    times = [one["ms"] for one in pressed]
    result = {
        "command": " ".join([Path(__file__).name, *sys.argv[1:]]),
        "trials": len(trials),
        "wrong_or_missing": sum(a != b for a, b in zip(logged, wanted, strict=False))
        + abs(len(logged) - len(wanted)),
        "labels_per_trial": sorted({len(trial.labels) for trial in trials}),
        "click_to_logged_ms": {
            "p50": float(np.percentile(times, 50)),
            "p95": float(np.percentile(times, 95)),
            "p99": float(np.percentile(times, 99)),
            "max": max(times),
            "all": times,
        },
        "pressed": pressed,
        "seconds": round(seconds, 1),
        "load_average": os.getloadavg(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "browser": page.version,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    told = {k: v for k, v in result["click_to_logged_ms"].items() if k != "all"}
    print(f"{result['trials']} trials, {result['wrong_or_missing']} wrong or missing, {told}")


@contextlib.contextmanager
def console(place: Path, directory: Path, pairs: int):
    """The console as a user starts it; gives its address."""
    tasks = tuple(
        DraftTask(name=family, rubric="as the simulator judges", family=family, first_seed=seed)
        for family, seed in (("put", 5_000), ("push", 6_000))
    )
    draft = Draft(
        name="Labels", robot="sim", margin=0.2, max_duration=1.0, pairs=pairs, tasks=tasks,
        arms={"original": "tabletop-original", "compressed": "tabletop-compressed"},
    )  # fmt: skip
    lock(draft, place).write(place / "plan.yaml")
    words = ["trial", "console", directory, "--plan", place / "plan.yaml", "--port", "0", "--json"]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("rlrc"), *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()


class Page:
    """A tab of a headless Chromium, and a second one that only looks on."""

    def __init__(self, address: str) -> None:
        options = Options()
        for word in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--window-size=1280,900",
        ):
            options.add_argument(word)
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        self.version = self.driver.capabilities["browserVersion"]
        self.driver.get(address)
        first = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        self.driver.get(address)
        self.driver.switch_to.window(first)

    def close(self) -> None:
        """End the browser."""
        self.driver.quit()

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression holds in the page."""
        deadline = time.monotonic() + PATIENCE
        script = f"return Boolean(typeof view !== 'undefined' && view && ({condition}))"
        while not self.driver.execute_script(script):
            if time.monotonic() > deadline:
                raise TimeoutError(condition)
            time.sleep(0.1)  # polling must not be what is measured

    def press(self, identity: str, key: str, mouse: bool) -> None:
        """A button, by mouse or by its key."""
        self.wait(
            f"!$('{identity}').disabled && performance.now() > armed && isShown('{identity}')"
        )
        if mouse:
            self.driver.find_element("id", identity).click()
        else:
            self.driver.find_element("tag name", "body").send_keys(key)


def one_trial(page: Page, number: int) -> dict[str, object]:
    """Start, let it run out of time, label; what was pressed and how long it took."""
    rng = random.Random(number)
    outcome = rng.choice(list(KEYS))
    notes = f"note {number}" if rng.random() < 0.5 else ""
    score = 5 * rng.randrange(21) if outcome == "partial" else None
    mouse = bool(number % 2)
    page.wait(f"view.state === 'ready' && view.next_trial === {number}")
    page.press("start", "s", mouse)
    page.wait("view.state === 'stopped'")
    if notes:
        page.driver.find_element("id", "notes").send_keys(notes)
        page.driver.execute_script("document.activeElement.blur()")
    page.press(outcome, KEYS[outcome], mouse)
    if score is not None:
        slider = page.driver.find_element("id", "score")
        steps = (score - 50) // 5
        slider.send_keys((Keys.RIGHT if steps > 0 else Keys.LEFT) * abs(steps))
        page.driver.find_element("id", "judge-ok").click()
    page.wait(f"performance.getEntriesByName('label').some((e) => e.detail.trial === {number})")
    ms = page.driver.execute_script(
        "return performance.getEntriesByName('label').find((e) => e.detail.trial === arguments[0])"
        ".duration",
        number,
    )
    if number % 10 == 0:
        page.driver.refresh()
    return {"outcome": outcome, "score": score, "notes": notes, "mouse": mouse, "ms": ms}


if __name__ == "__main__":
    main()
