"""What `helios plan` is told: one strict YAML file of traffic, targets and hardware."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated

import pydantic
from pydantic import BeforeValidator, Field

from deployments.chunk_times import GPUS, Times, estimated, read_times
from deployments.config import Settings
from deployments.simulation import HOUR_S, Asked
from helios_core.config import VARIANTS

DAY_HOURS = 24
PRESETS = next(variant.presets for variant in VARIANTS if variant.is_distilled)

Rate = Annotated[float, Field(ge=0)]
Length = Annotated[float, Field(gt=0)]


def _each_hour(told: object) -> object:
    if isinstance(told, list):
        return tuple(told)
    return (told,) * DAY_HOURS if isinstance(told, int | float) else told


def _weighted(told: object) -> object:
    weights = told if isinstance(told, dict) else {told: 1.0}
    return {float(each) if isinstance(each, str | int) else each: weight for each, weight in weights.items()}


class Traffic(Settings):
    """What is asked for. `videos_per_hour`: at every hour, or at each of 24; or `viewers`: so many watch at any time.

    `peak_factor`: the busiest minutes over their hour; `seconds`: a video's length, or lengths with their weights;
    `realtime`: the share that is watched while it is made, the rest is batch; `image`: the share that begins with a
    picture; `leave`: the share of those watched whose viewers leave, at any moment of the video alike, which ends it;
    `keys`: so many owners ask.
    """

    videos_per_hour: Annotated[tuple[Rate, ...], BeforeValidator(_each_hour)] | None = None
    viewers: float | None = Field(None, gt=0)
    peak_factor: float = Field(1.0, ge=1)
    seconds: Annotated[dict[Length, Rate], BeforeValidator(_weighted)] = {10.0: 1.0}  # noqa: RUF012
    realtime: float = Field(1.0, ge=0, le=1)
    image: float = Field(0.0, ge=0, le=1)
    leave: float = Field(0.0, ge=0, le=1)
    keys: int = Field(20, ge=1)
    fps: float = Field(24.0, ge=8, le=60)
    lead_seconds: float | None = Field(None, gt=0)

    @pydantic.model_validator(mode="after")
    def _told_once(self) -> Traffic:
        if (self.videos_per_hour is None) == (self.viewers is None):
            raise ValueError("videos_per_hour and viewers: allowed: one of the two")
        if self.videos_per_hour is not None and len(self.videos_per_hour) != DAY_HOURS:
            raise ValueError(f"videos_per_hour has {len(self.videos_per_hour)} numbers; allowed: one, or {DAY_HOURS}")
        if sum(self.seconds.values()) <= 0:
            raise ValueError(f"seconds is {self.seconds}; allowed: lengths with weights, one of them above 0")
        if self.viewers is not None and self.realtime == 0:
            raise ValueError(
                f"viewers is {self.viewers:g} and realtime 0; allowed: videos_per_hour where nobody watches"
            )
        if sum(self.by_hour) < 1:
            raise ValueError(f"{sum(self.by_hour):g} videos are asked for in a day; allowed: 1 or more")
        return self

    @property
    def mean_seconds(self) -> float:
        return fmean(self.seconds, self.seconds.values())

    @property
    def mean_chunks(self) -> float:
        return fmean((Asked(0, each, fps=self.fps).chunks for each in self.seconds), self.seconds.values())

    @property
    def by_hour(self) -> tuple[float, ...]:
        """Videos asked for in each hour of the day."""
        if self.viewers is not None:
            watched_s = self.mean_seconds * (1 - self.leave / 2) * self.realtime  # of each video that is asked for
            return (self.viewers * HOUR_S / watched_s,) * DAY_HOURS
        assert self.videos_per_hour is not None
        return self.videos_per_hour

    @property
    def peak(self) -> float:
        """Videos an hour in the busiest minutes."""
        return max(self.by_hour) * self.peak_factor

    def asked(self, rates: Callable[[int], float], hours: float, seed: int) -> Iterator[Asked]:
        """The requests of so many hours, at random (Poisson). `rates`: videos an hour, by the hour."""
        draw = random.Random(seed)
        lengths, weights = zip(*self.seconds.items(), strict=True)
        for hour in range(math.ceil(hours)):
            rate, at, end = rates(hour) / HOUR_S, hour * HOUR_S, min(hours, hour + 1) * HOUR_S
            while rate > 0 and (at := at + draw.expovariate(rate)) < end:
                (seconds,) = draw.choices(lengths, weights)
                watched = draw.random() < self.realtime
                yield Asked(
                    at,
                    seconds,
                    owner=f"key {draw.randrange(self.keys)}",
                    priority="realtime" if watched else "batch",
                    image=draw.random() < self.image,
                    fps=self.fps,
                    lead_s=self.lead_seconds,
                    leaves_s=draw.random() * seconds if watched and draw.random() < self.leave else None,
                )


class Targets(Settings):
    """What is to be met in the busiest minutes. `first_fragment_p95_s`: of watched videos; `stall_free`: the share of
    them that plays without a stop; `refused`: the share of them that may hear 429; `batch_p95_s`: from a batch video's
    request to its end, over the whole day. None: whatever comes."""

    first_fragment_p95_s: float | None = Field(5.0, gt=0)
    stall_free: float | None = Field(0.95, ge=0, le=1)
    refused: float | None = Field(0.01, ge=0, le=1)
    batch_p95_s: float | None = Field(86_400.0, gt=0)


class Hardware(Settings):
    """What it runs on. `steps`: of each stage, or `preset`, a name of Distilled's; `times`: a JSON file of `helios
    bench`, or of a load test, whose own steps count, in place of the estimates for `gpu`; then `price` must be told.
    Prices are in dollars an hour: of a sampler, a VAE decoder (None: the same), a text encoder (None: half of it), and
    of a processor core, of which Director and ingress have one each. The table's are examples."""

    gpu: str = "h100"
    preset: str | None = None
    steps: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    amplify_first_chunk: bool = True
    times: str | None = None
    price: Rate | None = None
    vae_price: Rate | None = None
    text_price: Rate | None = None
    core_price: Rate = 0.05

    @pydantic.model_validator(mode="after")
    def _known(self) -> Hardware:
        if self.preset is not None and (self.steps is not None or self.preset not in PRESETS):
            raise ValueError(f"preset is {self.preset!r}; allowed: {', '.join(PRESETS)}, and no steps beside it")
        if self.times is not None and self.price is None:
            raise ValueError("times are of a machine whose price is not known; allowed: a price beside them")
        return self

    def chunk_times(self) -> Times:
        """Raises InvalidInput."""
        steps = self.steps or PRESETS[self.preset or "realtime"]
        if self.times is not None:
            return read_times(Path(self.times), steps, self.amplify_first_chunk)
        return estimated(self.gpu, steps, self.amplify_first_chunk)

    def prices(self) -> dict[str, float]:
        """Dollars an hour of one replica of each part."""
        sampler = GPUS[self.gpu].price if self.price is None else self.price
        return {
            "sampler": sampler,
            "vae_decoder": sampler if self.vae_price is None else self.vae_price,
            "text_encoder": sampler / 2 if self.text_price is None else self.text_price,
            "ingress": self.core_price,
            "director": self.core_price,
        }


class PlanConfig(Settings):
    """`autoscale`: there are as many samplers as are wanted at the time, from `least` on; one is there `start_s` after
    it was wanted. The admission's settings are those of a service's configuration."""

    traffic: Traffic
    targets: Targets = Targets()
    hardware: Hardware = Hardware()
    videos_per_sampler: int = Field(32, ge=1)
    queued: int = Field(256, ge=0)
    autoscale: bool = True
    least: int = Field(1, ge=1)
    start_s: float = Field(60.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    seed: int = 1
