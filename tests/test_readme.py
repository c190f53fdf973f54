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
import tiny
import torch
from transformers import AutoModel

from experiments.methods import updates
from experiments.readme import written
from lora_lab.adapters import ADAPTERS

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
    for words in [*commands("commands"), *commands("browsing")]:
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


def test_weights_go_in_and_out_by_the_commands_given(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base")
    network = AutoModel.from_pretrained(base)
    for name, weight in network.named_parameters():
        if "layer" in name and weight.ndim == 2:
            weight.data += 0.01 * torch.randn(weight.shape)
    network.save_pretrained(tmp_path / "tuned")
    shown = [run(words, tmp_path) for words in commands("weights")]
    assert all("encoder.layer.1.output.dense" in text for text in shown)
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.long
def test_the_models_that_come_along_train_by_the_commands_given(tmp_path: Path) -> None:
    for words in commands("grounds"):
        few = [word for word in words if not word.startswith("data.train_examples")]
        assert "done" in run([*few, "size=smoke", "train.epochs=1"], tmp_path)


def test_the_table_of_methods_holds_each_of_them_and_every_law_passed() -> None:
    text = README.partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    found = {row[0].strip("`"): row for row in rows[2:]}
    assert list(found) == list(ADAPTERS), "python -m experiments.methods"
    for name, row in found.items():
        passed, of = re.fullmatch(r"(\d+) of (\d+)", row[-1]).groups()
        assert passed == of != "0", name
        assert row[1] == updates()[name]


def test_the_sentences_about_results_are_computed_from_the_committed_tables() -> None:
    if not (ROOT / "results" / "demo" / "ledger").exists():
        pytest.fail("results/demo/ledger is missing: see experiments/readme.py")
    assert written(README) == README


def test_every_local_picture_and_link_of_the_readme_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
