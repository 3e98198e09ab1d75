"""One chunk, from state to state. The heart of Helios: everything else prepares its arguments or shows its result.

Shapes: B batch (always 1), C latent channels, T latent frames, h, w latent rows and columns.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from helios_core.config import CHUNK_LATENTS, HistoryRefresh, SchedulerConfig
from helios_core.sampling.guidance import Guidance
from helios_core.sampling.noise import block_noise, chunk_noise
from helios_core.sampling.schedule import Stage, Step, pyramid
from helios_core.sampling.solvers import Solver
from helios_core.state import StreamState
from helios_core.text import TextEmbeddings

TEXT_CONTEXTS = 4  # prompts, or pairs of a prompt and its negative one, whose keys and values a sampler keeps
RUN_AHEAD = 1  # steps that a GPU is given beyond the one it works at: it never idles, and a chunk can still be stopped
TOKEN_AREA = 4  # latent pixels per token: the transformer's patch is 1 x 2 x 2


class Denoiser(Protocol):
    """The transformer, as far as sampling knows it."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def text_context(self, text: Tensor) -> Any:
        """What depends on the prompts alone: text [B, 512, text_dim], embedded for every layer."""
        ...

    def begin_chunk(self, anchor: Tensor, history: Tensor, text: Any) -> Any:
        """What stays equal over a chunk's steps: anchor [1, C, 1, h, w] and history [1, C, 19, h, w], embedded."""
        ...

    def __call__(self, latents: Tensor, timestep: float, context: Any, past: list[Any] | None = None) -> Tensor:
        """The velocity at `latents` [1, C, T, h', w'] of any float dtype, for each text of `context`, in its dtype.

        `past`: if empty, it is filled with what this run makes of the history; if not, that is used again.
        """
        ...


# Called with the stage's index before each run of the transformer; it may raise to stop the chunk.
OnStep = Callable[[int], None]


class ChunkSampler:
    """A loaded transformer with its scheduler, solver and guidance: embeddings and a state go in, the next state
    comes out.

    Keeps nothing about a video; only the text contexts of the last prompts, by the digests of their embeddings
    (0.42 GB for each prompt of the 14B model, and as much for a negative one).
    """

    def __init__(
        self,
        model: Denoiser,
        scheduler: SchedulerConfig,
        solver: Solver,
        guidance: Guidance,
        history_refresh: HistoryRefresh = "step",
    ) -> None:
        self.model, self.scheduler, self.solver, self.guidance = model, scheduler, solver, guidance
        self.history_refresh = history_refresh
        self._contexts: OrderedDict[tuple[str, ...], Any] = OrderedDict()

    def sample(
        self,
        text: TextEmbeddings,
        state: StreamState,
        steps: tuple[int, ...],
        *,
        negative: TextEmbeddings | None = None,
        guidance_scale: float = 1.0,
        on_step: OnStep | None = None,
    ) -> StreamState:
        """The state after one more chunk; see `sample_chunk`.

        `negative` is needed for a `guidance_scale` above 1 (else ValueError), and without effect up to 1.
        """
        if guidance_scale <= 1:
            texts = [text]
        elif negative is not None:
            texts = [text, negative]
        else:
            raise ValueError(f"guidance_scale {guidance_scale} needs the embeddings of a negative prompt")
        return sample_chunk(
            self.model,
            self._text_context(texts),
            state,
            steps=steps,
            solver=self.solver,
            scheduler=self.scheduler,
            guidance=self.guidance,
            guidance_scale=guidance_scale,
            history_refresh=self.history_refresh,
            on_step=on_step,
        )

    def rehearse(self, text_dim: int, state: StreamState, guidance_scale: float) -> StreamState:
        """The state after a chunk of no text, in as few steps as there can be.

        On a GPU the kernels for all shapes of this size are there afterwards. Without it they are compiled and tuned
        while the first video waits: for seconds.
        """
        nothing = TextEmbeddings.of(torch.zeros(1, text_dim))
        steps = (1 + self.guidance.zero_steps, *[1] * (len(pyramid(self.scheduler)) - 1))
        after = self.sample(nothing, state, steps, negative=nothing, guidance_scale=guidance_scale)
        self._contexts.clear()
        return after

    @torch.inference_mode()
    def _text_context(self, texts: list[TextEmbeddings]) -> Any:
        key = tuple(text.digest for text in texts)
        if key not in self._contexts:
            if len(self._contexts) >= TEXT_CONTEXTS:
                self._contexts.popitem(last=False)
            padded = torch.cat([text.padded() for text in texts])
            self._contexts[key] = self.model.text_context(padded.to(self.model.device, self.model.dtype))
        self._contexts.move_to_end(key)
        return self._contexts[key]


@torch.inference_mode()
def sample_chunk(
    model: Denoiser,
    text: Any,
    state: StreamState,
    *,
    steps: tuple[int, ...],
    solver: Solver,
    scheduler: SchedulerConfig,
    guidance: Guidance,
    guidance_scale: float = 1.0,
    history_refresh: HistoryRefresh = "step",
    on_step: OnStep | None = None,
) -> StreamState:
    """The state after one more chunk. A pure function: the same arguments give the same state, on any replica.

    `text`: the model's text context, of the prompt, and for a `guidance_scale` above 1 also of the negative prompt,
    second; `steps`: the solver's steps per stage, coarse to fine; `history_refresh`: exact at each "step", or the
    history's keys and values of the first step of each "stage" or of the "chunk". Latents are solved on the model's
    device, in fp32 at first and then in the dtypes that `solver` gives, as the reference does. A GPU is waited for at
    the end only, and before a step for `on_step`'s sake (RUN_AHEAD). The chunk's own latents are `result.latents`.
    Raises ValueError for a stage without steps, NotFinite if the latents are not numbers in the end.
    """
    stages = pyramid(scheduler)
    if len(steps) != len(stages) or min(steps) < 1:
        raise ValueError(f"steps are {steps}; needed: at least one for each of {len(stages)} stages")
    generator = state.generator()
    _, c, _, h, w = state.history.shape
    anchor = torch.zeros_like(state.history[:, :, :1]) if state.anchor is None else state.anchor
    context = model.begin_chunk(_sent(anchor, model.device), _sent(state.history, model.device), text)
    past: list[Any] | None = None if history_refresh == "step" else []  # what is kept of the history
    ended: deque[torch.cuda.Event] = deque()  # told by the GPU after each step

    def velocity(stage: Stage, x: Tensor, step: Step) -> Tensor:
        if guidance_scale > 1 and stage.index == 0 and step.index < guidance.zero_steps:
            return torch.zeros_like(x, dtype=model.dtype)
        if on_step is not None:
            if len(ended) > RUN_AHEAD:
                ended.popleft().synchronize()
            on_step(stage.index)
        v = model(x, step.timestep, context, past)
        if model.device.type == "cuda":
            ended.append(torch.cuda.current_stream(model.device).record_event())
        return guidance.mix(v[:1], v[1:], guidance_scale) if guidance_scale > 1 else v

    noise = chunk_noise((1, c, CHUNK_LATENTS, h, w), generator)
    latents = _sent(noise, model.device)
    for _ in stages[1:]:
        latents = halve(latents)

    for stage in stages:
        # Counted before the upsampling, as in the reference, and so as in training: a stage's noise levels are shifted
        # for the size of the stage before.
        tokens = latents[0, 0].numel() // TOKEN_AREA
        if stage.index > 0:
            latents = double(latents)
            renoise = block_noise(tuple(latents.shape), scheduler.gamma, generator)
            latents = stage.signal * latents + stage.noise * _sent(renoise, model.device).to(model.dtype)
        if past is not None and history_refresh == "stage":
            past.clear()

        latents = solver(functools.partial(velocity, stage), latents, stage, steps[stage.index], tokens, scheduler)

    return state.after(latents, generator)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, in its turn among that device's work: from pinned memory, as a copy from elsewhere would wait for
    all of it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def halve(latents_BCTHW: Tensor) -> Tensor:
    """Half the height and width; doubled, because averaging four independent values halves their deviation."""
    _, _, t, h, w = latents_BCTHW.shape
    frames = rearrange(latents_BCTHW, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, size=(h // 2, w // 2), mode="bilinear") * 2
    return rearrange(frames, "(b t) c h w -> b c t h w", t=t)


def double(latents_BCTHW: Tensor) -> Tensor:
    """Twice the height and width, each value repeated over its 2x2 block."""
    t = latents_BCTHW.shape[2]
    frames = rearrange(latents_BCTHW, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, scale_factor=2, mode="nearest")
    return rearrange(frames, "(b t) c h w -> b c t h w", t=t)
