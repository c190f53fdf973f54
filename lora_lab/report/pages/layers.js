// Layers: what differs by depth and by kind of module, over all runs that are chosen.

async function layersPage() {
  const found = await part("layers", standingVersionOf("layers"));
  const left = kept();
  const { names, now, rows } = ground(left.filter((row) => row.run_id in found.runs));
  const head = [h("h1", {}, "Layers"), filterBar(names, now, left)];
  if (!rows.length) return [...head, h("p", {}, "No finished run that is left has measures of layers.")];
  const measure = found.measures.includes(chosen("measure", "")) ? chosen("measure") : found.measures[0];
  const by = runs.columns.includes(chosen("by", "")) ? chosen("by") : "adapter.r";
  const label = (row) => (by === "adapter.r" ? (row["adapter.r"] === null ? method(row.adapter) : `${method(row.adapter)}, r = ${show(row["adapter.r"])}`) : `${by.split(".").at(-1)} = ${show(row[by])}`);
  const known = rows.filter((row) => found.runs[row.run_id][1][measure]);
  const usable = chosen("fair", "yes") === "no" ? known : mainRule(known.filter((row) => row.drawn === "yes"));
  const lines = [...groups(usable, label)].sort((a, b) => b[1].length - a[1].length).slice(0, PALETTE.length).sort((a, b) => a[0].localeCompare(b[0], "en", { numeric: true }));
  const value = (row, keep) => {
    const [set, values] = found.runs[row.run_id];
    return meanOf(values[measure].filter((_, i) => keep(found.layers[set], i))).mean;
  };
  const sets = [...new Set(usable.map((row) => found.runs[row.run_id][0]))].map((set) => found.layers[set]);
  const depths = [...new Set(sets.flatMap(({ depth }) => depth))].filter(isNumber).sort((a, b) => a - b);
  const modules = [...new Set(sets.flatMap(({ module }) => module))];
  const over = (places, test) => lines.map(([name, own], n) => {
    const stats = places.map((place) => meanOf(own.map((row) => value(row, (layers, i) => test(layers, i, place)))));
    return line(name, places, stats.map(({ mean }) => mean), PALETTE[n], { error_y: { type: "data", array: stats.map(({ half }) => half ?? 0), thickness: 1.2, width: 2 } });
  });
  const first = lines.find(([name]) => name === chosen("group", "")) ?? lines.at(-1);
  return [...head,
    h("div", { class: "row" }, select("measure", "measure", found.measures.map((name) => [name]), measure),
      select("one line for each", "by", runs.config.map((name) => [name, name === "adapter.r" ? "method and r" : name]), "adapter.r"),
      select("averages hold", "fair", [["yes", "comparable runs of one α rule"], ["no", "all runs that are left"]], "yes")),
    lines.length ? null : h("p", {}, "No comparable run is left."),
    depths.length ? lined("by_depth", `${capital(measure)} by depth`, "Means over the modules of a block, with 95 % t intervals over runs. Look whether late blocks need more directions than early ones.", over(depths, (layers, i, place) => layers.depth[i] === place), "block", measure) : null,
    modules.length ? lined("by_module", `${capital(measure)} by kind of module`, "Means over blocks, with 95 % t intervals over runs. Look whether attention and MLP differ by more than their intervals.", over(modules, (layers, i, place) => layers.module[i] === place), "module", measure, { x: { type: "category" } }) : null,
    first ? [h("div", { class: "row" }, select("map of", "group", lines.map(([name]) => [name]), first[0])), meanMap(found, first, measure)] : null].flat();
}

/** Runs without a rule of α, and those of the rule with most runs. */
function mainRule(rows) {
  const rules = groups(rows.flatMap((row) => row.rules.split("|").filter(Boolean)), (rule) => rule);
  const [main] = [...rules].sort((a, b) => b[1].length - a[1].length)[0] ?? [];
  return rows.filter((row) => !row.rules || row.rules.split("|").includes(main));
}

function meanMap(found, [name, own], measure) {
  const set = found.runs[own[0].run_id][0];
  const same = own.filter((row) => found.runs[row.run_id][0] === set);
  const layers = found.layers[set];
  const values = layers.layer.map((_, i) => meanOf(same.map((row) => found.runs[row.run_id][1][measure][i])).mean);
  return heatmap({ name: "layer_map", title: `${capital(measure)}: ${name}, mean of ${same.length} runs`, layers, values,
    look: "Blocks downwards, modules across. Look for the layers that a uniform r treats too well or too badly." });
}
