"""Features of words that see each other before the network reads them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from imgtok.generators.conditioning import ConditionalGenerator, TextCrossAttention, TextPrefix
from imgtok.generators.entities import Cells
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.pipeline import cut_off
from imgtok.generators.xar import XAR, XARConfig
from imgtok.text.captions import Captions

WIDTH, LONGEST = 6, 5
ACROSS = TextCrossAttention(text_width=WIDTH, text_length=LONGEST, context_layers=2)
BEFORE = TextPrefix(text_width=WIDTH, text_length=LONGEST, context_layers=1)
ONE_HOT = torch.eye(WIDTH)
ROWS = [ONE_HOT[[0, 1, 2, 5]], ONE_HOT[[0, 2, 1, 5]], ONE_HOT[[3, 5]]]
CAPTIONS = Captions.pad(ROWS)
IDS = torch.arange(12).view(3, 4) % 7
LATENTS = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def gpt(condition) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "num_tokens": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_multiple": 1}
    return awake(GPT(GPTConfig(**sizes, condition=condition)))


def xar() -> XAR:
    torch.manual_seed(0)
    sizes = {"latent_channels": 3, "grid": 4, "width": 16, "depth": 1, "num_heads": 2}
    return awake(XAR(XARConfig(**sizes, entities=Cells(height=2, width=2), condition=ACROSS)))


def awake(model: ConditionalGenerator) -> ConditionalGenerator:
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.4)
    model.set_empty_caption(ONE_HOT[[5]])
    return model.eval()


def outputs(model: ConditionalGenerator, captions: Captions) -> torch.Tensor:
    if isinstance(model, GPT):
        return model.logits(captions, IDS)
    return model.velocity(model.entities.cut(LATENTS), torch.full((3, 4), 0.5), captions)


MODELS = [
    pytest.param(lambda: gpt(ACROSS), id="gpt"),
    pytest.param(lambda: gpt(BEFORE), id="prefix"),
    pytest.param(xar, id="xar"),
]


@pytest.mark.parametrize("build", MODELS)
def test_the_order_of_words_counts_and_padding_does_not(build):
    model = build()
    with torch.no_grad():
        found = outputs(model, CAPTIONS)
        again = outputs(model, Captions.pad([ROWS[1], ROWS[0], ROWS[2]]))
        wide = CAPTIONS.widen(LONGEST)
        dirty = dataclasses.replace(wide, features=torch.where(wide.mask[..., None], wide.features, 7.0))
        torch.testing.assert_close(outputs(model, dirty), found, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(again[0], found[0], atol=1e-3)
    assert not torch.allclose(again[1], found[1], atol=1e-3)


@pytest.mark.parametrize("build", [MODELS[0], MODELS[2]])
def test_a_hole_is_a_caption_without_the_word(build):
    model, mask = build(), CAPTIONS.mask.clone()
    mask[0, 1] = False
    with torch.no_grad():
        holed = outputs(model, dataclasses.replace(CAPTIONS, mask=mask))
        expected = outputs(model, Captions.pad([ROWS[0][[0, 2, 3]], *ROWS[1:]]))
    torch.testing.assert_close(holed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", MODELS)
def test_words_learn_with_the_generator(build):
    model = build().train()
    features = CAPTIONS.features.clone().requires_grad_()
    outputs(model, dataclasses.replace(CAPTIONS, features=features)).square().sum().backward()
    assert features.grad[CAPTIONS.mask].any(dim=-1).all()
    assert all(parameter.grad.any() for parameter in model.text_context.parameters())
    assert model.text_proj[0].weight.grad.any(dim=0).tolist() == [True] * 4 + [False, True]  # one word never occurred


def test_no_layers_are_no_weights():
    plain = gpt(dataclasses.replace(ACROSS, context_layers=0))
    assert plain.text_context is None
    assert not any("context" in name for name in plain.state_dict())


def test_an_image_is_drawn_from_its_own_words_alone():
    model = gpt(ACROSS)
    together = model.generate(CAPTIONS, seed=1, indices=range(3)).ids
    alone = [model.generate(Captions.pad([row]), seed=1, indices=[k]).ids for k, row in enumerate(ROWS)]
    assert torch.equal(torch.cat(alone), together)


def test_the_end_of_a_prompt_that_is_not_read_is_known():
    spans = torch.tensor([[[0, 1], [2, 5], [0, 0]]])
    caption = Captions(torch.zeros(1, 3, WIDTH), torch.ones(1, 3, dtype=torch.bool), spans=spans)
    assert cut_off("a red circle ", caption, 3) == "circle"
    assert cut_off("a red ", caption, 3) == ""
    assert cut_off("a red circle", caption, 4) == "", "there would have been room"
    assert cut_off("a red circle", dataclasses.replace(caption, spans=None), 3) == ""
