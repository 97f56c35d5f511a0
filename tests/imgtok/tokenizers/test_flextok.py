"""Behaviour of a tiny FlexTok in pixels; the numbers themselves are compared in tests/parity."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import imgtok
from imgtok import flow
from imgtok.layers.mup import noted_width
from imgtok.tokenizers import flextok_fast
from imgtok.tokenizers.base import NoDecoding, Rate
from imgtok.tokenizers.flextok import (
    FlexTok,
    FlexTokConfig,
    FlexTokDecoding,
    ShortRuns,
    TrunkConfig,
    powers_of_two,
)
from imgtok.tokenizers.flextok_blocks import trunk_attention
from imgtok.tokenizers.flextok_fast import Condition, GuidedDecoder, prefix_causal_mask
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAEConfig

TRUNK = TrunkConfig(width=32, depth=2, head_dim=16)
TINY = FlexTokConfig(
    image_size=8,
    num_registers=8,
    levels=(4, 3, 2),
    encoder=TRUNK,
    decoder=TRUNK,
    decoding=FlexTokDecoding(steps=3),
    short_runs=ShortRuns(positions="learned", initialisation="aligned"),
)
TINY_VAE = VAEConfig(latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=8, scaling_factor=0.5)


def build(*, awake: bool = True, **changes) -> FlexTok:
    """A tiny model; `awake` gives the layers that start at zero some weight, so that everything shows."""
    torch.manual_seed(0)
    model = FlexTok(dataclasses.replace(TINY, **changes)).eval()
    if awake:
        for parameter in model.decoder.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def short(**changes) -> ShortRuns:
    return dataclasses.replace(TINY.short_runs, **changes)


def told(model: FlexTok, **changes) -> FlexTokDecoding:
    """The model's own settings but for `changes`."""
    return dataclasses.replace(model.config.decoding, **changes)


def images(count: int, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> FlexTok:
    return build()


# ---------------------------------------------------------------- shapes


def test_shapes_and_ranges(model):
    tokens = model.encode(images(3))
    assert (model.image_size, model.num_tokens, model.vocab_size) == (8, 8, 24)
    assert tokens.ids.shape == (3, 8)
    assert tokens.ids.dtype == torch.long
    assert tokens.lengths.tolist() == [8, 8, 8]
    assert 0 <= tokens.ids.min() <= tokens.ids.max() < 24
    assert tokens.ids.unique().numel() > 3
    decoded = model.decode(tokens)
    assert decoded.shape == (3, 3, 8, 8)
    assert decoded.abs().max() <= 1
    assert not decoded.requires_grad


def test_published_sizes_have_the_published_parameter_counts():
    """d12-d12 of the published code, trained numbers without the VAE."""
    vae = VAEConfig(latent_channels=16)
    with torch.device("meta"):
        model = FlexTok(FlexTokConfig(vae=vae))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
    assert counts == [85_185_798, 172_251_712]
    trunks = [sum(p.numel() for p in part.blocks.parameters()) for part in (model.encoder, model.decoder)]
    assert trunks == [84_934_656, 169_979_904]
    assert sum(p.numel() for p in model.vae.parameters()) == pytest.approx(83.82e6, rel=1e-3)
    assert model.config.grid == (16, 16)


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1152, 3072), (1792, 4778), (128, 341)])
def test_published_feed_forward_widths(width, hidden):
    assert TrunkConfig(width=width).mlp_hidden == hidden


@pytest.mark.parametrize("head_dim", [16, 64])
def test_attention_scale_is_that_of_mup(head_dim):
    """8 / h, which is 1 / sqrt(h) at the published 64 only; the parity cases cannot tell them apart."""
    assert trunk_attention(TrunkConfig(width=64, head_dim=head_dim)).scale == 8 / head_dim


# ---------------------------------------------------------------- initialisation


def test_an_untrained_decoder_predicts_nothing():
    model = build(awake=False)
    registers = model.decoder.condition(torch.randn(2, 8, 3), torch.tensor([3, 8]))
    assert not model.decoder(torch.randn(2, 3, 8, 8), torch.tensor([0.5, 1.0]), registers).any()


def test_the_published_initialisation():
    torch.manual_seed(0)
    model = FlexTok(dataclasses.replace(TINY, short_runs=short(initialisation="published")))
    decoder = model.decoder
    for vector in (model.encoder.registers, decoder.register_positions, decoder.mask_vector, decoder.null_vector):
        assert 0.012 < vector.std() < 0.025
        assert vector.abs().max() <= 0.04
    block = model.encoder.blocks[0]
    parts = [*block.attention.qkv_proj.weight.chunk(3), *block.mlp.gate_up_proj.weight.chunk(2)]
    for weights in (*parts, block.attention.out_proj.weight, block.mlp.down_proj.weight):
        bound = (6 / sum(weights.shape)) ** 0.5
        assert 0.95 * bound < weights.abs().max() <= bound
    starts_at_zero = [name for name, p in model.named_parameters() if not p.any()]
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    modulations = [f"decoder.blocks.{i}.modulation.weight" for i in range(2)]
    readouts = ["encoder.readout.weight", "decoder.readout.weight", "decoder.readout_modulation.weight"]
    assert set(starts_at_zero) == {*biases, *modulations, *readouts}


def test_the_open_initialisation_spreads_the_codes_and_opens_the_gates():
    torch.manual_seed(0)
    model = FlexTok(dataclasses.replace(TINY, levels=(4,) * 64))
    with torch.no_grad():
        z = model.encoder(images(16))
    assert 0.8 < z.std() < 1.2
    assert not torch.allclose(z[:, 0], z[:, 1], atol=0.1)
    for block in model.decoder.blocks:
        patch_set, register_set = block.modulation.bias.chunk(2)
        for chunks in (patch_set.chunk(6), register_set.chunk(6)):  # gate_attn, gate_mlp, then shifts and scales
            assert all((chunk == 1).all() for chunk in chunks[:2])
            assert not any(chunk.any() for chunk in chunks[2:])


# ---------------------------------------------------------------- encoder


def test_the_mask_lets_registers_see_patches_and_earlier_registers():
    expected = [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert prefix_causal_mask(2, 3, torch.device("cpu")).int().tolist() == expected


@pytest.mark.parametrize("count", range(1, 9))
def test_the_first_tokens_do_not_change_when_later_ones_are_left_out(model, count):
    batch = images(5)
    whole = model.encode(batch)
    short = model.encode(batch, num_tokens=count)
    assert short.lengths.tolist() == [count] * 5
    assert torch.equal(short.ids, whole.ids[:, :count])


def test_the_numbers_before_rounding_do_not_change_either(model):
    batch = images(5)
    with torch.no_grad():
        whole = model.encoder(batch)
        for count in (1, 3, 7, 8):
            assert (flextok_fast.encode(model.encoder, batch, count) - whole[:, :count]).abs().max() < 1e-5


def test_later_registers_cannot_reach_earlier_ones(model):
    batch = images(2)
    with torch.no_grad():
        before = flextok_fast.encode(model.encoder, batch, 8)
        altered = build()
        altered.encoder.registers[5:] += 1.0
        after = flextok_fast.encode(altered.encoder, batch, 8)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_encode_is_repeatable_and_does_not_depend_on_the_batch(model):
    batch = images(20)
    ids = model.encode(batch).ids
    assert torch.equal(ids, model.encode(batch).ids)
    assert torch.equal(ids[16:], model.encode(batch[16:]).ids)


def test_smaller_and_oblong_images_use_the_corner_of_the_position_table(model):
    assert model.encode(torch.zeros(1, 3, 4, 6)).ids.shape == (1, 8)


# ---------------------------------------------------------------- decoder


def test_padding_does_not_matter(model):
    """Rows of different lengths in one batch equal rows cut to their length."""
    ids = model.encode(images(4)).ids
    lengths = torch.tensor([1, 3, 5, 8])
    together = model.decode(Tokens(ids, lengths))
    other_padding = ids.clone()
    other_padding[torch.arange(8) >= lengths[:, None]] = 0
    assert torch.equal(together, model.decode(Tokens(other_padding, lengths)))
    for row, length in enumerate(lengths.tolist()):
        alone = model.decode(Tokens.full(ids[row : row + 1, :length]), indices=[row])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_truncate_is_the_same_as_encoding_fewer(model):
    batch = images(2)
    tokens = model.encode(batch).truncate(3)
    fewer = model.encode(batch, num_tokens=3)
    assert torch.equal(tokens.ids, fewer.ids)
    assert torch.equal(model.decode(tokens), model.decode(fewer))


def test_tokens_matter_within_the_length_and_not_beyond(model):
    ids = model.encode(images(1)).ids
    reference = model.decode(Tokens(ids, torch.tensor([4])))
    for position in range(8):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 7) % 24
        same = torch.equal(model.decode(Tokens(changed, torch.tensor([4]))), reference)
        assert same == (position >= 4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch(model, guidance):
    tokens = model.encode(images(40))
    indices = range(100, 140)
    whole = model.decode(tokens, seed=5, indices=indices, decoding=told(model, guidance=guidance))
    for rows in (slice(0, 16), slice(7, 31), slice(39, 40)):
        part = Tokens(tokens.ids[rows], tokens.lengths[rows])
        alone = model.decode(part, seed=5, indices=indices[rows], decoding=told(model, guidance=guidance))
        torch.testing.assert_close(alone, whole[rows], atol=2e-5, rtol=0)


def test_seed_and_index_choose_the_noise(model):
    ids = model.encode(images(1)).ids.expand(3, -1)
    decoded = model.decode(Tokens.full(ids), seed=1, indices=[4, 4, 5])
    assert torch.equal(decoded[0], decoded[1])
    assert not torch.equal(decoded[0], decoded[2])
    again = model.decode(Tokens.full(ids[:1]), seed=2, indices=[4])
    assert not torch.allclose(decoded[:1], again)
    assert torch.equal(model.decode(Tokens.full(ids)), model.decode(Tokens.full(ids), seed=0, indices=[0, 1, 2]))


def test_rates_are_prefixes_of_one_encoding(model, monkeypatch):
    """Every number of tokens is a rate; several of them cost one pass of the encoder."""
    assert [str(rate) for rate in model.rates()] == ["1", "2", "4", "8"]
    batch, calls, encode = images(2), [], flextok_fast.encode
    monkeypatch.setattr(flextok_fast, "encode", lambda *given: calls.append(given[2]) or encode(*given))
    four, three = model.encode_at(batch, [Rate(4), Rate(3)])
    assert calls == [4]
    assert torch.equal(three.ids, model.encode(batch, rate=Rate(3)).ids)
    assert torch.equal(three.ids, model.encode(batch).truncate(3).ids)
    assert four.lengths.tolist() == [4, 4]
    assert torch.equal(model.reconstruct(batch, Rate(3), seed=2), model.decode(three, seed=2))
    assert (model.fixed_length, model.num_slots) == (True, None)


@pytest.mark.parametrize("rate", [Rate(9), Rate(4, 0.1)])
def test_other_rates_are_refused(model, rate):
    for encode in (lambda: model.encode(images(1), rate=rate), lambda: model.encode_at(images(1), [rate])):
        with pytest.raises(ValueError, match=f"has 1 to 8 tokens an image and no tolerance, given {rate}"):
            encode()


def test_decoding_settings_are_the_models_unless_given(model):
    tokens = model.encode(images(2))
    settings = FlexTokDecoding(steps=2, guidance=3.0, solver="adams")
    given = model.decode(tokens, decoding=settings)
    assert torch.equal(given, build(decoding=settings).decode(tokens))
    assert torch.equal(model.decode(tokens), model.decode(tokens, decoding=model.config.decoding))
    with pytest.raises(TypeError, match="a FlexTok takes a FlexTokDecoding, not a NoDecoding"):
        model.decode(tokens, decoding=NoDecoding())


def test_decode_leaves_the_global_generator_alone(model):
    state = torch.get_rng_state()
    model.decode(model.encode(images(1)))
    assert torch.equal(state, torch.get_rng_state())


def test_steps_and_progress(model):
    tokens = model.encode(images(1))
    seen: list[tuple[int, torch.Tensor]] = []
    four = told(model, steps=4)
    final = model.decode(tokens, decoding=four, on_step=lambda step, latents, guess: seen.append((step, latents)))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1][1].clamp(-1, 1), final)
    assert torch.equal(model.decode(tokens), model.decode(tokens, decoding=told(model, steps=3)))
    assert not torch.equal(model.decode(tokens), model.decode(tokens, decoding=four))


def test_guidance_changes_the_image_and_follows_the_configuration(model):
    tokens = model.encode(images(2))
    plain = model.decode(tokens)
    assert torch.equal(plain, model.decode(tokens, decoding=told(model, guidance=1.0)))
    projected = model.decode(tokens, decoding=told(model, guidance=4.0))
    unprojected_model = build(decoding=FlexTokDecoding(steps=3, projected_guidance=False, guidance=4.0))
    unprojected = unprojected_model.decode(tokens)
    assert not torch.allclose(plain, projected)
    assert not torch.allclose(plain, unprojected)
    assert not torch.allclose(projected, unprojected)


def test_plain_guidance_is_that_of_two_separate_passes():
    model = build(decoding=FlexTokDecoding(steps=3, projected_guidance=False))
    tokens = model.encode(images(2)).truncate(3)
    registers = model.decoder.condition(model.quantizer.ids_to_codes(tokens.ids), tokens.lengths)
    null = model.decoder.condition(
        model.quantizer.ids_to_codes(tokens.ids), tokens.lengths, torch.ones(2, dtype=torch.bool)
    )
    x = torch.randn(2, 3, 8, 8, generator=generator())
    with torch.no_grad():
        cond, uncond = (model.decoder(x, torch.tensor([0.4]), r) for r in (registers, null))
        codes = model.quantizer.ids_to_codes(tokens.ids)
        network = GuidedDecoder(model, codes, tokens.lengths, [0.4], guidance=2.5, projected=False)
        guided = network.velocity(x, 0, 0.4)
    torch.testing.assert_close(guided, uncond + 2.5 * (cond - uncond), atol=1e-5, rtol=1e-5)


def test_one_time_for_all_is_the_same_as_one_time_each(model):
    registers = model.decoder.condition(torch.randn(3, 8, 3, generator=generator()), torch.tensor([1, 4, 8]))
    x = torch.randn(3, 3, 8, 8, generator=generator(1))
    with torch.no_grad():
        shared = model.decoder(x, torch.tensor([0.3]), registers)
        torch.testing.assert_close(shared, model.decoder(x, torch.full((3,), 0.3), registers), atol=1e-6, rtol=1e-5)


def test_masked_and_null_registers_carry_nothing(model):
    codes = torch.randn(3, 8, 3, generator=generator())
    decoder = model.decoder
    with torch.no_grad():
        registers = decoder.condition(codes, torch.tensor([3, 8, 2]), torch.tensor([False, False, True]))
        expected = decoder.code_proj(codes) + decoder.register_positions
        torch.testing.assert_close(registers[0, :3], expected[0, :3])
        assert torch.equal(registers[0, 3:], decoder.mask_vector.expand(5, -1))
        torch.testing.assert_close(registers[1], expected[1])
        assert torch.equal(registers[2], decoder.null_vector.expand(8, -1))
        assert torch.equal(decoder.condition(codes[:, :3], torch.tensor([3, 2, 1]))[0], registers[0])


# ------------------------------------------------ the exact savings


def test_one_register_stands_for_all_that_are_masked(model):
    """Velocities of the collapsed condition are those of all K registers."""
    codes = torch.randn(4, 8, 3, generator=generator())
    keep = torch.tensor([1, 3, 5, 8])
    x = torch.randn(4, 3, 8, 8, generator=generator(1))
    decoder = model.decoder
    with torch.no_grad():
        modulations = decoder.modulations(torch.tensor([0.6]))
        whole = decoder(x, torch.tensor([0.6]), decoder.condition(codes, keep))
        collapsed = flextok_fast.collapsed_condition(decoder, codes, keep)
        (together,) = flextok_fast.velocities(decoder, x, [collapsed], modulations)
        torch.testing.assert_close(together, whole, atol=1e-5, rtol=1e-5)
        for row in range(4):
            one = slice(row, row + 1)
            condition = flextok_fast.collapsed_condition(decoder, codes[one], keep[one])
            assert condition.registers.shape[1] == min(int(keep[row]) + 1, 8)
            (alone,) = flextok_fast.velocities(decoder, x[one], [condition], modulations)
            torch.testing.assert_close(alone, whole[one], atol=1e-5, rtol=1e-5)
            uncounted = Condition(condition.registers)
            (counted_once,) = flextok_fast.velocities(decoder, x[one], [uncounted], modulations)
            same = torch.allclose(counted_once, whole[one], atol=1e-4)
            assert same == (keep[row] >= 7)  # where the mask stands for one register or none, nothing is counted


def test_one_register_stands_for_the_null_condition(model):
    codes, keep = torch.randn(2, 8, 3, generator=generator()), torch.tensor([3, 8])
    x = torch.randn(2, 3, 8, 8, generator=generator(1))
    decoder = model.decoder
    with torch.no_grad():
        modulations = decoder.modulations(torch.tensor([0.6]))
        whole = decoder(x, torch.tensor([0.6]), decoder.condition(codes, keep, torch.tensor([True, True])))
        null = flextok_fast.null_condition(decoder, 2)
        assert null.registers.shape == (2, 1, 32)
        (one,) = flextok_fast.velocities(decoder, x, [null], modulations)
        torch.testing.assert_close(one, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "adams"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("changes", [{}, {"short_runs": short(prediction="data")}, {"vae": TINY_VAE, "image_size": 16}])
def test_the_fast_path_is_the_plain_algorithm(changes, guidance, solver):
    model = build(**changes)
    batch = images(4, model.image_size)
    assert torch.equal(model.encode(batch).ids, model.encode_plainly(batch).ids)
    tokens = model.encode(batch, num_tokens=[1, 3, 5, 8])
    for projected in (True, False):
        how = FlexTokDecoding(steps=3, guidance=guidance, solver=solver, projected_guidance=projected)
        fast, plain = model.decode(tokens, seed=3, decoding=how), model.decode_plainly(tokens, seed=3, decoding=how)
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)


def test_unguided_steps_leave_out_the_null_pass(model, monkeypatch):
    """Guidance as a function of the time, which is 1 in the second half."""
    calls: list[list[int]] = []
    velocities = flextok_fast.velocities

    def counting(decoder, x, conditions, modulations):
        calls.append([condition.registers.shape[1] for condition in conditions])
        return velocities(decoder, x, conditions, modulations)

    monkeypatch.setattr(flextok_fast, "velocities", counting)
    tokens = model.encode(images(2)).truncate(3)
    times: list[float] = []
    model.decode_latents(
        tokens, decoding=told(model, steps=4), guidance=lambda t: times.append(t) or (3.0 if t > 0.6 else 1.0)
    )
    assert times == [1, 0.75, 0.5, 0.25]
    assert calls == [[4, 1], [4, 1], [4], [4]]


# ------------------------------------------------ counts, sizes and solvers


def test_a_number_of_tokens_for_each_image(model):
    batch = images(3)
    tokens = model.encode(batch, num_tokens=[2, 7, 4])
    assert tokens.ids.shape == (3, 7)
    assert tokens.lengths.tolist() == [2, 7, 4]
    for row, count in enumerate((2, 7, 4)):
        assert torch.equal(tokens.ids[row, :count], model.encode(batch[row : row + 1]).ids[0, :count])
        assert not tokens.ids[row, count:].any()
    with pytest.raises(ValueError, match="2 numbers for 3 images"):
        model.encode(batch, num_tokens=[2, 7])


def test_images_of_several_sizes_at_once(model):
    mixed = [images(1, 8, seed=1)[0], images(1, 4, seed=2)[0], images(1, 8, seed=3)[0], images(1, 8)[0, :, :6]]
    tokens = model.encode(mixed, num_tokens=[8, 3, 5, 8])
    for row, image in enumerate(mixed):
        alone = model.encode(image[None], num_tokens=int(tokens.lengths[row]))
        assert torch.equal(tokens.ids[row, : tokens.lengths[row]], alone.ids[0])


def test_decode_at_another_size(model):
    tokens = model.encode(images(2))
    assert model.decode(tokens, size=(4, 6)).shape == (2, 3, 4, 6)
    assert torch.equal(model.decode(tokens, size=(8, 8)), model.decode(tokens))


def test_decode_with_an_autoencoder_at_another_size():
    model = build(vae=TINY_VAE, image_size=16)
    tokens = model.encode([images(1, 8)[0], images(1, 16)[0]])
    assert model.decode(tokens, size=(8, 16)).shape == (2, 3, 8, 16)


def test_a_sample_of_the_posterior_depends_on_its_seed_and_place():
    model = build(vae=TINY_VAE, image_size=16)
    batch = images(3, 16)
    mean, one, again, other = (model.encode(batch, posterior_seed=seed).ids for seed in (None, 1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, mean)
    assert not torch.equal(one, other)
    assert torch.equal(model.encode(list(batch), posterior_seed=1).ids, one)
    assert torch.equal(build().encode(images(2), posterior_seed=1).ids, build().encode(images(2)).ids)  # in pixels


def test_the_second_order_solver_is_closer_to_the_limit(model):
    tokens = model.encode(images(4)).truncate(4)
    limit = model.decode(tokens, decoding=told(model, steps=200))
    settings = (told(model, steps=8, solver=solver) for solver in ("euler", "adams"))
    euler, adams = ((model.decode(tokens, decoding=how) - limit).abs().mean() for how in settings)
    assert adams < euler / 2
    assert torch.equal(
        model.decode(tokens, decoding=told(model, solver="adams")),
        build(decoding=FlexTokDecoding(steps=3, solver="adams")).decode(tokens),
    )


def test_the_guess_becomes_the_image(model):
    """What `on_step` is told the image will be: of the right size, and at the last step the image itself."""
    guesses: list[torch.Tensor] = []
    final = model.decode(model.encode(images(1)), on_step=lambda step, latents, guess: guesses.append(guess))
    assert len(guesses) == 3
    torch.testing.assert_close(model.to_images(guesses[-1]), final, atol=1e-5, rtol=0)
    assert not torch.allclose(guesses[0], guesses[-1], atol=1e-3)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_encode_refuses_pixels_that_are_no_numbers(model, value):
    batch = images(3)
    batch[1, 0, 2, 2] = value
    with pytest.raises(ValueError, match="image 1 has pixels that are not finite"):
        model.encode(batch)
    with pytest.raises(ValueError, match="image 1 has pixels that are not finite"):
        model.encode(list(batch))


@pytest.mark.parametrize(("vae", "size"), [(None, (7, 8)), (TINY_VAE, (16, 14)), (TINY_VAE, (17, 16))])
def test_encode_refuses_sizes_that_do_not_divide(vae, size):
    model = build(vae=vae, image_size=16 if vae else 8)
    with pytest.raises(ValueError, match=r"does not divide into patches of (2 x 2|4 x 4)"):
        model.encode(torch.zeros(1, 3, *size))


def test_decode_refuses_an_empty_batch_and_other_indices(model):
    with pytest.raises(ValueError, match="no tokens to decode"):
        model.decode(Tokens.full(torch.zeros(0, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match="indices: 3 numbers for 2 sequences"):
        model.decode(model.encode(images(2)), indices=[0, 1, 2])


def test_encode_refuses_latents_that_are_no_numbers(model):
    with pytest.raises(ValueError, match="image 0 has pixels that are not finite"):
        model.encode_latents(torch.full((1, 3, 8, 8), torch.nan))


@pytest.mark.parametrize("size", [(10, 8), (8, 7), (0, 8)])
def test_decode_refuses_sizes_off_the_grid(model, size):
    with pytest.raises(ValueError, match="multiples of 2 up to 8"):
        model.decode(model.encode(images(1)), size=size)


@pytest.mark.parametrize("count", [0, -1, 9])
def test_encode_refuses_a_wrong_number_of_tokens(model, count):
    with pytest.raises(ValueError, match=f"1 to 8 tokens an image, asked for {count}"):
        model.encode(images(1), num_tokens=count)


@pytest.mark.parametrize("bad", [-1, 24])
def test_decode_refuses_ids_outside_the_vocabulary(model, bad):
    with pytest.raises(ValueError, match=r"\[0, 24\)"):
        model.decode(Tokens.full(torch.tensor([[3, bad]])))


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        (torch.zeros(1, 9), [9]),
        (torch.zeros(2, 4), [0, 4]),
        (torch.zeros(1, 0), [0]),
        (torch.zeros(2, 4), [4, 5]),  # longer than the ids that are there
    ],
)
def test_decode_refuses_wrong_lengths(model, ids, lengths):
    with pytest.raises(ValueError, match="1 to 8 tokens an image"):
        model.decode(Tokens(ids.long(), torch.tensor(lengths)))


def test_truncate_keeps_at_least_one():
    with pytest.raises(ValueError, match="at least 1 token"):
        Tokens.full(torch.zeros(2, 4, dtype=torch.long)).truncate(0)


@pytest.mark.parametrize("steps", [-1, 0])
def test_decode_refuses_no_steps(model, steps):
    with pytest.raises(ValueError, match="step"):
        model.decode(model.encode(images(1)), decoding=told(model, steps=steps))


@pytest.mark.parametrize("size", [(10, 8), (8, 10)])
def test_a_grid_larger_than_the_position_table(model, size):
    with pytest.raises(ValueError, match=r"larger than the position table of 4 x 4"):
        model.encode(torch.zeros(1, 3, *size))


def test_an_image_that_does_not_divide_into_patches(model):
    with pytest.raises(ValueError, match="does not divide"):
        model.encode(torch.zeros(1, 3, 7, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "image_size: 9 is not a multiple of 2"),
        ({"image_size": 10, "vae": TINY_VAE}, "image_size: 10 is not a multiple of 4"),
        ({"levels": ()}, "levels"),
        ({"levels": (8, 1)}, "levels"),
        ({"null_dropout": 1.5}, "null_dropout"),
        ({"num_registers": 0}, "num_registers"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(("width", "head_dim"), [(48, 32), (6, 3)])
def test_trunks_that_cannot_be(width, head_dim):
    with pytest.raises(ValueError, match="multiple of head_dim"):
        TrunkConfig(width=width, head_dim=head_dim)


# ---------------------------------------------------------------- what training draws


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_powers_of_two(count, expected):
    assert powers_of_two(count) == expected


@pytest.mark.parametrize(
    ("mode", "shares"),
    [
        ("uniform", dict.fromkeys(range(1, 9), 1 / 8)),
        ("pow2", {1: 1 / 4, 2: 1 / 4, 4: 1 / 4, 8: 1 / 4}),
        ("uniform_pow2", {1: 1 / 8, 2: 1 / 8, 4: 2 / 8, 8: 4 / 8}),
    ],
)
def test_nested_dropout(mode, shares):
    """Chi-square against the mode's law; 24.3 is the 0.1 % point at 7 degrees of freedom."""
    keep = build(nested_dropout=mode).draw_keep_counts(8000, generator())
    counts = torch.bincount(keep, minlength=9)
    assert set(counts.nonzero().flatten().tolist()) == set(shares)
    statistic = sum((counts[k].item() - 8000 * share) ** 2 / (8000 * share) for k, share in shares.items())
    assert statistic < 24.3


def test_training_times():
    assert torch.equal(build(mode_scale=0.25).draw_times(64, generator(3)), flow.mode_times(64, 0.25, generator(3)))
    assert torch.equal(
        build(times="logit_normal").draw_times(64, generator(3)), flow.logit_normal_times(64, generator(3))
    )
    assert torch.equal(
        build(times="stratified_logit_normal").draw_times(64, generator(3)),
        flow.logit_normal_times(64, generator(3), stratified=True),
    )
    times = build(short_runs=short(noise_fraction=0.3)).draw_times(8000, generator())
    assert 0.27 < (times == 1).float().mean() < 0.33
    assert (build(short_runs=short(noise_fraction=1.0)).draw_times(8, generator()) == 1).all()


@pytest.mark.parametrize("null_dropout", [0.0, 1.0])
def test_null_dropout_replaces_the_whole_condition(monkeypatch, null_dropout):
    model = build(null_dropout=null_dropout)
    seen: list[torch.Tensor] = []
    condition = model.decoder.condition
    monkeypatch.setattr(model.decoder, "condition", lambda *args: seen.append(condition(*args)) or seen[-1])
    model(images(4), generator=generator()).total.backward()
    is_null = (seen[0] == model.decoder.null_vector).all()
    assert is_null == bool(null_dropout)
    assert (model.encoder.readout.weight.grad is None or not model.encoder.readout.weight.grad.any()) == is_null


def test_the_loss_depends_on_its_generator_alone():
    model = build()
    state = torch.get_rng_state()
    losses = [model(images(4), generator=generator(seed)).total.item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(state, torch.get_rng_state())


def test_the_loss_of_an_untrained_model_is_that_of_predicting_zero():
    model = build(awake=False)
    batch = images(64)
    losses = model(batch, generator=generator())
    assert losses.total.item() == pytest.approx(1 + batch.square().mean().item(), rel=0.05)  # E (noise - x)^2
    assert all(value.isfinite() for value in losses.parts.values())


def test_a_batch_of_one_has_finite_losses(model):
    losses = model(images(1), generator=generator())
    assert all(value.isfinite() for value in (losses.total, *losses.parts.values()))


def test_a_network_that_predicts_the_data():
    """Untrained, it says zero: the loss is that of the data alone, and every image is grey."""
    model = build(awake=False, short_runs=short(prediction="data", noise_fraction=1.0))
    batch = images(4)
    assert model(batch, generator=generator()).total.item() == pytest.approx(batch.square().mean().item(), rel=1e-5)
    for guidance in (1.0, 5.0):
        assert model.decode(model.encode(batch), decoding=told(model, guidance=guidance)).abs().max() < 1e-6


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_every_parameter_is_trained(prediction):
    model = build(null_dropout=0.5, nested_dropout="uniform", short_runs=short(prediction=prediction))
    model(images(16), generator=generator()).total.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


def test_training_reduces_the_loss_and_the_tokens_tell_images_apart():
    """Two flat images, full noise: only the tokens can say which one it is."""
    model = build(awake=False, short_runs=short(noise_fraction=1.0), null_dropout=0.0).train()
    batch = torch.tensor([-0.8, 0.8])[:, None, None, None].expand(2, 3, 8, 8).repeat(8, 1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(60):
        loss = model(batch, generator=generator(step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] == pytest.approx(1.64, rel=0.1)
    assert sum(history[-5:]) / 5 < 0.25 * history[0]
    decoded = model.eval().decode(model.encode(batch[:2]).truncate(1), decoding=told(model, steps=4))
    assert decoded[0].mean() < -0.4
    assert decoded[1].mean() > 0.4


# ---------------------------------------------------------------- for train.optim, REPA and little memory


def test_widths_are_noted_on_what_reads_a_trunk():
    """The rest reads latents, codes or time features, whose number does not grow with the network."""
    model = build(encoder=TrunkConfig(width=48, depth=2, head_dim=16))
    matrices = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    fixed = {name for name, weight in matrices.items() if noted_width(weight) is None}
    parts = ("encoder.patch_proj", "decoder.patch_proj", "decoder.code_proj", "decoder.time_mlp.0")
    assert fixed == {f"{part}.weight" for part in parts}
    for name, parameter in model.named_parameters():
        width = 48 if name.startswith("encoder.") else 32
        assert noted_width(parameter) == (width if name in matrices.keys() - fixed else None)


def test_each_block_of_the_decoder_can_be_watched(model):
    registers = model.decoder.condition(torch.randn(2, 8, 3, generator=generator()), torch.tensor([3, 8]))
    x, t = torch.randn(2, 3, 8, 8, generator=generator(1)), torch.tensor([0.2, 0.9])
    seen: list[tuple[int, torch.Tensor]] = []
    after: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda *args: after.append(args[-1])) for b in model.decoder.blocks]
    with torch.no_grad():
        watched = model.decoder(x, t, registers, lambda index, patches: seen.append((index, patches)))
        for hook in hooks:
            hook.remove()
        assert torch.equal(watched, model.decoder(x, t, registers))
    assert [index for index, _ in seen] == [0, 1]
    assert all(torch.equal(patches, whole[:, :16]) for (_, patches), whole in zip(seen, after, strict=True))


def test_recomputed_activations_change_nothing_but_the_work():
    batch, models, calls = images(4), [build(), build()], []
    models[1].recompute_activations()
    for model in models:
        counted: list[torch.nn.Module] = []
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            block.register_forward_pre_hook(lambda module, _, counted=counted: counted.append(module))
        model(batch, generator=generator()).total.backward()
        calls.append(len(counted))
    kept, recomputed = (dict(model.named_parameters()) for model in models)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name].grad, recomputed[name].grad) for name in kept)
    assert calls == [4, 8]
    assert torch.equal(models[0].encode(batch).ids, models[1].encode(batch).ids)


# ---------------------------------------------------------------- with an autoencoder, and on disk


def test_the_autoencoder_stays_as_it_is():
    model = build(vae=TINY_VAE).train()
    assert model.config.grid == (2, 2)
    assert not any(p.requires_grad for p in model.vae.parameters())
    before = {name: value.clone() for name, value in model.vae.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        loss = model(images(4), generator=generator(step)).total
        loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in model.vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.vae.state_dict().items())


def test_latents_are_the_scaled_posterior_mean():
    model = build(vae=TINY_VAE)
    batch = images(2)
    latents = model.to_latents(batch)
    assert latents.shape == (2, 4, 4, 4)
    assert not latents.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(latents, 0.5 * model.vae.autoencoder.encode(batch).latent_dist.mean)
    assert torch.equal(model.encode(batch).ids, model.encode(batch).ids)
    assert model.decode(model.encode(batch)).shape == (2, 3, 8, 8)


def test_training_may_sample_the_posterior(monkeypatch):
    models = {posterior: build(vae=TINY_VAE, posterior=posterior) for posterior in ("mean", "sample")}
    batch, seen = images(2), {}
    for name, model in models.items():
        sequence, latents = model.encoder.sequence, []
        monkeypatch.setattr(
            model.encoder, "sequence", lambda x, k, of=sequence, latents=latents: latents.append(x) or of(x, k)
        )
        losses = [model(batch, generator=generator(seed)).total.item() for seed in (0, 0, 1)]
        assert losses[0] == losses[1] != losses[2]
        seen[name] = latents[:]
        latents.clear()
    mean, sample = seen["mean"], seen["sample"]
    assert torch.equal(mean[0], mean[2])
    assert torch.equal(sample[0], sample[1])
    assert not torch.equal(sample[0], sample[2])
    noise = torch.randn(2, 4, 4, 4, generator=generator())
    assert torch.equal(sample[0], models["mean"].to_latents(batch, noise))
    assert torch.equal(models["sample"].encode(batch).ids, models["mean"].encode(batch).ids)


@pytest.mark.parametrize("vae", [None, TINY_VAE])
def test_saving_and_loading(tmp_path, vae):
    model = build(vae=vae)
    model.save_pretrained(tmp_path)
    for loaded in (FlexTok.from_pretrained(tmp_path), imgtok.load(tmp_path, expect=FlexTok)):
        assert loaded.config == model.config
        assert not loaded.training
        tokens = model.encode(images(2))
        assert torch.equal(loaded.encode(images(2)).ids, tokens.ids)
        assert torch.equal(
            loaded.decode(tokens, decoding=told(loaded, guidance=2.0)),
            model.decode(tokens, decoding=told(model, guidance=2.0)),
        )
        if vae:
            assert not any(p.requires_grad for p in loaded.vae.parameters())


def test_runs_in_bfloat16_under_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images(4), generator=generator())
        decoded = model.decode(model.encode(images(2)), decoding=told(model, guidance=2.0))
    assert losses.total.dtype == torch.float32
    assert decoded.isfinite().all()
