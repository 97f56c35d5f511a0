"""Files of `torch.save`, read as data: tensors, numbers, text and containers of them. Nothing in a file runs.

`weights_only=True` refuses every class that it does not know. One more is let in here, argparse.Namespace, which
training programs like to store beside their weights. Of such an object only its attributes are restored, and these
are read under the same rule: it is a dictionary by another name, and has no method that reading calls.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


def load_pickle(path: Path) -> Any:
    """What is in a file of `torch.save`. Its tensors are mapped from the file: only those that are used are read.

    Raises ValueError, which says what to do, for a file with anything else in it and for one that is not whole.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path}: not a file of weights alone: it needs {found[1]}, and imgtok runs no code from a file. If "
                "you trust its source, keep only the weights, on the machine that wrote it: stored = torch.load(OLD, "
                "weights_only=False); torch.save({name: stored[name] for name in ('model', 'model_ema') if name in "
                "stored}, NEW)"
            ) from error
        raise ValueError(
            f"{path}: not a whole file of torch.save with weights alone ({path.stat().st_size} bytes); copy or "
            "download it again"
        ) from error
