"""Several adapters on one network: each alone, sums, one for each row, merged and taken out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import lora_lab as lab
from lora_lab.composition import combined, compose
from lora_lab.linalg import Dense, Factored
from lora_lab.registry import WrongInput

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fan_in_fan_out.*",
    "ignore:.*save_embedding_layers.*",
    "ignore:.*did not match any targeted module.*",
    "ignore:(PiSSA|OLoRA) changes the base weights",
    "ignore:Using Rank-Stabilized LoRA with rank_pattern",
    "ignore:Note that `r` is not used",
    "ignore:.*is_gradient_checkpointing.*",
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24, "vocab_size": 30, "max_position_embeddings": 16}
QUERY = "encoder.layer.0.attention.self.query"
OUT = "encoder.layer.1.output.dense"
TABLE = "embeddings.word_embeddings"

NETWORKS = {
    "bert": lambda: BertModel(BertConfig(**SMALL), add_pooling_layer=False),
    "headed": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    ),
}


def network(name: str = "bert", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().to(dtype).eval()


def ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 30, (rows, 7), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def out(net: nn.Module, rows: int = 4) -> torch.Tensor:
    return net(input_ids=ids(rows))[0]


def factors(seed: int, r: int, m: int = 16, n: int = 16) -> Factored:
    rng = np.random.default_rng(seed)
    return Factored(0.2 * rng.standard_normal((m, r)), 0.2 * rng.standard_normal((r, n)), 1.5)


def three() -> dict[str, dict[str, Any]]:
    """Adapters of different layers, r and kinds that overlap."""
    rng = np.random.default_rng(9)
    return {
        "a": {QUERY: factors(1, 2), OUT: factors(2, 3, 16, 24)},
        "b": {QUERY: factors(3, 4)},
        "c": {QUERY: Dense(0.1 * rng.standard_normal((16, 16))), TABLE: factors(4, 2, 30, 16)},
    }


def added(weights: dict[str, float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The output of a copy whose weights are the sum."""
    net = network(dtype=dtype)
    for name, weight in weights.items():
        for layer, update in three()[name].items():
            W = net.get_submodule(layer).weight
            W.data = (W.data.double() + weight * torch.from_numpy(update.dense())).to(dtype)
    return out(net)


SELECTIONS: list[Any] = [None, "a", "b", "c", {"a": 1.0, "b": 0.5}, {"a": -2.0, "b": 1.0, "c": 0.3}]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("chosen", SELECTIONS)
def test_any_selection_computes_with_the_sum_of_its_updates(
    chosen: Any, dtype: torch.dtype
) -> None:
    net = network(dtype=dtype)
    before = out(net)
    composed = compose(net, three())
    assert torch.equal(out(net), before), "none is in use at first"
    composed.use(chosen)
    weights = {chosen: 1.0} if isinstance(chosen, str) else chosen or {}
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out(net), added(weights, dtype), rtol=tolerance, atol=tolerance)
    composed.use()
    assert torch.equal(out(net), before), "and none again"
    composed.use(chosen)
    composed.remove()
    assert torch.equal(out(net), before)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_switch_copies_no_tensor_and_names_and_parameters_stay() -> None:
    net = network()
    names = list(net.state_dict())
    places = [p.data_ptr() for p in net.parameters()]
    composed = compose(net, three())

    def held() -> list[int]:
        sites = composed.sites.values()
        return [p.right.data_ptr() for site in sites for p in site.products.values()]

    first = held()
    for chosen in SELECTIONS:
        composed.use(chosen)
        out(net)
    composed.route(["a", None, "b", "c"])
    out(net)
    assert list(net.state_dict()) == names
    assert [p.data_ptr() for p in net.parameters()] == places
    assert held() == first


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b", "a", None],
        ["b", "b", "b", "b"],
        [None, None, None, None],
        ["c", "a", None, "b"],
        ["c", "c", "a", "a"],
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_each_row_of_a_batch_is_a_run_with_its_own_adapter(
    names: list[str | None], dtype: torch.dtype
) -> None:
    net = network(dtype=dtype)
    composed = compose(net, three())
    separate = []
    for i, name in enumerate(names):
        composed.use(name)
        separate.append(out(net)[i])
    composed.route(names)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(out(net), torch.stack(separate), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chosen", SELECTIONS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_merging_adds_once_and_unmerging_restores_every_bit(
    chosen: Any, dtype: torch.dtype
) -> None:
    net = network(dtype=dtype)
    composed = compose(net, three())
    weights = {name: p.clone() for name, p in net.named_parameters()}
    owners = dict(net.named_parameters())
    composed.use(chosen)
    apart = out(net)
    composed.merge()
    composed.merge()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out(net), apart, rtol=tolerance, atol=tolerance)
    for layer, update in composed.updates().items():
        exact = weights[f"{layer}.weight"].double() + torch.from_numpy(update.dense())
        found = net.get_submodule(layer).weight.data
        torch.testing.assert_close(found, exact.data.to(dtype), rtol=1e-15, atol=1e-15)
    composed.unmerge()
    assert all(p is owners[name] for name, p in net.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    assert torch.equal(out(net), apart)


def test_a_new_selection_takes_a_merged_one_out() -> None:
    net = network()
    composed = compose(net, three())
    composed.use("a")
    composed.merge()
    composed.use("b")
    torch.testing.assert_close(out(net), added({"b": 1.0}), rtol=1e-12, atol=1e-12)
    composed.merge()
    composed.route(["a", "b", None, None])
    torch.testing.assert_close(out(net)[0], added({"a": 1.0})[0], rtol=1e-12, atol=1e-12)


def test_tied_weights_change_only_where_an_adapter_changes_them() -> None:
    net = network("gpt2")
    assert net.transformer.wte.weight is net.lm_head.weight
    before = net.lm_head.weight.clone()
    composed = compose(net, {"a": {"transformer.wte": factors(1, 2, 30, 16)}})
    composed.use("a")
    apart = out(net)
    composed.merge()
    assert torch.equal(net.lm_head.weight, before)
    torch.testing.assert_close(out(net), apart, rtol=1e-12, atol=1e-12)
    composed.unmerge()
    assert net.transformer.wte.weight is net.lm_head.weight


def test_the_combined_update_is_exact_and_has_the_sum_of_the_ranks() -> None:
    composed = compose(network(), three())
    composed.use({"a": 2.0, "b": -0.5})
    found = composed.updates()
    assert set(found) == {QUERY, OUT}
    assert isinstance(found[QUERY], Factored)
    assert found[QUERY].r == 6
    wanted = 2 * factors(1, 2).dense() - 0.5 * factors(3, 4).dense()
    np.testing.assert_allclose(found[QUERY].dense(), wanted, rtol=0, atol=1e-15)
    composed.use({"a": 1.0, "c": 1.0})
    assert isinstance(composed.updates()[QUERY], Dense)
    assert combined([(1.0, Factored([[1.0]], [[1.0]], made_in="bfloat16"))]).made_in == "bfloat16"


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda c: c.use("d"), "unknown adapter 'd'; allowed: a, b, c"),
        (lambda c: c.use({"a": float("nan")}), "the weight of 'a' must be a finite number"),
        (lambda c: c.route(["a", "x"]), "unknown adapter 'x'"),
        (lambda c: (c.route(["a"]), out(c.network)), "given 1 names; layer .* of 4 rows"),
        (lambda c: (c.route(["a"] * 4), c.merge()), "merge needs one selection"),
        (lambda c: (c.route(["a"] * 4), c.updates()), "updates needs one selection"),
        (lambda c: compose(c.network, {"x": {"nowhere": factors(1, 2)}}), "does not have"),
        (lambda c: compose(c.network, {"x": {QUERY: factors(1, 2, 5)}}), "of 5×16 for layer"),
        (lambda c: compose(c.network, {"x": {"encoder": factors(1, 2)}}), "a BertEncoder; linear"),
        (lambda c: compose(c.network, {"x": "/nowhere/at/all"}), "must be a local folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(act: Any, said: str) -> None:
    composed = compose(network(), three())
    with pytest.raises(WrongInput, match=said) as error:
        act(composed)
    assert "\n" not in str(error.value)


def test_a_refused_batch_leaves_the_selection_usable() -> None:
    net = network()
    composed = compose(net, three())
    composed.route(["a"])
    with pytest.raises(WrongInput):
        out(net)
    composed.use("a")
    torch.testing.assert_close(out(net), added({"a": 1.0}), rtol=1e-12, atol=1e-12)


# ---- adapters of PEFT --------------------------------------------------------------------------

PLAIN = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "dense"]}
FOLDERS: dict[str, tuple[str, Any]] = {
    "lora": ("bert", peft.LoraConfig(**PLAIN)),
    "rslora": ("bert", peft.LoraConfig(**PLAIN, use_rslora=True)),
    "patterns": (
        "bert",
        peft.LoraConfig(**PLAIN, rank_pattern={"query": 2}, alpha_pattern={r"layer\.1\..*": 3}),
    ),
    "dora": ("bert", peft.LoraConfig(**PLAIN, use_dora=True)),
    "pissa": ("bert", peft.LoraConfig(**PLAIN, init_lora_weights="pissa")),
    "embedding": ("bert", peft.LoraConfig(r=3, target_modules=["word_embeddings", "value"])),
    "adalora": ("bert", peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, lora_alpha=300,
                                           target_modules=["query"])),
    "saved whole": (
        "headed",
        peft.LoraConfig(**PLAIN | {"target_modules": ["query"]},
                        modules_to_save=["classifier", "LayerNorm"]),
    ),
    "biases": ("headed", peft.LoraConfig(**PLAIN | {"target_modules": ["query"]}, bias="all",
                                         modules_to_save=["classifier"])),
    "Conv1D": ("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"],
                                       fan_in_fan_out=True)),
    "dora of Conv1D": ("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"],
                                               fan_in_fan_out=True, use_dora=True)),
}  # fmt: skip


def peft_folder(case: str, folder: Path, seed: int = 2) -> torch.Tensor:
    """An adapter that PEFT trained and saved, and what PEFT's network gives with it."""
    name, config = FOLDERS[case]
    model = peft.get_peft_model(network(name, torch.float32), copy.deepcopy(config))
    torch.manual_seed(seed)
    for key, p in model.named_parameters():
        if p.requires_grad or ("lora_" in key and "ranknum" not in key):
            p.data += 0.1 * torch.randn_like(p)
    model.eval().save_pretrained(folder)
    return out(model)


@pytest.mark.parametrize("case", FOLDERS)
def test_an_adapter_of_peft_gives_the_logits_that_peft_gives(case: str, tmp_path: Path) -> None:
    wanted = peft_folder(case, tmp_path / "adapter")
    net = network(FOLDERS[case][0], torch.float32)
    composed = lab.compose(net, {"mine": tmp_path / "adapter"})
    before = out(net)
    composed.use("mine")
    torch.testing.assert_close(out(net), wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(before, wanted, atol=1e-4)
    composed.merge()
    torch.testing.assert_close(out(net), wanted, rtol=0, atol=1e-6)
    composed.unmerge()
    composed.use()
    assert torch.equal(out(net), before)


def test_adapters_of_every_kind_share_a_batch(tmp_path: Path) -> None:
    cases = ["lora", "patterns", "dora", "embedding"]
    wanted = {}
    for i, case in enumerate(cases):
        wanted[case] = peft_folder(case, tmp_path / case, seed=i)[i]
    net = network("bert", torch.float32)
    composed = lab.compose(net, {case: tmp_path / case for case in cases})
    composed.route(cases)
    torch.testing.assert_close(out(net), torch.stack([*wanted.values()]), rtol=0, atol=1e-6)


def test_rows_may_differ_in_norms_biases_and_heads_too(tmp_path: Path) -> None:
    cases = ["saved whole", "biases"]
    wanted = [peft_folder(case, tmp_path / case, seed=i) for i, case in enumerate(cases)]
    net = network("headed", torch.float32)
    composed = lab.compose(net, {case: tmp_path / case for case in cases})
    composed.route([cases[0], cases[1], cases[0], None])
    rows = [wanted[0][0], wanted[1][1], wanted[0][2], out(network("headed", torch.float32))[3]]
    torch.testing.assert_close(out(net), torch.stack(rows), rtol=0, atol=1e-6)


def test_a_bare_encoder_takes_an_adapter_of_the_headed_model_and_says_what_it_left(
    tmp_path: Path,
) -> None:
    peft_folder("saved whole", tmp_path / "adapter")
    with pytest.warns(UserWarning, match="no 'classifier.bias', 'classifier.weight'.*; left out"):
        composed = lab.compose(network("bert", torch.float32), {"mine": tmp_path / "adapter"})
    assert QUERY in composed.sites


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    peft_folder("Conv1D", tmp_path / "adapter")
    with pytest.raises(WrongInput, match="which the network does not have"):
        lab.compose(network("bert"), {"mine": tmp_path / "adapter"})
