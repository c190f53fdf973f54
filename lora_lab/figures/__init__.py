"""Figures: one file, one picture. A figure reads tidy tables and computes no number of its own.

`FIGURES[name]` draws with matplotlib's `Figure` alone: no pyplot state, so that two threads can
draw at once. What all figures share is here: which runs may be averaged together, and one colour
for each method wherever it appears.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.scale import LogTransform
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from lora_lab.registry import Registry
from lora_lab.stats import t_interval


class Tables(Protocol):
    """The tables of one model on one data set; columns as in `lora_lab.schema`."""

    @property
    def runs(self) -> pd.DataFrame: ...
    @property
    def measures(self) -> pd.DataFrame: ...
    @property
    def traces(self) -> pd.DataFrame: ...
    @property
    def spectra(self) -> pd.DataFrame: ...
    @property
    def examples(self) -> pd.DataFrame: ...


class Drawing:
    """A figure of the registry: ``drawing(tables)`` is a `Figure`, or None with nothing to draw.

    Attributes
    ----------
    title : str
        What the figure shows, in a few words.
    look_for : str
        One sentence: what to look for in it.
    alt : str
        What is in the picture, for who cannot see it.
    place : int
        Place among the figures of a report, from 1.
    """

    def __init__(
        self,
        draw: Callable[[Tables], Figure | None],
        title: str,
        look_for: str,
        alt: str,
        place: int,
    ) -> None:
        functools.update_wrapper(self, draw)
        self._draw = draw
        self.title, self.look_for, self.alt, self.place = title, look_for, alt, place

    def __call__(self, tables: Tables) -> Figure | None:
        return self._draw(tables)


FIGURES: Registry[Drawing] = Registry("lora_lab.figures", "figure")


def figure(
    *, title: str, look_for: str, alt: str, place: int
) -> Callable[[Callable[[Tables], Figure | None]], Drawing]:
    """Decorator: enter a function under the name of its file, with the words that go with it."""

    def enter(draw: Callable[[Tables], Figure | None]) -> Drawing:
        return FIGURES.register(Drawing(draw, title, look_for, alt, place))

    return enter


# ---- which runs may share an average -----------------------------------------------------------

SCALINGS = {"rslora": "rsLoRA", "constant": "constant scale", "learned": "learned scale"}
METHODS = {"head": "head only", "full": "full fine-tuning", "lora": "LoRA"}


def _label(adapter: str, scaling: str, kind: str, c: float) -> str:
    if kind == "constant":
        alpha = f"α = {c:g}"
    elif c < 1 and float(1 / c).is_integer():
        alpha = f"α = r/{1 / c:g}"
    else:
        alpha = "α = r" if c == 1 else f"α = {c:g}r"
    start = METHODS.get(adapter, adapter)
    if scaling and scaling != "alpha_over_r":
        start += f" ({SCALINGS.get(scaling, scaling)})"
    return f"{start}, {alpha}"


def alpha_rules(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that have an r, with the column `rule`: how α goes with r, in words.

    A sweep states α as a multiple of r or as a constant, the table holds numbers: the rules are
    the fewest lines through all points (r, α) of one method and scaling. A run on two lines (r = 8
    and α = 16 is on α = 2r and on α = 16) gets a row for each.

    Examples
    --------
    >>> points = [("a", 1, 2), ("b", 8, 16), ("c", 64, 128), ("d", 1, 16), ("e", 64, 16)]
    >>> runs = pd.DataFrame(points, columns=["run_id", "adapter.r", "adapter.alpha"])
    >>> runs["adapter"], runs["adapter.scaling"] = "lora", "alpha_over_r"
    >>> alpha_rules(runs).groupby("rule").run_id.agg("".join).to_dict()
    {'LoRA, α = 16': 'bde', 'LoRA, α = 2r': 'abc'}
    """
    ranked = runs[runs["adapter.r"].notna() & runs["adapter.alpha"].notna()]
    ranked = ranked.assign(**{"adapter.scaling": ranked["adapter.scaling"].fillna("")})
    key = ["adapter", "adapter.scaling", "adapter.r", "adapter.alpha"]
    named = [
        (adapter, scaling, r, alpha, _label(str(adapter), str(scaling), *line))
        for (adapter, scaling), own in ranked[key].drop_duplicates().groupby(key[:2], sort=False)
        for line, points in _lines(set(zip(own[key[2]], own[key[3]], strict=True)))
        for r, alpha in points
    ]
    if not named:
        return ranked.assign(rule="")
    rules = pd.DataFrame(named, columns=[*key, "rule"])
    return ranked.merge(rules.astype({c: ranked[c].dtype for c in key}), on=key)


Points = set[tuple[float, float]]


def _lines(left: Points) -> Iterator[tuple[tuple[str, float], Points]]:
    """Lines ("ratio" or "constant", c) with their points (r, α), until every point is on one."""
    on: dict[tuple[str, float], Points] = {}
    for r, alpha in left:
        on.setdefault(("ratio", round(alpha / r, 9)), set()).add((r, alpha))
        on.setdefault(("constant", alpha), set()).add((r, alpha))
    while left:
        # The line through most points that no line has yet; then the longest; then a ratio.
        best = max(on, key=lambda line: (len(on[line] & left), len(on[line]), line))
        if len(on[best] & left) == 1:
            alone = sorted({("ratio", round(alpha / r, 9)) for r, alpha in left})
            yield from ((line, on[line]) for line in alone)
            return
        yield best, on[best]
        left = left - on[best]


def _majority(runs: pd.DataFrame, within: list[str], over: list[str]) -> pd.DataFrame:
    """For each value of `within` only the most frequent combination of the columns `over`.

    Ties go to the better mean validation score, which no test example has touched.
    """
    over = [c for c in over if runs[c].nunique(dropna=False) > 1]
    if not over:
        return runs
    outer = runs.groupby(within, dropna=False, sort=False).ngroup() if within else 0
    keyed = runs.assign(_outer=outer, _combo=runs.groupby(over, dropna=False, sort=False).ngroup())
    tally = keyed.groupby(["_outer", "_combo"], as_index=False).agg(
        n=("run_id", "nunique"), good=("validation_score", "mean")
    )
    tally = tally.sort_values(["n", "good"], ascending=False).drop_duplicates("_outer")
    chosen = pd.MultiIndex.from_frame(tally[["_outer", "_combo"]])
    return runs[pd.MultiIndex.from_frame(keyed[["_outer", "_combo"]]).isin(chosen)]


NEEDED = ("adapter.r", "adapter.alpha", "adapter.scaling", "train.lr", "validation_score", "seed")


def comparable(runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Finished runs that differ in method, r, α rule and seed alone, and a note on the others.

    A results folder may hold several sweeps. The most frequent setting of data, model and training
    is kept; for each method and α rule the most frequent targets and the like; for each r the most
    frequent learning rate, in a tie the one with the best validation score.

    Returns
    -------
    runs : DataFrame
        With the column `rule` ("" without an r; a run on two α rules has two rows), `r` and
        `alpha` as floats.
    note : str
        For example ``"2 of 24 runs not drawn: 1 diverged, 1 in other settings."``; "" for none.
    """
    runs = runs.reindex(columns=[*runs.columns, *(c for c in NEEDED if c not in runs)])
    for column in ("adapter.r", "adapter.alpha"):
        runs[column] = pd.to_numeric(runs[column], errors="coerce").astype("float64")
    done = runs[runs["status"] == "done"]
    if "score" in runs:  # weights from outside have none
        done = done[np.isfinite(done["score"].astype("float64"))]
    dotted = [c for c in runs.columns if "." in c and c not in NEEDED]
    kept = _majority(done, [], [c for c in dotted if not c.startswith("adapter.")])
    kept = pd.concat([kept[kept["adapter.r"].isna()].assign(rule=""), alpha_rules(kept)])
    own = [c for c in dotted if c.startswith("adapter.")]
    kept = _majority(kept, ["adapter", "rule"], own)
    kept = _majority(kept, ["adapter", "rule", "adapter.r"], ["train.lr"])
    kept = kept.assign(r=kept["adapter.r"], alpha=kept["adapter.alpha"])

    counts = runs.loc[runs["status"] != "done", "status"].value_counts().sort_index()
    out = [f"{n} {status}" for status, n in counts.items()]
    unscored = int((runs["status"] == "done").sum()) - len(done)
    out += [f"{unscored} without a score"] * bool(unscored)
    others = len(done) - kept["run_id"].nunique()
    out += [f"{others} in other settings"] * bool(others)
    total = len(runs) - kept["run_id"].nunique()
    return kept, f"{total} of {len(runs)} runs not drawn: {', '.join(out)}." if out else ""


def main_rule(runs: pd.DataFrame) -> pd.DataFrame:
    """Of `comparable` runs: those without an r, and those of the α rule with most runs."""
    rules = runs.loc[runs["rule"] != "", "rule"].value_counts()
    return runs[runs["rule"].isin(["", *rules.index[:1]])]


def final(rows: pd.DataFrame, run_ids: Iterable[str]) -> pd.DataFrame:
    """Rows of some runs at each run's last step."""
    rows = rows[rows["run_id"].isin(list(run_ids))]
    return rows[rows["step"] == rows.groupby("run_id")["step"].transform("max")]


# ---- how they look -----------------------------------------------------------------------------

WIDTH = 10.6
"""Inches; with 100 dots on a page for each it fills the report."""
INK, SOFT, GRID = "#222222", "#666666", "#e4e4e4"
COLOURS = {"head": "#6f6f6f", "full": "#d55e00", "lora": "#0072b2"}
RULE_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#8c6d00")
RULE_MARKERS = ("o", "s", "D", "^")


def r_colours(runs: pd.DataFrame) -> dict[float, Any]:
    """One colour for each r, light to dark as r grows; the same in every figure of the tables."""
    ranks = sorted(runs["r"].dropna().unique())
    # The palest quarter of the palette would be too faint for lines and words on white.
    shades = sns.color_palette("crest", as_cmap=True)(np.linspace(0.25, 1, len(ranks)))
    return dict(zip(ranks, shades, strict=True))


def unranked(runs: pd.DataFrame) -> pd.DataFrame:
    """Of `comparable` runs those that update whole weights: full fine-tuning, as a rule."""
    return runs[runs["r"].isna() & (runs["adapter"] != "head")]


def method_lines(runs: pd.DataFrame) -> Iterator[tuple[str, Any, pd.DataFrame]]:
    """(label, colour, runs) of full fine-tuning and then of each r, for the main α rule."""
    runs = main_rule(runs)
    for adapter, own in unranked(runs).groupby("adapter", sort=False):
        yield str(adapter), COLOURS["full"], own
    colours = r_colours(runs)
    for r, colour in colours.items():
        yield f"r = {r:g}", colour, runs[runs["r"] == r]


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **kw: Any) -> Any:
    """(figure, 2-D array of axes) in the lab's style, without touching global settings."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(rows, columns, squeeze=False, **kw)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        ax.tick_params(colors=INK, labelsize=9, length=3)
        ax.grid(True, color=GRID, linewidth=0.7)
        ax.set_axisbelow(True)
    return drawn, axes


def literal(text: object) -> str:
    """Text as it stands: a `$` in a user's name is no mathematics.

    >>> literal("a$b")
    'a\\\\$b'
    """
    return str(text).replace("$", r"\$")


def finish(drawn: Figure, title: str, note: str) -> Figure:
    """Give a figure its title and, small below it, its note; plain numbers on logarithmic axes."""
    for axis in (axis for ax in drawn.axes for axis in (ax.xaxis, ax.yaxis)):
        # What a figure has set for itself stays.
        if isinstance(axis.get_major_formatter(), LogFormatterSciNotation):
            plain_numbers(axis)
    drawn.suptitle(literal(title), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    if note:
        lines = textwrap.fill(literal(note), width=int(16 * drawn.get_figwidth()))
        drawn.supxlabel(lines, x=0.01, ha="left", fontsize=8, color=SOFT)
    return drawn


def score_bands(ax: Axes, runs: pd.DataFrame, across: bool = False) -> list[tuple[float, str, Any]]:
    """Floor and ceiling of a score: head and full as lines with interval bands; their labels.

    Scores are on the y axis, or with `across` on the x axis.
    """
    line, band = (ax.axvline, ax.axvspan) if across else (ax.axhline, ax.axhspan)
    labels: list[tuple[float, str, Any]] = []
    for method in ("head", "full"):
        scores = runs.loc[runs["adapter"] == method, "score"]
        if len(scores):
            mean, low, high = t_interval(scores)
            colour = COLOURS[method]
            if np.isfinite(low):
                band(low, high, color=colour, alpha=0.13, linewidth=0)
            line(mean, color=colour, linewidth=1.5, linestyle=(0, (5, 2)))
            labels.append((mean, f"{METHODS[method]} {mean:.3f}", colour))
    return labels


def plain_numbers(axis: Axis) -> None:
    """A logarithmic axis with plain numbers; of base 10 at 1, 2 and 5 where there is room."""
    low, high = sorted(axis.get_view_interval())
    scale = axis.get_transform()
    if isinstance(scale, LogTransform) and scale.base == 10:
        within = high / low < 3000
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if within else (1,), numticks=12))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def end_labels(ax: Axes, labels: list[tuple[float, str, Any]]) -> None:
    """Write (y, text, colour) at the right of the axes, moved apart where they would touch.

    Call it when the limits of the axes stand.
    """
    inside = ax.transData + ax.transAxes.inverted()
    x = ax.get_xlim()[1]
    drawn = ax.get_figure(root=True)
    assert drawn is not None
    # The layout is not done yet: the height of the axes is an estimate.
    share = 0.95 * ax.get_position().height
    gap = 9 * 1.35 / (72 * drawn.get_figheight() * share)
    placed = sorted((float(inside.transform((x, y))[1]), *words) for y, *words in labels)
    heights = np.array([height for height, _, _ in placed])
    for _ in range(200):
        close = np.diff(heights) < gap - 1e-6
        if not close.any():
            break
        push = np.where(close, (gap - np.diff(heights)) / 2, 0)
        heights[:-1] -= push
        heights[1:] += push
    for height, (_, text, colour) in zip(heights, placed, strict=True):
        ax.text(1.015, height, literal(text), transform=ax.transAxes, color=colour,
                fontsize=9, va="center", ha="left")  # fmt: skip
