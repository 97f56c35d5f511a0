"""Where a name of a model leads: to a folder or a file on this machine, or to a repository of the Hugging Face Hub.

Nothing here needs torch or opens weights, so that a program can refuse a mistyped name before it has imported anything.
`imgtok.hub` tells what stands at the place.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from imgtok import runs

SAFETENSORS = ".safetensors"
INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")
"""How the name of the index of weights in shards ends; diffusers puts the name of a variant into it."""
_SURE = 0.9
"""How like (`difflib`) a name must be to one that is here to count as mistyped; others are looked for on the Hub."""
_ADDRESS = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?)([\w.-]+/[\w.-]+)")
PICKLES = (".ckpt", ".pth", ".pt", ".bin")
LONE_FILES = (SAFETENSORS, *PICKLES)
"""How the name of a file of weights can end."""


@dataclass(frozen=True)
class Repository:
    """A place on the Hub."""

    name: str
    """"owner/name"."""
    inside: str = ""
    """A folder or a file of weights in it, such as "vae"; empty for its root."""

    def __str__(self) -> str:
        return f"{self.name}/{self.inside}".rstrip("/")


def find(name: str | Path) -> Path | Repository:
    """The folder of the one model, or the file of weights, that a name means; or the place on the Hub that it may mean.

    A training run means its finished model or its newest checkpoint (`runs.follow`); a folder of a diffusers pipeline
    means its autoencoder. Raises FileNotFoundError, with what is there, for a name that can mean nothing.
    """
    if not str(name).strip():
        raise FileNotFoundError("the name of a model is empty; give a folder, or a Hub name 'owner/name'")
    path = Path(name).expanduser()
    if path.is_dir():
        return _autoencoder_inside(runs.follow(path))
    if is_weights(path) and path.is_file():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; give the folder that holds config.json and model.safetensors")
    return packaged_models().get(str(name)) or _elsewhere(str(name), path)


def check(name: str | Path) -> None:
    """Raise FileNotFoundError for a name that leads to no model: no place here, and no repository of the Hub or its
    cache, or a folder without one.

    Where the Hub cannot be reached and the cache has nothing, the message says so.
    """
    place = find(name)
    if isinstance(place, Path):
        if place.is_dir() and not (place / "config.json").is_file() and not runs.is_checkpoint(place):
            raise FileNotFoundError(not_a_model(place))
        return
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        snapshot_download(place.name, local_files_only=True)
    except Exception:  # not in the cache, in the words of whichever release is installed
        try:
            HfApi().model_info(place.name, timeout=10)
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(no_repository(place)) from error
        except Exception as error:
            raise FileNotFoundError(unreachable(place, error)) from error


def no_repository(place: Repository) -> str:
    """What to say of a name that is none of the Hub's."""
    return (
        f"there is no model folder {str(place)!r} here, and no such repository on the Hugging Face Hub (for a private "
        f"one, log in with `hf auth login`){_near_by(place)}"
    )


def unreachable(place: Repository, error: Exception) -> str:
    """What to say of a name that cannot be looked up."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"there is no model folder {str(place)!r} here, it is not in the local Hugging Face cache, and the Hub cannot "
        f"be reached: {reason}{_near_by(place)}"
    )


def is_weights(path: Path) -> bool:
    """Whether the name of a file is one of weights, or of the index of their shards."""
    return path.name.endswith(LONE_FILES) or INDEX.search(path.name) is not None


def packaged_models() -> dict[str, Path]:
    """Name -> folder of what ships with imgtok, such as "shapes32"."""
    root = Path(str(resources.files("imgtok"))) / "assets"
    return {path.name.removeprefix("vae-"): path for path in sorted(root.glob("vae-*"))}


def _autoencoder_inside(folder: Path) -> Path:
    """`folder`, or its `vae/` where it is that of a whole pipeline of diffusers, of which nothing else is used here."""
    inside = folder / "vae"
    pipeline = (folder / "model_index.json").is_file() and not (folder / "config.json").exists()
    return inside if pipeline and (inside / "config.json").is_file() else folder


def repository(name: str) -> Repository:
    """The place on the Hub that a name means if it means none here. Raises FileNotFoundError for one that cannot be."""
    if address := _ADDRESS.match(name):
        raise FileNotFoundError(
            f"there is no model folder {name!r} here; a repository of the Hub is given by its name alone: {address[1]}"
        )
    path = Path(name).expanduser()
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w./-]+?))?/?", name)
    if match is None or ".." in path.parts or (is_weights(path) and not match[2]):
        raise FileNotFoundError(
            f"{_absent(name)}{_beside(path)} (a Hub name looks like 'owner/name', and imgtok ships "
            f"{', '.join(packaged_models())})"
        )
    return Repository(match[1], match[2] or "")


def _absent(name: str) -> str:
    return f"{name}: no such file of weights" if is_weights(Path(name)) else f"there is no model folder {name!r}"


def _elsewhere(name: str, path: Path) -> Repository:
    """The place on the Hub that a name means which leads nowhere here. Raises FileNotFoundError for one that was surely
    meant to lead to a place here: what lies beside it says so.
    """
    found, first = repository(name), path.parts[0]
    if Path(first).is_dir():
        raise FileNotFoundError(
            f"{_absent(name)}{_beside(path)} (not looked for on the Hub, since a folder {first}/ lies here)"
        )
    meant, whole = _corrected(path, _SURE)
    if whole:
        raise FileNotFoundError(f"{_absent(name)}; did you mean {meant}? (not looked for on the Hub)")
    return found


def not_a_model(folder: Path) -> str:
    """What to say of a folder that is there and holds no model: what it has, and the models that lie in it."""
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    inside = _models_in(folder)
    hint = f"; did you mean {' or '.join(map(str, inside[:3]))}?" if inside else ""
    if not inside and any(entry.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") for entry in folder.iterdir()):
        hint = f"; a folder of images is given as data.kind=folder data.path={folder}, beside a model"
    return f"{folder} is not a model folder: it has no config.json (found: {found}){hint}"


def _beside(path: Path) -> str:
    """What lies where `path` should be, for a message: the path that it is most like, or else what there is."""
    meant, whole = _corrected(path)
    if whole:
        inside = [] if not meant.is_dir() or _is_model(meant) else _models_in(meant)
        return f"; did you mean {inside[0] if len(inside) == 1 else meant}?"
    if meant == Path() and len(path.parts) < 2:
        near = difflib.get_close_matches(path.name, packaged_models(), n=1)
        return f"; did you mean {near[0]}?" if near else ""  # what else lies in the working folder tells nothing
    names = sorted(entry.name for entry in meant.iterdir() if not entry.name.startswith("."))
    return f"; {meant} has {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"


def _near_by(place: Repository) -> str:
    """What to add where a name is none of the Hub's either: the path here that it is like, if there is one."""
    meant, whole = _corrected(Path(str(place)))
    return f"; did you mean {meant}?" if whole else ""


def _corrected(path: Path, cutoff: float = 0.6) -> tuple[Path, bool]:
    """The folder or file to which the parts of a path lead, or else the names that are most like them; and whether all
    parts lead on. If not, it is the last folder. `cutoff` in [0, 1] is how like names must be, as `difflib` has it.
    """
    found = Path(path.anchor)
    for part in path.relative_to(found).parts:
        near = [part] if (found / part).exists() else _near(Path(part), found, cutoff)
        if not near:
            return found, False
        if not (found / near[0]).is_dir() and part != path.name:
            return found, False
        found = found / near[0]
    return found, True


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or runs.is_checkpoint(folder) or (folder / runs.FINAL).is_dir()


def _models_in(folder: Path) -> list[Path]:
    """Models and runs in a folder and in the folders in it."""
    levels = (folder.glob(pattern) for pattern in ("*", "*/*"))
    return next((models for level in levels if (models := sorted(filter(_is_model, level)))), [])


def _near(path: Path, folder: Path, cutoff: float) -> list[str]:
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    return difflib.get_close_matches(path.name, names, n=1, cutoff=cutoff)
