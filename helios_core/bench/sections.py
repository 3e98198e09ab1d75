"""What is measured of a subject. Each section is a function that yields its rows.

Shapes: B batch, N heads, L tokens, H channels of a head; M rows of a matrix product, K channels in, D out.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helios_core.bench.measure import Clock, Rates, Times, Work, gpu_states
from helios_core.bench.report import Row
from helios_core.bench.subject import Subject, shown
from helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS
from helios_core.sampling.chunk import ChunkSampler
from helios_core.transformer.model import ChunkContext
from helios_core.vae.latents import decode_chunk, denormalise, to_i420

KIB, GIB = 2**10, 2**30

T = TypeVar("T")


@dataclass
class Bench:
    """What every section is given. `rates`: of the machine, by kind of operation, from `ceilings` on; `chunks`: how
    many the sustained section makes in a row."""

    subject: Subject
    clock: Clock
    chunks: int
    rates: Rates = field(default_factory=dict)

    def row(self, what: str, times: Times, work: Work | None, **figures: object) -> Row:
        """A row that tells how near it is to the machine's rates, if these were measured and the work is known."""
        if work is None:
            return Row(what, times, figures=figures)
        floor = sum(n / self.rates[kind] for kind, n in work.items()) if self.rates else None
        return Row(what, times, sum(work.values()), floor, figures)


Section = Callable[[Bench], Iterator[Row]]


def ceilings(bench: Bench) -> Iterator[Row]:
    """The machine's own rates: of the transformer's matrix products and attention at its three lengths, of a matrix
    product in the VAE's precision, and of memory. The best of each is what shares are shares of."""
    subject, clock = bench.subject, bench.clock
    config, vae = subject.model.transformer.config, subject.model.vae
    dim, dtype, device = config.hidden_dim, subject.model.transformer.dtype, subject.device
    in_a_row = 20 if clock.on_gpu else 1
    rates: dict[str, list[float]] = {"linear": [], "attention": [], "vae": []}

    def rated(kind: str, what: str, work: int, call: Callable[[], object]) -> Row:
        times = clock.time(call, in_a_row)
        rates[kind].append(work / times.median)
        return Row(what, times, work)

    def product(kind: str, m: int, k: int, d: int, dtype: torch.dtype) -> Row:
        x_MK, weight_DK = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, d))
        name = str(dtype).removeprefix("torch.")
        return rated(kind, f"product {m} x {k} x {d}, {name}", 2 * m * k * d, lambda: F.linear(x_MK, weight_DK))

    for length in subject.lengths:
        for k, d in ((dim, dim), (dim, config.ffn_dim), (config.ffn_dim, dim)):
            yield product("linear", length, k, d, dtype)
    for length in subject.lengths:
        shape = (1, config.num_attention_heads, length, config.attention_head_dim)
        q_BNLH, k_BNLH, v_BNLH = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
        attend = partial(F.scaled_dot_product_attention, q_BNLH, k_BNLH, v_BNLH)
        for name, backend in _attention_backends(clock.on_gpu).items():
            what = f"attention over {length}, {name}"
            with backend:
                try:
                    yield rated("attention", what, 4 * length**2 * dim, attend)
                except RuntimeError as error:
                    yield Row(what, figures={"not available": str(error).splitlines()[0]})
    with _products_as_convolutions():
        yield product("vae", subject.lengths[-1], dim, dim, vae.decoder_dtype)
    source = torch.randn((GIB if clock.on_gpu else GIB // 8) // 4, device=device)
    target = torch.empty_like(source)
    times = clock.time(lambda: torch.mul(source, 0.5, out=target))
    yield Row("elementwise, read and written", times, figures={"GB/s": 2 * 4 * len(source) / times.median / 1e9})
    bench.rates = {kind: max(each) for kind, each in rates.items()}
    yield Row("best", figures={f"{kind} TFLOP/s": rate / 1e12 for kind, rate in bench.rates.items()})


def _attention_backends(on_gpu: bool) -> dict[str, AbstractContextManager[None]]:
    """Those worth trying. A GPU or a precision may lack one of them, but not what torch chooses."""
    backends: dict[str, AbstractContextManager[None]] = {"torch's choice": nullcontext()}
    if on_gpu:
        backends["cuDNN"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        backends["flash"] = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return backends


@contextmanager
def _products_as_convolutions() -> Iterator[None]:
    """Products in fp32 may take TF32 where convolutions may: what the VAE's consist of."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.inference_mode()
def text(bench: Bench) -> Iterator[Row]:
    subject = bench.subject
    prompt = next(subject.prompts()).padded().to(subject.device)
    times = bench.clock.time(partial(subject.model.transformer.text_context, prompt))
    yield bench.row("keys and values of a prompt", times, subject.work["text"])


@torch.inference_mode()
def begin(bench: Bench) -> Iterator[Row]:
    """What a chunk's steps have in common: its past, embedded."""
    subject = bench.subject
    times = bench.clock.time(_begun(subject))
    yield bench.row("begin_chunk", times, subject.work["begin"])


@torch.inference_mode()
def stages(bench: Bench) -> Iterator[Row]:
    """One step of the transformer at the size of each stage."""
    subject = bench.subject
    transformer, context = subject.model.transformer, _begun(subject)()
    sizes = zip(subject.stage_sizes, subject.clocks, subject.lengths, strict=True)
    for i, (size, timestep, length) in enumerate(sizes, 1):
        latents = torch.randn(1, transformer.config.in_channels, CHUNK_LATENTS, *size, device=subject.device)
        times = bench.clock.time(partial(transformer, latents, timestep, context))
        yield bench.row(f"a step of stage {i}, {length} tokens", times, subject.work[f"stage {i}"])


def _begun(subject: Subject) -> Callable[[], ChunkContext]:
    """Begins the chunk after `subject.state()`."""
    transformer, state, device = subject.model.transformer, subject.state(), subject.device
    context = transformer.text_context(next(subject.prompts()).padded().to(device))
    assert state.anchor is not None
    return partial(transformer.begin_chunk, state.anchor.to(device), state.history.to(device), context)


@torch.inference_mode()
def vae(bench: Bench) -> Iterator[Row]:
    """A chunk's 9 latents and 33 frames, both ways."""
    subject = bench.subject
    model = subject.model.vae
    times = bench.clock.time(partial(decode_chunk, model, subject.state().latents, to_i420))
    yield bench.row("a chunk decoded", times, subject.work["decode"], fps=CHUNK_FRAMES / times.median)
    times = bench.clock.time(partial(model.encode, subject.frames()))
    yield bench.row("a chunk encoded", times, subject.work["encode"])


def chunks(bench: Bench) -> Iterator[Row]:
    """Whole chunks of a video that has gone on for some time, not amplified, from the text's embeddings on: latents in
    the host's memory, then frames too. A first frame is that of a prompt that the sampler has not seen."""
    for label, sampler, steps in bench.subject.ways():
        yield from _chunks(bench, label, sampler, steps)


def _chunks(bench: Bench, label: str, sampler: ChunkSampler, steps: tuple[int, ...]) -> Iterator[Row]:
    subject, time = bench.subject, bench.clock.time
    vae, state, prompts = subject.model.vae, subject.state(), subject.prompts()
    prompt = next(prompts)
    sample = partial(sampler.sample, prompt, state, steps)

    @torch.inference_mode()
    def first_frame() -> Tensor:
        latents = sampler.sample(next(prompts), state, steps).latents.to(vae.device, vae.decoder_dtype)
        return to_i420(next(vae.decode_frames(denormalise(latents, vae.config)))).cpu()

    exact = subject.model.sampler.sample(prompt, state, steps).latents
    made = sample().latents
    figures: dict[str, object] = {}
    work: Work | None = subject.sampling(steps)
    if sampler.model is not subject.model.transformer or sampler.history_refresh != "step":
        work = None  # it does less, or does it in less precision
        figures["off exact latents by"] = float((made - exact).norm() / exact.norm())
    else:
        figures["the same twice"] = torch.equal(made, exact)
    times = time(sample)
    yield bench.row(f"{label}: sampled", times, work, fps=CHUNK_FRAMES / times.median, **figures)
    times = time(lambda: decode_chunk(vae, sample().latents, to_i420))
    work = None if work is None else work + subject.work["decode"]
    yield bench.row(f"{label}: sampled and decoded", times, work, fps=CHUNK_FRAMES / times.median)
    yield Row(f"{label}: first frame of a new prompt", time(first_frame))


def sustained(bench: Bench) -> Iterator[Row]:
    """A video in one go, sampled exactly and decoded in turn: does it get slower as the machine gets warm?"""
    for steps in bench.subject.steps:
        yield _sustained(bench, steps)


def _sustained(bench: Bench, steps: tuple[int, ...]) -> Row:
    subject = bench.subject
    sampler = subject.model.sampler
    prompt, state = next(subject.prompts()), subject.state()

    def chunk() -> None:
        nonlocal state
        state = sampler.sample(prompt, state, steps)
        decode_chunk(subject.model.vae, state.latents, to_i420)

    chunk()
    with gpu_states(subject.device) as gpu:
        times = Times(tuple(bench.clock.once(chunk) for _ in range(bench.chunks)))
    figures = {"latents' deviation": float(state.latents.std())}  # far from 1: they ran away
    for when, of in (("first", _first_third), ("last", _last_third)):
        figures[f"fps in the {when} third"] = CHUNK_FRAMES / mean(of(times.seconds))
        if gpu:
            figures[f"MHz in the {when} third"] = mean(each.clock for each in of(gpu))
            figures[f"W in the {when} third"] = mean(each.power for each in of(gpu))
            figures[f"°C in the {when} third"] = mean(each.temperature for each in of(gpu))
    work = subject.sampling(steps) + subject.work["decode"]
    return bench.row(f"{shown(steps)}: {bench.chunks} chunks", times, work, **figures)


def _first_third(values: Sequence[T]) -> Sequence[T]:
    return values[: max(1, len(values) // 3)]


def _last_third(values: Sequence[T]) -> Sequence[T]:
    return values[-max(1, len(values) // 3) :]


def memory(bench: Bench) -> Iterator[Row]:
    """GiB of weights, and at the most while a chunk is sampled, then decoded: of the GPU's memory what torch allocates
    for it beside all that lies there, of the host's what the whole process has ever had."""
    subject = bench.subject
    model, state, prompt = subject.model, subject.state(), next(subject.prompts())
    for what, module in (("transformer", model.transformer), ("VAE", model.vae)):
        size = sum(each.numel() * each.element_size() for each in module.parameters())
        yield Row(f"weights of the {what}", figures={"GiB": size / GIB})
    if not bench.clock.on_gpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        yield Row("peak of the process", figures={"GiB": peak / GIB})
        return
    for name, sampler in subject.samplers.items():
        yield _peak(f"{name}: peak of a chunk sampled", partial(sampler.sample, prompt, state, subject.steps[0]))
    yield _peak("peak of a chunk decoded", partial(decode_chunk, model.vae, state.latents, to_i420))


def _peak(what: str, call: Callable[[], object]) -> Row:
    call()  # what it keeps, such as a text's keys and values, is no part of the peak
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return Row(what, figures={"GiB": (torch.cuda.max_memory_allocated() - before) / GIB})


SECTIONS: dict[str, Section] = {
    "ceilings": ceilings,
    "text": text,
    "begin": begin,
    "stages": stages,
    "vae": vae,
    "chunks": chunks,
    "sustained": sustained,
    "memory": memory,
}
