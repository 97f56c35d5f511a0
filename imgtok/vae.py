"""The continuous autoencoder below the token models: diffusers' `AutoencoderKL`, any size of it.

Images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / f, W / f) with f = 2^(levels - 1), multiplied by
`scaling_factor` so that they have about unit deviation. Here it is wrapped with the suite's
configuration, file format and training loss (L1 + squared error + KL, no downloaded weights);
FlexTok and others hold one frozen inside. A small one for 32-pixel shapes ships with the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from imgtok.config import ConfigError, NonNegativeFloat, PositiveFloat, PositiveInt, check
from imgtok.hub import Pretrained
from imgtok.tokenizer import Losses


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of the autoencoder and weights of its training loss."""

    kind: Literal["vae"] = "vae"
    latent_channels: PositiveInt = 4
    """Channels of the latent."""
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; every level but the last halves the image."""
    layers_per_block: PositiveInt = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    norm_groups: PositiveInt = 32
    """Groups of every group normalisation; divides all widths."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies latents after encoding; measured at the end of training as 1 / their deviation."""
    kl_weight: NonNegativeFloat = 1e-6
    """Weight of the KL divergence (in nats, summed over an image's latent, per image element)."""

    def __post_init__(self) -> None:
        check(self)
        for width in self.block_channels:
            if width < 1 or width % self.norm_groups:
                raise ValueError(
                    f"block_channels: {width} is not a positive multiple of norm_groups = {self.norm_groups}"
                )

    @property
    def factor(self) -> int:
        """Pixels a side of one latent cell."""
        return 2 ** (len(self.block_channels) - 1)


class VAE(nn.Module, Pretrained):
    """`AutoencoderKL` with the suite's loss and scaling."""

    config_class: ClassVar[type] = VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # costs seconds to import

        self.config = config
        levels = len(config.block_channels)
        self.autoencoder = AutoencoderKL(
            block_out_channels=config.block_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            latent_channels=config.latent_channels,
        )

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Losses:
        """Reconstruction (L1 + squared error) and KL losses of a batch."""
        posterior = self.autoencoder.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=generator.device).to(images.device)
        decoded = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        l1 = F.l1_loss(decoded, images)
        mse = F.mse_loss(decoded, images)
        kl = posterior.kl().sum() / images.numel()
        return Losses(l1 + mse + self.config.kl_weight * kl, {"l1": l1, "mse": mse, "kl": kl})

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: the posterior's mean, or with standard-normal `noise` a sample of it."""
        posterior = self.autoencoder.encode(images).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images in about [-1, 1], not clamped."""
        return self.autoencoder.decode(latents / self.config.scaling_factor).sample


def packaged_vae(name: str) -> Path:
    """Folder of an autoencoder that ships with imgtok, such as "shapes32"."""
    root = Path(str(resources.files("imgtok"))) / "assets"
    folder = root / f"vae-{name}"
    if not folder.is_dir():
        known = sorted(path.name.removeprefix("vae-") for path in root.glob("vae-*"))
        raise FileNotFoundError(f"imgtok ships no autoencoder named {name!r}; it has {known}")
    return folder


# ---------------------------------------------------------------- folders of diffusers

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
FIXED = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""Settings of an AutoencoderKL that `VAE` does not have, at the only values that it can stand for."""
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""How diffusers once named the parts of its attention, and how it does today."""


def is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a model that diffusers wrote: its config.json names a class."""
    try:
        return "_class_name" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def from_diffusers(folder: Path, scaling_factor: float | None = None) -> VAE:
    """The `AutoencoderKL` in a folder that diffusers wrote, as a `VAE` in evaluation mode.

    Only the numbers of its config.json are used. `scaling_factor` replaces the one there, and has to be given where
    there is none. Raises ConfigError for an autoencoder of another kind, FileNotFoundError without safetensors,
    ValueError for weights that do not fit.
    """
    path, weights = folder / "config.json", folder / DIFFUSERS_WEIGHTS
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["_class_name"] != "AutoencoderKL":
        raise ConfigError(f"{path}: _class_name: {found['_class_name']!r}, must be 'AutoencoderKL'")
    needed = ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
    missing = [name for name in needed if name not in found]
    if missing:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}; copy or download the folder again")
    channels = tuple(found["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    fixed = FIXED | {name: kind * len(channels) for name, kind in blocks.items()}
    for name, value in fixed.items():
        if found.get(name, value) != value:
            raise ConfigError(f"{path}: {name}: {found[name]!r}, imgtok can use {value!r} alone")
    factor = found.get("scaling_factor") if scaling_factor is None else scaling_factor
    if factor is None:
        raise ConfigError(f"{path}: has no scaling_factor; give it yourself, vae_scaling_factor=NUMBER")
    config = VAEConfig(
        latent_channels=found["latent_channels"],
        block_channels=channels,
        layers_per_block=found["layers_per_block"],
        norm_groups=found["norm_num_groups"],
        scaling_factor=float(factor),
    )
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no {weights.name}; other formats may hold code and are not read")
    tensors = load_file(weights)
    for old, new in OLD_ATTENTION.items():
        tensors = {name.replace(old, new) if ".attentions." in name else name: t for name, t in tensors.items()}
    vae = VAE(config)
    try:
        vae.autoencoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{weights}: the weights do not fit {path.name}: {error}") from error
    return vae.eval()
