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
BLOCK = "demo-summary"


def replaced(readme: str, block: str, content: str) -> str:
    """The README with what stands between `<!-- block -->` and `<!-- /block -->` replaced."""
    start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    before, _, rest = readme.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def written(readme: str) -> str:
    """The README with its result sentences, as list items, replaced."""
    lines = [f"- {sentence}" for sentence in sentences(load(ROOT / "results" / "demo"))]
    return replaced(readme, BLOCK, "\n".join(lines))


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
