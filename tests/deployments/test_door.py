"""Who comes in and what they see: every route with every kind of key and link, and what one owner can learn of
another's videos, which is nothing."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
from starlette.routing import Route

from deployments import contract
from deployments.admission import DAY_S
from deployments.config import Quota
from deployments.keys import Key, new_key
from deployments.store import new_video_id
from helios_core.config import CHUNK_FRAMES
from tests.core import media_files
from tests.deployments.conftest import LocalService, serving
from tests.deployments.test_content import BODY, ended, put_video

SHORT = {**BODY, "seconds": CHUNK_FRAMES / 24}  # one chunk
VIDEO = "/v1/videos/{video_id}"

# Every route: what is sent, and how who may ask is answered, of a video that is completed.
ROUTES: list[tuple[str, str, Any, int]] = [
    ("GET", "/", None, 200),
    ("GET", "/healthz", None, 200),
    ("GET", "/readyz", None, 200),
    ("GET", "/openapi.json", None, 200),
    ("GET", "/metrics", None, 200),
    ("GET", "/v1/models", None, 200),
    ("GET", "/v1/models/{model_id:path}", None, 200),
    ("GET", "/v1/videos", None, 200),
    ("POST", "/v1/videos", SHORT, 200),
    ("POST", "/v1/videos/stream", SHORT, 200),
    ("POST", "/v1/videos/edits", {"prompt": "a green moon", "video": {"id": "its"}}, 200),
    ("POST", "/v1/videos/extensions", {"prompt": "a green moon", "video": {"id": "its"}}, 200),
    ("GET", VIDEO, None, 200),
    ("GET", f"{VIDEO}/content", None, 200),
    ("GET", f"{VIDEO}/events", None, 200),
    ("GET", f"{VIDEO}/hls/index.m3u8", None, 200),
    ("GET", f"{VIDEO}/hls/init.mp4", None, 200),
    ("GET", f"{VIDEO}/hls/{{index}}.m4s", None, 200),
    ("POST", f"{VIDEO}/extend", {}, 200),
    ("POST", f"{VIDEO}/fork", {"chunk": 0}, 200),
    ("POST", f"{VIDEO}/remix", {"prompt": "a green moon"}, 200),
    ("POST", f"{VIDEO}/prompt", {"prompt": "a green moon"}, 409),
    ("POST", f"{VIDEO}/pause", None, 409),
    ("POST", f"{VIDEO}/resume", None, 409),
    ("POST", f"{VIDEO}/cancel", None, 200),
    ("DELETE", VIDEO, None, 200),
]
OPEN = {"/", "/healthz", "/readyz", "/openapi.json"}
SHARED = {f"{VIDEO}/{rest}" for rest in ("content", "events", "hls/index.m3u8", "hls/init.mp4", "hls/{index}.m4s")}


@dataclass
class Tenants:
    """A service with keys of `one` and `other`, and one for its metrics. `keys`: name ▸ what is sent, and the key."""

    service: LocalService
    keys: dict[str, tuple[str, Key]]

    async def send(self, method: str, path: str, who: str | None, body: Any = None, **headers: str) -> httpx.Response:
        token = {} if who is None else {"Authorization": f"Bearer {self.keys[who][0]}"}
        sent = {} if body is None else {"json": body}
        return await self.service.http.request(method, path, headers={**token, **headers}, **sent)


@asynccontextmanager
async def tenants(folder: Path, quota: Quota | None = None, **settings: Any) -> AsyncIterator[Tenants]:
    """`quota`: of `one`."""
    keys = {
        "one": new_key("one", "videos", quota),
        "other": new_key("other", "videos", None),
        "metrics": new_key(None, "metrics", None),
    }
    file = folder / "keys.json"
    file.write_text(json.dumps({"keys": [key.model_dump() for _, key in keys.values()]}))
    async with serving(folder, keys=str(file), **settings) as service:
        yield Tenants(service, {**keys, "wrong": ("helios_" + "x" * 43, keys["one"][1])})


def address(path: str, video_id: str) -> str:
    return path.replace("{model_id:path}", "random").format(video_id=video_id, index=0)


def link(shared: str, path: str, **changed: str) -> str:
    """Another path with the query of a `share_url`."""
    query = {name: value for name, (value,) in parse_qs(urlsplit(shared).query).items()}
    return f"{path}?{urlencode({**query, **changed})}"


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_every_route_with_every_key_and_link(tmp_path: Path) -> None:
    """One table. Nothing is read of who may not ask: a body is sent with each POST."""
    async with tenants(tmp_path) as service:
        app_routes = {
            (method, route.path)
            for route in service.service.app.routes
            if isinstance(route, Route)
            for method in (route.methods or ()) - {"HEAD"}
        }
        assert {(method, path) for method, path, _, _ in ROUTES} == app_routes
        video_id = (await service.send("POST", "/v1/videos", "one", SHORT)).json()["id"]
        await ended(service.service, video_id)
        shared = (await service.send("GET", f"/v1/videos/{video_id}", "one")).json()["share_url"]
        key = service.keys["one"][1]
        past = int(time.time()) - 1
        expired = {"expires": str(past), "signature": key.sign(video_id, past)}
        tampered = [
            {"signature": "0" * 64},
            {"signature": ""},
            {"signature": "ä"},
            {"expires": "9999999999"},
            {"expires": "nan"},
            {"key": service.keys["other"][1].id},
            {"key": service.keys["metrics"][1].id},
            {"key": "key_000000000000"},
        ]
        for method, path, body, right in ROUTES:
            at = address(path, video_id)
            if body is not None and body.get("video"):
                body = {**body, "video": {"id": video_id}}
            where = f"{method} {path}"
            for who in ("other", "wrong", "metrics", None):
                answer = await service.send(method, at, who, body)
                if path in OPEN:
                    assert answer.status_code == right, where
                elif who in ("wrong", None):
                    assert error_of(answer) == (401, "unauthorized"), where
                    assert answer.headers["www-authenticate"] == "Bearer", where
                elif (who == "metrics") != (path == "/metrics"):
                    assert error_of(answer) == (403, "forbidden"), where
                elif "{video_id}" in path or (body or {}).get("video"):
                    assert error_of(answer) == (404, "not_found"), where
                else:
                    assert answer.status_code == right, where
            for changed in ({}, expired, *tampered):
                answer = await service.service.http.request(method, link(shared, at, **changed))
                if path in OPEN:
                    assert answer.status_code == right, where
                elif path not in SHARED:
                    assert error_of(answer) == (401, "unauthorized"), where
                elif changed:
                    code = "link_expired" if changed is expired else "link_invalid"
                    assert error_of(answer) == (403, code), f"{where} {changed}"
                else:
                    assert answer.status_code == right, where
            answer = await service.send(method, at, "metrics" if path == "/metrics" else "one", body)
            assert answer.status_code == right, f"{where}: {answer.text}"
        last = await service.service.http.get(link(shared, f"/v1/videos/{video_id}/content"))
        assert error_of(last) == (404, "not_found")  # deleted


def test_the_contract_says_who_comes_in() -> None:
    told = {route.path.replace("{model_id}", "{model_id:path}"): route.access for route in contract.ROUTES}
    del told["/player/{path}"]  # the page's parts
    expected = {path: "open" if path in OPEN else "link" if path in SHARED else "key" for _, path, _, _ in ROUTES}
    assert told == {**expected, "/metrics": "metrics"}


async def test_a_link_of_one_video_opens_no_other(tmp_path: Path) -> None:
    async with tenants(tmp_path) as service:
        (one, _), (two, _) = [await put_video(service.service, owner="one", at=at) for at in (1.0, 2.0)]
        shared = (await service.send("GET", f"/v1/videos/{one}", "one")).json()["share_url"]
        assert error_of(await service.service.http.get(link(shared, f"/v1/videos/{two}/content"))) == (
            403, "link_invalid",
        )  # fmt: skip


async def test_a_link_is_the_same_for_an_hour_and_ends_with_its_key(tmp_path: Path) -> None:
    async with tenants(tmp_path, share_hours=2) as service:
        video_id, data = await put_video(service.service, owner="one")
        objects = [(await service.send("GET", f"/v1/videos/{video_id}", "one")).json() for _ in range(2)]
        (expires,) = parse_qs(urlsplit(objects[0]["share_url"]).query)["expires"]
        assert int(expires) % 3600 == 0 and 2 * 3600 <= int(expires) - time.time() <= 3 * 3600 + 1
        shared = objects[1]["share_url"]
        answer = await service.service.http.get(shared, headers={"Range": "bytes=3-"})
        assert (answer.status_code, answer.content) == (206, data[3:])
        thumbnail = await service.service.http.get(f"{shared}&variant=thumbnail")
        assert error_of(thumbnail) == (409, "not_possible")  # one of random bytes has none: it was let in
        left = [key.model_dump() for name, (_, key) in service.keys.items() if name == "other"]
        (tmp_path / "keys.json").write_text(json.dumps({"keys": left}))
        assert error_of(await service.service.http.get(shared)) == (403, "link_invalid")


async def test_a_link_leads_to_where_the_service_says_it_is(tmp_path: Path) -> None:
    async with tenants(tmp_path, public_url="https://video.example/helios/") as service:
        video_id, _ = await put_video(service.service, owner="one")
        shared = (await service.send("GET", f"/v1/videos/{video_id}", "one")).json()["share_url"]
        assert shared.startswith(f"https://video.example/helios/v1/videos/{video_id}/content?key=")


async def test_a_playlist_hands_its_link_on(tmp_path: Path) -> None:
    """Players ask for what a playlist names with no header and no query of their own."""
    async with tenants(tmp_path) as service:
        video_id, data = await put_video(service.service, owner="one")
        shared = (await service.send("GET", f"/v1/videos/{video_id}", "one")).json()["share_url"]
        base = f"/v1/videos/{video_id}/hls/"
        listed = (await service.service.http.get(link(shared, f"{base}index.m3u8"))).text
        names = [line for line in listed.splitlines() if not line.startswith("#")]
        init = listed.partition('URI="')[2].partition('"')[0]
        parts = [(await service.service.http.get(base + name)).content for name in (init, *names)]
        assert b"".join(parts) == data
        own = await service.send("GET", f"{base}index.m3u8", "one")
        assert "signature" not in own.text


async def test_foreign_videos_are_as_if_they_were_not(tmp_path: Path) -> None:
    """1,000 seeded pairs of a key and another's video, on a route that is drawn too: the same answer, byte for byte, as
    for an id that no video has; also to what names a video in its body."""
    rng = random.Random(7)
    async with tenants(tmp_path) as service:
        videos = {
            owner: [(await put_video(service.service, owner=owner, at=float(at)))[0] for at in range(1, 6)]
            for owner in ("one", "other")
        }
        asked = [row for row in ROUTES if "{video_id}" in row[1] or (row[2] or {}).get("video")]
        for _ in range(1000):
            who, whose = rng.choice([("one", "other"), ("other", "one")])
            method, path, body, _ = rng.choice(asked)
            answers = []
            for video_id in (rng.choice(videos[whose]), new_video_id(rng.uniform(1, 6))):
                sent = {**body, "video": {"id": video_id}} if (body or {}).get("video") else body
                answer = await service.send(method, address(path, video_id), who, sent, **{"X-Request-Id": "same"})
                kept = {name: value for name, value in answer.headers.items() if name != "traceparent"}
                answers.append((answer.status_code, kept, answer.text.replace(video_id, "ID")))
            assert answers[0] == answers[1]
            assert answers[0][0] == 404
        for owner, own in videos.items():
            page = await service.send("GET", "/v1/videos?limit=100", owner)
            assert [video["id"] for video in page.json()["data"]] == own[::-1]
            foreign = videos["other" if owner == "one" else "one"][2]
            after = await service.send("GET", f"/v1/videos?after={foreign}", owner)
            assert {video["id"] for video in after.json()["data"]} <= set(own)


async def test_the_same_idempotency_key_of_two_owners_makes_two_videos(tmp_path: Path) -> None:
    async with tenants(tmp_path) as service:
        answers = [
            await service.send("POST", "/v1/videos", who, SHORT, **{"Idempotency-Key": "k"})
            for who in ("one", "other", "one")
        ]
        ids = [answer.json()["id"] for answer in answers]
        assert ids[0] == ids[2] != ids[1]
        for video_id in ids[:2]:
            await ended(service.service, video_id)


async def test_what_was_deleted_is_listed_no_more_and_counts_for_a_day(tmp_path: Path) -> None:
    async with tenants(tmp_path) as service:
        store, now = service.service.store, time.time()
        old, _ = await put_video(service.service, owner="one", at=now - DAY_S - 60)
        new, _ = await put_video(service.service, owner="one", at=now - 60)
        kept, _ = await put_video(service.service, owner="one", at=now - 30)
        for video_id in (old, new):
            assert (await service.send("DELETE", f"/v1/videos/{video_id}", "one")).status_code == 200
        page = (await service.send("GET", "/v1/videos", "one")).json()
        assert [video["id"] for video in page["data"]] == [kept]
        assert await store.owned("one") == [kept]
        assert await store.spent("one", now - DAY_S) == dict.fromkeys((kept, new), 4.125)
        await store.forget_spent(now - 59)
        assert await store.spent("one", now - DAY_S) == {kept: 4.125}


async def test_a_video_that_cannot_be_read_can_be_deleted_by_who_it_is_of(tmp_path: Path) -> None:
    async with tenants(tmp_path) as service:
        video_id, _ = await put_video(service.service, owner="one")
        store = service.service.store
        (record,) = [item.key for item in await store.objects(video_id) if item.kind == "record"]
        await store._put(record, b'{"of": "another version"}')
        path = f"/v1/videos/{video_id}"
        assert error_of(await service.send("GET", path, "other")) == (404, "not_found")
        assert error_of(await service.send("DELETE", path, "other")) == (404, "not_found")
        edit = {"prompt": "a green moon", "video": {"id": video_id}}
        assert error_of(await service.send("POST", "/v1/videos/edits", "other", edit)) == (404, "not_found")
        assert error_of(await service.send("GET", path, "one")) == (409, "unreadable")
        assert (await service.send("DELETE", path, "one")).status_code == 200


async def test_requests_are_counted_by_the_minute_and_by_the_key(tmp_path: Path) -> None:
    async with tenants(tmp_path, Quota(requests_per_minute=3)) as service:
        answers = [await service.send("GET", "/v1/models", "one") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert error_of(answers[3]) == (429, "too_many_requests")
        assert 1 <= int(answers[3].headers["retry-after"]) <= 20
        assert (await service.send("GET", "/v1/models", "other")).status_code == 200


async def test_a_limit_of_its_own_leaves_a_key_the_other_ones(tmp_path: Path) -> None:
    configured = {"quota": {"requests_per_minute": 2, "seconds_per_day": 9.0}}
    async with tenants(tmp_path, Quota(seconds_per_day=1.0), admission=configured) as service:
        refused = await service.send("POST", "/v1/videos", "one", SHORT)
        assert error_of(refused) == (422, "invalid_input") and "at most 1," in refused.text
        answers = [await service.send("GET", "/v1/models", "one") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 429]


@pytest.mark.parametrize("origin, allowed", [("https://a.example", True), ("https://b.example", False)])
async def test_only_named_pages_may_ask(tmp_path: Path, origin: str, allowed: bool) -> None:
    async with tenants(tmp_path, cors_origins=["https://a.example"]) as service:
        wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        before = await service.service.http.options("/v1/videos", headers={"Origin": origin, **wish})
        assert before.headers.get("access-control-allow-origin") == (origin if allowed else None)
        answer = await service.send("GET", "/v1/models", "one", Origin=origin)
        assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
        assert "access-control-allow-credentials" not in {*answer.headers, *before.headers}


async def test_nothing_of_a_body_is_read_of_who_is_refused(tmp_path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"Content-Type": "application/json"}
    async with tenants(tmp_path, Quota(concurrent_videos=1)) as service:
        one = {**headers, "Authorization": f"Bearer {service.keys['one'][0]}"}
        gate = service.service.graph.gate("sample 0")
        first = await service.send("POST", "/v1/videos", "one", SHORT, **{"Idempotency-Key": "k"})
        for path in ("/v1/videos", "/v1/videos/stream", "/v1/videos/edits"):
            assert error_of(await service.service.http.post(path, content=body(), headers=headers))[0] == 401
            assert error_of(await service.service.http.post(path, content=body(), headers=one))[0] == 429
        again = await service.send("POST", "/v1/videos", "one", SHORT, **{"Idempotency-Key": "k"})
        assert again.json()["id"] == first.json()["id"]  # what was accepted is no second one
        gate.open()
        await ended(service.service, first.json()["id"])


async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    async def stuck(begun: bytes) -> AsyncIterator[bytes]:
        yield begun
        await asyncio.Event().wait()

    async with serving(tmp_path, max_body_seconds=0.5) as service:
        for kind, begun in (("application/json", b'{"prompt": '), ("multipart/form-data; boundary=x", b"--x")):
            answer = await service.http.post("/v1/videos", content=stuck(begun), headers={"Content-Type": kind})
            assert error_of(answer) == (408, "body_too_slow")
            assert answer.headers["connection"] == "close"


async def test_without_keys_everybody_sees_everything(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        video_id, data = await put_video(service, owner="one")
        video = (await service.http.get(f"/v1/videos/{video_id}")).json()
        assert video["share_url"] == f"http://helios/v1/videos/{video_id}/content"
        assert (await service.http.get(video["share_url"])).content == data
        assert [each["id"] for each in (await service.http.get("/v1/videos")).json()["data"]] == [video_id]


async def test_an_upload_of_a_refused_video_is_gone(tmp_path: Path) -> None:
    """It is stored before it is known that its key has nothing left of its day."""
    async with tenants(tmp_path, Quota(seconds_per_day=3)) as service:
        form = {"prompt": "x", "seconds": "2", "size": "64x64"}
        answers = [
            await service.service.http.post(
                "/v1/videos",
                data=form,
                files={"input_reference": ("a.png", media_files.image("PNG"), "image/png")},
                headers={"Authorization": f"Bearer {service.keys['one'][0]}"},
            )
            for _ in range(2)
        ]
        assert answers[0].status_code == 200 and error_of(answers[1]) == (429, "too_many_requests")
        await ended(service.service, answers[0].json()["id"])
        assert await service.service.store.video_ids() == [answers[0].json()["id"]]
