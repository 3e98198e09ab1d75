"""How near approximate samplers come to the exact one, and whether they drift away from it: on the demo model.

python -m helios_core.demo.fidelity [--prompts N] [--chunks N] [--json FILE]     (or: make fidelity)

Each way of sampling makes the same videos, from the same seeds, chunk after chunk from its own past. Their frames are
compared with those of the exact sampler with 2,2,2 steps; what fewer exact steps cost is the yardstick.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from helios_core.bench.command import commit, cpu
from helios_core.config import CHUNK_FRAMES, EXACT, NATIVE_FPS, Approximations
from helios_core.demo import world
from helios_core.demo.evaluate import CHUNK_SECONDS, held_out
from helios_core.demo.score import score
from helios_core.helios import Helios

WAYS: dict[str, tuple[tuple[int, ...], Approximations]] = {
    "exact, 2,2,2": ((2, 2, 2), EXACT),  # what the others are compared with
    "exact, 1,1,1": ((1, 1, 1), EXACT),
    "fp8, 2,2,2": ((2, 2, 2), Approximations(fp8=True)),
    "history once a stage, 2,2,2": ((2, 2, 2), Approximations(history_refresh="stage")),
    "history once a chunk, 2,2,2": ((2, 2, 2), Approximations(history_refresh="chunk")),
    "fp8 and history once a chunk, 2,2,2": ((2, 2, 2), Approximations(fp8=True, history_refresh="chunk")),
    "fp8 and history once a chunk, 1,1,1": ((1, 1, 1), Approximations(fp8=True, history_refresh="chunk")),
}
SSIM_WINDOW, SSIM_C1, SSIM_C2 = 8, 0.01**2, 0.03**2


@dataclass(frozen=True)
class Fidelity:
    """Of one way. By chunk, means over the videos: `psnr` in dB and `ssim` of luma against the exact frames, and
    `right`, the percentage of videos of which a chunk shows all that the prompt names."""

    psnr: list[float]
    ssim: list[float]
    right: list[float]


def psnr(ours_THWC: NDArray[np.uint8], exact_THWC: NDArray[np.uint8]) -> float:
    """Of all pixels and channels together, in dB; 100 for equal ones."""
    error = np.square(ours_THWC.astype(np.float32) - exact_THWC.astype(np.float32)).mean()
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(ours_THWC: NDArray[np.uint8], exact_THWC: NDArray[np.uint8]) -> float:
    """Structural similarity (Wang et al. 2004, equation 13) of luma, over all windows of 8 x 8 pixels, their mean."""
    x, y = (_luma(frames) for frames in (ours_THWC, exact_THWC))

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, SSIM_WINDOW, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    cov = mean(x * y) - mean_x * mean_y
    lightness = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * cov + SSIM_C2) / (var_x + var_y + SSIM_C2)
    return float((lightness * structure).mean())


def _luma(frames_THWC: NDArray[np.uint8]) -> Tensor:
    """BT.709, in [0, 1], fp64 [T, 1, H, W]."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    return (torch.from_numpy(frames_THWC).double() @ weights / 255)[:, None]


def compare(prompts: int, chunks: int, progress: Progress) -> dict[str, Fidelity]:
    """All of WAYS, on `prompts` held-out prompts with `chunks` chunks each."""
    asked = [prompt for _, prompt in held_out(prompts, seed=3)]
    seeds = [random.Random(prompt).randrange(2**31) for prompt in asked]
    exact: list[NDArray[np.uint8]] = []
    found = {}
    for way, (steps, approximations) in WAYS.items():
        helios = Helios.load("demo", approximations=approximations)
        videos = []
        for prompt, seed in progress.track(list(zip(asked, seeds, strict=True)), description=way):
            stream = helios.stream(
                prompt,
                size="{}x{}".format(*world.SIZE),
                seconds=chunks * CHUNK_SECONDS,
                seed=seed,
                steps=steps,
                amplify_first_chunk=False,
            )
            videos.append(np.concatenate([chunk.frames for chunk in stream]))
        exact = exact or videos
        parts = [slice(k * CHUNK_FRAMES, (k + 1) * CHUNK_FRAMES) for k in range(chunks)]
        pairs = list(zip(videos, exact, asked, strict=True))
        found[way] = Fidelity(
            psnr=[float(np.mean([psnr(ours[part], its[part]) for ours, its, _ in pairs])) for part in parts],
            ssim=[float(np.mean([ssim(ours[part], its[part]) for ours, its, _ in pairs])) for part in parts],
            right=[
                float(np.mean([100 * score(ours[part], prompt).all_right for ours, _, prompt in pairs]))
                for part in parts
            ],
        )
    return found


def table(found: dict[str, Fidelity]) -> Table:
    """A row for each way: over all chunks, and in the first and the last."""
    drawn = Table("way", "PSNR, dB", "first chunk", "last", "SSIM", "first chunk", "last", "all right, %")
    for way, each in found.items():
        numbers = [f"{value:.1f}" for value in (np.mean(each.psnr), each.psnr[0], each.psnr[-1])]
        numbers += [f"{value:.3f}" for value in (np.mean(each.ssim), each.ssim[0], each.ssim[-1])]
        drawn.add_row(way, *numbers, f"{np.mean(each.right):.0f}")
    return drawn


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=4, help="held out from training")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    with Progress(console=Console(stderr=True)) as progress:
        found = compare(options.prompts, options.chunks, progress)
    Console(width=140).print(table(found))
    setting = {
        "command": " ".join(["python -m helios_core.demo.fidelity", *arguments]),
        "hardware": cpu(),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": "demo, fp32, {}x{}".format(*world.SIZE),
        "prompts": options.prompts,
        "chunks": options.chunks,
        "frames per second of video": NATIVE_FPS,
    }
    document = {**setting, "ways": {way: asdict(each) for way, each in found.items()}}
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
