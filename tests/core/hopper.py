"""Compiles our Triton kernels for Hopper, without a GPU, as the 14B model launches them. A program of its own, because
Triton either interprets or compiles. Prints a line for each: its name, and how many loads take 16 bytes at once.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from helios_core.transformer import triton_kernels as transformer
from helios_core.vae import kernels as vae

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS = {"eps": "fp32", "scale": "fp32", "shortest": "fp32"}
UNEVEN = ("tokens", "pairs", "pixels")  # the others, and pointers, are multiples of 16


def compiled(kernel: Any, warps: int, pointers: dict[str, str], constants: dict[str, Any]) -> None:
    """`pointers`: parameter ▸ dtype. A pointer that is not among them is None."""
    names = kernel.arg_names
    constants = {name: None for name in names if name.endswith("_ptr") and name not in pointers} | constants
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or NUMBERS.get(name, "i32") for name in names
    }
    even = [i for i, name in enumerate(names) if signature[name][0] in "*i" and name not in UNEVEN]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in even},
    )
    made = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    assert made.asm["cubin"]
    sys.stdout.write(f"{kernel.__name__} {made.asm['ptx'].count('ld.global.v4')}\n")


for c in ("*bf16", "*fp32"):
    for out in (c, "*fp8e4nv") if c == "*bf16" else (c,):
        for add, gate, norm in ((True, True, True), (True, False, True), (True, True, False), (False, False, True)):
            fp8 = out != c
            if fp8 and not norm:
                continue
            pointers = {"x_ptr": c}
            pointers |= {"update_ptr": c, "total_ptr": c} if add else {}
            pointers |= {"gate_ptr": "*fp32"} if gate else {}
            pointers |= {"gain_ptr": "*fp32", "shift_ptr": "*fp32", "normed_ptr": out} if norm else {}
            pointers |= {"scale_ptr": "*fp32"} if fp8 else {}
            flags = {"ADD": add, "GATE": gate, "NORM": norm, "FP8": fp8, "BLOCK": 8192}
            compiled(transformer._add_norm_kernel, 8, pointers, flags)
    heads = {f"{name}_ptr": c for name in ("projected", "gain_q", "gain_k", "queries", "keys", "values")}
    for first in (0, 1):
        compiled(transformer._write_heads_kernel, 8, heads | {"rope_ptr": "*fp32"}, {"FIRST": first, "BLOCK": 8192})
    compiled(transformer._rms_norm_kernel, 8, {"x_ptr": c, "gain_ptr": c, "out_ptr": c}, {"BLOCK": 8192})
    sizes = {"C": 96, "BLOCK_P": 32, "BLOCK_C": 128}
    compiled(vae._rms_norm_silu, 4, {"x_ptr": c, "gamma_ptr": c, "out_ptr": c}, sizes)
for gelu, block in ((True, 16384), (False, 8192)):
    quantised = {"x_ptr": "*bf16", "values_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    compiled(transformer._quantise_kernel, block // 1024, quantised, {"GELU": gelu, "BLOCK": block})
