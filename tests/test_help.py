"""What the command line says of itself: help of every config key, and completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import HEAVY

from lora_lab import cli, fields, helping
from lora_lab.fields import catalogue
from lora_lab.hydra_bridge import REGISTRIES, build
from lora_lab.registry import WrongInput

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the test's own, warm."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        catalogue()
        yield folder


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["help", *argv]) == 0
    return capsys.readouterr().out


def test_every_key_that_hydra_accepts_is_known_with_type_and_meaning() -> None:
    known = {(f.key, f.owner) for f in catalogue().fields}
    for group, registry in REGISTRIES.items():
        for name in registry:
            extra = {"hf": {"model.name": "x"}}.get(name, {}) if group == "model" else {}
            cfg, refused = build({group: name, **extra})
            assert not refused
            assert {(f"{group}.{key}", f"{group}={name}") for key in cfg[group]} <= known
            assert {
                (f"{part}.{key}", "") for part in ("train", "host") for key in cfg[part]
            } <= known
    assert [f.key for f in catalogue().fields if not f.meaning or not f.kind] == []


@pytest.mark.parametrize(
    ("key", "owner", "value"),
    [
        ("adapter.r", "adapter=lora", "a whole number at least 1"),
        ("adapter.dropout", "adapter=lora", "a number in [0, 1)"),
        ("model.width", "model=digits_vit", "a multiple of 16 in [16, 512]"),
        ("model.max_tokens", "model=hf", "a whole number at least 4"),
        ("train.schedule", "", "one of linear, cosine, constant"),
        ("seed", "", "a whole number in [0, 2^31)"),
    ],
)
def test_a_range_is_what_the_check_itself_says(key: str, owner: str, value: str) -> None:
    (found,) = (f for f in catalogue().fields if (f.key, f.owner) == (key, owner))
    assert found.value == value


def test_a_method_whose_library_is_not_installed_is_known_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(config: object) -> None:
        raise WrongInput("adapter=peft needs the library peft; run: pip install peft.")

    monkeypatch.setattr("lora_lab.injection.checked", absent)
    keys = {f.key for f in fields.asked().fields if f.owner == "adapter=peft"}
    assert keys == {"adapter.config", "adapter.targets"}


def test_help_of_a_key_shows_type_default_and_meaning_of_each_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    out = said(capsys, "adapter.r")
    assert re.search(
        r"adapter\.r +a whole number at least 1 +8 +Configured rank.* lora, sparse", out
    )
    assert "stacked" in out
    assert said(capsys, "r") == out


def test_help_without_a_key_names_every_choice_and_every_common_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = said(capsys)
    assert "adapter: adaptive, dynamic, full" in out
    for field in catalogue().fields:
        assert field.owner or field.key in out
    assert "\x1b" not in out, "plain where there is no terminal"


@pytest.mark.parametrize(
    ("typed", "meant"), [("adaptr.r", "adapter.r"), ("train.ephocs", "train.epochs")]
)
def test_an_unknown_key_is_one_line_with_the_nearest_key(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["help", typed]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"Did you mean {meant!r}?" in error


def test_the_first_page_shows_six_words_an_example_and_each_command_once() -> None:
    commands = cli.parser()[1]
    page = helping.page(commands)
    assert all(len(line) <= 100 for line in page.splitlines())
    assert "lora-lab train model=planted" in page.partition("Six words")[0]
    six, _, listed = page.partition("Six words")[2].partition("\nTrain\n")
    for part, words in ((six, helping.SIX), (listed, commands)):
        for word in words:
            assert len(re.findall(rf"^  {word} ", part, re.M)) == 1, word


def complete(line: str) -> list[str]:
    """What the shell would offer behind this line, by argcomplete's own protocol."""
    breaks = " \t\n\"'><=;|&(:"
    environment = os.environ | {
        **{"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": "words", "IFS": "\v"},
        **{"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_COMP_WORDBREAKS": breaks},
        **{"PYTHONPATH": str(ROOT), "_ARGCOMPLETE_SHELL": "bash", "COMP_TYPE": "9"},
    }
    folder = Path(os.environ["XDG_CACHE_HOME"])
    words = [sys.executable, "-X", "importtime", "-m", "lora_lab.cli"]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    loaded = set(re.findall(r"\| +(\w+)$", done.stderr, re.M))
    assert not loaded & (HEAVY | {"pandas"}), "completion waits for nothing big"
    return [word.strip() for word in (folder / "words").read_text().split("\v")]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lora-lab tr", ["train", "truncate"]),
        ("lora-lab train adapter=dynamic adapter.s", ["adapter.scaling=", "adapter.start_r="]),
        ("lora-lab train adapter.init=p", ["peft_gaussian", "pissa"]),
        ("lora-lab train model=minilm,sm", ["minilm,smollm2"]),
        ("lora-lab sweep ra", ["rank"]),
        ("lora-lab help adapter=st", ["stacked"]),
    ],
)
def test_a_shell_completes(line: str, offered: list[str]) -> None:
    assert complete(line) == offered


def test_the_catalogue_is_asked_again_only_when_the_package_changes(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(fields, "asked", lambda: pytest.fail("asked again"))
    assert catalogue().choices["size"]["smoke"].startswith("Seconds")
    (file,) = (cache / "lora_lab").glob("fields-*.json")
    whole = file.read_text()
    for broken in (whole[:100], json.dumps({**json.loads(whole), "stamp": "old"})):
        file.write_text(broken)
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            catalogue()
    file.write_text(whole)
