"""Answers of images to captions, and the rows of a result: rates, their intervals, and differences from another run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from imgtok.files import replacing
from imgtok.sample.benchmark.items import Item, groups_of
from imgtok.shapes import oracle_inside
from imgtok.shapes.captions import Facts, ObjectFacts
from imgtok.shapes.intervals import Interval, differences, intervals
from imgtok.shapes.oracle import RATES, Detection, Score, score
from imgtok.shapes.oracle_fast import read

SHOWN_RATES = ("presence", "binding", "leakage", "relation", "extra", "prompt")
"""The columns of the table that is printed; the files have all of them."""
HELD_RATES = ("held_presence", "held_binding", "held_leakage")
"""Those of what objects hold, where a caption says that they hold something."""


@dataclass(frozen=True)
class Answer:
    """One image: what was asked, what the oracle read, and how these agree."""

    item: Item
    detections: Sequence[Detection]
    score: Score


@dataclass(frozen=True)
class Row:
    """The answers of one split, of one kind of images."""

    split: str
    what: str
    """The images: `samples`, `at 4 tokens`, `true images`, `another scene's`."""
    images: int
    rates: Mapping[str, Interval]
    differences: Mapping[str, Interval] | None = None
    """Minus those of the baseline, from the same captions."""
    seconds: float | None = None
    """Of drawing and decoding an image in one process; None where none was drawn."""
    seconds_of_baseline: float | None = None


def answers_of(items: Sequence[Item], images: Tensor, scale: float) -> list[Answer]:
    """What images (N, 3, H, W) uint8 answer to the captions of `items`; `scale` is that of the world's radii."""
    holding = any(item.facts.held for item in items)
    found = (oracle_inside.read if holding else read)(images.float() / 255, scale=scale)
    return [Answer(item, seen, score(item.facts, seen)) for item, seen in zip(items, found, strict=True)]


def row_of(
    split: str, what: str, answers: Sequence[Answer], baseline: Sequence[Score] | None = None, *, seed: int = 0
) -> Row:
    """The row of a split; with the scores of a baseline for the same captions, also the differences from it."""
    rows = [answer.score for answer in answers]
    groups = groups_of([answer.item for answer in answers], split)
    paired = None if baseline is None else differences(rows, baseline, groups, seed=seed)
    return Row(split, what, len(rows), intervals(rows, groups, seed=seed), paired)


# ---------------------------------------------------------------- files


def record_of(row: Row) -> dict[str, Any]:
    """A row as plain data; a rate without a value is null."""
    told: dict[str, Any] = {"split": row.split, "what": row.what, "images": row.images, "rates": _plain(row.rates)}
    if row.seconds is not None:
        told["seconds_an_image"] = round(row.seconds, 4)
    return told | ({} if row.differences is None else {"differences": _plain(row.differences)})


def _plain(rates: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}
        for name, interval in rates.items()
    }


def write_readings(path: Path, answers: Mapping[tuple[str, str], Sequence[Answer]]) -> None:
    """A JSON line an image: the caption, what was read, and the score."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for (split, what), some in answers.items():
            for answer in some:
                line = {
                    "split": split,
                    "what": what,
                    "index": answer.item.index,
                    "text": answer.item.text,
                    "read": [_seen(detection) for detection in answer.detections],
                    "score": asdict(answer.score),
                }
                file.write(json.dumps(line) + "\n")


def _seen(detection: Detection) -> dict[str, Any]:
    names = ("known", "shape", "colour", "texture", "size")
    numbers = ("x", "y", "radius", "label_probability")
    told = {name: getattr(detection, name) for name in names} | {
        name: round(getattr(detection, name), 4) for name in numbers
    }
    return told | ({"holding": [_seen(one) for one in detection.holding]} if detection.holding else {})


def read_scores(folder: Path) -> dict[tuple[str, str], dict[str, Score]]:
    """(split, what) -> caption with its index -> score, of the folder of another result.

    Raises FileNotFoundError where there is none.
    """
    path = folder.expanduser() / READINGS
    if not path.is_file():
        raise FileNotFoundError(f"baseline: {path} is not there; give the folder of a result of imgtok evaluate shapes")
    found: dict[tuple[str, str], dict[str, Score]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        found.setdefault((told["split"], told["what"]), {})[key_of(told["index"], told["text"])] = Score(
            **told["score"]
        )
    return found


Seconds = dict[tuple[str, str], float]
"""(split, what) -> seconds of drawing an image."""


def read_seconds(folder: Path) -> Seconds:
    """What the report of a result says of the time; nothing where there is no report yet."""
    path = folder.expanduser() / REPORT
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(row["split"], row["what"]): row["seconds_an_image"] for row in rows if "seconds_an_image" in row}


def key_of(index: int, text: str) -> str:
    """What a caption is known by in two runs."""
    return f"{index} {text}"


READINGS, REPORT = "readings.jsonl", "report.json"


# ---------------------------------------------------------------- words


def in_words(facts: Iterable[ObjectFacts] | Facts) -> list[str]:
    """Objects in words, such as `large red circle`."""
    objects = facts.objects if isinstance(facts, Facts) else facts
    return [" ".join(filter(None, (one.size, one.texture, one.colour, one.shape))) for one in objects]


def read_in_words(answer: Answer) -> str:
    """What the oracle read, with the attributes that the caption speaks of."""
    asked = answer.item.facts.objects
    sizes, textures = any(one.size for one in asked), any(one.texture for one in asked)

    def words_of(one: Detection, textures: bool) -> str:
        if not one.known:
            return "something unknown"
        own = [*([one.size] if sizes else []), *([one.texture] if textures else []), one.colour, one.shape]
        return " holding ".join([" ".join(own), *(words_of(inner, False) for inner in one.holding)])

    words = [words_of(one, textures) for one in sorted(answer.detections, key=lambda one: (one.y > 0.5, one.x))]
    return ", ".join(words) or "nothing"


def percent(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{100 * value:.1f}"


def with_interval(name: str, interval: Interval) -> str:
    """`83.4 [80.1, 86.5]` in per cent; a number an image for `extra`."""
    if not math.isfinite(interval.value):
        return "-"
    if name == "extra":
        return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]"


def seconds_in_words(row: Row) -> str:
    """`0.123`, of an image."""
    return "-" if row.seconds is None else f"{row.seconds:.3f}"


def times_in_words(row: Row) -> str:
    """`x 1.70`, against the baseline."""
    if row.seconds is None or not row.seconds_of_baseline:
        return "-"
    return f"x {row.seconds / row.seconds_of_baseline:.2f}"


def shown_rates(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns of a table: those of what is held where anything was asked of it."""
    held = any(math.isfinite(row.rates["held_presence"].value) for row in rows)
    return (*SHOWN_RATES, *HELD_RATES) if held else SHOWN_RATES


def table(rows: Sequence[Row]) -> str:
    """The rows as text: rates in per cent with their 95 % intervals, extra objects an image, seconds an image."""
    shown = shown_rates(rows)
    lines = [["split", "images", "n", *(name.replace("_", " ") for name in shown), "seconds"]]
    for row in rows:
        cells = [with_interval(name, row.rates[name]) for name in shown]
        lines.append([row.split, row.what, str(row.images), *cells, seconds_in_words(row)])
        if row.differences is not None:
            told = [with_interval(name, row.differences[name]) for name in shown]
            lines.append(["", "  minus the baseline", "", *told, times_in_words(row)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


assert {*SHOWN_RATES, *HELD_RATES} <= RATES.keys()
