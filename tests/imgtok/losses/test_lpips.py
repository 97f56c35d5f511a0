"""LPIPS with random weights: the formula, torch-fidelity's copy of it, its gradient, and the search for its files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision import models

from imgtok.losses.lpips import LPIPS, find_lpips_weights

WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
RELUS = {"vgg": (2, 4, 7, 10, 13), "alex": (1, 2, 3, 4, 5)}
"""Which of the network's ReLUs, counted from 1, are looked at: the last before each pool; all of AlexNet's."""


def random_backbone(net: str) -> dict[str, Tensor]:
    """Like torchvision's file, less the classifier; kernels large enough to leave features at the fifth layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = (models.vgg16() if net == "vgg" else models.alexnet()).features.state_dict()
    state = {}
    for name, blank in shapes.items():
        deviation = (2 / blank[0].numel()) ** 0.5 if blank.ndim == 4 else 0.1
        state[f"features.{name}"] = torch.randn(blank.shape, generator=generator) * deviation
    return state


def random_heads(net: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for i, width in enumerate(WIDTHS[net])
    }


@pytest.fixture(scope="module", params=["vgg", "alex"])
def lpips(request) -> LPIPS:
    return LPIPS(request.param, random_backbone(request.param), random_heads(request.param))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(random_backbone("alex"), folder / "backbone.pth")
    torch.save(random_heads("alex"), folder / "heads.pth")
    save_file(random_backbone("alex"), folder / "backbone.safetensors")
    return {path.name: path for path in folder.iterdir()}


def images(seed: int, count: int = 2, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ------------------------------------------------------------------------------------------------ the formula


def by_the_formula(net: str, one: Tensor, other: Tensor) -> Tensor:
    """Section 3 of the paper in float64, from torchvision's network and nothing of ours."""
    with torch.device("meta"):
        network = (models.vgg16() if net == "vgg" else models.alexnet()).features
    state = {name.removeprefix("features."): value.double() for name, value in random_backbone(net).items()}
    network.load_state_dict(state, assign=True)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    kept: list[list[Tensor]] = []
    for x in (one, other):
        x = ((x.double() + 1) / 2 - mean.double()[:, None, None]) / deviation.double()[:, None, None]
        features, relus = [], 0
        for layer in network:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                relus += 1
                if relus in RELUS[net]:
                    features.append(x.detach().clone())
                if relus == RELUS[net][-1]:
                    break
        kept.append(features)
    total = torch.zeros(len(one), dtype=torch.float64)
    for a, b, head in zip(*kept, random_heads(net).values(), strict=True):
        for row in range(len(one)):
            for y in range(a.shape[2]):
                for x in range(a.shape[3]):
                    u, v = a[row, :, y, x], b[row, :, y, x]
                    u, v = u / (u.pow(2).sum().sqrt() + 1e-10), v / (v.pow(2).sum().sqrt() + 1e-10)
                    share = (head.flatten().double() * (u - v) ** 2).sum()
                    total[row] += share / (a.shape[2] * a.shape[3])
    return total


def test_it_is_the_published_formula(lpips):
    expected = by_the_formula(lpips.net, images(3), images(4))
    found = lpips(images(3), images(4))
    assert found.shape == (2,)
    assert (found > 0.1).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_it_is_what_torch_fidelity_computes(monkeypatch):
    from torch_fidelity import sample_similarity_lpips as peer

    with torch.device("meta"):
        features = models.vgg16().features
    backbone = {name.removeprefix("features."): value for name, value in random_backbone("vgg").items()}
    features.load_state_dict(backbone, assign=True)
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *args, **kwargs: random_heads("vgg"))
    monkeypatch.setattr(peer, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=features))
    theirs = peer.SampleSimilarityLPIPS("lpips-vgg16")
    ours = LPIPS("vgg", random_backbone("vgg"), random_heads("vgg"))
    expected = theirs((images(3) + 1) * 127.5, (images(4) + 1) * 127.5)
    torch.testing.assert_close(ours(images(3), images(4)), expected.flatten(), rtol=1e-4, atol=0)


def test_a_distance_is_symmetric_zero_for_equals_and_grows(lpips):
    a, b = images(3), images(4)
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    assert torch.equal(lpips(a, a), torch.zeros(2))
    near, far = lpips(a, a.lerp(b, 0.1)), lpips(a, a.lerp(b, 0.6))
    assert (near < far).all()
    torch.testing.assert_close(lpips(a[1:], b[1:]), lpips(a, b)[1:])


def test_the_gradient_points_to_the_reference_and_leaves_the_weights_alone(lpips):
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    moving, goal = images(3).requires_grad_(), images(4)
    distance = lpips(moving, goal)
    (gradient,) = torch.autograd.grad(distance.sum(), moving)
    assert (lpips(moving - 0.05 * gradient.sign(), goal) < distance).all()
    assert all(parameter.grad is None for parameter in lpips.parameters())


def test_features_of_zeros_have_a_finite_gradient():
    backbone = random_backbone("alex")
    for name, value in backbone.items():
        if name.endswith("bias"):
            value.fill_(-100.0)  # every ReLU is shut: all features are zero, as those of a flat image may be
    lpips = LPIPS("alex", backbone, random_heads("alex"))
    moving = images(3).requires_grad_()
    distance = lpips(moving, images(4))
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(2))
    assert moving.grad is not None
    assert torch.equal(moving.grad, torch.zeros_like(moving))


def test_lower_precision_around_it_changes_nothing(lpips):
    with torch.autocast("cpu", torch.bfloat16):
        inside = lpips(images(3), images(4))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, lpips(images(3), images(4)))


def test_what_cannot_be_compared_is_refused(lpips):
    with pytest.raises(ValueError, match=r"two batches \(B, 3, H, W\), given \(2, 3, 32, 32\) and \(1, 3, 32, 32\)"):
        lpips(images(3), images(4, count=1))
    with pytest.raises(ValueError, match=r"images of at least (16|31) pixels a side, given \(8, 8\)"):
        lpips(images(3, side=8), images(4, side=8))
    smallest = 16 if lpips.net == "vgg" else 31
    assert lpips(images(3, side=smallest), images(4, side=smallest)).isfinite().all()


# -------------------------------------------------------------------------------------------------- the files


def test_files_of_either_format_are_read(files):
    expected = LPIPS("alex", random_backbone("alex"), random_heads("alex"))(images(3), images(4))
    for name in ("backbone.pth", "backbone.safetensors"):
        loaded = LPIPS.from_files("alex", files[name], files["heads.pth"])
        assert torch.equal(loaded(images(3), images(4)), expected)


def test_other_files_are_named_and_not_executed(files, tmp_path):
    with pytest.raises(ValueError, match=r"LPIPS with vgg: features.0.weight is of shape \(64, 3, 11, 11\)"):
        LPIPS.from_files("vgg", files["backbone.pth"], files["heads.pth"])
    with pytest.raises(ValueError, match=r"features.0.weight is missing, must be of shape \(64, 3, 11, 11\)"):
        LPIPS.from_files("alex", files["heads.pth"], files["heads.pth"])
    with pytest.raises(ValueError, match=r"lin0.model.1.weight is missing"):
        LPIPS.from_files("alex", files["backbone.pth"], files["backbone.pth"])
    torch.save({name: -value for name, value in random_heads("alex").items()}, tmp_path / "negative.pth")
    with pytest.raises(ValueError, match="a head has negative weights"):
        LPIPS.from_files("alex", files["backbone.pth"], tmp_path / "negative.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pth is not a file of weights"):
        LPIPS.from_files("alex", files["backbone.pth"], tmp_path / "text.pth")
    torch.save({"lin0": Executed()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code.pth is not a file of weights"):
        LPIPS.from_files("alex", files["backbone.pth"], tmp_path / "code.pth")


class Executed:
    def __reduce__(self):
        return pytest.fail, ("a file of weights was executed",)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch.hub, and no installed `lpips` package."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", None)
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_missing_weights_are_explained(cache):
    with pytest.raises(FileNotFoundError) as caught:
        find_lpips_weights("loss.lpips=1.0", "vgg", section="loss.")
    first, second, third, fourth = str(caught.value).split("\n")
    assert first.startswith("loss.lpips=1.0: the backbone of LPIPS with vgg: missing")
    assert str(cache / "vgg16-397923af.pth") in first
    assert second.startswith("Get https://download.pytorch.org/models/vgg16-397923af.pth (528 MB)")
    assert second.endswith("or give loss.lpips_backbone=PATH.")
    assert str(cache / "vgg.pth") in third
    assert "PerceptualSimilarity" in fourth
    assert fourth.endswith("or give loss.lpips_heads=PATH.")


def test_only_what_is_missing_is_named(cache, tmp_path):
    (cache / "alexnet-owt-7be5be79.pth").touch()
    with pytest.raises(FileNotFoundError) as caught:
        find_lpips_weights("metrics=[lpips]", "alex")
    assert "backbone" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"looked for .*nowhere.pth"):
        find_lpips_weights("metrics=[lpips]", "alex", tmp_path / "nowhere.pth")


def test_a_given_path_comes_before_the_cache(cache, tmp_path):
    for path in (cache / "vgg16-397923af.pth", cache / "weights-vgg16-lpips.pth", tmp_path / "a", tmp_path / "b"):
        path.touch()
    assert find_lpips_weights("x", "vgg") == (cache / "vgg16-397923af.pth", cache / "weights-vgg16-lpips.pth")
    assert find_lpips_weights("x", "vgg", tmp_path / "a", tmp_path / "b") == (tmp_path / "a", tmp_path / "b")
    assert find_lpips_weights("x", "vgg", heads=tmp_path / "b")[0] == cache / "vgg16-397923af.pth"


def test_the_heads_of_an_installed_package_are_found_without_importing_it(cache, tmp_path, monkeypatch):
    package = tmp_path / "site/lpips"
    (package / "weights/v0.1").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "weights/v0.1/vgg.pth").touch()
    (cache / "vgg16-397923af.pth").touch()
    monkeypatch.delitem(sys.modules, "lpips")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_lpips_weights("x", "vgg")[1] == package / "weights/v0.1/vgg.pth"
    assert not isinstance(sys.modules.get("lpips"), ModuleType)
