"""Adaptive weights of a prompt's words (FRAP, arXiv 2408.11706, TMLR 2025).

One weight for each piece of the prompt is moved while images are drawn, so that every object is seen somewhere and its
adjectives are seen where it is. Latents, states and network stay as they are; that idea is published [abstract].

No code of FRAP is public, and the body of the paper could not be read. What stands in summaries of it is marked
[summary]; every choice that had to be made is marked [ours] and is a setting, never a fact about the method.
`tests/parity` holds the functions of the first half of this file against the formulas, evaluated in float64.

Shapes: T columns of a caption, D width of a state, Q = P * P queries, S objects, R pairs of an object and a modifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check
from imgtok.generators.controls.scene import ControlRun, Prompt, Scene, Texts
from imgtok.text.parsing import Entity

# ---------------------------------------------------------------- weights

Way = Literal["interpolate", "scale", "logit"]


def bounded(alpha: Tensor, low: float, high: float) -> Tensor:
    """Weights within (low, high): alpha = 0 is the middle, exactly 1 for .6 and 1.4. The bounds are ours."""
    return low + (high - low) * alpha.sigmoid()


def plain(alpha: Tensor) -> Tensor:
    """Weights without bounds: 1 + alpha [ours]."""
    return 1 + alpha


def interpolated(states: Tensor, null: Tensor, weights: Tensor) -> Tensor:
    """States (..., T, D) on the line from those for no prompt, weight 0, through their own, weight 1 [ours: what
    libraries of prompt weighting do above 1]. Weights of 1 give the states themselves, to the bit.
    """
    return states + (weights - 1)[..., None] * (states - null)


def scaled(states: Tensor, weights: Tensor) -> Tensor:
    """States (..., T, D) times their weights [ours]."""
    return states * weights[..., None]


# ---------------------------------------------------------------- maps


def kernel(sigma: float = 0.5) -> Tensor:
    """3 x 3 weights of sum 1, exp(-(distance / (2 sigma))^2) along each axis [ours, after Attend-and-Excite, which
    divides by (2 sigma)^2 where a normal density has 2 sigma^2].
    """
    line = torch.exp(-(((torch.arange(3.0) - 1) / (2 * sigma)) ** 2))
    square = line[:, None] * line
    return square / square.sum()


def smoothed(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (..., Q, T) after a 3 x 3 Gaussian of sigma .5 over the grid, reflected at its edges [ours]."""
    images = maps.mT.reshape(-1, 1, *grid)
    weights = kernel().to(images)[None, None]
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), weights)
    return blurred.reshape(maps.mT.shape).mT


Prob = Literal["sum", "softmax"]


def probabilities(maps: Tensor, how: Prob) -> Tensor:
    """Maps (..., Q, T) as distributions over the queries: divided by their sums, or by softmax. Under softmax maps of
    values within [0, 1] are nearly all alike; which of the two is meant is not known [ours].
    """
    if how == "softmax":
        return maps.softmax(dim=-2)
    return maps / (maps.sum(dim=-2, keepdim=True) + TINY)


def presence(maps: Tensor, objects: Sequence[int]) -> Tensor:
    """1 - the strongest that each object is seen anywhere, (..., S), of smoothed maps (..., Q, T) [summary]."""
    return 1 - maps[..., list(objects)].amax(dim=-2)


Reduce = Literal["sum", "mean"]


def overlap(maps: Tensor, pairs: Sequence[tuple[int, int]], *, prob: Prob = "sum", reduce: Reduce = "sum") -> Tensor:
    """What distributions of an object and of its modifier share, (..., R), of smoothed maps (..., Q, T): the sum over
    the queries of the smaller of the two, or its mean, as summaries have it, which is at most 1 / Q.
    """
    p = probabilities(maps, prob)
    shared = torch.minimum(p[..., [s for s, _ in pairs]], p[..., [r for _, r in pairs]])
    return shared.sum(dim=-2) if reduce == "sum" else shared.mean(dim=-2)


def objective(
    maps: Tensor,
    objects: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    *,
    strength: float = 1.0,
    prob: Prob = "sum",
    reduce: Reduce = "sum",
) -> Tensor:
    """Mean presence loss - strength * mean overlap, of smoothed maps (Q, T) [summary]; the means are ours."""
    loss = presence(maps, objects).mean()
    if pairs:
        loss = loss - strength * overlap(maps, pairs, prob=prob, reduce=reduce).mean()
    return loss


# ---------------------------------------------------------------- one update


def updated(alpha: Tensor, gradient: Tensor, free: Tensor, *, step: float, normalised: bool) -> Tensor:
    """Coefficients (..., T) - step * gradient, where `free` (..., T); others keep theirs, such as those of the start
    and of padding, which would drift without meaning.

    `normalised` divides by the largest gradient of each prompt first [ours], so that no coefficient moves by more than
    `step`; the plain form is in summaries.
    """
    gradient = gradient.masked_fill(~free, 0)
    if normalised:
        gradient = gradient / gradient.abs().amax(dim=-1, keepdim=True).clamp(min=TINY)
    return alpha - step * gradient


def step_of(change: float, low: float, high: float) -> float:
    """The step of a normalised update by which no bounded weight moves by more than `change` [ours]: a sigmoid is
    steepest in the middle, at a quarter.
    """
    return 4 * change / (high - low)


TINY = 1e-12
"""Keeps divisions finite."""

# ---------------------------------------------------------------- the control


@dataclass(frozen=True, kw_only=True)
class AdaptiveWeightsConfig:
    """Adaptive weights of words. All defaults are ours."""

    kind: Literal["frap"] = "frap"
    """Which control this is."""
    strength: Fraction = 1.0
    """Scales every change of a weight; 0 changes nothing [ours]."""
    way: Way = "interpolate"
    """Where weights act: on the line from what stands for no prompt, as factors of the states, or in the attention
    (logit: a weight of 2 is the word twice). Which of them is meant is not known. For no prompt stand the empty
    prompt's states, or in our generators with a text prefix the trained states of a caption that is left out."""
    low: PositiveFloat = 0.6
    """Weights stay above."""
    high: PositiveFloat = 1.4
    """Weights stay below."""
    change: NonNegativeFloat = 0.1
    """The most that a weight changes in one update, where gradients are normalised."""
    rate: PositiveFloat | None = None
    """Step of the plain gradient in place of that; null normalises."""
    until: Fraction = 0.5
    """Share of the steps of a diffusion model at which weights are updated."""
    used: Literal["next", "now"] = "next"
    """From which step of a diffusion model on an update counts: from the next [summary], or from the one that it is
    made at [ours]. Our generators draw again after all updates, whatever this says."""
    updates: NonNegativeInt = 6
    """Updates for a generator whose images are drawn as a whole and looked at then; each costs a pass of the
    network."""
    rounds: PositiveInt = 1
    """Drawings that such a generator makes to be looked at, each after the updates that the one before led to; 2 or 3
    are what makes sense [ours]."""
    look: Fraction = 1.0
    """Share of such a drawing: of its tokens, or of the steps of a flow, for all entities. Less costs less [ours]."""
    overlap: NonNegativeFloat = 1.0
    """Weight of what object and modifier share against presence (lambda)."""
    prob: Prob = "sum"
    """How a map becomes a distribution."""
    reduce: Reduce = "sum"
    """What is taken over its queries; `mean` is what summaries have."""
    smooth: bool = True
    """Smooths maps that lie over the image."""
    free: Literal["entities", "words"] = "entities"
    """Words whose weights move: those of objects and what belongs to them, or all."""

    def __post_init__(self) -> None:
        check(self)
        if not self.low < 1 < self.high:
            raise ValueError(
                f"low, high: given {self.low} and {self.high}; weights start at 1, which must lie between: low=0.6 "
                "high=1.4, say"
            )

    def weights(self, alpha: Tensor) -> Tensor:
        """Weights of coefficients; exactly 1 for coefficients of 0."""
        start = torch.tensor((1 - self.low) / (self.high - self.low)).logit().item()
        shifted = bounded(alpha + start, self.low, self.high) - bounded(
            torch.full_like(alpha, start), self.low, self.high
        )
        return 1 + self.strength * shifted


class AdaptiveWeights:
    """FRAP as a control of prompts; see the head of this file."""

    config_class: ClassVar[type] = AdaptiveWeightsConfig
    done_at_start: ClassVar[bool] = False

    def __init__(self, config: AdaptiveWeightsConfig | None = None) -> None:
        self.config = config or AdaptiveWeightsConfig()

    def start(self, scene: Scene) -> ControlRun:
        """Raises ValueError for a doubtful group, or a word that the text encoder cut off."""
        return WeightsRun(self.config, [Words.of(prompt) for prompt in scene.prompts], scene.texts)


@dataclass(frozen=True)
class Words:
    """The words of a prompt that the losses are about, each with its columns."""

    columns: Sequence[Sequence[int]]
    objects: Sequence[int]
    """Numbers of words that are objects."""
    pairs: Sequence[tuple[int, int]]
    """An object and what modifies it."""

    @classmethod
    def of(cls, prompt: Prompt) -> Words:
        """Raises ValueError where the parser was not sure."""
        prompt.parse.check()
        columns: list[list[int]] = []
        objects: list[int] = []
        pairs: list[tuple[int, int]] = []

        def add(entity: Entity) -> None:
            objects.append(len(columns))
            head = len(columns)
            columns.append(prompt.columns([entity.head]))
            for word in entity.modifiers:
                pairs.append((head, len(columns)))
                columns.append(prompt.columns([word]))
            for other in (*entity.sub_objects, *entity.mentions):
                add(other)

        for entity in prompt.entities:
            add(entity)
        return cls(columns, objects, pairs)

    def without(self, gone: Tensor) -> Words:
        """Those that are left where columns (T,) are gone."""
        left = [i for i, columns in enumerate(self.columns) if not gone[list(columns)].all()]
        place = {word: number for number, word in enumerate(left)}
        columns = [[column for column in self.columns[i] if not gone[column]] for i in left]
        pairs = [(place[a], place[b]) for a, b in self.pairs if a in place and b in place]
        return Words(columns, [place[one] for one in self.objects if one in place], pairs)

    def maps(self, average: Tensor) -> Tensor:
        """The maps (Q, words) of words, each the mean of its columns (Q, T) [ours]."""
        return torch.stack([average[:, list(columns)].mean(dim=-1) for columns in self.columns], dim=-1)


def gone_in(texts: Texts) -> Tensor:
    """(B, T): the columns whose words were merged into others."""
    return torch.zeros_like(texts.mask) if texts.gone is None else texts.gone


class WeightsRun:
    """`AdaptiveWeights` in a batch."""

    def __init__(self, config: AdaptiveWeightsConfig, words: Sequence[Words], texts: Texts) -> None:
        self.config = config
        self.all_words = list(words)
        self.alpha = torch.zeros(texts.mask.shape, device=texts.states.device)

    def words(self, scene: Scene) -> list[Words]:
        """The words of each prompt that stand there still: another control may merge some, before or after this one."""
        gone = gone_in(scene.texts).cpu()
        return [one.without(own) for one, own in zip(self.all_words, gone, strict=True)]

    def looks(self, scene: Scene) -> int:
        """As the configuration says."""
        there = any(one.objects for one in self.words(scene))
        return self.config.updates * self.config.rounds if there and self.config.strength > 0 else 0

    def free(self, scene: Scene, words: Sequence[Words]) -> Tensor:
        """(B, T): the columns whose weights move."""
        found = torch.zeros_like(scene.texts.mask)
        for row, (prompt, own) in enumerate(zip(scene.prompts, words, strict=True)):
            of_entities = [column for columns in own.columns for column in columns]
            wanted = of_entities if self.config.free == "entities" else prompt.words
            found[row, wanted] = True
        return found & ~gone_in(scene.texts)

    def weighted(self, texts: Texts, alpha: Tensor) -> Texts:
        """The texts with the weights of coefficients (N, T)."""
        how = {
            "interpolate": interpolated,
            "scale": lambda states, null, weights: scaled(states, weights),
            "logit": None,
        }
        return replace(texts, weights=self.config.weights(alpha), weighted=how[self.config.way])

    def act(self, scene: Scene) -> None:
        """One update of all weights, from the maps under the present ones."""
        config, words = self.config, self.words(scene)
        chosen = [row for row, own in enumerate(words) if own.objects]
        if not chosen or config.strength == 0:
            return
        diffusion = scene.latents is not None
        later = config.used == "next" and diffusion
        if later and scene.step > 0:
            scene.texts = self.weighted(scene.texts, self.alpha)
        if diffusion and scene.step >= config.until * scene.steps:
            return
        if not diffusion and scene.step > 0 and scene.step % config.updates == 0:
            scene.redraw()
        rows = torch.tensor(chosen, device=self.alpha.device)
        with torch.enable_grad():
            alpha = self.alpha.detach().requires_grad_()
            if later:  # the weights before the update draw this step, so its call can be looked at [summary]
                scene.coming_maps(
                    lambda texts: self.weighted(texts, alpha),
                    lambda maps: self.update(scene, words, rows, alpha, maps[rows]),
                )
                return
            texts = self.weighted(scene.texts, alpha)[rows]
            maps = scene.maps(texts, rows, None if scene.latents is None else scene.latents[rows])
            self.update(scene, words, rows, alpha, maps)
        scene.texts = self.weighted(scene.texts, self.alpha)

    def update(self, scene: Scene, words: Sequence[Words], rows: Tensor, alpha: Tensor, maps: Tensor) -> None:
        """Moves coefficients `rows` (N,) of alpha (B, T) by what the maps (N, Q, T) say under them."""
        config, chosen = self.config, rows.tolist()
        if scene.grid is not None and config.smooth and min(scene.grid) > 1:
            maps = smoothed(maps, scene.grid)
        losses = torch.stack([self.loss(words[row], own) for row, own in zip(chosen, maps, strict=True)])
        (gradient,) = torch.autograd.grad(losses.sum(), alpha)
        normalised = config.rate is None
        step = config.rate or step_of(config.change, config.low, config.high)
        free = self.free(scene, words)[rows]
        new = updated(self.alpha[rows], gradient[rows], free, step=step, normalised=normalised)
        self.alpha = self.alpha.index_copy(0, rows, new)
        weights = config.weights(self.alpha)
        note = {"control": "frap", "step": scene.step, "images": [scene.images[row] for row in chosen]}
        told = [self.in_words(scene.prompts[row], words[row], weights[row]) for row in chosen]
        scene.notes.append(note | {"loss": losses.tolist(), "weights": told})

    def loss(self, words: Words, average: Tensor) -> Tensor:
        """The objective of one prompt, of its map (Q, T)."""
        config = self.config
        return objective(
            words.maps(average),
            words.objects,
            words.pairs,
            strength=config.overlap,
            prob=config.prob,
            reduce=config.reduce,
        )

    def in_words(self, prompt: Prompt, words: Words, weights: Tensor) -> dict[str, float]:
        """The weight of each word, by what stands in the prompt."""
        text, spans, found = prompt.parse.prompt, prompt.spans.tolist(), {}
        for columns in words.columns:
            start, stop = spans[columns[0]][0], spans[columns[-1]][1]
            found[f"{text[start:stop]}@{start}"] = round(weights[list(columns)].mean().item(), 4)
        return found
