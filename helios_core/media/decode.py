"""The child of `read.py`: `python -m helios_core.media.decode ORDER < upload > answer`.

ORDER is JSON: {"task": "probe" | "image" | "clip", "size": [width, height], "limits": {...}}; a probe has no size. The
process first limits itself, then tells the upload's type by its content, and only then imports what decodes that.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

from helios_core.config import CHUNK_FRAMES
from helios_core.errors import InvalidInput
from helios_core.media.upload import FIELD, TAIL_CHUNKS, MediaLimits, Upload, too_much


def main() -> None:
    """Carries out the order in argv[1] on standard input. Writes pixels, if any, a newline, and one line of JSON."""
    order = json.loads(sys.argv[1])
    limits = MediaLimits(**order.pop("limits"))
    _limit_this_process(order, limits)
    with open(0, "rb") as file, open(1, "wb") as out:
        try:
            facts = _carry_out(order, file, limits, out)
        except (InvalidInput, MemoryError) as error:
            refusal = error if isinstance(error, InvalidInput) else too_much("more memory than is allowed")
            facts = {"refused": (refusal.value, refusal.allowed)}
        out.write(b"\n" + json.dumps(facts).encode())


def _limit_this_process(order: dict[str, Any], limits: MediaLimits) -> None:
    seconds, data = limits.shares(order["task"])
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    width, height = order.get("size", (0, 0))
    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),  # the parent watches the wall clock; this holds if it is gone
        (resource.RLIMIT_FSIZE, 64 * 1024 + 3 * width * height * (1 + TAIL_CHUNKS * CHUNK_FRAMES)),  # the answer
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _carry_out(order: dict[str, Any], file: BinaryIO, limits: MediaLimits, out: BinaryIO) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    if size > limits.max_bytes:
        raise InvalidInput(FIELD, f"a file of {size} bytes", f"at most {limits.max_bytes} bytes")
    upload = Upload(file, *_identify(file.read(256)), limits)
    # Only the one that is needed: most of a child's time goes into these imports.
    if upload.kind == "image":
        from helios_core.media import decode_image
    else:
        from helios_core.media import decode_video
    match order["task"], upload.kind:
        case "probe", "image":
            return asdict(decode_image.probe(upload))
        case "probe", "video":
            return asdict(decode_video.probe(upload))
        case "image", "image":
            out.write(decode_image.read(upload, order["size"]))
            return {}
        case "clip", "video":
            frames, pixels = decode_video.read(upload, order["size"])
            out.writelines(pixels)
            return {"frames": frames}
        case task, kind:
            raise InvalidInput(FIELD, f"{kind} ({upload.format})", "an image" if task == "image" else "a video")


# --- Types ------------------------------------------------------------------------------------------------------------

_EBML = b"\x1a\x45\xdf\xa3"
_STILL_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"}
_OLD_MOV_BOXES = {b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}  # QuickTime files before there was ftyp

# What people take for one of ours, and what FFmpeg would gladly follow elsewhere: (offset, bytes there, name).
_REFUSED = (
    (0, b"GIF8", "a GIF image"),
    (0, b"BM", "a BMP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (4, b"jP  ", "a JPEG 2000 image"),
    (4, b"ftyp", "a HEIF or AVIF image"),
    (0, b"<svg", "an SVG image"),
    (0, b"%PDF", "a PDF file"),
    (0, b"#EXTM3U", "a playlist"),
    (0, b"ffconcat", "a playlist"),
    (0, _EBML, "a Matroska video that is not WebM"),
    (8, b"AVI ", "an AVI video"),
)


def _identify(head: bytes) -> tuple[str, str]:
    """(kind, format) of a file from its first bytes."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image", "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image", "jpeg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image", "webp"
    if head[4:8] == b"ftyp" and head[8:12] not in _STILL_BRANDS:
        return "video", "mov" if head[8:12] == b"qt  " else "mp4"
    if head[4:8] in _OLD_MOV_BOXES:
        return "video", "mov"
    if head.startswith(_EBML) and b"\x42\x82\x84webm" in head[:64]:  # the element DocType
        return "video", "webm"
    names = (name for offset, magic, name in _REFUSED if head[offset:].startswith(magic))
    found = next(names, f"a file that begins with {head[:8]!r}" if head else "an empty file")
    raise InvalidInput(FIELD, found, "a PNG, JPEG or WebP image, or an MP4, MOV or WebM video")


if __name__ == "__main__":
    main()
