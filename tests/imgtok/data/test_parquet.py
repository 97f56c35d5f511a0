"""Parquet files read in place. The oracle of what they hold is pyarrow."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgtok.data.arrow import ArrowRecords, HubConfig
from imgtok.data.images import open_split
from imgtok.data.parquet import ParquetConfig, ParquetRecords, parquet_files
from imgtok.data.parquet_pages import Chunk, PageReader
from imgtok.data.sources import DataError
from imgtok.pictures import UnreadableImage

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


def rows(count: int) -> list[dict]:
    return [{"bytes": b"%d" % i, "path": None} for i in range(count)]


def write(path: Path, columns: dict, features: dict | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def opened(path: Path, **options) -> ParquetRecords:
    return ParquetRecords(ParquetConfig(path=str(path), **options))


def read(records) -> list[bytes]:
    return [records[i].data for i in range(len(records))]


# Pages


def mixed_rows(count: int, size: int, nulls: float, draws: random.Random) -> list[dict | None]:
    few = [draws.randbytes(size) for _ in range(3)]  # what a dictionary is good for
    made = []
    for i in range(count):
        data = draws.choice([few[i % 3], draws.randbytes(draws.randrange(size + 1))])
        data = None if draws.random() < nulls else data
        made.append({"bytes": data, "path": f"p{i % 5}" if i % 2 else None} if data or i % 3 else None)
    return made


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_layout_gives_what_pyarrow_reads(tmp_path, compression, version):
    draws = random.Random(0)
    for dictionary, nulls, size in product((False, True), (0.0, 0.3, 1.0), (0, 40, 20_000)):
        made = mixed_rows(60, size, nulls, draws)
        path = write(
            tmp_path / "x.parquet",
            {"image": pa.array(made, IMAGE)},
            compression=compression,
            data_page_version=version,
            use_dictionary=dictionary,
            row_group_size=25,
            data_page_size=2000,
            write_batch_size=draws.choice([3, 17, 1024]),
        )
        records, order = opened(path), list(range(60))
        draws.shuffle(order)
        for i in order:
            group, row = records._place(i)
            for chunk, leaf in ((group.data, "bytes"), (group.path, "path")):
                found, wanted = records._reader.value(chunk, row), (made[i] or {}).get(leaf)
                assert found == (wanted.encode() if isinstance(wanted, str) else wanted)
        in_place = [pages is not None for pages in records._reader._tables.values()]
        assert all(in_place) or compression == "lz4"  # of which there are two, and pyarrow does not tell which


@pytest.mark.parametrize("encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_layouts_that_are_left_to_pyarrow(tmp_path, encoding):
    columns = {"image": rows(50), "text": [f"caption {i}" for i in range(50)]}
    encodings = {"image.bytes": encoding, "image.path": "PLAIN", "text": encoding}
    path = write(tmp_path / "x.parquet", columns, use_dictionary=False, column_encoding=encodings, row_group_size=20)
    records = opened(path)
    assert read(records) == [b"%d" % i for i in range(50)]
    assert [records[i].text for i in (49, 0)] == ["caption 49", "caption 0"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_plain_columns_of_bytes(tmp_path, kind):
    path = write(tmp_path / "x.parquet", {"picture": pa.array([b"a", None, b"", b"ccc"], pa.binary()).cast(kind)})
    records = opened(path)
    assert [records[0].data, records[2].data, records[3].data] == [b"a", b"", b"ccc"]
    with pytest.raises(UnreadableImage, match=r"x.parquet\[1\]: column 'picture' is empty"):
        records[1]


def test_only_the_value_is_read_of_pages_without_compression(tmp_path, monkeypatch):
    data = [random.Random(i).randbytes(50_000) for i in range(40)]
    path = write(tmp_path / "x.parquet", {"image": data}, compression="none", use_dictionary=False)
    records, lengths = opened(path), []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: lengths.append(size) or real(file, size, at))
    assert records[33].data == data[33]
    lengths.clear()
    assert records[34].data == data[34]
    assert lengths == [50_000]


def test_memory_is_bounded_by_the_cache(tmp_path):
    data = [random.Random(i).randbytes(10_000) for i in range(100)]
    path = write(tmp_path / "x.parquet", {"image": data}, compression="snappy", row_group_size=10)
    records = opened(path)
    records._reader = PageReader(cache_bytes=250_000)
    order = np.random.default_rng(0).permutation(300) % 100
    assert all(records[int(i)].data == data[i] for i in order)
    held = [entry.nbytes for entry in records._reader._cached.values()]
    assert records._reader._held == sum(held) <= 250_000
    assert sum(held) > 100_000


def big(path: Path, monkeypatch, **options) -> ParquetRecords:
    """Records of 40 images in row groups of 10, where a process keeps less than 3 of the groups."""
    monkeypatch.setattr("imgtok.data.parquet.CACHE_BYTES", 250_000)
    monkeypatch.setattr("imgtok.data.parquet._CHEAP", 20_000)
    data = [random.Random(i).randbytes(9_000) for i in range(40)]
    return opened(write(path, {"image": data}, row_group_size=10, **options))


def test_compressed_blocks_beyond_memory_are_read_one_after_the_other(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    records = big(tmp_path / "x.parquet", monkeypatch, compression="snappy")
    blocks = records.blocks()
    assert (blocks.numbers.tolist(), blocks.together) == ([i // 10 for i in range(40)], 1)
    assert "lie in 4 compressed blocks of up to 0 MB, more than fit into memory" in caplog.text
    records._reader = PageReader(cache_bytes=250_000)
    decoded = []
    real = records._reader._body
    records._reader._body = lambda chunk, page: decoded.append(page) or real(chunk, page)
    for i in blocks.order(0, 0):
        records[int(i)]
    assert len(decoded) == len(set(decoded))  # every page once


def test_of_a_large_row_group_the_pages_are_blocks(tmp_path, monkeypatch):
    options = {"use_dictionary": False, "data_page_size": 30_000, "write_batch_size": 5, "compression": "snappy"}
    pages = big(tmp_path / "x.parquet", monkeypatch, **options)
    assert np.bincount(pages.blocks().numbers).tolist() == [5] * 8


def test_other_files_are_read_in_any_order(tmp_path, monkeypatch):
    assert big(tmp_path / "a.parquet", monkeypatch, compression="none").blocks() is None
    small_pages = {"use_dictionary": False, "data_page_size": 10_000, "write_batch_size": 1}
    assert big(tmp_path / "b.parquet", monkeypatch, compression="snappy", **small_pages).blocks() is None
    monkeypatch.undo()
    assert opened(tmp_path / "a.parquet").blocks() is None


def test_workers_get_records_without_open_files_or_pages(tmp_path):
    path = write(tmp_path / "x.parquet", {"image": [random.Random(i).randbytes(9000) for i in range(30)]})
    records = opened(path)
    first = read(records)
    state = pickle.dumps(records)
    assert len(state) < 5000
    assert read(pickle.loads(state)) == first


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_damage_is_told_by_row_and_file(tmp_path, compression):
    data = [random.Random(i).randbytes(3000) for i in range(40)]
    options = {"compression": compression, "use_dictionary": False, "row_group_size": 10}
    path = write(tmp_path / "x.parquet", {"image": data}, **options)
    offset = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    records = opened(path)
    assert records[15].data == data[15]
    with pytest.raises(UnreadableImage, match=r"x.parquet\[25\]: the Parquet file cannot be read there \(.+\)"):
        records[25]


def test_no_page_header_makes_the_reader_hang_or_take_memory(tmp_path):
    """Whatever stands in the bytes of a chunk, the answer is a value or an error."""
    path = write(tmp_path / "x.parquet", {"image": [b"abc"] * 20}, compression="none")
    records = opened(path)
    chunk = records._groups[0].data
    draws = random.Random(0)
    for _ in range(150):
        (tmp_path / "y").write_bytes(draws.randbytes(chunk.offset + chunk.size))
        damaged = chunk._replace(path=str(tmp_path / "y"))
        with pytest.raises((OSError, ValueError)):
            PageReader().value(damaged, 3)
    assert isinstance(chunk, Chunk)


@pytest.mark.slow
def test_nothing_is_written_and_no_home_is_needed(tmp_path):
    """In a process of its own, whose home and caches are a folder that cannot be written and stays empty."""
    path = write(tmp_path / "data" / "x.parquet", {"image": [png(i) for i in range(6)], "label": [0, 1, 2] * 2})
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    before = sorted(file for file in tmp_path.rglob("*"))
    code = (
        "from imgtok.data.images import *; from imgtok.data.loaders import eval_loader;"
        f"s = open_images(ParquetConfig(path={str(path)!r}), 8, held_out_fraction=0);"
        "print(sum(len(b.names) for b in eval_loader(s, 4, num_workers=1)), s.num_classes);"
        "import sys; assert 'datasets' not in sys.modules"
    )
    places = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"), str(home))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | places, capture_output=True, text=True)
    assert done.stdout.split() == ["6", "3"], done.stderr
    assert sorted(file for file in tmp_path.rglob("*")) == before


# Files


def test_a_folder_of_shards_is_a_data_set(tmp_path, monkeypatch):
    for number in (10, 2, 1):
        write(tmp_path / "set" / "data" / f"train-{number:05d}.parquet", {"image": [b"%d" % number]})
    write(tmp_path / "set" / ".cache" / "train-00003.parquet", {"image": [b"hidden"]})
    (tmp_path / "set" / "README.md").write_text("a card")
    assert read(opened(tmp_path / "set")) == [b"1", b"2", b"10"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(opened(Path("~/set"))) == [*read(opened(Path("~/set/data/*-0000*.parquet"))), b"10"]


def test_a_folder_with_several_splits_asks_which(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet", "test-0.parquet"):
        write(tmp_path / "data" / name, {"image": [b"x"]})
    with pytest.raises(DataError, match=r"several splits \(data/test-0.parquet, data/train-0.parquet\).*") as caught:
        opened(tmp_path)
    pattern = str(caught.value).split("path='")[1].rstrip("'")
    assert [Path(file).name for file in parquet_files(pattern)] == ["train-0.parquet", "train-1.parquet"]


def test_a_folder_is_read_as_other_folders_are(tmp_path, caplog):
    write(tmp_path / "else" / "b.parquet", {"image": [b"linked"]})
    write(tmp_path / "set" / "a.parquet", {"image": [b"own"]})
    write(tmp_path / "set" / "_temporary" / "0" / "part-0.parquet", {"image": [b"of Spark"]})
    write(tmp_path / "set" / "__MACOSX" / "a.parquet", {"image": [b"hidden"]})
    (tmp_path / "set" / "_SUCCESS").touch()
    (tmp_path / "set" / "more").symlink_to("../else")
    with caplog.at_level("INFO"):
        assert read(opened(tmp_path / "set")) == [b"own", b"linked"]
    assert "left out, as Spark does: 1 Parquet files, such as _temporary/0/part-0.parquet" in caplog.text


def test_a_folder_without_parquet_files(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no Parquet files \(\*.parquet\); the folder holds a.jpg"):
        opened(tmp_path)


def test_the_damaged_file_is_named_not_the_pattern(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.parquet", {"image": [b"x"]})
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"/1.parquet: not a readable Parquet file \("):
        opened(tmp_path)
    (tmp_path / "1.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"/1.parquet: not a readable Parquet file \("):
        opened(tmp_path)


def test_rows_are_named_by_their_file_and_place(tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.parquet", {"image": rows(5)}, row_group_size=2)
    records = opened(tmp_path)
    assert records[8].name == f"{tmp_path}/1.parquet[3]"
    assert records.name(4) == f"{tmp_path}/0.parquet[4]"
    with pytest.raises(IndexError):
        records[10]


def test_shards_must_agree_on_labels(tmp_path):
    write(tmp_path / "0.parquet", {"image": [b"x"], "label": [0]})
    write(tmp_path / "1.parquet", {"image": [b"x"], "label": ["cat"]})
    with pytest.raises(DataError, match=r"1.parquet: its labels are names, but numbers in .*0.parquet"):
        opened(tmp_path)
    write(tmp_path / "1.parquet", {"image": [b"x"]})
    with pytest.raises(DataError, match=r"1.parquet: its labels are none, but numbers in"):
        opened(tmp_path)
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        write(tmp_path / f"{number}.parquet", {"image": [b"x"], "label": [0]}, features)
    with pytest.raises(DataError, match=r"1.parquet: its classes are b, a, ... but a, b, ... in"):
        opened(tmp_path)


def test_a_part_for_tests_without_labels_is_held_out_all_the_same(tmp_path):
    write(tmp_path / "train-0.parquet", {"image": [png(), png()], "label": [0, 1]})
    write(tmp_path / "test-0.parquet", {"image": [png()], "label": [-1]})
    train, held_out, _ = open_split(ParquetConfig(path=str(tmp_path)), 8, flip=False, crop="center", held_out=0.1)
    assert (len(train), train.num_classes, len(held_out), held_out.num_classes) == (2, 2, 1, 0)
    assert held_out.labels_missing == "column label is -1 in all rows, which is no class"
    write(tmp_path / "test-0.parquet", {"image": [png(), png()], "label": [-1, 0]})
    with pytest.raises(DataError, match=r"label -1 is outside the classes; .*data\.labels=none goes without"):
        open_split(ParquetConfig(path=str(tmp_path)), 8, flip=False, crop="center", held_out=0.1)


def test_files_without_rows_are_passed_over(tmp_path):
    write(tmp_path / "0.parquet", {"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())})
    with pytest.raises(DataError, match="no rows"):
        opened(tmp_path)
    write(tmp_path / "1.parquet", {"image": [b"x"], "label": ["cat"]})
    assert (read(opened(tmp_path)), opened(tmp_path).labels.names) == ([b"x"], ("cat",))


# Paths in files


def test_the_first_path_may_be_missing(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    write(tmp_path / "x.parquet", {"file_name": [None, "a.png"], "kind": [3, 4]})
    records = opened(tmp_path / "x.parquet")
    assert records[1].data == png(7)
    assert records.labels.missing.endswith("; data.labels=COLUMN takes one of kind")


def test_paths_count_from_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.png").write_bytes(png(7))
    paths = ["images/a.png", str(tmp_path / "set/images/a.png"), "~/set/images/a.png", "http://x.org/a.png", "b.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    write(tmp_path / "set" / "x.parquet", {"file_name": paths})
    write(tmp_path / "set" / "y.parquet", {"image": [{"bytes": None, "path": path} for path in paths]})
    for name in ("x.parquet", "y.parquet"):
        records = opened(tmp_path / "set" / name)
        assert [records[i].data for i in range(3)] == [png(7)] * 3
        with pytest.raises(UnreadableImage, match=r"\[3\]: http://x.org/a.png is no local file"):
            records[3]
        with pytest.raises(UnreadableImage, match=rf"\[4\]: {tmp_path}/set/b.png: cannot be opened \(No such file"):
            records[4]


# Labels


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["dog", "cat", "eel", "dog"]),
        pa.array(["dog", "cat", "eel", "dog"], pa.large_string()),
        pa.array(["dog", "cat", "eel", "dog"]).dictionary_encode(),  # pandas' categories
    ],
)
def test_labels_that_are_names(tmp_path, labels):
    write(tmp_path / "a.parquet", {"image": rows(4), "label": labels})
    write(tmp_path / "b.parquet", {"image": rows(2), "label": labels[1:3]})
    records = opened(tmp_path)
    assert records.labels.names == ("cat", "dog", "eel")
    assert [records[i].label for i in range(6)] == [1, 0, 2, 1, 0, 2]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int64(), pa.float64(), pa.bool_()])
def test_labels_that_are_numbers(tmp_path, kind):
    records = opened(write(tmp_path / "a.parquet", {"image": rows(3), "label": pa.array([1, 0, 1]).cast(kind)}))
    assert ([records[i].label for i in range(3)], records.labels.num_classes) == ([1, 0, 1], 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0.0, 1.5]), r"x.parquet\[1\]: label is 1.5; labels must be whole numbers or names"),
        (pa.array([0.0, float("nan")]), r"\[1\]: label is nan; labels"),
        (pa.array(["a", None]), r"\[1\]: label is None; labels"),
        (pa.array([[0], [1]]), r"column 'label' is list<.*; labels"),
    ],
)
def test_labels_that_are_neither(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        opened(write(tmp_path / "x.parquet", {"image": rows(2), "label": labels}))


def test_columns_of_another_type(tmp_path):
    path = write(tmp_path / "x.parquet", {"image": rows(2), "text": [1, 2], "size": [3, 4]})
    assert opened(path)[0].text == ""
    with pytest.raises(DataError, match="column 'text' is int64; captions are text"):
        opened(path, text_column="text")
    with pytest.raises(DataError, match="column 'size' is int64; images are bytes.*it has image, text, size"):
        opened(path, image_column="size")


# save_to_disk


def test_what_save_to_disk_wrote_is_read_where_it_lies(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": png(i), "path": None} for i in range(4)]
    whole = datasets.Dataset.from_dict({"image": images, "label": [1, 0, 1, 0]}, features=features)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole.select([1, 0]), test=whole).save_to_disk(tmp_path / "many")
    plain = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict({"image": images}, features=plain, split="test").save_to_disk(tmp_path / "test")
    before = sorted(tmp_path.rglob("*"))

    def labels(name: str, **options) -> list[int]:
        records = ArrowRecords(HubConfig(name=str(tmp_path / name), **options))
        assert records.labels.names == ("cat", "dog")
        return [records[i].label for i in range(len(records))]

    assert labels("one") == labels("many", split="test") == [1, 0, 1, 0]
    assert labels("many") == [0, 1]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DataError, match="many: no split 'val'; set split to one of train, test"):
        labels("many", split="val")
    with pytest.raises(DataError, match="test: holds one data set, which is the split 'test'; set split=test"):
        labels("test")


def test_a_local_folder_that_is_missing_is_no_name_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ArrowRecords(HubConfig(name=str(tmp_path / "gone")))
