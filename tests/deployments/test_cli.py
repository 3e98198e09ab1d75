"""The command line: what it refuses, in one line each, and the files that it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deployments.cli import main
from deployments.config import AppConfig
from deployments.store import Store
from helios_core.demo.stand_in import write_checkpoint
from helios_core.demo.words import Scene, vocabulary
from helios_core.demo.world import film
from helios_core.helios import Helios
from helios_core.media.fragments import encode_fragment
from helios_core.spec import Limits
from tests.core.media_files import i420
from tests.core.test_provenance import MADE_BY_AI, said_of_video
from tests.deployments.boxes import read_boxes

ROOT = Path(__file__).parents[2]
RANDOM = ["--model", "random"]
FAST = [*RANDOM, "--steps", "1,1,1", "--no-amplify-first-chunk"]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def helios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`helios(*arguments)`: (status, stderr). In this process and an empty folder; no Ray may start, no hub is there.

    An exception that would be a traceback on the command line fails the test.
    """

    def no_ray(**_: object) -> None:
        raise AssertionError("Ray was to be started")

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("ray.init", no_ray)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["helios", *map(str, arguments)])
        status: str | int | None = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        assert isinstance(status, int)
        return status, capsys.readouterr().err

    return run


def subprocess_run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`helios` in a process of its own and in `folder`, where Ray would put its sessions too."""
    environment = {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder / "ray"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "deployments.cli", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def assert_one_line(stderr: str, words: list[str]) -> None:
    [line] = stderr.splitlines()
    assert line.startswith("helios: ")
    assert all(word in line for word in words), line


# ── bad input ────────────────────────────────────────────────────────────────

# name ▸ (options beside the prompt, words that the line must hold)
BAD_INPUT: dict[str, tuple[list[str], list[str]]] = {
    "size": (["--size", "100x100"], ["size is '100x100'", "multiples of 64 from 64 to 1920", "nearest: 128x128"]),
    "seconds not a number": (["--seconds", "nan"], ["seconds is nan", "from 1/24 (one frame) to 600"]),
    "seconds infinite": (["--seconds", "inf"], ["seconds is inf", "to 600"]),
    "seconds negative": (["--seconds", "-1"], ["seconds is -1.0", "to 600"]),
    "seed negative": (["--seed", "-1"], ["seed is -1", "from 0 to 2^63-1"]),
    "seed too large": (["--seed", str(2**63)], [f"seed is {2**63}", "2^63-1"]),
    "steps too few": (["--steps", "1,1"], ["steps is [1, 1]", "3 whole numbers from 1 to 50"]),
    "steps in words": (["--steps", "a,b"], ["steps is 'a,b'", "whole numbers", "2,2,2"]),
    "steps empty": (["--steps", ""], ["steps is ''", "2,2,2"]),
    "preset unknown": (["--preset", "best"], ["preset is 'best'", "realtime, quality"]),
    "preset with steps": (["--preset", "quality", "--steps", "1,1,1"], ["preset is 'quality'", "not both"]),
    "device unknown": (["--device", "tpu"], ["device is 'tpu'", "auto, cpu, cuda or cuda:N"]),
    "device missing": (["--device", "cuda:99"], ["device is 'cuda:99'", "this machine has"]),
    "dtype unknown": (["--dtype", "int8"], ["dtype is 'int8'", "float32, bfloat16"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_with_field_value_and_range(helios: Run, name: str) -> None:
    options, words = BAD_INPUT[name]
    status, stderr = helios("generate", "a sea", *RANDOM, *options)
    assert status == 2
    assert_one_line(stderr, words)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_prompt_is_refused(helios: Run, prompt: str) -> None:
    status, stderr = helios("generate", prompt, *RANDOM)
    assert status == 2
    assert_one_line(stderr, [f"prompt is {prompt!r}", "not empty"])


def test_an_option_of_another_type_is_refused(helios: Run) -> None:
    status, stderr = helios("generate", "a sea", "--seconds", "four")
    assert status == 2
    assert "--seconds" in stderr


@pytest.mark.parametrize(("option", "field"), [("--output", "output"), ("--save-latents", "save_latents")])
@pytest.mark.parametrize("path", ["missing/file", "."])
def test_a_path_that_cannot_be_written_is_refused_before_the_model_is_opened(
    helios: Run, option: str, field: str, path: str
) -> None:
    status, stderr = helios("generate", "a sea", option, path, "--model", "no/such/model")
    assert status == 2
    assert_one_line(stderr, [f"{field} is '{path}'", "a file that can be written"])
    assert list(Path.cwd().iterdir()) == []


def test_a_refused_request_leaves_an_older_video_alone(helios: Run) -> None:
    Path("out.mp4").write_bytes(b"older")
    assert helios("generate", "a sea", *RANDOM, "--seed", "-1")[0] == 2
    assert Path("out.mp4").read_bytes() == b"older"


def test_bad_input_in_a_process(tmp_path: Path) -> None:
    run = subprocess_run(tmp_path, "generate", "a sea", *RANDOM, "--size", "100x100")
    assert (run.returncode, run.stdout) == (2, "")
    assert_one_line(run.stderr, ["size is '100x100'", "128x128"])


# ── models that cannot be loaded ─────────────────────────────────────────────

VAE = "vae/diffusion_pytorch_model.safetensors"


def misshape(path: Path) -> None:
    save_file({**load_file(path), "quant_conv.bias": torch.ones(31)}, path)


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing file": (lambda f: (f / VAE).unlink(), [VAE, "file is missing"]),
    "missing folder": (lambda f: shutil.rmtree(f / "tokenizer"), ["tokenizer/tokenizer.json", "file is missing"]),
    "truncated": (lambda f: os.truncate(f / VAE, 10_000), [VAE, "not a whole safetensors file"]),
    "misshapen": (lambda f: misshape(f / VAE), [VAE, "quant_conv.bias has shape (31,); needed: (32,)"]),
    "pickle": (
        lambda f: (f / VAE).rename(f / "vae/diffusion_pytorch_model.bin"),
        [VAE, "file is missing", "diffusion_pytorch_model.bin is refused, because loading it could run code"],
    ),
    "pickle by another name": (lambda f: (f / VAE).write_bytes(b"\x80\x04K\x01."), [VAE, "not a whole safetensors"]),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(folder)
    return folder


@pytest.mark.parametrize("command", [["generate", "a sea"], ["serve"]])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(helios: Run, tiny: Path, tmp_path: Path, name: str, command: list[str]) -> None:
    breaks, words = BROKEN[name]
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    breaks(folder)
    status, stderr = helios(*command, "--model", folder)
    assert status == 1
    assert_one_line(stderr, words)


def test_broken_checkpoint_ends_serve_before_ray_starts(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    misshape(folder / VAE)
    (tmp_path / "ray").mkdir()
    run = subprocess_run(tmp_path, "serve", "--model", folder)
    assert (run.returncode, run.stdout) == (1, "")
    assert_one_line(run.stderr, ["quant_conv.bias has shape (31,); needed: (32,)"])
    assert list((tmp_path / "ray").iterdir()) == []  # Ray would have made a session folder here


@pytest.mark.parametrize("command", [["generate", "a sea", "--model"], ["serve", "--model"], ["download"]])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("helios-distilld", ["neither a folder", "hub id (owner/name)", "demo, ", "helios-distilled"]),
        ("not a model", ["neither a folder", "demo, ", "helios-distilled"]),
        ("a" * 5000, ["neither a folder", "demo, ", "helios-distilled"]),
        ("nobody/nothing", ["not a folder", "not in the local hub cache", "HF_HUB_OFFLINE"]),
    ],
)
def test_unknown_models_and_a_hub_out_of_reach(helios: Run, command: list[str], model: str, words: list[str]) -> None:
    status, stderr = helios(*command, model)
    assert status == 1
    assert_one_line(stderr, [f"model {model!r}", *words])


@pytest.mark.parametrize("model", ["./nothing", "/no/such/folder", "~nobody-of-this-name/models"])
def test_folders_that_do_not_exist(helios: Run, model: str) -> None:
    status, stderr = helios("generate", "a sea", "--model", model)
    assert status == 1
    assert_one_line(stderr, [f"model {model!r}: no such folder"])


# ── configuration ────────────────────────────────────────────────────────────

# name ▸ (the file, words that the message must hold beside the file's name)
BAD_CONFIG: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("modle: demo", ["modle is 'demo'", "not permitted"]),
    "unknown key in a pool": (
        "models: [{sampler: {num_replicas: 2}}]",
        ["models.0.sampler.num_replicas is 2", "not permitted"],
    ),
    "unknown key in the limits": ("limits: {max_sides: 640}", ["limits.max_sides is 640"]),
    "text for a number": ("port: '8000'", ["port is '8000'", "integer"]),
    "text for a limit": ("limits: {max_side: '640'}", ["limits.max_side is '640'", "integer"]),
    "number for a text": ("models: [{model: 5}]", ["models.0.model is 5", "string"]),
    "out of range": ("port: 65536", ["port is 65536", "65535"]),
    "no replica": ("ingress: {min_replicas: 0}", ["ingress", "min_replicas is 0", "at least 1"]),
    "no replica at all": ("vae_decoder: {max_replicas: 0}", ["vae_decoder.max_replicas is 0", "1"]),
    "fewer at most than at least": ("vae_decoder: {min_replicas: 2}", ["vae_decoder", "max_replicas is 1", "at least"]),
    "two Directors": ("director: {max_replicas: 2}", ["director", "max_replicas is 2", "allowed: 1"]),
    "pace without testing": (
        "models: [{sampler: {min_chunk_seconds: 1}}]",
        ["min_chunk_seconds is 1.0; allowed: 0, unless testing is true"],
    ),
    "no model": ("models: []", ["models is []", "at least 1"]),
    "not a mapping": ("[demo]", ["['demo']", "object"]),
    "broken YAML": ("model: [demo\nport: 1", ["not readable as YAML", "line 2"]),
    "no date": ("model: 2026-13-01", ["not readable as YAML", "month"]),
    "a date for a setting": ("2026-01-01: 1", ["not plain settings"]),
    "a mapping that holds itself": ("limits: &a {max_side: *a}", ["not plain settings"]),
    "Python in YAML": ("model: !!python/name:os.system", ["not readable as YAML", "python/name"]),
}


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_bad_configuration_is_refused_with_file_setting_and_value(helios: Run, name: str) -> None:
    text, words = BAD_CONFIG[name]
    Path("helios.yaml").write_text(text)
    status, stderr = helios("serve", "--config", "helios.yaml")
    assert status == 1
    assert stderr.startswith("helios: helios.yaml: ")
    assert all(word in stderr for word in words), stderr
    assert [path.name for path in Path.cwd().iterdir()] == ["helios.yaml"]


def test_missing_configuration_is_refused(helios: Run) -> None:
    status, stderr = helios("serve", "--config", "none.yaml")
    assert status == 1
    assert_one_line(stderr, ["none.yaml", "No such file"])


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        (["--port", "70000"], 1, ["port is 70000", "65535"]),
        (["--samplers", "0"], 1, ["models.0.sampler.max_replicas is 0"]),
        (["--store", "ftp://somewhere"], 2, ["store is 'ftp://somewhere'", "s3://"]),
    ],
)
def test_bad_options_of_serve_are_refused(helios: Run, options: list[str], expected: int, words: list[str]) -> None:
    status, stderr = helios("serve", *RANDOM, *options)
    assert status == expected
    assert_one_line(stderr, words)


def test_a_file_sets_everything_and_options_override_it(tmp_path: Path) -> None:
    path = tmp_path / "helios.yaml"
    path.write_text(
        "port: 9000\nhost: 0.0.0.0\nlimits: {max_side: 640}\n"
        "models: [{sampler: {num_gpus: 1, dtype: bfloat16}}, {model: random-base}]\n"
    )
    config = AppConfig.read(path).override(port=9001, host=None).with_replicas(samplers=3)
    first, second = config.models
    assert (first.model, second.model, second.sampler.max_replicas) == ("demo", "random-base", 3)
    assert (config.port, config.host) == (9001, "0.0.0.0")
    assert config.limits == Limits(max_side=640)
    assert (first.sampler.min_replicas, first.sampler.max_replicas, first.sampler.num_gpus) == (3, 3, 1)
    assert first.sampler.dtype == "bfloat16"
    (only,) = config.with_model("folder").models
    assert (only.model, only.sampler) == ("folder", first.sampler)
    assert config.vae_decoder == AppConfig().vae_decoder


def test_options_alone_leave_the_defaults() -> None:
    assert AppConfig().with_model(None).override(port=None, store="elsewhere") == AppConfig(store="elsewhere")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert AppConfig.read(tmp_path / "empty.yaml") == AppConfig()


# ── the store's folder ───────────────────────────────────────────────────────


def test_a_second_service_on_the_same_folder_is_refused(helios: Run, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with Store(str(folder)).lock():
        status, stderr = helios("serve", *RANDOM, "--store", folder)
    assert status == 1
    assert_one_line(stderr, [str(folder), "in use by another Helios service"])


# ── generate ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("seconds", "frames", "chunks"), [(1, 24, 1), (1.375, 33, 1), (2.5, 60, 2)])
def test_generate_writes_a_playable_file_and_the_latents(helios: Run, seconds: float, frames: int, chunks: int) -> None:
    status, stderr = helios(
        "generate", "a sea", "--seconds", seconds, "--seed", 7, *FAST, "-o", "sea.mp4", "--save-latents", "sea.latents"
    )
    assert (status, stderr.splitlines()[-1]) == (0, f"sea.mp4: {frames} frames")
    with av.open("sea.mp4") as container:
        pictures = list(container.decode(video=0))
    assert [picture.pts * picture.time_base * 24 for picture in pictures] == list(range(frames))
    assert {(picture.width, picture.height) for picture in pictures} == {(128, 64)}
    assert said_of_video(Path("sea.mp4").read_bytes()) == MADE_BY_AI

    saved = load_file("sea.latents")
    stream = Helios.load("random").stream("a sea", seconds=seconds, seed=7, steps=(1, 1, 1), amplify_first_chunk=False)
    assert list(saved) == ["latents"]
    assert saved["latents"].shape == (1, 16, 9 * chunks, 8, 16)
    assert saved["latents"].dtype == torch.float32
    assert torch.equal(saved["latents"], torch.cat([chunk.state.latents for chunk in stream], dim=2))


def test_generate_in_a_process_writes_what_it_writes_here(helios: Run, tmp_path: Path) -> None:
    arguments = ["generate", "a sea", "--seconds", "0.5", "--size", "64x128", *FAST, "-o"]
    run = subprocess_run(tmp_path, *arguments, "there.mp4")
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert helios(*arguments, "here.mp4")[0] == 0
    assert Path("here.mp4").read_bytes() == (tmp_path / "there.mp4").read_bytes()


def test_memory_of_generate_does_not_grow() -> None:
    seconds = str(41 * 33 / 24)
    options = ["--seconds", seconds, "--preset", "realtime", "-o", "/dev/stdout"]
    command = [sys.executable, "-m", "deployments.cli", "generate", "a sea", *RANDOM, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        early, late = held_memory(process.stdout.read, psutil.Process(process.pid))
    assert process.returncode == 0
    assert late == pytest.approx(early, rel=0.05)  # kept frames alone would be 7 %


def held_memory(read: Callable[[int], bytes], process: psutil.Process) -> tuple[int, int]:
    """Bytes of resident memory that `process` held about the 4th and about the 40th of 41 fragments.

    Each the least of five fragments, because at any one of them the process may be in the midst of the next chunk.
    """
    memory = [process.memory_info().rss for kind, _ in read_boxes(read) if kind == "mdat"]
    assert len(memory) == 41
    return min(memory[1:6]), min(memory[36:41])


def test_generate_says_what_the_demo_model_understands(tmp_path: Path) -> None:
    run = subprocess_run(tmp_path, "generate", "--help")
    assert run.returncode == 0
    for kind, words in vocabulary().items():
        assert f"{kind}: {', '.join(words)}" in " ".join(run.stdout.split())


# ── score ────────────────────────────────────────────────────────────────────

SCENE = Scene("red", "disc", "blue", "sea", motion="left")
PROMPT = "a red sun over a blue sea, drifting left"


def write_film(path: Path, frames: int = 66, size: tuple[int, int] = (128, 64)) -> None:
    film_TCHW = film(SCENE, (1.0, 0.34), frames, size).clamp(0, 1)
    pixels = (film_TCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()
    fragment = encode_fragment(i420(pixels), chunk_index=0, first_frame=0, fps=24)
    path.write_bytes(fragment.init + fragment.data)


def test_score_writes_what_it_found(helios: Run) -> None:
    write_film(Path("film.mp4"))
    prompt = PROMPT.replace("blue", "green")
    assert helios("score", "film.mp4", "--prompt", prompt, "--json", "film.json", "--plot", "film.png") == (0, "")
    document = json.loads(Path("film.json").read_text())
    assert document["found"] == dataclasses.asdict(SCENE)
    assert [name for name, right in document["right"].items() if not right] == ["ground_colour"]
    assert document["percent"] == 80
    assert document["percent_per_second"] == [80, 80]
    assert (document["video"], document["frames"], document["fps"]) == ("film.mp4", 66, 24)
    assert [len(document[name]) for name in ("sharpness", "drift", "seams")] == [2, 2, 1]
    assert document["track"]["frame"] == list(range(0, 66, 4))
    assert document["track"]["x"] == pytest.approx([1 - t / 66 for t in range(0, 66, 4)], abs=0.02)
    with Image.open("film.png") as plot:
        assert plot.format == "PNG"
        assert len(plot.getcolors(plot.width * plot.height) or ()) > 3  # drawn on
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["film.json", "film.mp4", "film.png"]


def test_score_prints_one_table(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4")
    run = subprocess_run(tmp_path, "score", "film.mp4", "--prompt", PROMPT.replace("left", "right"))
    assert (run.returncode, run.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in run.stdout.splitlines() if "│" in line]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["object colour"] == ["red", "as asked"]
    assert cells["sky colour"] == ["-", "not asked for"]
    assert cells["motion"] == ["left", "asked for: right"]
    assert cells["right in the last 2 seconds"][0] == "80 %"
    assert {"similarity", "sharpness", "colour drift", "seam strength"} <= cells.keys()


def test_score_without_a_prompt_takes_any_video(helios: Run) -> None:
    write_film(Path("film.mp4"), size=(64, 96))
    assert helios("score", "film.mp4", "--json", "film.json", "--plot", "film.png") == (0, "")
    document = json.loads(Path("film.json").read_text())
    assert document["similarity"] > 0.9
    assert "found" not in document
    assert Path("film.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, ["film.mp4", "can be decoded", "No such file"]),
        (lambda path: path.mkdir(), ["film.mp4", "can be decoded", "directory"]),
        (lambda path: path.write_bytes(b""), ["film.mp4", "can be decoded", "Invalid data"]),
        (lambda path: path.write_text("no video " * 99), ["film.mp4", "can be decoded", "Invalid data"]),
        (lambda path: write_film(path, frames=33), ["a video of 33 frames (1.38 s)", "2 s or more"]),
        (lambda path: write_film(path, size=(64, 64)), ["frames of (64, 64, 3)", "twice as wide as high"]),
    ],
    ids=["missing", "folder", "empty", "text", "too short", "square"],
)
def test_score_refuses_what_is_no_video_for_it(helios: Run, write: Callable[[Path], object], words: list[str]) -> None:
    write(Path("film.mp4"))
    status, stderr = helios("score", "film.mp4", "--prompt", PROMPT, "--json", "film.json", "--plot", "film.png")
    assert status == 2
    assert_one_line(stderr, words)
    assert not Path("film.json").exists()
    assert not Path("film.png").exists()


def test_score_refuses_a_video_that_is_cut_off(helios: Run) -> None:
    write_film(Path("film.mp4"))
    os.truncate("film.mp4", Path("film.mp4").stat().st_size - 50)
    status, stderr = helios("score", "film.mp4")
    assert status == 2
    assert_one_line(stderr, ["film.mp4", "can be decoded"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "a cat"], ["prompt is 'a cat'", "sun, moon", "left, right"]),
        (["--json", "missing/film.json"], ["json is 'missing/film.json'", "can be written"]),
        (["--plot", "."], ["plot is '.'", "can be written"]),
    ],
)
def test_score_refuses_bad_options(helios: Run, options: list[str], words: list[str]) -> None:
    write_film(Path("film.mp4"), frames=48)
    status, stderr = helios("score", "film.mp4", *options)
    assert status == 2
    assert_one_line(stderr, words)
    assert [path.name for path in Path.cwd().iterdir()] == ["film.mp4"]
