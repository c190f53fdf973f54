"""D1: the score over r.

Claim: small r (4 to 8) is near full fine-tuning, returns diminish, and Performance(r) ≈ full −
c/log r. Erratum: the formula is undefined at r = 1, and below full at every r by construction.

Decided by: test score of LoRA (α = 2r, all layers) at r = 1 … 64 and of full fine-tuning, on MiniLM
and on digits, each r and method at the best of its learning rates by validation score.

Test: for each ground. Near: at r = 4 and at r = 8 the 90 % t interval of LoRA − full over seeds
lies above −.02 (one side of an equivalence test; being better does not count against it).
Diminishing: the 95 % interval of (r = 8 over r = 1) − (r = 64 over r = 8), three doublings each, is
above 0. Formula, for r ≥ 2, levels of seeds taken out: c > 0 by its 95 % interval, and its AIC at
most 2 above the best of constant, a + b log r, a − b r^−p and a − b exp(−r/s); refuted where it is
more than 10 above, or c < 0.

Power: at a spread of .01 between paired seeds, 5 seeds show a lag of .034 (.014 beyond the margin)
with a chance of .8, and a difference of gains of .03.

Cost: none of its own; the shared grids of MiniLM and digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, SMOKE, best, full, head, lora
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import Fit, Interval, fit_curve, paired, t_interval, units_needed

SWEEP = {
    "smoke": SMOKE,
    "paper": [line(ground) for ground in (MINILM, DIGITS) for line in (head, full, lora)],
}
NEAR, MARGIN = (4, 8), 0.02
CLOSE, FAR = 2, 10
"""Differences of AIC within which a form is as good as the best, and beyond which it is out."""

FORMS: dict[str, tuple[Callable[..., np.ndarray], dict[str, float]]] = {
    "constant": (lambda r, a: a + 0 * r, {"a": 0.8}),
    "a + b log r": (lambda r, a, b: a + b * np.log(r), {"a": 0.8, "b": 0.0}),
    "a − b r^−p": (lambda r, a, b, p: a - b * r ** -np.abs(p), {"a": 0.8, "b": 0.1, "p": 1.0}),
    "a − b exp(−r/s)": (
        lambda r, a, b, s: a - b * np.exp(-r / (1e-3 + np.abs(s))),
        {"a": 0.8, "b": 0.1, "s": 4.0},
    ),
}


def rows(found: Found) -> pd.DataFrame:
    """Scores at the best rates, α = 2r."""
    runs = best(found.runs)
    own = runs[(runs["adapter"] != "lora") | (runs["adapter.alpha"] == 2 * runs["adapter.r"])]
    own = own.rename(columns={"adapter.r": "r", "train.lr": "lr"})
    return own[["run_id", "model", "adapter", "r", "seed", "score", "lr", "edge"]]


def _scores(own: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Scores by seed and r, and of full fine-tuning by seed."""
    of = own[own["adapter"] == "lora"]
    whole = own[own["adapter"] == "full"].set_index("seed")["score"]
    return of.pivot_table(index="seed", columns="r", values="score"), whole


def _against_full(by: pd.DataFrame, whole: pd.Series, r: float, level: float = 0.9) -> Interval:
    return t_interval((by[r] - whole).dropna() if r in by else (), level)


def _formula(by: pd.DataFrame, whole: pd.Series) -> tuple[dict[str, Fit], Fit | None]:
    """Fits of the rival forms and of full − c/log r, on the same points."""
    ranks = [r for r in by if float(str(r)) >= 2]
    own = by[ranks].dropna().to_numpy(float)
    y = own - own.mean(1, keepdims=True) + own.mean() if own.size else own
    r = np.tile(np.array(ranks, dtype=float), len(y))
    level = float(whole.mean())
    forms = FORMS | {"text": (lambda r, c: level - c / np.log(r), {"c": 0.0})}
    fits = {}
    for name, (curve, start) in forms.items():
        try:
            fits[name] = fit_curve(curve, r, y.ravel(), start)
        except (WrongInput, ValueError):
            continue  # too few points, or no end: not a rival
    return fits, fits.pop("text", None)


def _form_outcome(fits: dict[str, Fit], text: Fit | None) -> str:
    if text is None or not fits:
        return "unresolved"
    worse = text.aic - min(fit.aic for fit in fits.values())
    c = text.parameters["c"]
    if worse > FAR or c.high < 0:
        return "refuted"
    return "supported" if worse <= CLOSE and c.low > 0 else "unresolved"


def _gains(by: pd.DataFrame) -> Interval:
    """How much more r = 1 to 8 gains than r = 8 to 64."""
    if not {1, 8, 64} <= set(by.columns):
        return t_interval([])
    return t_interval((2 * by[8] - by[1] - by[64]).dropna())


def verdict(table: pd.DataFrame) -> Verdict:
    """Four statements on each ground."""
    parts, clauses = [], []
    first = t_interval([])
    for model, own in table.groupby("model"):
        by, whole = _scores(own)
        lags = [_against_full(by, whole, r) for r in NEAR]
        gains, (fits, text) = _gains(by), _formula(by, whole)
        parts += [against(lag, -MARGIN) for lag in lags]
        parts += [against(gains, 0.0), _form_outcome(fits, text)]
        first = first if np.isfinite(first.value) else lags[1]
        said = " and ".join(
            f"{100 * lag.value:+.1f} [{100 * lag.low:.1f}, {100 * lag.high:.1f}] at r = {r}"
            for r, lag in zip(NEAR, lags, strict=True)
        )
        words = f"on {model} LoRA − full is {said} points, r = 1 to 8 gains {100 * gains.value:.1f}"
        words += f" [{100 * gains.low:.1f}, {100 * gains.high:.1f}] points more than r = 8 to 64"
        if text is not None and fits:
            name = min(fits, key=lambda form: fits[form].aic)
            c = text.parameters["c"]
            words += f", full − c/log r (c = {c.value:.3f} [{c.low:.3f}, {c.high:.3f}]) has an AIC "
            words += f"{text.aic - fits[name].aic:+.1f} against the best rival, {name}"
        edges = int(own.loc[own["edge"].astype(bool), ["adapter", "r"]].drop_duplicates().shape[0])
        words += f" ({edges} best rates at the edge of their grid)" * bool(edges)
        clauses.append(words)
    outcome = together(parts)
    said = (
        f"With {parts.count('supported')} of {len(parts)} parts supported: {'; '.join(clauses)}; "
    )
    said += "at r = 1 the formula is undefined."
    if outcome == "unresolved":
        said = said[:-1] + f"; {_needed(table)}."
    seeds = table["seed"].nunique()
    return Verdict(outcome, said, first.value, first[1:], n_seeds=seeds, effect=first.value)


def _needed(table: pd.DataFrame) -> str:
    """Seeds for the widest comparison with full fine-tuning."""
    spreads = []
    for _, own in table.groupby("model"):
        by, whole = _scores(own)
        lags = [(by[r] - whole).dropna() for r in NEAR if r in by]
        spreads += [paired(lag).sd for lag in lags if len(lag) > 1]
    worst = max(spreads, default=0.0)
    if not worst:
        return "a spread needs at least 2 seeds"
    try:
        return f"{units_needed(MARGIN, worst)} seeds would show a lag of {MARGIN}"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Curves that follow the formula, that bend the other way, or that drown in noise."""
    ranks, seeds = np.array([1, 2, 4, 8, 16, 32, 64]), 5
    with np.errstate(divide="ignore"):
        text = np.where(ranks == 1, -0.03, -0.01 / np.log(ranks))
    convex = 0.1 * (np.log2(ranks) / 6) ** 2 - 0.1
    frames = []
    for model in ("digits_vit", "minilm"):
        wrong = outcome == "refuted" or (outcome == "mixed" and model == "minilm")
        noise = rng.normal(0, 0.1 if outcome == "unresolved" else 0.001, (seeds, len(ranks)))
        score = 0.8 + (convex if wrong else text) + noise
        whole = rng.normal(0, 0.1 if outcome == "unresolved" else 0.001, seeds)
        whole += (score.mean() if outcome == "unresolved" else 0.8) - whole.mean()
        at = np.tile(ranks, seeds)
        of = np.repeat(np.arange(seeds), len(ranks))
        frames += [
            pd.DataFrame({"adapter": "lora", "r": at, "seed": of, "score": score.ravel()}),
            pd.DataFrame({"adapter": "full", "seed": range(seeds), "score": whole}),
        ]
        frames[-2:] = [frame.assign(model=model) for frame in frames[-2:]]
    return pd.concat(frames, ignore_index=True).assign(lr=1e-3, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Score over r beside full fine-tuning and the formula."""
    grounds = list(table.groupby("model"))
    picture, axes = canvas(5 * len(grounds), 4, 1, len(grounds))
    for ax, (model, own) in zip(axes[0], grounds, strict=True):
        by, whole = _scores(own)
        found = [t_interval(by[r].dropna()) for r in by]
        spread = np.nan_to_num([[f.value - f.low, f.high - f.value] for f in found]).T
        ax.errorbar(by.columns, [f.value for f in found], spread, marker="o", label="LoRA, α = 2r")
        level, low, high = t_interval(whole.dropna())
        ax.axhline(level, color="#d55e00", label="full")
        if np.isfinite(low):
            ax.axhspan(low, high, color="#d55e00", alpha=0.15, lw=0)
        text = _formula(by, whole)[1]
        if text is not None:
            r = np.geomspace(2, 64)
            c = text.parameters["c"].value
            ax.plot(r, level - c / np.log(r), ls="--", color="grey", label="full − c/log r")
        ax.set_xscale("log")
        ax.set_xticks(list(by.columns), [f"{r:g}" for r in by])
        ax.set_xlabel("r")
        ax.set_ylabel("test score")
        ax.set_title(model, fontsize=10, loc="left")
        ax.legend(fontsize=8)
    note = "Bars and band: 95 % t intervals over seeds. The formula has no value at r = 1."
    return finish(picture, "How much r buys", note)
