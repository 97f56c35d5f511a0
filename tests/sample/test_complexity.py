"""`imgtok complexity`: counts, errors and order against a tokenizer whose numbers of tokens are right by definition."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import kinds
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from imgtok import hub
from imgtok.cli import main as command_line
from imgtok.config import PositiveInt, check
from imgtok.data.images import ImageFolderConfig, open_images
from imgtok.flow import OnStep
from imgtok.pictures import save_png
from imgtok.sample.complexity import job, page
from imgtok.sample.complexity.job import Config, main
from imgtok.sample.complexity.measuring import Measured, Request, measure, request_for
from imgtok.sample.complexity.summary import histogram, summarise
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import NoDecoding, Rate, Tokenizer
from imgtok.tokenizers.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class WavesConfig:
    """An image as its cosine waves."""

    kind: Literal["waves"] = "waves"
    image_size: PositiveInt = 16
    """Pixels a side."""
    budget: PositiveInt = 64
    """Waves at most."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def decoding(self) -> NoDecoding:
        return NoDecoding()


@functools.cache
def waves(side: int) -> Tensor:
    """(side^2, side^2): orthonormal cosine waves of an image, the longest first."""
    k, x = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    one = torch.cos(math.pi * (x + 0.5) * k / side) * math.sqrt(2 / side)
    one[0] /= math.sqrt(2)
    both = torch.einsum("ax,by->abxy", one, one).flatten(2).flatten(0, 1)
    order = (k**2 + k.T**2).flatten().argsort(stable=True)
    return both[order].float()


def errors_by_count(images: Tensor, most: int) -> Tensor:
    """(B, most): what is left of images with 1, 2, ... waves."""
    basis = waves(images.shape[-1])[:most]
    flat = images.flatten(2)
    parts = torch.einsum("kn,bcn->bkc", basis, flat)[..., None] * basis[:, None]
    return (parts.cumsum(dim=1).clamp(-1, 1) - flat[:, None]).abs().mean(dim=(2, 3)) / 2


class Waves(Tokenizer):
    """A token is a wave's height in each colour: of an image the first ones, as many as its error demands."""

    config_class: ClassVar[type] = WavesConfig
    fixed_length, vocab_size = False, 1  # type: ignore[assignment]

    def __init__(self, config: WavesConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(()))

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_tokens(self) -> int:
        return self.config.budget

    def rates(self) -> list[Rate]:
        return [Rate(1), Rate(self.config.budget), *(Rate(self.config.budget, eps) for eps in (0.2, 0.05, 0.1))]

    def check_rate(self, rate: Rate) -> None:
        if rate.num_tokens > self.num_tokens:
            raise ValueError(f"rates: at most {self.num_tokens} waves")

    @torch.no_grad()
    def encode(self, images: Tensor, *, rate: Rate | None = None) -> Tokens:
        rate = rate or Rate(self.num_tokens)
        basis = waves(self.image_size)[: rate.num_tokens]
        vectors = torch.einsum("kn,bcn->bkc", basis, images.flatten(2))
        lengths = torch.full((len(images),), rate.num_tokens)
        if rate.tolerance is not None:
            met = errors_by_count(images, rate.num_tokens) <= rate.tolerance
            lengths = torch.where(met.any(dim=1), met.int().argmax(dim=1) + 1, lengths)
        return Tokens(torch.zeros(vectors.shape[:2], dtype=torch.long), lengths, None, vectors).padded()

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        tokens = tokens.padded()
        assert tokens.vectors is not None
        basis = waves(self.image_size)[: tokens.ids.shape[1]]
        return torch.einsum("kn,bkc->bcn", basis, tokens.vectors).unflatten(2, (self.image_size,) * 2).clamp(-1, 1)


@pytest.fixture(autouse=True)
def known(monkeypatch) -> None:
    monkeypatch.setitem(hub.TOKENIZERS, "waves", f"{__name__}:Waves")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("waves")
    Waves(WavesConfig()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """24 pictures in two classes, ever more of whose pixels are noise."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        image = torch.full((3, 16, 16), 90 + 3 * number, dtype=torch.uint8)
        rows = number * 16 // 23
        image[:, :rows] = torch.randint(256, (3, rows, 16), dtype=torch.uint8, generator=generator)
        save_png(image, folder / ("plain", "rough")[number // 12] / f"{number:02d}.png")
    return folder


def run(model: Path, images: Path, out: Path, *words: str) -> int:
    return command_line(
        ["complexity", str(model), f"out={out}", "data.kind=folder", f"data.path={images}", "threads=1", *words]
    )


def table_of(out: Path) -> dict[str, list]:
    return pq.read_table(out / "complexity.parquet").to_pydict()


@pytest.fixture
def without_page(monkeypatch) -> None:
    """Diagrams take longer to draw than all else."""
    monkeypatch.setattr(page, "body", lambda *words: "")


@pytest.fixture(scope="module")
def report(model, images, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub.TOKENIZERS, "waves", f"{__name__}:Waves")
        out = tmp_path_factory.mktemp("report") / "out"
        assert run(model, images, out) == 0
    return out


# ---------------------------------------------------------------- what is measured


def test_every_image_has_a_row_with_its_tokens_and_errors(report, images):
    table = table_of(report)
    errors = [f"error_{eps}" for eps in ("0.05", "0.1", "0.2")] + [f"error_with_{k}" for k in (8, 16, 32, 64)]
    assert list(table) == ["image", "label", "kc_0.05", "kc_0.1", "kc_0.2", *errors, "delta"]
    assert [Path(name).stem for name in table["image"]] == [f"{number:02d}" for number in range(24)]
    assert table["label"] == ["plain"] * 12 + ["rough"] * 12
    source = open_images(data_of(images), 16, held_out_fraction=0.0)
    for row in (0, 7, 13, 23):
        by_count = errors_by_count(source.batch([row]).images, 64)[0].tolist()
        for eps in (0.05, 0.1, 0.2):
            needed = next((count for count, error in enumerate(by_count, start=1) if error <= eps), 64)
            assert table[f"kc_{eps:g}"][row] == needed
            assert table[f"error_{eps:g}"][row] == pytest.approx(by_count[needed - 1], abs=1e-6)
        for count in (8, 64):
            assert table[f"error_with_{count}"][row] == pytest.approx(by_count[count - 1], abs=1e-6)
        assert table["delta"][row] == pytest.approx(table["error_with_8"][row] - table["error_with_64"][row])


def data_of(images: Path) -> ImageFolderConfig:
    return ImageFolderConfig(path=images)


def test_the_record_says_what_the_rows_come_to(report, model):
    record, table = json.loads((report / "complexity.json").read_text()), table_of(report)
    assert record["model"]["path"] == str(model)
    assert (record["images"], record["budget"], record["eps"]) == (24, 64, [0.05, 0.1, 0.2])
    tokens = np.array(table["kc_0.1"])
    assert record["tokens"]["0.1"]["mean"] == pytest.approx(tokens.mean())
    assert record["tokens"]["0.1"]["percentiles"]["50"] == np.sort(tokens)[11]
    assert record["tokens"]["0.1"]["all_of_the_budget"] == (tokens == 64).mean()
    assert sum(record["histogram"]["images"]["0.1"]) == 24
    assert record["curve"]["fixed"][0] == {"tokens": 8, "error": pytest.approx(np.mean(table["error_with_8"]))}
    assert record["curve"]["adaptive"][1]["tokens"] == pytest.approx(tokens.mean())
    assert record["delta"]["counts"] == [8, 64]
    assert {Path(name).stem for name in record["simplest"][:2]} == {"00", "01"}
    assert Path(record["most_complex"][-1]).stem in ("21", "22", "23")


def test_how_well_a_request_is_met_is_counted_with_and_without_the_images_that_keep_every_token():
    request = Request(eps=(0.1,), budget=8, counts=(1, 8), errors=True)
    errors = np.array([0.05, 0.105, 0.125, 0.5, 0.09])
    found = Measured(
        request,
        np.arange(5),
        tuple("abcde"),
        None,
        {0.1: np.array([1, 2, 3, 8, 8])},
        {0.1: errors},
        {1: errors + 0.1, 8: np.array([0.01, 0.01, 0.01, 0.5, 0.09])},
    )
    met = summarise(found, 0.1)["met"]["by_eps"]["0.1"]
    assert met["dropped"]["images"] == 3
    assert met["dropped"]["above"] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0, 0, 0])
    assert met["dropped"]["mean_error_above"] == pytest.approx(0.115)
    assert met["all"]["above"] == pytest.approx([3 / 5, 2 / 5, 2 / 5, 1 / 5, 1 / 5, 1 / 5])
    assert met["out_of_reach"] == pytest.approx(1 / 5)
    # Equal at 8 tokens: the one on which 8 tokens leave more counts as more complex.
    assert found.order(0.1).tolist() == [0, 1, 2, 4, 3]


def test_equal_counts_are_told_apart_by_looser_eps():
    request = Request(eps=(0.1, 0.2), budget=8, counts=(), errors=False)
    tokens = {0.1: np.array([8, 8, 2]), 0.2: np.array([5, 3, 1])}
    found = Measured(request, np.arange(3), tuple("abc"), None, tokens, {}, {})
    assert found.order(0.1).tolist() == [2, 1, 0]
    assert found.most_telling == 0.1


@pytest.mark.parametrize("budget", [1, 6, 33, 256])
def test_the_bars_of_the_histogram_hold_every_image(budget):
    request = Request(eps=(0.1,), budget=budget, counts=(), errors=False)
    tokens = np.arange(1, budget + 1)
    found = Measured(request, tokens, ("",) * budget, None, {0.1: tokens}, {}, {})
    bars = histogram(found)
    assert len(bars["first"]) <= 33
    assert sum(bars["images"]["0.1"]) == budget
    assert bars["first"][-1] == budget + 1


# ---------------------------------------------------------------- independence


def test_the_batch_size_leaves_no_trace(model, images, report, tmp_path):
    again = [tmp_path / str(size) for size in (7, 1)]
    for out in again:
        assert run(model, images, out, f"batch_size={out.name}", "exact=true") == 0
    first, *others = [(out / "complexity.parquet").read_bytes() for out in again]
    assert others == [first]
    assert (again[0] / "index.html").read_text() == (again[1] / "index.html").read_text()
    assert table_of(again[0])["kc_0.1"] == table_of(report)["kc_0.1"]


def test_the_shares_of_processes_add_up(model, images):
    source, tokenizer = open_images(data_of(images), 16, held_out_fraction=0.0), Waves(WavesConfig())
    request = request_for(tokenizer, (), None, (), errors=True)
    places = list(range(0, 24, 2))

    def of(share: range):
        blocks = job.Blocks(torch.device("cpu"), exact=True)
        unreadable = job.UnreadableImages(24)
        return measure(
            tokenizer, source, places, share, request, seed=0, decoding=None, blocks=blocks, batch_size=4,
            unreadable=unreadable,
        )  # fmt: skip

    whole, parts = of(range(12)), [of(range(rank, 12, 2)) for rank in range(2)]
    assert torch.equal(whole.values, parts[0].values + parts[1].values)
    assert torch.equal(whole.filled, parts[0].filled + parts[1].filled)


def test_a_model_encodes_once_for_all_rates_and_decodes_only_for_errors(model, images, tmp_path, monkeypatch):
    calls: list[str] = []
    encode_at, decode = Waves.encode_at, Waves.decode
    monkeypatch.setattr(Waves, "encode_at", lambda self, *a: calls.append("encode") or encode_at(self, *a))
    monkeypatch.setattr(Waves, "decode", lambda self, *a, **k: calls.append("decode") or decode(self, *a, **k))
    assert run(model, images, tmp_path, "errors=false", "batch_size=12") == 0
    assert calls == ["encode", "encode"]
    assert list(table_of(tmp_path)) == ["image", "label", "kc_0.05", "kc_0.1", "kc_0.2"]
    text = (tmp_path / "index.html").read_text()
    assert "Structure, or noise?" not in text
    assert "How well the request is met" not in text


# ---------------------------------------------------------------- the page


def test_the_page_is_whole_and_loads_nothing(report):
    text = (report / "index.html").read_text()
    assert re.findall(r"""(?:src|href)=['"](?!data:|#)""", text.replace("xlink:href", "")) == []
    for title in ("What is measured", "How many images", "Structure, or noise?", "Error over tokens", "request is met"):
        assert title in text
    assert text.count("<svg") == 3
    assert "All images, the simplest first" in text
    assert "a request and no promise" in text


def test_a_long_list_is_cut_evenly_and_says_so(model, images, tmp_path):
    assert run(model, images, tmp_path, "shown=5") == 0
    text = (tmp_path / "index.html").read_text()
    assert "5 of the 24 images, evenly from all of them" in text
    count = 50_000
    request = Request(eps=(0.1,), budget=8, counts=(), errors=False)
    tokens = np.arange(count) % 8 + 1
    found = Measured(request, np.arange(count), ("",) * count, None, {0.1: tokens}, {}, {})
    choice = page.choose(found, 0.1, 400)
    assert len(choice.listed) == 400
    assert [len(choice.simplest), len(choice.most_complex), len(choice.steps)] == [10, 10, 11]
    assert {int(tokens[row]) for row in choice.listed} == set(range(1, 9))


@pytest.mark.parametrize("count", [1, 3])
def test_few_images_have_a_page_too(model, images, tmp_path, count):
    assert run(model, images, tmp_path, f"num={count}") == 0
    assert len(table_of(tmp_path)["image"]) == count


# ---------------------------------------------------------------- said, and refused


@pytest.mark.usefixtures("without_page")
def test_it_says_what_it_works_on_and_what_it_found(model, images, tmp_path, caplog):
    caplog.set_level("INFO", "imgtok")
    assert run(model, images, tmp_path, "eps=0.1,0.001", "num=8") == 0
    first = next(message for message in caplog.messages if message.startswith("complexity: data"))
    assert f"data: {images}: all 24 images" in first
    assert "num: 8; " in first
    assert "eps: 0.001,0.1, at most 64 tokens" in first
    assert any("eps 0.1:" in message and "tokens on average" in message for message in caplog.messages)
    assert "8 of 24 images, taken from all over them" in caplog.text
    assert "out of reach: all 64 tokens leave an error above eps = 0.001 on" in caplog.text
    assert caplog.messages[-1].startswith(f"written to {tmp_path}/index.html, ")


def test_unreadable_images_are_left_out_and_counted(model, images, tmp_path, monkeypatch):
    broken = tmp_path / "images"
    for path in images.rglob("*.png"):
        (broken / path.name).parent.mkdir(exist_ok=True)
        (broken / path.name).write_bytes(path.read_bytes() if path.stem != "05" else b"no image")
    monkeypatch.setattr("imgtok.data.loaders.max_unreadable", lambda length: 1)
    assert run(model, broken, tmp_path / "out") == 0
    assert len(table_of(tmp_path / "out")["image"]) == 23
    assert "1 of 24 images could not be read" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eps=-0.1"], "eps[0]: given -0.1"),
        (["eps=.inf"], "eps[0]: given inf"),
        (["budget=65"], "budget: this tokenizer has 1 to 64 tokens an image, given 65"),
        (["counts=0"], "counts[0]: given 0"),
        (["counts=8,99"], "counts: this tokenizer has 1 to 64 tokens an image, given 99"),
        (["counts=8", "errors=false"], "counts: their errors are what is measured"),
        (["sort_by=0.3"], "sort_by: 0.3 is none of the eps that are measured: 0.05,0.1,0.2"),
        (["num=25"], "num: 25 is more than the 24 images that there are"),
        (["data.path=nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(model, images, tmp_path, capsys, words, message):
    assert run(model, images, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_whose_images_choose_nothing_is_refused(images, tmp_path, capsys):
    kinds.build(kinds.LINES["flextok"]).save_pretrained(tmp_path / "fixed")
    assert run(tmp_path / "fixed", images, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "model: every image has as many tokens as it is told to with FlexTok" in error
    assert "imgtok evaluate tokenizer=MODEL" in error


@pytest.mark.usefixtures("without_page")
def test_the_report_of_another_request_stays(model, images, report, capsys):
    before = (report / "complexity.json").read_bytes()
    assert run(model, images, report, "eps=0.3") == 2
    assert f"out: {report} holds the report of another request (different: request)" in capsys.readouterr().err
    assert (report / "complexity.json").read_bytes() == before
    assert run(model, images, report, "batch_size=5") == 0
    (report / "complexity.json").rename(report / "kept.json")
    assert run(model, images, report) == 2
    (report / "kept.json").rename(report / "complexity.json")


@pytest.mark.usefixtures("without_page")
def test_a_small_model_of_the_suite_goes_through(tmp_path, caplog):
    caplog.set_level("INFO", "imgtok")
    kinds.build(kinds.LINES["karl"]).save_pretrained(tmp_path / "model")
    data = ShapesConfig(num_images=60)
    main(Config(model=str(tmp_path / "model"), out=tmp_path / "out", data=data, counts=(2, 8), eps=(0.05, 0.11)))
    table = table_of(tmp_path / "out")
    assert len(table["image"]) == 6
    assert all(1 <= count <= 8 for count in table["kc_0.05"])
    assert "error_with_2" in table
    assert "note: The model cannot be asked for every eps: 0.11 is asked for as 0.12." in caplog.messages
