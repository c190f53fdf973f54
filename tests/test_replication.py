"""What seeds share: the count's calibration on planted updates, and rows of a results folder."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from sweeping import SMALL

from lora_lab import schema
from lora_lab.analysis import rows
from lora_lab.engine import run_here
from lora_lab.hydra_bridge import plan
from lora_lab.linalg import Dense, Factored, Spectrum, decompose
from lora_lab.linalg.subspace import overlap_grid, random_frame
from lora_lab.measures import DIRECTIONS, MEASURES, measure
from lora_lab.measures.principal_angle import random_product
from lora_lab.measures.replicated_rank import ERROR, level, shared_directions
from lora_lab.registry import WrongInput
from lora_lab.replication import replicate_missing, replication, seed_groups
from lora_lab.store import Store, load

SIDES = ("left", "right")


def runs(planted, seeds, rng, shape=(128, 96)):
    """Spectra of runs that share planted singular values, in units of the noise's edge."""
    (m, n), k = shape, len(planted)
    edge = math.sqrt(m) + math.sqrt(n)
    shared = (random_frame(m, k, rng) * np.multiply(planted, edge)) @ random_frame(n, k, rng).T
    return [
        decompose(Dense(shared + rng.standard_normal(shape)), vectors=True) for _ in range(seeds)
    ]


def counts(found):
    return [measure("replicated_rank", found[0], side=side, seeds=found[1:]) for side in SIDES]


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize(
    "planted", [[2.0], [2.0] * 4, [2.0] * 16, np.geomspace(4, 2, 4), np.geomspace(2, 1, 16)]
)
def test_planted_directions_at_twice_the_edge_are_counted_in_95_percent(planted, seeds):
    rng = np.random.default_rng(len(planted))
    found = np.array([counts(runs(planted, seeds, rng)) for _ in range(60)])
    assert np.mean(found == len(planted)) >= 0.95


def test_directions_below_the_edge_are_not_seen_and_none_is_invented():
    rng = np.random.default_rng(0)
    found = np.array([counts(runs([3.0, 3.0, 0.2, 0.2], 3, rng)) for _ in range(20)])
    assert np.mean(found == 2) >= 0.95


@pytest.mark.parametrize("seeds", [2, 5])
def test_of_pure_noise_nothing_is_counted(seeds):
    rng = np.random.default_rng(seeds)
    found = np.array([counts(runs([0.0], seeds, rng, (64, 48))) for _ in range(150)])
    assert np.mean(found > 0) <= 0.05


@pytest.mark.parametrize(
    ("d", "mine", "theirs"),
    [(128, 64, (64,)), (48, 8, (8, 8)), (200, 1, (1,)), (64, 16, (4, 16, 16)), (9, 7, (7, 7))],
)
def test_random_frames_share_nothing_in_99_percent(d, mine, theirs):
    rng, draws = np.random.default_rng(d), 1000
    found = np.array(
        [
            shared_directions([random_product(d, mine, j, rng) for j in theirs], d)
            for _ in range(draws)
        ]
    )
    assert np.mean(found > 0) <= ERROR + 3 * math.sqrt(ERROR / draws)
    values = np.arange(d, 0.0, -1)
    s, *seeds = (Spectrum(values, (d, d), np.eye(d, j), np.eye(j, d)) for j in (mine, *theirs))
    mean, low, high = level(s, seeds)
    assert (low, high) == (0, 0)
    assert mean == pytest.approx(np.mean(found), abs=0.03)


def test_the_threshold_of_one_direction_is_the_quantile_of_the_exact_distribution():
    # One direction against one: cos^2 is Beta(1/2, (d - 1)/2), in 3 dimensions |cos| is uniform.
    for cosine, expected in ((1 - 1.01 * ERROR, 0), (1 - 0.99 * ERROR, 1)):
        assert shared_directions([np.array([[cosine]])], 3) == expected


@pytest.mark.parametrize("widths", [(4, 4, 4, 4), (1, 8)])
def test_the_threshold_of_an_average_over_seeds_is_met_by_chance_as_often_as_stated(widths):
    rng, d, draws = np.random.default_rng(9), 40, 8000
    shares = [rng.beta(j / 2, (d - j) / 2, draws) for j in widths]
    # All of a seed's share lies in its last direction, so that one subspace of it alone tells.
    last = [np.zeros((draws, j)) for j in widths]
    for M, share in zip(last, shares, strict=True):
        M[:, -1] = np.sqrt(share)
    found = [shared_directions([M[i : i + 1] for M in last], d) for i in range(draws)]
    tries = max(widths).bit_length()  # 1, 2, 4, ...
    assert np.mean(found) * tries == pytest.approx(ERROR, rel=0.5)


def test_the_count_ends_where_the_cumulative_overlap_is_still_above_random():
    rng = np.random.default_rng(1)
    found = runs([3.0] * 4, 2, rng)
    phi = overlap_grid(found[0].U[:, :16], found[1].U[:, :16])[-1, -1]
    null = MEASURES["subspace_overlap"].null(found[0], found[1], 16, "left")
    assert phi > 1.3 * null[2]
    assert counts(found) == [4, 4]


def test_a_shared_direction_behind_one_of_this_seed_alone_is_counted():
    rng = np.random.default_rng(2)
    U, V = random_frame(80, 4, rng), random_frame(70, 4, rng)
    noise = [0.1 * rng.standard_normal((80, 70)) for _ in range(3)]
    own = [(U[:, [i, 3]] * [30, 20]) @ V[:, [i, 3]].T for i in range(3)]
    found = [decompose(Dense(a + b), vectors=True) for a, b in zip(own, noise, strict=True)]
    assert counts(found) == [1, 1]


def test_turned_and_reordered_directions_of_equal_size_are_still_shared():
    rng = np.random.default_rng(3)
    U, V = random_frame(100, 8, rng), random_frame(90, 8, rng)
    found = []
    for _ in range(2):
        sizes = rng.permutation(np.linspace(1.0, 1.001, 8))
        found.append(decompose(Factored(U * sizes, V.T), vectors=True))
    assert counts(found) == [8, 8]


def test_one_shared_direction_that_lies_between_two_of_this_run_counts_once():
    rng = np.random.default_rng(8)
    frames = [random_frame(200, 6, rng) for _ in range(3)]
    shared = frames[0][:, :2] @ [0.6, 0.8]
    for other in frames[1:]:
        other[:, 1:] -= np.outer(shared, shared @ other[:, 1:])
        other[:, 0] = shared
        other[:, 1:] = np.linalg.qr(other[:, 1:])[0]
    products = [frames[0].T @ other for other in frames[1:]]
    assert [round(float(M[i, 0] ** 2), 2) for M in products for i in (0, 1)] == [0.36, 0.64] * 2
    assert shared_directions(products, 200) == 1


def test_zero_updates_share_nothing():
    rng = np.random.default_rng(4)
    found = runs([3.0], 3, rng)
    zeros = [
        decompose(u, vectors=True)
        for u in (Dense(np.zeros((128, 96))), Factored(np.zeros((128, 3)), np.ones((3, 96))))
    ]
    for zero in zeros:
        assert counts([zero, *found]) == [0, 0]
        assert counts([found[0], zero, zero]) == [0, 0]
        assert all(map(math.isnan, level(found[0], [zero], "left")))
        assert counts([*found, zero]) == [1, 1]
        assert level(found[0], [found[1], zero], "left")[2] == 0


def test_what_rounding_makes_of_missing_directions_is_not_shared():
    # QR completes B's two columns in the same way in both runs.
    rng = np.random.default_rng(5)
    found = []
    for _ in range(2):
        B = np.zeros((60, 6))
        B[:2, :2] = rng.standard_normal((2, 2))
        found.append(decompose(Factored(B, rng.standard_normal((6, 50))), vectors=True))
    assert counts(found) == [2, 0]


def test_a_space_of_one_dimension_tells_nothing():
    found = [
        decompose(Dense(np.random.default_rng(i).standard_normal((1, 9))), True) for i in (0, 1)
    ]
    assert measure("replicated_rank", found[0], seeds=found[1:]) == 0


def test_more_directions_than_measures_look_at_change_nothing():
    rng = np.random.default_rng(6)
    found = runs([2.0] * 3, 2, rng, (150, 140))
    cut = [
        Spectrum(s.values, s.shape, s.U[:, :DIRECTIONS], s.Vh[:DIRECTIONS], bound=s.bound)
        for s in found
    ]
    assert found[0].U.shape[1] > DIRECTIONS
    assert counts(found) == counts(cut) == [3, 3]


@pytest.mark.parametrize(
    ("seeds", "side", "said"),
    [([], "left", "another seed"), (None, "left", "shape"), (1, "top", "allowed: left, right")],
)
def test_a_wrong_call_is_one_line(seeds, side, said):
    found = runs([2.0], 2, np.random.default_rng(7))
    others = runs([2.0], 1, np.random.default_rng(7), (20, 20)) if seeds is None else found[1:]
    with pytest.raises(WrongInput, match=said) as caught:
        measure("replicated_rank", found[0], side=side, seeds=[] if seeds == [] else others)
    assert "\n" not in str(caught.value)


# ---- of a results folder -----------------------------------------------------------------------

LINES = (
    ["adapter=lora", "adapter.r=8", "seed=0,1,2"],
    ["adapter=full", "seed=0,1", "host.keep=top", "host.keep_k=16"],
    ["adapter=lora", "adapter.r=2"],
    ["adapter=head", "seed=0,1"],
)
WORDS = (
    *(word for word in SMALL if not word.startswith("size")),
    *("train.epochs=2", "data.train_examples=512", "train.spectra=0", "train.evaluations=0"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three seeds at r = 8 and two of full fine-tuning; one run at r = 2; two without updates."""
    results = tmp_path_factory.mktemp("seeds") / "results"
    for line in LINES:
        planned, host = plan([line], [*WORDS, f"host.results={results}"])
        for one in planned:
            assert run_here(one, host) == "done"
    return results


def about(results):
    return load(results).runs.set_index("run_id")[["adapter", "adapter.r", "seed", "steps"]]


def test_runs_that_differ_in_the_seed_alone_are_a_group(finished):
    known = about(finished)
    groups = [known.loc[ids] for ids in seed_groups(Store(finished))]
    kinds = sorted((g["adapter"].iloc[0], len(g), g["seed"].nunique()) for g in groups)
    assert kinds == [("full", 2, 2), ("head", 2, 2), ("lora", 3, 3)]
    assert all(g[["adapter", "adapter.r"]].drop_duplicates().shape[0] == 1 for g in groups)


def test_each_run_of_a_group_has_a_row_for_each_layer_and_side(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    found = replication(finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    assert list(found.columns) == list(schema.MEASURES)
    assert {n: str(t) for n, t in found.dtypes.items() if schema.MEASURES[n][0] != "string"} == {
        n: kind for n, (kind, _) in schema.MEASURES.items() if kind != "string"
    }
    known = about(finished)
    groups = found.groupby("run_id")
    assert len(groups) == 5
    for run_id, own in groups:
        assert (own["measure"] == "replicated_rank").all()
        assert sorted(own["side"]) == ["left"] * 6 + ["right"] * 6
        assert own["layer"].nunique() == 6
        assert (own["step"] == known.loc[run_id, "steps"]).all()
    # The teacher of every layer has four directions, and every seed has to learn them.
    lora = found[found["run_id"].isin(known.index[known["adapter"] == "lora"])]
    assert (lora["value"] == 4).mean() > 0.9
    assert (lora["null_high"] == 0).all()
    full = found[found["run_id"].isin(known.index[known["adapter"] == "full"])]
    assert full["value"].between(4, 16).all()


def test_a_row_is_the_measure_of_the_kept_updates(finished):
    known = about(finished)
    ids = known.index[(known["adapter"] == "lora") & (known["adapter.r"] == 8)]
    store = Store(finished)
    spectra = []
    for run_id in ids:
        run = store.run(run_id)
        tensors = run.read_tensors("adapter_model")
        B, A = (tensors[f"base_model.model.up.lora_{x}.weight"] for x in "BA")
        spectra.append(decompose(Factored(B, A), vectors=True))
    [left, right] = rows("up", spectra[1], ["replicated_rank"], seeds=[spectra[0], spectra[2]])
    found = replication(store).set_index(["run_id", "layer", "side"])
    for row in (left, right):
        got = found.loc[(ids[1], "up", row["side"])]
        for name in ("value", "null", "null_low", "null_high"):
            assert got[name] == row[name]


def test_a_corrupt_run_is_left_out_with_a_warning_and_a_lone_one_has_no_rows(finished, tmp_path):
    results = shutil.copytree(finished, tmp_path / "results")
    known = about(results)
    [first, second] = known.index[known["adapter"] == "full"]
    path = results / "runs" / first / "update.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="not compared with other seeds"):
        found = replication(results)
    assert not set(found["run_id"]) & {first, second}
    assert len(set(found["run_id"])) == 3


def test_a_folder_without_two_seeds_has_an_empty_table(finished, tmp_path):
    known = about(finished)
    [lone] = known.index[known["adapter.r"] == 2]
    results = tmp_path / "results"
    shutil.copytree(finished / "runs" / lone, results / "runs" / lone)
    found = replication(results)
    assert isinstance(found, pd.DataFrame)
    assert found.empty
    assert list(found.columns) == list(schema.MEASURES)
    config = json.loads((results / "runs" / lone / "config.json").read_text())
    assert config["run_id"] == lone


def test_kept_rows_are_those_of_replication_and_are_made_anew_for_another_seed(finished, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished, results)
    store = Store(results)
    expected = replication(store).set_index(["run_id", "layer", "side"])["value"]
    assert sorted(set(replicate_missing(store))) == sorted(set(expected.index.get_level_values(0)))
    assert replicate_missing(store) == []

    def kept():
        found = load(results).measures
        found = found[found["measure"] == "replicated_rank"]
        return found.set_index(["run_id", "layer", "side"])["value"]

    pd.testing.assert_series_equal(
        kept().sort_index(), expected.sort_index(), check_index_type=False
    )
    planned, host = plan([[*LINES[0][:2], "seed=3"]], [*WORDS, f"host.results={results}"])
    assert run_here(planned[0], host) == "done"
    assert len(replicate_missing(store)) == 4
    assert not kept().index.duplicated().any()
    assert len(kept()) == len(expected) + 12
