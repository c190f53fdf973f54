"""Batches of nearly equal length: the order of training as a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHUNK = 50
"""Batches that are sorted by length together: long enough to pad little, short enough to mix."""


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffled, length-bucketed batches of one epoch.

    Parameters
    ----------
    lengths : ndarray of int, (examples,)
        Length of each example.
    batch_size : int
        Examples per batch; the rest of the last chunk makes a smaller one.
    seed, epoch : int
        They alone decide the order.

    Returns
    -------
    list of list of int
        Every example exactly once.

    >>> sorted(i for b in epoch_batches(np.array([3, 1, 2, 5, 4]), 2, 0, 0) for i in b)
    [0, 1, 2, 3, 4]
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), CHUNK * batch_size):
        chunk = order[start : start + CHUNK * batch_size]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size].tolist() for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def by_length(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches for evaluation, longest first (so that memory is asked for once)."""
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]


class TrainingBatches:
    """A batch sampler over all epochs of a run, so that a resumed run can start in the middle.

    Parameters
    ----------
    total : int
        Batches to give in all.
    skip : int
        Batches that an earlier part of the run has used.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, seed: int, total: int, skip: int = 0
    ) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.total, self.skip = total, skip

    def __len__(self) -> int:
        return self.total - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = -(-len(self.lengths) // self.batch_size)
        batches: list[list[int]] = []
        for index in range(self.skip, self.total):
            if not batches or index % per_epoch == 0:
                batches = epoch_batches(
                    self.lengths, self.batch_size, self.seed, index // per_epoch
                )
            yield batches[index % per_epoch]
