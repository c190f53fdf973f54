"""A new folder that is there whole or not at all, and work on layers that ends up in it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lab.checkpoints import Job
from lora_lab.config import literal_path
from lora_lab.registry import WrongInput
from lora_lab.store.files import TEMPORARY, sync_folder
from lora_lab.tasks import Kept, Result, Tasks, Tell, run


class NotKept(Kept):
    """What is finished lies in the unfinished folder and goes with it: nothing is taken up."""

    def __init__(self) -> None:
        super().__init__("")

    def read(self, number: int) -> Result | None:
        """Nothing is known of earlier work."""
        return None

    def write(self, number: int, result: Result) -> None:
        """Nothing is kept."""

    def remove(self) -> None:
        """Nothing is there."""


def over_layers(
    work: Callable[..., Result],
    arguments: Sequence[tuple[Any, ...]],
    jobs: Sequence[Job],
    tensors: float,
    tell: Tell,
) -> list[Result]:
    """Results of one task for each job, in their order.

    Parameters
    ----------
    work, arguments
        As in `tasks.Tasks`.
    jobs : sequence of Job
        The layer of each task, or the largest of those that it loads.
    tensors : float
        How many tensors of the layer's size in float64 a worker holds at most.
    tell : callable
        See `tasks.Tell`.
    """
    costs = [float(job.nbytes * min(job.shape)) for job in jobs]
    memory = tensors * max(job.nbytes for job in jobs)
    return run(Tasks(work, arguments, costs, memory), NotKept(), tell)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end and is removed after an error.

    Parameters
    ----------
    out : path
        Not there yet, or an empty folder.

    Raises
    ------
    WrongInput
        If there is something under this name, or no folder to make it in.
    """
    folder = literal_path(str(out))
    if not folder.name or not folder.parent.is_dir():
        raise WrongInput(f"out must be in an existing folder; {str(folder.parent)!r} is none.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise WrongInput(f"out: {str(out)!r} is there and not empty. Give a new folder.")
    unfinished = folder.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{folder.name}")
    unfinished.mkdir()
    try:
        yield unfinished
        for path in [unfinished, *unfinished.rglob("*")]:
            sync_folder(path)  # files too: a rename must not come to the disk before them
        os.replace(unfinished, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
