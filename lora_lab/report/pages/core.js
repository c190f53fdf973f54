// Elements, data, state and numbers. Text becomes text nodes: nothing here parses markup of data.

const NONE = "–";

/** An element; attributes that are functions listen, true is an empty attribute, null is none. */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

// ---- data: embedded in the file, or asked for from the server -----------------------------------

const EMBEDDED = new Map(
  [...document.querySelectorAll("script[data-part]")].map((part) => [part.dataset.part, part]),
);
const SERVED = EMBEDDED.size === 0;

/** The bytes of base64; a loop, because of millions. */
function bytesOf(base64) {
  const letters = atob(base64);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i += 1) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

async function unpacked(element) {
  const packed = bytesOf(element.textContent);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

class Missing extends Error {}

const answers = new Map();

/** A part by name, once; `fresh` asks the server again. */
function part(name, fresh = false) {
  if (fresh || !answers.has(name)) {
    const answer = ask(name);
    answers.set(name, answer);
    answer.catch(() => answers.get(name) === answer && answers.delete(name));
  }
  return answers.get(name);
}

async function ask(name) {
  if (!SERVED) {
    if (!EMBEDDED.has(name)) throw new Missing("This file does not hold it; `lora-lab dashboard` shows it.");
    return JSON.parse(await unpacked(EMBEDDED.get(name)));
  }
  const answer = await fetch(`/data/${name}.json`, { cache: "no-cache" });
  if (!answer.ok) throw new Missing((await answer.text()).trim() || `no answer (${answer.status})`);
  return answer.json();
}

// ---- state: the URL's fragment, #/page/argument?key=value ---------------------------------------

const PAGES = ["overview", "run", "compare", "layers", "claims", "words"];

/** What the fragment says; a key may stand several times, so every value is a list. */
function stateOf(fragment) {
  const [path, query] = fragment.replace(/^#\/?/, "").split("?", 2);
  const [page, ...rest] = path.split("/");
  const keys = new URLSearchParams(query || "");
  const argument = rest.join("/");
  return { page: PAGES.includes(page) ? page : "overview", argument, keys };
}

const state = () => stateOf(location.hash);

/** The fragment of a page with the keys of now, of which some change: null removes one. */
function link(page, argument = "", changes = {}) {
  const keys = new URLSearchParams(state().keys);
  for (const [key, value] of Object.entries(changes)) {
    keys.delete(key);
    for (const one of [value].flat()) if (one !== null && one !== "") keys.append(key, one);
  }
  const query = keys.toString();
  return `#/${page}${argument ? `/${argument}` : ""}${query ? `?${query}` : ""}`;
}

/** Change keys of the page that is shown. */
function set(changes) {
  const now = state();
  location.hash = link(now.page, now.argument, changes);
}

const chosen = (key, otherwise) => state().keys.get(key) ?? otherwise;

// ---- numbers -------------------------------------------------------------------------------------

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const GROUPED = new Intl.NumberFormat("en-US");

function show(value, digits = 4) {
  if (value === null || value === undefined || value === "") return NONE;
  if (!isNumber(value)) return String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 1e4 ? String(value) : Math.abs(value) < 1e9 ? GROUPED.format(value) : value.toExponential(3);
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-3 ? value.toExponential(digits - 2) : String(Number(value.toPrecision(digits)));
}

function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** Student's factor of a 95 % interval; above the table its Cornish-Fisher series. */
function tFactor(df) {
  if (df <= T_FACTORS.length) return T_FACTORS[df - 1];
  const z = 1.959963984540054;
  return z + (z ** 3 + z) / (4 * df) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * df ** 2)
    + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * df ** 3);
}

/** Mean and half width of its 95 % t interval (null for one value) of the numbers of a list. */
function meanOf(values) {
  const x = values.filter(isNumber);
  const n = x.length;
  if (!n) return { n, mean: null, half: null };
  const mean = x.reduce((sum, value) => sum + value, 0) / n;
  if (n === 1) return { n, mean, half: null };
  const square = x.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return { n, mean, half: tFactor(n - 1) * Math.sqrt(square / (n - 1) / n) };
}

const plusMinus = ({ mean, half }, digits = 3) =>
  mean === null ? NONE : mean.toFixed(digits) + (half === null ? "" : ` ± ${half.toFixed(digits)}`);

/** Rows by the value of a function, in the order of their first. */
function groups(rows, key) {
  const found = new Map();
  for (const row of rows) {
    const value = key(row);
    if (!found.has(value)) found.set(value, []);
    found.get(value).push(row);
  }
  return found;
}

// ---- files that the reader takes away ------------------------------------------------------------

function csv(columns, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    // A spreadsheet must not take text for a formula.
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function download(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// ---- small parts of pages ------------------------------------------------------------------------

function select(label, key, options, otherwise) {
  const now = chosen(key, otherwise);
  return h("label", { class: "field" }, h("span", {}, label),
    h("select", { "data-key": key, change: (event) => set({ [key]: event.target.value }) },
      options.map(([value, words]) =>
        h("option", { value, selected: value === now }, words ?? value))));
}

/** A table; columns of [heading, is a number]; cells are text or elements. */
function table(caption, columns, rows, note = "") {
  const head = columns.map(([name, number]) => h("th", { scope: "col", class: number ? "n" : null }, name));
  const body = rows.map((row) => h("tr", {}, row.map((cell, i) =>
    h("td", { class: columns[i][1] ? "n" : null }, cell instanceof Node ? cell : show(cell)))));
  return h("div", {},
    h("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
      h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, body))),
    note ? h("p", { class: "small" }, note) : null);
}

const runLink = (id) => h("a", { href: link("run", id), class: "id" }, id);
const sentence = (error) => h("p", { class: "warn" }, error instanceof Missing ? error.message : `This could not be shown: ${error.message}`);
