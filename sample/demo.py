"""`imgtok demo`: a page in the browser that shows a model at work; also `app.py` of a folder, as a Space runs it.

    page = open_app("outputs/quickstart/generator/final")
    page.launch()

What the page shows is computed by the two classes below; gradio only lays it out.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import Range, check
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.generators.pipeline import DTYPES, Drawn, Pipeline, Precision, pipeline
from imgtok.hub import Found, load, resolve
from imgtok.pictures import preprocess, to_pil
from imgtok.sample.check import open_device
from imgtok.sizes import Size
from imgtok.tokenizers.base import Autoencoder, Rate, Tokenizer, powers_of_two
from imgtok.tokenizers.tokens import Tokens

POSITIONAL = "model"
LONE = 256
"""Pixels a side, at most, at which an autoencoder without a tokenizer is shown: it takes any."""
SHOWN = 512
"""Pixels a side, about, at which pictures are shown: small ones are enlarged, so that their pixels can be seen."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Opens a page in the browser: an image of your own at each number of tokens and, of a generator, new images.

    Needs gradio: pip install 'imgtok[demo]'.
    """

    job: Literal["demo"] = "demo"
    """Which program this file is for."""
    model: str
    """Folder or any other name of a model of any kind."""
    tokenizer: str | None = None
    """Of a generator: the tokenizer or autoencoder that decodes what it draws; null takes that in its folder."""
    device: str | None = None
    """Where to compute, such as cuda or cpu; null takes the accelerator that there is, or the CPU."""
    precision: Precision = "fp32"
    """Arithmetic of the networks."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines see the page."""
    port: Annotated[int, Range(0, 65535)] = 7860
    """Port of the page; 0 takes any that is free."""
    share: bool = False
    """Whether gradio gives the page a public address for a few days."""

    def __post_init__(self) -> None:
        check(self)


def main(config: Config) -> None:
    """Serves the page until it is interrupted."""
    layout = gradio()
    found = resolve(config.model)
    announce.begins("demo", model=found.in_words)
    page = open_app(found, tokenizer=config.tokenizer, device=config.device, precision=config.precision, layout=layout)
    page.launch(server_name=config.host, server_port=config.port or None, share=config.share)


def open_app(
    model: str | Path | Found,
    *,
    tokenizer: str | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    layout: Any = None,
) -> Any:
    """The page of a model, a `gradio.Blocks`. Raises ValueError where gradio is missing, and as `hub.resolve` does."""
    layout = layout or gradio()
    found, place = resolve(model), open_device(device)
    if not issubclass(found.model_class, ConditionalGenerator):
        if tokenizer is not None:
            raise ValueError(f"tokenizer: {found.name} is no generator and has none; leave tokenizer out")
        return laid_out(layout, found, Rebuilding(load(found, map_location=place), precision), None)
    pipe = pipeline(found, tokenizer=tokenizer, device=place, dtype=precision)
    return laid_out(layout, found, Rebuilding(pipe.decoder, precision), Drawing(pipe))


def gradio() -> Any:
    """The library. Raises ValueError where it is missing."""
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ValueError(f"demo needs {error.name}; install it: pip install 'imgtok[demo]'") from error


# ---------------------------------------------------------------- what is computed


class Rebuilding:
    """A picture after encoding and decoding it, at each rate that a tokenizer has; an autoencoder has none."""

    def __init__(self, model: Tokenizer | Autoencoder, precision: Precision = "fp32") -> None:
        self.model = model.eval()
        self.dtype = DTYPES[precision]
        self.rates: list[Rate] = model.rates() if isinstance(model, Tokenizer) else []
        self.size: Size = (
            model.image_size if isinstance(model, Tokenizer) else LONE // model.config.factor * model.config.factor
        )

    def encode(self, picture: Image.Image | None) -> list[Any]:
        """What the picture is encoded to at each rate, the centre of it; nothing for None."""
        if picture is None:
            return []
        images = preprocess([picture], self.size).to(self.model.device)
        with torch.no_grad(), self._arithmetic():
            if isinstance(self.model, Tokenizer):
                return list(self.model.encode_at(images, self.rates))
            return [self.model.encode(images)]

    def at(self, encoded: list[Any], place: int, seed: int = 0) -> tuple[Image.Image | None, str]:
        """The picture at rate number `place`, enlarged, and what it costs."""
        if not encoded:
            return None, ""
        given: Any = encoded[int(place)]
        with torch.no_grad(), self._arithmetic():
            images = self.model.decode(given, seed=int(seed))
        return enlarged(to_pil(images.float().clamp(-1, 1))[0]), self.in_words(given, int(place))

    def in_words(self, encoded: Any, place: int) -> str:
        """What a picture costs at a rate."""
        if not isinstance(encoded, Tokens):
            return f"{' x '.join(map(str, encoded.shape[1:]))} numbers"
        rate, count = self.rates[place], int(encoded.lengths[0])
        asked = "" if rate.tolerance is None else f" (asked for: {rate})"
        assert isinstance(self.model, Tokenizer)
        return f"{count} token{'s'[: count != 1]}, {float(self.model.bits(encoded)[0]):,.0f} bits{asked}"

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Drawing:
    """New images of a generator and, where one draw can be decoded at several numbers of tokens, each of those."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        counts = pipe.generator.rates()
        ordered = [count for count in powers_of_two(max(counts, default=1)) if count in counts]
        self.counts: list[int] = ordered if len(ordered) > 1 and self._any_prefix(ordered) else []

    def _any_prefix(self, counts: list[int]) -> bool:
        """Whether the decoder decodes the first tokens alone."""
        decoder = self.pipe.decoder
        return isinstance(decoder, Tokenizer) and set(counts) <= {rate.num_tokens for rate in decoder.rates()}

    def choices(self) -> list[tuple[str, int]]:
        """The classes by name, or by number where they have none; () of a generator that reads text."""
        names = self.pipe.class_names or [str(number) for number in range(self.pipe.num_classes)]
        return [(name, number) for number, name in enumerate(names)]

    def draw(self, subject: int | str, seed: int) -> Drawn:
        """What is drawn for a class or a prompt."""
        asked = {"prompts": str(subject)} if self.pipe.reads_text else {"classes": int(subject)}
        draw: Callable[..., Drawn] = self.pipe.tokens if self.pipe.draws_tokens else self.pipe.latents
        return draw(**asked, seed=int(seed), progress=False)

    def at(self, drawn: Drawn | None, place: int, seed: int) -> tuple[Image.Image | None, str]:
        """The image of the first tokens, as many as number `place` says, enlarged, and how many they are."""
        if drawn is None:
            return None, ""
        said = "" if isinstance(drawn, Tensor) else f"{int(drawn.lengths[0])} tokens"
        if self.counts:
            count = self.counts[int(place)]
            drawn, said = cast(Tokens, drawn).truncate(count), f"{count} token{'s'[: count != 1]}"
        return enlarged(self.pipe.decode(drawn, seed=int(seed), progress=False)[0]), said


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture at a size that can be looked at, each pixel a square."""
    factor = max(1, SHOWN // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


# ---------------------------------------------------------------- how it is laid out


def laid_out(gr: Any, found: Found, rebuilding: Rebuilding, drawing: Drawing | None) -> Any:
    """The page."""

    def told(call: Callable[..., Any]) -> Callable[..., Any]:
        """A user's mistake as a message on the page."""

        @functools.wraps(call)  # programs that use the page know a function by its name
        def safe(*given: Any) -> Any:
            try:
                return call(*given)
            except (ValueError, OSError) as error:
                raise gr.Error(str(error)) from error

        return safe

    names = [type(model).__name__ for model in (drawing and drawing.pipe.generator, rebuilding.model) if model]
    steps = "" if found.step is None else f", after {found.step} steps of training"
    with gr.Blocks(title=f"imgtok: {' over '.join(names)}") as page:
        gr.Markdown(f"# {' over '.join(names)}\nimgtok{steps}")
        if drawing is not None:
            with gr.Tab("New images"):
                _drawing_tab(gr, drawing, told)
        with gr.Tab("Your own image"):
            _rebuilding_tab(gr, rebuilding, told)
    return page


def _rebuilding_tab(gr: Any, rebuilding: Rebuilding, told: Callable[..., Any]) -> None:
    last, listed = max(0, len(rebuilding.rates) - 1), ", ".join(map(str, rebuilding.rates))
    with gr.Row():
        given = gr.Image(type="pil", label="your image", sources=["upload", "clipboard"], height=512, elem_id="given")
        shown = gr.Image(type="pil", label="what is left of it", format="png", interactive=False, elem_id="rebuilt")
    label = f"tokens, from few to all: {listed}"
    place = gr.Slider(0, max(1, last), value=last, step=1, label=label, visible=last > 0, elem_id="rate")
    cost, encoded = gr.Markdown(elem_id="cost"), gr.State([])
    show = (told(rebuilding.at), [encoded, place], [shown, cost])
    given.change(told(rebuilding.encode), [given], [encoded]).success(*show)
    place.change(*show)


def _drawing_tab(gr: Any, drawing: Drawing, told: Callable[..., Any]) -> None:
    last, listed = max(0, len(drawing.counts) - 1), ", ".join(map(str, drawing.counts))
    with gr.Row():
        with gr.Column():
            if drawing.pipe.reads_text:
                subject = gr.Textbox(label="prompt", elem_id="subject")
            else:
                subject = gr.Dropdown(drawing.choices(), value=0, label="class", elem_id="subject")
            seed = gr.Number(0, label="seed", precision=0, minimum=0, elem_id="seed")
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        shown = gr.Image(type="pil", label="image", format="png", interactive=False, elem_id="drawn")
    label = f"tokens, from few to all: {listed}"
    place = gr.Slider(0, max(1, last), value=last, step=1, label=label, visible=last > 0, elem_id="count")
    said, drawn = gr.Markdown(elem_id="said"), gr.State(None)
    show = (told(drawing.at), [drawn, place, seed], [shown, said])
    button.click(told(drawing.draw), [subject, seed], [drawn]).success(*show)
    place.change(*show)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
