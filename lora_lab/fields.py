"""Every word that a config takes, as the dataclasses say it: keys, types, ranges, meanings.

A range is what the field's own check answers to a wrong value, so that it cannot differ from it.
Asking takes seconds, because methods and models import torch. The answer is kept in the user's
cache folder until a file of the package changes: help and completion read it in milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lora_lab.config import ALSO, Host, RunConfig, TrainConfig, plain
from lora_lab.embedded import cache_folder
from lora_lab.registry import StoreError, WrongInput, conf_folder
from lora_lab.targets import WORDS

WRONG: dict[type, Any] = {int: -(10**9), float: -1e9, str: "?", dict: {"?": -1}}
"""A value of each type that no field with a range accepts."""

JOINED = {"adapter.targets": tuple(WORDS), "train.also": ("none", *ALSO)}
"""Words that may be joined by `+`."""


@dataclass(frozen=True)
class Field:
    """One config field.

    Attributes
    ----------
    key : str
        As on the command line: `adapter.r`.
    owner : str
        The choice that has it: `adapter=lora`; empty where the group has no choices.
    kind, allowed : str
        Type and range in words; the range is empty where every value of the type will do.
    default : str
        As it would be typed.
    meaning : str
    words : tuple of str
        Its values, where they can be listed.
    """

    key: str
    owner: str
    kind: str
    allowed: str
    default: str
    meaning: str
    words: tuple[str, ...] = ()

    @property
    def value(self) -> str:
        """Type and range in one phrase.

        >>> Field("seed", "", "a whole number", "in [0, 9)", "0", "").value
        'a whole number in [0, 9)'
        >>> Field("train.lr", "", "a number or null", "a finite number above 0", "null", "").value
        'a finite number above 0 or null'
        """
        kind, null = self.kind.removesuffix(" or null"), " or null" * self.kind.endswith("null")
        if not self.allowed:
            return self.kind
        if kind.startswith("a mapping"):
            return f"{kind}, each {self.allowed}"
        if kind == "text" or self.allowed.startswith("a "):
            return self.allowed + null
        return f"{kind} {self.allowed}" + null * ("null" not in self.allowed)


@dataclass(frozen=True)
class Catalogue:
    """Every field; of every group the choices, name to what its file says first; the defaults."""

    fields: tuple[Field, ...]
    choices: dict[str, dict[str, str]]
    chosen: dict[str, str]

    def keys(self) -> list[str]:
        """Every key, once."""
        return list(dict.fromkeys(f.key for f in self.fields))


def catalogue() -> Catalogue:
    """What is known of every field: from the cache, or asked anew when the package has changed."""
    stamp = _stamp()
    path = cache_folder() / f"fields-{_sha(str(Path(__file__)))[:12]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(path.read_text())
        if stored["stamp"] == stamp:
            fields = (Field(**{**f, "words": tuple(f["words"])}) for f in stored["fields"])
            return Catalogue(tuple(fields), stored["choices"], stored["chosen"])
    from lora_lab.store import write_bytes

    found = asked()
    with contextlib.suppress(OSError, StoreError):  # help works where nothing can be kept
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps({"stamp": stamp, **asdict(found)}).encode())
    return found


def _stamp() -> str:
    """Changes with every file that a field may come from."""
    files = [*Path(__file__).parent.rglob("*.py"), *conf_folder().rglob("*.yaml")]
    states = ((str(file), file.stat()) for file in sorted(files))
    return _sha(repr([(name, s.st_size, s.st_mtime_ns) for name, s in states]))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def asked() -> Catalogue:
    """The same, from the dataclasses, the registries and the files of `conf`."""
    from lora_lab.hydra_bridge import DEFAULT_GROUPS, REGISTRIES

    fields: list[Field] = []
    choices: dict[str, dict[str, str]] = {}
    for group, registry in REGISTRIES.items():
        choices[group] = {name: summary(registry[name]) for name in registry}
        for name in registry:
            fields += _of(registry[name], f"{group}.", f"{group}={name}")
    fields += _of(TrainConfig, "train.") + _of(Host, "host.") + _of(RunConfig, "")
    for group in ("size", "sweep"):
        files = sorted((conf_folder() / group).glob("*.yaml"))
        choices[group] = {file.stem: _about(file) for file in files}
    return Catalogue(tuple(fields), choices, DEFAULT_GROUPS)


def summary(member: Any) -> str:
    """What the file of a registry's member says first, as one paragraph."""
    text = inspect.cleandoc(inspect.getmodule(member).__doc__ or "")
    return " ".join(text.partition("\n\n")[0].split())


def _about(file: Path) -> str:
    """A preset's line `about:`, or a size's comment."""
    found = re.search(r"^(?:about:|#(?! @)) *(.+)", file.read_text(), re.M)
    return found[1] if found else ""


def _of(cls: type, prefix: str, owner: str = "") -> list[Field]:
    """The fields of one dataclass."""
    from lora_lab.hydra_bridge import expected

    hints, said = get_type_hints(cls), meanings(cls)
    out = []
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if hint is Any or dataclasses.is_dataclass(hint):
            continue  # the groups of a RunConfig
        kind, words = expected(hint)
        allowed, listed = _range(cls, field, key, hint)
        words = words or listed or list(JOINED.get(key, ()))
        words += ["true", "false"] * (hint is bool)
        meaning = said.get(field.name) or _of_type(hint)
        out.append(Field(key, owner, kind, allowed, _default(field), meaning, tuple(words)))
    return out


def meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field.

    The nearest class counts, unless it only says whose field it is ("As of LoRA …").
    """
    from docstring_parser import DocstringStyle, parse

    out: dict[str, str] = {}
    for one in cls.__mro__:
        doc = parse(inspect.cleandoc(one.__doc__ or ""), style=DocstringStyle.NUMPYDOC)
        for entry in doc.params:
            text = " ".join((entry.description or "").split()).replace("None", "null")
            for name in entry.arg_name.split(", "):
                if text and not text.startswith("As of "):
                    out.setdefault(name, text)
    return out


def _of_type(hint: Any) -> str:
    """The docstring of a type that has a meaning of its own, as enums do."""
    own = [kind for kind in _parts(hint) if kind.__module__.startswith("lora_lab")]
    return " ".join(inspect.cleandoc(own[0].__doc__ or "").split()) if own else ""


def _parts(hint: Any) -> Iterator[type]:
    """The plain types that a field's type is made of."""
    for part in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        yield get_origin(part) or part


def _range(cls: type, field: Any, key: str, hint: Any) -> tuple[str, list[str]]:
    """What the class says when it refuses a wrong value: the range, and words if they are few."""
    fill = _needed(cls)
    for kind in _parts(hint):
        if kind not in WRONG:
            continue
        try:
            cls(**(fill | {field.name: WRONG[kind]}))
        except WrongInput as error:
            said = str(error)
            if found := re.match(rf"{re.escape(key)}(?:\[.*?\])? must be (.+?); got ", said):
                return found[1], []
            if found := re.match(rf"unknown {re.escape(key)} .+?; allowed: (.+?)\.( |$)", said):
                return f"one of {found[1]}", found[1].split(", ")
    return "", []


def _needed(cls: type) -> dict[str, Any]:
    """A value for each field that has none of its own.

    A class that needs a library which is not installed cannot be made: it has no ranges to ask for.
    """
    out: dict[str, Any] = {}
    while True:
        try:
            cls(**out)
            return out
        except WrongInput as error:
            found = re.match(r"\w+\.(\w+) must be ", str(error))
            if not found or found[1] in out:
                return out
            out[found[1]] = "x"


def _default(field: Any) -> str:
    made = field.default_factory is not dataclasses.MISSING
    value = plain(field.default_factory() if made else field.default)
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{v}" for k, v in value.items()) + "}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
