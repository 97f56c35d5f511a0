"""What a prompt names: by the grammar, by taggers where they are installed, and as the caller says."""

from __future__ import annotations

import ast
import importlib.util

import pytest
import torch

from imgtok.shapes.captions import caption
from imgtok.shapes.world import SPLITS, ShapesConfig, sample_scenes
from imgtok.text.parsing import Entity, columns, describe, parse

PROMPTS = {
    "a red circle and a blue square": ["circle: red", "square: blue"],
    "a red circle left of a blue square": ["circle: red", "square: blue"],
    "a small red ring to the right of an orange cross": ["ring: small, red", "cross: orange"],
    "a red star in the top left and a blue ring in the center": ["star: red", "ring: blue"],
    "a cyan ring and a ring, the cyan ring is under the ring": None,
    "a cat wearing sunglasses and a dog wearing a red hat": ["cat; with sunglasses", "dog; with hat: red"],
    "a red circle holding a small yellow star": ["circle: red; with star: small, yellow"],
    "a dog that is red and a cat that is black": ["dog: red", "cat: black"],
    "the dog is red and the cat is black": ["dog: red", "cat: black"],
    "a red and blue ball on a wooden table": ["ball: red, blue", "table: wooden"],
    "a man riding a horse with a brown saddle": ["man", "horse; with saddle: brown"],
    "a running dog": ["dog: running"],
    "the left shoe, three stars": ["shoe: left", "stars"],
}
FEW = dict(list(PROMPTS.items())[:4])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_grammar_finds_heads_and_what_belongs_to_them(prompt):
    found = parse(prompt)
    expected = PROMPTS[prompt]
    if expected is None:
        with pytest.raises(ValueError, match=r"not sure what belongs to 'ring'.*entities="):
            found.check()
        return
    assert [describe(entity) for entity in found.entities] == expected
    found.check()
    for entity in found.entities:
        assert all(prompt[word.start : word.stop] == word.text for word in entity.words)


def test_a_thing_named_again_is_one_entity():
    found = parse("a striped blue ring and a green cross, the blue ring is left of the green cross")
    assert [describe(one) for one in found.entities] == [
        "ring: striped, blue; named again 1 time",
        "cross: green; named again 1 time",
    ]
    assert [word.text for word in found.entities[0].words] == ["striped", "blue", "ring", "blue", "ring"]


def test_anchors_and_the_short_prompt_come_from_the_same_parse():
    found = parse("a cat wearing sunglasses and a dog with a hat")
    assert [found.text_of(one) for one in found.entities] == ["a cat wearing sunglasses", "a dog with a hat"]
    assert found.short == "a cat and a dog"
    assert parse("a red circle").short == "a red circle"


@pytest.mark.parametrize("prompt", [
    "a purse of very soft brown coin leather",
    "a ball red",
    "a red star and a blue star wearing a hat, the star is above a ring",
])  # fmt: skip
def test_a_doubtful_group_is_refused_before_it_is_merged(prompt):
    with pytest.raises(ValueError, match="not sure what belongs to") as refused:
        parse(prompt).check()
    _, _, example = str(refused.value).rpartition("such as entities=")
    parse(prompt, entities=ast.literal_eval(example)).check()


def test_given_entities_win():
    prompt = "a cat wearing a red hat beside a dog that is brown, a cat"
    found = parse(prompt, entities=["cat wearing a red hat", "dog* brown", "cat"])
    assert [describe(one) for one in found.entities] == ["cat; with hat: red", "dog: brown", "cat"]
    assert found.parser == "given"
    assert found.entities[2].head.start == len(prompt) - 3
    again = parse(prompt, entities=found.entities)
    assert again == found
    assert found.as_json()["entities"][1] == {
        "head": "dog",
        "modifiers": ["brown"],
        "sub_objects": [],
        "characters": [[33, 36], [45, 50]],
    }


@pytest.mark.parametrize(
    ("prompt", "entities", "message"),
    [
        ("", None, "prompt: '' has no words"),
        (" , .", None, "has no words"),
        ("a cat", ["dog"], "the word 'dog' of 'dog' is not in the prompt 'a cat'"),
        ("a red circle", ["red circle", "circle"], "'red circle' and 'circle' share the word 'circle'"),
        ("a dog that is red", ["red dog"], r"mark the noun by a star: 'red dog\*'"),
        ("a cat and a cat", ["cat* and the"], "the word 'cat' of 'cat. and the' is 2 times"),
        ("a cat", [], r"entities: given \[\]"),
        ("a cat", ["  "], "needs words of the prompt"),
        ("a dog", parse("a cat").entities, "'cat' is not at character 2"),
    ],
)
def test_mistakes_are_named(prompt, entities, message):
    with pytest.raises(ValueError, match=message):
        parse(prompt, entities=entities)


def test_columns_come_from_spans():
    prompt = "a reddish ring"
    (ring,) = parse(prompt).entities
    spans = torch.tensor([[0, 0], [0, 1], [2, 5], [5, 9], [9, 14], [0, 0]])
    assert columns(ring.words, spans) == [2, 3, 4]
    assert columns([ring.head], spans.tolist()) == [4]
    with pytest.raises(
        ValueError, match=r"'ring' \(character 10\) has no place among the 4 features of CLIP.*too long"
    ):
        columns(ring.words, spans[:4], "CLIP")


@pytest.mark.parametrize("split", SPLITS[:-1])
def test_captions_of_shapes_are_grouped_as_their_words_say(split):
    """The roles that the captions give every word are the answer: heads and modifiers, of second mentions too."""
    doubtful = 0
    for index, item in enumerate(sample_scenes(ShapesConfig(mode="text", split=split, max_objects=4), range(100))):
        said = caption(item, split, index)
        groups: dict[int, list[str]] = {}
        for token in said.tokens:
            if token.role in ("size", "texture", "colour", "object"):
                groups.setdefault(token.object, []).append(token.word)
        found = parse(said.text)
        assert [[word.text for word in entity.words] for entity in found.entities] == list(groups.values()), said.text
        assert not found.rest
        doubtful += any(entity.doubt for entity in found.entities)
    assert doubtful == 0


@pytest.mark.parametrize(("split", "profile"), [("holding", {}), ("train", {"holding": 1.0})])
def test_what_objects_hold_are_sub_objects_as_the_words_say(split, profile):
    """700 captions: whose the words are, who holds what, and the same sentence without what is held."""
    held = 0
    for index, item in enumerate(sample_scenes(ShapesConfig(mode="text", split=split, **profile), range(350))):
        said = caption(item, split, index)
        count = len(said.facts.objects)
        groups: dict[int, list[str]] = {}
        for token in said.tokens:
            if token.role in ("size", "texture", "colour", "object"):
                groups.setdefault(token.object, []).append(token.word)
        holds = {one.holder: groups[count + number] for number, one in enumerate(said.facts.held)}
        found = parse(said.text)
        mentioned = [group for group in groups if group < count]  # in the order of the sentence
        for group, entity in zip(mentioned, found.entities, strict=True):
            inner = [[word.text for word in one.words] for one in entity.sub_objects]
            assert inner == ([holds[group]] if group in holds else []), said.text
            tied = {word for one in entity.sub_objects for word in one.words}
            assert [word.text for word in entity.words if word not in tied] == groups[group], said.text
        own = [t for t in said.tokens if t.object < count and t.role != "holding"]
        assert found.short.replace(",", " ,").split() == [token.word for token in own]
        assert not found.rest
        found.check()
        held += len(holds)
    assert held == 700 if split == "holding" else held > 70


def test_a_parser_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "textblob.en", None)
    with pytest.raises(ValueError, match="parser: textblob needs the package"):
        parse("a cat", parser="textblob")
    with pytest.raises(ValueError, match="parser: given 'nltk', must be one of grammar, textblob, spacy"):
        parse("a cat", parser="nltk")


@pytest.mark.skipif(importlib.util.find_spec("textblob") is None, reason="TextBlob, an optional parser, is not here")
@pytest.mark.parametrize("prompt", FEW)
def test_textblob_agrees_where_the_grammar_is_sure(prompt):
    found = parse(prompt, parser="textblob")
    assert [describe(entity) for entity in found.entities] == FEW[prompt]
    assert isinstance(found.entities[0], Entity)


@pytest.mark.skipif(importlib.util.find_spec("spacy") is None, reason="spaCy, an optional parser, is not here")
@pytest.mark.parametrize("prompt", FEW)
def test_spacy_agrees_where_the_grammar_is_sure(prompt):
    import spacy

    if not any(name.startswith("en_") for name in spacy.util.get_installed_models()):
        pytest.skip("spaCy has no English model here, and none is fetched")
    assert [describe(entity) for entity in parse(prompt, parser="spacy").entities] == FEW[prompt]
