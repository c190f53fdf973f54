"""The claims ledger: every claim at smoke size, verdicts from tables alone, files that say so."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from lora_lab.claims import (
    OUTCOMES,
    SECTIONS,
    Claim,
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
from lora_lab.cli import main
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval

ROOT = Path(__file__).parents[1]
CLAIMS = {claim.id: claim for claim in claims()}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_claim_fixes_beforehand_what_decides_it(claim) -> None:
    assert set(claim.sections) == set(SECTIONS)
    assert claim.module.__doc__.startswith(f"{claim.id}: ")


def test_every_claim_runs_at_smoke_size_and_a_second_time_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["claims", "--size", "smoke", "--results", str(tmp_path), "host.tracker=disabled"]
    assert main(words) == 0, capsys.readouterr().out
    for claim in CLAIMS.values():
        entry = Entry(claim, tmp_path / "claims")
        stored = entry.stored or {}
        assert set(stored) >= {"id", "statistic", "interval", "p", "n_seeds", "effect"}, claim.id
        assert stored["size"] == "smoke"
        again = claim.verdict(read_csv(entry.path("csv").read_text()))
        assert (again.outcome, again.said) == (stored["outcome"], stored["said"])
        assert entry.stale() == ""
        assert entry.path("png").read_bytes().startswith(b"\x89PNG")
    ledger = (tmp_path / "claims" / "README.md").read_text()
    assert all(f"**{name}**" in ledger for name in CLAIMS)
    capsys.readouterr()
    assert main([*words, "--list"]) == 0
    assert "0 runs left in all" in capsys.readouterr().out


DECIDED = [c for c in CLAIMS.values() if Entry(c, ROOT / "results" / "claims").stored]


@pytest.mark.parametrize("claim", DECIDED, ids=lambda c: c.id)
def test_the_committed_verdict_follows_from_the_committed_table(claim: Claim) -> None:
    entry = Entry(claim, ROOT / "results" / "claims")
    stored = entry.stored or {}
    assert stored["size"] == "paper"
    assert entry.stale() == "", f"lora-lab claims {claim.id}"
    again = claim.verdict(read_csv(entry.path("csv").read_text()))
    assert (again.outcome, again.said) == (stored["outcome"], stored["said"])
    assert entry.path("png").is_file()


def test_the_committed_ledger_lists_every_claim_and_few_are_unresolved() -> None:
    folder = ROOT / "results" / "claims"
    entries = [Entry(claim, folder) for claim in CLAIMS.values()]
    assert (folder / "README.md").read_text() == index(entries)
    outcomes = [entry.stored["outcome"] for entry in entries if entry.stored]
    assert outcomes.count("unresolved") <= 10


def test_a_verdict_whose_table_runs_or_code_have_changed_is_stale(tmp_path: Path) -> None:
    claim, entry = CLAIMS["A1"], Entry(CLAIMS["A1"], tmp_path)
    table = table_of(claim, "smoke", tmp_path, [])
    entry.decide(table, "smoke", claim.table_code(["0123456789ab"]))
    assert entry.stale() == entry.stale(["0123456789ab"]) == ""
    assert entry.stale([]) == "runs"
    csv = entry.path("csv")
    csv.write_text(csv.read_text().replace("random", "other", 1))
    assert entry.stale() == "table"
    entry.decide(table, "smoke", "")
    path = entry.path("json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "0" * 64}))
    assert Entry(claim, tmp_path).stale() == "code"
    assert "(stale: code)" in index([Entry(claim, tmp_path)])


def test_what_makes_a_table_is_told_apart_from_what_decides_on_it() -> None:
    module = ModuleType("made_up")
    text = "LIMIT = 3\nSIZE = 4\ndef rows(found): return SIZE\ndef _of(t): return t\n"
    text += "def verdict(table): return _of(table) > LIMIT\ndef figure(table): ...\n"

    def codes(source: str) -> tuple[str, str]:
        claim = Claim("Z1", "made_up", module)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inspect, "getsource", lambda _: source)
            return claim.table_code([]), claim.verdict_code()

    first = codes(text)
    assert codes(text + "# a comment\n") == first
    limit, helper = (codes(text.replace(*change)) for change in (("= 3", "= 5"), ("t\n", "-t\n")))
    assert limit[0] == helper[0] == first[0]
    assert len({limit[1], helper[1], first[1]}) == 3
    size = codes(text.replace("= 4", "= 5"))
    assert (size[0] != first[0], size[1]) == (True, first[1])


def test_a_shared_helper_counts_for_the_verdict_and_not_for_the_table() -> None:
    claim, source = CLAIMS["C1"], inspect.getsource

    def changed(module: ModuleType) -> str:
        return source(module).replace("and found.high < self.high", "or found.high < self.high")

    before = claim.table_code([]), claim.verdict_code()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", changed)
        after = claim.table_code([]), claim.verdict_code()
    assert (after[0], after[1] != before[1]) == (before[0], True)


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_verdict_says_what_a_made_up_table_was_made_to_say(claim, outcome: str) -> None:
    needed = {"supported", "refuted"} | (set() if exact(claim) else {"unresolved"})
    for seed in range(3):
        table = claim.module.made(outcome, np.random.default_rng(seed))
        if table is None:
            assert outcome not in needed, f"{claim.id} can never be {outcome}"
            continue
        found = claim.verdict(read_csv(as_csv(table)))
        assert found.outcome == outcome, found.said
        if seed == 0:
            assert claim.module.figure(read_csv(as_csv(table))) is not None


def exact(claim: Claim) -> bool:
    """Whether nothing of it is left to chance, so that it is never unresolved."""
    return bool(claim.sections["Test"].lower().startswith("exact"))


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
