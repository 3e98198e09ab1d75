"""Requests that nobody would write, by the thousand: each gets an answer that the contract has, and none is a 5xx.

Each of `corpus/` is a request that was right, or one that once found a bug: all are sent as they are, and then spoilt:
body, headers, path and query. They go to the service in this process as a server hands them over, since an HTTP client
would mend some, and over connections to a real one. What Schemathesis asks after the contract is in test_contract.py,
spoilt uploads are in test_uploads.py and tests/core/test_read.py. `FUZZ=10000` tries so many requests and prompts in
place of 100 (`make fuzz`); case n is the same in every run.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import random
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from ray.serve._private.http_util import _apply_middlewares

from deployments.contract import ROUTES
from deployments.errors import CutOff
from deployments.keys import new_key
from deployments.logs import shown
from deployments.records import Call
from deployments.request_ids import FORM as REQUEST_ID
from deployments.request_ids import before_serve
from tests.deployments.conftest import LocalService, serving
from tests.deployments.listening import listening
from tests.deployments.test_content import BODY, SIZES, put_video
from tests.deployments.test_director import ANY, TRACEPARENT

FUZZ = int(os.environ.get("FUZZ", "60"))
CORPUS = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "corpus").glob("*.http"))}
SELDOM = ("create-upload", "edit-upload")  # each starts a process to read the file
INSIDE = re.compile(r'Traceback|File "|\.py\b|Error\(|0x[0-9a-f]{8}')

OWNER = "acme"
HELD = "a video that waits"
KEY = ((b"authorization", b"Bearer @token@"),)
AS_JSON = (b"content-type", b"application/json")
Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Request:
    """As it comes over the wire, its path and query still percent-encoded."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes

    @classmethod
    def read(cls, text: bytes) -> Request:
        head, _, body = text.partition(b"\n\n")
        line, *headers = head.split(b"\n")
        method, target = line.split(b" ", 1)
        return cls(
            method, target, tuple((name, value) for name, _, value in (h.partition(b": ") for h in headers)), body
        )


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Headers
    body: bytes

    def header(self, name: bytes) -> list[bytes]:
        return [value for each, value in self.headers if each == name]


# ── how a request is spoilt ──────────────────────────────────────────────────

TEXTS = [
    "", " ", "\0", "a\0b", "\x1b[31mred\x1b[0m", "\r\nX-Evil: 1", "\u202ereversed\u202c", "\ufeff",
    "\u200b\u200d\u2060", "e" + "\u0301" * 4000, "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 40, "\ud800",
    "\udfff\ud800", "\U0010ffff\ufffe", "ﷺ" * 500, "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A", "' OR 1=1 --", "${jndi:ldap://x}",
    "{{7*7}}", "%s%n%x", "../../etc/passwd", "<script>alert(1)</script>", "null", "NaN", "1e309", "-0", "0x10", "٣",
    "9" * 400, "a" * 9000, "file:///etc/passwd", "http://169.254.169.254/", "video_" + "0" * 32,
    "&lt;script&gt;" * 50, "\\u0000", "\U0001d4b3" * 2048, "日本" * 1000, "\x85\u2028\u2029", "\x7f\x80\x9f",
]  # fmt: skip
VALUES: list[Any] = [
    *TEXTS, None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 1e-320, 1.5,
    float("inf"), float("nan"), [], {}, [[]], [None] * 70, {"": ""}, {"id": None}, [1, "1", 1.0], {"__proto__": {}},
    [{"at_seconds": -1, "prompt": ""}],
]  # fmt: skip
HEADERS: dict[bytes, list[bytes]] = {
    b"range": [
        b"bytes=0-0", b"bytes=-1", b"bytes=-0", b"bytes=5-2", b"bytes=1-2,4-5", b"bytes=" + b"9" * 5000 + b"-",
        b"bytes=\xb2-", b"lines=1-2", b"bytes", b"bytes=-", b"bytes=99999999999-",
    ],
    b"if-range": [b'"x"', b'W/"x"', b"Mon, 30 Nov 2026 00:00:00 GMT", b""],
    b"if-none-match": [b"*", b'"x", W/"y"', b'"' * 3000, b"\xff"],
    b"idempotency-key": [b"k", b"", b" ", b"k" * 255, b"k" * 256, b"\xff\xfe", b"a, b", b"../../x", b"%00"],
    b"x-request-id": [b"", b"a" * 64, b"a" * 65, b"../x", b"\xff", b"a b", b"a\x0bb"],
    b"traceparent": [
        b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"ff-" + b"a" * 32 + b"-" + b"b" * 16 + b"-ff", b"00-zz",
        b"00-" + b"A" * 32 + b"-" + b"B" * 16 + b"-00", b"\xff" * 55, b"0" * 9000,
    ],
    b"tracestate": [b"a=b", b"=" * 600, b"\xff=\xff"],
    b"content-type": [
        b"", b"application/json; charset=utf-16", b"multipart/form-data", b"multipart/form-data; boundary=",
        b'multipart/form-data; boundary="b0undary', b"multipart/form-data; boundary=" + b"b" * 300,
        b"application/x-www-form-urlencoded", b"text/plain", b"application/json" + b"\xff", b";;;",
        b"multipart/form-data; boundary=b0undary; charset=zlib",
    ],
    b"content-length": [b"0", b"-1", b"99999999999999999999999999", b"1e3", b"\xb2", b"", b"12"],
    b"content-encoding": [b"gzip", b"br"],
    b"transfer-encoding": [b"chunked", b"gzip, chunked"],
    b"last-event-id": [b"0", b"done", b"-1", b"1-prompt", b"00", b"9" * 400, b"\xff", b"", b"0-prompt", b"1\x0b"],
    b"authorization": [
        b"", b"Bearer", b"Bearer ", b"bearer helios_x", b"Basic YTpi", b"Bearer \xff\xfe", b"Bearer " + b"x" * 9000,
        b"Bearer a b c",
    ],
    b"host": [
        b"", b"[", b"[::1", b"a b", b"evil.example/x?y#z", b"x:99999999", b"\xff\xfe", b"@", b"a" * 5000, b"x:y:z",
        b"[::1]:80",
    ],
    b"accept": [b"*/*", b"", b"image/png;q=2", b"\xff", b"," * 3000],
    b"origin": [b"null", b"https://a.example", b"\xff", b"a" * 3000],
    b"access-control-request-method": [b"TRACE", b"", b"\xff"],
    b"access-control-request-headers": [b"x", b"authorization", b"," * 500],
    b"if-modified-since": [b"x", b"Mon, 99 Nov 2026", b"Mon, 30 Nov 9999999 00:00:00 GMT", b"\xff"],
    b"expect": [b"100-continue"],
    b"connection": [b"upgrade", b"close"],
    b"upgrade": [b"websocket", b"h2c"],
    b"cookie": [b"a=b", b";" * 3000],
    b"x-forwarded-host": [b"evil.example"],
    b"x-http-method-override": [b"DELETE"],
}  # fmt: skip
SEGMENTS = [
    b"..", b".", b"", b"%2e%2e", b"..%2f..%2fetc%2fpasswd", b"%00", b"%ff", b"%", b"%zz", b"video_" + b"0" * 32,
    b"video_" + b"A" * 32, b"v" * 9000, b"%F0%9F%98%80", b"*", b"~", b"a;b", b"a%3Fb", b"%0d%0aX-Evil:1", b"stream",
    b"content", b"hls", b"-1.m4s", b"99999.m4s", b"init.mp4", b"1%00.m4s", b"@completed@", b"@held@", b"\\..\\..",
    b"metrics", b"player", b"openapi.json",
]  # fmt: skip
QUERIES = [
    b"limit", b"order", b"after", b"variant", b"partial", b"key", b"expires", b"signature", b"x", b"", b"%ff",
    b"n" * 5000, b"a[]",
]  # fmt: skip
WORDS = [
    b"", b"1", b"0", b"-1", b"true", b"false", b"thumbnail", b"asc", b"%00", b"%ff", b"9" * 500, b"1.0",
    b"@completed@", b"..%2f", b"%F0%9F%98%80", b"+", b"%",
]  # fmt: skip
METHODS = [
    b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"get", b"X" * 50,
]  # fmt: skip
TOKENS = [
    b"\0", b"\xff\xfe", b"[", b"]", b"{", b"}", b'"', b"\\", b"\r\n", b"--b0undary", b"--b0undary--\r\n",
    b"[" * 5000, b'{"a":' * 900, b"\\ud800", b"NaN", b"1e309", b"-", b",", b":",
    b"Content-Disposition: form-data; name=", b'filename="', b"[][]", b"=?utf-8?q?=00?=", b"null", b"\xef\xbb\xbf",
    b"a" * 3000,
]  # fmt: skip


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, taken out, doubled, or something put between."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(spoilt) + 1)
        match rng.randrange(5):
            case 0:
                spoilt[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del spoilt[at : at + rng.choice((1, 4, 40, 400))]
            case 2:
                spoilt[at:at] = spoilt[at : at + rng.choice((1, 8, 80))]
            case _:
                spoilt[at:at] = rng.choice(TOKENS)
    return bytes(spoilt)


def spoil_json(body: bytes, rng: random.Random) -> bytes:
    """Some values replaced, taken away or renamed, anywhere in it."""
    whole = [json.loads(body)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = [(whole, 0)]
        for container, place in places:  # which grows
            inner = container[place]
            keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
            places += [(inner, key) for key in keys]
        container, place = rng.choice(places)
        match rng.randrange(4):
            case 0 if isinstance(container, dict):
                container[rng.choice(TEXTS)] = container.pop(place)
            case 1 if container is not whole:
                del container[place]
            case _:
                container[place] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(whole[0], ensure_ascii=rng.random() < 0.7)
    return text.encode("utf-8", "surrogatepass")


def spoil_form(body: bytes, rng: random.Random) -> bytes:
    """Parts dropped, doubled or in another order, or with another text."""
    *parts, end = body.split(b"--b0undary")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        match rng.randrange(4):
            case 0 if len(parts) > 1:
                del parts[at]
            case 1:
                parts.insert(at, rng.choice(parts))
            case 2:
                rng.shuffle(parts)
            case _:
                head, _, _ = parts[at].partition(b"\r\n\r\n")
                parts[at] = head + b"\r\n\r\n" + rng.choice(TEXTS).encode("utf-8", "surrogatepass") + b"\r\n"
    return b"--b0undary".join([*parts, end])


def spoil_body(request: Request, rng: random.Random) -> Request:
    ways: list[Callable[[bytes, random.Random], bytes]] = [spoil_bytes]
    if request.body.startswith(b"{"):
        ways += [spoil_json] * 4
    elif request.body.startswith(b"--b0undary"):
        ways += [spoil_form] * 2
    return replace(request, body=rng.choice(ways)(request.body, rng))


def spoil_headers(request: Request, rng: random.Random) -> Request:
    """One more of them, or one in place of another. A server lets no line end and no NUL through."""
    name = rng.choice(list(HEADERS))
    value = rng.choice(HEADERS[name])
    if rng.random() < 0.2:
        value = re.sub(rb"[\r\n\0]", b"", spoil_bytes(value, rng)).strip()
    kept = [each for each in request.headers if each[0] != name or rng.random() < 0.2]
    kept.insert(rng.randrange(len(kept) + 1), (name, value))
    return replace(request, headers=tuple(kept))


def spoil_target(request: Request, rng: random.Random) -> Request:
    path, _, query = request.target.partition(b"?")
    segments = path.split(b"/")
    match rng.randrange(5):
        case 0:
            segments[rng.randrange(1, len(segments))] = rng.choice(SEGMENTS)
        case 1:
            segments.insert(rng.randrange(1, len(segments) + 1), rng.choice(SEGMENTS))
        case 2 if len(segments) > 2:
            del segments[rng.randrange(1, len(segments))]
        case 3:
            return replace(request, method=rng.choice(METHODS))
        case _:
            pairs = [*query.split(b"&"), rng.choice(QUERIES) + b"=" + rng.choice(WORDS)]
            rng.shuffle(pairs)
            query = b"&".join(pairs)
    return replace(request, target=b"/".join(segments) + (b"?" + query if query else b""))


def spoilt(number: int) -> Request:
    """Case `number`. Most have a body, and most of those another one than they should."""
    rng = random.Random(number)
    with_body = rng.random() < 0.8
    names = [name for name in CORPUS if name not in SELDOM and bool(Request.read(CORPUS[name]).body) == with_body]
    request = Request.read(CORPUS[rng.choice(SELDOM if rng.random() < 0.02 else names)])
    if request.body and rng.random() < 0.9:
        request = spoil_body(request, rng)
    if rng.random() < (0.3 if request.body else 0.6):
        request = spoil_headers(request, rng)
    if rng.random() < (0.1 if request.body else 0.5):
        request = spoil_target(request, rng)
    return request


# ── the service that is asked ────────────────────────────────────────────────


@dataclass
class Fenced:
    """A service with keys whose new videos wait for ever before their first chunk, and what requests may name in it."""

    service: LocalService
    token: str
    completed: str = ""
    held: str = ""
    link: str = ""

    async def renew(self) -> None:
        """Puts a completed video, and one that has a chunk and waits with the next, where there is none any more."""
        store = self.service.store
        if not self.completed or await store.record(self.completed) is None:
            self.completed, _ = await put_video(self.service, owner=OWNER)
            status = await self.ask(Request(b"GET", b"/v1/videos/@completed@", KEY, b""))
            self.link = urlsplit(json.loads(status.body)["share_url"]).query
        record = await store.record(self.held) if self.held else None
        if record is None or record.ended:
            body = json.dumps({**BODY, "prompt": HELD}).encode()
            made = await self.ask(Request(b"POST", b"/v1/videos", (*KEY, AS_JSON), body))
            self.held = json.loads(made.body)["id"]
            await self.service.director.news(self.held, 0)

    async def forget(self, answer: Answer) -> None:
        """Deletes the video that a request has made, lest there be thousands."""
        told = json.loads(answer.body) if answer.body.startswith(b'{"id"') else {}
        made = told.get("id") if told.get("object") == "video" else b"".join(answer.header(b"x-video-id")).decode()
        if made and made not in (self.completed, self.held):
            await self.service.director.delete(made)

    async def ask(self, request: Request) -> Answer:
        """Sends a request, with the names between @ filled in. Who gets an answer without a length, which may be live,
        leaves as soon as it begins. Raises what the service raises."""
        names = {"token": self.token, "completed": self.completed, "held": self.held, "link": self.link}

        def filled(text: bytes) -> bytes:
            for name, value in names.items():
                text = text.replace(f"@{name}@".encode(), value.encode())
            return text

        path, _, query = filled(request.target).partition(b"?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method.decode("latin-1"),
            "scheme": "http",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(name, filled(value)) for name, value in request.headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        body = iter([filled(request.body)])
        sent: list[dict[str, Any]] = []
        live = asyncio.Event()

        async def receive() -> dict[str, Any]:
            for part in body:
                return {"type": "http.request", "body": part, "more_body": False}
            await live.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if message["type"] == "http.response.start" and b"content-length" not in dict(message["headers"]):
                live.set()

        served = asyncio.ensure_future(self.service.app(scope, receive, send))
        await asyncio.wait([served])
        if (error := served.exception()) is not None and not isinstance(error, CutOff):
            raise error
        return Answer(
            sent[0]["status"], tuple(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])
        )


@asynccontextmanager
async def fenced(folder: Path) -> AsyncIterator[Fenced]:
    token, key = new_key(OWNER, "videos", None)
    keys = folder / "keys.json"
    keys.write_text(json.dumps({"keys": [key.model_dump()]}))
    spans = str(folder / "spans.jsonl")
    async with serving(folder, keys=str(keys), cors_origins=["https://a.example"], trace_file=spans) as service:
        for chunk in range(len(SIZES)):  # forks and longer ones begin later
            service.graph.gate(f"sample {chunk}", ANY)
        service.graph.gate("sample 0", HELD).open()
        yield Fenced(service, token)


# ── what an answer must be ───────────────────────────────────────────────────


@cache
def documented() -> list[tuple[re.Pattern[str], dict[str, set[int]]]]:
    """Path ▸ method ▸ the statuses that the contract has for it, but for those of a bug."""
    found: dict[str, dict[str, set[int]]] = {}
    for route in ROUTES:
        pattern = re.sub(
            r"\\\{(\w+)\\\}", lambda name: ".+" if name[1] in ("path", "model_id") else "[^/]+", re.escape(route.path)
        )
        for method in route.methods:
            found.setdefault(pattern, {})[method] = {*route.answers, *route.statuses} - {500}
    return [(re.compile(pattern, re.DOTALL), methods) for pattern, methods in found.items()]


def allowed(request: Request, path: str) -> set[int]:
    method = request.method.decode("latin-1")
    for pattern, methods in documented():
        if pattern.fullmatch(path):
            return methods.get(method, {405})
    return {404, 405}


def fault(request: Request, answer: Answer) -> str | None:
    """What is wrong about an answer. A browser's question whether a page may ask has one of Starlette's."""
    if request.method == b"OPTIONS" and {b"origin", b"access-control-request-method"} <= dict(request.headers).keys():
        return None if answer.status in (200, 400) else "no answer to a browser's question"
    path = unquote(request.target.partition(b"?")[0].decode("ascii"))
    if answer.status >= 500 or answer.status not in allowed(request, path):
        return "this status is not in the contract"
    ids = answer.header(b"x-request-id")
    if len(ids) != 1 or not REQUEST_ID.fullmatch(ids[0].decode("latin-1")):
        return f"X-Request-Id is {ids}"
    if any(re.search(rb"[\r\n\0]", value) for _, value in answer.headers):
        return f"a header has a line end: {answer.headers}"
    lengths = answer.header(b"content-length")
    if (
        lengths
        and request.method != b"HEAD"
        and answer.status not in (204, 304)
        and lengths != [b"%d" % len(answer.body)]
    ):
        return f"Content-Length is {lengths}; the body has {len(answer.body)}"
    if answer.status < 400 or request.method == b"HEAD":
        return None
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return "an error that is not in our form"
    if set(error) != {"message", "type", "param", "code"} or len(error["message"]) > 1000:
        return "an error that is not in our form"
    inside = INSIDE.search(error["message"])
    return f"it tells of the inside: {inside[0]}" if inside else None


async def test_no_request_breaks_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """First those of the corpus as they are, then spoilt ones."""
    caplog.set_level(logging.WARNING)
    wrong, statuses = [], Counter[int]()
    cases = [
        *((name, Request.read(text)) for name, text in CORPUS.items()),
        *((str(n), spoilt(n)) for n in range(FUZZ)),
    ]
    async with fenced(tmp_path) as served:
        for name, request in cases:
            await served.renew()
            answer = await served.ask(request)
            statuses[answer.status] += 1
            if (what := fault(request, answer)) is not None:
                wrong.append(f"case {name}: {what}: {answer.status} {answer.body[:300]!r} to {str(request)[:1500]}")
            await served.forget(answer)
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}", *wrong[:20]])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    told = json.dumps(dict(sorted(statuses.items())))
    assert statuses[200] > FUZZ / 10 and statuses[422] > FUZZ / 10, told  # neither all harmless nor all hopeless
    bodies = len({request.body for _, request in cases})
    logging.getLogger(__name__).warning("%d requests, %d bodies: %s", len(cases), bodies, told)  # pytest -rA shows it


# ── over a connection ────────────────────────────────────────────────────────


def on_the_wire(request: Request, token: str, rng: random.Random) -> bytes:
    """A request as bytes, of which some more may be spoilt: where it ends, for example."""
    head = [request.method + b" " + request.target + b" HTTP/1.1"]
    head += [name + b": " + value.replace(b"@token@", token.encode()) for name, value in request.headers]
    head += [b"content-length: %d" % len(request.body), b""]
    data = b"\r\n".join([*head, request.body])
    return spoil_bytes(data, rng) if rng.random() < 0.3 else data


def test_nothing_that_comes_over_a_connection_breaks_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same requests to the server that Serve's proxy is, with what stands before it; each sender stops sending, and
    leaves after the first bytes of an answer."""
    token, key = new_key(OWNER, "videos", None)
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [key.model_dump()]}))
    settings = {"keys": str(tmp_path / "keys.json"), "admission": {"queued": 10**6}}
    statuses = Counter[bytes]()
    with listening(tmp_path, around=lambda app: _apply_middlewares(app, before_serve()), **settings) as served:
        served.service.graph.at_once = 0  # nothing is made of them
        address = ("127.0.0.1", int(served.url.rpartition(":")[2]))

        def status(data: bytes) -> bytes:
            with socket.create_connection(address, timeout=30) as client, suppress(ConnectionError):
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                return client.recv(2**12)[9:12]
            return b""

        for number in range(FUZZ):
            answer = status(on_the_wire(spoilt(number), token, random.Random(number)))
            assert not answer.startswith(b"5"), number
            statuses[answer] += 1
        assert status(b"GET /healthz HTTP/1.1\r\nhost: helios\r\n\r\n") == b"200"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert statuses[b""] < FUZZ / 2, statuses


# ── prompts ──────────────────────────────────────────────────────────────────

SECRET = "quetzalcoatlus"


def hostile_prompt(number: int) -> str:
    """Prompt `number`: hostile pieces and random characters of all planes, with a word by which to find it in logs."""
    rng = random.Random(number)
    pieces = [SECRET]
    for _ in range(rng.choice((1, 2, 5))):
        match rng.randrange(4):
            case 0:
                pieces.append("".join(chr(rng.randrange(0x20)) for _ in range(rng.randrange(1, 20))))
            case 1:
                pieces.append("".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 200))))
            case 2:
                pieces.append(chr(rng.choice((0x300, 0x489, 0x20DD, 0xFE0F, 0x1F3FD))) * rng.choice((1, 100, 3000)))
            case _:
                pieces.append(rng.choice(TEXTS))
    rng.shuffle(pieces)
    return "".join(pieces)


async def test_any_prompt_is_taken_or_refused_and_none_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is taken can be encoded; logs and spans have its hash."""
    caplog.set_level(logging.INFO)
    taken = refused = 0
    async with fenced(tmp_path) as served:
        graph = served.service.graph
        graph.at_once = 0  # nothing is made of them
        for number in range(FUZZ):
            prompt = hostile_prompt(number)
            body = json.dumps({"prompt": prompt, "size": "64x64"}, ensure_ascii=number % 2 == 0)
            answer = await served.ask(
                Request(b"POST", b"/v1/videos", (*KEY, AS_JSON), body.encode("utf-8", "surrogatepass"))
            )
            told = json.loads(answer.body)
            if answer.status == 200:
                taken += 1
                assert told["prompt"] == prompt, number
                (accepted,) = [record for record in caplog.records if record.message == "accepted"]
                assert vars(accepted)["prompt"] == shown(prompt, log_prompts=False)
                call = Call(video_id=told["id"], attempt=0, traceparent=TRACEPARENT)
                text, _ = [item async for item in graph.text_encoder.encode(call, prompt)]
                assert text.rows.isfinite().all(), number
                await served.forget(answer)
            else:
                refused += 1
                error = told["error"]
                assert answer.status in (400, 422), number
                assert (error["param"], error["code"]) in [("prompt", "invalid_input"), (None, "invalid_json")], number
            assert not any(SECRET in str(vars(record)) for record in caplog.records), number
            caplog.clear()
        spans = served.service.trace_file.read_text() + (tmp_path / "spans.jsonl").read_text()
    assert "sha256:" in spans and SECRET not in spans
    assert min(taken, refused) > FUZZ / 10, (taken, refused)
