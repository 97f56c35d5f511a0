"""`imgtok reconstruct`: the picture and the PSNR of each token count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imgtok.cli import main as command_line
from imgtok.data.images import ImageFolderConfig, open_images
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.metrics.reconstruction import psnr
from imgtok.pictures import save_png, to_uint8
from imgtok.runtime import Blocks
from imgtok.sample.reconstruct import Config, main
from imgtok.sample.reconstruct import reconstruct as reconstruct_images
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Rate
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig

DATA = ShapesConfig(num_images=400)
TRUNK = TrunkConfig(width=64, depth=1, head_dim=32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = FlexTok(
        FlexTokConfig(
            image_size=16,
            patch_size=4,
            num_registers=6,
            levels=(8, 5, 5),
            encoder=TRUNK,
            decoder=TRUNK,
            decoding=FlexTokDecoding(steps=2),
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # what a fresh model decodes would not depend on the tokens
                torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save_pretrained(folder)
    return folder


def reconstruct(tokenizer: Path, out: Path, **fields) -> dict[str, dict[str, float]]:
    main(Config(**{"model": str(tokenizer), "out": out, "data": DATA, "exact": True} | fields))
    return json.loads((out / "rates.json").read_text())["rates"]


def test_the_powers_of_two_are_shown_and_measured(tokenizer, tmp_path):
    scores = reconstruct(tokenizer, tmp_path, num=5)
    record = json.loads((tmp_path / "rates.json").read_text())
    assert record["model"]["path"] == str(tokenizer)
    assert len(record["model"]["fingerprint"]) == 16
    assert {name: record["data"][name] for name in ("kind", "num_images", "held_out", "num", "image_size")} == {
        "kind": "shapes", "num_images": 400, "held_out": 0.1, "num": 5, "image_size": 16,
    }  # fmt: skip
    assert list(scores) == ["1", "2", "4", "6"]
    model = FlexTok.from_pretrained(tokenizer)
    chosen = range(0, 40, 8)  # of the 40 held-out images, evenly
    images = open_images(DATA, 16, split="held_out").batch(chosen).images
    decoded = model.decode(model.encode(images).truncate(2), seed=0, indices=chosen)
    assert scores["2"]["psnr"] == pytest.approx(float(psnr(to_uint8(decoded), to_uint8(images)).mean()), abs=1e-3)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 5 * 16
        assert grid.height > 5 * 16  # originals and four counts


def test_the_batch_size_leaves_no_trace(tokenizer, tmp_path):
    first, *others = (reconstruct(tokenizer, tmp_path / str(size), num=23, batch_size=size) for size in (64, 7, 16))
    assert others == [first, first]
    grids = {(tmp_path / str(size) / "grid.png").read_bytes() for size in (64, 7, 16)}
    assert len(grids) == 1


def test_an_image_is_the_same_in_any_company(tokenizer):
    model = FlexTok.from_pretrained(tokenizer)
    source = open_images(DATA, 16, split="held_out")
    images = source.batch(range(40)).images
    how = {"seed": 3, "decoding": None, "blocks": Blocks(torch.device("cpu"), exact=True)}
    everything = reconstruct_images(model, images, range(40), (Rate(1), Rate(6)), **how)
    some = reconstruct_images(model, images[[31, 5]], (31, 5), (Rate(6),), **how)
    assert some[Rate(6)].images.dtype == torch.uint8
    assert torch.equal(some[Rate(6)].images, everything[Rate(6)].images[[31, 5]])
    assert not torch.equal(everything[Rate(1)].images, everything[Rate(6)].images)


def test_only_one_process_of_several_writes(tokenizer, tmp_path, monkeypatch):
    state = SimpleNamespace(is_main_process=False, device=torch.device("cpu"))
    monkeypatch.setattr("imgtok.sample.reconstruct.process_state", lambda: state)
    main(Config(model=str(tokenizer), out=tmp_path / "out", data=DATA))
    assert not (tmp_path / "out").exists()


def test_images_are_taken_from_everywhere(tokenizer, tmp_path):
    """The first 16 of 31 images were taken, all of one class where the classes lie one after the other."""
    pixels = torch.arange(31, dtype=torch.uint8)[:, None, None, None] * torch.ones(1, 3, 16, 16, dtype=torch.uint8)
    for place, image in enumerate(pixels):
        save_png(image, tmp_path / "set" / ("cat" if place < 16 else "dog") / f"{place}.png")
    seen: list[int] = []

    def write(out, originals, *rest) -> None:
        seen.extend(originals[:, 0, 0, 0].tolist())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imgtok.sample.reconstruct.write_results", write)
        data = ImageFolderConfig(path=tmp_path / "set")
        main(Config(model=str(tokenizer), data=data, held_out=1, num=16, rates=(1,), out=tmp_path / "out"))
    assert len(seen) == 16
    assert sum(pixel >= 16 for pixel in seen) in (7, 8)


def test_seed_and_rates_are_chosen(tokenizer, tmp_path):
    scores = [reconstruct(tokenizer, tmp_path / str(seed), num=2, rates=("3", "5"), seed=seed) for seed in (0, 1)]
    assert list(scores[0]) == ["3", "5"]
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rates=[1,7]", "rates: this tokenizer has 1 to 6 tokens an image and no tolerance, given 7"),
        ("rates=[3@0.1]", "no tolerance, given 3@0.1"),
        ("rates=[0]", "rates: 0 is not a number of tokens such as 16"),
        ("image_size=32", "image_size: this tokenizer takes images of 16 pixels, given 32"),
        ("num=0", "num: given 0"),
        ("decoding.steps=-1", "decoding.steps: given -1"),
    ],
)
def test_values_out_of_range_are_named(tokenizer, tmp_path, capsys, override, message):
    assert command_line(["reconstruct", str(tokenizer), f"out={tmp_path / 'out'}", override]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_generator_in_place_of_a_tokenizer(tmp_path):
    GPT(GPTConfig(vocab_size=8, num_tokens=2, width=16, depth=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a GPT .* but a tokenizer is needed"):
        reconstruct(tmp_path, tmp_path / "out")


def test_reconstructions_of_another_request_are_kept(tokenizer, tmp_path):
    reconstruct(tokenizer, tmp_path, num=2, rates=(1,))
    before = (tmp_path / "grid.png").read_bytes()
    with pytest.raises(ValueError, match=r"another request \(different: seed, rates\); choose another"):
        reconstruct(tokenizer, tmp_path, num=2, rates=(2,), seed=1)
    assert (tmp_path / "grid.png").read_bytes() == before
    reconstruct(tokenizer, tmp_path, num=2, rates=(1,), batch_size=1)  # the same request
    (tmp_path / "rates.json").unlink()
    with pytest.raises(ValueError, match=r"delete \S*grid.png$"):
        reconstruct(tokenizer, tmp_path, num=2, rates=(1,))


def test_results_are_called_as_the_model(tmp_path):
    assert Config(model="outputs/cats/final").result() == Path("outputs/reconstructions/cats-final")
    assert Config(model="outputs/cats").result(20) == Path("outputs/reconstructions/cats-step_0000020")
    assert Config(model="owner/model").result() == Path("outputs/reconstructions/owner-model")
    assert Config(model="m", out=tmp_path).result(20) == tmp_path


def test_those_of_a_model_that_is_trained_further_are_kept(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tokenizer, "run/final")
    weights = load_file("run/final/model.safetensors")

    def show(step: int, more: float, **fields) -> None:
        save_file({key: value + more for key, value in weights.items()}, "run/final/model.safetensors")
        Path("run/final/state.json").write_text(json.dumps({"step": step, "files": {}}))
        main(Config(model="run/final", data=DATA, num=2, rates=(1,), **fields))

    show(1000, 0.0)
    show(2000, 0.1)
    show(2000, 0.1)  # the same model replaces its own
    with pytest.raises(ValueError, match=r"another request \(different: model\); choose another folder"):
        show(2000, 0.2)
    show(2000, 0.2, out=Path("again"))
    found = sorted(path.name for path in Path("outputs/reconstructions").iterdir())
    assert found == ["run-final-step_0001000", "run-final-step_0002000"]
