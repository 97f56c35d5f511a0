"""`imgtok cache samples`: what a generator draws, as a cache that it can be trained on, and from there to a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import imgtok
from imgtok.cli import main
from imgtok.data.latents import LatentDataset
from imgtok.data.tokens import TokenDataset
from imgtok.generators.conditioning import ClassModulation, ClassSlot, TextCrossAttention
from imgtok.generators.entities import Cells
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.pipeline import Pipeline
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig

TRUNK = TrunkConfig(width=16, depth=1, head_dim=8)
TOKENIZER = FlexTokConfig(
    image_size=8, patch_size=4, num_registers=2, levels=(4, 4), encoder=TRUNK, decoder=TRUNK
)  # fmt: skip
SMALL_VAE = VAEConfig(
    latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=0.5
)  # fmt: skip


@pytest.fixture(autouse=True)
def gpt(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    condition = ClassSlot(num_classes=3, classes=("a", "b", "c"))
    model = GPT(GPTConfig(vocab_size=16, num_tokens=2, width=8, depth=1, num_heads=1, condition=condition))
    Pipeline(model, FlexTok(TOKENIZER), device="cpu").save_pretrained("gpt")
    return tmp_path / "gpt"


def test_tokens_are_those_of_the_pipeline(capsys):
    words = ["cache", "samples", "gpt", "num=7", "seed=2", "sampling.temperature=0.5", "shard_size=4", "out=drawn"]
    assert main([*words, "batch_size=3"]) == 0
    found = TokenDataset(Path("drawn"))
    wanted = imgtok.pipeline("gpt", device="cpu").tokens([0, 1, 2, 0, 1, 2, 0], seed=2, temperature=0.5, progress=False)
    assert torch.equal(found.tokens(range(7)).ids, wanted.ids)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found.class_names == ("a", "b", "c")
    Path("drawn/tokens-00001-of-00002.safetensors").unlink()
    assert main([*words, "batch_size=2"]) == 0  # what is missing, whatever the batch
    assert torch.equal(TokenDataset(Path("drawn")).tokens(range(7)).ids, wanted.ids)
    assert main([*words, "seed=3"]) == 2
    assert "of another token cache" in capsys.readouterr().err


def test_from_samples_to_a_merged_generator():
    assert main(["cache", "samples", "gpt", "num=8", "out=drawn"]) == 0
    training = ["training.steps=2", "training.batch_size=4", "training.learning_rate=0.01", "num_preview=0"]
    words = ["init=gpt", "tokens=drawn", "tokenizer=gpt/tokenizer", "out=tuned", *training]
    assert main(["train", "generator", *words]) == 0
    assert imgtok.load("tuned/final").config == imgtok.load("gpt").config  # nothing was lost on the way
    assert main(["merge", "gpt", "tuned=tuned", "w=1", "out=merged"]) == 0
    base, tuned, merged = (
        dict(imgtok.load(name).named_parameters()) for name in ("gpt", "tuned/final", "merged")
    )  # fmt: skip
    for name, value in merged.items():
        assert torch.allclose(value, 2 * base[name] - tuned[name], atol=1e-6)
    assert len(imgtok.pipeline("merged", device="cpu")([0, 1], seed=0)) == 2  # with its decoder


def test_latents_are_those_of_the_pipeline():
    torch.manual_seed(0)
    model = XAR(
        XARConfig(
            latent_channels=4, grid=4, width=16, depth=2, num_heads=1, entities=Cells(height=2, width=2),
            condition=ClassModulation(num_classes=2), sampling=FlowSampling(steps=(2,)),
        )
    )  # fmt: skip
    Pipeline(model, VAE(SMALL_VAE), device="cpu").save_pretrained("xar")
    assert main(["cache", "samples", "xar", "num=3", "out=drawn"]) == 0
    found = LatentDataset(Path("drawn"))
    wanted = imgtok.pipeline("xar", device="cpu").latents([0, 1, 0], seed=0, progress=False)
    assert torch.allclose(found.batch(range(3)).content, wanted, atol=1e-6)
    assert found.labels.tolist() == [0, 1, 0]
    moments = found.moments([0], [False])
    assert moments[:, 4:].max() == -30  # a sample of such a posterior is its mean


def test_a_generator_of_text_is_refused(capsys):
    condition = TextCrossAttention(text_width=12, text_length=5)
    model = GPT(GPTConfig(vocab_size=16, num_tokens=2, width=8, depth=1, num_heads=1, condition=condition))
    Pipeline(model, FlexTok(TOKENIZER), device="cpu").save_pretrained("text")
    assert main(["cache", "samples", "text", "num=3", "out=drawn"]) == 2
    assert "model: text draws from text" in capsys.readouterr().err
