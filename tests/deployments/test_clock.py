"""The wall clock is set, ahead or back, while videos are made: what is made is the same, and no deadline comes sooner.

Ray's clocks cannot be set here; this is the service in one process, in which every look at the wall clock jumps.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deployments.drafts import KEY
from tests.deployments.conftest import serving
from tests.deployments.test_content import BODY, delete
from tests.deployments.test_outages import file

HOUR_S = 3600.0
FAR_S = 24 * HOUR_S


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S, -FAR_S])
async def test_a_clock_that_jumps_changes_nothing_that_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    async with serving(tmp_path) as service:

        async def create(**wanted: object) -> str:
            answer = await service.http.post("/v1/videos", json={**BODY, **wanted}, headers={KEY: str(wanted)})
            assert answer.status_code == 200, answer.text
            return str(answer.json()["id"])

        undisturbed = await file(service, await create(seed=1))
        gate = service.graph.gate("sample 1")
        before = await create(seed=1, deadline_s=120)
        await gate.reached.wait()

        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        assert await create(seed=1, deadline_s=120) == before, "its key is forgotten"
        after = await create(seed=1, deadline_s=121)
        gate.open()
        assert await file(service, before) == await file(service, after) == undisturbed
        listed = (await service.http.get("/v1/videos")).json()["data"]
        assert {before, after} <= {video["id"] for video in listed}
        assert (await service.http.get("/metrics")).status_code == 200
        for video_id in (before, after):
            await delete(service, video_id)
