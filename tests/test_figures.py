"""Every figure draws what the tables hold, the same way and readably."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from tables import Tables, as_loaded, empty_tables, made_up_tables, run_row

from lora_lab.figures import COLOURS, FIGURES, alpha_rules, comparable, r_colours
from lora_lab.figures.truncation import enough
from lora_lab.stats import t_interval

NAMES = [name for name in FIGURES if name != "methods"]
"""Figures of the demo's runs; `methods` needs more adapters than these have."""

DEMO = made_up_tables()
MANY = made_up_tables(seeds=1, ranks=(1, 2, 4, 8, 16, 32, 64, 128), second_rule=False)


def with_runs(runs: pd.DataFrame, of: Tables = DEMO) -> Tables:
    return Tables(runs, of.measures, of.traces, of.spectra)


MADE: dict[tuple[str, int], Figure] = {}


def drawn(name: str, tables: Tables) -> Figure:
    """The figure, drawn once for the shared tables; no test changes one."""
    if (name, id(tables)) in MADE:
        return MADE[name, id(tables)]
    figure = FIGURES[name](tables)
    assert figure is not None
    if tables is DEMO or tables is MANY:
        MADE[name, id(tables)] = figure
    return figure


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(match=plt.Text))


def shown_axes(figure: Figure) -> list[plt.Axes]:
    return [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]


def test_the_registry_holds_the_figures_in_their_order():
    order = sorted(FIGURES, key=lambda name: FIGURES[name].place)
    assert order == [
        *("score_vs_r", "spectra", "effective_rank", "nulls", "truncation", "gradient_norms"),
        "methods",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_registered_with_its_words(name: str):
    drawing = FIGURES[name]
    assert drawing.title
    assert drawing.alt.endswith(".")
    assert drawing.look_for.startswith("Look for ")
    assert drawing.look_for.count(". ") == 0, "one sentence"


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_has_a_title_labels_and_something_in_every_panel(name: str):
    figure = drawn(name, DEMO)
    assert FIGURES[name].title in words(figure)
    axes = shown_axes(figure)
    assert axes
    assert all(ax.has_data() for ax in axes)
    assert any(ax.get_xlabel() for ax in axes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tables", [DEMO, MANY], ids=["demo", "many r, one seed"])
def test_no_text_is_cut_off_and_no_two_labels_overlap(name: str, tables: Tables):
    figure = drawn(name, tables)
    figure.canvas.draw()
    inside, page = figure.get_tightbbox(), figure.bbox_inches
    assert inside.x0 >= 0
    assert inside.y0 >= 0
    assert inside.x1 <= page.x1
    assert inside.y1 <= page.y1
    for ax in shown_axes(figure):
        beside = [t.get_window_extent() for t in ax.texts if t.get_transform() == ax.transAxes]
        for lower, upper in pairwise(sorted(beside, key=lambda box: box.y0)):
            assert upper.y0 > lower.y1 - 2


@pytest.mark.parametrize("name", NAMES)
def test_empty_tables_give_no_figure(name: str):
    assert FIGURES[name](empty_tables()) is None


@pytest.mark.parametrize("name", NAMES)
def test_runs_without_any_rows_give_no_figure_except_the_scores(name: str):
    none = empty_tables()
    figure = FIGURES[name](Tables(DEMO.runs, none.measures, none.traces, none.spectra))
    assert (figure is None) == (name != "score_vs_r")


@pytest.mark.parametrize("name", NAMES)
def test_full_fine_tuning_alone_draws_what_needs_no_adapter(name: str):
    columns = [c for c in DEMO.runs if not c.startswith("adapter.")]
    alone = with_runs(DEMO.runs.loc[DEMO.runs["adapter"] == "full", columns])
    figure = FIGURES[name](alone)
    assert (figure is None) == (name == "score_vs_r")


@pytest.mark.parametrize("name", NAMES)
def test_runs_without_a_result_are_not_drawn_but_counted(name: str):
    runs = DEMO.runs.copy()
    ended = ["failed", "diverged", "running", "interrupted", "done"]
    other = runs.index[(runs["adapter"] != "head") & (runs["seed"] == 2)]
    runs.loc[other, "status"] = ended
    runs.loc[other, "score"] = [1e6, 1e6, 1e6, 1e6, np.nan]
    figure = drawn(name, with_runs(runs))
    kinds = "1 diverged, 1 failed, 1 interrupted, 1 running, 1 without a score"
    assert f"5 of 22 runs not drawn: {kinds}." in words(figure).replace("\n", " ")
    without = drawn(name, with_runs(DEMO.runs.drop(index=other)))
    assert picture_data(figure) == picture_data(without) != picture_data(drawn(name, DEMO))


def picture_data(figure: Figure) -> list[list[float]]:
    """All that is drawn as numbers: lines, bands and cells."""
    data = []
    for ax in shown_axes(figure):
        data += [np.asarray(line.get_xydata(), dtype=float).ravel().tolist() for line in ax.lines]
        for collection in ax.collections:
            if collection.get_array() is not None:
                data.append(np.asarray(collection.get_array(), dtype=float).ravel().tolist())
    return data


def test_layers_with_mathematics_or_markup_in_their_names_are_shown_as_they_are():
    layer = DEMO.measures["layer"].str.replace("query", r"$\frac{<b>", regex=False)
    tables = Tables(DEMO.runs, DEMO.measures.assign(layer=layer), DEMO.traces, DEMO.spectra)
    figure = drawn("effective_rank", tables)
    figure.canvas.draw()
    assert r"attention.self.\$\frac{<b>" in words(figure)


def test_figures_are_drawn_in_threads_and_leave_pyplot_alone():
    def png(name: str) -> bytes:
        buffer = BytesIO()
        figure = FIGURES[name](DEMO)
        assert figure is not None
        figure.savefig(buffer, format="png", dpi=40)
        return buffer.getvalue()

    before = plt.get_fignums(), dict(plt.rcParams)
    names = ["effective_rank", "score_vs_r"]
    alone = [png(name) for name in names]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(png, names)) == alone
    assert (plt.get_fignums(), dict(plt.rcParams)) == before


# ---- what the pictures say ---------------------------------------------------------------------


def test_scores_against_r_are_the_means_and_t_intervals_over_seeds():
    ax = shown_axes(drawn("score_vs_r", DEMO))[0]
    main = DEMO.runs[DEMO.runs["adapter.alpha"] == 2 * DEMO.runs["adapter.r"]]
    expected = main.groupby("adapter.r")["score"].mean().to_numpy()
    drawn_means = [line.get_ydata() for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(drawn_means[0], expected)
    at_64 = main.loc[main["adapter.r"] == 64, "score"]
    bars = next(c.get_segments() for c in ax.collections if isinstance(c, LineCollection))
    ends = [sorted(bar[:, 1]) for bar in bars if abs(np.log2(bar[0, 0]) - 6) < 0.2]
    np.testing.assert_allclose(ends, [t_interval(at_64)[1:]])


def test_the_bands_of_head_and_full_are_labelled_with_their_means():
    said = words(drawn("score_vs_r", DEMO))
    for method, name in (("head", "head only"), ("full", "full fine-tuning")):
        mean = DEMO.runs.loc[DEMO.runs["adapter"] == method, "score"].mean()
        assert f"{name} {mean:.3f}" in said


def test_more_than_four_rules_of_alpha_have_a_panel_each():
    extra = [
        run_row(f"e{c}{r}", "lora", 0, **{"adapter.r": r, "adapter.alpha": c * r,
                                          "adapter.scaling": "alpha_over_r"})
        for c in (1, 3, 4, 5) for r in (1.0, 4.0)
    ]  # fmt: skip
    runs = pd.concat([DEMO.runs, as_loaded(pd.DataFrame(extra))], ignore_index=True)
    assert len(shown_axes(drawn("score_vs_r", with_runs(runs)))) == 6


def test_a_spectrum_ends_at_r_also_when_zeros_pad_it():
    padding = DEMO.spectra[DEMO.spectra["i"] == 1].assign(i=200, sigma=0.0)
    spectra = pd.concat([DEMO.spectra, padding], ignore_index=True)
    figure = drawn("spectra", Tables(DEMO.runs, DEMO.measures, DEMO.traces, spectra))
    ends = {max(line.get_xdata()) for line in shown_axes(figure)[0].lines}
    assert ends == {1, 4, 16, 64, 384}


def test_spectra_show_the_last_step_and_the_median_over_layers():
    runs = DEMO.runs[DEMO.runs["adapter"] == "full"]
    figure = drawn("spectra", with_runs(runs))
    last = DEMO.spectra[(DEMO.spectra["step"] == 64) & DEMO.spectra["run_id"].isin(runs["run_id"])]
    expected = last.groupby("i")["sigma"].median()
    np.testing.assert_allclose(shown_axes(figure)[0].lines[0].get_ydata(), expected)


def test_the_heat_map_states_the_ceiling_and_holds_the_mean_over_seeds():
    figure = drawn("effective_rank", DEMO)
    said = words(figure)
    assert "ceiling q = 384" in said
    assert "ceiling r = 64" in said
    full = DEMO.runs.loc[DEMO.runs["adapter"] == "full", "run_id"]
    rows = DEMO.measures[
        (DEMO.measures["measure"] == "effective_rank") & DEMO.measures["run_id"].isin(full)
    ]
    cells = np.asarray(shown_axes(figure)[0].collections[0].get_array())
    assert cells.shape == (6, 6)
    assert cells.mean() == pytest.approx(rows["value"].mean())
    first = rows[rows["layer"] == "encoder.layer.0.attention.self.query"]["value"].mean()
    assert cells[0, 0] == pytest.approx(first)


def test_layers_outside_blocks_and_deep_models_have_their_place_in_the_heat_map():
    rows = DEMO.measures[DEMO.measures["measure"] == "effective_rank"]
    deep = [
        rows.assign(
            depth=rows["depth"] + 6 * i,
            layer=rows["layer"].str.replace(".layer.", f".layer.{i}", regex=False),
        )
        for i in range(6)
    ]
    outside = rows[rows["depth"] == 0].assign(depth=np.nan, layer="pooler.dense")
    measures = pd.concat([*deep, outside], ignore_index=True)
    tables = Tables(DEMO.runs, measures, DEMO.traces, DEMO.spectra)
    figure = drawn("effective_rank", tables)
    assert "pooler.dense" in words(figure)
    assert "–" in [label.get_text() for label in shown_axes(figure)[0].get_xticklabels()]


def test_truncation_marks_the_smallest_k_within_a_point_of_full():
    score = DEMO.measures[
        (DEMO.measures["measure"] == "oracle_score") & (DEMO.measures["side"] == "trained_head")
    ]
    full = DEMO.runs[DEMO.runs["adapter"] == "full"]
    means = score.groupby("k")["value"].mean()
    expected = min(k for k, mean in means.items() if mean >= full["score"].mean() - 0.01)
    assert enough(score, full) == expected
    assert f"k = {expected:g}: within a point" in words(drawn("truncation", DEMO))


def test_truncation_marks_no_k_where_none_comes_close():
    low = DEMO.measures["measure"] == "oracle_score"
    measures = DEMO.measures.assign(value=DEMO.measures["value"].where(~low, 0.5))
    figure = drawn("truncation", Tables(DEMO.runs, measures, DEMO.traces, DEMO.spectra))
    assert "within a point" not in words(figure)


def test_a_gradient_of_zero_is_left_out_of_the_logarithmic_axis():
    ax = shown_axes(drawn("gradient_norms", DEMO))[0]
    assert "of A" in ax.get_title(loc="left")
    assert all(min(line.get_xdata()) == 16 for line in ax.lines)


def test_gradient_norms_are_root_mean_squares_over_layers():
    ax = shown_axes(drawn("gradient_norms", DEMO))[2]
    full = DEMO.runs.loc[DEMO.runs["adapter"] == "full", "run_id"]
    rows = DEMO.traces[(DEMO.traces["trace"] == "grad_norm") & DEMO.traces["run_id"].isin(full)]
    rms = rows.groupby(["run_id", "step"])["value"].agg(lambda v: np.sqrt((v**2).mean()))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), rms.groupby("step").median())
    assert ax.lines[0].get_color() == COLOURS["full"]


# ---- which runs are compared -------------------------------------------------------------------


def sweep(
    points: list[tuple[float, float]], adapter: str = "lora", scaling: str = "alpha_over_r"
) -> pd.DataFrame:
    return pd.DataFrame([
        run_row(f"p{i}", adapter, 0, **{"adapter.r": r, "adapter.alpha": alpha,
                                        "adapter.scaling": scaling})
        for i, (r, alpha) in enumerate(points)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("points", "rules"),
    [
        ([(1, 1), (8, 8), (64, 64)], {"LoRA, α = r": 3}),
        ([(2, 1), (8, 4)], {"LoRA, α = r/2": 2}),
        ([(1, 2), (4, 8), (1, 16), (4, 16)], {"LoRA, α = 2r": 2, "LoRA, α = 16": 2}),
        ([(1, 2), (8, 16), (64, 128), (1, 16), (64, 16)], {"LoRA, α = 2r": 3, "LoRA, α = 16": 3}),
        ([(8, 4), (8, 8), (8, 16)], {"LoRA, α = r/2": 1, "LoRA, α = r": 1, "LoRA, α = 2r": 1}),
        ([], {}),
    ],
)
def test_the_rule_of_alpha_is_read_off_the_sweep(
    points: list[tuple[float, float]], rules: dict[str, int]
):
    runs = sweep(points) if points else DEMO.runs[:0]
    assert alpha_rules(runs)["rule"].value_counts().to_dict() == rules


def test_scalings_and_methods_are_never_on_one_line():
    points = [(1.0, 2.0), (4.0, 8.0)]
    runs = pd.concat([sweep(points), sweep(points, "dora"), sweep(points, scaling="rslora")])
    rules = alpha_rules(runs)["rule"].value_counts().to_dict()
    assert rules == {"LoRA, α = 2r": 2, "LoRA (rsLoRA), α = 2r": 2, "dora, α = 2r": 2}


def test_thousands_of_different_alphas_are_named_in_no_time():
    runs = sweep([(float(r), 1 + r / 7) for r in range(1, 2001)])
    assert len(alpha_rules(runs)) == 2000


Change = Callable[[pd.DataFrame], pd.DataFrame]


@pytest.mark.parametrize(
    "change",
    [
        lambda runs: runs.assign(**{"data.train_examples": 64.0}),
        lambda runs: runs.assign(**{"train.epochs": 9.0}),
        lambda runs: runs.assign(**{"adapter.targets": "qv"}),
        lambda runs: runs.assign(**{"train.lr": 7.0}),
    ],
    ids=["less data", "longer", "other targets", "other rate"],
)
def test_runs_of_another_setting_never_enter_an_average(change: Change):
    few = DEMO.runs[(DEMO.runs["seed"] == 0) & (DEMO.runs["adapter.alpha"] != 16)]
    other = change(few).assign(run_id="x" + few["run_id"], score=0.1)
    runs, note = comparable(pd.concat([DEMO.runs, other], ignore_index=True))
    assert runs["score"].min() > 0.5
    assert f"{len(few)} in other settings" in note


def test_between_equally_frequent_rates_validation_decides():
    full = DEMO.runs[DEMO.runs["adapter"] == "full"]
    better = full.assign(run_id="x" + full["run_id"], validation_score=0.9, **{"train.lr": 2e-4})
    runs, _ = comparable(pd.concat([full, better], ignore_index=True))
    assert set(runs["train.lr"]) == {2e-4}


def test_an_r_has_one_colour_in_all_figures():
    runs, _ = comparable(DEMO.runs)
    colours = [tuple(c) for c in r_colours(runs).values()]
    assert len(set(colours)) == 4
    for name in ("spectra", "gradient_norms"):
        lines = [line for ax in shown_axes(drawn(name, DEMO)) for line in ax.lines]
        used = {tuple(np.atleast_1d(line.get_color())) for line in lines}
        assert used - {(COLOURS["full"],)} == set(colours)


# ---- methods -------------------------------------------------------------------------------------


def many_methods() -> Tables:
    """The demo's runs, of which those of each r > 1 count as another adapter."""
    names = {4.0: "stacked", 16.0: "sparse", 64.0: "projected"}
    adapter = DEMO.runs["adapter.r"].map(names).fillna(DEMO.runs["adapter"])
    return with_runs(DEMO.runs.assign(adapter=adapter.astype("string")))


def test_methods_are_drawn_once_each_with_every_seed_and_from_four_adapters_on():
    assert FIGURES["methods"](DEMO) is None
    assert FIGURES["methods"](empty_tables()) is None
    tables = many_methods()
    figure = FIGURES["methods"](tables)
    assert figure is not None
    axes = shown_axes(figure)
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert len(names) == len(set(names))
    assert {name.partition(",")[0] for name in names} == set(tables.runs["adapter"])
    drawn_scores = [
        x for line in axes[0].lines if line.get_marker() == "." for x in line.get_xdata()
    ]
    assert sorted(drawn_scores) == sorted(tables.runs["score"])
    upright = [line.get_xdata()[0] for line in axes[0].lines if line.get_marker() == "None"
               and len(set(line.get_xdata())) == 1]  # fmt: skip
    ends = tables.runs.groupby("adapter")["score"].mean()
    assert upright == pytest.approx([ends["head"], ends["full"]])
    means = [float(line.get_xdata()[0]) for line in axes[0].lines if line.get_marker() == "o"]
    assert means == sorted(means)


def test_a_method_without_an_update_has_a_score_and_no_rank():
    tables = many_methods()
    figure = FIGURES["methods"](tables)
    assert figure is not None
    scores, ranks, _ = shown_axes(figure)
    names = [label.get_text() for label in scores.get_yticklabels()]
    drawn_at = {float(line.get_ydata()[0]) for line in ranks.lines if line.get_marker() == "o"}
    assert drawn_at == set(range(len(names))) - {names.index("head")}
