"""Inpainting and outpainting through the pipeline and `imgtok sample`: what is kept comes back to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import kinds
import numpy as np
import pytest
import torch
from kinds import LINES
from PIL import Image
from torch import Tensor

from imgtok.cli import main
from imgtok.generators.known import PARTS, Known, kept, part, positions
from imgtok.generators.pipeline import Pipeline
from imgtok.pictures import preprocess, to_pil

SIZE, GRID = 8, 4


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    vae = replace(LINES["vae"], config=replace(LINES["vae"].config, latent_channels=2))
    return Pipeline(kinds.build(LINES["tokenbridge"]), kinds.build(vae), device="cpu")


def images(count: int = 2) -> Tensor:
    return kinds.random(count, 3, SIZE, SIZE).clamp(-1, 1)


# ---------------------------------------------------------------- which part


def test_parts_by_name():
    rows = {name: part(name, 4).int().tolist() for name in PARTS}
    assert rows["left"] == [[1, 1, 0, 0]] * 4
    assert rows["bottom"] == [[0] * 4] * 2 + [[1] * 4] * 2
    assert rows["center"] == [[0] * 4, [0, 1, 1, 0], [0, 1, 1, 0], [0] * 4]
    for one, other in (("left", "right"), ("top", "bottom"), ("center", "border")):
        assert torch.equal(part(one, 4), ~part(other, 4))
    assert not (part("left", 5) & part("right", 5)).any()


def test_a_position_is_known_where_all_its_pixels_are_kept(tmp_path):
    pixels = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    pixels[:5, :4] = True
    wanted = torch.zeros(GRID, GRID, dtype=torch.bool)
    wanted[:2, :2] = True  # the fifth row is half a position
    assert torch.equal(kept(pixels, GRID, SIZE), wanted)
    assert torch.equal(kept(pixels.numpy(), GRID, SIZE), wanted)
    assert torch.equal(kept(wanted, GRID, SIZE), wanted)
    picture = Image.fromarray((pixels.numpy() * 255).astype(np.uint8))
    picture.save(tmp_path / "mask.png")
    assert torch.equal(kept(picture, GRID, SIZE), wanted)
    assert torch.equal(kept(str(tmp_path / "mask.png"), GRID, SIZE), wanted)
    assert torch.equal(positions(torch.stack([pixels, ~pixels]), GRID, SIZE)[0], wanted)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("lefft", r"keep: given 'lefft', must be left, right, .* white where the picture is kept; there is no file"),
        (torch.ones(4, 4), "keep: a mask must be boolean, True where the picture is kept, not torch.float32"),
        (torch.ones(3, 3, dtype=torch.bool), r"a mask \(3, 3\) must be \(4, 4\) of latent positions or \(8, 8\)"),
        (torch.eye(8, dtype=torch.bool), "no latent position is kept whole, and each is 2 x 2 pixels; keep a larger"),
    ],
)
def test_parts_that_are_none(keep, message):
    with pytest.raises(ValueError, match=message):
        kept(keep, GRID, SIZE)


# ---------------------------------------------------------------- from Python


@pytest.mark.parametrize("keep", ["left", "border"])
def test_half_of_a_picture_comes_back_to_the_bit(pipe, keep):
    known, mask = torch.cat([pipe.decoder.encode(image[None]) for image in images()]), part(keep, GRID)
    drawn = pipe.latents([3, 7], known=images(), keep=keep, seed=1, iterations=3)
    assert torch.equal(drawn[..., mask], known[..., mask])
    free = pipe.latents([3, 7], seed=1, iterations=3)
    assert not torch.equal(drawn[..., ~mask], free[..., ~mask])
    for given in (to_pil(images()), known):  # pictures, which are rounded to bytes, and latents
        again = pipe.latents([3, 7], known=given, keep=keep, seed=1, iterations=3)
        torch.testing.assert_close(again[..., mask], known[..., mask], atol=0.1, rtol=0)
    assert torch.equal(again, drawn)


def test_who_is_drawn_beside_an_image_leaves_no_trace(pipe):
    whole = pipe.latents([3, 7], known=images(), keep="top", iterations=3)
    alone = pipe.latents([7], known=images()[1:], keep="top", indices=[1], iterations=3)
    torch.testing.assert_close(alone, whole[1:])
    assert torch.equal(alone[..., :2, :], whole[1:, :, :2, :])


def test_one_picture_for_all_one_for_each_class_or_one_for_each_image(pipe):
    asked = {"keep": "left", "iterations": 2, "num_per_condition": 2}
    rows = [pipe.latents([3, 7], known=images(count), **asked)[..., :2] for count in (1, 2, 4)]
    for found, wanted in zip(rows, ([0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3]), strict=True):
        own = torch.cat([pipe.decoder.encode(image[None]) for image in images(max(wanted) + 1)])[..., :2]
        assert torch.equal(found, own[wanted])
    with pytest.raises(ValueError, match="known: 3 pictures for 4 images; give 1 for all of them, 2 .one for each cl"):
        pipe.latents([3, 7], known=images(3), **asked)


def test_what_is_known_may_be_prepared(pipe):
    known = pipe.known(images(), "left")
    assert isinstance(known, Known)
    pictures = pipe([3, 7], known=known, iterations=2)
    assert [np.array(picture).tolist() for picture in pictures] == [
        np.array(picture).tolist() for picture in pipe([3, 7], known=images(), keep="left", iterations=2)
    ]
    each = pipe.known(images(1), torch.stack([part("left", GRID), part("right", GRID)]))  # one picture, two masks
    drawn = pipe.latents([3, 3], known=each, iterations=2)
    assert torch.equal(drawn[0, ..., :2], drawn[1].new_tensor(each.latents[0, ..., :2].tolist()))


def test_requests_that_do_not_fit(pipe):
    for known, keep, message in (
        (None, "left", "keep: says which part of known pictures is kept; give these as known="),
        (images(), None, "keep: goes with pictures, given as known=...; it must be left, right"),
        (kinds.random(1, 3, 16, 16).clamp(-1, 1), "left", r"known: \(1, 3, 16, 16\) are neither images \(B, 3, 8, 8\)"),
        (images(), torch.ones(3, 4, 4, dtype=torch.bool), "keep: 3 masks for 2 pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.latents([3, 7], known=known, keep=keep)
    other = Pipeline(kinds.build(LINES["xar"]), kinds.build(LINES["vae"]), device="cpu")
    with pytest.raises(ValueError, match="known: a generator of kind xar keeps no part of an image; leave known and"):
        other([3], known=images(1), keep="left")


# ---------------------------------------------------------------- on the command line


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    for number, picture in enumerate(to_pil(images())):
        picture.resize((12, 10)).save(f"photo{number}.png")
    return tmp_path


def run(*words: str) -> int:
    return main(["sample", "model", "sampling.iterations=2", *words])


def test_a_job_draws_around_pictures(folder, pipe, capsys):
    words = ("known=photo0.png,photo1.png", "keep=left", "classes=3,7", "num=4", "out=drawn")
    assert run(*words) == 0
    around = preprocess(["photo0.png", "photo1.png"], SIZE)
    wanted = pipe([3, 7, 3, 7], known=around[[0, 1, 0, 1]], keep="left", iterations=2)
    for number, picture in enumerate(wanted):
        drawn = np.array(Image.open(f"drawn/{number:06d}.png")).astype(int)
        assert np.abs(drawn - np.array(picture).astype(int)).max() <= 1
    with Image.open("drawn-grid.png") as grid:
        assert grid.height > 3 * SIZE, "a row of what is known above those of the classes"
    assert len(json.loads(Path("drawn/samples.json").read_text())["request"]["known"]) == 2
    assert run(*words, "keep=right") == 2
    assert "another request (different: keep)" in capsys.readouterr().err
    to_pil(images()[:1].flip(-1))[0].save("photo0.png")
    assert run(*words) == 2
    assert "another request (different: known)" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_mistakes_on_the_command_line(capsys):
    Image.new("L", (9, 4), 255).save("wide.png")
    for words, message in (
        (["known=photo0.png"], "keep: is required with known; it must be left, right, top, bottom, center, border, or"),
        (["keep=left"], "known: is required with keep"),
        (["known=photo10.png", "keep=left"], "known: photo10.png: no such file or folder; did you mean photo"),
        (
            ["known=model", "keep=left"],
            "known: model is a folder; name image files in it, known=model/a.png,model/b.png",
        ),
        (["known=photo0.png", "keep=middle"], "keep: given 'middle', must be left, right"),
        (["known=photo0.png", "keep=wide.png"], "keep: wide.png is 9 x 4 pixels, and photo0.png 12 x 10: a mask must"),
        (["classes=1000"], "classes: 1000 is not a class of the model; it has classes 0 to 999"),
        (["sampling.order=rows"], "sampling.order: given 'rows', must be one of 'random', 'raster', 'confidence'"),
    ):
        assert run(*words, "out=drawn") == 2
        assert message in capsys.readouterr().err
        assert not Path("drawn").exists()
