"""Data sets: a file is a name. This module holds what they share: problems, cleaning, splitting.

Every split follows one rule. Rows are ordered once by a hash of (seed, text) inside each class, and
the classes are interleaved in proportion to their sizes; test, validation and train are cut from
that order, and the first n examples of a split are a prefix of it. The order therefore does not
depend on how many examples are used, on the order of the file's rows, or on any generator.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_lab.config import DataConfig, need
from lora_lab.registry import Registry, WrongInput

SPLITS = ("train", "validation", "test")
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1


@dataclass(frozen=True)
class Problem:
    """Data ready for training.

    Attributes
    ----------
    kind : str
        That of the config, see `DataConfig.kind`.
    inputs : mapping
        Per split (`SPLITS`): list of str, or float32 array (examples, input width).
    targets : mapping
        Per split: int64 array (examples,) of indices into `classes`, or float32 array
        (examples, output width).
    classes : tuple of str
        Names of the classes; empty for regression.
    fingerprint : str
        SHA-256 of the content that was used. The run's id knows only a path or a name; this says
        what was behind it.
    source : str
        Where the content came from, in words (path, package, or hub name with its commit).
    dropped : mapping of str to int
        Rows left out: ``missing`` (no text or no label), ``contradicting`` (rows of a text that
        occurs with different labels: all of them go), ``duplicate`` (repeats of a kept text).
    """

    kind: str
    inputs: Mapping[str, Any]
    targets: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    fingerprint: str
    source: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def outputs(self) -> int:
        """Width of the model's output: the number of classes, or of regression targets."""
        return len(self.classes) or self.targets["train"].shape[1]


class DataSet(DataConfig, ABC):
    """What every `data/NAME.py` defines: a frozen dataclass with these two methods."""

    @abstractmethod
    def check(self) -> None:
        """Raise `WrongInput` for what is missing or wrong; cheap, without a network."""

    @abstractmethod
    def load(self) -> Problem:
        """The data, the same for the same config in every process."""


DATA: Registry[type[DataSet]] = Registry("lora_lab.data", "data set")


def normalised(text: str) -> str:
    """What makes two texts the same: letters without case, words without their spacing.

    >>> normalised("A  Great\\nFilm ")
    'a great film'
    """
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class Examples:
    """Distinct labelled texts.

    Attributes
    ----------
    texts, keys : list of str
        Texts without surrounding space, and their normalised form.
    labels : ndarray of int64, (examples,)
        Index of the class.
    parts : list of str
        The split in which the source gave the example; empty where it gave none.
    dropped : dict of str to int
        As in `Problem`.
    """

    texts: list[str]
    keys: list[str]
    labels: np.ndarray
    parts: list[str]
    dropped: dict[str, int]


def distinct(
    texts: Sequence[str | None], labels: Sequence[int | None], parts: Sequence[str] = ()
) -> Examples:
    """One example per text, compared without case and spacing.

    Rows without text (None or only space) or label are dropped. Of equal texts the first stays,
    in `test`, then `validation`, then `train`, so that nothing leaks into training; a text that
    occurs with different labels is dropped altogether, because no label of it can be trusted.
    """
    given = list(parts) or [""] * len(texts)
    priority = ("test", "validation", "train", "")
    rows = sorted(range(len(texts)), key=lambda i: priority.index(given[i]))
    first: dict[str, int] = {}
    repeats: dict[str, int] = {}
    contradicting: set[str] = set()
    missing = 0
    for i in rows:
        key = normalised(texts[i] or "")
        if not key or labels[i] is None:
            missing += 1
            continue
        j = first.setdefault(key, i)
        if j != i:
            repeats[key] = repeats.get(key, 0) + 1
            if labels[j] != labels[i]:
                contradicting.add(key)
    keys = [key for key in first if key not in contradicting]
    kept = [first[key] for key in keys]
    return Examples(
        texts=[(texts[i] or "").strip() for i in kept],
        keys=keys,
        labels=np.array([labels[i] for i in kept], dtype=np.int64),
        parts=[given[i] for i in kept],
        dropped={
            "missing": missing,
            "contradicting": sum(1 + repeats[key] for key in contradicting),
            "duplicate": sum(n for key, n in repeats.items() if key not in contradicting),
        },
    )


def stratified_order(keys: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray:
    """Order of examples whose every stretch holds the classes in proportion.

    Parameters
    ----------
    keys : sequence of str
        Distinct texts; only these and the seed decide the order inside a class.
    labels : ndarray of int64, (n,)
        Classes.
    seed : int
        `data.seed`.

    Returns
    -------
    ndarray of int64, (n,)
        A permutation. With classes of equal size any prefix holds them equally to within one.

    Examples
    --------
    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> labels[stratified_order(list("abcdef"), labels, seed=0)].tolist()
    [0, 1, 0, 0, 1, 0]
    """
    digests = [hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in keys]
    by_hash = np.array(sorted(range(len(keys)), key=digests.__getitem__), dtype=np.int64)
    place = np.empty(len(keys))
    for label in np.unique(labels):
        members = by_hash[labels[by_hash] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return by_hash[np.lexsort((labels[by_hash], place[by_hash]))]


def held_out(rows: int) -> tuple[int, int]:
    """Test and validation sizes where the source sets none: 20 % and 10 %, at least 1 each.

    >>> held_out(1000), held_out(3)
    ((200, 100), (1, 1))
    """
    return max(1, round(TEST_SHARE * rows)), max(1, round(VALIDATION_SHARE * rows))


def splits(
    examples: Examples, seed: int, test: int | None, validation: int | None
) -> dict[str, np.ndarray]:
    """Indices of each split, in the order in which subsets take them.

    `test` and `validation` are the sizes cut from the examples that the source put into no split
    or into train; None keeps that split as the source gave it.
    """
    parts = np.array([part or "train" for part in examples.parts], dtype=object)
    out = {}
    for split in SPLITS:
        rows = np.flatnonzero(parts == split)
        keys = [examples.keys[i] for i in rows]
        out[split] = rows[stratified_order(keys, examples.labels[rows], seed)]
    pool, start = out["train"], 0
    for split, size in (("test", test), ("validation", validation)):
        if size is not None:
            out[split], start = pool[start : start + size], start + size
    out["train"] = pool[start:]
    for split in SPLITS:
        if not len(out[split]):
            counts = ", ".join(f"{s} {len(out[s])}" for s in SPLITS)
            left_out = ", ".join(f"{n} {why}" for why, n in examples.dropped.items())
            raise WrongInput(
                f"too few usable examples for three splits: {counts} (left out: {left_out}). "
                "Give more rows."
            )
    return out


def text_problem(
    config: DataConfig,
    examples: Examples,
    cut: dict[str, np.ndarray],
    classes: tuple[str, ...],
    fingerprint: str,
    source: str,
) -> Problem:
    """A classification problem of the first `<split>_examples` of each split.

    Raises
    ------
    WrongInput
        When more examples are asked for than there are.
    """
    taken = {}
    for split in SPLITS:
        asked = getattr(config, f"{split}_examples")
        if not config.sizes_are_limits:
            need_examples(split, asked, len(cut[split]))
        taken[split] = cut[split][:asked]
    return Problem(
        kind="text",
        inputs={split: [examples.texts[i] for i in rows] for split, rows in taken.items()},
        targets={split: examples.labels[rows] for split, rows in taken.items()},
        classes=classes,
        fingerprint=fingerprint,
        source=source,
        dropped=examples.dropped,
    )


def need_examples(split: str, asked: int | None, available: int) -> None:
    """Raise `WrongInput` when more examples are asked for than there are."""
    name = f"data.{split}_examples"
    need(asked is None or asked <= available, name, f"at most {available} (all there are)", asked)
