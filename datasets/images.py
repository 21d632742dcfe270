"""Decode one image or mask from disk, or say in one sentence why not. Every image of this program is opened here."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from common.errors import UserError
from common.readers import brief

warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata and palettes, in the middle of a progress bar

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
# What those suffixes mean. PIL knows forty more formats, of which some start other programs (EPS: Ghostscript), and tries them
# all whatever a file's name. JPEG includes MPO, a telephone's photograph with a preview behind it.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
DEFAULT_MAX_PIXELS = 100_000_000
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it tells of damaged files comes as an exception, too
Image.MAX_IMAGE_PIXELS = None  # `max_pixels` replaces it, with a sentence instead of a warning
_SIXTEEN_BIT_MODES = {"I;16", "I;16B", "I;16L", "I;16N", "I"}
_SWAPPED_ORIENTATIONS = {5, 6, 7, 8}  # EXIF: the displayed image is turned by 90 degrees


def is_image_file(path: Path) -> bool:
    """True for a visible file with an image suffix in any letter case."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def list_images(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name; hidden and other files are passed over."""
    return sorted(path for path in folder.iterdir() if is_image_file(path))


@contextmanager
def _errors_of(path: Path, reason: str) -> Iterator[None]:
    """Turn what PIL raises into a sentence; there is no list of it, as its decoders trust what a header says."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:  # of a length in the file, more likely than of as many pixels as are allowed
        raise UserError(f"{reason} (it takes more memory than there is); replace or remove it") from error
    except Exception as error:
        raise UserError(f"{reason} ({brief(error)}); replace or remove it") from error


def _open(path: Path, max_pixels: int) -> Image.Image:
    """The header of an image, whose pixels are not decoded yet."""
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        problem = "is no regular file" if os.path.exists(path) else "does not exist"
        raise UserError(f"image not found: {str(path)!r} {problem}; correct the path")
    if path.stat().st_size == 0:
        raise UserError(f"cannot read {str(path)!r}: it is empty (0 bytes); replace or remove it")
    with _errors_of(path, f"cannot read {str(path)!r}: it is no readable PNG, JPEG, BMP, TIFF or WebP image"):
        image = Image.open(path, formats=_FORMATS)
    if image.format == "TIFF":
        image.filename = ""  # else PIL maps an uncompressed one into memory, and one that is turned with its sides exchanged
    if image.width * image.height > max_pixels:
        image.close()
        raise UserError(
            f"image too large: {str(path)!r} has {image.width}x{image.height} pixels, the limit is {max_pixels}; "
            "scale it down or raise --max_pixels"
        )
    if image.format != "MPO" and getattr(image, "is_animated", False):
        image.close()
        raise UserError(f"cannot use {str(path)!r}: it holds several images; save the one that is meant as a file of its own")
    return image


def _decoding(path: Path):
    return _errors_of(path, f"cannot decode {str(path)!r}: damaged or cut short")


def image_size(path: Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """(width, height) as displayed; from the header alone, except for formats that hide their rotation behind the pixels."""
    with _open(path, max_pixels) as image:
        if image.width == image.height:
            return image.size  # however it is turned: spares decoding a whole PNG file
        with _decoding(path):
            swapped = image.getexif().get(ExifTags.Base.Orientation) in _SWAPPED_ORIENTATIONS
        swapped = swapped and image.format != "TIFF"  # of which PIL tells the size as displayed
        return (image.height, image.width) if swapped else image.size


def _decoded(path: Path, max_pixels: int) -> Image.Image:
    with _open(path, max_pixels) as image, _decoding(path):
        image.getexif()  # before the pixels, behind which a second orientation may lie: `image_size` knows the first alone
        image.load()
        return ImageOps.exif_transpose(image)


def load_image(path: Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """RGB image with its EXIF rotation applied; 16-bit grey is scaled by 1/257, not clipped.

    Raises:
        UserError: the file is empty, damaged, no image, too large, or holds floating-point pixels.
    """
    image = _decoded(path, max_pixels)
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image)
        if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise UserError(f"cannot use {str(path)!r}: pixel values beyond 16 bits; convert it to 8 or 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError(f"cannot use {str(path)!r}: floating-point pixels; convert it to 8 or 16 bits")
    with _decoding(path):
        return image.convert("RGB")


def load_mask_values(path: Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Mask as (H, W) numbers as they are stored; of several colour values the largest."""
    image = _decoded(path, max_pixels)
    if image.mode not in _SIXTEEN_BIT_MODES | {"F", "L", "1"}:
        with _decoding(path):
            image = image.convert("RGB")
    values = np.asarray(image)
    return values if values.ndim == 2 else values.max(axis=2)


def load_mask(path: Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Mask as a grey image of 0 and 255: every pixel with any colour value above 0 is defect."""
    return Image.fromarray((load_mask_values(path, max_pixels) > 0).astype(np.uint8) * 255)
