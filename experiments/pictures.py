"""Pictures of the pages for the docs: `python -m experiments.pictures [RESULTS]`.

RESULTS is a results folder in which a sweep runs, whose full runs keep their weights, with two
seeds of a setting and a claims ledger; docs/pictures is written. Chromium comes from the system.
"""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from lora_lab.dashboard import HOST, server
from lora_lab.store import Store, load

OUT = Path(__file__).parents[1] / "docs" / "pictures"
SIZE = {"width": 1100, "height": 900}
GROUND = ("minilm", "rotten_tomatoes")


def pictures(results: Path) -> dict[str, tuple[str, str]]:
    """Name of each picture to the fragment of its page and what stands at its top."""
    runs = load(results).runs
    own = runs[(runs["model"] == GROUND[0]) & (runs["data"] == GROUND[1])]
    done = own[(own["status"] == "done") & (own["model.start"].isna() | (own["model.start"] == ""))]
    fields = [c for c in map(str, done) if "." in c and c != "data.seed"]
    full = done[done["adapter"] == "full"]
    one, other, *_ = max(full.groupby(fields, dropna=False), key=lambda group: len(group[1]))[1][
        "run_id"
    ]
    lora = done[(done["adapter"] == "lora") & (done["adapter.r"] == 8)]["run_id"].iloc[0]
    on = f"on={GROUND[0]}+on+{GROUND[1]}"
    return {
        "live": (f"overview?{on}", "#bar"),
        "overview": (f"overview?{on}", '[data-figure="score_against_r"]'),
        "methods": (f"overview?{on}", '[data-figure="pareto_adapter_parameters"]'),
        "run": (f"run/{one}", '[data-figure="spectra"]'),
        "heat": (f"run/{one}?null=yes", '[data-figure="heat_effective_rank"]'),
        "compare": (f"compare/{one}+{other}+{lora}", '[data-figure="phi"]'),
        "layers": (f"layers?{on}", '[data-figure="by_depth"]'),
        "claims": ("claims?verdict=refuted", "#bar"),
    }


def take(page: Page, url: str, fragment: str, top: str, path: Path) -> None:
    """One picture: a window of the page, once all that is in it is drawn."""
    page.goto("about:blank")
    page.goto(f"{url}#/{fragment}")
    place = page.locator(top)
    place.wait_for(timeout=300_000)
    place.scroll_into_view_if_needed()
    place.evaluate("element => scrollTo(0, element.getBoundingClientRect().top + scrollY - 60)")
    page.wait_for_timeout(4000)
    page.screenshot(path=path)
    print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")


def main(results: Path) -> None:
    """Take all of them."""
    OUT.mkdir(parents=True, exist_ok=True)
    with server(Store(results)) as serving, sync_playwright() as playwright:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
        for name, (fragment, top) in pictures(results).items():
            take(page, f"http://{HOST}:{serving.port}/", fragment, top, OUT / f"{name}.png")
        serving.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
