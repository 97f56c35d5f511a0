"""KL-16, the autoencoder under MAR, xAR, TokenBridge and KARL, from the file that it was published in.

256 pixels -> 16 channels of 16 x 16, times 0.2325. It is the suite's `VAE` with attention in the encoder's last
level; only names and the form of the attention's kernels (1x1 convolutions there, matrices here) differ. The
published `kl16.ckpt` is a pickle: it is read with `weights_only=True`, which runs nothing. Widths, levels and
channels are read off the tensors; the 32 groups of the normalisations and the scale are in no file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from imgtok import hub
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.weights import load_pickle

logger = logging.getLogger(__name__)

KL16 = VAEConfig(
    latent_channels=16,
    block_channels=(128, 128, 256, 256, 512),
    layers_per_block=2,
    norm_groups=32,
    scaling_factor=0.2325,
    encoder_attention=True,
)
"""The published shape: 66,456,019 parameters (section 1 of the xAR specification)."""

LEFTOVERS = ("loss.",)
"""How the names of what only its training needed begin: the discriminator, LPIPS."""

NAMES: Mapping[str, str] = {
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.attentions.0.": ".mid.attn_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".down_blocks.": ".down.",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    ".conv_norm_out.": ".norm_out.",
}
"""What stands in a name of diffusers' -> in a published one; decoder levels are also counted from the other end."""


def published_name(name: str, levels: int) -> str:
    """The published name of a parameter of `VAE.autoencoder`."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)


def is_kernel(published: str) -> bool:
    """Whether a tensor is a 1x1 convolution in the file, (out, in, 1, 1), and a matrix here."""
    return re.search(r"\.attn(\.|_1\.)(\d+\.)?(q|k|v|proj_out)\.weight$", published) is not None


def load(path: Path, scaling_factor: float | None = None, map_location: str | torch.device = "cpu") -> VAE:
    """The autoencoder in a published file, `.ckpt` (weights under `model`) or `.safetensors`, in evaluation mode.

    `scaling_factor` replaces KL-16's. Raises ValueError for a file that holds anything else: a pickle of more than
    tensors, weights that are damaged, missing, unexpected or misshapen (all are listed).
    """
    tensors = _read(path)
    dropped = [name for name in tensors if name.startswith(LEFTOVERS)]
    if dropped:
        logger.info("%s: left out %d tensors of its training (%s*)", path, len(dropped), "*, ".join(LEFTOVERS))
    tensors = {name: value for name, value in tensors.items() if name not in dropped}
    config = _config(tensors, path, KL16.scaling_factor if scaling_factor is None else scaling_factor)
    levels = len(config.block_channels)
    with torch.device("meta"):  # shapes alone, so that a mistake is found before anything is copied
        blank = VAE(config).autoencoder.state_dict()
    names = {name: published_name(name, levels) for name in blank}
    wanted = {names[name]: _as_published(names[name], value) for name, value in blank.items()}
    hub.check_tensors(tensors, wanted, path, "KL autoencoder that its first and last layers")
    with torch.random.fork_rng(devices=[]):  # the first weights are overwritten: leave the caller's RNG alone
        vae = VAE(config)
    state = {name: tensors[published].reshape(blank[name].shape) for name, published in names.items()}
    vae.autoencoder.load_state_dict(state)
    return vae.to(map_location).eval()


def _as_published(published: str, value: Tensor) -> Tensor:
    return value[..., None, None] if is_kernel(published) else value


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return hub.read_safetensors(path)
    found = load_pickle(path)
    weights = found.get("model") if isinstance(found, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        held = ", ".join(map(str, found))[:200] if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: no weights under the key `model`, where kl16.ckpt has them (found: {held})")
    return weights


def _config(tensors: Mapping[str, Tensor], path: Path, scaling_factor: float) -> VAEConfig:
    """The shape as the tensors tell it; how far the others agree with these is for the caller to check."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    missing = [name for name in (*firsts, "post_quant_conv.weight") if name not in tensors]
    if missing or not levels:
        listed = ", ".join(missing or ["encoder.down.0.block.0.conv1.weight"])
        found = ", ".join(list(tensors)[:3])
        raise ValueError(f"{path}: not a KL autoencoder in the layout of kl16.ckpt: it lacks {listed} (found: {found})")
    try:
        return VAEConfig(
            latent_channels=tensors["post_quant_conv.weight"].shape[0],
            block_channels=tuple(tensors[name].shape[0] for name in firsts),
            layers_per_block=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
            norm_groups=KL16.norm_groups,
            scaling_factor=scaling_factor,
            encoder_attention=f"encoder.down.{levels - 1}.attn.0.norm.weight" in tensors,
        )
    except (ValueError, IndexError) as error:  # IndexError: a single number where a kernel should be
        raise ValueError(f"{path}: an autoencoder that imgtok cannot stand for: {error}") from error


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number at a place in the names; 0 without any."""
    matches = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)
