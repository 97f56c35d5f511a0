"""Causal language models of transformers under the decoding loop of the suite: tiny random ones, built from
configurations, against their own forward pass over the whole sequence.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from imgtok import randomness
from imgtok.generators import huggingface
from imgtok.generators.sampling import TokenSampling, draw, law
from imgtok.generators.speculative import in_one

transformers = pytest.importorskip("transformers", reason="pip install 'imgtok[text]' brings transformers")

PROMPTS, NONE = [[1, 5, 9], [1], [1, 7, 2, 8, 3]], [1, 4]
COUNT, SEED, SOME = 8, 3, list(range(10, 26))
"""Tokens of an image, and the ids that stand for some codes."""
NAMES = {f"IMGIMG{chr(ord('A') + code // 10)}{chr(ord('A') + code % 10)}Z": 10 + code for code in range(16)}


def initialised(model: Any, seed: int) -> Any:
    """In float64, so that no call rounds to another token, and with laws that are not flat."""
    torch.manual_seed(seed)
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def llama(depth: int = 2, seed: int = 0, **changes: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, **changes,
    )  # fmt: skip
    return initialised(transformers.LlamaForCausalLM(config), seed)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return initialised(transformers.GPT2LMHeadModel(config), 0)


def chameleon() -> Any:
    images = transformers.ChameleonVQVAEConfig(
        base_channels=32, channel_multiplier=[1], num_res_blocks=1, latent_channels=32, embed_dim=8, num_embeddings=16,
        resolution=4,
    )  # fmt: skip
    config = transformers.ChameleonConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, vq_config=images.to_dict(),
        vocabulary_map=NAMES | {"<image>": 30},
    )  # fmt: skip
    return initialised(transformers.ChameleonForConditionalGeneration(config), 0)


MODELS = {"llama": llama, "chameleon": chameleon}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Any:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def one() -> Any:
    return llama()


@torch.no_grad()
def whole(model: Any, sequence: list[int]) -> Tensor:
    """Logits (L, V) of one sequence without a cache, a mask or padding."""
    states = model.base_model(input_ids=torch.tensor([sequence]), use_cache=False).last_hidden_state
    return model.get_output_embeddings()(states)[0]


def plainly(model: Any, prompt: list[int], index: int, sampling: TokenSampling, ids: list[int]) -> list[int]:
    """What an image's tokens must be, from the whole sequence for each."""
    first = randomness.uniform(SEED, [index], (COUNT,), "tokens")[0, :1]
    others = randomness.uniform(SEED, [index], (COUNT - 1, 1, 3), "rounds")[0, :, 0, 1]
    uniforms, drawn = torch.cat([first, others]), list[int]()
    for k in range(COUNT):
        sequence = [ids[token] for token in drawn]
        logits, none = (whole(model, [*start, *sequence])[-1, ids] for start in (prompt, NONE))
        of_token = sampling.at(k, COUNT)
        drawn.append(int(draw(law(logits, of_token, None if sampling.guidance == 1 else none), uniforms[k])))
    return drawn


@pytest.mark.parametrize(
    "sampling",
    [TokenSampling(guidance=1.0), TokenSampling(guidance=2.0, schedule="linear", top_k=9, temperature=1.2)],
    ids=["plain", "guided"],
)
def test_tokens_are_those_of_the_whole_sequence(model, sampling):
    """Prompts of unequal lengths, in one batch, over the ids of some codes."""
    none = None if sampling.guidance == 1 else NONE
    options = {"num_tokens": COUNT, "seed": SEED, "sampling": sampling, "unconditional": none, "ids": SOME}
    tokens = huggingface.generate(model, PROMPTS, indices=[4, 0, 2], **options)
    assert tokens.ids.shape == (3, COUNT)
    for row, prompt, index in zip(tokens.ids.tolist(), PROMPTS, [4, 0, 2], strict=True):
        assert row == plainly(model, prompt, index, sampling, SOME)
    assert tokens.calls.calls.tolist() == [COUNT] * 3


WAYS = {
    "jacobi": {"decoding": "jacobi"},
    "maximal": {"decoding": "coupled"},
    "gumbel": {"decoding": "coupled", "coupling": "gumbel"},
    "grouped": {"decoding": "grouped", "group_size": 3},
    "draft": {"decoding": "draft", "draft_model": "given"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_most_likely_tokens_come_in_fewer_calls(one, way):
    """Rows advance at paces of their own; the peer is transformers' own greedy decoding."""
    sampling = TokenSampling(guidance=1.0, temperature=0.0, window=4, **WAYS[way])
    draft = one if way == "draft" else None
    tokens = huggingface.generate(one, PROMPTS, num_tokens=COUNT, seed=SEED, sampling=sampling, draft=draft)
    for row, prompt in zip(tokens.ids, PROMPTS, strict=True):
        given = torch.tensor([prompt])
        peer = one.generate(given, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
        assert row.tolist() == peer[0, len(prompt) :].tolist()
    assert (tokens.calls.calls <= COUNT).all()
    if way == "draft":  # its drafts are the model's own
        assert tokens.calls.calls.tolist() == [3] * 3
        assert torch.equal(tokens.calls.judged, tokens.calls.accepted)


@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_the_same_alone_and_in_a_batch(one, way):
    sampling = TokenSampling(guidance=2.0, window=4, **WAYS[way])
    draft = one if way == "draft" else None
    options = {"num_tokens": COUNT, "seed": SEED, "sampling": sampling, "unconditional": NONE, "draft": draft}
    together = huggingface.generate(one, PROMPTS, **options)
    for index, prompt in enumerate(PROMPTS):
        alone = huggingface.generate(one, [prompt], indices=[index], **options)
        assert torch.equal(alone.ids[0], together.ids[index])


def scores(network: huggingface.CausalLM) -> list[Tensor]:
    """Of windows that rows have begun at different tokens, over drafts that were forgotten: of each row, its last."""
    drawn = torch.arange(3 * 6).view(3, 6) * 7 % network.vocab_size
    network.first()
    network.score(drawn[:, :4].flip(0), 0)
    network.score(drawn[:, :3], 0)
    starts = torch.tensor([2, 0, 3])
    picked = torch.stack([row[start : start + 3] for row, start in zip(drawn, starts.tolist(), strict=True)])
    found = network.score(picked, in_one(starts))
    sequences = [
        [*p, *network.ids[r[: s + 3]].tolist()] for p, r, s in zip(PROMPTS, drawn, starts.tolist(), strict=True)
    ]
    return [torch.stack([a, whole(network.model, b)[-3:, network.ids]]) for a, b in zip(found, sequences, strict=True)]


def error(network: huggingface.CausalLM) -> float:
    return max((found - wanted).abs().max().item() for found, wanted in scores(network))


@pytest.mark.parametrize("name", ["sdpa", "eager", "gpt2"])
def test_scores_are_those_of_the_whole_sequence(name):
    model = gpt2() if name == "gpt2" else llama(attn_implementation=name)
    tolerance = 1e-5 if name == "eager" else 1e-12  # whose softmax is in float32
    assert error(huggingface.CausalLM(model, PROMPTS, 7)) < tolerance
    assert error(huggingface.CausalLM(model, PROMPTS, 7, SOME)) < tolerance


def test_mistakes_are_noticed():
    """Padding that is seen, positions that count it, and ids of codes taken for those of the vocabulary. Of a model
    with learned positions: rotary ones are relative, and do not see padding that is counted.
    """
    model = gpt2()
    for spoil in ("seen", "counted", "ids"):
        network = huggingface.CausalLM(model, PROMPTS, 7, SOME)
        if spoil == "seen":
            network.cache.prefix_mask = torch.ones_like(network.cache.prefix_mask)
        elif spoil == "counted":
            network.padding = torch.zeros_like(network.padding)
        else:
            network.ids = torch.arange(16)
        assert error(network) > 1e-3, spoil


def test_chameleon_draws_ids_that_its_own_head_forbids():
    model = chameleon()
    with torch.no_grad():
        own = model(torch.tensor([PROMPTS[0]])).logits[0, -1, SOME]
    assert own.max() == torch.finfo(own.dtype).min
    tokens = huggingface.generate(model, PROMPTS, num_tokens=40, seed=0, ids=sorted(NAMES.values()))
    assert len(tokens.ids.unique()) == 16


def test_what_is_refused(one):
    def refused(message: str, model: Any = one, prompts: Any = PROMPTS, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            huggingface.generate(model, prompts, **{"num_tokens": 4, "seed": 0} | changes)

    guided = TokenSampling(guidance=2.0)
    refused(r"unconditional: the prompt that guidance = 2.0 leads away from; name it", sampling=guided)
    refused(r"unconditional: .* guidance = 1.0 .* or leave it out", unconditional=NONE)
    refused(r"draft: goes with sampling.decoding=draft, which needs", draft=one)
    refused(r"prompts: 0 for 4 tokens each", prompts=[])
    refused(r"prompts: one is empty", prompts=[[1], []])
    refused(r"prompts: ids lie in \[0, 40\), given 1 to 40", prompts=[[1, 40]])
    refused(r"ids: ids lie in \[0, 40\), given 10 to 41", ids=[10, 41])
    refused(r"indices: 2 for 3 prompts", indices=[0, 1])
    refused(r"make 65 positions; the model's max_position_embeddings is 64", num_tokens=61)
    refused(
        r"group of 17 is larger than the vocabulary",
        ids=SOME,
        sampling=TokenSampling(guidance=1.0, decoding="grouped", group_size=17),
    )
    refused(
        r"sampling.forbidden: drawn ids lie in 0 to 15", ids=SOME, sampling=TokenSampling(guidance=1.0, forbidden=(16,))
    )
    refused(r"model: a LlamaModel has no output embeddings over a decoder", model=one.base_model)
    refused(r"in training mode, .* call model.eval\(\) first", model=copy.deepcopy(one).train())
    other = llama()
    other.config._attn_implementation = "flash_attention_2"
    refused(r"attention flash_attention_2 takes no masks .* attn_implementation='sdpa'", model=other)
    draft = TokenSampling(guidance=1.0, decoding="draft", draft_model="given")
    narrow = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    ).eval()
    refused(r"draft: it has 20 ids to draw, and the model 40", draft=narrow, sampling=draft)
