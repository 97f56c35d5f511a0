"""Files of code that an exported folder has beside its weights: for a Space of the Hub, and for diffusers.

They hold no code of a model: each calls imgtok with the folder that it is in, so that it reads what that folder holds.
"""

from __future__ import annotations

import json
from pathlib import Path

from imgtok.files import replacing

APP = '''"""A demo of the model in this folder: `python app.py`, or a Space of the Hugging Face Hub (sdk: gradio).

It needs imgtok: installed, or as a wheel in this folder, which `python -m build --wheel` makes in imgtok's repository.
"""

import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path

here = Path(__file__).parent
if importlib.util.find_spec("imgtok") is None:
    wheels = sorted(here.glob("imgtok-*.whl"))
    if not wheels:
        sys.exit(
            "app.py needs imgtok: install it, or put its wheel into the folder of app.py; "
            "`python -m build --wheel` in imgtok's repository writes it to dist/"
        )
    sys.path.insert(0, tempfile.mkdtemp())
    zipfile.ZipFile(wheels[-1]).extractall(sys.path[0])  # it is all Python: what it needs is in requirements.txt

from imgtok.sample.demo import open_app

demo = open_app(here)

if __name__ == "__main__":
    demo.launch()
'''
NEEDED = """accelerate>=1.10
datasets>=3.0
diffusers>=0.35
einops>=0.8
gradio>=5.0
huggingface_hub>=0.34
matplotlib>=3.9
numpy>=1.26
pillow>=10.3
psutil>=5.9
pyarrow>=17.0
PyYAML>=6.0
safetensors>=0.5
tensorboard>=2.17
timm>=1.0.15
tokenizers>=0.20
torch>=2.11
torch-fidelity>=0.4
torchvision>=0.26
tqdm>=4.66
transformers>=4.56
"""
"""What imgtok and its extras `demo` and `text` need. It stands in pyproject.toml, too, which is not installed."""
REQUIREMENTS = f"""# What imgtok needs. imgtok itself is not on PyPI: run `python -m build --wheel` in its repository
# and copy dist/imgtok-*.whl into this folder, where app.py finds it. A Space also needs Python 3.11
# or newer: write python_version: "3.11" into the header of its README.md.
{NEEDED}"""
PIPELINE = '''"""The generator in this folder as a pipeline of diffusers. It needs imgtok, which draws.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True, dtype=torch.bfloat16).to("cuda")
    images = pipe(classes=[3, 7], seed=1).images  # or pipe("a red circle", seed=1), of a generator that reads text
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from imgtok.sample.folder_files import write_files


class ImgtokPipeline(DiffusionPipeline):
    """`tokenizer` is what tokenizer/models.py has read: the decoder, and the generator too."""

    def __init__(self, tokenizer):
        super().__init__()
        self.register_modules(tokenizer=tokenizer)

    @property
    def opened(self):
        """The pipeline of imgtok."""
        return self.tokenizer.opened

    def to(self, device=None, dtype=None, **_):
        """Where to compute, and in which arithmetic; weights stay in float32."""
        self.opened.to(device, dtype)
        return self

    def save_pretrained(self, save_directory, *, variant=None, **_):
        """Writes the models, as safetensors, and these files into another folder."""
        if variant is not None:
            raise ValueError(f"variant: given {variant!r}; the files of imgtok have no variants, leave it out")
        self.opened.save_pretrained(save_directory)
        write_files(Path(save_directory), draws=True)

    def __call__(
        self,
        prompt=None,
        classes=None,
        num_images_per_prompt=1,
        generator=None,
        seed=0,
        output_type="pil",
        return_dict=True,
        **settings,
    ):
        """Images of prompts or of classes; `settings` are those of `imgtok.pipeline`. The seed of a torch.Generator
        stands for its number: image i of seed s is the same whatever the batch."""
        if output_type != "pil":
            raise ValueError(f"output_type: given {output_type!r}, must be pil")
        seed = seed if generator is None else generator.initial_seed()
        images = self.opened(classes, prompt, num_per_condition=num_images_per_prompt, seed=seed, **settings)
        return ImagePipelineOutput(images=list(images)) if return_dict else (list(images),)
'''
MODELS = '''"""Reads the generator in the folder above and its decoder in this one, for pipeline.py.

diffusers hands what `from_pretrained` was given to the parts of a pipeline, and downloads the folders of parts. This
file makes a part of the two models, so that dtype, revision, cache_dir and token mean what they do for others.
"""

from pathlib import Path

import imgtok
import torch


class Models(torch.nn.Module):
    """The generator and its decoder."""

    def __init__(self, opened):
        super().__init__()
        self.opened = opened  # the pipeline of imgtok
        self.generator, self.decoder = opened.generator, opened.decoder

    @classmethod
    def from_pretrained(cls, folder, torch_dtype=None, dtype=None, **others):
        """Weights stay in float32; the dtype is the arithmetic in which the networks compute."""
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: a pipeline of imgtok does not take this; leave it out")
        return cls(imgtok.pipeline(Path(folder).parent, dtype=dtype or torch_dtype or "float32"))

    @property
    def device(self):
        return self.opened.device

    @property
    def dtype(self):
        """The arithmetic."""
        return self.opened.dtype
'''
MODEL_INDEX = (
    json.dumps(
        {
            "_class_name": ["pipeline", "ImgtokPipeline"],
            "_diffusers_version": "0.35.0",
            "tokenizer": ["models", "Models"],
        },
        indent=2,
    )
    + "\n"
)


def write_files(folder: Path, *, draws: bool) -> None:
    """Writes `app.py` and `requirements.txt`, and of a generator with its decoder (`draws`) `pipeline.py`,
    `tokenizer/models.py` and `model_index.json`; files that are there stay as they are.
    """
    files = {"app.py": APP, "requirements.txt": REQUIREMENTS}
    if draws:
        files |= {"pipeline.py": PIPELINE, "tokenizer/models.py": MODELS, "model_index.json": MODEL_INDEX}
    for name, text in files.items():
        if not (folder / name).exists():
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
