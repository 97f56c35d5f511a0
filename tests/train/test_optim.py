from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_job import toy_config, train

from imgtok.layers.mup import note_width
from imgtok.tokenizers import flextok_fast
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.train.config import TrainingConfig
from imgtok.train.optim import make_optimizer, parameter_groups, rate_at, set_rate


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
    decayed, free = parameter_groups(model.parameters(), 0.1)
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


# ---------------------------------------------------------------- muP


class Wide(nn.Module):
    """A hidden matrix and a readout that read 16 channels, and what does not depend on the width."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(3, 16)
        self.hidden = nn.Linear(16, 16)
        self.readout = nn.Linear(16, 2)
        note_width(16, self.hidden, self.readout)


def test_mup_groups():
    model = Wide()
    groups = parameter_groups(model.parameters(), 0.1, base_width=4)
    found = [
        ({name for name, p in model.named_parameters() if any(p is q for q in group["params"])},
         group["rate_scale"], group["weight_decay"])
        for group in groups
    ]  # fmt: skip
    assert found == [
        ({"input.weight"}, 1.0, 0.1),
        ({"hidden.weight", "readout.weight"}, 0.25, 0.4),  # rate x decay is that of the others
        ({"input.bias", "hidden.bias", "readout.bias"}, 1.0, 0.0),
    ]
    assert [group["rate_scale"] for group in parameter_groups(model.parameters(), 0.1)] == [1.0, 1.0]


def test_every_group_keeps_its_share_of_the_rate():
    optimizer = make_optimizer(Wide(), settings(mup_base_width=4), torch.device("cpu"))
    for rate in (0.5, 0.02):
        set_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate / 4, rate]


def test_a_readout_learns_as_one_whose_output_is_scaled_by_base_over_width():
    """The rule for readouts, written out, against the plain Linear at a smaller rate that stands for it."""
    torch.manual_seed(0)
    plain, scaled = nn.Linear(16, 2), nn.Linear(16, 2)
    for layer in (plain, scaled):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    note_width(16, plain)
    config = settings(learning_rate=0.01, weight_decay=0.1, warmup=0)
    adamw = make_optimizer(plain, dataclasses.replace(config, mup_base_width=4), torch.device("cpu"))
    other = make_optimizer(scaled, config, torch.device("cpu"))
    for step in range(20):
        x, y = torch.randn(8, 16), torch.randn(8, 2)
        outputs = [plain(x), nn.functional.linear(x * 4 / 16, scaled.weight, scaled.bias)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
        for optimizer, output in zip((adamw, other), outputs, strict=True):
            set_rate(optimizer, rate_at(step, config))
            optimizer.zero_grad()
            (output - y).square().mean().backward()
            optimizer.step()
    assert plain.weight.abs().max() > 0.01


def test_mup_for_a_model_that_was_not_made_for_it():
    with pytest.raises(ValueError, match=r"training.mup_base_width: 256, but this model \(Mixed\)"):
        make_optimizer(Mixed(), settings(mup_base_width=256), torch.device("cpu"))


def movement(width: int, base_width: int) -> float:
    """How far (root mean square, over two seeds) ten steps move what FlexTok's encoder hands to its readout."""
    distances = []
    for seed in range(2):
        torch.manual_seed(seed)
        trunk = TrunkConfig(width=width, depth=1, head_dim=16)
        model = FlexTok(FlexTokConfig(image_size=8, num_registers=4, levels=(4, 4), encoder=trunk, decoder=trunk))
        images = torch.rand(4, 3, 8, 8) * 2 - 1
        states: list[Tensor] = []
        model.encoder.blocks[-1].register_forward_hook(lambda *args, states=states: states.append(args[-1].detach()))
        optimizer = make_optimizer(model, settings(mup_base_width=base_width, weight_decay=0), torch.device("cpu"))
        set_rate(optimizer, 0.01)
        for step in range(10):
            optimizer.zero_grad()
            model(images, generator=torch.Generator().manual_seed(step)).total.backward()
            optimizer.step()
        flextok_fast.encode(model.encoder, images, 4)
        distances.append((states[-1] - states[0]).square().mean())
    return torch.stack(distances).mean().sqrt().item()


def test_under_mup_features_move_as_far_at_every_width():
    """The coordinate check of arXiv 2203.03466, appendix D.1. Measured: 3.0, 3.3, 3.3; at one rate 46 at width 256."""
    mup = [movement(width, 64) for width in (64, 128, 256)]
    assert max(mup) < 2 * min(mup)
    assert movement(64, 0) == mup[0], "64 is the base: nothing changes there"
    assert movement(256, 0) > 5 * mup[0]


# ---------------------------------------------------------------- the rate


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


def test_a_warm_up_that_does_not_end_is_a_tenth_of_the_run():
    """A trial of 40 steps of a recipe that warms up for 1000 has 36 at or below the peak."""
    short = settings(warmup=1000, steps=40)
    assert [rate_at(step, short) for step in range(40)] == [
        rate_at(step, settings(warmup=4, steps=40)) for step in range(40)
    ]
    assert rate_at(4, short) == 2.0
    assert settings(warmup=1000, steps=5).warmup_steps == 0
    assert settings(warmup=4, steps=5).warmup_steps == 4


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
