"""Which reader knows a file, by the names of its tensors: one at most, and none for the files of methods to come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import imgtok
from imgtok import hub
from imgtok.generators.published import xar
from imgtok.generators.xar import XAR, xar_size
from imgtok.published import flextok, kl16
from imgtok.published.names import places
from imgtok.tokenizers.vae import VAE

RECORDED = Path(__file__).parents[2] / "parity"


def recorded(case: str) -> dict:
    return json.loads((RECORDED / f"{case}.json").read_text())


def karl(base: str, stage: int = 1) -> set[str]:
    """The names in a checkpoint of KARL over one of its two autoencoders; of stage 2 with its discriminators."""
    case = recorded("karl/state_dict_layout")
    names = {*case["shapes"], *case["extra_shapes"][base], *case["extra_shapes"]["quantized"]}
    return names | ({*case["extra_shapes"]["stage2_each_discriminator"]} if stage == 2 else set())


def without(prefix: str, names: set[str]) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def tokenbridge(size: str) -> set[str]:
    return {*recorded(f"tokenbridge/layout_{size}")["shapes"]}


def ours() -> dict[str, set[str]]:
    with torch.device("meta"):
        drawn, decoded = XAR(xar_size("B")), VAE(kl16.KL16)
        tokenizer = flextok.FlexTok(flextok.sized_config("d12-d12"))
    return {
        "xar": {*places(drawn.state_dict(), xar.NAMES, {}), "mask"},
        "kl16": {kl16.published_name(name, 5) for name in decoded.autoencoder.state_dict()} | {"loss.logvar"},
        "flextok": {*flextok.flextok_places(tokenizer.state_dict())},
        "maskgit_vqgan": without("base_tokenizer.vqgan.", karl("vqgan")),
        "llamagen_vq": {*recorded("gpt/vq16_full")["shapes"]} | {"quantize.codebook_used"},
        "karl": karl("vae", stage=2),
        "tokenbridge": tokenbridge("large"),
        "llamagen": {*recorded("gpt/c2i_tiny")["shapes"]},
    }


def known_by(names: set[str]) -> list[str]:
    return [layout for layout in hub.READERS if hub.reader(layout).recognise({}, names)]


def test_each_file_is_known_by_its_own_reader():
    for layout, names in ours().items():
        assert known_by(names) == [layout]
        assert known_by({f"module.{name}" for name in names}) == [], "prefixes are taken off before"


KL_NAMES = without("base_tokenizer.vae.", karl("vae"))
HEAD = ("channel_", "token_embeddings.", "condition_proj.", "timesteps_embeddings", "output_pos_embed")
OTHERS = {
    "MAR": {name for name in tokenbridge("base") if not name.startswith(HEAD)}
    | {"diffusion_pos_embed_learned", "diffloss.net.input_proj.weight"},
    "a VQGAN with the layers of a KL autoencoder": KL_NAMES | {"quantize.embedding.weight"},
    "a Llama": {
        name.replace("attention.wqkv", "attention.wq")
        for name in recorded("gpt/c2i_tiny")["shapes"]
        if not name.startswith("cls_embedding.")
    },
}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS.keys())
def test_files_of_other_methods_are_taken_for_none(names, tmp_path):
    assert len(names) > 50 or "output.weight" in names
    assert known_by(names) == []
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    torch.save({"model": {}, "ema": {name: torch.zeros(1) for name in names}}, tmp_path / "x.pth")
    for file in ("x.safetensors", "x.pth"):
        with pytest.raises(ValueError, match=rf"{file}: weights of no model that imgtok reads a lone file of: a pub"):
            imgtok.load(tmp_path / file)


def test_a_llamagen_from_text():
    assert known_by({*recorded("gpt/t2i_tiny")["shapes"]}) == ["llamagen"]


def test_a_karl_and_the_autoencoder_inside_it():
    assert known_by(KL_NAMES) == ["kl16"]
    assert known_by(karl("vqgan")) == known_by(karl("vae")) == known_by(karl("vqgan", stage=2)) == ["karl"]


def test_folders_are_known_by_their_description():
    described = {"flextok": {"vae": {}, "encoder": {}}, "diffusers": {"_class_name": "AutoencoderKL"}}
    for layout, data in described.items():
        assert [name for name in hub.READERS if hub.reader(name).recognise(data, set())] == [layout]
    for data in ({}, {"_class_name": "UNet2DConditionModel"}, {"model_type": "t5"}, {"kind": "flextok", "vae": {}}):
        assert [name for name in hub.READERS if hub.reader(name).recognise(data, set())] == []


def test_what_two_readers_take_for_theirs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("imgtok.published.kl16.recognise", lambda description, names: True)
    monkeypatch.setattr("imgtok.published.flextok.recognise", lambda description, names: True)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors: could be in any of the published layouts flextok and kl16"):
        imgtok.load(tmp_path / "x.safetensors")


def test_every_reader_is_complete():
    for layout in hub.READERS:
        module = hub.reader(layout)
        assert module.KIND in hub.KINDS
        assert module.LOOKS_LIKE
        assert callable(module.load)
        assert callable(module.configuration)
    assert {kind: [*hub.writers(kind)] for kind in hub.KINDS if hub.writers(kind)} == {
        "vae": ["diffusers"],
        "dcae": ["diffusers_dc"],
        "flextok": ["flextok"],
        "xar": ["xar"],
        "tokenbridge": ["tokenbridge"],
    }
