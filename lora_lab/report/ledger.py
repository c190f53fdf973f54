"""The claims ledger as the pages show it: what results/claims says, without running anything."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

SHOWN = ("id", "claim", "outcome", "said", "effect", "interval", "p", "n_seeds", "command")
"""What the pages tell of a claim, of what its JSON holds."""


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
        entry = {key: stored.get(key) for key in SHOWN} | {"picture": ""}
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode("ascii") if inside else ""
            entry["picture"] = f"data:image/png;base64,{data}" if inside else f"claim/{path.stem}"
        found.append(entry)
    return {"claims": found}


def _place(path: Path) -> tuple[str, int, str]:
    """A2 before A10."""
    parts = re.match(r"([A-Z]+)(\d+)", path.stem)
    return (parts[1], int(parts[2]), "") if parts else ("~", 0, path.stem)
