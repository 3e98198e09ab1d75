"""What the demo model's latents are: a linear code of blocks of pixels, found by principal components.

A latent frame stands for four pictures (the first for one, taken four times); each of its 8 x 16 places for a block of
four by 8 x 8 pixels of a picture of 128 x 64. The VAE learns to read and write this code; the transformer
learns it directly. Because it is linear and a picture is a sum of masks times colours, the latents of any colouring of
a film are a sum too: `terms` has its parts.

Shapes: B blocks, P numbers of a block (4 x 8 x 8 x 3), K latent channels, T pictures, H, W their rows and columns;
t, h, w those of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

SIZE = (128, 64)  # width and height of the pictures that are coded, in pixels
CHANNELS = 16
TIME, SPACE = 4, 8
FIT_BLOCKS = 60_000


@dataclass(frozen=True, eq=False)
class LinearCodec:
    """`basis` [K, P]: orthonormal rows; `mean` [P] of a block; `scale` [K]: from coordinates to latents.

    Coordinates are scaled by the fourth root of the inverse variance: in between leaving them as they are, where the
    last channels would drown in noise, and whitening, where they would count as much as the first.
    """

    basis: Tensor
    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, films: list[Tensor], generator: torch.Generator) -> LinearCodec:
        """From films [33, 3, 64, 128] in [0, 1]. Latents have mean 0 and, over all channels, variance 1."""
        blocks_BP = torch.cat([rearrange(_blocks(film), "t h w p -> (t h w) p") for film in films])
        blocks_BP = blocks_BP[torch.randperm(len(blocks_BP), generator=generator)[:FIT_BLOCKS]]
        mean = blocks_BP.mean(0)
        covariance = torch.cov(blocks_BP.T.double())
        variance, vectors = torch.linalg.eigh(covariance)
        variance, basis = variance.flip(0)[:CHANNELS], vectors.T.flip(0)[:CHANNELS].float()
        scale = variance**-0.25
        scale = scale / (variance * scale**2).mean().sqrt()
        return cls(basis, mean, scale.float())

    def encode(self, film_T3HW: Tensor) -> Tensor:
        """Pictures [1 + 4n, 3, 64, 128] in [0, 1] as latents [K, 1 + n, 8, 16]."""
        coordinates = (_blocks(film_T3HW) - self.mean) @ self.basis.T
        latents: Tensor = rearrange(coordinates * self.scale, "t h w k -> k t h w")
        return latents

    def decode(self, latents_Kthw: Tensor) -> Tensor:
        """The pictures that latents [K, 1 + n, 8, 16] stand for: [1 + 4n, 3, 64, 128], about in [0, 1]."""
        coordinates = rearrange(latents_Kthw, "k t h w -> t h w k") / self.scale
        blocks = coordinates @ self.basis + self.mean
        pictures = rearrange(
            blocks, "t h w (time row column c) -> (t time) c (h row) (w column)", time=TIME, row=SPACE, column=SPACE
        )
        return torch.cat([pictures[:TIME].mean(0, keepdim=True), pictures[TIME:]])

    def terms(self, masks_TMHW: Tensor) -> Tensor:
        """What each mask's red, green and blue add to a chunk's latents: [M * 3, K, 9, 8, 16]."""
        masks = _blocks(repeat(masks_TMHW, "t m h w -> (m t) 1 h w"), films=masks_TMHW.shape[1])
        by_colour = rearrange(self.basis * self.scale[:, None], "k (block c) -> block (c k)", c=3)
        terms: Tensor = rearrange(masks @ by_colour, "(m t) h w (c k) -> (m c) k t h w", m=masks_TMHW.shape[1], c=3)
        return terms

    @property
    def fleeting(self) -> Tensor:
        """Which channels tell how a block changes in its four pictures, more than how it looks: bool [K]."""
        basis = rearrange(self.basis, "k (time block) -> k time block", time=TIME)
        return basis.var(1, correction=0).mean(1) > 0.5 * basis.square().mean((1, 2))

    @property
    def offset(self) -> Tensor:
        """What every latent has besides its terms: [K]."""
        return -(self.basis @ self.mean) * self.scale


def _blocks(pictures_TCHW: Tensor, films: int = 1) -> Tensor:
    """[t, h, w, 4 * 8 * 8 * C] of films of equal length that come one after the other."""
    chunks = rearrange(pictures_TCHW, "(n t) c h w -> n t c h w", n=films)
    chunks = torch.cat([chunks[:, :1].expand(-1, TIME, -1, -1, -1), chunks[:, 1:]], dim=1)
    blocks: Tensor = rearrange(
        chunks,
        "n (t time) c (h row) (w column) -> (n t) h w (time row column c)",
        time=TIME,
        row=SPACE,
        column=SPACE,
    )
    return blocks
