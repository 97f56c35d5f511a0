"""What drawing tokens took: calls of the network for each image, and how many drafts were accepted where tokens are
drafted first.

A generator that counts attaches `Calls` to its `Tokens`; programs add up `totals` of batches and write their `summary`,
without knowing how the tokens were drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Totals = dict[str, Any]
"""Sums over images, as plain numbers and lists: see `Calls.totals`. Those of earlier versions have no `by_calls`, which
is then not known of sums with them either."""


@dataclass(frozen=True)
class Calls:
    """Counts for each of B images of N tokens."""

    calls: Tensor
    """(B,): calls of the network, over any number of tokens; of both streams in one where it is guided."""
    tokens: Tensor
    """(B,): tokens that they gave."""
    single: Tensor
    """(B,): calls after the first that gave one token alone."""
    judged: Tensor
    """(B, N): how often a draft of each token was judged."""
    accepted: Tensor
    """(B, N): how often it was accepted."""
    seconds: Tensor
    """(B,): of drawing, shared among the images of a batch; 0 where nobody looked at the clock."""

    @classmethod
    def one_each(cls, tokens: Tensor) -> Calls:
        """Of images whose tokens (B,) took a call each."""
        none = tokens.new_zeros(len(tokens), 0)
        return cls(tokens, tokens, tokens - 1, none, none, torch.zeros_like(tokens, dtype=torch.float32))

    @classmethod
    def none(cls, images: int, tokens: int, device: torch.device) -> Calls:
        """No calls yet, to be counted."""
        rows, places = (torch.zeros(shape, dtype=torch.long, device=device) for shape in ((images,), (images, tokens)))
        return cls(rows, rows.clone(), rows.clone(), places, places.clone(), torch.zeros(images, device=device))

    @classmethod
    def cat(cls, parts: Sequence[Calls]) -> Calls:
        """Those of several batches, which were drawn alike."""
        return cls(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(cls)))

    def each(self, change: Callable[[Tensor], Tensor]) -> Calls:
        """The same with all counts changed, such as some of the rows."""
        return Calls(*(change(getattr(self, one.name)) for one in fields(self)))

    def plus(self, other: Calls) -> Calls:
        """Of images that were drawn twice, of fewer tokens perhaps once: the sums."""
        return Calls(*(added(getattr(self, one.name), getattr(other, one.name)) for one in fields(self)))

    def timed(self, seconds: float, images: int) -> Calls:
        """The same, drawn in so many seconds for so many images, where others were only padding."""
        return replace(self, seconds=torch.full_like(self.seconds, seconds / images))

    def summary(self) -> dict[str, Any]:
        """`summary` of these images."""
        return summary(self.totals())

    def totals(self) -> Totals:
        """Sums over the images, the most calls of one and, where drafts are judged, the images of each number of calls
        from 0 on.
        """
        sums = {one.name: getattr(self, one.name).sum(dim=0).tolist() for one in fields(self)}
        most, tokens = int(self.calls.max()), self.judged.shape[1]
        by_calls = torch.bincount(self.calls, minlength=tokens + 1).tolist() if tokens else []
        return {"images": len(self.calls), "most_calls": most, "by_calls": by_calls} | sums


def added(first: Tensor, second: Tensor) -> Tensor:
    """The sum of (B,), or of (B, L) where one may have fewer columns."""
    if first.ndim == 1:
        return first + second
    longest = max(first.shape[1], second.shape[1])
    return F.pad(first, (0, longest - first.shape[1])) + F.pad(second, (0, longest - second.shape[1]))


def together(parts: Sequence[Totals]) -> Totals:
    """The totals of several batches as one."""
    if not all("by_calls" in part for part in parts):
        parts = [{name: value for name, value in part.items() if name != "by_calls"} for part in parts]
    first, *others = parts
    made = dict(first)
    for other in others:
        made |= {name: _sum(made[name], value) for name, value in other.items() if name != "most_calls"}
        made["most_calls"] = max(made["most_calls"], other["most_calls"])
    return made


def _sum(one: Any, other: Any) -> Any:
    if not isinstance(one, list):
        return one + other
    return [a + b for a, b in itertools.zip_longest(one, other, fillvalue=0)]  # of more calls in one batch than another


def summary(totals: Totals) -> dict[str, Any]:
    """What totals say, rounded: calls of an image (mean and most); seconds of drawing an image; tokens that a call gave
    and the share of calls that gave one alone, both after the first; the share of judged drafts that were accepted, of
    all and of each token; and pairs of a number of calls and of the images that took so many.

    Where no draft of a token was judged, its share is None. The pairs are missing where totals do not tell.
    """
    images, later = totals["images"], totals["calls"] - totals["images"]
    said = {
        "images": images,
        "calls": round(totals["calls"] / images, 2),
        "most_calls": totals["most_calls"],
        "seconds": round(totals["seconds"] / images, 4),
        "tokens_per_call": _share(totals["tokens"] - images, later, 3),
    }
    if not any(totals["judged"]):
        return said
    by_token = [_share(*counts) for counts in zip(totals["accepted"], totals["judged"], strict=True)]
    said |= {
        "single_share": _share(totals["single"], later),
        "accepted_share": _share(sum(totals["accepted"]), sum(totals["judged"])),
        "accepted_by_token": by_token,
    }
    if "by_calls" in totals:
        said["images_by_calls"] = [[calls, images] for calls, images in enumerate(totals["by_calls"]) if images]
    return said


def _share(part: float, whole: float, digits: int = 4) -> float | None:
    return round(part / whole, digits) if whole else None
