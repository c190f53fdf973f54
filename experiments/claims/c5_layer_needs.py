"""C5: what attention and the MLP need.

Claim: attention needs a lower rank than the MLP; layer types differ.

Decided by: full fine-tunings at the best rate, on MiniLM and on digits. Energy: the share of
directions that 90 % of the energy takes, MLP less attention, and the highest over the lowest mean
of a layer type. Function: W0 + ΔW with one group cut to k = 1, 2 and 4 directions and the other
whole: score with attention cut less score with the MLP cut, mean over k. (A group that matters less
loses less when it is cut; scores with a group cut to nothing are in the table.) Smallest k that is
within .02 of the whole, by group, stands beside the claim.

Test: 95 % t intervals over seeds. Energy: MLP − attention above 0. Function: the difference of
scores above 0, where less than .005 is none. Types: the ratio above 1.1, so that a mere order of
equal numbers is no difference.

Power: shares of energy vary by .01 between seeds; at a spread of .01 of the difference of scores 5
seeds show one of .017 with a chance of .8.

Cost: no runs of its own; 8 scorings a run, 3 seconds each on MiniLM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, SMOKE, full
from experiments.parts import CURVE, GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import Rebuilt, chosen, measured, widths
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Factored, Update, decompose
from lora_lab.stats import t_interval
from lora_lab.targets import role

SWEEP = {"smoke": SMOKE[:1], "paper": [full(MINILM), full(DIGITS)]}
WEIGHTS = True
CUTS, COMPARED, MARGIN = (0, 1, 2, 4), (1, 2, 4), 0.02
PARTS = {
    "energy": Part(
        "90 % of the energy takes {} more of the directions in the MLP",
        low=0.0,
        unit=0.02,
        main=True,
    ),
    "function": Part(
        "cutting attention costs {} less than cutting the MLP",
        low=0.0,
        near=0.005,
        unit=0.01,
        main=True,
    ),
    "types": Part("the highest layer type takes {} times the lowest", low=1.1, unit=0.1),
}
COLOURS = {"attention": "#0072b2", "mlp": "#d55e00"}


def group_of(layer: str) -> str:
    """`mlp`, or `attention` for every other layer of a block."""
    return "mlp" if role(layer) == "mlp" else "attention"


def type_of(layer: str) -> str:
    """A layer's name inside its block.

    >>> type_of("encoder.layer.0.attention.output.dense"), type_of("up")
    ('attention.output.dense', 'up')
    """
    parts = layer.split(".")
    block = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[block + 1 :])


def rows(found: Found) -> pd.DataFrame:
    """Energy by layer type, and scores with one group cut."""
    runs = chosen(found)
    ranks = measured(found, runs, "energy_rank")
    ranks = ranks[np.isclose(ranks["k"], 0.9)]
    ranks = ranks.merge(widths(found), left_on=["run_id", "layer"], right_index=True)
    ranks["share"] = ranks["value"] / ranks["q"]
    ranks["group"] = ranks["layer"].map(group_of)
    ranks["type"] = ranks["layer"].map(type_of)
    out: list[dict[str, Any]] = []
    for run in runs.to_dict("records"):
        about = {c: run[c] for c in ("run_id", "model", "seed", "adapter", "edge")}
        own = ranks[ranks["run_id"] == run["run_id"]]
        groups, types = own.groupby("group")["share"].mean(), own.groupby("type")["share"].mean()
        cuts = _cuts(found, run["run_id"])
        lost = [cuts["attention", k] - cuts["mlp", k] for k in COMPARED]
        values = {
            "energy": groups.get("mlp", np.nan) - groups.get("attention", np.nan),
            "function": float(np.mean(lost)),
            "types": types.max() / types.min(),
        }
        out += [about | {"part": name, "value": value} for name, value in values.items()]
        out += [about | {"part": "share", "group": n, "value": v} for n, v in types.items()]
        whole = {"whole": run["score"]}
        out += [
            about | {"part": CURVE, "group": g, "k": k, "value": v} | whole
            for (g, k), v in cuts.items()
        ]
    return table_of(out)


def _cuts(found: Found, run_id: str) -> dict[tuple[str, int], float]:
    """Test score with one group cut to k directions and the other whole."""
    updates, network = found.updates(run_id), Rebuilt(found, run_id)
    spectra = {n: decompose(u, vectors=max(CUTS), layer=n) for n, u in updates.items()}

    def cut(layer: str, k: int) -> Update:
        if k:
            return spectra[layer].truncate(k)
        m, n = updates[layer].shape
        return Factored(np.zeros((m, 1)), np.zeros((1, n)))

    return {
        (group, k): network.score(
            {n: cut(n, k) if group_of(n) == group else u for n, u in updates.items()}
        )
        for group in COLOURS
        for k in CUTS
    }


def verdict(table: pd.DataFrame) -> Verdict:
    """Three parts on each ground, and what each group needs."""
    notes = [edge_note(table)]
    cuts = table[table["part"] == CURVE]
    for model in (name for name in GROUNDS if name in set(cuts["model"])):
        needs = []
        for group, own in cuts[cuts["model"] == model].groupby("group"):
            lost = (own["whole"] - own["value"]).groupby(own["k"]).mean()
            enough = lost.index[lost <= MARGIN]
            needs.append(f"{group} {f'{enough.min():g}' if len(enough) else f'over {max(CUTS)}'}")
        notes.append(
            f"directions within {MARGIN} of the whole {GROUNDS[model]}: {', '.join(needs)}"
        )
    return judged(table, PARTS, "; ".join(filter(None, notes)))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Groups that differ as claimed, the other way round, as claimed on one ground, or hardly."""
    table = invented(outcome, rng, PARTS)
    extra = [
        {"model": model, "seed": seed, "part": part, "group": group, "k": k, "value": 0.7 + k / 100,
         "whole": 0.75}
        for model in ("minilm", "digits_vit")
        for seed in range(5)
        for part, groups in ((CURVE, COLOURS), ("share", ("attention.query", "up_proj")))
        for group in groups
        for k in CUTS
    ]  # fmt: skip
    return pd.concat([table, pd.DataFrame(extra)], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Energy by layer type, and the score with one group cut."""
    models = [name for name in GROUNDS if name in set(table["model"])]
    picture, axes = canvas(5 * max(len(models), 1), 7, 2, max(len(models), 1))
    for column, model in enumerate(models):
        own = table[table["model"] == model]
        upper, lower = axes[:, column]
        types = own[own["part"] == "share"]
        for x, (name, cell) in enumerate(types.groupby("group")):
            upper.scatter([x] * len(cell), cell["value"], s=14, color=COLOURS[group_of(str(name))])
        upper.set_xticks(range(types["group"].nunique()))
        upper.set_xticklabels(sorted(types["group"].unique()), rotation=20, ha="right", fontsize=7)
        upper.set_ylim(0, 1)
        upper.set_title(GROUNDS[model], fontsize=10, loc="left")
        cuts = own[own["part"] == CURVE]
        for group, cell in cuts.groupby("group"):
            by = [(float(str(k)), t_interval(c["value"])) for k, c in cell.groupby("k")]
            spread = np.nan_to_num([[f.value - f.low, f.high - f.value] for _, f in by]).T
            at, y = [k for k, _ in by], [f.value for _, f in by]
            lower.errorbar(at, y, spread, fmt="o-", color=COLOURS[str(group)], label=f"{group} cut")
        lower.axhline(cuts["whole"].mean(), color="grey", lw=1, ls="--", label="nothing cut")
        lower.set_xlabel("directions left of the group that is cut")
        lower.legend(fontsize=8)
    axes[0][0].set_ylabel("energy_rank(.9) / q")
    axes[1][0].set_ylabel("test score")
    note = (
        "Above: points are seeds; blue: attention, orange: MLP. Below: bars are 95 % t intervals "
    )
    note += "over seeds; at 0 the group has no update at all."
    return finish(picture, "What attention and the MLP need", note)
