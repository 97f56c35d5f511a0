from __future__ import annotations

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from imgtok import randomness
from imgtok.generators import dimension_head
from imgtok.generators.conditioning import ClassBuffer
from imgtok.generators.dimension_head import Choice, StackConfig
from imgtok.generators.known import Known
from imgtok.generators.tokenbridge import RevealSampling, TokenBridge, TokenBridgeConfig, hidden_share, plan_reveals
from imgtok.quantizers.normal import NormalConfig
from imgtok.tokenizers.vae import VAE, VAEConfig

STACK = StackConfig(width=16, depth=2, num_heads=2)
SMALL = TokenBridgeConfig(
    latent_channels=3,
    grid=4,
    condition=ClassBuffer(num_classes=5, num_slots=2),
    quantizer=NormalConfig(levels=8),
    channel_order=(2, 0, 1),
    encoder=STACK,
    decoder=StackConfig(width=24, depth=2, num_heads=3),
    head=STACK,
    dropout=0.0,
)
LABELS = torch.tensor([1, 4, -1])


def build(**changes) -> TokenBridge:
    torch.manual_seed(0)
    model = TokenBridge(replace(SMALL, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def latents(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(7))


def half(count: int = 3) -> Known:
    """Eight known positions, others in every row."""
    order = randomness.uniform(3, range(count), (16,)).argsort(dim=1)
    mask = torch.zeros(count, 16, dtype=torch.bool).scatter(1, order[:, :8], True)
    return Known(latents(count), mask.view(count, 4, 4))


WAYS = {
    "as published": RevealSampling(iterations=5),
    "raster, constant": RevealSampling(iterations=6, order="raster", schedule="constant", guidance=2.0),
    "confidence": RevealSampling(iterations=4, order="confidence", guidance=1.5),
    "no guidance": RevealSampling(iterations=3, guidance=1.0, temperature=0.7),
    "one by one, greedy": RevealSampling(iterations=16, temperature=0.0),
    "more than positions": RevealSampling(iterations=20, guidance=1.0),
    "at once": RevealSampling(iterations=1),
}


HALF_KNOWN = ("as published", "raster, constant", "confidence")


@pytest.mark.parametrize(
    ("how", "known"),
    [*((how, False) for how in WAYS.values()), *((WAYS[name], True) for name in HALF_KNOWN)],
    ids=[*WAYS, *(f"{name}, half known" for name in HALF_KNOWN)],
)
def test_the_fast_path_draws_what_the_plain_one_does(how, known):
    model, given = build(), half() if known else None
    plain = model.generate_plainly(LABELS, seed=3, indices=[5, 0, 9], sampling=how, known=given)
    fast = model.generate(LABELS, seed=3, indices=[5, 0, 9], sampling=how, known=given)
    assert torch.equal(fast, plain)  # of ids: no draw here lies near an edge
    assert plain.unique().numel() > 4


def test_while_nothing_is_there_the_unguided_stream_is_one_row():
    model, rows = build(), []
    how, known = WAYS["as published"], half()
    hook = model.encoder_norm.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    model.generate(LABELS, seed=3, indices=range(3), sampling=how)
    assert rows == [4, 6, 6, 6, 6]
    rows.clear()
    model.generate(LABELS, seed=3, indices=range(3), sampling=how, known=known)
    model.generate(LABELS, seed=3, indices=range(3), sampling=how, control=lambda step, reading: None)
    assert rows == [6] * 10  # a control may make rows differ
    hook.remove()


def test_modulations_one_step_at_a_time(monkeypatch):
    model = build()
    whole = model.generate(LABELS, seed=3, indices=range(3), sampling=WAYS["as published"])
    monkeypatch.setattr(dimension_head, "MOST_NUMBERS", 0)
    assert torch.equal(model.generate(LABELS, seed=3, indices=range(3), sampling=WAYS["as published"]), whole)


# ---------------------------------------------------------------- known positions


@pytest.mark.parametrize("order", ["random", "raster", "confidence"])
def test_what_is_known_comes_back_to_the_bit(order):
    known = half()
    how = RevealSampling(iterations=3, order=order, guidance=1.0)
    drawn = build().generate(LABELS, seed=0, indices=range(3), sampling=how, known=known)
    mask = known.mask[:, None].expand_as(drawn)
    assert torch.equal(drawn[mask], known.latents[mask])
    values = build().quantizer.values[0]
    assert torch.isin(drawn[~mask], values).all()


def test_what_is_not_known_does_not_count():
    known, model = half(), build()
    other = Known(torch.where(known.mask[:, None], known.latents, torch.nan), known.mask)
    drawn = [model.generate(LABELS, seed=0, indices=range(3), known=given) for given in (known, other)]
    assert torch.equal(*drawn)


def test_everything_known_and_nothing_known():
    model, sampling = build(), RevealSampling(iterations=4)
    every = Known(latents(), torch.ones(4, 4, dtype=torch.bool))
    assert torch.equal(model.generate(LABELS, seed=0, indices=range(3), sampling=sampling, known=every), latents())
    none = Known(latents(), torch.zeros(4, 4, dtype=torch.bool))
    drawn = [model.generate(LABELS, seed=0, indices=range(3), sampling=sampling, known=k) for k in (none, None)]
    assert torch.equal(*drawn)


def test_what_is_known_is_seen():
    model, known = build(), half()
    other = Known(known.latents + 1, known.mask)
    how = RevealSampling(iterations=4, guidance=1.0)
    one, two = (model.generate(LABELS, seed=0, indices=range(3), sampling=how, known=k) for k in (known, other))
    hidden = ~known.mask[:, None].expand_as(one)
    assert not torch.equal(one[hidden], two[hidden])


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (
            Known(latents(2), torch.ones(4, 4, dtype=torch.bool)),
            r"known: latents \(2, 3, 4, 4\) .* draws \(3, 3, 4, 4\)",
        ),
        (Known(latents(), torch.ones(4, dtype=torch.bool)), r"the mask is \(4, 4\) or \(3, 4, 4\)"),
        (Known(latents(), torch.ones(4, 4)), r"known.mask: must be boolean"),
        (
            Known(latents() / 0, torch.ones(4, 4, dtype=torch.bool)),
            r"known.latents \(144,\): 144 numbers are not finite",
        ),
    ],
)
def test_known_latents_that_do_not_fit(known, message):
    with pytest.raises(ValueError, match=message):
        build().generate(LABELS, seed=0, indices=range(3), known=known)


def test_rows_that_know_different_numbers_of_positions_are_refused_before_any_is_drawn():
    with pytest.raises(ValueError, match=r"known.mask: 0 to 16 known positions; the images of one call"):
        Known(latents(), torch.arange(3).view(3, 1, 1).expand(3, 4, 4) > 0)


# ---------------------------------------------------------------- the order and the schedule


def revealed(order: str) -> list[Tensor]:
    """Which positions are there after each of 4 iterations, of one image."""
    found: list[Tensor] = []
    build().generate(
        LABELS[:1],
        seed=0,
        indices=[0],
        sampling=RevealSampling(iterations=4, order=order, guidance=1.0),
        on_step=lambda done, drawn: found.append((drawn[0] != 0).any(dim=0).flatten()),
    )
    return found


def test_raster_order_reveals_row_by_row():
    for there in revealed("raster"):
        count = int(there.sum())
        assert there[:count].all()


@pytest.mark.parametrize("order", ["random", "raster", "confidence"])
def test_positions_stay_once_they_are_there(order):
    steps = revealed(order)
    plan = plan_reveals(RevealSampling(iterations=4), 16, 16)
    assert [int(there.sum()) for there in steps] == [2, 5, 10, 16]
    assert [reveal.count for reveal in plan] == [2, 3, 5, 6]
    for before, after in itertools.pairwise(steps):
        assert (after | ~before).all()


def test_images_have_orders_of_their_own():
    start = build()._start(RevealSampling(), 0, range(2), None)
    assert not torch.equal(start.order[0], start.order[1])


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("first_step", ["published", "corrected"])
def test_training_and_sampling_see_the_same_only_if_corrected(first_step):
    """P1 of our specification."""
    head = build(first_step=first_step).head
    features, seen = torch.randn(6, 24, generator=torch.Generator().manual_seed(2)), []
    choice = Choice(1.0, torch.full((6, 3), 0.6, dtype=torch.float64))
    with torch.no_grad():
        ids = head.draw(features, lambda step, logits: (seen.append(logits), choice(step, logits))[1])
        difference = (head(features, ids) - torch.stack(seen, dim=1)).abs().max().item()
    assert (difference < 1e-5) is (first_step == "corrected")


def test_a_step_does_not_see_later_ids():
    head = build().head
    features, ids = torch.randn(2, 24), torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        before, after = head(features, ids), head(features, torch.tensor([[0, 5, 7]] * 2))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


# ---------------------------------------------------------------- training


def test_every_image_hides_as_many_positions_of_its_own():
    model, seen = build(), []
    with patch.object(model, "forward_drawn", side_effect=lambda *given: seen.append(given[2:])):
        for seed in range(20):
            model(latents(), LABELS, generator=torch.Generator().manual_seed(seed))
    counts = {hidden.shape[1] for hidden, _ in seen}
    assert counts <= set(range(12, 17))
    assert len(counts) > 2
    for hidden, visible in seen:
        assert torch.equal(torch.cat([hidden, visible], dim=1).sort(dim=1).values, torch.arange(16).expand(3, -1))
    some = next(hidden for hidden, _ in seen if hidden.shape[1] < 16)
    assert not torch.equal(some[0], some[1])


def test_shares_of_a_wide_normal_are_about_equally_frequent():
    shares = torch.tensor([hidden_share((number + 0.5) / 400, 0.05, 2.0) for number in range(400)])
    assert torch.histc(shares, bins=5, min=0.05, max=1.0).tolist() == pytest.approx([80] * 5, rel=0.1)


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_tables_start_as_they_are_told(std):
    torch.manual_seed(0)
    model = TokenBridge(replace(SMALL, table_std=std))
    for table in (model.class_embedding.weight, model.encoder_positions, model.decoder_positions):
        assert table.std().item() == pytest.approx(std, rel=0.3)
    assert model.head.step_positions.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 13), (0.3, 4), (0.0, 1)])
def test_the_head_learns_from_a_share_of_what_is_hidden(share, expected):
    """What is visible does not depend on it, and no visible position is asked for."""
    found = []
    for head_share in (1.0, share):
        model = build(head_share=head_share)
        with patch.object(model, "forward_drawn", side_effect=lambda *given: found.append(given[2:])):
            model(latents(), LABELS, generator=torch.Generator().manual_seed(7))
    (hidden, visible), (asked, seen) = found
    assert hidden.shape[1] == 13
    assert torch.equal(seen, visible)
    assert asked.shape[1] == expected
    assert all(set(some.tolist()) <= set(every.tolist()) for some, every in zip(asked, hidden, strict=True))
    assert len({tuple(row.tolist()) for row in asked}) > 1


def test_hidden_positions_are_not_seen():
    model = build()
    hidden, visible = torch.tensor([[0, 2, 3]]), torch.tensor([[1, *range(4, 16)]])
    first = latents(1)
    other = first.clone()
    other[0, :, 0, [0, 2, 3]] += 1
    found, features = [], model.features

    def record(*given: Tensor) -> Tensor:
        found.append(features(*given))
        return found[-1]

    with patch.object(model, "features", side_effect=record):
        losses = [model.forward_drawn(x, LABELS[:1], hidden, visible).total for x in (first, other)]
    assert torch.equal(*found)
    assert losses[0] != losses[1]  # the numbers are other ids, and those are asked for


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_do_not_go_unnoticed(bad):
    model, x = build(), latents()
    x[1, 0, 2, 2] = bad
    assert not model(x, LABELS, generator=torch.Generator()).total.isfinite()


def test_examples_of_another_model_are_refused():
    model, x = build(), latents()
    for bad, labels, message in (
        (torch.zeros(2, 3, 5, 5), LABELS[:2], r"latents \(2, 3, 5, 5\) .* takes latents \(B, 3, 4, 4\)"),
        (torch.zeros(2, 4, 4, 4), LABELS[:2], r"latents \(2, 4, 4, 4\) with 2 labels"),
        (x, LABELS[:1], r"with 1 labels"),
        (x, LABELS + 99, r"labels must lie in 0 to 4"),
        (x, LABELS.float(), r"labels must be a tensor \(B,\) of whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            model(bad, labels, generator=torch.Generator())
    with pytest.raises(ValueError, match="labels must be a tensor"):
        model.generate([1], seed=0, indices=[0])


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for recompute in (False, True):
        model = build().train()
        if recompute:
            model.recompute_activations()
        model(latents(), LABELS, generator=torch.Generator().manual_seed(1)).total.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)


def test_what_does_not_fit_together():
    for fields, message in (
        ({"channel_order": (0, 1)}, r"channel_order: \[0, 1\] must have each of the channels 0 to 2 once"),
        ({"channel_order": (0, 1, 1)}, r"channel_order"),
        ({"quantizer": NormalConfig(means=(0.0,), deviations=(1.0,))}, r"quantizer.means: 1 numbers for 3 channels"),
        ({"head": STACK, "latent_channels": 0}, r"latent_channels"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **fields)
    with pytest.raises(ValueError, match="width: 30 must be a multiple of num_heads = 4"):
        StackConfig(width=30, depth=1, num_heads=4)
    with pytest.raises(ValueError, match=r"labels must lie in 0 to 4"):
        build().generate(torch.tensor([7]), seed=0, indices=[0])
    with pytest.raises(ValueError, match="the generator draws latents of 3 channels, but the autoencoder decodes 4"):
        build().check_decoder(VAE(VAEConfig(latent_channels=4, block_channels=(8,), layers_per_block=1, norm_groups=4)))
    with pytest.raises(ValueError, match="schedule"):
        RevealSampling(schedule="cosine")  # the published code takes any other name for `constant`
