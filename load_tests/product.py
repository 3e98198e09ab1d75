"""A user who behaves as a product does, over HTTP alone, and what becomes of each video that they ask for.

Users are a closed loop: one video, until it is seen or done with, then a while of thought, then the next. All that a
user asks for, and when they leave, comes from a random generator of their own: the same `--seed`, users and workers ask
for the same.
"""

from __future__ import annotations

import io
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gevent
from gevent import GreenletExit
from locust import HttpUser, task
from locust.clients import ResponseContextManager
from locust.event import EventHook
from PIL import Image
from requests.exceptions import RequestException

from load_tests.wanted import WEIGHTS, Wanted, draw, rng_of
from load_tests.watching import CHUNK_S, FPS, BrokenFile, FragmentReader, Playout

CHECKED = 4  # one video in so many is fetched again when it is finished, and its bytes are compared
PIECE_BYTES = 1 << 14
CONNECT_S, READ_S = 10.0, 600.0  # until a connection is there; until the next byte is, of a video that waits its turn
TRIES, TRY_AGAIN_S = 30, 1.0  # of what is asked of a video that was accepted
ENDED = ("completed", "failed", "cancelled")
# A video may be made for so long after its viewer left. The service goes on for `unwatched_s`, 10, after a watcher was
# seen last, which may be 5 s late; the rest is what it may take to hear of it.
LEFT_S = 30.0

video_ended = EventHook()
"""Fired with `video`, a Video as a dict, when a user is through with one, however it went."""


class Refused(Exception):
    """The service has no room, and says when to come again: in `retry_s` seconds."""

    def __init__(self, retry_s: float) -> None:
        super().__init__(retry_s)
        self.retry_s = retry_s


class Failed(Exception):
    """What was asked for did not come. The message says why."""


@dataclass
class Video:
    """One request for a video, as the report has it. Seconds are counted from that request, but for `at`, which is
    counted from the beginning of the run. None: it did not come to that."""

    at: float
    kind: str
    seconds: float  # the length that was asked for
    priority: str
    key: int  # which of the keys, from 0
    image: bool
    status: str = "unfinished"  # completed, cancelled, failed, refused, lost, unfinished
    accepted_s: float | None = None
    refused_s: float | None = None
    again: bool = False  # it was refused, and the user came again: what they wanted is another Video too
    first_fragment_s: float | None = None
    deliver_s: float | None = None  # from asking for the finished file to its first fragment
    stalls: int = 0
    stall_s: float = 0.0
    cadence_s: list[float] = field(default_factory=list)
    left_at_s: float | None = None
    ended_s: float | None = None
    prompt_changed: bool | None = None  # whether the service took the change of the prompt; None: nobody asked
    mismatch: bool = False  # its bytes were not those of the finished file
    why: str | None = None  # it failed, was lost, or had no answer


def picture(rng: random.Random, size: str | None) -> bytes:
    """A plain PNG of that size, to begin a video with."""
    width, height = (int(side) for side in (size or "256x128").split("x"))
    sink = io.BytesIO()
    Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3))).save(sink, "PNG")
    return sink.getvalue()


def keys_of(options: Any) -> list[str | None]:
    """The keys that users take turns on, or none. Raises SystemExit if the file has none."""
    if options.keys_file is None:
        return [key for key in (options.keys or "").split() if key] or [None]
    keys = Path(options.keys_file).read_text().split()
    if not keys:
        raise SystemExit(f"--keys-file {options.keys_file} is empty; allowed: one key a line")
    return list(keys)


class Product(HttpUser):
    """One user. `began`: of the run, on time.perf_counter; set at its start, in every process."""

    began = 0.0
    numbers = itertools.count()

    def on_start(self) -> None:
        options: Any = self.environment.parsed_options
        number, worker = next(self.numbers), self.environment.runner.worker_index
        self.options = options
        self.rng = rng_of(options.seed, worker, number)
        self.lengths = itertools.cycle(options.seconds)
        for _ in range(number % len(options.seconds)):
            next(self.lengths)
        keys = keys_of(options)
        self.key = (worker + number) % len(keys)
        if keys[self.key] is not None:
            self.client.headers["Authorization"] = f"Bearer {keys[self.key]}"
        self.wanted: Wanted | None = None
        self.refused: Visit | None = None  # not told of yet: whether they come again is not known
        self.pause_s = 0.0

    def on_stop(self) -> None:
        if self.refused is not None:
            self.refused.tell()

    def wait_time(self) -> float:
        """Seconds until the next request: of thought, or as the service said when it refused the last one."""
        return self.pause_s

    @task
    def use(self) -> None:
        """One video, or being refused one: then the same is wanted again."""
        wanted = self.wanted = self.wanted or draw(self.rng, next(self.lengths), WEIGHTS)
        if self.refused is not None:
            self.refused.video.again = True
            self.refused.tell()
            self.refused = None
        begin = time.perf_counter()
        video = Video(
            at=begin - self.began,
            kind=wanted.kind,
            seconds=wanted.seconds,
            priority="batch" if wanted.kind == "poll" else "realtime",
            key=self.key,
            image=wanted.kind == "image",
        )
        visit = Visit(self, wanted, video, begin)
        self.pause_s = self.rng.uniform(0.5, 1.5) * self.options.think
        try:
            KINDS[wanted.kind](visit)
            self.wanted = None
        except Refused as refused:
            video.status, video.refused_s, self.pause_s = "refused", visit.now(), refused.retry_s
            self.refused = visit
        except (Failed, BrokenFile) as error:
            self.wanted = None
            visit.broke(error)
        except GreenletExit:  # the stop timeout is over
            visit.stopped()
            raise
        finally:
            if visit is not self.refused:
                visit.tell()


class Visit:
    """One user with one video, from the request for it on."""

    def __init__(self, user: Product, wanted: Wanted, video: Video, begin: float) -> None:
        self.user, self.wanted, self.video = user, wanted, video
        self.rng, self.client = user.rng, user.client
        self.id: str | None = None
        self.reader, self.playout = FragmentReader(), Playout()
        self.poll_s = 1.0  # until the service wants to be asked again
        self._begin = begin

    def now(self) -> float:
        return time.perf_counter() - self._begin

    def tell(self) -> None:
        video, playout = self.video, self.playout
        video.first_fragment_s, video.stalls, video.stall_s = playout.first_at, playout.stalls, playout.stall_s
        video.cadence_s = playout.cadence
        video_ended.fire(video=asdict(video))

    # Asking

    @contextmanager
    def asking(
        self, method: str, path: str, name: str, allowed: tuple[int, ...] = (), **more: Any
    ) -> Iterator[ResponseContextManager]:
        """The answer, whose body has not been read. In locust's statistics it is `name`; a 429 is no failure there.

        Raises Failed if there is none, or neither a success nor one of `allowed`, or the body is cut off or broken;
        Refused for a 429 to the request for a video. One to a question about it is waited out, unless it is allowed.
        """
        options = {"catch_response": True, "stream": True, "timeout": (CONNECT_S, READ_S), **more}
        while True:
            with self.client.request(method, path, name=f"{method} {name}", **options) as response:
                try:
                    if response.status_code == 429 and 429 not in allowed:
                        retry_s = float(response.headers["Retry-After"])
                        response.success()
                        if self.id is None:
                            raise Refused(retry_s)
                    else:
                        if response.error is not None:
                            raise response.error
                        if not response.ok and response.status_code not in allowed:
                            raise Failed(f"{response.status_code} {response.text:.200}")
                        yield response
                        response.success()
                        return
                except (
                    RequestException,
                    BrokenFile,
                    Failed,
                    KeyError,
                ) as error:  # KeyError: what is promised is not there
                    response.failure(error)
                    raise Failed(f"{method} {name}: {error!r:.300}") from error
                finally:
                    if response.raw is not None:
                        response.close()  # of a body that was not read to its end: the connection too
            gevent.sleep(retry_s)

    def status(self) -> dict[str, Any]:
        """How the service says that the video stands; asked again for a while, as errors are counted all the same."""
        for _ in range(TRIES - 1):
            with suppress(Failed):
                return self.status_now()
            gevent.sleep(TRY_AGAIN_S)
        return self.status_now()

    def status_now(self) -> dict[str, Any]:
        with self.asking("GET", f"/v1/videos/{self.id}", "/v1/videos/{id}") as response:
            status: dict[str, Any] = response.json()
            self.poll_s = int(response.headers["openai-poll-after-ms"]) / 1000
            return status

    def body(self) -> dict[str, Any]:
        options, wanted = self.user.options, self.wanted
        body = {"prompt": wanted.prompt, "seconds": wanted.seconds, "seed": wanted.seed}
        body["priority"] = self.video.priority
        chosen = {"model": options.model, "size": options.size, "preset": options.preset}
        return body | {name: value for name, value in chosen.items() if value is not None}

    def accepted(self, video_id: str) -> None:
        self.id, self.video.accepted_s = video_id, self.now()

    def create(self) -> None:
        """A video that is made whether anybody watches or not."""
        with self.asking("POST", "/v1/videos", "/v1/videos", json=self.body()) as response:
            self.accepted(response.json()["id"])

    # Watching

    @contextmanager
    def live(self, begin: int = 0) -> Iterator[ResponseContextManager]:
        """The running video, from byte `begin` on, which may be a 416: there is no more."""
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        name = "/content, resumed" if begin else "/content, live"
        path, allowed = f"/v1/videos/{self.id}/content", (416,) if begin else ()
        with self.asking("GET", path, name, allowed, headers=headers) as response:
            if begin and response.status_code not in (206, 416):
                raise Failed(f"Range bytes={begin}- was answered with {response.status_code}; allowed: 206, 416")
            yield response

    def fragments(self, response: ResponseContextManager) -> Iterator[int]:
        """How many fragments have come, whenever one has."""
        count = 0
        for data in response.iter_content(PIECE_BYTES):
            complete = self.reader.feed(data)
            for frames in complete:
                self.playout.arrived(self.now(), frames / FPS)
            if complete:
                count += len(complete)
                yield count

    def to_the_end(self, response: ResponseContextManager) -> None:
        for _ in self.fragments(response):
            pass
        self.reader.check_whole()

    def seen(self) -> None:
        """The stream has ended: the service must say so too, of as many frames, and a share of the files is fetched
        again. Then the viewer sees what they have to its end."""
        self.video.ended_s = self.now()
        self.ended(self.status())
        if self.wanted.seed % CHECKED == 0 or self.video.kind == "return":
            self.compare()
        self.stay()

    def stay(self) -> None:
        gevent.sleep(max(0.0, self.playout.shown_until - self.now()))

    def ended(self, status: dict[str, Any]) -> None:
        """How the service says that the video ended. Raises Failed if that is not what was seen."""
        self.video.status = status["status"]
        if status["status"] != "completed":
            raise Failed(f"the stream has ended, and the video is {status['status']}; allowed: completed")
        if status["frames"] != self.reader.frames:
            raise Failed(f"{self.reader.frames} frames came; allowed: the {status['frames']} of the video")

    def compare(self) -> None:
        """The finished file, from its beginning, is what came before. Raises Failed if it is not."""
        again, begin = FragmentReader(), time.perf_counter()
        with self.asking("GET", f"/v1/videos/{self.id}/content", "/content, finished") as response:
            for data in response.iter_content(PIECE_BYTES):
                if again.feed(data) and self.video.deliver_s is None:
                    self.video.deliver_s = time.perf_counter() - begin
        if again.sha256 != self.reader.sha256:
            self.video.mismatch = True
            raise Failed(f"{self.reader.size} bytes came, and are not the {again.size} of the finished file")

    # The end

    def broke_off(self) -> None:
        """If more of the video was due, its viewer waits no longer for it."""
        if self.reader.frames < round(self.wanted.seconds * FPS):
            self.playout.broke_off(self.now() if self.video.ended_s is None else self.video.ended_s)

    def broke(self, error: Exception) -> None:
        """The video did not come: `failed` if it was not accepted or the service says that it failed, else `lost`."""
        self.broke_off()
        self.video.status, self.video.why = "lost", str(error)
        if self.id is None:
            self.video.status = "failed"
            return
        with suppress(Failed):
            status = self.status_now()
            if status["status"] == "failed":
                self.video.status, self.video.why = "failed", str(status["error"])

    def stopped(self) -> None:
        """The run is over, and the video perhaps not. One that cannot be asked for any more is lost."""
        self.broke_off()
        if self.id is None:
            self.video.why = "the request for it had no answer when the stop timeout was over"
            return
        try:
            status = self.status_now()["status"]
            self.video.status = status if status in ENDED else "unfinished"
        except Failed as error:
            self.video.status, self.video.why = "lost", str(error)


# What users do


def watch(visit: Visit) -> None:
    """Watches live, from the request to the end."""
    with visit.asking("POST", "/v1/videos/stream", "/v1/videos/stream", json=visit.body()) as response:
        visit.accepted(response.headers["X-Video-Id"])
        visit.to_the_end(response)
    visit.seen()


def image(visit: Visit) -> None:
    """The same, of a picture that is uploaded."""
    files = {"input_reference": ("picture.png", picture(visit.rng, visit.user.options.size), "image/png")}
    with visit.asking(
        "POST", "/v1/videos/stream", "/v1/videos/stream, an image", data=visit.body(), files=files
    ) as response:
        visit.accepted(response.headers["X-Video-Id"])
        visit.to_the_end(response)
    visit.seen()


def leave(visit: Visit) -> None:
    """Has seen enough before the end; the service is to stop what nobody watches, unless it is nearly made."""
    with visit.asking("POST", "/v1/videos/stream", "/v1/videos/stream", json=visit.body()) as response:
        visit.accepted(response.headers["X-Video-Id"])
        until_patience_ends(visit, response)
    until_ended(visit)
    video = visit.video
    assert video.ended_s is not None and video.left_at_s is not None
    after_s = video.ended_s - video.left_at_s
    if video.status == "completed" and after_s > LEFT_S:
        raise Failed(f"made to its end {after_s:.1f} s after its viewer left; allowed: cancelled, or in {LEFT_S:g} s")


def poll(visit: Visit) -> None:
    """Asks again and again how it stands, as often as the service says, and then fetches the file."""
    visit.create()
    until_ended(visit)
    with visit.asking("GET", f"/v1/videos/{visit.id}/content", "/content, finished") as response:
        for data in response.iter_content(PIECE_BYTES):
            visit.reader.feed(data)
    visit.reader.check_whole()
    visit.ended(visit.status())


def prompt(visit: Visit) -> None:
    """Watches live, and changes the prompt on the way."""
    visit.create()
    with visit.live() as response:
        fragments = visit.fragments(response)
        for _ in itertools.islice(fragments, 1):
            change(visit)
        for _ in fragments:
            pass
        visit.reader.check_whole()
    visit.seen()


def change(visit: Visit) -> None:
    body = {"prompt": visit.wanted.later, "transition_chunks": 1}
    path, name = f"/v1/videos/{visit.id}/prompt", "/v1/videos/{id}/prompt"
    allowed = (409, 429)  # all of it is made already; or this key has asked enough
    with visit.asking("POST", path, name, allowed, json=body, timeout=CONNECT_S) as response:
        visit.video.prompt_changed = response.ok


def come_back(visit: Visit) -> None:
    """Leaves in the middle, and comes back for the rest, if there is any."""
    visit.create()
    with visit.live() as response:
        until_patience_ends(visit, response)
    visit.stay()
    if visit.wanted.patience * CHUNK_S < visit.wanted.seconds:
        with visit.live(visit.reader.size) as response:
            if response.status_code == 416:  # the last fragments had come with the one at which they left
                visit.reader.check_whole()
            else:
                visit.to_the_end(response)
    visit.seen()


def until_patience_ends(visit: Visit, response: ResponseContextManager) -> None:
    for count in visit.fragments(response):
        if count >= visit.wanted.patience:
            visit.video.left_at_s = visit.now()
            visit.playout.went()
            return
    raise Failed(f"the stream ended with {visit.reader.frames} frames, before its viewer left")


def until_ended(visit: Visit) -> None:
    while (status := visit.status())["status"] not in ENDED:
        gevent.sleep(visit.poll_s)
    visit.video.status, visit.video.ended_s = status["status"], visit.now()
    if status["status"] == "failed":
        raise Failed("the video failed")


KINDS: dict[str, Callable[[Visit], None]] = {
    "watch": watch,
    "poll": poll,
    "prompt": prompt,
    "leave": leave,
    "return": come_back,
    "image": image,
}
