"""Joint data: several embedded data sets of texts as one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_lab.data import SPLITS, Problem, normalised
from lora_lab.data.imdb import Imdb
from lora_lab.data.joint import Joint
from lora_lab.data.rotten_tomatoes import MovieReviews, RottenTomatoes
from lora_lab.registry import WrongInput


@pytest.fixture(scope="module")
def parts() -> dict[str, Problem]:
    return {"rotten_tomatoes": RottenTomatoes().load(), "imdb": Imdb().load()}


@pytest.fixture(scope="module")
def joint() -> Problem:
    return Joint().load()


def test_joint_splits_are_those_of_the_parts_with_their_labels(
    parts: dict[str, Problem], joint: Problem
) -> None:
    assert joint.classes == ("negative", "positive")
    for split in SPLITS:
        truth = {
            text: label
            for part in parts.values()
            for text, label in zip(part.inputs[split], part.targets[split], strict=True)
        }
        assert dict(zip(joint.inputs[split], joint.targets[split], strict=True)) == truth
        assert joint.targets[split].dtype == np.int64


def test_parts_take_turns_and_any_prefix_holds_them_equally(
    parts: dict[str, Problem], joint: Problem
) -> None:
    few = Joint(train_examples=7, test_examples=4, validation_examples=1).load()
    first, second = (parts[name].inputs["train"] for name in ("rotten_tomatoes", "imdb"))
    assert few.inputs["train"] == [
        *(text for pair in zip(first[:3], second[:3], strict=True) for text in pair),
        first[3],
    ]
    for split in SPLITS:
        assert few.inputs[split] == joint.inputs[split][: len(few.inputs[split])]
    # Where the shorter part ends, the longer goes on in its own order.
    assert joint.inputs["train"][2 * len(first) :] == second[len(first) :]


def test_the_seed_of_the_data_is_that_of_every_part() -> None:
    taken = Joint(seed=3, train_examples=2).load().inputs["train"]
    assert taken == [c(seed=3).load().inputs["train"][0] for c in (RottenTomatoes, Imdb)]


def test_one_part_alone_is_the_part(parts: dict[str, Problem]) -> None:
    alone = Joint(parts="imdb", train_examples=100).load()
    assert alone.inputs["train"] == parts["imdb"].inputs["train"][:100]


def test_a_text_of_two_parts_stays_in_the_split_that_is_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(self: MovieReviews) -> Problem:
        shared = {"rotten_tomatoes": "train", "imdb": "test"}[self.reviews]
        inputs = {s: [f"{self.reviews} {s}", *["A  both"][s != shared :]] for s in SPLITS}
        targets = {s: np.ones(len(inputs[s]), np.int64) for s in SPLITS}
        return Problem("text", inputs, targets, ("negative", "positive"), "")

    monkeypatch.setattr(MovieReviews, "load", load)
    problem = Joint().load()
    assert [normalised(t) for t in problem.inputs["train"]] == [
        "rotten_tomatoes train",
        "imdb train",
    ]
    assert "A  both" in problem.inputs["test"]
    assert problem.dropped["duplicate"] == 1


@pytest.mark.parametrize(
    "given", ["", "rotten_tomatoes+imbd", "imdb+imdb", "planted", "joint", "hf"]
)
def test_what_cannot_be_joined_is_refused_with_the_names_that_can(given: str) -> None:
    with pytest.raises(WrongInput, match=r"data\.parts must be .*imdb, rotten_tomatoes.*; got"):
        Joint(parts=given).check()


@pytest.mark.parametrize(("split", "most"), [("train", 27434), ("test", 4000)])
def test_more_examples_than_all_parts_have_are_refused(split: str, most: int) -> None:
    fields: dict[str, Any] = {f"{split}_examples": most + 1}
    with pytest.raises(WrongInput, match=rf"{split}_examples must be at most {most}"):
        Joint(**fields).check()
    Joint(**{f"{split}_examples": most}).check()
