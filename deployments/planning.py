"""How many replicas given traffic needs, what they cost, and where the knee is: what `helios plan` says.

Traffic goes to cells by a hash of the video's id, each with a Director of its own, so that all cells are alike: one is
simulated, with its share of the traffic.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, quantiles

import pydantic
from pydantic import Field

from deployments.autoscaling import for_all
from deployments.chunk_times import GPUS, Times, estimated, read_times
from deployments.config import ConfigError, Settings
from deployments.simulation import HOUR_S, Asked, Fleet, Outcome, Seen, simulate
from helios_core.config import CHUNK_FRAMES
from helios_core.errors import HeliosError

DAY_HOURS = 24
DIRECTOR_BUSY = 0.6  # the share of one core that a Director may need: its loop must answer while it works
WINDOW_S = 1800.0  # of the busiest hour, which a fleet is judged by
LOADS = (0.5, 0.7, 0.85, 1.0, 1.1, 1.2, 1.35, 1.5)  # of the planned traffic, to find the knee
MOST_SAMPLERS = 512  # of one cell


class Unreachable(HeliosError):
    """No fleet of this kind meets the targets."""

    code = "unreachable"


class Traffic(Settings):
    """What is asked for. `videos_per_hour`: at every hour, or at each of 24; or `viewers`: so many watch at any time.

    `peak_factor`: the busiest minutes over their hour; `seconds`: a video's length, or lengths with their weights;
    `realtime`: the share that is watched while it is made, the rest is batch; `image`: the share that begins with a
    picture; `leave`: the share whose viewers leave early, at any moment of the video alike; `keys`: so many owners ask.
    """

    videos_per_hour: float | tuple[float, ...] | None = None
    viewers: float | None = Field(None, gt=0)
    peak_factor: float = Field(1.0, ge=1)
    seconds: float | dict[float, float] = 10.0
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
        per_hour, lengths = self.videos_per_hour, self.lengths
        if isinstance(per_hour, tuple) and len(per_hour) != DAY_HOURS:
            raise ValueError(f"videos_per_hour has {len(per_hour)} numbers; allowed: one, or {DAY_HOURS}")
        if min(self.by_hour) < 0 or max(self.by_hour) <= 0:
            raise ValueError("videos_per_hour: allowed: no number below 0, and one above it")
        if min(lengths) <= 0 or min(lengths.values()) < 0 or sum(lengths.values()) <= 0:
            raise ValueError(f"seconds is {self.seconds}; allowed: lengths above 0, with weights of 0 or more")
        return self

    @property
    def lengths(self) -> dict[float, float]:
        return self.seconds if isinstance(self.seconds, dict) else {self.seconds: 1.0}

    @property
    def mean_seconds(self) -> float:
        return fmean(self.lengths, self.lengths.values())

    @property
    def mean_chunks(self) -> float:
        return fmean((Asked(0, each, fps=self.fps).chunks for each in self.lengths), self.lengths.values())

    @property
    def by_hour(self) -> tuple[float, ...]:
        """Videos asked for in each hour of the day."""
        if self.viewers is not None:
            return (self.viewers * HOUR_S / self.mean_seconds,) * DAY_HOURS
        per_hour = self.videos_per_hour
        assert per_hour is not None
        return per_hour if isinstance(per_hour, tuple) else (per_hour,) * DAY_HOURS

    @property
    def peak(self) -> float:
        """Videos an hour in the busiest minutes."""
        return max(self.by_hour) * self.peak_factor

    def asked(self, rates: Callable[[int], float], hours: float, seed: int) -> Iterator[Asked]:
        """The requests of so many hours, at random (Poisson). `rates`: videos an hour, by the hour."""
        draw = random.Random(seed)
        lengths, weights = zip(*self.lengths.items(), strict=True)
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
    them that plays to its end without a stop; `refused`: the share of requests that may hear 429; `batch_p95_s`: from a
    batch video's request to its end, over the whole day."""

    first_fragment_p95_s: float | None = Field(5.0, gt=0)
    stall_free: float | None = Field(0.95, ge=0, le=1)
    refused: float = Field(0.01, ge=0, le=1)
    batch_p95_s: float | None = Field(86_400.0, gt=0)


class Hardware(Settings):
    """What it runs on. `times`: a JSON file of `helios bench` or of a load test, in place of the estimates for `gpu`.
    `price`: dollars an hour of the sampler's GPU; `vae_price`, `text_price`: of what those replicas have; None: as the
    sampler's, and half of it; `core_price`: of a processor core, of which Director and ingress have one each."""

    gpu: str = "h100"
    steps: tuple[int, ...] = (1, 1, 1)
    amplify_first_chunk: bool = True
    times: str | None = None
    price: float | None = Field(None, ge=0)
    vae_price: float | None = Field(None, ge=0)
    text_price: float | None = Field(None, ge=0)
    core_price: float = Field(0.05, ge=0)

    def chunk_times(self) -> Times:
        """Raises InvalidInput."""
        if self.times is not None:
            return read_times(Path(self.times), self.steps, self.amplify_first_chunk)
        return estimated(self.gpu, self.steps, self.amplify_first_chunk)

    def prices(self) -> dict[str, float]:
        """Dollars an hour of one replica of each part."""
        known = GPUS.get(self.gpu)
        if self.price is None and known is None:
            raise ConfigError(f"hardware.price is not given, and gpu {self.gpu!r} is none of {', '.join(GPUS)}")
        sampler = self.price if self.price is not None else known.price  # type: ignore[union-attr]
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

    @classmethod
    def parse(cls, data: object, source: str) -> PlanConfig:
        """Raises ConfigError naming the source, the setting, the value and what is allowed."""
        try:
            return cls.model_validate(data, strict=False)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ConfigError(f"{source}: {name} is {first['input']!r:.200}: {first['msg']}") from None


@dataclass(frozen=True)
class Figures:
    """What was measured in a simulation. None: there was nothing to measure it by."""

    first_fragment_p95_s: float | None
    stall_free: float | None
    refused: float
    batch_p95_s: float | None
    sampler_busy: float

    @classmethod
    def of(cls, seen: list[Seen], busy: float) -> Figures:
        served = [each for each in seen if each.status != "refused"]
        watched = [each for each in served if each.asked.priority == "realtime" and each.first_fragment_s is not None]
        ended = [each.ended_s for each in served if each.asked.priority == "batch" and each.ended_s is not None]
        return cls(
            first_fragment_p95_s=percentile([each.first_fragment_s or 0.0 for each in watched], 95),
            stall_free=fmean(each.stalls == 0 for each in watched) if watched else None,
            refused=1 - len(served) / len(seen) if seen else 0.0,
            batch_p95_s=percentile(ended, 95),
            sampler_busy=busy,
        )

    def missed(self, targets: Targets) -> list[str]:
        """The names of the targets that are not met."""
        missed = []
        for name in ("first_fragment_p95_s", "refused", "batch_p95_s"):
            most, value = getattr(targets, name), getattr(self, name)
            if most is not None and value is not None and value > most:
                missed.append(name)
        if targets.stall_free is not None and self.stall_free is not None and self.stall_free < targets.stall_free:
            missed.append("stall_free")
        return missed


@dataclass(frozen=True)
class HourRow:
    """One hour of the day, of the whole service."""

    hour: int
    videos: int
    samplers: float  # mean
    sampler_busy: float
    first_fragment_p95_s: float | None


@dataclass(frozen=True)
class Plan:
    """`replicas`: part ▸ how many at most, in all `cells`. `peak`: how they do in the busiest minutes; `loads`: the
    same at so many times the traffic, up to the first that is too much; `knee`: the greatest of these at which all
    targets are met; `hours`, `day`: a whole day, which takes `sampler_hours`. Costs in dollars; a minute's is that of
    the day over the minutes of video made."""

    config: PlanConfig
    times: Times
    cells: int
    replicas: dict[str, int]
    peak: Figures
    loads: dict[float, Figures]
    knee: float | None
    day: Figures
    hours: list[HourRow]
    sampler_hours: float
    cost_per_day: float
    cost_per_minute: float


def plan(config: PlanConfig) -> Plan:
    """Raises InvalidInput, ConfigError, or Unreachable."""
    traffic, times, prices = config.traffic, config.hardware.chunk_times(), config.hardware.prices()
    _check_reachable(config, times)
    cell = _Cell(config, times)
    samplers = cell.fewest()
    fleet = cell.fleet(samplers)
    loads: dict[float, Figures] = {}
    knee = None
    for load in LOADS:
        loads[load] = cell.figures(fleet, load)
        if not loads[load].missed(config.targets):
            knee = load
        elif load > 1:
            break  # more would only fill the queue
    made = cell.day(replace(fleet, samplers=min(config.least, samplers)) if config.autoscale else fleet)
    day = Figures.of(made.seen, _busy(made))
    sampler_hours = sum(hour.samplers_s for hour in made.hours.values()) / HOUR_S
    if not config.autoscale:
        sampler_hours = samplers * DAY_HOURS  # and not to the end of the last video
    ingresses = max(1, for_all(cell.chunks * times.ingress_s, 0))
    others = {
        "vae_decoder": fleet.vae_decoders,
        "text_encoder": fleet.text_encoders,
        "ingress": ingresses,
        "director": 1,
    }
    replicas = {"sampler": samplers, **others}
    cost = sampler_hours * prices["sampler"] + DAY_HOURS * sum(n * prices[part] for part, n in others.items())
    minutes = sum(hour.chunks for hour in made.hours.values()) * CHUNK_FRAMES / traffic.fps / 60
    return Plan(
        config=config,
        times=times,
        cells=cell.cells,
        replicas={part: n * cell.cells for part, n in replicas.items()},
        peak=loads[1.0],
        loads=loads,
        knee=knee,
        day=day,
        hours=[row for row in _rows(made, cell.cells) if row.hour < DAY_HOURS or traffic.realtime < 1],
        sampler_hours=sampler_hours * cell.cells,
        cost_per_day=cost * cell.cells,
        cost_per_minute=cost / minutes,
    )


def _check_reachable(config: PlanConfig, times: Times) -> None:
    targets, plays_s = config.targets, CHUNK_FRAMES / config.traffic.fps
    most = targets.first_fragment_p95_s
    if config.traffic.realtime == 0:
        return
    if most is not None and times.first_fragment_s > most:
        raise Unreachable(
            f"targets.first_fragment_p95_s is {most:g}; allowed: more than {times.first_fragment_s:.2f}, which it "
            f"takes where nothing waits ({times.told})"
        )
    slowest = max(times.turn_s, times.render_s)
    if targets.stall_free and slowest > plays_s and config.traffic.mean_chunks > 2:
        raise Unreachable(
            f"targets.stall_free is {targets.stall_free:g}; allowed: 0, as a chunk takes {slowest:.2f} s and plays for "
            f"{plays_s:.2f} s, however many samplers there are ({times.told})"
        )


class _Cell:
    """One of `cells` that are alike, and how a fleet of its own would do with its share of the traffic. `chunks`, in a
    second: in the busiest minutes, if each is made as soon as it is asked for."""

    def __init__(self, config: PlanConfig, times: Times) -> None:
        self._config, self._times, traffic = config, times, config.traffic
        a_second = [rate / HOUR_S * traffic.mean_chunks for rate in (traffic.peak, fmean(traffic.by_hour))]
        # Batch waits until there is time for it, so that a Director has less to do than is asked for.
        led = a_second[0] * traffic.realtime + a_second[1] * (1 - traffic.realtime)
        self.cells = max(1, math.ceil(led * times.director_s / DIRECTOR_BUSY))
        self.chunks, self._mean_chunks = (rate / self.cells for rate in a_second)

    def fleet(self, samplers: int) -> Fleet:
        """With as many of the other parts as keep up with so many samplers, or with the traffic if that is less."""
        config, times, traffic = self._config, self._times, self._config.traffic
        chunks = min(self.chunks, samplers / times.turn_s)
        videos = chunks / traffic.mean_chunks
        return Fleet(
            samplers,
            vae_decoders=max(1, for_all(chunks * times.render_s + videos * traffic.image * times.media_s, 0)),
            text_encoders=max(1, for_all(videos * times.text_s, 0)),
            most=samplers,
            start_s=config.start_s,
            downscale_delay_s=config.downscale_delay_s,
        )

    def fewest(self) -> int:
        """The fewest samplers with which the targets are met. Raises Unreachable."""
        enough = self._least()
        too_few = enough - 1
        while missed := self._missed(enough):
            too_few, enough = enough, math.ceil(1.15 * enough + 0.5)
            if enough > MOST_SAMPLERS:
                raise Unreachable(f"{too_few} samplers miss {', '.join(missed)}; allowed: {MOST_SAMPLERS} in a cell")
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            too_few, enough = (middle, enough) if self._missed(middle) else (too_few, middle)
        return enough

    def _least(self) -> int:
        """Fewer could not do the work: what is watched as it comes, and what 95 % of batch asks for between any two
        hours until that is due."""
        traffic, times = self._config.traffic, self._times
        watched = self.chunks * traffic.realtime * times.turn_s
        due_s = self._config.targets.batch_p95_s
        if due_s is None:
            return max(1, math.ceil(watched))
        a_video = traffic.mean_chunks * times.turn_s * 0.95 * (1 - traffic.realtime) / self.cells
        hours = range(DAY_HOURS + 1)
        spans = [(sum(traffic.by_hour[a:b]), (b - a) * HOUR_S + due_s) for a in hours for b in hours if a < b]
        return max(1, math.ceil(max(watched, *(videos * a_video / seconds for videos, seconds in spans))))

    def _missed(self, samplers: int) -> list[str]:
        """The targets that so many samplers miss."""
        config, fleet = self._config, self.fleet(samplers)
        missed = self.figures(fleet).missed(config.targets)
        if not missed and 0 < config.traffic.realtime < 1:
            missed = self._figures_of_day(fleet).missed(config.targets)
        return missed

    def figures(self, fleet: Fleet, load: float = 1.0) -> Figures:
        """At so many times the traffic: in the busiest minutes, or over the day if nobody watches."""
        return self._busiest(fleet, load) if self._config.traffic.realtime else self._figures_of_day(fleet, load)

    def _figures_of_day(self, fleet: Fleet, load: float = 1.0) -> Figures:
        day = self.day(fleet, load)
        return Figures.of(day.seen, _busy(day))

    def _busiest(self, fleet: Fleet, load: float) -> Figures:
        config, traffic = self._config, self._config.traffic
        warm_s = max(300.0, 2 * traffic.mean_seconds)
        end_s = warm_s + WINDOW_S
        rate = traffic.peak * load / self.cells
        outcome = self._simulate(traffic.asked(lambda _: rate, end_s / HOUR_S, config.seed), fleet, end_s)
        # Whose first fragment may still come when the time is over does not count.
        late_s = 2 * max(config.targets.first_fragment_p95_s or 0.0, self._times.first_fragment_s)
        judged = [each for each in outcome.seen if warm_s <= each.asked.at < end_s - late_s]
        return Figures.of(judged, _busy(outcome))

    def day(self, fleet: Fleet, load: float = 1.0) -> Outcome:
        """24 hours, and until the last video has ended."""
        traffic = self._config.traffic
        rates = [rate * load / self.cells for rate in traffic.by_hour]
        return self._simulate(traffic.asked(rates.__getitem__, DAY_HOURS, self._config.seed), fleet, None)

    def _simulate(self, asked: Iterator[Asked], fleet: Fleet, until: float | None) -> Outcome:
        config = self._config
        return simulate(asked, self._times, fleet, config.videos_per_sampler, config.queued, until)


def _busy(outcome: Outcome) -> float:
    """The share of their time that samplers held a chunk."""
    alive = sum(hour.samplers_s for hour in outcome.hours.values())
    return sum(hour.sampling_s for hour in outcome.hours.values()) / alive if alive else 0.0


def _rows(outcome: Outcome, cells: int) -> list[HourRow]:
    by_hour: dict[int, list[Seen]] = {hour: [] for hour in sorted(outcome.hours)}
    for each in outcome.seen:
        by_hour.setdefault(int(each.asked.at // HOUR_S), []).append(each)
    rows = []
    for number, seen in sorted(by_hour.items()):
        hour = outcome.hours[number]
        figures = Figures.of(seen, hour.sampling_s / hour.samplers_s if hour.samplers_s else 0.0)
        rows.append(
            HourRow(
                hour=number,
                videos=len(seen) * cells,
                samplers=hour.samplers_s / HOUR_S * cells,
                sampler_busy=figures.sampler_busy,
                first_fragment_p95_s=figures.first_fragment_p95_s,
            )
        )
    return rows


def percentile(values: list[float], percent: int) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=100, method="inclusive")[percent - 1]
