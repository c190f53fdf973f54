"""The report is one inert file whose numbers are those of the tables."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tables import Tables, as_loaded, empty_tables, made_up_tables, run_row

from lora_lab import report
from lora_lab.figures import FIGURES
from lora_lab.report import rows, summary, words

DEMO = made_up_tables()
DRAWN = [name for name in FIGURES if name != "methods"]
"""The figures that the demo's runs give."""
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>alert(1)</script>",
    "'; DROP TABLE runs; --",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{",
    "\u202egnp.exe",
    "javascript:alert(1)",
]


class Page(HTMLParser):
    """Tags, attributes and text of a page, read by a real parser."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's report in a folder with a space."""
    return report.write(DEMO, tmp_path_factory.mktemp("a folder") / "results" / "report.html")


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def without_pictures(runs: pd.DataFrame) -> Tables:
    none = empty_tables()
    return Tables(runs, none.measures, none.traces, none.spectra)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is about words alone: no pictures, which take most of the time."""
    monkeypatch.setattr(words, "PICTURED", 0)


# ---- one inert file ----------------------------------------------------------------------------


def test_the_pictures_are_inside_with_words_for_who_cannot_see_them(page: str):
    images = [attrs for tag, attrs in Page(page).tags if tag == "img"]
    assert len(images) == len(DRAWN) == 6
    for image in images:
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
        assert image["alt"]
        assert {"width", "height"} <= image.keys()


def test_every_picture_has_its_sentence_of_what_to_look_for(page: str):
    said = Page(page).text
    assert all(FIGURES[name].look_for in said for name in DRAWN)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(page: str):
    tags = Page(page).tags
    assert not {"iframe", "object", "embed", "base", "form"} & {t for t, _ in tags}
    kinds = [attrs.get("type", "code") for tag, attrs in tags if tag == "script"]
    assert kinds.count("code") == 1
    assert set(kinds) == {"code", "text/plain"}
    for _, attrs in tags:
        assert "style" not in attrs
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href"):
            assert str(attrs.get(name, "#")).startswith(("#", "data:image/png;base64,", "data:,"))
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://", page)


def test_the_policy_allows_style_and_scripts_by_their_hashes_and_pictures_alone(page: str):
    (policy,) = [
        str(attrs["content"])
        for tag, attrs in Page(page).tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data: blob:"
    assert "connect-src" not in directives
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert inside
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        words = directives[f"{tag}-src"].split()
        assert f"'sha256-{digest}'" in words
        assert all(word.startswith("'sha256-") for word in words)


def test_all_of_the_data_is_inside_and_a_thinned_run_says_so(page: str):
    parts = dict(re.findall(r'data-part="([^"]+)">([^<]*)<', page))
    runs = DEMO.runs.loc[DEMO.runs["adapter"] != "head", "run_id"]
    assert {"runs", "layers", "plotly", *(f"run/{run_id}" for run_id in runs)} <= set(parts)
    full = DEMO.runs.loc[DEMO.runs["adapter"] == "full", "run_id"].iloc[0]
    told = json.loads(gzip.decompress(base64.b64decode(parts[f"run/{full}"])))
    assert "lora-lab dashboard" in told["thinned"]


@pytest.mark.usefixtures("undrawn")
def test_a_file_that_would_be_too_large_leaves_out_the_oldest_runs(monkeypatch: pytest.MonkeyPatch):
    size = len(report.build(DEMO).encode()) - 10
    monkeypatch.setattr(report, "SIZE", size)
    cut = report.build(DEMO)
    assert len(cut.encode()) <= size
    newest = DEMO.runs.sort_values("started", ascending=False)["run_id"]
    held = [run_id in re.findall(r'data-part="run/([^"]+)"', cut) for run_id in newest]
    assert held == sorted(held, reverse=True)
    assert 0 < sum(held) < len(held)


def test_the_demo_report_is_small(written: Path):
    assert written.stat().st_size < 5e6


def test_figures_are_also_files_and_nothing_else_is_left(written: Path):
    made = {p.relative_to(written.parent).as_posix() for p in written.parent.rglob("*.*")}
    pictures = {f"figures/{name}.{kind}" for name in DRAWN for kind in ("png", "pdf")}
    assert made == {"report.html"} | pictures
    for name in DRAWN:
        assert (written.parent / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")


def test_equal_tables_give_equal_files(tmp_path: Path):
    for folder in ("a", "b"):
        report.write(without_pictures(DEMO.runs), tmp_path / folder / "report.html")
    names = {p.relative_to(tmp_path / "a") for p in tmp_path.glob("a/**/*.*")}
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def named(text: str) -> Tables:
    """Runs that carry a text wherever a user or an error can put one."""
    extra = {"adapter.r": 4.0, "adapter.alpha": 8.0, "adapter.scaling": text}
    runs = [
        run_row("a" * 12, "lora", 0, status="failed", error=text, score=np.nan),
        run_row("b" * 12, text, 0, model=text, data=text, git_commit=text, cpu=text),
        run_row("c" * 12, "lora", 0, **{"adapter.targets": text, **extra}),
    ]
    return without_pictures(as_loaded(pd.DataFrame(runs)))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_stands(text: str):
    hostile, harmless = Page(report.build(named(text))), Page(report.build(named("name")))
    assert hostile.text.count(" ".join(text.split())) >= 6
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [attrs.keys() for _, attrs in hostile.tags] == [a.keys() for _, a in harmless.tags]


def test_hostile_names_stay_inside_the_results_folder(tmp_path: Path):
    runs = DEMO.runs.copy()
    runs.loc[:10, "model"] = "../../../up"
    runs.loc[11:, "model"] = "/abs\x00 <b>$"
    path = report.write(without_pictures(runs), tmp_path / "in" / "results" / "report.html")
    made = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(made) == 5
    assert all(p.is_relative_to(path.parent) for p in made)


# ---- its numbers -------------------------------------------------------------------------------


def interval(values: pd.Series) -> str:
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{values.mean():.3f} ± {half:.3f}"


def test_the_summary_states_floor_ceiling_and_best_adapter(page: str):
    said, runs = Page(page).text, DEMO.runs
    head, full = (runs.loc[runs["adapter"] == method, "score"] for method in ("head", "full"))
    assert f"Head only scores {interval(head)} (3 seeds)" in said
    assert f"full fine-tuning scores {interval(full)} (3 seeds)" in said
    main = runs[runs["adapter.alpha"] == 2 * runs["adapter.r"]]
    r = main.groupby("adapter.r")["validation_score"].mean().idxmax()
    best = main.loc[main["adapter.r"] == r, "score"]
    gap = 100 * (full.mean() - best.mean())
    assert f"LoRA, α = 2r at r = {r:g} (the best of 4 settings by validation score)" in said
    assert f"scores {interval(best)} (3 seeds)" in said
    assert f"{abs(gap):.1f} points {'below' if gap > 0 else 'above'} full fine-tuning" in said


def of_full(measure: str, side: str = "") -> pd.DataFrame:
    full = DEMO.runs.loc[DEMO.runs["adapter"] == "full", "run_id"]
    rows = DEMO.measures[DEMO.measures["run_id"].isin(full)]
    return rows[(rows["measure"] == measure) & (rows["side"] == side)]


def test_the_summary_sets_the_directions_needed_beside_the_effective_rank(page: str):
    said = Page(page).text
    ranks = of_full("effective_rank").groupby("run_id")["value"].mean()
    score = DEMO.runs.set_index("run_id")["score"]
    table = of_full("oracle_score", "trained_head").pivot_table(
        index="k", columns="run_id", values="value"
    )
    k = next(k for k in table.index if table.loc[k].mean() >= score[table.columns].mean() - 0.01)
    assert f"effective rank of {ranks.mean():.1f} ± " in said
    assert f"its leading k = {k:g} directions in each layer" in said
    assert f"scores {interval(table.loc[k])}," in said
    assert (
        f"An update of effective rank {ranks.mean():.0f} does its work, to within one point, "
        f"with {k:g} directions." in said
    )


def with_oracle(scores: dict[float, float]) -> Tables:
    """The demo whose every oracle score at k is full's minus `scores[k]`."""
    rows = DEMO.measures
    full = rows["run_id"].map(DEMO.runs.set_index("run_id")["score"])
    new = (full - rows["k"].map(scores)).where(rows["measure"] == "oracle_score", rows["value"])
    keep = (rows["measure"] != "oracle_score") | rows["k"].isin(scores)
    return Tables(DEMO.runs, rows.assign(value=new)[keep], DEMO.traces, DEMO.spectra)


@pytest.mark.parametrize(
    ("lost", "conclusion"),
    [
        ({0: 0.2, 1: 0.1, 2: 0.05}, "No truncation up to k = 2 directions per layer is within"),
        ({0: 0.0, 1: 0.0}, "The trained head alone is within one point"),
        ({0: 0.2, 1: 0.009}, "does its work, to within one point, with 1 direction."),
        ({0: 0.2, 256: 0.1, 384: 0.0}, "needs 384 directions, no fewer than the effective rank"),
    ],
)
def test_the_conclusion_follows_the_numbers_also_where_it_is_another(
    lost: dict[float, float], conclusion: str
):
    assert conclusion in " ".join(summary.sentences(with_oracle(lost)))


def test_a_single_seed_has_no_interval_and_nothing_is_claimed_without_rows():
    one = made_up_tables(seeds=1)
    assert "±" not in " ".join(summary.sentences(one))
    assert "(1 seed)" in " ".join(summary.sentences(one))
    assert summary.sentences(empty_tables()) == []


def test_one_lucky_seed_is_not_the_best_adapter():
    runs = DEMO.runs.copy()
    single = runs["adapter.alpha"].eq(16) & runs["adapter.r"].eq(64)
    runs.loc[single, ["score", "validation_score"]] = 0.99
    said = summary.sentences(Tables(runs, DEMO.measures, DEMO.traces, DEMO.spectra))
    assert any(sentence.startswith("LoRA, α = 2r") for sentence in said)


@pytest.mark.usefixtures("undrawn")
def test_runs_are_counted_by_status_and_errors_are_listed():
    runs = DEMO.runs.copy()
    ended = {3: ("failed", "disk full"), 4: ("failed", "killed"), 5: ("diverged", "loss is NaN")}
    for row, (status, error) in ended.items():
        runs.loc[row, ["status", "error"]] = [status, error]
        runs.loc[row, "score"] = np.nan
    said = Page(report.build(without_pictures(runs))).text
    assert "22 runs: 19 done, 1 diverged, 2 failed." in said
    for row, (_, error) in ended.items():
        assert error in said
        assert said.count(runs["run_id"][row]) == 2


def test_the_method_table_groups_by_setting_and_averages_finished_runs():
    runs = DEMO.runs.copy()
    runs.loc[(runs["adapter"] == "full") & (runs["seed"] == 2), ["status", "score"]] = [
        "diverged", np.nan,
    ]  # fmt: skip
    table = rows.method_table(runs)
    headings = [name for name, _ in table.columns]
    cells = [dict(zip(headings, row, strict=True)) for row in table.rows]
    assert [c["method"] for c in cells[:3]] == ["head only", "full fine-tuning", "LoRA"]
    assert len(cells) == 2 + 4 * 2
    full = runs[(runs["adapter"] == "full") & (runs["status"] == "done")]["score"]
    assert cells[1]["seeds done"] == "2 of 3"
    assert cells[1]["test score, 95 % t interval"] == interval(full)


def test_settings_that_differ_outside_the_columns_are_named_and_kept_apart():
    runs = DEMO.runs.copy()
    runs.loc[runs["seed"] == 1, "data.train_examples"] = 128.0
    table = rows.method_table(runs)
    assert "data.train_examples = 128.0" in [cell for row in table.rows for cell in row]


def test_the_runs_table_holds_every_column_that_a_reader_needs(page: str):
    said = Page(page).text
    headings = "run method r α learning rate seed status test score trainable % seconds samples/s"
    assert f"{headings} commit dirty" in said
    first = DEMO.runs.iloc[-1]
    assert f"{first['run_id']} LoRA 64 16 0.001 0 done {first['score']:.4f} 6.4 22.5 156" in said


def test_missing_values_are_a_dash_never_a_number_or_nan(page: str):
    said = Page(page).text
    assert not re.search(r"\b(nan|NaN|None|<NA>)\b", said)
    assert "head only – –" in said


def test_provenance_names_versions_commits_and_uncommitted_changes():
    runs = DEMO.runs.copy()
    runs.loc[0, "git_commit"] = "f" * 40
    lines = dict(rows.provenance(runs))
    assert lines["commit"] == "0123456789ab (21 runs), ffffffffffff (1 runs)"
    assert lines["torch"] == "2.13.0"
    assert lines["uncommitted changes"] == "no"


# ---- its sizes ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_empty_tables_give_a_page_that_says_so():
    assert "There is no run yet." in Page(report.build(empty_tables())).text


@pytest.mark.usefixtures("undrawn")
def test_each_model_and_data_has_a_section_of_its_own():
    other = DEMO.runs[:4].assign(model="planted", data="planted")
    other = other.assign(run_id="x" + other["run_id"], score=0.1)
    runs = pd.concat([DEMO.runs, other], ignore_index=True)
    tables = Tables(runs, DEMO.measures, DEMO.traces, DEMO.spectra)
    page = report.build(tables)
    assert page.index("<h2>minilm on rotten_tomatoes</h2>") < page.index("<h2>planted on planted")
    main = next(iter(words.pairs(tables)))[1]
    assert summary.sentences(main) == summary.sentences(DEMO)


def test_five_thousand_runs_are_one_small_page_of_the_newest_500():
    rng = np.random.default_rng(0)
    plan = [("head", 0), ("full", 0), *(("lora", 2**i) for i in range(7))]
    many = []
    for i in range(5000):
        adapter, r = plan[i % len(plan)]
        lora = {"adapter.r": float(r), "adapter.alpha": 2.0 * r, "adapter.scaling": "alpha_over_r"}
        many.append(run_row(
            f"{i:012x}", adapter, i, score=float(rng.normal(0.8, 0.01)),
            started=f"2025-01-01T{i:06d}", status="failed" if i % 10 == 0 else "done", error="e",
            **{"train.lr": float(10.0 ** -rng.integers(2, 5))}, **(lora if r else {}),
        ))  # fmt: skip
    runs = as_loaded(pd.DataFrame(many))
    start = time.process_time()
    page = report.build(without_pictures(runs))
    assert time.process_time() - start < 10
    assert len(page) < 5e6
    assert "These are the newest 500 of 5000 runs" in page
    assert f"{4999:012x}" in page
    assert f"<td>{4499:012x}</td>" not in page.partition("All runs")[2]
    assert "400 more are not listed" in page


def with_examples(gain: dict[str, float], count: int = 200) -> Tables:
    """The demo's runs, of which those of each r > 1 are another adapter, and their test examples.

    The head is right on 60 %; `gain` is the share that an adapter has right beyond these.
    """
    names = {4.0: "stacked", 16.0: "sparse", 64.0: "projected"}
    adapter = DEMO.runs["adapter.r"].map(names).fillna(DEMO.runs["adapter"])
    runs = DEMO.runs.assign(adapter=adapter.astype("string"), **{"adapter.alpha": 1.0})
    rows = [
        pd.DataFrame(
            {"run_id": run_id, "i": range(count),
             "value": np.arange(count) < count * (0.6 + gain.get(name, 0.1))}
        )
        for run_id, name in zip(runs["run_id"], runs["adapter"], strict=True)
    ]  # fmt: skip
    examples = pd.concat(rows).astype({"value": "float64"})
    return Tables(runs, DEMO.measures, DEMO.traces, DEMO.spectra, examples)


def test_settings_are_held_against_the_floor_example_by_example():
    none = summary.sentences(with_examples({"head": 0.0}))[-1]
    assert "none worse" in none
    assert "on the same 200 test examples" in none
    one = summary.sentences(with_examples({"head": 0.0, "sparse": -0.2}))[-1]
    assert "1 significantly worse (sparse" in one
    equal = summary.sentences(with_examples(dict.fromkeys(["sparse"], 0.1) | {"head": 0.1}))[-1]
    assert " 0 score significantly better" in equal
    assert "test examples" not in " ".join(summary.sentences(DEMO))
