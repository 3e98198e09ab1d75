"""Videos that come from others: extended, forked, remixed. What they share is shared bit for bit.

What is compared is the digest of each fragment and of the state after it: its latents, history, anchor and generator.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.making import InputLost, ReplicaLost
from deployments.records import Origin, StoredObject, VideoRecord, VideoRequestRecord
from deployments.store import ObjectMissing, StoreUnavailable, new_video_id
from helios_core.errors import MediaError
from helios_core.spec import Limits
from tests.core import media_files
from tests.deployments.conftest import LocalService, serving
from tests.deployments.test_content import delete, ended, get, stored
from tests.deployments.test_director import PROMPT, Gate, Rig

BODY = {"prompt": PROMPT, "size": "64x64", "steps": [1, 1, 1]}
OTHER = "a green forest in rain"
THREE, SIX = 4.125, 8.25  # seconds of whole chunks

Essence = list[tuple[int, int, str, str]]


def essence(record: VideoRecord) -> Essence:
    """Of each chunk: its index, its frames, and the digests of its fragment and of the state after it."""
    return [(chunk.index, chunk.frames, chunk.fragment.sha256, chunk.state.sha256) for chunk in record.chunks]


async def post(service: LocalService, path: str = "", **fields: Any) -> dict[str, Any]:
    answer = await service.http.post(f"/v1/videos{path}", json=fields)
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


async def done(service: LocalService, path: str = "", **fields: Any) -> VideoRecord:
    """The completed video that this request makes."""
    record = await ended(service, (await post(service, path, **fields))["id"])
    assert record.status == "completed", record.error
    return record


async def fresh(service: LocalService, **fields: Any) -> VideoRecord:
    return await done(service, **{**BODY, **fields})


async def show(service: LocalService, video_id: str) -> dict[str, Any]:
    video: dict[str, Any] = (await service.http.get(f"/v1/videos/{video_id}")).json()
    return video


def files(service: LocalService, video_id: str = "") -> list[str]:
    """What the store's folder has below `videos/`, or below one video."""
    assert service.store.folder is not None
    folder = service.store.folder / "videos" / video_id
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> VideoRecord:
    """Six chunks made in one go."""

    async def run() -> VideoRecord:
        async with serving(tmp_path_factory.mktemp("six")) as service:
            return await fresh(service, seconds=SIX)

    return asyncio.run(run())


@pytest.fixture
async def keeping(tmp_path: Path) -> AsyncIterator[LocalService]:
    """A service that keeps all states."""
    async with serving(tmp_path, keep_all_states=True) as service:
        yield service


# Extend


async def test_whole_chunks_go_on_bit_for_bit(service: LocalService, six: VideoRecord) -> None:
    source = await fresh(service, seconds=THREE)
    extended = await done(service, f"/{source.id}/extend", seconds=THREE)
    assert essence(extended) == essence(six)
    assert extended.init is not None and six.init is not None and extended.init.sha256 == six.init.sha256
    assert extended.thumbnail is not None and source.thumbnail is not None
    assert extended.thumbnail.sha256 == source.thumbnail.sha256

    video = await show(service, extended.id)
    assert (video["seconds"], video["frames"], video["progress"], video["status"]) == ("8.25", 198, 100, "completed")
    assert video["origin"] == {"how": "extend", "video_id": source.id, "chunks": 3}
    assert video["remixed_from_video_id"] is None
    assert (await get(service, extended.id, "?variant=thumbnail")).content == (
        await get(service, source.id, "?variant=thumbnail")
    ).content


async def test_usage_is_of_its_own_work_only(service: LocalService) -> None:
    source = await fresh(service, seconds=1.375)
    extended = await done(service, f"/{source.id}/extend", seconds=2.75)
    first, second = [(await show(service, record.id))["usage"] for record in (source, extended)]
    assert (first["chunks"], first["steps"]) == (1, 6), "the first chunk is amplified"
    assert (second["chunks"], second["steps"]) == (3, 6), "two chunks of its own, of three steps"
    own = [chunk.timings.sample_seconds for chunk in extended.chunks[1:]]
    assert second["sampler_seconds"] == pytest.approx(sum(own)) and min(own) > 0
    assert second["queue_seconds"] < 60
    metrics = (await service.director.metrics()).decode()
    assert "helios_chunks_committed_total 3.0" in metrics and "helios_sampler_steps_total 12.0" in metrics


async def test_a_cut_fragment_is_made_whole(service: LocalService) -> None:
    source = await fresh(service, seconds=4)
    extended = await done(service, f"/{source.id}/extend", seconds=4)
    whole = await fresh(service, seconds=8)
    assert [chunk.frames for chunk in source.chunks] == [33, 33, 30]
    assert [chunk.frames for chunk in extended.chunks] == [33] * 5 + [27]
    assert essence(extended) == essence(whole)
    made, expected = [(await get(service, record.id)).content for record in (extended, whole)]
    assert hashlib.sha256(made).digest() == hashlib.sha256(expected).digest()
    assert sum(chunk.steps for chunk in extended.own_chunks) == 9, "chunk 2 was not sampled again"
    assert (await show(service, extended.id))["frames"] == 192


async def test_within_the_cut_chunk(service: LocalService) -> None:
    source = await fresh(service, seconds=1)
    gate = service.graph.gate("render 0")
    video_id = (await post(service, f"/{source.id}/extend", seconds=0.25))["id"]
    await gate.reached.wait()
    video = await show(service, video_id)
    assert (video["status"], video["progress"]) == ("in_progress", 0)
    gate.open()
    extended = await ended(service, video_id)
    assert [chunk.frames for chunk in extended.chunks] == [30]
    assert essence(extended) == essence(await fresh(service, seconds=1.25))
    usage = (await show(service, video_id))["usage"]
    assert (usage["chunks"], usage["steps"], usage["sampler_seconds"]) == (1, 0, 0.0)


@pytest.mark.parametrize("seconds", [1.375, 1.0])
async def test_again_and_again(service: LocalService, seconds: float) -> None:
    record = await fresh(service, seconds=seconds)
    for _ in range(2):
        record = await done(service, f"/{record.id}/extend", seconds=seconds)
    assert essence(record) == essence(await fresh(service, seconds=3 * seconds))


async def test_a_prompt_blends_in_from_the_first_new_chunk(service: LocalService) -> None:
    source = await fresh(service, seconds=1.375)
    extended = await done(service, f"/{source.id}/extend", seconds=2.75, prompt=OTHER, transition_chunks=2)
    assert essence(extended)[0] == essence(source)[0]
    change = {"at_seconds": 1.375, "prompt": OTHER, "transition_chunks": 2}
    assert essence(extended) == essence(await fresh(service, seconds=4.125, prompts=[change]))
    assert essence(extended)[1] != essence(await fresh(service, seconds=2.75))[1]
    assert (await show(service, extended.id))["prompts"] == [{"chunk": 1, **change}]


async def test_a_transition_goes_on(service: LocalService) -> None:
    prompts = [{"at_seconds": 1.375, "prompt": OTHER, "transition_chunks": 4}]
    source = await fresh(service, seconds=2, prompts=prompts)
    extended = await done(service, f"/{source.id}/extend", seconds=2.125)
    assert essence(extended) == essence(await fresh(service, seconds=4.125, prompts=prompts))


async def test_what_an_extension_leaves_in_the_store(service: LocalService) -> None:
    source = await fresh(service, seconds=2)
    before = files(service, source.id)
    extended = await done(service, f"/{source.id}/extend", seconds=2)
    (text,) = [name for name in files(service, extended.id) if name.startswith("texts/")]
    assert files(service, extended.id) == [
        "chunks/00000.t1.m4s",
        "chunks/00001.t1.m4s",
        "chunks/00002.t1.m4s",
        "init.mp4",
        "record.t1.json",
        "request.json",
        "states/00003.t1.safetensors",
        text,
        "thumbnail.jpg",
    ]
    assert files(service, source.id) == before
    assert await service.store.active() == []
    named = [extended.init, extended.thumbnail, *(chunk.fragment for chunk in extended.chunks)]
    for item in (*named, extended.chunks[-1].state):
        assert item is not None and f"videos/{extended.id}/" in item.key
        data = await service.store.read(item.key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (item.bytes, item.sha256)


async def test_viewers_see_at_once_what_was_copied(service: LocalService, six: VideoRecord) -> None:
    source = await fresh(service, seconds=2.75)
    gate = service.graph.gate("sample 2")
    video_id = (await post(service, f"/{source.id}/extend", seconds=1.375))["id"]
    await gate.reached.wait()
    video = await show(service, video_id)
    assert (video["status"], video["progress"], video["usage"]["chunks"]) == ("in_progress", 66, 2)
    news = await service.director.news(video_id, 0)
    assert [chunk.fragment.sha256 for chunk in news.chunks] == [sha for _, _, sha, _ in essence(six)[:2]]
    assert (await get(service, video_id, "?variant=thumbnail")).status_code == 200
    assert essence(await stored(service, video_id)) == essence(six)[:2], "what viewers hear of is committed"
    watching = asyncio.create_task(get(service, video_id))
    gate.open()
    await ended(service, video_id)
    assert (await watching).content == (await get(service, video_id)).content


async def test_a_cancelled_extension_keeps_what_was_copied(service: LocalService) -> None:
    source = await fresh(service, seconds=1.375)
    gate = service.graph.gate("sample 1").open()
    video_id = (await post(service, f"/{source.id}/extend", seconds=1.375))["id"]
    await gate.reached.wait()
    cancelled = (await service.http.post(f"/v1/videos/{video_id}/cancel")).json()
    assert (cancelled["status"], cancelled["usage"]["chunks"], cancelled["usage"]["steps"]) == ("cancelled", 1, 0)
    partial = await get(service, video_id, "?partial=true")
    assert partial.content == (await get(service, source.id)).content


# Fork


async def test_a_fork_without_a_seed_is_the_original(keeping: LocalService, six: VideoRecord) -> None:
    source = await fresh(keeping, seconds=2.5)
    for chunk in range(2):
        fork = await done(keeping, f"/{source.id}/fork", chunk=chunk)
        assert (essence(fork), fork.spec) == (essence(source), source.spec)
        assert len(fork.own_chunks) == 2 - chunk
    at_the_end = await done(keeping, f"/{source.id}/fork", chunk=2, seconds=THREE)
    assert essence(at_the_end) == essence(six)[:3]
    shorter = await done(keeping, f"/{source.id}/fork", chunk=1, seconds=1.5)
    assert essence(shorter)[0] == essence(source)[0] and [chunk.frames for chunk in shorter.chunks] == [33, 3]


async def test_a_seed_makes_other_noise_from_its_chunk_on(keeping: LocalService) -> None:
    source = await fresh(keeping, seconds=THREE, seed=5)
    reseeded = await done(keeping, f"/{source.id}/fork", chunk=1, seed=5)  # even the equal one
    assert essence(reseeded)[0] == essence(source)[0]
    assert all(ours != theirs for ours, theirs in zip(essence(reseeded)[1:], essence(source)[1:], strict=True))
    assert essence(await done(keeping, f"/{source.id}/fork", chunk=1, seed=5)) == essence(reseeded)
    other = await done(keeping, f"/{source.id}/fork", chunk=1, seed=6)
    assert essence(other)[1] != essence(reseeded)[1]
    shown = [await show(keeping, record.id) for record in (source, other)]
    assert [(video["seed"], video["reseeds"]) for video in shown] == [(5, []), (5, [{"chunk": 1, "seed": 6}])]


@pytest.mark.parametrize("chunk", [0, 2, 3])
async def test_a_fork_of_a_fork_with_a_seed_has_all_its_noise(keeping: LocalService, chunk: int) -> None:
    source = await fresh(keeping, seconds=2.75, seed=5)
    reseeded = await done(keeping, f"/{source.id}/fork", chunk=1, seed=6, seconds=THREE)
    again = await done(keeping, f"/{reseeded.id}/fork", chunk=chunk, seconds=THREE if chunk < 3 else 5.5)
    assert essence(again)[:3] == essence(reseeded)


async def test_a_seed_at_chunk_0_makes_another_video(service: LocalService) -> None:
    source = await fresh(service, seconds=1, seed=5)
    fork = await done(service, f"/{source.id}/fork", chunk=0, seed=6)
    assert essence(fork) == essence(await fresh(service, seconds=1, seed=6))


@pytest.mark.parametrize("chunk", [0, 1])
async def test_a_fork_with_a_prompt(keeping: LocalService, chunk: int) -> None:
    """What was to come after it is no longer meant."""
    scheduled = [{"at_seconds": 1.375 * k, "prompt": prompt} for k, prompt in ((1, "a desert"), (2, "a city"))]
    source = await fresh(keeping, seconds=THREE, prompts=scheduled)
    fork = await done(keeping, f"/{source.id}/fork", chunk=chunk, prompt=OTHER, transition_chunks=2)
    change = {"at_seconds": 1.375 * chunk, "prompt": OTHER, "transition_chunks": 2}
    assert essence(fork) == essence(await fresh(keeping, seconds=THREE, prompts=[change]))
    shown = await show(keeping, fork.id)
    expected = (PROMPT, [{"chunk": chunk, **change}]) if chunk else (OTHER, [])
    assert (shown["prompt"], shown["prompts"]) == expected


async def test_changes_past_the_end_of_a_shorter_fork_are_gone(service: LocalService) -> None:
    source = await fresh(service, seconds=2.75, prompts=[{"at_seconds": 1.375, "prompt": OTHER}])
    fork = await done(service, f"/{source.id}/fork", chunk=0, seconds=1)
    assert (await show(service, fork.id))["prompts"] == []


# Remix


async def test_a_remix_is_a_new_video_with_the_same_settings(service: LocalService) -> None:
    settings = {"seconds": 1.5, "seed": 7, "fps": 30, "amplify_first_chunk": False}
    source = await fresh(service, **settings, prompts=[{"at_seconds": 1.1, "prompt": "a desert"}])
    remix = await done(service, f"/{source.id}/remix", prompt=OTHER)
    assert essence(remix) == essence(await fresh(service, **settings, prompt=OTHER))
    video = await show(service, remix.id)
    assert (video["remixed_from_video_id"], video["prompt"], video["prompts"]) == (source.id, OTHER, [])


async def test_what_comes_from_an_image_keeps_it(service: LocalService) -> None:
    """The remix, and a fork at chunk 0, begin with the same image, which is theirs: the source may go."""
    form = {"size": "64x64", "seconds": "1", "steps": "1,1,1"}
    image = {"input_reference": ("a.png", media_files.image("PNG"), "image/png")}

    async def of_image(prompt: str) -> VideoRecord:
        answer = await service.http.post("/v1/videos", data={"prompt": prompt, **form}, files=image)
        return await ended(service, answer.json()["id"])

    source, expected = await of_image(PROMPT), await of_image(OTHER)
    assert source.spec.task == "image-to-video" and source.status == "completed"
    gate = service.graph.gate("encode", OTHER)  # nothing of it is read yet
    remix = (await post(service, f"/{source.id}/remix", prompt=OTHER))["id"]
    fork = await done(service, f"/{source.id}/fork", chunk=0)
    extended = await done(service, f"/{source.id}/extend", seconds=0.25)
    await delete(service, source.id)
    gate.open()
    assert essence(await ended(service, remix)) == essence(expected)
    assert essence(fork) == essence(source)
    assert essence(await done(service, f"/{extended.id}/remix", prompt=OTHER))[0][3] == essence(expected)[0][3]


# Copies


async def test_copies_and_sources_live_without_each_other(service: LocalService) -> None:
    source = await fresh(service, seconds=1.375)
    first, second = [(await post(service, f"/{source.id}/extend", seconds=1.375))["id"] for _ in range(2)]
    expected = await ended(service, first)
    data = {record.id: (await get(service, record.id)).content for record in (source, expected)}
    await ended(service, second)
    await delete(service, second)
    assert (await get(service, source.id)).content == data[source.id]
    await delete(service, source.id)
    assert files(service, source.id) == files(service, second) == []
    assert (await get(service, first)).content == data[first]
    assert len((await done(service, f"/{first}/extend", seconds=1)).chunks) == 3
    gone = await service.http.post(f"/v1/videos/{source.id}/remix", json={"prompt": OTHER})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


async def test_a_source_that_is_deleted_while_it_is_copied(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await fresh(service, seconds=2.75)
    copy = service.store.copy

    async def deleting(item: StoredObject, video_id: str, term: int) -> StoredObject:
        if "/states/" in item.key:
            await service.director.delete(source.id)
        return await copy(item, video_id, term)

    monkeypatch.setattr(service.store, "copy", deleting)
    answer = await service.http.post(f"/v1/videos/{source.id}/extend", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert files(service) == [] and await service.store.active() == []


async def test_a_remix_does_not_forget_the_image_of_a_source_that_goes(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await fresh(service, seconds=1)
    asked = service.store.request

    async def deleting(video_id: str) -> Any:
        if video_id == source.id and not service.director._hidden >= {source.id}:
            monkeypatch.undo()
            await service.director.delete(source.id)
        return await asked(video_id)

    monkeypatch.setattr(service.store, "request", deleting)
    answer = await service.http.post(f"/v1/videos/{source.id}/remix", json={"prompt": OTHER})
    assert answer.status_code == 404
    assert files(service) == []


@pytest.mark.parametrize("error", [StoreUnavailable("away"), ObjectMissing("gone")], ids=["away", "missing"])
async def test_a_copying_that_fails_leaves_nothing_behind(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Also if another copy is still under way then."""
    source = await fresh(service, seconds=2.75)
    before = files(service)
    store, failed, log = service.store, asyncio.Event(), list[str]()
    copy, delete = store.copy, store.delete

    async def failing(item: StoredObject, video_id: str, term: int) -> StoredObject:
        if "/chunks/00001" in item.key:
            failed.set()
            raise error
        if "/chunks/00000" in item.key:
            await failed.wait()
            for _ in range(20):
                await asyncio.sleep(0)
        copied = await copy(item, video_id, term)
        log.append("copied")
        return copied

    async def deleting(video_id: str) -> None:
        log.append("deleted")
        await delete(video_id)

    monkeypatch.setattr(store, "copy", failing)
    monkeypatch.setattr(store, "delete", deleting)
    answer = await service.http.post(f"/v1/videos/{source.id}/extend", json={})
    assert answer.status_code == (503 if isinstance(error, StoreUnavailable) else 404)
    assert log == ["copied", "copied", "deleted"]
    assert files(service) == before and await store.active() == []
    assert (await service.http.get("/v1/videos")).json()["first_id"] == source.id


async def test_a_director_that_dies_while_it_copies_leaves_nothing_behind(tmp_path: Path) -> None:
    rig = await Rig(tmp_path / "store").start()
    source = await rig.ended(await rig.create(chunks=2))
    held, copy = Gate(), rig.store.copy

    async def holding(item: StoredObject, video_id: str, term: int) -> StoredObject:
        copied = await copy(item, video_id, term)
        if "/states/" in item.key:
            held.reached.set()
            await held.opened.wait()
        return copied

    rig.store.copy = holding  # type: ignore[method-assign]
    asked = extension(source)
    creating = asyncio.create_task(rig.director.create(asked))
    await held.reached.wait()
    assert (rig.folder / "videos" / asked.id / "chunks").exists()
    second = await Rig(rig.folder).start()
    await asyncio.wait(second.director._resuming.values())
    assert await second.store.active() == [] and not (rig.folder / "videos" / asked.id).exists()
    creating.cancel()


async def test_an_interrupted_extension_is_finished(tmp_path: Path) -> None:
    rig = await Rig(tmp_path / "store").start()
    source = await rig.ended(await rig.create(chunks=1))
    rig.graph.gate("sample 1")
    asked = extension(source)
    await rig.director.create(asked)
    await rig.graph.gate("sample 1").reached.wait()
    second = await Rig(rig.folder).start()
    record = await second.ended(asked.id)
    assert record.status == "completed" and record.own_chunks == record.chunks[1:]
    undisturbed = await second.ended(await second.create(chunks=asked.spec.chunks))
    assert [each.fragment.sha256 for each in record.chunks] == [each.fragment.sha256 for each in undisturbed.chunks]


def extension(source: VideoRecord) -> VideoRequestRecord:
    spec = source.spec.extend(1.375, len(source.chunks), None, 3, Limits())
    origin = Origin(how="extend", video_id=source.id, chunks=len(source.chunks))
    return VideoRequestRecord(id=new_video_id(2.0), created_at=2.0, spec=spec, origin=origin)


# What is lost on the way


@pytest.mark.parametrize("loss", [ReplicaLost, InputLost])
async def test_what_is_lost_costs_no_frame(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, loss: type[Exception]
) -> None:
    monkeypatch.setattr("deployments.making.RETRY_AFTER_S", (0.0, 0.0, 0.0))
    source = await fresh(service, seconds=1)
    expected = essence(await done(service, f"/{source.id}/extend", seconds=2))
    for point in ("encode", "sample 1", "sampled 2", "render 0", "render 1", "render 2"):
        service.graph.losses[PROMPT, point] = [loss("gone")]
        assert essence(await done(service, f"/{source.id}/extend", seconds=2)) == expected, point
        assert service.graph.losses[PROMPT, point] == []


# What is refused


async def refusal(service: LocalService, path: str, **fields: Any) -> tuple[int, str, str]:
    """Status, code and message of the answer. Nothing may be stored for it."""
    before = files(service)
    answer = await service.http.post(f"/v1/videos/{path}", json=fields)
    assert answer.status_code >= 400, answer.text
    assert files(service) == before
    return told(answer)


def told(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


@pytest.mark.parametrize("how", ["extend", "fork"])
@pytest.mark.parametrize("chunks", [0, 1])
async def test_videos_that_are_not_completed(service: LocalService, how: str, chunks: int) -> None:
    fields = {"chunk": 1} if how == "fork" else {}
    gate = service.graph.gate(f"sample {chunks}")
    running = (await post(service, **BODY, seconds=4))["id"]
    await gate.reached.wait()
    if chunks:
        await service.director.news(running, 0)
    expected = (409, "not_possible", f"video {running} is in_progress; allowed: a completed video")
    assert await refusal(service, f"{running}/{how}", **fields) == expected
    cancelling = asyncio.create_task(service.http.post(f"/v1/videos/{running}/cancel"))
    gate.open()
    await cancelling
    status, code, message = await refusal(service, f"{running}/{how}", **fields)
    assert (status, code) == (409, "not_possible") and f"{running} is cancelled; allowed" in message
    service.graph.errors[PROMPT, f"render {chunks}"] = MediaError("no frames")
    failed = (await ended(service, (await post(service, **BODY, seconds=4))["id"])).id
    status, code, message = await refusal(service, f"{failed}/{how}", **fields)
    assert (status, code) == (409, "not_possible") and f"{failed} is failed; allowed" in message
    await delete(service, failed)
    for unknown in (failed, new_video_id(9.0), "video_x", "..%2f"):
        assert (await refusal(service, f"{unknown}/{how}", **fields))[:2] == (404, "not_found")


async def test_an_unfinished_video_can_be_remixed(service: LocalService) -> None:
    gate = service.graph.gate("sample 1")
    running = (await post(service, **BODY, seconds=2))["id"]
    await gate.reached.wait()
    remix = await done(service, f"/{running}/remix", prompt=OTHER)
    fork = f"{running}/fork"
    assert (await refusal(service, fork, chunk=0))[:2] == (409, "not_possible"), "nor at its beginning"
    gate.open()
    assert essence(await ended(service, running)) != essence(remix)


async def test_a_video_whose_model_is_served_no_more(tmp_path: Path) -> None:
    async with serving(tmp_path, "random", "random-mid") as both:
        source = await fresh(both, seconds=1, model="random-mid", preset=None, steps=[1, 1, 1])
    async with serving(tmp_path, "random") as service:
        for path, fields in (("extend", {}), ("fork", {"chunk": 0}), ("remix", {"prompt": OTHER})):
            status, code, message = await refusal(service, f"{source.id}/{path}", **fields)
            assert (status, code) == (409, "not_possible") and "random-mid; allowed: one of random" in message
        assert (await show(service, source.id))["model"] == "random-mid"


async def test_all_kept_states_are_copied(keeping: LocalService) -> None:
    source = await fresh(keeping, seconds=2.75)
    longer = await done(keeping, f"/{source.id}/extend", seconds=1.375)
    assert essence(await done(keeping, f"/{longer.id}/fork", chunk=1)) == essence(longer)


async def test_where_no_state_is_kept(service: LocalService) -> None:
    source = await fresh(service, seconds=2.75)
    status, code, message = await refusal(service, f"{source.id}/fork", chunk=1)
    assert (status, code) == (409, "not_possible")
    assert message.startswith(f"no state of video {source.id} is kept before chunk 1; allowed: chunk 0, or 2, its end")
    assert "keep_states: all" in message


# path, fields ▸ field named in the answer, words that the message must hold
UNPROCESSABLE: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("extend", {"seconds": 599.1}, "seconds", ["599.1", "at most 599 more", "600"]),
    ("extend", {"seconds": 0}, "seconds", ["1/24"]),
    ("extend", {"seconds": float("nan")}, "seconds", ["nan"]),
    ("extend", {"seconds": "four"}, "seconds", ["four", "number"]),
    ("extend", {"prompt": ""}, "prompt", ["not empty"]),
    ("extend", {"prompt": OTHER, "transition_chunks": 0}, "transition_chunks", ["0", "1 to 64"]),
    ("extend", {"prompt": OTHER, "seconds": 0.375}, "seconds", ["0.375", "more than 0.375"]),
    ("extend", {"seed": 1}, "seed", ["seconds", "prompt"]),
    ("fork", {}, "chunk", ["required"]),
    ("fork", {"chunk": -1}, "chunk", ["-1", "0 to 0"]),
    ("fork", {"chunk": 1}, "chunk", ["1", "0 to 0"]),
    ("fork", {"chunk": 2, "seconds": 9}, "chunk", ["2", "0 to 1, the end"]),
    ("fork", {"chunk": "1"}, "chunk", ["whole number"]),
    ("fork", {"chunk": 0, "seconds": 601}, "seconds", ["601", "600"]),
    ("fork", {"chunk": 0, "seed": -1}, "seed", ["-1", "2^63-1"]),
    ("fork", {"chunk": 0, "prompt": "é" * 4097}, "prompt", ["8194", "8192"]),
    ("fork", {"chunk": 0, "prompt": OTHER, "transition_chunks": 65}, "transition_chunks", ["65", "1 to 64"]),
    ("remix", {}, "prompt", ["required"]),
    ("remix", {"prompt": "\0"}, "prompt", ["NUL"]),
    ("remix", {"prompt": OTHER, "seconds": 2}, "seconds", ["prompt"]),
]


async def test_unprocessable(service: LocalService) -> None:
    source = await fresh(service, seconds=1)
    before = files(service)
    for path, fields, param, words in UNPROCESSABLE:
        answer = await service.http.post(
            f"/v1/videos/{source.id}/{path}",
            content=json.dumps(fields),
            headers={"content-type": "application/json"},
        )
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_input", param), (path, fields)
        assert all(word in error["message"] for word in words), error["message"]
    assert files(service) == before
