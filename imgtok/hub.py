"""Names of models: what one leads to, and the model there; and folders of ours, on disk and on the Hugging Face Hub.

`resolve` follows a name once, at the door of a program: a folder, a Hub repository, an autoencoder that ships with
imgtok, a folder of diffusers, a published folder or a lone published file. What it gives, a `Found`, knows the kind of
the model and its files, and is passed on in place of the name. `load` takes either.

A model mixes in `Pretrained`, is built by `Class(config)` and keeps that frozen dataclass as `config`; this
gives it `save_pretrained`, `from_pretrained` and `push_to_hub`. Loading is strict (every tensor, every field), runs no
code from a file, and imports only the modules in the tables below; saving replaces files in one step, so a full disk
leaves the previous model readable.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import RepositoryNotFoundError

import imgtok
from imgtok.config import ConfigError, from_dict, to_dict
from imgtok.files import file_sha256, replacing
from imgtok.weights import (
    INDEX,
    LONE_FILES,
    Weights,
    check_tensors,
    files_of,
    fill,
    find_weights,
    open_weights,
    skeleton,
    state_of,
    write_tensors,
)

TOKENIZERS: dict[str, str] = {"flextok": "imgtok.tokenizers.flextok:FlexTok"}
AUTOENCODERS: dict[str, str] = {"vae": "imgtok.tokenizers.vae:VAE"}
GENERATORS: dict[str, str] = {"gpt": "imgtok.generators.gpt:GPT", "xar": "imgtok.generators.xar:XAR"}
"""`kind` in config.json -> class. Strings, so that a module is imported when its kind is asked for and not before."""
KINDS: Mapping[str, str] = ChainMap(GENERATORS, TOKENIZERS, AUTOENCODERS)
"""All of them: a view, so that a line in one of the three tables is the whole entry of a new method."""

READERS: dict[str, str] = {
    "flextok": "imgtok.published.flextok",
    "kl16": "imgtok.published.kl16",
    "diffusers": "imgtok.published.diffusers",
    "xar": "imgtok.generators.published.xar",
}
"""A layout that models were published in -> the module that knows it. Such a module has

- `KIND`, the kind of the models in this layout, and `LOOKS_LIKE`, words for a message;
- `recognise(description, names) -> bool`: whether a folder's config.json, or the names of a lone file's tensors (the
  description is then what its header says), are in this layout. No two modules may both say so;
- `load(found, *, raw, map_location, dtype)`, the model of ours;
- where models can be written for the code that they were published with, `save(model, path)`."""

OURS = "imgtok"
FORMAT = 2
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

    in_words: ClassVar[str] = "a model"
    """What a class that others derive from calls itself in messages, such as "a tokenizer"."""
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
            write_tensors(state_of(self), weights, {"format": "pt"})
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
        found = resolve(name_or_path, revision=revision)
        if found.layout != OURS:
            published: Self = load(found, expect=cls, map_location=map_location)
            return published
        if found.kind != cls.config_class.kind:
            raise ValueError(
                f"{found.path} holds a model of kind {found.kind!r}, but {cls.__name__} is of kind "
                f"{cls.config_class.kind!r}; imgtok.load({str(found.path)!r}) picks the right class"
            )
        model: Self = _load_ours(found, cls, map_location, None)
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


@dataclass(frozen=True)
class Found:
    """A model that a name led to: where it is and what it is, without its weights. See `resolve`."""

    name: str
    """As it was given, for messages."""
    path: Path
    """Its folder, or a lone file of weights."""
    layout: str
    """How it is written: "imgtok", or a name in `READERS`."""
    kind: str
    """Key of `KINDS`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What its config.json says, less our header; empty for a lone file."""

    @property
    def model_class(self) -> type[Any]:
        """Its class. Raises ConfigError for a kind that this release does not have."""
        try:
            return model_class(self.kind)
        except ValueError as error:
            raise ConfigError(f"{self.path / CONFIG_NAME}: {error}") from error

    def check(self, expect: type[Any]) -> None:
        """Raises ValueError unless its class is `expect` or derived from it."""
        found = self.model_class
        if not issubclass(found, expect):
            what = f"{found.__name__} (kind {self.kind!r})" if self.layout == OURS else f"published {found.__name__}"
            name = f"{'an' if expect.__name__[0] in 'AEIOU' else 'a'} {expect.__name__}"
            needed = vars(expect).get("in_words", name)
            raise ValueError(f"{self.path} holds a {what}, but {needed} is needed here")

    def with_config(self, **fields: Any) -> Found:
        """As if its config.json said so, such as another `scaling_factor` of an autoencoder."""
        return replace(self, config={**self.config, **fields})

    def scaled(self, factor: float | None) -> Found:
        """An autoencoder whose latents are multiplied by this `scaling_factor`; for None by its own."""
        return self if factor is None else self.with_config(scaling_factor=factor)

    def part(self, name: str = "tokenizer") -> Found:
        """A model that is kept inside this one's folder, as a generator keeps its tokenizer or autoencoder.

        Raises FileNotFoundError where there is none.
        """
        if not (self.path / name).is_dir():
            raise FileNotFoundError(f"{self.path} has no {name}/ folder: say which one with {name}=FOLDER")
        return resolve(self.path / name)

    @property
    def weights_path(self) -> Path:
        """The file of its weights, or the index of its shards. Raises FileNotFoundError where it has none."""
        if self.path.is_file():
            return self.path
        name = WEIGHTS_NAME if self.layout == OURS else getattr(reader(self.layout), "WEIGHTS_NAME", WEIGHTS_NAME)
        return find_weights(self.path, name)

    def weights(self, *, raw: bool = False) -> Weights:
        """Its tensors by the names in its file; see `open_weights`."""
        return open_weights(self.weights_path, raw=raw)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with its weights or its configuration."""
        text = json.dumps(self.config, sort_keys=True) + self.weights_sha256()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def weights_sha256(self) -> str:
        """The SHA-256 of its file of weights; where it is in shards, that of theirs and the index's."""
        hashes = [file_sha256(path) for path in files_of(self.weights_path)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def resolve(name: str | Path | Found, *, revision: str | None = None, expect: type[Any] | None = None) -> Found:
    """What a name of a model leads to. Follow a name once, and pass on what this gives; a `Found` is given back.

    A name is the path of a folder or of a file of weights, a Hub repository "owner/name" (downloaded, at `revision`),
    or that of an autoencoder that ships with imgtok, such as "shapes32". Its layout is ours, or one of those in
    `READERS`: a folder of diffusers, a published FlexTok, `kl16.ckpt`, `xAR-B.pth`. `expect` is the class (or base
    class) that the caller can use. Raises FileNotFoundError, ConfigError (config.json), or ValueError for another class
    than expected and for a file that no reader knows.
    """
    found = name if isinstance(name, Found) else _describe(str(name), _place(name, revision))
    if expect is not None:
        found.check(expect)
    return found


def load(
    name: str | Path | Found,
    *,
    expect: type[Any] | None = None,
    revision: str | None = None,
    raw: bool = False,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """The model that a name leads to (see `resolve`), of the class that its kind names, in evaluation mode.

    Of a training checkpoint of published code the averaged weights are taken, or with `raw` the trained ones. Weights
    become float32, or `dtype`. Damaged or unsuitable ones raise ValueError, a missing file FileNotFoundError.
    """
    found = resolve(name, revision=revision, expect=expect)
    if found.layout != OURS:
        return reader(found.layout).load(found, raw=raw, map_location=map_location, dtype=dtype)
    if raw:
        raise ValueError(f"raw: {found.path} holds one set of weights; only training checkpoints of published code do")
    return _load_ours(found, found.model_class, map_location, dtype)


def configuration(found: Found) -> Any:
    """The configuration of a model, without reading its weights. Raises ConfigError or ValueError."""
    if found.layout != OURS:
        return reader(found.layout).configuration(found)
    return from_dict(found.model_class.config_class, found.config, str(found.path / CONFIG_NAME))


def reader(layout: str) -> Any:
    """The module that knows a layout; see `READERS`."""
    return importlib.import_module(READERS[layout])


def writers(kind: str) -> dict[str, Any]:
    """Layout -> module, of those that can write a model of this kind for the code that such models came with."""
    modules = {layout: reader(layout) for layout in READERS}
    return {name: module for name, module in modules.items() if kind == module.KIND and hasattr(module, "save")}


MODEL_FILES = ("*.json", "*.safetensors", "README.md")


def find_folder(name_or_path: str | Path, revision: str | None = None, *, files: Sequence[str] = MODEL_FILES) -> Path:
    """A local folder: the path itself, or the downloaded `files` of a Hub repository. Raises FileNotFoundError."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    name = str(name_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(
            f"there is no model folder {name!r} (a Hub name looks like 'owner/name', and imgtok ships "
            f"{', '.join(packaged_models())})"
        )
    return _download(name, revision, files)


def packaged_models() -> dict[str, Path]:
    """Name -> folder of what ships with imgtok, such as "shapes32"."""
    root = Path(str(resources.files("imgtok"))) / "assets"
    return {path.name.removeprefix("vae-"): path for path in sorted(root.glob("vae-*"))}


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


# ------------------------------------------------------------------------------------------- internals


def _place(name: str | Path, revision: str | None) -> Path:
    """The local folder of a model, or a lone file of weights."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.name.endswith((*LONE_FILES, INDEX)):
        if path.is_file():
            return path
        raise FileNotFoundError(f"{path}: no such file of weights")  # or it might be taken for a Hub repository
    return packaged_models().get(str(name)) or find_folder(name, revision)


def _describe(name: str, path: Path) -> Found:
    if path.is_dir():
        return _describe_folder(name, path)
    stored = open_weights(path)
    layout = _recognised(path, {}, stored.blank.keys())
    if layout is not None:
        return Found(name, path, layout, reader(layout).KIND)
    beside = f"; or give its folder, {path.parent}" if (path.parent / CONFIG_NAME).is_file() else ""
    raise ValueError(
        f"{path}: weights of no model that imgtok reads a lone file of: {_layouts_in_words()}{beside} "
        f"(found: {', '.join(list(stored)[:4])})"
    )


def _describe_folder(name: str, folder: Path) -> Found:
    path = folder / CONFIG_NAME
    data = read_json(path)
    if "kind" in data and "format" in data:
        version, written_by = data.pop("format"), data.pop("imgtok_version", "unknown")
        if version != FORMAT:
            raise ConfigError(
                f"{path}: format {version!r}, written by imgtok {written_by}; imgtok {imgtok.__version__} reads "
                f"format {FORMAT}. Install a matching release"
            )
        return Found(name, folder, OURS, data["kind"], data)
    layout = _recognised(path, data, set())
    if layout is None:
        written = f" (it is of a {data['_class_name']})" if "_class_name" in data else ""
        raise ConfigError(
            f"{path}: not written by imgtok: it lacks the fields 'format' and 'kind'; nor is it that of another model "
            f"that imgtok reads: {_layouts_in_words()}{written}"
        )
    return Found(name, folder, layout, reader(layout).KIND, data)


def _recognised(path: Path, description: Mapping[str, Any], names: Set[str]) -> str | None:
    """The one layout that a config.json, or the names of the tensors in a lone file, are of.

    Raises ValueError where several modules take it for theirs.
    """
    layouts = [layout for layout in READERS if reader(layout).recognise(description, names)]
    if len(layouts) > 1:
        raise ValueError(
            f"{path}: could be in any of the published layouts {' and '.join(layouts)}; keep what one model needs"
        )
    return layouts[0] if layouts else None


def _layouts_in_words() -> str:
    return ", ".join(reader(layout).LOOKS_LIKE for layout in READERS)


def _load_ours(
    found: Found, model_class: type[Any], map_location: str | torch.device, dtype: torch.dtype | None
) -> Any:
    config = from_dict(model_class.config_class, found.config, str(found.path / CONFIG_NAME))
    stored = found.weights()
    model = skeleton(lambda: model_class(config))
    check_tensors(stored.blank, model.state_dict(), stored.path, f"{model_class.__name__} that {CONFIG_NAME}")
    return fill(model, stored.items(), map_location=map_location, dtype=dtype)


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
