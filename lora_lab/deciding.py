"""What `lora-lab claims` does: plan, run what is missing, decide, write the ledger of verdicts."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from lora_lab.claims import Claim, Entry, claims, index, read_csv, table_of
from lora_lab.config import Host, choice
from lora_lab.display import alike, console, counted, duration
from lora_lab.engine import in_order, left, sweep
from lora_lab.hydra_bridge import Planned, plan
from lora_lab.progress import Display
from lora_lab.registry import WrongInput
from lora_lab.store import CLAIMS, Store, load

OK, FAILED = 0, 1
SIZES = ("smoke", "paper")


@dataclass(frozen=True)
class Job:
    """A claim and its runs at one size."""

    claim: Claim
    planned: tuple[Planned, ...]

    @property
    def run_ids(self) -> list[str]:
        """Ids of its own runs, without those that they start from."""
        return [one.run_id for one in self.planned]

    def needs_runs(self, folder: Path, size: str) -> bool:
        """Whether its table is not there yet, or not of these runs and this code."""
        entry = Entry(self.claim, folder)
        decided = entry.stored is not None and entry.stored["size"] == size
        return not decided or entry.stale(self.run_ids) in ("table", "runs")

    def decide(self, entry: Entry, size: str, results: Path) -> None:
        """Bring a claim's files up to date; from its own table where that still holds."""
        made_by = self.claim.table_code(self.run_ids)
        if self.needs_runs(entry.folder, size):
            entry.decide(table_of(self.claim, size, results, self.run_ids), size, made_by)
        elif entry.stale(self.run_ids):
            entry.decide(read_csv(entry.path("csv").read_text()), size, made_by)


def jobs(ids: Sequence[str], size: str, words: Sequence[str]) -> tuple[list[Job], Host]:
    """The claims of these ids (all, if none are given) with their runs, and where they run.

    Raises
    ------
    WrongInput
        For an unknown claim, size or override; before anything is made.
    """
    if size not in SIZES:
        raise WrongInput(f"--size must be one of {', '.join(SIZES)}; got {size!r}.")
    if own := [word for word in words if not word.startswith("host.")]:
        raise WrongInput(
            f"a claim fixes its runs: only host.KEY=value may be given beside its id; got {own[0]}."
        )
    found, host = [], plan([[]], words)[1]
    # Claims share lines, and planning a line takes a while.
    known: dict[str, list[Planned]] = {}
    for claim in claims(ids):
        mine: dict[str, Planned] = {}
        for line in claim.lines(size):
            name = shlex.join(line)
            if name not in known:
                known[name] = plan([line], words)[0]
            mine |= {one.run_id: one for one in known[name]}
        found.append(Job(claim, tuple(mine.values())))
    return found, replace(host, yes=True)


def decide(ids: Sequence[str], size: str, words: Sequence[str], only_list: bool = False) -> int:
    """Run what is missing, then decide each claim and write its files and the index.

    Parameters
    ----------
    ids : sequence of str
        Claims; all, if none are given.
    size : str
        ``"smoke"`` or ``"paper"``.
    words : sequence of str
        Overrides of `host`.
    only_list : bool
        Show instead what is decided and what is left to run.

    Returns
    -------
    int
        Exit status: 1 when a run that a claim needs failed.
    """
    chosen, host = jobs(ids, size, words)
    screen, folder = console(), Path(host.results) / CLAIMS
    if only_list:
        screen.print(listed(chosen, size, host))
        return OK
    status = run([job for job in chosen if job.needs_runs(folder, size)], host)
    code = OK
    for job in chosen:
        entry = Entry(job.claim, folder)
        without = [i for i in job.run_ids if status.get(i, "done") not in ("done", "diverged")]
        if without:
            code = FAILED
            first = f"{without[0]} is {status[without[0]]}"
            said = f"not decided: {counted(len(without), 'run')} without a result ({first})"
        else:
            job.decide(entry, size, Path(host.results))
            stored = entry.stored or {}
            said = f"{stored['outcome']}: {stored['said']}"
        screen.print(f"{job.claim.id} {said}", markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    path.write_text(index([Entry(claim, folder) for claim in claims()]))
    screen.print(f"ledger: {path}", markup=False)
    return code


def run(chosen: Sequence[Job], host: Host) -> dict[str, str]:
    """Do the runs that are left, of all these claims at once; status by run_id."""
    every = {one.run_id: one for job in chosen for one in job.planned}
    if not every:
        return {}
    weighed = {i for job in chosen if job.claim.weighs for i in job.run_ids}
    with Display(console()) as display:
        return sweep("claims", list(every.values()), host, display, weighed).status


def listed(chosen: Sequence[Job], size: str, host: Host) -> Table:
    """Every claim with its verdict, its runs, those left, and about how long they take."""
    root = Path(host.results)
    runs = load(root).runs if root.exists() else None
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("claim", "verdict", "runs", "left", "about"):
        table.add_column(heading, justify="right" if heading in ("runs", "left") else "left")
    todo: dict[str, Planned] = {}
    for job in chosen:
        ahead = ahead_of(job, root) if job.needs_runs(root / CLAIMS, size) else []
        todo |= {one.run_id: one for one in ahead}
        numbers = (str(len(job.planned)), str(len(ahead))) if job.planned else ("", "")
        cost = estimate(ahead, runs, host) if job.planned else ""
        name = f"{job.claim.id} {job.claim.name}"
        table.add_row(*(Text(cell) for cell in (name, standing(job, root, size), *numbers, cost)))
    about = estimate(list(todo.values()), runs, host)
    table.caption = f"{counted(len(todo), 'run')} left in all" + (f", {about}" if about else "")
    return table


def standing(job: Job, root: Path, size: str) -> str:
    """Outcome of a claim at a size, and whether it is stale."""
    entry = Entry(job.claim, root / CLAIMS)
    if entry.stored is None or entry.stored["size"] != size:
        return "not decided"
    stale = entry.stale(job.run_ids)
    return str(entry.stored["outcome"]) + (f", stale: {stale}" if stale else "")


def ahead_of(job: Job, root: Path) -> list[Planned]:
    """The runs of a claim that are left, those that they start from too."""
    every = [one for wave in in_order(job.planned) for one in wave]
    if not root.exists():
        return every
    return left(every, Store(root), job.run_ids if job.claim.weighs else ())


def estimate(todo: Sequence[Planned], runs: pd.DataFrame | None, host: Host) -> str:
    """Time that runs take by finished ones of their kind; '?' where there is none of a kind."""
    if not todo:
        return ""
    kinds: dict[tuple[str, ...], list[Planned]] = {}
    for one in todo:
        config = one.config
        groups = (choice(config.model), choice(config.data), choice(config.adapter))
        size = f"{config.data.train_examples} {config.train.epochs}"
        kinds.setdefault((*groups, size), []).append(one)
    seconds = sum(alike(runs, of[0])["seconds"].mean() * len(of) for of in kinds.values())
    workers = host.workers or os.cpu_count() or 1
    return "?" if math.isnan(seconds) else duration(seconds / workers)
