"""Faults of widely copied LoRA code, each as a law of ours, on whole networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from test_adapters import CHANGING, WAYS, config
from torch import nn

from lora_lab import hydra_bridge
from lora_lab.adapters import Adapted, attach, snapshot
from lora_lab.adapters.lora import LoRA
from lora_lab.preparation import Setup, prepare
from lora_lab.registry import WrongInput
from lora_lab.store import Work
from lora_lab.training import Trainer


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("ground")
    return [
        *("model=hf", f"model.name={tiny.folder(base / 'bert')}", "train.precision=float64"),
        *("data=table", f"data.path={tiny.reviews(base / 'reviews.csv')}", "data.text=review"),
        *("data.label=stars", "train.batch_size=8", "train.lr=0.01", "train.weight_decay=0.1"),
    ]


def ready(line: list[str], way: str, folder: Path) -> Setup:
    (one,), host = hydra_bridge.plan([line])
    return prepare(dataclasses.replace(one.config, adapter=config(way)), host, folder)


def everything(setup: Setup) -> dict[str, torch.Tensor]:
    """Copies of all parameters, and of the frozen weights of the changed layers."""
    found = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    return found | {f"{layer}: W0": m.W0.clone() for layer, m in setup.adapted.items()}


@pytest.mark.parametrize("way", WAYS)
def test_training_moves_what_is_stated_and_no_bit_of_anything_else(
    way: str, line: list[str], tmp_path: Path
) -> None:
    # Copied code leaves norms, embeddings and the rest of the network to the optimizer.
    setup = ready(line, way, tmp_path)
    stated = {name for name, p in setup.model.named_parameters() if p.requires_grad}
    inside = {f"base.{layer}." for layer in setup.adapted}
    assert all(name.startswith(("classifier.", *inside)) for name in stated)
    before = everything(setup)
    _, host = hydra_bridge.plan([line])
    Trainer(setup, Work(tmp_path), host, lambda *_: None).train()
    after = everything(setup)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= stated
    assert {"classifier.weight", "classifier.bias"} <= moved
    assert any(float(layer.update_norm()) > 0 for layer in setup.adapted.values()) or way == "head"


ORDERS = [
    ["merge"],
    ["merge", "merge"],
    ["merge", "eval"],
    ["train", "merge", "eval"],
    ["merge", "train", "eval", "merge"],
    ["merge", "unmerge", "merge"],
]


@pytest.mark.parametrize("way", CHANGING)
def test_no_order_of_merging_and_modes_counts_the_update_twice(
    way: str, line: list[str], tmp_path: Path
) -> None:
    # Copied code merges in eval(), again in merge(), and adds BA in a forward pass after it.
    setup = ready(line, way, tmp_path)
    generator = torch.Generator().manual_seed(1)
    for p in setup.model.base.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    batch = setup.splits["test"].collate(range(8))
    model, layers = setup.model.eval(), setup.adapted.values()
    dW = snapshot(setup.adapted)
    with torch.no_grad():
        apart = model(batch)
        for acts in ORDERS:
            for act in acts:
                for layer in layers:
                    getattr(layer, act)()
            torch.testing.assert_close(model(batch), apart, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(model(batch), apart, rtol=1e-10, atol=1e-12)
            assert {k: v.tobytes() for k, v in snapshot(setup.adapted).items()} == {
                k: v.tobytes() for k, v in dW.items()
            }, "a merged layer tells the same update"
            for layer in layers:
                layer.unmerge()
            assert torch.equal(model(batch), apart)


class Alike(nn.Module):
    """Layers whose names hold each other's."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.subquery, self.query_key = (nn.Linear(4, 4) for _ in range(3))
        self.inner = nn.Module()
        self.inner.query, self.inner.query2 = nn.Linear(4, 4), nn.Linear(4, 4)


SHAPES = dict.fromkeys(("query", "subquery", "query_key", "inner.query", "inner.query2"), (4, 4))


def changed(targets: str) -> set[str]:
    network = Alike()
    attach(network, LoRA(r=2, targets=targets), SHAPES, seed=0)
    return {name for name, module in network.named_modules() if isinstance(module, Adapted)}


def test_a_target_is_a_name_and_no_part_of_one() -> None:
    assert changed("query") == {"query", "inner.query"}
    assert changed("inner.query") == {"inner.query"}
    assert changed("subquery+query2") == {"subquery", "inner.query2"}


@pytest.mark.parametrize("targets", ["nope", "query+nope", "quer", "key", ".*nope"])
def test_a_target_that_is_not_there_is_an_error_and_changes_nothing(targets: str) -> None:
    network = Alike()
    before = {name: p.clone() for name, p in network.named_parameters()}
    with pytest.raises(WrongInput, match="matches no layer"):
        attach(network, LoRA(r=2, targets=targets), SHAPES, seed=0)
    assert not any(isinstance(module, Adapted) for module in network.modules())
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
