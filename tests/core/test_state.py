"""A state is all that a video in flight remembers: it goes on anywhere, bit for bit, and stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from helios_core.config import VaeConfig
from helios_core.helios import Helios
from helios_core.spec import VideoSpec
from helios_core.state import BadState, StreamState

ROOT = Path(__file__).parents[2]
VAE = VaeConfig()
PROMPT, STEPS = "a red sun over a blue sea", (1, 1, 1)


def start(seed: int = 42) -> StreamState:
    spec = VideoSpec(PROMPT, "random", 128, 64, seconds=4, seed=seed, steps=STEPS, amplify_first_chunk=False)
    return StreamState.start(spec, VAE)


def chunk(number: int) -> torch.Tensor:
    """The latents of a chunk whose frames hold 9 * number, 9 * number + 1, …"""
    frames = torch.arange(9.0) + 9 * number
    return frames.view(1, 1, 9, 1, 1).expand(1, VAE.z_dim, 9, 8, 16)


def after_chunks(count: int) -> StreamState:
    state = start()
    for k in range(count):
        generator = state.generator()
        torch.randn(3, generator=generator)
        state = state.after(chunk(k + 1), generator)
    return state


def assert_equal(a: StreamState, b: StreamState) -> None:
    assert a.chunk_index == b.chunk_index
    assert torch.equal(a.history, b.history)
    assert torch.equal(a.generator_state, b.generator_state)
    assert (a.anchor is None) == (b.anchor is None)
    assert a.anchor is None or torch.equal(a.anchor, b.anchor)


@pytest.fixture(scope="module")
def helios() -> Helios:
    return Helios.load("random", device="cpu", threads=1)


def test_start_is_empty_and_as_large_as_the_video() -> None:
    state = start()
    assert (state.chunk_index, state.anchor) == (0, None)
    assert state.history.shape == (1, 16, 19, 8, 16)
    assert state.history.dtype == torch.float32
    assert not state.history.any()


def test_the_seed_alone_decides_the_start() -> None:
    assert_equal(start(7), start(7))
    states = {bytes(start(seed).generator_state.numpy()) for seed in (0, 1, 7, 2**32, 2**32 + 1, 2**63 - 1)}
    assert len(states) == 6


def test_history_holds_the_newest_19_latent_frames() -> None:
    held = [after_chunks(k).history[0, 0, :, 0, 0].tolist() for k in range(4)]
    assert held[0] == [0.0] * 19
    assert held[1] == [*[0.0] * 10, *range(9, 18)]
    assert held[2] == [0.0, *range(9, 27)]
    assert held[3] == list(range(17, 36))
    assert torch.equal(after_chunks(3).latents, chunk(3))


def test_the_anchor_is_the_first_latent_frame_for_ever() -> None:
    for count in (1, 2, 3):
        state = after_chunks(count)
        assert state.chunk_index == count
        assert torch.equal(state.anchor, chunk(1)[:, :, :1])


def test_after_leaves_the_state_before_as_it_was() -> None:
    state, generator = after_chunks(1), after_chunks(1).generator()
    torch.randn(100, generator=generator)
    state.after(chunk(2), generator)
    assert_equal(state, after_chunks(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_of_any_dtype_are_kept_in_fp32(dtype: torch.dtype) -> None:
    state = start().after(chunk(1).to(dtype), start().generator())
    assert state.history.dtype == state.anchor.dtype == torch.float32
    assert torch.equal(state.latents, chunk(1))


def test_a_state_keeps_no_older_tensor_alive() -> None:
    """A view would hold on to the concatenation, or to the caller's latents, and a long video would grow."""
    latents = torch.randn(1, VAE.z_dim, 9, 8, 16)
    state = after_chunks(3).after(latents, start().generator())
    for tensor in (state.history, state.anchor, start().after(latents, start().generator()).anchor):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
    latents.zero_()
    assert state.latents.any()


def test_a_state_does_not_grow_with_the_video() -> None:
    sizes = [len(after_chunks(count).to_bytes()) for count in (1, 2, 5, 9)]
    tensors = 4 * 16 * (19 + 1) * 8 * 16 + 5056
    assert len(set(sizes)) == 1
    assert tensors < sizes[0] < tensors + 1024


@pytest.mark.parametrize("count", [0, 1, 3])
def test_bytes_bring_the_state_back_bit_for_bit(count: int) -> None:
    state = after_chunks(count)
    copy = StreamState.from_bytes(state.to_bytes())
    assert_equal(copy, state)
    assert torch.equal(torch.randn(64, generator=copy.generator()), torch.randn(64, generator=state.generator()))


GO_ON = """
import sys
from pathlib import Path
from helios_core.helios import Helios
from helios_core.state import StreamState

helios = Helios.load("random", device="cpu", threads=1)
state = StreamState.from_bytes(Path(sys.argv[1]).read_bytes())
after = helios.sampler.sample(helios.text_encoder.encode(sys.argv[2]), state, (1, 1, 1))
Path(sys.argv[3]).write_bytes(after.to_bytes())
"""


def test_another_process_goes_on_bit_for_bit(helios: Helios, tmp_path: Path) -> None:
    text = helios.text_encoder.encode(PROMPT)
    first = helios.sampler.sample(text, start(), STEPS)
    second = helios.sampler.sample(text, first, STEPS)
    saved, result = tmp_path / "first", tmp_path / "second"
    saved.write_bytes(first.to_bytes())
    subprocess.run([sys.executable, "-c", GO_ON, saved, PROMPT, result], cwd=ROOT, check=True)
    assert_equal(StreamState.from_bytes(result.read_bytes()), second)
    assert not torch.equal(second.latents, first.latents)


GOOD = after_chunks(1).to_bytes()
PARTS = safetensors.torch.load(GOOD)
FORMAT = {"format": "helios-stream-state-1"}


def without(part: str) -> bytes:
    return safetensors.torch.save({name: tensor for name, tensor in PARTS.items() if name != part}, FORMAT)


# bytes that are no state ▸ words that the error must hold
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are not a stream state"),
    "text": (b"not a state at all", "18 bytes are not a stream state"),
    "without its end": (GOOD[:-1], f"{len(GOOD) - 1} bytes are not a stream state"),
    "cut in its header": (GOOD[:100], "100 bytes are not a stream state"),
    "with bytes at its end": (GOOD + b"\0", "are not a stream state"),
    "of another version": (GOOD.replace(b"state-1", b"state-2"), "'helios-stream-state-2'; supported: 'helios-stream"),
    "a file without metadata": (safetensors.torch.save(PARTS), "format of the state is None"),
    "without a chunk index": (without("chunk_index"), "incomplete.*chunk_index"),
    "without history": (without("history"), "incomplete.*history"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bytes_are_refused(name: str) -> None:
    data, words = BROKEN[name]
    with pytest.raises(BadState, match=words):
        StreamState.from_bytes(data)


def test_equal_states_have_equal_bytes() -> None:
    assert StreamState.from_bytes(GOOD).to_bytes() == GOOD


def test_a_state_cut_anywhere_is_refused() -> None:
    for length in [*range(600), *range(600, len(GOOD), 5001)]:
        with pytest.raises(BadState):
            StreamState.from_bytes(GOOD[:length])
