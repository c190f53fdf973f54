"""LAPACK routines that let go of Python's lock, so that threads decompose layers side by side.

SciPy's own wrappers of them hold it, and it has none of dbdsqr. The routines are SciPy's, with
their limits of threads: each works in the thread that calls it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from scipy import LowLevelCallable
from scipy.linalg import cython_lapack

from lora_lab.linalg.factored import Array


def _routine(name: str, arguments: int) -> Any:
    """A routine of SciPy's LAPACK as a C function of pointers; calls release the lock."""
    found = LowLevelCallable.from_cython(cython_lapack, name)
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    kind = ctypes.CFUNCTYPE(None, *(ctypes.c_void_p,) * arguments)
    return kind(address(found.function, found.signature.encode()))


_dsytrd, _dsterf, _dbdsqr = _routine("dsytrd", 10), _routine("dsterf", 4), _routine("dbdsqr", 15)
_Two, _Three, _WORD = ctypes.c_int * 2, ctypes.c_int * 3, ctypes.sizeof(ctypes.c_int)


def _address(array: Array) -> int:
    """Where the entries lie, one row after the other: an error if they do not."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def tridiagonal(G: Array, block: int) -> tuple[Array, Array, Array]:
    """Diagonal (q,), subdiagonal and factors of the reflectors (q - 1,) of a symmetric G, dsytrd.

    G (q, q), whose rows lie one after the other, is overwritten: G transposed then holds the
    reflectors below its subdiagonal. `block` columns are turned at once.

    Examples
    --------
    >>> d, e, _ = tridiagonal(np.array([[2.0, 3.0, 4.0], [3.0, 1.0, 0.0], [4.0, 0.0, 1.0]]), 8)
    >>> d.round(12).tolist(), float(abs(e[0]).round(12))
    ([2.0, 1.0, 1.0], 5.0)
    """
    q = len(G)
    assert G.shape == (q, q)
    space, numbers = np.empty((3 + block) * q), _Three(q, block * q, 0)
    d, n = _address(space), ctypes.addressof(numbers)
    e, tau, work = d + 8 * q, d + 16 * q, d + 24 * q
    # LAPACK reads columns: the transpose of a symmetric matrix is the same without a copy.
    _dsytrd(b"L", n, _address(G), n, d, e, tau, work, n + _WORD, n + 2 * _WORD)
    assert numbers[2] == 0
    return space[:q], space[q : 2 * q - 1], space[2 * q : 3 * q - 1]


def eigenvalues(d: Array, e: Array) -> Array | None:
    """All eigenvalues, ascending, of a symmetric tridiagonal matrix by dsterf.

    None where QL does not converge.

    >>> eigenvalues(np.array([1.0, 1.0]), np.array([2.0])).round(12).tolist()
    [-1.0, 3.0]
    """
    q = len(d)
    both, numbers = np.concatenate((d, e)), _Two(q, 0)
    values, n = _address(both), ctypes.addressof(numbers)
    _dsterf(n, values, values + 8 * q, n + _WORD)
    return None if numbers[1] else both[:q]


def bidiagonal_values(d: Array, e: Array) -> Array:
    """All singular values, descending, of an upper bidiagonal matrix by dqds.

    Each is right to rounding relative to itself.

    References
    ----------
    Fernando & Parlett 1994, Accurate singular values and differential qd algorithms.

    Examples
    --------
    >>> bidiagonal_values(np.array([3.0, 0.0]), np.array([4.0])).round(12).tolist()
    [5.0, 0.0]
    """
    q = len(d)
    space, numbers = np.concatenate((d, e, np.empty(4 * q + 1))), _Three(q, 0, 0)
    values, n = _address(space), ctypes.addressof(numbers)
    none, info, one = n + _WORD, n + 2 * _WORD, ctypes.byref(ctypes.c_int(1))
    beside, work = values + 8 * q, values + 16 * q
    vectors = (None, one) * 3
    _dbdsqr(b"U", n, none, none, none, values, beside, *vectors, work, info)
    if numbers[2]:
        raise np.linalg.LinAlgError("dbdsqr did not converge")
    return space[:q]
