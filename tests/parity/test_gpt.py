"""The GPT, from a class or from text, against what LlamaGen's published code computed."""

from __future__ import annotations

import dataclasses

import pytest
import runs
from cases import Case
from models import gpt

from imgtok.generators.sampling import filter_logits
from imgtok.layers.positions import rotary_2d
from imgtok.text.captions import Captions


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load("gpt/c2i_tiny")


@pytest.fixture(scope="module")
def text_case() -> Case:
    return Case.load("gpt/t2i_tiny")


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
@pytest.mark.parametrize("name", ["cfg1", "cfg2", "cfg4_interval5"])
def test_generation(case, name, cached):
    check(case, runs.gpt_generation(gpt(case), case, name, cached=cached))


@pytest.mark.parametrize("index", range(4))
def test_filters(case, index):
    logits = filter_logits(case.input("filter_logits"), **case.about["filters"][index])
    check(case, {f"probs_{index}": logits.softmax(dim=-1)})


# ---------------------------------------------------------------- from text: 120 slots of features, padded on the left


def test_text_prefix(text_case):
    model = gpt(text_case)
    captions = Captions(text_case.input("text_features"), text_case.input("text_mask").bool())
    reading = model.read(dataclasses.replace(captions, features=captions.features * captions.mask[..., None]))
    check(text_case, {"prefix": reading.prefix[:, :4], "prefix_tail": reading.prefix[:, -4:]})
    check(text_case, {"freqs_tail": model.rotary[119:128]})


def test_training_from_text(text_case):
    check(text_case, runs.gpt_training(gpt(text_case), text_case))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["cfg1", "cfg3"])
def test_generation_from_text(text_case, name, cached):
    check(text_case, runs.gpt_generation(gpt(text_case), text_case, name, cached=cached))
