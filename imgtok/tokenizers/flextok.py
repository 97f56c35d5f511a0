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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import flow, randomness
from imgtok.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Range, check
from imgtok.layers.attention import Attention, Look
from imgtok.layers.feed_forward import SwiGLU
from imgtok.layers.mup import note_width
from imgtok.layers.norms import layer_norm
from imgtok.layers.patches import patchify, unpatchify
from imgtok.layers.positions import sincos_2d, time_features
from imgtok.layers.recompute import call_block
from imgtok.quantizers.fsq import FSQ
from imgtok.tokenizers.base import Losses, OnBlock, Rate, Taps, Tokenizer, powers_of_two
from imgtok.tokenizers.flextok_fast import Condition, Modulations, Packing, encoder_looks
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAE, VAEConfig

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
class FlexTokDecoding:
    """How the flow decoder turns tokens into an image."""

    steps: PositiveInt = 25
    """Steps of the flow, one call of the decoder each (two under guidance)."""
    guidance: PositiveFloat = 1.0
    """Guidance scale; 1 is none."""
    solver: Literal["euler", "adams"] = "euler"
    """Euler as published, or two-step Adams-Bashforth."""
    projected_guidance: bool = True
    """Guide by adaptive projected guidance rather than plain classifier-free guidance."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class FlexTokConfig:
    """A FlexTok; the defaults are the published d12-d12, as far as it is known (docs/flextok.md, Training)."""

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
    default). `encode` takes the mean unless it is given a seed, so that an image always has the same tokens."""
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
    decoding: FlexTokDecoding = FlexTokDecoding()
    """How `decode` works unless it is told otherwise."""

    def __post_init__(self) -> None:
        check(self)
        if self.image_size % self.cell:
            raise ValueError(
                f"image_size: {self.image_size} is not a multiple of {self.cell}, the pixels a side of one patch"
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
        return self.image_size // self.cell

    @property
    def factor(self) -> int:
        """Pixels a side of one latent cell; 1 in pixels."""
        return self.vae.factor if self.vae else 1

    @property
    def cell(self) -> int:
        """Pixels a side of one patch."""
        return self.patch_size * self.factor


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

    def forward(self, x: Tensor, looks: Sequence[Look], wanted: slice | None = None) -> Tensor:
        """The positions in `wanted`, which `looks` ask for; all of them by default."""
        attended = self.attention(layer_norm(x), looks=looks)
        x = (x if wanted is None else x[:, wanted]) + attended
        return x + self.mlp(layer_norm(x))


class DecoderBlock(nn.Module):
    """The same, with shift, scale and gate from the time embedding: one set for patches, one for registers."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.attention = trunk_attention(config)
        self.mlp = SwiGLU(config.width, config.mlp_hidden)
        self.modulation = nn.Linear(config.width, 12 * config.width)

    def forward(self, x: Tensor, modulation: Tensor, packing: Packing, patches_only: bool = False) -> Tensor:
        """`modulation` (B or 1, 12 D) is this block's row for the time.

        With `patches_only`, registers are looked at but not computed: what nobody reads behind the last block.
        """
        patch_set, register_set = modulation.unflatten(-1, (2, 6, 1, -1)).unbind(1)  # (B or 1, 6, 1, D)
        gates, shifts, scales = ([patch_set[:, i], register_set[:, i]] for i in ATTENTION_CHUNKS)
        inputs = modulate(layer_norm(x), packing.lengths, shifts, scales)
        attended = self.attention(inputs, looks=packing.looks(patches_only))
        if patches_only:
            x, packing = packing.patches(x), packing.without_registers()
        x = add_gated(x, attended, packing.lengths, gates)
        gates, shifts, scales = ([patch_set[:, i], register_set[:, i]] for i in MLP_CHUNKS)
        return add_gated(x, self.mlp(modulate(layer_norm(x), packing.lengths, shifts, scales)), packing.lengths, gates)


ATTENTION_CHUNKS = (0, 2, 3)
"""Where a modulation set holds the attention's gate, shift and scale: both gates come first."""
MLP_CHUNKS = (1, 4, 5)


def modulate(x: Tensor, lengths: Sequence[int], shifts: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """X * (1 + scale) + shift; stretches of x take the pair for patches and the one for registers in turn."""
    factors = [1 + scale for scale in scales]
    parts = x.split(lengths, dim=1)
    return torch.cat([torch.addcmul(shifts[i % 2], part, factors[i % 2]) for i, part in enumerate(parts)], dim=1)


def add_gated(x: Tensor, branch: Tensor, lengths: Sequence[int], gates: Sequence[Tensor]) -> Tensor:
    """X + gate * branch, in the same stretches."""
    pairs = zip(x.split(lengths, dim=1), branch.split(lengths, dim=1), strict=True)
    return torch.cat([torch.addcmul(part, added, gates[i % 2]) for i, (part, added) in enumerate(pairs)], dim=1)


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
        looks = encoder_looks(patches.shape[1], num_tokens, x.device)
        for block in self.blocks[:-1]:
            x = call_block(block, x, looks, recompute=self.recompute)
        # behind the last block only registers are read
        x = call_block(self.blocks[-1], x, looks[-1:], looks[-1].queries, recompute=self.recompute)
        return self.readout(layer_norm(x))


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

    def collapsed_condition(self, codes: Tensor, keep_B: Tensor) -> Condition:
        """The same condition in max(keep) + 1 registers: those kept, and one for all that became the mask vector."""
        total, most = self.register_positions.shape[0], int(keep_B.max())
        if int(keep_B.min()) == total:
            return Condition(self.condition(codes, keep_B))
        registers = self.code_proj(codes[:, :most]) + self.register_positions[:most]
        hidden = torch.arange(most, device=codes.device) >= keep_B[:, None]
        mask = self.mask_vector.to(registers.dtype).expand(len(codes), 1, -1)
        log_counts = torch.zeros_like(hidden, dtype=registers.dtype).masked_fill(hidden, -torch.inf)
        masked = (total - keep_B).to(registers.dtype).log()[:, None]  # -inf where nothing is masked
        return Condition(torch.cat([registers, mask], dim=1), torch.cat([log_counts, masked], dim=1))

    def null_condition(self, batch: int) -> Condition:
        """The null condition of every image, in one register."""
        registers = self.null_vector.expand(batch, 1, -1)
        return Condition(registers, registers.new_full((batch, 1), math.log(self.register_positions.shape[0])))

    def modulations(self, t_T: Tensor) -> Modulations:
        """All that depends on the time alone: (T, 12 D) for each block and (T, 2 D) for the readout.

        T is the batch in training, the steps in sampling: half of the decoder's weights are read here, once a call.
        """
        features = time_features(t_T, scale=self.time_scale)
        time = F.silu(self.time_mlp(features.to(self.patch_proj.weight.dtype)))  # (T, D)
        blocks = [block.modulation(time) for block in self.blocks if isinstance(block, DecoderBlock)]
        return Modulations(blocks, self.readout_modulation(time))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, registers_BKD: Tensor, on_block: OnBlock | None = None) -> Tensor:
        """Velocity (B, C, H, W); `t_B` has one time an image, or a single one for all of them.

        `on_block(index, patches)` sees the patch tokens (B, N, D) behind each block.
        """
        return self.velocity(x_BCHW, Condition(registers_BKD), self.modulations(t_B), on_block)

    def velocity(
        self,
        x_BCHW: Tensor,
        condition: Condition,
        modulations: Modulations,
        on_block: OnBlock | None = None,
    ) -> Tensor:
        """The same with the time's part already computed, rows (B or 1, ...) of `modulations`."""
        return self.velocities(x_BCHW, [condition], modulations, on_block)[0]

    def velocities(
        self,
        x_BCHW: Tensor,
        conditions: Sequence[Condition],
        modulations: Modulations,
        on_block: OnBlock | None = None,
    ) -> list[Tensor]:
        """The velocity under each of the conditions, in one pass; `on_block` sees the first one's patches."""
        patches = self.patch_proj(patchify(x_BCHW, self.patch_size))
        patches = patches + crop_positions(self.positions, x_BCHW, self.patch_size)
        num_patches = patches.shape[1]
        packing = Packing(
            num_patches,
            tuple(condition.registers.shape[1] for condition in conditions),
            tuple(condition.attention_bias(num_patches) for condition in conditions),
        )
        x = torch.cat([part for each in conditions for part in (patches, each.registers.to(patches.dtype))], dim=1)
        last = len(self.blocks) - 1
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations.blocks, strict=True)):
            x = call_block(block, x, modulation, packing, i == last, recompute=self.recompute)
            if on_block is not None:
                on_block(i, x[:, :num_patches])
        shift, scale = modulations.readout[:, None].chunk(2, dim=-1)
        out = self.readout(torch.addcmul(shift, layer_norm(x), 1 + scale))
        rows, columns = (side // self.patch_size for side in x_BCHW.shape[-2:])
        return [unpatchify(part, self.patch_size, rows, columns) for part in out.split(num_patches, dim=1)]


# ---------------------------------------------------------------- the tokenizer


class FlexTok(Tokenizer):
    """The whole tokenizer. Calling it gives the training losses; see `encode` and `decode` for its use."""

    config_class: ClassVar[type] = FlexTokConfig
    stands_on = "vae"
    decoding_class: ClassVar[type] = FlexTokDecoding

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

    @torch.no_grad()
    def _initialise(self) -> None:
        """Xavier for matrices; zero for biases, modulation and readouts; 0.02 for vectors (section 5)."""
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        for block in self._blocks():  # q, k, v and gate, up are matrices of their own, though they lie in one
            for fused, count in ((block.attention.qkv_proj, 3), (block.mlp.gate_up_proj, 2)):
                for matrix in fused.weight.chunk(count):
                    nn.init.xavier_uniform_(matrix)
        modulations = [block.modulation for block in self.decoder.blocks if isinstance(block, DecoderBlock)]
        for linear in (*modulations, self.decoder.readout_modulation, self.decoder.readout):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.encoder.readout.weight)
        for vector in self._vectors():
            nn.init.trunc_normal_(vector, std=0.02, a=-0.04, b=0.04)
        if self.config.initialisation == "aligned":
            self._align(modulations)

    def _blocks(self) -> list[EncoderBlock | DecoderBlock]:
        blocks = (*self.encoder.blocks, *self.decoder.blocks)
        return [block for block in blocks if isinstance(block, EncoderBlock | DecoderBlock)]

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
        for block in self._blocks():
            # what was measured in docs/quickstart.md started with the bound of the fused matrices, which is smaller
            for fused, count in ((block.attention.qkv_proj, 3), (block.mlp.gate_up_proj, 2)):
                inputs, outputs = fused.in_features, fused.out_features
                fused.weight.mul_(((inputs + outputs / count) / (inputs + outputs)) ** 0.5)
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
        on_block: OnBlock | None = None,
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
        cell = self.config.cell
        height, width = images.shape[-2:]
        if height % cell or width % cell:
            raise ValueError(f"an image of {height} x {width} pixels does not divide into patches of {cell} x {cell}")
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

        A sequence of (3, H, W) images may hold several sizes, up to `image_size` a side. With `posterior_seed` the
        autoencoder's posterior is sampled, image b with the noise of (seed, b), instead of its mean taken. Raises
        ValueError for pixels that are not finite, a size that does not divide into patches or is larger than the
        position table, and a number of tokens outside 1..K.
        """
        if rate is not None:
            self.check_rate(rate)
            num_tokens = rate.num_tokens
        counts = self._token_counts(num_tokens, len(images))
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
        check_finite(images, rows)
        if self.config.vae is None or seed is None:
            return self.to_latents(images)
        sides = (side // self.config.factor for side in images.shape[-2:])
        noise = randomness.normal(seed, rows, (self.config.latent_channels, *sides), "posterior")
        return self.to_latents(images, noise.to(images.device))

    @torch.no_grad()
    def encode_latents(self, latents: Tensor, *, num_tokens: int | Sequence[int] | None = None) -> Tokens:
        """The tokens of latents (B, C, H, W), as `to_latents` gives them.

        Only as many registers are computed as the longest row needs: later ones could not change them.
        """
        counts = self._token_counts(num_tokens, len(latents))
        check_finite(latents, range(len(latents)))
        codes = self.quantizer(self.encoder(latents, max(counts)))
        return Tokens(self.quantizer.codes_to_ids(codes), torch.tensor(counts, device=latents.device)).padded()

    def _token_counts(self, num_tokens: int | Sequence[int] | None, batch: int) -> list[int]:
        """One number of tokens for each image."""
        if num_tokens is None or isinstance(num_tokens, int):
            counts = [self.num_tokens if num_tokens is None else num_tokens] * batch
        else:
            counts = list(num_tokens)
        if len(counts) != batch or not counts:
            raise ValueError(f"num_tokens: {len(counts)} numbers for {batch} images")
        for count in counts:
            if not 1 <= count <= self.num_tokens:
                raise ValueError(
                    f"num_tokens: this tokenizer has 1 to {self.num_tokens} tokens an image, asked for {count}"
                )
        return counts

    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        steps: int | None = None,
        guidance: flow.Guidance | None = None,
        solver: Literal["euler", "adams"] | None = None,
        size: tuple[int, int] | None = None,
        on_step: flow.OnStep | None = None,
    ) -> Tensor:
        """Tokens, rows of any length 1..K -> images (B, 3, H, W) in [-1, 1].

        Row b starts from the noise of (`seed`, `indices[b]`), 0.. by default, and nothing else, so an image does not
        depend on its batch. `decoding` is a `FlexTokDecoding`, that of the configuration by default; `steps`,
        `guidance` and `solver` take the place of what it says, and `guidance` may then be a function of the time from
        1 (noise) to 0. `size` is (height, width) in pixels, `image_size` by default. `on_step(step, latents, guess)`
        follows the flow: `to_images(guess)` is what the model expects the image to become.
        """
        latents = self.decode_latents(
            tokens,
            seed=seed,
            indices=indices,
            decoding=decoding,
            steps=steps,
            guidance=guidance,
            solver=solver,
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
        steps: int | None = None,
        guidance: flow.Guidance | None = None,
        solver: Literal["euler", "adams"] | None = None,
        size: tuple[int, int] | None = None,
        on_step: flow.OnStep | None = None,
    ) -> Tensor:
        """`decode` up to the latents (B, C, H, W)."""
        self._check_tokens(tokens, indices)
        device = self.decoder.null_vector.device
        settings = self._settings(decoding)
        times = flow.step_times(settings.steps if steps is None else steps)
        shape = self._latent_shape(size)
        noise = randomness.normal(seed, range(len(tokens)) if indices is None else indices, shape, "flextok").to(device)
        codes = self.quantizer.ids_to_codes(tokens.padded().ids.to(device))
        condition = self.decoder.collapsed_condition(codes, tokens.lengths.to(device))
        velocity = self._guided_velocity(
            condition,
            times,
            settings.guidance if guidance is None else guidance,
            projected=settings.projected_guidance,
        )
        solve = {"euler": flow.euler, "adams": flow.adams}[solver or settings.solver]
        return solve(velocity, noise, len(times), on_step)

    def _settings(self, decoding: object | None) -> FlexTokDecoding:
        """Those given, or those of the configuration. Raises TypeError for the settings of another tokenizer."""
        settings = self.config.decoding if decoding is None else decoding
        if not isinstance(settings, FlexTokDecoding):
            raise TypeError(f"decoding: a FlexTok takes a FlexTokDecoding, not a {type(settings).__name__}")
        return settings

    def _check_tokens(self, tokens: Tokens, indices: Sequence[int] | None) -> None:
        columns, lengths = tokens.ids.shape[1], tokens.lengths
        if not len(tokens):
            raise ValueError("there are no tokens to decode: the batch is empty")
        if indices is not None and len(indices) != len(tokens):
            raise ValueError(f"indices: {len(indices)} numbers for {len(tokens)} sequences of tokens")
        if columns > self.num_tokens or int(lengths.min()) < 1 or int(lengths.max()) > columns:
            raise ValueError(
                f"decode takes 1 to {self.num_tokens} tokens an image, got lengths {int(lengths.min())} to "
                f"{int(lengths.max())} in {columns} columns"
            )

    def _latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image of `size` pixels."""
        height, width = size or (self.image_size, self.image_size)
        cell = self.config.cell
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % cell or side > self.image_size:
                raise ValueError(
                    f"size: a {name} of {side} pixels; this model decodes multiples of {cell} up to {self.image_size}"
                )
        return (self.config.latent_channels, height // self.config.factor, width // self.config.factor)

    def _guided_velocity(
        self, condition: Condition, times: Sequence[float], guidance: flow.Guidance, *, projected: bool
    ) -> flow.Velocity:
        """The decoder as a function of (x, step, t), steps at `times`, guided against null unless by 1."""
        modulations = self.decoder.modulations(torch.tensor(times, device=condition.registers.device))
        null = self.decoder.null_condition(len(condition.registers))
        apg = flow.AdaptiveProjectedGuidance() if projected else None
        combine = apg or flow.classifier_free_guidance

        def guided(x: Tensor, step: int, t: float) -> Tensor:
            scale = guidance(t) if callable(guidance) else guidance
            conditions = [condition] if scale == 1 else [condition, null]
            estimates = self.decoder.velocities(x, conditions, modulations.row(step))
            if self.config.prediction == "data":
                estimates = [(x - estimate) / t for estimate in estimates]
            return estimates[0] if scale == 1 else combine(estimates[0], estimates[1], scale)

        return guided


def check_finite(images: Tensor, rows: Sequence[int]) -> None:
    """Raises ValueError that names the first of the images `rows` with a pixel that is NaN or infinite."""
    bad = ~images.isfinite().flatten(1).all(dim=1)
    if bool(bad.any()):
        row = rows[int(bad.nonzero()[0])]
        raise ValueError(f"image {row} has pixels that are not finite (NaN or infinite); images lie in [-1, 1]")
