"""Which rank to believe: how often each measure recovers a planted rank from noise.

Planted: k singular values with random vectors in a matrix of independent Gaussian noise. The
signal-to-noise ratio is the leading planted value over the noise edge sd (sqrt(m) + sqrt(n)). The
values are all equal, or fall linearly to half the leading one. A spike drowns below
(m n)^(1/4) sd, which is half the edge for a square matrix. `replicated_rank` sees two more runs
with the same planted directions and noise of their own.
"""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_lab.linalg import Dense, Spectrum, decompose
from lora_lab.linalg.factored import Array
from lora_lab.measures import DIRECTIONS, MEASURES, Measure, Refused

OUT = Path("results/benchmarks")
SEED = 7
TRIALS = 100
SEEDS = 2
"""Other runs that `replicated_rank` compares one with."""

SHAPES = ((256, 256), (128, 512))
RATIOS = (4.0, 2.0, 1.0, 0.5)
RANKS = (1, 4, 16)
LAST = {"equal": 1.0, "falling": 0.5}
"""Last planted singular value over the first."""

GOOD = 0.95
"""Share of trials from which on a measure counts as right."""

CELL = ["planted", "shape", "signal_to_noise", "rank"]


def planted(values: Array, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Gaussian noise of sd 1 with singular values planted in it.

    Noise looks the same from all directions, so the first axes serve as the planted vectors.
    """
    dW = rng.standard_normal(shape)
    dW[np.diag_indices(len(values))] += values
    return dW


def estimate(m: Measure, s: Spectrum, seeds: list[Spectrum], side: str | None) -> float:
    """The measure's value; NaN where it refuses."""
    try:
        return m(s, None, side, **({"seeds": seeds} if "seeds" in m.needs else {}))
    except Refused:
        return math.nan


def measures() -> dict[str, tuple[Measure, str | None]]:
    """Every measure of kind rank that an update and its other seeds suffice for, by its label."""
    out = {}
    for name in MEASURES:
        m = MEASURES[name]
        if m.kind != "rank" or not set(m.needs) <= {"values", "vectors", "seeds"}:
            continue
        k = inspect.signature(m.function).parameters.get("k")
        for side in m.sides or (None,):
            given = [str(x) for x in (None if k is None else k.default, side) if x is not None]
            out[f"{name}({', '.join(given)})" if given else name] = (m, side)
    return out


def calibrate(
    trials: int = TRIALS,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    ranks: tuple[int, ...] = RANKS,
    ratios: tuple[float, ...] = RATIOS,
) -> pd.DataFrame:
    """One row per planted spectrum, shape, signal-to-noise ratio, rank and measure.

    Columns: planted, shape ('256x256'), signal_to_noise, rank (the true one), measure, trials,
    recovered (share of trials whose rounded value is the true rank), median (of the values).
    """
    out: list[dict[str, Any]] = []
    chosen = measures()
    cells = list(itertools.product(LAST, shapes, ratios, ranks))
    for (kind, shape, ratio, k), seed in zip(
        cells, np.random.SeedSequence(SEED).spawn(len(cells)), strict=True
    ):
        rng = np.random.default_rng(seed)
        edge = float(np.sqrt(shape).sum())
        values = ratio * edge * np.linspace(1.0, LAST[kind] if k > 1 else 1.0, k)
        # The runs of one cell are each other's other seeds.
        runs = [
            decompose(Dense(planted(values, shape, rng)), vectors=DIRECTIONS) for _ in range(trials)
        ]
        for name, (m, side) in chosen.items():
            found = np.array(
                [
                    estimate(m, s, [runs[(i + j) % trials] for j in range(1, SEEDS + 1)], side)
                    for i, s in enumerate(runs)
                ]
            )
            out.append(
                {
                    **dict(zip(CELL, (kind, "x".join(map(str, shape)), ratio, k), strict=True)),
                    "measure": name,
                    "trials": trials,
                    "recovered": float(np.mean(np.round(found) == k)),
                    "median": float(np.median(found)),
                }
            )
    return pd.DataFrame(out)


def advice(table: pd.DataFrame) -> list[str]:
    """Lines: which measures recover the planted rank at which ratio, what the others say instead.

    A measure is right if it recovers every rank in `GOOD` of the trials, all shapes together.
    """
    share = table.groupby(["planted", "signal_to_noise", "rank", "measure"])["recovered"].mean()
    worst = share.groupby(["planted", "signal_to_noise", "measure"]).min()
    ratios = sorted(table["signal_to_noise"].unique(), reverse=True)
    lines = []
    for kind in table["planted"].unique():
        right = [
            ", ".join(f"`{name}`" for name, x in worst[kind, ratio].items() if x >= GOOD) or "none"
            for ratio in ratios
        ]
        at = "; ".join(f"at {ratio:g} {names}" for ratio, names in zip(ratios, right, strict=True))
        lines.append(f"Planted values {kind}: {at}.")
    best = worst.groupby("measure").max()
    known = sorted(table["rank"].unique())
    first = {"shape": table["shape"].iloc[0], "rank": known[len(known) // 2]}
    clear = table[(table[[*first]] == list(first.values())).all(axis=1)]
    median = clear[clear["signal_to_noise"] == ratios[0]].groupby("measure")["median"].mean()
    others = ", ".join(f"`{name}` {median[name]:.3g}" for name in best.index[best < GOOD])
    lines.append(
        f"At no ratio (medians where {first['rank']} are planted in {first['shape']} at"
        f" {ratios[0]:g}): {others}."
    )
    return lines


def markdown(table: pd.DataFrame) -> str:
    """The page: what was done, which to believe when, and one table per planted kind and shape."""
    intro = " ".join(str(__doc__).split("\n\n", 1)[1].split())
    trials = int(table["trials"].iloc[0])
    lines = [
        "# Planted rank: which measure recovers it",
        "",
        "Written by `python -m experiments.benchmarks calibration`. Believe a count where it is"
        f" named here, by the signal-to-noise ratio: right in at least {100 * GOOD:.0f} % of trials"
        " for each planted rank. The last describe the whole spectrum, noise included.",
        "",
        *(f"- {line}" for line in advice(table)),
        "",
        f"{intro} Each cell: share of {trials} trials in which the rounded value is the planted"
        " rank, and the median value in brackets.",
    ]
    for kind, shape in itertools.product(table["planted"].unique(), table["shape"].unique()):
        part = table[(table["planted"] == kind) & (table["shape"] == shape)]
        columns = list(itertools.product(part["signal_to_noise"].unique(), part["rank"].unique()))
        heads = [f"{ratio:g}, rank {k}" for ratio, k in columns]
        lines += [
            "",
            f"## {shape.replace('x', ' × ')}, planted values {kind}",
            "",
            f"| signal-to-noise | {' | '.join(heads)} |",
            f"|---|{'---:|' * len(heads)}",
        ]
        cells = part.set_index(["measure", "signal_to_noise", "rank"])
        for name in part["measure"].unique():
            found = [cells.loc[(name, *column)] for column in columns]
            shown = [f"{100 * one['recovered']:.0f} % ({one['median']:.3g})" for one in found]
            lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all trials, write calibration.csv and calibration.md, print what to believe."""
    table = calibrate()
    OUT.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUT / "calibration.csv", index=False, float_format="%.6g")
    (OUT / "calibration.md").write_text(markdown(table))
    print("\n".join(advice(table)))
    print(f"{OUT / 'calibration.md'} and .csv written")


if __name__ == "__main__":
    main()
