"""Objects that are encoded alone, with an encoder whose states know of all words of their prompt."""

from __future__ import annotations

import re
import zlib

import pytest
import tiny_diffusion
import torch

from imgtok.generators.conditioning import TextCrossAttention
from imgtok.generators.controls.diffusers import draw
from imgtok.generators.controls.own import OwnScene
from imgtok.generators.controls.tome import SemanticMergeConfig
from imgtok.generators.controls.uncontextualised import Uncontextualised, UncontextualisedConfig, phrases_of
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.hub import controls_of
from imgtok.text.captions import Captions
from imgtok.text.parsing import parse

WIDTH, LONGEST = 8, 16
PROMPT = "a red circle and a blue star"


def encode(prompts) -> list[Captions]:
    """A mark, a state for each word, and another mark; each has half of the mean of all words in it."""
    found = []
    for prompt in prompts:
        words = [*re.finditer(r"\w+|[^\w\s]", prompt)]
        own = torch.stack([vector(name) for name in ("start", *(word.group() for word in words), "end")])
        spans = torch.tensor([[0, 0], *([word.start(), word.end()] for word in words), [0, 0]])
        found.append(Captions.pad([own + own.mean(dim=0) / 2], [spans]))
    return found


def vector(name: str) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    condition = TextCrossAttention(text_width=WIDTH, text_length=LONGEST, empty_length=2)
    made = GPT(GPTConfig(vocab_size=8, num_tokens=4, width=16, depth=1, num_heads=2, condition=condition))
    made.set_empty_caption(encode([""])[0].features[0])
    return made.eval()


def scene_of(model: GPT, prompts=(PROMPT,), entities=None) -> OwnScene:
    parses = [parse(prompt, entities=entities) for prompt in prompts]
    return OwnScene(model, parses, Captions.cat(encode(prompts)), encode, seed=0, indices=range(len(prompts)))


def after(scene: OwnScene, **settings):
    Uncontextualised(UncontextualisedConfig(**settings)).start(scene)
    return scene.texts


def test_an_object_has_the_states_of_its_phrase_alone(model):
    scene = scene_of(model, [PROMPT, "a star"])
    before, states = scene.texts.states, after(scene, length="alone").states
    for columns, phrase in (([1, 2, 3], "a red circle"), ([5, 6, 7], "a blue star")):
        torch.testing.assert_close(states[0, columns], encode([phrase])[0].features[0, 1:4])
        assert ((states[0, columns] - before[0, columns]).abs() > 1e-2).any(dim=1).all(), "it was not so before"
    torch.testing.assert_close(states[1, 1:3], before[1, 1:3])  # it says nothing else
    rest = [0, 4, *range(8, LONGEST)]
    assert torch.equal(states[0, rest], before[0, rest])


def test_states_keep_the_length_of_those_that_they_replace(model):
    scene = scene_of(model)
    before, states = scene.texts.states, after(scene).states
    torch.testing.assert_close(states.norm(dim=-1), before.norm(dim=-1))
    alone = encode(["a blue star"])[0].features[0, 1:4]
    torch.testing.assert_close(torch.cosine_similarity(states[0, 5:8], alone), torch.ones(3))


def test_half_of_the_way(model):
    scene = scene_of(model)
    before, half = scene.texts.states, after(scene, strength=0.5).states
    torch.testing.assert_close(half, (before + after(scene_of(model)).states) / 2)


def test_only_nouns_are_seen(model):
    texts = after(scene_of(model), keep="head")
    hidden = [1, 2, 5, 6]
    assert texts.bias[0].isneginf().nonzero().flatten().tolist() == hidden
    assert texts.gone[0].nonzero().flatten().tolist() == hidden


def test_what_is_hidden_stays_so_for_the_next_control(model):
    scene = scene_of(model)
    found = UncontextualisedConfig(keep="head"), SemanticMergeConfig(binding_steps=0, entropy_steps=0)
    for control in controls_of(found[::-1]):  # they act in the same order
        control.start(scene)
    assert scene.texts.gone[0].nonzero().flatten().tolist() == [1, 2, 5, 6]


def test_every_mention_and_what_an_object_holds_are_objects_of_their_own(model):
    prompts = ["a circle holding a red star", "a red circle and a star, the red circle is above the star"]
    scene = scene_of(model, prompts)
    found = [[phrase.text for phrase in phrases_of(prompt)] for prompt in scene.prompts]
    assert found[0] == ["a circle", "a red star"]
    assert sorted(found[1]) == ["a red circle", "a star", "the red circle", "the star"]


def test_words_that_stand_apart_are_put_together(model):
    scene = scene_of(model, ["a circle and a square, both red"], ["circle* red"])
    states = after(scene, length="alone").states[0, [2, 8]]
    torch.testing.assert_close(states, encode(["circle red"])[0].features[0, 1:3])


def test_nothing_is_drawn_to_be_looked_at(model):
    scene, calls = scene_of(model), []
    generate = model.generate
    model.generate = lambda *given, **how: calls.append(given) or generate(*given, **how)  # type: ignore[method-assign]
    scene.draw(controls_of("uncontextualised"))
    assert len(calls) == 1
    assert not scene.notes


def test_in_a_pipeline_of_diffusers():
    pipe, seen = tiny_diffusion.sd(), []
    config = UncontextualisedConfig(length="alone")

    class Seeing(Uncontextualised):
        def start(self, scene):
            run = super().start(scene)
            seen.append(scene)
            return run

    options = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}

    def images(controls, prompt="a red cat and a blue dog"):
        return draw(pipe, prompt, controls=controls, generator=torch.Generator().manual_seed(0), **options).images

    found = images([Seeing(config)])
    assert not torch.equal(found, images([]))
    prompt = seen[0].prompts[0]
    (_, columns, _), alone = [*phrases_of(prompt)][1], seen[0].encode(["a blue dog"]).states
    assert torch.equal(seen[0].texts.states[0, columns], alone[0, 1 : 1 + len(columns)])
    assert torch.equal(images([UncontextualisedConfig(strength=0)]), images([]))


def test_a_phrase_that_is_cut_otherwise_alone(model):
    """As by an encoder whose pieces depend on what stands before them."""

    def otherwise(prompts):
        return encode([f"{prompt} !" if prompt == "a blue star" else prompt for prompt in prompts])

    scene = OwnScene(model, [parse(PROMPT)], Captions.cat(encode([PROMPT])), otherwise, seed=0, indices=[0])
    with pytest.raises(ValueError, match="'a blue star' in 4 pieces alone, and in 3 within the prompt"):
        Uncontextualised().start(scene)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a red circle and " + "a " * 11 + "star", "'star'.*too long"), ("", "no words")],
)
def test_what_cannot_be(model, prompt, message):
    def short(prompts):
        return [
            Captions(one.features[:, :LONGEST], one.mask[:, :LONGEST], None, one.spans[:, :LONGEST])
            for one in encode(prompts)
        ]

    def start() -> None:
        scene = OwnScene(model, [parse(prompt)], Captions.cat(short([prompt])), short, seed=0, indices=[0])
        Uncontextualised().start(scene)

    with pytest.raises(ValueError, match=message):
        start()
