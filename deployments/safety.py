"""The operator's own check of what is asked for and of what is made: a SafetyHook, which `safety.hook` names.

Prompts and inputs are checked by the ingress, before anything is accepted; the frames of a chunk by the VAE decoder
that made them, before anything of it is stored. A hook that fails, or takes too long, lets nothing pass, unless the
configuration says otherwise. docs/safety.md is the operator's page.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deployments.config import ConfigError, SafetySettings
from deployments.records import Check, CheckedPart, CheckOutcome
from deployments.tracing import Tracer
from helios_core.errors import HeliosError
from helios_core.media.upload import MediaInfo

CATEGORY = re.compile(r"[a-z][a-z0-9_-]{0,39}")
AT_ONCE = 8  # checks of one replica: a hook that hangs for ever keeps so many threads, and no more

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What a hook says. `blocked`: why, in one word that the client is told, such as "violence"; None: it may pass.

    Raises ValueError for a word that is not of the form CATEGORY.
    """

    blocked: str | None

    def __post_init__(self) -> None:
        if self.blocked is not None and not CATEGORY.fullmatch(self.blocked):
            raise ValueError(f"blocked is {self.blocked!r:.80}; allowed: None, or a word like {CATEGORY.pattern}")


ALLOW = Verdict(None)


@dataclass(frozen=True)
class Frames:
    """One chunk of a video, as it is about to be encoded. It can only be read.

    `chunk`: its index, from 0; `i420_TRW`: its frames, uint8 [T, H * 3 / 2, W] with T from 1 to 33, BT.709 in TV range:
    of each H rows of Y, then U, then V, which have a quarter as many numbers.
    """

    video_id: str
    chunk: int
    i420_TRW: npt.NDArray[np.uint8]

    def rgb(self, frame: int) -> npt.NDArray[np.uint8]:
        """One of the frames as RGB, uint8 [H, W, 3]."""
        from helios_core.media.fragments import to_rgb  # brings FFmpeg, which the ingress and the Director never need

        return to_rgb(self.i420_TRW[frame])


class SafetyHook(ABC):
    """What an operator derives from. Each ingress makes one, and so does each VAE decoder, without arguments.

    A method may be called from several threads at once. If it raises, answers with anything but a Verdict, or takes
    longer than `safety.max_seconds`, the check has failed.
    """

    @abstractmethod
    def check_prompt(self, prompt: str) -> Verdict:
        """May a video be made of this text? Asked of every text that a new video would have, the negative prompt too,
        and of each change of a prompt."""

    @abstractmethod
    def check_input(self, path: Path, info: MediaInfo) -> Verdict:
        """May a video begin with this image or video? `path`: the client's own file, to be taken for hostile, which is
        gone when this returns; `info`: what it is, which was probed."""

    @abstractmethod
    def check_frames(self, frames: Frames) -> Verdict:
        """May this chunk be shown?"""


class Unsafe(HeliosError):
    """What a check does not let pass. `param`: the request's field, or the chunk; `check`: how it went."""

    def __init__(self, param: str, check: Check) -> None:
        super().__init__(param, check)
        self.param, self.check = param, check


class ContentBlocked(Unsafe):
    """The hook said no."""

    code = "content_blocked"

    def __str__(self) -> str:
        return f"{self.param} is blocked: {self.check.category}; allowed: what this service's safety check lets pass"


class SafetyUnavailable(Unsafe):
    """The hook said nothing that counts."""

    code = "safety_unavailable"

    def __str__(self) -> str:
        return f"{self.param} could not be checked for safety; try again"


def demand(check: Check, param: str) -> None:
    """Raises ContentBlocked or SafetyUnavailable if what was checked may not pass. `param`: what that is."""
    if check.outcome == "blocked":
        raise ContentBlocked(param, check)
    if check.outcome == "refused":
        raise SafetyUnavailable(param, check)


def hook_class(path: str) -> type[SafetyHook]:
    """The hook at an import path. Raises ConfigError, which names it and what is wrong with it."""
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # a module that is imported may raise anything
        raise ConfigError(
            f"safety.hook is {path!r}, which cannot be imported: {type(error).__name__}: {error}; allowed: "
            "module:Class of a module that every process of the service finds"
        ) from error
    if not (isinstance(found, type) and issubclass(found, SafetyHook)):
        raise ConfigError(f"safety.hook is {path!r}; allowed: a class derived from deployments.safety.SafetyHook")
    if lacking := sorted(found.__abstractmethods__):
        raise ConfigError(f"safety.hook is {path!r}, which lacks {', '.join(lacking)}; allowed: a hook that has all")
    return found


class Guard:
    """Asks a hook, in threads, so that whoever awaits the answer does other work meanwhile.

    Every method has a Check for its answer: what the hook said, or what follows from its failure. `parent`: the
    traceparent of the span that the check is a part of.
    """

    def __init__(self, settings: SafetySettings, tracer: Tracer) -> None:
        """Raises ConfigError if there is no such hook, and whatever making one raises."""
        self._settings, self._tracer = settings, tracer
        self._hook = hook_class(settings.hook)()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="safety")
        self._free = asyncio.Semaphore(AT_ONCE)

    async def prompt(self, prompt: str, parent: str | None, video_id: str | None = None) -> Check:
        """`video_id`: of the video whose prompt changes; a new one has none yet."""
        return await self._check("prompt", partial(self._hook.check_prompt, prompt), parent, video_id)

    async def input(self, path: Path, info: MediaInfo, parent: str | None) -> Check:
        return await self._check("input", partial(self._hook.check_input, path, info), parent)

    async def frames(self, frames: Frames, parent: str | None) -> Check:
        return await self._check("frames", partial(self._hook.check_frames, frames), parent, frames.video_id)

    async def _check(
        self, part: CheckedPart, ask: Callable[[], Verdict], parent: str | None, video_id: str | None = None
    ) -> Check:
        with self._tracer.span(f"check {part}", parent) as span:
            if video_id is not None:
                span.set_attribute("video_id", video_id)
            begin = time.perf_counter()
            said = await self._said(ask)
            seconds = time.perf_counter() - begin
            outcome: CheckOutcome
            if isinstance(said, Verdict):
                outcome, category = "allowed" if said.blocked is None else "blocked", said.blocked
            else:
                outcome, category = "let_through" if self._settings.fail_open else "refused", None
                logger.error("safety check failed", extra={"part": part, "outcome": outcome, "reason": said})
            span.set_attribute("outcome", outcome)
            if category is not None:
                span.set_attribute("category", category)
                logger.info("blocked", extra={"part": part, "category": category})
        return Check(part=part, outcome=outcome, category=category, seconds=seconds)

    async def _said(self, ask: Callable[[], Verdict]) -> Verdict | str:
        """What the hook says, or why that is nothing. Not what an exception says: it may quote the prompt."""
        loop, late = asyncio.get_running_loop(), f"it took longer than max_seconds {self._settings.max_seconds:g}"
        until = loop.time() + self._settings.max_seconds
        try:
            # Waited for here, since what waits in the threads' own queue is held there when it is no longer wanted.
            async with asyncio.timeout_at(until):
                await self._free.acquire()
        except TimeoutError:
            return late
        work = self._threads.submit(ask)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free.release))
        asked = asyncio.wrap_future(work)
        try:
            await asyncio.wait([asked], timeout=until - loop.time())
        finally:
            asked.cancel()  # unless it is done: a thread that has begun goes on, and nobody hears of it
        if asked.cancelled():
            return late
        if (error := asked.exception()) is not None:
            at = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} at {at.filename}:{at.lineno}"
        answer = asked.result()
        return answer if isinstance(answer, Verdict) else f"it answered with a {type(answer).__name__}"
