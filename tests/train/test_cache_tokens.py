"""`imgtok cache` with several processes and with unreadable images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imgtok.data.images import ImageFolderConfig
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenDataset
from imgtok.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.images import save_png
from train.cache_tokens import Config, main

ROOT = Path(__file__).parents[2]
TRUNK = TrunkConfig(width=16, depth=1, head_dim=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = FlexTokConfig(image_size=8, patch_size=4, num_registers=2, levels=(4, 4), encoder=TRUNK, decoder=TRUNK)
    FlexTok(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images."""
    for index in range(6):
        save_png(torch.full((3, 8, 8), 40 * index, dtype=torch.uint8), tmp_path / "data" / f"{index}.png")
    return tmp_path / "data"


def cache(tokenizer: Path, folder: Path, out: Path) -> TokenDataset:
    data = ImageFolderConfig(path=folder)
    main(Config(tokenizer=str(tokenizer), out=out, data=data, held_out=0.0, shard_size=1))
    return TokenDataset(out)


def test_each_shard_is_written_by_one_process(tokenizer, folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [str(tokenizer), f"out={tmp_path / 'two'}", "data.kind=folder", f"data.path={folder}"]
    done = subprocess.run(
        [*launch, "-m", "train.cache_tokens", *words, "held_out=0", "shard_size=1"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 shards to write in this process, one of 2" in done.stderr
    one, two = cache(tokenizer, folder, tmp_path / "one"), TokenDataset(tmp_path / "two")
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.indices, two.indices)


def test_a_shard_without_a_readable_image_is_empty(tokenizer, folder, tmp_path):
    (folder / "2.png").write_bytes(b"broken")
    assert cache(tokenizer, folder, tmp_path / "out").indices.tolist() == [0, 1, 3, 4, 5]


def test_unreadable_images_are_counted_over_all_shards(tokenizer, folder, tmp_path):
    for index in (1, 4):
        (folder / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="2 of 6 images are unreadable"):
        cache(tokenizer, folder, tmp_path / "out")
