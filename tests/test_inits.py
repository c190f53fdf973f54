"""Laws over every registered init, and each against its paper or PEFT."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lab import hydra_bridge
from lora_lab.adapters import Place, snapshot
from lora_lab.adapters.lora import LoRA, LoRALayer
from lora_lab.inits import INITS
from lora_lab.linalg import Dense, Factored, Update, updates_of
from lora_lab.preparation import Trained, prepare, refer
from lora_lab.registry import WrongInput
from lora_lab.store import Work
from lora_lab.training import Trainer

OUT, IN = 12, 20
STARTS = {name: INITS[name].start for name in INITS}


def of_start(start: str) -> list[str]:
    return [name for name in INITS if STARTS[name] == start]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def material(out: int = OUT, inner: int = IN, scale: float = 2.0) -> dict[str, Any]:
    """Everything that an init may need, for one layer."""
    rng = seeded(5)
    x = torch.randn(300, inner, generator=rng).double() * torch.linspace(2, 0.1, inner).double()
    return {
        "W0": torch.randn(out, inner, generator=rng) / inner**0.5,
        "scale": scale,
        "gradient": torch.randn(out, inner, generator=rng).double(),
        "activations": x.T @ x / len(x),
        "reference": Dense(torch.randn(out, inner, generator=rng)),
    }


def draw(name: str, r: int, seed: int = 0, **changed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, inner = changed.pop("shape", (OUT, IN))
    return INITS[name](out, inner, r, seeded(seed), **material(out, inner) | changed)


def config(name: str, r: int = 3, **fields: Any) -> LoRA:
    return LoRA(r=r, init=name, reference="run" if name == "reference" else "", **fields)


def layer(name: str, linear: nn.Module, r: int = 3, **fields: Any) -> LoRALayer:
    gathered = {need: value for need, value in material().items() if need not in ("W0", "scale")}
    return config(name, r, **fields).adapt(Place("x", linear, seeded(), gathered))


def plain(kind: str = "linear", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    return made.to(dtype).requires_grad_(False)


# --- laws over all of them --------------------------------------------------------------------


@pytest.mark.parametrize("name", list(INITS))
@pytest.mark.parametrize("r", [1, 5, OUT])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_an_init_gives_finite_factors_of_its_shape_that_the_generator_repeats(
    name: str, r: int, shape: tuple[int, int]
) -> None:
    A, B = draw(name, r, shape=shape)
    assert A.shape == (r, shape[1])
    assert B.shape == (shape[0], r)
    for factor, again in zip((A, B), draw(name, r, shape=shape), strict=True):
        assert factor.dtype in (torch.float32, torch.float64)
        assert torch.isfinite(factor).all()
        assert torch.equal(factor, again)


@pytest.mark.parametrize("name", list(INITS))
def test_no_direction_of_a_start_is_dead(name: str) -> None:
    # A pair of zeros has no gradient in either factor and would never train.
    A, B = draw(name, OUT)
    assert (A.norm(dim=1) + B.norm(dim=0)).min() > 1e-3


@pytest.mark.parametrize("name", of_start("base"))
def test_at_the_base_one_factor_is_zero_and_only_that_one_has_a_gradient(name: str) -> None:
    A, B = draw(name, 3)
    zero, other = (A, B) if name == "zero_a" else (B, A)
    assert float(zero.abs().max()) == 0
    assert float(other.abs().min()) > 0
    adapted = layer(name, plain())
    adapted(torch.randn(7, IN, dtype=torch.float64)).square().sum().backward()
    grads = {"A": adapted.A.grad.norm(), "B": adapted.B.grad.norm()}
    moves = "A" if name == "zero_a" else "B"
    assert grads.pop(moves) > 0
    assert list(grads.values()) == [0]


@pytest.mark.parametrize("name", [*of_start("base"), *of_start("subtracted")])
@pytest.mark.parametrize("scaling", ["alpha_over_r", "rslora", "learned"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_start_at_the_base_is_the_base_network(
    name: str, scaling: str, kind: str, dtype: torch.dtype
) -> None:
    linear = plain(kind, dtype)
    adapted = layer(name, linear, alpha=5.0, scaling=scaling)
    x = torch.randn(9, IN, dtype=dtype)
    rounding = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(adapted(x), linear(x), rtol=rounding, atol=rounding)
    update = updates_of(snapshot({"x": adapted}))["x"]
    assert isinstance(update, Factored)
    A, B, scale = adapted.scaled()
    size = scale * float(A.detach().norm() * B.detach().norm())
    assert np.linalg.norm(update.dense()) <= 1e-15 * size
    assert float(adapted.update_norm()) <= 1e-7 * size
    assert update.r == (6 if STARTS[name] == "subtracted" else 3)


@pytest.mark.parametrize("name", of_start("subtracted"))
def test_after_a_subtracted_start_the_update_is_what_the_layer_computes_beyond_the_base(
    name: str,
) -> None:
    adapted = layer(name, plain())
    for p in (adapted.A, adapted.B):
        p.data += 0.3 * torch.randn(p.shape, generator=seeded(2)).double()
    eye = torch.eye(IN, dtype=torch.float64)
    effective = (adapted(eye) - adapted.bias).T.detach().numpy()
    dW = updates_of(snapshot({"x": adapted}))["x"].dense()
    np.testing.assert_allclose(dW, effective - adapted.W0.numpy(), atol=1e-12)
    assert np.linalg.matrix_rank(dW) == 6


@pytest.mark.parametrize("name", of_start("moved"))
def test_a_moved_start_is_the_base_plus_the_stated_update(name: str) -> None:
    linear = plain()
    adapted = layer(name, linear, alpha=5.0)
    dW = 5 / 3 * (adapted.B @ adapted.A).detach()
    eye = torch.eye(IN, dtype=torch.float64)
    torch.testing.assert_close(adapted(eye) - linear(eye), dW.T, rtol=1e-12, atol=1e-12)
    assert float(dW.norm()) == pytest.approx(float(adapted.update_norm()), rel=1e-12)
    assert dW.norm() > 0.1


VARIANCES = {  # of A and of B at (out, in, r) = (96, 400, 50)
    "kaiming": (1 / (3 * 400), 0),
    "normal": (1 / 50, 0),
    "peft_gaussian": (1 / 50**2, 0),
    "orthogonal": (1 / 400, 0),
    "zero_a": (0, 1 / (3 * 50)),
    "symmetric": (1 / math.sqrt(96 * 400), 1 / math.sqrt(96 * 400)),
}
COMPUTED = {"pissa", "minor", "lora_ga", "eva", "reference"}
"""Inits that draw nothing (or only where the reference gives out)."""


def test_every_init_states_its_variance_or_is_computed() -> None:
    assert set(VARIANCES) | COMPUTED == set(INITS)
    for name in COMPUTED:
        for one, other in zip(draw(name, 3, seed=1), draw(name, 3, seed=2), strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("name", VARIANCES)
def test_random_factors_have_mean_zero_and_their_stated_variance(name: str) -> None:
    for factor, variance in zip(draw(name, 50, shape=(96, 400)), VARIANCES[name], strict=True):
        # Of n draws a variance is known to √(2/n), here to 2 % (B of symmetric) or better.
        assert float(factor.double().square().mean()) == pytest.approx(variance, rel=0.08)
        assert abs(float(factor.double().mean())) <= 4 * math.sqrt(variance / factor.numel())
    other = draw(name, 50, seed=1, shape=(96, 400))
    assert any(
        not torch.equal(a, b) for a, b in zip(other, draw(name, 50, shape=(96, 400)), strict=True)
    )


def test_the_product_of_two_random_factors_has_variance_r_sigma_to_the_fourth() -> None:
    out, inner, draws = 6, 9, 4000
    sigma_2 = 1 / math.sqrt(out * inner)
    for r in (1, 2, 6):
        generator = seeded(r)
        found = []
        for _ in range(draws):
            A, B = INITS["symmetric"](out, inner, r, generator)
            found.append(float((B @ A).square().mean()))
        mean, error = np.mean(found), np.std(found) / math.sqrt(draws)
        assert error < 0.05 * mean
        assert abs(mean - r * sigma_2**2) < 4 * error, r
        assert mean * out * inner == pytest.approx(r, abs=4 * error * out * inner)


def test_the_conventions_for_A_differ_in_how_Ax_depends_on_r() -> None:
    growth = {}
    for name in ("kaiming", "normal", "peft_gaussian"):
        sizes = [float(draw(name, r, shape=(96, 400))[0].norm() ** 2) for r in (4, 64)]
        growth[name] = sizes[1] / sizes[0]
    assert growth["kaiming"] == pytest.approx(16, rel=0.15)
    assert growth["normal"] == pytest.approx(1, rel=0.15)
    assert growth["peft_gaussian"] == pytest.approx(1 / 16, rel=0.15)


# --- the single ones --------------------------------------------------------------------------


def by_peft(linear: nn.Linear, r: int, alpha: float, init: str | bool) -> Any:
    """PEFT's layer of that init on a copy of the weight."""
    holder = nn.Sequential(nn.Linear(*linear.weight.T.shape))
    holder[0].weight.data.copy_(linear.weight)
    words = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init)
    return peft.get_peft_model(holder, words).base_model.model[0]


@pytest.mark.parametrize(("r", "alpha"), [(1, 2.0), (4, 6.0), (OUT, 16.0)])
def test_pissa_is_pefts(r: int, alpha: float) -> None:
    linear = plain(dtype=torch.float32)
    theirs = by_peft(linear, r, alpha, "pissa")
    ours = layer("pissa", linear, r, alpha=alpha)
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(ours.B @ ours.A, product, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours.residual, theirs.base_layer.weight.data, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "init"), [("peft_gaussian", "gaussian"), ("kaiming", True)])
def test_random_starts_of_peft_have_our_spread(name: str, init: str | bool) -> None:
    A = by_peft(nn.Linear(500, 40), 16, 8.0, init).lora_A["default"].weight.detach()
    ours, _ = draw(name, 16, shape=(40, 500))
    assert float(A.std()) == pytest.approx(float(ours.std()), rel=0.04)
    assert float(A.abs().max() / A.std()) == pytest.approx(
        float(ours.abs().max() / ours.std()), rel=0.2
    )


def test_pefts_orthogonal_start_is_another_one_than_ours() -> None:
    theirs = by_peft(nn.Linear(IN, OUT), 4, 8.0, "orthogonal")
    A, B = (theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach())
    assert (B @ A).norm() < 1e-6 * B.norm() * A.norm()
    assert B.norm() > 0
    assert (A @ A.T - torch.eye(4)).norm() > 0.1


@pytest.mark.parametrize("name", ["orthogonal", "eva", "lora_ga"])
def test_rows_of_A_are_orthogonal_and_of_one_length(name: str) -> None:
    A, _ = draw(name, 5)
    gram = A @ A.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(5).double(), rtol=0, atol=1e-12)
    if name != "lora_ga":
        assert float(gram[0, 0]) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", ["pissa", "minor", "lora_ga", "eva"])
def test_computed_directions_have_the_same_sign_everywhere(name: str) -> None:
    A, _ = draw(name, 6)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("r", [1, 4, OUT])
def test_pissa_and_minor_take_the_two_ends_of_the_base(r: int) -> None:
    W0 = material()["W0"].double().numpy()
    U, S, Vh = np.linalg.svd(W0, full_matrices=False)
    for name, part in (("pissa", slice(0, r)), ("minor", slice(OUT - r, OUT))):
        A, B = (factor.numpy() for factor in draw(name, r))
        expected = (U[:, part] * S[part]) @ Vh[part]
        np.testing.assert_allclose(2.0 * B @ A, expected, atol=1e-12)
        np.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-12)


def test_eva_keeps_more_of_the_inputs_than_any_other_rows() -> None:
    C = material()["activations"]
    A, _ = draw("eva", 4)
    kept = float((A @ C @ A.T).trace())
    assert kept == pytest.approx(np.linalg.eigvalsh(C.numpy())[-4:].sum(), rel=1e-12)
    for seed in range(50):
        other, _ = draw("orthogonal", 4, seed=seed)
        assert float((other @ C @ other.T).trace()) < kept


def first_step(name: str, r: int) -> torch.Tensor:
    """-dW/η of a first small step of gradient descent on <G, W>, by autograd."""
    adapted = layer(name, plain(), r)
    G = material()["gradient"]
    eye = torch.eye(IN, dtype=torch.float64)
    (adapted(eye) * G.T).sum().backward()
    step = adapted.B @ adapted.A.grad + adapted.B.grad @ adapted.A
    return float(adapted.scale) * step.detach()


@pytest.mark.parametrize("r", [1, 3, OUT // 2])
def test_the_first_step_of_lora_ga_is_the_best_of_rank_2r_of_full_fine_tuning(r: int) -> None:
    U, S, Vh = np.linalg.svd(material()["gradient"].numpy(), full_matrices=False)
    best = (U[:, : 2 * r] * S[: 2 * r]) @ Vh[: 2 * r]
    # s = 2 (alpha = 2r), and c² = √out/16 is the length that keeps outputs stable.
    expected = 2.0**2 * math.sqrt(OUT) / 16 * best
    np.testing.assert_allclose(first_step("lora_ga", r).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("r", [OUT // 2 + 1, OUT - 1, OUT])
def test_lora_ga_beyond_half_the_directions_leaves_none_out(r: int) -> None:
    A, B = draw("lora_ga", r)
    G = material()["gradient"]
    P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
    missed = (torch.eye(OUT).double() - P_B) @ G @ (torch.eye(IN).double() - P_A)
    assert missed.norm() < 1e-10 * G.norm()


@pytest.mark.parametrize("r", [1, 4, OUT])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_reference_start_is_the_best_of_rank_r_of_its_update(r: int, scale: float) -> None:
    dW = material()["reference"].dense()
    U, S, Vh = np.linalg.svd(dW, full_matrices=False)
    A, B = (factor.numpy() for factor in draw("reference", r, scale=scale))
    np.testing.assert_allclose(scale * B @ A, (U[:, :r] * S[:r]) @ Vh[:r], atol=1e-12)
    np.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 2])
def test_beyond_the_rank_of_the_reference_directions_start_at_zero_but_can_train(rank: int) -> None:
    rng = np.random.default_rng(0)
    given: Update | None = None
    if rank:
        given = Factored(rng.standard_normal((OUT, rank)), rng.standard_normal((rank, IN)), 0.7)
    A, B = draw("reference", 5, reference=given)
    expected = np.zeros((OUT, IN)) if given is None else given.dense()
    np.testing.assert_allclose(2.0 * (B @ A).numpy(), expected, atol=1e-12)
    assert float(B[:, rank:].abs().max()) == 0
    random, _ = draw("kaiming", 5)
    assert torch.equal(A[rank:], random[rank:].double())


def test_a_reference_that_fits_no_layer_is_one_line() -> None:
    shapes = {"a.query": (4, 3), "a.key": (4, 3)}
    update = Dense(np.ones((4, 3)))
    own: dict[str, dict[str, Any]] = {layer: {} for layer in shapes}
    refer(own, {"a.query": update, "b.value": update}, shapes)
    assert own == {"a.query": {"reference": update}, "a.key": {"reference": None}}
    with pytest.raises(WrongInput, match=r"changed layers of this one.*'a.query'; it changed none"):
        refer(own, {}, shapes)
    with pytest.raises(WrongInput, match=r"'a.key' is \(3, 4\) there and \(4, 3\) here"):
        refer(own, {"a.key": Dense(np.ones((3, 4)))}, shapes)


# --- in a run ---------------------------------------------------------------------------------

SMALL = (
    "model=planted data=planted data.width=64 data.train_examples=64 "
    "data.validation_examples=32 data.test_examples=32 train.epochs=2 train.evaluations=1 "
    "host.device=cpu adapter.r=2"
)


def trained(path: Path, *extra: str) -> Trainer:
    (one,), host = hydra_bridge.plan([SMALL.split()], list(extra))
    setup = prepare(one.config, host, path)
    trainer = Trainer(setup, Work(path), host, lambda *_: None)
    trainer.train()
    return trainer


def test_only_a_moved_start_has_traces_of_step_0_and_another_loss(tmp_path: Path) -> None:
    losses = {}
    for name in [n for n in INITS if n != "reference"]:
        trainer = trained(tmp_path, f"adapter.init={name}")
        traces = {(s, layer, t): v for s, layer, t, v in trainer.progress.traces}
        losses[name] = traces[1, "", "loss"]
        start = {key[1:] for key in traces if key[0] == 0}
        assert bool(start) == (STARTS[name] == "moved"), name
        if start:
            norms = {layer for layer, trace in start if trace == "update_norm"}
            assert norms == set(trainer.setup.adapted)
            assert ("", "validation_loss") in start
    base = losses.pop("kaiming")
    for name, loss in losses.items():
        if STARTS[name] == "moved":
            assert loss > 1.1 * base
        else:
            assert loss == pytest.approx(base, rel=1e-5), name


def test_a_run_starts_from_the_update_of_its_reference(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    (one,), host = hydra_bridge.plan([SMALL.split()])
    shapes = one.config.model.shapes(one.config.data)
    updates: dict[str, Update] = {
        layer: Factored(rng.standard_normal((m, 8)), rng.standard_normal((8, n)), 0.01)
        for layer, (m, n) in shapes.items()
        if layer != "down"
    }
    method = LoRA(r=8, alpha=5.0, init="reference", reference="0123456789ab")
    config = dataclasses.replace(one.config, adapter=method)
    setup = prepare(config, host, tmp_path, reference=Trained(updates))
    found = updates_of(snapshot(setup.adapted))
    for layer, update in updates.items():
        # All of its 8 directions, in float32.
        np.testing.assert_allclose(found[layer].dense(), update.dense(), atol=1e-6)
    assert not found["down"].dense().any()


def test_gradient_and_activations_of_a_run_reach_the_init(tmp_path: Path) -> None:
    for name in ("lora_ga", "eva"):
        (one,), host = hydra_bridge.plan([SMALL.split()], [f"adapter.init={name}"])
        setup = prepare(one.config, host, tmp_path)
        x = setup.splits["train"].collate(range(64))["inputs"][:, :64].double()
        model = one.config.model.build(one.config.data, setup.problem, 0.0)
        if name == "eva":
            expected = np.linalg.svd(x.numpy(), full_matrices=False)[2][:2]
        else:
            batch = setup.splits["train"].collate(range(64))
            model.loss(model(batch), batch["targets"]).backward()
            expected = np.linalg.svd(model.base.get_parameter("q.weight").grad.numpy())[2][:2]
        A = setup.adapted["q"].A.detach().double().numpy()
        share = np.linalg.norm(A @ expected.T) / np.linalg.norm(A)
        assert share == pytest.approx(1, abs=1e-5), name
