"""How the factors start. One file an init: `init(out, in, r, generator) -> (A, B)`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_lab.registry import Registry

Init = Callable[[int, int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]

INITS: Registry[Init] = Registry(__name__, "adapter.init")
