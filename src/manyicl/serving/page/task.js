// One task: what it costs, answers to queries, its quality, and how programs call it.
"use strict";

async function openTask(name) {
  const turn = state.opening += 1;
  let facts;
  try {
    facts = await call("GET", taskPath(name));
  } catch (error) {
    await listTasks();
    showError("tasks-error", error);
    return;
  }
  if (turn !== state.opening) return; // Another was asked for meanwhile.
  leaveTask();
  state.task = facts;
  document.title = `${name} – manyicl`;
  $("task-title").textContent = name;
  show($("instruction"), facts.instruction !== "");
  $("instruction").textContent = facts.instruction;
  for (const id of ["tasks-error", "task-error", "query-error", "quality-error"]) showError(id, null);
  for (const id of ["answer", "curve"]) show($(id), false);
  $("query").value = "";
  showCost(facts);
  const isChoice = facts.labels.length > 0;
  $("quality-title").textContent = isChoice ? "Quality by the number of shots" : "Quality";
  $("quality-help").textContent = "A fifth of the examples is held out and answered after the rest" +
    (isChoice ? ", with few demonstrations and with more. Costs one prefill of the rest." : ". Costs one prefill of the rest, and an answer to each.");
  showSnippet();
  show($("make"), false);
  show($("task"));
  markCurrent();
  $("task-title").focus();
}

function leaveTask() {
  for (const work of [state.answering, state.measuring]) if (work) work.abort();
}

function showCost(facts) {
  showFacts("cost", [
    ["Examples in context", `${digits(facts.num_shots)} of ${digits(facts.num_examples)}`],
    ["Tokens in context", `${digits(facts.prefix_tokens)} of ${digits(facts.context_tokens)}`],
    ["Tokens computed", digits(facts.computed_tokens)],
    ["Prefill", seconds(facts.prefill_seconds)],
    ["Answers", facts.labels.length ? count(facts.labels.length, "label") : "free text"],
  ]);
  const first = facts.left_out[0];
  const where = first && first.line ? `line ${first.line}: ` : "";
  $("left-out").textContent = first ? `${count(facts.num_left_out, "example")} left out: ${where}${first.reason}.` : "";
}

async function deleteTask() {
  $("confirm").close();
  try {
    await call("DELETE", `/v1/models/${encodeURIComponent(state.task.id)}`);
    openNew();
    await listTasks();
  } catch (error) {
    showError("task-error", error);
  }
}

// ---- queries

async function ask(event) {
  event.preventDefault();
  if (state.answering) return;
  const task = state.task, answering = state.answering = new AbortController();
  const started = performance.now();
  showError("query-error", null);
  setBusy("ask", true);
  show($("stop"));
  $("query-note").textContent = "Asking…";
  $("answer").classList.add("old"); // What stands there answers the query before.
  let note = "";
  try {
    const usage = await (task.labels.length ? classify : write)(task, $("query").value, answering.signal);
    showUsage(usage, (performance.now() - started) / 1000);
    showSnippet();
  } catch (error) {
    if (error.name === "AbortError") note = "Stopped.";
    else showError("query-error", error);
    if ($("answer").classList.contains("old")) show($("answer"), false);
  } finally {
    state.answering = null;
    setBusy("ask", false);
    if (document.activeElement === $("stop")) $("ask").focus();
    show($("stop"), false);
    $("query-note").textContent = state.task === task ? note : "";
    $("answer-text").removeAttribute("aria-busy");
  }
}

function showAnswer(text, bars) {
  $("answer").classList.remove("old");
  show($("answer"));
  $("answer-text").textContent = text;
  showBars("probabilities", bars);
  $("answer-cost").textContent = "";
}

async function classify(task, input, signal) {
  const found = await call("POST", "/v1/classify", { model: task.id, input }, signal);
  const best = found.data[0];
  // The service puts the most probable first; an object puts names such as "10" before all others.
  const shares = Object.entries(best.probabilities).sort((one, other) => other[1] - one[1]);
  showAnswer(best.label, shares.map(([label, share]) => bar(label, share, percent(share), label === best.label)));
  return { ...found.usage, num_shots: best.num_shots };
}

async function write(task, input, signal) {
  const messages = [{ role: "user", content: input }];
  const body = { model: task.id, messages, stream: true, stream_options: { include_usage: true } };
  const answer = await send("POST", "/v1/chat/completions", body, signal);
  $("answer-text").setAttribute("aria-busy", "true"); // Screen readers wait for the whole of it.
  showAnswer("", []);
  let usage = null;
  for await (const chunk of readEvents(answer)) {
    if (chunk.choices.length) $("answer-text").append(chunk.choices[0].delta.content);
    usage = chunk.usage || usage;
  }
  return usage;
}

function showUsage(usage, time) {
  const cached = usage.prompt_tokens_details.cached_tokens, computed = usage.prompt_tokens - cached;
  const shots = usage.num_shots === undefined ? "" : ` after ${count(usage.num_shots, "shot")}`;
  const written = usage.completion_tokens ? `, ${digits(usage.completion_tokens)} written` : "";
  $("answer-cost").textContent = `${seconds(time)}${shots}. Tokens: ${digits(cached)} cached, ${digits(computed)} computed${written}.`;
}

// ---- quality

async function measure() {
  if (state.measuring) return;
  const task = state.task, measuring = state.measuring = new AbortController();
  showError("quality-error", null);
  setBusy("measure", true);
  $("quality-note").textContent = "Measuring…";
  try {
    const found = task.labels.length
      ? await call("GET", taskPath(task.id, "/shot-curve"), undefined, measuring.signal)
      : await call("POST", taskPath(task.id, "/quality"), {}, measuring.signal);
    showCurve(found, found.points || [found]);
  } catch (error) {
    if (error.name !== "AbortError") showError("quality-error", error);
  } finally {
    state.measuring = null;
    setBusy("measure", false);
    $("quality-note").textContent = "";
  }
}

function showCurve(found, points) {
  const metric = found.metric === "accuracy" ? "Accuracy" : "Token F1";
  $("metric-head").textContent = metric;
  $("curve-caption").textContent = `${metric} on ${count(found.num_held_out, "example")} held out of the context`;
  $("curve-rows").replaceChildren(...points.map((point) => {
    const row = make("tr");
    row.append(make("td", digits(point.num_shots)), make("td", percent(point.value)), make("td", `${percent(point.low)} to ${percent(point.high)}`));
    return row;
  }));
  show($("curve"));
  state.points = points;
  drawCurve();
}

function drawCurve() {
  const width = $("plot").clientWidth;
  if (width) $("plot").replaceChildren(...(state.points.length > 1 ? [plot(state.points, width)] : []));
}

// The curve with its intervals, as wide as its place, so that its text is never scaled; the table beside it says the same.
function plot(points, width) {
  const height = 260, left = 46, right = 18, top = 12, bottom = 42;
  const most = Math.log2(1 + points.at(-1).num_shots) || 1;
  const x = (shots) => left + (Math.log2(1 + shots) / most) * (width - left - right);
  const y = (value) => top + (1 - value) * (height - top - bottom);
  const chart = draw("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    chart.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(share), y2: y(share) }),
      draw("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end" }, `${share * 100}%`));
  }
  chart.append(draw("polyline", { class: "curve", points: points.map((point) => `${x(point.num_shots)},${y(point.value)}`).join(" ") }));
  for (const point of points) {
    const place = x(point.num_shots);
    chart.append(draw("line", { class: "interval", x1: place, x2: place, y1: y(point.low), y2: y(point.high) }),
      draw("circle", { class: "point", cx: place, cy: y(point.value), r: 4 }),
      draw("text", { x: place, y: height - bottom + 18, "text-anchor": "middle" }, digits(point.num_shots)));
  }
  chart.append(draw("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, "shots"));
  return chart;
}

function draw(tag, attributes, content = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (content) node.textContent = content;
  return node;
}

// ---- the snippet

function showSnippet() {
  const input = $("query").value.trim() || "An input", name = state.task.id;
  $("code").textContent = (state.tab === "python" ? pythonSnippet : curlSnippet)(`${location.origin}/v1`, name, input);
  for (const tab of ["python", "curl"]) {
    $(`tab-${tab}`).setAttribute("aria-selected", String(tab === state.tab));
    $(`tab-${tab}`).tabIndex = tab === state.tab ? 0 : -1;
  }
  $("snippet").setAttribute("aria-labelledby", `tab-${state.tab}`);
  $("copied").textContent = "";
}

// A JSON string is a Python string too.
function pythonSnippet(base, name, input) {
  return `${HAS_KEYS ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${HAS_KEYS ? 'os.environ["MANYICL_API_KEY"]' : '"none"'})
answer = client.chat.completions.create(
    model=${JSON.stringify(name)},
    messages=[{"role": "user", "content": ${JSON.stringify(input)}}],
)
print(answer.choices[0].message.content)`;
}

function curlSnippet(base, name, input) {
  const isChoice = state.task.labels.length > 0;
  const body = isChoice ? { model: name, input } : { model: name, messages: [{ role: "user", content: input }] };
  return `curl ${base}/${isChoice ? "classify" : "chat/completions"} \\
${HAS_KEYS ? '  -H "Authorization: Bearer $MANYICL_API_KEY" \\\n' : ""}  -H "Content-Type: application/json" \\
  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
}

async function copySnippet() {
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("copied").textContent = "Copied.";
  } catch { // Not over plain HTTP from another machine: select it, so that a key press copies it.
    getSelection().selectAllChildren($("code"));
    $("copied").textContent = "Selected; press Ctrl+C.";
  }
}

function switchTab(tab) {
  state.tab = tab;
  showSnippet();
}
