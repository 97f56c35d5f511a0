"""The published FlexTok (apple/ml-flextok) as a worker, through its own top-level calls.

Its modules are put together as the released configurations do (design of the checkpoint: which module
reads and writes which key, and the order). The VAE, which both sides leave out, is a stand-in that hands
latents through; everything else that `tokenize` and `detokenize` do is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import recipe
import torch
from flextok.flextok_wrapper import FlexTok
from flextok.flow_matching.pipelines import MinRFPipeline
from flextok.model.layers.attention import FlexAttention
from flextok.model.postprocessors.heads import LinearHead, ToPatchesLinearHead
from flextok.model.postprocessors.seq_unpacking import SequenceUnpacker
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker
from flextok.model.preprocessors.linear import LinearLayer
from flextok.model.preprocessors.nullcond import LearnedNullCond
from flextok.model.preprocessors.patching import PatchEmbedder
from flextok.model.preprocessors.registers import Registers1D
from flextok.model.preprocessors.time_embedding import TimestepEmbedder
from flextok.model.preprocessors.token_dropout import MaskedNestedDropout
from flextok.model.trunks.transformers import FlexTransformer
from flextok.model.utils.dict_ops import PerSampleOp, channels_first_to_last, channels_last_to_first
from flextok.model.utils.posembs import PositionalEmbeddingAdder
from flextok.model.utils.wrappers import SequentialModuleDictWrapper
from flextok.regularizers.quantize_fsq import FSQ
from flextok_case import Case
from protocol import Setup, autocast, serve
from torch import Tensor, nn

CHANNELS, GRID, PATCH, REGISTERS = 16, 16, 2, 256
LEVELS = [8, 8, 8, 5, 5, 5]


class LatentsThrough(nn.Module):
    """Stands where the VAE does: latents in, latents out."""

    images_read_key = "images"
    images_reconst_write_key = "images_reconst"

    def encode(self, data: dict[str, Any]) -> dict[str, Any]:
        data["latents"] = list(data["images"])
        return data

    def decode(self, data: dict[str, Any]) -> dict[str, Any]:
        data["images_reconst"] = data["latents_reconst"]
        return data


def encoder(width: int, depth: int, dense: bool) -> SequentialModuleDictWrapper:
    """The `encoder` part of a released configuration."""
    modules = {
        "enc_channels_last": PerSampleOp("latents", "latents_last", channels_first_to_last),
        "enc_patch_emb": PatchEmbedder(
            "latents_last", "enc_patches", "enc_grid", [PATCH, PATCH], CHANNELS, width, flatten_patches=False
        ),
        "enc_posemb_module": PositionalEmbeddingAdder("enc_patches", "enc_patches", width, [GRID, GRID]),
        "enc_register_module": Registers1D(
            "enc_patches", "enc_register_sizes", "enc_registers", width, REGISTERS, REGISTERS
        ),
        "enc_seq_packer": BlockWiseSequencePacker(
            ["enc_patches", "enc_registers"],
            "enc_packed",
            "enc_mask",
            "enc_inner_shapes",
            "enc_outer_shapes",
            mask_mode="causal_last",
            pad_to_multiple=128,
            compile_block_mask=False,
            return_materialized_mask=dense,
        ),
        "enc_transformer": FlexTransformer(
            "enc_packed", "enc_packed", dim=width, depth=depth, block_mask_read_key="enc_mask"
        ),
        "enc_unpacker": SequenceUnpacker(
            "enc_packed", ["enc_patches", "enc_registers"], "enc_inner_shapes", "enc_outer_shapes"
        ),
        "enc_to_latents": LinearHead("enc_registers", "enc_numbers", width, len(LEVELS), use_mup_readout=False),
    }
    return SequentialModuleDictWrapper(modules)


def decoder(width: int, depth: int, dense: bool) -> SequentialModuleDictWrapper:
    """The `decoder` part of a released configuration."""
    modules = {
        "dec_from_latents": LinearLayer("codes", "dec_registers", len(LEVELS), width),
        "dec_registers_posemb_module": PositionalEmbeddingAdder(
            "dec_registers", "dec_registers", width, [REGISTERS], posemb_type="learnable_sum"
        ),
        "dec_nested_dropout": MaskedNestedDropout("dec_registers", width),
        "dec_latent_dropout": LearnedNullCond("dec_registers", width),
        "dec_channels_last": PerSampleOp("noised", "noised_last", channels_first_to_last),
        "dec_noise_patch_emb": PatchEmbedder(
            "noised_last", "dec_patches", "dec_grid", [PATCH, PATCH], CHANNELS, width, flatten_patches=False
        ),
        "dec_patches_posemb_module": PositionalEmbeddingAdder("dec_patches", "dec_patches", width, [GRID, GRID]),
        "dec_time_embedder": TimestepEmbedder("times", "dec_time", width),
        "dec_seq_packer": BlockWiseSequencePacker(
            ["dec_patches", "dec_registers"],
            "dec_packed",
            "dec_mask",
            "dec_inner_shapes",
            "dec_outer_shapes",
            mask_mode="full",
            pad_to_multiple=128,
            emb_packing_fn_write_key="dec_expand",
            per_subseq_embs=True,
            compile_block_mask=False,
            return_materialized_mask=dense,
        ),
        "dec_transformer": FlexTransformer(
            "dec_packed",
            "dec_packed",
            dim=width,
            depth=depth,
            block_mask_read_key="dec_mask",
            adaLN_emb_read_key="dec_time",
            adaLN_packing_fn_read_key="dec_expand",
            adaLN_expansion=2,
        ),
        "dec_unpacker": SequenceUnpacker(
            "dec_packed", ["dec_patches", "dec_registers"], "dec_inner_shapes", "dec_outer_shapes"
        ),
        "dec_to_patches": ToPatchesLinearHead(
            "dec_patches",
            "latents_last_reconst",
            width,
            CHANNELS,
            [PATCH, PATCH],
            use_mup_readout=False,
            adaLN_emb_read_key="dec_time",
        ),
        "dec_channels_first": PerSampleOp("latents_last_reconst", "latents_reconst", channels_last_to_first),
    }
    return SequentialModuleDictWrapper(modules)


class Peer:
    """The model with drawn weights."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        dense = setup.attention == "dense"
        depths = [int(depth) for depth in setup.size.removeprefix("d").split("-d")]
        self.model = FlexTok(
            vae=LatentsThrough(),
            encoder=encoder(64 * depths[0], depths[0], dense),
            decoder=decoder(64 * depths[1], depths[1], dense),
            regularizer=FSQ("enc_numbers", "codes", "ids", LEVELS),
            flow_matching_noise_module=nn.Identity(),
            pipeline=partial(
                MinRFPipeline,
                latents_read_key="codes",
                timesteps_read_key="times",
                noised_images_read_key="noised",
                reconst_write_key="latents_reconst",
                out_channels=CHANNELS,
            ),
        ).eval()
        for module in self.model.modules():
            if isinstance(module, FlexAttention):
                module.use_flex_attention = not dense  # no configuration reaches this switch
        drawn = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.shapes = {name: list(value.shape) for name, value in drawn.items()}
        for name, value in drawn.items():
            value.data.copy_(torch.from_numpy(recipe.weight(name, tuple(value.shape), setup.seed)))
        self.model.to(setup.device)
        self.noise: Tensor | None = None

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        self.noise = draws.get("noise")

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        device, seed = self.setup.device, self.setup.seed
        if case.what == "encode":
            side = GRID * PATCH
            latents = torch.from_numpy(recipe.tensor("latents", (case.batch, CHANNELS, side, side), seed)).to(device)
            return partial(self.encode, latents, case.tokens)
        ids = torch.from_numpy(recipe.integers("ids", (case.batch, REGISTERS), 64000, seed)).to(device)
        return partial(self.decode, list(ids[:, : case.tokens].split(1)), case)

    @torch.no_grad()
    def encode(self, latents: Tensor, tokens: int) -> Tensor:
        with autocast(self.setup):
            return torch.cat([ids[:, :tokens] for ids in self.model.tokenize(latents)])

    @torch.no_grad()
    def decode(self, ids: list[Tensor], case: Case) -> Tensor:
        sampling = {
            "timesteps": case.steps,
            "guidance_scale": case.guidance,
            "perform_norm_guidance": True,
            "verbose": False,
        }
        with autocast(self.setup):
            if self.noise is None:
                generator = torch.Generator(self.setup.device).manual_seed(0)
                return self.model.detokenize(ids, GRID * PATCH, generator=generator, **sampling)
            # The same call with the noise given, which `detokenize` does not offer.
            data = self.model._prepare_data_dict_for_detokenization(ids)
            data["noise"] = list(self.noise.split(1))
            self.model.pipeline.noise_read_key = "noise"
            data = self.model.decode(data, vae_image_sizes=GRID * PATCH, **sampling)
            self.model.pipeline.noise_read_key = None
            return torch.cat(data["images_reconst"])


if __name__ == "__main__":
    serve(Peer, Case)
