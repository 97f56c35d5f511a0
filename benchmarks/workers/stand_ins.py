"""What lets published code that was written for CUDA, with packages that are not here, be imported and run on a CPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch


def stand_in(name: str, **attributes: Any) -> ModuleType:
    """A module of that name, for whatever imports it from now on."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


def use(device: torch.device) -> None:
    """On a CPU `.cuda()` leaves a tensor or a module where it is; on a GPU there is TF32, as published scripts have
    it.
    """
    if device.type == "cpu":
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **rest: self
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.cuda.set_device(device)
