"""What a spectrum costs: ours against numpy, torch, WeightWatcher and PEFT, on the same matrices.

One thread, everything in one process, candidates interleaved after a warm-up; whole models are
analyzed as a user does, from the files on disk to the table, ours and its peer over all cores too.
Times are the best of the rounds (what else runs on a machine only ever adds time) with the median
in brackets.

To reach: slower than numpy on no shape; factors 4096 x 4096 of r = 16 at least 3,000 x faster than
dense singular values and within 1e-12 sigma_1; all spectra and scalar measures of a MiniLM full
fine-tuning at least 5 x faster than WeightWatcher. About three minutes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits

from lora_lab import analyze
from lora_lab.analysis import rows
from lora_lab.figures import COLOURS, RULE_COLOURS, WIDTH, canvas, finish
from lora_lab.linalg import Dense, Factored, Update, decompose
from lora_lab.linalg.factored import Array, frobenius
from lora_lab.linalg.randomized import LARGE, leading
from lora_lab.measures import MEASURES

TABLE = Path("results/benchmarks/spectra_cost.csv")
SECONDS = 1.0
"""Time for the rounds of one comparison, if three rounds do not take longer."""
ROUNDS = 10
"""Rounds over whole models."""
WEIGHTS = "model.safetensors"
K = 16
"""Leading directions; r of a conversion."""

SQUARES = [(d, d) for d in (64, 128, 256, 384, 512, 768, 1024)]
SHAPES = sorted([*SQUARES, (384, 1536), (768, 3072), (1024, 4096)], key=np.prod)
FACTORS, RANKS = (768, 1024, 4096), (4, 16, 64, 256)
SHOWN = 1024
"""Size whose time against the number of layers is drawn."""
MINILM = [(384, 384)] * 24 + [(384, 1536)] * 12

Times = dict[str, list[float]]


def race(candidates: Mapping[str, Callable[[], Any]], seconds: float = SECONDS) -> Times:
    """Seconds of each candidate in every round, after a round that does not count."""
    begin = time.perf_counter()
    for run in candidates.values():
        run()
    took = time.perf_counter() - begin
    times: Times = {name: [] for name in candidates}
    for _ in range(max(3, min(300, int(seconds / took)))):
        for name, run in candidates.items():
            times[name].append(timed(run)[0])
    return times


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it gave."""
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def shown(times: Sequence[float]) -> str:
    """Best and median in milliseconds."""
    return f"{1e3 * min(times):.3g} ms ({1e3 * statistics.median(times):.3g})"


def ratio(times: Times, peer: str) -> float:
    """Best time of a peer over our best."""
    return min(times[peer]) / min(times["ours"])


def peer(name: str, how: str) -> ModuleType | None:
    """A tool to compare with, or a line that says how to get it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        print(f"{name} is not installed: {missing}; {how}")
        return None


def difference(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """A float32 difference of full size and rank, as float64."""
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64) * 2.0**-10


def dense(rng: np.random.Generator) -> None:
    """All singular values of dense updates."""
    print("\nDense updates, all singular values: ours, numpy and torch dense SVD")
    least = np.inf
    for shape in SHAPES:
        dW = difference(rng, shape)
        update = Dense(dW)
        exactly = partial(np.linalg.svd, dW, compute_uv=False)
        times = race(
            {
                "ours": partial(decompose, update),
                "numpy": exactly,
                "torch": partial(torch.linalg.svdvals, torch.from_numpy(dW)),
            }
        )
        s, exact = decompose(update), exactly()
        error = np.abs(s.values - exact).max() / exact[0]
        least = min(least, ratio(times, "numpy"))
        print(
            f"  {shape[0]} x {shape[1]}: {shown(times['ours'])} by {s.route}; numpy"
            f" {shown(times['numpy'])} = {ratio(times, 'numpy'):.2f} x, torch"
            f" {shown(times['torch'])} = {ratio(times, 'torch'):.2f} x;"
            f" error {error:.0e} of at most {s.bound:.0e}"
        )
    print(f"  least ratio to numpy: {least:.2f} (to reach: 1)")


def directions(rng: np.random.Generator) -> None:
    """The leading directions of a large update with a decaying spectrum."""
    d, known = LARGE, 1 / np.arange(1, LARGE + 1)
    print(f"\nThe {K} leading directions of {d} x {d}: alone, with all values, numpy's whole SVD")
    U, V = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    update = Dense((U * known) @ V.T)
    times = race({"ours": partial(leading, update, K), "values": partial(decompose, update, K)})
    times["numpy"] = [timed(partial(np.linalg.svd, update.dW, full_matrices=False))[0]]
    s = leading(update, K)
    error = np.abs(s.values - known[:K]).max()
    print(
        f"  alone {shown(times['ours'])} by {s.route}; with values {shown(times['values'])} ="
        f" {ratio(times, 'values'):.1f} x, numpy {shown(times['numpy'])} ="
        f" {ratio(times, 'numpy'):.1f} x; error {error:.0e} of at most {s.bound:.0e}"
    )


def factors(rng: np.random.Generator) -> None:
    """Singular values of factored updates against those of the matrix that they make."""
    print(
        "\nFactored updates against dense svdvals of B A by torch, which is faster than numpy here"
    )
    for d in FACTORS:
        found, dense = [], []
        for r in RANKS:
            update = Factored(rng.standard_normal((d, r)), rng.standard_normal((r, d)), 1 / r)
            ours = race({"ours": partial(decompose, update)})["ours"]
            s = decompose(update)
            seconds, exact = timed(partial(torch.linalg.svdvals, torch.from_numpy(update.dense())))
            dense.append(seconds)
            error = np.abs(s.values - exact.numpy()).max() / float(exact[0])
            found.append((r, ours, s, error))
        # Dense time is that of the shape: of what takes seconds, the shortest over the ranks.
        once = min(dense)
        for r, ours, s, error in found:
            goal = " (to reach: 3,000 x, 1e-12)" if (d, r) == (4096, 16) else ""
            print(
                f"  {d} x {d}, r = {r}: {shown(ours)} by {s.route}; dense {1e3 * once:.3g} ms ="
                f" {once / min(ours):,.0f} x; error {error:.0e} of at most {s.bound:.0e}{goal}"
            )


def fine_tuned(rng: np.random.Generator, folder: Path) -> None:
    """A model's base and tuned weights, in two folders."""
    for kind in ("base", "tuned"):
        (folder / kind).mkdir(exist_ok=True)
    W0 = {
        f"layers.{i}.weight": 0.05 * rng.standard_normal(shape, dtype=np.float32)
        for i, shape in enumerate(MINILM)
    }
    save_file(W0, folder / "base" / WEIGHTS)
    tuned = {n: W + difference(rng, W.shape).astype(np.float32) for n, W in W0.items()}
    save_file(tuned, folder / "tuned" / WEIGHTS)


def loaded(folder: Path) -> list[torch.Tensor]:
    """The updates of such a model: float32 differences."""
    W0, tuned = (load_file(folder / kind / WEIGHTS) for kind in ("base", "tuned"))
    return [tuned[f"layers.{i}.weight"] - W0[f"layers.{i}.weight"] for i in range(len(MINILM))]


def weightwatcher(rng: np.random.Generator) -> None:
    """All spectra and scalar measures of a full fine-tuning of MiniLM's 36 layers."""
    print("\nMiniLM full fine-tuning, 36 layers, disk to table: all spectra and scalar measures")
    how = "pip install --no-deps --target DIR weightwatcher matplotlib-inline, then PYTHONPATH=DIR"
    tool = peer("weightwatcher", how)
    names = [name for name in MEASURES if set(MEASURES[name].needs) <= {"values"}]
    times: Times = {}
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        candidates: dict[str, Callable[[], Any]] = {
            "ours": partial(analyze, folder / "base", folder / "tuned", None, names, None),
            "alone": partial(one_by_one, folder, names),
        }
        if tool is not None:
            watched = partial(watch, tool, folder)
            candidates |= {"peer": watched, "threaded": partial(over_cores, watched)}
        for number in range(ROUNDS + 1):
            # Weights are new in each round: what is remembered of the last one helps nobody.
            fine_tuned(rng, folder)
            for name, run in candidates.items():
                seconds = timed(run)[0]
                if number:
                    times.setdefault(name, []).append(seconds)
        edges = timed(partial(watch, tool, folder, mp_fit=True))[0] if tool is not None else np.nan
    logging.disable(logging.NOTSET)
    print(
        f"  ours as it comes, over all cores: {shown(times['ours'])} for {len(names)} measures;"
        f" one layer after the other: {shown(times['alone'])}"
    )
    if tool is None:
        return
    ours, best = min(times["ours"]), min(times["peer"] + times["threaded"])
    print(
        f"  weightwatcher {tool.__version__} as it comes, with one BLAS thread:"
        f" {shown(times['peer'])}, with all cores: {shown(times['threaded'])}; its better ="
        f" {best / ours:.1f} x (to reach: 5 x), {best / min(times['alone']):.1f} x without our"
        f" cores; with the Marchenko-Pastur edge, which ours hold: {edges:.3g} s ="
        f" {edges / ours:.0f} x"
    )


def one_by_one(folder: Path, names: Sequence[str]) -> None:
    """Ours without the second core."""
    for dW in loaded(folder):
        rows("layer", Dense(dW), names, null=None)


def watch(tool: Any, folder: Path, **settings: bool) -> None:
    """WeightWatcher's table of a model whose weights are the updates."""
    updates = loaded(folder)
    linears = [torch.nn.Linear(dW.shape[1], dW.shape[0], bias=False) for dW in updates]
    for linear, dW in zip(linears, updates, strict=True):
        linear.weight.data = dW
    model = torch.nn.Sequential(*linears)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert len(tool.WeightWatcher(model=model).analyze(**settings)) == len(updates)


def over_cores(run: Callable[[], None]) -> None:
    """A call with as many BLAS threads as there are cores."""
    with threadpool_limits(os.cpu_count()):
        run()


def peft() -> None:
    """Full-rank updates turned into LoRA factors, ours with all singular values beside them."""
    print(f"\nA full-rank update (LoHa) to LoRA factors of r = {K}, per layer")
    if (tool := peer("peft", "pip install peft")) is None:
        return
    for m, n in ((384, 384), (768, 768), (768, 3072)):
        torch.manual_seed(0)
        config = tool.LoHaConfig(r=32, target_modules=["0"], init_weights=False)
        base = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
        model = tool.get_peft_model(base, config)
        module = model.base_model.model[0]

        def ours(module: Any = module) -> Factored:
            dW = Dense(module.get_delta_weight("default").detach())
            return decompose(dW, vectors=K).truncate(K)

        def theirs(model: Any = model) -> Factored:
            _, found = tool.tuners.lora.conversion.convert_to_lora(model, rank=K)
            B, A = (next(v for k, v in found.items() if f"lora_{x}" in k) for x in "BA")
            return Factored(B, A)

        times = race({"ours": ours, "peft": theirs})
        dW = module.get_delta_weight("default").detach().double().numpy()
        best = np.sqrt(np.sum(np.linalg.svd(dW, compute_uv=False)[K:] ** 2))
        errors = [frobenius(dW - made().dense()) / best - 1 for made in (ours, theirs)]
        print(
            f"  {m} x {n}: ours {shown(times['ours'])}, peft {tool.__version__}"
            f" {shown(times['peft'])} = {ratio(times, 'peft'):.1f} x; error above the least"
            f" possible: ours {errors[0]:.0e}, peft {errors[1]:.0e}"
        )


def each(updates: Sequence[Update]) -> None:
    """Decompose one update after the other."""
    for update in updates:
        decompose(update)


def cost(rng: np.random.Generator) -> pd.DataFrame:
    """Time over size, r and number of layers, beside the theory; written as `TABLE`.

    Theory is (m + n) r^2 a layer for factors and m n min(m, n) for dense updates.
    """
    found = []
    kinds = [("factored", d, r) for d in (256, 512, 1024, 2048, 4096) for r in (4, 16, 64)]
    for kind, d, r in [*kinds, *(("dense", d, 0) for d in (128, 256, 512, 1024))]:
        for layers in (1, 3, 9):
            updates: list[Update] = [
                Factored(rng.standard_normal((d, r)), rng.standard_normal((r, d)))
                if r
                else Dense(difference(rng, (d, d)))
                for _ in range(layers)
            ]
            times = race({"ours": partial(each, updates)}, seconds=SECONDS / 4)["ours"]
            theory = layers * (2 * d * r * r if r else d**3)
            found.append(
                {
                    "kind": kind,
                    "d": d,
                    "r": r or np.nan,
                    "layers": layers,
                    "seconds": min(times),
                    "median_seconds": statistics.median(times),
                    "theory": theory,
                    "ns_per_theory": 1e9 * min(times) / theory,
                }
            )
    table = pd.DataFrame(found)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(TABLE, index=False)
    return table


def draw(table: pd.DataFrame) -> None:
    """Time against size and against layers, with the theory through each line's last point."""
    title = "What the spectrum of an update costs: measured (dots) beside theory (dashes)"
    drawn, axes = canvas(WIDTH, 4.2, 1, 2)
    ranks = table["r"].fillna(0).astype(int)
    for r in sorted(set(ranks)):
        part = table[ranks == r]
        label = f"factors, r = {r}" if r else "dense"
        colour = RULE_COLOURS[RANKS.index(r)] if r else COLOURS["full"]
        for ax, x, own in (
            (axes[0][0], "d", part[part["layers"] == 1]),
            (axes[0][1], "layers", part[part["d"] == SHOWN]),
        ):
            last = own.iloc[-1]
            theory = own["theory"] * last["seconds"] / last["theory"]
            ax.loglog(own[x], own["seconds"], "o-", color=colour, label=label, markersize=5)
            ax.loglog(own[x], theory, "--", color=colour, linewidth=1)
    for ax, x in zip(axes[0], ("d", "layers"), strict=True):
        ticks = sorted(set(table[x]))
        ax.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        ax.minorticks_off()
    axes[0][0].set_xlabel("d, of a d × d update", fontsize=10)
    axes[0][1].set_xlabel(f"layers of {SHOWN} × {SHOWN}", fontsize=10)
    axes[0][0].set_ylabel("seconds, one thread", fontsize=10)
    axes[0][0].legend(fontsize=9, frameon=False)
    note = (
        "Theory: (m + n) r² for factors, m n min(m, n) for dense updates, each through its line's "
    )
    finish(drawn, title, note + "last point.").savefig(TABLE.with_suffix(".png"), dpi=100)


def main() -> None:
    """Print every comparison and write the table of costs."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        dense(rng)
        directions(rng)
        factors(rng)
        weightwatcher(rng)
        peft()
        table = cost(rng)
    draw(table)
    print(f"\nCost against size, of d x d updates ({TABLE})")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}", na_rep=""))
    for kind, part in table.groupby("kind"):
        slope = np.polyfit(np.log(part["theory"]), np.log(part["seconds"]), 1)[0]
        print(f"{kind}: time grows as theory^{slope:.2f}")


if __name__ == "__main__":
    main()
