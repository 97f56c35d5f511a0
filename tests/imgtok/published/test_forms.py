"""The same published weights in every container: each is the same model, by any name that leads to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import imgtok
from imgtok import hub
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.published import llamagen, xar
from imgtok.generators.xar import XAR, XARConfig
from imgtok.published import diffusers, flextok, kl16, llamagen_vq
from imgtok.published.flextok_config import write_config
from imgtok.published.names import places
from imgtok.quantizers.vq import TableConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.tokenizers.vq import VQ, VQConfig

Tensors = dict[str, Tensor]


@dataclass
class Case:
    """A small model and its tensors as they were published."""

    model: nn.Module
    tensors: Tensors
    header: dict[str, str]
    """Description that a lone safetensors file of it carries."""


def small_kl16() -> Case:
    vae = VAE(VAEConfig(latent_channels=3, block_channels=(32, 64), layers_per_block=1, scaling_factor=0.2325))
    tensors = {kl16.published_name(name, 2): value for name, value in vae.autoencoder.state_dict().items()}
    return Case(vae, {n: v[..., None, None] if kl16.is_kernel(n) else v for n, v in tensors.items()}, {})


def small_vq() -> Case:
    model = VQ(
        VQConfig(
            quantizer=TableConfig(vocab_size=6, width=2), block_channels=(32, 64), layers_per_block=1, hidden_channels=5
        )
    )
    tensors = {llamagen_vq.published_name(name): value for name, value in model.state_dict().items()}
    return Case(model, tensors, {})


def small_xar() -> Case:
    model = XAR(XARConfig(latent_channels=3, width=64, depth=1, num_heads=1))
    state = model.state_dict()
    known = places(state, xar.NAMES, {})
    return Case(model, {name: xar.as_published(name, place.view(state)) for name, place in known.items()}, {})


def small_llamagen() -> Case:
    """Of a width that says 64 channels a head."""
    config = GPTConfig(vocab_size=9, width=64, depth=1, num_heads=1, mlp_multiple=8, positions="rotary_2d")
    model = GPT(config)
    state = model.state_dict()
    known = llamagen.published_places(state)
    return Case(model, {name: place.view(state) for name, place in known.items()}, {})


def small_flextok() -> Case:
    trunk = TrunkConfig(width=32, depth=1, head_dim=16)
    vae = VAEConfig(latent_channels=16, scaling_factor=0.4, block_channels=(8, 8), layers_per_block=1, norm_groups=4)
    model = FlexTok(FlexTokConfig(image_size=16, vae=vae, num_registers=4, levels=(4, 3), encoder=trunk, decoder=trunk))
    ours = {"encoder.positions": model.encoder.positions, "decoder.positions": model.decoder.positions}
    ours |= model.state_dict()
    known = flextok.flextok_places(ours)
    tensors = {name: flextok.as_published(name, place.view(ours)) for name, place in known.items()}
    return Case(model, tensors, {name: json.dumps(value) for name, value in write_config(model.config).items()})


def save_lone(case: Case, path: Path, tensors: Tensors) -> None:
    """A safetensors file with its description, and beside it that of its autoencoder, where it has them."""
    save_file(tensors, path, case.header or None)
    if isinstance(case.model, FlexTok):
        diffusers.save(case.model.vae, path.parent / "vae")


CASES = {"kl16": small_kl16, "vq": small_vq, "llamagen": small_llamagen, "xar": small_xar, "flextok": small_flextok}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    torch.manual_seed(0)
    found = CASES[request.param]()
    found.tensors = {name: value.detach().clone().contiguous() for name, value in found.tensors.items()}
    return found


def shifted(tensors: Tensors) -> Tensors:
    """Other weights of the same names."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in tensors.items()}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def in_shards(tensors: Tensors, path: Path) -> None:
    names = list(tensors)
    halves = {f"part-{i}.safetensors": names[i::2] for i in range(2)}
    for file, inside in halves.items():
        save_file({name: tensors[name] for name in inside}, path.parent / file)
    where = {name: file for file, inside in halves.items() for name in inside}
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))


WRITE: dict[str, tuple[str, Callable[[Tensors, Path], None]]] = {
    "tensors alone": ("x.pth", torch.save),
    "legacy": ("x.pt", lambda t, path: torch.save(t, path, _use_new_zipfile_serialization=False)),
    "model": ("x.ckpt", lambda t, path: torch.save({"model": t}, path)),
    "state_dict": ("x.bin", lambda t, path: torch.save({"state_dict": t, "epoch": 1}, path)),
    "module": ("x.pt", lambda t, path: torch.save({"module": t}, path)),
    "model_ema": ("x.pth", lambda t, path: torch.save({"model": shifted(t), "model_ema": t}, path)),
    "ema": ("x.pth", lambda t, path: torch.save({"model": shifted(t), "ema": prefixed(t, "module.")}, path)),
    "compiled": ("x.pth", lambda t, path: torch.save({"model": prefixed(t, "_orig_mod.")}, path)),
    "shards": ("x.safetensors.index.json", in_shards),
}


def same(found: nn.Module, wanted: nn.Module) -> bool:
    state = wanted.state_dict()
    return found.state_dict().keys() == state.keys() and all(
        torch.equal(value, state[name]) and value.dtype == state[name].dtype
        for name, value in found.state_dict().items()
    )


@pytest.mark.parametrize("form", WRITE)
def test_files_without_a_description(case, form, tmp_path):
    """All but FlexTok's, whose shape is in no tensor: its file says which description is missing."""
    name, write = WRITE[form]
    write(case.tensors, tmp_path / name)
    if case.header:
        with pytest.raises(ValueError, match="header does not describe a published FlexTok"):
            imgtok.load(tmp_path / name)
        return
    state = torch.get_rng_state()
    found = hub.resolve(tmp_path / name, expect=type(case.model))
    model = imgtok.load(found)
    assert torch.equal(torch.get_rng_state(), state), "loading drew from the global generator"
    assert same(model, case.model)
    assert hub.configuration(found) == model.config
    assert same(type(case.model).from_pretrained(tmp_path / name), case.model)
    if form in ("model_ema", "ema"):
        assert not same(imgtok.load(tmp_path / name, raw=True), case.model)
    assert len(found.fingerprint()) == 16


def test_a_safetensors_file(case, tmp_path):
    save_lone(case, tmp_path / "x.safetensors", case.tensors)
    assert same(imgtok.load(tmp_path / "x.safetensors"), case.model)
    save_lone(case, tmp_path / "x.safetensors", prefixed(case.tensors, "module."))
    found = hub.resolve(tmp_path / "x.safetensors")
    assert same(imgtok.load(found), case.model)
    assert hub.configuration(found) == imgtok.load(found).config


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_with_a_description(tmp_path, shards):
    torch.manual_seed(0)
    case = small_flextok()
    flextok.save(case.model, tmp_path)  # with the shape of its autoencoder in vae/
    if shards:
        (tmp_path / "model.safetensors").unlink()
        tensors = {name: value.detach().clone().contiguous() for name, value in case.tensors.items()}
        in_shards(tensors, tmp_path / "model.safetensors.index.json")
    assert hub.resolve(tmp_path).layout == "flextok"
    assert same(imgtok.load(tmp_path), case.model)


def test_half_precision_becomes_float32_or_stays(case, tmp_path):
    save_lone(case, tmp_path / "x.safetensors", {name: value.half() for name, value in case.tensors.items()})
    model = imgtok.load(tmp_path / "x.safetensors")
    wanted = {name: value.half().float() for name, value in case.model.state_dict().items()}
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    kept = imgtok.load(tmp_path / "x.safetensors", dtype=torch.float16)
    assert all(value.dtype == torch.float16 for value in kept.state_dict().values())


def test_every_difference_is_named(case, tmp_path):
    first, second, third = [name for name, value in case.tensors.items() if value.ndim == 1][-3:]
    tensors = dict(case.tensors)
    del tensors[first]
    tensors[second] = torch.zeros(3, 3)
    tensors["more"] = torch.zeros(2)
    save_lone(case, tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match="do not fit the") as caught:
        imgtok.load(tmp_path / "x.safetensors")
    shape = tuple(case.tensors[second].shape)
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        f"missing: {first} {tuple(case.tensors[first].shape)}",
        "unexpected: more (2,)",
        f"another shape: {second} is (3, 3) in the file, {shape} in the model",
    }
    tensors = case.tensors | {third: case.tensors[third].long()}
    save_lone(case, tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=f"{third}: not floating-point numbers"):
        imgtok.load(tmp_path / "x.safetensors")
