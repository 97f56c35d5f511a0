"""What a control of prompts sees and may change, whatever the generator: the texts of a batch, and a network to ask.

A control is `start`ed with the scene of a batch, before anything is drawn, and then acts once a step. It changes
`scene.texts`, and of a diffusion model perhaps `scene.latents`; nothing else, and it keeps nothing after the batch.
`diffusers` and `own` beside this file make scenes of pipelines of diffusers and of our generators.

Shapes: B prompts of a batch, N rows of a call, T columns of a caption, D width of a state, Q queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from imgtok.text.parsing import Entity, Parse, Word, columns


@dataclass(frozen=True)
class Prompt:
    """A prompt that was parsed, with where its words are in the text encoder's columns."""

    parse: Parse
    spans: Tensor
    """(T, 2): the characters that each column stands for; [0, 0) for marks and padding."""

    def columns(self, words: Sequence[Word]) -> list[int]:
        """The columns of some words. Raises ValueError for a word that the encoder cut off."""
        return columns(words, self.spans.cpu())

    @property
    def words(self) -> list[int]:
        """The columns of all words."""
        found: list[int] = (self.spans[:, 1] > self.spans[:, 0]).nonzero().flatten().tolist()
        return found

    @property
    def entities(self) -> tuple[Entity, ...]:
        """What it names."""
        return self.parse.entities


@dataclass(frozen=True)
class Texts:
    """The states of a batch of prompts, and how strongly their columns are seen. Marks count as columns."""

    states: Tensor
    """(B, T, D), float32: what the text encoder made of the prompts, or what a control made of that."""
    mask: Tensor
    """(B, T) boolean: the columns that are no padding."""
    null: Tensor
    """(T, D) or (B, T, D): the states that stand for no prompt, column by column: the empty prompt's, or those that a
    generator was trained with in place of captions."""
    log_weights: Tensor | None = None
    """(B, T), what is added to the attention logits of a column; None for zeros."""
    weights: Tensor | None = None
    """(B, T): one weight a column, which lies over the states; None for ones. See `frap`."""
    weighted: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """How weights change states: of states, null and weights the new states. None adds the logarithms of the weights to
    the attention logits in place of that."""
    gone: Tensor | None = None
    """(B, T) boolean: columns whose words were merged into others; None for none."""
    pooled: Tensor | None = None
    """(B, P): what a model reads of a prompt as a whole; None where it reads nothing."""

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Tensor) -> Self:
        """The texts of some prompts, (N,) rows."""
        null = self.null if self.null.ndim == 2 else self.null[rows]
        fields = ("states", "mask", "log_weights", "weights", "gone", "pooled")
        chosen: dict[str, Any] = {name: None if (one := getattr(self, name)) is None else one[rows] for name in fields}
        return replace(self, null=null, **chosen)

    @property
    def seen(self) -> Tensor:
        """(B, T, D): the states with their weights."""
        if self.weights is None or self.weighted is None:
            return self.states
        return self.weighted(self.states, self.null, self.weights)

    @property
    def bias(self) -> Tensor | None:
        """(B, T): what is added to the attention logits, weights included; None for nothing."""
        if self.weights is None or self.weighted is not None:
            return self.log_weights
        logs = self.weights.log()
        return logs if self.log_weights is None else self.log_weights + logs


class Anchor(NamedTuple):
    """What the phrases of N objects say, and a way to ask what a composite says alone."""

    target: Tensor
    """(N, ...): the network's prediction for the phrase."""
    predict: Callable[[Tensor], Tensor]
    """Composites (N, D) -> the prediction (N, ...) for a text of that one column."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """How far apart two predictions are, (N,)."""


class Scene(Protocol):
    """A batch while it is drawn."""

    prompts: Sequence[Prompt]
    images: Sequence[int]
    """The number of the image of each prompt, for notes."""
    texts: Texts
    latents: Tensor | None
    """(B, ...): the input of the network that may be moved; None where there is none."""
    once: bool
    """Whether latents that were moved count for the coming call of the network alone."""
    step: int
    """The step that comes, from 0 on; -1 while a control is started."""
    steps: int
    """All of them."""
    grid: tuple[int, int] | None
    """Rows and columns of the queries; None where they have no place in the image."""
    notes: list[dict[str, Any]]
    """What controls say of what they did: `control`, `step`, `images`, and figures of each of these images."""

    def encode(self, prompts: Sequence[str]) -> Texts:
        """The states of other prompts (N, T, D), by the same text encoder."""
        ...

    def maps(self, texts: Texts, rows: Tensor, latents: Tensor | None = None) -> Tensor:
        """What each query looks at, (N, Q, T): the mean over heads and chosen layers of the attention to `texts`, those
        of the prompts `rows` (N,); with gradients by the texts and the latents.
        """
        ...

    def coming_maps(self, weighted: Callable[[Texts], Texts], told: Callable[[Tensor], None]) -> None:
        """`maps` (B, Q, T) of the very call that draws the coming step, which is made for the texts as all controls
        have left them by then, `weighted`: `told` is given them when that call is made, with gradients.
        """
        ...

    def redraw(self) -> None:
        """Images that are drawn as a whole to be looked at are drawn anew, for the texts as they are now."""
        ...

    def anchor(self, rows: Tensor, phrases: Sequence[str], *, published: bool, last: bool = False) -> Anchor:
        """The trajectories of phrases (N,) of prompts `rows` (N,) at this step; see `tome`. The same phrases are asked
        for at every step; `last` says that they need not go on. `published` is for how they do in the published code.
        """
        ...

    @property
    def bind_step(self) -> float | None:
        """The step by which a composite follows the gradient of its anchor's loss; None moves it by a share of its
        length [ours].
        """
        ...


class PromptControl(Protocol):
    """A control of prompts. `hub.CONTROLS` lists them by kind."""

    config: Any
    done_at_start: ClassVar[bool]
    """Whether all that it does is done when it has started."""

    def start(self, scene: Scene) -> ControlRun:
        """Changes the texts before anything is drawn. Raises ValueError for prompts that it cannot act on."""
        ...


class ControlRun(Protocol):
    """A control in a batch."""

    config: Any
    """`look` of it is the share of a drawing that is drawn to be looked at only."""

    def act(self, scene: Scene) -> None:
        """Acts before the step that the scene is at."""
        ...

    def looks(self, scene: Scene) -> int:
        """How many times it acts on images that are drawn as a whole first, and looked at then."""
        ...


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within the block no parameter of a network takes gradients: those of texts and latents need less memory so."""
    learning = [one for one in network.parameters() if one.requires_grad]
    try:
        for one in learning:
            one.requires_grad_(False)
        yield
    finally:
        for one in learning:
            one.requires_grad_(True)


def repeated(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers as a tensor."""
    return torch.tensor(list(rows), dtype=torch.long, device=device)
