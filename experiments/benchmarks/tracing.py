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
from lora_lab.preparation import prepare
from lora_lab.store import Work
from lora_lab.training import Trainer

ROUNDS = 9
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
    """Print the ratio of each method's fastest runs, with the spread of the rounds' own ratios."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        for method in ("adapter=lora", "adapter=full"):
            pairs = [
                (seconds([method], Path(cache)), seconds([method, *BARE], Path(cache)))
                for _ in range(ROUNDS)
            ]
            # What else runs on a machine only ever adds time: the fastest runs compare best.
            fastest = min(t for t, _ in pairs) / min(b for _, b in pairs)
            ratios = [traced / bare for traced, bare in pairs]
            print(
                f"{method}: traced / bare = {fastest:.3f} (rounds: median "
                f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f})"
            )


if __name__ == "__main__":
    main()
