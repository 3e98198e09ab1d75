"""Uploads: what they become, and that no upload does more than be refused. Every call here starts a real child.

`MUTATIONS=200` spoils so many of them in place of 64.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from helios_core.errors import InvalidInput
from helios_core.media.read import Clip, MediaInfo, MediaLimits, probe, read_clip, read_image
from tests.core.media_files import (
    BLUE,
    GREEN,
    RED,
    WHITE,
    animation,
    changing_size,
    header_first,
    image,
    number_in,
    oriented,
    png,
    quarters,
    sound_only,
    video,
    webm_of_hours,
    with_external_data,
    with_times,
)

LIMITS = MediaLimits()
MUTATIONS = int(os.environ.get("MUTATIONS", "64"))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[bytes], Path]:
    def save(data: bytes, name: str = "upload") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return save


def in_place_of_python(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children run the program instead of Python."""
    script = folder / "python"
    script.write_text(program)
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[float, float]]:
    """(peak resident MiB, CPU seconds) of the latest child, told by the kernel to a parent that is itself small."""
    program = f"""#!{sys.executable} -S
import os, sys
child = os.posix_spawn({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(child, 0)
with open({str(tmp_path / "figures")!r}, "w") as file:
    resident = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    file.write(f"{{resident}} {{usage.ru_utime + usage.ru_stime}}")
os._exit(os.waitstatus_to_exitcode(status) % 256)
"""
    in_place_of_python(tmp_path, program, monkeypatch)

    def latest() -> tuple[float, float]:
        resident, cpu = (tmp_path / "figures").read_text().split()
        return float(resident), float(cpu)

    return latest


def corners(picture: np.ndarray) -> list[tuple[int, ...]]:
    """Colours near the four corners, rounded to 0 or 255: left and right above, left and right below."""
    height, width = picture.shape[:2]
    points = [(y, x) for y in (height // 8, -height // 8) for x in (width // 8, -width // 8)]
    return [tuple(255 * int(value > 128) for value in picture[point]) for point in points]


# --- Images -----------------------------------------------------------------------------------------------------------

IMAGES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "PNG": ("png", lambda: image("PNG")),
    "PNG of a palette": ("png", lambda: image("PNG", quarters(64, 48).quantize(8))),
    "interlaced PNG of 16 bits": ("png", lambda: png(64, 48, 16, 2)),
    "JPEG": ("jpeg", lambda: image("JPEG", quality=95)),
    "progressive JPEG": ("jpeg", lambda: image("JPEG", quality=95, progressive=True)),
    "JPEG in CMYK": ("jpeg", lambda: image("JPEG", quarters(64, 48).convert("CMYK"), quality=95)),
    "JPEG with a gain map": ("jpeg", lambda: animation("MPO")),
    "WebP": ("webp", lambda: image("WEBP", quality=95)),
    "lossless WebP": ("webp", lambda: image("WEBP", lossless=True)),
    "WebP with metadata": ("webp", lambda: oriented(1, "WEBP")),
}


@pytest.mark.parametrize("name", IMAGES)
async def test_images_are_read_whatever_their_coding(name: str, saved: Callable[..., Path]) -> None:
    format, make = IMAGES[name]
    path = saved(make(), "upload.gif")  # a name says nothing
    assert await probe(path) == MediaInfo("image", format, 64, 48, frames=1, seconds=0.0)
    picture = await read_image(path, 32, 24)
    assert (picture.shape, picture.dtype) == ((24, 32, 3), np.uint8)
    assert corners(picture) == ([(0, 0, 0)] * 4 if "16 bits" in name else [RED, GREEN, BLUE, WHITE])


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
    ],
)
async def test_images_are_turned_as_their_exif_says(
    orientation: int, turned: list[tuple[int, ...]], saved: Callable[..., Path]
) -> None:
    path = saved(oriented(orientation, picture=quarters(64, 48)))
    info = await probe(path)
    assert (info.width, info.height) == ((64, 48) if orientation < 5 else (48, 64))
    assert corners(await read_image(path, info.width, info.height)) == turned


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
async def test_other_formats_are_turned_too(format: str, saved: Callable[..., Path]) -> None:
    path = saved(oriented(6, format))
    info = await probe(path)
    assert (info.width, info.height) == (48, 64)
    assert corners(await read_image(path, 48, 64)) == [BLUE, RED, WHITE, GREEN]


async def test_broken_exif_is_no_reason_to_refuse(saved: Callable[..., Path]) -> None:
    path = saved(image("JPEG", exif=b"Exif\0\0not a TIFF header"))
    assert (await probe(path)).width == 64
    assert corners(await read_image(path, 64, 48)) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("lossless", [None, True])
async def test_transparency_lies_over_black(lossless: bool | None, saved: Callable[..., Path]) -> None:
    picture = quarters(64, 48).convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.repeat(np.uint8([255, 0]), 32), (48, 1))))
    data = image("PNG", picture) if lossless is None else image("WEBP", picture, lossless=lossless)
    assert corners(await read_image(saved(data), 64, 48)) == [RED, (0, 0, 0), BLUE, (0, 0, 0)]
    half = image("PNG", Image.new("RGBA", (8, 8), (255, 255, 255, 128)))
    assert (await read_image(saved(half), 8, 8) == 128).all()
    keyed = image("PNG", quarters(64, 48), transparency=GREEN)
    assert corners(await read_image(saved(keyed), 64, 48)) == [RED, (0, 0, 0), BLUE, WHITE]


async def test_grey_of_16_bits_keeps_its_shades(saved: Callable[..., Path]) -> None:
    shades = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    picture = await read_image(saved(image("PNG", Image.fromarray(shades))), 64, 8)
    np.testing.assert_allclose(picture[4, :, 0], np.linspace(0, 255, 64), atol=2)


@pytest.mark.parametrize("width", [30, 300])
async def test_a_picture_covers_its_frame_and_is_cut_at_the_centre(width: int, saved: Callable[..., Path]) -> None:
    strips = np.zeros((50, 100, 3), np.uint8)
    strips[:, :25], strips[:, 25:75], strips[:, 75:] = RED, GREEN, BLUE
    inside = slice(width // 10, -(width // 10))  # at the very edge, the filter sees beyond the cut
    for picture in (strips, strips.transpose(1, 0, 2)):  # 2:1 to a square: the middle half of the long side is left
        fitted = await read_image(saved(image("PNG", Image.fromarray(picture))), width, width)
        assert (fitted[inside, inside] == GREEN).all()


async def test_a_jpeg_that_is_scaled_while_it_is_decoded_looks_the_same(saved: Callable[..., Path]) -> None:
    gradient = np.zeros((1200, 1600, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.linspace(0, 255, 1600), np.linspace(0, 255, 1200)[:, None]
    pictures = [
        await read_image(saved(image(format, Image.fromarray(gradient), **options)), 80, 60)
        for format, options in (("JPEG", {"quality": 95}), ("PNG", {}))
    ]
    np.testing.assert_allclose(pictures[0].astype(int), pictures[1], atol=4)


async def test_an_image_too_large_to_decode_in_a_probe_is_told_by_its_header(
    saved: Callable[..., Path], figures: Callable[[], tuple[float, float]]
) -> None:
    big = Image.new("RGB", (6000, 4000), RED)
    for data in (
        image("PNG", big),
        image("WEBP", big, method=0),
        image("JPEG", big, progressive=True),
        oriented(6, "WEBP", big),
    ):
        path = saved(data)
        info = await probe(path)
        assert {info.width, info.height} == {6000, 4000}
        assert figures()[0] < 60
    assert info.height == 6000  # the last is turned
    damaged = bytearray(image("PNG", big))
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        await probe(saved(bytes(damaged)))


# --- Videos -----------------------------------------------------------------------------------------------------------

VIDEOS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "H.264 in MP4": ("mp4", video),
    "H.264 in MP4, header first": ("mp4", lambda: header_first(video())),
    "H.264 in fragmented MP4": ("mp4", lambda: video(muxing={"movflags": "frag_keyframe+empty_moov"})),
    "H.264 in MOV": ("mov", lambda: video(format="mov")),
    "HEVC in MP4": ("mp4", lambda: video(codec="libx265", options={"x265-params": "log-level=none"})),
    "AV1 in MP4": ("mp4", lambda: video(codec="libsvtav1", options={"preset": "12"})),
    "AV1 in WebM": ("webm", lambda: video(codec="libsvtav1", format="webm", options={"preset": "12"})),
    "VP8 in WebM": ("webm", lambda: video(codec="libvpx", format="webm")),
    "VP9 in WebM": ("webm", lambda: video(codec="libvpx-vp9", format="webm")),
    "with sound": ("mp4", lambda: video(audio=True)),
    "with sound in WebM": ("webm", lambda: video(codec="libvpx-vp9", format="webm", audio=True)),
}


@pytest.mark.parametrize("name", VIDEOS)
async def test_24_fps_pass_frame_by_frame(name: str, saved: Callable[..., Path]) -> None:
    format, make = VIDEOS[name]
    path = saved(make(), "upload.png")
    info = await probe(path)
    assert info == MediaInfo("video", format, 96, 64, frames=36, seconds=pytest.approx(1.5, abs=0.002))
    clip = await read_clip(path, 96, 64)
    assert (clip.frames, clip.first_HWC.dtype, clip.tail_THWC.shape) == (36, np.uint8, (33, 64, 96, 3))
    assert clip.tail_THWC.flags.writeable  # torch wants that
    assert number_in(clip.first_HWC) == 0
    assert [number_in(frame) for frame in clip.tail_THWC] == list(range(3, 36))


@pytest.mark.parametrize(("frames", "tail"), [(33, 33), (65, 33), (66, 66), (132, 99), (250, 99)])
async def test_the_tail_is_up_to_three_chunks(frames: int, tail: int, saved: Callable[..., Path]) -> None:
    clip = await read_clip(saved(video(frames)), 96, 64)
    assert (clip.frames, number_in(clip.first_HWC)) == (frames, 0)
    assert [number_in(frame) for frame in clip.tail_THWC] == list(range(frames - tail, frames))


def shown_at(times: list[Fraction], end: Fraction) -> list[int]:
    """The rule, said once more: for each 24th of a second before the end, the last frame that has begun."""
    grace = Fraction(2, 1000)
    return [max(k for k, t in enumerate(times) if t <= Fraction(i, 24) + grace) for i in range(round(end * 24))]


@pytest.mark.parametrize("format", ["mp4", "webm"])
@pytest.mark.parametrize("fps", [Fraction(30), Fraction(24000, 1001), Fraction(12), Fraction(60)])
async def test_other_rates_are_resampled_by_time(fps: Fraction, format: str, saved: Callable[..., Path]) -> None:
    times = [k / fps for k in range(int(2 * fps))]
    codec = "libvpx" if format == "webm" else "libx264"
    clip = await read_clip(saved(video(times=times, fps=fps, format=format, codec=codec)), 96, 64)
    expected = shown_at([Fraction(round(t * 1000), 1000) for t in times], len(times) / fps)
    assert clip.frames == len(expected)
    assert [number_in(frame) for frame in clip.tail_THWC] == expected[-len(clip.tail_THWC) :]


async def test_a_varying_rate_is_resampled_by_time(saved: Callable[..., Path]) -> None:
    times = [Fraction(k * k, 500) for k in range(40)]  # gaps from 2 to 154 ms
    path = saved(video(times=times, options={"bf": "0"}))
    clip = await read_clip(path, 96, 64)
    expected = shown_at(times, times[-1] + Fraction(1, 24))
    assert clip.frames == (await probe(path)).frames == len(expected)
    assert [number_in(frame) for frame in clip.tail_THWC] == expected[-len(clip.tail_THWC) :]


@pytest.mark.parametrize(
    ("rotation", "turned"),
    [
        (-90, [BLUE, RED, WHITE, GREEN]),  # clockwise, as phones held upright write it
        (90, [GREEN, WHITE, RED, BLUE]),
        (180, [WHITE, BLUE, GREEN, RED]),
    ],
)
async def test_videos_are_turned_as_their_matrix_says(
    rotation: int, turned: list[tuple[int, ...]], saved: Callable[..., Path]
) -> None:
    data = video(rotation=rotation, picture=lambda i, width, height: np.array(quarters(width, height)))
    path = saved(data)
    info = await probe(path)
    assert (info.width, info.height) == ((96, 64) if rotation == 180 else (64, 96))
    clip = await read_clip(path, info.width, info.height)
    assert corners(clip.first_HWC) == corners(clip.tail_THWC[-1]) == turned


@pytest.mark.parametrize("colours", [(1, 1), (1, 2), (5, 1), (5, 2)])  # BT.709 or BT.601, in TV or full range
async def test_colours_survive_whatever_they_are_coded_in(colours: tuple[int, int], saved: Callable[..., Path]) -> None:
    orange = (200, 120, 40)
    data = video(colours=colours, picture=lambda i, width, height: np.full((height, width, 3), orange, np.uint8))
    clip = await read_clip(saved(data), 96, 64)
    np.testing.assert_allclose(clip.first_HWC.reshape(-1, 3).mean(axis=0), orange, atol=3)


async def test_a_clip_cut_by_an_edit_list_begins_at_its_cut(saved: Callable[..., Path]) -> None:
    path = saved(video(60, options={"bf": "0"}, starts_at=Fraction(10, 24)))
    assert (await probe(path)).frames == 50
    clip = await read_clip(path, 96, 64)
    assert (clip.frames, number_in(clip.first_HWC), number_in(clip.tail_THWC[-1])) == (50, 10, 59)


async def test_a_long_clip_is_read_in_little_memory(
    saved: Callable[..., Path], figures: Callable[[], tuple[float, float]]
) -> None:
    path = saved(video(800, options={"preset": "ultrafast"}))
    clip = await read_clip(path, 640, 384)
    assert isinstance(clip, Clip)
    assert clip.frames == 800
    assert figures()[0] < 60  # 99 frames alone are 70 MiB


# --- Refusals ---------------------------------------------------------------------------------------------------------


def scan_bomb() -> bytes:
    data = image("JPEG", Image.new("L", (3000, 3000), 128), progressive=True)
    scan = data.rindex(b"\xff\xda")
    return data[:scan] + 20_000 * data[scan:-2] + data[-2:]


ABSURD = [*(Fraction(k, 24) for k in range(40)), Fraction(100_000)]
SMOOTH = {"bf": "0"}

# name ▸ (what to make, what the refusal says)
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "an empty file"),
    "GIF": (lambda: animation("GIF"), "a GIF image"),
    "TIFF": (lambda: image("TIFF"), "a TIFF image"),
    "JPEG 2000": (lambda: image("JPEG2000"), "a JPEG 2000 image"),
    "FITS": (lambda: b"SIMPLE  =                    T".ljust(2880), "a file that begins with"),
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a file that begins with"),
    "AVIF": (lambda: image("AVIF"), "a HEIF or AVIF image"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG image"),
    "text": (lambda: b"hello", "a file that begins with b'hello'"),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "a playlist"),
    "concat script": (lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n", "a playlist"),
    "Matroska": (lambda: video(format="matroska"), "a Matroska video that is not WebM"),
    "truncated PNG": (lambda: image("PNG")[:120], "cannot be decoded"),
    "truncated JPEG": (lambda: image("JPEG", quarters(640, 480))[:3000], "cannot be decoded: .*truncated"),
    "truncated WebP": (lambda: image("WEBP")[:100], "a truncated WebP image"),
    "animated PNG": (lambda: animation("PNG"), r"an animated image \(png\)"),
    "animated WebP": (lambda: animation("WEBP"), r"an animated image \(webp\)"),
    "animated PNG of 10,000 pictures": (
        lambda: animation("PNG").replace(b"acTL\0\0\0\3", b"acTL\0\0\x27\x10"),
        "an animated image|cannot be decoded",
    ),
    "PNG without pixels": (lambda: png(0, 10, pixels=b""), "cannot be decoded"),
    "WebP without a picture": (lambda: b"RIFF\x04\0\0\0WEBP", "an image of 0x0 pixels"),
    "WebP of empty chunks": (
        lambda: b"RIFF" + (4 + 8 * 10**6).to_bytes(4, "little") + b"WEBP" + b"JUNK\0\0\0\0" * 10**6,
        "an image of 0x0 pixels",
    ),
    "JPEG of 20,000 scans": (scan_bomb, "of more than 100 scans"),
    "palette PNG with too much transparency": (
        lambda: png(16, 16, 4, 3, more=[(b"PLTE", bytes(48)), (b"tRNS", b"\x80" * 300)]),
        "cannot be decoded",
    ),
    "PNG bomb": (lambda: png(30_000, 30_000), "an image of 30000x30000 pixels"),
    "PNG that claims more than it has": (lambda: png(3000, 3000, 8, 2, pixels=bytes(100)), "truncated"),
    "WebP that claims 16383x16383": (
        lambda: b"RIFF\x1e\0\0\0WEBPVP8 \x0a\0\0\0" + b"\x30\x01\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(8),
        "an image of 16383x16383 pixels",
    ),
    "sound": (sound_only, "without a video stream"),
    "codec": (lambda: video(codec="mpeg4"), "of the codec mpeg4"),
    "32 frames": (lambda: video(32), r"a video of 32 frames at 24 fps \(1.33 s\)"),
    "1 s at 60 fps": (lambda: video(60, fps=60), "a video of 24 frames at 24 fps"),
    "MP4 without its end": (lambda: video()[:1500], "cannot be decoded"),
    "MP4 without its last frames": (lambda: header_first(video())[:-300], "damaged or missing packets"),
    "WebM without its end": (lambda: video(codec="libvpx", format="webm")[:-300], r"a truncated video \(webm\)"),
    "10 hours": (lambda: with_times(video(options=SMOOTH), 12288 * 1000), "a video of 1000.0 s or more"),
    "10 hours in WebM": (
        lambda: webm_of_hours(video(codec="libvpx", format="webm"), 10),
        "a video of 36000.0 s or more",
    ),
    "no time": (lambda: with_times(video(options=SMOOTH), 0), "a video of 1 frames"),
    "absurd times": (lambda: video(times=ABSURD), "a video of 100000.0 s"),
    "absurd times in WebM": (lambda: video(times=ABSURD, codec="libvpx", format="webm"), "a video of 100000.0 s"),
    "a million frames": (lambda: with_times(video(options=SMOOTH), 1, 10**6), "a video of 1000000 or more frames"),
    "a billion frames": (lambda: with_times(video(options=SMOOTH), 1, 10**9), "a video of 1000000000 or more"),
    "a million empty frames": (lambda: with_times(video(options=SMOOTH), 1, 10**6, 0), "1000000 or more frames"),
    "8k": (lambda: video(1, size=(7680, 4320), options={"preset": "ultrafast"}), "a video of 7680x4320 pixels"),
    "size change": (changing_size, "changes from 96x64 to 64x96 pixels"),
    "size change in VP9": (lambda: changing_size(codec="libvpx-vp9"), "changes from 96x64 to 64x96 pixels"),
    "size change in MP4": (lambda: changing_size("mp4", "libx264"), "changes from 96x64 to 64x96 pixels"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_is_not_a_good_upload_is_refused_by_name(
    name: str, saved: Callable[..., Path], figures: Callable[[], tuple[float, float]]
) -> None:
    make, message = HOSTILE[name]
    path = saved(make(), "upload.mp4")
    with pytest.raises(InvalidInput, match=message) as refusal:
        await probe(path)
    assert refusal.value.field == "input_reference"
    resident, cpu = figures()
    assert resident < 150  # MiB
    assert cpu < 1  # seconds; wall time is that of the machine
    with pytest.raises(InvalidInput):
        await read_clip(path, 96, 64)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("PNG", lambda: png(6000, 3000, 8, 6)),
        ("baseline JPEG", lambda: image("JPEG", Image.new("RGB", (8000, 5000), RED))),
        ("progressive JPEG", lambda: image("JPEG", Image.new("CMYK", (3600, 2800)), progressive=True, subsampling=0)),
        ("WebP", lambda: image("WEBP", Image.new("RGB", (2400, 1900), RED), method=0)),
        ("4K", lambda: video(40, size=(4096, 2304), options={"preset": "ultrafast", "bf": "8", "refs": "16"})),
    ],
)
async def test_the_largest_uploads_are_probed_in_little_memory(
    name: str,
    make: Callable[[], bytes],
    saved: Callable[..., Path],
    figures: Callable[[], tuple[float, float]],
) -> None:
    await probe(saved(make()))
    resident, cpu = figures()
    assert resident < 150
    assert cpu < 1


async def test_a_size_that_changes_and_changes_back_is_found_when_the_clip_is_read(saved: Callable[..., Path]) -> None:
    path = saved(changing_size(back=True))
    assert (await probe(path)).frames == 72
    with pytest.raises(InvalidInput, match="changes from 96x64 to 64x96"):
        await read_clip(path, 96, 64)


async def test_damage_between_key_frames_is_found_when_the_clip_is_read(saved: Callable[..., Path]) -> None:
    data = bytearray(video(48, options={"bf": "0", "g": "24"}))
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path = saved(bytes(data))
    assert (await probe(path)).frames == 48
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        await read_clip(path, 96, 64)


async def test_a_file_of_the_wrong_kind_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(InvalidInput, match=r"video \(mp4\).*allowed: an image"):
        await read_image(saved(video()), 96, 64)
    with pytest.raises(InvalidInput, match=r"image \(png\).*allowed: a video"):
        await read_clip(saved(image("PNG")), 96, 64)


async def test_limits_are_those_of_the_caller(saved: Callable[..., Path]) -> None:
    for data, limits in (
        (image("PNG"), replace(LIMITS, max_bytes=50)),
        (image("PNG"), replace(LIMITS, max_pixels=64 * 48 - 1)),
        (image("PNG"), replace(LIMITS, max_side=63)),
        (video(), replace(LIMITS, max_video_pixels=96 * 64 - 1)),
        (video(), replace(LIMITS, max_video_seconds=1.4)),
        (video(), replace(LIMITS, max_video_frames=35)),
    ):
        path = saved(data)
        await probe(path)
        with pytest.raises(InvalidInput):
            await probe(path, limits)


async def test_a_file_that_is_missing_is_not_the_uploads_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await probe(tmp_path / "nothing")


# --- The child --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "make", "wanted"),
    [
        ("probe", lambda: image("PNG"), {"PIL"}),
        ("image", lambda: image("PNG"), {"PIL"}),
        ("probe", video, {"av"}),
        ("clip", video, {"av", "PIL"}),
    ],
)
def test_a_child_imports_only_what_its_order_needs(
    task: str, make: Callable[[], bytes], wanted: set[str], saved: Callable[..., Path]
) -> None:
    order = json.dumps({"task": task, "size": (96, 64), "limits": asdict(LIMITS)})
    command = [sys.executable, "-X", "importtime", "-m", "helios_core.media.decode", order]
    with saved(make()).open("rb") as upload:
        child = subprocess.run(command, stdin=upload, capture_output=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in child.stderr.decode().splitlines()}
    assert imported & {"PIL", "av", "numpy", "asyncio"} == wanted


async def test_nothing_but_the_upload_is_opened(tmp_path: Path, saved: Callable[..., Path]) -> None:
    trap = tmp_path / "trap"
    os.mkfifo(trap)  # who opens it waits for a writer, in vain
    path = saved(with_external_data(video(), f"file://{trap}"))
    begin = time.monotonic()
    try:
        await probe(path)
        await read_clip(path, 96, 64)
    except InvalidInput as error:
        assert "takes too much" not in str(error)
    assert time.monotonic() - begin < LIMITS.probe_seconds


async def test_the_child_sees_no_environment(
    tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOS_KEY", "secret")
    in_place_of_python(tmp_path, f"#!{sys.executable}\nimport os\nraise SystemExit(','.join(os.environ))", monkeypatch)
    with pytest.raises(RuntimeError) as failure:
        await probe(saved(image("PNG")))
    names = set(str(failure.value).splitlines()[-1].split(","))
    assert names - {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"} == {"PYTHONPATH"}  # Python and macOS may set the others


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data")
async def test_too_much_memory_is_refused(saved: Callable[..., Path]) -> None:
    path = saved(png(4000, 4000, 8, 6))
    with pytest.raises(InvalidInput, match="takes too much to read: more memory"):
        await read_image(path, 96, 64, replace(LIMITS, read_data=40 * 2**20))


async def test_too_much_time_is_refused_and_leaves_no_process(saved: Callable[..., Path]) -> None:
    path = saved(video(200, size=(1280, 720), options={"preset": "ultrafast"}))
    with pytest.raises(InvalidInput, match=r"takes too much to read: more than 0\.3 s"):
        await read_clip(path, 640, 384, replace(LIMITS, read_seconds=0.3))
    assert psutil.Process().children() == []


async def test_a_cancelled_call_leaves_no_process(saved: Callable[..., Path]) -> None:
    path = saved(video(200, size=(1280, 720), options={"preset": "ultrafast"}))
    reading = asyncio.create_task(read_clip(path, 640, 384))
    await asyncio.sleep(0.3)
    assert len(psutil.Process().children()) == 1
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert psutil.Process().children() == []


async def test_a_crash_is_the_uploads_fault(
    tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_python(tmp_path, "#!/bin/sh\nkill -SEGV $$", monkeypatch)
    with pytest.raises(InvalidInput, match="takes too much to read: the decoder was ended by SIGSEGV"):
        await probe(saved(image("PNG")))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
async def test_a_full_disk_is_not_the_uploads_fault(
    tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_python(tmp_path, f'#!/bin/sh\nexec {sys.executable} "$@" >/dev/full', monkeypatch)
    with pytest.raises(RuntimeError, match="No space left on device"):
        await read_clip(saved(video()), 96, 64)


async def test_a_bug_is_ours(tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_python(tmp_path, "#!/bin/sh\necho 'IndexError: boom' >&2; exit 1", monkeypatch)
    with pytest.raises(RuntimeError, match="ended with code 1:\nIndexError: boom"):
        await probe(saved(image("PNG")))


# --- Mutations --------------------------------------------------------------------------------------------------------


def mutations(count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    files = [
        image("PNG"),
        image("JPEG", quality=50),
        image("WEBP"),
        oriented(6),
        video(options={"g": "12"}),
        video(format="mov", rotation=90),
        video(codec="libvpx", format="webm"),
        video(codec="libvpx-vp9", format="webm"),
    ]
    for i in range(count):
        data = bytearray(files[i % len(files)])
        for _ in range(rng.choice((1, 3, 20))):
            match rng.choice(("flip", "flip", "flip", "cut", "double")):
                case "flip":
                    # Half of them near an end, where headers are.
                    at = rng.choice((rng.randrange(len(data)), rng.randrange(12, 200), -rng.randrange(1, 900)))
                    data[at % len(data)] ^= 1 << rng.randrange(8)
                case "cut":
                    at = rng.randrange(len(data))
                    del data[at : at + rng.randrange(1, 1 + len(data) // 4)]
                case "double":
                    at = rng.randrange(len(data))
                    data[at:at] = data[at : at + rng.randrange(1, 1 + len(data) // 4)]
            data = data or bytearray(b"\0")
        yield bytes(data)


async def test_mutations_are_read_or_refused(tmp_path: Path) -> None:
    two = asyncio.Semaphore(2)
    read = refused = 0

    async def check(i: int, data: bytes) -> None:
        nonlocal read, refused
        path = tmp_path / str(i)
        path.write_bytes(data)
        async with two:
            begin = time.monotonic()
            try:
                info = await probe(path)
                await (read_image if info.kind == "image" else read_clip)(path, 96, 64)
                read += 1
            except InvalidInput:
                refused += 1
            assert time.monotonic() - begin < 2 * LIMITS.probe_seconds  # two calls

    await asyncio.gather(*(check(i, data) for i, data in enumerate(mutations(MUTATIONS))))
    assert min(read, refused) > MUTATIONS / 10  # they are neither all harmless nor all hopeless


async def test_what_a_probe_lets_through_is_still_refused(saved: Callable[[bytes], Path]) -> None:
    """A palette image without a palette: its pixels can be decoded, and mean nothing."""
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        await read_image(saved(png(16, 16, 8, 3)), 32, 32)


async def test_what_a_phone_puts_behind_a_jpeg_is_no_part_of_it(saved: Callable[[bytes], Path]) -> None:
    """Motion photos have a video there, in which every sequence of bytes occurs."""
    assert (await probe(saved(image("JPEG") + b"\xff\xda" * 1000))).format == "jpeg"
