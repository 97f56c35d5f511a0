"""Self-contained HTML pages: their style, and pictures and diagrams in the text. Nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from imgtok.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}
h1{margin-bottom:.2rem} h2{margin-top:2.4rem;border-bottom:1px solid #ddd} p.lead{color:#555;margin-top:0}
table{border-collapse:collapse;margin:1rem 0} td,th{border:1px solid #ddd;padding:.3rem .8rem;text-align:right}
td:first-child,th:first-child,td.left{text-align:left} th{background:#f6f6f6}
code,pre{background:#f6f6f6;padding:.1rem .3rem}
pre{padding:.8rem;overflow:auto} img{max-width:100%}
svg{max-width:100%;height:auto} td.left code{overflow-wrap:anywhere}
.samples{display:grid;grid-template-columns:repeat(8,1fr);gap:.5rem;font-size:.72rem;text-align:center;line-height:1.2}
.samples img{width:100%;image-rendering:pixelated} .wrong{color:#b00020;font-weight:600} .right{color:#1a7f37}
figure{margin:0;font-size:.72rem;line-height:1.25;text-align:center;min-width:0}
figure img{width:100%;display:block;margin-bottom:2px} img.small{image-rendering:pixelated}
.note{background:#fff6e0;border-left:4px solid #e0a81f;padding:.4rem .8rem} p.small,li{font-size:.92rem}
.chosen{background:#eef5f9} h3{margin:1.2rem 0 .2rem;font-size:1rem}
""".strip()
MAIN, OTHERS = "#2a6f97", ("#e07a1f", "#7a9e3f", "#9b5fb5", "#c0504d", "#7f7f7f")
"""Colours of diagrams."""
SMALL = 96
"""Pixels a side below which pictures are kept to the pixel."""


def write_html(path: Path, title: str, body: str, style: str = "") -> Path:
    """Writes a page; `style` comes after the common one."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    with replacing(path) as temporary:
        temporary.write_text(f"{head}<style>{STYLE}{style}</style>{body}</html>\n", encoding="utf-8")
    return path


def section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{body}"


def notes_of(notes: Sequence[str]) -> str:
    """What should be known before anything else is read."""
    return "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)


def settings(made_of: Mapping[str, str], beside: str) -> str:
    """A table of what a page was made of, and what lies beside it."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td class=left><code>{html.escape(value)}</code>"
        for name, value in made_of.items()
    )
    return f"<table>{rows}</table><p class=small>Beside this page: {beside}</p>"


def inline_png(image: Tensor) -> str:
    """A uint8 image (3, H, W) as an <img> element."""
    return _inline(_pillow(image), "png", "", alt="")


def inline_thumbnail(image: Tensor, side: int, title: str = "") -> str:
    """The same at most `side` pixels wide and high, larger ones as JPEG; small ones keep their pixels when enlarged.

    `title` is what a browser shows under the pointer.
    """
    picture = _pillow(image)
    if max(picture.size) < SMALL:
        return _inline(picture, "png", " class=small", alt=title)
    picture.thumbnail((side, side))
    return _inline(picture, "jpeg", "", alt=title)


def inline_file(path: Path) -> str:
    return f"<p><img src='data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}' alt='{path.stem}'></p>"


def diagram(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty diagram."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure, axis


def inline_svg(figure: Figure) -> str:
    """A diagram as an <svg> element; equal diagrams give equal text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "imgtok"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _pillow(image: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _inline(picture: Image.Image, kind: str, more: str, alt: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 85} if kind == "jpeg" else {}))
    told, data = html.escape(alt, quote=True), base64.b64encode(buffer.getvalue()).decode()
    title = f" title='{told}'" if alt else ""
    return f"<img src='data:image/{kind};base64,{data}' alt='{told}'{title}{more}>"
