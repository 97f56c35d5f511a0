"""What counts as an image, in folders and tars, and where labels are found."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgtok.data import images as opening
from imgtok.data.files import Entry, LeftOut, Listing, begins_like_an_image, list_folder, numbered_images, stem_of
from imgtok.data.images import open_images, open_split, require_labels
from imgtok.data.labels import DataError, as_numbers
from imgtok.data.shards import same_images
from imgtok.data.sources import FolderRecords, ImageFolderConfig, differing, expand, places_all_over
from imgtok.data.tar import TarConfig, TarRecords
from imgtok.data.trained_on import Training
from imgtok.metrics.saved_images import SavedImages


def picture(value: int = 0, kind: str = "png", size: int = 8) -> bytes:
    """An image of one grey value, by which a test recognises it."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    """Text is what a link leads to."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            if isinstance(data, str):
                header.type, header.linkname = tarfile.SYMTYPE, data
                tar.addfile(header)
            else:
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


def folder(path: Path, **options) -> FolderRecords:
    return FolderRecords(ImageFolderConfig(path=path, **options))


def tar(path: Path, **options) -> TarRecords:
    return TarRecords(TarConfig(path=str(path), **options))


def names(records) -> list[str]:
    """Relative to the folder or the tar."""
    root = getattr(records, "_root", None)
    found = [records[index].name for index in range(len(records))]
    return [os.path.relpath(name, root) if root else name.partition(":")[2] for name in found]


# ---------------------------------------------------------------- what is an image


def messy(root: Path) -> Path:
    """Eight images in `cat`, four by a link in `dog`, and what is none."""
    for i in range(4):
        write(root / "set" / "cat" / f"{i}.png", picture(i))
        write(root / "elsewhere" / f"{i}.png", picture(10 + i))
    (root / "set" / "dog").symlink_to("../elsewhere")
    (root / "set" / "cat" / "again").symlink_to("..")  # a loop
    cat = root / "set" / "cat"
    for name, kind in (("a.jfif", "jpeg"), ("b.avif", "avif"), ("bare", "png"), ("c.1", "bmp")):
        write(cat / name, picture(20, kind))
    write(cat / ".ipynb_checkpoints" / "0.png", picture())
    write(cat / "._0.png", b"what macOS leaves")
    write(root / "set" / "__MACOSX" / "cat" / "0.png", picture())
    write(cat / "Thumbs.db", picture())
    write(cat / "notes.txt", b"text")
    write(cat / "word", b"BMP and P3 begin such words")
    write(cat / "empty.png")
    (cat / "gone.png").symlink_to("nowhere.png")
    return root / "set"


def test_the_same_files_are_images_to_training_and_scoring(tmp_path, caplog):
    root = messy(tmp_path)
    with caplog.at_level(logging.INFO):
        records, saved = folder(root), SavedImages(root)
    wanted = ["cat/" + n for n in ("0.png", "1.png", "2.png", "3.png", "a.jfif", "b.avif", "bare", "c.1")]
    wanted += [f"dog/{i}.png" for i in range(4)]
    assert names(records) == wanted
    assert [saved.name(i) for i in range(len(saved))] == [stem_of(name) for name in wanted]
    told = "4 hidden, 1 .txt, 1 without an ending, 2 unreadable (cat/empty.png, cat/gone.png)"
    assert str(records.left_out) == told
    assert f"kept 12 images; left out: {told}" in caplog.text


def test_the_start_of_a_job_says_what_was_kept(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        open_images(ImageFolderConfig(path=messy(tmp_path)), 8, held_out_fraction=0.0)
    assert "set: kept 12 images; left out: 4 hidden" in caplog.text
    assert "; 2 classes (class folders: cat, dog)" in caplog.text


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "avif", "jpeg2000", "ppm", "qoi"])
def test_first_bytes_of_what_is_read_here(kind):
    assert begins_like_an_image(picture(3, kind)[:32])


@pytest.mark.parametrize("text", [b"BMW sells cars in many", b"P3 is a test", b"RIFF....WAVEfmt", b"", b"MM", b"{}"])
def test_first_bytes_of_other_files(text):
    assert not begins_like_an_image(text)


def test_folders_that_link_to_each_other_end(tmp_path):
    write(tmp_path / "a" / "1.png", picture())
    write(tmp_path / "b" / "2.png", picture())
    (tmp_path / "a" / "x").symlink_to("../b")
    (tmp_path / "b" / "y").symlink_to("../a")
    found = [entry.name for entry in list_folder(tmp_path).images]
    assert found == ["a/1.png", "a/x/2.png", "b/2.png", "b/y/1.png"]


def test_counts_in_words():
    left_out = Listing(others={"a.txt": Entry("a.txt", 1), "b.heic": Entry("b.heic", 1)}).left_out(["a.txt"])
    left_out.add(LeftOut(unreadable=["1.png", "2.png", "3.png", "4.png"]))
    assert str(left_out) == "1 .heic, 4 unreadable (1.png, 2.png, 3.png, ...)"


def test_samples_are_numbered_images_that_are_not_empty(tmp_path):
    for name in ("000000.png", "grid.png", "._000001.png", "000003.jpg"):
        write(tmp_path / name, picture())
    write(tmp_path / "000001.png")
    assert list(numbered_images(tmp_path)) == [0]
    assert numbered_images(tmp_path / "none") == {}


# ---------------------------------------------------------------- tars


def test_keys_with_dots_are_images_of_their_own(tmp_path):
    members = {
        "photo_v1.0.jpg": picture(0, "jpeg"),
        "photo_v1.0.cls": b"4",
        "photo_v1.1.jpg": picture(1, "jpeg"),
        "photo_v1.1.cls": b"2",
        "photo_v1.1.txt": b"a caption",
        "22.01.bmp": picture(2, "bmp"),
        "22.cls": b"1",
        "._22.01.bmp": b"hidden",
    }
    records = tar(write_tar(tmp_path / "x.tar", members))
    assert names(records) == ["photo_v1.0.jpg", "photo_v1.1.jpg", "22.01.bmp"]
    assert records.labels.values.tolist() == [4, 2, 1]
    assert [records[i].text for i in range(3)] == ["", "a caption", ""]
    assert str(records.left_out) == "1 hidden"


def test_images_of_one_key_share_its_label_unless_another_image_has_it(tmp_path):
    members = {"a.left.png": picture(0), "a.right.png": picture(1), "a.cls": b"3"}
    assert tar(write_tar(tmp_path / "x.tar", members)).labels.values.tolist() == [3, 3]
    with pytest.raises(DataError, match=r"a\.left\.png: no label in KEY.cls"):
        tar(write_tar(tmp_path / "y.tar", members | {"a.png": picture(2)}))


def test_links_in_tars_lead_to_files_and_folders(tmp_path):
    members = {
        "a/1.png": picture(1),
        "a/link.png": "1.png",
        "b": "a",
        "a/up": "..",
        "a/gone.png": "nothing.png",
        "c.png": "d.png",
        "d.png": "c.png",
    }
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as archive:  # a second name of one file, as tar keeps it
        header = tarfile.TarInfo("twice.png")
        header.type, header.linkname = tarfile.LNKTYPE, "a/1.png"
        archive.addfile(header)
    records = tar(path)
    assert names(records) == ["a/1.png", "a/link.png", "b/1.png", "b/link.png", "twice.png"]
    assert {records[i].data for i in range(5)} == {picture(1)}
    assert records.left_out.unreadable == ["a/gone.png", "c.png", "d.png"]


def test_a_folder_of_tars_and_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for i in (1, 0):
        (tmp_path / "tars").mkdir(exist_ok=True)
        write_tar(tmp_path / "tars" / f"{i}.tar", {"a.png": picture(i)})
    records = TarRecords(TarConfig(path="~/tars"))
    assert [records[i].data for i in range(2)] == [picture(0), picture(1)]
    assert expand("~/tars/*.tar") == [str(tmp_path / "tars" / f"{i}.tar") for i in range(2)]
    write(tmp_path / "c" / "1.png", picture())
    assert len(folder(Path("~"), labels="none")) == 1


def test_a_class_that_a_link_lost_is_named(tmp_path):
    write(tmp_path / "ant" / "1.png", picture())
    (tmp_path / "bee").symlink_to("/gone/bee")
    (tmp_path / "ant" / "round").symlink_to("round")
    assert str(folder(tmp_path, labels="none").left_out) == "2 unreadable (bee, ant/round)"
    with pytest.raises(DataError, match=r"/bee: a link to nothing, where a class folder may have been; mend or remove"):
        folder(tmp_path)  # else the classes after it would have other numbers
    packed = tar(write_tar(tmp_path / "x.tar", {"ant/1.png": picture(), "bee": "gone/bee"}))
    assert str(packed.left_out) == "1 unreadable (bee)"


def test_what_packing_on_a_mac_leaves_is_hidden(tmp_path):
    left = ("PaxHeader/a.png", "PaxHeaders.7/a.png", "__MACOSX/._a.png", "c/._a.png", "../.a.png")
    records = tar(write_tar(tmp_path / "x.tar", dict.fromkeys(left, b"x") | {"../a.png": picture()}))
    assert (names(records), records.left_out.counts) == (["a.png"], {"hidden": 5})


def test_a_tar_that_is_not_whole_is_never_a_shorter_one(tmp_path, caplog):
    first, second = (
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": picture(), f"{name}.cls": b"0"}) for name in "ab"
    )
    data = first.read_bytes()
    end = 4 * tarfile.BLOCKSIZE  # header and image, header and label
    cases = {
        "more files follow after its end.*--ignore-zeros": data + second.read_bytes(),
        r"damaged or cut off at byte 1,024 of": data[:1024] + b"x" * 512 + data[1536:],
        r"damaged or cut off at byte 2,048 of 2,100": data[:end] + second.read_bytes()[:52],
    }
    for message, broken in cases.items():
        with pytest.raises(DataError, match=message):
            tar(write(tmp_path / "broken.tar", broken))
    tar(write(tmp_path / "open.tar", data[:end]))
    assert "open.tar: has no end, so its last images may be missing" in caplog.text


@pytest.mark.parametrize(("name", "mode"), [("x.tar.gz", "w:gz"), ("x.tar", "w:gz"), ("a x.tar.bz2", "w:bz2")])
def test_the_command_that_unpacks_a_tar_works(tmp_path, name, mode):
    with tarfile.open(tmp_path / name, mode) as file:
        file.add(write(tmp_path / "a.png", picture(7)), "a.png")
    with pytest.raises(DataError, match="unpack it first: ") as caught:
        tar(tmp_path / name)
    command, _, place = str(caught.value).partition("first: ")[2].rpartition(" (in ")
    before = {*tmp_path.iterdir()}
    subprocess.run(command, shell=True, cwd=place.rstrip(")"), check=True)
    (made,) = {*tmp_path.iterdir()} - before
    assert tar(made)[0].data == picture(7)


def test_a_path_of_another_kind_is_told_which(tmp_path):
    (tmp_path / "tars").mkdir()
    packed = write_tar(tmp_path / "tars" / "x.tar", {"a.png": picture()})
    for path, message in {
        packed: "a file, not a folder of images; data.kind=webdataset reads tars",
        tmp_path / "tars": "no images; found 1 other file .1 .tar.; data.kind=webdataset reads tars",
        Path("file:///x/y"): r"no such folder of images \(write the path without file://\)",
        Path("s3://x/y"): r"no such folder of images \(only local files are read: download it\)",
    }.items():
        with pytest.raises((DataError, FileNotFoundError), match=message):
            folder(path)
    with pytest.raises(FileNotFoundError, match=r"no files in this folder end in .tar; it holds x.tar.gz"):
        tar(write(tmp_path / "packed" / "x.tar.gz").parent)
    with pytest.raises(DataError, match="a zip archive; unpack it"):
        tar(write(tmp_path / "x.zip", b"PK\3\4" + bytes(600)))
    odd = write_tar(tmp_path / "{a,b}[1].tar", {"a.png": picture()})
    assert expand(str(odd)) == [str(odd)]


def test_captions_are_read_alike_in_folders_and_tars(tmp_path):
    sides = {
        "1.txt": b"\xef\xbb\xbfa cat\r\n",
        "2.txt": "ä dog".encode("utf-16"),
        "3.json": b'{"caption": "a fox"}',
        "4.json": b'{"text": "an ant"}',
        "5.json": b"[",
    }
    files = {f"{i}.png": picture(i) for i in range(1, 7)} | sides
    for name, data in files.items():
        write(tmp_path / "set" / name, data)
    for records in (folder(tmp_path / "set"), tar(write_tar(tmp_path / "x.tar", files))):
        assert [records[i].text for i in range(6)] == ["a cat", "ä dog", "a fox", "an ant", "", ""]


# ---------------------------------------------------------------- labels


def test_the_ways_of_labels(tmp_path):
    for i in range(4):
        write(tmp_path / "store" / f"{i}.png", picture(i))
        write(tmp_path / "store" / f"{i}.json", json.dumps({"kind": {"of": "dog" if i % 2 else "cat"}}).encode())
    assert folder(tmp_path).labels.names == ("store",)  # nothing else is there
    by_field = folder(tmp_path, labels="json.kind.of")
    assert (by_field.labels.values.tolist(), by_field.labels.names) == ([0, 1, 0, 1], ("cat", "dog"))
    assert str(by_field.left_out) == ""
    write(tmp_path / "labels.csv", b"file_name,label\n" + b"".join(b"store/%d.png,%d\n" % (i, 3 - i) for i in range(4)))
    assert "labels.csv" in folder(tmp_path).labels.missing  # not the storage folder as class 0
    assert folder(tmp_path, labels="labels.csv").labels.values.tolist() == [3, 2, 1, 0]
    edm = {"labels": [[f"store/{i}.png", i % 3] for i in range(4)]}
    write(tmp_path / "dataset.json", json.dumps(edm).encode())
    assert folder(tmp_path).labels.values.tolist() == [0, 1, 2, 0]
    for i in range(4):
        write(tmp_path / "store" / f"{i}.cls", b"7")
    assert folder(tmp_path, labels="cls").labels.values.tolist() == [7] * 4
    assert folder(tmp_path, labels="none").labels.num_classes == 0
    assert folder(tmp_path, labels="folders").labels.values.tolist() == [0] * 4


def test_labels_that_are_not_understood_are_never_class_0(tmp_path):
    for i in range(2):
        write(tmp_path / "0" / f"{i}.png", picture(i))
    write(tmp_path / "dataset.json", b'{"labels": null}')
    assert folder(tmp_path).labels.num_classes == 0
    for text in (b'{"classes": {}}', b"[", b'{"labels": [[1, 2, 3]]}'):
        write(tmp_path / "dataset.json", text)
        with pytest.raises(DataError, match=r"dataset\.json: labels that are not understood.*data\.labels=none"):
            folder(tmp_path)
    write(tmp_path / "dataset.json", b'{"labels": [["0/0.png", 1]]}')
    with pytest.raises(DataError, match=r"0/1\.png: no label in dataset\.json, though others have"):
        folder(tmp_path)
    with pytest.raises(DataError, match=r"given 'klass'; it can be auto, none"):
        folder(tmp_path, labels="klass")
    with pytest.raises(DataError, match=r"no such file of labels"):
        folder(tmp_path, labels="other.csv")


def test_jobs_that_keep_labels_refuse_data_without(tmp_path):
    write(tmp_path / "a.png", picture())
    source = open_images(ImageFolderConfig(path=tmp_path), 8, held_out_fraction=0.0)
    with pytest.raises(
        DataError, match=r"the cache keeps labels, .* lie in no class folders. data.labels=none .*dataset\.json"
    ):
        require_labels(source, "the cache")
    require_labels(open_images(ImageFolderConfig(path=tmp_path, labels="none"), 8, held_out_fraction=0.0), "the cache")


def test_nested_folders_are_not_silently_classes(tmp_path):
    for name in ("super0/a/1.png", "super0/b/1.png", "super1/c/1.png"):
        write(tmp_path / name, picture())
    found = folder(tmp_path).labels
    assert found.num_classes == 0
    assert "data.labels=folders takes the 2 upper folders" in found.missing
    assert folder(tmp_path, labels="folders").labels.names == ("super0", "super1")
    assert folder(tmp_path, labels="subfolders").labels.names == ("super0/a", "super0/b", "super1/c")


@pytest.mark.parametrize(
    "stored",
    [
        "{thousand:05d}/img{number:08d}.png",
        "{rounded:05d}/{number:05d}.png",
        "{thousand:05d}/{thousand:05d}{rest:04d}.png",
    ],
)
def test_folders_that_divide_a_numbered_set_are_no_classes(tmp_path, stored):
    for number in (0, 1, 1000, 12345):
        thousand = number // 1000
        name = stored.format(number=number, thousand=thousand, rounded=1000 * thousand, rest=number % 1000)
        write(tmp_path / name, picture())
    found = folder(tmp_path).labels
    assert (found.num_classes, "only divide a numbered set" in found.missing) == (0, True)
    assert folder(tmp_path, labels="folders").labels.num_classes == 3
    write(tmp_path / "cats" / "1.png", picture())
    assert folder(tmp_path).labels.num_classes == 4


def test_a_file_that_has_our_labels_is_named_whatever_it_is_called(tmp_path):
    for name in ("ant/1.png", "ant/ä 2.png", "bee/1.png"):
        write(tmp_path / name, picture())
    write(tmp_path / "readme.txt", b"ant/1.png is nice\nbee/1.png is nicer")
    write(tmp_path / "classes.txt", b"ant\nbee\n")
    write(tmp_path / "files.txt", b"ant/1.png\nant/2.png\n")
    assert folder(tmp_path).labels.names == ("ant", "bee")
    table = "ant/1.png 4\nant/a\u0308 2.png 5\nbee/1.png 6\n"  # as a Mac writes ä
    write(tmp_path / "val.txt", table.encode())
    found = folder(tmp_path).labels
    assert (found.num_classes, "data.labels=val.txt reads it" in found.missing) == (0, True)
    assert folder(tmp_path, labels="val.txt").labels.values.tolist() == [4, 5, 6]
    (tmp_path / "val.txt").rename(tmp_path.with_name("beside.csv"))
    tmp_path.with_name("beside.csv").write_text(
        "file,class\n" + table.replace(" 4", ",4").replace(" 5", ",5").replace(" 6", ",6")
    )
    assert folder(tmp_path, labels="beside.csv").labels.values.tolist() == [4, 5, 6]


def test_fields_that_are_there_are_named(tmp_path):
    files = {"1.png": picture(), "2.png": picture(), "1.json": b'{"caption": "x"}', "2.json": b'{"class_id": 3}'}
    for name, data in files.items():
        write(tmp_path / "set" / name, data)
    for records in (folder(tmp_path / "set"), tar(write_tar(tmp_path / "x.tar", files))):
        assert "has the fields class_id: data.labels=json.FIELD takes one" in records.labels.missing
    with pytest.raises(DataError, match="no label in clas in KEY.json.*has the fields class_id"):
        folder(tmp_path / "set", labels="json.clas")
    write(tmp_path / "set" / "2.json", b'{"label": 3}')  # which the first lacks
    with pytest.raises(DataError, match=r"1.png: no label in label in KEY.json, though others have"):
        folder(tmp_path / "set")


def test_a_folder_of_images_in_each_class_is_no_class(tmp_path):
    for name in ("ant/images/1.png", "bee/images/1.png"):
        write(tmp_path / name, picture())
    assert folder(tmp_path).labels.names == ("ant", "bee")


def test_numeric_class_folders_are_in_the_order_of_text_and_say_so_once(tmp_path, caplog):
    for name in ("0", "1", "2", "10"):
        write(tmp_path / name / "1.png", picture())
    with caplog.at_level(logging.INFO):
        labels = folder(tmp_path).labels
        assert folder(tmp_path).labels.names == labels.names
    assert labels.names == ("0", "1", "10", "2")
    assert caplog.text.count("folder 10 is class 2") == 1
    for name in ("c1", "c2", "c10"):
        write(tmp_path / "named" / name / "1.png", picture())
    with caplog.at_level(logging.INFO):
        folder(tmp_path / "named")
    assert "in the order of text, as torchvision has it (c1, c10, c2): folder c10 is class 1" in caplog.text


def test_text_labels_become_classes_and_a_mixture_is_named():
    numbers, found = as_numbers(["dog", "cat", "dog"], str, "x")
    assert (numbers.tolist(), found) == ([1, 0, 1], ("cat", "dog"))
    assert as_numbers(["10", "2"], str, "x")[0].tolist() == [10, 2]
    assert as_numbers([True, 2.0], str, "x")[0].tolist() == [1, 2]
    for values in (["a", 1], [1, "a"], [0, [1]], [0.5], [None, 1]):
        with pytest.raises(DataError, match="labels must be whole numbers or text"):
            as_numbers(values, str, "x")


def table_of(root: Path, table: str, names: tuple[str, ...], how: str = "labels.csv", **options):
    for name in names:
        write(root / name, picture())
    write(root / how, table.encode())
    return folder(root, labels=how, **options).labels


def test_a_name_that_means_two_images_labels_neither(tmp_path):
    same = ("a/0.png", "b/0.png")
    with pytest.raises(DataError, match=r"0\.png may be .*a/0\.png or .*b/0\.png; name each by its path"):
        table_of(tmp_path, "file,label\n0.png,3\n", same)
    assert table_of(tmp_path, "file,label\na/0.png,3\nb/0.png,1\n", same).values.tolist() == [3, 1], "the advice"
    stems = tmp_path / "stems"
    with pytest.raises(DataError, match=r"0 may be .*0\.jpg or .*0\.png"):
        table_of(stems, "file,label\n0,3\n", ("0.jpg", "0.png"))
    assert table_of(stems, "file,label\n0.jpg,3\n0.png,1\n", ()).values.tolist() == [3, 1]
    (stems / "0.jpg").rename(stems / "0.webp")
    with pytest.raises(DataError, match=r"0\.webp: no label in labels\.csv, though others have"):
        table_of(stems, "file,label\n0.jpg,3\n0.png,1\n", ())
    write(tmp_path / "tars" / "labels.csv", b"file,label\n0.png,3\n")  # one file for several tars
    for name in "xy":
        write_tar(tmp_path / "tars" / f"{name}.tar", {"0.png": picture()})
    with pytest.raises(DataError, match=r"0\.png may be .*x\.tar:0\.png or .*y\.tar:0\.png"):
        tar(tmp_path / "tars", labels="labels.csv")


@pytest.mark.parametrize(
    ("how", "table"),
    [
        ("labels.csv", "file,label\n1.png,0\n2.png,1\n1.png,2\n"),
        ("val.txt", "1.png 0\n2.png 1\n./1.png 2\n"),
        ("labels.json", '{"1.png": 0, "2.png": 1, "1.png": 2}'),
        ("dataset.json", '{"labels": [["1.png", 0], ["2.png", 1], ["1.png", 2]]}'),
    ],
)
def test_two_labels_of_one_image_are_refused(tmp_path, how, table):
    with pytest.raises(DataError, match=rf"{how}: .*1\.png .*0'? and further down '?2"):
        table_of(tmp_path, table, ("1.png", "2.png"), how)
    once = table.replace("1.png,2", "1.png,0").replace("1.png 2", "1.png 0").replace('.png": 2', '.png": 0')
    once = once.replace('1.png", 2', '1.png", 0')
    assert table_of(tmp_path, once, (), how).values.tolist() == [0, 1], "the same row twice is none"


def test_labels_become_no_classes_that_nobody_meant(tmp_path, caplog):
    images = ("1.png", "2.png", "3.png")

    def of(*labels: object, **options):
        rows = "".join(f"{name}, {label}\n" for name, label in zip(images, labels, strict=True))
        return table_of(tmp_path, f"file_name, label\n{rows}", images, **options)

    assert of(" cat", "dog ", "cat").names == ("cat", "dog")
    assert of("0.0", "2.0", "1.0").values.tolist() == [0, 2, 1]
    with pytest.raises(DataError, match=r"1\.png: label -1 is outside the classes"):
        of(-1, 0, 1)
    with pytest.raises(DataError, match=r"3\.png: label 20200103 would make 20200104 classes of 3 images"):
        of(20200101, 20200102, 20200103)
    assert of(1, 2, 20_000, num_classes=20_001).num_classes == 20_001, "the advice, followed"
    assert of(1, 2, 2).in_words == "3 classes, 1 of them without images (labels.csv)"
    assert of(0, 1, 2).in_words == "3 classes (labels.csv)"
    with caplog.at_level(logging.INFO):
        of("k1", "k2", "k10")
    assert "the classes of labels.csv are in the order of text (k1, k10, k2): name k10 is class 1" in caplog.text


def test_tars_take_folders_as_classes_when_asked(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"cat/1.png": picture(), "dog/1.png": picture()})
    assert "data.labels=folders takes the 2 folders" in tar(path).labels.missing
    assert tar(path, labels="folders").labels.names == ("cat", "dog")


# ---------------------------------------------------------------- parts, and fewer images


def test_train_and_val_folders_are_the_parts(tmp_path, caplog):
    for i in range(4):
        for kind in ("ant", "bee", "cow"):
            write(tmp_path / "train" / kind / f"{i}.png", picture(i))
    write(tmp_path / "val" / "cow" / "1.png", picture(9))
    with caplog.at_level(logging.INFO):
        train, shown, words = open_split(ImageFolderConfig(path=tmp_path), 8, flip=False, crop="center", held_out=0.1)
    assert (len(train), len(shown)) == (12, 1)
    assert shown.batch([0]).labels.tolist() == [2]  # a class has the number that it has in training
    assert shown.class_names == train.class_names == ("ant", "bee", "cow")
    assert f"held-out images: those of {tmp_path / 'val'}" in caplog.text
    assert words == f"{tmp_path}: 12 images to train on, 1 held out, 3 classes, 8 px"
    write(tmp_path / "val" / "dodo" / "1.png", picture(9))
    with pytest.raises(DataError, match="class 'dodo' is none of the 3 classes"):
        open_images(ImageFolderConfig(path=tmp_path), 8, split="held_out")
    elsewhere = ImageFolderConfig(path=tmp_path / "train", val_path=tmp_path / "train" / "ant", labels="none")
    assert len(open_images(elsewhere, 8, split="held_out")) == 4
    assert len(open_images(elsewhere, 8)) == 12


def test_a_class_called_train_is_no_part(tmp_path, caplog):
    for name in ("bus/1.png", "train/1.png"):
        write(tmp_path / name, picture())
    (tmp_path / "notes").mkdir()
    opened = open_images(ImageFolderConfig(path=tmp_path, labels="subfolders"), 8, held_out_fraction=0.0)
    assert opened.class_names == ("bus", "train")
    write(tmp_path / "val" / "1.png", picture())
    write(tmp_path / "test" / "1.png", picture())
    with caplog.at_level(logging.INFO):
        assert len(open_images(ImageFolderConfig(path=tmp_path), 8)) == 1
    assert "the data set is its part `train`; left out: bus/, notes/, test/" in caplog.text


def test_tars_beside_the_parts_are_named_and_a_pattern_may_mean_folders(tmp_path, caplog):
    (tmp_path / "set").mkdir()
    for name in ("train-0", "val-0", "extra"):
        write_tar(tmp_path / "set" / f"{name}.tar", {f"{name}.png": picture()})
    with caplog.at_level(logging.INFO):
        assert len(open_images(TarConfig(path=str(tmp_path / "set")), 8)) == 1
    assert "the data set is its part `train`; left out: extra.tar" in caplog.text
    assert len(tar(tmp_path / "s*")) == 3


def test_captions_of_a_table_are_no_labels(tmp_path):
    for name in ("ant/1.png", "bee/1.png"):
        write(tmp_path / name, picture())
    write(tmp_path / "metadata.jsonl", b'{"file_name": "ant/1.png", "text": "an ant"}\n')
    found = folder(tmp_path)
    assert found.labels.names == ("ant", "bee")
    said = "1 metadata.jsonl (captions in it are not read: KEY.txt beside each image is)"
    assert str(found.left_out) == said
    write(tmp_path / "ant" / "1.txt", b"an ant")
    assert [folder(tmp_path)[place].text for place in range(2)] == ["an ant", ""], "the advice, followed"


def test_overviews_beside_folders_of_samples_are_no_images(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name / "000000.png", picture())
        write(tmp_path / name / "samples.json", b'{"labels": [0]}')
        write(tmp_path / f"{name}-grid.png", picture(size=20))
    found = folder(tmp_path)
    assert (names(found), found.labels.names) == (["cat/000000.png", "dog/000000.png"], ("cat", "dog"))
    assert str(found.left_out) == "2 .json, 1 overview (cat-grid.png), 1 overview (dog-grid.png)"
    assert len(SavedImages(tmp_path)) == 2
    (tmp_path / "dog" / "samples.json").unlink()  # then it may be any picture
    assert "dog-grid.png" in names(folder(tmp_path, labels="none"))


def test_a_mistyped_part_is_refused_by_jobs_that_do_not_read_it(tmp_path):
    write(tmp_path / "train" / "a" / "1.png", picture())
    with pytest.raises(FileNotFoundError, match="vall: no such folder of images"):
        open_images(ImageFolderConfig(path=tmp_path / "train", val_path=tmp_path / "vall"), 8)
    packed = write_tar(tmp_path / "x.tar", {"a.png": picture()})
    with pytest.raises(FileNotFoundError, match=r"vall-\*\.tar: no such file"):
        open_images(TarConfig(path=str(packed), val_path=str(tmp_path / "vall-*.tar")), 8)


def test_files_of_a_folder_are_parts_by_their_names(tmp_path):
    for name, count in (("train-000", 2), ("train-001", 2), ("val-000", 1)):
        write_tar(tmp_path / f"{name}.tar", {f"{i}.png": picture(i) for i in range(count)})
    config = TarConfig(path=str(tmp_path))
    assert len(open_images(config, 8)) == 4
    assert len(open_images(config, 8, split="held_out")) == 1


def test_few_images_have_one_that_is_held_out(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", picture(i))
    config = ImageFolderConfig(path=tmp_path)
    assert [len(open_images(config, 8, split=part)) for part in ("train", "held_out")] == [2, 1]


def test_num_takes_images_from_all_over_the_set(tmp_path, caplog):
    for kind in "abcd":
        for i in range(5):
            write(tmp_path / kind / f"{i}.png", picture(i))
    with caplog.at_level(logging.INFO):
        source = open_images(ImageFolderConfig(path=tmp_path, num=8), 8, held_out_fraction=0.0)
    assert source.batch(range(8)).labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert "8 of 20 images, from each class its share" in caplog.text
    flat = open_images(ImageFolderConfig(path=tmp_path, num=8, labels="none"), 8, held_out_fraction=0.0)
    assert len(flat) == 8
    assert len(open_images(ImageFolderConfig(path=tmp_path, num=99), 8, held_out_fraction=0.0)) == 20


@pytest.mark.parametrize("labels", [np.arange(256) // 4, np.arange(256) % 64])
def test_spread_meets_all_classes_in_any_order(labels):
    chosen = places_all_over(256, 64, labels)
    assert sorted(labels[chosen]) == list(range(64))
    assert len(set(labels[places_all_over(256, 64)])) > 32  # it knows no labels
    assert np.array_equal(places_all_over(7, 7), np.arange(7))
    with pytest.raises(ValueError, match="at most all"):
        places_all_over(3, 4)


# ---------------------------------------------------------------- identity


def test_identity_knows_whether_others_are_held_out(tmp_path):
    for i in range(2):
        write(tmp_path / "train" / "ant" / f"{i}.png", picture(i))
    config = ImageFolderConfig(path=tmp_path)
    alone = open_images(config, 8).identity
    write(tmp_path / "val" / "ant" / "9.png", picture(9))
    apart = open_images(config, 8).identity
    assert apart == opening.Opened(config).identity
    assert list(differing(json.loads(alone), json.loads(apart), {})) == [("own_held_out", False, True)]
    assert not same_images(alone, apart)
    older = json.loads(apart)
    del older["own_held_out"]
    assert not list(differing(older, json.loads(apart), {})), "older runs go on"
    assert same_images(json.dumps(older), apart)
    then = Training(model="m", data=config, held_out=0.1, image_size=8, identity=json.loads(apart))
    assert then.had(config, json.loads(alone)), "the images that were trained on are the same"
    (tmp_path / "val").rename(tmp_path / "gone")
    assert then.has_held_out, "all of these were trained on, so none of them is shown as held out"


def test_identity_knows_content_and_not_the_place(tmp_path):
    def made(root: Path, last: bytes = b"") -> dict:
        for i in range(3):
            write(root / "ant" / f"{i}.png", picture(i))
        write(root / "bee" / "1.png", last or picture(7))
        return folder(root).identity()

    first = made(tmp_path / "a")
    assert first == made(tmp_path / "b")
    changed = {key for key, value in made(tmp_path / "c", picture(8)).items() if value != first[key]}
    assert changed == {"content"}
    (tmp_path / "b" / "bee").rename(tmp_path / "b" / "cow")
    changed = {key for key, value in folder(tmp_path / "b").identity().items() if value != first[key]}
    assert changed == {"names", "labels"}
    packed = {f"{kind}/{i}.png": picture(i) for kind in "ab" for i in range(2)}
    one, two = (tar(write_tar(tmp_path / f"{name}.tar", packed)) for name in "xy")
    assert one.identity() == two.identity()
    assert json.loads(opening.open_images(TarConfig(path=str(tmp_path / "x.tar"), num=2), 8).identity)["num"] == 2
