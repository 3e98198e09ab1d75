"""The contract and the service agree: routes, answers to thousands of requests, the reference page, its programs."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openapi_spec_validator
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Mount

from deployments.config import AppConfig
from deployments.contract import ANSWERS, ROUTES, contract
from deployments.keys import new_key
from deployments.reference import markdown
from helios_core.checkpoints import Checkpoint
from tests.deployments.conftest import LocalService
from tests.deployments.listening import listening
from tests.deployments.test_content import BODY, put_video

DOCS = Path(__file__).parents[2] / "docs"
UNKNOWN = "video_" + "0" * 32
JSON = "application/json"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Of a service with the defaults."""
    config = AppConfig()
    return contract(config, [Checkpoint.open(each.model).card for each in config.models])


# ── the table and the app ────────────────────────────────────────────────────


async def test_the_table_has_the_routes_of_the_app_and_no_others(service: LocalService) -> None:
    served: set[tuple[str, str]] = set()
    for route in service.app.routes:
        if isinstance(route, Mount):  # of files
            served |= {(method, f"{route.path}/{{path}}") for method in ("GET", "HEAD")}
        else:
            assert isinstance(route, APIRoute)
            served |= {(method, route.path.replace(":path}", "}")) for method in route.methods}
    table = [(method, route.path) for route in ROUTES for method in route.methods]
    assert sorted(table) == sorted(served)


async def test_it_is_served_and_printed_and_valid(service: LocalService, tmp_path: Path) -> None:
    served = (await service.http.get("/openapi.json")).json()
    config = tmp_path / "config.yaml"
    config.write_text("models: [{model: random}]")
    file = tmp_path / "openapi.json"
    helios = [sys.executable, "-m", "deployments.cli", "openapi", "--config", str(config)]
    await asyncio.to_thread(subprocess.run, [*helios, "-o", str(file)], check=True)
    printed = (await asyncio.to_thread(subprocess.run, helios, check=True, capture_output=True, text=True)).stdout
    assert json.loads(file.read_text()) == json.loads(printed) == served
    openapi_spec_validator.validate(served)
    assert served["openapi"] == "3.1.0"


async def test_the_bounds_are_those_of_the_configuration() -> None:
    config = AppConfig().override(limits={"max_seconds": 7.0, "max_steps_per_stage": 3})
    told = contract(config, [Checkpoint.open("random").card])
    body = told["paths"]["/v1/videos"]["post"]["requestBody"]["content"][JSON]["schema"]["properties"]
    assert body["seconds"]["anyOf"][0]["anyOf"][0]["maximum"] == 7
    assert body["steps"]["anyOf"][0]["items"]["maximum"] == 3


def test_operation_ids_are_names_for_programs(document: dict[str, Any]) -> None:
    ids = [told["operationId"] for methods in document["paths"].values() for told in methods.values()]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[a-z0-9_]+", name) for name in ids)


def test_the_page_is_current(document: dict[str, Any]) -> None:
    """`helios openapi --markdown -o docs/api.md` makes it anew."""
    assert (DOCS / "api.md").read_text() == markdown(document)


async def test_a_405_names_every_method_of_the_path(service: LocalService) -> None:
    video_id, _ = await put_video(service)
    for method, path, allowed in (
        ("PUT", "/v1/videos", "POST, GET"),
        ("PUT", f"/v1/videos/{video_id}", "GET, DELETE"),
        ("GET", "/v1/videos/stream", "POST"),
        ("DELETE", "/v1/videos/edits", "POST"),
        ("POST", f"/v1/videos/{video_id}/content", "GET, HEAD"),
        ("POST", "/player/main.js", "GET, HEAD"),
        ("DELETE", "/v1/models/a/b", "GET"),
    ):
        answer = await service.http.request(method, path)
        assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
        error = answer.json()["error"]
        assert error["code"] == "method_not_allowed" and allowed in error["message"] and method in error["message"]


# ── two thousand requests ────────────────────────────────────────────────────

# Small and quick: a chunk or two, one step, 64x64.
TINY = {
    "limits": {
        "max_side": 128,
        "max_pixels": 128 * 64,
        "max_seconds": 1.0,
        "max_open_seconds": 1.0,
        "max_steps_per_stage": 1,
        "max_prompt_bytes": 200,
    }
}


# A Range may be right and yet lie beyond the file: besides what schemathesis itself expects, 416.
JUDGE = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 401, 403, 404, 409, 416, 429]
"""


def test_thousands_of_requests_get_documented_answers(tmp_path: Path) -> None:
    """Schemathesis, all of its checks, right requests and wrong ones: no 5xx, and nothing that the contract does not
    say. (What it does with its fields is in deployments/contract.py; `narrowed` says what no schema can.)"""
    token, key = new_key("judge", "videos", None)
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [key.model_dump()]}))
    bearer = f"Bearer {token}"
    with (
        listening(tmp_path, unwatched_s=3600.0, keys=str(tmp_path / "keys.json"), **TINY) as served,
        httpx.Client(base_url=served.url, timeout=60, headers={"Authorization": bearer}) as http,
    ):
        told = narrowed(http.get("/openapi.json").json(), videos(http))
        (tmp_path / "openapi.json").write_text(json.dumps(told))
        (tmp_path / "schemathesis.toml").write_text(JUDGE)
        served.requests.clear()
        judge = "schemathesis.cli run openapi.json --checks all --phases examples,coverage,fuzzing --max-examples 9"
        options = "--generation-deterministic --request-timeout 60 --warnings off --no-color --continue-on-failure"
        auth = ["--header", f"Authorization: {bearer}"]
        run = subprocess.run(
            [sys.executable, "-m", *judge.split(), *options.split(), "--url", served.url, *auth],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
    assert served.requests.total() >= 2000
    assert {method for method, _ in served.requests} >= {"GET", "HEAD", "POST", "DELETE"}


def videos(http: httpx.Client) -> dict[str, list[str]]:
    """Videos to ask for, by the last word of the route."""

    def made(**fields: Any) -> str:
        body = {"prompt": "a sea", "size": "64x64", "seconds": 0.125, "steps": [1, 1, 1], **fields}
        answer = http.post("/v1/videos", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    waiting = {"seconds": 1.0, "fps": 60, "lead_seconds": 0}  # with its second chunk, until somebody watches
    completed, cancelled, held = made(), made(**waiting), made(**waiting)
    assert http.get(f"/v1/videos/{completed}/content").status_code == 200
    assert http.post(f"/v1/videos/{cancelled}/cancel").json()["status"] == "cancelled"
    ended = [completed, cancelled]
    return {
        "ended": ended,
        "events": [completed],
        **{action: [held, *ended] for action in ("{video_id}", "prompt", "pause", "resume")},
        "cancel": [*(made(**waiting) for _ in range(4)), *ended],
        "delete": [made() for _ in range(8)],
    }


def narrowed(document: dict[str, Any], ids: dict[str, list[str]]) -> dict[str, Any]:
    """The contract with real ids, without what can only be refused for how it goes together, and closed: an answer with
    a field more would be right for a client, and is a fault here."""
    document = copy.deepcopy(document)
    for schema in objects(document["components"]["schemas"]):
        schema.setdefault("additionalProperties", False)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            known = ids.get("delete" if method == "delete" else path.rsplit("/", 1)[1], ids["ended"])
            forms = {
                "video_id": {"enum": [*known, UNKNOWN]},
                "after": {"enum": ids["ended"]},
                "path": {"enum": ["main.js", "none.js"]},
                "Last-Event-ID": {"enum": ["0", "done"]},  # those of the one video that is asked for its events
            }
            for parameter in operation["parameters"]:
                parameter["schema"] = forms.get(parameter["name"], parameter["schema"])
            for content in operation.get("requestBody", {}).get("content", {}).values():
                narrow(content["schema"], extends=path.endswith("/extend"))
    return document


def narrow(body: dict[str, Any], extends: bool) -> None:
    fields = body["properties"]
    # Files, timelines and the words that only a guided model takes have tests of their own.
    for name in ("input_reference", "prompts", "preset", "negative_prompt", *["prompt"] * extends):
        fields.pop(name, None)
    forms: dict[str, Any] = {
        "size": {"enum": ["64x64", "128x64"]},
        "seconds": {"type": "number", "minimum": 0.125, "maximum": 0.875 if extends else 1.0},
        "chunk": {"enum": [0]},
        "video": {"enum": [{"id": UNKNOWN}]},
    }
    if fields.get("steps", {}).get("type") == "string":  # in a form
        forms["steps"] = {"enum": ["1,1,1", "[1, 1, 1]"]}
    fields.update({name: form for name, form in forms.items() if name in fields})
    if "seconds" in fields:  # the default is more than a second
        body["required"].append("seconds")


def objects(schema: Any) -> list[dict[str, Any]]:
    """All schemas of objects with fields in a schema."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    found = [each for part in inner for each in objects(part)]
    return [schema, *found] if isinstance(schema, dict) and isinstance(schema.get("properties"), dict) else found


async def test_what_a_video_says_of_itself_is_in_the_contract(service: LocalService) -> None:
    """Field by field, and no field less: in whichever state it is."""
    gate = service.graph.gate("sample 1")
    video = (await service.http.post("/v1/videos", json=BODY)).json()
    await gate.reached.wait()
    running = (await service.http.get(f"/v1/videos/{video['id']}")).json()
    gate.open()
    await service.http.get(f"/v1/videos/{video['id']}/content")
    completed = (await service.http.get(f"/v1/videos/{video['id']}")).json()
    assert [each["status"] for each in (running, completed)] == ["in_progress", "completed"]
    for told in (video, running, completed):
        assert set(told) == set(ANSWERS["Video"]["properties"])
