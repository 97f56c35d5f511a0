"""What the base classes of tokenizers do by themselves: rates, and reconstruction at one."""

import pytest

from imgtok.tokenizers.base import Rate, powers_of_two


@pytest.mark.parametrize("text", ["16", "256@0.05", "1@0"])
def test_a_rate_is_written_as_it_is_read(text):
    assert str(Rate.parse(text)) == text
    assert Rate.parse("256@0.05") == Rate(256, 0.05)


@pytest.mark.parametrize("text", ["", "0", "-3", "1.5", "sixteen", "16@", "16@-1", "16@nan", "16@inf", "@0.1"])
def test_other_texts_are_no_rate(text):
    with pytest.raises(ValueError, match=r"rates: '.*' is not a number of tokens such as 16"):
        Rate.parse(text)


def test_powers_of_two_end_with_all():
    assert [powers_of_two(count) for count in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]
