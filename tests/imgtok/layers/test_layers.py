from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from imgtok.layers.attention import Attention, Look
from imgtok.layers.cache import KVCache
from imgtok.layers.feed_forward import SwiGLU
from imgtok.layers.norms import RMSNorm, layer_norm
from imgtok.layers.patches import patchify, unpatchify
from imgtok.layers.positions import rotary_2d, rotate, sincos_2d, time_features


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- attention


def attend(module: Attention, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Attention written out, one head at a time."""
    q, k, v = (x @ part.T for part in module.qkv_proj.weight.chunk(3))
    heads = []
    for q_h, k_h, v_h in zip(*(t.chunk(module.num_heads, dim=-1) for t in (q, k, v)), strict=True):
        if module.qk_norm:
            q_h, k_h = (F.layer_norm(t, t.shape[-1:]) for t in (q_h, k_h))
        scale = module.scale or q_h.shape[-1] ** -0.5
        scores = (q_h @ k_h.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v_h)
    return torch.cat(heads, dim=-1) @ module.out_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale": 0.25}, {"qk_norm": True, "scale": 0.25}])
def test_attention_against_the_formula(options):
    torch.manual_seed(0)
    module = Attention(24, 3, **options)
    x = randn(2, 5, 24)
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    everything = torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(module(x), attend(module, x, everything), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(module(x, mask=lower), attend(module, x, lower), atol=1e-6, rtol=1e-5)
    assert torch.equal(module(x, causal=True), module(x, mask=lower)) or torch.allclose(
        module(x, causal=True), module(x, mask=lower), atol=1e-6
    )


def test_attention_has_no_biases_and_one_fused_projection():
    shapes = {name: tuple(p.shape) for name, p in Attention(24, 3).named_parameters()}
    assert shapes == {"qkv_proj.weight": (72, 24), "out_proj.weight": (24, 24)}


def test_looks_are_parts_of_a_mask():
    """Two stretches that do not see each other, and some rows of one of them."""
    attention, x, bias = Attention(16, 2, qk_norm=True), randn(2, 5, 16), randn(2, 2, seed=1)
    mask = torch.full((5, 5), -torch.inf)
    mask[:3, :3], mask[3:, 3:] = 0, bias
    whole = attention(x, mask=mask)
    first, second = Look(slice(3), slice(3)), Look(slice(3, None), slice(3, None), bias)
    torch.testing.assert_close(attention(x, looks=[first, second]), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attention(x, looks=[second]), whole[:, 3:], atol=1e-6, rtol=1e-5)
    some = attention(x, looks=[Look(slice(1, 2), slice(3)), second])
    torch.testing.assert_close(some, whole[:, [1, 3, 4]], atol=1e-6, rtol=1e-5)


def test_a_cache_continues_where_it_stopped():
    torch.manual_seed(0)
    module = Attention(16, 2).eval()
    x = randn(2, 6, 16)
    whole = module(x, causal=True)
    cache = KVCache(1, rows=2, num_heads=2, capacity=6, head_dim=8, like=x)

    def call(part: torch.Tensor) -> torch.Tensor:
        return module(part, cache=cache.layers(cache.open(part.shape[1]))[0])

    parts = [call(x[:, :3]), *(call(x[:, i : i + 1]) for i in range(3, 6))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-6, rtol=1e-5)
    assert cache.length == 6
    with pytest.raises(ValueError, match="shorter sequence: 6 positions, not 7"):
        call(x[:, :1])


def test_a_cache_copies_no_keys():
    cache = KVCache(2, rows=1, num_heads=1, capacity=4, head_dim=2, like=torch.empty(0))
    layer = cache.layers(cache.open(2))[1]
    keys, values = layer.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    assert values.data_ptr() == cache.values[1].data_ptr()
    assert keys.shape == (1, 1, 2, 2)


# ---------------------------------------------------------------- feed-forward, norms


def test_feed_forward_gates_with_its_first_rows():
    torch.manual_seed(0)
    module = SwiGLU(6, 10)
    x = randn(3, 6)
    gate, up = (x @ part.T for part in module.gate_up_proj.weight.chunk(2))
    torch.testing.assert_close(module(x), (F.silu(gate) * up) @ module.down_proj.weight.T)


def test_layer_norm_epsilon_counts_for_small_vectors():
    x = 0.005 * randn(2, 64)
    by_hand = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(layer_norm(x), by_hand)
    assert (layer_norm(x) - layer_norm(x, eps=1e-6)).abs().max() > 0.1


def test_norms_keep_the_type_and_compute_in_float32():
    x = 300 + randn(4, 32).bfloat16()
    assert layer_norm(x).dtype == torch.bfloat16
    assert torch.equal(layer_norm(x), layer_norm(x.float()).bfloat16())
    squares_overflow = torch.full((1, 8), 400.0, dtype=torch.float16)
    norm = RMSNorm(8).half()
    assert torch.equal(norm(squares_overflow), torch.ones(1, 8, dtype=torch.float16))


def test_rms_norm():
    norm = RMSNorm(16)
    norm.weight.data = randn(16, seed=1)
    x = 0.003 * randn(2, 16)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


# ---------------------------------------------------------------- patches


def test_a_patch_is_row_column_channel():
    x = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 of 2 x 3 lies at row 2, column 2.
    expected = torch.stack([x[1, :, 2 + r, 2 + c] for r in range(2) for c in range(2)]).flatten()
    assert torch.equal(patches[1, 4], expected)
    assert torch.equal(unpatchify(patches, 2, 2, 3), x)


@pytest.mark.parametrize("size", [(5, 4), (4, 5)])
def test_a_grid_that_does_not_divide(size):
    with pytest.raises(ValueError, match="does not divide into patches of 2 x 2"):
        patchify(torch.zeros(1, 3, *size), 2)


# ---------------------------------------------------------------- positions


def test_the_fixed_table_has_the_row_first():
    table = sincos_2d(16, 5, 5)
    assert table.shape == (5, 5, 16)
    rows, columns = table[..., :8], table[..., 8:]
    assert torch.equal(rows[2, 0], rows[2, 4])
    assert torch.equal(columns[0, 2], columns[4, 2])
    assert torch.equal(rows[3, 0], columns[0, 3])
    torch.testing.assert_close(rows[3, 0, :4], torch.sin(3 * 10000.0 ** (-torch.arange(4) / 4)))
    torch.testing.assert_close(rows[3, 0, 4:], torch.cos(3 * 10000.0 ** (-torch.arange(4) / 4)))


def test_a_smaller_table_is_the_corner_of_a_larger_square_one():
    assert torch.equal(sincos_2d(16, 3, 3), sincos_2d(16, 7, 7)[:3, :3])


def test_the_fixed_table_needs_a_width_of_fours():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(18, 4, 4)


def test_time_features():
    features = time_features(torch.tensor([0.0, 0.3]), 8, max_period=256.0, scale=10.0)
    frequencies = 10 * 256.0 ** (-torch.arange(4) / 4)
    assert features[0].tolist() == [1] * 4 + [0] * 4
    torch.testing.assert_close(features[1, :4], (0.3 * frequencies).cos())
    torch.testing.assert_close(features[1, 4:], (0.3 * frequencies).sin())


def test_rotary_prefix_is_nought_and_the_rest_are_rotations():
    table = rotary_2d(8, side=3, prefix=2)
    assert table.shape == (11, 4, 2)
    assert not table[:2].any()
    torch.testing.assert_close(table[2:].square().sum(-1), torch.ones(9, 4))
    x = randn(1, 1, 11, 8)
    turned = rotate(x, table)
    assert not turned[:, :, :2].any()
    torch.testing.assert_close(turned[:, :, 2:].norm(dim=-1), x[:, :, 2:].norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 2], x[:, :, 2])  # token 0 lies at row 0, column 0


def test_rotary_scores_depend_on_the_distance_alone():
    table = rotary_2d(8, side=4, prefix=0)
    q, k = randn(8), randn(8, seed=1)

    def score(a: int, b: int) -> torch.Tensor:
        turned = [rotate(x.view(1, 1, 1, 8), table[i : i + 1]).flatten() for x, i in ((q, a), (k, b))]
        return turned[0] @ turned[1]

    # (0, 1) -> (2, 2) and (1, 1) -> (3, 2): the same shift of two rows and one column.
    torch.testing.assert_close(score(1, 10), score(5, 14), atol=1e-5, rtol=1e-5)
    assert (score(1, 10) - score(1, 9)).abs() > 1e-3


def test_rotary_needs_a_head_of_fours():
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_2d(6, side=2, prefix=1)
