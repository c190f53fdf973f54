"""Adapters that PEFT itself made: dW is what PEFT's own merge adds to the weights."""

import json
import tracemalloc
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from lora_lab.checkpoints import read_updates, updates
from lora_lab.checkpoints.starts import olora, pissa
from lora_lab.linalg import Dense, Factored, decompose
from lora_lab.registry import WrongInput

# PEFT and transformers warn on their own affairs; what we warn of is tested by pytest.warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:.*fan_in_fan_out.*",
    "ignore:.*save_embedding_layers.*",
    "ignore:.*adapter config has the flag.*",
    "ignore:Adapter 'default'.*invalid shape",
    "ignore:Note that `r` is not used",
    "ignore:.*did not match any targeted module.*",
    "ignore:Unexpected keyword arguments.*",
    "ignore:(PiSSA|OLoRA) changes the base weights",
    "ignore:Using Rank-Stabilized LoRA with rank_pattern",
)


class Net(nn.Module):
    """A convolution of each dimension, one with a kernel of 1, and a linear map."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3)
        self.plane = nn.Conv2d(5, 7, (2, 3))
        self.point = nn.Conv2d(8, 6, 1)
        self.space = nn.Conv3d(3, 5, 2)
        self.last = nn.Linear(9, 4)

    def forward(self, x):
        return x


BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "vocab_size": 30, "max_position_embeddings": 8}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8}

MODELS = {
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "headed bert": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "untied gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, tie_word_embeddings=False)),
    "net": Net,
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]()


def stored(model, folder):
    folder.mkdir()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def train(model, seed=2):
    """Move every trained parameter, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.1 * torch.randn_like(p))
            elif "lora_" in name or "modules_to_save" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def adapter_of(name, config, folder, before=None):
    """An adapter of PEFT on disk, and its base as it was before PEFT touched it."""
    base = stored(made(name), folder / "base")
    model = train(peft.get_peft_model(made(name), config))
    if before is not None:
        before(model)
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def merged(name, adapter):
    """The layers that PEFT's merge in float64 changes, and by how much."""
    before = {k: v.double() for k, v in made(name).state_dict().items()}
    model = peft.PeftModel.from_pretrained(made(name), adapter).double()
    after = model.merge_and_unload().state_dict()
    changed = [k for k in before if before[k].ndim > 1 and not torch.equal(before[k], after[k])]
    return {
        key.removesuffix(".weight"): (after[key] - before[key]).flatten(1).numpy()
        for key in changed
    }


def agree(found, expected):
    assert found.keys() == expected.keys()
    for layer, (W0, update) in found.items():
        dW = expected[layer]
        assert update.shape == W0.shape == dW.shape, layer
        assert np.linalg.norm(update.dense() - dW) <= 1e-6 * np.linalg.norm(dW), layer


def read(**paths):
    return {layer: (W0, update) for layer, W0, update in read_updates(**paths)}


QUERY = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "dense"]}
EVERY = ["line", "plane", "point", "space", "last"]
PATTERNS = {
    "target_modules": ["query", "key", "dense"],
    "rank_pattern": {"layer.0.attention.self.query": 2, "query": 5, r"layer\.1\..*dense": 1},
    "alpha_pattern": {"key": 3, r"^encoder.layer.1.attention.self.query": 11, "uery": 99},
}
CASES = {
    "plain": ("bert", QUERY, Factored),
    "alpha below r": ("bert", QUERY | {"lora_alpha": 1}, Factored),
    "rslora": ("bert", QUERY | {"use_rslora": True, "target_modules": "all-linear"}, Factored),
    "patterns": ("bert", PATTERNS | {"r": 4}, Factored),
    "patterns of rslora": ("bert", PATTERNS | {"r": 4, "use_rslora": True}, Factored),
    "gaussian start": ("bert", QUERY | {"init_lora_weights": "gaussian"}, Factored),
    "orthogonal start": ("bert", QUERY | {"init_lora_weights": "orthogonal", "r": 4}, Factored),
    "no start": ("bert", QUERY | {"init_lora_weights": False}, Factored),
    "mica start": ("bert", QUERY | {"init_lora_weights": "mica"}, Factored),
    "biases": ("bert", QUERY | {"bias": "all"}, Factored),
    "lora bias": ("bert", QUERY | {"lora_bias": True}, Factored),
    "some layers": ("bert", QUERY | {"layers_to_transform": [1]}, Factored),
    "Conv1D": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"],
                        "fan_in_fan_out": True}, Factored),
    "embeddings": ("bert", {"r": 3, "target_modules": ["word_embeddings", "query"]}, Factored),
    "convolutions": ("net", {"r": 3, "lora_alpha": 5, "target_modules": EVERY}, Factored),
    "an output, whose frozen weight is saved too": (
        "untied gpt2", {"r": 2, "target_modules": ["lm_head"]}, Factored),
    "a flag that means nothing for convolutions": (
        "net", {"r": 2, "target_modules": ["line", "plane"], "fan_in_fan_out": True}, Factored),
    "rslora of convolutions": ("net", {"r": 2, "target_modules": EVERY, "use_rslora": True,
                                       "rank_pattern": {"plane": 4}}, Factored),
    "DoRA": ("bert", QUERY | {"use_dora": True}, Dense),
    "DoRA of rslora": ("bert", QUERY | {"use_dora": True, "use_rslora": True}, Dense),
    "DoRA of Conv1D": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"],
                                "fan_in_fan_out": True, "use_dora": True}, Dense),
    "DoRA of embeddings": ("bert", {"r": 3, "target_modules": ["word_embeddings"],
                                    "use_dora": True}, Dense),
    "DoRA of convolutions": ("net", {"r": 3, "target_modules": EVERY, "use_dora": True}, Dense),
    "PiSSA": ("bert", QUERY | {"init_lora_weights": "pissa"}, Factored),
    "PiSSA of rslora": ("bert", QUERY | {"init_lora_weights": "pissa", "use_rslora": True,
                                         "rank_pattern": {"query": 5}}, Factored),
    "PiSSA of Conv1D": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"],
                                 "fan_in_fan_out": True, "init_lora_weights": "pissa"}, Factored),
    "PiSSA beside an embedding": ("bert", {"r": 2, "target_modules": ["word_embeddings", "query"],
                                           "init_lora_weights": "pissa"}, Factored),
    "OLoRA": ("bert", QUERY | {"init_lora_weights": "olora"}, Factored),
    "OLoRA of square Conv1D": ("gpt2", {"r": 2, "target_modules": ["attn.c_proj"],
                                        "fan_in_fan_out": True,
                                        "init_lora_weights": "olora"}, Factored),
    "DoRA of PiSSA": ("bert", QUERY | {"use_dora": True, "init_lora_weights": "pissa"}, Dense),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_gives_what_its_merge_adds_to_the_weights(tmp_path, case):
    name, config, kind = CASES[case]
    base, adapter = adapter_of(name, peft.LoraConfig(**config), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(base=base, adapter=adapter)
    agree(found, merged(name, adapter))
    assert all(isinstance(update, kind) for _, update in found.values())
    if "use_dora" not in config and config.get("init_lora_weights") not in ("pissa", "olora"):
        alone = read(adapter=adapter)
        assert alone.keys() == found.keys(), "it can be read without its base"
        for layer, (W0, update) in alone.items():
            assert W0 is None
            assert np.array_equal(update.dense(), found[layer][1].dense())


def test_a_start_that_changed_the_base_at_most_doubles_the_rank(tmp_path):
    config = peft.LoraConfig(**QUERY | {"init_lora_weights": "pissa"})
    base, adapter = adapter_of("bert", config, tmp_path)
    assert {update.r for _, update in read(base=base, adapter=adapter).values()} == {6}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_untrained_adapter_is_no_update_though_its_start_changed_the_base(tmp_path, start):
    base = stored(made("bert"), tmp_path / "base")
    model = peft.get_peft_model(made("bert"), peft.LoraConfig(**QUERY, init_lora_weights=start))
    model.save_pretrained(tmp_path / "adapter")
    for W0, update in read(base=base, adapter=tmp_path / "adapter").values():
        # PEFT makes the start in float32; here it is made again in float64.
        assert update.norm() <= 1e-5 * np.linalg.norm(W0)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_what_peft_converted_to_plain_lora_is_read_without_its_base(tmp_path, start):
    base = stored(made("bert"), tmp_path / "base")
    model = peft.get_peft_model(made("bert"), peft.LoraConfig(**QUERY, init_lora_weights=start))
    # PEFT asks for a copy of the adapter as it began, marked as plain.
    first = model.peft_config["default"]
    first.init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    first.init_lora_weights = start
    train(model)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    plain = read(base=base, adapter=tmp_path / "plain")
    agree(plain, merged("bert", tmp_path / "plain"))
    alone = read(adapter=tmp_path / "plain")
    assert all(np.array_equal(alone[layer][1].B, update.B) for layer, (_, update) in plain.items())
    if start != "pissa_niter_4":
        agree(
            plain, {k: u.dense() for k, (_, u) in read(base=base, adapter=tmp_path / "raw").items()}
        )


def test_the_starts_are_the_best_approximation_and_the_leading_columns():
    rng = np.random.default_rng(0)
    for shape in ((40, 90), (90, 40), (30, 30)):
        W0 = rng.standard_normal(shape)
        U, S, Vh = np.linalg.svd(W0, full_matrices=False)
        B0, A0 = pissa(W0, 4, 2.5)
        assert B0.shape == (shape[0], 4)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        assert np.linalg.norm(2.5 * B0 @ A0 - best) <= 1e-12 * np.linalg.norm(best)
        Q, R = np.linalg.qr(W0)
        B0, A0 = olora(W0, 4, 2.5)
        assert np.allclose(B0 @ A0, Q[:, :4] @ R[:4], rtol=0, atol=1e-12 * S[0])


def adalora(**changes):
    known = {"init_r": 6, "target_r": 2, "lora_alpha": 5, "total_step": 10, "tinit": 1}
    known |= {"tfinal": 2, "target_modules": ["query", "value"]}
    return peft.AdaLoraConfig(**known | changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {}),
        ("bert", {"lora_alpha": 32, "use_rslora": True, "r": 3}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("net", {"target_modules": ["plane", "point", "last"]}),
    ],
)
def test_adalora_gives_what_its_merge_adds_to_the_weights(tmp_path, name, changes):
    base, adapter = adapter_of(name, adalora(**changes), tmp_path)
    found = read(base=base, adapter=adapter)
    agree(found, merged(name, adapter))
    assert {update.r for _, update in found.values()} == {6}


def test_adalora_keeps_its_scale_where_training_pruned_directions(tmp_path):
    def prune(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(9):
            model(input_ids=torch.arange(8)[None]).last_hidden_state.square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()

    base, adapter = adapter_of("bert", adalora(), tmp_path, before=prune)
    found = read(base=base, adapter=adapter)
    left = {layer: part for layer, part in found.items() if part[1].norm()}
    assert 0 < len(left) < len(found), "some modules were pruned away"
    assert all(1 < update.r < 6 for _, update in left.values()), "others in part"
    agree(left, merged("bert", adapter))
    alone = read(adapter=adapter)
    assert all(np.array_equal(alone[layer][1].A, update.A) for layer, (_, update) in found.items())


def test_a_module_that_adalora_pruned_away_is_a_zero_update(tmp_path):
    layer = "encoder.layer.0.attention.self.query"

    def prune(model):
        model.peft_config["default"].rank_pattern = {f"{layer}.lora_E": [False] * 6}

    base, adapter = adapter_of("bert", adalora(), tmp_path, before=prune)
    found = read(base=base, adapter=adapter)
    assert found.pop(layer)[1].norm() == 0
    agree(found, merged("bert", adapter))


def edit(path, drop=(), **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in drop}))


@pytest.mark.parametrize(
    ("config", "drop", "said"),
    [
        (peft.LoraConfig(target_modules=["query"]), "lora_alpha", "no lora_alpha: .* default 8"),
        (peft.LoraConfig(target_modules=["query"]), "r", "no r: PEFT's default 8"),
        (adalora(init_r=12), "init_r", "no init_r: PEFT's default 12"),
        (adalora(lora_alpha=8), "lora_alpha", "no lora_alpha: PEFT's default 8"),
    ],
)
def test_what_the_config_leaves_out_is_pefts_default_and_one_warning(
    tmp_path, config, drop, said
):  # fmt: skip
    base, adapter = adapter_of("bert", config, tmp_path)
    edit(adapter / "adapter_config.json", drop=[drop], new_key=[1], other_key="x", unset=None)
    with pytest.warns(UserWarning, match=said) as caught:
        found = read(base=base, adapter=adapter)
    (only,) = [w for w in caught if "adapter_config.json" in str(w.message)]
    assert "unknown keys 'new_key', 'other_key', taken as harmless" in str(only.message)
    assert only.filename == __file__, "the warning points at the caller"
    edit(adapter / "adapter_config.json", drop=["new_key", "other_key"])
    agree(found, merged("bert", adapter))


@pytest.mark.parametrize(
    "key", ["use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
            "init_lora_weights", "bias", "modules_to_save"],
)  # fmt: skip
def test_an_old_config_without_a_newer_key_reads_as_plain_lora(tmp_path, key):
    base, adapter = adapter_of("bert", peft.LoraConfig(**QUERY), tmp_path)
    edit(adapter / "adapter_config.json", drop=[key])
    agree(read(base=base, adapter=adapter), merged("bert", adapter))


def test_modules_to_save_are_dense_against_the_base_and_left_out_without_it(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["plane"], modules_to_save=["last", "line"])
    base, adapter = adapter_of("net", config, tmp_path)
    found = read(base=base, adapter=adapter)
    agree(found, merged("net", adapter))
    kinds = {layer: type(update) for layer, (_, update) in found.items()}
    assert kinds == {"plane": Factored, "last": Dense, "line": Dense}
    with pytest.warns(UserWarning, match=r"left out: 'last.weight', 'line.weight'") as caught:
        assert set(read(adapter=adapter)) == {"plane"}
    assert len(caught) == 1


@pytest.fixture
def adapted(tmp_path):
    """A headed base, and a LoRA adapter of it that also trained the classifier."""
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    return adapter_of("headed bert", config, tmp_path)


def test_an_adapter_of_a_headed_model_is_matched_with_the_bare_base(adapted, tmp_path):
    bare = stored(made("bert"), tmp_path / "bare")
    with pytest.warns(UserWarning, match=r"left out: 'classifier.weight'"):
        found = read(base=bare, adapter=adapted[1])
    assert list(found) == [f"encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert all(W0 is not None for W0, _ in found.values())


def test_an_adapter_of_another_model_is_refused(adapted, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x.weight": torch.zeros(2, 2)}, other / "model.safetensors")
    refused("adapter and base have no layer in common", base=other, adapter=adapted[1])
    wide = {
        f"bert.encoder.layer.{i}.attention.self.query.weight": torch.zeros(16, 20) for i in (0, 1)
    }
    save_file(wide, other / "model.safetensors")
    refused(r"has shape \(16, 16\) in the adapter", base=other, adapter=adapted[1])


def test_the_shape_of_the_base_overrules_a_wrong_fan_in_fan_out(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    base, adapter = adapter_of("gpt2", config, tmp_path)
    expected = merged("gpt2", adapter)
    edit(adapter / "adapter_config.json", fan_in_fan_out=False)
    agree(read(base=base, adapter=adapter), expected)


def test_a_damaged_config_or_an_adapter_without_weights_is_refused(adapted):
    base, adapter = adapted
    config = adapter / "adapter_config.json"
    for raw, said in (
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "must hold a JSON object"),
    ):
        config.write_bytes(raw)
        refused(said, base=base, adapter=adapter)
    config.write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").unlink()
    refused("holds no adapter_model.safetensors", adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "with DoRA dW depends on the base"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights 'pissa' dW depends on the base"),
        ({"init_lora_weights": "olora"}, "with init_lora_weights 'olora' dW depends on the base"),
    ],
)
def test_an_update_that_depends_on_the_base_says_so_without_one(tmp_path, changes, said):
    _, adapter = adapter_of("bert", peft.LoraConfig(**QUERY | changes), tmp_path)
    refused(said, adapter=adapter)


def test_a_dora_layer_that_the_base_lacks_is_left_out_with_a_warning(tmp_path):
    config = {"r": 2, "target_modules": ["query", "classifier"], "use_dora": True}
    _, adapter = adapter_of("headed bert", peft.LoraConfig(**config), tmp_path)
    bare = stored(made("bert"), tmp_path / "bare")
    with pytest.warns(UserWarning, match="left out: 'classifier'"):
        found = read(base=bare, adapter=adapter)
    assert set(found) == {f"encoder.layer.{i}.attention.self.query" for i in range(2)}


def refused(said, **paths):
    with pytest.raises(WrongInput, match=said) as caught:
        updates(**paths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not read; allowed: 'LORA', 'ADALORA'. Merge"),
        ({"peft_type": None}, "peft_type None is not read"),
        ({"use_qalora": True}, "use_qalora is not read .* Merge it"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not read"),
        ({"target_parameters": ["experts.w"]}, "target_parameters is not read"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config is not read"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes .* path_initial_model"),
        ({"init_lora_weights": "corda"}, "'corda' changes the base .* path_initial_model"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' changes the base .* path_initial_model"),
        ({"init_lora_weights": "loftq"}, r"'loftq' changes the base .* olora\. Merge it"),
        ({"init_lora_weights": "brand_new"}, "'brand_new' changes the base"),
        ({"init_lora_weights": ["x"]}, "changes the base"),
        ({"peft_type": "ADALORA", "init_r": 3}, "has the parts A, B; by .* it has A, B, E"),
        ({"use_dora": True}, "has the parts A, B; by .* it has A, B, magnitude"),
        ({"r": 4}, "gives it r = 4"),
        ({"r": 3.5}, "gives it r = 3.5"),
        ({"rank_pattern": {"query": 1}}, "gives it r = 1"),
        ({"rank_pattern": ["query"]}, "patterns must be JSON objects; got a list"),
        ({"rank_pattern": {"query": [True]}}, "numbers above 0; got"),
        ({"rank_pattern": {"(": 1}}, "no regular expression"),
        ({"r": 0}, "numbers above 0; got 0"),
        ({"r": True}, "numbers above 0; got True"),
        ({"lora_alpha": "x"}, "numbers above 0; got 'x'"),
        ({"lora_alpha": float("nan")}, "numbers above 0; got nan"),
        ({"alpha_pattern": {"query": float("inf")}}, "numbers above 0; got inf"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_in_one_line(tmp_path, changes, said):
    base, adapter = adapter_of("bert", peft.LoraConfig(**QUERY), tmp_path)
    edit(adapter / "adapter_config.json", **changes)
    refused(said, base=base, adapter=adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, n: t.pop(n + "lora_A.weight"), "'.*lora_B.weight' without its lora_A"),
        (lambda t, n: t.pop(n + "lora_B.weight"), "has the parts A; by"),
        (lambda t, n: t.update({n + "lora_A.weight": torch.zeros(16)}), r"lora_A \(16,\)"),
        (lambda t, n: t.update({n + "lora_B.weight": torch.zeros(0, 3)}), "do not fit"),
        (lambda t, n: t.update({n + "lora_A.weight": torch.zeros(3, 16, dtype=torch.int8)}), "I8"),
        (lambda t, n: t.update({n + "lora_B.weight": torch.zeros(17, 3)}), r"shape \(17, 16\)"),
        (lambda t, n: t.update({n + "lora_magnitude_vector": torch.zeros(16)}), "magnitude; by"),
        (lambda t, n: t.clear(), "holds no lora_A"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(tmp_path, change, said):
    base, adapter = adapter_of("bert", peft.LoraConfig(**QUERY), tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, "base_model.model.encoder.layer.0.attention.self.query.")
    save_file(tensors, file)
    refused(said, base=base, adapter=adapter)


@pytest.mark.parametrize(
    ("part", "shape"), [("lora_E", (5, 1)), ("lora_A", (5, 16)), ("lora_B", (16, 5))]
)
def test_parts_of_adalora_that_do_not_fit_are_refused(tmp_path, part, shape):
    base, adapter = adapter_of("bert", adalora(), tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.encoder.layer.0.attention.self.query.{part}"] = torch.zeros(shape)
    save_file(tensors, file)
    refused("do not fit|gives it r = 6", base=base, adapter=adapter)


def test_a_mask_of_adalora_that_is_none_is_refused(tmp_path):
    base, adapter = adapter_of("bert", adalora(), tmp_path)
    edit(adapter / "adapter_config.json", rank_pattern={"x.lora_E": [1, 0]})
    refused("must be a list of true and false", base=base, adapter=adapter)


def test_a_grouped_convolution_which_peft_cannot_merge_is_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    refused("grouped convolutions are not read", adapter=tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_says_in_which_dtype_its_update_was_made(tmp_path, dtype):
    base, adapter = adapter_of("bert", peft.LoraConfig(**QUERY, use_dora=True), tmp_path)
    file = base / "model.safetensors"
    cast = {k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items()}
    save_file(cast, file)
    assert {u.made_in for _, u in read(base=base, adapter=adapter).values()} == {dtype}


def test_a_row_of_zeros_has_no_direction_and_is_refused_by_analysis(tmp_path):
    base, adapter = adapter_of("bert", peft.LoraConfig(**QUERY, use_dora=True), tmp_path)
    weights, factors = load_file(base / "model.safetensors"), adapter / "adapter_model.safetensors"
    layer = "encoder.layer.0.attention.self.query"
    weights[f"{layer}.weight"][3] = 0
    save_file(weights, base / "model.safetensors")
    tensors = load_file(factors)
    tensors[f"base_model.model.{layer}.lora_B.weight"][3] = 0
    save_file(tensors, factors)
    update = read(base=base, adapter=adapter)[layer][1]
    assert np.isnan(update.dW[3]).all()
    assert not np.isnan(np.delete(update.dW, 3, 0)).any()
    with pytest.raises(WrongInput, match=layer):
        decompose(update, layer=layer)


def test_dora_of_huge_and_tiny_weights_neither_over_nor_underflows(tmp_path):
    base, adapter = adapter_of("bert", peft.LoraConfig(**QUERY, use_dora=True), tmp_path)
    layer = "encoder.layer.0.attention.self.query"
    small = read(base=base, adapter=adapter)[layer][1].dense()
    for size in (2.0**600, 2.0**-600):
        changed = {k: v.double() for k, v in load_file(base / "model.safetensors").items()}
        changed[f"{layer}.weight"] *= size
        folder = tmp_path / f"{size:.0e}"
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        tensors = load_file(adapter / "adapter_model.safetensors")
        for part in ("lora_B.weight", "lora_magnitude_vector"):
            key = f"base_model.model.{layer}.{part}"
            tensors[key] = tensors[key].double() * size
        scaled = tmp_path / f"adapter {size:.0e}"
        scaled.mkdir()
        save_file(tensors, scaled / "adapter_model.safetensors")
        (scaled / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
        big = read(base=folder, adapter=scaled)[layer][1].dense()
        assert np.allclose(big / size, small, rtol=1e-12, atol=0)


@pytest.mark.parametrize("start", [True, "pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_loading_a_layer_of_an_adapter_peaks_at_its_base_weight_and_its_update(
    tmp_path, start, dora
):
    rng = np.random.default_rng(0)
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    # A spectrum that decays, as of a trained weight.
    W0 = (
        rng.standard_normal((1600, 200))
        * np.arange(1, 201) ** -0.5
        @ rng.standard_normal((200, 1500))
    )
    save_file({"w.weight": torch.tensor(W0).float()}, tmp_path / "base" / "model.safetensors")
    parts = {"w.lora_A.weight": torch.rand(4, 1500), "w.lora_B.weight": torch.rand(1600, 4)}
    if dora:
        parts["w.lora_magnitude_vector"] = torch.rand(1600)
    save_file(parts, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": dora}
    config |= {"init_lora_weights": start}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (job,) = updates(base=tmp_path / "base", adapter=tmp_path / "adapter")
    tracemalloc.start()
    job.load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert job.nbytes == 8 * 1600 * 1500
    assert peak <= (2 if dora else 1) * job.nbytes + 8e6
