"""Updates cut to their leading directions, as balanced factors on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.checkpoints import Job
from lora_lab.checkpoints.peft import CONFIG, WEIGHTS
from lora_lab.checkpoints.write import encoded, write_tensors
from lora_lab.convert.folder import over_layers
from lora_lab.linalg import Dense, Factored, Spectrum, Update, decompose
from lora_lab.linalg.factored import ROUNDOFF, Array, frobenius
from lora_lab.linalg.randomized import FEW, LARGE, leading
from lora_lab.linalg.rounding import rounded
from lora_lab.linalg.spectrum import in_range
from lora_lab.measures import share_rank
from lora_lab.registry import WrongInput, unknown
from lora_lab.store.files import write_bytes
from lora_lab.tasks import Result, Tell
from lora_lab.tensorfile import StoredTensor

TENSORS = 4.0
"""Tensors of a layer's size in float64 that a worker holds at most: dW and its decomposition."""

ROUNDING = 1e-6
"""What rounding may add to a share of the energy, many times over."""

ROWS = 256
"""Rows of dW that are compared with the factors' product at once."""


@dataclass(frozen=True)
class Size:
    """How many directions of each update are kept; exactly one is given.

    Attributes
    ----------
    r : int, optional
        The same number for all layers, at least 1.
    energy : float, optional
        In (0, 1]: as many as hold this share of ||dW||_F^2 in each layer (`energy_rank`).
    ranks : mapping of str to int, optional
        By layer; other layers are left out.

    Raises
    ------
    WrongInput
        For none or several of them, or a number out of its range.
    """

    r: int | None = None
    energy: float | None = None
    ranks: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        given = [self.r, self.energy, self.ranks]
        if sum(one is not None for one in given) != 1:
            raise WrongInput("give exactly one of r, energy and ranks.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise WrongInput(f"energy must be in (0, 1]; got {self.energy}.")
        for layer, r in (self.ranks or {"": 1 if self.r is None else self.r}).items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                of = f" for layer {layer!r}" if layer else ""
                raise WrongInput(f"r must be a whole number of at least 1{of}; got {r!r}.")

    def of(self, layer: str) -> int | None:
        """r of a layer; None where its spectrum decides."""
        return self.r if self.ranks is None else self.ranks[layer]


@dataclass(frozen=True)
class Cut:
    """One layer to cut, and where its factors go.

    Attributes
    ----------
    job : Job
    r : int or None
        Directions to keep; None: as many as `energy` asks for.
    energy : float or None
    dtype : str
        Of the stored factors.
    part : Path
        A file for A (r, n), then B (m, r).
    turned : bool
        PEFT's dW of this module is the state dict's transposed.
    """

    job: Job
    r: int | None
    energy: float | None
    dtype: str
    part: Path
    turned: bool = False

    def stored(self, row: Result) -> tuple[StoredTensor, StoredTensor]:
        """A and B in `part`, from the row that `cut` gave."""
        r, (m, n) = row["r"], self.job.shape[:: -1 if self.turned else 1]
        A = StoredTensor(self.part, self.dtype, (r, n), 0)
        return A, StoredTensor(self.part, self.dtype, (m, r), A.size * A.width)


def cut_all(cuts: Sequence[Cut], tell: Tell) -> list[Result]:
    """The row of each layer, see `cut`; the same for any number of workers."""
    for one in cuts:
        if one.dtype not in ROUNDOFF:
            raise unknown("dtype", one.dtype, ROUNDOFF)
    jobs = [one.job for one in cuts]
    return over_layers(cut, [(one,) for one in cuts], jobs, TENSORS, tell)


def finish(
    folder: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    cuts: Iterable[Cut],
) -> None:
    """Write the two files of an adapter from what `cut_all` left, which then goes."""
    write_tensors(folder / WEIGHTS, tensors)
    write_bytes(folder / CONFIG, json.dumps(content, indent=2).encode())
    for one in cuts:
        one.part.unlink(missing_ok=True)


def cut(one: Cut) -> Result:
    """Write the balanced factors of one layer's best approximation, and say how good it is.

    B = U sqrt(S) and A = sqrt(S) Vh of the leading directions, so that the scale is 1.

    Returns
    -------
    dict
        layer, m, n; `r`; `energy`: the share of ||dW||_F^2 in the r directions; `error`:
        ||dW - B A||_F / ||dW||_F with A and B as stored; `spectral`: sigma_{r+1} / sigma_1, the
        relative spectral error before A and B were rounded; `rounding`: what their rounding
        changed, ||.||_F / ||dW||_F. A layer with dW = 0 has r = 0, NaN for the rest and no file.

    References
    ----------
    Eckart & Young 1936; Mirsky 1960.
    """
    layer, _, update = one.job.load()
    m, n = one.job.shape
    s, r = _spectrum(update, one, layer)
    assert s.U is not None
    assert s.Vh is not None
    names = ("energy", "error", "spectral", "rounding")
    if s.zero:
        return {"layer": layer, "m": m, "n": n, "r": 0} | dict.fromkeys(names, math.nan)
    r = min(r, len(s.values))  # factors may have fewer directions
    root = np.sqrt(s.values[:r])
    B, A = s.U[:, :r] * root, root[:, None] * s.Vh[:r]
    stored_B, stored_A = rounded(B, one.dtype), rounded(A, one.dtype)
    if not (np.isfinite(stored_B).all() and np.isfinite(stored_A).all()):
        raise WrongInput(f"layer {layer!r}: factors are too large for {one.dtype}. Give float32.")
    size = update.norm()
    numbers = (
        (frobenius(s.values[:r]) / size) ** 2,
        _distance(update, stored_B, stored_A) / size,
        float(s.values[r] / s.values[0]) if r < len(s.values) else 0.0,
        _distance(Factored(B, A), stored_B, stored_A) / size,
    )
    if one.turned:
        B, A = A.T, B.T
    one.part.write_bytes(encoded(A, one.dtype) + encoded(B, one.dtype))
    # Rounding may carry a share of all the energy a bit beyond 1.
    share = min(numbers[0], 1.0)
    kept = dict(zip(names, (share, *numbers[1:]), strict=True))
    return {"layer": layer, "m": m, "n": n, "r": r} | kept


def _spectrum(update: Update, one: Cut, layer: str) -> tuple[Spectrum, int]:
    """The r directions to keep, the next value if there is one, and r."""
    if one.r is not None:
        return leading(update, one.r + 1, layer=layer), one.r
    assert one.energy is not None
    if k := _enough(update, one.energy, layer):
        s = leading(update, k + 1, layer=layer)
        rest = 1 - np.cumsum((s.values / update.norm()) ** 2)
        return s, 1 + int(np.argmax(rest <= 1 - one.energy))
    r = share_rank(decompose(update, layer=layer).relative ** 2, one.energy)
    return leading(update, r + 1, layer=layer), r


def _enough(update: Update, energy: float, layer: str) -> int:
    """A number of directions that certainly hold the energy and are cheap to find; 0 if unknown.

    No k directions hold more than the k leading ones: if random ones that were drawn towards
    them hold enough, so do they. Few are sought: more of them may lie in noise, where none can
    be told from the next.
    """
    k = min(update.shape) // FEW - 1
    if isinstance(update, Factored) or min(update.shape) < LARGE:
        return 0
    dW, unit = in_range(update.dW, layer)
    if not unit:
        return 0
    Z = np.random.default_rng(0).standard_normal((dW.shape[1], k))
    Q = np.linalg.qr(dW @ (dW.T @ (dW @ Z)))[0]
    held = np.linalg.svd(Q.T @ dW, compute_uv=False) / frobenius(dW)
    enough = np.cumsum(held**2) > energy + ROUNDING
    return 1 + int(np.argmax(enough)) if enough[-1] else 0


def _distance(update: Update, B: Array, A: Array) -> float:
    """||dW - B A||_F, of factors without forming their product."""
    if isinstance(update, Dense):
        parts = (
            frobenius(update.dW[i : i + ROWS] - B[i : i + ROWS] @ A)
            for i in range(0, len(update.dW), ROWS)
        )
        return math.hypot(*parts)
    both = np.hstack([update.scale * update.B, -B]), np.vstack([update.A, A])
    return Factored(*both).norm()
