"""G6: LoRA Without Regret (Thinking Machines 2025) in small.

Claim: LoRA's best learning rate is 5 to 20 times that of full fine-tuning; it is within a factor 3
for every r; adapting the MLP alone is better than attention alone at equal parameters.

Decided by: digits and MiniLM. Rates with a constant α = 16, as the paper has a constant α: the rate
of lowest test loss for every r and seed, the minimum of a parabola in logarithms through the best
rate tried and its neighbours; its geometric mean over r over full fine-tuning's; and the factor by
which it changes from r = 1 to 64 along a line through all r, in logarithms. Layers on digits: the
MLP at r = 8 against attention at r = 10, which have equally many parameters (5,120 a block), each
at the best of four rates by validation score.

Test: 95 % t intervals over seeds. Ratio: inside 5 to 20, refuted outside. Factor: inside 1/3 to 3.
MLP minus attention: above 0, refuted below one point. Five parts.

Power: log rates scatter by about 0.4 between seeds, means over seven r by 0.2: five seeds place a
ratio within a factor 1.3. Paired scores differ by about 0.01, ±0.012 with five seeds.

Cost: the shared grids, and 40 runs of digits more.
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

ALPHA = 16
EQUAL = {"attention": 10, "mlp": 8}
SWEEP = {
    "smoke": grids.SMOKE,
    "paper": [
        *(
            line
            for ground in (grids.DIGITS, grids.MINILM)
            for line in (grids.full(ground), grids.lora(ground, more=f"adapter.alpha={ALPHA}"))
        ),
        *(grids.lora(grids.DIGITS, str(r), f"adapter.targets={t}") for t, r in EQUAL.items()),
    ],
}
RATIO = (math.log(5), math.log(20))
FACTOR = math.log(3)
SPAN = math.log(64)
LEAST = 0.01


def rows(found: Any) -> pd.DataFrame:
    """Every run with its setting."""
    names = {"model": "ground", "adapter.r": "r", "adapter.targets": "targets", "train.lr": "lr"}
    kept = ["run_id", "adapter", *names.values(), "seed", "status", "loss"]
    scores = ["validation_score", "score"]
    table = found.runs.rename(columns=names)[[*kept, *scores, "adapter_parameters"]]
    return table.astype({"r": "float64"})


def _optima(own: pd.DataFrame) -> pd.DataFrame:
    """ln of the best rate by method, r and seed, and whether it is at an edge."""
    own = own[own["targets"] == "all"]
    out = []
    for (adapter, r, seed), one in own.groupby(["adapter", "r", "seed"], dropna=False):
        value, edge = optimum(one["lr"], one["loss"])
        row = {"adapter": adapter, "r": r, "seed": seed, "edge": edge}
        out.append(row | {"best": math.log(value)})
    return pd.DataFrame(out).dropna(subset="best")


def _ratios(optima: pd.DataFrame) -> list[float]:
    """ln of LoRA's best rate, mean over r, over full fine-tuning's, by seed."""
    means = {name: one.groupby("seed")["best"].mean() for name, one in optima.groupby("adapter")}
    none = pd.Series(dtype="float64")
    return list((means.get("lora", none) - means.get("full", none)).dropna())


def _factors(optima: pd.DataFrame) -> list[float]:
    """ln of the factor from r = 1 to 64 on each seed's line."""
    lora = optima[optima["adapter"] == "lora"]
    seeds = [one for _, one in lora.groupby("seed") if len(one) > 2]
    return [SPAN * float(np.polyfit(np.log(one["r"]), one["best"], 1)[0]) for one in seeds]


def _layers(table: pd.DataFrame) -> tuple[list[float], float]:
    """Score of the MLP alone minus attention alone, and the ratio of their parameters."""
    own = table[table["targets"].isin(list(EQUAL))].rename(columns={"lr": "train.lr"})
    if own["targets"].nunique() < 2:
        return [], math.nan
    chosen = grids.best(own, ("ground", "targets"))
    scores = {name: one.set_index("seed")["score"] for name, one in chosen.groupby("targets")}
    counts = own.groupby("targets")["adapter_parameters"].mean()
    gap = list((scores["mlp"] - scores["attention"]).dropna())
    return gap, float(counts["mlp"] / counts["attention"])


def verdict(table: pd.DataFrame) -> Verdict:
    """Ratio and factor on each ground, and the layers."""
    optima: dict[Any, pd.DataFrame] = {}
    parts: list[tuple[str, list[float], tuple[float, ...]]] = []
    words = []
    for ground, own in table.groupby("ground"):
        optima[ground] = _optima(own)
        ratios, factors = _ratios(optima[ground]), _factors(optima[ground])
        bars = spread(ratios), spread(factors)
        parts.append((inside(bars[0], *RATIO), ratios, RATIO))
        parts.append((inside(bars[1], -FACTOR, FACTOR), factors, (-FACTOR, FACTOR)))
        told = [f"{m:.2g} [{low:.2g}, {high:.2g}]" for m, low, high in np.exp(bars)]
        words.append(
            f"on {ground} LoRA's best rate is {told[0]} times full fine-tuning's and changes by a "
            f"factor {told[1]} from r = 1 to 64"
        )
    first = parts[0][1]
    gap, ratio = _layers(table)
    if len(gap):
        bar = spread(gap)
        part = inside(bar, 0.0, np.inf)
        refuted = part != "supported" and bar.high < LEAST
        parts.append(("refuted" if refuted else part, gap, (0.0, LEAST)))
        low, mid, high = (100 * x for x in (bar.low, bar.value, bar.high))
        words.append(
            f"the MLP alone scores {mid:+.1f} points [{low:+.1f}, {high:+.1f}] against attention "
            f"alone at {ratio:.3g} times the parameters"
        )
    outcome = together(part for part, _, _ in parts)
    edges = int(sum(one["edge"].sum() for one in optima.values()))
    every = sum(len(one) for one in optima.values())
    said = "; ".join(words) + f" ({edges} of {every} best rates at the edge of their grid)"
    if outcome == "unresolved":
        _, values, sides = next(part for part in parts if part[0] == "unresolved")
        said += f"; {seeds_to_tell(values, *sides, either=values is gap)}"
    effect, low, high = (float(x) for x in np.exp(spread(first)))
    said = said[0].upper() + said[1:] + "."
    seeds = table["seed"].nunique()
    return Verdict(outcome, said, effect, (low, high), n_seeds=seeds, effect=effect)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Rates ten times full's and flat with a better MLP; a hundred times and steep with a worse;
    ten times with a worse; or losses that are noise."""
    times, steep = (100.0, -1.0) if outcome == "refuted" else (10.0, 0.0)
    gain = 0.05 if outcome == "supported" else -0.05
    noise = 3.0 if outcome == "unresolved" else 0.02
    tried = 10.0 ** np.arange(-7, 3)
    out = []
    for ground in ("digits_vit", "minilm"):
        for seed in range(5):
            for r in (np.nan, 1, 8, 64):
                full = math.isnan(r)
                best = 1e-4 if full else 1e-4 * times * (r / 8) ** steep
                loss = np.exp(0.1 * np.log(tried / best) ** 2 + noise * rng.normal(size=10))
                own: dict[str, Any] = {"ground": ground, "r": r}
                own["adapter"] = "full" if full else "lora"
                own |= {"targets": "all", "seed": seed, "lr": tried, "loss": loss}
                out.append(pd.DataFrame(own))
            for targets, more in (("mlp", gain), ("attention", 0.0)):
                score = 0.8 + more + rng.normal(0, 0.002)
                if outcome == "unresolved":
                    score = 0.8 + (0.05 * (-1) ** seed if more else 0.0)
                row = {"ground": "digits_vit", "adapter": "lora", "r": 8.0, "targets": targets}
                row |= {"seed": seed, "lr": 1e-2, "loss": 1.0, "adapter_parameters": 5120}
                out.append(pd.DataFrame([row | {"score": score, "validation_score": score}]))
    return pd.concat(out, ignore_index=True).assign(run_id="", status="done")


def figure(table: pd.DataFrame) -> Any:
    """Best rates over r beside full fine-tuning's, and the layers' scores."""
    grounds = sorted(table["ground"].unique())
    picture, [axes] = canvas(4 * (len(grounds) + 1), 4, 1, len(grounds) + 1)
    for ax, (ground, own) in zip(axes, table.groupby("ground"), strict=False):
        optima = _optima(own).assign(best=lambda t: np.exp(t["best"]))
        lora, full = (optima[optima["adapter"] == name] for name in ("lora", "full"))
        if len(full):
            middle = float(np.exp(np.log(full["best"]).mean()))
            ax.axhline(middle, color="#d55e00", label="full fine-tuning")
            ax.axhspan(5 * middle, 20 * middle, color="#d55e00", alpha=0.13, lw=0)
        if len(lora):
            middle = np.exp(np.log(lora["best"]).groupby(lora["r"]).mean())
            ax.plot(middle.index, middle, color="#0072b2", label=f"LoRA, α = {ALPHA}")
            ax.plot(lora["r"], lora["best"], "o", ms=3, alpha=0.5, color="#0072b2")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("r")
        ax.set_ylabel("best learning rate")
        ax.set_title(str(ground), fontsize=10, loc="left")
        ax.legend(fontsize=8)
    parts = table[table["targets"].isin(list(EQUAL))].rename(columns={"lr": "train.lr"})
    if len(parts):
        chosen = grids.best(parts, ("ground", "targets"))
        for _, one in chosen.groupby("seed"):
            one = one.sort_values("targets")
            axes[-1].plot(one["targets"], one["score"], marker="o", color="#0072b2", alpha=0.6)
    axes[-1].set_ylabel("test score")
    axes[-1].set_title("equal parameters; each line a seed", fontsize=10, loc="left")
    note = "The paper expects the blue line flat and inside the band, 5 to 20 times full's rate."
    return finish(picture, "Rates and layers after LoRA Without Regret", note)
