"""The Wan 2.1 VAE: video to latents and back, a few frames at a time.

- Causal in time: a frame depends on itself and on earlier frames only. So latent frames are decoded one or a few
  after the other, and what the layers need of the past travels in a `Cache` that belongs to one encode or decode.
- The first latent frame stands for 1 pixel frame, each later one for 4.
- Attributes carry the names of the official checkpoint, odd ones too: they are its keys.

Shapes: B batch, C channels, T frames, H rows, W columns; `x` in a forward is always [B, C, T, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from helios_core.config import VaeConfig
from helios_core.vae.norm import RMSNorm, rms_norm_silu

# The last input frames of each causal convolution, by layer. Empty before the first frame.
Cache = dict[nn.Module, Tensor]


class CausalConv3d(nn.Conv3d):
    """A convolution that sees no later frame: before `x` come frames of the last call, at first zeros."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        time_stride: int = 1,
    ) -> None:
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_dim, out_dim, kernel, stride=(time_stride, 1, 1), padding=padding)
        self.context = kernel[0] - time_stride  # frames of the past that the next output looks at

    def forward(self, x: Tensor, cache: Cache) -> Tensor:  # type: ignore[override]  # a cache is what it adds
        padded = self.room(x, cache)
        padded[:, :, self.context :] = x
        return self.convolve(padded, cache)

    def room(self, x: Tensor, cache: Cache) -> Tensor:
        """The frames of the past, [B, C, context, H, W], and behind them as many as in `x`, not yet written."""
        b, c, t, h, w = x.shape
        padded = _empty((b, c, self.context + t, h, w), like=self.weight)
        padded[:, :, : self.context] = cache[self] if self in cache else 0
        return padded

    def convolve(self, padded: Tensor, cache: Cache) -> Tensor:
        """The outputs for what was written into `room`. The next call's past is the end of it."""
        cache[self] = padded[:, :, -self.context :].clone()  # a view would keep all of it alive
        if padded.device.type == "cpu" and padded.dtype == torch.float32:
            # What torch takes of itself for an input as small as a few frames, slow_conv3d, needs 7 times as long.
            out: Tensor = torch.ops.aten.mkldnn_convolution(
                padded, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
            )
            return out
        return super().forward(padded)


def _norm_silu_convolve(norm: RMSNorm, conv: CausalConv3d, x: Tensor, cache: Cache) -> Tensor:
    """`conv` of SiLU of `norm` of x, which is written where the convolution reads it."""
    padded = conv.room(x, cache)
    rms_norm_silu(x, norm.gamma, out=padded[:, :, conv.context :])
    return conv.convolve(padded, cache)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim)
        self.conv_shortcut = nn.Identity() if in_dim == out_dim else nn.Conv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        shortcut: Tensor = self.conv_shortcut(x)
        x = _norm_silu_convolve(self.norm1, self.conv1, x, cache)
        x = _norm_silu_convolve(self.norm2, self.conv2, x, cache)
        return x.add_(shortcut)


class Attention(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, pixel_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + _per_frame(self._attend, x)

    def _attend(self, images_BCHW: Tensor) -> Tensor:
        h, w = images_BCHW.shape[2:]
        qkv = rearrange(self.to_qkv(self.norm(images_BCHW)), "b c h w -> b 1 (h w) c")
        q, k, v = qkv.contiguous().chunk(3, dim=-1)  # fused attention needs channels in the last stride
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(rearrange(mixed, "b 1 (h w) c -> b c h w", h=h, w=w))
        return out


class Downsample(nn.Module):
    """Halves rows and columns, and with `in_time` the frames: the first stays, later ones merge in pairs."""

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), time_stride=2) if in_time else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = _per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if self.time_conv not in cache:
            cache[self.time_conv] = x  # the first frame is not merged, but the next ones see it
            return x
        x = self.time_conv(x, cache)
        return x


class Doubling(nn.Module):
    """Each pixel of images [B, C, H, W] four times: [B, C, 2 H, 2 W]. Torch's own takes up to ten times as long."""

    def forward(self, images: Tensor) -> Tensor:
        b, c, h, w = images.shape
        doubled = _empty((b, c, 2 * h, 2 * w), like=images)
        rows = doubled[:, :, ::2]
        rows[..., ::2] = rows[..., 1::2] = images
        doubled[:, :, 1::2] = rows
        return doubled


class Upsample(nn.Module):
    """Doubles rows and columns, halves channels, and with `in_time` doubles the frames, all but the first."""

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(Doubling(), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        if self.time_conv is not None:
            if self.time_conv in cache:
                x = _in_turn(self.time_conv(x, cache))
            else:
                # The first frame is not doubled, nor do the next ones see it.
                cache[self.time_conv] = x.new_zeros(())
        return _per_frame(self.resample, x)


class MidBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([Attention(dim)])

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = self.resnets[0](x, cache)
        x = self.attentions[0](x)
        x = self.resnets[1](x, cache)
        return x


class UpBlock(nn.Module):
    """Residual blocks and one upsampler, or none where `in_time` is None."""

    def __init__(self, in_dim: int, out_dim: int, num_resnets: int, in_time: bool | None) -> None:
        super().__init__()
        in_dims = [in_dim] + [out_dim] * (num_resnets - 1)
        self.resnets = nn.ModuleList(ResidualBlock(dim, out_dim) for dim in in_dims)
        self.upsamplers = nn.ModuleList([] if in_time is None else [Upsample(out_dim, in_time)])

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, cache)
        return x


class Encoder(nn.Module):
    """Folded pixels [B, in_channels, T, H, W] to [B, 2 z_dim, T', H', W']: T = 1 at first, then 4; T' = 1."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dim = config.base_dim
        self.conv_in = CausalConv3d(config.in_channels, dim)
        self.down_blocks = nn.ModuleList()  # flat, as in the checkpoint
        for mult, in_time in zip(config.dim_mult, (*config.temperal_downsample, None), strict=True):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim, config.base_dim * mult))
                dim = config.base_dim * mult
            if in_time is not None:
                self.down_blocks.append(Downsample(dim, in_time))
        self.mid_block = MidBlock(dim)
        self.norm_out = RMSNorm(dim)
        self.conv_out = CausalConv3d(dim, 2 * config.z_dim)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        x = self.mid_block(x, cache)
        x = _norm_silu_convolve(self.norm_out, self.conv_out, x, cache)
        return x


class Decoder(nn.Module):
    """[B, z_dim, T', H', W'] to folded pixels [B, out_channels, T, H, W]: T' = T = 1 at first, then T = 4 T'."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        base_dim = config.decoder_base_dim or config.base_dim
        temperal_upsample = config.temperal_downsample[::-1]
        dim = base_dim * config.dim_mult[-1]
        self.conv_in = CausalConv3d(config.z_dim, dim)
        self.mid_block = MidBlock(dim)
        self.up_blocks = nn.ModuleList()
        for mult, in_time in zip(config.dim_mult[::-1], (*temperal_upsample, None), strict=True):
            out_dim = base_dim * mult
            self.up_blocks.append(UpBlock(dim, out_dim, config.num_res_blocks + 1, in_time))
            dim = out_dim // 2  # what the upsampler leaves
        self.norm_out = RMSNorm(out_dim)
        self.conv_out = CausalConv3d(out_dim, config.out_channels)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = self.conv_in(x, cache)
        x = self.mid_block(x, cache)
        for block in self.up_blocks:
            x = block(x, cache)
        x = _norm_silu_convolve(self.norm_out, self.conv_out, x, cache)
        return x


class WanVae(nn.Module):
    """The VAE. It keeps nothing between calls, so any number of encodes and decodes may be under way at once.

    Latents here are the posterior's own, not normalised: see helios_core.vae.latents.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def lay_channels_last(self) -> None:
        """Puts the channels of all weights last in memory; what is computed from them then lies so too."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                last = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
                module.weight.data = module.weight.data.contiguous(memory_format=last)

    @property
    def encoder_dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    @property
    def decoder_dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.post_quant_conv.weight.device

    def encode(self, frames_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, each [B, z_dim, 1 + n, H/8, W/8].

        `frames_BCTHW`: [B, 3, 1 + 4n, H, W] in [-1, 1], in the encoder's dtype and on its device.
        Raises ValueError for another number of frames, and for H or W that are no multiple of 8.
        """
        _, _, t, h, w = frames_BCTHW.shape
        time, space = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        if t % time != 1:
            raise ValueError(f"{t} frames cannot be encoded; allowed: 1 + {time}n")
        if h % space or w % space:
            raise ValueError(f"frames of {w}x{h} cannot be encoded; allowed: multiples of {space}")
        p = self.config.patch_size or 1
        x = rearrange(frames_BCTHW, "b c t (h ph) (w pw) -> b (c pw ph) t h w", ph=p, pw=p)
        cache: Cache = {}
        groups = x.split([1] + [time] * (t // time), dim=2)
        moments = self.quant_conv(torch.cat([self.encoder(group, cache) for group in groups], dim=2))
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # the reference's limits

    def decode_frames(self, latents_BCTHW: Tensor, per_pass: int = 1) -> Iterator[Tensor]:
        """The pixels of the first latent frame, [B, 3, 1, H, W], then of `per_pass` each, [B, 3, 4 per_pass, H, W].

        `latents_BCTHW`: [B, z_dim, T, H/8, W/8], in the decoder's dtype and on its device. Pixels are in [-1, 1].
        One per pass is what the reference does, and equal to its bits; more are the same sums, faster and up to
        rounding the same. The last pass takes what is left. Work is done only as frames are asked for.
        """
        p = self.config.patch_size or 1
        cache: Cache = {}
        latents = self.post_quant_conv(latents_BCTHW)
        starts = (0, *range(1, latents.shape[2], per_pass))
        for start, end in pairwise((*starts, latents.shape[2])):
            frames = self.decoder(latents[:, :, start:end], cache)
            frames = rearrange(frames, "b (c pw ph) t h w -> b c t (h ph) (w pw)", ph=p, pw=p)
            yield frames.clamp(-1.0, 1.0)

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """All frames of `decode_frames` as one tensor, [B, 3, 1 + 4(T - 1), H, W]."""
        b, _, t, h, w = latents_BCTHW.shape
        time, space = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        video = latents_BCTHW.new_empty(b, 3, 1 + time * (t - 1), space * h, space * w)
        start = 0
        for frames in self.decode_frames(latents_BCTHW):
            end = start + frames.shape[2]
            video[:, :, start:end] = frames
            start = end
        return video


def _per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`layer`, which takes images [B, C, H, W], applied to each frame."""
    b = x.shape[0]
    x = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    x = rearrange(x, "(b t) c h w -> b c t h w", b=b)
    return x


def _in_turn(x: Tensor) -> Tensor:
    """Frames of the first and of the second half of the channels in turn: [B, 2 C, T, H, W] as [B, C, 2 T, H, W]."""
    b, c, t, h, w = x.shape
    frames = _empty((b, c // 2, 2 * t, h, w), like=x)
    frames[:, :, ::2], frames[:, :, 1::2] = x.chunk(2, dim=1)
    return frames


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Not yet written, of the dtype and on the device of `like`; channels lie last in memory if they do there."""
    last = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
    memory_format = last if like.is_contiguous(memory_format=last) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
