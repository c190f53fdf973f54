"""Directions that training finds again with another seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.special import betaincc

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.measures import Level, define
from lora_lab.measures.principal_angle import DRAWS, SEED, random_product
from lora_lab.measures.subspace_overlap import SIDES, directions
from lora_lab.registry import WrongInput

ERROR = 0.01
"""Probability, at most, that anything is counted where seeds share nothing: so small that every
count above 0 lies beyond the null's 95 % quantile, and k shared directions are k in 95 %."""


def level(s: Spectrum, seeds: Sequence[Spectrum], side: str = "left") -> Level:
    """The count of `DRAWS` random frames of the same sizes: mean and central 95 %."""
    mine, *theirs = (directions(one, side).shape[1] for one in (s, *seeds))
    if not (mine and any(theirs)):
        return math.nan, math.nan, math.nan
    return _level(s.shape[SIDES.index(side)], mine, tuple(sorted(theirs)))


@define(kind="rank", needs=("vectors", "seeds"), sides=SIDES, null=level, at="later")
def replicated_rank(s: Spectrum, seeds: Sequence[Spectrum], side: str = "left") -> int:
    """How many of the leading singular vectors lie in the leading subspaces of other seeds.

    For each of the at most 64 leading directions u_i and for j = 1, 2, 4, ... >= i, the overlap
    ||U_seed[:, :j]^T u_i||^2, averaged over the other seeds, is compared with random subspaces:
    there the overlap with one seed is Beta(j/2, (d - j)/2), and the average of several is taken
    as the Beta of its mean and variance. Counted are the directions above that null at a total
    error of 1 % (Bonferroni over i and j): where seeds share nothing, anything is counted in at
    most 1 % of cases, and so is a further direction beside the shared ones. What a counted
    direction met in the seeds' subspaces is taken out of them before the next, so that one shared
    direction, smeared over several of this run, counts once.

    Marginal, direction by direction: phi(k, k) stays above random long after the last shared
    direction. A subspace of j >= i directions holds u_i also where near-degenerate singular
    values turn or reorder the vectors. A direction that only some of the seeds share counts if
    their average is above random. Shared is also what all seeds were given: the same training
    examples with their noise, the same start.

    0, 1, ..., 64; 0 at dW = 0, where all seeds are zero, and in a one-dimensional space.
    Directions whose singular value is within its error bound of 0 do not exist. Unchanged by the
    size of any update and by rotations of all together; transposition swaps the sides.

    Parameters
    ----------
    s : Spectrum
        With vectors.
    seeds : sequence of Spectrum
        The same layer of the other runs, which differ in nothing but the seed; at least one.
    side : str
        `left` (output) or `right` (input).

    Raises
    ------
    WrongInput
        If there is no other seed, the shapes differ, or the side is unknown.

    References
    ----------
    Muirhead 1982, Aspects of multivariate statistical theory, 1.5 (a random direction's share in
    a subspace is Beta).

    Examples
    --------
    >>> from lora_lab.linalg import Dense, decompose
    >>> rng = np.random.default_rng(0)
    >>> shared = np.zeros((60, 50))
    >>> shared[:3, :3] = np.diag([90.0, 80.0, 70.0])
    >>> runs = [decompose(Dense(shared + rng.standard_normal((60, 50))), True) for _ in range(3)]
    >>> replicated_rank(runs[0], runs[1:]), replicated_rank(runs[0], runs[1:], "right")
    (3, 3)
    """
    if not seeds:
        raise WrongInput("replicated_rank needs at least one run with another seed; got none.")
    for other in seeds:
        if other.shape != s.shape:
            raise WrongInput(f"seeds must have the update's shape {s.shape}; got {other.shape}.")
    ours = directions(s, side)
    return shared_directions([ours.T @ directions(other, side) for other in seeds], len(ours))


def shared_directions(products: Sequence[Array], d: int) -> int:
    """The count of `replicated_rank` from U^T U_seed (i, j_seed) of every seed, in d dimensions."""
    count, last = products[0].shape[0], max(M.shape[1] for M in products)
    if not (count and last):
        return 0
    grid = {*(2**e for e in range(last.bit_length())), last}
    parts = {j: [M[:, :j].copy() for M in products] for j in sorted(grid)}
    found, p = 0, _p_values(parts, d)
    for i in range(count):
        if p[i] > ERROR / count:
            continue
        found += 1
        for M in (M for own in parts.values() for M in own):
            row = M[i].copy()
            M -= np.outer(M @ row, row / (row @ row or 1.0))
        p = _p_values(parts, d)
    return found


def _p_values(parts: dict[int, list[Array]], d: int) -> Array:
    """For each direction the chance of its overlap if it is random; Bonferroni over j."""
    count, last = parts[1][0].shape[0], max(parts)
    index, p, tries = 1 + np.arange(count), np.ones(count), np.zeros(count)
    for j, own in parts.items():
        # The largest subspace serves those directions too that have no larger one.
        held = (index <= j) | (j == last)
        overlap = np.mean([np.sum(M[held] ** 2, axis=1) for M in own], axis=0)
        p[held] = np.minimum(p[held], _tail(overlap, np.array([M.shape[1] for M in own]), d))
        tries += held
    return p * tries


def _tail(overlap: Array, widths: Array, d: int) -> Array:
    """P(mean overlap of a direction with random subspaces of these dimensions >= overlap)."""
    share = widths / d
    mean = share.mean()
    variance = np.sum(share * (1 - share)) / (len(widths) ** 2 * (d / 2 + 1))
    if variance == 0:  # every subspace is empty or the whole space
        return np.ones_like(overlap)
    total = mean * (1 - mean) / variance - 1
    return np.asarray(betaincc(mean * total, (1 - mean) * total, np.minimum(overlap, 1.0)))


@lru_cache(maxsize=1000)
def _level(d: int, mine: int, theirs: tuple[int, ...]) -> Level:
    rng = np.random.default_rng([SEED, d, mine, *theirs])
    counts = [
        shared_directions([random_product(d, mine, j, rng) for j in theirs], d)
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(counts, [0.025, 0.975], method="inverted_cdf")
    return float(np.mean(counts)), float(low), float(high)
