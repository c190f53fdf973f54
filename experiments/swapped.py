"""A trained network under other updates than its own, on its own test examples.

For claims that truncate, prune or compose what runs have learned: nothing is trained again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_lab.claims import Found
from lora_lab.composition import Changes, Composition
from lora_lab.config import Host, flat
from lora_lab.evaluation import evaluate
from lora_lab.execution import linked
from lora_lab.hydra_bridge import build, typed
from lora_lab.linalg import Update
from lora_lab.preparation import prepare


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
        run = found.store.run(run_id)
        values = flat(run.read_json("config")["config"])
        # The head alone: the layers stay plain, and updates are hooked to them.
        kept = {name: value for name, value in values.items() if not name.startswith("adapter.")}
        config = typed(build(kept | {"adapter": "head"})[0])[0]
        host = Host(device="cpu")
        setup = prepare(config, host, found.store.cache, **linked(config, found.store))
        self.model, self.test = setup.model, setup.splits["test"]
        parameters = dict(self.model.named_parameters())
        for name, array in run.read_tensors("head").items():
            parameters[name].data.copy_(torch.from_numpy(array))

    def score(self, *updates: Mapping[str, Update], weight: float = 1.0) -> float:
        """Test score with W0 + weight·ΣdW; the base network's without updates."""
        named = {str(i): Changes(one) for i, one in enumerate(updates)}
        composed = Composition(self.model.base, named)
        try:
            composed.use(dict.fromkeys(named, weight))
            return evaluate(self.model, self.test).score
        finally:
            composed.remove()
