"""Decoding, pairing and checking of images and masks."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datasets import elpv
from datasets.catalog import LAYOUTS, ListingOptions
from datasets.images import DEFAULT_MAX_PIXELS, image_size, list_images, load_image, load_mask
from datasets.records import ImageDataset, Record
from tests.miniature import make_elpv, make_mvtec, save

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))  # 64 wide, 48 high


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    path = save(tmp_path / "deep.png", RAMP.astype(np.uint16) * 257)
    assert Image.open(path).mode == "I;16"
    np.testing.assert_array_equal(np.asarray(load_image(path))[..., 1], RAMP)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    colours = Image.fromarray(np.stack([RAMP, RAMP // 2, 255 - RAMP], axis=2))
    image = colours.convert(mode)
    image.save(tmp_path / "image.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "image.png")), np.asarray(image.convert("RGB")))


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (20, 10), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    red, green, blue = np.asarray(load_image(tmp_path / "ink.jpg"))[5, 5]
    assert red > 200
    assert max(green, blue) < 60


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to display
    Image.fromarray(RAMP).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "turned.png"))[..., 0], np.rot90(RAMP, -1))
    assert image_size(tmp_path / "turned.png") == (48, 64)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".png", {}),
        (".jpg", {"quality": 100}),
        (".webp", {"lossless": True}),
        (".tif", {}),
        (".tif", {"compression": "tiff_lzw"}),
    ],
)
def test_a_turned_image_has_the_displayed_size_and_pixels(tmp_path, suffix, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"turned{suffix}"
    Image.fromarray(RAMP[:10, :30]).save(path, exif=exif, **options)
    assert image_size(path) == load_image(path).size == (10, 30)
    difference = np.asarray(load_image(path))[..., 0].astype(int) - np.rot90(RAMP[:10, :30], -1)
    assert np.abs(difference).max() <= (4 if suffix == ".jpg" else 0)


def test_size_of_a_square_image_comes_from_its_header_alone(tmp_path):
    """A PNG file may hide its rotation behind the pixels, which a cut one shows by failing; a square needs none of that."""
    for side in (48, 64):
        path = save(tmp_path / f"{side}.png", np.random.default_rng(0).integers(0, 255, (64, side), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert image_size(tmp_path / "64.png") == (64, 64)
    with pytest.raises(UserError, match=r"48\.png"):
        image_size(tmp_path / "48.png")


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_names_its_path(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.png"):
        load_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_truncated_files_name_their_path(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cut"):
        load_image(path)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(("width", "height"), [(12_000, 10_000), (30_000, 20_000)])
def test_enormous_image_is_refused_from_its_header(tmp_path, width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b""))
    assert width * height > DEFAULT_MAX_PIXELS
    with pytest.raises(UserError, match=r"image too large: .*bomb\.png"):
        load_image(path)


def test_floating_point_image_is_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floating-point"):
        load_image(tmp_path / "float.tif")


def test_image_files_are_found_whatever_their_case(tmp_path):
    for name in ("a.PNG", "b.Jpg", "c.jpeg", "d.TIFF", "e.bmp", "f.webp"):
        Image.fromarray(RAMP).save(tmp_path / name)
    for name in ("._a.PNG", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.PNG", "b.Jpg", "c.jpeg", "d.TIFF", "e.bmp", "f.webp"]


def test_any_value_above_zero_is_defect(tmp_path):
    truth = np.zeros((48, 64), bool)
    truth[10:20, 30:50] = True
    faint = np.where(truth, 1, 0).astype(np.uint8)
    palette = Image.fromarray(faint)
    palette.putpalette([0, 0, 0, 0, 200, 0] + [0] * 762)
    forms = {
        "full": Image.fromarray(truth.astype(np.uint8) * 255),
        "faint": Image.fromarray(faint),
        "middle": Image.fromarray(faint * 128),
        "deep": Image.fromarray(faint.astype(np.uint16)),
        "colour": Image.fromarray(np.stack([faint * 0, faint * 0, faint * 7], axis=2)),
        "alpha": Image.fromarray(np.stack([faint * 90, faint * 0, faint * 0, faint * 0 + 255], axis=2)),
        "palette": palette,
        "bits": Image.fromarray(truth),
    }
    for name, image in forms.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(np.asarray(load_mask(tmp_path / f"{name}.png")), truth * 255, err_msg=name)


def test_dataset_item_is_the_plain_computation(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (50, 70, 3), dtype=np.uint8)
    mask = np.zeros((50, 70), np.uint8)
    mask[20:30, 20:40] = 200
    record = Record(save(tmp_path / "a.png", pixels), 1, "part", (save(tmp_path / "m.png", mask),))
    item = ImageDataset([record], 40, 28)[0]
    resized = np.asarray(Image.fromarray(pixels).resize((40, 40), Image.Resampling.BILINEAR))[6:34, 6:34] / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(item["image"].numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    truth = Image.fromarray(np.uint8(mask > 0) * 255).resize((40, 40), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(item["mask"].numpy()[0], np.asarray(truth)[6:34, 6:34] / 255, atol=1e-6)
    assert (item["label"], item["path"], item["item"], item["has_pixel_truth"]) == (1, str(record.path), "part", True)


def test_bicubic_image_and_nearest_mask_are_the_plain_computation(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    mask = np.zeros((50, 70), np.uint8)
    mask[20:31, 21:40] = 200
    record = Record(save(tmp_path / "a.png", pixels), 1, "part", (save(tmp_path / "m.png", mask),))
    item = ImageDataset([record], 40, 28, interpolation="bicubic")[0]
    resized = np.asarray(Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC))[6:34, 6:34] / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(item["image"].numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    rows, columns = (((np.arange(6, 34) + 0.5) * length / 40).astype(int) for length in (50, 70))
    np.testing.assert_array_equal(item["mask"].numpy()[0], mask[np.ix_(rows, columns)] > 0)


def test_several_masks_are_united(tmp_path):
    masks = []
    for index in range(2):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[:, 10 * index : 10 * index + 5] = 255
        masks.append(save(tmp_path / f"{index}.png", pixels))
    record = Record(save(tmp_path / "a.png", RAMP), 1, "part", tuple(masks))
    assert ImageDataset([record], 28, 28).annotations(0)["mask"].sum() == 28 * 10


def test_masks_pair_by_stem_with_and_without_suffix(tmp_path):
    root = make_mvtec(tmp_path)
    folder = root / "bottle" / "ground_truth" / "hole"
    (folder / "000_mask.png").rename(folder / "000.png")
    (folder / ".hidden_mask.png").write_text("junk")
    records = LAYOUTS["MVTec-AD"].test(root, "bottle", ListingOptions())
    assert [record.label for record in records] == [0, 0, 0, 1, 1, 1]
    assert [path.name for record in records for path in record.masks] == ["000.png", "001_mask.png", "002_mask.png"]


def test_two_masks_for_one_image(tmp_path):
    root = make_mvtec(tmp_path)
    folder = root / "bottle" / "ground_truth" / "hole"
    save(folder / "001_mask.bmp", np.zeros((64, 64), np.uint8))
    with pytest.raises(UserError, match="two masks"):
        LAYOUTS["MVTec-AD"].test(root, "bottle", ListingOptions())


def test_masks_are_optional_in_a_folder_only(tmp_path):
    root = make_mvtec(tmp_path, masks=False)
    records = LAYOUTS["Folder"].test(root, "bottle", ListingOptions())
    assert [record.has_pixel_truth for record in records] == [True] * 3 + [False] * 3
    with pytest.raises(UserError, match=r"3 defective images in .* have no mask"):
        LAYOUTS["MVTec-AD"].test(root, "bottle", ListingOptions())


def test_elpv_split_is_fixed_and_leaves_doubtful_cells_out(tmp_path):
    root = make_elpv(tmp_path, 200)
    train, test = elpv.train_records(root, "mono"), elpv.test_records(root, "mono")
    assert {record.path.name for record in train}.isdisjoint(record.path.name for record in test)
    assert sum(record.label for record in test) == 50
    assert len(train) + len(test) == 200 - 30
    assert len(train) == pytest.approx(0.8 * 120, abs=12)
    assert [record.path.name for record in train][:3] == ["cell0001.png", "cell0003.png", "cell0006.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../secret.png 0.0 mono", "outside the data set"),
        ("images/cell0001.png 0.0", "line 41"),
        ("images/cell0001.png high mono", "line 41"),
    ],
)
def test_elpv_labels_are_untrusted(tmp_path, line, message):
    root = make_elpv(tmp_path)
    with (root / "labels.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        elpv.train_records(root, "mono")


def test_elpv_labels_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"labels\.csv"):
        elpv.train_records(tmp_path, "mono")


def test_masks_of_good_images_are_zero(tmp_path):
    record = Record(save(tmp_path / "a.png", RAMP), 0, "part")
    assert torch.equal(ImageDataset([record], 56, 56)[0]["mask"], torch.zeros(1, 56, 56))
