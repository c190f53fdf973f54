"""Docstrings as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from docstring_parser import DocstringStyle, parse


def plain(text: str) -> str:
    """Text in which nothing but `code` means anything to Markdown.

    >>> plain("a_b < c `d_e` |x|_F")
    'a_b &lt; c `d_e` \\\\|x\\\\|\\\\_F'
    """
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        marked = re.sub(r"([\\*|]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z]))", r"\\\1", parts[i])
        parts[i] = marked.replace("<", "&lt;").replace("](", "] (")
    return "".join(parts)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar inside of `code` too would end its cell."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def described(function: Any) -> tuple[str, str, str]:
    """Of a docstring: its first paragraph, the others before any section, its references."""
    doc = parse(inspect.cleandoc(function.__doc__ or ""), style=DocstringStyle.NUMPYDOC)
    said = (doc.description or "").partition("\n\n>>>")[0]
    first, _, rest = said.partition("\n\n")
    cited = [m.description or "" for m in doc.meta if m.args == ["references"]]
    return first, rest, " ".join(" ".join(cited).split())


def flowing(text: str) -> str:
    """Paragraphs, each on a line of its own; the items of a list on theirs."""
    lines = (re.sub(r"\n(?!- )\s*", " ", part) for part in text.split("\n\n") if part.strip())
    return "\n\n".join(plain(line) for line in lines)
