"""The README's commands work, and its numbers are those of the committed tables."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.readme import written

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(block: str) -> list[list[str]]:
    """Command lines between the markers of a block, without their comments."""
    text = README.partition(f"<!-- {block} -->")[2].partition(f"<!-- /{block} -->")[0]
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    found = [shlex.split(line) for line in lines if line and not line.startswith("```")]
    assert found, f"the README has no block {block}"
    return found


def run(words: list[str], folder: Path) -> str:
    module = {"lora-lab": ["-m", "lora_lab.cli"], "python": []}[words[0]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *module, *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def test_the_commands_of_the_readme_run_in_order(tmp_path: Path) -> None:
    for words in commands("commands"):
        run(words, tmp_path)
    assert (tmp_path / "results" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "results" / "ledger" / "runs.parquet").exists()


def test_a_users_own_csv_with_words_as_labels_trains_by_the_command_given(tmp_path: Path) -> None:
    words = ["bad awful dull", "good fine great"]
    rows = [
        (f"{words[i % 2]} film number {i}", ["one star", "five stars"][i % 2]) for i in range(120)
    ]
    pd.DataFrame(rows, columns=["review", "stars"]).to_csv(tmp_path / "my.csv", index=False)
    (command,) = commands("own-data")
    assert "done" in run(command, tmp_path)


def test_the_sentences_about_results_are_computed_from_the_committed_tables() -> None:
    if not (ROOT / "results" / "demo" / "ledger").exists():
        pytest.fail("results/demo/ledger is missing: see experiments/readme.py")
    assert written(README) == README


def test_every_local_picture_and_link_of_the_readme_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
