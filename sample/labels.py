"""Which class, or which prompt, each image of a job is drawn for."""

from __future__ import annotations

from collections.abc import Sequence

from imgtok.generators.pipeline import Pipeline, check_classes


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
