"""A load test's requests, simulated: what was measured beside what the simulation says of the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.chunk_times import read_times
from deployments.config import AdmissionSettings
from deployments.planning import percentile
from deployments.simulation import Asked, Fleet, Seen, simulate
from helios_core.errors import InvalidInput


def replayed(report: Path, times: Path) -> dict[str, tuple[float, float]]:
    """Figure ▸ measured, simulated. `times`: how long the parts take, best from another run than `report`. Raises
    InvalidInput."""
    try:
        document: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        setting, videos = document["setting"], document["videos"]
        # Who was refused, and came again, is in the report with each try.
        asked = sorted((_asked(each) for each in videos if not each.get("again")), key=lambda each: each.at)
        replicas = {name: int(setting[name]) for name in ("samplers", "vae_decoders", "text_encoders")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput("--replay", str(report), f"a load test's report ({error})") from None
    admission = AdmissionSettings()
    measured = [_seen(video) for video in videos]
    if not any(map(_whole, measured)):
        raise InvalidInput("--replay", str(report), "a report of a run that completed a video")
    outcome = simulate(
        asked, read_times(times, (1, 1, 1), True), Fleet(**replicas), admission.videos_per_sampler, admission.queued
    )
    simulated = outcome.seen
    return {name: (figure(measured), figure(simulated)) for name, figure in FIGURES.items()}


def _asked(video: dict[str, Any]) -> Asked:
    return Asked(
        at=video["at"],
        seconds=video["seconds"],
        owner=str(video["key"]),
        priority=video["priority"],
        image=video["image"],
        leaves_s=video["left_at_s"] if video["status"] == "cancelled" else None,  # others come back
    )


def _seen(video: dict[str, Any]) -> Seen:
    status = {"completed": "completed", "refused": "refused", "cancelled": "left"}.get(video["status"], "unfinished")
    return Seen(
        _asked(video),
        status,  # type: ignore[arg-type]
        video["first_fragment_s"],
        video["stalls"],
        video["stall_s"],
        video["ended_s"],
    )


def _whole(seen: Seen) -> bool:
    return seen.status == "completed" and seen.ended_s is not None


def _throughput(seen: list[Seen]) -> float:
    """Seconds of video a second, from the first request to the last end."""
    whole = list(filter(_whole, seen))
    end = max(each.asked.at + (each.ended_s or 0.0) for each in whole)
    return sum(each.asked.seconds for each in whole) / (end - min(each.asked.at for each in whole))


def _first_fragment(share: float, seen: list[Seen]) -> float:
    watched = [each for each in seen if each.asked.priority == "realtime"]
    return percentile([each.first_fragment_s for each in watched if each.first_fragment_s is not None], share) or 0.0


FIGURES: dict[str, Callable[[list[Seen]], float]] = {
    "seconds of video made a second": _throughput,
    "first fragment p50, s": lambda seen: _first_fragment(0.5, seen),
    "first fragment p95, s": lambda seen: _first_fragment(0.95, seen),
}
