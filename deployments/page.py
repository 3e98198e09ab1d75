"""The page where people watch: the files of deployments/player/, as they lie there, and what a browser is told about
them."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

PLAYER = Path(__file__).parent / "player"

# Nothing inline, nothing from elsewhere. blob: is what a Media Source plays.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, by ETag: page and service are of one version
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PlayerFiles(StaticFiles):
    """The page's parts."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def install_page(app: FastAPI) -> None:
    """`GET /` is the page, `/player/…` its parts."""

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return FileResponse(PLAYER / "index.html", headers=HEADERS)

    app.mount("/player", PlayerFiles(directory=PLAYER))
