"""A2: how many parameters LoRA trains.

Claim: LoRA trains r(d + k) parameters instead of dk, a reduction of d/2r for a square weight; "over
100 times fewer", "under 1 %" and "10³ × 10³ at r = 10 saves about 100 times" are said of it.

Decided by: exact counts for the shapes that the texts name, and for two real models (MiniLM and
SmolLM2, from their architecture alone) over r. The formula is one part, each quoted number another.

Test: exact. The formula is refuted by one count that differs; a quoted number by its count.

Power: none is needed.

Cost: seconds, no runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lora_lab.adapters import ADAPTERS
from lora_lab.claims import Verdict, together
from lora_lab.config import DataConfig
from lora_lab.figures import canvas, finish
from lora_lab.models import MODELS

QUOTED = [
    # what is said, layers, d, k, r, least reduction that the text states
    ("4096 × 4096 at r = 8 trains 65,536 (over 99 % less)", 1, 4096, 4096, 8, 100.0),
    ("4096 × 4096 at r = 16 saves 128 times", 1, 4096, 4096, 16, 128.0),
    ("attention of 32 layers of width 4096 at r = 16: 16.8 M of 2.1 B", 128, 4096, 4096, 16, 128.0),
    ("1000 × 1000 at r = 10 saves about 100 times", 1, 1000, 1000, 10, 95.0),
    ("r = 64 at 4096 saves over 100 times", 1, 4096, 4096, 64, 100.0),
    ("r = min(d, k) still saves", 1, 384, 384, 384, 1.0),
]
RANKS = (1, 2, 4, 8, 16, 32, 64)


def compute(size: str, seed: int) -> pd.DataFrame:
    """Counts by the method's own formula beside r(d + k) and dk."""
    rows = []
    for said, layers, d, k, r, least in QUOTED:
        shapes = {f"layer.{i}": (d, k) for i in range(layers)}
        rows.append(_counted(said, shapes, r) | {"quoted": least})
    for name in ("minilm", "smollm2")[: 1 if size == "smoke" else 2]:
        shapes = MODELS[name]().shapes(DataConfig())
        rows += [_counted(name, shapes, r) for r in RANKS]
    return pd.DataFrame(rows)


def _counted(what: str, shapes: dict[str, tuple[int, int]], r: int) -> dict[str, Any]:
    method = ADAPTERS["lora"](r=r)
    layers = [shapes[name] for name in method.layers(shapes)]
    trained, full = method.parameters(shapes), sum(d * k for d, k in layers)
    formula = r * sum(d + k for d, k in layers)
    return {
        "what": what,
        "r": r,
        "trained": trained,
        "formula": formula,
        "full": full,
        "reduction": full / trained,
    }


def verdict(table: pd.DataFrame) -> Verdict:
    """The formula, and each quoted number."""
    exact = bool((table["trained"] == table["formula"]).all())
    quoted = table[table["quoted"].notna()].drop_duplicates("what")
    holds = quoted["reduction"] >= quoted["quoted"]
    wrong = [f"{row.what}: {row.reduction:.3g} times" for row in quoted[~holds].itertuples()]
    outcomes = ["supported" if exact else "refuted"]
    outcomes += ["supported" if ok else "refuted" for ok in holds]
    said = (
        f"r(d + k) {'is exact' if exact else 'is wrong'} for all {len(table)} counts; "
        f"{int(holds.sum())} of {len(quoted)} quoted reductions hold"
        + (f" (not: {'; '.join(wrong)})." if wrong else ".")
    )
    seeds = table["seed"].nunique()
    return Verdict(together(outcomes), said, float(holds.mean()), n_seeds=seeds, effect=len(wrong))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Counts that are wrong refute; quoted numbers of which one is wrong make it mixed."""
    quoted = [10.0, 100.0, np.nan]
    table = pd.DataFrame({"what": list("abc"), "r": 4, "formula": 7, "quoted": quoted, "seed": 0})
    reductions = {"supported": [20, 200, 5], "mixed": [20, 50, 5], "refuted": [1, 1, 5]}
    if outcome not in reductions:
        return None
    return table.assign(reduction=reductions[outcome], trained=7 + (outcome == "refuted"))


def figure(table: pd.DataFrame) -> Any:
    """Reduction over r for the real models."""
    picture, [[axes]] = canvas(5, 4)
    for what, own in table[table["quoted"].isna()].groupby("what"):
        own = own.drop_duplicates("r")
        axes.plot(own["r"], own["reduction"], marker="o", label=what)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axhline(100, color="grey", lw=1)
    axes.set_xlabel("r")
    axes.set_ylabel("dk over r(d + k), all linear layers")
    axes.legend()
    note = "Grey: the quoted 100 times. Narrow models fall below it at r = 2 to 4."
    return finish(picture, "How many times fewer parameters", note)
