"""A results folder as the pages ask for it: what has not changed is not read again."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd

from lora_lab.layers import depth_of, module_of
from lora_lab.report import parts, words
from lora_lab.report.details import run_part
from lora_lab.report.ledger import claims_part
from lora_lab.report.sidebyside import pair_part
from lora_lab.standing import standing
from lora_lab.store import Record, Store, Tables

ENDED = ("done", "diverged", "failed")
REMEMBERED = 64
"""Answers that are kept."""


class Live:
    """What the pages are told of a results folder; several threads may ask at once.

    Parameters
    ----------
    store : Store
        Only read.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._looking, self._making = threading.Lock(), threading.Lock()
        self._stamps: dict[str, int] = {}
        self._records: dict[str, Record] = {}
        self._layers: dict[str, tuple[int | None, dict[str, Any]]] = {}
        self._answers: dict[str, tuple[str, bytes]] = {}

    def look(self) -> tuple[Tables, str]:
        """The tables of all runs, and a version that changes when a run begins, ends or grows."""
        with self._looking, warnings.catch_warnings(action="ignore"):
            stamps = self.store.stamps()
            known = {i: r for i, r in self._records.items() if stamps.get(i) == self._stamps.get(i)}
            tables = Tables(self.store, known=known)
            ended = {i: r for i, r in tables.records.items() if r.status in ENDED and not r.packed}
            # What changed while it was read is read again.
            self._stamps, self._records = stamps, ended
            seen = [(i, r.status, stamps.get(i)) for i, r in tables.records.items()]
            return tables, _digest(seen)

    def part(self, name: str) -> bytes | None:
        """One part of the pages as JSON; None where there is none of this name.

        `standing`, `runs`, `layers`, `words`, `claims`, `run/ID`, `pair/ID+ID`.

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
        makers: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
            ("runs", 0): lambda: parts.runs_part(tables.runs) | {"version": version},
            ("layers", 0): lambda: self._all_layers(tables),
            ("words", 0): lambda: words.words_part(tables),
            ("claims", 0): lambda: claims_part(self.store.claims, inside=False),
            ("run", 1): lambda: self._run(ids[0]),
            ("pair", 2): lambda: pair_part(self.store, ids[0], ids[1]),
        }
        make = makers.get((kind, len(ids)))
        if make is None or not set(ids) <= tables.records.keys():
            return None
        state = _digest([self._stamps.get(i) for i in ids]) if ids else version
        with self._making:
            stored = self._answers.pop(name, ("", b""))
            if stored[0] != state:
                with warnings.catch_warnings(action="ignore"):
                    stored = (state, parts.encoded(make()))
            self._answers[name] = stored
            while len(self._answers) > REMEMBERED:
                del self._answers[next(iter(self._answers))]
        return stored[1]

    def figure(self, stem: str) -> bytes | None:
        """The figure of a decided claim by the name of its files; None where there is none."""
        return next((p.read_bytes() for p in self.store.claims.glob("*.png") if p.stem == stem), None)

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
        return parts.layers_part(own, places(own))


def places(found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """layer, module and depth of every layer of `layer_values`."""
    layers = list(dict.fromkeys(name for own in found.values() for name in own["layers"]))
    modules, depths = map(module_of, layers), map(depth_of, layers)
    return pd.DataFrame({"layer": layers, "module": list(modules), "depth": list(depths)})


def _digest(seen: Any) -> str:
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
