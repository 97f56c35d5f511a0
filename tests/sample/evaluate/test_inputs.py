"""What `imgtok evaluate` reads, and which of its results it keeps."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from imgtok.cli import main as command_line
from imgtok.metrics import reference as references
from imgtok.metrics.arrays import ArrayImages
from imgtok.metrics.saved_images import SavedImages
from imgtok.sample.evaluate import scoring
from imgtok.sample.evaluate.job import Config, main
from imgtok.vision.features import Features
from imgtok.vision.inception import INCEPTION_NAME

NUM, SIZE = 16, 12
SETS = ("fid", "sfid", "kid", "precision_recall")


class Colours:
    """Stands in for Inception: colours of the quarters of an image."""

    name, width = INCEPTION_NAME, 12

    def __init__(self, *arguments) -> None:
        pass

    def __call__(self, images: torch.Tensor) -> Features:
        pixels = torch.nn.functional.adaptive_avg_pool2d(images.float() / 50, 2).flatten(1)
        return Features(pixels, pixels[:, :6].sin(), pixels.cos())


@pytest.fixture(autouse=True)
def inception(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"hello")
    monkeypatch.setattr(scoring, "find_inception_weights", lambda *a, **k: tmp_path / "weights.pth")
    monkeypatch.setattr(scoring, "Inception", Colours)
    monkeypatch.chdir(tmp_path)


def pictures(seed: int, num: int = NUM, size: int = SIZE) -> np.ndarray:
    """uint8 (N, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def in_all_forms(folder: Path, arrays: np.ndarray, labels: list[int]) -> dict[str, Path]:
    """The same images in every kind of file that can be scored."""
    files = {f"{index:06d}.png": png(pixels) for index, pixels in enumerate(arrays)}
    for name in ("folder", "sampled"):
        (folder / name).mkdir(parents=True)
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    (folder / "sampled/samples.json").write_text(json.dumps({"labels": labels}))
    (folder / "sampled/grid.png").write_bytes(png(pictures(9, 1, 40)[0]))  # as older versions left it
    with tarfile.open(folder / "x.tar", "w") as tar:
        members = dict(files)
        members |= {f"{number:06d}.cls": str(label).encode() for number, label in enumerate(labels)}
        members |= {name: (folder / "sampled" / name).read_bytes() for name in ("samples.json", "grid.png")}
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    images = [{"bytes": data, "path": file} for file, data in files.items()]
    pq.write_table(pa.table({"image": images, "label": labels}), folder / "x.parquet")
    np.savez(folder / "adm.npz", arrays, np.array(labels))
    np.savez_compressed(folder / "only.npz", images=arrays)
    np.save(folder / "last.npy", arrays)
    np.save(folder / "first.npy", arrays.transpose(0, 3, 1, 2))
    np.save(folder / "floats.npy", arrays.astype(np.float32) / 255)
    names = "folder sampled x.tar x.parquet adm.npz only.npz last.npy first.npy floats.npy"
    return {name: folder / name for name in names.split()}


def scores(name: str, **fields) -> dict[str, float]:
    out = Path(f"scores/{name}.json")
    main(Config(out=out, **fields))
    return {row["key"]: row["value"] for row in json.loads(out.read_text())["scores"]}


def test_the_same_images_have_the_same_scores_from_any_kind_of_file(tmp_path, caplog):
    labels = [index // 4 for index in range(NUM)]
    ours = in_all_forms(tmp_path / "ours", pictures(0), labels)
    theirs = in_all_forms(tmp_path / "theirs", pictures(1), labels)
    caplog.set_level(logging.INFO)
    first = None
    for (name, images), reference in zip(ours.items(), reversed(theirs.values()), strict=True):
        floats = {"array_values": "0..1"}
        found = scores(name, images=images, reference=reference, metrics=SETS, batch_size=5, **floats)
        assert set(found) == {"fid", "sfid", "kid", "precision", "recall"}
        assert first in (None, found), name
        first = found
        read = SavedImages(images, values="0..1")
        assert np.array_equal(read.batch(range(NUM)).permute(0, 2, 3, 1), pictures(0))
        told = None if name in ("folder", "only.npz", "last.npy", "first.npy", "floats.npy") else labels
        assert (None if read.labels is None else read.labels.tolist()) == told, name
    assert "sampled: kept 16 images; left out: 1 overview (grid.png)" in caplog.text
    record = json.loads(Path("scores/x.tar.json").read_text())  # against the last but two
    assert record["protocol"]["real"] == f"all 16 images of {theirs['last.npy']}"
    assert record["notes"] == []
    assert scores("pairs", images=ours["x.tar"], originals=ours["folder"], metrics=("psnr",)) == {"psnr": 100}
    assert scores("places", images=ours["x.parquet"], originals=ours["first.npy"], metrics=("psnr",)) == {"psnr": 100}


def test_a_part_of_any_kind_of_file_is_from_all_over_it(tmp_path):
    """Images in the order of their classes: the first ones are of one class."""
    values = np.repeat(np.arange(NUM, dtype=np.uint8)[:, None, None, None], 3, axis=3).repeat(8, 1).repeat(8, 2)
    forms = in_all_forms(tmp_path, values, [index // 4 for index in range(NUM)])
    for name, path in forms.items():
        source = scoring.FileSource(path, 4, "recorded", values="0..1")
        seen = torch.cat([b.images[:, 0, 0, 0] for v in source.batches(range(4), 3) for b in v.values()])
        assert sorted(value // 4 for value in seen.tolist()) == [0, 1, 2, 3], name
        assert "4 of 16: from all classes alike" in source.procedure.images or "stretches" in source.procedure.images


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 8, 8, 3)), r"float64 \(4, 8, 8, 3\) with values from 0 to 0; .*array_values=0\.\.1 takes them"),
        (np.linspace(-1, 1, 384).reshape(2, 8, 8, 3), r"from -1 to 1; .* array_values=-1\.\.1 takes them"),
        (np.full((2, 8, 8, 3), 200.0), r"from 200 to 200; .* save them with array\.round\(\)\.astype\('uint8'\)"),
        (np.zeros((2, 8, 8, 3), np.int64), r"int64 .* save it with array\.astype\('uint8'\)"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\), and images are \(N, H, W, 3\) .* array\[None\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"leave the fourth channel out, array\[\.\.\., :3\]"),
        (np.zeros((2, 8), np.uint8), r"uint8 \(2, 8\), and images are"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_what_to_do(array, message):
    with pytest.raises(ValueError, match=f"^x.npy: .*{message}"):
        ArrayImages(array, "x.npy")


def test_floats_are_what_they_are_said_to_be():
    colours = pictures(0, 3)
    for values, array in (("0..1", colours / 255), ("-1..1", colours / 127.5 - 1)):
        read = ArrayImages(array, "x.npy", values)
        assert np.array_equal(np.stack([read[i] for i in range(3)]), colours)
    with pytest.raises(ValueError, match=r"no value of the 3 images .* is below 0 .* is it array_values=0\.\.1"):
        ArrayImages(colours / 255, "x.npy", "-1..1")
    with pytest.raises(ValueError, match=r"image 0 has values from -1 .* outside of array_values=0\.\.1"):
        ArrayImages(colours / 127.5 - 1, "x.npy", "0..1")
    many = np.zeros((100, 8, 8, 3))
    many[57] = np.nan  # not among those that are looked at first
    with pytest.raises(ValueError, match="image 57 has values from nan"):
        ArrayImages(many, "x.npy", "0..1")[57]


def test_grey_arrays_are_grey_images(tmp_path):
    grey = pictures(0)[..., 0]
    for name, array in (("a", grey), ("b", grey[..., None]), ("c", grey[:, None])):
        np.save(tmp_path / f"{name}.npy", array)
        read = SavedImages(tmp_path / f"{name}.npy").batch(range(NUM))
        assert np.array_equal(read.permute(0, 2, 3, 1), np.stack([grey] * 3, axis=3))


def test_nothing_is_unpickled(tmp_path):
    objects = np.array([{}], dtype=object)
    np.save(tmp_path / "x.npy", objects)
    np.savez(tmp_path / "x.npz", objects)
    for name, message in (
        ("x.npy", "not a readable .npy file .*objects"),
        ("x.npz", "arr_0 cannot be read .Object arr"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            SavedImages(tmp_path / name)


# ---------------------------------------------------------------- statistics, images, and both


@pytest.fixture
def adm(tmp_path) -> Path:
    """As ADM's reference batches are: statistics of many images, and some of these."""
    looked = Colours()(torch.from_numpy(pictures(3, 200)).permute(0, 3, 1, 2))
    arrays = {"mu": looked.pool.double().mean(0), "sigma": looked.pool.double().T.cov()}
    arrays |= {"mu_s": looked.spatial.double().mean(0), "sigma_s": looked.spatial.double().T.cov()}
    np.savez(tmp_path / "adm.npz", arr_0=pictures(3, 30), **{key: value.numpy() for key, value in arrays.items()})
    np.savez(tmp_path / "stats.npz", mu=arrays["mu"].numpy(), sigma=arrays["sigma"].numpy())
    np.save(tmp_path / "images.npy", pictures(0))
    np.save(tmp_path / "30.npy", pictures(3, 30))
    return tmp_path / "adm.npz"


def test_statistics_serve_distances_and_the_images_beside_them_the_rest(adm):
    fields = {"images": Path("images.npy"), "assume_extractor": INCEPTION_NAME}
    found = scores("adm", **fields, reference=adm, metrics=SETS)
    assert found["fid"] == scores("fid", **fields, reference=Path("stats.npz"), metrics=("fid",))["fid"]
    images = scores("images", images=Path("images.npy"), reference=Path("30.npy"), metrics=SETS)
    for key in ("kid", "precision", "recall"):
        assert found[key] == images[key]
    assert found["fid"] != images["fid"]
    assert found["sfid"] != images["sfid"]
    record = json.loads(Path("scores/adm.json").read_text())
    assert record["protocol"]["real"] == f"statistics in {adm}; all 30 images of {adm}"
    assert record["scores"][0]["name"] == "FID-16[inception-v3-compat, adm]"
    part = scores("part", **fields, reference=adm, metrics=("fid",), real=20)  # of the images
    assert part["fid"] != found["fid"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ("fid", "kid")}, r"only statistics .mu, sigma of inception.*, and kid needs .*: metrics=fid$"),
        ({"metrics": ("fid", "sfid")}, r"and sfid needs the real images themselves: give these as reference=PATH"),
        ({"metrics": ("fd_lite0",)}, r"and fd_lite0 needs the real images themselves"),
        ({"metrics": ("fid",), "real": 3}, r"real: stats\.npz holds the statistics of all its images"),
        (
            {"metrics": ("fid",), "assume_extractor": None},
            r"does not say which network.*set assume_extractor=inception",
        ),
    ],
)
def test_what_a_file_of_statistics_lacks_is_said_before_weights_are_looked_for(adm, monkeypatch, fields, message):
    monkeypatch.setattr(scoring, "find_inception_weights", lambda *a, **k: pytest.fail("looked for weights"))
    monkeypatch.setattr(scoring.lite0, "find_weights", lambda *a, **k: pytest.fail("looked for weights"))
    given = {"images": Path("images.npy"), "reference": Path("stats.npz"), "assume_extractor": INCEPTION_NAME}
    with pytest.raises(ValueError, match=message):
        main(Config(**given | fields))


@pytest.mark.parametrize("field", ["images", "originals", "reference", "data.path", "probe_data.path"])
def test_a_file_that_is_not_there_is_named_before_anything_is_imported(adm, monkeypatch, capsys, field):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail("imported the job first"))
    given = {"images": "images.npy", "data.kind": "folder", "probe_data.kind": "folder", field: "imagse.npy"}
    assert command_line(["evaluate", *(f"{name}={value}" for name, value in given.items())]) == 2
    assert capsys.readouterr().err == f"imgtok: {field}: imagse.npy: no such file or folder; did you mean images.npy?\n"
    Path("x.yaml").write_text(f"images: images.npy\n{field.replace('.', ': {')}: imagse.npy{'}' * field.count('.')}\n")
    if field != "images":
        assert command_line(["evaluate", "x.yaml"]) == 2
        assert f"{field}: imagse.npy: no such file" in capsys.readouterr().err


def test_statistics_of_images_are_kept_for_next_time_and_for_other_tools(adm):
    fields = {"images": Path("images.npy"), "metrics": ("fid", "sfid")}
    first = scores("a", **fields, reference=Path("30.npy"), save_reference=Path("30.npz"))
    assert scores("b", **fields, reference=Path("30.npz")) == pytest.approx(first)
    with pytest.raises(ValueError, match=r"save_reference: 30\.npz is there already; choose another file"):
        scores("c", **fields, reference=Path("30.npy"), save_reference=Path("30.npz"))
    scores("a", **fields, reference=Path("30.npy"), save_reference=Path("30.npz"))  # the same request may
    scores("d", **fields, reference=Path("30.npz"), save_reference=Path("30.safetensors"))
    assert references.load(Path("30.safetensors"), INCEPTION_NAME).pool.count == 30
    with pytest.raises(ValueError, match=r"save_reference: x\.pt must end in \.safetensors or \.npz"):
        Config(**fields, reference=adm, save_reference=Path("x.pt"))


def test_resize_brings_both_sides_to_one_size(tmp_path):
    for side, (width, height) in (("a", (20, 30)), ("b", (40, 25))):
        (tmp_path / side).mkdir()
        for index, pixels in enumerate(pictures(0, 8, 48)):
            cut = pixels[: height + index, :width]
            (tmp_path / side / f"{index}.png").write_bytes(png(cut))
    fields = {"images": tmp_path / "a", "reference": tmp_path / "b", "metrics": ("fid",)}
    with pytest.raises(ValueError, match=r"resize=20 brings all of them to 20 x 20 pixels"):
        scores("mixed", **fields)
    found = scores("mixed", **fields, resize=20)
    for side in "ab":
        array = SavedImages(tmp_path / side, resize=20).batch(range(8)).permute(0, 2, 3, 1).numpy()
        np.save(tmp_path / f"{side}.npy", array)
    assert scores("alike", images=Path("a.npy"), reference=Path("b.npy"), metrics=("fid",)) == found
    protocol = json.loads(Path("scores/mixed.json").read_text())["protocol"]
    assert protocol["crop"].startswith("resize=20: shorter side to the size (halved by box filter")
    assert "ADM" in protocol["crop"]


# ---------------------------------------------------------------- results


def test_scores_of_another_request_are_kept(adm, capsys):
    np.save("other.npy", pictures(5))
    fields = {"originals": Path("images.npy"), "metrics": ("psnr",)}
    main(Config(images=Path("images.npy"), **fields))
    main(Config(images=Path("other.npy"), **fields))
    folder = Path("outputs/evaluate")
    kept = ["images.npy.csv", "images.npy.json", "other.npy.csv", "other.npy.json"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ValueError, match=r"other\.npy\.json holds scores of another request \(different: metrics\); cho"
    ):
        main(Config(images=Path("other.npy"), **{**fields, "metrics": ("mae",)}))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "other.npy.png").write_bytes(b"a curve of an earlier version of these scores")
    main(Config(images=Path("other.npy").resolve(), **fields, batch_size=3, out=folder / "other.npy.json"))
    assert sorted(path.name for path in folder.iterdir()) == kept
    (folder / "other.npy.json").unlink()
    with pytest.raises(ValueError, match=r"other\.npy\.csv would be written beside .* and is there without it"):
        main(Config(images=Path("other.npy"), **fields))
    (folder / "other.npy.csv").unlink()  # as the message advises
    main(Config(images=Path("other.npy"), **fields))
    Path("data.json").write_text('{"config": 3}')
    with pytest.raises(ValueError, match=r"data\.json is no result of imgtok evaluate"):
        main(Config(images=Path("other.npy"), **fields, out=Path("data.json")))


def test_results_are_called_as_what_was_scored():
    def name(step: int | None = None, **fields) -> str:
        return str(Config(**fields, metrics=("is",)).result(step))

    assert name(images=Path("outputs/samples")) == "outputs/evaluate/samples.json"
    assert name(model="outputs/cifar10/gpt/final") == "outputs/evaluate/cifar10-gpt-final.json"
    assert name(model="owner/repo") == "outputs/evaluate/owner-repo.json"
    assert name(images=Path("/data/runs/x/a b.npz")) == "outputs/evaluate/runs-x-a-b.npz.json"
    assert name(images=Path("..")) == "outputs/evaluate/unnamed.json"
    assert name(2000, model="outputs/gpt") == "outputs/evaluate/gpt-step_0002000.json"
    assert name(2000, model="gpt/checkpoints/step_0002000") == "outputs/evaluate/gpt-checkpoints-step_0002000.json"


def test_scores_of_other_samples_are_kept(adm):
    """The folder that `imgtok sample` wrote was deleted and drawn anew by a model that was trained further."""
    for place in range(4):
        Path("drawn").mkdir(exist_ok=True)
        Image.fromarray(pictures(0, 4)[place]).save(f"drawn/{place:06d}.png")
    record, fields = Path("drawn/samples.json"), {"images": Path("drawn"), "originals": Path("drawn")}
    text = json.dumps({"request": {"model": "before"}, "labels": [0, 1, 2, 3]})
    record.write_text(text)
    main(Config(**fields, metrics=("psnr",)))
    assert json.loads(Path("outputs/evaluate/drawn.json").read_text())["samples"] == {".": {"model": "before"}}
    main(Config(**fields, metrics=("psnr",)))
    record.write_text(text.replace("before", "after"))
    with pytest.raises(ValueError, match=r"\(different: what the samples were drawn by\); choose another file"):
        main(Config(**fields, metrics=("psnr",)))
    main(Config(**fields, metrics=("psnr",), out=Path("after.json")))


def test_what_scores_of_few_images_are_worth_is_printed_and_kept(adm, capsys):
    np.save("few.npy", pictures(0, 11))
    scores("few", images=Path("few.npy"), reference=Path("30.npy"), metrics=("fid", "is"))
    notes = json.loads(Path("scores/few.json").read_text())["notes"]
    assert notes[0].startswith("fid of 11 images in 12 dimensions: the covariance is rank-deficient")
    assert notes[1].startswith("is of 11 images: each of its 10 parts has 1")
    printed = capsys.readouterr().out
    assert all(f"note: {note}" in printed for note in notes)


def test_class_folders_are_classes_only_where_it_is_known_which(tmp_path):
    def source(*names):
        folder = tmp_path / "-".join(names)
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "a.png").write_bytes(png(pictures(0)[0]))
        return scoring.FileSource(folder, None, "recorded")

    as_text = source("0", "1", "12", "2")
    with pytest.raises(
        ValueError, match=r"top1_lite0 knows 13 classes, and .* has 4 by name \(0, 1, 12, 2\); it is not known"
    ):
        as_text.check_classes("top1_lite0", 13)
    with pytest.raises(ValueError, match=r"knows 4 classes \(a, b, c, d\), and .*: name them alike, or save numbers"):
        as_text.check_classes("top1_probe", 4, ("a", "b", "c", "d"))
    as_text.check_classes("top1_probe", 4, ("0", "1", "12", "2"))
    numbered = source("00", "01", "02")
    numbered.check_classes("the oracle", 64, ("red circle", "green circle"))
    with pytest.raises(ValueError, match="3 by name"):
        numbered.check_classes("top1_probe", 4, ("0", "1", "12", "2"))
    source("ant", "bee").check_classes("top1_lite0", 2)
    with pytest.raises(ValueError, match=r"2 by name \(bee, cat\)"):
        source("bee", "cat").check_classes("top1_lite0", 1000)
