"""DINOv2 (arXiv 2304.07193): a frozen network whose features judge reconstructions and teach tokenizers (REPA).

The network is timm's vision transformer, the weights a file on this machine: Meta's published `.pth` or timm's own
safetensors. Nothing is downloaded here; where no file is given, the caches of torch.hub and of the Hugging Face Hub are
looked through. Images are brought to one size (bicubic with antialiasing), because the network's positions are those of
a fixed grid, and normalised as it was trained. The features are those behind the last LayerNorm.

Shapes: B batch, N patches of (size / patch)^2, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from timm.models import VisionTransformer

DINOV2_LARGE = "vit_large_patch14_dinov2.lvd142m"
"""timm's name of ViT-L/14, the network that FlexTok's paper compares with and learns from."""
SIZE = 224
"""Pixels a side that images are brought to: 16 x 16 patches of 14."""

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], by channel


class DINOFeatures(NamedTuple):
    """What the network says of B images."""

    whole: Tensor
    """(B, D), the class token."""
    patches: Tensor
    """(B, N, D), row by row."""


class DINOv2(nn.Module):
    """The frozen network with its preprocessing."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, net: VisionTransformer, size: int) -> None:
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        self.size = size
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION).view(3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        """D."""
        return int(self.net.embed_dim)

    @property
    def grid(self) -> int:
        """Patches a side; N is its square."""
        return int(self.net.patch_embed.grid_size[0])

    def train(self, mode: bool = True) -> DINOv2:
        """Stays in evaluation mode inside a model that is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> DINOFeatures:
        """Features of images (B, 3, H, W) in [-1, 1], square or not: they are stretched to the network's size."""
        tokens = self.net.forward_features(self.prepare(images))
        return DINOFeatures(tokens[:, 0], tokens[:, self.net.num_prefix_tokens :])

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, size, size), normalised; bicubic with antialiasing, overshoots cut off."""
        pixels = (images.float() + 1) / 2
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        return (pixels.clamp(0, 1) - self.mean) / self.deviation


def find_weights(model: str, given: Path | None, purpose: str) -> Path:
    """The weights file of a timm model: the one given, else what is in a cache of this machine.

    `purpose` begins the message of the FileNotFoundError for none. Raises ValueError without timm or for a
    name that it does not know.
    """
    settings = _settings(model)
    repository, official = settings.hf_hub_id, Path(settings.url or "").name
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(_missing(purpose, model, repository, [str(given)]))
        return given
    places = [Path(torch.hub.get_dir()) / "checkpoints" / official] if official else []
    found = _in_hub_cache(repository)
    if found is not None:
        places.append(found)
    for path in places:
        if path.is_file():
            return path
    looked = [*map(str, places), *([f"the Hugging Face cache of {repository}"] if repository else [])]
    raise FileNotFoundError(_missing(purpose, model, repository, looked))


def load(model: str, weights: Path, size: int = SIZE) -> DINOv2:
    """The network of timm's name `model` with weights from a file (safetensors, or a .pth that holds only tensors).

    Its position table is brought from the file's grid to that of `size` (bicubic, timm's rule). Raises ValueError for
    a size that patches do not divide, or a file that holds something else.
    """
    timm = _timm()
    _settings(model)  # refuses a name before timm builds anything
    net = timm.create_model(model, pretrained=False, num_classes=0)
    if not isinstance(net, timm.models.VisionTransformer) or not net.has_class_token:
        raise ValueError(f"{model}: not a vision transformer with a class token, but a {type(net).__name__}")
    patch = net.patch_embed.patch_size[0]
    if size < patch or size % patch:
        raise ValueError(f"size: {size} pixels are not a whole number of {model}'s patches of {patch}")
    net.set_input_size(img_size=(size, size))
    state = _read(weights)
    try:
        net.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, net))
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"{weights}: does not hold the weights of {model}: {_brief(error)}") from error
    return DINOv2(net, size)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable weights file: {_brief(error)}") from error
    except Exception as error:  # what the unpickler says of a file that holds more than tensors
        raise ValueError(f"{path}: holds more than tensors, and is not read: {_brief(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not named tensors")
    return state


def _settings(model: str) -> Any:
    """What timm publishes about a model: its repository and its address."""
    timm = _timm()
    try:
        settings = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    except RuntimeError:  # timm's word for an unknown tag behind the dot
        settings = None
    if settings is None:
        known = ", ".join(timm.list_pretrained("*dinov2*"))
        raise ValueError(f"timm publishes no model {model!r}; those of DINOv2 are {known}")
    return settings


def _in_hub_cache(repository: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "pytorch_model.bin") if repository else ():
        found = try_to_load_from_cache(str(repository), name)
        if isinstance(found, str):
            return Path(found)
    return None


def _missing(purpose: str, model: str, repository: str | None, looked: list[str]) -> str:
    supply = f"Get them with `hf download {repository} model.safetensors`" if repository else "Get that file"
    return (
        f"{purpose}: the weights of {model} are missing: looked for {', '.join(looked) or 'no place, timm has none'}.\n"
        f"{supply} (nothing is downloaded unasked), or give the path of a copy: Meta's .pth or timm's .safetensors."
    )


def _timm() -> Any:
    try:
        import timm  # an extra, and costs seconds to import
        import timm.models.vision_transformer
    except ImportError as error:
        raise ValueError("DINOv2 is built by timm, which is not installed: pip install 'timm>=1.0'") from error
    return timm


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
