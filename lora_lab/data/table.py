"""A user's own table: CSV, TSV, JSON lines or Parquet with a column of text and one of labels."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from lora_lab.config import literal_path, need
from lora_lab.data import DATA, DataSet, Problem, distinct, held_out, splits, text_problem
from lora_lab.registry import WrongInput, did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".jsonl", ".parquet")
MOST_CLASSES = 1000
FEW_DECIMALS, MOST_DECIMALS = 10, 50
"""Up to so many different decimal numbers are classes in any table; more than so many are
measurements; between them those that hardly repeat are."""

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
SMALL = 1 << 24
"""Bytes up to which a file is read whole before anything starts, to find what is wrong in it."""
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 20, 1 << 26
"""Bytes of a CSV that are parsed at once; a row must fit in one block."""


@DATA.register
@dataclass(frozen=True)
class Table(DataSet):
    """Text classification from one file.

    Rows without text or label and repeated texts are dropped and counted (`Problem.dropped`); the
    rest is split 70 % train, 10 % validation, 20 % test by `data.seed`, the classes in proportion.

    Attributes
    ----------
    path : str
        The file, taken literally but for a leading `~`; .csv, .tsv, .jsonl or .parquet.
    text, label : str
        Names of the columns. Labels are words, numbers or booleans.
    """

    path: str = ""
    text: str = "text"
    label: str = "label"

    sizes_are_limits: ClassVar[bool] = True

    def check(self) -> None:
        path = self._place()
        if path.stat().st_size < SMALL:
            self._problem(path)

    def load(self) -> Problem:
        return self._problem(self._place())

    def _place(self) -> Path:
        """The file, once its name and its columns are known to be right."""
        need(bool(self.path), "data.path", f"a file ({', '.join(SUFFIXES)})", repr(self.path))
        path = literal_path(self.path)
        need_table(path)
        need_columns(header(path), self.text, self.label, repr(str(path)))
        return path

    def _problem(self, path: Path) -> Problem:
        texts, words = read(path, self.text, self.label)
        classes, labels = encode(words, self.label)
        examples = distinct(texts, labels)
        cut = splits(examples, self.seed, *held_out(len(examples.texts)))
        return text_problem(self, examples, cut, classes, sha256(path), str(path))


def need_table(path: Path) -> None:
    """Raise `WrongInput` unless `path` is a file of a known kind."""
    given = repr(str(path))
    if path.suffix.lower() not in SUFFIXES:
        raise WrongInput(f"data.path must end in {', '.join(SUFFIXES)}; got {given}.")
    if not os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        beside = [p.name for p in path.parent.glob("*") if p.suffix.lower() in SUFFIXES]
        near = did_you_mean(path.name, beside)
        raise WrongInput(f"data.path must be an existing file; got {given}.{near}")


def need_columns(names: list[str], text: str, label: str, place: str) -> None:
    """Raise `WrongInput` unless both columns exist, once each, and differ."""
    need(text != label, "data.text and data.label", "different columns", f"{text!r} for both")
    for key, column in (("data.text", text), ("data.label", label)):
        if column not in names:
            shown = ", ".join(map(repr, names[:20])) + (" …" if len(names) > 20 else "")
            raise WrongInput(
                f"{key} must be a column of {place}: {shown or 'it has none'}; got {column!r}."
                f"{did_you_mean(column, names)}"
            )
        need(names.count(column) == 1, key, f"a column that {place} holds once", repr(column))


def header(path: Path) -> list[str]:
    """Column names, from the head of the file only."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(path).names)
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if suffix == ".jsonl":
                # One row may lack what others have.
                rows = itertools.islice(_json_rows(lines), 100)
                return list(dict.fromkeys(key for row in rows for key in row))
            return next(csv.reader(lines, delimiter=DELIMITERS[suffix]), [])
    except (OSError, ValueError, csv.Error) as error:
        raise _unreadable(path, error) from error


def read(path: Path, text: str, label: str) -> tuple[list[str | None], list[str | None]]:
    """The two columns as str; None where a value is missing.

    Raises
    ------
    WrongInput
        When the file cannot be parsed, or a value is neither text, number nor boolean.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            table = parquet.read_table(path, columns=[text, label])
            pairs = (table[text].to_pylist(), table[label].to_pylist())
        elif suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                rows = list(_json_rows(lines))
            pairs = ([row.get(text) for row in rows], [row.get(label) for row in rows])
        else:
            pairs = _read_csv(path, text, label)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return as_words(pairs[0], text), as_words(pairs[1], label)


def encode(words: Sequence[str | None], column: str) -> tuple[tuple[str, ...], list[int | None]]:
    """Classes and each row's index into them, None for None.

    Classes are sorted, as numbers when all are numbers: ``1`` and ``1.0`` are one class.

    Raises
    ------
    WrongInput
        With fewer than 2 or more than 1,000 classes, or labels that are measurements.

    Examples
    --------
    >>> encode(["10", "9", None, "9.0"], "stars")
    (('9', '10'), [1, 0, None, 0])
    """
    known = {word for word in words if word is not None}
    value: dict[str, Any] = {word: word for word in known}
    if all(NUMBER.fullmatch(word) for word in known):
        value = {word: Decimal(word) for word in known}
    ordered = sorted(set(value.values()))
    fractions = any(isinstance(v, Decimal) and v != v.to_integral_value() for v in ordered)
    rows = sum(word is not None for word in words)
    n = len(ordered)
    if fractions and (n > MOST_DECIMALS or (n > FEW_DECIMALS and 2 * n > rows)):
        raise WrongInput(
            f"data.label {column!r} holds {n} different decimal numbers in {rows} rows; "
            "this is classification: choose a column of classes."
        )
    need(
        2 <= n <= MOST_CLASSES,
        "data.label",
        f"a column of 2 to {MOST_CLASSES} different labels",
        f"{column!r} with {n}",
    )
    index = {v: i for i, v in enumerate(ordered)}
    names = tuple(_number(v) if isinstance(v, Decimal) else v for v in ordered)
    return names, [None if word is None else index[value[word]] for word in words]


def as_words(values: Iterable[Any], column: str) -> list[str | None]:
    """Text, numbers and booleans as str without surrounding space; None for what is missing.

    >>> as_words([" good ", 4.0, True, None, float("nan"), " "], "stars")
    ['good', '4.0', 'True', None, None, None]
    """
    out: list[str | None] = []
    for value in values:
        if isinstance(value, (dict, list, bytes)):
            raise WrongInput(
                f"column {column!r} must hold text, numbers or booleans; "
                f"got {type(value).__name__} values."
            )
        if value is None or (isinstance(value, float) and math.isnan(value)):
            out.append(None)
        else:
            # JSON can escape half a character, which no tokenizer reads.
            word = str(value).encode("utf-8", "replace").decode()
            out.append(word.strip() or None)
    return out


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _number(value: Decimal) -> str:
    whole = value == value.to_integral_value()
    return str(int(value)) if whole else format(value.normalize(), "f")


def _read_csv(path: Path, text: str, label: str) -> tuple[list[Any], list[Any]]:
    import pyarrow
    from pyarrow import csv as arrow_csv

    table = arrow_csv.read_csv(
        path,
        read_options=arrow_csv.ReadOptions(
            use_threads=False,
            block_size=min(max(path.stat().st_size, SMALLEST_BLOCK), LARGEST_BLOCK),
        ),
        parse_options=arrow_csv.ParseOptions(
            delimiter=DELIMITERS[path.suffix.lower()], newlines_in_values=True
        ),
        convert_options=arrow_csv.ConvertOptions(
            include_columns=[text, label],
            # Left to itself it guesses types: '007' becomes 7, and a later word an error.
            column_types={text: pyarrow.string(), label: pyarrow.string()},
        ),
    )
    return table[text].to_pylist(), table[label].to_pylist()


def _json_rows(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield row


def _unreadable(path: Path, error: Exception) -> WrongInput:
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        return WrongInput(f"{str(path)!r} must be encoded as UTF-8; save it so.")
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    return WrongInput(f"{str(path)!r} cannot be read as {path.suffix.lower()[1:]}: {reason}.")
