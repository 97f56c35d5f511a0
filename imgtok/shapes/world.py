"""A world of coloured shapes that can be drawn, described and read back exactly (see `imgtok.shapes.oracle`).

Scene `i` of a split depends on the split's name, `i` and the profile alone: random access, no files, the same on every
machine. The scene is continuous, so one scene can be drawn at any resolution.

Mode "class" shows one object and labels it `8 * shape + colour` (64 classes). Mode "text" shows one to four objects and
describes them in the closed vocabulary `VOCABULARY`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imgtok.config import PositiveInt, Range, check

VERSION = "imgtok-shapes-1"  # names the world, its random numbers and its vocabulary: change them, change this

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "crescent")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
SPLITS = ("train", "val", "novel", "same_shape", "swap", "crowd", "relation")
RELATIONS = ("left", "right", "above", "below")
NUM_CLASSES = len(SHAPES) * len(COLOURS)
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

BACKGROUND = (0.92, 0.92, 0.92)
PALETTE = (
    (0.86, 0.13, 0.13),
    (0.10, 0.60, 0.20),
    (0.12, 0.30, 0.85),
    (0.95, 0.85, 0.10),
    (0.96, 0.52, 0.08),
    (0.52, 0.16, 0.66),
    (0.10, 0.75, 0.80),
    (0.96, 0.45, 0.70),
)
RADII = (0.095, 0.135, 0.185)
DARK = 0.35  # a texture's second colour is this times the first

# (colour, shape) pairs that the splits train and val never show, as classes 8 * shape + colour: every colour and every
# shape occurs once, so each is still seen in seven other pairings.
_HELD_OUT_NAMES = (
    ("red", "circle"),
    ("pink", "square"),
    ("cyan", "triangle"),
    ("purple", "diamond"),
    ("orange", "cross"),
    ("yellow", "star"),
    ("blue", "ring"),
    ("green", "crescent"),
)
HELD_OUT_CLASSES = tuple(len(COLOURS) * SHAPES.index(s) + COLOURS.index(c) for c, s in _HELD_OUT_NAMES)

_JITTER = 0.04  # radii are drawn within this fraction of their size class
_GAP = 0.07  # between bounding circles: less than this merges at 32 pixels under blur
_MARGIN = 0.03  # between a bounding circle and the canvas edge: the oracle reads the background there
_CELL_KEEP_OFF = 0.03  # centres stay this far from the borders of the 3x3 cells
_RELATION_RATIO = 1.5  # a relation is asserted only when one axis difference exceeds the other by this factor
_COUNT_PROBABILITIES = (0.20, 0.40, 0.25, 0.15)
_MAX_OBJECTS = 4
_TRIES = 8
_MAX_ROUNDS = 400

# Radius of the circle about the centre that holds the outline, in units of the object's radius.
_BOUNDS = (0.92, 0.80 * math.sqrt(2), 1.10, 1.05, math.hypot(0.95, 0.33), 1.10, 0.95, 0.95)


# ------------------------------------------------------------------------------------------------ scenes


@dataclass(frozen=True, kw_only=True)
class Object:
    """One object of a scene; lengths are fractions of the canvas side."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def label(self) -> int:
        """The class, 8 * shape + colour."""
        return len(COLOURS) * SHAPES.index(self.shape) + COLOURS.index(self.colour)


@dataclass(frozen=True)
class Scene:
    """Up to four objects that do not overlap, largest first; (0, 0) is the top left corner of the canvas."""

    objects: tuple[Object, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        return cls(tuple(Object(**fields) for fields in json.loads(text)["objects"]))


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Rendered scenes of coloured shapes: nothing to download, any size, any number."""

    kind: Literal["shapes"] = "shapes"
    split: Literal["train", "val", "novel", "same_shape", "swap", "crowd", "relation"] = "train"
    """Which scenes; no two splits share one. Mode "class" knows train, val and novel (only held-out pairs)."""
    num_images: PositiveInt = 65536
    """Number of scenes in one epoch, at least 1."""
    mode: Literal["class", "text"] = "class"
    """"class": one object, label 8 * shape + colour. "text": one to four objects and a caption."""
    textures: tuple[str, ...] = TEXTURES
    """Textures that occur, of solid, striped, dotted, checkered."""
    sizes: tuple[str, ...] = SIZES
    """Sizes that occur, of small, medium, large (radius .095, .135, .185 of the canvas side)."""
    scale: Annotated[float, Range(0.0, 2.0, exclusive_low=True)] = 1.0
    """Factor on every radius, above 0 and at most 2. 1.3 gives pixel losses more foreground to see."""
    max_objects: Annotated[int, Range(1, 4)] = 4
    """Most objects in a scene of mode "text", 1 to 4."""
    held_out_pairs: Literal["split", "keep", "leave_out"] = "split"
    """The eight held-out (colour, shape) pairs: "split" leaves them out of every split but novel in mode "text" and
    keeps all 64 classes in mode "class"; "keep" and "leave_out" say so for both. The split novel always has them."""

    def __post_init__(self) -> None:
        check(self)
        _check_names("textures", self.textures, TEXTURES)
        _check_names("sizes", self.sizes, SIZES)
        if self.mode == "class" and self.split not in ("train", "val", "novel"):
            raise ValueError(f"split is {self.split!r}; mode 'class' has train, val and novel (or set mode: text)")
        needed = {"same_shape": 2, "swap": 2, "relation": 2, "crowd": 4}.get(self.split, 1)
        if self.mode == "text" and self.max_objects < needed:
            raise ValueError(f"max_objects is {self.max_objects}; split {self.split!r} needs {needed}")

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes 8 * shape + colour that may occur, in order."""
        held_out = set(HELD_OUT_CLASSES)
        if self.split == "novel":
            return tuple(sorted(held_out)) if self.mode == "class" else tuple(range(NUM_CLASSES))
        keep = self.held_out_pairs == "keep" or (self.held_out_pairs == "split" and self.mode == "class")
        return tuple(label for label in range(NUM_CLASSES) if keep or label not in held_out)


def _check_names(field: str, given: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    if not given or len(set(given)) != len(given) or not set(given) <= set(allowed):
        raise ValueError(f"{field} is {list(given)}; give one or more of {', '.join(allowed)}, each once")


@dataclass(frozen=True, kw_only=True)
class SceneTable:
    """Many scenes as arrays (N, M): the j-th object of a scene is there when j < count. Fast to sample and to draw."""

    count: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    texture: np.ndarray
    size: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, row: int) -> Scene:
        return Scene(tuple(self._object(row, j) for j in range(int(self.count[row]))))

    def __iter__(self) -> Iterator[Scene]:
        return (self[row] for row in range(len(self)))

    def _object(self, row: int, j: int) -> Object:
        return Object(
            shape=SHAPES[self.shape[row, j]],
            colour=COLOURS[self.colour[row, j]],
            texture=TEXTURES[self.texture[row, j]],
            size=SIZES[self.size[row, j]],
            x=float(self.x[row, j]),
            y=float(self.y[row, j]),
            radius=float(self.radius[row, j]),
        )

    @property
    def labels(self) -> np.ndarray:
        """Class of the first object, (N,) int64."""
        return len(COLOURS) * self.shape[:, 0] + self.colour[:, 0]

    def take(self, rows: np.ndarray) -> SceneTable:
        return SceneTable(**{name: array[rows] for name, array in vars(self).items()})

    @classmethod
    def stack(cls, scenes: Sequence[Scene]) -> SceneTable:
        """The table of scenes given one by one."""
        count = np.array([len(scene.objects) for scene in scenes], dtype=np.int64)
        columns = int(count.max(initial=1))
        arrays = _empty(len(scenes), columns)
        names = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}
        for row, scene in enumerate(scenes):
            for j, item in enumerate(scene.objects):
                for name, array in arrays.items():
                    value = getattr(item, name)
                    array[row, j] = names[name].index(value) if name in names else value
        return cls(count=count, **arrays)


def _empty(n: int, columns: int) -> dict[str, np.ndarray]:
    """Arrays of a SceneTable, all but count."""
    whole, real = ("shape", "colour", "texture", "size"), ("x", "y", "radius")
    types: dict[str, type] = dict.fromkeys(whole, np.int64) | dict.fromkeys(real, np.float64)
    return {name: np.zeros((n, columns), kind) for name, kind in types.items()}


def scene(split: str, index: int, **profile: object) -> Scene:
    """Scene `index` of a split in mode "text"; `profile` gives fields of ShapesConfig."""
    config = ShapesConfig(**{"mode": "text", "split": split, **profile})  # type: ignore[arg-type]
    return sample_scenes(config, [index])[0]


def class_scene(label: int, index: int, *, config: ShapesConfig | None = None) -> Scene:
    """The `index`-th scene of one class: the one that the dataset of `config` shows at `index * num_classes + rank`."""
    config = replace(config or ShapesConfig(), mode="class")
    if label not in config.classes:
        raise ValueError(f"label is {label}; this profile shows the classes {list(config.classes)}")
    position = index * len(config.classes) + config.classes.index(label)
    return sample_scenes(config, [position])[0]


def sample_scenes(config: ShapesConfig, indices: Sequence[int] | np.ndarray) -> SceneTable:
    """The scenes of the given indices (each at least 0). Row k depends on indices[k] and the profile alone."""
    numbers = np.asarray(indices, dtype=np.int64).reshape(-1)
    if (numbers < 0).any():
        raise ValueError(f"scene index {int(numbers.min())} is negative; indices start at 0")
    # The two scenes of a swap pair have one layout.
    layout = numbers // 2 if config.split == "swap" else numbers
    draws = _Draws(config.split, layout)
    count, label = _identities(config, numbers, draws)
    texture = _choose(draws("texture", label.shape), _codes(config.textures, TEXTURES))
    return _place(config, draws, count, label, texture)


class _Draws:
    """Counter-based uniform numbers: number d of a purpose is a hash of (split, scene index, purpose, d)."""

    def __init__(self, split: str, indices: np.ndarray) -> None:
        self.split = split
        self.indices = indices

    def __call__(self, purpose: str, shape: tuple[int, ...], rows: np.ndarray | None = None) -> np.ndarray:
        """Float64 in [0, 1). `shape` begins with the number of rows, all of them or those in `rows`."""
        indices = self.indices if rows is None else self.indices[rows]
        key = _mix(np.uint64(zlib.crc32(f"{VERSION}/{self.split}".encode()) << 32 | zlib.crc32(purpose.encode())))
        state = _mix(key + indices.astype(np.uint64) * _STEP)
        counter = np.arange(1, math.prod(shape[1:]) + 1, dtype=np.uint64) * _STEP
        bits = _mix(state[:, None] + counter[None, :])
        return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray | np.uint64) -> np.ndarray:
    """A bijective hash of 64-bit words (the finaliser of the SplitMix64 generator; wraps around by design)."""
    word = np.asarray(value, dtype=np.uint64).reshape(np.shape(value) or (1,))
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _choose(uniform: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return codes[(uniform * len(codes)).astype(np.int64)]


def _codes(names: Sequence[str], allowed: tuple[str, ...]) -> np.ndarray:
    return np.array([allowed.index(name) for name in names], dtype=np.int64)


def _identities(config: ShapesConfig, numbers: np.ndarray, draws: _Draws) -> tuple[np.ndarray, np.ndarray]:
    """Number of objects (N,) and class of every object (N, M), no class twice in a scene."""
    classes = np.array(config.classes, dtype=np.int64)
    n = len(numbers)
    if config.mode == "class":
        # Balanced: the classes in turn, so any run of num_classes indices shows each of them once.
        return np.ones(n, np.int64), classes[numbers % len(classes)][:, None]
    if config.split in ("same_shape", "swap", "relation"):
        return np.full(n, 2, np.int64), _PAIRS[config.split](set(config.classes), numbers, draws)
    if config.split == "crowd":
        count = np.full(n, 4, np.int64)
    else:
        odds = np.cumsum(_COUNT_PROBABILITIES[: config.max_objects])
        count = 1 + np.searchsorted(odds[:-1], draws("count", (n, 1))[:, 0] * odds[-1], side="right")
    # Ordering random keys draws without replacement.
    keys = draws("class", (n, len(classes)))
    if config.split == "novel":
        held_out = np.array(HELD_OUT_CLASSES)
        forced = _choose(draws("held out", (n, 1)), held_out)
        keys[np.arange(n)[:, None], forced] = -1.0
    return count, classes[np.argsort(keys, axis=1, kind="stable")[:, : int(count.max(initial=1))]]


def _same_shape_pairs(allowed: set[int], numbers: np.ndarray, draws: _Draws) -> np.ndarray:
    pairs = np.array([(a, b) for a in sorted(allowed) for b in sorted(allowed) if a != b and a // 8 == b // 8])
    return pairs[_choose(draws("pair", (len(numbers), 1))[:, 0], np.arange(len(pairs)))]


def _swap_pairs(allowed: set[int], numbers: np.ndarray, draws: _Draws) -> np.ndarray:
    """Two shapes, two colours; the odd index of a pair has the colours exchanged."""
    labels = sorted(allowed)
    pairs = np.array([(a, b) for a in labels for b in labels if _can_swap(a, b, allowed)])
    chosen = pairs[_choose(draws("pair", (len(numbers), 1))[:, 0], np.arange(len(pairs)))]
    exchanged = chosen // 8 * 8 + (chosen % 8)[:, ::-1]
    return np.where((numbers % 2 == 1)[:, None], exchanged, chosen)


def _can_swap(a: int, b: int, allowed: set[int]) -> bool:
    different = a // 8 != b // 8 and a % 8 != b % 8
    return different and a // 8 * 8 + b % 8 in allowed and b // 8 * 8 + a % 8 in allowed


def _relation_pairs(allowed: set[int], numbers: np.ndarray, draws: _Draws) -> np.ndarray:
    """Two shapes that have a held-out relation; `_place` draws until it holds."""
    shapes = np.array(sorted({(a, b) for _, a, b in HELD_OUT_RELATIONS}))
    chosen = shapes[_choose(draws("pair", (len(numbers), 1))[:, 0], np.arange(len(shapes)))]
    by_shape = [np.array([c for c in sorted(allowed) if c // 8 == s]) for s in range(len(SHAPES))]
    uniform = draws("colour", (len(numbers), 2))
    picked = [
        [_choose(u, by_shape[s]) for u, s in zip(us, ss, strict=True)] for us, ss in zip(uniform, chosen, strict=True)
    ]
    return np.array(picked, dtype=np.int64).reshape(-1, 2)


_PAIRS = {"same_shape": _same_shape_pairs, "swap": _swap_pairs, "relation": _relation_pairs}


def _held_out_relations() -> frozenset[tuple[str, int, int]]:
    """(relation, shape a, shape b) that captions assert in the split "relation" alone, closed under inversion."""
    triples: set[tuple[str, int, int]] = set()
    for a in range(len(SHAPES)):
        left, above = (a + 1) % len(SHAPES), (a + 3) % len(SHAPES)
        triples |= {("left", a, left), ("right", left, a), ("above", a, above), ("below", above, a)}
    return frozenset(triples)


HELD_OUT_RELATIONS = _held_out_relations()


def _place(
    config: ShapesConfig, draws: _Draws, count: np.ndarray, label: np.ndarray, texture: np.ndarray
) -> SceneTable:
    """Draws sizes and places, largest object first, until all fit; the number of objects is never redrawn."""
    n, columns = label.shape
    arrays = _empty(n, columns)
    pending = np.arange(n)
    for round_ in range(_MAX_ROUNDS):
        if not len(pending):
            break
        layout, good = _layout(config, draws, round_, pending, count[pending], label[pending], texture[pending])
        for name, array in arrays.items():
            array[pending[good]] = layout[name][good]
        pending = pending[~good]
    if len(pending):
        raise ValueError(
            f"no room for {int(count[pending[0]])} objects of sizes {list(config.sizes)} at scale {config.scale}; "
            "lower max_objects or scale, or allow smaller sizes"
        )
    return SceneTable(count=count, **arrays)


def _layout(
    config: ShapesConfig,
    draws: _Draws,
    round_: int,
    rows: np.ndarray,
    count: np.ndarray,
    label: np.ndarray,
    texture: np.ndarray,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One attempt at the given rows: columns of the table, and which rows fit."""
    n, columns = label.shape
    size = _choose(draws(f"size {round_}", (n, columns), rows), _codes(config.sizes, SIZES))
    jitter = 1.0 + _JITTER * (2.0 * draws(f"radius {round_}", (n, columns), rows) - 1.0)
    radius = np.array(RADII)[size] * jitter * config.scale
    radius[np.arange(columns) >= count[:, None]] = 0.0
    order = np.argsort(-radius, axis=1, kind="stable")
    label, texture, size, radius = (np.take_along_axis(a, order, 1) for a in (label, texture, size, radius))
    bounds = np.array(_BOUNDS)[label // 8] * radius
    places = draws(f"place {round_}", (n, columns, _TRIES, 2), rows)
    x, y, good = np.zeros((n, columns)), np.zeros((n, columns)), np.ones(n, bool)
    for j in range(columns):
        low = (_MARGIN + bounds[:, j])[:, None, None]
        tries = low + places[:, j] * (1.0 - 2.0 * low)
        fits = (np.abs(tries[..., None] - np.array([1.0, 2.0]) / 3.0) > _CELL_KEEP_OFF).all((2, 3))
        fits &= low[:, :, 0] < 0.5
        for k in range(j):
            distance = np.hypot(tries[..., 0] - x[:, k, None], tries[..., 1] - y[:, k, None])
            fits &= distance >= (bounds[:, j] + bounds[:, k] + _GAP)[:, None]
        first = np.argmax(fits, axis=1)
        x[:, j], y[:, j] = tries[np.arange(n), first].T
        good &= fits.any(1) | (j >= count)
    shape = label // 8
    good &= _wanted_relation(config.split if config.mode == "text" else "", shape, x, y)
    columns_of = {"shape": shape, "colour": label % 8, "texture": texture, "size": size, "x": x, "y": y}
    return columns_of | {"radius": radius}, good


def _wanted_relation(split: str, shape: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """same_shape needs a relation that tells its two objects apart, relation a held-out one; other rows pass."""
    if split not in ("same_shape", "relation"):
        return np.ones(len(shape), bool)
    names = [relation_between((x[i, 0], y[i, 0]), (x[i, 1], y[i, 1])) for i in range(len(shape))]
    if split == "same_shape":
        return np.array([name is not None for name in names], dtype=bool)
    return np.array([(k, a, b) in HELD_OUT_RELATIONS for k, (a, b) in zip(names, shape, strict=True)], dtype=bool)


def relation_between(a: tuple[float, float], b: tuple[float, float]) -> str | None:
    """Where a = (x, y) lies seen from b: left, right, above, below, or None when neither axis decides."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) > _RELATION_RATIO * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > _RELATION_RATIO * abs(dx):
        return "above" if dy < 0 else "below"
    return None


# ------------------------------------------------------------------------------------------------ captions

# Part of VERSION: a word may be added or changed only together with the version, or trained text models break.
VOCABULARY = (
    *("a", "and", "the", "is", "in", "of", "to", ",", "left", "right", "above", "below", "under"),
    *("top", "center", "bottom"),
    *SIZES,
    *TEXTURES,
    *COLOURS,
    *SHAPES,
)
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
_PHRASES = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}

Role = Literal["det", "size", "texture", "colour", "object", "relation", "position", "conj"]


class Token(NamedTuple):
    """A word of a caption: its role and the object (a position in the facts) that it belongs to, -1 for none."""

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
class Facts:
    """All that a caption asserts, objects in the order of mention."""

    objects: tuple[ObjectFacts, ...]
    relations: tuple[Relation, ...] = ()


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
    return Facts(objects, tuple(Relation(a, name, b) for a, name, b in relations if name is not None))


def cell_of(x: float, y: float) -> str:
    """Name of the 3x3 cell that holds a point of the canvas."""
    column, row = (min(2, max(0, int(3.0 * value))) for value in (x, y))
    return CELLS[3 * row + column]


def caption(scene: Scene, split: str, index: int) -> Caption:
    """Describes scene `index` of a split: true, closed vocabulary, the same text every time.

    The two scenes of a "swap" pair get one sentence with the colours exchanged. Held-out relations are asserted in
    the split "relation" alone, and there always; "same_shape" captions always say which object is where.
    """
    draws = _Draws(split, np.array([index // 2 if split == "swap" else index]))
    uniform = draws("caption", (1, 8))[0]
    order = tuple(
        int(k) for k in np.argsort(draws("mention", (1, max(1, len(scene.objects))))[0])[: len(scene.objects)]
    )
    relation = _pick_relation(scene, order, split, uniform)
    joined = relation is not None and len(order) == 2 and uniform[1] < 0.5
    detail = int(3.0 * uniform[2])
    with_cells = uniform[3] < 0.15 and not joined
    objects = tuple(_object_facts(scene.objects[k], detail, with_cells) for k in order)
    facts = Facts(objects, () if relation is None else (relation,))
    phrase = _phrase(relation, uniform[4])
    if joined and relation is not None:
        subject, reference = relation.subject, relation.reference
        tokens = [*_noun(objects[subject], subject), *phrase, *_noun(objects[reference], reference)]
    else:
        tokens = _list(objects)
        if relation is not None:
            tokens += [Token(",", "conj", -1), *_clause(objects, relation, phrase)]
    return Caption(tuple(tokens), facts, order)


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


def _list(objects: Sequence[ObjectFacts]) -> list[Token]:
    """Words of: noun {, noun} and noun."""
    tokens: list[Token] = []
    for k, item in enumerate(objects):
        if k:
            tokens.append(Token("and" if k == len(objects) - 1 else ",", "conj", -1))
        tokens += _noun(item, k)
    return tokens


def _clause(objects: Sequence[ObjectFacts], relation: Relation, phrase: list[Token]) -> list[Token]:
    """Words of: the colour shape is REL the colour shape."""
    subject, reference = (_definite(objects[k], k) for k in (relation.subject, relation.reference))
    return [*subject, Token("is", "relation", -1), *phrase, *reference]


def _definite(item: ObjectFacts, k: int) -> list[Token]:
    return [Token("the", "det", k), Token(item.colour, "colour", k), Token(item.shape, "object", k)]


# ------------------------------------------------------------------------------------------------ renderer


def render(scenes: Sequence[Scene] | SceneTable, size: int, *, device: torch.device | str | None = None) -> Tensor:
    """Draws scenes: (B, 3, size, size) float32 in [0, 1]. An image does not depend on the others of its batch.

    Outlines and texture edges are anti-aliased by their signed distances: coverage = clamp(1/2 - distance in pixels).
    """
    if size < 1:
        raise ValueError(f"size is {size}; give at least 1 pixel")
    table = scenes if isinstance(scenes, SceneTable) else SceneTable.stack(scenes)
    canvas = torch.empty(len(table), 3, size, size, device=device)
    canvas.copy_(torch.tensor(BACKGROUND, device=device).view(1, 3, 1, 1))
    present = np.arange(table.shape.shape[1]) < table.count[:, None]
    rows, columns = np.nonzero(present)
    # One kind at a time, so that each object is computed with its own formulas and, when there are many, in a window of
    # its own size. Pixel values do not depend on the window.
    kinds = table.shape * len(SIZES) + (table.size if len(rows) > _MANY else 0)
    textures = table.texture[rows, columns]
    chosen = kinds[rows, columns]
    order = np.lexsort((textures, chosen))
    starts = np.flatnonzero(np.diff(chosen[order], prepend=-1))
    for group in np.split(order, starts[1:]) if len(order) else []:
        _draw_group(canvas, table, rows[group], columns[group])
    return canvas


_MANY = 512  # objects in a batch from which splitting them by size pays
_CHUNK = 1 << 16  # pixels drawn at once: the intermediate tensors stay in the processor's cache


def _draw_group(canvas: Tensor, table: SceneTable, rows: np.ndarray, columns: np.ndarray) -> None:
    """Adds the objects (rows, columns), all of one shape and sorted by texture, to the canvas."""
    size = canvas.shape[-1]
    shape, textures = int(table.shape[rows[0], columns[0]]), table.texture[rows, columns]
    radius = table.radius[rows, columns] * size
    side = min(size, 2 * math.ceil(float(radius.max()) * _BOUNDS[shape] + 1.0) + 1)
    centre = np.stack([table.x[rows, columns], table.y[rows, columns]]) * size
    origin = np.clip(np.floor(centre - (side - 1) / 2.0), 0, size - side).astype(np.int64)
    colours = np.array(PALETTE)[table.colour[rows, columns]]
    step = max(1, _CHUNK // side**2)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        grid = _Grid.at(canvas, rows[part], origin[:, part], centre[:, part], radius[part], side)
        _draw_chunk(canvas, shape, textures[part], grid, colours[part])


class _Grid(NamedTuple):
    """Pixels of n square windows, W on a side."""

    u: Tensor
    """(n, 1, W) to the right of the object's centre, in radii."""
    v: Tensor
    """(n, W, 1) below it."""
    pixels: Tensor
    """(n, 1, 1) radius in pixels."""
    where: Tensor
    """(n * W * W,) each pixel's place in the flat canvas, red channel."""

    @classmethod
    def at(
        cls,
        canvas: Tensor,
        rows: np.ndarray,
        origin: np.ndarray,
        centre: np.ndarray,
        radius: np.ndarray,
        side: int,
    ) -> _Grid:
        device, size = canvas.device, canvas.shape[-1]
        pixels = torch.as_tensor(radius, dtype=torch.float32, device=device).view(-1, 1, 1)
        middle = torch.as_tensor(centre, dtype=torch.float32, device=device).unsqueeze(-1)
        corner = torch.as_tensor(origin, device=device).unsqueeze(-1)
        x, y = corner + torch.arange(side, device=device)
        # A pixel's centre is exact in float32, so the result is the same whatever the window's corner.
        u, v = x + 0.5 - middle[0], y + 0.5 - middle[1]
        row = torch.as_tensor(rows * 3 * size, device=device).view(-1, 1)
        where = ((row + y) * size).unsqueeze(2) + x.unsqueeze(1)
        return cls(u.unsqueeze(1) / pixels, v.unsqueeze(2) / pixels, pixels, where.view(-1))


def _draw_chunk(canvas: Tensor, shape: int, textures: np.ndarray, grid: _Grid, colours: np.ndarray) -> None:
    alpha = coverage(shape, grid.u, grid.v, grid.pixels)
    shade = alpha.clone()
    for texture in range(1, len(TEXTURES)):
        start, stop = np.searchsorted(textures, [texture, texture + 1])
        if start < stop:
            part = slice(int(start), int(stop))
            shade[part] *= texture_shade(texture, grid.u[part], grid.v[part], grid.pixels[part])
    colour = torch.as_tensor(colours, dtype=torch.float32, device=canvas.device)
    flat, channel_step = canvas.view(-1), canvas.shape[-1] ** 2
    for channel, background in enumerate(BACKGROUND):
        # Objects do not overlap, so at most one of these differs from 0 at any pixel and the order cannot matter.
        change = shade * colour[:, channel].view(-1, 1, 1) - alpha * background
        flat.index_add_(0, grid.where + channel * channel_step, change.view(-1))


def coverage(shape: int, u: Tensor, v: Tensor, pixels: Tensor | float) -> Tensor:
    """Share of each pixel inside the outline; (u, v) in units of the radius, `pixels` the radius in pixels."""
    return (0.5 - signed_distance(shape, u, v) * pixels).clamp_(0.0, 1.0)


def signed_distance(shape: int, u: Tensor, v: Tensor) -> Tensor:
    """Distance to the outline, negative inside, in units of the radius; u to the right, v down; shapes broadcast."""
    name = SHAPES[shape]
    if name == "square":
        return _box(u, v, 0.80, 0.80)
    if name == "cross":
        return torch.minimum(_box(u, v, 0.95, 0.33), _box(u, v, 0.33, 0.95))
    if name in _POLYGONS:
        return _polygon(u, v, _POLYGONS[name])
    distance = (u * u + v * v).sqrt()
    if name == "circle":
        return distance - 0.92
    if name == "ring":
        return (distance - 0.725).abs() - 0.225
    bite = (u - 0.42).square() + v * v
    return torch.maximum(distance - 0.95, 0.72 - bite.sqrt())


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    across, down = u.abs() - width, v.abs() - height
    outside = (across.clamp(min=0.0).square() + down.clamp(min=0.0).square()).sqrt()
    return outside + torch.maximum(across, down).clamp(max=0.0)


def _corners(radii: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Corners at equal angles, the first at the top."""
    angles = [2.0 * math.pi * k / len(radii) for k in range(len(radii))]
    return tuple((r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True))


_POLYGONS = {
    "triangle": _corners([1.1] * 3),
    "diamond": ((0.0, -1.05), (0.72, 0.0), (0.0, 1.05), (-0.72, 0.0)),
    "star": _corners([1.1, 0.46] * 5),
}


def _polygon(u: Tensor, v: Tensor, corners: tuple[tuple[float, float], ...]) -> Tensor:
    """Signed distance to a polygon: nearest edge, sign by crossing number. Mirror images share the right half."""
    u = u.abs()
    nearest: Tensor | None = None
    inside: Tensor | None = None
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        if max(ax, bx) < 1e-9:
            continue  # the left half is the mirror image
        ex, ey = bx - ax, by - ay
        du, dv = u - ax, v - ay
        along = ((du * ex + dv * ey) / (ex * ex + ey * ey)).clamp_(0.0, 1.0)
        square = (du - along * ex).square_() + (dv - along * ey).square_()
        nearest = square if nearest is None else torch.minimum(nearest, square)
        if ey != 0.0:
            crosses = ((v >= ay) != (v >= by)) & (dv * (ex / ey) > du)
            inside = crosses if inside is None else inside ^ crosses
    assert nearest is not None
    assert inside is not None
    distance = nearest.sqrt_()
    return torch.where(inside, -distance, distance)


_STRIPE, _DOT, _CELL = 0.62, 0.19, 0.44


def texture_shade(texture: int, u: Tensor, v: Tensor, pixels: Tensor | float) -> Tensor | float:
    """Factor on the object's colour at each pixel, between DARK and 1; arguments as for `coverage`."""
    name = TEXTURES[texture]
    if name == "solid":
        return 1.0
    if name == "striped":
        dark = (0.5 - (_STRIPE / 4 - _to_multiple(v, _STRIPE)) * pixels).clamp_(0.0, 1.0)
    elif name == "dotted":
        distance = (_to_multiple(u, _STRIPE).square() + _to_multiple(v, _STRIPE).square()).sqrt()
        dark = (0.5 - (distance - _DOT) * pixels).clamp_(0.0, 1.0)
    else:
        across, down = (
            (0.5 - (_CELL / 2 - _to_multiple(w - _CELL / 2, 2 * _CELL)) * pixels).clamp_(0.0, 1.0) for w in (u, v)
        )
        dark = across + down - 2.0 * across * down
    return 1.0 - (1.0 - DARK) * dark


def _to_multiple(value: Tensor, period: float) -> Tensor:
    """Distance to the nearest multiple of the period."""
    return (value - period * (value / period).round()).abs()


# ------------------------------------------------------------------------------------------------ data set


@dataclass(frozen=True)
class ShapesSample:
    """One image (3, H, W) float32 in [-1, 1] with its label, name and caption."""

    image: Tensor
    label: int
    name: str
    text: str


_BLOCK = 4096


class ShapesDataset:
    """Scenes drawn on request; map-style, no files. Scene tables are kept in blocks, images are not kept."""

    def __init__(self, config: ShapesConfig, size: int) -> None:
        if size < 8:
            raise ValueError(f"size is {size}; shapes need at least 8 pixels (32 or more to be told apart)")
        self.config = config
        self.size = size
        self._blocks: dict[int, SceneTable] = {}

    def __len__(self) -> int:
        return self.config.num_images

    @property
    def num_classes(self) -> int:
        """64 in mode "class", whichever of them occur; 1 in mode "text"."""
        return NUM_CLASSES if self.config.mode == "class" else 1

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES if self.config.mode == "class" else ("shapes",)

    def scenes(self, indices: Sequence[int] | np.ndarray | Tensor) -> SceneTable:
        """The scenes of the given indices."""
        numbers = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self)):
            wrong = numbers[(numbers < 0) | (numbers >= len(self))][0]
            raise IndexError(f"index {int(wrong)} is outside 0 to {len(self) - 1}")
        parts = [
            self._block(number).take(numbers[numbers // _BLOCK == number] % _BLOCK)
            for number in np.unique(numbers // _BLOCK)
        ]
        if not parts:
            return self._block(0).take(numbers)
        order = np.argsort(np.argsort(numbers // _BLOCK, kind="stable"), kind="stable")
        columns = max(part.shape.shape[1] for part in parts)
        padded = {
            name: np.concatenate([_pad(getattr(part, name), columns) for part in parts])[order]
            for name in vars(parts[0])
        }
        return SceneTable(**padded)

    def _block(self, number: int) -> SceneTable:
        if number not in self._blocks:
            stop = min(len(self), (number + 1) * _BLOCK)
            self._blocks[number] = sample_scenes(self.config, np.arange(number * _BLOCK, stop))
        return self._blocks[number]

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] and labels (B,) int64, drawn together: the fast way to train from scenes."""
        table = self.scenes(indices)
        labels = table.labels if self.config.mode == "class" else np.zeros(len(table), np.int64)
        return render(table, self.size).mul_(2.0).sub_(1.0), torch.from_numpy(labels)

    def __getitem__(self, index: int) -> ShapesSample:
        images, labels = self.batch([index])
        return ShapesSample(images[0], int(labels[0]), f"shapes/{self.config.split}/{index}", self.caption(index).text)

    def caption(self, index: int) -> Caption:
        """The caption of one scene, with roles and facts."""
        return caption(self.scenes([index])[0], self.config.split, index)


def _pad(array: np.ndarray, columns: int) -> np.ndarray:
    if array.ndim == 1 or array.shape[1] == columns:
        return array
    return np.pad(array, ((0, 0), (0, columns - array.shape[1])))
