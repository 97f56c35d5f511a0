"""xAR against what its published code computed: order, mask, rotary tables, training and both samplers.

The tolerance of these cases is 1e-5 of the scale, a tenth of the others': a tanh GELU would pass at 1e-4.
"""

from __future__ import annotations

import pytest
import xar_runs
from cases import Case
from models import xar

TOLERANCE = 1e-5


def check(case: Case, ours: xar_runs.Outputs, tolerance: float = TOLERANCE) -> None:
    errors = case.errors(ours, tolerance)
    print({name: f"{error:.4f}" for name, error in errors.items()})
    assert all(error <= 1 for error in errors.values()), errors


def test_orders():
    case = Case.load("xar/cell_order")
    ours = xar_runs.orders(case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours, tolerance=0)


def test_mask():
    case = Case.load("xar/mask")
    ours = xar_runs.masks(case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


def test_rotary_positions():
    case = Case.load("xar/rope")
    ours = xar_runs.rotary(case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


def test_training():
    case = Case.load("xar/train_forward")
    ours = xar_runs.training(xar(case), case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


def test_one_step():
    case = Case.load("xar/one_step")
    ours = xar_runs.one_step(xar(case), case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize(
    "name",
    ["sample_sde_cfg", "sample_sde_nocfg", pytest.param("sample_sde_40", marks=pytest.mark.slow), "sample_ode_cfg"],
)
def test_sampling(name, plainly):
    case = Case.load(f"xar/{name}")
    ours = xar_runs.sampling(xar(case), case, plainly=plainly)
    check(case, ours)


def test_optimisation():
    case = Case.load("xar/optim")
    ours = xar_runs.optimisation(case)
    case.recorded["lr"] /= case.about["config"]["peak_lr"]
    check(case, ours)
    xar_runs.check_decay(case, xar(Case.load("xar/train_forward")))
