"""The decoding loop of this suite around a causal language model of transformers that draws image tokens.

`generate` is to such a model what `GPT.generate` is to ours: one call of the network for each token, or fewer by
drafts, with the filters and the guidance of `TokenSampling`, image by image from the random numbers of (seed, index).
The model is any that has output embeddings over a decoder with full attention and `position_ids`: Llama and its kin, or
Chameleon. It is called as it stands; its cache is ours (`imgtok.layers.cache`), since rows advance at paces of their
own, and what a transformers cache holds has one length.

Prompts are ids of the model's vocabulary and end with what begins an image; shorter ones are padded on the left, where
nobody looks. Drawn are some ids of the vocabulary, `ids`, or all; tokens are counted as the tokenizer of images counts
them, so that token k stands for `ids[k]`. Logits are those of the output embeddings alone: what a model forbids beyond
them does not matter, as Chameleon all ids of images.

transformers itself is never imported: whoever has a model has it.

Shapes: B images, R rows through the network (2B where guided), P slots of the prompt, L slots of a call, S columns that
are looked at, V ids that are drawn, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.generators.sampling import TokenSampling
from imgtok.generators.speculative import OnStep
from imgtok.generators.speculative_gpt import check_group, decode_by
from imgtok.layers.cache import KVCache, LayerCache
from imgtok.tokenizers.tokens import Tokens

Prompts = Sequence[Sequence[int]]
ALTERED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Fields of configurations whose models do more to logits than their output embeddings say."""


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Prompts | Tensor,
    *,
    num_tokens: int,
    seed: int,
    indices: Sequence[int] | None = None,
    sampling: TokenSampling | None = None,
    unconditional: Sequence[int] | None = None,
    ids: Sequence[int] | Tensor | None = None,
    draft: nn.Module | None = None,
    on_step: OnStep | None = None,
) -> Tokens:
    """Tokens (B, num_tokens) after each of B prompts, which say how many calls they took.

    `sampling` is without guidance by default; with it, the other stream reads the prompt `unconditional` in place of
    each. `draft` is the smaller network of decoding=draft, of the same vocabulary. `indices` are 0.. by default.
    Raises ValueError for models, prompts, ids or settings that do not go together.
    """
    sampling = TokenSampling(guidance=1.0) if sampling is None else sampling
    rows = [[int(token) for token in prompt] for prompt in prompts]
    if not rows or num_tokens < 1:
        raise ValueError(
            f"prompts: {len(rows)} for {num_tokens} tokens each; give at least one, for at least one token"
        )
    if (unconditional is not None) != (sampling.guidance != 1):
        remedy = "name it" if unconditional is None else "say sampling.guidance, or leave it out"
        raise ValueError(f"unconditional: the prompt that guidance = {sampling.guidance} leads away from; {remedy}")
    if (draft is None) == (sampling.decoding == "draft"):
        raise ValueError("draft: goes with sampling.decoding=draft, which needs a smaller model of the same vocabulary")
    indices = range(len(rows)) if indices is None else indices
    if len(indices) != len(rows):
        raise ValueError(f"indices: {len(indices)} for {len(rows)} prompts; give one of each")
    streams = rows if unconditional is None else rows + [list(unconditional)] * len(rows)
    network = CausalLM(model, streams, num_tokens, ids)
    check_group(sampling, network.vocab_size)
    if max(sampling.forbidden, default=0) >= network.vocab_size:
        raise ValueError(f"sampling.forbidden: drawn ids lie in 0 to {network.vocab_size - 1}")
    smaller = None if draft is None else CausalLM(draft, streams, num_tokens, ids)
    if smaller is not None and smaller.vocab_size != network.vocab_size:
        raise ValueError(
            f"draft: it has {smaller.vocab_size} ids to draw, and the model {network.vocab_size}; both must agree"
        )
    return decode_by(
        network,
        sampling,
        seed=seed,
        indices=indices,
        num_tokens=num_tokens,
        length=num_tokens,
        vocab_size=network.vocab_size,
        device=network.device,
        draft=smaller,
        on_step=on_step,
    )


class CausalLM:
    """A causal language model of transformers after its prompts, see `speculative.Network`."""

    def __init__(
        self, model: Any, prompts: Prompts, num_tokens: int, ids: Sequence[int] | Tensor | None = None
    ) -> None:
        """`prompts` are of R rows. Raises ValueError for a model that cannot be driven, and for ids that it lacks."""
        self.model, (self.decoder, head) = model, decoder_of(model)
        config = self.decoder.config.get_text_config()
        vocabulary, self.device = head.weight.shape[0], head.weight.device
        longest = max(map(len, prompts))
        check_ids("prompts", [token for prompt in prompts for token in prompt], vocabulary)
        if not min(map(len, prompts)):
            raise ValueError("prompts: one is empty; it must at least have the token that begins an image")
        check_length(config, longest + num_tokens - 1)
        kept = slice(None) if ids is None else torch.as_tensor(ids, dtype=torch.long, device=self.device)
        if isinstance(kept, Tensor):
            check_ids("ids", kept.tolist(), vocabulary)
        self.ids = torch.arange(vocabulary, device=self.device)[kept]
        self.weight, bias = head.weight[kept], getattr(head, "bias", None)
        self.bias = None if bias is None else bias[kept]
        self.prompts = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        self.padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        for row, prompt in zip(self.prompts, prompts, strict=True):
            row[longest - len(prompt) :] = torch.tensor(prompt, device=self.device)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers, capacity = config.num_hidden_layers, longest + num_tokens - 1
        self.cache = KVCache(layers, len(prompts), heads, capacity, width, head.weight)
        self.cache.prefix_mask = torch.arange(longest, device=self.device) >= self.padding[:, None]
        takes = inspect.signature(self.decoder.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def first(self) -> Tensor:
        self.cache.truncate(0)
        return self._call(self.prompts, None)[:, -1]

    def score(self, ids: Tensor, first: Tensor | int) -> Tensor:
        streams, prompt = len(self.prompts) // len(ids), self.prompts.shape[1]
        ids = self.ids[ids].repeat(streams, 1)
        if isinstance(first, int):
            self.cache.truncate(prompt + first)
            return self._call(ids, None)
        before = prompt + first.repeat(streams)
        self.cache.truncate(before)
        return self._call(ids, before[:, None] + torch.arange(ids.shape[1], device=ids.device))

    def _call(self, ids: Tensor, columns: Tensor | None) -> Tensor:
        """Logits (R, L, V) after ids (R, L), in the columns of the cache that follow, or in `columns` (R, L)."""
        window = self.cache.open(ids.shape[1], columns)
        if columns is None:
            columns = torch.arange(window.new.start, window.new.stop, device=self.device)[None]
        assert window.mask is not None, "a prefix mask has something to hide"
        # numbers, not truth values, since the plain attention of transformers adds them
        hidden = torch.zeros(window.mask.shape, dtype=self.weight.dtype, device=self.device)
        hidden.masked_fill_(~window.mask, torch.finfo(hidden.dtype).min)
        states = self.decoder(
            input_ids=ids,
            attention_mask=hidden.expand(len(ids), -1, -1, -1),
            position_ids=(columns - self.padding[:, None]).clamp(min=0),
            use_cache=True,
            **{self.cache_name: Layers(self.cache.layers(window))},
        ).last_hidden_state
        return F.linear(states, self.weight, self.bias)


class Layers:
    """What a layer of transformers knows of a cache in one call: it hands over new keys and values, and gets all."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = layers

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """All that the layer looks at, (R, H, S, E), of new keys and values (R, H, L, E)."""
        return self.layers[layer].append(keys, values)

    def get_seq_length(self, layer: int = 0) -> int:
        """Asked for by older releases beside positions that are given; nothing depends on it then."""
        return 0


def decoder_of(model: Any) -> tuple[Any, Any]:
    """The decoder of a model, which gives states, and its output embeddings. Raises ValueError for a model that cannot
    be driven.
    """
    name = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = getattr(model, "base_model", model)
    if head is None or decoder is model:
        raise ValueError(f"model: a {name} has no output embeddings over a decoder; give a causal language model")
    if model.training:
        raise ValueError("model: it is in training mode, where it may drop out; call model.eval() first")
    config = decoder.config.get_text_config()
    altered = [field for field in ALTERED if getattr(config, field, None) not in (None, 1.0)]
    if altered:
        raise ValueError(f"model: a {name} changes its logits by {altered[0]}, which this loop does not know of")
    attention = getattr(config, "_attn_implementation", "eager")
    if attention not in ("eager", "sdpa"):
        raise ValueError(
            f"model: its attention {attention} takes no masks that are given; load it with attn_implementation='sdpa'"
        )
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise ValueError(
            f"model: some layers of this {name} do not look at all tokens, which this loop does not know of"
        )
    return decoder, head


def check_length(config: Any, length: int) -> None:
    """Raises ValueError for a sequence that the model has no positions for, or does not see as a whole."""
    for field in ("max_position_embeddings", "sliding_window"):
        most = getattr(config, field, None)
        if most is not None and length > most:
            raise ValueError(
                f"num_tokens: the longest prompt and its tokens make {length} positions; the model's {field} is {most}"
            )


def check_ids(name: str, ids: Sequence[int], vocabulary: int) -> None:
    """Raises ValueError for ids outside a vocabulary, and for none."""
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        given = f"{min(ids)} to {max(ids)}" if ids else "none"
        raise ValueError(f"{name}: ids lie in [0, {vocabulary}), given {given}")
