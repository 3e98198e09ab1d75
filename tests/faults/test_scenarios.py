"""Most scenarios once, with two videos; `make chaos` has the eight of each and tells how long they paused."""

from __future__ import annotations

import pytest

from tests.faults.scenarios import SCENARIOS, trial
from tests.faults.service import Service

pytestmark = pytest.mark.ray

VIDEOS = 2
# Left to `make chaos`: they take long, or are of the kind of another one.
LEFT = {
    "the VAE decoder's weights become NaN",
    "one sampler gets no more memory",
    "the Director stops",
    "Serve's controller is killed",
    "Serve's controller stops for a while",
    "one sampler is killed, another is idle",
    "all samplers are killed",
    "the VAE decoder is told to end",
    "the text encoder is told to end",
    "the Director is told to end",
    "the ingress is told to end",
    "one sampler's work hangs",
    "the VAE decoder stops",
    "the text encoder stops",
    "the ingress stops",
    "Serve's proxy stops",
}
TRIES = 8  # for one in which the fault finds its replica at work


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in LEFT])
def test_every_stream_ends_with_the_same_bytes(service: Service, name: str) -> None:
    for seed in range(TRIES):
        tried = trial(service, SCENARIOS[name], seed, VIDEOS)
        assert tried.good, f"seed {seed}: {tried.errors or tried.left}"
        if tried.hit:
            return
    pytest.fail(f"none of {TRIES} faults found its replica at work")
