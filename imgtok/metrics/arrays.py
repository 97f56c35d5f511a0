"""Images in NumPy files: which axis is which, and which numbers are colours. Nothing is ever unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

SUFFIXES = (".npy", ".npz")
Values = Literal["0..1", "-1..1"]
"""What 0 % and 100 % of a colour are in an array of floats."""

_LOOKED_AT = 16  # images whose values tell what the numbers of an array are
_BEYOND = 0.1  # share of the range by which a colour may leave it, as decoders' output does before it is clamped


class ArrayImages:
    """The images of an array (N, H, W, 3) or (N, 3, H, W), or in grey (N, H, W), (N, H, W, 1) or (N, 1, H, W)."""

    def __init__(self, array: np.ndarray, where: str, values: Values | None = None) -> None:
        """`where` the array stands, for messages; `values` says what floats are. Raises ValueError for an array of
        another shape or type, and for floats of which that is not said.
        """
        self._array, self._where, self._values = array, where, values
        self._layout = _layout(array, where)
        if array.dtype != np.uint8 and len(array):
            self._check_values()

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> np.ndarray:
        """One image, uint8 (H, W, 3). Raises ValueError for floats outside of their range."""
        image = np.array(self._array[index])
        if image.dtype != np.uint8:
            image = self._to_uint8(image, index)
        if self._layout == "channels first":
            image = image.transpose(1, 2, 0)
        elif self._layout == "grey":
            image = np.repeat(image.reshape(*_without_ones(image.shape), 1), 3, axis=2)
        return image

    def _to_uint8(self, image: np.ndarray, index: int) -> np.ndarray:
        low, high = _range(self._values)
        slack = _BEYOND * (high - low)
        if not np.isfinite(image).all() or image.min() < low - slack or image.max() > high + slack:
            found = f"image {index} has values from {image.min():.4g} to {image.max():.4g}"
            raise ValueError(
                f"{self._where}: {found}, outside of array_values={self._values}; clip them, or say otherwise"
            )
        share = (image.astype(np.float64).clip(low, high) - low) / (high - low)
        return np.asarray((share * 255).round().astype(np.uint8))

    def _check_values(self) -> None:
        """That it is known what the numbers are."""
        array, count = self._array, len(self._array)
        some = np.asarray(array[np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(int)])
        if array.dtype.kind != "f":
            raise ValueError(
                f"{self._where}: {array.dtype} {array.shape} with values from {some.min()} to {some.max()}; images are "
                "scored as uint8 from 0 to 255: save it with array.astype('uint8') if that is what they are"
            )
        low, high = float(some.min()), float(some.max())
        if self._values is None:
            what = f"{array.dtype} {array.shape} with values from {low:.4g} to {high:.4g}"
            raise ValueError(f"{self._where}: {what}; images are scored as uint8 from 0 to 255: {_remedy(low, high)}")
        if self._values == "-1..1" and low >= 0:
            raise ValueError(
                f"{self._where}: array_values=-1..1, but no value of the {len(some)} images looked at is below 0 "
                f"(from {low:.4g} to {high:.4g}); is it array_values=0..1?"
            )
        for index, image in enumerate(some):
            self._to_uint8(image, index)


def _remedy(low: float, high: float) -> str:
    if low >= 0 and high <= 1:
        return "array_values=0..1 takes them as colours from 0 to 1 (or array_values=-1..1, if they are from -1 to 1)"
    if low >= -1 and high <= 1:
        return "array_values=-1..1 takes them as colours from -1 to 1"
    if low >= 0 and high <= 255:
        return "save them with array.round().astype('uint8')"
    return "bring them to that range and save them with array.round().clip(0, 255).astype('uint8')"


def _range(values: Values | None) -> tuple[float, float]:
    return (-1.0, 1.0) if values == "-1..1" else (0.0, 1.0)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of a grey image (H, W), (H, W, 1) or (1, H, W)."""
    return shape if len(shape) == 2 else shape[:2] if shape[2] == 1 else shape[1:]


def _layout(array: np.ndarray, where: str) -> Literal["channels last", "channels first", "grey"]:
    shape = array.shape
    if len(shape) == 4 and shape[3] == 3:
        return "channels last"
    if len(shape) == 4 and shape[1] == 3:
        return "channels first"
    if len(shape) == 4 and 1 in (shape[3], shape[1]):
        return "grey"
    if len(shape) == 3 and shape[0] != 3 and shape[2] not in (3, 4):
        return "grey"
    hint = ""
    if len(shape) == 3:
        hint = "; one image is an array of one, array[None], and grey images of this shape are array[..., None]"
    elif len(shape) == 4 and 4 in (shape[3], shape[1]):
        hint = "; leave the fourth channel out, array[..., :3]" if shape[3] == 4 else "; leave it out, array[:, :3]"
    expected = "(N, H, W, 3) or (N, 3, H, W), or in grey (N, H, W)"
    raise ValueError(f"{where}: is {array.dtype} {shape}, and images are {expected}{hint}")


# ---------------------------------------------------------------- files


def open_npz(path: Path) -> np.lib.npyio.NpzFile:
    """The file, without unpickling anything. Raises ValueError when it is damaged."""
    try:
        arrays = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: holds a single array, not an .npz archive; call it .npy")
    return arrays


def read_array(arrays: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    """One array of an .npz. Raises ValueError when it is damaged, or holds objects, which would be unpickled."""
    try:
        return np.asarray(arrays[name])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {name} cannot be read ({error})") from error


def open_npy(path: Path) -> np.ndarray:
    """The array, memory-mapped. Raises ValueError when the file is damaged, or holds objects."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: holds several arrays, as an .npz does; call it .npz")
    return array
