"""G2: Biderman et al. 2024, LoRA Learns Less and Forgets Less.

Claim: 90 % of the energy of a full update needs at least 10 × 8 directions, near half of all q; the
number grows over training; it is higher in the MLP than in attention; Gaussian noise has a similar
spectrum; LoRA forgets less than full fine-tuning.

Decided by: energy_rank(.9) of full updates on MiniLM (mean over layers, best rate), by module, and
over a Gaussian matrix's of the same shape; its course over the steps of full fine-tuning on digits;
accuracy on the digits of pre-training, with the head of pre-training, after LoRA (r = 16, α = 2r)
less that after full fine-tuning on the other digits, each at its best rate.

Test: 95 % t intervals over seeds. At least 80: energy_rank above 80. Near half: its share of q
within .5 ± .15. Grows: mean over seeds of the slope of ln energy_rank on ln step after the warm-up
(the first tenth; Adam's first steps are of high rank), above 0. MLP − attention above 0. Similar:
the ratio to Gaussian within 1 ± .1. Forgets less: difference above 0.

Power: spectra vary by 1 to 2 % between seeds, so 5 seeds place them far inside the margins; at a
spread of .02 between paired seeds they show a difference in forgetting of .034.

Cost: 5 runs of its own on digits, seconds each, shared with C6; the rest from the shared grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.curves import inside, slopes
from experiments.grids import DIGITS, MINILM, SEEDS, SMOKE, best, full, lora
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.data.digits import DigitsData, Half
from lora_lab.evaluation import evaluate
from lora_lab.execution import trained
from lora_lab.figures import canvas, finish
from lora_lab.models.digits_vit import DigitsViT
from lora_lab.preparation import Trained, restore
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval, paired, t_interval, units_needed
from lora_lab.targets import role

COURSE = DIGITS.replace("train.spectra=0", "train.spectra=8")
SWEEP = {
    "smoke": SMOKE,
    "paper": [
        full(MINILM),
        full(DIGITS),
        lora(DIGITS, ranks="4,16,64"),
        f"{COURSE} adapter=full train.lr=2e-3 {SEEDS}",
    ],
}
WEIGHTS = True
WARM = 0.1
"""Share of a run's steps over which the rate rises, `train.warmup`."""
LEAST, HALF, NEAR, SIMILAR, R = 80, 0.5, 0.15, 0.1, 16


def rows(found: Found) -> pd.DataFrame:
    """Energy ranks by module group, their course, and what is left of pre-training."""
    runs = found.runs.assign(adapter_r=found.runs["adapter.r"])
    course = runs[runs["train.spectra"] > 0]
    plain = runs if len(course) == len(runs) else runs[runs["train.spectra"] == 0]
    chosen = best(plain)
    measured = found.measures
    measured = measured[(measured["measure"] == "energy_rank") & (measured["k"] == 0.9)]
    return pd.concat(
        [_ranks(found, chosen, measured), _course(course, measured), _kept(found, chosen)],
        ignore_index=True,
    )


def _ranks(found: Found, runs: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    own = measured[measured["run_id"].isin(runs.loc[runs["adapter"] == "full", "run_id"])]
    own = own[own["step"] == own.groupby("run_id")["step"].transform("max")]
    q = found.spectra.groupby("layer")["i"].max().rename("q")
    own = own.merge(q, on="layer").merge(runs[["run_id", "model", "seed", "edge"]], on="run_id")
    own["group"] = np.where(own["layer"].map(role) == "mlp", "mlp", "attention")
    keys = ["run_id", "model", "seed", "edge", "group"]
    means = own.groupby(keys, as_index=False)[["value", "null", "q"]].mean()
    whole = own.groupby(keys[:-1], as_index=False)[["value", "null", "q"]].mean()
    return pd.concat([means, whole.assign(group="all")]).assign(part="rank", adapter="full")


def _course(runs: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    own = measured.merge(runs.loc[runs["adapter"] == "full", ["run_id", "model", "seed"]])
    keys = ["run_id", "model", "seed", "step"]
    return own.groupby(keys, as_index=False)[["value"]].mean().assign(part="course", adapter="full")


def _kept(found: Found, runs: pd.DataFrame) -> pd.DataFrame:
    own = runs[(runs["model"] == "digits_vit")]
    own = own[(own["adapter"] == "full") | (own["adapter.alpha"] == 2 * own["adapter.r"])]
    out = own[["run_id", "model", "adapter", "adapter.r", "seed", "score", "edge"]]
    out = out.rename(columns={"adapter.r": "r"})
    return out.assign(part="kept", value=[_remembered(found, one) for one in own["run_id"]])


def _remembered(found: Found, run_id: str) -> float:
    """Accuracy on the digits of pre-training, with its head, of what a run left of the base."""
    about = found.store.run(run_id).read_json("config")["config"]["model"]
    config = DigitsViT(start="", width=about["width"], depth=about["depth"])
    data = DigitsData(classes=Half.lower)
    problem = data.load()
    model = config.build(data, problem, dropout=0.0)
    restore(model.base, config.shapes(data), trained(found.store, about["start"]))
    head = found.store.run(about["start"]).read_tensors("head")
    with torch.no_grad():
        for name, parameter in model.classifier.named_parameters():
            parameter.copy_(torch.from_numpy(head[f"classifier.{name}"]))
    restore(model.base, config.shapes(data), Trained(found.updates(run_id)))
    return evaluate(model, config.encode(problem, "test", found.store.cache)).score


def _figures(table: pd.DataFrame) -> dict[str, Interval]:
    """The six numbers that decide, each with its interval."""
    rank = table[table["part"] == "rank"]
    # One ground decides the ranks: the real model where it was run.
    ground = "minilm" if "minilm" in set(rank["model"]) else next(iter(rank["model"]), "")
    rank = rank[rank["model"] == ground]
    whole = rank[rank["group"] == "all"]
    groups = rank.pivot_table(index="seed", columns="group", values="value")
    course = table[(table["part"] == "course") & (table["value"] > 0)]
    course = course[course["step"] >= WARM * course["step"].max()]
    course = course.assign(x=np.log(course["step"]), y=np.log(course["value"]))
    both = {"mlp", "attention"} <= set(groups)
    return {
        "rank": t_interval(whole["value"]),
        "share": t_interval(whole["value"] / whole["q"]),
        "growth": t_interval(slopes(course, "x", "y")),
        "modules": t_interval((groups["mlp"] - groups["attention"]).dropna() if both else []),
        "noise": t_interval((whole["value"] / whole["null"]).dropna()),
        "forgetting": t_interval(_forgetting(table)),
    }


def _forgetting(table: pd.DataFrame) -> pd.Series:
    """Accuracy kept by LoRA less that kept by full fine-tuning, by seed."""
    kept = table[table["part"] == "kept"]
    low = kept[(kept["adapter"] == "lora") & (kept["r"] == R)].set_index("seed")["value"]
    whole = kept[kept["adapter"] == "full"].set_index("seed")["value"]
    return pd.Series(low - whole).dropna()


def verdict(table: pd.DataFrame) -> Verdict:
    """Six inequalities."""
    found = _figures(table)
    parts = {
        "rank": against(found["rank"], LEAST),
        "share": inside(found["share"], HALF - NEAR, HALF + NEAR),
        "growth": against(found["growth"], 0.0),
        "modules": against(found["modules"], 0.0),
        "noise": inside(found["noise"], 1 - SIMILAR, 1 + SIMILAR),
        "forgetting": against(found["forgetting"], 0.0),
    }
    words = {
        "rank": "90 % of the energy takes {:.0f} [{:.0f}, {:.0f}] directions",
        "share": "{:.2f} [{:.2f}, {:.2f}] of all",
        "growth": "growing as step^{:.2f} [{:.2f}, {:.2f}]",
        "modules": "{:+.1f} [{:.1f}, {:.1f}] in the MLP over attention",
        "noise": "{:.2f} [{:.2f}, {:.2f}] times a Gaussian matrix's",
        "forgetting": "LoRA at r = 16 keeps {:+.3f} [{:.3f}, {:.3f}] more of the old accuracy",
    }
    said = ", ".join(f"{words[name].format(*found[name])} ({parts[name]})" for name in parts)
    outcome, gap = together(parts.values()), _forgetting(table)
    if outcome == "unresolved":
        said += f"; {_needed(gap)}"
    said = said[0].upper() + said[1:] + "."
    p = paired(gap).p if len(gap) else np.nan
    interval, n = found["forgetting"][1:], table["seed"].nunique()
    value = found["forgetting"].value
    return Verdict(outcome, said, value, interval, p, n_seeds=n, effect=value)


def _needed(gap: pd.Series) -> str:
    spread = float(gap.std()) if len(gap) > 1 else 0.0
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        return f"{units_needed(0.02, spread)} seeds would show a difference of .02 in forgetting"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Ranks, course and what is kept as the paper has them, or their opposites, or noise."""
    right, scatter = outcome in ("supported", "mixed"), 40.0 if outcome == "unresolved" else 1.0
    old = {"supported": 0.1, "refuted": -0.1, "mixed": -0.1, "unresolved": 0.0}[outcome]
    base, gap = (60.0, -10.0) if outcome == "refuted" else (192.0, 10.0 * right)
    ranks, course, kept = [], [], []
    for seed in range(5):
        noise = scatter * rng.standard_normal(3)
        values = {"all": base, "mlp": base + gap, "attention": base - gap}
        for (group, value), e in zip(values.items(), noise, strict=True):
            ranks.append({"group": group, "value": value + e, "seed": seed})
        for step in (8, 16, 32, 64):
            power = (0.2 if right else -0.2) * (outcome != "unresolved")
            value = 20 * step**power * np.exp(0.02 * scatter * rng.standard_normal())
            course.append({"step": step, "value": value, "seed": seed})
        spread = 0.005 * scatter * rng.standard_normal(2)
        kept.append({"adapter": "full", "value": 0.7 + spread[0], "seed": seed})
        kept.append({"adapter": "lora", "r": R, "value": 0.7 + old + spread[1], "seed": seed})
    null = 2 * base if outcome == "refuted" else base
    parts = [
        pd.DataFrame(ranks).assign(part="rank", model="minilm", q=384, null=null),
        pd.DataFrame(course).assign(part="course", model="digits_vit"),
        pd.DataFrame(kept).assign(part="kept", model="digits_vit"),
    ]
    return pd.concat(parts, ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Energy ranks by group, their course, and what is kept of pre-training."""
    picture, [[left, middle, right]] = canvas(12, 4, 1, 3)
    rank = table[table["part"] == "rank"]
    for x, (name, own) in enumerate(rank.groupby(["model", "group"])):
        left.scatter([x] * len(own), own["value"] / own["q"], s=14)
        left.scatter([x], (own["null"] / own["q"]).mean(), marker="_", s=300, color="grey")
        left.text(x, 0.02, "\n".join(map(str, name)), fontsize=7, ha="center")
    left.set_ylim(0, 1)
    left.set_xticks([])
    left.set_ylabel("energy_rank(.9) / q")
    for _, own in table[table["part"] == "course"].groupby("seed"):
        middle.plot(own["step"], own["value"], marker="o", ms=3)
    middle.set_xscale("log")
    middle.set_xlabel("step")
    middle.set_ylabel("energy_rank(.9), full, digits")
    kept = table[table["part"] == "kept"]
    labels = kept["adapter"].where(kept["r"].isna(), kept["r"].map("r = {:g}".format))
    for x, (_, own) in enumerate(kept.groupby(labels, sort=False)):
        right.scatter([x] * len(own), own["value"], s=14)
    right.set_xticks(range(labels.nunique()), labels.unique(), fontsize=8)
    right.set_ylabel("accuracy on the old digits")
    note = "Grey bars: a Gaussian matrix of the same shape. Points: seeds (and r on the right)."
    return finish(picture, "A full update's spectrum, and what is forgotten", note)
