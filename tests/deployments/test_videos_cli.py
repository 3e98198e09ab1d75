"""`helios videos` against the service in this process, over real connections, some of which break."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn

from deployments.cli import main
from deployments.content import objects_of
from deployments.store import new_video_id
from helios_core.errors import MediaError
from tests.deployments.conftest import LocalService
from tests.deployments.test_content import BODY, ended, get, put_video, running
from tests.deployments.test_director import PROMPT

Run = Callable[..., Coroutine[Any, Any, tuple[int, str, str]]]


class Way:
    """A way to the service, on which the next answers to GET …/content break after so many bytes as `cuts` has."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.cuts: list[int] = []
        self.asked: asyncio.Queue[str] = asyncio.Queue()  # the Range of each request for content
        self.sent: list[int] = []  # bytes of each of these answers, with its head
        self.server: asyncio.Server

    async def open(self) -> str:
        self.server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        allowed = sys.maxsize
        if is_content := b"/content " in head:
            asked = re.search(rb"range: *(\S+)", head, re.IGNORECASE)
            self.asked.put_nowait(asked[1].decode() if asked else "")
            allowed = self.cuts.pop(0) if self.cuts else allowed
        service, to_service = await asyncio.open_connection("127.0.0.1", self.port)
        to_service.write(head)
        sent = 0
        with suppress(ConnectionError):
            while sent < allowed and (data := await service.read(min(allowed - sent, 2**16))):
                writer.write(data)
                await writer.drain()
                sent += len(data)
        if is_content:
            self.sent.append(sent)
        to_service.close()
        writer.close()


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are pytest's


@pytest.fixture
async def way(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Way]:
    """To the service, which listens on a port of this machine; HELIOS_URL is where the way begins."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(uvicorn.Config(service.app, log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    way = Way(listener.getsockname()[1])
    monkeypatch.setenv("HELIOS_URL", await way.open())
    monkeypatch.setattr("deployments.videos_cli.TRY_AGAIN_S", 0.0)
    yield way
    way.server.close()
    server.should_exit = True
    await serving


@pytest.fixture
def videos(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`helios videos` with these arguments: (status, stdout, stderr). What would be a traceback fails the test."""
    monkeypatch.chdir(tmp_path)

    def run() -> int:
        try:
            main()
        except SystemExit as end:
            assert isinstance(end.code, int | None)
            return end.code or 0
        return 0

    async def videos(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["helios", "videos", *map(str, arguments)])
        status = await asyncio.to_thread(run)
        return status, *capsys.readouterr()

    return videos


def assert_one_line(stderr: str, *words: str) -> None:
    [line] = stderr.splitlines()
    assert line.startswith("helios: ")
    assert all(word in line for word in words), line


# ── list and show ────────────────────────────────────────────────────────────


async def test_a_list_of_none(videos: Run) -> None:
    assert await videos("list") == (0, "id  status  model  seconds  chunks  prompt\n", "")


async def test_list_and_show(service: LocalService, videos: Run) -> None:
    old, _ = await put_video(service, at=1.0)
    new, _ = await put_video(service, "failed", sizes=(5, 6), at=2.0)
    status, stdout, stderr = await videos("list")
    assert (status, stderr) == (0, "")
    assert [re.split("  +", line) for line in stdout.splitlines()] == [
        ["id", "status", "model", "seconds", "chunks", "prompt"],
        [new, "failed", "random", "4.125", "1/3", PROMPT],
        [old, "completed", "random", "4.125", "3/3", PROMPT],
    ]
    head, first, second = stdout.splitlines()
    assert head.index("status") == first.index("failed") == second.index("completed")

    page = [at_any_url(video) for video in (await service.http.get("/v1/videos")).json()["data"]]
    assert [at_any_url(video) for video in json.loads((await videos("list", "--json"))[1])] == page
    assert at_any_url(json.loads((await videos("show", old))[1])) == page[1]


def at_any_url(video: dict[str, Any]) -> dict[str, Any]:
    """Wherever the service was asked."""
    return {**video, "share_url": urlsplit(video["share_url"]).path}


async def test_a_video_without_an_end(service: LocalService, videos: Run) -> None:
    gate = service.graph.gate("sample 1")
    video_id = (await service.http.post("/v1/videos", json={**BODY, "seconds": None})).json()["id"]
    await gate.reached.wait()
    await service.director.news(video_id, 0)
    _, stdout, _ = await videos("list")
    assert re.split("  +", stdout.splitlines()[1]) == [video_id, "in_progress", "random", "no end", "1", PROMPT]
    await videos("cancel", video_id)
    _, stdout, _ = await videos("list")
    assert re.split("  +", stdout.splitlines()[1]) == [video_id, "completed", "random", "1.375", "1/1", PROMPT]


async def test_a_list_longer_than_a_page(service: LocalService, videos: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.videos_cli.PAGE", 2)
    ids = [(await put_video(service, at=float(k)))[0] for k in range(5, 0, -1)]
    for limit in range(1, 7):
        _, stdout, _ = await videos("list", "--limit", limit, "--json")
        assert [video["id"] for video in json.loads(stdout)] == ids[:limit]


async def test_a_prompt_is_one_short_line_that_does_nothing_to_a_terminal(service: LocalService, videos: Run) -> None:
    service.graph.gate("sample 0", prompt := "a [bold]sun\n\x1b[31m over\ta sea " + "雪" * 99)
    created = (await service.http.post("/v1/videos", json={"prompt": prompt})).json()
    _, stdout, _ = await videos("list")
    _, line = stdout.splitlines()
    assert line.endswith("  a [bold]sun [31m over a sea " + "雪" * 31 + "…")
    assert json.loads((await videos("show", created["id"]))[1])["prompt"] == prompt


# ── cancel and rm ────────────────────────────────────────────────────────────


async def test_cancel_stops_what_runs_and_tells_of_each(service: LocalService, videos: Run) -> None:
    done, _ = await put_video(service)
    made = await running(service)
    status, stdout, stderr = await videos("cancel", made, done)
    assert (status, stdout, stderr) == (0, f"{made}: cancelled\n{done}: completed\n", "")
    assert (await service.director.get(made)).status == "cancelled"


async def test_rm_deletes_what_there_is_and_refuses_the_rest(service: LocalService, videos: Run) -> None:
    first, _ = await put_video(service, at=1.0)
    second = await running(service)
    unknown = new_video_id(3.0)
    status, stdout, stderr = await videos("rm", first, unknown, second)
    assert (status, stdout) == (1, f"{first}: deleted\n{second}: deleted\n")
    assert_one_line(stderr, f"no video has the id '{unknown}'")
    assert await service.store.video_ids() == []


# ── what is refused ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("video", [f"video_{0:032x}", "../models", "video 1?limit=1#", "é"])
async def test_an_id_of_no_video_is_refused(videos: Run, video: str, tmp_path: Path) -> None:
    for command in ("show", "watch", "cancel", "rm"):
        status, stdout, stderr = await videos(command, video)
        assert (status, stdout) == (1, "")
        assert_one_line(stderr)
    assert not any(name.endswith(".mp4") for name in os.listdir(tmp_path))


@pytest.mark.parametrize(
    ("url", "expected", "words"),
    [
        ("ftp://somewhere", 2, ["url is 'ftp://somewhere'", "http:// or https://"]),
        ("127.0.0.1:8000", 2, ["url is '127.0.0.1:8000'", "http:// or https://"]),
        ("http://127.0.0.1:1", 1, ["http://127.0.0.1:", "Connection refused"]),
        ("http://127.0.0.1:port", 1, ["http://127.0.0.1:port", "nonnumeric port"]),
        ("http://a..b", 1, ["http://a..b"]),
        ("http://[::1", 1, ["http://[::1"]),
    ],
)
async def test_a_url_of_no_service_is_told(videos: Run, url: str, expected: int, words: list[str]) -> None:
    for command in (["list"], ["show", "x"], ["watch", "x"], ["cancel", "x"], ["rm", "x"]):
        status, stdout, stderr = await videos(*command, "--url", url)
        assert (status, stdout) == (expected, "")
        assert_one_line(stderr, *words)


async def test_something_else_that_listens_there_is_told(service: LocalService, videos: Run) -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind = await reader.readline()
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n<html>" if b"list" not in kind else b"")
        writer.close()

    async with await asyncio.start_server(page, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        status, _, stderr = await videos("show", "x", "--url", url)
    assert status == 1
    assert_one_line(stderr, url, "no Helios service")


@pytest.mark.parametrize("limit", ["0", "-1", "ten"])
async def test_a_limit_that_is_none_is_refused(videos: Run, limit: str) -> None:
    status, _, stderr = await videos("list", "--limit", limit)
    assert status == 2
    assert "--limit" in stderr


# ── watch ────────────────────────────────────────────────────────────────────


async def test_a_finished_video_is_written_into_the_file(service: LocalService, videos: Run, tmp_path: Path) -> None:
    video_id, data = await put_video(service)
    status, stdout, stderr = await videos("watch", video_id, "-o", "sea.mp4")
    assert (status, stdout) == (0, "")
    assert stderr.splitlines()[0] == f"{video_id}: completed, 3/3 chunks made"
    assert stderr.splitlines()[-1] == f"sea.mp4: {len(data)} bytes"
    assert (tmp_path / "sea.mp4").read_bytes() == data
    assert (await videos("watch", video_id))[0] == 0
    assert (tmp_path / f"{video_id}.mp4").read_bytes() == data


async def test_a_running_video_can_be_read_while_it_is_made(service: LocalService, videos: Run, tmp_path: Path) -> None:
    video_id = await running(service, "render 1")  # its first chunk may not be committed yet
    os.mkfifo(tmp_path / "pipe")  # so this test reads what is written as it is
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    watching = asyncio.create_task(videos("watch", video_id, "-o", "pipe"))
    news = await service.director.news(video_id, 0)
    size = sum(item.bytes for item in objects_of(news.init, news.chunks))
    data = b""
    while len(data) < size:
        data += await asyncio.to_thread(os.read, pipe, size - len(data))
    service.graph.gate("render 1").open()
    record = await ended(service, video_id)
    while len(data) < sum(item.bytes for item in objects_of(record.init, record.chunks)):
        data += await asyncio.to_thread(os.read, pipe, 2**16)
    status, _, stderr = await watching
    os.close(pipe)
    assert (status, stderr.splitlines()[-1]) == (0, f"pipe: {len(data)} bytes")
    assert data == (await get(service, video_id)).content


async def test_a_connection_that_breaks_is_made_again(
    service: LocalService, way: Way, videos: Run, tmp_path: Path
) -> None:
    video_id = await running(service)
    way.cuts = [50, 2000, 1]  # within the head of the answer, within a fragment, at once
    watching = asyncio.create_task(videos("watch", video_id, "-o", "sea.mp4"))
    asked = [await way.asked.get() for _ in range(4)]
    service.graph.gate("sample 1").open()
    assert (await watching)[0] == 0
    assert asked[:2] == ["", ""] and asked[2] == asked[3]
    assert re.fullmatch("bytes=[0-9]{3,4}-", asked[3])
    await ended(service, video_id)
    assert (tmp_path / "sea.mp4").read_bytes() == (await get(service, video_id)).content


async def test_connections_that_break_anywhere_give_the_same_bytes(
    service: LocalService, way: Way, videos: Run, tmp_path: Path
) -> None:
    rng = random.Random(7)
    video_id, file = await put_video(service, sizes=(100, 3000, 1, 70_000, 500))
    for _ in range(10):
        way.cuts = [rng.randrange(75_000) for _ in range(rng.randrange(1, 6))]
        assert (await videos("watch", video_id, "-o", "sea.mp4"))[0] == 0
        assert (tmp_path / "sea.mp4").read_bytes() == file


async def test_a_running_video_of_which_only_the_end_is_lost_is_whole(
    service: LocalService, way: Way, videos: Run, tmp_path: Path
) -> None:
    """An answer of unknown length ends with five bytes of its own: 0, and two empty lines."""
    whole = 0
    for short_by in range(9):
        service.graph.gates.clear()
        video_id = await running(service)
        way.cuts = [whole - short_by] if whole else []
        watching = asyncio.create_task(videos("watch", video_id, "-o", "sea.mp4"))
        await way.asked.get()
        service.graph.gate("sample 1").open()
        assert (await watching)[0] == 0
        whole = whole or way.sent[0]
        await ended(service, video_id)
        assert (tmp_path / "sea.mp4").read_bytes() == (await get(service, video_id)).content


async def test_a_silent_connection_is_made_again(
    service: LocalService, way: Way, videos: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.videos_cli.SILENCE_S", 0.05)
    video_id = await running(service, "sample 0")
    watching = asyncio.create_task(videos("watch", video_id, "-o", "sea.mp4"))
    assert [await way.asked.get() for _ in range(3)] == ["", "", ""]
    monkeypatch.setattr("deployments.videos_cli.SILENCE_S", 60.0)
    service.graph.gate("sample 0").open()
    assert (await watching)[0] == 0
    await ended(service, video_id)
    assert (tmp_path / "sea.mp4").read_bytes() == (await get(service, video_id)).content


async def test_a_service_that_stays_away_is_told(
    service: LocalService, way: Way, videos: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video_id = await running(service)
    way.cuts = [2000]
    monkeypatch.setattr("deployments.videos_cli.PATIENCE_S", 0.0)
    watching = asyncio.create_task(videos("watch", video_id, "-o", "sea.mp4"))
    await way.asked.get()
    way.server.close()
    status, stdout, stderr = await watching
    assert (status, stdout) == (1, "")
    assert_one_line(stderr.splitlines()[-1], "http://127.0.0.1:", "refused")
    service.graph.gate("sample 1").open()
    await ended(service, video_id)
    file = (await get(service, video_id)).content
    assert file.startswith((tmp_path / "sea.mp4").read_bytes())


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is deleted"])
async def test_a_video_that_ends_early_is_told(service: LocalService, way: Way, videos: Run, how: str) -> None:
    video_id = await running(service)
    watching = asyncio.create_task(videos("watch", video_id, "-o", "sea.mp4"))
    await way.asked.get()
    if how == "fails":
        service.graph.errors[PROMPT, "sample 1"] = MediaError("no such colour")
        service.graph.gate("sample 1").open()
    elif how == "is cancelled":
        await service.director.cancel(video_id)
    else:
        await service.director.delete(video_id)
    status, stdout, stderr = await watching
    assert (status, stdout) == (1, "")
    words = {"fails": "is failed: no such colour", "is cancelled": "is cancelled", "is deleted": "no video has the id"}
    assert_one_line(stderr.splitlines()[-1], video_id, words[how])


async def test_a_video_that_is_refused_leaves_an_older_file_alone(
    service: LocalService, videos: Run, tmp_path: Path
) -> None:
    (tmp_path / "sea.mp4").write_bytes(b"older")
    video_id, _ = await put_video(service, "cancelled")
    status, _, stderr = await videos("watch", video_id, "-o", "sea.mp4")
    assert status == 1
    assert_one_line(stderr.splitlines()[-1], f"video {video_id} is cancelled")
    assert (tmp_path / "sea.mp4").read_bytes() == b"older"


@pytest.mark.parametrize("path", ["missing/sea.mp4", "."])
async def test_a_path_that_cannot_be_written_is_refused(service: LocalService, videos: Run, path: str) -> None:
    video_id, _ = await put_video(service)
    status, _, stderr = await videos("watch", video_id, "-o", path)
    assert status == 2
    assert_one_line(stderr, f"output is '{path}'", "a file that can be written")
