"""The service's configuration: one strict YAML file, or these defaults, which suit a laptop."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from helios_core.config import Approximations, HistoryRefresh
from helios_core.errors import HeliosError
from helios_core.media.read import MediaLimits
from helios_core.spec import Limits


class ConfigError(HeliosError):
    """A configuration that cannot be used. The message names its source, the setting, the value and what is allowed."""

    code = "config_error"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, data: object, source: str) -> Self:
        """The settings in plain data, as YAML or JSON has it. `source`: for the message. Raises ConfigError."""
        try:
            # As JSON, where a mapping may become a dataclass although types are strict.
            return cls.model_validate_json(json.dumps(data, default=str))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ConfigError(f"{source}: {name} is {first['input']!r:.200}: {first['msg']}") from None
        except (TypeError, ValueError) as error:  # a date as a key, or a mapping that holds itself
            raise ConfigError(f"{source}: not plain settings: {error}") from None


class Pool(Settings):
    """The replicas of one deployment and what each gets: whole GPUs on a cluster, shares of a CPU on a laptop.

    With `max_replicas` above `min_replicas` there are as many as are wanted (autoscaling.py). `min_replicas` 0: none,
    once nothing was wanted for `downscale_delay_s`; the next video then waits until one has loaded its weights.
    """

    min_replicas: int = Field(1, ge=0)
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

    @property
    def scales(self) -> bool:
        return self.max_replicas > self.min_replicas


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
    """`fp8`, `history_refresh`: what may be computed less exactly, see Approximations; `min_chunk_seconds`: for tests,
    how long a chunk takes at least, spread over its steps."""

    fp8: bool = False
    history_refresh: HistoryRefresh = "step"
    min_chunk_seconds: float = Field(0.0, ge=0)

    @property
    def approximations(self) -> Approximations:
        return Approximations(self.fp8, self.history_refresh)


class ModelSettings(Settings):
    """One model and its samplers. `model`: a known name, a folder in the official layout, or a hub id."""

    model: str = "demo"
    sampler: SamplerPool = SamplerPool()


class UploadLimits(Settings):
    """The largest upload that is accepted. Lengths in seconds, as the file's header and its frames have them."""

    max_bytes: int = Field(64 << 20, ge=1024)
    max_seconds: float = Field(60.0, gt=0)

    def media_limits(self) -> MediaLimits:
        return MediaLimits(max_bytes=self.max_bytes, max_video_seconds=self.max_seconds)


class SafetySettings(Settings):
    """Who says what may be asked for and shown (deployments/safety.py).

    `hook`: the import path, module:Class, of a SafetyHook; `max_seconds`: so long one check may take; `fail_open`: what
    cannot be checked passes all the same, and is counted.
    """

    hook: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    max_seconds: float = Field(5.0, gt=0)
    fail_open: bool = False


class Quota(Settings):
    """What one key may ask for; None: as much as there is room for.

    `concurrent_videos`: of its owner that have not ended; `requests_per_minute`: that bear it, for whatever, and not
    those by a link, counted by each ingress for itself; `seconds_per_day`: of its owner's video at 24 frames per
    second, in any 24 hours.
    """

    concurrent_videos: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    seconds_per_day: float | None = Field(None, gt=0, allow_inf_nan=False)


NO_QUOTA = Quota()


class AdmissionSettings(Settings):
    """How many videos of a model are taken in. `videos_per_sampler`: so many take turns on each; `queued`: so many wait
    until one of them ends; more are refused, 429. `quota`: of each key, where it has no limit of its own."""

    videos_per_sampler: int = Field(32, ge=1)
    queued: int = Field(256, ge=0)
    quota: Quota = NO_QUOTA


class AppConfig(Settings):
    """Everything about one service. The first of `models` is the one of a request that names none."""

    models: tuple[ModelSettings, ...] = Field((ModelSettings(),), min_length=1)
    testing: bool = False  # allows settings that no real service wants
    store: str = "./helios-data"  # a folder, or s3://, gs://, az://
    store_patience_s: float = Field(60.0, ge=0)  # for so long a video waits for a store that is away, then it fails
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    keys: str | None = None  # the file of `helios keys`, on each node that has an ingress; None: whoever asks is served
    insecure: bool = False  # allows that to whoever can reach this machine, and a Ray that wants no token
    share_hours: float = Field(24.0, gt=0, le=8760)  # so long the links in `share_url` are good, and up to one more
    public_url: str | None = Field(
        None, pattern=r"^https?://[^\s?#]+$"
    )  # of share_url; None: as requests are addressed
    cors_origins: tuple[str, ...] = ()  # whose pages may ask, as https://example.com, or * for all; never with cookies
    admission: AdmissionSettings = AdmissionSettings()
    # HAProxy in front: then a viewer who reads slowly is also sent to slowly. A running cluster (RAY_ADDRESS) needs
    # RAY_SERVE_ENABLE_HA_PROXY=1 on each of its nodes besides.
    haproxy: bool = False
    idle_seconds: int = Field(120, ge=1)  # HAProxy cuts off who is to send or to take a byte, and does not for so long
    # An ingress that is to stop goes on serving those who watch for so long. Then they are cut off, and may come back.
    drain_s: float = Field(2.0, ge=0)
    unwatched_s: float = Field(10.0, gt=0)  # so long a video that is made for its viewers goes on without one
    torch_threads: int | None = Field(None, ge=1)  # None: half of the cores (helios_core.weights.use_threads)
    max_body_bytes: int = Field(1 << 20, ge=1024)  # without uploads
    max_body_seconds: float = Field(600.0, gt=0)  # so long a body may take to come, and a tenth of it without a byte
    keep_states: Literal["last", "all"] = "last"  # all: a video can be forked at any chunk, for 5 MB a chunk
    keep_videos_days: float | None = Field(None, gt=0)  # for so long after its end a video is kept; None: for ever
    keep_bytes: int | None = Field(None, ge=0)  # so much the videos that have ended may take; the oldest go first
    trace_file: str | None = None  # spans are appended to it as JSON lines, by every process of this machine
    log_prompts: bool = False  # else logs and traces have a prompt's SHA-256 only
    limits: Limits = Limits()
    uploads: UploadLimits = UploadLimits()
    safety: SafetySettings | None = None  # None: everything may be asked for and shown
    ingress: Pool = Pool()
    director: Pool = Pool()
    text_encoder: ModelPool = ModelPool()  # of each text encoder, and of each VAE: models with equal files share one
    vae_decoder: VaePool = VaePool()

    @pydantic.field_validator("director")
    @classmethod
    def _one_director(cls, pool: Pool) -> Pool:
        if pool.max_replicas != 1:
            raise ValueError(f"max_replicas is {pool.max_replicas}; allowed: 1, because one Director leads a store")
        return pool

    @pydantic.field_validator("director", "ingress")
    @classmethod
    def _always_there(cls, pool: Pool) -> Pool:
        if pool.min_replicas < 1:
            raise ValueError(f"min_replicas is {pool.min_replicas}; allowed: at least 1, because it is what is asked")
        return pool

    @pydantic.model_validator(mode="after")
    def _paced_in_tests_only(self) -> AppConfig:
        for settings in self.models:
            pause = settings.sampler.min_chunk_seconds
            if pause > 0 and not self.testing:
                raise ValueError(f"min_chunk_seconds is {pause}; allowed: 0, unless testing is true")
        return self

    @property
    def scales(self) -> bool:
        """Whether some deployment's size follows the demand."""
        pools = [self.ingress, self.text_encoder, self.vae_decoder, *(each.sampler for each in self.models)]
        return any(pool.scales for pool in pools)

    def check_door(self) -> None:
        """Raises ConfigError if strangers could come in."""
        alone = self.host in ("127.0.0.1", "::1", "localhost") and not self.haproxy  # which listens on every interface
        if self.keys is None and not alone and not self.insecure:
            where = "haproxy is true" if self.haproxy else f"host is {self.host}"
            raise ConfigError(
                f"{where}, and there are no keys: whoever reaches this machine would be served; allowed: --keys FILE "
                "(helios keys add makes one), --host 127.0.0.1 without haproxy, or --insecure"
            )

    def override(self, **changes: object) -> AppConfig:
        """This configuration with the settings that are not None replaced, and checked again. Raises ConfigError."""
        data = self.model_dump(mode="json") | {name: value for name, value in changes.items() if value is not None}
        return self.parse(data, "the command line")

    def with_model(self, model: str | None) -> AppConfig:
        """This configuration with one model, on samplers like those of its first, if a model is given."""
        if model is None:
            return self
        return self.override(models=[{**self.models[0].model_dump(mode="json"), "model": model}])

    def with_replicas(self, samplers: int | None = None, vae_decoders: int | None = None) -> AppConfig:
        """This configuration with fixed numbers of replicas, where a number is given: of each model's samplers, of each
        VAE's decoders."""

        def fixed(pool: Pool, replicas: int | None) -> dict[str, Any]:
            size = {} if replicas is None else {"min_replicas": replicas, "max_replicas": replicas}
            return {**pool.model_dump(mode="json"), **size}

        models = [{"model": each.model, "sampler": fixed(each.sampler, samplers)} for each in self.models]
        return self.override(models=models, vae_decoder=fixed(self.vae_decoder, vae_decoders))

    @classmethod
    def read(cls, path: Path) -> AppConfig:
        """The configuration in a YAML file.

        Raises ConfigError naming the file, the setting, the value and what is allowed.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or the date 2026-13-01
            raise ConfigError(f"{path}: not readable as YAML: {error}") from None
        return cls.parse({} if data is None else data, str(path))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
