"""The claims ledger as the pages show it: what results/claims says, without running anything."""

from __future__ import annotations

import ast
import base64
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STATED = re.compile(r"(?ms)^\s*Claim: (.+?)(?=\n\s*\n|\Z)")


def claims_part(folder: Path, inside: bool) -> dict[str, Any]:
    """Every decided claim: what it says, its verdict with numbers, its figure.

    Parameters
    ----------
    folder : Path
        `results/claims`; need not exist.
    inside : bool
        Figures as data; else the page asks for each (`figure`).
    """
    found = []
    for path in sorted(folder.glob("*.json"), key=_place):
        stored = json.loads(path.read_text(encoding="utf-8"))
        picture = path.with_suffix(".png")
        entry = {key: stored.get(key) for key in ("id", "outcome", "said", "effect", "interval")}
        entry |= {key: stored.get(key) for key in ("p", "n_seeds", "command")}
        entry |= {"claim": stated(path.stem), "picture": ""}
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode("ascii") if inside else ""
            entry["picture"] = f"data:image/png;base64,{data}" if inside else f"claim/{path.stem}"
        found.append(entry)
    return {"claims": found}


def _place(path: Path) -> tuple[str, int, str]:
    """A2 before A10."""
    parts = re.match(r"([A-Z]+)(\d+)", path.stem)
    return (parts[1], int(parts[2]), "") if parts else ("~", 0, path.stem)


def stated(stem: str) -> str:
    """The sentence of a claim from its file, which is read and not run; '' without one."""
    package = find_spec("experiments.claims")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / f"{stem.lower()}.py"
        if path.is_file():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            sentence = STATED.search(text)
            return " ".join(sentence[1].split()) if sentence else ""
    return ""
