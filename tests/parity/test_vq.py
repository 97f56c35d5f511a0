"""LlamaGen's VQ tokenizer, small and as published, against what the published code computed; and that the cases notice
the mistakes that run without an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor, nn

import imgtok
from imgtok import hub
from imgtok.layers.convolution import channels_first, channels_last
from imgtok.quantizers.vq import TableConfig, VectorQuantizer
from imgtok.tokenizers import vq
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vq import VQ, VQConfig

TINY = Case.load("gpt/vq_tiny")


def load(case: Case, folder: Path) -> VQ:
    """The case's tokenizer, read from a file as LlamaGen's are."""
    torch.save({"model": case.weights() | {"quantize.codebook_used": torch.zeros(65536)}}, folder / "vq.pt")
    found = hub.resolve(folder / "vq.pt", expect=VQ)
    model: VQ = imgtok.load(found.with_config(image_size=case.input("image").shape[-1]))
    return model


@pytest.fixture(scope="module")
def as_recorded(tmp_path_factory) -> VQ:
    return load(TINY, tmp_path_factory.mktemp("vq"))


@pytest.fixture
def model(as_recorded) -> VQ:
    """One to be spoilt."""
    return copy.deepcopy(as_recorded)


@torch.no_grad()
def outputs(model: VQ, case: Case = TINY) -> dict[str, Tensor]:
    vectors = model.vectors(case.input("image"))
    ids = model.quantizer.nearest(channels_last(vectors))
    codes = model.quantizer.ids_to_codes(ids)
    found = {
        "latent": vectors,
        "indices": ids,
        "quant": channels_first(codes),
        "recon": model.to_pixels(codes),
        "decoded": model.to_pixels(model.quantizer.ids_to_codes(case.input("codes"))),
    }
    if case.about["losses"]:
        terms = model.quantizer(channels_last(vectors))
        share = case.about["build"]["config"]["entropy_loss_ratio"]
        entropy = share * model.quantizer.entropy_loss(channels_last(vectors))
        weight = model.config.quantizer.commitment_weight
        found["losses"] = torch.stack([terms.codebook, weight * terms.commitment, entropy])
    return found


def check(case: Case, found: dict[str, Tensor]) -> None:
    assert found.keys() == case.recorded.keys()
    errors = case.errors(found)
    print({name: f"{error:.4f}" for name, error in errors.items()})
    assert all(error <= 1 for error in errors.values()), errors


def noticed(model: VQ, *names: str) -> bool:
    """Whether the outputs of that name, by default any, differ from the recorded ones."""
    found = outputs(model)
    return max(TINY.errors({name: found[name] for name in names or found}).values()) > 1


def config_of(case: Case) -> VQConfig:
    about, given = case.about["build"], case.about["build"]["config"]
    assert given["encoder_ch_mult"] == given["decoder_ch_mult"]
    return VQConfig(
        image_size=case.input("image").shape[-1],
        quantizer=TableConfig(vocab_size=given["codebook_size"], width=given["codebook_embed_dim"]),
        block_channels=tuple(about["ch"] * multiplier for multiplier in given["encoder_ch_mult"]),
        hidden_channels=given["z_channels"],
    )


def test_the_small_one(as_recorded):
    assert as_recorded.config == config_of(TINY)
    check(TINY, outputs(as_recorded))


@pytest.mark.slow
def test_the_published_one(tmp_path):
    case = Case.load("gpt/vq16_full")
    model = load(case, tmp_path)
    assert model.config == config_of(case) == VQConfig(image_size=64)
    check(case, outputs(model, case))


@pytest.mark.parametrize(
    ("widths", "millions"), [((128, 128, 256, 256, 512), 71.88), ((128, 256, 256, 512), 70.11)], ids=["f16", "f8"]
)
def test_the_published_sizes(widths, millions):
    with torch.device("meta"):
        model = VQ(VQConfig(block_channels=widths))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


def test_tokens_are_the_raster_row_by_row(as_recorded):
    images, given = TINY.input("image"), TINY.input("codes")
    tokens = as_recorded.encode(images.clamp(-1.5, 1.5))
    with torch.no_grad():
        ids = as_recorded.quantizer.nearest(channels_last(as_recorded.vectors(images.clamp(-1.5, 1.5))))
    assert torch.equal(tokens.ids.unflatten(1, (8, 8)), ids)
    wanted = TINY.recorded["decoded"].clamp(-1, 1)
    torch.testing.assert_close(as_recorded.decode(Tokens.full(given.flatten(1))), wanted, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (".mid.0.", ".mid.2."),
        ("decoder.conv_blocks.1.res.1.", "decoder.conv_blocks.1.res.2."),
        ("decoder.conv_blocks.0.attn.0.", "decoder.conv_blocks.0.attn.1."),
        (".q.", ".k."),
        (".v.", ".proj_out."),
    ],
    ids=["blocks of the middle", "decoder blocks", "attentions", "query and key", "value and output"],
)
def test_weights_in_each_other_s_place(model, a, b):
    state = model.state_dict()
    swapped = {name: name.replace(a, "\n").replace(b, a).replace("\n", b) for name in state}
    model.load_state_dict({name: state[other].clone() for name, other in swapped.items()})
    assert noticed(model)


def padded_all_round(self: vq.Halve, x: Tensor) -> Tensor:
    return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)


def smooth(self: vq.Double, x: Tensor) -> Tensor:
    return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))


def attention_at_the_end(self: vq.Level, x: Tensor) -> Tensor:
    for layer in (*self.res, *self.attn, self.downsample, self.upsample):
        x = x if layer is None else layer(x)
    return x


def no_middle_attention(self: vq.CellAttention, x: Tensor) -> Tensor:
    return x


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v


MISTAKES: dict[str, tuple[object, str, Callable[..., Tensor]]] = {
    "padding on all sides": (vq.Halve, "forward", padded_all_round),
    "smooth enlargement": (vq.Double, "forward", smooth),
    "no attention": (vq.CellAttention, "forward", no_middle_attention),
    "attention after all blocks": (vq.Level, "forward", attention_at_the_end),
    "attention without a scale": (F, "scaled_dot_product_attention", unscaled),
}


@pytest.mark.parametrize(("where", "name", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_other_maths(model, monkeypatch, where, name, wrong):
    monkeypatch.setattr(where, name, wrong)
    assert noticed(model, "recon", "decoded")


def test_another_epsilon(model):
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-3
    assert noticed(model)


def test_codes_and_vectors_as_long_as_they_are(model):
    """They are compared, decoded and judged at unit length."""
    model.quantizer.unit_length = False
    assert noticed(model, "indices")
    assert noticed(model, "losses")
    assert noticed(model, "decoded")


def test_another_commitment(as_recorded):
    terms = outputs(as_recorded)["losses"]
    swapped = torch.stack([0.25 * terms[0], 4 * terms[1], terms[2]])  # as MaskGIT weighs them
    assert TINY.errors({"losses": swapped})["losses"] > 1


def test_another_entropy(model, monkeypatch):
    original = VectorQuantizer.entropy_loss
    for wrong in (lambda self, z: original(self, z, 0.02), lambda self, z: -original(self, z)):
        monkeypatch.setattr(VectorQuantizer, "entropy_loss", wrong)
        assert noticed(model, "losses")
