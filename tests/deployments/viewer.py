"""Somebody before the page, in Debian's Chromium.

Every page is judged when its test is over: nothing from elsewhere was asked for, and nothing was an error to the
browser.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import av
import httpx
import numpy as np
import numpy.typing as npt
from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PROMPT = "a red sun over a blue sea, drifting left"
LOOK_MS, LOOKS = 50, 2400  # at a page, until something has happened there

# Kept from the first moment on: where playing had to wait, how fast it played, the most that was ever buffered.
SEEN = """
window.seen = {waits: [], rates: new Set(), buffered: 0}
const at = (name, act) => document.addEventListener(name, ({target}) => act(target), true)
at("waiting", ({currentTime}) => currentTime > 0 && seen.waits.push(currentTime))
at("timeupdate", ({buffered, playbackRate}) => {
    let seconds = 0
    for (let i = 0; i < buffered.length; i++) seconds += buffered.end(i) - buffered.start(i)
    seen.buffered = Math.max(seen.buffered, seconds)
    seen.rates.add(playbackRate)
})
"""
VIDEO = "document.querySelector('.pane video')"
SHOWN = f"new Promise((shown) => {VIDEO}.requestVideoFrameCallback((_, {{mediaTime}}) => shown(mediaTime)))"
PIXELS = f"""
() => {{
    const video = {VIDEO}
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight)
    const context = canvas.getContext("2d")
    context.drawImage(video, 0, 0)
    const {{data, width, height}} = context.getImageData(0, 0, canvas.width, canvas.height)
    return [btoa(Array.from(data, (byte) => String.fromCharCode(byte)).join("")), width, height]
}}
"""


@dataclasses.dataclass
class Viewer:
    """Somebody before a page. `allowed`: errors that the test provokes, as the browser tells of them."""

    page: Page
    http: httpx.Client
    url: str
    errors: list[str] = dataclasses.field(default_factory=list)
    asked: list[str] = dataclasses.field(default_factory=list)
    allowed: str = "$^"

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def field(self, label: str, form: str = "New video") -> Locator:
        return self.page.get_by_role("form", name=form).get_by_label(re.compile(rf"^\s*{label}"))

    @property
    def state(self) -> Locator:
        return self.page.get_by_role("status").first

    def make(self, prompt: str = PROMPT, **fields: str) -> str:
        """Fills in the form of a new video and sends it; its id."""
        before = self.page.url
        self.field("Prompt").fill(prompt)
        self.field("Preset").select_option("realtime")
        for label, text in fields.items():
            self.field(label).fill(text)
        self.button("Make the video").click()
        return self.led(before)

    def led(self, before: str) -> str:
        """The id of the video that the page shows after it showed another one."""
        self.page.wait_for_url(lambda url: url != before and "/videos/" in url)
        return self.page.url.rpartition("/")[2]

    def open(self, video_id: str) -> None:
        self.page.goto(f"{self.url}/#/videos/{video_id}")

    def ask(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def until(self, expression: str, what: Callable[[Any], bool] = bool) -> Any:
        """The value of an expression in the page, as soon as it is the one. (Playwright's own waiting needs eval, which
        the page's policy forbids.)"""
        for _ in range(LOOKS):
            if what(value := self.ask(expression)):
                return value
            self.page.wait_for_timeout(LOOK_MS)
        raise AssertionError(f"{expression} is {value}")

    def played(self, seconds: float) -> None:
        self.until(f"{VIDEO}?.currentTime >= {seconds}")

    def to_the_end(self) -> int:
        """Plays to the end; how many frames were decoded."""
        self.until(f"{VIDEO}.ended")
        return int(self.ask(f"{VIDEO}.getVideoPlaybackQuality().totalVideoFrames"))

    def frame_at(self, seconds: float) -> tuple[float, npt.NDArray[np.uint8]]:
        """Of a video at rest: seeks; the time of the picture that is shown then, and the picture, [H, W, 3]."""
        time = self.ask(f"(() => {{ const shown = {SHOWN}; {VIDEO}.currentTime = {seconds}; return shown }})()")
        data, width, height = self.ask(PIXELS)
        pixels = np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)
        return time, pixels[..., :3]

    def video(self, video_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get(f"/v1/videos/{video_id}").json()
        return answer

    def file(self, video_id: str) -> list[npt.NDArray[np.uint8]]:
        """The finished video's frames, as PyAV decodes them."""
        with av.open(io.BytesIO(self.http.get(f"/v1/videos/{video_id}/content").content)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


Enter = Callable[..., Viewer]


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@contextmanager
def entering(browser: Browser, url: str, http: httpx.Client, key: str | None = None) -> Iterator[Enter]:
    """Opens the page for one more viewer. `key`: what each has in their tab, unless `keyless`; `at`: where the service
    is reached; `script`: run before the page's own."""
    viewers: list[Viewer] = []

    def enter(
        at: str = url, script: str = "", width: int = 1280, colors: Any = "light", keyless: bool = False
    ) -> Viewer:
        size = ViewportSize(width=width, height=900)
        context = browser.new_context(viewport=size, color_scheme=colors, reduced_motion="reduce")
        context.set_default_timeout(30_000)
        has_key = "" if key is None or keyless else f'sessionStorage.setItem("key", "{key}")'
        context.add_init_script("\n".join((SEEN, has_key, script)))
        viewer = Viewer(context.new_page(), http, at)
        viewer.page.on("console", lambda told: told.type == "error" and viewer.errors.append(told.text))
        viewer.page.on("pageerror", lambda error: viewer.errors.append(str(error)))
        viewer.page.on("request", lambda request: viewer.asked.append(request.url))
        viewers.append(viewer)
        viewer.page.goto(f"{at}/")
        if not keyless:
            expect(viewer.field("Size")).not_to_have_value("")
        return viewer

    yield enter
    for viewer in viewers:
        viewer.page.context.close()
    for viewer in viewers:
        assert [text for text in viewer.errors if not re.search(viewer.allowed, text)] == []
        assert [asked for asked in viewer.asked if not asked.startswith((viewer.url, "blob:", "data:"))] == []
