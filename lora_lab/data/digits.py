"""Handwritten digits of scikit-learn, 8 by 8 pixels: cheap real images, and tasks near and far.

One half of the classes is there to pre-train on, the other to fine-tune on (a near transfer). A
task is the same images with their pixels in another fixed order: as hard to tell apart, but far
from all that was seen before, and from every other task.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import ClassVar

import numpy as np

from lora_lab.config import need
from lora_lab.data import DATA, SPLITS, DataSet, Examples, Problem, distinct, splits
from lora_lab.registry import WrongInput

PIXELS = 64
"""Of an image, row by row."""

SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
FILE = "sklearn/datasets/data/digits.csv.gz"

TEST_SHARE, VALIDATION_SHARE = 1 / 3, 0.1
"""Of the images. There are few: accuracy would be coarse on fewer than a third."""

MOST_TASKS = 100


class Half(Enum):
    """Which digits: 0 to 4, 5 to 9, or all ten."""

    lower = "lower"
    upper = "upper"
    all = "all"


DIGITS = {Half.lower: range(5), Half.upper: range(5, 10), Half.all: range(10)}


@DATA.register
@dataclass(frozen=True)
class DigitsData(DataSet):
    """1,797 images of 64 pixels in [0, 1]; of the upper half 508 train, 89 validation, 299 test.

    Images are split, not examples: an image is in the same split in every task, and whichever
    digits are chosen.

    Attributes
    ----------
    classes : Half
        Which digits. The lower half is what `model=digits_vit` is pre-trained on.
    task : int
        Number of the first task, in [0, 100): the order of the pixels. 0 is the order in which
        they were scanned; the others are permutations drawn once and for all.
    tasks : int
        How many tasks, counted on from `task`, are learned together. Labels are the digits in
        each; an example of every task stands for every image, one after the other, so that
        `<split>_examples` counts images times tasks.

    >>> problem = DigitsData(train_examples=6).load()
    >>> problem.classes, problem.targets["train"].tolist()
    (('5', '6', '7', '8', '9'), [1, 3, 4, 0, 2, 1])
    >>> problem.inputs["train"].shape, len(problem.inputs["test"])
    ((6, 64), 299)
    """

    classes: Half = Half.upper
    task: int = 0
    tasks: int = 1

    kind: ClassVar[str] = "image"
    sizes_are_limits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        need(0 <= self.task < MOST_TASKS, "data.task", f"in [0, {MOST_TASKS})", self.task)
        most = MOST_TASKS - self.task
        allowed = f"in [1, {most}] ({MOST_TASKS} - data.task)"
        need(1 <= self.tasks <= most, "data.tasks", allowed, self.tasks)

    def check(self) -> None:
        _read()

    def load(self) -> Problem:
        images, digits = _read()
        examples = distinct([image.hex() for image in images], digits)
        sizes = round(TEST_SHARE * len(images)), round(VALIDATION_SHARE * len(images))
        cut = splits(examples, self.seed, *sizes)
        inputs, targets = {}, {}
        digest = hashlib.sha256()
        for split in SPLITS:
            asked = getattr(self, f"{split}_examples")
            rows = cut[split][np.isin(examples.labels[cut[split]], DIGITS[self.classes])]
            inputs[split], targets[split] = self._of_tasks(examples, rows, asked)
            digest.update(inputs[split].astype("<f4").tobytes())
            digest.update(targets[split].astype("<i8").tobytes())
        return Problem(
            kind=self.kind,
            inputs=inputs,
            targets=targets,
            classes=tuple(map(str, DIGITS[self.classes])),
            fingerprint=digest.hexdigest(),
            source="the digits of scikit-learn",
        )

    def _of_tasks(
        self, examples: Examples, rows: np.ndarray, asked: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first examples of a split: pixels (examples, 64), and indices of the classes."""
        plain = np.array([list(bytes.fromhex(examples.texts[i])) for i in rows], np.float32) / 16
        orders = [pixel_order(self.task + t) for t in range(self.tasks)]
        inputs = np.stack([plain[:, order] for order in orders], axis=1).reshape(-1, PIXELS)
        labels = np.repeat(examples.labels[rows] - DIGITS[self.classes][0], self.tasks)
        return inputs[:asked], labels[:asked]


def pixel_order(task: int) -> np.ndarray:
    """Which pixel of the scan stands at each place of a task's images, int64 (64,).

    It depends on the task's number alone, so that a task is the same with every `data.seed`.

    >>> pixel_order(0)[:4].tolist(), sorted(pixel_order(3)) == list(range(64))
    ([0, 1, 2, 3], True)
    """
    if task == 0:
        return np.arange(PIXELS)
    return np.random.default_rng(task).permutation(PIXELS)


@lru_cache(maxsize=1)
def _read() -> tuple[list[bytes], list[int]]:
    """All images, a byte in [0, 16] for each pixel, and their digits.

    The file is read without scikit-learn, whose import takes seconds of every process.
    """
    again = "run: pip install --force-reinstall scikit-learn"
    try:
        packed = distribution("scikit-learn").locate_file(FILE).read_bytes()  # type: ignore[attr-defined]
    except (PackageNotFoundError, OSError):
        raise WrongInput(f"the digits of scikit-learn cannot be read; {again}") from None
    if hashlib.sha256(packed).hexdigest() != SHA256:
        raise WrongInput(f"checksum differs for {FILE}; {again}")
    table = np.array(
        [row.split(",") for row in gzip.decompress(packed).decode().split()], np.float64
    ).astype(np.uint8)
    return [row.tobytes() for row in table[:, :PIXELS]], table[:, PIXELS].tolist()
