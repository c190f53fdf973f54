"""B9: whether α is a learning rate.

Claim: α is a learning-rate factor; setting α = r and absorbing it into the learning rate is the
same.

Decided by: two questions. Path: the lab's layer in float64 with s = 3 against s = 1, under plain
gradient descent and AdamW, with the rate multiplied by 3^p for p from 0 to 3 in steps of 1/4: the
smallest relative difference of dW after 100 steps. Beside it the pairs that are equal by algebra:
A's start times √s with the rate s·η (AdamW: √s·η), and B alone at the rate s²·η (AdamW: s·η).
Result: scores of α = 16 against α = 2r, each at the best of its rates by validation score, on the
digits transformer and MiniLM: r = 1, 2, 4 (where α = 16 has up to 8 times the s) and r = 16, 32, 64
(up to 8 times less).

Test: a part for each optimizer: the same path where some p gives dW to 1 % of its norm in every
draw, refuted where it does not. A part for each ground and half of r: scores, the mean over r
paired by seed, are the same within 2 points by two one-sided t tests at 5 %; refuted where the 95 %
interval of the difference lies wholly outside.

Power: the paths are free of chance but for the draw. A mean over three r has a paired spread of
about 0.01 (299 and 2,000 test examples): five seeds find equal methods equivalent in over 9 of 10
cases.

Cost: no runs of its own: 280 of the shared grid's on digits and 210 on MiniLM.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from experiments.grids import CELL, DIGITS, MINILM, best, lora
from lora_lab.adapters import Place
from lora_lab.adapters.lora import LoRA, LoRALayer
from lora_lab.claims import Found, Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import Comparison, equivalence, paired, units_needed

TINY = "model=planted data=planted size=smoke adapter=lora"
SWEEP = {
    "smoke": [f"{TINY} adapter.r=1,4", f"{TINY} adapter.r=1,4 adapter.alpha=16"],
    "paper": [
        line
        for ground in (DIGITS, MINILM)
        for line in (lora(ground), lora(ground, more="adapter.alpha=16"))
    ],
}
HALVES = {"r = 1 to 4": (1, 2, 4), "r = 16 to 64": (16, 32, 64)}
POWERS = np.arange(0, 3.25, 0.25)
OPTIMIZERS = {"SGD": 0.003, "AdamW": 0.001}
S, STEPS, NEAR, MARGIN = 3.0, 100, 0.01, 0.02


def rows(found: Found) -> pd.DataFrame:
    """One row a pair of paths, and one a run of the rules α = 16 and α = 2r."""
    runs = found.runs
    chosen = best(runs, CELL)
    table = pd.DataFrame(
        {
            "run_id": runs["run_id"],
            "kind": "run",
            "ground": runs["model"],
            "r": runs["adapter.r"],
            "alpha": runs["adapter.alpha"],
            "lr": runs["train.lr"],
            "seed": runs["seed"],
            "score": runs["score"],
            "chosen": runs["run_id"].isin(chosen["run_id"]).astype(int),
            "edge": runs["run_id"].isin(chosen.loc[chosen["edge"], "run_id"]).astype(int),
        }
    )
    seeds = sorted(int(seed) for seed in runs["seed"].unique())
    paths = [row for seed in seeds for name in OPTIMIZERS for row in _paths(name, seed)]
    return pd.concat([pd.DataFrame(paths).assign(kind="path", run_id=""), table])


# ---- paths ---------------------------------------------------------------------------------------


def _paths(optimizer: str, seed: int) -> list[dict[str, Any]]:
    """How far dW ends from that of s = S, for rates and starts that may make up for it."""
    rate = OPTIMIZERS[optimizer]
    goal = _trained(optimizer, seed, S, (rate, rate))
    inner, outer = (1.0, 2.0) if optimizer == "SGD" else (0.5, 1.0)
    tries = [(f"η·s^{p:g}", p, (p, p), 1.0) for p in POWERS]
    tries += [("start·√s", np.nan, (inner, inner), S**0.5), ("rate of B", np.nan, (0, outer), 1.0)]
    out = []
    for name, power, (a, b), start in tries:
        dW = _trained(optimizer, seed, 1.0, (rate * S**a, rate * S**b), start)
        row = {"optimizer": optimizer, "pair": name, "power": power, "seed": seed}
        out.append(row | {"difference": float((dW - goal).norm() / goal.norm())})
    return out


def _trained(
    optimizer: str, seed: int, s: float, rates: tuple[float, float], start: float = 1.0
) -> torch.Tensor:
    """dW after training with the scale s, a rate for each factor, and A's start times a number."""
    generator = torch.Generator().manual_seed(seed)
    d, k, r = 10, 12, 4

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    frozen = nn.Linear(k, d, bias=False).double().requires_grad_(False)
    frozen.weight.data = normal(d, k) / k**0.5
    x, y, head, A = normal(64, k), normal(64, 3), normal(d, 3), normal(r, k) / k**0.5
    place, config = Place("layer", frozen, generator), LoRA(r=r, alpha=s * r)
    layer = LoRALayer(place, start * A, torch.zeros(d, r, dtype=torch.float64), config)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(layer.factors, rates, strict=True)]
    if optimizer == "SGD":
        steps: torch.optim.Optimizer = torch.optim.SGD(groups, rates[0])
    else:  # Adam's own epsilon would be the only difference
        steps = torch.optim.AdamW(groups, rates[0], eps=1e-30, weight_decay=0.0)
    for _ in range(STEPS):
        steps.zero_grad()
        (torch.tanh(layer(x)) @ head - y).square().mean().backward()
        steps.step()
    B_A: torch.Tensor = layer.B.detach() @ layer.A.detach()
    return s * B_A


# ---- verdict -------------------------------------------------------------------------------------


def _differences(runs: pd.DataFrame, ground: str, ranks: tuple[int, ...]) -> pd.Series:
    """Score of α = 16 minus that of α = 2r at their best rates: the mean over r, by seed."""
    own = runs[(runs["ground"] == ground) & runs["r"].isin(ranks) & (runs["chosen"] == 1)]
    own = own.dropna(subset=["score"])
    rule = np.where(own["alpha"] == 16, "16", "2r")
    wide = own.assign(rule=rule).pivot_table(index=["seed", "r"], columns="rule", values="score")
    wide = wide.reindex(columns=["16", "2r"]).dropna()
    return (wide["16"] - wide["2r"]).groupby("seed").mean()


def _compared(runs: pd.DataFrame) -> list[tuple[str, str, Comparison, float, str]]:
    """Ground, half, comparison, p of equivalence and outcome."""
    out = []
    for ground, (half, ranks) in itertools.product(sorted(runs["ground"].unique()), HALVES.items()):
        differences = _differences(runs, ground, ranks)
        if len(differences) < 2:
            continue
        found, p = paired(differences), equivalence(differences, 0.0, MARGIN)
        outside = found.low > MARGIN or found.high < -MARGIN
        outcome = "supported" if p < 0.05 else "refuted" if outside else "unresolved"
        out.append((ground, half, found, p, outcome))
    return out


def verdict(table: pd.DataFrame) -> Verdict:
    """Paths under both optimizers, and scores at the best rates."""
    paths, runs = table[table["kind"] == "path"], table[table["kind"] == "run"]
    absorbed = paths.dropna(subset=["power"]).groupby(["optimizer", "seed"])["difference"].min()
    worst = absorbed.groupby("optimizer").max()
    others = paths[paths["power"].isna()].groupby("pair")["difference"].max()
    words = {"start·√s": "A's start times √s with its rate", "rate of B": "a rate of its own for B"}
    parts = ["supported" if value < NEAR else "refuted" for value in worst]
    compared = _compared(runs)
    parts += [outcome for *_, outcome in compared] or ["unresolved"]
    outcome = together(parts)
    scores = ", ".join(
        f"{100 * found.mean:+.1f} points [{100 * found.low:.1f}, {100 * found.high:.1f}] on "
        f"{ground} at {half}"
        for ground, half, found, _, _ in compared
    )
    best_rates = runs[runs["chosen"] == 1].groupby(["ground", "r", "alpha"])["lr"].first()
    said = (
        f"No change of the rate alone gives the path of s = {S:g} at s = 1: the nearest ends "
        if (worst > NEAR).all()
        else f"The path of s = {S:g} at s = 1 with the best change of the rate ends "
    )
    said += (
        " and ".join(f"{value:.2g} ({name})" for name, value in worst.items())
        + " of ‖dW‖ away, while "
        + " and ".join(
            f"{words[str(name)]} gives it to {value:.0g}" for name, value in others.items()
        )
        + (f"; at the best of the rates α = 16 scores against α = 2r {scores}" if scores else "")
        + f" ({sum(o == 'supported' for *_, o in compared)} of {len(compared)} equivalent within "
        f"{100 * MARGIN:g} points, {_shift(best_rates)}"
        + (", some best rates at the edge of those tried" if runs["edge"].any() else "")
        + ")"
        + (f"; to decide takes {_needed(compared)}." if outcome == "unresolved" else ".")
    )
    p = max((p for *_, p, _ in compared), default=float("nan"))
    if not compared:
        return Verdict(outcome, said, float(worst.max()), n_seeds=1, effect=float(worst.max()))
    largest = max((found for _, _, found, _, _ in compared), key=lambda found: abs(found.mean))
    ends = (largest.low, largest.high)
    return Verdict(outcome, said, largest.mean, ends, p, largest.n, largest.mean)


def _shift(rates: pd.Series) -> str:
    """How the best rate of α = 16 lies to that of α = 2r at the smallest and largest r."""
    words = []
    for ground in sorted({key[0] for key in rates.index}):
        ranks = sorted({key[1] for key in rates.index if key[0] == ground})
        for r in dict.fromkeys((ranks[0], ranks[-1])):
            if (ground, r, 16.0) in rates.index and (ground, r, 2 * r) in rates.index:
                ratio = rates[ground, r, 16.0] / rates[ground, r, 2 * r]
                words.append(
                    f"{ratio:.2g} times at r = {r:g} on {ground}, where s is {8 / r:.3g} times"
                )
    return "its best rate " + ", ".join(words) if words else "rates not compared"


def _needed(compared: list[tuple[str, str, Comparison, float, str]]) -> str:
    """Seeds that would tell the noisiest undecided difference from the margin."""
    spreads = [found.sd for *_, found, _, outcome in compared if outcome == "unresolved"]
    try:
        return (
            f"about {units_needed(MARGIN, max(spreads))} seeds" if spreads else "at least 2 seeds"
        )
    except WrongInput:
        return "more seeds than can be run"


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Paths that a rate makes equal or not, and scores that are equal, apart or too noisy."""
    same = outcome in ("supported", "unresolved")
    paths = pd.DataFrame(
        itertools.product(OPTIMIZERS, (0.0, 1.0, np.nan), range(2)),
        columns=["optimizer", "power", "seed"],
    )
    paths["pair"] = paths["power"].map({0.0: "η·s^0", 1.0: "η·s^1"}).fillna("start·√s")
    paths["difference"] = np.where((paths["power"] == 0) | (not same), 0.3, 1e-14)
    cells = [(r, a, k) for r in (1, 4, 16, 64) for a in (16.0, 2.0 * r) for k in range(5)]
    runs = pd.DataFrame(cells, columns=["r", "alpha", "seed"])
    noise = 0.2 if outcome == "unresolved" else 0.004
    apart = 0.1 if outcome == "refuted" else 0.0
    fixed = runs["alpha"] == 16
    spread = noise * (runs["seed"] - 2 + 0.1 * rng.standard_normal(len(runs)))
    runs["score"] = 0.8 - fixed * (apart + spread)
    runs = runs.assign(ground="digits_vit", lr=1e-3, chosen=1, edge=0, kind="run")
    return pd.concat([paths.assign(kind="path"), runs], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Distance of the paths over the power, and scores over the rate."""
    runs = table[table["kind"] == "run"]
    grounds = sorted(runs["ground"].unique())
    picture, [axes] = canvas(4.6 * (1 + len(grounds)), 4, 1, 1 + len(grounds))
    paths = table[(table["kind"] == "path") & table["power"].notna()]
    for name, own in paths.groupby("optimizer"):
        mean = own.groupby("power")["difference"].mean()
        axes[0].plot(mean.index, mean.clip(lower=1e-17), marker="o", label=str(name))
    axes[0].axhline(NEAR, color="grey", lw=1)
    axes[0].set_yscale("log")
    axes[0].set_xlabel(f"p: rate times s^p at s = 1, for s = {S:g}")
    axes[0].set_ylabel("‖difference of dW‖ / ‖dW‖")
    axes[0].legend()
    for ax, ground in zip(axes[1:], grounds, strict=True):
        own = runs[(runs["ground"] == ground) & runs["r"].isin((1, 8, 64))].dropna(subset=["score"])
        for i, (r, cell) in enumerate(own.groupby("r")):
            for alpha, rule in cell.groupby("alpha"):
                mean = rule.groupby("lr")["score"].mean()
                s = float(str(alpha)) / float(str(r))
                style = "-" if float(str(alpha)) == 16 else "--"
                ax.plot(mean.index, mean, style, marker="o", color=f"C{i}",
                        label=f"r = {r:g}, s = {s:g}")  # fmt: skip
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("test score, mean over seeds")
        ax.set_title(ground, fontsize=10, loc="left")
        ax.legend(fontsize=8)
    note = (
        "Left: grey marks 1 %, which a rate that absorbs α would reach. Right: solid α = 16, "
        "dashed α = 2r; lines of one colour with one height end equally well at some rate."
    )
    return finish(picture, "Is α a learning rate?", note)
