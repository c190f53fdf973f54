"""A run that was stopped goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pandas.testing as pdt
import pytest
import torch

from lora_lab.config import Host
from lora_lab.engine import attempt, one_line
from lora_lab.execution import decomposed, execute
from lora_lab.hydra_bridge import Planned, plan
from lora_lab.preparation import prepare
from lora_lab.store import Store, Work, load
from lora_lab.training import Trainer

STEPS = 16
SHAPE = [
    *("model=planted", "data=planted", "size=smoke", "data.width=64"),
    *("train.batch_size=8", "train.accumulate=2", "train.epochs=4", "train.spectra=4"),
    "train.gradient_spectra=true",
]
METHODS = {"full": ["adapter=full"], "lora": ["adapter=lora", "adapter.dropout=0.1"]}
SPAN = ["adapter.begin=0.2", "adapter.end=0.7", "adapter.every=2"]
REMEMBERING = {
    "sparse": ["adapter=sparse", *SPAN],
    "dynamic": ["adapter=dynamic", "adapter.threshold=0.4", *SPAN],
    "adaptive": ["adapter=adaptive", *SPAN],
    "stacked": ["adapter=stacked", "adapter.order=one_after_another"],
    "intrinsic": ["adapter=intrinsic", "adapter.d=64"],
    "projected": ["adapter=projected", "adapter.every=4"],
}
"""Methods whose hooks act at some steps, by what they remember of earlier ones."""
HOST = Host(device="cpu", checkpoint_minutes=0.0)  # a checkpoint after every step


class Stopped(RuntimeError):
    """The process would end here."""


class Outcome(NamedTuple):
    """All that a training leaves."""

    weights: dict[str, np.ndarray]
    traces: list[tuple[int, str, str, float]]
    sigma: dict[tuple[int, str], np.ndarray]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def planned(method: str) -> Planned:
    found, _ = plan([[*SHAPE, *(METHODS | REMEMBERING)[method]]])
    return found[0]


def train(method: str, folder: Path, stop: int | None = None) -> Outcome:
    """Train from what the folder holds, up to a step or to the end."""
    folder.mkdir(exist_ok=True)

    def on_step(step: int, steps: int, *_: Any) -> None:
        assert steps == STEPS
        if step == stop:
            raise Stopped

    torch.manual_seed(99)  # what an earlier run in the process left must not matter
    setup = prepare(planned(method).config, HOST, folder)
    trainer = Trainer(setup, Work(folder), HOST, on_step)
    trainer.train()
    done = trainer.progress
    assert done.step == STEPS
    spectra = {step: decomposed(trainer.work.read_snapshot(step)) for step in done.snapshots}
    return Outcome(
        {n: p.detach().numpy().copy() for n, p in setup.model.named_parameters()},
        [row for row in done.traces if row[2] != "samples_per_second"],
        {(step, layer): s.values for step, of in spectra.items() for layer, s in of.items()},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Each method trained without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return {method: train(method, folder / method) for method in METHODS}


def assert_identical(ours: Outcome, theirs: Outcome) -> None:
    assert ours.traces == theirs.traces
    for name in ("weights", "sigma"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert found.keys() == expected.keys()
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key], err_msg=str(key))


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 7, 8, 9, 12, 15, 16])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_at_any_step_ends_bit_for_bit_as_one_that_was_not(
    method: str, stop: int, tmp_path: Path, whole: dict[str, Outcome]
) -> None:
    with pytest.raises(Stopped):
        train(method, tmp_path, stop)
    if stop > 1:
        found = Work(tmp_path).read_checkpoint()
        assert found is not None
        assert found[1]["step"] == stop - 1
    assert_identical(train(method, tmp_path), whole[method])


@pytest.mark.parametrize("method", REMEMBERING)
def test_what_a_method_remembers_of_earlier_steps_is_in_the_checkpoint(
    method: str, tmp_path: Path
) -> None:
    for stop in (4, 6, 9, 13):
        with pytest.raises(Stopped):
            train(method, tmp_path / "stopped", stop)
    stopped = train(method, tmp_path / "stopped")
    assert_identical(stopped, train(method, tmp_path / "whole"))


def test_a_run_stopped_many_times_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, whole: dict[str, Outcome]
) -> None:
    for stop in (2, 4, 5, 11, 16):
        with pytest.raises(Stopped):
            train("lora", tmp_path, stop)
    assert_identical(train("lora", tmp_path), whole["lora"])


def test_dropout_draws_and_steps_change_the_weights(whole: dict[str, Outcome]) -> None:
    # Else the tests above would compare nothing.
    lora = whole["lora"].weights
    assert any(np.abs(lora[name]).max() > 0 for name in lora if name.endswith(".B"))
    assert len(whole["lora"].sigma) > len(lora) / 2
    assert {row[0] for row in whole["lora"].traces} == set(range(1, STEPS + 1))


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGE = {
    "a flipped bit": flipped,
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "a flipped bit of its digest": lambda content: flipped(content[:1]) + content[1:],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_torn_checkpoint_is_not_used_and_the_run_starts_again(
    how: str, tmp_path: Path, whole: dict[str, Outcome]
) -> None:
    with pytest.raises(Stopped):
        train("lora", tmp_path, 9)
    [path] = tmp_path.glob("checkpoint*")
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    assert Work(tmp_path).read_checkpoint() is None
    assert_identical(train("lora", tmp_path), whole["lora"])


def test_a_lost_snapshot_makes_its_checkpoint_useless(
    tmp_path: Path, whole: dict[str, Outcome]
) -> None:
    with pytest.raises(Stopped):
        train("full", tmp_path, 9)
    next(tmp_path.glob("snapshot*")).unlink()
    assert Work(tmp_path).read_checkpoint() is None
    assert_identical(train("full", tmp_path), whole["full"])


# ---- whole runs --------------------------------------------------------------------------------


def run_to(results: Path, method: str, stop: int | None = None) -> str:
    """A run in its folder, to a step or to its end; returns its status."""
    store = Store(results, create=True)
    one = planned(method)
    run = store.run(one.run_id)
    host = dataclasses.replace(HOST, results=str(results))

    def on_step(step: int, *_: Any) -> None:
        if step == stop:
            raise Stopped

    with run.lock():
        if stop is None:
            return attempt(one.config, host, store, run, {}, "")
        with pytest.raises(Stopped):
            execute(one.config, host, store, run, {}, on_step)
    return run.status()


def numbers(results: Path) -> dict[str, pd.DataFrame]:
    with warnings.catch_warnings(action="error"):
        found = load(results)
        chance = ["seconds", "train_seconds", "samples_per_second", "peak_memory", "started"]
        traces = found.traces[found.traces["trace"] != "samples_per_second"]
        return {
            "runs": found.runs.drop(columns=chance),
            "measures": found.measures,
            "traces": traces.reset_index(drop=True),
            "spectra": found.spectra,
        }


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, pd.DataFrame]]:
    out = {}
    for method in METHODS:
        results = tmp_path_factory.mktemp("unstopped") / method
        assert run_to(results, method) == "done"
        out[method] = numbers(results)
    return out


def assert_equal(ours: dict[str, pd.DataFrame], theirs: dict[str, pd.DataFrame]) -> None:
    for name in theirs:
        assert len(theirs[name])
        pdt.assert_frame_equal(ours[name], theirs[name], check_exact=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_and_resumed_has_the_tables_of_one_that_was_not(
    method: str, tmp_path: Path, unstopped: dict[str, Any]
) -> None:
    assert run_to(tmp_path / "results", method, stop=10) == "interrupted"
    assert run_to(tmp_path / "results", method) == "done"
    assert_equal(numbers(tmp_path / "results"), unstopped[method])


@pytest.mark.parametrize("how", DAMAGE)
def test_a_torn_snapshot_is_found_and_the_run_comes_to_the_same_numbers(
    how: str, tmp_path: Path, unstopped: dict[str, Any]
) -> None:
    results = tmp_path / "results"
    run_to(results, "full", stop=10)
    [run_id] = Store(results).run_ids()
    run = Store(results).run(run_id)
    path = sorted(run.work.glob("snapshot*"))[0]
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    for _ in range(2):  # at most one attempt more
        if (status := run_to(results, "full")) == "done":
            break
    assert status == "done", one_line(RuntimeError(run.record().error))
    assert_equal(numbers(results), unstopped["full"])
