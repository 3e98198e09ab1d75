"""One service takes over from another on the same store, while those who watch through the old one go on there.

Both run in this process, with replicas, Director and HTTP of their own. The old one's Director hears of the new one
when it commits, when somebody asks for news and there is none, or when it is asked for what only a leader can say.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from deployments.director import Director
from deployments.making import RunningVideo
from deployments.records import StoredObject, VideoRecord
from deployments.retention import Keep, Retention
from deployments.store import Retired, Store, StoreUnavailable, Superseded, new_video_id, term_of
from tests.deployments.conftest import LocalService, serving
from tests.deployments.test_content import BODY, ended, get, only_video, put_video
from tests.deployments.test_director import Gate, request
from tests.deployments.test_events import parsed

OLD, NEW = "old", "new"
SAME = {**BODY, "seed": 1}

Begin = Callable[[str], Awaitable[LocalService]]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.content.ASK_AGAIN_S", 0.0)
    monkeypatch.setattr("deployments.following.LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr("deployments.following.NEWS_S", 0.0)  # asks, and so notes its viewers, again and again


@pytest.fixture
async def begin(tmp_path: Path) -> AsyncIterator[Begin]:
    """Starts a service of this name over the one store. Nothing ends for want of time."""
    async with AsyncExitStack() as stack:

        async def begin(name: str) -> LocalService:
            service = await stack.enter_async_context(serving(tmp_path, service=name, unwatched_s=3600.0))
            service.director._unwatched_s = 3600.0
            return service

        yield begin


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of SAME, if nothing happens to it."""

    async def run() -> bytes:
        async with serving(tmp_path_factory.mktemp("undisturbed")) as service:
            return (await service.http.post("/v1/videos/stream", json=SAME)).content

    return asyncio.run(run())


async def content(service: LocalService, video_id: str) -> httpx.Response:
    return await get(service, video_id)


async def events(service: LocalService, video_id: str) -> httpx.Response:
    return await service.http.get(f"/v1/videos/{video_id}/events")


async def one_chunk(service: LocalService, video_id: str) -> None:
    """Returns when the video has one."""
    while not (await service.director.news(video_id, 0)).chunks:
        pass


async def running(service: LocalService) -> str:
    """A video that has one chunk, and waits before the second."""
    gate = service.graph.gate("sample 1")
    video_id = str((await service.http.post("/v1/videos", json=SAME)).json()["id"])
    await gate.reached.wait()
    await one_chunk(service, video_id)
    return video_id


async def streamed(service: LocalService) -> tuple[str, asyncio.Task[httpx.Response]]:
    """The same, but made for the one who asked; and what they get."""
    gate = service.graph.gate("sample 1")
    answer = asyncio.create_task(service.http.post("/v1/videos/stream", json=SAME))
    await gate.reached.wait()
    video_id = await only_video(service)
    await one_chunk(service, video_id)
    return video_id, answer


async def watched(
    service: LocalService, watch: Callable[[LocalService, str], Awaitable[httpx.Response]]
) -> tuple[str, asyncio.Task[httpx.Response]]:
    """The same, and what somebody gets who watches it."""
    video_id = await running(service)
    video = service.director._running[video_id]
    answer = asyncio.ensure_future(watch(service, video_id))
    while not video.watchers:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return video_id, answer


async def noted(store: Store, video_id: str, after: float = 0.0) -> float:
    """When viewers were noted for the first time after that."""
    while (at := await store.noted_watched(video_id)) <= after:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return at


def terms(record: VideoRecord) -> list[int]:
    """Which term made each chunk."""
    return [term_of(chunk.fragment.key) for chunk in record.chunks]


def read(service: LocalService, video_id: str) -> set[tuple[str, int]]:
    """Each fragment that was read through this service, and the term that made it."""
    keys = {key for key, _, _ in service.store.reads if key.startswith(f"videos/{video_id}/chunks/")}
    return {(Path(key).name[:5], term_of(key)) for key in keys}


async def as_the_clock_would(director: Director, video: RunningVideo) -> None:
    """The time without a viewer is over."""
    director._cancel_unwatched(video)
    await asyncio.wait(set(video.changes))


# Those who watch


@pytest.mark.parametrize(
    ("watch", "commits"),
    [(content, True), (events, True), (None, True), (None, False)],
    ids=["content", "events", "stream", "stream, and nothing is committed"],
)
async def test_a_viewer_of_the_old_service_gets_all_of_it(
    begin: Begin,
    monkeypatch: pytest.MonkeyPatch,
    whole: bytes,
    watch: Callable[[LocalService, str], Awaitable[httpx.Response]] | None,
    commits: bool,
) -> None:
    """Whether the old Director finds at its next commit that it leads no more, or has none for as long as they watch:
    what it made of the second chunk is nobody's."""
    old = await begin(OLD)
    if not commits:
        monkeypatch.setattr("deployments.director.NEWS_S", 0.05)
    video_id, answer = await (streamed(old) if watch is None else watched(old, watch))
    new = await begin(NEW)
    made_anew = new.graph.gate("sample 1")
    await made_anew.reached.wait()
    if commits:
        old.graph.gate("sample 1").open()
    await noted(old.store, video_id)
    made_anew.open()
    record = await ended(new, video_id)
    got = await answer
    assert (record.status, terms(record)) == ("completed", [1, 2, 2])
    assert (await get(new, video_id)).content == whole
    if watch is events:
        told = parsed(got.text)
        assert [event_id for _, event_id, _ in told] == ["0", "1", "2", "done"]
        assert told[-1][2]["bytes"] == len(whole)
    else:
        assert got.content == whole
        assert read(old, video_id) == {("00000", 1), ("00001", 2), ("00002", 2)}
    old.director.check_health()
    new.director.check_leads()


async def test_a_chunk_that_both_made_is_told_as_the_new_director_has_it(begin: Begin) -> None:
    """The old one puts a chunk before it finds that it leads no more; the new one makes it to another prompt."""
    old = await begin(OLD)
    video_id, answer = await watched(old, content)
    new = await begin(NEW)
    before = new.graph.gate("encode")
    await before.reached.wait()
    old.graph.gate("sample 1").open()
    await noted(old.store, video_id)
    stale = await old.store.record(video_id)
    assert stale is not None and terms(stale) == [1, 1]
    changed = await new.http.post(f"/v1/videos/{video_id}/prompt", json={"prompt": "a green sun over a black sea"})
    assert changed.json()["chunk"] == 1
    before.open()
    assert terms(await ended(new, video_id)) == [1, 2, 2]
    assert (await answer).content == (await get(new, video_id)).content
    assert read(old, video_id) == {("00000", 1), ("00001", 2), ("00002", 2)}


async def test_an_end_that_the_new_director_does_not_know_is_none(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one puts that a video was cancelled, and only then finds that it leads no more."""
    monkeypatch.setattr("deployments.director.NEWS_S", 3600.0)  # as no viewer's question makes it look
    old = await begin(OLD)
    video_id, answer = await watched(old, content)
    new = await begin(NEW)
    gate = new.graph.gate("sample 1")
    await gate.reached.wait()
    with pytest.raises(Retired):
        await old.director.cancel(video_id)
    stale = await old.store.record(video_id)
    assert stale is not None and stale.status == "cancelled"
    await noted(old.store, video_id)
    gate.open()
    assert (await ended(new, video_id)).status == "completed"
    assert (await answer).content == (await get(new, video_id)).content


async def test_a_deleted_video_is_cut_off_at_the_old_service(begin: Begin) -> None:
    """As cancelled, which it is before it is gone, if the ingress happens to look then."""
    old = await begin(OLD)
    video_id, answer = await watched(old, events)
    new = await begin(NEW)
    await new.graph.gate("sample 1").reached.wait()
    old.graph.gate("sample 1").open()
    await noted(old.store, video_id)
    await new.director.delete(video_id)
    assert parsed((await answer).text)[-1][2]["code"] in ("not_found", "cancelled")


# Made while watched


async def test_a_viewer_of_the_old_service_keeps_a_video_from_being_cancelled(begin: Begin) -> None:
    old = await begin(OLD)
    video_id, answer = await streamed(old)
    new = await begin(NEW)
    await new.graph.gate("sample 1").reached.wait()
    old.graph.gate("sample 1").open()
    video = new.director._running[video_id]
    for _ in range(3):
        assert video.noted is not None
        await noted(old.store, video_id, after=video.noted)  # since the new Director looked, not since this test did
        await as_the_clock_would(new.director, video)
        assert not video.cancelled
    answer.cancel()
    await asyncio.wait([answer])
    while not video.cancelled:  # what was noted before they left counts once
        await as_the_clock_would(new.director, video)
    assert (await ended(new, video_id)).status == "cancelled"


async def test_nobody_can_say_that_a_video_is_unwatched_while_the_store_is_away(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await begin(OLD)
    asked = request().model_copy(update={"while_watched": True})
    old.graph.gate("sample 0")
    await old.director.create(asked)
    new = await begin(NEW)
    await new.graph.gate("sample 0").reached.wait()
    video = new.director._running[asked.id]

    async def away(video_id: str) -> float:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(new.store, "noted_watched", away)
        await as_the_clock_would(new.director, video)
    assert not video.cancelled
    await as_the_clock_would(new.director, video)
    assert video.cancelled


async def test_a_video_that_is_made_no_further_ahead_than_its_lead_goes_on(begin: Begin) -> None:
    """The new Director, of which nobody asks for it, does not wait for a first viewer."""
    old = await begin(OLD)
    old.graph.gate("sample 0")
    video_id = (await old.http.post("/v1/videos", json={**SAME, "lead_seconds": 0.5})).json()["id"]
    new = await begin(NEW)
    await asyncio.gather(*new.director._resuming.values())
    assert math.isfinite(new.director._running[video_id].playback.wait(60.0, asyncio.get_running_loop().time()))


async def test_who_watches_what_has_ended_leaves_nothing_behind(begin: Begin) -> None:
    old = await begin(OLD)
    video_id, _ = await put_video(old)
    await begin(NEW)
    with pytest.raises(Retired):
        await old.director.ready()
    playlist = await old.http.get(f"/v1/videos/{video_id}/hls/index.m3u8")
    assert (playlist.status_code, "#EXT-X-ENDLIST" in playlist.text) == (200, True)
    nobodys = await old.http.get(f"/v1/videos/{new_video_id(2.0)}/hls/index.m3u8")
    assert nobodys.status_code == 404
    assert not await old.store._names("watched")


async def test_what_was_noted_of_ended_videos_is_swept(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    term = await store.claim_term()
    active, over = new_video_id(1.0), new_video_id(2.0)
    await store.prepare(active)
    for video_id in (active, over):
        await store.note_watched(video_id)

    async def delete(video_id: str) -> None:
        raise AssertionError(f"{video_id} is not to be deleted")

    await Retention(store, term, Keep(), delete).sweep(3.0)
    assert await store._names("watched") == [active]


# Who leads


async def refused(service: LocalService) -> None:
    """It takes nothing on, and is not to be replaced."""
    ready = await service.http.get("/readyz")
    asked = await service.http.post("/v1/videos", json=SAME)
    assert [(answer.status_code, answer.headers["retry-after"]) for answer in (ready, asked)] == [(503, "5")] * 2
    assert asked.json()["error"]["code"] == "superseded"
    service.director.check_health()
    with pytest.raises(Retired):
        service.director.check_leads()


async def test_a_director_of_the_old_service_that_starts_again_leads_nothing(begin: Begin) -> None:
    old = await begin(OLD)
    video_id = await running(old)
    new = await begin(NEW)
    gate = new.graph.gate("sample 1")
    await gate.reached.wait()
    again = await begin(OLD)
    assert await new.store.newest_term() == 2
    assert not again.director._running and not again.director._resuming and again.director._sweeping is None
    await refused(again)
    viewer = asyncio.create_task(again.http.get(f"/v1/videos/{video_id}/hls/index.m3u8"))
    await noted(new.store, video_id)
    gate.open()
    assert terms(await ended(new, video_id)) == [1, 2, 2]
    assert (await viewer).status_code == 200
    new.director.check_leads()
    assert (await new.http.get("/readyz")).status_code == 200


async def test_the_old_service_takes_on_nothing_and_leaves_nothing_behind(begin: Begin) -> None:
    """Though its Director, which has nothing to commit, did not hear of the new one before."""
    old = await begin(OLD)
    await begin(NEW)
    asked = await old.http.post("/v1/videos", json=SAME)
    assert (asked.status_code, asked.headers["retry-after"]) == (503, "5")
    assert await old.store.video_ids() == [] and await old.store.active() == []
    await refused(old)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_the_old_service_says_nothing_of_what_the_new_one_makes(begin: Begin, method: str) -> None:
    old = await begin(OLD)
    new = await begin(NEW)
    video_id = await running(new)
    answer = await old.http.request(method, f"/v1/videos/{video_id}")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    new.graph.gate("sample 1").open()
    assert (await ended(new, video_id)).status == "completed"


async def test_the_old_service_deletes_nothing_that_was_taken_over(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one takes it over while the old one puts that it was cancelled."""
    old = await begin(OLD)
    video_id = await running(old)
    put_record, putting = old.director._patient.put_record, Gate()

    async def held(record: VideoRecord, term: int) -> None:
        putting.reached.set()
        await putting.opened.wait()
        await put_record(record, term)

    monkeypatch.setattr(old.director._patient, "put_record", held)
    deleting = asyncio.create_task(old.director.delete(video_id))
    await putting.reached.wait()
    new = await begin(NEW)
    await new.director.news(video_id, 0)  # it was taken up
    putting.open()
    with pytest.raises(Retired):
        await deleting
    assert (await ended(new, video_id)).status == "completed"


async def test_a_superseded_director_of_the_same_service_is_to_be_replaced(begin: Begin) -> None:
    first = await begin(OLD)
    video_id = await running(first)
    second = await begin(OLD)
    first.graph.gate("sample 1").open()
    await asyncio.wait([first.director._running[video_id].leading])
    with pytest.raises(Superseded) as superseded:
        first.director.check_health()
    assert not isinstance(superseded.value, Retired)
    assert terms(await ended(second, video_id)) == [1, 2, 2]
    second.director.check_leads()


# The race for a term


class RacingStore(Store):
    """A Store that waits before it claims a term."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.claiming = Gate()

    async def _put(self, key: str, data: bytes, mode: str = "overwrite") -> StoredObject:
        if key.startswith("terms/"):
            self.claiming.reached.set()
            await self.claiming.opened.wait()
        return await super()._put(key, data, mode)


@pytest.fixture(params=["tmp_path", "bucket"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


async def test_the_dying_service_comes_too_late(url: str) -> None:
    store, dying = Store(url), RacingStore(url)
    assert await store.claim_term(OLD) == 1
    claiming = asyncio.create_task(dying.claim_term(OLD))
    await dying.claiming.reached.wait()
    assert await store.claim_term(NEW) == 2
    dying.claiming.open()
    with pytest.raises(Retired, match="service new leads with term 2"):
        await claiming
    assert await store.newest_term() == 2
    await store.check_leads(2)


async def test_the_dying_service_comes_just_before(url: str) -> None:
    store, coming = Store(url), RacingStore(url)
    assert await store.claim_term(OLD) == 1
    claiming = asyncio.create_task(coming.claim_term(NEW))
    await coming.claiming.reached.wait()
    assert await store.claim_term(OLD) == 2
    coming.claiming.open()
    assert await claiming == 3
    with pytest.raises(Retired):
        await store.check_leads(2)
    with pytest.raises(Retired):
        await store.claim_term(OLD)
    assert await store.claim_term(NEW) == 4
    with pytest.raises(Superseded) as superseded:
        await store.check_leads(3)
    assert not isinstance(superseded.value, Retired)


async def test_whoever_claimed_a_term_has_led_though_it_died_then(url: str) -> None:
    store = Store(url)
    assert not await store.has_led(OLD)
    await store._put("terms/000001", OLD.encode(), mode="create")
    assert await store.has_led(OLD) and not await store.has_led(NEW)


# A store of the version before, whose terms name no service


async def test_terms_that_name_no_service_retire_nobody(url: str) -> None:
    """A service of that version knows of no other, and takes over again as long as it is there; then somebody must."""
    store = Store(url)
    await store._put("terms/000007", b"", mode="create")
    assert await store.claim_term(NEW) == 8
    await store._put("terms/000009", b"", mode="create")
    with pytest.raises(Superseded) as superseded:
        await store.check_leads(8)
    assert not isinstance(superseded.value, Retired)
    assert await store.claim_term(NEW) == 10


async def test_a_video_of_the_version_before_is_taken_over(begin: Begin, tmp_path: Path, whole: bytes) -> None:
    old = await begin(OLD)
    old.graph.gate("sample 1")
    video_id, answer = await streamed(old)
    (tmp_path / "store" / "terms" / "000001").write_bytes(b"")
    await old.director.stop()
    answer.cancel()
    new = await begin(NEW)
    assert terms(await ended(new, video_id)) == [1, 2, 2]
    assert (await get(new, video_id)).content == whole
