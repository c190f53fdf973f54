"""What the committed verdicts say together: for docs/findings.md and docs/validity.md."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

from experiments.markdown import plain, table
from experiments.readme import ROOT
from lora_lab.claims import OUTCOMES, Entry, claims, effect_of

FAMILIES = {
    "A": "algebra, counting, code",
    "B": "starts, scales, gradients",
    "C": "the rank of updates",
    "D": "advice on r, layers, data",
    "E": "theory",
    "F": "variants of LoRA",
    "G": "papers, repeated",
}

SURPRISES = ("C1", "F3", "F4", "F5", "D2", "A8", "A7", "C8")
"""Claims whose verdict few would have guessed."""


@lru_cache(maxsize=1)
def entries() -> list[Entry]:
    """The committed ledger."""
    return [Entry(claim, ROOT / "results" / "claims") for claim in claims()]


def _outcome(entry: Entry) -> str:
    return str(entry.stored["outcome"]) if entry.stored else "not run yet"


def families() -> str:
    """How many claims of each family have which verdict."""
    heads = (*OUTCOMES, "not run yet")
    rows = []
    for letter, title in FAMILIES.items():
        own = Counter(_outcome(e) for e in entries() if e.claim.id.startswith(letter))
        rows.append((f"{letter}: {title}", *(str(own[name] or "") for name in heads)))
    return table(("family", *heads), rows)


def surprises() -> str:
    """What was claimed, and the verdict, of `SURPRISES`."""
    rows = []
    for entry in entries():
        if entry.claim.id in SURPRISES and (stored := entry.stored):
            figure = f"[figure](../results/claims/{entry.claim.stem}.png)"
            said = plain(entry.claim.sections["Claim"])
            verdict = f"{entry.claim.id} {stored['outcome']}"
            rows.append((said, verdict, effect_of(stored), str(stored["n_seeds"]), figure))
    return table(("claimed", "verdict", "effect [95 %]", "seeds", ""), rows)


def open_claims() -> str:
    """Unresolved claims with the seeds that would tell, and those that were not run."""
    rows = []
    for entry in entries():
        if _outcome(entry) == "unresolved":
            stored: dict[str, Any] = entry.stored or {}
            asked = re.findall(r"([\d,]+ (?:seeds|tasks)) would", stored["said"])
            rows.append((entry.claim.id, str(stored["n_seeds"]), ", ".join(asked) or "–"))
    left = [f"{e.claim.id} ({plain(e.claim.sections['Cost'].rstrip('.'))})" for e in entries()
            if not e.stored]  # fmt: skip
    waiting = f"\n\nNot run yet, with what it would cost: {'; '.join(left)}." if left else ""
    return table(("unresolved", "seeds so far", "how many would tell"), rows) + waiting


# ---- threats to validity ------------------------------------------------------------------------


def grounds() -> str:
    """On what the decided claims rest: models, seeds, and rates at the edge of their grid."""
    decided = [e for e in entries() if e.stored]
    trained = [e for e in decided if not e.claim.computed]
    models = Counter(m for e in trained for m in _models(e))
    seeds = Counter(e.stored["n_seeds"] for e in trained if e.stored)
    edges = sum("edge of" in (e.stored or {})["said"] for e in trained)
    on = ", ".join(f"`{name}` {n}" for name, n in models.most_common())
    by = ", ".join(f"{n} on {count} seeds" for count, n in sorted(seeds.items()))
    return (
        f"Of {len(decided)} decided claims {len(trained)} rest on training runs, the others are "
        f"computed. Claims by the model that they train (some train several): {on}. By seeds: {by}."
        f" In {edges} of them the sentence says that a best rate lies at the edge of its grid."
    )


def _models(entry: Entry) -> set[str]:
    lines = entry.claim.lines("paper")
    named = [[w.partition("=")[2] for w in line if w.startswith("model=")] for line in lines]
    return {m for words in named for m in (words[-1] if words else "minilm").split(",")}
