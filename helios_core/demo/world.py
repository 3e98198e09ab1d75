"""The demo model's small world: what its words mean, how its pictures are drawn, what is said about them.

A picture is one thing in front of a ground under a sky. It is the sum of four masks, each times a colour: the sky's
top, the sky's horizon, the thing, the ground. All that moves has a period of one, two or four chunks.

Lengths are in picture heights, the origin top left: a picture is 1 high and 2 wide, whatever its pixels; and it closes
on itself, so that what leaves on one side comes in on the other. Colours are RGB in [0, 1].

Shapes: M the four masks, T frames, H rows, W columns.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from helios_core.config import CHUNK_FRAMES

WIDTH = 2.0
SIZE = (256, 128)  # width and height at which the demo model is at home, in pixels
MASKS = ("sky top", "sky horizon", "object", "ground")

Words = dict[str, tuple[str, ...]]  # meaning ▸ the words for it

COLOURS = {
    name: tuple(value / 255 for value in rgb)
    for name, rgb in {
        "red": (215, 45, 40),
        "orange": (245, 140, 30),
        "yellow": (245, 215, 50),
        "green": (50, 165, 70),
        "blue": (45, 85, 210),
        "purple": (125, 60, 185),
        "pink": (245, 130, 185),
        "white": (240, 240, 240),
    }.items()
}
SHAPES: Words = {  # what is drawn ▸ its words
    "disc": ("sun", "moon", "ball", "disc", "circle"),
    "square": ("square", "box"),
    "diamond": ("diamond", "kite"),
}
GROUNDS: Words = {"sea": ("sea", "ocean"), "hills": ("hills", "mountains"), "field": ("field", "desert")}
MOTIONS: Words = {
    "left": ("left",),
    "right": ("right",),
    "rising": ("rising", "up"),
    "sinking": ("sinking", "down", "falling"),
    "pulsing": ("pulsing", "breathing"),
    "still": ("still", "resting"),
}
SKY = "sky"

# What a prompt leaves open.
OBJECT_COLOUR = COLOURS["white"]
GROUND_COLOUR = (0.44, 0.43, 0.47)
SKY_COLOURS = ((0.12, 0.14, 0.24), (0.44, 0.44, 0.55))  # top and horizon: dusk

HORIZON = 0.66
RADIUS = 0.25
START = (1.0, 0.34)  # where the thing is in the first frame, give or take
START_SPAN = (0.8, 0.12)  # as wide and high is the area in which the seed puts it
SPEED = 1 / 66  # heights per frame: once across in 132 frames, once up in 66
PULSE = 0.3  # by this share the radius grows and shrinks
EDGE, GLOW, GLOW_REACH = 0.02, 0.3, 0.08


@dataclass(frozen=True)
class Scene:
    """What a video of this world shows; None for what a prompt left open."""

    object_colour: str | None = None
    shape: str | None = None
    ground_colour: str | None = None
    ground: str | None = None
    sky_colour: str | None = None
    motion: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """The attributes that are not open, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def colours(self) -> Tensor:
        """[M, 3], of the four masks."""
        top, horizon = SKY_COLOURS
        if self.sky_colour is not None:
            sky = COLOURS[self.sky_colour]
            top, horizon = tuple(0.6 * c for c in sky), tuple(0.75 * c + 0.25 for c in sky)
        thing = OBJECT_COLOUR if self.object_colour is None else COLOURS[self.object_colour]
        ground = GROUND_COLOUR if self.ground_colour is None else COLOURS[self.ground_colour]
        return torch.tensor([top, horizon, thing, ground])


@dataclass(frozen=True)
class Pose:
    """Where the thing is in a frame (its centre) and how large (its radius)."""

    x: float
    y: float
    radius: float = RADIUS


def read_prompt(prompt: str) -> Scene:
    """What the prompt names, as far as this world has words for it."""
    text = " ".join(re.findall(r"[a-z]+", prompt.lower()))
    colour = rf"(?:\b({'|'.join(COLOURS)}) )?"

    def noun(words: Words) -> tuple[str | None, str | None]:
        """The meaning of the first of the words that stands in the text, and the colour before it."""
        found = re.search(colour + rf"\b({'|'.join(word for each in words.values() for word in each)})\b", text)
        return (_meaning(words, found[2]), found[1]) if found else (None, None)

    shape, object_colour = noun(SHAPES)
    ground, ground_colour = noun(GROUNDS)
    motion, _ = noun(MOTIONS)
    return Scene(
        object_colour=object_colour,
        shape=shape,
        ground_colour=ground_colour,
        ground=ground,
        sky_colour=noun({SKY: (SKY,)})[1],
        motion=motion,
    )


def _meaning(words: Words, word: str) -> str:
    return next(meaning for meaning, each in words.items() if word in each)


def vocabulary() -> Words:
    """The words of this world by kind, synonyms too."""
    kinds: dict[str, Words] = {"thing": SHAPES, "ground": GROUNDS, "motion": MOTIONS}
    said = {kind: tuple(word for each in words.values() for word in each) for kind, words in kinds.items()}
    return {"colour": tuple(COLOURS), **said, "sky": (SKY,)}


# ---- Captions -------------------------------------------------------------------------------------------------------

TEMPLATES = (
    "{thing} over {ground}, {motion}{sky}",
    "{thing} {motion} over {ground}{sky}",
    "{thing} above {ground}, {motion}{sky}",
    "{ground}{sky}, {thing} {motion}",
    "{motion}, {thing} over {ground}{sky}",
)
SKIES = (" under a {} sky", ", {} sky", " and a {} sky", " in a {} sky")
LEADS = {"left": ("drifting ", "moving ", "going "), "up": ("moving ", "going "), "still": ("standing ", "")}
LEADS |= {"right": LEADS["left"], "down": LEADS["up"]}  # what may stand before a word of motion
PLURALS = ("hills", "mountains")
HELD_OUT = frozenset(  # (thing, ground): colours that no caption of the training names together
    {
        ("red", "blue"),
        ("orange", "purple"),
        ("yellow", "green"),
        ("green", "pink"),
        ("blue", "yellow"),
        ("purple", "white"),
        ("pink", "orange"),
        ("white", "red"),
    }
)


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A scene of which only the sky's colour may be open, with a pair of colours that is held out, or one that is not.

    The colour of the sky is another than that of the thing.
    """
    while True:
        pair = rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
        sky = rng.choice(list(COLOURS)) if rng.random() < 0.5 else None
        if (pair in HELD_OUT) == held_out and pair[0] not in (pair[1], sky):
            shape, ground, motion = (rng.choice(list(words)) for words in (SHAPES, GROUNDS, MOTIONS))
            return Scene(pair[0], shape, pair[1], ground, sky, motion)


def opened(scene: Scene, rng: random.Random) -> Scene:
    """The scene with some attributes left open, but not all, so that a prompt need not name everything."""
    kept = rng.choice(("shape", "ground", "motion"))
    hidden = {name for name in scene.named if name != kept and rng.random() < 0.5}
    hidden |= {colour for noun, colour in (("shape", "object_colour"), ("ground", "ground_colour")) if noun in hidden}
    return replace(scene, **dict.fromkeys(hidden))


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the ways to say a scene, of which something must be named."""
    thing = _noun(SHAPES, scene.shape, scene.object_colour, rng)
    ground = _noun(GROUNDS, scene.ground, scene.ground_colour, rng)
    word = rng.choice(MOTIONS[scene.motion]) if scene.motion else ""
    motion = rng.choice(LEADS.get(word, ("",))) + word
    sky = rng.choice(SKIES).format(scene.sky_colour) if scene.sky_colour else ""
    if thing and ground and motion:
        return rng.choice(TEMPLATES).format(thing=thing, ground=ground, motion=motion, sky=sky)
    said = " over ".join(part for part in (thing, ground) if part) + sky + (f", {motion}" if motion else "")
    return said.strip(" ,")


def _noun(words: Words, meaning: str | None, colour: str | None, rng: random.Random) -> str:
    if meaning is None:
        return ""
    word = rng.choice(words[meaning])
    said = f"{colour} {word}" if colour else word
    if word in PLURALS:
        return said
    return f"an {said}" if said[0] in "aeiou" else f"a {said}"


def gibberish(rng: random.Random) -> str:
    """Words that mean nothing here."""
    words = range(rng.randint(1, 5))
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in words)


# ---- Motion ---------------------------------------------------------------------------------------------------------

VELOCITY = {"left": (-SPEED, 0.0), "right": (SPEED, 0.0), "rising": (0.0, -SPEED), "sinking": (0.0, SPEED)}


def poses(motion: str | None, start: tuple[float, float], frames: int) -> Iterator[Pose]:
    """The thing in one frame after the other; in frame 0 it is at `start`."""
    dx, dy = VELOCITY.get(motion or "still", (0.0, 0.0))
    for t in range(frames):
        swing = PULSE * math.sin(2 * math.pi * t / CHUNK_FRAMES) if motion == "pulsing" else 0.0
        yield Pose((start[0] + t * dx) % WIDTH, (start[1] + t * dy) % 1.0, RADIUS * (1 + swing))


def start_of(u: float, v: float) -> tuple[float, float]:
    """Where a thing starts: `u` and `v` in [0, 1] say where in the area."""
    (x, y), (width, height) = START, START_SPAN
    return x + width * (u - 0.5), y + height * (v - 0.5)


# ---- Pictures -------------------------------------------------------------------------------------------------------


def masks(shape: str | None, ground: str | None, poses: list[Pose], size: tuple[int, int], first: int = 0) -> Tensor:
    """How much of each colour each pixel has, [T, M, H, W], fp32, for `poses` of the thing, one a frame.

    `size`: width and height in pixels; `first`: the number of the first frame, by which the sea's waves go.
    """
    width, height = size
    x_W = (torch.arange(width) + 0.5) / width * WIDTH
    y_H = (torch.arange(height) + 0.5) / height
    t_T = torch.arange(first, first + len(poses), dtype=torch.float32)
    sky_HW, light_THW = _ground(ground, x_W, y_H, t_T)
    x, y, radius = (torch.tensor([getattr(pose, key) for pose in poses])[:, None, None] for key in ("x", "y", "radius"))
    dx = ((x_W - x + WIDTH / 2) % WIDTH - WIDTH / 2).abs()
    dy = ((y_H[:, None] - y + 0.5) % 1.0 - 0.5).abs()
    if shape == "square":
        distance = torch.maximum(dx, dy) * 1.13
    elif shape == "diamond":
        distance = (dx + dy) * 0.8
    else:
        distance = (dx.square() + dy.square()).sqrt()
    beyond = distance - radius
    glow = GLOW * torch.exp(-(beyond.clamp(min=0) / GLOW_REACH).square())
    thing = torch.maximum((0.5 - beyond / EDGE).clamp(0, 1), glow)
    behind = 1 - thing
    fall = (y_H / HORIZON).clamp(max=1)[:, None]
    return torch.stack(
        [behind * sky_HW * (1 - fall), behind * sky_HW * fall, thing, behind * (1 - sky_HW) * light_THW], dim=1
    )


def _ground(ground: str | None, x_W: Tensor, y_H: Tensor, t_T: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sky is [H, W], and the brightness of the ground [T, H, W] or [H, W]."""
    y = y_H[:, None]
    edge = HORIZON + (0.07 * torch.sin(2 * math.pi * x_W) if ground == "hills" else torch.zeros_like(x_W))
    depth = ((y - edge) / (1 - HORIZON)).clamp(0, 1)
    light = 0.95 - 0.3 * depth
    if ground == "sea":
        t = t_T[:, None, None]
        light = light + 0.12 * torch.sin(2 * math.pi * (x_W + 2 * depth - t / CHUNK_FRAMES))
    elif ground == "field":
        light = light + 0.1 * torch.sin(2 * math.pi * 2 * depth.sqrt()) * depth.sqrt()
    return (0.5 - (y - edge) / EDGE).clamp(0, 1), light


def paint(masks_TMHW: Tensor, colours_M3: Tensor) -> Tensor:
    """Pictures [T, 3, H, W] in [0, 1]."""
    return torch.einsum("tmhw,mc->tchw", masks_TMHW, colours_M3)


def film(scene: Scene, start: tuple[float, float], frames: int, size: tuple[int, int] = SIZE) -> Tensor:
    """A true video of a scene: [T, 3, H, W] in [0, 1]."""
    return paint(masks(scene.shape, scene.ground, list(poses(scene.motion, start, frames)), size), scene.colours())
