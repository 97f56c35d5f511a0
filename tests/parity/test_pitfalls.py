"""The cases notice the mistakes that load and run without an error: each is made on purpose, and must fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import runs
import torch
import torch.nn.functional as F
from cases import Case
from models import flextok

from imgtok import flow
from imgtok.layers import attention, feed_forward
from imgtok.quantizers.fsq import FSQ
from imgtok.tokenizers import flextok as flextok_module
from imgtok.tokenizers import flextok_blocks, flextok_fast
from imgtok.tokenizers.flextok import Decoder, FlexTok

ENCODE, VELOCITY, DECODE, TRAIN = (Case.load(f"flextok/{name}") for name in ("encode", "velocity", "decode", "train"))


def worst(case: Case, ours: runs.Outputs) -> float:
    return max(case.errors(ours).values())


def encode_error(change: Callable[[FlexTok], object] = lambda model: None) -> float:
    model = flextok(ENCODE)
    change(model)
    ours = runs.encode_square(model, ENCODE)
    tables = ("square.mask", "enc_grid")  # the tokens must show it, not the table itself
    return worst(ENCODE, {name: value for name, value in ours.items() if name not in tables})


def velocity_error(out: str, change: Callable[[FlexTok], object] = lambda model: None) -> float:
    model = flextok(VELOCITY)
    change(model)
    ours = runs.velocity(model, VELOCITY, VELOCITY.run(out))
    return worst(VELOCITY, {f"{out}.velocity": ours[f"{out}.velocity"]})


def decode_error(out: str) -> float:
    model = flextok(DECODE, projected_guidance=out == "apg")
    return worst(DECODE, runs.decode_latents(model, DECODE, DECODE.run(out)))


def test_the_right_code_passes():
    assert encode_error() <= 1
    assert velocity_error("half_null") <= 1
    assert decode_error("apg") <= 1


# ---------------------------------------------------------------- quantizer


def test_even_levels_without_the_half_step(monkeypatch):
    original = FSQ.__init__

    def init(self: FSQ, levels: tuple[int, ...]) -> None:
        original(self, levels)
        self.offset.zero_()
        self.shift.zero_()

    monkeypatch.setattr(FSQ, "__init__", init)
    case = Case.load("flextok/quantizer")
    assert worst(case, runs.quantizer(case, case.run("published"))) > 1
    assert worst(case, runs.quantizer(case, case.run("odd"))) <= 1
    assert encode_error() > 1


def test_even_levels_without_the_shift():
    case = Case.load("flextok/quantizer")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "atanh", torch.zeros_like)
        assert worst(case, runs.quantizer(case, case.run("published"))) > 1


def test_first_dimension_most_significant():
    def reverse(model: FlexTok) -> None:
        model.quantizer.basis.copy_(model.quantizer.vocab_size // model.quantizer.levels.cumprod(0))

    assert encode_error(reverse) > 1


# ---------------------------------------------------------------- trunk


def test_no_qk_norm():
    def drop(model: FlexTok) -> None:
        for module in model.modules():
            if isinstance(module, attention.Attention):
                module.qk_norm = False

    assert encode_error(drop) > 1
    assert velocity_error("all_kept", drop) > 1


@pytest.mark.parametrize("out", ["t2", "null"])  # mask and null vectors are small
def test_layer_norm_epsilon(monkeypatch, out):
    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    for module in (flextok_module, flextok_blocks):
        monkeypatch.setattr(module, "layer_norm", norm)
    assert velocity_error(out) > 1


@pytest.mark.parametrize("causal", [True, False], ids=["causal patches", "patches that see registers"])
def test_wrong_masks_of_the_encoder(monkeypatch, causal):
    def looks(patches: int, registers: int, device: torch.device) -> list[attention.Look]:
        mask = torch.ones(patches + registers, patches + registers, dtype=torch.bool)
        mask[patches:] = mask.tril()[patches:]  # registers as they should be
        mask = mask.tril() if causal else mask
        queries = slice(patches), slice(patches, None)
        return [attention.Look(part, slice(None), mask[part]) for part in queries]

    monkeypatch.setattr(flextok_fast, "encoder_looks", looks)
    assert encode_error() > 1


def test_gate_and_up_exchanged(monkeypatch):
    def swapped(self: feed_forward.SwiGLU, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)

    monkeypatch.setattr(feed_forward.SwiGLU, "forward", swapped)
    assert encode_error() > 1


def test_columns_first_positions():
    def transpose(model: FlexTok) -> None:
        model.encoder.positions = model.encoder.positions.transpose(0, 1)

    assert encode_error(transpose) > 1


# ---------------------------------------------------------------- modulation and readout


def test_chunks_in_the_order_of_dit(monkeypatch):
    monkeypatch.setattr(flextok_blocks, "ATTENTION_CHUNKS", (2, 0, 1))
    monkeypatch.setattr(flextok_blocks, "MLP_CHUNKS", (5, 3, 4))
    assert velocity_error("all_kept") > 1


@pytest.mark.parametrize("name", ["modulate", "add_gated"])
def test_one_modulation_set_for_all(monkeypatch, name):
    original = getattr(flextok_blocks, name)

    def shared(*args):
        return original(
            *([arg[0], arg[0]] if isinstance(arg, list) and isinstance(arg[0], torch.Tensor) else arg for arg in args)
        )

    monkeypatch.setattr(flextok_blocks, name, shared)
    assert velocity_error("all_kept") > 1


def test_readout_scale_before_shift():
    def swap(model: FlexTok) -> None:
        for parameter in model.decoder.readout_modulation.parameters():
            parameter.data.copy_(torch.cat(parameter.data.chunk(2)[::-1]))

    assert velocity_error("all_kept", swap) > 1


# ---------------------------------------------------------------- condition


def condition(
    decoder: Decoder, codes: torch.Tensor, keep: torch.Tensor, null: torch.Tensor | None, *, mistake: str
) -> torch.Tensor:
    """`Decoder.condition` again, with one mistake in it."""
    kept = (torch.arange(codes.shape[1]) < keep[:, None])[..., None]
    registers, positions = decoder.code_proj(codes), decoder.register_positions
    if mistake == "masked before positions":
        registers = torch.where(kept, registers, decoder.mask_vector) + positions
    else:
        registers = torch.where(kept, registers + positions, decoder.mask_vector)
    if null is None or mistake == "null ignored":
        return registers
    nothing = {
        "null is zero": torch.zeros_like(decoder.null_vector),
        "null is k = 0": decoder.mask_vector,
        "null has positions": decoder.null_vector + positions,
    }
    return torch.where(null[:, None, None], nothing.get(mistake, decoder.null_vector), registers)


@pytest.mark.parametrize(
    ("out", "mistake"),
    [
        ("half_null", "none"),
        ("t2", "masked before positions"),
        ("half_null", "null is zero"),
        ("half_null", "null is k = 0"),
        ("half_null", "null has positions"),
        ("half_null", "null ignored"),
    ],
)
def test_condition(monkeypatch, out, mistake):
    monkeypatch.setattr(Decoder, "condition", lambda self, *args: condition(self, *args, mistake=mistake))
    assert (velocity_error(out) > 1) == (mistake != "none")


@pytest.mark.parametrize(
    ("count", "mistake"),
    [
        ("masked", lambda counts: None),
        ("masked", lambda counts: counts + 0.1),
        ("null", lambda counts: None),
        ("null", lambda counts: counts - 0.1),
    ],
)
def test_a_register_that_stands_for_several_counted_wrongly(monkeypatch, count, mistake):
    name = {"masked": "collapsed_condition", "null": "null_condition"}[count]
    original = getattr(flextok_fast, name)

    def wrong(*args):
        condition = original(*args)
        return dataclasses.replace(condition, log_counts=mistake(condition.log_counts))

    monkeypatch.setattr(flextok_fast, name, wrong)
    assert decode_error("apg") > 1


# ---------------------------------------------------------------- flow


def test_velocity_sign(monkeypatch):
    velocities = flextok_fast.velocities
    monkeypatch.setattr(flextok_fast, "velocities", lambda *args: [-velocity for velocity in velocities(*args)])
    assert decode_error("plain") > 1


def test_target_sign(monkeypatch):
    monkeypatch.setattr(flow, "velocity_target", lambda x0, noise: x0 - noise)
    assert worst(TRAIN, runs.train_step(flextok(TRAIN), TRAIN)) > 1


def test_times_of_the_wrong_end(monkeypatch):
    """Euler that calls the model at the end of each step instead of its beginning."""

    def late(velocity, noise, steps, on_step=None):
        x = noise
        for step in range(steps):
            later = min(step + 1, steps - 1)
            x = x - velocity(x, later, 1 - later / steps) / steps
            on_step(step + 1, x, x)
        return x

    monkeypatch.setattr(flow, "euler", late)
    assert decode_error("plain") > 1


def test_time_scale():
    assert velocity_error("t2", lambda model: setattr(model.decoder, "time_scale", 1000.0)) > 1


@pytest.mark.parametrize(
    "mistake", ["capped is carried over", "no momentum", "momentum is positive", "parallel is kept"]
)
def test_projected_guidance(monkeypatch, mistake):
    class Wrong(flow.AdaptiveProjectedGuidance):
        def __init__(self) -> None:
            super().__init__()
            if mistake in ("no momentum", "momentum is positive"):
                self.momentum = 0.0 if mistake == "no momentum" else 0.5
            self.parallel = 1.0 if mistake == "parallel is kept" else 0.0

        def __call__(self, v_cond, v_null, scale):
            guided = super().__call__(v_cond, v_null, scale)
            if mistake == "capped is carried over":
                norm = torch.linalg.vector_norm(self.running, dim=(1, 2, 3), keepdim=True)
                self.running = self.running * (self.cap / norm).clamp(max=1)
            return guided

    monkeypatch.setattr(flow, "AdaptiveProjectedGuidance", Wrong)
    assert decode_error("apg") > 1


def test_straight_through_gradient_is_needed(monkeypatch):
    original = FSQ.forward

    def rounded_only(self, z):
        return original(self, z).detach() + 0 * z

    monkeypatch.setattr(FSQ, "forward", rounded_only)
    errors = TRAIN.errors(runs.train_step(flextok(TRAIN), TRAIN))
    assert errors["step.loss"] <= 1
    assert errors["step.grad_norms"] > 1
