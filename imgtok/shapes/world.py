"""A world of coloured shapes that can be drawn, described and read back exactly (see `imgtok.shapes.oracle`).

Scene `i` of a split depends on the split's name, `i` and the profile alone: random access, no files, the same on every
machine. The scene is continuous, so one scene can be drawn at any resolution.

Mode "class" shows one object and labels it `8 * shape + colour` (64 classes). Mode "text" shows one to four objects and
describes them in the closed vocabulary `captions.VOCABULARY`. Here are the scenes; `imgtok.shapes.render` draws them,
`imgtok.shapes.captions` describes them, and `imgtok.shapes.dataset` is both as a data set.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np

from imgtok.config import PositiveInt, Range, check, to_dict

VERSION = "imgtok-shapes-1"  # names the world, its random numbers and its vocabulary: change them, change this

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "crescent")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
SPLITS = ("train", "val", "novel", "same_shape", "swap", "crowd", "relation", "holding")
RELATIONS = ("left", "right", "above", "below")
NUM_CLASSES = len(SHAPES) * len(COLOURS)
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

RADII = (0.095, 0.135, 0.185)

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

HOSTS = ("circle", "square", "triangle", "diamond")  # shapes with room in the middle for another one
HELD = 0.35  # radius of what an object holds, in units of its own
HOST_RADIUS = 0.175  # the least of an object that holds another: at 64 pixels the other one has 3.9
# Pairs of colours less than .5 apart in RGB: of these one is not seen well inside the other.
ALIKE = (("red", "orange"), ("orange", "yellow"), ("blue", "purple"), ("blue", "cyan"))
_HOLDING_SPLITS = ("train", "val", "novel")  # splits that the profile's `holding` is for

_JITTER = 0.04  # radii are drawn within this fraction of their size class
_GAP = 0.07  # between bounding circles: less than this merges at 32 pixels under blur
_MARGIN = 0.03  # between a bounding circle and the canvas edge: the oracle reads the background there
_CELL_KEEP_OFF = 0.03  # centres stay this far from the borders of the 3x3 cells
_RELATION_RATIO = 1.5  # a relation is asserted only when one axis difference exceeds the other by this factor
_COUNT_PROBABILITIES = (0.20, 0.40, 0.25, 0.15)
_TRIES = 8
_MAX_ROUNDS = 400

# Radius of the circle about the centre that holds the outline, in units of the object's radius.
BOUNDS = (0.92, 0.80 * math.sqrt(2), 1.10, 1.05, math.hypot(0.95, 0.33), 1.10, 0.95, 0.95)


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
    holding: Object | None = None
    """A smaller one inside it, solid, about the same centre."""

    @property
    def label(self) -> int:
        """The class, 8 * shape + colour."""
        return len(COLOURS) * SHAPES.index(self.shape) + COLOURS.index(self.colour)


@dataclass(frozen=True)
class Scene:
    """Up to four objects that do not overlap, largest first; (0, 0) is the top left corner of the canvas."""

    objects: tuple[Object, ...]

    def to_json(self) -> str:
        return json.dumps({"objects": [_told(item) for item in self.objects]})

    @classmethod
    def from_json(cls, text: str) -> Scene:
        return cls(tuple(_object(fields) for fields in json.loads(text)["objects"]))


def _told(item: Object) -> dict[str, Any]:
    """The fields of an object; `holding` where it holds something."""
    return {name: value for name, value in asdict(item).items() if value is not None}


def _object(fields: dict[str, Any]) -> Object:
    held = fields.get("holding")
    return Object(**fields | {"holding": None if held is None else _object(held)})


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Rendered scenes of coloured shapes: nothing to download, any size, any number."""

    kind: Literal["shapes"] = "shapes"
    split: Literal["train", "val", "novel", "same_shape", "swap", "crowd", "relation", "holding"] = "train"
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

    holding: Annotated[float, Range(0.0, 1.0)] = 0.0
    """Share, 0 to 1, of the objects with room for it (circle, square, triangle or diamond of radius .175 or more) that
    hold a smaller one, in mode "text", splits train, val and novel; these are solid. In the split holding two objects
    hold one each, whatever is given here; the other splits have none."""

    def __post_init__(self) -> None:
        check(self)
        _check_names("textures", self.textures, TEXTURES)
        _check_names("sizes", self.sizes, SIZES)
        if self.mode == "class" and self.split not in ("train", "val", "novel"):
            raise ValueError(f"split is {self.split!r}; mode 'class' has train, val and novel (or set mode: text)")
        needed = {"same_shape": 2, "swap": 2, "relation": 2, "crowd": 4, "holding": 2}.get(self.split, 1)
        if self.mode == "text" and self.max_objects < needed:
            raise ValueError(f"max_objects is {self.max_objects}; split {self.split!r} needs {needed}")
        if self.holding or self.split == "holding":
            self._check_hosts()

    def _check_hosts(self) -> None:
        if self.mode == "class":
            raise ValueError(f"holding is {self.holding}; objects hold others in mode 'text' alone: set mode: text")
        if "solid" not in self.textures:
            raise ValueError(f"textures is {list(self.textures)}; objects that hold others are solid: allow solid")
        if not self.host_sizes:
            raise ValueError(
                f"sizes is {list(self.sizes)} at scale {self.scale}; what an object of a radius below {HOST_RADIUS} "
                "holds cannot be read: allow large ones, or raise scale"
            )

    @property
    def host_sizes(self) -> tuple[str, ...]:
        """The sizes whose objects are always large enough to hold others."""
        least = HOST_RADIUS / (self.scale * (1.0 - _JITTER))
        return tuple(size for size in self.sizes if RADII[SIZES.index(size)] >= least)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these scenes from others: all fields, but for those that came later and are at their defaults, so
        that what was made of the same scenes before still belongs to them.
        """
        return {name: value for name, value in to_dict(self).items() if name != "holding" or self.holding}

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
    held: np.ndarray
    """What an object holds: 0 for nothing, else 1 + its class."""

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, row: int) -> Scene:
        return Scene(tuple(self._object(row, j) for j in range(int(self.count[row]))))

    def __iter__(self) -> Iterator[Scene]:
        return (self[row] for row in range(len(self)))

    def _object(self, row: int, j: int) -> Object:
        x, y, radius = (float(array[row, j]) for array in (self.x, self.y, self.radius))
        held = int(self.held[row, j]) - 1
        return Object(
            shape=SHAPES[self.shape[row, j]],
            colour=COLOURS[self.colour[row, j]],
            texture=TEXTURES[self.texture[row, j]],
            size=SIZES[self.size[row, j]],
            x=x,
            y=y,
            radius=radius,
            holding=None if held < 0 else held_object(held, x, y, radius),
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
        held = arrays.pop("held")
        for row, scene in enumerate(scenes):
            for j, item in enumerate(scene.objects):
                for name, array in arrays.items():
                    value = getattr(item, name)
                    array[row, j] = names[name].index(value) if name in names else value
                held[row, j] = 0 if item.holding is None else 1 + item.holding.label
        arrays["held"] = held
        return cls(count=count, **arrays)


def _empty(n: int, columns: int) -> dict[str, np.ndarray]:
    """Arrays of a SceneTable, all but count."""
    whole, real = ("shape", "colour", "texture", "size", "held"), ("x", "y", "radius")
    types: dict[str, type] = dict.fromkeys(whole, np.int64) | dict.fromkeys(real, np.float64)
    return {name: np.zeros((n, columns), kind) for name, kind in types.items()}


def held_object(label: int, x: float, y: float, radius: float) -> Object:
    """What an object with this centre and radius holds, by its class 8 * shape + colour."""
    shape, colour = SHAPES[label // len(COLOURS)], COLOURS[label % len(COLOURS)]
    return Object(shape=shape, colour=colour, texture="solid", size="small", x=x, y=y, radius=HELD * radius)


def scene(split: str, index: int, **profile: object) -> Scene:
    """Scene `index` of a split in mode "text"; `profile` gives fields of ShapesConfig."""
    config = ShapesConfig(**{"mode": "text", "split": split, **profile})  # type: ignore[arg-type]
    return sample_scenes(config, [index])[0]


def class_scene(label: int, index: int, *, config: ShapesConfig | None = None) -> Scene:
    """The `index`-th scene of one class: the one that the dataset of `config` shows at `index * num_classes + rank`."""
    config = replace(config or ShapesConfig(), mode="class", holding=0.0)
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
    draws = Draws(config.split, layout)
    count, label = _identities(config, numbers, draws)
    texture = _choose(draws("texture", label.shape), _codes(config.textures, TEXTURES))
    table = _place(config, draws, count, label, texture)
    holds = config.split == "holding" or (config.holding > 0.0 and config.split in _HOLDING_SPLITS)
    return _give(config, draws, table) if holds else table


class Draws:
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


def _identities(config: ShapesConfig, numbers: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Number of objects (N,) and class of every object (N, M), no class twice in a scene."""
    classes = np.array(config.classes, dtype=np.int64)
    n = len(numbers)
    if config.mode == "class":
        # Balanced: the classes in turn, so any run of num_classes indices shows each of them once.
        return np.ones(n, np.int64), classes[numbers % len(classes)][:, None]
    if config.split in _PAIRS:
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


def _same_shape_pairs(allowed: set[int], numbers: np.ndarray, draws: Draws) -> np.ndarray:
    pairs = np.array([(a, b) for a in sorted(allowed) for b in sorted(allowed) if a != b and a // 8 == b // 8])
    return pairs[_choose(draws("pair", (len(numbers), 1))[:, 0], np.arange(len(pairs)))]


def _swap_pairs(allowed: set[int], numbers: np.ndarray, draws: Draws) -> np.ndarray:
    """Two shapes, two colours; the odd index of a pair has the colours exchanged."""
    labels = sorted(allowed)
    pairs = np.array([(a, b) for a in labels for b in labels if _can_swap(a, b, allowed)])
    chosen = pairs[_choose(draws("pair", (len(numbers), 1))[:, 0], np.arange(len(pairs)))]
    exchanged = chosen // 8 * 8 + (chosen % 8)[:, ::-1]
    return np.where((numbers % 2 == 1)[:, None], exchanged, chosen)


def _can_swap(a: int, b: int, allowed: set[int]) -> bool:
    different = a // 8 != b // 8 and a % 8 != b % 8
    return different and a // 8 * 8 + b % 8 in allowed and b // 8 * 8 + a % 8 in allowed


def _relation_pairs(allowed: set[int], numbers: np.ndarray, draws: Draws) -> np.ndarray:
    """Two shapes that have a held-out relation; `_place` draws until it holds."""
    shapes = np.array(sorted({(a, b) for _, a, b in HELD_OUT_RELATIONS}))
    chosen = shapes[_choose(draws("pair", (len(numbers), 1))[:, 0], np.arange(len(shapes)))]
    by_shape = [np.array([c for c in sorted(allowed) if c // 8 == s]) for s in range(len(SHAPES))]
    uniform = draws("colour", (len(numbers), 2))
    picked = [
        [_choose(u, by_shape[s]) for u, s in zip(us, ss, strict=True)] for us, ss in zip(uniform, chosen, strict=True)
    ]
    return np.array(picked, dtype=np.int64).reshape(-1, 2)


def _host_pairs(allowed: set[int], numbers: np.ndarray, draws: Draws) -> np.ndarray:
    """Two shapes with room for another one, no class twice."""
    hosts = [label for label in sorted(allowed) if SHAPES[label // 8] in HOSTS]
    pairs = np.array([(a, b) for a in hosts for b in hosts if a != b])
    return pairs[_choose(draws("pair", (len(numbers), 1))[:, 0], np.arange(len(pairs)))]


_PAIRS = {
    "same_shape": _same_shape_pairs,
    "swap": _swap_pairs,
    "relation": _relation_pairs,
    "holding": _host_pairs,
}


def _held_out_relations() -> frozenset[tuple[str, int, int]]:
    """(relation, shape a, shape b) that captions assert in the split "relation" alone, closed under inversion."""
    triples: set[tuple[str, int, int]] = set()
    for a in range(len(SHAPES)):
        left, above = (a + 1) % len(SHAPES), (a + 3) % len(SHAPES)
        triples |= {("left", a, left), ("right", left, a), ("above", a, above), ("below", above, a)}
    return frozenset(triples)


HELD_OUT_RELATIONS = _held_out_relations()


def _place(config: ShapesConfig, draws: Draws, count: np.ndarray, label: np.ndarray, texture: np.ndarray) -> SceneTable:
    """Draws sizes and places, largest object first, until all fit; the number of objects is never redrawn."""
    n, columns = label.shape
    arrays = _empty(n, columns)
    pending = np.arange(n)
    for round_ in range(_MAX_ROUNDS):
        if not len(pending):
            break
        layout, good = _layout(config, draws, round_, pending, count[pending], label[pending], texture[pending])
        for name, values in layout.items():
            arrays[name][pending[good]] = values[good]
        pending = pending[~good]
    if len(pending):
        raise ValueError(
            f"no room for {int(count[pending[0]])} objects of sizes {list(config.sizes)} at scale {config.scale}; "
            "lower max_objects or scale, or allow smaller sizes"
        )
    return SceneTable(count=count, **arrays)


def _layout(
    config: ShapesConfig,
    draws: Draws,
    round_: int,
    rows: np.ndarray,
    count: np.ndarray,
    label: np.ndarray,
    texture: np.ndarray,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One attempt at the given rows: columns of the table, and which rows fit."""
    n, columns = label.shape
    sizes = config.host_sizes if config.split == "holding" else config.sizes
    size = _choose(draws(f"size {round_}", (n, columns), rows), _codes(sizes, SIZES))
    jitter = 1.0 + _JITTER * (2.0 * draws(f"radius {round_}", (n, columns), rows) - 1.0)
    radius = np.array(RADII)[size] * jitter * config.scale
    radius[np.arange(columns) >= count[:, None]] = 0.0
    order = np.argsort(-radius, axis=1, kind="stable")
    label, texture, size, radius = (np.take_along_axis(a, order, 1) for a in (label, texture, size, radius))
    bounds = np.array(BOUNDS)[label // 8] * radius
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


def _give(config: ShapesConfig, draws: Draws, table: SceneTable) -> SceneTable:
    """Has objects with room for it hold a smaller one, whose colour stands out, and which no other object of the scene
    is; they become solid.
    """
    n, columns = table.shape.shape
    share = 1.0 if config.split == "holding" else config.holding
    there = np.arange(columns) < table.count[:, None]
    room = np.isin(table.shape, _codes(HOSTS, SHAPES)) & (table.radius >= HOST_RADIUS)
    hosts = there & room & (draws("holding", (n, columns)) < share)
    labels = np.array(config.classes, dtype=np.int64)
    keys = draws("held", (n, columns, len(labels)))
    fits = _stands_out()[table.colour][:, :, labels % 8]  # (n, columns, labels)
    own = np.where(there, len(COLOURS) * table.shape + table.colour, -1)
    free = (labels != own[:, :, None]).all(1)  # (n, labels): not among the objects
    held = np.zeros((n, columns), np.int64)
    for j in range(columns):
        chosen = labels[np.argmin(np.where(fits[:, j] & free, keys[:, j], 2.0), axis=1)]
        held[:, j] = np.where(hosts[:, j], 1 + chosen, 0)
        free &= labels != np.where(hosts[:, j], chosen, -1)[:, None]
    return replace(table, held=held, texture=np.where(hosts, TEXTURES.index("solid"), table.texture))


def _stands_out() -> np.ndarray:
    """(colours, colours): whether an object of the second is well seen inside one of the first."""
    apart = ~np.eye(len(COLOURS), dtype=bool)
    for one, other in ALIKE:
        a, b = COLOURS.index(one), COLOURS.index(other)
        apart[a, b] = apart[b, a] = False
    return apart


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
