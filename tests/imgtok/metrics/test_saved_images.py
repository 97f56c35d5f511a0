"""Folders and .npz files of images to score."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from imgtok.images import save_png
from imgtok.metrics.saved_images import SavedImages


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
    with pytest.raises(FileNotFoundError, match="none: expected a folder"):
        SavedImages(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        SavedImages(tmp_path / "empty")
    np.savez(tmp_path / "float.npz", images.permute(0, 2, 3, 1).float().numpy())
    with pytest.raises(ValueError, match="expected uint8"):
        SavedImages(tmp_path / "float.npz")
    np.savez(tmp_path / "labels.npz", images.permute(0, 2, 3, 1).numpy(), np.arange(4))
    with pytest.raises(ValueError, match="expected 5 integer labels"):
        SavedImages(tmp_path / "labels.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="no images arr_0"):
        SavedImages(tmp_path / "other.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(ValueError, match="single array"):
        SavedImages(tmp_path / "single.npz")


def test_a_file_of_another_size_or_damage_is_named(images, tmp_path):
    save_png(images[0], tmp_path / "a.png")
    save_png(images[0][:, :6, :5], tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    saved = SavedImages(tmp_path)
    with pytest.raises(ValueError, match=r"b\.png: is 5x6, but the first image of the folder is 8x8"):
        saved.batch([1])
    with pytest.raises(ValueError, match=r"c\.png"):
        saved.batch([2])
