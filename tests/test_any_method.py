"""A tokenizer and a generator that stand in test files go through all the programs, without an edit elsewhere.

The tokenizer (tests/toy.py) has lengths, slots, rates and a decoder's setting of its own; the generator is below. Two
lines in the hub's tables are all that a new method needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
import toy
from torch import Tensor, nn

import imgtok
from imgtok import hub, randomness
from imgtok.cli import main
from imgtok.config import PositiveFloat, PositiveInt, check
from imgtok.generators.conditioning import ClassSlot, Condition, ConditionalGenerator, ConditionConfig
from imgtok.tokenizers.base import Losses
from imgtok.tokenizers.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class ToySampling:
    """A setting of its own."""

    heat: PositiveFloat = 1.0
    """Divides the logits."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ToyGenConfig(ConditionConfig):
    """Counts of ids at each slot."""

    kind: Literal["toygen"] = "toygen"
    vocab_size: PositiveInt = 16
    """Token ids."""
    num_tokens: PositiveInt = 16
    """Most tokens of an image."""
    num_slots: PositiveInt = 16
    """Slots of the tokenizer."""
    ends: bool = True
    """Whether images have fewer tokens, too."""
    condition: ClassSlot = ClassSlot()
    """Classes."""
    sampling: ToySampling = ToySampling()
    """How it draws unless it is told otherwise."""


class ToyGen(ConditionalGenerator):
    """Draws each slot by itself: its id, or that there is none."""

    learns_from = "tokens"
    config_class: ClassVar[type] = ToyGenConfig
    config: ToyGenConfig

    def __init__(self, config: ToyGenConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.zeros(config.num_classes + 1, config.num_slots, config.vocab_size + 1))
        self._add_text(1)

    def forward(self, content: Tokens, condition: Condition, *, generator: torch.Generator) -> Losses:
        condition = self._drop_some(condition, generator)
        content, config = content.padded(), self.config
        assert content.slots is not None
        absent = torch.full((len(content), config.num_slots + 1), config.vocab_size, device=content.ids.device)
        slots = content.slots.masked_fill(~content.mask, config.num_slots)
        targets = absent.scatter(1, slots, content.ids)[:, :-1]
        loss = F.cross_entropy(self.table[condition].flatten(0, 1), targets.flatten())
        return Losses(loss, {"cross_entropy": loss})

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        *,
        seed: int,
        indices: Sequence[int],
        sampling: ToySampling | None = None,
        num_tokens: int | None = None,
        on_step: Callable[..., None] | None = None,
    ) -> Tokens:
        condition = self._checked(condition)
        assert isinstance(condition, Tensor)
        laws = (self.table[condition] / (sampling or self.config.sampling).heat).softmax(dim=-1)
        uniforms = randomness.uniform(seed, indices, (self.config.num_slots, 1)).to(laws)
        drawn = torch.searchsorted(laws.cumsum(dim=-1), uniforms).squeeze(-1).clamp(max=self.config.vocab_size)
        drawn[:, 0] = drawn[:, 0].clamp(max=self.config.vocab_size - 1)  # one token at least
        there = drawn < self.config.vocab_size
        slots = (~there).int().argsort(dim=1, stable=True)
        return Tokens(drawn.gather(1, slots), there.sum(dim=1), slots).padded()

    def check_decoder(self, decoder: nn.Module) -> None:
        if getattr(decoder, "num_slots", None) != self.config.num_slots:
            raise ValueError("the tokenizer has other slots")


@pytest.fixture
def known(monkeypatch):
    toy.enter(monkeypatch)
    monkeypatch.setitem(hub.GENERATORS, "toygen", f"{__name__}:ToyGen")


DATA = "data={kind: shapes, num_images: 64}"
TRAINING = "training={steps: 2, batch_size: 4, learning_rate: 0.1, trackers: [], log_every: 1}"


@pytest.mark.usefixtures("known")
def test_a_new_method_goes_through_all_the_programs(tmp_path, capsys):
    def run(*words: object) -> str:
        assert main([*map(str, words)]) == 0
        return capsys.readouterr().out

    tokenizer, generator = tmp_path / "tokenizer/final", tmp_path / "generator/final"
    validate = "training.validate_every=1"
    words = (DATA, TRAINING, "model.kind=toytok", "num_preview=2", validate)
    run("train", "tokenizer", f"out={tmp_path / 'tokenizer'}", *words)
    run("cache", tokenizer, f"out={tmp_path / 'tokens'}", DATA)
    cached = (f"tokens={tmp_path / 'tokens'}", f"tokenizer={tokenizer}", "num_preview=2")
    run(
        "train",
        "generator",
        f"out={tmp_path / 'generator'}",
        *cached,
        TRAINING,
        "model.kind=toygen",
        "held_out=0.25",
        validate,
    )
    for job in ("tokenizer", "generator"):
        lines = [json.loads(line) for line in (tmp_path / job / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "validation/loss" in line] == [0, 1, 2]
    model: Any = imgtok.load(generator)
    assert isinstance(model, ToyGen)
    assert (model.config.vocab_size, model.config.num_slots, model.config.num_classes) == (16, 16, 64)
    assert "heat" in run("info", generator)
    drawn = (f"out={tmp_path / 'samples'}", "num=4", "sampling.heat=2", "decoding.contrast=0.5")
    run("sample", generator, *drawn)
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 4
    run("reconstruct", tokenizer, f"out={tmp_path / 'reconstructed.png'}", DATA, "num=4", "rates=[16@0.05]")
    scores = tmp_path / "scores.json"
    run("evaluate", f"tokenizer={tokenizer}", f"out={scores}", DATA, "metrics=[psnr]")
    assert "psnr" in json.dumps(json.loads(scores.read_text()))
    run("evaluate", f"model={generator}", f"out={tmp_path / 'drawn.json'}", DATA, "metrics=[oracle]", "num=8")
    assert "oracle" in (tmp_path / "drawn.json").read_text()


def test_no_program_names_a_method():
    """Classes of methods may be imported for their configurations; what a program does asks the model."""
    names = re.compile(r"XAR|FlexTok|GPT|\bVAE\b|\bKARL|TokenBridge")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("train", "sample")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if names.search(line)
    ]
    allowed = re.compile(r"^\S+: (from \S+ import [\w, ]*Config\b|\"\"\"|#)")
    assert [line for line in found if not allowed.match(line)] == []
