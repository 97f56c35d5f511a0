"""Files in the layout of xAR-B.pth: read whole or refused with what is wrong, and written."""

from __future__ import annotations

import argparse
import json
import logging
import resource
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import imgtok
from imgtok.cli import main
from imgtok.config import ConfigError
from imgtok.generators.conditioning import ClassModulation, TextCrossAttention
from imgtok.generators.entities import Cells, Patches, Scales
from imgtok.generators.published import xar as published_xar
from imgtok.generators.published.xar import NAMES, as_published, config_of, save
from imgtok.generators.xar import XAR, FlowSampling, XARConfig, xar_size
from imgtok.hub import find_folder
from imgtok.published import flextok
from imgtok.published.names import places
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.weights import open_weights

RECORDED = Path(__file__).parents[2] / "parity" / "xar"
SMALL = XARConfig(latent_channels=3, width=32, depth=2, num_heads=2, sampling=FlowSampling(steps=(2,)))


def tiny(seed: int = 0, **changes) -> XAR:
    torch.manual_seed(seed)
    return XAR(replace(SMALL, **changes)).eval()


def weights(model: XAR) -> dict[str, Tensor]:
    """As the published code names and shapes them."""
    state = model.state_dict()
    return {name: as_published(name, place.view(state)).clone() for name, place in places(state, NAMES, {}).items()}


def buffers() -> dict[str, Tensor]:
    """The tables of a model with heads of 16 channels, from what the published code itself computed."""
    with np.load(RECORDED / "rope.npz") as rope, np.load(RECORDED / "mask.npz") as mask:
        allowed = torch.from_numpy(mask["allowed_4_entities"]).bool()
        rotary = {part: torch.from_numpy(rope[f"{part}_d16"]).clone() for part in ("freqs", "cos", "sin")}
    found = {"mask": torch.zeros(256, 256).masked_fill(~allowed, -torch.inf)[None, None]}
    for stack in ("encoder", "decoder"):
        for block in range(2):
            name = f"{stack}_blocks.{block}.attn.rope.freqs"
            found |= {name: rotary["freqs"], f"{name}_cos": rotary["cos"], f"{name}_sin": rotary["sin"]}
    return found


def published(seed: int = 0) -> dict[str, Tensor]:
    return weights(tiny(seed)) | buffers()


@pytest.fixture
def path(tmp_path) -> Path:
    torch.save(published(), tmp_path / "xAR.pth")
    return tmp_path / "xAR.pth"


def load(path: Path, *, raw: bool = False) -> XAR:
    return published_xar.read(open_weights(path, raw=raw))


def same(found: XAR, wanted: XAR) -> bool:
    state = wanted.state_dict()
    return all(torch.equal(v, state[k]) for k, v in found.state_dict().items())


# ---------------------------------------------------------------- reading


def test_published_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in published().items()}
    assert shapes["class_emb.weight"] == (1001, 32)
    assert shapes["time_embed.mlp.0.weight"] == (32, 256)
    assert shapes["z_proj.weight"] == (32, 3)
    assert shapes["z_proj_ln.weight"] == shapes["encoder_norm.weight"] == (32,)
    assert shapes["encoder_pos_embed_learned"] == shapes["decoder_pos_embed_learned"] == (1, 256, 32)
    assert shapes["decoder_embed.bias"] == (32,)
    assert shapes["pred.weight"] == (3, 32)
    assert shapes["decoder_blocks.1.attn.qkv.weight"] == (96, 32)
    assert shapes["encoder_blocks.0.mlp.fc1_g.weight"] == shapes["encoder_blocks.0.mlp.fc1_x.weight"] == (85, 32)
    assert shapes["encoder_blocks.0.mlp.fc2.weight"] == (32, 85)
    assert shapes["encoder_blocks.0.ada_lin.1.weight"] == (192, 32)
    assert shapes["encoder_blocks.0.attn.rope.freqs"] == (4,)
    assert shapes["mask"] == (1, 1, 256, 256)


def test_a_file_is_the_same_model(path, tmp_path):
    state = torch.get_rng_state()
    model = load(path)
    assert torch.equal(torch.get_rng_state(), state), "loading drew from the global generator"
    assert not model.training
    assert same(model, tiny())
    assert replace(model.config, sampling=SMALL.sampling) == SMALL
    assert same(imgtok.load(path), tiny())
    assert same(XAR.from_pretrained(path), tiny())
    save_file({name: value.clone() for name, value in published().items()}, tmp_path / "xAR.safetensors")
    assert same(load(tmp_path / "xAR.safetensors"), tiny())
    assert same(imgtok.load(tmp_path / "xAR.safetensors", expect=XAR), tiny())
    torch.save(published(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(imgtok.load(tmp_path / "old.pth"), tiny())


def test_a_file_in_half_precision(tmp_path):
    torch.save({name: value.bfloat16() for name, value in published().items()}, tmp_path / "xAR.pth")
    found, wanted = load(tmp_path / "xAR.pth").state_dict(), tiny().state_dict()
    assert all(value.dtype == torch.float32 for value in found.values())
    assert all(torch.equal(value, wanted[name].bfloat16().float()) for name, value in found.items())


def test_without_its_tables_heads_are_64_wide(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model = tiny(width=128, num_heads=2)
    torch.save(weights(model), tmp_path / "xAR.pth")
    found = load(tmp_path / "xAR.pth")
    assert found.config.num_heads == 2
    assert same(found, model)
    assert "no rotary table tells the heads of an xAR 128 wide: taken as 2" in caplog.text


@pytest.mark.parametrize("name", ["B", "L", "H"])
def test_published_sizes_are_known_by_their_shapes(name):
    with torch.device("meta"):
        model = XAR(xar_size(name))
    assert config_of(weights(model), Path("xAR.pth")) == xar_size(name)


def checkpoint(**more) -> dict:
    """As a training run of the published code leaves it."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.sum().backward()
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    arguments = argparse.Namespace(lr=None, blr=5e-5, resume="", img_size=256, betas=(0.9, 0.96), distributed=True)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    runs = {"model": published(seed=1), "model_ema": published(seed=2)}
    return runs | {"optimizer": optimizer.state_dict(), "epoch": 3, "scaler": scaler, "args": arguments} | more


def test_a_training_checkpoint(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    torch.save(checkpoint(), path)
    assert same(load(path), tiny(2))
    assert same(imgtok.load(path), tiny(2))
    assert same(load(path, raw=True), tiny(1))
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "it is let in for this file alone"
    stored = checkpoint()
    del stored["model_ema"]
    torch.save(stored, path)
    assert same(imgtok.load(path), tiny(1))


# ---------------------------------------------------------------- what is refused


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    tensors = published()
    del tensors["decoder_blocks.1.mlp.fc1_x.bias"], tensors["encoder_norm.weight"]
    tensors["head.weight"] = torch.zeros(2)
    tensors["pred.bias"] = torch.zeros(4)
    torch.save(tensors, tmp_path / "xAR.pth")
    with pytest.raises(ValueError, match=r"xAR.pth: the weights do not fit the xAR that this file describes") as caught:
        imgtok.load(tmp_path / "xAR.pth")
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        "missing: decoder_blocks.1.mlp.fc1_x.bias (85,)",
        "missing: encoder_norm.weight (32,)",
        "unexpected: head.weight (2,)",
        "another shape: pred.bias is (4,) in the file, (3,) in the model",
    }


class Code:
    def __reduce__(self):
        return print, ("executed",)


BLOCK = {"encoder_blocks.0.attn.qkv.bias": torch.zeros(96)}
TOLD = {"z_proj.weight": torch.zeros(32, 3), "class_emb.weight": torch.zeros(11, 32)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**BLOCK, "pred.bias": Code()}, r"not a file of weights alone: it needs (builtins\.)?print.*torch\.save"),
        (checkpoint(args=Fraction(1, 3)), r"it needs fractions\.Fraction, .*keep only the weights, on the machine"),
        (checkpoint(args=argparse.Namespace(hook=Code())), r"it needs (builtins\.)?print"),
        ({"model": {**TOLD, "epoch": "3"}}, "must hold tensors by name.*found: z_proj.weight, class_emb.weight, epoch"),
        (torch.zeros(2), "must hold tensors by name.*found: Tensor"),
        ({"blocks.0.weight": torch.zeros(2)}, "not a published xAR: it lacks z_proj.weight .found: blocks.0.weight"),
        ({**TOLD, "z_proj.weight": torch.zeros(3)}, "z_proj.weight is .3,., but has 2 dimensions"),
        (TOLD, "it lacks encoder_pos_embed_learned"),
        ({**TOLD, "encoder_pos_embed_learned": torch.zeros(1, 9, 32)}, "9 positions and 0 blocks are no xAR's"),
        (
            {**TOLD, **BLOCK, "encoder_pos_embed_learned": torch.zeros(1, 16, 32), "z_proj.weight": torch.zeros(30, 3)},
            "an xAR that imgtok cannot stand for: width: 30 must be a multiple of 4",
        ),
    ],
    ids=["code", "an object", "code in the arguments", "a number", "a tensor", "another model", "a vector",
         "no positions", "an odd grid", "heads"],
)  # fmt: skip
def test_foreign_files(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "other.pth")
    assert str(tmp_path / "other.pth") in str(caught.value)
    with pytest.raises(ValueError, match="other.pth"):
        imgtok.load(tmp_path / "other.pth")
    assert "executed" not in capsys.readouterr().out


def test_weights_of_whole_numbers(tmp_path):
    torch.save(published() | {"pred.bias": torch.zeros(3, dtype=torch.int64)}, tmp_path / "xAR.pth")
    with pytest.raises(ValueError, match=r"pred\.bias: not floating-point numbers"):
        load(tmp_path / "xAR.pth")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mask", lambda table: table.tril(-1)),
        ("mask", lambda table: table[..., :64, :64]),
        ("encoder_blocks.1.attn.rope.freqs_cos", lambda table: table.view(4, 64, 16).flip(0).reshape(256, 16)),
        ("decoder_blocks.0.attn.rope.freqs", lambda table: table * 2),
    ],
)
def test_tables_of_another_order_are_not_dropped(tmp_path, name, change):
    tensors = published()
    torch.save(tensors | {name: change(tensors[name])}, tmp_path / "xAR.pth")
    with pytest.raises(ValueError, match=rf"xAR\.pth: {name}: other tables than those of an xAR with four cells"):
        load(tmp_path / "xAR.pth")


def test_damaged_and_missing_files(path, tmp_path):
    path.write_bytes(path.read_bytes()[:-5000])
    for read in (load, imgtok.load):
        with pytest.raises(ValueError, match=r"xAR\.pth: not a whole file of torch\.save.*copy or download it again"):
            read(path)
    (tmp_path / "text.pth").write_text("404: Not Found")
    with pytest.raises(ValueError, match=r"text\.pth: not a whole file of torch\.save"):
        imgtok.load(tmp_path / "text.pth")
    (tmp_path / "xAR.safetensors").write_bytes(b"abc")
    for read in (load, imgtok.load):
        with pytest.raises(ValueError, match=r"xAR\.safetensors: not a whole safetensors file"):
            read(tmp_path / "xAR.safetensors")
    for name in ("weights/xAR-B.pth", "xAR-B.pth"):
        with pytest.raises(FileNotFoundError, match=rf"{name}: no such file"):
            imgtok.load(name)
        with pytest.raises(FileNotFoundError, match=rf"{name}: no such file"):
            load(Path(name))


def test_other_models_are_told_apart(path, tmp_path):
    save_file({name: torch.zeros(2, 2) for name in flextok.TELLING}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a published xAR: it lacks z_proj.weight"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds a published FlexTok, but a XAR is needed here"):
        imgtok.load(tmp_path / "model.safetensors", expect=XAR)
    with pytest.raises(ConfigError, match="its header does not describe a published FlexTok"):
        imgtok.load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds a published XAR, but a VAE is needed here"):
        imgtok.load(path, expect=VAE)
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        find_folder(path)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_is_written_is_what_is_published(tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    save(tiny(), path)
    if ending == "pth":
        stored = torch.load(path, weights_only=True)
        wanted = published()
        assert stored.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.allclose(stored[name], value, atol=1e-6), name
    assert same(load(path), tiny())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 8, "entities": Cells(height=4, width=4)}, "grid: the published code runs 16 alone, this xAR has 8"),
        (
            {"condition": ClassModulation(num_classes=10)},
            "condition.num_classes: the published code runs 1000 alone, this xAR has 10",
        ),
        ({"entities": Patches()}, "entities: the published code runs Cells.* alone, this xAR has Patches"),
        ({"entities": Scales(sides=(4, 16))}, "entities: the published code"),
        ({"entities": Cells(height=4, width=16)}, "entities: the published code"),
        (
            {"condition": TextCrossAttention()},
            "condition.kind: the published code runs class alone, this xAR has cross_attention",
        ),
        ({"whole_times": False}, "whole_times: False, which the published code does not know"),
    ],
)
def test_models_that_the_published_code_cannot_run(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        save(tiny(**changes), tmp_path / "mine.pth")
    assert not list(tmp_path.iterdir())


def test_a_name_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match=r"folder: .*a name that ends in \.pth or \.safetensors"):
        save(tiny(), tmp_path / "folder")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    save(tiny(), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # to the program as a disk without room for more
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tiny(1), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------- commands


def test_info(path, capsys):
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "kind: xar (XAR)" in said
    assert f"parameters: {sum(p.numel() for p in tiny().parameters()):,}" in said
    assert "num_classes: 1000" in said


def test_export_sample_and_back(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent_channels=3, block_channels=(8,), layers_per_block=1, norm_groups=8))
    vae.save_pretrained("vae")
    assert main(["export", "xAR.pth", "vae=vae", "out=models/xar", "layout=imgtok"]) == 0
    assert json.loads(Path("models/xar/config.json").read_text())["kind"] == "xar"
    assert same(imgtok.load("models/xar"), tiny())
    assert imgtok.load("models/xar/tokenizer").fingerprint() == vae.fingerprint()
    arguments = ["out=drawn", "num=2", "sampling.steps=[2]", "grid=0"]
    assert main(["sample", "models/xar", *arguments]) == 0
    assert sorted(entry.name for entry in Path("drawn").iterdir()) == ["000000.png", "000001.png", "samples.json"]
    assert main(["export", "models/xar", "out=back.pth"]) == 0
    back = torch.load("back.pth", weights_only=True)
    assert all(torch.equal(back[name], value) for name, value in weights(tiny()).items())
    torch.save(checkpoint(), "run.pth")
    assert main(["export", "run.pth", "out=plain", "layout=imgtok", "raw=true"]) == 0
    assert same(imgtok.load("plain"), tiny(1))
    capsys.readouterr()
    for arguments, message in (
        (["vae=vae"], "vae: the published layout has no place for an autoencoder"),
        ([], "a name that ends in .pth or .safetensors"),
    ):
        assert main(["export", "xAR.pth", "out=other", *arguments]) == 2
        assert message in capsys.readouterr().err
    VAE(VAEConfig(latent_channels=4, block_channels=(8,), layers_per_block=1, norm_groups=8)).save_pretrained("four")
    assert main(["export", "xAR.pth", "vae=four", "out=other", "layout=imgtok"]) == 2
    assert "draws latents of 3 channels, but the autoencoder decodes 4" in capsys.readouterr().err
    assert not Path("other").exists()


# ---------------------------------------------------------------- Neon


@pytest.mark.parametrize("under", [None, "model_ema", "state_dict"])
def test_files_of_neon_are_read_as_xar(tmp_path, under):
    """Its merged weights are an xAR's, in a flat file or under one of two names (second_ring.md, section 1)."""
    tensors = published(seed=3)
    torch.save(tensors if under is None else {under: tensors}, tmp_path / "Neon_xARB_imagenet256.pth")
    found = imgtok.load(str(tmp_path / "Neon_xARB_imagenet256.pth"))
    assert same(found, tiny(seed=3))


def test_published_files_are_merged_without_their_masks(tmp_path):
    """The mask holds infinities, whose difference is no number."""
    base, tuned = tiny(0), tiny(1)
    for model, name in ((base, "base.pth"), (tuned, "tuned.pth")):
        torch.save(weights(model) | buffers(), tmp_path / name)
    words = [f"tuned={tmp_path}/tuned.pth", "w=0.5", f"out={tmp_path}/merged"]
    assert main(["merge", str(tmp_path / "base.pth"), *words]) == 0
    merged, theirs = imgtok.load(str(tmp_path / "merged")), dict(tuned.named_parameters())
    for name, value in merged.named_parameters():
        assert torch.allclose(value, 1.5 * base.get_parameter(name) - 0.5 * theirs[name], atol=1e-5)
    assert all(not buffer.isnan().any() for buffer in merged.buffers())
