"""Several adapters on one base network: any of them, weighted sums, or one for each row.

The network stays as it is; hooks add to what its modules give. All of them read one selection, so
that a switch costs the same for every network and copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from lora_lab.composition.sites import Rows, Site
from lora_lab.composition.sources import Changes, Source, read
from lora_lab.linalg import Dense, Factored, Update
from lora_lab.linalg.factored import coarser
from lora_lab.registry import WrongInput, unknown

__all__ = ["Changes", "Composition", "compose"]


def compose(network: nn.Module, adapters: Mapping[str, Source]) -> Composition:
    """Put adapters on a base network, none of them in use yet.

    Parameters
    ----------
    network : nn.Module
        The pretrained network with plain layers, of transformers or of the lab (`model.base`).
    adapters : mapping of str to source
        By a name of your choice: the folder of a PEFT adapter; a finished run (`store.run(id)`, or
        its folder); or updates by layer, dW as (out, in).

    Returns
    -------
    Composition

    Raises
    ------
    WrongInput
        For a source that cannot be read whole, or changes what the network does not have.

    Warns
    -----
    UserWarning
        For tensors that an adapter saved whole and the network lacks, such as another head.
    """
    return Composition(network, {name: read(network, source) for name, source in adapters.items()})


class Composition:
    """Adapters on one network; the selection holds for every forward pass until the next.

    Parameters
    ----------
    network : nn.Module
        Gets hooks; its parameters and their names stay as they are.
    adapters : mapping of str to Changes

    Examples
    --------
    >>> import torch
    >>> network = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> _ = nn.init.eye_(network[0].weight)
    >>> changes = Changes({"0": Factored([[1.0], [0.0]], [[0.0, 1.0]])})
    >>> composed = Composition(network, {"mine": changes})
    >>> composed.use({"mine": 3.0})
    >>> network(torch.tensor([[1.0, 2.0]])).tolist()
    [[7.0, 2.0]]
    >>> composed.use()
    >>> network(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0]]
    """

    def __init__(self, network: nn.Module, adapters: Mapping[str, Changes]) -> None:
        self.network, self.adapters = network, dict(adapters)
        self.sites: dict[str, Site] = {}
        for name, changes in self.adapters.items():
            for layer, update in changes.updates.items():
                self._site(name, layer).add_update(name, update)
            for parameter, difference in changes.others.items():
                module, _, leaf = parameter.rpartition(".")
                self._site(name, module).add_difference(name, leaf, difference)
        self.weights: dict[str, float] = {}
        self.rows: Rows | None = None
        self._originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._hooks = [
            site.module.register_forward_hook(partial(self._hook, site))
            for site in self.sites.values()
        ]

    def _site(self, name: str, layer: str) -> Site:
        if layer not in self.sites:
            try:
                module = self.network.get_submodule(layer)
            except AttributeError:
                raise WrongInput(
                    f"adapter {name!r} changes {layer!r}, which the network does not have. Give "
                    "the base network that it was made from."
                ) from None
            self.sites[layer] = Site(layer, module)
        return self.sites[layer]

    def _hook(self, site: Site, _: nn.Module, given: tuple[Any, ...], y: Any) -> Any:
        if self._originals:
            return y
        if self.rows is not None:
            return site.routed(given[0], y, self.rows)
        return site.summed(given[0], y, self.weights)

    def use(self, chosen: str | Mapping[str, float] | None = None) -> None:
        """Select one adapter, a weighted sum, or none; a merged selection is taken out first.

        A sum is Σ c·dW, and Σ c·difference for tensors that adapters saved whole.

        Raises
        ------
        WrongInput
            For a name that is none of the adapters, or a weight that is not finite.
        """
        named = {chosen: 1.0} if isinstance(chosen, str) else dict(chosen or {})
        for name, weight in named.items():
            self._known(name)
            if not np.isfinite(weight):
                raise WrongInput(f"the weight of {name!r} must be a finite number; got {weight}.")
        self.unmerge()
        self.weights, self.rows = named, None

    def route(self, names: Sequence[str | None]) -> None:
        """Give each row of the next batches its own adapter, or None.

        The result of each row is that of a run with its adapter alone. The batch is the first
        dimension of what every changed layer sees.
        """
        for name in names:
            if name is not None:
                self._known(name)
        self.unmerge()
        self.weights, self.rows = {}, Rows(tuple(names))

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise unknown("adapter", name, self.adapters)

    def updates(self) -> dict[str, Update]:
        """The selected sum by layer, exactly: ``[c1 s1 B1, …] [A1; …]``, dense if one of them is.

        Raises
        ------
        WrongInput
            While rows have adapters of their own.
        """
        self._need_sum("updates")
        found: dict[str, list[tuple[float, Update]]] = {}
        for name, weight in self.weights.items():
            for layer, update in self.adapters[name].updates.items():
                found.setdefault(layer, []).append((weight, update))
        return {layer: combined(parts) for layer, parts in found.items()}

    def _need_sum(self, what: str) -> None:
        if self.rows is not None:
            raise WrongInput(f"{what} needs one selection for all rows; call use(...) first.")

    def merge(self) -> None:
        """Add the selected sum to the weights, in float64; merging twice adds once.

        Tied weights change only where an adapter changes them.

        Raises
        ------
        WrongInput
            While rows have adapters of their own.
        """
        self._need_sum("merge")
        if self._originals:
            return
        for site in self.sites.values():
            for leaf, new in site.merged(self.weights).items():
                old = getattr(site.module, leaf)
                self._originals.append((site.module, leaf, old))
                setattr(site.module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))

    def unmerge(self) -> None:
        """Put the very parameters back that were there before `merge`."""
        for module, leaf, old in reversed(self._originals):
            setattr(module, leaf, old)
        self._originals = []

    def remove(self) -> None:
        """Leave the network as it was before."""
        self.use()
        for hook in self._hooks:
            hook.remove()


def combined(parts: Sequence[tuple[float, Update]]) -> Update:
    """Σ c·dW of one layer, exactly.

    >>> one, two = Factored([[1.0]], [[2.0]], scale=3.0), Factored([[5.0]], [[1.0]])
    >>> both = combined([(1.0, one), (0.5, two)])
    >>> both.r, both.dense().tolist()
    (2, [[8.5]])
    """
    made_in = coarser(*(update.made_in for _, update in parts))
    thin = [(weight, update) for weight, update in parts if isinstance(update, Factored)]
    if len(thin) < len(parts):
        dW: np.ndarray = sum(weight * update.dense() for weight, update in parts)  # type: ignore[assignment]
        return Dense(dW, made_in)
    B = np.hstack([weight * update.scale * update.B for weight, update in thin])
    return Factored(B, np.vstack([update.A for _, update in thin]), 1.0, made_in)
