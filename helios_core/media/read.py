"""An uploaded image or video ▸ what it is (`probe`), or its frames (`read_image`, `read_clip`).

An upload is hostile until it has been decoded, and decoders are large C libraries. So they run in a child process
(`decode.py`) that has the open file as its standard input, no environment, and limits on time, files and, on Linux,
memory. Whatever becomes of the child, its caller sees a result or one InvalidInput. A file's type is what its first
bytes say, whatever its name says.
"""

# T = frames, H = height, W = width, C = red, green, blue

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from helios_core.errors import InvalidInput
from helios_core.media.upload import DEFAULT_LIMITS, FIELD, TAIL_CHUNKS, MediaInfo, MediaLimits, too_much

__all__ = [
    "DEFAULT_LIMITS",
    "FIELD",
    "TAIL_CHUNKS",
    "Clip",
    "MediaInfo",
    "MediaLimits",
    "probe",
    "read_clip",
    "read_image",
]


@dataclass(frozen=True)
class Clip:
    """What a video contributes to one that goes on from it. RGB, uint8.

    `first_HWC`: its frame 0, [H, W, 3]; `tail_THWC`: its last 33 * min(frames // 33, 3) frames, [T, H, W, 3];
    `frames`: how many it has at 24 fps.
    """

    first_HWC: npt.NDArray[np.uint8]
    tail_THWC: npt.NDArray[np.uint8]
    frames: int


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
    seconds, _ = limits.shares(order["task"])
    command = [sys.executable, "-P", "-m", "helios_core.media.decode", json.dumps({**order, "limits": asdict(limits)})]
    # No environment, as keys may be in it; only the packages that we see.
    env = {"PYTHONPATH": os.pathsep.join([_PACKAGES, *filter(None, sys.path)])}
    with _child_files(path) as (upload, answer, complaint):
        child = await asyncio.create_subprocess_exec(*command, stdin=upload, stdout=answer, stderr=complaint, env=env)
        try:
            code = await asyncio.wait_for(child.wait(), seconds)
        except TimeoutError:
            raise too_much(f"more than {seconds:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if code < 0:
            raise too_much(f"the decoder was ended by {signal.Signals(-code).name}")
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
def _child_files(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes], IO[bytes]]]:
    """The child's standard files. It answers into a file: nobody has to read along, and pixels are not copied again."""
    with open(path, "rb") as upload, TemporaryFile() as answer, TemporaryFile() as complaint:
        yield upload, answer, complaint
