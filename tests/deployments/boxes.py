"""MP4 boxes as they come out of a stream."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator


def read_boxes(read: Callable[[int], bytes]) -> Iterator[tuple[str, bytes]]:
    """(type, the whole box) for each box that `read(n)` (exactly n bytes, fewer only at the end) gives."""
    while head := read(8):
        size, kind = struct.unpack(">I4s", head)
        yield kind.decode(), head + read(size - 8)


def reader(parts: Iterable[bytes]) -> Callable[[int], bytes]:
    """A `read(n)` over an iterator of byte strings."""
    held, rest = bytearray(), iter(parts)

    def read(n: int) -> bytes:
        while len(held) < n and (part := next(rest, None)) is not None:
            held.extend(part)
        out = bytes(held[:n])
        del held[:n]
        return out

    return read
