// Drawing: Plotly in the page's colours, with a caption, a table of its data, and files to take away.

const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#6f6f6f", "#b34a00"];
const DARK = matchMedia("(prefers-color-scheme: dark)");

/** Light to dark (in the dark: dark to light) as a value grows. */
function shade(share) {
  const [from, to] = DARK.matches ? [[58, 92, 120], [140, 220, 200]] : [[112, 186, 168], [30, 50, 100]];
  return `rgb(${from.map((value, i) => Math.round(value + share * (to[i] - value))).join(",")})`;
}

const SEQUENTIAL = () => DARK.matches
  ? [[0, "#15263a"], [0.5, "#2f8f8a"], [1, "#f4e9a1"]] : [[0, "#f6f3df"], [0.5, "#4aa6a0"], [1, "#14305c"]];
const DIVERGING = () => DARK.matches
  ? [[0, "#4aa0e0"], [0.5, "#22262b"], [1, "#ff9d57"]] : [[0, "#0060a8"], [0.5, "#f7f7f5"], [1, "#c24e00"]];

function faint(colour, alpha) {
  const bytes = colour.startsWith("#")
    ? [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)) : colour.match(/\d+/g).slice(0, 3);
  return `rgba(${bytes.join(",")},${alpha})`;
}

let plotly = null;

/** Plotly's script is kept packed and is run, by its hash, when the first plot comes into view. */
function loadPlotly() {
  plotly ??= (async () => {
    const text = SERVED
      ? await (await fetch("/plotly.js")).text() : await unpacked(EMBEDDED.get("plotly"));
    // Of the styles that it brings for maps, which are not drawn here, it asks by id whether they are there.
    const [, maps] = text.match(/getElementById\("([0-9a-f]{64})"\)/) ?? [null, "plotly"];
    document.head.append(h("script", { id: maps }, text));
    return window.Plotly;
  })();
  return plotly;
}

function themed(layout) {
  const css = getComputedStyle(document.documentElement);
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => css.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: soft, tickcolor: soft, automargin: true };
  const axes = Object.fromEntries(Object.keys({ xaxis: 1, yaxis: 1, ...layout })
    .filter((name) => /^[xy]axis/.test(name)).map((name) => [name, axisOf(layout[name] || {}, axis)]));
  return {
    height: 420, margin: { l: 60, r: 24, t: 24, b: 56 }, hovermode: "closest", dragmode: false,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 13, color: ink },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hoverlabel: { align: "left" },
    ...layout, ...axes,
  };
}

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;", "%": "&#37;" };

/** Names of users are text: Plotly would read a few tags, mathematics and templates in titles. */
const plain = (text) => String(text).replace(/[&<>$%]/g, (letter) => ENTITIES[letter]);

function axisOf(given, common) {
  const title = typeof given.title === "string" ? { text: plain(given.title) } : given.title;
  const log = given.type === "log" ? { exponentformat: "power" } : {};
  return { ...common, ...log, ...given, title };
}

/** Ticks of a logarithmic axis: every decade, or within few of them 1, 2 and 5. */
function ticked(layout, traces) {
  const found = {};
  for (const letter of ["x", "y"]) {
    const axis = layout[`${letter}axis`];
    if (axis?.type !== "log" || axis.tickvals) continue;
    const values = traces.flatMap((trace) => trace[letter]).filter((value) => isNumber(value) && value > 0);
    const span = Math.log10(values.reduce((a, b) => Math.max(a, b), 0) / values.reduce((a, b) => Math.min(a, b), Infinity));
    found[`${letter}axis`] = { ...axis, dtick: span > 3 ? 1 : "D2" };
  }
  return { ...layout, ...found };
}

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) { seen.unobserve(target); target.draw(); }
  }
});

/** A figure. Plotly and the table of data wait until they are looked at.
 *  given: name, title, look (what to look for), traces, layout, columns and rows (its data),
 *  open (a point's customdata to a fragment). */
function figure(given) {
  const box = h("div", { class: "plot", role: "img", "aria-label": `${given.title}. ${given.look}` });
  box.style.minHeight = `${given.layout.height || 420}px`;
  box.draw = async () => {
    try {
      const lib = await loadPlotly();
      if (!box.isConnected) return;
      const config = { displaylogo: false, responsive: true, displayModeBar: false };
      await lib.newPlot(box, given.traces, themed(ticked(given.layout, given.traces)), config);
      if (given.open) box.on("plotly_click", ({ points }) => {
        const data = points[0].customdata;
        const target = data === undefined || data === null ? null : given.open(data);
        if (target) location.hash = target;
      });
    } catch (error) { box.replaceChildren(sentence(error)); }
  };
  seen.observe(box);
  const image = (format) => h("button", { type: "button", click: async () => {
    if (!box.data) await box.draw();
    const lib = await loadPlotly();
    const size = { width: Math.max(box.clientWidth, 700), height: box.clientHeight, scale: format === "png" ? 2 : 1 };
    const url = await lib.toImage(box, { format, ...size });
    const data = format === "svg" ? decodeURIComponent(url.slice(url.indexOf(",") + 1)) : null;
    const bytes = data ?? bytesOf(url.slice(url.indexOf(",") + 1));
    download(`${given.name}.${format}`, bytes, format === "svg" ? "image/svg+xml" : "image/png");
  } }, format.toUpperCase());
  const shown = h("details", { class: "data", toggle: () => {
    if (!shown.open || shown.children.length > 1) return;
    const rows = given.rows.slice(0, 500).map((row) => row.map((cell, i) =>
      given.columns[i] === "run" && cell ? runLink(cell) : cell));
    const note = given.rows.length > 500 ? `The first 500 of ${given.rows.length} rows; CSV holds all.` : "";
    shown.append(table(given.title, given.columns.map((name) => [name, false]), rows, note));
  } }, h("summary", {}, "Data as a table"));
  return h("figure", { "data-figure": given.name },
    h("h3", {}, given.title), h("figcaption", {}, given.look), box,
    h("div", { class: "take" }, shown, h("span", { class: "buttons" }, "Download ",
      h("button", { type: "button", click: () => download(`${given.name}.csv`, csv(given.columns, given.rows), "text/csv") }, "CSV"),
      image("svg"), image("png"))));
}

const nothing = (title, why) => h("figure", {}, h("h3", {}, title), h("p", { class: "small" }, why));
