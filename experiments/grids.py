"""Runs that several claims share, as lines of overrides: equal lines are the same runs.

A comparison takes, for each method, r and rule, the best of the learning rates that were tried
(`best`): a sweep over r at one fixed rate is a sweep over rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd


def seeds(count: int) -> str:
    """The seeds 0 to `count` - 1 as an override.

    >>> seeds(3)
    'seed=0,1,2'
    """
    return f"seed={','.join(map(str, range(count)))}"


SEEDS = seeds(5)
RANKS = "1,2,4,8,16,32,64"

# The head reads the first token, not the mean: an untouched base then leaves 12 points to gain.
MINILM = "size=paper model.pooling=cls data.validation_examples=512 train.evaluations=1 " + (
    "train.spectra=0"
)
DIGITS = "model=digits_vit data=digits train.epochs=10 train.evaluations=1 train.spectra=0"
PLANTED = "model=planted data=planted train.evaluations=1 train.spectra=0"

RATES = {
    MINILM: {"head": "1e-2,3e-2", "full": "3e-5,1e-4,3e-4,1e-3", "lora": "3e-4,1e-3,3e-3,1e-2"},
    DIGITS: {"head": "1e-2,3e-2", "full": "5e-4,2e-3,5e-3,1e-2", "lora": "1e-3,3e-3,1e-2,3e-2"},
}
"""Learning rates of each method on a ground; the best ones lie inside (`best` says where not)."""


def head(ground: str) -> str:
    """The floor: only the head trains."""
    return f"{ground} adapter=head train.lr={RATES[ground]['head']} {SEEDS}"


def full(ground: str) -> str:
    """Full fine-tuning."""
    return f"{ground} adapter=full train.lr={RATES[ground]['full']} {SEEDS}"


def lora(ground: str, ranks: str = RANKS, more: str = "") -> str:
    """LoRA over r with α = 2r, or what `more` overrides say."""
    line = f"{ground} adapter=lora adapter.r={ranks} train.lr={RATES[ground]['lora']} {SEEDS}"
    return f"{line} {more}".rstrip()


def grid(ground: str) -> list[str]:
    """Head, full fine-tuning, and LoRA over r with α = 2r and with α = 16."""
    return [head(ground), full(ground), lora(ground), lora(ground, more="adapter.alpha=16")]


SMOKE = [
    "model=planted data=planted size=smoke adapter=full",
    "model=planted data=planted size=smoke adapter=lora adapter.r=1,4",
]
"""For the machinery alone; a claim with other lines at smoke size shares what it can."""

CELL = ("model", "data", "adapter", "adapter.r", "adapter.alpha", "adapter.scaling")


def best(runs: pd.DataFrame, cell: Sequence[str] = CELL) -> pd.DataFrame:
    """The runs at the best learning rate of their cell, with the column `edge`.

    Parameters
    ----------
    runs : DataFrame
        As `Tables.runs`; diverged runs count against their rate.
    cell : sequence of str
        Columns within which the rate is chosen, by the mean validation score over seeds; those
        that the table lacks are left out.

    Returns
    -------
    DataFrame
        Finished runs; `edge`: the chosen rate is the lowest or highest of several that were tried,
        so that a better one may lie outside.
    """
    keys = [name for name in cell if name in runs]
    kept = []
    for _, own in runs.groupby(keys, dropna=False):
        scores = own["validation_score"].where(own["status"] == "done", -1.0)
        means = scores.groupby(own["train.lr"]).mean()
        chosen, rates = means.idxmax(), means.index
        edge = len(rates) > 1 and chosen in (rates.min(), rates.max())
        at = own[(own["train.lr"] == chosen) & (own["status"] == "done")]
        kept.append(at.assign(edge=edge))
    return pd.concat(kept, ignore_index=True) if kept else runs.assign(edge=False)
