"""How far a viewer is who plays a video at normal speed from when it is first watched: so how far ahead it may be made,
and when its next chunk is due.

Pure arithmetic: whoever asks says what time it is.
"""

from __future__ import annotations

import math

TICK_S = 1e-3  # what is less is nothing: a clock need not show that it went by


class Playback:
    """Of one video. All times are in seconds, `now` by any clock that does not go back."""

    def __init__(self, lead_s: float | None, unseen_s: float, now: float) -> None:
        """`lead_s`: so far ahead of its playback the video may be made, None: as far as it goes; `unseen_s`: as much is
        there of it that was not played; `now`: when it was accepted, or taken up again."""
        self._lead_s = lead_s
        self._unseen_s: float | None = unseen_s  # None: somebody has watched
        self._runs_out = now + unseen_s  # when all is played that is there

    def watched(self, now: float) -> bool:
        """Somebody watches. Whether it is the first one."""
        if self._unseen_s is None:
            return False
        self._runs_out = now + self._unseen_s
        self._unseen_s = None
        return True

    def committed(self, seconds: float, now: float) -> None:
        """There is so much more of the video."""
        if self._unseen_s is not None:
            self._unseen_s += seconds
        self._runs_out = max(self._runs_out, now) + seconds  # a viewer waits for what comes

    def unseen(self, now: float) -> float:
        """How much there is of the video that was not played; never below 0."""
        return max(0.0, self._runs_out - now) if self._unseen_s is None else self._unseen_s

    def deadline(self, begun_s: float) -> float:
        """When the next chunk is due: the viewer has played what is there, and `begun_s` that has begun to be made. A
        video that nobody has watched yet counts as played since it was accepted: so it shares the samplers with watched
        ones as their equal."""
        return self._runs_out + begun_s

    def wait(self, begun_s: float, now: float) -> float:
        """How long the next chunk must wait, if nothing happens before; infinite if it waits for the first viewer.
        `begun_s`: how much has begun to be made and is not there yet."""
        if self._lead_s is None:
            return 0.0
        ahead = self.unseen(now) + begun_s - self._lead_s
        if ahead < TICK_S:
            return 0.0
        return math.inf if self._unseen_s is not None else ahead
