"""Blending the embeddings of several prompts."""

from __future__ import annotations

import itertools

import pytest
import torch

from helios_core.text import TextEmbeddings, blend


def text(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> TextEmbeddings:
    return TextEmbeddings.of(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blend_is_the_weighted_sum_of_what_the_transformer_reads(dtype: torch.dtype) -> None:
    """Rows beyond a prompt's own are zeros, which it does see: they count."""
    short, long, other = text(2, 0, dtype), text(5, 1, dtype), text(3, 2, dtype)
    parts = [(short, 0.25), (long, 0.5), (other, 0.25)]
    blended = blend(parts)
    expected = sum(weight * each.padded().float() for each, weight in parts)
    assert isinstance(expected, torch.Tensor)
    assert (blended.rows.dtype, blended.rows.shape) == (dtype, (5, 8))
    torch.testing.assert_close(blended.padded(), expected.to(dtype), rtol=0, atol=0)


def test_one_prompt_alone_stays_itself() -> None:
    only = text(4, 0)
    assert blend([(only, 1.0)]) is only


def test_the_digest_is_that_of_the_blend() -> None:
    """Keys and values are cached by it: another mix of the same prompts must have another."""
    first, second = text(4, 0), text(6, 1)
    blends = [blend([(first, 1 - share), (second, share)]) for share in (0.25, 0.5, 0.5, 0.75)]
    digests = [each.digest for each in blends]
    assert digests[1] == digests[2] == TextEmbeddings.of(blends[1].rows).digest
    assert len({first.digest, second.digest, *digests}) == 5


def test_what_is_blended_is_not_changed() -> None:
    first, second = text(4, 0), text(6, 1)
    before = first.rows.clone(), second.rows.clone()
    blend([(first, 0.5), (second, 0.5)])
    assert torch.equal(first.rows, before[0]) and torch.equal(second.rows, before[1])


def test_a_transition_is_steady() -> None:
    """From one prompt to another in equal steps."""
    first, second = text(3, 0), text(3, 1)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    rows = [blend([(first, 1 - share), (second, share)]).rows for share in shares]
    step = (second.rows - first.rows) / 4
    for before, after in itertools.pairwise(rows):
        torch.testing.assert_close(after - before, step)
