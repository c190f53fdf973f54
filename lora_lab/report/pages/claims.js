// Claims: the ledger, with the figure that decides each.

const OUTCOMES = ["supported", "refuted", "mixed", "unresolved"];

async function claimsPage() {
  let found;
  try { ({ claims: found } = await part("claims")); } catch (error) { found = []; }
  if (!found.length) return [h("h1", {}, "Claims"), h("p", {}, "No claim is decided in this results folder; `lora-lab claims` decides them.")];
  const wanted = chosen("verdict", "all");
  const words = chosen("q", "").toLowerCase();
  const left = found.filter((one) => (wanted === "all" || one.outcome === wanted) && JSON.stringify([one.id, one.claim, one.said]).toLowerCase().includes(words));
  const search = h("input", { type: "search", id: "search", value: chosen("q", ""), "aria-label": "search claims" });
  search.addEventListener("input", debounce(() => set({ q: search.value }), 150));
  const counts = OUTCOMES.map((name) => `${found.filter(({ outcome }) => outcome === name).length} ${name}`).join(", ");
  return [h("h1", {}, "Claims"), h("p", { class: "lead" }, `${found.length} claims: ${counts}.`),
    h("section", { class: "filters" }, select("verdict", "verdict", [["all"], ...OUTCOMES.map((name) => [name])], "all"), h("label", { class: "field" }, h("span", {}, "search"), search)),
    ...left.map((one) => h("article", { class: "claim", id: one.id },
      h("h2", {}, `${one.id} `, h("span", { class: `verdict ${one.outcome}` }, one.outcome)),
      one.claim ? h("blockquote", {}, one.claim) : null, h("p", {}, one.said),
      h("p", { class: "small" }, [one.effect === null ? null : `effect ${show(one.effect, 3)}`, one.interval?.[0] === null ? null : `95 % [${show(one.interval[0], 3)}, ${show(one.interval[1], 3)}]`,
        one.p === null ? null : `p ${show(one.p, 2)}`, one.n_seeds ? `${one.n_seeds} seeds` : null].filter(Boolean).join(" · "), " ", h("code", {}, one.command)),
      one.picture ? h("div", { class: "picture" }, h("img", { src: one.picture.startsWith("data:") ? one.picture : `/data/${one.picture}.png`, alt: `Figure of claim ${one.id}: ${one.said}`, loading: "lazy" })) : null))];
}
