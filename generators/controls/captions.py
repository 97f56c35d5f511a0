"""Controls of prompts that act on captions before a generator is trained on them, as they will on its prompts.

There is no image to look at, and nothing that could be asked: only controls that are done once they have started can
act here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imgtok.generators.controls.scene import Anchor, Prompt, PromptControl, Texts
from imgtok.text.captions import Captions
from imgtok.text.parsing import parse


def controlled(
    controls: Sequence[PromptControl], text: str, captions: Captions, encode: Callable[[str], Captions]
) -> Captions | str:
    """The features of one caption (1, T, W) after controls acted on them, or why they cannot: the parser is not sure of
    it, or it was cut off.

    `encode` is that of the text encoder. Raises ValueError for a control that looks at images, hides words or weighs
    them.
    """
    if not text.strip():
        return captions
    try:
        scene = CaptionScene(text, captions, encode)
        runs = [control.start(scene) for control in controls]
    except ValueError as error:
        return str(error)
    if looking := [run.config.kind for run in runs if run.looks(scene) > 0]:
        raise ValueError(
            f"controls: {looking[0]} looks at images, and captions have none; name it when images are drawn"
        )
    if scene.texts.bias is not None or scene.texts.weights is not None:
        raise ValueError(
            "controls: words are hidden or weighed, which a cache of features cannot tell; name such controls when "
            "images are drawn"
        )
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
