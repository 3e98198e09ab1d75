"""Events as structured log lines: one line per event, with the video's id and its trace's id in each.

In the service Serve writes them as JSON, one object a line, into the log folder of Ray's session, beside
its own; see deployments/service.py. Elsewhere they are ordinary log records that carry the same fields.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from deployments.records import VideoRequestRecord
from deployments.tracing import trace_id


def event(
    logger: logging.Logger, name: str, video: VideoRequestRecord, level: int = logging.INFO, **fields: Any
) -> None:
    """Logs that `name` happened to a video."""
    trace = None if video.traceparent is None else trace_id(video.traceparent)
    exc_info = fields.pop("exc_info", None)
    logger.log(level, name, exc_info=exc_info, extra={"video_id": video.id, "trace_id": trace, **fields})


def log_with_serve() -> None:
    """Sends this replica's events to where Serve logs."""
    logging.getLogger("deployments").parent = logging.getLogger("ray.serve")
    logging.getLogger("deployments").setLevel(logging.INFO)


def shown(prompt: str, log_prompts: bool) -> str:
    """The prompt as logs and traces may have it: itself, or a hash that tells equal prompts from others."""
    return prompt if log_prompts else "sha256:" + hashlib.sha256(prompt.encode()).hexdigest()[:16]
