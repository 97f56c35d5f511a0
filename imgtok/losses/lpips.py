"""LPIPS v0.1 (arXiv 1801.03924): how different two images look to a network that was trained to classify.

Both images go through VGG16 or AlexNet. After five of its layers the features of every position are brought to unit
length, the squares of their differences are weighted a channel by learned, non-negative heads, averaged over positions,
and the five numbers added: 0 for equal images, rarely above 1. It is a score of reconstructions, and a loss.

torch-fidelity, which imgtok otherwise takes its networks from, has LPIPS too, and the tests hold this one to it. It
does not serve here: its constructor downloads both files and takes no path, it has no AlexNet, and like the original it
divides by a square root whose gradient at a feature vector of zeros is NaN, which ends a training run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from imgtok.files import package_folders
from imgtok.layers.convolution import convolve_frozen
from imgtok.weights import open_weights

LPIPSNet = Literal["vgg", "alex"]
"""Which network looks at the images. VGG16 is usual as a loss and for tokenizers, AlexNet is the authors' choice."""

_EPS = 1e-10  # added to the length of a feature vector, as published
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, on the scale [-1, 1]


@dataclass(frozen=True)
class _Facts:
    """What is known of a network: where its five layers are read, and where its weights are to be had."""

    taps: tuple[int, ...]
    """Indices of the five ReLUs among torchvision's `features`."""
    channels: tuple[int, ...]
    smallest: int
    """Pixels a side of the smallest image that leaves something at the fifth layer."""
    backbone: str
    """Name of torchvision's file; the digits in it begin its SHA-256."""
    size: str
    heads: tuple[str, ...]
    """Names under which torch.hub's cache may hold the heads: the original's, and torch-fidelity's copy."""


_FACTS: Mapping[LPIPSNet, _Facts] = {
    "vgg": _Facts(
        taps=(3, 8, 15, 22, 29),
        channels=(64, 128, 256, 512, 512),
        smallest=16,
        backbone="vgg16-397923af.pth",
        size="528 MB",
        heads=("vgg.pth", "weights-vgg16-lpips.pth"),
    ),
    "alex": _Facts(
        taps=(1, 4, 7, 9, 11),
        channels=(64, 192, 384, 256, 256),
        smallest=31,
        backbone="alexnet-owt-7be5be79.pth",
        size="233 MB",
        heads=("alex.pth",),
    ),
}


class LPIPS(nn.Module):
    """The distance of pairs of images; frozen, in float32 whatever the surrounding precision, differentiable."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: LPIPSNet, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        """Takes torchvision's state dict (`features.0.weight`, ...; its classifier is not needed) and the published
        heads (`lin0.model.1.weight`, ... of shape (1, C, 1, 1)). Raises ValueError for a missing tensor, another shape,
        or a negative head, with which the distance would be none.
        """
        super().__init__()
        self.net: LPIPSNet = net
        self._facts = _FACTS[net]
        self.layers = _empty_layers(net)[: self._facts.taps[-1] + 1]
        self.layers.load_state_dict(_pick(backbone, self.layers.state_dict(), "features."), assign=True)
        wanted = {
            f"lin{i}.model.1.weight": torch.empty(1, channels, 1, 1, device="meta")
            for i, channels in enumerate(self._facts.channels)
        }
        found = _pick(heads, wanted)
        if any(bool((head < 0).any()) for head in found.values()):
            raise ValueError("a head has negative weights, the published ones have none")
        self.heads = nn.ParameterList(found.values())
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)
        self.float().requires_grad_(False)

    @classmethod
    def from_files(cls, net: LPIPSNet, backbone: Path, heads: Path) -> Self:
        """Reads the two files (.safetensors, or .pth without executing it); raises ValueError where they are others."""
        tensors = {}
        for path in (backbone, heads):
            try:
                tensors[path] = open_weights(path)
            except ValueError as error:
                raise ValueError(f"{path} is not a file of weights: {str(error)[:200]}") from error
        try:
            return cls(net, tensors[backbone], tensors[heads])
        except ValueError as error:
            raise ValueError(f"{backbone} and {heads} do not hold the weights of LPIPS with {net}: {error}") from error

    @property
    def smallest(self) -> int:
        """Pixels a side that images must have."""
        return self._facts.smallest

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1] from as many others; symmetric."""
        if images.shape != references.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares two batches (B, 3, H, W), given {tuple(images.shape)} and {tuple(references.shape)}"
            )
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"LPIPS with {self.net} needs images of at least {self.smallest} pixels a side, "
                f"given {tuple(images.shape[2:])}"
            )
        total = images.new_zeros(len(images), dtype=torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self.heads, self._features(images), self._features(references), strict=True)
            for head, one, other in pairs:
                difference = (unit_length(one) - unit_length(other)).square()  # (B, C, h, w)
                total = total + (difference * head).sum(1).mean((1, 2))
        return total  # (B,)

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        x = (images.float() - self.shift) / self.scale
        for index, layer in enumerate(self.layers):
            x = convolve_frozen(layer, x) if isinstance(layer, nn.Conv2d) else layer(x)
            if index in self._facts.taps:
                yield x


def unit_length(features: Tensor) -> Tensor:
    """Vectors of unit length over the channels. Where all are zero `vector_norm` has the gradient 0, a root none."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _EPS)


def _empty_layers(net: LPIPSNet) -> nn.Sequential:
    """The convolutions of torchvision without memory for weights."""
    from torchvision import models  # costs seconds to import

    with torch.device("meta"):
        model = models.vgg16() if net == "vgg" else models.alexnet()
    layers: nn.Sequential = model.features
    return layers


def _pick(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The `wanted` tensors out of `found`, where their names begin with `prefix`."""
    for name, tensor in wanted.items():
        value = found.get(prefix + name)
        if value is None or value.shape != tensor.shape:
            what = "missing" if value is None else f"of shape {tuple(value.shape)}"
            raise ValueError(f"{prefix + name} is {what}, must be of shape {tuple(tensor.shape)}")
    return {name: found[prefix + name] for name in wanted}


# Weights


def find_lpips_weights(
    asked_by: str, net: LPIPSNet, backbone: Path | None = None, heads: Path | None = None, *, section: str = ""
) -> tuple[Path, Path]:
    """The files of the backbone and of the heads: those given, else those of torch.hub's cache, and for the heads those
    of an installed `lpips` package. Nothing is downloaded and nothing of that package is executed.

    `asked_by` is the setting that needs them, and `section` what stands before `lpips_backbone=` and `lpips_heads=` on
    its command line; both are for the message. Raises FileNotFoundError.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    facts = _FACTS[net]
    places = {
        "backbone": [backbone] if backbone else [cache / facts.backbone],
        "heads": [heads] if heads else [*(cache / name for name in facts.heads), *_packaged_heads(net)],
    }
    found = {what: next((path for path in paths if path.is_file()), None) for what, paths in places.items()}
    addresses = {
        "backbone": f"https://download.pytorch.org/models/{facts.backbone} ({facts.size})",
        "heads": f"https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/{net}.pth (some KB)",
    }
    lines = [
        f"{asked_by}: the {what} of LPIPS with {net}: missing: looked for {' and '.join(map(str, places[what]))}.\n"
        f"Get {addresses[what]} and put it there, or give {section}lpips_{what}=PATH."
        for what, path in found.items()
        if path is None
    ]
    if found["backbone"] is None or found["heads"] is None:
        raise FileNotFoundError("\n".join(lines))
    return found["backbone"], found["heads"]


def _packaged_heads(net: LPIPSNet) -> list[Path]:
    """Where an installed `lpips` package keeps its heads."""
    return [folder / "weights" / "v0.1" / f"{net}.pth" for folder in package_folders("lpips")]
