"""A run's name is its content: pinned ids, and what may and may not change them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lora_lab.adapters.lora import LoRA
from lora_lab.config import (
    ID_LENGTH,
    Host,
    RunConfig,
    TrainConfig,
    as_dict,
    changed_default,
    choice,
    flat,
    literal_path,
    need,
    plain,
    run_id,
)
from lora_lab.data.planted import PlantedData
from lora_lab.hydra_bridge import Planned, plan
from lora_lab.models.planted import Planted
from lora_lab.registry import WrongInput

ROOT = Path(__file__).parents[1]

STATED = "host.device=cpu train.lr=1e-3 train.precision=float32"
"""What `resolve` would fill in with measured defaults, which may be measured again."""

GOLDEN = {
    "7901b55db985": "adapter=head",
    "45e0233a41a7": "adapter=full",
    "1d1d2cf8dd1a": "adapter=lora",
    "82f4bfa3b551": "model=minilm data=imdb adapter=lora adapter.r=4 adapter.scaling=rslora seed=2",
    "1c5589dd41fd": "adapter=lora adapter.targets=qv train.epochs=2",
    "a064dd65bbe5": "model=planted data=planted adapter=full",
    "76cfa0833e9f": "model=planted data=planted adapter.alpha_pattern={q:4,k:2} train.clip=null",
    "8a1f9b7d09dd": "model=planted data=planted size=smoke data.true_r=2 data.decay=0.5",
}


def one(words: str) -> Planned:
    (only,), _ = plan([words.split()], STATED.split())
    return only


@pytest.mark.parametrize(("golden", "words"), GOLDEN.items())
def test_ids_of_known_configs_never_change(golden: str, words: str) -> None:
    # A changed id orphans every stored run: change a golden only when the numbers change.
    assert one(words).run_id == golden


WITHOUT_TORCH = """
from lora_lab.config import RunConfig, TrainConfig, run_id
from lora_lab.data.planted import PlantedData
train = TrainConfig(lr=1e-3, also="norms+biases", clip=None)
print(run_id(RunConfig(data=PlantedData(true_r=2), train=train, seed=3)))
"""


def test_ids_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    found = set()
    for seed in ("0", "1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", WITHOUT_TORCH]
        found.add(subprocess.run(words, env=env, capture_output=True, text=True).stdout.strip())
    assert found == {"6c2c89427241"}


def planted(**train: Any) -> RunConfig:
    return RunConfig(Planted(), PlantedData(), LoRA(r=4), TrainConfig(**train))


def test_an_id_is_twelve_hexadecimal_digits() -> None:
    assert len(run_id(planted())) == ID_LENGTH == 12
    assert int(run_id(planted()), 16) >= 0


def test_the_same_number_as_int_and_as_float_is_the_same_run() -> None:
    assert run_id(planted(epochs=2)) == run_id(planted(epochs=2.0))
    assert run_id(planted(epochs=2)) != run_id(planted(epochs=3))


def test_a_boolean_and_a_number_are_not_the_same_value() -> None:
    @dataclass(frozen=True)
    class With(TrainConfig):
        extra: Any = None

    assert run_id(RunConfig(train=With(extra=True))) != run_id(RunConfig(train=With(extra=1)))


def test_every_value_that_differs_gives_another_id() -> None:
    configs = [
        planted(),
        planted(lr=1e-3),
        planted(clip=None),
        dataclasses.replace(planted(), seed=1),
        dataclasses.replace(planted(), adapter=LoRA(r=8)),
        dataclasses.replace(planted(), adapter=LoRA(r=4, r_pattern={"q": 2})),
        dataclasses.replace(planted(), adapter=LoRA(r=4, alpha_pattern={"q": 2})),
        dataclasses.replace(planted(), data=PlantedData(true_r=3)),
        dataclasses.replace(planted(), model=Planted(start="0123456789ab")),
    ]
    assert len({run_id(c) for c in configs}) == len(configs)


def test_the_choice_of_a_group_enters_the_id_even_with_equal_fields() -> None:
    # Both groups hold nothing but defaults: only their names differ.
    words = "model=minilm data={} adapter=head"
    ids = {one(words.format(data)).run_id for data in ("rotten_tomatoes", "imdb")}
    assert len(ids) == 2


def test_the_order_of_patterns_enters_the_id_because_the_first_match_wins() -> None:
    there, back = {"q": 2, ".*": 4}, {".*": 4, "q": 2}
    assert LoRA(r_pattern=there).rank_of("q") != LoRA(r_pattern=back).rank_of("q")
    ids = {run_id(dataclasses.replace(planted(), adapter=LoRA(r_pattern=p))) for p in (there, back)}
    assert len(ids) == 2
    assert list(plain(back)) == list(back), "the stored config must keep the order too"


def test_a_new_field_with_a_default_leaves_old_ids_alone() -> None:
    @dataclass(frozen=True)
    class Later(TrainConfig):
        new_number: float = 0.5
        new_names: list[str] = field(default_factory=list)
        new_switch: bool = False

    old = planted(lr=1e-3)
    new = dataclasses.replace(old, train=Later(lr=1e-3))
    assert run_id(new) == run_id(old)
    for change in ({"new_number": 0.6}, {"new_names": ["a"]}, {"new_switch": True}):
        changed = dataclasses.replace(new.train, **change)
        assert run_id(dataclasses.replace(new, train=changed)) != run_id(old), change


def stored(config: RunConfig) -> dict[str, Any]:
    """Content of config.json, as it is read back."""
    return json.loads(json.dumps({"run_id": run_id(config), "config": as_dict(config)}))


def test_a_stored_config_that_is_unchanged_names_no_field() -> None:
    config = dataclasses.replace(planted(), adapter=LoRA(r=4, r_pattern={"k": 2, "q": 1}))
    assert changed_default(config, stored(config)) is None


@pytest.mark.parametrize(
    ("group", "name", "old"),
    [("train", "warmup", 0.25), ("adapter", "init", "normal"), ("data", "noise", 0.7)],
)
def test_a_default_that_changed_in_code_is_named(group: str, name: str, old: Any) -> None:
    before = stored(planted())
    before["config"][group][name] = old
    assert changed_default(planted(), before) == f"{group}.{name}"


def test_a_changed_default_of_the_whole_run_is_named() -> None:
    before = stored(planted())
    before["config"]["seed"] = 7
    assert changed_default(planted(), before) == "seed"


def test_fields_that_a_stored_config_does_not_know_are_no_change() -> None:
    before = stored(planted())
    del before["config"]["train"]["warmup"]
    assert changed_default(planted(), before) is None


def test_a_config_of_another_id_is_not_compared() -> None:
    assert changed_default(planted(lr=1.0), stored(planted())) is None


def test_as_dict_is_json_with_every_field_and_the_choices() -> None:
    config = planted()
    found = as_dict(config)
    assert json.loads(json.dumps(found)) == found
    assert {g: found[g]["choice"] for g in ("model", "data", "adapter")} == {
        "model": "planted",
        "data": "planted",
        "adapter": "lora",
    }
    for group in ("model", "data", "adapter", "train"):
        names = {f.name for f in dataclasses.fields(getattr(config, group))}
        assert set(found[group]) - {"choice"} == names
    assert found["train"]["precision"] == "auto", "an enum is stored by name"


def test_flat_gives_dotted_columns_and_plain_choices() -> None:
    columns = flat(as_dict(dataclasses.replace(planted(), adapter=LoRA(r=4, r_pattern={"q": 2}))))
    assert columns["model"] == "planted"
    assert columns["adapter"] == "lora"
    assert columns["adapter.r"] == 4
    assert columns["adapter.r_pattern"] == '{"q": 2}'
    assert columns["train.clip"] == 1.0
    assert columns["seed"] == 0
    assert not any(isinstance(value, (dict, list)) for value in columns.values())


def test_choice_is_the_name_of_the_file_that_defines_a_config() -> None:
    assert [choice(c) for c in (Planted(), PlantedData(), LoRA())] == ["planted", "planted", "lora"]


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": -1.0},
        {"epochs": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"trace_every": 0},
        {"spectra": -1},
        {"evaluations": -1},
        {"warmup": 1.0},
        {"warmup": float("nan")},
        {"dropout": 1.0},
        {"weight_decay": -0.1},
        {"weight_decay": float("nan")},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"also": "heads"},
        {"also": "none+classifier"},
    ],
)
def test_training_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(WrongInput, match=rf"train\.{name} must be .*; got"):
        TrainConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"results": ""},
        {"results": "  "},
        {"workers": 0},
        {"threads": 0},
        {"keep_k": 0},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"checkpoint_minutes": -1.0},
    ],
)
def test_host_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(WrongInput, match=rf"host\.{name} must be .*; got"):
        Host(**values)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(WrongInput, match=r"seed must be in \[0, 2\^31\); got"):
        RunConfig(seed=seed)
    with pytest.raises(WrongInput, match=r"data\.seed must be"):
        PlantedData(seed=seed)


def test_a_refusal_says_what_is_allowed_what_was_given_and_what_to_do() -> None:
    with pytest.raises(WrongInput, match=r"^r must be at least 1; got 0\. Raise it\.$"):
        need(False, "r", "at least 1", 0, "Raise it.")
    need(True, "r", "at least 1", 1)


def test_a_path_means_nothing_but_itself_apart_from_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert literal_path("~/a b,[c]'(1).csv") == tmp_path / "a b,[c]'(1).csv"
    assert literal_path("$HOME/*") == Path("$HOME/*")
    assert literal_path("~nobody-has-this-name/x") == Path("~nobody-has-this-name/x")
