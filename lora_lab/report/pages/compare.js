// Compare: two or more runs; what their configs, scores, spectra and directions have in common.

/** Names of layers without what all of them begin with. */
function shortened(layers) {
  const parts = layers.map((layer) => layer.split("."));
  const common = parts[0].findIndex((word, i) => parts.some((other) => other[i] !== word || i === other.length - 1));
  return (layer) => layer.split(".").slice(Math.max(0, common)).join(".");
}

/** The space between two lines. */
const band = (x, low, high, name) => [
  line("lower end", x, low, PALETTE[6], { mode: "lines", line: { width: 0 }, showlegend: false, hoverinfo: "skip" }),
  line(name, x, high, PALETTE[6], { mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: faint(PALETTE[6], 0.25), hoverinfo: "skip" })];

async function comparePage(argument) {
  const ids = argument.split("+").filter((id) => runs.byId.has(id));
  if (ids.length < 2) return [h("h1", {}, "Compare"), h("p", {}, "Tick two or more runs in the ", h("a", { href: link("overview") }, "table of runs"), " and choose Compare; or open a run and compare it with its other seeds.")];
  const rows = ids.map((id) => runs.byId.get(id));
  const found = await Promise.all(ids.map((id) => part(`run/${id}`).catch((error) => error)));
  const own = found.filter((one) => !(one instanceof Error));
  return [h("h1", {}, `${ids.length} runs side by side`), differences(ids, rows), ...found.filter((one) => one instanceof Error).map(sentence),
    paired(ids, rows, found), spectraTogether(own), ...layersTogether(own), ...pairs(ids)];
}

function differences(ids, rows) {
  const differ = (field) => new Set(rows.map((row) => row[field])).size > 1;
  const results = ["status", "score", "validation_score", "loss", "trainable", "seconds", "peak_memory"].filter((name) => runs.columns.includes(name));
  const line = (field) => [field, ...rows.map((row) => show(row[field]))];
  const config = runs.config.filter(differ);
  const note = config.length ? "" : "Their configs do not differ.";
  return table("What differs", [["field", false], ...ids.map((id) => [runLink(id), true])], [...config.map(line), ...results.filter(differ).map(line)], note);
}

/** Test examples are the units: the same example under two runs is a pair. */
function paired(ids, rows, found) {
  const [first, ...others] = found;
  const said = others.map((other, i) => {
    const start = [ids[i + 1], ids[0]];
    if ([first, other].some((one) => one instanceof Error || !one.examples.length)) return [...start, null, null, null, "the test examples of one are not kept"];
    if (rows[0].data_hash !== rows[i + 1].data_hash || first.examples.length !== other.examples.length) return [...start, null, null, null, "they were tested on different data"];
    const { n, mean, half } = meanOf(other.examples.map((value, j) => value - first.examples[j]));
    const verdict = half === null ? "" : Math.abs(mean) > half ? (mean > 0 ? "better" : "worse") : "no difference beyond chance";
    return [...start, mean, half === null ? null : `${show(mean - half, 3)} to ${show(mean + half, 3)}`, n, verdict];
  });
  return table("Paired by test example", [["run", false], ["less", false], ["difference", true], ["95 % t interval", true], ["examples", true], ["", false]],
    said.map(([one, other, ...rest]) => [runLink(one), runLink(other), ...rest]),
    "It tells whether these two trained models differ on such examples, not whether two methods do: that takes several seeds of each.");
}

function spectraTogether(own) {
  const common = own.length ? own[0].layers.layer.filter((layer) => own.every((one) => one.layers.layer.includes(layer))) : [];
  if (!common.length) return nothing("Spectra", "These runs have no layer in common whose spectrum is known.");
  const now = common.includes(chosen("layer", "")) ? chosen("layer") : common[0];
  const scale = chosen("size", "relative") === "relative";
  const lines = own.map((one, n) => {
    const values = one.spectra.sigma.at(-1)[one.layers.layer.indexOf(now)];
    return line(`${settingWords(runs.byId.get(one.run_id))} (${one.run_id})`, one.spectra.i, scale ? values.map((value) => (value === null ? null : value / values[0])) : values, PALETTE[n % PALETTE.length], { mode: "lines" });
  });
  return h("div", {}, h("div", { class: "row" }, select("layer", "layer", common.map((layer) => [layer]), now),
    select("singular values", "size", [["relative", "over the first"], ["absolute", "as they are"]], "relative")),
  lined("spectra_together", `Spectra of ${now}`, "Look how fast each falls: a line that stays high spreads its update over many directions; LoRA ends at r.", lines, "i", scale ? "σᵢ / σ₁" : "σᵢ", { x: { type: "log" }, y: { type: "log" } }));
}

/** Any measure layer by layer, one line for each run; the null as a band of the first. */
function layersTogether(own) {
  const known = own.map((one) => new Map(one.measures.filter(({ value }) => value).map((entry) => [measureWords(entry), entry])));
  const names = known.length ? [...known[0].keys()].filter((name) => known.every((one) => one.has(name))) : [];
  if (!names.length) return [];
  const first = names.includes("amplification, k = 4, left") ? "amplification, k = 4, left" : names.find((name) => name.startsWith("amplification")) ?? names[0];
  const now = names.includes(chosen("measure", "")) ? chosen("measure") : first;
  const short = shortened(own[0].layers.layer);
  const lines = own.map((one, n) => line(`${settingWords(runs.byId.get(one.run_id))} (${one.run_id})`, one.layers.layer.map(short), known[n].get(now).value, PALETTE[n % PALETTE.length]));
  return [h("div", { class: "row" }, select("measure", "measure", names.map((name) => [name]), now)),
    lined("layers_together", `${capital(now)}, layer by layer`, "Look whether the runs rise and fall at the same layers. Amplification says how much larger the update is than what W0 has in the same directions.", lines, "layer", now, { x: { type: "category", tickfont: { size: 9 } }, more: { height: 480 } })];
}

function pairs(ids) {
  if (!SERVED) return [h("p", { class: "small" }, "How much of their directions the updates share (φ, principal angles, cosine) is computed from the weights: lora-lab dashboard shows it.")];
  const others = ids.slice(1);
  const now = others.includes(chosen("with", "")) ? chosen("with") : others[0];
  const box = h("div", {}, h("p", { class: "small", role: "status" }, "Reading the updates …"));
  showPair(box, `pair/${ids[0]}+${now}`).catch((error) => box.replaceChildren(sentence(error)));
  return [h("h2", {}, "Directions that updates share"),
    others.length > 1 ? h("div", { class: "row" }, select(`${ids[0]} with`, "with", others.map((id) => [id]), now)) : null, box];
}

async function showPair(box, name) {
  const pair = await part(name);
  const now = pair.layers.includes(chosen("layer", "")) ? chosen("layer") : pair.layers[0];
  const side = chosen("side", "left");
  const directions = h("div", {}, h("p", { class: "small", role: "status" }, "Comparing directions …"));
  box.replaceChildren(...[cosines(pair), h("div", { class: "row" }, select("layer", "layer", pair.layers.map((layer) => [layer]), now),
    select("side", "side", [["left", "left: output"], ["right", "right: input"]], "left")), directions].flat());
  const found = await part(`${name}+${pair.layers.indexOf(now)}`);
  directions.replaceChildren(phi(found, now, side), byK(found, "subspace_overlap", now, side, `Overlap φ(k, k) of ${now}`, "Look where the line leaves the band of random subspaces: where it lies inside, the shared directions are chance."),
    byK(found, "principal_angle", now, side, `Largest principal angle of ${now}, in radians`, "π/2 = 1.57 says that some direction of one is orthogonal to all of the other's; look whether the line lies below the band of random subspaces."));
}

function cosines({ whole, layers, value, null_low: low, null_high: high }) {
  const short = shortened(layers);
  const names = layers.map(short);
  return [h("p", {}, `The cosine of the two whole updates is ${show(whole.value, 3)}; at random it lies between ${show(whole.null_low, 3)} and ${show(whole.null_high, 3)}.`),
    lined("cosine", "Cosine of the two updates, layer by layer", "Look for layers above the grey band of random updates: there both runs moved the weight in the same direction.",
      [...band(names, low, high, "random updates, central 95 %"), line("the two updates", names, value, PALETTE[0])], "layer", "cosine", { x: { type: "category", tickfont: { size: 9 } } })];
}

function phi({ one, other, phi: grids }, layer, side) {
  const { d, grid } = grids[side];
  if (!grid.length) return nothing("φ(i, j)", "One of the two has no direction in this layer.");
  const ks = grid.map((_, i) => String(i + 1));
  const columns = grid[0].map((_, j) => String(j + 1));
  const chance = (i, j) => Math.max(i, j) / d;
  return figure({ name: "phi", title: `φ(i, j) of ${layer}, ${side} side`,
    look: `How much of the first i directions of ${one} lies in the first j of ${other}: 1 all, 0 none. At random it would be max(i, j)/${d}, from ${show(chance(1, 1), 2)} to ${show(chance(grid.length, columns.length), 2)}. Look whether only the first corner is bright.`,
    traces: [{ type: "heatmap", z: grid, x: columns, y: ks, zmin: 0, zmax: 1, colorscale: SEQUENTIAL(), xgap: 1, ygap: 1, colorbar: { thickness: 12 },
      hovertext: grid.map((row, i) => row.map((value, j) => `φ(${i + 1}, ${j + 1}) = ${show(value, 3)}; at random ${show(chance(i + 1, j + 1), 2)}`)), hoverinfo: "text" }],
    layout: { height: 460, xaxis: { type: "category", title: `j, directions of ${other}` }, yaxis: { type: "category", title: `i, directions of ${one}`, autorange: "reversed" } },
    columns: ["i", "j", "phi", "at random"], rows: grid.flatMap((row, i) => row.map((value, j) => [i + 1, j + 1, value, chance(i + 1, j + 1)])) });
}

function byK({ by_k: rows }, measure, layer, side, title, look) {
  const order = rows.filter((row) => row.measure === measure && row.side === side && isNumber(row.value)).sort((a, b) => a.k - b.k);
  if (!order.length) return nothing(title, "One of the two has too few directions in this layer.");
  const of = (name) => order.map((row) => row[name]);
  return lined(`${measure}_by_k`, title, look, [...band(of("k"), of("null_low"), of("null_high"), "random subspaces, central 95 %"), line("the two updates", of("k"), of("value"), PALETTE[0])],
    "k", measure.replaceAll("_", " "), { x: { type: "log", tickvals: of("k") } });
}
