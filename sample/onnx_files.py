"""A tokenizer or an autoencoder as ONNX files, each checked with onnxruntime against torch."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imgtok.files import replacing
from imgtok.hub import Found
from imgtok.sample.parting import error_of
from imgtok.tokenizers.base import Autoencoder, Graph, Tokenizer

logger = logging.getLogger(__name__)

RECORD = "onnx.json"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
UNLIKE, UNLIKE_IDS = 1e-3, 0.05
"""The relative error, and of ids the share that differs, above which a file is refused: ids may be equally near."""
ONE_FILE = 2**31 - 2**20
"""Bytes of weights up to which they stand in the .onnx file itself, which may have 2 GiB; others in FILE.onnx.data."""


@dataclass(frozen=True)
class Written:
    """What is known of one file."""

    file: str
    megabytes: float
    inputs: dict[str, list[int | str]]
    output: str
    largest: float
    """The largest difference between onnxruntime's and torch's result; of ids the share that differ."""
    relative: float


class Function(nn.Module):
    """A graph's function as a module, which holds the model's weights."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.model, self.graph = model, graph

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.graph.run(*inputs)


def check_installed() -> None:
    """Raises ValueError where a package is missing that writes or checks ONNX files."""
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ValueError(f"layout: onnx needs {', '.join(missing)}; install it: pip install 'imgtok[onnx]'")


def check_takes(model: Any) -> None:
    """Raises ValueError for a model that gives no graphs."""
    if not isinstance(model, Tokenizer | Autoencoder):
        raise ValueError(
            f"layout: onnx is for tokenizers and autoencoders, and this is a {type(model).__name__}; its decoder "
            "can be written: imgtok export MODEL/tokenizer layout=onnx out=FOLDER"
        )
    if not model.graphs():
        raise ValueError(f"layout: a {type(model).__name__} has nothing that can be written as onnx")


def write(model: Any, found: Found, out: Path) -> dict[str, Written]:
    """Writes a file for each graph of the model, and `onnx.json`, which says what they are and how far they are from
    torch. Raises ValueError for a folder that holds those of another model.
    """
    check_installed()
    check_takes(model)
    about, record = found.about(), out / RECORD
    if (
        record.exists()
        and json.loads(record.read_text(encoding="utf-8"))["model"]["fingerprint"] != about["fingerprint"]
    ):
        raise ValueError(
            f"out: {out} holds the files of another model; choose another place with out=PATH, or delete it"
        )
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, graph in model.graphs().items():
        written[name] = write_graph(model, graph, out / f"{name}.onnx")
        logger.info("%s", in_words(written[name]))
        refuse_unlike(written[name], out)
    text = {"model": about, "parts": {name: asdict(part) for name, part in written.items()}}
    with replacing(record) as temporary:
        temporary.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    return written


def refuse_unlike(part: Written, out: Path) -> None:
    """Raises ValueError for a file that does not compute what torch does."""
    if part.relative <= (UNLIKE_IDS if part.output == "ids" else UNLIKE):
        return
    (out / part.file).unlink()
    raise ValueError(
        f"{out / part.file}: onnxruntime computes something else than torch ({in_words(part)}), so the file was "
        "deleted; versions of torch, onnx, onnxscript and onnxruntime that belong together may help"
    )


@torch.no_grad()
def write_graph(model: nn.Module, graph: Graph, path: Path) -> Written:
    """Writes one file, and compares it with torch for as many images, and of another size where that is free, as it was
    not made with.
    """
    large = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) > ONE_FILE
    free = {name: free_sizes(tensor, graph.sides) for name, tensor in graph.inputs.items()}
    program: Any = torch.onnx.export(
        Function(model, graph).eval(),
        tuple(graph.inputs.values()),
        input_names=list(graph.inputs),
        output_names=[graph.output],
        dynamic_shapes=(tuple(free.values()),),
        optimize=False,  # it would take away the 1e-15 that DC-AE adds against 0 / 0; onnxruntime optimizes on its own
        dynamo=True,
        verbose=False,
    )
    program.save(path, external_data=large)
    inputs = some(graph)
    error = error_of(graph.run(*inputs.values()), computed(path, inputs))
    largest = error.relative if error.of_ids else error.largest
    size = sum(file.stat().st_size for file in (path, path.with_name(path.name + ".data")) if file.exists())
    sizes = {name: in_words_of_size(tensor, graph.sides) for name, tensor in graph.inputs.items()}
    return Written(path.name, round(size / 1e6, 3), sizes, graph.output, largest, error.relative)


def free_sizes(tensor: Tensor, sides: int) -> dict[int, Any]:
    """The dimensions of an input that may have other sizes: the first, of two images, and the last two of `sides`."""
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)} if tensor.shape[0] == 2 else {}
    if sides:
        sizes |= {number: sides * torch.export.Dim(name, min=1) for number, name in ((2, "rows"), (3, "columns"))}
    return sizes


def in_words_of_size(tensor: Tensor, sides: int) -> list[int | str]:
    """The sizes of an input: a number, or the name of one that is free."""
    factor = f"{sides} " if sides > 1 else ""
    names = {0: "batch"} if tensor.shape[0] == 2 else {}
    names |= {2: f"{factor}rows", 3: f"{factor}columns"} if sides else {}
    return [names.get(number, size) for number, size in enumerate(tensor.shape)]


def some(graph: Graph) -> dict[str, Tensor]:
    """Three images' worth of the inputs, of 5 by 3 of its `sides` where they are free: numbers at random in place of
    noughts, and ids that all models have.
    """
    generator, made = torch.Generator().manual_seed(0), {}
    for name, tensor in graph.inputs.items():
        rows = tensor[[0, 1, 0]] if tensor.shape[0] == 2 else tensor
        rows = rows.new_zeros(*rows.shape[:2], 5 * graph.sides, 3 * graph.sides) if graph.sides else rows
        random = torch.randn(rows.shape, generator=generator).clamp(-1, 1)
        blank = rows.dtype.is_floating_point and not bool(rows.any())
        if rows.dtype == torch.bool:
            made[name] = torch.tensor([number == 1 for number in range(len(rows))])
        elif rows.dtype.is_floating_point:
            made[name] = random if blank else rows
        else:
            made[name] = rows if bool(rows.any()) else (random > 0).long()
    return made


def computed(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """What onnxruntime gives."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # not of every constant that it leaves where it is
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    return torch.from_numpy(session.run(None, given)[0])


def in_words(part: Written) -> str:
    """The line that the log has of a file."""
    takes = ", ".join(f"{name} ({', '.join(map(str, size))})" for name, size in part.inputs.items())
    off = (
        f"{100 * part.relative:.2g} % of the ids differ"
        if part.output == "ids"
        else (f"largest error against torch {part.largest:.1e}, relative {part.relative:.1e}")
    )
    return f"{part.file} ({part.megabytes:.1f} MB): {takes} -> {part.output}; {off}"
