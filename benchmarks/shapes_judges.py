"""What the oracle and the Fréchet distance of the built-in shapes say of tokens that a GPT drew in several ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imgtok import hub
from imgtok.config import to_dict
from imgtok.data.trained_on import Training
from imgtok.metrics.scorers import OracleScorer, ScoredBatch, Scorer, ShapesDistance
from imgtok.pictures import to_uint8
from imgtok.shapes import classifier
from imgtok.shapes.world import NUM_CLASSES, ShapesConfig
from imgtok.tokenizers.tokens import Tokens


class Judges:
    """The decoder of a generator's tokens, and judges that know what its images should look like."""

    def __init__(self, generator: hub.Found, num: int, device: torch.device) -> None:
        """`num` is how many images each way draws. Raises ValueError for a tokenizer that was not trained on shapes of
        one object, whose classes the oracle reads.
        """
        found = generator.part()
        training = Training.of(found)
        if training is None or not isinstance(training.data, ShapesConfig) or training.data.mode != "class":
            told = "has no record of its training" if training is None else f"learned from {to_dict(training.data)}"
            raise ValueError(f"--oracle: reads shapes of one object, and {found.name} {told}; leave --oracle out")
        self.profile, self.num, self.device = training.data, num, device
        self.decoder = hub.load(found).to(device)
        self.net = classifier.load_or_train()

    def fresh(self) -> list[Scorer]:
        """Judges of one way of drawing."""
        return [OracleScorer(self.num), ShapesDistance(self.net, self.profile, self.num, self.device)]

    @torch.no_grad()
    def see(self, judges: Sequence[Scorer], tokens: Tokens, labels: Tensor, indices: Sequence[int], seed: int) -> None:
        """Decodes tokens and shows the images to the judges of one way."""
        images = to_uint8(self.decoder.decode(tokens, seed=seed, indices=indices)).cpu()
        for judge in judges:
            judge.update(ScoredBatch(indices, images, labels))


def scores(judges: Sequence[Scorer], num: int) -> dict[str, Any]:
    """For the row of a way: the share of images whose object is the right one, its standard error, and the distance;
    nothing without judges.
    """
    found = {score.key: score.value for judge in judges for score in judge.scores()}
    if not found:
        return {}
    right = found["oracle_top1"]
    return {
        "oracle, %": round(100 * right, 2),
        "+-": round(100 * math.sqrt(right * (1 - right) / num), 2),
        "fd_shapes": round(found["fd_shapes"], 3),
        "of renders": round(found["fd_shapes_clean"], 3),
    }


def check_classes(num_classes: int) -> None:
    """Raises ValueError unless the model draws the classes of the oracle."""
    if num_classes != NUM_CLASSES:
        raise ValueError(f"--oracle: reads {NUM_CLASSES} classes, and the model draws {num_classes}")
