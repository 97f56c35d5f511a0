"""The benchmark's own arithmetic, its options, and the two of its three sides that need no checkout."""

import runpy
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZE = "64x1:16"


@pytest.fixture(scope="module")
def program():
    search = [str(FOLDER), str(FOLDER / "workers"), str(FOLDER.parent / "tests" / "parity")]
    sys.path[:0] = search
    try:
        yield runpy.run_path(str(FOLDER / "gpt.py"), run_name="benchmark")
    finally:
        for path in search:
            sys.path.remove(path)


def side(program, name: str, **given):
    """A worker's half with a small model."""
    options = Namespace(device="cpu", peer_dtype="fp32", threads=1, seed=0)
    setup = replace(program["setup_of"](SIZE, options), shapes=program["Shape"].of(SIZE).parameters(), **given)
    worker = runpy.run_path(str(FOLDER / "workers" / f"{name}.py"), run_name="worker")
    return worker["Ours" if name == "gpt_ours" else "Peer"](setup)


def test_our_half_draws_what_is_asked_for(program):
    ours, case = side(program, "gpt_ours"), program["Case"](2, 16)
    ids = ours.prepare(case)()
    assert ids.shape == (2, 16)
    assert np.array_equal(ids, ours.prepare(case)())
    greedy = ours.prepare(replace(case, greedy=True))()
    assert not np.array_equal(ids, greedy)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_transformers_draws_the_same_law(program, guidance):
    case = program["Case"](2, 16, guidance, greedy=True)
    found = [side(program, name).prepare(case)() for name in ("gpt_ours", "gpt_transformers")]
    assert np.array_equal(*found)
    assert len(np.unique(found[0])) > 5


class Side:
    """A worker that has its output already."""

    def __init__(self, out: list[int]) -> None:
        self.out = np.array([out])

    def ask(self, do, *, case, save):
        assert (case["batch"], case["greedy"]) == (1, True)
        np.save(save, self.out)


@pytest.mark.parametrize(
    ("ours", "peer", "says", "good"),
    [
        ([3, 4, 5], [3, 4, 5], "3 of 3 ids equal", True),
        ([3, 4, 5], [3, 7, 5], "1 of 3 ids equal", False),
        ([1] * 100, [1] * 64 + [2] * 36, "64 of 100 ids equal", True),
        ([1] * 100, [1] * 63 + [2] * 37, "63 of 100 ids equal", False),
    ],
)
def test_sides_are_compared_by_their_most_likely_ids(program, tmp_path, ours, peer, says, good):
    case = program["Case"](8, 3)
    assert program["compare"](Side(ours), Side(peer), case, tmp_path) == (says, good)


def test_goals_are_those_of_the_case_and_device(program):
    case, goal = program["Case"], program["goal"]
    assert [goal(case(batch), device) for device in ("cpu", "cuda") for batch in (1, 8)] == [1.5, 1.5, 4.0, None]


def test_every_peer_and_batch_has_a_row(program, tmp_path):
    arguments = program["parse"](["--peer", str(tmp_path), "--peers", "transformers", "--sizes", "B", "64x2"])
    assert arguments.sizes == ["B:256", "64x2:256"]
    rows = list(program["cases"]("B:256", "transformers", arguments))
    assert [(row.size, row.case.batch, row.case.tokens) for row in rows] == [("B", 1, 256), ("B", 8, 256)]
    assert rows[0].what == "256 tokens, guidance 2, against transformers"


def test_transformers_needs_no_checkout(program, capsys):
    assert program["parse"](["--peers", "transformers"]).peer is None
    with pytest.raises(SystemExit) as error:
        program["parse"]([])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "--peer names no checkout of LlamaGen" in said
    assert "git clone https://github.com/FoundationVision/LlamaGen PATH" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "M"], "M with 256 tokens"),
        (["--sizes", "100x2"], "100 is no multiple of 64"),
        (["--tokens", "250"], "250 tokens make no square"),
        ([], "git clone https://github.com/FoundationVision/LlamaGen"),
    ],
)
def test_what_cannot_be_run_is_named_with_the_remedy(program, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        program["parse"](["--peer", str(tmp_path), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
