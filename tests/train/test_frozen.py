"""What is frozen: patterns of `training.freeze`, and with `decoder_only` all that encodes, to the bit."""

from __future__ import annotations

import fnmatch
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import kinds
import pytest
import torch
from kinds import ENCODING
from safetensors.torch import load_file

import imgtok
from imgtok.cli import main
from imgtok.config import load
from imgtok.data.content import LatentContent, TokenContent
from imgtok.data.sources import DataError
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Autoencoder
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.train import autoencoder, cache_latents, cache_tokens, generator, tokenizer
from imgtok.train.frozen import train_decoder_only
from imgtok.train.image_job import to_train

TRUNK = TrunkConfig(width=16, depth=1, head_dim=8)
SMALL = FlexTokConfig(image_size=16, patch_size=4, num_registers=4, levels=(4, 4), encoder=TRUNK, decoder=TRUNK)
SMALL_VAE = VAEConfig(latent_channels=3, block_channels=(4, 4), layers_per_block=1, norm_groups=2, scaling_factor=0.5)
DATA = ShapesConfig(num_images=24)
QUIET = ["training.preview_every=0", "training.trackers=[]", "num_preview=0", "data={kind: shapes, num_images: 24}"]
ONE_STEP = "training={steps: 1, batch_size: 4, learning_rate: 1e-2}"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tokenizer and an autoencoder, with a cache of each."""
    folder = tmp_path_factory.mktemp("made")
    model = kinds.build(kinds.Line(config=SMALL, step=kinds.flextok_step))
    model.save_pretrained(folder / "tokenizer")
    cache_tokens.main(cache_tokens.Config(data=DATA, tokenizer=str(folder / "tokenizer"), out=folder / "tokens"))
    torch.manual_seed(0)
    VAE(SMALL_VAE).save_pretrained(folder / "vae")
    fields = {"vae": str(folder / "vae"), "out": folder / "latents", "image_size": 16}
    cache_latents.main(cache_latents.Config(data=DATA, **fields))
    return folder


def go_on(made: Path, out: Path, *overrides: str) -> Path:
    """`train tokenizer` from the tokenizer in `made`."""
    words = [f"out={out}", f"init={made / 'tokenizer'}", ONE_STEP, *QUIET, *overrides]
    tokenizer.main(load(tokenizer.Config, None, words))
    return out / "final"


def moved(made: Path, final: Path) -> set[str]:
    before, after = (load_file(folder / "model.safetensors") for folder in (made / "tokenizer", final))
    return {name for name in before if not torch.equal(before[name], after[name])}


# ------------------------------------------------------------------------------------------------ training.freeze


def test_what_fits_a_pattern_stands_still_and_has_no_moments(made, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        found = moved(made, go_on(made, tmp_path, "training.freeze=[encoder.*,decoder.blocks.*]"))
    assert found
    assert not any(name.startswith(("encoder.", "decoder.blocks.")) for name in found)
    model = imgtok.load(made / "tokenizer")
    still = [p for name, p in model.named_parameters() if name.startswith(("encoder.", "decoder.blocks."))]
    train = [p for name, p in model.named_parameters() if not name.startswith(("encoder.", "decoder.blocks."))]
    said = f"{sum(p.numel() for p in train):,} parameters train ({len(train)} tensors), "
    assert said + f"{sum(p.numel() for p in still):,} are frozen ({len(still)} tensors)" in caplog.text
    checkpoint = tmp_path / "checkpoints/step_0000001"
    moments = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    assert len(moments) == len(train)
    assert len(load_file(checkpoint / "ema.safetensors")) == len(train)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("encodr.*", r"training.freeze: 'encodr.\*' fits no parameter of the model; did you mean 'encoder.\*'\?"),
        ("encoder", r"'encoder' fits no parameter of the model; did you mean .* Its parts are encoder.\*, decoder.\*"),
        ("*", r"training.freeze: \* leaves nothing to train: all \d+ tensors of the model would be frozen"),
    ],
)
def test_patterns_that_do_nothing_or_too_much_are_refused(made, tmp_path, pattern, message):
    with pytest.raises(ValueError, match=message):
        go_on(made, tmp_path, f"training.freeze={pattern}")


def test_no_gradient_is_measured_at_a_layer_that_stands_still(made, tmp_path):
    words = [f"out={tmp_path}", f"init={made / 'vae'}", "image_size=32", ONE_STEP, *QUIET, "loss.adversarial=0.1"]
    words += ["loss.adaptive=last_layer", "training.freeze=autoencoder.decoder.conv_out.*"]
    with pytest.raises(ValueError, match=r"loss.adaptive: last_layer measures gradients at the layer that gives"):
        autoencoder.main(load(autoencoder.Config, None, words))


# ------------------------------------------------------------------------------------------------ decoder_only


WRITES = kinds.LINES["karl"].config
"""A KARL that, before `rounded_from`, writes vectors into its table where that may change."""
WRITES = replace(WRITES, training=replace(WRITES.training, rounded_from=9))
LINES = {**ENCODING, "karl-writes": replace(ENCODING["karl"], config=WRITES)}


@pytest.mark.parametrize("name", LINES)
def test_a_trained_decoder_leaves_every_image_its_tokens_to_the_bit(name):
    model = kinds.build(LINES[name])
    if not LINES[name].trained:
        with pytest.raises(ValueError, match=r"decoder_only: .* no decoder of its own .*; train that of its autoenc"):
            train_decoder_only(model, None, ())
        return
    images, short, start = kinds.images(model, 4), LINES[name].short, kinds.build(LINES[name])

    def said(model) -> list[torch.Tensor]:
        encoded = model.encode(images)
        if isinstance(model, Autoencoder):
            return [model.moments(images), encoded]
        return [kinds.table(encoded, model.num_tokens), *([] if encoded.vectors is None else [encoded.vectors])]

    with torch.no_grad():
        before, decoded = said(model), kinds.decode(model, range(2), **short)
    trained = to_train(model, None, 1).train()
    train_decoder_only(model, None, ())
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    trained(images, generator=torch.Generator().manual_seed(0)).total.backward()
    optimizer.step()
    again = kinds.build(LINES[name])  # torch computes otherwise in the last bits where no parameter needs a gradient
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(before, said(again), strict=True))
        assert not torch.equal(kinds.decode(again, range(2), **short), decoded)
    assert again.encodes_like(start)
    for name, tensor in again.state_dict().items():  # all that encodes counts
        if tensor.is_floating_point() and not any(fnmatch.fnmatch(name, one) for one in model.only_decodes):
            with torch.no_grad():
                tensor.add_(1.0)
            assert not again.encodes_like(start), name
            with torch.no_grad():
                tensor.copy_(start.state_dict()[name])
    assert again.encodes_like(start)


def test_tokens_that_were_cached_before_are_still_accepted(made, tmp_path):
    once = go_on(made, tmp_path / "once", "decoder_only=true", "model.decoding.steps=3")
    twice = tmp_path / "twice"
    words = [f"init={once}", "decoder_only=true"]
    go_on(made, twice, *words)
    go_on(made, twice, *words, "training.steps=2", "training.schedule=constant")  # goes on, and still knows
    assert all(name.startswith("decoder.") for name in moved(made, twice / "final"))
    images = kinds.images(imgtok.load(once), 4)
    ids = imgtok.load(made / "tokenizer").encode(images).ids
    for name in (once, twice, twice / "checkpoints/step_0000002"):
        found = imgtok.hub.resolve(name)
        assert torch.equal(imgtok.load(found).encode(images).ids, ids)
        assert len(TokenContent(made / "tokens", found).cache) == 24
    whole = go_on(made, tmp_path / "whole", f"init={once}")
    with pytest.raises(DataError, match=r"tokens of tokenizer \w+, but tokenizer \w+ is asked for"):
        TokenContent(made / "tokens", imgtok.hub.resolve(whole))


def warned(caplog, name: Path, tokenizer: Path | None) -> bool:
    """Whether it is said of a generator with a tokenizer, in one line, that this one's ids mean something else."""
    caplog.clear()
    pipe = imgtok.pipeline(name, tokenizer=tokenizer, device="cpu")
    assert pipe(classes=[0])[0].size == (16, 16)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    told = f"tokenizer: {tokenizer} is another one than {name} was trained after: its token ids mean something else"
    assert said == [] or (len(said) == 1 and said[0].startswith(told)), said
    return bool(said)


def test_a_generator_says_that_a_tokenizer_gives_other_tokens_than_its_own(made, tmp_path, caplog):
    words = [f"tokens={made / 'tokens'}", f"tokenizer={made / 'tokenizer'}", ONE_STEP, "num_preview=0", *QUIET[:2]]
    run, model = tmp_path / "gpt", "model={kind: gpt, width: 16, depth: 1, num_heads: 2}"
    generator.main(load(generator.Config, None, [f"out={run}", model, *words]))
    tuned = go_on(made, tmp_path / "tuned", "decoder_only=true", "model.decoding.steps=3")
    other, bare, halves = (tmp_path / name for name in ("other", "bare", "halves"))
    model = kinds.build(kinds.Line(config=SMALL, step=kinds.flextok_step))
    model.half().float().save_pretrained(halves)
    FlexTok(SMALL).save_pretrained(other)
    shutil.copytree(tuned, bare)
    (bare / "identity.json").unlink()  # which tells that only its decoder was trained

    for name in (run / "final", run / "checkpoints/step_0000001"):
        assert not any(warned(caplog, name, same) for same in (None, made / "tokenizer", tuned, bare, halves))
        assert warned(caplog, name, other)
    assert main(["sample", str(run / "final"), f"tokenizer={other}", f"out={tmp_path / 'drawn'}", "num=1"]) == 0
    assert "its token ids mean something else" in caplog.text

    shutil.rmtree(run / "final/tokenizer")  # then the record tells
    assert not any(warned(caplog, run / "final", same) for same in (made / "tokenizer", tuned))
    assert warned(caplog, run / "final", other)
    (run / "final/identity.json").unlink()
    (run / "identity.json").unlink(missing_ok=True)
    assert not warned(caplog, run / "final", other), "nothing is known"


def test_latents_that_were_cached_before_are_still_accepted(made, tmp_path):
    words = [f"out={tmp_path}", f"init={made / 'vae'}", "image_size=16", "decoder_only=true", ONE_STEP, *QUIET]
    autoencoder.main(load(autoencoder.Config, None, words))
    assert imgtok.load(tmp_path / "final").config == SMALL_VAE, "the scale of the latents is not measured again"
    assert len(LatentContent(made / "latents", imgtok.hub.resolve(tmp_path)).cache) == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.image_size=32"], r"model.image_size has a part in encoding: it is 16 in .* and 32 here; leave model."),
        (["model.levels=[4,5]"], r"model.levels has a part in encoding"),
        (["init=null", "model.kind=flextok"], r"decoder_only: there is no encoder to keep; .* init=MODEL"),
        (["half=true"], r"half: float16 would round the weights that encode"),
        (["vae=shapes32"], r"vae: with decoder_only the model keeps the autoencoder that it encodes with"),
        (["training.freeze=[decoder.*]"], r"training.freeze: decoder.\* leaves nothing to train"),
    ],
)
def test_what_would_change_the_tokens_is_refused(made, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        go_on(made, tmp_path, "decoder_only=true", *words)


def test_a_larger_decoder_may_be_put_after_the_same_encoder(made, tmp_path):
    final = go_on(made, tmp_path, "decoder_only=true", "model.decoder.depth=2", "init_new=[decoder.blocks.1.*]")
    images = kinds.images(imgtok.load(final), 4)
    assert torch.equal(
        imgtok.load(final).encode(images).ids, FlexTok.from_pretrained(made / "tokenizer").encode(images).ids
    )
