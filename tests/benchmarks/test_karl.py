"""The benchmark's own arithmetic and its options; what it times needs the peer."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(FOLDER))
    try:
        yield runpy.run_path(str(FOLDER / "karl.py"), run_name="benchmark")
    finally:
        sys.path.remove(str(FOLDER))


class Side:
    """A worker that has its output already."""

    def __init__(self, out: np.ndarray) -> None:
        self.out = out

    def ask(self, do, *, case, save, draws=None):
        assert case["batch"] == 1
        np.save(save, self.out)


def test_goals_are_those_of_the_case_and_device(program):
    case, goal = program["Case"], program["goal"]
    assert goal(case("tokens", 1), "cpu") == 2.0
    assert goal(case("both", 1, kept=32), "cpu") == 1.3
    assert goal(case("both", 8, kept=32), "cpu") == 1.5
    assert goal(case("both", 1), "cpu") is None
    assert goal(case("train", 1), "cpu") == 1.5
    assert goal(case("both", 32, kept=32), "cuda") == 3.0


@pytest.mark.parametrize(
    ("what", "ours", "peer", "says", "good"),
    [
        ("tokens", np.array([[1, 2, 3, 4]]), np.array([[1, 2, 3, 4]]), "100.0% of ids equal", True),
        ("tokens", np.array([[1, 2, 3, 4]]), np.array([[1, 2, 3, 5]]), "75.0% of ids equal", False),
        ("tokens", np.array([[0.5, 1.0]]), np.array([[0.5, 1.001]]), "1.0e-03", False),
        ("both", np.array([0.5, 0.25]), np.array([0.5, 0.25001]), "2.0e-05", True),
        ("train", np.array([3.0, 40.0]), np.array([3.0, 40.1]), "2.5e-03", False),
    ],
)
def test_sides_are_compared_by_what_they_make(program, tmp_path, what, ours, peer, says, good):
    found = program["compare"](Side(ours), Side(peer), program["Case"](what, 8, kept=32), tmp_path)
    assert says in found[0]
    assert found[1] is good


def test_sizes(program):
    parse = program["parse_size"]
    assert parse("small/vqgan") == ("small", "vqgan", True)
    assert parse("base/vae") == ("base", "vae", False)
    assert parse("tiny/vqgan/train") == ("tiny", "vqgan", True)
    arguments = program["parse"].__globals__["argparse"].Namespace(batch=None, kept=[32], device="cpu")
    assert [row.what for row in program["cases"]("tiny/vqgan/train", arguments)] == ["training step of stage 2"]
    assert len(list(program["cases"]("small/vae", arguments))) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "huge/vqgan"], "huge/vqgan is none of tiny, small, base, semilarge / vqgan"),
        ([], "git clone https://github.com/ShivamDuggal4/karl"),
    ],
)
def test_what_cannot_be_run_is_named_with_the_remedy(program, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        program["parse"](["--peer", str(tmp_path), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
