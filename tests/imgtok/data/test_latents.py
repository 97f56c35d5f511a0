from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imgtok import randomness
from imgtok.data.images import Position
from imgtok.data.latents import (
    LatentCacheInfo,
    LatentDataset,
    LatentShardWriter,
    MARLatents,
    open_latents,
)
from imgtok.data.loaders import latent_loader
from imgtok.data.sources import DataError
from imgtok.tokenizers.vae import VAE, VAEConfig

SMALL = VAEConfig(latent_channels=2, block_channels=(4, 4), layers_per_block=1, norm_groups=2, scaling_factor=0.5)


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(SMALL).eval()


@pytest.fixture
def info(vae) -> LatentCacheInfo:
    return LatentCacheInfo(
        fingerprint=vae.fingerprint(),
        dataset="photos",
        split="train",
        num_images=10,
        shard_size=4,
        image_size=6,
        crop="center",
        latent_channels=2,
        grid=3,
        scaling_factor=0.5,
        num_classes=5,
        mirrored=True,
        dtype="float32",
    )


def moments_of(indices, offset: float = 0.0) -> Tensor:
    """Distinct moments an image, of log-variances near -8."""
    indices = list(indices)
    noise = torch.from_numpy(np.stack([np.random.default_rng(i).standard_normal((4, 3, 3)) for i in indices])).float()
    noise[:, 2:] -= 8
    noise[:, :2] += offset
    return noise


FLIPPED = 100.0
"""What is added to the means of a mirrored image, so that it can be told."""


def write(
    folder: Path, info: LatentCacheInfo, *, rank: int = 0, world: int = 1, left_out: tuple[int, ...] = ()
) -> None:
    writer = LatentShardWriter(folder, info, rank=rank, world=world)
    for shard in writer.pending():
        indices = [index for index in info.shard_indices(shard) if index not in left_out]
        flipped = moments_of(indices, FLIPPED) if info.mirrored else None
        writer.write(shard, moments_of(indices), flipped, torch.tensor([i % 5 for i in indices]), indices)


def means(indices, offset: float = 0.0) -> Tensor:
    return 0.5 * moments_of(indices, offset)[:, :2]


def test_round_trip(tmp_path, info):
    write(tmp_path, info, left_out=(2,))
    assert sorted(path.name for path in tmp_path.iterdir())[2] == "latents-00002-of-00003.safetensors"
    latents = LatentDataset(tmp_path)
    assert (len(latents), latents.num_classes, latents.info) == (9, 5, info)
    assert latents.indices.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    batch = latents.batch([8, 2, 2])
    assert torch.equal(batch.content, means([9, 3, 3]))
    assert batch.content.dtype == torch.float32
    assert (batch.labels.tolist(), batch.names) == ([4, 3, 3], ("train[9]", "train[3]", "train[3]"))
    assert batch.to("meta").content.device.type == "meta"


def test_a_row_is_a_sample_of_the_image_or_its_mirror_image(tmp_path, info):
    write(tmp_path, info, left_out=(0,))
    latents = LatentDataset(tmp_path)
    chosen = []
    for epoch in range(40):
        batch = latents.training_batch([Position(epoch, 3)], seed=7)  # image 4, since 0 is left out
        flipped = bool(batch.content.mean() > FLIPPED / 4)
        chosen.append(flipped)
        moments = moments_of([4], FLIPPED if flipped else 0.0)
        noise = randomness.normal(7, [4], (2, 3, 3), f"posterior {epoch}")
        wanted = 0.5 * (moments[:, :2] + (0.5 * moments[:, 2:]).exp() * noise)
        torch.testing.assert_close(batch.content, wanted)
    assert 10 <= sum(chosen) <= 30


def test_randomness_depends_on_seed_epoch_and_image_alone(tmp_path, info):
    write(tmp_path / "whole", info)
    write(tmp_path / "part", replace(info, shard_size=3), left_out=(0, 1))
    whole, part = LatentDataset(tmp_path / "whole"), LatentDataset(tmp_path / "part")
    places = [Position(1, 5), Position(2, 5), Position(1, 9), Position(1, 5)]
    together = whole.training_batch(places, seed=3).content
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1])
    for place, row in zip(places, together, strict=True):
        assert torch.equal(whole.training_batch([place], seed=3).content[0], row)
        shifted = Position(place.epoch, place.index - 2)
        assert torch.equal(part.training_batch([shifted], seed=3).content[0], row)
    assert not torch.equal(whole.training_batch(places, seed=4).content[0], together[0])


def test_samples_have_the_posteriors_deviation(tmp_path, info):
    writer = LatentShardWriter(tmp_path, replace(info, num_images=1, mirrored=False))
    moments = torch.zeros(1, 4, 3, 3)
    moments[:, 2:] = 2 * np.log(3.0)
    writer.write(0, moments, None, torch.zeros(1, dtype=torch.int64), [0])
    latents = LatentDataset(tmp_path)
    drawn = torch.cat([latents.training_batch([Position(epoch, 0)], seed=0).content for epoch in range(300)])
    assert drawn.std().item() == pytest.approx(0.5 * 3.0, rel=0.05)
    assert drawn.mean().abs() < 0.1


def test_without_mirror_images(tmp_path, info):
    write(tmp_path, replace(info, mirrored=False))
    assert set(load_file(tmp_path / "latents-00000-of-00003.safetensors")) == {"moments", "labels", "indices"}
    latents = LatentDataset(tmp_path)
    positions = [Position(epoch, 3) for epoch in range(20)]
    assert latents.training_batch(positions, seed=0).content.max() < FLIPPED / 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_has_the_order_of_training_and_resumes(tmp_path, info, num_workers):
    write(tmp_path, info)
    latents = LatentDataset(tmp_path)
    latents.batch([0])  # a file is open before the workers start
    batches = list(itertools.islice(latent_loader(latents, 3, seed=1), 8))
    names = [name for batch in batches for name in batch.names]
    assert sorted(names[:10]) == [f"train[{index}]" for index in range(10)], "an epoch is every image once"
    assert names[:10] != names[10:20]
    later = list(itertools.islice(latent_loader(latents, 3, seed=1, start_step=4, num_workers=num_workers), 4))
    assert [batch.names for batch in later] == [batch.names for batch in batches[4:]]
    assert all(torch.equal(a.content, b.content) for a, b in zip(later, batches[4:], strict=True))
    halves = [next(latent_loader(latents, 3, seed=1, start_step=1, rank=rank, world=2)) for rank in range(2)]
    assert torch.equal(torch.cat([half.content for half in halves]), torch.cat([b.content for b in batches[2:4]]))


def test_a_dataset_can_go_to_another_process(tmp_path, info):
    write(tmp_path, info)
    latents = LatentDataset(tmp_path)
    before = latents.batch([7]).content
    assert torch.equal(pickle.loads(pickle.dumps(latents)).batch([7]).content, before)


def test_float16(tmp_path, info):
    write(tmp_path / "half", replace(info, dtype="float16"))
    write(tmp_path / "whole", info)
    half, whole = (LatentDataset(tmp_path / name).batch(range(10)).content for name in ("half", "whole"))
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, rtol=2**-11, atol=1e-7)
    stored = load_file(tmp_path / "half/latents-00000-of-00003.safetensors")
    assert stored["moments"].dtype == stored["moments_flip"].dtype == torch.float16


def test_shards_are_written_once_by_either_process(tmp_path, info):
    write(tmp_path, info, rank=1, world=2)
    with pytest.raises(FileNotFoundError, match=r"2 of 3 shards missing .*same `imgtok cache latents` command again"):
        LatentDataset(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write(tmp_path, info)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(LatentDataset(tmp_path)) == 10


def test_what_a_writer_refuses(tmp_path, info):
    writer = LatentShardWriter(tmp_path, info)
    moments, labels = moments_of(range(4)), torch.zeros(4, dtype=torch.int64)
    for wrong in ((moments[:3], moments), (moments, None), (moments[:, :2], moments[:, :2])):
        with pytest.raises(ValueError, match=r"shard 0: moments .* for moments and moments_flip of \(4, 4, 3, 3\)"):
            writer.write(0, *wrong, labels, range(4))
    half = LatentShardWriter(tmp_path, replace(info, dtype="float16"))
    with pytest.raises(DataError, match=r"not finite numbers in float16; set dtype=float32"):
        half.write(0, moments * 1e5, moments, labels, range(4))
    assert not list(tmp_path.iterdir())


def test_damaged_shards(tmp_path, info):
    write(tmp_path, info)
    path = tmp_path / "latents-00001-of-00003.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"moments_flip": tensors["moments_flip"][:2].clone()}, path, info.header)
    with pytest.raises(DataError, match=r"00001-of-00003.*not a whole latent shard .*must be \[4, 4, 3, 3\]"):
        LatentDataset(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"delete it and run `imgtok cache latents` again"):
        LatentDataset(tmp_path)


# ------------------------------------------------------------------------------------------------ of which autoencoder


def test_the_cache_of_an_autoencoder(tmp_path, info, vae):
    write(tmp_path, info)
    assert isinstance(open_latents(tmp_path, vae, 6), LatentDataset)
    assert open_latents(tmp_path, vae).scaling_factor == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [("fingerprint", "0123456789abcdef"), ("scaling_factor", 0.25), ("image_size", 8), ("latent_channels", 3)],
)
def test_a_cache_of_another_autoencoder_scale_or_size_is_refused(tmp_path, info, vae, field, value):
    changed = replace(info, **{field: value}, num_images=1)
    shape = (1, *changed.shape)
    LatentShardWriter(tmp_path, changed).write(
        0, torch.zeros(shape), torch.zeros(shape), torch.zeros(1, dtype=torch.int64), [0]
    )
    with pytest.raises(DataError, match=rf"{field} {value!r}, not .*run `imgtok cache latents`"):
        open_latents(tmp_path, vae, 6)


# ------------------------------------------------------------------------------------------------ MAR's folders


@pytest.fixture
def mar(tmp_path) -> Path:
    """Three images of one class and one of another."""
    for index, name in enumerate(["n01/b.npz", "n01/a.npz", "n01/c.npz", "n02/a.npz"]):
        (tmp_path / "mar" / name).parent.mkdir(parents=True, exist_ok=True)
        arrays = {"moments": moments_of([index])[0], "moments_flip": moments_of([index], FLIPPED)[0]}
        np.savez(tmp_path / "mar" / name, **{key: value.numpy() for key, value in arrays.items()})
    return tmp_path / "mar"


def test_mars_folders(mar, vae):
    latents = open_latents(mar, vae, 6)
    assert isinstance(latents, MARLatents)
    assert (len(latents), latents.num_classes, latents.latent_channels, latents.grid) == (4, 2, 2, 3)
    assert latents.labels.tolist() == [0, 0, 0, 1]
    batch = latents.batch([0, 3])
    assert torch.equal(batch.content, means([1, 3]))
    assert [Path(name).relative_to(mar).as_posix() for name in batch.names] == ["n01/a.npz", "n02/a.npz"]
    samples = latents.training_batch([Position(epoch, 0) for epoch in range(40)], seed=0).content
    flipped = samples.mean(dim=(1, 2, 3)) > FLIPPED / 4
    assert 10 <= flipped.sum() <= 30
    assert (samples[~flipped] - means([1])).abs().max() < 0.5
    assert next(latent_loader(latents, 6, seed=0)).content.shape == (6, 2, 3, 3)


def test_mars_folders_of_another_size(mar, vae):
    with pytest.raises(DataError, match="image_size 6, not 8"):
        open_latents(mar, vae, 8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"moments": np.zeros((4, 3, 3), np.float32)}, "no array 'moments_flip'"),
        (
            {"moments_flip": np.zeros((4, 3, 2), np.float32)},
            r"moments_flip is float32 \(4, 3, 2\), must be .*\(4, 3, 3\)",
        ),
        ({"moments_flip": np.zeros((4, 3, 3), np.int32)}, "moments_flip is int32"),
        ({"moments_flip": np.array([print], dtype=object)}, "no array 'moments_flip'.*allow_pickle=False"),
    ],
)
def test_unusable_files_of_mars(mar, arrays, message):
    latents = MARLatents(mar, 0.5)
    np.savez(mar / "n02/a.npz", **arrays)
    with pytest.raises(DataError, match=f"n02/a.npz: {message}"):
        latents.moments([3], [True])
    (mar / "n02/a.npz").write_bytes(b"PK broken")
    with pytest.raises(DataError, match=r"n02/a.npz: no array"):
        latents.moments([3], [True])


def test_folders_without_latents(tmp_path, vae):
    with pytest.raises(FileNotFoundError, match="no latent cache .*`imgtok cache latents` writes one"):
        open_latents(tmp_path, vae, 6)
    with pytest.raises(FileNotFoundError, match="no CLASS/NAME.npz files"):
        MARLatents(tmp_path, 0.5)
    with pytest.raises(FileNotFoundError, match="no such folder of latents"):
        MARLatents(tmp_path / "missing", 0.5)
