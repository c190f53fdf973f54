"""C7: what section 7 of the LoRA paper says of the learned directions.

Claim: the top directions of r = 8 lie in those of r = 64; two seeds share a low-dimensional
subspace; ΔW amplifies directions that W0 has but does not emphasise. Another text: fine-tuning
reuses the features that the base emphasises.

Decided by: LoRA (α = 2r, best rates) at a small and a large r (8 and 64 on MiniLM; 4 and 16 on
digits, where 64 directions are all there are), means over layers and both sides. φ(small, large)
between runs of different seeds, from random (0) to contained (1). Between seeds at the large r:
overlap of the `small` leading directions, and replicated_rank over r. W0 in ΔW's 4 leading
directions (‖U₄ᵀ W0 V₄‖): over W0's own largest, and over that of random directions. Share of ΔW's
energy in W0's 8 leading directions above the random share.

Test: 95 % t intervals over seeds. Contained: above .5. Shared: overlap above random; few: shared
directions above 0 and below half of r. Not emphasised: below half of W0's own; amplified and no
artefact: above random. The other text: above the random share. Each is a part; a text that says
the opposite of another can make no more than mixed.

Power: overlaps vary by about .03 between pairs of seeds; 5 pairs place them to ± .04. Pairs share
runs, so that their intervals are somewhat too short; no bound lies near what was seen.

Cost: none of its own; the shared grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, SMOKE, lora
from experiments.parts import CURVE, GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import above, chosen, doubled, measured, others, overlap, spectra_of
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish
from lora_lab.linalg.subspace import overlap_grid
from lora_lab.measures.subspace_overlap import directions
from lora_lab.replication import replicated

PAIRS = {"minilm": (8, 64), "digits_vit": (4, 16), "planted": (1, 4)}
"""Small and large r by ground."""
SWEEP = {"smoke": SMOKE[1:], "paper": [lora(MINILM), lora(DIGITS)]}
WEIGHTS = True
K, BASE_K = 4, 8
PARTS = {
    "contained": Part("the small r's directions lie in the large r's to {}", low=0.5, main=True),
    "shared": Part("seeds overlap by {} above random", low=0.0, unit=0.05, main=True),
    "few": Part("seeds share {} of r directions", low=0.0, high=0.5, unit=0.05),
    "not emphasised": Part("W0 in ΔW's directions is {} of its own largest", high=0.5),
    "amplified": Part(
        "W0 in ΔW's directions is {} of that in random ones", low=1.0, unit=0.2, main=True
    ),
    "reuse": Part("ΔW's share in W0's leading directions is {} above random", low=0.0, unit=0.02),
}


def rows(found: Found) -> pd.DataFrame:
    """Each part for each seed, and the grid of φ between the small and the large r."""
    runs = doubled(chosen(found))
    out: list[dict[str, Any]] = []
    for model, own in runs.groupby("model"):
        small, large = PAIRS[str(model)]
        few, many = own[own["r"] == small], own[own["r"] == large]
        spectra = {i: spectra_of(found, i) for i in [*few["run_id"], *many["run_id"]]}
        seeds = replicated(found.store, [many["run_id"].tolist()] if len(many) > 1 else [])
        shared = seeds[seeds["measure"] == "replicated_rank"].groupby("run_id")["value"].mean()
        next_run = others(many)
        for run in few.to_dict("records"):
            about = {c: run[c] for c in ("model", "seed", "adapter", "r", "alpha", "edge")}
            about["run_id"] = run["run_id"]
            values = _against_base(found, own[own["run_id"] == run["run_id"]])
            other = next_run.get(int(run["seed"]))
            if other is not None:
                pair = spectra[run["run_id"]], spectra[other]
                contained = above(*overlap(*pair, small, large))
                about["run_id"] += f"+{other}"
                out += [about | {"part": "contained", "value": contained}]
                out += [about | row for row in _grid(*pair, small, large)]
            out += [about | {"part": name, "value": value} for name, value in values.items()]
        for run in many.to_dict("records"):
            about = {
                c: run[c] for c in ("run_id", "model", "seed", "adapter", "r", "alpha", "edge")
            }
            other, values = next_run.get(int(run["seed"])), {}
            if other is not None:
                phi, null = overlap(spectra[run["run_id"]], spectra[other], small, small)
                values = {"shared": phi - null, "few": shared.get(run["run_id"], np.nan) / large}
            out += [about | {"part": name, "value": value} for name, value in values.items()]
    return table_of(out)


def _against_base(found: Found, run: pd.DataFrame) -> dict[str, float]:
    """What W0 has in the update's directions, and what the update has in W0's."""
    of = measured(found, run, "amplification", "structural_alignment")
    k = min(K, int(run["r"].iloc[0]))
    own = of[(of["measure"] == "amplification") & (of["k"] == k)]
    by = own.pivot_table(index="layer", columns="side", values="value")
    by = by.reindex(columns=["update", "base", "random"])
    inside = of[(of["measure"] == "structural_alignment") & (of["k"] == BASE_K)]
    inside = inside[inside["side"].isin(["left", "right"])]
    # ‖ΔW‖ over what W0 has: of two such ratios it cancels.
    return {
        "not emphasised": float((by["base"] / by["update"]).mean()),
        "amplified": float((by["random"] / by["update"]).mean()),
        "reuse": float((inside["value"] - inside["null"]).mean()),
    }


def _grid(one: Any, other: Any, small: int, large: int) -> list[dict[str, Any]]:
    """φ(i, j) of the output side, mean over layers, for the figure."""
    grids = [
        overlap_grid(directions(s, "left")[:, :small], directions(other[n], "left")[:, :large])
        for n, s in one.items()
        if not (s.zero or other[n].zero)
    ]
    if not grids or len({g.shape for g in grids}) > 1:
        return []
    mean = np.mean(grids, axis=0)
    return [
        {"part": CURVE, "i": i + 1, "j": j + 1, "value": float(mean[i, j])}
        for i in range(mean.shape[0])
        for j in range(mean.shape[1])
    ]


def verdict(table: pd.DataFrame) -> Verdict:
    """Six parts on each ground."""
    return judged(table, PARTS, edge_note(table))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Directions as the paper has them, the opposite, or the paper's on one ground only."""
    table = invented(outcome, rng, PARTS)
    grid = [
        {"model": model, "part": CURVE, "seed": 0, "i": i, "j": j, "value": 1 / (i + j)}
        for model in ("minilm", "digits_vit")
        for i in range(1, 5)
        for j in range(1, 9)
    ]
    return pd.concat([table, pd.DataFrame(grid)], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """The grid of φ for each ground, and W0 in ΔW's directions."""
    models = [name for name in GROUNDS if name in set(table["model"])]
    picture, [axes] = canvas(4.5 * (len(models) + 1), 4, 1, len(models) + 1)
    for ax, model in zip(axes, models, strict=False):
        cells = table[(table["model"] == model) & (table["part"] == CURVE)]
        ax.set_title(f"φ(i, j) {GROUNDS[model]}", fontsize=10, loc="left")
        ax.set_xlabel("j: directions of the large r")
        ax.set_ylabel("i: directions of the small r")
        if len(cells):
            grid = cells.pivot_table(index="i", columns="j", values="value")
            extent = (0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5)
            ax.grid(visible=False)
            shown = ax.imshow(
                grid, aspect="auto", vmin=0, vmax=1, cmap="viridis", origin="lower", extent=extent
            )
            picture.colorbar(shown, ax=ax)
    last = axes[-1]
    names = ["not emphasised", "amplified"]
    for x, (model, name) in enumerate((m, n) for m in models for n in names):
        values = table.loc[(table["model"] == model) & (table["part"] == name), "value"].dropna()
        last.scatter([x] * len(values), values, s=16, color=("#d55e00", "#0072b2")[x % 2])
    last.axhline(1, color="grey", lw=1, ls="--")
    last.set_yscale("log")
    ticks = [f"{m.partition('_')[0]}\nover {w}" for m in models for w in ("W0's own", "random")]
    last.set_xticks(range(len(ticks)), ticks, fontsize=8)
    last.set_ylabel("W0 in ΔW's directions")
    note = "Left: runs of different seeds, output side, means over layers and seeds; bright rows: "
    note += "directions that the large r has too. Right: points are seeds; 1 is the same."
    return finish(picture, "Directions that two adapters share, and what W0 has in them", note)
