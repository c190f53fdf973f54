"""Tidy tables as pages: one self-contained HTML file, or served while a sweep runs."""

from __future__ import annotations

import re
from pathlib import Path

from lora_lab.figures import Tables
from lora_lab.report import page, parts, words
from lora_lab.report.details import run_part
from lora_lab.report.ledger import claims_part
from lora_lab.store import CLAIMS
from lora_lab.store.files import make_folder, write_bytes

SIZE = 14_000_000
"""Bytes of the file, which the newest runs one by one fill as far as they fit."""
TAG = 100
"""Bytes around a part, at most."""


def build(tables: Tables, claims: Path | None = None) -> str:
    """The pages as one HTML document.

    Parameters
    ----------
    tables : Tables
        `.runs`, `.measures`, `.traces`, `.spectra`, `.examples` as `lora_lab.load` gives them.
        Empty tables give a page that says so.
    claims : Path, optional
        Folder of a claims ledger.

    Returns
    -------
    str
        HTML with its style, script, pictures and data inside, and a Content-Security-Policy that
        lets it load nothing; without a script it can be read too. Text of the tables appears as
        it stands, never as markup. Equal tables give equal text.
    """
    return _page(tables, words.sections(tables, words.PICTURED), claims)


def _page(tables: Tables, sections: list[words.Section], claims: Path | None) -> str:
    inside = {"runs": parts.runs_part(tables.runs)}
    if claims is not None and claims.is_dir():
        inside["claims"] = claims_part(claims, inside=True)
    inside["layers"] = parts.layers_part(parts.layer_values(tables.measures))
    packed = {name: page.packed(parts.encoded(part)) for name, part in inside.items()}
    told = words.values(tables, sections)
    left = SIZE - len(page.alone(told, packed).encode())
    return page.alone(told, packed | _details(tables, left))


def _details(tables: Tables, left: int) -> dict[str, str]:
    """The newest runs one by one, thinned and packed, as many as fit into so many bytes."""
    runs = tables.runs.sort_values("started", ascending=False, kind="stable", na_position="last")
    told = set(tables.traces["run_id"]) | set(tables.spectra["run_id"])
    ids = [run_id for run_id in runs["run_id"].astype(str) if run_id in told]
    frames = parts.frames_by_run(tables, ids)
    out: dict[str, str] = {}
    for run_id in ids:
        data = page.packed(parts.encoded(run_part(run_id, frames[run_id], thin=True)))
        left -= len(data) + TAG
        if left < 0:
            break
        out[f"run/{run_id}"] = data
    return out


def _folder_name(name: str) -> str:
    """A name of a user as the name of a folder that stays inside its parent."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80]


def write(tables: Tables, path: str | Path) -> Path:
    """Write the pages to `path`, and every drawn figure as PNG and PDF to `figures/` beside it.

    With several pairs of model and data each has its folder in `figures/`. A claims ledger in
    `claims/` beside it is shown too.

    Returns
    -------
    Path
        The report's absolute path.

    Raises
    ------
    StoreError
        When the disk is full or the permission is missing; an old report stays whole.
    """
    path = Path(path).resolve()
    sections = words.sections(tables, words.PICTURED)
    make_folder(path.parent)
    for number, section in enumerate(sections[: words.PICTURED]):
        folder = path.parent / "figures"
        if len(sections) > 1:
            # The number keeps two names apart that differ in a replaced letter only.
            folder /= f"{number + 1}_{_folder_name(section.name)}"
        make_folder(folder)
        for picture in section.pictures:
            write_bytes(folder / f"{picture.name}.png", picture.png)
            write_bytes(folder / f"{picture.name}.pdf", picture.pdf)
    write_bytes(path, _page(tables, sections, path.parent / CLAIMS).encode())
    return path
