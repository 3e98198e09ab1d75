"""Prompts that change on the way: scheduled at creation or sent while the video runs, which is one and the same.

A gate holds a chunk, so that a change that is sent lands at a known one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.making import InputLost, ReplicaLost
from deployments.records import VideoRecord
from deployments.store import Store, StoreUnavailable, new_video_id
from deployments.turns import Turns
from helios_core.checkpoints import KNOWN_MODELS
from helios_core.errors import MediaError
from tests.deployments.conftest import LocalService, serving
from tests.deployments.test_content import delete, ended, stored
from tests.deployments.test_continuing import Essence, essence, files, fresh, post, show, told
from tests.deployments.test_director import PROMPT, Gate

FOREST, DESERT = "a green forest in rain", "dunes at noon"
CHUNK = 1.375  # seconds
BODY = {"prompt": PROMPT, "size": "64x64", "steps": [1, 1, 1], "seconds": 4 * CHUNK}


async def change(service: LocalService, video_id: str, prompt: str, **fields: Any) -> httpx.Response:
    return await service.http.post(f"/v1/videos/{video_id}/prompt", json={"prompt": prompt, **fields})


async def changed(service: LocalService, video_id: str, prompt: str, **fields: Any) -> dict[str, Any]:
    answer = await change(service, video_id, prompt, **fields)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def scheduled(chunk: int, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"at_seconds": chunk * CHUNK, "prompt": prompt, **fields}


async def expected(service: LocalService, *prompts: dict[str, Any], **fields: Any) -> Essence:
    """What these changes make if they are known from the beginning."""
    return essence(await fresh(service, **{**BODY, **fields}, prompts=list(prompts)))


async def held(service: LocalService, point: str, **fields: Any) -> tuple[str, Gate]:
    """A video that has come to this point, and the gate that holds it there."""
    gate = service.graph.gates[PROMPT, point] = Gate()
    video_id = (await post(service, **{**BODY, **fields}))["id"]
    await gate.reached.wait()
    return video_id, gate


def one_sampler(service: LocalService) -> Turns:
    turns = service.director._turns["random"]
    turns._samplers = lambda: 1
    return turns


async def finish(service: LocalService, video_id: str, gate: Gate) -> VideoRecord:
    gate.open()
    record = await ended(service, video_id)
    assert record.status == "completed", record.error
    return record


# Scheduled or sent


@pytest.mark.parametrize(("point", "chunk"), [("encode", 0), ("sample 0", 1), ("sampled 1", 2), ("sample 2", 3)])
async def test_a_change_that_is_sent_is_one_that_was_scheduled(service: LocalService, point: str, chunk: int) -> None:
    video_id, gate = await held(service, point)
    assert await changed(service, video_id, FOREST, transition_chunks=2) == {
        "id": video_id,
        "object": "video.prompt",
        "chunk": chunk,
        "at_seconds": chunk * CHUNK,
        "prompt": FOREST,
        "transition_chunks": 2,
        "note": None,
    }
    in_force = {"chunk": chunk, **scheduled(chunk, FOREST, transition_chunks=2)}
    assert (await show(service, video_id))["prompts"] == [in_force]
    made = essence(await finish(service, video_id, gate))
    assert made == await expected(service, scheduled(chunk, FOREST, transition_chunks=2))
    plain = await expected(service)
    assert made[:chunk] == plain[:chunk] and made[chunk:] != plain[chunk:]


async def test_a_change_before_the_first_chunk_makes_the_video_of_its_prompt(service: LocalService) -> None:
    """Nothing is in force yet that it could be blended with."""
    video_id, gate = await held(service, "encode", seconds=CHUNK)
    assert (await changed(service, video_id, FOREST))["chunk"] == 0
    assert essence(await finish(service, video_id, gate)) == await expected(service, prompt=FOREST, seconds=CHUNK)


async def test_the_last_one_of_several_wins(service: LocalService) -> None:
    video_id, gate = await held(service, "sample 0")
    for prompt, chunks in (("a city", 1), (DESERT, 3), (FOREST, 2)):
        assert (await changed(service, video_id, prompt, transition_chunks=chunks))["chunk"] == 1
    made = await finish(service, video_id, gate)
    assert essence(made) == await expected(service, scheduled(1, FOREST, transition_chunks=2))
    assert [change.prompt for change in made.spec.prompts] == [FOREST]


async def test_changes_at_the_same_moment_are_in_force_as_they_were_answered(service: LocalService) -> None:
    video_id, gate = await held(service, "sample 0")
    answers = await asyncio.gather(*(changed(service, video_id, f"prompt {k}") for k in range(5)))
    assert {answer["chunk"] for answer in answers} == {1}
    (in_force,) = (await show(service, video_id))["prompts"]
    assert in_force["prompt"] in {answer["prompt"] for answer in answers}
    assert essence(await finish(service, video_id, gate)) == await expected(service, scheduled(1, in_force["prompt"]))


async def test_a_change_during_a_transition(service: LocalService) -> None:
    """Three texts drive chunk 2 here: half a transition from the first to the second, and half of the third."""
    video_id, gate = await held(service, "sample 0")
    await changed(service, video_id, FOREST, transition_chunks=4)
    second = service.graph.gate("sample 1")
    gate.open()
    await second.reached.wait()
    assert (await changed(service, video_id, DESERT, transition_chunks=2))["chunk"] == 2
    made = await finish(service, video_id, second)
    mix = dict(made.spec.mix_of_chunk(2))
    assert mix == pytest.approx({PROMPT: 0.375, FOREST: 0.125, DESERT: 0.5})
    schedule = [scheduled(1, FOREST, transition_chunks=4), scheduled(2, DESERT, transition_chunks=2)]
    assert essence(made) == await expected(service, *schedule)


async def test_a_change_takes_the_place_of_a_scheduled_one_at_its_chunk(service: LocalService) -> None:
    schedule = [scheduled(1, DESERT), scheduled(3, "a city")]
    video_id, gate = await held(service, "sample 0", prompts=schedule)
    assert (await changed(service, video_id, FOREST))["chunk"] == 1
    made = await finish(service, video_id, gate)
    assert [(each.chunk, each.prompt) for each in made.spec.prompts] == [(1, FOREST), (3, "a city")]
    assert essence(made) == await expected(service, scheduled(1, FOREST), scheduled(3, "a city"))


@pytest.mark.parametrize("model", ["random-base", "random-mid"])
async def test_guided_videos_take_changes_too(tmp_path: Path, model: str) -> None:
    guided = {
        "steps": [2] if model == "random-base" else [1, 1, 1],
        "guidance_scale": 3.0,
        "negative_prompt": "blurred",
        "seconds": 2 * CHUNK,
    }
    async with serving(tmp_path, model) as service:
        video_id, gate = await held(service, "sample 0", **guided)
        assert (await changed(service, video_id, FOREST, transition_chunks=2))["chunk"] == 1
        made = essence(await finish(service, video_id, gate))
        assert made == await expected(service, scheduled(1, FOREST, transition_chunks=2), **guided)
        assert made[1] != (await expected(service, **guided))[1]
        other = {**guided, "negative_prompt": "dark"}
        assert made[1] != (await expected(service, scheduled(1, FOREST, transition_chunks=2), **other))[1]


# Extended videos


@pytest.mark.parametrize("more", [{}, {"prompt": DESERT, "transition_chunks": 1}])
@pytest.mark.parametrize("seconds", [CHUNK, 1.0])
async def test_a_change_of_an_extension_begins_with_its_first_new_chunk(
    service: LocalService, more: dict[str, Any], seconds: float
) -> None:
    """Also if it takes the place of the extension's own prompt: it is blended with what was in force before."""
    source = await fresh(service, **{**BODY, "seconds": seconds})
    gate = service.graph.gate("encode")
    video_id = (await post(service, f"/{source.id}/extend", seconds=2.75 - seconds, **more))["id"]
    await gate.reached.wait()
    assert (await changed(service, video_id, FOREST))["chunk"] == 1
    made = essence(await finish(service, video_id, gate))
    assert made == await expected(service, scheduled(1, FOREST), seconds=2 * CHUNK)


async def test_a_change_while_an_extension_waits_for_its_turn(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts were encoded before: that of the change, and those that it is blended with, must be there."""
    source = await fresh(service, **{**BODY, "seconds": CHUNK})
    turns = one_sampler(service)
    other, gate = await held(service, "sample 0", seconds=CHUNK)
    asked, turn = asyncio.Event(), turns.turn

    def watched(*of: Any, **more: Any) -> Any:
        asked.set()
        return turn(*of, **more)

    monkeypatch.setattr(turns, "turn", watched)
    video_id = (await post(service, f"/{source.id}/extend", seconds=CHUNK, prompt=DESERT, transition_chunks=1))["id"]
    await asked.wait()
    assert turns.place(video_id) == 0
    assert (await changed(service, video_id, FOREST))["chunk"] == 1
    gate.open()
    await ended(service, other)
    made = await ended(service, video_id)
    assert made.status == "completed"
    assert essence(made) == await expected(service, scheduled(1, FOREST), seconds=2 * CHUNK)


# What is promised of a change


async def test_a_change_is_stored_before_it_is_answered(service: LocalService) -> None:
    video_id, gate = await held(service, "sample 1")
    await changed(service, video_id, FOREST)
    assert [(each.chunk, each.prompt) for each in (await stored(service, video_id)).spec.prompts] == [(2, FOREST)]
    gate.open()
    await ended(service, video_id)
    assert [each.prompt for each in (await stored(service, video_id)).spec.prompts] == [FOREST]


async def test_a_change_that_could_not_be_stored_is_none(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    video_id, gate = await held(service, "sample 0")

    async def away(_: Store, record: VideoRecord, term: int) -> None:
        raise StoreUnavailable("s3://inside: away")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_record", away)
        answer = await change(service, video_id, FOREST)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert "retry-after" in answer.headers and "inside" not in answer.text
    assert (await show(service, video_id))["prompts"] == []
    made = await finish(service, video_id, gate)
    assert made.spec.prompts == () and essence(made) == await expected(service)


@pytest.mark.parametrize("loss", [ReplicaLost, InputLost])
async def test_a_chunk_that_is_made_again_has_its_text_again(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, loss: type[Exception]
) -> None:
    monkeypatch.setattr("deployments.making.RETRY_AFTER_S", (0.0, 0.0))
    service.graph.losses[PROMPT, "sampled 1"] = [loss("gone") for _ in range(2)]
    video_id, gate = await held(service, "sampled 1")
    assert (await changed(service, video_id, FOREST))["chunk"] == 2
    made = await finish(service, video_id, gate)
    assert service.graph.losses[PROMPT, "sampled 1"] == []
    assert essence(made) == await expected(service, scheduled(2, FOREST))


@pytest.mark.parametrize("loss", [ReplicaLost, InputLost])
async def test_a_text_that_is_lost_costs_the_video_nothing(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, loss: type[Exception]
) -> None:
    """Neither a frame nor one of its chunks' retries."""
    monkeypatch.setattr("deployments.making.RETRY_AFTER_S", (0.0, 0.0))
    video_id, gate = await held(service, "sample 0", seconds=2 * CHUNK)
    encode, losses = service.graph.encode, [loss("gone") for _ in range(3 + 2)]

    async def losing(call: Any, model: str, prompt: str) -> Any:
        if losses and prompt == FOREST:
            raise losses.pop()
        return await encode(call, model, prompt)

    monkeypatch.setattr(service.graph, "encode", losing)
    answer = await change(service, video_id, FOREST)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert len(losses) == 2 and "retry-after" in answer.headers
    assert (await show(service, video_id))["prompts"] == []
    assert (await changed(service, video_id, FOREST))["chunk"] == 1  # the third time it comes through
    service.graph.losses[PROMPT, "sampled 1"] = [ReplicaLost("gone") for _ in range(2)]
    made = await finish(service, video_id, gate)
    assert essence(made) == await expected(service, scheduled(1, FOREST), seconds=2 * CHUNK)


async def test_videos_side_by_side_do_not_mix_their_texts(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sampler in turns, and another text for each chunk: a cache that took one for another would show here."""
    bodies = [
        {**BODY, "prompt": first, "seed": 1, "prompts": [scheduled(k, text, transition_chunks=k) for k, text in rest]}
        for first, rest in (
            ("a red fox", [(1, "a blue fox"), (2, "a red bird")]),
            ("a red sun", [(2, "a red fox")]),
            ("a red cat", []),
        )
    ]
    alone = [essence(await fresh(service, **body)) for body in bodies]
    one_sampler(service)
    sampled: list[str] = []
    sample = service.graph.sample

    async def watched(call: Any, *args: Any) -> Any:
        sampled.append(call.video_id)
        return await sample(call, *args)

    monkeypatch.setattr(service.graph, "sample", watched)
    ids = [(await post(service, **body))["id"] for body in bodies]
    assert [essence(await ended(service, video_id)) for video_id in ids] == alone
    assert sorted(sampled) == sorted(ids * 4)
    assert sum(one != other for one, other in itertools.pairwise(sampled)) >= 6, "they take turns"


async def test_a_change_changes_no_other_video(service: LocalService) -> None:
    others = ["a red fox", "a red bird"]
    alone = [await expected(service, prompt=prompt) for prompt in others]
    one_sampler(service)
    gate = service.graph.gate("sample 1")
    ids = [(await post(service, **{**BODY, "prompt": prompt}))["id"] for prompt in (others[0], PROMPT, others[1])]
    await gate.reached.wait()
    assert (await changed(service, ids[1], others[0], transition_chunks=2))["chunk"] == 2
    gate.open()
    made = [essence(await ended(service, video_id)) for video_id in ids]
    assert [made[0], made[2]] == alone
    assert made[1] == await expected(service, scheduled(2, others[0], transition_chunks=2))


# Too late


async def test_a_video_that_takes_no_change(service: LocalService) -> None:
    video_id, gate = await held(service, "sample 3")
    status, code, message = told(await change(service, video_id, FOREST))
    assert (status, code) == (409, "not_possible")
    assert message == f"all chunks of video {video_id} have begun; allowed: to extend it later"
    made = await finish(service, video_id, gate)
    status, code, message = told(await change(service, video_id, FOREST))
    assert (status, code, "is completed; allowed" in message) == (409, "not_possible", True)
    assert made == await stored(service, video_id) and made.spec.prompts == ()
    await delete(service, video_id)
    for unknown in (video_id, new_video_id(9.0), "video_x"):
        assert told(await change(service, unknown, FOREST))[:2] == (404, "not_found")


async def stop(service: LocalService, video_id: str, how: str) -> httpx.Response:
    if how == "delete":
        return await service.http.delete(f"/v1/videos/{video_id}")
    return await service.http.post(f"/v1/videos/{video_id}/cancel")


@contextmanager
def no_task_is_left() -> Iterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() <= before


@pytest.mark.parametrize("end", ["cancel", "delete", "complete", "fail"])
async def test_a_video_that_ends_while_a_change_is_under_way(service: LocalService, end: str) -> None:
    """The end waits for the change, which is refused; nothing of it is left."""
    encoding = service.graph.gate("encode", FOREST)
    with no_task_is_left():
        video_id, gate = await held(service, "sample 1", seconds=3 * CHUNK)
        changing = asyncio.create_task(change(service, video_id, FOREST))
        await encoding.reached.wait()
        running, ending = service.director._running[video_id], None
        if end in ("cancel", "delete"):
            ending = asyncio.create_task(stop(service, video_id, end))
        else:
            if end == "fail":
                service.graph.errors[PROMPT, "sample 1"] = MediaError("no frames")
            gate.open()
        await asyncio.wait([running.making])
        assert not running.leading.done()
        encoding.open()
        status, code, _ = told(await changing)
        assert (status, code) == (409, "not_possible")
        await asyncio.wait([running.leading])
        if ending is not None:
            assert (await ending).status_code == 200
    assert service.director._running == {} and await service.store.active() == []
    if end == "delete":
        assert files(service) == []
        return
    record = await stored(service, video_id)
    assert record.status == {"cancel": "cancelled", "complete": "completed", "fail": "failed"}[end]
    assert record.spec.prompts == ()
    assert [name for name in files(service, video_id) if name.startswith("record")] == ["record.t1.json"]


@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_a_video_that_ends_while_its_change_is_put(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """It was in time: it is answered, and its record stands, or is deleted with the rest."""
    video_id, _ = await held(service, "sample 1")
    putting, put_record = Gate(), Store.put_record

    async def slow(store: Store, record: VideoRecord, term: int) -> None:
        if record.spec.prompts and not record.ended:
            putting.reached.set()
            await putting.opened.wait()
        await put_record(store, record, term)

    monkeypatch.setattr(Store, "put_record", slow)
    with no_task_is_left():
        changing = asyncio.create_task(change(service, video_id, FOREST))
        await putting.reached.wait()
        running = service.director._running[video_id]
        ending = asyncio.create_task(stop(service, video_id, end))
        await asyncio.wait([running.making])
        putting.open()
        assert (await changing).json()["chunk"] == 2
        assert (await ending).status_code == 200
    if end == "delete":
        assert files(service) == [] and await service.store.active() == []
    else:
        record = await stored(service, video_id)
        assert record.status == "cancelled" and [each.prompt for each in record.spec.prompts] == [FOREST]


async def test_who_leaves_does_not_take_the_change_along(service: LocalService) -> None:
    encoding = service.graph.gate("encode", FOREST)
    video_id, gate = await held(service, "sample 0", seconds=2 * CHUNK)
    changing = asyncio.create_task(change(service, video_id, FOREST))
    await encoding.reached.wait()
    changing.cancel()
    await asyncio.wait([changing])
    changes = list(service.director._running[video_id].changes)
    encoding.open()
    await asyncio.wait(changes)
    made = await finish(service, video_id, gate)
    assert essence(made) == await expected(service, scheduled(1, FOREST), seconds=2 * CHUNK)


# What is refused

# fields ▸ field named in the answer, words that the message must hold
CHANGES: list[tuple[dict[str, Any], str, list[str]]] = [
    ({}, "prompt", ["required"]),
    ({"prompt": " "}, "prompt", ["not empty"]),
    ({"prompt": 7}, "prompt", ["7", "text"]),
    ({"prompt": "é" * 4097}, "prompt", ["8194", "8192"]),
    ({"prompt": FOREST, "transition_chunks": 0}, "transition_chunks", ["0", "1 to 64"]),
    ({"prompt": FOREST, "transition_chunks": 65}, "transition_chunks", ["65", "1 to 64"]),
    ({"prompt": FOREST, "transition_chunks": 1.5}, "transition_chunks", ["1.5", "whole number"]),
    ({"prompt": FOREST, "transition_chunks": True}, "transition_chunks", ["True", "whole number"]),
    ({"prompt": FOREST, "at_seconds": 1}, "at_seconds", ["prompt", "transition_chunks"]),
]

AT = {"prompt": FOREST}
SCHEDULES: list[tuple[Any, list[str]]] = [
    ([{"at_seconds": 2, **AT}, {"at_seconds": 1, **AT}], ["1.0", "rising order", "1.375 s"]),
    ([{"at_seconds": 1, **AT}, {"at_seconds": 1, **AT}], ["1.0", "rising order"]),
    ([{"at_seconds": 0.5, **AT}, {"at_seconds": 1, **AT}], ["1.0", "a chunk (1.375 s) apart"]),
    ([{"at_seconds": 5.5, **AT}], ["5.5", "less than seconds 5.5"]),
    ([{"at_seconds": 4.2, **AT}], ["4.2", "up to 4.125"]),
    ([{"at_seconds": -1, **AT}], ["-1.0", "from 0"]),
    ([{"at_seconds": float("nan"), **AT}], ["nan", "from 0"]),
    ([{"at_seconds": float("inf"), **AT}], ["inf", "from 0"]),
    ([{"at_seconds": 0, **AT}] * 65, ["65 of them", "at most 64"]),
    ([{"at_seconds": 1, "prompt": ""}], ["not empty"]),
    ([{"at_seconds": 1, "prompt": "a\0"}], ["NUL"]),
    ([{"at_seconds": 1, "prompt": "\ud800"}], ["Unicode"]),
    ([{"at_seconds": 1, "transition_chunks": 0, **AT}], ["0", "transition_chunks from 1 to 64"]),
    ([{"at_seconds": 1, "transition_chunks": 65, **AT}], ["65", "transition_chunks from 1 to 64"]),
    ([{"at_seconds": 1}], ["at_seconds", "{at_seconds, prompt}"]),
    ([{"prompt": FOREST}], [FOREST, "{at_seconds, prompt}"]),
    ([{"at_seconds": 1, "weight": 2, **AT}], ["2", "{at_seconds, prompt}"]),
    ([{"at_seconds": "soon", **AT}], ["soon", "{at_seconds, prompt}"]),
    ([FOREST], [FOREST, "a list of"]),
    ({"at_seconds": 1, **AT}, ["a list of"]),
    ("soon", ["soon", "a list of"]),
    (None, ["None", "a list of"]),
]


async def test_unprocessable(service: LocalService) -> None:
    async def refused(path: str, fields: dict[str, Any], param: str, words: list[str]) -> None:
        headers = {"content-type": "application/json"}
        answer = await service.http.post(f"/v1/videos{path}", content=json.dumps(fields), headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_input", param), fields
        assert all(word in error["message"] for word in words), error["message"]
        assert len(error["message"]) < 1000

    for schedule, words in SCHEDULES:
        await refused("", {**BODY, "prompts": schedule}, "prompts", words)
    assert files(service) == []
    video_id, _ = await held(service, "sample 0")
    for fields, param, words in CHANGES:
        await refused(f"/{video_id}/prompt", fields, param, words)
    assert (await show(service, video_id))["prompts"] == []


# Words that a model knows


async def test_unknown_words_are_noted_and_make_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"colour": ("red", "blue"), "thing": ("sun",)}
    monkeypatch.setitem(KNOWN_MODELS, "random", replace(KNOWN_MODELS["random"], vocabulary=words))
    note = f"the model random knows no word of {FOREST!r} and "
    async with serving(tmp_path, "random", "random-base") as service:
        models = (await service.http.get("/v1/models")).json()["data"]
        assert [model["vocabulary"] for model in models] == [{"colour": ["red", "blue"], "thing": ["sun"]}, None]

        video_id, gate = await held(service, "sample 1")
        assert (await show(service, video_id))["note"] is None
        assert (await changed(service, video_id, "a blue sea"))["note"] is None
        assert (await changed(service, video_id, FOREST))["note"].startswith(note)
        record = await finish(service, video_id, gate)
        assert [each.prompt for each in record.spec.prompts] == [FOREST]
        (listed,) = (await service.http.get("/v1/videos")).json()["data"]
        assert listed["note"].startswith(note) and listed == await show(service, video_id)

        for path, fields in (("extend", {"seconds": CHUNK}), ("fork", {"chunk": 0}), ("remix", {})):
            known = await post(service, f"/{video_id}/{path}", prompt="a red sun", **fields)
            unknown = await post(service, f"/{video_id}/{path}", prompt=FOREST, **fields)
            assert (known["note"] is None) == (path != "extend"), "an extension's first prompts stay"
            assert unknown["note"].startswith(note) and "; it knows colour: red, blue; thing: sun" in unknown["note"]
        any_words = await post(service, **{**BODY, "prompt": FOREST, "model": "random-base", "steps": [1]})
        assert any_words["note"] is None

    async with serving(tmp_path, "random-base") as service:
        assert (await show(service, video_id))["note"] is None, "its model is served no more"
