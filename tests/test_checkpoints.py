"""Updates read from Hugging Face folders; what is checked, and when it is loaded."""

import json
import multiprocessing
import pickle
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lora_lab.checkpoints import Job, read_updates, updates
from lora_lab.linalg import Dense
from lora_lab.registry import WrongInput
from lora_lab.tensorfile import StoredTensor

# transformers warns on its own affairs; what we warn of is tested by pytest.warns.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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


def refused(said, **paths):
    with pytest.raises(WrongInput, match=said) as caught:
        updates(**paths)
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


class Trap:
    """A pickle that would leave a trace if it were ever opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_never_opened(pair, tmp_path):
    folder, trace = tmp_path / "pickled", tmp_path / "trace"
    folder.mkdir()
    torch.save(Trap(trace), folder / "pytorch_model.bin")
    refused("never pickles", base=pair[0], tuned=folder)
    torch.save(Trap(trace), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused("never pickles", adapter=folder)
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


def test_a_damaged_index_is_refused_in_one_line(pair):
    base, tuned, _ = pair
    (tuned / "model.safetensors").rename(tuned / "model-1.safetensors")
    index = tuned / "model.safetensors.index.json"
    for text, said in (
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must map tensor names"),
        ('{"weight_map": {"x": "../base/model.safetensors"}}', "in its own folder"),
        ('{"weight_map": {"x": "lost.safetensors"}}', "lost.safetensors is not a whole"),
        ('{"weight_map": {"x": "model-1.safetensors"}}', "lists 'x', which no shard holds"),
    ):
        index.write_text(text)
        refused(said, base=base, tuned=tuned)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
def test_quantised_weights_are_refused_rather_than_left_out(pair, tmp_path, dtype):
    weights = {"pooler.dense.weight": torch.zeros(16, 16, dtype=getattr(torch, dtype))}
    (tmp_path / "small").mkdir()
    save_file(weights, tmp_path / "small" / "model.safetensors")
    refused("quantised weights are not read, allowed", base=pair[0], tuned=tmp_path / "small")


def test_whole_and_integer_tensors_are_no_weights_and_cause_no_warning(pair):
    base, tuned, dW = pair
    weights = {**disturbed(bert()).state_dict(), "ids.weight": torch.zeros(2, 2, dtype=torch.int64)}
    save_file(weights, tuned / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {layer for layer, _, _ in read_updates(base=base, tuned=tuned)} == set(dW)


def folder_of(path, **tensors):
    path.mkdir()
    save_file({f"{k}.weight": torch.as_tensor(v) for k, v in tensors.items()},
              path / "model.safetensors")  # fmt: skip
    return path


def test_kernels_are_flattened_and_vectors_are_no_layers(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"line": (4, 3, 5), "plane": (4, 3, 2, 2), "space": (4, 1, 2, 2, 2)}
    vectors = {"token": (1, 1, 7), "norm": (7,), "empty": (0, 3)}
    before = {k: rng.standard_normal(s) for k, s in {**shapes, **vectors}.items()}
    after = {k: rng.standard_normal(v.shape) for k, v in before.items()}
    base, tuned = folder_of(tmp_path / "a", **before), folder_of(tmp_path / "b", **after)
    found = {layer: (W0, update) for layer, W0, update in read_updates(base=base, tuned=tuned)}
    assert found.keys() == shapes.keys()
    for layer, (W0, update) in found.items():
        assert np.array_equal(W0, before[layer].reshape(4, -1))
        assert np.array_equal(update.dW, after[layer].reshape(4, -1) - W0)


def test_tied_weights_that_were_saved_twice_are_one_layer(tmp_path):
    rng = np.random.default_rng(0)
    old, new, other = rng.standard_normal((3, 90, 100))
    old[:50] = 0  # padding, as in an embedding
    zeros = np.zeros((90, 100))
    tied = {"lm_head": old, "wte": old.copy(), "a": zeros, "b": zeros.copy()}
    base = folder_of(tmp_path / "base", **tied)
    grown = {"a": zeros + 1, "b": zeros + 1}
    both = folder_of(tmp_path / "both", lm_head=new, wte=new.copy(), **grown)
    once = folder_of(tmp_path / "once", wte=new, **grown)
    untied = folder_of(tmp_path / "untied", lm_head=other, wte=new, **grown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for before, after in ((base, both), (base, once), (once, both)):
            layers = [job.layer for job in updates(base=before, tuned=after)]
            assert layers == ["a", "b", "wte"], "constant tables are alike without being tied"
        layers = [job.layer for job in updates(base=base, tuned=untied)]
    assert layers == ["a", "b", "lm_head", "wte"]
    with pytest.warns(UserWarning, match="'lm_head.weight' only in the tuned"):
        updates(base=once, tuned=untied)


def test_jobs_know_their_size_and_load_nothing_before_they_are_asked(pair, monkeypatch):
    base, tuned, dW = pair
    monkeypatch.setattr(StoredTensor, "load", lambda self: pytest.fail("loaded too early"))
    jobs = updates(base=base, tuned=tuned)
    read_updates(base=base, tuned=tuned)
    assert jobs[0].layer == "embeddings.position_embeddings"
    assert {job.layer: job.shape for job in jobs} == {k: v.shape for k, v in dW.items()}
    assert all(job.nbytes == dW[job.layer].nbytes for job in jobs)


def test_a_job_can_be_loaded_in_another_process(pair):
    base, tuned, dW = pair
    jobs = updates(base=base, tuned=tuned)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for layer, W0, update in pool.map(Job.load, jobs[:3]):
            assert np.array_equal(update.dW, dW[layer])
            assert W0.shape == update.shape
    assert all(len(pickle.dumps(job)) < 2000 for job in jobs)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_loading_a_layer_peaks_at_its_base_weight_and_its_update(tmp_path, dtype):
    torch.manual_seed(0)
    one, two = (torch.randn(1500, 2000, dtype=getattr(torch, dtype)) for _ in range(2))
    base, tuned = folder_of(tmp_path / "a", w=one), folder_of(tmp_path / "b", w=two)
    (job,) = updates(base=base, tuned=tuned)
    tracemalloc.start()
    _, W0, update = job.load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(update.dW, two.double().numpy() - one.double().numpy())
    assert job.nbytes == W0.nbytes
    assert peak <= 2 * job.nbytes + 8e6


def test_a_file_that_changes_after_it_was_checked_ends_in_one_line(pair):
    base, tuned, _ = pair
    jobs = updates(base=base, tuned=tuned)
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(WrongInput, match="changed while it was read"):
        [job.load() for job in jobs]
    file.unlink()
    with pytest.raises(WrongInput, match="changed while it was read"):
        jobs[0].load()


def crafted(path, header, data=b"\0" * 64):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a.weight": entry([4, 4], 0, 64), "b.weight": entry([4, 4], 0, 64)},
        {"a.weight": entry([4, 2], 0, 32), "b.weight": entry([4, 2], 16, 48)},
        {"a.weight": entry([4, 4], 0, 60)},
        {"a.weight": entry([4, 4], 8, 72)},
        {"a.weight": entry([2**40, 2**40], 0, 64)},
        {"a.weight": entry([-4, -4], 0, 64)},
        {"a.weight": entry([4, 4], 0, 64, "PICKLE")},
        {"a.weight": {"shape": [4, 4]}},
        {"a.weight": 3},
        b"[" * 100_000,
        b"not json",
    ],
)
def test_a_crafted_header_is_refused_in_one_line(tmp_path, header):
    base = folder_of(tmp_path / "base", a=torch.zeros(4, 4))
    (tmp_path / "bad").mkdir()
    crafted(tmp_path / "bad" / "model.safetensors", header)
    refused("not a whole safetensors file", base=base, tuned=tmp_path / "bad")


def test_a_huge_json_file_is_refused_unread(pair):
    base, tuned, _ = pair
    (tuned / "model.safetensors").unlink()
    with (tuned / "model.safetensors.index.json").open("wb") as file:
        file.truncate(10**9)
    tracemalloc.start()
    refused("larger than 64 MB", base=base, tuned=tuned)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_reading_and_analysing_import_no_torch():
    code = "import sys, lora_lab.checkpoints, lora_lab.analysis; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
