"""Our models, built as a case describes and filled with its weights.

Where a published parameter lives in a model of ours is known to the readers of published files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from cases import Case
from torch import nn

from imgtok.generators.conditioning import ClassBuffer, ClassModulation, ClassSlot, TextPrefix
from imgtok.generators.dimension_head import StackConfig
from imgtok.generators.entities import Cells
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.published import llamagen
from imgtok.generators.published import tokenbridge as published_tokenbridge
from imgtok.generators.published import xar as published_xar
from imgtok.generators.tokenbridge import PUBLISHED_ORDER, TokenBridge, TokenBridgeConfig
from imgtok.generators.xar import XAR, XARConfig
from imgtok.published.flextok import as_ours, flextok_places
from imgtok.published.names import Place, places
from imgtok.quantizers.normal import NormalConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.tokenizers.vae import VAEConfig

gpt_places = llamagen.published_places


def fill(
    model: nn.Module,
    case: Case,
    places: Callable[[Iterable[str]], Mapping[str, Place]],
    *,
    but: tuple[str, ...] = (),
) -> None:
    """Copies the case's weights in; every parameter of ours outside `but` must be given, and no more."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(but or ("\n",))}
    known, weights = places(state), case.weights()
    assert known.keys() == weights.keys(), f"the case has other weights: {known.keys() ^ weights.keys()}"
    for published, value in weights.items():
        known[published].view(state).copy_(as_ours(published, value))


def flextok(case: Case, *, projected_guidance: bool = True) -> FlexTok:
    """The case's FlexTok. Cases without a VAE work on latents: they get a blank one that keeps the size."""
    about = case.about["model"]
    vae = about.get("vae")
    if vae:
        vae_config = VAEConfig(
            latent_channels=about["latent_channels"],
            block_channels=tuple(vae["block_channels"]),
            layers_per_block=vae["layers_per_block"],
            norm_groups=vae["norm_groups"],
            scaling_factor=vae["scaling_factor"],
        )
    else:
        vae_config = VAEConfig(
            latent_channels=about["latent_channels"], block_channels=(8,), layers_per_block=1, norm_groups=8
        )
    trunks = {
        part: TrunkConfig(**{key: about[part][key] for key in ("width", "depth", "head_dim")})
        for part in ("encoder", "decoder")
    }
    config = FlexTokConfig(
        image_size=about["grid_max"][0] * about["patch"] * vae_config.factor,
        vae=vae_config,
        patch_size=about["patch"],
        num_registers=about["registers"],
        levels=tuple(about["levels"]),
        max_timestep=about["time_embedding"]["max_timestep"],
        decoding=FlexTokDecoding(projected_guidance=projected_guidance),
        **trunks,
    )
    model = FlexTok(config).eval()
    fill(model, case, flextok_places, but=() if vae else ("vae.",))
    return model


def gpt(case: Case) -> GPT:
    """The case's GPT, every dropout 0."""
    about = case.about["build"]["config"]
    condition: ClassSlot | TextPrefix = ClassSlot(num_classes=about["num_classes"], drop=0.0)
    if about.get("model_type") == "t2i":
        condition = TextPrefix(text_width=about["caption_dim"], text_length=about["cls_token_num"], drop=0.0)
    config = GPTConfig(
        vocab_size=about["vocab_size"],
        num_tokens=about["block_size"],
        width=about["dim"],
        depth=about["n_layer"],
        num_heads=about["n_head"],
        mlp_multiple=about["multiple_of"],
        positions="rotary_2d",
        dropout=0.0,
        condition=condition,
    )
    model = GPT(config).eval()
    fill(model, case, gpt_places, but=("empty_caption",))
    return model


def xar(case: Case) -> XAR:
    """The case's xAR."""
    about = case.about["config"]
    config = XARConfig(
        latent_channels=about["latent_channels"],
        grid=about["latent_grid"][0],
        entities=Cells(height=about["cell"][0], width=about["cell"][1]),
        width=about["width"],
        depth=about["first_stack_blocks"],
        num_heads=about["heads"],
        dropout=about["dropout"],
        condition=ClassModulation(num_classes=about["classes"], drop=about["class_drop"]),
    )
    model = XAR(config).eval()
    state = model.state_dict()
    known, weights = places(state, published_xar.NAMES, {}), case.weights()
    assert known.keys() == weights.keys(), f"the case has other weights: {known.keys() ^ weights.keys()}"
    for published, value in weights.items():
        known[published].view(state).copy_(published_xar.as_ours(published, value))
    return model


def tokenbridge(case: Case, *, drop: float = 0.1) -> TokenBridge:
    """The case's TokenBridge."""
    about = case.about["config"]
    encoder, decoder, head = (
        StackConfig(width=about[f"{part}_width"], depth=about[f"{part}_depth"], num_heads=about[f"{part}_heads"])
        for part in ("encoder", "decoder", "head")
    )
    config = TokenBridgeConfig(
        latent_channels=about["latent_channels"],
        grid=about["image_size"] // about["vae_stride"],
        condition=ClassBuffer(num_classes=about["classes"], num_slots=about["buffer_tokens"], drop=drop),
        quantizer=NormalConfig(levels=about["levels"], range=tuple(about["range"]), cut=about["std_range"]),
        channel_order=PUBLISHED_ORDER,
        encoder=encoder,
        decoder=decoder,
        head=head,
        dropout=about["dropout"],
    )
    model = TokenBridge(config).eval()
    state = model.state_dict()
    known, weights = published_tokenbridge.published_places(state, config.latent_channels), case.weights()
    assert known.keys() == weights.keys(), f"the case has other weights: {known.keys() ^ weights.keys()}"
    for published, value in weights.items():
        known[published].view(state).copy_(published_tokenbridge.as_ours(published, value))
    return model
