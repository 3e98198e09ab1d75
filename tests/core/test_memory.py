"""What a model needs in memory, and that it is refused where there is less."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from helios_core.checkpoints import Checkpoint
from helios_core.config import EXACT, Approximations, TransformerConfig, VaeConfig
from helios_core.errors import CheckpointError
from helios_core.memory import check_room, free_bytes, peak_bytes
from helios_core.transformer.model import HeliosTransformer
from helios_core.weights import _sampler_needs, load_sampler, load_text_encoder, load_vae

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MB = 2**20


def test_what_work_holds_at_once() -> None:
    def meta(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def work() -> None:
        first = meta(5 * MB)
        part = first[: 2 * MB]  # of the same storage
        del first
        second = meta(3 * MB)  # 8 MB
        del part
        third = torch.cat([second, second])  # 9 MB
        third += 1
        del second, third
        meta(4 * MB)

    gc.collect()
    assert peak_bytes(work) == 9 * MB


def test_what_is_free_is_told() -> None:
    free = free_bytes(CPU)
    assert free is not None
    assert 100 * MB < free < 2**50


def test_a_container_s_own_limit_counts_and_files_in_memory_make_room(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 350\nactive_file 150\n")
    with mock.patch("helios_core.memory.GROUP", tmp_path):
        assert free_bytes(CPU) == 600
        (tmp_path / "memory.max").write_text("max\n")
        assert free_bytes(CPU) != 600


def test_what_does_not_fit_is_refused_with_the_missing_figure() -> None:
    with mock.patch("helios_core.memory.free_bytes", return_value=10 * 10**9):
        check_room("VAE", CPU, {"weights": 10 * 10**9})
        with pytest.raises(CheckpointError) as refused:
            check_room("transformer", GPU, {"weights": 28_700_000_000, "texts": 1_700_000_000, "none": 0})
    assert str(refused.value) == (
        "the transformer needs 31.5 GB on cuda (weights 28.7, texts 1.7, spare 1.1), where 10.0 GB are free: "
        "21.5 GB are missing"
    )


@pytest.mark.parametrize("part", ["transformer", "VAE", "text encoder"])
def test_nothing_is_read_where_there_is_no_room(part: str) -> None:
    checkpoint = Checkpoint.open("random")
    load: Any = {
        "transformer": lambda: load_sampler(checkpoint, CPU, torch.float32),
        "VAE": lambda: load_vae(checkpoint, CPU),
        "text encoder": lambda: load_text_encoder(checkpoint, CPU, torch.float32),
    }[part]
    with (
        mock.patch("helios_core.memory.free_bytes", return_value=1),
        mock.patch("helios_core.weights._fill") as fill,
    ):
        with pytest.raises(CheckpointError, match=f"the {part} needs .* GB are missing"):
            load()
        fill.assert_not_called()


def test_what_the_official_model_needs_on_a_gpu() -> None:
    """No GPU is asked for it: its memory is what is said here."""
    tiny = Checkpoint.open("random")
    card = dataclasses.replace(tiny.card, default_size=(640, 384))
    official = dataclasses.replace(tiny, card=card, transformer=TransformerConfig(), vae=VaeConfig())
    with torch.device("meta"):
        model = HeliosTransformer(official.transformer)

    needs = _sampler_needs(official, model, GPU, torch.bfloat16, EXACT)
    assert needs["weights"] == pytest.approx(28.7e9, rel=0.01)
    assert needs["texts"] == 4 * 40 * 2 * 512 * 5120 * 2
    assert needs["history"] == 0
    kept = _sampler_needs(official, model, GPU, torch.bfloat16, Approximations(history_refresh="chunk"))
    assert kept["history"] == 40 * 2 * 2400 * 5120 * 2
    # Tokens before and after a sum, keys and values of 11,040; of 8,640 twice the feed-forward's 13,824: 1.2 GB.
    assert 1.0e9 < needs["work at 640x384"] < 1.6e9
