"""The distance in EfficientNet-Lite0's features, with the real weights: its formula, its gradient, what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.losses.lite0 import Lite0Distance
from imgtok.vision import lite0


@pytest.fixture(scope="module")
def distance(lite0_weights) -> Lite0Distance:
    return Lite0Distance.from_file(lite0_weights)


@pytest.fixture(scope="module")
def exact(lite0_weights) -> nn.Module:
    """timm's network in float64, with its batch normalisations where they were trained."""
    return lite0.load(lite0_weights, folded=False).net.double()


def images(seed: int, count: int = 2, side: int = 40) -> Tensor:
    """Smooth random fields: noise alone drives the network far out of what it knows."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (side, side), mode="bilinear")


def by_the_formula(net: nn.Module, one: Tensor, other: Tensor) -> Tensor:
    """The definition in float64, position by position, from the stages that timm gives out."""
    first, second = (
        net.forward_intermediates(((x.double() + 1) * 127.5 - 127) / 128, intermediates_only=True) for x in (one, other)
    )
    total = torch.zeros(len(one), dtype=torch.float64)
    for a, b in zip(first, second, strict=True):
        rows, columns = a.shape[2:]
        for y in range(rows):
            for x in range(columns):
                u, v = a[:, :, y, x], b[:, :, y, x]
                u, v = u / u.pow(2).sum(1, keepdim=True).sqrt(), v / v.pow(2).sum(1, keepdim=True).sqrt()
                total = total + ((u - v) ** 2).sum(1) / (rows * columns)
    return total / 5


def test_it_is_the_mean_over_stages_and_places_of_the_distance_of_unit_vectors(distance, exact):
    a, b = images(1), images(2)
    found = distance(a, b)
    assert found.shape == (2,)
    assert (found > 0.1).all()
    torch.testing.assert_close(found.double(), by_the_formula(exact, a, b), rtol=1e-4, atol=0)


def test_it_is_symmetric_zero_for_equals_and_sees_each_pair_alone(distance):
    a, b = images(1, count=3), images(2, count=3)
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert torch.equal(distance(a, a), torch.zeros(3))
    torch.testing.assert_close(distance(a[1:2], b[1:2]), distance(a, b)[1:2])
    assert distance(images(1, side=32), images(2, side=32)).isfinite().all()


def test_it_orders_damages(distance):
    """The same kind of damage in three strengths, on images with edges."""
    clean = images(1, side=64).sign() * 0.7
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    small = (F.interpolate(clean, (side, side), mode="area") for side in (32, 16, 8))
    for damaged in (
        [(clean + strength * noise).clamp(-1, 1) for strength in (0.05, 0.2, 0.6)],
        [F.interpolate(each, (64, 64), mode="bilinear") for each in small],
    ):
        weak, medium, strong = (distance(each, clean) for each in damaged)
        assert (weak > 0).all()
        assert (weak < medium).all()
        assert (medium < strong).all()


def test_the_gradient_is_that_of_finite_differences(distance, exact):
    moving, goal = images(1).requires_grad_(), images(2)
    (gradient,) = torch.autograd.grad(distance(moving, goal).sum(), moving)
    for direction in ((goal - moving.detach()).double(), gradient.double() / gradient.norm()):
        step = 1e-5 * direction
        with torch.no_grad():
            ahead, back = (by_the_formula(exact, moving.double() + sign * step, goal).sum() for sign in (1, -1))
        along = (gradient.double() * direction).sum().item()
        assert abs(along) > 0.1
        assert along == pytest.approx((ahead - back).item() / 2e-5, rel=5e-3)


def test_the_gradient_points_to_the_reference_and_reaches_nothing_else(distance):
    moving, goal = images(1).requires_grad_(), images(2).requires_grad_()
    far = distance(moving, goal)
    far.sum().backward()
    assert (distance(moving - 0.01 * moving.grad.sign(), goal) < far).all()
    assert goal.grad is None
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert not distance.train().net.training


def test_features_of_zeros_have_a_finite_gradient():
    class Shut(nn.Module):
        def stages(self, images: Tensor) -> list[Tensor]:
            return [images * 0 for _ in range(5)]

    moving = images(1).requires_grad_()
    far = Lite0Distance(Shut())(moving, images(2))
    far.sum().backward()
    assert torch.equal(far, torch.zeros(2))
    assert torch.equal(moving.grad, torch.zeros_like(moving))


def test_lower_precision_around_it_changes_nothing(distance):
    with torch.autocast("cpu", torch.bfloat16):
        inside = distance(images(1), images(2))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, distance(images(1), images(2)))
    assert distance(images(1).bfloat16(), images(2).bfloat16()).dtype == torch.float32


def test_what_cannot_be_compared_is_refused(distance):
    with pytest.raises(ValueError, match=r"two batches \(B, 3, H, W\), given \(2, 3, 40, 40\) and \(1, 3, 40, 40\)"):
        distance(images(1), images(2, count=1))
    for shape in ((2, 3, 31, 64), (2, 3, 64, 31)):
        with pytest.raises(ValueError, match=r"images of at least 32 pixels a side, given \((31, 64|64, 31)\)"):
            distance(torch.zeros(shape), torch.zeros(shape))
