"""What the tables say, in sentences: every number is computed, and so is what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd

from lora_lab import stats
from lora_lab.figures import METHODS, Tables, comparable, final
from lora_lab.figures.methods import FEWEST, labelled
from lora_lab.figures.truncation import enough
from lora_lab.stats import t_interval
from lora_lab.stats.intervals import FEWEST as UNITS


def seeds(n: int) -> str:
    """``"1 seed"`` or ``"3 seeds"``."""
    return f"{n} seed{'' if n == 1 else 's'}"


def plus_minus(values: Iterable[float], digits: int = 3) -> str:
    """Mean and half width of the 95 % t interval, the width only with two values or more.

    >>> plus_minus([0.80, 0.82, 0.81]), plus_minus([0.8])
    ('0.810 ± 0.025', '0.800')
    """
    mean, _, high = t_interval(values)
    width = f" ± {high - mean:.{digits}f}" if math.isfinite(high) else ""
    return f"{mean:.{digits}f}{width}"


def counts(runs: pd.DataFrame) -> str:
    """How many runs there are and how they ended."""
    if runs.empty:
        return "There is no run yet."
    status = runs["status"].value_counts()
    order = ["done", "running", "diverged", "failed", "interrupted"]
    order += sorted(set(status.index) - set(order))
    listed = ", ".join(f"{status[s]} {s}" for s in order if s in status)
    noun = "run" if len(runs) == 1 else "runs"
    return f"{len(runs)} {noun}: {listed}. Averages and figures hold finished runs only."


def sentences(tables: Tables) -> list[str]:
    """The findings on one model and data set; each holds for the tables as they are."""
    runs, _ = comparable(tables.runs)
    said = [_ends(runs), _best_adapter(runs), *_directions(tables, runs), _above_floor(tables)]
    return [sentence for sentence in said if sentence]


def _ends(runs: pd.DataFrame) -> str:
    ends = []
    for method in ("head", "full"):
        own = runs.loc[runs["adapter"] == method, "score"]
        if len(own):
            ends.append(f"{METHODS[method]} scores {plus_minus(own)} ({seeds(len(own))})")
    if not ends:
        return ""
    said = " and ".join(ends) + "."
    return said[0].upper() + said[1:]


def _best_adapter(runs: pd.DataFrame) -> str:
    """The adapter setting that validation would choose, with its test score."""
    ranked = runs[runs["rule"] != ""]
    if ranked.empty:
        return ""
    groups = ranked.groupby(["rule", "r"]).agg(
        n=("score", "size"), validation=("validation_score", "mean"), test=("score", "mean")
    )
    # One lucky seed must not win against an average over several.
    groups = groups[groups["n"] == groups["n"].max()]
    by = "validation" if groups["validation"].notna().all() else "test"
    rule, r = groups[by].idxmax()
    own = ranked[(ranked["rule"] == rule) & (ranked["r"] == r)]
    settings = "the only setting" if len(groups) == 1 else f"the best of {len(groups)} settings"
    said = f"{rule} at r = {r:g} ({settings}"
    said += f" by {by} score)" if len(groups) > 1 else ")"
    share = own["trainable_percent"].mean()
    said += f" scores {plus_minus(own['score'])} ({seeds(len(own))})"
    said += f" with {share:.3g} % of the parameters training" if math.isfinite(share) else ""
    full = runs.loc[runs["adapter"] == "full", "score"]
    if len(full):
        gap = 100 * (own["score"].mean() - full.mean())
        side = "below" if gap < 0 else "above"
        said += f": {abs(gap):.1f} points {side} full fine-tuning"
    return f"{said}."


def _above_floor(tables: Tables) -> str:
    """How many settings differ from the head alone, example by example of the test split."""
    runs = labelled(tables.runs)
    each = tables.examples.merge(runs[["run_id", "setting", "adapter"]], on="run_id")
    # Mean over seeds of what each example contributes; examples are the units.
    by_example = each.groupby(["setting", "i"])["value"].mean().unstack("setting")
    floor = runs.loc[runs["adapter"] == "head", "setting"].unique()
    if len(floor) != 1 or floor[0] not in by_example or len(by_example.columns) < FEWEST:
        return ""
    by_example = by_example.dropna()
    if len(by_example) < UNITS:
        return ""
    others = by_example.columns.drop(floor[0])
    gains = by_example[others].sub(by_example[floor[0]], axis=0)
    p = stats.holm([stats.permutation(gains[name].to_numpy()) for name in others])
    better = [n for n, q in zip(others, p, strict=True) if q < 0.05 and gains[n].mean() > 0]
    worse = [n for n, q in zip(others, p, strict=True) if q < 0.05 and gains[n].mean() < 0]
    said = f"Of {len(others)} settings {len(better)} score significantly better than the head alone"
    said += f" on the same {len(by_example)} test examples, and "
    said += f"{len(worse)} significantly worse ({'; '.join(worse)})" if worse else "none worse"
    return f"{said} (sign flips, Holm, 5 %)."


def _directions(tables: Tables, runs: pd.DataFrame) -> list[str]:
    """Directions that the function needs, beside the effective rank of the update."""
    full = runs[runs["adapter"] == "full"]
    rows = final(tables.measures, full["run_id"]).dropna(subset=["value"])
    oracle = rows[(rows["measure"] == "oracle_score") & (rows["side"] == "trained_head")]
    layers = rows[(rows["measure"] == "effective_rank") & (rows["layer"] != "")]
    ranks = layers.groupby("run_id")["value"].mean()
    said = ""
    if len(ranks):
        said = (
            "The update of full fine-tuning has an effective rank of "
            f"{plus_minus(ranks, 1)} (mean over layers, {seeds(len(ranks))}). "
        )
    if oracle.empty:
        return [said.strip()]
    score = full.set_index("run_id")["score"]
    k = enough(oracle, full)
    if not math.isfinite(k):
        most = oracle["k"].max()
        return [f"{said}No truncation up to k = {most:g} directions per layer is within a point."]
    cut = oracle[oracle["k"] == k].set_index("run_id")["value"]
    lost = 100 * (score.reindex(cut.index) - cut)
    side = "less" if lost.mean() >= 0 else "more"
    alone = [enough(own, full) for _, own in oracle.groupby("run_id")]
    by_seed = f"; seed by seed k = {_listed(alone)}" if len(alone) > 1 else ""
    said += (
        f"Cut down to its leading k = {k:g} directions in each layer, the same model scores "
        f"{plus_minus(cut)}, {plus_minus(lost * (1 if side == 'less' else -1), 1)} points {side} "
        "than uncut "
        f"({seeds(len(cut))}{by_seed})."
    )
    return [said, _conclusion(k, float(ranks.mean()))]


def _listed(ks: list[float]) -> str:
    """Each k, or of more than ten the range.

    >>> _listed([8, 4, math.nan]), _listed([4.0] * 9 + [16, 8])
    ('4, 8, none', '4 to 16')
    """
    words = [f"{k:g}" for k in sorted(k for k in ks if math.isfinite(k))]
    missing = len(ks) - len(words)
    if len(words) > 10:
        words = [f"{words[0]} to {words[-1]}"]
    return ", ".join(words + ["none"] * bool(missing))


def _conclusion(k: float, rank: float) -> str:
    """What a smallest sufficient k says, which depends on how it compares with the rank."""
    if k == 0:
        return "The trained head alone is within one point: the test does not see the update."
    noun = "direction" if k == 1 else "directions"
    if math.isnan(rank):
        return f"Its function needs {k:g} {noun} per layer to be within one point."
    if k < rank:
        return (
            f"An update of effective rank {rank:.0f} does its work, to within one point, with "
            f"{k:g} {noun}."
        )
    return (
        f"To be within one point the function needs {k:g} {noun}, no fewer than the effective "
        f"rank of {rank:.0f} counts."
    )
