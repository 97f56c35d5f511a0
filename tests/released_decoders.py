"""Speculative decoders as others released them, written from their description, for the audit of who is lossless.

All are on the toy of `toy_law`, and plain: laws are computed anew from the whole sequence, nothing is cached, and an
image is a row. None of this is code of the suite; `imgtok.generators.speculative` is.

Shapes: B images, N tokens, V ids, K branches of a tree, D levels of it, M nodes of its first path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from toy_law import CPU, SMALL, Shape, number_of, tables_of

from imgtok.generators.sampling import TokenSampling, draw
from imgtok.generators.speculative import Law
from imgtok.generators.speculative_rules import Rule, residual, token_rule


@dataclass
class Toy:
    """Sequences that are being drawn."""

    sampling: TokenSampling
    images: int
    seed: int
    shape: Shape = SMALL

    def __post_init__(self) -> None:
        self.ids, self.length = self.shape
        self.law = Law(self.sampling, self.length, CPU)
        self.tables = tables_of(self.sampling, self.shape)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.tokens = torch.zeros(self.images, self.length, dtype=torch.long)
        self.tokens[:, 0] = draw(self.laws(self.tokens)[:, 0], self.uniforms())
        self.held = torch.ones(self.images, dtype=torch.long)

    def uniforms(self, *shape: int) -> Tensor:
        return torch.rand(self.images, *shape, generator=self.generator, dtype=torch.float64)

    def laws(self, tokens: Tensor) -> Tensor:
        """(B, N, V): the law of each token after those before it."""
        rows = number_of(tokens, self.ids)[:, :-1]
        return self.law(torch.cat([table[rows] for table in self.tables]), torch.arange(self.length).expand(rows.shape))

    @property
    def unfinished(self) -> bool:
        return bool((self.held < self.length).any())


def first_false(passes: Tensor) -> Tensor:
    """How many come before the first that is False, along the last dimension."""
    return passes.long().cumprod(dim=-1).sum(dim=-1)


# ---------------------------------------------------------------- Jacobi decoding


def jacobi(
    sampling: TokenSampling,
    images: int,
    *,
    batch: int = 1,
    window: int = 4,
    rule: Rule = token_rule,
    keep: bool = False,
    table: int | None = None,
    stale: bool,
    seed: int = 0,
    shape: Shape = SMALL,
) -> Tensor:
    """Sequences (B, N) by SJD, GSD (another `rule`) or SCD (`keep`; or Gumbel noise for `table` positions, which others
    share modulo that number).

    As released, the images of a batch are cut at the shortest of them, new drafts are any id with a one-hot law, and
    what was accepted keeps its old law where it is judged again (`stale`): accepted drafts that were cut, and with
    `keep` all that stayed.
    """
    ids, length = shape
    toy, place = Toy(sampling, images, seed, shape), torch.arange(length)
    q = torch.zeros(images, length, ids)
    drafted = torch.zeros(images, length, dtype=torch.bool)
    noise = None
    if table is not None:
        noise = toy.uniforms(table, ids).clamp(min=1e-30).log().neg().log().neg()[:, place % table]
    while toy.unfinished:
        held, tokens = toy.held[:, None], toy.tokens
        ends = (held + window - 1).clamp(max=length - 1)  # the slot there has no draft
        fresh = (place >= held) & (place < ends) & ~drafted
        tokens = tokens.where(~fresh, (toy.uniforms(length) * ids).long())
        q = torch.where(fresh[..., None], torch.nn.functional.one_hot(tokens, ids).float(), q)
        p = toy.laws(tokens)
        judged = (place >= held) & (place < ends)
        passes = ((toy.uniforms(length) < rule(p, q, tokens)) & judged) | (place < held)
        stop = first_false(passes)[:, None]
        falls = judged & (~passes if keep else place == stop)
        drawn = draw(torch.where(falls[..., None], residual(p, q), p), toy.uniforms(length))
        if noise is not None:
            drawn = drawn.where(falls, (p.log() + noise).argmax(dim=-1))
        stays = (judged & passes) if keep else (place < stop)
        tokens = tokens.where(stays | (place < held), drawn.where(place <= ends, tokens))
        shortest = (stop[:, 0] + 1 - toy.held).view(-1, batch).amin(dim=1).repeat_interleave(batch)
        toy.held = (toy.held + shortest).clamp(max=length)
        old = stays & judged if stale else torch.zeros_like(stays)
        q = torch.where(old[..., None], q, p)
        drafted = (place >= held) & (place <= ends) & (place >= toy.held[:, None])
        toy.tokens = tokens
    return toy.tokens


# ---------------------------------------------------------------- SJD-PAC: a tree, and judging on after a failure


@dataclass(frozen=True)
class Mistakes:
    """What of SJD-PAC is as it was released; all False is the repaired one."""

    path: bool = True
    """F1: the longest path is taken, though an earlier sibling had passed."""
    siblings: bool = True
    """F2: branches after the first come from the residual, and are judged as if they came from the law."""
    failing: bool = True
    """F3: a draft that failed inside the tree is replaced by a draw from the residual of its last sibling."""
    bonus: bool = True
    """F4: after a whole path, any token."""


Node = tuple[int, ...]
"""A node of the tree: the branches that lead to it. () is the last settled token."""


@dataclass
class Tree:
    """One round. Depth d holds the same candidates (B, K) for every parent, whose recorded law is q[:, d - 1]; from
    depth `levels` on there is a single chain, below the first candidates. `length` is the depth of the last node.
    """

    toy: Toy
    candidates: Tensor
    """(B, K, length)."""
    q: Tensor
    """(B, length, V)."""
    levels: int

    def __post_init__(self) -> None:
        self.branches, self.length = self.candidates.shape[1:]
        self.plain: dict[Node, Tensor] = {(): self._law_after(())}
        self.left: dict[Node, Tensor] = {}
        """What a node leaves of the law where it is refused, and all siblings before it."""
        self.passes: dict[Node, Tensor] = {}
        self.nodes: list[Node] = [()]
        for node in self.nodes:  # which grows
            for branch in range(self.branches_below(node)):
                self._judge(node, branch)
                self.nodes.append((*node, branch))

    def branches_below(self, node: Node) -> int:
        if len(node) < self.levels - 1:
            return self.branches
        return 0 if len(node) == self.length or any(node) else 1

    def token(self, node: Node) -> Tensor:
        return self.candidates[:, node[-1], len(node) - 1]

    def _law_after(self, node: Node) -> Tensor:
        """The law (B, V) of the token after a node; where that lies after the end, any."""
        toy, rows = self.toy, torch.arange(self.toy.images)
        tokens = torch.cat([toy.tokens, torch.zeros(toy.images, self.length + 1, dtype=torch.long)], dim=1)
        for depth in range(len(node)):
            tokens[rows, toy.held + depth] = self.token(node[: depth + 1])
        at = toy.held + len(node)
        found = toy.laws(tokens[:, : toy.length])[rows, at.clamp(max=toy.length - 1)]
        return torch.where((at < toy.length)[:, None], found, 1 / toy.ids)

    def _judge(self, parent: Node, branch: int) -> None:
        node, depth = (*parent, branch), len(parent)
        p = self.left[(*parent, branch - 1)] if branch else self.plain[parent]
        q = without(self.q[:, depth], self.candidates[:, :branch, depth])
        x = self.token(node)[:, None]
        self.passes[node] = p.gather(1, x)[:, 0] > self.toy.uniforms() * q.gather(1, x)[:, 0]
        self.left[node] = residual(p, q)
        self.plain[node] = self._law_after(node)

    # ------------------------------------------------ which path, and what then

    def ends(self, *, longest: bool) -> dict[Node, Tensor]:
        """By node, the images (B,) whose path ends there: the longest, the first of several, or that which goes down
        the first sibling that passes.
        """
        reached = {(): torch.ones(self.toy.images, dtype=torch.bool)}
        for node in self.nodes[1:]:
            *before, branch = node
            earlier = [self.passes[(*before, other)] for other in range(branch)] if not longest else []
            reached[node] = reached[tuple(before)] & self.passes[node]
            for other in earlier:
                reached[node] = reached[node] & ~other
        depth = torch.stack([len(node) * here for node, here in reached.items()]).amax(dim=0)
        found, taken = {}, torch.zeros_like(reached[()])
        for node in sorted(self.nodes):
            found[node] = reached[node] & (depth == len(node)) & ~taken
            taken = taken | found[node]
        return found

    def law_of_one_more(self, node: Node, mistakes: Mistakes) -> Tensor:
        """The law (B, V) of the token after a path that ends at a node."""
        below = self.branches_below(node)
        if below:
            return self.left[(*node, below - 1)]
        if len(node) == self.length and mistakes.bonus:
            return torch.full_like(self.plain[node], 1 / self.toy.ids)
        return self.plain[node]

    def next_candidates(self, node: Node, mistakes: Mistakes) -> tuple[Tensor, Tensor]:
        """Candidates and laws of the next round, after paths that end at a node."""
        candidates, laws = [], []
        for depth in range(len(node) + 1, self.length):
            below = (*node, *[0] * (depth - len(node)))  # the parent: drafts that were refused go on as contexts
            if depth >= self.levels:
                below = (0,) * depth
            plain, child = self.plain[below], (*below, 0)
            judged = self.branches_below(below) > 0
            passes = self.passes[child] if judged else torch.zeros(self.toy.images, dtype=torch.bool)
            own = self.left[child] if judged else plain
            last = self.left[(*below, self.branches_below(below) - 1)] if judged else plain
            refused = last if mistakes.failing else own
            first = draw(torch.where(passes[:, None], own, refused), self.toy.uniforms())
            if judged:
                first = self.token(child).where(passes, first)
            others = torch.where(passes[:, None], own, refused) if mistakes.siblings else plain
            chosen = [first]
            while len(chosen) < self.branches:
                left = others
                if not (mistakes.siblings and len(chosen) == 1):
                    left = without(others, torch.stack(chosen, dim=1))
                else:  # of a draft that stayed the residual is taken as it is, of one that failed without the first
                    left = torch.where(passes[:, None], others, without(others, first[:, None]))
                chosen.append(draw(left, self.toy.uniforms()))
            candidates.append(torch.stack(chosen, dim=1))
            laws.append(plain)
        while len(candidates) < self.length:
            candidates.append(different(self.toy, self.branches))
            laws.append(torch.full_like(self.plain[()], 1 / self.toy.ids))
        return torch.stack(candidates, dim=2), torch.stack(laws, dim=1)


def sjd_pac(
    sampling: TokenSampling,
    images: int,
    mistakes: Mistakes,
    *,
    branches: int = 2,
    levels: int = 3,
    length: int = 3,
    seed: int = 0,
    shape: Shape = SMALL,
) -> Tensor:
    """Sequences (B, N) by SJD-PAC (arXiv 2603.18599), from section 7 of our second_ring.md: `branches` candidates at
    each depth of a tree of `levels`, and a chain to depth `length`.
    """
    toy = Toy(sampling, images, seed, shape)
    candidates = torch.stack([different(toy, branches) for _ in range(length)], dim=2)
    q = torch.full((images, length, toy.ids), 1 / toy.ids)
    while toy.unfinished:
        tree = Tree(toy, candidates, q, levels)
        candidates, q, held = candidates.clone(), q.clone(), toy.held.clone()
        for node, here in tree.ends(longest=mistakes.path).items():
            if not here.any():
                continue
            path = [tree.token(node[: depth + 1]) for depth in range(len(node))]
            path.append(draw(tree.law_of_one_more(node, mistakes), toy.uniforms()))
            for depth, token in enumerate(path):
                writes = here & (toy.held + depth < toy.length)
                toy.tokens[writes, (toy.held + depth)[writes]] = token[writes]
            following, laws = tree.next_candidates(node, mistakes)
            candidates[here], q[here] = following[here], laws[here]
            held[here] = (toy.held[here] + len(path)).clamp(max=toy.length)
        toy.held = held
    return toy.tokens


def without(law: Tensor, ids: Tensor) -> Tensor:
    """The law (B, V) with some ids (B, n) left out. Where nothing is left, id 0 is, as the released code has it."""
    left = law.scatter(1, ids, 0.0) + 1e-20 * (torch.arange(law.shape[1]) == 0)
    return left / left.sum(dim=1, keepdim=True) if ids.shape[1] else law


def different(toy: Toy, count: int) -> Tensor:
    """Ids (B, count), all different, any as likely as the others."""
    return toy.uniforms(toy.ids).argsort(dim=1)[:, :count]
