"use strict";
// Sorting, filtering, links to models, and unpacking of details. Data becomes text nodes and
// attributes, never markup.
const table = document.getElementById("models"), body = table.tBodies[0];
const rows = [...body.rows];
const valueOf = (row, i) => row.cells[i].dataset.value;

function sortBy(head, i) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const isNumber = rows.every((row) => valueOf(row, i) === undefined || isFinite(valueOf(row, i)));
  const compare = isNumber ? (a, b) => a - b : new Intl.Collator("en", { numeric: true }).compare;
  rows.sort((a, b) => {
    const x = valueOf(a, i), y = valueOf(b, i);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);  // last
    return (down ? -1 : 1) * compare(x, y);
  });
  body.append(...rows);
}

[...table.tHead.rows[0].cells].forEach((head, i) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.textContent;
  button.addEventListener("click", () => sortBy(head, i));
  head.replaceChildren(button);
});

const words = document.getElementById("filter"), state = document.getElementById("state");
const count = document.getElementById("count"), all = count.textContent;
const texts = new Map(rows.map((row) => [row, `${row.textContent} ${row.dataset.why ?? ""}`.toLowerCase()]));

function filter() {
  const wanted = words.value.trim().toLowerCase();
  let shown = 0;
  for (const row of rows) {
    const fits = !state.value || row.dataset.state === state.value || (state.value === "worse" && row.dataset.worse);
    row.hidden = !(fits && texts.get(row).includes(wanted));
    shown += !row.hidden;
  }
  count.textContent = wanted || state.value ? `${shown} of ${all}` : all;
}
words.addEventListener("input", filter);
state.addEventListener("change", filter);
document.getElementById("filters").hidden = false;
document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !isTyping) { event.preventDefault(); words.focus(); }
  if (event.key === "Escape" && document.activeElement === words) { words.value = ""; filter(); }
});

const SVG = "http://www.w3.org/2000/svg";
// A node is text, [tag, attributes, children], or the rows of a table: [classes of columns, rows].
function build(node, inSvg) {
  if (typeof node === "string") return document.createTextNode(node);
  if (Array.isArray(node[0])) return buildRows(...node);
  const [tag, attributes, children] = node;
  const isSvg = inSvg || tag === "svg";
  const made = isSvg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map((child) => build(child, isSvg)));
  return made;
}

function buildRows(kinds, rows) {
  const body = document.createElement("tbody");
  for (const cells of rows) {
    const row = body.insertRow();
    cells.forEach((cell, i) => {
      const made = row.insertCell();
      if (kinds[i]) made.className = kinds[i];
      made.append(build(cell, false));
    });
  }
  return body;
}

async function unpack(section) {
  const packed = section.querySelector("script[type='text/plain']");
  if (!packed) return;
  packed.remove();
  const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const nodes = JSON.parse(await new Response(stream).text());
  section.append(...nodes.map((node) => build(node, false)));
}
for (const section of document.querySelectorAll("#details > details"))
  section.addEventListener("toggle", () => { if (section.open) unpack(section); });

async function follow() {
  const anchor = location.hash.startsWith("#model=") && document.getElementById(location.hash.slice(1));
  if (!anchor) return;
  const section = anchor.closest("details");
  section.open = true;
  await unpack(section);
  section.scrollIntoView();
  section.querySelector("summary").focus({ preventScroll: true });
}
window.addEventListener("hashchange", follow);
follow();
