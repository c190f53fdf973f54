// Overview: how scores go with r, α and cost; the best of each method; the table of runs.

const MEASURED = {
  score: "test score", validation_score: "validation score", loss: "test loss",
  trainable: "parameters that train", seconds: "seconds of a run", peak_memory: "peak memory, MB",
};
const COSTS = {
  adapter_parameters: "parameters of the update", trainable: "parameters that train",
  peak_memory: "peak memory, MB", seconds: "seconds of a run",
};
const METHODS = { head: "head only", full: "full fine-tuning", lora: "LoRA" };
/** Lines that a plot shows at first, and runs that it draws as dots. */
const LINES = 6;
const DOTS = 1000;
const method = (name) => METHODS[name] ?? name;

async function overviewPage() {
  const left = kept();
  const { names, now, rows } = ground(left);
  const fair = chosen("fair", "yes") === "yes";
  const ended = rows.filter((row) => row.status === "done" && isNumber(row.score));
  const drawn = fair ? ended.filter((row) => row.drawn === "yes") : ended;
  const y = chosen("y", "score");
  const plots = ended.length ? [
    h("div", { class: "row" }, select("vertical axis", "y", Object.entries(MEASURED), "score"),
      select("averages hold", "fair", [["yes", "comparable runs only"], ["no", "all runs that are left"]], "yes")),
    fair && runs.notes[now] ? h("p", { class: "small" }, runs.notes[now]) : null,
    against("adapter.r", "r", drawn, y), against("adapter.alpha", "α", drawn, y),
    h("div", { class: "row" }, select("cost", "cost", Object.entries(COSTS), "adapter_parameters")),
    pareto(drawn), best(fair ? alike(ended) : ended)] : [h("p", {}, "No finished run with a score is left.")];
  return [filterBar(names, now, left), ...plots.flat(), runTable(rows)];
}

/** One line for each rule of α, means with intervals and every run; head and full as bands. */
function against(field, letter, rows, y) {
  const ranked = rows.filter((row) => isNumber(row[field]) && isNumber(row[y]));
  const title = `${capital(MEASURED[y])} against ${letter}`;
  if (!ranked.length) return nothing(title, `No run that is left has ${letter === "r" ? "an r" : "an α"}.`);
  const lines = groups(ranked.flatMap((row) =>
    (row.rules || method(row.adapter)).split("|").map((rule) => ({ rule, row }))), ({ rule }) => rule);
  const xs = [...new Set(ranked.map((row) => row[field]))].sort((a, b) => a - b);
  const order = [...lines].sort((a, b) => b[1].length - a[1].length);
  const every = Math.ceil(ranked.length / DOTS);
  const traces = order.flatMap(([rule, own], i) => {
    const colour = PALETTE[i % PALETTE.length];
    const visible = i < LINES || "legendonly";
    const at = [...groups(own.map(({ row }) => row), (row) => row[field])].sort((a, b) => a[0] - b[0]);
    const means = at.map(([, group]) => meanOf(group.map((row) => row[y])));
    const dots = own.filter((_, n) => n % every === 0).map(({ row }) => row);
    return [{
      type: "scatter", mode: "markers", x: dots.map((row) => row[field]), y: dots.map((row) => row[y]),
      marker: { color: faint(colour, 0.45), size: 7 }, customdata: dots.map((row) => row.run_id),
      text: dots.map((row) => about(row, y)), hoverinfo: "text", showlegend: false, legendgroup: rule, visible,
    }, {
      type: "scatter", mode: "lines+markers", name: plain(rule), legendgroup: rule, visible,
      x: at.map(([x]) => x), y: means.map(({ mean }) => mean), customdata: at.map(([, group]) => group[0].run_id),
      error_y: { type: "data", array: means.map(({ half }) => half ?? 0), thickness: 1.5, width: 3 },
      line: { color: colour, width: 2 }, marker: { color: colour, size: 8 },
      text: at.map(([x, group], j) => plain(`${rule}, ${letter} = ${x}: ${plusMinus(means[j], 4)} (${group.length} runs)`)), hoverinfo: "text",
    }];
  });
  const { shapes, annotations } = bands(rows, y);
  const more = (order.length > LINES ? ` The ${LINES} lines with most runs are drawn; the legend adds others.` : "")
    + (every > 1 ? ` Of ${ranked.length} runs one in ${every} is a dot; means hold all.` : "");
  return figure({
    name: `${y}_against_${letter === "r" ? "r" : "alpha"}`, title,
    look: `Look where a line enters the band of full fine-tuning and whether it is flat in ${letter}. Dots are runs; lines are means with 95 % t intervals; click a dot to open its run.${more}`,
    traces, open: (id) => link("run", id),
    layout: { shapes, annotations, margin: { l: 60, r: 175, t: 24, b: 56 },
      xaxis: { type: "log", title: letter, tickvals: xs, ticktext: xs.map((x) => show(x)) },
      yaxis: { title: MEASURED[y] } },
    columns: ["run", "line", letter, MEASURED[y], "seed"],
    rows: [...lines].flatMap(([rule, own]) => own.map(({ row }) => [row.run_id, rule, row[field], row[y], row.seed])),
  });
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

function about(row, y) {
  const words = ["adapter.r", "adapter.alpha", "train.lr", "seed"].filter((name) => row[name] !== null)
    .map((name) => `${name} ${show(row[name])}`).join(", ");
  return plain(`${row.run_id}: ${method(row.adapter)}, ${words}: ${show(row[y])}`);
}

/** Floor and ceiling: the head alone and full fine-tuning, as means with their intervals. */
function bands(rows, y) {
  const shapes = [], annotations = [];
  const ends = [["head", PALETTE[6]], ["full", PALETTE[1]]].map(([adapter, colour]) =>
    [adapter, colour, meanOf(rows.filter((row) => row.adapter === adapter).map((row) => row[y]))])
    .filter(([, , { n }]) => n);
  for (const [adapter, colour, { mean, half }] of ends) {
    const across = { type: "rect", xref: "paper", x0: 0, x1: 1, layer: "below" };
    shapes.push({ ...across, y0: mean - (half ?? 0), y1: mean + (half ?? 0), fillcolor: faint(colour, 0.16), line: { width: 0 } });
    shapes.push({ ...across, type: "line", y0: mean, y1: mean, line: { color: colour, width: 1.5, dash: "dash" } });
    annotations.push({ xref: "paper", x: 1.01, xanchor: "left", y: mean, showarrow: false, font: { color: colour },
      text: `${method(adapter)} ${show(mean, 3)}` });
  }
  if (annotations.length === 2) {
    const [low, high] = annotations[0].y <= annotations[1].y ? annotations : [annotations[1], annotations[0]];
    low.yanchor = "top"; high.yanchor = "bottom";
  }
  return { shapes, annotations };
}

/** Settings by cost and score; the line joins those that no cheaper one beats. */
function pareto(rows) {
  const cost = chosen("cost", "adapter_parameters");
  const title = `Score against ${COSTS[cost]}`;
  const usable = rows.filter((row) => isNumber(row[cost]) && row[cost] > 0);
  if (!usable.length) return nothing(title, `No run that is left tells its ${COSTS[cost]}.`);
  const settings = [...groups(usable, (row) => row.setting).values()].map((own) => ({
    own, x: meanOf(own.map((row) => row[cost])).mean, y: meanOf(own.map((row) => row.score)) }));
  settings.sort((a, b) => a.x - b.x || b.y.mean - a.y.mean);
  let top = -Infinity;
  const front = settings.filter(({ y }) => y.mean > top && (top = y.mean, true));
  const traces = [...groups(settings, ({ own }) => own[0].adapter)].map(([adapter, group], i) => ({
    type: "scatter", mode: "markers", name: plain(method(adapter)), x: group.map(({ x }) => x), y: group.map(({ y }) => y.mean),
    error_y: { type: "data", array: group.map(({ y }) => y.half ?? 0), thickness: 1, width: 0 },
    marker: { size: 9, color: PALETTE[i % PALETTE.length], symbol: i % 8 }, customdata: group.map(({ own }) => own[0].run_id),
    text: group.map(({ own, y }) => plain(`${settingWords(own[0])}: ${plusMinus(y)} (${own.length} runs)`)), hoverinfo: "text",
  }));
  traces.unshift({ type: "scatter", mode: "lines", name: "nothing cheaper is better", hoverinfo: "skip",
    x: front.map(({ x }) => x), y: front.map(({ y }) => y.mean), line: { shape: "hv", width: 1.5, color: PALETTE[6] } });
  return figure({
    name: `pareto_${cost}`, title,
    look: "Look at the settings on the line: nothing cheaper scores better. Bars are 95 % t intervals over seeds; where they overlap the order may be chance. A click opens one of the setting's runs.",
    traces, open: (id) => link("run", id),
    layout: { xaxis: { type: "log", title: COSTS[cost] }, yaxis: { title: MEASURED.score } },
    columns: ["run", "method", "setting", COSTS[cost], "score", "half width", "runs", "on the line"],
    rows: settings.map((one) => [one.own[0].run_id, one.own[0].adapter, settingWords(one.own[0]), one.x, one.y.mean, one.y.half, one.own.length, front.includes(one) ? "yes" : "no"]),
  });
}

function settingWords(row) {
  const words = ["adapter.r", "adapter.alpha", "train.lr"].filter((name) => row[name] !== null && row[name] !== undefined)
    .map((name) => `${name.split(".")[1]} ${show(row[name])}`);
  return [method(row.adapter), ...words].join(", ");
}

/** Runs whose data, model and training are those of the runs that are drawn; the rate is free. */
function alike(rows) {
  const one = rows.find((row) => row.drawn === "yes");
  const fixed = runs.config.filter((name) => !["adapter", "seed", "train.lr"].includes(name) && !name.startsWith("adapter."));
  return one ? rows.filter((row) => fixed.every((name) => row[name] === one[name])) : rows;
}

/** Of each method the setting that validation chooses, of those with most seeds. */
function best(rows) {
  const found = [...groups(rows, (row) => row.adapter)].map(([adapter, own]) => {
    const settings = [...groups(own, (row) => row.setting).values()];
    const most = Math.max(...settings.map((group) => group.length));
    const full = settings.filter((group) => group.length === most);
    const by = own.every((row) => isNumber(row.validation_score)) ? "validation_score" : "score";
    const winner = full.reduce((a, b) =>
      (meanOf(b.map((row) => row[by])).mean > meanOf(a.map((row) => row[by])).mean ? b : a));
    return { adapter, winner, tried: full.length, score: meanOf(winner.map((row) => row.score)) };
  }).sort((a, b) => a.score.mean - b.score.mean);
  const names = found.map(({ adapter }) => plain(method(adapter)));
  const dots = found.flatMap(({ winner }, i) => winner.slice(0, DOTS / 10).map((row) => ({ row, i })));
  const traces = [{
    type: "scatter", mode: "markers", y: dots.map(({ i }) => names[i]), x: dots.map(({ row }) => row.score),
    customdata: dots.map(({ row }) => row.run_id), text: dots.map(({ row }) => about(row, "score")),
    hoverinfo: "text", marker: { color: faint(PALETTE[0], 0.45), size: 7 }, showlegend: false,
  }, {
    type: "scatter", mode: "markers", y: names, x: found.map(({ score }) => score.mean), customdata: found.map(({ winner }) => winner[0].run_id),
    error_x: { type: "data", array: found.map(({ score }) => score.half ?? 0), thickness: 2, width: 4 },
    text: found.map(({ winner, score }) => plain(`${settingWords(winner[0])}: ${plusMinus(score)} (${score.n} runs)`)), hoverinfo: "text",
    marker: { color: PALETTE[0], size: 10 }, showlegend: false,
  }];
  return figure({
    name: "best_per_method", title: "The best of each method",
    look: "Each method by the setting that the validation score chooses among those with most seeds, shown with its test score. Look for intervals that lie apart; a method with more settings had more chances.",
    traces, open: (id) => link("run", id),
    layout: { height: 120 + 42 * found.length, xaxis: { title: MEASURED.score }, yaxis: { type: "category" } },
    columns: ["run", "method", "setting", "score", "half width", "seeds", "settings tried", "parameters that train", "seconds"],
    rows: [...found].reverse().map(({ winner, score, tried, adapter }) => [winner[0].run_id, method(adapter), settingWords(winner[0]), score.mean, score.half, score.n, tried, winner[0].trainable, meanOf(winner.map((row) => row.seconds)).mean]),
  });
}
