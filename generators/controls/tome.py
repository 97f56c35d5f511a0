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

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

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


def word_maps(average: Tensor, words: int, temperature: float = 0.5) -> Tensor:
    """A map (Q, T) among the prompt's pieces alone: columns 1 to `words`, over the temperature, softmax: (Q, words)
    [code].
    """
    return (average[:, 1 : words + 1] / temperature).softmax(dim=-1)


def spread(scores: Tensor) -> Tensor:
    """Scores (Q, K) of columns scaled from 0 to 1 over the queries; a constant column, where the published code divides
    by zero, becomes zeros.
    """
    low, high = scores.amin(dim=0), scores.amax(dim=0)
    return (scores - low) / (high - low + TINY)


def entropies(average: Tensor, nouns: Sequence[int], words: int, temperature: float = 0.5) -> Tensor:
    """Twice the entropy, in nats, of where each noun is looked at from, (K,), of a map (Q, T): at most 2 ln Q each.

    Their sum is the entropy loss [code].
    """
    scores = spread(word_maps(average, words, temperature)[:, [noun - 1 for noun in nouns]])
    p = scores / (scores.sum(dim=0) + TINY)
    return -2 * (p * (p + 1e-5).log()).sum(dim=0)


def centres(average: Tensor, nouns: Sequence[int], words: int, side: int, temperature: float = 0.5) -> Tensor:
    """Centres of mass (K, 2), as (x, y) in 32nds of the image, of a map (side * side, T) [code]."""
    scores = spread(word_maps(average, words, temperature)[:, [noun - 1 for noun in nouns]])
    line = torch.linspace(0, 1, side, device=scores.device)
    grid = scores.unflatten(0, (side, side))
    mass = grid.sum(dim=(0, 1)) + TINY
    x = (grid.sum(dim=0) * line[:, None]).sum(dim=0) / mass
    y = (grid.sum(dim=1) * line[:, None]).sum(dim=0) / mass
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
    return (target.exp() * (target - predicted)).sum(dim=-1).flatten(1).mean(dim=1)


def bind(
    tokens: Tensor,
    target: Tensor,
    predict: Callable[[Tensor], Tensor],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = binding_loss,
    step: float = 10000.0,
    updates: int = 3,
) -> tuple[Tensor, Tensor]:
    """Composites (N, D) moved so that `predict(tokens)` (N, ...) comes nearer to `target`: token - gradient of
    step * loss, `updates` times; and the losses (updates, N) before each [code].

    The step 10000 belongs to SDXL's scale of noise.
    """
    losses = []
    for _ in range(updates):
        with torch.enable_grad():
            tokens = tokens.detach().requires_grad_()
            found = loss(target, predict(tokens))
            (gradient,) = torch.autograd.grad(step * found.sum(), tokens)
        tokens = tokens.detach() - gradient
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


def low_enough(threshold: float, objects: int) -> float:
    """The entropy loss of so many objects below which a step is refined no more [code]."""
    return threshold / 2 * objects - 2


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
