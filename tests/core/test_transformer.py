"""What the transformer keeps between calls, and what it does not compute twice. Values: tests/parity."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from helios_core.config import TransformerConfig
from helios_core.transformer.attention import _cudnn, _flash, _kernel
from helios_core.transformer.fp8 import Fp8Linear, to_fp8
from helios_core.transformer.history import CHUNK_NUMBERS, LONG_NUMBERS, MID_NUMBERS, SHORT_NUMBERS
from helios_core.transformer.kernels import quantise
from helios_core.transformer.layers import Attention, JoinedLinear
from helios_core.transformer.model import KEY_ALIASES, ChunkContext, HeliosTransformer, TextContext
from helios_core.transformer.rope import rope_table

CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    text_dim=32,
    freq_dim=32,
    ffn_dim=64,
    num_layers=3,
    rope_dim=(8, 4, 4),
)
SIZES = [(2, 4), (4, 8), (8, 16)]  # of the stages
LINEARS = ("attn1.queries", "attn1.keys", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.2")
HISTORY_TOKENS = 4 * 1 * 2 + 1 * 2 * 4 + 2 * 4 * 8  # long, mid, short


@pytest.fixture(scope="module")
def model() -> HeliosTransformer:
    torch.manual_seed(0)
    model = HeliosTransformer(CONFIG).requires_grad_(False)
    model.join()
    return model


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(model: HeliosTransformer, seed: int) -> TextContext:
    return model.text_context(draw(1, 512, CONFIG.text_dim, seed=seed))


def chunk(model: HeliosTransformer, text: TextContext, seed: int = 0) -> ChunkContext:
    past = draw(1, 16, 20, *SIZES[-1], seed=seed)
    return model.begin_chunk(past[:, :, :1], past[:, :, 1:], text)


def steps(model: HeliosTransformer, context: ChunkContext) -> list[Tensor]:
    """Two steps at each stage's size."""
    return [model(draw(1, 16, 9, *size, seed=1), t, context) for size in SIZES for t in (900, 100.5)]


def test_a_context_is_as_good_as_new_after_use(model: HeliosTransformer) -> None:
    context = chunk(model, text(model, 0))
    first = steps(model, context)
    for used, again in zip(first, steps(model, context), strict=True):
        assert torch.equal(used, again)
    for used, fresh in zip(first, steps(model, chunk(model, text(model, 0))), strict=True):
        assert torch.equal(used, fresh)


def test_texts_and_pasts_do_not_influence_each_other(model: HeliosTransformer) -> None:
    alone = steps(model, chunk(model, text(model, 0)))
    first, second = text(model, 0), text(model, 1)
    contexts = [chunk(model, first), chunk(model, second), chunk(model, first, seed=5)]
    mixed, other_text, other_past = (steps(model, context) for context in contexts)
    for a, b, c, d in zip(alone, mixed, other_text, other_past, strict=True):
        assert torch.equal(a, b)
        assert (a - c).abs().max() > 1e-3
        assert (a - d).abs().max() > 1e-3


def test_samples_of_a_batch_do_not_influence_each_other(model: HeliosTransformer) -> None:
    past, prompts = draw(2, 16, 20, *SIZES[-1], seed=0), draw(2, 512, CONFIG.text_dim, seed=0)
    noisy = draw(2, 16, 9, *SIZES[0], seed=1)

    def velocity(rows: slice) -> Tensor:
        text = model.text_context(prompts[rows])
        out: Tensor = model(noisy[rows], 500, model.begin_chunk(past[rows, :, :1], past[rows, :, 1:], text))
        return out

    apart = torch.cat([velocity(slice(0, 1)), velocity(slice(1, 2))])
    torch.testing.assert_close(velocity(slice(None)), apart, rtol=0, atol=1e-5)


@contextmanager
def watched(model: HeliosTransformer, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `note` with the name and the input of each layer that runs; self-attention's projections, which are one
    product, are called queries and keys."""

    def hook(name: str) -> Any:
        return lambda module, args, out: note(name, args[0])

    def write_heads(attention: Attention, x: Tensor, *args: Any, look: bool = True) -> Tensor | None:
        for part in ("queries", "keys") if look else ("keys",):
            note(f"{names[attention]}.{part}", x)
        return actual(attention, x, *args, look=look)

    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if isinstance(module, nn.Linear | nn.Conv3d)]
    handles = [module.register_forward_hook(hook(names[module])) for module in layers]
    actual = Attention.write_heads
    try:
        with mock.patch.object(Attention, "write_heads", write_heads):
            yield
    finally:
        for handle in handles:
            handle.remove()


def test_nothing_is_computed_twice(model: HeliosTransformer) -> None:
    """Rows through each layer: text once per prompt, history's first layer once per chunk, none of it in the last."""
    rows: Counter[str] = Counter()

    def count(name: str, x: Tensor) -> None:
        rows[name] += x.shape[1]

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with watched(model, count):
        prompt = text(model, 0)
        assert {rows[name] for name in linears if "text" in name or "attn2.to_k" in name} == {512}
        rows.clear()

        context = chunk(model, prompt)
        heads = ["blocks.0.attn1.queries", "blocks.0.attn1.keys"]
        assert {name for name in rows if "blocks" in name} == set(heads)
        assert {rows[name] for name in heads} == {HISTORY_TOKENS}
        rows.clear()

        h, w = SIZES[0]
        model(draw(1, 16, 9, h, w, seed=1), 500, context)
    noisy = 9 * h * w // 4
    assert {rows[name] for name in heads} == {noisy}
    assert {rows[f"blocks.1.{name}"] for name in ("attn1.queries", "attn1.to_out.0", "ffn.net.2")} == {
        noisy + HISTORY_TOKENS
    }
    assert rows["blocks.2.attn1.keys"] == noisy + HISTORY_TOKENS
    assert {rows[f"blocks.2.{name}"] for name in ("attn1.queries", "attn1.to_out.0", "ffn.net.2")} == {noisy}
    assert {rows[f"blocks.{i}.attn2.to_q"] for i in range(3)} == {noisy}
    assert not [name for name in rows if "text" in name or "attn2.to_k" in name or "attn2.to_v" in name]
    assert rows["condition_embedder.time_proj"] == 1


def test_what_two_texts_share_is_computed_once(model: HeliosTransformer) -> None:
    """One pass for two texts is two passes, but all that has seen no text yet runs with batch 1."""
    prompts = draw(2, 512, CONFIG.text_dim, seed=0)
    h, w = SIZES[0]
    noisy = draw(1, 16, 9, h, w, seed=1)
    context = chunk(model, model.text_context(prompts))
    batches: dict[str, set[int]] = {}

    with watched(model, lambda name, x: batches.setdefault(name, set()).add(len(x))):
        both = model(noisy, 500, context)
    apart = [model(noisy, 500, chunk(model, model.text_context(prompt[None]))) for prompt in prompts]
    torch.testing.assert_close(both, torch.cat(apart), rtol=0, atol=1e-5)

    assert batches["patch_embedding"] == batches["condition_embedder.time_proj"] == {1}
    first, second = ({name: batches[f"blocks.{i}.{name}"] for name in LINEARS} for i in (0, 1))
    assert first == {
        "attn1.queries": {1},
        "attn1.keys": {1},
        "attn1.to_out.0": {1},
        "attn2.to_q": {1},
        "attn2.to_out.0": {2},
        "ffn.net.2": {1, 2},  # history, noisy tokens
    }
    assert second == {
        "attn1.queries": {1, 2},
        "attn1.keys": {1, 2},
        "attn1.to_out.0": {2},
        "attn2.to_q": {2},
        "attn2.to_out.0": {2},
        "ffn.net.2": {2},
    }


def test_inputs_are_rounded_to_the_compute_dtype(model: HeliosTransformer) -> None:
    past, prompt = draw(1, 16, 20, *SIZES[-1], seed=0), draw(1, 512, CONFIG.text_dim, seed=0)
    noisy = draw(1, 16, 9, *SIZES[0], seed=1)

    def velocity(dtype: torch.dtype) -> Tensor:
        text = model.text_context(prompt.to(dtype))
        context = model.begin_chunk(past[:, :, :1].to(dtype), past[:, :, 1:].to(dtype), text)
        out: Tensor = model(noisy.to(dtype), 500, context)
        return out

    assert velocity(torch.float64).dtype == model.dtype == torch.float32
    assert torch.equal(velocity(torch.float64), velocity(torch.float32))


@pytest.mark.parametrize("height, width", [(3, 4), (4, 5)])
def test_half_a_token_is_refused(model: HeliosTransformer, height: int, width: int) -> None:
    context = chunk(model, text(model, 0))
    with pytest.raises(ValueError, match=f"{height} rows and {width} columns .* 2 x 2"):
        model(draw(1, 16, 9, height, width, seed=1), 500, context)


def test_frames_are_numbered_from_the_anchor_to_the_chunk() -> None:
    assert SHORT_NUMBERS == (0, 19)
    assert [*LONG_NUMBERS, *MID_NUMBERS] == list(range(1, 19))
    assert list(CHUNK_NUMBERS) == list(range(20, 29))


def test_a_table_made_for_inference_also_serves_training() -> None:
    rope_table.cache_clear()
    torch.manual_seed(0)
    model = HeliosTransformer(CONFIG)
    with torch.inference_mode():
        steps(model, chunk(model, text(model, 0)))
    loss = sum(out.square().mean() for out in steps(model, chunk(model, text(model, 0))))
    assert isinstance(loss, Tensor)
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tables_are_shared_between_chunks(model: HeliosTransformer) -> None:
    rope_table.cache_clear()
    for seed in range(3):
        steps(model, chunk(model, text(model, seed), seed))
    assert rope_table.cache_info().misses == len(SIZES) + len(("long", "mid", "short"))


def test_all_of_the_state_is_in_the_checkpoint() -> None:
    with torch.device("meta"):
        model = HeliosTransformer(TransformerConfig())
    assert not list(model.buffers())
    assert set(KEY_ALIASES.values()) <= model.state_dict().keys()
    assert (model.dtype, model.device.type) == (torch.float32, "meta")


def test_joined_projections_are_the_three_in_one(model: HeliosTransformer) -> None:
    torch.manual_seed(0)
    apart = HeliosTransformer(CONFIG).requires_grad_(False)
    for ours, its in zip(
        steps(model, chunk(model, text(model, 0))), steps(apart, chunk(apart, text(apart, 0))), strict=True
    ):
        torch.testing.assert_close(ours, its, rtol=0, atol=1e-5)
    joined, own = model.state_dict(), apart.state_dict()
    assert list(joined) == list(own)
    assert all(torch.equal(joined[name], own[name]) for name in own)
    attention = model.blocks[0].attn1
    assert isinstance(attention.to_qkv, JoinedLinear)
    attention.to_v.bias.mul_(1)  # a view: no weight is there twice
    assert attention.to_v.weight.untyped_storage().data_ptr() == attention.to_qkv.weight_ED.untyped_storage().data_ptr()


def test_a_history_that_is_kept(model: HeliosTransformer) -> None:
    """With the past of the same step nothing changes; with that of another a little; and its layers do not run."""
    context = chunk(model, text(model, 0))
    noisy, other = draw(1, 16, 9, *SIZES[0], seed=1), draw(1, 16, 9, *SIZES[0], seed=2)
    exact = model(noisy, 500, context)
    past: list[Any] = []
    assert torch.equal(model(noisy, 500, context, past), exact)
    assert [tuple(keys.shape) for keys, _ in past] == [(1, HISTORY_TOKENS, 2, 16)] * (CONFIG.num_layers - 1)
    rows: Counter[str] = Counter()
    with watched(model, lambda name, x: rows.update({name: x.shape[1]})):
        again = model(noisy, 500, context, past)
    assert torch.equal(again, exact)
    tokens = 9 * SIZES[0][0] * SIZES[0][1] // 4
    assert {rows[f"blocks.{i}.{name}"] for i in range(CONFIG.num_layers) for name in LINEARS} == {tokens}
    model(other, 100, context, stale := [])
    off = (model(noisy, 500, context, stale) - exact).abs().max()
    assert 0 < off < 0.1 * exact.abs().max()


@pytest.fixture(scope="module")
def narrow() -> HeliosTransformer:
    """The same model as `model`, in FP8."""
    torch.manual_seed(0)
    narrow = HeliosTransformer(CONFIG).requires_grad_(False)
    to_fp8(narrow)
    narrow.join()
    return narrow


def test_fp8_is_near(model: HeliosTransformer, narrow: HeliosTransformer) -> None:
    exact = steps(model, chunk(model, text(model, 0)))
    for ours, its in zip(steps(narrow, chunk(narrow, text(narrow, 0))), exact, strict=True):
        error = (ours - its).norm() / its.norm()
        assert 1e-4 < error < 0.05  # a number in FP8 is off by 1/32 at most, and by no more on the way


def test_fp8_products_are_those_of_the_rounded_numbers() -> None:
    x, linear = draw(2, 5, 32, seed=0), nn.Linear(32, 48).requires_grad_(False)
    narrow = Fp8Linear(linear.weight, linear.bias)
    values, scale = quantise(x)
    weight = narrow.weight_ED.float() * narrow.scale_1E.T
    assert (weight - linear.weight).abs().max() <= linear.weight.abs().max() / 16
    expected = (values.float() * scale) @ weight.T + linear.bias
    torch.testing.assert_close(narrow(x), expected)
    torch.testing.assert_close(narrow(quantise(x)), expected)
    torch.testing.assert_close(narrow(x, skip=16), expected[..., 16:])


def test_the_ends_of_a_deep_model_stay_exact() -> None:
    with torch.device("meta"):
        deep = HeliosTransformer(dataclasses.replace(CONFIG, num_layers=40)).requires_grad_(False)
    to_fp8(deep)
    kinds = [type(block.attn2.to_q) for block in deep.blocks]
    assert kinds == [nn.Linear] * 3 + [Fp8Linear] * 34 + [nn.Linear] * 3


def test_attention_names_its_kernel_by_the_chip() -> None:
    device = torch.device("cuda")
    chosen = {}
    for major in (7, 8, 9):
        _kernel.cache_clear()
        with mock.patch("torch.cuda.get_device_capability", return_value=(major, 0)):
            chosen[major] = _kernel(device)
    _kernel.cache_clear()
    assert chosen == {7: None, 8: _flash, 9: _cudnn}
    assert _kernel(torch.device("cpu")) is None
    q = torch.empty(1, 2, 8, 16, dtype=torch.bfloat16, device="meta")
    for kernel in (_flash, _cudnn):  # the operators' own ideas of their arguments and results
        assert kernel(q, q, q).shape == q.shape


def test_sizes_that_fp8_cannot_have() -> None:
    with torch.device("meta"):
        odd = HeliosTransformer(dataclasses.replace(CONFIG, ffn_dim=72))
    with pytest.raises(ValueError, match=r"\(32, 72\); allowed with fp8: multiples of 16"):
        to_fp8(odd)
