"""The Director over the real replicas in one process: order, watchers, failures, cancelling, what the store holds.

Order is asserted, never time: a gate holds a call until the test has seen what it waited for.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from deployments.config import AppConfig
from deployments.director import Director, NoSuchVideo, Unreadable
from deployments.making import InputLost, ReplicaLost
from deployments.records import (
    Call,
    ChunkRecord,
    Encoded,
    Rendered,
    Run,
    SampleReport,
    StoredObject,
    VideoError,
    VideoRecord,
    VideoRequestRecord,
    VideoStatus,
)
from deployments.store import Store, StoreUnavailable, Superseded, new_video_id
from deployments.tracing import Tracer
from helios_core.config import CHUNK_FRAMES
from helios_core.errors import HeliosError, InvalidInput, MediaError, NotFinite, OutOfMemory
from helios_core.spec import VideoSpec
from helios_core.state import StreamState
from tests.deployments.local import LocalGraph

PROMPT = "a red sun over a blue sea"
ANY = "any other prompt"
TRACEPARENT = f"00-{'1' * 32}-{'2' * 16}-01"

Event = ChunkRecord | VideoRecord


class Gate:
    """A point that a video passes only when the test has opened it."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    def open(self) -> Gate:
        self.opened.set()
        return self


class GatedGraph(LocalGraph):
    """A LocalGraph with a point before each call, `encode`, `sample 1`, `render 1`, and one after: `sampled 1`.

    There a test may place a gate or an error, for the video of one prompt, or a gate for ANY prompt without one.
    """

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        self.gates: dict[tuple[str, str], Gate] = {}
        self.errors: dict[tuple[str, str], BaseException] = {}
        self.losses: dict[tuple[str, str], list[Exception]] = {}  # raised one after the other
        self.at_once = 99  # a video held at a gate shall hold no other

    def samplers(self, model: str) -> int:
        return self.at_once

    def gate(self, point: str, prompt: str = PROMPT) -> Gate:
        return self.gates.setdefault((prompt, point), Gate())

    async def encode(self, call: Call, model: str, prompt: str) -> tuple[Any, Encoded]:
        await self._pass("encode", prompt)
        return await super().encode(call, model, prompt)

    async def sample(
        self, call: Call, spec: VideoSpec, index: int, weights: tuple[float, ...], state: Any, *texts: Any
    ) -> tuple[Any, SampleReport]:
        await self._pass(f"sample {index}", spec.prompt)
        sampled = await super().sample(call, spec, index, weights, state, *texts)
        await self._pass(f"sampled {index}", spec.prompt)
        return sampled

    async def render(self, call: Call, spec: VideoSpec, term: int, state: Any, sampled: SampleReport) -> Rendered:
        index = int(Path(state.key).name[:5]) if isinstance(state, StoredObject) else state.chunk_index
        await self._pass(f"render {index - 1}", spec.prompt)
        return await super().render(call, spec, term, state, sampled)

    async def _pass(self, point: str, prompt: str) -> None:
        if gate := self.gates.get((prompt, point)) or self.gates.get((ANY, point)):
            gate.reached.set()
            await gate.opened.wait()
        if error := self.errors.get((prompt, point)):
            raise error
        if losses := self.losses.get((prompt, point)):
            raise losses.pop()


class LoggedStore(Store):
    """A Store that writes commits into the graph's log, unless it is `gone`. The last one waits for `end_gate`."""

    def __init__(self, url: str, log: list[str]) -> None:
        super().__init__(url)
        self.log = log
        self.gone = asyncio.Event()
        self.end_gate = Gate()
        self.end_gate.open()

    async def put_record(self, record: VideoRecord, term: int) -> None:
        if self.gone.is_set():
            raise StoreUnavailable(f"{self.url}: gone")
        if record.ended:
            self.end_gate.reached.set()
            await self.end_gate.opened.wait()
        await super().put_record(record, term)
        self.log.append(record.status if record.ended else f"committed {len(record.chunks) - 1}")


class Rig:
    """A Director, its parts, and short ways to use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = AppConfig(store=str(folder)).with_model("random")
        self.graph = GatedGraph(config)
        self.store = LoggedStore(config.store, self.graph.log)
        self.director: Director

    async def start(self) -> Rig:
        self.director = await Director.start(self.graph, self.store, Tracer("director"))
        return self

    async def create(self, chunks: int = 3, prompt: str = PROMPT) -> str:
        return (await self.director.create(request(chunks, prompt))).id

    async def get(self, video_id: str) -> VideoRecord:
        """The record by which the Director says how the video stands."""
        status = await self.director.get(video_id)
        running = self.director._running.get(video_id)
        record = await self.store.record(video_id) if running is None else running.record
        told = (status.queue_position, status.estimated_start_at, status.estimated_completion_at)
        assert record is not None and status == VideoStatus.of(record, *told)
        return record

    async def watch(self, video_id: str, from_chunk: int = 0) -> AsyncGenerator[Event, None]:
        """Each chunk from `from_chunk` on as it is committed, and the record of the ended video."""
        while not (news := await self.director.news(video_id, from_chunk)).ended:
            for chunk in news.chunks:
                yield chunk
            from_chunk += len(news.chunks)
        for chunk in news.chunks:
            yield chunk
        yield await self.get(video_id)

    async def watched(self, video_id: str, from_chunk: int = 0) -> list[Event]:
        return [event async for event in self.watch(video_id, from_chunk)]

    async def ended(self, video_id: str) -> VideoRecord:
        """The record that ends the watch, which is also the stored one."""
        *_, record = await self.watched(video_id)
        assert isinstance(record, VideoRecord)
        assert record == await self.store.record(video_id) == await self.get(video_id)
        assert video_id not in await self.store.active()
        return record


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr("deployments.making.RETRY_AFTER_S", (0.0, 0.0))
    return await Rig(tmp_path / "store").start()


def request(chunks: int = 3, prompt: str = PROMPT) -> VideoRequestRecord:
    """The smallest and fastest video of so many chunks."""
    spec = VideoSpec(
        prompt=prompt,
        model="random",
        width=64,
        height=64,
        seconds=chunks * CHUNK_FRAMES / 24,
        seed=1,
        steps=(1, 1, 1),
        amplify_first_chunk=False,
    )
    return VideoRequestRecord(id=new_video_id(1.0), created_at=1.0, spec=spec, traceparent=TRACEPARENT)


# The overlap of sampling and rendering


async def test_sampling_runs_ahead_of_rendering_by_one_chunk(rig: Rig) -> None:
    for k in range(3):  # each rendering is held until the next chunk has been sampled
        rig.graph.gate(f"render {k}")
        rig.graph.gate(f"sampled {k + 1}").open()
    video_id = await rig.create(chunks=4)
    for k in range(3):
        await rig.graph.gate(f"sampled {k + 1}").reached.wait()
        rig.graph.gate(f"render {k}").open()
    await rig.ended(video_id)
    assert rig.graph.log == [
        *("sample 0", "sampled 0", "sample 1", "sampled 1"),
        *("rendered 0", "committed 0", "sample 2", "sampled 2"),
        *("rendered 1", "committed 1", "sample 3", "sampled 3"),
        *("rendered 2", "committed 2", "rendered 3", "committed 3", "completed"),
    ]


async def test_a_chunk_arrives_when_it_is_committed_and_before_the_next_is_sampled(rig: Rig) -> None:
    rig.graph.gate("sample 1")
    video_id = await rig.create()
    async with aclosing(rig.watch(video_id)) as events:
        first = await anext(events)
        rig.graph.log.append("arrived")
    assert rig.graph.log == ["sample 0", "sampled 0", "rendered 0", "committed 0", "arrived"]
    record = await rig.store.record(video_id)
    assert record is not None and record.chunks == (first,)


# Status


async def test_status_goes_from_queued_to_completed(rig: Rig) -> None:
    encode, sample = rig.graph.gate("encode"), rig.graph.gate("sample 0")
    asked = request()
    created = VideoRecord(id=asked.id, created_at=asked.created_at, spec=asked.spec, status="queued")
    assert await rig.director.create(asked) == VideoStatus.of(created, None)
    await encode.reached.wait()
    assert await rig.get(asked.id) == created
    stored = asked.model_copy(update={"fingerprint": rig.graph.fingerprint("random")})
    assert (await rig.store.request(asked.id), await rig.store.active()) == (stored, [asked.id])

    encode.open()
    await sample.reached.wait()
    started = await rig.get(asked.id)
    assert (started.status, started.chunks, started.completed_at) == ("in_progress", (), None)

    sample.open()
    record = await rig.ended(asked.id)
    assert (record.status, record.error) == ("completed", None)
    assert record.completed_at is not None and record.completed_at >= record.chunks[0].timings.sample_started_at
    assert [chunk.index for chunk in record.chunks] == [0, 1, 2]
    assert [chunk.frames for chunk in record.chunks] == [33, 33, 33]


@pytest.mark.parametrize("call", ["get", "watch"])
async def test_unknown_ids_are_refused(rig: Rig, call: str) -> None:
    unknown = new_video_id(2.0)
    with pytest.raises(NoSuchVideo, match=f"^no video has the id '{unknown}'$"):
        await (rig.director.get(unknown) if call == "get" else rig.watched(unknown))


# Watchers


async def test_all_watchers_get_every_chunk_once_and_the_record_last(rig: Rig) -> None:
    halfway = rig.graph.gate("sample 2")
    video_id = await rig.create(chunks=4)
    early = [asyncio.create_task(rig.watched(video_id, k)) for k in (0, 0, 1, 3, 9)]
    await halfway.reached.wait()  # chunk 0 is committed, chunk 2 is not even sampled
    late = rig.watch(video_id)
    late_events = [await anext(late)]
    halfway.open()
    late_events += [event async for event in late]
    record = await rig.ended(video_id)

    def expected(from_chunk: int) -> list[Event]:
        return [*record.chunks[from_chunk:], record]

    assert len(record.chunks) == 4
    assert late_events == expected(0)
    assert await asyncio.gather(*early) == [expected(k) for k in (0, 0, 1, 3, 9)]
    assert [await rig.watched(video_id, k) for k in (0, 2, 4, 9)] == [expected(k) for k in (0, 2, 4, 9)]  # afterwards


async def test_a_watcher_who_leaves_changes_nothing_for_another(rig: Rig) -> None:
    gate = rig.graph.gate("sample 1")
    video_id = await rig.create()
    stays = asyncio.create_task(rig.watched(video_id))
    waits = asyncio.create_task(rig.watched(video_id))
    async with aclosing(rig.watch(video_id)) as events:
        await anext(events)
    waits.cancel()  # it waits for chunk 1
    gate.open()
    record = await rig.ended(video_id)
    assert record.status == "completed"
    assert await stays == [*record.chunks, record]
    assert waits.cancelled()


async def test_news_come_at_once_or_not_at_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.director.NEWS_S", 0.01)
    gate = rig.graph.gate("sample 1")
    video_id = await rig.create()
    await gate.reached.wait()
    nothing = await rig.director.news(video_id, 1)
    assert (nothing.status, nothing.chunks) == ("in_progress", ())
    gate.open()
    record = await rig.ended(video_id)
    news = await rig.director.news(video_id, 1)
    assert (news.status, news.init, news.chunks) == ("completed", record.init, record.chunks[1:])


async def test_a_video_made_for_its_watchers_ends_when_none_comes(rig: Rig) -> None:
    rig.director._unwatched_s = 0.0
    rig.graph.gate("sample 0")
    asked = request().model_copy(update={"while_watched": True})
    await rig.director.create(asked)
    await asyncio.wait([rig.director._running[asked.id].leading])
    assert (await rig.ended(asked.id)).status == "cancelled"


async def test_a_video_made_for_its_watchers_ends_after_the_last_one(rig: Rig) -> None:
    gate = rig.graph.gate("sample 1")
    asked = request().model_copy(update={"while_watched": True})
    await rig.director.create(asked)
    rig.director._unwatched_s = 0.0
    watching = [asyncio.ensure_future(rig.watched(asked.id)) for _ in range(2)]
    await asyncio.gather(gate.reached.wait(), rig.director.news(asked.id, 0))
    watching[0].cancel()
    await asyncio.wait(watching[:1])
    video = rig.director._running[asked.id]
    assert video.unwatched is not None and video.watchers == 1
    rig.director._cancel_unwatched(video)  # as the clock would, a while after the first one left
    assert not video.cancelled
    watching[1].cancel()
    await asyncio.wait([*watching, video.leading])
    record = await rig.ended(asked.id)
    assert (record.status, len(record.chunks)) == ("cancelled", 1)


# Failures

CALLS = {"encode": 0, "sample 0": 0, "sample 2": 1, "render 0": 0, "render 1": 1, "render 2": 2}  # chunks before it


@pytest.mark.parametrize("point", CALLS)
@pytest.mark.parametrize("error", [InvalidInput("seed", -1, "at least 0"), MediaError("fragment 1: no frames")])
async def test_an_error_of_ours_fails_its_video_alone(rig: Rig, point: str, error: HeliosError) -> None:
    rig.graph.errors["a bad one", point] = error
    other_gate = rig.graph.gate("sample 1")
    other = await rig.create()
    video_id = await rig.create(prompt="a bad one")
    failed = await rig.ended(video_id)
    assert (failed.status, len(failed.chunks)) == ("failed", CALLS[point])
    assert failed.error == VideoError(code=error.code, message=str(error))
    assert await rig.watched(video_id) == [*failed.chunks, failed]
    other_gate.open()
    assert (await rig.ended(other)).status == "completed"


@pytest.mark.parametrize("point", ["encode", "sample 1", "render 1"])
async def test_a_foreign_error_is_told_to_the_log_and_not_to_the_client(
    rig: Rig, point: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.graph.errors[PROMPT, point] = ValueError("an inner detail")
    video_id = await rig.create()
    failed = await rig.ended(video_id)
    assert failed.status == "failed"
    assert failed.error == VideoError(code="internal_error", message="the service failed while making this video")
    (told,) = [entry for entry in caplog.records if entry.levelname == "ERROR"]
    assert vars(told)["video_id"] == video_id and "an inner detail" in caplog.text


@pytest.mark.parametrize("point", ["encode", "sample 1", "render 0", "render 1"])
async def test_a_video_that_lost_a_call_is_not_completed(rig: Rig, point: str) -> None:
    """Ray tells of a call that was cancelled in the cluster with the same error as of one that we cancelled."""
    rig.graph.errors[PROMPT, point] = asyncio.CancelledError()
    record = await rig.ended(await rig.create(chunks=2))
    assert record.status == "failed" and record.error is not None
    assert record.error.code == "internal_error"


async def test_a_store_that_stays_away_ends_the_watch_and_hears_of_the_end_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.director.STORE_AGAIN_S", 0.0)
    gate = rig.graph.gate("render 1")
    video_id = await rig.create()
    watching = asyncio.create_task(rig.watched(video_id))
    await gate.reached.wait()
    rig.store.gone.set()
    gate.open()
    *chunks, failed = await watching
    assert isinstance(failed, VideoRecord) and len(chunks) == 1
    assert (failed.status, failed.error) == (
        "failed",
        VideoError(code="store_unavailable", message="the store is not there at the moment; try again"),
    )
    assert await rig.store.active() == [video_id]
    rig.store.gone.clear()
    await asyncio.wait([rig.director._running[video_id].leading])
    assert await rig.ended(video_id) == failed
    assert (await rig.ended(await rig.create())).status == "completed"


# Retries

POINTS = ["encode", "sample 0", "sampled 0", "sample 2", "sampled 2", "render 0", "render 2"]


def fragments(record: VideoRecord) -> list[str]:
    assert record.init is not None
    return [record.init.sha256, *(chunk.fragment.sha256 for chunk in record.chunks)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    async def run() -> list[str]:
        rig = await Rig(tmp_path_factory.mktemp("store")).start()
        return fragments(await rig.ended(await rig.create()))

    return asyncio.run(run())


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("loss", [ReplicaLost, InputLost])
@pytest.mark.parametrize("times", [1, 2])
async def test_what_is_lost_costs_no_frame(
    rig: Rig, undisturbed: list[str], point: str, loss: type[Exception], times: int
) -> None:
    rig.graph.losses[PROMPT, point] = [loss("gone") for _ in range(times)]
    record = await rig.ended(await rig.create())
    assert (record.status, fragments(record)) == ("completed", undisturbed)
    assert rig.graph.losses[PROMPT, point] == []
    part = {"e": "text_encoder", "s": "sampler", "r": "vae_decoder"}[point[0]]
    reason = "replica_lost" if loss is ReplicaLost else "input_lost"
    assert f'helios_retries_total{{part="{part}",reason="{reason}"}} {float(times)}'.encode() in (
        await rig.director.metrics()
    )


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("loss", [ReplicaLost, InputLost])
async def test_a_chunk_is_not_tried_for_ever(rig: Rig, point: str, loss: type[Exception]) -> None:
    rig.graph.losses[PROMPT, point] = [loss("gone") for _ in range(9)]
    record = await rig.ended(await rig.create())
    assert record.status == "failed" and record.error is not None
    assert record.error.code == "chunk_lost" and "lost 3 times" in record.error.message
    assert len(rig.graph.losses[PROMPT, point]) == 6  # one call and two retries
    assert (await rig.ended(await rig.create(prompt="another"))).status == "completed"


@pytest.mark.parametrize("point", POINTS)
async def test_a_result_that_is_not_sound_is_made_once_more(rig: Rig, undisturbed: list[str], point: str) -> None:
    rig.graph.losses[PROMPT, point] = [NotFinite("nothing but NaN")]
    record = await rig.ended(await rig.create())
    assert (record.status, fragments(record)) == ("completed", undisturbed)
    assert b'reason="result_lost"} 1.0' in await rig.director.metrics()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("error", [NotFinite, OutOfMemory])
async def test_what_is_not_sound_twice_fails_its_video_by_name(rig: Rig, point: str, error: type[HeliosError]) -> None:
    rig.graph.losses[PROMPT, point] = [error("layer 7") for _ in range(9)]
    record = await rig.ended(await rig.create())
    assert record.status == "failed" and record.error == VideoError(code=error.code, message=error.public)
    assert len(rig.graph.losses[PROMPT, point]) == 7
    assert (await rig.ended(await rig.create(prompt="another"))).status == "completed"


@pytest.mark.parametrize("point", ["encode", "render 0"])
async def test_what_kills_replicas_takes_no_neighbour_along_twice(rig: Rig, point: str) -> None:
    """Each call that is under way when one kills the replica is lost with it. The neighbours are as many as a replica
    takes calls; all come through, as of those that were lost before only one is tried at a time."""
    poison, neighbours = "poison", [f"neighbour {i}" for i in range(4)]
    beside: dict[str, asyncio.Future[None]] = {}
    kills = 0

    async def pass_(at: str, prompt: str) -> None:
        """What would be a replica at work: a call that poisons it ends all the others."""
        nonlocal kills
        if at != point:
            return
        if prompt == poison:
            while kills == 0 and len(beside) < len(neighbours):  # noqa: ASYNC110 - the first time all are there
                await asyncio.sleep(0)
            kills += 1
            for other in beside.values():
                other.set_exception(ReplicaLost("gone"))
            beside.clear()
            raise ReplicaLost("gone")
        beside[prompt] = work = asyncio.get_running_loop().create_future()
        if kills:
            asyncio.get_running_loop().call_soon(lambda: work.done() or work.set_result(None))
        try:
            await work
        finally:
            beside.pop(prompt, None)

    rig.graph._pass = pass_  # type: ignore[method-assign]
    ids = [await rig.create(prompt=prompt) for prompt in [*neighbours, poison]]
    *others, poisoned = [await rig.ended(video_id) for video_id in ids]
    assert poisoned.error is not None and poisoned.error.code == "chunk_lost" and kills == 3
    assert [record.status for record in others] == ["completed"] * len(neighbours)


async def test_a_retry_waits_for_no_other_part(rig: Rig) -> None:
    """While a text encoder is long in coming back, a VAE decoder's work is made again."""
    killed = rig.graph.gate("encode", "first")
    rig.graph.losses["first", "encode"] = [ReplicaLost("killed")]
    first = await rig.create(prompt="first")
    await killed.reached.wait()
    back = rig.graph.gates["first", "encode"] = Gate()
    killed.open()
    await back.reached.wait()
    rig.graph.losses[PROMPT, "render 0"] = [ReplicaLost("killed")]
    assert (await rig.ended(await rig.create())).status == "completed"
    back.open()
    assert (await rig.ended(first)).status == "completed"


async def test_where_there_is_no_sampler_a_video_waits_and_is_counted_as_wanting_one(rig: Rig) -> None:
    rig.graph.at_once = 0
    video_id = await rig.create(chunks=1)
    while rig.director.wanting() != {"random": 1}:  # noqa: ASYNC110 - its text is encoded first
        await asyncio.sleep(0)
    assert "sample 0" not in rig.graph.log
    rig.graph.at_once = 1
    assert (await rig.ended(video_id)).status == "completed"
    assert rig.director.wanting() == {"random": 0}


async def test_a_loss_counts_for_the_chunk_that_was_lost_and_not_for_the_one_it_goes_on_from(rig: Rig) -> None:
    rendering = rig.graph.gate("render 1")  # twice chunk 1 is not committed when the state after chunk 2 is lost
    losses = rig.graph.losses[PROMPT, "sampled 2"] = [InputLost("gone") for _ in range(9)]
    video_id = await rig.create()
    while len(losses) > 7:  # noqa: ASYNC110
        await asyncio.sleep(0)
    rendering.open()
    record = await rig.ended(video_id)
    assert record.error is not None and record.error.message == "chunk 2 was lost 3 times"
    assert len(losses) == 6


async def test_a_lost_replica_is_called_with_the_same_state_and_a_lost_input_comes_from_the_store(rig: Rig) -> None:
    given: list[tuple[int, int, str]] = []
    sample = rig.graph.sample

    async def watched(call: Call, spec: VideoSpec, index: int, weights: Any, state: Any, *texts: Any) -> Any:
        given.append((index, call.attempt, type(state).__name__))
        return await sample(call, spec, index, weights, state, *texts)

    rig.graph.sample = watched  # type: ignore[method-assign]
    rig.graph.losses[PROMPT, "sampled 1"] = [ReplicaLost("killed")]
    rig.graph.losses[PROMPT, "sample 2"] = [InputLost("gone")]
    record = await rig.ended(await rig.create(chunks=4))
    assert record.status == "completed"
    assert given[:4] == [
        (0, 0, "NoneType"), (1, 0, "StreamState"), (1, 1, "StreamState"), (2, 0, "StreamState"),
    ]  # fmt: skip
    again = given[4:]
    assert again[0][0] in (1, 2) and again[0][2] == "StoredObject", "it goes on after what was committed"
    assert [index for index, _, _ in again] == list(range(again[0][0], 4))


# Cancelling


@pytest.mark.parametrize(("point", "committed"), [("encode", 0), ("sample 0", 0), ("sample 2", 1), ("render 2", 2)])
async def test_a_cancelled_video_keeps_what_was_committed(rig: Rig, point: str, committed: int) -> None:
    under_way = rig.graph.gate(point).open()  # the call itself is under way when the test goes on
    video_id = await rig.create()
    await under_way.reached.wait()
    twice = await asyncio.gather(rig.director.cancel(video_id), rig.director.cancel(video_id))
    record = await rig.ended(video_id)
    assert list(twice) == [VideoStatus.of(record, None)] * 2
    assert (record.status, record.error, len(record.chunks)) == ("cancelled", None, committed)
    assert await rig.watched(video_id) == [*record.chunks, record]
    for chunk in record.chunks:
        assert len(await rig.store.read(chunk.fragment.key)) == chunk.fragment.bytes
    assert (await rig.ended(await rig.create(chunks=1, prompt="another"))).status == "completed"  # all parts are free


async def test_cancelling_comes_too_late_once_the_end_is_being_written(rig: Rig) -> None:
    rig.store.end_gate.opened.clear()
    video_id = await rig.create(chunks=1)
    await rig.store.end_gate.reached.wait()
    cancelling = asyncio.ensure_future(rig.director.cancel(video_id))
    await asyncio.sleep(0)  # it asks
    rig.store.end_gate.open()
    assert (await cancelling).status == (await rig.ended(video_id)).status == "completed"


async def test_cancelling_an_ended_video_does_nothing(rig: Rig) -> None:
    video_id = await rig.create(chunks=1)
    record = await rig.ended(video_id)
    assert await rig.director.cancel(video_id) == VideoStatus.of(record, None)
    assert record.status == "completed"
    assert await rig.ended(video_id) == record


# The store


async def test_a_completed_video_leaves_exactly_these_objects(rig: Rig) -> None:
    video_id = await rig.create()
    record = await rig.ended(video_id)
    folder = rig.folder / "videos" / video_id
    (text,) = folder.joinpath("texts").iterdir()
    assert sorted(str(path.relative_to(rig.folder)) for path in rig.folder.rglob("*") if path.is_file()) == [
        "terms/000001",
        f"videos/{video_id}/chunks/00000.t1.m4s",
        f"videos/{video_id}/chunks/00001.t1.m4s",
        f"videos/{video_id}/chunks/00002.t1.m4s",
        f"videos/{video_id}/init.mp4",
        f"videos/{video_id}/record.t1.json",
        f"videos/{video_id}/request.json",
        f"videos/{video_id}/states/00003.t1.safetensors",
        f"videos/{video_id}/texts/{text.name}",
        f"videos/{video_id}/thumbnail.jpg",
    ]
    assert record.init is not None and record.thumbnail is not None
    for named in (record.init, record.thumbnail, *(chunk.fragment for chunk in record.chunks), record.chunks[-1].state):
        data = (rig.folder / named.key).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (named.bytes, named.sha256)


async def test_a_starting_director_goes_on_with_what_another_left_unfinished(rig: Rig) -> None:
    accepted = request().model_copy(update={"fingerprint": rig.graph.fingerprint("random")})
    await rig.store.accept(accepted)  # and nothing else
    gate = rig.graph.gate("render 1")
    begun = await rig.create()
    await gate.reached.wait()
    done = await rig.create(chunks=1, prompt="a short one")
    completed = await rig.ended(done)
    left = await rig.get(begun)
    assert len(left.chunks) == 1

    second = await Rig(rig.folder).start()
    for video_id, chunks in ((accepted.id, ()), (begun, left.chunks)):
        record = await second.ended(video_id)
        assert (record.status, record.chunks[: len(chunks)], len(record.chunks)) == ("completed", chunks, 3)
    assert await second.ended(done) == completed

    # The first one still lives: it finds that it leads no more, and says nothing of the video any more.
    finished = await second.get(begun)
    gate.open()
    await asyncio.wait([rig.director._running[begun].leading])
    with pytest.raises(Superseded):
        rig.director.check_health()
    for ask in (rig.director.get, rig.director.cancel, lambda one: rig.director.news(one, 0)):
        with pytest.raises(Superseded):
            await ask(begun)
    with pytest.raises(Superseded):
        await rig.create()
    assert await second.ended(begun) == finished
    assert await second.store.active() == []


async def test_an_unreadable_video_does_not_keep_others_from_being_finished(rig: Rig) -> None:
    broken, unfinished = request(), request().model_copy(update={"fingerprint": rig.graph.fingerprint("random")})
    for asked in (broken, unfinished):
        await rig.store.accept(asked)
    (rig.folder / f"videos/{broken.id}/request.json").write_text('{"written": "by another version"}')
    second = await Rig(rig.folder).start()
    assert (await second.ended(unfinished.id)).status == "completed"
    assert (await second.ended(await second.create(chunks=1))).status == "completed"


async def test_a_video_whose_model_is_another_one_now_fails(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = rig.graph.gate("render 1")
    video_id = await rig.create()
    await gate.reached.wait()
    second = Rig(rig.folder)
    monkeypatch.setattr(second.graph, "fingerprint", lambda model: "of other weights")
    record = await (await second.start()).ended(video_id)
    assert record.error is not None and (record.error.code, len(record.chunks)) == ("model_changed", 1)


async def test_a_video_tells_under_what_each_of_its_chunks_was_made(rig: Rig) -> None:
    gate = rig.graph.gate("render 1")
    video_id = await rig.create()
    await gate.reached.wait()
    second = Rig(rig.folder)
    second.graph._samplers["random"]._device = "NVIDIA H100"
    record = await (await second.start()).ended(video_id)
    version = metadata.version("helios-serve")
    assert record.runs == (
        Run(version=version, device="cpu", from_chunk=0),
        Run(version=version, device="NVIDIA H100", from_chunk=1),
    )


async def test_a_video_that_nobody_makes_is_shown_as_interrupted(rig: Rig) -> None:
    """As when a Director could not close it: whoever asks must not wait for news for ever."""
    unfinished = request()
    await rig.store.accept(unfinished)
    record = VideoRecord(id=unfinished.id, created_at=1.0, spec=unfinished.spec, status="in_progress")
    await rig.store.put_record(record, 1)
    status, news = await rig.director.get(unfinished.id), await rig.director.news(unfinished.id, 0)
    assert (status.status, news.status) == ("failed", "failed")
    assert status.error is not None and status.error.code == "interrupted"


async def test_a_video_of_another_version_can_only_be_deleted(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    video_id = await rig.create(chunks=1)
    await rig.ended(video_id)
    for name in ("request.json", "record.t1.json"):
        (rig.folder / "videos" / video_id / name).write_text('{"id": 1, "spec": {"prompt": "a secret prompt"}}')
    for ask in (rig.director.get, rig.director.cancel, lambda one: rig.director.news(one, 0)):
        with pytest.raises(Unreadable, match=f"^video {video_id} was stored by another version"):
            await ask(video_id)
    assert "unreadable" in caplog.text and "secret" not in caplog.text
    assert (await rig.director.page(10)).videos == ()
    await rig.director.delete(video_id)
    assert not (rig.folder / "videos" / video_id).exists()
    with pytest.raises(NoSuchVideo):
        await rig.director.delete(video_id)


async def test_pages_go_on_over_what_cannot_be_shown(rig: Rig) -> None:
    ids = [await rig.create(chunks=1) for _ in range(3)]
    for video_id in ids:
        await rig.ended(video_id)
    ids.sort(reverse=True)
    await rig.store.accept(request())  # by a Director that died before it said so
    (rig.folder / "videos" / ids[1] / "record.t1.json").write_text("{}")
    first = await rig.director.page(1)
    assert ([video.id for video in first.videos], first.has_more) == (ids[:1], True)
    second = await rig.director.page(1, after=ids[0])
    assert ([video.id for video in second.videos], second.has_more) == (ids[2:], False)
    await rig.director.delete(ids[0])
    assert await rig.director.page(1, after=ids[0]) == second


@pytest.mark.parametrize("end", ["cancelled", "failed", "input lost"])
async def test_no_reference_to_a_state_outlives_its_video(rig: Rig, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Also when Python's own collector sees no reason to work."""
    collect, collected = gc.collect, asyncio.Event()
    monkeypatch.setattr("deployments.director.COLLECT_AFTER_S", 0.3)
    monkeypatch.setattr(gc, "collect", lambda: collected.set() or collect())
    collect()
    gc.disable()
    before = states()
    try:
        reached = rig.graph.gate("sample 2").open().reached
        if end == "failed":
            rig.graph.losses[PROMPT, "sample 2"] = [MediaError("fragment 2: no frames")]
        if end == "input lost":
            rig.graph.losses[PROMPT, "sample 2"] = [InputLost("gone")]
        video_id = await rig.create()
        await reached.wait()
        if end == "cancelled":
            await rig.director.cancel(video_id)
        await rig.ended(video_id)
        await collected.wait()
        # A thread that still renders what nobody waits for any more has let go of its state when it takes new work.
        await asyncio.wrap_future(rig.graph.vae_decoder._thread.submit(int))
        assert states() <= before
    finally:
        gc.enable()


def states() -> set[int]:
    return {id(thing) for thing in gc.get_objects() if isinstance(thing, StreamState)}
