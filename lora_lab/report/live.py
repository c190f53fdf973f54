"""A results folder as the pages ask for it: what has not changed is not read again."""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_lab.report import parts, words
from lora_lab.report.details import run_part
from lora_lab.report.ledger import claims_part
from lora_lab.report.sidebyside import pair_part
from lora_lab.standing import standing
from lora_lab.store import Record, Store, Tables

ENDED = ("done", "diverged", "failed")
REMEMBERED = 64
"""Answers that are kept."""
LASTS = 20
"""Times that words took to be made for which they are told while runs run: they read all."""


@dataclass(frozen=True)
class Answer:
    """A part that was made, of what it was made, when, and how long it took (seconds)."""

    state: str
    data: bytes
    began: float
    took: float

    def holds(self, state: str, lasting: bool) -> bool:
        """Whether it need not be made again; one that lasts may be older than what it tells of."""
        recent = time.monotonic() - self.began < LASTS * self.took
        return self.state == state or (lasting and recent)


class Live:
    """What the pages are told of a results folder; several threads may ask at once.

    Parameters
    ----------
    store : Store
        Only read.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._looking = threading.Lock()
        self._making: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._stamps: dict[str, int] = {}
        self._open: dict[str, str] = {}
        self._seen: tuple[Tables, str] | None = None
        self._records: dict[str, Record] = {}
        self._layers: dict[str, tuple[int | None, dict[str, Any]]] = {}
        self._answers: dict[str, Answer] = {}

    def look(self) -> tuple[Tables, str]:
        """The tables of all runs, and a version that changes when a run begins, ends or grows."""
        with self._looking, warnings.catch_warnings(action="ignore"):
            stamps = self.store.stamps()
            same = {i: r for i, r in self._records.items() if stamps.get(i) == self._stamps.get(i)}
            now = {i: self.store.run(i).status() for i in self.store.run_ids() if i not in same}
            if self._seen is None or (stamps, now) != (self._stamps, self._open):
                tables = Tables(self.store, known=same)
                own = {i: r for i, r in tables.records.items() if not r.packed}
                # What changes while it is read is read again: its stamp is older.
                self._stamps = stamps
                self._records = {i: r for i, r in own.items() if r.status in ENDED}
                self._open = {i: r.status for i, r in own.items() if r.status not in ENDED}
                self._seen = (tables, _digest([stamps, self._open]))
            return self._seen

    def part(self, name: str) -> bytes | None:
        """One part of the pages as JSON; None where there is none of this name.

        `standing`, `runs`, `layers`, `words`, `claims`, `run/ID`, `pair/ID+ID`, `pair/ID+ID+NUMBER`
        (a layer).

        Raises
        ------
        WrongInput
            For two runs that cannot be compared.
        """
        tables, version = self.look()
        if name == "standing":
            return parts.encoded(parts.standing_part(standing(tables), version))
        kind, _, rest = name.partition("/")
        ids = rest.split("+") if rest else []
        layer = int(ids.pop()) if kind == "pair" and len(ids) == 3 and len(ids[2]) < 6 else None
        makers: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
            ("runs", 0): lambda: parts.runs_part(tables.runs) | {"version": version},
            ("layers", 0): lambda: self._all_layers(tables),
            ("words", 0): lambda: self._words(version),
            ("claims", 0): lambda: claims_part(self.store.claims, inside=False),
            ("run", 1): lambda: self._run(ids[0]),
            ("pair", 2): lambda: pair_part(self.store, ids[0], ids[1], layer),
        }
        make = makers.get((kind, len(ids)))
        if make is None or not set(ids) <= tables.records.keys():
            return None
        state = _digest([self._stamps.get(i) for i in ids]) if ids else version
        with self._making[name]:
            answer = self._answers.get(name)
            if answer is None or not answer.holds(
                state, lasting=kind == "words" and "running" in self._open.values()
            ):
                began = time.monotonic()
                with warnings.catch_warnings(action="ignore"):
                    data = parts.encoded(make())
                answer = Answer(state, data, began, time.monotonic() - began)
        self._answers.pop(name, None)
        self._answers[name] = answer
        for oldest in list(self._answers)[:-REMEMBERED]:
            self._answers.pop(oldest, None)
        return answer.data

    def figure(self, stem: str) -> bytes | None:
        """The figure of a decided claim by the name of its files; None where there is none."""
        return next(
            (p.read_bytes() for p in self.store.claims.glob("*.png") if p.stem == stem), None
        )

    def _words(self, version: str) -> dict[str, Any]:
        # Tables of their own: what words read of all runs is not kept.
        return words.words_part(Tables(self.store, known=self._records)) | {"version": version}

    def _run(self, run_id: str) -> dict[str, Any]:
        own = parts.frames_by_run(Tables(self.store, [run_id], self._records), [run_id])
        return run_part(run_id, own[run_id], thin=False)

    def _all_layers(self, tables: Tables) -> dict[str, Any]:
        """Values of every layer; of runs that are known already nothing is read."""
        done = {i for i, r in tables.records.items() if r.status == "done"}
        now = {i: self._stamps.get(i) for i in done}
        new = [i for i in done if i not in self._layers or self._layers[i][0] != now[i]]
        if new:
            found = parts.layer_values(Tables(self.store, new, self._records).measures)
            self._layers |= {i: (now[i], found.get(i, {})) for i in new}
        own = {i: self._layers[i][1] for i in sorted(done) if self._layers[i][1]}
        return parts.layers_part(own)


def _digest(seen: Any) -> str:
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
