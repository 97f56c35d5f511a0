from __future__ import annotations

import math

import pytest
import torch

from imgtok.quantizers import normal
from imgtok.quantizers.normal import NormalConfig, NormalQuantizer

SETTINGS = {
    "published": NormalConfig(),
    "two": NormalConfig(levels=2),
    "odd": NormalConfig(levels=37, range=(-4.0, 6.0), cut=2.5),
    "many": NormalConfig(levels=300),
    "uniform": NormalConfig(spacing="uniform"),
    "uniform, odd": NormalConfig(levels=15, spacing="uniform", range=(-3.0, 1.0)),
    "channels": NormalConfig(levels=16, means=(0.3, -2.0, 40.0), deviations=(1.0, 0.1, 7.5)),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS, scope="module")
def quantizer(request) -> NormalQuantizer:
    return NormalQuantizer(request.param)


def around(edges: torch.Tensor) -> torch.Tensor:
    """Each edge and the floats beside it, three at either side, (C, 7 E)."""
    found = [edges]
    for towards in (-torch.inf, torch.inf):
        near = edges
        for _ in range(3):
            near = torch.nextafter(near, torch.tensor(towards))
            found.append(near)
    return torch.cat(found, dim=1)


def random_numbers(quantizer: NormalQuantizer, count: int, seed: int = 0) -> torch.Tensor:
    """Numbers (count, C) of about the deviation that the table is made for, and some far outside."""
    channels = quantizer.config.channels or 1
    x = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed)) * 1.7
    x[: count // 20] *= 10
    return x * quantizer.deviation + quantizer.mean


def check_edges(quantizer: NormalQuantizer) -> None:
    x = around(quantizer.edges).T.contiguous()
    expected = quantizer.encode_plainly(x)
    assert torch.equal(quantizer.encode(x), expected)
    assert torch.equal(quantizer._bucketize(x, 1), expected)
    count = quantizer.num_levels - 1
    assert expected[:count].eq(torch.arange(1, count + 1)[:, None]).all()  # an edge belongs to the upper level
    assert expected[count : 2 * count].eq(torch.arange(count)[:, None]).all()  # the float below it does not


def check_random(quantizer: NormalQuantizer, count: int, seed: int) -> None:
    x = random_numbers(quantizer, count, seed)
    expected = torch.cat([quantizer.encode_plainly(part) for part in x.split(10_000)])  # not to fill the memory
    values, ids = quantizer(x)
    assert torch.equal(ids, expected)
    assert torch.equal(values, quantizer.decode(expected))


def test_edges_and_the_floats_beside_them(quantizer):
    check_edges(quantizer)


def test_random_numbers(quantizer):
    check_random(quantizer, 1_000_000 if quantizer.config == NormalConfig() else 15_000, seed=1)


def test_every_cell_of_the_table(quantizer):
    """Its first float and its last, as far as they are numbers."""
    lookup = quantizer.lookup
    first = torch.arange(1 << lookup.bits) << (32 - lookup.bits)
    ends = torch.cat([first, first + (1 << (32 - lookup.bits)) - 1]).to(torch.int32).view(torch.float32)
    ends = ends[ends.isfinite()][:, None].expand(-1, len(quantizer.values)).contiguous()
    assert torch.equal(quantizer.encode(ends), quantizer._bucketize(ends, 1))
    some = ends[:: max(1, len(ends) // 20_000)]
    assert torch.equal(quantizer.encode(some), quantizer.encode_plainly(some))


def test_no_edge_lies_between_the_two_zeros():
    quantizer = NormalQuantizer(NormalConfig(levels=2, spacing="uniform", range=(-1.0, 1.0)))
    x = around(torch.tensor([[0.0]]))[0]
    assert torch.equal(quantizer.encode(x), quantizer.encode_plainly(x))
    x = torch.tensor([0.0, -0.0])
    assert torch.equal(quantizer.encode(x), quantizer.encode_plainly(x))


def test_the_bucketized_form_is_the_same(quantizer):
    """That of an accelerator and of compiled code."""
    x = random_numbers(quantizer, 5000, seed=2)
    assert torch.equal(quantizer._bucketize(x, 1), quantizer.encode(x))


def test_levels_come_back(quantizer):
    ids = torch.arange(quantizer.num_levels)[:, None].expand(-1, len(quantizer.values)).contiguous()
    values = quantizer.decode(ids)
    assert bool((values.diff(dim=0) > 0).all())
    assert torch.equal(quantizer.encode(values), ids)


def test_shapes_and_places_of_the_channels():
    config = SETTINGS["channels"]
    quantizer = NormalQuantizer(config)
    x = random_numbers(quantizer, 4 * 5 * 2, seed=3).view(4, 5, 2, 3)
    last = quantizer.encode(x, channel_dim=-1)
    latents = x.permute(0, 3, 1, 2)  # (B, C, H, W), not contiguous
    assert torch.equal(quantizer.encode(latents), last.permute(0, 3, 1, 2))
    assert torch.equal(
        quantizer.decode(last, channel_dim=-1).permute(0, 3, 1, 2), quantizer.decode(last.permute(0, 3, 1, 2))
    )
    assert quantizer.encode(latents[:0]).shape == (0, 3, 5, 2)
    with pytest.raises(ValueError, match=r"latents \(4, 5, 2, 3\) must have 3 channels in dimension 1"):
        quantizer.encode(x)
    plain = NormalQuantizer(NormalConfig())
    assert torch.equal(plain.encode(latents), plain.encode_plainly(latents))
    assert plain.encode(torch.tensor(0.0)).item() == 31  # a tie goes to the lower level
    assert plain.encode(latents.half()).dtype == torch.long


def test_blocks_of_the_lookup(monkeypatch):
    for name in ("published", "channels"):
        quantizer = NormalQuantizer(SETTINGS[name])
        x = random_numbers(quantizer, 333, seed=4)
        whole = quantizer(x)
        with monkeypatch.context() as patched:
            patched.setattr(normal, "CHUNK", 100)
            assert all(torch.equal(a, b) for a, b in zip(quantizer(x), whole, strict=True))


@pytest.mark.parametrize(
    ("levels", "error", "bits"), [(8, 4.03e-2, 2.70), (16, 1.03e-2, 3.72), (32, 2.59e-3, 4.72), (64, 6.5e-4, 5.72)]
)
def test_error_and_entropy_of_a_unit_normal(levels, error, bits):
    """Section 2.5 of our specification, computed there by other code."""
    quantizer = NormalQuantizer(NormalConfig(levels=levels))
    x = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000).float()
    values, ids = quantizer(x)
    assert (values - x).square().mean().item() == pytest.approx(error, rel=0.03)
    shares = ids.bincount(minlength=levels).double() / len(x)
    assert -(shares * shares.clamp(min=1e-12).log2()).sum().item() == pytest.approx(bits, abs=0.01)


def test_a_uniform_grid_is_coarser_where_the_numbers_are():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(5))
    even = NormalQuantizer(NormalConfig(spacing="uniform"))
    assert (even(x)[0] - x).square().mean().item() == pytest.approx(2.1e-3, rel=0.03)


def test_one_table_a_channel_is_that_of_the_normalised_channel():
    config = SETTINGS["channels"]
    quantizer, plain = NormalQuantizer(config), NormalQuantizer(NormalConfig(levels=16))
    x = random_numbers(quantizer, 1000, seed=6)
    ids = plain.encode((x - quantizer.mean) / quantizer.deviation)
    assert torch.equal(quantizer.encode(x), ids)
    torch.testing.assert_close(quantizer.decode(ids), plain.decode(ids) * quantizer.deviation + quantizer.mean)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": 1}, r"levels: given 1, must be .*between 2 and 4096"),
        ({"levels": 1024}, r"levels: 1024 cells .* do not fit into \+-cut = 3.0 .* at most 740 levels, a larger cut"),
        ({"levels": 64, "cut": 2.0}, r"at most 43 levels"),
        ({"range": (2.0, 2.0)}, r"range: \[2.0, 2.0\] must be \[lower, upper\]"),
        ({"range": (-math.inf, 2.0)}, r"range\[0\]: given -inf, must be a number"),
        ({"means": (1.0,)}, r"means: 1 numbers for 0 in deviations"),
        ({"means": (1.0,), "deviations": (0.0,)}, r"deviations"),
    ],
)
def test_settings_that_make_no_table(fields, message):
    with pytest.raises(ValueError, match=message):
        NormalConfig(**fields)


def test_the_most_levels_that_a_message_names_do_fit():
    assert bool((normal.normal_levels(NormalConfig(levels=740).levels, 3.0).diff() > 0).all())
    NormalQuantizer(NormalConfig(levels=43, cut=2.0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    quantizer = NormalQuantizer(NormalConfig())
    x = torch.randn(2, 16, 4, 4)
    x[1, 0, 0, 2] = bad
    with pytest.raises(
        ValueError,
        match=rf"latents \(2, 16, 4, 4\): 1 numbers are not finite \({int(bad != bad)} NaN\), such as number 258",
    ):
        quantizer.encode(x)


def test_levels_that_float32_cannot_tell_apart():
    with pytest.raises(ValueError, match="two of them lie too close for float32"):
        NormalQuantizer(NormalConfig(levels=64, range=(1e6, 1e6 + 1)))


@pytest.mark.parametrize("config", [NormalConfig(), NormalConfig(means=(0.0, 1.0), deviations=(1.0, 2.0))])
def test_ids_that_there_are_not_are_refused(config):
    quantizer = NormalQuantizer(config)
    for bad in (-1, 64):
        with pytest.raises(ValueError, match=rf"ids must lie in 0 to 63, got {min(0, bad)} to {max(0, bad)}"):
            quantizer.decode(torch.tensor([[0, bad]]))
    assert quantizer.decode(torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2)


def test_numbers_without_a_value_get_one_id_wherever_they_stand():
    """A processor takes the last numbers of a tensor one by one, and those before them together."""
    quantizer = NormalQuantizer(NormalConfig())
    for count in (1, 7, 37):
        assert len(quantizer.ids(torch.full((count,), torch.nan)).unique()) == 1


def test_tables_are_not_saved_and_survive_meta():
    with torch.device("meta"):
        quantizer = NormalQuantizer(NormalConfig())
    assert not quantizer.state_dict()
    assert not quantizer.edges.is_meta


def test_numbers_beyond_the_outermost_levels():
    plain = NormalQuantizer(NormalConfig())
    assert plain.beyond(torch.tensor([-4.07, -4.06, 0.0, 4.06, 4.07])).tolist() == [True, False, False, False, True]
    own = NormalQuantizer(NormalConfig(means=(0.0, 10.0), deviations=(1.0, 2.0)))
    assert own.beyond(torch.tensor([[5.0, 5.0], [1.0, 1.0]])).tolist() == [[True, False], [False, True]]
    assert own.beyond(torch.tensor([[5.0, 5.0], [1.0, 1.0]]).T, channel_dim=0).tolist() == [
        [True, False],
        [False, True],
    ]
