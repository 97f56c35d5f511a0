"""DINOv2 (arXiv 2304.07193): a frozen network whose features judge reconstructions and teach tokenizers (REPA).

The network is timm's vision transformer (another than DINOv2 will do), the weights Meta's published `.pth` or timm's
own safetensors: a file on this machine or, where that is asked for, a download from the Hugging Face Hub. Images are
brought to one size (bicubic with antialiasing), because the network's positions are those of a fixed grid, and
normalised as it was trained. The features are those after the last LayerNorm.

Shapes: B batch, N patches of (size / patch)^2, D width.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.hub import find_folder
from imgtok.weights import read_weights, skeleton

DINOV2_LARGE = "vit_large_patch14_dinov2.lvd142m"
"""timm's name of ViT-L/14, the network that FlexTok's paper compares with and learns from."""
SIZE = 224
"""Pixels a side that images are brought to: 16 x 16 patches of 14."""
FORMATS = (".safetensors", ".pth", ".pt", ".bin")
"""What weights may be stored as; all but the first are read with `weights_only`."""
TIMM_WEIGHTS = "model.safetensors"
"""The file in timm's repositories on the Hub."""


class Fields(NamedTuple):
    """What a program calls its fields that name a network: messages begin with them."""

    model: str
    weights: str
    size: str


OF_EVALUATION = Fields("dino_model", "dino_weights", "dino_size")


class DINOFeatures(NamedTuple):
    """What the network says of B images."""

    whole: Tensor | None
    """(B, D), the class token; None for a network without one."""
    patches: Tensor
    """(B, N, D), row by row."""


class DINOv2(nn.Module):
    """The frozen network with its preprocessing."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, net: Any, size: int) -> None:
        """`net` is a vision transformer of timm's for images of `size` pixels a side."""
        super().__init__()
        from timm.data import resolve_model_data_config

        self.net = net.requires_grad_(False).eval()
        self.size = size
        trained = resolve_model_data_config(net)  # of pixels in [0, 1], by channel
        self.register_buffer("mean", torch.tensor(trained["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(trained["std"]).view(3, 1, 1), persistent=False)
        self.eval()

    @property
    def width(self) -> int:
        """D."""
        return int(self.net.num_features)

    @property
    def grid(self) -> int:
        """Patches a side; N is its square."""
        return int(self.net.patch_embed.grid_size[0])

    @property
    def has_class_token(self) -> bool:
        """Whether there is a token that stands for the whole image."""
        return self.net.cls_token is not None

    def train(self, mode: bool = True) -> DINOv2:
        """Stays in evaluation mode inside a model that is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> DINOFeatures:
        """Features of images (B, 3, H, W) in [-1, 1], square or not: they are stretched to the network's size."""
        tokens = self.net.forward_features(self.prepare(images))
        return DINOFeatures(tokens[:, 0] if self.has_class_token else None, tokens[:, self.net.num_prefix_tokens :])

    def maps(self, images: Tensor) -> Tensor:
        """The features of the patches as maps (B, D, grid, grid), in float32."""
        patches: Tensor = self(images).patches.float()
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, size, size), normalised; bicubic with antialiasing, overshoots cut off."""
        pixels = (images.float() + 1) / 2
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        return (pixels.clamp(0, 1) - self.mean) / self.deviation


def find_weights(
    model: str, given: str | Path | None = None, fields: Fields = OF_EVALUATION, *, download: bool = False
) -> Path:
    """The weights file of a timm model: what is given, else what is in a cache of this machine.

    `given` is a file, or a folder or Hub repository "owner/name" with model.safetensors. `download` says whether the
    Hub may be asked for the given repository, or for timm's own, where no cache has it. Raises FileNotFoundError that
    says where was looked and what to do, ValueError for a name that timm does not know or a file of another kind.
    """
    settings = _settings(model, fields)
    repository, official = settings.hf_hub_id, Path(settings.url or "").name
    places: list[Path] = []
    if given is not None:
        path = Path(given).expanduser()
        if path.is_file() and path.suffix not in FORMATS:
            raise ValueError(f"{fields.weights}: {path} is none of {', '.join(FORMATS)}")
        places = [path / TIMM_WEIGHTS if path.is_dir() else path]
        repository = str(given) if _is_repository(given) and not path.exists() else None
    elif official:
        places = [Path(torch.hub.get_dir()) / "checkpoints" / official]
    cached = _in_hub_cache(repository)
    for path in [*places, *([cached] if cached else [])]:
        if path.is_file():
            return path
    looked = [*map(str, places), *([f"the Hugging Face cache of {repository}"] if repository else [])]
    failure = None
    if download and repository:
        try:
            path = find_folder(repository, files=(TIMM_WEIGHTS,)) / TIMM_WEIGHTS
            if path.is_file():
                return path
            failure = f"the repository {repository} holds no {TIMM_WEIGHTS}"
        except FileNotFoundError as error:
            failure = str(error)
    supply = f"Get them with `hf download {settings.hf_hub_id} {TIMM_WEIGHTS}`" if settings.hf_hub_id else "Get them"
    asked = f"downloading failed: {failure}" if failure else "nothing is downloaded unasked"
    raise FileNotFoundError(
        f"{fields.weights}: the weights of {model} are missing: looked for {', '.join(looked) or 'nothing'}.\n"
        f"{supply} ({asked}), or give the path of a copy, {fields.weights}=FILE: Meta's .pth or timm's .safetensors."
    )


def load(model: str, weights: Path, size: int = SIZE, fields: Fields = OF_EVALUATION) -> DINOv2:
    """The network of timm's name `model` with weights from a file (safetensors, or a .pth that holds only tensors).

    Its position table is brought from the file's grid to that of `size` (bicubic, timm's rule); a classifier in the
    file is left. Raises ValueError for another kind of network, a size that patches do not divide, or a file that
    holds anything else than this network's weights.
    """
    import timm  # costs seconds
    from timm.models import eva, vision_transformer

    settings = _settings(model, fields)  # refuses a name before timm builds anything
    net: Any = skeleton(lambda: timm.create_model(model, pretrained=False, num_classes=0))
    as_timm_names_it: Any
    if isinstance(net, vision_transformer.VisionTransformer):
        as_timm_names_it = vision_transformer.checkpoint_filter_fn
    elif isinstance(net, eva.Eva):  # DINOv3 and others
        as_timm_names_it = eva.checkpoint_filter_fn
    else:
        raise ValueError(f"{fields.model}: {model}: not a vision transformer, but a {type(net).__name__}")
    patch = net.patch_embed.patch_size[0]
    if size < patch or size % patch:
        raise ValueError(f"{fields.size}: {size} pixels are not a whole number of {model}'s patches of {patch}")
    net.set_input_size(img_size=(size, size))
    names = settings.classifier or ()  # one, or several
    classifiers = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    try:
        state = as_timm_names_it(read_weights(weights), net)
        wanted = {name: value.float() for name, value in state.items() if not name.startswith(classifiers)}
        net.load_state_dict(wanted, assign=True)
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        text = f"{weights}: does not hold the weights of {model}: {_brief(error)}"
        raise ValueError(f"{fields.weights}: {text}") from error
    except ValueError as error:
        raise ValueError(f"{fields.weights}: {error}") from error
    return DINOv2(net, size)


def _settings(model: str, fields: Fields) -> Any:
    """What timm publishes about a model: its repository and its address."""
    import timm

    try:
        settings = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    except RuntimeError:  # timm's word for an unknown tag after the dot
        settings = None
    if settings is None:
        known = ", ".join(timm.list_pretrained("*dinov2*"))
        raise ValueError(f"{fields.model}: timm publishes no model {model!r}; those of DINOv2 are {known}")
    return settings


def _is_repository(name: str | Path) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) is not None and Path(name).suffix not in FORMATS


def _in_hub_cache(repository: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in (TIMM_WEIGHTS, "pytorch_model.bin") if repository else ():
        found = try_to_load_from_cache(str(repository), name)
        if isinstance(found, str):
            return Path(found)
    return None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
