// The page: the list of tasks, the job that makes one, the key, and what happens at a click.
"use strict";

const POLL_MS = 300;
const MAX_POLL_MS = 2000;
const JOBS = "/v1/fine_tuning/jobs";
const COMPUTED = /^(\d+) of (\d+) tokens computed/;
const JOB_WORDS = { queued: "Waiting for its turn", running: "Reading the examples", succeeded: "Ready", failed: "Failed", cancelled: "Cancelled: nothing of it is kept" };

// ---- tasks

async function listTasks() {
  try {
    // The newest first. A list that stays as it is keeps the focus and its place.
    const names = (await call("GET", "/v1/models")).data.map((model) => model.id).filter((name) => name !== "base").reverse();
    const shown = [...$("tasks").children].map((entry) => entry.textContent);
    if (names.join() !== shown.join()) $("tasks").replaceChildren(...names.map((name) => {
      const entry = make("li"), button = make("button", name, { type: "button", class: "row" });
      button.addEventListener("click", () => openTask(name));
      entry.append(button);
      return entry;
    }));
    show($("no-tasks"), !names.length);
    showError("tasks-error", null);
    markCurrent();
    return true;
  } catch (error) {
    if (error.status === 401) $("tasks").replaceChildren(); // At any other error they are probably still there.
    show($("no-tasks"), false);
    showError("tasks-error", error);
    return false;
  }
}

function markCurrent() {
  for (const button of document.querySelectorAll("nav .row")) {
    const isCurrent = button.id === "new-task" ? !state.task : Boolean(state.task) && button.textContent === state.task.id;
    if (isCurrent) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
}

function openNew() {
  leaveTask();
  state.opening += 1;
  state.task = null;
  document.title = "manyicl";
  showError("tasks-error", null);
  show($("task"), false);
  show($("make"));
  markCurrent();
  $("make-title").focus();
}

// ---- the job

async function createTask(event) {
  event.preventDefault();
  if (isBusy("create")) return;
  showError("create-error", null);
  const name = $("name").value.trim(), { text, labels } = state.checked;
  setBusy("create", true);
  try {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", new File([text], `${name}.jsonl`));
    const file = await call("POST", "/v1/files", form);
    const wanted = { training_file: file.id, suffix: name, metadata: { name }, ...(labels === null ? {} : { labels }) };
    let job;
    try {
      job = await call("POST", JOBS, wanted);
    } catch (error) {
      await removeFile(file.id);
      throw error;
    }
    await watchJob(job);
  } catch (error) {
    showError("create-error", error);
  } finally {
    setBusy("create", false);
  }
}

// The task keeps its examples; the file has done its work.
const removeFile = (id) => send("DELETE", `/v1/files/${id}`).catch(() => {});

// Show a job until it has ended, and then what it made.
async function watchJob(job) {
  state.job = job.id;
  showError("job-error", null);
  for (const id of ["examples-form", "checked", "create-form"]) show($(id), false);
  for (const id of ["job", "cancel"]) show($(id));
  $("job-title").textContent = `Making ${job.metadata.name}`;
  $("job-title").focus();
  for (let wait = POLL_MS; ; wait = Math.min(MAX_POLL_MS, wait * 1.2)) {
    try {
      job = await call("GET", `${JOBS}/${job.id}`);
      showProgress(job, (await call("GET", `${JOBS}/${job.id}/events?limit=100`)).data);
      showError("job-error", null);
    } catch (error) { // The job goes on, also when the service is away for a while.
      showError("job-error", error);
      if (error.status >= 400 && error.status < 429) break;
    }
    if (job.finished_at) break;
    await later(wait);
  }
  state.job = null;
  show($("cancel"), false);
  show($("examples-form"));
  if (job.finished_at) await removeFile(job.training_file);
  if (job.status === "succeeded") {
    for (const id of ["examples", "labels", "name"]) $(id).value = "";
    $("free-text").checked = false;
    $("examples-note").textContent = "";
    forgetCheck();
    show($("job"), false);
    await listTasks();
    if (!state.task) await openTask(job.fine_tuned_model);
  } else if (job.finished_at) {
    showError("job-error", job.error); // None where it was cancelled.
    $("job-title").focus();
  }
}

function showProgress(job, events) {
  const told = events.map((event) => COMPUTED.exec(event.message)).find(Boolean);
  const [done, total] = told ? told.slice(1).map(Number) : [0, 0];
  const share = job.status === "succeeded" ? 100 : Math.floor((100 * done) / total);
  const isKnown = Number.isFinite(share);
  $("progress").classList.toggle("waiting", !isKnown && !job.finished_at);
  if (isKnown) $("progress").setAttribute("aria-valuenow", String(share));
  else $("progress").removeAttribute("aria-valuenow");
  $("progress-bar").style.width = isKnown ? `${share}%` : "";
  const isCounting = isKnown && job.status === "running";
  // Read out when it changes: the count, which changes all the time, stands beside it.
  const text = `${JOB_WORDS[job.status]}.`;
  if ($("job-status").textContent !== text) $("job-status").textContent = text;
  $("job-tokens").textContent = isCounting ? `${digits(done)} of ${digits(total)} tokens computed` : "";
  const others = events.filter((event) => !COMPUTED.test(event.message));
  $("events").replaceChildren(...others.reverse().map((event) => make("li", event.message, { class: event.level })));
}

async function cancelJob() {
  try {
    await call("POST", `${JOBS}/${state.job}/cancel`);
  } catch (error) {
    showError("job-error", error);
  }
}

// ---- the key

async function useKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  $("key").value = "";
  $("tasks").replaceChildren();
  for (const id of ["examples-error", "create-error", "job-error"]) showError(id, null);
  openNew();
  await start();
}

async function start() {
  const hasKey = !HAS_KEYS || sessionStorage.getItem(KEY) !== null;
  show($("key-form"), HAS_KEYS);
  show($("forget-key"), HAS_KEYS && hasKey);
  $("key-note").textContent = "";
  if (!hasKey) {
    $("tasks").replaceChildren();
    show($("no-tasks"), false);
    showError("tasks-error", new Error("Give your API key to see your tasks."));
    return;
  }
  const isIn = await listTasks();
  if (!isIn || state.job) return;
  $("key-note").textContent = HAS_KEYS ? "In use, in this tab only." : "";
  try {
    const unfinished = (await call("GET", JOBS)).data.find((job) => !job.finished_at && job.metadata.name);
    if (unfinished) await watchJob(unfinished);
  } catch (error) {
    showError("tasks-error", error);
  }
}

// ---- what happens at a click

function listenToExamples() {
  const area = $("examples");
  for (const id of ["examples", "labels", "free-text"]) $(id).addEventListener("input", forgetCheck);
  $("sample").addEventListener("click", insertSample);
  $("file").addEventListener("change", async () => {
    const [file] = $("file").files;
    if (file) await openFile(file);
    $("file").value = "";
  });
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("dropping");
  });
  area.addEventListener("dragleave", () => area.classList.remove("dropping"));
  area.addEventListener("drop", (event) => {
    area.classList.remove("dropping");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    openFile(event.dataTransfer.files[0]);
  });
  $("examples-form").addEventListener("submit", checkExamples);
  $("create-form").addEventListener("submit", createTask);
  $("cancel").addEventListener("click", cancelJob);
}

function listenToTask() {
  $("query-form").addEventListener("submit", ask);
  $("query").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("query-form").requestSubmit();
  });
  $("stop").addEventListener("click", () => state.answering && state.answering.abort());
  $("measure").addEventListener("click", measure);
  addEventListener("resize", drawCurve);
  $("copy").addEventListener("click", copySnippet);
  for (const tab of ["python", "curl"]) {
    $(`tab-${tab}`).addEventListener("click", () => switchTab(tab));
    $(`tab-${tab}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      switchTab(tab === "python" ? "curl" : "python");
      $(`tab-${state.tab}`).focus();
    });
  }
  $("delete").addEventListener("click", () => {
    $("confirm-title").textContent = `Delete ${state.task.id}?`;
    $("confirm").showModal();
  });
  $("confirm-no").addEventListener("click", () => $("confirm").close());
  $("confirm-yes").addEventListener("click", deleteTask);
}

$("new-task").addEventListener("click", openNew);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
});
$("forget-key").addEventListener("click", () => useKey(""));
listenToExamples();
listenToTask();
start();
