"""`python -m experiments.sweep`: plain Hydra over the same engine, with any launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sweeping import SMALL, Apart, stamps

from lora_lab.hydra_bridge import plan
from lora_lab.store import load

ROOT = Path(__file__).parents[1]


def entry(where: Path, *words: str) -> None:
    """`python -m experiments.sweep WORDS` from a folder, in this process."""
    from experiments import sweep

    os.chdir(where)
    sys.argv = ["experiments/sweep.py", *words]
    sweep.main()


def hydra(folder: Path, *words: str) -> tuple[int, str]:
    """Exit status and output of the entry in a process of its own; results go to `folder/res`."""
    output = folder.parent / f"{folder.name}.txt"
    output.unlink(missing_ok=True)
    apart = Apart(entry, folder, *words, *SMALL, "host.results=res", output=output)
    return apart.wait(), output.read_text()


def ids(*words: str) -> set[str]:
    """Ids that `lora-lab` gives to the same words."""
    return {one.run_id for one in plan([[*SMALL, *words]])[0]}


def test_a_multirun_trains_its_jobs_once_under_the_ids_of_lora_lab(tmp_path: Path) -> None:
    words = ("-m", "adapter.r=1,2,1")  # a double is one run
    status, said = hydra(tmp_path, *words)
    assert status == 0, said
    assert "2 runs to do, 0 already done" in said
    before = stamps(tmp_path / "res")
    assert set(before) == ids("adapter.r=1,2")
    assert set(load(tmp_path / "res").runs["sweep"]) == {"multirun"}
    assert all(run_id in said for run_id in before), "it ends with a table of its runs"

    status, said = hydra(tmp_path, *words)
    assert status == 0, said
    assert "0 runs to do, 2 already done" in said
    assert stamps(tmp_path / "res") == before
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"res"}, "Hydra's own output folders are off"


def test_without_multirun_it_is_one_run_in_this_process(tmp_path: Path) -> None:
    status, said = hydra(tmp_path, "adapter=full")
    assert status == 0, said
    assert set(stamps(tmp_path / "res")) == ids("adapter=full")


def test_a_job_may_start_from_another_run(tmp_path: Path) -> None:
    first = " ".join(["adapter=full", *(word for word in SMALL if not word.startswith("host."))])
    status, said = hydra(tmp_path, "-m", "adapter.r=1,2", f"model.start='{first}'")
    assert status == 0, said
    assert "3 runs to do" in said
    assert set(stamps(tmp_path / "res")) == ids("adapter=full") | ids(
        "adapter.r=1,2", f"model.start={first}"
    )


def test_a_job_without_a_result_is_named_and_fails_the_command(tmp_path: Path) -> None:
    status, said = hydra(tmp_path, "-m", "adapter.r=1", "host.timeout=1e-6")
    assert status == 1, said
    (run_id,) = ids("adapter.r=1")
    assert f"failed {run_id}: no end after host.timeout=1e-06 hours" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("adapter.rr=3", "Could not override 'adapter.rr'"),
        ("adapter=lorra", "Could not find 'adapter/lorra'"),
        ("adapter.r=-4", "adapter.r must be at least 1; got -4."),
        ("adapter.r=2.5", "could not be converted to Integer"),
        ("adapter.r=500", "r must be in [1, 64] for layer 'q' (64×64); got 500."),
    ],
)
def test_wrong_input_ends_with_a_message_and_trains_nothing(
    words: str, message: str, tmp_path: Path
) -> None:
    status, said = hydra(tmp_path, "-m", words)
    assert status != 0
    assert message in said
    assert not (tmp_path / "res").exists()


@pytest.mark.long
def test_joblibs_launcher_makes_the_same_runs_and_skips_what_is_done(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    status, said = hydra(tmp_path, "-m", "adapter.r=1,2")
    assert status == 0, said
    before = stamps(tmp_path / "res")
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "adapter.r=1,2,4"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.sweep", *words, *SMALL, "host.results=res"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        after = stamps(tmp_path / "res")
        assert set(after) == ids("adapter.r=1,2,4")
        assert {i: after[i] for i in before} == before, "what is done is not done again"
        before = after
    runs = load(tmp_path / "res").runs.set_index("run_id")
    assert set(runs["status"]) == {"done"}
    assert runs["threads"].nunique() == 1
