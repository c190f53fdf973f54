"""Laws over every scaling rule, and the one that trains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lora_lab import hydra_bridge
from lora_lab.adapters import Place, snapshot
from lora_lab.adapters.lora import LoRA, LoRALayer
from lora_lab.linalg import updates_of
from lora_lab.preparation import prepare
from lora_lab.scalings import SCALINGS
from lora_lab.store import Work
from lora_lab.training import Trainer

RULES = {
    "alpha_over_r": lambda alpha, r: alpha / r,
    "rslora": lambda alpha, r: alpha / math.sqrt(r),
    "constant": lambda alpha, r: alpha,
    "learned": lambda alpha, r: alpha / r,
}
TRAINED = [name for name in SCALINGS if SCALINGS[name].trains]
SHAPES = {"a.query": (6, 9), "a.value": (6, 9), "b.query": (6, 9)}


def layer(scaling: str, alpha: float = 3.0) -> LoRALayer:
    """A layer of random factors that are both not 0."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 6).double().requires_grad_(False)
    place = Place("x", linear, torch.Generator().manual_seed(0))
    method = LoRA(r=4, alpha=alpha, scaling=scaling, init="symmetric")
    adapted = method.adapt(place)
    assert isinstance(adapted, LoRALayer)
    return adapted


@pytest.mark.parametrize("scaling", list(SCALINGS))
@pytest.mark.parametrize(("alpha", "r"), [(16.0, 4), (3.0, 7), (0.5, 1)])
def test_the_scale_of_a_layer_follows_its_rule(scaling: str, alpha: float, r: int) -> None:
    expected = RULES[scaling](alpha, r)
    assert LoRA(r=r, alpha=alpha, scaling=scaling).scale_of("x") == expected
    of_layer = LoRA(scaling=scaling, r_pattern={"query": r}, alpha_pattern={"query": alpha})
    assert of_layer.scale_of("a.query") == expected
    assert of_layer.scale_of("a.value") == RULES[scaling](16.0, 8)


@pytest.mark.parametrize("scaling", list(SCALINGS))
def test_the_layer_computes_with_the_scale_of_its_rule(scaling: str) -> None:
    adapted = layer(scaling)
    dW = RULES[scaling](3.0, 4) * adapted.B @ adapted.A
    eye = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(adapted(eye) - adapted.bias, (adapted.W0 + dW).T)
    found = updates_of(snapshot({"x": adapted}))["x"].dense()
    np.testing.assert_allclose(found, dW.detach().numpy(), atol=1e-14)


@pytest.mark.parametrize("scaling", list(SCALINGS))
def test_a_scale_that_trains_is_one_parameter_a_layer(scaling: str) -> None:
    trains = SCALINGS[scaling].trains
    more = LoRA(r=4, scaling=scaling).parameters(SHAPES) - LoRA(r=4).parameters(SHAPES)
    assert more == len(SHAPES) * trains
    names = {name for name, p in layer(scaling).named_parameters() if p.requires_grad}
    assert names == {"A", "B", *(["scale"] if trains else [])}


@pytest.mark.parametrize("scaling", TRAINED)
def test_gradients_of_a_trained_scale_and_of_its_factors_are_those_of_the_product(
    scaling: str,
) -> None:
    adapted = layer(scaling)
    G = torch.randn(6, 9, dtype=torch.float64)
    (adapted(torch.eye(9, dtype=torch.float64)) * G.T).sum().backward()
    A, B, s = adapted.A, adapted.B, adapted.scale
    assert isinstance(s, nn.Parameter)
    torch.testing.assert_close(s.grad, (G * (B @ A)).sum())
    torch.testing.assert_close(B.grad, s * G @ A.T)
    torch.testing.assert_close(A.grad, s * B.T @ G)


@pytest.mark.parametrize("scaling", TRAINED)
def test_a_trained_scale_is_folded_into_the_update(scaling: str) -> None:
    adapted = layer(scaling)
    adapted.scale.data.fill_(-1.7)
    found = updates_of(snapshot({"x": adapted}))["x"]
    np.testing.assert_allclose(found.dense(), (-1.7 * adapted.B @ adapted.A).detach(), atol=1e-14)
    assert float(adapted.update_norm()) == pytest.approx(found.norm(), rel=1e-12)


@pytest.mark.parametrize("scaling", TRAINED)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_trained_scale_moves_in_a_run(scaling: str, init: str, tmp_path: Path) -> None:
    words = (
        "model=planted data=planted data.width=64 data.train_examples=64 adapter.r=2 "
        "data.validation_examples=32 data.test_examples=32 train.epochs=2 host.device=cpu "
        f"adapter.scaling={scaling} adapter.init={init}"
    )
    (one,), host = hydra_bridge.plan([words.split()])
    setup = prepare(one.config, host, tmp_path)
    Trainer(setup, Work(tmp_path), host, lambda *_: None).train()
    dW = updates_of(snapshot(setup.adapted))
    for name, module in setup.adapted.items():
        assert abs(module.scale.item() - 2.0) > 1e-4
        # What the network computes with is what the update says.
        eye = torch.eye(module.shape[1])
        effective = module(eye).T.detach().numpy() - module.W0.numpy()
        np.testing.assert_allclose(dW[name].dense(), effective, atol=1e-5)
