"""Held-out rows of a cache that are copies of rows that are trained on: they are named, quickly.

What images of two sources share is in tests/train/test_validation.py.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from imgtok.data import overlap
from imgtok.data.content import TokenContent
from imgtok.data.latents import LatentCacheInfo, LatentDataset, LatentShardWriter
from imgtok.data.overlap import refuse_copies
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenCacheInfo, TokenDataset, TokenShardWriter
from imgtok.tokenizers.tokens import Tokens

WORDS = {"fingerprint": "0123456789abcdef", "dataset": "photos", "split": "train", "image_size": 32, "num_classes": 0}


def tokens(folder, ids, *, lengths=None, slots=None, vocab_size=60000, images=None, **fields) -> TokenDataset:
    """A cache of these rows, two to a shard; `images` are the images of the rows, where not each has its own."""
    rows, columns = ids.shape
    count = rows if images is None else len(set(images))
    shard_size = 2 if images is None else count
    info = TokenCacheInfo(
        num_images=count,
        shard_size=shard_size,
        vocab_size=vocab_size,
        num_tokens=columns,
        fixed_length=lengths is None,
        num_slots=None if slots is None else 99,
        **WORDS | fields,
    )
    writer = TokenShardWriter(folder, info)
    lengths = torch.full((rows,), columns) if lengths is None else torch.tensor(lengths)
    for shard in writer.pending():
        mine = slice(2 * shard, 2 * shard + 2) if images is None else slice(None)
        indices = list(range(rows))[mine] if images is None else images
        chosen = Tokens(ids[mine], lengths[mine], None if slots is None else slots[mine])
        writer.write(shard, chosen, torch.zeros(len(indices)), indices)
    return TokenDataset(folder)


def different(rows: int, columns: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 60000, (rows, columns)))


def warned(caplog, cache, trained, held_out, chosen) -> str:
    """What is said of a cache that is not refused."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        refuse_copies(cache, trained, held_out, chosen)
    return caplog.text


def test_copies_are_named_with_the_remedy(tmp_path, caplog):
    """Of tokens they are warned of, as a tokenizer may give different images the same: all of them before it learns."""
    ids = different(10)
    ids[[2, 9, 5]] = ids[[7, 7, 0]]
    cache = tokens(tmp_path / "some", ids)
    said = warned(caplog, cache, [0, 1, 3, 4, 6, 7], [2, 5, 8, 9], [2])
    assert (
        "held_out: 3 of 4 held-out rows have the tokens of rows that are trained on: train[2] (as train[7]), "
        "train[5] (as train[0]), train[9] (as train[7]); remove copies from the data" in said
    )
    assert "validation=FOLDER. If they are of different images, the tokenizer uses too few of its codes" in said
    assert not warned(caplog, cache, [1, 3, 4, 6, 7], [5, 8], [5])  # what they are copies of is not trained on
    same = tokens(tmp_path / "same", different(1).expand(10, -1))
    assert "4 of 4 held-out rows" in warned(caplog, same, range(6), range(6, 10), [7])


def test_rows_of_other_lengths_and_from_other_slots_are_no_copies(tmp_path, caplog):
    ids = different(4)
    ids[2] = ids[0]
    shorter = tokens(tmp_path / "shorter", ids, lengths=[8, 8, 7, 8])
    assert not warned(caplog, shorter, [0, 1], [2, 3], [2])
    slots = torch.arange(8).repeat(4, 1)
    moved = tokens(tmp_path / "moved", ids, slots=slots + torch.tensor([[0], [0], [1], [0]]))
    assert not warned(caplog, moved, [0, 1], [2, 3], [2])
    same = tokens(tmp_path / "same", ids, slots=slots)
    assert "1 of 2 held-out rows" in warned(caplog, same, [0, 1], [2, 3], [2])


def test_views_of_an_image_are_on_one_side(tmp_path, caplog):
    """So equal crops of it, as of a plain image, are no copies that are held out."""
    images = [image for image in range(10) for _ in range(3)]
    ids = different(10).repeat_interleave(3, dim=0)
    content = TokenContent.__new__(TokenContent)
    content.cache = tokens(tmp_path, ids, images=images, crops="random", num_crops=3)
    trained, held_out = content.divide(0.2)
    assert (len(trained), len(held_out)) == (24, 6)
    assert not {images[row] for row in trained} & {images[row] for row in held_out}
    assert not warned(caplog, content.cache, trained, held_out, held_out)


@pytest.fixture
def latents(tmp_path) -> LatentDataset:
    """200 rows, of which 90 to 98 are 0, 5, ..., 40 again, and 99 is 45 but for one bit."""
    info = LatentCacheInfo(
        num_images=200, shard_size=30, crop="center", latent_channels=1, grid=3, scaling_factor=1.0, mirrored=False,
        dtype="float16", **WORDS,
    )  # fmt: skip
    moments = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 2, 3, 3))).half()
    moments[90:100] = moments[0:50:5]
    moments[99, 1, 2, 2] = torch.nextafter(moments[99, 1, 2, 2], torch.tensor(9.0).half())
    writer = LatentShardWriter(tmp_path, info)
    for shard in writer.pending():
        rows = info.shard_indices(shard)
        writer.write(shard, moments[list(rows)], None, torch.zeros(len(rows)), rows)
    return LatentDataset(tmp_path)


def test_latents_are_compared_bit_for_bit(latents):
    message = r"9 of 20 held-out rows have the latents of rows .*: train\[90\] \(as train\[0\]\), .* and 6 more; remove"
    with pytest.raises(DataError, match=message):
        refuse_copies(latents, range(80), range(80, 100), [80])


def test_less_than_one_in_a_hundred_is_a_warning(latents, caplog):
    said = warned(caplog, latents, [0], [90, *range(100, 200)], [90])
    assert "held_out: 1 of 101 held-out rows have the latents of rows that are trained on: train[90] (as" in said
    with pytest.raises(DataError, match=r"1 of 100 held-out rows .*validate_every=null"):
        refuse_copies(latents, [0], [90, *range(100, 199)], [90])


def test_of_many_latents_a_part_is_read(latents, monkeypatch):
    """The rows that are validated on, and some runs of the others."""
    monkeypatch.setattr(overlap, "RUN", 5)
    monkeypatch.setattr(overlap, "RUNS", 8)
    read: list[list[int]] = []
    known_by = LatentDataset.known_by
    monkeypatch.setattr(LatentDataset, "known_by", lambda self, rows: read.append(list(rows)) or known_by(self, rows))
    with pytest.raises(DataError, match=r" of 9 held-out rows have the latents"):
        refuse_copies(latents, range(80), range(80, 100), range(90, 99))
    assert read[0] == [*range(90, 99)]
    assert len(read[1]) == 40
    assert {row % 5 for row in read[1][::5]} == {0}
