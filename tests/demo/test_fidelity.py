"""The meter of approximations: its measures by hand, and that it tells them apart."""

from __future__ import annotations

import numpy as np
import pytest
from rich.progress import Progress

from helios_core.demo.fidelity import WAYS, compare, psnr, ssim, table

GREY = np.full((2, 16, 24, 3), 100, np.uint8)


def test_psnr() -> None:
    assert psnr(GREY, GREY) == 100.0
    assert psnr(GREY + np.uint8(5), GREY) == pytest.approx(10 * np.log10(255**2 / 25), abs=1e-4)


def test_ssim() -> None:
    noise = np.random.default_rng(0).integers(0, 256, GREY.shape, np.uint8)
    assert ssim(noise, noise) == pytest.approx(1.0)
    assert ssim(255 - noise, noise) < -0.5  # the same structure, upside down
    # Of flat pictures the structures are equal, so only lightness counts: (2 x y + c) / (x^2 + y^2 + c).
    x, y, c = 100 / 255, 120 / 255, 0.01**2
    expected = (2 * x * y + c) / (x * x + y * y + c)
    assert ssim(GREY, GREY + np.uint8(20)) == pytest.approx(expected, abs=1e-6)


def test_every_way_is_near_the_exact_one_and_none_is_it() -> None:
    with Progress(disable=True) as progress:
        found = compare(prompts=1, chunks=1, progress=progress)
    assert list(found) == list(WAYS)
    exact, *others = found.values()
    assert (exact.psnr, exact.right) == ([100.0], [100.0])
    for each in others:
        assert 20 < each.psnr[0] < 90 and 0.9 < each.ssim[0] < 1
    assert table(found).row_count == len(WAYS)
