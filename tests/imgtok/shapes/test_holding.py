"""Scenes whose objects hold others: drawn, said, read back, and scored; all other scenes are as they were."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from imgtok.shapes import oracle_fast, oracle_inside
from imgtok.shapes.captions import HOLDING, VOCABULARY, Facts, Held, ObjectFacts, caption, facts_of, true_facts
from imgtok.shapes.oracle import Detection, report, score
from imgtok.shapes.render import PALETTE, render
from imgtok.shapes.world import (
    ALIKE,
    COLOURS,
    HELD,
    HOST_RADIUS,
    HOSTS,
    SHAPES,
    SPLITS,
    TEXTURES,
    Scene,
    SceneTable,
    ShapesConfig,
    sample_scenes,
    scene,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def text(split="holding", **profile) -> ShapesConfig:
    return ShapesConfig(mode="text", split=split, **profile)


# scenes


def test_scenes_that_hold_nothing_are_as_before():
    """Captions and pictures of the splits before there was anything to hold, as they were then."""
    digest, total = hashlib.sha256(), 0.0
    for split in SPLITS[:-1]:
        table = sample_scenes(text(split), range(20))
        for index, item in enumerate(table):
            said = caption(item, split, index)
            digest.update(repr((said.text, [tuple(token) for token in said.tokens])).encode())
        images = render(table, 32).double()
        weights = torch.arange(1, images.numel() + 1, dtype=torch.float64).view_as(images) / images.numel()
        total += float((images * weights).sum())
    assert digest.hexdigest()[:16] == "63afb483ef88bd00"
    assert total == pytest.approx(188412.07226466876, rel=1e-8)


def test_two_objects_hold_one_each():
    for index, item in enumerate(sample_scenes(text(), range(100))):
        assert index % 50 or item == scene("holding", index)
        assert Scene.from_json(item.to_json()) == item
        assert len(item.objects) == 2
        held = [one.holding for one in item.objects]
        names = [(one.shape, one.colour) for one in (*item.objects, *held)]
        assert len(set(names)) == 4
        for one, inner in zip(item.objects, held, strict=True):
            assert one.shape in HOSTS
            assert (one.texture, inner.texture, inner.size) == ("solid", "solid", "small")
            assert one.radius >= HOST_RADIUS
            assert (inner.x, inner.y, inner.radius) == (one.x, one.y, HELD * one.radius)
            assert one.colour != inner.colour
            assert tuple(sorted((one.colour, inner.colour))) not in {tuple(sorted(pair)) for pair in ALIKE}


def test_colours_that_are_alike_are_those_that_lie_close():
    close = {
        (one, other)
        for k, one in enumerate(COLOURS)
        for j, other in enumerate(COLOURS)
        if k < j and np.linalg.norm(np.subtract(PALETTE[k], PALETTE[j])) < 0.5
    }
    assert {tuple(sorted(pair)) for pair in close} == {tuple(sorted(pair)) for pair in ALIKE}


def test_a_profile_gives_what_there_is_room_for():
    without = sample_scenes(text("train"), range(500))
    table = sample_scenes(text("train", holding=0.5), range(500))
    for name in ("count", "shape", "colour", "size", "x", "y", "radius"):
        assert np.array_equal(getattr(table, name), getattr(without, name))
    hosts = table.held > 0
    room = np.isin(table.shape, [SHAPES.index(name) for name in HOSTS]) & (table.radius >= HOST_RADIUS)
    assert not (hosts & ~room).any()
    assert hosts[room].mean() == pytest.approx(0.5, abs=0.1)
    assert (table.texture[hosts] == TEXTURES.index("solid")).all()
    assert np.array_equal(table.texture[~hosts], without.texture[~hosts])
    again = SceneTable.stack(list(table.take(np.arange(50))))
    assert np.array_equal(again.held, table.held[:50])
    assert not sample_scenes(text("swap", holding=1.0), range(50)).held.any()
    assert "holding" not in text("train").identity, "caches that were made before belong to the same scenes"
    assert text("train", holding=0.5).identity["holding"] == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "class", "holding": 0.5}, "objects hold others in mode 'text' alone"),
        ({"mode": "text", "holding": 0.5, "textures": ("dotted",)}, "allow solid"),
        ({"mode": "text", "split": "holding", "sizes": ("small", "medium")}, "allow large ones, or raise scale"),
        ({"mode": "text", "split": "holding", "max_objects": 1}, "split 'holding' needs 2"),
        ({"mode": "text", "holding": 1.5}, "holding"),
    ],
)
def test_a_profile_without_room_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**fields)


# pictures


def test_what_is_held_is_drawn_in_the_middle_whatever_the_batch():
    table = sample_scenes(text(), range(40))
    images = render(table, 64)
    assert torch.equal(render([table[7]], 64)[0], images[7])
    empty = render(replace(table, held=np.zeros_like(table.held)), 64)
    for k, item in enumerate(table):
        for one in item.objects:
            changed = (images[k] != empty[k]).any(0)
            y, x = changed.nonzero(as_tuple=True)
            near = (x + 0.5 - 64 * one.x).abs() < 64 * one.radius / 2
            near &= (y + 0.5 - 64 * one.y).abs() < 64 * one.radius / 2
            assert near.any()
            if one.holding.shape in ("circle", "square", "diamond", "triangle"):
                pixel = images[k, :, int(64 * one.y), int(64 * one.x)]
                assert torch.allclose(pixel, torch.tensor(PALETTE[COLOURS.index(one.holding.colour)]))


# captions


def test_captions_say_who_holds_what_and_are_read_back():
    for index, item in enumerate(sample_scenes(text(), range(100))):
        said = caption(item, "holding", index)
        assert {token.word for token in said.tokens} <= {*VOCABULARY, HOLDING}
        assert [one.holder for one in said.facts.held] == [0, 1]
        for number, one in enumerate(said.facts.held):
            inner = item.objects[said.order[one.holder]].holding
            assert (one.object.shape, one.object.colour) == (inner.shape, inner.colour)
            assert one.object.size in (None, inner.size)
            own = [token for token in said.tokens if token.object == 2 + number]
            sized = ["size"] if one.object.size else []
            assert [token.role for token in own] == ["det", *sized, "colour", "object"]
        links = [token.object for token in said.tokens if token.role == "holding"]
        assert sorted(links) == [0, 1]
        back = facts_of(said.text)
        assert held_by(back) == held_by(said.facts)
    assert facts_of("a red circle holding a small yellow star").held == (
        Held(0, ObjectFacts(shape="star", colour="yellow", size="small")),
    )
    with pytest.raises(ValueError, match="after 5 words there is 'dog'"):
        facts_of("a red circle holding a dog")


def held_by(facts: Facts) -> list[str]:
    return sorted(repr((facts.objects[one.holder], one.object)) for one in facts.held)


# readings


def names(detection: Detection) -> tuple[object, ...]:
    own = (detection.known, detection.shape, detection.colour, detection.texture, detection.size)
    return (*own, *(names(one) for one in detection.holding))


def noisy(images: torch.Tensor, deviation: float = 0.1) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * noise).clamp(0, 1)


def test_what_is_held_is_read_back_by_both_searches():
    table = sample_scenes(text(), range(300, 308))
    images = render(table, 64)
    images[4:] = noisy(images[4:])
    fast, plain = oracle_inside.read(images), oracle_inside.read(images, plain=True)
    assert [[names(one) for one in some] for some in fast] == [[names(one) for one in some] for some in plain]
    found = report([score(true_facts(item), some) for item, some in zip(table, fast, strict=True)])
    assert (found.held_presence, found.held_binding, found.held_leakage, found.prompt) == (1.0, 1.0, 0.0, 1.0)
    for item, some in zip(table, fast, strict=True):
        for one in some:
            nearest = min(item.objects, key=lambda true: abs(true.x - one.x) + abs(true.y - one.y))
            (inner,) = one.holding
            assert (inner.x, inner.y) == pytest.approx((nearest.x, nearest.y), abs=0.02)
            assert inner.radius == pytest.approx(nearest.holding.radius, rel=0.2)


def test_other_objects_hold_nothing():
    """Dots, stripes and the hole of a ring are nothing that is held; names are those of the ordinary reading."""
    images = noisy(render(sample_scenes(text("val"), range(8)), 64), 0.05)
    inside = [[names(one) for one in some] for some in oracle_inside.read(images)]
    assert inside == [[names(one) for one in some] for some in oracle_fast.read(images)]
    assert oracle_inside.read(torch.full((1, 3, 64, 64), 0.92)) == [[]]


# scores


def seen(shape: str, colour: str, *holding: Detection, size: str = "large") -> Detection:
    chances = {"shapes": SHAPES, "colours": COLOURS, "textures": TEXTURES}
    named = {"shapes": shape, "colours": colour, "textures": "solid"}
    certain = {key: tuple(float(name == named[key]) for name in all_) for key, all_ in chances.items()}
    return Detection(
        known=True, shape=shape, colour=colour, texture="solid", size=size, x=0.5, y=0.5, radius=0.18, area=0.1,
        unexplained=0.0, label=0, label_probability=1.0, holding=holding, **certain,
    )  # fmt: skip


STAR, RING = seen("star", "yellow", size="small"), seen("ring", "cyan", size="small")
FACTS = facts_of("a red circle holding a small yellow star and a blue square holding a small cyan ring")


@pytest.mark.parametrize(
    ("case", "circle", "square", "loose", "expected"),
    [
        # held: matched, bound, leaked; extra, prompt
        ("right", [STAR], [RING], [], (2, 2, 0, 0, True)),
        ("exchanged", [RING], [STAR], [], (2, 0, 2, 0, False)),
        ("beside", [], [RING], [STAR], (2, 1, 0, 0, False)),
        ("absent", [], [RING], [], (1, 1, 0, 0, False)),
        ("mixed", [seen("star", "cyan", size="small")], [RING], [], (2, 1, 1, 0, False)),
        ("another thing", [seen("cross", "pink", size="small")], [RING], [], (1, 1, 0, 1, False)),
        ("too large", [replace(STAR, size="medium")], [RING], [], (2, 1, 0, 0, False)),
        ("both in one", [STAR, RING], [], [], (2, 1, 1, 0, False)),
        ("one more", [STAR, seen("cross", "pink", size="small")], [RING], [], (2, 2, 0, 1, False)),
    ],
)
def test_each_mistake_shows_in_its_own_score(case, circle, square, loose, expected):
    found = score(FACTS, [seen("circle", "red", *circle), seen("square", "blue", *square), *loose])
    assert (found.held, found.holders, found.matched, found.bound) == (2, 2, 2, 2)
    assert (found.held_matched, found.held_bound, found.held_leaked, found.extra, found.prompt) == expected, case
    assert found.probability == float(case in ("right", "too large", "one more"))


def test_a_holder_in_the_colour_of_what_it_holds_has_leaked():
    found = score(FACTS, [seen("circle", "yellow", seen("star", "red", size="small")), seen("square", "blue", RING)])
    assert (found.bound, found.leaked, found.held_bound) == (1, 1, 1)
    assert score(FACTS, []).held_matched == score(FACTS, []).holders == 0
