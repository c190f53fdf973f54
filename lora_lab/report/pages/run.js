// One run: what it was, how it trained, what its updates look like.

const GRADIENTS = { grad_norm: "‖G‖, of the weight", grad_norm_A: "‖∇A‖", grad_norm_B: "‖∇B‖" };

async function runPage(id) {
  const row = runs.byId.get(id);
  const waiting = standingNow?.rows.find((one) => one.run_id === id);
  if (!row && !waiting) return [h("p", { class: "warn" }, `There is no run ${id} here. `, h("a", { href: link("overview") }, "All runs"))];
  const name = row ? settingWords(row) : "waiting";
  const head = [h("p", { class: "over" }, "run ", h("span", { class: "id" }, id)), h("h1", {}, name),
    row ? h("p", {}, status(row.status), ` ${row.ground}, seed ${show(row.seed)}`, isNumber(row.score) ? `; test score ${show(row.score)}` : "",
      " ", h("a", { class: "button", href: link("compare", twins(row).join("+")) }, "Compare with its other seeds")) : null,
    row?.error ? h("p", { class: "warn" }, row.error) : null,
    waiting ? progress(waiting) : null];
  if (!row) return head;
  const facts = [about2("Config", runs.config, row), about2("Results and provenance", runs.fields.filter((field) => !runs.config.includes(field)), row)];
  if (!["done", "diverged"].includes(row.status)) return [head, h("div", { class: "two" }, facts)].flat();
  let own;
  try { own = await part(`run/${id}`); } catch (error) { return [...head, sentence(error), h("div", { class: "two" }, facts)]; }
  return [...head, own.thinned ? h("p", { class: "small" }, own.thinned) : null,
    curves(own), ...gradients(own), spectraOver(own), overTraining(own), ...heat(own), eckartYoung(own), oracle(own, row),
    h("div", { class: "two" }, facts)];
}

/** The run and those that differ from it in the seed alone. */
function twins(row) {
  const same = runs.rows.filter((other) => other.setting === row.setting && other.status === "done" && other !== row);
  return [row.run_id, ...same.slice(0, 4).map((other) => other.run_id)];
}

const about2 = (caption, fields, row) => table(caption, [["field", false], ["value", false]],
  fields.filter((field) => row[field] !== null && row[field] !== undefined).map((field) => [field, typeof row[field] === "number" ? show(row[field], 6) : row[field]]));

const line = (name, x, y, colour, more = {}) => ({
  type: "scatter", mode: x.length > 30 ? "lines" : "lines+markers", name: plain(name), x, y,
  line: { color: colour, width: 2, ...(more.line || {}) }, marker: { color: colour, size: 5 }, ...without(more, "line") });
const without = (object, key) => Object.fromEntries(Object.entries(object).filter(([name]) => name !== key));
const longRows = (lines, x) => lines.flatMap((one) => one.x.map((at, i) => [one.name, at, one.y[i]]));

function lined(name, title, look, lines, x, y, layout = {}) {
  return figure({ name, title, look, traces: lines, layout: { xaxis: { title: x, ...layout.x }, yaxis: { title: y, ...layout.y }, ...layout.more },
    columns: ["line", x, y], rows: longRows(lines) });
}

function curves(own) {
  const whole = own.traces.filter((trace) => trace.whole);
  if (!whole.length) return nothing("Curves", "This run has no traces.");
  const names = whole.map(({ trace }) => trace);
  const now = names.includes(chosen("curve", "loss")) ? chosen("curve", "loss") : names[0];
  const { steps, values } = whole.find(({ trace }) => trace === now);
  return h("div", {}, h("div", { class: "row" }, select("curve", "curve", names.map((one) => [one]), now)),
    lined(`curve_${now}`, `${capital(now.replaceAll("_", " "))} over training`, "Look whether the curve has come to rest at the end: a run that was still falling tells of its budget, not of its method.",
      [line(now, steps, values[0], PALETTE[0], { connectgaps: true })], "step", now));
}

const meanAt = (values, i) => meanOf(values.map((layer) => layer[i])).mean;

function gradients(own) {
  const found = own.traces.filter((trace) => !trace.whole);
  if (!found.length) return [nothing("Gradient traces", "This run has no traces of layers.")];
  const means = found.filter(({ trace }) => trace in GRADIENTS).map(({ trace, steps, values }, i) =>
    line(GRADIENTS[trace], steps, steps.map((_, at) => meanAt(values, at)), PALETTE[i]));
  const names = found.map(({ trace }) => trace);
  const first = ["grad_norm_B", "grad_norm", names[0]].find((name) => names.includes(name));
  const now = names.includes(chosen("trace", "")) ? chosen("trace") : first;
  const { steps, values } = found.find(({ trace }) => trace === now);
  const last = Math.max(1, own.layers.layer.length - 1);
  const lines = own.layers.layer.map((layer, i) => line(layer, steps, values[i], shade(i / last), { hovertemplate: `${plain(layer)}<br>step %{x}: %{y:.4g}<extra></extra>`, showlegend: false, line: { width: 1.3 } }));
  return [
    means.length ? lined("gradients", "Gradient norms, mean over layers", "With B = 0 at the start A has no gradient at step 1 and gets one as B grows; look how soon they meet.", means, "step", "norm", { y: { type: "log" } }) : null,
    h("div", { class: "row" }, select("trace", "trace", names.map((name) => [name]), now)),
    lined(`trace_${now}`, `${now.replaceAll("_", " ")} of each layer`, "One line for each layer, the first light and the last dark. Look for layers that move apart from the others.", lines, "step", now.replaceAll("_", " "), { y: { type: "log" } }),
  ];
}

/** Singular values with a slider over the steps; it changes the fragment without a new page. */
function spectraOver(own) {
  const { steps, i, sigma } = own.spectra;
  if (!steps.length) return nothing("Spectra over training", "This run changed no layer.");
  const layers = own.layers.layer;
  const only = chosen("layer", "all layers");
  const picked = layers.includes(only) ? [layers.indexOf(only)] : layers.map((_, n) => n);
  const start = Math.max(0, steps.indexOf(Number(chosen("step", steps.at(-1)))));
  const tracesAt = (at) => picked.map((n) => line(layers[n], i, sigma[at][n], shade(n / Math.max(1, layers.length - 1)), {
    mode: "lines", line: { width: picked.length > 1 ? 1.2 : 2.5 }, showlegend: false, hovertemplate: `${plain(layers[n])}<br>σ%{x} = %{y:.4g}<extra></extra>` }));
  const all = sigma.flat(2).filter((value) => value > 0);
  const [top, low] = [all.reduce((a, b) => Math.max(a, b), 0), all.reduce((a, b) => Math.min(a, b), Infinity)];
  const range = [Math.log10(Math.max(low, top * 1e-6)) - 0.1, Math.log10(top) + 0.15];
  const layout = { xaxis: { type: "log", title: "i" }, yaxis: { type: "log", title: "singular value σᵢ", range } };
  const drawn = figure({ name: "spectra", title: "Spectra over training", traces: tracesAt(start), layout,
    look: "Singular values of each layer's update, the first layer light and the last dark. Move the slider: look whether the first directions grow alone or all grow together, and how sharply the values end at r.",
    columns: ["step", "layer", "i", "σ"], rows: steps.flatMap((step, s) => picked.flatMap((n) => i.map((place, p) => [step, layers[n], place, sigma[s][n][p]]))) });
  const told = h("output", { for: "step" }, `step ${steps[start]}`);
  const slider = h("input", { type: "range", id: "step", min: "0", max: String(steps.length - 1), value: String(start), "aria-label": "step", input: async () => {
    const at = Number(slider.value);
    told.textContent = `step ${steps[at]}`;
    slider.setAttribute("aria-valuetext", told.textContent);
    history.replaceState(null, "", link("run", own.run_id, { step: String(steps[at]) }));
    const box = drawn.querySelector(".plot");
    if (box.data) (await loadPlotly()).react(box, tracesAt(at), themed(layout));
  } });
  return h("div", {}, h("div", { class: "row" }, h("label", { class: "field wide" }, h("span", {}, "training"), slider, told),
    select("layer", "layer", ["all layers", ...layers].map((name) => [name]), "all layers")), drawn);
}

function overTraining(own) {
  const wanted = ["effective_rank", "energy_effective_rank", "stable_rank", "numerical_rank"].map((name) => own.over.find(({ measure }) => measure === name)).filter(Boolean);
  if (!wanted.length) return null;
  return lined("ranks_over_training", "Ranks over training", "Means over layers. Look whether the update gains directions as it trains or keeps those of its first steps.",
    wanted.map(({ measure, steps, values }, n) => line(measure.replaceAll("_", " "), steps, values, PALETTE[n])), "step", "rank");
}

const measureWords = ({ measure, k, side }) => [measure.replaceAll("_", " "), k === null ? "" : `k = ${show(k)}`, side].filter(Boolean).join(", ");

/** Every measure over layer × module, beside its null. */
function heat(own) {
  const found = own.measures.filter((one) => one.value);
  if (!found.length) return [nothing("Measures of every layer", "This run has none.")];
  const names = [...new Set(found.map(({ measure }) => measure))];
  const now = names.includes(chosen("measure", "effective_rank")) ? chosen("measure", "effective_rank") : names[0];
  const kinds = found.filter(({ measure }) => measure === now);
  const words = kinds.map((one) => measureWords(one));
  const at = Math.max(0, words.indexOf(chosen("kind", "")));
  const one = kinds[at];
  const over = one.null && chosen("null", "no") === "yes";
  const values = over ? one.value.map((value, i) => (isNumber(value) && one.null[i] ? value / one.null[i] : null)) : one.value;
  const outside = one.null ? one.value.filter((value, i) => isNumber(value) && isNumber(one.null_low[i]) && (value < one.null_low[i] || value > one.null_high[i])).length : 0;
  const known = one.null ? one.null_low.filter(isNumber).length : 0;
  return [h("div", { class: "row" }, select("measure", "measure", names.map((name) => [name, name.replaceAll("_", " ")]), now),
    kinds.length > 1 ? select("of", "kind", words.map((word) => [word]), words[at]) : null,
    one.null ? select("show", "null", [["no", "the value"], ["yes", "the value over its null"]], "no") : null),
  heatmap({ name: `heat_${now}`, title: `${capital(measureWords(one))}${over ? ", as a multiple of its null" : ""}`, layers: own.layers, values, over,
    look: one.null ? `Look for rows and columns that differ. ${outside} of ${known} layers lie outside the central 95 % of their null; a value inside it is geometry and no finding.` : "Look for blocks (downwards) and modules (across) that differ from the others; this measure has no null.",
    more: one })];
}

function heatmap({ name, title, look, layers, values, over = false, more = {} }) {
  const blocks = layers.depth.every(isNumber);
  const rows = blocks ? [...new Set(layers.depth)].sort((a, b) => a - b) : layers.layer;
  const columns = blocks ? [...new Set(layers.module)] : ["value"];
  const place = new Map(layers.layer.map((_, i) => [blocks ? `${layers.depth[i]}/${layers.module[i]}` : `${layers.layer[i]}/value`, i]));
  const cells = rows.map((row) => columns.map((column) => place.get(`${row}/${column}`)));
  const told = (i) => (i === undefined ? "" : plain(`${layers.layer[i]}: ${show(values[i])}${more.null && isNumber(more.null[i]) ? ` (value ${show(more.value[i])}; null ${show(more.null[i])}, 95 % in ${show(more.null_low[i])} to ${show(more.null_high[i])})` : ""}`));
  const z = cells.map((row) => row.map((i) => (i === undefined ? null : values[i])));
  const flat = z.flat().filter(isNumber);
  const reach = over ? Math.max(...flat.map((value) => Math.abs(value - 1)), 0.05) : 0;
  return figure({ name, title, look,
    traces: [{ type: "heatmap", z, x: columns.map(plain), y: rows.map((row) => (blocks ? `block ${row}` : plain(row))),
      text: z.map((row) => row.map((value) => (value === null ? "" : show(value, 3)))), texttemplate: flat.length <= 150 ? "%{text}" : undefined, hovertext: cells.map((row) => row.map(told)), hoverinfo: "text",
      colorscale: over ? DIVERGING() : SEQUENTIAL(), ...(over ? { zmin: 1 - reach, zmax: 1 + reach } : {}), xgap: 1, ygap: 1, colorbar: { thickness: 12 } }],
    layout: { height: 150 + 34 * Math.min(rows.length, 24), xaxis: { type: "category" }, yaxis: { type: "category", autorange: "reversed" } },
    columns: ["layer", "module", "block", title, ...(more.null ? ["null", "null low", "null high"] : [])],
    rows: layers.layer.map((layer, i) => [layer, layers.module[i], layers.depth[i], values[i], ...(more.null ? [more.null[i], more.null_low[i], more.null_high[i]] : [])]) });
}

function eckartYoung(own) {
  const kinds = groups(own.measures.filter(({ measure, value }) => measure === "truncation_error" && value), ({ side }) => side);
  if (!kinds.size) return null;
  const lines = [...kinds].map(([side, rows], n) => {
    const order = [...rows].sort((a, b) => a.k - b.k);
    return line(side, order.map(({ k }) => k), order.map(({ value }) => meanOf(value).mean), PALETTE[n]);
  });
  return lined("eckart_young", "Error of the best approximation of rank k", "Eckart and Young: what is lost when every layer keeps its k strongest directions, as a share of the update, mean over layers. Look how slowly it falls beside the score below.", lines, "k", "relative error", { x: { type: "linear" } });
}

function oracle(own, row) {
  const kinds = groups(own.measures.filter(({ measure, whole }) => measure === "oracle_score" && whole !== undefined), ({ side }) => side);
  if (!kinds.size) return null;
  const lines = [...kinds].map(([side, rows], n) => {
    const order = [...rows].sort((a, b) => a.k - b.k);
    return line(side.replaceAll("_", " "), order.map(({ k }) => k), order.map(({ whole }) => whole), PALETTE[n]);
  });
  return lined("oracle", "Score of the model cut down to k directions", "Look for the smallest k from which the line stays with the uncut score (dashed): so many directions do the work.", lines, "k directions in each layer", "test score",
    { more: { shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: row.score, y1: row.score, line: { dash: "dash", width: 1.5, color: PALETTE[6] } }] } });
}
