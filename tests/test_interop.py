"""Free passage to PEFT: what we save it loads, and where both do the same, they train the same."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from test_adapters import WAYS
from torch import nn

from lora_lab import compose, hydra_bridge, training
from lora_lab.adapters import ADAPTERS, Method, snapshot
from lora_lab.adapters.lora import LoRA
from lora_lab.adapters.peft import Peft
from lora_lab.config import Host, RunConfig, run_id
from lora_lab.execution import identity, record_update
from lora_lab.inits import INITS
from lora_lab.linalg import Dense, decompose, updates_of
from lora_lab.measuring import kept
from lora_lab.preparation import Setup, prepare
from lora_lab.store import RunDir, Store, Work
from lora_lab.training import Trainer, rates

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fan_in_fan_out.*", "ignore:Using Rank-Stabilized LoRA with rank_pattern"
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    base = tmp_path_factory.mktemp("ground")
    data = ["data=table", f"data.path={tiny.reviews(base / 'reviews.csv')}", "data.text=review"]
    data += ["data.label=stars", "train.batch_size=8"]
    found = {
        kind: ["model=hf", f"model.name={tiny.folder(base / kind, kind)}", *data]
        for kind in ("bert", "gpt2")
    }
    small = [f"data.{split}_examples=8" for split in ("train", "validation", "test")]
    return found | {"minilm": ["model=minilm", "data=rotten_tomatoes", *small]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def ready(
    line: Sequence[str], cache: Path, method: Method, *extra: str, precision: str = "float32"
) -> tuple[Setup, Host]:
    """A run before its first step."""
    (one,), host = hydra_bridge.plan([[*line, f"train.precision={precision}", *extra]])
    config: RunConfig = dataclasses.replace(one.config, adapter=method)
    return prepare(config, host, cache), host


def move(setup: Setup) -> None:
    """Give everything that trains in the network another value, as training would."""
    generator = torch.Generator().manual_seed(7)
    for p in setup.model.base.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def recorded(setup: Setup, host: Host, folder: Path) -> RunDir:
    """The trained weights as a run keeps them."""
    run = Store(folder, create=True).run(run_id(setup.config))
    with run.lock():
        run.begin(identity(setup.config), {})
        spectra = {
            layer: decompose(update, vectors=True)
            for layer, update in updates_of(snapshot(setup.adapted)).items()
        }
        record_update(setup, run, spectra, host)
        run.write_json("metrics", {"status": "done"})
        run.seal()
    return run


@torch.no_grad()
def logits(setup: Setup, network: nn.Module | None = None) -> torch.Tensor:
    """Outputs of the model's head on one batch, with its own network or another."""
    model = copy.copy(setup.model)
    model._modules = dict(setup.model._modules)
    model.base = setup.model.base if network is None else network
    return model.eval()(setup.splits["test"].collate(range(8)))


def bare(line: Sequence[str], cache: Path) -> nn.Module:
    """The pretrained network."""
    return ready(line, cache, ADAPTERS["head"]())[0].model.base.eval()


def by_peft(network: nn.Module, folder: Path) -> nn.Module:
    """The network with an adapter, loaded by PEFT; nothing in the file may be left unread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(network, str(folder))
    result = peft.set_peft_model_state_dict(
        model, peft.utils.load_peft_weights(str(folder), device="cpu")
    )
    assert not result.unexpected_keys
    return model.base_model.model.eval()


def agree(setup: Setup, host: Host, line: Sequence[str], cache: Path, folder: Path) -> RunDir:
    """Check that PEFT and `compose` compute with a recorded update as the layers themselves do."""
    run = recorded(setup, host, folder)
    wanted, before = logits(setup), logits(setup, bare(line, cache))
    assert not torch.allclose(before, wanted, atol=1e-4)
    found = logits(setup, by_peft(bare(line, cache), run.path))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    network = bare(line, cache)
    compose(network, {"mine": run.path}).use("mine")
    torch.testing.assert_close(logits(setup, network), wanted, rtol=0, atol=1e-6)
    return run


# ---- what we save ------------------------------------------------------------------------------

INIT_WAYS = {f"lora from {init}": ("lora", {"r": 2, "init": init})
             for init in INITS if init != "reference"}  # fmt: skip
ALL_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    **WAYS,
    **INIT_WAYS,
    "rslora": ("lora", {"r": 3, "alpha": 5.0, "scaling": "rslora"}),
    "patterns": (
        "lora",
        {
            "r": 2,
            "r_pattern": {r".*\.1\..*": 4},
            "alpha_pattern": {"value": 3.0, "c_attn": 1.0},
            "scaling": "rslora",
        },
    ),
    "some layers": ("lora", {"r": 2, "targets": r".*\.0\..*"}),
    "peft lora": ("peft", {"config": {"peft_type": "LORA", "r": 2, "use_rslora": True}}),
    "peft adalora": ("peft", {"config": {"peft_type": "ADALORA", "init_r": 3, "target_r": 1,
                                         "lora_alpha": 300}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("way", ALL_WAYS)
def test_peft_loads_what_every_method_with_factors_saves(
    way: str, kind: str, lines: dict[str, list[str]], cache: Path, tmp_path: Path
) -> None:
    name, fields = ALL_WAYS[way]
    method = ADAPTERS[name](**fields)
    setup, host = ready(lines[kind], cache, method)
    move(setup)
    found = updates_of(snapshot(setup.adapted)).values()
    if not found or any(isinstance(update, Dense) for update in found):
        run = recorded(setup, host, tmp_path)
        assert not (run.path / "adapter_config.json").exists(), "it is no adapter of PEFT's"
        return
    agree(setup, host, lines[kind], cache, tmp_path)


@pytest.mark.parametrize("way", ["lora", "rslora", "learned", "patterns", "stacked"])
def test_so_it_does_on_the_embedded_model(
    way: str, lines: dict[str, list[str]], cache: Path, tmp_path: Path
) -> None:
    name, fields = ALL_WAYS[way]
    setup, host = ready(lines["minilm"], cache, ADAPTERS[name](**fields))
    move(setup)
    agree(setup, host, lines["minilm"], cache, tmp_path)


def test_a_start_taken_out_of_the_base_is_saved_with_both_its_factors(
    lines: dict[str, list[str]], cache: Path, tmp_path: Path
) -> None:
    setup, host = ready(lines["bert"], cache, LoRA(r=3, init="pissa"))
    before = logits(setup, bare(lines["bert"], cache))
    torch.testing.assert_close(logits(setup), before, rtol=0, atol=2e-6)
    move(setup)
    run = agree(setup, host, lines["bert"], cache, tmp_path)
    assert {update.r for update in kept(run)[0].values()} == {6}


@pytest.mark.parametrize("also", ["norms", "biases", "target_biases", "norms+biases+embeddings"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_trained_besides_goes_along(
    also: str, kind: str, lines: dict[str, list[str]], cache: Path, tmp_path: Path
) -> None:
    setup, host = ready(lines[kind], cache, LoRA(r=2), f"train.also=classifier+{also}")
    move(setup)
    agree(setup, host, lines[kind], cache, tmp_path)


# ---- the same training -------------------------------------------------------------------------

LAYERS = {"bert": ["query", "value", "intermediate.dense"], "gpt2": ["c_attn", "mlp.c_proj"]}

SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("bert", {}, {}),
    "rslora": ("bert", {"scaling": "rslora"}, {"use_rslora": True}),
    "lora+": ("bert", {"lr_ratio": 4.0}, {}),
    "lora-fa": ("bert", {"freeze_a": True}, {}),
    "patterns": (
        "bert",
        {"r_pattern": {"query": 2}, "alpha_pattern": {r".*\.1\..*value": 5.0}},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {r".*\.1\..*value": 5.0}},
    ),
    "dropout": ("bert", {"dropout": 0.2}, {"lora_dropout": 0.2}),
    "Conv1D": ("gpt2", {}, {"fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", SAME)
def test_our_lora_and_pefts_take_the_same_way(
    case: str, lines: dict[str, list[str]], cache: Path, tmp_path: Path
) -> None:
    kind, ours, theirs = SAME[case]
    extra = ["train.epochs=2", "train.lr=0.01", "train.trace_every=1", "train.evaluations=0"]
    method = LoRA(r=3, alpha=4.0, targets="+".join(LAYERS[kind]), **ours)
    mine, host = ready(lines[kind], cache, method, *extra, precision="float64")
    other, _ = ready(lines[kind], cache, ADAPTERS["head"](), *extra, precision="float64")
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=LAYERS[kind], **theirs)
    injected = peft.inject_adapter_in_model(config, other.model.base)
    pairs = {}
    for layer, module in mine.adapted.items():
        tuner = injected.get_submodule(layer)
        for part in "AB":
            p = getattr(tuner, f"lora_{part}")["default"].weight
            p.data = getattr(module, part).detach().clone()
            p.requires_grad_(part == "B" or not method.freeze_a)
            pairs[f"{layer}.{part}"] = getattr(module, part), p
    assert mine.steps == other.steps >= 20
    losses = []
    for setup, multiples in ((mine, rates(mine.adapted)), (other, plus(injected, method))):
        torch.manual_seed(0)
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        trainer = Trainer(setup, Work(folder), host, lambda *_: None)
        trainer.optimizer = training.optimizer(
            trainer.parameters, multiples, setup.config.train.lr, setup.config.train
        )
        trainer.scheduler = training.schedule(
            trainer.optimizer, trainer.cfg.schedule, trainer.cfg.warmup, setup.steps
        )
        trainer.train()
        losses.append([v for _, _, trace, v in trainer.progress.traces if trace == "loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-8)
    for name, (p, q) in pairs.items():
        assert p.dtype == torch.float64
        torch.testing.assert_close(p.data, q.data, rtol=0, atol=1e-8, msg=name)
    moved = [float((p - p0).abs().max()) for p, p0 in zip(*starts(mine, pairs), strict=True)]
    assert max(moved) > 1e-2, "it has gone somewhere"


def plus(network: nn.Module, method: LoRA) -> dict[str, float]:
    """LoRA+ by hand: the rate of every B, by its name in the model."""
    names = [name for name, _ in network.named_parameters() if "lora_B" in name]
    return {f"base.{name}": method.lr_ratio for name in names} if method.lr_ratio != 1 else {}


def starts(
    setup: Setup, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every B after training, and as it began."""
    ends = [p.data for name, (p, _) in pairs.items() if name.endswith(".B")]
    return ends, [torch.zeros_like(p) for p in ends]


def test_the_bridge_and_our_layers_are_the_same_method(
    lines: dict[str, list[str]], cache: Path
) -> None:
    mine, _ = ready(lines["bert"], cache, LoRA(r=3, alpha=6.0), precision="float64")
    theirs, _ = ready(
        lines["bert"],
        cache,
        Peft({"peft_type": "LORA", "r": 3, "lora_alpha": 6}),
        precision="float64",
    )
    move(mine)
    for layer, module in theirs.adapted.items():
        for p, q in zip(module.factors, mine.adapted[layer].factors, strict=True):
            p.data.copy_(q.data)
    theirs.model.classifier.load_state_dict(mine.model.classifier.state_dict())
    torch.testing.assert_close(logits(theirs), logits(mine), rtol=1e-12, atol=1e-12)
    assert mine.config.adapter.flops({n: m.shape for n, m in mine.adapted.items()}) == (
        theirs.config.adapter.flops({n: m.shape for n, m in theirs.adapted.items()})
    )
