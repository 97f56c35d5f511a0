"""Where two copies of a model part: what each of its parts gives on the same inputs, in two kinds of arithmetic.

A stage, such as encoding, runs in both copies, and the calls of their modules are written down. Then each module that a
stage calls gets the inputs that it had in the first copy, in both, so that the error of one part does not count as that
of the next. How much of an error the precision explains is measured and not assumed: it is what the part of the first
copy gives when its weights and inputs are moved by a few roundings, at random.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

CALLS = 2
"""Calls of a module that are looked at in a stage: the first ones."""
ROUNDINGS = 4.0
"""By how many times the largest rounding error of a number weights and inputs are moved."""
DRAWS = 3
"""How often they are; the largest error counts."""
IN_DOUBT = 8
"""How often weights and inputs are moved where drawn tokens seem to differ, since one that differs changes all after
it."""


@dataclass(frozen=True)
class Error:
    """How far what one copy gives is from what the other does."""

    largest: float
    """The largest difference of two numbers; of ids, 1 where any differ."""
    relative: float
    """The length of the difference over that of the first copy's result; of ids, the share of them that differ. inf
    where only the second copy gives numbers that are not finite, and where shapes differ."""
    of_ids: bool = False
    """Whether it is a share of ids."""

    def worse(self, other: Error) -> Error:
        """The larger of both figures."""
        return Error(max(self.largest, other.largest), max(self.relative, other.relative), self.of_ids and other.of_ids)

    def beyond(self, explained: Error) -> bool:
        """Whether it is more than is explained."""
        return self.largest > explained.largest or self.relative > explained.relative


@dataclass(frozen=True)
class Call:
    """One call of a module: what it was given and what it gave, cloned."""

    name: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Row:
    """What is found of one part in one stage."""

    stage: str
    part: str
    """Dotted name of its modules; "" for the stage as a whole."""
    error: Error
    explained: Error
    failed: str = ""
    """What the device said, where it cannot compute the part."""
    place: str = ""
    """Of a part whose error is beyond what is explained: the module inside in which it begins."""

    @property
    def parts(self) -> bool:
        """Whether the copies part here."""
        return bool(self.failed) or self.error.beyond(self.explained)


@dataclass(frozen=True)
class Stage:
    """Something that both copies of a model are asked to do."""

    name: str
    run: Callable[[Any], Any]
    """Called with a copy of the model, to whose device it brings the inputs."""
    draws: int = DRAWS
    """How often the weights are moved, to see what the precision explains of the whole."""
    whole: bool = False
    """Whether only the whole is compared, of what is drawn step by step: where modules keep what they have seen in a
    cache, a call cannot be made again. Of ids, those after the first that differs in a row count as different."""


class Comparison:
    """A model on the CPU in float32 and its copy elsewhere, or in another precision."""

    def __init__(
        self,
        reference: nn.Module,
        copy: nn.Module,
        arithmetic: Callable[[], contextlib.AbstractContextManager[Any]],
        unit: float,
    ) -> None:
        """`arithmetic` gives the context in which the copy computes; `unit` is the largest relative error of rounding a
        number there.
        """
        self.reference, self.copy, self.arithmetic, self.unit = reference, copy, arithmetic, unit

    @torch.no_grad()
    def rows(self, stage: Stage) -> Iterator[Row]:
        """The parts of a stage in the order of their first calls, then the stage as a whole."""
        ours, theirs, failed, given = Recorder(self.reference), Recorder(self.copy), "", None
        with ours if not stage.whole else contextlib.nullcontext():
            expected = stage.run(self.reference)
        try:
            with theirs if not stage.whole else contextlib.nullcontext(), self.arithmetic():
                given = stage.run(self.copy)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            failed = first_line(error)
        named = {(call.name, number): call for number, call in numbered(theirs.calls)}
        found: dict[str, Row] = {}
        for number, call in numbered(ours.calls):
            row = self.row(stage.name, call, named.get((call.name, number)))
            found[row.part] = worse(found[row.part], row) if row.part in found else row
        yield from found.values()
        nothing = Error(0.0, 0.0)
        if failed:
            yield Row(stage.name, "", nothing, nothing, failed)
            return

        def again(_: object) -> Any:
            return stage.run(self.reference)

        off = error_of(expected, given, in_order=stage.whole)
        explained = self.explained(self.reference, again, expected, range(stage.draws), in_order=stage.whole)
        for seed in range(stage.draws, IN_DOUBT if stage.whole else 0):
            if off.beyond(explained):
                one_more = range(seed, seed + 1)
                explained = explained.worse(self.explained(self.reference, again, expected, one_more, in_order=True))
        yield Row(stage.name, "", off, explained)

    def row(self, stage: str, call: Call, other: Call | None) -> Row:
        """What one call of a module gives in both copies. `other` is that call in the copy, if it was made."""
        part = re.sub(r"\.\d+(\..*)?$", "", call.name)
        error, explained, failed = self.compared(call, other)
        row = Row(stage, part, error, explained, failed)
        return replace(row, place=self.begins(call, other)) if row.parts else row

    def compared(self, call: Call, other: Call | None) -> tuple[Error, Error, str]:
        """The error of a module on the inputs of `call`, what is explained of it, and why it could not be computed."""
        here, there = (copy.get_submodule(call.name) for copy in (self.reference, self.copy))
        arguments, named = self.given(call, other)
        nothing = Error(0.0, 0.0)
        try:
            with self.arithmetic():
                given = there(*arguments, **named)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return nothing, nothing, first_line(error)

        def again(draw: Callable[[Any], Any]) -> Any:
            return here(*draw(moved(call.arguments)), **draw(moved(call.named)))

        return error_of(call.result, given), self.explained(here, again, call.result), ""

    def given(self, call: Call, other: Call | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of a call for the copy: on its device, in the types that it had there or, where it did not make
        the call, in those of its weights if they are not the first copy's.
        """
        device = next((tensor.device for tensor in tensors(self.copy)), torch.device("cpu"))
        values = (call.arguments, call.named)
        if other is not None:
            as_there: tuple[tuple[Any, ...], dict[str, Any]] = moved(values, device, (other.arguments, other.named))
            return as_there
        here, there = (tensors(copy.get_submodule(call.name)) for copy in (self.reference, self.copy))
        types = [part[0].dtype for part in (here, there) if part]
        other_type = types[-1] if len(set(types)) > 1 else None

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(other_type) if other_type and tensor.dtype.is_floating_point else tensor

        given: tuple[tuple[Any, ...], dict[str, Any]] = each_tensor(moved(values, device), cast)
        return given

    def explained(
        self,
        module: nn.Module,
        run: Callable[[Callable[[Any], Any]], Any],
        expected: Any,
        seeds: Iterable[int] = range(DRAWS),
        *,
        in_order: bool = False,
    ) -> Error:
        """The largest error of a module of the first copy whose weights and inputs are moved by a few roundings, once
        for each seed. `run` is given a function that moves inputs; `in_order` is that of `error_of`.
        """
        size = ROUNDINGS * self.unit
        found = floor_of(expected, size)
        for seed in seeds:
            moves = Moves(size, seed)
            with moves.of_weights(module):
                given = run(moves.of)
            found = found.worse(error_of(expected, given, in_order=in_order))
        return found

    def begins(self, call: Call, other: Call | None) -> str:
        """The first module inside, or this one, that gives something else beyond what is explained."""
        here, there = (copy.get_submodule(call.name) for copy in (self.reference, self.copy))
        with Recorder(here, call.name, inner=True) as ours:
            arguments, named = moved((call.arguments, call.named))
            here(*arguments, **named)
        theirs = Recorder(there, call.name, inner=True)
        arguments, named = self.given(call, other)
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError), theirs, self.arithmetic():
            there(*arguments, **named)
        made = {(one.name, number): one for number, one in numbered(theirs.calls)}
        for number, one in numbered(ours.calls):  # in the order in which they end: the innermost first
            error, explained, failed = self.compared(one, made.get((one.name, number)))
            if failed or error.beyond(explained):
                return one.name
        return call.name


class Recorder:
    """Within the block the calls of a model's modules are written down: those that no other module of it makes, or with
    `inner` all of them, in the order in which they end; of each module the first `CALLS`.
    """

    def __init__(self, model: nn.Module, prefix: str = "", *, inner: bool = False) -> None:
        self.model, self.prefix, self.inner = model, prefix, inner
        self.calls: list[Call] = []
        self._given: list[tuple[Any, Any]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        for name, module in self.model.named_modules():
            if name or self.inner:
                full = ".".join(part for part in (self.prefix, name) if part)
                self._hooks += [
                    module.register_forward_pre_hook(self._begins, with_kwargs=True),
                    module.register_forward_hook(self._ended(full), with_kwargs=True),
                ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begins(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep = self.inner or not self._given
        self._given.append((moved(arguments), moved(named)) if keep else ((), {}))

    def _ended(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: Any, named: Any, result: Any) -> None:
            arguments, named = self._given.pop()
            kept = self.inner or not self._given
            if kept and sum(call.name == name for call in self.calls) < CALLS:
                self.calls.append(Call(name, arguments, named, moved(result)))

        return hook


# ---------------------------------------------------------------- errors


def error_of(expected: Any, given: Any, *, in_order: bool = False) -> Error:
    """The worst error among the tensors of two results of the same form. With `in_order` ids (B, K, ...) were drawn one
    after the other, each given those before it: those after the first that differs in their row count as different.
    """
    pairs = list(zip(list(tensors_in(expected)), list(tensors_in(given)), strict=True))
    found = [_error(one, other, in_order) for one, other in pairs if one.numel() or other.numel()]
    if not found:
        return Error(0.0, 0.0)
    worst = found[0]
    for error in found[1:]:
        worst = worst.worse(error)
    return replace(worst, of_ids=all(error.of_ids for error in found))


def _error(expected: Tensor, given: Tensor, in_order: bool) -> Error:
    if not expected.dtype.is_floating_point:
        if expected.shape != given.shape:
            return Error(1.0, 1.0, of_ids=True)
        different = expected != given.cpu()
        if in_order and different.ndim > 1:
            different = different.long().cumsum(1) > 0
        share = float(different.double().mean())
        return Error(float(share > 0), share, of_ids=True)
    if expected.shape != given.shape:
        return Error(float("inf"), float("inf"))
    one, other = expected.double(), given.detach().cpu().double()
    finite = one.isfinite()
    if not bool(other[finite].isfinite().all()):
        return Error(float("inf"), float("inf"))
    difference = (other - one)[finite]
    if not difference.numel():
        return Error(0.0, 0.0)
    length = float(one[finite].norm())
    largest, error = float(difference.abs().max()), float(difference.norm())
    return Error(largest, error / length if length else (float("inf") if error else 0.0))


def floor_of(expected: Any, size: float) -> Error:
    """The error of a result that is itself rounded a few times; of ids that of two of them."""
    tensors = list(tensors_in(expected))
    numbers = [tensor[tensor.isfinite()].abs() for tensor in tensors if tensor.dtype.is_floating_point]
    largest = max((float(tensor.max()) for tensor in numbers if tensor.numel()), default=0.0)
    if numbers:
        return Error(size * largest, size)
    return Error(1.0, 2 / max([2, *(tensor.numel() for tensor in tensors)]), of_ids=True)


def worse(one: Row, other: Row) -> Row:
    """Of two calls of a part the one to show: the first that parts, or the one with the larger error."""
    if one.parts or other.parts:
        return one if one.parts else other
    return one if one.error.relative >= other.error.relative else other


def numbered(calls: Sequence[Call]) -> Iterator[tuple[int, Call]]:
    """Calls with how often their module was called before."""
    seen: dict[str, int] = {}
    for call in calls:
        seen[call.name] = seen.get(call.name, -1) + 1
        yield seen[call.name], call


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------- tensors in anything


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value with each tensor of its tuples, lists, mappings and dataclasses changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each_tensor(one, change) for one in value))
    if isinstance(value, tuple | list):
        return type(value)(each_tensor(one, change) for one in value)
    if isinstance(value, dict):
        return {name: each_tensor(one, change) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        made = {item.name: getattr(value, item.name) for item in fields(value) if item.init}
        changed = {name: each_tensor(one, change) for name, one in made.items()}
        different = {name: one for name, one in changed.items() if one is not made[name]}
        return replace(value, **different) if different else value
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in their order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each_tensor(value, keep)
    yield from found


def moved(value: Any, device: torch.device | None = None, like: Any = None) -> Any:
    """A clone of a value, on a device. `like` is the same value as another copy of the model had it: floating-point
    tensors get the types that they have there, and what is no tensor, such as a function, is taken from there.
    """
    like = value if like is None else like
    if isinstance(value, Tensor):
        kinds = [tensor.dtype for tensor in (value, like) if isinstance(tensor, Tensor)]
        kind = kinds[-1] if all(one.is_floating_point for one in kinds) else value.dtype
        return value.detach().clone().to(device=device or value.device, dtype=kind)
    if type(value) is not type(like):
        like = value
    if isinstance(value, tuple | list) and len(value) == len(like):
        made = [moved(one, device, other) for one, other in zip(value, like, strict=True)]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {name: moved(one, device, like.get(name)) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        named = [item.name for item in fields(value) if item.init]
        parts = {name: moved(getattr(value, name), device, getattr(like, name)) for name in named}
        changed = {name: part for name, part in parts.items() if part is not getattr(value, name)}
        return replace(value, **changed) if changed else value
    return like


def tensors(module: nn.Module) -> list[Tensor]:
    """The floating-point parameters and buffers of a module."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.dtype.is_floating_point]


class Moves:
    """Each number moved by at most `size` of itself, at random."""

    def __init__(self, size: float, seed: int) -> None:
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)

    def _moved(self, tensor: Tensor) -> Tensor:
        if not tensor.dtype.is_floating_point:
            return tensor
        return tensor * (1 + self.size * (2 * torch.rand(tensor.shape, generator=self.generator) - 1)).to(tensor.dtype)

    def of(self, values: Any) -> Any:
        """Values whose tensors are moved."""
        return each_tensor(values, self._moved)

    @contextlib.contextmanager
    def of_weights(self, module: nn.Module) -> Iterator[None]:
        """Within the block the weights of a module are moved."""
        kept = [(tensor, tensor.clone()) for tensor in tensors(module)]
        try:
            for tensor, before in kept:
                tensor.copy_(self._moved(before))
            yield
        finally:
            for tensor, before in kept:
                tensor.copy_(before)
