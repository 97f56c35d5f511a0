"""Which images a picture of samples shows, and what it says of them."""

from __future__ import annotations

import pytest

from imgtok.sample.labels import in_words, shown_by_label


def in_turn(classes: int, num: int) -> list[int]:
    return [i % classes for i in range(num)]


@pytest.mark.parametrize(
    ("labels", "most", "rows", "each"),
    [
        (in_turn(10, 50_000), 64, list(range(10)), 6),  # all classes where 4 of each fit
        (in_turn(2, 100), 64, [0, 1], 8),
        (in_turn(64, 256), 64, list(range(0, 64, 4)), 4),  # else classes from all over
        (in_turn(1000, 50_000), 64, [i * 1000 // 16 for i in range(16)], 4),
        (in_turn(64, 64), 64, list(range(64)), 1),
        (in_turn(3, 3), 2, [0, 1], 1),
        ([7] * 20, 64, [7], 20),
        ([5] * 3 + [-1] * 3, 64, [5, -1], 3),  # in the order in which they come
    ],
)
def test_a_picture_shows_classes_from_all_over_and_as_many_as_fit(labels, most, rows, each):
    shown = shown_by_label(labels, most)
    assert list(shown) == rows
    assert {len(indices) for indices in shown.values()} == {each}
    assert sum(map(len, shown.values())) <= most
    for label, indices in shown.items():
        assert indices == [index for index, other in enumerate(labels) if other == label][:each]


def test_a_label_is_told_by_its_name():
    assert in_words(1, ("cat", "dog")) == "dog"
    assert in_words(2, ("cat", "dog")) == "class 2"
    assert in_words(0, ("猫",)) == "class 0"
    assert in_words(0, (), "prompt") == "prompt 0"
    assert in_words(-1, ("cat",)) == "no class"
