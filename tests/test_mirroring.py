"""W&B as a mirror: what the real client wrote offline holds every record of the ledger once."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pandas.testing as pdt
import pytest
from sweeping import SMALL, Apart, lab, stamps
from wandb_files import Kept, offline

from lora_lab.cli import main
from lora_lab.config import RunConfig, Tracker
from lora_lab.hydra_bridge import plan
from lora_lab.mirroring import IN_A_ROW, Mirrored, mirror_missing
from lora_lab.store import Store, Tables, load, pack
from lora_lab.trackers.content import STEP, Contents, trace_metric
from lora_lab.trackers.wandb import WandbMirror

SWEEP = ("train", *SMALL, "host.workers=2", "adapter=full,lora", "host.tracker=offline")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def at_home(results: Path) -> None:
    """What the client writes to a user's home lands where it is seen."""
    os.environ["HOME"] = str(results.with_name("home"))
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        os.environ.pop(name, None)


class Home:
    """`at_home` as a patch, which is pickled; `kill_at` ends the process at its n-th table."""

    def __init__(self, results: Path, kill_at: int = 0) -> None:
        self.results, self.kill_at = results, kill_at

    def __call__(self) -> None:
        at_home(self.results)
        if self.kill_at:
            from lora_lab.trackers import wandb

            real, left = wandb._table, [self.kill_at]

            def table(rows: pd.DataFrame) -> Any:
                left[0] -= 1
                if not left[0]:
                    time.sleep(0.2)  # what was told before reaches the client's file
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(rows)

            wandb._table = table


def call(results: Path, *argv: str, kill_at: int = 0) -> Apart:
    """`lora-lab ARGV` with the real client, in a process of its own."""
    return Apart(
        lab,
        *argv,
        f"--results={results}",
        output=results.with_name("out.txt"),
        patch=Home(results, kill_at),
    )


def synced(results: Path, *argv: str) -> str:
    """What `lora-lab sync` says."""
    results.with_name("out.txt").unlink(missing_ok=True)
    done = call(results, "sync", *argv)
    assert done.wait() == 0, done.output.read_text()
    assert done.gone() == []
    return done.output.read_text()


def nothing_to_do(results: Path, *argv: str) -> bool:
    """Whether `lora-lab sync` finds everything mirrored, and so asks no client."""
    before = folders(results)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["sync", *argv, f"--results={results}"]) == 0
    assert folders(results) == before
    return "nothing to do" in said.getvalue()


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs that a sweep with an offline tracker has made."""
    results = tmp_path_factory.mktemp("mirrored") / "results"
    sweep = call(results, *SWEEP, "seed=0,1")
    assert sweep.wait() == 0, sweep.output.read_text()
    assert sweep.gone() == []
    return results


@pytest.fixture
def copy(mirrored: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(mirrored, tmp_path / "results", symlinks=True))


def folders(results: Path) -> dict[str, int]:
    """Offline folders and when they were made."""
    return {p.name: p.stat().st_ctime_ns for p in (results / "wandb").glob("offline-run-*")}


def assert_whole(results: Path, ids: set[str] | None = None) -> dict[str, Kept]:
    """Every record of the ledger is in the offline files, once, and nothing else is."""
    found, ledger = offline(results), load(results)
    ids = set(ledger.runs["run_id"]) if ids is None else ids
    assert {name for name in found if not name.startswith("report-")} == ids
    for run_id in ids:
        kept = found[run_id]
        assert kept.exit == 0
        traces = ledger.traces[ledger.traces["run_id"] == run_id]
        assert len(traces)
        metrics = map(trace_metric, traces["trace"], traces["layer"])
        ours = sorted(zip(traces["step"], metrics, traces["value"], strict=True))
        sections = ("train/", "grad/", "trace/", "validation/")
        theirs = sorted(
            (row[STEP], name, value)
            for row in kept.history
            for name, value in row.items()
            if name.startswith(sections) and name != STEP
        )
        assert theirs == ours
        for name in ("measures", "spectra", "examples"):
            rows = getattr(ledger, name)
            rows = rows[rows["run_id"] == run_id].drop(columns="run_id").reset_index(drop=True)
            assert len(rows)
            pdt.assert_frame_equal(kept.table(name).astype(rows.dtypes), rows, check_exact=True)
    return found


# ---- what is there -----------------------------------------------------------------------------


def test_a_sweeps_offline_files_hold_every_record_of_the_ledger_once(mirrored: Path) -> None:
    assert len(assert_whole(mirrored)) == 4


def test_a_run_is_found_in_w_and_b_by_sweep_method_tags_and_config(mirrored: Path) -> None:
    runs = load(mirrored).runs
    row = runs[(runs["adapter"] == "lora") & (runs["seed"] == 1)].iloc[0]
    kept = offline(mirrored)[row["run_id"]]
    run = kept.run
    assert (run.project, run.run_group, run.job_type) == ("lora_lab", "train", "lora")
    assert list(run.tags) == ["planted", "planted", "lora"]
    assert kept.config["adapter.r"] == row["adapter.r"]
    assert kept.config["provenance.git_commit"] == row["git_commit"]
    assert kept.summary["eval/score"] == row["score"]
    assert kept.summary["run/trainable"] == row["trainable"]
    assert kept.steps["*"] == STEP


def test_a_measure_is_averaged_over_the_layers_of_a_module_at_each_step(mirrored: Path) -> None:
    measures = load(mirrored).measures
    run_id = measures["run_id"].iloc[0]
    own = measures[(measures["run_id"] == run_id) & (measures["measure"] == "stable_rank")]
    means = own[own["module"] == "q"].groupby("step")["value"].mean().to_dict()
    kept, name = offline(mirrored)[run_id], "rank/stable/q"
    assert {row[STEP]: row[name] for row in kept.history if name in row} == means
    assert len(means) > 1
    assert kept.summary[name] == means[max(means)]
    assert "rank/energy/0.95/q" in kept.summary
    assert not [name for name in kept.summary if "truncation_error" in name]


def test_the_client_writes_nothing_outside_of_the_results(mirrored: Path) -> None:
    assert sorted(p.name for p in mirrored.parent.iterdir()) == ["out.txt", "results"]


def test_reports_and_updates_are_attached_when_sync_is_asked(copy: Path) -> None:
    assert "4 runs and 1 report" in synced(copy, "--update")
    found = assert_whole(copy)
    for run_id in set(found) - {"report-train"}:
        files = found[run_id].artifacts[f"update/update-{run_id}"]
        assert "head.safetensors" in files
        assert {"adapter_model.safetensors", "update.safetensors"} & set(files)
    report = found["report-train"]
    assert (report.run.run_group, report.run.job_type) == ("train", "report")
    [row] = report.history
    page = (report.folder / "files" / row["report"]["path"]).read_text()
    assert "default-src 'none'" in page
    assert all(run_id in page for run_id in stamps(copy))
    images = [value for name, value in row.items() if name.startswith("figures/planted on planted")]
    assert images
    assert all(
        (report.folder / "files" / one["path"]).read_bytes()[1:4] == b"PNG" for one in images
    )
    assert nothing_to_do(copy, "--update")


def test_a_run_that_diverged_is_mirrored_as_failed_with_its_traces(tmp_path: Path) -> None:
    results = tmp_path / "results"
    sweep = call(results, *SWEEP[:-2], "adapter=full", "train.lr=1e30", "host.tracker=offline")
    assert sweep.wait() == 0, sweep.output.read_text()
    [kept] = offline(results).values()
    assert kept.exit == 1
    assert kept.summary["run/status"] == "diverged"
    assert "at step" in kept.summary["run/error"]
    assert "eval/score" not in kept.summary
    assert [row[STEP] for row in kept.history] == sorted(set(load(results).traces["step"]))


# ---- each record exactly once ------------------------------------------------------------------


def test_sync_completes_what_a_killed_sweep_left_and_the_resumed_sweep_the_rest(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"
    sweep = call(results, *SWEEP, "seed=0,1")
    until(lambda: stamps(results))
    sweep.kill(group=False)
    sweep.wait()
    assert sweep.gone() == []
    done = set(stamps(results))
    synced(results, *done)
    assert_whole(results, done)
    assert nothing_to_do(results, *done)
    again = call(results, *SWEEP, "seed=0,1")
    assert again.wait() == 0, again.output.read_text()
    assert len(assert_whole(results)) == 4


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_sync_replaces_what_a_kill_in_its_own_middle_left(copy: Path) -> None:
    shutil.rmtree(copy / "wandb")
    ids = sorted(stamps(copy))
    sync = call(copy, "sync", *ids, kill_at=5)  # in the second run, behind its history
    assert sync.wait() == -signal.SIGKILL
    assert sync.gone() == []
    first, second = offline(copy).values()
    assert (first.run.run_id, first.exit) == (ids[0], 0)
    assert second.exit is None
    before = folders(copy)
    assert "3 runs written" in synced(copy, *ids)
    assert_whole(copy)
    assert [name for name in before if name in folders(copy)] == [first.folder.name]


def test_packed_runs_stand_for_those_on_disk_and_are_mirrored_like_them(copy: Path) -> None:
    ids = sorted(stamps(copy))
    pack(Store(copy))
    shutil.rmtree(copy / "runs")
    assert nothing_to_do(copy, *ids)
    shutil.rmtree(copy / "wandb")
    assert "4 runs written" in synced(copy, *ids)
    assert_whole(copy)


def test_a_run_with_new_rows_is_written_anew_and_no_other(copy: Path) -> None:
    store = Store(copy)
    run_id = sorted(stamps(copy))[0]
    run = store.run(run_id)
    rows = run.read_measures()
    run.write_measures(rows[rows["measure"] == "norm"].assign(value=1.5), ["norm"])
    before = folders(copy)
    assert "1 run written" in synced(copy, *stamps(copy))
    assert_whole(copy)
    assert len(set(before) - set(folders(copy))) == 1


# ---- online ------------------------------------------------------------------------------------


class Server:
    """What W&B keeps of runs online: rows that only grow, as the client's `resume` finds them."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.opened: list[dict[str, Any]] = []

    def init(self, **given: Any) -> Any:
        assert (given["mode"], given["resume"]) == ("online", "allow")
        self.opened.append(given)
        rows = self.rows.setdefault(given["id"], [])

        class Run:
            summary = self.summaries.setdefault(given["id"], {})
            starting_step = rows[-1][0] + 1 if rows else 0

            def define_metric(self, *_: Any, **__: Any) -> None: ...

            def log(self, row: dict[str, Any], step: int) -> None:
                assert not rows or step > rows[-1][0]
                rows.append((step, row))

            def finish(self, exit_code: int) -> None: ...

        return Run()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr("wandb.init", server.init)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    return server


def config_of(run_id: str) -> RunConfig:
    """Config of one of the fixture's runs."""
    every, _ = plan([[*SMALL, "adapter=full,lora", "seed=0,1"]])
    return next(one.config for one in every if one.run_id == run_id)


@pytest.mark.parametrize("sent", [0, 1, 2, 3])
def test_a_run_that_was_watched_killed_and_done_again_has_each_row_once(
    sent: int, copy: Path, server: Server
) -> None:
    run_id = sorted(stamps(copy))[0]
    store, config = Store(copy), config_of(run_id)
    rows = store.run(run_id).read_table("traces").sort_values("step")
    traces = list(rows[["step", "layer", "trace", "value"]].itertuples(index=False, name=None))
    told = [row for row in traces if row[0] <= 3]
    killed = WandbMirror(config, run_id, "train", copy)
    for end in range(1, len(told) + 1):
        killed.follow(told[:end])
    assert [step for step, _ in server.rows[run_id]] == [1, 2], "step 3 may not be complete"
    del server.rows[run_id][sent:]  # the rest never reached the server
    again = WandbMirror(config, run_id, "train", copy)
    again.follow(traces)
    again.finish({"score": 0.5}, failed=False)
    assert server.summaries[run_id]["eval/score"] == 0.5
    assert mirror_missing(store, Tracker.online, [run_id]).done == [run_id]
    whole = Contents(Tables(store, [run_id]))[run_id]
    *history, (_, tables) = server.rows[run_id]
    assert history == whole.history
    assert set(tables) == {"tables/measures", "tables/spectra", "tables/examples"}
    assert server.summaries[run_id] == whole.summary


def test_what_is_online_needs_no_offline_file_and_not_the_other_way_round(
    copy: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = list(stamps(copy))
    assert main(["sync", *ids, f"--results={copy}"]) == 0
    assert "4 runs mirrored to W&B" in capsys.readouterr().out
    assert folders(copy) == {}, "an upload of the offline files would bring everything twice"
    monkeypatch.delenv("WANDB_API_KEY")
    assert nothing_to_do(copy, *ids)
    assert len(server.opened) == 4


def test_without_a_network_sync_gives_up_soon_and_does_the_rest_when_it_is_back(
    copy: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def cut(**given: Any) -> Any:
        tried.append(given["id"])
        raise ConnectionError("the line\nis cut")

    monkeypatch.setattr("wandb.init", cut)
    assert main(["sync", f"--results={copy}"]) == 1
    said = capsys.readouterr()
    assert len(tried) == IN_A_ROW
    assert said.err.splitlines()[0] == f"wandb: {tried[0]}: the line is cut"
    assert said.out == "4 left: `lora-lab sync` does them later\n"
    monkeypatch.setattr("wandb.init", server.init)
    assert mirror_missing(Store(copy), Tracker.online).done == sorted(stamps(copy))


def test_one_that_the_client_refuses_does_not_keep_the_others(copy: Path, server: Server) -> None:
    refused = sorted(stamps(copy))[1]
    real = server.init

    def init(**given: Any) -> Any:
        if given["id"] == refused:
            raise ValueError("a run of this id was deleted")
        return real(**given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wandb.init", init)
        found = mirror_missing(Store(copy), Tracker.online)
    assert found.left == [refused]
    assert len(found.done) == 3


def test_a_run_in_work_is_left_for_later(copy: Path, server: Server) -> None:
    run_id = sorted(stamps(copy))[0]
    with Store(copy).run(run_id).lock():
        assert mirror_missing(Store(copy), Tracker.online).left == [run_id]
    assert mirror_missing(Store(copy), Tracker.online) == Mirrored(done=[run_id])


def test_sync_of_an_unknown_run_is_refused_in_one_line(
    mirrored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync", "0" * 12, f"--results={mirrored}"]) == 2
    assert capsys.readouterr().err.startswith("lora-lab: no run 000000000000 in ")
