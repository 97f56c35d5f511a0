"""A GPU's habits on any machine: models run on tensors that say they are on CUDA and hold no numbers.

torch's FakeTensorMode follows shapes and devices alone. What lies on the host stays real and is computed, so that host
data may steer the run as it does on a GPU. Three kinds of defect show, each with its line:

- tensors of two devices in one operation: torch raises, as CUDA would;
- a read of a device value by the host (`item`, `bool(tensor)`, `tolist`), which makes the host wait for the device;
- a copy between host and device, which costs a launch and often a wait.

Once a call, reads and copies are harmless; in a loop over tokens or steps they cost more than the arithmetic. `looped`
tells them apart by running the loop twice, short and long. Backward passes cannot run: autograd asks for a real device.
"""

from __future__ import annotations

import functools
import linecache
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(ROOT / folder for folder in ("imgtok", "generators", "train", "sample"))
CUDA = torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """Computes what is on the host, and counts reads and copies by the line of the suite that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = torch.device(kwargs.get("device") or "cpu").type
        if target == "cpu" and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal"):
            self.reads[line("read")] += args[0].device.type == "cuda"
            return invented(args[0]) if name == "_local_scalar_dense" else True
        devices = {tensor.device.type for tensor in tensors}
        if name == "_to_copy" and kwargs.get("device") is not None:
            devices.add(target)
        elif name in ("index", "index_put", "index_put_"):  # indices on the host are allowed, and copied
            devices = {args[0].device.type} | {i.device.type for i in args[1] if i is not None and i.dim()}
        elif name not in ("copy_", "_to_copy"):
            devices = set()
        if len(devices) > 1:
            self.copies[line("copy")] += 1
        result = func(*args, **kwargs)
        if name == "all":
            result.holds = True
        return result


def invented(tensor: Tensor) -> bool | int | float:
    """What a read of an unknown number answers: that `all` is true, and any other statement false."""
    return hasattr(tensor, "holds") if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


def line(what: str, frames: Iterable[tuple[FrameType, int]] | None = None) -> str:
    """The innermost line of the suite that is at work, or is among `frames`, or else of who called it.

    Frames come from the innermost outwards. Thousands are looked at, so no text is read but that of the answer.
    """
    others = []
    for frame, number in traceback.walk_stack(sys._getframe(1)) if frames is None else frames:
        name = frame.f_code.co_filename
        place = ours(name)
        if place is not None:
            return f"{what} at {place}:{number} in {frame.f_code.co_name}: {linecache.getline(name, number).strip()}"
        if name != __file__ and "site-packages" not in name:
            others.append((frame, number))
    frame, number = others[0]
    name = frame.f_code.co_filename
    return f"{what} at {name}:{number} in {frame.f_code.co_name}: {linecache.getline(name, number).strip()}"


@functools.cache
def ours(name: str) -> Path | None:
    """Where a file of the suite lies in it; none for a file of others."""
    path = Path(name).resolve()
    return path.relative_to(ROOT) if any(folder in path.parents for folder in OURS) else None


def move(model: nn.Module) -> nn.Module:
    """`model.to("cuda")`, inside the mode: as on a GPU, what is no parameter or buffer stays on the host."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(CUDA)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def run(make: Callable[[], nn.Module], work: Callable[[Any], object]) -> Watch:
    """Make a model, move it to the fake device, and do `work` with it; what was counted in the work.

    Raises what torch raises, such as RuntimeError for tensors of two devices, with the line as a note.
    """
    model = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with Watch():
            moved = move(model)
        with Watch() as watch:
            try:
                work(moved)
            except RuntimeError as error:
                error.add_note(line("raised", reversed(list(traceback.walk_tb(error.__traceback__)))))
                raise
    return watch


def looped(
    make: Callable[[], nn.Module], short: Callable[[Any], object], long: Callable[[Any], object]
) -> dict[str, tuple[int, int]]:
    """Reads and copies that `long` does more often than `short`: line -> the two counts."""
    few, many = run(make, short), run(make, long)
    before, after = few.reads + few.copies, many.reads + many.copies
    return {place: (before[place], count) for place, count in after.items() if count > before[place]}
