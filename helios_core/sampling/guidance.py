"""How a prompt is made to count for more: the velocities with it and without it become one.

Without the prompt means with the negative one. Both velocities are [1, C, T, h, w] in the model's dtype, in which all
is computed, so that in bf16 every operation rounds as it does in the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """`mix`(with the prompt, without it, scale) -> velocity; scale 1 means the prompt alone.

    `zero_steps`: so many steps at the beginning of a chunk take the velocity to be zero, whatever the model says.
    """

    mix: Callable[[Tensor, Tensor, float], Tensor]
    zero_steps: int


def classifier_free(text: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): away from the negative prompt."""
    return negative + scale * (text - negative)


def zero_star(text: Tensor, negative: Tensor, scale: float) -> Tensor:
    """CFG-Zero* (Fan et al. 2025): classifier-free guidance from the multiple of `negative` that is nearest to `text`.

    The factor is computed in fp32 over all of the one sample.
    """
    t, n = text.float(), negative.float()
    factor = (t * n).sum() / (n.square().sum() + 1e-8)
    return classifier_free(text, negative * factor.to(text.dtype), scale)


CLASSIFIER_FREE = Guidance(classifier_free, zero_steps=0)
# A model that is still wrong at the noisiest levels does less harm there if it is not followed: "zero-init".
CFG_ZERO_STAR = Guidance(zero_star, zero_steps=2)
