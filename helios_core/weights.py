"""The weights of a checkpoint become loaded components. No pickle, no guessing, no silent default.

Weights are safetensors only. Keys must match in both directions and shapes must be equal. Modules are built on the
meta device and the file's tensors are assigned, so that no weight exists twice.

Tokenizers and transformers are imported where they are needed: a bare machine with torch can benchmark a folder, and
replicas of the transformer and of the VAE start without them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from helios_core.checkpoints import Checkpoint, opened
from helios_core.config import CHUNK_LATENTS, EXACT, HISTORY_LATENTS, TEXT_TOKENS, Approximations, read_json
from helios_core.errors import CheckpointError, InvalidInput
from helios_core.memory import check_room, peak_bytes, tensor_bytes
from helios_core.sampling.chunk import TEXT_CONTEXTS, ChunkSampler
from helios_core.sampling.guidance import CFG_ZERO_STAR, CLASSIFIER_FREE
from helios_core.sampling.solvers import SOLVERS
from helios_core.state import StreamState
from helios_core.text import TextEncoder
from helios_core.transformer.fp8 import to_fp8
from helios_core.transformer.history import history_length
from helios_core.transformer.model import FP32_PARAMETERS, KEY_ALIASES, HeliosTransformer
from helios_core.vae.latents import LATENTS_PER_PASS, decode_chunk, to_i420
from helios_core.vae.model import WanVae

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel

Places = dict[str, tuple[Path, str]]  # parameter ▸ (file, key)
M = TypeVar("M", bound=nn.Module)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def verify(checkpoint: Checkpoint) -> None:
    """Checks every file that the loaders read by its header, and fetches what is missing of a hub id.

    Raises CheckpointError as the loaders would.
    """
    _transformer(checkpoint)
    _vae(checkpoint)
    _text_encoder(checkpoint)


def load_sampler(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, approximations: Approximations = EXACT
) -> ChunkSampler:
    """The transformer in `dtype`, except for the parameters that the reference keeps in fp32, with its solver.

    Raises CheckpointError also for sizes that FP8 cannot have, and, before anything is read, if memory is short.
    """
    model, places = _transformer(checkpoint)

    check_room("transformer", device, _sampler_needs(checkpoint, model, device, dtype, approximations))
    _fill(model, places, device, partial(transformer_dtype, dtype))
    if approximations.fp8:
        try:
            to_fp8(model)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder / 'transformer/config.json'}: {error}") from None
    model.join()
    variant = checkpoint.card.variant
    guidance = CFG_ZERO_STAR if variant.is_cfg_zero_star else CLASSIFIER_FREE
    return ChunkSampler(
        model, checkpoint.scheduler, SOLVERS[variant.scheduler_class], guidance, approximations.history_refresh
    )


def load_vae(checkpoint: Checkpoint, device: torch.device) -> WanVae:
    """The VAE, in fp32 as the reference runs it; on a GPU what decodes is in bf16, with channels last.

    What encodes stays in fp32: in bf16 a video no longer looks like the image that it begins with. A CPU is
    faster with columns last, and equal to the reference's last bit.
    """
    model, places = _vae(checkpoint)

    def decode() -> None:
        with torch.device("meta"):
            vae = WanVae(checkpoint.vae).to(torch.bfloat16)
            for _ in vae.decode_frames(_blank_state(checkpoint).latents.to("meta", torch.bfloat16), LATENTS_PER_PASS):
                pass

    dtype_of = partial(vae_dtype, device)
    weights = tensor_bytes(model.named_parameters(), dtype_of)
    check_room("VAE", device, {"weights": weights, **_work(checkpoint, device, decode)})
    _fill(model, places, device, dtype_of)
    if device.type == "cuda":
        model.lay_channels_last()
    return model


def load_text_encoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """UMT5's encoder in `dtype`, and its tokenizer."""
    model, places, tokenizer = _text_encoder(checkpoint)
    check_room("text encoder", device, {"weights": tensor_bytes(model.named_parameters(), lambda _: dtype)})
    _fill(model, places, device, lambda _: dtype)
    return TextEncoder(tokenizer, model)


def warm_up_sampler(checkpoint: Checkpoint, sampler: ChunkSampler) -> None:
    """On a GPU makes a chunk of the model's own size, so that what it takes is there before the first video.

    In the thread that will make the others: cuDNN keeps its plans for each thread.
    """
    if sampler.model.device.type == "cuda":
        _rehearsed(checkpoint, sampler, _blank_state(checkpoint))


def warm_up_vae(checkpoint: Checkpoint, vae: WanVae) -> None:
    """The same for decoding."""
    if vae.device.type == "cuda":
        decode_chunk(vae, _blank_state(checkpoint).latents, to_i420)


def golden_latents(checkpoint: Checkpoint, sampler: ChunkSampler) -> Tensor:
    """A chunk of the smallest size, [1, C, 9, h, w] fp32, the same each time. Raises NotFinite."""
    return _rehearsed(checkpoint, sampler, _blank_state(checkpoint, smallest=True)).latents


def golden_frames(checkpoint: Checkpoint, vae: WanVae) -> Tensor:
    """Noise of the smallest size, decoded: I420, uint8 [5, H * 3 / 2, W], the same each time. Raises NotFinite."""
    two = _blank_state(checkpoint, smallest=True).latents[:, :, :2]  # of those after the first each gives four frames
    noise = torch.randn(two.shape, generator=torch.Generator().manual_seed(0))
    (frames,) = decode_chunk(vae, noise, to_i420)
    return torch.from_numpy(frames)


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


def _rehearsed(checkpoint: Checkpoint, sampler: ChunkSampler, state: StreamState) -> StreamState:
    return sampler.rehearse(checkpoint.transformer.text_dim, state, checkpoint.card.variant.guidance_scale)


def _blank_state(checkpoint: Checkpoint, smallest: bool = False) -> StreamState:
    """The start of a video of the model's own size, or of the smallest that it can make."""
    size = (checkpoint.card.size_multiple,) * 2 if smallest else checkpoint.card.default_size
    width, height = (side // checkpoint.vae.scale_factor_spatial for side in size)
    nothing = torch.zeros(1, checkpoint.vae.z_dim, HISTORY_LATENTS, height, width)
    return StreamState(0, nothing, None, torch.Generator().manual_seed(0).get_state())


def _sampler_needs(
    checkpoint: Checkpoint,
    model: HeliosTransformer,
    device: torch.device,
    dtype: torch.dtype,
    approximations: Approximations,
) -> dict[str, int]:
    """Bytes by purpose. The work is that of the last stage at the model's own size."""
    config, scale = checkpoint.transformer, checkpoint.vae.scale_factor_spatial
    width, height = (side // scale for side in checkpoint.card.default_size)
    batch = 2 if checkpoint.card.variant.guidance_scale > 1 else 1

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
        **_work(checkpoint, device, forward),
    }


def _work(checkpoint: Checkpoint, device: torch.device, run: Callable[[], object]) -> dict[str, int]:
    """The room that `run` takes on a GPU. Elsewhere it is left out: the first rehearsal takes seconds to import."""
    return {"work at {}x{}".format(*checkpoint.card.default_size): peak_bytes(run)} if device.type == "cuda" else {}


def _transformer(checkpoint: Checkpoint) -> tuple[HeliosTransformer, Places]:
    folder = checkpoint.part("transformer")
    model = _on_meta(folder, lambda: HeliosTransformer(checkpoint.transformer))
    return model, _locate(model, folder, "diffusion_pytorch_model", KEY_ALIASES)


def _vae(checkpoint: Checkpoint) -> tuple[WanVae, Places]:
    folder = checkpoint.part("vae")
    model = _on_meta(folder, lambda: WanVae(checkpoint.vae))
    return model, _locate(model, folder, "diffusion_pytorch_model")


def _text_encoder(checkpoint: Checkpoint) -> tuple[UMT5EncoderModel, Places, Tokenizer]:
    from tokenizers import Tokenizer
    from transformers import UMT5Config, UMT5EncoderModel

    folder = checkpoint.part("text_encoder")
    config = read_json(folder / "config.json")
    if config.get("d_model") != checkpoint.transformer.text_dim:
        raise CheckpointError(
            f"{folder / 'config.json'}: d_model is {config.get('d_model')!r}; needed: the transformer's text_dim "
            f"{checkpoint.transformer.text_dim}"
        )
    model = _on_meta(folder, lambda: UMT5EncoderModel(UMT5Config.from_dict(config)))
    # One table under two names, whatever tie_word_embeddings says; files hold either or both.
    model.encoder.embed_tokens = model.shared
    places = _locate(model, folder, "model", {"encoder.embed_tokens.weight": "shared.weight"})
    path = checkpoint.folder / "tokenizer/tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower; its text is kept
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from None
    return model, places, tokenizer


def _on_meta(folder: Path, build: Callable[[], M]) -> M:
    """A module without memory. Raises CheckpointError for sizes that no module can have."""
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # noqa: BLE001 - torch and transformers each have their own ways to refuse a size
        raise CheckpointError(f"{folder / 'config.json'}: no model has these sizes: {error}") from None


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
        with opened(path, "pt") as file:
            keys = set(file.keys())
            odd = sorted(keys ^ set(listed or keys))
            if odd:
                side = "the file lacks it" if odd[0] in listed else "the index does not list it"
                raise CheckpointError(f"{path}: {odd[0]}: {side}")
            for key in sorted(keys):
                tensor = file.get_slice(key)
                yield path, key, tuple(tensor.get_shape()), tensor.get_dtype()


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
