"""The demo model's small world in pictures: how a scene moves and how it is drawn.

A picture is one thing in front of a ground under a sky. It is the sum of four masks, each times a colour: the sky's
top, the sky's horizon, the thing, the ground. All that moves has a period of one, two or four chunks.

Lengths are in picture heights, the origin top left: a picture is 1 high and 2 wide, whatever its pixels; and it closes
on itself, so that what leaves on one side comes in on the other. Colours are RGB in [0, 1].

Shapes: M the four masks, T frames, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_core.config import CHUNK_FRAMES
from helios_core.demo.words import COLOURS, Colour, Scene

WIDTH = 2.0
SIZE = (256, 128)  # width and height at which the demo model is at home, in pixels
MASKS = ("sky top", "sky horizon", "object", "ground")

# What a prompt leaves open.
OBJECT_COLOUR = COLOURS["white"]
GROUND_COLOUR: Colour = (0.44, 0.43, 0.47)
SKY_COLOURS: tuple[Colour, Colour] = ((0.12, 0.14, 0.24), (0.44, 0.44, 0.55))  # top and horizon: dusk

HORIZON = 0.66
RADIUS = 0.27
START = (1.0, 0.34)  # where the thing is in the first frame, give or take
START_SPAN = (0.36, 0.08)  # as wide and high is the area in which the seed puts it
SPEED = 1 / 66  # heights per frame: once across in 132 frames, once up in 66
PULSE = 0.3  # by this share the radius grows and shrinks
HILL, WAVE, FURROW = 0.12, 0.22, 0.22  # how high hills are; how light and dark a sea's waves and a field's furrow
EDGE, GLOW, GLOW_REACH = 0.02, 0.3, 0.08  # the edge is at least a pixel wide


@dataclass(frozen=True)
class Pose:
    """Where the thing is in a frame (its centre) and how large (its radius)."""

    x: float
    y: float
    radius: float = RADIUS


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
    thing = torch.maximum((0.5 - beyond / max(EDGE, 1 / height)).clamp(0, 1), glow)
    behind = 1 - thing
    fall = (y_H / HORIZON).clamp(max=1)[:, None]
    return torch.stack(
        [behind * sky_HW * (1 - fall), behind * sky_HW * fall, thing, behind * (1 - sky_HW) * light_THW], dim=1
    )


def _ground(ground: str | None, x_W: Tensor, y_H: Tensor, t_T: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sky is [H, W], and the brightness of the ground [T, H, W] or [H, W]."""
    y = y_H[:, None]
    edge = HORIZON + (HILL * torch.sin(2 * math.pi * x_W) if ground == "hills" else torch.zeros_like(x_W))
    depth = ((y - edge) / (1 - HORIZON)).clamp(0, 1)
    light = 0.95 - 0.3 * depth
    if ground == "sea":
        t = t_T[:, None, None]
        light = light - 0.1 + WAVE * torch.sin(2 * math.pi * (x_W + 0.5 * depth - t / CHUNK_FRAMES))
    elif ground == "field":
        light = light - FURROW * torch.sin(2 * math.pi * depth)
    return (0.5 - (y - edge) / max(EDGE, 1 / len(y_H))).clamp(0, 1), light


def colours(scene: Scene) -> Tensor:
    """[M, 3], of the four masks."""
    top, horizon = SKY_COLOURS
    if scene.sky_colour is not None:
        sky = COLOURS[scene.sky_colour]
        top, horizon = tuple(0.6 * c for c in sky), tuple(0.75 * c + 0.25 for c in sky)
    thing = OBJECT_COLOUR if scene.object_colour is None else COLOURS[scene.object_colour]
    ground = GROUND_COLOUR if scene.ground_colour is None else COLOURS[scene.ground_colour]
    return torch.tensor([top, horizon, thing, ground])


def paint(masks_TMHW: Tensor, colours_M3: Tensor) -> Tensor:
    """Pictures [T, 3, H, W] in [0, 1], but for crests of a bright sea, which have up to 1.03."""
    return torch.einsum("tmhw,mc->tchw", masks_TMHW, colours_M3)


def film(scene: Scene, start: tuple[float, float], frames: int, size: tuple[int, int] = SIZE) -> Tensor:
    """A true video of a scene: [T, 3, H, W], in the range of `paint`."""
    return paint(masks(scene.shape, scene.ground, list(poses(scene.motion, start, frames)), size), colours(scene))
