"""Files in the layout of TokenBridge's checkpoint-last.pth: read whole or refused with what is wrong, and written."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import imgtok
from imgtok.config import ConfigError
from imgtok.generators.conditioning import ClassBuffer
from imgtok.generators.dimension_head import StackConfig
from imgtok.generators.published.tokenbridge import BUFFERS, as_published, published_places, save, tables
from imgtok.generators.tokenbridge import PUBLISHED_ORDER, TokenBridge, TokenBridgeConfig
from imgtok.quantizers.normal import NormalConfig

SMALL = TokenBridgeConfig(
    grid=2,
    condition=ClassBuffer(num_classes=3, num_slots=2),
    quantizer=NormalConfig(levels=8),
    channel_order=PUBLISHED_ORDER,
    encoder=StackConfig(width=64, depth=2, num_heads=1),
    decoder=StackConfig(width=128, depth=1, num_heads=2),
    head=StackConfig(width=16, depth=1, num_heads=2),
)


def tiny(seed: int = 0, **changes) -> TokenBridge:
    torch.manual_seed(seed)
    return TokenBridge(replace(SMALL, **changes)).eval()


def weights(model: TokenBridge) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        name: as_published(name, place.view(state)).clone()
        for name, place in published_places(state, model.config.latent_channels).items()
    }


def checkpoint(**changes) -> dict:
    """As the published code writes it: the average without buffers."""
    trained, averaged = tiny(1), tiny(2)
    whole = {"model": weights(trained) | tables(trained), "model_ema": weights(averaged), "epoch": 3, "optimizer": {}}
    return whole | changes


@pytest.fixture
def path(tmp_path) -> Path:
    torch.save(checkpoint(), tmp_path / "checkpoint-last.pth")
    return tmp_path / "checkpoint-last.pth"


def same(found: TokenBridge, wanted: TokenBridge) -> bool:
    state = wanted.state_dict()
    return found.config == wanted.config and all(torch.equal(v, state[k]) for k, v in found.state_dict().items())


def test_the_average_without_buffers_and_the_trained_weights_with_them(path):
    assert same(imgtok.load(path), tiny(2))
    assert same(imgtok.load(path, raw=True), tiny(1))
    assert not imgtok.load(path).training


def test_arguments_beside_the_weights_run_nothing(tmp_path):
    torch.save(checkpoint(args=Namespace(epochs=3)), tmp_path / "checkpoint-last.pth")
    assert same(imgtok.load(tmp_path / "checkpoint-last.pth"), tiny(2))


def test_the_tables_tell_where_the_normal_is_cut(tmp_path):
    model = tiny(quantizer=NormalConfig(levels=8, cut=2.0))
    torch.save({"model": weights(model) | tables(model)}, tmp_path / "x.pth")
    assert same(imgtok.load(tmp_path / "x.pth"), model)
    # The averaged weights have no tables of their own
    torch.save({"model": weights(tiny()) | tables(model), "model_ema": weights(model)}, tmp_path / "y.pth")
    assert same(imgtok.load(tmp_path / "y.pth"), model)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(0), r"the table boundaries is \(0,\), must be \(9,\)"),
        (torch.full((9,), torch.nan), r"the table boundaries is another .*cut"),
        (torch.full((9,), -1.0), r"the table boundaries is another .*cut"),
    ],
)
def test_boundaries_that_are_no_table(tmp_path, table, message):
    model = tiny()
    torch.save({"model": weights(model) | {"boundaries": table}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"x\.pth: {message}"):
        imgtok.load(tmp_path / "x.pth")


@pytest.mark.parametrize("name", sorted(BUFFERS))
def test_another_table_is_refused(tmp_path, name):
    model = tiny()
    table = tables(model)[name].clone()
    table.view(-1)[0] += 0.01  # not the last boundary, which tells where the normal is cut
    torch.save({"model": weights(model) | tables(model) | {name: table}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"the table {name} is another than that of the published quantizer"):
        imgtok.load(tmp_path / "x.pth")


def test_weights_that_do_not_fit_are_listed(tmp_path):
    found = weights(tiny())
    found["channel_heads.3.bias"] = found["channel_heads.3.bias"][:5]
    del found["decoder_blocks.0.mlp.fc1.bias"]
    found["extra"] = torch.zeros(2)
    torch.save({"model_ema": found}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="do not fit the TokenBridge that this file describes") as caught:
        imgtok.load(tmp_path / "x.pth")
    for part in (
        "missing: decoder_blocks.0.mlp.fc1.bias (512,)",
        "unexpected: extra (2,)",
        "another shape: channel_heads.3.bias is (5,) in the file, (8,) in the model",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_is_written_is_read_again(tmp_path, ending):
    model = tiny(3)
    save(model, tmp_path / f"x.{ending}")
    assert same(imgtok.load(tmp_path / f"x.{ending}"), model)


def test_models_that_the_published_code_cannot_run(tmp_path):
    for changes, message in (
        ({"channel_order": ()}, r"channel_order: the published code would run \(8, 1, "),
        ({"first_step": "corrected"}, r"first_step"),
        ({"quantizer": NormalConfig(levels=8, range=(-4.0, 4.0))}, r"quantizer"),
        ({"encoder": StackConfig(width=64, depth=2, num_heads=2)}, r"encoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            save(tiny(**changes), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="give a name that ends in .pth or .safetensors"):
        save(tiny(), tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())
