"""Objects as the text encoder reads them alone, after "Follow the Flow" (arXiv 2504.01137).

A text encoder lets the words of a prompt look at each other, so that the state of "circle" in "a red circle and a blue
square" knows of blue, too. This control encodes the phrase of each object alone ("a red circle") and puts those states
in the place of the contextual ones. It needs one call of the text encoder for each object, no gradients, and no pass of
the generator.

That states leak between objects, and that states encoded alone repair it, is said by the paper's abstract, which is all
that could be read. Where they go and how long they are is ours: the same columns, piece by piece, with the length of
the states that they replace. The second finding of the paper, that one or two of an object's columns hold all of it, is
offered as `keep="head"`; its measure of redundancy is not known, and not built.

Shapes: B prompts of a batch, N phrases, T columns of a caption, D width of a state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from imgtok.config import Fraction, check
from imgtok.generators.controls.scene import ControlRun, Prompt, Scene, Texts
from imgtok.text.parsing import Entity


@dataclass(frozen=True, kw_only=True)
class UncontextualisedConfig:
    """Objects as the text encoder reads them alone. All defaults are ours."""

    kind: Literal["uncontextualised"] = "uncontextualised"
    """Which control this is."""
    strength: Fraction = 1.0
    """How far states go towards those of the phrase alone; 0 changes nothing."""
    length: Literal["kept", "alone"] = "kept"
    """Length of a state: that of the state which it replaces, or its own."""
    keep: Literal["all", "head"] = "all"
    """Which columns of an object are seen: all of them, or only those of its noun, which has read its adjectives."""

    def __post_init__(self) -> None:
        check(self)


class Uncontextualised:
    """Objects that are encoded alone, as a control of prompts; see the head of this file."""

    config_class: ClassVar[type] = UncontextualisedConfig
    done_at_start: ClassVar[bool] = True

    def __init__(self, config: UncontextualisedConfig | None = None) -> None:
        self.config = config or UncontextualisedConfig()

    def start(self, scene: Scene) -> ControlRun:
        """Replaces the states of all objects. Raises ValueError where the parser was not sure, for a word that the text
        encoder cut off, and for a phrase that it reads in other pieces alone.
        """
        config, texts = self.config, scene.texts
        places = [(row, one) for row, prompt in enumerate(scene.prompts) for one in phrases_of(prompt)]
        if config.strength == 0 or not places:
            return Done(config)
        different = list(dict.fromkeys(phrase.text for _, phrase in places))
        encoded = scene.encode(different)
        states, hidden = texts.states.clone(), torch.zeros_like(texts.mask)
        for row, phrase in places:
            columns = list(phrase.columns)
            words, number = scene.prompts[row].words, different.index(phrase.text)
            if not texts.mask[row].all():  # encoders that fill up to one length do not say how many columns are words
                marks = int(texts.mask[row].sum()) - len(words)
                check_pieces(phrase, int(encoded.mask[number].sum()) - marks)
            first = min(words)  # what an encoder puts before the words, it puts before any phrase
            alone = encoded.states[number, first : first + len(columns)]
            states[row, columns] = replaced(states[row, columns], alone, config.strength, config.length)
            if config.keep == "head":
                hidden[row, list(phrase.others)] = True
        scene.texts = replace(texts, states=states)
        if config.keep == "head":
            scene.texts = without(scene.texts, hidden, config.strength)
        return Done(config)


class Done:
    """A control that does nothing more in a batch once it has started."""

    def __init__(self, config: UncontextualisedConfig) -> None:
        self.config = config

    def act(self, scene: Scene) -> None:
        """Does nothing."""

    def looks(self, scene: Scene) -> int:
        """Looks at no image."""
        return 0


class Phrase(NamedTuple):
    """An object of a prompt."""

    text: str
    """What is encoded alone."""
    columns: Sequence[int]
    """The columns of these words in the prompt, in the same order."""
    others: Sequence[int]
    """Those of them that are not its noun's."""


def phrases_of(prompt: Prompt) -> Iterator[Phrase]:
    """The objects of a prompt, each mention and each thing that is tied to another one by itself. Raises ValueError
    where the parser was not sure, and for a word that was cut off.
    """
    prompt.parse.check()

    def with_its_own(entity: Entity) -> Iterator[Entity]:
        yield entity
        for other in (*entity.sub_objects, *entity.mentions):
            yield from with_its_own(other)

    for entity in prompt.entities:
        for one in with_its_own(entity):
            words = sorted([one.head, *one.modifiers], key=lambda word: word.start)
            columns = prompt.columns(words)
            start, stop = one.core
            together = all(start <= word.start and word.stop <= stop for word in words)
            if together and prompt.parse.parser != "given":
                text, spans = prompt.parse.prompt[start:stop], prompt.spans.tolist()
                columns = [column for column in prompt.words if spans[column][0] < stop and spans[column][1] > start]
            else:  # words that stand apart, as in "a circle and a square, both red", and those that a caller named
                text = " ".join(word.text for word in words)
            head = set(prompt.columns([one.head]))
            yield Phrase(text, columns, [column for column in columns if column not in head])


def check_pieces(phrase: Phrase, alone: int) -> None:
    """Raises ValueError if the text encoder cuts a phrase into another number of pieces than in its prompt."""
    if alone != len(phrase.columns):
        raise ValueError(
            f"prompt: the text encoder reads {phrase.text!r} in {alone} pieces alone, and in {len(phrase.columns)} "
            "within the prompt, where its states have no place; leave the control uncontextualised out"
        )


def replaced(states: Tensor, alone: Tensor, strength: float, length: Literal["kept", "alone"]) -> Tensor:
    """States (..., D) moved to those of the phrase alone (..., D), which may have the length of what they replace."""
    if length == "kept":
        alone = alone * (states.norm(dim=-1, keepdim=True) / alone.norm(dim=-1, keepdim=True).clamp(min=TINY))
    return torch.lerp(states, alone, strength)


def without(texts: Texts, hidden: Tensor, strength: float) -> Texts:
    """Texts of which the columns `hidden` (B, T) are seen the less, the larger the strength: at 1 not at all."""
    weight = torch.tensor(1.0 - strength, device=hidden.device).log()
    before = torch.zeros_like(texts.states[..., 0]) if texts.log_weights is None else texts.log_weights
    gone = hidden if texts.gone is None else texts.gone | hidden
    return replace(texts, log_weights=torch.where(hidden, before + weight, before), gone=gone)


TINY = 1e-8
"""Keeps divisions finite."""
