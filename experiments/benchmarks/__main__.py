"""`python -m experiments.benchmarks NAME`: run one benchmark, print its table."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

NAMES = sorted(
    m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_")
)

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m experiments.benchmarks {{{','.join(NAMES)}}}")
    importlib.import_module(f"experiments.benchmarks.{sys.argv[1]}").main()
