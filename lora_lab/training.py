"""One training loop for every method, on torch and accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_lab.adapters import Adapted, snapshot
from lora_lab.batches import TrainingBatches
from lora_lab.config import Host, Optimizer, Schedule, TrainConfig
from lora_lab.evaluation import Scored, evaluate
from lora_lab.models import Examples
from lora_lab.preparation import Setup
from lora_lab.probes import PROBES, History, Moment, copies
from lora_lab.store import Work

OnStep = Callable[[int, int, dict[str, float], list[tuple[int, str, str, float]]], None]
"""Told of a step as a run goes on, see `Trainer`."""


class Diverged(ArithmeticError):
    """NaN or Inf appeared; the message says where and at which step."""


@dataclass
class Progress:
    """What a checkpoint holds beside tensors: all that the rest of the run depends on."""

    step: int = 0
    seconds: float = 0.0
    examples: int = 0
    traces: list[tuple[int, str, str, float]] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)


def spectrum_steps(steps: int, count: int) -> set[int]:
    """About `count` log-spaced steps before the last.

    >>> sorted(spectrum_steps(64, 6))
    [1, 2, 4, 8, 16, 32]
    """
    if count == 0 or steps < 2:
        return set()
    return {round(steps ** (i / count)) for i in range(count)} - {steps}


class Trainer:
    """The state of one training, and its steps.

    Parameters
    ----------
    setup : Setup
    work : Work
        Where checkpoints and snapshots of the run in work are kept.
    host : Host
    on_step : callable of (step, steps, values, traces)
        Told the loss and rate of traced steps, scores, and all trace rows so far: the progress
        display and the mirror.
    """

    def __init__(
        self,
        setup: Setup,
        work: Work,
        host: Host,
        on_step: OnStep,
    ) -> None:
        self.setup, self.work, self.host, self.on_step = setup, work, host, on_step
        self.cfg = setup.config.train
        model = setup.model
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert self.parameters or not setup.adapted, "nothing trains"
        self.progress = Progress()
        self.validation: Scored | None = None
        peak = self.cfg.lr
        assert peak is not None, "the rate is resolved before training"
        if self.parameters:
            self.optimizer = optimizer(self.parameters, rates(setup.adapted), peak, self.cfg)
            kind, warmup = self.cfg.schedule, self.cfg.warmup
            self.scheduler = schedule(self.optimizer, kind, warmup, setup.steps)
        self.probes, self.history = dict(PROBES), History()
        self.spectra_at = spectrum_steps(setup.steps, self.cfg.spectra)
        count = self.cfg.evaluations
        self.evaluate_at = {math.ceil(setup.steps * (i + 1) / count) for i in range(count)}

    def train(self) -> None:
        """Train to the last step, from the last checkpoint if there is one.

        Raises
        ------
        Diverged
            At the first step with NaN or Inf in the loss or a gradient.
        """
        if not self.parameters:  # a head without parameters on a base that stays: the floor
            self._validate()
            return
        self._resume()
        setup, done = self.setup, self.progress
        per_step = self.cfg.accumulate
        sampler = TrainingBatches(
            setup.splits["train"].lengths,
            self.cfg.batch_size,
            setup.config.seed,
            setup.steps * per_step,
            done.step * per_step,
        )
        loader = DataLoader(
            _Indices(setup.splits["train"]),
            batch_sampler=sampler,
            collate_fn=setup.splits["train"].collate,
            # Its own: each loader draws a seed, which a resumed run would draw once more.
            generator=torch.Generator(),
        )
        model, loader, self.optimizer = setup.accelerator.prepare(
            setup.model, loader, self.optimizer
        )
        if done.step == 0:
            self._trace_start()
        model.train()
        saved = clock = time.perf_counter()
        losses: list[torch.Tensor] = []
        for batch in loader:
            if not losses:
                self._watch(done.step + 1)
            with setup.accelerator.accumulate(model):
                loss = setup.model.loss(model(batch), batch["targets"])
                setup.accelerator.backward(loss)
                losses.append(loss.detach())
                done.examples += len(batch["targets"]) * setup.accelerator.num_processes
                if not setup.accelerator.sync_gradients:
                    continue
                done.step += 1
                mean = setup.accelerator.reduce(torch.stack(losses).mean(), "mean")
                self._finish_step(mean, clock)
                losses = []
            if done.step in self.spectra_at:
                self._snapshot()
            done.seconds += time.perf_counter() - clock
            if done.step in self.evaluate_at:
                self._validate()
                model.train()
            if time.perf_counter() - saved > 60 * self.host.checkpoint_minutes:
                self._save()
                saved = time.perf_counter()
            clock = time.perf_counter()

    def _trace_start(self) -> None:
        """Trace ‖dW₀‖ and the validation loss as step 0, for a start that is not the base."""
        norms = {name: m.update_norm() for name, m in self.setup.adapted.items()}
        # A start that is taken from the frozen weight leaves its rounding there.
        if any(norms[n] > 1e-5 * m.W0.double().norm() for n, m in self.setup.adapted.items()):
            self._record({"update_norm": norms})
            self._validate()
            self.validation = None

    def _due(self, step: int) -> set[str]:
        """Which kinds of probes are taken at a step, see `probes.Probe.at`."""
        last = step == self.setup.steps
        traced = step == 1 or last or step % self.cfg.trace_every == 0
        spectra = self.cfg.gradient_spectra and (step in self.spectra_at or last)
        return {kind for kind, due in (("traced", traced), ("spectra", spectra)) if due}

    def _watch(self, step: int) -> None:
        watched = bool(self._due(step))
        for layer in self.setup.adapted.values():
            layer.watched = watched
            layer.forget()

    def _reduce(self) -> None:
        """Average the watched gradients over processes, as DDP does for parameters."""
        if self.setup.accelerator.num_processes > 1:
            for layer in self.setup.adapted.values():
                layer.average(self.setup.accelerator.reduce)

    def _finish_step(self, loss: torch.Tensor, clock: float) -> None:
        """Trace, clip, step. Gradients are traced as they are, before clipping."""
        setup, done, step = self.setup, self.progress, self.progress.step
        setup.config.adapter.before_step(setup.adapted, step, setup.steps)
        due = self._due(step)
        speed = done.examples / max(done.seconds + time.perf_counter() - clock, 1e-9)
        rate = float(self.scheduler.get_last_lr()[0])
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        before = copies(self.setup.adapted) if due else {}
        moment = Moment(step, self.setup.adapted, loss, norm, rate, speed, self.history, before)
        if due:
            self._reduce()
            if self.cfg.gradient_spectra:
                self.history.add_gradients(self.setup.adapted)
            self._probe(moment, due, gradients=True)
        if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
            raise Diverged(self._where(step, float(loss)))
        if self.cfg.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.cfg.clip, norm)
        self.optimizer.step()
        setup.config.adapter.after_step(setup.adapted, step, setup.steps, self.optimizer)
        self.scheduler.step()
        self.optimizer.zero_grad()
        if due:
            self._probe(moment, due, gradients=False)
        if "traced" in due:
            self._tell({"loss": float(loss), "lr": rate})

    def _probe(self, moment: Moment, due: set[str], gradients: bool) -> None:
        """Take the probes of this side of the step that are due."""
        self._record(
            {
                name: probe.values(moment)
                for name, probe in self.probes.items()
                if probe.at in due and probe.reads_gradients is gradients
            }
        )

    def _record(self, found: dict[str, dict[str, Any]]) -> None:
        """Enter trace values; one transfer from the device for all of them."""
        keys = [(layer, trace) for trace, values in found.items() for layer in values]
        values = [v for values in found.values() for v in values.values()]
        if not values:
            return
        numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in values])
        step = self.progress.step
        rows = [
            (step, layer, trace, value)
            for (layer, trace), value in zip(keys, numbers.tolist(), strict=True)
        ]
        self.progress.traces += rows
        self.history.enter(rows)

    def _where(self, step: int, loss: float) -> str:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f"NaN or Inf in the gradient of {name} at step {step} (loss {loss:g})"
        return f"NaN or Inf in the loss at step {step}"

    def _validate(self) -> None:
        found = self.validation = evaluate(self.setup.model, self.setup.splits["validation"])
        self._record({"validation_score": {"": found.score}, "validation_loss": {"": found.loss}})
        self._tell({"validation_score": found.score, "validation_loss": found.loss})

    def _tell(self, values: dict[str, float]) -> None:
        done = self.progress
        self.on_step(done.step, self.setup.steps, values, done.traces)

    def _snapshot(self) -> None:
        """Keep dW_t for the analysis after training; decomposing it now would slow training."""
        if self.setup.accelerator.is_main_process:
            self.work.keep_snapshot(self.progress.step, snapshot(self.setup.adapted))
        self.progress.snapshots.append(self.progress.step)

    def _save(self) -> None:
        """Checkpoint everything that the rest of the run depends on."""
        if not self.setup.accelerator.is_main_process:
            return
        tensors = {f"parameter/{name}": p for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:  # as momentum is before the first step
                    tensors[f"optimizer/{name}/{key}"] = value
        tensors |= {f"state/{name}": t for name, t in states(self.setup.adapted).items()}
        tensors |= {f"gradients/{name}": G for name, G in self.history.gradients.items()}
        tensors["generator"] = torch.get_rng_state()
        self.work.write_checkpoint(
            {name: t.detach().cpu().numpy() for name, t in tensors.items()},
            {**self.progress.__dict__, "scheduler": self.scheduler.state_dict()},
        )

    def _resume(self) -> None:
        """Continue from the checkpoint of an earlier attempt, if there is a sound one."""
        found = self.work.read_checkpoint()
        if found is None:
            return
        tensors, state = found
        self.scheduler.load_state_dict(state.pop("scheduler"))
        state["traces"] = [tuple(row) for row in state["traces"]]
        self.progress = Progress(**state)
        self.history = History(self.progress.traces, _under("gradients/", tensors))
        for name, buffer in states(self.setup.adapted).items():
            buffer.copy_(torch.from_numpy(tensors[f"state/{name}"]))
        for name, parameter in self.parameters.items():
            parameter.data.copy_(torch.from_numpy(tensors[f"parameter/{name}"]))
            if moments := _under(f"optimizer/{name}/", tensors):
                self.optimizer.state[parameter] = moments
        for group, rate in zip(
            self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        # Brings the moments to the parameters' device.
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        torch.set_rng_state(torch.from_numpy(tensors["generator"]))


def _under(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names start so, by the rest of the name."""
    return {
        name.removeprefix(prefix): torch.from_numpy(array)
        for name, array in tensors.items()
        if name.startswith(prefix)
    }


class _Indices:
    """A dataset of positions: batches are collated from the encoded examples at once."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        return index


def rates(adapted: Mapping[str, Adapted]) -> dict[str, float]:
    """Multiples of the run's learning rate, by the parameter's name in the model."""
    return {
        f"base.{layer}.{name}": multiple
        for layer, module in adapted.items()
        for name, multiple in module.rates.items()
    }


def states(adapted: Mapping[str, Adapted]) -> dict[str, torch.Tensor]:
    """What methods remember from step to step: the persistent buffers of their layers."""
    return {
        f"{layer}.{name}": tensor
        for layer, module in adapted.items()
        for name, tensor in module.state_dict().items()
        if name not in dict(module.named_parameters())
    }


def optimizer(
    parameters: Mapping[str, nn.Parameter],
    multiples: Mapping[str, float],
    lr: float,
    config: TrainConfig,
) -> torch.optim.Optimizer:
    """The optimizer of a run, with one group of parameters for each learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(multiples.get(name, 1.0), []).append(parameter)
    grouped = [{"params": of_one, "lr": lr * multiple} for multiple, of_one in groups.items()]
    if config.optimizer is Optimizer.sgd:
        return torch.optim.SGD(
            grouped, lr, config.momentum, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.AdamW(grouped, lr, weight_decay=config.weight_decay, fused=True)


def schedule(
    optimizer: torch.optim.Optimizer, kind: Schedule, warmup: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a share of the steps, then linear, cosine or no decay to 0."""
    library = torch.optim.lr_scheduler
    warm = min(round(warmup * steps), steps - 1)
    rest = steps - warm
    after = {
        Schedule.linear: lambda: library.LinearLR(optimizer, 1.0, 0.0, total_iters=rest),
        Schedule.cosine: lambda: library.CosineAnnealingLR(optimizer, T_max=rest),
        Schedule.constant: lambda: library.ConstantLR(optimizer, 1.0, total_iters=rest),
    }[kind]()
    if warm == 0:
        return after
    rise = library.LinearLR(optimizer, 1 / (warm + 1), 1.0, total_iters=warm)
    return library.SequentialLR(optimizer, [rise, after], milestones=[warm])
