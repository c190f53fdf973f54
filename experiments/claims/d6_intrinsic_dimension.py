"""D6: the intrinsic dimension of fine-tuning.

Claim: 90 % of the full score is reached in d random directions with d far below the number of
parameters, and larger or pre-trained models need fewer.

Decided by: digits, vision transformers of width 32, 64 and 128 (49 thousand to 0.8 million weights)
from their pre-training and of width 64 from random weights, trained in d = 8 to 2,048 random
directions (Fastfood); d90 by seed, linear in ln d between the d tried, each d and full fine-tuning
at the best of its rates; 90 % of the accuracy, as in the paper, not of the gap above the head.
Where no d suffices the largest counts. On MiniLM (10.6 million weights, Rotten Tomatoes) two values
of d.

Test: 95 % t intervals over seeds, a part each. d90 of the pre-trained network of width 64 lies
below 1 % of its parameters. ln d90 of the pre-trained less that of the random one lies below 0. The
slope of ln d90 on ln parameters over the widths (seeds as blocks) lies below 0. On MiniLM the score
at d = 1,024 lies above 90 % of full fine-tuning's. Each is refuted where its interval lies on the
other side.

Power: at a spread of .7 of ln d90, 5 seeds show a factor of 3.4 between two networks with a chance
of .8, and a slope of 0.5 over the widths; on MiniLM scores differ by .01 between seeds.

Cost: 240 runs on digits, seconds each (half of them are G7's too), and 10 on MiniLM, beside the
shared grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import seeds_to_tell, spread
from experiments.grids import MINILM, SEEDS, best, full
from experiments.subspaces import NETWORKS, d90, drawn, lines, scored
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval, blocked_slope, paired

SHARE = 0.01
WIDTHS = ("narrow", "pretrained", "wide")
# Equal steps: the rate falls as 1/√d.
TEXT = {64: "1e-1", 1024: "3e-2"}
_TINY = "model=digits_vit model.start= data=digits size=smoke train.epochs=1"
SWEEP = {
    "smoke": [
        f"{_TINY} adapter=full",
        f"{_TINY} adapter=head",
        f"{_TINY} adapter=intrinsic adapter.d=16,64 train.lr=3e-2",
    ],
    "paper": [
        *(line for network in NETWORKS for line in lines(network)),
        full(MINILM),
        *(
            f"{MINILM} adapter=intrinsic adapter.d={d} train.lr={rate} {SEEDS}"
            for d, rate in TEXT.items()
        ),
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores by network and d; MiniLM is a network too."""
    runs = found.runs
    text = runs["model"] == "minilm"
    parts = [scored(runs[~text])]
    if text.any():
        own = runs[text].rename(columns={"adapter.d": "d"})
        own = best(own, ("adapter", "d")).rename(columns={"train.lr": "lr"})
        whole = own.loc[own["adapter"] == "full", "adapter_parameters"].max()
        parts.append(own.assign(network="minilm", parameters=whole)[parts[0].columns])
    return pd.concat(parts, ignore_index=True)


def _over_widths(table: pd.DataFrame) -> Interval:
    """Slope of ln d90 on ln parameters within seeds."""
    x, y, seeds = [], [], []
    for network in WIDTHS:
        parameters = table.loc[table["network"] == network, "parameters"].max()
        for seed, need in d90(table, network).items():
            x.append(np.log(parameters))
            y.append(np.log(need))
            seeds.append(seed)
    try:
        found = blocked_slope(x, y, seeds)
    except WrongInput:
        return Interval(np.nan, np.nan, np.nan)
    return Interval(found.slope, found.low, found.high)


def _text(table: pd.DataFrame, d: int) -> pd.Series:
    """On MiniLM, by seed, score at d over that of full fine-tuning."""
    own = table[table["network"] == "minilm"]
    whole = own[own["adapter"] == "full"].set_index("seed")["score"]
    return (own[own["d"] == d].set_index("seed")["score"] / whole).dropna()


def verdict(table: pd.DataFrame) -> Verdict:
    """Far below the parameters; less when pre-trained and when larger; on MiniLM too."""
    need, other = d90(table, "pretrained"), d90(table, "random")
    own = table[table["network"] == "pretrained"]
    share = spread(np.log(need / own["parameters"].max()) if len(need) else [])
    less = (np.log(need) - np.log(other)).dropna()
    lower, size = spread(less), _over_widths(table)
    text = spread(_text(table, 1024))
    parts = [
        against(share, np.log(SHARE), more=False),
        against(lower, 0.0, more=False),
        against(size, 0.0, more=False),
        against(text, 0.9),
    ]
    outcome = together(parts)
    widths = ", ".join(f"{np.exp(np.log(d90(table, name)).mean()):.0f}" for name in WIDTHS)
    gap = np.exp(np.log(d90(table, "pretrained", "gap")).mean())
    part = 100 * np.exp(np.array(share))
    said = (
        f"d90 is {np.exp(np.log(need).mean()):.0f} for the pre-trained network of width 64, "
        f"{part[0]:.2g} % [{part[1]:.2g}, {part[2]:.2g}] of its parameters ({gap:.0f} for 90 % of "
        f"the gap above the head), and {np.exp(lower.value):.2g} [{np.exp(lower.low):.2g}, "
        f"{np.exp(lower.high):.2g}] times that from random weights; at widths 32, 64 and 128 it is "
        f"{widths}, going as parameters^{size.value:.2g} [{size.low:.2g}, {size.high:.2g}]; on "
        f"MiniLM 1,024 directions reach {text.value:.3f} [{text.low:.3f}, {text.high:.3f}] of the "
        f"full score and 64 {spread(_text(table, 64)).value:.3f}"
    )
    edges = table.loc[table["edge"].astype(bool), ["network", "adapter", "d"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(less, 0.0)}"
    p = paired(less).p if len(less) else np.nan
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", share.value, share[1:], p, seeds, effect=share.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Needs that fall with pre-training and size; the opposite; the first alone; or scatter."""
    needs = {
        "supported": {"pretrained": 100.0, "random": 1000.0, "narrow": 300.0, "wide": 30.0},
        "refuted": {"pretrained": 3500.0, "random": 300.0, "narrow": 1000.0, "wide": 3900.0},
        "mixed": {"pretrained": 100.0, "random": 1000.0, "narrow": 30.0, "wide": 300.0},
        "unresolved": dict.fromkeys(NETWORKS, 300.0),
    }[outcome]
    wide = 4.0 if outcome == "unresolved" else 1.02
    cells = [
        {"network": name, "seed": seed, "factor": wide ** ((-1) ** (seed + i) * (seed != 2))}
        for i, name in enumerate(needs)
        for seed in range(5)
    ]
    table = drawn(pd.DataFrame(cells), needs, rng)
    table["parameters"] *= table["network"].map({"narrow": 0.25, "wide": 4.0}).fillna(1.0)
    share = {"supported": 0.95, "refuted": 0.8, "mixed": 0.95, "unresolved": 0.9}[outcome]
    spread_ = 0.03 if outcome == "unresolved" else 0.002
    text = [
        {"network": "minilm", "adapter": adapter, "d": d, "seed": seed, "parameters": 10_616_832}
        | {"score": 0.8 * level + spread_ * (seed - 2) * (adapter != "full"), "edge": False}
        for adapter, d, level in (
            ("full", np.nan, 1.0),
            ("intrinsic", 64, share - 0.1),
            ("intrinsic", 1024, share),
        )
        for seed in range(5)
    ]
    return pd.concat([table, pd.DataFrame(text)], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Share of the full score over d, for every network."""
    picture, [[left, right]] = canvas(10, 4, 1, 2)
    colours = {
        "narrow": "#8cc5e3",
        "pretrained": "#0072b2",
        "wide": "#003a5d",
        "random": "#d55e00",
        "minilm": "#009e73",
    }
    labels = {
        "narrow": "width 32",
        "pretrained": "width 64",
        "wide": "width 128",
        "random": "width 64, random weights",
        "minilm": "MiniLM",
    }
    for name, colour in colours.items():
        own = table[table["network"] == name]
        whole = own[own["adapter"] == "full"].set_index("seed")["score"]
        curve = own[own["adapter"] == "intrinsic"]
        if curve.empty or whole.empty:
            continue
        share = curve["score"] / curve["seed"].map(whole)
        left.plot(curve["d"], share, "o", ms=3, color=colour, alpha=0.5)
        mean = share.groupby(curve["d"]).mean()
        left.plot(mean.index, mean, color=colour, label=labels[name])
        if name != "minilm":
            need = d90(table, name)
            right.plot([curve["parameters"].max()] * len(need), need, "o", color=colour)
    left.axhline(0.9, color="grey", lw=1)
    left.set_xscale("log", base=2)
    left.set_xlabel("d, random directions that train")
    left.set_ylabel("score over that of full fine-tuning")
    left.legend(fontsize=8)
    right.set_xscale("log")
    right.set_yscale("log", base=2)
    right.set_xlabel("parameters of the target layers")
    right.set_ylabel("d90")
    note = (
        "Left: d90 is where a curve crosses the line. Right: it falls to the right if larger "
        "networks need fewer directions; orange is the network without pre-training. Points: seeds."
    )
    return finish(picture, "Intrinsic dimension of fine-tuning", note)
