// Builds the page from the document that stands in it. No library, no network.
"use strict";

const found = JSON.parse(document.getElementById("document").textContent);

function make(kind, attributes = {}, ...children) {
  const svg = ["svg", "rect", "text", "line", "path", "title", "g"].includes(kind);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", kind) : document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// -- figures ------------------------------------------------------------------------------------

function scaled(value, units) {
  if (!value) return "–";
  let power = 0;
  while (value >= 999.5 && power < units.length - 1) { value /= 1000; power += 1; }
  const digits = value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toPrecision(3);
  return `${digits} ${units[power]}`.trimEnd();
}
const count = (value) => scaled(value, ["", "k", "M", "G", "T", "P"]);
const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB", "PB"]);
function duration(seconds) {
  if (!seconds) return "–";
  if (seconds >= 1) return `${seconds.toPrecision(3)} s`;
  return seconds >= 1e-3 ? `${(1e3 * seconds).toPrecision(3)} ms` : `${(1e6 * seconds).toPrecision(3)} µs`;
}
const plain = (value) => typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : String(value);
const numbers = (values) => Object.entries(values).map(([key, value]) => `${key} ${plain(value)}`).join(", ");

function section(id, title, ...content) {
  const place = make("section", { id }, make("h2", {}, title), ...content);
  document.querySelector("main").append(place);
  document.querySelector("nav").append(make("a", { href: `#${id}` }, title));
}

// -- modules ------------------------------------------------------------------------------------

const whole = found.modules.forward.seconds + found.modules.backward.seconds;

function moduleRow(module) {
  const name = module.path === "" ? found.model : module.path.slice(module.path.lastIndexOf(".") + 1);
  const bar = make("span", { class: "bar", title: `forward ${duration(module.forward.seconds)}, backward ${duration(module.backward.seconds)}` });
  for (const half of ["forward", "backward"]) {
    const share = whole ? 100 * module[half].seconds / whole : 0;
    bar.append(make("i", { class: half, style: `width:${share}%` }));
  }
  const label = make("span", {}, make("span", { class: "name" }, name), make("span", { class: "faint" }, ` ${module.kind} ${module.output}`));
  label.title = module.path;
  return make("span", { class: "row" }, label,
    make("span", { class: "wide" }, count(module.parameters)),
    make("span", { class: "wide" }, `${module.forward.ops}+${module.backward.ops}`),
    make("span", {}, count(module.forward.flops + module.backward.flops)),
    make("span", { class: "wide" }, bytes(module.saved)), bar);
}

function moduleTree(module, depth) {
  if (!module.children.length) return make("div", { class: "leaf" }, moduleRow(module));
  const fold = make("details", {}, make("summary", {}, moduleRow(module)));
  let filled = false;
  const fill = () => {
    if (filled || !fold.open) return;
    filled = true;
    fold.append(make("div", { class: "children" }, ...module.children.map((child) => moduleTree(child, depth + 1))));
  };
  fold.addEventListener("toggle", fill);
  if (depth === 0) { fold.open = true; fill(); }
  return fold;
}

const columns = make("div", { class: "row head" }, make("span", {}, "module"), make("span", { class: "wide" }, "parameters"),
  make("span", { class: "wide" }, "operators"), make("span", {}, "FLOPs"), make("span", { class: "wide" }, "saved"), make("span", {}, "time"));

function legend(...kinds) {
  return make("p", { class: "legend" }, ...kinds.map((kind) => make("span", {}, make("i", { class: kind }), kind)));
}

// -- passes -------------------------------------------------------------------------------------

function grouped(sites, key) {
  const groups = new Map();
  for (const site of sites) groups.set(key(site), [...(groups.get(key(site)) ?? []), site]);
  return [...groups].sort((a, b) => b[1].length - a[1].length);
}

function verdicts(word, groups) {
  return groups.map(([what, sites]) => make("details", {},
    make("summary", {}, make("span", { class: word }, word), ` ${sites.length} × ${what}`),
    make("ul", { class: "sites" }, ...sites.map((site) => make("li", {},
      make("span", { class: "name" }, site.site), make("span", { class: "faint" }, ` ${numbers(site.numbers)}`))))));
}

function passEntry(step) {
  const title = make("h3", {}, make("code", {}, step.spec));
  if (step.skipped) return make("div", {}, title, make("p", { class: "declined" }, `skipped: ${step.skipped}`));
  const line = `${step.nodes[0]} → ${step.nodes[1]} nodes, ${step.numerics}, ${duration(step.seconds)}`;
  const all = [...verdicts("applied", grouped(step.applied, (site) => site.what)),
    ...verdicts("declined", grouped(step.declined, (site) => `${site.reason}: ${site.detail}`))];
  return make("div", {}, title, make("p", { class: "faint" }, line), ...(all.length ? all : [make("p", {}, "no candidate in this graph")]));
}

// -- time lines ---------------------------------------------------------------------------------

const LEFT = 124, LANE = 26, CURVE = 90, TOP = 22;

function ticks(end, wide) {
  const power = 10 ** Math.floor(Math.log10(end));
  const step = [0.1, 0.2, 0.5, 1, 2, 5].map((factor) => factor * power).find((one) => wide * one / end >= 72) ?? end;
  return Array.from({ length: Math.floor(end / step) + 1 }, (_, index) => index * step);
}

function chart(line, zoom) {
  const end = Math.max(...line.activities.map((one) => one.end), 1e-12);
  const room = Math.max(260, Math.min(1100, document.body.clientWidth - 60)) - LEFT - 12;
  const wide = room * zoom, counters = Object.entries(line.counters);
  const height = TOP + line.lanes.length * LANE + counters.length * (CURVE + 14) + 8;
  const x = (seconds) => LEFT + wide * seconds / end;
  const picture = make("svg", { width: LEFT + wide + 12, height, role: "img", "aria-label": line.title });
  for (const seconds of ticks(end, wide)) {
    picture.append(make("line", { class: "grid", x1: x(seconds), x2: x(seconds), y1: TOP - 4, y2: height }),
      make("text", { class: "faint", x: x(seconds) + 3, y: 12 }, seconds ? duration(seconds) : "0"));
  }
  line.lanes.forEach((lane, row) => {
    picture.append(make("text", { x: 4, y: TOP + row * LANE + 17 }, lane));
  });
  for (const one of line.activities) {
    const y = TOP + line.lanes.indexOf(one.lane) * LANE + 3, width = Math.max(0.6, x(one.end) - x(one.start));
    picture.append(make("rect", { class: `activity ${one.kind}`, x: x(one.start), y, width, height: LANE - 6 },
      make("title", {}, `${one.name}\n${one.kind}, ${duration(one.end - one.start)} from ${duration(one.start)}`)));
  }
  counters.forEach(([name, points], row) => {
    const low = TOP + line.lanes.length * LANE + row * (CURVE + 14) + CURVE + 8;
    const top = Math.max(...points.map((point) => point[1]), 1);
    let path = `M${x(0)} ${low}`, last = low;
    for (const [seconds, value] of points) {
      const y = low - (CURVE - 12) * value / top;
      path += ` L${x(seconds)} ${last} L${x(seconds)} ${y}`;
      last = y;
    }
    picture.append(make("path", { class: "area", d: `${path} L${x(end)} ${last} L${x(end)} ${low} Z` }),
      make("text", { x: 4, y: low - CURVE + 22 }, name), make("text", { class: "faint", x: 4, y: low - CURVE + 37 }, `≤ ${bytes(top)}`));
  });
  return picture;
}

function timeLine(line) {
  const place = make("div", { class: "scroll" });
  let zoom = 1;
  const draw = () => place.replaceChildren(chart(line, zoom));
  const button = (label, words, change) => {
    const one = make("button", { type: "button", "aria-label": words }, label);
    one.addEventListener("click", () => { zoom = Math.min(64, Math.max(1, zoom * change)); draw(); });
    return one;
  };
  draw();
  window.addEventListener("resize", draw);
  const kinds = [...new Set(line.activities.map((one) => one.kind))];
  return make("div", {}, make("h3", {}, `${line.title}, predicted`), legend(...kinds), place,
    make("p", {}, button("+", "zoom in", 2), " ", button("−", "zoom out", 0.5)),
    ...line.assumed.map(([topic, words]) => make("p", { class: "faint" }, `${topic}: ${words}`)));
}

// -- formats and factors ------------------------------------------------------------------------

function leaves(module) {
  return module.children.length ? module.children.flatMap(leaves) : [module];
}

function table(heads, rows) {
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", {}, head)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell, index) => make("td", index ? {} : { class: "name" }, cell)))))));
}

function formats() {
  const names = Object.keys(found.modules.formats);
  const total = names.map((name) => `${name} ${count(found.modules.formats[name])}`).join(", ");
  if (names.length < 2) return [make("p", {}, names.length ? `All FLOPs are computed in ${names[0]}.` : "No operator counts FLOPs.")];
  const rows = leaves(found.modules).filter((module) => Object.keys(module.formats).length)
    .map((module) => [module.path, module.kind, ...names.map((name) => count(module.formats[name] ?? 0))]);
  return [make("p", {}, `FLOPs by the narrowest format that an operator reads: ${total}.`), table(["module", "", ...names], rows)];
}

function factors() {
  const rows = found.factors.blocks.map((block) => [block.weight + (block.bias ? `, ${block.bias}` : ""), block.kind, block.left, block.right, count(block.inverted)]);
  return [make("p", { class: "faint" }, numbers(found.factors.options)), table(["parameters", "kind", "left", "right", "cubed sizes"], rows)];
}

// -- parameters ---------------------------------------------------------------------------------

function told(story) {
  const pairs = (rows) => make("dl", {}, ...rows.flatMap(([topic, words]) => [make("dt", {}, topic), make("dd", {}, words)]));
  const decisions = story.decisions.map((one) => make("li", {}, make("code", {}, one.pass), " ",
    make("span", { class: one.verdict }, one.verdict), ` ${one.words}`));
  const planned = story.planned.map((one) => make("li", {}, make("code", {}, `${one.part} ${one.path}`), ` ${one.words}`));
  return [make("h3", { class: "name" }, story.name), pairs([["what", `${story.role}, ${story.type}`], ["module", story.module], ...story.facts].filter((row) => row[1])),
    make("h3", {}, "Decisions"), decisions.length ? make("ul", { class: "sites" }, ...decisions) : make("p", { class: "faint" }, "No pass spoke of it."),
    ...(planned.length ? [make("h3", {}, "Plan"), make("ul", { class: "sites" }, ...planned)] : [])];
}

function parameters() {
  const search = make("input", { type: "search", placeholder: "search for a parameter or buffer", "aria-label": "search" });
  const list = make("ul", { class: "names" }), story = make("div", { id: "story" });
  const tell = (one) => {
    story.replaceChildren(...told(one));
    for (const button of list.querySelectorAll("button")) button.setAttribute("aria-current", button.textContent === one.name);
  };
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    const shown = found.stories.filter((one) => words.every((word) => one.name.toLowerCase().includes(word)));
    list.replaceChildren(...shown.map((one) => {
      const button = make("button", { type: "button", class: "name" }, one.name);
      button.addEventListener("click", () => tell(one));
      return make("li", {}, button);
    }));
    if (shown.length) tell(shown[0]); else story.replaceChildren(make("p", {}, "Nothing has such a name."));
  };
  search.addEventListener("input", filter);
  filter();
  return [search, list, story];
}

// -- the page -----------------------------------------------------------------------------------

document.querySelector("noscript")?.remove();
section("modules", "Modules", legend("forward", "backward"), columns, moduleTree(found.modules, 0));
section("passes", "Passes", ...(found.steps.length ? found.steps.map(passEntry) : [make("p", {}, "No pass was run.")]));
section("time", "Time line and memory", ...found.time_lines.map(timeLine),
  make("p", {}, `Peak: ${bytes(found.memory.peak)} besides inputs, parameters and buffers, at ${found.memory.peak_at}. ${bytes(found.memory.saved)} are kept for backward.`));
section("formats", "Precision", ...formats());
if (found.factors) section("factors", "K-FAC factors", ...factors());
if (found.stories.length) section("parameters", "Parameters", ...parameters());
