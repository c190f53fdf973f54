"""Kills, hangs and signals in the middle of sweeps; nothing finished may be lost or done twice."""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil
import pytest
from sweeping import GRACE, SMALL, Apart, assert_same, lab, lingering, stamps, swept, tables

from lora_lab.store import Store

long = pytest.mark.long

SWEEP = ("train", *SMALL, "host.workers=2", "host.checkpoint_minutes=0", "adapter=full,lora")
FEW, FULL = 4, 6
"""Seeds of a sweep, and so half its runs, in the ordinary tests and in the long ones."""


def counts(ordinary: int, full: int) -> pytest.MarkDecorator:
    """How often a test does its thing, and in sweeps of how many seeds."""
    both = [(ordinary, FEW), pytest.param(full, FULL, marks=long)]
    return pytest.mark.parametrize(("times", "seeds"), both)


def numbers(seeds: int) -> str:
    return ",".join(map(str, range(seeds)))


def start(results: Path, seeds: int, *words: str, patch: Callable[[], None] | None = None) -> Apart:
    """The sweep's command; the same words are the same command."""
    argv = (*SWEEP, f"seed={numbers(seeds)}", *words, f"--results={results}")
    return Apart(lab, *argv, output=results.with_name(f"{results.name}.txt"), patch=patch)


class Unkilled(NamedTuple):
    """A sweep that nobody disturbed."""

    results: Path
    tables: dict[str, pd.DataFrame]
    seconds: float


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Unkilled]:
    folder = tmp_path_factory.mktemp("unkilled")
    Apart(time.sleep, 0, output=folder / "none.txt").wait()  # starts the fork server

    @functools.cache
    def made(seeds: int) -> Unkilled:
        results = folder / f"results of {seeds}"
        began = time.monotonic()
        assert start(results, seeds).wait() == 0
        assert len(stamps(results)) == 2 * seeds
        return Unkilled(results, tables(results), time.monotonic() - began)

    return made


def again(results: Path, seeds: int, unkilled: Unkilled) -> None:
    """The same command ends well, does nothing twice, and gives the tables of an unkilled sweep."""
    finished = stamps(results)
    sweep = start(results, seeds)
    assert sweep.wait() == 0, sweep.output.read_text()
    assert sweep.gone() == []
    now = stamps(results)
    assert finished.items() <= now.items()
    assert len(now) == 2 * seeds
    assert_same(tables(results), unkilled.tables)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """Results folders for tests with many sweeps."""
    return (tmp_path / f"results {n}" for n in range(1000))


def statuses(results: Path) -> dict[str, int]:
    """How many runs have which status."""
    return dict(tables(results)["runs"]["status"].value_counts())


# ---- kill -9 of the sweep ----------------------------------------------------------------------


@counts(3, 100)
def test_finished_runs_outlive_every_kill_of_their_sweep_and_are_not_done_again(
    times: int, seeds: int, folders: Iterator[Path], unkilled: Callable[[int], Unkilled]
) -> None:
    chance = random.Random(times)
    whole = unkilled(seeds)
    kills = 0
    while kills < times:
        results, finished = next(folders), dict[str, tuple[int, int]]()
        status = -signal.SIGKILL
        while status == -signal.SIGKILL and kills < times:
            sweep = start(results, seeds)
            share = 1 - len(finished) / (2 * seeds)
            time.sleep(chance.uniform(0, 0.1 + whole.seconds * share))
            sweep.kill(group=bool(kills % 2))
            status = sweep.wait()
            assert sweep.gone() == []
            now = stamps(results)
            assert finished.items() <= now.items()
            if now:  # nothing is held any more
                until(lambda at=results: statuses(at).keys() <= {"done", "interrupted"}, GRACE)
            finished, kills = now, kills + (status == -signal.SIGKILL)
        again(results, seeds, whole)


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@pytest.mark.parametrize("group", [False, pytest.param(True, marks=long)])
def test_the_trackers_service_leaves_too_when_its_sweep_is_killed(
    group: bool, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    sweep = start(results, 1, "host.tracker=offline")  # it comes when the runs are done
    until(lambda: [p for p in lingering(sweep.pid, 0) if "wandb" in p], 120)
    sweep.kill(group)
    sweep.wait()
    assert sweep.gone() == []


# ---- a worker that dies or hangs ---------------------------------------------------------------

POINTS = ("forward", "backward", "weights", "record", "done")
"""Where a worker is killed; `done` is right after the rename that completes the record."""


def die_at(point: str, seed: int) -> None:
    """Have the worker that trains the LoRA run of a seed kill itself at a point."""
    from accelerate import Accelerator

    from lora_lab import execution
    from lora_lab.models.planted import PlantedRegression
    from lora_lab.store import files

    marked = [False]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def at(where: str, call: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if marked[0] and point == where and not after:
                die()
            value = call(*args, **kwargs)
            if marked[0] and point == where:
                die()
            return value

        return wrapped

    def execute(config: Any, *args: Any) -> None:
        marked[0] = config.seed == seed and hasattr(config.adapter, "r")
        train(config, *args)

    def write(path: Path, data: bytes) -> None:
        names = {"adapter_model.safetensors": "weights", "metrics.json": "record"}
        if marked[0] and names.get(path.name) == point:
            path.with_name(".tmp-torn").write_bytes(data[: len(data) // 2])
            die()
        save(path, data)
        if marked[0] and path.name == "DONE" and point == "done":
            die()

    train, save = execution.execute, files.write_bytes
    execution.execute, files.write_bytes = execute, write
    PlantedRegression.features = at("forward", PlantedRegression.features)  # type: ignore[method-assign]
    Accelerator.backward = at("backward", Accelerator.backward, after=True)


@pytest.mark.parametrize(
    ("point", "times", "seeds"),
    [("weights", 1, FEW), ("done", 1, FEW)]
    + [pytest.param(point, 20, FULL, marks=long) for point in POINTS],
)
def test_a_worker_that_is_killed_takes_no_other_run_with_it(
    point: str,
    times: int,
    seeds: int,
    folders: Iterator[Path],
    unkilled: Callable[[int], Unkilled],
) -> None:
    whole = unkilled(seeds)
    for n in range(times):
        results = next(folders)
        sweep = start(results, seeds, patch=functools.partial(die_at, point, n % seeds))
        status = sweep.wait()
        assert sweep.gone() == []
        said = " ".join(sweep.output.read_text().split())
        if point == "done":  # its record was complete
            assert (status, statuses(results)) == (0, {"done": 2 * seeds}), said
        else:
            expected = {"done": 2 * seeds - 1, "interrupted": 1}
            assert (status, statuses(results)) == (1, expected), said
            assert "its process died (exit code -9)" in said
    again(results, seeds, whole)


def test_a_kill_between_the_record_and_its_measures_costs_no_measure(tmp_path: Path) -> None:
    # A run on its own: no other run keeps the base weights that some measures need.
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    start(killed, 1, "adapter=lora", patch=functools.partial(die_at, "done", 0)).wait()
    start(whole, 1, "adapter=lora").wait()
    assert len(stamps(killed)) == 1
    assert_same(tables(killed), tables(whole))


def hang(how: str) -> None:
    """Have the run of seed 3 never end, one way or another."""
    from lora_lab.training import Trainer

    begin = Trainer.train

    def train(self: Trainer) -> None:
        if self.setup.config.seed == 3:
            if how == "deaf":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if how == "writing":
                while True:
                    self.work.write_progress({"step": 0})
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            while how == "busy":
                sum(range(1000))
            time.sleep(1000)
        begin(self)

    Trainer.train = train  # type: ignore[method-assign]


WAYS = ("asleep", "deaf", "busy", "writing", "stopped")


@pytest.mark.parametrize("how", ["asleep", *(pytest.param(w, marks=long) for w in WAYS)])
def test_a_run_that_hangs_is_ended_at_its_timeout_and_the_others_finish(
    how: str, tmp_path: Path, unkilled: Callable[[int], Unkilled]
) -> None:
    results = tmp_path / "results"
    words = ("adapter=lora", "host.timeout=0.001")  # hours: 3.6 s
    sweep = start(results, FEW, *words, patch=functools.partial(hang, how))
    assert sweep.wait(60) == 1, sweep.output.read_text()
    assert sweep.gone() == []
    assert statuses(results) == {"done": FEW - 1, "failed": 1}
    failed = tables(results)["runs"].set_index("status").loc["failed"]
    assert failed["seed"] == 3
    assert "host.timeout=0.001" in failed["error"]
    assert failed["error"] in Store(results).run(str(failed["run_id"])).log.read_text()
    again(results, FEW, unkilled(FEW))


# ---- signals -----------------------------------------------------------------------------------

STOPS = [
    (number, group)
    for number in (signal.SIGINT, signal.SIGTERM)
    for group in (False, True)  # a terminal's Ctrl-C goes to the whole group
]


@pytest.mark.parametrize(
    ("number", "group", "times"),
    [(signal.SIGINT, True, 1), (signal.SIGTERM, False, 1)]
    + [pytest.param(*stop, 5, marks=long) for stop in STOPS],
)
def test_a_sweep_that_is_asked_to_stop_is_gone_within_five_seconds_and_says_how_to_go_on(
    number: signal.Signals,
    group: bool,
    times: int,
    folders: Iterator[Path],
    unkilled: Callable[[int], Unkilled],
) -> None:
    chance = random.Random(number + 100 * group)
    whole = unkilled(FEW)
    for _ in range(times):
        results = next(folders)
        sweep = start(results, FEW)
        until((results / "sweeps" / "train.json").exists)  # the sweep itself, not its planning
        done = chance.randrange(FEW)  # of twice as many: it cannot be over, however fast it is
        until(lambda: len(stamps(results)) >= done)  # noqa: B023
        time.sleep(chance.uniform(0, 0.2))
        asked = time.monotonic()
        sweep.kill(group, number)
        status = sweep.wait(10)
        assert time.monotonic() - asked < 5
        said = sweep.output.read_text()
        assert status == 130, said
        assert sweep.gone() == []
        assert "Resume with: lora-lab train" in said
        assert "Traceback" not in said
        assert len(stamps(results)) < 2 * FEW
        again(results, FEW, whole)


# ---- the command as it is: its own interpreter, its own fork server ----------------------------


def command(results: Path) -> subprocess.Popen[str]:
    argv = (*SWEEP, f"seed={numbers(FEW)}", f"--results={results}")
    return subprocess.Popen(
        [sys.executable, "-m", "lora_lab.cli", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_to(process: subprocess.Popen[str], pattern: str) -> str:
    """The output up to a line with a pattern."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"no line with {pattern!r} in:\n{said}")


IN_IMPORTS, IN_RUNS = "runs to do", rf"^\[1/{2 * FEW}\]"


@pytest.mark.parametrize("moment", [IN_IMPORTS, pytest.param(IN_RUNS, marks=long)])
def test_the_fork_server_too_leaves_when_the_sweep_is_killed(moment: str, tmp_path: Path) -> None:
    sweep = command(tmp_path / "results")
    read_to(sweep, moment)
    until(lambda: psutil.Process(sweep.pid).children())
    if moment is IN_IMPORTS:
        time.sleep(0.5)  # into them
    sweep.kill()
    sweep.wait()
    assert lingering(sweep.pid, GRACE) == []


@long
@pytest.mark.parametrize("moment", [IN_IMPORTS, IN_RUNS])
def test_ctrl_c_at_a_terminal_leaves_one_line_and_no_process(moment: str, tmp_path: Path) -> None:
    sweep = command(tmp_path / "results")
    read_to(sweep, moment)
    until(lambda: psutil.Process(sweep.pid).children())
    if moment is IN_IMPORTS:
        time.sleep(0.5)
    os.killpg(sweep.pid, signal.SIGINT)
    rest, _ = sweep.communicate(timeout=5)
    assert sweep.returncode == 130, rest
    assert "Resume with: lora-lab train" in rest
    assert "Traceback" not in rest
    assert lingering(sweep.pid, GRACE) == []


# ---- doing again what is missing ---------------------------------------------------------------


def damage(results: Path, chance: random.Random) -> set[str]:
    """Delete, truncate, flip or fail five runs; returns their ids."""
    store = Store(results)
    chosen = chance.sample(sorted(stamps(results)), 5)
    shutil.rmtree(store.run(chosen[0]).path)
    (store.run(chosen[1]).path / "DONE").unlink()
    traces = store.run(chosen[2]).path / "traces.parquet"
    os.truncate(traces, traces.stat().st_size // 2)
    head = store.run(chosen[3]).path / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)
    failed = store.run(chosen[4])
    (failed.path / "DONE").unlink()
    failed.fail("out of luck")
    return set(chosen)


@counts(1, 5)
def test_exactly_the_runs_that_were_damaged_are_done_again(
    times: int, seeds: int, folders: Iterator[Path], unkilled: Callable[[int], Unkilled]
) -> None:
    chance = random.Random(times)
    whole = unkilled(seeds)
    for _ in range(times):
        results = next(folders)
        shutil.copytree(whole.results, results)
        before = stamps(results)
        chosen = damage(results, chance)
        sweep = start(results, seeds)
        assert sweep.wait() == 0
        assert f"5 runs to do, {2 * seeds - 5} already done" in sweep.output.read_text()
        after = stamps(results)
        assert {run_id for run_id in after if after[run_id] != before[run_id]} == chosen
        assert_same(tables(results), whole.tables)


def count_trainings(file: Path) -> None:
    """Have every worker note in a file which run it trains."""
    from lora_lab import execution

    train = execution.execute

    def execute(config: Any, host: Any, store: Any, run: Any, *rest: Any) -> None:
        with file.open("a") as notes:
            notes.write(f"{run.run_id}\n")
        train(config, host, store, run, *rest)

    execution.execute = execute


@pytest.mark.parametrize(("times", "at_once"), [(1, 2), pytest.param(20, 4, marks=long)])
def test_sweeps_that_start_together_train_each_run_once(
    times: int, at_once: int, folders: Iterator[Path], unkilled: Callable[[int], Unkilled]
) -> None:
    for _ in range(times):
        results = next(folders)
        notes = results.with_suffix(".trained")
        patch = functools.partial(count_trainings, notes)
        sweeps = [start(results, FEW, patch=patch) for _ in range(at_once)]
        assert [sweep.wait() for sweep in sweeps] == [0] * at_once, sweeps[0].output.read_text()
        assert sorted(notes.read_text().split()) == sorted(stamps(results))
        assert_same(tables(results), unkilled(FEW).tables)


# ---- the same numbers --------------------------------------------------------------------------

THERE = [f"adapter={method} seed={numbers(FEW)}" for method in ("full", "lora")]
BACK = [f"adapter={method} seed={numbers(FEW)[::-1]}" for method in ("lora", "full")]


@pytest.mark.parametrize(
    ("lines", "workers", "times"),
    [(BACK, 1, 1)]
    + [pytest.param(order, n, 4, marks=long) for order in (THERE, BACK) for n in (1, 2)],
)
def test_workers_and_order_change_no_number(
    lines: list[str],
    workers: int,
    times: int,
    folders: Iterator[Path],
    unkilled: Callable[[int], Unkilled],
) -> None:
    expected = unkilled(FEW).tables
    for _ in range(times):
        results = next(folders)
        words = (f"host.results={results}", f"host.workers={workers}")
        summary = Apart(swept, lines, *words, output=results.with_suffix(".txt")).answer()
        assert set(summary.status.values()) == {"done"}
        ours = tables(results)
        ours["runs"]["sweep"] = expected["runs"]["sweep"]  # only the name differs
        assert_same(ours, expected)


@long
@pytest.mark.parametrize("seed", range(1, 9))
def test_the_order_of_hashes_changes_no_number(
    seed: int, tmp_path: Path, unkilled: Callable[[int], Unkilled]
) -> None:
    results = tmp_path / "results"
    here = Path(__file__).with_name("sweeping.py")
    subprocess.run(
        [sys.executable, here, *SWEEP, f"seed={numbers(FEW)}", f"--results={results}"],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )
    assert_same(tables(results), unkilled(FEW).tables)
