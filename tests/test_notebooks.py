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
SMALLEST = 10_000
"""Base64 characters of a picture with something in it."""


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def said(notebook: nbformat.NotebookNode) -> list[list[dict[str, str]]]:
    """For each code cell what it prints and shows; of a picture, that there is one."""
    return [
        [{"text": out.text} if "text" in out else shown(out.data) for out in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def shown(data: dict[str, str]) -> dict[str, str]:
    """What a cell displays; pixels may differ from one machine to the next."""
    picture = data.get("image/png")
    if picture is None:
        return dict(data)
    return {**data, "image/png": "a picture" if len(picture) > SMALLEST else "an empty picture"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_stands_in_the_repository(path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    copy = nbformat.read(path, as_version=4)
    copy.cells.append(nbformat.v4.new_code_cell(WITHOUT_TORCH))
    *found, nothing = said(executed(copy))
    assert found == said(committed)
    assert nothing == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_pictures_and_no_error_or_place_of_this_machine(path: Path) -> None:
    outputs = [out for cell in said(nbformat.read(path, as_version=4)) for out in cell]
    pictures = [out["image/png"] for out in outputs if "image/png" in out]
    assert set(pictures) == {"a picture"}
    assert str(Path.home()) not in (words := str(outputs))
    assert "Warning" not in words
    assert path.stat().st_size < LARGEST


def test_there_are_six_notebooks_and_a_line_on_each() -> None:
    about = (FOLDER / "README.md").read_text()
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")
    assert all(f"]({path.name})" in about for path in NOTEBOOKS)


def test_runs_that_are_not_those_of_the_prose_stop_a_notebook() -> None:
    copy = nbformat.read(NOTEBOOKS[0], as_version=4)
    for cell in copy.cells:
        cell.source = cell.source.replace("seed < 5", "seed < 4")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        executed(copy)


def test_another_number_in_a_sentence_is_seen() -> None:
    committed = nbformat.read(NOTEBOOKS[0], as_version=4)
    copy = nbformat.read(NOTEBOOKS[0], as_version=4)
    (sentence,) = copy.cells[-1].outputs
    sentence.data["text/markdown"] = sentence.data["text/markdown"].replace("0.19 %", "0.18 %")
    assert said(copy) != said(committed)


def test_a_cell_that_raises_stops_the_making() -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="assert 1 == 2"):
        executed(broken)
