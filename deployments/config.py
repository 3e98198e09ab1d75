"""The service's configuration: one strict YAML file, or these defaults, which suit a laptop."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from helios_core.errors import HeliosError
from helios_core.spec import Limits


class ConfigError(HeliosError):
    """A configuration that cannot be used. The message names its source, the setting, the value and what is allowed."""

    code = "config_error"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Pool(Settings):
    """The replicas of one deployment and what each gets: whole GPUs on a cluster, shares of a CPU on a laptop."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float = Field(0, ge=0)
    accelerator_type: str | None = None  # as Ray names it, for example H100
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}; allowed: at least min_replicas {self.min_replicas}")
        return self


class VaePool(Pool):
    """Replicas with the VAE, which is fp32. `device`: auto means the GPU where the replica has one.

    `max_call_seconds`: a replica that is longer at one call is taken to hang, and replaced.
    """

    device: str = "auto"
    max_call_seconds: float = Field(600.0, gt=0)


class ModelPool(VaePool):
    """Replicas with weights of a chosen precision. `dtype`: auto means bf16 on a GPU, fp32 on a CPU."""

    dtype: str = "auto"


class SamplerPool(ModelPool):
    """`min_chunk_seconds`: for tests, how long a chunk takes at least, spread over its steps."""

    min_chunk_seconds: float = Field(0.0, ge=0)


class AppConfig(Settings):
    """Everything about one service. `model`: demo, a folder in the official layout, or a hub id."""

    model: str = "demo"
    testing: bool = False  # allows settings that no real service wants
    store: str = "./helios-data"  # a folder, or s3://, gs://, az://
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    # HAProxy in front: then a viewer who reads slowly is also sent to slowly. A running cluster (RAY_ADDRESS) needs
    # RAY_SERVE_ENABLE_HA_PROXY=1 on each of its nodes besides.
    haproxy: bool = False
    torch_threads: int | None = Field(None, ge=1)  # None: half of the cores (helios_core.checkpoints.use_threads)
    max_body_bytes: int = Field(1 << 20, ge=1024)
    trace_file: str | None = None  # spans are appended to it as JSON lines, by every process of this machine
    log_prompts: bool = False  # else logs and traces have a prompt's SHA-256 only
    limits: Limits = Limits()
    ingress: Pool = Pool()
    director: Pool = Pool()
    text_encoder: ModelPool = ModelPool()
    sampler: SamplerPool = SamplerPool()
    vae_decoder: VaePool = VaePool()

    @pydantic.field_validator("director")
    @classmethod
    def _one_director(cls, pool: Pool) -> Pool:
        if pool.max_replicas != 1:
            raise ValueError(f"max_replicas is {pool.max_replicas}; allowed: 1, because one Director leads a store")
        return pool

    @pydantic.field_validator("sampler")
    @classmethod
    def _paced_in_tests_only(cls, pool: SamplerPool, others: pydantic.ValidationInfo) -> SamplerPool:
        if pool.min_chunk_seconds > 0 and not others.data.get("testing"):
            raise ValueError(f"min_chunk_seconds is {pool.min_chunk_seconds}; allowed: 0, unless testing is true")
        return pool

    def override(self, **changes: object) -> AppConfig:
        """This configuration with the settings that are not None replaced, and checked again. Raises ConfigError."""
        data = self.model_dump(mode="json") | {name: value for name, value in changes.items() if value is not None}
        return self._checked(data, "the command line")

    def with_replicas(self, **pools: int | None) -> AppConfig:
        """This configuration with a fixed number of replicas in the named pools, where a number is given."""
        sizes = {
            name: {**getattr(self, name).model_dump(), "min_replicas": n, "max_replicas": n}
            for name, n in pools.items()
            if n is not None
        }
        return self.override(**sizes)

    @classmethod
    def read(cls, path: Path) -> AppConfig:
        """The configuration in a YAML file.

        Raises ConfigError naming the file, the setting, the value and what is allowed.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or the date 2026-13-01
            raise ConfigError(f"{path}: not readable as YAML: {error}") from None
        return cls._checked({} if data is None else data, str(path))

    @classmethod
    def _checked(cls, data: object, source: str) -> AppConfig:
        try:
            # As JSON, where a mapping may become a dataclass although types are strict.
            return cls.model_validate_json(json.dumps(data, default=str))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ConfigError(f"{source}: {name} is {first['input']!r}: {first['msg']}") from None
        except (TypeError, ValueError) as error:  # a date as a key, or a mapping that holds itself
            raise ConfigError(f"{source}: not plain settings: {error}") from None
