"""Files that are not what their names say, for tests of what reads them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.miniature import save, texture

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def image_bytes(kind: str) -> bytes:
    """A texture as a file of a PIL format."""
    content = io.BytesIO()
    Image.fromarray(texture(np.random.default_rng(1))).save(content, kind)
    return content.getvalue()


def enormous_png(width: int = 12_000, height: int = 10_000) -> bytes:
    """A PNG of 120 megapixels whose pixels are cut short: who decodes it says that it is damaged."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def several_images(kind: str) -> bytes:
    """Two textures in one file."""
    content, images = io.BytesIO(), [Image.fromarray(texture(np.random.default_rng(seed))) for seed in (1, 2)]
    images[0].save(content, kind, save_all=True, append_images=images[1:])
    return content.getvalue()


# name of the damage -> (suffix of the file, its content, words of the sentence about it)
DAMAGES = {
    "empty": (".png", b"", "0 bytes"),
    "cut PNG": (".png", image_bytes("PNG")[:2000], "damaged or cut short"),
    "cut JPEG": (".jpg", image_bytes("JPEG")[:1000], "damaged or cut short"),
    "text": (".png", b"this is no image", "no readable PNG, JPEG, BMP, TIFF or WebP"),
    "PostScript": (".png", POSTSCRIPT, "no readable PNG, JPEG, BMP, TIFF or WebP"),
    "enormous": (".png", enormous_png(), "12000x10000"),
    "animated PNG": (".png", several_images("PNG"), "several images"),
    "pages": (".tif", several_images("TIFF"), "several images"),
    "animated WebP": (".webp", several_images("WEBP"), "several images"),
}


def damage(folder: Path, name: str, stem: str = "999") -> Path:
    """One more file in a folder, damaged in that way."""
    suffix, content, _ = DAMAGES[name]
    path = folder / f"{stem}{suffix}"
    path.write_bytes(content)
    return path


def in_all_modes(folder: Path) -> dict[str, Path]:
    """One photograph as 8-bit RGB and in every other way that PIL can write its grey values: all must be judged alike."""
    grey = texture(np.random.default_rng(4))[..., 0]
    plain, folder = Image.fromarray(np.repeat(grey[..., None], 3, axis=2)), folder
    paths = {"RGB": save(folder / "RGB.png", np.asarray(plain))}
    for name, image in {
        "8-bit grey": Image.fromarray(grey),
        "16-bit grey": Image.fromarray(grey.astype(np.uint16) * 257),
        "RGBA": plain.convert("RGBA"),
        "palette": Image.fromarray(grey).convert("P"),
    }.items():
        paths[name] = folder / f"{name}.png"
        image.save(paths[name])
    paths["CMYK"] = folder / "CMYK.tif"
    plain.convert("CMYK").save(paths["CMYK"])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    paths["turned"] = folder / "turned.png"
    plain.transpose(Image.Transpose.ROTATE_90).save(paths["turned"], exif=exif)
    return paths
