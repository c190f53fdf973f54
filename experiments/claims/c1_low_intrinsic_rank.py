"""C1: whether the update of full fine-tuning is of low rank, asked in three ways.

Claim: the ΔW of full fine-tuning is of low intrinsic rank: its singular values decay fast, and a
few directions hold most.

Decided by: full fine-tunings at the best rate, on MiniLM and on digits. Energy: the share of
directions that 90 % of the energy takes, and the effective rank over that of a Gaussian matrix of
the same shape. Function: what W0 + ΔW_k loses against W0 + ΔW, every layer cut to at most a tenth
of its directions, with the trained head and with the head refitted. Replication: the share of
directions that seeds share beyond random ones (replicated_rank). Problems whose update has rank 8
show what the three say where the truth is known; they decide nothing.

Test: intervals over seeds, means over layers. "A few" is a tenth of the directions. Energy: the
share is below .1; the ratio of effective ranks below .5. Function: the loss is below .02 (one side
of an equivalence test, 90 %). Replication: above 0 and below .1. Each is one part; all parts on one
side decide, parts that disagree make it mixed.

Power: spectra vary by 1 to 2 % between seeds, far less than the distance to a bound; a loss of 0
is shown to be below .02 with a chance of .9 where paired scores scatter by .012.

Cost: 5 runs of its own on planted, 2 seconds each; the rest from the shared grids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, PLANTED, SEEDS, SMOKE, full
from experiments.parts import CURVE, GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import chosen, measured, widths
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish
from lora_lab.replication import replicated

TRUE = 8
SWEEP = {
    "smoke": SMOKE[:1],
    "paper": [
        full(MINILM),
        full(DIGITS),
        f"{PLANTED} data.true_r={TRUE} data.noise=0.5 train.epochs=8 adapter=full train.lr=3e-3 "
        + SEEDS,
    ],
}
WEIGHTS = True
FEW, MARGIN = 0.1, 0.02
PARTS = {
    "energy": Part("90 % of the energy takes {} of all directions", high=FEW, unit=0.02, main=True),
    "decay": Part("the effective rank is {} of a Gaussian matrix's", high=0.5, unit=0.1),
    "trained_head": Part(
        "cut to a tenth of the directions the update loses {} of the score",
        high=MARGIN,
        level=0.9,
        unit=0.01,
        main=True,
    ),
    "refitted_head": Part(
        "cut to a tenth, with the head refitted, it loses {}", high=MARGIN, level=0.9, unit=0.01
    ),
    "replicated": Part("seeds share {} of all directions", low=0.0, high=FEW, unit=0.02, main=True),
}


def rows(found: Found) -> pd.DataFrame:
    """The three answers for each run, and the curves of score over energy."""
    runs = chosen(found)
    ranks = measured(found, runs, "energy_rank", "effective_rank").merge(
        widths(found), left_on=["run_id", "layer"], right_index=True
    )
    scores = found.measures[found.measures["measure"].str.startswith("oracle")]
    out: list[dict[str, Any]] = []
    for _, own in runs.groupby("model"):
        seeds = replicated(found.store, [own["run_id"].tolist()] if len(own) > 1 else [])
        for run in own.to_dict("records"):
            about = {c: run[c] for c in ("run_id", "model", "seed", "adapter", "edge")}
            about["true_r"] = run.get("data.true_r", np.nan)
            of = ranks[ranks["run_id"] == run["run_id"]]
            at = of[(of["measure"] == "energy_rank") & np.isclose(of["k"], 0.9)]
            wide = of[of["measure"] == "effective_rank"]
            shared = seeds[(seeds["run_id"] == run["run_id"])]
            shared = shared[shared["measure"] == "replicated_rank"].merge(
                wide[["layer", "q"]], on="layer"
            )
            values = {
                "energy": (at["value"] / at["q"]).mean(),
                "decay": (wide["value"] / wide["null"]).mean(),
                "replicated": (shared["value"] / shared["q"]).mean(),
            }
            counts = {"energy": at["value"].mean(), "replicated": shared["value"].mean()}
            curve = scores[scores["run_id"] == run["run_id"]]
            values |= dict(_losses(curve))
            out += [
                about | {"part": name, "value": value, "count": counts.get(name, np.nan)}
                for name, value in values.items()
            ]
            out += [about | row for row in _curve(curve)]
    return table_of(out)


def _losses(curve: pd.DataFrame) -> Iterator[tuple[str, float]]:
    """What the truncation to at most a tenth of the directions loses, by head."""
    score = curve[curve["measure"] == "oracle_score"]
    for head, own in score.groupby("side"):
        by = own.set_index("k")["value"]
        q = by.index.max()
        k = by.index[by.index <= FEW * q].max()
        yield str(head), float(by[q] - by[k])


def _curve(curve: pd.DataFrame) -> list[dict[str, Any]]:
    energy = curve[curve["measure"] == "oracle_energy"].set_index("k")["value"]
    score = curve[curve["measure"] == "oracle_score"]
    return [
        {"part": CURVE, "k": k, "head": head, "value": value, "energy": energy[k]}
        for k, head, value in zip(score["k"], score["side"], score["value"], strict=True)
    ]


def verdict(table: pd.DataFrame) -> Verdict:
    """Three answers on two grounds, and what they say where the rank is known."""
    known = table[table["model"] == "planted"]
    notes = [edge_note(table)]
    if len(known):
        mean = known.groupby("part")["count"].mean()
        notes.append(
            f"where the true rank is {known['true_r'].iloc[0]:g}, 90 % of the energy takes "
            f"{mean['energy']:.0f} directions and {_enough(known):g} keep the score; seeds share "
            f"{mean['replicated']:.0f} there, as they also share their examples and the noise in "
            "them"
        )
    return judged(table[table["model"] != "planted"], PARTS, "; ".join(filter(None, notes)))


def _enough(own: pd.DataFrame) -> float:
    """The smallest k that was tried whose mean score is within the margin of the whole's."""
    by = own[(own["part"] == CURVE) & (own["head"] == "trained_head")].groupby("k")["value"].mean()
    return float(by.index[by >= by.iloc[-1] - MARGIN].min()) if len(by) else np.nan


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Answers that agree, that agree on the opposite, that disagree, or that lie at their bound."""
    table = invented(outcome, rng, PARTS)
    curve = [
        {"model": model, "part": CURVE, "seed": seed, "head": head, "k": k, "energy": k / 64,
         "value": 0.8 - 0.2 / (1 + k)}
        for model in ("minilm", "digits_vit")
        for seed in range(5)
        for head in ("trained_head", "refitted_head")
        for k in (0, 1, 4, 16, 64)
    ]  # fmt: skip
    return pd.concat([table, pd.DataFrame(curve)], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Score kept against k, above energy kept against k."""
    curve = table[table["part"] == CURVE]
    models = [name for name in GROUNDS if name in set(curve["model"])]
    picture, axes = canvas(4 * max(len(models), 1), 6, 2, max(len(models), 1), sharex="col")
    colours = {"trained_head": "#d55e00", "refitted_head": "#7b3294"}
    for column, model in enumerate(models):
        upper, lower = axes[:, column]
        for head, own in curve[curve["model"] == model].groupby("head"):
            for _, seed in own.groupby("seed"):
                upper.plot(
                    seed["k"] + 1, seed["value"], color=colours[str(head)], lw=0.7, alpha=0.4
                )
                lower.plot(seed["k"] + 1, seed["energy"], color="#0072b2", lw=0.7, alpha=0.4)
            mean = own.groupby("k")[["value", "energy"]].mean()
            label = str(head).replace("_", " ")
            upper.plot(mean.index + 1, mean["value"], "o-", color=colours[str(head)], label=label)
            lower.plot(mean.index + 1, mean["energy"], "o-", color="#0072b2")
        cut = FEW * curve.loc[curve["model"] == model, "k"].max()
        for ax in (upper, lower):
            ax.axvline(cut + 1, color="grey", lw=1, ls="--")
            ax.set_xscale("log", base=2)
        upper.set_title(GROUNDS[model], fontsize=10, loc="left")
        lower.set_xlabel("directions kept + 1")
        upper.legend(fontsize=8)
    axes[0][0].set_ylabel("test score of W0 + ΔW_k")
    axes[1][0].set_ylabel("share of ‖ΔW‖² in ΔW_k")
    note = "Dashed: a tenth of the directions. Thin lines: seeds. Where the two rows part, the "
    note += "function needs fewer directions than the energy."
    return finish(picture, "Directions that the function needs, and that the energy needs", note)
