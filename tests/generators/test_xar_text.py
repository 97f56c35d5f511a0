"""A tiny xAR that reads captions through cross-attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import imgtok
from imgtok import flow, randomness
from imgtok.generators.conditioning import ClassModulation, TextCrossAttention
from imgtok.generators.entities import Cells, Patches, Scales, WholeImage
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.layers.attention import CrossAttention
from imgtok.text.captions import Captions

TINY = XARConfig(
    latent_channels=3, grid=4, entities=Cells(height=2, width=2), width=32, depth=2, num_heads=2,
    condition=TextCrossAttention(text_width=12, text_length=6),
)  # fmt: skip
GUIDED = FlowSampling(steps=(3,), guidance=(2.0,))
PLAIN = FlowSampling(steps=(3,), guidance=(1.0,))


def build(*, drop: float = 0.1, **changes) -> XAR:
    torch.manual_seed(0)
    model = XAR(replace(TINY, **changes).with_condition(drop=drop)).eval()
    model.set_empty_caption(torch.randn(1, 12))
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ROWS = [torch.randn(length, 12, generator=generator(length)) for length in (3, 6, 1)]
CAPTIONS = Captions.pad(ROWS)
LATENTS = torch.randn(3, 3, 4, 4, generator=generator(9))


def draw(
    model: XAR, sampling: FlowSampling, captions: Captions = CAPTIONS, indices=(3, 7, 11), *, plainly: bool = False
):
    generate = model.generate_plainly if plainly else model.generate
    return generate(captions, seed=1, indices=list(indices), sampling=sampling)


# ---------------------------------------------------------------- sampling


SAMPLINGS = {
    "plain": lambda count: PLAIN,
    "guided": lambda count: GUIDED,
    "interval": lambda count: FlowSampling(steps=(4,), guidance=(3.0,), interval=(0.3, 0.8)),
    "every other guided": lambda count: FlowSampling(
        steps=(3,), guidance=(1.0, 2.0) * (count // 2) + (3.0,) * (count % 2)
    ),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("entities", [TINY.entities, Scales(sides=(1, 2, 4)), Patches()], ids=lambda e: e.kind)
def test_sampling_is_the_plain_algorithm(entities, sampling):
    model = build(entities=entities)
    how = sampling(len(model.entities))
    fast, plain = draw(model, how), draw(model, how, plainly=True)
    assert fast.shape == (3, 3, 4, 4)
    assert torch.allclose(fast, plain, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_rows_meet_their_own_caption(scale):
    """A single entity, one image after the other, with nothing of the sampler: no branches, no widening, no table."""
    model, steps = build(entities=WholeImage()), 4
    drawn = draw(model, FlowSampling(steps=(steps,), guidance=(scale,)))
    noise = randomness.normal(1, [3, 7, 11], (steps, 16, 3), "entity 0").transpose(0, 1)
    for row, features in enumerate(ROWS):

        @torch.no_grad()
        def velocity(x, step, t, features=features):
            v_cond, v_null = (
                model.velocity(x, torch.full((1, 1), t), Captions.pad([rows]))
                for rows in (features, model.empty_caption)
            )
            return flow.classifier_free_guidance(v_cond, v_null, scale)

        alone = [part[row : row + 1] for part in noise]
        x = flow.stochastic_euler(velocity, alone[0], steps, alone[1:])
        assert torch.allclose(drawn[row : row + 1], model.entities.join(x), atol=1e-5)


def test_an_image_depends_on_seed_index_and_caption_alone():
    model = build()
    batch = draw(model, GUIDED)
    for row, index in enumerate((3, 7, 11)):
        alone = draw(model, GUIDED, Captions.pad(ROWS[row : row + 1]), (index,))
        assert torch.allclose(alone, batch[row : row + 1], atol=1e-5)
    others = draw(model, GUIDED, Captions.pad([ROWS[1]] * 3))
    assert torch.allclose(others[1], batch[1], atol=1e-5)
    assert not torch.allclose(others[0], batch[0], atol=1e-2)
    assert not torch.allclose(others[2], batch[2], atol=1e-2)


def test_padding_leaves_no_trace():
    model = build()
    wide = CAPTIONS.widen(6)
    dirty = Captions(torch.where(wide.mask[..., None], wide.features, 1e4), wide.mask)
    assert torch.equal(draw(model, GUIDED, dirty), draw(model, GUIDED))


def test_guidance_leads_away_from_the_empty_caption():
    model = build()
    empty = Captions.pad([model.empty_caption] * 3)
    plain, guided = draw(model, PLAIN), draw(model, GUIDED)
    assert not torch.allclose(plain, guided, atol=1e-3)
    assert torch.allclose(draw(model, GUIDED, empty), draw(model, PLAIN, empty), atol=1e-5), (
        "guiding the empty caption away from itself does nothing"
    )
    model.set_empty_caption(torch.zeros(1, 12))
    assert torch.equal(draw(model, PLAIN), plain), "without guidance the empty caption is not looked at"
    assert not torch.allclose(draw(model, GUIDED), guided, atol=1e-3)


def test_every_block_attends_to_the_caption():
    model = build()
    drawn = draw(model, PLAIN)
    assert len(model.blocks) == 4
    for block in model.blocks:
        weight = block.cross_attention.out_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            assert not torch.allclose(draw(model, PLAIN), drawn, atol=1e-4)
            weight.copy_(kept)
    assert torch.equal(draw(model, PLAIN), drawn)


@pytest.mark.parametrize(("sampling", "rows"), [(PLAIN, 3), (GUIDED, 6)])
def test_captions_are_read_once(monkeypatch, sampling, rows):
    calls = []
    keys_values = CrossAttention.keys_values
    monkeypatch.setattr(
        CrossAttention, "keys_values", lambda self, context: calls.append(context.shape) or keys_values(self, context)
    )
    draw(build(), sampling, Captions.pad([ROWS[2]] * 3))
    assert calls == [(rows, 6, 32)] * 4, "a block each, widened to text_length"


# ---------------------------------------------------------------- training


def test_dropped_captions_are_the_empty_one():
    model = build(drop=1.0)
    dropped = model(LATENTS, CAPTIONS, generator=generator()).total
    model.config = model.config.with_condition(drop=0.0)
    empty = model(LATENTS, Captions.pad([model.empty_caption] * 3), generator=generator()).total
    kept = model(LATENTS, CAPTIONS, generator=generator()).total
    assert dropped.item() == pytest.approx(empty.item(), rel=1e-6)
    assert dropped.item() != pytest.approx(kept.item(), rel=1e-4)


def test_everything_is_trained_but_the_empty_caption():
    model = build(drop=0.5)
    model(LATENTS, CAPTIONS, generator=generator(2)).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert "empty_caption" in model.state_dict()
    assert not any("class_embedding" in name for name in model.state_dict())


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = build()
        if recompute:
            model.recompute_activations()
        model(LATENTS, CAPTIONS, generator=generator()).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_it_learns_what_captions_say():
    """A caption's first number is the latent: the loss falls below what ignorance of the captions allows."""
    model = build(dropout=0.0, drop=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    draws, losses = generator(), []
    for _ in range(60):
        values = torch.randint(0, 5, (16,), generator=draws) - 2.0
        features = values[:, None, None].expand(16, 2, 12) / 2
        latents = values[:, None, None, None].expand(16, 3, 4, 4)
        loss = model(latents, Captions(features, torch.ones(16, 2, dtype=torch.bool)), generator=draws).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    low, high = (torch.full((2, 12), value) for value in (-1.0, 1.0))
    drawn = draw(model.eval(), FlowSampling(steps=(8,), guidance=(1.0,)), Captions.pad([low, high, low]))
    assert drawn[1].mean() > 0.5
    assert drawn[0].mean() < -0.5
    assert drawn[2].mean() < -0.5


def half_precision(device: str) -> None:
    """Stored features in 16 bits: a training step in mixed precision, and drawing with a model in bfloat16."""
    model = build(drop=0.5).to(device)
    stored, latents = Captions(CAPTIONS.features.half(), CAPTIONS.mask).to(device), LATENTS.to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = model(latents, stored, generator=generator(2)).total
    loss.backward()
    full = model(latents, CAPTIONS.to(device), generator=generator(2)).total
    assert loss.item() == pytest.approx(full.item(), rel=0.02)
    drawn = draw(model.bfloat16(), GUIDED, stored)
    assert drawn.isfinite().all()
    assert drawn.device.type == device


def test_half_precision():
    half_precision("cpu")


@pytest.mark.gpu
def test_half_precision_on_a_gpu():
    half_precision("cuda")


# ---------------------------------------------------------------- without text, errors, files


def test_without_text_nothing_of_it_is_there():
    model = XAR(replace(TINY, condition=ClassModulation(num_classes=5)))
    assert not any("cross" in name or "text" in name or "caption" in name for name in model.state_dict())
    assert model.class_embedding.num_embeddings == 6


def test_the_wrong_condition_is_refused():
    with pytest.raises(ValueError, match=r"\(condition cross_attention\) draws for captions, given labels"):
        draw(build(), PLAIN, torch.tensor([0]), (0,))
    with pytest.raises(ValueError, match=r"\(condition class\) draws for labels, given captions"):
        draw(XAR(replace(TINY, condition=ClassModulation(num_classes=5))), PLAIN)
    with pytest.raises(ValueError, match="this model reads at most 6 of width 12"):
        draw(build(), PLAIN, Captions.pad([torch.zeros(7, 12)]), (0,))


def test_an_empty_caption_longer_than_any_is_refused():
    with pytest.raises(ValueError, match="empty_length: 7 is more than text_length = 6"):
        TINY.with_condition(empty_length=7)


def test_a_model_folder_knows_its_empty_caption(tmp_path):
    model = build(condition=replace(TINY.condition, text_encoder="google/flan-t5-xl"))
    model.save_pretrained(tmp_path)
    loaded = imgtok.load(tmp_path, expect=XAR)
    assert loaded.config == model.config
    assert torch.equal(draw(loaded, GUIDED), draw(model, GUIDED))
