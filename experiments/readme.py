"""Write the README's result sentences from the committed demo tables (`results/demo`), and its
table of claims from the committed verdicts (`results/claims`).

lora-lab demo --results results/demo && lora-lab measure --results results/demo
lora-lab pack --results results/demo
lora-lab claims
python -m experiments.readme
"""

from __future__ import annotations

from pathlib import Path

from lora_lab.claims import OUTCOMES, Entry, claims, escaped
from lora_lab.report.summary import sentences
from lora_lab.store import load

ROOT = Path(__file__).parents[1]
DEMO, CLAIMS = "demo-summary", "claims"
SURPRISES = ("C1", "B5", "C4")
"""Claims whose figures stand in the README."""


def replaced(readme: str, block: str, content: str) -> str:
    """The README with what stands between `<!-- block -->` and `<!-- /block -->` replaced."""
    start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    before, _, rest = readme.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def written(readme: str) -> str:
    """The README with its result sentences, and its table of claims, replaced."""
    lines = [f"- {sentence}" for sentence in sentences(load(ROOT / "results" / "demo"))]
    return replaced(replaced(readme, DEMO, "\n".join(lines)), CLAIMS, ledger())


def ledger() -> str:
    """Claim, verdict and sentence of every decided claim, after the figures of `SURPRISES`."""
    entries = [Entry(claim, ROOT / "results" / "claims") for claim in claims()]
    decided = [entry for entry in entries if entry.stored]
    lines = [
        f"![{e.claim.sections['Claim']}]({e.path('png').relative_to(ROOT)})\n"
        for e in decided
        if e.claim.id in SURPRISES
    ]
    outcomes = [(entry.stored or {})["outcome"] for entry in decided]
    counts = [f"{outcomes.count(name)} {name}" for name in OUTCOMES if name in outcomes]
    lines.append(f"{len(decided)} claims: {', '.join(counts)}.\n")
    lines += ["| claim | verdict | what was found |", "|---|---|---|"]
    for entry in decided:
        stored, about = entry.stored or {}, escaped(entry.claim.sections["Claim"])
        outcome, said = stored["outcome"], escaped(stored["said"])
        lines.append(f"| **{entry.claim.id}** {about} | {outcome} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
