"""The claims ledger: every claim at smoke size, verdicts from tables alone, files that say so."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from lora_lab.claims import (
    OUTCOMES,
    SECTIONS,
    Entry,
    Verdict,
    against,
    as_csv,
    claims,
    index,
    read_csv,
    table_of,
    together,
)
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval

CLAIMS = {claim.id: claim for claim in claims()}
COMPUTED = [claim for claim in CLAIMS.values() if claim.computed]


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {c.id: table_of(c, "smoke", Path("results"), []) for c in COMPUTED}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_claim_fixes_beforehand_what_decides_it(claim) -> None:
    assert set(claim.sections) == set(SECTIONS)
    assert claim.module.__doc__.startswith(f"{claim.id}: ")


@pytest.mark.parametrize("claim", COMPUTED, ids=lambda c: c.id)
def test_a_verdict_and_its_figure_come_from_the_committed_table_alone(
    claim, tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    entry = Entry(claim, tmp_path)
    found = entry.decide(tables[claim.id], "smoke")
    assert found.outcome in OUTCOMES
    stored = json.loads(entry.path("json").read_text())
    assert stored["said"] == found.said
    assert set(stored) >= {
        *("id", "outcome", "said", "statistic", "interval", "p", "n_seeds", "effect")
    }
    again = claim.verdict(read_csv(entry.path("csv").read_text()))
    assert (again.outcome, again.said) == (found.outcome, found.said)
    assert entry.path("png").read_bytes().startswith(b"\x89PNG")


def test_a_verdict_whose_table_or_code_has_changed_is_stale(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    claim = CLAIMS["A1"]
    Entry(claim, tmp_path).decide(tables["A1"], "smoke")
    assert Entry(claim, tmp_path).stale == ""
    csv = Entry(claim, tmp_path).path("csv")
    csv.write_text(csv.read_text().replace("random", "other", 1))
    assert Entry(claim, tmp_path).stale == "table"
    Entry(claim, tmp_path).decide(tables["A1"], "smoke")
    path = Entry(claim, tmp_path).path("json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "0" * 64}))
    assert Entry(claim, tmp_path).stale == "code"
    assert "(stale: code)" in index([Entry(claim, tmp_path)])


# Each verdict on tables in which the claim is true and false by construction.
FALSE = {
    "A1": lambda t: t.assign(rank_BA=t["r"] + 1),
    "A4": lambda t: t.assign(error=1e-3),
    "A7": lambda t: t.assign(rank_of_sum=t["rank_of_sum"] * 2, dimension=t["parameters"]),
    "B4": lambda t: t.assign(entry=1.0, inner=t["r"]),
}
TRUE = {
    "A1": lambda t: t,
    "A4": lambda t: t,
    "A7": lambda t: t.assign(rank_of_sum=t["r"]),
    "B4": lambda t: t.assign(
        entry=t["r"].where(t["init"] == "symmetric", 0.0),
        inner=t["inner"].where(t["init"] != "normal", 1.0),
    ),
}


@pytest.mark.parametrize("name", TRUE)
def test_a_verdict_can_come_out_either_way(name: str, tables: dict[str, pd.DataFrame]) -> None:
    assert CLAIMS[name].verdict(TRUE[name](tables[name])).outcome == "supported"
    assert CLAIMS[name].verdict(FALSE[name](tables[name])).outcome == "refuted"


def test_quoted_numbers_are_judged_one_by_one(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["A2"]
    assert CLAIMS["A2"].verdict(table).outcome == "mixed"
    assert CLAIMS["A2"].verdict(table.assign(reduction=1e6)).outcome == "supported"
    wrong = table.assign(reduction=0.1, trained=table["formula"] + 1)
    assert CLAIMS["A2"].verdict(wrong).outcome == "refuted"


def test_the_truncated_svd_loses_to_one_better_competitor(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["A3"]
    assert CLAIMS["A3"].verdict(table).outcome == "mixed"
    assert CLAIMS["A3"].verdict(table.assign(**{"sum": table["error"]})).outcome == "supported"
    better = table.assign(trained=0.9 * table["error"])
    assert CLAIMS["A3"].verdict(better).outcome == "refuted"


def test_intervals_decide_only_when_they_lie_on_one_side() -> None:
    assert against(Interval(1.0, 0.5, 1.5), 0.4) == "supported"
    assert against(Interval(1.0, 0.5, 1.5), 1.6) == "refuted"
    assert against(Interval(1.0, 0.5, 1.5), 1.0) == "unresolved"
    assert together(["refuted", "refuted"]) == "refuted"
    assert together(["supported", "mixed"]) == "mixed"


def test_tables_survive_being_written() -> None:
    table = pd.DataFrame({"run_id": ["0123456789ab", ""], "x": [1 / 3, float("nan")]})
    assert as_csv(read_csv(as_csv(table))) == as_csv(table)


def test_an_unknown_claim_is_refused_and_a_sentence_must_end() -> None:
    with pytest.raises(WrongInput, match="unknown claim 'Z9'"):
        claims(["Z9"])
    with pytest.raises(AssertionError):
        Verdict("supported", "no full stop")
