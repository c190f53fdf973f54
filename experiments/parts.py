"""Claims of several inequalities: each is one interval over seeds, on each ground.

Such a claim's table has, for each ground (`model`), `part` and `seed`, one `value`; rows of the
part `curve` are for its figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import seeds_to_tell, spread
from lora_lab.claims import Verdict, together
from lora_lab.stats import Interval

CURVE = "curve"
GROUNDS = {"minilm": "on MiniLM", "digits_vit": "on digits", "planted": "on planted problems"}
METHODS = {"full": "#d55e00", "lora": "#0072b2"}


@dataclass(frozen=True)
class Part:
    """An inequality: the mean over seeds lies between `low` and `high`.

    Attributes
    ----------
    words : str
        What the mean is; ``{}`` is where it stands with its interval.
    low, high : float
        Supported where the whole interval lies between them, refuted where all of it lies beyond.
    near : float
        Refuted is also an interval that ends within this distance of the bound, inside it: so
        small an effect is none.
    level : float
        Of the interval; 0.9 where it is one side of an equivalence test.
    unit : float
        Size of a difference that matters.
    main : bool
        Whether the verdict's sentence names it; the first one does if none is.
    """

    words: str
    low: float = -math.inf
    high: float = math.inf
    near: float = 0.0
    level: float = 0.95
    unit: float = 0.1
    main: bool = False

    def outcome(self, found: Interval) -> str:
        """Of one ground."""
        if self.low < found.low and found.high < self.high:
            return "supported"
        out = found.low > self.high - self.near or found.high < self.low + self.near
        return "refuted" if out else "unresolved"

    def edges(self) -> list[float]:
        """The finite bounds."""
        return [edge for edge in (self.low, self.high) if math.isfinite(edge)]

    def example(self, right: bool) -> float:
        """A value that is clearly on one side."""
        if len(self.edges()) == 2:
            return (self.low + self.high) / 2 if right else self.high + 4 * self.unit
        step = 4 * self.unit if right else -4 * self.unit
        return self.low + step if math.isfinite(self.low) else self.high - step


def values_of(table: pd.DataFrame, model: object, name: str) -> list[float]:
    """The values of a part on a ground, one a seed."""
    own = table[(table["model"] == model) & (table["part"] == name)]
    return [float(v) for v in own.groupby("seed")["value"].mean()]


def judged(table: pd.DataFrame, parts: Mapping[str, Part], more: str = "") -> Verdict:
    """All parts on all grounds on which the table has them; `more` ends the sentence."""
    main = {name for name, part in parts.items() if part.main} or set(list(parts)[:1])
    outcomes, counts, clauses, every, todo = [], [], [], [], []
    first = Interval(math.nan, math.nan, math.nan)
    for model in (name for name in GROUNDS if name in set(table["model"])):
        here, said = [], []
        for name, part in parts.items():
            values = values_of(table, model, name)
            if not values:
                continue
            found = spread(values, part.level)
            here.append(part.outcome(found))
            first = first if math.isfinite(first.value) else found
            number = f"{found.value:.2g} [{found.low:.2g}, {found.high:.2g}]"
            clause = f"{part.words.format(number)} ({here[-1]})"
            every.append(f"{GROUNDS[model]}: {clause}")
            said += [clause] * (name in main)
            if here[-1] == "unresolved":
                todo.append(f"{seeds_to_tell(values, *part.edges())} for '{name}'")
        counts += [f"{here.count('supported')} of {len(here)} {GROUNDS[model]}"] * bool(here)
        clauses += [f"{GROUNDS[model]} {', '.join(said)}"] * bool(said)
        outcomes += here
    outcome = together(outcomes) if outcomes else "unresolved"
    told = "; ".join([*clauses, *([more] if more else [])])
    sentence = f"Parts that hold: {', '.join(counts) or 'none'}{f'; {told}' * bool(told)}."
    if outcome == "unresolved":
        left = f" Of the {len(todo)} undecided, {todo[0]}." if todo else " No run tells."
        sentence += left
    n = max(
        (len(values_of(table, m, p)) for m in table["model"].unique() for p in parts), default=0
    )
    interval = (first.low, first.high)
    return Verdict(
        outcome, sentence, first.value, interval, n_seeds=n, effect=first.value, parts=tuple(every)
    )


def invented(
    outcome: str,
    rng: np.random.Generator,
    parts: Mapping[str, Part],
    models: Sequence[str] = ("minilm", "digits_vit"),
) -> pd.DataFrame:
    """Parts that all hold, all fail, hold on the first ground only, or lie at their bound."""
    out = []
    for model in models:
        for i, (name, part) in enumerate(parts.items()):
            right = outcome == "supported"
            # On a single ground every other part holds.
            right |= outcome == "mixed" and (i % 2 == 0 if len(models) == 1 else model == models[0])
            values = part.example(right) + 0.1 * part.unit * rng.standard_normal(5)
            if outcome == "unresolved":
                noise = np.arange(-2, 3) + 0.1 * rng.standard_normal(5)
                values = part.edges()[0] + (part.unit + 2 * part.near) * noise
            out += [
                {"model": model, "part": name, "seed": seed, "value": value}
                for seed, value in enumerate(values)
            ]
    return pd.DataFrame(out)


def table_of(rows: Iterable[Mapping[Any, Any]]) -> pd.DataFrame:
    """Rows as a table that has its columns even where there are none."""
    columns = ["run_id", "model", "part", "seed", "value"]
    found = pd.DataFrame(list(rows))
    return found.reindex(columns=[*columns, *(c for c in found if c not in columns)])


def edge_note(runs: pd.DataFrame) -> str:
    """In words, how many of the best learning rates lie at the edge of their grid; '' for none."""
    if "edge" not in runs:
        return ""
    at = runs[runs["edge"].eq(True)]
    cells = [c for c in ("model", "adapter", "r", "alpha") if c in at]
    count = len(at[cells].drop_duplicates())
    return f"{count} best learning rates lie at the edge of their grid" if count else ""
