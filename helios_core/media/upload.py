"""What both programs that read an upload say: its limits, what it is, and how it is refused.

`read.py` is the parent, `decode.py` the child, which starts in 60 to 100 ms: so nothing here imports numpy or asyncio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from helios_core.errors import InvalidInput

FIELD = "input_reference"  # the request's field that refusals speak of
TAIL_CHUNKS = 3  # as much of a video's end as the history can hold: 27 latent frames for its 19
MiB = 2**20


@dataclass(frozen=True)
class MediaLimits:
    """The largest upload that is accepted, and what a child process may take to find that out.

    Sides and pixels are of one picture, seconds are wall time. `*_data` is what a child may allocate, in bytes; the
    code of its libraries comes on top, about 30 MiB that no upload can change. This one is Linux's: macOS would count
    what a process shares with all others too, so it is not set there.
    """

    max_bytes: int = 64 * MiB
    max_pixels: int = 40_000_000  # of an image
    max_side: int = 16384
    max_video_pixels: int = 4096 * 2304
    max_video_seconds: float = 60.0
    max_video_frames: int = 60 * 120
    probe_seconds: float = 5.0
    probe_data: int = 110 * MiB
    read_seconds: float = 300.0
    read_data: int = 1024 * MiB

    def shares(self, task: str) -> tuple[float, int]:
        """(seconds, bytes of data) that a child may take for a task."""
        return (self.probe_seconds, self.probe_data) if task == "probe" else (self.read_seconds, self.read_data)


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
class Upload:
    """An open upload whose type is known. `kind` and `format` are those of MediaInfo."""

    file: BinaryIO
    kind: str
    format: str
    limits: MediaLimits


def too_much(found: str) -> InvalidInput:
    return InvalidInput(FIELD, f"a file that takes too much to read: {found}", "a smaller or simpler file")


def damaged(found: str) -> InvalidInput:
    return InvalidInput(FIELD, found, "a whole, undamaged file")
