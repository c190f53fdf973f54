"""One run, from its config to DONE: train, score, decompose, record."""

from __future__ import annotations

import contextlib
import math
import platform
import resource
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lora_lab.adapters import Adapted, snapshot
from lora_lab.adapters.full import FullLayer
from lora_lab.checkpoints.write import factor_names, lora_config, whole_name
from lora_lab.config import Host, Keep, RunConfig, as_dict, run_id
from lora_lab.evaluation import Scored, evaluate, oracle_truncation
from lora_lab.linalg import Dense, Spectrum, Update, decompose, updates_of
from lora_lab.measuring import (
    SOON,
    Final,
    base_key,
    base_spectra,
    kept,
    measure_run,
    storage_of,
)
from lora_lab.preparation import Setup, Trained, prepare
from lora_lab.registry import WrongInput
from lora_lab.store import RunDir, Store, Work
from lora_lab.training import Diverged, OnStep, Trainer


def identity(config: RunConfig) -> dict[str, Any]:
    """Content of a run's config.json."""
    return {"run_id": run_id(config), "config": as_dict(config), "version": version("lora-lab")}


def source_state() -> dict[str, Any]:
    """Commit of the code that runs, and whether it was changed since; '' outside of a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return {
        "git_commit": commit,
        "git_dirty": bool(commit and git("status", "--porcelain", "-uno")),
    }


def provenance(config: RunConfig, host: Host, source: Mapping[str, Any]) -> dict[str, Any]:
    """Where the numbers of a run come from."""
    return {
        **source,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "device": host.device,
        "cpu": _cpu(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "lora_lab": version("lora-lab"),
        "model_hash": config.model.fingerprint(config.data),
        "seeds": {"run": config.seed, "data": config.data.seed},
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def execute(
    config: RunConfig,
    host: Host,
    store: Store,
    run: RunDir,
    source: Mapping[str, Any],
    on_step: OnStep,
) -> None:
    """Do one run in its locked folder, from its last checkpoint if there is one.

    Parameters
    ----------
    config : RunConfig
        Resolved.
    run : RunDir
        Locked by the caller, not finished.
    source : mapping
        `source_state()` of the code.
    on_step : callable
        See `training.Trainer`.
    """
    began = time.perf_counter()
    where = provenance(config, host, source)
    run.begin(identity(config), where)
    setup = prepare(config, host, store.cache, **linked(config, store))
    work = Work(run.work)
    trainer = Trainer(setup, work, host, on_step)
    metrics: dict[str, Any] = {"status": "done", **counts(setup)}
    try:
        trainer.train()
        updates = final_updates(setup.adapted)
        spectra = {n: decompose(u, vectors=True, layer=n) for n, u in updates.items()}
        metrics |= scores(setup, run, trainer.validation)
        record_update(setup, run, spectra, host)
        record_spectra(setup, trainer, run, work, spectra)
        oracle = [*oracle_rows(setup, spectra, trainer.progress.step)]
        if oracle:
            run.write_table("oracle", pd.DataFrame(oracle))
    except Diverged as error:
        metrics |= {"status": "diverged", "error": str(error)}
    run.write_json(
        "provenance",
        where
        | {
            "data_hash": setup.problem.fingerprint,
            "processes": setup.accelerator.num_processes,
        },
    )
    done = trainer.progress
    traces = pd.DataFrame(done.traces, columns=["step", "layer", "trace", "value"])
    run.write_table("traces", traces)
    # Linux gives kilobytes, macOS bytes.
    unit = 1e6 if platform.system() == "Darwin" else 1e3
    run.write_json(
        "metrics",
        metrics
        | {
            "steps": done.step,
            "train_seconds": done.seconds,
            "samples_per_second": done.examples / done.seconds if done.seconds else math.nan,
            "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
            "seconds": time.perf_counter() - began,
        },
    )
    measurable = metrics["status"] == "done" and setup.adapted
    if measurable:  # before the seal: measures that a kill prevents are taken later, and need it
        model = config.model
        key = base_key(where["model_hash"], model.start, setup.adapted, model.quantize.name)
        store.write_base(key, setup.base)
    run.seal()
    if measurable:
        bases = base_spectra(store, key, setup.base)
        finals = {
            n: Final(
                spectra[n],
                {"update": updates[n], "W0": W0.astype(np.float64), "base": bases[n]},
            )
            for n, W0 in setup.base.items()
        }
        measure_run(run, finals, SOON)


def follow(config: RunConfig, host: Host, store: Store, run: RunDir) -> None:
    """The part of the other processes of `accelerate launch`: train along, record nothing."""
    # Joins the first process, which has begun the run by then.
    setup = prepare(config, host, store.cache, **linked(config, store))
    with contextlib.suppress(Diverged):
        Trainer(setup, Work(run.work), host, lambda *_: None).train()


def counts(setup: Setup) -> dict[str, int | float]:
    """Parameters that train and that do not."""
    shapes = {name: layer.shape for name, layer in setup.adapted.items()}
    trainable = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    # A changed layer's own weight is a buffer now, and so no parameter any more.
    hidden = sum(layer.W0.numel() for layer in setup.adapted.values())
    everything = sum(p.numel() for p in setup.model.parameters())
    own = setup.config.adapter.parameters(shapes)
    dense = sum(m.W.numel() for m in setup.adapted.values() if isinstance(m, FullLayer))
    total = everything + hidden - dense
    return {
        "trainable": trainable,
        "adapter_parameters": own,
        "frozen": total - trainable,
        "total": total,
        "trainable_percent": 100 * trainable / total,
    }


def scores(setup: Setup, run: RunDir, validation: Scored | None) -> dict[str, float]:
    """Test and validation result of the trained model; the latter may be known already.

    What each test example contributes becomes the run's table `examples`.
    """
    test = evaluate(setup.model, setup.splits["test"])
    if validation is None:
        validation = evaluate(setup.model, setup.splits["validation"])
    if not math.isfinite(test.loss):
        raise Diverged("NaN or Inf in the test loss after the last step")
    run.write_table("examples", pd.DataFrame({"i": range(len(test.each)), "value": test.each}))
    return {"score": test.score, "loss": test.loss, "validation_score": validation.score}


def final_updates(adapted: Mapping[str, Adapted]) -> dict[str, Update]:
    """Every layer's final update; raises `Diverged` for NaN or Inf in one."""
    updates = updates_of(snapshot(adapted))
    for layer, update in updates.items():
        finite(layer, update)
    return updates


def finite(layer: str, update: Update) -> None:
    """Raise `Diverged` for NaN or Inf in an update."""
    parts = (update.dW,) if isinstance(update, Dense) else (update.A, update.B)
    if not all(np.isfinite(part).all() for part in parts):
        raise Diverged(f"NaN or Inf in the update of {layer} after the last step")


def record_update(setup: Setup, run: RunDir, spectra: Mapping[str, Spectrum], host: Host) -> None:
    """Keep the trained weights: a low-rank update as PEFT reads it, a dense one as config says."""
    inside = {
        n: p
        for n, p in setup.model.named_parameters()
        if p.requires_grad and not _of_update(n, setup)
    }
    run.write_tensors("head", {n: p.detach().cpu().numpy() for n, p in inside.items()})
    if not setup.adapted:
        return
    tensors = snapshot(setup.adapted)
    ranks = {
        layer: len(tensors[f"{layer}.A"]) for layer in setup.adapted if f"{layer}.A" in tensors
    }
    if ranks and len(ranks) == len(setup.adapted):
        sizes = {n: (r, float(tensors[f"{n}.scale"]) * r) for n, r in ranks.items()}
        names = setup.config.model.shapes(setup.config.data)
        run.write_json(
            "adapter_config", lora_config(sizes, names, base_model_name_or_path=_base_name(setup))
        )
        factors: dict[str, np.ndarray] = {}
        for layer in ranks:
            for name, part in zip(factor_names(layer), "AB", strict=True):
                factors[name] = tensors[f"{layer}.{part}"].astype(np.float32)
        # Norms, biases and embeddings that trained too, where PEFT looks for them.
        for name, parameter in inside.items():
            if name.startswith("base."):
                own = whole_name(name.removeprefix("base."), ranks)
                factors[own] = parameter.detach().cpu().numpy()
        run.write_tensors("adapter_model", factors)
    elif host.keep is Keep.all:
        run.write_tensors("update", tensors)
    else:
        run.write_tensors("update", _leading(spectra, host.keep_k), {"keep": f"top {host.keep_k}"})


def _of_update(name: str, setup: Setup) -> bool:
    """Whether a parameter belongs to a layer's update (a layer's own bias does not)."""
    inner = name.removeprefix("base.")
    return any(
        inner.startswith(f"{layer}.") and inner != f"{layer}.bias" for layer in setup.adapted
    )


def _base_name(setup: Setup) -> str:
    """Where PEFT finds the base network: its folder or hub name, if it has any."""
    model = setup.config.model
    return str(model.source() if hasattr(model, "source") else type(model).__name__)


def _leading(spectra: Mapping[str, Spectrum], k: int) -> dict[str, np.ndarray]:
    """The k leading directions of each update, as balanced factors in float32."""
    out: dict[str, np.ndarray] = {}
    for layer, s in spectra.items():
        cut = s.truncate(min(k, s.q))
        out[f"{layer}.A"], out[f"{layer}.B"] = cut.A.astype(np.float32), cut.B.astype(np.float32)
        out[f"{layer}.scale"] = np.array(1.0)
    return out


def record_spectra(
    setup: Setup, trainer: Trainer, run: RunDir, work: Work, final: Mapping[str, Spectrum]
) -> None:
    """Spectra of dW_t at the snapshots and at the end, with what is needed to read them."""
    steps = {step: decomposed(work.read_snapshot(step)) for step in trainer.progress.snapshots}
    steps[trainer.progress.step] = dict(final)
    parts = [
        pd.DataFrame(
            {"step": step, "layer": layer, "i": np.arange(1, len(sigma) + 1), "sigma": sigma}
        )
        for step, spectra in steps.items()
        for layer, s in spectra.items()
        for sigma in [s.values[: s.r]]
    ]
    columns = ["step", "layer", "i", "sigma"]
    run.write_table("spectra", pd.concat(parts) if parts else pd.DataFrame(columns=columns))
    run.write_json(
        "layers",
        {
            layer: {
                "shape": s.shape,
                "r": s.r,
                "made_in": s.made_in,
                "route": s.route,
                "bound": s.bound,
            }
            for layer, s in final.items()
        },
    )


def decomposed(tensors: Mapping[str, np.ndarray]) -> dict[str, Spectrum]:
    """Spectra (values only) of stored updates."""
    return {layer: decompose(u, layer=layer) for layer, u in updates_of(tensors).items()}


def oracle_rows(setup: Setup, spectra: Mapping[str, Spectrum], step: int) -> list[dict[str, Any]]:
    """Oracle truncation of a full fine-tuning, as rows of the whole model; else nothing."""
    layers = {n: m for n, m in setup.adapted.items() if isinstance(m, FullLayer)}
    if not layers or len(layers) < len(setup.adapted):
        return []
    rows = oracle_truncation(setup.model, layers, spectra, setup.splits)
    return [{"step": step, "layer": "", **row} for row in rows]


def linked(config: RunConfig, store: Store) -> dict[str, Trained]:
    """What the runs that a config names left, by the keyword of `prepare`."""
    named = {"start": config.model.start, "reference": getattr(config.adapter, "reference", "")}
    return {keyword: trained(store, name) for keyword, name in named.items() if name}


def reopened(store: Store, run_id: str, config: RunConfig, host: Host) -> Setup:
    """The network of a finished run as it began, with the head that the run ended with.

    Parameters
    ----------
    config : RunConfig
        The run's own, or with another adapter.
    """
    setup = prepare(config, host, store.cache, **linked(config, store))
    with torch.no_grad():
        for name, array in store.run(run_id).read_tensors("head").items():
            setup.model.get_parameter(name).copy_(torch.from_numpy(array))
    return setup


def trained(store: Store, name: str) -> Trained:
    """What a finished run left inside the base network, on top of those that it started from.

    Raises
    ------
    WrongInput
        When one of the runs is not done, or only the leading directions of its update were kept.
    """
    run = store.run(name)
    if run.status() != "done":
        raise WrongInput(f"run {run.run_id} is not done; it cannot be started from.")
    others = {
        name.removeprefix("base."): array
        for name, array in run.read_tensors("head").items()
        if name.startswith("base.")
    }
    updates, whole = kept(run)
    if not whole:
        raise WrongInput(
            f"run {run.run_id} kept only the leading directions of its update; do it again with "
            "host.keep=all in a new results folder."
        )
    before = run.read_json("config")["config"]["model"]["start"]
    return Trained(updates, others, storage_of(run), trained(store, before) if before else None)
