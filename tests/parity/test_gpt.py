"""The class-conditional GPT against what LlamaGen's published code computed.

Left out, because this code does not do it: cfg4_interval5 (guidance for the first steps only).
"""

from __future__ import annotations

import pytest
import runs
from cases import Case
from models import gpt

from imgtok.generators.sampling import filter_logits
from imgtok.layers.positions import rotary_2d


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load("gpt/c2i_tiny")


def check(case: Case, ours: runs.Outputs) -> None:
    errors = case.errors(ours)
    print({name: f"{error:.4f}" for name, error in errors.items()})
    assert all(error <= 1 for error in errors.values()), errors


def test_rotary_table(case):
    config = case.about["build"]["config"]
    side = round(config["block_size"] ** 0.5)
    check(case, {"freqs": rotary_2d(config["dim"] // config["n_head"], side, config["cls_token_num"])})


def test_training(case):
    check(case, runs.gpt_training(gpt(case), case))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["cfg1", "cfg2"])
def test_generation(case, name, cached):
    check(case, runs.gpt_generation(gpt(case), case, name, cached=cached))


@pytest.mark.parametrize("index", range(4))
def test_filters(case, index):
    logits = filter_logits(case.input("filter_logits"), **case.about["filters"][index])
    check(case, {f"probs_{index}": logits.softmax(dim=-1)})
