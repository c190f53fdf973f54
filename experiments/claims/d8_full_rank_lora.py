"""D8: LoRA without a limit on the rank.

Claim: at r = min(d, k) LoRA is equivalent to full fine-tuning.

Decided by: four readings of equivalent. Set: full updates are of the form sBA with that r. Score:
of LoRA at r = 64 = min(d, k) (α = 2r) against full fine-tuning, each at its best rate, on digits
and on planted problems of width 64. Update: the cosine of the two dW of a seed, all layers
together. Path: the cosine of their first steps of gradient descent on all digits, from Kaiming's A;
from an orthogonal A it is shown.

Test: set: algebra; only a fault could leave an update out. Score: an equivalence test (TOST, margin
.02) over seeds, refuted where the 90 % t interval lies outside ±.02; for each ground. Update (each
ground) and path: the same if the 95 % t interval of the cosine lies above .9, refuted if below.

Power: at a spread of .01 between paired seeds, 5 seeds accept true equality with a chance of .9.

Cost: 15 runs of one step on digits (5 shared with C9) and 30 on planted, a second each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.claims.c9_learned_subspace import GRADIENT, STEP
from experiments.grids import DIGITS, PLANTED, SEEDS, best, full, lora
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Update, decompose
from lora_lab.registry import WrongInput
from lora_lab.stats import equivalence, paired, t_interval, units_needed

R, MARGIN, SAME = 64, 0.02, 0.9
_FIRST = f"{DIGITS.replace('train.epochs=10', STEP)} adapter=lora adapter.r={R}"
_SMALL = f"{PLANTED} data.width=64 data.seed=${{seed}} train.epochs=10 train.lr=1e-3,3e-3,1e-2"
_TINY = "model=planted data=planted size=smoke data.width=64"
SWEEP = {
    "smoke": [f"{_TINY} adapter=full", f"{_TINY} adapter=lora adapter.r={R}"],
    "paper": [
        full(DIGITS),
        lora(DIGITS, ranks=str(R)),
        GRADIENT,
        f"{_FIRST} adapter.init=kaiming,orthogonal {SEEDS}",
        f"{_SMALL} adapter=full {SEEDS}",
        f"{_SMALL} adapter=lora adapter.r={R} {SEEDS}",
    ],
}
WEIGHTS = True


def rows(found: Found) -> pd.DataFrame:
    """A row for each pair of a full and a LoRA run of one ground and seed."""
    runs = found.runs[found.runs["status"] == "done"]
    single = runs["train.optimizer"] == "sgd"
    trained = best(runs[~single]).assign(part="end")
    first = runs[single].assign(part="first step", edge=False)
    both = pd.concat([trained, first], ignore_index=True)
    out = []
    for _, own in both.groupby(["part", "model", "seed"]):
        whole = own[own["adapter"] == "full"]
        for low in own[own["adapter"] == "lora"].to_dict("records") if len(whole) else ():
            out.append(_pair(found, whole.iloc[0], low))
    return pd.DataFrame(out)


def _pair(found: Found, whole: pd.Series, low: Mapping[Any, Any]) -> dict[str, Any]:
    theirs, ours = found.updates(whole["run_id"]), found.updates(low["run_id"])
    spectra = [decompose(update, vectors=True) for update in theirs.values()]
    left = [
        np.linalg.norm(update.dense() - s.truncate(s.q).dense()) / np.linalg.norm(update.dense())
        for update, s in zip(theirs.values(), spectra, strict=True)
    ]
    return {
        "run_id": f"{low['run_id']}+{whole['run_id']}",
        **{name: low[name] for name in ("part", "model", "seed")},
        "init": low["adapter.init"],
        "lora": low["score"],
        "full": whole["score"],
        "lora_lr": low["train.lr"],
        "full_lr": whole["train.lr"],
        "edge": bool(low["edge"] or whole["edge"]),
        "cosine": _cosine(theirs, ours),
        "outside": float(max(left)),
    }


def _cosine(one: dict[str, Update], other: dict[str, Update]) -> float:
    """Of all layers' updates as one vector."""
    shared = [name for name in one if name in other]
    x, y = (np.concatenate([of[n].dense().ravel() for n in shared]) for of in (one, other))
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def _score(own: pd.DataFrame) -> tuple[str, str]:
    """Outcome and words of the equivalence test."""
    gap = (own["lora"] - own["full"]).dropna()
    if len(gap) < 2:
        return "unresolved", "an amount that one seed cannot bound"
    p, span = equivalence(gap, 0.0, MARGIN), t_interval(gap, level=0.9)
    outside = span.low > MARGIN or span.high < -MARGIN
    outcome = "supported" if p < 0.05 else "refuted" if outside else "unresolved"
    return outcome, f"{100 * span.value:+.1f} [{100 * span.low:.1f}, {100 * span.high:.1f}] points"


def verdict(table: pd.DataFrame) -> Verdict:
    """Scores, updates, path; of the set only a fault could break it."""
    exact = bool((table["outside"] < 1e-10).all())
    parts, clauses = [], []
    end = table[table["part"] == "end"]
    cosine, gap = t_interval([]), pd.Series(dtype=float)
    for model, own in end.groupby("model"):
        outcome, words = _score(own)
        cosine, gap = t_interval(own["cosine"].dropna()), (own["lora"] - own["full"]).dropna()
        parts += [outcome, against(cosine, SAME)]
        span = f"{cosine.value:.2f} [{cosine.low:.2f}, {cosine.high:.2f}]"
        clauses.append(
            f"on {model} the score differs by {words} ({parts[-2]}) and the updates have a cosine "
            f"of {span} ({parts[-1]})"
        )
    first = table[table["part"] == "first step"]
    for init, own in first.groupby("init"):
        step = t_interval(own["cosine"].dropna())
        if init == "kaiming":
            parts.append(against(step, SAME))
        span = f"{step.value:.2f} [{step.low:.2f}, {step.high:.2f}]"
        clauses.append(f"the first steps have a cosine of {span} from an A of init {init}")
    said = f"At r = {R} {'every' if exact else 'not every'} full update is in LoRA's set; "
    said += "; ".join(clauses)
    edges = int(end.groupby("model")["edge"].any().sum()) if len(end) else 0
    said += f"; best rates lie at the edge of their grid on {edges} grounds" * bool(edges)
    outcome = together(parts) if exact and parts else "unresolved" if exact else "refuted"
    if outcome == "unresolved":
        said += f"; {_needed(gap)}"
    seeds = table["seed"].nunique()
    p = paired(gap).p if len(gap) else np.nan
    return Verdict(outcome, said + ".", cosine.value, cosine[1:], p, seeds, cosine.value)


def _needed(gap: pd.Series) -> str:
    spread = float(gap.std()) if len(gap) > 1 else 0.0
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        return f"{units_needed(MARGIN, spread)} seeds would show a difference of {MARGIN}"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """The same in everything, in nothing, in the score alone, or too scattered to say."""
    gap, cosine, scatter = {
        "supported": (0.0, 0.98, 0.003),
        "refuted": (-0.1, 0.3, 0.003),
        "mixed": (0.0, 0.3, 0.003),
        "unresolved": (0.0, 0.9, 0.08),
    }[outcome]
    cells = [("end", "digits_vit", "kaiming"), ("end", "planted", "kaiming")]
    cells += [("first step", "digits_vit", init) for init in ("kaiming", "orthogonal")]
    out = []
    for part, model, init in cells:
        # Seeds whose noise sums to 0: nothing to find is not found by chance.
        spread = [rng.permutation(np.linspace(-1.5, 1.5, 5)) for _ in range(2)]
        for seed, noise in enumerate(scatter * np.array(spread).T):
            row = {"part": part, "model": model, "init": init, "seed": seed, "full": 0.9}
            out.append(row | {"lora": 0.9 + gap + noise[0], "cosine": cosine + noise[1]})
    return pd.DataFrame(out).assign(outside=1e-15, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Scores and cosines of pairs."""
    picture, [[left, right]] = canvas(10, 4, 1, 2)
    end = table[table["part"] == "end"]
    for x, (_, own) in enumerate(end.groupby("model")):
        left.scatter(np.full(len(own), x), own["lora"] - own["full"], s=16)
    left.axhspan(-MARGIN, MARGIN, color="grey", alpha=0.15, lw=0)
    left.set_xticks(range(end["model"].nunique()), sorted(end["model"].unique()))
    left.set_ylabel(f"test score, LoRA at r = {R} − full")
    cells = table.groupby(["part", "model", "init"])
    for x, (_, own) in enumerate(cells):
        right.scatter(np.full(len(own), x), own["cosine"], s=16)
    right.axhline(SAME, color="grey", lw=1, ls="--")
    right.set_ylim(min(0.0, float(table["cosine"].min())), 1.05)
    right.set_xticks(
        range(len(cells)), ["\n".join(map(str, name)) for name, _ in cells], fontsize=8
    )
    right.set_ylabel("cosine of the two updates")
    note = "Grey: the margin of equivalence; dashed: what counts as the same. Points: seeds."
    return finish(picture, "LoRA at full rank beside full fine-tuning", note)
