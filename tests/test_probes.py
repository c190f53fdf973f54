"""Every trace of a training equals what autograd and dense matrices say of the same training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch

from lora_lab import hydra_bridge
from lora_lab.batches import TrainingBatches
from lora_lab.config import Host, RunConfig
from lora_lab.linalg import decompose
from lora_lab.preparation import Setup, prepare
from lora_lab.probes import PROBES, History, Moment, copies, difference, parts_norm, parts_update
from lora_lab.probes.tangent_capture import basis, capture, tangent_null
from lora_lab.registry import WrongInput
from lora_lab.stats import Slope, slope
from lora_lab.store import Work
from lora_lab.training import Trainer

METHODS = {"full": ["adapter=full"], "lora": ["adapter=lora", "adapter.r=3", "adapter.alpha=5"]}
CLIP = 0.01
LINE = [
    *("model=planted", "data=planted", "data.width=64", "data.train_examples=64"),
    *("train.precision=float64", "train.batch_size=8", "train.accumulate=2", "train.epochs=2"),
    *("train.lr=0.01", f"train.clip={CLIP}", "train.weight_decay=0.1", "train.evaluations=0"),
    *("train.trace_every=1", "train.spectra=100", "train.gradient_spectra=true"),
]
STEPS = 8
ONE_STEP = {"loss", "lr", "samples_per_second", "grad_norm_total"}
OF_CHANGING_RANK = {"live_r"}  # of no method here: see tests/test_methods.py


def trained(folder: Path, method: str, *extra: str) -> tuple[Setup, Trainer]:
    (one,), _ = hydra_bridge.plan([[*LINE, *METHODS[method]]], list(extra))
    host = Host(device="cpu")
    setup = prepare(one.config, host, folder)
    trainer = Trainer(setup, Work(folder), host, lambda *_: None)
    trainer.train()
    assert setup.steps == STEPS
    return setup, trainer


Rows = dict[tuple[int, str, str], float]


def rows_of(trainer: Trainer) -> Rows:
    return {(step, layer, trace): v for step, layer, trace, v in trainer.progress.traces}


# ---- the same training, written with dense matrices and autograd --------------------------------


class Seen(NamedTuple):
    """One layer at one step, dense."""

    G: np.ndarray
    mean_G: np.ndarray
    before: np.ndarray
    after: np.ndarray
    path: float
    old: dict[str, np.ndarray]
    new: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().numpy().copy()


def start(config: RunConfig, folder: Path) -> tuple[Setup, dict[str, dict[str, torch.Tensor]]]:
    """A fresh setup, and its trainable parameters as leaves of our own."""
    setup = prepare(config, Host(device="cpu"), folder)
    leaves = {
        layer: {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
        for layer, module in setup.adapted.items()
    }
    return setup, leaves


def reference(config: RunConfig, folder: Path) -> Iterator[tuple[int, float, float, dict]]:
    """(step, loss, global gradient norm, layer to Seen): plain torch on dense weights."""
    setup, leaves = start(config, folder)
    plain = config.model.build(config.data, setup.problem, 0.0).double()
    own = [p for layer in leaves.values() for p in layer.values()]
    own += list(plain.classifier.parameters())
    optimizer = torch.optim.AdamW(own, lr=1.0, weight_decay=0.1)
    examples, count = setup.splits["train"], config.train.accumulate
    batches = iter(TrainingBatches(examples.lengths, 8, config.seed, STEPS * count, 0))
    sums, paths = dict.fromkeys(leaves, 0.0), dict.fromkeys(leaves, 0.0)

    def update(layer: str) -> torch.Tensor:
        own = leaves[layer]
        if "A" in own:
            return 5 / 3 * own["B"] @ own["A"]
        return own["W"] - torch.from_numpy(setup.base[layer])

    for step in range(1, STEPS + 1):
        dW = {layer: update(layer) for layer in leaves}
        weights = {f"base.{k}.weight": torch.from_numpy(setup.base[k]) + dW[k] for k in dW}
        for weight in weights.values():
            weight.retain_grad()
        losses = []
        for _ in range(count):
            batch = examples.collate(next(batches))
            out = torch.func.functional_call(plain, weights, batch)
            losses.append(plain.loss(out, batch["targets"]))
        loss = torch.stack(losses).mean()
        loss.backward()
        seen = {}
        old = {k: {n: array(p) for n, p in own.items()} for k, own in leaves.items()}
        grads = {k: {n: array(p.grad) for n, p in own.items()} for k, own in leaves.items()}
        for layer in leaves:
            sums[layer] = sums[layer] + array(weights[f"base.{layer}.weight"].grad)
        total = torch.nn.utils.clip_grad_norm_(own, CLIP)
        optimizer.param_groups[0]["lr"] = RATES[step - 1]
        optimizer.step()
        optimizer.zero_grad()
        for layer in leaves:
            before, after = array(dW[layer]), array(update(layer))
            paths[layer] += float(np.linalg.norm(after - before))
            seen[layer] = Seen(
                array(weights[f"base.{layer}.weight"].grad),
                sums[layer] / step,
                before,
                after,
                paths[layer],
                old[layer],
                {n: array(p) for n, p in leaves[layer].items()},
                grads[layer],
            )
        yield step, loss.item(), total.item(), seen


# A warm-up of one step from half the rate, then linear to 0 after the last.
RATES = [0.005, *(0.01 * (1 - i / 7) for i in range(7))]


def entropy_rank(matrix: np.ndarray) -> float:
    sigma = scipy.linalg.svdvals(matrix)
    p = sigma[sigma > 1e-13 * sigma[0]] / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def tangent_share(s: Seen) -> float:
    P_B = s.old["B"] @ np.linalg.pinv(s.old["B"])
    P_A = np.linalg.pinv(s.old["A"]) @ s.old["A"]
    inside = P_B @ s.G + s.G @ P_A - P_B @ s.G @ P_A
    return float(np.sum(inside**2) / np.sum(s.G**2))


REFERENCE = {
    "grad_norm": lambda s: np.linalg.norm(s.G),
    "grad_norm_A": lambda s: np.linalg.norm(s.grads["A"]),
    "grad_norm_B": lambda s: np.linalg.norm(s.grads["B"]),
    "update_norm": lambda s: np.linalg.norm(s.after),
    "step_norm": lambda s: np.linalg.norm(s.after - s.before),
    "path_length": lambda s: s.path,
    "gradient_effective_rank": lambda s: entropy_rank(s.G),
    "gradient_stable_rank": lambda s: np.sum(s.G**2) / np.linalg.norm(s.G, 2) ** 2,
    "mean_gradient_effective_rank": lambda s: entropy_rank(s.mean_G),
    "step_effective_rank": lambda s: entropy_rank(s.after - s.before),
    "balancedness": lambda s: np.linalg.norm(s.new["B"].T @ s.new["B"] - s.new["A"] @ s.new["A"].T),
    "tangent_capture": tangent_share,
}
OF_FACTORS = {"grad_norm_A", "grad_norm_B", "balancedness", "tangent_capture"}


@pytest.mark.parametrize("method", METHODS)
def test_every_trace_at_every_step_is_that_of_autograd_and_dense_matrices(
    method: str, tmp_path: Path
) -> None:
    setup, trainer = trained(tmp_path, method)
    found = rows_of(trainer)
    kept = {name for name in REFERENCE if method == "lora" or name not in OF_FACTORS} | ONE_STEP
    known = set(REFERENCE) | ONE_STEP | OF_CHANGING_RANK
    assert set(PROBES) == known, "a new trace needs its reference here"
    assert {trace for _, _, trace in found} == kept
    expected: Rows = {}
    for step, loss, total, seen in reference(setup.config, tmp_path):
        assert total > CLIP, "clipping acts, and traces are taken before it"
        expected[step, "", "loss"], expected[step, "", "grad_norm_total"] = loss, total
        expected[step, "", "lr"] = RATES[step - 1]
        for layer, s in seen.items():
            expected |= {(step, layer, name): REFERENCE[name](s) for name in kept - ONE_STEP}
    assert found.keys() - expected.keys() == {(t, "", "samples_per_second") for t in range(1, 9)}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


# ---- when, and across a coarser grid -------------------------------------------------------------


def test_each_kind_of_trace_is_taken_at_its_own_steps(tmp_path: Path) -> None:
    coarse = ["train.trace_every=3", "train.spectra=3"]
    for extra, decomposed in (
        (["train.gradient_spectra=true"], {1, 2, 4, 8}),
        (["train.gradient_spectra=false"], set()),
    ):
        _, trainer = trained(tmp_path, "lora", *coarse, *extra)
        steps = {name: {t for t, _, trace in rows_of(trainer) if trace == name} for name in PROBES}
        assert {n for n in PROBES if PROBES[n].at == "spectra"} == {
            *("gradient_effective_rank", "gradient_stable_rank"),
            *("mean_gradient_effective_rank", "step_effective_rank", "tangent_capture"),
        }
        assert not any(steps.pop(name) for name in OF_CHANGING_RANK)
        for name, taken in steps.items():
            assert taken == ({1, 3, 6, 8} if PROBES[name].at == "traced" else decomposed), name
    assert not trainer.history.gradients, "no memory for what nobody asked for"


@pytest.mark.parametrize("method", METHODS)
def test_a_coarser_grid_gives_the_same_values_at_its_steps(method: str, tmp_path: Path) -> None:
    _, every = trained(tmp_path, method)
    _, some = trained(tmp_path, method, "train.trace_every=3", "train.spectra=3")
    fine, coarse = rows_of(every), rows_of(some)
    whole = {"samples_per_second", "path_length", "mean_gradient_effective_rank"}
    for key, value in coarse.items():
        if key[2] not in whole:
            assert value == fine[key], key
    layers = {layer for _, layer, trace in coarse if trace == "step_norm"}
    for layer in layers:
        # Untraced steps lie on the line between their traced neighbours.
        known = [1, 3, 6, 8]
        norms = np.interp(range(1, 9), known, [fine[t, layer, "step_norm"] for t in known])
        for step in known:
            length = coarse[step, layer, "path_length"]
            assert length == pytest.approx(norms[:step].sum(), rel=1e-12)
        exact = fine[8, layer, "path_length"]
        assert coarse[8, layer, "path_length"] == pytest.approx(exact, rel=0.2)
        assert exact >= fine[8, layer, "update_norm"] > 0


def test_the_mean_gradient_is_that_of_the_watched_steps(tmp_path: Path) -> None:
    _, trainer = trained(tmp_path, "full", "train.trace_every=3", "train.spectra=3")
    watched = {1, 2, 3, 4, 6, 8}
    (one,), _ = hydra_bridge.plan([[*LINE, *METHODS["full"]]], [])
    sums: dict[str, np.ndarray] = {}
    for step, _, _, seen in reference(one.config, tmp_path):
        for layer, s in seen.items():
            sums[layer] = sums.get(layer, 0.0) + (s.G if step in watched else 0.0)
    for layer, expected in sums.items():
        np.testing.assert_allclose(trainer.history.gradients[layer], expected, rtol=1e-6)
        rank = rows_of(trainer)[8, layer, "mean_gradient_effective_rank"]
        assert rank == pytest.approx(entropy_rank(expected), rel=1e-6)


# ---- the pieces ----------------------------------------------------------------------------------


def test_a_tiny_step_of_a_large_update_keeps_its_norm_and_its_rank() -> None:
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 30), (20, 4)))
    dA, dB = 1e-9 * torch.randn_like(A), 1e-9 * torch.randn_like(B)
    old = {"A": A, "B": B, "scale": torch.tensor(2.0)}
    new = {"A": A + dA, "B": B + dB, "scale": torch.tensor(2.0)}
    dA, dB = new["A"] - A, new["B"] - B
    exact = 2 * (new["B"] @ dA + dB @ A)
    step = difference(old, new)
    assert float(parts_norm(step)) == pytest.approx(float(exact.norm()), rel=1e-9)
    sigma = decompose(parts_update(step)).values
    np.testing.assert_allclose(sigma[:8], scipy.linalg.svdvals(exact.numpy())[:8], rtol=1e-6)
    assert not sigma[8:].any()


def test_a_learned_scale_moves_the_update_too() -> None:
    A, B = torch.randn(2, 5), torch.randn(6, 2)
    old, new = ({"A": A, "B": B, "scale": torch.tensor(s)} for s in (2.0, 2.5))
    moved = difference(old, new)
    assert float(parts_norm(moved)) == pytest.approx(0.5 * float((B @ A).norm()), rel=1e-6)
    assert float(parts_norm(difference(old, old))) == 0.0


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_tangent_capture_is_the_share_of_all_first_order_moves_of_the_factors() -> None:
    m, n, r = 7, 5, 2
    G, A, B = random(m, n), random(r, n, seed=1), random(m, r, seed=2)
    # vec of rows: vec(dB A) = (I kron A') vec(dB), vec(B dA) = (B kron I) vec(dA).
    moves = np.concatenate([np.kron(np.eye(m), A.T), np.kron(B, np.eye(n))], axis=1)
    inside = scipy.linalg.orth(moves).T @ G.numpy().ravel()
    assert len(inside) == r * (m + n - r)
    expected = np.sum(inside**2) / float(G.square().sum())
    assert float(capture(G, A, B)) == pytest.approx(expected, rel=1e-12)


def test_tangent_capture_depends_on_the_update_only() -> None:
    G, A, B, R = random(7, 5), random(3, 5, seed=1), random(7, 3, seed=2), random(3, 3, seed=3)
    plain = float(capture(G, A, B))
    assert 0 < plain < 1
    for other in (
        capture(1e-30 * G, A, B),
        capture(G, 1e-9 * A, 1e9 * B),
        capture(G, torch.linalg.solve(R, A), B @ R),
        capture(G.T, B.T, A.T),
    ):
        assert float(other) == pytest.approx(plain, rel=1e-9)
    inside = B @ random(3, 5, seed=4) + random(7, 3, seed=5) @ A
    assert float(capture(inside, A, B)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("start", ["random", "zero B"])
def test_tangent_capture_of_random_gradients_has_the_mean_of_its_null(start: str) -> None:
    m, n, r, draws = 12, 20, 3, 400
    values = []
    for i in range(draws):
        A, B = random(r, n, seed=3 * i), random(m, r, seed=3 * i + 1)
        B = B if start == "random" else 0 * B
        values.append(float(capture(random(m, n, seed=3 * i + 2), A, B)))
    null = tangent_null(m, n, r) if start == "random" else r / n
    error = np.std(values) / math.sqrt(draws)
    assert abs(np.mean(values) - null) < 4 * error
    assert error < 0.02 * null


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_has_the_rank_of_its_factor(dtype: torch.dtype) -> None:
    columns = random(40, 3).to(dtype)
    mixed = columns @ random(3, 6, seed=1).to(dtype)  # six columns of rank 3, rounded
    zeros = torch.zeros(40, 2, dtype=dtype)
    for factor, p in (
        (columns, 3),
        (mixed, 3),
        (torch.cat([zeros, columns], 1), 3),
        (torch.cat([columns[:, :1], columns[:, :1], columns], 1), 3),
        (columns * torch.tensor([1.0, 1e-3, 1e-3], dtype=dtype), 3),
        (zeros, 0),
    ):
        Q = basis(factor)
        assert Q.shape == (40, p)
        torch.testing.assert_close(Q.T @ Q, torch.eye(p, dtype=torch.float64))
        inside = factor.double() - Q @ (Q.T @ factor.double())
        assert float(inside.norm()) <= 40 * torch.finfo(dtype).eps * float(factor.norm())


class Layer(SimpleNamespace):
    """As much of an adapted layer as probes read."""

    live_r = None

    def implicit_gradient(self) -> torch.Tensor | None:
        return self.G

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.parts)

    def update_norm(self) -> torch.Tensor:
        return parts_norm(self.parts)


def layer(G: torch.Tensor, factored: bool, value: float) -> Layer:
    if not factored:
        return Layer(G=G, parts={"dW": value * torch.ones(3, 4)}, factors=None)
    A, B = value * torch.ones(2, 4), value * torch.ones(3, 2)
    A.grad, B.grad = torch.zeros(2, 4), torch.zeros(3, 2)
    return Layer(G=G, parts={"A": A, "B": B, "scale": torch.tensor(1.0)}, factors=(A, B))


def values_at(one: Layer) -> dict[str, float]:
    history = History()
    history.add_gradients({"x": one})
    moment = Moment(1, {"x": one}, 0.0, 0.0, 0.0, 0.0, history, copies({"x": one}))
    found = {name: probe.values(moment).get("x") for name, probe in PROBES.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


@pytest.mark.parametrize("factored", [False, True])
def test_where_nothing_moves_norms_and_ranks_are_zero_and_ratios_nan(factored: bool) -> None:
    with warnings.catch_warnings(action="error"):
        values = values_at(layer(torch.zeros(3, 4), factored, 0.0))
    ratio = values.pop("tangent_capture", math.nan)
    assert math.isnan(ratio)
    assert len(values) == len(REFERENCE) - (1 if factored else len(OF_FACTORS))
    assert not any(values.values()), values


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_gives_no_number_and_leaves_the_word_to_the_trainer(
    bad: float, factored: bool
) -> None:
    of_G = {name for name in PROBES if "gradient" in name} | {"grad_norm"}
    values = values_at(layer(torch.full((3, 4), bad), factored, 1.0))
    assert {name for name, v in values.items() if math.isfinite(v)} == (
        values.keys() - of_G - {"tangent_capture"}
    )
    of_dW = {"update_norm", "step_norm", "path_length", "step_effective_rank"}
    values = values_at(layer(torch.ones(3, 4), factored, bad))
    assert {name for name, v in values.items() if math.isfinite(v)} == (
        values.keys() - of_dW - {"tangent_capture", "balancedness"}
    )


def test_a_float32_sum_of_bfloat16_gradients_is_wide() -> None:
    history, G = History(), torch.full((2, 2), 1.0, dtype=torch.bfloat16)
    for _ in range(300):  # bfloat16 itself cannot count beyond 256
        history.add_gradients({"x": Layer(G=G)})
    assert history.gradients["x"].dtype == torch.float32
    assert float(history.gradients["x"][0, 0]) == 300


# ---- the scaling slope ---------------------------------------------------------------------------


def test_the_slope_is_found_with_an_interval_that_covers_as_stated() -> None:
    rng = np.random.default_rng(0)
    x = np.log([1, 2, 4, 8, 16])
    fits = [slope(x, 2.0 - 0.5 * x + 0.1 * rng.standard_normal(5), 0.9) for _ in range(600)]
    covered = np.mean([fit.low <= -0.5 <= fit.high for fit in fits])
    assert abs(covered - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 600)
    assert np.mean([fit.slope for fit in fits]) == pytest.approx(-0.5, abs=0.01)


def test_the_slope_of_a_line_is_exact() -> None:
    fit = slope([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert fit == Slope(*map(pytest.approx, (2.0, 2.0, 2.0, 3.0)), 3)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2], [1, 2], "at least 3 points; got 2"),
        ([2, 2, 2], [1, 2, 3], "x must vary .* got 3 times 2"),
        ([1, 2, 3], [1, 2], "one length; got 3 and 2"),
        ([1, 2, 3], [1, -math.inf, 2], "must be finite"),
    ],
)
def test_what_has_no_slope_is_refused_in_one_line(
    x: list[float], y: list[float], said: str
) -> None:
    with pytest.raises(WrongInput, match=said) as caught:
        slope(x, y)
    assert "\n" not in str(caught.value)
