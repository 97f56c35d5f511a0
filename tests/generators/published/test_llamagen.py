"""LlamaGen's files: the recorded cases read as such files, and what no tensor says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import imgtok
from imgtok import hub
from imgtok.generators.conditioning import TextPrefix
from imgtok.generators.gpt import GPT, LLAMAGEN_SIZES, GPTConfig, llamagen_size
from imgtok.generators.published import llamagen
from imgtok.layers.positions import rotary_2d
from imgtok.published import llamagen_vq
from imgtok.quantizers.vq import TableConfig
from imgtok.tokenizers.vq import VQ, VQConfig

SIZES = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672, "3B": 3_096_659_200}


def model(**given: object) -> GPT:
    torch.manual_seed(0)
    small = {"vocab_size": 20, "num_tokens": 16, "width": 32, "depth": 2, "num_heads": 4, "mlp_multiple": 32}
    made = GPT(GPTConfig(**small | {"positions": "rotary_2d"} | given))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


TEXT = TextPrefix(text_width=12, text_length=5)


def published(gpt: GPT, *, table: bool = True) -> dict[str, Tensor]:
    state = gpt.state_dict()
    tensors = {name: place.view(state).clone() for name, place in llamagen.published_places(state).items()}
    return tensors | ({"freqs_cis": gpt.rotary.clone()} if table else {})


def write(tensors: dict[str, Tensor], path: Path) -> Path:
    torch.save({"model": tensors, "optimizer": {}, "steps": 3}, path)
    return path


@pytest.mark.parametrize("case", ["c2i_tiny", "t2i_tiny"])
def test_our_names_are_those_of_the_recorded_cases(case):
    about = json.loads((Path(__file__).parents[2] / f"parity/gpt/{case}.json").read_text())
    config = about["build"]["config"]
    condition = {"condition": TextPrefix(text_width=40)} if "caption_dim" in config else {}
    made = model(vocab_size=80, width=64, **condition)
    if not condition:
        made.class_embedding = nn.Embedding(11, 64)
    found = {name: list(value.shape) for name, value in published(made, table=False).items()}
    assert found == about["shapes"]


@pytest.mark.parametrize("condition", [{}, {"condition": TEXT}], ids=["classes", "text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_with_its_rotary_table_is_the_same_model(tmp_path, condition, dtype):
    made = model(**condition)
    for name in llamagen.OURS_ALONE:
        assert getattr(made, name) is None or not getattr(made, name).any()
    tensors = {name: value.to(dtype) for name, value in published(made).items()}
    loaded = imgtok.load(write(tensors, tmp_path / "x.pt"))
    state = loaded.state_dict()
    assert all(torch.equal(value.to(dtype).float(), state[name]) for name, value in made.state_dict().items())
    for name in ("num_tokens", "num_heads", "width", "depth", "vocab_size", "mlp_hidden", "positions", "prefix_length"):
        assert getattr(loaded.config, name) == getattr(made.config, name)
    assert torch.equal(loaded.rotary, made.rotary)
    encoder = "google/flan-t5-xl" if condition else None
    assert loaded.config.condition.text_encoder == encoder
    assert loaded.config.sampling.guidance == (7.5 if condition else 2.0)


@pytest.mark.parametrize(
    ("name", "count"), [("c2i_B_256", 256), ("c2i_B_384", 576), ("t2i_XL_stage2_512", 1024), ("x", 256)]
)
def test_the_name_says_how_many_tokens_and_the_width_which_heads(tmp_path, name, count, caplog):
    caplog.set_level("INFO", logger="imgtok.generators.published.llamagen")
    made = model(width=64, num_heads=1, num_tokens=4)
    found = hub.resolve(write(published(made, table=False), tmp_path / f"{name}.pt"), expect=GPT)
    config = hub.configuration(found)
    assert (config.num_tokens, config.num_heads) == (count, 1)
    assert f"{count} tokens an image" in caplog.text
    assert "nothing tells the heads of a LlamaGen 64 wide" in caplog.text
    for size, (width, _, heads) in LLAMAGEN_SIZES.items():
        assert llamagen.counts_of({}, size, width, 1, found) == (heads, count)


def test_what_is_not_whole_is_listed(tmp_path):
    tensors = published(model())
    del tensors["norm.weight"]
    tensors["layers.0.attention.kv_cache.k_cache"] = torch.zeros(2)
    tensors["layers.1.feed_forward.w3.weight"] = torch.zeros(64, 32)
    with pytest.raises(ValueError, match="do not fit the LlamaGen that this file describes") as caught:
        imgtok.load(write(tensors, tmp_path / "x.pt"))
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        "missing: norm.weight (32,)",
        "unexpected: layers.0.attention.kv_cache.k_cache (2,)",
        "another shape: layers.1.feed_forward.w3.weight is (64, 32) in the file, (96, 32) in the model",
    }


def test_other_positions_are_refused(tmp_path):
    tensors = published(model())
    for wrong in (rotary_2d(8, 4, 1, base=500.0), rotary_2d(8, 4, 1, zero_prefix=False)):
        with pytest.raises(ValueError, match="x.pt: freqs_cis: another table than that of a raster of 16 tokens"):
            imgtok.load(write(tensors | {"freqs_cis": wrong}, tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"cannot stand for: positions: rotary_2d needs a square number of tokens"):
        imgtok.load(write(tensors | {"freqs_cis": wrong[:-1]}, tmp_path / "x.pt"))


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes(size):
    with torch.device("meta"):
        made = GPT(llamagen_size(size))
    assert sum(parameter.numel() for parameter in made.parameters()) == SIZES[size]
    assert made.config.mlp_hidden == {"B": 2048, "L": 2816, "XL": 3584, "XXL": 4096, "3B": 8704}[size]


def test_the_published_size_from_text():
    with torch.device("meta"):
        made = GPT(llamagen_size("XL", text=True))
    # The features that stand for "no caption" are no parameter here, as in the published count.
    assert sum(parameter.numel() for parameter in made.parameters()) == 777_678_080


def test_a_published_pair_draws_images(tmp_path):
    made = model()
    write(published(made), tmp_path / "c2i.pt")
    tokenizer = VQ(
        VQConfig(
            image_size=64, quantizer=TableConfig(vocab_size=20, width=3), block_channels=(32, 32), hidden_channels=4
        )
    )
    tensors = {llamagen_vq.published_name(name): value for name, value in tokenizer.state_dict().items()}
    write(tensors, tmp_path / "vq.pt")
    pipe = imgtok.pipeline(tmp_path / "c2i.pt", tokenizer=tmp_path / "vq.pt", device="cpu")
    assert pipe.decoder.image_size == 8, "that of the generator's 16 tokens: no file says it"
    assert [image.size for image in pipe([3], seed=1)] == [(8, 8)]
    tokenizer.save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match="decode: an image of this tokenizer has 1024 tokens"):
        imgtok.pipeline(tmp_path / "c2i.pt", tokenizer=tmp_path / "vq", device="cpu")([3])
