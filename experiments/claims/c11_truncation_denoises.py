"""C11: truncating a full update.

Claim: small singular values of an update are noise; dropping them can help.

Decided by: full fine-tuning (best rate), its score with every layer's update truncated to k
directions (head as trained) less its score untruncated: on planted (rank 4, noise as strong as the
signal; 256 and 4,096 examples, another problem a seed), on digits (32 and 508 images, another split
a seed) and on MiniLM. k is chosen for each seed by the mean of the other seeds, so that no score is
both chosen by and reported; on MiniLM all seeds share one test set, which favours the claim a
little.

Test: for each ground and size a t test over seeds of that gain, adjusted over the sizes of a ground
(Holm). A ground supports the claim where a size has adjusted p < .05 and a gain above 0; it refutes
it where at every size the whole 95 % interval lies below +.005; else it is unresolved.

Power: at a spread of .01 between seeds, 5 seeds show a gain of .02 with a chance of .9 (.8 for two
sizes).

Cost: 30 runs on digits and 20 on planted, two seconds each; MiniLM's are of the shared grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, PLANTED, SEEDS, SMOKE, best, full
from lora_lab.claims import Found, Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import holm, paired, t_interval, units_needed

SMALL = 0.005
"""A gain that is no help."""
_TEN = "train.epochs=10"
_DIGITS = [
    f"{DIGITS.replace(_TEN, f'train.epochs={epochs}')} data.train_examples={n} "
    f"data.seed=${{seed}} adapter=full train.lr=5e-4,2e-3,5e-3 {SEEDS}"
    for n, epochs in {32: 160, 508: 10}.items()
]
_PLANTED = [
    f"{PLANTED} data.width=64 data.noise=1 data.train_examples={n} data.seed=${{seed}} "
    f"train.epochs={epochs} adapter=full train.lr=1e-3,3e-3 {SEEDS}"
    for n, epochs in {256: 32, 4096: 4}.items()
]
SWEEP = {"smoke": SMOKE[:1], "paper": [*_PLANTED, *_DIGITS, full(MINILM)]}


def rows(found: Found) -> pd.DataFrame:
    """Oracle scores of the runs at the best rates."""
    runs = found.runs.rename(columns={"data.train_examples": "n"})
    chosen = best(runs, ("model", "n")).rename(columns={"train.lr": "lr"})
    own = found.measures[
        (found.measures["measure"] == "oracle_score") & (found.measures["side"] == "trained_head")
    ]
    own = own[["run_id", "k", "value"]].rename(columns={"value": "truncated"})
    return chosen[["run_id", "model", "n", "seed", "score", "lr", "edge"]].merge(own, on="run_id")


def _gains(own: pd.DataFrame) -> pd.DataFrame:
    """Score at k less the untruncated one: a row a seed, a column for each k below the last."""
    by = own.pivot_table(index="seed", columns="k", values="truncated").dropna()
    return by.sub(by[by.columns.max()], axis=0).drop(columns=by.columns.max())


def _chosen(own: pd.DataFrame) -> pd.Series:
    """Gain of each seed at the k that the other seeds choose; none from a single seed."""
    gains = _gains(own)
    if len(gains) < 2:
        return pd.Series(dtype=float)
    others = {seed: gains.drop(index=seed).mean() for seed in gains.index}
    return pd.Series({seed: gains.loc[seed, mean.idxmax()] for seed, mean in others.items()})


def _ground(own: pd.DataFrame) -> tuple[str, str, float]:
    """Outcome, words, and the largest spread of one ground."""
    cells = {float(str(n)): _chosen(cell) for n, cell in own.groupby("n")}
    cells = {n: gain for n, gain in cells.items() if len(gain) > 1}
    if not cells:
        return "unresolved", "has one seed", 0.0
    tests = {n: paired(gain) for n, gain in cells.items()}
    p = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    helped = [n for n, test in tests.items() if p[n] < 0.05 and test.mean > 0]
    none = all(test.high < SMALL for test in tests.values())
    outcome = "supported" if helped else "refuted" if none else "unresolved"
    words = ", ".join(
        f"{100 * test.mean:+.1f} [{100 * test.low:.1f}, {100 * test.high:.1f}] with {n:g} examples"
        f" (adjusted p = {p[n]:.2g})"
        for n, test in tests.items()
    )
    return outcome, f"{words}: {outcome}", max(test.sd for test in tests.values())


def verdict(table: pd.DataFrame) -> Verdict:
    """One outcome a ground."""
    found = {str(model): _ground(own) for model, own in table.groupby("model")}
    outcome = together(outcome for outcome, _, _ in found.values())
    said = "Truncating at the k that other seeds choose gains, in points, " + "; ".join(
        f"on {model} {words}" for model, (_, words, _) in found.items()
    )
    edges = table.loc[table["edge"].astype(bool), ["model", "n"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    if outcome == "unresolved":
        said += f"; {_needed(max(spread for _, _, spread in found.values()))}"
    model = "minilm" if "minilm" in found else next(iter(found))
    gain = _chosen(table[table["model"] == model])
    span, seeds = t_interval(gain), table["seed"].nunique()
    p = paired(gain).p if len(gain) else np.nan
    return Verdict(outcome, said + ".", span.value, span[1:], p, n_seeds=seeds, effect=span.value)


def _needed(spread: float) -> str:
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        return f"{units_needed(0.01, spread)} seeds would show a gain of .01"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """A best k inside on all grounds, on none, on planted alone, or now so, now not."""
    swings = rng.permutation([-2, -1, 0, 1, 2])
    sizes = {"digits_vit": (32, 508), "minilm": (2048,), "planted": (256, 4096)}
    out = []
    for model, ns in sizes.items():
        helps = outcome == "supported" or (outcome == "mixed" and model == "planted")
        for n in ns:
            for seed in range(5):
                for k in (0, 1, 4, 16, 64):
                    level = {0: -0.3, 1: -0.1, 4: 0.05 if helps else -0.05, 16: -0.02, 64: 0.0}[k]
                    if outcome == "unresolved" and k == 16:
                        level = 0.01 + 0.03 * swings[seed]
                    value = 0.7 + level + 0.001 * rng.standard_normal() * (k < 64)
                    row = {"model": model, "n": n, "seed": seed, "k": k, "truncated": value}
                    out.append(row)
    return pd.DataFrame(out).assign(score=0.7, lr=1e-3, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Gain over k, for each ground and size."""
    grounds = list(table.groupby("model"))
    picture, axes = canvas(4.5 * len(grounds), 4, 1, len(grounds))
    for ax, (model, own) in zip(axes[0], grounds, strict=True):
        for n, cell in own.groupby("n"):
            gains = _gains(cell).loc[:, lambda g: g.columns > 0]
            line = ax.plot(gains.columns, gains.mean(), marker="o", ms=4, label=f"{n:,.0f}")[0]
            for _, seed in gains.iterrows():
                ax.plot(gains.columns, seed, lw=0.6, alpha=0.4, color=line.get_color())
        ax.axhline(0, color="grey", lw=1)
        ax.set_xscale("log")
        ax.set_xticks(list(gains.columns), [f"{k:g}" for k in gains.columns])
        lowest = own.loc[own["k"] > 1, "truncated"].min() - own["truncated"].max()
        ax.set_ylim(max(lowest, -0.15) - 0.01, None)
        ax.set_xlabel("k, directions kept")
        ax.set_ylabel("score of W0 + dW_k − of W0 + dW")
        ax.set_title(model, fontsize=10, loc="left")
        ax.legend(title="training examples", fontsize=8, title_fontsize=8)
    note = "Above the grey line truncation helps. Thick: means over seeds; thin: seeds."
    return finish(picture, "Whether dropping small directions helps", note)
