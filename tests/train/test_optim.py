from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_job import toy_config, train

from train.config import TrainingConfig
from train.optim import make_optimizer, parameter_groups, rate_at


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(**{"steps": 101, "batch_size": 1, "learning_rate": 2.0, "warmup": 10, **changes})


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Embedding(5, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_matrices_decay_and_vectors_do_not():
    model = Mixed()
    decayed, free = parameter_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(model.linear.weight), id(model.table.weight)}
    assert {id(p) for p in free["params"]} == {id(model.linear.bias), id(model.gain)}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_only_decayed_parameters_shrink_without_a_gradient():
    model = Mixed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, settings(weight_decay=0.5), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert shrunk == {"linear.weight", "table.weight"}


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), settings(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 0.1 + 0.9 * 0.5), ("linear", 0.1 + 0.9 * 0.5), ("constant", 1.0)]
)
def test_rate_obeys_its_numbers(schedule, middle):
    config = settings(schedule=schedule, final_rate=0.1)
    rates = [rate_at(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(2.0 / 11)
    assert rates[9] == pytest.approx(2.0 * 10 / 11)
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * middle)
    assert rates[100] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_decay_from_holds_the_peak():
    config = settings(schedule="linear", decay_from=0.5)
    assert {rate_at(step, config) for step in range(10, 51)} == {2.0}
    assert rate_at(75, config) == pytest.approx(1.0)
    assert rate_at(100, config) == 0.0
    assert rate_at(100, settings(decay_from=1.0)) == 2.0


def test_cosine_follows_a_cosine():
    assert rate_at(32, settings(warmup=0, steps=129)) == pytest.approx(1 + math.cos(math.pi / 4))


def test_one_step_and_no_warmup():
    assert rate_at(0, settings(steps=1, warmup=0)) == 2.0


@pytest.fixture
def used_rates() -> Iterator[list[float]]:
    """The learning rates that AdamW had when it stepped."""
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda adamw, *_: rates.append(adamw.param_groups[-1]["lr"]))
    yield rates
    hook.remove()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_optimizer_uses_exactly_these_rates(tmp_path, used_rates, accumulate):
    train(tmp_path, steps=9, warmup=3, accumulate=accumulate)
    config = toy_config(steps=9, warmup=3).training
    assert used_rates == [rate_at(step, config) for step in range(9)]
    assert used_rates[0] == pytest.approx(0.01 / 4)
    assert used_rates[2] == pytest.approx(0.01 * 3 / 4)
    assert used_rates[3] == 0.01
    assert used_rates[8] == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": 101}, "warmup must be below steps"),
        ({"betas": (0.9, 1.0)}, "betas must be below 1"),
        ({"ema": 1.0}, "ema must be below 1"),
        ({"steps": -1}, "steps"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"precision": "fp8"}, "precision"),
        ({"trackers": ("mlflow",)}, "trackers"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
