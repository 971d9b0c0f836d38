"use strict";
// Without this script the page shows everything it holds; with it tables sort, figures switch views and methods can be hidden.

function sortTable(heading) {
  const table = heading.closest("table");
  const place = [...heading.parentNode.children].indexOf(heading);
  const isNumber = heading.classList.contains("number");
  const before = heading.getAttribute("aria-sort");
  const isAscending = before ? before === "descending" : !isNumber;
  const valueOf = (row) => row.children[place].dataset.value;
  const rows = [...table.tBodies[0].rows];
  rows.sort((left, right) => {
    const [one, other] = [valueOf(left), valueOf(right)];
    if (one === "" || other === "") return (one === "") - (other === ""); // What is not there comes last either way.
    const order = isNumber ? Number(one) - Number(other) : one.localeCompare(other, undefined, { numeric: true });
    return isAscending ? order : -order;
  });
  for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}

function addSwitch(box) {
  const views = [...box.querySelectorAll(":scope > .view")];
  const bar = document.createElement("div");
  bar.className = "switch";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "View");
  const show = (chosen) => {
    views.forEach((view) => { view.hidden = view !== chosen; });
    [...bar.children].forEach((button, place) => button.setAttribute("aria-pressed", String(views[place] === chosen)));
  };
  for (const view of views) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = view.dataset.label;
    button.addEventListener("click", () => show(view));
    bar.append(button);
  }
  box.before(bar);
  box.classList.add("live"); // The names of the views then stand in the bar alone.
  show(views[0]);
}

function toggleMethod(button) {
  const isOn = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(isOn));
  for (const group of button.closest("figure").querySelectorAll(".chart .series")) {
    if (group.dataset.method === button.dataset.method) group.classList.toggle("off", !isOn);
  }
}

document.querySelectorAll("th .sort").forEach((button) => button.addEventListener("click", () => sortTable(button.closest("th"))));
document.querySelectorAll(".switched").forEach(addSwitch);
document.querySelectorAll(".legend button").forEach((button) => button.addEventListener("click", () => toggleMethod(button)));
