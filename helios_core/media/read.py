"""An uploaded image or video ▸ what it is (`probe`), or its frames (`read_image`, `read_clip`).

An upload is hostile until it has been decoded, and decoders are large C libraries. So they run in a child process that
has the open file as its standard input, no environment, and limits on memory, time and files. Whatever becomes of the
child, its caller sees a result or one InvalidInput. A file's type is what its first bytes say, whatever its name says.

Two programs share this file. The parent needs asyncio and numpy, the child (`python -m helios_core.media.read`) Pillow
or PyAV; each imports its own where it needs them, as a child that starts in 60 to 100 ms is better than one in 170.
"""

# T = frames, H = height, W = width, C = red, green, blue

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

from helios_core.config import CHUNK_FRAMES, NATIVE_FPS
from helios_core.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

    import av
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

FIELD = "input_reference"  # the request's field that refusals speak of
TAIL_CHUNKS = 3  # as much of a video's end as the history can hold: 27 latent frames for its 19
MiB = 2**20


@dataclass(frozen=True)
class MediaLimits:
    """The largest upload that is accepted, and what a child process may take to find that out.

    Sides and pixels are of one picture, seconds are wall time. `*_data` is what a child may allocate, in bytes; the
    code of its libraries comes on top, about 30 MiB that no upload can change.
    """

    max_bytes: int = 64 * MiB
    max_pixels: int = 40_000_000  # of an image
    max_side: int = 16384
    max_video_pixels: int = 4096 * 2304
    max_video_seconds: float = 60.0
    max_video_frames: int = 60 * 120
    probe_seconds: float = 5.0
    probe_data: int = 110 * MiB
    read_seconds: float = 60.0
    read_data: int = 1024 * MiB


DEFAULT_LIMITS = MediaLimits()


@dataclass(frozen=True)
class MediaInfo:
    """What an upload is. Sizes are in pixels, as shown: after its rotation.

    `kind`: "image" or "video"; `format`: "png", "jpeg", "webp", "mp4", "mov" or "webm"; `frames`: of a video at 24 fps,
    1 for an image; `seconds`: 0 for an image.
    """

    kind: str
    format: str
    width: int
    height: int
    frames: int
    seconds: float


@dataclass(frozen=True)
class Clip:
    """What a video contributes to one that goes on from it. RGB, uint8.

    `first_HWC`: its frame 0, [H, W, 3]; `tail_THWC`: its last 33 * min(frames // 33, 3) frames, [T, H, W, 3];
    `frames`: how many it has at 24 fps.
    """

    first_HWC: npt.NDArray[np.uint8]
    tail_THWC: npt.NDArray[np.uint8]
    frames: int


# --- The parent -------------------------------------------------------------------------------------------------------


async def probe(path: Path, limits: MediaLimits = DEFAULT_LIMITS) -> MediaInfo:
    """What the file is, checked as far as `limits.probe_data` bytes of memory go.

    An image is decoded whole where that fits: any baseline JPEG, a progressive one up to 10 million pixels, a PNG up to
    18, a WebP up to 4.5. Of a larger one the header is checked, a PNG's checksums and a WebP's length. Of a video, the
    times of all packets are checked, and the first and the last key frame are decoded. So `read_*` may still refuse.
    Raises InvalidInput; OSError if the file cannot be opened.
    """
    facts, _ = await _in_child({"task": "probe"}, path, limits)
    return MediaInfo(**facts)


async def read_image(
    path: Path, width: int, height: int, limits: MediaLimits = DEFAULT_LIMITS
) -> npt.NDArray[np.uint8]:
    """The image as RGB, uint8, [height, width, 3]: turned as its EXIF says, over black where it is transparent, fitted.

    Fitted means scaled, its aspect kept, until it just covers width x height, then cut at the centre. The filter is
    Lanczos, after plain averaging down to twice the size. Colours are taken for sRGB, whatever profile is attached.
    Raises InvalidInput; OSError if the file cannot be opened.
    """
    _, pixels = await _in_child({"task": "image", "size": (width, height)}, path, limits)
    return pixels.reshape(height, width, 3)


async def read_clip(path: Path, width: int, height: int, limits: MediaLimits = DEFAULT_LIMITS) -> Clip:
    """The video's first frame and its end at 24 fps, turned as its display matrix says, fitted as an image is.

    Frame i is the last one that the video shows at i / 24 s after its first, with 2 ms of grace, as WebM counts whole
    milliseconds: 24 fps pass frame by frame. There are as many frames as 24ths of a second from the start of the first
    frame to the end of the last, rounded; a video of fewer than 33 is refused.
    Raises InvalidInput; OSError if the file cannot be opened.
    """
    facts, pixels = await _in_child({"task": "clip", "size": (width, height)}, path, limits)
    frames_THWC = pixels.reshape(-1, height, width, 3)
    return Clip(first_HWC=frames_THWC[0], tail_THWC=frames_THWC[1:], frames=facts["frames"])


async def _in_child(
    order: dict[str, Any], path: Path, limits: MediaLimits
) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
    """(facts, pixels) from a child that carries out the order. It is gone when this returns, raises or is cancelled."""
    import asyncio
    import mmap

    import numpy as np

    seconds, _ = _shares(order, limits)
    command = [sys.executable, "-P", "-m", "helios_core.media.read", json.dumps({**order, "limits": asdict(limits)})]
    # No environment, as keys may be in it; only the packages that we see.
    env = {"PYTHONPATH": os.pathsep.join([_PACKAGES, *filter(None, sys.path)])}
    with _child_files(path) as (upload, answer, complaint):
        child = await asyncio.create_subprocess_exec(*command, stdin=upload, stdout=answer, stderr=complaint, env=env)
        try:
            code = await asyncio.wait_for(child.wait(), seconds)
        except TimeoutError:
            raise _too_much(f"more than {seconds:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if code < 0:
            raise _too_much(f"the decoder was ended by {signal.Signals(-code).name}")
        if code > 0:
            text = os.pread(complaint.fileno(), 64 * 1024, 0).decode(errors="replace")
            raise RuntimeError(f"the reader of uploads ended with code {code}:\n{text}")
        result = mmap.mmap(answer.fileno(), 0)
    end = result.rfind(b"\n")  # after the pixels; the line of JSON that follows has no newline in it
    facts = json.loads(result[end:])
    if "refused" in facts:
        raise InvalidInput(FIELD, *facts["refused"])
    return facts, np.frombuffer(result, np.uint8, count=end)


_PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where helios_core lies


@contextmanager
def _child_files(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO, BinaryIO]]:
    """The child's standard files. It answers into memory: nobody has to read along, and pixels are not copied again."""
    with (
        open(path, "rb") as upload,
        open(os.memfd_create("answer"), "w+b") as answer,
        open(os.memfd_create("complaint"), "w+b") as complaint,
    ):
        yield upload, answer, complaint


def _shares(order: dict[str, Any], limits: MediaLimits) -> tuple[float, int]:
    """(seconds, bytes of data) that the child may take for an order."""
    if order["task"] == "probe":
        return limits.probe_seconds, limits.probe_data
    return limits.read_seconds, limits.read_data


# --- The child: all that follows runs in a process of its own, with limits --------------------------------------------


@dataclass(frozen=True)
class _Upload:
    file: BinaryIO
    kind: str
    format: str
    limits: MediaLimits


def main() -> None:
    """Carries out the order in argv[1] on standard input. Writes pixels, if any, a newline, and one line of JSON."""
    order = json.loads(sys.argv[1])
    limits = MediaLimits(**order.pop("limits"))
    _limit_this_process(order, limits)
    with open(0, "rb") as file, open(1, "wb") as out:
        try:
            facts = _carry_out(order, file, limits, out)
        except (InvalidInput, MemoryError) as error:
            refusal = error if isinstance(error, InvalidInput) else _too_much("more memory than is allowed")
            facts = {"refused": (refusal.value, refusal.allowed)}
        out.write(b"\n" + json.dumps(facts).encode())


def _limit_this_process(order: dict[str, Any], limits: MediaLimits) -> None:
    seconds, data = _shares(order, limits)
    width, height = order.get("size", (0, 0))
    for what, most in (
        (resource.RLIMIT_DATA, data),
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
    upload = _Upload(file, *_identify(file.read(256)), limits)
    match order["task"], upload.kind:
        case "probe", "image":
            return asdict(_probe_image(upload))
        case "probe", "video":
            return asdict(_probe_video(upload))
        case "image", "image":
            out.write(_read_image(upload, order["size"]))
            return {}
        case "clip", "video":
            return {"frames": _read_clip(upload, order["size"], out)}
        case task, kind:
            raise InvalidInput(FIELD, f"{kind} ({upload.format})", "an image" if task == "image" else "a video")


def _too_much(found: str) -> InvalidInput:
    return InvalidInput(FIELD, f"a file that takes too much to read: {found}", "a smaller or simpler file")


def _damaged(found: str) -> InvalidInput:
    return InvalidInput(FIELD, found, "a whole, undamaged file")


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


# --- Images -----------------------------------------------------------------------------------------------------------

# Bytes per pixel at the height of a decode: Pillow's picture has 4, decoders hold their own beside it.
_DECODE_BYTES = {"png": 5, "jpeg": 1, "progressive jpeg": 9, "webp": 20}
_BASE_DATA = 20 * MiB  # what Python and Pillow hold before that

# Each scan of a JPEG passes over the whole picture, and takes no more than 23 bytes. Encoders make about ten.
_MOST_SCANS = 100

# What Pillow raises over broken files.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True)
class _Header:
    """`orientation`: as in EXIF: 1 is upright, 5 to 8 have their sides swapped; `decoding`: key of _DECODE_BYTES."""

    width: int
    height: int
    orientation: int
    decoding: str


def _probe_image(upload: _Upload) -> MediaInfo:
    header = _image_header(upload)
    if header.width * header.height * _DECODE_BYTES[header.decoding] <= upload.limits.probe_data - _BASE_DATA:
        _decode_image(upload, at_least=(1, 1))
    elif upload.format == "png":
        with _pillow(upload) as picture:
            picture.verify()
    width, height = (header.width, header.height) if header.orientation < 5 else (header.height, header.width)
    return MediaInfo("image", upload.format, width, height, frames=1, seconds=0.0)


def _read_image(upload: _Upload, size: tuple[int, int]) -> bytes:
    header = _image_header(upload)
    picture = _decode_image(upload, at_least=(2 * max(size), 2 * max(size)))
    return _fit(picture, size, header.orientation)


def _image_header(upload: _Upload) -> _Header:
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
        upload.file.seek(0)
        scans = upload.file.read().count(b"\xff\xda")
        if scans > _MOST_SCANS:
            raise InvalidInput(FIELD, f"an image (jpeg) of {scans} scans", f"at most {_MOST_SCANS} scans")
    if animated:
        raise InvalidInput(FIELD, f"an animated image ({upload.format})", "an image of one picture")
    side, pixels = upload.limits.max_side, upload.limits.max_pixels
    if not (0 < width <= side and 0 < height <= side and width * height <= pixels):
        allowed = f"sides from 1 to {side} pixels, at most {pixels} pixels in all"
        raise InvalidInput(FIELD, f"an image of {width}x{height} pixels", allowed)
    return _Header(width, height, _orientation(exif), decoding)


def _webp_header(file: BinaryIO) -> tuple[int, int, bool, bytes]:
    """(width, height, animated, EXIF) from the chunks, as Pillow allocates the whole canvas when it opens a WebP."""
    file.seek(4)
    end = 8 + int.from_bytes(file.read(4), "little")
    if end > os.fstat(file.fileno()).st_size:
        raise _damaged("a truncated WebP image")
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
def _pillow(upload: _Upload) -> Iterator[Image.Image]:
    """The image as Pillow opens it; what Pillow complains about in the body is InvalidInput.

    The one plug-in is called directly: `Image.open` tries several, and takes most phones' photos, which have a second
    picture for bright screens in them, for a format of its own.
    """
    from PIL import ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    plugins: dict[str, type[ImageFile.ImageFile]] = {
        "png": PngImagePlugin.PngImageFile,
        "jpeg": JpegImagePlugin.JpegImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
    }
    upload.file.seek(0)
    try:
        yield plugins[upload.format](upload.file)
    except _PILLOW_ERRORS as error:
        raise _damaged(f"an image ({upload.format}) that cannot be decoded: {error}") from error


def _decode_image(upload: _Upload, at_least: tuple[int, int]) -> Image.Image:
    """The picture. A JPEG comes at 1/2, 1/4 or 1/8 of its size if it then still is `at_least` so large: far cheaper."""
    with _pillow(upload) as picture:
        picture.draft(picture.mode, at_least)
        picture.load()
        return picture


def _orientation(exif: bytes) -> int:
    from PIL import Image

    tags = Image.Exif()
    try:
        tags.load(exif)
        found = tags.get(0x0112)
    except _PILLOW_ERRORS:
        return 1  # viewers show such pictures too
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _fit(picture: Image.Image, size: tuple[int, int], orientation: int) -> bytes:
    """The picture's RGB bytes at (width, height): covering it, cut at the centre, turned, over black."""
    from PIL import Image

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
    turns = (
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    )
    return (picture if orientation == 1 else picture.transpose(turns[orientation - 2])).tobytes()


# --- Videos -----------------------------------------------------------------------------------------------------------

_DECODERS = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d"}
_GRACE = Fraction(2, 1000)  # seconds


@dataclass(frozen=True)
class _Timeline:
    """What the packets say without being decoded. `start`, `seconds`: exact; `keys`: first and last key packet."""

    start: Fraction
    seconds: Fraction
    keys: tuple[bytes, bytes]

    @property
    def frames(self) -> int:
        """At 24 fps."""
        return int(self.seconds * NATIVE_FPS + Fraction(1, 2))


def _probe_video(upload: _Upload) -> MediaInfo:
    import av

    with _opened_video(upload) as (container, stream):
        timeline = _timeline(container, stream, upload.limits)
        pictures = []
        for key in timeline.keys:
            # Flushed out at once, as a decoder that waits to reorder holds up to 16 large frames; and in a packet of
            # its own, as frames that an edit list cuts off would not come out.
            pictures += [*stream.codec_context.decode(av.Packet(key)), *stream.codec_context.decode(None)]
            stream.codec_context.flush_buffers()
    if not pictures:
        raise _damaged("a video whose key frames cannot be decoded")
    size = None
    for picture in pictures:
        size = _same_size(picture, size, upload.limits)
    width, height = pictures[0].width, pictures[0].height
    if _turn_of(pictures[0]) >= 5:
        width, height = height, width
    return MediaInfo("video", upload.format, width, height, timeline.frames, float(timeline.seconds))


def _read_clip(upload: _Upload, size: tuple[int, int], out: BinaryIO) -> int:
    """Writes frame 0 and the tail, and returns the number of frames. One picture is held, however long the video."""
    with _opened_video(upload) as (container, stream):
        timeline = _timeline(container, stream, upload.limits)
    frames = timeline.frames
    tail = frames - CHUNK_FRAMES * min(frames // CHUNK_FRAMES, TAIL_CHUNKS)
    fitted, pixels = None, b""
    with _opened_video(upload) as (container, stream):
        for i, frame in _at_native_fps(_decoded(container, stream, upload.limits), timeline):
            if i == 0 or i >= tail:
                if frame is not fitted:
                    fitted, pixels = frame, _fit(_to_picture(frame), size, _turn_of(frame))
                out.write(pixels * (2 if i == tail == 0 else 1))
    return frames


@contextmanager
def _opened_video(upload: _Upload) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first video stream; what FFmpeg complains about in the body is InvalidInput."""
    import av
    from av.stream import Discard, Disposition

    limits, format = upload.limits, upload.format
    codec_options = {"max_pixels": str(limits.max_video_pixels)}
    if format == "webm":
        _check_webm_is_whole(upload.file)
    upload.file.seek(0)
    try:
        with av.open(
            upload.file,
            "r",
            format="matroska" if format == "webm" else "mov",
            metadata_errors="replace",
            options={"threads": "1", **codec_options},
            # An empty list of protocols: whatever a file refers to, nothing else is opened.
            container_options={"protocol_whitelist": "", "codec_whitelist": ",".join(_DECODERS)},
        ) as container:
            # A picture on the cover of a song is a video stream too.
            videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not videos:
                raise InvalidInput(FIELD, f"a file ({format}) without a video stream", "a video")
            stream = videos[0]
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all
            decoder = stream.codec_context
            if decoder is None or decoder.name not in _DECODERS:
                found = f"a video ({format}) of the codec {decoder.name if decoder else 'unknown'}"
                raise InvalidInput(FIELD, found, "H.264, HEVC, AV1, VP8 or VP9")
            decoder.thread_count = 1
            decoder.options = codec_options
            _check_video(limits, stream.frames, (container.duration or 0) / 1e6, decoder.width, decoder.height)
            yield container, stream
    except (av.FFmpegError, OSError) as error:  # OSError: a seek to before the beginning
        raise _damaged(f"a video ({format}) that cannot be decoded: {error.strerror}") from error


def _check_webm_is_whole(file: BinaryIO) -> None:
    """FFmpeg takes the end of the file for the end of the video. A live one, of unknown size, passes."""
    position = 0
    for _ in range(2):  # the EBML header, then the segment that holds all the rest
        file.seek(position + 4)  # after the id
        first = file.read(1) or b"\1"
        more = 8 - first[0].bit_length()  # bytes of the size, told by its leading zeros
        unknown = (1 << 7 * (more + 1)) - 1
        size = int.from_bytes(first + file.read(more), "big") & unknown
        position += 5 + more + size
    if size != unknown and position > os.fstat(file.fileno()).st_size:
        raise _damaged("a truncated video (webm)")


def _check_video(limits: MediaLimits, frames: int, seconds: float, width: int, height: int) -> None:
    """What a header says of all, or what packets say so far."""
    if frames > limits.max_video_frames:
        raise InvalidInput(FIELD, f"a video of {frames} or more frames", f"at most {limits.max_video_frames}")
    if seconds > limits.max_video_seconds:
        raise InvalidInput(FIELD, f"a video of {seconds:.1f} s or more", f"at most {limits.max_video_seconds:g} s")
    if width * height > limits.max_video_pixels or width < 0 or height < 0:
        allowed = f"at most {limits.max_video_pixels} pixels per frame"
        raise InvalidInput(FIELD, f"a video of {width}x{height} pixels", allowed)


def _timeline(container: av.container.InputContainer, stream: av.VideoStream, limits: MediaLimits) -> _Timeline:
    first = last = end = None  # in ticks of the stream
    count = 0
    keys: list[av.Packet] = []
    for packet in container.demux(stream):
        if packet.pts is None and packet.size == 0:
            continue  # the one after the last, which tells a decoder to end
        if packet.pts is None or packet.is_corrupt:
            raise _damaged("a video with damaged or missing packets")
        if packet.is_keyframe:
            keys = [*keys[:1], packet]
        if packet.is_discard:
            continue  # cut off by an edit list
        count += 1
        first = packet.pts if first is None else min(first, packet.pts)
        if last is None or packet.pts > last:
            last, end = packet.pts, packet.pts + (packet.duration or 0)
        _check_video(limits, count, float((end - first) * stream.time_base), 0, 0)
    if first is None or last is None or end is None or not keys:
        raise _damaged("a video without frames")
    # A last frame that does not say how long it is shown counts as long as the others on average.
    ticks = end - first if end > last else Fraction((last - first) * count, max(count - 1, 1))
    timeline = _Timeline(first * stream.time_base, ticks * stream.time_base, (bytes(keys[0]), bytes(keys[-1])))
    if timeline.frames < CHUNK_FRAMES:
        raise InvalidInput(
            FIELD,
            f"a video of {timeline.frames} frames at {NATIVE_FPS} fps ({float(timeline.seconds):.2f} s)",
            f"at least {CHUNK_FRAMES} frames at {NATIVE_FPS} fps ({CHUNK_FRAMES / NATIVE_FPS} s)",
        )
    return timeline


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, limits: MediaLimits
) -> Iterator[av.VideoFrame]:
    """All frames; they must be of one size."""
    count, size = 0, None
    for packet in container.demux(stream):
        for frame in packet.decode():
            count += 1
            size = _same_size(frame, size, limits)
            if frame.pts is None or count > limits.max_video_frames:
                raise _damaged("a video whose frames are not those of its packets")
            yield frame


def _at_native_fps(frames: Iterator[av.VideoFrame], timeline: _Timeline) -> Iterator[tuple[int, av.VideoFrame]]:
    """(i, the frame that is shown at i / 24 s) for i = 0, ..., timeline.frames - 1."""
    i, shown = 0, None
    for frame in frames:
        time = frame.pts * frame.time_base - timeline.start - _GRACE
        while shown is not None and i < timeline.frames and Fraction(i, NATIVE_FPS) < time:
            yield i, shown
            i += 1
        shown = frame
    if shown is None:
        raise _damaged("a video without frames that can be decoded")
    for rest in range(i, timeline.frames):
        yield rest, shown


def _same_size(frame: av.VideoFrame, size: tuple[int, int] | None, limits: MediaLimits) -> tuple[int, int]:
    """The frame's size, which must be `size` if that is known."""
    _check_video(limits, 1, 0, frame.width, frame.height)
    if size is not None and size != (frame.width, frame.height):
        found = f"a video that changes from {size[0]}x{size[1]} to {frame.width}x{frame.height} pixels"
        raise InvalidInput(FIELD, found, "a video of one size")
    return frame.width, frame.height


def _to_picture(frame: av.VideoFrame) -> Image.Image:
    from av.video.reformatter import Colorspace
    from PIL import Image

    # 2 is "unspecified". Players take such a video for BT.709 if it is HD, for BT.601 if not; FFmpeg for BT.601.
    untagged_hd = frame.colorspace == 2 and min(frame.width, frame.height) >= 720
    plane = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709 if untagged_hd else None, threads=1).planes[
        0
    ]
    return Image.frombuffer("RGB", (frame.width, frame.height), plane, "raw", "RGB", plane.line_size, 1)


def _turn_of(frame: av.VideoFrame) -> int:
    """The frame's rotation as an EXIF orientation. PyAV counts degrees counter-clockwise; odd angles are left alone."""
    return {-90: 6, 90: 8, 180: 3, -180: 3}.get(frame.rotation, 1)


if __name__ == "__main__":
    main()
