"""`imgtok cache` with several processes and with unreadable images."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import imgtok
from imgtok.data.images import ImageFolderConfig, Views, open_images
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenDataset
from imgtok.pictures import save_png, to_uint8
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.train.cache_tokens import Config, main

TRUNK = TrunkConfig(width=16, depth=1, head_dim=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = FlexTokConfig(image_size=8, patch_size=4, num_registers=2, levels=(4, 4), encoder=TRUNK, decoder=TRUNK)
    torch.manual_seed(0)
    model = FlexTok(config)
    torch.nn.init.normal_(model.encoder.readout.weight)  # with the zeros of a fresh one all images have the same tokens
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images."""
    for index in range(6):
        save_png(torch.full((3, 8, 8), 40 * index, dtype=torch.uint8), tmp_path / "data" / f"{index}.png")
    return tmp_path / "data"


def cache(tokenizer: Path, folder: Path, out: Path, **fields) -> TokenDataset:
    data = ImageFolderConfig(path=folder, labels="none")
    main(Config(**{"tokenizer": str(tokenizer), "out": out, "data": data, "held_out": 0.0, "shard_size": 1} | fields))
    return TokenDataset(out)


def test_each_shard_is_written_by_one_process(tokenizer, folder, tmp_path):
    words = [str(tokenizer), f"out={tmp_path / 'two'}", "data.kind=folder", f"data.path={folder}", "data.labels=none"]
    words += ["held_out=0", "shard_size=1"]
    first, second = processes.two("-m", "imgtok.train.cache_tokens", *words)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-3000:] + second.stderr[-3000:]
    assert "3 shards to write in this process, one of 2" in first.stderr  # the other says nothing
    one, two = cache(tokenizer, folder, tmp_path / "one"), TokenDataset(tmp_path / "two")
    assert torch.equal(one.tokens(range(6)).ids, two.tokens(range(6)).ids)
    assert torch.equal(one.indices, two.indices)


def test_a_shard_without_a_readable_image_is_empty(tokenizer, folder, tmp_path):
    (folder / "2.png").write_bytes(b"broken")
    assert cache(tokenizer, folder, tmp_path / "out").indices.tolist() == [0, 1, 3, 4, 5]


def test_unreadable_images_are_counted_over_all_shards(tokenizer, folder, tmp_path):
    for index in (1, 4):
        (folder / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="2 of 6 images are unreadable"):
        cache(tokenizer, folder, tmp_path / "out")


# ------------------------------------------------------------------------------------------------ several crops


@pytest.fixture
def noise(tmp_path) -> Path:
    """Four images of noise, wider than high and larger than the tokenizer's."""
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (3, 12, 20), generator=generator, dtype=torch.uint8)
        save_png(pixels, tmp_path / "noise" / f"{index}.png")
    return tmp_path / "noise"


def test_each_view_is_a_row(tokenizer, noise, tmp_path):
    """FlexTok's ten random crops and their mirror images, in batches that hold less than an image's."""
    fields = {"crops": "random", "num_crops": 10, "mirrored": True, "batch_size": 7}
    tokens = cache(tokenizer, noise, tmp_path / "out", **fields)
    assert len(tokens) == 4 * 20
    assert tokens.indices.tolist() == [index for index in range(4) for _ in range(20)]
    assert tokens.views.tolist() == [*range(20)] * 4
    views = Views(crops="random", num_crops=10, mirrored=True)
    images = open_images(ImageFolderConfig(path=noise), 8, held_out_fraction=0.0).views(range(4), views).images
    assert torch.equal(tokens.tokens(range(len(tokens))).ids, imgtok.load(tokenizer).encode(images).ids)
    assert len(tokens.tokens(range(80)).ids.unique(dim=0)) > 4
    assert all(len(own.flatten(1).unique(dim=0)) >= 8 for own in images.split(20))  # some places are drawn twice
    assert torch.equal(images[10:20], images[:10].flip(-1))


def test_a_view_depends_on_seed_index_and_number_alone(noise):
    source = open_images(ImageFolderConfig(path=noise), 8, held_out_fraction=0.0)
    views = Views(crops="random", num_crops=3, seed=5)
    together = source.views(range(4), views).images.unflatten(0, (4, 3))
    assert torch.equal(source.views([2], views).images, together[2])
    more = source.views([2], Views(crops="random", num_crops=5, seed=5)).images
    assert torch.equal(more[:3], together[2])
    assert not torch.equal(source.views([2], Views(crops="random", num_crops=3, seed=6)).images, together[2])


def test_five_crops_are_the_corners_and_the_centre(tmp_path):
    ramp = (torch.arange(10)[:, None] * 16 + torch.arange(10)).to(torch.uint8).expand(3, 10, 10)
    save_png(ramp.contiguous(), tmp_path / "ramp.png")
    source = open_images(ImageFolderConfig(path=tmp_path), 8, held_out_fraction=0.0)
    batch = source.views([0], Views(crops="five", zoom=1.25, mirrored=True))
    found = to_uint8(batch.images)[:, 0]
    places = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]  # top, left
    assert torch.equal(found[:5], torch.stack([ramp[0, top : top + 8, left : left + 8] for top, left in places]))
    assert torch.equal(found[5:], found[:5].flip(-1))
    assert batch.indices == (0,) * 10


def test_the_centre_stays_what_it_was(tokenizer, noise, tmp_path):
    tokens = cache(tokenizer, noise, tmp_path / "out")
    images = open_images(ImageFolderConfig(path=noise), 8, held_out_fraction=0.0).batch(range(4)).images
    assert torch.equal(tokens.tokens(range(len(tokens))).ids, imgtok.load(tokenizer).encode(images).ids)
    assert tokens.views.tolist() == [0] * 4


def test_a_shard_of_other_crops_is_refused(tokenizer, noise, tmp_path):
    cache(tokenizer, noise, tmp_path / "out", crops="random", num_crops=2)
    with pytest.raises(DataError, match="of another token cache .*crop_seed 0 instead of 1"):
        cache(tokenizer, noise, tmp_path / "out", crops="random", num_crops=2, crop_seed=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_crops": 10}, "num_crops: 10 is for crops=random; crops=center has its own number"),
        ({"crops": "five", "data": ShapesConfig()}, "crops: not possible with data.kind=shapes"),
        ({"zoom": 0.9}, "zoom"),
    ],
)
def test_crops_that_cannot_be(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"tokenizer": "t", "out": tmp_path, "data": ImageFolderConfig(path=tmp_path)} | fields)


# ---------------------------------------------------------------- labels, names and what the data is


@pytest.fixture
def classes(tmp_path) -> Path:
    """Two classes of two images."""
    for name in ("ant/0", "ant/1", "bee/0", "bee/1"):
        save_png(torch.full((3, 8, 8), len(name) * 9 + int(name[-1]), dtype=torch.uint8), tmp_path / f"a/{name}.png")
    return tmp_path / "a"


def test_names_of_classes_are_kept_and_labels_required(tokenizer, folder, classes, tmp_path):
    tokens = cache(tokenizer, folder, tmp_path / "out", data=ImageFolderConfig(path=classes))
    assert (tokens.class_names, tokens.labels.tolist()) == (("ant", "bee"), [0, 0, 1, 1])
    with pytest.raises(DataError, match=r"a cache of tokens keeps labels.*no class folders.*data\.labels=none"):
        cache(tokenizer, folder, tmp_path / "other", data=ImageFolderConfig(path=folder))


def test_a_cache_knows_its_images_wherever_they_lie(tokenizer, classes, tmp_path):
    first = cache(tokenizer, classes, tmp_path / "out", data=ImageFolderConfig(path=classes))
    moved = classes.rename(tmp_path / "b")
    assert cache(tokenizer, moved, tmp_path / "out", data=ImageFolderConfig(path=moved)).info == first.info
    save_png(torch.full((3, 8, 8), 255, dtype=torch.uint8), moved / "ant" / "0.png")
    with pytest.raises(DataError, match=r"another token cache \(dataset .*content"):
        cache(tokenizer, moved, tmp_path / "out", data=ImageFolderConfig(path=moved))


def test_an_older_cache_is_read_and_continued(tokenizer, classes, tmp_path):
    """One that has the text of the data's configuration, and no names of classes."""
    config = ImageFolderConfig(path=classes)
    cache(tokenizer, classes, tmp_path / "out", data=config)
    text = {"kind": "folder", "path": str(classes), "num_classes": None}
    shards = sorted((tmp_path / "out").iterdir())
    for path in shards:
        with safe_open(path, "np") as file:
            told, arrays = json.loads(file.metadata()["imgtok"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        del told["class_names"]
        told["dataset"] = json.dumps(text, sort_keys=True)
        save_file(arrays, path, {"imgtok": json.dumps(told, sort_keys=True)})
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    shards[1].unlink()
    tokens = cache(tokenizer, classes, tmp_path / "out", data=config)
    assert (len(tokens), tokens.class_names, tokens.info.digest) == (4, (), digest)
    shards[1].unlink()
    with pytest.raises(DataError, match="another token cache"):
        cache(tokenizer, classes, tmp_path / "out", data=replace(config, num=3))


def test_what_was_written_is_counted(tokenizer, folder, tmp_path, caplog):
    (folder / "2.png").write_bytes(b"broken")
    with caplog.at_level(logging.INFO):
        cache(tokenizer, folder, tmp_path / "out")
    assert "tokens of 5 images (1 of 6 could not be read), 1 crop(s) each" in caplog.text
