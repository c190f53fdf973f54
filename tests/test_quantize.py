"""Quantised weights: laws over the storages, published levels, and runs on such a base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from lora_lab import hydra_bridge
from lora_lab.config import Quantization, run_id
from lora_lab.engine import run_here
from lora_lab.linalg import Dense, Factored, decompose
from lora_lab.linalg.quantize import BLOCK, LEVELS, bits_per_weight, normal_levels, quantize
from lora_lab.measures import Refused, measure
from lora_lab.measuring import base_key, finals_of, measure_missing
from lora_lab.preparation import Trained, prepare
from lora_lab.registry import WrongInput
from lora_lab.store import Store
from lora_lab.targets import select

KINDS = list(LEVELS)
SHAPES = [(7, 5), (3, 64), (5, 130), (1, 1), (64, 1)]


def weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.lognormal(0, 1, (shape[0], 1))).astype(np.float32)


def scales(W: np.ndarray, kind: str) -> np.ndarray:
    """The largest size among the numbers that share a scale with each entry, by plain loops."""
    flat, out = np.abs(W).ravel(), np.empty(W.size, dtype=np.float32)
    size = W.shape[1] if kind == "int8" else BLOCK
    for start in range(0, W.size, size):
        out[start : start + size] = flat[start : start + size].max()
    return out.reshape(W.shape)


# --- laws over all of them --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantising_twice_is_quantising_once(kind: str, shape: tuple[int, int]) -> None:
    once = quantize(weights(shape), kind)
    assert once.dtype == np.float32
    assert once.shape == shape
    np.testing.assert_array_equal(quantize(once, kind), once)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_goes_to_the_nearest_level(kind: str, shape: tuple[int, int]) -> None:
    W = weights(shape, 1).astype(np.float64)
    scale = scales(W.astype(np.float32), kind)[..., None].astype(np.float64)
    best = np.abs(scale * LEVELS[kind] - W[..., None]).min(axis=-1)
    found = np.abs(quantize(W, kind) - W)
    np.testing.assert_allclose(found, best, atol=1e-6 * scale.max())


@pytest.mark.parametrize(("kind", "bound"), [("int8", 1 / 254), ("int4", 1 / 14), ("nf4", 0.152)])
def test_the_error_is_at_most_half_the_widest_gap_and_the_bound_is_reached(
    kind: str, bound: float
) -> None:
    W = weights((200, 64), 2)
    relative = np.abs(quantize(W, kind) - W) / scales(W, kind)
    assert 0.9 * bound < relative.max() <= bound + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_of_each_scale_and_zero_are_kept_exactly(kind: str) -> None:
    W = weights((9, 64), 3)
    W[:, 5] = 0
    W[4] = 0
    found, largest = quantize(W, kind), np.abs(W) == scales(W, kind)
    np.testing.assert_array_equal(found[largest], W[largest])
    assert not found[:, 5].any()
    assert not found[4].any()


@pytest.mark.parametrize("kind", KINDS)
def test_powers_of_two_pass_through_and_signs_except_in_nf4(kind: str) -> None:
    W = weights((6, 100), 4)
    for power in (2.0**-20, 2.0**20):
        np.testing.assert_array_equal(quantize(power * W, kind), power * quantize(W, kind))
    same = np.array_equal(quantize(-W, kind), -quantize(W, kind))
    assert same == (kind != "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_levels_rise_hold_zero_and_end_at_one_and_minus_one(kind: str) -> None:
    levels = LEVELS[kind]
    assert len(levels) <= (256 if kind == "int8" else 16)
    assert (np.diff(levels) > 0).all()
    assert {-1.0, 0.0, 1.0} <= set(levels.tolist())


def test_bits_of_a_weight_count_the_scales() -> None:
    for kind in KINDS:
        for shape in SHAPES:
            size = shape[0] * shape[1]
            groups = shape[0] if kind == "int8" else -(-size // BLOCK)
            each = {"int8": 8, "int4": 4, "nf4": 4}[kind]
            assert bits_per_weight(kind, shape) * size == pytest.approx(each * size + 32 * groups)


def test_better_storage_has_a_smaller_error_on_normal_weights() -> None:
    W = np.random.default_rng(5).standard_normal((256, 256))
    errors = [np.linalg.norm(quantize(W, kind) - W) for kind in ("int8", "nf4", "int4")]
    assert errors == sorted(errors)


# --- published numbers ------------------------------------------------------------------------


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    # Dettmers et al. 2023, appendix E; they come from quantiles with δ rounded to 7 digits.
    published = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    np.testing.assert_allclose(normal_levels(), published, atol=5e-7)


def test_wrong_input_is_one_line() -> None:
    with pytest.raises(WrongInput, match=r"unknown quantization 'nf5'.*Did you mean 'nf4'"):
        quantize(np.ones((2, 2)), "nf5")
    with pytest.raises(WrongInput, match="unknown quantization"):
        bits_per_weight("fp4", (2, 2))
    for bad in (np.full((2, 2), np.nan), np.full((2, 2), 1e300), np.ones(3)):
        with pytest.raises(WrongInput, match="must be a finite float32 matrix"):
            quantize(bad, "int4")


# --- merging back -----------------------------------------------------------------------------


def error(W0: np.ndarray, update: Dense | Factored, side: str) -> float:
    return measure("requantization_error", decompose(update), side=side, W0=W0, update=update)


@pytest.mark.parametrize("side", KINDS)
def test_an_update_below_half_a_step_is_lost_whole_when_it_is_merged(side: str) -> None:
    W0 = quantize(weights((8, 64)), side).astype(np.float64)
    dW = np.random.default_rng(6).uniform(-1, 1, W0.shape)
    narrowest = np.diff(LEVELS[side].astype(np.float64)).min() * scales(W0, side)
    dW *= 0.49 * narrowest * (np.abs(W0) < scales(W0, side))
    assert error(W0, Dense(dW), side) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("side", KINDS)
def test_an_update_from_level_to_level_is_merged_without_error(side: str) -> None:
    W0, after = (quantize(weights((8, 64), seed), side).astype(np.float64) for seed in (0, 1))
    assert error(W0, Dense(after - W0), side) < 1e-6


@pytest.mark.parametrize("side", KINDS)
def test_the_requantization_error_is_that_of_the_merged_weight(side: str) -> None:
    rng = np.random.default_rng(7)
    W0 = weights((8, 70))
    update = Factored(rng.standard_normal((8, 2)), rng.standard_normal((2, 70)), 0.3)
    merged = W0 + update.dense()
    expected = np.linalg.norm(quantize(merged, side) - merged) / np.linalg.norm(update.dense())
    assert error(W0, update, side) == pytest.approx(expected, rel=1e-9)


def test_a_merged_weight_beyond_float32_is_refused() -> None:
    with pytest.raises(Refused, match="too large for float32"):
        error(np.ones((2, 2)), Dense(np.full((2, 2), 1e39)), "int8")


# --- runs -------------------------------------------------------------------------------------

SMALL = (
    "model=planted data=planted data.width=64 data.train_examples=64 data.validation_examples=32 "
    "data.test_examples=32 train.epochs=1 host.device=cpu"
)


def test_a_quantised_base_is_another_run_and_none_is_the_run_of_before() -> None:
    ids = {}
    for kind in Quantization:
        (one,), _ = hydra_bridge.plan([[*SMALL.split(), f"model.quantize={kind.name}"]])
        ids[kind.name] = run_id(one.config)
    (plain,), _ = hydra_bridge.plan([SMALL.split()])
    assert len(set(ids.values())) == len(Quantization)
    assert ids["none"] == plain.run_id
    assert {kind.name for kind in Quantization} == {"none", *LEVELS}
    keys = {base_key("hash", "", ["q"], kind) for kind in ids}
    assert len(keys) == len(ids)
    assert base_key("hash", "", ["q"], "none") == base_key("hash", "", ["q"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", ["bert", "gpt2"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(
    kind: str, net: str, precision: str, tmp_path: Path
) -> None:
    words = [
        *("model=hf", f"model.name={tiny.folder(tmp_path / 'net', net)}", "data=table"),
        *(f"data.path={tiny.reviews(tmp_path / 'x.csv', 40)}", "data.text=review"),
        *("data.label=stars", "adapter.r=2", "adapter.targets=mlp", f"model.quantize={kind}"),
        *(f"train.precision={precision}", "host.device=cpu"),
    ]
    (one,), host = hydra_bridge.plan([words])
    setup = prepare(one.config, host, tmp_path)
    (plain,), _ = hydra_bridge.plan([[w for w in words if "quantize" not in w]])
    before = dict(prepare(plain.config, host, tmp_path).model.base.named_parameters())
    inside = select("all", one.config.model.shapes(one.config.data))
    assert set(setup.adapted) < set(inside)
    untouched = 0
    for name, parameter in setup.model.base.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in inside and name.endswith(".weight"):
            W = before[name].detach().numpy()
            W = W.T if net == "gpt2" else W
            got = parameter.detach().numpy()
            got = got.T if net == "gpt2" else got
            np.testing.assert_array_equal(got, quantize(W, kind))
            assert not np.array_equal(got, W)
        elif name in before:
            assert torch.equal(parameter, before[name]), name
            untouched += 1
    assert untouched > 5
    (whole,), _ = hydra_bridge.plan([[w for w in words if "quant" not in w and "r=2" not in w]],
                                    ["adapter=full"])  # fmt: skip
    originals = prepare(whole.config, host, tmp_path).base
    for layer, W0 in setup.base.items():
        np.testing.assert_array_equal(W0, quantize(originals[layer], kind))


def test_a_start_is_added_to_the_base_that_it_was_trained_on_also_where_weights_are_transposed(
    tmp_path: Path,
) -> None:
    words = [
        *("model=hf", f"model.name={tiny.folder(tmp_path / 'net', 'gpt2')}", "data=table"),
        *(f"data.path={tiny.reviews(tmp_path / 'x.csv', 40)}", "data.text=review"),
        *("data.label=stars", "adapter=full", "host.device=cpu", "train.precision=float32"),
    ]
    (one,), host = hydra_bridge.plan([words])
    original = prepare(one.config, host, tmp_path).base
    rng = np.random.default_rng(0)
    dW = {layer: 0.1 * rng.standard_normal(W0.shape) for layer, W0 in original.items()}
    assert any(layer.endswith("attn.c_proj") for layer in dW), "a square one is there"
    updates = {layer: Dense(update) for layer, update in dW.items()}
    for stored in ("none", "nf4"):
        found = prepare(one.config, host, tmp_path, start=Trained(updates, {}, stored)).base
        for layer, W0 in found.items():
            base = original[layer] if stored == "none" else quantize(original[layer], stored)
            np.testing.assert_allclose(W0, base + dW[layer], atol=1e-6)


def test_the_update_of_a_run_is_against_the_dequantised_base(tmp_path: Path) -> None:
    store = Store(tmp_path / "results", create=True)
    for method in ("lora adapter.r=2", "full"):
        keys = {}
        for kind in ("none", "nf4"):
            words = f"{SMALL} adapter={method} model.quantize={kind} host.results={store.root}"
            (one,), host = hydra_bridge.plan([words.split()])
            assert run_here(one, host) == "done"
            keys[kind] = one.run_id
        plain, quantised = (finals_of(store, store.run(keys[kind])) for kind in ("none", "nf4"))
        for layer, final in quantised.items():
            W0 = final.given["W0"]
            np.testing.assert_array_equal(W0, quantize(plain[layer].given["W0"], "nf4"))
            small = final.given["update"].norm() / np.linalg.norm(W0)
            # Against the original weight it would hold the error of storage, 0.09 of the weight.
            assert small < 0.06, (method, layer)
    measure_missing(store)
    table = store.run(keys["nf4"]).read_measures()
    errors = table[table["measure"] == "requantization_error"]
    assert set(errors["side"]) == set(KINDS)
    # Most entries of so small an update stay below half a step, and the base is on its levels.
    near = errors[errors["side"] == "nf4"]["value"]
    assert near.between(0.8, 1.2).all()
