"""Names and the files behind them: one file in a package is one name.

A package such as `lora_lab.measures` holds one `Registry`. Listing its names reads the folder and
imports nothing, so a command line can show what exists without paying for torch.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class WrongInput(ValueError):
    """What a user gave cannot be used. The message is one line: given, allowed, what to do."""


class StoreError(RuntimeError):
    """The results folder cannot be used as asked. One line: where, why, what to do."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest allowed word, or nothing.

    >>> did_you_mean("lorra", ["full", "head", "lora"])
    " Did you mean 'lora'?"
    >>> did_you_mean("zebra", ["full"])
    ''
    """
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> WrongInput:
    """The error for a word that is not among the allowed ones."""
    allowed = sorted(allowed)
    return WrongInput(
        f"unknown {kind} {given!r}; allowed: {', '.join(allowed)}.{did_you_mean(given, allowed)}"
    )


def conf_folder() -> Path:
    """`conf`, whose files are names too: inside the package (a wheel) or beside it (a checkout)."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else inside.parents[1] / "conf"


class Registry(Mapping[str, T], Generic[T]):
    """The names of one package, each defined by the file of that name.

    Parameters
    ----------
    package : str
        Dotted name of the package whose files are the names.
    kind : str
        What a member is called in messages, for example ``"measure"``.
    """

    def __init__(self, package: str, kind: str) -> None:
        self.package, self.kind = package, kind
        self._members: dict[str, T] = {}

    def register(self, member: T, module: str | None = None) -> T:
        """Decorator: enter a member under the name of the file (`module`) that defines it."""
        name = (module or member.__module__).rpartition(".")[2]
        assert name not in self._members, f"{self.package}/{name}.py registers twice"
        self._members[name] = member
        return member

    def __iter__(self) -> Iterator[str]:
        path = importlib.import_module(self.package).__path__
        return iter(sorted(m.name for m in pkgutil.iter_modules(path)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def require(self, name: str) -> None:
        """Raise `WrongInput` unless the name exists; imports nothing."""
        if name not in self:
            raise unknown(self.kind, name, self)

    def __getitem__(self, name: str) -> T:
        if name not in self._members:
            self.require(name)
            importlib.import_module(f"{self.package}.{name}")
            assert name in self._members, f"{self.package}/{name}.py registers nothing"
        return self._members[name]
