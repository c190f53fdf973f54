"""IMDB: 24,904 distinct film reviews of some 230 words, embedded: no network is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora_lab.data import DATA
from lora_lab.data.rotten_tomatoes import MovieReviews


@DATA.register
@dataclass(frozen=True)
class Imdb(MovieReviews):
    """Reviews of IMDB: 21,904 train, 1,000 validation, 2,000 test; two classes.

    The file holds 25,000 reviews; 96 repeat another one.
    """

    reviews: ClassVar[str] = "imdb"
    sizes: ClassVar[dict[str, int]] = {"train": 21904, "validation": 1000, "test": 2000}
