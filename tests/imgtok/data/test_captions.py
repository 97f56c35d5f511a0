"""Caption caches: packed features, read back row by row."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from imgtok.data.captions import CaptionCacheInfo, CaptionDataset, CaptionShardWriter
from imgtok.data.latents import LatentCacheInfo, LatentDataset, LatentShardWriter
from imgtok.data.loaders import latent_loader, token_loader
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenCacheInfo, TokenDataset, TokenShardWriter
from imgtok.text.captions import Captions
from imgtok.tokenizers.tokens import Tokens

INFO = CaptionCacheInfo(
    fingerprint="0123456789abcdef", dataset="shapes", split="train", num_images=10, shard_size=4, encoder="t5", width=3,
    max_length=5, dtype="float16",
)  # fmt: skip
EMPTY = torch.full((1, 3), 0.5)


def features(index: int) -> torch.Tensor:
    """Caption `index` of 1 to 5 features, exact in half precision."""
    return index + torch.arange(3 * (index % 5 + 1)).view(-1, 3) / 16


def caption(index: int) -> Captions:
    """The same with spans: two characters a feature, the end mark none."""
    rows = features(index)
    spans = 2 * torch.arange(len(rows))[:, None] + torch.tensor([0, 2])
    return Captions.pad([rows], [torch.cat([spans[:-1], torch.zeros(1, 2, dtype=torch.int64)])])


def write(folder, info=INFO, shards=None, *, but=()):
    writer = CaptionShardWriter(folder, info, EMPTY)
    for shard in list(writer.pending()) if shards is None else shards:
        indices = [index for index in info.shard_indices(shard) if index not in but]
        writer.write(shard, [caption(index) for index in indices], indices)


def tokens(folder, indices=range(10), **changes) -> TokenDataset:
    """A cache of two views of each image."""
    info = TokenCacheInfo(
        fingerprint="f", dataset="shapes", split="train", image_size=8, vocab_size=100, num_tokens=1, num_classes=0,
        num_images=10, shard_size=10,
    )  # fmt: skip
    rows = [index for index in indices for _ in range(2)]
    ids = Tokens.full(torch.tensor(rows)[:, None])
    TokenShardWriter(folder, replace(info, **changes)).write(
        0, ids, torch.zeros(len(rows)), rows, [0, 1] * len(indices)
    )
    return TokenDataset(folder)


def latents(folder, indices=range(10), **changes) -> LatentDataset:
    """A cache whose means are the images' numbers."""
    info = LatentCacheInfo(
        fingerprint="f", dataset="shapes", split="train", num_images=10, shard_size=10, image_size=2, crop="center",
        latent_channels=1, grid=1, scaling_factor=1.0, num_classes=0, mirrored=True, dtype="float32",
    )  # fmt: skip
    means = torch.tensor([*indices], dtype=torch.float32)[:, None, None, None]
    moments = torch.cat([means, torch.full_like(means, -30.0)], dim=1)
    writer = LatentShardWriter(folder, replace(info, **changes))
    writer.write(0, moments, moments.clone(), torch.zeros(len(means)), list(indices))
    return LatentDataset(folder)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_features_are_kept_without_padding(tmp_path, dtype, stored):
    write(tmp_path, replace(INFO, dtype=dtype))
    first = tmp_path / "captions-00000-of-00003.safetensors"
    with safe_open(first, framework="pt") as file:
        assert file.get_tensor("features").shape == (1 + 2 + 3 + 4, 3)
        assert file.get_tensor("features").dtype == stored
    captions = CaptionDataset(tmp_path)
    assert len(captions) == 10
    assert torch.equal(captions.empty, EMPTY)
    batch = captions.batch([9, 0, 6])
    assert batch.lengths.tolist() == [5, 1, 2]
    assert batch.features.shape == (3, 5, 3)
    for row, length, index in zip(batch.features, batch.lengths, (9, 0, 6), strict=True):
        assert torch.equal(row[:length].float(), features(index).to(stored).float())
    assert batch.spans[0].tolist() == [[0, 2], [2, 4], [4, 6], [6, 8], [0, 0]]
    assert batch.columns(0, 3, 5) == [1, 2]
    assert batch.columns(1, 0, 100) == []


def test_tokens_meet_their_captions(tmp_path):
    write(tmp_path / "text")
    captions, cached = CaptionDataset(tmp_path / "text"), tokens(tmp_path / "tokens")
    captions.check_matches(cached)
    for batch in itertools.islice(token_loader(cached, 4, seed=0, captions=captions), 5):
        assert torch.equal(batch.captions.features[:, 0, 0].float(), batch.content.ids[:, 0].float())
        assert batch.to("meta").captions.features.device.type == "meta"
    assert next(token_loader(cached, 4, seed=0)).captions is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_latents_meet_their_captions(tmp_path, num_workers):
    write(tmp_path / "text")
    captions, cached = CaptionDataset(tmp_path / "text"), latents(tmp_path / "latents", [9, 0, 4, 7])
    captions.check_matches(cached)
    captions.features(0)  # a file is open when the workers start
    for batch in itertools.islice(latent_loader(cached, 3, seed=0, captions=captions, num_workers=num_workers), 3):
        assert torch.allclose(batch.captions.features[:, 0, 0].float(), batch.content[:, 0, 0, 0], atol=1e-4)
        assert batch.to("meta").captions.features.device.type == "meta"
    assert next(latent_loader(cached, 3, seed=0)).captions is None
    assert torch.equal(pickle.loads(pickle.dumps(captions)).features(9), captions.features(9))


@pytest.mark.gpu
def test_captions_are_copied_from_page_locked_memory(tmp_path):
    write(tmp_path / "text")
    batch = next(latent_loader(latents(tmp_path / "latents"), 3, seed=0, captions=CaptionDataset(tmp_path / "text")))
    assert batch.captions.features.is_pinned()
    assert batch.captions.mask.is_pinned()


def test_captions_of_other_images_are_refused(tmp_path):
    write(tmp_path / "text", but=[3])
    captions = CaptionDataset(tmp_path / "text")
    with pytest.raises(DataError, match="no caption of 1 images of the tokens, such as 3"):
        captions.check_matches(tokens(tmp_path / "all"))
    captions.check_matches(tokens(tmp_path / "same", [index for index in range(10) if index != 3]))
    with pytest.raises(DataError, match=r"captions of other images.*split 'train', not 'held_out'"):
        captions.check_matches(tokens(tmp_path / "other", split="held_out"))
    with pytest.raises(DataError, match="no caption of 1 images of the latents, such as 3"):
        captions.check_matches(latents(tmp_path / "latents"))
    with pytest.raises(DataError, match=r"than the latents \(dataset.*held_out of `imgtok cache latents`"):
        captions.check_matches(latents(tmp_path / "photos", dataset="photos"))


def test_an_interrupted_cache_continues_with_the_missing_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="no caption cache .*`imgtok cache text` writes one"):
        CaptionDataset(tmp_path)
    write(tmp_path, shards=[0, 2])
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards missing \(captions-00001-of-00003.safetensors\)"):
        CaptionDataset(tmp_path)
    assert list(CaptionShardWriter(tmp_path, INFO, EMPTY).pending()) == [1]
    write(tmp_path)
    path = INFO.shard_path(tmp_path, 1)
    with pytest.raises(DataError, match="of another caption cache .*dtype"):
        CaptionShardWriter(tmp_path, replace(INFO, dtype="bfloat16"), EMPTY)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="not a whole caption shard"):
        CaptionDataset(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Captions.pad([torch.ones(1, 4)])], "1 captions for 1 images of width 3"),
        ([Captions.pad([torch.ones(6, 3)])], "captions of 6 to 6 features"),
        ([Captions(torch.ones(1, 0, 3), torch.ones(1, 0, dtype=torch.bool))], "captions of 0 to 0 features"),
        ([Captions.pad([torch.ones(1, 3)])], "one by one, with their spans"),
        (
            [Captions.pad([torch.full((1, 3), 1e6)], [torch.zeros(1, 2)])],
            "features that float16 cannot hold; set dtype=bfloat16",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        CaptionShardWriter(tmp_path, INFO, EMPTY).write(0, rows, [0])
    assert not list(tmp_path.iterdir())
