"""How many replicas each deployment is to have: pure rules over what the Director tells.

Serve's own rule counts calls that wait, of which there are none: the Director holds back a sample call until a sampler
is free. So it tells what is wanted instead (`ServeGraph.demand`), as figures whose names begin with a deployment's:

`NAME/wanting`: videos that want a chunk now, under way or waiting. `NAME/calls`: calls under way now, in replicas that
would have their hands full with them. `NAME/work`: the seconds that all calls have taken their replicas so far.

Serve asks `replicas` ten times a second, in its controller, into which this module goes as a copy: it imports nothing
of ours. Bounds and delays are Serve's to apply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

RECENT_S = 5.0  # over so long what is wanted now is averaged: some chunks, between two of which a video wants none
UNMET = 0.1  # of a replica: so little may be wanted without one more
VIEWERS = 200  # requests at once of one ingress, where there may be several
BUSY = 0.8  # the share of its time that a replica which serves all videos is to be at work


def samplers(wanting: float) -> int:
    """One for each video that wants a chunk, in the mean of the time looked back on."""
    return max(0, math.ceil(wanting - UNMET))


def for_all(work: float, calls: float) -> int:
    """Of VAE decoders and text encoders, which take the calls of all videos in turn. `work`: seconds of it a second, of
    calls that are over; `calls`: what is under way, of which more than the replicas have hands waits."""
    return max(math.ceil(work / BUSY - 1e-9), math.ceil(calls - UNMET), 1 if calls > 0 else 0)


def recent(figures: Sequence[Any]) -> float:
    """The mean of the last RECENT_S, as they are told once a second. `figures`: with `timestamp` and `value`, oldest
    first."""
    values = [each.value for each in figures if each.timestamp > figures[-1].timestamp - RECENT_S]
    return float(sum(values)) / len(values) if values else 0.0


def rate(counts: Sequence[Any]) -> float:
    """By how much a count grew a second, over all that is told of it."""
    if len(counts) < 2 or counts[-1].timestamp <= counts[0].timestamp:
        return 0.0
    first, last = counts[0], counts[-1]
    return float((last.value - first.value) / (last.timestamp - first.timestamp))


def replicas(contexts: Mapping[Any, Any]) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
    """Serve's application-level policy: deployment ▸ AutoscalingContext in, deployment ▸ replicas out.

    What the Director says nothing of keeps its size: also when there is no Director for a while.
    """
    means: dict[str, float] = {}
    rates: dict[str, float] = {}
    for context in contexts.values():
        if context.deployment_name == "Director":
            for name, told in context.raw_metrics.items():
                means[name] = sum(map(recent, told.values()))
                rates[name] = sum(map(rate, told.values()))
    wanted: dict[Any, float] = {}
    for deployment, context in contexts.items():
        name = context.deployment_name
        if f"{name}/wanting" in means:
            wanted[deployment] = samplers(means[f"{name}/wanting"])
        elif f"{name}/calls" in means:
            wanted[deployment] = for_all(rates[f"{name}/work"], means[f"{name}/calls"])
        elif name == "Ingress":
            wanted[deployment] = context.total_num_requests / context.config.get_target_ongoing_requests()
    return wanted, {}
