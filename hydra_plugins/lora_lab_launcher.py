"""Hydra's `-m` hands the jobs of a multirun to the engine: deduplicated, isolated, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig


class LoraLabLauncher(Launcher):
    """Plans every job of the batch and runs what is not done yet."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what `launch` needs; the task itself is not called."""
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Do the batch; a job that has no result is returned as failed."""
        # Hydra imports every plugin at start; what is heavy waits until it is used.
        from lora_lab.display import console
        from lora_lab.engine import sweep
        from lora_lab.hydra_bridge import planned_of
        from lora_lab.progress import Display, show

        load = self.context.config_loader.load_sweep_config
        jobs = [planned_of(load(self.config, list(words))) for words in job_overrides]
        host, screen = jobs[0][1], console()
        with Display(screen) as display:
            summary = sweep("multirun", [one for one, _ in jobs], host, display)
        show(screen, summary, host)
        returns = []
        for words, (one, _) in zip(job_overrides, jobs, strict=True):
            done = JobReturn(overrides=list(words), status=JobStatus.COMPLETED)
            done.return_value = summary.status[one.run_id]
            if one.run_id in summary.failed:
                done.status = JobStatus.FAILED
                done.return_value = RuntimeError(summary.errors.get(one.run_id, "no result"))
            returns.append(done)
        return returns


ConfigStore.instance().store(
    group="hydra/launcher",
    name="lora_lab",
    node={"_target_": "hydra_plugins.lora_lab_launcher.LoraLabLauncher"},
    provider="lora_lab",
)
