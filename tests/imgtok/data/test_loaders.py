import itertools
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imgtok.data import loaders
from imgtok.data.images import Batch, DataError, ImageFolderConfig, ShapesConfig, open_images
from imgtok.data.loaders import BatchSampler, UnreadableImages, eval_loader, train_loader


def take(loader, count):
    return list(itertools.islice(loader, count))


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.names == b.names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def open_folder(folder: Path, flip: bool = True):
    return open_images(ImageFolderConfig(path=folder), 8, flip=flip, held_out_fraction=0.0)


# Order


def test_an_epoch_shows_every_image_once_and_batches_run_on_into_the_next():
    sampler = BatchSampler(10, 4, seed=0)
    positions = list(itertools.chain.from_iterable(sampler.batch(step) for step in range(5)))
    for epoch in (0, 1):
        part = positions[10 * epoch : 10 * (epoch + 1)]
        assert {position.epoch for position in part} == {epoch}
        assert sorted(position.index for position in part) == list(range(10))
    assert [p.index for p in positions[:10]] != [p.index for p in positions[10:]]


def test_any_step_is_where_a_resumed_run_begins():
    whole = take(BatchSampler(7, 3, seed=1, rank=1, world=2), 12)
    for start in (0, 1, 5, 11):
        assert take(BatchSampler(7, 3, seed=1, start_step=start, rank=1, world=2), 12 - start) == whole[start:]


def test_processes_share_what_one_would_do_alone():
    alone = BatchSampler(11, 6, seed=3)
    shared = [BatchSampler(11, 2, seed=3, rank=rank, world=3) for rank in range(3)]
    for step in range(9):
        assert [*itertools.chain.from_iterable(sampler.batch(step) for sampler in shared)] == alone.batch(step)


def test_seeds_differ_and_a_batch_may_exceed_the_data():
    assert BatchSampler(50, 50, seed=0).batch(0) != BatchSampler(50, 50, seed=1).batch(0)
    assert [position.epoch for position in BatchSampler(2, 5, seed=0).batch(0)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("length", "batch_size", "options"),
    [(0, 1, {}), (5, 0, {}), (5, 1, {"rank": 2, "world": 2}), (5, 1, {"start_step": -1})],
)
def test_nonsense_is_refused(length, batch_size, options):
    with pytest.raises(ValueError, match="no batches from"):
        BatchSampler(length, batch_size, seed=0, **options)


# Loading


def test_training_resumes_bit_for_bit_with_and_without_workers(folder):
    source = open_folder(folder)
    whole = take(train_loader(source, 6, seed=0), 8)
    assert whole[0].images.shape == (6, 3, 8, 8)
    resumed = take(train_loader(source, 6, seed=0, start_step=5), 3)
    with_workers = take(train_loader(source, 6, seed=0, start_step=2, num_workers=2), 6)
    assert all(map(same, whole[5:], resumed))
    assert all(map(same, whole[2:], with_workers))
    assert not same(whole[0], take(train_loader(source, 6, seed=1), 1)[0])


def test_two_processes_load_the_images_of_one(folder):
    source = open_folder(folder)
    alone = take(train_loader(source, 6, seed=0), 5)
    shared = [take(train_loader(source, 3, seed=0, rank=rank, world=2), 5) for rank in (0, 1)]
    for one, first, second in zip(alone, *shared, strict=True):
        assert torch.equal(one.images, torch.cat([first.images, second.images]))


def test_global_random_state_is_neither_used_nor_changed(folder):
    source = open_folder(folder)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = take(train_loader(source, 4, seed=0), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(map(same, first, take(train_loader(source, 4, seed=0), 2)))


def test_shapes_train_in_the_same_order_rule():
    source = open_images(ShapesConfig(num_images=30), 16)
    whole = take(train_loader(source, 8, seed=0), 6)
    assert all(map(same, whole[4:], take(train_loader(source, 8, seed=0, start_step=4), 2)))


def test_evaluation_shows_every_image_once_in_order(folder):
    source = open_folder(folder)
    batches = list(eval_loader(source, 6))
    assert [len(batch.names) for batch in batches] == [6, 6, 6, 2]
    assert sum((batch.indices for batch in batches), ()) == tuple(range(20))
    plain = open_folder(folder, flip=False).batch(range(20)).images
    assert torch.equal(torch.cat([batch.images for batch in batches]), plain)
    parts = [list(eval_loader(source, 4, indices=range(rank, 20, 3))) for rank in range(3)]
    assert sorted(i for part in parts for batch in part for i in batch.indices) == list(range(20))
    workers = list(eval_loader(source, 6, num_workers=2))
    assert all(map(same, batches, workers))
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(eval_loader(source, 0))


@pytest.mark.parametrize("available", [True, False])
def test_batches_are_pinned_where_there_is_a_gpu(folder, monkeypatch, available):
    pinned = []

    class Spy(loaders.DataLoader):
        def __init__(self, *arguments, pin_memory, **named):
            pinned.append(pin_memory)
            super().__init__(*arguments, **named)

    monkeypatch.setattr(loaders, "DataLoader", Spy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    next(train_loader(open_folder(folder), 4, seed=0))
    assert pinned == [available]


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pinned_batches_are_the_same(folder, num_workers):
    batch = next(train_loader(open_folder(folder), 4, seed=0, num_workers=num_workers))
    assert batch.images.is_pinned()
    assert batch.labels.is_pinned()
    assert same(batch, open_folder(folder).training_batch(BatchSampler(20, 4, seed=0).batch(0), 0))


# Damage


def damage(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:60])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_unreadable_image_is_replaced_and_named_once(folder, caplog, num_workers):
    damage(folder, ["class0/04.png"])
    source = open_folder(folder)
    with caplog.at_level(logging.WARNING):
        batches = take(train_loader(source, 5, seed=0, num_workers=num_workers), 12)  # three epochs
    assert [len(batch.names) for batch in batches] == [5] * 12
    assert not any("04.png" in name for batch in batches for name in batch.names)
    (told,) = [record.getMessage() for record in caplog.records if "04.png" in record.getMessage()]
    assert "skipped unreadable image 1" in told


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run_with_the_list(folder, num_workers):
    damage(folder, ["class0/04.png", "class1/07.png"])
    with pytest.raises(DataError) as caught:
        take(train_loader(open_folder(folder), 5, seed=0, num_workers=num_workers), 8)
    message = str(caught.value)
    assert message.startswith("2 of 20 images are unreadable, 1 are allowed (1 %, at least 1)")
    assert "04.png: damaged or truncated" in message
    assert "07.png: damaged or truncated" in message
    assert "Traceback" not in message


def test_evaluation_leaves_unreadable_images_out(folder):
    damage(folder, ["class0/04.png"])
    batches = list(eval_loader(open_folder(folder), 1))
    assert len(batches) == 19
    assert [batch.indices[0] for batch in batches] == [0, 1, *range(3, 20)]


def test_several_evaluations_count_together(folder):
    damage(folder, ["class0/04.png", "class1/07.png"])
    source = open_folder(folder)
    unreadable = UnreadableImages(len(source))
    assert len(list(eval_loader(source, 10, indices=range(10), unreadable=unreadable))) == 1
    with pytest.raises(DataError, match="2 of 20"):
        list(eval_loader(source, 10, indices=range(10, 20), unreadable=unreadable))


def test_the_limit_is_one_percent():
    unreadable = UnreadableImages(1000)
    unreadable.add([f"{i}: bad" for i in range(10)] + ["3: bad"])
    with pytest.raises(DataError, match="11 of 1000 images are unreadable, 10 are allowed"):
        unreadable.add(["10: bad"])


class Faulty:
    """A source whose worker fails or dies."""

    size, num_classes, class_names = 8, 1, ("x",)

    def __init__(self, failure):
        self.failure = failure

    def __len__(self):
        return 4

    def blocks(self):
        return None

    def training_batch(self, positions, seed):
        return self.failure()


def fail():
    raise RuntimeError("the disk is on fire")


def die():
    os._exit(9)


@pytest.mark.parametrize(("failure", "message"), [(fail, "the disk is on fire"), (die, "worker .* exited")])
def test_a_failing_worker_stops_the_run(failure, message):
    with pytest.raises(RuntimeError, match=message):
        next(train_loader(Faulty(failure), 2, seed=0, num_workers=1))
