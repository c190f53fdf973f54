"""Rows of measures, from one layer and from folders."""

import math

import numpy as np
import pytest
from material import all_values, material

import lora_lab.analysis as analysis
from lora_lab.analysis import rows
from lora_lab.layers import depth_of, module_of
from lora_lab.linalg import Dense, Factored, Spectrum, decompose
from lora_lab.measures import MEASURES
from lora_lab.registry import WrongInput

KEYS = ("layer", "measure", "k", "side", "value", "null", "null_low", "null_high", "flag")


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


def test_nan_names_the_layer():
    W = np.ones((1, 2))
    broken = np.array([[1.0, math.nan]])
    for update in (Dense(broken), Factored([[1.0]], broken)):
        with pytest.raises(WrongInput, match=r"layer 'layer\.3\.key': the update holds NaN"):
            rows("layer.3.key", update)
    with pytest.raises(WrongInput, match=r"layer 'layer\.3\.key': the base weight holds NaN"):
        rows("layer.3.key", Dense(W), W0=broken)


def test_layer_names_tell_module_and_depth():
    assert module_of("bert.encoder.layer.11.output.dense") == "dense"
    assert depth_of("bert.encoder.layer.11.output.dense") == 11
    assert depth_of("h.3.experts.7.up") == 3, "the block, not the expert"
    assert math.isnan(depth_of("embeddings.word_embeddings"))
    assert math.isnan(depth_of("layer1.conv2"))
    assert module_of("classifier") == "classifier"
