"""Trains the demo's transformer and its text encoder, as a distilled model, from nothing and without a teacher.

The next chunk of a film of the world is a function of its prompt, its past and two numbers in the noise. So the clean
latents of every stage can be learnt directly, at the noise levels that sampling with few steps meets: the first of a
stage, and later ones on what the model itself made of the first.

Shapes: B batch, K latent channels, T latent frames, h, w latent rows and columns, S text tokens, D text dim.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from helios_core.config import CHUNK_LATENTS, HISTORY_LATENTS, TEXT_TOKENS, TransformerConfig
from helios_core.demo import words
from helios_core.demo.codec import LinearCodec
from helios_core.demo.initial import initialise_text_encoder, initialise_transformer
from helios_core.demo.layout import SCHEDULERS, make_tokenizer
from helios_core.demo.lessons import NO_MOTION, Lesson, Lessons, Prompt
from helios_core.sampling.chunk import TOKEN_AREA, double, halve
from helios_core.sampling.noise import block_noise
from helios_core.sampling.schedule import Stage, Step, few_step_points, pyramid
from helios_core.transformer.layers import Attention, Block, Modulation
from helios_core.transformer.model import HeliosTransformer, TextContext

TRANSFORMER = TransformerConfig(
    num_attention_heads=6,
    attention_head_dim=32,
    text_dim=64,
    ffn_dim=512,
    num_layers=4,
    rope_dim=(12, 10, 10),
)
SCHEDULER = SCHEDULERS["distilled"]
STAGES = pyramid(SCHEDULER)

BATCH = {0: 32, 1: 12, 2: 8}  # chunks per step, by stage
FULL_EVERY = 3  # the finer stages, which are easier, take part in one of so many steps
STAGE_WEIGHT = {0: 2.0, 1: 1.0, 2: 1.0}
RIPE = 0.3  # from this share of the steps on, lessons are no longer easy and later steps of a stage are worth it
LATER_STEPS = 0.3  # share of the batches, then, at a later step of a stage
STEP_COUNTS = (2, 2, 3, 4, 4, 6)  # of a stage
MOTION_WEIGHT = 0.1  # of what the past's tokens do not tell of its motion, in the loss
MOTION_BLOCK = 1  # after this block they must tell it; the later ones can use it
STAGE_NOISE = 0.12  # most noise (deviation) on the result of the stage before
LEARNING_RATE, MUON_RATE = 2.2e-3, 6.6e-3
FLAT = 0.3  # share of the steps at the full rate, before it falls to a tenth along a cosine
WARM_UP = 30
AVERAGE = 0.997  # decay of the moving average of the weights, which is what is kept
CLIP = 1.0


def taught_words() -> list[str]:
    """Those of the vocabulary and of the captions, which get a token each."""
    return sorted({word for kind in words.vocabulary().values() for word in kind} | _small_words())


def _small_words() -> set[str]:
    """Those of the captions that stand for nothing."""
    templates = " ".join([*words.TEMPLATES, *words.SKIES, *(lead for each in words.LEADS.values() for lead in each)])
    return {"a", "an", "the"} | {word for word in templates.replace(",", " ").split() if word.isalpha()}


class TextAttention(Attention):
    """Cross-attention whose last key stands for all the rows of a prompt that are zero.

    They have one key and one value, so they are one row with a weight: a tenth of the work in training.
    """

    def forward(self, q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
        weight_S = torch.zeros(k_BSNH.shape[1])
        weight_S[-1] = math.log(TEXT_TOKENS + 1 - k_BSNH.shape[1])
        q, k, v = (heads.transpose(1, 2) for heads in (q_BLNH, k_BSNH, v_BSNH))
        out_BNLH = F.scaled_dot_product_attention(q, k, v, attn_mask=weight_S[None, None, None])
        out_BLD: Tensor = self.to_out(out_BNLH.transpose(1, 2).flatten(2))
        return out_BLD


class RememberingBlock(Block):
    """A block that keeps what it last made of the history, `past_BLD`."""

    past_BLD: Tensor

    def update(
        self,
        x_BLD: Tensor,
        m: Modulation,
        heads: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x_BLD = super().update(x_BLD, m, heads, text)
        if text is None:  # the history does not see the text
            self.past_BLD = x_BLD
        return x_BLD


class Student(nn.Module):
    """What is trained: the transformer, the text encoder that it reads, and, for the training alone, a reader of the
    motion that the history's tokens tell of.

    Without the loss of that reader the transformer hardly learns to look how the past moves: prompts mostly say it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer(taught_words())
        self.transformer = HeliosTransformer(TRANSFORMER)
        self.transformer.blocks[MOTION_BLOCK] = RememberingBlock(TRANSFORMER)  # type: ignore[index]
        for block in self.transformer.blocks:
            block.attn2 = TextAttention(TRANSFORMER)
        initialise_transformer(self.transformer, generator)
        torch.manual_seed(generator.initial_seed())  # transformers draws from the global one
        self.text_encoder = UMT5EncoderModel(text_config(self.tokenizer))
        initialise_text_encoder(self.text_encoder)
        dim = TRANSFORMER.hidden_dim
        self.motion_reader = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(words.TAUGHT_MOTIONS)))

    def past_motion(self) -> Tensor:
        """What the history of the last forward tells of its motion: [B, motions], unnormalised log-probabilities."""
        block = self.transformer.blocks[MOTION_BLOCK]
        assert isinstance(block, RememberingBlock)
        guess: Tensor = self.motion_reader(block.past_BLD.mean(1))
        return guess

    def text_context(self, prompts: list[Prompt]) -> TextContext:
        """As HeliosTransformer.text_context, of blended prompts, for TextAttention."""
        texts = [text for prompt in prompts for text, _ in prompt]
        ids = [self.tokenizer.encode(text).ids for text in texts]
        longest = max(len(each) for each in ids)
        ids_BS = torch.tensor([each + [0] * (longest - len(each)) for each in ids])
        mask_BS = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids])
        hidden_BSD = self.text_encoder(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        hidden_BSD = hidden_BSD * mask_BS[:, :, None]
        share_PB = torch.zeros(len(prompts), len(texts))
        column = iter(range(len(texts)))
        for row, prompt in enumerate(prompts):
            for _, share in prompt:
                share_PB[row, next(column)] = share
        rows_BSD = torch.einsum("pb,bsd->psd", share_PB, hidden_BSD)
        embed = self.transformer.condition_embedder.text_embedder
        zero = embed(torch.zeros(1, 1, TRANSFORMER.text_dim)).expand(len(prompts), -1, -1)
        text = torch.cat([embed(rows_BSD), zero], dim=1)
        return TextContext(tuple(block.attn2.keys_values(text) for block in self.transformer.blocks))


def text_config(tokenizer: Tokenizer) -> UMT5Config:
    return UMT5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=TRANSFORMER.text_dim,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )


@dataclass(frozen=True)
class Progress:
    """One step of the training: the loss of each stage that took part."""

    step: int
    losses: dict[str, float]


class Training:
    """A run of `steps` steps, on `tracks` tracks and `firsts` first chunks (see Lessons); a seed gives the same run.

    `average` is the student whose weights are the moving average of all steps: the result.
    """

    def __init__(self, linear: LinearCodec, steps: int, tracks: int, firsts: int, seed: int = 0) -> None:
        self.steps = steps
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = random.Random(seed)
        self.lessons = Lessons(linear, tracks, firsts, seed)
        self.student = Student(self.generator)
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        weight = 1 / linear.scale
        self.channel_weight = (weight / weight.mean()).view(1, -1, 1, 1, 1)
        blocks = self.student.transformer.blocks
        matrices = {id(p) for block in blocks for p in block.parameters() if p.ndim == 2}
        inner = [p for p in self.student.parameters() if id(p) in matrices]
        outer = [p for p in self.student.parameters() if id(p) not in matrices]
        self.optimizers = (
            torch.optim.Muon(inner, lr=MUON_RATE, weight_decay=0.0),
            torch.optim.AdamW(outer, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def run(self) -> Iterator[Progress]:
        """Takes one step after the other. Losses are mean weighted squares."""
        for step in range(self.steps):
            losses = {}
            self.lessons.ripe = step >= RIPE * self.steps
            full = step % FULL_EVERY == FULL_EVERY - 1
            for stage in STAGES if full else STAGES[:1]:
                lesson = self.lessons.draw(BATCH[stage.index])
                loss, blind = self._loss(lesson, stage), self._blindness(lesson)
                (STAGE_WEIGHT[stage.index] * loss + MOTION_WEIGHT * blind).backward()
                losses[f"stage {stage.index}"] = loss.item()
                losses["motion of the past"] = blind.item()
            self._update(step)
            yield Progress(step, losses)

    def _loss(self, lesson: Lesson, stage: Stage) -> Tensor:
        """What is wrong with the student's guess of a stage's clean latents: a mean square, weighted by place and
        channel. The stage before is true but for some noise; of the past see `_history`."""
        model = self.student.transformer
        history = self._history(lesson)
        context = model.begin_chunk(lesson.anchor, history, self.student.text_context(lesson.prompts))
        if stage.index == 0:
            start = _coarse(lesson.noise)
        else:
            true = _pooled(lesson.latents, stage.index - 1)
            deviation = torch.rand(len(true), 1, 1, 1, 1, generator=self.generator) * STAGE_NOISE
            start = self._renoised(true + deviation * torch.randn(true.shape, generator=self.generator), stage)
        points = _points(start, stage, self.rng.choice(STEP_COUNTS))
        x, point = start, points[0]
        if self.lessons.ripe and self.rng.random() < LATER_STEPS:
            with torch.no_grad():
                clean = x - point.sigma * model(x, point.timestep, context)
            point = self.rng.choice(points[1:])
            x = (1 - point.sigma) * clean + point.sigma * start
        wrong = x - point.sigma * model(x, point.timestep, context) - _pooled(lesson.latents, stage.index)
        weighted: Tensor = _pooled(lesson.weight, stage.index) * self.channel_weight * wrong.square()
        return weighted.mean()

    @torch.no_grad()
    def _history(self, lesson: Lesson) -> Tensor:
        """What the student sees of the past of `lesson`, [B, K, 19, h, w]. Some of it is its own: else it learns
        nothing of what its own small errors come to."""
        past = lesson.past.clone()
        for back in range(int(lesson.own.max()), 0, -1):
            makes = lesson.own >= back
            begin = past.shape[2] - back * CHUNK_LATENTS
            seen = past[makes, :, begin - HISTORY_LATENTS : begin]
            prompts = [prompt for prompt, each in zip(lesson.prompts, makes, strict=True) if each]
            past[makes, :, begin : begin + CHUNK_LATENTS] = self._chunk(lesson.anchor[makes], seen, prompts)
        return past[:, :, -HISTORY_LATENTS:]

    def _chunk(self, anchor: Tensor, history: Tensor, prompts: list[Prompt]) -> Tensor:
        """What the student makes of a past and a prompt, with one step for each stage: [B, K, 9, h, w]."""
        model = self.student.transformer
        context = model.begin_chunk(anchor, history, self.student.text_context(prompts))
        b, k, _, h, w = history.shape
        x = _coarse(torch.randn(b, k, CHUNK_LATENTS, h, w, generator=self.generator))
        for stage in STAGES:
            if stage.index > 0:
                x = self._renoised(x, stage)
            (point,) = _points(x, stage, 1)
            x = x - point.sigma * model(x, point.timestep, context)
        return x

    def _renoised(self, before: Tensor, stage: Stage) -> Tensor:
        """What `stage` begins with after the stage `before` it."""
        before = double(before)
        renoise = block_noise(tuple(before.shape), SCHEDULER.gamma, self.generator)
        return stage.signal * before + stage.noise * renoise

    def _blindness(self, lesson: Lesson) -> Tensor:
        """How little the student's last look at the history of `lesson` tells of its motion: a mean cross-entropy."""
        moves = lesson.motion != NO_MOTION
        error = F.cross_entropy(self.student.past_motion()[moves], lesson.motion[moves], reduction="sum")
        return error / max(1, int(moves.sum()))

    def _update(self, step: int) -> None:
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        past = max(0.0, step / self.steps - FLAT) / (1 - FLAT)
        share = min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * past))
        rates = iter(self.rates)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * next(rates)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)


def _coarse(noise: Tensor) -> Tensor:
    """A chunk's noise as stage 0 begins with it."""
    for _ in STAGES[1:]:
        noise = halve(noise)
    return noise


def _points(start: Tensor, stage: Stage, count: int) -> tuple[Step, ...]:
    """The steps of a stage. Tokens are counted before a stage doubles its sides (sampling/chunk.py)."""
    tokens = start[0, 0].numel() // TOKEN_AREA // (1 if stage.index == 0 else 4)
    return few_step_points(stage, count, tokens, SCHEDULER)


def _pooled(latents_BKThw: Tensor, stage: int) -> Tensor:
    """What a stage shall end with: the latents, averaged over 4x4, 2x2 or 1x1 places for stage 0, 1, 2."""
    frames = rearrange(latents_BKThw, "b k t h w -> (b t) k h w")
    size = 2 ** (len(STAGES) - 1 - stage)
    pooled: Tensor = rearrange(F.avg_pool2d(frames, size), "(b t) k h w -> b k t h w", t=latents_BKThw.shape[2])
    return pooled
