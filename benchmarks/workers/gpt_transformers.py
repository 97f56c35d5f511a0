"""`LlamaForCausalLM.generate` of transformers as a worker, with LlamaGen's weights and positions.

A class is one more entry of the embedding table, and the prompt; "no class" is the negative prompt. Two things are not
transformers' own, so that it draws the same law: the table of rotary positions, on a raster and nought for the class,
and the order of the channels of queries and keys, which it turns in halves where LlamaGen turns neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import recipe
import torch
from gpt_case import CLASSES, VOCABULARY, Case, Shape
from protocol import Setup, serve
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class RasterPositions(nn.Module):
    """In place of the model's own: cosines and sines (B, L, E) of the slots `position_ids` (B, L)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        half, side = shape.width // shape.heads // 2, round(shape.tokens**0.5)
        frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        angles = (places[..., None] * frequencies).flatten(1)  # (tokens, E / 2): rows, then columns
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            rows = torch.cat([torch.zeros(1, half), table])
            self.register_buffer(name, torch.cat([rows, rows], dim=1), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


class Peer:
    def __init__(self, setup: Setup) -> None:
        self.setup, shape = setup, Shape.of(setup.size)
        self.shapes = shape.parameters()
        if setup.device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = True
        config = LlamaConfig(
            vocab_size=VOCABULARY + CLASSES + 1,
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.width // shape.heads,
            rms_norm_eps=1e-5,
            max_position_embeddings=shape.tokens + 1,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        self.model = LlamaForCausalLM(config).eval()
        self.model.lm_head = nn.Linear(shape.width, VOCABULARY, bias=False)  # classes are never drawn
        self.model.model.rotary_emb = RasterPositions(shape)
        self.fill(shape)
        self.model.to(setup.device, torch.bfloat16 if setup.dtype == "bf16" else torch.float32)

    @torch.no_grad()
    def fill(self, shape: Shape) -> None:
        def drawn(name: str) -> Tensor:
            return torch.from_numpy(recipe.weight(name, tuple(self.shapes[name]), self.setup.seed))

        inner = self.model.model
        inner.embed_tokens.weight[:VOCABULARY] = drawn("tok_embeddings.weight")
        inner.embed_tokens.weight[VOCABULARY:] = drawn("cls_embedding.embedding_table.weight")
        inner.norm.weight.copy_(drawn("norm.weight"))
        self.model.lm_head.weight.copy_(drawn("output.weight"))
        width = shape.width // shape.heads
        order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
        for number, layer in enumerate(inner.layers):
            attention, mlp = layer.self_attn, layer.mlp
            q, k, v = drawn(f"layers.{number}.attention.wqkv.weight").chunk(3)
            for projection, rows in ((attention.q_proj, q), (attention.k_proj, k)):
                projection.weight.copy_(rows.unflatten(0, (shape.heads, width))[:, order].flatten(0, 1))
            attention.v_proj.weight.copy_(v)
            attention.o_proj.weight.copy_(drawn(f"layers.{number}.attention.wo.weight"))
            for projection, name in ((mlp.gate_proj, "w1"), (mlp.up_proj, "w3"), (mlp.down_proj, "w2")):
                projection.weight.copy_(drawn(f"layers.{number}.feed_forward.{name}.weight"))
            layer.input_layernorm.weight.copy_(drawn(f"layers.{number}.attention_norm.weight"))
            layer.post_attention_layernorm.weight.copy_(drawn(f"layers.{number}.ffn_norm.weight"))

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        if draws:
            raise ValueError("transformers draws by torch.multinomial")

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        labels = torch.from_numpy(recipe.integers("labels", (case.batch,), CLASSES, self.setup.seed))
        prompt = (VOCABULARY + labels)[:, None].to(self.setup.device)
        guided = {}
        if case.guidance > 1:
            none = torch.full_like(prompt, VOCABULARY + CLASSES)
            guided = {"guidance_scale": case.guidance, "negative_prompt_ids": none}
        torch.manual_seed(0)

        @torch.no_grad()
        def call() -> Tensor:
            how = {"do_sample": False} if case.greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
            drawn = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=case.tokens, **guided, **how
            )
            return drawn[:, 1:]

        return call


if __name__ == "__main__":
    serve(Peer, Case)
