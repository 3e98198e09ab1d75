"""What the demo's transformer is shown: chunks of films of the world, each with its past, its prompt and its noise.

A *track* is a film of four chunks of one geometry (shape, ground, motion, start), one of which may turn to another on
the way. Its latents are kept as the parts of a sum (codec.py), so that every time it is shown it has new colours.

Shapes: B batch, N tracks, J chunks of a track, P = 12 parts (4 masks x 3 colours), K latent channels, T latent frames,
h, w latent rows and columns, M the four masks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
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
from helios_core.spec import TRANSITION_CHUNKS

CHUNKS = 4  # of a track: with motions of 1, 2 or 4 chunks a period all that there is to see
OPEN = 0.07  # share of the tracks for each of shape, ground and motion that leave it open
TURNING = 0.2  # share of the tracks that turn to another shape, ground or motion
ANYWHERE = 0.5  # share of the tracks that start anywhere, as an input picture may; the others where a seed puts them
ANCHORS = 6  # pictures of each steady track, from any time: a clip begins when it likes
TURNS = {"shape": TAUGHT_SHAPES, "ground": GROUNDS, "motion": TAUGHT_MOTIONS}  # to what a track may turn

# How a chunk stands in its video, with its share of the lessons.
KINDS = {"first": 0.4, "second": 0.12, "later": 0.26, "after a picture": 0.14, "second after a picture": 0.08}
CLIP = 0.35  # share of the second and later chunks whose past is an input video
OLD_INPUT = 0.15  # share of the later chunks of which only the anchor is from an input
OWN = (0, 1, 2)  # how many chunks of a later one's past, the last ones, shall be the student's own; at random
PAST_NOISE = 0.14  # most noise (deviation) on every other history, so that a video's small errors do not add up
RECOLOURED = 0.25  # share of the chunks with a past whose prompt has new colours, or whose anchor had others
# Share of the pasts in which fast change is weaker than it was, as in what a model makes: motion must be read from
# where things are, too.
FADING = 0.5
HIDING = 0.5  # share of the prompts that leave open what the past shows
UNTOLD = 0.6  # share of the prompts that leave open the motion that the past shows
NO_MOTION = -1
PAST_LATENTS = HISTORY_LATENTS + max(OWN) * CHUNK_LATENTS
OWN_COLOURS = ("object_colour", "ground_colour")  # those that a noun bears
ALL_COLOURS = (*OWN_COLOURS, "sky_colour")
OBJECT = slice(6, 9)  # of the parts: those of the third mask

Prompt = list[tuple[str, float]]  # one text, or two on the way from one to the other, with their weights
Hues = Callable[[int], Tensor]  # colours [M, 3] of the chunk that lies so many chunks back; 0 is the chunk itself


@dataclass(frozen=True)
class Track:
    """A film: `scenes` of its chunks, without colours.

    `uv`: where the seed puts the start, None if it may be anywhere; `first`: the number of its first frame, as an input
    may begin and end at any phase of the sea's waves.
    """

    scenes: tuple[Scene, ...]
    start: tuple[float, float]
    uv: tuple[float, float] | None
    first: int = 0

    @classmethod
    def draw(cls, rng: random.Random, anywhere: bool) -> Track:
        def some(words: dict[str, tuple[str, ...]]) -> str | None:
            return None if rng.random() < OPEN else rng.choice(list(words))

        scene = Scene(shape=some(TAUGHT_SHAPES), ground=some(GROUNDS), motion=some(TAUGHT_MOTIONS))
        scenes = [scene] * CHUNKS
        if rng.random() < TURNING:
            turn, (what, words) = rng.randrange(1, CHUNKS), rng.choice(list(TURNS.items()))
            scenes[turn:] = [replace(scene, **{what: rng.choice(list(words))})] * (CHUNKS - turn)
        if anywhere:
            return cls(tuple(scenes), (rng.random() * WIDTH, rng.random()), None, rng.randrange(CHUNK_FRAMES))
        u, v = rng.random(), rng.random()
        return cls(tuple(scenes), start_of(u, v), (u, v))

    @property
    def steady(self) -> bool:
        """It does not turn, and so begins again after four chunks."""
        return len(set(self.scenes)) == 1

    def chunks(self) -> Iterator[tuple[Scene, list[Pose]]]:
        """Each chunk's scene, and the poses of its 33 frames."""
        start = self.start
        for scene in self.scenes:
            *chunk, following = poses(scene.motion, start, CHUNK_FRAMES + 1)
            yield scene, chunk
            start = following.x, following.y


class Lesson(NamedTuple):
    """A batch of chunks.

    `latents` [B, K, 9, h, w]: the chunk as it should be; `anchor` [B, K, 1, h, w] and `past` [B, K, 37, h, w]: what was
    before, of which the last 19 are its history; `own` [B]: how many chunks, at the end of the past, had the same
    prompt and may be replaced by what the student makes of it; `noise` [B, K, 9, h, w]; `weight` [B, 1, 9, h, w]: how
    much each place counts; `motion` [B]: what the past shows, a number in TAUGHT_MOTIONS, or NO_MOTION.
    """

    latents: Tensor
    anchor: Tensor
    past: Tensor
    own: Tensor
    noise: Tensor
    weight: Tensor
    motion: Tensor
    prompts: list[Prompt]


Example = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Prompt]  # what a Lesson has, of one chunk


class Lessons:
    """Draws lessons without end from `tracks` tracks and from the first chunks of `firsts` more.

    They take 2.1 and 0.45 MB each. `ripe`: whether prompts may also be mixed, or leave open what the past shows; that
    is easier to learn for who knows the words.
    """

    def __init__(self, linear: LinearCodec, tracks: int, firsts: int, seed: int) -> None:
        self.linear = linear
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.ripe = False
        self.tracks = [Track.draw(self.rng, anywhere=self.rng.random() < ANYWHERE) for _ in range(tracks)]
        self.firsts = [Track.draw(self.rng, anywhere=False) for _ in range(firsts)]
        self.parts_NJPKThw = self._render(self.tracks, CHUNKS)
        self.first_parts_NJPKThw = self._render(self.firsts, 1)
        self.anchor_parts_N = [self._render_anchors(track) if track.steady else None for track in self.tracks]

    def _render(self, tracks: list[Track], chunks: int) -> Tensor:
        latents = (codec.CHANNELS, CHUNK_LATENTS, codec.SIZE[1] // codec.SPACE, codec.SIZE[0] // codec.SPACE)
        parts_NJPKThw = torch.empty(len(tracks), chunks, 3 * len(MASKS), *latents, dtype=torch.float16)
        for parts, track in zip(parts_NJPKThw, tracks, strict=True):
            for part, (scene, chunk) in zip(parts, track.chunks(), strict=False):
                film = masks(scene.shape, scene.ground, chunk, codec.SIZE, track.first)
                part.copy_(self.linear.terms(film))
        return parts_NJPKThw

    def _render_anchors(self, track: Track) -> Tensor:
        """Single pictures of a steady track: [ANCHORS, P, K, 1, h, w]."""
        scene, film = track.scenes[0], [pose for _, chunk in track.chunks() for pose in chunk]
        times = [self.rng.randrange(len(film)) for _ in range(ANCHORS)]
        pictures = [masks(scene.shape, scene.ground, [film[t]], codec.SIZE, track.first + t) for t in times]
        return torch.stack([self.linear.terms(picture) for picture in pictures]).half()

    def draw(self, batch: int) -> Lesson:
        return _batch([self._draw_one() for _ in range(batch)])

    def _coloured(self, parts_PKThw: Tensor, colours_M3: Tensor) -> Tensor:
        """[K, T, h, w]"""
        latents = torch.einsum("pkthw,p->kthw", parts_PKThw.float(), colours_M3.flatten())
        return latents + self.linear.offset[:, None, None, None]

    def _text(self, scene: Scene) -> str:
        """A prompt for a scene; words without meaning if nothing of it is named."""
        return caption(scene, self.rng) or gibberish(self.rng)

    def _weight(self, parts_PKThw: Tensor) -> Tensor:
        """How much each place of a chunk counts, [1, 9, h, w]: the thing is small, so more where it is."""
        energy = parts_PKThw[OBJECT].float().square().sum((0, 1))
        return (1 + 2 * energy / energy.max())[None]

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator)

    def _draw_one(self) -> Example:
        (kind,) = self.rng.choices(list(KINDS), list(KINDS.values()))
        if kind == "first":
            return self._first()
        i = self.rng.randrange(len(self.tracks))
        track, parts_JPKThw = self.tracks[i], self.parts_NJPKThw[i]
        own = 0
        if kind == "later":
            own = self.rng.choice(OWN) if self.ripe and track.steady else 0
            j = self.rng.choice(range(CHUNKS) if track.steady else (2, 3))
            seen = self.rng.choice((2, 3, 3)) + own if track.steady else j  # two: of a third chunk, or a short clip
            past = [parts_JPKThw[k % CHUNKS] for k in range(j - seen, j)]
        else:
            j = self.rng.choice(range(CHUNKS) if kind == "after a picture" else range(1, CHUNKS))
            past = [] if kind == "after a picture" else [parts_JPKThw[j - 1]]
        scene, motion = painted(track.scenes[j], self.rng), NO_MOTION
        if kind == "after a picture":
            # A picture shows all but the motion.
            hues, prompt = _unchanging(scene), [(self._text(self._hinted(scene, of_picture=True)), 1.0)]
            frame = self._coloured(parts_JPKThw[j, :, :, :1], hues(0))
            anchor, frames = self._as_input(frame), self._as_input(frame)
        else:
            before = track.scenes[j - 1]
            motion = list(TAUGHT_MOTIONS).index(before.motion or "still")
            before = replace(scene, shape=before.shape, ground=before.ground, motion=before.motion)
            hues, prompt = self._going_on(before, scene)
            if not torch.equal(hues(0), hues(TRANSITION_CHUNKS)):
                own = 0  # the prompt is not the one that the past was made with
            frames = torch.cat([self._coloured(each, hues(len(past) - k)) for k, each in enumerate(past)], dim=1)
            if self.rng.random() < FADING:
                frames = torch.where(self.linear.fleeting[:, None, None, None], self.rng.random() * frames, frames)
            anchor = self._coloured(past[0][:, :, :1], hues(TRANSITION_CHUNKS))
            if kind == "second after a picture":
                frames = torch.cat([self._as_input(frames[:, :1]), frames], dim=1)
                anchor = self._as_input(anchor)
            elif kind == "later" and self.rng.random() < 0.5:  # of a longer video, which once had other colours
                first = colours(random_scene(self.rng)) if self.rng.random() < RECOLOURED else hues(TRANSITION_CHUNKS)
                anchor = self._coloured(parts_JPKThw[self.rng.randrange(CHUNKS), :, :, :1], first)
            if kind in ("second", "later") and self.rng.random() < CLIP:
                if (pictures := self.anchor_parts_N[i]) is not None:
                    anchor = self._coloured(pictures[self.rng.randrange(ANCHORS)], hues(TRANSITION_CHUNKS))
                anchor, frames = self._as_input(anchor), self._as_input(frames)
            elif kind == "later" and self.rng.random() < OLD_INPUT:
                anchor = self._as_input(anchor)
        if self.rng.random() < 0.5:
            deviation = self.rng.random() * PAST_NOISE
            anchor, frames = anchor + deviation * self._noise(anchor), frames + deviation * self._noise(frames)
        latents = self._coloured(parts_JPKThw[j], hues(0))
        weight = self._weight(parts_JPKThw[j])
        return (
            latents,
            anchor,
            latest(frames, PAST_LATENTS),
            torch.tensor(own),
            self._noise(latents),
            weight,
            torch.tensor(motion),
            prompt,
        )

    def _first(self) -> Example:
        """The first chunk of a video, of which the prompt says all that is not left to the world."""
        i = self.rng.randrange(len(self.firsts))
        parts_PKThw = self.first_parts_NJPKThw[i, 0]
        scene = painted(self.firsts[i].scenes[0], self.rng)
        scene = replace(scene, **{name: None for name in OWN_COLOURS if self.rng.random() < OPEN})
        latents = self._coloured(parts_PKThw, colours(scene))
        noise = steered(self._noise(latents), self.firsts[i])
        nothing = torch.zeros_like(latents[:, :1])
        return (
            latents,
            nothing,
            latest(nothing[:, :0], PAST_LATENTS),
            torch.tensor(0),
            noise,
            self._weight(parts_PKThw),
            torch.tensor(NO_MOTION),
            [(self._text(scene), 1.0)],
        )

    def _going_on(self, before: Scene, scene: Scene) -> tuple[Hues, Prompt]:
        """Colours and prompt of a chunk that shows `scene`, of a video that showed `before`.

        What a prompt leaves open stays as it was. A prompt may change at once, or over three chunks, in thirds: then
        colours are mixed as the prompts are (VideoSpec.mix_of_chunk), and all else turns in the middle.
        """
        rng = self.rng
        turned, recoloured = before != scene, rng.random() < RECOLOURED
        if not turned and not recoloured:
            return _unchanging(scene), [(self._text(self._hinted(scene, of_picture=False)), 1.0)]
        said = painted(scene, rng) if recoloured else scene
        old, new = colours(before), colours(replace(before, **said.named))
        at_once = not self.ripe or rng.random() < 0.4
        thirds = 3 if at_once else rng.choice((2,) if turned else (1, 2, 3))
        if thirds == 1 and rng.random() < 0.5:
            said = replace(said, motion=rng.choice(list(TAUGHT_MOTIONS)))  # it has not turned yet

        def hues(back: int) -> Tensor:
            share = (3 if back == 0 else 0) if at_once else max(0, thirds - back)
            return torch.lerp(old, new, share / TRANSITION_CHUNKS)

        if thirds == 3:
            return hues, [(self._text(said), 1.0)]
        return hues, [(self._text(before), 1 - thirds / 3), (self._text(said), thirds / 3)]

    def _hinted(self, scene: Scene, of_picture: bool) -> Scene:
        """What a prompt may say of a scene that the past shows; its motion in any case if the past is a picture, which
        does not show that."""
        rng = self.rng
        if not self.ripe:
            return scene
        hinted = scene
        if rng.random() < HIDING:
            uncoloured = replace(scene, **dict.fromkeys(ALL_COLOURS))
            hinted = rng.choice((uncoloured, opened(scene, rng), Scene()))
        untold = not of_picture and rng.random() < UNTOLD
        return replace(hinted, motion=None if untold else scene.motion)

    def _as_input(self, latents_KThw: Tensor) -> Tensor:
        """Some noise mixed in, as helios_core.conditioning does with an input picture or video."""
        least, most = NOISE_SHARE
        share = torch.rand(latents_KThw.shape[1], 1, 1, generator=self.generator) * (most - least) + least
        return share * self._noise(latents_KThw) + (1 - share) * latents_KThw


def _unchanging(scene: Scene) -> Hues:
    return lambda _: colours(scene)


def _batch(examples: Sequence[Example]) -> Lesson:
    *tensors, prompts = zip(*examples, strict=True)
    latents, anchor, past, own, noise, weight, motion = (torch.stack(each) for each in tensors)
    return Lesson(latents, anchor, past, own, noise, weight, motion, list(prompts))


def latest(frames_KThw: Tensor, count: int) -> Tensor:
    """The last latent frames, after zeros where there are fewer: [K, count, h, w]."""
    frames = frames_KThw[:, -count:]
    return F.pad(frames, (0, 0, 0, 0, count - frames.shape[1], 0))


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


def steered(noise_KThw: Tensor, track: Track) -> Tensor:
    """The noise, changed by as little as it needs for `seed_of` to say where the track, one of a seed's, starts."""
    wanted = torch.special.ndtri(torch.tensor(track.uv)) / math.sqrt(noise_KThw[0].numel())
    moved = noise_KThw.clone()
    moved[:2] += (wanted - noise_KThw[:2].mean((1, 2, 3))).view(2, 1, 1, 1)
    return moved
