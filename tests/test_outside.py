"""Weights from outside: the values of a float64 reference, streamed, whatever their size."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertModel

import lora_lab as lab
from lora_lab import outside, tasks
from lora_lab.measures import MEASURES
from lora_lab.outside import layer as one_layer
from lora_lab.registry import WrongInput
from lora_lab.report.outside import build

ROOT = Path(__file__).parents[1]
LAYERS = [f"layer.{i}.{name}" for i in (0, 2, 10) for name in ("key", "query")]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*did not match.*")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder; nothing of the user's own is touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folders(tmp_path):
    """Two model folders of six layers; training left `layer.2.key` as it was."""
    rng = np.random.default_rng(0)
    base = {f"{n}.weight": rng.standard_normal((12, 9)).astype(np.float32) for n in LAYERS}
    tuned = {
        name: W if name == "layer.2.key.weight" else W + np.float32(0.1) * W[::-1]
        for name, W in base.items()
    }
    for name, weights in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    return tmp_path / "base", tmp_path / "tuned"


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(
        BertConfig(**sizes, intermediate_size=48, vocab_size=50, max_position_embeddings=8)
    )


def saved_adapter(folder, seed, **config):
    """An adapter that PEFT made of the same base, and the exact float64 update of every layer."""
    model = bert()
    before = {k: v.double().numpy() for k, v in model.state_dict().items()}
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query", "intermediate.dense"], **config)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p))
    tuned.save_pretrained(folder)
    merged = tuned.double().merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): dW
        for name, W in merged.items()
        if name in before and np.any(dW := W.numpy() - before[name])
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base, and two adapters with their updates: plain and rsLoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    bert().save_pretrained(folder / "base")
    return folder, {
        "plain": saved_adapter(folder / "plain", 1, r=4, lora_alpha=8),
        "stable": saved_adapter(folder / "stable", 2, r=3, lora_alpha=6, use_rslora=True),
    }


# ---- values ------------------------------------------------------------------------------------


def reference(dW, W0):
    """Measures by their formulas, from numpy's SVD in float64."""
    sigma = np.linalg.svd(dW, compute_uv=False)
    p, energy = sigma[sigma > 1e-12 * sigma[0]] / sigma.sum(), sigma @ sigma
    return {
        "effective_rank": math.exp(-np.sum(p * np.log(p))),
        "stable_rank": energy / sigma[0] ** 2,
        "nuclear_dimension": sigma.sum() / sigma[0],
        "participation_ratio": energy**2 / np.sum(sigma**4),
        "norm": math.sqrt(energy),
        "update_ratio": math.sqrt(energy) / np.linalg.norm(W0),
        "truncation_error": math.sqrt(np.sum(sigma[2:] ** 2) / energy),
    }


@pytest.mark.parametrize("name", ["plain", "stable"])
def test_values_on_an_adapter_of_peft_are_those_of_its_merged_weights(adapters, name):
    folder, updates = adapters
    table = lab.analyze(base=folder / "base", adapter=folder / name, names=list(MEASURES_OF_ONE))
    weights = load_file(folder / "base" / "model.safetensors")
    assert list(dict.fromkeys(table["layer"])) == [
        f"encoder.layer.{i}.{module}"
        for i in (0, 1)
        for module in ("attention.self.query", "intermediate.dense")
    ]
    for layer, dW in updates[name].items():
        own = table[(table["layer"] == layer) & table["side"].isin(["", "frobenius"])]
        own = own[own["k"].isna() | ((own["measure"] == "truncation_error") & (own["k"] == 2))]
        expected = reference(dW, weights[f"{layer}.weight"].astype(np.float64))
        found = own.set_index("measure")["value"]
        assert set(found.index) == set(expected)
        for measure, value in expected.items():
            # PEFT merges float32 factors in float64, but with its scale in float64 too.
            assert found[measure] == pytest.approx(value, rel=1e-9), (layer, measure)


MEASURES_OF_ONE = (
    *("effective_rank", "stable_rank", "nuclear_dimension", "participation_ratio"),
    *("norm", "update_ratio", "truncation_error"),
)


def test_analyze_gives_a_tidy_table_in_the_models_order(folders):
    base, tuned = folders
    table = lab.analyze(base=base, tuned=tuned)
    assert list(table.columns) == [
        "layer", "module", "depth", "measure", "k", "side", "value",
        "null", "null_low", "null_high", "flag",
    ]  # fmt: skip
    assert list(dict.fromkeys(table["layer"])) == LAYERS, "block 2 comes before block 10"
    assert not table.duplicated(["layer", "measure", "k", "side"]).any()
    row = table[(table["layer"] == "layer.10.query") & (table["measure"] == "update_ratio")].iloc[0]
    assert (row["module"], row["depth"], row["side"]) == ("query", 10.0, "frobenius")
    assert row["value"] == pytest.approx(0.1, rel=1e-6)
    met = {"values", "vectors", "update", "W0", "base"}
    assert set(table["measure"]) == {n for n in MEASURES if set(MEASURES[n].needs) <= met}


def test_a_layer_that_training_did_not_change_is_flagged(folders):
    base, tuned = folders
    table = lab.analyze(base=base, tuned=tuned)
    still = table["layer"] == "layer.2.key"
    assert set(table.loc[still, "flag"]) == {"zero update"}
    assert "zero update" not in set(table.loc[~still, "flag"])
    zero = table[still].groupby("measure")["value"]
    assert (zero.max()["effective_rank"], zero.max()["norm"]) == (0, 0)
    assert zero.max()[["truncation_error", "update_ratio"]].isna().all()


def test_shards_give_the_table_of_one_file(adapters, tmp_path):
    folder, _ = adapters
    model = bert()
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    names = ["effective_rank", "update_ratio"]
    one, many = (
        lab.analyze(base=base, adapter=folder / "plain", names=names)
        for base in (folder / "base", tmp_path / "shards")
    )
    pd.testing.assert_frame_equal(one, many)


def test_only_the_measures_asked_for_with_the_null_asked_for(folders):
    base, tuned = folders
    table = lab.analyze(base=base, tuned=tuned, names=["stable_rank"])
    assert table["measure"].tolist() == ["stable_rank"] * 6
    bare = lab.analyze(base=base, tuned=tuned, names=["stable_rank"], null=None)
    assert bare["null"].isna().all()
    assert table["null"].notna().sum() == 5, "a zero update has none"
    pd.testing.assert_series_equal(bare["value"], table["value"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": ["stabel_rank"]}, "Did you mean 'stable_rank'"),
        ({"names": ["cosine"]}, "measure 'cosine' needs two updates: give several adapters"),
        ({"null": "gausian"}, "unknown null 'gausian'.*Did you mean 'gaussian'"),
        ({"names": ["replicated_rank"]}, "measure 'replicated_rank' needs seeds"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_layer_is_read(
    folders, given, message, monkeypatch
):
    monkeypatch.setattr(outside, "run", None)
    with pytest.raises(WrongInput, match=message):
        lab.analyze(base=folders[0], tuned=folders[1], **given)


def test_a_measure_against_the_base_asks_for_the_base(adapters):
    with pytest.raises(WrongInput, match="measure 'update_ratio' needs the base model: give base"):
        lab.analyze(adapter=adapters[0] / "plain", names=["update_ratio"])


@pytest.mark.parametrize("bad", ["base", "tuned"])
def test_nan_names_the_layer(folders, bad):
    file = folders[bad == "tuned"] / "model.safetensors"
    weights = load_file(file)
    weights["layer.2.key.weight"][0, 0] = np.inf
    save_file(weights, file)
    with pytest.raises(WrongInput, match=r"layer 'layer\.2\.key': the \w+( weight)? holds NaN or"):
        lab.analyze(base=folders[0], tuned=folders[1])


# ---- several adapters --------------------------------------------------------------------------


def test_several_adapters_have_a_source_and_pairs_without_forming_their_products(adapters):
    folder, updates = adapters
    both = [folder / "plain", folder / "stable"]
    names = ["effective_rank", "cosine"]
    found = outside.study(adapter=both, names=names)
    assert found.measures.columns[0] == "source"
    for name in ("plain", "stable"):
        alone = lab.analyze(adapter=folder / name, names=["effective_rank"])
        own = found.measures[found.measures["source"] == name].drop(columns="source")
        pd.testing.assert_frame_equal(own.reset_index(drop=True), alone)
    pairs = found.pairs.set_index("layer")
    assert set(pairs["one"]) == {"plain"}
    assert set(pairs["other"]) == {"stable"}
    one, other = updates["plain"], updates["stable"]
    for layer, dW in one.items():
        cosine = np.sum(dW * other[layer]) / np.linalg.norm(dW) / np.linalg.norm(other[layer])
        assert pairs.loc[layer, "value"] == pytest.approx(cosine, rel=1e-9)
    whole = [np.concatenate([dW.ravel() for dW in by.values()]) for by in (one, other)]
    cosine = whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1])
    assert pairs.loc["", "value"] == pytest.approx(cosine, rel=1e-9)
    table = lab.analyze(adapter=both, names=names)
    pd.testing.assert_frame_equal(table, found.measures)
    rows = outside.whole(found)
    assert len(rows) == len(found.measures) + len(found.pairs)
    assert rows["one"].notna().sum() == len(found.pairs)


def test_a_source_goes_by_its_path_where_names_are_alike(adapters, tmp_path):
    folder, _ = adapters
    (tmp_path / "plain").symlink_to(folder / "stable")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plain").symlink_to(folder / "plain")
    real = folder / "plain"
    again = tmp_path / "copy" / "plain"
    again.mkdir(parents=True)
    for file in real.iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    found = outside.study(adapter=[real, again], names=["norm"])
    assert set(found.measures["source"]) == {str(real), str(again)}
    with pytest.raises(WrongInput, match="the same folder is given twice"):
        outside.study(adapter=[real, real], names=["norm"])


def test_adapters_of_two_models_are_refused_with_the_layer(adapters, tmp_path):
    rng = np.random.default_rng(0)
    layer = "base_model.model.encoder.layer.0.attention.self.query"
    (tmp_path / "wide").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(config))
    parts = {"lora_A": (2, 7), "lora_B": (7, 2)}
    save_file(
        {f"{layer}.{n}.weight": rng.standard_normal(s, np.float32) for n, s in parts.items()},
        tmp_path / "wide" / "adapter_model.safetensors",
    )
    with pytest.raises(WrongInput, match=r"query' has shape \(7, 7\) in 'wide' and \(32, 32\) in"):
        outside.study(adapter=[adapters[0] / "plain", tmp_path / "wide"])


# ---- any size ----------------------------------------------------------------------------------


def test_what_a_large_layer_is_too_large_for_is_said_and_all_else_is_the_same(folders, monkeypatch):
    base, tuned = folders
    small = lab.analyze(base=base, tuned=tuned)
    monkeypatch.setattr(one_layer, "WORK", 0)
    large = lab.analyze(base=base, tuned=tuned)
    out = large["flag"].str.startswith("left out")
    needs = {name: set(MEASURES[name].needs) for name in large["measure"]}
    assert set(large.loc[out, "measure"]) == {
        name for name, need in needs.items() if "base" in need or {"W0", "update"} <= need
    }
    assert large.loc[out, "value"].isna().all()
    kept = small[~small["measure"].isin(large.loc[out, "measure"])].reset_index(drop=True)
    # The vectors of dW, and with them the null of a subspace, may come another way.
    pd.testing.assert_frame_equal(large[~out].reset_index(drop=True), kept, rtol=1e-9)
    sentences = outside.left_out(large)
    assert len(sentences) == large.loc[out, "measure"].nunique()
    assert all("6 large layers (layer.0.key, ...)" in sentence for sentence in sentences)
    assert outside.left_out(small) == []


@pytest.mark.parametrize(("here", "workers"), [(0.0, 2), (60.0, 3)])
def test_one_thread_and_many_and_processes_give_one_table(
    here, workers, folders, monkeypatch, cache
):
    base, tuned = folders
    monkeypatch.setattr(tasks, "_workers", lambda tasks: 1)
    alone = lab.analyze(base=base, tuned=tuned)
    assert not cache.exists(), "little work leaves nothing on the disk"
    monkeypatch.setattr(tasks, "ALONE", here)
    monkeypatch.setattr(tasks, "_workers", lambda tasks: workers)
    pd.testing.assert_frame_equal(alone, lab.analyze(base=base, tuned=tuned), check_exact=True)
    assert not list(cache.glob("*/*/*"))


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a background job's children lack
from lora_lab import cli, outside, tasks
tasks.ALONE, write = 0, tasks.Kept.write
def slowly(self, number, result):
    write(self, number, result)
    time.sleep(0.2)  # a test that is late still finds it at work
tasks.Kept.write = slowly
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


def begun(tmp_path, cache, *argv):
    """`lora-lab analyze` of 40 layers in a process of its own, when it has finished three."""
    rng = np.random.default_rng(0)
    weights = {f"layer.{i}.q.weight": rng.standard_normal((200, 150)) for i in range(40)}
    for name, scale in (("base", 1.0), ("tuned", 1.01)):
        (tmp_path / name).mkdir()
        save_file({n: scale * W for n, W in weights.items()}, tmp_path / name / "model.safetensors")
    words = ["analyze", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned", *argv]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(cache.glob("lora_lab/analyze/*/[0-9]*.json"))) < 3:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


def test_after_a_kill_finished_layers_are_not_computed_again(tmp_path, cache, monkeypatch):
    child = begun(tmp_path, cache)
    child.kill()
    child.wait()
    kept = len(list(cache.glob("lora_lab/analyze/*/[0-9]*.json")))
    assert 3 <= kept < 40
    done, measured = [], one_layer.measured

    def counting(job, names, null):
        done.append(job.layer)
        return measured(job, names, null)

    monkeypatch.setattr(one_layer, "measured", counting)
    monkeypatch.setattr(tasks, "_workers", lambda tasks: 1)
    table = lab.analyze(base=tmp_path / "base", tuned=tmp_path / "tuned")
    assert len(done) == 40 - kept
    fresh = lab.analyze(base=tmp_path / "base", tuned=tmp_path / "tuned")
    assert len(done) == 80 - kept, "what was kept is gone when all is done"
    pd.testing.assert_frame_equal(table, fresh)


def test_ctrl_c_ends_with_one_line_and_130(tmp_path, cache):
    child = begun(tmp_path, cache)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: its workers hear of it too
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "")
    (line,) = [line for line in err.splitlines() if " parts" not in line]
    assert line.startswith("stopped; what was done stays. Resume with: lora-lab analyze --base ")


def test_other_files_are_another_question(folders):
    base, tuned = folders
    ask = ([base, tuned], ["norm"], "usual")
    key = outside._key(*ask)
    assert key == outside._key(*ask)
    assert key != outside._key([base, tuned], ["stable_rank"], "usual")
    assert key != outside._key([base, tuned], ["norm"], None)
    os.utime(tuned / "model.safetensors", (0, 0))
    assert key != outside._key(*ask)


# ---- the report --------------------------------------------------------------------------------


def test_the_page_shows_each_source_with_its_figures_and_its_table(adapters):
    folder, _ = adapters
    found = outside.study(folder / "base", None, [folder / "plain", folder / "stable"])
    page = build(found, {"base": "<b>folder"})
    assert page.count("data:image/png;base64,") == 2 * 4
    assert "&lt;b&gt;folder" in page
    assert "<b>folder" not in page
    for name in ("plain", "stable", "Side by side"):
        assert f"<h2>{name}</h2>" in page
    value = found.measures.query("source == 'stable' and measure == 'effective_rank'")["value"]
    assert all(f'<td class="n">{v:.4g}</td>' in page for v in value)
    assert "test split" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_source_with_a_hostile_name_is_text_on_the_page(folders, tmp_path):
    base, tuned = folders
    name = "<script>alert(1)<!-- {{ 7 * 7 }} $\\frac{1}{"
    os.rename(tuned, tmp_path / name.replace("/", ""))
    page = build(outside.study(base, tmp_path / name, names=["effective_rank"]), {})
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;!-- {{ 7 * 7 }}" in page
    assert "6 layers, of which training changed 5." in page


# ---- 2 GB --------------------------------------------------------------------------------------

CONSTANT = 400e6
"""Bytes that a worker may take beside 2.5 times the largest tensor: imports and one SVD."""

WATCH = """
import sys, threading, time
from pathlib import Path
import psutil
from lora_lab import cli
peak = {}
def look():
    me = psutil.Process()
    while True:
        for process in [me, *me.children(recursive=True)]:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                continue
            for line in lines:
                if line.startswith("VmHWM"):
                    kb = int(line.split()[1])
                    peak[process.pid] = max(kb, peak.get(process.pid, 0))
        time.sleep(0.2)
threading.Thread(target=look, daemon=True).start()
if __name__ == "__main__":
    code = cli.main(sys.argv[2:])
    Path(sys.argv[1]).write_text(" ".join(map(str, peak.values())))
    sys.exit(code)
"""


@pytest.mark.long
def test_two_gigabytes_of_1024_wide_layers_finish_within_the_memory_bound(tmp_path, cache):
    rng = np.random.default_rng(0)
    shapes = [(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)]
    total = 0
    for kind in ("base", "tuned"):
        (tmp_path / kind).mkdir()
    for block in range(20):
        layers = {
            f"layer.{block}.{i}.weight": rng.standard_normal(s, np.float32)
            for i, s in enumerate(shapes)
        }
        shard = f"model-{block:05d}.safetensors"
        for kind in ("base", "tuned"):
            save_file(layers, tmp_path / kind / shard)
            total += (tmp_path / kind / shard).stat().st_size
            for W in layers.values():  # for the tuned: noise and two directions
                m, n = W.shape
                W += 0.01 * rng.standard_normal((m, n), np.float32)
                W += (
                    0.1
                    * rng.standard_normal((m, 2), np.float32)
                    @ rng.standard_normal((2, n), np.float32)
                )
    names = [f"layer.{b}.{i}.weight" for b in range(20) for i in range(len(shapes))]
    index = {"weight_map": {n: f"model-{int(n.split('.')[1]):05d}.safetensors" for n in names}}
    for kind in ("base", "tuned"):
        (tmp_path / kind / "model.safetensors.index.json").write_text(json.dumps(index))
    assert 1.9e9 < total < 2.2e9
    words = ["analyze", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned"]
    words += ["--out", tmp_path / "rows.parquet"]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, tmp_path / "peaks", *words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    for kind in ("base", "tuned"):
        shutil.rmtree(tmp_path / kind)  # pytest keeps folders for a while, and these are large
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path / "rows.parquet")
    assert table["layer"].nunique() == len(names)
    rank = table[(table["measure"] == "energy_rank") & (table["k"] == 0.9)]["value"]
    assert set(rank) == {2.0}, "the two planted directions hold the energy"
    peaks = [1024 * int(kb) for kb in (tmp_path / "peaks").read_text().split()]
    bound = outside.PER_WORKER * 8 * 4096 * 1024 + CONSTANT
    print(f"peaks {[round(p / 1e6) for p in peaks]} MB, bound {bound / 1e6:.0f} MB")
    assert max(peaks) < bound
