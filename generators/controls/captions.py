"""Controls of prompts that act on captions before a generator is trained on them, as they will on its prompts.

There is no image to look at, and nothing that could be asked: only controls that are done once they have started can
act here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imgtok.generators.controls.scene import Anchor, Prompt, PromptControl, Texts
from imgtok.text.captions import Captions
from imgtok.text.parsing import parse

logger = logging.getLogger(__name__)


def check_before_images(controls: Sequence[PromptControl]) -> None:
    """Raises ValueError for a control that does anything after it has started."""
    for control in controls:
        if not control.done_at_start:
            raise ValueError(
                f"controls: {control.config.kind} acts while images are drawn, and captions have none; name it in "
                "`imgtok sample` or `imgtok evaluate shapes`"
            )


def all_controlled(
    controls: Sequence[PromptControl], captions: Mapping[str, Captions], encode: Callable[[str], Captions]
) -> dict[str, Captions]:
    """Captions by their text after controls acted on them. Those on which they cannot act stay as they are, of which a
    warning says how many: the parser is not sure of them, or they were cut off.

    `encode` is that of the text encoder.
    """
    found, left = dict(captions), []
    for text, one in captions.items():
        try:
            found[text] = controlled(controls, text, one, encode)
        except ValueError as error:
            left.append(error)
    if left:
        logger.warning("controls: %d of %d captions stay as they are: %s", len(left), len(captions), left[0])
    return found


def controlled(
    controls: Sequence[PromptControl], text: str, captions: Captions, encode: Callable[[str], Captions]
) -> Captions:
    """The features of one caption (1, T, W) after controls acted on them; an empty one stays as it is.

    Raises ValueError where they cannot act.
    """
    if not text.strip():
        return captions
    scene = CaptionScene(text, captions, encode)
    for control in controls:
        control.start(scene)
    return Captions(scene.texts.states.to(captions.features.dtype), captions.mask, spans=captions.spans)


class CaptionScene:
    """One caption: the `Scene` of controls without an image."""

    def __init__(self, text: str, captions: Captions, encode: Callable[[str], Captions]) -> None:
        """Raises ValueError for captions without spans."""
        if captions.spans is None:
            raise ValueError("controls: the captions do not say which characters their columns stand for")
        self.prompts: Sequence[Prompt] = [Prompt(parse(text), captions.spans[0])]
        self._encode = encode
        self.texts = self._texts(captions)
        self.images: Sequence[int] = [0]
        self.latents: Tensor | None = None
        self.once = False
        self.step, self.steps = -1, 0
        self.grid: tuple[int, int] | None = None
        self.notes: list[dict[str, Any]] = []
        self.bind_step: float | None = None

    def encode(self, prompts: Sequence[str]) -> Texts:
        """See `Scene`."""
        return self._texts(Captions.cat([self._encode(prompt) for prompt in prompts]))

    def maps(self, texts: Texts, rows: Tensor, latents: Tensor | None = None) -> Tensor:
        """Nothing is drawn."""
        raise NotImplementedError

    def coming_maps(self, weighted: Callable[[Texts], Texts], told: Callable[[Tensor], None]) -> None:
        """Nothing is drawn."""
        raise NotImplementedError

    def redraw(self) -> None:
        """Nothing is drawn."""
        raise NotImplementedError

    def anchor(self, rows: Tensor, phrases: Sequence[str], *, published: bool, last: bool = False) -> Anchor:
        """Nothing is drawn."""
        raise NotImplementedError

    def _texts(self, captions: Captions) -> Texts:
        states = captions.features.float()
        return Texts(states, captions.mask, torch.zeros_like(states[0]))
