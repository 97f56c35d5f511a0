"""The configurations that ship with imgtok, `configs/` of its repository, by names such as `tiny/flextok`."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path

SUFFIXES = (".yaml", ".yml")


def folder() -> Path:
    """Where they lie: in the package, through a link in a checkout; beside the package where links were lost."""
    package = Path(str(resources.files("imgtok")))
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def configurations() -> dict[str, Path]:
    """Name -> file, in order of the names."""
    root = folder()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find(name: str) -> Path | None:
    """The file of the configuration that a name means: `tiny/flextok`, `tiny/flextok.yaml` or, as in the documents,
    `configs/tiny/flextok.yaml`. None for any other name.
    """
    return configurations().get(_bare(name))


def like(name: str) -> str | None:
    """The name that is most like a mistyped one, as it would have been written; None if none is like it."""
    close = difflib.get_close_matches(_bare(name), configurations(), n=1, cutoff=0.8)
    return f"{close[0]}.yaml" if close and name.endswith(SUFFIXES) else close[0] if close else None


def about(path: Path) -> str:
    """What the first words of its comment say, up to the first full stop or colon."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text or text.startswith("imgtok "):
            break
        lines.append(text)
    return re.split(r"\.(?: |$)", " ".join(lines), maxsplit=1)[0]


def _bare(name: str) -> str:
    return name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
