"""What default tracing costs: training time with it over training time without, interleaved.

The default (a row every `train.trace_every` steps, spectra at `train.spectra` steps) against one
traced step at each end and no spectra, on MiniLM, for full fine-tuning and LoRA. To reach: 1.05.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch

from lora_lab.config import Host
from lora_lab.hydra_bridge import plan
from lora_lab.store import Work
from lora_lab.training import Trainer, prepare

ROUNDS = 5
BARE = ["train.trace_every=1000000", "train.spectra=0"]


def seconds(overrides: list[str], cache: Path) -> float:
    """Training time of one run, evaluation excluded."""
    (one,), _ = plan([["size=demo", "data.train_examples=1024", "train.evaluations=0"]], overrides)
    setup = prepare(one.config, Host(), cache)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(setup, Work(Path(folder)), Host(), lambda *_: None)
        trainer.train()
    return trainer.progress.seconds


def main() -> None:
    """Print the ratio of each method, with the spread over rounds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        for method in ("adapter=lora", "adapter=full"):
            ratios = []
            for _ in range(ROUNDS):
                bare = seconds([method, *BARE], Path(cache))
                traced = seconds([method], Path(cache))
                ratios.append(traced / bare)
            print(
                f"{method}: traced / bare = {statistics.median(ratios):.3f} "
                f"(min {min(ratios):.3f}, max {max(ratios):.3f}, {ROUNDS} rounds)"
            )


if __name__ == "__main__":
    main()
