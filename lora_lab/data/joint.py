"""Several embedded data sets of texts as one, so that one update must serve them all."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_lab.config import need
from lora_lab.data import (
    DATA,
    SPLITS,
    DataSet,
    Problem,
    distinct,
    need_examples,
    text_problem,
)
from lora_lab.data.rotten_tomatoes import MovieReviews


@DATA.register
@dataclass(frozen=True)
class Joint(DataSet):
    """Texts of several data sets, in turn: an example of each, again and again.

    A prefix therefore holds them equally, as long as the shortest lasts. Splits are those of the
    parts, so that a score on a part is fair; a text that occurs in two parts stays once, in the
    one of its splits that is held out. Classes of the same name are the same class.

    Attributes
    ----------
    parts : str
        Names of embedded data sets of texts joined by `+`, in the order of their turns.
    """

    parts: str = "rotten_tomatoes+imdb"

    def check(self) -> None:
        problems = self._parts()
        for part in problems:
            part.check()
        for split in SPLITS:
            most = sum(part.sizes[split] for part in problems)
            need_examples(split, getattr(self, f"{split}_examples"), most)

    def load(self) -> Problem:
        problems = [part.load() for part in self._parts()]
        classes = tuple(dict.fromkeys(word for problem in problems for word in problem.classes))
        turns = [
            (split, *row)
            for split in SPLITS
            for turn in itertools.zip_longest(*(rows(problem, split) for problem in problems))
            for row in turn
            if row
        ]
        splits, texts, words = zip(*turns, strict=True)
        labels = [classes.index(word) for word in words]
        examples = distinct(texts, labels, splits)
        held = np.array(examples.parts, dtype=object)
        cut = {split: np.flatnonzero(held == split) for split in SPLITS}
        digest = hashlib.sha256("".join(problem.fingerprint for problem in problems).encode())
        source = " + ".join(problem.source for problem in problems)
        return text_problem(self, examples, cut, classes, digest.hexdigest(), source)

    def _parts(self) -> list[MovieReviews]:
        """The data sets that are joined, whole, with this one's seed."""
        known = {n: found for n in DATA if issubclass(found := DATA[n], MovieReviews)}
        names = self.parts.split("+")
        ok = set(names) <= set(known) and len(set(names)) == len(names)
        need(ok, "data.parts", f"different ones of {', '.join(known)} joined by '+'", self.parts)
        return [known[name](seed=self.seed) for name in names]


def rows(problem: Problem, split: str) -> Iterator[tuple[str, str]]:
    """Texts of a split with the names of their classes."""
    for text, label in zip(problem.inputs[split], problem.targets[split], strict=True):
        yield text, problem.classes[label]
