"""Length of the shortest way between the leading directions of two updates of one layer."""

from __future__ import annotations

from functools import partial

from lora_lab.linalg import Spectrum
from lora_lab.measures import define
from lora_lab.measures.principal_angle import between, random_level
from lora_lab.measures.subspace_overlap import SIDES, grid

chance = partial(random_level, kind="geodesic")


@define(kind="ratio", needs=("vectors", "pair"), grid=grid, sides=SIDES, null=chance, at="later")
def geodesic_distance(s: Spectrum, pair: Spectrum, k: float = 1, side: str = "left") -> float:
    """sqrt(sum theta_i^2) over the principal angles of two updates' k leading singular vectors.

    The length of the shortest path from one subspace to the other, in radians: in
    [0, sqrt(k) pi/2], 0 for equal subspaces. NaN at dW = 0, of either. Symmetric in the two
    updates; unchanged by their sizes and by rotations of both together; transposition swaps the
    sides.

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
    >>> import math
    >>> from lora_lab.linalg import Dense, decompose
    >>> one = decompose(Dense([[1.0, 0.0]]), vectors=True)
    >>> other = decompose(Dense([[1.0, 1.0]]), vectors=True)
    >>> round(geodesic_distance(one, other, 1, "right") / math.pi, 9)
    0.25
    """
    return between(s, pair, k, side, "geodesic")
