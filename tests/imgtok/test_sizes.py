"""Sizes of images that need not be square: how they are written, cropped to, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import kinds
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from imgtok.config import ConfigError, from_dict, load, to_dict
from imgtok.data.images import ImageFolderConfig, Position, Views, open_images
from imgtok.data.tokens import TokenCacheInfo
from imgtok.losses.repa import Aligned, REPAConfig, alignment_loss
from imgtok.pictures import center_crop_adm, corner_crops, preprocess, random_crop
from imgtok.published.flextok_config import write_config
from imgtok.sample.reconstruct import Config as ReconstructConfig
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, ShortRuns
from imgtok.tokenizers.karl import KARLConfig
from imgtok.tokenizers.tokenbridge import TokenBridgeTokenizerConfig
from imgtok.tokenizers.vae import VAEConfig
from imgtok.tokenizers.vq import VQConfig

WIDE = FlexTokConfig(**kinds.FLEXTOK | {"image_size": (8, 12)})
VAE = VAEConfig(latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=8, scaling_factor=0.5)


def wide(**changes) -> FlexTok:
    torch.manual_seed(0)
    model = FlexTok(replace(WIDE, **changes)).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def ramp(width: int, height: int) -> Image.Image:
    """Red says the column, green the row, as shares of 200."""
    columns, rows = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).round().astype(np.uint8))


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("given", ["[96, 128]", "96,128"])
def test_a_size_is_one_number_or_two(given):
    config = load(ReconstructConfig, None, ["model=x", f"image_size={given}"])
    assert config.image_size == (96, 128)
    assert to_dict(config)["image_size"] == [96, 128]
    assert load(ReconstructConfig, None, ["model=x", "image_size=96"]).image_size == 96


def test_a_configuration_is_the_same_after_it_was_saved():
    for size in (8, (8, 12)):
        config = replace(WIDE, image_size=size)
        assert from_dict(FlexTokConfig, to_dict(config)) == config
    assert to_dict(replace(WIDE, image_size=8))["image_size"] == 8


@pytest.mark.parametrize("given", ["[96]", "[96, 128, 3]", "[96, 0]", "[96, x]", "0"])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(ConfigError, match="image_size: given .*, must be an integer of at least 1 or a list of 2"):
        load(ReconstructConfig, None, ["model=x", f"image_size={given}"])


@pytest.mark.parametrize("kind", [VQConfig, KARLConfig, TokenBridgeTokenizerConfig])
def test_models_of_squares_refuse_a_rectangle_and_say_which_takes_one(kind):
    with pytest.raises(ConfigError, match=r"image_size: given \[96, 128\], must be .* square \(only a FlexTok is tr"):
        from_dict(kind, {"image_size": [96, 128]})


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        ((10, 12), {"vae": VAE}, "image_size: a height of 10 is not a multiple of 4, .* that fit are 8 and 12"),
        ((8, 9), {}, "image_size: a width of 9 is not a multiple of 2, .* that fit are 8 and 10"),
        ((1, 8), {}, "image_size: a height of 1 is not a multiple of 2, .*; the smallest is 2"),
        (
            9,
            {},
            "image_size: 9 is not a multiple of 2, the pixels a side of one patch; the nearest that fit are 8 and 10",
        ),
    ],
)
def test_sides_that_do_not_divide_are_refused_with_the_nearest_that_do(size, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(WIDE, image_size=size, **changes)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (400, 90), (20, 30), (3000, 8)])
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (16, 16)])
def test_the_centre_that_covers_the_size_is_kept(shape, size):
    picture = ramp(*shape)
    crop = np.asarray(center_crop_adm(picture, size)).astype(float)
    assert crop.shape == (*size, 3)
    # what is seen of each side is what the size has of the covering scale, and its middle is that of the picture
    scale = max(size[0] / shape[1], size[1] / shape[0])
    for axis, channel, length, side in ((1, 0, shape[0], size[1]), (0, 1, shape[1], size[0])):
        seen = crop[..., channel].mean(axis=1 - axis)
        assert seen.mean() == pytest.approx(100, abs=4)
        share = min(1.0, side / (length * scale))
        assert seen[-1] - seen[0] == pytest.approx(200 * share * (side - 1) / side, abs=20)


def test_a_square_is_the_same_by_one_number_and_by_two():
    picture = ramp(71, 50)
    for crop in (lambda size: [center_crop_adm(picture, size)], lambda size: corner_crops(picture, size)):
        assert [part.tobytes() for part in crop(16)] == [part.tobytes() for part in crop((16, 16))]
    draws = (0.4, 0.2, 0.9)
    assert random_crop(picture, 16, draws).tobytes() == random_crop(picture, (16, 16), draws).tobytes()
    assert torch.equal(preprocess(picture, 16), preprocess(picture, (16, 16)))


def test_crops_of_a_rectangle_differ_and_have_its_size():
    picture = ramp(90, 60)
    corners = corner_crops(picture, (16, 24), zoom=1.5)
    assert [part.size for part in corners] == [(24, 16)] * 5
    reds, greens = (([np.asarray(part)[..., channel].mean() for part in corners]) for channel in (0, 1))
    assert reds[0] < reds[4] < reds[1]
    assert greens[0] < greens[4] < greens[2]
    random = [random_crop(picture, (16, 24), draws) for draws in ((0.0, 0.0, 0.0), (0.99, 0.99, 0.99))]
    assert [part.size for part in random] == [(24, 16)] * 2
    assert np.asarray(random[1])[..., 1].mean() > np.asarray(random[0])[..., 1].mean()


@pytest.mark.parametrize("size", [0, (16,), (16, 0), (16, 2.5), "16"])
def test_preprocess_refuses_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"size: given .*, must be a whole number .* or two, \(height, width\)"):
        preprocess(ramp(20, 20), size)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_source_of_files_gives_that_size(tmp_path: Path, crop):
    for number, shape in enumerate([(60, 40), (24, 16), (30, 70)]):
        ramp(*shape).save(tmp_path / f"{number}.png")
    source = open_images(ImageFolderConfig(path=tmp_path, labels="none"), (16, 24), crop=crop, held_out_fraction=0)
    assert source.batch(range(3)).images.shape == (3, 3, 16, 24)
    assert source.batch([]).images.shape == (0, 3, 16, 24)
    assert source.training_batch([Position(0, 0), Position(0, 2)], seed=0).images.shape == (2, 3, 16, 24)
    for crops in ("center", "five", "random"):
        views = Views(crops=crops, num_crops=2 if crops == "random" else 1, mirrored=True)
        assert source.views([0], views).images.shape == (views.count, 3, 16, 24)
    assert torch.equal(source[1].image[0, 0], preprocess(ramp(24, 16), (16, 24))[0, 0, 0]), "as large already"


def test_the_built_in_shapes_are_squares():
    with pytest.raises(ValueError, match=r"data: data.kind=shapes draws squares: name others.* 16 x 24 pixels"):
        open_images(ShapesConfig(), (16, 24))


# ---------------------------------------------------------------- FlexTok


@pytest.mark.parametrize("changes", [{}, {"vae": VAE, "patch_size": 1}, {"short_runs": ShortRuns(positions="learned")}])
def test_a_flextok_encodes_and_decodes_rectangles(changes):
    model = wide(**changes)
    pixels = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = model.encode(pixels)
    assert torch.equal(tokens.ids, model.encode_plainly(pixels).ids)
    decoded = model.decode(tokens, seed=1)
    assert decoded.shape == (3, 3, 8, 12)
    assert torch.allclose(decoded, model.decode_plainly(tokens, seed=1), atol=1e-4)
    assert model.decode(tokens, size=(4, 12)).shape == (3, 3, 4, 12)
    losses = model(pixels, generator=torch.Generator().manual_seed(0))
    assert losses.total.isfinite()
    with pytest.raises(ValueError, match="a height of 12 pixels; this model decodes multiples of 2 up to 8"):
        model.decode(tokens, size=(12, 8))
    with pytest.raises(ValueError, match="larger than the position table"):
        model.encode(torch.zeros(1, 3, 12, 8))


def test_the_fixed_table_of_a_rectangle_is_the_corner_of_the_square_one():
    """The published table of a grid that is not square is scrambled."""
    square = FlexTok(replace(WIDE, image_size=12))
    for size, corner in (((8, 12), (4, 6)), ((12, 8), (6, 4))):
        model = FlexTok(replace(WIDE, image_size=size))
        for part, whole in ((model.encoder, square.encoder), (model.decoder, square.decoder)):
            assert torch.equal(part.positions, whole.positions[: corner[0], : corner[1]])


def test_the_layout_of_the_published_code_is_for_squares():
    config = replace(WIDE, vae=VAE, patch_size=1)
    with pytest.raises(ConfigError, match="image_size: a published FlexTok is for squares; this one is for 8 x 12"):
        write_config(config)
    write_config(replace(config, image_size=8))


def test_the_graphs_for_other_programs_have_its_size():
    graphs = wide(vae=VAE, patch_size=1).graphs()
    assert graphs["encoder"].inputs["images"].shape == (2, 3, 8, 12)
    assert graphs["decoder_step"].inputs["noised"].shape == (2, 4, 4, 6)
    for graph in graphs.values():
        assert graph.run(*graph.inputs.values()).shape[0] == 2
    assert graphs["autoencoder_decoder"].run(graphs["autoencoder_decoder"].inputs["latents"]).shape[-2:] == (8, 12)


def test_alignment_compares_the_same_places_of_a_rectangle():
    """The teacher's map is of the image squeezed to a square: the block's rows and columns are stretched to that."""
    maps = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    patches = maps.flatten(2).transpose(1, 2)
    assert alignment_loss(patches, maps, "teacher", (8, 12)) == pytest.approx(-1)
    assert alignment_loss(patches, maps, "teacher", (12, 8)) > -0.9
    smooth = torch.linspace(-1, 1, 6)[None, None, None].expand(1, 5, 6, 6) + torch.arange(5)[None, :, None, None]
    seen = torch.nn.functional.interpolate(smooth, (4, 6), mode="bilinear", antialias=True)
    assert alignment_loss(seen.flatten(2).transpose(1, 2), smooth, "block", (8, 12)) == pytest.approx(-1, abs=1e-3)


def test_a_rectangle_is_aligned_with_a_teacher():
    model = Aligned(wide(), REPAConfig(encoder="lite0", tap=0), 5)
    pixels, targets = torch.rand(2, 3, 8, 12) * 2 - 1, torch.randn(2, 5, 3, 3)
    losses = model(pixels, targets, generator=torch.Generator().manual_seed(0))
    assert -1 <= losses.parts["repa"].item() <= 1


def test_a_cache_of_tokens_knows_its_size(tmp_path: Path):
    fields = {"fingerprint": "f", "dataset": "d", "split": "train", "vocab_size": 4, "num_tokens": 2, "num_classes": 0}
    for size in (16, (16, 24)):
        info = TokenCacheInfo(**fields, num_images=1, shard_size=1, image_size=size)
        path = tmp_path / f"{size}.safetensors"
        save_file({"x": torch.zeros(1)}, path, info.header)
        assert TokenCacheInfo.read(path) == info


def test_two_equal_sides_are_a_square():
    """So that neither files nor runs tell the one from the other."""
    config = from_dict(FlexTokConfig, {"image_size": [32, 32]})
    assert config.image_size == 32
    assert config == from_dict(FlexTokConfig, {"image_size": 32})
