"""Laws over every registered method, on small layers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters import (
    ADAPTERS,
    Adapted,
    Method,
    Place,
    attach,
    compute_in,
    parts_dense,
    snapshot,
)
from lora_lab.adapters.intrinsic import Projection
from lora_lab.adapters.lora import LoRA, LoRALayer
from lora_lab.adapters.stacked import Order
from lora_lab.linalg import updates_of
from lora_lab.probes import copies, difference
from lora_lab.registry import WrongInput
from lora_lab.training import states

# Every method once or in each of its ways, small enough for the layers below.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "head": ("head", {}),
    "lora": ("lora", {"r": 2}),
    "learned": ("lora", {"r": 2, "scaling": "learned"}),
    "frozen A": ("lora", {"r": 2, "freeze_a": True}),
    "stacked": ("stacked", {"r": 2, "scaling": "learned"}),
    "stacked in turn": ("stacked", {"r": 1, "blocks": 3, "order": Order.one_after_another}),
    "sparse": ("sparse", {"r": 2, "every": 2}),
    "dynamic": ("dynamic", {"r": 4, "start_r": 3, "threshold": 0.3, "every": 2}),
    "adaptive": ("adaptive", {"r": 2, "every": 2}),
    "intrinsic": ("intrinsic", {"d": 11}),
    "intrinsic dense": ("intrinsic", {"d": 11, "projection": Projection.dense}),
    "dora": ("peft", {"config": {"peft_type": "LORA", "r": 2, "use_dora": True}}),
    "projected": ("projected", {"r": 2, "every": 4}),
}
METHODS = list(WAYS)
CHANGING = [name for name in METHODS if name != "head"]
SHAPES = {"block.0.query": (12, 8), "block.0.value": (8, 8), "block.1.down": (6, 16)}


class Tower(nn.Module):
    """Linear layers of the shapes above, one of them a Conv1D, and one that is no target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Module()
        first.query, first.value = nn.Linear(8, 12), Conv1D(8, 8)
        second = nn.Module()
        second.down = nn.Linear(16, 6, bias=False)
        self.block = nn.ModuleList([first, second])
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.block[0].query(x)
        right = self.block[0].value(x)
        both = torch.cat([left, right], -1)[..., :16]
        return self.norm(self.block[1].down(both))


def config(way: str, **fields: object) -> Method:
    name, own = WAYS[way]
    return ADAPTERS[name](**own, **fields)


def single(layer: nn.Module, A: torch.Tensor, B: torch.Tensor, **fields: object) -> LoRALayer:
    """One LoRA layer with given factors and s = 0.7 unless said otherwise."""
    fields = {"r": len(A), "alpha": 0.7, "scaling": "constant", **fields}
    return LoRALayer(Place("x", layer, torch.Generator()), A, B, LoRA(**fields))


def moved(base: nn.Module) -> None:
    """Give every trainable parameter another value, as training would."""
    generator = torch.Generator().manual_seed(7)
    for p in base.parameters():
        if p.requires_grad:
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def built(name: str, **fields: object) -> tuple[nn.Module, dict[str, Adapted]]:
    tower = Tower().double()
    return tower, attach(tower, config(name, **fields), SHAPES, seed=3)


STEPS = 12


def trained(
    name: str, steps: int = STEPS, **fields: object
) -> tuple[nn.Module, dict[str, Adapted], torch.optim.Optimizer | None]:
    """The first steps of 12 on a fixed problem, with the hooks as the trainer calls them."""
    tower, adapted = built(name, **fields)
    method, generator = config(name, **fields), torch.Generator().manual_seed(5)
    x, y = (torch.randn(64, n, generator=generator, dtype=torch.float64) for n in (8, 6))
    parameters = [p for p in tower.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.03) if parameters else None
    for step in range(1, steps + 1 if optimizer else 1):
        optimizer.zero_grad()
        (tower(x) - y).square().mean().backward()
        method.before_step(adapted, step, STEPS)
        optimizer.step()
        method.after_step(adapted, step, STEPS, optimizer)
    return tower, adapted, optimizer


def test_every_method_is_under_the_laws() -> None:
    assert {name for name, _ in WAYS.values()} == set(ADAPTERS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_starts_at_the_base(name: str) -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    before = Tower().double()(x)
    tower, _ = built(name)
    torch.testing.assert_close(tower(x), before, rtol=1e-12, atol=1e-12)


def check_update(layer: str, module: Adapted) -> np.ndarray:
    """That dW is the effective weight minus the base; returns it."""
    eye = torch.eye(module.shape[1], dtype=torch.float64)
    bias = 0 if module.bias is None else module.bias
    effective = (module(eye) - bias).T.detach().numpy()
    dW = updates_of(snapshot({layer: module}))[layer].dense()
    np.testing.assert_allclose(dW, effective - module.W0.numpy(), atol=1e-12)
    assert float(module.update_norm()) == pytest.approx(np.linalg.norm(dW), rel=1e-9, abs=1e-14)
    return dW


@pytest.mark.parametrize("name", CHANGING)
def test_the_update_is_the_effective_weight_minus_the_base(name: str) -> None:
    _, adapted = built(name)
    for layer, module in adapted.items():
        for p in module.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn(p.shape, dtype=p.dtype))
        assert np.abs(check_update(layer, module)).max() > 1e-3


@pytest.mark.parametrize("name", CHANGING)
def test_so_it_is_at_every_step_of_a_training(name: str) -> None:
    for steps in range(1, STEPS + 1):
        _, adapted, _ = trained(name, steps)
        found = [check_update(layer, module) for layer, module in adapted.items()]
        assert max(np.abs(dW).max() for dW in found) > 1e-4


@pytest.mark.parametrize("name", CHANGING)
def test_a_step_is_the_difference_of_two_updates_whatever_their_ranks(name: str) -> None:
    states_of = [trained(name, steps)[1] for steps in range(STEPS + 1)]
    for before, after in itertools.pairwise(states_of):
        parts, old, new = copies(before), updates_of(snapshot(before)), updates_of(snapshot(after))
        for layer, module in after.items():
            step = parts_dense(difference(parts[layer], module.tensors())).numpy()
            expected = new[layer].dense() - old[layer].dense()
            np.testing.assert_allclose(step, expected, atol=1e-12)


@pytest.mark.parametrize("name", CHANGING)
def test_merging_keeps_the_outputs_and_unmerging_the_layer(name: str) -> None:
    _, adapted, _ = trained(name)
    for module in adapted.values():
        x = torch.randn(5, module.shape[1], dtype=torch.float64)
        apart = module(x)
        for _ in range(2):  # twice adds once
            module.merge()
        together = module(x)
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
        assert not torch.equal(module.merged, module.W0)
        module.unmerge()
        assert torch.equal(module(x), apart)


@pytest.mark.parametrize("name", CHANGING)
def test_parameters_and_states_hold_the_whole_update(name: str) -> None:
    tower, adapted, _ = trained(name)
    again, fresh = built(name)
    kept = dict(tower.named_parameters())
    for parameter_name, parameter in again.named_parameters():
        parameter.data.copy_(kept[parameter_name].data)
    remembered = states(adapted)
    for state_name, buffer in states(fresh).items():
        buffer.copy_(remembered[state_name])
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(again(x), tower(x))
    old, new = snapshot(adapted), snapshot(fresh)
    assert old.keys() == new.keys()
    for part in old:
        np.testing.assert_array_equal(old[part], new[part])


@pytest.mark.parametrize("name", METHODS)
def test_exactly_what_is_stated_trains(name: str) -> None:
    tower, adapted = built(name)
    trainable = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    assert trainable == config(name).parameters(SHAPES)
    assert set(adapted) == set(config(name).layers(SHAPES))
    assert all(p.is_contiguous() for p in tower.parameters() if p.requires_grad)
    out = tower(torch.randn(3, 8, dtype=torch.float64)).square().sum()
    if trainable:
        out.backward()
    for parameter in tower.parameters():
        assert (parameter.grad is not None) <= parameter.requires_grad


@pytest.mark.parametrize("name", CHANGING)
def test_the_implicit_gradient_is_autograds(name: str) -> None:
    tower, adapted, optimizer = trained(name)
    optimizer.zero_grad()
    x = torch.randn(5, 8, dtype=torch.float64)
    for module in adapted.values():
        module.watched = True
    tower(x).square().sum().backward()
    # The same network with plain weights at the same point.
    plain = Tower().double()
    dW = updates_of(snapshot(adapted))
    for layer, module in adapted.items():
        weight = plain.get_parameter(f"{layer}.weight")
        full = torch.from_numpy(module.W0.numpy() + dW[layer].dense())
        weight.data = full if weight.shape == full.shape and layer != "block.0.value" else full.T
    plain(x).square().sum().backward()
    for layer, module in adapted.items():
        G = plain.get_parameter(f"{layer}.weight").grad
        G = G.T if layer == "block.0.value" else G
        torch.testing.assert_close(module.implicit_gradient(), G, rtol=1e-9, atol=1e-9)


def test_gradients_of_the_factors_follow_from_the_implicit_gradient() -> None:
    tower, adapted = built("lora")
    moved(tower)
    for module in adapted.values():
        module.watched = True
    tower(torch.randn(5, 8, dtype=torch.float64)).square().sum().backward()
    for module in adapted.values():
        G, s = module.implicit_gradient(), module.scale
        torch.testing.assert_close(module.B.grad, s * G @ module.A.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(module.A.grad, s * module.B.T @ G, rtol=1e-9, atol=1e-12)


def test_at_zero_B_only_B_has_a_gradient() -> None:
    tower, adapted = built("lora")
    tower(torch.randn(5, 8, dtype=torch.float64)).square().sum().backward()
    for module in adapted.values():
        assert module.A.grad.abs().max() == 0
        assert module.B.grad.abs().max() > 0


def test_the_fused_product_has_the_gradients_of_the_plain_one() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(8, 6).double().requires_grad_(False)
    layer.bias.requires_grad_(True)
    A, B = torch.randn(3, 8).double(), torch.randn(6, 3).double()
    fused, x = single(layer, A, B), torch.randn(4, 2, 8).double()
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: torch.func.functional_call(fused, {"A": a, "B": b, "bias": bias}, x),
        (x, fused.A, fused.B, layer.bias),
    )
    plain = F.linear(x, layer.weight + 0.7 * B @ A, layer.bias)
    torch.testing.assert_close(fused(x), plain, rtol=1e-12, atol=1e-12)


def test_adapter_dropout_acts_in_training_only_and_on_the_update_only() -> None:
    layer = nn.Linear(8, 6).requires_grad_(False)
    torch.manual_seed(0)
    lora = single(layer, torch.randn(3, 8), torch.randn(6, 3), alpha=1.0, dropout=0.5)
    x = torch.randn(64, 8)
    lora.eval()
    exact = lora(x)
    torch.testing.assert_close(exact, F.linear(x, layer.weight + lora.B @ lora.A, layer.bias))
    lora.train()
    assert not torch.allclose(lora(x), exact)
    mean = torch.stack([lora(x) for _ in range(2000)]).mean(0)
    assert float(((mean - exact).norm() / exact.norm()).detach()) < 0.1


def test_the_factors_of_a_layer_do_not_depend_on_which_others_change() -> None:
    _, every = built("lora")
    _, one = built("lora", targets="value")
    assert torch.equal(every["block.0.value"].A, one["block.0.value"].A)
    assert not torch.equal(every["block.0.value"].A[:, :6], every["block.0.query"].A[:, :6])


@pytest.mark.parametrize(
    ("scaling", "expected"), [("alpha_over_r", 4.0), ("rslora", 8.0), ("constant", 16.0)]
)
def test_the_scale_follows_its_rule(scaling: str, expected: float) -> None:
    assert LoRA(r=4, alpha=16, scaling=scaling).scale_of("x") == expected


def test_alpha_is_twice_r_where_nothing_is_said_and_that_is_the_same_config() -> None:
    assert LoRA(r=4).scale_of("x") == 2.0
    assert LoRA(r=4).resolved() == LoRA(r=4, alpha=8.0)


def test_patterns_set_r_and_alpha_of_single_layers() -> None:
    method = LoRA(r=2, r_pattern={"query": 5}, alpha_pattern={"block.1.down": 9.0})
    assert [method.rank_of(layer) for layer in SHAPES] == [5, 2, 2]
    assert method.scale_of("block.1.down") == pytest.approx(9.0 / 2)
    assert method.parameters(SHAPES) == 5 * 20 + 2 * 16 + 2 * 22


def test_r_above_the_smaller_side_is_refused_with_layer_and_range() -> None:
    with pytest.raises(WrongInput, match=r"\[1, 6\] for layer 'block.1.down' \(6×16\); got 7"):
        LoRA(r=7).layers(SHAPES)
    assert LoRA(r=6).layers(SHAPES) == list(SHAPES)


def test_r_equal_to_the_smaller_side_reaches_every_update() -> None:
    wanted = torch.randn(6, 16, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(wanted, full_matrices=False)
    layer = nn.Linear(16, 6).double()
    lora = single(layer, Vh, U * S, alpha=1.0)
    found = updates_of(snapshot({"x": lora}))["x"].dense()
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-12)


@pytest.mark.parametrize("name", CHANGING)
def test_what_trains_stays_float32_when_the_frozen_part_computes_in_bfloat16(name: str) -> None:
    tower = Tower()
    adapted = attach(tower, config(name), SHAPES, seed=0)
    compute_in(tower, torch.bfloat16)
    assert tower(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in tower.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in tower.parameters() if not p.requires_grad} == {torch.bfloat16}
    for module in adapted.values():
        assert module.W0.dtype == (torch.bfloat16 if "W0" in module.computes else torch.float32)


def test_factors_are_contiguous_whatever_an_init_gives() -> None:
    # A fused optimizer goes wrong where resumed moments have other strides than the parameter.
    lora = single(nn.Linear(8, 6), torch.randn(8, 3).T, torch.randn(3, 6).T)
    assert lora.A.is_contiguous()
    assert lora.B.is_contiguous()
