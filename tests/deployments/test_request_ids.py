"""Every answer tells the id of its request, and nothing of what is inside the service."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import httpx
import pytest
from ray.serve._private.constants import (
    SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)
from ray.serve._private.http_util import (
    _apply_middlewares,
    parse_disconnect_disabled_header,
    parse_request_timeout_header,
    parse_session_id_header,
)
from starlette.types import Receive, Scope, Send

from deployments.request_ids import before_serve
from tests.deployments.conftest import LocalService
from tests.deployments.test_content import BODY, put_video

UNKNOWN = "video_" + "0" * 32
FRESH = re.compile(r"[0-9a-f]{32}")
ANSWERS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "a list": ("GET", "/v1/videos", {}, 200),
    "a video": ("POST", "/v1/videos", {"json": BODY}, 200),
    "a stream": ("POST", "/v1/videos/stream", {"json": BODY}, 200),
    "events": ("GET", "/v1/videos/{id}/events", {}, 200),
    "no events": ("GET", "/v1/videos/{id}/events", {"headers": {"Last-Event-ID": "done"}}, 204),
    "a file": ("GET", "/v1/videos/{id}/content", {}, 200),
    "a part": ("GET", "/v1/videos/{id}/content", {"headers": {"Range": "bytes=1-"}}, 206),
    "a part that is not there": ("GET", "/v1/videos/{id}/content", {"headers": {"Range": "bytes=99999-"}}, 416),
    "a head": ("HEAD", "/v1/videos/{id}/content", {}, 200),
    "a playlist": ("GET", "/v1/videos/{id}/hls/index.m3u8", {}, 200),
    "the page": ("GET", "/", {}, 200),
    "a file of the page": ("GET", "/player/main.js", {}, 200),
    "metrics": ("GET", "/metrics", {}, 200),
    "no such video": ("GET", f"/v1/videos/{UNKNOWN}", {}, 404),
    "no such route": ("GET", "/v2", {}, 404),
    "no such file of the page": ("GET", "/player/none.js", {}, 404),
    "no such method": ("PUT", "/v1/videos", {}, 405),
    "no JSON": ("POST", "/v1/videos", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
    "no such type": ("POST", "/v1/videos", {"content": b"{}"}, 415),
    "a wrong field": ("POST", "/v1/videos", {"json": {"prompt": ""}}, 422),
    "a bug": ("GET", "/bug", {}, 500),
}


@pytest.fixture
async def http(service: LocalService) -> httpx.AsyncClient:
    """Of the service, to which a route with a bug was added; what a server would log does not reach the test."""

    @service.app.get("/bug")
    async def bug() -> None:
        raise RuntimeError("an inner detail")

    return httpx.AsyncClient(
        transport=httpx.ASGITransport(service.app, raise_app_exceptions=False), base_url="http://helios"
    )


async def asked(service: LocalService, http: httpx.AsyncClient, name: str, sent: str | None) -> httpx.Response:
    method, path, wanted, status = ANSWERS[name]
    video_id, _ = await put_video(service)
    headers = {**wanted.get("headers", {}), **({} if sent is None else {"X-Request-Id": sent})}
    answer = await http.request(method, path.format(id=video_id), **{**wanted, "headers": headers})
    assert answer.status_code == status
    return answer


@pytest.mark.parametrize("name", ANSWERS)
async def test_every_answer_tells_the_id_of_its_request(
    service: LocalService, http: httpx.AsyncClient, name: str
) -> None:
    answer = await asked(service, http, name, "client-7.Ab_")
    assert answer.headers.get_list("X-Request-Id") == ["client-7.Ab_"]
    fresh = await asked(service, http, name, None)
    assert FRESH.fullmatch(fresh.headers["X-Request-Id"])


@pytest.mark.parametrize("name", [name for name, answer in ANSWERS.items() if answer[3] >= 400 and answer[0] != "HEAD"])
async def test_an_error_tells_what_was_wrong_and_nothing_of_the_inside(
    service: LocalService, http: httpx.AsyncClient, name: str
) -> None:
    answer = await asked(service, http, name, None)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for inner in ("Traceback", "an inner detail", "Error", 'File "', ".py", str(service.trace_file.parent)):
        assert inner not in answer.text


@pytest.mark.parametrize("sent", ["a", "a" * 64, "0-_.Z"])
async def test_an_id_of_the_right_form_is_kept(service: LocalService, sent: str) -> None:
    answer = await service.http.get("/healthz", headers={"X-Request-Id": sent})
    assert answer.headers["X-Request-Id"] == sent


@pytest.mark.parametrize("sent", ["", " ", "a" * 65, "a b", "a/b", "ä", "\u0663", "a,b", "x\x7f", "{}"])
async def test_another_one_is_replaced(service: LocalService, sent: str) -> None:
    answer = await service.http.get("/healthz", headers={b"X-Request-Id": sent.encode()})
    assert FRESH.fullmatch(answer.headers["X-Request-Id"])


async def test_two_of_them_are_none(service: LocalService) -> None:
    answer = await service.http.get("/healthz", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    assert FRESH.fullmatch(answer.headers["X-Request-Id"])


async def test_no_two_requests_get_the_same_fresh_one(service: LocalService) -> None:
    answers = await asyncio.gather(*(service.http.get("/healthz") for _ in range(100)))
    assert len({answer.headers["X-Request-Id"] for answer in answers}) == 100


async def test_the_span_of_a_request_has_its_id(service: LocalService) -> None:
    await service.http.post("/v1/videos", json=BODY, headers={"X-Request-Id": "mine"})
    (span,) = service.spans()
    assert span["attributes"]["request_id"] == "mine"


@pytest.mark.parametrize(("name", "line"), [("a wrong field", "refused"), ("a bug", "request failed")])
async def test_log_lines_of_a_request_have_its_id(
    service: LocalService, http: httpx.AsyncClient, name: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deployments")
    await asked(service, http, name, "mine")
    (told,) = [record for record in caplog.records if record.message == line]
    assert vars(told)["request_id"] == "mine"


@pytest.mark.parametrize("sent", ["mine", "not an id", None])
async def test_there_is_one_id_behind_serves_own_proxy_too(service: LocalService, sent: str | None) -> None:
    """Which adds another header of this name, of what it was sent."""
    transport = httpx.ASGITransport(_apply_middlewares(service.app, before_serve()))
    async with httpx.AsyncClient(transport=transport, base_url="http://helios") as http:
        answer = await http.get("/healthz", headers={} if sent is None else {"X-Request-Id": sent})
    (told,) = answer.headers.get_list("X-Request-Id")
    assert told == "mine" if sent == "mine" else FRESH.fullmatch(told)


HTTPX = {b"host", b"accept", b"accept-encoding", b"connection", b"user-agent"}  # sends these by itself
ORDERS = (
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
    SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
)


@pytest.mark.parametrize("name", [spelt for name in ORDERS for spelt in (name, name.replace("_", "-"), name.upper())])
@pytest.mark.parametrize("value", [b"0.001", b"?1", b"\xff"])
async def test_serve_takes_no_orders_from_a_client(name: str, value: bytes) -> None:
    """What lies behind its proxy's middlewares reads them as Serve does, which fails at what is not UTF-8."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        assert parse_request_timeout_header(headers, None) is None
        assert not parse_disconnect_disabled_header(headers)
        assert parse_session_id_header(headers) == ""
        assert {b"x-mine", b"x-request-id"} == headers.keys() - HTTPX
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(_apply_middlewares(app, before_serve()))
    async with httpx.AsyncClient(transport=transport, base_url="http://helios") as http:
        sent = [(name.encode(), value), (b"X-Mine", b"kept")]
        assert (await http.get("/", headers=sent)).status_code == 204


def test_serve_would_fail_at_an_order_that_is_no_text() -> None:
    """Of which the one above is the mending: without, a client could make a 500."""
    with pytest.raises(UnicodeDecodeError):
        parse_session_id_header({SERVE_SESSION_ID.encode(): b"\xff"})
