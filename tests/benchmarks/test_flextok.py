"""The benchmark's own arithmetic and its first words; what it times needs the peer."""

import runpy
import sys
from pathlib import Path

import processes
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(FOLDER))
    try:
        yield runpy.run_path(str(FOLDER / "flextok.py"), run_name="benchmark")
    finally:
        sys.path.remove(str(FOLDER))


class Counting:
    """A worker whose calls take 1, 2, 3, ... seconds on a clock that both sides share."""

    def __init__(self, name, clock, factor):
        self.name, self.clock, self.factor = name, clock, factor

    def ask(self, do, case):
        self.clock.append(self.name)
        return {"wall": self.factor * len(self.clock), "cpu": 1.0, "peak": 1, "own_peak": True}


def test_sides_take_turns_and_a_ratio_is_of_one_round(program):
    clock = []
    ours, peer = Counting("ours", clock, 1.0), Counting("the peer", clock, 10.0)
    case = program["Case"]("encode", 1, 256)
    calls = program["measure"](ours, peer, case, rounds=3)
    assert clock == ["ours", "the peer", "the peer", "ours", "ours", "the peer"]
    assert program["Row"]("d12-d12", case, *calls, "").ratios() == [20 / 1, 30 / 4, 60 / 5]


def test_goals_are_those_of_the_size_and_device(program):
    case, goal = program["Case"], program["goal"]
    assert goal("d12-d12", case("encode", 1, 256), "cpu", "fp32") == 1.3
    assert goal("d12-d12", case("encode", 8, 256), "cpu", "fp32") == 2.0
    assert goal("d12-d12", case("encode", 8, 16), "cpu", "fp32") == 1.8
    assert goal("d12-d12", case("decode", 1, 16), "cpu", "fp32") == 2.2
    assert goal("d12-d12", case("decode", 1, 64), "cpu", "fp32") is None
    assert goal("d18-d18", case("decode", 1, 16), "cpu", "fp32") is None
    assert goal("d18-d28", case("decode", 32, 16), "cuda", "bf16") == 3.0


def test_a_missing_peer_is_named_with_the_remedy(tmp_path):
    done = processes.python(FOLDER / "flextok.py", "--peer", tmp_path)
    assert done.returncode == 2
    assert f"git clone https://github.com/apple/ml-flextok {tmp_path}" in done.stderr
    assert "pip install" in done.stderr
