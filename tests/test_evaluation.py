"""Scores, refitted heads, and the oracle truncation of a full update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics

from lora_lab import hydra_bridge
from lora_lab.adapters import snapshot
from lora_lab.batches import TrainingBatches, by_length, epoch_batches
from lora_lab.config import Host
from lora_lab.evaluation import evaluate, oracle_grid, oracle_truncation, refit, targets_of
from lora_lab.execution import final_updates
from lora_lab.linalg import Spectrum, decompose, updates_of
from lora_lab.models import score
from lora_lab.preparation import Setup, prepare
from lora_lab.store import Work
from lora_lab.training import Trainer


def trained(tmp_path: Path, *overrides: str) -> Setup:
    """A planted run, trained in this process."""
    (one,), host = hydra_bridge.plan([["model=planted", "data=planted"]], list(overrides))
    setup = prepare(one.config, host, tmp_path)
    Trainer(setup, Work(tmp_path), Host(), lambda *_: None).train()
    return setup


def spectra_of(setup: Setup) -> dict[str, Spectrum]:
    updates = final_updates(setup.adapted)
    return {layer: decompose(update, vectors=True) for layer, update in updates.items()}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return trained(tmp_path_factory.mktemp("full"), "adapter=full", "data.true_r=3")


def test_the_oracle_recovers_the_planted_rank(full: Setup) -> None:
    rows = oracle_truncation(full.model, full.adapted, spectra_of(full), full.splits)
    found = {(row["measure"], row["k"], row["side"]): row["value"] for row in rows}
    whole = found["oracle_score", 128.0, "trained_head"]
    assert found["oracle_score", 0.0, "trained_head"] < found["oracle_score", 1.0, "trained_head"]
    assert found["oracle_score", 2.0, "trained_head"] < whole - 0.01
    assert found["oracle_score", 4.0, "trained_head"] > whole - 0.005
    assert found["oracle_energy", 0.0, ""] == 0
    assert found["oracle_energy", 128.0, ""] == pytest.approx(1)


def test_the_oracle_puts_the_weights_back_and_its_last_row_is_the_model(full: Setup) -> None:
    before = evaluate(full.model, full.splits["test"]).score
    spectra = spectra_of(full)
    weights = {name: layer.W.clone() for name, layer in full.adapted.items()}
    rows = oracle_truncation(full.model, full.adapted, spectra, full.splits)
    assert rows[-3]["value"] == before
    for name, layer in full.adapted.items():
        assert torch.equal(layer.W, weights[name])


def test_training_recovers_the_planted_update(tmp_path: Path) -> None:
    setup = trained(tmp_path, "adapter.r=4", "data.true_r=4", "data.noise=0", "train.epochs=3")
    for layer, update in updates_of(snapshot(setup.adapted)).items():
        teacher = setup.config.data.teacher(layer)
        true = (teacher.U * teacher.s) @ teacher.Vh
        assert np.linalg.norm(update.dense() - true) < 0.1 * np.linalg.norm(true), layer


def test_head_is_the_floor_and_full_the_ceiling(tmp_path: Path, full: Setup) -> None:
    head = evaluate(trained(tmp_path, "adapter=head").model, full.splits["test"]).score
    assert head < evaluate(full.model, full.splits["test"]).score - 0.1


def test_accuracy_and_r2_are_those_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    assert score(logits, labels) == metrics.accuracy_score(labels, logits.argmax(1))
    y = rng.normal(size=(50, 1))
    y_hat = y + 0.3 * rng.normal(size=(50, 1))
    assert score(y_hat, y) == pytest.approx(metrics.r2_score(y, y_hat))


def test_a_refitted_head_is_the_best_linear_one() -> None:
    rng = np.random.default_rng(1)
    w = rng.normal(size=5)

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.normal(size=(n, 5)).astype(np.float32)
        return x, (x @ w + 0.1 * rng.normal(size=n) > 0).astype(np.int64)

    assert refit(split(500), split(200), split(500)) > 0.95
    x, y = split(500)
    shuffled = (x, rng.permutation(y))
    assert refit(shuffled, split(200), split(2000)) < 0.65


def test_the_oracle_grid_ends_at_q() -> None:
    assert oracle_grid(64) == [0, 1, 2, 4, 8, 16, 64]
    assert oracle_grid(1) == [0, 1]


def test_targets_come_in_the_order_of_the_examples(full: Setup) -> None:
    expected = full.problem.targets["test"]
    np.testing.assert_array_equal(targets_of(full.splits["test"]), expected)


def test_every_example_is_seen_once_an_epoch_in_batches_of_near_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 1003)
    batches = epoch_batches(lengths, 16, seed=1, epoch=0)
    assert sorted(i for b in batches for i in b) == list(range(1003))
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded < 1.1 * lengths.sum()
    assert batches != epoch_batches(lengths, 16, seed=1, epoch=1)
    assert batches != epoch_batches(lengths, 16, seed=2, epoch=0)
    assert batches == epoch_batches(lengths, 16, seed=1, epoch=0)


def test_a_resumed_stream_of_batches_is_the_rest_of_the_whole() -> None:
    lengths = np.arange(1, 101)
    whole = list(TrainingBatches(lengths, 8, seed=5, total=30))
    for skip in (1, 12, 13, 29):
        assert list(TrainingBatches(lengths, 8, seed=5, total=30, skip=skip)) == whole[skip:]


def test_evaluation_batches_are_longest_first_and_complete() -> None:
    lengths = np.array([3, 9, 1, 7])
    assert by_length(lengths, 3) == [[1, 3, 0], [2]]
