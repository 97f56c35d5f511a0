"""`init` with other classes, captions, tokens, latents, resolution: what is kept, what starts afresh, what is said."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import kinds
import pytest
import torch
from torch import Tensor

from imgtok import hub
from imgtok.generators.conditioning import ClassSlot, StartPlusClass
from imgtok.generators.gpt import TOKEN_PARTS, GPTConfig
from imgtok.tokenizers.flextok import FlexTokConfig, ShortRuns
from imgtok.train.initialise import Init, start_from

PLAIN = kinds.LINES["gpt"].config


class Started(NamedTuple):
    """The weights of three models: there, here at first, and here from there; and what was said."""

    there: dict[str, Tensor]
    first: dict[str, Tensor]
    here: dict[str, Tensor]
    new: set[str]
    said: str

    def kept(self, name: str) -> bool:
        return self.there[name].shape == self.here[name].shape and torch.equal(self.here[name], self.there[name])


@pytest.fixture
def start(tmp_path: Path, caplog) -> Any:
    def begin(there: Any, here: Any, *new: str) -> Started:
        model = kinds.build(kinds.Line(config=there, step=kinds.gpt_step))
        model.save_pretrained(tmp_path)
        torch.manual_seed(1)
        other = kinds.class_of(here.kind)(here)
        first = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with caplog.at_level(logging.INFO):
            names = start_from(other, Init(there, hub.resolve(tmp_path)), new)
        return Started(model.state_dict(), first, other.state_dict(), set(names), caplog.text)

    return begin


def classes(*names: str, count: int = 0, kind: Any = ClassSlot) -> GPTConfig:
    return replace(PLAIN, condition=kind(num_classes=count or len(names), classes=names))


TABLE = "class_embedding.weight"


def test_classes_keep_the_rows_of_their_names(start):
    found = start(classes("cat", "dog", "owl"), classes("owl", "fox"))
    assert torch.equal(found.here[TABLE][0], found.there[TABLE][2])
    assert torch.equal(found.here[TABLE][1], found.first[TABLE][1])
    assert torch.equal(found.here[TABLE][2], found.there[TABLE][3]), "no class"
    assert found.new == {TABLE}
    assert "1 of 2 classes keep the row that their name has there (such as owl), the others start afresh" in found.said
    assert all(found.kept(name) for name in found.there if name != TABLE)


def test_the_same_classes_in_another_order_are_found_again(start):
    found = start(classes("cat", "dog", kind=StartPlusClass), classes("dog", "cat", kind=StartPlusClass))
    assert torch.equal(found.here[TABLE], found.there[TABLE].flip(0))


def test_classes_without_names_start_afresh_if_their_number_differs(start):
    found = start(classes(count=3), classes(count=5))
    assert torch.equal(found.here[TABLE][:-1], found.first[TABLE][:-1])
    assert torch.equal(found.here[TABLE][-1], found.there[TABLE][-1])
    assert "3 classes there, 5 here, and the classes of one of the two have no names: all start afresh" in found.said


def test_as_many_classes_of_other_names_keep_their_rows_and_it_is_said(start):
    found = start(classes("n01", "n02"), classes("cat", "dog"))
    assert found.kept(TABLE)
    assert "no class of 2 has the name of one there; each keeps its row" in found.said


def test_what_init_new_names_is_not_fitted(start):
    found = start(classes("cat", "dog", "owl"), classes("owl", "fox"), TABLE)
    assert torch.equal(found.here[TABLE], found.first[TABLE])


@pytest.mark.parametrize("name", ["gpt-text", "gpt-prefix", "xar-text"])
def test_another_caption_encoder_has_another_projection(start, name):
    there = kinds.LINES[name].config
    found = start(there, there.with_condition(text_width=20, text_length=7, empty_length=2))
    assert "a caption has features of 20 numbers here, of 12 there: text_proj starts afresh" in found.said
    for key in found.new:
        assert key == "positions" or torch.equal(found.here[key], found.first[key]), key
    allowed = ("text_proj.", "empty_caption", "no_caption", "positions")
    assert all(found.kept(key) for key in found.there if not key.startswith(allowed))


def test_another_tokenizer_has_other_tables_of_tokens_and_the_generator_is_kept(start):
    found = start(PLAIN, replace(PLAIN, vocab_size=24, num_tokens=14))
    assert "tokens of another kind (vocab_size is 24 here, 60 there): what reads and draws them starts" in found.said
    assert "at most 14 tokens here, 9 there: the first 9 places are kept, and 5 start afresh" in found.said
    for key in found.here:
        if key.split(".")[0] in TOKEN_PARTS:
            assert torch.equal(found.here[key], found.first[key]), key
        elif key != "positions":
            assert found.kept(key), key
    assert torch.equal(found.here["positions"][:9], found.there["positions"])
    assert torch.equal(found.here["positions"][9:], found.first["positions"][9:])
    fewer = start(PLAIN, replace(PLAIN, num_tokens=4))
    assert torch.equal(fewer.here["positions"], fewer.there["positions"][:4])


@pytest.mark.parametrize("name", ["xar", "tokenbridge"])
def test_another_autoencoder_has_other_ends_and_the_generator_is_kept(start, name):
    there = kinds.LINES[name].config
    found = start(there, replace(there, latent_channels=6))
    assert f"latents of 6 channels here, of {there.latent_channels} there: input_proj and" in found.said
    changed = {key.split(".")[0] for key in found.new}
    assert changed == ({"input_proj", "readout"} if name == "xar" else {"input_proj", "head"})
    assert all(found.kept(key) for key in found.there if key.split(".")[0] not in changed)


def test_another_resolution_crops_the_fixed_positions_and_interpolates_learned_ones(start):
    there = FlexTokConfig(**kinds.FLEXTOK | {"image_size": 16}, patch_size=4)
    found = start(there, replace(there, image_size=8))
    assert not found.new
    assert all(found.kept(key) for key in found.there)
    assert "positions: 4 x 4 patches there, 2 x 2 here: the same table cropped" in found.said
    there = replace(there, short_runs=ShortRuns(positions="learned"))
    found = start(there, replace(there, image_size=32))
    assert "positions: 4 x 4 patches there, 8 x 8 here: interpolated" in found.said
    assert found.new == {"encoder.positions", "decoder.positions"}
    table = found.here["encoder.positions"]
    assert table.shape == (8, 8, 32)
    pooled = torch.nn.functional.avg_pool2d(table.permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0)
    mean = found.there["encoder.positions"].mean(dim=(0, 1))
    assert (pooled - found.there["encoder.positions"]).norm() < 0.6 * (mean - found.there["encoder.positions"]).norm()


@pytest.mark.parametrize(
    ("there", "here", "how"),
    [(16, (8, 16), "cropped"), (16, (8, 24), "continued"), ((8, 24), 8, "cropped"), ((8, 24), (24, 8), "continued")],
)
def test_another_aspect_ratio_keeps_all_weights_and_fits_the_positions(start, there, here, how):
    config = FlexTokConfig(**kinds.FLEXTOK | {"image_size": there}, patch_size=4)
    other = replace(config, image_size=here)
    found = start(config, other)
    assert not found.new
    assert all(found.kept(key) for key in found.there)
    grids = "{} x {} patches there, {} x {} here".format(*config.grid, *other.grid)
    assert f"positions: {grids}: the same table" in found.said
    assert how in found.said
    learned = ShortRuns(positions="learned")
    found = start(replace(config, short_runs=learned), replace(other, short_runs=learned))
    assert f"positions: {grids}: interpolated" in found.said
    assert found.new == {"encoder.positions", "decoder.positions"}
    before, after = (table["decoder.positions"].permute(2, 0, 1)[None] for table in (found.there, found.here))
    assert after.shape[2:] == other.grid
    wanted = torch.nn.functional.interpolate(before, other.grid, mode="bicubic")
    assert torch.allclose(after, wanted, atol=1e-6)
    assert after.std() > 0


def test_other_shapes_are_refused_with_every_tensor_named(start):
    with pytest.raises(ValueError, match="do not fit the model to train") as error:
        start(PLAIN, replace(PLAIN, width=48, num_tokens=12))
    named = {name for name in kinds.build(kinds.LINES["gpt"]).state_dict() if f": {name} " in str(error.value)}
    assert {"blocks.0.attention.qkv_proj.weight", "positions", "token_embedding.weight", TABLE} <= named
