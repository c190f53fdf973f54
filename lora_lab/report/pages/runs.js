// The table of runs: read once, filtered by what the fragment says, and shown page by page.

const SIGNS = {
  "=": (a, b) => String(a) === b || (isNumber(a) && a === Number(b)),
  "≠": (a, b) => !SIGNS["="](a, b),
  "≥": (a, b) => isNumber(a) && a >= Number(b),
  "≤": (a, b) => isNumber(a) && a <= Number(b),
  contains: (a, b) => a !== null && String(a).toLowerCase().includes(b.toLowerCase()),
};
const SHOWN = 50;
const USUAL = ["run_id", "status", "adapter", "adapter.r", "adapter.alpha", "train.lr", "seed", "score", "trainable_percent", "seconds"];

/** The part `runs` as a list of rows, and its columns. */
async function readRuns(fresh = false) {
  const { count, columns, config, notes, version } = await part("runs", fresh);
  const names = Object.keys(columns);
  const getters = names.map((name) => {
    const { one, values, words, at } = columns[name];
    if (values) return (i) => values[i];
    return words ? (i) => (at[i] < 0 ? null : words[at[i]]) : () => one ?? null;
  });
  const rows = Array.from({ length: count }, (_, i) =>
    Object.fromEntries(names.map((name, j) => [name, getters[j](i)])));
  const byId = new Map(rows.map((row) => [row.run_id, row]));
  const numeric = new Set(names.filter((name) => columns[name].number));
  const fields = names.filter((name) => !["rules", "drawn", "setting", "ground"].includes(name));
  return { rows, byId, columns: names, fields, numeric, config, notes, version };
}

let runs = null;

/** The conditions of the fragment: ["adapter.r", "≥", "8"]. */
function conditions() {
  return state().keys.getAll("f").map((text) => {
    const [field, sign, ...value] = text.split(" ");
    return [field, sign, value.join(" ")];
  }).filter(([field, sign]) => runs.columns.includes(field) && sign in SIGNS);
}

/** Rows that all conditions and the search keep. */
function kept() {
  const wanted = conditions();
  const words = chosen("q", "").toLowerCase().split(/\s+/).filter(Boolean);
  return runs.rows.filter((row) =>
    wanted.every(([field, sign, value]) => SIGNS[sign](row[field], value)) &&
    (!words.length || matches(row, words)));
}

function matches(row, words) {
  row.text ??= runs.fields.map((name) => row[name]).filter((v) => v !== null).join(" ").toLowerCase();
  return words.every((word) => row.text.includes(word));
}

/** Model and data of the kept rows, most runs first, and which is shown. */
function ground(rows) {
  const found = [...groups(rows, (row) => row.ground)].sort((a, b) => b[1].length - a[1].length);
  const names = found.map(([name]) => name);
  const now = names.includes(chosen("on", "")) ? chosen("on", "") : names[0];
  return { names, now, rows: found.find(([name]) => name === now)?.[1] ?? [] };
}

/** What chooses runs: model and data, conditions on any field, words. */
function filterBar(names, now, left) {
  const field = h("select", { "aria-label": "field" }, runs.fields.map((name) => h("option", {}, name)));
  field.value = "adapter";
  const sign = h("select", { "aria-label": "comparison" }, Object.keys(SIGNS).map((name) => h("option", {}, name)));
  const values = h("datalist", { id: "values" });
  const offer = () => values.replaceChildren(...[...new Set(runs.rows.map((row) => row[field.value]))]
    .filter((value) => value !== null).slice(0, 200).sort().map((value) => h("option", { value: String(value) })));
  field.addEventListener("change", offer);
  offer();
  const value = h("input", { "aria-label": "value", list: "values", size: "12", placeholder: "value" });
  const add = h("form", { class: "add", submit: (event) => {
    event.preventDefault();
    if (value.value) set({ f: [...state().keys.getAll("f"), `${field.value} ${sign.value} ${value.value.trim()}`], n: null });
  } }, field, sign, value, values, h("button", {}, "Add filter"));
  const chips = state().keys.getAll("f").map((text, i, all) => h("button", {
    type: "button", class: "chip", "aria-label": `remove filter ${text}`,
    click: () => set({ f: all.filter((_, j) => j !== i), n: null }) }, text, " ×"));
  const search = h("input", { type: "search", value: chosen("q", ""), placeholder: "words in any field", "aria-label": "search runs", id: "search" });
  search.addEventListener("input", debounce(() => set({ q: search.value, n: null }), 150));
  return h("section", { class: "filters", "aria-label": "choose runs" },
    names.length > 1 ? select("model and data", "on", names.map((name) => [name]), now) : null,
    h("label", { class: "field" }, h("span", {}, "search"), search), add,
    chips.length ? h("div", { class: "chips" }, chips) : null,
    h("p", { class: "small", role: "status" }, `${GROUPED.format(left.length)} of ${GROUPED.format(runs.rows.length)} runs`,
      left.length ? ["; ", h("button", { type: "button", class: "plain", click: () =>
        download("runs.csv", csv(runs.fields, left.map((row) => runs.fields.map((name) => row[name]))), "text/csv") }, "all their fields as CSV")] : ""));
}

function debounce(call, wait) {
  let timer = 0;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => call(...given), wait); };
}

/** The columns of the table: the usual ones, those that filters name, and one that the reader adds. */
function shownColumns() {
  const more = [...conditions().map(([field]) => field), ...state().keys.getAll("c")];
  return [...new Set([...USUAL, ...more])].filter((name) => runs.columns.includes(name));
}

/** The rows as a table: sorted by any column, with boxes that choose runs to compare. */
function runTable(rows) {
  const names = shownColumns();
  const sort = chosen("sort", "-started");
  const [by, down] = [sort.replace(/^-/, ""), sort.startsWith("-")];
  const order = [...rows].sort((a, b) => compareValues(a[by], b[by], down));
  const count = Number(chosen("n", SHOWN));
  const picked = new Set(chosen("pick", "").split("+").filter(Boolean));
  const head = names.map((name) => h("th", {
    scope: "col", class: runs.numeric.has(name) ? "n" : null,
    "aria-sort": name === by ? (down ? "descending" : "ascending") : null },
  h("button", { type: "button", class: "plain", click: () => set({ sort: name === by && !down ? `-${name}` : name }) },
    name, name === by ? (down ? " ↓" : " ↑") : "")));
  const body = order.slice(0, count).map((row) => h("tr", {},
    h("td", {}, h("input", { type: "checkbox", checked: picked.has(row.run_id), "aria-label": `compare ${row.run_id}`,
      change: (event) => { picked[event.target.checked ? "add" : "delete"](row.run_id); set({ pick: [...picked].join("+") }); } })),
    names.map((name) => h("td", { class: runs.numeric.has(name) ? "n" : null },
      name === "run_id" ? runLink(row.run_id) : name === "status" ? status(row[name]) : show(row[name])))));
  const compare = picked.size > 1
    ? h("a", { class: "button", href: link("compare", [...picked].join("+"), { pick: null }) }, `Compare ${picked.size} runs`)
    : h("span", { class: "small" }, "Tick two or more runs to compare them.");
  return h("section", { id: "runs" }, h("h2", {}, "Runs"),
    h("div", { class: "row" }, compare, addColumn()),
    h("div", { class: "scroll", role: "region", "aria-label": "Runs", tabindex: "0" },
      h("table", {}, h("caption", {}, `${GROUPED.format(rows.length)} runs`),
        h("thead", {}, h("tr", {}, h("td", {}), head)), h("tbody", {}, body))),
    count < rows.length ? h("button", { type: "button", click: () => set({ n: String(count + 10 * SHOWN) }) }, `Show more of ${rows.length}`) : null);
}

function addColumn() {
  const rest = runs.fields.filter((name) => !shownColumns().includes(name));
  const pick = h("select", { change: () => set({ c: [...state().keys.getAll("c"), pick.value] }) },
    h("option", {}, "…"), rest.map((name) => h("option", {}, name)));
  return h("label", { class: "field" }, h("span", {}, "add a column"), pick);
}

const status = (name) => h("span", { class: `status ${name}` }, name);

/** Missing values last, either way. */
function compareValues(a, b, down) {
  const gone = [a, b].map((value) => value === null || value === undefined);
  if (gone[0] || gone[1]) return gone[0] - gone[1];
  const sign = isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b));
  return down ? -sign : sign;
}
