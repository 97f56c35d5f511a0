"""Token sequences: cut, padded, saved and read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imgtok.tokenizers.calls import Calls
from imgtok.tokenizers.tokens import Tokens


def some(high: int = 64000) -> Tokens:
    ids = torch.randint(high, (4, 6), generator=torch.Generator().manual_seed(0))
    return Tokens(ids, torch.tensor([6, 1, 3, 4]))


def test_truncate_to_one_number_or_one_each():
    tokens = some()
    assert tokens.truncate(3).lengths.tolist() == [3, 1, 3, 3]
    assert tokens.truncate(3).ids.shape == (4, 3)
    each = tokens.truncate([2, 2, 1, 5])
    assert each.lengths.tolist() == [2, 1, 1, 4]
    assert torch.equal(each.ids, tokens.ids[:, :5])
    with pytest.raises(ValueError, match="2 numbers of tokens for 4 sequences"):
        tokens.truncate([1, 2])
    with pytest.raises(ValueError, match="at least 1 token"):
        tokens.truncate([1, 2, 0, 1])


def test_printed_they_are_one_short_line():
    assert repr(some()) == "Tokens(4 images, 1 to 6 tokens each, cpu)"
    assert repr(some()[:1]) == "Tokens(1 image, 6 tokens each, cpu)"
    assert repr(some()[:0]) == "Tokens(0 images, 0 tokens each, cpu)"
    one = Tokens.full(torch.zeros(2, 1, dtype=torch.long))
    counted = Tokens(one.ids, one.lengths, one.ids, calls=Calls.one_each(one.lengths))
    assert repr(counted) == "Tokens(2 images, 1 token each, slots, calls, cpu)"


def test_padding_is_zero():
    padded = some().padded()
    assert not padded.ids[1, 1:].any()
    assert torch.equal(padded.ids[0], some().ids[0])


def test_saved_tokens_come_back(tmp_path):
    some().save(tmp_path / "tokens.safetensors")
    back = Tokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(back.ids, some().padded().ids)
    assert torch.equal(back.lengths, some().lengths)
    assert back.ids.dtype == torch.long


@pytest.mark.parametrize(("high", "bits"), [(64000, 16), (1 << 16, 16), (1 << 18, 32)])
def test_a_file_holds_what_is_meant_and_no_more(tmp_path, high, bits):
    """14 tokens of up to 65,535 are 28 bytes, whatever their padding."""
    tokens = some(high)
    tokens.ids[0, 0] = high - 1
    few, more = tmp_path / "few", tmp_path / "more"
    tokens.truncate(1).save(few)
    tokens.save(more)
    per_token = (more.stat().st_size - few.stat().st_size) / 10
    assert bits / 8 - 1 <= per_token <= bits / 8 + 1  # the header's length is rounded up
    assert torch.equal(Tokens.load(more).ids, tokens.padded().ids)


def test_no_tokens_at_all(tmp_path):
    Tokens.full(torch.zeros(0, 5, dtype=torch.long)).save(tmp_path / "none")
    assert len(Tokens.load(tmp_path / "none")) == 0


def test_files_of_something_else(tmp_path):
    save_file({"ids": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other: not a file of tokens"):
        Tokens.load(tmp_path / "other")
    some().save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut: not a whole file of tokens"):
        Tokens.load(tmp_path / "cut")
    with pytest.raises(ValueError, match="not negative, got -1"):
        Tokens.full(torch.tensor([[-1]])).save(tmp_path / "bad")


def slotted() -> Tokens:
    ids = torch.tensor([[5, 70000, 1], [3, 9, 9]])
    return Tokens(ids, torch.tensor([3, 1]), torch.tensor([[0, 2, 7], [4, 9, 9]]))


def test_slots_go_along_with_their_ids(tmp_path):
    tokens = slotted()
    assert tokens.mask.tolist() == [[True, True, True], [True, False, False]]
    assert tokens.padded().slots.tolist() == [[0, 2, 7], [4, 0, 0]]
    assert tokens.truncate(2).slots.tolist() == [[0, 2], [4, 9]]
    assert tokens[[1, 0]].slots.tolist() == [[4, 9, 9], [0, 2, 7]]
    assert tokens[torch.tensor([1])].ids.tolist() == [[3, 9, 9]]
    tokens.to("cpu").save(tmp_path / "tokens.safetensors")
    again = Tokens.load(tmp_path / "tokens.safetensors")
    for found, wanted in zip((again.ids, again.slots), (tokens.padded().ids, tokens.padded().slots), strict=True):
        assert torch.equal(found, wanted)
    assert again.lengths.tolist() == [3, 1]


def test_batches_of_different_widths_become_one():
    one, two = slotted(), slotted()[1:].truncate(1)
    joined = Tokens.cat([one, two])
    assert joined.ids.shape == joined.slots.shape == (3, 3)
    assert joined.lengths.tolist() == [3, 1, 1]
    assert joined.padded().ids.tolist() == [[5, 70000, 1], [3, 0, 0], [3, 0, 0]]
    with pytest.raises(ValueError, match="cat: 1 of 2 batches of tokens have slots"):
        Tokens.cat([one, Tokens.full(torch.zeros(1, 2, dtype=torch.long))])


def test_a_number_gives_a_row_and_a_loop_all_of_them():
    tokens = Tokens(torch.arange(6).view(3, 2), torch.tensor([1, 2, 2]), torch.arange(6).view(3, 2))
    last = tokens[-1]
    assert (len(last), last.ids.tolist(), last.lengths.tolist(), last.slots.tolist()) == (1, [[4, 5]], [2], [[4, 5]])
    assert tokens[torch.tensor(1)].ids.tolist() == [[2, 3]]
    assert [row.ids.tolist() for row in tokens] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert tokens[torch.tensor([True, False, True])].lengths.tolist() == [1, 2]
    for chosen in ([True, False, True], np.array([True, False, True]), np.array([0, 2]), (0, 2)):
        assert tokens[chosen].lengths.tolist() == [1, 2]
    assert tokens[::-1].ids.tolist() == [[4, 5], [2, 3], [0, 1]]
    assert len(tokens[[]]) == len(tokens[np.array([], float)]) == 0
    assert tokens.device == torch.device("cpu")
    with pytest.raises(IndexError):
        tokens[3]
    for wrong in ("a", None, 1.0, ...):
        with pytest.raises(TypeError, match="chosen by numbers, slices or truth values"):
            tokens[wrong]
