"""A safety hook for the shared service: replicas import it by its name."""

from __future__ import annotations

from pathlib import Path

from deployments.safety import ALLOW, Frames, SafetyHook, Verdict
from helios_core.media.upload import MediaInfo

BLOCKED_SIZE = "64x128"  # which no other test asks for
BLOCKED_CHUNK = 1


class Moderation(SafetyHook):
    def check_prompt(self, prompt: str) -> Verdict:
        return Verdict("violence") if "blood" in prompt else ALLOW

    def check_input(self, path: Path, info: MediaInfo) -> Verdict:
        return ALLOW

    def check_frames(self, frames: Frames) -> Verdict:
        blocked = frames.chunk == BLOCKED_CHUNK and frames.rgb(0).shape == (128, 64, 3)
        return Verdict("violence") if blocked else ALLOW
