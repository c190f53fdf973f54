"""Rows of measures, from one layer and from folders."""

import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_lab.analysis as analysis
from lora_lab.analysis import analyze, rows
from lora_lab.layers import depth_of, module_of
from lora_lab.linalg import Dense, Factored, Spectrum, decompose
from lora_lab.measures import MEASURES
from lora_lab.registry import WrongInput
from tests.material import all_values, material

LAYERS = [f"layer.{i}.{name}" for i in (0, 2, 10) for name in ("key", "query")]


KEYS = ("layer", "measure", "k", "side", "value", "null", "null_low", "null_high", "flag")


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


def test_every_measure_has_its_rows_with_all_k_and_sides():
    rng = np.random.default_rng(1)
    update = Factored(rng.standard_normal((12, 3)), rng.standard_normal((3, 9)))
    of = material(update)
    needs = {need for name in MEASURES for need in MEASURES[name].given} - {"update"}
    given = {need: getattr(of, need, None) for need in needs - {"base", "pair", "seeds"}}
    given["pair"] = decompose(of.pair_update, vectors=True)
    given["seeds"] = [decompose(u, vectors=True) for u in of.others]
    found = rows("layer.0.key", update, **given)
    assert {row["measure"] for row in found} == set(MEASURES)
    assert all(set(row) == set(KEYS) for row in found)
    keys = [(row["measure"], row["k"], row["side"]) for row in found]
    assert len({str(key) for key in keys}) == len(keys)
    errors = [row for row in found if row["measure"] == "truncation_error"]
    assert {row["k"] for row in errors} == {0, 1, 2, 4, 8, 9}
    assert {row["side"] for row in errors} == {"frobenius", "spectral", "nuclear"}
    assert {row["k"] for row in found if row["measure"] == "energy_rank"} >= {0.9, 0.95, 0.99}
    values = all_values(of, ("rank", "ratio", "size"))
    for row in found:
        key = row["measure"], None if math.isnan(row["k"]) else row["k"], row["side"] or None
        if row["flag"]:
            assert math.isnan(row["value"])
            assert key not in values
        else:
            assert row["value"] == pytest.approx(values[key], rel=1e-9, abs=1e-12, nan_ok=True), row


def test_a_measure_whose_needs_are_not_met_has_no_row():
    found = {row["measure"] for row in rows("x", Dense(np.eye(4)))}
    alone = {n for n in MEASURES if set(MEASURES[n].needs) <= {"values", "vectors", "update"}}
    assert found == alone
    assert not found & {"update_ratio", "utilization", "stable_utilization", "normalized_entropy_r"}
    alone = {name for name in MEASURES if set(MEASURES[name].needs) == {"values"}}
    assert {row["measure"] for row in rows("x", Spectrum.of_values([1.0]))} == alone


def test_a_count_stands_beside_its_null_and_a_size_has_none():
    rng = np.random.default_rng(1)
    for update in (
        Factored(rng.standard_normal((50, 6)), rng.standard_normal((6, 40))),
        Dense(rng.standard_normal((50, 40))),
    ):
        found = rows("x", update)
        for row in found:
            ends = (row["null_low"], row["null"], row["null_high"])
            m = MEASURES[row["measure"]]
            if m.null == "random" and not row["flag"]:
                assert ends == tuple(sorted(ends)), row
                # The update is a draw of its own null.
                width = ends[2] - ends[0]
                assert ends[0] - 2 * width - 1e-9 <= row["value"] <= ends[2] + 2 * width + 1e-9, row
            elif m.kind == "size":
                assert all(math.isnan(end) for end in ends)
        none = rows("x", update, null=None)
        assert all(math.isnan(row["null"]) for row in none)
        assert [row["value"] for row in none] == pytest.approx(
            [row["value"] for row in found], nan_ok=True
        )


def test_an_update_is_decomposed_once_and_a_spectrum_never(monkeypatch):
    calls = []

    def counting(update, vectors=False, layer=""):
        calls.append((vectors, layer))
        return decompose(update, vectors, layer)

    monkeypatch.setattr(analysis, "decompose", counting)
    rows("layer.0.key", Dense(np.eye(4)))
    assert calls == [(False, "layer.0.key")], "and without vectors while no measure needs them"
    rows("layer.0.key", Spectrum.of_values([1.0]))
    assert len(calls) == 1


def test_chosen_measures_only_and_an_unknown_one_is_refused():
    found = rows("x", Dense(np.eye(4)), names=["stable_rank", "norm"])
    assert {row["measure"] for row in found} == {"stable_rank", "norm"}
    with pytest.raises(WrongInput, match="Did you mean 'stable_rank'"):
        rows("x", Dense(np.eye(4)), names=["stablerank"])


@pytest.mark.parametrize("bad", ["base", "tuned"])
def test_nan_names_the_layer(folders, bad):
    W = np.ones((1, 2))
    broken = np.array([[1.0, math.nan]])
    for update in (Dense(broken), Factored([[1.0]], broken)):
        with pytest.raises(WrongInput, match=r"layer 'layer\.3\.key': the update holds NaN"):
            rows("layer.3.key", update)
    with pytest.raises(WrongInput, match=r"layer 'layer\.3\.key': the base weight holds NaN"):
        rows("layer.3.key", Dense(W), W0=broken)
    file = folders[bad == "tuned"] / "model.safetensors"
    weights = load_file(file)
    weights["layer.2.key.weight"][0, 0] = np.inf
    save_file(weights, file)
    with pytest.raises(WrongInput, match=r"layer 'layer\.2\.key': the \w+( weight)? holds NaN or"):
        analyze(base=folders[0], tuned=folders[1])


def test_analyze_gives_a_tidy_table_in_the_models_order(folders):
    base, tuned = folders
    table = analyze(base=base, tuned=tuned)
    assert list(table.columns) == [
        "layer", "module", "depth", "measure", "k", "side", "value",
        "null", "null_low", "null_high", "flag",
    ]  # fmt: skip
    assert list(dict.fromkeys(table["layer"])) == LAYERS, "block 2 comes before block 10"
    assert not table.duplicated(["layer", "measure", "k", "side"]).any()
    row = table[(table["layer"] == "layer.10.query") & (table["measure"] == "update_ratio")].iloc[0]
    assert (row["module"], row["depth"], row["side"]) == ("query", 10.0, "frobenius")
    assert row["value"] == pytest.approx(0.1, rel=1e-6)


def test_a_layer_that_training_did_not_change_is_flagged(folders):
    base, tuned = folders
    table = analyze(base=base, tuned=tuned)
    still = table["layer"] == "layer.2.key"
    assert set(table.loc[still, "flag"]) == {"zero update"}
    assert set(table.loc[~still, "flag"]) == {""}
    zero = table[still].groupby("measure")["value"]
    assert (zero.max()["effective_rank"], zero.max()["norm"]) == (0, 0)
    assert zero.max()[["truncation_error", "update_ratio"]].isna().all()


def test_analyze_reads_only_the_measures_asked_for(folders):
    base, tuned = folders
    table = analyze(base=base, tuned=tuned, names=["stable_rank"])
    assert table["measure"].tolist() == ["stable_rank"] * 6


def test_layer_names_tell_module_and_depth():
    assert module_of("bert.encoder.layer.11.output.dense") == "dense"
    assert depth_of("bert.encoder.layer.11.output.dense") == 11
    assert depth_of("h.3.experts.7.up") == 3, "the block, not the expert"
    assert math.isnan(depth_of("embeddings.word_embeddings"))
    assert math.isnan(depth_of("layer1.conv2"))
    assert module_of("classifier") == "classifier"
