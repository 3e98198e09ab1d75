"""Videos, in the child: an MP4, MOV or WebM file ▸ what it is (`probe`), or its frame 0 and its end (`read`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
from av.stream import Discard, Disposition
from av.video.reformatter import Colorspace

from helios_core.config import CHUNK_FRAMES, NATIVE_FPS
from helios_core.errors import InvalidInput
from helios_core.media.upload import FIELD, TAIL_CHUNKS, MediaInfo, MediaLimits, Upload, damaged

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


def probe(upload: Upload) -> MediaInfo:
    with _opened_video(upload) as (container, stream):
        timeline = _timeline(container, stream, upload.limits)
        pictures = []
        for key in timeline.keys:
            # Flushed out at once, as a decoder that waits to reorder holds up to 16 large frames; and in a packet of
            # its own, as frames that an edit list cuts off would not come out.
            pictures += [*stream.codec_context.decode(av.Packet(key)), *stream.codec_context.decode(None)]
            stream.codec_context.flush_buffers()
    if not pictures:
        raise damaged("a video whose key frames cannot be decoded")
    size = None
    for picture in pictures:
        size = _same_size(picture, size, upload.limits)
    width, height = pictures[0].width, pictures[0].height
    if _turn_of(pictures[0]) >= 5:
        width, height = height, width
    return MediaInfo("video", upload.format, width, height, timeline.frames, float(timeline.seconds))


def read(upload: Upload, size: tuple[int, int]) -> tuple[int, Iterator[bytes]]:
    """(number of frames, the RGB bytes of frame 0 and of each frame of the tail, fitted into (width, height))."""
    with _opened_video(upload) as (container, stream):
        timeline = _timeline(container, stream, upload.limits)
    return timeline.frames, _first_and_tail(upload, size, timeline)


def _first_and_tail(upload: Upload, size: tuple[int, int], timeline: _Timeline) -> Iterator[bytes]:
    """One picture is held, however long the video."""
    tail = timeline.frames - CHUNK_FRAMES * min(timeline.frames // CHUNK_FRAMES, TAIL_CHUNKS)
    fitted, pixels = None, b""
    with _opened_video(upload) as (container, stream):
        for i, frame in _at_native_fps(_decoded(container, stream, upload.limits), timeline):
            if i == 0 or i >= tail:
                if frame is not fitted:
                    fitted, pixels = frame, _fit(frame, size)
                yield pixels
            if i == tail == 0:
                yield pixels


@contextmanager
def _opened_video(upload: Upload) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first video stream; what FFmpeg complains about in the body is InvalidInput."""
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
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, TypeError) as error:  # PyAV's, over odd numbers
        raise damaged(f"a video ({format}) that cannot be decoded: {error}") from error


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
        raise damaged("a truncated video (webm)")


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
            raise damaged("a video with damaged or missing packets")
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
        raise damaged("a video without frames")
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
                raise damaged("a video whose frames are not those of its packets")
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
        raise damaged("a video without frames that can be decoded")
    for rest in range(i, timeline.frames):
        yield rest, shown


def _same_size(frame: av.VideoFrame, size: tuple[int, int] | None, limits: MediaLimits) -> tuple[int, int]:
    """The frame's size, which must be `size` if that is known."""
    _check_video(limits, 1, 0, frame.width, frame.height)
    if size is not None and size != (frame.width, frame.height):
        found = f"a video that changes from {size[0]}x{size[1]} to {frame.width}x{frame.height} pixels"
        raise InvalidInput(FIELD, found, "a video of one size")
    return frame.width, frame.height


def _fit(frame: av.VideoFrame, size: tuple[int, int]) -> bytes:
    """The frame's RGB bytes at (width, height), turned."""
    # A probe starts sooner without Pillow.
    from PIL import Image

    from helios_core.media import decode_image

    # 2 is "unspecified". Players take such a video for BT.709 if it is HD, for BT.601 if not; FFmpeg for BT.601.
    untagged_hd = frame.colorspace == 2 and min(frame.width, frame.height) >= 720
    rgb = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709 if untagged_hd else None, threads=1)
    plane = rgb.planes[0]
    picture = Image.frombuffer("RGB", (frame.width, frame.height), plane, "raw", "RGB", plane.line_size, 1)
    return decode_image.fit(picture, size, _turn_of(frame))


def _turn_of(frame: av.VideoFrame) -> int:
    """The frame's rotation as an EXIF orientation. PyAV counts degrees counter-clockwise; odd angles are left alone."""
    return {-90: 6, 90: 8, 180: 3, -180: 3}.get(frame.rotation, 1)
