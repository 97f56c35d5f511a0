"""What an image is drawn for, once for all generators: a class, or the features of a caption.

While training, the condition of some samples is replaced by none, so that sampling can be guided away from none: "no
class" is a label of its own, "no caption" the empty text, whose features a model keeps in its folder. A generator
that reads text has cross-attention in every block, to the captions' features behind a small MLP; they stay the same
for all calls of a `generate`, so `read` computes its keys and values once. How a class enters is each model's own.

Shapes: B images, T features of a caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imgtok.config import Fraction, PositiveInt, check
from imgtok.hub import Pretrained
from imgtok.layers.attention import CrossAttention
from imgtok.layers.cache import Memory
from imgtok.text.captions import Captions

Condition = Tensor | Captions
"""What images are made for: labels (B,), -1 for no class, or captions."""


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """What the configurations of all generators have; each says which values `kind` and `condition` take."""

    kind: str
    condition: str
    num_classes: PositiveInt = 1000
    """Classes; training fills it in from the cache of tokens or latents."""
    class_dropout: Fraction = 0.1
    """Share of training samples whose class or caption is replaced by none."""
    text_width: PositiveInt = 2048
    """Channels of a caption's features; training fills it in from the text cache."""
    text_length: PositiveInt = 120
    """Most features of a caption; training fills it in from the text cache."""
    empty_length: PositiveInt = 1
    """Features of the empty caption, which stands for none; training fills it in from the text cache."""
    text_encoder: str | None = None
    """Folder or Hub name of the text encoder, where sampling looks for it; training fills it in."""

    def __post_init__(self) -> None:
        check(self)
        if self.empty_length > self.text_length:
            raise ValueError(f"empty_length: {self.empty_length} is more than text_length = {self.text_length}")

    @property
    def reads_text(self) -> bool:
        """Whether captions are the condition, and not classes."""
        return self.condition == "cross_attention"


class ConditionalGenerator(nn.Module, Pretrained):
    """A generator of tokens or latents for labels or captions, with what is done to either before it is read.

    A model calls `_add_text` where its parameters are made, and has a `CrossAttention` in each block if it reads text.
    """

    config: ConditionConfig
    text_proj: nn.Sequential | None
    empty_caption: Tensor | None

    def _add_text(self, width: int) -> None:
        """The way of features (.., text_width) into a model of `width`, and the place of the empty caption's."""
        config = self.config
        self.text_proj = text_projection(config.text_width, width) if config.reads_text else None
        # Saved, so that a model folder knows its unconditional branch without the text encoder; see `set_empty_caption`
        empty = torch.zeros(config.empty_length, config.text_width) if config.reads_text else None
        self.register_buffer("empty_caption", empty)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"; -1 does so too."""
        return self.config.num_classes

    @torch.no_grad()
    def set_empty_caption(self, features: Tensor) -> None:
        """Keep the features (empty_length, text_width) of the empty text, which stands for "no caption"."""
        assert self.empty_caption is not None, "this model reads no captions"
        self.empty_caption.copy_(features)

    def unconditional(self, condition: Condition) -> Condition:
        """As many conditions that say nothing."""
        if isinstance(condition, Tensor):
            return torch.full_like(condition, self.null_class)
        assert self.empty_caption is not None
        length = torch.tensor([len(self.empty_caption)], device=self.empty_caption.device)
        return Captions(self.empty_caption.to(condition.features)[None], length).repeat(len(condition))

    def with_unconditional(self, condition: Condition) -> Condition:
        """The conditions, then as many that say nothing."""
        none = self.unconditional(condition)
        if isinstance(condition, Captions):
            assert isinstance(none, Captions)
            return condition.followed_by(none)
        assert isinstance(none, Tensor)
        return torch.cat([condition, none])

    def read(self, captions: Captions) -> Memory:
        """What the blocks' cross-attention looks at."""
        assert self.text_proj is not None, "a class-conditional model was called with captions"
        weight = next(self.text_proj.parameters())
        context = self.text_proj(captions.features.to(weight.dtype))  # (B, T, D)
        attentions = (module for module in self.modules() if isinstance(module, CrossAttention))  # block by block
        return Memory([attention.keys_values(context) for attention in attentions], captions.mask[:, None, None])

    def _drop_some(self, condition: Condition, generator: torch.Generator) -> Condition:
        """`class_dropout` of the conditions replaced by none."""
        draws = torch.rand(len(condition), generator=generator, device=generator.device)
        dropped, none = draws < self.config.class_dropout, self.unconditional(condition)
        if isinstance(condition, Captions):
            assert isinstance(none, Captions)
            return condition.replaced(dropped.to(condition.features.device), none)
        assert isinstance(none, Tensor)
        return torch.where(dropped.to(condition.device), none, condition)

    def _checked(self, condition: Condition) -> Condition:
        """The condition as sampling reads it. Raises ValueError for one that the model does not know."""
        config = self.config
        if isinstance(condition, Captions) != config.reads_text:
            needed, given = ("captions", "labels") if config.reads_text else ("labels", "captions")
            raise ValueError(f"this model (condition {config.condition}) draws for {needed}, given {given}")
        if isinstance(condition, Captions):
            _, columns, width = condition.features.shape
            if width != config.text_width or columns > config.text_length:
                raise ValueError(
                    f"captions of {columns} features of width {width}; this model reads at most {config.text_length} "
                    f"of width {config.text_width}: encode them with its own text encoder"
                )
            # One width for every batch, or the last bits would tell who shared it
            return condition.widen(config.text_length)
        if len(condition) and not (int(condition.min()) >= -1 and int(condition.max()) <= self.null_class):
            raise ValueError(
                f"labels must lie in 0 to {config.num_classes - 1} (or -1 or {self.null_class} for no class), "
                f"got {int(condition.min())} to {int(condition.max())}"
            )
        return condition


def text_projection(text_width: int, width: int) -> nn.Sequential:
    """A caption's features (.., text_width) -> (.., width): text_width -> text_width -> width, tanh-GELU, no biases."""
    return nn.Sequential(
        nn.Linear(text_width, text_width, bias=False),
        nn.GELU(approximate="tanh"),
        nn.Linear(text_width, width, bias=False),
    )
