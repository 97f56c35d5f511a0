"""A generator with its tokenizer at several token counts: a longer draw begins with the shorter one."""

from __future__ import annotations

import pytest
import torch

from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.pipeline import Pipeline
from imgtok.generators.sampling import TokenSampling
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig

SAMPLING = TokenSampling(guidance=2.0, top_k=12)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    trunk = TrunkConfig(width=32, depth=1, head_dim=16)
    tokenizer = FlexTok(
        FlexTokConfig(image_size=16, num_registers=8, patch_size=4, levels=(4, 4), encoder=trunk, decoder=trunk)
    )
    for parameter in tokenizer.parameters():  # a decoder at its start does not look at the tokens
        torch.nn.init.normal_(parameter, std=0.2)
    generator = GPT(
        GPTConfig(vocab_size=16, num_tokens=8, width=32, depth=2, num_heads=2).with_condition(num_classes=5)
    )
    torch.nn.init.normal_(generator.head.weight, std=0.5)
    return Pipeline(generator, tokenizer, device="cpu", exact=True)


def test_a_longer_draw_begins_with_the_shorter_one(pipeline):
    labels = torch.arange(16) % 5
    drawn = {
        count: pipeline.generator.generate(labels, seed=3, indices=range(16), sampling=SAMPLING, num_tokens=count).ids
        for count in (1, 2, 5, 8)
    }
    for count, ids in drawn.items():
        assert ids.shape == (16, count)
        assert torch.equal(ids, drawn[8][:, :count])
    assert len(drawn[8].unique()) > 4  # not one token over and over


def test_images_at_each_count_are_those_drawn_with_so_many_tokens(pipeline):
    indices, labels = range(4, 24), [index % 5 for index in range(4, 24)]
    settings = {"seed": 3, "sampling": SAMPLING, "decoding": FlexTokDecoding(steps=2)}
    found = pipeline.images_at((1, 4, 8), labels, indices, **settings)
    assert list(found) == [1, 4, 8]
    for count, images in found.items():
        alone = pipeline.images(labels, indices, num_tokens=count, **settings)
        assert images.dtype == torch.uint8
        assert torch.equal(images, alone)
    assert torch.equal(found[8], pipeline.images(labels, indices, **settings))
    assert not torch.equal(found[1], found[8])
