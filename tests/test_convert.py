"""extract, truncate and merge beside PEFT's own: what they write is loaded by PEFT itself."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_peft_adapters import CASES, adalora, adapter_of, made, stored
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from lora_lab import tasks
from lora_lab.checkpoints import read_updates
from lora_lab.checkpoints.write import lora_config
from lora_lab.cli import main
from lora_lab.convert import Size, cut, extract, merge, truncate
from lora_lab.linalg import Dense, decompose, randomized
from lora_lab.measures import MEASURES
from lora_lab.registry import WrongInput

# PEFT and transformers warn on their own affairs; what we warn of is tested by pytest.warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:.*fan_in_fan_out.*",
    "ignore:.*save_embedding_layers.*",
    "ignore:.*tie_word_embeddings.*",
    "ignore:.*is_gradient_checkpointing.*",
    "ignore:.*adapter config has the flag.*",
    "ignore:.*did not match any targeted module.*",
    "ignore:Adapter 'default'.*invalid shape",
    "ignore:Note that `r` is not used",
    "ignore:(PiSSA|OLoRA) changes the base weights",
    "ignore:Using Rank-Stabilized LoRA with rank_pattern",
    "ignore:saved whole",
    "ignore:left out.*not comparable with the base",
    "ignore:added, not being in the base",
)

X = torch.arange(6)[None]
Q = "encoder.layer.0.attention.self.query"


def disturbed(model, only="", seed=1):
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def pair_of(name, folder, only=""):
    """A base and a tuned model, and their folders."""
    base = made(name).eval()
    tuned = disturbed(base, only)
    return base, tuned, stored(base, folder / "base"), stored(tuned, folder / "tuned")


@pytest.fixture
def bert(tmp_path):
    return pair_of("bert", tmp_path)


def out_of(model):
    with torch.no_grad():
        found = model(X)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def loaded(base, adapter):
    """The base with an adapter, by PEFT; nothing in the file may be left unread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()
    result = peft.set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    return model


def close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance, float((found - expected).abs().max())


def dense(**paths):
    return {layer: update.dense() for layer, _, update in read_updates(**paths)}


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# ---- extract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "headed bert", "untied gpt2"])
def test_an_adapter_of_full_rank_makes_the_base_the_tuned_model_in_peft(tmp_path, name):
    base, tuned, b, t = pair_of(name, tmp_path)
    extract(b, t, tmp_path / "a", Size(energy=1.0))
    model = loaded(base, tmp_path / "a")
    assert (out_of(base) - out_of(tuned)).abs().max() > 0.01
    close(out_of(model), out_of(tuned))
    close(out_of(model.merge_and_unload()), out_of(tuned))


def test_a_head_that_the_base_lacks_comes_along(tmp_path):
    base = stored(made("bert"), tmp_path / "base")
    tuned = disturbed(made("headed bert"))
    stored(tuned, tmp_path / "tuned")
    extract(base, tmp_path / "tuned", tmp_path / "a", Size(energy=1.0))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    close(out_of(loaded(model, tmp_path / "a")), out_of(tuned))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "classifier" in config["modules_to_save"]


def test_only_linear_layers_of_blocks_get_factors_and_the_rest_is_named(bert, tmp_path):
    _, _, base, tuned = bert
    with pytest.warns(UserWarning, match=r"saved whole, having no factors.*MB\)") as caught:
        rows = extract(base, tuned, tmp_path / "a", Size(r=2))
    assert len(caught) == 1
    assert len(rows) == 12
    assert rows["layer"].str.startswith("encoder.layer.").all()
    held = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {n for n in held if "embeddings" in n and "lora" in n} == set()
    assert f"base_model.model.{Q}.base_layer.bias" in held


def test_the_errors_are_the_tails_of_the_singular_values(bert, tmp_path):
    _, _, base, tuned = bert
    rows = extract(base, tuned, tmp_path / "a", Size(r=3), "float64").set_index("layer")
    full, cut = dense(base=base, tuned=tuned), dense(adapter=tmp_path / "a")
    for layer, row in rows.iterrows():
        s = np.linalg.svd(full[layer], compute_uv=False)
        energy = np.sum(s**2)
        assert row["error"] == pytest.approx(np.sqrt(np.sum(s[3:] ** 2) / energy), rel=1e-9)
        assert row["error"] == pytest.approx(relative(cut[layer], full[layer]), rel=1e-9)
        assert row["energy"] == pytest.approx(np.sum(s[:3] ** 2) / energy, rel=1e-9)
        assert row["spectral"] == pytest.approx(s[3] / s[0], rel=1e-7)
        assert row["rounding"] < 1e-15


def test_the_energy_and_the_ranks_decide_r_layer_by_layer(bert, tmp_path):
    _, _, base, tuned = bert
    rows = extract(base, tuned, tmp_path / "a", Size(energy=0.8)).set_index("layer")
    full = dense(base=base, tuned=tuned)
    for layer, row in rows.iterrows():
        assert row["r"] == MEASURES["energy_rank"](decompose(Dense(full[layer])), 0.8)
        assert row["energy"] >= 0.8
    assert rows["r"].nunique() > 1
    ranks = {Q: 1, "encoder.layer.1.output.dense": 5}
    with pytest.warns(UserWarning, match="left out, having no r in ranks: .* and 7 more"):
        rows = extract(base, tuned, tmp_path / "b", Size(ranks=ranks))
    assert dict(zip(rows["layer"], rows["r"], strict=True)) == ranks
    found = {layer: u.r for layer, _, u in read_updates(adapter=tmp_path / "b") if layer in ranks}
    assert found == ranks


def test_factors_are_balanced_and_rounded_once_to_their_dtype(bert, tmp_path):
    _, _, base, tuned = bert
    for dtype, u in (("float32", 2.0**-24), ("bfloat16", 2.0**-8), ("float16", 2.0**-11)):
        rows = extract(base, tuned, tmp_path / dtype, Size(r=4), dtype)
        assert rows["rounding"].between(u / 10, 2 * u).all()
        held = load_file(tmp_path / dtype / "adapter_model.safetensors")
        A, B = (held[f"base_model.model.{Q}.lora_{part}.weight"] for part in "AB")
        assert A.dtype == getattr(torch, dtype)
        close(A.double() @ A.double().T, B.double().T @ B.double(), 16 * u)


@pytest.mark.parametrize("kind", ["int", "energy"])
def test_peft_converts_an_adapter_of_its_own_to_the_same_factors(tmp_path, kind):
    base = stored(made("bert"), tmp_path / "base")
    torch.manual_seed(3)
    config = peft.LoHaConfig(r=4, target_modules=["query", "dense"], init_weights=False)
    model = peft.get_peft_model(made("bert"), config)
    goal, size = (3, Size(r=3)) if kind == "int" else (0.9, Size(energy=0.9))
    _, tensors = peft.convert_to_lora(model, goal)
    stored(model.double().merge_and_unload(), tmp_path / "tuned")
    rows = extract(base, tmp_path / "tuned", tmp_path / "a", size).set_index("layer")
    found = dense(adapter=tmp_path / "a")
    rows = rows[rows["r"] > 0]
    assert (rows["r"].nunique() > 1) == (kind == "energy")
    full = dense(base=base, tuned=tmp_path / "tuned")
    for layer, row in rows.iterrows():
        A, B = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        r = int(row["r"])
        assert r == len(A)
        U, S, Vh = np.linalg.svd(full[layer])
        assert relative(found[layer], (U[:, :r] * S[:r]) @ Vh[:r]) < 1e-6
        # PEFT decomposes in float32, whose error a small gap enlarges.
        gap = (S[r - 1] - S[r]) / S[0]
        assert relative(found[layer], (B.double() @ A.double()).numpy()) < max(1e-6, 3e-7 / gap)


def test_mergekits_formula_gives_the_same_adapter(bert, tmp_path):
    base, tuned, b, t = bert
    extract(b, t, tmp_path / "a", Size(r=4))
    found = dense(adapter=tmp_path / "a")
    for layer in (Q, "encoder.layer.1.intermediate.dense"):
        dW = (tuned.get_submodule(layer).weight - base.get_submodule(layer).weight).detach()
        U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
        expected = (U[:, :4] * S[:4].sqrt()) @ (S[:4].sqrt()[:, None] * Vh[:4])
        assert relative(found[layer], expected.numpy()) < 1e-6


def test_layers_that_did_not_change_are_not_in_the_adapter(tmp_path):
    base, _, b, t = pair_of("bert", tmp_path, only="layer.1.attention.self.query.weight")
    rows = extract(b, t, tmp_path / "a", Size(r=2)).set_index("layer")
    (changed,) = rows.index[rows["r"] > 0]
    assert changed == "encoder.layer.1.attention.self.query"
    assert rows.drop(index=changed)[["energy", "error"]].isna().all(axis=None)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == [changed]
    assert config["modules_to_save"] is None
    loaded(base, tmp_path / "a")


class Twins(torch.nn.Module):
    """Layers whose names end alike, in blocks of one number."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.ModuleList([torch.nn.Linear(6, 5)])
        self.b = torch.nn.ModuleDict({"a": torch.nn.ModuleList([torch.nn.Linear(7, 5)])})
        self.norm = torch.nn.LayerNorm(5)
        self.prenorm = torch.nn.LayerNorm(5)

    def forward(self, x):
        return self.prenorm(self.norm(self.a[0](x[..., :6]))) + self.b["a"][0](x)


@pytest.mark.parametrize(("only", "ranks"), [("", {"a.0": 2, "b.a.0": 3}), ("a.0", {"a.0": 4})])
def test_names_that_end_alike_are_told_apart_in_peft(tmp_path, only, ranks):
    torch.manual_seed(0)
    base = Twins()
    tuned = disturbed(base, only)
    b, t = stored(base, tmp_path / "base"), stored(tuned, tmp_path / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extract(b, t, tmp_path / "a", Size(ranks=ranks))
    model = loaded(base, tmp_path / "a")
    found = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == ranks
    close(model.base_model.model.norm.weight, tuned.norm.weight)


def test_patterns_of_alike_names_match_one_layer_each():
    content = lora_config({"a.0": (2, 2), "b.a.0": (3, 3), "c": (4, 4), "d": (4, 4)})
    assert content["rank_pattern"] == {r"^a\.0": 2, "b.a.0": 3}
    assert lora_config({"a.0": (2, 2)}, {"a.0", "b.a.0"})["target_modules"] == r"a\.0"


def test_a_large_layer_of_few_directions_needs_no_whole_spectrum(tmp_path, monkeypatch):
    torch.manual_seed(0)
    q, name = 2048, "layer.0.up.weight"
    frames = [torch.linalg.qr(torch.randn(q, 6))[0] for _ in range(2)]
    sigma = 2.0 ** -torch.arange(6)
    dW = (frames[0] * sigma) @ frames[1].T + 1e-5 * torch.randn(q, q) / q**0.5
    for kind, weight in (("base", torch.zeros(q, q)), ("tuned", dW)):
        (tmp_path / kind).mkdir()
        save_file({name: weight}, tmp_path / kind / "model.safetensors")
    monkeypatch.setattr(cut, "decompose", lambda *_, **__: pytest.fail("the whole spectrum"))
    monkeypatch.setattr(randomized, "decompose", cut.decompose)
    rows = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", Size(energy=0.99))
    assert rows.loc[0, "r"] == 4, "1 - 4^-3 < .99 <= 1 - 4^-4"
    assert rows.loc[0, "spectral"] == pytest.approx(2**-4, rel=1e-3)
    tail = torch.linalg.norm(sigma[4:]) / torch.linalg.norm(sigma)
    assert rows.loc[0, "error"] == pytest.approx(float(tail), rel=1e-3)


# ---- truncate ----------------------------------------------------------------------------------

PLAIN = [case for case in CASES if "DoRA" not in case and case != "lora bias"]


@pytest.mark.parametrize("case", PLAIN)
def test_truncation_at_full_r_changes_nothing_in_peft(tmp_path, case):
    name, config, _ = CASES[case]
    base, adapter = adapter_of(name, peft.LoraConfig(**config), tmp_path)
    r = max(u.r for _, _, u in read_updates(base=base, adapter=adapter))
    rows = truncate(adapter, tmp_path / "cut", Size(r=r), base=base)
    assert (rows["error"] < 3e-7).all()
    before, after = (dense(base=base, adapter=a) for a in (adapter, tmp_path / "cut"))
    assert before.keys() == after.keys()
    assert all(relative(after[layer], before[layer]) < 3e-7 for layer in before)
    model = loaded(made(name), tmp_path / "cut")
    if name != "net" and config.get("init_lora_weights") not in ("pissa", "olora"):
        whole = peft.PeftModel.from_pretrained(made(name), adapter).eval()
        close(out_of(model.eval()), out_of(whole), 2e-5)


def test_adalora_becomes_plain_lora(tmp_path):
    base, adapter = adapter_of("bert", adalora(), tmp_path)
    truncate(adapter, tmp_path / "cut", Size(r=6))
    before, after = (dense(base=base, adapter=a) for a in (adapter, tmp_path / "cut"))
    assert before.keys() == after.keys()
    assert all(relative(after[layer], before[layer]) < 3e-7 for layer in before)
    loaded(made("bert"), tmp_path / "cut")


def test_in_float64_truncation_at_full_r_is_the_identity(tmp_path):
    _, adapter = adapter_of("bert", peft.LoraConfig(r=4, target_modules=["query"]), tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file({k: v.double() for k, v in load_file(file).items()}, file)
    rows = truncate(adapter, tmp_path / "cut", Size(r=4))
    assert (rows["error"] < 1e-14).all()
    before, after = dense(adapter=adapter), dense(adapter=tmp_path / "cut")
    assert all(relative(after[layer], before[layer]) < 1e-12 for layer in before)


@pytest.mark.parametrize("size", [Size(r=2), Size(energy=0.7)])
def test_truncation_is_the_best_approximation_and_says_its_error(tmp_path, size):
    config = peft.LoraConfig(r=6, lora_alpha=11, use_rslora=True, target_modules=["query", "dense"])
    _, adapter = adapter_of("bert", config, tmp_path)
    rows = truncate(adapter, tmp_path / "cut", size).set_index("layer")
    before, after = dense(adapter=adapter), dense(adapter=tmp_path / "cut")
    for layer, row in rows.iterrows():
        s = np.linalg.svd(before[layer], compute_uv=False)
        r = int(row["r"])
        tail = np.sqrt(np.sum(s[r:] ** 2) / np.sum(s**2))
        assert row["error"] == pytest.approx(tail, rel=1e-6)
        assert relative(after[layer], before[layer]) == pytest.approx(tail, rel=1e-6)
        if size.energy is not None:
            assert tail**2 <= 0.3 < np.sum(s[r - 1 :] ** 2) / np.sum(s**2)


def test_a_layer_with_fewer_directions_keeps_them_and_zero_updates_go(tmp_path):
    def prune(model):
        with torch.no_grad():
            model.get_submodule(f"base_model.model.{Q}").lora_B["default"].weight.zero_()

    config = {"r": 5, "rank_pattern": {"key": 2}, "target_modules": ["query", "key"]}
    _, adapter = adapter_of("bert", peft.LoraConfig(**config, bias="all"), tmp_path, before=prune)
    rows = truncate(adapter, tmp_path / "cut", Size(r=4)).set_index("layer")
    assert list(rows["r"]) == [2, 0, 2, 4]
    assert set(dense(adapter=tmp_path / "cut")) == set(rows.index[rows["r"] > 0])
    loaded(made("bert"), tmp_path / "cut")


# ---- merge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case != "lora bias"])
def test_a_merged_folder_is_what_peft_merges_and_saves(tmp_path, case):
    name, config, _ = CASES[case]
    base, adapter = adapter_of(name, peft.LoraConfig(**config), tmp_path)
    rows = merge(base, [adapter], tmp_path / "merged")
    model = peft.PeftModel.from_pretrained(made(name), adapter).double()
    theirs = stored(model.merge_and_unload(), tmp_path / "theirs")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(theirs / "model.safetensors")
    assert ours.keys() == expected.keys()
    exact = "PiSSA" not in case and "OLoRA" not in case  # which PEFT makes in float32
    for key, tensor in ours.items():
        assert tensor.dtype == torch.float32
        close(tensor.double(), expected[key].double(), 3e-7 if exact else 1e-5)
    before = load_file(base / "model.safetensors")
    changed = {key for key in ours if not torch.equal(ours[key], before[key])}
    assert changed <= {f"{layer}.weight" for layer in rows["layer"]} | set(rows["layer"])
    assert changed >= {f"{layer}.weight" for layer in rows["layer"][rows["rounding"].notna()]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_merged_weight_is_rounded_once_to_the_bases_dtype_and_the_loss_is_said(tmp_path, dtype):
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["query"])
    base, adapter = adapter_of("bert", config, tmp_path)
    made("bert").to(getattr(torch, dtype)).save_pretrained(base)
    rows = merge(base, [adapter], tmp_path / "merged").set_index("layer")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for layer, W0, update in read_updates(base=base, adapter=adapter):
        exact = torch.from_numpy(W0 + update.dense())
        found = merged[f"{layer}.weight"]
        assert found.dtype == getattr(torch, dtype)
        # Nearest: the neighbours are no closer.
        around = (torch.nextafter(found, torch.full_like(found, end)) for end in (-9.0, 9.0))
        error = (found.double() - exact).abs()
        assert all((error <= (other.double() - exact).abs()).all() for other in around)
        assert rows.loc[layer, "dtype"] == dtype
        if dtype != "float64":
            s = decompose(update)
            for kind, column in (("", "rounding"), ("_lost", "lost"), ("_lost_energy",) * 2):
                side = dtype + (kind if kind.startswith("_") else "")
                value = MEASURES["merge_precision"](s, None, side, W0=W0, update=update)
                name = column.removeprefix("_")
                assert rows.loc[layer, name] == pytest.approx(value, rel=1e-6)


def test_several_adapters_add_up_in_float64_each_against_the_base(tmp_path):
    layers = ["query", "dense"]
    base, one = adapter_of("bert", peft.LoraConfig(r=2, target_modules=layers), tmp_path)
    dora = peft.LoraConfig(r=3, target_modules=["query"], use_dora=True)
    (tmp_path / "o").mkdir()
    _, other = adapter_of("bert", dora, tmp_path / "o")
    rows = merge(base, [one, other], tmp_path / "merged").set_index("layer")
    assert rows.loc[Q, "adapters"] == 2
    assert rows["adapters"].sum() == len(dense(adapter=one)) + 2
    merged, parts = load_file(tmp_path / "merged" / "model.safetensors"), {}
    for adapter in (one, other):
        for layer, W0, update in read_updates(base=base, adapter=adapter):
            parts[layer] = parts.get(layer, W0) + update.dense()
    for layer, exact in parts.items():
        assert np.array_equal(merged[f"{layer}.weight"].numpy(), exact.astype(np.float32))


def test_shards_and_other_files_stay_and_no_weights_of_the_base_do(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"])
    _, adapter = adapter_of("bert", config, tmp_path)
    base = tmp_path / "sharded"
    made("bert").save_pretrained(base, max_shard_size="4KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("weights of the base")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_text("weights of the base")
    merge(base, [adapter], tmp_path / "merged")
    merge(tmp_path / "base", [adapter], tmp_path / "single")
    found = {str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*")}
    wanted = {str(p.relative_to(base)) for p in base.rglob("*")}
    assert found == wanted - {"pytorch_model.bin", "onnx", "onnx/model.onnx"}
    assert len(list(base.glob("model-*"))) > 1
    whole = load_file(tmp_path / "single" / "model.safetensors")
    parts = {}
    for shard in base.glob("model-*.safetensors"):
        own = load_file(tmp_path / "merged" / shard.name)
        assert own.keys() == load_file(shard).keys()
        parts |= own
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_that_the_base_lacks_is_added_and_loads(tmp_path, sharded):
    base = tmp_path / "base"
    made("bert").save_pretrained(base, max_shard_size="4KB" if sharded else "1GB")
    config = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    first = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    model = peft.get_peft_model(first, peft.LoraConfig(**config)).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p) * p.requires_grad)
    model.save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="added, not being in the base: 'classifier.bias', 'cl"):
        merge(base, [tmp_path / "a"], tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=3)
    close(out_of(again.eval()), out_of(model), 1e-6)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(WrongInput, match=r"several adapters bring 'classifier\."):
        merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "more")


def test_what_was_extracted_merges_to_the_tuned_model(bert, tmp_path):
    _, tuned, b, t = bert
    extract(b, t, tmp_path / "a", Size(energy=1.0), "float64")
    merge(b, [tmp_path / "a"], tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, p in tuned.state_dict().items():
        tolerance = 1e-7 if p.ndim == 2 and name.startswith("encoder") else 0.0
        close(found[name], p, tolerance)


def test_a_tied_weight_that_was_saved_twice_is_changed_under_both_names(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["wte"])
    base, adapter = adapter_of("gpt2", config, tmp_path)
    file = base / "model.safetensors"
    held = load_file(file)
    save_file({**held, "lm_head.weight": held["transformer.wte.weight"].clone()}, file)
    merge(base, [adapter], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    assert not torch.equal(merged["lm_head.weight"], held["transformer.wte.weight"])


# ---- all ---------------------------------------------------------------------------------------


def everything(base, tuned, out):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extract(base, tuned, out / "a", Size(energy=0.9))
        truncate(out / "a", out / "cut", Size(r=2))
        merge(base, [out / "a", out / "cut"], out / "merged")
    return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_any_number_of_workers_gives_the_same_bytes(bert, tmp_path, monkeypatch):
    _, _, base, tuned = bert
    found = []
    for workers in (1, 2):
        monkeypatch.setattr(tasks, "ALONE", 0.0 if workers > 1 else 1e9)
        monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
        (tmp_path / f"w{workers}").mkdir()
        found.append(everything(base, tuned, tmp_path / f"w{workers}"))
    assert found[0] == found[1]


WRONG = {
    "out is there": (lambda a: truncate(a.adapter, a.base, Size(r=1)), "is there and not empty"),
    "out is a file": (
        lambda a: truncate(a.adapter, a.base / "config.json", Size(r=1)), "is there and not empty"),
    "no folder for out": (
        lambda a: truncate(a.adapter, a.base / "no" / "x", Size(r=1)), "in an existing folder"),
    "nothing given": (lambda a: Size(), "exactly one of r, energy and ranks"),
    "two given": (lambda a: Size(r=1, energy=0.5), "exactly one of r, energy and ranks"),
    "no energy": (lambda a: Size(energy=0.0), r"energy must be in \(0, 1\]; got 0.0"),
    "too much energy": (lambda a: Size(energy=1.1), r"energy must be in \(0, 1\]; got 1.1"),
    "NaN": (lambda a: Size(energy=float("nan")), r"energy must be in \(0, 1\]; got nan"),
    "no r": (lambda a: Size(r=0), "at least 1; got 0"),
    "no r of a layer": (lambda a: Size(ranks={"x": "2"}), "at least 1 for layer 'x'; got '2'"),
    "r above the layer": (
        lambda a: extract(a.base, a.tuned, a.out, Size(r=17)),
        r"r must be in \[1, 16\] for layer 'encoder.layer.0.* \(16×16\); got 17"),
    "an unknown layer": (
        lambda a: extract(a.base, a.tuned, a.out, Size(ranks={Q[:-1]: 2})),
        "unknown layer of ranks .*Did you mean"),
    "a layer without factors": (
        lambda a: extract(a.base, a.tuned, a.out, Size(ranks={"embeddings.word_embeddings": 2})),
        "unknown layer of ranks"),
    "an unknown dtype": (
        lambda a: extract(a.base, a.tuned, a.out, Size(r=1), "float31"), "unknown dtype"),
    "nothing to extract": (
        lambda a: extract(a.base, a.base, a.out, Size(r=1)), "same linear layers"),
    "r above the adapter": (
        lambda a: truncate(a.adapter, a.out, Size(r=5)), r"r must be in \[1, 4\].*got 5"),
    "ranks of an adapter": (
        lambda a: truncate(a.adapter, a.out, Size(ranks={"x": 2})), "truncate takes r or energy"),
    "DoRA": (lambda a: truncate(a.dora, a.out, Size(r=1)), "DoRA's dW .* cannot be truncated"),
    "PiSSA without its base": (
        lambda a: truncate(a.pissa, a.out, Size(r=1)), "depends on the base weight"),
    "a lora bias": (lambda a: merge(a.base, [a.biased], a.out), "lora_bias cannot be kept"),
    "an adapter of another model": (
        lambda a: merge(a.base, [a.gpt2], a.out), "not in the base"),
}  # fmt: skip


class Ground:
    """What the wrong inputs refer to."""

    def __init__(self, folder):
        _, _, self.base, self.tuned = pair_of("bert", folder)
        self.out = folder / "out"
        plain = {"r": 4, "target_modules": ["query"]}
        kinds = {"adapter": {}, "dora": {"use_dora": True}, "biased": {"lora_bias": True}}
        kinds |= {"pissa": {"init_lora_weights": "pissa"}}
        for kind, more in kinds.items():
            model = peft.get_peft_model(made("bert"), peft.LoraConfig(**plain, **more))
            model.save_pretrained(folder / kind)
            setattr(self, kind, folder / kind)
        model = peft.get_peft_model(made("gpt2"), peft.LoraConfig(target_modules=["c_attn"]))
        model.save_pretrained(folder / "gpt2")
        self.gpt2 = folder / "gpt2"


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(ground, case):
    ask, said = WRONG[case]
    before = sorted(ground.base.parent.rglob("*"))
    with pytest.raises(WrongInput, match=said) as caught:
        ask(ground)
    assert "\n" not in str(caught.value)
    assert sorted(ground.base.parent.rglob("*")) == before


def test_an_error_in_the_middle_leaves_nothing(bert, tmp_path):
    _, _, base, tuned = bert
    file = tuned / "model.safetensors"
    held = load_file(file)
    held[f"{Q}.weight"][0, 0] = torch.nan
    save_file(held, file)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WrongInput, match=f"layer '{Q}': the update holds NaN or Inf"):
        extract(base, tuned, tmp_path / "a", Size(r=2))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_merge_beyond_the_bases_dtype_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=10**6, target_modules=["query"])
    base, adapter = adapter_of("bert", config, tmp_path)
    made("bert").half().save_pretrained(base)
    with pytest.raises(WrongInput, match="merged weight is not finite in float16"):
        merge(base, [adapter], tmp_path / "merged")


def test_the_commands_write_show_and_print_the_rows(bert, tmp_path, capfd):
    _, _, base, tuned = map(str, bert)
    a, cut, merged = (str(tmp_path / name) for name in ("a", "cut", "merged"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["extract", "--base", base, "--tuned", tuned, "--out", a, "--r", "4"]) == 0
    out, err = capfd.readouterr()
    assert re.search(rf"{Q} +4 +0\.\d+ +0\.\d+", out)
    assert out.endswith(f"written: {a}\n")
    assert err.partition("warning: ")[2].startswith("saved whole, having no factors in LoRA")
    assert main(["truncate", "--adapter", a, "--out", cut, "--energy", "0.5", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert {"layer", "m", "n", "r", "energy", "error", "spectral", "rounding"} == set(rows[0])
    assert len(rows) == 12
    assert main(["merge", "--base", base, "--adapter", a, "--adapter", cut, "--out", merged]) == 0
    assert re.search(rf"{Q} +2 +\d", capfd.readouterr().out)
    assert main(["merge", "--base", base, "--adapter", a, "--out", merged]) == 2
    assert "is there and not empty" in capfd.readouterr().err


def test_the_commands_take_ranks_from_a_file(bert, tmp_path, capfd):
    _, _, base, tuned = map(str, bert)
    (tmp_path / "ranks.json").write_text(json.dumps({Q: 3}))
    words = ["extract", "--base", base, "--tuned", tuned, "--out", str(tmp_path / "a"), "--json"]
    assert main([*words, "--ranks", str(tmp_path / "ranks.json")]) == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert (row["layer"], row["r"]) == (Q, 3)


def test_the_conversions_need_no_torch():
    code = "import lora_lab.convert, lora_lab.weights, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
