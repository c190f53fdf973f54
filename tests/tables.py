"""Made-up tables with the shape, the names and about the numbers of a real demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pandas as pd

Q = 384
BLOCKS = 6
MODULES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
LAYERS = [f"encoder.layer.{b}.{m}" for b in range(BLOCKS) for m in MODULES]
STEPS = (1, 16, 32, 48, 64)
KEPT = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 384)
TAUS = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Tables:
    """The tidy tables of a results folder."""

    runs: pd.DataFrame
    measures: pd.DataFrame
    traces: pd.DataFrame
    spectra: pd.DataFrame
    examples: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["run_id", "i", "value"])
    )


def run_row(run_id: str, adapter: str, seed: int, **changes: object) -> dict[str, object]:
    """One row of `runs`, done at a plausible score."""
    share = {"head": 0.003, "full": 46.9}.get(adapter, 2.0)
    row: dict[str, object] = {
        "run_id": run_id, "status": "done", "sweep": "demo", "score": 0.8,
        "validation_score": 0.79, "loss": 0.42, "trainable": round(share * 227_000),
        "adapter_parameters": round(share * 226_000), "frozen": 12_000_000, "total": 22_700_000,
        "trainable_percent": share, "steps": 64, "seconds": 22.5, "train_seconds": 13.1,
        "samples_per_second": 156.0, "peak_memory": 912.0, "error": None,
        "model": "minilm", "data": "rotten_tomatoes", "adapter": adapter, "seed": seed,
        "adapter.r": np.nan, "adapter.alpha": np.nan, "adapter.scaling": None,
        "adapter.targets": "all", "data.train_examples": 2048.0, "data.seed": 0,
        "train.lr": 1e-4 if adapter == "full" else 1e-3, "train.epochs": 1.0,
        "git_commit": "0123456789abcdef0123", "git_dirty": False,
        "started": f"2025-01-01T00:{seed % 60:02d}:00+00:00", "threads": 1, "device": "cpu",
        "cpu": "made-up CPU", "torch": "2.13.0", "lora_lab": "0.1.0",
        "model_hash": "5" * 64, "data_hash": "d" * 64,
    }  # fmt: skip
    return row | changes


def as_loaded(runs: pd.DataFrame) -> pd.DataFrame:
    """The dtypes of loaded tables: text as "string" with NA, flags as nullable booleans."""
    text = [c for c in runs.columns if runs[c].map(lambda v: v is None or isinstance(v, str)).all()]
    return runs.astype(dict.fromkeys(text, "string") | {"git_dirty": "boolean"})


def _sigma(adapter: str, r: float, layer: int, rng: np.random.Generator) -> np.ndarray:
    """Singular values: long-tailed for full fine-tuning, few and large for LoRA."""
    q = Q if adapter == "full" else int(r)
    i = np.arange(1, q + 1)
    size = 0.05 * (1 + 0.1 * (layer % 6)) * rng.lognormal(0, 0.1)
    if adapter == "full":
        return size * (i ** (-0.45 * rng.lognormal(0, 0.2))) * np.exp(-i / 300)
    return size * 6 * r**-0.1 * i ** (-0.8 * rng.lognormal(0, 0.2))


Row = tuple[str, float, str, float, float]
"""measure, k, side, value, null."""


def _measure_rows(sigma: np.ndarray, r: float) -> list[Row]:
    energy, p = sigma**2, sigma / sigma.sum()
    kept = np.cumsum(energy) / energy.sum()
    most = len(sigma)
    rows: list[Row] = [
        ("effective_rank", np.nan, "", float(np.exp(-(p * np.log(p)).sum())), 0.9 * most),
        ("stable_rank", np.nan, "", float(energy.sum() / energy[0]), 0.3 * most),
        ("update_ratio", np.nan, "frobenius", float(np.sqrt(energy.sum()) / 20), np.nan),
    ]
    for t in TAUS:
        count = float(np.argmax(kept >= t * (1 - 1e-12)) + 1)
        rows.append(("energy_rank", t, "", count, t * most))
    for k in KEPT:
        tail = energy[k:].sum() / energy.sum() if k < len(sigma) else 0.0
        nuclear, none = float(sigma[k:].sum() / sigma.sum()), max(0.0, 1 - k / most)
        rows.append(("truncation_error", float(k), "frobenius", float(np.sqrt(tail)), none**0.5))
        rows.append(("truncation_error", float(k), "nuclear", nuclear, none))
    return rows


def _oracle_rows(full: float, rng: np.random.Generator) -> list[Row]:
    rows: list[tuple[str, float, str, float]] = []
    for k in KEPT:
        reach = 1 - np.exp(-k / 1.6) if k < Q else 1.0
        trained = 0.61 + (full - 0.61) * reach + (rng.normal(0, 0.003) if 0 < k < Q else 0)
        rows.append(("oracle_score", float(k), "trained_head", float(trained)))
        rows.append(
            ("oracle_score", float(k), "refitted_head", float(0.71 + (full - 0.71) * reach))
        )
        rows.append(("oracle_energy", float(k), "", float(min(1.0, (k / Q) ** 0.45))))
    return [(*row, np.nan) for row in rows]


def made_up_tables(
    seeds: int = 3, ranks: Sequence[int] = (1, 4, 16, 64), second_rule: bool = True
) -> Tables:
    """Head, full and LoRA at α = 2r over seeds, and α = 16 at one seed (`second_rule`)."""
    rng = np.random.default_rng(0)
    plan: list[tuple[str, float, float, int]] = []
    for seed in range(seeds):
        plan += [("head", np.nan, np.nan, seed), ("full", np.nan, np.nan, seed)]
        plan += [("lora", r, 2 * r, seed) for r in ranks]
    plan += [("lora", r, 16, 0) for r in ranks] if second_rule else []

    runs, measures, traces, spectra = [], [], [], []
    for number, (adapter, r, alpha, seed) in enumerate(plan):
        run_id = f"{number:012x}"
        base = {"head": 0.652, "full": 0.823}.get(adapter, 0.80 + 0.003 * np.log2(max(r, 1) + 1))
        score = float(base + rng.normal(0, 0.004) - (0.01 if alpha == 16 else 0))
        extra = {} if adapter != "lora" else {
            "adapter.r": float(r), "adapter.alpha": float(alpha), "adapter.scaling": "alpha_over_r",
            "trainable_percent": 0.1 * r,
        }  # fmt: skip
        runs.append(run_row(run_id, adapter, seed, score=score, validation_score=score - 0.01,
                            started=f"2025-01-01T00:{number:02d}:00+00:00", **extra))  # fmt: skip
        for step in STEPS:
            traces.append((run_id, step, "", "loss", 0.7 - 0.003 * step))
        if adapter == "head":
            continue
        for index, layer in enumerate(LAYERS):
            sigma = _sigma(adapter, r, index, rng)
            key = (run_id, 64, layer, layer.rpartition(".")[2], float(index // 6))
            measures += [(*key, *row) for row in _measure_rows(sigma, r)]
            for step, share in ((8, 0.3), (64, 1.0)):
                spectra.append(
                    pd.DataFrame({"run_id": run_id, "step": step, "layer": layer,
                                  "i": np.arange(1, len(sigma) + 1), "sigma": share * sigma})
                )  # fmt: skip
            for step in STEPS:
                size = 0.2 * np.exp(-step / 60) * rng.lognormal(0, 0.3)
                traces.append((run_id, step, layer, "grad_norm", size))
                traces.append((run_id, step, layer, "update_norm", 0.001 * step))
                if adapter == "lora":
                    b_only = 0.0 if step == 1 else 0.3 * size * step / 64
                    traces.append((run_id, step, layer, "grad_norm_A", b_only * r**0.2))
                    traces.append((run_id, step, layer, "grad_norm_B", size * 2 * r**-0.1))
        if adapter == "full":
            key = (run_id, 64, "", "", np.nan)
            measures += [(*key, *row) for row in _oracle_rows(score, rng)]
    return Tables(
        as_loaded(pd.DataFrame(runs)),
        pd.DataFrame(measures, columns=["run_id", "step", "layer", "module", "depth",
                                        "measure", "k", "side", "value", "null"]).assign(
            null_low=lambda rows: 0.9 * rows["null"], null_high=lambda rows: 1.1 * rows["null"]),
        pd.DataFrame(traces, columns=["run_id", "step", "layer", "trace", "value"]),
        pd.concat(spectra, ignore_index=True),
    )  # fmt: skip


@cache
def empty_tables() -> Tables:
    """The same columns without a row."""
    full = made_up_tables(seeds=1, ranks=(1,))
    return Tables(full.runs[:0], full.measures[:0], full.traces[:0], full.spectra[:0])
