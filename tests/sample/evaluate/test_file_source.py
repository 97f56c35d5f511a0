"""Which files `imgtok evaluate images=` scores."""

from __future__ import annotations

import json

import pytest
import torch

from imgtok.pictures import save_png
from imgtok.sample.evaluate.sources import FileSource


def write(folder, count, first=0):
    for index in range(first, first + count):
        save_png(torch.full((3, 8, 8), index, dtype=torch.uint8), folder / f"{index:06d}.png")


def scored(source, batch_size=3):
    """Grey values and labels of what is scored, in order."""
    batches = [batch for versions in source.batches(range(source.num), batch_size) for batch in versions.values()]
    values = torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist()
    labels = [label for batch in batches if batch.labels is not None for label in batch.labels.tolist()]
    return values, labels


@pytest.mark.parametrize("labels", [[i // 4 for i in range(32)], [i % 8 for i in range(32)]])
def test_fewer_files_are_of_all_classes_with_their_own_labels(tmp_path, labels):
    write(tmp_path, 32)
    (tmp_path / "samples.json").write_text(json.dumps({"labels": labels}))
    source = FileSource(tmp_path, 8, "recorded")
    values, found = scored(source)
    assert found == [labels[value] for value in values]
    assert sorted(found) == list(range(8))
    assert source.procedure.images == f"files of {tmp_path}, 8 of 32: from all classes alike"


def test_fewer_files_without_labels_are_from_equal_stretches(tmp_path):
    write(tmp_path, 32)
    source = FileSource(tmp_path, 8, "recorded")
    values, labels = scored(source)
    assert [value // 4 for value in values] == list(range(8))
    assert labels == []
    assert "8 of 32: one of each of as many equal stretches" in source.procedure.images
    assert scored(FileSource(tmp_path, 8, "balanced"))[0] == list(range(8))  # the sampler's order
    assert scored(FileSource(tmp_path, None, "recorded"))[0] == list(range(32))


def test_pairs_go_together_and_a_damaged_file_leaves_with_its_original(tmp_path, caplog):
    write(tmp_path / "a", 12)
    write(tmp_path / "b", 14)
    source = FileSource(tmp_path / "a", 6, "recorded", tmp_path / "b")
    for versions in source.batches(range(6), 4):
        for batch in versions.values():
            assert torch.equal(batch.images, batch.originals)
    (tmp_path / "a" / "000003.png").write_bytes(b"text")
    values, _ = scored(FileSource(tmp_path / "a", None, "recorded", tmp_path / "b"))
    assert values == [i for i in range(12) if i != 3]
    assert "skipped unreadable image 1" in caplog.text
