"""Controls in our generators that read text, with few random weights and an encoder of random words."""

from __future__ import annotations

import dataclasses
import re
import zlib

import pytest
import torch
from torch import nn

from imgtok.generators.conditioning import ClassSlot, ConditionalGenerator, TextCrossAttention, TextPrefix
from imgtok.generators.controls import own
from imgtok.generators.controls.frap import AdaptiveWeights, AdaptiveWeightsConfig, Words
from imgtok.generators.controls.tome import SemanticMerge, SemanticMergeConfig
from imgtok.generators.controls.uncontextualised import UncontextualisedConfig
from imgtok.generators.entities import Cells
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.hub import controls_of
from imgtok.text.captions import Captions
from imgtok.text.parsing import parse
from imgtok.tokenizers.calls import Calls, together
from imgtok.tokenizers.tokens import Tokens

WIDTH, LONGEST = 12, 12
ACROSS = TextCrossAttention(text_width=WIDTH, text_length=LONGEST)
BEFORE = TextPrefix(text_width=WIDTH, text_length=LONGEST)
PROMPTS = ["a red circle and a blue star", "a circle wearing a red hat and a star", "a green square"]


def encode(prompts) -> list[Captions]:
    """A feature for each word, and one for the end."""
    found = []
    for prompt in prompts:
        words = [*re.finditer(r"\w+|[^\w\s]", prompt)]
        seeds = [zlib.crc32(word.group().encode()) for word in words] + [0]
        rows = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        spans = torch.tensor([[word.start(), word.end()] for word in words] + [[0, 0]])
        found.append(Captions.pad([rows], [spans]))
    return found


def awake(model: ConditionalGenerator) -> ConditionalGenerator:
    """No weight so small that nothing depends on it."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.15)
    model.set_empty_caption(encode([""])[0].features[0])
    return model.eval()


def gpt(condition=ACROSS, **changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "num_tokens": 9, "width": 32, "depth": 2, "num_heads": 2, "mlp_multiple": 1}
    return awake(GPT(GPTConfig(**sizes | changes, condition=condition)))


def xar() -> XAR:
    torch.manual_seed(0)
    sizes = {"latent_channels": 3, "grid": 4, "entities": Cells(height=2, width=2), "width": 32, "depth": 1}
    sampling = FlowSampling(steps=(3,), guidance=(2.0,))
    return awake(XAR(XARConfig(**sizes, num_heads=2, condition=ACROSS, sampling=sampling)))


MODELS = [
    pytest.param(gpt, id="gpt"),
    pytest.param(lambda: gpt(BEFORE, positions="rotary_2d"), id="raster prefix"),
    pytest.param(xar, id="xar"),
]


LITTLE = AdaptiveWeightsConfig(updates=1)
FEW = SemanticMergeConfig(binding_steps=1, binding_updates=1, entropy_steps=1, entropy_passes=1)


def plainly(drawn) -> torch.Tensor:
    return drawn.ids if isinstance(drawn, Tokens) else drawn


def scene_of(model, prompts=PROMPTS, indices=None, notes=None, entities=None, **options) -> own.OwnScene:
    captions = Captions.cat(encode(prompts))
    parses = [parse(prompt, entities=entities) for prompt in prompts]
    indices = list(range(len(prompts))) if indices is None else indices
    return own.OwnScene(model, parses, captions, encode, seed=0, indices=indices, notes=notes, **options)


def drawn(model, controls, prompts=PROMPTS, **options):
    """What is drawn, and the captions of all drawings."""
    seen, generate = [], model.generate

    def seeing(captions: Captions, **how):
        seen.append(captions)
        return generate(captions, **how)

    model.generate = seeing
    found = scene_of(model, prompts, **options).draw(controls_of(controls))
    model.generate = generate
    return plainly(found), seen


@pytest.mark.parametrize("build", MODELS)
def test_controls_that_are_off_change_no_bit(build):
    model, captions = build(), Captions.cat(encode(PROMPTS))
    expected = plainly(model.generate(captions, seed=0, indices=range(3)))
    zero = [UncontextualisedConfig(strength=0), SemanticMergeConfig(strength=0), AdaptiveWeightsConfig(strength=0)]
    for controls in ([], zero):
        found, seen = drawn(model, controls)
        assert torch.equal(found, expected)
        assert len(seen) == 1, "drawn once"


@pytest.mark.parametrize("build", MODELS)
def test_each_control_moves_the_texts_of_its_prompts(build):
    model = build()
    for controls in ([FEW], [FEW, LITTLE]):
        notes: list = []
        found, seen = drawn(model, controls, notes=notes)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert torch.isfinite(found.double()).all()
        assert notes
        before = model._checked(Captions.cat(encode(PROMPTS)))
        moved = (seen[-1].features != before.features).any(-1)
        assert moved[:2].any(dim=1).all()
        assert not moved[~before.mask].any()


def test_an_image_depends_on_its_prompt_and_index_alone():
    """Captions are the same to rounding whatever shares the batch, and so are most images."""
    model = gpt()
    _, together = drawn(model, [FEW, LITTLE])
    _, alone = drawn(model, [FEW, LITTLE], PROMPTS[1:2], indices=[1])
    torch.testing.assert_close(together[-1].features[1:2], alone[-1].features, atol=1e-3, rtol=1e-3)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("way", ["interpolate", pytest.param("scale", marks=SLOW), pytest.param("logit", marks=SLOW)])
@pytest.mark.parametrize("build", MODELS)
def test_weights_lower_their_objective(build, way):
    """On what was drawn first; a gradient step of each prompt, short enough to go down."""
    model, notes = build(), []
    config = AdaptiveWeightsConfig(way=way, change=0.02, updates=2)
    drawn(model, [config], notes=notes)
    losses = torch.tensor([note["loss"] for note in notes])
    assert losses.shape == (2, 3)
    assert losses[-1].sum() < losses[0].sum()
    assert list(notes[-1]["weights"][0]) == ["circle@6", "red@2", "star@24", "blue@19"]


def test_a_composite_comes_nearer_to_its_phrase():
    config = SemanticMergeConfig(binding_steps=1, binding_updates=2, entropy_steps=0)
    for build in (gpt, xar):
        notes: list = []
        drawn(build(), [config], notes=notes)
        losses = torch.tensor([loss for note in notes for loss in note["binding"]])
        assert (losses[-1] < losses[0]).all()


def test_entropies_fall_where_there_is_a_grid():
    config = SemanticMergeConfig(binding_steps=0, entropy_steps=1, entropy_passes=2, step=0.5)
    for build, there in ((xar, True), (gpt, False)):
        notes: list = []
        drawn(build(), [config], notes=notes)
        assert bool(notes) == there
        if there:
            losses = torch.tensor([[torch.nan if one is None else one for one in row] for row in notes[0]["entropy"]])
            assert losses[-1].nansum() < losses[0].sum()


def test_hidden_columns_are_a_shorter_caption():
    """Of a bidirectional reader: the composite and the rest, without the columns that it was made of."""
    model = gpt()
    config = SemanticMergeConfig(fill="mask", binding_steps=0, entropy_steps=0, noun=1.0, modifier=1.0)
    found, seen = drawn(model, [config], PROMPTS[:1])
    assert seen[-1].attention_mask[0, 0, 0].isneginf().nonzero().flatten().tolist() == [1, 5, *range(8, LONGEST)]
    rows = encode(PROMPTS[:1])[0].features[0]
    rows[2], rows[6] = rows[1] + rows[2], rows[5] + rows[6]
    kept = Captions.pad([rows[[0, 2, 3, 4, 6, 7]]])
    assert torch.equal(found, plainly(model.generate(kept, seed=0, indices=[0])))


def test_the_end_of_the_shortened_prompt():
    """At its own place, of an encoder that does not pad."""
    config = SemanticMergeConfig(end_step=0, binding_steps=0, entropy_steps=0)
    _, seen = drawn(gpt(), [config], PROMPTS[1:2])
    short = encode(["a circle and a star"])[0].features[0]
    torch.testing.assert_close(seen[-1].features[0, 9], short[-1])


def test_words_that_were_merged_have_no_weights():
    words = Words(columns=[[2], [1], [6], [4, 5]], objects=[0, 2], pairs=[(0, 1), (2, 3)])
    gone = torch.zeros(8, dtype=torch.bool)
    gone[[1, 5]] = True
    left = words.without(gone)
    assert left == Words(columns=[[2], [6], [4]], objects=[0, 1], pairs=[(1, 2)])


def test_the_order_of_controls_does_not_matter():
    model = gpt()
    first, second = (drawn(model, order, PROMPTS[:1])[1][-1].features for order in ([FEW, LITTLE], [LITTLE, FEW]))
    assert torch.equal(first, second)
    scene = scene_of(model, PROMPTS[:1])
    weights = AdaptiveWeights(LITTLE).start(scene)
    assert len(weights.words(scene)[0].columns) == 4
    SemanticMerge(FEW).start(scene)
    assert len(weights.words(scene)[0].columns) == 2, "even where weights were started before words were merged"


def test_notes_say_of_which_images_they_are():
    notes: list = []
    drawn(gpt(), [FEW, LITTLE], indices=[7, 8, 9], notes=notes)
    assert [(note["control"], note["images"]) for note in notes] == [("tome", [7, 7, 8, 9]), ("frap", [7, 8, 9])]
    assert notes[0]["objects"] == ["circle", "star", "circle", "square"]


def test_calls_are_those_of_both_drawings_and_steps_those_of_the_last():
    told: list = []
    found = scene_of(gpt(), PROMPTS[:1], on_step=told.append).draw([AdaptiveWeights(LITTLE)])
    assert told == list(range(1, 10))
    assert found.calls.calls.tolist() == [18]


@pytest.mark.parametrize("build", MODELS)
def test_less_of_an_image_is_looked_at(build):
    """The first tokens, of a raster whole rows, or all of an image from fewer steps; the image itself is whole."""
    config, counts = dataclasses.replace(LITTLE, look=0.5), []
    model = build()
    generate, shapes = model.generate, []

    def counting(captions, **how):
        counts.append(how.get("num_tokens") or how.get("sampling"))
        found = generate(captions, **how)
        shapes.append(plainly(found).shape)
        return found

    model.generate = counting
    scene = scene_of(model, num_tokens=9) if isinstance(model, GPT) else scene_of(model)
    scene.draw([AdaptiveWeights(config)])
    if isinstance(model, GPT):
        assert counts == ([5, 9] if scene.grid is None else [6, 9])
        assert scene.grid in (None, (2, 3))
        assert [shape[1] for shape in shapes] == counts
    else:
        assert counts[0].steps == (2,)
        assert scene.grid == (4, 4)
        assert shapes[0] == shapes[1]
    assert scene.notes[0]["loss"]


def test_totals_of_batches_of_which_one_took_more_calls():
    """More than there are tokens, where images are drawn twice."""
    one = Calls.none(1, 2, torch.device("cpu"))
    one.calls[0], one.judged[0, 0] = 2, 1
    told = together([one.totals(), one.plus(one).totals()])
    assert (told["calls"], told["by_calls"], told["judged"]) == (6, [0, 0, 1, 0, 1], [3, 0])


def test_calls_of_a_drawing_of_fewer_tokens_are_added_to_those_of_all():
    few, many = (Calls.none(1, tokens, torch.device("cpu")) for tokens in (1, 3))
    few.judged[0, 0], many.judged[0, 2], few.calls[0], many.calls[0] = 1, 2, 3, 4
    for found in (few.plus(many), many.plus(few)):
        assert (found.calls.tolist(), found.judged.tolist()) == ([7], [[1, 0, 2]])


def test_rounds_look_at_what_was_drawn_after_updates():
    model, notes = gpt(), []
    once, both = AdaptiveWeightsConfig(updates=2), AdaptiveWeightsConfig(updates=1, rounds=2)
    _, seen = drawn(model, [both], PROMPTS[:1], notes=notes)
    assert (len(seen), len(notes)) == (3, 2)
    looked_at = [captions.features for captions in seen]
    assert not torch.equal(looked_at[0], looked_at[1]), "the second drawing is for the weights that the first led to"
    assert not torch.equal(looked_at[1], looked_at[2])
    assert len(drawn(model, [once], PROMPTS[:1])[1]) == 2


def test_demos_of_the_published_code():
    attribute, thing = SemanticMergeConfig.published(), SemanticMergeConfig.published("object")
    assert (attribute.binds, attribute.end_step, attribute.anchor) == ("attributes", None, "published")
    assert (thing.binds, thing.end_step, thing.position) == ("objects", 0, True)


def test_weights_begin_at_one_and_stay_within_their_bounds():
    config = AdaptiveWeightsConfig(low=0.5, high=3.0)
    assert (config.weights(torch.zeros(4)) == 1).all()
    assert config.weights(torch.tensor([-1e3, 1e3])).tolist() == pytest.approx([0.5, 3.0])


# ---------------------------------------------------------------- bad input


def test_what_has_no_text_has_no_controls():
    for condition, message in ((ClassSlot(num_classes=3), "condition class_slot draws classes, and has no prompt"),):
        with pytest.raises(ValueError, match=message):
            own.check_reads(GPT(dataclasses.replace(gpt().config, condition=condition)))


@pytest.mark.parametrize(
    ("prompts", "entities", "message"),
    [
        (["a red circle"], ["red bird"], "bird"),
        (["a red circle and a star"], ["red circle", "red* circle"], "'red circle' and .* share the word 'red' of"),
        ([""], None, "no words"),
        (["a red circle and " + "a " * 9 + "star"], None, "'star'.*too long"),
    ],
)
def test_what_cannot_be(prompts, entities, message):
    model = gpt(dataclasses.replace(ACROSS, text_length=LONGEST))

    def short(prompts):
        return [
            one if one.features.shape[1] <= LONGEST else Captions(
                one.features[:, :LONGEST], one.mask[:, :LONGEST], None, one.spans[:, :LONGEST]
            )
            for one in encode(prompts)
        ]  # fmt: skip

    def draw() -> None:
        parses = [parse(prompt, entities=entities) for prompt in prompts]
        scene = own.OwnScene(model, parses, Captions.cat(short(prompts)), short, seed=0, indices=[0])
        scene.draw([AdaptiveWeights()])

    with pytest.raises(ValueError, match=message):
        draw()
