import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from imgtok.data.images import ImageFolderConfig
from imgtok.data.loaders import token_loader
from imgtok.data.shards import as_begun
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenCacheInfo, TokenDataset, TokenShardWriter
from imgtok.tokenizers.tokens import Tokens

INFO = TokenCacheInfo(
    fingerprint="0123456789abcdef",
    dataset="shapes",
    split="train",
    image_size=32,
    vocab_size=1000,
    num_tokens=3,
    num_classes=5,
    num_images=10,
    shard_size=4,
)


def ids_of(indices) -> torch.Tensor:
    return torch.stack([torch.tensor([i, 999 - i, 7]) for i in indices])


def write(folder, info=INFO, rank=0, world=1, shards=None):
    writer = TokenShardWriter(folder, info, rank=rank, world=world)
    for shard in list(writer.pending()) if shards is None else shards:
        indices = info.shard_indices(shard)
        writer.write(shard, Tokens.full(ids_of(indices)), torch.tensor([i % 5 for i in indices]), indices)


def test_shards_cover_the_images_once():
    assert INFO.num_shards == 3
    assert [*itertools.chain.from_iterable(INFO.shard_indices(shard) for shard in range(3))] == list(range(10))


def test_round_trip(tmp_path):
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir())[2] == "tokens-00002-of-00003.safetensors"
    tokens = TokenDataset(tmp_path, expect_fingerprint=INFO.fingerprint)
    assert (len(tokens), tokens.num_classes, tokens.info) == (10, 5, INFO)
    assert torch.equal(tokens.tokens(range(10)).ids, ids_of(range(10)))
    assert tokens.labels.tolist() == [i % 5 for i in range(10)]
    assert tokens.indices.tolist() == list(range(10))
    batch = tokens.batch([9, 2])
    assert torch.equal(batch.content.ids, ids_of([9, 2]))
    assert batch.content.ids.dtype == torch.int64
    assert (batch.labels.tolist(), batch.names) == ([4, 2], ("train[9]", "train[2]"))
    assert batch.to("meta").content.ids.device.type == "meta"


@pytest.mark.parametrize(("vocab_size", "size"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_16_bits_where_they_fit(tmp_path, vocab_size, size):
    info = replace(INFO, vocab_size=vocab_size, num_images=1)
    largest = torch.tensor([[0, vocab_size - 1, 1]])
    path = TokenShardWriter(tmp_path, info).write(0, Tokens.full(largest), torch.tensor([0]), [0])
    assert torch.equal(TokenDataset(tmp_path).tokens([0]).ids, largest)
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        assert file.get_tensor("ids").itemsize == size


def test_an_interrupted_cache_continues_with_the_missing_shards(tmp_path):
    write(tmp_path, shards=[0, 2])
    message = r"1 of 3 shards missing \(tokens-00001-of-00003.safetensors\); run the same `imgtok cache`"
    with pytest.raises(FileNotFoundError, match=message):
        TokenDataset(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert list(TokenShardWriter(tmp_path, INFO).pending()) == [1]
    write(tmp_path)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())
    assert len(TokenDataset(tmp_path)) == 10


def test_processes_write_different_shards_and_the_same_bytes(tmp_path):
    write(tmp_path / "one")
    for rank in (1, 0):
        write(tmp_path / "two", rank=rank, world=2)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    pending = [list(TokenShardWriter(tmp_path / "new", INFO, rank=rank, world=2).pending()) for rank in (0, 1)]
    assert pending == [[0, 2], [1]]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    from pathlib import Path

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_views_and_left_out_images(tmp_path):
    info = replace(INFO, num_images=4, crops="random", num_crops=2)
    rows = [0, 0, 1, 1, 3, 3]  # image 2 could not be read
    TokenShardWriter(tmp_path, info).write(0, Tokens.full(ids_of(rows)), torch.zeros(6), rows, [0, 1] * 3)
    tokens = TokenDataset(tmp_path)
    assert tokens.indices.tolist() == rows
    assert tokens.views.tolist() == [0, 1] * 3
    with pytest.raises(DataError, match="crops 'random' instead of 'center'; num_crops 2 instead of 1"):
        TokenShardWriter(tmp_path, replace(info, crops="center", num_crops=1))


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="tokens of tokenizer 0123456789abcdef, but tokenizer ffff is asked for"):
        TokenDataset(tmp_path, expect_fingerprint="ffff")
    with pytest.raises(DataError, match=r"fingerprint '0123456789abcdef' instead of 'ffff'.*another folder"):
        TokenShardWriter(tmp_path, replace(INFO, fingerprint="ffff"))
    other = replace(INFO, shard_size=5)
    write(tmp_path / "other", other)
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / path.name)
    with pytest.raises(DataError, match="shard_size"):
        TokenDataset(tmp_path)


def test_damage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no token cache"):
        TokenDataset(tmp_path)
    write(tmp_path)
    path = INFO.shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"tokens-00001-of-00003.safetensors: not a whole token shard"):
        TokenDataset(tmp_path)
    with pytest.raises(DataError, match="delete it and run `imgtok cache` again"):
        TokenShardWriter(tmp_path, INFO)


def test_another_format_is_refused(tmp_path):
    write(tmp_path, replace(INFO, format=2))
    with pytest.raises(DataError, match="token cache of format 2, this version reads format 3"):
        TokenCacheInfo.read(INFO.shard_path(tmp_path, 0))


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4), "rows of 2 to 2 tokens, where every image has 3"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(3), "3 labels, 4 views for 4 images"),
        (torch.full((4, 3), 1000), torch.zeros(4), "ids 1000 to 1000 for a vocabulary of 1000"),
        (torch.full((4, 3), -1), torch.zeros(4), "ids -1 to -1"),
    ],
)
def test_wrong_rows_are_refused(tmp_path, ids, labels, message):
    with pytest.raises(ValueError, match=message):
        TokenShardWriter(tmp_path, INFO).write(0, Tokens.full(ids), labels, range(4))
    with pytest.raises(ValueError, match="rank is 2"):
        TokenShardWriter(tmp_path, INFO, rank=2, world=2)


def test_token_loader_resumes(tmp_path):
    write(tmp_path)
    tokens = TokenDataset(tmp_path)
    whole = list(itertools.islice(token_loader(tokens, 4, seed=0), 10))
    resumed = next(token_loader(tokens, 4, seed=0, start_step=7))
    assert torch.equal(whole[7].content.ids, resumed.content.ids)
    shown = torch.cat([batch.content.ids for batch in whole])[:, 0].tolist()
    assert sorted(shown[:10]) == list(range(10))
    ranks = [next(token_loader(tokens, 2, seed=0, start_step=3, rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([batch.content.ids for batch in ranks]), whole[3].content.ids)


# ------------------------------------------------------------------------------------------------ lengths and slots

SLOTTED = replace(INFO, num_tokens=4, fixed_length=False, num_slots=300, num_images=3, shard_size=2)
ROWS = [([7], [299]), ([1, 2, 3], [0, 128, 129]), ([999, 0, 0, 5], [0, 1, 2, 3])]


def slotted(rows) -> Tokens:
    """The rows, 77 for padding, which must never be seen again."""
    ids, slots = (torch.tensor([(ROWS[row][part] + [77] * 4)[:4] for row in rows]) for part in (0, 1))
    return Tokens(ids, torch.tensor([len(ROWS[row][0]) for row in rows]), slots)


def write_slotted(folder):
    writer = TokenShardWriter(folder, SLOTTED)
    for shard in (0, 1):
        rows = SLOTTED.shard_indices(shard)
        writer.write(shard, slotted(rows), torch.zeros(len(rows)), rows)


def test_lengths_and_slots_survive_the_cache(tmp_path):
    write_slotted(tmp_path)
    dataset = TokenDataset(tmp_path)
    batch = dataset.batch([2, 0, 1])
    assert batch.content.lengths.tolist() == [4, 1, 3]
    assert batch.content.ids.tolist() == [[999, 0, 0, 5], [7, 0, 0, 0], [1, 2, 3, 0]]
    assert batch.content.slots.tolist() == [[0, 1, 2, 3], [299, 0, 0, 0], [0, 128, 129, 0]]
    assert batch.content.mask.sum(dim=1).tolist() == [4, 1, 3]
    loaded = next(token_loader(dataset, 3, seed=0)).content
    assert sorted(loaded.lengths.tolist()) == [1, 3, 4]
    assert loaded.slots.max() == 299
    assert batch.condition is batch.labels


def test_a_batch_is_about_as_wide_as_its_longest_row(tmp_path):
    """Generators spend no time on what would be padding in all rows; few widths occur."""
    info = replace(SLOTTED, num_tokens=40, num_slots=None, shard_size=4, num_images=4)
    ids, lengths = torch.arange(160).view(4, 40), torch.tensor([3, 16, 17, 40])
    TokenShardWriter(tmp_path, info).write(0, Tokens(ids, lengths), torch.zeros(4), range(4))
    dataset = TokenDataset(tmp_path)
    for rows, columns in (([0, 1], 16), ([2, 0], 32), ([1, 3], 40)):
        content = dataset.batch(rows).content
        assert content.ids.shape == (len(rows), columns)
        assert torch.equal(content.ids, Tokens(ids, lengths)[rows].padded().ids[:, :columns])
    assert dataset.tokens([0]).ids.shape == (1, 40)


def test_a_shard_holds_no_padding(tmp_path):
    write_slotted(tmp_path)
    arrays = load_file(SLOTTED.shard_path(tmp_path, 0))
    assert arrays["ids"].tolist() == [7, 1, 2, 3]
    assert arrays["slots"].tolist() == [299, 0, 128, 129]
    assert arrays["ids"].dtype == arrays["slots"].dtype == np.uint16
    assert arrays["lengths"].tolist() == [1, 3]


def test_ids_take_two_bytes_in_memory(tmp_path):
    write(tmp_path)
    assert TokenDataset(tmp_path)._ids.nbytes == 10 * 3 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": None}, "tokens without slots, of 300 slots"),
        ({"slots": torch.tensor([[0, 0], [1, 2]])}, "slots 0 to 2, which must increase within 0 to 299"),
        ({"slots": torch.tensor([[0, 300], [1, 2]])}, "slots 0 to 300, which must increase"),
        ({"lengths": torch.tensor([0, 2])}, "rows of 0 to 2 tokens in 2 columns, where an image has 1 to 4"),
        ({"lengths": torch.tensor([3, 2])}, "rows of 2 to 3 tokens in 2 columns"),
    ],
)
def test_tokens_that_the_description_excludes_are_refused(tmp_path, change, message):
    tokens = Tokens(torch.ones(2, 2, dtype=torch.long), torch.tensor([2, 2]), torch.tensor([[0, 1], [0, 1]]))
    with pytest.raises(ValueError, match=message):
        TokenShardWriter(tmp_path, SLOTTED).write(0, replace(tokens, **change), torch.zeros(2), [0, 1])


def test_a_shard_whose_lengths_do_not_add_up_is_damaged(tmp_path):
    write_slotted(tmp_path)
    path = SLOTTED.shard_path(tmp_path, 0)
    save_file(load_file(path) | {"lengths": np.array([1, 2], np.int32)}, path, SLOTTED.header)
    with pytest.raises(DataError, match="tokens-00000-of-00002.safetensors: not a whole token shard"):
        TokenDataset(tmp_path)


def test_a_cache_begun_before_more_was_told_is_continued(tmp_path):
    told = {"kind": "folder", "images": 3, "names": "n", "labels": "l", "content": "c"}
    begun = replace(INFO, dataset=json.dumps(told))
    write(tmp_path, begun)
    config = ImageFolderConfig(path=tmp_path)
    now = replace(INFO, dataset=json.dumps({**told, "own_held_out": False}))
    assert as_begun(tmp_path, now, config) == begun
    for other in ({"content": "d"}, {"num": 2}):
        changed = replace(INFO, dataset=json.dumps({**told, **other, "own_held_out": False}))
        assert as_begun(tmp_path, changed, config) == changed, "which is refused"
