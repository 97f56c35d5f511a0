"""Which class, or which prompt, each image of a job is drawn for."""

from __future__ import annotations

from collections.abc import Sequence

from imgtok.generators.pipeline import Pipeline, check_classes
from imgtok.pictures import can_write

COLUMNS = 8
"""Images of one class in a picture, if it has as many."""


def num_labels(pipe: Pipeline) -> int:
    """The classes of a generator. Raises ValueError for one that draws from text."""
    if pipe.reads_text:
        raise ValueError(
            "this generator draws from text: imgtok sample MODEL prompts='a red circle' (or prompts=FILE.txt, a "
            "prompt a line); then score its images with imgtok evaluate images=FOLDER"
        )
    return pipe.num_classes


def labels_in_turn(classes: Sequence[int], count: int, num_classes: int, *, unlabelled: bool = False) -> list[int]:
    """The label of every index: classes[i % number of classes], or all of the model's `num_classes` for no classes.

    Raises ValueError for a class outside the model's; -1, no class, is one only if `unlabelled`.
    """
    check_classes(classes, num_classes, unlabelled=unlabelled)
    chosen = classes or range(num_classes)
    return [chosen[i % len(chosen)] for i in range(count)]


def labels_by_class(classes: Sequence[int], each: int, num_classes: int, *, unlabelled: bool = False) -> list[int]:
    """The label of every index, class after class: classes[i // each]. Otherwise as `labels_in_turn`."""
    check_classes(classes, num_classes, unlabelled=unlabelled)
    return [label for label in classes or range(num_classes) for _ in range(each)]


def shown_by_label(labels: Sequence[int], most: int) -> dict[int, list[int]]:
    """Label -> the indices of some of its images, for a picture of at most `most` images: of all labels if 4 images of
    each fit, at most COLUMNS of each; else of labels from all over, in the order in which they first occur.
    """
    indices: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        indices.setdefault(label, []).append(index)
    if len(indices) == 1:  # then all that was asked for is of it
        return {label: own[:most] for label, own in indices.items()}
    longest = min(COLUMNS, most, max(map(len, indices.values()), default=1))
    each = max(1, min(longest, max(4, most // max(len(indices), 1))))
    count = min(len(indices), most // each)
    chosen = [list(indices)[i * len(indices) // count] for i in range(count)]
    return {label: indices[label][:each] for label in chosen}


def in_words(label: int, names: Sequence[str], what: str = "class") -> str:
    """What a picture says of a label, a class or what else it is the number of: its name, where there are names that
    can be written there, else the number; -1 is no class.
    """
    if label < 0:
        return f"no {what}"
    return names[label] if label < len(names) and can_write(names[label]) else f"{what} {label}"
