"""What a client may send as a body, JSON or a form, and how it is bounded and refused. No 500, whatever it is."""

from __future__ import annotations

import gc
import json
import logging
import random
from collections.abc import AsyncIterator, Iterable
from typing import Any

import psutil
import pytest
from fastapi import Request

from deployments.bodies import MAX_FIELDS, Body, read_body
from deployments.errors import RequestError
from deployments.schemas import ChangePrompt, CreateVideo, EditVideo, ExtendVideo, Fields, ForkVideo
from helios_core.errors import HeliosError, InvalidInput
from tests.deployments.conftest import LocalService

BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
JSON = "application/json"
MAX, MAX_UPLOAD = 2000, 5000


def form(*parts: tuple[str, bytes | str], files: Iterable[tuple[str, str, bytes]] = ()) -> bytes:
    """A form of (name, text) and (name, file name, data)."""
    sent = b""
    for name, value in parts:
        value = value.encode() if isinstance(value, str) else value
        sent += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
    for name, filename, data in files:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'
        sent += head.encode() + data + b"\r\n"
    return sent + f"--{BOUNDARY}--\r\n".encode()


def request_of(data: bytes, content_type: str | None, size: int = 100, **headers: str) -> Request:
    """A request that arrives in parts of `size` bytes."""
    parts = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": k < len(parts) - 1} for k, part in enumerate(parts)]
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    if content_type is not None:
        raw.append((b"content-type", content_type.encode("latin-1")))

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)
    request.state.unread = messages
    return request


async def parsed(
    kind: type[Fields], data: bytes, content_type: str = FORM, file: str | None = None, size: int = 100
) -> dict[str, Any]:
    """The fields that were sent, and the bytes of the file, if there is one, as `file`."""
    async with read_body(request_of(data, content_type, size), MAX, MAX_UPLOAD) as body:
        fields = body.parse(kind, file)
        found = {name: getattr(fields, name) for name in fields.model_fields_set}
        upload = None if file is None else body.file(file)
        return found if upload is None else {**found, "file": upload.file.read()}


async def refused(data: bytes, content_type: str | None, **headers: str) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        async with read_body(request_of(data, content_type, **headers), MAX, MAX_UPLOAD):
            pass
    return caught.value.status, caught.value.code


# Forms

# names and texts ▸ what they are
FORMS: list[tuple[list[tuple[str, str]], dict[str, Any]]] = [
    ([("prompt", "a sea ❄"), ("seconds", "4")], {"prompt": "a sea ❄", "seconds": 4.0}),
    ([("steps[]", "1"), ("steps[]", "2"), ("steps[]", "3")], {"steps": [1, 2, 3]}),
    ([("steps", "1,2,3")], {"steps": [1, 2, 3]}),
    ([("steps", "[1, 2, 3]")], {"steps": [1, 2, 3]}),
    ([("steps", " [1,2,3] ")], {"steps": [1, 2, 3]}),
    ([("seed", "7"), ("fps", "30")], {"seed": 7, "fps": 30}),
    ([("seed", str(2**63 - 1))], {"seed": 2**63 - 1}),
    ([("amplify_first_chunk", "true")], {"amplify_first_chunk": True}),
    ([("amplify_first_chunk", "false")], {"amplify_first_chunk": False}),
    ([("guidance_scale", "2.5"), ("seconds", "1.5")], {"guidance_scale": 2.5, "seconds": 1.5}),
    ([("prompt", "true"), ("preset", "1")], {"prompt": "true", "preset": "1"}),
    ([("prompt", "")], {"prompt": ""}),
    ([("prompt", '["a"]')], {"prompt": '["a"]'}),
]


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(("sent", "expected"), FORMS)
async def test_forms(sent: list[tuple[str, str]], expected: dict[str, Any], size: int) -> None:
    sent = sent if any(name == "prompt" for name, _ in sent) else [("prompt", "a sea"), *sent]
    assert await parsed(CreateVideo, form(*sent), size=size) == {"prompt": "a sea", **expected}


SCHEDULE = [
    {"at_seconds": 1.0, "prompt": "b", "transition_chunks": 3},
    {"at_seconds": 2.5, "prompt": "c", "transition_chunks": 2},
]


@pytest.mark.parametrize(
    "sent",
    [
        [(f"prompts[][{name}]", str(value)) for each in SCHEDULE for name, value in each.items()],
        [(f"prompts[][{name}]", str(each[name])) for name in SCHEDULE[0] for each in SCHEDULE],  # as OpenAI's client
        [("prompts", json.dumps([{**SCHEDULE[0]}, SCHEDULE[1]]))],
        [("prompts", ",".join(map(json.dumps, SCHEDULE)))],
    ],
)
async def test_a_schedule_in_a_form(sent: list[tuple[str, str]]) -> None:
    fields = await parsed(CreateVideo, form(("prompt", "a"), *sent))
    assert [each.model_dump() for each in fields["prompts"]] == SCHEDULE


async def test_a_schedule_in_json() -> None:
    sent = json.dumps({"prompt": "a", "prompts": SCHEDULE, "steps": [1, 1, 1], "seconds": "4"}).encode()
    fields = await parsed(CreateVideo, sent, JSON)
    assert [each.model_dump() for each in fields["prompts"]] == SCHEDULE
    assert (fields["steps"], fields["seconds"]) == ([1, 1, 1], 4.0)


@pytest.mark.parametrize("content_type", [JSON, "application/json; charset=utf-8", "Application/JSON ;x=y"])
async def test_content_types_of_json(content_type: str) -> None:
    assert await parsed(ChangePrompt, b'{"prompt": "a"}', content_type) == {"prompt": "a"}


@pytest.mark.parametrize("content_type", [FORM, FORM + "; charset=utf-8", f'Multipart/Form-Data;boundary="{BOUNDARY}"'])
async def test_content_types_of_forms(content_type: str) -> None:
    assert await parsed(ChangePrompt, form(("prompt", "é")), content_type) == {"prompt": "é"}


async def test_a_file_and_what_goes_with_it() -> None:
    data = bytes(range(256)) * 8 + f"\r\n--{BOUNDARY[:-1]}".encode()
    for name in ("video", "video[]"):
        sent = form(("prompt", "a"), files=[(name, "é.mp4", data)])
        assert await parsed(EditVideo, sent, file="video", size=37) == {"prompt": "a", "file": data}
    by_id = await parsed(EditVideo, form(("prompt", "a"), ("video[id]", "video_1")), file="video")
    assert by_id["video"].id == "video_1"


async def test_files_are_closed_when_the_block_ends() -> None:
    request = request_of(form(files=[("video", "a", b"data")]), FORM)
    async with read_body(request, MAX, MAX_UPLOAD) as body:
        upload = body.file("video")
        assert upload is not None and not upload.file.closed
    assert upload.file.closed


# names and texts, kind ▸ field named in the error, words that it must hold
WRONG: list[tuple[type[Fields], list[tuple[str, str]], str, list[str]]] = [
    (CreateVideo, [("prompt", "a"), ("prompt", "b")], "prompt", ["'b'", "each field once"]),
    (CreateVideo, [("steps[]", "1"), ("steps", "2")], "steps", ["each field once"]),
    (CreateVideo, [("steps", "1"), ("steps[]", "2")], "steps[]", ["each field once"]),
    (EditVideo, [("video[id]", "a"), ("video[id]", "b")], "video[id]", ["each field once"]),
    (EditVideo, [("video", "a"), ("video[id]", "b")], "video[id]", ["each field once"]),
    (EditVideo, [("prompt", "a"), ("video[id][x]", "b")], "video", ["a file, or the id"]),
    (EditVideo, [("prompt", "a"), ("video[name]", "b")], "video", ["a file, or the id"]),
    (EditVideo, [("prompt", "a"), ("video", "video_1")], "video", ["video_1", "a file, or the id"]),
    (CreateVideo, [("prompt[a]", "b")], "prompt", ["text"]),
    (CreateVideo, [("prompt[]", "b")], "prompt", ["text"]),
    (CreateVideo, [("prompt", "a"), ("steps[x]", "1")], "steps", ["a list of whole numbers"]),
    (CreateVideo, [("prompt", "a"), ("steps[]", "1"), ("steps[][a]", "1")], "steps", ["a list of whole numbers"]),
    (CreateVideo, [("prompt", "a"), ("steps[0]", "1")], "steps", ["a list of whole numbers"]),
    (CreateVideo, [("prompt", "a"), ("steps[][][]", "1")], "steps", ["a list of whole numbers"]),
    (CreateVideo, [("prompt", "a"), ("steps", "two")], "steps", ["two", "a list of whole numbers"]),
    (CreateVideo, [("prompt", "a"), ("steps", "[[1]]")], "steps", ["a list of whole numbers"]),
    (CreateVideo, [("prompt", "a"), ("steps", "[" * 900)], "steps", ["a list of whole numbers"]),
    (CreateVideo, [("prompt", "a"), ("prompts", '{"a": 1}')], "prompts", ["at_seconds"]),
    (CreateVideo, [("prompt", "a"), ("prompts[][at_seconds]", "soon")], "prompts", ["soon", "at_seconds"]),
    (
        CreateVideo,
        [("prompt", "a"), ("prompts[][at_seconds]", "1"), ("prompts[][at_seconds]", "2"), ("prompts[][prompt]", "b")],
        "prompts",
        ["different names", "JSON"],
    ),
    (CreateVideo, [("prompt", "a"), ("prompts[][when]", "1")], "prompts", ["at_seconds"]),
    (CreateVideo, [("prompt", "a"), ("a[][b][c][d]", "1")], "a", ["one of priority"]),
    (CreateVideo, [("prompt", "a"), ("a[b][c][d][e][f]", "1")], "a[b][c][d][e][f]", ["one of priority"]),
    (CreateVideo, [("prompt", "a"), ("[]", "1")], "[]", ["one of priority"]),
    (CreateVideo, [("prompt", "a"), ("", "1")], "", ["one of priority"]),
    (CreateVideo, [("prompt", "a"), ("steps]", "1")], "steps]", ["one of priority"]),
    (CreateVideo, [("prompt", "a"), ("seconds", "four")], "seconds", ["four", "number"]),
    (CreateVideo, [("prompt", "a"), ("seed", "1.5")], "seed", ["1.5", "whole number"]),
    (CreateVideo, [("prompt", "a"), ("seed", "")], "seed", ["whole number"]),
    (CreateVideo, [("prompt", "a"), ("amplify_first_chunk", "perhaps")], "amplify_first_chunk", ["true or false"]),
    (CreateVideo, [("prompt", "a"), ("num_frames", "33")], "num_frames", ["33", "seconds"]),
    (
        CreateVideo,
        [("prompt", "a"), ("image_reference[image_url]", "http://x")],
        "image_reference",
        ["input_reference"],
    ),
    (CreateVideo, [("seed", "1")], "prompt", ["required"]),
    (ExtendVideo, [("chunk", "1")], "chunk", ["one of priority, deadline_s, seconds, prompt, transition_chunks"]),
    (ForkVideo, [("prompt", "a")], "chunk", ["required"]),
    (ForkVideo, [("chunk", "one")], "chunk", ["one", "whole number"]),
    (ChangePrompt, [], "prompt", ["required"]),
]


@pytest.mark.parametrize(("kind", "sent", "field", "words"), WRONG)
async def test_wrong_forms(kind: type[Fields], sent: list[tuple[str, str]], field: str, words: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        await parsed(kind, form(*sent), file="video" if kind is EditVideo else None)
    assert caught.value.field == field
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kind", "file", "files", "field", "words"),
    [
        (ChangePrompt, None, [("prompt", "a.txt", b"a")], "prompt", ["a.txt", "no file"]),
        (CreateVideo, "input_reference", [("image", "a.png", b"a")], "image", ["a.png", "input_reference"]),
        (CreateVideo, "input_reference", [("input_reference", "a", b"a")] * 2, "input_reference", ["2 files", "one"]),
        (EditVideo, "video", [("video", "a", b"a"), ("mask", "b", b"b")], "mask", ["'b'", "the field video"]),
    ],
)
async def test_files_in_the_wrong_place(
    kind: type[Fields], file: str | None, files: list[tuple[str, str, bytes]], field: str, words: list[str]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        await parsed(kind, form(("prompt", "a"), files=files), file=file)
    assert caught.value.field == field
    assert all(word in str(caught.value) for word in words), str(caught.value)


# Bounds


async def test_a_length_that_is_announced_is_believed_before_anything_is_read() -> None:
    for content_type, limit in ((JSON, MAX), (FORM, MAX + MAX_UPLOAD)):
        for length in (limit + 1, 10**30):
            request = request_of(b"{}", content_type, content_length=str(length))
            with pytest.raises(RequestError) as caught:
                async with read_body(request, MAX, MAX_UPLOAD):
                    pass
            assert (caught.value.status, caught.value.code) == (413, "body_too_large")
            assert str(limit) in str(caught.value) and len(request.state.unread) == 1


async def test_a_length_that_is_not_announced_is_counted() -> None:
    """As of a chunked body, or of one that is longer than it said. What comes after the limit is not read."""
    for content_type, data in (
        (JSON, b'{"prompt": "' + b"a" * 9000 + b'"}'),
        (FORM, form(files=[("video", "a", b"a" * 9000)])),
        (FORM, form(("prompt", "a" * 9000))),
        (FORM, form(*((f"n{k}", "a" * 100) for k in range(30)))),
    ):
        for headers in ({}, {"content_length": "10"}, {"content_length": "x"}, {"content_length": "-1"}):
            request = request_of(data, content_type, **headers)
            with pytest.raises(RequestError) as caught:
                async with read_body(request, MAX, MAX_UPLOAD):
                    pass
            assert (caught.value.status, caught.value.code) == (413, "body_too_large"), data[:200]
            if len(data) > 9000:
                assert len(request.state.unread) >= 20


async def test_exactly_the_limit() -> None:
    for extra, fits in ((0, True), (1, False)):
        data = b'{"prompt": "' + b"a" * (MAX - 14 + extra) + b'"}'
        assert len(data) == MAX + extra
        if fits:
            await parsed(ChangePrompt, data, JSON)
        else:
            assert (await refused(data, JSON))[0] == 413


async def test_forms_without_uploads_are_as_small_as_json() -> None:
    with pytest.raises(RequestError) as caught:
        async with read_body(request_of(form(files=[("video", "a", b"a" * MAX)]), FORM), MAX):
            pass
    assert caught.value.status == 413


async def test_too_many_parts() -> None:
    some, many = ([(f"n{k}", "") for k in range(n)] for n in (20, MAX_FIELDS + 1))
    with pytest.raises(InvalidInput, match="n0 is ''; allowed: one of prompt"):
        await parsed(ChangePrompt, form(*some))
    request = request_of(form(*many), FORM)
    with pytest.raises(RequestError, match="Too many fields") as caught:
        async with read_body(request, 10**6):
            pass
    assert (caught.value.status, caught.value.code) == (400, "invalid_form")
    assert (await refused(form(files=[("a", "b", b"")] * 5), FORM)) == (400, "invalid_form")


MB = 2**20
FILE = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="video"; filename="a"\r\n\r\n'.encode()
TINY = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="n"\r\n\r\n\r\n'.encode()
# name ▸ type, how the body begins, and what comes after that without an end
ENDLESS = {
    "a file": (FORM, FILE, bytes(2**16)),
    "a text": (FORM, FILE.replace(b'; filename="a"', b""), b"a" * 2**16),
    "tiny parts": (FORM, b"", TINY * 900),
    "JSON": (JSON, b'{"a": [', b"[]," * 20_000),
    "a header of a part": (FORM, f"--{BOUNDARY}\r\nContent-Disposition: ".encode(), b"a" * 2**16),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_an_endless_body_is_given_up_at_its_limit_and_takes_little_memory(name: str) -> None:
    """No more than 64 KB are read beyond it, and the process grows by less than twice what a form may have."""
    content_type, begin, part = ENDLESS[name]
    process, limit = psutil.Process(), MB if content_type == JSON else 17 * MB
    gc.collect()
    before = peak = process.memory_info().rss
    received = 0

    async def receive() -> dict[str, Any]:
        nonlocal peak, received
        peak = max(peak, process.memory_info().rss)
        sent = part if received else begin + part
        received += len(sent)
        return {"type": "http.request", "body": sent, "more_body": True}

    headers = [(b"content-type", content_type.encode())]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    with pytest.raises(RequestError) as caught:
        async with read_body(request, MB, 16 * MB):
            pass
    assert caught.value.status in (400, 413) and str(caught.value)
    assert received <= limit + 2**16 + len(begin + part)
    assert peak - before < 2 * 17 * MB


async def test_json_of_the_largest_size_takes_little_memory() -> None:
    """Of all JSON, empty objects become the most."""
    body = b'{"a": [' + b"{}," * (MB // 3 - 10) + b"{}]}"
    gc.collect()
    before = psutil.Process().memory_info().rss
    async with read_body(request_of(body, JSON, size=2**16), MB) as read:
        assert len(read.fields["a"]) > 300_000
        assert psutil.Process().memory_info().rss - before < 64 * MB


# What is no body at all


@pytest.mark.parametrize(
    ("data", "content_type", "status", "code"),
    [
        (b"a=b", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"{}", "text/json", 415, "unsupported_media_type"),
        (b"{}", None, 415, "unsupported_media_type"),
        (b"{}", "", 415, "unsupported_media_type"),
        (b"{}", "\xff" * 200, 415, "unsupported_media_type"),
        (b"", JSON, 400, "invalid_json"),
        (b'"a"', JSON, 400, "invalid_json"),
        (b"null", JSON, 400, "invalid_json"),
        (b'{"a": \xff}', JSON, 400, "invalid_json"),
        (form(("prompt", "a")), "multipart/form-data", 400, "invalid_form"),
        (form(("prompt", "a")), "multipart/form-data; boundary=", 400, "invalid_form"),
        (form(("prompt", "a")), "multipart/form-data; boundary=another", 400, "invalid_form"),
        (form(("prompt", "a")), "multipart/form-data; boundary=" + "b" * 500, 400, "invalid_form"),
        (b"--" + BOUNDARY.encode() + b"\r\n\r\na", FORM, 400, "invalid_form"),
        (b"nothing of the kind", FORM, 400, "invalid_form"),
        (form(("prompt", b"\xff\xfe")), FORM, 400, "invalid_form"),
        (form(("prompt", b"\xff\xfe")), FORM + "; charset=latin-1", 400, "invalid_form"),
        (form(("prompt", "a")).replace(b'"prompt"', b'"\xff"'), FORM, 400, "invalid_form"),
        (form(files=[("video", "a", b"a")]).replace(b'"video"', b'"\xff"'), FORM, 400, "invalid_form"),
    ],
)
async def test_broken_bodies(data: bytes, content_type: str | None, status: int, code: str) -> None:
    assert await refused(data, content_type) == (status, code)


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "rot13", "zlib", "utf-16", "unicode_escape", "é"])
async def test_a_form_is_utf_8_whatever_it_calls_itself(charset: str) -> None:
    sent = form(("prompt", "é ❄"))
    assert await parsed(ChangePrompt, sent, f"{FORM}; charset={charset}") == {"prompt": "é ❄"}


@pytest.mark.parametrize("files", [[], [("input_reference", "a", b"data")]])
async def test_a_form_that_was_cut_off_is_refused(files: list[tuple[str, str, bytes]]) -> None:
    """Else its last part would be left out, and a video that should come from an image would come from the text."""
    whole = form(("prompt", "a sea"), files=files)
    assert await parsed(CreateVideo, whole, file="input_reference")
    for end in range(len(whole) - 5, 40, -7):  # before the last two dashes
        with pytest.raises(RequestError) as caught:
            await parsed(CreateVideo, whole[:end], file="input_reference")
        assert (caught.value.status, caught.value.code) == (400, "invalid_form")


async def test_forms_that_were_damaged_on_the_way() -> None:
    """Whatever a byte more, less or another makes of them, it is understood or refused."""
    rng = random.Random(0)
    whole = form(("prompt", "a sea"), ("prompts[][prompt]", "b"), ("steps[]", "1"), files=[("video", "a", b"data")])
    seen = {"understood": 0, "refused": 0}
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.choice((1, 1, 20))]
                case 2:
                    data[at:at] = bytes([rng.choice(b'[]"\r\n-;=\\%\xff')])
                case 3:
                    data[at : at + 8] = data[at : at + 8] * rng.choice((0, 2, 3))
        try:
            await parsed(EditVideo, bytes(data), file="video", size=rng.choice((1, 50, 1000)))
            seen["understood"] += 1
        except HeliosError as error:
            assert isinstance(error, (RequestError, InvalidInput)) and len(str(error)) < 1000
            seen["refused"] += 1
    assert min(seen.values()) > 50, seen


# Over HTTP


async def test_refusals_have_their_status(service: LocalService) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b'{"prompt": "' + b"a" * 500_000

    http = service.http
    answer = await http.post("/v1/videos", content=chunked(), headers={"content-type": JSON})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    answer = await http.post("/v1/videos", content=b"a=b", headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    answer = await http.post("/v1/videos", content=form(("prompt", b"\xff")), headers={"content-type": FORM})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_form")
    for wrong in ({"steps[]": ["1", "x", "1"]}, {"seed": "9" * 4000}, {"seed": "9" * 9000}, {"prompt": ["a", "b"]}):
        form_of = {"prompt": "a", **wrong}
        answer = await http.post("/v1/videos", data=form_of, files={"input_reference": b"no image"})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, next(iter(wrong)).removesuffix("[]")), error
    assert await service.store.video_ids() == []


@pytest.mark.parametrize(("content_type", "begun"), [(JSON, b'{"prompt": "a'), (FORM, FILE + b"data")])
async def test_a_client_that_leaves_within_its_body_is_no_bug(
    service: LocalService, content_type: str, begun: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": begun, "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(_: object) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "query_string": b"", "headers": []}
    scope["headers"] = [(b"content-type", content_type.encode())]
    await service.app(scope, receive, send)
    (told,) = [record for record in caplog.records if record.message == "refused"]
    assert vars(told)["code"] == "body_cut_off"
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert await service.store.video_ids() == []


@pytest.mark.parametrize("route", ["edits", "extensions"])
async def test_an_edit_is_of_one_video(service: LocalService, route: str) -> None:
    by_id = {"prompt": "a", "video[id]": "video_" + "0" * 32}
    file = {"video": ("a.mp4", b"no video", "video/mp4")}
    for data, files, shown in ((by_id, file, "'both'"), ({"prompt": "a"}, {"video2": file["video"]}, "a.mp4")):
        answer = await service.http.post(f"/v1/videos/{route}", data=data, files=files)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (422, "invalid_input") and shown in error["message"]
    answer = await service.http.post(f"/v1/videos/{route}", json={"prompt": "a"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, "video") and "the id of a video" in error["message"]
    for video_id in ("video_" + "0" * 32, "../x"):
        answer = await service.http.post(f"/v1/videos/{route}", json={"prompt": "a", "video": {"id": video_id}})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert await service.store.video_ids() == []


async def test_no_depth_of_nesting_is_too_much(service: LocalService) -> None:
    """Also where it can just be read: what shows it in the answer must not need more of the stack."""
    for depth in range(100, 1000, 7):
        nested = b"[" * depth + b"]" * depth
        answer = await service.http.post(
            "/v1/videos", content=b'{"prompt": ' + nested + b"}", headers={"content-type": JSON}
        )
        assert answer.status_code in (400, 422), (depth, answer.text)


def test_a_body_without_files_has_none() -> None:
    assert Body({}).file("video") is None
