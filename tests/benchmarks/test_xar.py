"""The benchmark's own arithmetic, its options, and our half of it; what it times needs the peer."""

import runpy
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imgtok.generators.published.xar import NAMES, as_published
from imgtok.generators.xar import XAR, XARConfig
from imgtok.published.names import places

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZE = "128x1"


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(FOLDER))
    try:
        yield runpy.run_path(str(FOLDER / "xar.py"), run_name="benchmark")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def ours(program):
    """Our worker with a small model, given the shapes that the published code has at that size."""
    state = XAR(XARConfig(width=128, depth=1, num_heads=2)).state_dict()
    shapes = {
        name: list(as_published(name, place.view(state)).shape) for name, place in places(state, NAMES, {}).items()
    }
    given = Namespace(device="cpu", peer_dtype="fp32", threads=1, seed=0)
    setup = replace(program["setup_of"](SIZE, given), shapes=shapes)
    search = [str(FOLDER), str(FOLDER / "workers"), str(FOLDER.parent / "tests" / "parity")]
    sys.path[:0] = search
    try:
        side = runpy.run_path(str(FOLDER / "workers" / "xar_ours.py"), run_name="worker")["Ours"](setup)
    finally:
        for path in search:
            sys.path.remove(path)
    return side


def test_goals_are_those_of_the_size_and_device(program):
    case, goal = program["Case"], program["goal"]
    assert goal("B", case("sample", 1, guidance=2.7), "cpu", "fp32") == 1.15
    assert goal("B", case("sample", 4, guidance=1.0), "cpu", "fp32") == 1.8
    assert goal("B", case("sample", 4, guidance=2.7), "cpu", "bf16") == 3.0
    assert goal("B", case("train", 4), "cpu", "fp32") == 1.2
    assert goal("L", case("sample", 1), "cpu", "fp32") is None
    assert goal("H", case("sample", 64), "cuda", "bf16") == 2.5
    assert goal("H", case("train", 64), "cuda", "bf16") is None


def test_draws_given_to_the_peer_are_those_that_ours_makes(program, ours):
    """Latents of the whole walk follow from them: here with the peer's formulas and our network."""
    case = program["Case"]("sample", 2, steps=3, guidance=1.0)
    seen = record(torch.nn.functional, "rms_norm", ours.prepare(case))
    noise = torch.from_numpy(program["draws_of"](case)["noise"])  # (entities, steps, B, tokens, C)
    assert noise.shape == (4, 3, 2, 64, 16)
    first = ours.model.input_norm(ours.model.input_proj(noise[0, 0]) + ours.model.first_positions[:64])
    assert torch.allclose(seen[0].reshape_as(first) * ours.model.input_norm.weight, first, atol=1e-5)

    training = replace(case, what="train")
    given = program["draws_of"](training)
    drawn = record(torch, "rand", ours.prepare(training)) + record(torch, "randn", ours.prepare(training))
    assert [torch.from_numpy(given[name]).tolist() for name in ("drop", "times", "train_noise")] == [
        values.tolist() for values in drawn
    ]


def record(module, name, call):
    """What the calls of a function returned meanwhile."""
    seen, original = [], getattr(module, name)

    def remember(*args, **rest):
        seen.append(original(*args, **rest))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, remember)
        call()
    return seen


def test_training_is_a_whole_step_that_leaves_the_weights(program, ours):
    case = program["Case"]("train", 2)
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    loss, norm = ours.prepare(case)()
    again = ours.prepare(case)()
    assert loss > 0
    assert norm > 0
    assert torch.equal(again, torch.stack([loss, norm]))
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())
    assert all(state["exp_avg"].any() for state in ours.optimizer.state.values() if state["exp_avg"].ndim > 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "XL"], "XL is none of B, L, H"),
        (["--steps", "2"], "--steps of at least 3"),
        (["--train-batch", "1"], "--train-batch of at least 2"),
        ([], "git clone https://github.com/OliverRensu/xAR"),
    ],
)
def test_what_cannot_be_run_is_named_with_the_remedy(program, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        program["parse"](["--peer", str(tmp_path), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
