"""The benchmark's own arithmetic, its options, and our half of it; what it times needs the peer."""

import runpy
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from imgtok.generators.dimension_head import StackConfig
from imgtok.generators.published.tokenbridge import as_published, published_places
from imgtok.generators.tokenbridge import TokenBridge, TokenBridgeConfig

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZE = "64x1"


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(FOLDER))
    try:
        yield runpy.run_path(str(FOLDER / "tokenbridge.py"), run_name="benchmark")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def ours(program):
    """Our worker with a small model, given the shapes that the published code has at that size."""
    stack = StackConfig(width=64, depth=1, num_heads=1)
    state = TokenBridge(TokenBridgeConfig(encoder=stack, decoder=stack, head=stack)).state_dict()
    shapes = {
        name: list(as_published(name, place.view(state)).shape) for name, place in published_places(state, 16).items()
    }
    given = Namespace(device="cpu", peer_dtype="fp32", threads=1, seed=0)
    setup = replace(program["setup_of"](SIZE, given), shapes=shapes)
    search = [str(FOLDER), str(FOLDER / "workers"), str(FOLDER.parent / "tests" / "parity")]
    sys.path[:0] = search
    try:
        side = runpy.run_path(str(FOLDER / "workers" / "tokenbridge_ours.py"), run_name="worker")["Ours"](setup)
    finally:
        for path in search:
            sys.path.remove(path)
    return side


def test_goals_are_those_of_the_case_and_device(program):
    case, goal = program["Case"], program["goal"]
    assert goal(case("sample", 1), "cpu") == 2.0
    assert goal(case("train", 2), "cpu") == 1.3
    assert goal(case("train", 2, head_share=0.25), "cpu") is None
    assert goal(case("sample", 1), "cuda") == 4.0
    assert goal(case("train", 2), "cuda") is None


class Side:
    """A worker that has its output already."""

    def __init__(self, out: np.ndarray) -> None:
        self.out = out

    def ask(self, do, *, case, save, draws=None):
        assert case["batch"] == (1 if case["what"] == "sample" else 4)
        assert case["head_share"] == 1.0
        np.save(save, self.out)


@pytest.mark.parametrize(
    ("what", "ours", "peer", "says", "good"),
    [
        ("sample", [0.5, 1.0], [0.5, 1.000001], "100.00% of ids equal", True),
        ("sample", [0.5, 1.0], [0.5, 1.03], "50.00% of ids equal", False),
        ("train", [4.2, 3.0], [4.2, 3.00001], "3.", True),
        ("train", [4.2, 3.0], [4.2, 3.1], "3.2e-02", False),
    ],
)
def test_sides_are_compared_by_what_they_make(program, tmp_path, what, ours, peer, says, good):
    case, known = program["Case"](what, 4, head_share=0.5), {}
    found = program["compare_once"](known, Side(np.array(ours)), Side(np.array(peer)), case, tmp_path)
    assert says in found[0]
    assert found[1] is good
    again = replace(case, head_share=1.0, batch=8 if what == "sample" else 4)
    assert program["compare_once"](known, None, None, again, tmp_path) is found  # nobody is asked again


def test_draws_given_to_the_peer_are_those_that_ours_makes(program, ours):
    case = program["Case"]("sample", 2, iterations=1)
    given = program["draws_of"](case)
    how = ours.model.config.sampling
    start = ours.model._start(how, 0, range(2), None)
    assert np.array_equal(given["order"], start.order)
    assert np.array_equal(given["uniforms"], start.uniforms)

    training = replace(case, what="train")
    given = program["draws_of"](training)
    with (
        patch.object(ours.model, "forward_drawn", side_effect=StopIteration) as drawn,
        pytest.raises(StopIteration),
    ):
        ours.prepare(training)()
    _, labels, hidden, visible = drawn.call_args.args
    count = int(np.ceil(256 * given["share"][0]))
    assert np.array_equal(hidden, np.sort(given["order"][:, :count]))
    assert np.array_equal(visible, np.sort(given["order"][:, count:]))
    assert ((labels == ours.model.null_class).numpy() == (given["drop"] < 0.1)).all()


def test_training_is_a_whole_step_that_leaves_the_weights(program, ours):
    case = program["Case"]("train", 1)
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    loss, norm = ours.prepare(case)()
    part = ours.prepare(replace(case, head_share=0.01))()
    assert loss > 0
    assert norm > 0
    assert part[0] > 0
    assert part[0] != loss
    assert torch.equal(ours.prepare(case)(), torch.stack([loss, norm]))
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())
    matrices = [parameter for parameter in ours.model.head.parameters() if parameter.ndim > 1]
    assert all(ours.optimizer.state[parameter]["exp_avg"].any() for parameter in matrices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "XL"], "XL is none of B, L, H"),
        (["--iterations", "300"], "[300] must lie in 1 to 256"),
        ([], "git clone https://github.com/YuqingWang1029/TokenBridge"),
    ],
)
def test_what_cannot_be_run_is_named_with_the_remedy(program, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        program["parse"](["--peer", str(tmp_path), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
