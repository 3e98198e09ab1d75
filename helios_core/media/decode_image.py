"""Images, in the child: a PNG, JPEG or WebP file ▸ what it is (`probe`), or its picture (`read`)."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from helios_core.errors import InvalidInput
from helios_core.media.upload import FIELD, MediaInfo, MiB, Upload, damaged

_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpeg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}

# EXIF's orientation ▸ what makes it upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Bytes per pixel at the height of a decode: Pillow's picture has 4, decoders hold their own beside it.
_DECODE_BYTES = {"png": 5, "jpeg": 1, "progressive jpeg": 9, "webp": 20}
_BASE_DATA = 20 * MiB  # what Python and Pillow hold before that

# Each scan of a JPEG passes over the whole picture, and takes no more than 23 bytes. Encoders make about ten.
_MOST_SCANS = 100

# What Pillow raises over broken files.
_PILLOW_ERRORS = (
    *(OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AssertionError),
    *(struct.error, zlib.error),
)

# A JPEG's marker, other than those inside a scan's data.
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


@dataclass(frozen=True)
class _Header:
    """`orientation`: as in EXIF: 1 is upright, 5 to 8 have their sides swapped; `decoding`: key of _DECODE_BYTES."""

    width: int
    height: int
    orientation: int
    decoding: str


def probe(upload: Upload) -> MediaInfo:
    header = _image_header(upload)
    if header.width * header.height * _DECODE_BYTES[header.decoding] <= upload.limits.probe_data - _BASE_DATA:
        with _decoded(upload, (1, 1)) as picture:
            fit(picture.crop((0, 0, 1, 1)), (1, 1), header.orientation)  # over a broken palette this fails, not before
    elif upload.format == "png":
        with _pillow(upload) as picture:
            picture.verify()
    width, height = (header.width, header.height) if header.orientation < 5 else (header.height, header.width)
    return MediaInfo("image", upload.format, width, height, frames=1, seconds=0.0)


def read(upload: Upload, size: tuple[int, int]) -> bytes:
    header = _image_header(upload)
    with _decoded(upload, (2 * max(size), 2 * max(size))) as picture:
        return fit(picture, size, header.orientation)


def _image_header(upload: Upload) -> _Header:
    """What the image says of itself, checked before anything as large as its pixels is allocated."""
    if upload.format == "webp":
        width, height, animated, exif = _webp_header(upload.file)
        decoding = "webp"
    else:
        with _pillow(upload) as picture:
            width, height = picture.size
            animated = getattr(picture, "is_animated", False)
            exif = picture.info.get("exif", b"")
            decoding = "progressive jpeg" if picture.info.get("progressive") else upload.format
    if upload.format == "jpeg":
        if _scans(upload.file) > _MOST_SCANS:
            raise InvalidInput(
                FIELD, f"an image (jpeg) of more than {_MOST_SCANS} scans", f"at most {_MOST_SCANS} scans"
            )
    if animated:
        raise InvalidInput(FIELD, f"an animated image ({upload.format})", "an image of one picture")
    side, pixels = upload.limits.max_side, upload.limits.max_pixels
    if not (0 < width <= side and 0 < height <= side and width * height <= pixels):
        allowed = f"sides from 1 to {side} pixels, at most {pixels} pixels in all"
        raise InvalidInput(FIELD, f"an image of {width}x{height} pixels", allowed)
    return _Header(width, height, _orientation(exif), decoding)


def _scans(file: BinaryIO) -> int:
    """How many scans a JPEG has, at most one more than allowed. What phones put behind the image is no part of it."""
    file.seek(0)
    data = file.read()
    scans, position = 0, 2
    while scans <= _MOST_SCANS and (marker := _MARKER.search(data, position)):
        code, position = data[marker.end() - 1], marker.end()
        if code == 0xD9:  # the end
            break
        scans += code == 0xDA
        position += int.from_bytes(data[position : position + 2])  # a segment, of a scan its header
    return scans


def _webp_header(file: BinaryIO) -> tuple[int, int, bool, bytes]:
    """(width, height, animated, EXIF) from the chunks, as Pillow allocates the whole canvas when it opens a WebP."""
    file.seek(4)
    end = 8 + int.from_bytes(file.read(4), "little")
    if end > os.fstat(file.fileno()).st_size:
        raise damaged("a truncated WebP image")
    width, height, animated, exif = 0, 0, False, b""
    position = 12
    for _ in range(64):  # an image has up to six chunks; millions of empty ones would cost seconds
        file.seek(position)
        name, length = file.read(4), int.from_bytes(file.read(4), "little")
        data = file.read(min(length, MiB if name == b"EXIF" else 10))
        if name == b"VP8X":  # flags, 3 bytes of nothing, width - 1, height - 1
            animated = data[0:1] > b"" and bool(data[0] & 2)
            width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (4, 7))
        elif name == b"VP8L" and not width:  # a signature, width - 1 and height - 1 in 14 bits each
            bits = int.from_bytes(data[1:5], "little")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif name == b"VP8 " and not width:  # a frame tag and a start code, width and height in 14 bits each
            width, height = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        elif name == b"EXIF":
            exif = data
        position += 8 + length + length % 2
        if position >= end:
            break
    return width, height, animated, exif


@contextmanager
def _pillow(upload: Upload) -> Iterator[Image.Image]:
    """The image as Pillow opens it; what Pillow complains about in the body is InvalidInput.

    The one plug-in is called directly: `Image.open` tries several, and takes most phones' photos, which have a second
    picture for bright screens in them, for a format of its own.
    """
    upload.file.seek(0)
    try:
        yield _PLUGINS[upload.format](upload.file)
    except _PILLOW_ERRORS as error:
        raise damaged(f"an image ({upload.format}) that cannot be decoded: {error}") from error


@contextmanager
def _decoded(upload: Upload, at_least: tuple[int, int]) -> Iterator[Image.Image]:
    """The picture. A JPEG comes at 1/2, 1/4 or 1/8 of its size if it then still is `at_least` so large: far cheaper."""
    with _pillow(upload) as picture:
        picture.draft(picture.mode, at_least)
        picture.load()
        yield picture


def _orientation(exif: bytes) -> int:
    tags = Image.Exif()
    try:
        tags.load(exif)
        found = tags.get(0x0112)
    except _PILLOW_ERRORS:
        return 1  # viewers show such pictures too
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def fit(picture: Image.Image, size: tuple[int, int], orientation: int) -> bytes:
    """The picture's RGB bytes at (width, height): covering it, cut at the centre, turned, over black."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
    elif picture.mode.startswith("I"):  # grey of 16 bits, which Pillow's own conversion would clip
        picture = picture.convert("I").point(lambda grey: grey / 257)
    if picture.mode not in ("RGB", "RGBA"):
        picture = picture.convert("RGB")
    # Scaled before it is turned: the smaller picture is cheaper to turn.
    width, height = size if orientation < 5 else (size[1], size[0])
    cut_width = min(picture.width, picture.height * width / height)
    cut_height = min(picture.height, picture.width * height / width)
    left, top = (picture.width - cut_width) / 2, (picture.height - cut_height) / 2
    box = (left, top, left + cut_width, top + cut_height)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=2.0)
    if picture.mode == "RGBA":
        black = Image.new("RGB", picture.size)
        black.paste(picture, mask=picture)
        picture = black
    return (picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture).tobytes()
