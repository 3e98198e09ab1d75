"""Matrix products in 8 bits: an approximation that whoever runs the model can ask for.

Weights and activations become FP8 (e4m3) with one scale per row; products add up in fp32 (Micikevicius et al. 2022,
"FP8 formats for deep learning"). Hopper's tensor cores do them at twice the rate of bf16, which is lost again where the
rows are quantised by themselves: here it happens in the kernels that make them. Embeddings, the output, the keys and
values of the text, and the blocks nearest to both ends, of which errors go furthest, stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helios_core.transformer.kernels import Quantised, add_norm_fp8, gelu_quantise, norm_fp8, quantise
from helios_core.transformer.layers import JoinedLinear
from helios_core.transformer.model import HeliosTransformer

EXACT_SHARE = 3 / 40  # of the blocks, at each end


class Fp8Linear(nn.Module):
    """`nn.Linear` with its weights in FP8: for rows that are quantised already, or that it quantises."""

    def __init__(self, weight_ED: Tensor, bias_E: Tensor) -> None:
        super().__init__()
        values, scale = quantise(weight_ED.detach()[None])
        self.weight_ED, self.scale_1E, self.bias_E = values[0], scale[0].T, bias_E.detach()

    def forward(self, x: Tensor | Quantised, skip: int = 0) -> Tensor:
        """[B, L, E - skip] in the dtype of the bias: without the first `skip` channels."""
        values_BLD, scale_BL1 = quantise(x) if isinstance(x, Tensor) else x
        weight_ED, scale_1E, bias_E = self.weight_ED[skip:], self.scale_1E[:, skip:], self.bias_E[skip:]
        if values_BLD.device.type == "cpu":  # whose product in FP8 knows no scales of rows
            product_BLE = values_BLD.float() @ weight_ED.float().T
            out_BLE: Tensor = (product_BLE * scale_BL1 * scale_1E + bias_E).to(bias_E.dtype)
            return out_BLE
        out_RE: Tensor = torch._scaled_mm(
            values_BLD.flatten(0, 1),
            weight_ED.T,
            scale_a=scale_BL1.flatten(0, 1),
            scale_b=scale_1E,
            bias=bias_E,
            out_dtype=bias_E.dtype,
            use_fast_accum=True,
        )
        out_BLE = out_RE.unflatten(0, values_BLD.shape[:2])
        return out_BLE


class GeluQuantise(nn.Module):
    """GELU (tanh form), for the product after it."""

    def forward(self, x_BLD: Tensor) -> Quantised:
        return gelu_quantise(x_BLD)


def why_no_fp8(model: HeliosTransformer) -> str | None:
    """Why this model cannot be in FP8 where it is; None if it can."""
    sizes = (model.config.hidden_dim, model.config.ffn_dim)
    if any(size % 16 for size in sizes):
        return f"hidden_dim and ffn_dim are {sizes}; allowed with fp8: multiples of 16"
    if model.device.type == "cuda":
        if model.dtype != torch.bfloat16:
            return f"dtype is {model.dtype}; allowed with fp8: bfloat16"
        if torch.cuda.get_device_capability(model.device) < (9, 0):
            return f"the GPU is {torch.cuda.get_device_name(model.device)}; needed for fp8: Hopper or later"
    return None


@torch.no_grad()
def to_fp8(model: HeliosTransformer) -> None:
    """Exchanges the blocks' linear layers in place, but for the first and last blocks'. They cannot be trained then.

    Raises ValueError if `why_no_fp8` has a reason.
    """
    if (reason := why_no_fp8(model)) is not None:
        raise ValueError(reason)
    ends = round(EXACT_SHARE * len(model.blocks))
    for block in list(model.blocks)[ends : len(model.blocks) - ends]:
        block.norm, block.add_norm = norm_fp8, add_norm_fp8
        look, cross, (up, _, down) = block.attn1, block.attn2, block.ffn.net
        look.to_qkv = _fp8(look.to_qkv or JoinedLinear(look.to_q, look.to_k, look.to_v))
        del look.to_q, look.to_k, look.to_v
        look.to_out[0], cross.to_q, cross.to_out[0] = _fp8(look.to_out[0]), _fp8(cross.to_q), _fp8(cross.to_out[0])
        up.proj, block.ffn.net[1], block.ffn.net[2] = _fp8(up.proj), GeluQuantise(), _fp8(down)


def _fp8(linear: Any) -> Any:
    """`Any`, as modules do not tell the types of their parts."""
    if isinstance(linear, JoinedLinear):
        return Fp8Linear(linear.weight_ED, linear.bias_E)
    return Fp8Linear(linear.weight, linear.bias)
