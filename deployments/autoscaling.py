"""How many replicas each deployment is to have: pure rules over what the Director tells.

Serve's own rule counts calls that wait, of which there are none: the Director holds back a sample call until a sampler
is free. So it tells what is wanted instead (`ServeGraph.demand`), as figures whose names begin with a deployment's:

`NAME/wanting`: videos that want a chunk now, under way or waiting. `NAME/calls`: calls under way now. `NAME/work`: the
seconds that all calls have taken their replicas so far.

Serve asks `replicas` ten times a second, in its controller, into which this module goes as a copy: it imports nothing
of ours. Bounds and delays are Serve's to apply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

UNMET = 0.1  # of a video: so much less than a whole one may go without a sampler of its own
BUSY = 0.8  # the share of its time that a replica which serves all videos is to be at work


def samplers(wanting: float) -> int:
    """One for each video that wants a chunk, in the mean of the time looked back on."""
    return max(0, math.ceil(wanting - UNMET))


def for_all(work: float, calls: float) -> int:
    """Of VAE decoders and text encoders, which take the calls of all videos in turn. `work`: seconds of it a second;
    `calls`: under way, in the mean: one that waits for the first replica has done no work yet."""
    return max(math.ceil(work / BUSY - 1e-9), 1 if calls > 0 else 0)


def rate(counts: Sequence[Any]) -> float:
    """By how much a count grew a second. `counts`: with `timestamp` and `value`, oldest first."""
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
            for name, told in context.aggregated_metrics.items():
                means[name] = sum(told.values())
            for name, told in context.raw_metrics.items():
                rates[name] = sum(rate(counts) for counts in told.values())
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
