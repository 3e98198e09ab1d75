"""A prompt becomes text embeddings: cleaning, tokens, UMT5 (from transformers). Knows nothing about video."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor

from helios_core.config import TEXT_TOKENS
from helios_core.errors import CheckpointError, NotFinite

if TYPE_CHECKING:  # who imports this need not load them (weights.py)
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """One prompt as the transformer reads it.

    `rows`: [n, text_dim] in the encoder's dtype, on the CPU, 1 <= n <= 512: the real tokens' rows only.
    `digest`: SHA-256 of the rows, in hexadecimal: equal embeddings have equal digests, whatever their address.
    """

    rows: Tensor
    digest: str

    @classmethod
    def of(cls, rows: Tensor) -> TextEmbeddings:
        rows = rows.cpu().contiguous()
        content = rows.view(torch.uint8).numpy().tobytes()
        return cls(rows, hashlib.sha256(f"{rows.dtype}{tuple(rows.shape)}".encode() + content).hexdigest())

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return safetensors.torch.save({"rows": self.rows})

    @classmethod
    def from_bytes(cls, data: bytes) -> TextEmbeddings:
        """Raises safetensors.SafetensorError or KeyError for bytes that `to_bytes` did not write."""
        return cls.of(safetensors.torch.load(data)["rows"])

    def padded(self) -> Tensor:
        """[1, 512, text_dim]: the rows, then zeros. Zero rows are not masked: cross-attention sees them."""
        padded = self.rows.new_zeros(1, TEXT_TOKENS, self.rows.shape[1])
        padded[0, : len(self.rows)] = self.rows
        return padded


def blend(parts: Sequence[tuple[TextEmbeddings, float]]) -> TextEmbeddings:
    """The weighted sum of prompts, each as it is with its zero rows: a prompt on its way into another.

    `parts`: one or more, with weights whose sum is 1. The sum is computed in fp32; it has the dtype of the first.
    As in the official interactive mode, embeddings are mixed before the transformer's text layers. One prompt alone
    stays itself, bit for bit.
    """
    texts = [text for text, _ in parts]
    if len(texts) == 1:
        return texts[0]
    n, dtype = max(len(text.rows) for text in texts), texts[0].rows.dtype
    total = torch.zeros(n, texts[0].rows.shape[1])
    for text, weight in parts:
        total[: len(text.rows)] += weight * text.rows.float()
    return TextEmbeddings.of(total.to(dtype))


class TextEncoder:
    """UMT5's encoder with its tokenizer.

    Raises CheckpointError if the weights give all-zero or non-finite embeddings: a checkpoint whose embedding table
    was not found under its tied name would otherwise make a grey video of every prompt.
    """

    def __init__(self, tokenizer: Tokenizer, model: UMT5EncoderModel) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(TEXT_TOKENS)
        self.tokenizer, self.model = tokenizer, model
        try:
            probe = self.encode("a").rows
        except NotFinite:
            raise CheckpointError("text_encoder: embeddings of the prompt 'a' are not finite") from None
        if not probe.any():
            raise CheckpointError("text_encoder: embeddings of the prompt 'a' are all zero")

    @torch.inference_mode()
    def encode(self, prompt: str) -> TextEmbeddings:
        """The prompt's embeddings; what lies beyond 512 tokens is cut off.

        Only the real tokens are run through the encoder: padding is masked there and changes nothing but rounding.
        Raises NotFinite.
        """
        ids = torch.tensor([self.tokenizer.encode(clean(prompt)).ids], device=self.model.device)
        hidden_1SD = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        if not hidden_1SD.isfinite().all():
            raise NotFinite("the embeddings of a prompt have values that are not finite")
        return TextEmbeddings.of(hidden_1SD[0])


def clean(prompt: str) -> str:
    """The prompt as the model was trained to see it: mojibake mended, HTML entities resolved, white space folded."""
    import ftfy  # here, as who has embeddings already does without

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()
