"""Weights & Biases as a mirror: one W&B run for each of ours, grouped by sweep."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from lora_lab.config import RunConfig, as_dict, choice, flat
from lora_lab.trackers import Mirror

PATIENCE = 60
"""Seconds that the client has to send the rest at a run's end."""


class WandbMirror(Mirror):
    """A W&B run; every error of the client is printed to the run's log and ends the mirroring.

    Parameters
    ----------
    mode : str
        `online` or `offline`; offline runs lie under `<results>/wandb`.
    """

    def __init__(
        self,
        mode: Literal["online", "offline"],
        config: RunConfig,
        run_id: str,
        sweep: str,
        results: Path,
    ) -> None:
        self.run: Any = None
        method = choice(config.adapter)

        def start() -> None:
            self.run = wandb.init(
                project="lora_lab",
                id=run_id,
                name=f"{method}-{run_id}",
                group=sweep or None,
                job_type=method,
                tags=[choice(config.model), choice(config.data), method],
                config=flat(as_dict(config)),
                dir=str(results),
                mode=mode,
                resume="allow" if mode == "online" else None,
                # Never a question, never a line on the terminal; and only what the ledger has, so
                # no monitor of the machine, a process that outlives a killed run by seconds.
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=30, x_disable_stats=True
                ),
            )

        self._try(start)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a mirror never fails a run
            print(f"wandb: {error}; the run goes on without it", file=sys.stderr)
            self.run = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        run = self.run
        if run is not None:
            self._try(lambda: run.log({f"train/{k}": v for k, v in values.items()}, step=step))

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        run = self.run
        if run is None:
            return

        def close() -> None:
            run.summary.update(
                {f"eval/{k}" if k in ("score", "loss") else k: v for k, v in summary.items()}
            )
            run.finish(exit_code=int(failed))

        # Without a network the client would go on trying for hours; `wandb sync` can do it later.
        closing = threading.Thread(target=self._try, args=(close,), daemon=True)
        closing.start()
        closing.join(PATIENCE)
        if closing.is_alive():
            print(f"wandb: no end within {PATIENCE} s; left to `wandb sync`", file=sys.stderr)
