"""Write the README's result sentences from the committed demo tables (`results/demo`).

lora-lab demo --results results/demo && lora-lab measure --results results/demo
lora-lab pack --results results/demo
python -m experiments.readme
"""

from __future__ import annotations

from pathlib import Path

from lora_lab.report.summary import sentences
from lora_lab.store import load

ROOT = Path(__file__).parents[1]
START, END = "<!-- demo-summary -->", "<!-- /demo-summary -->"


def block() -> str:
    """The sentences, as Markdown list items."""
    return "\n".join(f"- {sentence}" for sentence in sentences(load(ROOT / "results" / "demo")))


def written(readme: str) -> str:
    """The README with its summary replaced."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{block()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
