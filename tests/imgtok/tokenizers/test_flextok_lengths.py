"""NesTok's losses in a tiny FlexTok: every image at two lengths in one pass (second_ring.md, section 2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from imgtok import flow
from imgtok.losses import two_lengths
from imgtok.tokenizers.flextok import Draws, FlexTok, FlexTokConfig, ShortRuns, TrunkConfig

TRUNK = TrunkConfig(width=32, depth=2, head_dim=16)
PLAIN = FlexTokConfig(
    image_size=8,
    num_registers=8,
    levels=(4, 3, 2),
    encoder=TRUNK,
    decoder=TRUNK,
    short_runs=ShortRuns(positions="learned", initialisation="aligned", spread_weight=0.2),
)
BOTH = replace(PLAIN, cross_length=True, align_weight=0.5)
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(config: FlexTokConfig) -> FlexTok:
    """The same weights for all of these; none are zero."""
    torch.manual_seed(0)
    model = FlexTok(config)
    for parameter in model.decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def drawn(model: FlexTok, keep: list[int] | None = None, null: bool | None = False) -> Draws:
    """What training draws, with numbers of kept tokens and null conditions put in place of those drawn."""
    found = model.draw(IMAGES, torch.Generator().manual_seed(1))
    found = found if keep is None else found._replace(keep=torch.tensor(keep))
    return found if null is None else found._replace(null=torch.full_like(found.null, null))


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_the_joint_pass_is_two_separate_ones(prediction):
    plain, both = (
        build(replace(config, short_runs=replace(PLAIN.short_runs, prediction=prediction))) for config in (PLAIN, BOTH)
    )
    draws = drawn(both, [1, 3, 5, 8], null=None)._replace(null=torch.tensor([False, True, False, False]))
    joint = both.forward_drawn(IMAGES, draws)
    prefix = plain.forward_drawn(IMAGES, draws)
    whole = plain.forward_drawn(IMAGES, draws._replace(keep=torch.full((4,), 8)))
    assert torch.allclose(joint.parts["flow"], whole.parts["flow"])
    assert torch.allclose(joint.parts["flow_prefix"], prefix.parts["flow"])
    summed = whole.parts["flow"] + prefix.parts["flow"] + 0.5 * joint.parts["align"] + 0.2 * joint.parts["spread"]
    assert torch.allclose(joint.total, summed)
    assert joint.parts["align"] > 1e-4
    assert torch.equal(joint.codes, whole.codes)


def test_two_lengths_compile_without_a_break():
    plain, compiled = build(BOTH), build(BOTH)
    draws = drawn(plain)
    torch.compiler.reset()
    traced = torch.compile(compiled.forward_drawn, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(IMAGES, draws).total, plain.forward_drawn(IMAGES, draws).total)
    torch.compiler.reset()


def test_a_prefix_of_all_tokens_is_twice_the_plain_loss():
    draws = drawn(both := build(BOTH), [8] * 4)
    found, plain = both.forward_drawn(IMAGES, draws), build(PLAIN).forward_drawn(IMAGES, draws)
    assert found.parts["align"].abs() < 1e-6
    assert torch.allclose(found.total, 2 * plain.parts["flow"] + 0.2 * plain.parts["spread"])


def test_a_single_token_changes_nothing_but_the_factor():
    one = replace(BOTH, num_registers=1)
    found = build(one).forward_drawn(IMAGES, drawn(build(one)))
    plain = build(replace(PLAIN, num_registers=1)).forward_drawn(IMAGES, drawn(build(one)))
    assert torch.allclose(found.total, 2 * plain.parts["flow"] + 0.2 * plain.parts["spread"])


def test_alignment_draws_the_prefix_alone():
    """A token that the prefix lacks is in the other branch, which is the target and gets no gradient."""
    model, keep = build(BOTH), [1, 3, 5, 7]
    draws = drawn(model, keep)
    codes = torch.rand(4, 8, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    noised = flow.interpolate(IMAGES, draws.noise, draws.times)
    _, parts = model._two_lengths(IMAGES, noised, codes, draws, None)
    (gradient,) = torch.autograd.grad(parts["align"], codes)
    for row, count in enumerate(keep):
        assert not gradient[row, count:].any()
        assert gradient[row, :count].any()


def test_what_hides_a_token_and_the_null_condition_say_nothing():
    sequence = torch.rand(2, 5 + 4, 6, generator=torch.Generator().manual_seed(3))
    other = sequence.clone()
    other[0, 5 + 2 :], other[1, 5 + 3 :] = 9.0, -9.0  # masked registers
    keep = torch.tensor([2, 3])
    found = two_lengths.features(sequence, 4, keep)
    assert found.shape == (2, 6, 6)
    assert torch.equal(found, two_lengths.features(other, 4, keep))
    assert torch.allclose(found[0, 0], sequence[0, 5:7].mean(dim=0))
    assert torch.equal(found[:, 1:], sequence[:, :5])
    model = build(BOTH)
    assert model.forward_drawn(IMAGES, drawn(model, [1, 2, 3, 4], null=True)).parts["align"] == 0


def test_vectors_near_zero_leave_gradients_finite():
    prefix = torch.zeros(1, 3, 4, requires_grad=True)
    two_lengths.alignment(prefix, torch.ones(1, 3, 4)).sum().backward()
    assert prefix.grad is not None
    assert prefix.grad.isfinite().all()


def test_blocks_are_shown_once_an_image():
    shown = []
    model = build(BOTH)
    model.forward_drawn(IMAGES, drawn(model), lambda block, patches: shown.append((block, patches.shape)))
    assert shown == [(0, (4, 16, 32)), (1, (4, 16, 32))]


@pytest.mark.parametrize(("changes", "message"), [
    ({"align_weight": 1.0}, "align_weight: it compares two lengths; say cross_length=true"),
    ({"cross_length": True, "align_weight": 1.0, "align_block": 1}, "align_block: 1, and a decoder of depth 2 has"),
])  # fmt: skip
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **changes)
