"""The VAE against diffusers' AutoencoderKLWan, with small random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from helios_core.config import VaeConfig
from helios_core.vae.latents import decode_chunk, denormalise, normalise, to_uint8
from helios_core.vae.model import WanVae

FOLDED: dict[str, Any] = {
    "dim_mult": (1, 2, 4),
    "temperal_downsample": (True, True),
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
CONFIGS = {
    "plain-1": VaeConfig(base_dim=8, num_res_blocks=1),
    "plain-2": VaeConfig(base_dim=8, num_res_blocks=2),
    "folded-1": VaeConfig(base_dim=8, num_res_blocks=1, **FOLDED),
    "folded-2": VaeConfig(base_dim=8, num_res_blocks=2, **FOLDED),
    "wide-decoder": VaeConfig(base_dim=4, decoder_base_dim=12, temperal_downsample=(True, False, True)),
}

Pair = tuple[Any, WanVae]  # diffusers' decorators hide its types


def reference(config: VaeConfig) -> Any:
    arguments = dataclasses.asdict(config)
    return AutoencoderKLWan(**{k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()})


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=list(CONFIGS))
def pair(request: pytest.FixtureRequest) -> Pair:
    """diffusers' VAE and ours with the same random weights, gains too."""
    torch.manual_seed(0)
    theirs = reference(request.param).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    ours = WanVae(request.param).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_keys_and_shapes_are_equal(pair: Pair) -> None:
    theirs, ours = ({k: v.shape for k, v in vae.state_dict().items()} for vae in pair)
    assert ours == theirs
    pair[0].load_state_dict(pair[1].state_dict(), strict=True)


def test_the_official_vae_has_194_tensors() -> None:
    config = VaeConfig()
    with torch.device("meta"):
        theirs, ours = reference(config).state_dict(), WanVae(config).state_dict()
    assert len(ours) == 194
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_decode(pair: Pair, batch: int) -> None:
    theirs, ours = pair
    z = draw(batch, 16, 4, 4, 6)
    expected = theirs.decode(z).sample
    assert expected.std() > 0.1
    assert 0 < (expected.abs() == 1).float().mean() < 0.5  # the clamp is met, but hides little
    torch.testing.assert_close(ours.decode(z), expected, rtol=0, atol=1e-5)


def test_decode_with_the_same_convolutions(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: but for the kernel that computes a convolution, all is the reference's."""

    def convolve(layer: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.aten.mkldnn_convolution(
            x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups
        )
        return out

    theirs, ours = pair
    z = draw(1, 16, 4, 4, 6)
    with monkeypatch.context() as patched:
        patched.setattr(nn.Conv3d, "_conv_forward", convolve)
        expected = theirs.decode(z).sample
        assert torch.equal(torch.cat(list(ours.decode_frames(z)), dim=2), expected)


@pytest.mark.parametrize("t", [1, 5, 13])
def test_encode(pair: Pair, t: int) -> None:
    theirs, ours = pair
    frames = draw(2, 3, t, 32, 48).clamp(-1, 1)
    posterior = theirs.encode(frames).latent_dist
    mean, logvar = ours.encode(frames)
    assert posterior.mean.std() > 0.05
    torch.testing.assert_close(mean, posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar, rtol=0, atol=1e-5)


def test_logvar_has_the_reference_s_limits() -> None:
    config = CONFIGS["plain-1"]
    torch.manual_seed(0)
    theirs, ours = reference(config).requires_grad_(False), WanVae(config).requires_grad_(False)
    theirs.quant_conv.weight.mul_(1e3)
    ours.load_state_dict(theirs.state_dict())
    frames = draw(1, 3, 1, 32, 48).clamp(-1, 1)
    expected = theirs.encode(frames).latent_dist.logvar
    assert (expected.min(), expected.max()) == (-30, 20)
    _, logvar = ours.encode(frames)
    torch.testing.assert_close(logvar, expected, rtol=0, atol=1e-3)  # rounding is 1e3 times larger too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_of_latents_is_equal_to_the_last_bit(dtype: torch.dtype) -> None:
    # Both pipelines hold the reciprocal of std, in the VAE's dtype: they multiply by it and divide by it.
    config = VaeConfig()
    mean = torch.tensor(config.latents_mean).view(1, 16, 1, 1, 1).to(dtype)
    inverse_std = 1.0 / torch.tensor(config.latents_std).view(1, 16, 1, 1, 1).to(dtype)
    z = draw(2, 16, 9, 8, 12).to(dtype)
    assert torch.equal(normalise(z, config), (z - mean) * inverse_std)
    assert torch.equal(denormalise(z, config), z / inverse_std + mean)
    # Another order of operations gives other bits, so the lines above do see it.
    std = torch.tensor(config.latents_std).view(1, 16, 1, 1, 1).to(dtype)
    assert not torch.equal(denormalise(z, config), z * std + mean)


def test_pixels_of_a_chunk(pair: Pair) -> None:
    theirs, ours = pair
    z = draw(1, 16, 9, 4, 6)
    frames = theirs.decode(denormalise(z, ours.config)).sample
    expected = VideoProcessor(vae_scale_factor=8).postprocess_video(frames, output_type="pt")[0]
    (pixels,) = decode_chunk(ours, z, to_uint8)
    off = torch.from_numpy(pixels).permute(0, 3, 1, 2) - 255 * expected
    assert off.abs().max() <= 0.5 + 255 * 1e-5
