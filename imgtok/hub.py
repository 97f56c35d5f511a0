"""Model folders: `config.json` + `model.safetensors`, on disk and on the Hugging Face Hub.

A model mixes in `Pretrained`, is built by `Class(config)` and keeps that frozen dataclass as `config`; this
gives it `save_pretrained`, `from_pretrained` and `push_to_hub`. `load` finds the class by the `kind` in
`config.json`, and hands what has a published layout to the module that reads it (`LAYOUTS`). Loading is strict
(every tensor, every field), runs no code from a file, and imports only the modules in `KINDS` and `LAYOUTS`; saving
replaces files in one step, so a full disk leaves the previous model readable.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import imgtok
from imgtok.config import ConfigError, from_dict, to_dict
from imgtok.files import replacing
from imgtok.weights import load_pickle

TOKENIZERS: dict[str, str] = {"flextok": "imgtok.tokenizers.flextok:FlexTok"}
AUTOENCODERS: dict[str, str] = {"vae": "imgtok.tokenizers.vae:VAE"}
GENERATORS: dict[str, str] = {"gpt": "imgtok.generators.gpt:GPT", "xar": "imgtok.generators.xar:XAR"}
"""`kind` in config.json -> class. Strings, so that a module is imported when its kind is asked for and not before."""
KINDS: Mapping[str, str] = ChainMap(GENERATORS, TOKENIZERS, AUTOENCODERS)
"""All of them: a view, so that a line in one of the three tables is the whole entry of a new method."""

LAYOUTS: Mapping[str, str] = {
    "encoder.down.0.block.0.conv1.weight": "imgtok.published.kl16:VAE",
    "z_proj.weight": "imgtok.generators.published.xar:XAR",
}
"""A tensor that a published file of weights has -> the module that reads such files, and the class it gives."""
FLEXTOK_LAYOUT = "imgtok.published.flextok:FlexTok"
"""Of published folders, and of .safetensors files, whose header describes them."""

PUBLISHED_ENTRIES = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
"""What is at the top of the config.json of a published FlexTok, which has no `kind`."""

FORMAT = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

MODEL_CARD = """---
{{ card_data }}
---

# A `{{ kind }}` model of imgtok

```python
import imgtok

model = imgtok.load("{{ repo_id }}")
```

Its configuration is in `config.json`.
"""


class Pretrained(PyTorchModelHubMixin, library_name="imgtok", model_card_template=MODEL_CARD):
    """Gives a model `save_pretrained`, `from_pretrained` and `push_to_hub`.

    Use as `class VAE(nn.Module, Pretrained)` with `config_class = VAEConfig` (a dataclass with a `kind`)
    and `__init__(self, config: VAEConfig)` that sets `self.config`.
    """

    config_class: ClassVar[Any]
    config: Any

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        config: None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write config.json, model.safetensors and, where there is none, a model card.

        Other files of the folder stay. Raises OSError (such as a full disk) with the folder as it was.
        The card's example loads `repo_id`; `config` and `model_card_kwargs` are how the mixin calls us.
        """
        folder = Path(save_directory)
        header = {"format": FORMAT, "imgtok_version": imgtok.__version__}
        text = json.dumps(header | to_dict(self.config), indent=2, allow_nan=False) + "\n"
        with replacing(folder / CONFIG_NAME) as header_file, replacing(folder / WEIGHTS_NAME) as weights:
            header_file.write_text(text, encoding="utf-8")
            write_tensors(_state(self), weights, {"format": "pt"})
        if not (folder / "README.md").exists():
            names = {"kind": self.config.kind, "repo_id": repo_id or folder.name, **(model_card_kwargs or {})}
            page = str(self.generate_model_card(**names))
            with replacing(folder / "README.md") as readme:
                readme.write_text(page, encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
    ) -> Self:
        """The model in a folder or a Hub repository "owner/name", in evaluation mode.

        Raises FileNotFoundError, ConfigError (config.json) or ValueError (weights, another kind of model).
        """
        folder = _find(name_or_path, revision)
        if is_published(folder):
            return _load_published(folder, cls, map_location)
        kind = read_config(folder)["kind"]
        if kind != cls.config_class.kind:
            raise ValueError(
                f"{folder} holds a model of kind {kind!r}, but {cls.__name__} is of kind "
                f"{cls.config_class.kind!r}; imgtok.load({str(folder)!r}) picks the right class"
            )
        model: Self = _build(cls, folder, map_location)
        return model

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model folder to the Hub repository "owner/name"; returns the address of the commit.

        `options` are those of huggingface_hub (`private`, `token`, `commit_message`, ...). Raises
        ConnectionError when the Hub cannot be reached or refuses.
        """
        options["model_card_kwargs"] = {"repo_id": repo_id}
        try:
            return str(super().push_to_hub(repo_id, **options))
        except Exception as error:  # the HTTP library, and with it the exception, varies between releases
            raise ConnectionError(f"could not push to {repo_id!r} on the Hugging Face Hub: {_brief(error)}") from error


def model_class(kind: str) -> type[Any]:
    """The class of the models of a kind. Raises ValueError that lists the kinds for one that there is not."""
    if kind not in KINDS:
        raise ValueError(f"kind: given {kind!r}, must be one of {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def config_class(kind: str) -> type[Any]:
    """The frozen dataclass that configures the models of a kind. Raises ValueError as `model_class` does."""
    found: type[Any] = model_class(kind).config_class
    return found


def load(
    name_or_path: str | Path,
    *,
    expect: type[Any] | None = None,
    revision: str | None = None,
    map_location: str | torch.device = "cpu",
) -> Any:
    """The model in a folder or a Hub repository, of the class that its `kind` names, in evaluation mode.

    A FlexTok in its published layout will do as well: a folder, a repository such as
    "EPFL-VILAB/flextok_d18_d28_in1k", or its .safetensors file alone; and a file of weights like `kl16.ckpt` (an
    autoencoder) or `xAR-B.pth`. `expect` is the class (or base class) that the caller can use; another one raises
    ValueError, as do damaged or unsuitable weights. Raises FileNotFoundError for a missing folder or file.
    """
    folder = _find(name_or_path, revision)
    if is_published(folder):
        return _load_published(folder, expect, map_location)
    kind = read_config(folder)["kind"]
    try:
        found = model_class(kind)
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG_NAME}: {error}") from error
    if expect is not None and not issubclass(found, expect):
        raise ValueError(f"{folder} holds a {found.__name__} (kind {kind!r}), but a {expect.__name__} is needed here")
    return _build(found, folder, map_location)


LONE_FILES = (".safetensors", ".ckpt", ".pth", ".pt")
"""How the name of a file of weights can end."""
MODEL_FILES = ("*.json", "*.safetensors", "README.md")


def find_folder(name_or_path: str | Path, revision: str | None = None, *, files: Sequence[str] = MODEL_FILES) -> Path:
    """The local folder of a model: the path itself, or the downloaded `files` of a Hub repository."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        hint = "; `imgtok export` makes one of a published checkpoint" if path.suffix in LONE_FILES else ""
        raise FileNotFoundError(f"{path} is a file; give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}{hint}")
    name = str(name_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(f"there is no model folder {name!r} (and a Hub name looks like 'owner/name')")
    return _download(name, revision, files)


def is_published(path: Path) -> bool:
    """Whether `path` is a lone weights file, or a folder whose config.json is that of a published FlexTok.

    Raises FileNotFoundError or ConfigError for a folder without a readable config.json.
    """
    if path.is_file():
        return True
    data = read_json(path / CONFIG_NAME)
    return "kind" not in data and not data.keys().isdisjoint(PUBLISHED_ENTRIES)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError for anything else, FileNotFoundError with what is there instead."""
    folder = path.parent
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {path.name} (found: {found})")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); copy or download the folder again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not written by imgtok: a {type(data).__name__}, not an object with fields")
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says, less the format header; always has a `kind`."""
    path = folder / CONFIG_NAME
    data = read_json(path)
    if "kind" not in data or "format" not in data:
        raise ConfigError(f"{path}: not written by imgtok: it lacks the fields 'format' and 'kind'")
    version, written_by = data.pop("format"), data.pop("imgtok_version", "unknown")
    if version != FORMAT:
        raise ConfigError(
            f"{path}: format {version!r}, written by imgtok {written_by}; imgtok {imgtok.__version__} reads "
            f"format {FORMAT}. Install a matching release"
        )
    return data


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, model: str) -> None:
    """Raise ValueError that lists every tensor that is missing, not expected, or of another shape."""
    lines = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in found]
    lines += [f"unexpected: {name} {tuple(found[name].shape)}" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        file_shape, model_shape = tuple(found[name].shape), tuple(wanted[name].shape)
        if file_shape != model_shape:
            lines.append(f"another shape: {name} is {file_shape} in the file, {model_shape} in the model")
    if lines:
        title = f"{path}: the weights do not fit the {model} describes:"
        raise ValueError("\n  ".join([title, *lines]))


def read_safetensors(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises ValueError for one that is not whole."""
    try:
        return load_file(path, device=str(map_location))
    except SafetensorError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: SafetensorError) -> ValueError:
    """What to say of a weights file that cannot be read."""
    return ValueError(
        f"{path}: not a whole safetensors file ({path.stat().st_size} bytes; {error}). It was probably cut short while "
        "being written or copied: copy or download it again, or use an earlier checkpoint"
    )


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with `metadata` in its header. Raises OSError, also where safetensors does not."""
    try:
        save_file(tensors, path, metadata=dict(metadata))
    except SafetensorError as error:  # "... (os error 28)" is how safetensors reports a full disk
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path.with_name(WEIGHTS_NAME))) from error


# ------------------------------------------------------------------------------------------- internals


def _find(name_or_path: str | Path, revision: str | None) -> Path:
    """The local folder of a model; or, where that was given, a lone weights file."""
    path = Path(name_or_path).expanduser()
    if path.suffix in LONE_FILES and not path.exists():  # or it might be taken for a Hub repository
        raise FileNotFoundError(f"{path}: no such file of weights")
    return path if path.is_file() and path.suffix in LONE_FILES else find_folder(name_or_path, revision)


def _load_published(path: Path, expect: type[Any] | None, map_location: str | torch.device) -> Any:
    module_name, _, name = _layout(path).partition(":")
    module = importlib.import_module(module_name)
    model_class = getattr(module, name)
    if expect is not None and not issubclass(model_class, expect):
        raise ValueError(f"{path} holds a published {name}, but a {expect.__name__} is needed here")
    return module.load(path, map_location=map_location)


def _layout(path: Path) -> str:
    """Who reads a folder or file in a published layout, as in `LAYOUTS`."""
    if path.is_dir():
        return FLEXTOK_LAYOUT
    names = _names_in_file(path)
    for name, layout in LAYOUTS.items():
        if name in names:
            return layout
    if path.suffix == ".safetensors":
        return FLEXTOK_LAYOUT
    raise ValueError(
        f"{path}: neither an autoencoder like kl16.ckpt nor an xAR like xAR-B.pth, whose weights are by name in the "
        f"file or in its entries model and model_ema (found: {', '.join(names[:4]) or 'nothing'})"
    )


def _names_in_file(path: Path) -> list[str]:
    """Of the tensors in a lone file of weights."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise damaged(path, error) from error
    stored = load_pickle(path)
    if isinstance(stored, Mapping):
        stored = next((stored[entry] for entry in ("model_ema", "model") if entry in stored), stored)
    return [str(name) for name in stored] if isinstance(stored, Mapping) else []


def _build(model_class: type[Any], folder: Path, map_location: str | torch.device) -> Any:
    config = from_dict(model_class.config_class, read_config(folder), str(folder / CONFIG_NAME))
    with torch.random.fork_rng(devices=[]):  # the first weights are overwritten: leave the caller's RNG alone
        model = model_class(config)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has a {CONFIG_NAME} but no {WEIGHTS_NAME}; copy or download it")
    tensors = read_safetensors(path, map_location)
    check_tensors(tensors, model.state_dict(), path, f"{model_class.__name__} that {CONFIG_NAME}")
    model.load_state_dict(tensors, strict=True)
    return model.to(map_location).eval()


def _state(model: Any) -> dict[str, Tensor]:
    """The state as safetensors takes it: contiguous, tied tensors as copies, so that each name is there."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        contiguous = tensor.detach().contiguous()
        tied = contiguous.untyped_storage().data_ptr() in seen
        seen.add(contiguous.untyped_storage().data_ptr())
        state[name] = contiguous.clone() if tied else contiguous
    return state


def _download(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """A snapshot of the Hub repository `name`; from the local cache when the Hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*files]
    try:  # one short question first: without a network, a download retries for most of a minute
        commit = HfApi().model_info(name, revision=revision, timeout=10).sha
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no model folder {name!r} here, and no such repository on the Hugging Face Hub "
            "(for a private one, log in with `hf auth login`)"
        ) from error
    except Exception as error:  # no network, in the words of whichever HTTP library is installed
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise FileNotFoundError(
                f"there is no model folder {name!r} here, it is not in the local Hugging Face cache, "
                f"and the Hub cannot be reached: {_brief(error)}"
            ) from error


def _brief(error: Exception) -> str:
    """The first line of an exception's text, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
