"""Our KARLs, built as a case describes and filled with its weights."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case
from torch import Tensor

from imgtok.published import karl as published
from imgtok.tokenizers.karl import KARL, KARLConfig, KARLTraining, TransformerConfig
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from imgtok.tokenizers.vae import VAE, VAEConfig


def base_config(about: dict[str, Any]) -> VAEConfig | MaskGITVQGANConfig:
    """Of the autoencoder that a case describes."""
    widths = tuple(about["base_channels"] * multiplier for multiplier in about["channel_multipliers"])
    shape: dict[str, Any] = {
        "latent_channels": about["latent_channels"],
        "block_channels": widths,
        "layers_per_block": about["residual_blocks"],
    }
    if about["kind"] == "vqgan":
        return MaskGITVQGANConfig(**shape, vocab_size=about["codebook_size"])
    return VAEConfig(**shape, scaling_factor=about["scale"], encoder_attention=True)


def config(case: Case, training: KARLTraining) -> KARLConfig:
    about = case.about["model"]
    sizes = {
        part: TransformerConfig(width=about[part]["width"], depth=about[part]["layers"], num_heads=about[part]["heads"])
        for part in ("encoder", "decoder")
    }
    return KARLConfig(
        image_size=about["base"]["resolution"],
        base=base_config(about["base"]),
        base_use="published",
        quantized=about["quantized"],
        vocab_size=about["token_codebook_size"],
        token_width=about["token_dim"],
        max_tokens=about["max_tokens"],
        position_grid=about["position_grid"],
        halting_width=about["halting_hidden"],
        training=training,
        **sizes,
    )


def karl(case: Case, **training: Any) -> KARL:
    model = KARL(config(case, KARLTraining(**training))).eval()
    weights = {name: value for name, value in case.weights().items() if not name.startswith("gan_losses.")}
    model.load_state_dict(published.as_ours(model, weights))
    return model


def autoencoder(case: Case) -> VAE | MaskGITVQGAN:
    """The autoencoder of a case of its own."""
    built = base_config(case.about["model"])
    model = VAE(built) if isinstance(built, VAEConfig) else MaskGITVQGAN(built)
    model.load_state_dict(published.autoencoder_as_ours(model, case.weights()))
    return model.eval()


def unit(images: Tensor) -> Tensor:
    """Images of ours in the range of the cases."""
    return (images + 1) / 2


def ours(images: Tensor) -> Tensor:
    """Images of the cases in our range."""
    return images * 2 - 1


def like(case: Case, name: str, value: Tensor | float) -> Tensor:
    """A number as it is recorded."""
    return torch.as_tensor(value).to(case.recorded[name].dtype)
