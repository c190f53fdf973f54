"""README and docs: every command works or at least is planned, and no generated part is stale."""

from __future__ import annotations

import ast
import doctest
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
import yaml
from transformers import AutoModel

from experiments.docs import PAGES, written
from experiments.methods import updates
from experiments.readme import written as readme_written
from lora_lab import cli
from lora_lab.adapters import ADAPTERS, Place
from lora_lab.claims import SECTIONS, Claim
from lora_lab.hydra_bridge import plan, preset
from lora_lab.measures import MEASURES

ROOT = Path(__file__).parents[1]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}

RUN = ("newcomer", "tutorial", "own-data", "own-model", "outside", "weights", "grounds")
"""Blocks that a test of this file runs."""

CHECKED = ("planned", "typed", "hydra", "completion")
"""Blocks whose commands take minutes, a hub or a cluster: planned, or only read as words."""

CODE = ("tutorial-python", "own-method", "own-measure", "own-claim")
"""Blocks of Python that a test of this file executes."""


def blocks(*names: str) -> Iterator[tuple[str, str]]:
    """(name, fenced text) of all blocks of these names, in the order of pages and lines."""
    for text in TEXTS.values():
        for name, body in re.findall(r"(?s)<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", text):
            if name in names:
                yield name, body.partition("```")[2].partition("\n")[2].rpartition("```")[0]


def commands(*names: str) -> list[list[str]]:
    """The command lines of blocks, without their comments."""
    lines = [re.split(r"\s# |\s{2,}#", line)[0] for _, body in blocks(*names)
             for line in body.splitlines()]  # fmt: skip
    found = [shlex.split(line) for line in lines if line.strip()]
    assert found, f"there is no block {names}"
    return found


def run(words: list[str], folder: Path) -> str:
    """A command of the docs in a process of its own, in a user's folder."""
    start = {"lora-lab": ["-m", "lora_lab.cli"], "python": []}[words[0]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, *start, *words[1:]]
    done = subprocess.run(
        call, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: ./base and ./tuned, adapters ./one and ./other of the base, and my.csv."""
    monkeypatch.chdir(tmp_path)
    tiny.reviews(tmp_path / "my.csv")
    network = AutoModel.from_pretrained(tiny.folder(tmp_path / "base"))
    for name in ("one", "other"):
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
        peft.get_peft_model(AutoModel.from_pretrained("base"), config).save_pretrained(name)
    for name, weight in network.named_parameters():
        if "layer" in name and weight.ndim == 2:
            weight.data += 0.01 * torch.randn(weight.shape)
    network.save_pretrained(tmp_path / "tuned")
    return tmp_path


def test_every_command_of_every_page_belongs_to_a_block_that_a_test_runs_or_checks() -> None:
    inside = {line for _, body in blocks(*RUN, *CHECKED) for line in body.splitlines()}
    for page, text in TEXTS.items():
        fences = re.split(r"(?m)^```", text)[1::2]
        for line in "".join(fence for fence in fences if fence.startswith("\n")).splitlines():
            assert not line or line in inside, (page, line)
    found = {name for name, _ in blocks(*RUN, *CHECKED, *CODE)}
    assert found == {*RUN, *CHECKED, *CODE}, "a test of a block that is gone tests nothing"


def test_the_tutorial_runs_in_order(here: Path) -> None:
    for words in commands("tutorial"):
        training = words[0] == "python" or words[1] in ("train", "sweep")
        if training:
            run(words, here)
        else:
            assert cli.main(words[1:]) == 0, words
    assert (here / "results" / "report.html").stat().st_size > 10_000
    assert (here / "results" / "ledger" / "runs.parquet").exists()
    ((_, code),) = blocks("tutorial-python")
    space: dict[str, object] = {}
    exec(code, space)
    assert np.isfinite(space["last"]["value"]).sum() >= 6


def test_a_newcomer_sees_spectra_after_at_most_eight_commands(here: Path) -> None:
    words = commands("newcomer")
    assert len(words) <= 8
    target = re.search(rf"^{words[2][1]}: (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert target, "make install is there"
    train, analyze, look = words[4:]
    run([*(word.replace("size=demo", "size=smoke") for word in train)], here)
    (folder,) = here.glob(analyze[analyze.index("--adapter") + 1])
    page = [str(folder) if "*" in word else word for word in analyze]
    assert cli.main(page[1:]) == 0
    assert look[:3] == ["python", "-m", "webbrowser"]
    text = (here / look[3]).read_text()
    assert "effective rank" in text
    assert "attention.self.query" in text


def test_own_data_and_an_own_model_train_by_the_commands_given(here: Path) -> None:
    (data,), (model,) = commands("own-data"), commands("own-model")
    both = [*model, "size=smoke"]
    assert plan([data[2:]])[0], "own data with MiniLM"
    assert "done" in run(both, here)


def test_weights_go_in_and_out_by_the_commands_given(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands("outside", "weights"):
        assert cli.main(words[1:]) == 0, words
        out = capsys.readouterr().out
        assert "encoder.layer.1" in out or "--html" in words or "--out" in words, words
    assert (here / "merged" / "model.safetensors").exists()
    assert (here / "pair.html").exists()


@pytest.mark.long
def test_the_models_that_come_along_train_by_the_commands_given(tmp_path: Path) -> None:
    for words in commands("grounds"):
        few = [word for word in words if not word.startswith("data.train_examples")]
        assert "done" in run([*few, "size=smoke", "train.epochs=1"], tmp_path)


@pytest.mark.parametrize("words", commands("planned", "typed"), ids=" ".join)
def test_what_takes_long_is_typed_right(words: list[str]) -> None:
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    words = words[words.index("lora_lab.cli" if "lora_lab.cli" in words else "lora-lab") + 1 :]
    given = cli.parser()[1][words[0]].parse_intermixed_args(words[1:])
    over = [word for word in vars(given).get("overrides") or () if "device" not in word]
    if words[0] in ("train", "sweep") and "data=hf" not in over:
        assert plan(preset(given.name) if words[0] == "sweep" else [[]], over)[0]


def test_the_cluster_command_chooses_a_launcher_and_plans_its_runs() -> None:
    ((_, _, module, multi, *words),) = commands("hydra")
    assert (module, multi) == ("experiments.sweep", "-m")
    launchers = [word for word in words if word.startswith("hydra/launcher=")]
    assert len(plan([[]], [w for w in words if w not in launchers])[0]) == 12
    assert "hydra-submitit-launcher" in (ROOT / "pyproject.toml").read_text()


def executed(block: str, name: str) -> types.ModuleType:
    """The code of a block as the module that its text names."""
    ((_, code),) = blocks(block)
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__doc__ = ast.get_docstring(ast.parse(code))
    exec(compile(code, name, "exec", dont_inherit=True), vars(module))
    return module


def test_the_method_of_the_docs_gives_its_exact_update() -> None:
    module = executed("own-method", "lora_lab.adapters.rows")
    try:
        linear = torch.nn.Linear(5, 3)
        layer = module.Rows().adapt(Place("a", linear, torch.Generator()))
        x = torch.randn(2, 5)
        assert torch.equal(layer(x), linear(x))
        layer.d.data = torch.tensor([0.5, -1.0, 2.0])
        moved = x @ (linear.weight + layer.tensors()["dW"]).T + linear.bias
        torch.testing.assert_close(layer(x), moved)
    finally:
        ADAPTERS._members.pop("rows")


def test_the_measure_of_the_docs_gives_its_golden_number() -> None:
    module = executed("own-measure", "lora_lab.measures.half_life")
    try:
        assert MEASURES["half_life"].kind == "rank"
        (test,) = doctest.DocTestFinder().find(module.half_life, globs=vars(module))
        assert doctest.DocTestRunner().run(test).failed == 0
    finally:
        MEASURES._members.pop("half_life")


def test_the_claim_of_the_docs_is_decided_by_its_table() -> None:
    claim = Claim("Z1", "products", executed("own-claim", "experiments.claims.z1_products"))
    assert set(SECTIONS) <= set(claim.sections)
    assert claim.computed
    table = claim.module.compute("smoke", 0).assign(seed=0)
    assert claim.module.verdict(table).outcome == "supported"
    made = claim.module.made("refuted", np.random.default_rng(0))
    assert claim.module.verdict(made).outcome == "refuted"
    assert claim.module.figure(table).axes


def test_the_table_of_methods_holds_each_of_them_and_every_law_passed() -> None:
    text = TEXTS["docs/reference.md"].partition("<!-- methods -->")[2]
    text = text.partition("<!-- /methods -->")[0]
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
    assert readme_written(TEXTS["README.md"]) == TEXTS["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_generated_parts_of_the_docs_are_up_to_date(page: str) -> None:
    text = TEXTS[f"docs/{page}.md"]
    assert written(page, text) == text, "python -m experiments.docs"


@pytest.mark.parametrize("page", TEXTS)
def test_every_local_picture_and_link_exists(page: str) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", TEXTS[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert target.startswith("http") or path.exists(), target
        if anchor:
            heads = re.findall(r"(?m)^#+ (.+)$", path.read_text())
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, (target, anchor)


def test_no_paragraph_stands_on_two_pages() -> None:
    seen: dict[str, str] = {}
    for page, text in TEXTS.items():
        prose = re.sub(r"(?s)```.*?```|<!-- ([\w-]+) -->.*?<!-- /\1 -->", "", text)
        for paragraph in prose.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) > 80:
                assert words not in seen, (page, seen[words])
                seen[words] = page


def test_the_citation_and_the_workflow_say_what_the_project_says() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"cff-version", "title", "message", "authors"} <= set(citation)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert any(step.get("run", "").startswith("make test") for step in job["steps"])
