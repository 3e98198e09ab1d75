"""What a video shows of the demo model's small world, and whether that is what a prompt asks for. It sees only pixels.

Analysis by synthesis: a picture of this world is a sum of masks, each times a colour. So for any shape, ground and pose
of the thing the best colours follow by least squares, and what they leave unexplained says how good a guess it was.
The best pose of a coarse grid is refined by Gauss-Newton steps, and the best shape and ground at the refined pose are
what the picture shows. The prompt comes in only when that is done.

Shapes: N sampled frames, P pixels of a small picture, K masks of a basis, M the four masks of a picture, G poses of the
grid, B guesses.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_core.config import CHUNK_FRAMES
from helios_core.demo.words import COLOURS, GROUNDS, SHAPES, Scene, read_prompt
from helios_core.demo.world import MASKS, PULSE, RADIUS, SPEED, VELOCITY, WIDTH, Pose, colours, masks
from helios_core.errors import InvalidInput

EVERY = 4  # one frame of so many is looked at; meanwhile the thing moves by a quarter of its radius
SPAN = 12  # frames over which a velocity is measured

# A picture of this world, and a thing in it, count as seen from these shares of the variance on. Measured: true films
# after x264 have at least 0.98 and 0.94, blurred by an eighth of the radius 0.95 and 0.63; noise of any grain has at
# most 0.31 and 0.25, and a film without a thing at most 0.07 for it.
WORLD_SEEN, THING_SEEN = 0.6, 0.5
STEADY = 0.75  # share of the velocities that must be those of a motion

SMALL = (64, 32)  # width and height at which pictures are compared
GRID = 1 / 8  # heights between the poses that are tried first
STEPS, NUDGE, STRIDE = 4, 0.01, 0.06  # Gauss-Newton: steps, to differentiate by, the longest step (in heights)
RADII = (0.1, 0.4)  # the refined radius stays within
BATCH = 64  # pictures at a time, for memory's sake

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Fit:
    """What the sampled frames of a video show, each by itself.

    `frame_N`: their numbers; `pose_N3`: x, y and radius of the thing, in heights; `colours_NM3`: of the four masks,
    RGB, about [0, 1]; `world_N`: the share of a picture's variance that is explained; `thing_N`: the share that the
    thing explains of what ground and sky alone leave unexplained.
    """

    frame_N: npt.NDArray[np.int64]
    shape_N: npt.NDArray[np.str_]
    ground_N: npt.NDArray[np.str_]
    pose_N3: Array
    colours_NM3: Array
    world_N: Array
    thing_N: Array

    def window(self, start: int, stop: int) -> Fit:
        """That of the frames start, ..., stop - 1 of the video."""
        return self.only((self.frame_N >= start) & (self.frame_N < stop))

    def only(self, chosen_N: Flags) -> Fit:
        return Fit(**{name: value[chosen_N] for name, value in vars(self).items()})

    @property
    def world_seen_N(self) -> Flags:
        """In which frames a picture of this world is seen."""
        return self.world_N >= WORLD_SEEN

    @property
    def thing_seen_N(self) -> Flags:
        """In which of these there is a thing."""
        return self.world_seen_N & (self.thing_N >= THING_SEEN)


@dataclass(frozen=True)
class Track:
    """How the thing moves, over the frames in which it is seen.

    `frame_N`: their numbers; `x_N`, `y_N`, `radius_N`: in heights. The positions go on where the picture closes on
    itself, so that a thing that leaves on the right side comes to x = 2 and more.
    """

    frame_N: npt.NDArray[np.int64]
    x_N: Array
    y_N: Array
    radius_N: Array

    @property
    def velocities(self) -> Array:
        """[pairs, 2], x and y in heights per frame: between all frames that are SPAN apart, in the order of time."""
        i, j = np.nonzero(self.frame_N == self.frame_N[:, None] + SPAN)
        return np.stack([self.x_N[j] - self.x_N[i], self.y_N[j] - self.y_N[i]], axis=1) / SPAN

    @property
    def swing(self) -> float:
        """Half of the way from the small radii to the large ones (10th and 90th percentile), in RADIUS."""
        low, high = np.quantile(self.radius_N, [0.1, 0.9])
        return float(high - low) / 2 / RADIUS


@dataclass(frozen=True)
class Score:
    """What a video, or a window of it, shows, against what its prompt names.

    `found`: None for what cannot be made out, and for what looks as it is painted when a prompt leaves it open;
    `right`: for each attribute that the prompt names; `world`, `thing`: the medians of Fit's.
    """

    found: Scene
    right: dict[str, bool]
    world: float
    thing: float
    track: Track

    @property
    def all_right(self) -> bool:
        return all(self.right.values())

    @property
    def percent(self) -> float:
        """How many of the named attributes are right; 100 if none is named."""
        return 100 * sum(self.right.values()) / len(self.right) if self.right else 100.0


def score(frames: Iterable[Any], prompt: str) -> Score:
    """A whole video against one prompt; `frames` as for `fit`."""
    return judge(fit(frames), prompt)


def score_windows(frames: Iterable[Any], windows: Sequence[tuple[int, int, str]]) -> list[Score]:
    """Windows (start, stop, prompt) of a video, each from frame `start` to before `stop`; `frames` as for `fit`.

    Motion is judged within the window, which takes 16 frames at least, and 24 to tell pulsing from still.
    """
    shown = fit(frames)
    return [judge(shown.window(start, stop), prompt) for start, stop, prompt in windows]


def judge(shown: Fit, prompt: str) -> Score:
    """What frames show together, against a prompt: the shape and ground of most, the medians of the colours."""
    found = _scene(shown)
    return Score(
        found=found,
        right={name: getattr(found, name) == value for name, value in read_prompt(prompt).named.items()},
        world=float(np.median(shown.world_N)) if len(shown.frame_N) else 0.0,
        thing=float(np.median(shown.thing_N)) if len(shown.frame_N) else 0.0,
        track=track(shown),
    )


def track(shown: Fit) -> Track:
    seen = shown.only(shown.thing_seen_N)
    x_N, y_N, radius_N = seen.pose_N3.T
    return Track(seen.frame_N, np.unwrap(x_N, period=WIDTH), np.unwrap(y_N, period=1.0), radius_N)


def _scene(shown: Fit) -> Scene:
    found: dict[str, str | None] = {}
    if 2 * shown.world_seen_N.sum() > len(shown.frame_N):
        world = shown.only(shown.world_seen_N)
        found["ground"] = _most(world.ground_N)
        found["ground_colour"] = _nearest("ground_colour", world.colours_NM3)
        found["sky_colour"] = _nearest("sky_colour", world.colours_NM3)
    if 2 * shown.thing_seen_N.sum() > len(shown.frame_N):
        thing = shown.only(shown.thing_seen_N)
        found["shape"] = _most(thing.shape_N)
        found["object_colour"] = _nearest("object_colour", thing.colours_NM3)
        found["motion"] = _motion(track(thing))
    return Scene(**found)


def _most(kinds_N: npt.NDArray[np.str_]) -> str:
    return str(Counter(kinds_N.tolist()).most_common(1)[0][0])


PAINTED = {"sky_colour": slice(0, 2), "object_colour": slice(2, 3), "ground_colour": slice(3, 4)}  # attribute ▸ masks


def _nearest(attribute: str, colours_NM3: Array) -> str | None:
    """The word whose paint is nearest to the median colours; None if that is the paint of what is left open."""
    painted = PAINTED[attribute]
    found = np.median(colours_NM3, axis=0)[painted]
    names = [*COLOURS, None]  # white before None: a thing without a colour is painted white
    off = [float(np.linalg.norm(colours(Scene(**{attribute: name})).numpy()[painted] - found)) for name in names]
    return names[off.index(min(off))]


MOVES = ("still", *VELOCITY)


def _motion(track: Track) -> str | None:
    """The motion whose velocity, give or take half of SPEED, the thing has nearly always, and the swing to it."""
    off = np.array([np.linalg.norm(track.velocities - VELOCITY.get(motion, (0, 0)), axis=1) for motion in MOVES])
    if off.shape[1] == 0:
        return None
    steady = (off < SPEED / 2).mean(axis=1)
    motion = MOVES[steady.argmax()] if steady.max() >= STEADY else None
    if track.swing < PULSE / 3:
        return motion
    return "pulsing" if motion == "still" else None


# ---- One picture ----------------------------------------------------------------------------------------------------


def fit(frames: Iterable[Any]) -> Fit:
    """What every 4th frame shows; 10 ms of one core for each.

    `frames`: one [H, W, 3] after the other, RGB, uint8, arrays or tensors, W = 2 H; so one array [T, H, W, 3] will do.
    Raises InvalidInput if a frame is something else or there is none.
    """
    small = [_small(frame) for i, frame in enumerate(frames) if i % EVERY == 0]
    if not small:
        raise InvalidInput("video", "a video without frames", "one frame at least")
    batches = [_fit(torch.stack(small[i : i + BATCH])) for i in range(0, len(small), BATCH)]
    return Fit(np.arange(len(small)) * EVERY, *(np.concatenate(each) for each in zip(*batches, strict=True)))


def _small(frame_HWC: Any) -> Tensor:
    """[P, 3], fp32 in [0, 1]."""
    frame_HWC = torch.from_numpy(np.asarray(frame_HWC).copy())  # as torch warns of arrays that cannot be written to
    shape = tuple(frame_HWC.shape)
    if frame_HWC.dtype != torch.uint8 or len(shape) != 3 or shape[1:] != (2 * shape[0], 3):
        found = f"frames of {shape}, {str(frame_HWC.dtype).removeprefix('torch.')}"
        raise InvalidInput("video", found, "[H, W, 3], uint8, twice as wide as high, as the demo model's world is")
    frame_CHW = frame_HWC.permute(2, 0, 1).float() / 255
    return F.adaptive_avg_pool2d(frame_CHW, SMALL[::-1]).flatten(1).T


def _fit(picture_NP3: Tensor) -> tuple[npt.NDArray[Any], ...]:
    """shape_N, ground_N, pose_N3, colours_NM3, world_N, thing_N."""
    coarse_N3, ground_N = _coarse(picture_NP3)
    kinds, poses, paints, left = [], [], [], []
    for shape in SHAPES:
        pose_N3 = torch.empty_like(coarse_N3)
        for ground in set(ground_N):
            here_N = torch.tensor([each == ground for each in ground_N])
            pose_N3[here_N] = _refine(shape, ground, coarse_N3[here_N], picture_NP3[here_N])
        for ground in GROUNDS:
            rest_NP3, colours_NK3, _ = _solve(_basis(shape, ground, pose_N3), picture_NP3)
            kinds.append((shape, ground))
            poses.append(pose_N3)
            # Sky top, sky horizon, thing, and the ground, whose colour is the sum over its masks.
            sky, lights, thing = colours_NK3.tensor_split([2, -1], dim=1)
            paints.append(torch.cat([sky, thing, lights.sum(1, keepdim=True)], dim=1))
            left.append(_energy(rest_NP3))
    left_N, best_N = torch.stack(left).min(0)
    all_N = _energy(picture_NP3 - picture_NP3.mean(1, keepdim=True))
    bare_N = torch.stack([_energy(_solve(_backdrop(ground), picture_NP3)[0]) for ground in GROUNDS]).amin(0)
    best_BN = best_N, torch.arange(len(best_N))
    pose_N3 = torch.stack(poses)[best_BN]
    pose_N3[:, :2] %= torch.tensor([WIDTH, 1.0])
    numbers = pose_N3, torch.stack(paints)[best_BN], _explained(left_N, all_N), _explained(left_N, bare_N)
    shape_N, kind_N = np.array(kinds)[best_N.numpy()].T
    return shape_N, kind_N, *(each.double().numpy() for each in numbers)


def _energy(rest_NP3: Tensor) -> Tensor:
    return rest_NP3.square().sum((1, 2))


def _explained(left_N: Tensor, of_N: Tensor) -> Tensor:
    """How much of an energy is gone, as a share. Of one within the rounding to 8 bits nothing is."""
    nothing = SMALL[0] * SMALL[1] * 3 / 255**2
    return torch.where(of_N > nothing, 1 - left_N / of_N.clamp(min=nothing), 0).clamp(min=0)


def _basis(shape: str, ground: str, pose_N3: Tensor) -> Tensor:
    """The masks of which pictures can be the sums, [N, P, K]: the backdrop's behind the thing, and last the thing's."""
    thing_NHW = masks(shape, ground, [Pose(*pose) for pose in pose_N3.tolist()], SMALL)[:, MASKS.index("object")]
    thing_NP1 = thing_NHW.flatten(1)[..., None]
    return torch.cat([(1 - thing_NP1) * _backdrop(ground), thing_NP1], dim=2)


@functools.cache
def _backdrop(ground: str) -> Tensor:
    """The masks of sky top, sky horizon and ground with no thing before them, [P, 3], or [P, 5] for a sea.

    A sea's light at three times, a third of the period apart, spans that at any time.
    """
    nowhere = Pose(0.0, 0.0, -WIDTH)  # the radius so far below 0 that not even the glow is left
    top, horizon, _, ground_THW = masks("disc", ground, [nowhere] * CHUNK_FRAMES, SMALL).unbind(1)
    lights = ground_THW[:: CHUNK_FRAMES // 3] if ground == "sea" else ground_THW[:1]
    return torch.cat([top[:1], horizon[:1], lights]).flatten(1).T


def _solve(basis_NPK: Tensor, picture_NP3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares: what is left of the pictures, the colours [N, K, 3], the orthonormal basis."""
    Q, R = torch.linalg.qr(basis_NPK)
    along_NK3 = Q.mT @ picture_NP3
    return picture_NP3 - Q @ along_NK3, torch.linalg.solve_triangular(R, along_NK3, upper=True), Q


@functools.cache
def _grid() -> tuple[Tensor, list[Tensor]]:
    """The poses that are tried first, [G, 3], and for each ground the orthonormal bases, [G, P, K], of discs there."""
    radii = RADIUS * torch.tensor([0.75, 1.0, 1.25])
    pose_G3 = torch.cartesian_prod(torch.arange(0, WIDTH, GRID), torch.arange(0, 1, GRID), radii)
    return pose_G3, [torch.linalg.qr(_basis("disc", ground, pose_G3)).Q for ground in GROUNDS]


def _coarse(picture_NP3: Tensor) -> tuple[Tensor, list[str]]:
    """The best pose of the grid, [N, 3], and ground."""
    pose_G3, bases = _grid()
    along = [torch.einsum("gpk,npc->ngkc", Q_GPK, picture_NP3).square().sum((2, 3)) for Q_GPK in bases]
    best_N, names = torch.cat(along, dim=1).argmax(1), list(GROUNDS)
    return pose_G3[best_N % len(pose_G3)], [names[i] for i in (best_N // len(pose_G3)).tolist()]


def _refine(shape: str, ground: str, pose_N3: Tensor, picture_NP3: Tensor) -> Tensor:
    """Gauss-Newton over the pose, while the colours follow by least squares (variable projection)."""
    for _ in range(STEPS):
        rest_NP3, colours_NK3, Q = _solve(_basis(shape, ground, pose_N3), picture_NP3)
        slopes = []
        for nudge in NUDGE * torch.eye(3):
            change = _basis(shape, ground, pose_N3 + nudge) - _basis(shape, ground, pose_N3 - nudge)
            change_NP3 = change @ colours_NK3 / (2 * NUDGE)
            slopes.append((change_NP3 - Q @ (Q.mT @ change_NP3)).flatten(1))
        J = torch.stack(slopes, dim=2)
        H = J.mT @ J + 1e-4 * torch.eye(3)  # where no thing is there is no slope either
        step_N3 = torch.linalg.solve(H, J.mT @ rest_NP3.flatten(1)[:, :, None])[..., 0]
        pose_N3 = pose_N3 + step_N3.clamp(-STRIDE, STRIDE)
        pose_N3[:, 2].clamp_(*RADII)
    return pose_N3
