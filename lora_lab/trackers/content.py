"""What a mirror holds of a finished run: a pure function of the run's tables.

Metric names come from the registries' names:

- a trace of a layer is ``trace/NAME/LAYER``, one of the whole model ``train/NAME``; gradient norms
  are ``grad/W/LAYER``, ``grad/A/LAYER``, ``grad/B/LAYER`` and ``grad/total``, what was found on the
  validation split ``validation/NAME``;
- a measure is its kind, its name, then its side, its k and the module over whose layers it is
  averaged, where it has them: ``rank/effective/query``, ``rank/energy/0.95/query``,
  ``size/norm/frobenius/query``. Curves over k are no metrics (each point would be a chart): they
  are in the table `measures` with every other row;
- the result on the test split is ``eval/score`` and ``eval/loss``, what is left of the row of
  `runs` is ``run/NAME``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import pandas as pd

from lora_lab import schema
from lora_lab.config import flat
from lora_lab.measures import MEASURES
from lora_lab.store import Record, Tables
from lora_lab.store.files import MEASURED, short

STEP = "train/step"
"""The optimizer step, against which every metric is drawn."""

LONGEST_GROUP = 128
"""Characters of a group's name that W&B accepts."""

RESULTS = tuple(name for name in schema.RUNS if name not in ("run_id", "status", "sweep", "error"))

Trace = tuple[int, str, str, float]
"""A row of `traces`: step, layer, trace, value."""

Row = dict[str, float]
"""Metric name to value; `STEP` is among them."""


def trace_metric(trace: str, layer: str) -> str:
    """Name of a trace's metric.

    >>> trace_metric("grad_norm_A", "h.0.query"), trace_metric("grad_norm", "h.0.query")
    ('grad/A/h.0.query', 'grad/W/h.0.query')
    >>> trace_metric("grad_norm_total", ""), trace_metric("loss", "")
    ('grad/total', 'train/loss')
    >>> trace_metric("validation_score", ""), trace_metric("path_length", "h.0.query")
    ('validation/score', 'trace/path_length/h.0.query')
    """
    section, name = ("trace", trace) if layer else ("train", trace)
    if trace.startswith("grad_norm"):
        section, name = "grad", trace.removeprefix("grad_norm").lstrip("_") or "W"
    elif trace.startswith("validation_"):
        section, name = "validation", trace.removeprefix("validation_")
    return "/".join(filter(None, (section, name, layer)))


def measure_metric(measure: str, k: float, side: str, module: str) -> str:
    """Name of a measure's metric; k is NaN, side and module are '' where there is none.

    >>> nan = float("nan")
    >>> measure_metric("stable_rank", nan, "", "query"), measure_metric("norm", nan, "nuclear", "")
    ('rank/stable/query', 'size/norm/nuclear')
    """
    kind = MEASURES[measure].kind
    name = measure.removesuffix("_rank") if kind == "rank" else measure
    return "/".join(filter(None, (kind, name, side, f"{k:g}" if k == k else "", module)))


def history(traces: Iterable[Trace]) -> Iterator[tuple[int, Row]]:
    """Trace rows, sorted by step, as one row of metrics for each step."""
    for step, rows in itertools.groupby(traces, itemgetter(0)):
        yield (
            step,
            {STEP: step} | {trace_metric(trace, layer): value for _, layer, trace, value in rows},
        )


def results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of `runs` that a run has, by the name of their metric."""
    names = {"score": "eval/score", "loss": "eval/loss", "validation_score": "validation/score"}
    return {
        names.get(name, f"run/{name}"): metrics[name]
        for name in RESULTS
        if metrics.get(name) is not None
    }


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run when it is opened.

    Attributes
    ----------
    name, group, method : str
        Title, sweep names joined by ',', choice of the adapter.
    tags : list of str
        Model, data, method.
    config : dict
        Flat, with dots.
    """

    run_id: str
    name: str
    group: str
    method: str
    tags: list[str]
    config: dict[str, Any]


def about(run_id: str, config: Mapping[str, Any], sweeps: str) -> About:
    """A run's heading from its id, nested config (`config.as_dict`) and sweeps."""
    own = flat(dict(config))
    method = str(own["adapter"])
    return About(
        run_id,
        f"{method}-{run_id}",
        sweeps[:LONGEST_GROUP],
        method,
        [str(own["model"]), str(own["data"]), method],
        own | {"sweep": sweeps},
    )


@dataclass(frozen=True)
class Content:
    """All that a mirror holds of one finished run.

    Attributes
    ----------
    about : About
    history : list of (int, Row)
        The tracker's own step, which only grows, and a row: first the traces at their optimizer
        step, then from there on the measures of each decomposed step, averaged over the layers of
        a module. So a row that a mirror has can be told by its step.
    summary : dict
        Results on the test split, the counts, and every measure at the last step.
    tables : dict of str to DataFrame
        `measures`, `spectra` and `examples`, every row of the run's.
    failed : bool
        Whether the run diverged.
    """

    about: About
    history: list[tuple[int, Row]]
    summary: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    failed: bool


class Contents:
    """What mirrors hold of the finished runs of some tables.

    Parameters
    ----------
    tables : Tables
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.records = {i: r for i, r in tables.records.items() if r.status in ("done", "diverged")}

    @cached_property
    def _parts(self) -> dict[str, dict[str, pd.DataFrame]]:
        """Table to run_id to its rows."""
        frames = {
            name: getattr(self.tables, name)
            for name in ("traces", "measures", "spectra", "examples")
        }
        return {
            name: {"": frame.iloc[:0]} | dict(iter(frame.groupby("run_id", sort=False)))
            for name, frame in frames.items()
        }

    def _rows(self, run_id: str) -> dict[str, pd.DataFrame]:
        return {
            name: parts.get(run_id, parts[""]).drop(columns="run_id")
            for name, parts in self._parts.items()
        }

    def digest(self, run_id: str) -> str:
        """SHA-256 of everything that the tables say of a run, wherever they lie."""
        record = self.records[run_id]
        known = [
            record.status,
            record.error,
            self.tables.sweeps[run_id],
            _nested(record),
            {name: record.metrics.get(name) for name in RESULTS},
            record.provenance,
        ]
        whole = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        for frame in self._rows(run_id).values():
            # As packing leaves them, so that a packed run is the same.
            frame = frame.assign(**{c: short(frame[c].to_numpy()) for c in MEASURED if c in frame})
            whole.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())
            whole.update(b"|")
        return whole.hexdigest()

    def __getitem__(self, run_id: str) -> Content:
        """The content of a finished run."""
        record, rows = self.records[run_id], self._rows(run_id)
        heading = about(run_id, _nested(record), self.tables.sweeps[run_id])
        heading.config.update(flat({"provenance": record.provenance}))
        traces = rows.pop("traces")[["step", "layer", "trace", "value"]].sort_values("step")
        told = list(history(traces.itertuples(index=False, name=None)))
        measured = _measured(rows["measures"])
        last = max((step for step, _ in told), default=-1)
        told += [(last + n, row) for n, row in enumerate(measured, start=1)]
        summary: dict[str, Any] = {"run/status": record.status}
        if record.error:
            summary["run/error"] = record.error
        if record.status == "done":
            summary |= measured[-1] if measured else {}
        summary |= results(record.metrics)
        return Content(heading, told, summary, rows, record.status != "done")


def _nested(record: Record) -> dict[str, Any]:
    config: dict[str, Any] = record.config["config"]
    return config


def _measured(measures: pd.DataFrame) -> list[Row]:
    """One row for each step with measures: their mean over the layers of a module.

    Those without k, and ranks at a threshold; of those with sides too there would be dozens.
    """
    ranks = {name for name in MEASURES if MEASURES[name].kind == "rank"}
    single = measures["k"].isna() | (measures["measure"].isin(ranks) & (measures["side"] == ""))
    measures = measures[single & measures["measure"].isin(set(MEASURES))]
    keys = ["step", "measure", "k", "side", "module"]
    means = measures.groupby(keys, dropna=False, sort=True)["value"].mean()
    rows: dict[int, Row] = {}
    for step, measure, k, side, module, value in means.reset_index().itertuples(index=False):
        row = rows.setdefault(step, {STEP: step})
        row[measure_metric(measure, k, side, module)] = value
    return list(rows.values())
