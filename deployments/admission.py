"""How many videos come in, and when they may expect to be made: as many as there is room for, and of each owner as
many as their key's quota allows."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping

from deployments.config import AdmissionSettings, Quota
from deployments.records import VideoRequestRecord
from deployments.retention import DAY_S
from deployments.scheduling import forecast, has_room
from deployments.store import Store, created_at
from deployments.turns import Turns
from helios_core.config import NATIVE_FPS
from helios_core.errors import HeliosError, InvalidInput

NOBODY_KNOWS = (math.inf, math.inf)
UNKNOWN_S = 5.0  # in place of what nobody knows, as of videos before any chunk was made
NEWEST = 0.2  # how much the newest chunk counts in what one takes
FORECAST_S = 0.25  # so old a forecast may be, as many may ask
LONGEST_S = 3600.0  # nobody is told to wait for longer


class TooMany(HeliosError):
    """More than there is room for, or than a key may ask for. `after_s`: by then it may be otherwise."""

    code = "too_many_requests"

    def __init__(self, message: str, after_s: float) -> None:
        super().__init__(message, after_s)
        self.message, self.after_s = message, after_s

    def __str__(self) -> str:
        return f"{self.message}; try again in {self.retry_after} s"

    @property
    def retry_after(self) -> int:
        """Whole seconds, at least 1."""
        return max(1, math.ceil(min(self.after_s, LONGEST_S)))


class Room:
    """The videos of one model: those that take turns on its samplers, and those that wait until one of them ends."""

    def __init__(self, samplers: Callable[[], int], videos_per_sampler: int) -> None:
        """`samplers`: how many there are, at least 1."""
        self._samplers, self._videos_per_sampler = samplers, videos_per_sampler
        self.entrance = Turns(self.places)  # a turn lasts as long as the video is inside
        self._chunk_s: float | None = None  # what a chunk takes of a video that has a sampler for itself
        self._told: dict[str, tuple[float, float]] = {}
        self._told_at = -math.inf

    def places(self) -> int:
        """How many may be inside."""
        return self._samplers() * self._videos_per_sampler

    def took(self, seconds: float) -> None:
        """A video that was inside has made a chunk, so long after it wanted to."""
        alone = seconds / max(1.0, self.entrance.sampling / self._samplers())
        self._chunk_s = alone if self._chunk_s is None else self._chunk_s + NEWEST * (alone - self._chunk_s)

    def forecast(self, video_id: str, left: Callable[[], Mapping[str, float | None]]) -> tuple[float, float]:
        """In how many seconds a video may expect its first turn, and its end, as of FORECAST_S ago or later; infinite
        if nobody knows. `left`: the chunks that are left to make of each video that has not ended, None of one that is
        paused."""
        now = asyncio.get_running_loop().time()
        if video_id not in self._told or now >= self._told_at + FORECAST_S:
            self._told, self._told_at = self._forecast(left()), now
        return self._told.get(video_id, NOBODY_KNOWS)

    def _forecast(self, left: Mapping[str, float | None]) -> dict[str, tuple[float, float]]:
        told = dict.fromkeys(left, NOBODY_KNOWS)
        if self._chunk_s is None:
            return told
        wanted = {video_id: chunks for video_id, chunks in left.items() if chunks is not None}
        queue = {video_id: wanted.pop(video_id) for video_id in self.entrance.queue() if video_id in wanted}
        for video_id, (start, end) in forecast(wanted, queue, self._samplers(), self.places()).items():
            told[video_id] = start * self._chunk_s, end * self._chunk_s
        return told


class Admission:
    """The videos of one Director that have not ended, and those that are about to be accepted."""

    def __init__(
        self,
        settings: AdmissionSettings,
        store: Store,
        rooms: Mapping[str, Room],
        ends: Callable[[Iterable[str]], float],
    ) -> None:
        """`rooms`: by model; `ends`: in how many seconds the first of these videos is expected to end, infinite if
        nobody knows."""
        self._settings, self._store, self._rooms, self._ends = settings, store, rooms, ends
        self._videos: dict[str, VideoRequestRecord] = {}
        self._spent: dict[str, dict[str, float]] = {}  # owner ▸ id ▸ seconds of their day, of those who have a limit

    async def check(self, owner: str, quota: Quota) -> None:
        """Raises TooMany if no video of this owner could come in now, whatever was asked for."""
        await self._load(owner, quota)
        self._check_owner(owner, quota, 0.0)
        full = [model for model in self._rooms if self._is_full(model)]
        if len(full) == len(self._rooms):
            raise self._no_room(full[0])

    async def enter(self, request: VideoRequestRecord, quota: Quota) -> None:
        """Takes a video in, and notes whose it is. If it is not accepted after all, also because this raises, it is to
        be turned away. Raises TooMany, InvalidInput if it is longer than a day's allowance, or StoreUnavailable."""
        owner, seconds = request.owner, _seconds(request)
        if quota.seconds_per_day is not None and seconds > quota.seconds_per_day:
            raise InvalidInput("seconds", seconds, f"at most {quota.seconds_per_day:g}, the day's allowance of its key")
        await self._load(owner, quota)
        self._check_owner(owner, quota, seconds)
        if self._is_full(request.spec.model):
            raise self._no_room(request.spec.model)
        self.go_on(request)  # nothing was awaited since the checks
        if owner:
            await self._store.put_owned(owner, request.id, seconds)

    def go_on(self, request: VideoRequestRecord) -> None:
        """A video is there, whatever the limits say: an earlier Director took it in."""
        self._videos[request.id] = request
        if request.owner in self._spent:
            self._spent[request.owner].setdefault(request.id, _seconds(request))

    async def turn_away(self, request: VideoRequestRecord) -> None:
        """A video was not accepted after all: it costs nothing. Raises StoreUnavailable."""
        if self._videos.pop(request.id, None) is not None and request.owner:
            self._spent.get(request.owner, {}).pop(request.id, None)
            await self._store.forget_owned(request.owner, request.id)

    def leave(self, video_id: str) -> None:
        """A video has ended."""
        self._videos.pop(video_id, None)

    async def settle(self, request: VideoRequestRecord, frames: int) -> None:
        """A video ended, of which so many frames were made: no more counts. Raises StoreUnavailable."""
        made = frames / NATIVE_FPS
        if request.owner and made < _seconds(request):
            if request.owner in self._spent:
                self._spent[request.owner][request.id] = made
            await self._store.put_owned(request.owner, request.id, made)

    async def deleted(self, request: VideoRequestRecord) -> None:
        """A video was deleted. What it took of its owner's day counts until that is over. Raises StoreUnavailable."""
        if not request.owner:
            return
        if created_at(request.id) >= time.time() - DAY_S:
            await self._store.keep_spent(request.owner, request.id)
        await self._store.forget_owned(request.owner, request.id)

    async def _load(self, owner: str, quota: Quota) -> None:
        """Sees to it that the owner's last day is known, if that matters."""
        if quota.seconds_per_day is not None and owner not in self._spent:
            found = await self._store.spent(owner, time.time() - DAY_S)
            own = {video.id: _seconds(video) for video in self._videos.values() if video.owner == owner}
            self._spent[owner] = {**found, **own, **self._spent.get(owner, {})}

    def _check_owner(self, owner: str, quota: Quota, seconds: float) -> None:
        most = quota.concurrent_videos
        own = [video.id for video in self._videos.values() if video.owner == owner]
        if most is not None and len(own) >= most:
            raise TooMany(f"{len(own)} videos of this key have not ended; allowed: {most}", self._ends_s(own))
        per_day = quota.seconds_per_day
        if per_day is None:
            return
        now, spent = time.time(), self._spent[owner]
        for video_id in [each for each in spent if created_at(each) < now - DAY_S and each not in self._videos]:
            del spent[video_id]
        left = per_day - sum(spent.values())
        if left <= 0 or seconds > left:
            raise TooMany(
                f"{seconds:g} s of video, and {max(0.0, left):g} s are left of this key's day; allowed: {per_day:g} s "
                "in 24 hours",
                self._free_s(spent, max(seconds, 1e-9) - left, now),
            )

    def _free_s(self, spent: Mapping[str, float], needed: float, now: float) -> float:
        """In how many seconds so many of the day are free again."""
        for video_id in sorted(spent):
            needed -= spent[video_id]
            if needed <= 0:
                return created_at(video_id) + DAY_S - now
        return DAY_S

    def _is_full(self, model: str) -> bool:
        inside = sum(video.spec.model == model for video in self._videos.values())
        return not has_room(inside, self._rooms[model].places(), self._settings.queued)

    def _no_room(self, model: str) -> TooMany:
        own = [video.id for video in self._videos.values() if video.spec.model == model]
        places = self._rooms[model].places()
        return TooMany(
            f"{len(own)} videos of model {model} have not ended; allowed: {places} that take turns and "
            f"{self._settings.queued} that wait",
            self._ends_s(own),
        )

    def _ends_s(self, videos: Iterable[str]) -> float:
        after = self._ends(videos)
        return UNKNOWN_S if after == math.inf else after


def _seconds(request: VideoRequestRecord) -> float:
    """What a video takes of its owner's day: its length at 24 frames per second, but for what it takes over."""
    origin, spec = request.origin, request.spec
    copied = sum(spec.frames_of_chunk(chunk) for chunk in range(origin.chunks)) if origin else 0
    return (spec.frames - copied) / NATIVE_FPS
