"""FlexTok (arXiv 2502.13967): an image as an ordered sequence of tokens, any prefix of which decodes.

A transformer reads the image's latent patches together with K learned *registers*; the registers' outputs, rounded by
FSQ to a few levels each, are the tokens (section 3.1; `Encoder`). A *rectified-flow decoder* draws the latents from
noise, given the tokens (`Decoder`). *Nested dropout* hides a random tail of the tokens while training, which orders
them: the first carry what matters most (`FlexTok.draw_keep_counts`, `Decoder.condition`). A learned *null condition*,
sometimes shown in place of all tokens, makes guidance possible. FlexTok works on the latents of a frozen autoencoder,
or in pixels where there is none.

This file holds the algorithm: `FlexTok.encode_plainly`, `decode_plainly` and `forward` say all of it. What makes it
fast (fewer registers, masked and null registers as one, both branches of guidance in one pass) is in
`flextok_fast.py`, and a test holds it to the plain forms; the blocks are in `flextok_blocks.py`, the configuration in
`flextok_config.py`. Read downwards: encoder, decoder, FlexTok.

Shapes: B batch, C H W latents, N patches, K registers, D width, n FSQ dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import flow, randomness
from imgtok.layers.attention import Look
from imgtok.layers.norms import layer_norm
from imgtok.layers.patches import patchify, unpatchify
from imgtok.layers.positions import sincos_2d, time_features
from imgtok.layers.recompute import call_block
from imgtok.losses import two_lengths
from imgtok.quantizers.fsq import FSQ
from imgtok.sizes import Size, sides
from imgtok.tokenizers import flextok_fast, flextok_start
from imgtok.tokenizers.base import (
    CodedLosses,
    Graph,
    OnBlock,
    Rate,
    Taps,
    Tokenizer,
    latents_of_moments,
    powers_of_two,
)
from imgtok.tokenizers.checks import check_finite, check_images, check_tokens, token_counts
from imgtok.tokenizers.flextok_blocks import DecoderBlock, EncoderBlock
from imgtok.tokenizers.flextok_config import FlexTokConfig, FlexTokDecoding, ShortRuns, TrunkConfig
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAE

__all__ = ["Decoder", "Encoder", "FlexTok", "FlexTokConfig", "FlexTokDecoding", "ShortRuns", "TrunkConfig"]

# ---------------------------------------------------------------- encoder and decoder


class Encoder(nn.Module):
    """Latents (B, C, H, W) -> numbers for the quantizer (B, K, n)."""

    positions: Tensor

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        trunk = config.encoder
        self.patch_size = config.patch_size
        self.patch_proj = nn.Linear(config.patch_size**2 * config.latent_channels, trunk.width)
        add_positions(self, config, trunk.width)
        self.registers = nn.Parameter(torch.empty(config.num_registers, trunk.width))
        self.blocks = nn.ModuleList(EncoderBlock(trunk) for _ in range(trunk.depth))
        self.readout = nn.Linear(trunk.width, len(config.levels))
        self.recompute = False

    def forward(self, latents: Tensor) -> Tensor:
        """All registers, and one mask: patches see patches, register r sees patches and registers 0..r.

        Everything calls `flextok_fast.encode`, which gives the same numbers for as many registers as are asked for.
        """
        num_registers = len(self.registers)
        x = self.sequence(latents, num_registers)
        num_patches = x.shape[1] - num_registers
        sight = Look(slice(None), slice(None), flextok_fast.prefix_causal_mask(num_patches, num_registers, x.device))
        for block in self.blocks:
            x = block(x, [sight])
        return self.readout(layer_norm(x[:, num_patches:]))

    def sequence(self, latents: Tensor, num_registers: int) -> Tensor:
        """What the blocks read: [patches | the first registers], (B, N + k, D)."""
        patches = self.patch_proj(patchify(latents.to(self.patch_proj.weight.dtype), self.patch_size))
        patches = patches + crop_positions(self.positions, latents, self.patch_size)
        batch = latents.shape[0]  # not len(), by which an exported graph would take this number of images alone
        registers = self.registers[:num_registers].expand(batch, -1, -1)
        return torch.cat([patches, registers.to(patches.dtype)], dim=1)


def add_positions(module: nn.Module, config: FlexTokConfig, width: int) -> None:
    """Gives a module `positions` (rows, columns, D): the fixed table, not saved, or a parameter.

    The fixed table of a grid that is not square is the corner of a square one, since only those are well behaved.
    """
    rows, columns = config.grid
    side = max(rows, columns)
    table = sincos_2d(width, side, side)[:rows, :columns]
    if config.short_runs.positions == "sincos":
        module.register_buffer("positions", table, persistent=False)
    else:
        module.register_parameter("positions", nn.Parameter(torch.empty_like(table)))


def crop_positions(table: Tensor, latents: Tensor, patch_size: int) -> Tensor:
    """The top-left corner of the fixed table that covers the latents, as (rows * columns, D).

    Raises ValueError for a grid larger than the table: absolute positions do not extrapolate.
    """
    rows, columns = latents.shape[-2] // patch_size, latents.shape[-1] // patch_size
    if rows > table.shape[0] or columns > table.shape[1]:
        raise ValueError(
            f"a grid of {rows} x {columns} patches is larger than the position table of "
            f"{table.shape[0]} x {table.shape[1]}: resize the image or train with a larger image_size"
        )
    return table[:rows, :columns].flatten(0, 1)


class Modulations(NamedTuple):
    """What T times do to each block, (T, 12 D), and to the readout, (T, 2 D)."""

    blocks: Sequence[Tensor]
    readout: Tensor

    def row(self, index: int) -> Modulations:
        """One time's, as a batch of one."""
        return Modulations([rows[index : index + 1] for rows in self.blocks], self.readout[index : index + 1])


class Decoder(nn.Module):
    """Velocity of noised latents given the tokens' codes and the time."""

    positions: Tensor

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        trunk = config.decoder
        self.patch_size = config.patch_size
        self.time_scale = 1000.0 / config.max_timestep
        self.code_proj = nn.Linear(len(config.levels), trunk.width)
        self.register_positions = nn.Parameter(torch.empty(config.num_registers, trunk.width))
        self.mask_vector = nn.Parameter(torch.empty(trunk.width))
        self.null_vector = nn.Parameter(torch.empty(trunk.width))
        self.patch_proj = nn.Linear(config.patch_size**2 * config.latent_channels, trunk.width)
        add_positions(self, config, trunk.width)
        self.time_mlp = nn.Sequential(nn.Linear(256, trunk.width), nn.SiLU(), nn.Linear(trunk.width, trunk.width))
        self.blocks = nn.ModuleList(DecoderBlock(trunk) for _ in range(trunk.depth))
        self.readout_modulation = nn.Linear(trunk.width, 2 * trunk.width)
        self.readout = nn.Linear(trunk.width, config.patch_size**2 * config.latent_channels)
        self.recompute = False

    def condition(self, codes: Tensor, keep_B: Tensor, null_B: Tensor | None = None) -> Tensor:
        """Codes (B, k, n), k <= K -> conditioning registers (B, K, D).

        Registers from `keep_B` on become the mask vector, *after* positions were added, so that they
        carry none; where `null_B` is True all of them become the null vector.
        """
        count = self.register_positions.shape[0]
        codes = F.pad(codes.to(self.code_proj.weight.dtype), (0, 0, 0, count - codes.shape[1]))
        registers = self.code_proj(codes) + self.register_positions
        hidden = torch.arange(count, device=codes.device) >= keep_B[:, None]
        registers = torch.where(hidden[..., None], self.mask_vector.to(registers.dtype), registers)
        if null_B is not None:
            registers = torch.where(null_B[:, None, None], self.null_vector.to(registers.dtype), registers)
        return registers

    def modulations(self, t_T: Tensor) -> Modulations:
        """All that depends on the time alone: (T, 12 D) for each block and (T, 2 D) for the readout.

        T is the batch in training, the steps in sampling: half of the decoder's weights are read here, once a call.
        """
        features = time_features(t_T, scale=self.time_scale)
        time = F.silu(self.time_mlp(features.to(self.patch_proj.weight.dtype)))  # (T, D)
        blocks = [block.modulation(time) for block in self.blocks if isinstance(block, DecoderBlock)]
        return Modulations(blocks, self.readout_modulation(time))

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        registers_BKD: Tensor,
        on_block: OnBlock | None = None,
        on_sequence: OnBlock | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W); `t_B` has one time an image, or a single one for all of them.

        `on_block(index, patches)` sees the patch tokens (B, N, D) after each block, `on_sequence` these and after them
        the registers, (B, N + K, D), of which the last block computes none.
        """
        patches = self.patches(x_BCHW)
        lengths = [patches.shape[1], registers_BKD.shape[1]]
        sequence = torch.cat([patches, registers_BKD.to(patches.dtype)], dim=1)
        all_see_all, patches_see_all = Look(slice(None), slice(None)), Look(slice(lengths[0]), slice(None))
        modulations = self.modulations(t_B)
        out = self.network(sequence, modulations, lengths, [all_see_all], [patches_see_all], on_block, on_sequence)
        return self.grid(out, x_BCHW)

    def patches(self, x_BCHW: Tensor) -> Tensor:
        """The patches as the blocks read them, (B, N, D)."""
        patches = self.patch_proj(patchify(x_BCHW.to(self.patch_proj.weight.dtype), self.patch_size))
        return patches + crop_positions(self.positions, x_BCHW, self.patch_size)

    def network(
        self,
        x: Tensor,
        modulations: Modulations,
        lengths: Sequence[int],
        looks: Sequence[Look],
        last_looks: Sequence[Look],
        on_block: OnBlock | None = None,
        on_sequence: OnBlock | None = None,
    ) -> Tensor:
        """X (B, L, D), patches and registers in stretches of these `lengths` in turn -> what patches say.

        `looks` say who sees whom, `last_looks` the same in the last block, where registers are not computed.
        """
        last = len(self.blocks) - 1
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations.blocks, strict=True)):
            inputs = (modulation, lengths, last_looks if i == last else looks, i == last)
            x = call_block(block, x, *inputs, recompute=self.recompute)
            if on_block is not None:
                on_block(i, x[:, : lengths[0]])
            if on_sequence is not None:
                on_sequence(i, x)
        shift, scale = modulations.readout[:, None].chunk(2, dim=-1)
        return self.readout(torch.addcmul(shift, layer_norm(x), 1 + scale))

    def grid(self, patches: Tensor, like: Tensor) -> Tensor:
        """What patches say, as latents of the size of `like` (B, C, H, W)."""
        rows, columns = (side // self.patch_size for side in like.shape[-2:])
        return unpatchify(patches, self.patch_size, rows, columns)


# ---------------------------------------------------------------- the tokenizer


class Draws(NamedTuple):
    """What is random in a training step of B images."""

    posterior: Tensor | None
    """The autoencoder's posterior noise, shaped like the latents; None where its mean is taken."""
    keep: Tensor
    """How many tokens each image keeps, (B,) in 1..K."""
    null: Tensor
    """(B,): whether the null condition takes the place of all tokens."""
    times: Tensor
    """(B,) in [0, 1]."""
    noise: Tensor
    """Shaped like the latents (B, C, H, W)."""


class FlexTok(Tokenizer):
    """The whole tokenizer. Calling it gives the training losses; see `encode` and `decode` for its use."""

    config_class: ClassVar[type] = FlexTokConfig
    stands_on = "vae"
    only_decodes: ClassVar[tuple[str, ...]] = ("decoder.*",)
    decodes_by: ClassVar[tuple[str, ...]] = (
        "decoder",
        "max_timestep",
        "nested_dropout",
        "null_dropout",
        "times",
        "mode_scale",
        "posterior",
        *(f"short_runs.{name}" for name in ("keep_all", "noise_fraction", "prediction", "spread_weight")),
        *(f"short_runs.{name}" for name in ("cross_length", "align_weight", "align_block")),
    )
    decoding_class: ClassVar[type] = FlexTokDecoding

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = VAE(config.vae).requires_grad_(False) if config.vae else None
        self.encoder = Encoder(config)
        self.quantizer = FSQ(config.levels)
        self.decoder = Decoder(config)
        flextok_start.initialise(self)
        flextok_start.note_widths(self)

    @property
    def image_size(self) -> Size:
        return self.config.image_size

    @property
    def num_tokens(self) -> int:
        return self.config.num_registers

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def taps(self) -> Taps:
        return Taps(self.config.decoder.depth, self.config.decoder.width)

    @property
    def levels(self) -> tuple[int, ...]:
        levels: tuple[int, ...] = self.config.levels
        return levels

    def rates(self) -> list[Rate]:
        """The powers of two up to all tokens, which nested dropout trains for; any other number will do as well."""
        return [Rate(count) for count in powers_of_two(self.num_tokens)]

    def check_rate(self, rate: Rate) -> None:
        """Raises ValueError for a tolerance, which this tokenizer does not know, and for a number outside 1..K."""
        if rate.tolerance is not None or rate.num_tokens > self.num_tokens:
            raise ValueError(
                f"rates: this tokenizer has 1 to {self.num_tokens} tokens an image and no tolerance, given {rate}"
            )

    # ------------------------------------------------ training

    def adapt(self, stored: dict[str, Tensor], start: FlexTokConfig) -> dict[str, str]:
        """Weights of a model of another resolution: learned positions of patches are interpolated to this grid; of the
        fixed table, which no file holds, the larger grid has the smaller one as its corner.
        """
        here, there = self.config.grid, start.grid
        if here == there:
            return {}
        grids = "{} x {} patches there, {} x {} here".format(*there, *here)
        if self.config.short_runs.positions == "sincos":
            fits = here[0] <= there[0] and here[1] <= there[1]
            how = "the same table cropped" if fits else "the same table, continued beyond where it was trained"
            return {"positions": f"positions: {grids}: {how}"}
        said = dict[str, str]()
        for name in ("encoder.positions", "decoder.positions"):
            if name in stored and stored[name].shape[:2] == there:
                table = stored[name].permute(2, 0, 1)[None].float()
                resized = F.interpolate(table, size=here, mode="bicubic", align_corners=False)
                stored[name] = resized[0].permute(1, 2, 0).to(stored[name].dtype)
                said[name] = f"positions: {grids}: interpolated"
        return said

    def recompute_activations(self) -> None:
        """From now on compute both trunks' activations again in the backward pass: less memory, a third more work."""
        self.encoder.recompute = self.decoder.recompute = True

    def forward(
        self,
        images: Tensor,
        *,
        generator: torch.Generator,
        on_block: OnBlock | None = None,
    ) -> CodedLosses:
        """Flow-matching loss of a batch (B, 3, H, W) in [-1, 1], with nested and null dropout.

        `on_block(index, patches)` sees the decoder's patch tokens (B, N, D) after each block.
        """
        return self.forward_drawn(images, self.draw(images, generator), on_block)

    def draw(self, images: Tensor, generator: torch.Generator) -> Draws:
        """All random numbers of a training step, on the images' device."""
        batch, device = len(images), images.device
        posterior = self.draw_posterior_noise(images, generator)
        keep = self.draw_keep_counts(batch, generator)
        null = torch.rand(batch, generator=generator, device=generator.device) < self.config.null_dropout
        times = self.draw_times(batch, generator)
        cells = (side // self.config.factor for side in images.shape[-2:])
        shape = (batch, self.config.latent_channels, *cells)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return Draws(posterior, keep.to(device), null.to(device), times.to(device), noise.to(device))

    def forward_drawn(self, images: Tensor, draws: Draws, on_block: OnBlock | None = None) -> CodedLosses:
        """`forward` with its random numbers given: a function of tensors, which `training.compile` makes one graph."""
        times, noise = draws.times, draws.noise
        latents = self.to_latents(images, draws.posterior)
        z = flextok_fast.encode(self.encoder, latents, self.num_tokens)
        codes = self.quantizer(z)
        noised = flow.interpolate(latents, noise, times)
        if self.config.cross_length:
            loss, parts = self._two_lengths(latents, noised, codes, draws, on_block)
        else:
            registers = self.decoder.condition(codes, draws.keep, draws.null)
            estimate = self.decoder(noised, times, registers, on_block).float()
            loss = self._flow_loss(estimate, latents, noise, times)
            parts = {"flow": loss}
        # A number that is the same for every image carries nothing, and rounding leaves it no gradient to recover by.
        spread = F.relu(1 - z.float().std(dim=0, correction=0)).mean()
        ids = self.quantizer.codes_to_ids(codes.detach())
        total = loss + self.config.short_runs.spread_weight * spread
        return CodedLosses(total, parts | {"spread": spread}, ids, self.vocab_size)

    def _flow_loss(self, estimate: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The error of what the decoder's network made of noised latents (B, C, H, W)."""
        if self.config.short_runs.prediction == "velocity":
            return (estimate - flow.velocity_target(latents, noise)).square().mean()
        # Between the error of the data (weight 1) and that of the velocity (weight 1 / t^2).
        return ((estimate - latents).square() / flow.expand_times(times.clamp(min=0.1), latents)).mean()

    def _two_lengths(
        self, latents: Tensor, noised: Tensor, codes: Tensor, draws: Draws, on_block: OnBlock | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """NesTok's losses, summed and one by one: the error with all tokens and with the prefix that was drawn, and how
        far apart their features are in the decoder. Both lengths have rows of their own, so neither sees the other.
        """
        count, batch = self.num_tokens, len(latents)
        seen: list[Tensor] = []

        def first_half(block: int, patches: Tensor) -> None:
            assert on_block is not None
            on_block(block, patches[:batch])  # an image stands there once, with all of its tokens

        def keep_tapped(block: int, sequence: Tensor) -> None:
            if block == self.config.align_block:
                seen.append(sequence)

        keep = torch.cat([torch.full_like(draws.keep, count), draws.keep])
        registers = self.decoder.condition(codes.repeat(2, 1, 1), keep, draws.null.repeat(2))
        estimates = self.decoder(
            noised.repeat(2, 1, 1, 1),
            draws.times.repeat(2),
            registers,
            None if on_block is None else first_half,
            keep_tapped if self.config.align_weight else None,
        )
        whole, prefix = estimates.float().chunk(2)
        parts = {
            "flow": self._flow_loss(whole, latents, draws.noise, draws.times),
            "flow_prefix": self._flow_loss(prefix, latents, draws.noise, draws.times),
        }
        loss = parts["flow"] + parts["flow_prefix"]
        if seen:
            full, short = two_lengths.features(seen[0], count, keep).chunk(2)
            # The null condition has no tokens; and the less noise, the more the patches say by themselves.
            weight = draws.times * ~draws.null
            parts["align"] = (weight * two_lengths.alignment(short, full)).mean()
            loss = loss + self.config.align_weight * parts["align"]
        return loss, parts

    def draw_posterior_noise(self, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """The noise that samples the autoencoder's posterior; None, and nothing drawn, to take its mean."""
        if self.vae is None or self.config.posterior == "mean":
            return None
        rows, columns = (side // self.vae.config.factor for side in images.shape[-2:])
        shape = (len(images), self.config.latent_channels, rows, columns)
        return torch.randn(shape, generator=generator, device=generator.device).to(images.device)

    def draw_keep_counts(self, batch: int, generator: torch.Generator) -> Tensor:
        """How many tokens each sample keeps, (B,) in 1..K: nested dropout, but all for a share `keep_all`."""
        keep = self._draw_nested(batch, generator)
        all_kept = torch.rand(batch, generator=generator, device=generator.device) < self.config.short_runs.keep_all
        return torch.where(all_kept, self.num_tokens, keep)

    def _draw_nested(self, batch: int, generator: torch.Generator) -> Tensor:
        """Counts (B,) in 1..K by the configured mode."""
        count = self.num_tokens
        if self.config.nested_dropout == "pow2":
            powers = torch.tensor(powers_of_two(count), device=generator.device)
            return powers[torch.randint(len(powers), (batch,), generator=generator, device=generator.device)]
        keep = torch.randint(1, count + 1, (batch,), generator=generator, device=generator.device)
        if self.config.nested_dropout == "uniform_pow2":
            keep = (2 ** torch.ceil(torch.log2(keep.float()))).long().clamp(max=count)
        return keep

    def draw_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Training times (B,) in [0, 1], `noise_fraction` of them exactly 1."""
        if self.config.times == "mode":
            times = flow.mode_times(batch, self.config.mode_scale, generator)
        else:
            stratified = self.config.times == "stratified_logit_normal"
            times = flow.logit_normal_times(batch, generator, stratified=stratified)
        at_noise = (
            torch.rand(batch, generator=generator, device=generator.device) < self.config.short_runs.noise_fraction
        )
        return torch.where(at_noise, torch.ones_like(times), times)

    # ------------------------------------------------ images <-> latents

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The frozen VAE's scaled posterior mean, or with standard-normal `noise` a sample of the posterior.

        In float32 and without gradient; in pixels, the images themselves.
        """
        cell = self.config.cell
        height, width = images.shape[-2:]
        if height % cell or width % cell:
            raise ValueError(f"an image of {height} x {width} pixels does not divide into patches of {cell} x {cell}")
        if self.vae is None:
            return images
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return latents_of_moments(self.vae.moments(images.float()), noise, self.vae.config.scaling_factor)

    def to_images(self, latents: Tensor) -> Tensor:
        """Images clamped to [-1, 1]."""
        if self.vae is None:
            return latents.clamp(-1, 1)
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.float()).clamp(-1, 1)

    # ------------------------------------------------ the algorithm, plainly

    @torch.no_grad()
    def encode_plainly(self, images: Tensor) -> Tokens:
        """All tokens of images (B, 3, H, W) in [-1, 1]; `encode` gives the same ids with less work."""
        codes = self.quantizer(self.encoder(self.to_latents(images)))
        return Tokens.full(self.quantizer.codes_to_ids(codes))

    @torch.no_grad()
    def decode_plainly(self, tokens: Tokens, *, seed: int = 0, decoding: FlexTokDecoding | None = None) -> Tensor:
        """Images (B, 3, H, W); `decode` gives the same with less work.

        The flow runs from noise to data under all K registers, those after a row's length being the mask vector, and
        is led away from the null condition by guidance.
        """
        how, noise = decoding or self.config.decoding, self._noise(seed, range(len(tokens)))
        codes = self.quantizer.ids_to_codes(tokens.padded().ids)
        registers = self.decoder.condition(codes, tokens.lengths)
        null = self.decoder.condition(codes, tokens.lengths, torch.ones_like(tokens.lengths, dtype=torch.bool))
        guide = flow.AdaptiveProjectedGuidance() if how.projected_guidance else flow.classifier_free_guidance

        def velocity(x: Tensor, step: int, t: float) -> Tensor:
            time = torch.tensor([t], device=x.device)
            v = self.as_velocity(self.decoder(x, time, registers), x, t)
            if how.guidance == 1:
                return v
            return guide(v, self.as_velocity(self.decoder(x, time, null), x, t), how.guidance)

        return self.to_images(self._solve(how.solver, velocity, noise, how.steps))

    def graphs(self) -> dict[str, Graph]:
        """`encoder`, from images to all their ids, and `decoder_step`, the velocity of noised latents (B, C, H, W) at a
        time (1,) from 1 (noise) to 0, given ids (B, K), of which each image keeps its first `lengths` (B,), and `null`
        (B,): whether it is to be that of the null condition, as guidance needs it.
        """
        images, noised = torch.zeros(2, 3, *sides(self.image_size)), torch.zeros(2, *self._latent_shape(None))
        ids, lengths = torch.zeros(2, self.num_tokens, dtype=torch.long), torch.full((2,), self.num_tokens)
        step = {"noised": noised, "time": torch.full((1,), 0.5), "ids": ids, "lengths": lengths}
        step["null"] = torch.zeros(2, dtype=torch.bool)

        def encoder(images: Tensor) -> Tensor:
            return self.quantizer.codes_to_ids(self.quantizer(self.encoder(self.to_latents(images))))

        def decoder_step(noised: Tensor, time: Tensor, ids: Tensor, lengths: Tensor, null: Tensor) -> Tensor:
            registers = self.decoder.condition(self.quantizer.ids_to_codes(ids), lengths, null)
            return self.as_velocity(self.decoder(noised, time, registers), noised, time)

        own = {
            "encoder": Graph(encoder, {"images": images}, "ids"),
            "decoder_step": Graph(decoder_step, step, "velocity"),
        }
        return own | super().graphs()

    # ------------------------------------------------ tokens

    @torch.no_grad()
    def encode(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        rate: Rate | None = None,
        num_tokens: int | Sequence[int] | None = None,
        posterior_seed: int | None = None,
    ) -> Tokens:
        """Images (B, 3, H, W) in [-1, 1] -> their first tokens: as many as `rate` says, or `num_tokens`, a number each
        or one for all; all by default.

        A sequence of (3, H, W) images may hold several sizes, up to that of `image_size`. With `posterior_seed` the
        autoencoder's posterior is sampled, image b with the noise of (seed, b), instead of its mean taken. Raises
        ValueError for pixels that are not finite, a size that does not divide into patches or is larger than the
        position table, and a number of tokens outside 1..K.
        """
        if rate is not None:
            self.check_rate(rate)
            num_tokens = rate.num_tokens
        if not isinstance(images, Tensor | Sequence) or not all(isinstance(image, Tensor) for image in images):
            check_images(images, self.image_size)  # which says what it is
        counts = token_counts(num_tokens, len(images), self.num_tokens)
        if isinstance(images, Tensor):
            latents = self._latents(images, range(len(images)), posterior_seed)
            return self.encode_latents(latents, num_tokens=counts)
        ids = torch.zeros(len(images), max(counts), dtype=torch.long, device=images[0].device)
        for shape in dict.fromkeys(image.shape for image in images):
            rows = [row for row, image in enumerate(images) if image.shape == shape]
            latents = self._latents(torch.stack([images[row] for row in rows]), rows, posterior_seed)
            ids[rows] = self.encode_latents(latents, num_tokens=max(counts)).ids
        return Tokens(ids, torch.tensor(counts, device=ids.device)).padded()

    def encode_at(self, images: Tensor, rates: Sequence[Rate]) -> list[Tokens]:
        """Encodes once, for the longest: the tokens at a lower rate are the first ones of it."""
        for rate in rates:
            self.check_rate(rate)
        tokens = self.encode(images, rate=max(rates, key=lambda rate: rate.num_tokens))
        return [tokens.truncate(rate.num_tokens) for rate in rates]

    def _latents(self, images: Tensor, rows: Sequence[int], seed: int | None) -> Tensor:
        """`to_latents` of the images `rows` of a batch, with the posterior's noise of `seed` unless that is None."""
        check_images(images, self.image_size, rows)
        if self.config.vae is None or seed is None:
            return self.to_latents(images)
        cells = (side // self.config.factor for side in images.shape[-2:])
        noise = randomness.normal(seed, rows, (self.config.latent_channels, *cells), "posterior")
        return self.to_latents(images, noise.to(images.device))

    @torch.no_grad()
    def encode_latents(self, latents: Tensor, *, num_tokens: int | Sequence[int] | None = None) -> Tokens:
        """The tokens of latents (B, C, H, W), as `to_latents` gives them.

        Only as many registers are computed as the longest row needs: later ones could not change them.
        """
        counts = token_counts(num_tokens, len(latents), self.num_tokens)
        check_finite(latents, range(len(latents)))
        codes = self.quantizer(flextok_fast.encode(self.encoder, latents, max(counts)))
        return Tokens(self.quantizer.codes_to_ids(codes), torch.tensor(counts, device=latents.device)).padded()

    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        size: tuple[int, int] | None = None,
        on_step: flow.OnStep | None = None,
    ) -> Tensor:
        """Tokens, rows of any length 1..K -> images (B, 3, H, W) in [-1, 1].

        Row b starts from the noise of (`seed`, `indices[b]`), 0.. by default, and nothing else, so an image does not
        depend on its batch. `decoding` is a `FlexTokDecoding`, that of the configuration by default. `size` is (height,
        width) in pixels, `image_size` by default. `on_step(step, latents, guess)` follows the flow: `to_images(guess)`
        is what the model expects the image to become.
        """
        latents = self.decode_latents(
            tokens,
            seed=seed,
            indices=indices,
            decoding=decoding,
            size=size,
            on_step=on_step,
        )
        with torch.no_grad():
            return self.to_images(latents)

    @torch.no_grad()
    def decode_latents(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        guidance: Callable[[float], float] | None = None,
        size: tuple[int, int] | None = None,
        on_step: flow.OnStep | None = None,
    ) -> Tensor:
        """`decode` up to the latents (B, C, H, W).

        `guidance` gives the scale at each time from 1 (noise) to 0, in place of the one scale that `decoding` has.
        """
        check_tokens(tokens, indices, self.num_tokens)
        settings = self._settings(decoding)
        times = flow.step_times(settings.steps)
        noise = self._noise(seed, range(len(tokens)) if indices is None else indices, size)
        codes = self.quantizer.ids_to_codes(tokens.padded().ids.to(noise.device))
        network = flextok_fast.GuidedDecoder(
            self,
            codes,
            tokens.lengths.to(noise.device),
            times,
            guidance=settings.guidance if guidance is None else guidance,
            projected=settings.projected_guidance,
        )
        return self._solve(settings.solver, network.velocity, noise, len(times), on_step)

    def as_velocity(self, estimate: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        """The velocity at x and time t that the network's output stands for."""
        return (x - estimate) / t if self.config.short_runs.prediction == "data" else estimate

    def _solve(
        self,
        solver: Literal["euler", "adams"],
        velocity: flow.Velocity,
        noise: Tensor,
        steps: int,
        on_step: flow.OnStep | None = None,
    ) -> Tensor:
        """From noise to latents."""
        return {"euler": flow.euler, "adams": flow.adams}[solver](velocity, noise, steps, on_step)

    def _noise(self, seed: int, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """Where images of (seed, index) start from, (B, C, H, W)."""
        noise = randomness.normal(seed, indices, self._latent_shape(size), "flextok")
        return noise.to(self.decoder.null_vector.device)

    def _settings(self, decoding: object | None) -> FlexTokDecoding:
        """Those given, or those of the configuration. Raises TypeError for the settings of another tokenizer."""
        settings = self.config.decoding if decoding is None else decoding
        if not isinstance(settings, FlexTokDecoding):
            raise TypeError(f"decoding: a FlexTok takes a FlexTokDecoding, not a {type(settings).__name__}")
        return settings

    def _latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image of `size` pixels."""
        most, cell = sides(self.image_size), self.config.cell
        height, width = size or most
        for name, side, longest in zip(("height", "width"), (height, width), most, strict=True):
            if side < 1 or side % cell or side > longest:
                raise ValueError(
                    f"size: a {name} of {side} pixels; this model decodes multiples of {cell} up to {longest}"
                )
        return (self.config.latent_channels, height // self.config.factor, width // self.config.factor)
