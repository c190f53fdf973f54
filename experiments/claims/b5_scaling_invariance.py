"""B5: how gradients and updates go with r under each scaling rule.

Claim: a scaling rule makes update size and gradient independent of r; texts say so of α/r and of
α = r, while another says that a higher r gives stronger gradients, and rsLoRA that α/r collapses
with r and α/√r is stable.

Decided by: the gradient norm of all factors and ‖dW‖ over all layers, at the first step and at the
end (‖∇‖: mean of ln over the last five traced steps), at one fixed learning rate, for α = 16,
α = r, α = 2r and α/√r, over r = 1 to 64 on the digits transformer; on MiniLM for α = 16 and α = 2r,
and for α/√r at r = 1, 8, 64. The quantity is the exponent: the slope of ln‖·‖ on ln r of each seed.

Test: one part for each rule, quantity, moment and ground: its exponent is 0, that is, the 99 % t
interval of the seeds' slopes lies within ±0.1 (a factor 1.5 from r = 1 to 64); refuted where it
lies wholly outside. The contradicting sentences are the signs of what is refuted: above 0.1 a
higher r gives more, below −0.1 it collapses.

Power: slopes of one seed spread by about 0.03, so that the interval of five has 0.06 to each side:
exponents of 0 and of ±0.5, which theory gives at the start, are told apart in all cases. At the end
the spread may be three times as large: an exponent near ±0.1 may stay undecided there.

Cost: 130 runs of a second on digits, 70 of them the shared grid's, and 80 on MiniLM, 70 shared.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import inside, slopes
from experiments.grids import DIGITS, MINILM, RANKS, SEEDS
from lora_lab.claims import Found, Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import t_interval, units_needed

RATE = {DIGITS: "3e-3", MINILM: "1e-3"}
ROOT = "adapter.alpha=16 adapter.scaling=rslora"
TINY = "model=planted data=planted size=smoke adapter=lora"


def _line(ground: str, ranks: str, more: str) -> str:
    return f"{ground} adapter=lora adapter.r={ranks} train.lr={RATE[ground]} {SEEDS} {more}".strip()


SWEEP = {
    "smoke": [f"{TINY} adapter.r=1,4", f"{TINY} adapter.r=1,2,4 adapter.alpha=16"],
    "paper": [
        _line(DIGITS, RANKS, ""),
        _line(DIGITS, RANKS, "adapter.alpha=16"),
        _line(DIGITS, RANKS, "adapter.alpha=${adapter.r}"),
        # At r = 1 every rule is the same run: that of α = 16 stands for α/√r too.
        _line(DIGITS, RANKS.removeprefix("1,"), ROOT),
        _line(MINILM, RANKS, ""),
        _line(MINILM, RANKS, "adapter.alpha=16"),
        _line(MINILM, "8,64", ROOT),
    ],
}
RULES = ("α = 16", "α = r", "α = 2r", "α/√r")
QUANTITIES = ("gradient_start", "gradient_end", "update_start", "update_end")
MARGIN, LEVEL = 0.1, 0.99


def rows(found: Found) -> pd.DataFrame:
    """One row a run and rule that it follows: norms over all layers at the start and the end."""
    traces = found.traces[found.traces["layer"] != ""]
    kinds = {"grad_norm_A": "gradient", "grad_norm_B": "gradient", "update_norm": "update"}
    traces = traces.assign(kind=traces["trace"].map(kinds), square=traces["value"] ** 2)
    over = traces.dropna(subset=["kind"]).groupby(["run_id", "kind", "step"])["square"].sum()
    logs = 0.5 * np.log(over[over > 0]).sort_index()
    runs = found.runs.set_index("run_id")
    out = []
    for (run_id, kind), own in logs.groupby(["run_id", "kind"]):
        ends = {"start": own.iloc[0], "end": own.iloc[-(5 if kind == "gradient" else 1) :].mean()}
        out += [{"run_id": run_id, "column": f"{kind}_{at}", "ln": v} for at, v in ends.items()]
    table = pd.DataFrame(out).pivot(index="run_id", columns="column", values="ln").reset_index()
    names = {"model": "ground", "adapter.r": "r", "adapter.alpha": "alpha"}
    names |= {"adapter.scaling": "scaling", "train.lr": "lr", "seed": "seed"}
    table = table.join(runs[list(names)].rename(columns=names), on="run_id")
    plain, root = table["scaling"] == "alpha_over_r", table["scaling"] == "rslora"
    fixed = plain & (table["alpha"] == 16)
    follows = {
        "α = 16": fixed,
        "α = r": plain & (table["alpha"] == table["r"]),
        "α = 2r": plain & (table["alpha"] == 2 * table["r"]),
        "α/√r": root | (fixed & (table["r"] == 1)),
    }
    return pd.concat([table[of].assign(rule=rule) for rule, of in follows.items()])


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Exponent of r with its interval and outcome for each ground, rule and quantity."""
    out = []
    for (ground, rule), own in table.groupby(["ground", "rule"]):
        for quantity in QUANTITIES:
            values = slopes(own.assign(x=np.log(own["r"])), "x", quantity)
            if len(values):
                mean, low, high = found = t_interval(values, LEVEL)
                row = {"ground": ground, "rule": rule, "quantity": quantity, "exponent": mean}
                row |= {"low": low, "high": high, "sd": values.std(), "seeds": len(values)}
                out.append(row | {"outcome": inside(found, -MARGIN, MARGIN)})
    return pd.DataFrame(out)


def verdict(table: pd.DataFrame) -> Verdict:
    """Which rule makes what independent of r, and when."""
    found = exponents(table)
    if found.empty or found["seeds"].max() < 2:
        said = "Exponents need three values of r and two seeds for each rule."
        return Verdict("unresolved", said, n_seeds=int(table["seed"].nunique()))
    outcome = together(found["outcome"])
    main = found[found["ground"] == found["ground"].min()]
    words = []
    for quantity, name in (("gradient_start", "the first gradient"), ("update_end", "‖dW‖")):
        own = main[main["quantity"] == quantity]
        powers = [
            f"r^{exponent:.2f} ({rule})"
            for rule, exponent in own[["rule", "exponent"]].itertuples(index=False)
        ]
        words.append(f"{name} goes as {', '.join(powers)}")
    free = found[found["outcome"] == "supported"]
    said = (
        f"Independent of r (exponent within ±{MARGIN:g}) in {len(free)} of {len(found)} cases, "
        f"growing in {int((found['low'] > MARGIN).sum())}, falling in "
        f"{int((found['high'] < -MARGIN).sum())}; on {main['ground'].iloc[0]} {' and '.join(words)}"
        + (f"; to decide the rest takes {_needed(found)}." if outcome == "unresolved" else ".")
    )
    worst = found.iloc[int(found["exponent"].abs().to_numpy().argmax())]
    effect, ends = float(worst["exponent"]), (float(worst["low"]), float(worst["high"]))
    return Verdict(outcome, said, effect, ends, n_seeds=int(found["seeds"].max()), effect=effect)


def _needed(found: pd.DataFrame) -> str:
    """Seeds that would tell the widest undecided exponent from the margin."""
    open_ = found[found["outcome"] == "unresolved"]
    row = open_.iloc[int(open_["sd"].to_numpy().argmax())]
    try:
        gap = max(abs(abs(row["exponent"]) - MARGIN), MARGIN / 4)
        return f"about {units_needed(gap, max(row['sd'], 1e-9), level=1 - LEVEL)} seeds"
    except WrongInput:
        return "more seeds than can be run"


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Norms that go with powers of r: all with none, all with some, some with some."""
    cells = itertools.product(RULES, (1, 4, 16, 64), range(5))
    table = pd.DataFrame(cells, columns=["rule", "r", "seed"]).assign(ground="digits_vit", lr=3e-3)
    spread = 0.3 * (table["seed"] - 2) if outcome == "unresolved" else 0.0
    for quantity in QUANTITIES:
        moves = outcome == "refuted" or (outcome == "mixed" and quantity.startswith("update"))
        exponent = (0.5 if moves else 0.0) + spread
        noise = 0.01 * rng.standard_normal(len(table))
        table[quantity] = exponent * np.log(table["r"]) + noise
    return table


def figure(table: pd.DataFrame) -> Any:
    """Norms over r, one panel for each quantity and ground."""
    grounds = list(table["ground"].unique())
    picture, axes = canvas(13, 3.4 * len(grounds), len(grounds), 4, sharex=True)
    names = {
        "gradient_start": "‖∇‖ at the first step",
        "gradient_end": "‖∇‖ at the end",
        "update_start": "‖dW‖ after the first step",
        "update_end": "‖dW‖ at the end",
    }
    for line, ground in zip(axes, grounds, strict=True):
        for ax, quantity in zip(line, QUANTITIES, strict=True):
            for i, rule in enumerate(RULES):
                own = table[(table["ground"] == ground) & (table["rule"] == rule)]
                over = np.exp(own.dropna(subset=[quantity]).groupby("r")[quantity].mean())
                low, high = (
                    np.exp(own.groupby("r")[quantity].agg(kind)) for kind in ("min", "max")
                )
                ax.plot(over.index, over, marker="o", ms=4, color=f"C{i}", label=rule)
                ax.fill_between(low.index, low, high, color=f"C{i}", alpha=0.15, lw=0)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_title(f"{names[quantity]}, {ground}", fontsize=9, loc="left")
            ax.set_xlabel("r")
    axes[0][0].set_ylabel("norm over all layers")
    axes[0][0].legend(fontsize=8)
    note = "Level lines: independent of r. One learning rate for all; bands: all seeds."
    return finish(picture, "Gradient and update over r under four scaling rules", note)
