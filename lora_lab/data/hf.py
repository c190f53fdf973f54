"""A data set by name: on the Hugging Face hub, or in a local folder of tables."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lora_lab.config import literal_path, need
from lora_lab.data import (
    DATA,
    DataSet,
    Problem,
    distinct,
    held_out,
    splits,
    text_problem,
)
from lora_lab.data.table import (
    SUFFIXES,
    as_words,
    encode,
    header,
    need_columns,
    read,
    sha256,
)
from lora_lab.registry import WrongInput

SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@DATA.register
@dataclass(frozen=True)
class HFData(DataSet):
    """Text classification from the hub or a folder.

    Splits of the source named train, validation (valid, val, dev) and test are used; files or
    splits without such a name are left out when others have one. A missing test split is the
    source's validation split or else cut from train (20 %), a missing validation split is cut from
    train (10 %). Texts that occur in two splits stay in the one held out.

    Attributes
    ----------
    name : str
        ``org/name`` on the hub, or an existing folder of .csv, .tsv, .jsonl or .parquet files.
    text, label : str
        Names of the columns.
    config : str
        Configuration of a hub data set; empty: its only one.
    revision : str
        Branch, tag or commit on the hub; empty: the newest.
    """

    name: str = ""
    text: str = "text"
    label: str = "label"
    config: str = ""
    revision: str = ""

    sizes_are_limits: ClassVar[bool] = True

    def check(self) -> None:
        need(bool(self.name), "data.name", "a folder or a name on the hub", repr(self.name))
        folder = literal_path(self.name)
        if os.path.isdir(folder):
            ok = not (self.config or self.revision)
            need(ok, "data.config and data.revision", "empty for a local folder", "a value")
            for file in _files(folder):
                need_columns(header(file), self.text, self.label, repr(str(file)))
        else:
            _need_hub_name(self.name)
            if importlib.util.find_spec("datasets") is None:
                raise WrongInput("data=hf with a hub name needs: pip install 'lora-lab[hf]'")

    def load(self) -> Problem:
        self.check()
        folder = literal_path(self.name)
        if os.path.isdir(folder):
            texts, words, parts, fingerprint = _read_folder(folder, self.text, self.label)
            source = str(folder)
        else:
            texts, words, parts, source = _read_hub(self)
            digest = hashlib.sha256()
            for row in zip(parts, texts, words, strict=True):
                digest.update(repr(row).encode())
            fingerprint = digest.hexdigest()
        classes, labels = encode(words, self.label)
        if "test" not in _labelled(parts, labels):
            parts = ["test" if part == "validation" else part for part in parts]
        examples = distinct(texts, labels, parts)
        given = set(examples.parts)
        test, validation = held_out(sum(part in ("train", "") for part in examples.parts))
        cut = splits(
            examples,
            self.seed,
            None if "test" in given else test,
            None if "validation" in given else validation,
        )
        return text_problem(self, examples, cut, classes, fingerprint, source)


def split_of(name: str) -> str:
    """The split that a file or a hub split is named after, or nothing.

    >>> split_of("train-00000-of-00002"), split_of("validation_matched"), split_of("my.dev")
    ('train', 'validation', 'validation')
    >>> split_of("constraints"), split_of("unsupervised")
    ('', '')
    """
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _labelled(parts: Sequence[str], labels: Sequence[int | None]) -> set[str]:
    """Splits that hold a label; public test splits often hide theirs."""
    return {part for part, label in zip(parts, labels, strict=True) if label is not None}


def _need_hub_name(name: str) -> None:
    """Refuse what was meant as a path before any network is asked."""
    path_like = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if path_like or Path(name).suffix.lower() in SUFFIXES:
        hint = "For one file: data=table data.path=…" if os.path.isfile(literal_path(name)) else ""
        need(False, "data.name", "an existing folder or a name on the hub", repr(name), hint)
    ok = HUB_NAME.fullmatch(name) is not None
    need(ok, "data.name", "an existing folder or a name on the hub (org/name)", repr(name))


def _files(folder: Path) -> list[Path]:
    """The tables of a folder, sorted; only those named after a split when any is."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise WrongInput(
            f"data.name {str(folder)!r} is a folder without a {', '.join(SUFFIXES)} file."
        )
    return [file for file in files if _part(folder, file)] or files


def _part(folder: Path, file: Path) -> str:
    parents = file.relative_to(folder).parent.parts
    return split_of(file.stem) or (split_of(parents[-1]) if parents else "")


def _read_folder(
    folder: Path, text: str, label: str
) -> tuple[list[str | None], list[str | None], list[str], str]:
    texts: list[str | None] = []
    words: list[str | None] = []
    parts: list[str] = []
    digest = hashlib.sha256()
    for file in _files(folder):
        some, labels = read(file, text, label)
        texts += some
        words += labels
        parts += [_part(folder, file)] * len(some)
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256(file)}\0".encode())
    return texts, words, parts, digest.hexdigest()


def _read_hub(
    config: HFData,
) -> tuple[list[str | None], list[str | None], list[str], str]:
    import datasets
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(config.name, revision=config.revision or None).sha
        # Loaded at the commit that is recorded; code of the repository is never run.
        found = datasets.load_dataset(config.name, config.config or None, revision=commit)
    except Exception as error:  # the libraries raise some twenty kinds, of four packages
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise WrongInput(
            f"data.name {config.name!r} cannot be loaded from the hub ({reason}). Check the name, "
            "data.config and data.revision, or give a local folder."
        ) from error
    named = {name: split_of(name) for name in found}
    if not any(named.values()):
        named = dict.fromkeys(found, "")
    texts: list[str | None] = []
    words: list[str | None] = []
    parts: list[str] = []
    for name, rows in found.items():
        if named[name] or not any(named.values()):
            need_columns(rows.column_names, config.text, config.label, f"{config.name} ({name})")
            texts += as_words(rows[config.text], config.text)
            words += _hub_words(rows, config.label)
            parts += [named[name]] * len(rows)
    return texts, words, parts, f"{config.name}@{commit}"


def _hub_words(rows: Any, column: str) -> list[str | None]:
    """Labels as words; a class label of -1 means that the label is hidden."""
    names = getattr(rows.features[column], "names", None)
    if names is None:
        return as_words(rows[column], column)
    return [names[v] if v is not None and v >= 0 else None for v in rows[column]]
