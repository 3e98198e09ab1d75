"""OpenAI's own client, 3.52.0, against the running service: three models, every call that it has for videos.

The client repeats what fails by itself; here it does not, so that every answer is seen.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Video
from PIL import Image
from ray import serve

from deployments.config import AppConfig
from deployments.rendering import APP_NAME
from deployments.service import run_service
from tests.core import media_files

pytestmark = pytest.mark.ray

PROMPT = "a red sun over a blue sea"
SIZE = "64x64"
CHUNK_SECONDS = 0.5  # of sampling, paced, of the model random-mid: so that its progress can be watched
STEPS = {"random": "1,1,1", "random-base": "2", "random-mid": "1,1,1"}

PICTURE = ("picture.png", media_files.image("PNG"), "image/png")
CLIP = ("clip.mp4", media_files.video(48), "video/mp4")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, key: tuple[str, Path], shared_ray: int) -> Iterator[str]:
    config = AppConfig(
        store=str(tmp_path_factory.mktemp("store")), port=shared_ray, testing=True, torch_threads=1
    ).override(
        keys=str(key[1]),
        models=[
            {"model": "random"},
            {"model": "random-base"},
            {"model": "random-mid", "sampler": {"min_chunk_seconds": CHUNK_SECONDS}},
        ],
    )
    with run_service(config) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str, key: tuple[str, Path]) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=key[0], max_retries=0, timeout=120) as client:
        yield client


def create(client: OpenAI, **wanted: Any) -> Video:
    """A small and quick video, unless `wanted` says otherwise."""
    extra = {"steps": STEPS[wanted.get("model", "random")], **wanted.pop("extra_body", {})}
    return client.videos.create(**{"prompt": PROMPT, "size": SIZE, "seconds": "1", **wanted}, extra_body=extra)


def content(client: OpenAI, video: Video) -> bytes:
    """The whole video: asked for at once, it is waited for."""
    return client.videos.download_content(video.id).content


def made(client: OpenAI, **wanted: Any) -> bytes:
    return content(client, create(client, **wanted))


def frames_of(data: bytes) -> list[tuple[int, int]]:
    with av.open(io.BytesIO(data)) as container:
        return [(frame.width, frame.height) for frame in container.decode(video=0)]


# The way of a video


def test_a_key_is_good_from_when_it_is_added_until_it_is_revoked(
    client: OpenAI, url: str, key: tuple[str, Path]
) -> None:
    """By the command line, while the service runs. Its owner sees nothing of the others' videos."""

    def keys(*arguments: str) -> str:
        helios = [sys.executable, "-m", "deployments.cli", "keys", *arguments, "--file", str(key[1])]
        return subprocess.run(helios, check=True, capture_output=True, text=True).stdout.strip()

    video = create(client)
    token = keys("add", "--owner", "other")
    (key_id,) = [line.split()[0] for line in keys("list").splitlines() if " other " in line]
    with OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0) as other:
        assert other.videos.list().data == []
        with pytest.raises(openai.NotFoundError):
            other.videos.retrieve(video.id)
        keys("revoke", key_id)
        with pytest.raises(openai.AuthenticationError) as error:
            other.videos.list()
    assert error.value.code == "unauthorized"
    assert client.videos.retrieve(video.id).id == video.id


def test_create_poll_retrieve_and_download(client: OpenAI, url: str, tmp_path: Path) -> None:
    created = client.videos.create(prompt=PROMPT, model="random", size="128x64", seconds="2")
    assert (created.object, created.status, created.model) == ("video", "queued", "random")
    assert (created.size, created.seconds, created.prompt) == ("128x64", "2", PROMPT)
    video = client.videos.poll(created.id)
    assert (video.id, video.status, video.progress, video.error) == (created.id, "completed", 100, None)
    assert video.completed_at is not None and video.completed_at >= video.created_at
    assert video.model_extra is not None and video.model_extra["frames"] == 48
    assert client.videos.retrieve(video.id) == video

    data = content(client, video)
    assert data == httpx.get(video.model_extra["share_url"]).content  # which needs no key
    assert data == client.videos.download_content(video.id, variant="video").content
    assert frames_of(data) == 48 * [(128, 64)]
    with client.videos.with_streaming_response.download_content(video.id) as response:
        response.stream_to_file(tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").read_bytes() == data

    thumbnail = client.videos.download_content(video.id, variant="thumbnail")
    with Image.open(io.BytesIO(thumbnail.content)) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("JPEG", (128, 64))


def test_create_and_poll(client: OpenAI) -> None:
    video = client.videos.create_and_poll(
        prompt=PROMPT,
        size=SIZE,
        seconds="1",
        extra_body={"steps": [1, 1, 1], "seed": 3},  # type: ignore[arg-type]
    )
    assert (video.status, video.progress) == ("completed", 100)
    assert content(client, video) == made(client, extra_body={"seed": 3})


def test_the_service_says_how_soon_to_ask_again(client: OpenAI) -> None:
    answer = client.videos.with_raw_response.create(prompt=PROMPT, size=SIZE, seconds="1")
    asked = client.videos.with_raw_response.retrieve(answer.parse().id)
    assert int(answer.headers["openai-poll-after-ms"]) == int(asked.headers["openai-poll-after-ms"]) <= 1000
    content(client, answer.parse())


def test_progress_moves_chunk_by_chunk(client: OpenAI) -> None:
    video = create(client, model="random-mid", seconds=str(5 * 33 / 24), extra_body={"guidance_scale": 1})
    seen = [(video.status, video.progress)]
    while video.status in ("queued", "in_progress"):
        video = client.videos.retrieve(video.id)
        if seen[-1] != (video.status, video.progress):
            seen.append((video.status, video.progress))
    assert seen[0] == ("queued", 0) and seen[-1] == ("completed", 100)
    assert [progress for _, progress in seen] == sorted(progress for _, progress in seen)
    made_so_far = {progress for status, progress in seen if status == "in_progress"}
    assert made_so_far <= {0, 20, 40, 60, 80, 100} and len(made_so_far) >= 3, seen


def test_a_video_that_fails(client: OpenAI) -> None:
    """Its upload begins and ends well, which is all that is looked at before it is accepted."""
    broken = ("clip.webm", media_files.changing_size(back=True), "video/webm")
    video = client.videos.poll(create(client, input_reference=broken).id)
    assert video.status == "failed" and video.error is not None
    assert video.error.code == "invalid_input"
    assert (
        "changes from 96x64 to 64x96" in video.error.message and "allowed: a video of one size" in video.error.message
    )
    with pytest.raises(openai.ConflictError) as refused:
        client.videos.download_content(video.id)
    assert refused.value.code == "video_failed" and "changes from 96x64" in refused.value.message
    assert client.videos.delete(video.id).deleted is True


def test_a_deleted_video_is_gone(client: OpenAI) -> None:
    video = create(client)
    answer = client.videos.delete(video.id)
    assert (answer.id, answer.deleted, answer.object) == (video.id, True, "video.deleted")
    for gone in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError, match=video.id):
            gone(video.id)
    assert video.id not in [other.id for other in client.videos.list(limit=100)]


def test_lists(client: OpenAI) -> None:
    ids = [create(client).id for _ in range(5)]
    newest = client.videos.list(limit=2)
    assert [video.id for video in newest.data] == ids[:2:-1]
    assert newest.has_more and newest.has_next_page()
    assert [video.id for video in newest.get_next_page().data] == ids[2:0:-1]
    assert [video.id for video in client.videos.list(after=ids[1], order="asc")] == ids[2:]
    everything = [video.id for video in client.videos.list(limit=2)]  # page by page
    assert everything[:5] == ids[::-1] and len(set(everything)) == len(everything)
    assert everything == [video.id for video in client.videos.list(limit=2, order="asc")][::-1]
    assert not client.videos.list(limit=100).has_more


# Videos from videos


def test_remix(client: OpenAI) -> None:
    source = create(client, extra_body={"seed": 5})
    content(client, source)
    remixed = client.videos.remix(source.id, prompt="a grey moon")
    assert (remixed.remixed_from_video_id, remixed.prompt, remixed.size) == (source.id, "a grey moon", SIZE)
    assert content(client, remixed) == made(client, prompt="a grey moon", extra_body={"seed": 5})


def test_edit_and_extend(client: OpenAI) -> None:
    """Both go on from a file, or from a video of the service; the client itself has no way to name one."""
    settings: dict[str, Any] = {"size": SIZE, "steps": [1, 1, 1]}
    edited = client.videos.edit(prompt=PROMPT, video=CLIP, extra_body=settings)
    extended = client.videos.extend(prompt=PROMPT, video=CLIP, seconds="1", extra_body=settings)  # type: ignore[arg-type]
    assert edited.model_extra is not None and edited.model_extra["task"] == "video-to-video"
    assert (edited.seconds, extended.seconds) == ("2", "1")
    whole, shorter = content(client, edited), content(client, extended)
    assert (len(frames_of(whole)), len(frames_of(shorter))) == (48, 24)
    assert shorter == made(client, input_reference=CLIP)

    by_id = client.post("/videos/edits", cast_to=Video, body={"prompt": PROMPT, "video": {"id": edited.id}, **settings})
    by_file = client.videos.edit(prompt=PROMPT, video=("again.mp4", whole), extra_body=settings)
    assert content(client, by_id) == content(client, by_file) != whole


# Fields that the client does not know


def test_extra_fields_as_text_and_as_lists(client: OpenAI) -> None:
    """The client sends a form, in which it flattens lists and objects into names with brackets."""
    prompts = [
        {"at_seconds": 1, "prompt": "a storm", "transition_chunks": 3},
        {"at_seconds": 3, "prompt": "a calm night", "transition_chunks": 1},
    ]
    flattened = {"steps": [1, 1, 1], "prompts": prompts, "seed": 7, "amplify_first_chunk": False}
    as_text = {"steps": "1,1,1", "prompts": json.dumps(prompts), "seed": "7", "amplify_first_chunk": "false"}
    videos = [create(client, seconds="5", extra_body=extra) for extra in (flattened, as_text)]
    for video in videos:
        extra = video.model_extra
        assert extra is not None
        assert (extra["steps"], extra["seed"], extra["amplify_first_chunk"]) == ([1, 1, 1], 7, False)
        assert [(at["chunk"], at["prompt"], at["transition_chunks"]) for at in extra["prompts"]] == [
            (1, "a storm", 3), (3, "a calm night", 1),
        ]  # fmt: skip
    one, other = (content(client, video) for video in videos)
    assert one == other != made(client, seconds="5", extra_body={**flattened, "prompts": prompts[:1]})


def test_guidance_and_negative_prompt(client: OpenAI) -> None:
    def wanted(**extra: object) -> bytes:
        return made(client, model="random-base", extra_body={"guidance_scale": 3, **extra})

    assert wanted() == wanted(negative_prompt="") != wanted(negative_prompt="blurry")
    assert wanted() != made(client, model="random-base", extra_body={"guidance_scale": 1})


# Refusals

# name ▸ (what is wrong, the field, words that the message must hold: the value and what is allowed)
UNPROCESSABLE: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "size": ({"size": "100x100"}, "size", ["100x100", "multiples of 64", "nearest: 128x128"]),
    "seconds": ({"seconds": "601"}, "seconds", ["601", "to 600"]),
    "prompt": ({"prompt": " "}, "prompt", ["' '", "not empty"]),
    "guidance of a distilled model": (
        {"extra_body": {"guidance_scale": 5}}, "guidance_scale", ["5", "allowed: 1", "distilled"],
    ),
    "steps of a base model": (
        {"model": "random-base", "extra_body": {"steps": [1, 1, 1]}}, "steps", ["[1, 1, 1]", "1 whole number", "base"],
    ),
    "steps in words": ({"extra_body": {"steps": "few"}}, "steps", ["few", "a list of whole numbers"]),
    "steps of a mid model": (
        {"model": "random-mid", "extra_body": {"steps": "2"}}, "steps", ["[2]", "3 whole numbers", "mid"],
    ),
    "prompts too late": (
        {"extra_body": {"prompts": [{"at_seconds": 3, "prompt": "a storm"}]}}, "prompts", ["3", "less than seconds 1"],
    ),
    "prompts without a time": ({"extra_body": {"prompts": [{"prompt": "a storm"}]}}, "prompts", ["at_seconds"]),
    "a URL": (
        {"extra_body": {"input_reference": {"image_url": "https://example.com/a.png"}}},
        "input_reference", ["https://example.com/a.png", "as a file", "URLs are not fetched"],
    ),
    "another server's field": ({"extra_body": {"num_frames": 33}}, "num_frames", ["33", "seconds"]),
    "an unknown field": ({"extra_body": {"colour": "red"}}, "colour", ["red", "prompt"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPROCESSABLE)
def test_a_refused_video(client: OpenAI, name: str) -> None:
    wanted, field, words = UNPROCESSABLE[name]
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        create(client, **wanted)
    error = refused.value
    assert (error.param, error.code, error.type) == (field, "invalid_input", "invalid_request_error")
    assert error.message.startswith(f"Error code: 422 - {field} is ") or error.message.startswith(f"{field} is ")
    assert all(word in error.message for word in words), error.message


def test_models(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["random", "random-base", "random-mid"]
    for model_id, model in models.items():
        assert client.models.retrieve(model_id) == model
        assert model.model_extra is not None
        assert model.model_extra["tasks"] == ["text-to-video", "image-to-video", "video-to-video"]
    for ask in (lambda: client.models.retrieve("sora-2"), lambda: client.videos.create(prompt="a", model="sora-2")):
        with pytest.raises(
            openai.NotFoundError, match="model is 'sora-2'; served: random, random-base, random-mid"
        ) as missing:
            ask()
        assert (missing.value.param, missing.value.code) == ("model", "model_not_found")


# What a video begins with


@pytest.mark.parametrize("model", STEPS)
def test_text_image_and_video_to_video(client: OpenAI, model: str) -> None:
    """Each makes a difference, and each is made the same way again."""
    inputs: dict[str, dict[str, Any]] = {
        "text-to-video": {},
        "image-to-video": {"input_reference": PICTURE},
        "video-to-video": {"input_reference": CLIP},
    }
    videos = {task: create(client, model=model, seconds="2", **extra) for task, extra in inputs.items()}
    again = [create(client, model=model, seconds="2", **extra) for extra in inputs.values()]
    assert all(video.model_extra is not None and video.model_extra["task"] == task for task, video in videos.items())
    data = [content(client, video) for video in videos.values()]
    assert [frames_of(one) for one in data] == 3 * [48 * [(64, 64)]]
    assert len(set(data)) == 3
    assert [content(client, video) for video in again] == data


def test_models_share_what_is_equal(client: OpenAI) -> None:
    """The three differ in their transformers alone."""
    replicas = {name: d.replica_states for name, d in serve.status().applications[APP_NAME].deployments.items()}
    shared = ["Ingress", "Director", "TextEncoder", "VaeDecoder"]
    assert replicas == {name: {"RUNNING": 1} for name in [*shared, *(f"Sampler-{model}" for model in STEPS)]}
