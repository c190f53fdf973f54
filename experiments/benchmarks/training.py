"""Training speed: our loop against Hugging Face's Trainer + PEFT, default and at its best.

The same MiniLM with mean pooling and a linear head, the same 2,048 sentences, batch size, steps,
learning rates and thread count. Every run has a process of its own, contestants take turns. The
tuned peer groups by length and trains in bfloat16 with fused AdamW. Samples per second are
training examples over wall time from the first batch to the last step, with collation and, for
ours, default tracing inside. To reach: at least 3.5 x the default peer and 1.5 x the tuned one, at
an equal or better score. About twelve minutes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lora_lab.config import Host, RunConfig
from lora_lab.evaluation import evaluate
from lora_lab.hydra_bridge import plan
from lora_lab.models import Model
from lora_lab.models.hf import Tokens
from lora_lab.preparation import Setup, prepare
from lora_lab.stats import t_interval
from lora_lab.store import Work
from lora_lab.training import Trainer

TABLE = Path("results/benchmarks/training.csv")
SEEDS = (0, 1, 2)
METHODS = ("lora", "full")
CONTESTANTS = ("ours", "peer", "peer tuned")
SIZE = ["data.train_examples=2048", "data.validation_examples=256", "data.test_examples=1000"]


def config_of(method: str, seed: int) -> RunConfig:
    """What all contestants train: the lab's defaults."""
    (one,), _ = plan([[f"adapter={method}", f"seed={seed}", *SIZE, "train.evaluations=0"]])
    config: RunConfig = one.config
    return config


# ---- contestants -------------------------------------------------------------------------------


def ours(method: str, seed: int, cache: Path) -> tuple[float, Setup]:
    """Samples per second, and the trained run."""
    setup = prepare(config_of(method, seed), Host(), cache)
    trainer = Trainer(setup, Work(cache), Host(), lambda *_: None)
    trainer.train()
    return trainer.progress.examples / trainer.progress.seconds, setup


class Network(nn.Module):
    """The same network as a Trainer wants it: it returns its loss."""

    def __init__(self, model: Model, base: nn.Module) -> None:
        super().__init__()
        self.base, self.classifier = base, model.classifier

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        states = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        logits = self.classifier((states * mask).sum(1).float() / mask.sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Clock(transformers.TrainerCallback):
    """Wall time from the first batch to the last step."""

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()


def peer(method: str, seed: int, cache: Path, tuned: bool) -> tuple[float, Setup]:
    """Trainer + PEFT on the same network; the trained weights are handed to our evaluation."""
    config = config_of(method, seed)
    setup = prepare(config, Host(), cache)
    torch.manual_seed(seed)
    base = transformers.AutoModel.from_pretrained(config.model.source())
    if method == "lora":
        targets = list(setup.adapted)
        wanted = LoraConfig(
            r=config.adapter.r, lora_alpha=2 * config.adapter.r, target_modules=targets
        )
        base = get_peft_model(base, wanted)
    else:
        base.requires_grad_(False)
        for layer in setup.adapted:
            base.get_submodule(layer).weight.requires_grad_(True)
    network = Network(setup.model, base)
    examples = setup.splits["train"]
    assert isinstance(examples, Tokens)
    rows = [
        {
            "input_ids": examples.ids[a:b].tolist(),
            "attention_mask": [1] * int(b - a),
            "labels": int(y),
        }
        for a, b, y in zip(
            examples.offsets[:-1], examples.offsets[1:], examples.targets, strict=True
        )
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.source())
    best = (
        {"bf16": True, "use_cpu": True, "train_sampling_strategy": "group_by_length"}
        if tuned
        else {}
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(cache / "trainer"),
        per_device_train_batch_size=config.train.batch_size,
        num_train_epochs=config.train.epochs,
        learning_rate=config.train.lr,
        warmup_steps=config.train.warmup,
        max_grad_norm=config.train.clip,
        seed=seed,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        **best,
    )
    clock = Clock()
    trainer = transformers.Trainer(
        model=network,
        args=arguments,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[clock],
    )
    trainer.train()
    trained = base.merge_and_unload() if method == "lora" else base
    setup.model.base = trained.float()
    return len(rows) / (clock.end - clock.begin), setup


def contest(name: str, method: str, seed: int) -> None:
    """One run, in this process; a JSON line on stdout."""
    with tempfile.TemporaryDirectory() as folder:
        run = ours if name == "ours" else peer
        more = {} if name == "ours" else {"tuned": name == "peer tuned"}
        speed, setup = run(method, seed, Path(folder), **more)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        score = evaluate(setup.model, setup.splits["test"]).score
    row = {"contestant": name, "method": method, "seed": seed}
    print(json.dumps(row | {"samples_per_second": speed, "peak_memory": memory, "score": score}))


# ---- where the time goes -------------------------------------------------------------------------

GROUPS = {
    "layer norm": ("layer_norm",),
    "softmax": ("softmax",),
    "GELU": ("gelu",),
    "AdamW": ("adamw",),
    "embedding": ("embedding", "index"),
    "matrix products": ("mm", "linear", "matmul"),
    "copies and casts": ("copy", "clone", "contiguous", "cat", "fill", "zero"),
    "sums and products of entries": ("add", "mul", "sum", "div", "sub", "norm", "pow", "mean"),
}
"""Kinds of kernels and parts of their names; a kernel counts for the first kind that fits."""


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name.

    >>> kind_of("aten::native_layer_norm"), kind_of("aten::addmm_"), kind_of("aten::add_")
    ('layer norm', 'matrix products', 'sums and products of entries')
    """
    for kind, words in GROUPS.items():
        if any(word in kernel for word in words):
            return kind
    return "everything else"


def shares(method: str) -> tuple[float, float, pd.Series]:
    """Share of the matrix peak reached in training, that peak, and the time by kind of kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        ours(method, 0, cache)  # compiles the kernels
        speed, _ = ours(method, 0, cache / "again")
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            ours(method, 0, cache / "seen")
        setup = prepare(config_of(method, 0), Host(), cache)
        batch = setup.splits["train"].collate(range(256))
        with FlopCounterMode(display=False) as counter:
            setup.model.loss(setup.model(batch), batch["targets"]).backward()
    work = counter.get_total_flops() / 256
    # Padding of the counted batch is not that of training: scale by tokens.
    lengths = setup.splits["train"].lengths
    work *= float(lengths.mean()) / float(lengths[:256].max())
    peak = matrix_peak()
    times: dict[str, float] = {}
    for event in seen.key_averages():
        kind = kind_of(event.key)
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total
    table = pd.Series(times).sort_values(ascending=False) / sum(times.values())
    return speed * work / peak, peak, table


def matrix_peak(size: int = 2048) -> float:
    """Fastest bfloat16 product of square matrices, FLOP/s."""
    A, B = (torch.randn(size, size).bfloat16() for _ in range(2))
    return max(2 * size**3 / _timed(lambda: A @ B) for _ in range(20))


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    """Run all, print the table and where our time goes."""
    rows = []
    for seed in SEEDS:
        for method in METHODS:
            for name in CONTESTANTS:
                command = [sys.executable, "-m", "experiments.benchmarks.training"]
                words = [name, method, str(seed)]
                done = subprocess.run(
                    [*command, *words], check=True, capture_output=True, text=True
                )
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(TABLE, index=False, float_format="%.4g")
    for method in METHODS:
        own = table[table["method"] == method]
        wide = own.pivot(index="seed", columns="contestant")
        speed = wide["samples_per_second"]
        print(f"\n{method}")
        for name in CONTESTANTS:
            score, low, high = t_interval(wide["score"][name])
            memory = wide["peak_memory"][name].mean()
            line = f"  {name:<11}{speed[name].median():7.1f} samples/s  {memory:6.0f} MB  "
            print(f"{line}score {score:.3f} [{low:.3f}, {high:.3f}]")
        for name in CONTESTANTS[1:]:
            ratios = speed["ours"] / speed[name]
            spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
            print(f"  ours / {name}: {ratios.median():.2f} (seeds {spread})")
        share, peak, kinds = shares(method)
        print(f"  {share:.1%} of the matrix peak ({peak / 1e9:.0f} GFLOP/s in bfloat16); the time:")
        for kind, part in kinds.items():
            print(f"    {kind:<30}{part:6.1%}")


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else contest(sys.argv[1], sys.argv[2], int(sys.argv[3]))
