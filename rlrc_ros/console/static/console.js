"use strict";
// The trial's state lives in the server, and this page shows it: reload it, close it, open it twice.

const SILENCE = 3000; // ms without a word from the server after which the page says so
const STALE = 1.0; // s: an older picture is no live picture
const TIMEOUT = 4000; // ms for an answer
const ARMED_AFTER = 350; // ms before new buttons take clicks: a double click must not hit them

const $ = (id) => document.getElementById(id);
const keep = {
  get: (name) => { try { return localStorage.getItem(name) || ""; } catch { return ""; } },
  set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* then it is not kept */ } },
};

let view = null; // what the server said last
let heard = 0; // when, by performance.now()
let socket = null;
let armed = 0; // when the buttons that are shown take clicks
let shownKey = ""; // which trial and state the buttons belong to
let judging = null; // what the open dialog is about
const sending = new Set(); // requests under way

// --- asking -----------------------------------------------------------------------------------

const requestId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)),
  (byte) => byte.toString(16).padStart(2, "0")).join("");

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Posts until the server answers where `again` is set: what stops or labels may be sent twice.
// What moves the arm is sent once, and never later than the user asked for it.
async function ask(what, body, again, lost = "No answer from the console's server; sending it again …") {
  sending.add(what);
  render();
  try {
    for (let attempt = 1; ; attempt += 1) {
      try {
        const response = await fetch(`api/${what}`, {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify(body),
          signal: AbortSignal.timeout(TIMEOUT),
        });
        if (response.ok) return "";
        const text = await response.text();
        if (response.status === 409) return JSON.parse(text).error;
        return text || `the server answered ${response.status}`;
      } catch (error) {
        if (!again) return "No answer from the console's server: see what happened before you do it again";
        if (attempt === 1) say(lost);
        await pause(500);
      }
    }
  } finally {
    sending.delete(what);
    render();
  }
}

async function act(what, body, again = false) {
  const problem = await ask(what, body, again);
  say(problem);
  return problem;
}

const current = () => (view && view.trials.length ? view.trials[0] : null);

const actions = {
  start: () => act("start", { trial: view.next_trial }),
  stop: () => act("stop", { trial: runningTrial() }, true),
  finish: () => act("finish", { trial: runningTrial() }, true),
  success: (event) => label("success", null, event),
  failure: (event) => label("failure", null, event),
  partial: () => openJudge("label", current()),
  exclude: () => openJudge("exclude", current()),
};

const runningTrial = () => (view.state === "starting" ? view.next_trial : current().number);

async function label(outcome, score, event) {
  const trial = current();
  const body = { trial: trial.number, outcome, score, notes: $("notes").value, operator: $("operator").value, request: requestId() };
  const problem = await act("label", body, true);
  if (!problem) measure("label", trial.number, event);
  return problem;
}

// In the browser's own performance timeline, from the click to the server's word that it is on disk.
function measure(name, trial, event) {
  performance.measure(name, { start: event.timeStamp, end: performance.now(), detail: { trial } });
}

async function emergency() {
  const button = "use the robot's own button";
  const problem = await ask("emergency_stop", {}, true, `EMERGENCY STOP NOT CONFIRMED: ${button}!`);
  say(problem && `EMERGENCY STOP FAILED, ${button}: ${problem}`);
}

// --- what the server says ---------------------------------------------------------------------

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/live`);
  socket.binaryType = "arraybuffer";
  const mine = socket;
  mine.onmessage = (message) => {
    heard = performance.now();
    if (typeof message.data === "string") {
      view = JSON.parse(message.data);
      view.at = heard;
      render();
    } else picture(message.data);
  };
  mine.onclose = () => { if (socket === mine) { socket = null; setTimeout(connect, 500); } };
}

const live = () => performance.now() - heard < SILENCE && heard > 0;

setInterval(() => {
  if (socket && !live() && socket.readyState === WebSocket.OPEN) { socket.close(); socket = null; connect(); }
  for (const figure of document.querySelectorAll("figure")) markAge(figure);
  renderClock();
  renderGuard();
  renderConnection();
}, 250);

// --- pictures ---------------------------------------------------------------------------------

function figureOf(place) {
  const cameras = $("cameras");
  while (cameras.children.length <= place) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.width = 4; canvas.height = 3;
    const reference = document.createElement("img");
    reference.hidden = true;
    reference.alt = "reference image";
    figure.append(canvas, reference, document.createElement("figcaption"));
    figure.seen = -Infinity;
    cameras.append(figure);
  }
  return cameras.children[place];
}

async function picture(data) {
  const head = new DataView(data);
  const figure = figureOf(head.getUint8(0));
  const taken = performance.now() - 1000 * head.getFloat32(1, true);
  const bitmap = await createImageBitmap(new Blob([new Uint8Array(data, 5)], { type: "image/jpeg" }));
  const canvas = figure.querySelector("canvas");
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    canvas.width = bitmap.width; canvas.height = bitmap.height;
  }
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  figure.seen = taken;
  markAge(figure);
}

function markAge(figure) {
  const age = (performance.now() - figure.seen) / 1000;
  const name = view ? view.cameras[[...figure.parentNode.children].indexOf(figure)] : "";
  const stale = age > STALE;
  figure.classList.toggle("stale", stale);
  const old = Number.isFinite(age) ? `not live: ${age.toFixed(0)} s old` : "no picture yet";
  figure.querySelector("figcaption").textContent = stale ? `${name}: ${old}` : name;
}

function renderReference() {
  const url = view.step && view.step.reference;
  const setting = url && view.state === "ready"; // at any other time it would hide what happens
  $("overlay").hidden = !setting;
  const select = $("overlay-camera");
  if (select.children.length !== view.cameras.length) {
    select.replaceChildren(...view.cameras.map((name, place) => new Option(name, place)));
  }
  select.hidden = view.cameras.length < 2;
  view.cameras.forEach((_, place) => {
    const image = figureOf(place).querySelector("img");
    const shown = setting && place === Number(select.value || 0);
    if (url && image.dataset.url !== url) { image.dataset.url = url; image.src = url; }
    image.hidden = !shown;
    const difference = $("difference").checked;
    image.style.mixBlendMode = difference ? "difference" : "normal";
    image.style.opacity = difference ? 1 : $("opacity").value / 100;
  });
}

// --- the page ---------------------------------------------------------------------------------

function say(text) {
  $("banner").dataset.text = text || "";
  renderConnection();
}

function renderConnection() {
  const on = live();
  $("connection").textContent = on ? "● live" : "○ no connection";
  $("connection").classList.toggle("lost", !on);
  const said = $("banner").dataset.text || "";
  let text = said || (view && view.problem) || "";
  if (!on && heard) text = "No connection to the console's server. What you see is old. " + said;
  else if (!text && view && !view.ready) text = "Waiting for the robot's nodes …";
  $("banner").textContent = text;
  $("banner").hidden = !text;
  $("banner").classList.toggle("notice", on && !said && !(view && view.problem));
  $("start").disabled = !on || !view || !view.ready || sending.size > 0 || !free();
}

const free = () => view.guard.state === "free";

const PHASES = {
  ready: "Next", starting: "Setting up", running: "Running", stopped: "How did it go?",
  complete: "All trials are done", unblinded: "This trial has been unblinded",
};

const REASONS = {
  finished: "finished", timeout: "ran out of time", operator_stop: "stopped by the operator",
  guard_stop: "stopped by the command guard", client_lost: "whoever ran it was lost",
  policy_error: "the policy failed",
  observation_lost: "the sensors fell silent", node_deactivated: "the node was shut down",
  interrupted: "interrupted: it is run again",
};

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function render() {
  if (!view) return;
  const { step, state, progress } = view;
  const trial = current();
  const active = state === "running" || state === "stopped";
  const key = `${state} ${active ? trial.number : view.next_trial}`;
  if (key !== shownKey) {
    shownKey = key;
    armed = performance.now() + ARMED_AFTER;
    if (document.activeElement instanceof HTMLButtonElement) document.activeElement.blur();
    $("notes").value = state === "stopped" ? keep.get(notesKey()) : "";
  }
  document.title = `${PHASES[state]} – ${view.name}`;
  $("name").textContent = view.name;
  $("trial-id").textContent = view.trial_id;
  $("operator").placeholder = view.operator || "your name";
  $("bar").style.width = `${(100 * progress.done) / Math.max(1, progress.steps)}%`;
  const left = progress.seconds_left ? `, about ${duration(progress.seconds_left)} left` : "";
  const apart = [[progress.excluded, "excluded"], [progress.interrupted, "interrupted"]]
    .filter(([count]) => count).map(([count, what]) => `, ${count} ${what}`).join("");
  $("progress").textContent = `${progress.done} of ${progress.steps} trials${left}${apart}`;

  $("phase").textContent = PHASES[state] + (step ? ` – trial ${active ? trial.number : view.next_trial}` : "");
  const simulated = step && step.simulated ? "The simulator sets up the scene and says what to do." : "";
  const told = active ? trial.instruction : "";
  $("instruction").textContent = step ? told || step.instruction || step.task
    : state === "complete" ? "Nothing is left to run. Unblind from a terminal: rlrc trial unblind" : "";
  $("where").textContent = step ? `pair ${step.pair} of ${progress.pairs}, ${step.place} of ${step.places} · ${step.task}` : "";
  $("note").textContent = step && !active ? step.note || simulated : "";
  $("rubric").textContent = step ? step.rubric : "";
  $("rubric-box").hidden = !step || !step.rubric;

  $("ready-buttons").hidden = state !== "ready";
  $("running-buttons").hidden = state !== "running" && state !== "starting";
  $("finish").hidden = state === "starting";
  $("label-buttons").hidden = state !== "stopped";
  for (const id of ["success", "failure", "partial"]) $(id).disabled = sending.has("label");
  $("exclude").hidden = !view.exclusions.length;
  let ended = "";
  if (state === "stopped") {
    const judged = trial.judged ? ` The simulator judges: ${trial.judged}.` : "";
    ended = `It ${REASONS[trial.termination_reason] || trial.termination_reason} after ${trial.duration.toFixed(1)} s.${judged}`;
    if (trial.message && trial.termination_reason !== "timeout") ended += ` (${trial.message})`;
  }
  $("ended").textContent = ended;
  renderClock();
  renderResults();
  renderGuard();
  view.cameras.forEach((_, place) => markAge(figureOf(place)));
  renderReference();
  renderConnection();
}

function renderClock() {
  $("clock").hidden = !view || view.state !== "running";
  if ($("clock").hidden) return;
  const seconds = Math.min(current().elapsed + (performance.now() - view.at) / 1000, view.max_duration);
  $("clock-bar").style.width = `${(100 * seconds) / view.max_duration}%`;
  $("elapsed").textContent = `${seconds.toFixed(0)} of ${view.max_duration.toFixed(0)} s`;
}

function renderGuard() {
  if (!view) return;
  const { state, reason } = live() ? view.guard : { state: "unknown", reason: "" };
  $("guard").textContent = `arm: ${state}${reason ? `, ${reason}` : ""}`;
  $("guard").classList.toggle("bad", state !== "free");
  $("release").hidden = state !== "stopped";
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function renderResults() {
  const done = view.trials.filter((trial) => trial.termination_reason);
  const text = JSON.stringify(done);
  if ($("results").dataset.text === text) return;
  $("results").dataset.text = text;
  $("results").replaceChildren(...done.map((trial) => {
    const row = document.createElement("li");
    row.classList.toggle("excluded", Boolean(trial.excluded));
    const score = trial.score === null ? "" : ` ${trial.score}`;
    const outcome = trial.termination_reason === "interrupted" ? "interrupted" : trial.outcome + score;
    const last = trial.labels[trial.labels.length - 1];
    const parts = [trial.instruction, trial.excluded && `excluded: ${trial.excluded}`,
      trial.labels.length > 1 && `corrected: ${last.reason}`, last && last.notes, last && last.operator];
    row.append(element("span", "number", `#${trial.number}`), element("span", `tag ${trial.outcome}`, outcome),
      element("span", "what", parts.filter(Boolean).join(" · ")));
    if (trial.labels.length && !trial.excluded && view.state !== "unblinded") {
      const correct = element("button", "", "Correct …");
      correct.addEventListener("click", () => openJudge("correct", trial));
      row.append(correct);
    }
    return row;
  }));
}

// --- partial, correct, exclude ------------------------------------------------------------------

function openJudge(what, trial) {
  if (!trial || judging) return;
  judging = { what, trial, request: requestId() };
  const titles = { label: "How much was done?", correct: `Correct trial ${trial.number}`, exclude: `Exclude trial ${trial.number}` };
  $("judge-title").textContent = titles[what];
  const said = (one) => `${one.time.slice(11, 19)} UTC ${one.outcome}${one.score === null ? "" : ` ${one.score}`}`
    + [one.operator && ` by ${one.operator}`, one.reason && `: ${one.reason}`].filter(Boolean).join("");
  $("history").replaceChildren(...(what === "correct" ? trial.labels : []).map((one) => element("li", "", said(one))));
  $("outcomes").hidden = what !== "correct";
  $("rule-row").hidden = what !== "exclude";
  $("reason-row").hidden = what !== "correct";
  $("rule").replaceChildren(...view.exclusions.map((rule) => new Option(rule, rule)));
  for (const radio of document.querySelectorAll("[name=outcome]")) {
    radio.checked = radio.value === (what === "label" ? "partial" : trial.outcome);
  }
  $("score").value = trial.score === null ? 50 : trial.score;
  $("reason").value = "";
  $("judge-notes").value = what === "correct" ? trial.labels[trial.labels.length - 1].notes : $("notes").value;
  $("judge-problem").textContent = "";
  showScore();
  $("judge").show();
  $(what === "correct" ? "reason" : what === "exclude" ? "rule" : "score").focus();
}

function showScore() {
  const chosen = document.querySelector("[name=outcome]:checked");
  $("score-row").hidden = judging.what === "exclude" || !chosen || chosen.value !== "partial";
  $("score-text").textContent = $("score").value;
}

function closeJudge() {
  $("judge").close();
  judging = null;
}

async function judge(event) {
  event.preventDefault();
  const { what, trial, request } = judging;
  const chosen = document.querySelector("[name=outcome]:checked");
  const outcome = chosen ? chosen.value : "";
  const body = { trial: trial.number, notes: $("judge-notes").value, operator: $("operator").value };
  if (what === "exclude") body.rule = $("rule").value;
  else Object.assign(body, { outcome, score: outcome === "partial" ? Number($("score").value) : null, request });
  if (what === "correct") body.reason = $("reason").value;
  $("judge-ok").disabled = true;
  const problem = await ask(what, body, what !== "exclude");
  $("judge-ok").disabled = false;
  if (problem) { $("judge-problem").textContent = problem; return; }
  if (what === "label") measure("label", trial.number, event);
  say("");
  closeJudge();
}

// --- hands ------------------------------------------------------------------------------------

const notesKey = () => `notes ${view.trial_id} ${current().number}`;
const isShown = (id) => $(id).offsetParent !== null && !$(id).disabled;

function press(id, event) {
  if (judging || !isShown(id)) return;
  // A stop is never refused; anything else waits until the user can have seen it.
  if (id !== "stop" && performance.now() < armed) return;
  actions[id](event);
}

for (const id of Object.keys(actions)) $(id).addEventListener("click", (event) => press(id, event));
$("emergency").addEventListener("pointerdown", emergency);
$("emergency").addEventListener("keydown", (event) => { if (event.key === "Enter") emergency(); });
$("release").addEventListener("click", async () => {
  if (confirm("Is everybody clear of the arm? It will follow commands again.")) await act("release", {});
});
$("judge").addEventListener("submit", judge);
$("judge-cancel").addEventListener("click", closeJudge);
$("judge").addEventListener("input", showScore);
$("operator").value = keep.get("operator");
$("operator").addEventListener("input", () => keep.set("operator", $("operator").value));
$("notes").addEventListener("input", () => keep.set(notesKey(), $("notes").value));
for (const id of ["opacity", "difference", "overlay-camera"]) $(id).addEventListener("input", () => view && renderReference());

const KEYS = { s: "start", " ": "stop", f: "finish", 1: "success", 2: "failure", 3: "partial" };

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    event.preventDefault();
    if (!event.repeat) emergency();
    return;
  }
  const typing = event.target.matches("select, textarea, input:not([type=range]):not([type=checkbox])");
  if (typing || judging || event.ctrlKey || event.metaKey || event.altKey) return;
  const id = KEYS[event.key.toLowerCase()];
  if (!id) return;
  event.preventDefault(); // a space must not press whatever button has the focus
  if (!event.repeat && view) press(id, event);
});
document.addEventListener("keyup", (event) => {
  if (event.key === " " && event.target.matches("button")) event.preventDefault();
});

connect();
