"""`helios videos list | show | watch | cancel | rm`: the videos of a running service, over HTTP.

An API key comes in the variable HELIOS_KEY, and not as an option, which whoever lists this machine's processes would
see.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn

from helios_core.config import CHUNK_FRAMES
from helios_core.errors import HeliosError, InvalidInput

app = typer.Typer(no_args_is_help=True, help="The videos of a running service. HELIOS_KEY: the API key.")
console = Console(stderr=True, highlight=False, soft_wrap=True)

LOCAL = "http://127.0.0.1:8000"
PAGE = 100  # videos that the service lists at once
PROMPT_LETTERS = 60
ANSWER_S = 60.0  # so long the service may take to say how a video stands
SILENCE_S = 60.0  # a connection is taken to be broken after so long without a byte of its video
PATIENCE_S = 60.0  # so long a service that went away in the middle of a video may take to come back
TRY_AGAIN_S = 1.0
LOOK_EVERY_S = 1.0  # how often the service is asked how far a video is, while it is watched

Url = Annotated[str, typer.Option("--url", envvar="HELIOS_URL", help="where the service is")]
Id = Annotated[str, typer.Argument(metavar="ID", help="the id of a video")]
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="ids of videos")]


class Refused(HeliosError):
    """The service says no. `status`: HTTP's; the message is the service's own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message

    def __str__(self) -> str:
        return self.message


class ConnectionBroken(HeliosError):
    """The service cannot be reached, or went away before its answer was whole."""


@app.command("list")
def list_videos(
    url: Url = LOCAL,
    limit: Annotated[int, typer.Option(min=1, help="how many, at most")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list of all that is known of them")] = False,
) -> None:
    """List videos, the newest first."""
    videos: list[Any] = []
    more = True
    while more and len(videos) < limit:
        after = {"after": videos[-1]["id"]} if videos else {}
        page = ask(url, "GET", "?" + urlencode({"limit": min(PAGE, limit - len(videos)), **after}))
        videos += page["data"]
        more = page["has_more"]
    if as_json:
        typer.echo(json.dumps(videos, indent=2))
        return
    rows = [("id", "status", "model", "seconds", "chunks", "prompt")]
    for video in videos:
        chunks, prompt = chunks_made(video), shortened(video["prompt"])
        rows.append((video["id"], video["status"], video["model"], video["seconds"] or "no end", chunks, prompt))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@app.command()
def show(video: Id, url: Url = LOCAL) -> None:
    """Print all that is known of a video, as JSON."""
    typer.echo(json.dumps(ask(url, "GET", path_of(video)), indent=2))


@app.command()
def cancel(videos: Ids, url: Url = LOCAL) -> None:
    """Stop videos. What is made of them stays, and those that have ended stay as they are."""
    each(videos, lambda video: str(ask(url, "POST", f"{path_of(video)}/cancel")["status"]))


@app.command("rm")
def remove(videos: Ids, url: Url = LOCAL) -> None:
    """Stop and delete videos."""

    def delete(video: str) -> str:
        ask(url, "DELETE", path_of(video))
        return "deleted"

    each(videos, delete)


def each(videos: list[str], act: Callable[[str], str]) -> None:
    """One line for each video: what came of it, or why it was refused. Exit status 1 if one was."""
    refused = False
    for video in videos:
        try:
            typer.echo(f"{video}: {act(video)}")
        except Refused as error:
            console.print(f"helios: {error}", style="red", markup=False)
            refused = True
    if refused:
        raise typer.Exit(1)


@app.command()
def watch(
    video: Id,
    url: Url = LOCAL,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="MP4 file to write; by default ID.mp4")] = None,
) -> None:
    """Write a video into a file, which can be played while it grows."""
    status = ask(url, "GET", path_of(video))
    path = Path(f"{video}.mp4") if output is None else output
    check_writable("output", path)
    console.print(f"{video}: {status['status']}, {chunks_made(status)} chunks made", markup=False)
    pieces = content(url, video)
    first = next(pieces, b"")  # a video that is refused leaves an older file alone
    columns = TextColumn("{task.fields[chunks]} chunks made, on disk"), DownloadColumn()
    with path.open("wb") as file, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, chunks=chunks_made(status))
        written, looked = 0, time.monotonic()
        for data in itertools.chain([first], pieces):
            file.write(data)
            file.flush()
            written += len(data)
            progress.update(task, completed=written)
            if time.monotonic() - looked > LOOK_EVERY_S:
                progress.update(task, chunks=chunks_made_now(url, video))
                looked = time.monotonic()
        progress.update(task, chunks=chunks_made_now(url, video), total=written)
    console.print(f"{path}: {written} bytes", markup=False)


def content(url: str, video: str) -> Iterator[bytes]:
    """The bytes of a video's file as they come. Where the connection breaks, another one goes on.

    Raises Refused if there is no such video or it ends early, ConnectionBroken if the service stays away.
    """
    got, until = 0, time.monotonic() + PATIENCE_S
    while True:
        before, answered = got, False
        try:
            resume = {"Range": f"bytes={got}-"} if got else {}
            with answer(url, "GET", f"{path_of(video)}/content", resume, SILENCE_S) as response:
                answered = True
                again = got if response.status == 200 else 0  # somebody on the way ignored the Range
                for data in body(response):
                    new, again = data[again:], max(0, again - len(data))
                    got += len(new)
                    yield new
            return
        except (Refused, ConnectionBroken) as error:
            if isinstance(error, Refused) and error.status < 500:
                if error.status == 416 and got:
                    return  # nothing follows: of the answer before, only the very end was lost
                raise
            if not answered and time.monotonic() > until:
                raise
        if answered:
            until = time.monotonic() + PATIENCE_S
        if got == before:
            time.sleep(TRY_AGAIN_S)


def body(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The bytes of an answer as they come. Raises IncompleteRead unless it is known to be whole."""
    got = 0
    while data := response.read1():
        got += len(data)
        yield data
    if not response.chunked and str(got) != response.headers["Content-Length"]:
        raise http.client.IncompleteRead(b"")


def ask(url: str, method: str, path: str) -> Any:
    """The JSON that the service answers. Raises Refused or ConnectionBroken."""
    # What stops a video waits until its chunk is done, however long that takes.
    with answer(url, method, path, timeout_s=ANSWER_S if method == "GET" else None) as response:
        text = response.read()
    try:
        return json.loads(text)
    except ValueError:
        raise HeliosError(f"{url}: something answers there that is no Helios service") from None


@contextmanager
def answer(
    url: str, method: str, path: str, headers: dict[str, str] | None = None, timeout_s: float | None = None
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request for `path` below /v1/videos. `timeout_s`: how long it may be silent.

    Raises InvalidInput for a URL of no service, Refused, or ConnectionBroken, also out of the block.
    """
    if not url.startswith(("http://", "https://")):
        raise InvalidInput("url", url, "http:// or https://, a host and a port")
    where = f"{url.rstrip('/')}/v1/videos{path}"
    data = b"" if method == "POST" else None
    key = os.environ.get("HELIOS_KEY")
    try:
        request = urllib.request.Request(where, data, headers or {}, method=method)
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            yield response
    except urllib.error.HTTPError as error:
        raise Refused(error.code, reason(error)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no such name of a host can be
        why = getattr(error, "reason", error)
        raise ConnectionBroken(f"no answer from {url}: {getattr(why, 'strerror', None) or why}") from None


def reason(error: urllib.error.HTTPError) -> str:
    """Why the service refused."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):  # not in our service's own words
        return f"{error.url}: {error.code} {error.reason}"


def path_of(video: str) -> str:
    return f"/{quote(video, safe='')}"


def chunks_made(video: Any) -> str:
    made, frames = video["usage"]["chunks"], video["frames"]
    return str(made) if frames is None else f"{made}/{-(-frames // CHUNK_FRAMES)}"


def chunks_made_now(url: str, video: str) -> str:
    try:
        return chunks_made(ask(url, "GET", path_of(video)))
    except HeliosError:  # only the progress line wants to know
        return "?"


def shortened(prompt: str) -> str:
    """A prompt as one short line that does nothing to a terminal."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in prompt).split())
    return line if len(line) <= PROMPT_LETTERS else line[: PROMPT_LETTERS - 1] + "…"


def check_writable(option: str, path: Path) -> None:
    """Raises InvalidInput if no file can be made at `path`, before any work is lost. Leaves no file behind."""
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise InvalidInput(option, str(path), f"a file that can be written ({error.strerror})") from None
    if not existed:
        path.resolve().unlink()  # the file, not a link to it
