"""`training.lora`: adapters are trained in place of weights, and the finished model is an ordinary one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import kinds
import pytest
import torch
from safetensors.torch import save_file

import imgtok
from imgtok.checkpoints import with_adapters
from imgtok.config import load
from imgtok.data.tokens import TokenCacheInfo, TokenShardWriter
from imgtok.generators.gpt import GPTConfig
from imgtok.hub import resolve
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTokConfig
from imgtok.tokenizers.tokens import Tokens
from imgtok.train import generator, tokenizer
from imgtok.train.config import LoRAConfig, TrainingConfig
from imgtok.train.lora import add_adapters
from imgtok.weights import open_weights

SMALL = FlexTokConfig(**kinds.FLEXTOK | {"num_registers": 4, "levels": (4, 4)}, patch_size=4)
ADAPTERS = ("training.lora.rank=2", "training.lora.alpha=6", "training.lora.targets=*attention.qkv_proj,*.mlp.*")
GPT = GPTConfig(**kinds.GPT | {"vocab_size": 16, "num_tokens": 4})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A generator, its tokenizer, and a cache of tokens of three classes."""
    model = kinds.build(kinds.Line(config=SMALL, step=kinds.flextok_step))
    model.save_pretrained(tmp_path / "tokenizer")
    kinds.build(kinds.Line(config=GPT, step=kinds.gpt_step)).save_pretrained(tmp_path / "gpt")
    facts = {"dataset": "{}", "split": "train", "num_images": 8, "shard_size": 8, "image_size": 16, "vocab_size": 16}
    facts |= {"num_tokens": 4, "num_classes": 3, "fingerprint": resolve(tmp_path / "tokenizer").fingerprint()}
    writer = TokenShardWriter(tmp_path / "tokens", TokenCacheInfo(**facts))
    writer.write(0, Tokens.full(torch.arange(32).view(8, 4) % 16), torch.arange(8) % 3, range(8))
    return tmp_path


def train(made: Path, *overrides: str) -> Path:
    inputs = [f"tokens={made / 'tokens'}", f"tokenizer={made / 'tokenizer'}", f"init={made / 'gpt'}"]
    quiet = ["training.trackers=[]", "num_preview=2", "training.preview_every=0", "training.ema=0.5"]
    fields = ["training={steps: 2, batch_size: 4, learning_rate: 1e-2}", f"out={made / 'run'}"]
    generator.main(load(generator.Config, None, [*fields, *inputs, *quiet, *overrides]))
    return made / "run"


@pytest.mark.slow  # peft takes 6 s to import
def test_the_finished_model_is_ordinary_and_so_is_a_checkpoint_of_it(made):
    pytest.importorskip("peft")
    run = train(made, *ADAPTERS)
    before, after = imgtok.load(made / "gpt").state_dict(), imgtok.load(run / "final").state_dict()
    assert before.keys() == after.keys()
    moved = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    layers = {name for name in before if ".attention.qkv_proj." in name or ".mlp." in name}
    assert moved == layers | {"class_embedding.weight"}, "of other classes: it starts afresh, and is trained whole"
    change = after["blocks.0.mlp.down_proj.weight"] - before["blocks.0.mlp.down_proj.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    checkpoint = imgtok.load(run / "checkpoints/step_0000002").state_dict()
    assert checkpoint.keys() == after.keys()
    assert all(torch.allclose(checkpoint[name], after[name], atol=1e-6) for name in after)
    further = train(made, *ADAPTERS, "training.steps=3")
    assert imgtok.load(further / "final").state_dict().keys() == after.keys(), "it goes on from its checkpoint"


def test_a_checkpoint_with_adapters_is_read_as_their_sum(tmp_path):
    base, thin, wide = torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    names = {"a.base_layer.weight": base, "a.base_layer.bias": base[0].clone(), "b.weight": thin}
    names |= {"a.lora_A.default.weight": thin.clone(), "a.lora_B.default.weight": wide}
    save_file(names, tmp_path / "model.safetensors")
    found = with_adapters(open_weights(tmp_path / "model.safetensors", as_stored=True), {"rank": 2, "alpha": 6.0})
    assert set(found) == {"a.weight", "a.bias", "b.weight"}
    assert torch.allclose(found["a.weight"], base + 3 * wide @ thin)
    assert torch.equal(found["a.bias"], base[0])


def test_what_it_needs_is_said(monkeypatch):
    model = kinds.build(kinds.LINES["gpt"])
    with pytest.raises(ValueError, match=r"training.lora.targets: 'blocks.0.attention.qkv' fits no linear layer .*did"):
        add_adapters(model, LoRAConfig(targets=("blocks.0.attention.qkv",)), ())
    frozen = kinds.build(kinds.LINES["gpt"]).requires_grad_(False)
    with pytest.raises(ValueError, match=r"training.lora: training.freeze holds all layers"):
        add_adapters(frozen, LoRAConfig(), ())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ValueError, match=r"training.lora: needs the package peft, .*pip install 'imgtok\[finetune\]'"):
        add_adapters(model, LoRAConfig(), ())
    training = TrainingConfig(steps=1, batch_size=1, learning_rate=1.0, lora=LoRAConfig())
    with pytest.raises(ValueError, match=r"training.lora: adapters are added to a model .*init=MODEL"):
        generator.Config(out=Path("x"), tokens=Path("x"), tokenizer="x", model=GPT, training=training)
    with pytest.raises(ValueError, match=r"training.lora: adapters are for generators; .* decoder_only=true trains"):
        tokenizer.Config(out=Path("x"), data=ShapesConfig(), init="y", training=training)
