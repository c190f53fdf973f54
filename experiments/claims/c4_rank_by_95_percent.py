"""C4: ways to choose r from a full fine-tuning.

Claim: fine-tune a small portion fully and take the r at which 95 % of the variance of ΔW is
explained, rather than trying r = 4, 8, 16, 32 and taking the smallest that is near full.

Decided by: tasks of which the needed r is found by search: the smallest of r = 1, 2, 4 … (α = 2r,
best rate) whose score is within .02 of full fine-tuning. Planted: true rank 1 to 32, little and
much noise, flat and decaying spectra; digits near, far, and with a quarter of the data; MiniLM.
From the full fine-tunings each policy of `lora-lab suggest-rank` says an r for all layers: energy
95 % (of all data, and of a quarter of them), effective rank, stable rank, edge of noise, directions
that seeds share, oracle (the smallest truncation within .02 on the validation split); beside them
trying 4, 8, 16, 32, and r = 8 unseen. An r is right if, rounded up to a power of 2, it is the
needed one or twice that.

Test: intervals over tasks. Energy (all data) is right: the mean of |log₂(r / needed)| lies below 1,
a factor of 2 (95 % t interval). It beats trying: that mean less the same of trying lies below 0
(trying is judged by the runs that say what is needed: where that is 4 to 32 it cannot miss).
Needed r: the 90 % t interval over seeds of LoRA − full lies above −.02, one side of an equivalence
test; twice the largest that was tried where none is. Rates of right ones have Wilson intervals.

Power: with 12 tasks and a spread of 1.5 doublings a mean is known to ± 1. Planted scores repeat to
.005, so that 3 problems a task tell; 5 seeds elsewhere.

Cost: 350 runs of its own, on planted and digits, about a second each: each task is a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import seeds_to_tell, spread
from experiments.grids import DIGITS, MINILM, PLANTED, SEEDS, best, full, lora
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.config import Host
from lora_lab.figures import canvas, final, finish
from lora_lab.policies import MARGIN, overall, policy_ranks
from lora_lab.stats import rate_interval
from lora_lab.suggesting import from_runs

TRIED = (4, 8, 16, 32)
_PLANTED = [
    f"{PLANTED} data.width=64 data.true_r={r} data.noise={noise}{decay} data.seed={i} "
    "seed=0,1,2"
    for i, (r, noise, decay) in enumerate((
        (1, 0.1, ""), (4, 0.1, ""), (4, 1, ""), (16, 0.1, ""), (16, 1, ""), (32, 0.1, ""),
        (16, 0.1, " data.decay=0.7"), (32, 1, " data.decay=0.9"),
    ))
]  # fmt: skip
_LORA = "adapter=lora adapter.r=1,2,4,8,16,32"
_QUARTER = DIGITS.replace("train.epochs=10", "train.epochs=40") + " data.train_examples=128"
_FAR, _FAR_QUARTER = f"{DIGITS} data.task=1", f"{_QUARTER} data.task=1"
_DIGITS = [
    line
    for ground in (_FAR, _QUARTER)
    for line in (
        f"{ground} adapter=full train.lr=5e-4,2e-3,5e-3 {SEEDS}",
        f"{ground} {_LORA} train.lr=3e-3,1e-2 {SEEDS}",
    )
]
SWEEP = {
    "smoke": [
        "model=planted data=planted size=smoke adapter=full",
        "model=planted data=planted size=smoke adapter=lora adapter.r=1,4",
    ],
    "paper": [
        *(line(ground) for ground in (MINILM, DIGITS) for line in (full, lora)),
        *_DIGITS,
        f"{_FAR_QUARTER} adapter=full train.lr=2e-3 {SEEDS}",
        *(f"{task} train.epochs=8 adapter=full train.lr=3e-3" for task in _PLANTED),
        *(f"{task} train.epochs=8 {_LORA} train.lr=1e-2" for task in _PLANTED),
        *(
            f"{task} train.epochs=32 data.train_examples=512 adapter=full train.lr=3e-3"
            for task in _PLANTED
        ),
    ],
}
WEIGHTS = True
ENERGY, PORTION, TRY, EIGHT = "energy", "energy, a quarter", "try", "r = 8"


def rows(found: Found) -> pd.DataFrame:
    """What each policy says of each task, and what it needs."""
    runs = found.runs.rename(columns={"adapter.r": "r", "adapter.alpha": "alpha"})
    runs = runs[(runs["adapter"] == "full") | (runs["alpha"] == 2 * runs["r"])]
    names = [_task(run) for run in runs.to_dict("records")]
    runs = runs.assign(task=[name for name, _ in names], n=[n for _, n in names])
    chosen = best(runs, ("task", "n", "adapter", "r"))
    out: list[dict[str, Any]] = []
    for (task, n), own in chosen.groupby(["task", "n"]):
        whole, search = own[own["adapter"] == "full"], own[own["adapter"] == "lora"]
        if whole.empty or search.empty:
            continue
        needed, near = _needed(whole, search)
        said = _policies(found, whole)
        part = chosen[(chosen["task"] == task) & (chosen["n"] < n) & (chosen["adapter"] == "full")]
        if len(part):
            measures = final(found.measures, part["run_id"])
            said[PORTION] = float(overall(policy_ranks(measures, ENERGY)))
        passed = [r for r in TRIED if near.get(r, False)]
        said |= {TRY: float(min(passed, default=TRIED[-1])), EIGHT: 8.0}
        about = {
            "run_id": "+".join(whole["run_id"]),
            "task": task if n == 1 else f"{task}, a quarter",
            "known": whole["model"].iloc[0] == "planted",
            "needed": needed,
            "seeds": len(whole),
            "edge": bool(own["edge"].any()),
            "trainings": sum(r <= said[TRY] for r in TRIED),
        }
        out += [about | {"policy": name, "r": r} for name, r in said.items()]
    return pd.DataFrame(out, columns=COLUMNS)


COLUMNS = ["run_id", "task", "known", "needed", "seeds", "edge", "trainings", "policy", "r"]


def _task(run: Mapping[Any, Any]) -> tuple[str, float]:
    """The task of a run, and the share of its data."""
    if run["model"] == "planted":
        kind = f"rank {run['data.true_r']:g}, noise {run['data.noise']:g}"
        kind += f", decay {run['data.decay']:g}" * (run["data.decay"] < 1)
        return kind, 0.25 if run["data.train_examples"] == 512 else 1.0
    if run["model"] == "minilm":
        return "MiniLM", 1.0
    kind = "digits, far" if float(run["data.task"]) > 0 else "digits"
    return kind, 1.0 if pd.isna(run["data.train_examples"]) else 0.25


def _needed(whole: pd.DataFrame, search: pd.DataFrame) -> tuple[float, dict[float, bool]]:
    """The smallest r near full fine-tuning, and which are near."""
    level = whole.set_index("seed")["score"]
    near = {
        float(str(r)): spread(own.set_index("seed")["score"] - level, 0.9).low > -MARGIN
        for r, own in search.groupby("r")
    }
    return min((r for r, ok in near.items() if ok), default=2 * max(near)), near


def _policies(found: Found, whole: pd.DataFrame) -> dict[str, float]:
    """r for all layers by policy, as `lora-lab suggest-rank` says it of these runs."""
    advice = from_runs(found.store, whole["run_id"].tolist(), Host(device="cpu"))
    return {name: float(overall(ranks)) for name, ranks in advice.ranks.items()}


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `off`, doublings from the needed r, and `right`."""
    off = np.log2(table["r"] / table["needed"])
    grid = 2 ** np.ceil(np.log2(table["r"]) - 1e-9)
    right = (grid >= table["needed"]) & (grid <= 2 * table["needed"])
    return table.assign(off=off, right=right.where(table["r"].notna()))


def verdict(table: pd.DataFrame) -> Verdict:
    """Whether 95 % of the energy is right, and beats trying."""
    found = judge(table)
    far = found.assign(far=found["off"].abs()).pivot_table(
        index="task", columns="policy", values="far"
    )
    far = far.reindex(columns=[ENERGY, TRY])
    miss, gap = far[ENERGY].dropna(), (far[ENERGY] - far[TRY]).dropna()
    off, beats = spread(miss), spread(gap)
    parts = [against(off, 1.0, more=False), against(beats, 0.0, more=False)]
    rates, told = {}, []
    for policy, own in found[found["right"].notna()].groupby("policy", sort=False):
        hits = own["right"].astype(bool)
        rate = rate_interval(int(hits.sum()), len(hits))
        real = hits[~own["known"].astype(bool)]
        rates[f"{policy} {hits.sum()}/{len(hits)}"] = rate.value
        told.append(
            f"{policy}: right in {hits.sum()} of {len(hits)} tasks [{rate.low:.2f}, "
            f"{rate.high:.2f}], in {real.sum()} of {len(real)} real ones"
        )
    order = sorted(rates, key=lambda words: -rates[words])
    trainings = table.drop_duplicates("task")["trainings"].mean()
    said = (
        f"95 % of the energy misses the needed r by {off.value:.1f} [{off.low:.1f}, "
        f"{off.high:.1f}] doublings ({parts[0]}), {beats.value:+.1f} [{beats.low:.1f}, "
        f"{beats.high:.1f}] against trying 4, 8, 16, 32 ({parts[1]}), which takes "
        f"{trainings:.1f} trainings of LoRA. Right are {', '.join(order)} tasks."
    )
    outcome = together(parts)
    if outcome == "unresolved":
        said += f" Of tasks instead of seeds, {seeds_to_tell(miss, 1.0)}."
    n = int(table["seeds"].min()) if len(table) else 0
    interval = (off.low, off.high)
    return Verdict(
        outcome, said, off.value, interval, n_seeds=n, effect=off.value, parts=tuple(told)
    )


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Tasks whose needed r energy finds, misses, finds no better than trying, or at times."""
    out = []
    for i in range(12):
        needed = float(2 ** (i % 3))
        factor = {"supported": 1.0, "refuted": 32.0, "mixed": 1.2}.get(outcome, 2.0 ** (i % 3))
        tried = needed if outcome in ("refuted", "mixed") else needed * 2.0 ** (i % 4)
        said = {ENERGY: needed * factor * np.exp(0.01 * rng.standard_normal()), TRY: tried}
        about = {"task": f"task {i}", "known": i < 8, "needed": needed, "seeds": 5, "edge": False}
        about["trainings"] = 2
        out += [about | {"policy": name, "r": r} for name, r in said.items()]
    return pd.DataFrame(out)


def figure(table: pd.DataFrame) -> Any:
    """How many doublings each policy is from what each task needs."""
    found = judge(table)
    policies = list(found["policy"].unique())
    picture, [[ax]] = canvas(10, 4.5)
    rng = np.random.default_rng(0)  # of the places of points that would hide each other
    for x, policy in enumerate(policies):
        own = found[found["policy"] == policy]
        for known, colour in ((True, "#0072b2"), (False, "#d55e00")):
            of = own.loc[own["known"].astype(bool) == known, "off"].dropna()
            label = ("planted" if known else "real") if x == 0 else None
            at = x + rng.uniform(-0.2, 0.2, len(of))
            ax.scatter(at, of, s=18, color=colour, alpha=0.7, label=label)
        right = own["right"].dropna().astype(bool)
        if len(right):
            words = f"{right.sum()}/{len(right)}"
            ax.annotate(
                words, (x, 1.0), xycoords=("data", "axes fraction"), ha="center", fontsize=8
            )
    ax.axhspan(0, 1, color="#009e73", alpha=0.12, lw=0)
    ax.set_xticks(range(len(policies)), policies, fontsize=8, rotation=15)
    ax.set_ylabel("log₂(r / needed r)")
    ax.legend(fontsize=8)
    note = (
        "Each point is a task. Green: the needed r, or at most twice that; above it r is wasted, "
    )
    note += "below it LoRA falls short. Above the axes: how often right, r rounded up to 2^i."
    return finish(picture, "What each policy says, against what the task needs", note)
