// The page of `ssl3d report`. Values of records only ever become text nodes and attributes, never markup.
// Nothing of it is global: a library that is loaded later cannot overwrite a function of the page.
(() => {
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8; // --c0 is scratch; a ninth line would no longer be told apart
const state = { table: 0, text: "", hidden: new Set(), sort: { key: "order", down: false }, shown: new Set() };

// --- Elements ---------------------------------------------------------------------------------------

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}
const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

function section(id, title, ...children) {
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  const made = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...children);
  document.getElementById("main").append(made);
  return made;
}

const fixed = (value, digits = 1) => (value == null ? "–" : value.toFixed(digits));
const signed = (value, digits = 1) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(digits);
const table = () => DATA.tables[state.table];
const columns = () => table().columns.filter((c) => !state.hidden.has(`mode ${c.mode}`) && !state.hidden.has(`task ${c.task}`));
const rows = () => table().rows.map((row, index) => ({ ...row, index }))
  .filter((row) => `${row.title} ${row.method}`.toLowerCase().includes(state.text.toLowerCase()));

// --- Summary ----------------------------------------------------------------------------------------

function summary() {
  const t = table();
  const gains = t.columns.filter((c) => c.unit === "%").flatMap((c) => c.cells.map((cell, i) => ({ c, cell, row: t.rows[i] })))
    .filter((g) => g.cell && g.cell.delta != null);
  const top = gains.reduce((a, b) => (a && a.cell.delta >= b.cell.delta ? a : b), null);
  const wins = t.rows.map((row, i) => [row.title, t.columns.filter((c) => c.cells[i] && c.cells[i].best).length]);
  const most = Math.max(...wins.map(([, n]) => n));
  const firsts = wins.filter(([, n]) => n === most).map(([title]) => title);
  const seeds = new Set(DATA.records.map((r) => r.identity.seed));
  const tile = (value, label) => el("li", {}, el("b", {}, value), el("span", { class: "soft" }, label));
  return [
    el("p", { class: "soft" }, t.caption, t.differs ? ` This table: ${t.differs}.` : ""),
    DATA.problems.length ? el("div", { class: "warn", role: "alert" }, el("p", {}, "Left out:"),
      el("ul", {}, DATA.problems.map((text) => el("li", {}, text)))) : null,
    el("ul", { class: "tiles" },
      tile(`${t.rows.length}`, t.rows.length === 1 ? "method" : "methods"),
      tile(`${t.columns.length}`, `columns: ${[...new Set(t.columns.map((c) => c.task.toUpperCase()))].join(", ")}`),
      tile(`${DATA.records.length}`, `records over ${seeds.size} seed${seeds.size === 1 ? "" : "s"}, last ${DATA.created.slice(0, 10) || "undated"}`),
      most ? tile(firsts.length > 3 ? `${firsts.length} methods` : firsts.join(", "), `best in ${most} of ${t.columns.length} columns${firsts.length > 1 ? " each" : ""}`) : null,
      top && tile(`${signed(top.cell.delta)} points`, `largest difference to scratch: ${top.row.title}, ${top.c.group.toLowerCase()} ${top.c.task.toUpperCase()}`)),
  ];
}

// --- Results ----------------------------------------------------------------------------------------

function controls() {
  const boxes = (kind, names, label) => el("fieldset", {}, el("legend", {}, label), names.map((name) =>
    el("label", {}, el("input", { type: "checkbox", checked: !state.hidden.has(`${kind} ${name}`), onchange: (event) => {
      state.hidden[event.target.checked ? "delete" : "add"](`${kind} ${name}`);
      redraw();
    } }), ` ${kind === "task" ? name.toUpperCase() : table().columns.find((c) => c.mode === name).group}`)));
  const names = (key) => [...new Set(table().columns.map((c) => c[key]))];
  return el("div", { class: "controls", role: "group", "aria-label": "Filter" },
    DATA.tables.length > 1 && el("label", {}, "Conditions ", el("select", { onchange: (event) => {
      Object.assign(state, { table: Number(event.target.value), shown: new Set(), hidden: new Set(), sort: { key: "order", down: false } });
      choose();
      start();
    } }, DATA.tables.map((t, i) => el("option", { value: i, selected: i === state.table }, t.differs || t.caption)))),
    el("label", {}, "Methods ", el("input", { type: "search", id: "filter", value: state.text, placeholder: "filter by name", oninput: (event) => {
      state.text = event.target.value;
      redraw();
    } })), boxes("mode", names("mode"), "Modes"), boxes("task", names("task"), "Tasks"));
}

function sorted() {
  const { key, down } = state.sort;
  if (key === "order") return rows();
  const value = (row) => (key === "title" ? row.title.toLowerCase() : table().columns[key].cells[row.index]?.mean);
  return rows().sort((a, b) => compare(value(a), value(b), down));
}

function heading(key, text, left, below) {
  const active = state.sort.key === key;
  return el("th", { scope: "col", class: left ? "left" : null, "aria-sort": active ? (state.sort.down ? "descending" : "ascending") : "none" },
    el("button", { type: "button", "data-sort": key, onclick: () => {
      state.sort = { key, down: active ? !state.sort.down : key !== "title" };
      redraw();
      document.querySelector(`[data-sort="${key}"]`).focus();
    } }, text), below && el("span", { class: "sub" }, below));
}

/** The loss on held-back volumes of an output that ignores its input, for the chart of that loss. */
const HELD_BACK = "held_back";
const chance = (runs, name) => (name.startsWith(HELD_BACK) ? runs.map((run) => run.pretext?.chance).find((v) => v != null) : undefined);

/** A table of `list` whose columns {title, value, show, left} sort; the first column names the row. */
const orders = {};
function sortable(id, label, columns, list) {
  const order = orders[id] ||= { key: null, down: false };
  const ranked = order.key == null ? list : [...list].sort((a, b) => compare(columns[order.key].value(a), columns[order.key].value(b), order.down));
  const head = columns.map((c, i) => {
    const active = order.key === i;
    return el("th", { scope: "col", class: c.left || i === 0 ? "left" : null, "aria-sort": active ? (order.down ? "descending" : "ascending") : "none" },
      el("button", { type: "button", "data-sort": `${id} ${i}`, onclick: () => {
        orders[id] = { key: i, down: active ? !order.down : i !== 0 };
        redraw();
        document.querySelector(`[data-sort="${id} ${i}"]`).focus();
      } }, c.title));
  });
  const best = columns.map((c) => (c.best ? list.reduce((top, item) => (c.value(item) != null && (top == null || c.best * (c.value(item) - top) > 0) ? c.value(item) : top), null) : null));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, el("table", { id }, el("thead", {}, el("tr", {}, head)),
    el("tbody", {}, ranked.map((item) => el("tr", {}, columns.map((c, i) => (i === 0
      ? el("th", { scope: "row" }, c.show(item))
      : el("td", { class: [c.left && "left", list.length > 1 && c.best && best[i] != null && c.value(item) === best[i] && "best"].filter(Boolean).join(" ") }, el("span", { class: c.best ? "mean" : null }, c.show(item))))))))));
}
function compare(x, y, down) {
  if (x == null || y == null) return (x == null) - (y == null); // a missing value is last either way
  return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
}

function costs() {
  const { headers, lines, values, legend } = table().costs;
  return [
    el("p", { class: "soft" }, legend),
    sortable("costs-table", "Cost of each method", [
      { title: "Method", value: (row) => row.title.toLowerCase(), show: (row) => row.title },
      ...headers.map((title, i) => ({ title, left: i === headers.length - 1, value: (row) => (i < values[row.index].length ? values[row.index][i] : lines[row.index][i]), show: (row) => lines[row.index][i] })),
    ], rows()),
  ];
}

function results() {
  const shown = columns();
  const place = (column) => table().columns.indexOf(column);
  const groups = [...new Set(shown.map((c) => c.group))];
  const edge = (column, i) => i === 0 || shown[i - 1].group !== column.group;
  const body = sorted().map((row) => el("tr", {}, el("th", { scope: "row" }, row.title, el("span", { class: "sub" }, row.trains)),
    shown.map((column, i) => {
      const cell = column.cells[row.index];
      const kind = [edge(column, i) && "edge", cell?.best && "best", cell?.second && "second"].filter(Boolean).join(" ");
      return el("td", { class: kind }, cell ? figures(row, column, cell) : row.failed[place(column)] ? failed(row, column, row.failed[place(column)]) : "–");
    })));
  return [
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of results" }, el("table", { id: "results-table" },
      el("thead", {},
        el("tr", {}, el("th", { class: "left" }), groups.map((g) => el("th", { class: "group edge", scope: "colgroup", colspan: shown.filter((c) => c.group === g).length }, g))),
        el("tr", {}, heading("title", "Method", true), shown.map((c) => heading(place(c), c.title, false, c.detectable != null && `shows ${fixed(c.detectable, c.digits)}`)))),
      el("tbody", {}, body))),
    body.length ? null : el("p", { role: "status" }, "No method matches the filter."),
    el("ul", { class: "notes" },
      el("li", {}, `Mean ± standard deviation over seeds ${table().units}; brackets: 95 % interval; Δ: difference to scratch, * significant after Holm's correction; highlighted and bold: best of the column, underlined: second. Activate a cell for its records.`),
      table().footnotes.map(([mark, text]) => el("li", {}, `${mark} ${text}`)), table().remarks.map((text) => el("li", {}, text))),
  ];
}

/** A cell of which nothing could be computed: the word, and the reasons on request. */
function failed(row, column, reasons) {
  const dialog = document.getElementById("record");
  return el("button", { type: "button", "aria-label": `${row.title}, ${column.group} ${column.title}: failed. Show why.`, onclick: () => {
    dialog.replaceChildren(
      el("button", { type: "button", class: "close", onclick: () => dialog.close() }, "Close"),
      el("h2", { id: "record-title" }, `${row.title}: ${column.group.toLowerCase()} ${column.title}`),
      el("p", {}, "Not computed; the next bench in this store tries again."),
      el("ul", {}, reasons.map((reason) => el("li", {}, reason))));
    dialog.showModal();
  } }, el("span", { class: "mean down" }, "failed"));
}

function figures(row, column, cell) {
  const digits = column.digits;
  if (cell.mean == null) return el("button", { type: "button", "aria-label": `${row.title}, ${column.group} ${column.title}: no score, its outputs do not differ between cases. Show its records.`,
    onclick: () => provenance(row, column, cell) }, el("span", { class: "mean" }, "const.", cell.marks));
  const delta = cell.delta == null ? null : `Δ ${signed(cell.delta, digits)}${cell.significant ? "*" : ""}`;
  return el("button", { type: "button", "aria-label": `${row.title}, ${column.group} ${column.title}: ${fixed(cell.mean, digits)}. Show its records.`,
    onclick: () => provenance(row, column, cell) },
  el("span", { class: "mean" }, fixed(cell.mean, digits), cell.marks), cell.sd == null ? null : ` ± ${fixed(cell.sd, digits)}`,
  cell.interval && el("span", { class: "sub" }, `[${fixed(cell.interval[0], digits)}, ${fixed(cell.interval[1], digits)}]`),
  delta && el("span", { class: `sub ${(column.lower ? -cell.delta : cell.delta) >= 0 ? "up" : "down"}` }, delta),
  cell.p != null && el("span", { class: "sub" }, cell.p < 0.001 ? "p < 0.001" : `p = ${cell.p.toFixed(3)}`));
}

function provenance(row, column, cell) {
  const dialog = document.getElementById("record");
  const digits = column.digits + 1;
  const fact = (label, value) => value != null && el("tr", {}, el("th", { scope: "row" }, label), el("td", { class: "left" }, value));
  dialog.replaceChildren(
    el("button", { type: "button", class: "close", onclick: () => dialog.close() }, "Close"),
    el("h2", { id: "record-title" }, `${row.title}: ${column.group.toLowerCase()} ${column.title}`),
    el("table", {}, el("tbody", {},
      cell.mean == null ? fact("Score", "none: the outputs do not differ between test cases") : fact("Mean ± sd over seeds", `${fixed(cell.mean, digits)}${cell.sd == null ? "" : ` ± ${fixed(cell.sd, digits)}`} ${column.unit}`),
      cell.mean != null && fact("Seeds", cell.seeds.map(([seed, , score]) => `${seed}: ${fixed(score, digits)}`).join(",  ")),
      fact("Test cases", `${cell.n}`),
      fact("Smallest difference that could have been shown", column.detectable == null ? null : fixed(column.detectable, digits)),
      cell.interval && fact("95 % interval", `${fixed(cell.interval[0], digits)} to ${fixed(cell.interval[1], digits)}, over ${cell.over}`),
      fact("Rank", cell.rank && `${cell.rank[0]}${cell.rank[1] == null ? "" : ` (95 %: ${cell.rank[1]} to ${cell.rank[2]})`}`),
      cell.apart && fact("Difference to scratch", `${signed(cell.apart[0], digits)}, 95 % interval ${signed(cell.apart[1], digits)} to ${signed(cell.apart[2], digits)}`),
      fact("Against scratch", cell.p != null ? `p = ${cell.p} after Holm` : cell.note ? `no p: ${cell.note}` : null))),
    el("h3", { style: "margin-top:1rem" }, `${cell.records.length} record${cell.records.length === 1 ? "" : "s"}`),
    ...cell.records.map((place, i) => {
      const { file, ...record } = DATA.records[place];
      return el("details", { open: i === 0 }, el("summary", {}, file, ` (seed ${record.identity.seed}, ${record.identity.split}: ${fixed(record.score, digits)})`),
        el("pre", { tabindex: 0 }, JSON.stringify(record, null, 2)));
    }));
  dialog.showModal();
}

// --- Charts -----------------------------------------------------------------------------------------

/** Five or so round numbers between two bounds. */
function ticks(low, high) {
  const raw = (high - low) / 4 || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * unit >= 0.7 * raw) * unit;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}
const short = (value) => (Math.abs(value) >= 1000 ? `${Number((value / 1000).toPrecision(3))}k` : `${Number(value.toPrecision(4))}`);

/** Lines of {name, colour, dash, points: [x, y, low, high]}; `goal` is a horizontal line; `log`: x as shares on a log scale. */
function chart(lines, label, goal, log = false) {
  const [width, height, left, bottom] = [400, 230, 44, 26];
  const points = lines.flatMap((line) => line.points);
  const [xs, ys] = [points.map((p) => p[0]), points.flatMap((p) => p.slice(1).filter((v) => v != null)).concat(goal == null ? [] : [goal])];
  const bounds = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const [x0, x1] = log ? bounds(xs) : [0, bounds(xs)[1]];
  let [y0, y1] = bounds(ys);
  if (y0 === y1) [y0, y1] = [y0 - 1, y1 + 1];
  const along = (v) => (log ? Math.log(v / x0) / (Math.log(x1 / x0) || 1) : (v - x0) / (x1 - x0 || 1));
  const x = (v) => left + along(v) * (width - left - 18);
  const y = (v) => 8 + (1 - (v - y0) / (y1 - y0)) * (height - bottom - 8);
  const line = (x1, y1, x2, y2, kind) => svg("line", { x1, y1, x2, y2, class: kind });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    ticks(y0, y1).map((v) => [line(left, y(v), width - 18, y(v), "grid-line"), svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, short(v))]),
    (log ? [...new Set(xs)] : ticks(x0, x1)).map((v) => svg("text", { x: x(v), y: height - 8, "text-anchor": "middle" }, log ? `${short(100 * v)} %` : short(v))),
    lines.filter((l) => l.points.length && l.points.every((p) => p[2] != null)).map((l) => svg("polygon", { class: "band", fill: l.colour,
      points: [...l.points.map((p) => [p[0], p[3]]), ...l.points.map((p) => [p[0], p[2]]).reverse()].map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") })),
    goal != null && line(left, y(goal), width - 18, y(goal), "goal"),
    lines.map((l) => svg("polyline", { class: "curve", stroke: l.colour, "stroke-dasharray": l.dash, points: l.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") },
      svg("title", {}, l.name))));
}

/** Pick the lines of the charts: scratch and the best methods, as many as there are colours. */
function choose() {
  const t = table();
  const mean = t.rows.map((row, i) => {
    const places = t.columns.map((c) => c.cells[i]?.rank?.[0]).filter((r) => r != null);
    return [row.method === "scratch" ? -1 : places.length ? places.reduce((a, b) => a + b) / places.length : Infinity, i];
  });
  mean.sort((a, b) => a[0] - b[0]).slice(0, COLOURS).forEach(([, i]) => state.shown.add(i));
}
function colour(index) {
  if (table().rows[index].method === "scratch") return "var(--c0)";
  const chosen = [...state.shown].filter((i) => table().rows[i].method !== "scratch");
  return `var(--c${1 + (chosen.indexOf(index) % (COLOURS - 1))})`;
}
const dash = (index) => {
  const chosen = [...state.shown].filter((i) => table().rows[i].method !== "scratch");
  return table().rows[index].method === "scratch" ? "6 4" : [null, "8 3", "2 3"][Math.floor(chosen.indexOf(index) / (COLOURS - 1)) % 3];
};

/** The rows that a chart of validation can show. */
const drawn = () => rows().filter((row) => columns().some((c) => c.cells[row.index]?.curve.length));

function chips() {
  return el("div", { class: "chips", role: "group", "aria-label": "Methods in the charts" }, drawn().map((row) => {
    const on = state.shown.has(row.index);
    return el("button", { type: "button", class: "chip", "aria-pressed": String(on), title: row.title, "data-chip": row.index, onclick: () => {
      state.shown[on ? "delete" : "add"](row.index);
      redraw();
      document.querySelector(`[data-chip="${row.index}"]`).focus();
    } }, svg("svg", { width: 18, height: 8, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 18, y1: 4, y2: 4, "stroke-width": 2.5,
      stroke: on ? colour(row.index) : "var(--line)", "stroke-dasharray": on ? dash(row.index) : null })), row.title);
  }));
}

function curves() {
  const trained = columns().filter((c) => c.cells.some((cell) => cell?.curve.length));
  if (!trained.length) return [el("p", { class: "soft" }, "No record holds a validation curve.")];
  const chosen = rows().filter((row) => state.shown.has(row.index));
  const scratch = table().rows.findIndex((row) => row.method === "scratch");
  const best = (cell) => cell?.peak ?? null;
  const reached = trained.filter((c) => best(c.cells[scratch]) != null);
  const saved = (cell, base) => {
    if (!cell?.curve.length) return "–";
    if (cell.reach == null) return "not reached";
    const less = Math.round(100 * (1 - cell.reach / base.reach));
    return `${cell.reach}${cell === base ? "" : less ? ` (${Math.abs(less)} % ${less < 0 ? "more" : "fewer"})` : " (the same)"}`;
  };
  return [
    el("p", { class: "soft" }, "Validation score over training steps of the evaluation, mean over seeds. The dotted line is the best that scratch reaches."), chips(),
    el("div", { class: "grid" }, trained.map((c) => {
      const lines = chosen.filter((row) => c.cells[row.index]?.curve.length).map((row) => ({ name: row.title, colour: colour(row.index), dash: dash(row.index), points: c.cells[row.index].curve }));
      return el("figure", {}, el("h3", {}, `${c.group}: ${c.title}`), lines.length ? chart(lines, `Validation curves, ${c.group} ${c.title}`, best(c.cells[scratch])) : el("p", { class: "soft" }, "No method chosen."));
    })),
    reached.length ? el("details", { open: true }, el("summary", {}, "Steps to reach scratch's best validation score"),
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Steps to reach scratch" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { class: "left" }, "Method"), reached.map((c) => el("th", { scope: "col" }, `${c.group} ${c.task.toUpperCase()}`)))),
        el("tbody", {}, drawn().map((row) => el("tr", {}, el("th", { scope: "row" }, row.title), reached.map((c) => el("td", {}, saved(c.cells[row.index], c.cells[scratch]))))))))) : null,
  ];
}

function labels() {
  const columns = [...new Map(DATA.labels.map((c) => [`${c.mode} ${c.task}`, c])).values()];
  const shown = (c) => DATA.labels.filter((l) => l.mode === c.mode && l.task === c.task && l.title.toLowerCase().includes(state.text.toLowerCase()));
  const goal = (c) => DATA.labels.find((l) => l.mode === c.mode && l.task === c.task && l.method === "scratch")?.points.find((p) => p[0] === 1)?.[1];
  const titles = [...new Set(DATA.labels.map((l) => l.title))];
  const paint = (l) => (l.method === "scratch" ? "var(--c0)" : `var(--c${1 + (titles.filter((t) => t !== "Scratch").indexOf(l.title) % (COLOURS - 1))})`);
  const names = [...new Map(columns.flatMap(shown).map((l) => [l.title, l])).values()];
  const text = (l) => (!l ? "–" : l.reaches == null ? "not reached" : `${l.reaches === l.points[0][0] ? "≤ " : ""}${short(100 * Number(l.reaches.toPrecision(3)))} %`);
  return [
    el("p", { class: "soft" }, "Score over the share of training subjects whose labels are used, with 95 % intervals. The dotted line is scratch with all labels; the table says at which share a method reaches it."),
    el("ul", { class: "chips key" }, names.map((l) => el("li", {}, svg("svg", { width: 18, height: 8, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 18, y1: 4, y2: 4, "stroke-width": 2.5, stroke: paint(l) })), l.title))),
    el("div", { class: "grid" }, columns.map((c) => el("figure", {}, el("h3", {}, `${c.group}: ${c.task.toUpperCase()} ${c.metric.toUpperCase()}`),
      chart(shown(c).map((l) => ({ name: l.title, colour: paint(l), dash: l.method === "scratch" ? "6 4" : null, points: l.points })), `Score over labels, ${c.group} ${c.task.toUpperCase()}`, goal(c), true)))),
    el("div", { class: "after" }, sortable("labels-table", "Share of the labels that equals scratch", [
      { title: "Method", value: (l) => l.title.toLowerCase(), show: (l) => l.title },
      ...columns.map((c) => {
        const of = (l) => shown(c).find((other) => other.title === l.title);
        return { title: `${c.group} ${c.task.toUpperCase()}`, value: (l) => of(l)?.reaches, show: (l) => text(of(l)) };
      })], names)),
  ];
}

// --- Representation ---------------------------------------------------------------------------------

function representation() {
  const percent = (key) => ({ value: (row) => row[key], show: (row) => (row[key] == null ? "–" : `${fixed(100 * row[key])}${row[`${key}_sd`] == null ? "" : ` ± ${fixed(100 * row[`${key}_sd`])}`}`) });
  return DATA.representation.map((r) => {
    const list = r.rows.filter((row) => `${row.title} ${row.method}`.toLowerCase().includes(state.text.toLowerCase()));
    const matched = list.filter((row) => row.dice_predicted != null);
    const name = { value: (row) => row.title.toLowerCase(), show: (row) => row.title, title: "Method" };
    const maps = { tsne: "t-SNE", pca: "PCA" };
    return el("article", {},
      el("h3", { class: "task" }, r.title),
      el("p", { class: "soft" }, `The local feature of the frozen backbone at the same voxels of ${r.cases} test cases for every method; means ± standard deviations over ${r.pairs} pairs of patients, in percent.`),
      sortable(`features-${r.task}`, `Measures of the local feature, ${r.title}`, [name,
        { title: "Same structure", best: 1, ...percent("correspondence") },
        { title: "by structure", best: 1, ...percent("correspondence_balanced") },
        { title: "chance", ...percent("chance_balanced") },
        { title: "One-shot Dice", best: 1, ...percent("transfer_dice") },
        { title: "Silhouette", best: 1, value: (row) => row.silhouette, show: (row) => (row.silhouette == null ? "–" : `${row.silhouette < 0 ? "−" : "+"}${fixed(Math.abs(row.silhouette), 3)}`) }], list),
      el("ul", { class: "notes" },
        el("li", {}, "Same structure: foreground voxels whose nearest feature in another patient lies in the same structure; by structure: mean over structures, beside its chance level. One-shot Dice: the labelled voxels of one patient label every voxel of another. Silhouette: from −1 to 1, how far structures are apart. Highlighted: best of the column."),
        r.notes.map((text) => el("li", {}, text))),
      matched.length ? el("div", { class: "after" }, sortable(`matching-${r.task}`, `Matching of patients, ${r.title}`, [name,
        { title: "Dice not aligned", ...percent("dice_not_aligned") }, { title: "affine only", ...percent("dice_affine_only") },
        { title: "whole map", ...percent("dice_predicted") }, { title: "Folded voxels", value: (row) => row.folded_predicted, show: (row) => `${fixed(100 * row.folded_predicted, 3)} %` }], matched),
      el("ul", { class: "notes" }, el("li", {}, "Dice of labels warped onto another patient by the map that the method predicts; folded: voxels whose Jacobian determinant is not positive."))) : null,
      r.pictures.map((picture, i) => el("details", { open: i === 0 }, el("summary", {}, `${maps[picture.how] || picture.how} by structure`),
        el("figure", { class: "picture" }, el("img", { src: `data:image/png;base64,${picture.png}`, alt: `${maps[picture.how] || picture.how} of the local feature, ${r.title}, one panel a method, coloured by structure` })))));
  });
}

// --- Pretraining ------------------------------------------------------------------------------------

function pretraining() {
  const titles = new Set(rows().map((row) => row.method));
  const methods = [...new Map(DATA.runs.filter((run) => titles.has(run.method)).map((run) => [run.title, run])).keys()];
  return [
    el("p", { class: "soft" }, "Every loss and monitored quantity by itself, over pretraining steps, one line a seed; each point is the mean of a stretch of the log. The first chart is the score of the pretext task on volumes held back from pretraining; its dotted line is an output that ignores its input."),
    methods.map((title) => {
      const runs = DATA.runs.filter((run) => run.title === title);
      const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort((a, b) => b.startsWith(HELD_BACK) - a.startsWith(HELD_BACK));
      return el("details", { open: methods.length < 4 }, el("summary", {}, title), el("div", { class: "grid" }, names.map((name) => el("figure", {}, el("h3", {}, name.startsWith(HELD_BACK) ? "pretext score, held-back volumes" : name),
        chart(runs.map((run, i) => ({ run, i })).filter(({ run }) => run.curves[name]).map(({ run, i }) => ({ name: `seed ${run.seed}`, colour: `var(--c${1 + (i % (COLOURS - 1))})`, points: run.curves[name] })), `${title}: ${name}`, chance(runs, name))))));
    }),
  ];
}

// --- Cases ------------------------------------------------------------------------------------------

function quantile(ordered, q) {
  const at = (ordered.length - 1) * q;
  const low = Math.floor(at);
  return ordered[low] + (at - low) * ((ordered[low + 1] ?? ordered[low]) - ordered[low]);
}

/** A box and a point for every case, one strip a method. */
function strips(column, chosen) {
  const [width, left, pitch] = [400, 118, 22];
  const all = chosen.flatMap((row) => column.cells[row.index].cases.filter((v) => v != null));
  const low = Math.min(...all), high = Math.max(...all) > low ? Math.max(...all) : low + 1;
  const x = (v) => left + ((v - low) / (high - low)) * (width - left - 10);
  const height = chosen.length * pitch + 24;
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Scores of single cases, ${column.group} ${column.title}` },
    ticks(low, high).map((v) => [svg("line", { class: "grid-line", x1: x(v), x2: x(v), y1: 2, y2: height - 20 }), svg("text", { x: x(v), y: height - 6, "text-anchor": "middle" }, short(v))]),
    chosen.map((row, i) => {
      const cell = column.cells[row.index];
      const values = cell.cases.filter((v) => v != null).sort((a, b) => a - b);
      const y = i * pitch + pitch / 2 + 2;
      const name = row.title.length > 17 ? `${row.title.slice(0, 16)}…` : row.title;
      return svg("g", {}, svg("title", {}, `${row.title}: median ${fixed(quantile(values, 0.5), column.digits)}, ${values.length} cases`),
        svg("text", { class: "name", x: left - 8, y: y + 4, "text-anchor": "end" }, name),
        svg("rect", { class: "box", x: x(quantile(values, 0.25)), y: y - 7, width: Math.max(1, x(quantile(values, 0.75)) - x(quantile(values, 0.25))), height: 14, rx: 2 }),
        cell.cases.map((v, k) => v != null && svg("circle", { class: "dot", cx: x(v).toFixed(1), cy: y + ((k * 7) % 5) - 2, r: 2.4 }, svg("title", {}, `${row.title}, case ${column.cases[k]}: ${fixed(v, column.digits)}`))),
        svg("line", { class: "median", x1: x(quantile(values, 0.5)), x2: x(quantile(values, 0.5)), y1: y - 8, y2: y + 8 }));
    }));
}

function cases() {
  const worst = columns().filter((c) => !c.lower).flatMap((c) => c.cases.map((name, k) => {
    const scored = rows().map((row) => [row, c.cells[row.index]?.cases[k]]).filter(([, v]) => v != null).sort((a, b) => b[1] - a[1]);
    return scored.length ? { c, name, mean: scored.reduce((sum, [, v]) => sum + v, 0) / scored.length, best: scored[0], last: scored[scored.length - 1] } : null;
  })).filter(Boolean).sort((a, b) => a.mean - b.mean);
  const some = (found) => el("tbody", {}, found.map((w) => el("tr", {}, el("th", { scope: "row" }, w.name), el("td", { class: "left" }, `${w.c.group} ${w.c.title}`),
    el("td", {}, fixed(w.mean)), el("td", { class: "left" }, `${w.last[0].title} ${fixed(w.last[1])}`), el("td", { class: "left" }, `${w.best[0].title} ${fixed(w.best[1])}`))));
  return [
    el("p", { class: "soft" }, "Each point is a test case, averaged over seeds; the box spans the middle half and the bar is the median. For AUC a point is the probability of the true class."),
    el("div", { class: "grid" }, columns().map((c) => {
      const chosen = rows().filter((row) => c.cells[row.index]?.cases.some((v) => v != null));
      return chosen.length ? el("figure", {}, el("h3", {}, `${c.group}: ${c.title}`), strips(c, chosen)) : null;
    })),
    worst.length ? [el("h3", { style: "margin:1.4rem 0 .5rem" }, "Worst cases first"),
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Worst cases" }, el("table", { id: "worst" }, el("thead", {}, el("tr", {}, ["Case", "Evaluation", "Mean of methods", "Lowest", "Highest"].map((t, i) => el("th", { scope: "col", class: i === 2 ? null : "left" }, t)))), some(worst.slice(0, 20))))] : null,
  ].flat();
}

// --- Viewer -----------------------------------------------------------------------------------------

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

let library = null;
function niivue() {
  library ||= inflate(document.getElementById("niivue").textContent).then((buffer) => {
    document.head.append(el("script", {}, new TextDecoder().decode(buffer)));
    return window.niivue;
  });
  return library;
}

/** Structures in turn by hues a golden angle apart; the background is clear. */
function labelColours(count) {
  const rgb = (hue) => [0, 8, 4].map((n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.55 - 0.42 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
  const all = Array.from({ length: count }, (_, i) => (i ? rgb((i * 137.5 + 200) % 360) : [0, 0, 0]));
  return { R: all.map((c) => c[0]), G: all.map((c) => c[1]), B: all.map((c) => c[2]), A: all.map((_, i) => (i ? 255 : 0)), I: all.map((_, i) => i), labels: all.map((_, i) => (i ? `structure ${i}` : "")) };
}

const MOST_PANELS = 12; // browsers keep about sixteen WebGL contexts alive
let opened = [];
let turn = 0;

async function open(scene, panels, note) {
  const mine = ++turn;
  const outdated = () => mine !== turn; // another scene was asked for before this one stood
  for (const viewer of opened) viewer.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  opened = [];
  panels.replaceChildren();
  note.textContent = "Loading…";
  const { Niivue, NVImage } = await niivue();
  if (outdated()) return;
  const views = [{ title: "Image" }, { title: "Truth", file: scene.truth },
    ...scene.methods.map((m) => ({ title: `${m.title}: ${fixed(m.score)}`, file: m.file, seed: m.seed }))].slice(0, MOST_PANELS);
  const volume = (file, name) => NVImage.loadFromBase64({ base64: DATA.viewer.volumes[file], name });
  for (const view of views) {
    const canvas = el("canvas", { tabindex: 0, role: "application", "aria-label": `${view.title}, case ${scene.case}` });
    // The viewer styles and resizes its canvas's parent, so that is a box of its own.
    panels.append(el("figure", {}, el("h3", {}, view.title), el("div", { class: "canvas" }, canvas)));
    const viewer = canvas.viewer = new Niivue({ isResizeCanvas: true, backColor: [0, 0, 0, 1], show3Dcrosshair: true, crosshairWidth: 0.4, crosshairColor: [1, 1, 1, 0.8], dragAndDropEnabled: false, logLevel: "error" });
    opened.push(viewer);
    await viewer.attachToCanvas(canvas);
    const image = await volume(scene.image, "image.nii.gz");
    const labels = view.file && await volume(view.file, "labels.nii.gz");
    if (outdated()) return;
    viewer.addVolume(image);
    if (labels) {
      labels.setColormapLabel(labelColours(1 + labels.img.reduce((most, label) => Math.max(most, label), 1)));
      labels.opacity = 0.55;
      viewer.addVolume(labels);
    }
    viewer.setSliceType(viewer.sliceTypeMultiplanar);
    viewer.drawScene();
  }
  for (const viewer of opened) viewer.broadcastTo(opened.filter((other) => other !== viewer), { "2d": true, "3d": true });
  const more = scene.methods.length + 2 - views.length;
  note.textContent = `Case ${scene.case}: the crosshair moves in all panels at once. Click, scroll, or focus a panel and press H, L, J, K, Ctrl+U or Ctrl+D; V changes the view.${more > 0 ? ` ${more} more methods are not shown: filter them above.` : ""}`;
}

function viewer() {
  const { scenes } = DATA.viewer;
  const panels = el("div", { class: "views", id: "panels" });
  const note = el("p", { class: "soft", role: "status" });
  const select = el("select", { id: "scene" }, scenes.map((s, i) => el("option", { value: i }, `${s.group} ${s.task.toUpperCase()}, case ${s.case}`)));
  const show = () => {
    const scene = scenes[Number(select.value)];
    const wanted = scene.methods.filter((m) => m.title.toLowerCase().includes(state.text.toLowerCase()));
    open({ ...scene, methods: wanted }, panels, note).catch((error) => { note.textContent = `The viewer cannot draw here: ${error.message}`; });
  };
  select.addEventListener("change", show);
  section("viewer", "3D viewer", el("p", { class: "soft" }, "Image, truth and the segmentation of each method's first seed, on the prepared grid; the worst cases come first."),
    el("div", { class: "controls" }, el("label", {}, "Case ", select), el("button", { type: "button", class: "chip", id: "show", onclick: show }, "Show")), note, panels,
    el("details", {}, el("summary", {}, "Drawn by NiiVue: licence"), el("pre", {}, document.getElementById("niivue-licence").textContent)));
}

// --- Start ------------------------------------------------------------------------------------------

function redraw() {
  document.getElementById("results-body").replaceChildren(...results().filter(Boolean));
  for (const [id, make] of [["costs-body", costs], ["curves-body", curves], ["labels-body", labels], ["pretraining-body", pretraining], ["representation-body", representation], ["cases-body", cases]]) {
    document.getElementById(id)?.replaceChildren(...make().flat().filter(Boolean));
  }
}

function start() {
  document.title = DATA.title;
  document.getElementById("title").textContent = DATA.title;
  document.getElementById("nav").replaceChildren();
  document.getElementById("main").replaceChildren();
  section("summary", "Summary", ...summary());
  section("results", "Results", controls(), el("div", { id: "results-body" }));
  if (table().costs) section("costs", "Cost", el("div", { id: "costs-body" }));
  section("curves", "Validation curves", el("div", { id: "curves-body" }));
  if (DATA.labels.length) section("labels", "Few labels", el("div", { id: "labels-body" }));
  if (DATA.runs.length) section("pretraining", "Pretraining", el("div", { id: "pretraining-body" }));
  if (DATA.representation.length) section("representation", "Representation", el("div", { id: "representation-body" }));
  section("cases", "Cases", el("div", { id: "cases-body" }));
  if (DATA.viewer.scenes.length) viewer();
  redraw();
}

choose();
start();
})();
