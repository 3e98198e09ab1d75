"""The page in Debian's Chromium, on the real service with the demo model, whose chunks take 1.7 s: longer to make than
to play.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import av
import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Route, expect

from deployments.config import AppConfig
from deployments.service import run_service
from helios_core.config import CHUNK_FRAMES
from helios_core.demo.score import score
from tests.core.media_files import write_samples
from tests.deployments.conftest import Npm
from tests.deployments.line import Line
from tests.deployments.viewer import PROMPT, SHOWN, VIDEO, Enter, Viewer, chromium, entering

pytestmark = pytest.mark.ray

GREEN = "a green sun over a blue sea, drifting left"
CHUNK = CHUNK_FRAMES / 24  # seconds
PACE = 1.7
AXE = "axe-core@4.11.0"
SERIOUS = ("serious", "critical")
CONTROLS = "a[href], button, input, select, textarea, summary, .pane video"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, key: tuple[str, Path], shared_ray: int) -> Iterator[str]:
    demo = {"model": "demo", "sampler": {"min_chunk_seconds": PACE, "min_replicas": 2, "max_replicas": 2}}
    config = AppConfig(store=str(tmp_path_factory.mktemp("store")), port=shared_ray)
    with run_service(config.override(models=[demo], testing=True, torch_threads=1, keys=str(key[1]))) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str, key: tuple[str, Path]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120, headers={"Authorization": f"Bearer {key[0]}"}) as client:
        yield client


@pytest.fixture(scope="module")
def browser(url: str) -> Iterator[Browser]:
    """Closed before the service is: while Playwright runs, this thread has an event loop that Serve trips over."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def enter(browser: Browser, url: str, http: httpx.Client, key: tuple[str, Path]) -> Iterator[Enter]:
    with entering(browser, url, http, key[0]) as enter:
        yield enter


@pytest.fixture(scope="module")
def finished(http: httpx.Client) -> str:
    """A finished video of three chunks, moving, whose prompt changes."""
    prompts = [{"at_seconds": 2 * CHUNK, "prompt": GREEN}]
    body = {"prompt": PROMPT, "seconds": 3 * CHUNK, "preset": "realtime", "seed": 5, "prompts": prompts}
    video_id: str = http.post("/v1/videos", json=body).json()["id"]
    assert http.get(f"/v1/videos/{video_id}/content").status_code == 200  # to its end
    return video_id


# Playing what is being made


def test_a_video_that_is_made_more_slowly_than_it_plays_does_not_stop(enter: Enter) -> None:
    """Its first picture is there before its second chunk, and every frame is decoded."""
    viewer = enter()
    video_id = viewer.make(Seconds=str(6 * CHUNK))
    viewer.until(VIDEO)
    viewer.ask(SHOWN)
    assert viewer.video(video_id)["usage"]["chunks"] == 1
    assert viewer.to_the_end() == 6 * CHUNK_FRAMES
    assert viewer.ask("seen.waits") == []
    rates = viewer.ask("[...seen.rates]")
    assert 0.75 <= min(rates) < CHUNK / PACE
    assert viewer.ask(f"{VIDEO}.duration") == pytest.approx(6 * CHUNK)
    expect(viewer.state).to_have_text("Whole.")


def test_after_a_reload_it_goes_on(enter: Enter) -> None:
    viewer = enter()
    viewer.make(Seconds=str(4 * CHUNK))
    viewer.played(CHUNK + 0.5)
    before = viewer.ask(f"{VIDEO}.currentTime")
    viewer.page.reload()
    viewer.until(VIDEO)
    assert viewer.ask(SHOWN) > before - 0.5
    viewer.to_the_end()
    assert viewer.ask(f"{VIDEO}.currentTime") == pytest.approx(4 * CHUNK)


def test_a_line_that_is_cut_loses_nothing(enter: Enter, url: str) -> None:
    with closing(Line(int(url.rpartition(":")[2]))) as line:
        viewer = enter(at=line.url)
        viewer.allowed = "ERR_CONNECTION|ERR_INCOMPLETE|ERR_EMPTY|ERR_NETWORK|ERR_SOCKET"
        viewer.make(Seconds=str(5 * CHUNK))
        viewer.played(1)
        assert line.cut() >= 2  # the video's and its events'
        viewer.page.wait_for_timeout(3000)
        line.mend()
        assert viewer.to_the_end() == 5 * CHUNK_FRAMES
        expect(viewer.state).to_have_text("Whole.")


def test_what_stands_before_the_service_answers_in_its_place(enter: Enter) -> None:
    """As HAProxy does when it has been replaced, before it has heard of the service."""
    viewer = enter()
    viewer.allowed = "status of 404"
    answered: list[str] = []

    def first(route: Route) -> None:
        what = urlsplit(route.request.url).path.rpartition("/")[2]
        if what in answered or (what.startswith("video_") and viewer.page.get_by_role("status").count() == 0):
            route.fallback()
        else:
            answered.append(what)
            route.fulfill(status=404, content_type="text/plain", body="Path not found.")

    viewer.page.route("**/v1/videos/video_*", first)
    viewer.page.route("**/v1/videos/video_*/*", first)
    viewer.make(Seconds=str(3 * CHUNK))
    viewer.until(VIDEO)
    assert viewer.to_the_end() == 3 * CHUNK_FRAMES
    expect(viewer.state).to_have_text("Whole.")
    assert {"events", "content"} < set(answered) and len(answered) >= 3


def test_two_watch_one_video(enter: Enter) -> None:
    one, other = enter(), enter()
    video_id = one.make(Seconds=str(3 * CHUNK))
    one.until(VIDEO)
    one.ask(SHOWN)
    other.open(video_id)
    other.until(VIDEO)
    other.ask(SHOWN)
    assert one.video(video_id)["status"] == "in_progress"
    assert (one.to_the_end(), other.to_the_end()) == (3 * CHUNK_FRAMES, 3 * CHUNK_FRAMES)


def test_an_open_ended_video_is_paused_resumed_and_stopped(enter: Enter) -> None:
    viewer = enter()
    viewer.field("Without an end").check()
    video_id = viewer.make()
    viewer.played(0.1)
    viewer.button("Pause making").click()
    expect(viewer.state).to_have_text("Paused: the next chunk waits.")
    held = viewer.video(video_id)
    assert held["paused"]
    # What has begun is finished; then the player runs out.
    viewer.until(f"{VIDEO}.buffered.end(0) - {VIDEO}.currentTime < 0.1")
    chunks = viewer.video(video_id)["usage"]["chunks"]
    viewer.button("Resume making").click()
    viewer.until(f"{VIDEO}.buffered.end(0) > {(chunks + 1) * CHUNK - 0.01}")
    viewer.button("Stop").click()
    expect(viewer.state).to_have_text("Whole.")
    video = viewer.video(video_id)
    assert (video["status"], video["frames"]) == ("completed", CHUNK_FRAMES * video["usage"]["chunks"])
    assert viewer.to_the_end() == video["frames"]


def test_a_video_that_is_stopped_keeps_what_there_is(enter: Enter) -> None:
    viewer = enter()
    video_id = viewer.make(Seconds="60")
    viewer.played(0.5)
    viewer.page.keyboard.press("s")
    expect(viewer.state).to_have_text("Stopped.")
    chunks = viewer.video(video_id)["usage"]["chunks"]
    assert viewer.to_the_end() == CHUNK_FRAMES * chunks
    with viewer.page.expect_download() as download:
        viewer.page.get_by_role("link", name="Download").click()
    with av.open(str(download.value.path())) as container:
        assert sum(1 for _ in container.decode(video=0)) == CHUNK_FRAMES * chunks


# Steering, and what follows


def test_a_new_prompt_is_seen(enter: Enter) -> None:
    """In the pixels that the page shows, by the demo model's scorer."""
    viewer = enter()
    video_id = viewer.make(Seconds=str(5 * CHUNK))
    viewer.played(0.1)
    viewer.field("Next prompt", "Change the prompt").fill(GREEN)
    viewer.field("over chunks", "Change the prompt").fill("1")
    viewer.button("Change").click()
    expect(viewer.state).to_contain_text("The new prompt begins with chunk")
    chunk = viewer.video(video_id)["prompts"][0]["chunk"]
    expect(viewer.page.get_by_role("list", name="Prompts")).to_contain_text(GREEN)
    viewer.to_the_end()
    for first, prompt in ((0, PROMPT), (4 * CHUNK_FRAMES, GREEN)):
        frames = np.stack([viewer.frame_at((first + i + 0.5) / 24)[1] for i in range(CHUNK_FRAMES)])
        assert score(frames, prompt).right["object_colour"], prompt
    assert 1 <= chunk < 4


def test_every_picture_can_be_sought(enter: Enter, finished: str) -> None:
    viewer = enter()
    viewer.open(finished)
    viewer.until(VIDEO)
    assert viewer.to_the_end() == 3 * CHUNK_FRAMES
    frames = np.stack(viewer.file(finished)).astype(int)
    for frame in (0, 98, 33, 32, 50, 51, 66):
        time, pixels = viewer.frame_at((frame + 0.5) / 24)
        assert time == pytest.approx(frame / 24, abs=1e-3)
        assert np.abs(frames - pixels).mean(axis=(1, 2, 3)).argmin() == frame


def test_what_follows_from_a_video(enter: Enter, finished: str) -> None:
    """A longer one plays on from the old end, a branch from where it branches off."""
    viewer = enter()
    viewer.open(finished)
    viewer.played(0.1)
    before = viewer.page.url

    viewer.field("Seconds more", "Extend").fill(str(CHUNK))
    viewer.button("Extend").click()
    longer = viewer.led(before)
    viewer.until(VIDEO)
    assert viewer.ask(SHOWN) >= 3 * CHUNK - 0.1
    viewer.to_the_end()
    assert (viewer.video(longer)["frames"], viewer.video(longer)["prompt"]) == (4 * CHUNK_FRAMES, PROMPT)

    viewer.open(finished)
    viewer.field("From chunk", "Fork").fill("1")
    viewer.allowed = "409"
    viewer.button("Fork").click()
    expect(viewer.page.get_by_role("alert")).to_contain_text("keep_states: all")
    viewer.field("From chunk", "Fork").fill("0")
    viewer.field("Seed", "Fork").fill("77")
    viewer.button("Fork").click()
    branch = viewer.video(viewer.led(before))
    assert (branch["seed"], branch["origin"]["video_id"]) == (77, finished)

    viewer.open(finished)
    viewer.field("The same with another prompt", "Remix").fill(GREEN)
    viewer.button("Remix").click()
    remix = viewer.video(viewer.led(before))
    assert (remix["prompt"], remix["seed"]) == (GREEN, 5)


def test_two_seeds_side_by_side(enter: Enter, finished: str) -> None:
    viewer = enter()
    viewer.open(finished)
    viewer.played(0.1)
    before = viewer.page.url
    viewer.field("Beside it, with another seed", "Compare").fill("6")
    viewer.button("Compare").click()
    other = viewer.led(before)
    assert viewer.page.url.endswith(f"/#/videos/{finished}/{other}")
    viewer.until("[...document.querySelectorAll('.pane video')].map((video) => video.currentTime > 0)", all)
    viewer.ask(f"{VIDEO}.pause()")
    viewer.until("document.querySelectorAll('.pane video')[1].paused")
    viewer.ask(f"{VIDEO}.currentTime = 1.3")
    viewer.until("document.querySelectorAll('.pane video')[1].currentTime", lambda seconds: abs(seconds - 1.3) < 0.5)
    assert viewer.video(other)["seed"] == 6


def test_a_picture_and_a_clip_can_be_dropped(enter: Enter, tmp_path: Path) -> None:
    write_samples(tmp_path, "video.mp4")
    for name, task in (("picture.png", "image-to-video"), ("video.mp4", "video-to-video")):
        viewer = enter()
        if name == "picture.png":
            viewer.field("Begin with an image, or go on from a video").set_input_files(tmp_path / name)
        else:
            data = base64.b64encode((tmp_path / name).read_bytes()).decode()
            drop = viewer.page.evaluate_handle(
                """async (data) => {
                    const transfer = new DataTransfer()
                    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))
                    transfer.items.add(new File([bytes], "video.mp4"))
                    return transfer
                }""",
                data,
            )
            viewer.page.locator("#composer").dispatch_event("drop", {"dataTransfer": drop})
        video_id = viewer.make(Seconds="1")
        viewer.played(0.2)
        assert viewer.video(video_id)["task"] == task


# What it says


def test_what_is_wrong_stands_beside_its_field(enter: Enter) -> None:
    viewer = enter()
    viewer.allowed = "422"
    viewer.field("Size").fill("100x100")
    viewer.button("Make the video").click()
    told = viewer.page.get_by_role("alert")
    expect(told).to_contain_text("size is")
    size = viewer.field("Size")
    expect(size).to_be_focused()
    expect(size).to_have_attribute("aria-describedby", told.get_attribute("id") or "")
    viewer.field("Size").fill("256x128")
    viewer.field("Prompt").fill("")
    viewer.button("Make the video").click()
    expect(told).to_contain_text("prompt is")
    assert told.count() == 1 and size.get_attribute("aria-invalid") is None


def test_a_video_that_there_is_not(enter: Enter) -> None:
    viewer = enter()
    viewer.allowed = "404"
    viewer.open(f"video_{'0' * 32}")
    expect(viewer.page.get_by_role("alert")).to_contain_text("no video has the id")


def test_recent_videos_move_when_they_are_pointed_at(enter: Enter, finished: str) -> None:
    viewer = enter()
    card = viewer.page.locator(f"a[href='#/videos/{finished}']")
    card.hover()
    viewer.until("document.querySelector('.cards video')?.currentTime > 0")
    viewer.page.mouse.move(0, 0)
    expect(viewer.page.locator(".cards video")).to_have_count(0)
    card.click()
    viewer.until(f"{VIDEO}?.currentTime > 0")


def test_what_the_keys_do(enter: Enter, finished: str) -> None:
    viewer = enter()
    viewer.open(finished)
    viewer.played(0.1)
    viewer.ask(f"{VIDEO}.pause()")
    press = viewer.page.keyboard.press
    viewer.ask(f"{VIDEO}.currentTime = 2")
    press("ArrowRight")
    assert viewer.ask(f"{VIDEO}.currentTime") == pytest.approx(2 + CHUNK)
    press("ArrowLeft")
    press("ArrowLeft")
    assert viewer.ask(f"{VIDEO}.currentTime") == pytest.approx(2 - CHUNK)
    press("k")
    viewer.until(f"!{VIDEO}.paused")
    press("k")
    viewer.until(f"{VIDEO}.paused")
    press("n")
    expect(viewer.field("Prompt")).to_be_focused()
    press("k")  # is a letter here
    expect(viewer.field("Prompt")).to_have_value(f"{PROMPT}k")
    assert viewer.ask(f"{VIDEO}.paused")


def test_it_is_deleted(enter: Enter, http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "seconds": 1, "preset": "realtime"}
    video_id = http.post("/v1/videos", json=body).json()["id"]
    viewer = enter()
    viewer.page.on("dialog", lambda dialog: dialog.accept())
    viewer.open(video_id)
    viewer.until(f"{VIDEO}?.ended")
    viewer.button("Delete").click()
    expect(viewer.page.locator(".pane")).to_have_count(0)
    assert http.get(f"/v1/videos/{video_id}").status_code == 404


def test_without_media_source_it_plays_hls(enter: Enter, finished: str) -> None:
    """As on an iPhone. Chromium's own HLS plays what is finished."""
    viewer = enter(script="delete window.MediaSource")
    viewer.open(finished)
    viewer.until(VIDEO)
    assert viewer.to_the_end() == 3 * CHUNK_FRAMES
    assert any(f"{finished}/hls/index.m3u8?" in asked for asked in viewer.asked)  # with the link that lets it in


def test_a_key_is_asked_for_and_kept_in_the_tab(enter: Enter, key: tuple[str, Path], finished: str) -> None:
    viewer = enter(keyless=True)
    viewer.allowed = "status of 401"
    field = viewer.field("API key", form="Key")
    for sent in ("helios_wrong", key[0]):
        expect(field).to_be_focused()
        field.fill(sent)
        viewer.button("Use this key").click()
        viewer.page.wait_for_load_state("networkidle")
    expect(viewer.field("Size")).not_to_have_value("")
    expect(viewer.page.get_by_role("form", name="Key")).to_be_hidden()
    viewer.open(finished)
    viewer.to_the_end()
    assert all(key[0] not in asked for asked in viewer.asked)


# For everybody


@pytest.fixture(scope="module")
def axe(npm: Npm) -> str:
    return (npm(AXE) / "node_modules/axe-core/axe.min.js").read_text()


@pytest.mark.parametrize(("width", "colors"), [(1280, "dark"), (390, "light")])
def test_it_is_for_everybody(enter: Enter, finished: str, axe: str, width: int, colors: str) -> None:
    """axe-core finds nothing serious, nothing is wider than the window, and the keyboard reaches every control: with
    an error beside its field, while a video is made, and when it is whole. `build/page/` has the pictures."""
    viewer = enter(width=width, colors=colors, script=axe)
    viewer.allowed = "422"
    viewer.field("Prompt").fill("")
    viewer.button("Make the video").click()
    expect(viewer.page.get_by_role("alert")).to_be_visible()
    check(viewer, width)

    viewer.field("Without an end").check()
    viewer.make()
    viewer.played(0.1)
    check(viewer, width)
    viewer.button("Stop").click()
    expect(viewer.state).to_have_text("Whole.")
    viewer.field("Without an end").uncheck()

    viewer.open(finished)
    viewer.played(0.1)
    viewer.ask(f"{VIDEO}.currentTime = 3.5")
    viewer.until(f"{VIDEO}.ended")
    expect(viewer.page.locator(f"a[href='#/videos/{finished}'] img")).to_be_visible()
    check(viewer, width)
    shots = Path("build/page")
    shots.mkdir(parents=True, exist_ok=True)
    viewer.page.mouse.move(0, 0)
    viewer.page.screenshot(path=shots / f"{width}-{colors}.png", full_page=True)
    check_keyboard(viewer)


def check(viewer: Viewer, width: int) -> None:
    found = viewer.ask("axe.run().then(({violations}) => violations)")
    bad = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found if each["impact"] in SERIOUS]
    assert bad == []
    assert viewer.ask("document.documentElement.scrollWidth") <= width


def check_keyboard(viewer: Viewer) -> None:
    every = f"[...document.querySelectorAll('{CONTROLS}')].filter((each) => each.checkVisibility())"
    viewer.ask(f"window.missed = new Set({every})")
    viewer.page.locator("body").focus()
    for _ in range(2 * viewer.ask("missed.size")):  # the player's own controls are stops as well
        viewer.page.keyboard.press("Tab")
        viewer.ask("missed.delete(document.activeElement)")
    assert viewer.ask("[...missed].map((each) => each.outerHTML)") == []
