"""The playlist and its segments: the very bytes of the file, in a form that players read while it grows."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import pytest
import uvicorn

from deployments.content import AskNews, next_news
from deployments.ingress import PLAYLIST_LOOKS
from deployments.records import News, Status
from deployments.store import new_video_id
from tests.deployments.conftest import LocalService, Npm
from tests.deployments.test_content import BODY, SIZES, about, cancel, delete, ended, get, put_video
from tests.deployments.test_events import begun

HEAD = """\
#EXTM3U
#EXT-X-VERSION:7
#EXT-X-INDEPENDENT-SEGMENTS
#EXT-X-PLAYLIST-TYPE:EVENT
#EXT-X-TARGETDURATION:{}
#EXT-X-MEDIA-SEQUENCE:0
#EXT-X-START:TIME-OFFSET=0
"""
MAP = '#EXT-X-MAP:URI="init.mp4"\n'
END = "#EXT-X-ENDLIST\n"

# hls.js loads, parses and follows a playlist without a browser, which only what it plays into would need.
HLS_JS = "hls.js@1.7.4"
FOLLOW = """
globalThis.self = globalThis
self.location = new URL(process.argv[1])
const Hls = require("hls.js")
const hls = new Hls({progressive: true})  // which loads by fetch: Node has no XMLHttpRequest
hls.on(Hls.Events.ERROR, (_, {details, reason}) => { throw new Error(`${details}: ${reason}`) })
hls.on(Hls.Events.LEVEL_LOADED, (_, {details}) => {
    const {live, type, targetduration, startTimeOffset, totalduration} = details
    const fragments = details.fragments.map(({sn, start, duration, url, initSegment}) =>
        ({sn, start, duration, url, init: initSegment.url}))
    console.log(JSON.stringify({live, type, targetduration, startTimeOffset, totalduration, fragments}))
    if (!live) hls.destroy()
})
hls.loadSource(self.location.href)
"""


async def hls(service: LocalService, video_id: str, name: str, status: int = 200, **headers: str) -> bytes:
    names = {key.replace("_", "-"): value for key, value in headers.items()}
    answer = await service.http.get(f"/v1/videos/{video_id}/hls/{name}", headers=names)
    assert answer.status_code == status, answer.text
    return answer.content


async def playlist(service: LocalService, video_id: str) -> str:
    return (await hls(service, video_id, "index.m3u8")).decode()


async def test_the_playlist_grows_and_changes_nothing_that_was_in_it(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("deployments.director.NEWS_S", 0.01)  # how long it waits for the first chunk
        video_id = await begun(service, BODY, "sample 0", chunks=0)
        seen = [await playlist(service, video_id)]
        assert b"no init segment yet" in await hls(service, video_id, "init.mp4", 404)
        assert b"the segment is '0'; allowed: none yet" in await hls(service, video_id, "0.m4s", 404)
    waiting = asyncio.create_task(playlist(service, video_id))
    for k in range(3):
        service.graph.gate(f"sample {k + 1}")
        service.graph.gate(f"sample {k}").open()
        while k < 2 and not (await service.director.news(video_id, k)).chunks:
            pass
        if k < 2:
            seen.append(await playlist(service, video_id))
    assert await waiting == seen[1]
    await ended(service, video_id)
    seen.append(await playlist(service, video_id))
    begin = HEAD.format(2)
    segments = [f"#EXTINF:1.375,\n{k}.m4s\n" for k in range(3)]
    assert seen == [
        begin,
        begin + MAP + segments[0],
        begin + MAP + "".join(segments[:2]),
        begin + MAP + "".join(segments) + END,
    ]


async def test_a_playlist_waits_longer_for_a_first_segment_than_others_do(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.director.NEWS_S", 0.01)
    looks: list[int] = []

    async def counted(news: AskNews, seen: int) -> News:
        looks.append(seen)
        return await next_news(news, seen)

    monkeypatch.setattr("deployments.ingress.next_news", counted)
    video_id = await begun(service, BODY, "sample 0", chunks=0)
    await hls(service, video_id, "init.mp4", 404)
    assert len(looks) == 1
    assert await playlist(service, video_id) == HEAD.format(2)
    assert len(looks) == 1 + PLAYLIST_LOOKS


async def test_init_and_segments_are_the_file(service: LocalService) -> None:
    video_id, file = await put_video(service)
    names = ["init.mp4", *re.findall("^.*m4s$", await playlist(service, video_id), re.MULTILINE)]
    assert names == ["init.mp4", "0.m4s", "1.m4s", "2.m4s"]
    parts = [await hls(service, video_id, name) for name in names]
    assert [len(part) for part in parts] == list(SIZES) and b"".join(parts) == file


@pytest.mark.parametrize("name", ["init.mp4", "1.m4s"])
async def test_segments_have_etags_and_ranges_also_while_the_video_runs(service: LocalService, name: str) -> None:
    video_id = await begun(service, BODY, "sample 2", chunks=2)
    url = f"/v1/videos/{video_id}/hls/{name}"
    whole = await service.http.get(url)
    assert whole.headers["content-type"] == {"init.mp4": "video/mp4", "1.m4s": "video/iso.segment"}[name]
    assert whole.headers["cache-control"] == "private, max-age=31536000, immutable"
    part = await service.http.get(url, headers={"Range": "bytes=3-7"})
    assert (part.status_code, part.content) == (206, whole.content[3:8])
    unchanged = await service.http.get(url, headers={"If-None-Match": whole.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    head = await service.http.head(url)
    assert (head.status_code, head.content, about(head)) == (200, b"", about(whole))
    beyond = await service.http.get(url, headers={"Range": f"bytes={len(whole.content)}-"})
    assert beyond.status_code == 416
    service.graph.gate("sample 2").open()
    await ended(service, video_id)
    again = await service.http.get(url)
    assert (again.content, about(again)) == (whole.content, about(whole))


async def test_many_players_of_a_running_video_read_each_segment_once(service: LocalService) -> None:
    video_id = await begun(service, BODY, "sample 2", chunks=2)
    names = ("init.mp4", "0.m4s", "1.m4s")
    live = asyncio.create_task(get(service, video_id))
    parts = await asyncio.gather(*(hls(service, video_id, name) for _ in range(30) for name in names))
    service.graph.gate("sample 2").open()
    file = (await live).content
    reads = Counter(key for key, _, _ in service.store.reads if key.endswith((".mp4", ".m4s")))
    assert len(reads) == 4 and set(reads.values()) == {1}
    assert file.startswith(b"".join(parts[:3])) and parts == parts[:3] * 30


@pytest.mark.parametrize("index", ["3", "-1", "00", "1.5", "x", "²", "9" * 5000])
async def test_a_segment_that_there_is_not_is_not_found(service: LocalService, index: str) -> None:
    video_id, _ = await put_video(service)
    answer = await service.http.get(f"/v1/videos/{video_id}/hls/{index}.m4s")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "not_found")
    assert error["message"].startswith("the segment is '") and error["message"].endswith("; allowed: 0 to 2")
    assert len(error["message"]) < 150


@pytest.mark.parametrize("name", ["index.m3u8", "init.mp4", "0.m4s"])
async def test_a_video_that_there_is_not_is_not_found(service: LocalService, name: str) -> None:
    running = await begun(service, BODY, "sample 1", chunks=1)
    await delete(service, running)
    for video_id in (new_video_id(1.0), "x", running):
        assert f"no video has the id '{video_id}'".encode() in await hls(service, video_id, name, 404)


async def test_the_playlist_may_be_kept_once_it_is_complete(service: LocalService) -> None:
    video_id = await begun(service, BODY, "sample 1", chunks=1)
    url = f"/v1/videos/{video_id}/hls/index.m3u8"
    live = await service.http.get(url)
    assert live.headers["content-type"] == "application/vnd.apple.mpegurl"
    assert live.headers["cache-control"] == "no-store"
    service.graph.gate("sample 1").open()
    await ended(service, video_id)
    whole, head = await service.http.get(url), await service.http.head(url)
    assert whole.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert (head.status_code, head.content, about(head)) == (200, b"", about(whole))
    assert whole.headers["content-length"] == str(len(whole.content))


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_video_without_an_end_is_played_as_far_as_it_goes(service: LocalService, status: Status) -> None:
    video_id, file = await put_video(service, status)
    answer = await service.http.get(f"/v1/videos/{video_id}/hls/index.m3u8")
    assert answer.text.endswith("2.m4s\n" + END) and answer.headers["cache-control"] == "no-store"
    assert await hls(service, video_id, "2.m4s") == file[-SIZES[-1] :]
    empty = await begun(service, BODY, "sample 0", chunks=0)
    await cancel(service, empty)
    assert await playlist(service, empty) == HEAD.format(2) + END


@pytest.mark.parametrize(("fps", "frames", "longest"), [(24, 40, 2), (8, 66, 5), (33, 34, 1), (60, 33, 1), (29, 50, 2)])
async def test_players_read_the_playlist(
    service: LocalService, tmp_path: Path, fps: int, frames: int, longest: int
) -> None:
    """FFmpeg through PyAV, and by itself: every frame is there, at its time."""
    body = {**BODY, "fps": fps, "seconds": frames / fps}
    video_id = (await service.http.post("/v1/videos", json=body)).json()["id"]
    await ended(service, video_id)
    text = await playlist(service, video_id)
    durations = [Fraction(given) for given in re.findall("#EXTINF:(.*),", text)]
    assert text.startswith(HEAD.format(longest)) and all(round(each) <= longest for each in durations)
    assert [round(each * fps, 9) for each in durations] == [33, frames - 33][: len(durations)]
    folder = tmp_path / "hls"
    folder.mkdir()
    (folder / "index.m3u8").write_text(text)
    for name in ["init.mp4", *re.findall("^.*m4s$", text, re.MULTILINE)]:
        (folder / name).write_bytes(await hls(service, video_id, name))

    with av.open(str(folder / "index.m3u8")) as container:
        shown = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert [time - shown[0] for time in shown] == [Fraction(k, fps) for k in range(frames)]
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "warning", "-xerror", "-i", "index.m3u8", "-f", "framehash", "-"]
    judged = await asyncio.to_thread(subprocess.run, ffmpeg, cwd=folder, capture_output=True, text=True, check=True)
    assert judged.stderr == ""
    (folder / "whole.mp4").write_bytes((await get(service, video_id)).content)
    of_file = [*ffmpeg[:5], "whole.mp4", *ffmpeg[6:]]
    compared = await asyncio.to_thread(subprocess.run, of_file, cwd=folder, capture_output=True, text=True, check=True)
    hashes = [re.findall(r"\w{64}$", each.stdout, re.MULTILINE) for each in (judged, compared)]
    assert len(hashes[0]) == frames and hashes[0] == hashes[1]


@asynccontextmanager
async def listening(service: LocalService) -> AsyncIterator[str]:
    """The URL of the service on a socket, for clients that are no part of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(service.app, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve([listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving


@pytest.fixture(scope="session")
def hls_js(npm: Npm) -> Path:
    return npm(HLS_JS)


async def test_ffmpeg_plays_a_video_that_is_being_made(service: LocalService, tmp_path: Path) -> None:
    """It shows what is there before there is more, and in the end every frame of the file."""
    video_id = await begun(service, BODY, "sample 1", chunks=1)

    def hashes(source: str) -> list[str]:
        return [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-i", source, "-f", "framehash", "-"]

    async with listening(service) as url:
        command = hashes(f"{url}/v1/videos/{video_id}/hls/index.m3u8")
        playing = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        assert playing.stdout is not None
        shown = [await playing.stdout.readline()]
        while shown[-1].startswith(b"#"):
            shown.append(await playing.stdout.readline())
        service.graph.gate("sample 1").open()
        shown += [line async for line in playing.stdout]
        assert await playing.wait() == 0
    (tmp_path / "whole.mp4").write_bytes((await get(service, video_id)).content)
    whole = await asyncio.to_thread(subprocess.run, hashes(str(tmp_path / "whole.mp4")), stdout=PIPE, check=True)
    of_file, of_playlist = (re.findall(rb"\w{64}$", each, re.MULTILINE) for each in (whole.stdout, b"".join(shown)))
    assert len(of_playlist) == 99 and of_playlist == of_file


async def test_hls_js_follows_a_video_that_is_being_made(service: LocalService, hls_js: Path) -> None:
    """From its first chunk to its end, and finds the very file behind its URLs; of a finished one it sees all at
    once."""
    frames = 2 * 33 + 7
    video_id = await begun(service, {**BODY, "seconds": frames / 24}, "sample 1", chunks=1)

    async with listening(service) as url:
        index = f"{url}/v1/videos/{video_id}/hls/index.m3u8"
        node = await asyncio.create_subprocess_exec("node", "-e", FOLLOW, index, cwd=hls_js, stdout=PIPE)
        assert node.stdout is not None
        seen = [json.loads(await node.stdout.readline())]
        service.graph.gate("sample 1").open()
        seen += [json.loads(line) async for line in node.stdout]
        assert await node.wait() == 0
        again = await asyncio.create_subprocess_exec("node", "-e", FOLLOW, index, cwd=hls_js, stdout=PIPE)
        finished, _ = await again.communicate()
        assert again.returncode == 0

    last = seen[-1]
    assert json.loads(finished) == last
    assert (last["type"], last["targetduration"], last["startTimeOffset"]) == ("EVENT", 2, 0)
    assert last["totalduration"] == pytest.approx(frames / 24)
    assert [part["sn"] for part in last["fragments"]] == [0, 1, 2]
    assert [part["duration"] for part in last["fragments"]] == pytest.approx([33 / 24, 33 / 24, 7 / 24])
    assert [part["start"] for part in last["fragments"]] == pytest.approx([0, 33 / 24, 66 / 24])
    for earlier in seen[:-1]:
        there = len(earlier["fragments"])
        assert earlier["live"] and earlier["fragments"] == last["fragments"][:there]
    assert len(seen[0]["fragments"]) == 1 and not last["live"]
    (init,) = {part["init"] for part in last["fragments"]}
    parts = [await service.http.get(each) for each in (init, *(part["url"] for part in last["fragments"]))]
    assert b"".join(part.content for part in parts) == (await get(service, video_id)).content
