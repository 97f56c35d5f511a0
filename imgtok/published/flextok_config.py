"""The numbers of a published FlexTok's configuration (imgtok.published.flextok_template), and our configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from imgtok import hub
from imgtok.config import ConfigError
from imgtok.published.diffusers import diffusers_config
from imgtok.published.flextok_template import fill_in
from imgtok.sizes import in_pixels
from imgtok.tokenizers.flextok import FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.tokenizers.vae import VAEConfig

SAME = ("patch_size", "num_registers", "levels", "max_timestep", "nested_dropout", "null_dropout", "mode_scale")
"""Numbers that are fields of ours as they stand; those of a trunk are, after "encoder." and "decoder."."""
TRUNK = ("width", "depth", "head_dim")
TIMES: Mapping[tuple[bool, bool], Literal["mode", "logit_normal", "stratified_logit_normal"]] = {
    (False, False): "mode",
    (True, False): "logit_normal",
    (True, True): "stratified_logit_normal",
}
"""Whether times are logit-normal, and whether these are stratified (others never are) -> `FlexTokConfig.times`."""
PUBLISHED_VAE = VAEConfig(latent_channels=16)
"""The shape of the published autoencoders (arXiv 2502.13967); the published code builds it unless told of another."""
VAE_SHAPE = ("block_channels", "layers_per_block", "norm_groups", "encoder_attention")
AUTOENCODER_FOLDER = "vae"
"""Where an export puts an autoencoder of another shape: the published code can only be pointed to a folder."""
DIFFUSERS_SCALING_FACTOR = 0.18215
"""What diffusers takes for an `AutoencoderKL` whose config.json has no factor."""


def our_config(numbers: Mapping[str, Any], source: Path) -> FlexTokConfig:
    """The configuration of ours that the numbers of a description amount to.

    An autoencoder that is named by a path is looked for beside `source`, then there, then on the Hub (its
    config.json alone). How to decode is not described: as in the authors' later release, with 25 steps and
    projected guidance of 7.5. Raises ConfigError.
    """
    vae = _vae_config(numbers, source)
    with _named(source):
        return _config(numbers, vae)


@contextlib.contextmanager
def _named(source: Path) -> Iterator[None]:
    """Puts the file's name before the mistakes that our configurations find, which name fields."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _config(numbers: Mapping[str, Any], vae: VAEConfig) -> FlexTokConfig:
    if numbers["channels"] != vae.latent_channels:
        raise ValueError(
            f"encoder.module_dict.enc_patch_emb.channels_in: given {numbers['channels']}, but the latents of the "
            f"autoencoder (vae) have {vae.latent_channels} channels"
        )
    if numbers["digits"] != len(numbers["levels"]):
        raise ValueError(
            f"encoder.module_dict.enc_to_latents.dim_out: given {numbers['digits']}, but regularizer.levels has "
            f"{len(numbers['levels'])} levels"
        )
    encoder, decoder = (
        TrunkConfig(**{name: numbers[f"{part}.{name}"] for name in TRUNK}) for part in ("encoder", "decoder")
    )
    return FlexTokConfig(
        image_size=numbers["grid"] * numbers["patch_size"] * vae.factor,
        vae=vae,
        encoder=encoder,
        decoder=decoder,
        times=TIMES[numbers["logit_normal"], numbers["logit_normal"] and numbers["stratified"]],
        posterior="sample" if numbers["sample_posterior"] else "mean",
        decoding=FlexTokDecoding(steps=25, guidance=7.5, projected_guidance=True),
        **{name: numbers[name] for name in SAME},
    )


def _vae_config(numbers: Mapping[str, Any], source: Path) -> VAEConfig:
    """The autoencoder: of the published shape, or of the shape of the one that `hf_hub_path` names."""
    factor, named = numbers["scaling_factor"], numbers["autoencoder"]
    if named is not None:
        path = _autoencoder_config(named, source)
        return diffusers_config(hub.read_json(path), path, factor, DIFFUSERS_SCALING_FACTOR)
    with _named(source):
        if not factor:
            raise ValueError(
                "vae.scaling_factor: is missing, and vae.hf_hub_path names no autoencoder that has one; write the "
                "number that this checkpoint was trained with"
            )
        return replace(PUBLISHED_VAE, latent_channels=numbers["vae_channels"], scaling_factor=factor)


def _autoencoder_config(name: str, source: Path) -> Path:
    """The config.json of the autoencoder that a description names."""
    for folder in (source.parent / name, Path(name)):
        if (folder / hub.CONFIG_NAME).is_file():
            return folder / hub.CONFIG_NAME
    try:
        return hub.find_folder(name, files=(hub.CONFIG_NAME,)) / hub.CONFIG_NAME
    except FileNotFoundError as error:
        raise ConfigError(
            f"{source}: vae.hf_hub_path: the shape of the autoencoder is in the {hub.CONFIG_NAME} of {name!r}, which "
            f"was not found ({error}); put that file into {source.parent / name}"
        ) from error


def write_config(config: FlexTokConfig) -> dict[str, Any]:
    """The published description of a configuration of ours.

    It says nothing of decoding defaults, nor of what our training has beyond the published recipe.
    Raises ConfigError for a model that the published code cannot run.
    """
    if config.vae is None:
        raise ConfigError("vae: a published FlexTok works on the latents of an autoencoder; this one has none")
    if config.short_runs.prediction != "velocity":
        raise ConfigError("short_runs.prediction: a published decoder predicts the velocity; this one predicts data")
    if config.grid[0] != config.grid[1]:
        size = in_pixels(config.image_size)
        raise ConfigError(f"image_size: a published FlexTok is for squares; this one is for {size}: layout=imgtok")
    standard = replace(config.vae, **{name: getattr(PUBLISHED_VAE, name) for name in VAE_SHAPE}) == config.vae
    numbers = {
        **{name: getattr(config, name) for name in SAME},
        **{f"{part}.{name}": getattr(getattr(config, part), name) for part in ("encoder", "decoder") for name in TRUNK},
        "levels": list(config.levels),
        "channels": config.latent_channels,
        "grid": config.grid[0],
        "fewest_registers": config.num_registers,
        "digits": len(config.levels),
        "logit_normal": config.times != "mode",
        "stratified": config.times == "stratified_logit_normal",
        "vae_channels": config.latent_channels,
        "scaling_factor": config.vae.scaling_factor,
        "autoencoder": None if standard else AUTOENCODER_FOLDER,
        "sample_posterior": config.posterior == "sample",
        "learnable_logvar": False,
    }
    return fill_in(numbers)
