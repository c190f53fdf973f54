"""Notebooks, committed with their outputs: `python -m experiments.notebooks` makes those anew."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def executed(notebook: nbformat.NotebookNode, folder: Path = FOLDER) -> nbformat.NotebookNode:
    """A notebook with the outputs of all its cells, run in a fresh kernel in `folder`.

    What differs from one machine or hour to the next, and shows nothing, is left out.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        When a cell raises; the message shows the cell.
    """
    done = nbformat.from_dict(notebook)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(done, timeout=300, record_timing=False, resources=where).execute()
    done.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return done
