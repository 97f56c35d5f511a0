"""`imgtok export`: a FlexTok from its published layout into ours, and from ours into the published one."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imgtok import published
from imgtok.cli import run_job
from imgtok.config import check
from imgtok.flextok import FlexTok
from imgtok.hub import load

logger = logging.getLogger(__name__)

POSITIONAL = "model"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes a FlexTok, of either layout, to a folder in the layout that is asked for; its numbers stay as they are."""

    job: Literal["export"] = "export"
    """Which program this file is for."""
    model: str
    """Model folder, Hub name, or lone .safetensors file of a published FlexTok."""
    out: Path
    """Folder of the new config.json and model.safetensors; files of these names in it are replaced."""
    layout: Literal["imgtok", "published"] = "published"
    """Whose: "imgtok" as every program here reads it, "published" as the code that FlexTok was published with does."""
    revision: str | None = None
    """Commit, branch or tag of a Hub repository; null takes the newest."""

    def __post_init__(self) -> None:
        check(self)


def main(config: Config) -> None:
    """Writes the folder `out`."""
    model = load(config.model, expect=FlexTok, revision=config.revision)
    if config.layout == "published":
        published.save(model, config.out)
    else:
        model.save_pretrained(config.out)
    logger.info("wrote %s in the layout %s", config.out, config.layout)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
