"""imgtok: variable-length image tokenizers, and what every generator, trainer and sampler shares.

`imgtok.load(path_or_hub_name)` opens any model of the suite. Importing the package imports no torch, so
that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from imgtok.hub import load


def __getattr__(name: str) -> Any:
    """Import `load`, and torch with it, at its first use (PEP 562)."""
    if name == "load":
        from imgtok.hub import load

        return load
    raise AttributeError(f"module 'imgtok' has no attribute {name!r}")
