"""The claims ledger: sentences about LoRA, each decided by an experiment of its own.

One file `experiments/claims/<id>_<name>.py` is one claim. Its docstring states it and fixes before
any run what decides it; it defines

    SWEEP = {"smoke": [lines], "paper": [lines]}     the runs, as lines of Hydra overrides
    rows(found) -> DataFrame                         what of these runs decides, with run_id
    compute(size, seed) -> DataFrame                 instead of both, for claims without runs
    verdict(table) -> Verdict                        from that table alone
    figure(table) -> Figure
    made(outcome, rng) -> DataFrame                  a table of which the outcome is known
    WEIGHTS = True                                   where `rows` reads the runs' updates

A verdict is computed, never typed. Its whole input is committed beside it as CSV. `made` gives the
tests tables in which the claim is true or false by construction, or that tell too little.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import json
import math
import pkgutil
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from lora_lab.linalg import Update
from lora_lab.measuring import Final, finals_of, kept
from lora_lab.registry import unknown
from lora_lab.stats import Interval
from lora_lab.store import Store, Tables

OUTCOMES = ("supported", "refuted", "mixed", "unresolved")
SEEDS = {"smoke": 1, "paper": 5}
"""How often `compute` is called, with seed 0, 1 …"""

HELPERS = ("experiments.", "lora_lab.claims")
"""Modules whose functions count as a verdict's own code."""

SECTIONS = ("Claim", "Decided by", "Test", "Power", "Cost")
"""Paragraphs that every claim's docstring has."""


@dataclass(frozen=True)
class Verdict:
    """What a table says of a claim.

    Attributes
    ----------
    outcome : str
        `supported`, `refuted`, `mixed` (holds on a stated part), or `unresolved` (`said` tells
        how many seeds it would take).
    said : str
        One plain sentence with numbers.
    statistic : float
        What was tested; NaN where several numbers decide.
    interval : (float, float)
        Its 95 % interval; NaN for an exact claim.
    p : float
        NaN where no test was made.
    n_seeds : int
        Independent repetitions behind it.
    effect : float
        Size of what was found, in the unit that `said` names; inside the interval, if there is one.
    parts : tuple of str
        Of a claim of many parts what was found of each, where `said` names the main ones alone.
    """

    outcome: str
    said: str
    statistic: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    p: float = math.nan
    n_seeds: int = 0
    effect: float = math.nan
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.outcome in OUTCOMES, self.outcome
        assert self.said.strip().endswith("."), "a sentence ends with a full stop"
        # The ledger shows the effect with this interval.
        low, high = self.interval
        missing = math.isnan(self.effect) or math.isnan(low)
        assert missing or low <= self.effect <= high, (self.effect, self.interval)


def against(found: Interval, edge: float, more: bool = True) -> str:
    """Outcome of "the value is above `edge`" (`more=False`: below) by its interval.

    Supported when the whole interval lies on the claimed side, refuted when it lies on the other,
    else unresolved.

    >>> against(Interval(0.5, 0.4, 0.6), 0.3), against(Interval(0.5, 0.4, 0.6), 0.3, more=False)
    ('supported', 'refuted')
    >>> against(Interval(0.5, 0.2, 0.8), 0.3)
    'unresolved'
    """
    if found.low > edge:
        return "supported" if more else "refuted"
    if found.high < edge:
        return "refuted" if more else "supported"
    return "unresolved"


def together(outcomes: Iterable[str]) -> str:
    """Outcome of a claim of several parts.

    It says that all of them hold. Supported: they do. Refuted: one does not, and none was shown to
    hold. Mixed: one holds and another does not. Unresolved: none is refuted, and one is open.

    >>> together(["supported", "supported"]), together(["supported", "refuted", "unresolved"])
    ('supported', 'mixed')
    >>> together(["refuted", "unresolved"]), together(["supported", "unresolved"])
    ('refuted', 'unresolved')
    """
    parts = set(outcomes)
    assert parts, "a claim has at least one part"
    if "mixed" in parts or {"supported", "refuted"} <= parts:
        return "mixed"
    if "refuted" in parts:
        return "refuted"
    return "unresolved" if "unresolved" in parts else "supported"


class Found(Tables):
    """The tables of a claim's own runs, and what else the results folder keeps of them."""

    def updates(self, run_id: str) -> dict[str, Update]:
        """Final update of every layer of a run whose weights are kept, see `WEIGHTS`."""
        return kept(self.store.run(run_id))[0]

    def finals(self, run_id: str) -> dict[str, Final]:
        """Final spectrum of every layer with its vectors, and W0 and its spectrum (`.given`)."""
        return finals_of(self.store, self.store.run(run_id))


@dataclass(frozen=True)
class Claim:
    """One file of experiments/claims.

    Attributes
    ----------
    id, name : str
        `A1` and `rank_bound`.
    module : module
    """

    id: str
    name: str
    module: ModuleType

    @property
    def stem(self) -> str:
        """Name of its files in results/claims, without their ending."""
        return f"{self.id}_{self.name}"

    @cached_property
    def sections(self) -> dict[str, str]:
        """Paragraphs of the docstring by their first word, `Claim: …`, on one line each."""
        text = inspect.cleandoc(self.module.__doc__ or "")
        found = re.findall(r"(?ms)^([A-Z][a-z ]+): (.+?)(?=\n\n|\Z)", text)
        return {name: " ".join(body.split()) for name, body in found}

    @property
    def computed(self) -> bool:
        """Whether it needs no runs."""
        return hasattr(self.module, "compute")

    @property
    def weighs(self) -> bool:
        """Whether it reads the updates of its runs, not only their tables."""
        return bool(vars(self.module).get("WEIGHTS", False))

    def lines(self, size: str) -> list[list[str]]:
        """Its sweep at a size, as override lists; none for a computed claim.

        An override line inside of a line, as in `adapter.reference="…"`, stands in quotes.
        """
        return [] if self.computed else [shlex.split(line) for line in self.module.SWEEP[size]]

    def table_code(self, run_ids: Sequence[str]) -> str:
        """SHA-256 of what makes its table: its runs, and the code of its own file.

        What the file imports does not count: runs may be gone when a helper is put in order.
        """
        code = _used(self.module, ["compute" if self.computed else "rows"])
        return _sha("\n".join([_digest(code), *sorted(run_ids)]))

    def verdict_code(self) -> str:
        """SHA-256 of what decides, and draws, from the table, shared helpers too.

        A verdict is made again from its table in milliseconds.
        """
        return _digest(_used(self.module, ["verdict", "figure"], HELPERS))

    def verdict(self, table: pd.DataFrame) -> Verdict:
        """Decide from a table."""
        found: Verdict = self.module.verdict(table)
        return found


def _used(
    module: ModuleType, names: Iterable[str], follow: tuple[str, ...] = ()
) -> dict[tuple[str, str], str]:
    """Text of these functions and values of a file and of all that they use, by file and name.

    Comments and layout do not count. Names from modules whose path begins with one of `follow` are
    followed into them.
    """
    tree = _parsed(inspect.getsource(module))
    parts = {name: node for node in tree.body for name in _defined(node)}
    sources = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(follow)
        for alias in node.names
    }
    used: dict[tuple[str, str], str] = {}
    todo, outside = [name for name in names if name in parts], set()
    while todo:
        name = todo.pop()
        if (module.__name__, name) not in used:
            used[module.__name__, name] = ast.unparse(parts[name])
            words = {n.id for n in ast.walk(parts[name]) if isinstance(n, ast.Name)}
            todo += sorted(words & parts.keys())
            outside |= {sources[word] for word in words & sources.keys()}
    for path, name in sorted(outside - used.keys()):
        used |= _used(importlib.import_module(str(path)), [name], follow)
    return used


@lru_cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _digest(used: Mapping[tuple[str, str], str]) -> str:
    return _sha("\n".join(used[key] for key in sorted(used)))


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement of a file defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def claims(wanted: Sequence[str] = ()) -> list[Claim]:
    """The claims of these ids (all, if none are given), in the order of the ledger.

    Raises
    ------
    WrongInput
        For an id that is none.
    """
    package = importlib.import_module("experiments.claims")
    stems = {
        m.name.partition("_")[0].upper(): m.name for m in pkgutil.iter_modules(package.__path__)
    }
    for one in wanted:
        if one.upper() not in stems:
            raise unknown("claim", one, stems)
    chosen = {one.upper() for one in wanted} or set(stems)
    ids = sorted(chosen, key=lambda i: (i[0], int(i[1:])))
    return [
        Claim(
            i, stems[i].partition("_")[2], importlib.import_module(f"{package.__name__}.{stems[i]}")
        )
        for i in ids
    ]


# ---- tables ------------------------------------------------------------------------------------


def table_of(claim: Claim, size: str, results: Path, run_ids: Sequence[str]) -> pd.DataFrame:
    """What decides a claim, from its runs or by computing it.

    The frame has the columns `run_id` (empty for a computed claim) and `commit` of the code that
    made each row.
    """
    if claim.computed:
        from lora_lab.execution import source_state

        parts = [claim.module.compute(size, seed).assign(seed=seed) for seed in range(SEEDS[size])]
        table = pd.concat(parts, ignore_index=True)
        return table.assign(run_id="", commit=source_state()["git_commit"])
    found = Found(Store(results), run_ids)
    table = claim.module.rows(found)
    commits = found.runs.set_index("run_id")["git_commit"]
    # A row about several runs names them joined by '+'.
    first = table["run_id"].str.partition("+")[0]
    return table.assign(commit=first.map(commits).to_numpy())


def as_csv(table: pd.DataFrame) -> str:
    """The table as it is committed: a verdict is computed from what this text says, no more."""
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def read_csv(text: str) -> pd.DataFrame:
    """A committed table; empty text stays text."""
    return pd.read_csv(io.StringIO(text), keep_default_na=True, dtype={"run_id": str})


# ---- the ledger ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A claim's place in a ledger folder (`results/claims`)."""

    claim: Claim
    folder: Path

    def path(self, ending: str) -> Path:
        """The file with the ending json, csv or png."""
        return self.folder / f"{self.claim.stem}.{ending}"

    @cached_property
    def stored(self) -> dict[str, Any] | None:
        """Content of its JSON, None where it is not decided yet."""
        path = self.path("json")
        return json.loads(path.read_text()) if path.is_file() else None

    def stale(self, run_ids: Sequence[str] | None = None) -> str:
        """Why the stored verdict no longer holds; '' if it does.

        `table`: the CSV is not the one that was decided on; `runs`: other code, or other runs than
        these (None: not asked), make the table now; `code`: other code decides from it.
        """
        if self.stored is None:
            return ""
        csv = self.path("csv")
        if not csv.is_file() or _sha(csv.read_text()) != self.stored["inputs"]:
            return "table"
        if run_ids is not None and self.claim.table_code(run_ids) != self.stored["made_by"]:
            return "runs"
        return "" if self.claim.verdict_code() == self.stored["code"] else "code"

    def decide(self, table: pd.DataFrame, size: str, made_by: str) -> Verdict:
        """Compute verdict and figure from a table and write all three files.

        Parameters
        ----------
        made_by : str
            `Claim.table_code` of the code and the runs that the table is from.
        """
        text = as_csv(table)
        table = read_csv(text)
        found = self.claim.verdict(table)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path("csv").write_text(text)
        picture = self.claim.module.figure(table)
        picture.savefig(self.path("png"), dpi=100, metadata={"Software": None})
        content = {"id": self.claim.id, "name": self.claim.name, "size": size}
        content["claim"] = self.claim.sections["Claim"]
        content |= _plain(asdict(found))
        content |= {"inputs": _sha(text), "made_by": made_by, "code": self.claim.verdict_code()}
        content["command"] = f"lora-lab claims {self.claim.id}"
        content["command"] += " --size smoke" if size == "smoke" else ""
        self.path("json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self.__dict__.pop("stored", None)
        return found


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is missing is null."""

    def one(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [one(v) for v in value]
        if hasattr(value, "item"):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: one(value) for name, value in values.items()}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def escaped(text: str) -> str:
    """Text inside a cell of a Markdown table, where | ends the cell."""
    return text.replace("|", "\\|")


def effect_of(stored: Mapping[str, Any]) -> str:
    """Effect and interval of a stored verdict as text; '' where it has none.

    >>> effect_of({"effect": 0.12345, "interval": [0.1, 0.2]})
    '0.123 [0.1, 0.2]'
    """
    effect = "" if stored["effect"] is None else f"{stored['effect']:.3g}"
    low, high = stored["interval"]
    return effect if low is None else f"{effect} [{low:.3g}, {high:.3g}]"


def index(entries: Sequence[Entry]) -> str:
    """results/claims/README.md: every claim with its verdict, sentence, interval and figure."""
    lines = [
        "# Claims ledger",
        "",
        "Each verdict is computed by the claim's file from the CSV beside it; `lora-lab claims ID`",
        "makes both again.",
        "",
        "| claim | verdict | what was found | effect [95 %] | seeds | figure | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        claim, stored = entry.claim, entry.stored
        stated = f"**{claim.id}** {escaped(claim.sections['Claim'])}"
        if stored is None:
            lines.append(f"| {stated} | not run yet | | | | | `lora-lab claims {claim.id}` |")
            continue
        stale = entry.stale()
        outcome = stored["outcome"] + (f" (stale: {stale})" if stale else "")
        picture, data = (entry.path(e).name for e in ("png", "csv"))
        said, effect = escaped(stored["said"]), effect_of(stored)
        lines.append(
            f"| {stated} | {outcome} | {said} | {effect} | {stored['n_seeds']} "
            f"| [figure]({picture}) · [table]({data}) | `{stored['command']}` |"
        )
    lines += ["", "## Part by part", ""]
    for entry in entries:
        if entry.stored and entry.stored["parts"]:
            lines += [f"**{entry.claim.id}**", ""]
            lines += [*(f"- {part}" for part in entry.stored["parts"]), ""]
    return "\n".join(lines)
