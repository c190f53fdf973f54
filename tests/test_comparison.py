"""Several sources side by side."""

import math

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from lora_lab import comparison
from lora_lab.analysis import rows
from lora_lab.checkpoints import read_updates
from lora_lab.comparison import COLUMNS, compare, layer_rows, pairwise, table, whole_rows
from lora_lab.linalg import Dense, Factored, decompose
from lora_lab.measures import MEASURES
from lora_lab.registry import WrongInput

LAYERS = {"layer.0.query": (12, 9), "layer.1.query": (12, 9), "layer.1.up": (20, 12)}


def source(seed, layers=LAYERS, r=3):
    rng = np.random.default_rng(seed)
    return {
        name: Factored(rng.standard_normal((m, r)), rng.standard_normal((r, n)), 0.5)
        for name, (m, n) in layers.items()
    }


def dense(updates):
    return {layer: Dense(update.dense()) for layer, update in updates.items()}


@pytest.fixture
def three():
    return {"a": source(0), "b": dense(source(1)), "c": source(2, r=5)}


def test_every_pair_of_sources_has_every_measure_of_two_updates_in_every_layer(three):
    found = compare(three)
    assert list(found.columns) == list(COLUMNS)
    keys = ["one", "other", "layer", "measure", "k", "side"]
    assert not found.duplicated(keys).any()
    layers = found[found["layer"] != ""]
    groups = layers.groupby(["one", "other", "layer"])["measure"]
    assert len(groups) == 3 * len(LAYERS)
    assert [pair for pair, _ in found.groupby(["one", "other"])] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    assert all(set(own) == set(pairwise()) for _, own in groups)
    assert {"subspace_overlap", "principal_angle", "cosine", "sign_conflict"} <= set(pairwise())
    assert (found.loc[found["layer"] == "layer.1.up", "module"] == "up").all()
    assert (found.loc[found["layer"] == "layer.1.up", "depth"] == 1).all()
    known = found[found["flag"] == ""]
    assert known["value"].notna().all()
    assert (known["null_low"] <= known["null_high"]).all()


def test_a_row_is_that_of_the_measure_itself(three):
    found = compare(three).set_index(["one", "other", "layer"])
    one, other = three["a"]["layer.1.up"], three["c"]["layer.1.up"]
    s, pair = (decompose(u, vectors=True) for u in (one, other))
    expected = rows("x", s, pairwise(), update=one, pair=pair, pair_update=other)
    got = found.loc[("a", "c", "layer.1.up")].to_dict("records")
    assert len(got) == len(expected)
    for row, wanted in zip(got, expected, strict=True):
        for name, value in wanted.items():
            if name == "layer":
                continue
            if isinstance(value, str):
                assert row[name] == value
            else:
                assert row[name] == pytest.approx(value, rel=1e-9, nan_ok=True), (row, name)


def test_each_update_is_decomposed_once_and_factors_are_not_multiplied_out(three, monkeypatch):
    done = []
    monkeypatch.setattr(
        comparison, "decompose", lambda u, **how: done.append(id(u)) or decompose(u, **how)
    )
    monkeypatch.setattr(Factored, "dense", lambda self: pytest.fail("B A was formed"))
    compare(three)
    assert len(done) == len(set(done)) == 3 * len(LAYERS)


def test_the_whole_models_cosine_is_that_of_all_their_entries(three):
    three["b"] |= {"layer.2.up": Dense(np.full((4, 4), 3.0))}  # a layer of one source alone
    found = compare(three, ["cosine"])
    whole = found[found["layer"] == ""].set_index(["one", "other"])["value"]
    for (one, other), value in whole.items():
        flat = {
            name: np.concatenate(
                [three[name].get(n, Dense(np.zeros((4, 4)))).dense().ravel()
                 for n in [*LAYERS, "layer.2.up"]]
            )
            for name in (one, other)
        }  # fmt: skip
        a, b = flat[one], flat[other]
        assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-10)


def test_the_null_of_the_whole_cosine_is_that_of_turned_layers():
    rng = np.random.default_rng(0)
    layers = {"a": (8, 6), "b": (6, 8), "c": (30, 20), "d": (10, 20)}

    def draw():
        return {
            n: Dense(rng.standard_normal(s) / math.sqrt(math.prod(s))) for n, s in layers.items()
        }

    one, found = draw(), []
    for _ in range(250):
        row = compare({"x": one, "y": draw()}, ["cosine"]).iloc[-1]
        found.append((row["value"], row["null_low"], row["null_high"]))
    assert row["layer"] == ""
    value, low, high = np.array(found).T
    assert np.mean((low <= value) & (value <= high)) == pytest.approx(0.95, abs=0.03)


def test_layer_by_layer_gives_the_table_of_all_at_once(three):
    found = [
        row
        for layer in LAYERS
        for row in layer_rows(layer, {n: by[layer] for n, by in three.items()})
    ]
    norms = {n: {layer: u.norm() for layer, u in by.items()} for n, by in three.items()}
    found += whole_rows(found, norms, {layer: m * n for layer, (m, n) in LAYERS.items()})
    pd.testing.assert_frame_equal(table(found), compare(three))


def test_a_layer_that_only_some_sources_have_is_compared_among_these():
    few = {"layer.0.query": LAYERS["layer.0.query"]}
    found = compare({"a": source(0), "b": source(1), "c": source(2, few)}, ["cosine"])
    pairs = found[found["layer"] == "layer.1.up"][["one", "other"]].to_numpy().tolist()
    assert pairs == [["a", "b"]]
    assert (found["layer"] == "").sum() == 3


def test_zero_updates_are_flagged_and_have_no_value(three):
    zero = {layer: Dense(np.zeros(shape)) for layer, shape in LAYERS.items()}
    found = compare({"a": three["a"], "zero": zero})
    assert (found["flag"] == "zero update").all()
    assert found[["value", "null", "null_low", "null_high"]].isna().all(axis=None)
    half = three["a"] | {"layer.1.up": zero["layer.1.up"]}
    found = compare({"a": three["a"], "half": half}, ["cosine"]).set_index("layer")["value"]
    norms = [three["a"][layer].norm() for layer in LAYERS]
    assert math.isnan(found["layer.1.up"])
    assert found[""] == pytest.approx(math.hypot(*norms[:2]) / math.hypot(*norms), rel=1e-12)


def test_sources_of_any_size_have_a_whole_cosine():
    one = {"a": Dense([[3e-200, 0.0]]), "b": Dense([[0.0, 4e-200]])}
    other = {"a": Dense([[1e200, 0.0]]), "b": Dense([[0.0, 0.0]])}
    found = compare({"x": one, "y": other}, ["cosine"]).set_index("layer")["value"]
    assert found[""] == pytest.approx(0.6, rel=1e-12)


def test_updates_come_as_they_are_read_from_disk(tmp_path):
    base = {n: np.zeros(shape, np.float32) for n, shape in LAYERS.items()}
    folders = {"base": base}
    for name, seed in (("a", 0), ("b", 1)):
        folders[name] = {n: u.dense().astype(np.float32) for n, u in source(seed).items()}
    for name, weights in folders.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model.safetensors"
        save_file({f"{n}.weight": W for n, W in weights.items()}, path)
    stored = {n: read_updates(base=tmp_path / "base", tuned=tmp_path / n) for n in ("a", "b")}
    found = compare(stored, ["cosine"])
    expected = compare({"a": source(0), "b": source(1)}, ["cosine"])
    assert found["value"].to_numpy() == pytest.approx(expected["value"].to_numpy(), abs=1e-6)


@pytest.mark.parametrize(
    ("updates", "names", "said"),
    [
        ({}, None, "at least two sources .* got 0"),
        ({"a": source(0)}, None, "at least two sources .* got 1"),
        ({"a": source(0), "b": {}}, None, "no layer .* 'b' has none"),
        ({"a": source(0), "b": {"other": Dense(np.eye(2))}}, None, "no layer .* 'b' has other"),
        (
            {"a": source(0), "b": source(1), "c": source(2, {"layer.1.up": (20, 11)})},
            None,
            r"'layer.1.up' has shape \(20, 12\) in 'a' and \(20, 11\) in 'c'",
        ),
        ({"a": source(0), "b": source(1)}, ["cosin"], "Did you mean 'cosine'"),
        ({"a": source(0), "b": source(1)}, ["stable_rank"], "measure of two updates 'stable_rank'"),
        (
            {"a": source(0), "b": {"layer.0.query": Dense(np.full((12, 9), np.nan))}},
            None,
            "'layer.0.query': the update holds NaN",
        ),
    ],
)
def test_a_wrong_question_is_answered_by_one_line(updates, names, said):
    with pytest.raises(WrongInput, match=said) as caught:
        compare(updates, names)
    assert "\n" not in str(caught.value)


def test_pairwise_measures_are_those_that_need_a_second_update():
    for name in MEASURES:
        needs = set(MEASURES[name].needs)
        assert (name in pairwise()) == bool(needs & {"pair", "pair_update"})
