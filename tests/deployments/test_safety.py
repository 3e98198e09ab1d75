"""The safety hook: what it blocks is not accepted, stored or sent, by whichever way it came; and what if it fails.

The service runs in this process with one of the hooks below. What they say is decided here, and a hook that takes too
long waits until the test lets it go.
"""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deployments.app import build_app
from deployments.config import AppConfig, ConfigError
from deployments.content import objects_of
from deployments.drafts import KEY
from deployments.errors import CutOff
from deployments.records import Check, StoredObject
from deployments.safety import (
    ALLOW,
    AT_ONCE,
    ContentBlocked,
    Frames,
    Guard,
    SafetyHook,
    SafetyUnavailable,
    Unsafe,
    Verdict,
)
from deployments.store import Store
from deployments.tracing import Tracer
from helios_core.media.read import MediaInfo
from tests.core import media_files
from tests.deployments.conftest import LocalService, serving
from tests.deployments.test_content import BODY, ended, get, running
from tests.deployments.test_director import PROMPT, TRACEPARENT
from tests.deployments.test_events import told
from tests.deployments.test_watching import client

BAD = "a scene that nobody should see"
SHORT = {**BODY, "seconds": 1}  # one chunk
FORM = {"prompt": PROMPT, "seconds": "1", "size": "64x64", "preset": "realtime"}
PICTURE, CLIP = media_files.image("PNG"), media_files.video(48)

Asked = tuple[str, Any]  # what was checked: the part, and the text, the file's bytes or the chunk


class Hook(SafetyHook):
    """Blocks what a test put into `blocked`, raises or hangs where it says so. All of them share what is here."""

    blocked: frozenset[Asked] = frozenset()
    asked: ClassVar[list[Asked]] = []
    infos: ClassVar[list[MediaInfo]] = []
    instead: Callable[[], Verdict] | None = None  # of an answer

    def check_prompt(self, prompt: str) -> Verdict:
        return self._answer("prompt", prompt)

    def check_input(self, path: Path, info: MediaInfo) -> Verdict:
        self.infos.append(info)
        return self._answer("input", path.read_bytes())

    def check_frames(self, frames: Frames) -> Verdict:
        return self._answer("frames", frames.chunk)

    def _answer(self, part: str, what: Any) -> Verdict:
        self.asked.append((part, what))
        if Hook.instead is not None:
            return Hook.instead()
        return Verdict("violence") if (part, what) in Hook.blocked else ALLOW


class OnlyPrompts(SafetyHook):
    """Lacks what it should have."""

    def check_prompt(self, prompt: str) -> Verdict:
        return ALLOW


@pytest.fixture(autouse=True)
def fresh_hook() -> Iterator[None]:
    yield
    Hook.blocked, Hook.instead = frozenset(), None
    Hook.asked.clear()
    Hook.infos.clear()


@pytest.fixture
def hang() -> Iterator[Callable[[], Verdict]]:
    """In place of an answer: none, until the test is over."""
    over = threading.Event()

    def wait() -> Verdict:
        over.wait()
        return ALLOW

    yield wait
    over.set()


@asynccontextmanager
async def guarded(folder: Path, *models: str, **safety: Any) -> AsyncIterator[LocalService]:
    """A service with the hook, whose replicas write spans into the ingress's file."""
    settings = {"hook": f"{__name__}:Hook", "max_seconds": 60, **safety}
    async with serving(folder, *models, safety=settings, trace_file=str(folder / "spans")) as service:
        yield service


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[LocalService]:
    async with guarded(tmp_path) as service:
        yield service


def stored_files(service: LocalService) -> set[str]:
    assert service.store.folder is not None
    return {str(path.relative_to(service.store.folder)) for path in service.store.folder.rglob("*") if path.is_file()}


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


async def checks(service: LocalService) -> dict[tuple[str, str], float]:
    """How many checks of a part had an outcome, where there were any; and all of them were timed."""
    families = {
        family.name: family for family in text_string_to_metric_families((await service.http.get("/metrics")).text)
    }
    counted = {
        (each.labels["part"], each.labels["outcome"]): each.value
        for each in families["helios_safety_checks"].samples
        if each.value
    }
    timed = {
        each.labels["part"]: each.value
        for each in families["helios_safety_check_seconds"].samples
        if each.name.endswith("_count") and each.value
    }
    assert timed == {
        part: sum(n for (other, _), n in counted.items() if other == part) for part in {part for part, _ in counted}
    }
    return counted


# What is asked for

GUIDED = {**SHORT, "model": "random-base", "steps": [2], "guidance_scale": 3}
SCHEDULE = [{"at_seconds": 0, "prompt": BAD}]
# name ▸ path below /v1/videos, with the id of a completed video; what is sent; the field that is blocked
PROMPTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "create": ("", {"json": {**SHORT, "prompt": BAD}}, "prompt"),
    "create from a picture": ("", {"data": {**FORM, "prompt": BAD}, "files": {"input_reference": PICTURE}}, "prompt"),
    "stream": ("/stream", {"json": {**SHORT, "prompt": BAD}}, "prompt"),
    "a scheduled prompt": ("", {"json": {**SHORT, "prompts": SCHEDULE}}, "prompts"),
    "a streamed schedule": ("/stream", {"json": {**SHORT, "prompts": SCHEDULE}}, "prompts"),
    "a negative prompt": ("", {"json": {**GUIDED, "negative_prompt": BAD}}, "negative_prompt"),
    "edit a file": ("/edits", {"data": {**FORM, "prompt": BAD}, "files": {"video": CLIP}}, "prompt"),
    "edit a video": ("/edits", {"json": {**SHORT, "prompt": BAD, "video": {"id": "{id}"}}}, "prompt"),
    "extensions": ("/extensions", {"json": {**SHORT, "prompt": BAD, "video": {"id": "{id}"}}}, "prompt"),
    "extend": ("/{id}/extend", {"json": {"seconds": 2, "prompt": BAD}}, "prompt"),
    "fork": ("/{id}/fork", {"json": {"chunk": 0, "prompt": BAD}}, "prompt"),
    "remix": ("/{id}/remix", {"json": {"prompt": BAD}}, "prompt"),
}
INPUTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a picture": ("", {"data": FORM, "files": {"input_reference": PICTURE}}, "input_reference"),
    "a clip": ("", {"data": FORM, "files": {"input_reference": CLIP}}, "input_reference"),
    "a streamed picture": ("/stream", {"data": FORM, "files": {"input_reference": PICTURE}}, "input_reference"),
    "edit a file": ("/edits", {"data": FORM, "files": {"video": CLIP}}, "video"),
    "extend a file": ("/extensions", {"data": FORM, "files": {"video": CLIP}}, "video"),
}


async def completed(service: LocalService, **changes: Any) -> str:
    video = (await service.http.post("/v1/videos", json={**BODY, "seconds": 2, **changes})).json()
    record = await ended(service, video["id"])
    assert record.status == "completed", record.error
    return record.id


async def ask(service: LocalService, source: str, path: str, wanted: dict[str, Any], **headers: str) -> httpx.Response:
    """A POST, in which {id} is the id of `source`."""
    if "json" in wanted:
        wanted = {"json": json.loads(json.dumps(wanted["json"]).replace("{id}", source))}
    return await service.http.post("/v1/videos" + path.replace("{id}", source), **wanted, headers=headers)


@pytest.mark.parametrize("name", PROMPTS)
async def test_a_blocked_prompt_is_refused_and_nothing_of_it_is_stored(tmp_path: Path, name: str) -> None:
    path, wanted, field = PROMPTS[name]
    Hook.blocked = frozenset({("prompt", BAD)})
    async with guarded(tmp_path, "random", "random-base") as service:
        source = await completed(service)
        before = stored_files(service)
        answer = await ask(service, source, path, wanted)
        assert error_of(answer) == (422, "content_blocked", field)
        assert answer.json()["error"]["message"].startswith(f"{field} is blocked: violence; allowed: ")
        assert BAD not in answer.text
        assert stored_files(service) == before
        assert (await checks(service))["prompt", "blocked"] == 1

        Hook.blocked = frozenset()  # it has changed its mind: the same request is as good as any
        assert (await ask(service, source, path, wanted)).status_code == 200


@pytest.mark.parametrize("name", INPUTS)
async def test_a_blocked_input_is_refused_and_nothing_of_it_is_stored(service: LocalService, name: str) -> None:
    path, wanted, field = INPUTS[name]
    (sent,) = wanted["files"].values()
    Hook.blocked = frozenset({("input", sent)})
    before = stored_files(service)
    answer = await ask(service, "", path, wanted)
    assert error_of(answer) == (422, "content_blocked", field)
    assert stored_files(service) == before
    assert Hook.asked == [("prompt", PROMPT), ("input", sent)]
    assert [info.kind for info in Hook.infos] == ["image" if sent is PICTURE else "video"]
    assert await checks(service) == {("prompt", "allowed"): 1, ("input", "blocked"): 1}

    Hook.blocked = frozenset()
    assert (await ask(service, "", path, wanted)).status_code == 200


async def test_the_file_of_a_video_that_is_edited_is_an_input_too(service: LocalService) -> None:
    source = await completed(service)
    file = (await get(service, source)).content
    Hook.blocked = frozenset({("input", file)})
    before = stored_files(service)
    answer = await ask(service, source, "/edits", {"json": {**SHORT, "video": {"id": "{id}"}}})
    assert error_of(answer) == (422, "content_blocked", "video")
    assert stored_files(service) == before


@pytest.mark.parametrize(("path", "more"), [("/{id}/extend", {"seconds": 2}), ("/{id}/fork", {"chunk": 0})])
async def test_what_goes_on_with_an_earlier_videos_prompts_is_checked_for_them(
    service: LocalService, path: str, more: dict[str, Any]
) -> None:
    """The hook allowed them then."""
    second = "a green forest in rain"
    source = await completed(service, prompts=[{"at_seconds": 0.1, "prompt": second}])
    for text, field in ((PROMPT, "prompt"), (second, "prompts")):
        Hook.blocked = frozenset({("prompt", text)})
        assert error_of(await ask(service, source, path, {"json": more})) == (422, "content_blocked", field)
    Hook.blocked = frozenset()
    assert (await ask(service, source, path, {"json": more})).status_code == 200


async def test_a_text_is_checked_once_however_often_it_is_there(service: LocalService) -> None:
    schedule = [{"at_seconds": at, "prompt": text} for at, text in ((0, PROMPT), (1.375, BAD), (2.75, PROMPT))]
    await service.http.post("/v1/videos", json={**BODY, "prompts": schedule})
    assert sorted(Hook.asked) == sorted([("prompt", PROMPT), ("prompt", BAD)])


async def test_what_is_wrong_anyway_is_said_without_the_hook(service: LocalService) -> None:
    for wanted in ({**SHORT, "seconds": 0}, {**SHORT, "prompt": " "}, {**SHORT, "size": "1x1"}, {"prompt": 3}):
        assert error_of(await ask(service, "", "", {"json": wanted}))[:2] == (422, "invalid_input")
    missing = "video_" + "0" * 32
    for path in ("/{id}/extend", "/{id}/remix", "/{id}/prompt"):
        assert (await ask(service, missing, path, {"json": {"prompt": BAD}})).status_code == 404
    assert Hook.asked == []


async def test_a_blocked_change_of_the_prompt_changes_nothing(service: LocalService) -> None:
    video_id = await running(service)
    Hook.blocked = frozenset({("prompt", BAD)})
    headers = {"traceparent": TRACEPARENT}
    answer = await service.http.post(f"/v1/videos/{video_id}/prompt", json={"prompt": BAD}, headers=headers)
    assert error_of(answer) == (422, "content_blocked", "prompt")
    assert (await service.director.get(video_id)).spec.prompts == ()
    (span,) = [
        each for each in service.spans() if each["name"] == "check prompt" and each["parent_id"] == f"0x{'2' * 16}"
    ]
    assert span["attributes"] == {"video_id": video_id, "outcome": "blocked", "category": "violence"}

    allowed = await service.http.post(f"/v1/videos/{video_id}/prompt", json={"prompt": "a green forest"})
    assert allowed.status_code == 200
    service.graph.gate("sample 1").open()
    record = await ended(service, video_id)
    assert (record.status, [change.prompt for change in record.spec.prompts]) == ("completed", ["a green forest"])


# The same request again


async def test_a_key_whose_request_was_blocked_is_free(service: LocalService) -> None:
    """Be it for the same request, when the hook has changed its mind, or for another one."""
    Hook.blocked = frozenset({("prompt", BAD)})
    bad = {"json": {**SHORT, "prompt": BAD}}
    for key in ("a", "b"):
        assert error_of(await ask(service, "", "", bad, **{KEY: key}))[:2] == (422, "content_blocked")
    other = await ask(service, "", "", {"json": SHORT}, **{KEY: "b"})
    assert (other.status_code, other.headers.get("idempotent-replayed")) == (200, None)
    Hook.blocked = frozenset()
    again = await ask(service, "", "", bad, **{KEY: "a"})
    assert (again.status_code, again.headers.get("idempotent-replayed")) == (200, None)


async def test_a_replay_gets_the_video_that_was_allowed_then(service: LocalService) -> None:
    """Its making goes on whatever the hook thinks of its prompt now: what is shown of it is checked chunk by chunk."""
    first = await ask(service, "", "", {"json": SHORT}, **{KEY: "a"})
    asked = len(Hook.asked)
    Hook.blocked = frozenset({("prompt", PROMPT)})
    again = await ask(service, "", "", {"json": SHORT}, **{KEY: "a"})
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first.json()["id"], "true")
    assert [part for part, _ in Hook.asked[asked:] if part != "frames"] == []


# What is made


class WrittenStore(Store):
    """A Store that keeps in `written` the keys that were put."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.written: list[str] = []

    async def _put(self, key: str, data: bytes, mode: str = "overwrite") -> StoredObject:
        self.written.append(key)
        return await super()._put(key, data, mode)


class Viewer:
    """A client that keeps in `seen` what it was sent, also of a body that is cut off."""

    def __init__(self, service: LocalService) -> None:
        self.seen = b""
        self.http = client(service, self._note)

    async def _note(self, part: bytes) -> None:
        self.seen += part


@pytest.mark.parametrize("chunk", [0, 1, 2])
async def test_of_a_blocked_chunk_nothing_is_stored_and_nothing_sent(service: LocalService, chunk: int) -> None:
    Hook.blocked = frozenset({("frames", chunk)})
    service.graph.vae_decoder._store = store = WrittenStore(service.store.url)
    gate = service.graph.gate("sample 0")
    video_id = (await service.http.post("/v1/videos", json=BODY)).json()["id"]
    await gate.reached.wait()
    events = asyncio.create_task(told(service, video_id))
    viewer = Viewer(service)
    watching = asyncio.create_task(viewer.http.get(f"/v1/videos/{video_id}/content"))
    gate.open()
    with pytest.raises(CutOff):
        await watching

    record = await ended(service, video_id)
    assert record.status == "failed" and record.error is not None and len(record.chunks) == chunk
    message = f"chunk {chunk} is blocked: violence; allowed: what this service's safety check lets pass"
    assert (record.error.code, record.error.message) == ("content_blocked", message)
    *chunks, last = await events
    assert [name for name, _, _ in chunks] == ["chunk"] * chunk
    assert last == (
        "error",
        "done",
        {"code": "content_blocked", "message": message, "last_chunk": chunk - 1 if chunk else None},
    )

    indices = sorted(int(found[1]) for key in store.written if (found := re.search(r"/chunks/(\d+)", key)))
    states = sorted(int(found[1]) for key in store.written if (found := re.search(r"/states/(\d+)", key)))
    assert (indices, states) == (list(range(chunk)), list(range(1, chunk + 1)))
    assert any(key.endswith(("init.mp4", "thumbnail.jpg")) for key in store.written) == (chunk > 0)
    parts = [] if record.init is None else objects_of(record.init, record.chunks)
    file = b"".join([await service.store.read(each.key) for each in parts])
    assert viewer.seen == file
    if chunk:
        assert (await get(service, video_id, "?partial=true")).content == file
    assert error_of(await get(service, video_id)) == (409, "video_failed", None)

    assert Hook.asked.count(("frames", chunk)) == 1, "it is not tried again"
    assert (await checks(service)).get(("frames", "allowed"), 0) == chunk
    assert (await checks(service))["frames", "blocked"] == 1
    (span,) = [each for each in service.spans() if each["attributes"].get("outcome") == "blocked"]
    (render,) = [each for each in service.spans() if each["context"]["span_id"] == span["parent_id"]]
    assert (span["name"], render["name"], render["attributes"]["chunk"]) == ("check frames", "render", chunk)


async def test_a_stream_ends_before_a_blocked_chunk(service: LocalService) -> None:
    Hook.blocked = frozenset({("frames", 1)})
    viewer = Viewer(service)
    with pytest.raises(CutOff, match="the video is failed after 1 chunks"):
        await viewer.http.post("/v1/videos/stream", json=BODY)
    (video,) = (await service.http.get("/v1/videos")).json()["data"]
    assert viewer.seen == (await get(service, video["id"], "?partial=true")).content != b""


async def test_while_frames_are_checked_the_vae_is_free(service: LocalService, hang: Callable[[], Verdict]) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait() -> Verdict:
        if Hook.asked[-1][0] == "frames":
            loop.call_soon_threadsafe(asked.set)
            return hang()
        return ALLOW

    Hook.instead = wait
    video_id = (await service.http.post("/v1/videos", json=SHORT)).json()["id"]
    await asked.wait()
    await loop.run_in_executor(service.graph.vae_decoder._thread, lambda: None)
    names = {Path(name).parent.name for name in stored_files(service) if video_id in name}
    assert not names & {"chunks", "states"}, "nothing is stored before the answer"


async def test_a_hook_that_allows_changes_no_byte(tmp_path: Path) -> None:
    async def made(service: LocalService) -> list[str]:
        record = await ended(service, (await service.http.post("/v1/videos", json=BODY)).json()["id"])
        assert record.status == "completed" and record.init is not None and record.thumbnail is not None
        objects = [record.init, record.thumbnail]
        for each in record.chunks:
            objects += [each.fragment, each.state]
        return [each.sha256 for each in objects]

    (tmp_path / "without").mkdir()
    async with guarded(tmp_path) as service:
        with_hook = await made(service)
        assert [what for part, what in Hook.asked if part == "frames"] == [0, 1, 2]
        assert await checks(service) == {("prompt", "allowed"): 1, ("frames", "allowed"): 3}
    async with serving(tmp_path / "without", trace_file=str(tmp_path / "without" / "spans")) as service:
        assert await made(service) == with_hook
        assert await checks(service) == {}
        assert not [each for each in service.spans() if each["name"].startswith("check")]


async def test_spans_of_an_image_to_video(service: LocalService) -> None:
    answer = await ask(service, "", "", {"data": FORM, "files": {"input_reference": PICTURE}})
    await ended(service, answer.json()["id"])
    spans = service.spans()
    names = {each["context"]["span_id"]: each["name"] for each in spans}
    found = [each for each in spans if each["name"].startswith("check")]
    assert [(each["name"], names[each["parent_id"]]) for each in found] == [
        ("check prompt", "POST /v1/videos"),
        ("check input", "POST /v1/videos"),
        ("check frames", "render"),
    ]
    assert {each["attributes"]["outcome"] for each in found} == {"allowed"}
    assert {each["context"]["trace_id"] for each in found} == {spans[0]["context"]["trace_id"]}


def test_frames_as_a_hook_sees_them() -> None:
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (40, 90, 200)], np.uint8)
    picture = np.repeat(colours, 32, axis=0)[None].repeat(64, axis=0)  # stripes: [64, 128, 3]
    frames = Frames("video", 0, media_files.i420(np.stack([picture, picture[:, ::-1]])))
    shown = frames.rgb(1)
    assert (shown.shape, shown.dtype) == ((64, 128, 3), np.uint8)
    np.testing.assert_allclose(shown[32, 16::32].astype(int), colours[::-1].astype(int), atol=4)


async def test_a_hook_cannot_change_what_it_sees(service: LocalService) -> None:
    seen: list[Frames] = []

    class Painter(Hook):
        def check_frames(self, frames: Frames) -> Verdict:
            seen.append(frames)
            frames.i420_TRW[:] = 0  # raises
            return ALLOW

    assert service.graph.vae_decoder._guard is not None
    service.graph.vae_decoder._guard._hook = Painter()
    record = await ended(service, (await service.http.post("/v1/videos", json=SHORT)).json()["id"])
    assert record.error is not None and record.error.code == "safety_unavailable"
    assert seen[0].i420_TRW.shape == (24, 96, 64) and seen[0].i420_TRW.any()


# A hook that fails


def raises() -> Verdict:
    raise ValueError(f"cannot read {BAD}")


def says_nothing() -> Verdict:
    return None  # type: ignore[return-value]


def says_too_much() -> Verdict:
    return Verdict("a whole sentence, with a secret")


@pytest.mark.parametrize("fails", [raises, says_nothing, says_too_much])
async def test_what_cannot_be_checked_is_refused(
    service: LocalService, fails: Callable[[], Verdict], caplog: pytest.LogCaptureFixture
) -> None:
    Hook.instead = fails
    before = stored_files(service)
    with caplog.at_level(logging.INFO, "deployments"):
        answer = await ask(service, "", "", {"json": {**SHORT, "prompt": BAD}})
    assert error_of(answer) == (503, "safety_unavailable", "prompt")
    assert answer.json()["error"]["message"] == "prompt could not be checked for safety; try again"
    assert int(answer.headers["retry-after"]) > 0
    assert stored_files(service) == before
    assert await checks(service) == {("prompt", "refused"): 1}
    (line,) = [record for record in caplog.records if record.getMessage() == "safety check failed"]
    assert (line.part, line.outcome) == ("prompt", "refused")  # type: ignore[attr-defined]
    assert BAD not in str(vars(line)) and "secret" not in str(vars(line)), "the log has no prompt"


async def test_frames_that_cannot_be_checked_end_the_video(service: LocalService) -> None:
    def fails_at_chunk_1() -> Verdict:
        return raises() if Hook.asked[-1] == ("frames", 1) else ALLOW

    Hook.instead = fails_at_chunk_1
    record = await ended(service, (await service.http.post("/v1/videos", json=BODY)).json()["id"])
    assert (record.status, len(record.chunks)) == ("failed", 1)
    assert record.error is not None and record.error.code == "safety_unavailable"
    assert Hook.asked.count(("frames", 1)) == 1
    assert (await checks(service))["frames", "refused"] == 1


@pytest.mark.parametrize("kind", [ContentBlocked, SafetyUnavailable])
def test_what_does_not_pass_is_told_across_processes(kind: type[Unsafe]) -> None:
    check = Check(part="frames", outcome="blocked", category="violence", seconds=0.5)
    told = pickle.loads(pickle.dumps(kind("chunk 3", check)))  # noqa: S301 - our own bytes
    assert (type(told), told.param, told.check, str(told)) == (kind, "chunk 3", check, str(kind("chunk 3", check)))


async def test_where_it_may_fail_open_everything_passes_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Hook.instead = raises
    async with guarded(tmp_path, fail_open=True) as service:
        with caplog.at_level(logging.INFO, "deployments"):
            answer = await ask(service, "", "", {"data": FORM, "files": {"input_reference": PICTURE}})
            record = await ended(service, answer.json()["id"])
        assert record.status == "completed"
        let_through = {(part, "let_through"): 1 for part in ("prompt", "input", "frames")}
        assert await checks(service) == let_through
        logged = [record for record in caplog.records if record.getMessage() == "safety check failed"]
        assert [record.part for record in logged] == ["prompt", "input", "frames"]  # type: ignore[attr-defined]
        assert f"ValueError at {__file__}:" in logged[0].reason  # type: ignore[attr-defined]


async def test_where_it_may_fail_open_what_is_blocked_is_blocked(tmp_path: Path) -> None:
    Hook.blocked = frozenset({("prompt", BAD)})
    async with guarded(tmp_path, fail_open=True) as service:
        answer = await ask(service, "", "", {"json": {**SHORT, "prompt": BAD}})
        assert error_of(answer) == (422, "content_blocked", "prompt")


async def test_a_hook_that_takes_too_long_has_failed(tmp_path: Path, hang: Callable[[], Verdict]) -> None:
    Hook.instead = hang
    async with guarded(tmp_path, max_seconds=0.05) as service:
        answer = await ask(service, "", "", {"json": SHORT})
        assert error_of(answer) == (503, "safety_unavailable", "prompt")
    (tmp_path / "open").mkdir()
    async with guarded(tmp_path / "open", max_seconds=0.05, fail_open=True) as service:
        record = await ended(service, (await ask(service, "", "", {"json": SHORT})).json()["id"])
        assert record.status == "completed"
        assert await checks(service) == {("prompt", "let_through"): 1, ("frames", "let_through"): 1}


async def test_checks_that_hang_hold_so_many_threads_and_no_more(hang: Callable[[], Verdict]) -> None:
    config = AppConfig().override(safety={"hook": f"{__name__}:Hook", "max_seconds": 1})
    assert config.safety is not None
    guard = Guard(config.safety, Tracer("test"))
    Hook.instead = hang
    found = await asyncio.gather(*(guard.prompt(PROMPT, None) for _ in range(AT_ONCE + 3)))
    assert {check.outcome for check in found} == {"refused"}
    assert len(Hook.asked) == AT_ONCE
    assert (await guard.prompt(PROMPT, None)).outcome == "refused"  # there is still no thread for it
    assert len(Hook.asked) == AT_ONCE


# The configuration


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            "no_such_module:Hook",
            r"^safety.hook is 'no_such_module:Hook', which cannot be imported: ModuleNotFoundError",
        ),
        (f"{__name__}:Nothing", "which cannot be imported: AttributeError: .*; allowed: module:Class"),
        (f"{__name__}:BAD", "allowed: a class derived from deployments.safety.SafetyHook"),
        ("builtins:dict", "allowed: a class derived from deployments.safety.SafetyHook"),
        (f"{__name__}:OnlyPrompts", "which lacks check_frames, check_input; allowed: a hook that has all"),
    ],
)
def test_a_service_without_its_hook_does_not_start(tmp_path: Path, hook: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build_app(AppConfig(store=str(tmp_path)).with_model("random").override(safety={"hook": hook}))
    assert "\n" not in str(refused.value)


def test_a_module_that_breaks_when_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_hook.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'broken_hook:Hook', which cannot be imported: ZeroDivisionError"):
        build_app(AppConfig(store=str(tmp_path)).override(safety={"hook": "broken_hook:Hook"}))


async def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "safety.md").read_text()
    (settings,), (program,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("yaml", "python"))
    (tmp_path / "acme_safety.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    async with guarded(tmp_path, **yaml.safe_load(settings)["safety"]) as service:
        assert (await ended(service, (await ask(service, "", "", {"json": SHORT})).json()["id"])).status == "completed"
        refused = await ask(service, "", "", {"json": {**SHORT, "prompt": "Blood on the snow"}})
        assert error_of(refused) == (422, "content_blocked", "prompt")
        assert await checks(service) == {("prompt", "allowed"): 1, ("prompt", "blocked"): 1, ("frames", "allowed"): 1}


def test_a_hook_that_is_there_is_part_of_the_graph(tmp_path: Path) -> None:
    config = AppConfig(store=str(tmp_path)).with_model("random").override(safety={"hook": f"{__name__}:Hook"})
    ingress, _ = build_app(config)
    assert ingress._bound_deployment.init_args[0].safety == config.safety


@pytest.mark.parametrize(
    "settings", [{}, {"hook": "a.b.C"}, {"hook": "a:b", "max_seconds": 0}, {"hook": "a:b", "x": 1}]
)
def test_settings_are_strict(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="safety"):
        AppConfig().override(safety=settings)
