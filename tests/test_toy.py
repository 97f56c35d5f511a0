"""The toy tokenizer does what its tests elsewhere rely on: lengths and slots that follow the image."""

from __future__ import annotations

import pytest
import torch
from toy import ToyAE, ToyAEConfig, ToyDecoding, ToyTok, ToyTokConfig

from imgtok.tokenizers.base import Rate


@pytest.fixture(scope="module")
def model() -> ToyTok:
    torch.manual_seed(0)
    return ToyTok(ToyTokConfig()).eval()


def images() -> torch.Tensor:
    """Grey, with 0, 3 and 16 patches of another brightness."""
    made = torch.zeros(3, 3, 16, 16)
    made[1, :, :4, 4:] = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(4)
    made[2] = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return made


def test_lengths_and_slots_follow_the_image(model):
    tokens = model.encode(images())
    assert tokens.lengths.tolist() == [1, 3, 16]
    assert tokens.slots[1, :3].tolist() == [1, 2, 3]
    assert tokens.slots[2].tolist() == list(range(16))
    few, coarse = model.encode_at(images(), [Rate(4, 0.05), Rate(16, 0.4)])
    assert few.lengths.tolist() == [1, 3, 4]
    assert coarse.lengths.tolist() == [1, 2, 16]
    assert coarse.slots[1, :2].tolist() == [2, 3]


def test_decoding_looks_at_nothing_but_what_is_meant(model):
    tokens = model.encode(images())
    junk = type(tokens)(tokens.ids + 5 * ~tokens.mask, tokens.lengths, tokens.slots + 3 * ~tokens.mask)
    assert torch.equal(model.decode(junk), model.decode(tokens))
    assert torch.equal(model.reconstruct(images()), model.decode(tokens))
    quarter, half = (model.decode(tokens, decoding=ToyDecoding(contrast=contrast)) for contrast in (0.25, 0.5))
    assert torch.allclose(2 * quarter, half)


def test_a_rate_that_it_does_not_have_is_named(model):
    with pytest.raises(ValueError, match=r"does not have the rate 8; it has 4@0.05, 4@0.4, 16@0.05, 16@0.4"):
        model.encode(images(), rate=Rate(8))


def test_bits_count_tokens_their_number_and_their_slots(model):
    """4 bits a token, 4 to say how many, and of 16 slots log2 of 16, 560 and 1 choices."""
    bits = model.bits(model.encode(images()))
    expected = [4 + 4 + 4, 12 + 4 + torch.log2(torch.tensor(560.0)).item(), 64 + 4 + 0]
    assert bits.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_toy_autoencoder_reconstructs():
    model = ToyAE(ToyAEConfig())
    assert model.encode(images()).shape == (3, 4, 8, 8)
    assert model.reconstruct(images()).shape == (3, 3, 16, 16)
