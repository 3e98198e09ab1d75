"""Fragments as a player sees them: decoded with PyAV, and box by box where a player would not notice."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from helios_core.errors import MediaError
from helios_core.media.fragments import Fragment, encode_fragment, encode_jpeg
from tests.core.media_files import i420

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 64, 96
BITS, CELL = 12, 8  # a frame's number is written as 12 black or white cells of 8 pixels in its top row


def numbered(first: int, count: int) -> npt.NDArray[np.uint8]:
    """Moving texture with each frame's number burnt in: [count, 64, 96, 3]."""
    rng = np.random.default_rng(0)
    texture = rng.integers(60, 200, (HEIGHT, WIDTH, 3), np.uint8)
    frames = np.stack([np.roll(texture, first + i, axis=1) for i in range(count)])
    for i in range(count):
        for bit in range(BITS):
            frames[i, :CELL, bit * CELL : (bit + 1) * CELL] = 255 * ((first + i) >> bit & 1)
    return frames


def number_in(picture: npt.NDArray[np.uint8]) -> int:
    cells = picture[:CELL, : BITS * CELL].reshape(CELL, BITS, CELL, 3).mean(axis=(0, 2, 3))
    return sum(int(cell > 128) << bit for bit, cell in enumerate(cells))


def encode_video(lengths: tuple[int, ...], fps: int) -> list[Fragment]:
    starts = np.cumsum((0, *lengths)).tolist()
    return [
        encode_fragment(i420(numbered(start, count)), chunk_index=k, first_frame=start, fps=fps)
        for k, (start, count) in enumerate(zip(starts, lengths, strict=False))
    ]


def decode(file: bytes) -> list[av.VideoFrame]:
    """All frames; anything that libav has to say about the file above the level of a warning is an error."""
    with av.logging.Capture() as log, av.open(io.BytesIO(file)) as container:
        frames = list(container.decode(video=0))
    assert [message for level, _, message in log if level <= av.logging.WARNING] == []
    return frames


def payload(data: bytes, *path: str) -> bytes:
    """The payload of the first box at `path`; the layout is walked here once more, on purpose."""
    for name in path:
        offset = 0
        while data[offset + 4 : offset + 8] != name.encode():
            offset += int.from_bytes(data[offset : offset + 4])
        data = data[offset + 8 : offset + int.from_bytes(data[offset : offset + 4])]
    return data


@pytest.fixture(autouse=True)
def libav_log() -> object:
    """PyAV is silent unless it is asked."""
    av.logging.set_level(av.logging.WARNING)
    yield
    av.logging.set_level(None)


@pytest.mark.parametrize("fps", [24, 30])
def test_fragments_join_to_one_video_with_exact_times(fps: int) -> None:
    fragments = encode_video((33, 33, 33, 20), fps)
    frames = decode(fragments[0].init + b"".join(fragment.data for fragment in fragments))
    assert [fragment.frames for fragment in fragments] == [33, 33, 33, 20]
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(i, fps) for i in range(119)]
    assert [number_in(frame.to_ndarray(format="rgb24")) for frame in frames] == list(range(119))


def test_each_fragment_starts_with_its_only_key_frame() -> None:
    fragments = encode_video((33, 33), 24)
    frames = decode(fragments[0].init + fragments[0].data + fragments[1].data)
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 33]


def test_a_fragment_plays_without_those_before_it() -> None:
    fragments = encode_video((33, 33, 7), 24)
    frames = decode(fragments[0].init + fragments[2].data)
    assert [number_in(frame.to_ndarray(format="rgb24")) for frame in frames] == list(range(66, 73))
    assert frames[0].pts * frames[0].time_base == Fraction(66, 24)


def test_init_is_the_same_for_every_fragment_of_a_video() -> None:
    fragments = encode_video((33, 33, 1), 24)
    assert len({fragment.init for fragment in fragments}) == 1


def test_a_file_is_an_init_segment_one_moof_and_one_mdat_and_nothing_else() -> None:
    (fragment,) = encode_video((5,), 24)
    kinds, offset = [], 0
    file = fragment.init + fragment.data
    while offset < len(file):
        size, kind = struct.unpack_from(">I4s", file, offset)
        kinds.append(kind)
        offset += size
    assert kinds == [b"ftyp", b"moov", b"uuid", b"moof", b"mdat"]


def test_a_fragment_depends_on_nothing_but_its_own_frames() -> None:
    in_sequence = encode_video((33, 33, 12), 24)[2]
    alone = encode_fragment(i420(numbered(66, 12)), chunk_index=2, first_frame=66, fps=24)
    assert alone == in_sequence


def test_bytes_do_not_depend_on_what_lay_in_memory() -> None:
    rng, frames = np.random.default_rng(0), i420(numbered(66, 12))
    made = set()
    for _ in range(300):
        dirt = [rng.bytes(int(rng.integers(1_000, 400_000))) for _ in range(3)]
        made.add(encode_fragment(frames, chunk_index=2, first_frame=66, fps=24))
        del dirt
    assert len(made) == 1


def test_frames_need_not_be_contiguous() -> None:
    frames = i420(numbered(0, 3))
    permuted = np.ascontiguousarray(frames.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert not permuted.flags.c_contiguous
    assert encode_fragment(permuted, chunk_index=0, first_frame=0, fps=24) == encode_fragment(
        frames, chunk_index=0, first_frame=0, fps=24
    )


def test_two_processes_make_the_same_bytes() -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from helios_core.media.fragments import encode_fragment\n"
        "frames = np.random.default_rng(7).integers(0, 256, (33, 96, 96), np.uint8)\n"
        "f = encode_fragment(frames, chunk_index=4, first_frame=132, fps=24)\n"
        "raise SystemExit(hashlib.sha256(f.init + f.data).hexdigest())"  # goes to stderr
    )
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    frames = np.random.default_rng(7).integers(0, 256, (33, 96, 96), np.uint8)
    fragment = encode_fragment(frames, chunk_index=4, first_frame=132, fps=24)
    assert other.stderr.strip() == hashlib.sha256(fragment.init + fragment.data).hexdigest()


def test_the_encoder_uses_one_thread_at_any_size() -> None:
    """More of them would make the bytes depend on the number of cores; x264 writes its settings into each chunk."""
    frames = np.zeros((1, 576, 640), np.uint8)  # large enough for x264 to want more
    assert b" threads=1 " in encode_fragment(frames, chunk_index=0, first_frame=0, fps=24).data


def test_sequence_number_and_decode_time_of_a_long_video() -> None:
    first_frame = 2**32 // 512 + 5  # its decode time does not fit in 32 bits
    fragment = encode_fragment(i420(numbered(0, 2)), chunk_index=254_201, first_frame=first_frame, fps=24)
    assert payload(fragment.data, "moof", "mfhd") == struct.pack(">II", 0, 254_202)
    assert payload(fragment.data, "moof", "traf", "tfdt") == struct.pack(">B3xQ", 1, first_frame * 512)
    frames = decode(fragment.init + fragment.data)
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(first_frame + i, 24) for i in range(2)]


def test_colours_are_bt709_in_tv_range_and_say_so() -> None:
    green = np.full((3, HEIGHT, WIDTH, 3), (0, 255, 0), np.uint8)
    fragment = encode_fragment(i420(green), chunk_index=0, first_frame=0, fps=24)
    for frame in decode(fragment.init + fragment.data):
        assert (frame.colorspace, frame.color_range) == (1, 1)  # bt709, tv
        assert (frame.color_primaries, frame.color_trc) == (1, 1)  # bt709 both
        planes = frame.to_ndarray()  # [H * 3 / 2, W]: Y, then U and V, each at a quarter of the size
        y, u, v = np.split(planes.ravel(), [HEIGHT * WIDTH, HEIGHT * WIDTH * 5 // 4])
        np.testing.assert_allclose([y.mean(), u.mean(), v.mean()], [173, 42, 26], atol=1)


def test_a_thumbnail_has_the_colours_of_its_frame() -> None:
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (40, 90, 200)], np.uint8)
    frame = np.repeat(colours, 32, axis=0)[None, None].repeat(64, axis=1)  # stripes: [1, 64, 160, 3]
    with Image.open(io.BytesIO(encode_jpeg(i420(frame)[0]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (160, 64))
        shown = np.asarray(picture)[32, 16::32]
    np.testing.assert_allclose(shown, colours, atol=4)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 96, 64), np.float32), "frames are float32; allowed: uint8"),
        (np.zeros((96, 64), np.uint8), r"shape \(96, 64\); allowed: \[T, H \* 3 / 2, W\]"),
        (np.zeros((2, 64, 64, 3), np.uint8), r"shape \(2, 64, 64, 3\)"),
        (np.zeros((2, 64, 64), np.uint8), r"shape \(2, 64, 64\)"),
        (np.zeros((0, 96, 64), np.uint8), r"shape \(0, 96, 64\); .* with T >= 1"),
        (np.zeros((2, 96, 63), np.uint8), "frames are 63x64; allowed: even sides"),
        (np.zeros((2, 0, 64), np.uint8), "frames are 64x0; allowed: even sides"),
        (np.zeros((1, 3, 16386), np.uint8), r"frames of shape \(1, 3, 16386\): .*libx264"),  # x264 ends at 16384
    ],
)
def test_what_is_not_a_video_is_refused_by_name(frames: npt.NDArray[np.uint8], message: str) -> None:
    with pytest.raises(MediaError, match=f"^fragment 6: .*{message}"):
        encode_fragment(frames, chunk_index=6, first_frame=198, fps=24)
