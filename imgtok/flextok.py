"""FlexTok (arXiv 2502.13967): an image as an ordered sequence of tokens, any prefix of which decodes.

A transformer reads the image's latent patches together with K learned *registers*; the registers'
outputs, rounded by FSQ to a few levels each, are the tokens. A rectified-flow transformer draws the
latents from noise given the tokens. *Nested dropout* hides a random tail of the tokens while
training, which orders them: the first carry what matters most. A learned null condition, sometimes
shown in place of all tokens, makes guidance possible. Works on the latents of a frozen VAE, or in
pixels when there is none. Read downwards: configuration, blocks, encoder, decoder, FlexTok.

Shapes: B batch, C H W latents, N patches, K registers, D width, n FSQ dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import flow, randomness
from imgtok.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Range, check
from imgtok.layers.attention import Attention
from imgtok.layers.feed_forward import SwiGLU
from imgtok.layers.mup import note_width
from imgtok.layers.norms import layer_norm
from imgtok.layers.patches import patchify, unpatchify
from imgtok.layers.positions import sincos_2d, time_features
from imgtok.layers.recompute import call_block
from imgtok.quantizers.fsq import FSQ
from imgtok.tokenizer import Losses, Tokenizer, powers_of_two
from imgtok.tokens import Tokens
from imgtok.vae import VAE, VAEConfig

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Size of one transformer; the published rule is width = 64 x depth."""

    width: PositiveInt = 768
    """Channels; a multiple of head_dim and of 4."""
    depth: PositiveInt = 12
    """Blocks."""
    head_dim: PositiveInt = 64
    """Channels of one attention head."""

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.head_dim or self.width % 4:
            raise ValueError(f"width: {self.width} must be a multiple of head_dim = {self.head_dim} and of 4")

    @property
    def mlp_hidden(self) -> int:
        return 2 * (4 * self.width) // 3


@dataclass(frozen=True, kw_only=True)
class FlexTokConfig:
    """A FlexTok; the defaults are the published d12-d12."""

    kind: Literal["flextok"] = "flextok"
    image_size: PositiveInt = 256
    """Pixels a side of the training images."""
    vae: VAEConfig | None = None
    """The frozen autoencoder below; null works in pixels. Training fills this in from its own `vae` field."""
    patch_size: PositiveInt = 2
    """Latent cells (or pixels) a side of one patch."""
    num_registers: PositiveInt = 256
    """Registers, i.e. the most tokens an image can have."""
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    """FSQ levels; their product is the vocabulary."""
    encoder: TrunkConfig = TrunkConfig()
    """Size of the encoder."""
    decoder: TrunkConfig = TrunkConfig()
    """Size of the flow decoder."""
    max_timestep: PositiveFloat = 1000.0
    """Time features are scaled by 1000 / this."""
    nested_dropout: Literal["uniform", "pow2", "uniform_pow2"] = "pow2"
    """How many tokens a training sample keeps: any number, a power of two, or any rounded up to one."""
    keep_all: Fraction = 0.0
    """Share of training samples that keep all tokens whatever `nested_dropout` draws; 0 as published."""
    null_dropout: Fraction = 0.1
    """Share of training samples whose condition is the null vector."""
    times: Literal["mode", "logit_normal", "stratified_logit_normal"] = "mode"
    """Distribution of training times; "stratified" spreads a batch evenly over the distribution."""
    mode_scale: Annotated[float, Range(-1.0, 1.75)] = 0.25
    """Shape of the mode distribution; 0 is uniform."""
    posterior: Literal["mean", "sample"] = "mean"
    """Latents to train on: the mean of the autoencoder's posterior, or a fresh sample of it (the published wrapper's
    default). `encode` takes the mean, so that an image always has the same tokens."""
    noise_fraction: Fraction = 0.0
    """Share of training samples at t = 1, where the tokens alone must explain the image; 0 as published."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the decoder's network outputs; "data" turns its estimate of the latents into a velocity."""
    spread_weight: NonNegativeFloat = 0.0
    """Weight of a hinge that keeps the deviation of each pre-quantizer number over the batch at 1; 0 as published."""
    positions: Literal["sincos", "learned"] = "sincos"
    """Positions of patches: the published fixed table, or learned vectors. On a small grid the table's cells are
    nearly parallel (most of its frequencies turn by less than a hundredth from edge to edge)."""
    initialisation: Literal["published", "aligned"] = "published"
    """"aligned" lets information flow from the first step: each register starts out looking at one patch, that patch
    at it, gates are open, codes use their levels. For runs of minutes; needs learned positions."""
    decode_steps: PositiveInt = 25
    """Euler steps of `decode` unless it is told otherwise."""
    decode_guidance: PositiveFloat = 1.0
    """Guidance scale of `decode` unless it is told otherwise; 1 is none."""
    projected_guidance: bool = True
    """Guide by adaptive projected guidance rather than plain classifier-free guidance."""

    def __post_init__(self) -> None:
        check(self)
        cell = self.patch_size * (self.vae.factor if self.vae else 1)
        if self.image_size % cell:
            raise ValueError(
                f"image_size: {self.image_size} is not a multiple of {cell}, the pixels a side of one patch"
            )
        if self.initialisation == "aligned" and self.positions != "learned":
            raise ValueError("initialisation: aligned needs positions: learned")
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels: every FSQ dimension needs at least 2 levels, given {self.levels}")

    @property
    def latent_channels(self) -> int:
        return self.vae.latent_channels if self.vae else 3

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // (self.patch_size * (self.vae.factor if self.vae else 1))


# ---------------------------------------------------------------- blocks


def trunk_attention(config: TrunkConfig) -> Attention:
    """Attention as FlexTok has it: normalised queries and keys, and the muP scale 8 / head width."""
    return Attention(config.width, config.width // config.head_dim, qk_norm=True, scale=8 / config.head_dim)


class EncoderBlock(nn.Module):
    """Pre-norm attention and gated feed-forward; norms without parameters, no biases."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.attention = trunk_attention(config)
        self.mlp = SwiGLU(config.width, config.mlp_hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(layer_norm(x), mask=mask)
        return x + self.mlp(layer_norm(x))


class DecoderBlock(nn.Module):
    """The same, with shift, scale and gate from the time embedding: one set for patches, one for registers."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.attention = trunk_attention(config)
        self.mlp = SwiGLU(config.width, config.mlp_hidden)
        self.modulation = nn.Linear(config.width, 12 * config.width)

    def forward(self, x: Tensor, time: Tensor, num_patches: int) -> Tensor:
        """`time` (B or 1, D) is the activated time embedding; the first `num_patches` of x are patches."""
        patch_set, register_set = self.modulation(time).chunk(2, dim=-1)
        x = modulated_residual(x, self.attention, patch_set, register_set, num_patches, (0, 2, 3))
        return modulated_residual(x, self.mlp, patch_set, register_set, num_patches, (1, 4, 5))


def modulated_residual(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    patch_set: Tensor,
    register_set: Tensor,
    num_patches: int,
    chunks: tuple[int, int, int],
) -> Tensor:
    """X + gate * branch(LN(x) * (1 + scale) + shift), each segment of x with its own vectors.

    The sets hold gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp: gates come first.
    """
    width = x.shape[-1]
    patch, register = (s.unflatten(-1, (6, width))[:, chunks, None] for s in (patch_set, register_set))
    segments = (num_patches, x.shape[1] - num_patches)
    patches, registers = layer_norm(x).split(segments, dim=1)
    inputs = torch.cat(
        [patches * (1 + patch[:, 2]) + patch[:, 1], registers * (1 + register[:, 2]) + register[:, 1]], dim=1
    )
    patches, registers = branch(inputs).split(segments, dim=1)
    return x + torch.cat([patches * patch[:, 0], registers * register[:, 0]], dim=1)


# ---------------------------------------------------------------- encoder and decoder


class Encoder(nn.Module):
    """Latents (B, C, H, W) -> numbers for the quantizer (B, k, n)."""

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

    def forward(self, latents: Tensor, num_tokens: int) -> Tensor:
        """Only the first `num_tokens` registers are computed; later ones could not change them."""
        patches = self.patch_proj(patchify(latents, self.patch_size))
        patches = patches + crop_positions(self.positions, latents, self.patch_size)
        registers = self.registers[:num_tokens].expand(len(latents), -1, -1)
        x = torch.cat([patches, registers.to(patches.dtype)], dim=1)
        mask = prefix_causal_mask(patches.shape[1], num_tokens, x.device)
        for block in self.blocks:
            x = call_block(block, x, mask, recompute=self.recompute)
        return self.readout(layer_norm(x[:, patches.shape[1] :]))


def add_positions(module: nn.Module, config: FlexTokConfig, width: int) -> None:
    """Gives a module `positions` (rows, columns, D): the fixed table, not saved, or a parameter."""
    table = sincos_2d(width, config.grid, config.grid)
    if config.positions == "sincos":
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


def prefix_causal_mask(num_patches: int, num_registers: int, device: torch.device) -> Tensor:
    """True where a query (row) sees a key: patches see patches; register r sees patches and registers 0..r."""
    mask = torch.ones(num_patches + num_registers, num_patches + num_registers, dtype=torch.bool, device=device).tril()
    mask[:num_patches, :num_patches] = True
    return mask


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
        codes = F.pad(codes, (0, 0, 0, count - codes.shape[1]))
        registers = self.code_proj(codes) + self.register_positions
        hidden = torch.arange(count, device=codes.device) >= keep_B[:, None]
        registers = torch.where(hidden[..., None], self.mask_vector.to(registers.dtype), registers)
        if null_B is not None:
            registers = torch.where(null_B[:, None, None], self.null_vector.to(registers.dtype), registers)
        return registers

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, registers_BKD: Tensor, on_block: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Velocity (B, C, H, W); `t_B` has one time an image, or a single one for all of them.

        `on_block(index, patches)` sees the patch tokens (B, N, D) behind each block.
        """
        features = time_features(t_B, scale=self.time_scale)
        time = F.silu(self.time_mlp(features.to(self.patch_proj.weight.dtype)))  # (B or 1, D)
        patches = self.patch_proj(patchify(x_BCHW, self.patch_size))
        patches = patches + crop_positions(self.positions, x_BCHW, self.patch_size)
        num_patches = patches.shape[1]
        x = torch.cat([patches, registers_BKD], dim=1)
        for index, block in enumerate(self.blocks):
            x = call_block(block, x, time, num_patches, recompute=self.recompute)
            if on_block is not None:
                on_block(index, x[:, :num_patches])
        shift, scale = self.readout_modulation(time)[:, None].chunk(2, dim=-1)
        out = self.readout(layer_norm(x[:, :num_patches]) * (1 + scale) + shift)
        rows, columns = (side // self.patch_size for side in x_BCHW.shape[-2:])
        return unpatchify(out, self.patch_size, rows, columns)


# ---------------------------------------------------------------- the tokenizer


class FlexTok(Tokenizer):
    """The whole tokenizer. Calling it gives the training losses; see `encode` and `decode` for its use."""

    config_class: ClassVar[type] = FlexTokConfig

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = VAE(config.vae).requires_grad_(False) if config.vae else None
        self.encoder = Encoder(config)
        self.quantizer = FSQ(config.levels)
        self.decoder = Decoder(config)
        self._initialise()
        self._note_widths()

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_tokens(self) -> int:
        return self.config.num_registers

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def levels(self) -> tuple[int, ...]:
        levels: tuple[int, ...] = self.config.levels
        return levels

    @torch.no_grad()
    def _initialise(self) -> None:
        """Xavier for matrices; zero for biases, modulation and readouts; 0.02 for vectors (section 5)."""
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        modulations = [block.modulation for block in self.decoder.blocks if isinstance(block, DecoderBlock)]
        for linear in (*modulations, self.decoder.readout_modulation, self.decoder.readout):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.encoder.readout.weight)
        for vector in self._vectors():
            nn.init.trunc_normal_(vector, std=0.02, a=-0.04, b=0.04)
        if self.config.initialisation == "aligned":
            self._align(modulations)

    def _note_widths(self) -> None:
        """For muP: matrices that read a trunk's width. Those that read latents, codes or time features do not."""
        encoder, decoder = self.encoder, self.decoder
        note_width(self.config.encoder.width, encoder.blocks, encoder.readout)
        hidden = (decoder.blocks, decoder.time_mlp[2], decoder.readout_modulation, decoder.readout)
        note_width(self.config.decoder.width, *hidden)

    def _vectors(self) -> list[nn.Parameter]:
        """The learned vectors that are added or stand in for something: registers, positions, mask, null."""
        encoder, decoder = self.encoder, self.decoder
        vectors = [encoder.registers, decoder.register_positions, decoder.mask_vector, decoder.null_vector]
        positions = (encoder.positions, decoder.positions)
        return vectors + [table for table in positions if isinstance(table, nn.Parameter)]

    def _align(self, modulations: Sequence[nn.Linear]) -> None:
        """Registers and patches that see each other, open gates, codes that use their levels.

        From the published start all tokens are alike and reach no patch until the gates have grown. Here
        register r has the position of patch r * N / K, and queries equal keys, so like looks at like.
        """
        patches = self.config.grid**2
        facing = torch.arange(self.num_tokens) * patches // self.num_tokens
        for part, registers in (
            (self.encoder, self.encoder.registers),
            (self.decoder, self.decoder.register_positions),
        ):
            nn.init.normal_(part.positions)
            registers.copy_(part.positions.flatten(0, 1)[facing])
            for block in part.blocks:
                assert isinstance(block, EncoderBlock | DecoderBlock)
                queries, keys, _ = block.attention.qkv_proj.weight.chunk(3)
                keys.copy_(queries)
        for vector in (self.decoder.mask_vector, self.decoder.null_vector):
            nn.init.normal_(vector, std=0.5)
        nn.init.normal_(self.decoder.code_proj.weight, std=0.5)
        nn.init.normal_(self.encoder.readout.weight, std=self.config.encoder.width**-0.5)
        for linear in modulations:
            nn.init.ones_(linear.bias.unflatten(0, (2, 6, -1))[:, :2])

    # ------------------------------------------------ training

    def recompute_activations(self) -> None:
        """From now on compute both trunks' activations again in the backward pass: less memory, a third more work."""
        self.encoder.recompute = self.decoder.recompute = True

    def forward(
        self,
        images: Tensor,
        *,
        generator: torch.Generator,
        on_block: Callable[[int, Tensor], None] | None = None,
    ) -> Losses:
        """Flow-matching loss of a batch (B, 3, H, W) in [-1, 1], with nested and null dropout.

        `on_block(index, patches)` sees the decoder's patch tokens (B, N, D) behind each block.
        """
        latents = self.to_latents(images, self.draw_posterior_noise(images, generator))
        z = self.encoder(latents, self.num_tokens)
        codes = self.quantizer(z)
        batch, device = len(images), images.device
        keep = self.draw_keep_counts(batch, generator).to(device)
        null = torch.rand(batch, generator=generator, device=generator.device) < self.config.null_dropout
        registers = self.decoder.condition(codes, keep, null.to(device))
        times = self.draw_times(batch, generator).to(device)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(device)
        estimate = self.decoder(flow.interpolate(latents, noise, times), times, registers, on_block).float()
        if self.config.prediction == "velocity":
            loss = (estimate - flow.velocity_target(latents, noise)).square().mean()
        else:
            # Between the error of the data (weight 1) and that of the velocity (weight 1 / t^2).
            loss = ((estimate - latents).square() / flow.expand_times(times.clamp(min=0.1), latents)).mean()
        # A number that is the same for every image carries nothing, and rounding leaves it no gradient to recover by.
        spread = F.relu(1 - z.float().std(dim=0, correction=0)).mean()
        return Losses(loss + self.config.spread_weight * spread, {"flow": loss, "spread": spread})

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
        all_kept = torch.rand(batch, generator=generator, device=generator.device) < self.config.keep_all
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
        at_noise = torch.rand(batch, generator=generator, device=generator.device) < self.config.noise_fraction
        return torch.where(at_noise, torch.ones_like(times), times)

    # ------------------------------------------------ images <-> latents

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The frozen VAE's scaled posterior mean, or with standard-normal `noise` a sample of the posterior.

        In float32 and without gradient; in pixels, the images themselves.
        """
        if self.vae is None:
            return images
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.vae.encode(images.float(), noise)

    def to_images(self, latents: Tensor) -> Tensor:
        """Images clamped to [-1, 1]."""
        if self.vae is None:
            return latents.clamp(-1, 1)
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.float()).clamp(-1, 1)

    # ------------------------------------------------ tokens

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None) -> Tokens:
        """Images (B, 3, H, W) in [-1, 1] -> their first `num_tokens` tokens (all by default)."""
        if num_tokens is not None and not 1 <= num_tokens <= self.num_tokens:
            raise ValueError(
                f"num_tokens: this tokenizer has 1 to {self.num_tokens} tokens an image, asked for {num_tokens}"
            )
        z = self.encoder(self.to_latents(images), num_tokens or self.num_tokens)
        return Tokens.full(self.quantizer.codes_to_ids(self.quantizer(z)))

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Tokens, rows of any length 1..K -> images (B, 3, H, W) in [-1, 1].

        Row b starts from the noise of (`seed`, `indices[b]`), 0.. by default, and nothing else, so an
        image does not depend on its batch. `on_step(step, latents)` follows the flow.
        """
        columns, lengths = tokens.ids.shape[1], tokens.lengths
        if columns > self.num_tokens or int(lengths.min()) < 1 or int(lengths.max()) > columns:
            raise ValueError(
                f"decode takes 1 to {self.num_tokens} tokens an image, got lengths {int(lengths.min())} to "
                f"{int(lengths.max())} in {columns} columns"
            )
        steps = self.config.decode_steps if steps is None else steps
        guidance = self.config.decode_guidance if guidance is None else guidance
        device = self.decoder.null_vector.device
        side = self.config.grid * self.config.patch_size
        shape = (self.config.latent_channels, side, side)
        noise = randomness.normal(seed, range(len(tokens)) if indices is None else indices, shape, "flextok").to(device)
        codes = self.quantizer.ids_to_codes(tokens.ids.to(device))
        registers = self.decoder.condition(codes, tokens.lengths.to(device))
        velocity = self._guided_velocity(registers, guidance)
        return self.to_images(flow.euler(velocity, noise, steps, on_step))

    def _guided_velocity(self, registers: Tensor, guidance: float) -> flow.Velocity:
        """The decoder as a function of (x, t), with guidance against the null condition unless it is 1."""

        def velocity(x: Tensor, t: float, condition: Tensor) -> Tensor:
            estimate = self.decoder(x, x.new_tensor([t]), condition)
            return estimate if self.config.prediction == "velocity" else (x - estimate) / t

        if guidance == 1:
            return lambda x, t: velocity(x, t, registers)
        null = self.decoder.null_vector.expand_as(registers)
        apg = flow.AdaptiveProjectedGuidance() if self.config.projected_guidance else None
        combine = apg or flow.classifier_free_guidance

        def guided(x: Tensor, t: float) -> Tensor:
            v_cond, v_null = velocity(torch.cat([x, x]), t, torch.cat([registers, null])).chunk(2)
            return combine(v_cond, v_null, guidance)

        return guided
