"""Pipelines of diffusers with few random weights: a Stable Diffusion 1.5 and an XL, as their files describe them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ["a", "and", "red", "blue", "cat", "dog", "wearing", "hat", "with", "the", "is", "of"]
WIDTH = 32


def tokenizer() -> CLIPTokenizer:
    """One piece for each of the words above; others, letter by letter."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in pieces:
                pieces.append(parts[0])
    made = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges)
    made.model_max_length = 20
    return made


def text_config(**changes: Any) -> CLIPTextConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPTextConfig(**sizes, **marks, vocab_size=len(tokenizer()), max_position_embeddings=20, **changes)


def unet(**changes: Any) -> UNet2DConditionModel:
    made = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        **changes,
    )
    for name, weight in made.named_parameters():  # or maps are flat, and nothing depends on the text
        if "attn2.to_q" in name or "attn2.to_k" in name:
            weight.data.mul_(4)
    return made


def vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4, **blocks)


def sd(**changes: Any) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        unet=unet(cross_attention_dim=WIDTH, **changes),
        vae=vae(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    encoder = text_config(projection_dim=WIDTH, hidden_act="gelu")
    pipe = StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        vae=vae(),
        text_encoder=CLIPTextModel(encoder),
        text_encoder_2=CLIPTextModelWithProjection(encoder),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
