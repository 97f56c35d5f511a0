"""imgtok: variable-length image tokenizers, and what every generator, trainer and sampler shares.

`imgtok.load(path_or_hub_name)` opens any model of the suite. Importing the package imports no torch, so
that the command line answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from imgtok.hub import load

# In a checkout, generators/, train/ and sample/ lie beside this folder, and links in it make them parts of the package.
if not (Path(__file__).parent / "generators").is_dir():  # links are lost where the file system or archive has none
    __path__.append(str(Path(__file__).resolve().parent.parent))


def __getattr__(name: str) -> Any:
    """Import `load`, and torch with it, at its first use (PEP 562)."""
    if name == "load":
        from imgtok.hub import load

        return load
    raise AttributeError(f"module 'imgtok' has no attribute {name!r}")
