"""TokenBridge against what its published code computed: quantizer, schedules, head, training, and whole samplings.

Our tables are computed in float64, the published ones in float32: they differ by at most 1.2e-5 of 3.
"""

from __future__ import annotations

import numpy as np
import pytest
import tokenbridge_runs
import torch
from cases import Case
from models import tokenbridge
from PIL import Image

from imgtok.generators.published.tokenbridge import published_places, tables
from imgtok.generators.tokenbridge import PUBLISHED_ORDER, TokenBridge, tokenbridge_size
from imgtok.pictures import center_crop_adm, preprocess
from imgtok.train.optim import parameter_groups
from imgtok.weights import skeleton

TOLERANCE = 1e-5


def check(case: Case, ours: tokenbridge_runs.Outputs, tolerance: float = TOLERANCE) -> None:
    errors = case.errors(ours, tolerance)
    largest = max(errors, key=lambda name: errors[name])
    print(f"{case.about['case']}: {largest} {errors[largest] * tolerance:.2e}")
    assert all(error <= 1 for error in errors.values()), errors


@pytest.mark.parametrize("plainly", [False, True])
def test_quantizer(plainly):
    case = Case.load("tokenbridge/quantizer")
    ours = tokenbridge_runs.quantizer(case, plainly=plainly)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


def test_schedules_and_shares():
    case = Case.load("tokenbridge/masks")
    ours = tokenbridge_runs.masks(case)
    assert ours.keys() == case.recorded.keys()
    exact = {name: value for name, value in ours.items() if not name.startswith("moments")}
    check(case, exact)
    check(case, {name: ours[name] for name in ours.keys() - exact.keys()}, tolerance=1e-3)  # of 4,000 quantiles


@pytest.mark.parametrize("plainly", [False, True])
def test_head(plainly):
    case = Case.load("tokenbridge/head")
    ours = tokenbridge_runs.head(tokenbridge(case), case, plainly=plainly)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


def test_training_pass():
    case = Case.load("tokenbridge/forward")
    ours = tokenbridge_runs.forward(case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


def test_two_steps_of_training():
    case = Case.load("tokenbridge/train")
    ours = tokenbridge_runs.training(case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


@pytest.mark.parametrize(
    ("name", "plainly"),
    [*((name, False) for name in ("plain", "linear", "constant", "drawn", "null", "one")), ("drawn", True)],
)
def test_sampling(name, plainly):
    case = Case.load("tokenbridge/sample")
    ours = tokenbridge_runs.sampling(tokenbridge(case), case, name, plainly=plainly)
    wanted = {key for key in case.recorded if key.startswith(f"{name}.") and key != "linear.image"}
    assert ours.keys() == wanted
    check(case, ours)


def test_what_decays():
    case = Case.load("tokenbridge/train")
    model = tokenbridge(case)
    known = published_places(dict(model.named_parameters()), 16)
    decays = {id(p): bool(g["weight_decay"]) for g in parameter_groups(model.parameters(), 0.02) for p in g["params"]}
    parameters = dict(model.named_parameters())
    for kind, decay in (("decay", True), ("no_decay", False)):
        named = {name for name, place in known.items() if decays[id(parameters[place.name])] is decay}
        assert named == set(case.about["parameter_groups"][kind])


@pytest.mark.parametrize(("size", "name"), [("B", "base"), ("L", "large"), ("H", "huge")])
def test_the_published_sizes(size, name):
    case = Case.load(f"tokenbridge/layout_{name}")
    model = skeleton(lambda: TokenBridge(tokenbridge_size(size)))
    state = model.state_dict()
    known = published_places(state, 16)
    assert known.keys() == case.about["shapes"].keys()
    assert all(
        place.view(state).numel() == torch.Size(case.about["shapes"][key]).numel() for key, place in known.items()
    )
    assert sum(p.numel() for p in model.parameters()) == int(case.recorded["parameters"])
    assert case.recorded["channel_order"].tolist() == list(PUBLISHED_ORDER) == model.order.tolist()
    assert case.recorded["inverse_order"].tolist() == model.inverse.tolist()
    ours = tables(model)
    assert torch.equal(ours.pop("channel_mask"), case.recorded["channel_mask"])
    check(case, ours)


def test_crop():
    case = Case.load("tokenbridge/crop")
    for source in case.about["sources"]:
        picture = case.input(source["input"]).numpy().astype("uint8")
        ours = torch.from_numpy(np.array(center_crop_adm(Image.fromarray(picture), source["size"]))).long()
        assert (ours - case.recorded[f"{source['name']}.crop"].long()).abs().max() <= 1, source["name"]
        pixels = preprocess(picture, source["size"])[0]
        assert (pixels - case.recorded[f"{source['name']}.pixels"]).abs().max() <= 0.0079, source["name"]
    # Pillow may round otherwise in another version
