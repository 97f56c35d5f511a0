import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imgtok.config import from_dict
from imgtok.data.images import (
    DataError,
    HubConfig,
    ImageFolderConfig,
    ParquetConfig,
    Position,
    ShapesConfig,
    TarConfig,
    open_images,
    split_indices,
)
from imgtok.data.sources import expand
from imgtok.pictures import UnreadableImage


def png(value: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    """An image of one grey value, by which a test recognises it."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def values(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: dict, metadata: dict | None = None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path)
    return path


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path_factory, monkeypatch):
    """The library's Arrow files go to a folder of this test run, not to the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def open_all(config, size=8, **options):
    return open_images(config, size, held_out_fraction=0.0, **options)


# Folders


def test_folder_classes_are_sorted_names(tmp_path):
    for i, name in enumerate(["zebra/1.PNG", "ant/b.png", "ant/deep/a.png", "bee/x.jpeg"]):
        write(tmp_path / name, png(i))
    write(tmp_path / "ant" / "notes.txt", b"not an image")
    write(tmp_path / "ant" / "._b.png", b"what macOS leaves in archives")
    source = open_all(ImageFolderConfig(path=tmp_path))
    assert source.class_names == ("ant", "bee", "zebra")
    assert source.num_classes == 3
    batch = source.batch(range(4))
    assert values(batch.images) == [1, 2, 3, 0]
    assert batch.labels.tolist() == [0, 0, 1, 2]
    assert batch.names[3] == str(tmp_path / "zebra" / "1.PNG")
    assert batch.indices == (0, 1, 2, 3)
    sample = source[3]
    assert (sample.label, sample.name, sample.text) == (2, batch.names[3], "")
    assert torch.equal(sample.image, batch.images[3])


def test_flat_folder_has_no_labels(tmp_path):
    write(tmp_path / "pets" / "b.png", png(2))
    write(tmp_path / "pets" / "a.png", png(1))
    source = open_all(ImageFolderConfig(path=tmp_path / "pets"))
    assert (source.num_classes, source.class_names) == (0, ())
    assert values(source.batch([0, 1]).images) == [1, 2]


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"no images; the folder is empty. Images are files that end in .apng"):
        open_all(ImageFolderConfig(path=tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_all(ImageFolderConfig(path=tmp_path / "nowhere"))


def test_folder_of_text_files_says_what_it_found(tmp_path):
    for i in range(3):
        write(tmp_path / "class" / f"{i}.txt", b"text")
    write(tmp_path / "README", b"text")
    with pytest.raises(DataError, match=r"found 4 other files \(3 .txt, 1 no suffix\).*\.jpg"):
        open_all(ImageFolderConfig(path=tmp_path))


def test_folder_mistakes(tmp_path):
    write(tmp_path / "splits" / "test" / "cat" / "1.png", png())
    write(tmp_path / "splits" / "val" / "cat" / "1.png", png())
    with pytest.raises(DataError, match=r"splits, not classes; give .*test"):
        open_all(ImageFolderConfig(path=tmp_path / "splits"))
    write(tmp_path / "mixed" / "cat" / "1.png", png())
    write(tmp_path / "mixed" / "2.png", png())
    with pytest.raises(DataError, match=r"beside them .*2\.png"):
        open_all(ImageFolderConfig(path=tmp_path / "mixed"))
    write(tmp_path / "gap" / "cat" / "1.png", png())
    (tmp_path / "gap" / "dog").mkdir()
    with pytest.raises(DataError, match="dog: a class folder without images"):
        open_all(ImageFolderConfig(path=tmp_path / "gap"))


def test_more_folders_than_classes(tmp_path):
    for name in "abc":
        write(tmp_path / name / "1.png", png())
    assert open_all(ImageFolderConfig(path=tmp_path, num_classes=10)).num_classes == 10
    with pytest.raises(DataError, match=r"c.1\.png: label 2 is outside the classes; allowed are 0 to 1"):
        open_all(ImageFolderConfig(path=tmp_path, num_classes=2))


def test_a_file_that_vanishes_is_unreadable(tmp_path):
    path = write(tmp_path / "a.png", png())
    source = open_all(ImageFolderConfig(path=tmp_path))
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"a\.png: cannot be opened"):
        source[0]


# Parquet and the Hub


def images_column(count: int) -> list[dict]:
    return [{"bytes": png(i), "path": None} for i in range(count)]


def test_parquet_with_plain_columns(tmp_path):
    columns = {"image": images_column(4), "label": [3, 0, 1, 1], "text": ["a", None, "c", "d"]}
    path = write_parquet(tmp_path / "x.parquet", columns)
    source = open_all(ParquetConfig(path=str(path)))
    assert (source.num_classes, source.class_names) == (4, ())
    batch = source.batch([2, 0, 1])
    assert values(batch.images) == [2, 0, 1]
    assert batch.labels.tolist() == [1, 3, 0]
    assert batch.texts == ("c", "a", "")
    assert batch.names[0] == f"{path}[2]"


def test_parquet_of_the_hub_has_class_names_and_several_files(tmp_path):
    features = {"img": {"_type": "Image"}, "fine": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    for part in (0, 1):
        columns = {"img": images_column(2), "fine": [part, 1]}
        write_parquet(tmp_path / f"p-{part}.parquet", columns, {"info": {"features": features}})
    source = open_all(ParquetConfig(path=str(tmp_path / "p-*.parquet")))
    assert (len(source), source.num_classes, source.class_names) == (4, 2, ("cat", "dog"))
    assert source.batch(range(4)).labels.tolist() == [0, 1, 1, 1]


def test_parquet_of_raw_bytes_without_labels(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"picture": [png(5), None], "other": [1.0, 2.0]})
    source = open_all(ParquetConfig(path=str(path)))
    assert source.num_classes == 0
    batch = source.batch([0, 1])
    assert values(batch.images) == [5]
    assert batch.unreadable == (f"{path}[1]: column 'picture' is empty",)


def test_parquet_that_points_to_files(tmp_path):
    image = write(tmp_path / "a.png", png(7))
    path = write_parquet(tmp_path / "x.parquet", {"image": [{"bytes": None, "path": str(image)}]})
    assert values(open_all(ParquetConfig(path=str(path))).batch([0]).images) == [7]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"label": [0, 5, 6]}, {"num_classes": 5}, r"x.parquet\[1\]: label 5 .* allowed are 0 to 4 \(2 such"),
        ({"label": [0, -1, 1]}, {}, r"\[1\]: label -1 is outside the classes; allowed are 0 to 1"),
        ({"label": [0, None, 1]}, {}, r"\[1\]: label is None; labels must be whole numbers or names"),
        ({"label": [[0], [1], [1]]}, {}, "column .label. is list"),
        ({"label": [0, 1, 2]}, {"label_column": "klass"}, "no column 'klass'; it has image, label"),
        ({"image2": images_column(3), "image": [0, 0, 0]}, {"image_column": "im"}, "no column 'im'"),
        ({"a": images_column(3), "image": [1, 2, 3], "b": images_column(3)}, {}, r"several columns of images \(a, b\)"),
        ({"image": [1, 2, 3]}, {}, "no column of images; set image_column to one of image"),
    ],
)
def test_parquet_mistakes(tmp_path, columns, options, message):
    path = write_parquet(tmp_path / "x.parquet", {"image": images_column(3)} | columns)
    with pytest.raises(DataError, match=message):
        open_all(ParquetConfig(path=str(path), **options))


def test_parquet_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_all(ParquetConfig(path=str(tmp_path / "*.parquet")))
    path = write(tmp_path / "x.parquet", b"PAR1 but nothing else")
    with pytest.raises(DataError, match=r"x.parquet: not a readable Parquet file"):
        open_all(ParquetConfig(path=str(path)))


def test_hub_name_may_be_a_local_folder(tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", {"image": images_column(3), "label": [0, 1, 2]})
    source = open_all(HubConfig(name=str(tmp_path / "set")))
    assert source.batch(range(3)).labels.tolist() == [0, 1, 2]
    assert source.batch([1]).names == (f"{tmp_path / 'set'}[1]",)


def test_hub_failure_names_the_data_set(monkeypatch):
    import datasets

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'owner/set': ConnectionError: Name or service.*HF_TOKEN"):
        open_all(HubConfig(name="owner/set"))


# Tars


def tar_members(count: int, first: int = 0, label: bool = True) -> list[tuple[str, bytes]]:
    members = []
    for i in range(first, first + count):
        members.append((f"./d/{i:03d}.png", png(i)))
        members += [(f"./d/{i:03d}.cls", b" %d\n" % (i % 3))] if label else []
    return members


def test_tar_with_captions_in_any_order(tmp_path):
    extra = [("d/001.txt", b"one\n"), ("d/000.json", b'{"caption": "zero"}'), ("d/002.json", b"["), ("README", b"")]
    path = write_tar(tmp_path / "x.tar", extra + tar_members(4))
    source = open_all(TarConfig(path=str(path)))
    assert (len(source), source.num_classes) == (4, 3)
    batch = source.batch(range(4))
    order = [int(Path(name).stem) for name in batch.names]
    assert sorted(order) == [0, 1, 2, 3]
    assert values(batch.images) == order
    assert batch.labels.tolist() == [i % 3 for i in order]
    assert dict(zip(order, batch.texts, strict=True)) == {0: "zero", 1: "one", 2: "", 3: ""}
    assert f"{path}:d/003.png" in batch.names


def test_tar_shards_by_braces_and_without_labels(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard:02d}.tar", tar_members(2, first=2 * shard, label=False))
    source = open_all(TarConfig(path=str(tmp_path / "s-{00..02}.tar")))
    assert source.num_classes == 0
    batch = source.batch([5, 0, 3])
    assert values(batch.images) == [5, 0, 3]
    assert batch.labels.tolist() == [0, 0, 0]
    with pytest.raises(FileNotFoundError, match=r"s-03.tar: no such file \(from"):
        open_all(TarConfig(path=str(tmp_path / "s-{00..03}.tar")))


def test_tar_source_survives_pickling_after_use(tmp_path):
    write_tar(tmp_path / "x.tar", tar_members(2))
    source = open_all(TarConfig(path=str(tmp_path / "x.tar")))
    before = source[1].image
    assert torch.equal(pickle.loads(pickle.dumps(source))[1].image, before)


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([*tar_members(2), ("d/009.png", png())], {}, r"d/009.png: no label in KEY.cls, though others have; .*none"),
        ([("a.png", png()), ("a.cls", b"cat")], {}, r"x.tar:a.cls: label is 'cat'; it must be a whole number"),
        ([("a.png", png()), ("a.cls", b"7")], {"num_classes": 7}, r"x.tar:a.png: label 7 .* allowed are 0 to 6"),
        ([("a.png", png()), ("a.png", png())], {}, "'a.png' appears twice"),
        ([("a.txt", b"text")], {}, "no images; found a.txt. Images end in .*jpg"),
    ],
)
def test_tar_mistakes(tmp_path, members, options, message):
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        open_all(TarConfig(path=str(path), **options))


def test_tar_compressed_cut_off_or_no_tar(tmp_path):
    path = write_tar(tmp_path / "x.tar.gz", tar_members(2), "w:gz")
    with pytest.raises(DataError, match=r"unpack it first: gunzip x.tar.gz"):
        open_all(TarConfig(path=str(path)))
    whole = write_tar(tmp_path / "x.tar", [("a.png", png() * 100), ("a.cls", b"0")]).read_bytes()
    path = write(tmp_path / "cut.tar", whole[:3000])
    with pytest.raises(DataError, match=r"cut.tar: cut off within 'a.png'"):
        open_all(TarConfig(path=str(path)))
    path = write(tmp_path / "text.tar", b"text " * 1000)
    with pytest.raises(DataError, match="not a readable tar file"):
        open_all(TarConfig(path=str(path)))


def test_expand_braces():
    assert expand(f"{sys.executable[:-1]}{{{sys.executable[-1]},{sys.executable[-1]}}}") == [sys.executable] * 2


# What all sources share


def test_configurations_are_chosen_by_kind(tmp_path):
    from dataclasses import dataclass

    from imgtok.data.images import DataConfig

    @dataclass(frozen=True, kw_only=True)
    class Job:
        data: DataConfig = ShapesConfig()

    Job.__annotations__["data"] = DataConfig
    for kind, fields in (
        ("folder", {"path": "x"}),
        ("webdataset", {"path": "x"}),
        ("shapes", {}),
        ("huggingface", {"name": "x"}),
    ):
        assert from_dict(Job, {"data": {"kind": kind} | fields}).data.kind == kind
    with pytest.raises(ValueError, match="num_classes"):
        ImageFolderConfig(path=tmp_path, num_classes=0)


def test_splits_are_disjoint_cover_and_stay(tmp_path):
    train, held_out = (split_indices(103, split, 0.2) for split in ("train", "held_out"))
    assert sorted([*train, *held_out]) == list(range(103))
    assert len(held_out) == 21
    assert list(held_out) == sorted(held_out)
    assert held_out.tolist() != list(range(21))
    assert np.array_equal(held_out, split_indices(103, "held_out", 0.2))
    assert len(split_indices(103, "train", 0.0)) == 103
    with pytest.raises(DataError, match=r"none of 103 images is held out at held_out=0; choose a share such as"):
        split_indices(103, "held_out", 0.0)
    for i in range(10):
        write(tmp_path / f"{i}.png", png(i))
    seen = []
    for split in ("train", "held_out"):
        source = open_images(ImageFolderConfig(path=tmp_path), 8, split=split, held_out_fraction=0.3)
        seen += values(source.batch(range(len(source))).images)
    assert sorted(seen) == list(range(10))


def test_images_of_every_size_and_mode_come_out_alike(tmp_path):
    pictures = {
        "grey16": Image.fromarray(np.full((20, 20), 65535, np.uint16)),
        "palette": Image.new("P", (30, 9)),
        "one_pixel": Image.new("RGB", (1, 1), (5, 5, 5)),
        "alpha": Image.new("RGBA", (8, 8)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    Image.new("CMYK", (64, 32)).save(tmp_path / "cmyk.jpg")
    batch = open_all(ImageFolderConfig(path=tmp_path)).batch(range(5))
    assert batch.images.shape == (5, 3, 8, 8)
    assert batch.unreadable == ()
    by_name = {Path(name).stem: value for name, value in zip(batch.names, values(batch.images), strict=True)}
    assert by_name == {"alpha": 255, "cmyk": 255, "grey16": 255, "one_pixel": 5, "palette": 0}


def asymmetric(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")


def test_flips_depend_on_seed_epoch_and_index_only(tmp_path):
    asymmetric(tmp_path, 40)
    config = ImageFolderConfig(path=tmp_path)
    source, plain = open_all(config, flip=True), open_all(config).batch(range(40)).images

    def flipped(seed: int, epoch: int) -> list[bool]:
        images = source.training_batch([Position(epoch, i) for i in range(40)], seed).images
        mirrored = [torch.equal(image, original.flip(-1)) for image, original in zip(images, plain, strict=True)]
        same = [torch.equal(image, original) for image, original in zip(images, plain, strict=True)]
        assert all(a != b for a, b in zip(mirrored, same, strict=True))
        return mirrored

    patterns = [flipped(0, 0), flipped(0, 1), flipped(1, 0)]
    assert len({tuple(pattern) for pattern in patterns}) == 3
    assert all(10 < sum(pattern) < 30 for pattern in patterns)
    assert flipped(0, 0) == patterns[0]
    mixed = [Position(1, 3), Position(0, 3), Position(0, 39)]
    batch = source.training_batch(mixed, 0)
    for row, position in enumerate(mixed):
        alone = source.training_batch([position], 0).images[0]
        assert torch.equal(batch.images[row], alone)
    assert torch.equal(source.batch([3]).images[0], plain[3])


def test_random_crops_move_and_repeat(tmp_path):
    asymmetric(tmp_path, 2)
    source = open_all(ImageFolderConfig(path=tmp_path), crop="random")
    epochs = [source.training_batch([Position(epoch, 0)], 0).images for epoch in range(6)]
    assert len({tuple(image.flatten().tolist()) for image in epochs}) > 4
    assert torch.equal(source.training_batch([Position(2, 0)], 0).images, epochs[2])
    centred = open_all(ImageFolderConfig(path=tmp_path)).training_batch([Position(2, 0)], 0).images
    assert torch.equal(centred, source.batch([0]).images)


def test_unreadable_images_are_listed_or_replaced(tmp_path):
    for i in range(6):
        write(tmp_path / f"{i}.png", png(10 * i))
    write(tmp_path / "2.png", b"this is text")
    source = open_all(ImageFolderConfig(path=tmp_path))
    batch = source.batch([1, 2, 3])
    assert (values(batch.images), batch.indices) == ([10, 30], (1, 3))
    assert len(batch.unreadable) == 1
    assert "2.png: not an image" in batch.unreadable[0]
    batch = source.training_batch([Position(0, 2), Position(0, 5)], 0)
    assert (values(batch.images), batch.indices) == ([30, 50], (3, 5))
    assert len(batch.unreadable) == 1
    with pytest.raises(UnreadableImage, match=r"2\.png"):
        source[2]
    assert source.batch([2]).images.shape == (0, 3, 8, 8)


def test_only_unreadable_images_end_the_search(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", b"text")
    with pytest.raises(DataError, match=r"(?s)2 of 4 images are unreadable, 1 are allowed.*0.png.*1.png"):
        open_all(ImageFolderConfig(path=tmp_path)).training_batch([Position(0, 0)], 0)


def test_shapes_are_a_source_like_the_others():
    source = open_images(ShapesConfig(num_images=50), 16)
    assert (len(source), source.num_classes, len(source.class_names)) == (50, 64, 64)
    batch = source.batch([4, 9])
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1
    assert torch.equal(batch.images[1], source[9].image)
    assert (batch.labels[1], batch.names[1]) == (source[9].label, source[9].name)
    shown = source.training_batch([Position(0, i) for i in range(50)], 0).images
    plain = source.batch(range(50)).images
    assert torch.equal(shown, plain)
    held_out = open_images(ShapesConfig(num_images=50), 16, split="held_out", held_out_fraction=0.2)
    assert len(held_out) == 10
    assert held_out[0].name == "shapes/val/0"
    with pytest.raises(DataError, match="held-out part"):
        open_images(ShapesConfig(split="novel"), 16, split="held_out")


def test_shapes_are_not_augmented():
    with pytest.raises(ValueError, match=r"flip=true is not possible with data.kind=shapes.*leave it out"):
        open_images(ShapesConfig(num_images=5), 16, flip=True)
    with pytest.raises(ValueError, match=r"crop=random is not possible"):
        open_images(ShapesConfig(num_images=5), 16, crop="random")


def test_captions_of_shapes():
    source = open_images(ShapesConfig(num_images=5, mode="text"), 16)
    assert source.batch([2]).texts == (source[2].text,)
    assert len(source[2].text) > 5


@pytest.mark.parametrize(("size", "fraction"), [(0, 0.1), (8, 1.0), (8, -0.1)])
def test_nonsense_is_refused(size, fraction):
    with pytest.raises(ValueError, match=r"must be|need at least"):
        open_images(ShapesConfig(), size, held_out_fraction=fraction)


def test_batches_move_between_devices(tmp_path):
    write(tmp_path / "a.png", png())
    batch = open_all(ImageFolderConfig(path=tmp_path)).batch([0])
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    assert (moved.names, moved.indices) == (batch.names, batch.indices)
