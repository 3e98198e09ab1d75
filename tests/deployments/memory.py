"""What a process holds, asked of it from within. Alone in a file, as each process that is asked imports that file: the
Director must not import torch for it."""

from __future__ import annotations

import ctypes

import psutil


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def in_use(_: object) -> int:
    """Bytes that malloc has given to this process and not got back."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident(_: object) -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)
