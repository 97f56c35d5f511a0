"""Files of weights: every one is read and written here, and none can run code.

`Weights` opens a file (safetensors, whole or in shards with an index, or one of `torch.save`) as a mapping from names
to tensors. Opening reads names, shapes and kinds of numbers alone; a tensor is read when it is asked for, into memory
of its own. `skeleton` makes a model without memory for its parameters, `check_tensors` says whether a file fits it, and
`fill` gives it the tensors: so loading needs the memory of the model and of one tensor, and draws no random number.

`torch.load(weights_only=True)` refuses every class that it does not know. One more is let in here,
argparse.Namespace, which training programs like to store beside their weights. Of such an object only its attributes
are restored, and these are read under the same rule: it is a dictionary by another name, and has no method that
reading calls.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from imgtok.places import INDEX, SAFETENSORS

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)

AVERAGED = ("model_ema", "ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema_state_dict", "params_ema")
"""Entries of a training checkpoint that hold averaged weights."""
_AVERAGED = re.compile(r"(?i)(^|[^a-z])(ema(callback)?|avg|averaged?|swa|shadow)([^a-z]|$)")
"""Others that are called as if they did, such as `ema_weights`, `ema_0.9999` and `G_ema`."""
_WHOLE = ("model", "module", "state_dict", "model_state_dict", "params", "weights", "model_state", "online_model")
PLAIN = (*_WHOLE, "net", "network", "generator", "G", "g", "vae", "autoencoder", "tokenizer")
"""Entries that hold the weights that were trained."""
COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step")
"""Numbers that what averages weights keeps beside them."""
PREFIXES = ("module.", "model.")
"""What DistributedDataParallel and other wrappers put before every name."""
WRAPPERS = ("_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, Lightning and FSDP put into names, wherever a part is wrapped."""


# ---------------------------------------------------------------- reading


class Weights(Mapping[str, Tensor]):
    """The tensors of a file by name; each is read when it is asked for, into memory of its own."""

    def __init__(
        self,
        path: Path,
        blank: Mapping[str, Tensor],
        read: Mapping[str, Callable[[], Tensor]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.blank = blank
        """The same names with tensors that have shape and kind of number, but no numbers."""
        self.metadata = metadata or {}
        """What the header of a safetensors file says beside its tensors."""
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.blank)

    def __len__(self) -> int:
        return len(self.blank)

    def replaced(self, others: Weights) -> Weights:
        """The same with some tensors replaced by those of `others` that have their names."""
        blank = {name: others.blank.get(name, mine) for name, mine in self.blank.items()}
        return Weights(self.path, blank, {**self._read, **{n: others._read[n] for n in others.blank}}, self.metadata)

    def select(self, names: Mapping[str, str]) -> Weights:
        """Other names for some of these tensors: new name -> the one here. Those that are not named are left out."""
        blank = {new: self.blank[old] for new, old in names.items()}
        return Weights(self.path, blank, {new: self._read[old] for new, old in names.items()}, self.metadata)


def open_weights(path: Path, *, raw: bool = False, as_stored: bool = False) -> Weights:
    """The tensors in a file of weights, or in the shards that an index names.

    Of a training checkpoint the averaged weights are taken where it has them, or with `raw` the trained ones, with a
    line in the log. What DistributedDataParallel, torch.compile and other wrappers put into names is left out, unless
    they are asked for `as_stored`, and so are numbers among the tensors. Raises FileNotFoundError, and ValueError for a
    file that would run code, is damaged, holds no tensors by name, or has averaged weights in a form that is not known
    here.
    """
    found = _open(path, raw=raw)
    if as_stored:
        return found
    chosen = _one_set(found, raw=raw)
    return chosen.select(_without_wrappers(chosen))


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of weights, under the very names that it has. Raises as `open_weights`."""
    return dict(_open(path, raw=False))


def find_weights(folder: Path, name: str) -> Path:
    """The file of weights `name`, as "model.safetensors", in a folder, or the index of its shards.

    Where there is none the file of a variant will do ("model.fp16.safetensors", read as any other), or one of
    torch.save of that name (.bin), which is read without running anything; a line in the log says so. Raises
    FileNotFoundError for none, ValueError for several variants.
    """
    stem = name.removesuffix(SAFETENSORS)
    for ending in (SAFETENSORS, ".bin"):
        for exact in (f"{stem}{ending}", f"{stem}{ending}.index.json"):
            if (folder / exact).is_file():
                if ending != SAFETENSORS:
                    logger.info("%s: has no %s: took %s", folder, name, exact)
                return folder / exact
        pattern = rf"{re.escape(stem)}(\.\w+{re.escape(ending)}|{re.escape(ending)}\.index\.\w+\.json)"
        variants = sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
        if len(variants) > 1:
            names = ", ".join(path.name for path in variants)
            raise ValueError(f"{folder} has no {name}, but the variants {names}: keep the one that is meant")
        if variants:
            logger.info("%s: has no %s: took the variant %s", folder, name, variants[0].name)
            return variants[0]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise FileNotFoundError(f"{folder} has a config.json but no {name}; copy or download it (found: {found})")


def files_of(path: Path) -> list[Path]:
    """The files that weights are in: `path`, or after an index the shards that it names."""
    if INDEX.search(path.name) is None:
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_weight_map(path).values())))]


def _open(path: Path, *, raw: bool) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    if INDEX.search(path.name) is not None:
        return _open_shards(path)
    return _open_safetensors(path) if path.suffix == SAFETENSORS else _open_pickle(path, raw=raw)


def _one_set(found: Weights, *, raw: bool) -> Weights:
    """One of the two sets of weights in a file whose names all begin with those of entries, "ema.a" and "model.a"."""
    heads = {name: name.partition(".")[0] for name in found if not _is_counter(found, name)}
    there = set(heads.values())
    averaged = [entry for entry in AVERAGED if entry in there] or sorted(filter(_AVERAGED.search, there))
    plain = [entry for entry in _WHOLE if entry in there]
    if not there <= {*averaged, *plain}:
        return found
    if not averaged or not plain:
        return found.select({name: name for name in heads})
    entry = plain[0] if raw else averaged[0]
    others = ", ".join(f"{name}.*" for name in (*averaged, *plain) if name != entry)
    logger.info("%s: took its tensors %s.*, and left %s", found.path, entry, others)
    return found.select({name.removeprefix(f"{entry}."): name for name, head in heads.items() if head == entry})


def _is_counter(found: Weights, name: str) -> bool:
    return name in COUNTERS and found.blank[name].numel() == 1


def under_prefix(found: Weights, names: Collection[str]) -> Weights:
    """The tensors `names` where they, and nothing else, stand under one prefix, such as `vae.` in the file of a larger
    model; all that is found where they do not, or where averaged ones may stand beside them.

    Raises ValueError where there are several such prefixes.
    """
    first = next(iter(names))
    prefixes = sorted({name[: -len(first)] for name in found if name.endswith(f".{first}")})
    fitting = [p for p in prefixes if {n.removeprefix(p) for n in found if n.startswith(p)} == set(names)]
    if not fitting or found.keys() == names:
        return found
    if len(fitting) > 1:
        raise ValueError(f"{found.path}: it holds such a model several times, as {', '.join(fitting)}*; keep one")
    beside = sorted({name.partition(".")[0] for name in found if not name.startswith(fitting[0])})
    if any(map(_AVERAGED.search, beside)):
        return found
    logger.info("%s: took its tensors %s*, and left %s", found.path, fitting[0], ", ".join(beside) or "nothing")
    return found.select({name: fitting[0] + name for name in names})


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Name without the names of wrappers in it, and without the prefixes that all names have -> name."""
    found = {name: name for name in names}
    bare = {_unwrapped(name): old for name, old in found.items()}
    found = bare if len(bare) == len(found) else found  # else two names would become one
    while found and (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in found)), None)):
        found = {name.removeprefix(prefix): old for name, old in found.items()}
    return found


def _unwrapped(name: str) -> str:
    """A name without the parts that wrappers add."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def _open_safetensors(path: Path) -> Weights:
    version = _version(path.stat())
    try:
        with safe_open(path, framework="pt") as file:  # checks the header; what it maps is not read
            blank = {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except SafetensorError as error:
        raise damaged(path, error) from error
    with _reopened(path, version) as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    starts = {name: 8 + size + header[name]["data_offsets"][0] for name in blank}
    read = {name: partial(_read_slice, path, version, starts[name], value) for name, value in blank.items()}
    return Weights(path, blank, read, metadata)


def _version(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written again or another one takes its name."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _reopened(path: Path, version: tuple[int, ...]) -> Iterator[BinaryIO]:
    """The file as it was when `version` was taken. Raises ValueError if it is another now."""
    with path.open("rb") as file:
        if _version(os.fstat(file.fileno())) != version:
            raise ValueError(f"{path}: was written again while it was read; try once more")
        yield file


def _read_slice(path: Path, version: tuple[int, ...], start: int, blank: Tensor) -> Tensor:
    """A tensor straight from its place in a safetensors file: faster than a mapped file, and nothing stays mapped."""
    value = torch.empty_like(blank, device="cpu")
    if value.numel():
        buffer = memoryview(value.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with _reopened(path, version) as file:
            file.seek(start)
            if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
                raise damaged(path, "it became shorter while it was read")
    return value


def _weight_map(path: Path) -> dict[str, str]:
    endings = SAFETENSORS if f"{SAFETENSORS}.index" in path.name else ".bin"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in found.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of shards, which has tensors and their files in weight_map") from error
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(endings):
            raise ValueError(f"{path}: weight_map: {file!r} is not the name of a {endings} file beside it")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path}: weight_map: the shard {file} is missing; copy or download it")
    return files


def _open_shards(path: Path) -> Weights:
    shard_of = _weight_map(path)
    shards = {file: _open(path.parent / file, raw=False) for file in sorted(set(shard_of.values()))}
    absent = [name for name, file in shard_of.items() if name not in shards[file]]
    if absent:
        raise ValueError(f"{path}: {', '.join(absent)}: not in the shards where the index has them")
    omitted = [f"{name} ({file})" for file in shards for name in shards[file] if shard_of.get(name) != file]
    if omitted:
        raise ValueError(f"{path}: {', '.join(omitted)}: in the shards, but the index does not have them there")
    blank = {name: shards[file].blank[name] for name, file in shard_of.items()}
    read = {name: partial(shards[file].__getitem__, name) for name, file in shard_of.items()}
    return Weights(path, blank, read)


def _open_pickle(path: Path, *, raw: bool) -> Weights:
    tensors = _named_tensors(load_pickle(path), path, raw=raw)
    blank = {name: value.detach().to("meta") for name, value in tensors.items()}
    return Weights(path, blank, {name: partial(_copied, value) for name, value in tensors.items()})


def _copied(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _named_tensors(stored: Any, path: Path | str, *, raw: bool) -> Mapping[str, Tensor]:
    if (found := _tensors_of(stored)) is not None:
        return _without_numbers(found, stored, str(path))
    entries = PLAIN if raw else (*AVERAGED, *PLAIN)
    present = [entry for entry in entries if isinstance(stored, Mapping) and stored.get(entry) is not None]
    if isinstance(stored, Mapping) and not raw and not set(present) & set(AVERAGED):
        stored, called_so = _called_averaged(stored, path)
        present = [*called_so, *present]
    for entry in present:
        held = _shadow(stored, entry) if entry in AVERAGED else stored[entry]
        if (found := _tensors_of(held)) is not None:
            others = ", ".join(str(name) for name in stored if name != entry) or "nothing"
            logger.info("%s: took its entry %s, and left %s", path, entry, others)
            return _without_numbers(found, held, f"{path}: {entry}")
        if isinstance(held, Mapping) and _entries_in(held):
            logger.info("%s: looked into its entry %s", path, entry)
            return _named_tensors(held, f"{path}: {entry}", raw=raw)
        empty = isinstance(held, Mapping) and not held
        if entry in AVERAGED and not empty and any(_tensors_of(stored.get(name)) is not None for name in PLAIN):
            raise ValueError(
                f"{path}: its entry {entry} should hold averaged weights, tensors by name, and holds {_words(held)}; "
                "raw=true takes the trained weights instead"
            )
    held = stored[present[0]] if present and stored[present[0]] else stored
    raise ValueError(
        f"{path}: must hold tensors by name, or one of the entries {', '.join(entries)} that does "
        f"(found: {_words(held)})"
    )


def _called_averaged(stored: Mapping[Any, Any], path: Path | str) -> tuple[Mapping[Any, Any], list[str]]:
    """A checkpoint with what its callbacks (Lightning's) keep as further entries; and the entry that, by its name,
    holds averaged weights, if there is one. Raises ValueError for several.
    """
    callbacks = stored.get("callbacks")
    inside = {
        f"callbacks.{callback}.{name}": value
        for callback, held in (callbacks.items() if isinstance(callbacks, Mapping) else ())
        for name, value in (held.items() if isinstance(held, Mapping) else ())
    }
    every = {**stored, **inside}
    found = [
        name
        for name, held in every.items()
        if isinstance(name, str) and _AVERAGED.search(name) and isinstance(held, Mapping)
        if _tensors_of(held) is not None or _entries_in(held)
    ]
    if len(found) > 1:
        raise ValueError(
            f"{path}: several of its entries may hold averaged weights ({', '.join(found)}): keep the one that is "
            "meant, under the name ema; raw=true takes the trained weights instead"
        )
    return (every if found else stored), found


def _entries_in(held: Mapping[Any, Any]) -> list[str]:
    """The entries that hold tensors by name, or such entries in turn."""
    inner = {name: held[name] for name in (*AVERAGED, *PLAIN) if isinstance(held.get(name), Mapping)}
    return [name for name, each in inner.items() if _tensors_of(each) is not None or _entries_in(each)]


def _shadow(stored: Mapping[str, Any], entry: str) -> Any:
    """An averaged entry, or its `shadow` where that has the very names of the trained weights."""
    held = stored[entry]
    shadow = _tensors_of(held.get("shadow")) if isinstance(held, Mapping) else None
    trained = (found for name in PLAIN if (found := _tensors_of(stored.get(name))) is not None)
    if shadow is not None and any(set(_without_wrappers(shadow)) == set(_without_wrappers(own)) for own in trained):
        return shadow
    return held


def _tensors_of(stored: Any) -> dict[str, Tensor] | None:
    """The tensors of a mapping from names to tensors, among which numbers may stand; None for anything else."""
    if not isinstance(stored, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor | int | float) for name, value in stored.items()
    ):
        return None
    return {name: value for name, value in stored.items() if isinstance(value, Tensor)} or None


def _without_numbers(found: dict[str, Tensor], stored: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors, with a line in the log for what else stood among them."""
    if others := [name for name in stored if name not in found]:
        logger.info("%s: left out %s: not tensors but numbers", where, ", ".join(others))
    return found


def _words(held: Any) -> str:
    """What stands in an entry, for a message."""
    return (", ".join(map(str, held))[:200] if isinstance(held, Mapping) else type(held).__name__) or "nothing"


def load_pickle(path: Path) -> Any:
    """What is in a file of `torch.save`. Its tensors are mapped from the file: only those that are used are read.

    Raises ValueError, which says what to do, for a file with anything else in it and for one that is not whole.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path}: not a file of weights alone: it needs {found[1]}, and imgtok runs no code from a file. If "
                "you trust its source, keep only the weights, on the machine that wrote it: stored = torch.load(OLD, "
                "weights_only=False); state = lambda held: held.state_dict() if hasattr(held, 'state_dict') else held; "
                "torch.save(state(stored) if hasattr(stored, 'state_dict') else {name: state(held) for name, held in "
                f"stored.items() if torch.is_tensor(held) or name in {(*PLAIN, *AVERAGED)}}}, NEW)"
            ) from error
        raise ValueError(
            f"{path}: not a whole file of torch.save with weights alone ({path.stat().st_size} bytes"
            f"{_something_else(path)}); copy or download it again"
        ) from error


def _something_else(path: Path) -> str:
    """What a file is that stands in the place of weights, for a message; "" where that is not known."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "; a pointer of Git LFS: run `git lfs pull` in its repository"
    return "; a page of the web, such as an error of the server" if start.startswith((b"<!doctype", b"<html")) else ""


def damaged(path: Path, error: SafetensorError | str) -> ValueError:
    """What to say of a safetensors file that cannot be read."""
    if other := _something_else(path):
        return ValueError(f"{path}: not a safetensors file{other}; copy or download it again")
    return ValueError(
        f"{path}: not a whole safetensors file ({path.stat().st_size} bytes; {error}). It was probably cut short while "
        "being written or copied: copy or download it again, or use an earlier checkpoint"
    )


# ---------------------------------------------------------------- into a model


def skeleton(make: Callable[[], M]) -> M:
    """The model that `make` makes, with parameters that have shapes but no memory (device "meta").

    Its buffers, such as tables of positions, are computed as usual. Nothing is drawn from the global generator, and
    other threads may make models at the same time.
    """
    thread = threading.get_ident()

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None  # as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_memory)
    try:
        with torch.random.fork_rng(devices=[]):  # a constructor may draw what it then registers
            return make()
    finally:
        handle.remove()


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, model: str) -> None:
    """Raise ValueError that lists every tensor that is missing, not expected, or of another shape, and those that hold
    whole numbers where a model has others. Only shapes and kinds of numbers are looked at.
    """
    lines = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in found]
    lines += [f"unexpected: {name} {tuple(found[name].shape)}" for name in found if name not in wanted]
    both = [name for name in wanted if name in found]
    for name in both:
        file_shape, model_shape = tuple(found[name].shape), tuple(wanted[name].shape)
        if file_shape != model_shape:
            lines.append(f"another shape: {name} is {file_shape} in the file, {model_shape} in the model")
    if lines:
        title = f"{path}: the weights do not fit the {model} describes:"
        raise ValueError("\n  ".join([title, *lines]))
    whole = [name for name in both if wanted[name].is_floating_point() and not found[name].is_floating_point()]
    if whole:
        raise ValueError(f"{path}: {', '.join(sorted(whole))}: not floating-point numbers")


def fill(
    model: M,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> M:
    """Gives a `skeleton` its parameters and saved buffers, all of them, one after the other; in evaluation mode.

    They become the kind of number that the model is built with, whatever the file has (float32 unless torch's default
    is another), or `dtype` where they are floating-point. Tied parameters stay tied.
    """
    wanted = model.state_dict()
    state = {}
    for name, value in tensors:
        kind = dtype if dtype is not None and wanted[name].is_floating_point() else wanted[name].dtype
        state[name] = value.to(device=map_location, dtype=kind).contiguous()
    tied = tied_names(model)
    model.load_state_dict(state, strict=True, assign=True)
    for first, *others in tied:
        for name in others:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))
    if dtype is not None:
        model = model.to(dtype)  # buffers that are not saved
    return model.to(map_location).eval()


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


# ---------------------------------------------------------------- writing


def state_of(model: Any) -> dict[str, Tensor]:
    """The state as safetensors takes it: contiguous, tied tensors as copies, so that each name is there."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        contiguous = tensor.detach().contiguous()
        tied = contiguous.untyped_storage().data_ptr() in seen
        seen.add(contiguous.untyped_storage().data_ptr())
        state[name] = contiguous.clone() if tied else contiguous
    return state


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with `metadata` in its header. Raises OSError, also where safetensors does not."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:  # "... (os error 28)" is how safetensors reports a full disk
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def write_pickle(tensors: Mapping[str, Any], path: Path) -> None:
    """`torch.save` of tensors by name, or of entries that hold such; with OSError for a full disk, which it hides
    behind an error of its archive.
    """
    with path.open("wb") as file:
        try:
            torch.save(dict(tensors), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
