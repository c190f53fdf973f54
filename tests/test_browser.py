"""The pages in a real browser: the file, and the dashboard while a sweep runs."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from pages import ERROR, made, served
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from sweeping import SMALL, Apart, lab
from tables import Tables, as_loaded, empty_tables, made_up_tables, run_row

from lora_lab import report
from lora_lab.report import words
from lora_lab.stats import t_interval
from lora_lab.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DEMO = made_up_tables()
# A machine with a sweep on it is slow: how fast pages are is tested by their own work.
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium of the system; playwright's own download does not work everywhere."""
    assert CHROMIUM, "the tests of the pages need Chromium: apt-get install -y chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Tab:
    """A page that notes what it complains of and what it asks for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def open(self, url: str, wait: bool = True) -> Page:
        self.page.goto(url)
        if wait:
            self.page.wait_for_selector("body[data-shown]", timeout=60_000)
        return self.page

    def go(self, fragment: str) -> Page:
        """Another page of the same document, drawn."""
        before = self.page.evaluate("document.body.dataset.shown")
        self.page.evaluate("fragment => { location.hash = fragment; }", fragment)
        self.page.wait_for_function("b => document.body.dataset.shown !== b", arg=before)
        return self.page

    def drawn(self, name: str) -> Any:
        """A figure, once Plotly has drawn it."""
        figure = self.page.locator(f'[data-figure="{name}"]')
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for(timeout=60_000)
        return figure


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A tab that must not complain, and must ask nobody but this machine."""
    context: BrowserContext = browser.new_context(viewport={"width": 1200, "height": 900})
    tab = Tab(context.new_page())
    tab.page.on("console", lambda m: tab.said.append(m.text) if m.type != "log" else None)
    tab.page.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.page.on("request", lambda request: tab.asked.append(request.url))
    yield tab
    context.close()
    assert tab.said == []
    elsewhere = re.compile(r"(?!file:|data:|blob:|http://127\.0\.0\.1:)")
    assert not [url for url in tab.asked if elsewhere.match(url)]


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Drawn figures are not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "PICTURED", 0)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, undrawn: None) -> str:
    """The made-up demo as one file, opened from disk."""
    examples = [
        pd.DataFrame({"run_id": run_id, "i": range(50), "value": np.arange(50) < 20 + 5 * n})
        for n, run_id in enumerate(DEMO.runs["run_id"][:3])
    ]
    each = pd.concat(examples).astype({"value": "float64"})
    tables = Tables(DEMO.runs, DEMO.measures, DEMO.traces, DEMO.spectra, each)
    return report.write(tables, tmp_path_factory.mktemp("a file") / "report.html").as_uri()


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """A served results folder of three finished runs, a failed and a waiting one."""
    store, ids = made(tmp_path_factory.mktemp("served") / "results")
    with served(store) as port:
        yield f"http://127.0.0.1:{port}/", ids


def of(adapter: str) -> list[str]:
    return DEMO.runs.loc[DEMO.runs["adapter"] == adapter, "run_id"].tolist()


# ---- the file ----------------------------------------------------------------------------------

FULL, LORA = of("full"), of("lora")
FIGURES = {
    "#/overview": ["score_against_r", "score_against_alpha", "pareto_adapter_parameters",
                   "best_per_method"],
    f"#/run/{FULL[0]}": ["curve_loss", "gradients", "trace_grad_norm", "spectra",
                         "heat_effective_rank", "eckart_young", "oracle"],
    f"#/run/{LORA[0]}": ["trace_grad_norm_B", "spectra"],
    f"#/compare/{FULL[0]}+{LORA[0]}": ["spectra_together", "layers_together"],
    "#/layers": ["by_depth", "by_module", "layer_map"],
}  # fmt: skip


def test_every_page_draws_its_figures_each_with_a_caption_and_files(tab: Tab, file: str) -> None:
    page = tab.open(file)
    for fragment, names in FIGURES.items():
        tab.go(fragment + "?seen=")
        for name in names:
            figure = tab.drawn(name)
            assert "ook " in figure.locator("figcaption").inner_text()
            label = figure.locator(".plot").get_attribute("aria-label") or ""
            assert label.startswith(figure.locator("h3").inner_text())
            assert figure.get_by_role("button").all_inner_texts() == ["CSV", "SVG", "PNG"]
    assert page.locator("main h1:visible").count() == 1
    assert tab.asked == [file]


def test_the_finding_comes_first_and_words_are_readable_without_a_script(
    browser: Browser, tab: Tab, file: str
) -> None:
    page = tab.open(file)
    first = page.locator("main li:visible").first.inner_text()
    assert first.startswith("Head only scores")
    tab.go("#/words")
    expect(page.get_by_text("Provenance")).to_be_visible()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(file)
    assert plain.locator("main li:visible").first.inner_text() == first
    assert plain.get_by_text("By method: mean over seeds").is_visible()
    plain.context.close()


def test_means_and_intervals_of_what_a_filter_leaves_are_those_of_the_lab(
    tab: Tab, file: str
) -> None:
    page = tab.open(file)
    tab.go("#/overview?" + "f=" + quote("seed ≤ 1") + "&f=" + quote("adapter = lora"))
    runs = DEMO.runs[(DEMO.runs["seed"] <= 1) & (DEMO.runs["adapter"] == "lora")]
    assert f"{len(runs)} of {len(DEMO.runs)} runs" in page.locator(".filters").inner_text()
    tab.drawn("score_against_r")
    traces = page.evaluate(
        """() => document.querySelector('[data-figure="score_against_r"] .plot').data
        .map(({name, x, y, error_y}) => ({name, x, y, half: error_y?.array}))"""
    )
    line = next(t for t in traces if t["name"] == "LoRA, α = 2r")
    two = runs[runs["adapter.alpha"] == 2 * runs["adapter.r"]]
    for x, y, half in zip(line["x"], line["y"], line["half"], strict=True):
        mean, low, high = t_interval(two.loc[two["adapter.r"] == x, "score"])
        assert (y, half) == pytest.approx((mean, (high - low) / 2), rel=1e-6)


def test_paired_differences_by_test_example_are_those_of_the_lab(tab: Tab, file: str) -> None:
    one, other = DEMO.runs["run_id"][:2]
    page = tab.open(f"{file}#/compare/{one}+{other}")
    row = page.get_by_role("region", name="Paired by test example").locator("tbody tr")
    d = (np.arange(50) < 25).astype(float) - (np.arange(50) < 20)
    mean, low, high = t_interval(d)
    assert row.inner_text().split("\t")[2:5] == [f"{mean:g}", f"{low:.3g} to {high:.3g}", "50"]


def test_filters_search_sort_and_columns_live_in_the_link(tab: Tab, file: str) -> None:
    page = tab.open(file)
    page.get_by_label("field", exact=True).select_option("adapter.r")
    page.get_by_label("comparison").select_option("≥")
    page.get_by_label("value", exact=True).fill("16")
    page.get_by_role("button", name="Add filter").click()
    expect(page.locator("#runs tbody tr")).to_have_count(int((DEMO.runs["adapter.r"] >= 16).sum()))
    page.get_by_label("search runs").press_sequentially("128")
    expect(page.locator("#runs tbody tr")).to_have_count(4)
    assert page.evaluate("document.activeElement.id") == "search"
    page.locator("#runs th").get_by_role("button", name="score").click()
    scores = page.locator("#runs tbody tr td:nth-child(9)")
    expect(page.locator("#runs th[aria-sort]")).to_have_text("score ↑")
    found = [float(text) for text in scores.all_inner_texts()]
    assert found == sorted(found)
    page.get_by_label("add a column").select_option("git_commit")
    expect(page.locator("#runs th").last).to_have_text("git_commit")
    link, shown = page.url, page.locator("#runs").inner_text()
    page.goto("about:blank")
    tab.open(link)
    assert page.locator("#runs").inner_text() == shown
    page.get_by_role("button", name="remove filter").click()
    expect(page.locator("#runs tbody tr")).not_to_have_count(0)


def test_runs_that_are_ticked_are_compared_and_a_dot_opens_its_run(tab: Tab, file: str) -> None:
    page = tab.open(file)
    for i in range(2):
        page.locator("#runs tbody input").nth(i).check()
        page.wait_for_timeout(50)
    page.get_by_role("link", name="Compare 2 runs").click()
    expect(page.get_by_role("heading", name="2 runs side by side")).to_be_visible()
    page.go_back()
    tab.drawn("score_against_r")
    page.evaluate(
        """() => { const box = document.querySelector('[data-figure="score_against_r"] .plot');
        box.emit("plotly_click", {points: [{customdata: box.data[0].customdata[0]}]}); }"""
    )
    expect(page.locator("h1:visible")).to_contain_text("LoRA, r")


def test_the_slider_moves_the_spectrum_and_the_link(tab: Tab, file: str) -> None:
    page = tab.open(f"{file}#/run/{FULL[0]}")
    tab.drawn("spectra")
    top = """() => document.querySelector('[data-figure="spectra"] .plot').data[0].y[0]"""
    last = page.evaluate(top)
    page.get_by_label("step", exact=True).press("Home")
    page.wait_for_function(f"l => ({top})() < 0.5 * l", arg=last)
    assert "step=8" in page.url
    assert page.locator("output").inner_text() == "step 8"


def test_a_plot_can_be_taken_away_as_table_and_as_picture(tab: Tab, file: str) -> None:
    page = tab.open(file)
    figure = tab.drawn("score_against_r")
    for kind in ("CSV", "SVG", "PNG"):
        with page.expect_download() as waiting:
            figure.get_by_role("button", name=kind).click()
        data = Path(waiting.value.path()).read_bytes()
        assert waiting.value.suggested_filename == f"score_against_r.{kind.lower()}"
        if kind == "CSV":
            lines = data.decode().splitlines()
            assert lines[0] == "run,line,r,test score,seed"
            assert len(lines) > DEMO.runs["adapter.r"].notna().sum()
        else:
            assert data.startswith({"SVG": b"<svg", "PNG": b"\x89PNG"}[kind])


def test_a_keyboard_reaches_every_run_and_the_page_is_narrow_where_the_window_is(
    tab: Tab, file: str
) -> None:
    page = tab.open(file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    figure = tab.drawn("score_against_r")
    figure.locator("summary").press("Enter")
    link = figure.locator("td a").first
    link.press("Enter")
    expect(page.locator("h1:visible")).to_contain_text("LoRA, r")
    unnamed = """() => [...document.querySelectorAll("button, select, input, a[href]")].filter(e =>
        !(e.textContent || e.getAttribute("aria-label") || e.labels?.length)).length"""
    page.set_viewport_size({"width": 375, "height": 800})
    for fragment in FIGURES:
        tab.go(fragment + "?narrow=")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, fragment
        assert page.evaluate(unnamed) == 0, fragment


def test_words_stand_out_in_light_and_in_dark(tab: Tab, file: str) -> None:
    page = tab.open(file)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        colours = page.evaluate(
            """() => [...document.querySelectorAll("p, a, td, th, button, select")].filter(e =>
            e.checkVisibility()).map(e => { const c = [getComputedStyle(e).color];
            while (e && getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)")
              e = e.parentElement;
            return [...c, getComputedStyle(e ?? document.body).backgroundColor]; })"""
        )
        assert min(contrast(*map(rgb, pair)) for pair in colours) > 4.5, scheme


def rgb(text: str) -> np.ndarray:
    return np.array([float(x) for x in re.findall(r"[\d.]+", text)[:3]]) / 255


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """Of WCAG: at least 4.5 for text."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    light = [float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ weights)
             for c in (one, other)]  # fmt: skip
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_pages_without_runs_say_so(tab: Tab, tmp_path: Path, undrawn: None) -> None:
    page = tab.open(report.write(empty_tables(), tmp_path / "report.html").as_uri())
    assert "There is no run yet." in page.locator("main").inner_text()
    tab.go("#/layers")
    tab.go("#/compare")
    tab.go("#/claims")
    assert "No claim is decided" in page.locator("main").inner_text()


# ---- hostile text ------------------------------------------------------------------------------


def hostile() -> list[str]:
    """About 150 texts that would be markup, script, formula or template somewhere."""
    marks = ["{}", "'{}", '"{}', '">{}', "'>{}", "</script>{}", "</style>{}", "-->{}", "]]>{}"]
    acts = [
        "<script>window.HIT=1</script>", "<img src=x onerror=window.HIT=1>",
        "<svg/onload=window.HIT=1>", "<iframe srcdoc='<script>parent.HIT=1</script>'>",
        "<a href='javascript:window.HIT=1'>x</a>", "<details open ontoggle=window.HIT=1>",
        "<style>body{display:none}</style>", "<base href='//evil.example/'>",
        "<link rel=stylesheet href='//evil.example/x.css'>", "<meta http-equiv=refresh content=0>",
        "<math><mtext><img src=x onerror=window.HIT=1>", "<form action='//evil.example'><button>",
        "onmouseover=window.HIT=1 x=", "<b>bold</b>",
    ]  # fmt: skip
    others = [
        "{{ 7 * 7 }}", "{% raw %}", "${7*7}", "%{y}", "%{customdata[0]}<extra>x</extra>",
        "javascript:window.HIT=1", "data:text/html,<script>window.HIT=1</script>", "=1+1", "+1",
        "@SUM(A1)", "__proto__", "constructor", "toString", "\u202egnp.exe", "a\u0000b",
        "$\\frac{1}{2}$",
        "&lt;script&gt;", "&#60;img&#62;", "\\u003cscript\\u003e", "a\\", "‮|‮", "#/run/x", "?f=a",
        "../../etc/passwd", "x" * 300, "line\nline", "é" * 20, "🦜" * 5, "' OR 1=1 --", "null",
    ]  # fmt: skip
    return [mark.format(act) for mark in marks for act in acts] + others


def test_hostile_names_and_errors_are_shown_as_text_on_every_page(
    tab: Tab, tmp_path: Path, undrawn: None
) -> None:
    texts = hostile()
    assert len(texts) >= 150
    runs = [
        run_row(f"{n:012x}", text, n, model="m", data="d", error=text, sweep=text,
                status="done" if n % 2 else "failed", score=0.5 + n / 1000,
                **{"adapter.r": float(2 + n % 3), "adapter.alpha": 4.0, "adapter.scaling": text,
                   "adapter.targets": text, "git_commit": text})
        for n, text in enumerate(texts)
    ]  # fmt: skip
    layer = f"encoder.{texts[0]}.0.{texts[1]}"
    of_one = {"run_id": f"{1:012x}", "step": [1, 2]}
    spectra = pd.DataFrame({**of_one, "step": 1, "layer": layer, "i": [1, 2], "sigma": [2.0, 1.0]})
    traces = pd.DataFrame({**of_one, "layer": "", "trace": texts[2], "value": [2.0, 1.0]})
    none = empty_tables()
    tables = Tables(as_loaded(pd.DataFrame(runs)), none.measures, traces, spectra)
    page = tab.open(report.write(tables, tmp_path / "report.html").as_uri())
    tags = set(page.evaluate("[...document.querySelectorAll('*')].map(e => e.localName)"))
    assert not tags & {"iframe", "base", "math", "b", "img"}
    tab.go("#/overview?n=500&c=error&sort=run_id")
    for name in ("score_against_r", "pareto_adapter_parameters", "best_per_method"):
        tab.drawn(name).locator("summary").press("Enter")
    cells = page.locator("#runs tbody tr").evaluate_all(
        "rows => rows.map(row => row.cells[3].textContent)"
    )
    shown = dict(zip((f"{n:012x}" for n in range(len(texts))), texts, strict=True))
    assert cells == list(shown.values())
    tab.go(f"#/run/{1:012x}")
    tab.drawn("spectra")
    tab.go(f"#/compare/{1:012x}+{3:012x}")
    tab.go("#/words")
    tab.go("#/overview?q=" + quote(texts[0]) + "&f=" + quote(f"error contains {texts[1]}"))
    assert page.evaluate("window.HIT") is None
    assert page.evaluate("getComputedStyle(document.body).display") != "none"


# ---- the dashboard -----------------------------------------------------------------------------


def test_the_dashboard_shows_what_waits_and_failed_and_compares_directions(
    tab: Tab, dashboard: tuple[str, list[str]]
) -> None:
    url, ids = dashboard
    page = tab.open(url)
    standing = page.locator("#standing")
    assert "3 of 5 runs are done" in standing.inner_text()
    assert ERROR in standing.inner_text()
    expect(page.locator("#findings h1")).to_be_visible()
    tab.go(f"#/run/{ids[0]}")
    tab.drawn("spectra")
    page.get_by_role("link", name="Compare with its other seeds").click()
    expect(page.get_by_role("heading", name="2 runs side by side")).to_be_visible()
    page.get_by_text("The cosine of the two whole updates is").wait_for()
    for name in ("cosine", "phi", "subspace_overlap_by_k", "principal_angle_by_k"):
        tab.drawn(name)
    tab.go(f"#/run/{ids[3]}")
    assert ERROR in page.locator("#app").inner_text()
    tab.go(f"#/run/{ids[4]}")
    assert "waiting" in page.locator("#app").inner_text()
    tab.go("#/layers")
    tab.drawn("by_module")


def waiting_to_be_seen(seen: Path) -> None:
    """Each run waits in its third step until it was looked at; that of seed 1 is killed then."""
    from lora_lab import execution
    from lora_lab.models.planted import PlantedRegression

    train, forward, state = execution.execute, PlantedRegression.features, {}

    def execute(config: Any, *args: Any) -> None:
        state.update(seed=config.seed, calls=0)
        train(config, *args)

    def features(self: Any, *args: Any, **kwargs: Any) -> Any:
        state["calls"] += 1
        while state["calls"] == 3 and not (seen / str(state["seed"])).exists():
            time.sleep(0.02)
        if state["calls"] == 3 and state["seed"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args, **kwargs)

    execution.execute = execute
    PlantedRegression.features = features  # type: ignore[method-assign]


def test_a_sweep_is_watched_from_start_to_end_and_a_killed_run_is_seen(
    tab: Tab, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    argv = ["train", *SMALL, "host.workers=1", "adapter=lora", "seed=0,1,2", f"--results={results}"]
    with served(Store(results)) as port:
        page = tab.open(f"http://127.0.0.1:{port}/")
        assert "0 done" in page.locator("#live").inner_text()
        patch = functools.partial(waiting_to_be_seen, tmp_path)
        sweep = Apart(lab, *argv, output=tmp_path / "out.txt", patch=patch)
        standing = page.locator("#standing")
        for seed, waiting in ((0, 2), (1, 1), (2, 0)):
            expect(standing).to_contain_text(SEEN)
            assert (f"{waiting} waiting" in standing.inner_text()) == (waiting > 0)
            running = standing.locator("tr", has=page.locator(".running"))
            page.evaluate("id => { window.OLD = id; }", running.get_attribute("data-run"))
            (tmp_path / str(seed)).touch()
            # What ran before is gone from the list of running ones.
            page.wait_for_function(GONE, timeout=60_000)
        assert sweep.wait() == 1
        expect(page.locator("#runs .status.done")).to_have_count(2)
        expect(page.locator("#runs .status.interrupted")).to_have_count(1)
        expect(standing).to_contain_text("interrupted")
        expect(page.locator("#findings")).to_contain_text("2 done")


SEEN = re.compile(r"running.* step [12] of 4, loss \d.*, about .* left")
GONE = """() => !document.querySelector(`#standing tr[data-run="${window.OLD}"] .running`)"""


# ---- its sizes ---------------------------------------------------------------------------------


def many(count: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    plan = [("head", 0), ("full", 0), *(("lora", 2**i) for i in range(7))]
    rows = []
    for i in range(count):
        adapter, r = plan[i % len(plan)]
        lora = {"adapter.r": float(r), "adapter.alpha": 2.0 * r, "adapter.scaling": "alpha_over_r"}
        more = (lora if r else {}) | {"adapter_parameters": 1 + 1000 * r}
        score = float(rng.normal(0.8, 0.01))
        rows.append(run_row(f"{i:012x}", adapter, i // len(plan), score=score, **more))
    return as_loaded(pd.DataFrame(rows))


def of_cpu(tab: Tab) -> Callable[[], float]:
    """Seconds that the page's thread has worked: what others do on this machine does not count."""
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def now() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(float(m["value"]) for m in metrics if m["name"] == "TaskDuration")

    return now


@pytest.fixture
def sized(tmp_path: Path, undrawn: None) -> Callable[[int], Path]:
    """The file of so many runs."""
    none = empty_tables()
    return lambda count: report.write(
        Tables(many(count), none.measures, none.traces, none.spectra), tmp_path / "report.html"
    )


def test_five_thousand_runs_open_fast_from_a_small_file(
    tab: Tab, sized: Callable[[int], Path]
) -> None:
    path, worked = sized(5000), of_cpu(tab)
    assert path.stat().st_size < 15e6
    tab.open(path.as_uri())
    tab.drawn("score_against_r")
    assert worked() < 5


def test_a_thousand_runs_stay_fluent(tab: Tab, sized: Callable[[int], Path]) -> None:
    worked = of_cpu(tab)
    tab.open(sized(1000).as_uri())
    tab.drawn("score_against_r")
    took = []
    for turn in ("f=seed ≤ 50", "q=lora", "sort=score", "f=adapter.r ≥ 8", "y=loss"):
        start = worked()
        tab.go(f"#/overview?{quote(turn, safe='=')}")
        took.append(worked() - start)
    assert float(np.median(took)) < 0.2, took
