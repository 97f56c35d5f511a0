"""The page of a benchmark result: the table, and of each split pictures with what was asked and what was read."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from imgtok.sample.benchmark.results import (
    SHOWN_RATES,
    Answer,
    Row,
    read_in_words,
    seconds_in_words,
    shown_rates,
    times_in_words,
    with_interval,
)
from imgtok.sample.page import inline_thumbnail, notes_of, section, settings, write_html
from imgtok.shapes.intervals import Interval

SIDE = 128
"""Pixels a side, at most, of the pictures."""
STYLE = """
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.2rem,1fr));gap:.9rem .7rem;margin:1rem 0}
.answers figure{text-align:left} .answers figcaption b{font-weight:600} table.rates td{white-space:nowrap}
table.rates{font-size:.85rem;line-height:1.25} table.rates small{color:#777} .scroll{overflow-x:auto}
tr.minor td{color:#777} tr.difference td{color:#2a6f97;border-top-style:dotted}
""".strip()

INTRODUCTION = """<p>Each caption names one or more objects. The oracle reads an image back by comparing it with renders
of every shape, colour and texture; no network is involved. <b>presence</b>: objects named that are there.
<b>binding</b>: of those, the ones with all the attributes that the caption gives them. <b>leakage</b>: of those, the
ones in another named object's colour. <b>relation</b>: relations asserted that hold. <b>extra</b>: things in an image
that nobody asked for. <b>prompt</b>: images where everything asserted holds and nothing is extra. {held}In per cent
(extra: a number an image), with the middle 95 % of 1000 resamples of the captions below. Grey rows are no results: the
true images, which nothing can beat, and those of another scene, the floor.</p>"""
OF_HELD = """<b>held presence</b>: objects that others should hold and that are anywhere. <b>held binding</b>: of those,
the ones in their own holder with their own attributes. <b>held leakage</b>: holders that hold what another one should,
in whole or in part. """


@dataclass(frozen=True)
class Shown:
    """Pictures of one split, and of what kind."""

    title: str
    answers: Sequence[Answer]
    images: Tensor
    """(N, 3, H, W) uint8, those of the answers."""


def write(
    path: Path,
    title: str,
    lead: str,
    rows: Sequence[Row],
    shown: Sequence[Shown],
    notes: Sequence[str],
    made_of: Mapping[str, str],
    beside: str,
) -> Path:
    """Writes the page; `beside` says what lies beside it."""
    head = f"<h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>"
    parts = [
        head,
        notes_of(notes),
        INTRODUCTION.format(held=OF_HELD if len(shown_rates(rows)) > len(SHOWN_RATES) else ""),
        rates_table(rows),
        *(section(one.title, pictures(one)) for one in shown),
        section("What was run", settings(made_of, html.escape(beside))),
    ]
    return write_html(path, title, "".join(parts), STYLE)


def rates_table(rows: Sequence[Row]) -> str:
    """All rows; those that are no results are grey."""
    shown = shown_rates(rows)
    head = "".join(f"<th>{name.replace('_', ' ')}" for name in ("split", "images", "n", *shown, "seconds"))
    body = []
    for row in rows:
        cells = "".join(f"<td>{_cell(name, row.rates[name])}" for name in shown)
        kind = " class=minor" if row.what in REFERENCES else ""
        body.append(
            f"<tr{kind}><td>{html.escape(row.split)}<td class=left>{html.escape(row.what)}<td>{row.images}{cells}"
            f"<td>{seconds_in_words(row)}"
        )
        if row.differences is not None:
            told = "".join(f"<td>{_cell(name, row.differences[name])}" for name in shown)
            body.append(
                f"<tr class=difference><td><td class=left>minus the baseline<td>{told}<td>{times_in_words(row)}"
            )
    return f"<div class=scroll><table class=rates><tr>{head}{''.join(body)}</table></div>"


def _cell(name: str, interval: Interval) -> str:
    """A rate with its interval below."""
    value, _, ends = with_interval(name, interval).partition(" [")
    return f"{value}<br><small>{ends.removesuffix(']')}</small>" if ends else value


REFERENCES = ("true images", "another scene's")
"""Rows that are no results."""


def pictures(shown: Shown) -> str:
    """Pictures, under each the caption and what was read."""
    return f"<div class=answers>{''.join(map(_figure, shown.answers, shown.images))}</div>"


def _figure(answer: Answer, image: Tensor) -> str:
    kind = "right" if answer.score.prompt else "wrong"
    asked, read = html.escape(answer.item.text), html.escape(read_in_words(answer))
    picture = inline_thumbnail(image, SIDE, answer.item.text)
    return f"<figure>{picture}<figcaption>{asked}<br><span class={kind}>read: {read}</span></figcaption></figure>"
