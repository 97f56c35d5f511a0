"""KARL as its users call it: tokens, counts, gathering against masking, verification; what training draws and when."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imgtok import hub, randomness
from imgtok.cli import main
from imgtok.config import load
from imgtok.losses.reconstruction import ReconstructionLossConfig
from imgtok.tokenizers.base import Losses, Rate
from imgtok.tokenizers.karl import KARL, Draws, KARLConfig, KARLTokens, KARLTraining, Runs, TransformerConfig
from imgtok.tokenizers.karl_start import all_over
from imgtok.tokenizers.karl_training import Curriculum, TrainableKARL, shared
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAEConfig
from imgtok.train.ema import EMA
from imgtok.train.initialise import Init, start_from
from imgtok.train.tokenizer import Config, build_model

ROOT = Path(__file__).parents[3]
VQGAN = MaskGITVQGANConfig(latent_channels=4, vocab_size=16, block_channels=(8, 16), layers_per_block=1, norm_groups=4)
VAE = VAEConfig(latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=0.5)
TRANSFORMER = TransformerConfig(width=32, depth=2, num_heads=2)
SIZES = {
    "image_size": 16, "encoder": TRANSFORMER, "decoder": TransformerConfig(width=16, depth=1, num_heads=2),
    "vocab_size": 64, "token_width": 4, "max_tokens": 24, "budget": 16, "position_grid": 16, "halting_width": 16,
}  # fmt: skip
CONFIGS = {
    "vqgan": KARLConfig(**SIZES, base=VQGAN),
    "vae": KARLConfig(**SIZES, base=VAE, quantized=False),
}


def built(config: KARLConfig) -> KARL:
    """With a halting head that says different things of different slots and images."""
    torch.manual_seed(0)
    model = KARL(config).eval()
    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.encoder.patch_proj.weight.mul_(30)
        model.encoder.halting_out.weight.mul_(30)
    return model


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def model(request) -> KARL:
    return built(request.param)


@pytest.fixture(scope="module")
def vqgan() -> KARL:
    return built(CONFIGS["vqgan"])


def images(count: int = 6, side: int = 16) -> torch.Tensor:
    """Images of one colour each, more or less."""
    generator = torch.Generator().manual_seed(1)
    colours, noise = (torch.rand(count, 3, *shape, generator=generator) * 2 - 1 for shape in ((1, 1), (side, side)))
    return 0.7 * colours + 0.3 * noise


def code_of(tokens: Tokens, row: int, slot: int) -> torch.Tensor:
    column = int((tokens.slots[row, : tokens.lengths[row]] == slot).nonzero())
    return (tokens.ids if tokens.vectors is None else tokens.vectors)[row, column]


# ---------------------------------------------------------------- tokens


def test_kept_slots_are_the_tokens(model):
    threshold = float(model.encode(images(), 24, 0.05).probabilities.median())
    tokens = model.encode(images(), 24, 0.05, threshold=threshold)
    assert isinstance(tokens, KARLTokens)
    assert torch.equal(tokens.lengths, tokens.kept.sum(dim=1))
    assert len(tokens.lengths.unique()) > 1, "the test wants images of different counts"
    assert torch.equal(tokens.kept, tokens.probabilities <= threshold)
    plain = model.encode_plainly(images(), 24, 0.05, noise_of(model))
    for row in range(6):
        slots = tokens.slots[row, : tokens.lengths[row]]
        assert torch.equal(slots, tokens.kept[row].nonzero().squeeze(1))
        for slot in slots.tolist():
            whole = (plain.ids if plain.vectors is None else plain.vectors)[row, slot]
            torch.testing.assert_close(code_of(tokens, row, slot), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.soft_counts, (1 - tokens.probabilities).sum(1))


def noise_of(model: KARL) -> torch.Tensor | None:
    """That of seed 0, which every image gets."""
    return randomness.normal(0, [0], (4, 8, 8), "posterior") if model.quantizer is None else None


def test_gathering_is_masking(model):
    """For random sets of kept slots, in a batch and one by one."""
    generator = torch.Generator().manual_seed(2)
    plain = model.encode_plainly(images(), 24, 0.05, noise_of(model))
    kept = torch.rand(6, 24, generator=generator) < torch.rand(6, 1, generator=generator)
    kept[:, 5] = True
    plain = KARLTokens(plain.ids, plain.lengths, None, plain.vectors, kept=kept)
    masked, out = model.decode_plainly(plain), model.decoder.plainly(model._codes(plain), kept)
    order = kept.byte().argsort(dim=1, descending=True, stable=True)
    ids = plain.ids.gather(1, order)
    vectors = None if plain.vectors is None else plain.vectors.gather(1, order[..., None].expand_as(plain.vectors))
    tokens = Tokens(ids, kept.sum(dim=1), order, vectors)
    assert len(tokens.lengths.unique()) > 3
    torch.testing.assert_close(model.decoder(model._codes(tokens), order, tokens.mask), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(tokens), masked, atol=2e-5, rtol=0)  # which is 1e-5 of pixels in [0, 1]
    for row in range(6):
        torch.testing.assert_close(model.decode(tokens[row]), masked[row : row + 1], atol=2e-5, rtol=0)


def test_one_by_one_is_the_batch(model):
    given = images()
    together = model.encode(given, threshold=0.5)
    for row in range(6):
        alone = model.encode(given[row : row + 1], threshold=0.5)
        assert torch.equal(alone.ids, together.ids[row : row + 1])
        assert torch.equal(alone.slots, together.slots[row : row + 1])
    assert torch.equal(model.count(given, threshold=0.5), together.lengths)


def test_an_error_for_each_image(model):
    given, asked = images(3), [0.0, 0.05, 0.3]
    together = model.encode(given, eps=asked)
    assert together.bins.tolist() == [0, 5, 17]
    for row, eps in enumerate(asked):
        alone = model.encode(given[row : row + 1], eps=eps)
        torch.testing.assert_close(alone.probabilities, together.probabilities[row : row + 1], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.count(given, torch.tensor(asked)), together.lengths)


def test_a_fixed_number(model):
    tokens = model.encode(images(), 7, fixed=True)
    assert tokens.lengths.tolist() == [7] * 6
    assert torch.equal(tokens.slots, torch.arange(7).expand(6, 7))
    assert tokens.bins.tolist() == [0] * 6
    for rate in (Rate(7), "7"):
        assert torch.equal(model.encode(images(), rate=rate).ids, tokens.ids)
    assert torch.equal(model.encode(images(), torch.tensor(7), fixed=True).ids, tokens.ids)


def test_rates(model):
    rates = model.rates()
    assert [str(rate) for rate in rates] == ["2", "4", "8", "16", "16@0.09", "16@0.05", "16@0.03"]
    for rate, found in zip(rates, model.encode_at(images(), rates), strict=True):
        alone = model.encode(images(), rate=rate)
        assert torch.equal(found.ids, alone.ids)
        assert torch.equal(found.lengths, alone.lengths)
    assert torch.equal(model.encode(images(), rate=Rate(16, 0.05)).ids, model.encode(images()).ids)


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [(0.09, [0.16, 0.09, 0.05]), (0.0, [0.005]), (0.38, [0.38, 0.24])],
    ids=["between", "smallest", "largest"],
)
def test_rates_have_errors_that_can_be_asked_for(tolerance, expected):
    model = KARL(KARLConfig(**SIZES, base=VQGAN, tolerance=tolerance))
    rates = [rate for rate in model.rates() if rate.tolerance is not None]
    assert rates == [Rate(16, error) for error in expected]
    assert [model.asked(rate) for rate in rates] == rates


def test_an_error_between_two_that_can_be_asked_for_is_the_larger(vqgan):
    asked = {error: vqgan.asked(Rate(8, error)) for error in (0.0, 0.05, 0.11, 0.5)}
    assert asked == {0.0: Rate(8, 0.005), 0.05: Rate(8, 0.05), 0.11: Rate(8, 0.12), 0.5: Rate(8, 0.38)}
    assert vqgan.asked(Rate(8)) == Rate(8)
    found = [vqgan.encode(images(), rate=rate) for rate in (Rate(8, 0.11), vqgan.asked(Rate(8, 0.11)))]
    assert torch.equal(found[0].bins, found[1].bins)


def test_an_image_without_a_needed_slot_keeps_one(vqgan):
    model = copy.deepcopy(vqgan)
    with torch.no_grad():
        model.encoder.halting_out.bias.fill_(1e3)
    model.encoder.halting_out.weight.data.mul_(10)
    tokens = model.encode(images())
    assert tokens.lengths.tolist() == [1] * 6
    assert torch.equal(tokens.slots[:, 0], tokens.probabilities.argmin(dim=1))
    assert torch.equal(model.count(images()), tokens.lengths)


def test_files_hold_slots_and_vectors(model, tmp_path):
    tokens = model.encode(images(), threshold=0.5)
    tokens.save(tmp_path / "tokens.safetensors")
    loaded = Tokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(model.decode(loaded), model.decode(tokens))
    assert loaded.ids.shape[1] == tokens.lengths.max()


def test_on_another_device_they_are_the_same(model):
    tokens = model.encode(images(), threshold=0.5, verify=True).to("meta")
    assert isinstance(tokens, KARLTokens)
    for name in ("ids", "lengths", "slots", "probabilities", "kept", "bins", "errors"):
        assert getattr(tokens, name).device.type == "meta", name
    assert model.encode(images()).to("cpu").errors is None


def test_decoding_reads_from_the_device_once(model, monkeypatch):
    """What is behind the lengths counts for nothing; neither is a code of the autoencoder looked for in encoding."""
    read: list[str] = []
    for name in ("tolist", "item", "__int__", "__bool__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, name=name, method=method: read.append(name) or method(x))
    looked: list[int] = []
    if model.quantizer is not None:
        nearest = type(model.base.quantizer).nearest
        monkeypatch.setattr(type(model.quantizer), "nearest", lambda q, z: looked.append(q.vocab_size) or nearest(q, z))
    tokens = model.encode(images(), threshold=0.5)
    assert set(looked) <= {64}, "of KARL's own table"
    longer = torch.full((6, 3), 99)
    vectors = None if tokens.vectors is None else torch.cat([tokens.vectors, tokens.vectors[:, :3]], dim=1)
    behind = Tokens(torch.cat([tokens.ids, longer], 1), tokens.lengths, torch.cat([tokens.slots, longer], 1), vectors)
    wanted = model.decode(tokens)
    read.clear()
    assert (model.decode(behind) - wanted).abs().max().item() < 1e-5
    assert read == ["tolist", "item"], "and the last of them is the test's own"


def test_bits(model):
    tokens = model.encode(images(2), 8, fixed=True)
    number_and_slots = torch.tensor([24.0, 735471.0]).log2().sum()  # of 24 numbers, and of (24 over 8) choices
    each = 6 if model.quantizer is not None else 32 * 4
    assert model.bits(tokens).tolist() == pytest.approx([8 * each + number_and_slots.item()] * 2, abs=1e-3)


def test_vectors_are_joined():
    tokens = built(CONFIGS["vae"]).encode(images(2))
    joined = Tokens.cat([tokens[:1], tokens[1:]])
    torch.testing.assert_close(joined.vectors, tokens.vectors)
    with pytest.raises(ValueError, match="1 of 2 batches of tokens have vectors"):
        Tokens.cat([tokens, Tokens(tokens.ids, tokens.lengths, tokens.slots)])


# ---------------------------------------------------------------- verification


def test_verified_tokens_meet_the_error_or_are_the_best_of_three(vqgan, monkeypatch):
    """Errors are invented: of the image that had tolerance b, (number + b) / 100."""
    passes: list[list[int]] = []
    encode = KARL._encode

    def watched(self, cells, bins, *rest):
        passes.append(bins.tolist())
        return encode(self, cells, bins, *rest)

    def errors(self, given, tokens):
        return (given[:, 0, 0, 0] * 10 + tokens.bins) / 100

    monkeypatch.setattr(KARL, "_encode", watched)
    monkeypatch.setattr(KARL, "_errors", errors)
    given = images(4)
    given[:, 0, 0, 0] = torch.tensor([-0.5, 0.05, 0.1, 1.0])
    tokens = vqgan.encode(given, eps=0.05, verify=True)
    assert passes == [[5, 5, 5, 5], [4, 4, 4], [3, 3]] or passes == [[5, 5, 5, 5], [4, 4, 4], [3]]
    assert tokens.bins.tolist()[0] == 5
    assert tokens.bins.tolist()[3] == 3, "three passes at the most, and the best of them"
    assert bool((tokens.errors[:3] <= 0.05).all())
    alone = vqgan.encode(given[3:], eps=0.03)  # tolerance 3
    assert torch.equal(alone.ids[0], tokens.ids[3])


def test_verified_errors_are_those_of_the_decoded_images(model):
    tokens = model.encode(images(3), eps=0.3, verify=True)
    measured = (model.decode(tokens) - images(3)).abs().mean(dim=(1, 2, 3)) / 2
    torch.testing.assert_close(tokens.errors, measured, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "eps: an error that is allowed is a number from 0 on, given -0.1": {"eps": -0.1},
    "eps: an error that is allowed is a number from 0 on, given nan": {"eps": float("nan")},
    r"eps: a number, or one for each of the 6 images; given \(2,\)": {"eps": [0.1, 0.2]},
    "budget: this tokenizer has 1 to 24 tokens an image, given 0": {"budget": 0},
    "budget: this tokenizer has 1 to 24 tokens an image, given 25": {"budget": 25},
    "rates: this tokenizer has 1 to 24 tokens an image, given 25@0.1": {"rate": Rate(25, 0.1)},
    "rate: says how many tokens and which error": {"rate": Rate(4), "eps": 0.1},
    "threshold: a probability between 0 and 1, given 2": {"threshold": 2},
    "threshold: a probability between 0 and 1, given '0.5'": {"threshold": "0.5"},
    "eps: a number, or one for each of the 6 images; given '0.05', which is neither": {"eps": "0.05"},
    r"eps: a number, or one for each of the 6 images; given \['a', 'b'\], which": {"eps": ["a", "b"]},
    r"eps: an error of pixels in \[0, 1\] is at most 1, given 12; .*eps=12/255": {"eps": 12},
    r"rates: an error of pixels in \[0, 1\] is at most 1, given 8@12": {"rate": "8@12"},
    "budget: a whole number of tokens such as 16, given 4.5": {"budget": 4.5},
    "budget: a whole number of tokens such as 16, given True": {"budget": True},
    "budget: a whole number of tokens such as 16, given '4'": {"budget": "4"},
    "budget: a whole number.*; a rate is given as rate='8@0.05'": {"budget": Rate(8, 0.05)},
    "rates: 'many' is not a number of tokens such as 16": {"rate": "many"},
    "eps: a fixed number of tokens does not depend on it": {"fixed": True, "eps": 0.3},
    "threshold: a fixed number of tokens does not depend on it": {"rate": Rate(4), "threshold": 0.1},
    "verify: a fixed number of tokens is not chosen": {"fixed": True, "verify": True},
}


@pytest.mark.parametrize(("message", "asked"), REFUSED.items(), ids=[str(value) for value in REFUSED.values()])
def test_what_cannot_be_asked_for(vqgan, message, asked):
    with pytest.raises(ValueError, match=message):
        vqgan.encode(images(), **asked)


def test_images_and_tokens_of_others(model):
    with pytest.raises(ValueError, match=r"takes images of 16 x 16 pixels, given 32 x 32; imgtok.preprocess"):
        model.encode(images(2, side=32))
    bright = (images() + 1) / 2
    bright[..., :2] = 0
    with pytest.raises(ValueError, match=r"as in \[0, 1\]: give images \* 2 - 1"):
        model.encode(bright)
    tokens = model.encode(images(2), 4, fixed=True)
    with pytest.raises(ValueError, match="slots: this tokenizer has the slots 0 to 23, given 0 to 24"):
        model.decode(Tokens(tokens.ids, tokens.lengths, torch.tensor([[0, 1, 2, 24]] * 2), tokens.vectors))
    with pytest.raises(ValueError, match="slots: those of an image's tokens increase along its row"):
        model.decode(replace(tokens, slots=torch.tensor([[0, 1, 2, 3], [0, 3, 3, 4]])))
    with pytest.raises(ValueError, match=r"decode takes Tokens, not a Tensor; Tokens.full\(ids\) makes them"):
        model.decode(tokens.ids)
    with pytest.raises(ValueError, match="decoding: this tokenizer's decoder has no settings"):
        model.decode(tokens, decoding={"steps": 3})
    if model.quantizer is not None:  # ids beside vectors say nothing
        with pytest.raises(ValueError, match=r"token ids must lie in \[0, 64\); got 0 to 64"):
            model.decode(replace(tokens, ids=torch.tensor([[0, 1, 2, 3], [0, 0, 0, 64]])))
    other = Tokens(
        tokens.ids, tokens.lengths, tokens.slots, None if tokens.vectors is not None else torch.zeros(2, 4, 4)
    )
    with pytest.raises(ValueError, match=r"this tokenizer decodes (ids|vectors), and these are (vectors|ids)"):
        model.decode(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": None}, "base: a KARL stands on an autoencoder; name one, such as vae=FOLDER in training"),
        ({"budget": 25}, "budget: 25 is more than max_tokens = 24"),
        (
            {"encoder": TransformerConfig(width=4, num_heads=2)},
            "encoder.width: 4 leaves no channel for pixels beside t",
        ),
        (
            {"image_size": 17},
            "image_size: 17 must be a multiple of 2, the pixels a side of a latent cell, and at most 32",
        ),
        ({"image_size": 34}, "image_size: 34 must be .* which position_grid = 16 covers"),
        ({"tolerances": (0.1, 0.1)}, "tolerances: must be ascending numbers"),
        ({"training": KARLTraining(slot_counts=(30,))}, "training.slot_counts: 30 is more than max_tokens = 24"),
        ({"training": KARLTraining(curriculum_from=0.001)}, "training.curriculum_from: 0.001 is below tolerances"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        KARL(KARLConfig(**{**SIZES, "base": VQGAN, **changes}))


# ---------------------------------------------------------------- training


def test_a_fresh_model_does_not_see_what_it_is_asked_for():
    """The published start, a constant vector for each error, which the norm takes away; another one can be had."""
    for start, seen in (("published", False), ("normal_conditions", True), ("aligned", True)):
        torch.manual_seed(0)
        model = KARL(KARLConfig(**SIZES, base=VQGAN, initialisation=start)).double()
        cells = torch.randn(2, 64, 32, dtype=torch.float64)
        some, others = (model.encoder(cells, torch.tensor([tolerance] * 2), 16) for tolerance in (0, 17))
        assert ((some - others).abs().max() > 1e-10) == seen


def test_draws(vqgan):
    generator = torch.Generator().manual_seed(0)
    drawn = [vqgan.draw(images(64), generator) for _ in range(40)]
    assert {draw.num_slots for draw in drawn} <= set(range(1, 17))
    assert len({draw.num_slots for draw in drawn}) > 10
    assert set(torch.cat([draw.bins for draw in drawn]).tolist()) == {0, 1, 2, 3, 4}
    curriculum = torch.zeros(19)
    curriculum[[2, 18]] = 0.5
    bins = vqgan.draw(images(64), generator, curriculum).bins
    assert set(bins.tolist()) == {2, 18}


@pytest.mark.parametrize(
    ("num_slots", "expected"), [(16, [1, 1, 3, 10]), (1, [9, 9, 11, 18]), (8, [0, 1, 4, 18])], ids=["all", "1", "8"]
)
def test_the_second_run_is_sometimes_asked_for_another_error(num_slots, expected):
    """Stricter ones (never the strictest) where no slot is to be halted, looser ones at the fewest slots."""
    model = KARL(KARLConfig(**SIZES, base=VQGAN, training=KARLTraining(augment=0.45)))
    bins, half = torch.tensor([0, 1, 4, 18]), torch.full((4,), 0.5)
    found = model.augment(bins, Draws(None, num_slots, bins, torch.tensor(True), half))
    assert found.tolist() == expected
    assert torch.equal(model.augment(bins, Draws(None, num_slots, bins, torch.tensor(False), half)), bins)


def test_the_fewest_slots_need_not_be_named_first():
    training = KARLTraining(augment=1.0, slot_counts=(8, 2, 4))
    model = KARL(KARLConfig(**SIZES, base=VQGAN, training=training))
    bins, half = torch.tensor([0, 1, 4, 18]), torch.full((4,), 0.5)
    found = {n: model.augment(bins, Draws(None, n, bins, torch.tensor(True), half)).tolist() for n in (8, 2, 4)}
    assert found == {8: [0, 1, 4, 18], 2: [9, 9, 11, 18], 4: [0, 1, 4, 18]}


def test_one_tolerance_is_never_changed_to_another():
    training = KARLTraining(augment=1.0)
    model = KARL(KARLConfig(**SIZES, base=VQGAN, tolerances=(0.04,), training=training))
    bins = torch.zeros(2, dtype=torch.long)
    for count in (16, 1):
        draws = Draws(None, count, bins, torch.tensor(True), torch.tensor([0.0, 0.9]))
        assert model.augment(bins, draws).tolist() == [0, 0]


def test_curriculum():
    curriculum = Curriculum(KARL(CONFIGS["vqgan"]))
    start = curriculum.probabilities.clone()
    assert start.tolist() == pytest.approx([0.2] * 5 + [0] * 14)
    tolerances = torch.tensor(CONFIGS["vqgan"].tolerances)
    for _ in range(300):
        curriculum.update(tolerances, torch.tensor([0.5, 0.015]))
    assert curriculum.probabilities.sum().item() == pytest.approx(1)
    assert curriculum.probabilities[:2].tolist() == pytest.approx([0.5 / (1 + 1.5 * 0.99**300)] * 2, rel=1e-4)


def test_processes_share_the_curriculum(monkeypatch):
    """An image of another process keeps within all tolerances but the first, so they get rarer here too."""

    def all_reduce(tensor: torch.Tensor, operation: torch.distributed.ReduceOp) -> None:
        assert operation == torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=0.006)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    curriculum = Curriculum(KARL(CONFIGS["vqgan"]))
    curriculum.update(torch.tensor(CONFIGS["vqgan"].tolerances), torch.tensor([0.5, 0.7]))
    total = 1 + 4 * 0.99
    assert curriculum.probabilities[:5].tolist() == pytest.approx([1 / total] + [0.99 / total] * 4)


def test_processes_have_one_number_of_slots_in_a_step(vqgan, monkeypatch):
    """Those of the first process, whatever this one drew; what is drawn for each image stays."""
    drawn = vqgan.draw(images(2), torch.Generator())._replace(num_slots=3, augmented=torch.tensor(False))
    assert shared(drawn) is drawn, "alone, a process keeps what it drew"

    def broadcast(tensor: torch.Tensor, source: int) -> None:
        assert (source, tensor.tolist()) == (0, [3, 0])
        tensor.copy_(torch.tensor([11, 1]))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    found = shared(drawn)
    assert (found.num_slots, found.augmented.tolist(), found.augmented.dtype) == (11, True, torch.bool)
    assert found.bins is drawn.bins
    assert found.changes is drawn.changes
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *words: None)
    counts: list[int] = []
    monkeypatch.setattr(KARL, "draw", lambda *words: drawn)

    def forward_drawn(self: KARL, given: torch.Tensor, draws: Draws) -> Runs:
        counts.append(draws.num_slots)
        return stub_runs(given)

    monkeypatch.setattr(KARL, "forward_drawn", forward_drawn)
    TrainableKARL(vqgan, None, 1)(images(2), generator=torch.Generator())
    assert counts == [11]


def stub_runs(given: torch.Tensor, error: float = 0.5) -> Runs:
    """Runs that leave this error of each image."""
    return Runs(Losses(given.mean(), {}), (), torch.full((len(given),), error), given)


def test_the_curriculum_changes_once_an_optimizer_step(vqgan, monkeypatch):
    """By the smallest error of all micro-batches, so that a step of several is one of a larger batch."""
    errors = iter([0.015, 0.5, 0.025, 0.5, 0.5, 0.035])
    monkeypatch.setattr(KARL, "forward_drawn", lambda self, given, draws: stub_runs(given, next(errors)))
    taught = TrainableKARL(vqgan, None, 3)
    start = taught.curriculum.probabilities.clone()
    for call in range(6):
        taught(images(2), generator=torch.Generator())
        if call in (1, 4):
            unchanged = taught.curriculum.probabilities
            assert torch.equal(unchanged, start)
        if call == 2:
            start = taught.curriculum.probabilities.clone()
            assert start[:5].tolist() == pytest.approx([1 / 4.97] * 2 + [0.99 / 4.97] * 3)
    alone = Curriculum(vqgan)
    for smallest in (0.015, 0.035):
        alone.update(vqgan.tolerances, torch.tensor([smallest]))
    assert torch.equal(taught.curriculum.probabilities, alone.probabilities)


def test_the_average_of_the_weights_never_begins_again():
    """The published code copies the live weights over the average at each epoch, here every 250 steps."""

    def averaged(restarted: bool) -> float:
        weight = torch.nn.Linear(1, 1, bias=False).double()
        torch.nn.init.zeros_(weight.weight)
        ema = EMA(weight, 0.999, warmup=False)
        for step in range(500):
            torch.nn.init.constant_(weight.weight, float(step >= 250))
            if restarted and step % 250 == 0:
                ema.restart()
            ema.update(step)
        return float(ema.average["weight"])

    assert averaged(False) == pytest.approx(1 - 0.999**250)
    assert averaged(True) == 1.0


LOSS = ReconstructionLossConfig(
    adversarial=0.1, adversarial_start=2, adaptive="last_layer", discriminator_channels=4, discriminator_layers=1,
    discriminator_every=3,
)  # fmt: skip


def test_players_take_turns():
    torch.manual_seed(0)
    training = KARLTraining(stage="finetune", discriminators=2, late_start=4, late_weight=0.5, slot_counts=(4, 16))
    model = KARL(KARLConfig(**SIZES, base=VQGAN, training=training))
    taught = model.for_training(LOSS, accumulate=2)
    assert isinstance(taught, TrainableKARL)
    reached, parts = [], []
    for call in range(12):
        losses = taught(images(2), generator=torch.Generator().manual_seed(call))
        losses.total.backward()
        players = {name.split(".")[0] for name, p in taught.named_parameters() if p.grad is not None}
        reached.append(players)
        parts.append({name for name in losses.parts if "adversarial" in name or "discriminator" in name})
        taught.zero_grad()
    played = {"first_adversarial", "second_adversarial"}
    judged = {"first_discriminator", "second_discriminator"}
    assert parts == [set()] * 4 + [judged] * 2 + [played] * 4 + [judged] * 2, "each is logged where it was played"
    assert reached == [{"model"}] * 4 + [{"discriminators"}] * 2 + [{"model"}] * 4 + [{"discriminators"}] * 2
    assert [taught.adversarial_weight(step) for step in (3, 4)] == [0.1, 0.5]
    model_group, judges = taught.groups()
    assert [model_group.due(step) for step in range(6)] == [True, True, False, True, True, False]
    assert [judges.due(step) for step in range(6)] == [False, False, True, False, False, True]
    assert taught.discriminator(3) is taught.discriminators[0]
    assert taught.discriminator(4) is taught.discriminators[1]
    assert int(taught.seen) == 12
    taught.resumed(20)  # with fewer micro-batches a step, say
    assert (int(taught.seen), taught._calls) == (20, 20)
    again = copy.deepcopy(taught)
    again._calls = None  # as after a checkpoint was loaded
    assert not again.is_discriminator_turn(6)
    again(images(2), generator=torch.Generator())
    assert again._calls == 21
    assert "curriculum.probabilities" in taught.state_dict()


def test_no_loss_of_slots_that_all_are_needed():
    """A zero in its place would make the mean in the log smaller than it is."""
    torch.manual_seed(0)
    model = KARL(KARLConfig(**SIZES, base=VQGAN))
    budget = model.config.budget
    draws = model.draw(images(2), torch.Generator())
    for count in (budget // 2, budget):
        parts = model.forward_drawn(images(2), draws._replace(num_slots=count)).losses.parts
        assert ("second_drop" in parts) == (count < budget)


@pytest.mark.slow
def test_two_processes_use_some_of_the_discriminators_each(tmp_path, monkeypatch):
    """With a discriminator for every eighth of the budget and turns, each step leaves most parameters alone."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tokenizer", "tiny/karl-1"]) == 0
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 -m imgtok.train.tokenizer"
    settings = ["tiny/karl-2", "model.training.discriminators=8", "training.log_every=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command.split(), *settings], env=environment, check=False, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = Path("outputs/tiny/karl-2")
    state = load_file(out / "checkpoints/step_0000004/model.safetensors")
    assert state["seen"] == 4
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss/first_adversarial", "loss/first_discriminator"} <= last.keys()  # of the window's two steps one each


def test_tokens_are_rounded_after_a_while_to_rows_that_were_their_directions():
    torch.manual_seed(0)
    training = KARLTraining(rounded_from=2, spread_weight=0.5)
    model = KARL(KARLConfig(**SIZES, base=VQGAN, initialisation="aligned", training=training))
    taught = model.for_training(None, accumulate=1)
    assert isinstance(taught, TrainableKARL)
    assert taught.rests_parameters
    assert model.quantizer is not None
    table, seen = model.quantizer.table, []
    for call in range(3):
        before = table.detach().clone()
        losses = taught(images(2), generator=torch.Generator().manual_seed(call))
        losses.total.backward()
        changed = (table.detach() != before).any(dim=1).nonzero().flatten().tolist()
        seen.append(
            (changed, table.grad is not None, "second_quantizer" in losses.parts, "second_spread" in losses.parts)
        )
        taught.zero_grad()
    first, second = list(range(32)), list(range(32, 64))  # two images' 16 vectors, of a table of 64 rows
    assert seen == [(second, False, False, True), (first, False, False, True), ([], True, True, True)]
    ids = model.encode(images(2)).ids
    assert len(ids.unique()) > 4


def test_first_slots_face_cells_all_over_the_image():
    for count in (1, 4, 16, 64, 256):
        assert sorted(all_over(count).tolist()) == list(range(count))
    cells = all_over(256)[:16]
    quarters = (cells // 64) * 4 + cells % 16 // 4  # of the 16 squares of 4 x 4 cells
    assert len(quarters.unique()) >= 12


def test_what_is_for_quantized_tokens_alone():
    with pytest.raises(ValueError, match="training: spread_weight and rounded_from are for quantized tokens"):
        KARLConfig(**SIZES, base=VAE, quantized=False, training=KARLTraining(spread_weight=1.0))


def test_the_second_stage_keeps_the_table():
    """A configuration that starts from a first stage has its fields, among them one that would overwrite the table."""
    with pytest.raises(ValueError, match="training.rounded_from: 150 is for fresh weights.*rounded_from=0"):
        KARLConfig(**SIZES, base=VAE, training=KARLTraining(stage="finetune", rounded_from=150))


def test_the_table_of_the_vqgan_is_never_trained():
    for stage, trained in (("distill", False), ("finetune", True)):
        model = KARL(KARLConfig(**SIZES, base=VQGAN, training=KARLTraining(stage=stage)))
        assert model.base.last_layer.requires_grad == trained
        assert not model.base.quantizer.table.requires_grad


def test_a_loss_where_nothing_is_judged():
    with pytest.raises(ValueError, match="loss: in model.training.stage=distill a KARL is trained by what its autoenc"):
        KARL(CONFIGS["vqgan"]).for_training(LOSS, 1)


# ---------------------------------------------------------------- programs


def test_a_start_on_another_autoencoder_is_named_first(vqgan, tmp_path):
    vqgan.save_pretrained(tmp_path / "first")
    found = hub.resolve(tmp_path / "first")
    other = KARL(CONFIGS["vae"])
    with pytest.raises(
        ValueError, match="do not fit the model to train: its autoencoder is of kind 'maskgit_vqgan', and"
    ):
        start_from(other, Init(vqgan.config, found))
    smaller = KARL(KARLConfig(**SIZES, base=replace(VQGAN, block_channels=(4, 16))))
    with pytest.raises(ValueError, match="its autoencoder is of another shape; leave vae out to keep that of init"):
        start_from(smaller, Init(vqgan.config, found))
    shorter = KARL(KARLConfig(**{**SIZES, "max_tokens": 20}, base=VQGAN))
    with pytest.raises(ValueError, match="do not fit the model to train:\n"):
        start_from(shorter, Init(vqgan.config, found))


def test_a_scale_that_nothing_reads_is_refused(vqgan, model, tmp_path):
    model.base.save_pretrained(tmp_path / "base")
    words = [f"vae={tmp_path / 'base'}", "vae_scaling_factor=2", "data.kind=shapes", f"out={tmp_path / 'run'}"]
    words += ["training={steps: 1, batch_size: 2, learning_rate: 1e-3}"]
    config = replace(load(Config, None, [*words, "model.kind=karl"]), model=replace(model.config, base=None))
    if model.quantizer is None:
        assert build_model(config)[0].config.required_base.scaling_factor == 2
    else:
        with pytest.raises(ValueError, match="vae_scaling_factor: a KARL on .*base takes its codes as they are"):
            build_model(config)


def test_the_programs_take_it_without_knowing_it(vqgan, tmp_path):
    vqgan.save_pretrained(tmp_path / "karl")
    data = ["data.kind=shapes", "data.num_images=40"]
    words = [f"tokenizer={tmp_path / 'karl'}", f"out={tmp_path / 'tokens'}", "rate=16@0.05"]
    assert main(["cache", *words, *data]) == 0
    rates = "rates=[4,16@0.05]"
    assert main(["reconstruct", str(tmp_path / "karl"), f"out={tmp_path / 'shown'}", rates, "num=2", *data]) == 0
    assert main(["evaluate", words[0], "metrics=[mae]", f"out={tmp_path / 'scores.json'}", rates, *data]) == 0


def test_weights_in_bfloat16_see_dark_pixels(model):
    """In [-1, 1] bfloat16 does not tell apart a black pixel and one of a quarter of a grey level."""
    low, seen = copy.deepcopy(model).bfloat16(), []
    low.encoder.patch_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    if model.quantizer is not None:
        low.base.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    dark = torch.full((1, 3, 16, 16), -1.0)
    dark[..., 0] += 2 * 0.25 / 255
    low.encode(dark)
    for pixels in seen:
        assert pixels.dtype == torch.bfloat16
        assert pixels[0, 0, 0, :2].tolist() == pytest.approx([0.25 / 255, 0], rel=0.01)


def test_all_of_it_in_bfloat16(model):
    """Under autocast, and with its weights so: the same tolerances, nearly the same probabilities and images."""
    wanted, given = model.encode(images(), 16, fixed=True), images()
    low = copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = {"autocast": (model.encode(given, 16, fixed=True), model.decode(wanted))}
    vectors = None if wanted.vectors is None else wanted.vectors.bfloat16()
    found["weights"] = low.encode(given, 16, fixed=True), low.decode(replace(wanted, vectors=vectors))
    for name, (tokens, decoded) in found.items():
        assert torch.equal(tokens.bins, wanted.bins), name
        assert torch.equal(low.bin_of(model.tolerances), model.bin_of(model.tolerances))
        torch.testing.assert_close(tokens.probabilities, wanted.probabilities, atol=0.1, rtol=0)
        assert (decoded.float() - model.decode(wanted)).square().mean().sqrt() < 0.05
        if wanted.vectors is None:
            assert (tokens.ids == wanted.ids).float().mean() > 0.8
