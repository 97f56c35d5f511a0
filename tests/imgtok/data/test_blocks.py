import numpy as np

from imgtok.data.blocks import Blocks
from imgtok.data.loaders import BatchSampler


def active(order: np.ndarray, numbers: np.ndarray) -> int:
    """Blocks that are begun and not finished, at most."""
    blocks = numbers[order]
    first = {block: int(np.argmax(blocks == block)) for block in set(blocks.tolist())}
    last = {block: len(blocks) - 1 - int(np.argmax(blocks[::-1] == block)) for block in first}
    return max(sum(first[b] <= step <= last[b] for b in first) for step in range(len(blocks)))


def test_every_image_comes_once_and_few_blocks_are_open():
    numbers = np.repeat(np.arange(30), 20)
    for together in (1, 4):
        order = Blocks(numbers, together).order(seed=1, epoch=2)
        assert sorted(order.tolist()) == list(range(600))
        assert active(order, numbers) <= together + 1


def test_the_order_depends_on_seed_and_epoch_alone():
    blocks = Blocks(np.repeat(np.arange(10), 7), 3)
    first = blocks.order(0, 0).tolist()
    assert first == blocks.order(0, 0).tolist()
    assert first != blocks.order(0, 1).tolist() != blocks.order(1, 0).tolist()


def test_blocks_and_images_are_mixed():
    numbers = np.repeat(np.arange(40), 25)
    firsts = [int(numbers[Blocks(numbers, 5).order(0, epoch)[0]]) for epoch in range(200)]
    assert len(set(firsts)) > 30  # any block may come first
    order = Blocks(numbers, 5).order(0, 0)
    assert len(set(numbers[order[500:532]].tolist())) >= 4  # a batch holds images of several
    inside = np.array([np.flatnonzero(np.isin(order, np.flatnonzero(numbers == b))) for b in range(40)])
    assert np.ptp(inside, axis=1).min() > 50  # and none comes as a run


def test_a_part_of_the_images():
    blocks = Blocks(np.repeat(np.arange(6), 10), 2).of(np.array([3, 14, 15, 59]))
    assert blocks.numbers.tolist() == [0, 1, 1, 5]
    assert sorted(blocks.order(0, 0).tolist()) == [0, 1, 2, 3]


def test_batches_follow_the_blocks_also_of_several_processes():
    blocks = Blocks(np.repeat(np.arange(5), 4), 2)
    order = [*blocks.order(7, 0), *blocks.order(7, 1)]
    shared = [BatchSampler(20, 3, seed=7, rank=rank, world=2, blocks=blocks) for rank in (0, 1)]
    batches = [sampler.batch(step) for step in range(6) for sampler in shared]
    assert [position.index for batch in batches for position in batch] == order[:36]
