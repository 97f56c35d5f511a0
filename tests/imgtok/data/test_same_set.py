"""A folder, a tar and a Parquet file of the same images are the same set to training, caching and scoring.

Random trees have links to files, to folders and to nothing, hidden names, dots in names, odd endings and none, damaged
and empty files, captions, names of any alphabet and equal pictures under several names; the tree itself keeps the list
of what is in it. Tars hold second names of files as links of either kind, Parquet files lie one by one or in a folder.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from imgtok.data.images import ImageFolderConfig, ParquetConfig, TarConfig, Views, open_images
from imgtok.data.loaders import eval_loader, train_loader
from imgtok.metrics.saved_images import SavedImages

CLASSES = ["ant", "ant-2", "10", "9", "c.d", "ä ö", "日本", "_x"]
STEMS = [
    "a",
    "photo_v1.0",
    "photo_v1.1",
    "22.01",
    "ünï",
    "u\u0308",
    "日",
    "with space",
    "UP",
    "-x",
    "[1]",
    "{a,b}",
    "a\nb",
]
SUFFIXES = [".png", ".PNG", ".jpg", ".JPEG", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".avif", "", ".dat", ".1"]


class Tree:
    """A folder, and by name the grey value of each image in it; None for one that is damaged."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.images: dict[str, int | None] = {}
        self.classes = sorted(self.random.sample(CLASSES, self.random.randint(2, 4)))
        for name in self.classes:
            for stem in self.random.sample(STEMS, self.random.randint(2, 4)):
                deep = self.random.choice(["", "", "deep/", "de.ep/"])
                self.picture(f"{name}/{deep}{stem}{self.random.choice(SUFFIXES)}")
                self.caption(f"{name}/{deep}{stem}")
            self.rubbish(name)
        self.link_files()
        self.link_folder()
        broken = f"{self.classes[0]}/broken.png"
        self.put(broken, b"this is text")
        self.images[broken] = None

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def picture(self, name: str) -> None:
        buffer = io.BytesIO()
        value = self.random.randrange(0, 250, 5)  # equal ones come about
        Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "png")
        self.put(name, buffer.getvalue())
        if not any(part.startswith(".") or part in ("__MACOSX", "PaxHeader") for part in name.split("/")):
            self.images[name] = value

    def caption(self, key: str) -> None:
        ending, text = self.random.choice([(".txt", f"\ufeff{key}"), (".json", json.dumps({"caption": key})), ("", "")])
        if ending:
            self.put(key + ending, text.encode())

    def rubbish(self, name: str) -> None:
        for hidden in (".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/a.png", "PaxHeader/a.png", ".hidden.png"):
            if self.random.random() < 0.5:
                self.picture(f"{name}/{hidden}")
        others = {"notes.txt": b"x", "empty.png": b"", "Thumbs.db": b"x", "bare": b"GIF?", "e": b""}
        for other, data in others.items():
            if self.random.random() < 0.5:
                self.put(f"{name}/{other}", data)
        if self.random.random() < 0.5:
            (self.root / name / "gone.png").symlink_to("nowhere.png")
        if self.random.random() < 0.5:
            (self.root / name / "gone").symlink_to("nowhere")
        if self.random.random() < 0.5:
            (self.root / name / "loop").symlink_to("..")

    def link_files(self) -> None:
        for target in self.random.sample(sorted(self.images), 2):
            name = f"{target.partition('/')[0]}/link {target.rpartition('/')[2]}"
            if (self.root / name).is_symlink() or (self.root / name).exists():
                continue
            if self.random.random() < 0.5:
                (self.root / name).symlink_to(self.root / target)
            else:
                (self.root / name).hardlink_to(self.root / target)  # of which a tar has the second as a link
            self.images[name] = self.images[target]

    def link_folder(self) -> None:
        here, there = self.random.sample(self.classes, 2)
        (self.root / there / "zz").mkdir()
        self.picture(f"{there}/zz/one.png")
        (self.root / here / "zz of another").symlink_to(f"../{there}/zz")
        self.images[f"{here}/zz of another/one.png"] = self.images[f"{there}/zz/one.png"]

    @property
    def wanted(self) -> list[tuple[str, int, int | None]]:
        """Name, label and value of each image, in order."""
        names = sorted(self.images, key=lambda name: (name.partition("/")[0], name))
        return [(name, self.classes.index(name.partition("/")[0]), self.images[name]) for name in names]

    def pack(self, path: Path) -> Path:
        """A tar of all that is there, in sorted order, links as links."""
        found = [p for p in self.root.rglob("*") if p.is_symlink() or p.is_file()]
        found = [p for p in found if not any(parent.is_symlink() for parent in p.parents)]
        names = sorted((p.relative_to(self.root).as_posix() for p in found), key=lambda n: (n.partition("/")[0], n))
        with tarfile.open(path, "w", format=self.random.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
            for name in names:
                header = tar.gettarinfo(self.root / name, name)
                if header.issym() and header.linkname.startswith("/"):  # in a tar it is relative
                    header.linkname = "../" * name.count("/") + Path(header.linkname).relative_to(self.root).as_posix()
                with (self.root / name).open("rb") if header.isfile() else io.BytesIO() as file:
                    tar.addfile(header, file if header.isfile() else None)
        return path

    def table(self, path: Path) -> Path:
        """The images with the names of their classes: a Parquet file, or a folder with two."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [name for name, _, _ in self.wanted]
        data = [(self.root / name).read_bytes() for name in names]
        images = data if self.random.random() < 0.5 else [{"bytes": each, "path": None} for each in data]
        table = pa.table({"image": images, "label": [name.partition("/")[0] for name in names]})
        if self.random.random() < 0.5:
            pq.write_table(table, path)
            return path
        (path / "_temporary").mkdir(parents=True)
        (path.with_name("elsewhere")).mkdir()
        (path / "second").symlink_to("../elsewhere")
        pq.write_table(table.slice(0, 3), path / "_temporary" / "0.parquet")
        pq.write_table(table.slice(0, 3), path / "a.parquet")
        pq.write_table(table.slice(3), path / "second" / "a.parquet", compression="zstd", row_group_size=2)
        return path


def values(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].int().tolist()


@pytest.mark.parametrize("seed", range(12))
def test_readers_agree(tmp_path, seed):
    tree = Tree(tmp_path / "tree", seed)
    kinds = {
        "folder": ImageFolderConfig(path=tree.root),
        "tar": TarConfig(path=str(tree.pack(tmp_path / "x.tar")), labels="folders"),
        "parquet": ParquetConfig(path=str(tree.table(tmp_path / "x.parquet"))),
    }
    sources = {kind: open_images(config, 8, held_out_fraction=0.0) for kind, config in kinds.items()}
    wanted = [image for image in tree.wanted if image[2] is not None]
    order = None
    captions = [sources[kind].texts(range(len(wanted) + 1)) for kind in ("folder", "tar")]
    assert captions[0] == captions[1]
    for kind, source in sources.items():
        assert source.class_names == tuple(tree.classes), kind
        assert len(source) == len(wanted) + 1, kind
        batch = next(iter(eval_loader(source, 1000, views=Views())))  # as a cache reads them
        found = list(zip(batch.labels.tolist(), values((batch.images + 1) * 127.5 + 0.5), strict=True))
        assert found == [(label, value) for _, label, value in wanted], kind
        if kind != "parquet":
            prefix = f"{tree.root}/" if kind == "folder" else f"{tmp_path / 'x.tar'}:"
            assert [name.removeprefix(prefix) for name in batch.names] == [name for name, _, _ in wanted]
        trained = [batch.indices for batch in islice(train_loader(source, 4, seed=seed), 6)]
        assert order in (None, trained), kind
        order = trained
    saved = SavedImages(tree.root)
    places, images, problems = saved.readable(range(len(saved)))
    assert values(images) == [value for _, _, value in wanted]
    assert len(places) == len(wanted)
    assert "broken.png" in problems[0]
