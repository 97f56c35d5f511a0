"""What is asked of the images of the shapes benchmark: sentences, what they assert, and the scenes that they are of.

`items_of` makes those of a split of the built-in world; `items_in` reads the captions of somebody's folder of images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imgtok.data.files import list_folder, stem_of
from imgtok.data.sources import caption_of, read_bytes
from imgtok.metrics.saved_images import RECORD
from imgtok.shapes.captions import Facts, caption, facts_of, true_facts
from imgtok.shapes.world import RADII, SIZES, Scene, ShapesConfig, sample_scenes

METADATA = "metadata.jsonl"
NEEDED = {"same_shape": 2, "swap": 2, "relation": 2, "crowd": 4, "holding": 2}
"""Objects of every scene of a split, more than one."""
_ROOM = 0.135
"""The largest radius of which four objects surely find room."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One caption of a split."""

    index: int
    """Place in the split."""
    text: str
    facts: Facts
    scene: Scene | None = None
    """What the caption describes; None for captions of files."""
    path: Path | None = None
    """The image, of files."""
    noise: int
    """The index whose random numbers its image is drawn with: the two captions of a swap pair share them."""


def profile_of(data: ShapesConfig, split: str) -> ShapesConfig:
    """The scenes of a split: those of `data` with its sizes, textures and scale, and as many objects as it needs.

    Four objects have the smallest of the sizes, at a scale at which there is room for them; objects that hold others
    are solid and large, at the world's own scale.
    """
    most = max(data.max_objects, NEEDED.get(split, 1))
    if split == "holding":
        large = replace(data, sizes=("large",), textures=("solid",), scale=1.0)
        return replace(large, mode="text", split="holding", max_objects=most)
    holding = data.holding if split in ("val", "novel") else 0.0
    chosen = replace(data, mode="text", split=split, max_objects=most, holding=holding)  # type: ignore[arg-type]
    if split != "crowd":
        return chosen
    smallest = min(data.sizes, key=SIZES.index)
    return replace(chosen, sizes=(smallest,), scale=min(data.scale, _ROOM / RADII[SIZES.index(smallest)]))


def items_of(data: ShapesConfig, split: str, num: int, *, everything: bool = False) -> list[Item]:
    """The first `num` captions of a split. With `everything` all that is true of the scene is asked for, and not what
    the caption says: for images that are reconstructions of the scene.
    """
    found, profile = [], profile_of(data, split)
    for index, scene in enumerate(sample_scenes(profile, range(num))):
        said = caption(scene, split, index)
        facts = true_facts(scene) if everything else said.facts
        if profile.scale != data.scale:  # a size is one of another scale, and says nothing
            held = tuple(replace(one, object=replace(one.object, size=None)) for one in facts.held)
            facts = replace(facts, objects=tuple(replace(one, size=None) for one in facts.objects), held=held)
        noise = index // 2 if split == "swap" else index
        found.append(Item(index=index, text=said.text, facts=facts, scene=scene, noise=noise))
    return found


def groups_of(items: Sequence[Item], split: str) -> list[int]:
    """Which items belong together, for intervals: the two of a swap pair, and otherwise each alone."""
    return [item.index // 2 if split == "swap" else item.index for item in items]


def folders_in(path: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Split -> folder of its images: the folders of `path` that are called as the splits, or else `path` itself."""
    if not path.expanduser().is_dir():
        raise FileNotFoundError(f"images: {path} is no folder; give one of images with captions ({METADATA})")
    inside = {split: path.expanduser() / split for split in splits}
    there = {split: folder for split, folder in inside.items() if folder.is_dir()}
    return there or {"images": path.expanduser()}


def items_in(folder: Path, num: int | None = None) -> list[Item]:
    """The images of a folder with what their captions assert, in the order of their names; the first `num`.

    Captions are those of `metadata.jsonl` (file_name, text), of `imgtok sample` (the prompts of `samples.json`), or of
    a file NAME.txt beside each NAME.png. Raises ValueError for a folder without captions, an image without one, and a
    caption that is no sentence about shapes.
    """
    texts = _captions(folder)
    found: list[Item] = []
    for name in sorted(texts):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: has a caption, and is not there")
        try:
            facts = facts_of(texts[name])
        except ValueError as error:
            raise ValueError(f"{path}: {error}; the benchmark reads sentences about shapes alone") from None
        index = len(found)
        found.append(Item(index=index, text=texts[name], facts=facts, path=path, noise=index))
        if num is not None and len(found) == num:
            break
    if not found:
        raise ValueError(f"{folder}: its list of captions is empty; captions are a line an image in {METADATA}")
    return found


def _captions(folder: Path) -> dict[str, str]:
    """Name of a file -> its caption."""
    if (folder / METADATA).is_file():
        texts: dict[str, str] = {}
        for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{folder / METADATA}: line {number} is no JSON: {error}") from None
            if not isinstance(row, dict) or not {"file_name", "text"} <= row.keys():
                raise ValueError(f"{folder / METADATA}: line {number} has no file_name and text")
            texts[str(row["file_name"])] = str(row["text"])
        return texts
    if (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        prompts = record.get("request", {}).get("prompts") or []
        if not prompts:
            raise ValueError(f"{folder / RECORD}: these images were drawn for classes and have no captions")
        return {f"{number:06d}.png": prompts[label] for number, label in enumerate(record["labels"])}
    listing = list_folder(folder)
    names = [entry.name for entry in listing.images]
    beside = {name: folder / f"{stem_of(name)}.txt" for name in names}
    if not names or not all(path.is_file() for path in beside.values()):
        lonely = next((name for name, path in beside.items() if not path.is_file()), None)
        what = f"{lonely} has no caption" if lonely else "holds no images"
        raise ValueError(
            f"{folder}: {what}; captions are {METADATA} with file_name and text, or a file NAME.txt beside each image"
        )
    return {name: caption_of(read_bytes(str(path)), str(path)) for name, path in beside.items()}
