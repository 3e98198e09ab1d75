"""`helios bench` on shapes as small as can be: what it measures, what it counts, and that diffusers does the same.

Times are never looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from helios_core.bench import main
from helios_core.bench.command import SECTIONS, step_lists
from helios_core.bench.compare import pipeline
from helios_core.bench.report import Report, Row
from helios_core.bench.subject import Model, Subject, shapes
from helios_core.config import CHUNK_LATENTS, TransformerConfig, VaeConfig
from helios_core.errors import CheckpointError, InvalidInput

ROOT = Path(__file__).parents[2]
LAYERS, HEADS, WIDTH, FFN = 2, 2, 256, 688
TINY = ["--layers", str(LAYERS), "--heads", str(HEADS), "--vae-width", "4", "--size", "64x64", "--device", "cpu"]
QUICK = ["--repeats", "1", "--chunks", "1"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """`main` sets the process's number of torch threads, on which the last bits of other tests depend."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = Model.random(*shapes(LAYERS, HEADS, 4), torch.device("cpu"), torch.float32)
    return Subject.of(model, "64x64", ())


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of everything writes, as the command that it is."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, "-m", "helios_core.bench", *TINY, *QUICK, "--steps", "1,2,1"]
    command += ["--ways", "exact", "fp8-history-chunk"]
    run = subprocess.run(
        [*command, "--compare", "diffusers", "--json", str(file)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    written: dict[str, Any] = json.loads(file.read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == written
    return written


def test_every_section_says_what_it_measured(document: dict[str, Any]) -> None:
    sections = document["sections"]
    assert list(sections) == [*SECTIONS, "compare, eager"]
    counts = {name: len(rows) for name, rows in sections.items()}
    assert counts == {
        "ceilings": 3 * 3 + 3 + 1 + 1 + 1,
        "text": 1,
        "begin": 1,
        "stages": 3,
        "vae": 2,
        "chunks": 2 * 3,
        "sustained": 1,
        "memory": 3,
        "compare, eager": 3,
    }
    for row in (row for rows in sections.values() for row in rows if "median_s" in row):
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]
    exact, approximate = sections["chunks"][0], sections["chunks"][3]
    assert exact["the same twice"] is True
    assert "share_of_roofline" in exact and "share_of_roofline" not in approximate
    assert 1e-4 < approximate["off exact latents by"] < 0.3
    for name in ("text", "begin", "stages", "vae"):
        assert all(row["share_of_roofline"] > 0 for row in sections[name])


def test_the_header_says_what_was_measured_where(document: dict[str, Any]) -> None:
    header = document["header"]
    assert header["size"] == "64x64" and header["steps"] == "1,2,1"
    assert "--vae-width 4" in header["command"] and f"torch {torch.__version__}" in header["versions"]
    assert "best rate" in header["share"] and "2 layers, 256 wide" in header["model"]


def test_operations_of_text_keys_and_values(document: dict[str, Any]) -> None:
    """By hand: two layers embed 512 rows of 4096 channels, then each block has one matrix for keys, one for values."""
    embed = 2 * 512 * (4096 * WIDTH + WIDTH * WIDTH)
    assert document["sections"]["text"][0]["flop"] == embed + LAYERS * 2 * (2 * 512 * WIDTH * WIDTH)


def test_operations_of_the_last_stage(subject: Subject) -> None:
    """By hand, at 64x64: 9 x 4 x 4 noisy tokens beside 2 x 4 x 4 + 2 x 2 + 4 of history, which the last block only
    asks for keys and values, and the first not even for these."""
    noisy, history = 9 * 4 * 4, 2 * 4 * 4 + 2 * 2 + 4 * 1 * 1
    assert subject.lengths[-1] == noisy + history
    qkvo, ffn, cross = 4 * WIDTH * WIDTH, 2 * WIDTH * FFN, 2 * WIDTH * WIDTH  # multiply-adds for each token
    tokens = noisy * LAYERS * (qkvo + ffn + cross)
    tokens += history * (WIDTH * WIDTH + ffn + 2 * WIDTH * WIDTH)  # first block: output, ffn; last: keys, values
    patches = noisy * (16 * 4 * WIDTH) + noisy * (WIDTH * 16 * 4)
    time = 256 * WIDTH + WIDTH * WIDTH + WIDTH * 6 * WIDTH
    work = subject.work["stage 3"]
    assert work["linear"] == 2 * (tokens + patches + time)
    seen = noisy * LAYERS * (noisy + history + 512) + history * (noisy + history)  # pairs of tokens
    assert work["attention"] == 4 * WIDTH * seen


def test_shapes() -> None:
    assert shapes(40, 40, 96) == (TransformerConfig(), VaeConfig())
    transformer, _ = shapes(10, 5, 96)
    assert (transformer.num_layers, transformer.hidden_dim, transformer.ffn_dim) == (10, 640, 1728)


def test_diffusers_makes_the_same_of_the_same_tensors(document: dict[str, Any]) -> None:
    rows = document["sections"]["compare, eager"]
    assert [row["what"] for row in rows] == [
        "a chunk decoded",
        "1,2,1: a chunk sampled",
        "1,2,1: a chunk sampled and decoded",
    ]
    assert all(row["max_difference"] < 1e-4 for row in rows)
    assert all(row["ratio"] == row["diffusers_median_s"] / row["median_s"] for row in rows)


def test_diffusers_decodes_in_the_precision_that_we_decode_in() -> None:
    """On a GPU: bf16, whatever the encoder is in."""
    model = Model.random(*shapes(LAYERS, HEADS, 4), torch.device("cpu"), torch.float32)
    model.vae.decoder.bfloat16()
    model.vae.post_quant_conv.bfloat16()
    theirs = pipeline(model)
    assert theirs.vae.dtype == model.vae.decoder_dtype == torch.bfloat16 != model.vae.encoder_dtype
    assert theirs.vae.decode(torch.zeros(1, 16, 1, 2, 2).bfloat16()).sample.shape == (1, 3, 1, 16, 16)


def test_weights_and_inputs_are_alive(subject: Subject) -> None:
    """Neither zeros nor runaways, which would be faster than what they stand for."""
    modules = (subject.model.transformer, subject.model.vae)
    assert all(parameter.std() > 0.005 for module in modules for parameter in module.parameters())
    latents = subject.model.sampler.sample(next(subject.prompts()), subject.state(), (1, 1, 1)).latents
    assert latents.shape[2] == CHUNK_LATENTS and 0.3 < latents.std() < 5


def test_what_ends_a_run_costs_no_row_that_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    report = Report({"size": "64x64"}, file)

    def written() -> dict[str, list[str]]:
        sections = json.loads(file.read_text())["sections"]
        return {name: [row["what"] for row in rows] for name, rows in sections.items()}

    def rows() -> Iterator[Row]:
        assert written() == {"first": ["thing 0"]}
        yield Row("thing 1", figures={"GiB": 1.5})
        assert written() == {"first": ["thing 0"], "second": ["thing 1"]}
        raise KeyboardInterrupt

    report.add("first", [Row("thing 0")])
    with pytest.raises(KeyboardInterrupt):
        report.add("second", rows())
    report.end()
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(file.read_text())
    assert "thing 1" in table[-1] and "GiB 1.5" in table[-1]


def test_a_section_that_fails_costs_the_others_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    with mock.patch.dict(SECTIONS, text=lambda bench: iter([][0])), pytest.raises(SystemExit, match="1"):
        main([*TINY, *QUICK, "--sections", "text", "memory", "--json", str(file)])
    written = json.loads(file.read_text())
    assert "IndexError" in written["failed"]["text"] and written["sections"]["memory"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written


def test_it_runs_where_there_is_nothing_but_torch_numpy_einops_and_safetensors() -> None:
    blocked = ["ray", "av", "pydantic", "rich", "typer", "ftfy", "tokenizers", "huggingface_hub", "transformers"]
    blocked += ["diffusers", "PIL", "yaml", "opentelemetry", "matplotlib", "obstore", "fastapi", "accelerate"]
    code = f"""
import sys
sys.modules |= dict.fromkeys({blocked})  # None: import raises
from helios_core.bench import main
from helios_core.errors import InvalidInput
main({[*TINY, *QUICK, "--sections", "text", "memory"]})
try:
    main({[*TINY, "--compare", "diffusers"]})
except InvalidInput as error:
    assert "0.42.1" in str(error), error
else:
    raise SystemExit("diffusers was not missed")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list(json.loads(run.stdout.splitlines()[-1])["sections"]) == ["text", "memory"]


@pytest.mark.parametrize("words", [["1,1,1", "2,2,2"], ["1,1,1 2,2,2"]])
def test_lists_of_steps(words: list[str]) -> None:
    assert step_lists(words) == ((1, 1, 1), (2, 2, 2))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--steps", "1,1"], "steps"),
        (["--steps", "1,x,1"], "for example 2,2,2"),
        (["--size", "65x64"], "size"),
        (["--compare", "diffusers", "--compare-mode", "fast"], "eager,compiled"),
        (["--dtype", "int8"], "float32"),
    ],
)
def test_bad_options_are_refused(options: list[str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        main([*TINY, *options])


def test_a_model_is_measured_at_its_own_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        main(["--model", str(tmp_path / "missing")])
    model = Model.load("random", torch.device("cpu"), torch.float32)
    subject = Subject.of(model, None, ())
    assert (subject.width, subject.height) == model.card.default_size
    assert [steps for _, _, steps in subject.ways()] == [(1, 1, 1), (2, 2, 2)]
