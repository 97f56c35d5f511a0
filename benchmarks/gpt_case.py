"""What can be timed of LlamaGen; all processes read it, so it imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY, CLASSES = 16384, 1000
"""LlamaGen's ids and classes."""
SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1280, 36, 20), "XXL": (1536, 48, 24), "3B": (3200, 24, 32)}
"""Width, blocks and heads."""


@dataclass(frozen=True)
class Case:
    """Drawing `tokens` of each of `batch` images, for random classes; at `greedy` the most likely ones."""

    batch: int
    tokens: int = 256
    guidance: float = 2.0
    greedy: bool = False


@dataclass(frozen=True)
class Shape:
    """Of one model."""

    width: int
    depth: int
    heads: int
    tokens: int
    """Of an image: a square number."""

    @classmethod
    def of(cls, size: str) -> Shape:
        """Of "B:256", "128x2:64": a published size, or width x depth with heads of 64 channels, and the tokens.

        Raises ValueError for anything else.
        """
        name, _, tokens = size.partition(":")
        width, depth, heads = SIZES[name] if name in SIZES else own_size(name)
        side = round(int(tokens) ** 0.5)
        if side**2 != int(tokens):
            raise ValueError(f"{tokens} tokens make no square")
        return cls(width, depth, heads, int(tokens))

    @property
    def hidden(self) -> int:
        """Of the feed-forward layers."""
        return -(-(8 * self.width // 3) // 256) * 256

    def parameters(self) -> dict[str, list[int]]:
        """Published name -> shape."""
        width, hidden = self.width, self.hidden
        shapes = {
            "cls_embedding.embedding_table.weight": [CLASSES + 1, width],
            "tok_embeddings.weight": [VOCABULARY, width],
            "norm.weight": [width],
            "output.weight": [VOCABULARY, width],
        }
        for layer in range(self.depth):
            for name, shape in {
                "attention.wqkv": [3 * width, width],
                "attention.wo": [width, width],
                "feed_forward.w1": [hidden, width],
                "feed_forward.w3": [hidden, width],
                "feed_forward.w2": [width, hidden],
                "attention_norm": [width],
                "ffn_norm": [width],
            }.items():
                shapes[f"layers.{layer}.{name}.weight"] = shape
        return shapes


def own_size(name: str) -> tuple[int, int, int]:
    """Width, blocks and heads of 128x2 and the like."""
    width, depth = map(int, name.split("x"))
    if width % 64:
        raise ValueError(f"{width} is no multiple of 64")
    return width, depth, width // 64
