"""Names of models: what one leads to, and the model there; and folders of ours, on disk and on the Hugging Face Hub.

`resolve` follows a name once, at the door of a program: a folder, a training run or a checkpoint in it, a Hub
repository, an autoencoder that ships with imgtok, a folder of diffusers, a published folder or a lone published file.
What it gives, a `Found`, knows the kind of the model and its files, and is passed on in place of the name. `load` takes
either.

A model mixes in `Pretrained`, is built by `Class(config)` and keeps that frozen dataclass as `config`; this
gives it `save_pretrained`, `from_pretrained` and `push_to_hub`. Loading is strict (every tensor, every field), runs no
code from a file, and imports only the modules in the tables below; saving replaces files in one step, so a full disk
leaves the previous model readable.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections import ChainMap
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import RepositoryNotFoundError

import imgtok
from imgtok import runs
from imgtok.config import ConfigError, from_dict, to_dict
from imgtok.files import file_sha256, replacing
from imgtok.places import (
    SAFETENSORS,
    Repository,
    find,
    is_weights,
    no_repository,
    not_a_model,
    repository,
    unreachable,
)
from imgtok.sections import Settings
from imgtok.weights import (
    Weights,
    check_tensors,
    files_of,
    fill,
    find_weights,
    open_weights,
    skeleton,
    state_of,
    under_prefix,
    write_tensors,
)

TOKENIZERS: dict[str, str] = {
    "flextok": "imgtok.tokenizers.flextok:FlexTok",
    "karl": "imgtok.tokenizers.karl:KARL",
    "tokenbridge_tokenizer": "imgtok.tokenizers.tokenbridge:TokenBridgeTokenizer",
    "vq": "imgtok.tokenizers.vq:VQ",
}
AUTOENCODERS: dict[str, str] = {
    "vae": "imgtok.tokenizers.vae:VAE",
    "maskgit_vqgan": "imgtok.tokenizers.maskgit_vqgan:MaskGITVQGAN",
    "dcae": "imgtok.tokenizers.dcae:DCAE",
}
GENERATORS: dict[str, str] = {
    "gpt": "imgtok.generators.gpt:GPT",
    "xar": "imgtok.generators.xar:XAR",
    "tokenbridge": "imgtok.generators.tokenbridge:TokenBridge",
}
"""`kind` in config.json -> class. Strings, so that a module is imported when its kind is asked for and not before."""
KINDS: Mapping[str, str] = ChainMap(GENERATORS, TOKENIZERS, AUTOENCODERS)
"""All of them: a view, so that a line in one of the three tables is the whole entry of a new method."""

CONTROLS: dict[str, str] = {
    "uncontextualised": "imgtok.generators.controls.uncontextualised:Uncontextualised",
    "tome": "imgtok.generators.controls.tome:SemanticMerge",
    "frap": "imgtok.generators.controls.frap:AdaptiveWeights",
}
"""`kind` of a control of prompts -> class; see `imgtok.generators.controls.scene.PromptControl`."""

READERS: dict[str, str] = {
    "flextok": "imgtok.published.flextok",
    "karl": "imgtok.published.karl",
    "kl16": "imgtok.published.kl16",
    "maskgit_vqgan": "imgtok.published.maskgit_vqgan",
    "llamagen_vq": "imgtok.published.llamagen_vq",
    "diffusers": "imgtok.published.diffusers",
    "diffusers_dc": "imgtok.published.diffusers_dc",
    "xar": "imgtok.generators.published.xar",
    "tokenbridge": "imgtok.generators.published.tokenbridge",
    "llamagen": "imgtok.generators.published.llamagen",
}
"""A layout that models were published in -> the module that knows it. Such a module has

- `KIND`, the kind of the models in this layout, and `LOOKS_LIKE`, words for a message;
- `recognise(description, names) -> bool`: whether a folder's config.json, or the names of a lone file's tensors (the
  description is then what its header says), are in this layout. No two modules may both say so;
- `load(found, *, raw, map_location, dtype)`, the model of ours;
- where models can be written for the code that they were published with, `save(model, path)`."""

OURS, RUN = "imgtok", "run"
"""The layouts of our own: a finished model, and a checkpoint of a run, whose reader is `imgtok.checkpoints`."""
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
{{ example }}```

Its configuration is in `config.json`.

"""


class Pretrained(PyTorchModelHubMixin, library_name="imgtok", model_card_template=MODEL_CARD):
    """Gives a model `save_pretrained`, `from_pretrained` and `push_to_hub`.

    Use as `class VAE(nn.Module, Pretrained)` with `config_class = VAEConfig` (a dataclass with a `kind`)
    and `__init__(self, config: VAEConfig)` that sets `self.config`.
    """

    card_example: ClassVar[str] = ""
    """Lines of Python for its model card, that go on from `model`."""
    in_words: ClassVar[str] = "a model"
    """What a class that others derive from calls itself in messages, such as "a tokenizer"."""
    config_class: ClassVar[Any]
    config: Any

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return _any_tensor(self).device

    @property
    def dtype(self) -> torch.dtype:
        """The kind of number of its weights, in which it computes unless it is told otherwise."""
        return _any_tensor(self).dtype

    def adapt(self, stored: dict[str, torch.Tensor], start: Any) -> dict[str, str]:
        """Change in `stored`, weights of another model of this class with the configuration `start`, what has another
        shape there and can be fitted to this model, which has its first values still. Training calls it for `init`.

        Gives a sentence for the log by each name that was fitted or starts afresh. By default nothing is: every tensor
        of another shape is refused.
        """
        return {}

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
            names = {"kind": self.config.kind, "repo_id": repo_id or str(folder), **(model_card_kwargs or {})}
            names["example"] = self.card_example
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


def controls_of(controls: str | Sequence[Any], settings: Mapping[str, Any] | None = None) -> list[Any]:
    """Controls of prompts, each given by the name of its kind, by its configuration, or as it is.

    In whatever order they are given, they act in that of `CONTROLS`, and those that are not there after them: states
    are replaced before they are merged, and what is merged should be merged before weights are given to it.

    `settings` are those of controls that are given by name, a mapping (`Settings`, say) for each kind. Raises
    ValueError for a name that there is not or that stands twice, and for settings of a control that is not among them.
    """
    found, settings = [], dict(settings or {})
    for one in [controls] if isinstance(controls, str) else controls:
        kind = one if isinstance(one, str) else getattr(one, "kind", None)
        if kind is None:
            found.append(one)
        elif kind not in CONTROLS:
            raise ValueError(f"controls: given {kind!r}, must be one of {', '.join(CONTROLS)}")
        else:
            module, _, name = CONTROLS[kind].partition(":")
            made: type[Any] = getattr(importlib.import_module(module), name)
            config = made.config_class() if isinstance(one, str) else one
            found.append(made(Settings(**settings.pop(kind, {})).over(config, f"control_settings.{kind}")))
    if settings:
        left = next(iter(settings))
        raise ValueError(f"control_settings.{left}: there is no such control; say controls={left}, or leave it out")
    kinds = [type(one) for one in found]
    twice = next((kind.__name__ for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise ValueError(f"controls: {twice} stands there twice; give each control once")
    order = list(CONTROLS)
    places = [order.index(kind) if kind in order else len(order) for kind in map(_kind_of, found)]
    return [found[place] for place in sorted(range(len(found)), key=places.__getitem__)]


def _kind_of(control: Any) -> str | None:
    return getattr(getattr(control, "config", None), "kind", None)


@dataclass(frozen=True)
class Found:
    """A model that a name led to: where it is and what it is, without its weights. See `resolve`."""

    name: str
    """As it was given; of a run the folder in it that was taken, which goes on to mean this model."""
    path: Path
    """Its folder, or a lone file of weights."""
    layout: str
    """How it is written: "imgtok", "run", or a name in `READERS`."""
    kind: str
    """Key of `KINDS`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What its config.json says, less our header, or its run's config.yaml of the model; empty for a lone file."""

    @property
    def model_class(self) -> type[Any]:
        """Its class. Raises ConfigError for a kind that this release does not have."""
        try:
            return model_class(self.kind)
        except ValueError as error:
            raise ConfigError(f"{self.path / (runs.CONFIG if self.layout == RUN else CONFIG_NAME)}: {error}") from error

    @property
    def step(self) -> int | None:
        """The training steps behind it, where it stands in the folder of a run; None where that is not known."""
        return runs.step_of(self.path)

    @property
    def encodes_as(self) -> tuple[str, ...]:
        """The fingerprints of other models that give images the same tokens, or latents: those that it was trained
        after with `decoder_only`, as its identity.json says.
        """
        told = {} if self.path.is_file() else runs.identity_in(runs.identity_path(self.path))
        return tuple(told.get(runs.ENCODES_AS, ()))

    def about(self) -> dict[str, Any]:
        """What a record says of it: where it was found, and what tells it from any other."""
        found = {"path": str(self.path), "kind": self.kind, "step": self.step, "fingerprint": self.fingerprint()}
        return {"name": self.name, **found}

    @property
    def in_words(self) -> str:
        """Its name, and in brackets its kind and how long it was trained, as the line says that a job begins with."""
        steps = "" if self.step is None else f", step {self.step}"
        return f"{self.name} ({self.kind}{steps})"

    def check(self, expect: type[Any]) -> None:
        """Raises ValueError unless its class is `expect` or derived from it."""
        found = self.model_class
        if not issubclass(found, expect):
            ours = self.layout in (OURS, RUN)
            what = f"{found.__name__} (kind {self.kind!r})" if ours else f"published {found.__name__}"
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
        """A model that is kept inside this one's folder, as a generator keeps its tokenizer or autoencoder; of a
        checkpoint that which its run names.

        Raises FileNotFoundError where there is none, ValueError where another one is now.
        """
        if self.layout == RUN:
            inside: Found = reader(RUN).part(self, name)
            return inside
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

    @property
    def files(self) -> list[Path]:
        """All files of its weights, an index among them. Raises FileNotFoundError where it has none."""
        return reader(RUN).files(self) if self.layout == RUN else files_of(self.weights_path)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with its weights or its configuration."""
        text = json.dumps(self.config, sort_keys=True) + self.weights_sha256()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def weights_sha256(self) -> str:
        """The SHA-256 of its file of weights; where there are several, such as shards, that of all of theirs."""
        hashes = [file_sha256(path) for path in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def resolve(name: str | Path | Found, *, revision: str | None = None, expect: type[Any] | None = None) -> Found:
    """What a name of a model leads to. Follow a name once, and pass on what this gives; a `Found` is given back.

    A name is the path of a folder or of a file of weights, a Hub repository "owner/name" (downloaded, at `revision`) or
    a folder or file in one, "owner/name/vae", or that of an autoencoder that ships with imgtok, such as "shapes32". Its
    layout is ours, or one of those in `READERS`: a folder of diffusers, a published FlexTok, `kl16.ckpt`, `xAR-B.pth`.
    The folder of a training run means its finished model or, before that, its newest checkpoint; `RUN/checkpoints` and
    `RUN/checkpoints/step_0001000` mean what they say, with averaged weights. `expect` is the class (or base
    class) that the caller can use. Raises FileNotFoundError, ConfigError (config.json), or ValueError for another class
    than expected and for a file that no reader knows.
    """
    if not isinstance(name, str | Path | Found):
        raise ValueError(f"a model is named by a path or a Hub name 'owner/name', not by a {type(name).__name__}")
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

    Of a training checkpoint, ours or of published code, the averaged weights are taken, or with `raw` the trained ones.
    Weights become float32, or `dtype`. Damaged or unsuitable ones raise ValueError, a missing file FileNotFoundError.
    """
    found = resolve(name, revision=revision, expect=expect)
    if found.layout != OURS:
        return reader(found.layout).load(found, raw=raw, map_location=map_location, dtype=dtype)
    if raw:
        raise ValueError(
            f"raw: {found.path} holds one set of weights; trained ones beside averaged ones are in the checkpoints of "
            "its run, RUN/checkpoints/step_0001000"
        )
    return _load_ours(found, found.model_class, map_location, dtype)


def configuration(found: Found) -> Any:
    """The configuration of a model, without reading its weights. Raises ConfigError or ValueError."""
    if found.layout != OURS:
        return reader(found.layout).configuration(found)
    return from_dict(found.model_class.config_class, found.config, str(found.path / CONFIG_NAME))


def reader(layout: str) -> Any:
    """The module that knows a layout which is not that of our finished models; see `READERS`."""
    return importlib.import_module({RUN: "imgtok.checkpoints", **READERS}[layout])


def writers(kind: str) -> dict[str, Any]:
    """Layout -> module, of those that can write a model of this kind for the code that such models came with."""
    modules = {layout: reader(layout) for layout in READERS}
    return {name: module for name, module in modules.items() if kind == module.KIND and hasattr(module, "save")}


MODEL_FILES = ("*.json", "*.safetensors", "README.md")
"""What is downloaded of a repository, in the folder that is asked for and those inside it."""
ONLY_PICKLES = ("*.bin",)
"""What is downloaded besides where there is no safetensors file."""


def find_folder(name_or_path: str | Path, revision: str | None = None, *, files: Sequence[str] = MODEL_FILES) -> Path:
    """A local folder: the path itself, or the downloaded `files` of a Hub repository. Raises FileNotFoundError."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    return _download(repository(str(name_or_path)), revision, files)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError for anything else, FileNotFoundError with what is there instead."""
    folder = path.parent
    if not path.is_file() and path.name == CONFIG_NAME:
        raise FileNotFoundError(not_a_model(folder))
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


def _any_tensor(model: Any) -> torch.Tensor:
    """A floating-point parameter, or else a buffer; of a model without any, a number on the CPU."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    found: torch.Tensor = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
    return found


def _place(name: str | Path, revision: str | None) -> Path:
    """The local folder of a model, or a lone file of weights."""
    place = find(name)
    return place if isinstance(place, Path) else _download(place, revision)


def _describe(name: str, path: Path) -> Found:
    if path.is_dir():
        followed = Path(name).expanduser().is_dir() and Path(name).expanduser() != path
        return _describe_folder(str(path) if followed else name, path)
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
    if runs.is_checkpoint(folder):
        checkpoint: Found = reader(RUN).describe(name, folder)
        return checkpoint
    path = folder / CONFIG_NAME
    data = read_json(path)
    if "kind" in data and "format" in data:
        version, written_by = data.pop("format"), data.pop("imgtok_version", "unknown")
        if version != FORMAT:
            raise ConfigError(
                f"{path}: format {version!r}, written by imgtok {written_by}; imgtok {imgtok.__version__} reads "
                f"format {FORMAT}. Install a matching release"
            )
        if not isinstance(data["kind"], str):
            raise ConfigError(f"{path}: kind: given {data['kind']!r}, must be one of {', '.join(KINDS)}")
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
    wanted = model.state_dict()
    if stored.keys() != wanted.keys():  # unless the model itself has a part that is called as wrappers are
        exact = open_weights(stored.path, as_stored=True)
        stored = exact if exact.keys() == wanted.keys() else under_prefix(stored, wanted.keys())
    check_tensors(stored.blank, wanted, stored.path, f"{model_class.__name__} that {CONFIG_NAME}")
    return fill(model, stored.items(), map_location=map_location, dtype=dtype)


def _download(place: Repository, revision: str | None, files: Sequence[str] | None = None) -> Path:
    """A place of the Hub on this machine: a snapshot of what is needed of its repository, with `files` where given.

    From the local cache when the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = place.name
    try:  # one short question first: without a network, a download retries for most of a minute
        info = HfApi().model_info(name, revision=revision, timeout=10)
        patterns = [*files] if files is not None else _needed(place, _names_in(info))
        root = Path(snapshot_download(name, revision=info.sha, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(no_repository(place)) from error
    except Exception as error:  # no network, in the words of whichever HTTP library is installed
        try:
            root = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise FileNotFoundError(unreachable(place, error)) from error
    try:
        return _path_in(root / place.inside)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the repository {name!r} on the Hugging Face Hub: {error}") from error


def _path_in(path: Path) -> Path:
    found = find(path)
    assert isinstance(found, Path), "an absolute path is no name on the Hub"
    return found


def _names_in(info: Any) -> list[str]:
    """The files of a repository; empty where the Hub does not say."""
    return [entry.rfilename for entry in getattr(info, "siblings", None) or ()]


def _needed(place: Repository, names: Sequence[str]) -> list[str]:
    """Patterns of the files to download, of a repository that has the files `names`."""
    if is_weights(Path(place.inside)):
        return [place.inside]
    folder = f"{place.inside}/" if place.inside else ""
    index = []
    if f"{folder}model_index.json" in names and f"{folder}config.json" not in names:
        index = [f"{folder}model_index.json"]
        folder = f"{folder}vae/"  # of a pipeline of diffusers: its other models are of no use here, and large
    inside = [name for name in names if name.startswith(folder)]
    pickles = ONLY_PICKLES if inside and not any(name.endswith(SAFETENSORS) for name in inside) else ()
    return [*index, *(folder + pattern for pattern in (*MODEL_FILES, *pickles))]


def _brief(error: Exception) -> str:
    """The first line of an exception's text, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
