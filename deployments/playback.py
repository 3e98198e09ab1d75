"""How far a viewer is who plays a video at normal speed from when it is first watched, and so how far ahead it may be
made.

Pure arithmetic: whoever asks says what time it is.
"""

from __future__ import annotations

import math

TICK_S = 1e-3  # what is less is nothing: a clock need not show that it went by


class Playback:
    """Of one video. All times are in seconds, `now` by any clock that does not go back."""

    def __init__(self, lead_s: float | None, unseen_s: float) -> None:
        """`lead_s`: so far ahead of its playback the video may be made, None: as far as it goes; `unseen_s`: as much is
        there of it that was not played."""
        self._lead_s, self._unseen_s = lead_s, unseen_s
        self._since: float | None = None  # from when on what was unseen is played

    def watched(self, now: float) -> bool:
        """Somebody watches. Whether it is the first one."""
        first = self._since is None
        if first:
            self._since = now
        return first

    def committed(self, seconds: float, now: float) -> None:
        """There is so much more of the video."""
        self._unseen_s = self.unseen(now) + seconds
        if self._since is not None:
            self._since = now

    def unseen(self, now: float) -> float:
        """How much there is of the video that was not played; never below 0: a viewer waits for what comes."""
        return max(0.0, self._unseen_s - (0.0 if self._since is None else now - self._since))

    def wait(self, begun_s: float, now: float) -> float:
        """How long the next chunk must wait, if nothing happens before; infinite if it waits for the first viewer.
        `begun_s`: how much has begun to be made and is not there yet."""
        if self._lead_s is None:
            return 0.0
        ahead = self.unseen(now) + begun_s - self._lead_s
        if ahead < TICK_S:
            return 0.0
        return math.inf if self._since is None else ahead
