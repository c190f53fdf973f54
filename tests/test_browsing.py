"""status, runs, diff, rm and doctor, as users call them."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pandas as pd
import pytest

from lora_lab import engine
from lora_lab.cli import main
from lora_lab.config import as_dict
from lora_lab.hydra_bridge import plan
from lora_lab.standing import seconds_left, standing
from lora_lab.store import Store, Tables

TINY = ["model=planted", "data=planted", "size=smoke"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """LoRA at two ranks done, one failed, one running, and one that nobody began."""
    results = tmp_path / "results"
    planned, host = plan([["adapter.r=1,2,3,4,8"]], [*TINY, f"host.results={results}"])
    for one in planned[:2]:
        assert engine.run_here(one, host) == "done"
    store = Store(results)
    store.write_sweep("ranks", [one.run_id for one in planned])
    for one in planned[2:4]:
        run = store.run(one.run_id)
        with run.lock():
            run.begin({"run_id": one.run_id, "config": as_dict(one.config)}, {})
            if one is planned[2]:
                run.fail("RuntimeError: out of memory")
    return store


def called(store: Store, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main([*words, "--results", str(store.root)])
    said = capsys.readouterr()
    return code, said.out, said.err


def ids(store: Store) -> dict[int, str]:
    """run_id by r."""
    runs = Tables(store).runs
    return dict(zip(runs["adapter.r"].astype(int), runs["run_id"], strict=True))


def test_status_tells_what_waits_runs_and_failed(store: Store, capsys) -> None:
    running = store.run(ids(store)[4])
    with running.lock():
        running.write_progress(
            {"step": 5, "steps": 20, "loss": 0.5, "began": time.time() - 10, "now": time.time()}
        )
        code, out, _ = called(store, capsys, "status", "ranks")
        lines = out.splitlines()
        assert code == 0
        assert lines[0].startswith("2 done, 1 failed, 1 waiting, 1 running; about ")
        running_line = rf"running {running.run_id}: step 5 of 20, loss 0\.5, about 3\d s left"
        assert re.fullmatch(running_line, lines[1])
        assert lines[2] == f"failed {ids(store)[3]}: RuntimeError: out of memory"
        table = standing(Tables(store))
        each = table.loc[table["status"] == "done", "seconds"].mean()
        assert seconds_left(table) == pytest.approx(30 + each, rel=0.3)
    assert called(store, capsys, "status", "--watch")[0] == 0, "nothing runs: no second look"
    code, _, err = called(store, capsys, "status", "rank")
    assert (code, "there are: ranks" in err) == (2, True)


def test_runs_are_chosen_sorted_and_written(store: Store, capsys) -> None:
    code, out, _ = called(store, capsys, "runs", "--where", "status = done", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {row["adapter.r"] for row in rows} == {1, 2}
    assert len(rows) == 2
    assert rows[0]["error"] is None
    code, out, _ = called(store, capsys, "runs", "--sort=-adapter.r", "--csv")
    table = pd.read_csv(io.StringIO(out))
    assert table["adapter.r"].tolist() == [4, 3, 2, 1]
    code, out, _ = called(store, capsys, "runs", "--sort", "adapter.r")
    found = [line.split()[0] for line in out.splitlines() if line.split()[:1]]
    assert [i for i in found if i in ids(store).values()] == [ids(store)[r] for r in (1, 2, 3, 4)]
    assert called(store, capsys, "runs", "--where", "score > 2")[1] == "no run is so\n"
    for words in (["--where", "scores > 1"], ["--sort", "scores"]):
        code, _, err = called(store, capsys, "runs", *words)
        assert (code, "Did you mean 'score'" in err) == (2, True)


def test_diff_shows_what_differs_and_nothing_else(store: Store, capsys) -> None:
    one, other = ids(store)[1], ids(store)[2]
    code, out, _ = called(store, capsys, "diff", one, other)
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    assert code == 0
    assert lines["adapter.r"] == ["1", "2"]
    assert lines["adapter.alpha"] == ["2", "4"]
    assert "model" not in lines
    assert "status" not in lines
    assert called(store, capsys, "diff", one, one)[1] == "the two runs do not differ\n"
    code, _, err = called(store, capsys, "diff", one, "0" * 12)
    assert (code, "no run 000000000000" in err) == (2, True)


def test_rm_asks_moves_to_the_trash_and_refuses_what_others_need(
    store: Store, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ids(store)[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("no\n"))
    assert "nothing moved" in called(store, capsys, "rm", one)[1]
    assert store.run(one).status() == "done"
    (child,), host = plan([[f"model.start={one}"]], [*TINY, f"host.results={store.root}"])
    assert engine.run_here(child, host) == "done"
    code, _, err = called(store, capsys, "rm", one, "--yes")
    assert (code, child.run_id in err) == (2, True)
    with store.run(child.run_id).lock():
        code, _, err = called(store, capsys, "rm", child.run_id, "--yes")
        assert (code, "is held by another process" in err) == (2, True)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert called(store, capsys, "rm", one, child.run_id)[0] == 0
    assert one not in store.run_ids()
    assert (store.root / "trash" / f"{one}-1" / "DONE").is_file()


def test_doctor_has_a_line_for_each_check_and_the_fix(
    store: Store, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = called(store, capsys, "doctor")
    assert code == 0
    assert all(line.startswith("ok  ") for line in out.splitlines())
    assert len(out.splitlines()) == 7
    monkeypatch.setattr("lora_lab.doctor.EMBEDDED", {"minilm": "no_such_package"})
    monkeypatch.setattr("lora_lab.doctor.LEAST_FREE", 1e9)
    code, out, _ = called(store, capsys, "doctor")
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert code == 1
    assert [" -> " in line for line in failed] == [True, True]
