"""EXAMPLES.md runs as it stands, and what a program gets from `Helios.stream` is what it says there."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from queue import Queue
from typing import Any

import av
import numpy as np
import pytest

from helios_core.checkpoints import KNOWN_MODELS
from helios_core.errors import InvalidInput
from helios_core.helios import Chunk, Helios
from helios_core.media.read import read_image
from helios_core.spec import PromptAt, VideoRequest
from helios_core.state import StreamState
from helios_core.vae.latents import decode_chunk, to_i420, to_uint8
from tests.core.media_files import write_samples

PAGE = (Path(__file__).parents[2] / "EXAMPLES.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
SMALL: dict[str, Any] = {"size": "64x64", "preset": "realtime"}


@pytest.fixture(scope="module")
def helios() -> Helios:
    return Helios.load("random", device="cpu", dtype="float32")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with picture.png and clip.mp4 of 40 frames."""
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path, "clip.mp4")
    return tmp_path


def frames_of(chunks: list[Chunk]) -> np.ndarray[Any, Any]:
    return np.concatenate([chunk.frames for chunk in chunks])


def test_the_page_has_as_many_examples_as_headings() -> None:
    assert len(EXAMPLES) == PAGE.count("\n## ") == PAGE.count("```python") >= 7


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, files: Path) -> None:
    variables: dict[str, Any] = {}
    (model,) = re.findall(r'Helios\.load\("(.*?)"\)', EXAMPLES[name])
    width, height = KNOWN_MODELS[model].default_size
    exec(compile(EXAMPLES[name], name, "exec"), variables)
    for chunk in variables.get("chunks", []):
        assert (chunk.frames.dtype, chunk.frames.shape[1:]) == (np.uint8, (height, width, 3))
    if name.startswith("Write a file"):
        with av.open("sun.mp4") as container:
            assert sum(1 for _ in container.decode(video=0)) == 96


def test_tasks_differ_and_repeat(helios: Helios, files: Path) -> None:
    def video(**inputs: Any) -> np.ndarray[Any, Any]:
        return frames_of(list(helios.stream("a sun", seconds=2, **SMALL, **inputs)))

    by_text, by_image, by_video = video(), video(image="picture.png"), video(video=Path("clip.mp4"))
    assert len(by_text) == len(by_image) == len(by_video) == 48
    assert not np.array_equal(by_text, by_image) and not np.array_equal(by_image, by_video)
    assert np.array_equal(by_image, video(image=Path("picture.png")))


def test_pixels_are_as_good_as_a_file(helios: Helios, files: Path) -> None:
    image = asyncio.run(read_image(files / "picture.png", 64, 64))
    by_file, by_pixels = (list(helios.stream("a sun", seconds=1, image=i, **SMALL)) for i in ("picture.png", image))
    assert np.array_equal(frames_of(by_file), frames_of(by_pixels))
    clip = np.random.default_rng(1).integers(0, 255, (150, 64, 64, 3), dtype=np.uint8)
    long, other = (list(helios.stream("a sun", seconds=1, video=v, **SMALL)) for v in (clip, clip[:-1]))
    assert not np.array_equal(frames_of(long), frames_of(other)), "its end counts"


async def test_a_file_can_be_given_inside_an_event_loop(helios: Helios, files: Path) -> None:
    assert next(iter(helios.stream("a sun", seconds=1, image="picture.png", **SMALL))).index == 0


def test_chunks_are_those_of_sampling_and_decoding_in_turn(helios: Helios) -> None:
    spec = VideoRequest(prompt="a sun", seconds=4, seed=3, **SMALL).check(helios.card)
    text, state = helios.text_encoder.encode("a sun"), StreamState.start(spec, helios.vae.config)
    for chunk in helios.stream("a sun", seconds=4, seed=3, **SMALL):
        state = helios.sampler.sample(text, state, spec.steps_of_chunk(chunk.index))
        frames, yuv = (
            video[: len(chunk.frames)] for video in decode_chunk(helios.vae, state.latents, to_uint8, to_i420)
        )
        assert np.array_equal(chunk.frames, frames) and np.array_equal(chunk.yuv, yuv)
        assert chunk.state.to_bytes() == state.to_bytes()
    assert chunk.index == 2


def is_free(helios: Helios) -> bool:
    """Whether the sampler's thread is at nothing any more."""
    return helios._thread.submit(lambda: True).result(timeout=60)


def test_the_next_chunk_is_sampled_while_one_is_looked_at(helios: Helios) -> None:
    steps: Queue[int] = Queue()
    stream = helios.stream("a sun", seconds=4, on_step=steps.put, **SMALL)
    assert steps.empty(), "nothing is computed before it is asked for"
    next(stream)
    assert [steps.get(timeout=60) for _ in range(9)][-3:] == [
        0,
        1,
        2,
    ]  # 6 steps of chunk 0, as amplified, and 3 of chunk 1
    stream.close()
    assert is_free(helios)


@pytest.mark.parametrize("steps", [0, 7])
def test_what_goes_wrong_while_sampling_comes_out(helios: Helios, steps: int) -> None:
    seen = []

    def stop(stage: int) -> None:
        if len(seen) == steps:
            raise ArithmeticError("enough")
        seen.append(stage)

    chunks = []
    with pytest.raises(ArithmeticError, match="enough"):
        chunks += helios.stream("a sun", seconds=4, on_step=stop, **SMALL)
    assert is_free(helios)


def test_what_goes_wrong_while_decoding_ends_the_sampling(helios: Helios, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ArithmeticError("no pixels")

    monkeypatch.setattr(helios.vae, "decode_frames", broken)
    with pytest.raises(ArithmeticError, match="no pixels"):
        next(helios.stream("a sun", seconds=None, **SMALL))
    assert is_free(helios)


def test_a_change_of_the_prompt_begins_with_its_chunk(helios: Helios) -> None:
    changed = [PromptAt(1.3, "a green moon")]  # chunk 1 starts at 1.375 s
    plain, with_change = (list(helios.stream("a sun", seconds=4, prompts=p, **SMALL)) for p in ((), changed))
    same = [np.array_equal(a.frames, b.frames) for a, b in zip(plain, with_change, strict=True)]
    assert same == [True, False, False]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"image": "picture.png", "video": "clip.mp4"}, ["video", "not both"]),
        ({"image": "clip.mp4"}, ["image", "video (mp4)", "an image"]),
        ({"video": "picture.png"}, ["video", "image (png)", "a video"]),
        ({"image": np.zeros((64, 63, 3), np.uint8)}, ["image", "[64, 63, 3]", "[64, 64, 3]"]),
        ({"image": np.zeros((64, 64, 3), np.float32)}, ["image", "float32", "uint8"]),
        ({"video": np.zeros((32, 64, 64, 3), np.uint8)}, ["video", "32 frames", "at least 33"]),
        ({"guidance_scale": 5.0}, ["guidance_scale", "5.0", "distilled"]),
        ({"negative_prompt": "grey"}, ["negative_prompt", "guidance_scale"]),
        ({"prompts": [PromptAt(9.0, "late")]}, ["prompts", "9.0", "less than seconds"]),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(
    helios: Helios, files: Path, inputs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        helios.stream("a sun", seconds=1, **SMALL, **inputs)
    assert all(word in str(caught.value) for word in words), str(caught.value)
