"""`imgtok check`: a part that is wrong elsewhere is found and named, and what the precision explains is not."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from pathlib import Path

import kinds
import pytest
import torch
from torch import Tensor, nn

from imgtok import hub
from imgtok.cli import main
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.generators.pipeline import Pipeline
from imgtok.sample import check as job
from imgtok.sample.parting import Comparison, Error, Row, Stage, error_of, floor_of, moved
from imgtok.tokenizers.tokens import Tokens

BF16 = 2.0**-8


class Layer(nn.Module):
    """Two projections, one of which can be made wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.nn.functional.gelu(self.first(x)))


class Stack(nn.Module):
    """Layers, and a rounding at the end that no module makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def rows(copy: nn.Module, reference: nn.Module) -> list[Row]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    half = Comparison(reference, copy, lambda: torch.autocast("cpu", torch.bfloat16), BF16)
    return list(half.rows(Stage("pass", lambda model: model(x))))


@pytest.fixture(scope="module")
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def test_bf16_explains_its_own_rounding(stack):
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    found = rows(copy.deepcopy(stack), stack)
    assert [row.part for row in found] == ["stem", "layers", ""]
    assert all(0 < row.error.relative < row.explained.relative < 0.2 and not row.parts for row in found)
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


def test_a_wrong_module_is_named_and_those_around_it_agree(stack):
    other = copy.deepcopy(stack)
    other.layers[1].second.weight.data[3] *= 1.5  # one channel in one of three layers
    found = rows(other, stack)
    assert [row.part for row in found if row.parts] == ["layers", ""]
    assert found[1].place == "layers.1.second"


def test_what_is_wrong_between_the_modules_is_told_from_them(stack):
    other = copy.deepcopy(stack)
    other.forward = lambda x: Stack.forward(other, x).roll(1, 0)
    assert [(row.part, row.parts) for row in rows(other, stack)] == [("stem", False), ("layers", False), ("", True)]


@pytest.mark.parametrize("fault", ["nan", "raises"])
def test_numbers_that_are_none_and_parts_that_cannot_run_are_named(stack, fault):
    other = copy.deepcopy(stack)
    if fault == "nan":
        other.layers[2].first.bias.data[0] = float("nan")
    else:
        other.layers[2].first.forward = lambda x: (_ for _ in ()).throw(NotImplementedError("no such operator here"))
    found = {row.part: row for row in rows(other, stack)}
    assert found["layers"].parts
    assert found["layers"].place == "layers.2.first"
    assert found["layers"].failed == ("" if fault == "nan" else "no such operator here")
    assert not found["stem"].parts


class Chain(nn.Module):
    """Draws eight ids, the first of which is far from another one, and the second near; the others follow from them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1, bias=False)
        self.scale.weight.data.fill_(1.003)

    def draw(self) -> Tensor:
        value = self.scale(torch.ones(2, 1))
        ids = [(value > 0.7).long(), (value > 1.002).long()]
        for _ in range(6):
            ids.append((ids[-1] + ids[-2]) % 3)
        return torch.cat(ids, dim=1)


@pytest.mark.parametrize(("weight", "parts"), [(1.003, False), (0.5, True)])
def test_an_id_that_differs_early_is_explained_where_moved_weights_draw_another_one_too(weight, parts):
    """bf16 rounds 1.003 to 1, so that all but the first id change; weights that are moved once draw the same ids, and
    those of a later seed do not. No rounding explains another first id."""
    reference, other = Chain(), Chain()
    other.scale.weight.data.fill_(weight)
    half = Comparison(reference, other, lambda: torch.autocast("cpu", torch.bfloat16), BF16)
    (row,) = half.rows(Stage("draw", lambda model: model.draw(), draws=1, whole=True))
    assert row.error.relative == (1.0 if parts else 7 / 8)  # some of the later ids are the same by chance
    assert row.explained.relative == 7 / 8
    assert row.parts is parts
    if parts:
        expected = "They part in draw: earlier than bf16 explains. What is listed before it agrees"
        assert expected in job.verdict(row, "bf16")


def test_errors_of_ids_are_shares_and_of_shapes_without_bound():
    ids = torch.tensor([[1, 2], [3, 4]])
    assert error_of(ids, torch.tensor([[1, 2], [3, 5]])) == Error(1.0, 0.25, of_ids=True)
    assert floor_of(Tokens.full(ids), 0.1) == Error(1.0, 0.5, of_ids=True)
    assert error_of(ids, ids[:, :1]).relative == 1.0
    assert error_of(torch.ones(2), torch.ones(3)).relative == float("inf")
    assert error_of((torch.tensor([3.0, 4.0]), ids), (torch.tensor([3.0, 4.5]), ids)) == Error(0.5, 0.1)


def test_what_is_moved_takes_types_and_functions_of_the_other_copy():
    there = moved({"x": torch.ones(2), "turn": abs, "n": 3}, like={"x": torch.ones(2).bfloat16(), "turn": len, "n": 3})
    assert there["x"].dtype == torch.bfloat16
    assert there["turn"] is len


# ---------------------------------------------------------------- the job


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A generator with its tokenizer."""
    monkeypatch.chdir(tmp_path)
    tokenizer = kinds.build(kinds.LINES["vq"])
    config = kinds.GPT | {"vocab_size": 16, "num_tokens": tokenizer.num_tokens}
    line = kinds.Line(config=kinds.GPTConfig(**config), step=kinds.gpt_step)
    Pipeline(kinds.build(line), tokenizer, device="cpu").save_pretrained("model")
    return Path("model")


def test_the_job_checks_a_generator_and_its_decoder(folder, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    assert main(["check", str(folder), "precision=bf16", "device=cpu", "out=table.json"]) == 0
    table = json.loads(Path("table.json").read_text())
    stages = list(dict.fromkeys(row["stage"] for row in table["rows"]))
    assert stages == ["encode", "decode", "pass", "draw"]
    assert not any(row["parts"] for row in table["rows"])
    assert all(row["explained"]["relative"] < 0.5 for row in table["rows"] if row["stage"] != "draw")
    assert "No part is further from the CPU than bf16 explains." in caplog.text

    def broken(model, device, config):
        other = copy.deepcopy(model)
        if isinstance(other, ConditionalGenerator):
            other.blocks[1].mlp_norm.weight.data *= 1.5
        return other

    monkeypatch.setattr(job, "copied", broken)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(folder), "--precision", "bf16", "device=cpu"])
    assert stop.value.code == 1
    assert "They part first in pass, in blocks, in blocks.1.mlp_norm: relative error" in caplog.text


@pytest.mark.parametrize(("words", "said"), [
    (["device=cpu"], "device: the CPU in fp32 is what others are compared with"),
    (["device=abacus"], "device: given 'abacus', which torch cannot use here (cpu"),
    (["precision=int8"], "precision"),
])  # fmt: skip
def test_mistakes_are_named(folder, words, said, capsys):
    assert main(["check", str(folder), *words]) == 2
    assert said in capsys.readouterr().err
    assert main(["check", "model/tokenizer", "tokenizer=model", "precision=bf16"]) == 2
    assert "tokenizer: model/tokenizer is no generator and has none" in capsys.readouterr().err


# ---------------------------------------------------------------- every kind

ARITHMETIC = {"bf16": (torch.bfloat16, False), "weights": (torch.bfloat16, True), "fp16": (torch.float16, False)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ARITHMETIC)
@pytest.mark.parametrize("name", sorted(kinds.FIRST_OF_KIND))
def test_every_kind_agrees_with_itself(name, how):
    line, (dtype, weights) = kinds.LINES[name], ARITHMETIC[how]
    model = kinds.build(line)
    if isinstance(model, ConditionalGenerator):
        if weights and model.learns_from == "latents":
            pytest.skip("trained on latents in float32, under autocast")
        given = kinds.inputs(model, 2)
        stages = [Stage("pass", lambda model: model(*moved(given), generator=torch.Generator().manual_seed(0)))]
    else:
        images = kinds.images(model, 2)
        encoded = model.encode(images)
        stages = [
            Stage("encode", lambda model: model.encode(images)),
            Stage("decode", lambda model: model.decode(moved(encoded), **line.short)),
        ]

    def arithmetic() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if weights else torch.autocast("cpu", dtype)

    other = Comparison(
        model, copy.deepcopy(model).to(dtype if weights else None), arithmetic, torch.finfo(dtype).eps / 2
    )
    found = [row for stage in stages for row in other.rows(stage)]
    assert [row for row in found if row.parts] == []
    assert {row.part for row in found} > {""}


def test_every_kind_of_the_hub_is_in_that_test():
    assert {kinds.LINES[name].config.kind for name in kinds.FIRST_OF_KIND} == set(hub.KINDS)
