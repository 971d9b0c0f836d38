// Examples before they are posted: files and tables become lines, and the service says what is wrong with them.
"use strict";

const MAX_FILE_BYTES = 8 * 2 ** 20; // What the check takes at most.
const SEPARATORS = [["\t", "tab"], [",", "comma"], [";", "semicolon"]];
const HEADINGS = new Set([
  "input,answer", "input,output", "input,label", "prompt,completion", "text,label", "text,answer", "question,answer", "query,label",
]);
const SAMPLE = [
  ["I was charged twice this month", "billing"], ["The app crashes when I open it", "bug"],
  ["Please add a dark theme", "wish"], ["My invoice shows the wrong address", "billing"],
  ["Login fails after the update", "bug"], ["It would be great to export as PDF", "wish"],
  ["How do I get a refund?", "billing"], ["The screen stays black", "bug"],
  ["Could you support keyboard shortcuts?", "wish"], ["The discount was not applied to my bill", "billing"],
  ["Uploading a photo gives an error", "bug"], ["I wish there were weekly summaries", "wish"],
];

const toLines = (pairs) => pairs.map(([prompt, completion]) => JSON.stringify({ prompt, completion })).join("\n");

async function readFile(file) {
  if (file.size > MAX_FILE_BYTES) {
    throw new Error(`${file.name} has ${count(file.size, "byte")}; this page takes ${digits(MAX_FILE_BYTES)}. Post it with an OpenAI client.`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (isUtf8(bytes)) return new TextDecoder().decode(bytes);
  let line = 1;
  for (let start = 0, stop; (stop = bytes.indexOf(10, start)) >= 0 && isUtf8(bytes.subarray(start, stop)); start = stop + 1) line += 1;
  throw new Error(`${file.name}: line ${line} is not UTF-8. Save the file as UTF-8.`);
}

function isUtf8(bytes) {
  try {
    new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    return true;
  } catch {
    return false;
  }
}

// The rows of a table, quotes as in RFC 4180; each with the line on which it begins.
function parseTable(text, separator) {
  const rows = [];
  let cells = [], cell = "", isQuoted = false, line = 1, start = 1;
  const endRow = () => {
    cells.push(cell);
    if (cells.length > 1 || cell.trim()) rows.push({ cells, line: start });
    cells = [];
    cell = "";
  };
  for (let place = 0; place < text.length; place += 1) {
    const letter = text[place];
    if (letter === "\n") line += 1;
    if (isQuoted) {
      if (letter !== '"') cell += letter;
      else if (text[place + 1] !== '"') isQuoted = false;
      else {
        cell += '"';
        place += 1;
      }
    } else if (letter === '"' && cell === "") isQuoted = true;
    else if (letter === separator) {
      cells.push(cell);
      cell = "";
    } else if (letter === "\n") {
      endRow();
      start = line;
    } else if (letter !== "\r" || text[place + 1] !== "\n") cell += letter;
  }
  if (isQuoted) throw new Error(`Line ${start}: a quote is opened and never closed.`);
  if (cell || cells.length) endRow();
  return rows;
}

// The pairs of a table of two columns and whether it has a heading; null where the text holds objects, or nothing.
function readTable(text) {
  if (!text.trim() || /^\s*\{/m.test(text)) return null;
  let problem = null;
  for (const [separator, name] of SEPARATORS) {
    try {
      const rows = parseTable(text, separator);
      if (!rows.length || rows[0].cells.length !== 2) continue;
      const odd = rows.find((row) => row.cells.length !== 2);
      if (odd) {
        throw new Error(`Line ${odd.line} has ${count(odd.cells.length, "column")}, the first has 2. Put a text that holds a ${name} in quotes.`);
      }
      const hasHeading = HEADINGS.has(rows[0].cells.map((cell) => cell.trim().toLowerCase()).join(","));
      return { pairs: rows.slice(hasHeading ? 1 : 0).map((row) => row.cells), hasHeading };
    } catch (error) {
      problem = problem || error;
    }
  }
  throw problem || new Error('Line 1 is neither an object such as {"prompt": …, "completion": …} nor a row of two columns, input and answer.');
}

// Put examples into the text field, a table as lines; false where they cannot be read, which is shown.
function takeExamples(text, name = "") {
  forgetCheck();
  showError("examples-error", null);
  let isReadable = true;
  let note = name && `${name} was read.`;
  try {
    const table = readTable(text.replace(/^\uFEFF/, ""));
    if (table) {
      text = toLines(table.pairs);
      const heading = table.hasHeading ? "a heading" : "an example";
      note = `${name || "Table"}: ${count(table.pairs.length, "row")} turned into lines; the first row was read as ${heading}.`;
    }
  } catch (error) {
    isReadable = false;
    showError("examples-error", error);
  }
  if ($("examples").value !== text) $("examples").value = text;
  $("examples-note").textContent = note;
  return isReadable;
}

// The sample never takes the place of what a person has put there.
function insertSample() {
  const sample = toLines(SAMPLE), text = $("examples").value;
  if (!text.trim() || text === sample) takeExamples(sample);
  else $("examples-note").textContent = "Your examples were left as they are. Empty the field to insert the sample.";
}

async function openFile(file) {
  try {
    takeExamples(await readFile(file), file.name);
    const name = file.name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 64);
    if (!$("name").value) $("name").value = name;
  } catch (error) {
    showError("examples-error", error);
  }
}

// The label set as a job is given it: null lets the service find it, an empty one makes answers free text.
function readLabels() {
  if ($("free-text").checked) return [];
  const labels = $("labels").value.split("\n").map((label) => label.trim()).filter(Boolean);
  return labels.length ? labels : null;
}

function forgetCheck() {
  state.checking += 1;
  state.checked = null;
  for (const id of ["checked", "create-form"]) show($(id), false);
}

async function checkExamples(event) {
  event.preventDefault();
  if (isBusy("check")) return;
  show($("job"), false);
  if (!takeExamples($("examples").value)) return;
  const text = $("examples").value, labels = readLabels();
  if (!text.trim()) {
    showError("examples-error", new Error("There are no examples yet. Paste some, or open a file."));
    $("examples").focus();
    return;
  }
  const note = $("examples-note").textContent, turn = state.checking;
  setBusy("check", true);
  $("examples-note").textContent = "Checking…";
  try {
    const found = await call("POST", "/v1/examples/check", labels === null ? { text } : { text, labels });
    if (turn === state.checking) showCheck(found, { text, labels }); // Else they were changed meanwhile.
  } catch (error) {
    showError("examples-error", error);
  } finally {
    if ($("examples-note").textContent === "Checking…") $("examples-note").textContent = note;
    setBusy("check", false);
  }
}

function showCheck(found, checked) {
  const warnings = found.num_warnings ? `Usable, with ${count(found.num_warnings, "warning")}` : "Nothing wrong with them";
  $("verdict").textContent = found.is_usable ? warnings : `Not usable yet: ${count(found.num_errors, "error")}`;
  $("verdict").className = found.is_usable ? "good" : "bad";
  showFacts("check-facts", [
    ["Examples", digits(found.num_examples)],
    ["Answers", found.labels.length ? count(found.labels.length, "label") : "free text"],
    ...(found.instruction ? [["System message", found.instruction]] : []),
  ]);
  show($("fit-box"), found.num_fitting > 0);
  $("fit-bar").style.width = `${(found.prefix_tokens / found.context_tokens) * 100}%`;
  $("fit").textContent = `${digits(found.num_fitting)} of ${count(found.num_examples, "example")} fit: ` +
    `${digits(found.prefix_tokens)} of ${count(found.context_tokens, "token")} of context.`;
  showProblems(found);
  showError("create-error", null);
  const most = Math.max(1, ...found.labels.map((label) => label.count));
  show($("label-counts-box"), found.labels.length > 0);
  show($("checked"));
  showBars("label-counts", found.labels.map((label) => bar(label.label, label.count / most, digits(label.count))));
  state.checked = found.is_usable ? checked : null;
  show($("create-form"), found.is_usable);
  $("checked-title").focus();
}

function showProblems(found) {
  show($("problems-box"), found.problems.length > 0);
  $("problems").replaceChildren(...found.problems.map((problem) => {
    const row = make("li", "", { class: problem.severity });
    const where = make("span", "", { class: "where" });
    if (problem.line !== null) {
      const link = make("button", `Line ${problem.line}`, { type: "button", class: "link" });
      link.addEventListener("click", () => selectLine(problem.line));
      where.append(link);
    }
    const kind = `${problem.severity === "error" ? "Error" : "Warning"}: ${problem.kind}`;
    row.append(where, make("span", kind, { class: "kind" }), make("span", problem.message, { class: "message" }));
    return row;
  }));
  const more = found.num_errors + found.num_warnings - found.problems.length;
  show($("problems-more"), more > 0);
  $("problems-more").textContent = `And ${digits(more)} more.`;
}

function selectLine(number) {
  const area = $("examples"), lines = area.value.split("\n");
  const start = lines.slice(0, number - 1).reduce((sum, line) => sum + line.length + 1, 0);
  area.focus();
  area.setSelectionRange(start, start + lines[number - 1].length);
  area.scrollTop = (area.scrollHeight / lines.length) * Math.max(0, number - 4);
  area.scrollLeft = 0;
}
