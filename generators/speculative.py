"""Tokens from fewer calls of a network: one loop for all of speculative decoding.

A call of an autoregressive network over several tokens costs little more than one over a single token, since it reads
the weights once. So tokens are guessed, a call says for all guesses what their law was, and the rules of
`speculative_rules` decide how many of them stand. Where the guesses come from is a `Drafter`: `Jacobi` takes what the
network itself said of those positions in the call before, `DraftNetwork` asks a smaller network. Every call commits at
least one token of each image, so that there are never more calls than tokens.

With the token rule the tokens have exactly the law of `decoding.cached`, whatever is filtered and guided, because p is
the law after all of that; with groups they do not.

Each image advances at its own pace (rows are ragged), and its random numbers are those of (seed, index), round and
place in its window: so it is the same alone and in a batch, but for the arithmetic of the network.

A round changes tensors in place and is a function of tensors alone. On an accelerator the window has one size, so that
all rounds are one graph, and near the end of an image it begins with tokens that are settled; on a CPU it shrinks. The
random numbers of all rounds are uploaded at once, and the host reads nothing but, every `LOOK_EVERY` rounds from the
first after which that is possible, whether all images are finished: with a window of one token never.

Shapes: B images, R rows through the network (2B where guided), N tokens of an image, L slots of a call, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from imgtok.generators.replay import WARM_UP, Replayed
from imgtok.generators.sampling import TokenSampling, draw, draw_several, guide, law
from imgtok.generators.speculative_rules import Rule, judge, token_rule
from imgtok.tokenizers.calls import Calls
from imgtok.tokenizers.tokens import Tokens

OnStep = Callable[[int], None]
LOOK_EVERY = 4
"""Rounds between two looks at an accelerator whether all images are finished."""
FEWEST_REPLAYS = 16
"""Rounds that a graph has to be good for: to make one costs as much as some rounds do."""
ACCEPT, PICK, DRAFT = range(3)
"""What the uniforms of a slot in a round are for."""


class Network(Protocol):
    """What is decoded: an autoregressive network that remembers the tokens that it was given."""

    def first(self) -> Tensor:
        """Logits (R, V) of the first token: the condition has been read."""
        ...

    def score(self, ids: Tensor, first: Tensor | int) -> Tensor:
        """Logits (R, L, V) of the token after each of `ids` (B, L), which are tokens `first` (B,) and on of each image,
        or of all images alike; the tokens before are those of earlier calls, and what these held beyond is forgotten.
        """
        ...


class Noise(NamedTuple):
    """The random numbers of a call: uniforms in [0, 1)."""

    first: Tensor
    """(B,): for the first token."""
    rounds: Tensor
    """(B, N - 1, L, 3): for each round and place of the window, see `ACCEPT`, `PICK` and `DRAFT`."""
    gumbel: Tensor | None = None
    """(B, N, V): Gumbel noise that each token keeps, for Gumbel coupling."""


class Window(NamedTuple):
    """The slots of one call: slot i reads token starts + i and predicts token starts + i + 1."""

    starts: Tensor
    """(B,)."""
    width: int
    """L of this call."""
    held: Tensor
    """(B,): tokens that are settled; those of the window after them are drafts."""

    @property
    def targets(self) -> Tensor:
        """(B, L): the token that each slot predicts."""
        return self.starts[:, None] + torch.arange(1, self.width + 1, device=self.starts.device)

    @property
    def places(self) -> Tensor:
        """(B, L): how far each of these lies after what is settled; 0 for what is settled itself."""
        return (self.targets - self.held[:, None]).clamp(min=0)


class Drafter(Protocol):
    """Where drafts come from."""

    def begin(self, first: Tensor, width: int) -> None:
        """The law (B, V) that the first token was drawn from, and the most slots of a call."""
        ...

    def propose(self, tokens: Tensor, window: Window, uniforms: Tensor) -> Tensor:
        """The laws q (B, L - 1, V) that the drafts of a window were drawn from; those that are missing in `tokens` are
        drawn now, by uniforms (B, L - 1), and written there.
        """
        ...

    def learn(self, laws: Tensor, window: Window, ids: Tensor) -> None:
        """What the network said of the window, after each of its ids (B, L): laws (B, L, V)."""
        ...


class Law:
    """Laws (B, L, V) of logits (R, L, V), with the guidance of each token."""

    def __init__(self, sampling: TokenSampling, num_tokens: int, device: torch.device) -> None:
        self.sampling = sampling
        self.guided = sampling.guidance != 1
        scales = [sampling.scale(token, num_tokens) for token in range(num_tokens)]
        self.scales = None if len(set(scales)) == 1 else torch.tensor(scales, dtype=torch.float32, device=device)

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """`tokens` (B, L) are the numbers of the tokens that are predicted."""
        if not self.guided:
            return law(logits, self.sampling)
        conditional, unconditional = logits.chunk(2)
        if self.scales is None:
            return law(conditional, self.sampling, unconditional)
        scales = self.scales[tokens.clamp(max=len(self.scales) - 1)][..., None]
        conditional = conditional.float()
        guided = guide(conditional, unconditional.float(), scales)
        return law(guided.where(scales != 1, conditional), self.sampling)


# ---------------------------------------------------------------- drafters


class Jacobi:
    """Drafts that the network proposed itself, one call before, given drafts that may have changed since (SJD).

    What has not been in a window yet is drawn from `tail`: `uniform`, or the last law that the window had. Either is
    the true law of the draft, so that the rules stay exact.
    """

    def __init__(self, tail: str = "last", gumbel: Tensor | None = None) -> None:
        self.tail, self.gumbel = tail, gumbel

    def begin(self, first: Tensor, width: int) -> None:
        self.laws = first[:, None].repeat(1, width, 1)
        self.count = torch.ones((), dtype=torch.long, device=first.device)  # laws that are there: the rest is its last
        self.known = torch.zeros(len(first), dtype=torch.long, device=first.device)  # the token of the first law

    def propose(self, tokens: Tensor, window: Window, uniforms: Tensor) -> Tensor:
        targets = window.targets[:, :-1]
        place, rows = targets - self.known[:, None], torch.arange(len(tokens), device=tokens.device)[:, None]
        new = place >= self.count
        law = self.draw(tokens, targets, new, uniforms)
        return torch.where(new[..., None], law, self.laws[rows, place.clamp(0, self.laws.shape[1] - 1)])

    def draw(self, tokens: Tensor, targets: Tensor, new: Tensor, uniforms: Tensor) -> Tensor:
        """Writes drafts of those `targets` (B, L - 1) that are `new`; the law of all, which broadcasts to
        (B, L - 1, V).
        """
        last = self.laws[:, -1]
        if self.tail == "uniform":
            last = torch.full_like(last, 1 / last.shape[-1])
        if self.gumbel is None:
            drawn = draw_several(last, uniforms)
        else:
            drawn = (last.log()[:, None] + noise_of(self.gumbel, targets)).argmax(dim=-1)
        tokens.scatter_(1, targets, drawn.where(new, tokens.gather(1, targets)))
        return last[:, None]

    def learn(self, laws: Tensor, window: Window, ids: Tensor) -> None:
        if laws.shape == self.laws.shape:
            self.laws.copy_(laws)
        else:  # of a window that shrinks
            self.laws = laws
        self.count.fill_(laws.shape[1])
        self.known.copy_(window.starts + 1)


class DraftNetwork:
    """Drafts of a smaller network, one token after the other (Leviathan et al., Chen et al.)."""

    def __init__(self, network: Network, law: Law, num_tokens: int) -> None:
        self.network, self.law, self.num_tokens = network, law, num_tokens

    def begin(self, first: Tensor, width: int) -> None:
        self.network.first()

    def propose(self, tokens: Tensor, window: Window, uniforms: Tensor) -> Tensor:
        count = window.width - 1
        found: list[Tensor] = []
        held = window.held.clamp(max=self.num_tokens - 1)  # finished images draw something that nobody reads
        # two tokens: where all drafts were accepted, the last of them has not been read yet
        first = (held - 2).clamp(min=0)
        pair = first[:, None] + torch.arange(2, device=held.device)
        for number in range(count):
            target = held + number
            if number == 0:
                logits = self.network.score(tokens.gather(1, pair), in_one(first))
                slot = (held - 1 - first).repeat(len(logits) // len(held))
                logits = logits[torch.arange(len(logits), device=held.device), slot][:, None]
            else:
                before = (target - 1).clamp(max=self.num_tokens - 2)
                logits = self.network.score(tokens.gather(1, before[:, None]), in_one(before))
            found.append(self.law(logits, target[:, None]))
            slot = (target - window.starts - 1).clamp(max=count - 1)
            drawn = draw(found[-1][:, 0], uniforms.gather(1, slot[:, None])[:, 0])
            unsettled = target >= window.held
            tokens.scatter_(
                1, target[:, None], drawn.where(unsettled, tokens.gather(1, target[:, None])[:, 0])[:, None]
            )
        laws = torch.cat(found, dim=1)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return laws[rows, window.places[:, :-1].clamp(max=count - 1)]

    def learn(self, laws: Tensor, window: Window, ids: Tensor) -> None:
        """Nothing: it has read what it proposed."""


def in_one(first: Tensor) -> Tensor | int:
    """A number in place of `first` (B,), where all of them are the same; that is looked at where shapes may change."""
    if has_one_shape(first.device):
        return first
    low, high = first.aminmax()
    return int(low) if low == high else first


def noise_of(gumbel: Tensor, targets: Tensor) -> Tensor:
    """The noise (B, L, V) of tokens (B, L)."""
    rows = torch.arange(len(gumbel), device=gumbel.device)[:, None]
    return gumbel[rows, targets.clamp(max=gumbel.shape[1] - 1)]


# ---------------------------------------------------------------- the loop


def has_one_shape(device: torch.device) -> bool:
    """Whether all rounds have tensors of the same shapes, and nothing is read of them."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Rounds:
    """What rounds work with, and the tensors that they change in place."""

    network: Network
    law: Law
    drafter: Drafter
    noise: Noise
    num_tokens: int
    """N."""
    rule: Rule
    keep: bool
    tokens: Tensor
    """(B, N and a window): drafts may reach past the end."""
    held: Tensor
    """(B,): tokens of each image that are settled."""
    number: Tensor
    """(1,): rounds that are done."""
    calls: Calls
    """Of the rounds."""

    def advance(self, width: int) -> None:
        """A round with a window of `width` slots."""
        tokens, held = self.tokens, self.held
        slots = Window((held - 1).clamp(max=self.num_tokens - 1 - width), width, held)
        targets, uniforms = slots.targets, self.noise.rounds.index_select(1, self.number)[:, 0]
        uniforms = uniforms.gather(1, slots.places[..., None].expand(-1, -1, 3))
        if width > 1:
            q = self.drafter.propose(tokens, slots, uniforms[:, :-1, DRAFT])
        ids = tokens.gather(1, targets - 1)
        p = self.law(self.network.score(ids, in_one(slots.starts)), targets)
        self.drafter.learn(p, slots, ids)
        is_settled = targets < held[:, None]
        found = judge(
            p,
            q if width > 1 else p[:, :0],
            ids[:, 1:],
            uniforms[:, :-1, ACCEPT],
            uniforms[..., PICK],
            rule=self.rule,
            keep=self.keep,
            noise=None if self.noise.gumbel is None else noise_of(self.noise.gumbel, targets),
            settled=is_settled[:, :-1],
        )
        tokens.scatter_(1, targets, tokens.gather(1, targets).where(is_settled, found.tokens))
        now = (slots.starts + found.accepted + 2).clamp(max=self.num_tokens)
        _count(self.calls, slots, found.accepted, now)
        held.copy_(now)
        self.number.add_(1)


@torch.no_grad()
def decode(
    network: Network,
    law: Law,
    drafter: Drafter,
    noise: Noise,
    *,
    num_tokens: int,
    window: int,
    rule: Rule = token_rule,
    keep: bool = False,
    on_step: OnStep | None = None,
    replay: bool = False,
) -> Tokens:
    """Draws `num_tokens` tokens (N) of each image in calls of at most `window` slots, one of them a settled token.

    `keep` is maximal coupling, and Gumbel noise couples, see `speculative_rules.judge`. `on_step` is told how many
    tokens are settled in all images; on an accelerator how many that are at least. With `replay`, rounds on a GPU are
    replays of a CUDA graph, unless there are too few: the network must then change nothing but tensors, in place.
    """
    images, device = len(noise.first), noise.first.device
    widest, one_shape = min(window, num_tokens - 1), has_one_shape(device)
    held = torch.ones(images, dtype=torch.long, device=device)
    tokens = torch.zeros(images, num_tokens + window, dtype=torch.long, device=device)
    number, calls = torch.zeros_like(held[:1]), Calls.none(images, tokens.shape[1], device)
    rounds = Rounds(network, law, drafter, noise, num_tokens, rule, keep, tokens, held, number, calls)
    first = law(network.first()[:, None], torch.zeros_like(held)[:, None])[:, 0]
    tokens[:, 0] = draw(first, noise.first)
    drafter.begin(first, widest)

    def widest_round() -> None:
        rounds.advance(widest)

    worthwhile = num_tokens - 1 - WARM_UP >= FEWEST_REPLAYS  # if no round settled more than a token of an image
    advance = Replayed(widest_round, device) if replay and worthwhile else widest_round
    fewest = -(-(num_tokens - 1) // max(1, widest))
    known = 1  # tokens that are settled in all images, as far as the host knows: a round settles one at least
    for done in range(num_tokens - 1):
        if not one_shape or (done >= fewest and (done - fewest) % LOOK_EVERY == 0):
            known = max(known, int(held.min()))
        if known == num_tokens:
            break
        if on_step is not None:
            on_step(known)
        if one_shape:
            advance()
        else:
            rounds.advance(min(window, num_tokens - known))
        known += 1
    if on_step is not None:
        on_step(num_tokens)
    ids, lengths = tokens[:, :num_tokens], torch.full_like(held, num_tokens)
    judged, accepted = calls.judged[:, :num_tokens], calls.accepted[:, :num_tokens]
    return Tokens(ids, lengths, calls=Calls(calls.calls + 1, lengths, calls.single, judged, accepted, calls.seconds))


def _count(calls: Calls, window: Window, accepted: Tensor, now: Tensor) -> None:
    """Adds what a round did: `accepted` (B,) drafts of the window, settled ones included, and `now` (B,) held."""
    active, targets = window.held < now, window.targets[:, :-1]
    calls.calls.add_(active)
    calls.single.add_(active & (now - window.held == 1))
    slot, drafted = torch.arange(targets.shape[1], device=now.device), targets >= window.held[:, None]
    calls.judged.scatter_add_(1, targets, (drafted & (slot <= accepted[:, None])).long())
    calls.accepted.scatter_add_(1, targets, (drafted & (slot < accepted[:, None])).long())
