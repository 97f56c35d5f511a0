"""What guessing tokens gave, as a picture: calls of the network for an image, and which guesses stood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgtok.files import replacing
from imgtok.sample.page import MAIN, inline_svg


def save(said: Mapping[str, Any], path: Path) -> None:
    """Writes an .svg of a `calls.summary` of images whose tokens were guessed: how many images took how many calls, and
    the share of judged guesses that were accepted, by the number of their token. The former is left out where it is not
    known.
    """
    from matplotlib.figure import Figure  # costs a second to import

    panels = 1 + ("images_by_calls" in said)
    figure = Figure(figsize=(4.5 * panels, 3.2), layout="constrained", dpi=120)
    *others, right = figure.subplots(1, panels, squeeze=False)[0]
    for left in others:
        calls, images = zip(*said["images_by_calls"], strict=True)
        left.bar(calls, images, width=1, color=MAIN)
        left.set_xlabel("calls of the network")
        left.set_ylabel("images")
        left.set_title(f"{said['calls']} calls and {said['seconds']:.3g} s an image{each_gave(said)}", fontsize=9)
    points = [(token, share) for token, share in enumerate(said["accepted_by_token"]) if share is not None]
    right.plot(*zip(*points, strict=True), color=MAIN, marker=".", linewidth=1)
    right.set_ylim(0, 1.02)
    right.set_xlabel("number of the token")
    right.set_ylabel("guesses accepted")
    right.set_title(f"{said['accepted_share']} of all judged guesses", fontsize=9)
    for axis in (*others, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        temporary.write_text(inline_svg(figure), encoding="utf-8")


def each_gave(said: Mapping[str, Any]) -> str:
    """What a call after the first gave, to be added to a line; nothing where there was none."""
    return "" if said["tokens_per_call"] is None else f", {said['tokens_per_call']} tokens a call"
