"""The VAE by itself: what it promises about frames, shapes and state. tests/parity compares the numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor, nn

from helios_core import weights
from helios_core.checkpoints import Checkpoint
from helios_core.config import VaeConfig
from helios_core.vae import norm
from helios_core.vae.latents import LATENTS_PER_PASS, decode_chunk, denormalise, normalise, to_i420, to_uint8
from helios_core.vae.model import Attention, Doubling, MidBlock, ResidualBlock, Upsample, WanVae

TINY = VaeConfig(base_dim=4, num_res_blocks=1)
TINY_FOLDED = VaeConfig(
    base_dim=4,
    num_res_blocks=1,
    dim_mult=(1, 2, 4),
    temperal_downsample=(True, True),
    patch_size=2,
    in_channels=12,
    out_channels=12,
)


@pytest.fixture(scope="module", params=[TINY, TINY_FOLDED], ids=["plain", "folded"])
def vae(request: pytest.FixtureRequest) -> WanVae:
    torch.manual_seed(0)
    return WanVae(request.param).requires_grad_(False)


def latents(seed: int, t: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, t, 4, 6, generator=torch.Generator().manual_seed(seed))


def video(seed: int, t: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, t, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_decoding_frame_by_frame_equals_the_whole(vae: WanVae) -> None:
    z = latents(seed=1, t=4, batch=2)
    frames = list(vae.decode_frames(z))
    assert [f.shape for f in frames] == [(2, 3, 1, 32, 48)] + [(2, 3, 4, 32, 48)] * 3
    assert torch.equal(torch.cat(frames, dim=2), vae.decode(z))


@pytest.mark.parametrize("per_pass", [2, 3, 8])
def test_more_latents_per_pass_give_the_same_frames(vae: WanVae, per_pass: int) -> None:
    z = latents(seed=1, t=6)
    frames = list(vae.decode_frames(z, per_pass))
    assert [f.shape[2] for f in frames] == {2: [1, 8, 8, 4], 3: [1, 12, 8], 8: [1, 20]}[per_pass]
    torch.testing.assert_close(torch.cat(frames, dim=2), vae.decode(z), rtol=0, atol=2e-6)


def test_one_latent_is_one_frame(vae: WanVae) -> None:
    assert [f.shape for f in vae.decode_frames(latents(seed=1, t=1), per_pass=2)] == [(1, 3, 1, 32, 48)]


def test_channels_stay_last_from_layer_to_layer(vae: WanVae) -> None:
    last = copy.deepcopy(vae)
    last.lay_channels_last()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    lie_so = []

    def note(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        lie_so.extend(x.is_contiguous(memory_format=formats[x.dim()]) for x in (given[0], made))

    layers = [x for x in last.modules() if isinstance(x, ResidualBlock | Upsample | Doubling | MidBlock | Attention)]
    for layer in layers:
        layer.register_forward_hook(note)
    z, frames = latents(seed=1, t=3), video(seed=1, t=9)
    torch.testing.assert_close(last.decode(z), vae.decode(z), rtol=0, atol=1e-5)
    torch.testing.assert_close(last.encode(frames)[0], vae.encode(frames)[0], rtol=0, atol=1e-5)
    assert len(lie_so) >= 2 * len(layers)
    assert all(lie_so)


def test_interleaved_decodes_do_not_disturb_each_other(vae: WanVae) -> None:
    a, b = latents(seed=1, t=4), latents(seed=2, t=4)
    expected_a, expected_b = list(vae.decode_frames(a)), list(vae.decode_frames(b))
    for i, (frame_a, frame_b) in enumerate(zip(vae.decode_frames(a), vae.decode_frames(b), strict=True)):
        vae.encode(video(seed=i, t=5))
        assert torch.equal(frame_a, expected_a[i])
        assert torch.equal(frame_b, expected_b[i])


def test_an_abandoned_decode_leaves_nothing_behind(vae: WanVae) -> None:
    expected = vae.decode(latents(seed=1, t=3))
    next(vae.decode_frames(latents(seed=2, t=3)))
    assert torch.equal(vae.decode(latents(seed=1, t=3)), expected)


def test_decoding_is_causal(vae: WanVae) -> None:
    z = latents(seed=1, t=4)
    changed = z.clone()
    changed[:, :, 2:] += 1
    before, after = vae.decode(z), vae.decode(changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert (before[:, :, 5:] - after[:, :, 5:]).abs().amax(dim=(0, 1, 3, 4)).min() > 0


def test_pixels_are_clamped(vae: WanVae) -> None:
    pixels = vae.decode(latents(seed=1, t=2) * 100)
    assert pixels.abs().max() == 1


def test_a_video_begins_with_the_latents_of_its_first_image(vae: WanVae) -> None:
    frames = video(seed=1, t=9)
    for whole, image in zip(vae.encode(frames), vae.encode(frames[:, :, :1]), strict=True):
        assert whole.shape == (1, 16, 3, 4, 6)
        assert torch.equal(whole[:, :, :1], image)


@pytest.mark.parametrize(("t", "h", "w"), [(4, 32, 48), (0, 32, 48), (5, 36, 48), (5, 32, 44)])
def test_encoding_refuses_what_does_not_fit(vae: WanVae, t: int, h: int, w: int) -> None:
    with pytest.raises(ValueError, match="cannot be encoded; allowed"):
        vae.encode(torch.zeros(1, 3, t, h, w))


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    vae = WanVae(TINY)
    mean, logvar = vae.encode(video(seed=1, t=9))
    (vae.decode(mean).square().mean() + logvar.square().mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


def test_building_on_the_meta_device_makes_parameters_only() -> None:
    with torch.device("meta"):
        vae = WanVae(VaeConfig())
    assert all(p.is_meta for p in vae.parameters())
    assert not list(vae.buffers())


def test_normalised_latents_come_back() -> None:
    z = latents(seed=1, t=3) * 3
    back = denormalise(normalise(z, TINY), TINY)
    torch.testing.assert_close(back, z, rtol=0, atol=2e-6)


def test_normalising_uses_each_channel_s_own_numbers() -> None:
    at_mean = torch.tensor(TINY.latents_mean).view(1, 16, 1, 1, 1)
    one_up = at_mean + torch.tensor(TINY.latents_std).view(1, 16, 1, 1, 1)
    assert torch.equal(normalise(at_mean, TINY), torch.zeros(1, 16, 1, 1, 1))
    torch.testing.assert_close(normalise(one_up, TINY), torch.ones(1, 16, 1, 1, 1))


def test_pixels_become_rounded_bytes() -> None:
    levels = torch.tensor([-3.0, -1.0, 0.2 / 127.5 - 1, 0.8 / 127.5 - 1, 0.0, 1.0, 3.0])
    frames = levels.view(1, 1, 7, 1, 1).expand(1, 3, 7, 2, 4)
    pixels = to_uint8(frames)
    assert pixels.shape == (7, 2, 4, 3)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


def pictures(height: int, width: int) -> Tensor:
    """Three smooth pictures of many colours: [1, 3, 3, H, W] in [-1, 1]."""
    coarse = torch.rand(1, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2.6 - 1.3
    return F.interpolate(coarse, size=(3, height, width), mode="trilinear").clamp(-1, 1)


def planes_of(i420: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Y, U and V of frames [T, H * 3 / 2, W]."""
    flat, size = i420.reshape(len(i420), -1), height * width
    y, u, v = flat[:, :size], flat[:, size : size * 5 // 4], flat[:, size * 5 // 4 :]
    return [y.reshape(-1, height, width), *(plane.reshape(-1, height // 2, width // 2) for plane in (u, v))]


@pytest.mark.parametrize(("height", "width"), [(32, 48), (18, 20)])
def test_i420_is_bt709_in_tv_range_with_the_mean_chroma_of_each_block(height: int, width: int) -> None:
    frames = pictures(height, width)
    # By the standard's own numbers: Y, Cb and Cr of every pixel in full range, in fp64, then averaged and scaled.
    matrix = np.array([[0.2126, 0.7152, 0.0722], [-0.2126, -0.7152, 0.9278], [0.7874, -0.7152, -0.0722]])
    matrix /= np.array([1, 1.8556, 1.5748])[:, None]
    full = np.einsum("kc,cthw->kthw", matrix, (frames[0].double().numpy() + 1) / 2)
    blocks = full.reshape(3, 3, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
    i420 = to_i420(frames)
    assert (i420.shape, i420.dtype) == ((3, height * 3 // 2, width), torch.uint8)
    y, u, v = planes_of(i420.numpy(), height, width)
    for plane, exact in ((y, 16 + 219 * full[0]), (u, 128 + 224 * blocks[1]), (v, 128 + 224 * blocks[2])):
        assert np.abs(plane - exact).max() <= 0.5 + 1e-4


def test_i420_is_what_swscale_makes() -> None:
    frames = pictures(64, 96)
    made = planes_of(to_i420(frames).numpy(), 64, 96)
    for i, rgb in enumerate(to_uint8(frames).numpy()):
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        for plane, theirs in zip(made, planes_of(frame.to_ndarray()[None], 64, 96), strict=True):
            assert np.abs(plane[i].astype(int) - theirs[0]).max() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_becomes_33_frames(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vae = WanVae(TINY).requires_grad_(False)
    for part in (vae.decoder, vae.post_quant_conv):
        part.to(dtype)
    assert (vae.encoder_dtype, vae.decoder_dtype) == (torch.float32, dtype)
    z = latents(seed=1, t=9)
    rgb, yuv = decode_chunk(vae, z, to_uint8, to_i420)
    assert (rgb.shape, yuv.shape) == ((33, 32, 48, 3), (33, 48, 48))
    frames = torch.cat(list(vae.decode_frames(denormalise(z, TINY).to(dtype), LATENTS_PER_PASS)), dim=2)
    assert np.array_equal(rgb, to_uint8(frames))
    assert np.array_equal(yuv, to_i420(frames))


def test_on_a_gpu_decoding_is_bf16_with_channels_last_and_encoding_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(model: WanVae, _: object, __: object, dtype_of: Callable[[str], torch.dtype]) -> None:
        for name, parameter in model.named_parameters():
            parameter.data = torch.empty_like(parameter, dtype=dtype_of(name))

    monkeypatch.setattr(weights, "_fill", fill)
    for name in ("check_room", "decode_chunk"):  # which would ask the GPU
        monkeypatch.setattr(weights, name, lambda *_: None)
    vae = weights.load_vae(Checkpoint.open("demo"), torch.device("cuda"))
    for parts, dtype in (
        ((vae.encoder, vae.quant_conv), torch.float32),
        ((vae.decoder, vae.post_quant_conv), torch.bfloat16),
    ):
        assert {p.dtype for part in parts for p in part.parameters()} == {dtype}
    kernels = [p for p in vae.parameters() if p.dim() == 5]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last_3d) for kernel in kernels)


def test_the_fused_kernel_and_channels_last_give_the_same_video(vae: WanVae) -> None:
    """In Triton's interpreter, where a GPU would take it, with several latents per pass."""
    z = latents(seed=1, t=4)
    plain = vae.decode(z)
    last = copy.deepcopy(vae)
    last.lay_channels_last()
    with torch.inference_mode(), mock.patch.object(norm, "_plain", lambda x: False):
        fused = torch.cat(list(last.decode_frames(z, LATENTS_PER_PASS)), dim=2)
        moments = last.encode(plain)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(moments[0], vae.encode(plain)[0], rtol=0, atol=1e-5)
