"""X-Request-Id: the name by which a client and our logs and spans know one request; and the headers by which Serve
would take orders from a client."""

from __future__ import annotations

import re
import uuid

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
# Which replica, after how long a request is given up, whether it is noticed that a client leaves; with - for each _.
ORDERS = (
    b"serve-multiplexed-model-id",
    b"x-session-id",
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
)
FORM = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


class RequestIds:
    """Every answer of `app` tells its request's id: what the client sent if it has the form of one, else a fresh one.

    What lies within finds that id, and no other, among the headers of the request. One RequestIds around another
    changes nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        sent = Headers(scope=scope).getlist(HEADER)
        own = sent[0] if len(sent) == 1 and FORM.fullmatch(sent[0]) else uuid.uuid4().hex
        MutableHeaders(scope=scope)[HEADER] = own

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = own
            await send(message)

        await self._app(scope, receive, send_with_id)


def request_id(request: Request) -> str:
    """Of a request that came through RequestIds."""
    return request.headers[HEADER]


class NoOrders:
    """Keeps from `app` the headers by which Serve takes orders. It also fails, with a 500, if one is not UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            kept = [each for each in scope["headers"] if each[0].lower().replace(b"_", b"-") not in ORDERS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def before_serve() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Serve's own proxy takes any X-Request-Id for its logs, and adds it
    to the answer once more: it sees only what is one, and what it adds is put in one line. Of other headers it takes
    orders, which are not a client's to give."""
    return [Middleware(RequestIds), Middleware(NoOrders)]
