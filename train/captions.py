"""What training on captions takes, the same for a generator of tokens and one of latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgtok.data.captions import CaptionCacheInfo, CaptionDataset
from imgtok.data.latents import LatentDataset, Latents
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenDataset
from imgtok.generators.conditioning import Condition
from imgtok.pictures import can_write


def open_captions(folder: Path | None, images: TokenDataset | Latents) -> CaptionDataset | None:
    """The text features in a folder, of the images that tokens or latents are of; None without one.

    Raises ValueError for latents that do not say which images they are of, FileNotFoundError or DataError for a folder
    that holds no text features or those of other images.
    """
    if folder is None:
        return None
    if not isinstance(images, TokenDataset | LatentDataset):
        raise ValueError(
            f"text: the latents in {images.folder} do not say which images they are of, so no caption can be found for "
            "them; make them with `imgtok cache latents`"
        )
    captions = CaptionDataset(folder)
    captions.check_matches(images)
    return captions


def check_same_encoder(given: CaptionCacheInfo, wanted: CaptionCacheInfo) -> None:
    """Raises DataError for text features to validate on that come from another encoder than those of training, or that
    other controls acted on.
    """
    if (given.fingerprint, given.width) != (wanted.fingerprint, wanted.width):
        raise DataError(
            f"validation_text: features of {given.encoder} ({given.fingerprint}), and text has those of "
            f"{wanted.encoder} ({wanted.fingerprint}); make them with `imgtok cache text encoder={wanted.encoder}`"
        )
    if given.controls != wanted.controls:
        mine, theirs = (", ".join(one.controls) or "none" for one in (given, wanted))
        raise DataError(
            f"validation_text: features with controls of prompts {mine}, and text has those with {theirs}; make them "
            f"with `imgtok cache text controls={','.join(wanted.controls) or '[]'}`"
        )


def digest_with(digest: str, captions: CaptionDataset | None) -> str:
    """That of tokens or latents, joined by that of the captions if there are any."""
    return digest if captions is None else f"{digest}-{captions.info.digest}"


def condition_facts(
    num_classes: int, captions: CaptionDataset | None, class_names: Sequence[str] = ()
) -> dict[str, Any]:
    """What classes or captions decide of a generator's configuration, for `imgtok.sections.Section.over`."""
    if captions is None:
        names = {"condition.classes": tuple(class_names)} if class_names else {}
        return {"condition.num_classes": max(num_classes, 1)} | names
    return {
        "condition.text_width": captions.info.width,
        "condition.text_length": captions.info.max_length,
        "condition.empty_length": len(captions.empty),
        "condition.text_encoder": captions.info.encoder,
        "condition.controls": captions.info.controls,
    }


def preview_condition(
    count: int, num_classes: int, images: Tensor, captions: CaptionDataset | None, device: torch.device
) -> Condition:
    """What `count` images are drawn for: the classes in turn, or the captions of the first of `images` (N,)."""
    if captions is None:
        return torch.tensor([i % num_classes for i in range(count)], device=device)
    return captions.batch(_first(images, count)).to(device)


def preview_titles(count: int, model: Any, images: Tensor, captions: CaptionDataset | None) -> list[str]:
    """What a preview says of each of its images: the class, by name where the configuration of the `model` has names,
    or the image whose caption it was drawn for (a cache of captions holds no text).
    """
    if captions is not None:
        return [f"caption of image {index}" for index in _first(images, count)]
    names = [name if can_write(name) else "" for name in model.class_names]
    labels = [i % model.num_classes for i in range(count)]
    return [(names[label] if label < len(names) else "") or f"class {label}" for label in labels]


def _first(images: Tensor, count: int) -> list[int]:
    """`count` of the first images' indices, in turn."""
    first: Sequence[int] = images.unique()[:count].tolist()
    return [first[i % len(first)] for i in range(count)]
