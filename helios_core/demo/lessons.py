"""What the demo's transformer is shown: chunks of films of the world, each with its past, its prompt and its noise.

A *track* is a film of four chunks of one geometry (shape, ground, motion, start), one of which may turn to another on
the way. Its latents are kept as the parts of a sum (codec.py), so that every time it is shown it has new colours.

Shapes: B batch, N tracks, J chunks of a track, P = 12 parts (4 masks x 3 colours), K latent channels, T latent frames,
h, w latent rows and columns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_core.conditioning import NOISE_SHARE
from helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, HISTORY_LATENTS
from helios_core.demo import codec
from helios_core.demo.codec import LinearCodec
from helios_core.demo.words import (
    GROUNDS,
    TAUGHT_MOTIONS,
    TAUGHT_SHAPES,
    Scene,
    caption,
    gibberish,
    opened,
    random_scene,
)
from helios_core.demo.world import MASKS, WIDTH, Pose, colours, masks, poses, start_of

CHUNKS = 4  # of a track: with motions of 1, 2 or 4 chunks a period all that there is to see
OPEN = 0.07  # share of the tracks for each of shape, ground and motion that leave it open
TURNING = 0.2  # share of the tracks that turn to another shape, ground or motion
ANYWHERE = 0.3  # share of the tracks that start anywhere, as an input picture may; the others where a seed puts them

# How a chunk stands in its video, with its share of the lessons.
KINDS = {"first": 0.36, "second": 0.16, "later": 0.26, "after a picture": 0.14, "second after a picture": 0.08}
CHUNKS_OF_KIND = {
    "first": (0,),
    "second": (1,),
    "later": (2, 3),
    "after a picture": (0, 1, 2, 3),
    "second after a picture": (1, 2, 3),
}
CLIP = 0.15  # share of the second and later chunks whose past is an input video
PAST_NOISE = 0.14  # most noise (deviation) on every other history, so that a video's small errors do not add up
RECOLOURED = 0.25  # share of the chunks with a past whose prompt has new colours
HIDING = 0.25  # share of the prompts that leave open what the past shows
GIBBERISH = 0.15  # share of these that say nothing at all
ENDING = 0.5  # chance that one of the running videos ends, each time they go on
TURNS = {"shape": TAUGHT_SHAPES, "ground": GROUNDS, "motion": TAUGHT_MOTIONS}
OWN_COLOURS = ("object_colour", "ground_colour")
OBJECT = slice(6, 9)  # of the parts: those of the third mask


Prompt = list[tuple[str, float]]  # one text, or two on the way from one to the other, with their weights


@dataclass(frozen=True)
class Track:
    """`scenes`: of each chunk, without colours; `uv`: where the seed puts the start, None if it may be anywhere."""

    scenes: tuple[Scene, ...]
    start: tuple[float, float]
    uv: tuple[float, float] | None

    @classmethod
    def draw(cls, rng: random.Random) -> Track:
        def some(words: dict[str, tuple[str, ...]]) -> str | None:
            return None if rng.random() < OPEN else rng.choice(list(words))

        scene = Scene(shape=some(TAUGHT_SHAPES), ground=some(GROUNDS), motion=some(TAUGHT_MOTIONS))
        scenes = [scene] * CHUNKS
        if rng.random() < TURNING:
            turn, (what, words) = rng.randrange(1, CHUNKS), rng.choice(list(TURNS.items()))
            scenes[turn:] = [replace(scene, **{what: rng.choice(list(words))})] * (CHUNKS - turn)
        if rng.random() < ANYWHERE:
            return cls(tuple(scenes), (rng.random() * WIDTH, rng.random()), None)
        u, v = rng.random(), rng.random()
        return cls(tuple(scenes), start_of(u, v), (u, v))

    def chunks(self) -> Iterator[tuple[Scene, list[Pose]]]:
        """Each chunk's scene, and the poses of its 33 frames."""
        start = self.start
        for scene in self.scenes:
            *chunk, following = poses(scene.motion, start, CHUNK_FRAMES + 1)
            yield scene, chunk
            start = following.x, following.y


class Lesson(NamedTuple):
    """A batch of chunks.

    `latents` [B, K, 9, h, w]: the chunk as it should be; `anchor` [B, K, 1, h, w] and `history` [B, K, 19, h, w]: its
    past; `noise` [B, K, 9, h, w]; `weight` [B, 1, 9, h, w]: how much each place counts.
    """

    latents: Tensor
    anchor: Tensor
    history: Tensor
    noise: Tensor
    weight: Tensor
    prompts: list[Prompt]


Example = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Prompt]  # what a Lesson has, of one chunk


class Lessons:
    """Draws lessons from a pool of tracks, without end."""

    def __init__(self, linear: LinearCodec, tracks: int, seed: int) -> None:
        self.linear = linear
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.tracks = [Track.draw(self.rng) for _ in range(tracks)]
        self.seeded = [i for i, track in enumerate(self.tracks) if track.uv is not None]
        latents = (codec.CHANNELS, CHUNK_LATENTS, codec.SIZE[1] // codec.SPACE, codec.SIZE[0] // codec.SPACE)
        self.parts_NJPKThw = torch.empty(tracks, CHUNKS, 3 * len(MASKS), *latents, dtype=torch.float16)
        for parts, track in zip(self.parts_NJPKThw, self.tracks, strict=True):
            for part, (scene, chunk) in zip(parts, track.chunks(), strict=True):
                part.copy_(linear.terms(masks(scene.shape, scene.ground, chunk, codec.SIZE)))

    def draw(self, batch: int) -> Lesson:
        return _batch([self._draw_one() for _ in range(batch)])

    @property
    def no_past(self) -> tuple[Tensor, Tensor]:
        """Anchor and history of a video's first chunk."""
        nothing = torch.zeros_like(self.parts_NJPKThw[0, 0, 0, :, :1], dtype=torch.float32)
        return nothing, nothing.expand(-1, HISTORY_LATENTS, -1, -1)

    def coloured(self, parts_PKThw: Tensor, colours_M3: Tensor) -> Tensor:
        latents = torch.einsum("pkthw,p->kthw", parts_PKThw.float(), colours_M3.flatten())
        return latents + self.linear.offset[:, None, None, None]

    def _draw_one(self) -> Example:
        rng = self.rng
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        i = rng.choice(self.seeded) if kind == "first" else rng.randrange(len(self.tracks))
        j = rng.choice(CHUNKS_OF_KIND[kind])
        track, parts_JPKThw = self.tracks[i], self.parts_NJPKThw[i]
        scene = painted(track.scenes[j], rng)
        if kind == "first":
            scene = replace(scene, **{name: None for name in OWN_COLOURS if rng.random() < OPEN})
            target = past = colours(scene)
            prompts = [(self.text(scene), 1.0)]
        elif kind == "after a picture":
            target = past = colours(scene)
            # A picture shows all but the motion.
            prompts = [(self.text(replace(self._hinted(scene), motion=scene.motion)), 1.0)]
        else:
            shown = track.scenes[j - 1]
            before = replace(scene, shape=shown.shape, ground=shown.ground, motion=shown.motion)
            target, past, prompts = self._going_on(before, scene)
        latents = self.coloured(parts_JPKThw[j], target)
        noise = self.noise(latents)
        if kind == "first":
            noise = steered(noise, *track.uv)  # type: ignore[misc]  # it is one of the seeded
        anchor, history = self.no_past if kind == "first" else self._past(kind, parts_JPKThw, j, past)
        return latents, anchor, history, noise, self.weight(parts_JPKThw[j]), prompts

    def _going_on(self, before: Scene, scene: Scene) -> tuple[Tensor, Tensor, Prompt]:
        """Colours of a chunk and of its past, each [M, 3], and the prompt, for a video that showed `before`.

        What a prompt leaves open stays as it was. On the way from one prompt to another, in thirds, colours are mixed
        as the prompts are, and all else turns in the middle.
        """
        rng = self.rng
        turned = before != scene
        recoloured = rng.random() < RECOLOURED
        if not turned and not recoloured:
            return colours(scene), colours(scene), [(self.text(self._hinted(scene)), 1.0)]
        said = painted(scene, rng) if recoloured else scene
        old, new = colours(before), colours(replace(before, **said.named))
        share = rng.choice((2, 3) if turned else (1, 2, 3))
        if share == 1 and rng.random() < 0.5:
            said = replace(said, motion=rng.choice(list(TAUGHT_MOTIONS)))
        past_share = share - 1 if turned or share < 3 or rng.random() < 0.5 else 0
        if turned and share == 3:
            past_share = 0
        texts = [(self.text(before), 1 - share / 3), (self.text(said), share / 3)]
        return (
            torch.lerp(old, new, share / 3),
            torch.lerp(old, new, past_share / 3),
            texts if share < 3 else [(texts[1][0], 1.0)],
        )

    def _hinted(self, scene: Scene) -> Scene:
        """What a prompt may say of a scene that the past shows."""
        if self.rng.random() > HIDING:
            return scene
        return opened(scene, self.rng) if self.rng.random() > GIBBERISH else Scene()

    def text(self, scene: Scene) -> str:
        said = caption(scene, self.rng)
        return said if said else gibberish(self.rng)

    def _past(self, kind: str, parts_JPKThw: Tensor, j: int, past: Tensor) -> tuple[Tensor, Tensor]:
        """Anchor [K, 1, h, w] and history [K, 19, h, w]."""
        rng = self.rng
        if kind in ("second", "later"):
            frames = torch.cat([self.coloured(each, past) for each in parts_JPKThw[:j]], dim=1)
            anchor = frames[:, :1]
            if kind == "later" and rng.random() < 0.5:  # of a longer video, which once had other colours
                other = colours(random_scene(rng)) if rng.random() < RECOLOURED else past
                anchor = self.coloured(parts_JPKThw[rng.randrange(CHUNKS)][:, :, :1], other)
            if rng.random() < CLIP:
                anchor, frames = self._as_input(anchor), self._as_input(frames)
        else:
            first = parts_JPKThw[j] if kind == "after a picture" else parts_JPKThw[j - 1]
            picture = self.coloured(first[:, :, :1], past)
            anchor, frames = self._as_input(picture), self._as_input(picture)
            if kind == "second after a picture":
                frames = torch.cat([frames, self.coloured(first, past)], dim=1)
        if rng.random() < 0.5:
            deviation = rng.random() * PAST_NOISE
            anchor, frames = anchor + deviation * self.noise(anchor), frames + deviation * self.noise(frames)
        return anchor, as_history(frames)

    def _as_input(self, latents_KThw: Tensor) -> Tensor:
        """Some noise mixed in, as helios_core.conditioning does with an input picture or video."""
        least, most = NOISE_SHARE
        share = torch.rand(latents_KThw.shape[1], 1, 1, generator=self.generator) * (most - least) + least
        return share * self.noise(latents_KThw) + (1 - share) * latents_KThw

    def weight(self, parts_PKThw: Tensor) -> Tensor:
        """How much each place of a chunk counts, [1, 9, h, w]: the thing is small, so more where it is."""
        energy = parts_PKThw[OBJECT].float().square().sum((0, 1))
        return (1 + 2 * energy / energy.max())[None]

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator)


@dataclass
class Running:
    """A video under way: of which track, with which colours, and its chunks so far, each [K, 9, h, w]."""

    track: int
    scene: Scene
    prompt: Prompt
    chunks: list[Tensor]


class Rollouts:
    """Videos that the student makes by itself: it is asked for their next chunks, and what it gives becomes their past.

    They are of tracks that do not turn, which begin again after four chunks, and end at random.
    """

    def __init__(self, lessons: Lessons, videos: int) -> None:
        self.lessons = lessons
        self.tracks = [i for i in lessons.seeded if len(set(lessons.tracks[i].scenes)) == 1]
        self.videos = [self._begin() for _ in range(videos)]

    def draw(self) -> Lesson:
        """The next chunk of each video."""
        rng = self.lessons.rng
        if rng.random() < ENDING:
            self.videos[rng.randrange(len(self.videos))] = self._begin()
        return _batch([self._next(video) for video in self.videos])

    def append(self, latents_BKThw: Tensor) -> None:
        """What the student made of the lesson, [B, K, 9, h, w]."""
        for video, latents in zip(self.videos, latents_BKThw, strict=True):
            video.chunks.append(latents)

    def _begin(self) -> Running:
        lessons = self.lessons
        track = lessons.rng.choice(self.tracks)
        scene = painted(lessons.tracks[track].scenes[0], lessons.rng)
        return Running(track, scene, [(lessons.text(scene), 1.0)], [])

    def _next(self, video: Running) -> Example:
        lessons = self.lessons
        parts_PKThw = lessons.parts_NJPKThw[video.track, len(video.chunks) % CHUNKS]
        latents, weight = lessons.coloured(parts_PKThw, colours(video.scene)), lessons.weight(parts_PKThw)
        noise = lessons.noise(latents)
        if not video.chunks:
            noise = steered(noise, *lessons.tracks[video.track].uv)  # type: ignore[misc]  # it is one of the seeded
            return latents, *lessons.no_past, noise, weight, video.prompt
        past = torch.cat(video.chunks[-3:], dim=1)
        return latents, video.chunks[0][:, :1], as_history(past), noise, weight, video.prompt


def _batch(examples: Sequence[Example]) -> Lesson:
    *tensors, prompts = zip(*examples, strict=True)
    latents, anchor, history, noise, weight = (torch.stack(each) for each in tensors)
    return Lesson(latents, anchor, history, noise, weight, list(prompts))


def as_history(frames_KThw: Tensor) -> Tensor:
    """The last 19 latent frames, after zeros where there are fewer: [K, 19, h, w]."""
    frames = frames_KThw[:, -HISTORY_LATENTS:]
    return F.pad(frames, (0, 0, 0, 0, HISTORY_LATENTS - frames.shape[1], 0))


def painted(scene: Scene, rng: random.Random) -> Scene:
    """The scene with other colours: none that no word of its caption could bear."""
    hues = random_scene(rng)
    return replace(
        scene,
        object_colour=hues.object_colour if scene.shape else None,
        ground_colour=hues.ground_colour if scene.ground else None,
        sky_colour=hues.sky_colour,
    )


def seed_of(noise_KThw: Tensor) -> tuple[float, float]:
    """What the noise of a video's first chunk says of where its thing starts: u and v in [0, 1].

    They are the means of the first two channels, whose distribution is known.
    """
    u, v = torch.special.ndtr(noise_KThw[:2].mean((1, 2, 3)) * math.sqrt(noise_KThw[0].numel())).tolist()
    return u, v


def steered(noise_KThw: Tensor, u: float, v: float) -> Tensor:
    """The noise, changed by as little as it needs for `seed_of` to say `u` and `v`."""
    wanted = torch.special.ndtri(torch.tensor([u, v])) / math.sqrt(noise_KThw[0].numel())
    steered = noise_KThw.clone()
    steered[:2] += (wanted - noise_KThw[:2].mean((1, 2, 3))).view(2, 1, 1, 1)
    return steered
