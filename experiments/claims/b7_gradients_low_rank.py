"""B7: whether gradients and updates are of low rank.

Claim: gradients and updates of full fine-tuning are themselves of low rank.

Decided by: the effective rank of every layer's gradient, of the running mean of it and of the
optimizer's step, at six steps over training, and of the final update, each over that of a Gaussian
matrix of the layer's shape; mean over steps and layers. Digits (all layers 64 wide at least) and
MiniLM. Beside them planted problems with a true rank of 4 of 128, where the first gradient is of
low rank by construction: what the measure says where the answer is known.

Test: 95 % t intervals over seeds of the share of the null. Low rank: the whole interval is below
one half; refuted: above. Four parts: gradient and update on two grounds; mean gradient and step are
reported. Batches have more tokens than a layer has rows or columns, so that they do not bound the
rank; in the last block of MiniLM, where the head reads the first token alone, they would, and it is
left out.

Power: the share varies by less than 0.02 between seeds; three seeds tell it from 0.5 unless it lies
within 0.05.

Cost: 10 runs of digits and planted, 3 of MiniLM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments import grids
from experiments.curves import inside, seeds_to_tell, spread
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish

WATCH = "train.spectra=6 train.gradient_spectra=true"
PLANTED = "model=planted data=planted train.batch_size=512 train.epochs=40 train.evaluations=1"
DIGITS = "model=digits_vit data=digits train.epochs=10 train.evaluations=1"
MINILM = grids.MINILM.replace("train.spectra=0", "").strip()
SWEEP = {
    "smoke": ["model=planted data=planted size=smoke adapter=full train.gradient_spectra=true"],
    "paper": [
        f"{DIGITS} {WATCH} adapter=full train.lr=2e-3 {grids.SEEDS}",
        f"{MINILM} {WATCH} adapter=full train.lr=1e-4 seed=0,1,2",
        f"{PLANTED} {WATCH} adapter=full train.lr=3e-3 data.seed=${{seed}} {grids.SEEDS}",
    ],
}
WHAT = {
    "gradient_effective_rank": "gradient",
    "mean_gradient_effective_rank": "mean gradient",
    "step_effective_rank": "optimizer's step",
    "update": "update",
}
DECIDE = ("gradient", "update")
REAL = ("digits_vit", "minilm")
HALF = 0.5


def rows(found: Any) -> pd.DataFrame:
    """Share of the null for each run, step and kind of matrix: the mean over layers."""
    measured = found.measures
    measured = measured[(measured["measure"] == "effective_rank") & (measured["layer"] != "")]
    last = measured["step"] == measured.groupby("run_id")["step"].transform("max")
    keys = ["run_id", "layer"]
    null = measured[last].drop_duplicates(keys)[[*keys, "depth", "null"]]
    traces = found.traces[found.traces["trace"].isin(list(WHAT))]
    update = measured[[*keys, "step", "value"]].assign(trace="update")
    every = pd.concat([traces[update.columns], update]).merge(null, on=keys)
    every["share"] = every["value"] / every["null"]
    about = ["model", "seed", "steps"]
    every = every.merge(found.runs[["run_id", *about]], on="run_id")
    end = every["depth"] == every.groupby("run_id")["depth"].transform("max")
    # A layer without any gradient has rank 0 and says nothing about a rank.
    bound = (every["model"] == "minilm") & end | (every["value"] == 0)
    every = every[~bound].assign(what=every["trace"].map(WHAT))
    cells = every.groupby(["run_id", *about, "what", "step"], as_index=False)
    return cells[["share", "value"]].mean()


def _by_seed(table: pd.DataFrame, ground: str, what: str) -> list[float]:
    """A share for each seed: of an update the last, of the others the mean over steps."""
    own = table[(table["model"] == ground) & (table["what"] == what)]
    if what == "update":
        own = own[own["step"] == own["steps"]]
    return list(own.groupby("seed")["share"].mean())


def verdict(table: pd.DataFrame) -> Verdict:
    """Gradient and update on each real ground."""
    grounds = [g for g in REAL if g in set(table["model"])] or sorted(table["model"].unique())
    parts, words, first = [], [], None
    for ground in grounds:
        shares = {what: spread(_by_seed(table, ground, what)) for what in WHAT.values()}
        first = first or shares["gradient"]
        parts += [(inside(shares[what], -np.inf, HALF), ground, what) for what in DECIDE]
        told = (f"{what} {one.value:.2f}" + (
            f" [{one.low:.2f}, {one.high:.2f}]" if what in DECIDE else ""
        ) for what, one in shares.items())  # fmt: skip
        words.append(f"on {ground} {', '.join(told)}")
    said = "Effective rank as a share of a random matrix's: " + "; ".join(words)
    known = spread(_by_seed(table, "planted", "gradient"))
    if "planted" not in grounds and np.isfinite(known.value):
        said += f" (where the truth is of rank 4 of 128, the gradient has {known.value:.2f})"
    outcome = together(part for part, _, _ in parts)
    if outcome == "unresolved":
        _, ground, what = next(part for part in parts if part[0] == "unresolved")
        said += f"; {what} on {ground}: {seeds_to_tell(_by_seed(table, ground, what), HALF)}"
    assert first is not None
    interval = (first.low, first.high)
    seeds = int(table.groupby("model")["seed"].nunique().min())
    return Verdict(outcome, said + ".", first.value, interval, n_seeds=seeds, effect=first.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Shares of one tenth, of nine tenths, of both, or between."""
    shares = {"supported": (0.1, 0.1), "refuted": (0.9, 0.9), "mixed": (0.1, 0.9)}
    gradient, update = shares.get(outcome, (0.5, 0.5))
    noise = 0.2 if outcome == "unresolved" else 0.01
    out = [
        {"model": ground, "what": what, "step": step, "steps": 9, "seed": seed}
        | {"share": (update if what == "update" else gradient) + noise * unit}
        for ground in REAL
        for what in WHAT.values()
        for seed, unit in enumerate(rng.permutation([-1.0, 0.0, 1.0]))
        for step in (1, 9)
    ]
    return pd.DataFrame(out).assign(value=3.0, run_id="")


def figure(table: pd.DataFrame) -> Any:
    """Shares over training, each seed a line."""
    grounds = sorted(table["model"].unique())
    picture, [axes] = canvas(4 * len(grounds), 4, 1, len(grounds), sharey=True)
    for ax, ground in zip(axes, grounds, strict=True):
        for place, what in enumerate(WHAT.values()):
            own = table[(table["model"] == ground) & (table["what"] == what)]
            for i, (_, one) in enumerate(own.groupby("seed")):
                one = one.sort_values("step")
                label = what if i == 0 else None
                ax.plot(one["step"], one["share"], marker=".", color=f"C{place}", label=label)
        ax.axhline(HALF, color="grey", lw=1)
        ax.set_xscale("log")
        ax.set_ylim(0)
        ax.set_xlabel("step")
        ax.set_title(ground, fontsize=10, loc="left")
    axes[0].set_ylabel("effective rank over a random one's")
    axes[0].legend(fontsize=8)
    note = (
        "Each line a seed, mean over layers. Below the grey line counts as low. Adam divides the "
        "gradient entry by entry: its step can be of high rank where the gradient is not."
    )
    return finish(picture, "Rank of gradients, steps and updates", note)
