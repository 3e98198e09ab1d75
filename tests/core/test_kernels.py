"""The fused kernels against what they stand for, in Triton's interpreter, and how often a GPU would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios_core.config import TransformerConfig
from helios_core.transformer import kernels
from helios_core.transformer.kernels import Affine
from helios_core.transformer.model import FP32_PARAMETERS, HeliosTransformer

ROOT = Path(__file__).parents[2]
BATCH, TOKENS, HEADS, HEAD_DIM = 2, 5, 3, 20  # no power of two among them
DIM = HEADS * HEAD_DIM
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fused(function: Callable[..., Any], *args: Any) -> Any:
    """What a GPU would run, here."""
    with mock.patch.object(kernels, "_plain", lambda x: False):
        return function(*args)


def assert_agree(ours: Tensor, function: Callable[..., Any], *args: Any) -> None:
    """fp32: within 2e-6 of the greatest value. bf16: within one unit in the last place of the plain form in fp32."""
    if ours.dtype == torch.float32:
        expected = function(*args)
        assert (ours - expected).abs().max() <= 2e-6 * expected.abs().max()
        return
    wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
    expected = function(*wide)
    rounded = expected.bfloat16()
    above, below = (torch.nextafter(rounded, torch.full_like(rounded, end)) for end in (torch.inf, -torch.inf))
    assert ((below <= ours) & (ours <= above)).all()


AFFINE = Affine(draw(DIM, seed=1), draw(DIM, seed=2))
GATE = draw(DIM, seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    x = 3 + draw(BATCH, TOKENS, DIM, dtype=dtype)
    assert_agree(fused(kernels.norm, x, AFFINE, EPS), kernels.norm, x, AFFINE, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [GATE, None])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_add_norm(dtype: torch.dtype, gate: Tensor | None, batch: int) -> None:
    x, update = draw(batch, TOKENS, DIM, dtype=dtype), draw(BATCH, TOKENS, DIM, dtype=dtype, seed=4)
    total, normed = fused(kernels.add_norm, x, update, gate, AFFINE, EPS)
    assert_agree(total, kernels.add, x, update, gate)
    assert torch.equal(fused(kernels.add, x, update, gate), total)
    assert_agree(normed, kernels.norm, total, AFFINE, EPS)  # of the sum as it was rounded


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, gain = draw(BATCH, TOKENS, DIM, dtype=dtype), 1 + 0.3 * draw(DIM, dtype=dtype, seed=5)
    assert_agree(fused(kernels.rms_norm, x, gain, EPS), kernels.rms_norm, x, gain, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_write_heads(dtype: torch.dtype, look: bool, batch: int) -> None:
    projected = draw(batch, TOKENS, (3 if look else 2) * DIM, dtype=dtype)
    gains = [1 + 0.3 * draw(DIM, dtype=dtype, seed=seed) for seed in (5, 6)]
    rope = draw(2, TOKENS, 1, HEAD_DIM // 2, seed=7)

    def run(*args: Tensor) -> list[Tensor | None]:
        """Queries, and keys and values as a part of a larger tensor, the rest of which stays as it was."""
        keys, values = (torch.full((BATCH, 2 + TOKENS, HEADS, HEAD_DIM), 9.0, dtype=args[0].dtype) for _ in range(2))
        queries = kernels.write_heads(*args, rope, EPS, keys[:, 2:], values[:, 2:])
        return [queries, keys, values]

    ours, plain = fused(run, projected, *gains), run(projected, *gains)
    assert (ours[0] is not None) == look
    for mine, its in zip(ours, plain, strict=True):
        if mine is None or its is None:
            assert mine is its
        elif dtype == torch.float32:
            assert (mine - its).abs().max() <= 2e-6 * its.abs().max()
        else:  # rounded before the turn and after it; the interpreter cuts off where a GPU rounds
            length = its.float().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, -1, -1, 2).flatten(-2)
            assert ((mine.float() - its.float()).abs() <= 2**-6 * length).all()
    assert torch.equal(ours[2], plain[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised(dtype: torch.dtype) -> None:
    x, update = (draw(BATCH, TOKENS, DIM, dtype=dtype, seed=seed) for seed in (0, 1))
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (kernels.quantise, (x,)),
        (kernels.gelu_quantise, (x,)),
        (kernels.norm_fp8, (x, AFFINE, EPS)),
        (lambda *args: kernels.add_norm_fp8(*args)[1], (x, update, GATE, AFFINE, EPS)),
    ]
    for function, args in calls:
        plain = function(*args)
        assert plain.values.dtype == torch.float8_e4m3fn
        assert (plain.values.float().abs().amax(-1) == 448).all()
        # The last rounding is left to the GPU: the interpreter's (of Triton 3.6 and 3.7) makes 64 of 124.
        with mock.patch.object(kernels, "FP8", torch.float32):
            values, scale = fused(function, *args)
            exact_values, exact_scale = function(*args)
        # In bf16 the sum before the norm may round the other way.
        torch.testing.assert_close(scale, exact_scale, rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=0)
        tolerance = 2e-6 if dtype == torch.float32 else 2**-6
        assert (values - exact_values).abs().max() <= tolerance * 448
        assert (plain.values.float() - exact_values).abs().max() <= 16  # half a step between 256 and 448


def test_every_kernel_compiles_for_hopper_and_reads_16_bytes_at_once() -> None:
    """What is interpreted need not compile: types are looser."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.core.hopper"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loads = [line.split() for line in run.stdout.splitlines()]
    assert Counter(name for name, _ in loads) == {
        "_add_norm_kernel": 11,
        "_write_heads_kernel": 4,
        "_rms_norm_kernel": 2,
        "_rms_norm_silu": 2,
        "_quantise_kernel": 2,
    }
    assert all(int(count) > 0 for _, count in loads)


def test_a_row_of_zeros_stays_zero() -> None:
    for function in (kernels.quantise, kernels.gelu_quantise):
        for values, scale in (fused(function, torch.zeros(1, 2, DIM)), function(torch.zeros(1, 2, DIM))):
            assert (values.float() == 0).all() and (scale > 0).all()


# These move nothing.
FREE = {"view", "_unsafe_view", "split", "slice", "select", "expand", "transpose", "permute", "unsqueeze", "detach"}
FREE |= {"t", "unbind", "empty", "new_empty", "empty_like", "squeeze", "alias", "split_with_sizes"}


class Runs(TorchDispatchMode):
    """Counts what runs, and the bytes that it reads and writes, but for matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.count[name] += 1
            if name not in ("addmm", "convolution"):
                tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
                self.bytes[name] += sum(each.numel() * each.element_size() for each in tensors)
        return out


def test_what_a_gpu_would_run_for_the_official_model() -> None:
    """A forward of the last stage at 640x384, followed on the meta device: no memory, no GPU."""
    with torch.device("meta"):
        model = HeliosTransformer(TransformerConfig()).requires_grad_(False)
        for name, parameter in model.named_parameters():
            if not FP32_PARAMETERS.intersection(name.split(".")):
                parameter.data = parameter.data.bfloat16()
        past = torch.empty(1, 16, 20, 48, 80)
        text = model.text_context(torch.empty(1, 512, 4096))
        model.join()
        context = model.begin_chunk(past[:, :, :1], past[:, :, 1:], text)
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q)):
            model(torch.empty(1, 16, 9, 48, 80), 500.0, context)  # makes the tables of places
            with Runs() as runs:
                model(torch.empty(1, 16, 9, 48, 80), 500.0, context)
    layers = 40
    noisy, history = (
        layers,
        layers - 1,
    )  # the first block's history is kept over the chunk, the last one's not looked at
    assert runs.count["write_heads"] == noisy + history
    assert runs.count["add_norm"] == 4 * noisy + 3 * (history - 1) + 2 + 1 + 1  # first block, last block, output
    assert runs.count["rms_norm"] == noisy  # of cross-attention's queries
    assert runs.count["gelu"] == noisy + history
    assert runs.count["addmm"] == 6 * noisy + 4 * (history - 1) + 3 + 1 + 4  # of these two blocks; embeddings, output
    # One pass each: of what lies between the products nothing else is as large as the tokens.
    large = {"add_norm", "write_heads", "rms_norm", "gelu"}
    assert sum(runs.bytes[name] for name in large) < 115e9
    assert sum(runs.bytes[name] for name in runs.bytes if name not in large) < 0.5e9
