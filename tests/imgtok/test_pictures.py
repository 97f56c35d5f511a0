import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from imgtok.pictures import (
    UnreadableImage,
    can_write,
    center_crop_adm,
    decode_image,
    enlarged,
    from_uint8,
    grid_with_titles,
    labelled_grid,
    make_grid,
    preprocess,
    random_crop,
    save_png,
    to_pil,
    to_uint8,
)


def encoded(picture: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes) -> tuple[int, ...]:
    return decode_image(data, "x").getpixel((0, 0))


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.asarray(picture).reshape(-1, 3).tolist()}


# Value ranges


def test_uint8_round_trip_is_exact():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-9.0, -1.0, 0.0, 0.004, 1.0, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 128, 255, 255]
    assert to_uint8(x.bfloat16()).tolist() == [0, 0, 128, 128, 255, 255]


def test_value_ranges_refuse_the_wrong_type():
    with pytest.raises(ValueError, match="uint8"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        from_uint8(torch.zeros(3))


# Decoding


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257 * 100, 65535, 300]], dtype=np.uint16)
    picture = decode_image(encoded(Image.fromarray(values)), "x")
    assert picture.mode == "RGB"
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 100, 255, 1]


def test_palette_and_its_transparency():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    opaque = decode_image(encoded(picture), "x")
    assert [opaque.getpixel((i, 0)) for i in (0, 1)] == [(10, 20, 30), (200, 100, 50)]
    holed = decode_image(encoded(picture, transparency=0), "x")
    assert [holed.getpixel((i, 0)) for i in (0, 1)] == [(255, 255, 255), (200, 100, 50)]


def test_cmyk_jpeg():
    red = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", quality=95))
    assert red[0] > 240
    assert max(red[1:]) < 15


def test_grey_bilevel_and_alpha_over_white():
    assert pixel(encoded(Image.new("L", (1, 1), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (1, 1), 1))) == (255, 255, 255)
    assert pixel(encoded(Image.new("LA", (1, 1), (0, 0)))) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 0)))) == (255, 255, 255)
    half = pixel(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))
    assert half[0] == 255
    assert abs(half[1] - 127) <= 1


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (16, 8), "white")
    picture.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it by 90 degrees clockwise
    upright = decode_image(encoded(picture, "jpeg", exif=exif), "x")
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2))[0] < 40
    assert upright.getpixel((4, 13))[0] > 215


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just some text", "not an image"),
        (encoded(Image.effect_noise((64, 64), 50), "jpeg")[:-400], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "png")[:900], "truncated"),
        (encoded(Image.new("F", (2, 2), 0.5), "tiff"), "no agreed range"),
    ],
)
def test_unreadable_images_are_named(data, reason):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode_image(data, "cats/7.jpg")
    assert str(caught.value).startswith("cats/7.jpg: ")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# Crops


def reference_adm(array: np.ndarray, size: int) -> np.ndarray:
    """The same crop by exact means of 2 x 2 blocks, for sides that are size times a power of two."""
    while min(array.shape[:2]) >= 2 * size:
        h, w = array.shape[0] // 2, array.shape[1] // 2
        array = np.floor(array.reshape(h, 2, w, 2, 3).mean(axis=(1, 3)) + 0.5)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def test_center_crop_halves_by_box_means():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (64, 128, 3)).astype(np.float64)
    picture = Image.fromarray(array.astype(np.uint8))
    for size, rounding in ((64, 0), (32, 1), (16, 2)):  # Pillow rounds after each direction
        difference = np.asarray(center_crop_adm(picture, size)) - reference_adm(array, size)
        assert np.abs(difference).max() <= rounding


def test_center_crop_is_bicubic_after_the_halvings():
    picture = Image.effect_noise((1000, 750), 60).convert("RGB")
    half = picture.resize((500, 375), Image.Resampling.BOX)
    expected = half.resize((341, 256), Image.Resampling.BICUBIC).crop((42, 0, 298, 256))
    assert np.array_equal(np.asarray(center_crop_adm(picture, 256)), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (500, 33), (33, 500), (31, 32), (65, 66)])
def test_crops_have_the_size_asked_for(shape):
    picture = Image.new("RGB", shape, (9, 8, 7))
    assert center_crop_adm(picture, 32).size == (32, 32)
    assert colours(center_crop_adm(picture, 32)) == {(9, 8, 7)}
    for draws in ([0, 0, 0], [0.999, 0.999, 0.999]):
        assert colours(random_crop(picture, 32, draws)) == {(9, 8, 7)}
        assert random_crop(picture, 32, draws).size == (32, 32)


def test_center_crop_takes_the_middle():
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("white", (32, 0, 64, 32))
    assert colours(center_crop_adm(picture, 32)) == {(255, 255, 255)}


def test_random_crop_goes_from_edge_to_edge():
    ramp = Image.fromarray(np.tile(np.arange(0, 64, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    left, right = (np.asarray(random_crop(ramp, 32, [0, draw, 0])) for draw in (0, 0.9999))
    assert (left[0, 0, 0], left[0, -1, 0]) == (0, 31)
    assert (right[0, 0, 0], right[0, -1, 0]) == (32, 63)
    zoomed = np.asarray(random_crop(ramp, 32, [0.9999, 0, 0]))
    assert zoomed[0, -1, 0] < 27  # 40 pixels show what 32 did


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="0"):
        center_crop_adm(Image.new("RGB", (4, 4)), 0)


# Files and grids


def test_png_round_trip_in_both_layouts_with_equal_bytes(tmp_path):
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png(image, tmp_path / "new" / "a.png")
    save_png(image.permute(1, 2, 0), tmp_path / "b.png")
    data = (tmp_path / "new" / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    read = torch.from_numpy(np.array(decode_image(data, "a"))).permute(2, 0, 1)
    assert torch.equal(read, image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_png(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(torch.zeros(3, 4, 4, dtype=torch.uint8), path)
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_png(torch.ones(3, 4, 4, dtype=torch.uint8), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)]
)
def test_save_png_refuses_other_tensors(image, tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        save_png(image, tmp_path / "a.png")


def test_grid_places_images_row_by_row():
    images = torch.stack([torch.full((3, 2, 3), value / 127.5 - 1) for value in (10, 20, 30)])
    grid = make_grid(images, columns=2, padding=1)
    assert grid.shape == (3, 5, 7)
    assert (grid[0, 0, 0], grid[0, 0, 4], grid[0, 3, 0]) == (10, 20, 30)
    assert (grid[0, 0, 3], grid[0, 2, 0], grid[0, 3, 4]) == (255, 255, 255)
    assert torch.equal(make_grid(to_uint8(images), columns=2, padding=1), grid)


def test_grid_refuses_nonsense():
    for images, columns in ((torch.zeros(0, 3, 4, 4), 1), (torch.zeros(3, 4, 4), 1), (torch.zeros(1, 3, 4, 4), 0)):
        with pytest.raises(ValueError, match="grid"):
            make_grid(images, columns)


def test_titles_are_beside_the_images_and_leave_them_alone():
    images = torch.rand(4, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = make_grid(images.repeat_interleave(2, 2).repeat_interleave(2, 3), 2)
    page = grid_with_titles(images, 2, row_titles=["one", "two"], column_titles=["a\nb", "c"], enlarge=2)
    height, width = plain.shape[1:]
    assert torch.equal(page[:, -height:, -width:], plain)
    assert page[:, -height:, :-width].min() < 100  # ink left of the rows
    assert page[:, :-height, -width:].min() < 100  # ink above the columns
    assert torch.equal(grid_with_titles(images, 2, enlarge=1), make_grid(images, 2))
    with pytest.raises(ValueError, match="1 row titles for 2 rows"):
        grid_with_titles(images, 2, row_titles=["one"])


@pytest.mark.parametrize(("side", "seen"), [(8, 96), (32, 96), (64, 128), (95, 190), (96, 96), (256, 256)])
def test_small_images_are_enlarged_by_whole_factors_and_keep_their_pixels(side, seen):
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    factor = seen // side
    large = enlarged(images)
    assert large.shape == (2, 3, seen, seen)
    assert all(torch.equal(large[:, :, i::factor, i::factor], images) for i in range(factor))


def test_a_label_has_a_row_and_its_name_beside_it():
    images = torch.randint(0, 200, (5, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    page = labelled_grid([("a cat", images[:3]), ("a dog", images[3:])], columns=2)
    assert page.shape[1] == 3 * 96 + 2 * 2  # three rows: the cats have two
    margin = page.shape[2] - (2 * 96 + 2)
    assert margin > 30
    assert torch.equal(page[:, :96, margin : margin + 96], images[0])
    assert torch.equal(page[:, 98:194, margin : margin + 96], images[2])
    assert torch.equal(page[:, 196:, -96:], images[4])
    assert page[:, 98:194, -96:].min() == 255  # blank
    assert [bool(page[:, top : top + 96, :margin].min() < 100) for top in (0, 98, 196)] == [True, False, True]


def test_labels_of_one_image_each_stand_above_them():
    images = torch.randint(0, 200, (3, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    page = labelled_grid([("a", images[:1]), ("a long caption " * 9, images[1:2]), ("c", images[2:])], columns=2)
    height = (page.shape[1] - 4) // 2
    assert torch.equal(page[:, height - 96 : height, :96], images[0])
    assert torch.equal(page[:, height - 96 : height, 100:196], images[1])
    assert torch.equal(page[:, -96:, :96], images[2])
    assert page[:, : height - 96, 100:196].min() < 100
    assert height < 96 + 40, "two lines at most"


def test_titles_are_written_in_many_scripts_and_not_in_all():
    assert can_write("größter Käfer, кошка, γάτα 1")
    assert not can_write("猫")


# For users


def test_whatever_holds_a_picture_becomes_what_a_tokenizer_takes(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    picture.save(tmp_path / "a.png")
    pixels = preprocess(picture, 24)
    assert pixels.shape == (1, 3, 24, 24)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0], from_uint8(torch.from_numpy(values[8:32])).permute(2, 0, 1))  # the central square
    for other in (values, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(preprocess(other, 24), pixels)
    several = preprocess([picture, values, tmp_path / "a.png"], 12)
    assert several.shape == (3, 3, 12, 12)
    assert torch.equal(several[0], several[2])
    assert torch.equal(preprocess(picture, 12)[0], several[1])


def test_grey_transparent_and_turned_pictures_are_what_one_sees(tmp_path):
    grey = np.full((8, 8), 64, np.uint8)
    for shape in (grey, grey[..., None]):
        assert torch.equal(preprocess(shape, 8), from_uint8(torch.full((1, 3, 8, 8), 64, dtype=torch.uint8)))
    clear = np.zeros((8, 8, 4), np.uint8)
    assert torch.equal(preprocess(clear, 8), torch.ones(1, 3, 8, 8))  # transparent black is white paper
    assert torch.equal(preprocess(np.zeros((8, 8, 2), np.uint8), 8), torch.ones(1, 3, 8, 8))
    halves = Image.new("RGB", (8, 8))
    halves.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    halves.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        pixels = preprocess(turned, 8)
        assert turned.getexif()[0x0112] == 3, "the caller's picture stays as it was"
    assert (pixels[0, 0, 0, 0], pixels[0, 0, 7, 0]) == (-1, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"uint8, not float32 \(8, 8, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), r"not uint8 \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"not uint8 \(0, 8, 3\)"),
        ([7], "Pillow images, uint8 arrays and paths, not a int"),
        ([], "no pictures in the list"),
        (None, "one or a list of them, not a NoneType"),
        ({"image": 1}, "one or a list of them, not a dict"),
        (b"bytes", "one or a list of them, not a bytes"),
        (torch.zeros(3, 8, 8), "one or a list of them, not a Tensor"),
    ],
)
def test_what_is_no_picture_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        preprocess(given, 8)


def test_arrays_of_several_pictures_and_sizes_that_are_none():
    batch = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    assert torch.equal(preprocess(batch, 8), preprocess([*batch], 8))
    for size in (0, 8.0, "8", (8, 8, 8), None):
        with pytest.raises(ValueError, match="size: given .*, must be a whole number of pixels a side"):
            preprocess(batch, size)


def test_a_file_that_is_not_there_or_no_picture_is_named(tmp_path):
    takes = "it takes Pillow images, uint8 arrays and paths, one or a list of them"
    with pytest.raises(FileNotFoundError, match=rf"^preprocess: {tmp_path}/nothing.png: no such file; {takes}$"):
        preprocess(tmp_path / "nothing.png", 8)
    with pytest.raises(FileNotFoundError, match=rf"^preprocess: {tmp_path}: is a folder; {takes}$"):
        preprocess([tmp_path], 8)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(
        FileNotFoundError, match=rf"texts.png: no such file; did you mean {tmp_path}/text.png\?; {takes}"
    ):
        preprocess(tmp_path / "texts.png", 8)
    with pytest.raises(FileNotFoundError, match=r"https://.*: no such file \(only local files are read: download it\)"):
        preprocess("https://example.org/photo.jpg", 8)
    with pytest.raises(UnreadableImage, match="text.png"):
        preprocess(tmp_path / "text.png", 8)


def test_a_program_for_ghostscript_is_no_picture():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "eps")
    with pytest.raises(UnreadableImage, match=r"x\.png: not an image \(it begins with b'%!PS-Adobe"):
        decode_image(buffer.getvalue(), "x.png")


def test_whole_numbers_of_32_bits_have_no_agreed_range():
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 255, np.int32)).save(buffer, "tiff")
    with pytest.raises(UnreadableImage, match="more than 16 bits"):
        decode_image(buffer.getvalue(), "x.tif")


def test_lists_of_tensors_become_pictures_and_other_ranges_do_not():
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    assert [p.tobytes() for p in to_pil([*images])] == [p.tobytes() for p in to_pil(images)]
    for given, message in ((images.numpy(), "not ndarray"), ((images + 1) * 127.5, r"as in 0\.\.255")):
        with pytest.raises(ValueError, match=message):
            to_pil(given)


def test_tensors_become_pictures():
    images = torch.rand(2, 3, 5, 7) * 2 - 1
    pictures = to_pil(images)
    assert [picture.size for picture in pictures] == [(7, 5)] * 2
    assert np.array_equal(np.asarray(pictures[1]), to_uint8(images[1]).permute(1, 2, 0))
    assert np.array_equal(np.asarray(to_pil(images[1])[0]), np.asarray(pictures[1]))
    assert np.array_equal(np.asarray(to_pil(to_uint8(images))[0]), np.asarray(pictures[0]))
    with pytest.raises(ValueError, match=r"not \(5, 7\)"):
        to_pil(images[0, 0])


# Memory and size


def whole_crop(picture: Image.Image, size: int) -> np.ndarray:
    """The centre crop as it is defined: scaled whole, then cropped. For pictures below twice the size."""
    scale = size / min(picture.size)
    scaled = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size))).astype(int)


@pytest.mark.parametrize("shape", [(2, 61), (61, 2), (700, 23), (23, 700), (1, 400), (97, 5)])
def test_crops_of_long_pictures_are_those_of_the_whole(shape):
    picture = Image.effect_noise(shape, 40).convert("RGB")
    difference = np.asarray(center_crop_adm(picture, 32)) - whole_crop(picture, 32)
    assert np.abs(difference).max() <= 1


def test_ordinary_pictures_are_cropped_to_the_bit_as_ever():
    for shape in ((400, 60), (60, 400), (63, 40), (512, 33)):  # up to 16 times as long as wide
        picture = Image.effect_noise(shape, 60).convert("RGB")
        assert np.array_equal(np.asarray(center_crop_adm(picture, 40)), whole_crop(picture, 40))


@pytest.mark.slow
def test_memory_follows_the_crop():
    """The peak of a process that reads extreme pictures at 256 pixels, above what it held before."""
    code = """
import io, resource
from PIL import Image
from imgtok.pictures import center_crop_adm, corner_crops, decode_image, random_crop
def read(shape):
    buffer = io.BytesIO()
    Image.new("RGB", shape, (9, 8, 7)).save(buffer, "png")
    picture = decode_image(buffer.getvalue(), "a")
    squares = [center_crop_adm(picture, 256), random_crop(picture, 256, [0.9] * 3), *corner_crops(picture, 256)]
    assert all(square.size == (256, 256) and square.getcolors() == [(65536, (9, 8, 7))] for square in squares)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = read((300, 300))
print(*(read(shape) - before for shape in ((1, 8000), (8000, 1), (20000, 30))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(map(float, done.stdout.split())) < 50


def test_a_large_jpeg_is_decoded_at_a_reduced_size_where_a_size_is_enough():
    """Half, a quarter or an eighth, never below what is asked for; upright and in RGB; other formats whole."""
    rows, columns = np.mgrid[:600, :800]
    large = Image.fromarray(
        np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1).astype(np.uint8) // 4 + 90
    )
    jpeg = encoded(large, "jpeg", quality=95)
    sizes = {at_least: decode_image(jpeg, "a", at_least).size for at_least in (75, 76, 150, 300, 301, 600, 2000)}
    assert sizes == {75: (100, 75), 76: (200, 150), 150: (200, 150), 300: (400, 300), 301: (800, 600),
                     600: (800, 600), 2000: (800, 600)}  # fmt: skip
    assert decode_image(jpeg, "a").size == (800, 600)
    assert decode_image(encoded(large, "png"), "a", 75).size == (800, 600)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    assert decode_image(encoded(large, "jpeg", exif=exif), "a", 150).size == (150, 200)
    assert decode_image(encoded(large.convert("CMYK"), "jpeg"), "a", 150).mode == "RGB"
    crops = [np.asarray(random_crop(decode_image(jpeg, "a", size), 48, [0.5] * 3)).astype(int) for size in (None, 144)]
    assert abs(crops[0] - crops[1]).mean() < 3


def bomb(width: int, height: int) -> bytes:
    """A JPEG file that claims a size."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "jpeg"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (bomb(10_000, 10_000), "10000 x 10000"),
        (bomb(65_000, 65_000), "4225000000"),
        (encoded(Image.new("1", (30_000, 4_000))), "30000 x 4000"),
    ],
)
def test_pictures_of_too_many_pixels_are_named_before_they_are_decoded(data, size, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match=f"^cats/7.jpg: has {size} pixels, and at most 89,478,485 are decoded"):
        decode_image(data, "cats/7.jpg")
