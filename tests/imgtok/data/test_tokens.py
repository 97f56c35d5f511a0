import itertools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from imgtok.data.loaders import token_loader
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenCacheInfo, TokenDataset, TokenShardWriter, fingerprint, read_info

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
        writer.write(shard, ids_of(indices), torch.tensor([i % 5 for i in indices]), indices)


def test_shards_cover_the_images_once():
    assert INFO.num_shards == 3
    assert [*itertools.chain.from_iterable(INFO.shard_indices(shard) for shard in range(3))] == list(range(10))


def test_round_trip(tmp_path):
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir())[2] == "tokens-00002-of-00003.safetensors"
    tokens = TokenDataset(tmp_path, expect_fingerprint=INFO.fingerprint)
    assert (len(tokens), tokens.num_classes, tokens.info) == (10, 5, INFO)
    assert torch.equal(tokens.ids.long(), ids_of(range(10)))
    assert tokens.labels.tolist() == [i % 5 for i in range(10)]
    assert tokens.indices.tolist() == list(range(10))
    batch = tokens.batch([9, 2])
    assert torch.equal(batch.ids, ids_of([9, 2]))
    assert (batch.ids.dtype, batch.labels.tolist(), batch.names) == (torch.int64, [4, 2], ("train[9]", "train[2]"))
    assert batch.to("meta").ids.device.type == "meta"


@pytest.mark.parametrize(("vocab_size", "size"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_16_bits_where_they_fit(tmp_path, vocab_size, size):
    info = replace(INFO, vocab_size=vocab_size, num_images=1)
    largest = torch.tensor([[0, vocab_size - 1, 1]])
    path = TokenShardWriter(tmp_path, info).write(0, largest, torch.tensor([0]), [0])
    assert torch.equal(TokenDataset(tmp_path).ids.long(), largest)
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
    TokenShardWriter(tmp_path, info).write(0, ids_of(rows), torch.zeros(6), rows, [0, 1] * 3)
    tokens = TokenDataset(tmp_path)
    assert tokens.indices.tolist() == rows
    assert tokens.views.tolist() == [0, 1] * 3
    with pytest.raises(DataError, match="crops 'random' instead of 'center'; num_crops 2 instead of 1"):
        TokenShardWriter(tmp_path, replace(info, crops="center", num_crops=1))


def test_a_cache_without_views_is_still_read(tmp_path):
    """Format 1 as an earlier imgtok wrote it."""
    info = asdict(replace(INFO, num_images=3, shard_size=3, mirrored=True)) | {"format": 1}
    for name in ("crops", "num_crops", "zoom", "crop_seed"):
        del info[name]
    rows = [0, 1, 2, 0, 1, 2]
    arrays = {"ids": ids_of(rows).numpy().astype(np.uint16), "labels": np.zeros(6, np.int32), "indices": np.array(rows)}
    path = tmp_path / "tokens-00000-of-00001.safetensors"
    save_file(arrays, path, {"imgtok": json.dumps(info)})
    tokens = TokenDataset(tmp_path, expect_fingerprint=INFO.fingerprint)
    assert torch.equal(tokens.ids.long(), ids_of(rows))
    assert tokens.views.tolist() == [0] * 6
    assert (tokens.info.crops, tokens.info.mirrored) == ("center", True)


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
    write(tmp_path, replace(INFO, format=3))
    with pytest.raises(DataError, match="token cache of format 3, this version reads format 2"):
        read_info(INFO.shard_path(tmp_path, 0))


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4), r"ids \(4, 2\)"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(3), r"labels \(3,\)"),
        (torch.full((4, 3), 1000), torch.zeros(4), "ids 1000 to 1000 for a vocabulary of 1000"),
        (torch.full((4, 3), -1), torch.zeros(4), "ids -1 to -1"),
    ],
)
def test_wrong_rows_are_refused(tmp_path, ids, labels, message):
    with pytest.raises(ValueError, match=message):
        TokenShardWriter(tmp_path, INFO).write(0, ids, labels, range(4))
    with pytest.raises(ValueError, match="rank is 2"):
        TokenShardWriter(tmp_path, INFO, rank=2, world=2)


def test_fingerprint_follows_weights_and_configuration(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_bytes(b"{}")
    first = fingerprint(tmp_path)
    assert len(first) == 16
    assert fingerprint(tmp_path) == first
    (tmp_path / "config.json").write_bytes(b"{ }")
    second = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_token_loader_resumes(tmp_path):
    write(tmp_path)
    tokens = TokenDataset(tmp_path)
    whole = list(itertools.islice(token_loader(tokens, 4, seed=0), 10))
    resumed = next(token_loader(tokens, 4, seed=0, start_step=7))
    assert torch.equal(whole[7].ids, resumed.ids)
    shown = torch.cat([batch.ids for batch in whole])[:, 0].tolist()
    assert sorted(shown[:10]) == list(range(10))
    ranks = [next(token_loader(tokens, 2, seed=0, start_step=3, rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([batch.ids for batch in ranks]), whole[3].ids)
