"""The VAE's norms: the CPU's against torch's own, and the GPU's kernels against the CPU's, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helios_core.vae.kernels import launch_rms_norm_silu
from helios_core.vae.norm import SHORTEST, rms_norm, rms_norm_silu

SHAPES = [(1, 96, 1, 3, 5), (2, 17, 2, 4, 6), (1, 384, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [False, True])
def test_on_a_cpu_the_norm_is_torch_s_to_the_last_bit(shape: tuple[int, ...], last: bool) -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(shape), torch.rand(shape[1], 1, 1, 1) + 0.5
    expected = F.normalize(x, dim=1) * shape[1] ** 0.5 * gamma
    assert torch.equal(rms_norm(x.contiguous(memory_format=torch.channels_last_3d) if last else x, gamma), expected)
    out = torch.empty(shape)
    rms_norm_silu(x, gamma, out)
    assert torch.equal(out, F.silu(expected))


def test_vectors_of_no_length_stay_so() -> None:
    x = torch.zeros(1, 8, 1, 2, 2, requires_grad=True)
    unit = rms_norm(x, torch.ones(8, 1, 1, 1))
    unit.sum().backward()
    assert not unit.any()
    assert x.grad is not None and x.grad.isfinite().all()


def test_bf16_is_rounded_once() -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(1, 24, 1, 4, 4).bfloat16(), (torch.rand(24, 1, 1, 1) + 0.5).bfloat16()
    out = torch.empty_like(x)
    rms_norm_silu(x, gamma, out)
    assert torch.equal(out, F.silu(rms_norm(x.float(), gamma.float())).bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_computes_what_the_cpu_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """bf16: within one unit in the last place of the plain form in fp32."""
    b, c, t, h, w = shape
    torch.manual_seed(0)
    x, gamma = 3 * torch.randn(shape), torch.rand(c, 1, 1, 1) + 0.5
    x[0, :, 0, 0, 0] = 0
    x, gamma = x.to(dtype), gamma.to(dtype)
    expected = torch.empty(shape)
    rms_norm_silu(x.float(), gamma.float(), expected)
    room = torch.full((b, c, 2 + t, h, w), 7.0, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    launch_rms_norm_silu(x, gamma, room[:, :, 2:], SHORTEST)
    assert (room[:, :, :2] == 7).all()
    if dtype == torch.float32:
        assert (room[:, :, 2:] - expected).abs().max() <= 2e-6 * expected.abs().max()
    else:
        apart = room[:, :, 2:].contiguous().view(torch.int16).int() - expected.bfloat16().view(torch.int16).int()
        assert apart.abs().max() <= 1


def test_the_kernel_wants_channels_last() -> None:
    x = torch.ones(SHAPES[0])
    with pytest.raises(ValueError, match="needed: channels last"):
        launch_rms_norm_silu(x, torch.ones(96, 1, 1, 1), torch.empty(SHAPES[0]), SHORTEST)
