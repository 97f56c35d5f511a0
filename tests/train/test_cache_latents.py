"""`imgtok cache latents`: what it writes, with several processes, after an interruption, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from imgtok.cli import main as imgtok_main
from imgtok.data.images import ImageFolderConfig, open_images
from imgtok.data.latents import LatentDataset, open_latents
from imgtok.data.sources import DataError
from imgtok.pictures import save_png
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.vae import VAE, VAEConfig, load_vae
from imgtok.train import cache_latents
from imgtok.train.cache_latents import Config, main

SMALL = VAEConfig(latent_channels=2, block_channels=(4, 4), layers_per_block=1, norm_groups=2, scaling_factor=0.5)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    VAE(SMALL).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images of noise in two classes."""
    for index in range(6):
        pixels = torch.randint(0, 256, (3, 8, 12), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        save_png(pixels, tmp_path / "data" / "ab"[index % 2] / f"{index}.png")
    return tmp_path / "data"


def job(vae: Path, folder: Path, out: Path, **fields) -> Config:
    own = {"data": ImageFolderConfig(path=folder), "held_out": 0.0, "shard_size": 2, "image_size": 8, "mirrored": True}
    return Config(**{"vae": str(vae), "out": out} | own | fields)


def cache(vae: Path, folder: Path, out: Path, **fields) -> LatentDataset:
    main(job(vae, folder, out, **fields))
    return LatentDataset(out)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def test_the_moments_of_every_image_and_of_its_mirror_image(vae, folder, tmp_path):
    latents = cache(vae, folder, tmp_path / "out", batch_size=2)
    model = load_vae(vae)
    batch = open_images(ImageFolderConfig(path=folder), 8, held_out_fraction=0.0).batch(range(6))
    plain, mirrored = model.moments(batch.images), model.moments(batch.images.flip(-1))
    torch.testing.assert_close(latents.moments(range(6), [False] * 6), plain)
    torch.testing.assert_close(latents.moments(range(6), [True] * 6), mirrored)
    assert (plain - mirrored).abs().max() > 0.01
    assert latents.labels.tolist() == batch.labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(latents.batch(range(6)).content, model.encode(batch.images))
    info = latents.info
    assert (info.image_size, info.grid, info.latent_channels, info.num_classes) == (8, 4, 2, 2)
    assert (info.scaling_factor, info.fingerprint, info.mirrored) == (0.5, model.fingerprint(), True)
    assert isinstance(open_latents(tmp_path / "out", model, 8), LatentDataset)


def test_two_processes_write_what_one_does(vae, folder, tmp_path, monkeypatch):
    """As ranks of a launch see it; a real launch of such a job is in test_cache_tokens.py."""
    cache(vae, folder, tmp_path / "one")
    for rank, count in ((1, 1), (0, 3)):
        state = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, device="cpu", wait_for_everyone=lambda: None
        )
        with monkeypatch.context() as patch:
            patch.setattr(cache_latents, "process_state", lambda state=state: state)
            main(job(vae, folder, tmp_path / "two"))
        assert len(shards(tmp_path / "two")) == count
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_an_interrupted_run_goes_on_at_the_next_shard(vae, folder, tmp_path, monkeypatch):
    cache(vae, folder, tmp_path / "whole")
    write = cache_latents.write_shard

    def interrupted(writer, shard, rows):
        if shard == 1:
            raise KeyboardInterrupt
        write(writer, shard, rows)

    with monkeypatch.context() as patch:
        patch.setattr(cache_latents, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache(vae, folder, tmp_path / "out")
    assert list(shards(tmp_path / "out")) == ["latents-00000-of-00003.safetensors"]
    first = tmp_path / "out/latents-00000-of-00003.safetensors"
    written = first.stat().st_mtime_ns
    cache(vae, folder, tmp_path / "out")
    assert first.stat().st_mtime_ns == written
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_unreadable_images_are_left_out(vae, folder, tmp_path):
    (folder / "a/2.png").write_bytes(b"broken")
    latents = cache(vae, folder, tmp_path / "out", shard_size=1)
    assert latents.indices.tolist() == [0, 2, 3, 4, 5]
    assert len(shards(tmp_path / "out")) == 6


def test_half_precision(vae, folder, tmp_path):
    whole = cache(vae, folder, tmp_path / "whole").batch(range(6)).content
    half = cache(vae, folder, tmp_path / "half", dtype="float16").batch(range(6)).content
    assert 0 < (half - whole).abs().max() <= 2**-11 * whole.abs().max()


@torch.no_grad()
def test_shapes_have_no_mirror_images(vae, tmp_path, capsys):
    words = ["cache", "latents", str(vae), f"out={tmp_path / 'out'}", "data={kind: shapes, num_images: 6}"]
    words += ["image_size=32"]
    assert imgtok_main(words) == 0
    latents = LatentDataset(tmp_path / "out")
    assert not latents.mirrored
    assert latents.batch([0]).content.shape == (1, 2, 16, 16)
    capsys.readouterr()
    assert imgtok_main([*words, "mirrored=true"]) == 2
    assert "mirrored: not possible with data.kind=shapes" in capsys.readouterr().err


def test_the_caches_of_others_are_refused(vae, folder, tmp_path):
    cache(vae, folder, tmp_path / "out")
    with pytest.raises(DataError, match="of another latent cache .*scaling_factor 0.5 instead of 0.7"):
        cache(vae, folder, tmp_path / "out", vae_scaling_factor=0.7)
    torch.manual_seed(1)
    other = VAE(SMALL)
    with pytest.raises(DataError, match="another autoencoder, scale or size .fingerprint"):
        open_latents(tmp_path / "out", other, 8)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="of another latent cache .fingerprint"):
        cache(tmp_path / "other", folder, tmp_path / "out")


def test_sizes_that_the_autoencoder_cannot_have(vae, tmp_path):
    config = Config(vae=str(vae), out=tmp_path / "out", image_size=33, data=ShapesConfig(num_images=4))
    with pytest.raises(ValueError, match="image_size: 33 pixels are no multiple of the 2 of one latent cell"):
        main(config)
