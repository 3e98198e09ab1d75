"""Frames ▸ one closed-GOP fMP4 fragment.

A video is `init + fragment 0 + fragment 1 + …`: that is what a live viewer receives and what is downloaded in the end.
Each chunk gets an encoder and a muxer of its own, so any process can make any fragment, and can make it again. What
ties the fragments together is two numbers in their boxes (ISO/IEC 14496-12): the sequence number and the decode time.
Every file says that it was made by AI (provenance.py). This module knows nothing about latents, stores or videos.
"""

# T = frames, H = height, W = width, R = H * 3 / 2 rows of an I420 frame: H of Y, then all of U, then all of V

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from helios_core.errors import MediaError
from helios_core.media.provenance import XMP, XMP_BOX

TICKS_PER_FRAME = 512  # the timescale is 512 * fps, so every frame's time is a whole number at every fps

# bf 0: with B-frames the first picture would start two frames late, as empty_moov allows no edit list.
X264 = {"preset": "veryfast", "crf": "20", "bf": "0"}
CPU_INFO = Path("/proc/cpuinfo")
if CPU_INFO.is_file() and "avx512" in CPU_INFO.read_text():
    # With its AVX-512 code x264 looks at memory that nobody wrote (in the macroblock tree): of 1,500 times the same
    # frames, 6 gave other bytes, none with that of AVX2, which is as fast.
    X264["x264-params"] = "asm=AVX2"


@dataclass(frozen=True)
class Fragment:
    """One encoded chunk. `init`: ftyp + moov + uuid (XMP_BOX), the same for every fragment of a video; `data`: moof +
    mdat."""

    init: bytes
    data: bytes
    frames: int


def encode_fragment(frames_TRW: npt.NDArray[np.uint8], *, chunk_index: int, first_frame: int, fps: int) -> Fragment:
    """One chunk as H.264 (High, 4:2:0, BT.709 in TV range). The same frames give the same bytes in any process.

    `frames_TRW`: I420 (BT.709, TV range), uint8, [T, H * 3 / 2, W], T >= 1, H and W even, as
    `helios_core.vae.latents.to_i420` makes them; `chunk_index`: counted from 0; `first_frame`: the number of frames of
    the video before this chunk; `fps`: frames per second.
    Raises MediaError if the frames are something else or the encoder refuses them.
    """
    _check(frames_TRW, chunk_index)
    try:
        muxed = _encode(frames_TRW, fps)
    except av.FFmpegError as error:
        raise MediaError(f"fragment {chunk_index}: frames of shape {frames_TRW.shape}: {error}") from error
    _ftyp, _moov, (_, moof, _), (_, _, mdat_end), _mfra = _boxes(muxed, 0, len(muxed))
    data = bytearray(muxed[moof:mdat_end])
    # Both boxes begin with a version byte and 3 bytes of flags. FFmpeg always writes tfdt as version 1: 64 bits.
    struct.pack_into(">I", data, _payload(data, b"moof", b"mfhd") + 4, chunk_index + 1)
    struct.pack_into(">Q", data, _payload(data, b"moof", b"traf", b"tfdt") + 4, first_frame * TICKS_PER_FRAME)
    # After moov: there FFmpeg finds it too, and Media Source Extensions have a player ignore what is between segments.
    return Fragment(init=muxed[:moof] + XMP_BOX, data=bytes(data), frames=len(frames_TRW))


def encode_jpeg(frame_RW: npt.NDArray[np.uint8]) -> bytes:
    """One frame, I420 as above, as a JPEG: a video's thumbnail."""
    sink = io.BytesIO()
    _frame(frame_RW).to_image().save(sink, "JPEG", quality=85, xmp=XMP)
    return sink.getvalue()


def to_rgb(frame_RW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """One frame, I420 as above, as RGB for people: uint8 [H, W, 3]."""
    pixels: npt.NDArray[np.uint8] = _frame(frame_RW).to_ndarray(format="rgb24")
    return pixels


def _check(frames_TRW: npt.NDArray[np.uint8], chunk_index: int) -> None:
    shape, dtype = frames_TRW.shape, frames_TRW.dtype
    if dtype != np.uint8:
        raise MediaError(f"fragment {chunk_index}: frames are {dtype}; allowed: uint8")
    if len(shape) != 3 or shape[0] == 0 or shape[1] % 3:
        raise MediaError(f"fragment {chunk_index}: frames have shape {shape}; allowed: [T, H * 3 / 2, W] with T >= 1")
    width, height = shape[2], shape[1] // 3 * 2
    if width == 0 or height == 0 or width % 2:
        raise MediaError(f"fragment {chunk_index}: frames are {width}x{height}; allowed: even sides")


def _frame(frame_RW: npt.NDArray[np.uint8]) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(frame_RW, format="yuv420p")
    frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
    return frame


def _encode(frames_TRW: npt.NDArray[np.uint8], fps: int) -> bytes:
    """A whole MP4 of one fragment: ftyp, moov, moof, mdat, mfra."""
    sink = io.BytesIO()
    # frag_custom: a fragment ends when it is told to, here at close, and so holds all frames of the chunk.
    # bitexact: the file does not name the version of FFmpeg.
    options = {
        "fflags": "+bitexact",
        "movflags": "+frag_custom+empty_moov+default_base_moof",
        "video_track_timescale": str(TICKS_PER_FRAME * fps),
    }
    with av.open(sink, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options=X264)
        encoder = stream.codec_context
        encoder.height, encoder.width = frames_TRW.shape[1] // 3 * 2, frames_TRW.shape[2]
        encoder.pix_fmt = "yuv420p"
        encoder.time_base = Fraction(1, fps)
        encoder.gop_size = 10**6  # one GOP per chunk
        encoder.thread_count = 1  # the bytes must not depend on the number of cores
        encoder.color_range = ColorRange.MPEG
        encoder.colorspace = Colorspace.ITU709
        encoder.color_primaries = ColorPrimaries.BT709
        encoder.color_trc = ColorTrc.BT709
        for i, frame_RW in enumerate(frames_TRW):
            frame = _frame(frame_RW)
            frame.pts, frame.time_base = i, encoder.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return sink.getvalue()


def _boxes(data: bytes | bytearray, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each box in data[start:end]. Box sizes are 32 bits: a chunk is far below 4 GiB."""
    while start < end:
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, start + size
        start += size


def _payload(data: bytearray, *path: bytes) -> int:
    """Where the payload of the first box at `path` begins."""
    start, end = 0, len(data)
    for name in path:
        start, end = next((s + 8, e) for kind, s, e in _boxes(data, start, end) if kind == name)
    return start
