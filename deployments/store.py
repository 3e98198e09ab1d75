"""The store: the files of every video, and the job database, as objects behind one URL. It alone knows the keys.

    terms/000003                      claimed exclusively by each Director as it starts, for the service that it names
                                      (none, if it is of a version that knew of no others); the newest leads
    watched/{id}                      by viewers of a service that another one has taken over from
    idempotency/{digest}/000001.json  claimed exclusively for the first request with an Idempotency-Key: its video's id.
                                      {digest}: SHA-256 of owner and key. The highest number holds, for a day
    active/{id}                       from acceptance to the end
    owners/{digest}/{id}              whose a video is, and how many seconds of their day it takes: what lists them.
                                      {digest}: SHA-256 of the owner
    spent/{digest}/{id}               the same of a video that was deleted, until that day is over
    videos/{id}/request.json          what was asked for
    videos/{id}/input                 the uploaded image or video that it begins with
    videos/{id}/init.mp4              the head of the file
    videos/{id}/thumbnail.jpg         its first frame
    videos/{id}/texts/{digest}.safetensors
    videos/{id}/chunks/00007.t3.m4s   fragment 7 as term 3 made it
    videos/{id}/states/00008.t3.safetensors    the state after it: it has seen 8 chunks
    videos/{id}/record.t3.json        the commit: names the objects that count. The highest term counts

Names that carry a term are written by that term alone, so a writer of an old term can overwrite nothing. Every put is
one atomic operation. On S3 and its kin that is the service's promise; in a folder obstore writes `{name}#1`, then
renames it (seen with strace: `rename` for a put, `linkat` for an exclusive create), and hides such names in
listings, so what a killed writer leaves behind is never taken for an object.

obstore is called in threads of our own. Its async functions finish in a thread of Rust's that may still want the
interpreter after the caller went on: a process that ended just then aborted (11 of 60 with 0.12.1; in threads 0).
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from deployments.records import Record, StoredObject, VideoRecord, VideoRequestRecord
from helios_core.errors import HeliosError, InvalidInput

logger = logging.getLogger(__name__)

R = TypeVar("R")

VIDEO_ID = re.compile(r"video_[0-9a-f]{32}")
TERM = re.compile(r"[0-9]+")
RECORD = re.compile(r"record\.t([0-9]+)\.json")
TERM_IN_NAME = re.compile(r"\.t([0-9]+)\.")
STATE = re.compile(r"([0-9]+)\.t[0-9]+\.safetensors")
CLAIM = re.compile(r"([0-9]+)\.json")
KINDS = {
    "request": re.compile(r"request\.json"),
    "input": re.compile(r"input"),
    "init": re.compile(r"init\.mp4"),
    "thumbnail": re.compile(r"thumbnail\.jpg"),
    "text": re.compile(r"texts/[^/]+\.safetensors"),
    "fragment": re.compile(r"chunks/[0-9]+\.t[0-9]+\.m4s"),
    "state": re.compile(r"states/[0-9]+\.t[0-9]+\.safetensors"),
    "record": RECORD,
}

CLAIM_HOLDS_S = 24 * 3600.0

NEWEST_TERMS = 100  # nobody comes back after so many others
ONE = "helios"  # the service, where nobody says which
UNNAMED = ""  # the service of a term that an earlier version claimed

THREADS = 32  # operations under way at once; more wait. Threads are made as they are needed

# Enough to ride out one lost connection. How long a video may wait for its store is decided by the callers.
RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
TRY_AGAIN_S = 1.0  # a patient store tries again so long after a failure
NO_ROOM = re.compile(r"os error (28|122)\b|StorageFull|507 Insufficient Storage")  # ENOSPC, EDQUOT, MinIO's, HTTP's


class StoreUnavailable(HeliosError):
    """The store cannot be reached or refuses the operation. It may be back later."""

    code = "store_unavailable"
    public = "the store is not there at the moment; try again"


class StoreFull(StoreUnavailable):
    """The store has no room left."""

    code = "store_full"
    public = "the store has no room at the moment; try again"


class Superseded(HeliosError):
    """A newer term leads: what this one's Director does counts no more."""

    code = "superseded"
    public = "the service is being replaced; try again"


class Retired(Superseded):
    """Another service leads the store, and this one does not come back: no Director of its will claim a term."""


class ObjectMissing(HeliosError):
    """An object that was to be read does not exist. The message names store and key."""

    code = "object_missing"
    public = "a part of the video is gone"


class StoreInUse(HeliosError):
    """Another service holds the lock of the store's folder."""

    code = "store_in_use"


def cluster_of(service: str) -> str:
    """A service's name is that of its cluster, a hyphen, and that of the graph's build there, of which one follows the
    other in its own time."""
    return service.partition("-")[0]


def new_video_id(now: float) -> str:
    """A new id that nobody can guess: `video_`, 12 hex digits of milliseconds, 20 random ones. Ids sort by time.

    `now`: Unix time in seconds.
    """
    return f"video_{int(now * 1000):012x}{secrets.token_hex(10)}"


def created_at(video_id: str) -> float:
    """When an id was made, a Unix time."""
    return int(video_id.removeprefix("video_")[:12], 16) / 1000


def renamed(item: StoredObject, video_id: str, term: int) -> StoredObject:
    """What `item` is called in the folder of another video, if `term` puts it there."""
    _, _, name = item.key.split("/", 2)
    return item.model_copy(update={"key": f"videos/{_checked(video_id)}/{TERM_IN_NAME.sub(f'.t{term}.', name)}"})


def term_of(key: str) -> int:
    """The term that put an object; 0 for one whose name carries none."""
    match = TERM_IN_NAME.search(key)
    return int(match[1]) if match else 0


def is_video_id(text: str) -> bool:
    return VIDEO_ID.fullmatch(text) is not None


@dataclass(frozen=True)
class Listed:
    """An object as a listing has it. `modified_at`: when it was put (Unix time, by the store's clock)."""

    key: str
    bytes: int
    modified_at: float

    @property
    def kind(self) -> str | None:
        """What an object of a video is, a name in KINDS; None for what this version does not store."""
        name = "/".join(self.key.split("/")[2:])
        return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(name)), None)

    @property
    def term(self) -> int:
        """The term that put it; 0 for an object whose name carries none."""
        return term_of(self.key)


class Claim(Record):
    """What the first request with an Idempotency-Key was, and for which new video's id it claimed the key.

    `number`: among the claims of the key, from 1; `digest`: of the request; `outcome`: of the request. While it is
    open the video may be there or not; one that is accepted may be deleted since; one that is refused holds no longer.
    """

    number: int
    video_id: str
    digest: str
    created_at: float  # Unix time
    outcome: Literal["open", "accepted", "refused"] = "open"

    def holds(self, now: float) -> bool:
        return self.outcome != "refused" and now < self.created_at + CLAIM_HOLDS_S


@dataclass
class Health:
    """Of a store as one process sees it. `failing`: its last operation failed; `full`: so did the last one that needed
    room, for want of it. A full store can be read all the while."""

    failing: bool = False
    full: bool = False

    @property
    def away(self) -> bool:
        return self.failing or self.full


class Store:
    """Objects below `url`: a folder (a path or file://, made if it is missing) or s3://, gs://, az://.

    Credentials, endpoints and the HTTP client's options come from the cloud's usual environment variables: for S3
    AWS_ENDPOINT, AWS_ALLOW_HTTP, and AWS_TIMEOUT, after which a server that hangs is one that is away (30s, unless it
    says otherwise). A Store travels between processes as its URL. Every method raises StoreUnavailable if the store
    cannot be reached, StoreFull if it has no room, and those that take a video's id raise InvalidInput for a text that
    is not one, before it becomes part of a key.
    """

    def __init__(self, url: str, patience_s: float = 0.0) -> None:
        """`patience_s`: for so many seconds what fails is tried again.

        Raises InvalidInput for a URL of another scheme, StoreUnavailable if it cannot be opened.
        """
        scheme, separator, _ = url.partition("://")
        self.folder: Path | None = None
        if not separator or scheme == "file":
            # Absolute, because a replica that gets this URL has a working directory of its own.
            self.folder = Path(url2pathname(urlsplit(url).path) if separator else url).absolute()
        elif scheme not in ("s3", "gs", "az"):
            raise InvalidInput("store", url, "a folder, file://, s3://, gs:// or az://")
        self.url = str(self.folder or url)
        self.patience_s = patience_s
        self.health = Health()
        with self._errors():
            self._objects = (
                LocalStore(self.folder, mkdir=True)
                if self.folder
                else from_url(url, retry_config=RETRIES)  # client_options would displace those of the environment
            )
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")

    def patient(self, seconds: float) -> Store:
        """This store for those who can wait: what fails is tried again for so long."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), patience_s=seconds)
        return other

    def __reduce__(self) -> tuple[type[Store], tuple[str, float]]:
        return Store, (self.url, self.patience_s)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold a folder for one service: its processes may share it, another service may not. Freed if we die.

        A cloud store has no such lock: there the terms decide who leads. Raises StoreInUse.
        """
        if self.folder is None:
            yield
            return
        with self._errors():
            file = (self.folder / ".lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreInUse(
                    f"the folder {self.folder} is in use by another Helios service; stop it or choose another folder"
                ) from None
            yield

    async def claim_term(self, service: str = ONE) -> int:
        """A term that nobody else has or gets, higher than all before it. Raises Retired if another service has led
        since this one did: while an upgrade has two of them, a Director that dies in the old one must not take the
        videos back."""
        newest = await self.newest_term()
        while True:
            leads = await self._service(newest)
            if leads != UNNAMED and cluster_of(leads) != cluster_of(service) and await self.has_led(service):
                raise Retired(f"service {leads} leads with term {newest}, and {service} led before it")
            try:
                await self._put(f"terms/{newest + 1:06d}", service.encode(), mode="create")
                return newest + 1
            except AlreadyExistsError:  # another one was faster: whose it is decides anew
                newest += 1

    async def has_led(self, service: str) -> bool:
        """Whether a Director of this service claimed one of the newest terms. The terms themselves tell: a note beside
        them could be missing, if whoever should have put it died."""
        newest = sorted(await self._terms())[-NEWEST_TERMS:]
        return service in await asyncio.gather(*map(self._service, newest))

    async def takes_over(self, term: int) -> bool:
        """Whether the term before this one was claimed in another cluster."""
        return term > 1 and cluster_of(await self._service(term - 1)) != cluster_of(await self._service(term))

    async def leads(self) -> str | None:
        """The service that leads; None if none ever did."""
        newest = await self.newest_term()
        return await self._service(newest) if newest else None

    async def _service(self, term: int) -> str:
        """For which service a term was claimed."""
        if not term:
            return UNNAMED
        with self._errors():
            return await self._run(_fetch_text, f"terms/{term:06d}")

    async def _terms(self) -> list[int]:
        return [int(name) for name in await self._names("terms") if TERM.fullmatch(name)]

    async def newest_term(self) -> int:
        """The highest term that was claimed; 0 before the first."""
        return max(await self._terms(), default=0)

    async def check_leads(self, term: int) -> None:
        """Raises Superseded if a newer term was claimed: Retired, if in another cluster. One of a version that names
        none goes on claiming terms until it is gone, and who were Retired by it would not come back then."""
        if (newest := await self.newest_term()) > term:
            leads = await self._service(newest)
            another = leads != UNNAMED and cluster_of(leads) != cluster_of(await self._service(term))
            raise (Retired if another else Superseded)(f"term {newest} leads, and not {term}")

    async def claimed(self, owner: str, key: str, now: float) -> Claim | None:
        """The claim that holds `owner`'s Idempotency-Key at the Unix time `now`."""
        last = await self._last_claim(owner, key)
        return last if last is not None and last.holds(now) else None

    async def claim(self, owner: str, key: str, digest: str, video_id: str, now: float) -> Claim:
        """Claims `owner`'s Idempotency-Key for a new video, unless it is held: the claim that holds it.

        Whoever asks at the same time, in whatever process, gets the same. An old claim is followed, not overwritten or
        removed: who saw that it holds no longer would else undo what another one, who saw it too, put in its place.
        """
        while True:
            last = await self._last_claim(owner, key)
            if last is not None and last.holds(now):
                return last
            number = 1 if last is None else last.number + 1
            claim = Claim(number=number, video_id=video_id, digest=digest, created_at=now)
            with suppress(AlreadyExistsError):  # then another one was faster
                await self._put(_claim_key(owner, key, number), claim.model_dump_json().encode(), mode="create")
                return claim

    async def settle(self, owner: str, key: str, claim: Claim, outcome: Literal["accepted", "refused"]) -> None:
        """Notes what became of the request that a claim is of."""
        settled = claim.model_copy(update={"outcome": outcome})
        await self._put(_claim_key(owner, key, claim.number), settled.model_dump_json().encode())

    async def forget_claims(self, now: float) -> None:
        """Remove the claims of each key that was not used for twice the time that a claim holds: not before, lest
        somebody who read the last one is about to follow it."""
        with self._errors():
            claims = await self._run(_list_objects, "idempotency/")
        newest: dict[str, float] = {}
        for claim in claims:
            folder = str(PurePosixPath(claim.key).parent)
            newest[folder] = max(claim.modified_at, newest.get(folder, 0.0))
        old = {folder for folder, put_at in newest.items() if put_at + 2 * CLAIM_HOLDS_S < now}
        await self._delete([claim.key for claim in claims if str(PurePosixPath(claim.key).parent) in old])
        if self.folder is not None:
            await asyncio.to_thread(_remove_empty, [self.folder / folder for folder in old])

    async def _last_claim(self, owner: str, key: str) -> Claim | None:
        folder = str(PurePosixPath(_claim_key(owner, key, 1)).parent)
        while numbers := [int(match[1]) for name in await self._names(folder) if (match := CLAIM.fullmatch(name))]:
            with suppress(ObjectMissing):  # then it was removed after the listing
                return Claim.model_validate_json(await self.read(_claim_key(owner, key, max(numbers))))
        return None

    async def accept(self, request: VideoRequestRecord) -> None:
        """Store a request and mark it active: from here on a starting Director resumes it. One that has an owner is
        `put_owned` before."""
        await self._put(f"videos/{_checked(request.id)}/request.json", request.model_dump_json().encode())
        await self.prepare(request.id)

    async def put_owned(self, owner: str, video_id: str, seconds: float) -> None:
        """Note whose a video is, and how many seconds of their day it takes."""
        await self._put(_owned_key(owner, video_id), json.dumps(seconds).encode())

    async def owns(self, owner: str, video_id: str) -> bool:
        """Whether a video was noted as this owner's."""
        with self._errors():
            try:
                await self._run(obstore.head, _owned_key(owner, video_id))
            except FileNotFoundError:
                return False
        return True

    async def owned(self, owner: str) -> list[str]:
        """Ids of the videos that were noted as this owner's, newest first. Some may be there no more."""
        names = await self._names(_owned_folder(owner))
        return sorted((name for name in names if is_video_id(name)), reverse=True)

    async def spent(self, owner: str, since: float) -> dict[str, float]:
        """How many seconds each video takes of this owner's day, of those that were made at the Unix time `since` or
        later, also of those that were deleted."""
        keys = [
            f"{folder}/{name}"
            for folder in (_owned_folder(owner), _owned_folder(owner, "spent"))
            for name in await self._names(folder)
            if is_video_id(name) and created_at(name) >= since
        ]
        found = await asyncio.gather(*map(self._seconds, keys))
        return {PurePosixPath(key).name: seconds for key, seconds in zip(keys, found, strict=True)}

    async def _seconds(self, key: str) -> float:
        try:
            return float(json.loads(await self.read(key)))
        except ObjectMissing:
            return 0.0  # forgotten since

    async def keep_spent(self, owner: str, video_id: str) -> None:
        """Keep what a video takes of its owner's day, which is deleted."""
        with self._errors(), suppress(FileNotFoundError):
            kept = f"{_owned_folder(owner, 'spent')}/{_checked(video_id)}"
            await self._run(obstore.copy, _owned_key(owner, video_id), kept)

    async def forget_spent(self, before: float) -> None:
        """Remove what is kept of deleted videos that were made before this Unix time."""
        with self._errors():
            kept = await self._run(_list_objects, "spent/")
        ids = [(item.key, PurePosixPath(item.key).name) for item in kept]
        await self._delete([key for key, name in ids if is_video_id(name) and created_at(name) < before])

    async def forget_owned(self, owner: str, video_id: str) -> None:
        """Remove the note of a video that is there no more."""
        await self._delete([_owned_key(owner, video_id)])

    async def prepare(self, video_id: str) -> None:
        """Mark a video active of which something is stored before its request. Until `accept`, a starting Director
        takes it for a deletion that was interrupted."""
        await self._put(f"active/{_checked(video_id)}", b"")

    async def end(self, video_id: str) -> None:
        """Remove the active marker; nothing happens if there is none."""
        await self._delete([f"active/{_checked(video_id)}"])

    async def note_watched(self, video_id: str) -> None:
        """Tells the Director of another service that a video is watched."""
        await self._put(f"watched/{_checked(video_id)}", b"")

    async def noted_watched(self, video_id: str) -> float:
        """When that was told last, a Unix time by the store's clock; 0 for never."""
        noted = await self._head(f"watched/{_checked(video_id)}")
        return 0.0 if noted is None else noted.modified_at

    async def forget_watched(self) -> None:
        """Remove what was told of videos that are not active any more."""
        noted = [name for name in await self._names("watched") if is_video_id(name)]
        active = set(await self.active()) if noted else set()
        await self._delete([f"watched/{name}" for name in noted if name not in active])

    async def active(self) -> list[str]:
        """Ids of the videos that were accepted and have not ended, oldest first."""
        return sorted(name for name in await self._names("active") if is_video_id(name))

    async def video_ids(self) -> list[str]:
        """Ids of all videos, newest first."""
        with self._errors():
            listing = await self._run(obstore.list_with_delimiter, "videos")
        names = (PurePosixPath(prefix).name for prefix in listing["common_prefixes"])
        return sorted((name for name in names if is_video_id(name)), reverse=True)

    async def has(self, video_id: str) -> bool:
        """Whether anything is stored of a video."""
        return bool(await self._names(f"videos/{_checked(video_id)}"))

    async def request(self, video_id: str) -> VideoRequestRecord | None:
        """What was asked for, or None if there is no such video."""
        try:
            data = await self.read(f"videos/{_checked(video_id)}/request.json")
        except ObjectMissing:
            return None
        return VideoRequestRecord.model_validate_json(data)

    async def put_record(self, record: VideoRecord, term: int) -> None:
        """The commit: once this returns, every object that `record` names counts.

        Raises Superseded if a newer term was claimed: then it may count or not. That order of things makes it safe: who
        claims a term after this look reads this very record.
        """
        await self._put(f"videos/{_checked(record.id)}/record.t{term}.json", record.model_dump_json().encode())
        await self.check_leads(term)

    async def record(self, video_id: str) -> VideoRecord | None:
        """The record of the highest term, or None if nothing was committed yet."""
        names = await self._names(f"videos/{_checked(video_id)}")
        terms = [int(match[1]) for name in names if (match := RECORD.fullmatch(name))]
        if not terms:
            return None
        with self._errors():
            try:
                return await self._run(_fetch_record, f"videos/{video_id}/record.t{max(terms)}.json")
            except FileNotFoundError:
                return None  # deleted since

    async def objects(self, video_id: str) -> list[Listed]:
        """Everything that is stored of a video, by key; its active marker is not among it."""
        with self._errors():
            found = await self._run(_list_objects, f"videos/{_checked(video_id)}/")
        return sorted(found, key=lambda item: item.key)

    async def marker(self, video_id: str) -> Listed | None:
        """The active marker of a video, or None if it has none."""
        return await self._head(f"active/{_checked(video_id)}")

    async def remove(self, key: str) -> None:
        """Remove one object that nothing names, of a video that has ended; nothing happens if it is gone."""
        await self._delete([key])

    async def put_init(self, video_id: str, data: bytes) -> StoredObject:
        """The ftyp + moov + uuid of a video."""
        return await self._put(f"videos/{_checked(video_id)}/init.mp4", data)

    async def put_input(self, video_id: str, path: Path) -> StoredObject:
        """An upload, from a file."""
        return await self._put(f"videos/{_checked(video_id)}/input", await asyncio.to_thread(path.read_bytes))

    async def put_thumbnail(self, video_id: str, data: bytes) -> StoredObject:
        """The first frame of a video, as a JPEG."""
        return await self._put(f"videos/{_checked(video_id)}/thumbnail.jpg", data)

    async def put_fragment(self, video_id: str, index: int, term: int, data: bytes) -> StoredObject:
        """The moof + mdat of chunk `index`."""
        return await self._put(f"videos/{_checked(video_id)}/chunks/{index:05d}.t{term}.m4s", data)

    async def put_state(self, video_id: str, index: int, term: int, data: bytes) -> StoredObject:
        """A StreamState's bytes. `index`: the number of chunks that it has seen."""
        return await self._put(f"videos/{_checked(video_id)}/states/{index:05d}.t{term}.safetensors", data)

    async def put_text(self, video_id: str, digest: str, data: bytes) -> StoredObject:
        """The embeddings of a prompt. `digest`: hex, names their content."""
        return await self._put(f"videos/{_checked(video_id)}/texts/{digest}.safetensors", data)

    async def states(self, video_id: str) -> set[str]:
        """The keys of the states that are kept of a video."""
        folder = f"videos/{_checked(video_id)}/states"
        return {f"{folder}/{name}" for name in await self._names(folder)}

    async def copy(self, item: StoredObject, video_id: str, term: int) -> StoredObject:
        """The same object under another video, as `term` made it; its bytes do not pass through here.

        Raises ObjectMissing.
        """
        copied = renamed(item, video_id, term)
        with self._errors():
            try:
                await self._run(obstore.copy, item.key, copied.key)
            except FileNotFoundError:
                raise ObjectMissing(f"{self.url}: there is no {item.key}") from None
        return copied

    async def keep_only_last_state(self, record: VideoRecord, term: int) -> None:
        """Remove the states before the last one that `record` names. Call it after `record` was committed by `term`.

        Does nothing if a newer term was claimed. That order makes it safe: a Director of a newer term that claimed
        after this look reads the committed record, and so never needs an earlier state.
        """
        if not record.chunks or await self.newest_term() != term:
            return
        states = f"videos/{_checked(record.id)}/states"
        last = record.chunks[-1].index + 1  # a state is numbered by the chunks that it has seen
        names = await self._names(states)
        old = [name for name in names if (match := STATE.fullmatch(name)) and int(match[1]) < last]
        await self._delete([f"{states}/{name}" for name in old])

    async def sweep(self, record: VideoRecord, term: int, all_states: bool = False) -> None:
        """Remove of an ended video what `record`, its last commit, does not need: fragments, states, and the records
        before it. Of the states it needs the last one, or `all_states`.

        Does nothing if a newer term was claimed: its Director decides.
        """
        if await self.newest_term() != term:
            return
        states = record.chunks if all_states else record.chunks[-1:]
        needed = {chunk.fragment.key for chunk in record.chunks} | {chunk.state.key for chunk in states}
        folders = [f"videos/{_checked(record.id)}/{kind}" for kind in ("chunks", "states")]
        keys = [f"{folder}/{name}" for folder in folders for name in await self._names(folder)]
        names = await self._names(f"videos/{record.id}")
        records = sorted((int(match[1]), name) for name in names if (match := RECORD.fullmatch(name)))
        keys += [f"videos/{record.id}/{name}" for _, name in records[:-1]]
        await self._delete([key for key in keys if key not in needed])

    async def delete(self, video_id: str) -> None:
        """Remove a video that nobody writes any more, and every trace of it.

        The request goes first and the active marker, set for the purpose, last: an active video without a request is a
        deletion that was interrupted, to be called again.
        """
        # A look comes first: a store that does not answer is sent no marker, which might arrive long after it was given
        # up and make a refused request an accepted one.
        found = await self.objects(video_id)
        await self.prepare(video_id)
        await self._delete([item.key for item in found if item.kind == "request"])
        await self._delete([item.key for item in found if item.kind != "request"])
        if self.folder is not None:
            # Empty folders, and what a killed writer left half written. obstore's own cleaning up races with puts.
            await asyncio.to_thread(shutil.rmtree, self.folder / "videos" / video_id, ignore_errors=True)
        await self.end(video_id)

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes [start, end) of an object, to its end for None; start < end, and start below its length.

        Raises ObjectMissing.
        """
        with self._errors():
            try:
                return await self._run(_fetch, key, {"offset": start} if end is None else (start, end))
            except FileNotFoundError:
                raise ObjectMissing(f"{self.url}: there is no {key}") from None

    async def _head(self, key: str) -> Listed | None:
        with self._errors():
            try:
                return _listed(await self._run(obstore.head, key))
            except FileNotFoundError:
                return None

    async def _put(self, key: str, data: bytes, mode: str = "overwrite") -> StoredObject:
        """Raises AlreadyExistsError if mode is "create" and the key is taken."""
        with self._errors():
            # One request: a multipart upload that is broken off would leave its parts in the bucket.
            await self._run(obstore.put, key, data, mode=mode, use_multipart=False)
        if data:  # an empty object goes into a full folder, too
            self.health.full = False
        return StoredObject(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    async def _delete(self, keys: list[str]) -> None:
        with self._errors():
            try:
                await self._run(obstore.delete, keys)
            except FileNotFoundError:  # one is gone already. A folder says so, and keeps those after it; S3 does not
                for key in keys if len(keys) > 1 else ():
                    await self._delete([key])

    async def _names(self, folder: str) -> list[str]:
        """The names of the objects directly in a folder, in no order."""
        with self._errors():
            listing = await self._run(obstore.list_with_delimiter, folder)
        return [PurePosixPath(item["path"]).name for item in listing["objects"]]

    async def _run(self, operation: Callable[..., R], *args: object, **options: object) -> R:
        """One of obstore's blocking operations, tried again while patience lasts."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.patience_s
        while True:
            try:
                done = await self._run_once(operation, *args, **options)
            except (AlreadyExistsError, FileNotFoundError):
                self.health.failing = False  # an answer, too
                raise
            except (BaseError, OSError) as error:
                if not self.health.away:
                    logger.warning("store away: %s: %s", self.url, _first_line(error))
                self.health.failing = True
                self.health.full = self.health.full or _no_room(error)
                if clock() >= deadline:
                    raise
                await asyncio.sleep(TRY_AGAIN_S)
            else:
                self.health.failing = False
                return done

    async def _run_once(self, operation: Callable[..., R], *args: object, **options: object) -> R:
        """One that has begun is waited for, also by a caller who is cancelled: a put that arrived after the next one
        would undo it."""
        call = self._threads.submit(operation, self._objects, *args, **options)
        done = asyncio.wrap_future(call)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not call.cancel():
                await asyncio.wait([done])
                done.exception()  # nobody is left to hear of it
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except AlreadyExistsError:
            raise
        except (BaseError, OSError) as error:
            kind = StoreFull if _no_room(error) else StoreUnavailable
            raise kind(f"{self.url}: {_first_line(error)}") from error


def _no_room(error: Exception) -> bool:
    return NO_ROOM.search(str(error)) is not None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]  # the rest is Rust's debug form of the same


def _list_objects(objects: Any, prefix: str) -> list[Listed]:
    return [_listed(item) for part in obstore.list(objects, prefix) for item in part]


def _listed(item: Any) -> Listed:
    return Listed(key=item["path"], bytes=item["size"], modified_at=item["last_modified"].timestamp())


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # then it was used again, or is gone
            folder.rmdir()


def _fetch_record(objects: Any, key: str) -> VideoRecord:
    # Parsed where it was read: that of a long video takes tens of milliseconds, which the event loop has not.
    return VideoRecord.model_validate_json(obstore.get(objects, key).bytes().to_bytes())


def _fetch_text(objects: Any, key: str) -> str:
    return bytes(obstore.get(objects, key).bytes()).decode()  # also of an empty one, of which no range can be read


def _fetch(objects: Any, key: str, span: object) -> bytes:
    return bytes(obstore.get(objects, key, options={"range": span}).bytes())


def _claim_key(owner: str, key: str, number: int) -> str:
    digest = hashlib.sha256(json.dumps([owner, key]).encode()).hexdigest()
    return f"idempotency/{digest}/{number:06d}.json"


def _owned_folder(owner: str, kind: str = "owners") -> str:
    return f"{kind}/{hashlib.sha256(owner.encode()).hexdigest()}"


def _owned_key(owner: str, video_id: str) -> str:
    return f"{_owned_folder(owner)}/{_checked(video_id)}"


def _checked(video_id: str) -> str:
    if not is_video_id(video_id):
        raise InvalidInput("id", video_id, "video_ and 32 hex digits in lower case")
    return video_id
