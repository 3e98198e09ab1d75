"""Idempotency-Key: a request that is sent again makes no second video, whenever and however often that happens."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.config import AppConfig
from deployments.director import Director, NoSuchVideo
from deployments.drafts import KEY
from deployments.records import StoredObject, VideoRequestRecord
from deployments.store import CLAIM_HOLDS_S, Claim, Store, StoreUnavailable, new_video_id
from deployments.tracing import Tracer
from tests.core import media_files
from tests.deployments.conftest import LocalService
from tests.deployments.test_bodies import BOUNDARY, form
from tests.deployments.test_content import BODY, delete, ended, get
from tests.deployments.test_director import Gate, GatedGraph, request

HOUR = 3600.0
NOW = 1_763_000_000.0
SHORT = {**BODY, "seconds": 1}  # one chunk
FORM = {name: str(value) for name, value in SHORT.items() if name != "steps"} | {"preset": "realtime"}
OF_FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
PNG = media_files.image("PNG")


async def post(service: LocalService, key: str, path: str = "", **wanted: Any) -> httpx.Response:
    """A POST with a key: of SHORT as JSON, unless something else is wanted."""
    return await service.http.post(
        f"/v1/videos{path}", headers={KEY: key, **wanted.pop("headers", {})}, **(wanted or {"json": SHORT})
    )


def video_of(answer: httpx.Response, replayed: bool) -> str:
    """The id of the video that was answered."""
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("idempotent-replayed") == ("true" if replayed else None)
    return str(answer.headers.get("x-video-id") or answer.json()["id"])


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert "idempotent-replayed" not in answer.headers
    return answer.status_code, error["code"], error["param"]


REUSED = (409, "idempotency_key_reused", KEY)


async def videos(service: LocalService) -> list[str]:
    return [video["id"] for video in (await service.http.get("/v1/videos", params={"limit": 100})).json()["data"]]


# The same request


async def test_the_same_request_gets_the_same_video_as_it_stands(service: LocalService) -> None:
    gate = service.graph.gate("sample 0")
    first = await post(service, "a key")
    video_id = video_of(first, replayed=False)
    again = await post(service, "a key")
    assert video_of(again, replayed=True) == video_id
    assert again.headers["traceparent"] != first.headers["traceparent"]
    gate.open()
    await ended(service, video_id)
    last = (await post(service, "a key")).json()
    assert (last["id"], last["status"], last["progress"]) == (video_id, "completed", 100)
    assert await videos(service) == [video_id]


async def test_another_key_or_none_is_another_video(service: LocalService) -> None:
    ids = {video_of(await post(service, key), replayed=False) for key in ("a", "A", "a a", "~" * 255)}
    ids |= {(await service.http.post("/v1/videos", json=SHORT)).json()["id"] for _ in range(2)}
    assert len(ids) == 6 and ids == set(await videos(service))


async def test_a_failed_video_is_answered_too(service: LocalService) -> None:
    service.graph.errors[SHORT["prompt"], "sample 0"] = ValueError("a bug")
    video_id = video_of(await post(service, "a"), replayed=False)
    await ended(service, video_id)
    again = await post(service, "a")
    assert (video_of(again, replayed=True), again.json()["status"]) == (video_id, "failed")


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "size": "64x64", "seconds": 1, "steps": [1, 1, 1]}',
        b'{ "steps":[1,1,1],"seconds":1, "size":"64x64","prompt":"\\u0061"}\n',
    ],
)
async def test_how_json_is_written_is_of_no_matter(service: LocalService, body: bytes) -> None:
    fields = {"prompt": "a", "seconds": 1, "size": "64x64", "steps": [1, 1, 1]}
    video_id = video_of(await post(service, "a", json=fields), replayed=False)
    again = await post(service, "a", content=body, headers={"content-type": "application/json"})
    assert video_of(again, replayed=True) == video_id


async def test_a_form_is_the_same_with_another_boundary(service: LocalService) -> None:
    """And with another name of its file, which is not believed anyway."""
    sent = {"data": FORM, "files": {"input_reference": ("a.png", PNG, "image/png")}}
    video_id = video_of(await post(service, "a", **sent), replayed=False)
    by_hand = form(*FORM.items(), files=[("input_reference", "b", PNG)])
    for again in (sent, {"content": by_hand, "headers": OF_FORM}):
        assert video_of(await post(service, "a", **again), replayed=True) == video_id

    for other in (
        {"data": FORM, "files": {"input_reference": PNG + b"\0"}},
        {"content": form(*FORM.items()), "headers": OF_FORM},
        {"data": {**FORM, "seed": "7"}, "files": {"input_reference": PNG}},
        {"data": FORM, "files": {"video": PNG}},
    ):
        assert refusal(await post(service, "a", **other)) == REUSED
    assert await videos(service) == [video_id]
    asked = await service.store.request(video_id)
    assert asked is not None and asked.input is not None
    assert await service.store.read(asked.input.key) == PNG


# Another request


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("", {**SHORT, "seed": 7}),
        ("", {**SHORT, "prompt": "another"}),
        ("", {name: value for name, value in SHORT.items() if name != "seconds"}),
        ("/stream", SHORT),
        ("/edits", SHORT),
    ],
)
async def test_a_key_is_for_one_request(service: LocalService, path: str, body: dict[str, Any]) -> None:
    key = "k" * 255
    video_id = video_of(await post(service, key), replayed=False)
    answer = await post(service, key, path, json=body)
    assert refusal(answer) == REUSED
    assert answer.headers["x-should-retry"] == "false"
    message = answer.json()["error"]["message"]
    assert message == f"{KEY} '{'k' * 76}... was used for another request; allowed: the same one, or a new key"
    assert await videos(service) == [video_id]


FROM_ANOTHER: dict[str, dict[str, Any]] = {
    "extend": {"seconds": 1},
    "fork": {"chunk": 1, "seconds": 2},
    "remix": {"prompt": "another sea"},
}


@pytest.mark.parametrize("how", FROM_ANOTHER)
async def test_a_video_that_comes_from_another(service: LocalService, how: str) -> None:
    """From the same one. That it is gone since is no reason to refuse what was accepted."""
    source, other = [video_of(await post(service, key, json={**SHORT, "seconds": 1.375}), False) for key in "ab"]
    for each in (source, other):
        await ended(service, each)
    body = FROM_ANOTHER[how]
    video_id = video_of(await post(service, "c", f"/{source}/{how}", json=body), replayed=False)
    assert video_of(await post(service, "c", f"/{source}/{how}", json=body), replayed=True) == video_id
    assert refusal(await post(service, "c", f"/{other}/{how}", json=body)) == REUSED
    await delete(service, source)
    assert video_of(await post(service, "c", f"/{source}/{how}", json=body), replayed=True) == video_id
    assert set(await videos(service)) == {other, video_id}


@pytest.mark.parametrize("route", ["/edits", "/extensions"])
async def test_a_video_that_comes_from_a_video(service: LocalService, route: str) -> None:
    source = video_of(await post(service, "a", json={**SHORT, "seconds": 1.375}), replayed=False)
    await ended(service, source)
    body = {**SHORT, "video": {"id": source}}
    video_id = video_of(await post(service, "b", route, json=body), replayed=False)
    assert video_of(await post(service, "b", route, json=body), replayed=True) == video_id


# Keys


@pytest.mark.parametrize("key", ["", "a" * 256, "a\tb", "é", "\x7f", "schlüssel", "鍵"])
async def test_what_is_no_key_is_refused(service: LocalService, key: str) -> None:
    for path in ("", "/stream", "/edits", f"/{new_video_id(1.0)}/remix"):
        answer = await service.http.post(f"/v1/videos{path}", json=SHORT, headers={KEY: key.encode()})
        assert refusal(answer) == (422, "invalid_input", KEY)
        message = answer.json()["error"]["message"]
        assert message.startswith(f"{KEY} is ") and message.endswith("allowed: 1 to 255 printable ASCII characters")
    assert await videos(service) == []


async def test_no_depth_of_nesting_is_too_much(service: LocalService) -> None:
    for depth in range(100, 1000, 7):
        nested = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
        answer = await post(service, "a", content=nested, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), (depth, answer.text)
    assert video_of(await post(service, "a"), replayed=False)


async def test_a_refused_request_does_not_use_its_key_up(service: LocalService) -> None:
    for wanted, status in (
        ({"json": {**SHORT, "seed": -1}}, 422),
        ({"json": {**SHORT, "model": "sora-2"}}, 404),
        ({"json": {**SHORT, "size": "64x65"}}, 422),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"a=b", "headers": {"content-type": "text/plain"}}, 415),
        ({"data": FORM, "files": {"input_reference": b"no image"}}, 400),
    ):
        assert (await post(service, "a", **wanted)).status_code == status
    source = new_video_id(1.0)
    assert (await post(service, "a", f"/{source}/extend", json={})).status_code == 404
    assert video_of(await post(service, "a"), replayed=False)


async def test_what_the_director_refuses_does_not_use_its_key_up(service: LocalService) -> None:
    """It alone knows which states are kept of a video."""
    source = video_of(await post(service, "a", json=BODY), replayed=False)
    await ended(service, source)
    for _ in range(2):
        refused = await post(service, "b", f"/{source}/fork", json={"chunk": 1})
        assert refused.status_code == 409 and "no state" in refused.json()["error"]["message"]
    fork = {"chunk": 3, "seconds": 5}
    video_id = video_of(await post(service, "b", f"/{source}/fork", json=fork), replayed=False)
    assert video_of(await post(service, "b", f"/{source}/fork", json=fork), replayed=True) == video_id


async def test_a_key_is_free_after_a_day(service: LocalService) -> None:
    first, now = video_of(await post(service, "a"), replayed=False), time.time()
    claim = await service.store.claimed("", "a", now)
    assert claim is not None and (claim.video_id, claim.outcome) == (first, "accepted")
    await service.store.claim("", "b", claim.digest, new_video_id(1.0), now - CLAIM_HOLDS_S - 1)
    second = video_of(await post(service, "b"), replayed=False)
    assert set(await videos(service)) == {first, second}
    assert refusal(await post(service, "b", json=BODY)) == REUSED


async def test_a_deleted_video_does_not_come_back(service: LocalService) -> None:
    video_id = video_of(await post(service, "a"), replayed=False)
    await delete(service, video_id)
    for _ in range(2):
        answer = await post(service, "a")
        assert refusal(answer) == (409, "video_deleted", KEY)
        assert video_id in answer.json()["error"]["message"]
    assert refusal(await post(service, "a", json=BODY)) == REUSED
    assert await videos(service) == []


# Many at once, and what dies on the way


async def test_many_at_once_make_one_video_for_each_key(service: LocalService) -> None:
    """Half of them with a file: each is stored by several of these requests."""
    image = {"data": FORM, "files": {"input_reference": PNG}}
    wanted: dict[str, dict[str, Any]] = {"a": {"json": SHORT}, "b": {"json": BODY}, "c": image, "d": image}
    answers = await asyncio.gather(*(post(service, key, **wanted[key]) for _ in range(10) for key in wanted))
    assert {answer.status_code for answer in answers} == {200}
    made = [(answer.json()["id"], "idempotent-replayed" in answer.headers) for answer in answers]
    four = await videos(service)
    assert len(four) == 4
    assert Counter(made) == {(each, replayed): 9 if replayed else 1 for each in four for replayed in (False, True)}
    assert b"helios_videos_accepted_total 4.0" in await service.director.metrics()
    for video_id in four:
        assert (await ended(service, video_id)).status == "completed"


async def digest_of(service: LocalService, **wanted: Any) -> str:
    """Of a request, as a claim holds it."""
    await post(service, "to see the digest", **wanted)
    claim = await service.store.claimed("", "to see the digest", time.time())
    assert claim is not None
    await delete(service, claim.video_id)
    return claim.digest


@pytest.mark.parametrize(
    "wanted", [{"json": SHORT}, {"data": FORM, "files": {"input_reference": PNG}}], ids=["text", "image"]
)
async def test_a_claim_whose_owner_died_is_taken_up(service: LocalService, wanted: dict[str, Any]) -> None:
    """By the next who asks, also if something was stored, and by nobody who asks for something else."""
    digest, video_id = await digest_of(service, **wanted), new_video_id(2.0)
    await service.store.claim("", "a", digest, video_id, time.time())
    await service.store.prepare(video_id)
    assert refusal(await post(service, "a", json=BODY)) == REUSED
    assert await videos(service) == []
    answers = await asyncio.gather(*(post(service, "a", **wanted) for _ in range(3)))
    assert {video_of(answer, replayed=True) for answer in answers} == {video_id}
    assert (await ended(service, video_id)).status == "completed"
    assert await videos(service) == [video_id]


async def test_a_video_whose_acceptance_nobody_heard_of(service: LocalService) -> None:
    """The ingress died when the Director had accepted it. From the next request on the claim knows."""
    digest = await digest_of(service)
    asked = request(chunks=1)
    await service.store.claim("", "a", digest, asked.id, time.time())
    await service.director.create(asked)
    await ended(service, asked.id)
    assert video_of(await post(service, "a"), replayed=True) == asked.id
    claim = await service.store.claimed("", "a", time.time())
    assert claim is not None and claim.outcome == "accepted"
    await delete(service, asked.id)
    assert refusal(await post(service, "a"))[1] == "video_deleted"


# Streams


async def test_a_stream_comes_again_from_its_start(service: LocalService) -> None:
    first = await post(service, "a", "/stream")
    again = await post(service, "a", "/stream")
    assert video_of(again, replayed=True) == video_of(first, replayed=False)
    assert again.content == first.content == (await get(service, video_of(first, False))).content


async def test_who_leaves_a_stream_may_come_back(service: LocalService) -> None:
    gate = service.graph.gate("sample 2")
    leaving = asyncio.create_task(post(service, "a", "/stream", json=BODY))
    await gate.reached.wait()
    (video_id,) = await videos(service)
    leaving.cancel()
    await asyncio.wait([leaving])
    back = asyncio.create_task(post(service, "a", "/stream", json=BODY))
    gate.open()
    assert video_of(await back, replayed=True) == video_id
    assert (await ended(service, video_id)).status == "completed"
    assert (await back).content == (await get(service, video_id)).content


async def test_a_stream_to_which_nobody_comes_back_is_cancelled(service: LocalService) -> None:
    """And comes no more: its key says so, where a response that is cut off would not."""
    gate = service.graph.gate("sample 2")
    leaving = asyncio.create_task(post(service, "a", "/stream", json=BODY))
    await gate.reached.wait()
    service.director._unwatched_s = 0.0
    (video_id,) = await videos(service)
    leaving.cancel()
    await asyncio.wait([leaving])
    await asyncio.wait([service.director._running[video_id].leading])
    assert (await ended(service, video_id)).status == "cancelled"
    answer = await post(service, "a", "/stream", json=BODY)
    assert refusal(answer)[:2] == (409, "video_cancelled") and video_id in answer.json()["error"]["message"]


# The Director: the same video, asked for by many


class ClosedStore(Store):
    """A Store at whose gate acceptances and the ends of deletions wait; the first `refusals` acceptances then fail."""

    def __init__(self, url: str, refusals: int) -> None:
        super().__init__(url)
        self.gate, self.refusals = Gate(), refusals

    async def accept(self, asked: VideoRequestRecord) -> None:
        await self._pass()
        self.refusals -= 1
        if self.refusals >= 0:
            raise StoreUnavailable("gone")
        await super().accept(asked)

    async def end(self, video_id: str) -> None:
        await self._pass()
        await super().end(video_id)

    async def _pass(self) -> None:
        self.gate.reached.set()
        await self.gate.opened.wait()


async def director_over(folder: Path, refusals: int = 0) -> tuple[Director, ClosedStore]:
    config = AppConfig(store=str(folder)).with_model("random")
    store = ClosedStore(config.store, refusals)
    return await Director.start(GatedGraph(config), store, Tracer("director")), store


@pytest.mark.parametrize("refusals", [0, 1, 2])
async def test_one_of_many_has_a_video_accepted(tmp_path: Path, refusals: int) -> None:
    director, store = await director_over(tmp_path, refusals)
    asked = request(chunks=1)
    asking = [asyncio.create_task(director.create(asked, again=True)) for _ in range(4)]
    await store.gate.reached.wait()
    asking += [asyncio.create_task(director.create(asked, again=True)) for _ in range(4)]
    store.gate.open()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(answer) for answer in answers].count(StoreUnavailable) == refusals
    assert b"helios_videos_accepted_total 1.0" in await director.metrics()
    while not (await director.news(asked.id, 1)).ended:
        pass
    assert (await director.create(asked, again=True)).status == "completed"
    assert await store.active() == [] and not director._accepting
    await director.stop()


async def test_an_input_that_went_with_a_failure_has_to_be_sent_again(tmp_path: Path) -> None:
    """Who failed removed what was stored for the video; another one had stored its input there before."""
    director, store = await director_over(tmp_path / "store", refusals=1)
    (tmp_path / "a.png").write_bytes(PNG)
    asked = request(chunks=1)

    async def with_input() -> VideoRequestRecord:
        await store.prepare(asked.id)
        media: StoredObject = await store.put_input(asked.id, tmp_path / "a.png")
        return asked.model_copy(update={"input": media})

    first = asyncio.create_task(director.create(await with_input()))
    await store.gate.reached.wait()
    second = asyncio.create_task(director.create(await with_input(), again=True))
    await asyncio.sleep(0)  # it waits for the first
    store.gate.open()
    await asyncio.wait([first, second])
    assert str(first.exception()) == "gone"
    assert isinstance(second.exception(), StoreUnavailable) and "send it again" in str(second.exception())
    assert (await director.create(await with_input(), again=True)).status == "queued"
    await director.stop()


async def test_a_caller_who_leaves_holds_up_nobody(tmp_path: Path) -> None:
    director, store = await director_over(tmp_path)
    asked = request(chunks=1)
    first, second = (asyncio.create_task(director.create(asked, again=True)) for _ in range(2))
    await store.gate.reached.wait()
    first.cancel()
    await asyncio.wait([first])
    store.gate.open()
    assert (await second).id == asked.id
    await director.stop()


async def test_a_video_that_is_being_deleted_is_not_accepted_again(tmp_path: Path) -> None:
    director, store = await director_over(tmp_path)
    store.gate.open()
    asked = request(chunks=1)
    await director.create(asked)
    await asyncio.wait([director._running[asked.id].leading])
    store.gate = Gate()
    deleting = asyncio.create_task(director.delete(asked.id))
    await store.gate.reached.wait()
    with pytest.raises(NoSuchVideo):
        await director.create(asked, again=True)
    store.gate.open()
    await deleting
    assert await store.video_ids() == await store.active() == []
    await director.stop()


# The store


def ids(count: int) -> list[str]:
    return [new_video_id(NOW) for _ in range(count)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_of_many_claims_one_holds(tmp_path: Path) -> None:
    stores = [Store(str(tmp_path)), Store(str(tmp_path))]
    some = ids(40)
    claims = await asyncio.gather(*(stores[k % 2].claim("", "a", "d", each, NOW) for k, each in enumerate(some)))
    assert len({claim.video_id for claim in claims}) == 1 and claims[0].video_id in some
    assert set(claims) == {await stores[0].claimed("", "a", NOW)}


def test_of_many_claims_of_many_threads_one_holds(tmp_path: Path) -> None:
    def claim(video_id: str) -> Claim:
        return asyncio.run(Store(str(tmp_path)).claim("", "a", "d", video_id, NOW))

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(claim, ids(24)))) == 1


async def test_a_claim_holds_for_a_day_and_is_then_followed_by_one(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (first,) = ids(1)
    claim = await store.claim("", "a", "d", first, NOW)
    assert claim == Claim(number=1, video_id=first, digest="d", created_at=NOW)
    late = NOW + CLAIM_HOLDS_S
    assert await store.claimed("", "a", late - 0.001) == claim
    assert await store.claimed("", "a", late) is None
    after = await asyncio.gather(*(store.claim("", "a", "e", each, late) for each in ids(20)))
    assert len(set(after)) == 1 and (after[0].number, after[0].digest) == (2, "e")
    assert await store.claimed("", "a", late) == after[0]


async def test_what_became_of_a_request_is_kept(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    claim = await store.claim("", "a", "d", *ids(1), NOW)
    await store.settle("", "a", claim, "accepted")
    kept = await store.claimed("", "a", NOW)
    assert kept == claim.model_copy(update={"outcome": "accepted"})
    await store.settle("", "a", claim, "refused")
    assert await store.claimed("", "a", NOW) is None
    after = await store.claim("", "a", "e", *ids(1), NOW)
    await store.settle("", "a", claim, "refused")  # by one who is late
    assert await store.claimed("", "a", NOW) == after


async def test_owners_and_keys_are_not_mixed_up(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    pairs = [("", "a"), ("a", ""), ("", "A"), ("a", "a"), ("", "../a"), ("", '", "a'), ("", "a/000001.json")]
    made = {pair: await store.claim(*pair, "d", *ids(1), NOW) for pair in pairs}
    assert len({claim.video_id for claim in made.values()}) == len(pairs)
    for pair, claim in made.items():
        assert await store.claimed(*pair, NOW) == claim
    assert len(list((tmp_path / "idempotency").iterdir())) == len(pairs)


class ForgettingStore(Store):
    """A Store whose first claim is removed between its listing and its reading."""

    forgotten = False

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if not self.forgotten:
            self.forgotten = True
            assert self.folder is not None
            (self.folder / key).unlink()
        return await super().read(key, start, end)


async def test_a_claim_that_goes_while_it_is_read_is_none(tmp_path: Path) -> None:
    await Store(str(tmp_path)).claim("", "a", "d", *ids(1), NOW)
    (other,) = ids(1)
    assert (await ForgettingStore(str(tmp_path)).claim("", "a", "d", other, NOW)).video_id == other


async def test_keys_that_were_not_used_for_long_are_forgotten(tmp_path: Path) -> None:
    """As a whole: a later claim goes by the number of the one before."""
    store, now = Store(str(tmp_path)), time.time()
    for key in ("old", "used again", "young"):
        await store.claim("", key, "d", *ids(1), now - 60 * HOUR)
    for path in files(tmp_path):
        os.utime(path, (now - 60 * HOUR, now - 60 * HOUR))
    again = await store.claim("", "used again", "d", *ids(1), now)
    young = await store.claim("", "young", "d", *ids(1), now)
    await store.forget_claims(now)
    assert len(list((tmp_path / "idempotency").iterdir())) == 2
    assert (await store.claimed("", "used again", now), await store.claimed("", "young", now)) == (again, young)
    assert (again.number, (await store.claim("", "old", "d", *ids(1), now)).number) == (2, 1)
    await store.forget_claims(now + 47 * HOUR)
    assert await store.claimed("", "young", now) == young
    await store.forget_claims(now + 49 * HOUR)
    await store.forget_claims(now + 49 * HOUR)
    assert list((tmp_path / "idempotency").iterdir()) == []
