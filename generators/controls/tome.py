"""Semantic binding by merged tokens (ToMe, arXiv 2411.07132). Not the token merging for speed that has the same name.

The words of an object become one composite state of the text, so that all of them share one map of attention; the
composite is moved until it alone predicts what the whole phrase predicts (binding loss), and the text until the maps
of the objects are concentrated (entropy loss). All of it happens in the first steps, which fix the layout.

What is published was read in the authors' code (github.com/hutaiHang/ToMe at 9fd67a0) and is marked [code]; the text
and the tables of the paper could not be read. What is ours is marked [ours]. `tests/parity` holds the functions of the
first half of this file against what the published ones computed.

Shapes: T columns of a caption, D width of a state, K objects, Q queries (positions of the image), H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from imgtok.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check
from imgtok.generators.controls.scene import ControlRun, Prompt, Scene, Texts, repeated
from imgtok.text.parsing import Entity

# ---------------------------------------------------------------- composite states


class Group(NamedTuple):
    """The columns of one object."""

    nouns: Sequence[int]
    """Of its head, one or more pieces; the first of them holds the composite."""
    modifiers: Sequence[int] = ()
    """Of what belongs to it: adjectives, or the nouns of its sub-objects."""

    @property
    def column(self) -> int:
        """Where the composite stands."""
        return self.nouns[0]

    @property
    def others(self) -> list[int]:
        """Columns that the composite empties."""
        return [column for column in (*self.nouns, *self.modifiers) if column != self.column]


Norm = Literal["none", "head", "renorm"]


def merge(
    states: Tensor, groups: Sequence[Group], *, noun: float = 1.1, modifier: float = 1.2, norm: Norm = "none"
) -> Tensor:
    """States (T, D) with one composite a group: noun * (sum of its nouns) + modifier * (sum of its modifiers), and
    zeros in its other columns. Groups follow one another: a column that two share is zero for the second.

    The weights 1.1 and 1.2 are in the code alone, figures show a plain sum [code]. `norm` is ours: the length of a
    composite is as it comes (none), that of its head noun's state (head), or the mean length of the states that it was
    made of (renorm). Sums are longer than words, which sharpens their attention.

    The published code leaves the zeros in the sequence, where they keep their share of every softmax; hide the columns
    `emptied(groups)` to be without them, as if the caption were shorter [ours].
    """
    states = states.clone()
    for group in groups:
        nouns, modifiers = states[list(group.nouns)], states[list(group.modifiers)]
        composite = noun * nouns.sum(dim=0) + modifier * modifiers.sum(dim=0)
        if norm != "none":
            lengths = torch.cat([nouns, modifiers]).norm(dim=-1)
            wanted = lengths[0] if norm == "head" else lengths.mean()
            composite = composite * (wanted / (composite.norm() + TINY))
        states[group.others] = 0
        states[group.column] = composite
    return states


def emptied(groups: Sequence[Group]) -> list[int]:
    """The columns in which `merge` leaves zeros."""
    kept = {group.column for group in groups}
    return sorted({column for group in groups for column in group.others} - kept)


def substitute_end(states: Tensor, short: Tensor, words: int) -> Tensor:
    """States (T, D) with the columns after the last piece of the prompt, words + 1 on, from the same columns of the
    shortened prompt `short` (T, D) [code].

    What is copied are padding states of the shortened prompt, not its end; under causal attention they sum it up.
    `words` counts pieces, not words.
    """
    return torch.cat([states[: words + 1], short[words + 1 :]])


# ---------------------------------------------------------------- entropy of the maps


def average_maps(maps: Sequence[Tensor]) -> Tensor:
    """The mean (Q, T) over all heads of all layers of maps (H, Q, T) [code]."""
    return torch.cat(list(maps)).mean(dim=0)


def word_maps(average: Tensor, words: Sequence[int], temperature: float = 0.5) -> Tensor:
    """A map (Q, T) among the columns of the prompt's pieces alone, over the temperature, softmax: (Q, words) [code]."""
    return (average[:, list(words)] / temperature).softmax(dim=-1)


def spread(scores: Tensor) -> Tensor:
    """Scores (Q, K) of columns scaled from 0 to 1 over the queries; a constant column, where the published code divides
    by zero, becomes zeros.
    """
    low, high = scores.amin(dim=0), scores.amax(dim=0)
    return (scores - low) / (high - low + TINY)


def noun_maps(average: Tensor, nouns: Sequence[int], words: Sequence[int], temperature: float) -> Tensor:
    """The maps (Q, K) of the columns of nouns, which are among those of words, from 0 to 1 [code]."""
    place = {column: number for number, column in enumerate(words)}
    return spread(word_maps(average, words, temperature)[:, [place[noun] for noun in nouns]])


def entropies(average: Tensor, nouns: Sequence[int], words: Sequence[int], temperature: float = 0.5) -> Tensor:
    """Twice the entropy, in nats, of where each noun is looked at from, (K,), of a map (Q, T): at most 2 ln Q each.

    Their sum is the entropy loss [code].
    """
    scores = noun_maps(average, nouns, words, temperature)
    p = scores / (scores.sum(dim=0) + TINY)
    return -2 * (p * (p + 1e-5).log()).sum(dim=0)


def centres(
    average: Tensor, nouns: Sequence[int], words: Sequence[int], grid: tuple[int, int], temperature: float = 0.5
) -> Tensor:
    """Centres of mass (K, 2), as (x, y) in 32nds of the image, of a map (Q, T) over a grid (h, w) [code]."""
    scores = noun_maps(average, nouns, words, temperature).unflatten(0, grid)
    down, right = (torch.linspace(0, 1, side, device=scores.device)[:, None] for side in grid)
    mass = scores.sum(dim=(0, 1)) + TINY
    x = (scores.sum(dim=0) * right).sum(dim=0) / mass
    y = (scores.sum(dim=1) * down).sum(dim=0) / mass
    return 32 * torch.stack([x, y], dim=-1)


def position_loss(found: Tensor) -> Tensor:
    """How far the centres (2, 2) of exactly two objects are from the left and the right: (10, 16), (25, 16) [code]."""
    wanted = torch.tensor([[10.0, 16.0], [25.0, 16.0]], device=found.device)
    return (0.2 * (found - wanted).square()).mean(dim=-1).sum()


# ---------------------------------------------------------------- a composite that says what its phrase says


def binding_loss(target: Tensor, predicted: Tensor) -> Tensor:
    """Mean squared difference (N,) of two predictions (N, ...): of the full phrase, and of the composite alone [code].

    Noise of a diffusion model, velocities of a flow [ours].
    """
    return (target - predicted).square().flatten(1).mean(dim=1)


def divergence(target: Tensor, predicted: Tensor) -> Tensor:
    """KL (N,) of laws with logits (N, L, V), the mean over L positions: the binding loss of tokens [ours]."""
    target, predicted = target.log_softmax(dim=-1), predicted.log_softmax(dim=-1)
    never = target.isneginf()
    ratios = target.masked_fill(never, 0) - predicted.masked_fill(never, 0)
    return (target.exp() * ratios).sum(dim=-1).flatten(1).mean(dim=1)


def bind(
    tokens: Tensor,
    target: Tensor,
    predict: Callable[[Tensor], Tensor],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = binding_loss,
    step: float = 10000.0,
    share: float | None = None,
    updates: int = 3,
) -> tuple[Tensor, Tensor]:
    """Composites (N, D) moved so that `predict(tokens)` (N, ...) comes nearer to `target`: token - gradient of
    step * loss, `updates` times; and the losses (updates, N) before each [code].

    The step 10000 belongs to SDXL's scale of noise. With `share`, each update is that share of the composite's length
    along the gradient, whatever its size [ours].
    """
    losses = []
    for _ in range(updates):
        with torch.enable_grad():
            tokens = tokens.detach().requires_grad_()
            found = loss(target, predict(tokens))
            (gradient,) = torch.autograd.grad(step * found.sum(), tokens)
        tokens = tokens.detach()
        if share is not None:
            lengths = tokens.norm(dim=-1, keepdim=True)
            gradient = share * lengths * gradient / (gradient.norm(dim=-1, keepdim=True) + TINY)
        tokens = tokens - gradient
        losses.append(found.detach())
    return tokens, torch.stack(losses) if losses else target.new_zeros(0, len(tokens))


def anchor_noise(target: Tensor, null: Tensor, guidance: float, *, published: bool = False) -> Tensor:
    """Guided noise of a phrase's own trajectory, of its noise and that of the empty prompt.

    With the published sign, null + guidance (null - target), it leads away from the phrase [code]; the usual one leads
    to it.
    """
    return null + guidance * (null - target if published else target - null)


# ---------------------------------------------------------------- refinement

THRESHOLDS = (26.0, 25.0, 24.0, 23.0, 22.5, 22.0, 21.5, 21.0, 21.0, 21.0)
"""By step: a pass whose entropy loss is below threshold * K / 2 - 2 is the last of its step [code]. Later steps have
the last of them, where the published code ends with a KeyError [ours]."""


def low_enough(threshold: float, objects: int, queries: int = 1024) -> float:
    """The entropy loss of so many objects below which a step is refined no more [code].

    The published thresholds belong to maps of 1024 queries; those of others are lower by as much as the largest entropy
    is [ours].
    """
    return threshold / 2 * objects - 2 - 2 * objects * math.log(1024 / queries)


def refine(
    latents: Tensor,
    states: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    step: float,
    latent_step: float | None = None,
    enough: Tensor,
    passes: int,
    moves: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents (N, ...) and states (N, T, D) after gradient steps on losses `loss_of(latents, states)` (N,), and the
    losses of each pass, not a number where a row was no longer looked at.

    Latents go by `latent_step`, half of `step` unless given [code]; 0 leaves them. A row stops after a pass whose loss,
    before its update, is below `enough` (N,). `moves` (N, T) says which columns of the states follow their gradient;
    all of them unless given, as published.
    """
    latent_step = step / 2 if latent_step is None else latent_step
    going, losses = torch.ones(len(states), dtype=torch.bool, device=states.device), []
    for _ in range(passes):
        with torch.enable_grad():
            latents = latents.detach().requires_grad_(latent_step != 0)
            states = states.detach().requires_grad_()
            found = loss_of(latents, states)
            wanted = [states, latents] if latent_step != 0 else [states]
            gradients = torch.autograd.grad(found.sum(), wanted)
        losses.append(found.detach().masked_fill(~going, torch.nan))
        chosen = going[:, None] if moves is None else going[:, None] & moves
        states = torch.where(chosen[..., None], states.detach() - step * gradients[0], states.detach())
        latents = latents.detach()
        if latent_step != 0:
            rows = going.view(-1, *[1] * (latents.ndim - 1))
            latents = torch.where(rows, latents - latent_step * gradients[1], latents)
        going = going & (found.detach() >= enough)
        if not bool(going.any()):
            break
    return latents, states, losses


TINY = 1e-8
"""Keeps divisions finite; far below what parity can see."""

# ---------------------------------------------------------------- the control


@dataclass(frozen=True, kw_only=True)
class SemanticMergeConfig:
    """Semantic binding by merged tokens. The defaults are the attribute demo of the published code with what we hold to
    be mistakes put right; `published` gives that code as it is.
    """

    kind: Literal["tome"] = "tome"
    """Which control this is."""
    strength: Fraction = 1.0
    """How far states go towards composites, and the share of every step; 0 changes nothing [ours]."""
    binds: Literal["all", "attributes", "objects"] = "all"
    """What is merged into a head noun: its adjectives, the nouns of its sub-objects ("wearing a hat"), or both."""
    noun: PositiveFloat = 1.1
    """Weight of nouns in a composite [code]."""
    modifier: PositiveFloat = 1.2
    """Weight of what belongs to them [code]."""
    fill: Literal["zero", "mask"] = "zero"
    """Emptied columns are zeros, which keep a share of every softmax [code], or not seen at all [ours]."""
    norm: Norm = "none"
    """Length of a composite: as the sum has it [code], its head's, or the mean of its parts [ours]."""
    end_step: NonNegativeInt | None = None
    """Step before which the end of the text becomes that of the shortened prompt; null never (the attribute demo), 0
    from the start (the object demo) [code]."""
    pooled: Literal["keep", "short"] = "keep"
    """What a model reads of the prompt as a whole: unchanged [code], or the shortened prompt's [ours]."""
    binding_steps: NonNegativeInt = 5
    """Steps with updates of composites by the binding loss [code: 5 or 7]."""
    binding_updates: PositiveInt = 3
    """Such updates a step and object [code]."""
    binding_step: PositiveFloat | None = None
    """Their step; null takes 10000 for diffusion models [code], and otherwise `binding_share` of the composite's
    length."""
    binding_share: PositiveFloat = 0.05
    """Length of an update where there is no step, as a share of the composite's [ours]."""
    entropy_steps: NonNegativeInt = 5
    """Steps with passes that lower the entropy of the maps [code: 5 or 7]."""
    entropy_passes: PositiveInt = 4
    """Most such passes a step [code: 4 or 6]."""
    look: Fraction = 1.0
    """Share of an image that a generator of whole images draws to be looked at: of its tokens, or of the steps of a
    flow, for all entities. Less costs less [ours]."""
    step: NonNegativeFloat = 3.0
    """Step of the text in these passes at the first step; it falls to 0 linearly [code]."""
    temperature: PositiveFloat = 0.5
    """Divides maps before the softmax over words [code]."""
    position: bool = False
    """Pulls exactly two objects to the left and to the right [code]."""
    anchor: Literal["guided", "published"] = "guided"
    """Trajectory of a phrase: guided to it, or with the published sign and scaling, which lead away [code]."""
    moves: Literal["composites", "all"] = "composites"
    """Columns that follow the entropy's gradient: composites alone [ours], or all [code]."""
    latent: Literal["kept", "once", "still"] = "kept"
    """Latents of a diffusion model in these passes: moved for good [ours], for the noise of this step alone [code], or
    not at all [ours]."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def published(cls, demo: Literal["attribute", "object"] = "attribute", **changes: Any) -> SemanticMergeConfig:
        """The settings of a demo of the published code, as they are there."""
        known: dict[str, Any] = {"anchor": "published", "moves": "all", "latent": "once", "binds": f"{demo}s"}
        if demo == "object":
            known |= {"end_step": 0, "binding_steps": 7, "entropy_steps": 7, "entropy_passes": 6, "position": True}
        return cls(**known | changes)


class SemanticMerge:
    """ToMe as a control of prompts; see the head of this file."""

    config_class: ClassVar[type] = SemanticMergeConfig
    done_at_start: ClassVar[bool] = False

    def __init__(self, config: SemanticMergeConfig | None = None) -> None:
        self.config = config or SemanticMergeConfig()

    def start(self, scene: Scene) -> ControlRun:
        """Merges the objects of every prompt. Raises ValueError for a doubtful group, or a word that was cut off."""
        config, texts = self.config, scene.texts
        run = MergeRun(config, [merged_groups(prompt, config.binds) for prompt in scene.prompts])
        if config.strength == 0 or not any(run.groups):
            return run
        states = texts.states.clone()
        gone = torch.zeros_like(texts.mask) if texts.gone is None else texts.gone.clone()
        for row, groups in enumerate(run.groups):
            columns = [one.group for one in groups]
            merged = merge(states[row], columns, noun=config.noun, modifier=config.modifier, norm=config.norm)
            states[row] = torch.lerp(states[row], merged, config.strength)
            gone[row, emptied(columns)] = True
        scene.texts = replace(texts, states=states, gone=gone)
        if config.fill == "mask":
            weight = torch.tensor(1.0 - config.strength, device=gone.device).log()
            before = torch.zeros_like(gone, dtype=states.dtype) if texts.log_weights is None else texts.log_weights
            scene.texts = replace(scene.texts, log_weights=torch.where(gone, before + weight, before))
        if config.end_step is not None or config.pooled == "short":
            run.short = scene.encode([prompt.parse.short for prompt in scene.prompts])
        if config.end_step == 0:
            run.substitute(scene)
        if config.pooled == "short" and run.short is not None:
            scene.texts = replace(scene.texts, pooled=run.short.pooled)
        return run


class Merged(NamedTuple):
    """An object of a prompt, and its columns."""

    entity: Entity
    group: Group
    named_again: bool = False
    """Whether it is another mention of an object that came before."""


def merged_groups(prompt: Prompt, binds: Literal["all", "attributes", "objects"]) -> list[Merged]:
    """The groups of a prompt: the objects that something belongs to, each mention by itself. Raises ValueError where
    the parser was not sure.
    """
    prompt.parse.check()
    found = []
    for entity in prompt.entities:
        for number, one in enumerate((entity, *entity.mentions)):
            words = list(one.modifiers) if binds != "objects" else []
            if binds != "attributes":
                words += [word for part in one.sub_objects for word in part.words]
            if words:
                group = Group(prompt.columns([one.head]), prompt.columns(words))
                found.append(Merged(one, group, named_again=number > 0))
    return found


class MergeRun:
    """`SemanticMerge` in a batch."""

    def __init__(self, config: SemanticMergeConfig, groups: Sequence[Sequence[Merged]]) -> None:
        """`groups` are those of each prompt; without any, there is nothing to do."""
        self.config, self.groups = config, groups
        self.short: Texts | None = None

    def looks(self, scene: Scene) -> int:
        """As many as there are steps with something to do."""
        config = self.config
        if config.strength == 0 or not any(self.groups):
            return 0
        return max(config.binding_steps, config.entropy_steps if scene.grid is not None else 0)

    def act(self, scene: Scene) -> None:
        """Substitutes the end, binds composites, lowers entropies, in this order [code]."""
        config = self.config
        if config.strength == 0 or not any(self.groups):
            return
        if config.end_step == scene.step > 0:
            self.substitute(scene)
        if scene.step < config.binding_steps:
            self.bind(scene)
        if scene.step < config.entropy_steps and scene.grid is not None and config.step > 0:
            self.refine(scene)

    def substitute(self, scene: Scene) -> None:
        """The end of each text from that of its shortened prompt: from the same columns where that has any, or else
        from its last [ours: encoders that do not pad].
        """
        assert self.short is not None
        states = scene.texts.states.clone()
        for row, prompt in enumerate(scene.prompts):
            if not self.groups[row]:
                continue
            short, mask = self.short.states[row], self.short.mask[row]
            source = torch.arange(len(mask), device=mask.device).where(mask, mask.nonzero().max())
            replaced = substitute_end(states[row], short[source], max(prompt.words))
            states[row] = torch.lerp(states[row], replaced, self.config.strength)
        scene.texts = replace(scene.texts, states=states)

    def bind(self, scene: Scene) -> None:
        """Updates every composite by what its phrase says."""
        items = [(row, one) for row, groups in enumerate(self.groups) for one in groups if not one.named_again]
        rows = repeated([row for row, _ in items], scene.texts.states.device)
        columns = repeated([one.group.column for _, one in items], rows.device)
        phrases = [scene.prompts[row].parse.text_of(one.entity) for row, one in items]
        config = self.config
        last = scene.step + 1 >= config.binding_steps
        anchor = scene.anchor(rows, phrases, published=config.anchor == "published", last=last)
        step = config.binding_step or scene.bind_step
        tokens, losses = bind(
            scene.texts.states[rows, columns],
            anchor.target,
            anchor.predict,
            loss=anchor.loss,
            step=config.strength * (step or 1.0),
            share=None if step else config.strength * config.binding_share,
            updates=config.binding_updates,
        )
        states = scene.texts.states.clone()
        states[rows, columns] = tokens
        scene.texts = replace(scene.texts, states=states)
        note = {"control": "tome", "step": scene.step, "images": [scene.images[row] for row, _ in items]}
        scene.notes.append(note | {"objects": [one.entity.head.text for _, one in items], "binding": losses.tolist()})

    def refine(self, scene: Scene) -> None:
        """Lowers the entropies of the maps of the objects, of texts and latents."""
        config = self.config
        chosen = [row for row, groups in enumerate(self.groups) if groups]
        rows = repeated(chosen, scene.texts.states.device)
        nouns = [[one.group.column for one in self.groups[row] if not one.named_again] for row in chosen]
        words = [self.seen_words(scene, row) for row in chosen]
        moves = torch.zeros_like(scene.texts.mask[rows])
        for number, columns in enumerate(nouns):
            moves[number, columns] = True
        texts, latents = scene.texts[rows], scene.latents
        still = config.latent == "still" or latents is None

        def loss_of(moved: Tensor, states: Tensor) -> Tensor:
            maps = scene.maps(replace(texts, states=states), rows, None if latents is None else moved)
            found = []
            for average, own, all_words in zip(maps, nouns, words, strict=True):
                loss = entropies(average, own, all_words, config.temperature).sum()
                if config.position and len(own) == 2 and scene.grid is not None:
                    loss = loss + position_loss(centres(average, own, all_words, scene.grid, config.temperature))
                found.append(loss)
            return torch.stack(found)

        share = 1 - scene.step / max(1, scene.steps - 1)
        step = config.strength * config.step * share
        threshold = THRESHOLDS[min(scene.step, len(THRESHOLDS) - 1)]
        assert scene.grid is not None
        enough = torch.tensor([low_enough(threshold, len(own), math.prod(scene.grid)) for own in nouns]).to(rows.device)
        moved, states, losses = refine(
            texts.states if latents is None else latents[rows],
            texts.states,
            loss_of,
            step=step,
            latent_step=0.0 if still else step / 2,
            enough=enough,
            passes=config.entropy_passes,
            moves=moves if config.moves == "composites" else None,
        )
        scene.texts = replace(scene.texts, states=scene.texts.states.index_copy(0, rows, states))
        if latents is not None and not still:
            scene.latents = latents.index_copy(0, rows, moved)
            scene.once = config.latent == "once"
        note = {"control": "tome", "step": scene.step, "images": [scene.images[row] for row in chosen]}
        told = [[None if math.isnan(value) else value for value in loss.tolist()] for loss in losses]
        scene.notes.append(note | {"passes": len(losses), "entropy": told})

    def seen_words(self, scene: Scene, row: int) -> list[int]:
        """The columns of the words of a prompt that are seen."""
        bias = scene.texts.bias
        hidden = set() if bias is None else set(bias[row].isneginf().nonzero().flatten().tolist())
        return [column for column in scene.prompts[row].words if column not in hidden]
