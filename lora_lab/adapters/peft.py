"""Methods of the PEFT library, trained by PEFT's own layers: DoRA, AdaLoRA, VeRA, LoHa, OFT …

PEFT adapts copies of the target layers, each an nn.Linear without bias (also of a Conv1D), which
are then put into the network one by one. The update is what PEFT's own merge adds to the weight, in
float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from lora_lab import injection
from lora_lab.adapters import ADAPTERS, Adapted, Method, Place, Shapes
from lora_lab.injection import NAME
from lora_lab.registry import WrongInput
from lora_lab.targets import select


class PeftLayer(Adapted):
    """One of PEFT's layers.

    Parameters
    ----------
    place : Place
    tuner : nn.Module
        PEFT's layer, around a copy of the base layer whose weight is a buffer.
    whole : list of one nn.Module
        The model that PEFT made of all layers (in a list, so that it is no part of this module).
    """

    def __init__(self, place: Place, tuner: Any, whole: list[Any]) -> None:
        super().__init__(place)
        self.tuner, self.whole = tuner, whole
        base = tuner.get_base_layer()
        weight = base.weight.detach()
        del base.weight
        base.register_buffer("weight", weight, persistent=False)
        for module in tuner.modules():
            if module is not base:
                # Only the base computes in the compute dtype; what PEFT froze stays as it is.
                module.computes = ()
        for name, parameter in tuner.named_parameters():
            if "ranknum" in name:  # AdaLoRA's constant, which PEFT lets train in float64
                parameter.requires_grad_(False)
        # Factors count only where W0 is as it was and nothing else happens, as it does for DoRA.
        plain = not getattr(tuner, "lora_variant", True) and torch.equal(weight, self.W0)
        self.factored = plain and NAME in getattr(tuner, "lora_A", {})
        if "lora_E" in dict(tuner.named_children()):
            for part in _PARTS:
                for kind in _KINDS:
                    memory = torch.zeros_like(getattr(tuner, part)[NAME], requires_grad=False)
                    self.register_buffer(f"{kind}_{part}", memory)
            self.register_buffer("kept", torch.ones_like(tuner.lora_E[NAME], dtype=torch.bool))

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.tuner(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _merged_by_peft(self) -> torch.Tensor:
        """The weight after PEFT's merge, in float64; the layer stays as it is."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = copy.deepcopy(self.tuner).double()
            with torch.no_grad():
                whole.merge()
        weight: torch.Tensor = whole.get_base_layer().weight
        return weight.detach()

    def tensors(self) -> dict[str, torch.Tensor]:
        if not self.factored:
            return {"dW": self._merged_by_peft() - self.W0.double()}
        A, B = (_weight(getattr(self.tuner, part)[NAME]).detach() for part in ("lora_A", "lora_B"))
        scale = torch.as_tensor(self.tuner.scaling[NAME], dtype=torch.float64)
        if hasattr(self, "kept"):
            # AdaLoRA: B diag(E) A alpha / (r + 1e-5).
            A = self.tuner.lora_E[NAME].detach() * A
            scale = scale / (self.tuner.ranknum[NAME].double().cpu().squeeze() + 1e-5)
        return {"A": A, "B": B, "scale": scale}

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.factored or hasattr(self, "kept"):
            return None
        return _weight(self.tuner.lora_A[NAME]), _weight(self.tuner.lora_B[NAME])


def _weight(factor: Any) -> torch.Tensor:
    """A factor that is a parameter (AdaLoRA) or a linear map (LoRA)."""
    weight: torch.Tensor = factor if isinstance(factor, torch.Tensor) else factor.weight
    return weight


@ADAPTERS.register
@dataclass(frozen=True)
class Peft(Method):
    """Any method of the installed PEFT for linear layers, at PEFT's defaults where nothing is said.

    A method may start away from the base, as C3A and FourierFT do by default. Every method acts on
    the weight alone: (IA)³, GLoRA and RoAd, which PEFT lets change the bias too, leave it as it is.

    Attributes
    ----------
    config : dict
        `peft_type` and further keys of that type's PEFT config, such as
        ``{peft_type:LORA,r:8,use_dora:true}`` or ``{peft_type:ADALORA,init_r:12,target_r:4}``.
    targets : str
        As of `AdapterConfig`.
    """

    config: dict[str, Any] = field(default_factory=lambda: {"peft_type": "LORA"})
    targets: str = "all"

    rate: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        # In one order of the keys, so that the run's id does not depend on how they were typed.
        object.__setattr__(self, "config", injection.checked(self.config))

    def layers(self, shapes: Shapes) -> list[str]:
        chosen = self._chosen(shapes)
        # Refuses what PEFT would refuse when the run begins.
        injection.parameters(self.config, chosen)
        return list(chosen)

    def adapt(self, place: Place) -> Adapted:
        return self.adapt_all([place])[place.layer]

    def adapt_all(self, places: Iterable[Place]) -> dict[str, Adapted]:
        places = list(places)
        whole = injection.injected(
            self.config,
            {p.layer: p.W0.clone() for p in places},
            {p.layer: p.generator.initial_seed() for p in places},
        )
        return {p.layer: PeftLayer(p, whole.model.get_submodule(p.layer), [whole]) for p in places}

    def parameters(self, shapes: Shapes) -> int:
        """By making PEFT's layers without data, because each type counts in its own way."""
        return injection.parameters(self.config, self._chosen(shapes))

    def flops(self, shapes: Shapes) -> int:
        """Of matrix products, counted; what is done once for all tokens of a batch is left out."""
        return injection.flops(self.config, self._chosen(shapes))

    def _chosen(self, shapes: Shapes) -> dict[str, tuple[int, int]]:
        return {layer: shapes[layer] for layer in select(self.targets, shapes)}

    def before_step(self, adapted: Mapping[str, Adapted], step: int, steps: int) -> None:
        whole = _whole(adapted)
        if not hasattr(whole, "rankallocator"):
            return
        config = whole.peft_config[NAME]
        if config.tinit >= steps - config.tfinal:
            raise WrongInput(
                f"AdaLoRA needs tinit + tfinal below the run's {steps} steps; got {config.tinit} + "
                f"{config.tfinal}. Lower them in adapter.config, or train longer."
            )
        if config.orth_reg_weight:
            _pull_to_orthogonal(whole.model, config.orth_reg_weight)

    def after_step(
        self, adapted: Mapping[str, Adapted], step: int, steps: int, optimizer: Any
    ) -> None:
        whole = _whole(adapted)
        if not hasattr(whole, "rankallocator"):
            return
        whole.rankallocator.set_total_step(steps)
        _remind(whole, adapted)
        whole.update_and_allocate(step)
        _remember(whole, adapted)


# ---- AdaLoRA -----------------------------------------------------------------------------------

_PARTS = ("lora_A", "lora_B", "lora_E")
_KINDS = ("exp_avg_ipt", "exp_avg_unc")
"""What AdaLoRA's allocator remembers of each part from step to step: sensitivity, uncertainty."""


def _whole(adapted: Mapping[str, Adapted]) -> Any:
    first = next(iter(adapted.values()))
    assert isinstance(first, PeftLayer)
    return first.whole[0]


def _pull_to_orthogonal(model: nn.Module, weight: float) -> None:
    """Add the gradient of AdaLoRA's regulariser, weight · mean of ‖P Pᵀ - I‖_F over A and Bᵀ."""
    norms = []
    for name, p in model.named_parameters():
        if p.requires_grad and ("lora_A" in name or "lora_B" in name):
            square = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.linalg.norm(square - torch.eye(len(square)).to(square)))
    with torch.enable_grad():
        (weight * torch.stack(norms).mean()).backward()


def _remind(whole: Any, adapted: Mapping[str, Adapted]) -> None:
    """Give the allocator what the layers' buffers hold, which a checkpoint may have filled."""
    allocator = whole.rankallocator
    for kind in _KINDS:
        memory = getattr(allocator, kind)
        for layer, module in adapted.items():
            for part in _PARTS:
                name = f"{layer}.{part}.{NAME}"
                memory[name] = getattr(module, f"{kind}_{part}")
                allocator.ipt.setdefault(name, memory[name])
    whole.peft_config[NAME].rank_pattern = {
        f"{layer}.lora_E.{NAME}": module.kept.view(-1).tolist() for layer, module in adapted.items()
    }


def _remember(whole: Any, adapted: Mapping[str, Adapted]) -> None:
    """Keep in the layers' buffers what the allocator has learnt in this step."""
    allocator, pattern = whole.rankallocator, whole.peft_config[NAME].rank_pattern
    for layer, module in adapted.items():
        for part in _PARTS:
            for kind in _KINDS:
                found = getattr(allocator, kind).get(f"{layer}.{part}.{NAME}")
                if found is not None:
                    getattr(module, f"{kind}_{part}").copy_(found)
        kept = torch.tensor(pattern[f"{layer}.lora_E.{NAME}"])
        module.kept.copy_(kept.view_as(module.kept))
