from __future__ import annotations

import torch

from imgtok.quantizers.channels import low_frequency_shares


def test_the_share_of_low_frequencies():
    rows = torch.arange(16)
    board = ((rows[:, None] + rows) % 2).float() * 2 - 1
    wave = torch.cos(2 * torch.pi * rows / 16).expand(
        16, -1
    )  # a sixteenth of a cycle a position: an eighth is the line
    both = board + wave * 2**0.5  # of equal energy
    shares = low_frequency_shares(torch.stack([board, wave, torch.ones(16, 16), both])[None].repeat(2, 1, 1, 1))
    torch.testing.assert_close(shares, torch.tensor([0.0, 1.0, 1.0, 0.5], dtype=torch.float64))
