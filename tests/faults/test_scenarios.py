"""Ten scenarios once, with two videos; `make chaos` has them all, with eight, and tells how long they paused."""

from __future__ import annotations

import pytest

from tests.faults.scenarios import SCENARIOS, trial
from tests.faults.service import Service

pytestmark = pytest.mark.ray

VIDEOS = 2
# The others take long, or are of the kind of one of these.
ONCE = [
    "one sampler is killed",
    "the VAE decoder is killed",
    "the text encoder is killed",
    "the Director is killed",
    "one sampler's weights become NaN",
    "one sampler is told to end",
    "one sampler stops",
    "the ingress is killed",
    "Serve's proxy is killed",
    "the network is cut",
]
TRIES = 8  # for one in which the fault finds its replica at work


@pytest.mark.parametrize("name", ONCE)
def test_every_stream_ends_with_the_same_bytes(service: Service, name: str) -> None:
    for seed in range(TRIES):
        tried = trial(service, SCENARIOS[name], seed, VIDEOS)
        assert tried.good, f"seed {seed}: {tried.errors or tried.left}"
        if tried.hit:
            return
    pytest.fail(f"none of {TRIES} faults found its replica at work")
