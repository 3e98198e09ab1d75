"""What a client can send wrong: each answer names the field, the value and what is allowed; none is a 500."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.deployments.conftest import LocalService
from tests.deployments.test_content import BODY, put_video

JSON = {"content-type": "application/json"}
UNKNOWN = "video_" + "0" * 32

# name ▸ (fields beside the prompt, field named in the answer, words that the message must hold)
UNPROCESSABLE: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "size not a multiple of 64": ({"size": "100x100"}, "size", ["100x100", "64", "nearest", "128x128"]),
    "size zero": ({"size": "0x64"}, "size", ["0x64", "64"]),
    "size negative": ({"size": "-64x64"}, "size", ["-64x64", "WIDTHxHEIGHT"]),
    "size too large": ({"size": "6400x6400"}, "size", ["6400x6400", "1920"]),
    "size of too many digits": ({"size": "9" * 5000 + "x64"}, "size", ["WIDTHxHEIGHT"]),
    "size in other digits": ({"size": "٦٤x64"}, "size", ["WIDTHxHEIGHT"]),
    "size a number": ({"size": 64}, "size", ["64", "text"]),
    "prompt empty": ({"prompt": ""}, "prompt", ["not empty"]),
    "prompt blank": ({"prompt": " \n "}, "prompt", ["not empty"]),
    "prompt too long": ({"prompt": "é" * 4097}, "prompt", ["8194", "8192"]),
    "prompt with NUL": ({"prompt": "a\0b"}, "prompt", ["NUL"]),
    "prompt with a lone surrogate": ({"prompt": "\ud800"}, "prompt", ["Unicode"]),
    "prompt a list": ({"prompt": ["a"]}, "prompt", ["text"]),
    "prompt missing": ({"prompt": ...}, "prompt", ["required"]),
    "seconds zero": ({"seconds": 0}, "seconds", ["600"]),
    "seconds negative": ({"seconds": -1}, "seconds", ["-1", "600"]),
    "seconds too short for a frame": ({"seconds": 0.01}, "seconds", ["0.01", "1/24"]),
    "seconds not a number": ({"seconds": float("nan")}, "seconds", ["nan", "600"]),
    "seconds infinite": ({"seconds": float("inf")}, "seconds", ["inf", "600"]),
    "seconds too long": ({"seconds": 601}, "seconds", ["601", "600"]),
    "seconds true": ({"seconds": True}, "seconds", ["True", "number"]),
    "seconds words": ({"seconds": "four"}, "seconds", ["four", "number"]),
    "seed negative": ({"seed": -1}, "seed", ["-1", "2^63-1"]),
    "seed too large": ({"seed": 2**63}, "seed", [str(2**63), "2^63-1"]),
    "seed a fraction": ({"seed": 1.5}, "seed", ["1.5", "whole number"]),
    "seed true": ({"seed": True}, "seed", ["True", "whole number"]),
    "fps too high": ({"fps": 61}, "fps", ["61", "8 to 60"]),
    "steps too few": ({"steps": [1, 1]}, "steps", ["3 whole numbers"]),
    "steps too many": ({"steps": [1, 1, 1, 1]}, "steps", ["3 whole numbers"]),
    "steps none": ({"steps": []}, "steps", ["3 whole numbers"]),
    "steps zero": ({"steps": [1, 0, 1]}, "steps", ["[1, 0, 1]", "1 to 50"]),
    "steps over the limit": ({"steps": [1, 51, 1]}, "steps", ["51", "1 to 50"]),
    "steps text": ({"steps": "2;2;2"}, "steps", ["2;2;2", "list"]),
    "preset with steps": ({"preset": "quality", "steps": [1, 1, 1]}, "preset", ["quality", "not both"]),
    "preset unknown": ({"preset": "best"}, "preset", ["best", "realtime", "quality"]),
    "amplify in words": ({"amplify_first_chunk": "yes"}, "amplify_first_chunk", ["yes", "true or false"]),
    "unknown field": ({"colour": "red"}, "colour", ["red", "prompt", "seconds"]),
    "unknown field with a lone surrogate": ({"\ud800": 1}, "\\ud800", ["prompt"]),
    "a rival's width": ({"width": 640}, "width", ["640", "size"]),
    "a rival's frames": ({"num_frames": 33}, "num_frames", ["33", "seconds"]),
    "a rival's steps": ({"num_inference_steps": 4}, "num_inference_steps", ["steps"]),
    "a rival's catch-all": ({"extra_params": {"a": 1}}, "extra_params", ["top level"]),
}


@pytest.mark.parametrize("route", ["/v1/videos", "/v1/videos/stream"])
@pytest.mark.parametrize("name", UNPROCESSABLE)
async def test_unprocessable(service: LocalService, name: str, route: str) -> None:
    fields, param, words = UNPROCESSABLE[name]
    body = {key: value for key, value in {"prompt": "a sea", **fields}.items() if value is not ...}
    answer = await service.http.post(route, content=dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (422, param, "invalid_request_error")
    assert error["code"] == "invalid_input"
    assert all(word in error["message"] for word in words), error["message"]
    assert len(error["message"]) < 1000
    assert await service.store.video_ids() == []


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b'{"prompt": ', JSON, 400, "invalid_json"),
        (b"", JSON, 400, "invalid_json"),
        (b'{"prompt": "\xff"}', JSON, 400, "invalid_json"),
        (b"[1]", JSON, 400, "invalid_json"),
        (b"[" * 100_000, JSON, 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", JSON, 400, "invalid_json"),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b'{"prompt": "a"}', {}, 415, "unsupported_media_type"),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', JSON, 413, "body_too_large"),
        (b'{"prompt": "a", "model": "sora-2"}', JSON, 404, "model_not_found"),
        (b'{"prompt": "a", "seconds": 1e309}', JSON, 422, "invalid_input"),
        (b'{"prompt": "a", "seconds": NaN}', JSON, 422, "invalid_input"),
    ],
)
async def test_broken_bodies(
    service: LocalService, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    answer = await service.http.post("/v1/videos", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert await service.store.video_ids() == []


@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("GET", "/content"), ("POST", "/cancel"), ("DELETE", "")])
@pytest.mark.parametrize(
    "video_id",
    [UNKNOWN, "video_x", "..%2f..%2fetc%2fpasswd", "%00", "video_" + "A" * 32, "v" * 10_000, "%ff"],
)
async def test_unknown_videos(service: LocalService, method: str, video_id: str, suffix: str) -> None:
    answer = await service.http.request(method, f"/v1/videos/{video_id}{suffix}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


# query ▸ (parameter named in the answer, words that the message must hold)
PAGE = "/v1/videos"
CONTENT = f"/v1/videos/{UNKNOWN}/content"
QUERIES: dict[str, tuple[str, list[str]]] = {
    f"{PAGE}?limit=0": ("limit", ["0", "1 to 100"]),
    f"{PAGE}?limit=101": ("limit", ["101", "1 to 100"]),
    f"{PAGE}?limit=-1": ("limit", ["-1", "1 to 100"]),
    f"{PAGE}?limit=1.0": ("limit", ["1.0", "whole number"]),
    f"{PAGE}?limit=": ("limit", ["whole number"]),
    f"{PAGE}?limit=ten": ("limit", ["ten", "whole number"]),
    f"{PAGE}?limit={'9' * 5000}": ("limit", ["999", "1 to 100"]),
    f"{PAGE}?limit=%D9%A3": ("limit", ["\u0663", "whole number"]),  # 3 in other digits
    f"{PAGE}?limit=1&limit=x": ("limit", ["x"]),
    f"{PAGE}?order=newest": ("order", ["newest", "asc", "desc"]),
    f"{PAGE}?order=": ("order", ["asc", "desc"]),
    f"{PAGE}?after=../../etc": ("after", ["../../etc", "id of a video"]),
    f"{PAGE}?after=": ("after", ["id of a video"]),
    f"{PAGE}?after=%00%ff": ("after", ["id of a video"]),
    f"{PAGE}?before=1": ("before", ["1", "limit", "after", "order"]),
    f"{CONTENT}?variant=spritesheet": ("variant", ["spritesheet", "video", "thumbnail"]),
    f"{CONTENT}?variant=": ("variant", ["video"]),
    f"{CONTENT}?partial=1": ("partial", ["1", "true or false"]),
    f"{CONTENT}?partial=True": ("partial", ["True", "true or false"]),
    f"{CONTENT}?partial": ("partial", ["true or false"]),
    f"{CONTENT}?pad=1": ("pad", ["1", "variant", "partial"]),
    f"{CONTENT}?%ff=%ff": ("\ufffd", ["variant", "partial"]),
    f"{CONTENT}?{'n' * 5000}=1": ("n" * 80, ["variant", "partial"]),
}


@pytest.mark.parametrize("url", QUERIES)
async def test_bad_queries(service: LocalService, url: str) -> None:
    param, words = QUERIES[url]
    answer = await service.http.get(url)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (422, param, "invalid_input")
    assert all(word in error["message"] for word in words), error["message"]
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2", 404), ("PUT", "/v1/videos", 405)])
async def test_unknown_routes(service: LocalService, method: str, path: str, status: int) -> None:
    answer = await service.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


# ── every number, wherever a client can send it ──────────────────────────────

HUGE = "9" * 400
# As they stand in JSON. Python's reader takes NaN and Infinity too, which are none of it.
NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e309", "-1e309", "true", "-1", HUGE, '"x"', '"1e5"', '""', "[]", "{}"]
CREATE = ("/v1/videos", "/v1/videos/stream", "/v1/videos/edits")
# field ▸ (routes, the JSON around it, whether it is a whole number, what the message names)
NUMBERS: dict[str, tuple[tuple[str, ...], str, bool, str]] = {
    "seconds": ((*CREATE, "/extend", "/fork"), "%s", False, "number"),
    "lead_seconds": (CREATE, "%s", False, "number"),
    "deadline_s": ((*CREATE, "/extend", "/fork", "/remix"), "%s", False, "number"),
    "seed": ((*CREATE, "/fork"), "%s", True, "2^63-1"),
    "fps": (CREATE, "%s", True, "8 to 60"),
    "guidance_scale": (CREATE, "%s", False, "1"),
    "steps": (CREATE, "[1, %s, 1]", True, "whole numbers"),
    "prompts": (CREATE, '[{"at_seconds": %s, "prompt": "a moon"}]', False, "at_seconds"),
    "transition_chunks": (("/prompt", "/extend", "/fork"), "%s", True, "chunks"),
    "chunk": (("/fork",), "%s", True, "chunk"),
}
TRANSITION_OF_PROMPTS = '[{"at_seconds": 0, "prompt": "a moon", "transition_chunks": %s}]'
REQUIRED = {
    **{route: {"prompt": "a moon"} for route in ("/prompt", "/extend", "/remix")},
    "/fork": {"prompt": "a moon", "chunk": 0},
}


@pytest.mark.parametrize("field", [*NUMBERS, "prompts: transition_chunks"])
async def test_every_number_is_bounded(service: LocalService, field: str) -> None:
    """Each answer is a 4xx that names the field, the value and what is allowed, and nothing is made."""
    known = (await put_video(service))[0]
    before = await service.store.video_ids()
    routes, around, whole, allowed = NUMBERS.get(field, (CREATE, TRANSITION_OF_PROMPTS, True, "transition_chunks"))
    name = field.partition(":")[0]
    for route in routes:
        path = route if route in CREATE else f"/v1/videos/{known}{route}"
        others = REQUIRED.get(route, {"prompt": "a sea", "size": "64x64"})
        if route.endswith("edits"):
            others = {**others, "video": {"id": known}}
        for value in [*NO_NUMBERS, *["1.5"] * whole]:
            fields = {key: json.dumps(other) for key, other in others.items()} | {name: around % value}
            body = "{" + ", ".join(f'"{key}": {text}' for key, text in fields.items()) + "}"
            answer = await service.http.post(path, content=body, headers=JSON)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (422, name, "invalid_input"), (path, value)
            message = error["message"]
            assert message.startswith(f"{name} is ") and "; allowed: " in message and allowed in message, (path, value)
            assert len(message) < 1000
    assert await service.store.video_ids() == before


@pytest.mark.parametrize("fields", [{"seed": 7.0}, {"fps": 24.0}, {"steps": [1.0, 1, 1]}])
async def test_a_whole_number_may_be_written_with_a_point(service: LocalService, fields: dict[str, Any]) -> None:
    answer = await service.http.post("/v1/videos", json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    (name,) = fields
    assert answer.json()[name] == fields[name]


def dumps(body: dict[str, Any]) -> bytes:
    """JSON with NaN, Infinity and lone surrogates as escapes, which a strict client would not send."""
    return json.dumps(body).encode()
