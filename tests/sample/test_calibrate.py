"""`imgtok calibrate`: what it measures against an autoencoder whose latents are the pixels themselves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import kinds
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from imgtok import config, hub
from imgtok.cli import main as command_line
from imgtok.config import PositiveFloat, check
from imgtok.data.images import ImageFolderConfig, open_images
from imgtok.metrics.accumulate import Rows
from imgtok.metrics.reconstruction import psnr
from imgtok.pictures import save_png, to_uint8
from imgtok.quantizers.normal import NormalConfig, NormalQuantizer
from imgtok.sample.calibrate import job, page
from imgtok.sample.calibrate.measuring import (
    Channel,
    Latents,
    curve_of,
    encode,
    order_of,
    rounding_of,
)
from imgtok.tokenizers.base import Autoencoder, NoDecoding
from imgtok.train.generator import Config as GeneratorConfig
from imgtok.train.tokenizer import Config as TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """Pixels in place of latents."""

    kind: Literal["pixels"] = "pixels"
    scaling_factor: PositiveFloat = 2.0
    """Multiplies latents."""
    latent_channels: ClassVar[int] = 12
    factor: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check(self)

    @property
    def decoding(self) -> NoDecoding:
        return NoDecoding()


class Pixels(Autoencoder):
    """A cell is the four pixels in it, in three colours; of their distributions the deviation is a hundredth."""

    config_class: ClassVar[type] = PixelsConfig
    spoilt = 0.0

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(()))

    def moments(self, images: Tensor) -> Tensor:
        mean = F.pixel_unshuffle(images, 2) + self.spoilt
        return torch.cat([mean, torch.full_like(mean, 2 * math.log(0.01))], dim=1)

    def decode(self, latents: Tensor, *, seed: int = 0, indices: Sequence[int] | None = None, **how: Any) -> Tensor:
        return F.pixel_shuffle(latents / self.config.scaling_factor, 2)


@pytest.fixture(autouse=True)
def known(monkeypatch) -> None:
    monkeypatch.setitem(hub.AUTOENCODERS, "pixels", f"{__name__}:Pixels")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    Pixels(PixelsConfig()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """20 pictures, smooth from left to right, with a little noise."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-60, 60, 16).expand(3, 16, 16)
    for number in range(20):
        noise = 25 * torch.randn(3, 16, 16, generator=generator)
        save_png((128 + ramp * (-1) ** number + noise).clamp(0, 255).to(torch.uint8), folder / f"{number:02d}.png")
    return folder


def run(model: Path, images: Path, out: Path, *words: str) -> int:
    return command_line(
        [
            "calibrate", str(model), f"out={out}", "data.kind=folder", f"data.path={images}", "image_size=16",
            "threads=1", *words,
        ]
    )  # fmt: skip


@pytest.fixture
def without_page(monkeypatch) -> None:
    """Diagrams take longer to draw than all else."""
    monkeypatch.setattr(page, "body", lambda *words: "")


@pytest.fixture(scope="module")
def report(model, images, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub.AUTOENCODERS, "pixels", f"{__name__}:Pixels")
        out = tmp_path_factory.mktemp("report") / "out"
        assert run(model, images, out, "num_decoded=8") == 0
    return out


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "calibration.json").read_text())


def pixels_of(images: Path, rows: Sequence[int]) -> Tensor:
    return open_images(ImageFolderConfig(path=images), 16, held_out_fraction=0.0).batch(list(rows)).images


# ---------------------------------------------------------------- what is measured


def test_the_record_says_how_the_latents_are_distributed(report, images):
    record, x = record_of(report), 2 * F.pixel_unshuffle(pixels_of(images, range(20)), 2)
    assert record["shape"] == [12, 8, 8]
    assert record["scaling_factor"] == 2.0
    assert record["deviation"] == pytest.approx(float(x.std()), rel=0.01)
    assert record["extremes"] == pytest.approx([float(x.min()), float(x.max())], abs=0.1)
    for number, channel in enumerate(record["channels"]):
        assert channel["mean"] == pytest.approx(float(x[:, number].mean()), abs=0.003)
        assert channel["deviation"] == pytest.approx(float(x[:, number].std()), rel=0.02)
        assert channel["noise"] == pytest.approx(0.02)
    assert sorted(record["channel_order"]) == list(range(12))


def test_images_are_scored_after_rounding_and_without(report, images):
    rows = [row * 20 // 8 for row in range(8)]
    pixels = pixels_of(images, rows)
    record, originals = record_of(report), to_uint8(pixels)
    assert record["continuous"]["psnr"] == 100.0
    counted = {}
    for told in record["settings"]:
        setting = NormalConfig(**{**told["quantizer"], "range": tuple(told["quantizer"]["range"])})
        latents = F.pixel_unshuffle(pixels, 2) * 2
        decoded = F.pixel_shuffle(NormalQuantizer(setting)(latents)[0] / 2, 2)
        counted[setting] = float(psnr(to_uint8(decoded), originals).mean())
        assert told["psnr"] == pytest.approx(counted[setting], abs=1e-3)
    chosen = NormalConfig(levels=64, range=tuple(record["quantizer"]["range"]))
    assert {setting.levels for setting in counted} == {8, 16, 32, 64}
    shares = [setting.range[1] / chosen.range[1] for setting in counted if setting.levels == 64]
    assert sorted({*shares}) == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.2, 1.4])
    assert counted[chosen] > max(score for setting, score in counted.items() if setting.levels < 64)


def test_channels_with_low_frequencies_come_first():
    channels = [Channel(0.0, 1.0, -3.0, 3.0, 0.1, share) for share in (0.0, 1.0, 0.5, 1.0)]
    assert order_of(channels) == (1, 3, 2, 0)


def test_rounding_of_unit_normals_is_what_is_known_of_it():
    """Section 2.5 of our specification."""
    x = torch.randn(40, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    for levels, error, bits in ((16, 1.03e-2, 3.72), (64, 6.5e-4, 5.72)):
        found = rounding_of(x, NormalConfig(levels=levels))
        assert found.error == pytest.approx(error, rel=0.05)
        assert found.bits == pytest.approx(bits, abs=0.02)
    assert found.reach == pytest.approx((-4.0618, 4.0618), abs=1e-3)
    assert sum(rounding_of(x, NormalConfig(range=(-2.0, 2.0))).beyond) / 4 == pytest.approx(0.104, abs=0.01)  # 1.6247
    curve = curve_of(x, NormalConfig())
    at = curve.ranges.index(5.0)
    assert curve.errors[at] == pytest.approx(6.5e-4, rel=0.05)
    assert 4.75 <= curve.best <= 5.25  # as published
    assert curve_of(x * 8, NormalConfig()).best == 8 * curve.best


@pytest.mark.usefixtures("without_page")
def test_a_channel_of_its_own_scale_has_levels_of_its_own(model, images, tmp_path):
    assert run(model, images, tmp_path, "per_channel=true", "num_decoded=4", "levels=64") == 0
    record, told = record_of(tmp_path), yaml.safe_load((tmp_path / "calibration.yaml").read_text())
    quantizer = told["model"]["quantizer"]
    assert quantizer["means"] == pytest.approx([c["mean"] for c in record["channels"]])
    assert quantizer["deviations"] == pytest.approx([c["deviation"] for c in record["channels"]])
    assert record["quantizer"]["range"][1] == pytest.approx(5.0, abs=1.0)  # of a unit normal, nearly


@pytest.mark.parametrize("kind", hub.AUTOENCODERS)
def test_any_autoencoder_is_measured(kind, images, tmp_path, without_page):
    line = next(line for line in kinds.LINES.values() if line.config.kind == kind)
    kinds.build(line).save_pretrained(tmp_path / "model")
    words = ("num=4", "num_decoded=2", "levels=8,64", "ranges=3", "vae_scaling_factor=measured")
    assert run(tmp_path / "model", images, tmp_path / "out", *words) == 0
    record = record_of(tmp_path / "out")
    assert record["deviation"] == pytest.approx(1.0, abs=0.01)
    assert len(record["channels"]) == line.config.latent_channels
    lost = {
        told["quantizer"]["levels"]: told["error"] for told in record["settings"] if told["quantizer"]["range"][1] != 3
    }
    assert lost[64] < lost[8]


# ---------------------------------------------------------------- what is written


def test_the_settings_are_laid_over_a_generator_and_a_tokenizer(report):
    record = record_of(report)
    bases = {GeneratorConfig: "tiny/tokenbridge.yaml", TokenizerConfig: "tokenizer/tokenbridge-shapes.yaml"}
    for kind, base in bases.items():
        path = Path(__file__).parents[2] / "configs" / base
        made = config.load(kind, [path, report / "calibration.yaml"])
        assert made.vae_scaling_factor == record["scaling_factor"]
        section = yaml.safe_load(config.to_yaml(made))["model"]
        assert section["kind"] == config.read_yaml(path)["model"]["kind"]
        assert section["channel_order"] == record["channel_order"]
        assert section["quantizer"]["levels"] == 64
        assert section["quantizer"]["range"] == record["quantizer"]["range"]


def test_the_page_is_whole_and_loads_nothing(report):
    text = (report / "index.html").read_text()
    assert re.findall(r"""(?:src|href)=['"](?!data:|#)""", text.replace("xlink:href", "")) == []
    for title in ("The settings", "The numbers of the latents", "The channels", "How many levels", "How wide a range"):
        assert title in text
    assert text.count("<svg") == 4
    assert "vae_scaling_factor: 2.0" in text
    assert "not rounded" in text


@pytest.mark.usefixtures("without_page")
def test_a_measured_factor_makes_the_deviation_one(model, images, tmp_path, caplog):
    caplog.set_level("INFO", "imgtok")
    assert run(model, images, tmp_path / "own", "num=12", "num_decoded=4") == 0
    own = record_of(tmp_path / "own")
    assert "12 of 20 images, taken from all over them" in caplog.text
    assert f"vae_scaling_factor={2 / own['deviation']:.5g} (or measured) it would be 1" in caplog.text
    assert run(model, images, tmp_path / "out", "num=12", "num_decoded=4", "vae_scaling_factor=measured") == 0
    measured = record_of(tmp_path / "out")
    assert measured["deviation"] == pytest.approx(1.0, abs=1e-3)
    assert measured["scaling_factor"] == pytest.approx(2 / own["deviation"], rel=1e-3)
    assert measured["continuous"]["psnr"] == 100.0


@pytest.mark.usefixtures("without_page")
def test_the_batch_size_leaves_no_trace(model, images, tmp_path):
    for size in (7, 1):
        assert run(model, images, tmp_path / str(size), f"batch_size={size}", "exact=true", "num_decoded=5") == 0
    assert record_of(tmp_path / "7") == record_of(tmp_path / "1")


def test_the_shares_of_processes_add_up(model, images):
    source, vae = open_images(ImageFolderConfig(path=images), 16, held_out_fraction=0.0), Pixels(PixelsConfig())

    def of(share: range) -> Rows:
        blocks, unreadable = job.Blocks(torch.device("cpu"), exact=True), job.UnreadableImages(20)
        return encode(vae, source, range(0, 20, 2), share, blocks=blocks, batch_size=4, unreadable=unreadable)

    whole, parts = of(range(10)), [of(range(rank, 10, 2)) for rank in range(2)]
    assert torch.equal(whole.values, parts[0].values + parts[1].values)
    latents = Latents.of(whole, list(range(0, 20, 2)), 12)
    assert latents.places == tuple(range(0, 20, 2))
    assert torch.equal(
        latents.sampled(0)[3:4], Latents(latents.places[3:4], latents.mean[3:4], latents.deviation[3:4]).sampled(0)
    )


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["levels=1"], "levels: given 1; name one or several numbers from 2 to 4096"),
        (["levels=1024"], "levels: 1024 cells of equal probability do not fit into +-cut = 3.0"),
        (["levels="], "levels: given none; name one"),
        (["range=0"], "range: given 0, must be a number above 0"),
        (["vae_scaling_factor=own"], "vae_scaling_factor: given 'own'"),
        (["image_size=15"], "image_size: an autoencoder takes images of any multiple of its 2 pixels, given 15"),
        (["metrics=ssim", "image_size=10"], "metrics: ssim needs images of at least 11 pixels a side, got 10"),
        (["data.path=nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(model, images, tmp_path, capsys, words, message):
    assert run(model, images, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_scores_of_features_stand_beside_psnr(model, images, tmp_path, without_page):
    words = ("num_decoded=3", "levels=64", "ranges=3", "image_size=32", "metrics=fd_lite0,mae")
    assert run(model, images, tmp_path, *words) == 0
    continuous, *others = record_of(tmp_path)["continuous"], *record_of(tmp_path)["settings"]
    assert (continuous["psnr"], continuous["mae"]) == (100.0, 0.0)
    assert continuous["fd_lite0"] == pytest.approx(0, abs=1e-3)
    assert all(told["mae"] > 0 and told["fd_lite0"] > 0 for told in others)


def test_latents_that_are_not_finite_are_refused(model, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pixels, "spoilt", math.nan)
    assert run(model, images, tmp_path / "out") == 2
    assert "numbers are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_page")
def test_the_report_of_another_request_stays(model, images, report, capsys):
    before = (report / "calibration.json").read_bytes()
    assert run(model, images, report, "num_decoded=8", "levels=64") == 2
    assert f"out: {report} holds the report of another request (different: request)" in capsys.readouterr().err
    assert (report / "calibration.json").read_bytes() == before
    assert run(model, images, report, "num_decoded=8", "batch_size=5") == 0
    (report / "calibration.yaml").unlink()
    (report / "calibration.json").unlink()
    assert run(model, images, report) == 2
