"""How well a video hangs together over time, whatever it shows: the figures that users of long video ask for.

They say nothing about whether the video is the right one; a still picture is perfectly coherent. A frame's features are
its colours, a joint histogram of 8 x 8 x 8 bins of RGB, and its edges, a histogram of 8 directions of the gradient of
luma weighted by its length. Neither is any network's, so the figures are the same everywhere.
"""

# T = frames, H = height, W = width, C = red, green, blue

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from helios_core.config import CHUNK_FRAMES, NATIVE_FPS
from helios_core.errors import InvalidInput

BINS = 8  # of each colour channel, and of directions
LEAST_CHANGE = 0.1  # grey levels from frame to frame: less than that is the codec's
LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))  # of linear sRGB
WHITE = (0.9505, 1.0, 1.089)  # D65

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Coherence:
    """`frames`, `fps`, `chunk_frames`: of the video.

    `similarity`: of the first and the last second, cosine in [0, 1]. The features of a second are the square roots of
    its mean histograms, so this is the mean of the two histograms' Bhattacharyya coefficients.
    `sharpness`: for each whole second, the variance of the Laplacian of luma, in squared grey levels, its frames' mean.
    `drift`: for each whole second, the CIE76 difference (Delta E) of its mean L*a*b* colour from the first second's;
    about 2 can just be seen.
    `changes`: from each frame to the next, the mean absolute difference of pixels, in grey levels (of 255).
    """

    frames: int
    fps: float
    chunk_frames: int
    similarity: float
    sharpness: tuple[float, ...]
    drift: tuple[float, ...]
    changes: tuple[float, ...]

    @property
    def seams(self) -> tuple[float, ...]:
        """The changes at the boundaries of chunks."""
        return self.changes[self.chunk_frames - 1 :: self.chunk_frames]

    @property
    def seam_strength(self) -> float | None:
        """The mean change at the boundaries of chunks in units of the median change inside: 1 is no seam.

        None for a video of one chunk.
        """
        inside = [change for i, change in enumerate(self.changes, 1) if i % self.chunk_frames]
        if not self.seams:
            return None
        return float(np.mean(self.seams) / max(np.median(inside), LEAST_CHANGE))


def coherence(frames: Iterable[Any], fps: float = NATIVE_FPS, chunk_frames: int = CHUNK_FRAMES) -> Coherence:
    """Measures a video of at least two seconds.

    `frames`: one [H, W, 3] after the other, RGB, uint8, arrays or tensors, all of one size of 3x3 or more, so one array
    [T, H, W, 3] will do; a second of them is held. `fps`: frames per second; `chunk_frames`: from 2 on.
    Raises InvalidInput if they are something else.
    """
    if not (math.isfinite(fps) and fps >= 1):
        raise InvalidInput("fps", fps, "a number from 1 on")
    if chunk_frames < 2:
        raise InvalidInput("chunk_frames", chunk_frames, "2 or more")
    second = round(fps)  # frames
    first: list[npt.NDArray[np.uint8]] = []
    last = deque[npt.NDArray[np.uint8]](maxlen=second)
    sharpness, lab, changes = [], [], []
    for frame in frames:
        frame_HWC = _checked(np.asarray(frame), like=last[-1] if last else None)
        if last:
            changes.append(float(np.abs(frame_HWC.astype(np.int16) - last[-1]).mean()))
        sharpness.append(float(_laplacian(_luma(frame_HWC)).var()))
        lab.append(_mean_lab(frame_HWC))
        last.append(frame_HWC)
        if len(first) < second:
            first.append(frame_HWC)
    count = len(lab)
    if count < 2 * second:
        raise InvalidInput("video", f"a video of {count} frames ({count / fps:.2f} s)", "2 s or more")
    spans = [slice(start, stop) for start, stop in whole_seconds(count, fps)]
    colours = [np.mean(lab[span], axis=0) for span in spans]
    return Coherence(
        frames=count,
        fps=fps,
        chunk_frames=chunk_frames,
        similarity=float(_features(first) @ _features(list(last))),
        sharpness=tuple(float(np.mean(sharpness[span])) for span in spans),
        drift=tuple(float(np.linalg.norm(colour - colours[0])) for colour in colours),
        changes=tuple(changes),
    )


def whole_seconds(frames: int, fps: float) -> list[tuple[int, int]]:
    """For each second its first frame and the one after its last: frame i is of second i // fps. A rest is left out."""
    return list(itertools.pairwise(math.ceil(second * fps) for second in range(int(frames / fps) + 1)))


def _checked(frame_HWC: npt.NDArray[Any], like: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
    shape = frame_HWC.shape
    if frame_HWC.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or min(shape[:2]) < 3:
        raise InvalidInput("video", f"frames of {shape}, {frame_HWC.dtype}", "[H, W, 3], uint8, 3x3 pixels or more")
    if like is not None and shape != like.shape:
        raise InvalidInput("video", f"a video whose frames change from {like.shape} to {shape}", "one size")
    return frame_HWC


def _luma(frame_HWC: npt.NDArray[np.uint8]) -> Array:
    """[H, W], in [0, 255]."""
    return np.asarray(frame_HWC.astype(np.float32) @ np.array(LUMA, np.float32))


def _laplacian(luma_HW: Array) -> Array:
    middle = luma_HW[1:-1, 1:-1]
    around = luma_HW[:-2, 1:-1] + luma_HW[2:, 1:-1] + luma_HW[1:-1, :-2] + luma_HW[1:-1, 2:]
    return np.asarray(around - 4 * middle)


def _mean_lab(frame_HWC: npt.NDArray[np.uint8]) -> Array:
    """[3]: the mean of the pixels' L*a*b*, from sRGB under D65."""
    grey = np.arange(256, dtype=np.float32) / 255
    linear = np.where(grey <= 0.04045, grey / 12.92, ((grey + 0.055) / 1.055) ** 2.4).astype(np.float32)
    xyz_HWC = linear[frame_HWC] @ (np.array(XYZ, np.float32) / np.array(WHITE, np.float32)[:, None]).T
    root_HWC = np.where(xyz_HWC > 0.008856, np.cbrt(xyz_HWC), 7.787 * xyz_HWC + 16 / 116)
    x, y, z = root_HWC.reshape(-1, 3).mean(0, dtype=np.float64)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)], np.float32)


def _features(frames: list[npt.NDArray[np.uint8]]) -> Array:
    """Of a second: a vector of length 1, of which colours and edges have half each."""
    colours = np.zeros(BINS**3)
    edges = np.full(BINS, 1e-6)  # a picture without edges has none in any direction
    for frame_HWC in frames:
        red, green, blue = (frame_HWC // (256 // BINS)).astype(np.int32).transpose(2, 0, 1)
        colours += np.bincount(((red * BINS + green) * BINS + blue).ravel(), minlength=BINS**3)
        dy_HW, dx_HW = np.gradient(_luma(frame_HWC))
        direction_HW = ((np.arctan2(dy_HW, dx_HW) / (2 * np.pi) + 0.5 / BINS) % 1 * BINS).astype(np.int32) % BINS
        edges += np.bincount(direction_HW.ravel(), np.hypot(dx_HW, dy_HW).ravel(), minlength=BINS)
    return np.sqrt(np.concatenate([colours / colours.sum(), edges / edges.sum()]) / 2).astype(np.float32)
