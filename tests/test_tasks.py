"""Tasks over the cores: what is finished is kept, and nothing outlives the process that asked."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lora_lab import tasks
from lora_lab.registry import WrongInput
from lora_lab.store import StoreError
from lora_lab.tasks import Kept, Tasks, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder; nothing of the user's own is touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def at_once(monkeypatch):
    """Everything goes to two worker processes, however small it is."""
    monkeypatch.setattr(tasks, "ALONE", 0.0)
    monkeypatch.setattr(tasks, "_workers", lambda tasks: 2)


def step(number, log, seconds=0.0):
    """One task: it says in a file that it was done, and by which process."""
    with open(log, "a") as file:
        file.write(f"{number} {os.getpid()}\n")
    time.sleep(seconds)
    return {"number": number, "value": number / 7, "missing": float("nan")}


def fails(number, log):
    if number == 2:
        raise WrongInput("layer 'x' holds NaN.")
    return step(number, log, 0.05)


def dies(number, log):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(number, log)


def said(log):
    """Which numbers were worked on, by which processes."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return [int(number) for number, _ in lines], {int(pid) for _, pid in lines}


def asked(log, count=6, function=step, **more):
    arguments = [(n, str(log), *more.values()) for n in range(count)]
    return Tasks(function, arguments, [float(n) for n in range(count)], 1.0)


def quiet(done, total, share):
    pass


@pytest.mark.parametrize("workers", [1, 3])
def test_little_work_is_done_here_and_leaves_nothing_on_the_disk(
    workers, tmp_path, cache, monkeypatch
):
    monkeypatch.setattr(tasks, "_workers", lambda tasks: workers)
    log = tmp_path / "log"
    found = run(asked(log), Kept("key"), quiet)
    assert [one["number"] for one in found] == list(range(6))
    numbers, processes = said(log)
    assert processes == {os.getpid()}
    assert workers > 1 or numbers[0] == 0, "the smallest first"
    assert not cache.exists()


MEETING = threading.Barrier(2)


def meets(number, log):
    MEETING.wait(20)
    return step(number, log)


def test_threads_share_the_work_that_is_done_here(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_workers", lambda tasks: 2)
    found = run(asked(tmp_path / "log", 4, meets), Kept("key"), quiet)
    assert [one["number"] for one in found] == list(range(4))


def test_an_error_of_a_task_that_is_done_here_comes_through(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_workers", lambda tasks: 2)
    with pytest.raises(WrongInput, match="layer 'x' holds NaN"):
        run(asked(tmp_path / "log", function=fails), Kept("key"), quiet)


@pytest.mark.parametrize(("worth", "stays"), [(60.0, True), (0.0, False)])
def test_what_is_left_after_a_while_goes_to_processes_only_if_that_pays(
    worth, stays, tmp_path, monkeypatch
):
    monkeypatch.setattr(tasks, "_workers", lambda tasks: 2)
    monkeypatch.setattr(tasks, "ALONE", 0.1)
    monkeypatch.setattr(tasks, "APART", worth)
    log = tmp_path / "log"
    alike = asked(log, 12, seconds=0.05)
    found = run(dataclasses.replace(alike, costs=[1.0] * 12), Kept("key"), quiet)
    assert [one["number"] for one in found] == list(range(12))
    processes = said(log)[1]
    assert os.getpid() in processes, "begun here"
    assert (len(processes) == 1) == stays


def test_more_work_goes_to_other_processes_longest_first(tmp_path, cache, at_once):
    log, heard = tmp_path / "log", []
    found = run(asked(log), Kept("key"), lambda *words: heard.append(words))
    assert [one["number"] for one in found] == list(range(6)), "in the tasks' order"
    assert found[3]["value"] == 3 / 7, "no digit is lost on the way"
    numbers, processes = said(log)
    assert set(numbers[:2]) == {4, 5}
    assert os.getpid() not in processes
    assert not list(cache.glob("*/*/*")), "what was kept is removed when all is done"
    assert not any(psutil.pid_exists(pid) and _works(pid) for pid in processes)


def _works(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_error_of_a_task_comes_through_and_what_was_done_stays(tmp_path, at_once):
    log = tmp_path / "log"
    with pytest.raises(WrongInput, match="layer 'x' holds NaN"):
        run(asked(log, function=fails), Kept("key"), quiet)
    first, _ = said(log)
    again = run(asked(log), Kept("key"), quiet)
    assert [one["number"] for one in again] == list(range(6))
    assert {3, 4, 5} & set(first)
    assert len(said(log)[0]) < 12


def test_a_killed_worker_is_one_line_and_what_was_done_stays(tmp_path, at_once):
    with pytest.raises(StoreError, match=r"^a worker process was killed.*run the same again\.$"):
        run(asked(tmp_path / "log", function=dies), Kept("key"), quiet)


def test_a_damaged_result_is_made_again(tmp_path, cache, at_once):
    kept = Kept("key")
    for number in range(6):
        kept.write(number, {"number": number, "kept": True})
    (cache / "lora_lab" / "analyze" / "key" / "3.json").write_bytes(b"torn")
    found = run(asked(tmp_path / "log"), kept, quiet)
    assert said(tmp_path / "log")[0] == [3]
    assert ["kept" in one for one in found] == [True] * 3 + [False] + [True] * 2


def test_where_nothing_can_be_kept_it_is_said_once_and_the_work_goes_on(cache, tmp_path, at_once):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="finished layers are not kept: cannot write") as warned:
        found = run(asked(tmp_path / "log"), Kept("key"), quiet)
    assert len(warned) == 1
    assert len(found) == 6


def test_what_nobody_took_up_again_is_removed_after_a_month(cache):
    old, new = Kept("old"), Kept("new")
    for kept in (old, new):
        kept.write(0, {})
    os.utime(old.folder, (0, 0))
    Kept("other").remove()
    assert not old.folder.exists()
    assert new.read(0) == {}


def started(tmp_path, seconds):
    """This file's tasks in a process of their own, and the log that they write."""
    code = (
        "from lora_lab import tasks; from tests import test_tasks as t\n"
        "tasks.ALONE = 0; tasks._workers = lambda tasks: 2\n"
        f"tasks.run(t.asked({str(tmp_path / 'log')!r}, 8, seconds={seconds}), tasks.Kept('key'),"
        " t.quiet)"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)


def test_after_a_kill_the_workers_leave_and_only_the_rest_is_done(tmp_path, cache):
    log, folder = tmp_path / "log", cache / "lora_lab" / "analyze" / "key"
    parent = started(tmp_path, 0.4)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("[0-9].json"))) < 3:
        assert time.monotonic() < deadline
        assert parent.poll() is None, parent.stderr.read()
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    kept = {int(path.stem) for path in folder.glob("[0-9].json")}
    _, workers = said(log)
    while any(map(_works, workers)):
        assert time.monotonic() < deadline, "an orphan works on"
        time.sleep(0.05)
    log.unlink()
    found = run(asked(log, 8, seconds=0.0), Kept("key"), quiet)
    assert sorted(said(log)[0]) == sorted(set(range(8)) - kept), "what was kept is not done again"
    assert [one["number"] for one in found] == list(range(8))
    assert not folder.exists()


def test_a_program_without_a_main_guard_is_not_run_again_by_its_workers(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from lora_lab import tasks; from tests import test_tasks as t\n"
        "tasks.ALONE = 0; tasks._workers = lambda tasks: 2\n"
        f"found = tasks.run(t.asked({str(tmp_path / 'log')!r}), tasks.Kept('key'), t.quiet)\n"
        "print(len(found))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program], env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "6\n", "")


def test_a_result_is_json_with_nan(cache):
    kept = Kept("key")
    kept.write(0, {"value": float("nan"), "small": 5e-324})
    found = kept.read(0)
    assert json.dumps(found) == '{"value": NaN, "small": 5e-324}'
