// What the other scripts stand on: the document, and requests to the service.
// What users or the service wrote enters the document as text alone (textContent, value), never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const HAS_KEYS = document.documentElement.dataset.keys === "yes";
const KEY = "manyicl-key";

// task: facts of the task that is shown, or null; checked: the text and labels that were found usable; job: id of the one that runs;
// points: the curve that is drawn; checking and opening: numbers that rise, so that what comes too late is known.
const state = { task: null, checked: null, job: null, answering: null, measuring: null, points: [], checking: 0, opening: 0, tab: "python" };

function make(tag, content = "", attributes = {}) {
  const node = document.createElement(tag);
  node.textContent = content;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function show(node, isShown = true) {
  node.hidden = !isShown;
}

function showError(id, error) {
  const text = error ? error.message || String(error) : "";
  show($(id), Boolean(error));
  if ($(id).textContent !== text) $(id).textContent = text; // The same again is not read out again.
  if (error && error.status === 401 && HAS_KEYS) $("key").focus();
}

// A button whose work is under way keeps the focus, which one that is disabled loses.
function setBusy(id, isAtWork) {
  $(id).setAttribute("aria-disabled", String(isAtWork));
}

const isBusy = (id) => $(id).getAttribute("aria-disabled") === "true";

function showFacts(id, facts) {
  $(id).replaceChildren(...facts.map(([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", name), make("dd", value));
    return pair;
  }));
}

// Bars in a list, which the keyboard reaches where it has to be scrolled.
function showBars(id, bars) {
  $(id).replaceChildren(...bars);
  if ($(id).scrollHeight > $(id).clientHeight) $(id).tabIndex = 0;
  else $(id).removeAttribute("tabindex");
}

function bar(label, share, number, isBest = false) {
  const row = make("li", "", isBest ? { class: "best" } : {});
  const meter = make("div", "", { class: "meter", "aria-hidden": "true" });
  const fill = make("div");
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  meter.append(fill);
  row.append(make("span", label, { class: "label" }), meter, make("span", number, { class: "number" }));
  return row;
}

const digits = (number) => number.toLocaleString("en");
const count = (number, word) => `${digits(number)} ${word}${number === 1 ? "" : "s"}`;
const percent = (share) => `${(share * 100).toFixed(1)}%`;
const seconds = (number) => (number < 10 ? `${number.toFixed(2)} s` : `${digits(Math.round(number))} s`);
const later = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

class ServiceError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// The answer to a request; an error of the service is thrown with its own words.
async function send(method, path, body, signal) {
  const headers = {};
  const key = HAS_KEYS ? sessionStorage.getItem(KEY) : null;
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, { method, headers, body, signal, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service cannot be reached. Is it running?");
  }
  if (answer.ok) return answer;
  let message = `The service answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* A proxy's page: its status says what there is to say. */ }
  const wait = answer.headers.get("Retry-After");
  throw new ServiceError(wait && !/ again /i.test(message) ? `${message} Try again in ${wait} s.` : message, answer.status);
}

const call = async (method, path, body, signal) => (await send(method, path, body, signal)).json();
const taskPath = (name, rest = "") => `/v1/tasks/${encodeURIComponent(name)}${rest}`;

// The contents of server-sent events, one by one.
async function* readEvents(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new ServiceError(content.error.message);
      yield content;
    }
  }
}
