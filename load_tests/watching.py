"""What a viewer sees of a video that arrives: which fragment was there when, and whether playing had to wait for it.

The stream is fragmented MP4 (ISO 14496-12): `ftyp`, `moov`, `uuid`, then for each chunk a `moof` with the table of its
frames and an `mdat` with their bytes. A fragment can be played when its `mdat` is complete.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

FPS = 24
CHUNK_S = 33 / FPS  # of playback, that one fragment holds
LARGEST_HEAD = 1 << 20  # bytes of a box that is kept to be read; longer ones that are not mdat are no head


class BrokenFile(Exception):
    """The bytes are not those of a fragmented MP4. The message says where and why."""


class FragmentReader:
    """Reads such a stream as it comes, in parts of any length. `size`: bytes so far; `frames`: of the complete
    fragments; `sha256`: of all bytes so far."""

    def __init__(self) -> None:
        self.size = 0
        self.frames = 0
        self._digest = hashlib.sha256()
        self._head = bytearray()  # of the box that is being read, as far as it is needed
        self._rest = 0  # bytes of an mdat that have not come
        self._moof: int | None = None  # frames of a fragment whose mdat has not come

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def feed(self, data: bytes) -> list[int]:
        """The frames of each fragment that these bytes complete. Raises BrokenFile."""
        self._digest.update(data)
        self.size += len(data)
        complete = []
        while data:
            if self._rest:
                taken = min(self._rest, len(data))
                self._rest -= taken
                data = data[taken:]
                if not self._rest:
                    complete.append(self._ended())
                continue
            wanted = self._box_size() if len(self._head) >= 8 else 8
            taken = min(wanted - len(self._head), len(data))
            self._head += data[:taken]
            data = data[taken:]
            if len(self._head) >= 8 and self._is_mdat():
                self._rest = self._box_size() - 8
                self._head.clear()
            elif len(self._head) >= 8 and len(self._head) == self._box_size():
                if self._head[4:8] == b"moof":
                    self._moof = frames_of(bytes(self._head))
                self._head.clear()
        return complete

    def check_whole(self) -> None:
        """Raises BrokenFile if the stream ended within a fragment, or before the first."""
        if self._head or self._rest or self._moof is not None or not self.frames:
            raise BrokenFile(f"the stream ends within a fragment, after {self.size} bytes and {self.frames} frames")

    def _box_size(self) -> int:
        (size,) = struct.unpack_from(">I", self._head)
        if size < 8 or (size > LARGEST_HEAD and not self._is_mdat()):
            kind = bytes(self._head[4:8])
            raise BrokenFile(f"a box {kind!r} of {size} bytes near byte {self.size}; allowed: 8 to {LARGEST_HEAD}")
        return int(size)

    def _is_mdat(self) -> bool:
        return self._head[4:8] == b"mdat"

    def _ended(self) -> int:
        if self._moof is None:
            raise BrokenFile(f"an mdat without its moof before byte {self.size}")
        frames, self._moof = self._moof, None
        self.frames += frames
        return frames


def frames_of(moof: bytes) -> int:
    """How many frames a fragment has: the sample count of its only track run. Raises BrokenFile."""
    box, inside = moof, (b"traf", b"trun")
    for wanted in inside:
        place = 8
        while place + 8 <= len(box) and box[place + 4 : place + 8] != wanted:
            place += max(8, struct.unpack_from(">I", box, place)[0])
        box = box[place:]
    if len(box) < 16:
        raise BrokenFile("a moof without a track run")
    return int(struct.unpack_from(">I", box, 12)[0])


@dataclass
class Playout:
    """A viewer who plays what is there at normal speed, and waits where nothing is. Times are seconds of any one clock.

    `first_at`: when the first fragment was there, and playing began; `cadence`: seconds between two successive
    fragments; `stalls`, `stall_s`: how often, and how long in all, a fragment came later than the end of what was there
    before it, or was still waited for when no more came; `shown_until`: when all that is there has been played.
    """

    first_at: float | None = None
    stalls: int = 0
    stall_s: float = 0.0
    cadence: list[float] = field(default_factory=list)
    shown_until: float = 0.0
    _last_at: float | None = None

    def arrived(self, at: float, seconds: float) -> None:
        """A fragment of so many seconds is there."""
        if self.first_at is None:
            self.first_at = at
        if self._last_at is None:  # playing begins
            self.shown_until = at
        else:
            self.cadence.append(at - self._last_at)
        if at > self.shown_until:
            self.stalls += 1
            self.stall_s += at - self.shown_until
        self.shown_until = max(at, self.shown_until) + seconds
        self._last_at = at

    def went(self) -> None:
        """The viewer has gone. If they come back, playing begins once more with the next fragment."""
        self._last_at = None

    def broke_off(self, at: float) -> None:
        """No more comes, though more was due: a viewer who is there and has nothing left to play has waited for it."""
        if self._last_at is not None and at > self.shown_until:
            self.stalls += 1
            self.stall_s += at - self.shown_until
