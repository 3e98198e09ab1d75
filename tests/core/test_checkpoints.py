"""Loading is strict: what a folder lacks, has too much of or has in another shape is named, and nothing is guessed."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from hatchling.builders.wheel import WheelBuilder
from safetensors.torch import load_file, save_file
from transformers import UMT5Config

from helios_core.checkpoints import PARTS, Checkpoint
from helios_core.config import TransformerConfig
from helios_core.demo.layout import make_tokenizer, write_layout
from helios_core.demo.stand_in import TEXT_ENCODER, TRANSFORMER, write_checkpoint
from helios_core.demo.stand_in import VAE as VAE_CONFIG
from helios_core.demo.words import vocabulary
from helios_core.errors import CheckpointError, InvalidInput
from helios_core.helios import Helios
from helios_core.sampling.guidance import CFG_ZERO_STAR, CLASSIFIER_FREE
from helios_core.sampling.solvers import few_step, unipc
from helios_core.weights import load_sampler, load_text_encoder, placement, verify

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


VAE = "vae/diffusion_pytorch_model.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
TEXT = "text_encoder/model-00001-of-00002.safetensors"

# what is done to a good folder ▸ words that the error must hold
BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no model_index": (lambda f: (f / "model_index.json").unlink(), ["model_index.json", "missing"]),
    "no config": (lambda f: (f / "vae/config.json").unlink(), ["vae/config.json", "missing"]),
    "config is no JSON": (lambda f: (f / "vae/config.json").write_text("{"), ["vae/config.json", "JSON"]),
    "config is a list": (lambda f: (f / "vae/config.json").write_text("[]"), ["vae/config.json", "object"]),
    "config with a wrong type": (
        lambda f: edit_json(f / "transformer/config.json", num_layers="2"),
        ["transformer/config.json", "num_layers", "'2'", "int"],
    ),
    "residual VAE": (lambda f: edit_json(f / "vae/config.json", is_residual=True), ["is_residual", "True", "False"]),
    "amplified history": (
        lambda f: edit_json(f / "transformer/config.json", is_amplify_history=True),
        ["is_amplify_history", "True"],
    ),
    "rope that does not fill a head": (
        lambda f: edit_json(f / "transformer/config.json", rope_dim=[2, 2, 2]),
        ["rope_dim", "(2, 2, 2)", "32"],
    ),
    "unknown variant": (
        lambda f: edit_json(f / "model_index.json", is_distilled=False),
        ["not a variant", "is_distilled False, is_cfg_zero_star False; served: base", "mid", "distilled"],
    ),
    "Base's pipeline with a Distilled's scheduler": (
        lambda f: edit_json(f / "model_index.json", _class_name="HeliosPipeline"),
        ["pipeline_class HeliosPipeline, scheduler_class HeliosDMDScheduler"],
    ),
    "Distilled with Mid's guidance": (
        lambda f: edit_json(f / "model_index.json", is_cfg_zero_star=True),
        ["is_distilled True, is_cfg_zero_star True"],
    ),
    "unknown scheduler": (
        lambda f: edit_json(f / SCHEDULER, _class_name="UniPCMultistepScheduler"),
        ["scheduler_class UniPCMultistepScheduler"],
    ),
    "two stages": (
        lambda f: edit_json(f / SCHEDULER, stages=2, stage_range=[0, 0.5, 1]),
        [SCHEDULER, "stages is 2; supported for distilled: 3"],
    ),
    "stages that do not fill the range": (
        lambda f: edit_json(f / SCHEDULER, stage_range=[0, 1 / 3, 2 / 3, 0.9]),
        [SCHEDULER, "stage_range", "0.9"],
    ),
    "missing weights file": (lambda f: (f / VAE).unlink(), [VAE, "missing"]),
    "missing shard": (lambda f: (f / SHARD).unlink(), [SHARD, "missing"]),
    "pickle in place of weights": (
        lambda f: (f / VAE).rename(f / "vae/diffusion_pytorch_model.bin"),
        [VAE, "missing", "diffusion_pytorch_model.bin is refused"],
    ),
    "not safetensors": (lambda f: (f / VAE).write_bytes(b"\x80\x04K\x01."), [VAE, "not a whole safetensors file"]),
    "truncated": (lambda f: (f / VAE).write_bytes((f / VAE).read_bytes()[:-100]), [VAE, "not a whole"]),
    "empty file": (lambda f: (f / SHARD).write_bytes(b""), [SHARD, "not a whole"]),
    "missing key": (
        lambda f: edit_weights(f / VAE, lambda w: w.pop("quant_conv.bias")),
        ["vae", "1 of", "missing", "quant_conv.bias", "(32,)"],
    ),
    "extra key": (
        lambda f: edit_weights(f / VAE, lambda w: w.update(extra=torch.ones(1))),
        [VAE, "extra", "not a parameter"],
    ),
    "misshapen": (
        lambda f: edit_weights(f / VAE, lambda w: w.update({"quant_conv.bias": torch.ones(31)})),
        [VAE, "quant_conv.bias", "(31,)", "(32,)"],
    ),
    "whole numbers": (
        lambda f: edit_weights(f / VAE, lambda w: w.update({"quant_conv.bias": torch.ones(32, dtype=torch.int32)})),
        [VAE, "quant_conv.bias", "I32", "BF16"],
    ),
    "key that the index does not list": (
        lambda f: edit_weights(f / SHARD, lambda w: w.update(extra=torch.ones(1))),
        [SHARD, "extra", "index does not list"],
    ),
    "shard outside of the folder": (
        lambda f: edit_json(f / INDEX, weight_map={"a": "../../etc/passwd.safetensors"}),
        [INDEX, "passwd"],
    ),
    "text encoder of another width": (
        lambda f: edit_json(f / "text_encoder/config.json", d_model=32),
        ["text_encoder/config.json", "d_model", "32", "64"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), ["tokenizer.json", "missing"]),
    "broken tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"), ["tokenizer.json", "not a"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_before_weights_are_read(folder: Path, name: str) -> None:
    breaks, words = BROKEN[name]
    breaks(folder)
    with pytest.raises(CheckpointError) as caught:
        verify(Checkpoint.open(str(folder)))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("name", [VAE, SHARD, "vae/diffusion_pytorch_model.bin", "tokenizer/tokenizer.json", SCHEDULER])
def test_no_file_of_a_folder_can_run_anything(folder: Path, tmp_path: Path, name: str) -> None:
    """A pickle that leaves a canary, in place of a file, or of another name beside the gap."""
    canary = tmp_path / "canary"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    trap = pickle.dumps(Trap())
    pickle.loads(trap)  # noqa: S301 - it works
    canary.unlink()
    if name.endswith(".bin"):
        (folder / VAE).unlink()
    (folder / name).write_bytes(trap)
    with pytest.raises(CheckpointError):
        Helios.load(str(folder), "cpu")
    assert not canary.exists()


def test_whole_folder_is_accepted(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    verify(checkpoint)
    assert (checkpoint.card.id, checkpoint.card.variant.name, checkpoint.card.size_multiple) == (
        "tiny",
        "distilled",
        64,
    )


# variant ▸ card, and what the sampler is made of
VARIANT_PARTS = {
    "base": (1, 16, 5.0, unipc, CLASSIFIER_FREE),
    "mid": (3, 64, 5.0, unipc, CFG_ZERO_STAR),
    "distilled": (3, 64, 1.0, few_step, CLASSIFIER_FREE),
}


@pytest.mark.parametrize("variant", VARIANT_PARTS)
def test_the_three_layouts_are_told_apart(tmp_path: Path, variant: str) -> None:
    write_checkpoint(tmp_path, variant=variant)
    checkpoint = Checkpoint.open(str(tmp_path))
    card, sampler = checkpoint.card, load_sampler(checkpoint, CPU, torch.float32)
    assert card.variant.name == variant
    parts = (card.stages, card.size_multiple, card.variant.guidance_scale, sampler.solver, sampler.guidance)
    assert parts == VARIANT_PARTS[variant]
    assert all(len(steps) == card.stages for steps in card.variant.presets.values())


@pytest.mark.parametrize("name, variant", [("random", "distilled"), ("random-base", "base"), ("random-mid", "mid")])
def test_stand_ins_by_name(name: str, variant: str) -> None:
    checkpoint = Checkpoint.open(name)
    verify(checkpoint)
    card = checkpoint.card
    assert (card.id, card.variant.name, card.default_size, checkpoint.source) == (name, variant, (128, 64), name)
    assert card.vocabulary is None


def test_the_demo_is_shipped_and_knows_its_words(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open("demo")
    verify(checkpoint)
    card = checkpoint.card
    assert (card.id, card.variant.name, card.size_multiple, checkpoint.source) == ("demo", "distilled", 128, "demo")
    assert (card.default_size, card.vocabulary) == ((256, 128), vocabulary())

    wheel = Path(next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path))))
    shipped = {str(path.relative_to(ROOT)) for path in checkpoint.folder.rglob("*") if path.is_file()}
    assert shipped <= set(ZipFile(wheel).namelist())
    assert wheel.stat().st_size <= 10e6


def test_weights_are_written_as_they_are_and_as_one_file(made: Path, tmp_path: Path) -> None:
    def weights_of(part: str) -> dict[str, torch.Tensor]:
        files = [load_file(path) for path in (made / part).glob("*.safetensors")]
        return {name: w.bfloat16() for file in files for name, w in file.items()}

    weights = {part: weights_of(part) for part in PARTS}
    write_layout(
        tmp_path,
        "distilled",
        text_encoder=(UMT5Config(**TEXT_ENCODER), weights["text_encoder"]),
        transformer=(TRANSFORMER, weights["transformer"]),
        vae=(VAE_CONFIG, weights["vae"]),
        tokenizer=make_tokenizer(),
    )
    written = {path.parent.name: load_file(path) for path in tmp_path.rglob("*.safetensors")}
    assert len(list(tmp_path.rglob("*.safetensors*"))) == len(written) == 3  # and no index
    for part in PARTS:
        assert written[part].keys() == weights[part].keys()
        assert all(w.dtype == torch.bfloat16 and torch.equal(w, weights[part][n]) for n, w in written[part].items())
    verify(Checkpoint.open(str(tmp_path)))


def test_text_encoder_and_vae_are_the_same_in_all_stand_ins(made: Path, tmp_path: Path) -> None:
    shards = {}
    for variant in ("base", "mid"):
        write_checkpoint(tmp_path / variant, variant=variant)
        for part in ("text_encoder", "tokenizer", "vae"):
            for path in (made / part).iterdir():
                assert (tmp_path / variant / part / path.name).read_bytes() == path.read_bytes()
        shards[variant] = (tmp_path / variant / SHARD).read_bytes()
    assert len({*shards.values(), (made / SHARD).read_bytes()}) == 3


# settings of a HeliosScheduler that are not served ▸ words that the error must hold
BROKEN_UNIPC: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Euler": ({"scheduler_type": "euler"}, ["scheduler_type is 'euler'", "'unipc'"]),
    "third order": ({"solver_order": 3}, ["solver_order is 3; supported: 2"]),
    "bh1": ({"solver_type": "bh1"}, ["solver_type is 'bh1'", "'bh2'"]),
    "noise prediction": ({"predict_x0": False}, ["predict_x0 is False"]),
    "full order to the end": ({"lower_order_final": False}, ["lower_order_final is False"]),
    "no corrector at first": ({"disable_corrector": [0]}, ["disable_corrector is (0,)"]),
    "thresholding": ({"thresholding": True}, ["thresholding is True"]),
    "another predictor": ({"solver_p": "DDIM"}, ["solver_p is 'DDIM'"]),
    "shift of one stage": ({"shift": 3.0, "use_dynamic_shifting": False}, ["shift is 3.0; supported: 1.0"]),
    "both shifts": ({"shift": 3.0}, ["shift is 3.0", "use_dynamic_shifting"]),
    "three stages": ({"stages": 3, "stage_range": [0, 1 / 3, 2 / 3, 1]}, ["stages is 3; supported for base: 1"]),
    "no stages": ({"stages": 0, "stage_range": [0]}, ["stage_range is (0.0,)"]),
    "unknown shift": ({"time_shift_type": "cubic"}, ["time_shift_type is 'cubic'"]),
    "epsilon": ({"prediction_type": "epsilon"}, ["prediction_type is 'epsilon'"]),
}


@pytest.mark.parametrize("name", BROKEN_UNIPC)
def test_settings_of_the_solver_that_are_not_served_are_refused(tmp_path: Path, name: str) -> None:
    settings, words = BROKEN_UNIPC[name]
    write_checkpoint(tmp_path, variant="base")
    edit_json(tmp_path / SCHEDULER, **settings)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(tmp_path))
    assert all(word in str(caught.value) for word in (SCHEDULER, *words)), str(caught.value)


def test_left_out_settings_of_the_scheduler_are_those_of_its_class(tmp_path: Path) -> None:
    types = {}
    for variant in ("mid", "distilled"):
        write_checkpoint(tmp_path / variant, variant=variant)
        path = tmp_path / variant / SCHEDULER
        path.write_text(json.dumps({"_class_name": json.loads(path.read_text())["_class_name"]}))
        types[variant] = Checkpoint.open(str(tmp_path / variant)).scheduler.time_shift_type
    assert types == {"mid": "exponential", "distilled": "linear"}


def test_all_zero_text_encoder_is_refused(folder: Path) -> None:
    for path in (folder / "text_encoder").glob("*.safetensors"):
        edit_weights(path, lambda w: [t.zero_() for t in w.values()])
    with pytest.raises(CheckpointError, match="all zero"):
        load_text_encoder(Checkpoint.open(str(folder)), CPU, torch.float32)


def test_embedding_table_is_found_under_either_name(folder: Path) -> None:
    before = load_text_encoder(Checkpoint.open(str(folder)), CPU, torch.float32).encode("a sea")
    index = folder / "text_encoder/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = folder / "text_encoder" / weight_map["shared.weight"]
    edit_weights(shard, lambda w: w.update({"encoder.embed_tokens.weight": w.pop("shared.weight")}))
    weight_map["encoder.embed_tokens.weight"] = weight_map.pop("shared.weight")
    edit_json(index, weight_map=weight_map)
    after = load_text_encoder(Checkpoint.open(str(folder)), CPU, torch.float32).encode("a sea")
    assert after.digest == before.digest


def test_old_name_of_the_last_table_is_accepted(folder: Path) -> None:
    name, old = "norm_out.scale_shift_table", "scale_shift_table"
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shard = folder / "transformer" / weight_map[name]
    table = load_file(shard)[name]
    edit_weights(shard, lambda w: w.update({old: w.pop(name)}))
    weight_map[old] = weight_map.pop(name)
    edit_json(folder / INDEX, weight_map=weight_map)
    model = load_sampler(Checkpoint.open(str(folder)), CPU, torch.float32).model
    assert torch.equal(model.get_parameter(name), table)  # type: ignore[attr-defined]


def test_bf16_keeps_in_fp32_what_the_reference_keeps(folder: Path) -> None:
    model = load_sampler(Checkpoint.open(str(folder)), CPU, torch.bfloat16).model
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}  # type: ignore[attr-defined]
    rest = {p.dtype for name, p in model.named_parameters() if name not in kept}  # type: ignore[attr-defined]
    layers = range(TRANSFORMER.num_layers)
    assert rest == {torch.bfloat16}
    assert kept == {
        *(f"condition_embedder.time_embedder.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")),
        *(f"blocks.{i}.scale_shift_table" for i in layers),
        *(f"blocks.{i}.norm2.{leaf}" for i in layers for leaf in ("weight", "bias")),
        "norm_out.scale_shift_table",
    }


def test_a_stand_in_is_the_same_everywhere(made: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "again")
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((made / p).read_bytes() == (tmp_path / "again" / p).read_bytes() for p in files)


@pytest.mark.parametrize("model", ["no/such/folder", "./nothing", "not a model", "nobody/nothing"])
def test_unknown_models(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="model"):
        Checkpoint.open(model)


def test_unknown_keys_of_a_config_are_ignored(folder: Path) -> None:
    """Official files carry keys of the training, such as restrict_self_attn."""
    edit_json(folder / "transformer/config.json", restrict_self_attn=True)
    assert Checkpoint.open(str(folder)).transformer == dataclasses.replace(TRANSFORMER)


def test_defaults_are_the_official_14b() -> None:
    config = TransformerConfig()
    assert (config.hidden_dim, config.num_layers, config.text_dim) == (5120, 40, 4096)


@pytest.mark.parametrize(("device", "dtype"), [("tpu", "auto"), ("cuda:99", "auto"), ("cpu", "int8"), ("meta", "auto")])
def test_unknown_placement(device: str, dtype: str) -> None:
    with pytest.raises(InvalidInput):
        placement(device, dtype)


def test_generation_stops_at_bad_input_before_it_computes(made: Path) -> None:
    helios = Helios.load(str(made), device="cpu")
    with pytest.raises(InvalidInput, match="size is '100x100'"):
        helios.stream("a sea", size="100x100")  # raises at the call, not at the first chunk


@pytest.mark.parametrize(
    "file", ["text_encoder/config.json", "tokenizer/tokenizer.json", "vae/config.json", "vae", "text_encoder"]
)
def test_digests_tell_what_can_be_shared(tmp_path: Path, file: str) -> None:
    for name in ("one", "other"):
        write_checkpoint(tmp_path / name)
    one, other = (Checkpoint.open(str(tmp_path / name)) for name in ("one", "other"))
    parts = ("text_encoder", "vae")
    assert [one.digest(part) for part in parts] == [other.digest(part) for part in parts]
    changed = other.folder / file
    if changed.is_dir():
        changed = sorted(changed.glob("*.safetensors"))[-1]
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    own = "vae" if file.startswith("vae") else "text_encoder"
    assert [one.digest(part) == other.digest(part) for part in parts] == [part != own for part in parts]
