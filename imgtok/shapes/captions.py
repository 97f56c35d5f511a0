"""Sentences about scenes of `imgtok.shapes.world`: true, in a closed vocabulary, the same text every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from imgtok.shapes.world import (
    COLOURS,
    HELD_OUT_RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Draws,
    Object,
    Scene,
    relation_between,
)

# Part of VERSION: a word may be added or changed only together with the version, or trained text models break.
VOCABULARY = (
    *("a", "and", "the", "is", "in", "of", "to", ",", "left", "right", "above", "below", "under"),
    *("top", "center", "bottom"),
    *SIZES,
    *TEXTURES,
    *COLOURS,
    *SHAPES,
)
HOLDING = "holding"  # the one word more of captions of scenes whose objects hold others
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
_PHRASES = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}

Role = Literal["det", "size", "texture", "colour", "object", "relation", "position", "conj", "holding"]


class Token(NamedTuple):
    """A word of a caption: its role and the object that it belongs to, -1 for none: a position in the facts, first of
    `Facts.objects` and then of `Facts.held`.
    """

    word: str
    role: Role
    object: int


@dataclass(frozen=True, kw_only=True)
class ObjectFacts:
    """What a caption says of one object; None is not said."""

    shape: str
    colour: str
    texture: str | None = None
    size: str | None = None
    cell: str | None = None


@dataclass(frozen=True)
class Relation:
    """Object `subject` lies `relation` (left, right, above, below) of object `reference`; both count from 0."""

    subject: int
    relation: str
    reference: int


@dataclass(frozen=True)
class Held:
    """Object `holder`, counted from 0, holds another one."""

    holder: int
    object: ObjectFacts


@dataclass(frozen=True)
class Facts:
    """All that a caption asserts, objects in the order of mention."""

    objects: tuple[ObjectFacts, ...]
    relations: tuple[Relation, ...] = ()
    held: tuple[Held, ...] = ()
    """What objects hold; one each at most."""


@dataclass(frozen=True)
class Caption:
    """A sentence about a scene. `order[k]` is the place in the scene of the k-th object named."""

    tokens: tuple[Token, ...]
    facts: Facts
    order: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join(token.word for token in self.tokens).replace(" ,", ",")


def true_facts(scene: Scene) -> Facts:
    """Every attribute and cell of every object and every relation that holds: for judging reconstructions."""
    items = scene.objects
    objects = tuple(
        ObjectFacts(shape=o.shape, colour=o.colour, texture=o.texture, size=o.size, cell=cell_of(o.x, o.y))
        for o in items
    )
    relations = (
        (a, relation_between((items[a].x, items[a].y), (items[b].x, items[b].y)), b)
        for a in range(len(items))
        for b in range(a + 1, len(items))
    )
    held = tuple(Held(k, _held_facts(o.holding, 2)) for k, o in enumerate(items) if o.holding is not None)
    return Facts(objects, tuple(Relation(a, name, b) for a, name, b in relations if name is not None), held)


def cell_of(x: float, y: float) -> str:
    """Name of the 3x3 cell that holds a point of the canvas."""
    column, row = (min(2, max(0, int(3.0 * value))) for value in (x, y))
    return CELLS[3 * row + column]


def caption(scene: Scene, split: str, index: int) -> Caption:
    """Describes scene `index` of a split: true, closed vocabulary, the same text every time.

    The two scenes of a "swap" pair get one sentence with the colours exchanged. Held-out relations are asserted in
    the split "relation" alone, and there always; "same_shape" captions always say which object is where.
    """
    draws = Draws(split, np.array([index // 2 if split == "swap" else index]))
    uniform = draws("caption", (1, 8))[0]
    order = tuple(
        int(k) for k in np.argsort(draws("mention", (1, max(1, len(scene.objects))))[0])[: len(scene.objects)]
    )
    relation = _pick_relation(scene, order, split, uniform)
    joined = relation is not None and len(order) == 2 and uniform[1] < 0.5
    detail = int(3.0 * uniform[2])
    holds = [scene.objects[k].holding for k in order]
    with_cells = uniform[3] < 0.15 and not joined and not any(holds)  # "in the top left" might be said of what is held
    objects = tuple(_object_facts(scene.objects[k], detail, with_cells) for k in order)
    held = tuple(Held(k, _held_facts(item, detail)) for k, item in enumerate(holds) if item is not None)
    facts = Facts(objects, () if relation is None else (relation,), held)
    phrase = _phrase(relation, uniform[4])
    if joined and relation is not None:
        subject, reference = relation.subject, relation.reference
        tokens = [*_named(facts, subject), *phrase, *_named(facts, reference)]
    else:
        tokens = _list(facts)
        if relation is not None:
            tokens += [Token(",", "conj", -1), *_clause(objects, relation, phrase)]
    return Caption(tuple(tokens), facts, order)


# ---------------------------------------------------------------- from a sentence to what it says


def facts_of(text: str) -> Facts:
    """What a sentence of this grammar asserts: the way back from `Caption.text`.

    Raises ValueError for a sentence of another form, with the word where it leaves the grammar.
    """
    return _Reader(text).facts()


class _Reader:
    """Reads `caption = list [", " clause] | noun REL noun` from left to right; a noun may be "... holding a ..."."""

    def __init__(self, text: str) -> None:
        self.text, self.words, self.place = text, text.lower().replace(",", " , ").rstrip(" .").split(), 0
        self.held: list[Held] = []

    def facts(self) -> Facts:
        objects = [self._named(0)]
        relations: list[Relation] = []
        if self._relation_follows():
            name = self._relation()
            objects.append(self._named(1))
            relations = [Relation(0, name, 1)]
        while self._next() in (",", "and"):
            last = self._take() == "and"
            if not last and self._next() == "the":
                relations.append(self._clause(objects))
                break
            objects.append(self._named(len(objects)))
        if self._next():
            self._refuse("the end")
        return Facts(tuple(objects), tuple(relations), tuple(self.held))

    def _next(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.words[place] if place < len(self.words) else ""

    def _take(self, *allowed: str) -> str:
        """The next word, which must be one of those that are allowed, if any are named."""
        word = self._next()
        if allowed and word not in allowed:
            self._refuse(" or ".join(allowed) if len(allowed) < 5 else f"one of {', '.join(allowed)}")
        self.place += 1
        return word

    def _refuse(self, wanted: str) -> None:
        found = repr(self._next()) if self._next() else "the end"
        raise ValueError(f"caption {self.text!r}: after {self.place} words there is {found}, and {wanted} is expected")

    def _named(self, place: int) -> ObjectFacts:
        """An object and, if the words go on so, what it holds."""
        item = self._noun()
        if self._next() == HOLDING:
            self._take()
            self.held.append(Held(place, self._noun()))
        return item

    def _noun(self) -> ObjectFacts:
        self._take("a", "an")
        size = self._take() if self._next() in SIZES else None
        texture = self._take() if self._next() in TEXTURES else None
        colour, shape = self._take(*COLOURS), self._take(*SHAPES)
        cell = None
        if self._next() == "in":
            self._take("in")
            self._take("the")
            both = f"{self._next()} {self._next(1)}"
            cell = both if both in CELLS else self._next()
            if cell not in CELLS:
                self._refuse(f"one of {', '.join(CELLS)}")
            self.place += len(cell.split())
        return ObjectFacts(shape=shape, colour=colour, texture=texture, size=size, cell=cell)

    def _relation_follows(self) -> bool:
        return self._next() in ("to", "left", "right", "above", "below", "under")

    def _relation(self) -> str:
        if self._next() == "to":
            self._take("to")
            self._take("the")
        word = self._take("left", "right", "above", "below", "under")
        if word in ("left", "right"):
            self._take("of")
        return "below" if word == "under" else word

    def _clause(self, objects: Sequence[ObjectFacts]) -> Relation:
        subject = self._known(objects)
        self._take("is")
        name = self._relation()
        return Relation(subject, name, self._known(objects))

    def _known(self, objects: Sequence[ObjectFacts]) -> int:
        """The place of "the colour shape" among the objects that were named."""
        self._take("the")
        colour, shape = self._take(*COLOURS), self._take(*SHAPES)
        for place, item in enumerate(objects):
            if (item.colour, item.shape) == (colour, shape):
                return place
        raise ValueError(f"caption {self.text!r}: 'the {colour} {shape}' was not named before")


# ---------------------------------------------------------------- from a scene to a sentence


def _pick_relation(scene: Scene, order: tuple[int, ...], split: str, uniform: np.ndarray) -> Relation | None:
    """One relation between two objects in the order of mention, or none."""
    needed = split in ("same_shape", "relation")
    if not needed and uniform[0] >= 0.5:
        return None
    items = [scene.objects[k] for k in order]
    found: list[Relation] = []
    for a, first in enumerate(items):
        for b, second in enumerate(items):
            name = relation_between((first.x, first.y), (second.x, second.y)) if a != b else None
            held_out = (name, SHAPES.index(first.shape), SHAPES.index(second.shape)) in HELD_OUT_RELATIONS
            if name is not None and held_out <= (split == "relation"):
                found.append(Relation(a, name, b))
    return found[int(uniform[5] * len(found))] if found else None


def _object_facts(item: Object, detail: int, with_cell: bool) -> ObjectFacts:
    return ObjectFacts(
        shape=item.shape,
        colour=item.colour,
        texture=item.texture if detail >= 1 else None,
        size=item.size if detail >= 2 else None,
        cell=cell_of(item.x, item.y) if with_cell else None,
    )


def _held_facts(item: Object, detail: int) -> ObjectFacts:
    """Of what is held: it is solid, and lies where its holder does."""
    return ObjectFacts(shape=item.shape, colour=item.colour, size=item.size if detail >= 2 else None)


def _phrase(relation: Relation | None, uniform: float) -> list[Token]:
    if relation is None:
        return []
    choices = _PHRASES[relation.relation]
    return [Token(word, "relation", -1) for word in choices[int(uniform * len(choices))].split()]


def _noun(item: ObjectFacts, k: int) -> list[Token]:
    """Words of: a [size] [texture] colour shape [in the cell]."""
    tokens = [Token("a", "det", k)]
    tokens += [Token(item.size, "size", k)] if item.size else []
    tokens += [Token(item.texture, "texture", k)] if item.texture else []
    tokens += [Token(item.colour, "colour", k), Token(item.shape, "object", k)]
    tokens += [Token(word, "position", k) for word in f"in the {item.cell}".split()] if item.cell else []
    return tokens


def _named(facts: Facts, k: int) -> list[Token]:
    """Words of: noun [holding noun]."""
    tokens = _noun(facts.objects[k], k)
    for number, held in enumerate(facts.held):
        if held.holder == k:
            tokens += [Token(HOLDING, "holding", k), *_noun(held.object, len(facts.objects) + number)]
    return tokens


def _list(facts: Facts) -> list[Token]:
    """Words of: noun {, noun} and noun."""
    tokens: list[Token] = []
    for k in range(len(facts.objects)):
        if k:
            tokens.append(Token("and" if k == len(facts.objects) - 1 else ",", "conj", -1))
        tokens += _named(facts, k)
    return tokens


def _clause(objects: Sequence[ObjectFacts], relation: Relation, phrase: list[Token]) -> list[Token]:
    """Words of: the colour shape is REL the colour shape."""
    subject, reference = (_definite(objects[k], k) for k in (relation.subject, relation.reference))
    return [*subject, Token("is", "relation", -1), *phrase, *reference]


def _definite(item: ObjectFacts, k: int) -> list[Token]:
    return [Token("the", "det", k), Token(item.colour, "colour", k), Token(item.shape, "object", k)]
