"""What does fine-tuning do to a weight, and how much rank does it need?

The public surface; everything is loaded at its first use, and nothing here imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lab.checkpoints import read_updates
    from lora_lab.composition import compose
    from lora_lab.linalg import Dense, Factored, Spectrum, decompose
    from lora_lab.measures import measure
    from lora_lab.outside import analyze
    from lora_lab.store import load

_HOMES = {
    "Dense": "lora_lab.linalg",
    "Factored": "lora_lab.linalg",
    "Spectrum": "lora_lab.linalg",
    "analyze": "lora_lab.outside",
    "compose": "lora_lab.composition",
    "decompose": "lora_lab.linalg",
    "load": "lora_lab.store",
    "measure": "lora_lab.measures",
    "measures": "lora_lab.measures",
    "read_updates": "lora_lab.checkpoints",
}

__all__ = [
    "Dense",
    "Factored",
    "Spectrum",
    "analyze",
    "compose",
    "decompose",
    "load",
    "measure",
    "measures",
    "read_updates",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_lab' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    # The package of measures is itself what `lab.measures()` calls.
    return home if name == "measures" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
