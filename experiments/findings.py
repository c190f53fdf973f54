"""What the committed verdicts say together: for docs/findings.md and docs/validity.md."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

from experiments.markdown import plain, table
from experiments.readme import ROOT
from lora_lab.claims import OUTCOMES, Entry, claims

FAMILIES = {
    "A": "algebra, counting, code",
    "B": "starts, scales, gradients",
    "C": "the rank of updates",
    "D": "advice on r, layers, data",
    "E": "theory",
    "F": "variants of LoRA",
    "G": "papers, repeated",
}

SURPRISES = {
    "C1": (
        "mixed",
        "By every count of energy the update of full fine-tuning is of high rank, and yet a tenth "
        "of its directions does the work on MiniLM.",
    ),
    "F3": (
        "refuted",
        "Adapters of different tasks ruin each other when they are summed, and neither cosine nor "
        "overlap nor sign conflicts tell how much.",
    ),
    "F4": (
        "refuted",
        "Ranks that change in training do no better than one fixed r of the same parameter count.",
    ),
    "F5": ("refuted", "A scale that is learned per layer ends near where it started."),
    "D2": (
        "refuted",
        "Query and value alone fall short of the share of full fine-tuning that guidelines "
        "promise, once the floor is taken off.",
    ),
    "A8": (
        "mixed",
        "The LoRA layer that is copied from text to text breaks most of the laws that it is copied "
        "for.",
    ),
    "A7": ("mixed", "The set that LoRA searches is no subspace: sums of two updates leave it."),
    "C8": (
        "mixed",
        "MiniLM has hardly any intruder dimensions, and on digits full fine-tuning has more of "
        "them than LoRA at r = 1.",
    ),
}
"""What surprised, in words, and the verdict for which a sentence was written: with another it is
left out."""


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
    """The sentences whose verdict still is the one that they were written for."""
    by_id = {e.claim.id: e for e in entries()}
    rows = []
    for name, (outcome, said) in SURPRISES.items():
        entry = by_id[name]
        if entry.stored and entry.stored["outcome"] == outcome:
            figure = f"[figure](../results/claims/{entry.claim.stem}.png)"
            rows.append((said, f"{name} {outcome}", str(entry.stored["n_seeds"]), figure))
    return table(("what surprised", "verdict", "seeds", ""), rows)


def open_claims() -> str:
    """Unresolved claims with the seeds that would tell, and those that were not run."""
    rows = []
    for entry in entries():
        if _outcome(entry) == "unresolved":
            stored: dict[str, Any] = entry.stored or {}
            asked = re.findall(r"about ([\d,]+) seeds", stored["said"])
            rows.append((entry.claim.id, str(stored["n_seeds"]), ", ".join(asked) or "–"))
    left = [f"{e.claim.id} ({plain(e.claim.sections['Cost'].rstrip('.'))})" for e in entries()
            if not e.stored]  # fmt: skip
    waiting = f"\n\nNot run yet, with what it would cost: {'; '.join(left)}." if left else ""
    return table(("unresolved", "seeds so far", "seeds that would tell"), rows) + waiting


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
