"""Laws over PEFT's types, trained through `adapter=peft`, on small layers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lab import hydra_bridge
from lora_lab.adapters import Adapted, attach, compute_in, snapshot
from lora_lab.adapters.peft import Peft
from lora_lab.config import run_id
from lora_lab.engine import run_here
from lora_lab.injection import UNFIT, types
from lora_lab.linalg import Dense, Factored, updates_of
from lora_lab.measuring import kept
from lora_lab.preparation import prepare
from lora_lab.registry import WrongInput
from lora_lab.store import Store, Work
from lora_lab.training import Trainer, states

SHAPES = {"block.0.query": (12, 8), "block.0.value": (8, 8), "block.1.down": (8, 16)}

CASES: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2},
    "rslora": {"peft_type": "LORA", "r": 2, "use_rslora": True, "lora_alpha": 3},
    "patterns": {"peft_type": "LORA", "r": 2, "rank_pattern": {"value": 3}},
    "dora": {"peft_type": "LORA", "r": 2, "use_dora": True},
    "pissa": {"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa"},
    "olora": {"peft_type": "LORA", "r": 2, "init_lora_weights": "olora"},
    "ADALORA": {"init_r": 3, "target_r": 1},
    "BOFT": {"boft_block_size": 2},
    "C3A": {"block_size": 2},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 10},
    "FROD": {},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 2},
    "HIRA": {"r": 2},
    "HRA": {"r": 2},
    "IA3": {},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "MISS": {"r": 2},
    "bat": {"peft_type": "MISS", "r": 2, "init_weights": "bat"},
    "OFT": {"r": 2, "oft_block_size": 0},
    "OSF": {},
    "PEANUT": {"r": 2},
    "PSOFT": {"r": 2},
    "PVERA": {"r": 2},
    "RANDLORA": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.5},
    "TINYLORA": {"r": 2},
    "UNILORA": {"r": 2},
    "VBLORA": {"r": 2, "vector_length": 2, "num_vectors": 8, "topk": 2},
    "VERA": {"r": 2},
    "WAVEFT": {"n_frequency": 10},
}

MOVED = {"C3A", "FOURIERFT", "UNILORA", "VBLORA"}
"""Types that by PEFT's default start away from the base."""

IN_FLOAT32 = {"C3A", "DEFT", "FROD"}
"""Types that compute parts in float32, whatever the network's dtype."""

ONLY_FLOAT32 = {"PSOFT", "pissa", "olora"}
"""Cases that PEFT refuses in float64."""


pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks", "ignore:fan_in_fan_out is set to"
)


class Tower(nn.Module):
    """Linear layers of the shapes above, one of them a Conv1D, and one that is no target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Module()
        first.query, first.value = nn.Linear(8, 12), Conv1D(8, 8)
        nn.init.normal_(first.value.weight, std=0.3)
        second = nn.Module()
        second.down = nn.Linear(16, 8, bias=False)
        self.block = nn.ModuleList([first, second])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.block[0].query(x)
        right = self.block[0].value(x)
        both = torch.cat([left, right], -1)[..., :16]
        return self.norm(self.block[1].down(both))


def method(case: str, **fields: Any) -> Peft:
    return Peft({"peft_type": case, **CASES[case]}, **fields)


def dtype_of(case: str) -> torch.dtype:
    return torch.float32 if case in ONLY_FLOAT32 else torch.float64


def close(case: str) -> dict[str, float]:
    if case in ONLY_FLOAT32:
        return {"rtol": 1e-5, "atol": 1e-5}
    return {"rtol": 1e-6, "atol": 1e-6} if case in IN_FLOAT32 else {"rtol": 1e-9, "atol": 1e-9}


def built(case: str, seed: int = 3, **fields: Any) -> tuple[nn.Module, dict[str, Adapted]]:
    tower = Tower().to(dtype_of(case))
    return tower, attach(tower, method(case, **fields), SHAPES, seed)


def move(base: nn.Module) -> None:
    """Give every trainable parameter another value, as training would."""
    generator = torch.Generator().manual_seed(7)
    for p in base.parameters():
        if p.requires_grad:
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def moved(case: str) -> tuple[nn.Module, dict[str, Adapted]]:
    tower, adapted = built(case)
    move(tower)
    return tower.eval(), adapted


def inputs(case: str, rows: int = 3, width: int = 8) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype_of(case))


def test_every_type_of_the_installed_peft_is_proven_here_or_refused_with_a_reason() -> None:
    proven = {content.get("peft_type", case) for case, content in CASES.items()}
    assert set(types()) == proven
    assert not set(UNFIT) & proven
    for kind in UNFIT:
        with pytest.raises(WrongInput, match=f"peft_type {kind} is no method for linear layers"):
            Peft({"peft_type": kind})


@pytest.mark.parametrize("case", CASES)
def test_a_method_starts_at_the_base_or_where_its_update_says(case: str) -> None:
    x = inputs(case)
    before = Tower().to(dtype_of(case))(x)
    tower, adapted = built(case)
    tower.eval()
    assert torch.allclose(tower(x), before, **close(case)) is (case not in MOVED)
    norm = sum(float(module.update_norm()) for module in adapted.values())
    assert (norm > 1e-5) is (case in MOVED)


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_the_effective_weight_minus_the_base(case: str) -> None:
    _, adapted = moved(case)
    for layer, module in adapted.items():
        with torch.no_grad():
            zero = module(torch.zeros(1, module.shape[1], dtype=dtype_of(case)))
            effective = (module(torch.eye(module.shape[1], dtype=dtype_of(case))) - zero).T
        dW = updates_of(snapshot({layer: module}))[layer].dense()
        np.testing.assert_allclose(dW, (effective - module.W0).numpy(), **close(case))
        assert np.abs(dW).max() > 1e-5
        assert float(module.update_norm()) == pytest.approx(np.linalg.norm(dW), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_merging_computes_the_same_and_unmerging_restores_every_bit(case: str) -> None:
    tower, adapted = moved(case)
    x = inputs(case)
    apart = tower(x)
    for module in (*adapted.values(), *adapted.values()):
        module.merge()
    torch.testing.assert_close(tower(x), apart, **close(case))
    for module in adapted.values():
        module.unmerge()
    assert torch.equal(tower(x), apart)


@pytest.mark.parametrize("case", CASES)
def test_exactly_what_is_stated_trains(case: str) -> None:
    tower, adapted = built(case)
    trainable = {n: p for n, p in tower.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == method(case).parameters(SHAPES)
    assert all(any(n.startswith(f"{layer}.tuner.") for layer in SHAPES) for n in trainable)
    assert set(adapted) == set(SHAPES)
    tower(inputs(case)).square().sum().backward()
    for parameter in tower.parameters():
        assert (parameter.grad is not None) <= parameter.requires_grad
    assert sum(float(p.grad.abs().sum()) for p in trainable.values() if p.grad is not None) > 0
    for module in adapted.values():
        module.tensors()  # also with gradients about


@pytest.mark.parametrize("case", CASES)
def test_the_implicit_gradient_is_autograds(case: str) -> None:
    tower, adapted = moved(case)
    x = inputs(case, rows=5)
    for module in adapted.values():
        module.watched = True
    tower(x).square().sum().backward()
    plain = Tower().to(dtype_of(case))
    for layer, module in adapted.items():
        module.merge()
        old = plain.get_submodule(layer)
        new = nn.Linear(*module.shape[::-1]).to(dtype_of(case))
        new.weight.data = module.merged
        new.bias = old.bias
        parent, _, name = layer.rpartition(".")
        setattr(plain.get_submodule(parent), name, new)
    plain(x).square().sum().backward()
    for layer, module in adapted.items():
        G = plain.get_parameter(f"{layer}.weight").grad
        wide = {k: 100 * v for k, v in close(case).items()}
        torch.testing.assert_close(module.implicit_gradient(), G, **wide)


@pytest.mark.parametrize("case", CASES)
def test_what_trains_stays_float32_when_the_frozen_part_computes_in_bfloat16(case: str) -> None:
    tower = Tower()
    adapted = attach(tower, method(case), SHAPES, seed=0)
    compute_in(tower, torch.bfloat16)
    out = tower(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert {p.dtype for p in tower.parameters() if p.requires_grad} == {torch.float32}
    for module in adapted.values():
        assert module.tuner.get_base_layer().weight.dtype == torch.bfloat16
        assert module.W0.dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES)
def test_the_start_of_a_layer_is_its_seeds(case: str) -> None:
    tower, _ = built(case)
    torch.manual_seed(99)
    again, _ = built(case)
    for (name, p), (_, q) in zip(tower.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_start_of_a_layer_does_not_depend_on_which_others_change() -> None:
    _, every = built("LORA")
    _, one = built("LORA", targets="down")
    _, other = built("LORA", seed=4)
    A = [part["block.1.down"].factors[0] for part in (every, one, other)]
    assert torch.equal(A[0], A[1])
    assert not torch.equal(A[0], A[2])


def test_layers_without_a_twist_keep_their_factors_and_others_are_dense() -> None:
    kinds = {case: {type(u) for u in updates_of(snapshot(moved(case)[1])).values()}
             for case in ("LORA", "rslora", "ADALORA", "dora", "pissa", "VERA")}  # fmt: skip
    assert kinds.pop("LORA") == kinds.pop("rslora") == kinds.pop("ADALORA") == {Factored}
    assert set.union(*kinds.values()) == {Dense}


def test_the_same_training_by_peft_itself_gives_the_same_layers() -> None:
    # The bridge's network and PEFT's own, from the same start, three steps each.
    tower, _ = built("dora", targets="query+down")
    theirs = peft.get_peft_model(
        Tower().double(),
        peft.LoraConfig(r=2, use_dora=True, target_modules=["query", "down"]),
    )
    ours = {n.replace(".tuner", ""): p for n, p in tower.named_parameters() if p.requires_grad}
    other = {
        n.removeprefix("base_model.model."): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert ours.keys() == other.keys()
    for name, p in ours.items():
        other[name].data.copy_(p.data)
    for network, trained in ((tower, ours), (theirs, other)):
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        for _ in range(3):
            network(inputs("dora")).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, p in ours.items():
        torch.testing.assert_close(p, other[name], rtol=1e-10, atol=1e-12)


# ---- AdaLoRA -----------------------------------------------------------------------------------


def steps_of(adapted: Mapping[str, Adapted], tower: nn.Module, asked: Peft, first: int, last: int):
    """Plain gradient steps first … last of 10, with AdaLoRA's hooks."""
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.05)
    for step in range(first, last + 1):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).double()
        (tower(x) - 1).square().sum().backward()
        asked.before_step(adapted, step, 10)
        optimizer.step()
        asked.after_step(adapted, step, 10, optimizer)
        optimizer.zero_grad()


ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 3}


def adalora() -> tuple[nn.Module, dict[str, Adapted], Peft]:
    asked, tower = Peft(ADALORA), Tower().double()
    return tower, attach(tower, asked, SHAPES, 3), asked


def test_adalora_prunes_to_its_budget_and_trains_as_peft_does() -> None:
    tower, adapted, asked = adalora()
    theirs = Tower().double()
    names = {"target_modules": [*SHAPES], "total_step": 10}
    config = peft.AdaLoraConfig(**{k: v for k, v in ADALORA.items() if k != "peft_type"}, **names)
    model = peft.AdaLoraModel(theirs, config, "default")
    ours = {n.replace(".tuner", ""): p for n, p in tower.named_parameters() if p.requires_grad}
    other = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    assert ours.keys() == other.keys()
    for name, p in ours.items():
        other[name].data.copy_(p.data)

    class Output(dict):
        loss: torch.Tensor

    optimizer = torch.optim.SGD(other.values(), lr=0.05)
    forward = theirs.forward
    for step in range(1, 11):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).double()

        def lossy(x: torch.Tensor) -> Output:
            out = Output()
            out.loss = (forward(x) - 1).square().sum()
            return out

        theirs.forward = lossy
        model(x).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    steps_of(adapted, tower, asked, 1, 10)
    for name, p in ours.items():
        torch.testing.assert_close(p, other[name], rtol=1e-9, atol=1e-12, msg=name)
    left = sum(int((module.tuner.lora_E["default"] != 0).sum()) for module in adapted.values())
    assert left == 3, "one direction a layer on average"


def test_adalora_goes_on_after_a_checkpoint_as_if_it_had_never_stopped() -> None:
    whole, whole_layers, asked = adalora()
    steps_of(whole_layers, whole, asked, 1, 10)
    for stop in (4, 8):  # while pruning, and after its end
        first, first_layers, asked = adalora()
        steps_of(first_layers, first, asked, 1, stop)
        second, second_layers, asked = adalora()
        second.load_state_dict(first.state_dict())
        for name, buffer in states(second_layers).items():
            buffer.copy_(states(first_layers)[name])
        steps_of(second_layers, second, asked, stop + 1, 10)
        for (name, p), (_, q) in zip(
            whole.named_parameters(), second.named_parameters(), strict=True
        ):
            assert torch.equal(p, q), name


def test_adalora_without_room_for_its_phases_is_refused() -> None:
    _, adapted, _ = adalora()
    with pytest.raises(WrongInput, match="tinit \\+ tfinal below the run's 5 steps; got 2 \\+ 3"):
        Peft(ADALORA).before_step(adapted, 1, 5)
    with pytest.raises(
        WrongInput, match=r"target_r must be in \[1, init_r - 1\] = \[1, 3\]; got 4"
    ):
        Peft({**ADALORA, "target_r": 4})


# ---- what is asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 4}, "must name a peft_type; allowed: ADALORA, BOFT"),
        ({"peft_type": "LORAX"}, "unknown peft_type 'LORAX'.*Did you mean 'LORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "unknown peft_type 'PREFIX_TUNING'"),
        ({"peft_type": "VERA", "rr": 4}, "for VERA has no key 'rr'; allowed: d_initial, .*r, "),
        ({"peft_type": "LORA", "lora_dropuot": 0.1}, "Did you mean 'lora_dropout'"),
        ({"peft_type": "LORA", "target_modules": ["q"]}, "is said by adapter.targets"),
        ({"peft_type": "LORA", "bias": "all"}, "is said by train.also"),
        ({"peft_type": "ADALORA", "total_step": 9}, "is said by train.epochs"),
        ({"peft_type": "ADALORA", "r": 9}, "for ADALORA has no key 'r'"),
        ({"peft_type": "LORA", "init_lora_weights": "eva"}, "'eva' is made from data"),
        ({"peft_type": "LORA", "r": 0}, "PEFT refuses adapter.config: .*positive"),
        ({"peft_type": "LORA", "r": "many"}, "PEFT refuses adapter.config"),
        ({"peft_type": "OFT", "r": 3, "oft_block_size": 3}, "PEFT refuses adapter.config"),
    ],
)
def test_a_config_that_peft_does_not_take_is_refused_in_one_line(
    config: dict[str, Any], said: str
) -> None:
    with pytest.raises(WrongInput, match=said) as error:
        Peft(config).layers(SHAPES)
    assert "\n" not in str(error.value)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(WrongInput, match=r"adapter=peft needs the package peft .*lora-lab\[peft\]"):
        Peft()


def test_a_config_passes_the_bridge_with_its_types_and_gets_one_id_however_it_is_typed() -> None:
    lines = [
        "adapter.config={peft_type:LORA,r:4,use_dora:true,lora_dropout:0.5,rank_pattern:{key:2}}",
        "adapter.config={rank_pattern:{key:2},lora_dropout:0.5,use_dora:true,r:4,peft_type:lora}",
    ]
    found = [hydra_bridge.plan([["adapter=peft", line]])[0][0] for line in lines]
    assert found[0].config.adapter.config == {
        "peft_type": "LORA",
        "lora_dropout": 0.5,
        "r": 4,
        "rank_pattern": {"key": 2},
        "use_dora": True,
    }
    assert type(found[0].config.adapter.config["rank_pattern"]) is dict
    assert found[0].run_id == found[1].run_id == run_id(found[1].config)
    several, _ = hydra_bridge.plan(
        [["adapter=peft", "adapter.config={peft_type:VERA,r:4},{peft_type:VERA,r:8}"]]
    )
    assert len({one.run_id for one in several}) == 2


def test_targets_follow_our_rules() -> None:
    assert method("LORA", targets="qv").layers(SHAPES) == ["block.0.query", "block.0.value"]
    with pytest.raises(WrongInput, match="'quer' matches no layer"):
        method("LORA", targets="quer").layers(SHAPES)


def test_counts_are_the_formulas_where_there_is_one() -> None:
    assert method("LORA").parameters(SHAPES) == 2 * (20 + 16 + 24)
    assert method("LORA").flops(SHAPES) == 4 * (20 + 16 + 24)
    assert method("dora").parameters(SHAPES) == 2 * (20 + 16 + 24) + 12 + 8 + 8
    assert method("VERA").parameters(SHAPES) == 3 * 2 + 12 + 8 + 8
    assert method("IA3").parameters(SHAPES) == 12 + 8 + 8


@pytest.mark.parametrize("case", CASES)
def test_operations_are_counted_for_every_type(case: str) -> None:
    assert method(case).flops(SHAPES) >= 0


# ---- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("ground")
    return [
        *("model=hf", f"model.name={tiny.folder(base / 'bert')}", "train.precision=float32"),
        *("data=table", f"data.path={tiny.reviews(base / 'reviews.csv')}", "data.text=review"),
        *(
            "data.label=stars",
            "train.batch_size=8",
            "train.epochs=3",
            "train.lr=0.02",
            "train.trace_every=1",
        ),
    ]


RUNS = {
    "dora": "{peft_type:LORA,r:2,use_dora:true}",
    "adalora": "{peft_type:ADALORA,init_r:3,target_r:2,tinit:2,tfinal:3}",
    "lora": "{peft_type:LORA,r:2}",
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_is_trained_recorded_and_can_be_started_from(
    case: str, line: list[str], tmp_path: Path
) -> None:
    asked = [*line, "adapter=peft", "adapter.targets=qv", f"adapter.config={RUNS[case]}"]
    (one,), host = hydra_bridge.plan([asked], [f"host.results={tmp_path}"])
    assert run_here(one, host) == "done"
    run = Store(tmp_path).run(one.run_id)
    losses = run.read_table("traces").query("trace == 'loss'")["value"].to_numpy()
    assert losses[-5:].mean() < losses[:5].mean()
    updates, whole = kept(run)
    assert whole
    assert len(updates) == 4
    sigma = run.read_table("spectra")
    last = sigma[sigma["step"] == sigma["step"].max()]
    for layer, update in updates.items():
        found = last[last["layer"] == layer]["sigma"].to_numpy()
        assert np.linalg.norm(found) == pytest.approx(update.norm(), rel=1e-5)
    assert set(run.read_tensors("head")) == {"classifier.weight", "classifier.bias"}
    metrics = run.read_json("metrics")
    assert metrics["trainable"] == metrics["adapter_parameters"] + 2 * 33
    further = [*line, "adapter=head", f"model.start={one.run_id}"]
    (next_one,), host = hydra_bridge.plan([further], [f"host.results={tmp_path}"])
    assert run_here(next_one, host) == "done"


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(
    line: list[str], tmp_path: Path
) -> None:
    asked = [*line, "adapter=peft", "adapter.targets=qv", f"adapter.config={RUNS['adalora']}"]
    (one,), host = hydra_bridge.plan([asked], ["host.checkpoint_minutes=0"])

    def trained(folder: str, stop: int | None = None) -> Trainer:
        def on_step(step: int, *_: Any) -> None:
            if step == stop:
                raise KeyboardInterrupt

        setup = prepare(one.config, host, tmp_path / "cache")
        (tmp_path / folder).mkdir(exist_ok=True)
        trainer = Trainer(setup, Work(tmp_path / folder), host, on_step)
        trainer.train()
        return trainer

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("cut", stop=10)
    again = trained("cut")
    for name, p in whole.parameters.items():
        assert torch.equal(p, again.parameters[name]), name
