"""Uploads for tests, good and hostile, made when they are needed: no binary files in the repository."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from helios_core.media.fragments import encode_fragment
from helios_core.vae.latents import to_i420

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(width: int, height: int) -> Image.Image:
    """Red and green above blue and white: shows how a picture was turned."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, WHITE
    return Image.fromarray(picture)


def image(format: str, picture: Image.Image | None = None, **options: object) -> bytes:
    sink = io.BytesIO()
    (quarters(64, 48) if picture is None else picture).save(sink, format, **options)
    return sink.getvalue()


def i420(frames_THWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """RGB frames as `encode_fragment` takes them."""
    unit = torch.from_numpy(frames_THWC).permute(3, 0, 1, 2)[None] / 127.5 - 1
    return to_i420(unit).numpy()


def write_samples(folder: Path, clip: str) -> None:
    """picture.png, 120x90, and a video of 40 frames under the name `clip`: noise, but always the same."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(folder / "picture.png")
    frames = rng.integers(0, 255, (40, 64, 96, 3), dtype=np.uint8)
    fragment = encode_fragment(i420(frames), chunk_index=0, first_frame=0, fps=24)
    (folder / clip).write_bytes(fragment.init + fragment.data)


def animation(format: str) -> bytes:
    """Three pictures, the first of them `quarters`."""
    more = [Image.new("RGB", (64, 48), (i, 0, 0)) for i in (1, 2)]
    return image(format, save_all=True, append_images=more)


def oriented(orientation: int, format: str = "JPEG", picture: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image(format, picture, exif=exif.tobytes(), quality=100)


def png(
    width: int,
    height: int,
    bits: int = 1,
    colour: int = 0,
    pixels: bytes | None = None,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG written by hand, black unless `pixels` (its filtered rows) says otherwise. `more`: chunks before them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    if pixels is None:
        samples = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
        pixels = bytes(height * (1 + (width * bits * samples + 7) // 8))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(name, data) for name, data in more)
        + chunk(b"IDAT", zlib.compress(pixels, 1))
        + chunk(b"IEND", b"")
    )


# --- Videos -----------------------------------------------------------------------------------------------------------

BITS, CELL = 8, 8  # a frame's number is written as 8 black or white cells of 8 x 8 pixels in its top left corner


def numbered(i: int, width: int = 96, height: int = 64) -> npt.NDArray[np.uint8]:
    """A grey frame that carries its number: [height, width, 3]."""
    frame = np.full((height, width, 3), 90 + i % 50, np.uint8)
    for bit in range(BITS):
        frame[:CELL, bit * CELL : (bit + 1) * CELL] = 255 * (i >> bit & 1)
    return frame


def number_in(picture: npt.NDArray[np.uint8]) -> int:
    cells = picture[:CELL, : BITS * CELL].reshape(CELL, BITS, CELL, 3).mean(axis=(0, 2, 3))
    return sum(int(cell > 128) << bit for bit, cell in enumerate(cells))


def video(
    frames: int = 36,
    *,
    format: str = "mp4",
    codec: str = "libx264",
    fps: int | Fraction = 24,
    size: tuple[int, int] = (96, 64),
    times: Sequence[Fraction] | None = None,
    rotation: int | None = None,
    audio: bool = False,
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    picture: Callable[[int, int, int], npt.NDArray[np.uint8]] = numbered,
    colours: tuple[int, int] = (2, 0),
    starts_at: Fraction = Fraction(0),
) -> bytes:
    """A video of numbered frames. `times`: seconds of each frame instead of i / fps; `colours`: (space, range);
    `starts_at`: an edit list cuts off what comes before.
    """
    sink = io.BytesIO()
    tick = Fraction(1, fps if times is None else 1000)
    times = [Fraction(i, fps) for i in range(frames)] if times is None else times
    with av.open(sink, "w", format=format, options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = tick
        if rotation is not None:
            stream.set_display_rotation(rotation)
        space, range_ = colours
        stream.codec_context.colorspace, stream.codec_context.color_range = space, range_
        sound = container.add_stream("libopus" if format == "webm" else "aac", rate=48000) if audio else None
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709 if space == 1 else None,
                dst_color_range=ColorRange(range_) if range_ else None,
            )
            frame.pts, frame.time_base = round((time - starts_at) / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            for k in range(50):
                silence = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), "fltp", "stereo")
                silence.sample_rate, silence.pts, silence.time_base = 48000, 960 * k, Fraction(1, 48000)
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    if codec == "libsvtav1":  # to root's threads that call it, it gives real-time priority, and leaves it with them
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return sink.getvalue()


def sound_only() -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        for k in range(50):
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            silence.sample_rate, silence.pts, silence.time_base = 48000, 1024 * k, Fraction(1, 48000)
            container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return sink.getvalue()


def changing_size(format: str = "webm", codec: str = "libvpx", back: bool = False) -> bytes:
    """24 frames of 96x64 and 24 of 64x96, in one stream; `back`: and 24 of the first size again."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=format) as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 24)
        sizes = [(96, 64), (64, 96), (96, 64)][: 3 if back else 2]
        for part, (width, height) in enumerate(sizes):
            encoder = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 24), Fraction(24)
            if codec == "libx264":
                encoder.options = {"bf": "0"}
            for i in range(25):
                if i < 24:
                    frame = av.VideoFrame.from_ndarray(numbered(i, width, height), format="rgb24")
                    frame.pts, frame.time_base = 24 * part + i, Fraction(1, 24)
                for packet in encoder.encode(frame if i < 24 else None):
                    packet.stream = stream
                    container.mux(packet)
    return sink.getvalue()


# --- MP4 boxes --------------------------------------------------------------------------------------------------------

SAMPLE_TABLE = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """(type, payload) of each box."""
    found, offset = [], 0
    while offset < len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        found.append((kind, data[offset + 8 : offset + size]))
        offset += size
    return found


def edited(data: bytes, path: tuple[bytes, ...], edit: Callable[[bytes], bytes]) -> bytes:
    """The file with the payload of each box at `path` edited. The media data must come before what grows."""
    out = b""
    for kind, payload in boxes(data):
        if kind == path[0]:
            payload = edited(payload, path[1:], edit) if path[1:] else edit(payload)
        out += struct.pack(">I4s", 8 + len(payload), kind) + payload
    return out


def header_first(file: bytes) -> bytes:
    """The file with moov before the media data, as for streaming."""
    (_, ftyp), *others = boxes(file)
    moved = 8 + len(dict(others)[b"moov"])

    def shift(payload: bytes) -> bytes:
        version, count, *offsets = struct.unpack(f">{len(payload) // 4}I", payload)
        return struct.pack(f">{len(payload) // 4}I", version, count, *(offset + moved for offset in offsets))

    file = edited(file, (*SAMPLE_TABLE, b"stco"), shift)
    (_, ftyp), *others = boxes(file)
    others.sort(key=lambda box: box[0] != b"moov")
    return b"".join(struct.pack(">I4s", 8 + len(p), kind) + p for kind, p in [(b"ftyp", ftyp), *others])


def with_times(file: bytes, delta: int, count: int | None = None, size: int = 1) -> bytes:
    """The file with one frame every `delta` ticks; with `count`, a sample table of so many frames of `size` bytes."""
    if count is None:
        (count,) = struct.unpack(">I", find(file, (*SAMPLE_TABLE, b"stsz"))[8:12])
    else:
        file = edited(file, (*SAMPLE_TABLE, b"stsz"), lambda _: struct.pack(">III", 0, size, count))
        file = edited(file, (*SAMPLE_TABLE, b"stsc"), lambda _: struct.pack(">IIIII", 0, 1, 1, count, 1))
        file = edited(file, (*SAMPLE_TABLE, b"stss"), lambda _: struct.pack(">III", 0, 1, 1))
    # The edit list goes: FFmpeg cuts a track at its end.
    file = edited(file, (b"moov", b"trak", b"edts"), lambda _: b"")
    return edited(file, (*SAMPLE_TABLE, b"stts"), lambda _: struct.pack(">IIII", 0, 1, count, delta))


def with_external_data(file: bytes, url: str) -> bytes:
    """The track's data is said to lie in another file."""
    entry = b"\0\0\0\0" + url.encode() + b"\0"
    entry = struct.pack(">I4s", 8 + len(entry), b"url ") + entry
    path = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")
    return edited(file, path, lambda _: struct.pack(">II", 0, 1) + entry)


def find(data: bytes, path: tuple[bytes, ...]) -> bytes:
    for name in path:
        data = dict(boxes(data))[name]
    return data


def webm_of_hours(file: bytes, hours: int) -> bytes:
    """A WebM whose header speaks of hours: Duration (4489) is a float of 8 bytes in milliseconds."""
    at = file.index(b"\x44\x89\x88") + 3
    return file[:at] + struct.pack(">d", hours * 3.6e6) + file[at + 8 :]
