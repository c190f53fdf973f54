"""Measures of runs: at the end of training, and again from what the store kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sweeping import SMALL

from lora_lab.analysis import rows
from lora_lab.config import Host, Keep, Tracker
from lora_lab.engine import run_here
from lora_lab.hydra_bridge import plan
from lora_lab.measures import MEASURES
from lora_lab.measuring import (
    LARGE,
    OF_A_RUN,
    base_key,
    base_spectra,
    finals_of,
    kept,
    measure_missing,
)
from lora_lab.store import RunDir, Store

KEYS = ["step", "layer", "measure", "k", "side"]
METHODS = {"full": Keep.all, "full, top": Keep.top, "lora": Keep.all}


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of one method, measured by its training process."""
    results = tmp_path_factory.mktemp("measuring") / "results"
    words = ["adapter=lora", "adapter.r=3"] if request.param == "lora" else ["adapter=full"]
    ((one,), _) = plan([[*SMALL, *words]])
    host = Host(
        str(results),
        threads=1,
        tracker=Tracker.disabled,
        keep=METHODS[request.param],
    )
    assert run_here(one, host) == "done"
    return Store(results).run(one.run_id)


def store_of(run: RunDir) -> Store:
    return Store(run.path.parents[1])


def table(run: RunDir) -> pd.DataFrame:
    return run.read_measures().sort_values(KEYS, ignore_index=True)


def test_the_training_process_takes_every_measure_that_one_run_can_meet(run: RunDir) -> None:
    taken = run.measured()
    for name in MEASURES:
        m = MEASURES[name]
        possible = set(m.needs) <= OF_A_RUN - ({"r"} if run.has_tensors("update") else set())
        assert (name in taken) == (possible and m.at in ("every", "end")), name
    found = table(run)
    assert not found.duplicated(KEYS).any()
    early = found[found["step"] < found["step"].max()]["measure"].unique()
    assert set(early) <= {n for n in MEASURES if MEASURES[n].at == "every"}
    assert len(early)


def test_rows_of_the_final_step_are_those_of_the_final_update(run: RunDir) -> None:
    finals = finals_of(store_of(run), run)
    found = table(run)
    found = found[found["step"] == found["step"].max()]
    assert set(found["layer"]) == set(finals)
    for layer, final in finals.items():
        own = found[found["layer"] == layer].set_index(["measure", "k", "side"])
        direct = rows(layer, final.spectrum, sorted(run.measured()), **final.given)
        for row in direct:
            key = (row["measure"], row["k"], row["side"])
            for column in ("value", "null"):
                assert own.loc[[key], column].iloc[0] == pytest.approx(
                    row[column], rel=2e-3, abs=1e-6, nan_ok=True
                ), (key, column)


def test_missing_measures_are_taken_again_without_training(run: RunDir) -> None:
    before, metrics = table(run), run.read_json("metrics")
    _, whole = kept(run)
    (run.path / "measures.json").unlink()
    taken = measure_missing(store_of(run), ("every", "end"))
    assert set(taken) == {run.run_id}
    # A whole update that was not kept is not made up: its measures have no row.
    lost = {n for n in MEASURES if "update" in MEASURES[n].needs} if not whole else set()
    after = table(run)
    assert set(after["measure"]) == set(before["measure"]) - lost
    pd.testing.assert_frame_equal(
        after,
        before[~before["measure"].isin(lost)].reset_index(drop=True),
        rtol=2e-3,
        atol=1e-6,
    )
    assert run.read_json("metrics") == metrics
    assert run.verify() == []
    assert measure_missing(store_of(run), ("every", "end")) == {}


def test_a_large_base_is_decomposed_once_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "results", create=True)
    rng = np.random.default_rng(0)
    base = {"a": rng.standard_normal((3, 4)), "b": rng.standard_normal((LARGE // 8, 8))}
    key = base_key("hash", "", base)
    first = base_spectra(store, key, base)
    monkeypatch.setattr("lora_lab.measuring.decompose", None)
    again = base_spectra(store, key, base)
    for layer, W0 in base.items():
        s = again[layer]
        assert s.U is not None
        assert s.Vh is not None
        np.testing.assert_array_equal(s.values, first[layer].values)
        np.testing.assert_allclose((s.U * s.values) @ s.Vh, W0, atol=1e-10)
    with pytest.raises(TypeError):
        base_spectra(store, "another", {"a": base["b"]})
    monkeypatch.undo()
    small = base_spectra(store, "small", {"a": base["a"]})
    assert small["a"].values == pytest.approx(np.linalg.svd(base["a"], compute_uv=False))
    assert store.read_base("small-svd") is None
