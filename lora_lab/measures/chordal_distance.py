"""Distance of the projections on the leading directions of two updates of one layer."""

from __future__ import annotations

from functools import partial

from lora_lab.linalg import Spectrum
from lora_lab.measures import define
from lora_lab.measures.principal_angle import between, random_level
from lora_lab.measures.subspace_overlap import SIDES, grid

chance = partial(random_level, kind="chordal")


@define(kind="ratio", needs=("vectors", "pair"), grid=grid, sides=SIDES, null=chance, at="later")
def chordal_distance(s: Spectrum, pair: Spectrum, k: float = 1, side: str = "left") -> float:
    """sqrt(sum sin^2 theta_i) over the principal angles of two updates' k leading vectors.

    ||P - P'||_F / sqrt(2) of the two projections, and sqrt(k (1 - phi(k, k))) of
    `subspace_overlap`. In [0, sqrt(k)], 0 for equal subspaces. NaN at dW = 0, of either. Symmetric
    in the two updates; unchanged by their sizes and by rotations of both together; transposition
    swaps the sides.

    Parameters
    ----------
    s, pair, k, side
        As in `subspace_overlap`.

    Raises
    ------
    WrongInput, Refused
        As in `subspace_overlap`.

    References
    ----------
    Edelman, Arias & Smith 1998, The geometry of algorithms with orthogonality constraints, 4.3.

    Examples
    --------
    >>> from lora_lab.linalg import Dense, decompose
    >>> one = decompose(Dense([[1.0, 0.0]]), vectors=True)
    >>> other = decompose(Dense([[1.0, 1.0]]), vectors=True)
    >>> round(chordal_distance(one, other, 1, "right") ** 2, 9)
    0.5
    """
    return between(s, pair, k, side, "chordal")
