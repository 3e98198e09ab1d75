"""What a replica does when a call gives nothing sound: one that is itself sound says so, another one ends itself."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from deployments import sampler, text_encoder, vae_decoder
from deployments.config import AppConfig
from deployments.records import SampleReport
from deployments.sampler import Sampler
from deployments.store import Store
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from deployments.watchdog import Overdue
from helios_core.checkpoints import Checkpoint
from helios_core.errors import CheckpointError, NotFinite, OutOfMemory
from helios_core.state import StreamState
from helios_core.text import TextEmbeddings
from helios_core.weights import golden_frames, golden_latents, load_sampler, load_vae, placement
from tests.deployments.test_sampler import SPEC, call

TOO_MUCH = 1 << 60  # bytes, more than a process has addresses for


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(status: int) -> NoReturn:
        raise Ended(status)

    monkeypatch.setattr("os._exit", end)


@pytest.fixture(autouse=True)
def weights_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests of a process share them."""
    for module, name in ((sampler, "load_sampler"), (vae_decoder, "load_vae"), (text_encoder, "load_text_encoder")):
        load = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, load=load: copy.deepcopy(load(*args)))


class Parts:
    """The three replicas, and what each makes of good inputs."""

    def __init__(self, folder: Path) -> None:
        config = AppConfig(store=str(folder)).with_model("random")
        self.text_encoder = TextEncoder(config, "random")
        self.sampler = Sampler(config, config.models[0].sampler, "random")
        self.vae_decoder = VaeDecoder(config, "random")
        self.store = Store(config.store)
        self.weights: dict[str, Any] = {
            "text_encoder": self.text_encoder._encoder.model,
            "sampler": self.sampler._sampler.model,
            "vae_decoder": self.vae_decoder._vae,
        }

    async def make(self, part: str) -> Any:
        text, _ = [item async for item in self.text_encoder.encode(call(), SPEC.prompt)]
        if part == "text_encoder":
            return text.rows
        state = await self.sampled(text)
        if part == "sampler":
            return state.latents
        return await self.rendered(state)

    async def sampled(self, text: TextEmbeddings) -> StreamState:
        after, _ = [item async for item in self.sampler.sample_chunk(call(), SPEC, 0, (1.0,), None, text)]
        assert isinstance(after, StreamState)
        return after

    async def rendered(self, state: StreamState) -> bytes:
        video, report = call(), SampleReport(steps=1, started_at=0.0, seconds=0.0)
        rendered = await self.vae_decoder.render_chunk(video, SPEC, 1, state, report)
        return await self.store.read(rendered.chunk.fragment.key)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


PARTS = pytest.mark.parametrize("part", ["text_encoder", "sampler", "vae_decoder"])


def spoil(weights: torch.nn.Module) -> None:
    """As a fault of the memory might."""
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.flatten()[0] = torch.nan


@PARTS
async def test_a_replica_whose_weights_went_bad_ends_itself(
    parts: Parts, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(parts.weights[part])
    with pytest.raises(Ended, match="70"):
        await parts.make(part)
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert part in told and "not finite" in told and "the golden result cannot be made" in told


@PARTS
async def test_a_replica_that_computes_something_else_ends_itself_when_anything_fails(
    parts: Parts, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights are others than they were, and everything is finite."""
    with torch.no_grad():
        for parameter in parts.weights[part].parameters():
            parameter *= 0.8
    with pytest.raises(Ended, match="70"):
        getattr(parts, part)._golden.guard(lambda: torch.zeros(-1))
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert part in told and "the golden result differs by" in told


@PARTS
async def test_a_golden_result_that_does_not_come_any_more_is_noticed(parts: Parts, part: str) -> None:
    """As of a GPU that hangs after a failure."""
    replica, begun, end = getattr(parts, part), threading.Event(), threading.Event()

    def hangs() -> NoReturn:
        begun.set()
        end.wait()
        raise RuntimeError("CUDA error: the launch timed out")

    replica._golden._make = hangs
    spoil(parts.weights[part])
    making = asyncio.ensure_future(parts.make(part))
    await asyncio.to_thread(begun.wait)
    replica.check_health()
    replica._watchdog._clock = lambda: time.monotonic() + 3600
    with pytest.raises(Overdue):
        replica.check_health()
    end.set()
    with pytest.raises(Ended):
        await making


async def test_bad_inputs_are_not_the_replicas_fault(parts: Parts) -> None:
    text, _ = [item async for item in parts.text_encoder.encode(call(), SPEC.prompt)]
    good = await parts.sampled(text)
    with pytest.raises(NotFinite, match="latents of chunk 0"):
        await parts.sampled(TextEmbeddings.of(torch.full_like(text.rows, torch.nan)))
    with pytest.raises(NotFinite, match="frames"):
        await parts.rendered(StreamState(1, torch.full_like(good.history, torch.inf), None, good.generator_state))
    assert (await parts.sampled(text)).to_bytes() == good.to_bytes()
    stored = [item.kind for each in await parts.store.video_ids() for item in await parts.store.objects(each)]
    assert stored == ["text"]  # and nothing of the chunk whose frames are not sound


@PARTS
@pytest.mark.parametrize("how", [lambda: torch.empty(TOO_MUCH), lambda: bytearray(TOO_MUCH)], ids=["torch", "python"])
async def test_a_replica_without_room_for_a_call_says_so_and_goes_on(
    parts: Parts, part: str, how: Callable[[], object]
) -> None:
    """The very errors of torch's allocator and of Python's, in the midst of the work."""
    good = await parts.make(part)
    once = iter([how])
    for module in parts.weights[part].modules():
        module.register_forward_pre_hook(lambda *_: next(once, lambda: None)() and None)
    with pytest.raises(OutOfMemory, match=part):
        await parts.make(part)
    again = await parts.make(part)
    assert torch.equal(again, good) if isinstance(good, torch.Tensor) else again == good


async def test_what_no_one_foresaw_ends_only_a_replica_that_is_not_sound_any_more(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a GPU, of which every call fails after the first that did."""
    text, _ = [item async for item in parts.text_encoder.encode(call(), SPEC.prompt)]
    failures = iter([True])

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return sample(*args, **kwargs)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    sample = parts.sampler._sampler.sample
    monkeypatch.setattr(parts.sampler._sampler, "sample", fails_once)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        await parts.sampled(text)
    await parts.sampled(text)
    monkeypatch.setattr(parts.sampler._sampler, "sample", fails)
    with pytest.raises(Ended):
        await parts.sampled(text)


@pytest.mark.parametrize("model", ["demo", "random", "random-mid", "random-base"])
def test_every_model_has_a_golden_result(model: str) -> None:
    """The same each time, and not nothing."""
    checkpoint, (device, dtype) = Checkpoint.open(model), placement("cpu")
    sampler, vae = load_sampler(checkpoint, device, dtype), load_vae(checkpoint, device)
    for make in (partial(golden_latents, checkpoint, sampler), partial(golden_frames, checkpoint, vae)):
        assert torch.equal(made := make(), make()) and made.float().std() > 0


async def test_a_replica_that_is_spoilt_from_the_beginning_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AppConfig(store=str(tmp_path)).with_model("random")
    parts = Parts(tmp_path / "other")
    for weights in parts.weights.values():
        spoil(weights)
    monkeypatch.setattr(sampler, "load_sampler", lambda *_: parts.sampler._sampler)
    monkeypatch.setattr(vae_decoder, "load_vae", lambda *_: parts.vae_decoder._vae)
    with pytest.raises(NotFinite):
        Sampler(config, config.models[0].sampler, "random")
    with pytest.raises(NotFinite):
        VaeDecoder(config, "random")
    with pytest.raises(CheckpointError, match="not finite"):
        type(parts.text_encoder._encoder)(parts.text_encoder._encoder.tokenizer, parts.text_encoder._encoder.model)
