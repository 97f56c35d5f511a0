"""`imgtok merge`: weights moved away from those of a copy that was trained on its own samples."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import imgtok
from imgtok.cli import main
from imgtok.generators.conditioning import ClassSlot
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling
from imgtok.hub import resolve
from imgtok.runs import ENCODES_AS
from imgtok.sample.merge import extrapolated
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAEConfig
from imgtok.tokenizers.vq import VQ, VQConfig

TRUNK = TrunkConfig(width=16, depth=1, head_dim=8)
SMALL_VAE = VAEConfig(latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=4)
CODES = VQConfig(image_size=8, block_channels=(8, 8), layers_per_block=1, hidden_channels=8, norm_groups=4)
SMALL = GPTConfig(vocab_size=16384, num_tokens=16, width=8, depth=1, num_heads=1, condition=ClassSlot(num_classes=2))


def saved(model, name: str, seed: int = 0, change: float = 0.0):
    """A model with some weights of its own, and with `change` also moved from there, in a folder."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
            if parameter.requires_grad:
                parameter += change * torch.randn(parameter.shape)
    model.save_pretrained(name)
    return model


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch) -> GPT:
    monkeypatch.chdir(tmp_path)
    return saved(GPT(SMALL), "base")


@pytest.fixture
def tuned() -> GPT:
    model = saved(GPT(replace(SMALL, sampling=TokenSampling(guidance=3.0))), "unused", change=0.01)
    model.save_pretrained("tuned")
    return model


def test_it_goes_from_one_model_to_the_other_and_beyond(base, tuned):
    assert main(["merge", "base", "tuned=tuned", "w=-1,0,1.5", "out=there"]) == 0
    assert sorted(path.name for path in Path("there").iterdir()) == ["w-1", "w0", "w1.5"]
    ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    for name in ours:
        found = {w: dict(imgtok.load(f"there/w{w}").named_parameters())[name] for w in ("-1", "0", "1.5")}
        assert torch.equal(found["0"], ours[name])
        assert torch.equal(found["-1"], theirs[name])
        assert torch.allclose(found["1.5"], 2.5 * ours[name] - 1.5 * theirs[name], atol=1e-5)
    assert imgtok.load("there/w1.5").config == SMALL  # its sampling, too


def test_the_record_and_the_card_say_of_what_it_was_made(tuned, caplog):
    caplog.set_level("INFO")
    for _ in range(2):  # a second time replaces it
        assert main(["merge", "base", "tuned=tuned", "w=0.5", "out=there"]) == 0
    record = json.loads(Path("there/merged.json").read_text())
    assert record["w"] == 0.5
    assert [record[name]["name"] for name in ("base", "tuned")] == ["base", "tuned"]
    assert record["displacement"] == pytest.approx(0.01, rel=0.1)
    assert f"tuned lies {record['displacement']:.3g} of the norm of its weights away from base" in caplog.text
    assert Path("there/README.md").read_text().count("base + 0.5 (base - tuned)") == 1
    assert main(["merge", "base", "tuned=tuned", "w=1", "out=there"]) == 2


def test_a_merged_tokenizer_claims_no_tokens_of_others():
    saved(VQ(CODES), "base")
    saved(VQ(CODES), "tuned", change=0.1)
    Path("base/identity.json").write_text(json.dumps({"fingerprint": "1", ENCODES_AS: ["abc"]}))
    assert main(["merge", "base", "tuned=tuned", "out=there"]) == 0
    assert json.loads(Path("there/identity.json").read_text()) == {"fingerprint": "1"}


def test_a_generator_keeps_its_decoder():
    saved(VQ(CODES), "base/tokenizer")
    saved(GPT(SMALL), "tuned", change=0.1)
    assert main(["merge", "base", "tuned=tuned", "out=there"]) == 0
    assert resolve("there/tokenizer").fingerprint() == resolve("base/tokenizer").fingerprint()
    assert 'imgtok.pipeline("there")' in Path("there/README.md").read_text()


def test_what_is_not_trained_is_the_same_in_both(capsys):
    config = FlexTokConfig(image_size=16, num_registers=4, encoder=TRUNK, decoder=TRUNK, patch_size=2, vae=SMALL_VAE)
    model = saved(FlexTok(config), "tokenizer")
    saved(FlexTok(config), "further", change=0.1)
    assert main(["merge", "tokenizer", "tuned=further", "out=there"]) == 0
    for name, parameter in imgtok.load("there").named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) != parameter.requires_grad, name
    saved(FlexTok(config), "another", seed=1)
    assert main(["merge", "tokenizer", "tuned=another", "out=elsewhere"]) == 2
    said = capsys.readouterr().err
    for name, parameter in model.named_parameters():
        assert (f"not trained, and yet different: {name}" in said) != parameter.requires_grad


def test_other_models_are_refused(capsys, base):
    saved(VQ(CODES), "codes")
    assert main(["merge", "base", "tuned=codes", "out=there"]) == 2
    assert "tuned: codes holds a model of kind 'vq', and base one of kind 'gpt'" in capsys.readouterr().err
    saved(GPT(replace(SMALL, vocab_size=12, depth=2)), "larger")
    assert main(["merge", "base", "tuned=larger", "out=there"]) == 2
    said = capsys.readouterr().err
    shapes = {name: tuple(value.shape) for name, value in base.named_parameters()}
    vocabulary = [name for name, shape in shapes.items() if 16384 in shape]
    assert vocabulary
    assert all(f"another shape: {name} is (12" in said for name in vocabulary)
    assert "too many: blocks.1." in said
    assert main(["merge", "base", "tuned=base", "out=there"]) == 2
    assert "there is no direction to go in" in capsys.readouterr().err
    broken = saved(GPT(SMALL), "broken")
    name, parameter = next(broken.named_parameters())
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan
    broken.save_pretrained("broken")
    assert main(["merge", "base", "tuned=broken", "out=there"]) == 2
    assert f"not all are finite numbers: {name}" in capsys.readouterr().err
    for w, message in (("inf", "w[0]: given 'inf', must be a number"), ("", "w: ")):
        assert main(["merge", "base", "tuned=codes", f"w={w}", "out=there"]) == 2
        assert message in capsys.readouterr().err
    assert not Path("there").exists()


def test_heads_that_no_shape_tells_are_said(caplog):
    saved(GPT(replace(SMALL, num_heads=2)), "heads", change=0.1)
    assert main(["merge", "base", "tuned=heads", "out=there"]) == 0
    assert "base and heads differ in num_heads; those of base are kept" in caplog.text


@pytest.mark.parametrize(("log_deviation", "temperature"), [(0.2, 0.8), (-0.3, 0.7), (-0.3, 1.2), (0.1, 1.3)])
def test_a_normal_law_is_recovered(log_deviation, temperature):
    """Model N(0, e^2a) and data N(0, 1): one gradient step of size h on samples of deviation tau e^a leads away from
    the data, and some w leads back: sampling again at the same temperature then has the law of the data.
    """
    a, h = torch.tensor(log_deviation, dtype=torch.float64, requires_grad=True), 0.01
    drawn_variance = (temperature * a.detach().exp()) ** 2
    loss = a + drawn_variance / (2 * (2 * a).exp())  # the mean negative log-likelihood of the samples
    (gradient,) = torch.autograd.grad(loss, a)
    tuned = a.detach() - h * gradient
    w = -(log_deviation + math.log(temperature)) / (h * (1 - temperature**2))
    merged = extrapolated(a.detach(), tuned, w)
    assert temperature * math.exp(merged) == pytest.approx(1.0)
    alone = extrapolated(a.detach(), tuned, -log_deviation / (h * (1 - temperature**2)))
    assert math.exp(alone) == pytest.approx(1.0)
