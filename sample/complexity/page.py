"""The page: what was measured in words, the diagrams, and images from the simplest to the most complex.

Which images are shown is `choose`; their pictures are made by the job, of these alone, since there may be many images.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imgtok.sample.complexity import figures
from imgtok.sample.complexity.measuring import Measured
from imgtok.sample.complexity.summary import text
from imgtok.sample.page import notes_of, section, settings
from imgtok.tokenizers.base import Rate

ENDS, STEPS = 10, 11
"""Images at either end; and between them, ends included."""
LARGE, SMALL = 192, 64
"""Pixels a side of a picture, at most: of those at the top, and of the list."""
BANDS = 8
"""Parts of the list, by number of tokens."""
CORNERS = {"A": (0.0, 0.0), "B": (1.0, 0.0), "C": (1.0, 1.0), "D": (0.5, 0.5), "E": (0.0, 1.0)}
"""Which images the letters of the diagram stand for: those nearest to these places, from the least to the largest
number of tokens and delta."""

STYLE = """
.row{display:grid;grid-template-columns:repeat(10,1fr);gap:.45rem;margin:.6rem 0}
.steps{grid-template-columns:repeat(11,1fr)} .letters{grid-template-columns:repeat(5,1fr);gap:1rem}
.letters div{display:grid;grid-template-columns:repeat(3,1fr);gap:2px}
.list{display:grid;grid-template-columns:repeat(auto-fill,minmax(4rem,1fr));gap:.35rem}
@media(max-width:48rem){.row{grid-template-columns:repeat(5,1fr)} .letters{grid-template-columns:1fr 1fr}}
"""
BESIDE = "<code>complexity.json</code>, what is said here in numbers; <code>complexity.parquet</code>, a row an image."


@dataclass(frozen=True)
class Choice:
    """Rows of the images that are shown."""

    order: np.ndarray
    """(N,) all rows, the simplest first."""
    simplest: list[int]
    most_complex: list[int]
    """The most complex one last."""
    steps: list[int]
    """Evenly through the order."""
    letters: dict[str, int]
    """Letters in the diagram of delta; none where this was not measured."""
    listed: list[int]
    """Those of the list, in order."""

    @property
    def large(self) -> list[int]:
        """Those that are shown large."""
        return list(dict.fromkeys([*self.simplest, *self.most_complex, *self.steps, *self.letters.values()]))


def choose(found: Measured, at: float, listed: int) -> Choice:
    """What is shown of all images, of which the list has `listed`."""
    order, count = found.order(at), len(found)
    ends = min(ENDS, count // 2) or count
    steps = order[_evenly(count, STEPS)].tolist()
    return Choice(
        order=order,
        simplest=order[:ends].tolist(),
        most_complex=order[max(ends, count - ends) :].tolist(),
        steps=steps,
        letters=_letters(found, at),
        listed=order[_evenly(count, listed)].tolist(),
    )


def _evenly(count: int, num: int) -> np.ndarray:
    """Up to `num` places of `count`, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(num, count)).round().astype(np.int64))


def _letters(found: Measured, at: float) -> dict[str, int]:
    if (gain := found.gain) is None:
        return {}
    tokens, height = (_from_0_to_1(values.astype(np.float64)) for values in (found.tokens[at], gain))
    letters: dict[str, int] = {}
    for letter, (x, y) in CORNERS.items():
        distances = np.hypot(tokens - x, height - y)
        distances[list(letters.values())] = np.inf
        if len(letters) < len(found):
            letters[letter] = int(distances.argmin())
    return letters


def _from_0_to_1(values: np.ndarray) -> np.ndarray:
    """Scaled so that all but the outermost hundredth on either side lie between."""
    low, high = np.percentile(values, (1, 99))
    scaled: np.ndarray = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return scaled


@dataclass
class Pictures:
    """<img> elements by row."""

    large: dict[int, str] = field(default_factory=dict)
    small: dict[int, str] = field(default_factory=dict)
    decoded: dict[tuple[int, Rate], str] = field(default_factory=dict)
    """What the tokenizer makes of an image at a rate; none without errors, where nothing is decoded."""


@dataclass(frozen=True)
class About:
    """What the page says of itself, in words."""

    model: str
    data: str
    notes: Sequence[str]
    """What should be known before anything else is read."""
    made_of: Mapping[str, str]
    """The settings."""


def body(found: Measured, summary: Mapping[str, Any], choice: Choice, pictures: Pictures, about: About) -> str:
    """All sections."""
    at = summary["sorted_by"]
    request = found.request
    parts = [
        f"<h1>How complex are these images?</h1><p class=lead>{len(found):,} images ({html.escape(about.data)}), by "
        f"the tokens that {html.escape(about.model)} needs for each.</p>",
        notes_of(about.notes),
        counts_table(found, summary),
        section("What is measured", explanation(found, about.model)),
        section("How many images need how many tokens", figures.histogram(summary)),
        section(f"The simplest images, and the most complex, at eps = {text(at)}", ends(found, at, choice, pictures)),
        section("From the simplest to the most complex", steps(found, at, choice, pictures)),
    ]
    if found.gain is not None:
        parts.append(section("Structure, or noise?", structure(found, at, choice, pictures)))
    if request.errors:
        parts.append(section("Error over tokens", curve(found, summary)))
        parts.append(section("How well the request is met", met(found, summary)))
    parts.append(section("More of the images", listing(found, at, choice, pictures)))
    parts.append(section("How this was made", settings(about.made_of, BESIDE)))
    return "".join(parts)


# ---------------------------------------------------------------- numbers and words


def explanation(found: Measured, model: str) -> str:
    """What the numbers are, and what they are not."""
    budget = found.request.budget
    table = ", and a table below says how many" if found.request.errors else ""
    return f"""<p>{html.escape(model)} writes an image as 1 to {budget} tokens, and it decides how many. It is told how
large an error may remain: <b>eps</b>, the mean absolute difference between the pixels of the image and of what is
decoded from its tokens, where 0 is the same picture and 1 is white in place of black. The number of tokens that it
keeps is the image's complexity to this model, written <b>KC(eps)</b>: plain surfaces need few, fine texture many.</p>
<p><b>Read with care.</b> eps is an error of pixels and not of looks: a smooth image meets it with a few tokens and may
still look blurred, while noise may not meet it with any number. eps is also a request and no promise: some images
exceed it, more often where eps is loose{table}. Which tokens an image keeps differs too: they need not be the first
ones. And complexity is counted by one model: what it was not trained on costs more tokens than it would cost
another.</p>"""


def counts_table(found: Measured, summary: Mapping[str, Any]) -> str:
    """A row an eps."""
    budget, errors = found.request.budget, found.request.errors
    head = f"<th>eps<th>tokens, mean<th>median<th>10 % have at most<th>90 % have at most<th>all {budget} tokens"
    rows = []
    for eps in found.request.eps:
        told = summary["tokens"][text(eps)]
        percent = told["percentiles"]
        chosen = " class=chosen" if eps == summary["sorted_by"] else ""
        error = f"<td>{summary['error'][text(eps)]:.4f}" if errors else ""
        rows.append(
            f"<tr{chosen}><td>{text(eps)}<td>{told['mean']:.1f}<td>{percent['50']}<td>{percent['10']}<td>{percent['90']}"
            f"<td>{share(told['all_of_the_budget'])}{error}"
        )
    return f"<table><tr>{head}{'<th>error, mean' if errors else ''}{''.join(rows)}</table>"


def share(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.1f} %"


def tokens_in_words(count: int) -> str:
    return f"{count} token{'s'[: count != 1]}"


# ---------------------------------------------------------------- pictures


def ends(found: Measured, at: float, choice: Choice, pictures: Pictures) -> str:
    """Both rows, each image above what is left of it."""
    below = " Below each, what is decoded from its tokens, and the error." if found.request.errors else ""
    ties = (
        "Of images with the same number, those that need more at another eps, the loosest first, count as more complex"
    )
    ties += ", then those on which a larger error remains with all tokens." if found.request.errors else "."
    rows = "".join(
        f"<h3>{title}</h3><div class=row>{''.join(_cell(found, at, row, pictures) for row in chosen)}</div>"
        for title, chosen in (
            (f"The {len(choice.simplest)} simplest", choice.simplest),
            (f"The {len(choice.most_complex)} most complex", choice.most_complex),
        )
        if chosen
    )
    return f"<p>Under each image, how many tokens it needs.{below} {ties}</p>{rows}"


def steps(found: Measured, at: float, choice: Choice, pictures: Pictures) -> str:
    """Images at equal steps through the order."""
    cells = []
    for place, row in enumerate(choice.steps):
        percent = 100 * place / max(1, len(choice.steps) - 1)
        cells.append(_cell(found, at, row, pictures, f"<b>{percent:.0f} %</b><br>"))
    return (
        "<p>Images at equal steps through all of them. The percentage is the share of the images that are "
        f"simpler.</p><div class='row steps'>{''.join(cells)}</div>"
    )


def _cell(found: Measured, at: float, row: int, pictures: Pictures, before: str = "") -> str:
    count = int(found.tokens[at][row])
    error = f"<br>error {found.errors[at][row]:.3f}" if found.request.errors else ""
    label = f"<br>{html.escape(_label(found.labels[row]))}" if found.labels is not None else ""
    decoded = pictures.decoded.get((row, Rate(found.request.budget, at)), "")
    caption = f"{before}{tokens_in_words(count)}{error}{label}"
    return f"<figure>{pictures.large[row]}{decoded}<figcaption>{caption}</figcaption></figure>"


def _label(name: str) -> str:
    return f"class {name}" if name.isdecimal() else name


def structure(found: Measured, at: float, choice: Choice, pictures: Pictures) -> str:
    """The diagram of delta, and the images of its letters."""
    fewest, most = min(found.fixed), max(found.fixed)
    gain = found.gain
    assert gain is not None
    cells = []
    for letter, row in choice.letters.items():
        shown = [pictures.large[row], *(pictures.decoded[row, Rate(count)] for count in (fewest, most))]
        count = int(found.tokens[at][row])
        cells.append(
            f"<figure><div>{''.join(shown)}</div><figcaption><b>{letter}</b> {tokens_in_words(count)}, "
            f"delta {gain[row]:.3f}</figcaption></figure>"
        )
    return f"""<p>Two kinds of images need many tokens. Where there is <b>structure</b>, more tokens make the picture
better: its error with {tokens_in_words(fewest)} is far above its error with {most}, and the difference, delta, is
large. <b>Noise</b> takes all tokens, and they are good for next to nothing: delta is small. So dots at the upper right
are images with much structure, those at the lower right noise to this model, and those at the lower left are simple:
{tokens_in_words(fewest)} were enough. Delta points to structure; it does not measure it.</p>
{figures.gain_over_tokens(found, at, choice.letters)}
<div class='row letters'>{"".join(cells)}</div>
<p class=small>The images of the letters, each with what is decoded from {fewest} and from {most} tokens.</p>"""


def listing(found: Measured, at: float, choice: Choice, pictures: Pictures) -> str:
    """Images of the whole range, in parts by their numbers of tokens."""
    budget = found.request.budget
    width = -(-budget // BANDS)
    parts = []
    for first in range(1, budget + 1, width):
        last = min(budget, first + width - 1)
        rows = [row for row in choice.listed if first <= found.tokens[at][row] <= last]
        images = int(((found.tokens[at] >= first) & (found.tokens[at] <= last)).sum())
        if rows:
            some = "" if len(rows) == images else f", of which {len(rows):,} are shown"
            cells = "".join(
                f"<figure>{pictures.small[row]}<figcaption>{found.tokens[at][row]}</figcaption></figure>"
                for row in rows
            )
            span = str(first) if first == last else f"{first} to {last}"
            title = f"{span} token{'s'[: last > 1]}: {images:,} image{'s'[: images != 1]}{some}"
            parts.append(f"<h3>{title}</h3><div class=list>{cells}</div>")
    shown, every = len(choice.listed), len(found)
    told = "All images" if shown == every else f"{shown:,} of the {every:,} images, evenly from all of them"
    return (
        f"<p>{told}, the simplest first; under each its number of tokens at eps = {text(at)}. The name is shown under "
        "the pointer. Numbers and names of all images are in <code>complexity.parquet</code>.</p>"
        f"<details><summary>Show {shown:,} images</summary>{''.join(parts)}</details>"
    )


# ---------------------------------------------------------------- errors


def curve(found: Measured, summary: Mapping[str, Any]) -> str:
    """The rate-distortion curve."""
    fixed = "".join(
        f"<tr><td>{point['tokens']} for every image<td>{point['tokens']}<td>{point['error']:.4f}"
        for point in summary["curve"]["fixed"]
    )
    adaptive = "".join(
        f"<tr><td>as each needs, eps = {text(point['eps'])}<td>{point['tokens']:.1f}<td>{point['error']:.4f}"
        for point in summary["curve"]["adaptive"]
    )
    return (
        "<p>What tokens are good for, as means of all images. A square below the line means that tokens are better "
        "spent where they are needed than given out evenly; what eps was asked for stands beside it.</p>"
        f"{figures.error_over_tokens(summary)}<table><tr><th>tokens<th>mean<th>error, mean{fixed}{adaptive}</table>"
    )


def met(found: Measured, summary: Mapping[str, Any]) -> str:
    """How often the error is larger than allowed."""
    margins = summary["met"]["margins"]
    by_eps = summary["met"]["by_eps"]
    budget = found.request.budget
    head = "".join(f"<th>by more than {margin:g}" for margin in margins[1:])
    tables = []
    for key, title in (
        ("dropped", f"Images that keep fewer than all {budget} tokens, since the model says that these are enough"),
        ("all", "All images, those too that keep every token and do not reach eps"),
    ):
        rows = []
        for eps in found.request.eps:
            told = by_eps[text(eps)][key]
            mean = told["mean_error_above"]
            cells = "".join(f"<td>{share(part)}" for part in told["above"])
            rows.append(f"<tr><td>{text(eps)}<td>{told['images']:,}{cells}<td>{'–' if mean is None else f'{mean:.3f}'}")
        tables.append(
            f"<h3>{title}</h3><table><tr><th>eps<th>images<th>above eps{head}<th>their mean error"
            f"{''.join(rows)}</table>"
        )
    reach = ""
    if (parts := {eps: by_eps[text(eps)]["out_of_reach"] for eps in found.request.eps}) and None not in parts.values():
        told = "; ".join(f"eps = {text(eps)}: {share(part)}" for eps, part in parts.items())
        reach = f"<p>Images on which all {budget} tokens leave more than eps, so that no number would do: {told}.</p>"
    return (
        "<p>The share of the images whose error exceeds the eps that was asked for. The last column is the mean error "
        f"of the images above eps.</p>{''.join(tables)}{reach}"
    )
