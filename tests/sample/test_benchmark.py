"""`imgtok evaluate shapes`: true images get everything, and wrong ones what they deserve."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from imgtok import pictures
from imgtok.cli import JOBS, _find_job, parse
from imgtok.generators.conditioning import TextCrossAttention
from imgtok.generators.entities import Cells
from imgtok.generators.pipeline import Pipeline
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.sample.benchmark import job, page
from imgtok.sample.benchmark.items import groups_of, items_of, profile_of
from imgtok.sample.benchmark.job import Config, main
from imgtok.sample.images import read_image
from imgtok.sample.reconstruct import Reconstruction
from imgtok.shapes.render import render
from imgtok.shapes.world import Scene, ShapesConfig, held_object
from imgtok.tokenizers.vae import VAE, VAEConfig

WORLD = ShapesConfig(mode="text", textures=("solid",), sizes=("medium", "large"), max_objects=2, scale=1.2)
FEW = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def write_folder(folder: Path, split: str, *, moved: int = 0) -> Path:
    """Images of the captions of a split, or of captions further on."""
    items = items_of(WORLD, split, FEW)
    images = pictures.to_uint8(render([item.scene for item in items], 32).roll(moved, 0) * 2 - 1)
    folder.mkdir(parents=True)
    for item, image in zip(items, images, strict=True):
        pictures.save_png(image, folder / f"{item.index}.png")
    lines = [json.dumps({"file_name": f"{item.index}.png", "text": item.text}) for item in items]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """The result for true images, folders of two splits."""
    root = tmp_path_factory.mktemp("judged")
    for split in ("val", "swap"):
        write_folder(root / "images" / split, split)
    main(Config(images=root / "images", splits=("val", "swap"), num=FEW, data=WORLD, out=root / "out"))
    return root


def test_true_images_get_everything(judged):
    rows = report_of(judged / "out")["rows"]
    assert [(row["split"], row["what"], row["images"]) for row in rows] == [
        ("val", "samples", FEW),
        ("swap", "samples", FEW),
    ]
    for row in rows:
        values = {name: row["rates"][name]["value"] for name in ("presence", "binding", "leakage", "extra", "prompt")}
        assert values == {"presence": 1.0, "binding": 1.0, "leakage": 0.0, "extra": 0.0, "prompt": 1.0}
    lines = [json.loads(line) for line in (judged / "out/readings.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * FEW
    first = items_of(WORLD, "val", 1)[0]
    assert lines[0]["text"] == first.text
    assert {one["shape"] for one in lines[0]["read"]} == {one.shape for one in first.scene.objects}


def test_the_page_shows_what_was_asked_and_read(judged):
    text = (judged / "out/index.html").read_text()
    for item in items_of(WORLD, "val", FEW):
        assert text.count(item.text) >= 1
    assert text.count("<figure>") == 2 * FEW
    assert text.count("class=right") == 2 * FEW
    assert "<td>100.0<br><small>100.0, 100.0</small>" in text
    assert "http" not in text


def test_other_images_score_less_by_a_paired_difference(judged, tmp_path, capsys):
    folder = write_folder(tmp_path / "val", "val", moved=1)
    config = Config(images=folder, splits=("val",), num=FEW, data=WORLD, out=tmp_path / "out", baseline=judged / "out")
    with pytest.raises(ValueError, match="baseline: has no answer for 4 of the 4 captions of images"):
        main(config)
    assert not (tmp_path / "out").exists(), "said before anything is written or drawn"
    wrong = tmp_path / "again"
    wrong.mkdir()
    folder.rename(wrong / "val")
    main(Config(images=wrong, splits=("val",), num=FEW, data=WORLD, out=tmp_path / "out2", baseline=judged / "out"))
    (row,) = report_of(tmp_path / "out2")["rows"]
    assert row["rates"]["prompt"]["value"] == 0.0
    assert row["differences"]["prompt"] == {"value": -1.0, "low": -1.0, "high": -1.0}
    assert "minus the baseline" in capsys.readouterr().out


def test_another_request_is_refused(judged):
    with pytest.raises(ValueError, match=r"holds a result of another request \(different: num, files\)"):
        main(Config(images=judged / "images", splits=("val", "swap"), num=2, data=WORLD, out=judged / "out"))


def tiny_vae() -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(latent_channels=2, block_channels=(8, 8, 8, 8), norm_groups=2)).eval()


def test_a_tokenizer_is_asked_for_everything_beside_ceiling_and_floor(tmp_path, monkeypatch):
    """Of an autoencoder that leaves the images as they are, but for the first, of which it makes a blank."""

    def reconstruct(model, images, indices, rates, **options):
        images = images.clone()
        images[torch.tensor(list(indices)) == 0] = 0.84
        return {rate: Reconstruction(pictures.to_uint8(images), None) for rate in rates}

    monkeypatch.setattr(job, "reconstruct", reconstruct)
    tiny_vae().save_pretrained(tmp_path / "vae")
    config = Config(
        tokenizer=str(tmp_path / "vae"), splits=("val",), num=FEW, data=WORLD, image_size=32, out=tmp_path / "out"
    )
    main(config)
    rows = {row["what"]: row["rates"] for row in report_of(tmp_path / "out")["rows"]}
    assert set(rows) == {"reconstructions", *page.REFERENCES}
    assert rows["true images"]["prompt"]["value"] == 1.0
    assert rows["another scene's"]["prompt"]["value"] == 0.0
    assert rows["reconstructions"]["prompt"]["value"] == 1 - 1 / FEW
    assert rows["reconstructions"]["texture"]["value"] == 1.0, "which no caption speaks of in all of these"


class Words:
    """Stands for a text encoder: an image's caption as one feature of its length."""

    name, max_length = "words", 2

    def encode(self, texts):
        from imgtok.text.captions import Captions

        return [Captions.pad([torch.full((1, 4), len(text) / 50)]) for text in texts]


@pytest.fixture
def pipe(tmp_path, monkeypatch) -> Pipeline:
    torch.manual_seed(0)
    condition = TextCrossAttention(text_width=4, text_length=2, text_encoder="words")
    sampling = FlowSampling(steps=(2,), guidance=(1.0,))
    config = XARConfig(
        latent_channels=2, grid=4, entities=Cells(height=2, width=2), width=16, depth=1, num_heads=2,
        condition=condition, sampling=sampling,
    )  # fmt: skip
    made = Pipeline(XAR(config), tiny_vae(), device="cpu")
    made.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(Pipeline, "encoder", lambda self: Words())
    return made


def seconds_in(out: Path) -> dict[str, float]:
    assert report_of(out)["seconds_an_image"] > 0
    return {row["split"]: row["seconds_an_image"] for row in report_of(out)["rows"]}


def test_a_generator_draws_what_is_missing_for_the_captions(pipe, tmp_path, capsys):
    out = tmp_path / "out"
    config = Config(
        model=str(tmp_path / "model"), splits=("val", "swap"), num=2, data=WORLD, out=out, references=False, exact=True
    )
    main(config)
    first = (out / "images/swap/000001.png").read_bytes()
    (expected,) = pipe.images_at((None,), [items_of(WORLD, "swap", 2)[1].text], [0], seed=0).values()
    found = read_image(out / "images/swap/000001.png").int()
    assert (found - expected.images[0].int()).abs().max() <= 1, "the two of a pair have one noise"
    (out / "images/swap/000001.png").unlink()
    took = seconds_in(out)
    assert took.keys() == {"val", "swap"}
    assert all(seconds > 0 for seconds in took.values())
    capsys.readouterr()
    main(dataclasses.replace(config, baseline=out))
    assert (out / "images/swap/000001.png").read_bytes() == first
    assert seconds_in(out)["val"] == took["val"], "nothing was drawn now"
    told = capsys.readouterr().out.splitlines()
    assert told[0].split()[-1] == "seconds"
    assert told[2].split()[-2:] == ["x", "1.00"]
    again = Config(images=out / "images", splits=("val", "swap"), num=2, data=WORLD, out=tmp_path / "again")
    main(again)
    assert [row["rates"] for row in report_of(tmp_path / "again")["rows"]] == [
        row["rates"] for row in report_of(out)["rows"]
    ]
    assert report_of(out)["request"]["models"].keys() == {"model", "tokenizer"}


def test_few_images_of_a_folder(judged, tmp_path):
    """Splits that are not there ask for no pairs, and of two images there is no other scene."""
    main(Config(images=judged / "images" / "val", num=3, data=WORLD, out=tmp_path / "odd"))
    with pytest.raises(ValueError, match="an odd number of captions, 3, is taken of .*come in pairs"):
        main(Config(images=judged / "images", num=3, data=WORLD, out=tmp_path / "pairs"))
    for count, rows in ((2, ["true images"]), (3, ["true images", "another scene's"])):
        series = job.Series("val", "samples", items_of(WORLD, "val", count), None)
        assert [row.what for row in job.references(series, 32, WORLD.scale, 0)] == rows


def test_swap_pairs_are_one_group_and_differ_by_colours():
    items = items_of(WORLD, "swap", 4)
    assert groups_of(items, "swap") == [0, 0, 1, 1]
    assert groups_of(items, "val") == [0, 1, 2, 3]
    assert [item.noise for item in items] == [0, 0, 1, 1]
    assert len(items_of(WORLD, "crowd", 1)[0].facts.objects) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of model=NAME, images=FOLDER or tokenizer=NAME"),
        ({"model": "m", "rates": (4,)}, "rates: these belong to tokenizer"),
        ({"model": "m", "num": 3}, "num: 3 is odd"),
        ({"model": "m", "splits": ("val", "val")}, "name each once"),
        ({"model": "m", "data": ShapesConfig()}, "data.mode: captions are of scenes"),
        ({"model": "m", "parser": "textblob"}, "parser: this is for controls, and there are none"),
    ],
)
def test_requests_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_folders_that_cannot_be_judged(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        main(Config(images=tmp_path / "nowhere"))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png has no caption; captions are metadata.jsonl"):
        main(Config(images=tmp_path))
    (tmp_path / "a.txt").write_text("a photo of a cat")
    with pytest.raises(ValueError, match="after 1 words there is 'photo'.*sentences about shapes alone"):
        main(Config(images=tmp_path))
    (tmp_path / "samples.json").write_text(json.dumps({"labels": [3], "request": {"prompts": []}}))
    with pytest.raises(ValueError, match="drawn for classes and have no captions"):
        main(Config(images=tmp_path))
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="its list of captions is empty"):
        main(Config(images=tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red circle"}\n\n{"file_name": \n')
    with pytest.raises(ValueError, match="metadata.jsonl: line 3 is no JSON: "):
        main(Config(images=tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match="line 1 has no file_name and text"):
        main(Config(images=tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a red circle"}\n')
    with pytest.raises(FileNotFoundError, match="b.png: has a caption, and is not there"):
        main(Config(images=tmp_path))


def test_a_list_of_captions_is_read_and_nothing_else_is_said_of_it(tmp_path, caplog):
    for name in ("a", "b", "no caption"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    lines = [json.dumps({"file_name": f"{name}.png", "text": "a red circle"}) for name in ("a", "b")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.INFO):
        reading = job.Reading(Config(images=tmp_path))
    assert [item.text for item in reading.items["images"]] == ["a red circle"] * 2
    assert reading.size == 32
    assert caplog.text == ""  # and not that captions in metadata.jsonl are not read, as they are not in training


@pytest.mark.parametrize(("size", "found"), [((32, 16), "32x16, 32x32"), ((64, 64), "32x32, 64x64")])
def test_images_of_several_sizes_are_refused(tmp_path, size, found):
    for name, own in (("a", (32, 32)), ("b", size)):
        Image.new("RGB", own).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red circle")
    with pytest.raises(ValueError, match=f"holds images of {found} pixels; they must be squares, all of one size"):
        job.Reading(Config(images=tmp_path))
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.png.*not an image"):
        job.Reading(Config(images=tmp_path))


@pytest.mark.parametrize("words", [["benchmark=shapes"], ["--benchmark", "shapes"], ["--benchmark=shapes"], ["shapes"]])
def test_all_spellings_name_the_job(words):
    command, rest = _find_job(["evaluate", *words, "outputs/model", "splits=val,novel"])
    assert command == "evaluate shapes"
    assert JOBS[command][0] == job.__name__
    config = parse(Config, rest, job.POSITIONAL)
    assert (config.model, config.splits) == ("outputs/model", ("val", "novel"))


def test_another_benchmark_is_refused():
    with pytest.raises(ValueError, match="benchmark: given 'coco'; there is: evaluate benchmark=shapes"):
        _find_job(["evaluate", "benchmark=coco"])
    with pytest.raises(ValueError, match="benchmark: given 'shapes'"):
        _find_job(["sample", "--benchmark", "shapes"])


def test_what_objects_hold_has_columns_of_its_own(tmp_path, capsys):
    """True images of the split holding, and the same with what is held exchanged."""
    items = items_of(WORLD, "holding", FEW)
    right = render([item.scene for item in items], 64)
    first, second = (render([exchanged(item.scene) for item in items[:2]], 64), right[2:])
    for name, images in (("right", right), ("wrong", torch.cat([first, second]))):
        folder = tmp_path / name / "holding"
        folder.mkdir(parents=True)
        for item, image in zip(items, pictures.to_uint8(images * 2 - 1), strict=True):
            pictures.save_png(image, folder / f"{item.index}.png")
            (folder / f"{item.index}.txt").write_text(item.text)
        main(Config(images=tmp_path / name, num=FEW, out=tmp_path / "out" / name))  # sizes are those of scale 1
    (true,), (wrong,) = (report_of(tmp_path / "out" / name)["rows"] for name in ("right", "wrong"))
    assert true["split"] == "holding"
    values = [true["rates"][name]["value"] for name in ("held_presence", "held_binding", "held_leakage", "prompt")]
    assert values == [1.0, 1.0, 0.0, 1.0]
    values = [wrong["rates"][name]["value"] for name in ("presence", "binding", "held_presence", "held_binding")]
    assert values == [1.0, 1.0, 1.0, 0.5]
    assert wrong["rates"]["held_leakage"]["value"] == 0.5
    assert "held presence" in capsys.readouterr().out
    assert "<th>held binding" in (tmp_path / "out/right/index.html").read_text()
    line = json.loads((tmp_path / "out/right/readings.jsonl").read_text().splitlines()[0])
    assert [len(one["holding"]) for one in line["read"]] == [1, 1]


def exchanged(scene):
    first, second = scene.objects
    mine, other = (
        held_object(one.holding.label, at.x, at.y, at.radius) for one, at in ((first, second), (second, first))
    )
    return Scene((dataclasses.replace(first, holding=other), dataclasses.replace(second, holding=mine)))


def test_the_world_of_a_split():
    """Objects that hold others are large ones, whatever the world's sizes are; other splits have them as they are."""
    narrow = dataclasses.replace(WORLD, textures=("striped", "solid"), holding=0.5, max_objects=1)
    profile = profile_of(narrow, "holding")
    assert (profile.sizes, profile.textures, profile.scale, profile.max_objects) == (("large",), ("solid",), 1.0, 2)
    assert [profile_of(narrow, split).holding for split in ("val", "novel", "swap", "crowd")] == [0.5, 0.5, 0.0, 0.0]
    assert all(one.size is None for item in items_of(WORLD, "holding", 9) for one in item.facts.objects)
