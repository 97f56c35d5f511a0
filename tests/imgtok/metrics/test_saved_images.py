"""Folders and .npz files of images to score."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from imgtok.metrics.saved_images import SavedImages, partners
from imgtok.pictures import center_crop_adm, save_png


@pytest.fixture
def images(random_images) -> torch.Tensor:
    return random_images(5, size=8)


def write_samples(folder, images, labels):
    for index, image in enumerate(images):
        save_png(image, folder / f"{index:06d}.png")
    save_png(images[0], folder / "grid.png")
    (folder / "samples.json").write_text(json.dumps({"labels": labels, "seed": 0}))


def test_a_folder_of_samples(images, tmp_path):
    write_samples(tmp_path, images, [3, 1, 4, 1, 5])
    saved = SavedImages(tmp_path)
    assert len(saved) == 5  # without the grid
    assert saved.size == (8, 8)
    assert saved.labels.tolist() == [3, 1, 4, 1, 5]
    assert torch.equal(saved.batch([4, 0]), images[[4, 0]])


def test_images_beyond_the_record_belong_to_an_earlier_larger_job(images, tmp_path):
    write_samples(tmp_path, images, [3, 1, 4])
    assert len(SavedImages(tmp_path)) == 3


def test_an_unfinished_folder_is_refused(images, tmp_path):
    write_samples(tmp_path, images, [3, 1, 4, 1, 5, 9, 2])
    with pytest.raises(ValueError, match=r"2 of the 7 images .* the first is 000005\.png"):
        SavedImages(tmp_path)


def test_any_folder_of_images(images, tmp_path):
    save_png(images[1], tmp_path / "b" / "x.png")
    save_png(images[0], tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not an image")
    saved = SavedImages(tmp_path)
    assert saved.labels is None
    assert torch.equal(saved.batch(range(2)), images[:2])


def test_an_npz_as_the_adm_evaluator_has_it(images, tmp_path):
    array = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "plain.npz", array)
    np.savez(tmp_path / "labelled.npz", array, np.arange(5, dtype=np.int32))
    plain, labelled = SavedImages(tmp_path / "plain.npz"), SavedImages(tmp_path / "labelled.npz")
    assert plain.labels is None
    assert labelled.labels.tolist() == [0, 1, 2, 3, 4]
    assert labelled.labels.dtype == torch.int64
    assert torch.equal(plain.batch([2, 1]), images[[2, 1]])


def test_mistakes_are_named(images, tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such file or folder; images to score are a folder"):
        SavedImages(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images; the folder is empty"):
        SavedImages(tmp_path / "empty")
    np.savez(tmp_path / "float.npz", images.permute(0, 2, 3, 1).float().numpy())
    with pytest.raises(ValueError, match=r"float32 \(5, 8, 8, 3\) .*images are scored as uint8 from 0 to 255"):
        SavedImages(tmp_path / "float.npz")
    np.savez(tmp_path / "labels.npz", images.permute(0, 2, 3, 1).numpy(), np.arange(4))
    with pytest.raises(ValueError, match="expected 5 integer labels"):
        SavedImages(tmp_path / "labels.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3), y=np.zeros(3))
    with pytest.raises(ValueError, match="no images arr_0"):
        SavedImages(tmp_path / "other.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(ValueError, match="single array"):
        SavedImages(tmp_path / "single.npz")


def test_a_file_of_another_size_or_damage_is_named(images, tmp_path):
    save_png(images[0], tmp_path / "a.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"c\.png"):
        SavedImages(tmp_path).batch([1])
    save_png(images[0][:, :6, :5], tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: is 5x6, but the first image of .* is 8x8; resize=8 brings all"):
        SavedImages(tmp_path)  # before any is scored
    places, pixels, problems = SavedImages(tmp_path, resize=6).readable(range(3))  # as advised, at another size
    assert places == [0, 1]
    assert "c.png" in problems[0]
    for row, name in enumerate("ab"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.array_equal(pixels[row].permute(1, 2, 0), center_crop_adm(picture, 6))


def test_those_that_can_be_read_are_told_from_the_others(images, tmp_path):
    save_png(images[0], tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"text")
    save_png(images[1], tmp_path / "c.png")
    places, pixels, problems = SavedImages(tmp_path).readable([2, 1, 0])
    assert places == [0, 2]
    assert torch.equal(pixels, images[[1, 0]])
    assert problems == [f"{tmp_path / 'b.png'}: not an image (it begins with b'text')"]


# Pairs


def write(folder, names, size=8) -> SavedImages:
    for name in names:
        save_png(torch.zeros(3, size, size, dtype=torch.uint8), folder / name)
    return SavedImages(folder)


def test_partners_are_found_by_name_whatever_the_order_and_the_ending(tmp_path, caplog):
    images = write(tmp_path / "a", ["x/1.png", "b.png", "c.png"])
    originals = write(tmp_path / "b", ["a.png", "b.jpeg", "c.png", "x/1.png"])
    assert [originals.name(place) for place in partners(images, originals, range(3))] == ["b", "c", "x/1"]
    assert "1 of the 4 originals in" in caplog.text


def test_npz_files_go_together_by_index(tmp_path):
    array = np.zeros((3, 8, 8, 3), np.uint8)
    for name, count in (("a", 2), ("b", 3)):
        np.savez(tmp_path / f"{name}.npz", array[:count])
    first, second = (SavedImages(tmp_path / f"{name}.npz") for name in "ab")
    assert partners(first, second, range(2)) == [0, 1]
    with pytest.raises(ValueError, match="1 of 3 images have no original"):
        partners(second, first, range(3))
    with pytest.raises(ValueError, match="folders and tars are paired by name, those of .npz"):
        partners(first, write(tmp_path / "c", ["0.png"]), range(1))


def test_pairs_that_cannot_be(tmp_path):
    images = write(tmp_path / "a", ["1.png", "2.png"])
    with pytest.raises(ValueError, match=r"1 of 2 images have no original .*; the first is 2, .* called 1 and so on"):
        partners(images, write(tmp_path / "b", ["1.png"]), range(2))
    with pytest.raises(ValueError, match="images of 8x8, but the originals .* 9x9; resize=8 brings all"):
        partners(images, write(tmp_path / "c", ["1.png", "2.png"], size=9), range(2))
    with pytest.raises(ValueError, match="two originals are called 1; keep one"):
        partners(images, write(tmp_path / "d", ["1.png", "1.jpg", "2.png"]), range(2))
