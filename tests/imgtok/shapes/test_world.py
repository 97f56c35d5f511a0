import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import processes
import pytest
import torch

from imgtok.config import ConfigError, from_dict, to_dict
from imgtok.shapes.captions import VOCABULARY, caption, cell_of, facts_of, true_facts
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.render import _MANY, BACKGROUND, PALETTE, coverage, render, signed_distance
from imgtok.shapes.world import (
    CLASS_NAMES,
    COLOURS,
    HELD_OUT_CLASSES,
    HELD_OUT_RELATIONS,
    NUM_CLASSES,
    RADII,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    VERSION,
    Object,
    Scene,
    ShapesConfig,
    class_scene,
    relation_between,
    sample_scenes,
    scene,
)

EARLIER = SPLITS[:-1]
"""The splits in which no object holds another; see test_holding.py."""
BOUNDS = {"circle": 0.92, "square": 0.8 * 2**0.5, "triangle": 1.1, "diamond": 1.05, "cross": 1.0058, "star": 1.1}
AREAS = {  # of the outlines, in squared radii
    "circle": np.pi * 0.92**2,
    "square": 1.6**2,
    "triangle": 3 * 3**0.5 / 4 * 1.1**2,
    "diamond": 2 * 0.72 * 1.05,
    "cross": 2 * 1.9 * 0.66 - 0.66**2,
    "star": 5 * 1.1 * 0.46 * np.sin(np.pi / 5),
    "ring": np.pi * (0.95**2 - 0.5**2),
}


def text(split="train", **profile):
    return ShapesConfig(mode="text", split=split, **profile)


def one(shape="circle", texture="solid", x=0.5, y=0.5, radius=0.3, colour="red"):
    return Scene((Object(shape=shape, colour=colour, texture=texture, size="large", x=x, y=y, radius=radius),))


# scenes


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_on_split_and_index_alone(split):
    config = text(split)
    together = sample_scenes(config, range(60))
    assert [sample_scenes(config, [i])[0] for i in range(60)] == list(together)
    shuffled = np.random.default_rng(0).permutation(60)
    assert list(sample_scenes(config, shuffled)) == [together[i] for i in shuffled]
    assert scene(split, 7) == together[7]


def test_splits_share_no_scene():
    everything = [s for split in SPLITS for s in sample_scenes(text(split), range(40))]
    assert len(set(everything)) == len(everything)


def test_scenes_are_the_same_in_every_version():
    """Trained models and published numbers refer to these scenes: change them only together with VERSION."""
    assert VERSION == "imgtok-shapes-1"
    first = scene("train", 0)
    digest = hashlib.sha256()
    for split in EARLIER:
        for item in sample_scenes(text(split), range(50)):
            digest.update(repr([(o.shape, o.colour, o.texture, o.size, round(o.x, 6)) for o in item.objects]).encode())
    assert first == Scene.from_json(first.to_json())
    assert digest.hexdigest()[:16] == "e820262a79ed4cdb"


def test_a_scene_survives_json():
    item = scene("crowd", 3)
    assert len(item.objects) == 4
    assert Scene.from_json(item.to_json()) == item
    assert json.loads(item.to_json())["objects"][0]["shape"] in SHAPES


@pytest.mark.parametrize("config", [text(), text("crowd"), text("novel"), text(scale=1.3), text(max_objects=2)])
def test_objects_keep_their_distances(config):
    for item in sample_scenes(config, range(300)):
        for k, a in enumerate(item.objects):
            reach = BOUNDS.get(a.shape, 0.95) * a.radius
            assert reach < min(a.x, a.y, 1 - a.x, 1 - a.y)
            assert all(abs(w - border) > 0.029 for w in (a.x, a.y) for border in (1 / 3, 2 / 3))
            for b in item.objects[:k]:
                assert b.radius >= a.radius
                gap = np.hypot(a.x - b.x, a.y - b.y) - reach - BOUNDS.get(b.shape, 0.95) * b.radius
                assert gap > 0.0699
                assert (a.shape, a.colour) != (b.shape, b.colour)


def test_counts_and_radii_are_as_promised():
    table = sample_scenes(text(), range(8000))
    shares = np.bincount(table.count, minlength=5)[1:] / len(table)
    assert np.abs(shares - [0.20, 0.40, 0.25, 0.15]).max() < 0.02
    present = np.arange(4) < table.count[:, None]
    ratio = table.radius[present] / np.array(RADII)[table.size[present]]
    assert 0.96 <= ratio.min() < 0.965
    assert 1.035 < ratio.max() <= 1.04
    shares = np.bincount(table.texture[present], minlength=4) / present.sum()
    assert np.abs(shares - 0.25).max() < 0.02


def test_held_out_pairs_are_a_latin_diagonal():
    assert len({label // 8 for label in HELD_OUT_CLASSES}) == len({label % 8 for label in HELD_OUT_CLASSES}) == 8
    assert HELD_OUT_CLASSES[:2] == (0, 15)


@pytest.mark.parametrize("split", SPLITS)
def test_splits_show_what_they_promise(split):
    for k, item in enumerate(sample_scenes(text(split), range(200))):
        labels = [o.label for o in item.objects]
        held_out = set(labels) & set(HELD_OUT_CLASSES)
        assert bool(held_out) == (split == "novel")
        if split == "same_shape":
            assert len(labels) == 2
            assert item.objects[0].shape == item.objects[1].shape
            assert item.objects[0].colour != item.objects[1].colour
        if split == "crowd":
            assert len(labels) == 4
        if split == "swap" and k % 2:
            before = sample_scenes(text(split), [k - 1])[0]
            exchanged = [replace(o, colour=p.colour) for o, p in zip(before.objects, before.objects[::-1], strict=True)]
            assert item == Scene(tuple(exchanged)) != before
        if split == "relation":
            a, b = item.objects
            name = relation_between((a.x, a.y), (b.x, b.y))
            assert (name, SHAPES.index(a.shape), SHAPES.index(b.shape)) in HELD_OUT_RELATIONS


def test_held_out_pairs_can_be_kept_or_left_out():
    kept = sample_scenes(text(held_out_pairs="keep"), range(400)).labels
    assert set(kept) & set(HELD_OUT_CLASSES)
    config = ShapesConfig(held_out_pairs="leave_out")
    assert set(sample_scenes(config, range(112)).labels) == set(range(64)) - set(HELD_OUT_CLASSES)
    assert set(sample_scenes(ShapesConfig(split="novel"), range(16)).labels) == set(HELD_OUT_CLASSES)


def test_profile_narrows_the_world():
    table = sample_scenes(text(textures=("dotted",), sizes=("small", "large"), max_objects=2, scale=1.5), range(200))
    present = np.arange(table.shape.shape[1]) < table.count[:, None]
    assert table.count.max() == 2
    assert {TEXTURES[k] for k in table.texture[present]} == {"dotted"}
    assert {SIZES[k] for k in table.size[present]} == {"small", "large"}
    assert table.radius[present].max() > RADII[2] * 1.4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, "split"),
        ({"textures": ("solid", "plaid")}, "solid, striped, dotted, checkered"),
        ({"sizes": ()}, "sizes"),
        ({"scale": 0.0}, "scale"),
        ({"max_objects": 5}, "max_objects"),
        ({"num_images": 0}, "num_images"),
        ({"split": "crowd"}, "mode: text"),
        ({"split": "swap", "mode": "text", "max_objects": 1}, "max_objects"),
    ],
)
def test_a_wrong_profile_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**fields)


def test_too_little_room_is_an_error():
    with pytest.raises(ValueError, match="no room for 4 objects"):
        sample_scenes(text("crowd", sizes=("large",), scale=1.4), range(2))


def test_config_round_trips_and_rejects_unknown_names():
    config = text("val", textures=("solid", "striped"), scale=1.3)
    assert from_dict(ShapesConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="texture"):
        from_dict(ShapesConfig, {"kind": "shapes", "texture": ["solid"]})


# renderer


def test_images_do_not_depend_on_their_batch():
    table = sample_scenes(text(), range(300))
    assert table.count.sum() > _MANY, "objects of one size are drawn together"
    for size in (16, 32, 50, 64):
        together = render(table, size)
        assert all(torch.equal(render([table[i]], size)[0], together[i]) for i in range(0, 300, 37))
        assert torch.equal(render(table.take(np.arange(299, -1, -1)), size).flip(0), together)


def test_another_process_has_the_same_scenes():
    """In a Python that was just started, whose hashes are others."""
    world = "from imgtok.shapes.world import scene; print([scene('val', i) for i in range(20)])"
    run = subprocess.run([sys.executable, "-c", world], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str([scene("val", i) for i in range(20)])


@pytest.mark.slow
def test_another_process_draws_the_same_pixels():
    scenes = [scene("val", i) for i in range(20)]
    drawn = (
        "import hashlib; from imgtok.shapes.render import render; from imgtok.shapes.world import scene;"
        "print(hashlib.sha256(render([scene('val', i) for i in range(20)], 32).numpy().tobytes()).hexdigest())"
    )
    done = processes.python("-c", drawn)
    assert done.stdout.strip() == hashlib.sha256(render(scenes, 32).numpy().tobytes()).hexdigest(), done.stderr


@pytest.mark.parametrize("shape", AREAS)
def test_outlines_have_the_right_area(shape):
    foreground = (BACKGROUND[1] - render([one(shape)], 256)[0, 1]).sum() / (BACKGROUND[1] - PALETTE[0][1])
    assert foreground / 256**2 == pytest.approx(AREAS[shape] * 0.3**2, rel=0.004)


def test_outlines_are_where_they_should_be():
    def inside(shape, u, v):
        return bool(signed_distance(SHAPES.index(shape), torch.tensor([u]), torch.tensor([v])) < 0)

    assert inside("triangle", 0.0, -1.05)  # points up
    assert not inside("triangle", 0.0, 0.6)
    assert inside("triangle", -0.9, 0.5)
    assert inside("star", 0.0, -1.05)
    assert not inside("star", 0.0, 1.0)
    assert inside("crescent", -0.9, 0.0)  # opens to the right
    assert not inside("crescent", 0.4, 0.0)
    assert not inside("ring", 0.0, 0.3)
    assert inside("ring", 0.0, 0.7)
    assert inside("diamond", 0.0, 1.0)
    assert not inside("diamond", 1.0, 0.0)
    assert not inside("cross", 0.6, 0.6)
    assert inside("cross", 0.9, 0.3)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_distances_are_distances(shape):
    """Near the outline the gradient has length 1, so that coverage is one pixel wide."""
    axis = torch.linspace(-1.3, 1.3, 521, dtype=torch.float64)
    d = signed_distance(shape, axis.view(1, -1), axis.view(-1, 1))
    dv, du = torch.gradient(d, spacing=(axis, axis))
    near = d[1:-1, 1:-1].abs() < 0.03
    length = (du.square() + dv.square()).sqrt()[1:-1, 1:-1][near]
    assert ((length - 1).abs() < 0.02).double().mean() > 0.95
    assert length.max() < 1.05


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_shade_the_colour_around_the_centre(texture):
    image = render([one("square", texture, radius=0.4)], 200)[0]
    ratio = image[0, 50:150, 50:150] / PALETTE[0][0]
    dark = float((ratio < 0.5).float().mean())
    expected = {"solid": 0.0, "striped": 0.5, "dotted": np.pi * 0.19**2 / 0.62**2, "checkered": 0.5}[texture]
    assert dark == pytest.approx(expected, abs=0.06)
    assert float(ratio.max()) == pytest.approx(1.0, abs=1e-5)
    if texture != "solid":
        assert float(ratio.min()) == pytest.approx(0.35, abs=1e-5)
    moved = render([one("square", texture, x=0.5 + 10 / 200, radius=0.4)], 200)[0]
    torch.testing.assert_close(moved[:, :, 60:180], image[:, :, 50:170], atol=1e-4, rtol=0)


def test_resolutions_agree():
    table = sample_scenes(text(), range(40))
    fine = torch.nn.functional.avg_pool2d(render(table, 256), 4)
    assert (render(table, 64) - fine).abs().mean() < 0.001


def test_images_lie_between_0_and_1_and_start_with_background():
    images = render(sample_scenes(text(), range(50)), 32)
    assert images.shape == (50, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 0.9601
    assert torch.equal(images[:, :, 0, 0], torch.tensor(BACKGROUND).expand(50, 3))
    assert render([], 32).shape == (0, 3, 32, 32)
    assert torch.equal(render([Scene(())], 8), torch.tensor(BACKGROUND).view(1, 3, 1, 1).expand(1, 3, 8, 8))


def test_objects_cut_by_the_canvas_edge_are_drawn():
    image = render([one("circle", x=0.0, y=1.0)], 64)[0]
    assert torch.allclose(image[:, -1, 0], torch.tensor(PALETTE[0]))
    whole = coverage(0, torch.zeros(1), torch.zeros(1), 10.0)
    assert whole == 1.0


# captions


@pytest.mark.parametrize("split", EARLIER)
def test_captions_say_what_is_true_in_the_frozen_vocabulary(split):
    for i, item in enumerate(sample_scenes(text(split), range(150))):
        said = caption(item, split, i)
        assert said == caption(item, split, i)
        assert {token.word for token in said.tokens} <= set(VOCABULARY)
        assert sorted(said.order) == list(range(len(item.objects)))
        for k, fact in enumerate(said.facts.objects):
            true = item.objects[said.order[k]]
            assert (fact.shape, fact.colour) == (true.shape, true.colour)
            assert fact.texture in (None, true.texture)
            assert fact.size in (None, true.size)
            assert fact.cell in (None, cell_of(true.x, true.y))
        for relation in said.facts.relations:
            a, b = (item.objects[said.order[k]] for k in (relation.subject, relation.reference))
            assert relation.relation == relation_between((a.x, a.y), (b.x, b.y))
            triple = (relation.relation, SHAPES.index(a.shape), SHAPES.index(b.shape))
            assert (triple in HELD_OUT_RELATIONS) == (split == "relation")
        if split in ("same_shape", "relation"):
            assert len(said.facts.relations) == 1


def test_facts_can_be_read_from_the_words_and_roles():
    for i, item in enumerate(sample_scenes(text(), range(300))):
        said = caption(item, "train", i)
        for k, fact in enumerate(said.facts.objects):
            words = {
                role: [t.word for t in said.tokens if t.object == k and t.role == role]
                for role in ("size", "texture", "colour", "object", "position")
            }
            assert set(words["colour"]) == {fact.colour}
            assert set(words["object"]) == {fact.shape}
            assert words["texture"] == ([fact.texture] if fact.texture else [])
            assert words["size"] == ([fact.size] if fact.size else [])
            assert " ".join(words["position"][2:]) == (fact.cell or "")
        spoken = [t.word for t in said.tokens if t.role == "relation"]
        assert bool(spoken) == bool(said.facts.relations)
        if spoken:
            words = {"left": {"left"}, "right": {"right"}, "above": {"above"}, "below": {"below", "under"}}
            assert set(spoken) & words[said.facts.relations[0].relation]
        assert said.text == " ".join(t.word for t in said.tokens).replace(" ,", ",")


def test_vocabulary_is_frozen():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 39
    assert hashlib.sha256(" ".join(VOCABULARY).encode()).hexdigest()[:16] == "6a22ca11e34e8746"
    spoken = {t.word for i in range(400) for t in caption(scene("train", i), "train", i).tokens}
    assert spoken == set(VOCABULARY)


def test_swapped_captions_differ_by_exchanged_colours_alone():
    for i in range(0, 40, 2):
        first, second = (caption(scene("swap", k), "swap", k) for k in (i, i + 1))
        a, b = (o.colour for o in first.facts.objects)
        other = {a: b, b: a}
        assert [t._replace(word=other.get(t.word, t.word)) for t in first.tokens] == list(second.tokens)


def test_true_facts_name_everything():
    item = Scene((*one(x=0.2, y=0.2, radius=0.1).objects, *one("ring", x=0.8, y=0.25, radius=0.1).objects))
    facts = true_facts(item)
    assert [o.cell for o in facts.objects] == ["top left", "top right"]
    assert facts.objects[0].texture == "solid"
    assert [(r.subject, r.relation, r.reference) for r in facts.relations] == [(0, "left", 1)]
    assert cell_of(0.5, 0.5) == "center"
    assert cell_of(1.0, 1.0) == "bottom right"
    assert relation_between((0.0, 0.0), (0.5, 0.4)) is None
    assert relation_between((0.5, 0.9), (0.5, 0.4)) == "below"


# data set


def test_class_mode_is_balanced_and_labelled():
    dataset = ShapesDataset(ShapesConfig(num_images=130), 32)
    images, labels = dataset.batch(range(130))
    assert len(dataset) == 130
    assert dataset.num_classes == NUM_CLASSES == len(dataset.class_names)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [i % 64 for i in range(130)]
    assert images.min() >= -1
    assert images.max() <= 1
    assert images[0, 0, 0, 0].item() == pytest.approx(2 * BACKGROUND[0] - 1)
    item = dataset[77]
    assert torch.equal(item.image, images[77])
    assert (item.label, item.name) == (13, "shapes/train/77")
    assert CLASS_NAMES[13] == "purple square"
    assert COLOURS[13 % 8] in item.text
    assert SHAPES[13 // 8] in item.text


def test_batches_are_in_the_order_asked_for():
    dataset = ShapesDataset(text(num_images=9000), 16)
    wanted = [8999, 0, 4096, 4095, 0, 8192, 17]
    images, labels = dataset.batch(wanted)
    assert torch.equal(images, torch.stack([dataset[i].image for i in wanted]))
    assert labels.tolist() == [0] * 7
    assert dataset.num_classes == 1
    assert torch.equal(dataset.batch(torch.tensor([5]))[0][0], render([scene("train", 5)], 16)[0] * 2 - 1)
    assert dataset[5].text == caption(scene("train", 5), "train", 5).text
    assert dataset.batch([])[0].shape == (0, 3, 16, 16)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_an_error(index):
    with pytest.raises(IndexError, match="outside 0 to 9"):
        ShapesDataset(ShapesConfig(num_images=10), 32)[index]


def test_class_scenes_are_those_of_the_data_set():
    config = ShapesConfig(num_images=400, held_out_pairs="leave_out")
    dataset = ShapesDataset(config, 32)
    item = class_scene(63, 3, config=config)
    assert item.objects[0].label == 63
    assert dataset.scenes([3 * 56 + 55])[0] == item
    with pytest.raises(ValueError, match="label is 0"):
        class_scene(0, 0, config=config)


@pytest.mark.parametrize("split", SPLITS)
def test_facts_are_read_back_from_the_sentence_alone(split):
    for i, item in enumerate(sample_scenes(text(split), range(60))):
        said = caption(item, split, i)
        assert regardless_of_order(facts_of(said.text)) == regardless_of_order(said.facts)


def regardless_of_order(facts):
    """The objects, and the relations between them: a sentence may name the second object first."""
    objects = facts.objects
    relations = [(objects[r.subject], r.relation, objects[r.reference]) for r in facts.relations]
    return sorted(map(repr, objects)), relations


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("", "there is the end, and a or an is expected"),
        ("a red dog", "after 2 words there is 'dog'"),
        ("a red circle beside a blue square", "there is 'beside', and the end is expected"),
        ("a red circle in the sky", "there is 'sky'"),
        ("a red circle, the blue star is above the red circle", "'the blue star' was not named before"),
    ],
)
def test_a_sentence_of_another_form_is_refused(sentence, message):
    with pytest.raises(ValueError, match=message):
        facts_of(sentence)
