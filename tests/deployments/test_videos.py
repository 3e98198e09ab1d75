"""What else clients do with videos over HTTP: cancel, delete, list, follow a trace, read the metrics."""

from __future__ import annotations

import asyncio

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import INGRESS_CPU
from deployments.records import VideoStatus
from deployments.schemas import video_object
from tests.deployments.conftest import LocalService
from tests.deployments.test_content import BODY, delete, put_video, running, stored

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


# Cancel and delete


async def test_cancelling(service: LocalService) -> None:
    video_id = await running(service)
    for _ in range(2):  # the second time it has ended
        answer = await service.http.post(f"/v1/videos/{video_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    completed, _ = await put_video(service)
    assert (await service.http.post(f"/v1/videos/{completed}/cancel")).json()["status"] == "completed"
    await delete(service, video_id)
    for method, url in [("POST", f"{video_id}/cancel"), ("DELETE", video_id), ("GET", video_id)]:
        gone = await service.http.request(method, f"/v1/videos/{url}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


# Lists


async def test_pages(service: LocalService) -> None:
    empty = (await service.http.get("/v1/videos")).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    ids = [(await put_video(service, at=float(at)))[0] for at in range(1, 24)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        for limit in (1, 7, 22, 23, 100):
            got: list[str] = []
            has_more = True
            while has_more:
                query = {"order": order, "limit": limit} | ({"after": got[-1]} if got else {})
                page = (await service.http.get("/v1/videos", params=query)).json()
                here = [video["id"] for video in page["data"]]
                assert (page["first_id"], page["last_id"]) == (here[0], here[-1])
                got, has_more = got + here, page["has_more"]
                assert len(here) == limit or not has_more
            assert got == expected
    default = (await service.http.get("/v1/videos")).json()
    assert [video["id"] for video in default["data"]] == ids[:2:-1]
    assert default["has_more"]
    past = (await service.http.get("/v1/videos", params={"after": ids[0]})).json()
    assert (past["data"], past["has_more"]) == ([], False)


async def test_a_page_shows_running_videos_as_they_stand(service: LocalService) -> None:
    video_id = await running(service)
    (video,) = (await service.http.get("/v1/videos")).json()["data"]
    assert (video["id"], video["status"], video["queue_position"]) == (video_id, "in_progress", None)


async def test_the_queue_position_is_told(service: LocalService) -> None:
    video_id, _ = await put_video(service)
    told = video_object(VideoStatus.of(await stored(service, video_id), 3, 4.9, 5.9), None, "http://helios/it")
    names = ("queue_position", "estimated_start_at", "estimated_completion_at", "share_url")
    assert [told[name] for name in names] == [3, 4, 5, "http://helios/it"]


# Tracing and metrics


@pytest.mark.parametrize("route", ["/v1/videos", "/v1/videos/stream"])
async def test_a_request_is_a_part_of_its_callers_trace(service: LocalService, route: str) -> None:
    answer = await service.http.post(route, json=BODY, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    video_id = answer.headers.get("x-video-id") or answer.json()["id"]
    (span,) = service.spans()
    assert (span["name"], span["kind"], span["parent_id"]) == (f"POST {route}", "SpanKind.SERVER", f"0x{SPAN}")
    assert span["context"]["trace_id"] == f"0x{TRACE}"
    assert span["attributes"] == {"video_id": video_id, "request_id": answer.headers["x-request-id"]}
    stored = await service.store.request(video_id)
    assert stored is not None
    assert answer.headers["traceparent"] == stored.traceparent
    assert stored.traceparent.split("-")[1:3] == [TRACE, span["context"]["span_id"].removeprefix("0x")]


@pytest.mark.parametrize("sent", [None, "", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 9, "0" * 9999])
async def test_a_request_without_a_trace_begins_one(service: LocalService, sent: str | None) -> None:
    headers = {} if sent is None else {b"traceparent": sent.encode("latin-1")}
    answer = await service.http.post("/v1/videos", json=BODY, headers=headers)  # type: ignore[arg-type]
    (span,) = service.spans()
    assert (answer.status_code, span["parent_id"]) == (200, None)


async def test_the_root_has_ended_while_the_stream_goes_on(service: LocalService) -> None:
    gate = service.graph.gate("sample 1")
    streaming = asyncio.create_task(service.http.post("/v1/videos/stream", json=BODY))
    await gate.reached.wait()
    (span,) = service.spans()
    assert span["name"] == "POST /v1/videos/stream"
    gate.open()
    assert (await streaming).status_code == 200


async def test_a_refused_request_is_no_error_of_its_span(service: LocalService) -> None:
    answer = await service.http.post("/v1/videos", json={})
    assert answer.status_code == 422
    (span,) = service.spans()
    about = {"request_id": answer.headers["x-request-id"], "http.response.status_code": 422}
    assert (span["status"]["status_code"], span["attributes"]) == ("UNSET", about)


async def test_metrics_are_the_directors_and_the_ingresss_processor_time(service: LocalService) -> None:
    def names(text: str) -> list[str]:
        return [family.name for family in text_string_to_metric_families(text)]

    answer = await service.http.get("/metrics")
    directors = names((await service.director.metrics()).decode())
    assert names(answer.text) == [*directors, INGRESS_CPU.name.removesuffix("_total")]
    assert answer.headers["content-type"] == prometheus_client.CONTENT_TYPE_LATEST
