"""Sweeps: what is left to do, in which order, each run for itself."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sweeping import SMALL, Apart, lab, stamps, swept

from lora_lab import engine
from lora_lab.config import Host, RunConfig, Tracker, TrainConfig, run_id
from lora_lab.engine import Summary, Watcher, in_order, left, run_here
from lora_lab.hydra_bridge import Planned, plan
from lora_lab.registry import WrongInput
from lora_lab.store import Store, load, pack
from lora_lab.trackers import Mirror, open_mirror, resolved

LORA = "adapter=lora adapter.r=2"


def planned(*words: str) -> list[Planned]:
    found, _ = plan([[*SMALL, *LORA.split(), *words]])
    return found


def host(results: Path, **other: Any) -> Host:
    return Host(str(results), threads=1, tracker=Tracker.disabled, **other)


def sweep(
    results: Path,
    lines: Sequence[str] = (f"{LORA} seed=0,1,2,3",),
    *words: str,
    patch: Callable[[], None] | None = None,
) -> Summary:
    """A sweep with two workers in a process of its own."""
    words = ("host.workers=2", *words, f"host.results={results}")
    output = results.with_name(f"{results.name}.txt")
    apart = Apart(swept, list(lines), *words, output=output, patch=patch)
    summary = apart.answer()
    assert apart.gone() == []
    assert isinstance(summary, Summary)
    return summary


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with four finished runs, seeds 0 to 3."""
    results = tmp_path_factory.mktemp("finished") / "results"
    assert set(sweep(results).status.values()) == {"done"}
    return results


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


# ---- the order ---------------------------------------------------------------------------------


def one(name: str, *needs: Planned) -> Planned:
    return Planned(RunConfig(), name * 12, needs)


def ids(runs: Sequence[Planned]) -> list[str]:
    return [run.run_id[0] for run in runs]


def test_a_run_comes_after_all_that_it_starts_from_and_each_comes_once() -> None:
    a = one("a")
    b = one("b", a)
    c = one("c", b, a)
    waves = in_order([c, one("d"), b, a, c])
    assert [sorted(ids(wave)) for wave in waves] == [["a", "d"], ["b"], ["c"]]


def test_no_runs_are_no_waves() -> None:
    assert [run for wave in in_order([]) for run in wave] == []


def test_a_run_starts_from_another_run_which_is_trained_first_and_kept_whole(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"
    [run] = planned("seed=1", f"model.start={' '.join(SMALL[:5])} adapter=full seed=7")
    summary = sweep_of(results, [run], "host.keep=top")
    assert summary.status == {run.run_id: "done", run.needs[0].run_id: "done"}
    store = Store(results)
    dense = store.run(run.needs[0].run_id).read_tensors("update")
    assert all(name.endswith(".dW") for name in dense)
    started = [store.run(i).read_json("provenance")["started"] for i in summary.status]
    assert started == sorted(started)


def test_a_packed_run_without_weights_is_trained_again_only_for_what_starts_from_it(
    results: Path,
) -> None:
    [first] = planned("seed=0")
    pack(Store(results))
    shutil.rmtree(Store(results).run(first.run_id).path)
    then = dataclasses.replace(planned("seed=7")[0], needs=(first,))
    every = [run for wave in in_order([then]) for run in wave]
    assert left([first], Store(results)) == []
    assert [run.run_id for run in left(every, Store(results))] == [first.run_id, then.run_id]
    done = dataclasses.replace(planned("seed=1")[0], needs=(first,))
    assert left([first, done], Store(results)) == []


def sweep_of(results: Path, runs: list[Planned], *words: str) -> Summary:
    _, there = plan([[*SMALL, "host.workers=2", *words, f"host.results={results}"]])
    output = results.with_name("sweep.txt")
    summary = Apart(engine.sweep, "test", runs, there, Watcher(), output=output).answer()
    assert isinstance(summary, Summary)
    return summary


def test_what_starts_from_a_failed_run_is_not_tried_and_says_so(tmp_path: Path) -> None:
    results = tmp_path / "results"
    (results / "runs").mkdir(parents=True)
    a, b, c, d = (planned(f"seed={seed}")[0] for seed in range(4))
    b = dataclasses.replace(b, needs=(a,))
    c = dataclasses.replace(c, needs=(b,))
    (results / "runs" / a.run_id).write_text("a file where a folder must go")
    summary = sweep_of(results, [c, d])
    statuses = [summary.status[run.run_id] for run in (a, b, c, d)]
    assert statuses == ["failed", "interrupted", "interrupted", "done"]
    assert summary.errors[c.run_id] == "a run that it starts from has no result"
    assert not (results / "runs" / c.run_id).exists()


# ---- what is left ------------------------------------------------------------------------------


def test_what_is_finished_is_not_left_and_what_failed_or_was_cut_off_is(results: Path) -> None:
    store, runs = Store(results), planned("seed=0,1,2,3,4")
    failed, cut = store.run(runs[1].run_id), store.run(runs[2].run_id)
    (failed.path / "DONE").unlink()
    failed.fail("no luck")
    (cut.path / "DONE").unlink()
    assert left(runs, store) == [runs[1], runs[2], runs[4]]


def test_a_corrupt_run_is_set_aside_and_trained_again_and_only_that_one(results: Path) -> None:
    before, [run_id] = stamps(results), [run.run_id for run in planned("seed=2")]
    weights = results / "runs" / run_id / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    summary = sweep(results)
    assert set(summary.status.values()) == {"done"}
    assert len(summary.skipped) == 3
    after = stamps(results)
    assert {i for i in before if before[i] != after[i]} == {run_id}
    aside = results / "runs" / f"{run_id}.corrupt-1"
    assert (aside / "adapter_model.safetensors").read_bytes() == bytes(content)


def test_a_packed_run_is_not_left_even_when_its_folder_is_gone_or_corrupt(results: Path) -> None:
    store, runs = Store(results), planned("seed=0,1,2,3")
    pack(store)
    shutil.rmtree(store.run(runs[0].run_id).path)
    (store.run(runs[1].run_id).path / "metrics.json").write_text("{}")
    assert left(runs, Store(results)) == []
    summary = sweep(results)
    assert summary.status == {run.run_id: "done" for run in runs}
    assert len(summary.skipped) == 4


def test_a_default_that_changed_in_code_since_is_refused_by_name(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [run] = planned("seed=0")
    monkeypatch.setattr(TrainConfig.__dataclass_fields__["epochs"], "default", 2.0)
    train = dataclasses.replace(run.config.train, epochs=2.0)
    today = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
    assert run_id(today.config) == run.run_id  # as if nothing had been said of epochs
    before = stamps(results)
    with pytest.raises(WrongInput, match=r"default of train\.epochs has changed"):
        engine.sweep("test", [today], host(results), Watcher())
    assert stamps(results) == before


def test_many_runs_want_a_yes_before_anything_is_made(tmp_path: Path) -> None:
    runs = [Planned(RunConfig(seed=n), f"{n:012x}") for n in range(engine.MANY + 1)]
    with pytest.raises(WrongInput, match=r"201 runs.*host\.yes=true"):
        engine.sweep("test", runs, host(tmp_path / "results"), Watcher())
    assert not (tmp_path / "results").exists()


# ---- each for itself ---------------------------------------------------------------------------


def fail_seed(seed: int) -> None:
    from lora_lab import execution

    train = execution.execute

    def execute(config: Any, *args: Any) -> None:
        if config.seed == seed:
            raise RuntimeError("the disk\nlaughed")
        train(config, *args)

    execution.execute = execute


def test_a_run_that_fails_fails_alone_and_says_why_in_log_table_and_summary(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"
    summary = sweep(results, patch=functools.partial(fail_seed, 1))
    [run_id] = summary.failed
    assert run_id == planned("seed=1")[0].run_id
    assert sorted(summary.status.values()) == ["done", "done", "done", "failed"]
    assert summary.errors == {run_id: "RuntimeError: the disk laughed"}
    run = Store(results).run(run_id)
    assert "Traceback" in run.log.read_text()
    runs = load(results).runs.set_index("run_id")
    assert runs.loc[run_id, ["status", "error"]].tolist() == [
        "failed",
        "RuntimeError: the disk laughed",
    ]

    before = stamps(results)
    summary = sweep(results)
    assert set(summary.status.values()) == {"done"}
    assert summary.skipped == set(before)
    assert before.items() < stamps(results).items()
    assert "the disk" in run.log.read_text()  # attempts follow each other in it
    assert load(results).runs["error"].isna().all()


def test_a_run_without_a_place_for_its_folder_fails_alone_in_one_line(tmp_path: Path) -> None:
    results = tmp_path / "results"
    (results / "runs").mkdir(parents=True)
    [bad] = planned("seed=1")
    (results / "runs" / bad.run_id).write_text("a file")
    summary = sweep(results)
    assert sorted(summary.status.values()) == ["done", "done", "done", "failed"]
    assert "\n" not in summary.errors[bad.run_id]
    assert str(results / "runs" / bad.run_id) in summary.errors[bad.run_id]


def die_after_answer(seed: int) -> None:
    """Have a worker die between its answer and its end, when it is idle in Pebble's eyes."""
    from pebble.pool import process

    answer, mine = process.send_result, [False]

    def send_result(channel: Any, result: Any) -> None:
        answer(channel, result)
        if mine[0]:
            os._exit(9)

    from lora_lab import execution

    train = execution.execute

    def execute(config: Any, *args: Any) -> None:
        mine[0] = config.seed == seed
        train(config, *args)

    execution.execute = execute
    process.send_result = send_result


@pytest.mark.parametrize("workers", [1, 2])
def test_an_idle_worker_that_dies_takes_no_run_with_it(workers: int, tmp_path: Path) -> None:
    results = tmp_path / "results"
    patch = functools.partial(die_after_answer, 1)
    summary = sweep(results, [f"{LORA} seed=0,1,2,3"], f"host.workers={workers}", patch=patch)
    assert set(summary.status.values()) == {"done"}, summary.errors
    assert len(stamps(results)) == 4


def kill_own_fork_server(seed: int) -> None:
    from lora_lab import execution

    train = execution.execute

    def execute(config: Any, *args: Any) -> None:
        if config.seed == seed:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(100)
        train(config, *args)

    execution.execute = execute


def test_when_the_fork_server_is_killed_its_workers_leave_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"
    summary = sweep(results, patch=functools.partial(kill_own_fork_server, 1))
    assert 1 <= len(summary.failed) <= 2  # the two that ran
    assert set(summary.status.values()) == {"done", "interrupted"}
    assert set(sweep(results).status.values()) == {"done"}


def test_a_diverged_run_is_done_with_step_and_layer_and_is_neither_repeated_nor_averaged(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"
    lines = [f"{LORA} seed=0", f"{LORA} train.lr=1e30 seed=0"]
    summary = sweep(results, lines)
    [run_id] = [i for i, status in summary.status.items() if status == "diverged"]
    assert summary.failed == []
    assert "at step 2" in summary.errors[run_id]
    assert any(f".{layer}." in summary.errors[run_id] for layer in ("q", "k", "v", "o"))
    found = load(results)
    row = found.runs.set_index("run_id").loc[run_id]
    assert row["status"] == "diverged"
    assert row["error"] == summary.errors[run_id]
    assert found.runs["score"].notna().sum() == 1
    assert run_id not in set(found.measures["run_id"])
    before = stamps(results)
    assert len(before) == 2
    again = sweep(results, lines)
    assert again.status == summary.status
    assert stamps(results) == before


def test_the_exit_status_tells_whether_all_have_a_result(tmp_path: Path) -> None:
    argv = ["train", *SMALL, *LORA.split(), "seed=0,1", f"--results={tmp_path / 'results'}"]
    output = tmp_path / "out.txt"
    assert Apart(lab, *argv, output=output, patch=functools.partial(fail_seed, 1)).wait() == 1
    assert "failed" in output.read_text()
    assert Apart(lab, *argv, output=output).wait() == 0


def test_a_sweep_puts_back_what_sigterm_did_before(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Asking(Watcher):
        def started(self, todo: Sequence[Planned], skipped: int, workers: int) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    engine.sweep("test", planned("seed=0"), host(results), Asking())
    assert signal.getsignal(signal.SIGTERM) == before
    assert seen != [before]


# ---- one run in this process -------------------------------------------------------------------


def test_a_run_here_is_done_logged_and_not_done_again(tmp_path: Path) -> None:
    [run], results = planned("seed=0"), tmp_path / "results"
    assert run_here(run, host(results)) == "done"
    before = stamps(results)
    assert run_here(run, host(results)) == "done"
    assert stamps(results) == before


def test_a_run_here_that_fails_has_its_error_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [run], results = planned("seed=0"), tmp_path / "results"

    def fail(*_: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr("lora_lab.execution.execute", fail)
    assert run_here(run, host(results)) == "failed"
    assert "no luck" in Store(results).run(run.run_id).log.read_text()


def test_a_corrupt_run_is_done_again_here(results: Path) -> None:
    [run] = planned("seed=0")
    (results / "runs" / run.run_id / "metrics.json").write_text("{}")
    assert run_here(run, host(results)) == "done"
    assert Store(results).run(run.run_id).verify() == []


def test_an_error_after_the_record_is_complete_does_not_undo_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [run], results = planned("seed=0"), tmp_path / "results"

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lora_lab.execution.measure_run", fail)
    assert run_here(run, host(results)) == "done"
    monkeypatch.undo()
    engine.measure_missing(Store(results))
    assert len(load(results).measures)


def test_measures_of_a_run_that_another_process_holds_are_left_to_it(results: Path) -> None:
    store = Store(results)
    [run] = planned("seed=0")
    (store.run(run.run_id).path / "measures.json").unlink()
    with store.run(run.run_id).lock():
        assert engine.measure_missing(store, engine.SOON) == {}
    assert set(engine.measure_missing(store, engine.SOON)) == {run.run_id}


# ---- trackers ----------------------------------------------------------------------------------


def mirrored(results: Path, mode: str) -> str:
    return run_here(planned("seed=0")[0], dataclasses.replace(host(results), tracker=Tracker[mode]))


def test_offline_mirrors_lie_under_the_results_and_leave_no_process(tmp_path: Path) -> None:
    results = tmp_path / "results"
    apart = Apart(mirrored, results, "offline", output=tmp_path / "out.txt")
    assert apart.answer() == "done"
    name = planned("seed=0")[0].run_id
    [file] = (results / "wandb").glob(f"offline-run-*{name}/run-*.wandb")
    assert file.stat().st_size > 1000
    assert not list(tmp_path.glob("wandb"))
    assert apart.gone() == []
    assert "wandb" not in Store(results).run(name).log.read_text()


class Nuisance:
    """A client of which every call fails."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no such host")


class LaterNuisance:
    """A client that fails once the run is under way."""

    starting_step = 0

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("the line is cut")


@pytest.mark.parametrize("client", [Nuisance, lambda **_: LaterNuisance()])
def test_a_client_that_raises_never_fails_a_run(
    client: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("wandb.init", client)
    assert mirrored(tmp_path / "results", "online") == "done"
    [run_id] = stamps(tmp_path / "results")
    log = Store(tmp_path / "results").run(run_id).log.read_text()
    assert "the run goes on without it" in log
    assert "1 left to `lora-lab sync`" in capsys.readouterr().err


def test_a_client_that_does_not_come_to_its_end_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless:
        summary: dict[str, Any] = {}  # noqa: RUF012
        starting_step = 0

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, *_: Any, **__: Any) -> None: ...

        def finish(self, exit_code: int) -> None:
            time.sleep(20)

    monkeypatch.setattr("wandb.init", lambda **_: Endless())
    monkeypatch.setattr("lora_lab.trackers.wandb.PATIENCE", 0.1)
    began = time.monotonic()
    assert mirrored(tmp_path / "results", "online") == "done"
    assert time.monotonic() - began < 15


def test_a_client_that_cannot_be_imported_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lora_lab.trackers.wandb", None)
    assert type(open_mirror(Tracker.online, RunConfig(), "0" * 12, "", tmp_path)) is Mirror


def test_without_a_key_the_default_tracker_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert mirrored(tmp_path / "results", "auto") == "done"
    assert not list(tmp_path.rglob("wandb"))


def test_with_a_key_the_default_tracker_is_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_lab.trackers.wandb

    asked = []
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(lora_lab.trackers.wandb, "WandbMirror", lambda *_: asked.append("online"))
    open_mirror(Tracker.auto, RunConfig(), "0" * 12, "", tmp_path)
    assert asked == ["online"]
    monkeypatch.setenv("WANDB_MODE", "offline")  # the client's own switch
    assert resolved(Tracker.auto) is Tracker.offline
    assert resolved(Tracker.online) is Tracker.online
