"""B6: whether α and the learning rate found at one r serve at another.

Claim: the best α and the best learning rate found at a low r transfer to other r, and the rate is
ten times that of full fine-tuning; texts disagree whether it is independent of r or goes as 1/r.

Decided by: the rate of lowest test loss for every r, seed and rule (α = 2r, α = 16), on digits and
MiniLM, the minimum of a parabola in logarithms through the best rate tried and its neighbours (a
place, not a score: choosing it on the test split flatters nobody); its exponent of r within each
seed; its ratio to full fine-tuning's; and on digits, at one rate, the best constant factor s for
r = 2, 8, 32, of which every rule's best α follows: s·r for α/r, s·√r for rsLoRA.

Test: 95 % t intervals over seeds' exponents and log ratios. A rate or an α transfers when the
whole interval of its exponent lies within ±0.25 (less than a factor 3 from r = 1 to 64). Ten times
holds when the ratio at α = 2r lies between √10 and 10√10. Eight parts, four on a side.

Power: a parabola's minimum scatters by a factor of about 1.5 between seeds, an exponent over seven
r by about 0.1; five seeds give ±0.12.

Cost: the shared grids, and 60 runs of digits more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from experiments import grids
from experiments.curves import inside, optimum, seeds_to_tell, spread
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish

FACTORS = (
    f"{grids.DIGITS} adapter=lora adapter.r=2,8,32 adapter.scaling=constant "
    f"adapter.alpha=0.5,2,8,32 train.lr=3e-3 {grids.SEEDS}"
)
SWEEP = {
    "smoke": [*grids.SMOKE, f"{grids.SMOKE[1]} adapter.scaling=constant adapter.alpha=2"],
    "paper": [*grids.grid(grids.DIGITS), *grids.grid(grids.MINILM), FACTORS],
}
MARGIN = 0.25
TENFOLD = (math.log(10) / 2, 1.5 * math.log(10))
RULES = ("α = 2r", "α = 16")


def rows(found: Any) -> pd.DataFrame:
    """Every run with its rule; one at r = 8 and α = 16 is of both."""
    runs = found.runs
    runs = runs.assign(
        ground=runs["model"],
        r=runs["adapter.r"].astype("float64"),
        lr=runs["train.lr"],
        s=runs["adapter.alpha"].astype("float64"),
    )
    ratio = runs["adapter.scaling"].eq("alpha_over_r").fillna(False)
    rules = {
        "full": runs["adapter"] == "full",
        RULES[0]: ratio & (runs["s"] == 2 * runs["r"]),
        RULES[1]: ratio & (runs["s"] == 16),
        "factor": runs["adapter.scaling"].eq("constant").fillna(False),
    }
    parts = [runs[chosen].assign(rule=rule) for rule, chosen in rules.items()]
    names = ["run_id", "ground", "rule", "r", "s", "lr", "seed", "loss", "status"]
    return pd.concat(parts, ignore_index=True)[names]


def _optima(table: pd.DataFrame) -> pd.DataFrame:
    """The best rate (best s for `factor`) of each ground, rule, r and seed, and whether at an
    edge."""
    out = []
    for (ground, rule, r, seed), own in table.groupby(
        ["ground", "rule", "r", "seed"], dropna=False
    ):
        value, edge = optimum(own["s" if rule == "factor" else "lr"], own["loss"])
        out.append(
            {"ground": ground, "rule": rule, "r": r, "seed": seed, "best": value, "edge": edge}
        )
    return pd.DataFrame(out).dropna(subset="best")


def _exponents(own: pd.DataFrame) -> list[float]:
    """Slope of ln best on ln r within each seed that has three r or more."""
    seeds = [one for _, one in own.groupby("seed") if one["r"].nunique() > 2]
    return [float(np.polyfit(np.log(one["r"]), np.log(one["best"]), 1)[0]) for one in seeds]


def _ratios(optima: pd.DataFrame, ground: str) -> list[float]:
    """ln of LoRA's best rate (geometric mean over r, α = 2r) over full fine-tuning's, by seed."""
    own = optima[optima["ground"] == ground].assign(best=lambda t: np.log(t["best"]))
    lora, full = (own[own["rule"] == rule] for rule in (RULES[0], "full"))
    gap = lora.groupby("seed")["best"].mean() - full.groupby("seed")["best"].mean()
    return list(gap.dropna())


def verdict(table: pd.DataFrame) -> Verdict:
    """Rates by rule and ground, α on digits, and ten times."""
    optima = _optima(table)
    parts, words, first = [], [], spread([])
    for ground in sorted(table["ground"].unique()):
        own = optima[optima["ground"] == ground]
        for rule in RULES:
            values = _exponents(own[own["rule"] == rule])
            found = spread(values)
            parts.append((inside(found, -MARGIN, MARGIN), values, (-MARGIN, MARGIN)))
            first = found if not parts[:-1] else first
            words.append(
                f"on {ground} the best rate goes as r^{found.value:.2f} [{found.low:.2f}, "
                f"{found.high:.2f}] at {rule}"
            )
        ratios = _ratios(optima, ground)
        times = spread(ratios)
        parts.append((inside(times, *TENFOLD), ratios, TENFOLD))
        low, mid, high = (np.exp(x) for x in (times.low, times.value, times.high))
        words.append(f"at α = 2r it is {mid:.1f} [{low:.1f}, {high:.1f}] times full fine-tuning's")
        if (factor := own[own["rule"] == "factor"]).empty:
            continue
        values = [value + 1 for value in _exponents(factor)]
        found = spread(values)
        parts.append((inside(found, -MARGIN, MARGIN), values, (-MARGIN, MARGIN)))
        words.append(
            f"at one rate the best α goes as r^{found.value:.2f} [{found.low:.2f}, "
            f"{found.high:.2f}] under α/r and r^{found.value - 0.5:.2f} under α/√r"
        )
    outcome = together(one for one, _, _ in parts)
    edges = int(optima["edge"].sum())
    said = "; ".join(words) + f" ({edges} of {len(optima)} optima at the edge of their grid"
    if outcome == "unresolved":
        _, values, edges_ = next(part for part in parts if part[0] == "unresolved")
        said += f"; {seeds_to_tell(values, *edges_)}"
    said = said[0].upper() + said[1:] + ")."
    interval = (first.low, first.high)
    seeds = table["seed"].nunique()
    return Verdict(outcome, said, first.value, interval, n_seeds=seeds, effect=first.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Losses with a minimum at a rate that is flat in r, or goes as r⁻¹, or is not to be seen."""
    steep = {"refuted": (-1.0, -1.0, -2.0, 100), "mixed": (0.0, -1.0, -1.0, 10)}
    one, other, factor, times = steep.get(outcome, (0.0, 0.0, -1.0, 10))
    noise = 3.0 if outcome == "unresolved" else 0.02
    tried = 10.0 ** np.arange(-6, 4)
    out = []
    rules = (("full", 0.0, 1e-3), (RULES[0], one, 1e-3 * times), (RULES[1], other, 1e-2))
    for rule, exponent, level in (*rules, ("factor", factor, 8.0)):
        for r in [np.nan] if rule == "full" else [1, 8, 64]:
            for seed in range(5):
                best = level * (1 if rule == "full" else (r / 8) ** exponent)
                loss = np.exp(0.1 * np.log(tried / best) ** 2 + noise * rng.normal(size=10))
                own = {"ground": "digits", "rule": rule, "r": r, "seed": seed, "loss": loss}
                out.append(pd.DataFrame({**own, "lr": tried, "s": tried}))
    return pd.concat(out, ignore_index=True).assign(run_id="", status="done")


def figure(table: pd.DataFrame) -> Any:
    """The optima over r, each seed a dot."""
    optima = _optima(table)
    grounds = sorted(table["ground"].unique())
    picture, [axes] = canvas(4 * (len(grounds) + 1), 4, 1, len(grounds) + 1)
    for ax, ground in zip(axes, grounds, strict=False):
        for rule, colour in zip(RULES, ("#0072b2", "#009e73"), strict=True):
            _dots(ax, optima[(optima["ground"] == ground) & (optima["rule"] == rule)], rule, colour)
        full = optima[(optima["ground"] == ground) & (optima["rule"] == "full")]["best"]
        if len(full):
            middle = np.exp(np.log(full).mean())
            ax.axhline(middle, color="#d55e00", label="full fine-tuning")
            ax.axhline(10 * middle, color="#d55e00", ls=":", label="ten times that")
        ax.set_ylabel("best learning rate")
        ax.set_title(ground, fontsize=10, loc="left")
    factor = optima[optima["rule"] == "factor"]
    for rule, exponent in {"α/r": 1.0, "α/√r": 0.5, "α": 0.0}.items():
        alpha = factor["best"] * factor["r"] ** exponent
        _dots(axes[-1], factor.assign(best=alpha), f"s = {rule}", None)
    axes[-1].set_ylabel("best α")
    axes[-1].set_title("at one rate", fontsize=10, loc="left")
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("r")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    note = "A flat line transfers from one r to another. Dots: seeds; lines: their geometric mean."
    return finish(picture, "Where the best rate and the best α lie, over r", note)


def _dots(ax: Any, own: pd.DataFrame, label: str, colour: str | None) -> None:
    if own.empty:
        return
    middle = np.exp(np.log(own["best"]).groupby(own["r"]).mean())
    [line] = ax.plot(middle.index, middle, label=label, color=colour)
    ax.plot(own["r"], own["best"], "o", ms=3, alpha=0.5, color=line.get_color())
