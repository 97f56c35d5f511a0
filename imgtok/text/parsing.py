"""The things that a prompt names, and the words that belong to each.

A prompt becomes entities: a head noun, its modifiers, the things tied to it ("wearing a hat"), and the places where it
is named again (", the red circle is above ..."). Words are characters of the prompt; the columns of a text encoder that
stand for them come from the spans of its pieces (`columns`), so nothing is matched by the text of a piece. Anchors and
the shortened prompt come from the same parse, and cannot fall out of step with the groups.

The grammar is one of closed classes (shared/design/prompt_controls.md, section 8): determiners, prepositions,
conjunctions, copulas and links end a run of words, and the last word of a run is its head. `textblob` and `spacy`, if
they and their data are installed, say which words are verbs in place of the lists; nothing is ever fetched. Entities
that the caller names are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Parser = Literal["grammar", "textblob", "spacy"]
PARSERS: tuple[Parser, ...] = ("grammar", "textblob", "spacy")


class Word(NamedTuple):
    """A word of a prompt: the characters [start, stop)."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Entity:
    """One thing that a prompt names."""

    head: Word
    """Its noun."""
    modifiers: tuple[Word, ...] = ()
    """Adjectives and noun adjuncts, predicates too ("the dog is red")."""
    sub_objects: tuple[Entity, ...] = ()
    """Things tied to it by "wearing", "with", "holding" and the like."""
    mentions: tuple[Entity, ...] = ()
    """Where the same thing is named again."""
    core: tuple[int, int]
    """The characters of the noun phrase itself: "a red circle"."""
    phrase: tuple[int, int]
    """The characters with what is tied to it: "a red circle holding a small star"."""
    doubt: str = ""
    """Why the parser is not sure of it; empty if it is."""

    @property
    def words(self) -> tuple[Word, ...]:
        """Every word that belongs to it, in the order of the prompt."""
        own = [self.head, *self.modifiers]
        for other in (*self.sub_objects, *self.mentions):
            own += other.words
        return tuple(sorted(own, key=lambda word: word.start))


@dataclass(frozen=True, kw_only=True)
class Parse:
    """What was understood of a prompt."""

    prompt: str
    parser: Literal["grammar", "textblob", "spacy", "given"]
    """Who said so; `given` are entities that the caller named."""
    entities: tuple[Entity, ...]
    rest: tuple[Word, ...] = ()
    """Words of which nothing was made, such as verbs."""

    def text_of(self, entity: Entity) -> str:
        """The phrase of an entity as text."""
        return self.prompt[slice(*entity.phrase)]

    @property
    def short(self) -> str:
        """The prompt without what is tied to its entities: "a cat and a dog" of two that wear something."""
        kept, end = "", 0
        for entity in sorted(self.entities, key=lambda one: one.core):
            kept += self.prompt[end : entity.core[1]]
            end = max(entity.core[1], entity.phrase[1])
        return kept + self.prompt[end:]

    def check(self) -> None:
        """Raises ValueError if the parser is not sure of an entity: nothing is merged by a guess."""
        for entity in self.entities:
            if entity.doubt:
                raise ValueError(
                    f"prompt: not sure what belongs to {entity.head.text!r} in {self.prompt!r}: {entity.doubt}; say it "
                    f"with entities=..., such as entities={self.example()}"
                )

    def example(self) -> list[str]:
        """The entities as `parse` takes them, where somebody is to say them: the noun is marked by a star."""
        return [_example(self.prompt, entity) for entity in self.entities]

    def lines(self) -> list[str]:
        """The entities in words, one a line."""
        if not self.entities:
            return [f"{self.prompt!r} names nothing that the parser ({self.parser}) knows"]
        found = [
            f"{describe(entity)}{f' (doubtful: {entity.doubt})' if entity.doubt else ''}" for entity in self.entities
        ]
        return found + ([f"not used: {' '.join(word.text for word in self.rest)}"] if self.rest else [])

    def as_json(self) -> dict[str, Any]:
        """The same as lists and words, to store with the images."""
        return {
            "prompt": self.prompt,
            "parser": self.parser,
            "entities": [_as_json(entity) for entity in self.entities],
            "rest": [word.text for word in self.rest],
        }


def describe(entity: Entity) -> str:
    """An entity in words: its head, what modifies it, what is tied to it, and how often it is named again."""
    parts = [entity.head.text]
    if entity.modifiers:
        parts.append(": " + ", ".join(word.text for word in entity.modifiers))
    if entity.sub_objects:
        parts.append("; with " + " and with ".join(describe(one) for one in entity.sub_objects))
    if entity.mentions:
        parts.append(f"; named again {len(entity.mentions)} time{'s' if len(entity.mentions) > 1 else ''}")
    return "".join(parts)


def _as_json(entity: Entity) -> dict[str, Any]:
    found: dict[str, Any] = {
        "head": entity.head.text,
        "modifiers": [word.text for word in entity.modifiers],
        "sub_objects": [_as_json(one) for one in entity.sub_objects],
        "characters": [[word.start, word.stop] for word in entity.words],
    }
    return found | ({"doubt": entity.doubt} if entity.doubt else {})


def _example(prompt: str, entity: Entity) -> str:
    """Its words in the order of the prompt, with the noun marked; as it stands there if other things are tied to it."""
    if entity.sub_objects:
        return prompt[slice(*entity.phrase)]
    own = sorted((*entity.modifiers, entity.head), key=lambda word: word.start)
    return " ".join(f"{word.text}*" if word == entity.head else word.text for word in own)


def columns(
    words: Sequence[Word], spans: Tensor | Sequence[Sequence[int]], what: str = "the text encoder"
) -> list[int]:
    """The columns, in order, of which the spans (T, 2) share characters with any of the words.

    Spans are characters [start, stop) of the prompt, [0, 0) for marks and padding: `Captions.spans[row]`, or the
    `offset_mapping` of a fast tokenizer. Raises ValueError for a word without a column: the prompt was cut off.
    """
    pairs: list[Sequence[int]] = [[int(end) for end in span] for span in spans]
    found: set[int] = set()
    for word in words:
        own = [column for column, (start, stop) in enumerate(pairs) if start < word.stop and stop > word.start]
        if not own:
            raise ValueError(
                f"prompt: {word.text!r} (character {word.start}) has no place among the {len(pairs)} features of "
                f"{what}: the prompt is too long for it; shorten it"
            )
        found.update(own)
    return sorted(found)


def parse(prompt: str, *, parser: Parser = "grammar", entities: Sequence[str | Entity] | None = None) -> Parse:
    """The entities of a prompt, by a parser or as given.

    An entity is given by words of the prompt: "red circle", "cat wearing a hat" (the last word of a run is its head,
    links tie sub-objects to it), or words from any place with the head marked, "dog* red"; or as an `Entity`. Raises
    ValueError for an empty prompt, a parser that is not installed, an entity that is not in the prompt, and two that
    share a word.
    """
    words = tuple(_words(prompt))
    if not any(_class_of(word.text) not in ("conj", "mark") for word in words):
        raise ValueError(f"prompt: {prompt!r} has no words; there is nothing to control")
    if entities is not None:
        chosen = _given(prompt, words, entities)
        return Parse(prompt=prompt, parser="given", entities=chosen, rest=_unused(words, chosen))
    if parser not in _TAGGERS:
        raise ValueError(f"parser: given {parser!r}, must be one of {', '.join(PARSERS)}")
    tagged = _places(_TAGGERS[parser](prompt, words))
    found = tuple(_Scan(prompt, tagged).entities())
    return Parse(prompt=prompt, parser=parser, entities=found, rest=_unused(words, found))


def _words(prompt: str) -> Iterator[Word]:
    for match in re.finditer(r"\w+(?:['’\-]\w+)*|[^\w\s]", prompt):
        yield Word(match.group(), match.start(), match.end())


def _unused(words: Sequence[Word], entities: Sequence[Entity]) -> tuple[Word, ...]:
    """The words of open classes that belong to no entity."""
    used = {word for entity in entities for word in entity.words}
    return tuple(word for word in words if word not in used and _unread(word.text))


def _unread(text: str) -> bool:
    """Whether a word says something that no entity holds."""
    return _class_of(text) == "content" or (_class_of(text) == "verb" and text.lower() not in _BINDING_VERBS)


# ---------------------------------------------------------------- classes of words

Class = Literal["det", "prep", "link", "conj", "copula", "relative", "place", "verb", "content", "mark"]


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _set(
    "a an the this that these those some any every each no another my your his her its our their one two three four "
    "five six seven eight nine ten several many few both"
)
_PREPOSITIONS = _set(
    "of in on at by to from into onto under below above over beside besides near behind between through against around "
    "inside outside across next along among beneath underneath within toward towards upon as like for during"
)
_LINKS = _set("with wearing holding carrying having containing")
_CONJUNCTIONS = _set("and or but , ; .")
_COPULAS = _set("is are was were be been being looks seems appears")
_RELATIVES = _set("that which who whose")
_PLACES = _set("left right top bottom center centre middle front back side background foreground corner edge")
_VERBS = _set(
    "has have had hold holds held wear wears wore carry carries carried sit sits sat stand stands stood lie lies lay "
    "run runs ran walk walks eat eats play plays fly flies ride rides jump jumps sleep sleeps rest rests hang hangs "
    "hung look looks watch watches contain contains stay stays show shows grow grows float floats lean leans there it"
)
_BINDING_VERBS = _set("has have had hold holds held wear wears wore carry carries carried contain contains")
_NOUNS_IN_ING = _set(
    "ring building king wing string spring swing earring painting ceiling railing clothing pudding wedding evening "
    "morning thing sibling lightning sterling drawing stocking dressing duckling sling darling icing"
)
COLOURS = _set(
    "red green blue yellow orange purple cyan pink black white brown grey gray gold golden silver beige violet "
    "turquoise magenta teal maroon navy"
)
"""Adjectives that stand for no thing when they end a run."""


def _class_of(text: str) -> Class:
    """The class of a word in itself; what stands around it may still change it."""
    word = text.lower()
    classes: tuple[tuple[Class, frozenset[str]], ...] = (
        ("conj", _CONJUNCTIONS),
        ("relative", _RELATIVES - {"that"}),
        ("det", _DETERMINERS),
        ("link", _LINKS),
        ("prep", _PREPOSITIONS),
        ("copula", _COPULAS),
        ("verb", _VERBS),
        ("place", _PLACES),
    )
    for name, members in classes:
        if word in members:
            return name
    return "content" if re.match(r"\w", word) else "mark"


class Tagged(NamedTuple):
    """A word and its class."""

    word: Word
    kind: Class


def _grammar(prompt: str, words: Sequence[Word]) -> list[Tagged]:
    """Classes by the lists above, and by what stands around a word in -ing."""
    kinds = [_class_of(word.text) for word in words]
    for k, word in enumerate(words):
        text = word.text.lower()
        if text == "that" and k and kinds[k - 1] == "content":
            kinds[k] = "relative"
        after = kinds[k + 1] if k + 1 < len(words) else "mark"
        if kinds[k] == "content" and text.endswith("ing") and text not in _NOUNS_IN_ING:
            named = k > 0 and kinds[k - 1] == "content"
            # "a cat sitting on a chair" and "a man riding a horse", but "a running dog"
            kinds[k] = "verb" if after in ("prep", "det") or (named and after != "content") else "content"
    return [Tagged(word, kind) for word, kind in zip(words, kinds, strict=True)]


def _textblob(prompt: str, words: Sequence[Word]) -> list[Tagged]:
    """Classes by the tags of TextBlob's own lexicon, which comes with the package."""
    try:
        from textblob.en import tag
    except ImportError as error:
        raise ValueError(f"parser: textblob needs the package {error.name}; pip install 'imgtok[parsing]'") from error
    tags = [str(name) for _, name in tag(" ".join(word.text for word in words), tokenize=False)]
    return _by_tags(words, tags)


def _spacy(prompt: str, words: Sequence[Word]) -> list[Tagged]:
    """Classes by spaCy's tags, of the first English model that is installed."""
    try:
        import spacy
    except ImportError as error:
        raise ValueError(f"parser: spacy needs the package {error.name}; or parser=grammar") from error
    models = [name for name in sorted(spacy.util.get_installed_models()) if name.startswith("en_")]
    if not models:
        raise ValueError("parser: spacy has no English model here, and none is fetched; install one, or parser=grammar")
    document = spacy.load(models[0])(prompt)
    tags = {token.idx: str(token.tag_) for token in document}
    return _by_tags(words, [tags.get(word.start, "NN") for word in words])


def _by_tags(words: Sequence[Word], tags: Sequence[str]) -> list[Tagged]:
    """Closed classes by the lists, and which of the others are verbs by their Penn Treebank tags.

    Taggers take nouns after a colour for verbs ("brown bear"), so a verb is one only before a determiner or a
    preposition.
    """
    kinds = [_class_of(word.text) for word in words]
    for k, tag in enumerate(tags):
        after = kinds[k + 1] if k + 1 < len(kinds) else "mark"
        if kinds[k] == "content" and (tag in ("RB", "MD") or (tag[:2] == "VB" and after in ("det", "prep"))):
            kinds[k] = "verb"
        if words[k].text.lower() == "that" and k and kinds[k - 1] == "content":
            kinds[k] = "relative"
    return [Tagged(word, kind) for word, kind in zip(words, kinds, strict=True)]


_TAGGERS: dict[str, Callable[[str, Sequence[Word]], list[Tagged]]] = {
    "grammar": _grammar,
    "textblob": _textblob,
    "spacy": _spacy,
}


def _places(tagged: Sequence[Tagged]) -> list[Tagged]:
    """Words such as "left" say a place only where no noun follows: "the left shoe" is a thing."""
    found = list(tagged)
    for k in reversed(range(len(found))):
        follows = k + 1 < len(found) and found[k + 1].kind == "content"
        if found[k].kind == "place" and follows:
            found[k] = Tagged(found[k].word, "content")
    return found


# ---------------------------------------------------------------- from classes to entities

_LONG_RUN = 5


@dataclass
class _Run:
    """A noun phrase: its words of open classes, and whether a determiner stands before them."""

    words: list[Word] = field(default_factory=list)
    determiner: Word | None = None

    @property
    def definite(self) -> bool:
        return self.determiner is not None and self.determiner.text.lower() in ("the", "this", "that", "these", "those")

    @property
    def adjectives_only(self) -> bool:
        return all(word.text.lower() in COLOURS for word in self.words)

    def entity(self, before: Sequence[Word] = ()) -> Entity:
        """With more modifiers from a run before it ("red and blue ball")."""
        *modifiers, head = self.words
        start = (self.determiner or (*before, *self.words)[0]).start
        doubt = ""
        if len(self.words) >= _LONG_RUN:
            doubt = f"{len(self.words)} words in a row, of which one may be a verb"
        elif head.text.lower() in COLOURS:
            doubt = f"{head.text!r} may describe something else"
        characters = (start, head.stop)
        return Entity(head=head, modifiers=(*before, *modifiers), core=characters, phrase=characters, doubt=doubt)


class _Scan:
    """One pass over the words of a prompt, from left to right."""

    def __init__(self, prompt: str, tagged: Sequence[Tagged]) -> None:
        self.prompt, self.tagged = prompt, tagged
        self.found: list[Entity] = []
        self.current: int | None = None  # the entity that a link or a predicate would belong to
        self.link = self.predicate = False
        self.waiting = _Run()  # adjectives before a conjunction

    def entities(self) -> list[Entity]:
        run = _Run()
        for k, (word, kind) in enumerate(self.tagged):
            if kind == "content":
                run.words.append(word)
                continue
            if run.words:
                joins = kind == "conj" and self._joins(k)
                self._add(run, joins)
                run = _Run()
            self._separator(word, kind)
            run.determiner = word if kind == "det" else run.determiner if kind == "place" else None
        if run.words:
            self._add(run, joins=False)
        return self.found

    def _joins(self, k: int) -> bool:
        """Whether the conjunction at k is followed by words without a determiner: "a red and blue ball"."""
        return k + 1 < len(self.tagged) and self.tagged[k + 1].kind == "content"

    def _separator(self, word: Word, kind: Class) -> None:
        text = word.text.lower()
        if kind == "link" or (kind == "verb" and text in _BINDING_VERBS):
            self.link, self.predicate = True, False
        elif kind == "copula":
            self.predicate, self.link = True, False
        elif kind in ("prep", "verb", "mark", "place"):
            self.link = self.predicate = False
            self.current = self.current if kind == "place" else None
        elif kind == "conj":
            self.link = False
            self.predicate = self.predicate and text == "and"

    def _add(self, run: _Run, joins: bool) -> None:
        """Makes something of a finished run: a predicate, a sub-object, a mention or an entity of its own."""
        if self.predicate and run.determiner is None and self.current is not None and not self.waiting.words:
            owner = self.found[self.current]
            end = max(owner.phrase[1], run.words[-1].stop)
            self.found[self.current] = replace(
                owner, modifiers=(*owner.modifiers, *run.words), phrase=(owner.phrase[0], end)
            )
            return
        if joins and run.adjectives_only:
            self.waiting.words += run.words
            self.waiting.determiner = self.waiting.determiner or run.determiner
            return
        before, self.waiting = self.waiting, _Run()
        run.determiner = run.determiner or before.determiner
        entity = run.entity(before.words)
        self.predicate = False
        if self.link and self.current is not None:
            owner = self.found[self.current]
            self.found[self.current] = replace(
                owner,
                sub_objects=(*owner.sub_objects, entity),
                phrase=(owner.phrase[0], entity.phrase[1]),
                doubt=owner.doubt or entity.doubt,
            )
            self.link = False
            return
        self.link = False
        if run.definite and self._named_again(entity):
            return
        self.found.append(entity)
        self.current = len(self.found) - 1

    def _named_again(self, entity: Entity) -> bool:
        """Whether it is a second mention of what was named before, and which then is the current one."""
        same = [k for k, one in enumerate(self.found) if _lower(one.head) == _lower(entity.head)]
        wanted = {_lower(word) for word in entity.modifiers}
        fits = [k for k in same if wanted <= {_lower(word) for word in self.found[k].modifiers}]
        if not fits:
            return False
        chosen = self.found[fits[0]]
        doubt = chosen.doubt
        if len(fits) > 1:
            doubt = (
                f"the second {' '.join(word.text for word in (*entity.modifiers, entity.head))!r} may be any of several"
            )
        self.found[fits[0]] = replace(chosen, mentions=(*chosen.mentions, entity), doubt=doubt)
        self.current = fits[0]
        return True


def _lower(word: Word) -> str:
    return word.text.lower()


# ---------------------------------------------------------------- entities that are given


def _given(prompt: str, words: Sequence[Word], entities: Sequence[str | Entity]) -> tuple[Entity, ...]:
    """Entities as the caller names them. Raises ValueError for what is not in the prompt, or in two of them."""
    if isinstance(entities, str) or not entities:
        raise ValueError(f"entities: given {entities!r}; give a list, such as ['red circle', 'blue square']")
    taken: dict[Word, str] = {}
    found: list[Entity] = []
    for one in entities:
        entity = one if isinstance(one, Entity) else _find(prompt, words, one, taken)
        name = one if isinstance(one, str) else " ".join(word.text for word in one.words)
        for word in entity.words:
            if prompt[word.start : word.stop] != word.text:
                raise ValueError(f"entities: {word.text!r} is not at character {word.start} of {prompt!r}")
            if word in taken:
                raise ValueError(
                    f"entities: {taken[word]!r} and {name!r} share the word {word.text!r} of {prompt!r}; a word "
                    "belongs to one entity, so leave it out of one of them"
                )
            taken[word] = name
        found.append(entity)
    return tuple(found)


def _find(prompt: str, words: Sequence[Word], phrase: str, taken: dict[Word, str]) -> Entity:
    """The entity that a phrase names: in one place of the prompt if it stands there, free ones first; or word by word.

    Raises ValueError for words that are not in the prompt, or are there several times and not side by side.
    """
    marked = [word.strip("*").lower() for word in phrase.split() if word.endswith("*")]
    wanted = [word.text.lower() for word in _words(phrase.replace("*", ""))]
    if not wanted or len(marked) > 1:
        raise ValueError(f"entities: {phrase!r} needs words of the prompt, and one head at most marked by *")
    texts = [word.text.lower() for word in words]
    starts = [k for k in range(len(texts)) if texts[k : k + len(wanted)] == wanted]
    own: Sequence[Word]
    if starts:
        free = [k for k in starts if not any(word in taken for word in words[k : k + len(wanted)])]
        first = (free or starts)[0]
        own = words[first : first + len(wanted)]
        if not marked:
            return _of_run(prompt, own, phrase)
    else:
        own = [_single(prompt, words, text, phrase) for text in wanted]
        if not marked:
            raise ValueError(
                f"entities: {phrase!r} is not in {prompt!r} in these words; if they stand apart there, mark the noun "
                f"by a star: '{phrase}*'"
            )
    heads = [word for word in own if word.text.lower() == marked[0]]
    content = tuple(word for word in own if word != heads[0])
    characters = (min(word.start for word in own), max(word.stop for word in own))
    return Entity(head=heads[0], modifiers=content, core=characters, phrase=characters)


def _single(prompt: str, words: Sequence[Word], text: str, phrase: str) -> Word:
    """The one place of a word in the prompt."""
    there = [word for word in words if word.text.lower() == text]
    if len(there) != 1:
        count = "not" if not there else f"{len(there)} times"
        raise ValueError(f"entities: the word {text!r} of {phrase!r} is {count} in the prompt {prompt!r}")
    return there[0]


def _of_run(prompt: str, own: Sequence[Word], phrase: str) -> Entity:
    """The entity that words side by side make: heads are last words of runs, and all after the first are tied to it."""
    found = _Scan(prompt, _places(_grammar(prompt, own))).entities()
    if not found:  # words of closed classes alone, taken as they are
        return replace(_Run(list(own)).entity(), doubt="")
    first, *others = found
    tied = (*first.sub_objects, *others)
    return replace(first, sub_objects=tied, phrase=(first.phrase[0], own[-1].stop), doubt="")
