"""A trained network under other updates than its own, on its own test examples.

For claims that truncate, prune or compose what runs have learned: nothing is trained again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lora_lab.adapters.head import Head
from lora_lab.claims import Found
from lora_lab.composition import Changes, Composition
from lora_lab.config import Host
from lora_lab.evaluation import evaluate
from lora_lab.execution import reopened
from lora_lab.hydra_bridge import config_of
from lora_lab.linalg import Update


class Swapped:
    """The base network and the head of a finished run, with whatever updates.

    Parameters
    ----------
    found : Found
        Of a claim with `WEIGHTS`.
    run_id : str
        The run whose base, head and test examples are used.
    """

    def __init__(self, found: Found, run_id: str) -> None:
        # The head alone: the layers stay plain, and updates are hooked to them.
        config = replace(config_of(found.store, run_id), adapter=Head())
        setup = reopened(found.store, run_id, config, Host(device="cpu"))
        self.model, self.test = setup.model, setup.splits["test"]

    def score(self, *updates: Mapping[str, Update], weight: float = 1.0) -> float:
        """Test score with W0 + weight·ΣdW; the base network's without updates."""
        named = {str(i): Changes(one) for i, one in enumerate(updates)}
        composed = Composition(self.model.base, named)
        try:
            composed.use(dict.fromkeys(named, weight))
            return evaluate(self.model, self.test).score
        finally:
            composed.remove()
