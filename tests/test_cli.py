"""`lora-lab` as a user meets it: what it refuses and how, and what it shows of a small store."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from sweeping import SMALL, Apart, lab, stamps

from lora_lab import cli, engine
from lora_lab.config import as_dict
from lora_lab.display import duration, layer_table, plan_table, runs_table
from lora_lab.hydra_bridge import plan
from lora_lab.store import Store, load

ROOT = Path(__file__).parents[1]
P = "model=planted data=planted"
CSV = "data=table data.path=t.csv data.text=review data.label=stars"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: its exit status, stdout and stderr."""

    def call(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = cli.main(argv)
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, from which the commands run; no results folder is in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any look at the network fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail(f"the network was asked: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What should have been refused must fail the test at once, not after a training."""

    def reached(*args: Any) -> None:
        pytest.fail("no run may start")

    monkeypatch.setattr(engine, "_pool", reached)


# ---- wrong input -------------------------------------------------------------------------------

WRONG = {
    # command: words of the message, each what was given, what is allowed or what to do
    # commands and options
    "swep": "unknown command 'swep' | commands: demo, train, sweep | Did you mean 'sweep'?",
    "--results out runs": "the command comes first; got '--results' | commands: demo, train",
    "-v": "the command comes first; got '-v'",
    "sweep": "needs a NAME: alpha, demo, learning_rate, methods, rank, targets",
    "plan": "needs a NAME: alpha, demo, learning_rate, methods, rank, targets",
    "sweep rnak": "unknown sweep 'rnak' | allowed: alpha, demo | Did you mean 'rank'?",
    "sweep ../conf": "unknown sweep '../conf' | allowed: alpha, demo",
    "sweep adapter.r=3": "unknown sweep 'adapter.r=3' | allowed: alpha, demo",
    "analyze": "needs either --base DIR --tuned DIR or --adapter DIR",
    "analyze --base b": "needs either --base DIR --tuned DIR or --adapter DIR",
    "analyze --tuned t": "--tuned DIR needs --base DIR",
    "analyze --tuned t --adapter a": "needs either",
    "analyze --base b --tuned t": "base must be a local folder; got 'b'",
    "analyze --adapter a": "adapter must be a local folder; got 'a'",
    "analyze --adapter a --out rows.txt": "--out must end in .parquet or .csv; got 'rows.txt'",
    "analyze --adapter a --out no/rows.csv": "--out must be in an existing folder; 'no' is none",
    "analyze --adapter a --json --out rows.csv": "--out: not allowed with argument --json",
    "analyze --adapter a --json --html r.html": "--html: not allowed with argument --json",
    "analyze --adapter a --html rows.csv": "--html must end in .html; got 'rows.csv'",
    "analyze --adapter a --html no/r.html": "--html must be in an existing folder; 'no' is none",
    "analyze --base b --tuned t --adapter a": "needs either",
    "analyze --adapter empty --adapter empty": "the same folder is given twice",
    "analyze --adapter empty --adapter a": "empty holds no adapter_config.json",
    "analyze --adapter a --measures stabel_rank": "unknown measure | Did you mean 'stable_rank'?",
    "analyze --adapter a --measures norm,": "unknown measure ''",
    "analyze --adapter a --null gausian": "unknown null 'gausian' | Did you mean 'gaussian'?",
    "extract": "arguments are required: --base, --tuned, --out",
    "extract --base b --tuned t --out o": "one of the arguments --r --energy --ranks is required",
    "extract --base b --tuned t --out o --r 1 --energy 1": "--energy: not allowed with argument",
    "extract --base b --tuned t --out o --r 1.5": "--r: invalid int value: '1.5'",
    "extract --base b --tuned t --out o --r 0": "r must be a whole number of at least 1; got 0",
    "extract --base b --tuned t --out o --energy 2": "energy must be in (0, 1]; got 2.0",
    "extract --base b --tuned t --out o --ranks no.json": "no.json cannot be read as JSON",
    "extract --base b --tuned t --out o --r 1": "base must be a local folder; got 'b'",
    "truncate --adapter a --out o --r 1": "adapter must be a local folder; got 'a'",
    "truncate --adapter empty --out o --r 1": "empty holds no adapter_config.json",
    "merge --base b --out o": "arguments are required: --adapter",
    "merge --base b --adapter a --out o": "base must be a local folder; got 'b'",
    "runs extra": "unrecognized arguments: extra",
    "runs --result out": "unrecognized arguments: --result out",
    "runs --results": "--results: expected one argument",
    "status --results=": "host.results must be a folder; got nothing",
    "train --fast": "unrecognized arguments: --fast",
    # results folders
    "status": "no results folder 'results' | lora-lab sweep demo | --results DIR",
    "runs --results out": "no results folder 'out'",
    "report --results out": "no results folder 'out'",
    "pack --results out": "no results folder 'out'",
    "measure --results out": "no results folder 'out'",
    "runs --results file.txt": "'file.txt' is a file; --results takes a folder",
    f"train {P} --results file.txt": "file.txt' is a file; --results takes a folder",
    f"plan rank {P} --results file.txt": "file.txt' is a file; --results takes a folder",
    f"train {P} --results a host.results=b": "give --results DIR or host.results=DIR, not both",
    f"train {P} --results=": "host.results must be a folder; got nothing",
    # overrides
    "train adapter": "'adapter' is not an override | key=value",
    "train =3": "'=3' is not an override | key=value",
    f"train {P} +adapter.r=3": "'+adapter.r=3' is not an override",
    f"train {P} adapter.r==3": "'adapter.r==3' is not understood | key=value",
    f"train {P} adapter.r=1,,2": "'adapter.r=1,,2' is not understood | key=1,2,4",
    f"train {P} adapter.targets=(q|k)": "is not understood | two pairs of quotes",
    "train adapter.rr=3": "adapter=lora has no key 'rr' | its keys: r, alpha | Did you mean 'r'?",
    f"sweep demo {P} adapter.rr=3": "adapter=lora has no key 'rr' | Did you mean 'r'?",
    f"sweep demo {P} adapter=head adapter.r=3": "adapter=head has no key 'r'; its keys: none",
    "train adapter=full adapter.r=4": "adapter=full has no key 'r'; its keys: targets",
    f"train {P} learning_rate=1": "unknown key 'learning_rate' | groups: model, data, adapter",
    f"train {P} lr=1": "unknown key 'lr' | Did you mean 'train.lr'?",
    f"train {P} train=fast": "'train' is a group | train.lr",
    # choices
    "train adapter=lorra": "unknown adapter 'lorra' | full, head, | Did you mean 'lora'?",
    "train model=bert": "unknown model 'bert' | allowed: digits_vit, hf, minilm, planted, smollm2",
    "train data=rotten": "unknown data 'rotten' | Did you mean 'rotten_tomatoes'?",
    f"train {P} size=big": "unknown size 'big' | allowed: demo, paper, smoke",
    f"train {P} size=null": "unknown size 'null'",
    f"train {P} adapter.scaling=rs": "unknown adapter.scaling 'rs' | Did you mean 'rslora'?",
    f"train {P} adapter.init=kaimin": "unknown adapter.init 'kaimin' | Did you mean 'kaiming'?",
    f"train {P} train.precision=int8": "train.precision must be one of auto, float64 | got 'int8'",
    f"train {P} train.also=heads": "train.also must be | classifier, norms | got 'heads'",
    f"train {P} adapter.targets=quary": "'quary' matches no layer | allowed: attention, qv",
    f"train {P} host.tracker=on": "host.tracker must be one of auto, online | got 'on'",
    f"train {P} host.device=abacus": "host.device must be auto or cpu | got 'abacus'",
    # numbers
    "train adapter.r=-4": "adapter.r must be at least 1; got -4",
    "train adapter.r=0": "adapter.r must be at least 1; got 0",
    "train adapter.r=2.5": "adapter.r must be a whole number; got 2.5",
    "train adapter.r=many": "adapter.r must be a whole number; got 'many'",
    "train adapter.r=": "adapter.r must be a whole number; got ''",
    "train adapter.r=500": "r must be in [1, 384] for layer | got 500 | Lower adapter.r",
    f"train {P} adapter.r=1,2,129": "r must be in [1, 128] for layer 'q' | got 129",
    f"train {P} adapter.alpha=nan": "adapter.alpha must be a finite number above 0; got nan",
    f"train {P} adapter.dropout=1": "adapter.dropout must be in [0, 1); got 1.0",
    f"train {P} train.lr=nan": "train.lr must be a finite number above 0; got nan",
    f"train {P} train.lr=inf": "train.lr must be a finite number above 0; got inf",
    f"train {P} train.lr=-1e-3": "train.lr must be a finite number above 0; got -0.001",
    f"train {P} train.lr=0": "train.lr must be a finite number above 0; got 0.0",
    f"train {P} train.epochs=0": "train.epochs must be a finite number above 0",
    f"train {P} train.batch_size=0": "train.batch_size must be at least 1; got 0",
    f"train {P} seed=-1": "seed must be in [0, 2^31); got -1",
    f"train {P} seed=2147483648": "seed must be in [0, 2^31); got 2147483648",
    f"train {P} seed=1.5": "seed must be a whole number; got 1.5",
    f"train {P} seed=lucky": "seed must be a whole number; got 'lucky'",
    f"train {P} host.workers=0": "host.workers must be at least 1 (or null); got 0",
    f"sweep rank {P} seed=range(0,30)": "270 runs | host.yes=true",
    f"sweep rank {P} seed=range(0,100000)": "more than 5000 runs in one command",
    # models and data
    "train model=planted": "model=planted solves regression problems | Add data=planted",
    "train data=planted": "the data holds regression | Use model=planted",
    "train data.train_examples=9999": "data.train_examples must be at most 5530 | got 9999",
    f"train {P} data.true_r=0": "data.true_r must be in [1, 128] (data.width); got 0",
    "train model=hf": "model.name must be a hub name or a local folder | Add model.name=",
    "train model=hf model.name=./nope": "'./nope' is neither an existing folder nor a hub name",
    "train model=hf model.name=nope": "'nope' is neither an existing folder nor a hub name",
    "train model=hf model.name=/a/b": "'/a/b' is neither an existing folder nor a hub name",
    "train model=hf model.name=empty": "'empty' is a folder without config.json",
    "train data=hf": "data.name must be a folder or a name on the hub",
    "train data=hf data.name=./nope": "data.name must be an existing folder | got './nope'",
    "train data=table": "data.path must be a file (.csv, .tsv, .jsonl, .parquet); got ''",
    "train data=table data.path=s.csv": "must be an existing file; got 's.csv' | mean 't.csv'?",
    "train data=table data.path=file.txt": "must end in .csv, .tsv, .jsonl, .parquet; got 'file",
    "train data=table data.path=none.csv": "data.text must be a column of 'none.csv' | it has none",
    f"train {CSV} data.text=revew": "a column of 't.csv' | 'review' | Did you mean 'review'?",
    f"train {CSV} data.label=review": "data.text and data.label must be different columns",
    f"train {P} model.start=0123456789ab": "no such finished run in 'results'",
    f"train {P} model.start=best": "model.start must be the id of a finished run | got 'best'",
}


@pytest.fixture
def ground(folder: Path) -> Path:
    """What the wrong inputs refer to."""
    (folder / "file.txt").write_text("no table")
    (folder / "t.csv").write_text("review,stars\ngood,1\nbad,0\n")
    (folder / "none.csv").write_text("")
    (folder / "empty").mkdir()
    return folder


def assert_refused(status: int, said: str, message: str) -> None:
    assert status == 2, said
    assert 1 <= len(said.strip().splitlines()) <= 2, said
    assert said.startswith("lora-lab: "), said
    assert "Traceback" not in said
    missing = [part for part in message.split(" | ") if part not in said]
    assert not missing, said


@pytest.mark.usefixtures("offline", "no_training")
@pytest.mark.parametrize(("command", "message"), WRONG.items(), ids=WRONG)
def test_wrong_input_is_one_line_and_makes_nothing(
    command: str, message: str, ground: Path, run: Run
) -> None:
    before = sorted(ground.rglob("*"))
    status, out, err = run(*command.split(" "))
    assert_refused(status, out + err, message)
    assert sorted(ground.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        *("train adapter.rr=3", "train adapter=lorra", "train adapter.r=-4", "train adapter.r=2.5"),
        *("train adapter.r=500", "train adapter=full adapter.r=4", "sweep", "analyze", "swep"),
        "train data=table data.path=s.csv",
    ],
)
def test_wrong_input_ends_a_process_the_same_way(command: str, ground: Path) -> None:
    before = sorted(ground.rglob("*"))
    output = ground.parent / f"{ground.name}.txt"
    apart = Apart(lab_in, ground, *command.split(), output=output)
    assert_refused(apart.wait(60), output.read_text(), WRONG[command])
    assert sorted(ground.rglob("*")) == before


def lab_in(where: Path, *argv: str) -> None:
    """`lora-lab ARGV` from a folder; a look at the network ends the process otherwise."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"the network was asked: {args[1:]}")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    os.chdir(where)
    lab(*argv)


@pytest.mark.parametrize("command", ["swep", "analyze", f"train {P} lr=1"])
def test_the_installed_command_ends_the_same_way(command: str, ground: Path) -> None:
    words = [sys.executable, "-m", "lora_lab.cli", *command.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ground, env=env, capture_output=True, text=True, timeout=60)
    assert_refused(done.returncode, done.stdout + done.stderr, WRONG[command])


def test_help_names_every_command(run: Run) -> None:
    for argv in ([], ["--help"], ["-h"]):
        status, out, _ = run(*argv)
        assert status == 0
        for name in (
            "demo",
            "train",
            "sweep",
            "plan",
            "measure",
            "pack",
            "analyze",
            "extract",
            "truncate",
            "merge",
        ):
            assert re.search(rf"^\s+{name}\s+\w", out, re.M), name


# ---- a small store -----------------------------------------------------------------------------

TINY = (*SMALL, "host.device=cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of head, full and two ranks, trained in this process, and one failed run."""
    results = tmp_path_factory.mktemp("store") / "results"
    lines = [["adapter=head"], ["adapter=full"], ["adapter.r=1,2"]]
    planned, host = plan(lines, [*TINY, f"host.results={results}"])
    for one in planned:
        assert engine.run_here(one, host) == "done"
    (other,), _ = plan([["adapter.r=4"]], TINY)
    failed = Store(results).run(other.run_id)
    with failed.lock():
        failed.begin({"run_id": other.run_id, "config": as_dict(other.config)}, {})
        failed.fail("RuntimeError: out of [bold]memory[/bold]")
    return results


def test_status_counts_runs_and_says_what_went_wrong(store: Path, run: Run) -> None:
    status, out, err = run("status", "--results", str(store))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert set(lines[0].split(", ")) == {"4 done", "1 failed"}
    assert re.fullmatch(r"failed [0-9a-f]{12}: RuntimeError: out of \[bold\]memory.*", lines[1])


def test_runs_shows_every_run_with_its_method_rank_and_score(store: Path, run: Run) -> None:
    status, out, err = run("runs", "--results", str(store))
    assert (status, err) == (0, "")
    table = load(store).runs
    for _, row in table[table["status"] == "done"].iterrows():
        (line,) = [line for line in out.splitlines() if row["run_id"] in line]
        assert {row["adapter"], "done", f"{row['score']:.3f}"} <= set(line.split())


def test_commands_find_nothing_in_an_empty_store_and_say_so(folder: Path, run: Run) -> None:
    (folder / "results").mkdir()
    assert run("runs")[:2] == (0, "no runs yet\n")
    assert run("status")[:2] == (0, "no runs yet\n")
    assert "nothing to measure" in run("measure")[1]
    assert run("report")[0] == run("pack")[0] == 0


def test_measure_takes_what_is_missing_and_then_nothing(store: Path, run: Run) -> None:
    run("measure", "--results", str(store))
    assert "nothing to measure" in run("measure", "--results", str(store))[1]
    before, tables = stamps(store), load(store).measures
    one = next(p.parent for p in store.glob("runs/*/adapter_config.json"))
    for name in ("measures.json", "measures.parquet"):
        (one / name).unlink()  # as if every measure had been added since
    assert one.name not in set(load(store).measures["run_id"])
    status, out, _ = run("measure", "--results", str(store))
    count = len(set(tables[tables["run_id"] == one.name]["measure"]) - {"replicated_rank"})
    assert (status, out.splitlines()[0]) == (0, f"{count} measures: taken of 1 run")
    assert stamps(store) == before, "measuring must not train"
    pd.testing.assert_frame_equal(load(store).measures, tables)


def test_pack_names_the_files_and_their_sizes(store: Path, run: Run) -> None:
    status, out, _ = run("pack", "--results", str(store))
    assert status == 0
    for line in out.splitlines():
        path, size = re.fullmatch(r"(.*) \((\d+\.\d) kB\)", line).groups()  # type: ignore[union-attr]
        assert Path(path).is_file()
        assert float(size) > 0
    assert len(out.splitlines()) == 6


def test_report_says_where_it_is_from_any_folder(store: Path, folder: Path, run: Run) -> None:
    status, out, _ = run("report", "--results", os.path.relpath(store, folder))
    assert status == 0
    path = Path(out.partition("report: ")[2].strip())
    assert path == (store / "report.html").resolve()
    assert path.stat().st_size > 10_000
    assert not list(folder.iterdir())


def test_analyze_reads_a_runs_adapter_as_json_as_file_and_as_table(
    store: Path, folder: Path, run: Run
) -> None:
    adapter = str(next(store.glob("runs/*/adapter_config.json")).parent)
    status, out, err = run("analyze", "--adapter", adapter, "--json")
    assert (status, err) == (0, "")
    rows = json.loads(out)
    assert {"layer", "measure", "k", "side", "value"} <= set(rows[0])
    assert {row["layer"] for row in rows} == {"q", "k", "v", "o", "up", "down"}
    for name in ("rows.csv", "rows.parquet"):
        status, out, err = run("analyze", "--adapter", adapter, "--out", name)
        assert (status, out, err) == (0, "", f"{len(rows)} rows: {name}\n")
    read = (pd.read_csv("rows.csv"), pd.read_parquet("rows.parquet"))
    assert [len(table) for table in read] == [len(rows)] * 2
    status, out, _ = run("analyze", "--adapter", adapter)
    assert status == 0
    assert "effective" in out


def test_analyze_of_two_adapters_has_their_rows_and_those_of_the_pair(
    store: Path, folder: Path, run: Run
) -> None:
    adapters = sorted(str(p.parent) for p in store.glob("runs/*/adapter_config.json"))
    words = [word for adapter in adapters for word in ("--adapter", adapter)]
    words += ["--measures", "effective_rank,cosine"]
    status, out, err = run("analyze", *words, "--json")
    assert (status, err) == (0, "")
    rows = json.loads(out)
    names = [Path(adapter).name for adapter in adapters]
    assert len(names) == 2
    alone = [row for row in rows if row["measure"] == "effective_rank"]
    assert {row["source"] for row in alone} == set(names)
    assert len(alone) == 12
    pairs = [row for row in rows if row["measure"] == "cosine"]
    assert {(row["one"], row["other"]) for row in pairs} == {tuple(names)}
    assert {row["layer"] for row in pairs} == {"", "q", "k", "v", "o", "up", "down"}
    status, out, _ = run("analyze", *words)
    assert status == 0
    assert all(f"\n{name}\n" in f"\n{out}" for name in names), "each has its table"
    assert f"{names[0]} × {names[1]}" in out


def test_analyze_takes_the_measures_and_the_null_asked_for(store: Path, run: Run) -> None:
    adapter = str(next(store.glob("runs/*/adapter_config.json")).parent)
    words = ("analyze", "--adapter", adapter, "--json", "--measures", "stable_rank,norm")
    rows = json.loads(run(*words)[1])
    assert {row["measure"] for row in rows} == {"stable_rank", "norm"}
    assert {row["null"] is None for row in rows if row["measure"] == "stable_rank"} == {False}
    bare = json.loads(run(*words, "--null", "none")[1])
    assert {row["null"] for row in bare} == {None}
    assert [row["value"] for row in bare] == [row["value"] for row in rows]


def test_analyze_writes_a_page_and_nothing_else(store: Path, folder: Path, run: Run) -> None:
    adapter = str(next(store.glob("runs/*/adapter_config.json")).parent)
    status, out, err = run("analyze", "--adapter", adapter, "--html", "a [b] page.html")
    assert (status, err) == (0, "")
    (page,) = folder.iterdir()
    assert out == f"report: {page.resolve()}\n"
    assert Path(adapter).name in page.read_text(encoding="utf-8")


# ---- commands that train -----------------------------------------------------------------------


def trained(folder: Path, *argv: str) -> str:
    """What a training command says in a process of its own."""
    output = folder.parent / f"{folder.name}.txt"
    output.unlink(missing_ok=True)
    apart = Apart(train_in, folder, *argv, output=output)
    assert apart.wait() == 0, output.read_text()
    return output.read_text()


def train_in(where: Path, *argv: str) -> None:
    """`lora-lab ARGV` from a folder."""
    os.chdir(where)
    lab(*argv)


def test_train_from_any_folder_ends_with_a_table_and_does_nothing_again(folder: Path) -> None:
    words = ("train", *SMALL, "--results", "my [bold]results", "adapter=head,lora")
    out = trained(folder, *words)
    assert "2 runs to do, 0 already done" in out
    assert re.search(r"\[2/2\] \d+ s [0-9a-f]{12} (head|lora .*) lr=\S+ seed=0: done", out)
    results = folder / "my [bold]results"
    before = stamps(results)
    assert len(before) == 2
    assert all(run_id in out for run_id in before)
    again = trained(folder, *words)
    assert "0 runs to do, 2 already done" in again
    assert stamps(results) == before
    same = trained(folder, "train", *SMALL, f"host.results={results}", "adapter=head")
    assert "0 runs to do, 1 already done" in same, "--results and host.results are one"
    assert [p.name for p in folder.iterdir()] == [results.name]


def test_a_sweep_takes_its_overrides_after_an_option_too(folder: Path) -> None:
    out = trained(
        folder, "sweep", "--results", "out", "rank", *SMALL, "adapter=lora", "adapter.r=1", "seed=0"
    )
    assert "1 run to do" in out
    assert len(stamps(folder / "out")) == 1


def test_a_diverged_run_is_named_with_its_log_and_is_no_failure(folder: Path) -> None:
    out = trained(folder, "train", *SMALL, "train.lr=1e30", "host.results=[red]r")
    (line,) = [line for line in out.splitlines() if line.startswith("diverged ")]
    assert re.search(r"NaN or Inf .* \(log: \[red\]r/runs/[0-9a-f]{12}/log\.txt\)", line)


def test_an_interrupted_sweep_says_how_to_go_on(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "sweep", interrupt)
    status, _, err = run("train", *TINY, "adapter.targets='(q|k)'")
    assert status == 130
    assert err.rstrip().endswith("""'adapter.targets='"'"'(q|k)'"'"''"""), err


# ---- tables on a screen ------------------------------------------------------------------------


def shown(table: Any, width: int) -> list[str]:
    screen = Console(width=width, highlight=False)
    with screen.capture() as capture:
        screen.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_at_80_columns_no_value_of_the_runs_table_is_cut(store: Path) -> None:
    runs = load(store).runs
    text = "\n".join(shown(runs_table(runs, 80), 80))
    assert "…" not in text
    headings = text.splitlines()[1].split()
    for run_id in runs["run_id"]:
        assert run_id in text
    for heading in ("method", "r", "α", "seed", "status", "score"):
        assert heading in headings


def test_at_200_columns_costs_and_what_differs_are_shown_too(store: Path) -> None:
    runs = load(store).runs
    runs["adapter.targets"] = [f"[bold]{i}[/bold]" for i in range(len(runs))]
    lines = shown(runs_table(runs, 200), 200)
    headings = "\n".join(lines[:2])
    for heading in ("targets", "train %", "ex/s", "s"):
        assert heading in headings
    for i in range(len(runs)):
        assert any(f" [bold]{i}[/bold] " in line for line in lines), "a name is no markup"


def test_a_pipe_has_no_width_and_columns_sets_one(
    store: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = run("runs", "--results", str(store))[1]
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run("runs", "--results", str(store))[1]
    assert max(map(len, narrow.splitlines())) <= 80
    assert "ex/s" in wide
    assert "…" not in wide + narrow


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_of_layers_is_whole_at_any_width(width: int) -> None:
    layer = "encoder.layer.0.attention.output.dense"
    rows = [
        {"layer": layer, "measure": name, "k": k, "side": side, "value": 0.123456789}
        for name, k, side in [
            ("effective_rank", float("nan"), ""),
            ("stable_rank", float("nan"), ""),
            *(("energy_rank", k, "") for k in (0.9, 0.95, 0.99)),
            *(("update_ratio", float("nan"), side) for side in ("frobenius", "spectral")),
            *(("norm", float("nan"), side) for side in ("frobenius", "spectral", "nuclear")),
        ]
    ]
    text = "\n".join(shown(layer_table(pd.DataFrame(rows), width), width))
    assert "…" not in text
    assert layer in text
    assert "0.1235" in text
    assert ("frobenius" in text) == (width == 200)


def test_a_null_stands_right_of_its_value() -> None:
    rows = [
        {"layer": "q", "measure": name, "k": float("nan"), "side": "", "value": v, "null": null}
        for name, v, null in [("effective_rank", 2.5, 7.25), ("stable_rank", 1.5, float("nan"))]
    ]
    lines = shown(layer_table(pd.DataFrame(rows), 80), 80)
    assert lines[2].split() == ["layer", "rank", "null", "rank"]
    assert lines[4].split() == ["q", "2.5", "7.25", "1.5"]


def test_a_plan_says_what_is_done_and_what_the_rest_costs(store: Path) -> None:
    lines = [["adapter=head,full"], ["adapter.r=1,2,4", "seed=0,1"]]
    planned, host = plan(lines, [*TINY, f"host.results={store}", "host.workers=2"])
    text = "\n".join(shown(plan_table("rank", planned, host), 80))
    assert "rank: 8 runs, 4 done, 4 to do" in text
    assert re.search(r"lora\s+4 .* 2 runs", text), text
    assert re.search(r"about \d+ s, .* MB of disk and .* [MG]B of memory with 2 at once", text)
    done, host = plan([["adapter=head"]], [*TINY, f"host.results={store}"])
    assert "nothing to do" in "\n".join(shown(plan_table("rank", done, host), 80))


def test_a_plan_without_experience_says_that_it_knows_no_cost(folder: Path, run: Run) -> None:
    status, out, _ = run("plan", "rank", *TINY)
    assert status == 0
    assert "27 runs, 0 done, 27 to do" in out
    assert out.count("nothing yet") == 3
    assert "nan" not in out
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (120, "2 min"), (36_000, "10.0 hours")]
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
