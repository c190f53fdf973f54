"""D9: the rank that a kind of task needs.

Claim: r = 1 may do for a binary decision, r = 8 for simple classification, and r ≥ 64 is needed for
generation.

Decided by: a binary decision, MiniLM on Rotten Tomatoes (2,048 sentences), r = 1 against full
fine-tuning; simple classification, five classes of digits, r = 8 against full; generation, SmolLM2
as a language model of 512 sentences of Rotten Tomatoes, r = 8 against r = 64 by what each gains
over the untrained model (score exp(−loss)); α = 2r, each at the best of its rates. On the same
decoder, sentences and steps, r = 1 as a classifier by label words stands beside it. Three seeds on
SmolLM2, because a run takes most of a minute, but eight where it decides.

Test: r = 1 and r = 8 do (a part each) where the 90 % t interval over seeds of the score less that
of full fine-tuning lies above −.02, and do not where it lies below. r ≥ 64 is needed where the 95 %
interval over seeds of r = 8's share of the gain of r = 64 lies below .95, and is not where it lies
above.

Power: scores differ by .01 between seeds, so that 5 seeds place a difference that is .02 from the
margin with a chance of .8; the gains of a language model were thought to differ by less than 1 %
between seeds, so that 3 would tell .95 from 1, but their shares differed by .06 and left it open
(1.01 ± .15): with 8 the interval is ±.05.

Cost: 46 runs of SmolLM2, half a minute each; the others are of the shared grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import seeds_to_tell, spread
from experiments.grids import DIGITS, MINILM, SMOKE, best, full, lora, seeds
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.stats import t_interval

MARGIN, SHARE = 0.02, 0.95
KINDS = {
    "binary": "binary decision (MiniLM)",
    "classes": "five classes (digits)",
    "language": "language (SmolLM2)",
    "label": "binary decision (SmolLM2)",
}
_DECODER = (
    "model=smollm2 data=rotten_tomatoes data.train_examples=512 data.validation_examples=128 "
    "data.test_examples=512 train.batch_size=16 train.evaluations=1 train.spectra=0"
)
_LANGUAGE = f"{_DECODER} model.objective=language"
SWEEP = {
    "smoke": SMOKE,
    "paper": [
        full(MINILM),
        lora(MINILM, ranks="1,8,64"),
        full(DIGITS),
        lora(DIGITS, ranks="1,8,64"),
        f"{_LANGUAGE} adapter=head seed=0",
        f"{_LANGUAGE} adapter=lora adapter.r=1 train.lr=1e-3,3e-3 seed=0,1,2",
        f"{_LANGUAGE} adapter=lora adapter.r=8,64 train.lr=1e-3,3e-3 {seeds(8)}",
        f"{_DECODER} adapter=head seed=0",
        f"{_DECODER} adapter=lora adapter.r=1,64 train.lr=1e-3 seed=0,1,2",
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores by kind of task, method and r, at the best rates."""
    runs = found.runs
    objective = runs.get("model.objective", pd.Series("", index=runs.index)).fillna("")
    model = runs["model"].astype(str)
    kind = np.select(
        [model == "minilm", objective == "language", objective == "label_words"],
        ["binary", "language", "label"],
        "classes",
    )
    own = best(runs.assign(kind=kind), ("kind", "adapter", "adapter.r"))
    own = own.rename(columns={"adapter.r": "r", "train.lr": "lr"})
    return own[["run_id", "kind", "adapter", "r", "seed", "score", "lr", "edge"]]


def _scores(table: pd.DataFrame, kind: str, adapter: str, r: float = np.nan) -> pd.Series:
    own = table[(table["kind"] == kind) & (table["adapter"] == adapter)]
    own = own if np.isnan(r) else own[own["r"] == r]
    return own.set_index("seed")["score"]


def _lag(table: pd.DataFrame, kind: str, r: int) -> pd.Series:
    """Score less that of full fine-tuning, by seed."""
    return _scores(table, kind, "lora", r).sub(_scores(table, kind, "full")).dropna()


def _share(table: pd.DataFrame, kind: str, r: int) -> pd.Series:
    """Share of r = 64's gain over the untrained decoder, by seed."""
    start = _scores(table, kind, "head").mean()
    gains = (_scores(table, kind, "lora", one) - start for one in (r, 64))
    return next(gains).div(next(gains)).replace([np.inf, -np.inf], np.nan).dropna()


def verdict(table: pd.DataFrame) -> Verdict:
    """r = 1 for a decision, r = 8 for classes, r = 64 for language."""
    lags = {kind: _lag(table, kind, r) for kind, r in (("binary", 1), ("classes", 8))}
    spans = {kind: t_interval(lag, level=0.9) for kind, lag in lags.items()}
    share = _share(table, "language", 8)
    part = spread(share)
    parts = [against(span, -MARGIN) for span in spans.values()]
    parts.append(against(part, SHARE, more=False))
    outcome = together(parts)
    one, eight = spans["binary"], spans["classes"]
    others = {kind: spread(_share(table, kind, 1)) for kind in ("language", "label")}
    said = (
        f"In points of full fine-tuning with 90 % intervals, r = 1 scores {100 * one.value:+.1f} "
        f"[{100 * one.low:.1f}, {100 * one.high:.1f}] on a binary decision (MiniLM) and r = 8 "
        f"{100 * eight.value:+.1f} [{100 * eight.low:.1f}, {100 * eight.high:.1f}] on five classes "
        f"(digits); as a language model SmolLM2 has {part.value:.2f} [{part.low:.2f}, "
        f"{part.high:.2f}] of the gain of r = 64 at r = 8 and {others['language'].value:.2f} at "
        f"r = 1, as a classifier of the same sentences {others['label'].value:.2f} at r = 1"
    )
    edges = table.loc[table["edge"].astype(bool), ["kind", "adapter", "r"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    if outcome == "unresolved":
        values = [*((lag, -MARGIN) for lag in lags.values()), (share, SHARE)]
        told = [
            seeds_to_tell(*given)
            for given, part in zip(values, parts, strict=True)
            if part == "unresolved"
        ]
        said += f"; {told[0]}"
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", part.value, part[1:], n_seeds=seeds, effect=part.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Ranks that do where the claim says and only there; the opposite; do everywhere; scatter."""
    lost, share = {
        "supported": (0.0, 0.6),
        "refuted": (0.1, 1.0),
        "mixed": (0.0, 1.0),
        "unresolved": (MARGIN, SHARE),
    }[outcome]
    # Symmetric, so that no draw of few seeds can decide what is undecided.
    wide = np.array([-1.0, 1.0, 0.0, 0.5, -0.5]) * (0.05 if outcome == "unresolved" else 0.002)
    rows: list[dict[str, Any]] = []
    for seed in range(5):
        whole = 0.8 + 0.01 * rng.standard_normal()
        for kind in ("binary", "classes"):
            rows.append({"kind": kind, "adapter": "full", "seed": seed, "score": whole})
            for r in (1, 8, 64):
                score = whole - lost + wide[seed]
                rows.append({"kind": kind, "adapter": "lora", "r": r, "seed": seed, "score": score})
    for kind in ("language", "label"):
        rows.append({"kind": kind, "adapter": "head", "seed": 0, "score": 0.004})
        for seed in range(3):
            for r in (1, 8, 64):
                part = 1.0 if r == 64 else share + wide[seed]
                row = {"kind": kind, "adapter": "lora", "r": r, "seed": seed}
                rows.append(row | {"score": 0.004 + 0.01 * part})
    return pd.DataFrame(rows).assign(lr=1e-3, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Score over that of full fine-tuning, and share of the gain of r = 64, over r."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    for kind, colour in (("binary", "#0072b2"), ("classes", "#009e73")):
        lags = {r: _lag(table, kind, r) for r in (1, 8, 64)}
        for r, lag in lags.items():
            left.plot([r] * len(lag), lag, "o", ms=3, color=colour, alpha=0.5)
        left.plot(list(lags), [spread(lag).value for lag in lags.values()], color=colour,
                  label=KINDS[kind])  # fmt: skip
    for kind, colour in (("language", "#d55e00"), ("label", "#0072b2")):
        shares = {r: _share(table, kind, r) for r in (1, 8, 64)}
        shares = {r: share for r, share in shares.items() if len(share)}
        for r, share in shares.items():
            right.plot([r] * len(share), share, "o", ms=3, color=colour, alpha=0.5)
        right.plot(list(shares), [share.mean() for share in shares.values()], color=colour,
                   label=KINDS[kind])  # fmt: skip
    left.axhline(-MARGIN, color="grey", lw=1, ls="--")
    left.axhline(0, color="grey", lw=1)
    left.set_ylabel("score − that of full fine-tuning")
    right.axhline(SHARE, color="grey", lw=1, ls="--")
    right.set_ylabel("share of the gain of r = 64")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xlim(0.8, 80)
        ax.set_xlabel("r")
        ax.legend(fontsize=8)
    note = (
        "Left: r does where its interval lies above the dashed line. Right: r = 64 is needed where "
        "r = 8 lies below it. Points: seeds."
    )
    return finish(picture, "What r a kind of task needs", note)
