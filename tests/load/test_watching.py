"""A live stream as a viewer sees it: fragments out of bytes, and the clock by which they are played."""

from __future__ import annotations

import hashlib
import io

import av
import numpy as np
import pytest

from helios_core.media.fragments import encode_fragment
from load_tests.watching import BrokenFile, FragmentReader, Playout
from tests.core.media_files import i420


@pytest.fixture(scope="module")
def file() -> bytes:
    """Two fragments, of 33 and 5 frames, as the service makes them."""
    frames = np.zeros((38, 64, 64, 3), np.uint8)
    frames[:, :, :32] = np.arange(38, dtype=np.uint8)[:, None, None, None]
    first = encode_fragment(i420(frames[:33]), chunk_index=0, first_frame=0, fps=24)
    second = encode_fragment(i420(frames[33:]), chunk_index=1, first_frame=33, fps=24)
    return first.init + first.data + second.data


def test_fragments_are_the_same_wherever_the_stream_is_cut(file: bytes) -> None:
    for cut in range(len(file) + 1):
        reader = FragmentReader()
        assert reader.feed(file[:cut]) + reader.feed(file[cut:]) == [33, 5]
        reader.check_whole()
        assert (reader.frames, reader.size) == (38, len(file))
        assert reader.sha256 == hashlib.sha256(file).hexdigest()


def test_a_fragment_is_there_with_its_last_byte_and_not_before(file: bytes) -> None:
    reader = FragmentReader()
    complete = [k for k in range(len(file)) if reader.feed(file[k : k + 1])]
    second = file.rindex(b"moof") - 4
    assert complete == [second - 1, len(file) - 1]


def test_as_many_frames_are_read_as_a_decoder_finds(file: bytes) -> None:
    reader = FragmentReader()
    reader.feed(file)
    with av.open(io.BytesIO(file)) as container:
        assert reader.frames == sum(1 for _ in container.decode(video=0))


def test_a_stream_that_ends_within_a_fragment_is_broken(file: bytes) -> None:
    second = file.rindex(b"moof") - 4
    whole = {second, len(file)}
    for end in range(0, len(file), 7):
        reader = FragmentReader()
        reader.feed(file[:end])
        if end not in whole:
            with pytest.raises(BrokenFile, match=f"{end} bytes"):
                reader.check_whole()


@pytest.mark.parametrize(
    "data", [b"\0\0\0\7moov", b"\xff\0\0\0moov", b"\0\0\0\x0cmdat1234", b"\0\0\0\x10moof\0\0\0\x08mfhd"]
)
def test_what_is_no_such_file_is_told(data: bytes) -> None:
    with pytest.raises(BrokenFile):
        FragmentReader().feed(data)


def test_a_viewer_for_whom_all_comes_in_time_never_waits() -> None:
    playout = Playout()
    for at in (2.0, 2.5, 3.0, 5.5):  # due at 2, 3.375, 4.75 and 6.125
        playout.arrived(at, 1.375)
    assert (playout.first_at, playout.stalls, playout.stall_s) == (2.0, 0, 0.0)
    assert playout.cadence == [0.5, 0.5, 2.5]
    assert playout.shown_until == 2.0 + 4 * 1.375


def test_a_viewer_waits_for_what_is_late_and_plays_on_from_there() -> None:
    playout = Playout()
    for at in (1.0, 3.0, 4.0, 7.0):  # due at 1, 2, 4 and 5
        playout.arrived(at, 1.0)
    assert (playout.stalls, playout.stall_s, playout.shown_until) == (2, 1.0 + 2.0, 8.0)


def test_a_fragment_that_comes_just_as_the_last_ends_is_in_time() -> None:
    playout = Playout()
    playout.arrived(0.0, 1.0)
    playout.arrived(1.0, 1.0)
    assert playout.stalls == 0


def test_who_was_away_did_not_wait() -> None:
    playout = Playout()
    playout.arrived(1.0, 1.0)
    playout.went()
    playout.arrived(9.0, 1.0)
    playout.arrived(10.5, 1.0)
    assert (playout.first_at, playout.stalls, playout.stall_s, playout.cadence) == (1.0, 1, 0.5, [1.5])


@pytest.mark.parametrize(("at", "stalls", "stall_s"), [(1.5, 0, 0.0), (2.0, 0, 0.0), (7.0, 1, 5.0)])
def test_who_waits_for_a_fragment_that_never_comes_has_stalled(at: float, stalls: int, stall_s: float) -> None:
    playout = Playout()
    playout.arrived(1.0, 1.0)
    playout.broke_off(at)
    assert (playout.stalls, playout.stall_s) == (stalls, stall_s)


def test_who_has_gone_or_has_seen_nothing_yet_does_not_wait() -> None:
    gone, not_begun = Playout(), Playout()
    gone.arrived(1.0, 1.0)
    gone.went()
    for playout in (gone, not_begun):
        playout.broke_off(9.0)
        assert playout.stalls == 0
