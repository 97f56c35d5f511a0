"""imgtok: variable-length image tokenizers, and what every generator, trainer and sampler shares.

`imgtok.load(name)` opens any model of the suite, `imgtok.pipeline(name)` a generator with its tokenizer, which goes
from a class or a prompt to images. Importing the package imports no torch, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgtok.generators.pipeline import Pipeline, pipeline
    from imgtok.hub import load
    from imgtok.pictures import preprocess, to_pil
    from imgtok.tokenizers.tokens import Tokens

__version__ = "0.1.0"
__all__ = ["Pipeline", "Tokens", "__version__", "load", "pipeline", "preprocess", "to_pil"]

PUBLIC = {
    "Pipeline": "imgtok.generators.pipeline",
    "Tokens": "imgtok.tokenizers.tokens",
    "load": "imgtok.hub",
    "pipeline": "imgtok.generators.pipeline",
    "preprocess": "imgtok.pictures",
    "to_pil": "imgtok.pictures",
}
"""Public name -> the module that has it, imported when the name is first used (PEP 562)."""

# In a checkout, generators/, train/ and sample/ lie beside this folder, and links in it make them parts of the package.
if not (Path(__file__).parent / "generators").is_dir():  # links are lost where the file system or archive has none
    __path__.append(str(Path(__file__).resolve().parent.parent))


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'imgtok' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    parts = (name for name, value in globals().items() if getattr(value, "__name__", "") == f"imgtok.{name}")
    return sorted({*__all__, *parts, *(name for name in globals() if name.startswith("__"))})
