"""What drawing took: counts that are added up, and what they say."""

from __future__ import annotations

import pytest
import torch

from imgtok.sample import calls_figure
from imgtok.tokenizers.calls import Calls, summary, together
from imgtok.tokenizers.tokens import Tokens

COUNTED = Calls(
    calls=torch.tensor([3, 5]),
    tokens=torch.tensor([5, 5]),
    single=torch.tensor([0, 4]),
    judged=torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
    accepted=torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]),
    seconds=torch.tensor([0.5, 1.5]),
)


def test_what_counts_say():
    assert COUNTED.summary() == {
        "images": 2,
        "calls": 4.0,
        "most_calls": 5,
        "seconds": 1.0,
        "tokens_per_call": 1.333,
        "single_share": 0.6667,
        "accepted_share": 0.2857,
        "accepted_by_token": [None, 0.5, 0.0, 0.5, 0.0],
        "images_by_calls": [[3, 1], [5, 1]],
    }
    assert Calls.one_each(torch.tensor([4, 4])).summary() == {
        "images": 2,
        "calls": 4.0,
        "most_calls": 4,
        "seconds": 0.0,
        "tokens_per_call": 1.0,
    }


def test_batches_add_up():
    parts = [COUNTED.each(lambda counts, row=row: counts[row : row + 1]).totals() for row in range(2)]
    assert together(parts) == COUNTED.totals()
    assert summary(together(parts)) == COUNTED.summary()


def test_what_an_earlier_version_noted_adds_up():
    """Without the images of each number of calls, which are then not known of all."""
    new, said = COUNTED.totals(), COUNTED.summary()
    old = {name: value for name, value in new.items() if name != "by_calls"}
    del said["images_by_calls"]
    assert summary(old) == said
    for parts in ([old, new], [new, old], [new, new, old]):
        both = together(parts)
        assert "by_calls" not in both
        assert summary(both) == said | {"images": 2 * len(parts), "seconds": 1.0}


def test_the_figure_says_what_is_known(tmp_path):
    said = COUNTED.summary()
    whole, half = (said, {name: said[name] for name in said if name != "images_by_calls"} | {"tokens_per_call": None})
    for said, panels in ((whole, 2), (half, 1)):
        calls_figure.save(said, tmp_path / "calls.svg")
        assert (tmp_path / "calls.svg").read_text(encoding="utf-8").count('id="axes_') == panels
    assert (calls_figure.each_gave(whole), calls_figure.each_gave(half)) == (", 1.333 tokens a call", "")


def test_counts_go_with_their_tokens():
    tokens = Tokens(torch.zeros(2, 5, dtype=torch.long), torch.tensor([5, 5]), calls=COUNTED)
    both = Tokens.cat([tokens[1:], tokens[[0]]]).to("cpu").truncate(3).padded()
    assert both.calls.calls.tolist() == [5, 3]
    assert both.calls.timed(6.0, 3).seconds.tolist() == pytest.approx([2.0, 2.0])
    assert Tokens.cat([tokens, Tokens.full(tokens.ids)]).calls is None
