// The pages: which is shown, and what changes while runs run.

const TITLES = { overview: "Overview", compare: "Compare", layers: "Layers", claims: "Claims", words: "In words" };
const SHOWS = { overview: overviewPage, run: runPage, compare: comparePage, layers: layersPage, claims: claimsPage, words: async () => [] };
const EVERY = 2000;
const app = document.getElementById("app");
const FINDINGS = document.getElementById("findings");
const WORDS = document.getElementById("words");

let standingNow = null;
let turn = 0;
const versions = new Map();

/** Whether a part was last asked for under another version of the runs. */
function standingVersionOf(name) {
  const changed = versions.get(name) !== runs.version;
  versions.set(name, runs.version);
  return changed;
}

function nav(page) {
  const entry = (name) => h("a", { href: link(name), "aria-current": name === page ? "page" : null }, TITLES[name]);
  document.getElementById("bar").replaceChildren(h("a", { class: "skip", href: "#main" }, "Skip to content"),
    h("span", { class: "brand" }, "lora_lab"), h("nav", { "aria-label": "pages" }, Object.keys(TITLES).map(entry)),
    h("span", { id: "live", role: "status" }, liveWords()));
}

function liveWords() {
  if (!standingNow) return "";
  if (standingNow.lost) return "the dashboard is gone; what is shown was its last";
  const { counts, left } = standingNow;
  const open = ["running", "waiting", "failed"].filter((name) => counts[name]).map((name) => `${counts[name]} ${name}`);
  return [`${counts.done ?? 0} done`, ...open].join(", ") + (isNumber(left) ? `; about ${duration(left)} left` : "");
}

/** How far a run is, its error, or that it waits. */
function progress(row) {
  if (row.status !== "running") return h("p", { class: row.error ? "warn" : null }, status(row.status), " ", row.error ?? "");
  const words = isNumber(row.step) ? `step ${row.step} of ${row.steps}` + (isNumber(row.loss) ? `, loss ${show(row.loss)}` : "") + (isNumber(row.left) ? `, about ${duration(row.left)} left` : "") : "starting";
  return h("p", {}, status("running"), " ", h("progress", { max: row.steps || 1, value: String(row.step || 0), "aria-label": `progress of ${row.run_id}` }), ` ${words}`);
}

/** The box on the overview: every run that is not done. */
function standingBox() {
  if (!standingNow || !standingNow.rows.length) return null;
  const { counts, rows, omitted, left } = standingNow;
  const total = Object.values(counts).reduce((a, b) => a + b, 0);
  const one = (row) => h("tr", { "data-run": row.run_id }, h("td", {}, runLink(row.run_id)), h("td", {}, row.sweep ?? ""), h("td", {}, progress(row)));
  const waiting = rows.filter((row) => row.status === "waiting");
  const others = rows.filter((row) => row.status !== "waiting");
  const block = (own) => h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, own.map(one))));
  return h("section", { id: "standing", "aria-label": "runs that are not done" }, h("h2", {}, `${counts.done ?? 0} of ${total} runs are done`),
    h("progress", { max: String(total), value: String(counts.done ?? 0), "aria-label": "runs that are done" }),
    h("p", { class: "small" }, liveWords()), others.length ? block(others) : null,
    waiting.length ? h("details", {}, h("summary", {}, `${counts.waiting} waiting`), block(waiting)) : null,
    omitted ? h("p", { class: "small" }, `${omitted} more are not listed.`) : null);
}

/** Keep what the reader is typing in, and where the page stands. */
async function render(scroll = false) {
  const own = ++turn;
  const { page, argument } = state();
  const content = await Promise.resolve().then(() => SHOWS[page](argument)).catch((error) => [sentence(error)]);
  if (own !== turn) return;
  const active = document.activeElement;
  const key = active?.id || active?.dataset?.key;
  const caret = active?.selectionStart;
  const [top, height] = [scrollY, app.offsetHeight];
  nav(page);
  FINDINGS.hidden = !["overview", "words"].includes(page);
  WORDS.hidden = page !== "words";
  app.hidden = page === "words";
  // Until plots are drawn again the page keeps its height, and the reader the place.
  app.style.minHeight = scroll ? "" : `${height}px`;
  setTimeout(() => { if (own === turn) app.style.minHeight = ""; }, 1500);
  const box = page === "overview" ? standingBox() : null;
  app.replaceChildren(...[box ?? h("div", { id: "standing" }), ...content].flat(Infinity).filter((one) => one !== null && one !== undefined));
  document.title = `${TITLES[page] ?? argument} – lora_lab`;
  if (key) {
    const again = document.getElementById(key) ?? app.querySelector(`[data-key="${CSS.escape(key)}"]`);
    again?.focus({ preventScroll: true });
    if (again?.type === "search") again.setSelectionRange(caret, caret);
  }
  scrollTo(0, scroll ? 0 : top);
  document.body.dataset.shown = String(own);
}

let wordsOf = null;

/** Words of the served pages are asked for, and come when they are computed. */
async function readWords() {
  const found = await part("words", true);
  wordsOf = found.version;
  // They come escaped from the same templates as the words of the file.
  FINDINGS.innerHTML = found.findings;
  WORDS.innerHTML = found.words;
}

async function look() {
  let now;
  try { now = await ask("standing"); } catch (error) { now = { ...(standingNow ?? { counts: {}, rows: [] }), lost: true }; }
  const before = standingNow;
  standingNow = now;
  const live = document.getElementById("live");
  if (live && live.textContent !== liveWords()) live.textContent = liveWords();
  if (before && now.version !== before.version) {
    runs = await readRuns(true);
    // What a reader compares or reads stays as it is.
    if (["overview", "layers", "run"].includes(state().page)) await render();
  } else if (state().page === "overview") {
    const box = standingBox();
    if (box) document.getElementById("standing")?.replaceWith(box);
  } else if (state().page === "run" && before && now.rows.some((row) => row.run_id === state().argument)) await render();
  // Words read all tables: while runs end they may lag.
  if (wordsOf !== null && !now.lost && wordsOf !== now.version && !now.counts.running) await readWords();
}

async function start() {
  let shown = "";
  const changed = () => {
    // A fragment that is no page names a place of the words.
    if (location.hash && !location.hash.startsWith("#/")) {
      if (location.hash === "#main") return;
      const place = location.hash.slice(1);
      location.replace(link("words"));
      setTimeout(() => document.getElementById(place)?.scrollIntoView(), 100);
      return;
    }
    const { page, argument } = state();
    render(shown !== `${page}/${argument}`);
    shown = `${page}/${argument}`;
  };
  app.hidden = false;
  nav("overview");
  app.replaceChildren(h("p", { role: "status" }, "Reading the runs …"));
  if (SERVED) await look();
  runs = await readRuns();
  addEventListener("hashchange", changed);
  DARK.addEventListener("change", () => render());
  changed();
  if (SERVED) {
    readWords().catch((error) => FINDINGS.replaceChildren(sentence(error)));
    const again = () => setTimeout(async () => { await look(); again(); }, EVERY);
    again();
  }
}

start().catch((error) => { app.hidden = false; app.replaceChildren(sentence(error)); });
