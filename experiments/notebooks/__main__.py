"""`python -m experiments.notebooks [NAME …]`: run notebooks in place, all if none is named."""

from __future__ import annotations

import sys

import nbformat

from experiments.notebooks import NOTEBOOKS, executed

if __name__ == "__main__":
    known = {path.stem: path for path in NOTEBOOKS}
    names = sys.argv[1:] or list(known)
    if not known.keys() >= set(names):
        sys.exit(f"usage: python -m experiments.notebooks [{' | '.join(known)}]")
    for name in names:
        nbformat.write(executed(nbformat.read(known[name], as_version=4)), known[name])
