"""Our models, built as a case describes and filled with its weights: the map of published names to ours.

Our attention holds wq, wk, wv as thirds of one matrix, and the feed-forward fc1 (gate), fc3 (up) as
halves of one; a `Place` is one published parameter within ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from cases import Case
from torch import Tensor, nn

from generators.gpt import GPT, GPTConfig
from imgtok.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.vae import VAEConfig

# Published prefix or infix -> ours, applied in order.
FLEXTOK_NAMES = {
    "vae.vae.": "vae.autoencoder.",
    "encoder.module_dict.enc_patch_emb.": "encoder.",
    "encoder.module_dict.enc_register_module.": "encoder.",
    "encoder.module_dict.enc_transformer.": "encoder.",
    "encoder.module_dict.enc_to_latents.proj.": "encoder.readout.",
    "decoder.module_dict.dec_from_latents.proj.": "decoder.code_proj.",
    "decoder.module_dict.dec_registers_posemb_module.posembs": "decoder.register_positions",
    "decoder.module_dict.dec_nested_dropout.dropout_mask_token": "decoder.mask_vector",
    "decoder.module_dict.dec_latent_dropout.nullcond": "decoder.null_vector",
    "decoder.module_dict.dec_noise_patch_emb.": "decoder.",
    "decoder.module_dict.dec_time_embedder.mlp.": "decoder.time_mlp.",
    "decoder.module_dict.dec_transformer.": "decoder.",
    "decoder.module_dict.dec_to_patches.adaLN_modulation.1.": "decoder.readout_modulation.",
    "decoder.module_dict.dec_to_patches.proj.": "decoder.readout.",
    ".adaLN_modulation.1.": ".modulation.",
    ".attn.proj.": ".attention.out_proj.",
    ".mlp.fc2.": ".mlp.down_proj.",
}
GPT_NAMES = {
    "cls_embedding.embedding_table.": "class_embedding.",
    "tok_embeddings.": "token_embedding.",
    "layers.": "blocks.",
    "attention.wqkv.": "attention.qkv_proj.",
    "attention.wo.": "attention.out_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    "ffn_norm.": "mlp_norm.",
    "output.": "head.",
}
# Published part of a fused matrix -> (ours, which part, of how many).
FUSED = {
    "attn.wq.": ("attention.qkv_proj.", 0, 3),
    "attn.wk.": ("attention.qkv_proj.", 1, 3),
    "attn.wv.": ("attention.qkv_proj.", 2, 3),
    "mlp.fc1.": ("mlp.gate_up_proj.", 0, 2),
    "mlp.fc3.": ("mlp.gate_up_proj.", 1, 2),
    "feed_forward.w1.": ("mlp.gate_up_proj.", 0, 2),
    "feed_forward.w3.": ("mlp.gate_up_proj.", 1, 2),
}


@dataclass(frozen=True)
class Place:
    name: str
    part: int = 0
    parts: int = 1

    def view(self, ours: Mapping[str, Tensor]) -> Tensor:
        """This parameter's rows within ours, writable; gradients are looked up the same way."""
        return ours[self.name].chunk(self.parts)[self.part]


def place(published: str, names: Mapping[str, str]) -> Place:
    """Where a published parameter lives in our model."""
    name, part, parts = published, 0, 1
    for theirs, ours in names.items():
        name = re.sub(r"(^|(?<=\.))" + re.escape(theirs) if theirs[0] != "." else re.escape(theirs), ours, name)
    for theirs, (ours, index, count) in FUSED.items():
        if theirs in name:
            name, part, parts = name.replace(theirs, ours), index, count
    return Place(name, part, parts)


def as_ours(published: str, value: Tensor) -> Tensor:
    """Register positions are published as (1, 1, D, K); ours are (K, D)."""
    return value[0, 0].T if published.endswith("dec_registers_posemb_module.posembs") else value


def fill(model: nn.Module, case: Case, names: Mapping[str, str], *, but: tuple[str, ...] = ()) -> None:
    """Copies the case's weights in; every parameter of ours outside `but` must be given, and no more."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(but or ("\n",))}
    for tensor in state.values():
        tensor.fill_(torch.nan)
    for published, value in case.weights().items():
        place(published, names).view(state).copy_(as_ours(published, value))
    missing = [name for name, value in state.items() if value.isnan().any()]
    assert not missing, f"the case has no weights for {missing}"


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
        projected_guidance=projected_guidance,
        **trunks,
    )
    model = FlexTok(config).eval()
    fill(model, case, FLEXTOK_NAMES, but=() if vae else ("vae.",))
    return model


def gpt(case: Case) -> GPT:
    """The case's GPT, every dropout 0."""
    about = case.about["build"]["config"]
    config = GPTConfig(
        vocab_size=about["vocab_size"],
        num_tokens=about["block_size"],
        num_classes=about["num_classes"],
        width=about["dim"],
        depth=about["n_layer"],
        num_heads=about["n_head"],
        mlp_multiple=about["multiple_of"],
        positions="rotary_2d",
        dropout=0.0,
        class_dropout=0.0,
    )
    model = GPT(config).eval()
    fill(model, case, GPT_NAMES)
    return model
