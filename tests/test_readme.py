"""README.md: its commands parse, the configurations that they name exist, and its lines of Python run as they stand.

The commands of docs/fine-tuning.md parse, too.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from imgtok.cli import JOBS, TOOLS, parse
from imgtok.generators.conditioning import ClassModulation, ClassSlot
from imgtok.generators.entities import Cells
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.pipeline import Pipeline
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]


def commands(pages: Sequence[str] = ("README.md", "docs/fine-tuning.md")) -> list[str]:
    """The `imgtok ...` lines of the shell blocks, comments and continuations resolved."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    lines = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("imgtok ")]


def test_the_commands_are_found():
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)  # where its relative paths start
    words = shlex.split(command, comments=True)[1:]
    if words[0] in TOOLS:
        assert len(words) >= 2
        return
    length = next(length for length in (2, 1) if " ".join(words[:length]) in JOBS)
    module = importlib.import_module(JOBS[" ".join(words[:length])][0])
    parse(module.Config, words[length:], getattr(module, "POSITIONAL", None))


def test_the_configurations_that_it_names_exist():
    named = re.findall(r"\bconfigs/[\w./-]+\.yaml", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_ci_runs_what_the_readme_says():
    called = re.search(r"^make (.*)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    assert called is not None
    assert f"CI runs `{called[0]}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(called[1].split()) <= set(targets)


# ---------------------------------------------------------------- Python


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """The models at the paths that the README names, of random weights: what the lines need, and not what they draw."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    trunk = TrunkConfig(width=32, depth=1, head_dim=16)
    tokenizer = FlexTok(
        FlexTokConfig(image_size=16, patch_size=4, num_registers=16, levels=(4, 4), encoder=trunk, decoder=trunk)
    )
    tokenizer.save_pretrained("outputs/quickstart/tokenizer/final")
    condition = ClassSlot(num_classes=64)
    gpt = GPT(GPTConfig(vocab_size=16, num_tokens=16, condition=condition, width=32, depth=1, num_heads=2))
    Pipeline(gpt, tokenizer, device="cpu").save_pretrained("outputs/quickstart/generator/final")
    vae = VAE(VAEConfig(latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=4))
    xar = XAR(
        XARConfig(
            latent_channels=4, grid=8, condition=ClassModulation(num_classes=64), entities=Cells(height=4, width=4),
            width=32, depth=1, num_heads=2, sampling=FlowSampling(steps=(2,)),
        )
    )  # fmt: skip
    Pipeline(xar, vae, device="cpu").save_pretrained("outputs/shapes/xar/final")
    return tmp_path


def test_the_lines_of_python_run_as_they_stand(trained, capsys):
    assert len(blocks()) == 2
    made = {}
    for block in blocks():
        exec(block, made)
    assert isinstance(made["preview"], Image.Image)
    assert made["preview"].size == (16, 16)
    assert [picture.size for picture in made["previews"]] == [(16, 16)] * 5
    assert made["pixels"].shape == (1, 3, 16, 16)
    assert {path.name for path in (trained / "my-generator").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer",
    }  # fmt: skip
    assert "Pipeline(GPT -> FlexTok, 16 pixels" in capsys.readouterr().out


def test_the_configurations_train_what_the_lines_open():
    named = set(re.findall(r'"(outputs/[\w/-]+)/final"', "".join(blocks())))
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "configs").rglob("*.yaml")]
    for folder in named:
        assert any(f"out: {folder}\n" in text for text in texts), folder
