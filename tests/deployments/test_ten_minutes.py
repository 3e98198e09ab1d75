"""Ten minutes of video, watched from the start: what the service holds for it does not grow, nor what a browser holds,
and its times stay exact.

What a process holds is its resident memory without code and without the object store, which all share; that one is
looked at by itself. Replicas that compute keep what they free (TENSORS in deployments/app.py): their heaps grow by
steps of up to 30 MB, some of them after a hundred chunks, while what they use stays the same (measured over 874). So of
them it is what malloc has given and not got back. Of the ingress, the fragments that it keeps are taken off.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import httpx
import pytest
import ray

from deployments.watching import KEPT_BYTES
from tests.deployments.boxes import read_boxes, reader
from tests.deployments.conftest import Served
from tests.deployments.memory import in_use, resident
from tests.deployments.test_service import pts_of
from tests.deployments.viewer import VIDEO, Viewer, chromium, entering
from tests.faults.service import object_store_bytes, serve_actors

pytestmark = pytest.mark.ray

SECONDS, FRAMES, CHUNKS = 600, 14_400, 437
WARM = 20  # chunks after which all that is allocated once has been
WINDOW = 60  # chunks, of which the least counts: a process may be in the midst of one
EARLY, LATE = range(WARM, WARM + WINDOW), range(CHUNKS - WINDOW, CHUNKS)
LATENTS = 9 * 16 * 8 * 8 * 4  # bytes of one chunk's at 64x64, the least that one could forget to let go
# Seconds in the browser, ahead and behind, beyond which it drops what is there; and what comes, or is played at this
# speed, between two of its looks (153 were seen in all).
BUFFERED = 2 * 60 + 30 + 15
COMPUTING = ("TextEncoder", "Sampler", "VaeDecoder")


@pytest.fixture(scope="module")
def http(shared_service: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_service.url, timeout=120) as client:
        yield client


def test_ten_minutes(http: httpx.Client, tmp_path: Path) -> None:
    body = {"prompt": "a red sun over a blue sea", "seconds": SECONDS, "size": "64x64", "steps": [1, 1, 1]}
    video_id = http.post("/v1/videos", json=body).json()["id"]
    actors, path = serve_actors(), tmp_path / "video.mp4"
    assert len(actors) == 7  # five replicas, Serve's two

    def holds(sent: int) -> dict[str, int]:
        """Bytes that each part of the service holds when so many went through the ingress."""
        asked = {
            name: actor.__ray_call__.remote(in_use if any(part in name for part in COMPUTING) else resident)
            for name, actor in actors.items()
        }
        held = {name: ray.get(answer) - min(sent, KEPT_BYTES) * ("Ingress" in name) for name, answer in asked.items()}
        return {**held, "object store": object_store_bytes()}

    samples: dict[int, dict[str, int]] = {}  # by chunk
    chunk = 0
    with http.stream("GET", f"/v1/videos/{video_id}/content") as live, path.open("wb") as file:
        for kind, box in read_boxes(reader(live.iter_raw())):
            file.write(box)
            if kind == "mdat":
                if chunk in EARLY or chunk in LATE:
                    samples[chunk] = holds(sent=file.tell())
                chunk += 1
    status = http.get(f"/v1/videos/{video_id}").json()
    assert (status["status"], status["usage"]["chunks"], chunk) == ("completed", CHUNKS, CHUNKS)
    for name in samples[WARM]:
        early, late = (min(samples[chunk][name] for chunk in window) for window in (EARLY, LATE))
        assert late < 1.05 * early, f"{name}: {early} to {late} bytes"
        assert late - early < LATENTS / 2 * (CHUNKS - WARM - WINDOW), f"{name}: {early} to {late} bytes"
    assert http.get(f"/v1/videos/{video_id}/content").content == path.read_bytes()
    assert pts_of(path) == [Fraction(i, 24) for i in range(FRAMES)]
    with chromium() as browser, entering(browser, str(http.base_url), http) as enter:
        watched_by(enter(), video_id)


def watched_by(viewer: Viewer, video_id: str) -> None:
    """On the page, the second half sixteen times as fast. Afterwards also what is not buffered can be sought."""
    viewer.open(video_id)
    viewer.until(VIDEO)
    viewer.ask(f"{VIDEO}.defaultPlaybackRate = 16")
    viewer.ask(f"{VIDEO}.currentTime = {SECONDS / 2}")  # twice what it buffers is to come
    viewer.until(f"{VIDEO}.ended")
    assert viewer.ask(f"{VIDEO}.currentTime") == pytest.approx(SECONDS)
    for frame in (0, 7000, 3):
        assert viewer.frame_at((frame + 0.5) / 24)[0] == pytest.approx(frame / 24, abs=1e-3)
    assert 60 < viewer.ask("seen.buffered") <= BUFFERED
