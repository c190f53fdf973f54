"""F7: training at a high r and truncating, against training at the low r.

Claim: training an adapter at a high r and truncating it to a low r beats training at the low r.

Decided by: LoRA trained at r = 64 (α = 2r) whose BA is cut to its leading 1 and 4 directions (its
own head, nothing retrained), against LoRA trained at that r; each at its best rate for what it is
at the end of training; on MiniLM, on digits, and on noisy planted problems of true rank 4, another
one a seed.

Test: truncated − trained, test score paired by seed, 95 % t interval: supported above 0, refuted
where it lies below .01 (no gain of a point). A part for each r and ground.

Power: at a spread of .01 between paired scores 5 seeds show a gain of .017 with a chance of .8, and
that there is none of a point where the truth is a loss of .007.

Cost: 30 runs of its own on planted, 2 seconds each; the rest from the shared grids; 10 scorings a
ground, a few seconds each on MiniLM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, PLANTED, SEEDS, SMOKE, lora
from experiments.parts import CURVE, GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import Rebuilt, chosen, doubled
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish
from lora_lab.linalg.randomized import leading
from lora_lab.stats import t_interval

HIGH, LOW = 64, (1, 4)
_PLANTED = (
    f"{PLANTED} data.true_r=4 data.noise=1 data.seed=${{seed}} train.epochs=4 adapter=lora "
    f"adapter.r=1,4,{HIGH} train.lr=3e-3,1e-2 {SEEDS}"
)
SWEEP = {
    "smoke": [SMOKE[1], SMOKE[1].replace("adapter.r=1,4", f"adapter.r={HIGH}")],
    "paper": [lora(MINILM), lora(DIGITS), _PLANTED],
}
WEIGHTS = True
PARTS = {
    f"r = {r}": Part(
        f"r = 64 truncated to r = {r} scores {{}} more than r = {r} trained",
        low=0.0,
        near=0.01,
        unit=0.01,
        main=True,
    )
    for r in LOW
}


def rows(found: Found) -> pd.DataFrame:
    """Scores trained at each r and truncated to it, and their differences."""
    runs = doubled(chosen(found))
    out: list[dict[str, Any]] = []
    for (model, seed), own in runs.groupby(["model", "seed"]):
        by = own.drop_duplicates("r").set_index("r")
        about = {"model": model, "seed": seed, "adapter": "lora"}
        for r, run in by.iterrows():
            edge = {"r": r, "alpha": run["alpha"], "edge": run["edge"], "run_id": run["run_id"]}
            out.append(about | edge | {"part": CURVE, "how": "trained", "value": run["score"]})
        if HIGH not in by.index:
            continue
        whole = str(by.at[HIGH, "run_id"])
        network, updates = Rebuilt(found, whole), found.updates(whole)
        spectra = {layer: leading(u, max(LOW), layer=layer) for layer, u in updates.items()}
        for r in LOW:
            cut = {
                layer: s.truncate(r) if not s.zero else updates[layer]
                for layer, s in spectra.items()
            }
            row = about | {"r": r, "run_id": whole}
            out.append(row | {"part": CURVE, "how": "truncated", "value": network.score(cut)})
            if r in by.index:
                gain = out[-1]["value"] - by.at[r, "score"]
                both = f"{whole}+{by.at[r, 'run_id']!s}"
                out.append(row | {"part": f"r = {r}", "value": gain, "run_id": both})
    return table_of(out)


def verdict(table: pd.DataFrame) -> Verdict:
    """Two ranks on each ground."""
    high = table[(table["part"] == CURVE) & (table["how"] == "trained") & (table["r"] == HIGH)]
    means = high.groupby("model")["value"].mean()
    whole = ", ".join(f"{value:.3f} {GROUNDS[str(model)]}" for model, value in means.items())
    notes = [f"untruncated, r = {HIGH} scores {whole}" if whole else "", edge_note(high)]
    return judged(table, PARTS, "; ".join(filter(None, notes)))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Truncation that wins, that loses, that wins on one ground only, or that may do either."""
    curve = [
        {"model": model, "part": CURVE, "seed": seed, "r": r, "how": how, "value": 0.7, "edge": 0}
        for model in ("minilm", "digits_vit")
        for seed in range(5)
        for how, ranks in (("trained", (*LOW, HIGH)), ("truncated", LOW))
        for r in ranks
    ]
    return pd.concat([invented(outcome, rng, PARTS), pd.DataFrame(curve)], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Score over the final r, trained and truncated."""
    curve = table[table["part"] == CURVE]
    models = [name for name in GROUNDS if name in set(curve["model"])]
    picture, axes = canvas(4 * max(len(models), 1), 4, 1, max(len(models), 1))
    colours = {"trained": "#0072b2", "truncated": "#d55e00"}
    for ax, model in zip(axes[0], models, strict=False):
        for how, own in curve[curve["model"] == model].groupby("how"):
            by = [(float(str(r)), t_interval(c["value"].dropna())) for r, c in own.groupby("r")]
            spread = np.nan_to_num([[f.value - f.low, f.high - f.value] for _, f in by]).T
            label = "trained at r" if how == "trained" else f"trained at {HIGH}, cut to r"
            colour = colours[str(how)]
            ax.errorbar(
                [r for r, _ in by], [f.value for _, f in by], spread, fmt="o-", color=colour,
                label=label,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xlabel("final r")
        ax.set_ylabel("test score")
        ax.set_title(GROUNDS[model], fontsize=10, loc="left")
        ax.legend(fontsize=8)
    note = "Bars: 95 % t intervals over seeds. The claim: orange above blue at the low r."
    return finish(picture, "Trained at the low r, or cut down to it", note)
