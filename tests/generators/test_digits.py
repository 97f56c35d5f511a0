"""Embeddings that ids share by their digits."""

from __future__ import annotations

import pytest
import torch

from imgtok.generators.gpt import GPT, DigitRows, GPTConfig
from imgtok.quantizers.fsq import FSQ
from imgtok.tokenizers.tokens import Tokens


def test_digits_are_those_of_the_quantizer():
    levels = (4, 3, 5)
    quantizer = FSQ(levels)
    codes = quantizer.ids_to_codes(torch.arange(60))
    digits = (codes * quantizer.half_width + quantizer.half_width).round().long()
    assert torch.equal(DigitRows(levels, 2).digits, digits + torch.tensor([0, 4, 7]))


def test_rows_are_sums_over_digits():
    rows = DigitRows((2, 3), 4)
    torch.nn.init.normal_(rows.table)
    assert torch.allclose(rows()[5], rows.table[1] + rows.table[2 + 2])  # 5 = 1 + 2 * 2


def test_a_gradient_for_one_id_moves_its_neighbour():
    config = GPTConfig(
        vocab_size=6, num_tokens=3, width=8, depth=1, num_heads=2, levels=(2, 3), dropout=0.0
    ).with_condition(num_classes=2)
    torch.manual_seed(0)
    model = GPT(config)
    labels, ids = torch.tensor([0]), torch.full((1, 3), 4)
    before = model.logits(labels, ids).softmax(-1)[0, 0].detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(Tokens.full(ids), labels, generator=torch.Generator()).total.backward()
    optimizer.step()
    change = model.logits(labels, ids).softmax(-1)[0, 0].detach() - before
    assert change[4] > 0
    assert change[5] > change[1]  # 5 shares the second digit with 4, 1 shares none


def test_levels_must_make_the_vocabulary():
    with pytest.raises(ValueError, match=r"levels: \[2, 3\] make 6 ids, but vocab_size is 7"):
        GPTConfig(vocab_size=7, levels=(2, 3))
