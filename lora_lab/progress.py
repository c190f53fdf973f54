"""What a sweep shows while it runs and when it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lora_lab.config import Host, choice
from lora_lab.display import bar, counted, duration, runs_table
from lora_lab.engine import Summary, Watcher
from lora_lab.hydra_bridge import Planned
from lora_lab.store import RunDir, load


def described(one: Planned) -> str:
    """A run in a few words: method, rank, scale, rate, seed."""
    adapter = one.config.adapter
    parts = [choice(adapter)]
    for name in ("r", "alpha"):
        if hasattr(adapter, name):
            parts.append(f"{name}={getattr(adapter, name):g}")
    return " ".join([*parts, f"lr={one.config.train.lr:g}", f"seed={one.config.seed}"])


class Display(Watcher):
    """Progress of a sweep: one live line on a terminal, a line for each run elsewhere."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self.total = self.done = 0
        self.began = time.monotonic()
        self.progress = bar(screen)
        self.bar = self.progress.add_task("runs", total=None, note="")

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, todo: Sequence[Planned], skipped: int, workers: int) -> None:
        """Say how much there is to do."""
        self.total, self.began = len(todo), time.monotonic()
        self.progress.update(self.bar, total=len(todo))
        at_once = f", {workers} at once" if todo else ""
        self.screen.print(f"{counted(len(todo), 'run')} to do, {skipped} already done{at_once}")

    def tick(self, running: Sequence[RunDir]) -> None:
        """Update the time left."""
        if not self.screen.is_terminal:
            return
        shares = [p["step"] / p["steps"] for run in running if (p := run.read_progress())]
        passed, ahead = self.done + sum(shares), self.total - self.done - sum(shares)
        spent = time.monotonic() - self.began
        note = f"about {duration(spent / passed * ahead)} left" if passed > 0.2 else ""
        self.progress.update(self.bar, completed=self.done, note=note)

    def ended(self, one: Planned, status: str, error: str) -> None:
        """A line for the run."""
        self.done += 1
        self.progress.update(self.bar, completed=self.done)
        took = f"{time.monotonic() - self.began:.0f} s"
        text = f"[{self.done}/{self.total}] {took} {one.run_id} {described(one)}: {status} {error}"
        self.screen.print(Text(text.rstrip()), soft_wrap=True)


def show(screen: Console, summary: Summary, host: Host) -> None:
    """The table of a sweep's runs, and what went wrong, each in a line with its log."""
    runs = load(host.results).runs
    screen.print(runs_table(runs[runs["run_id"].isin(summary.status)], screen.width))
    for run_id, status in summary.status.items():
        if status != "done":
            log = Path(host.results) / "runs" / run_id / "log.txt"
            line = f"{status} {run_id}: {summary.errors.get(run_id, 'as before')} (log: {log})"
            screen.print(Text(line), soft_wrap=True)
