"""G7: Aghajanyan et al. 2020, Intrinsic Dimensionality Explains the Effectiveness of Fine-Tuning.

Claim: the dimension d90 of a random subspace in which training reaches 90 % of the full score is
far below the number of parameters, and it is lower for pre-trained than for re-initialised weights.

Decided by: digits, a vision transformer of width 64 trained in d = 8 to 2,048 random directions
(Fastfood) of its 196,608 weights, from its pre-training and from random weights; d90 by seed,
linear in ln d between the d tried, each d and full fine-tuning at the best of its rates. The
paper's 90 % is of the score; 90 % of the way from the head alone to full fine-tuning is read too.
Where no d suffices the largest counts, which makes the difference smaller than it is.

Test: 95 % t intervals over seeds. d90 of the pre-trained network lies below 1 % of the parameters
(refuted: above). ln d90 of the pre-trained less that of the random one lies below 0 (refuted:
above), for each reading.

Power: at a spread of .7 between paired seeds (half a step of the grid of d), 5 seeds show a factor
of 3.4 with a chance of .8.

Cost: 120 runs on digits, seconds each, all of them D6's too, beside the common grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import seeds_to_tell, spread
from experiments.subspaces import READINGS, d90, drawn, lines, scored
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.stats import paired

SHARE = 0.01
_TINY = "model=digits_vit model.start= data=digits size=smoke train.epochs=1"
SWEEP = {
    "smoke": [
        f"{_TINY} adapter=full",
        f"{_TINY} adapter=head",
        f"{_TINY} adapter=intrinsic adapter.d=16,64 train.lr=3e-2",
    ],
    "paper": [*lines("pretrained"), *lines("random")],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores by network and d."""
    return scored(found.runs)


def _less(table: pd.DataFrame, reading: str) -> pd.Series:
    """ln d90 of the pre-trained network less that of the random one, by seed."""
    one, other = (d90(table, network, reading) for network in ("pretrained", "random"))
    return (np.log(one) - np.log(other)).dropna()


def verdict(table: pd.DataFrame) -> Verdict:
    """Far below the parameters; lower when pre-trained, in both readings."""
    need, parameters = d90(table, "pretrained"), float(table["parameters"].max())
    share = spread(np.log(need / parameters))
    less = {reading: _less(table, reading) for reading in READINGS}
    found = {reading: spread(values) for reading, values in less.items()}
    parts = [against(share, np.log(SHARE), more=False)]
    parts += [against(one, 0.0, more=False) for one in found.values()]
    outcome = together(parts)
    low, high = (100 * np.exp(bound) for bound in share[1:])
    words = [
        f"{np.exp(one.value):.2g} [{np.exp(one.low):.2g}, {np.exp(one.high):.2g}] times"
        for one in found.values()
    ]
    said = (
        f"d90 of the pre-trained network is {np.exp(np.log(need).mean()):.0f}, "
        f"{100 * np.exp(share.value):.2g} % [{low:.2g}, {high:.2g}] of its "
        f"{parameters:,.0f} parameters, and {words[0]} that from random weights "
        f"({np.exp(np.log(d90(table, 'random')).mean()):.0f}); with 90 % of the gap to the head "
        f"alone in place of 90 % of the accuracy, {words[1]}"
    )
    edges = table.loc[table["edge"].astype(bool), ["network", "adapter", "d"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    main, values = found["accuracy"], less["accuracy"]
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(values, 0.0)}"
    p = paired(values).p if len(values) else np.nan
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", main.value, main[1:], p, seeds, main.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Pre-training that lowers a small d90; that raises a large one; a small one; or scatter."""
    needs = {
        "supported": {"pretrained": 60.0, "random": 1000.0},
        "refuted": {"pretrained": 3500.0, "random": 100.0},
        "mixed": {"pretrained": 500.0, "random": 60.0},
        "unresolved": {"pretrained": 300.0, "random": 300.0},
    }[outcome]
    wide = 3.0 if outcome == "unresolved" else 1.05
    cells = [
        {"network": name, "seed": seed, "factor": wide ** ((-1) ** (seed + i) * (seed != 2))}
        for i, name in enumerate(needs)
        for seed in range(5)
    ]
    return drawn(pd.DataFrame(cells), needs, rng)


def figure(table: pd.DataFrame) -> Any:
    """Score over d, and where 90 % lies."""
    picture, [[ax]] = canvas(6.5, 4)
    for network, colour in (("pretrained", "#0072b2"), ("random", "#d55e00")):
        own = table[table["network"] == network]
        curve = own[own["adapter"] == "intrinsic"]
        if curve.empty:
            continue
        ax.plot(curve["d"], curve["score"], "o", ms=3, color=colour, alpha=0.5)
        mean = curve.groupby("d")["score"].mean()
        ax.plot(mean.index, mean, color=colour, label=network)
        whole = own.loc[own["adapter"] == "full", "score"].mean()
        ax.axhline(0.9 * whole, color=colour, lw=1, ls="--")
    ax.set_xscale("log", base=2)
    ax.set_xlabel("d, random directions that train")
    ax.set_ylabel("test score")
    ax.legend(fontsize=8)
    note = (
        "Dashed: 90 % of full fine-tuning of the same network; d90 is where a curve first crosses "
        "its own line. Points: seeds."
    )
    return finish(picture, "How many random directions reach 90 %", note)
