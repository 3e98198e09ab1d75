"""Who comes in: the check that stands before every route, and the links that open a video to those who have no key.

A browser's `<video>`, EventSource and HLS players send no header of ours. For them a video's `share_url` is signed, and
good for its content, its events and its playlist with all that this names, for GET and HEAD alone.
"""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware

from deployments.admission import TooMany
from deployments.config import NO_QUOTA, AppConfig, Quota
from deployments.director import NoSuchVideo, Unreadable
from deployments.errors import RequestError
from deployments.keys import Key, Keys
from deployments.records import VideoStatus
from deployments.store import Store, is_video_id

OPEN = {"/", "/healthz", "/readyz", "/openapi.json"}  # besides what is mounted: the page's parts
SHARED = ("/content", "/events", "/hls/index.m3u8", "/hls/init.mp4", "/hls/{index}.m4s")  # below a video
LINK = ("key", "expires", "signature")  # the query of a link
HOUR_S = 3600
OWNERS_KEPT = 10_000  # videos of which an ingress remembers whose they are
SENT = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "Last-Event-ID",
    "Range",
    "If-Range",
    "X-Request-Id",
    "traceparent",
)
TOLD = (
    "Content-Range", "ETag", "Idempotent-Replayed", "Retry-After", "X-Request-Id", "X-Video-Id", "openai-poll-after-ms",
    "traceparent",
)  # fmt: skip


class Door:
    """Lets in who has a key, to what is theirs; without a file of keys everybody, to everything.

    It is a dependency of the whole application, so that it comes before anything of a body is read, and no route can
    be without it.
    """

    def __init__(self, config: AppConfig, status: Callable[[str], Awaitable[VideoStatus]], store: Store) -> None:
        """`status`: how a video stands. Raises ConfigError if the file of keys cannot be read."""
        self._config, self._status, self._store = config, status, store
        self._keys = None if config.keys is None else Keys(Path(config.keys))
        self._owners: OrderedDict[str, str] = OrderedDict()  # by video; whose it is never changes
        self._buckets: dict[str, _Bucket] = {}  # by key

    async def __call__(self, request: Request) -> None:
        """Raises RequestError 401 for who is not let in, 403 for who is not let in here, 429 for too many requests, and
        NoSuchVideo for a video of others, as for one that there is not."""
        request.state.key = None
        route = request.scope["route"].path
        if self._keys is None or route in OPEN:
            return
        video_id = request.path_params.get("video_id")
        if "authorization" not in request.headers and video_id is not None and self._is_link(request, route):
            key = self._of_link(request, self._keys, video_id)
        else:
            key = self._of_header(request, self._keys)
            if (key.kind == "metrics") != (route == "/metrics"):
                allowed = "a key that was made with --metrics" if route == "/metrics" else "a key for videos"
                raise RequestError(403, "forbidden", f"key {key.id} is for {key.kind}; allowed here: {allowed}")
            self._count(key)
        request.state.key = key
        if video_id is not None:
            await self.check_owner(request, video_id)

    def quota(self, key: Key | None) -> Quota:
        """What whoever came with `key` may ask for: as the configuration has it, but for what the key itself says."""
        if key is None:
            return NO_QUOTA
        own = {} if key.quota is None else key.quota.model_dump(exclude_none=True)
        return self._config.admission.quota.model_copy(update=own)

    async def check_owner(self, request: Request, video_id: str) -> None:
        """Raises NoSuchVideo for a video of others, as for one that there is not."""
        key: Key | None = request.state.key
        if key is not None and not await self._is_of(key.owner, video_id):
            raise NoSuchVideo(video_id)

    def share_url(self, request: Request, video_id: str) -> str:
        """The address of a video's content, for those without a key: good for `share_hours`, and the rest of the hour,
        so that who asks again is told the same."""
        base = self._config.public_url or str(request.base_url)
        url = f"{base.rstrip('/')}/v1/videos/{video_id}/content"
        key: Key | None = request.state.key
        if key is None:
            return url
        expires = (int(time.time()) // HOUR_S + 1) * HOUR_S + int(self._config.share_hours * HOUR_S)
        signature = key.sign(video_id, expires)
        return f"{url}?{urlencode(dict(zip(LINK, (key.id, expires, signature), strict=True)))}"

    def _of_header(self, request: Request, keys: Keys) -> Key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = keys.of(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            what = "no key of this service" if token else "missing, or not after Bearer"
            raise RequestError(
                401,
                "unauthorized",
                f"the key in Authorization is {what}; allowed: Bearer and a key that helios keys add made",
                "Authorization",
                {"WWW-Authenticate": "Bearer"},
            )
        return key

    def _is_link(self, request: Request, route: str) -> bool:
        return route.removeprefix("/v1/videos/{video_id}") in SHARED and "signature" in request.query_params

    def _of_link(self, request: Request, keys: Keys, video_id: str) -> Key:
        key_id, expires, signature = (request.query_params.get(name, "") for name in LINK)
        key = keys.signer(key_id)
        until = int(expires) if expires.isdecimal() and len(expires) <= 12 else 0
        if key is None or not hmac.compare_digest(key.sign(video_id, until).encode(), signature.encode()):
            raise RequestError(
                403, "link_invalid", "the link was changed, or its key revoked; allowed: a new share_url"
            )
        if until <= time.time():
            raise RequestError(403, "link_expired", f"the link was good until {until}; allowed: a new share_url")
        return key

    def _count(self, key: Key) -> None:
        per_minute = self.quota(key).requests_per_minute
        if per_minute is None:
            return
        now = time.monotonic()
        if wait_s := self._buckets.setdefault(key.id, _Bucket(per_minute, now)).take(per_minute, now):
            raise TooMany(f"key {key.id} asks too often; allowed: {per_minute} requests a minute", wait_s)

    async def _is_of(self, owner: str, video_id: str) -> bool:
        """Whether a video is this owner's. Raises NoSuchVideo."""
        if not is_video_id(video_id):
            raise NoSuchVideo(video_id)
        if video_id not in self._owners:
            try:
                self._owners[video_id] = (await self._status(video_id)).owner
            except Unreadable:  # it can still be deleted, by who it is of
                return await self._store.owns(owner, video_id)
            if len(self._owners) > OWNERS_KEPT:
                self._owners.popitem(last=False)
        return self._owners[video_id] == owner


@dataclass
class _Bucket:
    """Requests that may come now: as many as in a minute at most, and so many more each minute. `at`: seconds by a
    clock that does not go back."""

    left: float
    at: float

    def take(self, per_minute: int, now: float) -> float:
        """Takes one; else, how many seconds it is until there is one."""
        self.left = min(per_minute, self.left + (now - self.at) * per_minute / 60)
        self.at = now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) * 60 / per_minute


def link_of(request: Request) -> str:
    """The query that lets whoever comes by a link in again; empty for who has a key."""
    query = request.query_params
    return urlencode({name: query[name] for name in LINK if name in query})


def without_link(query: Mapping[str, str]) -> dict[str, str]:
    """What a query says besides who comes."""
    return {name: value for name, value in query.items() if name not in LINK}


def install_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Lets the pages of `origins` ask; without cookies, as there are none."""
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=SENT, expose_headers=TOLD
        )
