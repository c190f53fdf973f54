"""C8: leading directions that the base weight does not have.

Claim: LoRA at low r has intruder dimensions; full fine-tuning hardly any.

Decided by: of the 10 leading singular vectors of W0 + ΔW those that are less than ε = .5 similar to
every one of W0 (mean over layers and both sides), of LoRA (α = 2r) at r = 1, 8 and 64 and of full
fine-tuning, each at its best rate, on MiniLM and on digits. The null is a random full-rank update
of the same norm. The curves over the number of vectors and over ε, and the counts by layer, show
whether that depends on the choice of 10 and .5.

Test: 95 % t intervals over seeds. LoRA − full above 0, at r = 1 and at r = 8; LoRA at r = 1 above
its own null; full below .5 of 10 vectors ("hardly any"). An excess of less than .05 vectors is
none. Sides are averaged; the curves show them apart.

Power: counts vary by about .1 between seeds, so that 5 seeds place them to ± .12 of 10 vectors.

Cost: none of its own; the shared grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, SMOKE, full, lora
from experiments.parts import CURVE, GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import chosen, doubled, measured
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish

R = (1, 8, 64)
LOW = (1, 8)
TOP, EPSILON = 10, 0.5
SWEEP = {
    "smoke": SMOKE,
    "paper": [line(ground) for ground in (MINILM, DIGITS) for line in (full, lora)],
}
PARTS = {
    f"r = {r}": Part(
        f"LoRA at r = {r} has {{}} intruders of {TOP} more than full",
        low=0.0,
        near=0.05,
        unit=0.2,
        main=True,
    )
    for r in LOW
} | {
    "noise": Part(
        "LoRA at r = 1 has {} more than noise of that norm", low=0.0, near=0.05, unit=0.2
    ),
    "full": Part("full has {} intruders", high=0.5, unit=0.1),
}
SHADES = {"full": "#d55e00", "r = 1": "#0072b2", "r = 8": "#009e73", "r = 64": "#cc79a7"}


def rows(found: Found) -> pd.DataFrame:
    """Counts and their nulls by method, their differences, and the curves."""
    runs = chosen(found)
    runs = pd.concat([runs[runs["adapter"] == "full"], doubled(runs[runs["r"].isin(R)])])
    ranks = [f"r = {r:g}" for r in runs["r"]]
    runs = runs.assign(method=np.where(runs["adapter"] == "full", "full", ranks))
    of = measured(found, runs, "intruder_dimensions", "intruder_dimensions_eps")
    of = of.merge(runs[["run_id", "method"]], on="run_id")
    keys = ["run_id", "model", "adapter", "r", "alpha", "seed", "edge", "method"]
    curve = of.groupby([*keys, "measure", "side", "k"], as_index=False, dropna=False)
    means = curve[["value", "null"]].mean().rename(columns={"measure": "kind"})
    at = of[(of["measure"] == "intruder_dimensions") & (of["k"] == TOP)]
    layers = at.groupby([*keys, "layer"], as_index=False, dropna=False)[["value", "null"]].mean()
    layers = layers.assign(kind="layer")
    return table_of(
        [
            *pd.concat([means, layers]).assign(part=CURVE).to_dict("records"),
            *_parts(at.groupby(keys, as_index=False, dropna=False)[["value", "null"]].mean()),
        ]
    )


def _parts(counts: pd.DataFrame) -> list[dict[str, Any]]:
    whole = counts[counts["method"] == "full"].set_index(["model", "seed"])
    out = []
    for run in counts.to_dict("records"):
        about = {c: run[c] for c in ("run_id", "model", "seed", "adapter", "r", "alpha", "edge")}
        key = (run["model"], run["seed"])
        if run["method"] == "full":
            out.append(about | {"part": "full", "value": run["value"]})
        elif key in whole.index and run["r"] in LOW:
            about["run_id"] += f"+{whole.at[key, 'run_id']!s}"
            gap = run["value"] - whole.at[key, "value"]
            out.append(about | {"part": run["method"], "value": gap})
        if run["method"] == "r = 1":
            out.append(about | {"part": "noise", "value": run["value"] - run["null"]})
    return out


def verdict(table: pd.DataFrame) -> Verdict:
    """Four parts on each ground."""
    high = table[(table["part"] == CURVE) & (table["kind"] == "layer")]
    means = high[high["method"] == f"r = {R[-1]}"].groupby("model")["value"].mean()
    words = [f"{value:.2g} {GROUNDS[str(model)]}" for model, value in means.items()]
    also = f"LoRA at r = {R[-1]} has {' and '.join(words)}" if words else ""
    return judged(table, PARTS, "; ".join(filter(None, [also, edge_note(table)])))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Intruders in LoRA alone, in full fine-tuning alone, on one ground only, or hardly any."""
    curve = [
        {"model": model, "part": CURVE, "seed": seed, "method": method, "kind": kind,
         "side": side, "k": k, "value": 0.1 * k, "null": 0.0, "layer": f"layer.{seed}"}
        for model in ("minilm", "digits_vit")
        for seed in range(5)
        for method in SHADES
        for side in ("left", "right")
        for kind, grid in (("intruder_dimensions", (1, 10)),
                           ("intruder_dimensions_eps", (0.3, 0.9)), ("layer", (np.nan,)))
        for k in grid
    ]  # fmt: skip
    return pd.concat([invented(outcome, rng, PARTS), pd.DataFrame(curve)], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Counts over the vectors examined, over ε, and by layer."""
    curve = table[table["part"] == CURVE]
    models = [name for name in GROUNDS if name in set(curve["model"])]
    picture, axes = canvas(12, 3.2 * max(len(models), 1) + 0.8, max(len(models), 1), 3)
    kinds = {
        "intruder_dimensions": f"leading vectors examined, ε = {EPSILON}",
        "intruder_dimensions_eps": f"ε, {TOP} leading vectors",
    }
    for line, model in zip(axes, models, strict=False):
        for method, own in curve[curve["model"] == model].groupby("method"):
            colour = SHADES.get(str(method), "#666666")
            for ax, kind in zip(line, kinds, strict=False):
                for side, style in (("left", "-"), ("right", "--")):
                    of = own[(own["kind"] == kind) & (own["side"] == side)]
                    mean = of.groupby("k")[["value", "null"]].mean()
                    label = str(method) if side == "left" else None
                    ax.plot(mean.index, mean["value"], style, color=colour, label=label, marker=".")
                    ax.plot(mean.index, mean["null"], ":", color=colour, lw=1)
                ax.set_xlabel(kinds[kind])
                ax.set_ylabel("intruders, mean over layers")
            layers = own[own["kind"] == "layer"].groupby("layer", sort=False)["value"].mean()
            line[2].plot(range(len(layers)), layers, ".", color=colour)
        line[2].set_xlabel("layer, in the model's order")
        line[2].set_ylabel(f"intruders of {TOP}, both sides")
        line[0].set_title(GROUNDS[model], fontsize=10, loc="left")
        line[0].legend(fontsize=8)
    note = "Solid: output side; dashed: input side; dotted: a random full-rank update of the same "
    note += "norm. Means over seeds."
    return finish(picture, "Leading directions that the base does not have", note)
