"""From override lines to runs: presets, unions, linked axes, literal values, starts from runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_lab import hydra_bridge, registry
from lora_lab.config import Keep
from lora_lab.hydra_bridge import MOST, Planned, choices, parse, plan, preset
from lora_lab.registry import WrongInput, conf_folder
from lora_lab.store import Store

PLANTED = ["model=planted", "data=planted"]
GROUNDS = {
    "minilm on rotten_tomatoes": ["model=minilm", "data=rotten_tomatoes"],
    "minilm on imdb": ["model=minilm", "data=imdb"],
    "minilm on joint data": ["model=minilm", "data=joint"],
    "digits": ["model=digits_vit", "data=digits"],
    "planted": PLANTED,
}
RUNS = {
    "demo": (22, 10),
    "rank": (27, 9),
    "alpha": (45, 15),
    "learning_rate": (60, 20),
    "targets": (36, 12),
    "methods": (75, 25),
}
"""Runs of each preset, and of each at one seed; `alpha` names one per seed twice (α = r is α = 16
at r = 16)."""


def runs(*words: str) -> list[Planned]:
    """The plan of one line on planted data."""
    return plan([[*PLANTED, *words]])[0]


def one(*words: str) -> Planned:
    (only,) = runs(*words)
    return only


def ids(found: list[Planned]) -> list[str]:
    return [run.run_id for run in found]


# ---- presets -----------------------------------------------------------------------------------


def test_every_preset_and_size_is_tested_here() -> None:
    assert set(RUNS) == set(choices("sweep"))
    assert choices("size") == ["demo", "paper", "smoke"]


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("size", ["", "smoke", "demo", "paper"])
@pytest.mark.parametrize("name", RUNS)
def test_every_preset_plans_on_every_embedded_ground_at_every_size(
    name: str, size: str, ground: str
) -> None:
    words = [*GROUNDS[ground], "seed=0", *([f"size={size}"] if size else [])]
    found, _ = plan(preset(name), words)
    assert len(found) == RUNS[name][1]
    assert len(set(ids(found))) == len(found)


@pytest.mark.parametrize("name", RUNS)
def test_presets_hold_the_runs_that_they_are_known_for(name: str) -> None:
    assert len(plan(preset(name))[0]) == RUNS[name][0]


def test_the_demo_has_floor_ceiling_and_ranks_at_three_seeds_and_a_second_rule_at_one() -> None:
    found, _ = plan(preset("demo"))
    seen = [
        (type(c.adapter).__name__, getattr(c.adapter, "r", 0), getattr(c.adapter, "alpha", 0))
        for c in (run.config for run in found)
        if c.seed == 0
    ]
    doubled = [("LoRA", r, 2.0 * r) for r in (1, 4, 16, 64)]
    constant = [("LoRA", r, 16.0) for r in (1, 4, 16, 64)]
    assert seen == [("Head", 0, 0), ("Full", 0, 0), *doubled, *constant]
    assert {run.config.data.train_examples for run in found} == {2048}
    assert sorted(run.config.seed for run in found).count(1) == 6


def test_an_unknown_preset_is_refused_with_the_names() -> None:
    with pytest.raises(WrongInput, match=r"unknown sweep 'rnak'; allowed: alpha, .*'rank'\?"):
        preset("rnak")


def test_conf_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hydra_bridge._composed.cache_clear()  # what was composed before is not looked up again
    assert conf_folder().is_absolute()
    assert len(plan(preset("demo"), [*PLANTED, "size=smoke"])[0]) == RUNS["demo"][0]
    assert not list(tmp_path.iterdir())


def test_conf_is_beside_the_package_of_a_checkout_and_inside_that_of_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lora_lab"
    monkeypatch.setattr(registry, "__file__", str(package / "registry.py"))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").touch()
    assert conf_folder() == tmp_path / "conf"
    (tmp_path / "conf").rename(tmp_path / "moved")
    package.mkdir()
    (tmp_path / "moved").rename(package / "conf")
    assert conf_folder() == package / "conf"


# ---- lines, unions, axes -----------------------------------------------------------------------


def test_the_union_of_lines_holds_each_run_once_in_the_order_of_the_lines() -> None:
    lines = [
        [*PLANTED, "adapter.r=1,2"],
        [*PLANTED, "adapter.r=2,4"],
        [*PLANTED, "adapter=lora", "adapter.r=1", "adapter.alpha=2"],  # 2r written out
    ]
    found, _ = plan(lines)
    assert [run.config.adapter.r for run in found] == [1, 2, 4]


def test_axes_combine_and_a_later_value_of_a_key_replaces_an_earlier() -> None:
    found = runs("adapter.r=1,2", "seed=0,1", "adapter.r=4,8")
    assert [(run.config.adapter.r, run.config.seed) for run in found] == [
        (4, 0),
        (4, 1),
        (8, 0),
        (8, 1),
    ]


def test_a_linked_axis_follows_the_other() -> None:
    found = runs("adapter.r=1,4,16", "adapter.alpha=${adapter.r}")
    assert [(run.config.adapter.r, run.config.adapter.alpha) for run in found] == [
        (1, 1.0),
        (4, 4.0),
        (16, 16.0),
    ]
    mixed = runs("adapter.r=4", "adapter.alpha=${adapter.r},16")
    assert [run.config.adapter.alpha for run in mixed] == [4.0, 16.0]


def test_a_link_to_nothing_is_refused() -> None:
    with pytest.raises(WrongInput, match=r"refers to what is not there.*adapter\.q"):
        runs("adapter.alpha=${adapter.q}")


def test_the_default_alpha_is_the_same_run_as_two_r_written_out() -> None:
    assert one("adapter.r=4").run_id == one("adapter.r=4", "adapter.alpha=8").run_id
    assert one("adapter.r=4").run_id != one("adapter.r=4", "adapter.alpha=4").run_id


def test_default_rate_and_precision_are_filled_in_before_the_id() -> None:
    run = one("adapter=lora")
    rate = type(run.config.model).full_rate * type(run.config.adapter).rate
    assert run.config.train.lr == pytest.approx(rate)
    written = one("adapter=lora", f"train.lr={run.config.train.lr}", "train.precision=float32")
    assert written.run_id == run.run_id


def test_the_command_line_is_stronger_than_a_line_and_a_line_than_the_defaults() -> None:
    lines = [[*PLANTED, "adapter.r=4", "seed=1"]]
    (run,), host = plan(lines, ["seed=2"], ["seed=3", "adapter.r=8", "host.keep=top"])
    assert (run.config.seed, run.config.adapter.r, host.keep) == (2, 4, Keep.top)


def test_a_key_of_the_command_line_is_left_out_of_lines_whose_method_lacks_it() -> None:
    lines = [[*PLANTED, f"adapter={name}"] for name in ("head", "full", "lora")]
    found, _ = plan(lines, ["adapter.r=1,2", "adapter.targets=qv"])
    described = [
        (type(c.adapter).__name__, getattr(c.adapter, "r", None), getattr(c.adapter, "targets", ""))
        for c in (run.config for run in found)
    ]
    assert described == [
        ("Head", None, ""),
        ("Full", None, "qv"),
        ("LoRA", 1, "qv"),
        ("LoRA", 2, "qv"),
    ]


def test_a_key_of_the_command_line_that_fits_no_line_is_refused() -> None:
    lines = [[*PLANTED, f"adapter={name}"] for name in ("head", "full", "lora")]
    with pytest.raises(WrongInput, match=r"adapter=lora has no key 'rr'; .*Did you mean 'r'\?"):
        plan(lines, ["adapter.rr=3"])
    with pytest.raises(WrongInput, match=r"adapter=full has no key 'r'; its keys: targets"):
        plan(lines[:2], ["adapter.r=3"])


def test_a_key_of_a_line_that_its_own_method_lacks_is_refused() -> None:
    with pytest.raises(WrongInput, match="adapter=full has no key 'r'"):
        plan([[*PLANTED, "adapter=full", "adapter.r=3"]])


def test_another_method_on_the_command_line_drops_what_a_line_said_of_its_own() -> None:
    found, _ = plan(preset("rank"), [*PLANTED, "adapter=full", "seed=0"])
    assert len(found) == 1, "head, full and LoRA lines become the same run"


def test_a_size_only_sets_fields_and_explicit_values_win_in_any_order() -> None:
    small = one("size=smoke").config
    assert (small.data.train_examples, small.train.evaluations) == (64, 1)
    same = one(
        *("data.train_examples=64", "data.validation_examples=32", "data.test_examples=64"),
        *("train.trace_every=1", "train.spectra=2", "train.evaluations=1"),
    )
    assert same.run_id == one("size=smoke").run_id, "a size is none of the run's own fields"
    for words in (
        ["size=smoke", "data.train_examples=48"],
        ["data.train_examples=48", "size=smoke"],
    ):
        assert one(*words).config.data.train_examples == 48
    (run,), _ = plan([[*PLANTED, "size=paper", "data.test_examples=7"]], ["size=smoke"])
    assert (run.config.data.train_examples, run.config.data.test_examples) == (64, 7)


def test_several_sizes_and_methods_are_axes_too() -> None:
    found = runs("size=smoke,demo", "adapter=head,full")
    assert len(found) == 4


def test_more_combinations_than_can_be_planned_are_refused_at_once() -> None:
    for words in (["seed=range(0,1000000000)"], ["seed=range(0,1000)", "adapter.r=range(1,50)"]):
        with pytest.raises(WrongInput, match=f"more than {MOST} runs in one command"):
            runs(*words)


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "my file.csv",
        "a,b.csv",
        "x(1).csv",
        "[x].csv",
        "{x}.csv",
        "don't.csv",
        'say "hi".csv',
        "a=b.csv",
        "${adapter.r}.csv",
        "a\\${adapter.r}\\\\${b.csv",
        "100%.csv",
        "über, [a] (b).csv",
        "back\\slash.csv",
    ],
)
def test_paths_and_column_names_mean_nothing_but_themselves(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('"the, text (a)",[stars]\ngood,1\nbad,0\nfine,1\nawful,0\n')
    words = ["data=table", f"data.path={path}", "data.text=the, text (a)", "data.label=[stars]"]
    (run,), _ = plan([words])
    assert run.config.data.path == str(path)
    assert run.config.data.text == "the, text (a)"


def test_a_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.csv").write_text("text,label\ngood,1\nbad,0\nfine,1\nawful,0\n")
    (run,), host = plan([["data=table", "data.path=~/t.csv", "host.results=~/my, results"]])
    assert host.results == str(tmp_path / "my, results")
    assert run.config.data.path == "~/t.csv", "as given, so that the id is the same for all users"


@pytest.mark.parametrize("value", ["007", "1e10", "12345e67", "true", "null", "1,2"])
def test_names_that_look_like_numbers_stay_as_they_were_typed(value: str) -> None:
    (axis,) = parse([f"model.revision={value}"])
    assert axis.values == (value,)


def test_patterns_are_given_as_a_mapping_in_order() -> None:
    run = one("adapter.r_pattern={v:2,q:4}", "adapter.alpha_pattern={q:3}")
    assert list(run.config.adapter.r_pattern.items()) == [("v", 2), ("q", 4)]
    assert run.config.adapter.alpha_pattern == {"q": 3.0}
    assert run.config.adapter.rank_of("q") == 4
    two = runs("adapter.r_pattern={q:2},{q:4}")
    assert [r.config.adapter.r_pattern for r in two] == [{"q": 2}, {"q": 4}]
    minilm = ["adapter.r_pattern={query:4,layer.0.attention.self.key:2}"]
    (run,), _ = plan([minilm])
    assert run.config.adapter.rank_of("encoder.layer.0.attention.self.key") == 2


def test_a_regex_in_quotes_reaches_the_method_unchanged() -> None:
    assert one(r"adapter.targets='(q|k)'").config.adapter.targets == "(q|k)"
    assert len(runs("adapter.targets='(q|k)',v")) == 2


def test_choices_and_switches_become_what_they_name() -> None:
    assert one("adapter.scaling=rslora").config.adapter.scaling == "rslora"
    _, host = plan([[*PLANTED, "host.keep=top", "host.yes=true", "host.workers=null"]])
    assert (host.keep, host.yes, host.workers) == (Keep.top, True, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("adapter.r=2.5", "adapter.r must be a whole number; got 2.5."),
        ("adapter.r=null", "adapter.r must be a whole number; got null."),
        ("adapter.r=true", "adapter.r must be a whole number; got true."),
        ("adapter.r=[1,2]", "adapter.r must be a whole number; got [1, 2]."),
        ("adapter.r_pattern=3", "adapter.r_pattern must be a mapping of name patterns to numbers"),
        ("adapter.r_pattern={q:x}", "adapter.r_pattern must be a mapping"),
        ("adapter.r_pattern={*q:2}", "pattern '*q' is no regular expression"),
        ("train.lr=fast", "train.lr must be a number or null; got 'fast'."),
        ("host.yes=perhaps", "host.yes must be true or false; got 'perhaps'."),
        ("train.schedule=linaer", "one of linear, cosine, constant; got 'linaer'. Did you mean"),
        ("adapter.targets=[q]", "adapter.targets must be text; got ['q']."),
        ("seed=1.5", "seed must be a whole number; got 1.5."),
        ("train=fast", "'train' is a group; write one of its keys: train.lr, train.epochs"),
        ("train={lr:1}", "'train' is a group; write one of its keys"),
        ("lr=1", "unknown key 'lr'; groups: model, data, adapter, train, host, seed, size. Did"),
        ("adapter.lr=1", "Did you mean 'train.lr'?"),
        ("adapter.r=glob(*)", "is not understood"),
        ("host.device=tpu", "host.device must be auto or cpu"),
    ],
)
def test_wrong_values_are_refused_in_words(words: str, said: str) -> None:
    with pytest.raises(WrongInput) as error:
        runs(words)
    assert said in str(error.value)


# ---- runs that start from runs -----------------------------------------------------------------

FIRST = "model=planted data=planted adapter=full size=smoke"


def test_a_run_that_starts_from_an_override_line_needs_that_run_first() -> None:
    run = one("size=smoke", f"model.start={FIRST}")
    (first,) = run.needs
    assert first.run_id == one(*FIRST.split()[2:]).run_id
    assert run.config.model.start == first.run_id


def test_the_run_that_it_starts_from_enters_the_id() -> None:
    found = [one(f"model.start={FIRST} seed={seed}").run_id for seed in (0, 1)]
    assert len({*found, one().run_id}) == 3


def test_a_start_by_id_must_be_a_finished_run_of_the_results_folder(tmp_path: Path) -> None:
    results = f"host.results={tmp_path / 'r'}"
    with pytest.raises(WrongInput, match=r"model.start=0123456789ab: no such finished run"):
        one("model.start=0123456789ab", results)
    assert not (tmp_path / "r").exists()
    Store(tmp_path / "r", create=True)
    with pytest.raises(WrongInput, match=r"no such finished run"):
        one("model.start=0123456789ab", results)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("nope", "must be the id of a finished run or an override line"),
        ("0123456789AB", "must be the id of a finished run or an override line"),
        (f"{FIRST} seed=0,1", "must name one run; .* names 2"),
        (f"{FIRST} adapter.rr=3", "adapter=full has no key 'rr'"),
        ("adapter=full", "a run of the same model; .* trains model=minilm, .* of model=planted"),
        (f"{FIRST} data.width=64", "a run of the same model"),
    ],
)
def test_a_start_that_is_no_run_of_this_model_is_refused(start: str, said: str) -> None:
    with pytest.raises(WrongInput, match=said):
        one(f"model.start={start}")


def test_planning_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan(preset("rank"), [*PLANTED, "host.results=here"])
    assert os.listdir(tmp_path) == []
