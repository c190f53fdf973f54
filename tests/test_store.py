"""The results folder: whole writes, checked reads, locks, tables and the packed ledger."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandas.testing as pdt
import pyarrow as pa
import pytest

from lora_lab import config as configs
from lora_lab import schema
from lora_lab.registry import WrongInput
from lora_lab.store import (
    Busy,
    Corrupt,
    RunDir,
    Store,
    StoreError,
    Tables,
    load,
    pack,
    write_bytes,
)
from lora_lab.store.files import KEPT_BITS, rounded

ONE, TWO, THREE = "0123456789ab", "fedcba987654", "aaaaaaaaaaaa"
LAYERS = ["encoder.layer.0.attention.self.query", "encoder.layer.11.output.dense", "pooler.dense"]
METRICS = {
    "score": 0.75,
    "validation_score": 0.7,
    "loss": 0.5,
    "trainable": 100,
    "adapter_parameters": 60,
    "frozen": 900,
    "total": 1000,
    "trainable_percent": 10.0,
    "steps": 8,
    "seconds": 2.5,
    "train_seconds": 2.0,
    "samples_per_second": 128.0,
    "peak_memory": 512.0,
}
PROVENANCE = {"git_commit": "c" * 40, "git_dirty": False, "threads": 1, "torch": "2.13.0"}
WORK = ("checkpoint", "snapshot")
NAMES = ("runs", "measures", "traces", "spectra", "examples")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # no power cut here, and tests stay fast
    return Store(tmp_path / "results", create=True)


def config(run_id: str, **adapter: Any) -> dict[str, Any]:
    inner = {
        "model": {"choice": "planted", "start": ""},
        "data": {"choice": "planted", "train_examples": None},
        "adapter": {"choice": "lora", **adapter} if adapter else {"choice": "full"},
        "seed": 0,
    }
    return {"run_id": run_id, "version": "0.1", "config": inner}


def measure_rows(name: str, value: float, k: float | None = None) -> pd.DataFrame:
    rows = [(8, layer, name, k, "", value) for layer in reversed(LAYERS)]
    return pd.DataFrame(rows, columns=["step", "layer", "measure", "k", "side", "value"])


def train(run: RunDir, score: float = 0.75, diverged: bool = False, **adapter: Any) -> None:
    """What a training leaves, in its order."""
    with run.lock():
        run.begin(config(run.run_id, **adapter), {**PROVENANCE, "started": f"at {score}"})
        for name in WORK:
            write_bytes(run.work / name, b"whole")
        traces = [(s, layer, "update_norm", s * score) for s in (1, 8) for layer in LAYERS]
        run.write_table("traces", pd.DataFrame(traces, columns=["step", "layer", "trace", "value"]))
        spectra = [(8, layer, i, score / i) for layer in LAYERS for i in (1, 2, 3)]
        run.write_table("spectra", pd.DataFrame(spectra, columns=["step", "layer", "i", "sigma"]))
        oracle = [(8, "", "oracle_score", 1.0, "trained_head", score)]
        run.write_table("oracle", pd.DataFrame(oracle, columns=measure_rows("", 0).columns))
        run.write_table("examples", pd.DataFrame({"i": [0, 1, 2], "value": [1.0, 0.0, score]}))
        run.write_tensors("update", {"a.dW": np.arange(6, dtype=np.float32).reshape(2, 3) + score})
        run.write_tensors("adapter_model", {"a.A": np.ones((2, 3)) * score}, {"format": "pt"})
        run.write_json("adapter_config", {"r": 2, "score": score})
        outcome = {"status": "diverged", "error": "loss is NaN at step 3"} if diverged else {}
        run.write_json("metrics", {**METRICS, "score": score, **outcome})
        run.write_measures(measure_rows("stable_rank", 1.5), ["stable_rank"])
        run.seal()


def tables(root: Path) -> dict[str, pd.DataFrame]:
    """The four tables; a corrupt file in them fails the test."""
    with warnings.catch_warnings(action="error"):
        loaded = load(root)
        return {name: getattr(loaded, name) for name in NAMES}


def assert_equal(ours: dict[str, pd.DataFrame], theirs: dict[str, pd.DataFrame]) -> None:
    for name in NAMES:
        pdt.assert_frame_equal(ours[name], theirs[name], check_exact=True)


def assert_packed(ours: dict[str, pd.DataFrame], whole: dict[str, pd.DataFrame]) -> None:
    """Measured numbers to `KEPT_BITS`, all else as it was."""
    for name in NAMES:
        exact = name == "runs"
        limit = None if exact else 2.0**-KEPT_BITS
        pdt.assert_frame_equal(ours[name], whole[name], check_exact=exact, rtol=limit, atol=0.0)


# ---- whole or absent -------------------------------------------------------------------------


class Crash(BaseException):
    """The machine stops; nothing that follows reaches the disk."""


class Disk:
    """Counts what reaches the disk and stops at one index; a file not yet synced is torn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None) -> None:
        self.count, self.stop, self.calls = 0, stop, list[tuple[str, Any]]()
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Any) -> Any:
        def watched(*args: Any, **options: Any) -> Any:
            here = self.count
            self.count += 1
            if self.stop is not None and here >= self.stop:
                if name == "fsync" and here == self.stop:
                    self._tear(args[0])
                raise Crash
            if name == "fsync":
                self.calls.append((name, os.fstat(args[0]).st_ino))
                return None
            if name == "replace":
                inodes = os.stat(args[0]).st_ino, os.stat(Path(args[1]).parent).st_ino
                self.calls.append(("move" if os.path.isdir(args[0]) else name, inodes))
            return call(*args, **options)

        return watched

    @staticmethod
    def _tear(fd: int) -> None:
        with suppress(OSError):  # a folder, or a file that is only read
            os.ftruncate(fd, os.fstat(fd).st_size // 2)


def scenario(root: Path) -> None:
    """Everything that writes; a second call does only what is missing."""
    store = Store(root, create=True)
    store.write_sweep("demo", [ONE])
    run = store.run(ONE)
    if not run.done:
        train(run, r=2)
    if "effective_rank" not in run.measured():
        run.write_measures(measure_rows("effective_rank", 2.5), ["effective_rank"])
    pack(store)


def assert_sound(root: Path) -> None:
    """Nothing half written is seen by any reader."""
    if not root.exists():
        return
    store = Store(root)
    found = tables(root)
    assert set(store.sweeps()) <= {"demo"}
    assert all(v == [ONE] for v in store.sweeps().values())
    run = store.run(ONE)
    kept = run.path / "work"
    if kept.exists():
        whole = {f.name: f.read_bytes() for f in kept.iterdir() if not f.name.startswith(".tmp-")}
        assert set(whole.values()) <= {b"whole"}
        # Once the run is being sealed nothing is added: it goes at once or not at all.
        assert set(whole) == set(WORK) or not (run.path / "checksums.json").exists()
    if run.done:
        assert run.verify() == []
        assert found["runs"].score.tolist() == [0.75]
        assert len(found["traces"]) == 6
        assert len(found["spectra"]) == 9
        named = set(found["measures"].measure) - {"oracle_score"}
        assert named == run.measured()
        assert "stable_rank" in named
    else:
        assert store.finished() == set()
        assert found["measures"].empty
        assert found["traces"].empty
        assert set(found["runs"].status) <= {"interrupted"}
        assert found["runs"].score.isna().all()


def assert_ledger_sound(root: Path) -> None:
    """A packed run is there with all its rows, as a clone without the runs would see it."""
    if not (root / "ledger").exists():
        return
    clone = root.with_name(f"{root.name} clone")
    shutil.copytree(root / "ledger", clone / "ledger")
    found = tables(clone)
    sizes = [len(found[name]) for name in NAMES]
    assert sizes in ([0, 0, 0, 0, 0], [1, 7, 6, 9, 3])


def test_a_crash_at_any_moment_leaves_no_half_record_and_the_same_command_ends_alike(
    tmp_path: Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, None)
        scenario(tmp_path / "whole")
    expected, steps = tables(tmp_path / "whole"), disk.count
    assert steps > 60
    for stop in range(steps):
        root = tmp_path / f"crash{stop}"
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, stop)
            with pytest.raises(Crash):
                scenario(root)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, None)
            assert_sound(root)
            assert_ledger_sound(root)
            scenario(root)
        assert_equal(tables(root), expected)
        for packed in (root / "ledger").glob("[!.]*"):
            assert packed.read_bytes() == (tmp_path / "whole/ledger" / packed.name).read_bytes()


def test_a_crash_while_a_run_begins_again_keeps_its_checkpoint(store: Store) -> None:
    run = store.run(ONE)
    with run.lock():
        run.begin(config(ONE, r=2), PROVENANCE)
        write_bytes(run.work / "checkpoint", b"step 4")
    ended = False
    for stop in range(100):
        run.fail("killed")
        with pytest.MonkeyPatch.context() as patch, run.lock():
            Disk(patch, stop)
            try:
                run.begin(config(ONE, r=2), PROVENANCE)
                ended = True
            except Crash:
                pass
        if ended:
            break
    with run.lock():
        run.begin(config(ONE, r=2), PROVENANCE)
    assert ended
    assert stop > 5
    assert (run.work / "checkpoint").read_bytes() == b"step 4"


def test_a_file_is_synced_before_its_rename_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, None)
    scenario(tmp_path / "results")
    renames = [(i, inodes) for i, (name, inodes) in enumerate(disk.calls) if name == "replace"]
    assert len(renames) > 15
    for i, (file, folder) in renames:
        assert disk.calls[i - 1] == ("fsync", file)
        assert disk.calls[i + 1] == ("fsync", folder)


def test_done_is_the_last_file_of_a_run_and_work_is_gone_before(store: Store) -> None:
    run = store.run(ONE)
    train(run)
    last = max(run.path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert last.name == "DONE"
    assert not (run.path / "work").exists()
    assert not [p for p in run.path.iterdir() if p.name.startswith(".tmp-")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_or_forbidden_disk_is_one_line_and_keeps_what_was_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = store.cache / "kept"
    write_bytes(path, b"old")

    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StoreError) as caught:
        write_bytes(path, b"new")
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "GB free" in message
    assert os.strerror(code) in message
    assert [p.name for p in store.cache.iterdir()] == ["kept"]
    assert path.read_bytes() == b"old"


# ---- locks and status ------------------------------------------------------------------------

HOLDER = """
import sys
from lora_lab.store import Store
run = Store(sys.argv[1]).run(sys.argv[2])
with run.lock():
    print("held", "torch" in sys.modules, flush=True)
    sys.stdin.read()
"""


def test_a_lock_holds_across_processes_until_its_holder_is_killed(store: Store) -> None:
    run = store.run(ONE)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.root), ONE],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held False\n"  # held, and without importing torch
        assert run.status() == "running"
        assert load(store.root).runs.status.tolist() == ["running"]
        with pytest.raises(Busy, match=ONE), run.lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert run.status() == "interrupted"
    with run.lock():
        assert store.run(ONE).status() == "running"


def test_of_many_that_want_a_run_at_once_exactly_one_gets_it(store: Store) -> None:
    ready = threading.Barrier(8)

    def want(_: int) -> bool:
        ready.wait()
        try:
            with store.run(ONE).lock():
                ready.wait()
                return True
        except Busy:
            ready.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(want, range(8))) == 1


def test_asking_for_the_status_never_takes_a_run_from_who_wants_it(store: Store) -> None:
    run = store.run(ONE)
    with run.lock():
        pass
    reader = os.open(run.path / "lock", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)  # as `status` does, for a moment
    done = threading.Timer(0.03, os.close, [reader])
    done.start()
    with run.lock():
        done.join()


def test_a_run_goes_from_interrupted_over_running_and_failed_to_done(store: Store) -> None:
    run = store.run(ONE)
    assert run.status() == "interrupted"
    with run.lock():
        run.begin(config(ONE), PROVENANCE)
        assert run.status() == "running"
    assert run.status() == "interrupted"
    run.fail("out of memory", "Traceback ...")
    assert run.status() == "failed"
    assert run.record().error == "out of memory"
    assert store.finished() == set()
    train(run)
    assert run.status() == "done"
    assert store.finished() == {ONE}
    assert run.record().error is None
    assert run.verify() == []


def test_a_diverged_run_is_finished_with_its_own_status(store: Store) -> None:
    train(store.run(ONE), diverged=True)
    assert store.run(ONE).status() == "diverged"
    assert store.finished() == {ONE}


def test_a_finished_run_is_never_written_again_but_for_its_measures(store: Store) -> None:
    run = store.run(ONE)
    train(run)
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    with run.lock():
        for write in (
            lambda: run.begin(config(ONE), PROVENANCE),
            lambda: run.write_json("metrics", {}),
            lambda: run.write_table("traces", pd.DataFrame()),
            lambda: run.write_tensors("update", {}),
            lambda: run.fail("late"),
            lambda: run.work,
            run.seal,
        ):
            with pytest.raises(StoreError, match="finished"):
                write()
    run.write_measures(measure_rows("effective_rank", 2.0), ["effective_rank"])
    after = {p.name: p.read_bytes() for p in run.path.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"measures.json", "measures.parquet"}
    assert run.verify() == []


def test_a_checkpoint_outlives_an_attempt_only_under_an_equal_config(store: Store) -> None:
    run = store.run(ONE)
    with run.lock():
        run.begin(config(ONE, r=2), PROVENANCE)
        write_bytes(run.work / "checkpoint", b"step 4")
        run.write_json("metrics", METRICS)
        run.log.write_text("first attempt\n")
    run.fail("killed")
    with run.lock():
        run.begin(config(ONE, r=2), PROVENANCE)
        assert (run.work / "checkpoint").read_bytes() == b"step 4"
        assert run.log.read_text() == "first attempt\n"
        left = {p.name for p in run.path.iterdir()}
        assert left == {"config.json", "provenance.json", "lock", "log.txt", "work"}
        run.begin(config(ONE, r=3), PROVENANCE)
        assert not list(run.work.iterdir())


# ---- contents and their checksums -------------------------------------------------------------


def test_tensors_tables_and_json_come_back_as_they_were(store: Store) -> None:
    run = store.run(ONE)
    array = np.arange(6, dtype=np.float64).reshape(2, 3).T  # not contiguous
    rows = pd.concat([measure_rows("b", np.nan), measure_rows("a", 0.1 + 0.2, k=0.95)])
    with run.lock():
        run.begin(config(ONE), PROVENANCE)
        run.write_tensors("update", {"x.dW": array, "x.scale": np.array(2.0, np.float32)})
        run.write_json("metrics", {"score": np.float64(0.1), "loss": float("nan"), "steps": 3})
        run.write_measures(rows, ["a", "b"])
        assert run.read_json("metrics") == {"score": 0.1, "loss": None, "steps": 3}
    back = run.read_tensors("update")
    np.testing.assert_array_equal(back["x.dW"], array)
    assert back["x.dW"].dtype == np.float64
    assert back["x.scale"].shape == ()
    kinds = {n: k for n, (k, _) in schema.MEASURES.items() if n not in ("module", "depth")}
    read = run.read_measures()
    assert dict(read.dtypes.astype(str)) == {n: k for n, k in kinds.items() if n != "run_id"}
    assert set(read.value[read.measure == "a"]) == {0.1 + 0.2}
    assert read.value[read.measure == "b"].isna().all()
    assert read.k[read.measure == "b"].isna().all()


def test_a_run_has_a_file_that_was_sealed_even_when_it_is_lost(store: Store) -> None:
    run = store.run(ONE)
    assert not run.has_tensors("update")
    assert not run.has_json("metrics")
    train(run)
    (run.path / "update.safetensors").unlink()
    assert run.has_tensors("update")
    assert run.has_json("metrics")
    assert not run.has_tensors("head")
    assert not run.has_json("layers")
    with pytest.raises(Corrupt, match="missing"):
        run.read_tensors("update")


def test_a_measure_added_later_joins_the_others_and_replaces_its_own_older_rows(
    store: Store,
) -> None:
    run = store.run(ONE)
    train(run)
    assert run.measured() == {"stable_rank"}
    run.write_measures(measure_rows("effective_rank", 2.0), ["effective_rank"])
    run.write_measures(measure_rows("stable_rank", 9.0), ["stable_rank", "gives_no_row"])
    assert run.measured() == {"stable_rank", "effective_rank", "gives_no_row"}
    read = run.read_measures()
    assert read.groupby("measure").value.agg(list).to_dict() == {
        "effective_rank": [2.0] * 3,
        "stable_rank": [9.0] * 3,
    }


def test_the_order_in_which_rows_and_measures_come_does_not_change_the_file(store: Store) -> None:
    for run, order in ((store.run(ONE), ("a", "b")), (store.run(TWO), ("b", "a"))):
        for name in order:
            rows = measure_rows(name, 1.0)
            run.write_measures(rows[::-1] if name == order[0] else rows, [name])
    files = [(store.run(i).path / "measures.parquet").read_bytes() for i in (ONE, TWO)]
    assert files[0] == files[1]


def flip(path: Path, other: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "first byte": lambda path, other: flip(path, other, 0.0),
    "a byte before the middle": lambda path, other: flip(path, other, 0.4),
    "a byte behind the middle": lambda path, other: flip(path, other, 0.7),
    "last byte": lambda path, other: flip(path, other, 1.0),
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path, other: path.write_bytes(b""),
    "missing": lambda path, other: path.unlink(),
    "swapped": lambda path, other: path.write_bytes(other.read_bytes()),
    "a link": lambda path, other: (path.unlink(), path.symlink_to(other)),
}
KINDS = {
    "config.json": lambda run: run.read_json("config"),
    "provenance.json": lambda run: run.read_json("provenance"),
    "metrics.json": lambda run: run.read_json("metrics"),
    "adapter_config.json": lambda run: run.read_json("adapter_config"),
    "traces.parquet": lambda run: run.read_table("traces"),
    "spectra.parquet": lambda run: run.read_table("spectra"),
    "examples.parquet": lambda run: run.read_table("examples"),
    "oracle.parquet": lambda run: run.read_table("oracle"),
    "update.safetensors": lambda run: run.read_tensors("update"),
    "adapter_model.safetensors": lambda run: run.read_tensors("adapter_model"),
    "checksums.json": lambda run: run.read_json("config"),
    "DONE": lambda run: run.read_json("config"),
}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        store = Store(tmp_path_factory.mktemp("two") / "results", create=True)
        train(store.run(ONE), r=2)
        train(store.run(TWO), score=0.5, r=4)
    return store.root


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_damage_to_a_file_is_found_before_its_content_is_used(
    two_runs: Path, tmp_path: Path, name: str
) -> None:
    for number, (damage, apply) in enumerate(DAMAGE.items()):
        root = tmp_path / str(number)
        shutil.copytree(two_runs, root)
        store = Store(root)
        run, other = store.run(ONE), store.run(TWO).path / name
        apply(run.path / name, other)
        if damage == "missing" and name == "DONE":
            assert store.finished() == {TWO}
            assert run.status() == "interrupted"
            continue
        fresh = store.run(ONE)
        assert fresh.verify() == ["checksums.json" if name == "DONE" else name], damage
        with pytest.raises(Corrupt):
            KINDS[name](store.run(ONE))
        aside = fresh.quarantine("fails its checksum")
        assert aside is not None
        assert aside.name == f"{ONE}.corrupt-1"
        assert json.loads((aside / "quarantine.json").read_text())["reason"]
        assert store.finished() == {TWO}
        assert store.run_ids() == [TWO]


def test_a_sound_run_is_not_quarantined_and_a_second_corrupt_one_gets_its_own_name(
    store: Store,
) -> None:
    for number in (1, 2):
        run = store.run(ONE)
        train(run)
        assert run.quarantine("a rumour") is None
        assert run.done
        (run.path / "metrics.json").write_text("{}")
        aside = run.quarantine("metrics.json differs")
        assert aside is not None
        assert aside.name == f"{ONE}.corrupt-{number}"
    assert sorted(p.name for p in (store.root / "runs").iterdir()) == [
        f"{ONE}.corrupt-1",
        f"{ONE}.corrupt-2",
    ]


@pytest.mark.parametrize("name", ["measures.parquet", "measures.json"])
def test_corrupt_measures_are_computed_again_without_training(
    two_runs: Path, tmp_path: Path, name: str
) -> None:
    for number, (damage, apply) in enumerate(DAMAGE.items()):
        if (name, damage) == ("measures.json", "last byte"):
            continue  # a line end, which says nothing
        root = tmp_path / str(number)
        shutil.copytree(two_runs, root)
        run, other = Store(root).run(ONE), Store(root).run(TWO)
        for value in (7.0, 8.0):  # twice: a manifest also knows the content before the last
            other.write_measures(measure_rows("stable_rank", value), ["stable_rank"])
        apply(run.path / name, other.path / name)
        assert run.measured() == set(), damage
        with pytest.warns(UserWarning, match="measures"):
            rows = load(root).measures
        assert set(rows.measure[rows.run_id == ONE]) == {"oracle_score"}
        assert run.verify() == []
        assert run.done
        run.write_measures(measure_rows("stable_rank", 1.5), ["stable_rank"])
        other.write_measures(measure_rows("stable_rank", 1.5), ["stable_rank"])
        assert_equal(tables(root), tables(two_runs))


# ---- tables ----------------------------------------------------------------------------------


def assert_typed(frame: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> None:
    assert {n: str(frame[n].dtype) for n in columns} == {
        n: kind for n, (kind, _) in columns.items()
    }


def test_an_empty_results_folder_gives_empty_tables_with_their_columns(store: Store) -> None:
    empty = tables(store.root)
    for name, columns in (
        ("runs", schema.RUNS),
        ("measures", schema.MEASURES),
        ("traces", schema.TRACES),
        ("spectra", schema.SPECTRA),
        ("examples", schema.EXAMPLES),
    ):
        assert len(empty[name]) == 0
        assert_typed(empty[name], columns)
    assert {"model", "data", "adapter", "seed", "git_commit"} <= set(empty["runs"].columns)
    assert store.finished() == set()
    assert store.run_ids() == []
    assert store.stored_configs() == {}


def test_tables_have_the_columns_and_types_of_the_schema(store: Store) -> None:
    train(store.run(TWO), r=4, alpha=8.0)
    train(store.run(ONE))
    store.write_sweep("rank", [ONE, TWO])
    store.write_sweep("demo", [ONE])
    found = tables(store.root)
    for name, columns in (
        ("measures", schema.MEASURES),
        ("traces", schema.TRACES),
        ("spectra", schema.SPECTRA),
        ("examples", schema.EXAMPLES),
    ):
        assert list(found[name].columns) == list(columns)
        assert_typed(found[name], columns)
        assert found[name].run_id.is_monotonic_increasing
    runs = found["runs"].set_index("run_id", drop=False)
    assert_typed(runs, schema.RUNS)
    assert runs.sweep.to_dict() == {ONE: "demo,rank", TWO: "rank"}
    assert runs.adapter.to_dict() == {ONE: "full", TWO: "lora"}
    assert runs["adapter.r"][TWO] == 4
    assert np.isnan(runs["adapter.r"][ONE])
    assert runs.git_commit[ONE] == "c" * 40
    assert runs["data.train_examples"].isna().all()
    assert runs.error.isna().all()
    assert runs.score.tolist() == [0.75, 0.75]
    by_layer = found["measures"].drop_duplicates("layer").set_index("layer")
    assert by_layer.module[LAYERS[0]] == "query"
    assert by_layer.depth[LAYERS[1]] == 11
    assert np.isnan(by_layer.depth[LAYERS[2]])
    assert set(found["measures"].measure) == {"stable_rank", "oracle_score"}


def test_a_condition_chooses_the_runs_whose_tables_are_read(store: Store) -> None:
    train(store.run(TWO), r=4, alpha=8.0)
    train(store.run(ONE))
    found = load(store.root, where="adapter.r >= 4")
    assert set(found.runs.run_id) == {TWO} == set(found.measures.run_id)
    with pytest.raises(WrongInput, match=r"adapter\.r"):
        load(store.root, where="adapter.rr >= 4")


def test_unfinished_and_diverged_runs_are_listed_without_a_score_or_measures(store: Store) -> None:
    train(store.run(ONE))
    train(store.run(TWO), diverged=True)
    failed = store.run(THREE)
    with failed.lock():
        failed.begin(config(THREE), PROVENANCE)
        failed.write_json("metrics", METRICS)
    failed.fail("Traceback\nMemoryError: too big")
    found = tables(store.root)
    runs = found["runs"].set_index("run_id")
    assert runs.status.to_dict() == {ONE: "done", TWO: "diverged", THREE: "failed"}
    assert runs.score.isna().to_dict() == {ONE: False, TWO: True, THREE: True}
    assert runs.error[TWO] == "loss is NaN at step 3"
    assert runs.error[THREE] == "MemoryError: too big"
    assert np.isnan(runs.trainable[THREE])
    assert runs.trainable[ONE] == 100
    assert set(found["measures"].run_id) == {ONE} == set(found["spectra"].run_id)
    assert set(found["traces"].run_id) == {ONE, TWO}


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "checksums.json", "DONE"])
def test_a_run_with_an_unreadable_record_is_interrupted_and_says_which_file(
    two_runs: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(two_runs, tmp_path / "r")
    (tmp_path / "r/runs" / ONE / name).write_bytes(b"\x00{")
    loaded = load(tmp_path / "r")
    with pytest.warns(UserWarning, match=ONE):
        runs = loaded.runs.set_index("run_id")
    assert runs.status.to_dict() == {ONE: "interrupted", TWO: "done"}
    expected = "checksums.json" if name == "DONE" else name
    assert expected in runs.error[ONE]
    assert set(loaded.measures.run_id) == {TWO}


@pytest.mark.parametrize("name", ["traces", "spectra", "oracle", "examples"])
def test_a_corrupt_table_costs_only_its_own_rows_and_is_named(
    two_runs: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(two_runs, tmp_path / "r")
    flip(tmp_path / "r/runs" / ONE / f"{name}.parquet", Path(), 0.5)
    loaded = load(tmp_path / "r")
    table = "measures" if name == "oracle" else name
    with pytest.warns(UserWarning, match=f"{name}.parquet"):
        rows = getattr(loaded, table)
    assert len(loaded.problems) == 1
    assert ONE in loaded.problems[0]
    whole = getattr(load(two_runs), table)
    lost = (whole.run_id == ONE) & ((whole.measure == "oracle_score") if name == "oracle" else True)
    pdt.assert_frame_equal(rows, whole[~lost].reset_index(drop=True))


def test_stored_configs_tell_when_a_default_changed_in_the_code(store: Store) -> None:
    ours = configs.RunConfig()
    old = configs.as_dict(ours)
    old["train"]["clip"] = 7.0
    run = store.run(configs.run_id(ours))
    with run.lock():
        run.begin({"run_id": run.run_id, "config": old, "version": "0.1"}, PROVENANCE)
        run.write_json("metrics", METRICS)
        assert store.stored_configs() == {}
        run.seal()
    assert configs.changed_default(ours, store.stored_configs()[run.run_id]) == "train.clip"
    pack(store)
    shutil.rmtree(store.root / "runs")
    assert configs.changed_default(ours, store.stored_configs()[run.run_id]) == "train.clip"


# ---- the packed ledger -----------------------------------------------------------------------


def test_packed_runs_give_the_same_tables_and_count_as_done(store: Store) -> None:
    train(store.run(ONE), r=4, alpha=8.0)
    train(store.run(TWO))
    train(store.run(THREE), diverged=True)
    store.write_sweep("demo", [ONE, TWO])
    before = tables(store.root)
    paths = pack(store)
    assert {p.name for p in paths} == {*(f"{n}.parquet" for n in NAMES), "checksums.json"}
    assert_equal(tables(store.root), before)
    shutil.rmtree(store.root / "runs")
    shutil.rmtree(store.root / "sweeps")
    assert_packed(tables(store.root), before)
    assert store.finished() == {ONE, TWO, THREE} == store.packed_ids()
    assert store.run_ids() == []


def test_packing_again_changes_no_byte_and_writes_nothing(store: Store) -> None:
    train(store.run(ONE), r=4)
    first = {p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in pack(store)}
    assert {
        p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in pack(store)
    } == first
    shutil.rmtree(store.root / "runs")
    assert {
        p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in pack(store)
    } == first


def test_packed_numbers_keep_four_digits_and_counts_and_missing_ones_stay() -> None:
    exact = [0.0, -0.0, math.nan, math.inf, 1.0, -3.0, 4097.0, 8191.0, 0.5, 2.0**-1074]
    kept = rounded(pa.table({"run_id": ["a"] * len(exact), "null": exact}))
    np.testing.assert_array_equal(kept["null"].to_numpy(), exact)
    assert np.signbit(kept["null"].to_numpy()[1])
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1000) * 10.0 ** rng.integers(-200, 200, 1000)
    once = rounded(pa.table({"sigma": values}))
    kept = once["sigma"].to_numpy()
    assert (kept != values).mean() > 0.9
    np.testing.assert_allclose(kept, values, rtol=2.0**-KEPT_BITS, atol=0)
    assert rounded(once).equals(once)


def test_packing_adds_to_what_was_packed_before_whatever_the_order(tmp_path: Path) -> None:
    ledgers = []
    for order in ((ONE, TWO), (TWO, ONE)):
        store = Store(tmp_path / order[0], create=True)
        for run_id in order:
            train(store.run(run_id), r=2)
            ledger = pack(store)
            shutil.rmtree(store.root / "runs")
        assert store.packed_ids() == {ONE, TWO}
        ledgers.append([p.read_bytes() for p in ledger])
    assert ledgers[0] == ledgers[1]


def test_a_run_on_disk_wins_over_its_packed_self_only_when_it_is_finished(store: Store) -> None:
    train(store.run(ONE), score=0.25)
    pack(store)
    shutil.rmtree(store.root / "runs")
    with store.run(ONE).lock():  # it is being trained again
        assert tables(store.root)["runs"].status.tolist() == ["done"]
    train(store.run(ONE), score=0.5)
    store.run(ONE).write_measures(measure_rows("effective_rank", 2.0), ["effective_rank"])
    found = tables(store.root)
    assert found["runs"].score.tolist() == [0.5]
    assert found["measures"].groupby("measure").size().to_dict() == {
        "effective_rank": 3,
        "oracle_score": 1,
        "stable_rank": 3,
    }
    pack(store)
    shutil.rmtree(store.root / "runs")
    assert_packed(tables(store.root), found)


@pytest.mark.parametrize("name", ["metrics.json", "traces.parquet", "measures.parquet"])
def test_a_corrupt_run_is_not_packed(store: Store, name: str) -> None:
    train(store.run(ONE), r=4)
    train(store.run(TWO), r=4)
    flip(store.run(ONE).path / name, Path(), 0.5)
    with pytest.raises(StoreError, match=name) as caught:
        pack(store)
    assert "\n" not in str(caught.value)
    assert not (store.root / "ledger").exists()


@pytest.mark.parametrize("name", [*(f"{n}.parquet" for n in NAMES), "checksums.json"])
def test_a_corrupt_ledger_costs_only_what_it_holds_and_is_never_overwritten(
    store: Store, name: str
) -> None:
    train(store.run(ONE), r=4)
    pack(store)
    shutil.rmtree(store.root / "runs")
    train(store.run(TWO), r=4)
    content = (store.root / "ledger" / name).read_bytes()
    # Of the checksums, that of the runs.
    at = content.index(b"runs") / len(content) if name == "checksums.json" else 0.5
    flip(store.root / "ledger" / name, Path(), at)
    before = {p.name: p.read_bytes() for p in (store.root / "ledger").iterdir()}
    loaded = load(store.root)
    with pytest.warns(UserWarning, match="ledger"):
        found = [set(getattr(loaded, table).run_id) for table in NAMES]
    assert all(TWO in ids for ids in found)
    with pytest.raises(StoreError, match="nothing packed"):
        pack(store)
    assert {p.name: p.read_bytes() for p in (store.root / "ledger").iterdir()} == before
    if name in ("runs.parquet", "checksums.json"):
        with pytest.raises(Corrupt):
            store.finished()  # training everything again would be worse than stopping


# ---- names -----------------------------------------------------------------------------------

HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "x\0y",
    "x\n",
    "\u202egnp.exe",
    "ä",
    "~",
    "$HOME",
    ".hidden",
    "x" * 300,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_in_one_line_and_make_nothing(store: Store, name: str) -> None:
    before = sorted(store.root.parent.rglob("*"))
    for ask in (
        lambda: store.run(name),
        lambda: store.write_sweep(name, [ONE]),
        lambda: store.write_sweep("good", [ONE, name]),
    ):
        with pytest.raises(WrongInput) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert sorted(store.root.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["0123456789AB", "0123456789a", "0123456789abc", " 123456789ab"])
def test_a_run_id_is_exactly_twelve_lower_case_hexadecimal_digits(store: Store, name: str) -> None:
    with pytest.raises(WrongInput, match="12 hexadecimal digits"):
        store.run(name)


@pytest.mark.parametrize("name", ["demo", "rank_2", "a.b-c", "x" * 80])
def test_ordinary_sweep_names_are_taken_and_the_last_call_counts(store: Store, name: str) -> None:
    store.write_sweep(name, [ONE, TWO])
    store.write_sweep(name, [TWO])
    assert store.sweeps() == {name: [TWO]}


@pytest.mark.parametrize("name", ["runs", "sweeps", "ledger", "cache", f"runs/{ONE}"])
def test_a_link_inside_the_results_folder_does_not_lead_writes_outside(
    tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / "results" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(WrongInput, match="is a link"):
        train(Store(tmp_path / "results", create=True).run(ONE))
    assert list(outside.iterdir()) == []


def test_a_results_folder_that_is_itself_a_link_or_has_dots_is_resolved_once(
    tmp_path: Path,
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("link", "real/../link"):
        assert Store(tmp_path / name).root == tmp_path / "real"


def test_a_reader_refuses_a_missing_folder_in_one_line_and_makes_nothing(tmp_path: Path) -> None:
    for ask in (load, Store):
        with pytest.raises(WrongInput, match=r"lora-lab sweep demo.*--results DIR") as caught:
            ask(tmp_path / "nowhere")
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_or_an_impossible_name_is_no_results_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in (str(tmp_path / "file"), "x\0y", str(tmp_path / ("n" * 300))):
        with pytest.raises(WrongInput):
            Store(name)
        with pytest.raises((WrongInput, StoreError)) as caught:
            Store(name, create=True)
        assert "\n" not in str(caught.value)


def test_reading_a_results_folder_changes_nothing_in_it(two_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(two_runs, tmp_path / "r")
    (tmp_path / "r/runs" / THREE).mkdir()
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "r").rglob("*"))
    tables(tmp_path / "r")
    store = Store(tmp_path / "r")
    store.finished(), store.stored_configs(), store.run(ONE).verify(), store.run(THREE).status()
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "r").rglob("*")) == before
    assert isinstance(load(tmp_path / "r"), Tables)
