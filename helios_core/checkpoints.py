"""A folder or hub id in the official layout becomes loaded components. No pickle, no guessing, no silent default.

Layout (the official repositories'): model_index.json, scheduler/, tokenizer/, text_encoder/, transformer/, vae/.
Weights are safetensors only. Keys must match in both directions and shapes must be equal. Modules are built on the
meta device and the file's tensors are assigned, so that no weight exists twice.

The hub, tokenizers and transformers are imported where they are needed: a bare machine with torch can benchmark a
folder, and replicas of the transformer and of the VAE start without them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import safetensors
import torch
from safetensors import safe_open
from torch import nn

from helios_core.config import (
    CHUNK_LATENTS,
    EXACT,
    HISTORY_LATENTS,
    SCHEDULERS,
    TEXT_TOKENS,
    VARIANTS,
    Approximations,
    SchedulerConfig,
    TransformerConfig,
    VaeConfig,
    Variant,
    read_config,
    read_json,
)
from helios_core.demo.stand_in import stand_in
from helios_core.demo.words import vocabulary
from helios_core.errors import CheckpointError, InvalidInput
from helios_core.memory import GB, check_room, peak_bytes, tensor_bytes
from helios_core.sampling.chunk import TEXT_CONTEXTS, ChunkSampler
from helios_core.sampling.guidance import CFG_ZERO_STAR, CLASSIFIER_FREE
from helios_core.sampling.solvers import SOLVERS
from helios_core.spec import ModelCard
from helios_core.state import StreamState
from helios_core.text import TextEncoder
from helios_core.transformer.fp8 import to_fp8
from helios_core.transformer.history import history_length
from helios_core.transformer.model import FP32_PARAMETERS, KEY_ALIASES, HeliosTransformer
from helios_core.vae.latents import LATENTS_PER_PASS, decode_chunk, to_i420
from helios_core.vae.model import WanVae

if TYPE_CHECKING:
    from huggingface_hub import RepoFile
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel

PARTS = ("text_encoder", "transformer", "vae")  # those with weights
# What inference reads. The repositories also hold two more 14B checkpoints (transformer_init, transformer_ode).
CONFIGURATION = ["model_index.json", *(f"{part}/*.json" for part in PARTS), "scheduler/*.json", "tokenizer/*.json"]
MEGABYTE = 2**20
Places = dict[str, tuple[Path, str]]  # parameter ▸ (file, key)
M = TypeVar("M", bound=nn.Module)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class KnownModel:
    """A short name for a model: where it comes from, the (width, height) it is at home at, the words that it knows."""

    source: Callable[[], str]
    default_size: tuple[int, int]
    vocabulary: dict[str, tuple[str, ...]] | None = None


KNOWN_MODELS = {
    "demo": KnownModel(lambda: str(Path(__file__).parent / "demo/model"), (256, 128), vocabulary()),
    "random": KnownModel(lambda: stand_in("distilled"), (128, 64)),
    "random-base": KnownModel(lambda: stand_in("base"), (128, 64)),
    "random-mid": KnownModel(lambda: stand_in("mid"), (128, 64)),
    "helios-base": KnownModel(lambda: "BestWishYsh/Helios-Base", (640, 384)),
    "helios-mid": KnownModel(lambda: "BestWishYsh/Helios-Mid", (640, 384)),
    "helios-distilled": KnownModel(lambda: "BestWishYsh/Helios-Distilled", (640, 384)),
}
DEFAULT_SIZE = (640, 384)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose JSON files were read and found to be of a variant that is served."""

    folder: Path
    hub_id: str | None  # owner/name@commit, if the folder is in the hub's cache; weights are fetched part by part
    source: str  # opens this very checkpoint in any process: hub id at its commit, known name, or absolute folder
    card: ModelCard
    transformer: TransformerConfig
    vae: VaeConfig
    scheduler: SchedulerConfig

    @classmethod
    def open(cls, model: str) -> Checkpoint:
        """The checkpoint behind a known name, a folder, or a hub id, of which only the JSON files are fetched here.

        A hub id may name a revision: owner/name@revision. Raises CheckpointError naming the file, the key and the
        allowed values.
        """
        known = KNOWN_MODELS.get(model)
        source = known.source() if known else model
        folder = _folder(source)
        transformer = read_config(TransformerConfig, folder / "transformer/config.json")
        vae = read_config(VaeConfig, folder / "vae/config.json")
        variant, scheduler = _variant(folder)
        if transformer.in_channels != vae.z_dim or transformer.out_channels != vae.z_dim:
            raise CheckpointError(
                f"{folder}: transformer in_channels {transformer.in_channels}, out_channels "
                f"{transformer.out_channels} and vae z_dim {vae.z_dim} must be equal"
            )
        card = ModelCard(
            id=folder.name if _is_folder(model) and not known else model,
            variant=variant,
            stages=scheduler.stages,
            size_multiple=vae.scale_factor_spatial * transformer.patch_size[1] * 2 ** (scheduler.stages - 1),
            default_size=known.default_size if known else DEFAULT_SIZE,
            vocabulary=known.vocabulary if known else None,
        )
        if _is_folder(source):
            return cls(folder, None, model if known else str(folder), card, transformer, vae, scheduler)
        hub_id = f"{source.partition('@')[0]}@{folder.name}"  # the cache names its folders by commit
        return cls(folder, hub_id, hub_id, card, transformer, vae, scheduler)

    def verify(self) -> None:
        """Checks every file that the loaders read by its header, and fetches what is missing of a hub id.

        Raises CheckpointError as the loaders would.
        """
        self._transformer()
        self._vae()
        self._text_encoder()

    def digest(self, part: str) -> str:
        """Equal for two checkpoints of which `part`, "text_encoder" with its tokenizer or "vae", has equal files.

        Reads every byte of a folder's; the hub tells its files' digests, so that none need be fetched for this.
        """
        found = hashlib.sha256()
        for folder in [part, "tokenizer"] if part == "text_encoder" else [part]:
            for path in sorted((self.folder / folder).glob("*.json")):
                found.update(f"{folder}/{path.name} {_sha256(path)}\n".encode())
        for name, sha256 in sorted(self._weights(part)):
            found.update(f"{name} {sha256}\n".encode())
        return found.hexdigest()

    def fingerprint(self) -> str:
        """Of all that makes a video what it is: other weights or another configuration have another one.

        Of a folder's weights it reads the first and the last megabyte of each file, as 81 GB would take minutes.
        Raises CheckpointError if a part is missing.
        """
        if self.hub_id is not None:
            return self.hub_id  # with its commit
        found = hashlib.sha256()
        for folder in (*PARTS, "scheduler", "tokenizer"):
            if not (self.folder / folder).is_dir():
                raise CheckpointError(f"{self.folder / folder}: folder is missing")
            for path in sorted((self.folder / folder).iterdir()):
                size = path.stat().st_size
                with path.open("rb") as file:
                    found.update(f"{folder}/{path.name} {size}\n".encode() + file.read(MEGABYTE))
                    file.seek(max(0, size - MEGABYTE))
                    found.update(file.read(MEGABYTE))
        return found.hexdigest()

    def _weights(self, part: str) -> list[tuple[str, str]]:
        """Name and SHA-256 of each of a part's weight files."""
        here = list((self.folder / part).glob("*.safetensors"))
        if self.hub_id is not None:
            repository, _, commit = self.hub_id.partition("@")
            try:
                return [(Path(each.path).name, each.lfs.sha256) for each in _listed(repository, part, commit)]
            except CheckpointError:
                if not here:
                    raise
                # The hub is out of reach, but its files were fetched before.
        return [(path.name, _sha256(path)) for path in here]

    def load_sampler(
        self, device: torch.device, dtype: torch.dtype, approximations: Approximations = EXACT
    ) -> ChunkSampler:
        """The transformer in `dtype`, except for the parameters that the reference keeps in fp32, with its solver.

        Raises CheckpointError also for sizes that FP8 cannot have, and, before anything is read, if memory is short.
        """
        model, places = self._transformer()

        check_room("transformer", device, self._sampler_needs(model, device, dtype, approximations))
        _fill(model, places, device, partial(transformer_dtype, dtype))
        if approximations.fp8:
            try:
                to_fp8(model)
            except ValueError as error:
                raise CheckpointError(f"{self.folder / 'transformer/config.json'}: {error}") from None
        model.join()
        variant = self.card.variant
        guidance = CFG_ZERO_STAR if variant.is_cfg_zero_star else CLASSIFIER_FREE
        return ChunkSampler(
            model, self.scheduler, SOLVERS[variant.scheduler_class], guidance, approximations.history_refresh
        )

    def load_vae(self, device: torch.device) -> WanVae:
        """The VAE, in fp32 as the reference runs it; on a GPU what decodes is in bf16, with channels last.

        What encodes stays in fp32: in bf16 a video no longer looks like the image that it begins with. A CPU is
        faster with columns last, and equal to the reference's last bit.
        """
        model, places = self._vae()

        def decode() -> None:
            with torch.device("meta"):
                vae = WanVae(self.vae).to(torch.bfloat16)
                for _ in vae.decode_frames(self._blank_state().latents.to("meta", torch.bfloat16), LATENTS_PER_PASS):
                    pass

        dtype_of = partial(vae_dtype, device)
        weights = tensor_bytes(model.named_parameters(), dtype_of)
        check_room("VAE", device, {"weights": weights, **self._work(device, decode)})
        _fill(model, places, device, dtype_of)
        if device.type == "cuda":
            model.lay_channels_last()
        return model

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """UMT5's encoder in `dtype`, and its tokenizer."""
        model, places, tokenizer = self._text_encoder()
        check_room("text encoder", device, {"weights": tensor_bytes(model.named_parameters(), lambda _: dtype)})
        _fill(model, places, device, lambda _: dtype)
        return TextEncoder(tokenizer, model)

    def warm_up_sampler(self, sampler: ChunkSampler) -> None:
        """On a GPU makes a chunk of the model's own size, so that what it takes is there before the first video.

        In the thread that will make the others: cuDNN keeps its plans for each thread.
        """
        if sampler.model.device.type == "cuda":
            guidance_scale = self.card.variant.guidance_scale
            sampler.warm_up(self.transformer.text_dim, self._blank_state(), guidance_scale)

    def warm_up_vae(self, vae: WanVae) -> None:
        """The same for decoding."""
        if vae.device.type == "cuda":
            decode_chunk(vae, self._blank_state().latents, to_i420)

    def _blank_state(self) -> StreamState:
        """The start of a video of the model's own size."""
        width, height = (side // self.vae.scale_factor_spatial for side in self.card.default_size)
        nothing = torch.zeros(1, self.vae.z_dim, HISTORY_LATENTS, height, width)
        return StreamState(0, nothing, None, torch.Generator().manual_seed(0).get_state())

    def _sampler_needs(
        self, model: HeliosTransformer, device: torch.device, dtype: torch.dtype, approximations: Approximations
    ) -> dict[str, int]:
        """Bytes by purpose. The work is that of the last stage at the model's own size."""
        config, scale = self.transformer, self.vae.scale_factor_spatial
        width, height = (side // scale for side in self.card.default_size)
        batch = 2 if self.card.variant.guidance_scale > 1 else 1

        def forward() -> None:
            """Of two blocks: the others come after them, in the same room."""
            with torch.device("meta"):
                short = HeliosTransformer(replace(config, num_layers=2)).requires_grad_(False).to(dtype)
                past = torch.empty(1, config.in_channels, 1 + HISTORY_LATENTS, height, width)
                text = short.text_context(torch.empty(batch, TEXT_TOKENS, config.text_dim))
                context = short.begin_chunk(past[:, :, :1], past[:, :, 1:], text)
                short(torch.empty(1, config.in_channels, CHUNK_LATENTS, height, width), 0.0, context)

        kept = history_length(height // 2, width // 2) if approximations.history_refresh != "step" else 0
        token = batch * config.num_layers * 2 * config.hidden_dim * dtype.itemsize  # its keys and values
        return {
            "weights": tensor_bytes(model.named_parameters(), partial(transformer_dtype, dtype)),
            "texts": TEXT_CONTEXTS * TEXT_TOKENS * token,
            "history": kept * token,
            **self._work(device, forward),
        }

    def _work(self, device: torch.device, run: Callable[[], object]) -> dict[str, int]:
        """The room that `run` takes on a GPU. Elsewhere it is left out: the first rehearsal takes seconds to import."""
        return {"work at {}x{}".format(*self.card.default_size): peak_bytes(run)} if device.type == "cuda" else {}

    def _transformer(self) -> tuple[HeliosTransformer, Places]:
        folder = self._part("transformer")
        model = _on_meta(folder, lambda: HeliosTransformer(self.transformer))
        return model, _locate(model, folder, "diffusion_pytorch_model", KEY_ALIASES)

    def _vae(self) -> tuple[WanVae, Places]:
        folder = self._part("vae")
        model = _on_meta(folder, lambda: WanVae(self.vae))
        return model, _locate(model, folder, "diffusion_pytorch_model")

    def _text_encoder(self) -> tuple[UMT5EncoderModel, Places, Tokenizer]:
        from tokenizers import Tokenizer
        from transformers import UMT5Config, UMT5EncoderModel

        folder = self._part("text_encoder")
        config = read_json(folder / "config.json")
        if config.get("d_model") != self.transformer.text_dim:
            raise CheckpointError(
                f"{folder / 'config.json'}: d_model is {config.get('d_model')!r}; needed: the transformer's text_dim "
                f"{self.transformer.text_dim}"
            )
        model = _on_meta(folder, lambda: UMT5EncoderModel(UMT5Config.from_dict(config)))
        # One table under two names, whatever tie_word_embeddings says; files hold either or both.
        model.encoder.embed_tokens = model.shared
        places = _locate(model, folder, "model", {"encoder.embed_tokens.weight": "shared.weight"})
        path = self.folder / "tokenizer/tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: file is missing")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower; its text is kept
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from None
        return model, places, tokenizer

    def _part(self, part: str) -> Path:
        """The folder of one part, with its weights."""
        if self.hub_id is not None:
            _fetch(self.hub_id, [f"{part}/*.safetensors"])
        return self.folder / part


def _on_meta(folder: Path, build: Callable[[], M]) -> M:
    """A module without memory. Raises CheckpointError for sizes that no module can have."""
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # noqa: BLE001 - torch and transformers each have their own ways to refuse a size
        raise CheckpointError(f"{folder / 'config.json'}: no model has these sizes: {error}") from None


def placement(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where to compute and in what. `auto`: the GPU in bf16 if there is one, else the CPU in fp32.

    Raises InvalidInput for an unknown name or a device that this machine lacks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InvalidInput("device", device, "auto, cpu, cuda or cuda:N") from None
    if place.type not in ("cpu", "cuda"):
        raise InvalidInput("device", device, "auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InvalidInput("device", device, f"this machine has {torch.cuda.device_count()} CUDA devices")
    dtypes = {"auto": torch.bfloat16 if place.type == "cuda" else torch.float32}
    dtypes |= {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise InvalidInput("dtype", dtype, f"one of {', '.join(dtypes)}")
    return place, dtypes[dtype]


def transformer_dtype(dtype: torch.dtype, name: str) -> torch.dtype:
    """What a parameter of the transformer is loaded as, where `dtype` is asked for."""
    return torch.float32 if FP32_PARAMETERS.intersection(name.split(".")) else dtype


def vae_dtype(device: torch.device, name: str) -> torch.dtype:
    """What a parameter of the VAE is loaded as: what decodes on a GPU as bf16, all else as fp32."""
    decodes = name.startswith(("decoder.", "post_quant_conv."))
    return torch.bfloat16 if device.type == "cuda" and decodes else torch.float32


def use_threads(threads: int | None = None) -> None:
    """Sets the process's number of torch threads. By default half of the cores, because sampling and decoding overlap.

    One rule for the service and the command line: the number of threads changes the last bits of convolutions.
    """
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // 2))


def download(model: str) -> Path:
    """Fetches what inference needs of a known name or hub id into the hub's cache; the folder.

    Raises CheckpointError if the id does not exist or cannot be reached and is not in the cache, or if it would not fit
    on the disk: then nothing is fetched.
    """
    known = KNOWN_MODELS.get(model)
    source = known.source() if known else model
    if _is_folder(source):
        return Path(source)
    folder = _fetch(source, CONFIGURATION)
    _check_disk(model, source.partition("@")[0], folder)
    return _fetch(source, CONFIGURATION + [f"{part}/*.safetensors" for part in PARTS])


def _fetch(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    unknown = f"model {model!r} is neither a folder, nor a hub id (owner/name), nor one of {', '.join(KNOWN_MODELS)}"
    if "/" not in model:  # the hub still has a few ids without an owner; none is a Helios
        raise CheckpointError(unknown)
    hub_id, _, revision = model.partition("@")
    with _hub_errors(model):
        try:
            return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns))
        except HFValidationError:
            raise CheckpointError(unknown) from None


def _check_disk(model: str, repository: str, folder: Path) -> None:
    """Raises CheckpointError if the weights that `folder`, a commit in the cache, still lacks do not fit beside it."""
    try:
        weights = [each for part in PARTS for each in _listed(repository, part, folder.name)]
    except CheckpointError:
        return  # out of reach: what there is in the cache will be taken
    missing = sum(each.size for each in weights if not (folder / each.path).exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise CheckpointError(
            f"model {model!r} needs {missing / GB:.1f} GB in {folder.parent}, where {free / GB:.1f} GB are free: "
            f"{(missing - free) / GB:.1f} GB are missing"
        )


def _listed(repository: str, part: str, commit: str) -> list[RepoFile]:
    """The weight files of one part, as the hub lists them. Raises CheckpointError if it is out of reach."""
    from huggingface_hub import HfApi, RepoFile

    with _hub_errors(f"{repository}@{commit}"):
        files = HfApi().list_repo_tree(repository, part, revision=commit)
        return [each for each in files if isinstance(each, RepoFile) and each.path.endswith(".safetensors")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - besides OSErrors the library lets those of its HTTP client through
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"model {model!r} is not a folder, is not in the local hub cache and could not be downloaded: {reason}"
        ) from None


def _is_folder(model: str) -> bool:
    # os.path answers False where Path raises: for names too long and unknown users.
    return os.path.isdir(os.path.expanduser(model))


def _folder(model: str) -> Path:
    path = os.path.expanduser(model)
    if _is_folder(model):
        return Path(path).resolve()
    if os.path.exists(path):
        raise CheckpointError(f"model {model!r} is a file; a checkpoint is a folder in the official layout")
    if os.sep in model and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise CheckpointError(f"model {model!r}: no such folder")
    return _fetch(model, CONFIGURATION)


def _variant(folder: Path) -> tuple[Variant, SchedulerConfig]:
    """The variant that model_index.json and the scheduler's class name together, and what the scheduler says."""
    path = folder / "scheduler/scheduler_config.json"
    index, scheduler_class = read_json(folder / "model_index.json"), read_json(path).get("_class_name")
    found = {
        "pipeline_class": index.get("_class_name"),
        "scheduler_class": scheduler_class,
        "is_distilled": bool(index.get("is_distilled", False)),
        "is_cfg_zero_star": bool(index.get("is_cfg_zero_star", False)),
    }
    served = {variant.name: {mark: getattr(variant, mark) for mark in found} for variant in VARIANTS}
    for variant in VARIANTS:
        if served[variant.name] == found:
            scheduler = read_config(SCHEDULERS[variant.scheduler_class], path)
            if scheduler.stages != variant.stages:
                raise CheckpointError(
                    f"{path}: stages is {scheduler.stages}; supported for {variant.name}: {variant.stages}"
                )
            return variant, scheduler
    rows = "; ".join(f"{name}: {_shown(marks)}" for name, marks in served.items())
    raise CheckpointError(f"{folder}: not a variant that is served: {_shown(found)}; served: {rows}")


def _shown(marks: dict[str, object]) -> str:
    return ", ".join(f"{mark} {value}" for mark, value in marks.items())


def _shards(folder: Path, stem: str) -> dict[str, list[str]]:
    """File name ▸ its keys, by the index file if there is one, else the single file (its keys are not known yet)."""
    index_path = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: weight_map is missing or empty")
        shards: dict[str, list[str]] = {}
        for key, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index_path}: {key} lies in {name!r}; allowed: a .safetensors file beside it")
            shards.setdefault(name, []).append(key)
        for path in sorted(folder.glob("*.safetensors")):
            if path.name not in shards:
                raise CheckpointError(f"{path}: {index_path.name} does not list this file")
        return shards
    if single.is_file():
        return {single.name: []}
    refused = [p.name for p in sorted(folder.glob("*")) if p.suffix in PICKLED]
    hint = f"; {', '.join(refused)} is refused, because loading it could run code" if refused else ""
    raise CheckpointError(f"{single}: file is missing{hint}")


def _locate(model: nn.Module, folder: Path, stem: str, aliases: Mapping[str, str] = MappingProxyType({})) -> Places:
    """Parameter of `model` ▸ (file, key), for every parameter; from the files' headers, before any weight is read.

    `aliases`: name in the file ▸ name in the model. Raises CheckpointError naming the file, the key and both shapes.
    """
    # A parameter that is tied to another stands here once, under its first name.
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    places: Places = {}
    for path, key, shape, dtype in _headers(folder, stem):
        name = aliases.get(key, key)
        if name not in expected:
            raise CheckpointError(f"{path}: {key} is not a parameter of this model")
        if shape != expected[name]:
            raise CheckpointError(f"{path}: {key} has shape {shape}; needed: {expected[name]}")
        if dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(f"{path}: {key} has dtype {dtype}; needed: F32, BF16 or F16")
        places[name] = path, key
    missing = sorted(expected.keys() - places.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(expected)} keys are missing, first {missing[0]} {expected[missing[0]]}"
        )
    return places


def _headers(folder: Path, stem: str) -> Iterator[tuple[Path, str, tuple[int, ...], str]]:
    """(file, key, shape, dtype) of every tensor, shard by shard; shards come from the index file if there is one."""
    for name, listed in _shards(folder, stem).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: file is missing")
        try:
            with safe_open(path, framework="pt") as file:  # also checks that the file is as long as its header says
                keys = set(file.keys())
                odd = sorted(keys ^ set(listed or keys))
                if odd:
                    side = "the file lacks it" if odd[0] in listed else "the index does not list it"
                    raise CheckpointError(f"{path}: {odd[0]}: {side}")
                for key in sorted(keys):
                    tensor = file.get_slice(key)
                    yield path, key, tuple(tensor.get_shape()), tensor.get_dtype()
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def _fill(
    model: nn.Module,
    places: Places,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
) -> None:
    """Reads the weights at `places` into `model`, each as `dtype_of(name)` on `device`."""
    for path in {path for path, _ in places.values()}:
        with safe_open(path, framework="pt") as file:
            for name, (where, key) in places.items():
                if where == path:
                    owner, _, leaf = name.rpartition(".")
                    weight = file.get_tensor(key).to(device, dtype_of(name))
                    setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    model.eval()
