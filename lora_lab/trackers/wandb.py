"""Weights & Biases as a mirror: one W&B run for each of ours, grouped by sweep."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from PIL import Image

from lora_lab.config import RunConfig, Tracker, as_dict
from lora_lab.trackers import Mirror
from lora_lab.trackers.content import STEP, About, Content, Trace, about, history, results

PATIENCE = 60
"""Seconds that the client has to send the rest at a run's end."""

# A table is one record here: beyond its limit the client would leave rows out.
wandb.Table.MAX_ROWS = wandb.Table.MAX_ARTIFACT_ROWS = 10_000_000


def _open(mode: Tracker, folder: Path, one: About) -> Any:
    """A W&B run; offline ones lie under `<folder>/wandb`."""
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "lora_lab",
        id=one.run_id,
        name=one.name,
        group=one.group or None,
        job_type=one.method,
        tags=one.tags,
        config=one.config,
        dir=str(folder),
        mode="online" if mode is Tracker.online else "offline",
        resume="allow" if mode is Tracker.online else None,
        reinit="create_new",  # a user's own W&B run in this process is none of ours
        # Never a question, never a line on the terminal; and only what the ledger has, so no
        # monitor of the machine, a process that outlives a killed run by seconds.
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=30,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        ),
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    return run


def _in_time(action: Callable[[], None]) -> None:
    """Without a network the client would go on trying for hours."""
    trouble: list[Exception] = []

    def act() -> None:
        try:
            action()
        except Exception as error:
            trouble.append(error)

    acting = threading.Thread(target=act, daemon=True)
    acting.start()
    acting.join(PATIENCE)
    if acting.is_alive():
        raise TimeoutError(f"no end within {PATIENCE} s; `lora-lab sync` does the rest")
    if trouble:
        raise trouble[0]


class WandbMirror(Mirror):
    """The W&B run of one that trains, online; an error of the client ends it with a line.

    It gets the same history rows that `write` would write, each when its step is complete. So
    what W&B has of a killed run are whole rows up to some step, and both the next attempt, which
    tells from the first step on, and `write` go on behind them.
    """

    def __init__(self, config: RunConfig, run_id: str, sweep: str, folder: Path) -> None:
        self.run: Any = None
        self._traces: Sequence[Trace] = ()
        self._told = 0

        def start() -> None:
            with _staging(folder / "wandb", run_id):
                self.run = _open(Tracker.online, folder, about(run_id, as_dict(config), sweep))

        self._try(start)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a mirror never fails a run
            print(f"wandb: {error}; the run goes on without it", file=sys.stderr)
            self.run = None

    def follow(self, traces: Sequence[Trace]) -> None:
        self._traces = traces
        # The validation score of the newest step is still to come.
        self._tell(bisect_left(traces, traces[-1][0], key=itemgetter(0)))

    def _tell(self, end: int) -> None:
        if self.run is not None and end > self._told:
            rows, self._told = self._traces[self._told : end], end
            self._try(lambda: _log(self.run, history(rows)))

    def finish(self, metrics: Mapping[str, Any], failed: bool) -> None:
        if not failed:
            self._tell(len(self._traces))
        if (run := self.run) is None:
            return

        def close() -> None:
            run.summary.update(results(metrics))
            run.finish(exit_code=int(failed))

        self._try(lambda: _in_time(close))


def _log(run: Any, rows: Iterator[tuple[int, dict[str, Any]]]) -> None:
    """Add rows that W&B does not have: steps of the run as it was when it was opened."""
    for step, row in rows:
        if step >= run.starting_step:
            run.log(row, step=step)


# ---- whole runs --------------------------------------------------------------------------------


def write(content: Content, mode: Tracker, folder: Path, files: Sequence[Path] = ()) -> None:
    """Write a finished run whole.

    Offline this replaces whatever an earlier call (or a kill in the middle of one) left of the
    run. Online, W&B keeps a run's rows: those that it has from the training are not sent again,
    the summary and the tables are replaced.

    Parameters
    ----------
    folder : Path
        Results folder; all that the client writes is under its `wandb`.
    files : sequence of Path
        Of the trained weights, which go into an artifact.

    Raises
    ------
    Exception
        Whatever the client raises, and TimeoutError.
    """
    with _whole(mode, folder, content.about, content.failed) as run:
        _log(run, iter(content.history))
        end = max([step for step, _ in content.history] or [-1]) + 1
        tables = {f"tables/{n}": _table(rows) for n, rows in content.tables.items() if len(rows)}
        if tables:
            run.log(tables, step=max(end, run.starting_step))
        run.summary.update(content.summary)
        if files:
            artifact = wandb.Artifact(f"update-{content.about.run_id}", type="update")
            for file in files:
                artifact.add_file(str(file), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)


@dataclass(frozen=True)
class Page:
    """The report of a sweep: its HTML, its figures as PNG by name, its runs."""

    sweep: str
    html: str
    figures: Mapping[str, bytes]
    runs: pd.DataFrame


def write_page(name: str, page: Page, mode: Tracker, folder: Path) -> None:
    """Write a sweep's report as the W&B run `name` of job type `report`; see `write`."""
    heading = About(name, name, page.sweep, "report", ["report"], {"sweep": page.sweep})
    with _whole(mode, folder, heading, False) as run:
        media: dict[str, Any] = {"report": wandb.Html(page.html, inject=False)}
        for title, png in page.figures.items():
            media[f"figures/{title}"] = wandb.Image(Image.open(io.BytesIO(png)))
        run.log(media | {"tables/runs": _table(page.runs)})


def _table(rows: pd.DataFrame) -> wandb.Table:
    plain = rows.astype(object).where(rows.notna(), None)
    return wandb.Table(columns=[*rows.columns], data=plain.to_numpy().tolist())


@contextlib.contextmanager
def _whole(mode: Tracker, folder: Path, one: About, failed: bool) -> Iterator[Any]:
    """A W&B run in place of what is there of it on disk, closed at the end."""
    _remove(folder / "wandb", one.run_id)
    with _staging(folder / "wandb", one.run_id):
        run = _open(mode, folder, one)
        try:
            yield run
        except BaseException:
            with contextlib.suppress(Exception):
                _in_time(lambda: run.finish(exit_code=1))
            raise
        _in_time(lambda: run.finish(exit_code=int(failed)))


def _remove(folder: Path, name: str) -> None:
    """Remove what the client has on disk of a W&B run."""
    own = re.compile(rf"(offline-)?run-\d{{8}}_\d{{6}}-{re.escape(name)}")
    of_it = [entry for entry in folder.glob("*run-*") if own.fullmatch(entry.name)]
    for entry in (*of_it, folder / "staging" / name):
        shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def _staging(folder: Path, name: str) -> Iterator[None]:
    """Where the client copies tables and files of artifacts, instead of the user's home."""
    places = {"WANDB_DATA_DIR": folder / "staging" / name, "WANDB_CACHE_DIR": folder / "cache"}
    before = {key: os.environ.get(key) for key in places}
    os.environ.update({key: str(place) for key, place in places.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
