"""Updates read from disk: Hugging Face folders, and adapters that PEFT itself wrote."""

import json
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from lora_lab.checkpoints import read_updates
from lora_lab.linalg import Dense, Factored
from lora_lab.registry import WrongInput

# PEFT and transformers warn on their own affairs; what we warn of is tested by pytest.warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*fan_in_fan_out.*", "ignore:.*did not match.*"
)


def bert(labels=None, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=24, vocab_size=30, max_position_embeddings=8)
    if labels is None:
        return BertModel(config)
    config.num_labels = labels
    return BertForSequenceClassification(config)


def disturbed(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return model


def with_adapter(model, config, seed=2):
    """A PEFT model whose factors are all nonzero, as after training."""
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn_like(p))
    return tuned


@pytest.fixture
def pair(tmp_path):
    """A base and a tuned folder, and the exact difference of every weight."""
    base = bert()
    base.save_pretrained(tmp_path / "base")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    tuned = disturbed(base)
    tuned.save_pretrained(tmp_path / "tuned")
    dW = {
        name.removesuffix(".weight"): (p.double() - before[name].double()).detach().numpy()
        for name, p in tuned.named_parameters()
        if p.ndim == 2
    }
    return tmp_path / "base", tmp_path / "tuned", dW


def test_two_folders_give_the_difference_of_every_matrix_in_the_models_order(pair):
    base, tuned, dW = pair
    found = list(read_updates(base=base, tuned=str(tuned)))
    names = [layer for layer, _, _ in found]
    assert set(names) == set(dW)
    assert names[0].startswith("embeddings.")
    depths = [int(n.split(".")[2]) for n in names if n.startswith("encoder.")]
    assert depths == sorted(depths)
    for layer, W0, update in found:
        assert isinstance(update, Dense)
        assert update.made_in == "float32"
        assert W0.dtype == update.dW.dtype == np.float64
        assert np.array_equal(update.dW, dW[layer]), layer


def test_sharded_folders_read_like_single_ones(pair, tmp_path):
    base, _, dW = pair
    sharded = tmp_path / "sharded"
    disturbed(bert()).save_pretrained(sharded, max_shard_size="4KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for layer, _, update in read_updates(base=base, tuned=sharded):
        assert np.array_equal(update.dW, dW[layer]), layer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_float_dtype_is_read_exactly(pair, tmp_path, dtype):
    base, _, _ = pair
    tuned = disturbed(bert()).to(getattr(torch, dtype))
    tuned.save_pretrained(tmp_path / dtype)
    weights, before = tuned.state_dict(), bert().state_dict()
    for layer, W0, update in read_updates(base=base, tuned=tmp_path / dtype):
        name = f"{layer}.weight"
        assert np.array_equal(W0, before[name].double().numpy())
        assert np.array_equal(update.dW, weights[name].double().numpy() - W0), layer
        assert update.made_in == ("float32" if dtype == "float64" else dtype)


def test_a_model_with_a_head_is_matched_with_its_base_without_one_and_back(tmp_path):
    bert().save_pretrained(tmp_path / "bare")
    headed = disturbed(bert(labels=3), seed=5)
    headed.save_pretrained(tmp_path / "headed")
    before, after = bert().state_dict(), headed.state_dict()
    with pytest.warns(UserWarning, match=r"'classifier.weight' only in the tuned") as caught:
        found = list(read_updates(base=tmp_path / "bare", tuned=tmp_path / "headed"))
    assert len(caught) == 1
    assert len(found) == sum(v.ndim == 2 and v.is_floating_point() for v in before.values())
    for layer, _, update in found:
        assert not layer.startswith("bert."), "layers are named as in the base"
        expected = after[f"bert.{layer}.weight"].double() - before[f"{layer}.weight"].double()
        assert np.array_equal(update.dW, expected.numpy())
    with pytest.warns(UserWarning, match=r"'classifier.weight' only in the base"):
        back = list(read_updates(base=tmp_path / "headed", tuned=tmp_path / "bare"))
    assert {layer for layer, _, _ in back} == {f"bert.{layer}" for layer, _, _ in found}


LORA = {
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"]},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query", "key", "dense"],
        "rank_pattern": {"layer.0.attention.self.query": 2, "query": 5, r"layer\.1\..*dense": 1},
        "alpha_pattern": {"key": 3, r"^encoder.layer.1.attention.self.query": 11, "uery": 99},
    },
    "patterns of rslora": {
        "r": 4,
        "target_modules": ["query"],
        "use_rslora": True,
        "rank_pattern": {"1.attention.self.query": 9},
        "alpha_pattern": {"query": 5},
    },
    "gaussian start, biases": {
        "r": 2, "target_modules": ["dense"], "init_lora_weights": "gaussian", "bias": "all",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", LORA)
def test_an_adapter_of_peft_gives_what_its_merge_adds_to_the_weights(tmp_path, kind):
    base = bert().double()
    base.save_pretrained(tmp_path / "base")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = with_adapter(base, peft.LoraConfig(**LORA[kind]))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    changed = {k for k in before if before[k].ndim == 2 and not torch.equal(before[k], merged[k])}
    found = {
        layer: (W0, update)
        for layer, W0, update in read_updates(base=tmp_path / "base", adapter=tmp_path / "adapter")
    }
    assert {f"{layer}.weight" for layer in found} == changed
    for layer, (W0, update) in found.items():
        assert isinstance(update, Factored)
        assert np.array_equal(W0, before[f"{layer}.weight"].numpy())
        dW = (merged[f"{layer}.weight"] - before[f"{layer}.weight"]).numpy()
        assert np.linalg.norm(update.dense() - dW) <= 1e-6 * np.linalg.norm(dW), layer
    alone = {layer: u.dense() for layer, W0, u in read_updates(adapter=tmp_path / "adapter")}
    assert alone.keys() == found.keys(), "an adapter can be read without its base"
    assert all(np.array_equal(alone[layer], u.dense()) for layer, (_, u) in found.items())


def test_conv1d_weights_are_read_in_the_orientation_of_the_state_dict(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    base = GPT2LMHeadModel(config).double()
    base.save_pretrained(tmp_path / "base")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    lora = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = with_adapter(base, lora)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    # lm_head is tied, so that only the embedding is in the file.
    found = list(read_updates(base=tmp_path / "base", adapter=tmp_path / "adapter"))
    assert len(found) == 3
    for layer, W0, update in found:
        name = next(k for k in before if k.endswith(f"{layer}.weight"))
        dW = (merged[name] - before[name]).numpy()
        assert update.shape == W0.shape == dW.shape
        assert np.linalg.norm(update.dense() - dW) <= 1e-6 * np.linalg.norm(dW), layer


def test_the_shape_of_the_base_overrules_a_wrong_fan_in_fan_out(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    base = GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with_adapter(base, lora).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", fan_in_fan_out=False)
    ((_, W0, update),) = read_updates(base=tmp_path / "base", adapter=tmp_path / "adapter")
    assert update.shape == W0.shape == (8, 24)


def edit(path, drop=(), **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in drop}))


@pytest.fixture
def adapted(tmp_path):
    """A headed base, and a LoRA adapter of it that also trained the classifier."""
    base = bert(labels=3)
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    with_adapter(base, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def test_modules_to_save_are_dense_updates_where_the_base_has_them(adapted):
    base, adapter = adapted
    found = {layer: update for layer, _, update in read_updates(base=base, adapter=adapter)}
    assert isinstance(found.pop("classifier"), Dense)
    assert all(isinstance(u, Factored) for u in found.values())
    with pytest.warns(UserWarning, match=r"left out: 'classifier.weight'") as caught:
        alone = [layer for layer, _, _ in read_updates(adapter=adapter)]
    assert set(alone) == set(found)
    assert len(caught) == 1


def test_an_adapter_of_a_headed_model_is_matched_with_the_bare_base(adapted, tmp_path):
    bert().save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match=r"left out: 'classifier.weight'"):
        found = list(read_updates(base=tmp_path / "bare", adapter=adapted[1]))
    assert [layer for layer, _, _ in found] == [
        f"encoder.layer.{i}.attention.self.query" for i in range(2)
    ]
    assert all(W0 is not None for _, W0, _ in found)


def test_a_missing_alpha_is_pefts_default_and_unknown_keys_warn_once(adapted):
    base, adapter = adapted
    known = [u.scale for _, _, u in read_updates(base=base, adapter=adapter) if hasattr(u, "r")]
    edit(adapter / "adapter_config.json", drop=["lora_alpha"], use_magic=True, other_new=None)
    with pytest.warns(UserWarning, match=r"no lora_alpha: PEFT's default 8.*'use_magic'") as caught:
        found = [u.scale for _, _, u in read_updates(base=base, adapter=adapter) if hasattr(u, "r")]
    assert found == known == [8 / 2] * 2
    assert len(caught) == 1
    assert "other_new" not in str(caught[0].message), "an unset key changes nothing"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA' is not read yet"),
        ({"use_dora": True}, "use_dora is not read yet"),
        ({"use_qalora": True}, "use_qalora is not read yet"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not read yet"),
        ({"target_parameters": ["experts.w"]}, "target_parameters is not read yet"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weight"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base weight"),
        ({"r": 3}, "gives it r = 3"),
        ({"rank_pattern": {"query": 1}}, "gives it r = 1"),
        ({"r": 0}, "numbers above 0; got 0"),
        ({"lora_alpha": "x"}, "numbers above 0; got 'x'"),
        ({"rank_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_an_adapter_that_is_not_read_yet_is_refused_in_one_line(adapted, changes, said):
    base, adapter = adapted
    edit(adapter / "adapter_config.json", **changes)
    refused(said, base=base, adapter=adapter)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ["word_embeddings"]}, "LoRA of an embedding"),
        ({"target_modules": ["query"], "use_dora": True}, "use_dora is not read yet"),
    ],
)
def test_real_adapters_of_other_kinds_are_refused(tmp_path, lora, said):
    with_adapter(bert(), peft.LoraConfig(r=2, **lora)).save_pretrained(tmp_path)
    refused(said, adapter=tmp_path)


def refused(said, **paths):
    with pytest.raises(WrongInput, match=said) as caught:
        read_updates(**paths)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused_before_anything_is_read(pair):
    base, tuned, _ = pair
    refused("exactly one of tuned", base=base)
    refused("exactly one of tuned", base=base, tuned=tuned, adapter=tuned)
    refused("needs its base", tuned=tuned)
    refused("base must be a local folder; got 'bert-base-uncased'", base="bert-base-uncased",
            tuned=tuned)  # fmt: skip
    refused("adapter_config.json", base=base, adapter=tuned)


def test_shapes_that_differ_and_models_without_a_common_layer_are_refused(pair, tmp_path):
    base, _, _ = pair
    weights = bert().state_dict()
    weights["pooler.dense.weight"] = torch.zeros(16, 17)
    (tmp_path / "odd").mkdir()
    save_file(weights, tmp_path / "odd" / "model.safetensors")
    refused(r"'pooler.dense' has shape \(16, 17\) in the tuned model and \(16, 16\)",
            base=base, tuned=tmp_path / "odd")  # fmt: skip
    (tmp_path / "other").mkdir()
    save_file({"x.weight": torch.zeros(2, 2)}, tmp_path / "other" / "model.safetensors")
    refused("no weight in common", base=base, tuned=tmp_path / "other")


def test_an_adapter_of_another_model_is_refused(adapted, tmp_path):
    (tmp_path / "other").mkdir()
    save_file({"x.weight": torch.zeros(2, 2)}, tmp_path / "other" / "model.safetensors")
    refused("adapter and base have no layer in common", base=tmp_path / "other", adapter=adapted[1])
    torch.manual_seed(0)
    wide = {
        f"bert.encoder.layer.{i}.attention.self.query.weight": torch.zeros(16, 20) for i in (0, 1)
    }
    save_file(wide, tmp_path / "other" / "model.safetensors")
    refused("has shape .* in the adapter", base=tmp_path / "other", adapter=adapted[1])


class Trap:
    """A pickle that would leave a trace if it were ever opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_never_opened(pair, adapted, tmp_path):
    folder, trace = tmp_path / "pickled", tmp_path / "trace"
    folder.mkdir()
    torch.save(Trap(trace), folder / "pytorch_model.bin")
    refused("never pickles", base=pair[0], tuned=folder)
    (adapted[1] / "adapter_model.safetensors").unlink()
    torch.save(Trap(trace), adapted[1] / "adapter_model.bin")
    refused("never pickles", adapter=adapted[1])
    assert not trace.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: b"",
        lambda raw: raw[:4],
        lambda raw: (2**62).to_bytes(8, "little") + raw[8:],
        lambda raw: raw[:20] + b"\xff" + raw[21:],
    ],
)
def test_a_damaged_file_is_refused_in_one_line(pair, damage):
    base, tuned, _ = pair
    file = tuned / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused("not a whole safetensors file", base=base, tuned=tuned)


def test_a_damaged_index_or_config_is_refused_in_one_line(pair, adapted, tmp_path):
    base, tuned, _ = pair
    (tuned / "model.safetensors").rename(tuned / "model-1.safetensors")
    index = tuned / "model.safetensors.index.json"
    for text, said in (
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must map tensor names"),
        ('{"weight_map": {"x": "../base/model.safetensors"}}', "in its own folder"),
        ('{"weight_map": {"x": "lost.safetensors"}}', "lost.safetensors is not a whole"),
        ('{"weight_map": {"x": "model-1.safetensors"}}', "lists 'x', which no shard holds"),
    ):
        index.write_text(text)
        refused(said, base=base, tuned=tuned)
    (adapted[1] / "adapter_config.json").write_bytes(b"\xff\xfe")
    refused("cannot be read as JSON", adapter=adapted[1])


def test_quantised_weights_are_refused_rather_than_left_out(pair, tmp_path):
    weights = {"pooler.dense.weight": torch.zeros(16, 16, dtype=torch.float8_e4m3fn)}
    (tmp_path / "f8").mkdir()
    save_file(weights, tmp_path / "f8" / "model.safetensors")
    refused("F8_E4M3; quantised weights are not read yet", base=pair[0], tuned=tmp_path / "f8")


def test_whole_and_integer_tensors_are_no_weights_and_cause_no_warning(pair):
    base, tuned, dW = pair
    weights = {**disturbed(bert()).state_dict(), "ids.weight": torch.zeros(2, 2, dtype=torch.int64)}
    save_file(weights, tuned / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {layer for layer, _, _ in read_updates(base=base, tuned=tuned)} == set(dW)


def test_reading_and_analysing_import_no_torch():
    code = "import sys, lora_lab.checkpoints, lora_lab.analysis; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
