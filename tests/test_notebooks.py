"""Every notebook runs, without torch, and says what stands in the repository."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from experiments.notebooks import FOLDER, NOTEBOOKS, executed

WITHOUT_TORCH = "import sys; assert 'torch' not in sys.modules, 'a notebook needs no torch'"
LARGEST = 400_000
"""Bytes of a notebook with its pictures."""


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


def said(notebook: nbformat.NotebookNode) -> list[list[dict[str, str]]]:
    """For each code cell what it prints and shows; of a picture, that there is one."""
    return [
        [
            {"text": out.text} if "text" in out else dict(out.data) | seen(out.data)
            for out in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def seen(data: dict[str, str]) -> dict[str, str]:
    return {"image/png": "a picture"} if len(data.get("image/png", "")) > 10_000 else {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_stands_in_the_repository(path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    copy = nbformat.from_dict(committed)
    copy.cells.append(nbformat.v4.new_code_cell(WITHOUT_TORCH))
    *found, nothing = said(executed(copy))
    assert found == said(committed)
    assert nothing == []
    assert {"image/png": "a picture"}.items() <= {
        k: v for cell in found for out in cell for k, v in out.items()
    }.items()
    assert path.stat().st_size < LARGEST


def test_there_are_six_notebooks_and_a_line_on_each() -> None:
    about = (FOLDER / "README.md").read_text()
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")
    assert all(f"]({path.name})" in about for path in NOTEBOOKS)


def test_a_number_that_no_longer_holds_fails_its_notebook() -> None:
    path = NOTEBOOKS[0]
    copy = nbformat.read(path, as_version=4)
    for cell in copy.cells:
        cell.source = cell.source.replace("seed < 5", "seed < 2")
    assert said(executed(copy)) != said(nbformat.read(path, as_version=4))


def test_a_cell_that_raises_stops_the_making() -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="assert 1 == 2"):
        executed(broken)
