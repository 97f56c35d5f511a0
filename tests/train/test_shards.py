"""A cache that is stopped loses nothing: what is encoded is kept, and is not encoded again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imgtok import signals
from imgtok.cli import main
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenDataset
from imgtok.pictures import save_png
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.train import shards

TRUNK = TrunkConfig(width=16, depth=1, head_dim=8)
COMMANDS = {"cache": (FlexTok, "encode", "token"), "cache latents": (VAE, "moments", "latent")}


@pytest.fixture(autouse=True)
def usual_handlers():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tokenizer and an autoencoder, and fourteen images of noise, of which two are broken."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = FlexTok(
        FlexTokConfig(image_size=8, patch_size=4, num_registers=2, levels=(4, 4), encoder=TRUNK, decoder=TRUNK)
    )
    torch.nn.init.normal_(tokenizer.encoder.readout.weight)
    tokenizer.save_pretrained(folder / "cache")
    VAE(VAEConfig(latent_channels=2, block_channels=(4, 4), layers_per_block=1, norm_groups=2)).save_pretrained(
        folder / "cache latents"
    )
    for index in range(200):
        pixels = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        save_png(pixels, folder / f"data/{'ab'[index % 2]}/{index:03d}.png")
    for name in ("a/002.png", "b/005.png"):
        (folder / "data" / name).write_bytes(b"broken")
    return folder


def run(command: str, models: Path, out: Path, *more: str) -> int:
    size = ["image_size=8", "mirrored=true"] if command == "cache latents" else ["crops=five"]
    data = ["data.kind=folder", f"data.path={models / 'data'}", "held_out=0", "shard_size=160", "batch_size=10"]
    return main([*command.split(), str(models / command), f"out={out}", *size, *data, *more])


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def watched(monkeypatch, command: str, act: Callable[[int], None] = lambda count: None) -> list[int]:
    """The numbers of images that the model gets from now on; `act` is called with how many batches there were."""
    kind, name, _ = COMMANDS[command]
    method, seen = getattr(kind, name), list[int]()

    def watching(self, images, *arguments, **options):
        seen.append(len(images))
        result = method(self, images, *arguments, **options)
        act(len(seen))
        return result

    monkeypatch.setattr(kind, name, watching)
    return seen


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_encoded(models, tmp_path, monkeypatch, capfd, caplog, command, number):
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        whole = watched(patch, command)
        assert run(command, models, tmp_path / "whole") == 0
    assert "of 198 images (2 of 200 could not be read)" in caplog.text  # point 6: what was written
    with monkeypatch.context() as patch:
        first = watched(patch, command, lambda count: os.kill(os.getpid(), number) if count == 4 else None)
        assert run(command, models, tmp_path / "out") == 128 + number
    assert f"{signals.name_of(number)}: stopped; what is encoded is in {tmp_path / 'out'}" in capfd.readouterr().err
    prefix = COMMANDS[command][2]
    (piece,) = (tmp_path / "out/.parts").iterdir()
    assert piece.name.startswith(f"{prefix}s-00000-of-00002.00000000-")
    with monkeypatch.context() as patch:
        second = watched(patch, command)
        assert run(command, models, tmp_path / "out") == 0
    assert sum(first) + sum(second) == sum(whole)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_sends_no_signal_costs_the_last_piece_at_most(models, tmp_path, monkeypatch):
    """As after SIGKILL, which no test of one process can show; pieces are written by the clock."""

    def die(count: int) -> None:
        if count == 6:
            raise RuntimeError("killed")

    monkeypatch.setattr(shards, "PIECE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        first = watched(patch, "cache", die)
        with pytest.raises(RuntimeError, match="killed"):
            run("cache", models, tmp_path / "out")
    assert len(list((tmp_path / "out/.parts").iterdir())) == 5
    second = watched(monkeypatch, "cache")
    assert run("cache", models, tmp_path / "out") == 0
    assert sum(first) - first[-1] + sum(second) == 198 * 5
    assert len(TokenDataset(tmp_path / "out")) == 198 * 5
    assert not (tmp_path / "out/.parts").exists()
    left = tmp_path / "out/.parts/tokens-00000-of-00002.00000000-00000010.safetensors"
    left.parent.mkdir()
    left.touch()  # by a process that was killed between its shard and the pieces of it
    assert run("cache", models, tmp_path / "out") == 0
    assert not left.parent.exists()


def test_no_process_takes_the_folder_of_pieces_from_another(tmp_path):
    """One that has made it may not have written into it yet."""

    class Info:
        @staticmethod
        def shard_path(folder: Path, shard: int) -> Path:
            return folder / f"tokens-{shard:05d}-of-00002.safetensors"

    parts = tmp_path / ".parts"
    parts.mkdir()
    shards.Pieces(tmp_path, Info(), 0).delete()
    assert parts.is_dir()


def test_pieces_of_another_cache_are_refused(models, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        watched(patch, "cache", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 2 else None)
        assert run("cache", models, tmp_path) == 143
    assert run("cache", models, tmp_path, "rate=1") == 2
    assert "of another token cache (num_tokens 2 instead of 1" in capfd.readouterr().err
    (piece,) = (tmp_path / ".parts").iterdir()
    piece.write_bytes(piece.read_bytes()[:-9])
    assert run("cache", models, tmp_path) == 2
    assert f"{piece}: not a whole token shard" in capfd.readouterr().err
    piece.unlink()  # the remedy in the message
    assert run("cache", models, tmp_path) == 0


def test_a_cache_that_stopped_is_not_taken_for_a_whole_one(models, tmp_path, monkeypatch):
    watched(monkeypatch, "cache", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 2 else None)
    assert run("cache", models, tmp_path) == 143
    with pytest.raises((FileNotFoundError, DataError), match="`imgtok cache`"):
        TokenDataset(tmp_path)
