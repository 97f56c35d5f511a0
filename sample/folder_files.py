"""Files of code that an exported folder has beside its weights: for a Space of the Hub, and for diffusers.

They hold no model code: each calls imgtok with the folder that it stands in, so that it reads what that folder holds.
"""

from __future__ import annotations

import json
from pathlib import Path

from imgtok.files import replacing

APP = '''"""A demo of the model in this folder: `python app.py`, or a Space of the Hugging Face Hub (sdk: gradio)."""

from pathlib import Path

from imgtok.sample.demo import open_app

demo = open_app(Path(__file__).parent)

if __name__ == "__main__":
    demo.launch()
'''
REQUIREMENTS = "imgtok[demo]\n"
PIPELINE = '''"""The generator in this folder as a pipeline of diffusers. It needs imgtok, which draws.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True).to("cuda")
    images = pipe(classes=[3, 7], seed=1).images  # or pipe("a red circle", seed=1), of a generator that reads text
"""

import imgtok
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class ImgtokPipeline(DiffusionPipeline):
    """Reads the models of the folder that it came from when it is first called."""

    def __init__(self):
        super().__init__()
        self._opened, self._place, self._kind = None, None, "float32"

    def to(self, device=None, dtype=None, **_):
        """Where to compute, and in which arithmetic; weights stay in float32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        self._place, self._kind = device or self._place, dtype or self._kind
        if self._opened is not None:
            self._opened.to(device, dtype)
        return self

    @property
    def opened(self):
        """The pipeline of imgtok."""
        if self._opened is None:
            self._opened = imgtok.pipeline(self.config._name_or_path, device=self._place, dtype=self._kind)
        return self._opened

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
MODEL_INDEX = (
    json.dumps({"_class_name": ["pipeline", "ImgtokPipeline"], "_diffusers_version": "0.35.0"}, indent=2) + "\n"
)


def write_files(folder: Path, *, draws: bool) -> None:
    """Writes `app.py` and `requirements.txt`, and of a generator with its decoder (`draws`) `pipeline.py` and
    `model_index.json`; files that are there stay as they are.
    """
    files = {"app.py": APP, "requirements.txt": REQUIREMENTS}
    files |= {"pipeline.py": PIPELINE, "model_index.json": MODEL_INDEX} if draws else {}
    for name, text in files.items():
        if not (folder / name).exists():
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
