"""What the checkpoint's JSON files say, as frozen dataclasses, and the few numbers that every Helios shares.

Nothing here imports torch: the control plane reads it too. Defaults are those of the official classes, because
official files may omit a key that has its default; keys that inference does not use are ignored.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from helios_core.errors import CheckpointError, InvalidInput

CHUNK_LATENTS = 9  # latent frames per chunk
CHUNK_FRAMES = 33  # pixel frames per chunk: 1 for the first latent, 4 for each other
HISTORY_LONG, HISTORY_MID, HISTORY_SHORT = 16, 2, 1  # latent frames of history, oldest first
HISTORY_LATENTS = HISTORY_LONG + HISTORY_MID + HISTORY_SHORT
TEXT_TOKENS = 512  # rows of text that the transformer sees; unused ones are zero
NATIVE_FPS = 24

# When the history's keys and values are computed. Exact: at each step. Cheaper: at the first of a stage, of a chunk.
HistoryRefresh = Literal["step", "stage", "chunk"]

T = TypeVar("T")


@dataclass(frozen=True)
class Approximations:
    """What a sampler computes less exactly to be faster, each measured in PERFORMANCE.md. None is the default.

    `fp8`: matrix products in 8 bits (transformer/fp8.py). Raises InvalidInput for an unknown `history_refresh`.
    """

    fp8: bool = False
    history_refresh: HistoryRefresh = "step"

    def __post_init__(self) -> None:
        if self.history_refresh not in (allowed := typing.get_args(HistoryRefresh)):
            raise InvalidInput("history_refresh", self.history_refresh, f"one of {', '.join(allowed)}")

    @property
    def names(self) -> tuple[str, ...]:
        """For people and records: none for an exact sampler."""
        history = () if self.history_refresh == "step" else (f"history once a {self.history_refresh}",)
        return (*(("fp8",) if self.fp8 else ()), *history)


EXACT = Approximations()


@dataclass(frozen=True)
class TransformerConfig:
    """transformer/config.json"""

    patch_size: tuple[int, ...] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    added_kv_proj_dim: int | None = None
    rope_dim: tuple[int, ...] = (44, 42, 42)
    rope_theta: float = 10000.0
    guidance_cross_attn: bool = True
    zero_history_timestep: bool = True
    has_multi_term_memory_patch: bool = True
    is_amplify_history: bool = False

    def __post_init__(self) -> None:
        _only(self, "patch_size", (1, 2, 2))
        _only(self, "cross_attn_norm", True)
        _only(self, "qk_norm", "rms_norm_across_heads")
        _only(self, "added_kv_proj_dim", None)
        _only(self, "guidance_cross_attn", True)
        _only(self, "zero_history_timestep", True)
        _only(self, "has_multi_term_memory_patch", True)
        _only(self, "is_amplify_history", False)
        if len(self.rope_dim) != 3 or sum(self.rope_dim) != self.attention_head_dim:
            raise CheckpointError(
                f"rope_dim {self.rope_dim} must be three numbers with sum attention_head_dim {self.attention_head_dim}"
            )
        if any(d % 2 for d in self.rope_dim):
            raise CheckpointError(f"rope_dim {self.rope_dim} must be even numbers")

    @property
    def hidden_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class VaeConfig:
    """vae/config.json (Wan 2.1's VAE). `patch_size` p folds p x p pixels into channels before the first layer."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # the official spelling
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        _only(self, "is_residual", False)
        _only(self, "attn_scales", ())
        _only(self, "scale_factor_temporal", 4)
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise CheckpointError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries; "
                f"dim_mult with {len(self.dim_mult)} needs {len(self.dim_mult) - 1}"
            )
        if 2 ** sum(self.temperal_downsample) != self.scale_factor_temporal:
            raise CheckpointError(
                f"temperal_downsample {self.temperal_downsample} does not compress time by {self.scale_factor_temporal}"
            )
        scale = 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)
        if scale != self.scale_factor_spatial:
            raise CheckpointError(
                f"dim_mult {self.dim_mult} with patch_size {self.patch_size} compresses space by {scale}, "
                f"scale_factor_spatial says {self.scale_factor_spatial}"
            )
        pixels = 3 * (self.patch_size or 1) ** 2
        if (self.in_channels, self.out_channels) != (pixels, pixels):
            raise CheckpointError(
                f"in_channels {self.in_channels} and out_channels {self.out_channels} must be {pixels} "
                f"for patch_size {self.patch_size}"
            )
        if (len(self.latents_mean), len(self.latents_std)) != (self.z_dim, self.z_dim):
            raise CheckpointError(f"latents_mean and latents_std need z_dim = {self.z_dim} numbers each")
        if not all(std > 0 for std in self.latents_std):
            raise CheckpointError(f"latents_std is {self.latents_std}; allowed: more than 0")


@dataclass(frozen=True)
class SchedulerConfig:
    """scheduler/scheduler_config.json. The last four are no arguments of the official classes, but they honour them.

    The defaults are those of HeliosDMDScheduler.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    stages: int = 3
    stage_range: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    gamma: float = 1 / 3
    prediction_type: str = "flow_prediction"
    use_flow_sigmas: bool = True
    use_dynamic_shifting: bool = False
    time_shift_type: str = "linear"
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self) -> None:
        _only(self, "prediction_type", "flow_prediction")
        _only(self, "use_flow_sigmas", True)
        if self.time_shift_type not in ("exponential", "linear"):
            raise CheckpointError(f"time_shift_type is {self.time_shift_type!r}; allowed: exponential, linear")
        if len(self.stage_range) != self.stages + 1:
            raise CheckpointError(f"stage_range {self.stage_range} must have stages + 1 = {self.stages + 1} numbers")
        if (self.stage_range[0], self.stage_range[-1]) != (0, 1) or list(self.stage_range) != sorted(self.stage_range):
            raise CheckpointError(f"stage_range is {self.stage_range}; allowed: numbers that rise from 0 to 1")
        if not 0 < self.gamma <= 1 / 3:
            raise CheckpointError(f"gamma is {self.gamma}; allowed: more than 0, at most 1/3, where blocks sum to 0")
        if self.use_dynamic_shifting and self.shift != 1:
            raise CheckpointError(f"shift is {self.shift}; allowed with use_dynamic_shifting: 1")


@dataclass(frozen=True)
class UniPCConfig(SchedulerConfig):
    """scheduler/scheduler_config.json of a HeliosScheduler: another default, and the settings of its solver, UniPC."""

    time_shift_type: str = "exponential"
    scheduler_type: str = "unipc"
    solver_order: int = 2
    solver_type: str = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    thresholding: bool = False
    solver_p: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _only(self, "scheduler_type", "unipc")
        _only(self, "solver_order", 2)
        _only(self, "solver_type", "bh2")
        _only(self, "predict_x0", True)
        _only(self, "lower_order_final", True)
        _only(self, "disable_corrector", ())
        _only(self, "thresholding", False)
        _only(self, "solver_p", None)
        if self.stages == 1:
            _only(self, "shift", 1.0)  # the reference leaves it out where there is one stage


SCHEDULERS: dict[str, type[SchedulerConfig]] = {  # by the official class
    "HeliosScheduler": UniPCConfig,
    "HeliosDMDScheduler": SchedulerConfig,
}


@dataclass(frozen=True)
class Variant:
    """One of the three official trainings: what differs is data.

    A checkpoint is of a variant if its model_index.json and its scheduler say what the variant's row says, from
    `pipeline_class` to `is_cfg_zero_star`; of these, `scheduler_class` names the solver and `is_cfg_zero_star` the
    kind of guidance. `presets`: name ▸ solver steps per stage; `guidance_scale`: the variant's own, 1 for none.
    """

    name: str
    pipeline_class: str
    scheduler_class: str
    is_distilled: bool
    is_cfg_zero_star: bool
    presets: dict[str, tuple[int, ...]]
    default_preset: str
    amplifies_first_chunk: bool  # the first chunk gets twice the steps unless the request says otherwise
    guidance_scale: float

    @property
    def stages(self) -> int:
        return len(self.presets[self.default_preset])


VARIANTS = (
    Variant(
        name="base",
        pipeline_class="HeliosPipeline",
        scheduler_class="HeliosScheduler",
        is_distilled=False,
        is_cfg_zero_star=False,
        presets={"draft": (20,), "quality": (50,)},
        default_preset="quality",
        amplifies_first_chunk=False,
        guidance_scale=5.0,
    ),
    Variant(
        name="mid",
        pipeline_class="HeliosPyramidPipeline",
        scheduler_class="HeliosScheduler",
        is_distilled=False,
        is_cfg_zero_star=True,
        presets={"draft": (10, 10, 10), "quality": (20, 20, 20)},
        default_preset="quality",
        amplifies_first_chunk=False,
        guidance_scale=5.0,
    ),
    Variant(
        name="distilled",
        pipeline_class="HeliosPyramidPipeline",
        scheduler_class="HeliosDMDScheduler",
        is_distilled=True,
        is_cfg_zero_star=False,
        presets={"realtime": (1, 1, 1), "quality": (2, 2, 2)},
        default_preset="quality",
        amplifies_first_chunk=True,
        guidance_scale=1.0,
    ),
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises CheckpointError if the file is missing, is not JSON or is not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(data).__name__}")
    return data


def read_config(cls: type[T], path: Path) -> T:
    """The dataclass `cls` from the JSON file at `path`; keys that `cls` does not have are ignored.

    Raises CheckpointError naming file, key, value and allowed type or value.
    """
    data = read_json(path)
    hints = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in data:
            known[field.name] = _typed(data[field.name], hints[field.name], f"{path}: {field.name}")
    try:
        return cls(**known)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as `hint`: JSON lists become tuples, whole numbers become floats where a float is asked for."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return None if value is None else _typed(value, inner[0], name)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list):
            return tuple(_typed(v, typing.get_args(hint)[0], name) for v in value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value) is hint:
        return value
    raise CheckpointError(f"{name} is {value!r}; allowed: {getattr(hint, '__name__', hint)}")


def _only(config: object, key: str, allowed: object) -> None:
    if getattr(config, key) != allowed:
        raise CheckpointError(f"{key} is {getattr(config, key)!r}; supported: {allowed!r}")
