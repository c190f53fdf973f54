"""Conditions on rows, as `lora-lab runs --where` takes them: a small grammar, never `eval`.

condition  := both ("or" both)*
both       := one ("and" one)*
one        := "not" one | "(" condition ")" | field sign value | field "in" "(" value, … ")"
sign       := = == != < <= > >=
value      := number | word | "text in quotes" | none
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NoReturn

import pandas as pd

from lora_lab.registry import WrongInput, unknown

SIGNS: dict[str, Callable[[Any, Any], pd.Series]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
TOKEN = re.compile(r"""\s*(?:(<=|>=|==|!=|[=<>(),])|"([^"]*)"|'([^']*)'|([^\s=<>!(),"']+))""")
DEEPEST = 50
"""Brackets and nots inside each other."""


def where(table: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows for which a condition holds.

    A comparison with what is missing does not hold; ``field = none`` asks for it.

    Parameters
    ----------
    table : DataFrame
        Any columns; text, numbers and truth values are compared as what they are.
    condition : str
        See the grammar of this module.

    Raises
    ------
    WrongInput
        For an unknown field, a value of another kind than its field, or what is no condition.

    Examples
    --------
    >>> runs = pd.DataFrame({"adapter": ["lora", "lora", "full"], "adapter.r": [4, 8, None]})
    >>> where(runs, "adapter = lora and adapter.r >= 8").index.tolist()
    [1]
    >>> where(runs, "adapter.r = none or not adapter in (full)").index.tolist()
    [0, 1, 2]
    """
    return table[Condition(table, condition).holds()]


class Condition:
    """One condition that is being read, from left to right."""

    def __init__(self, table: pd.DataFrame, text: str) -> None:
        self.table, self.text, self.deep = table, text, 0
        self.tokens: list[tuple[str, bool]] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            found = TOKEN.match(text, at)
            if found is None:
                self._refuse(f"{text[at:].strip()[:20]!r} is not understood")
            sign, *quoted, word = found.groups()
            in_quotes = next((q for q in quoted if q is not None), None)
            token = sign or word if in_quotes is None else in_quotes
            self.tokens.append((token, in_quotes is not None))
            at = found.end()
        self.at = 0

    def holds(self) -> pd.Series:
        """Truth by row."""
        found = self._any()
        if self.at < len(self.tokens):
            self._refuse(f"{self.tokens[self.at][0]!r} is one word too many")
        return found

    def _refuse(self, why: str) -> NoReturn:
        raise WrongInput(
            f"{why} in the condition {self.text[:80]!r}; write for example "
            '"adapter.r >= 8 and score > 0.8".'
        )

    def _peek(self) -> str:
        """The next word or sign in lower case; '' for text in quotes and at the end."""
        token, quoted = self.tokens[self.at] if self.at < len(self.tokens) else ("", True)
        return "" if quoted else token.lower()

    def _next(self, wanted: str) -> tuple[str, bool]:
        if self.at == len(self.tokens):
            self._refuse(f"it ends where {wanted} should stand")
        self.at += 1
        return self.tokens[self.at - 1]

    def _skip(self, word: str) -> bool:
        """Whether the next word is this one, which is then passed."""
        there = self._peek() == word
        self.at += there
        return there

    def _need(self, word: str) -> None:
        if not self._skip(word):
            self._refuse(f"{word!r} is missing")

    def _any(self) -> pd.Series:
        found = self._all()
        while self._skip("or"):
            found |= self._all()
        return found

    def _all(self) -> pd.Series:
        found = self._one()
        while self._skip("and"):
            found &= self._one()
        return found

    def _one(self) -> pd.Series:
        self.deep += 1
        if self.deep > DEEPEST:
            self._refuse("too many brackets stand")
        if self._skip("not"):
            found = ~self._one()
        elif self._skip("("):
            found = self._any()
            self._need(")")
        else:
            found = self._compared()
        self.deep -= 1
        return found

    def _compared(self) -> pd.Series:
        field, _ = self._next("a field")
        if field not in self.table:
            raise unknown("field", field, map(str, self.table))
        column = self.table[field]
        if self._skip("in"):
            self._need("(")
            found = self._equal(column, *self._next("a value"))
            while self._skip(","):
                found |= self._equal(column, *self._next("a value"))
            self._need(")")
            return found
        sign = self._peek()
        if sign not in SIGNS:
            self._refuse(f"after {field!r} one of {' '.join(SIGNS)} or 'in' is missing")
        self.at += 1
        value, quoted = self._next("a value")
        if sign in ("=", "=="):
            return self._equal(column, value, quoted)
        if sign == "!=":
            return ~self._equal(column, value, quoted)
        if not pd.api.types.is_numeric_dtype(column):
            self._refuse(f"{field!r} is text, which only = and != compare,")
        return SIGNS[sign](column, self._number(field, value))

    def _equal(self, column: pd.Series, value: str, quoted: bool) -> pd.Series:
        if not quoted and value.lower() == "none":
            return column.isna()
        if pd.api.types.is_bool_dtype(column):
            return column.astype(str).str.lower() == value.lower()
        if pd.api.types.is_numeric_dtype(column):
            return column == self._number(str(column.name), value)
        return column.astype("string").eq(value).fillna(False).astype(bool)

    def _number(self, field: str, value: str) -> float:
        try:
            return float(value)
        except ValueError:
            self._refuse(f"{field!r} is a number and {value!r} is none")
