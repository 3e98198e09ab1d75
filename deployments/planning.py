"""How many replicas given traffic needs, what they cost, and where the knee is: what `helios plan` says.

Traffic goes to cells by a hash of the video's id, each with a Director of its own, so that all cells are alike: one is
simulated, with its share of the traffic.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean

from deployments.autoscaling import VIEWERS, for_all
from deployments.chunk_times import Times
from deployments.plan_config import DAY_HOURS, PlanConfig, Targets
from deployments.simulation import HOUR_S, Asked, Fleet, Hour, Outcome, Seen, simulate
from helios_core.config import CHUNK_FRAMES
from helios_core.errors import HeliosError

DIRECTOR_BUSY = 0.6  # the share of one core that a Director may need: its loop must answer while it works
WINDOW_S = 7200.0  # of the busiest rate, which a fleet is judged by; longer where fewer videos come
FEWEST_VIDEOS = 200  # in it
LOADS = (0.5, 0.7, 0.85, 1.0, 1.1, 1.2, 1.35, 1.5)  # of the planned traffic, to find the knee
MOST_SAMPLERS = 512  # of one cell


class Unreachable(HeliosError):
    """No fleet of this kind meets the targets."""

    code = "unreachable"


@dataclass(frozen=True)
class Figures:
    """What came out of a simulation. `first_fragment_p95_s`, `stall_free`, `refused`: of watched videos; `batch_p95_s`:
    of the others; None: there was no such video. The last three: the share of their time in which replicas worked."""

    first_fragment_p95_s: float | None
    stall_free: float | None
    refused: float | None
    batch_p95_s: float | None
    sampler_busy: float
    vae_decoder_busy: float
    text_encoder_busy: float

    @classmethod
    def of(cls, seen: list[Seen], hours: Iterable[Hour], seconds: float, fleet: Fleet) -> Figures:
        """`seconds`: that the `hours` lasted in all."""
        asked = [each for each in seen if each.asked.priority == "realtime"]
        watched = [each for each in asked if each.status != "refused"]
        batch = [each.ended_s for each in seen if each.asked.priority == "batch"]
        works = [(hour.sampling_s, hour.samplers_s, hour.rendering_s, hour.encoding_s) for hour in hours]
        sampling, samplers, rendering, encoding = map(sum, zip(*works, strict=True)) if works else (0, 0, 0, 0)
        return cls(
            # Who left before had waited for so long; who still waits has not seen the end of it.
            first_fragment_p95_s=percentile(
                [each.first_fragment_s or each.ended_s or math.inf for each in watched], 0.95
            ),
            stall_free=fmean(each.stalls == 0 for each in watched) if watched else None,
            refused=1 - len(watched) / len(asked) if asked else None,
            batch_p95_s=percentile([math.inf if each is None else each for each in batch], 0.95),
            sampler_busy=sampling / samplers if samplers else 0.0,
            vae_decoder_busy=rendering / (seconds * fleet.vae_decoders),
            text_encoder_busy=encoding / (seconds * fleet.text_encoders),
        )

    def missed(self, targets: Targets) -> list[str]:
        """The names of the targets that are not met."""

        def over(name: str) -> bool:
            most, value = getattr(targets, name), getattr(self, name)
            return most is not None and value is not None and value > most

        missed = [name for name in ("first_fragment_p95_s", "refused", "batch_p95_s") if over(name)]
        if targets.stall_free is not None and self.stall_free is not None and self.stall_free < targets.stall_free:
            missed.append("stall_free")
        return missed


@dataclass(frozen=True)
class HourRow:
    """One hour of the day, of the whole service. `samplers`: in the mean."""

    hour: int
    videos: int
    samplers: float
    sampler_busy: float
    first_fragment_p95_s: float | None


@dataclass(frozen=True)
class Plan:
    """`replicas`: part ▸ how many at most, in all `cells`. `peak`: how they do in the busiest minutes, or over the day
    if nobody watches; `loads`: the same at so many times the traffic, up to the first that is too much; `knee`: the
    greatest of these at which all targets are met; `hours`, `day`: a whole day, with as many samplers as there are at
    the time, which takes `sampler_hours`. `director_busy`, `ingress_busy`: the share of a core, in the busiest minutes.
    Costs in dollars; a minute's is that of the day over the minutes of video made."""

    config: PlanConfig
    times: Times
    cells: int
    replicas: dict[str, int]
    peak: Figures
    loads: dict[float, Figures]
    knee: float | None
    day: Figures
    hours: list[HourRow]
    director_busy: float
    ingress_busy: float
    sampler_hours: float
    cost_per_day: float
    cost_per_minute: float
    simulated_in_s: float = field(compare=False)  # the day, of one cell


def plan(config: PlanConfig) -> Plan:
    """Raises InvalidInput, ConfigError, or Unreachable."""
    times, prices = config.hardware.chunk_times(), config.hardware.prices()
    _check_reachable(config, times)
    cell = _Cell(config, times)
    fleet = cell.fleet_for_targets()
    samplers = fleet.samplers
    loads: dict[float, Figures] = {}
    knee = None
    for load in LOADS:
        loads[load] = cell.figures(fleet, load)
        if not loads[load].missed(config.targets):
            knee = load
        elif load > 1:
            break  # more would only fill the queue
    began = time.perf_counter()
    day = cell.day(replace(fleet, samplers=min(config.least, samplers)) if config.autoscale else fleet)
    simulated_in_s = time.perf_counter() - began
    replicas = {
        "sampler": samplers,
        "vae_decoder": fleet.vae_decoders,
        "text_encoder": fleet.text_encoders,
        "ingress": cell.ingresses,
        "director": 1,
    }
    others = sum(count * prices[part] for part, count in replicas.items() if part != "sampler")
    sampler_hours = sum(hour.samplers_s for hour in day.hours.values()) / HOUR_S
    cost = sampler_hours * prices["sampler"] + DAY_HOURS * others
    minutes = sum(hour.shown_s for hour in day.hours.values()) / 60
    return Plan(
        config=config,
        times=times,
        cells=cell.cells,
        replicas={part: count * cell.cells for part, count in replicas.items()},
        peak=loads[1.0],
        loads=loads,
        knee=knee,
        day=Figures.of(day.seen, day.hours.values(), DAY_HOURS * HOUR_S, fleet),
        hours=_rows(day, fleet, cell.cells),
        director_busy=cell.chunks * times.director_s,
        ingress_busy=cell.chunks * times.ingress_s / cell.ingresses,
        sampler_hours=sampler_hours * cell.cells,
        cost_per_day=cost * cell.cells,
        cost_per_minute=cost / minutes,
        simulated_in_s=simulated_in_s,
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
    if targets.stall_free and slowest > plays_s and min(config.traffic.seconds) > 2 * plays_s:
        raise Unreachable(
            f"targets.stall_free is {targets.stall_free:g}; allowed: 0, as a chunk takes {slowest:.2f} s and plays for "
            f"{plays_s:.2f} s, however many samplers there are ({times.told})"
        )


class _Cell:
    """One of `cells` that are alike, and how a fleet of its own would do with its share of the traffic. `chunks`: a
    second, in the busiest minutes."""

    def __init__(self, config: PlanConfig, times: Times) -> None:
        self._config, self._times, traffic = config, times, config.traffic
        a_second = [rate / HOUR_S * traffic.mean_chunks for rate in (traffic.peak, fmean(traffic.by_hour))]
        # Batch waits until there is time for it, so that it asks for no more than it does in the mean.
        watched, batch = a_second[0] * traffic.realtime, a_second[1] * (1 - traffic.realtime)
        self.cells = max(1, math.ceil((watched + batch) * times.director_s / DIRECTOR_BUSY))
        self.chunks = (watched + batch) / self.cells
        viewers = traffic.peak / HOUR_S * traffic.realtime * traffic.mean_seconds / self.cells
        self.ingresses = max(1, for_all(self.chunks * times.ingress_s, 0), math.ceil(viewers / VIEWERS))

    def fleet_for_targets(self) -> Fleet:
        """The one with the fewest VAE decoders and text encoders that meets the targets if there are samplers enough,
        and then the fewest samplers. Raises Unreachable."""
        most = self._fleet(2 * self._least() + 8)
        if self._config.traffic.realtime:
            most = self._with_others(most)
        enough = self._least()
        too_few = enough - 1
        while missed := self._missed(self._with(most, enough)):
            too_few, enough = enough, math.ceil(1.15 * enough + 0.5)
            if enough > MOST_SAMPLERS:
                raise Unreachable(f"{too_few} samplers miss {', '.join(missed)}; allowed: {MOST_SAMPLERS} in a cell")
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            too_few, enough = (middle, enough) if self._missed(self._with(most, middle)) else (too_few, middle)
        return self._with(most, enough)

    def _with_others(self, few: Fleet) -> Fleet:
        """`few` with more VAE decoders and text encoders, if its targets are missed for want of those."""

        def met(fleet: Fleet) -> bool:
            return not self.figures(fleet).missed(self._config.targets)

        for more in range(few.vae_decoders + 4):
            decoders = replace(few, vae_decoders=few.vae_decoders + more)
            both = replace(decoders, text_encoders=few.text_encoders + more)
            if met(both):
                return decoders if met(decoders) else both
        return few

    def _fleet(self, samplers: int) -> Fleet:
        """With as many of the other parts as keep up with so many samplers, or with the traffic if that is less."""
        config, times, traffic = self._config, self._times, self._config.traffic
        peak = traffic.peak / HOUR_S / self.cells  # videos a second
        chunks = min(peak * traffic.mean_chunks, samplers / times.turn_s)
        videos = chunks / traffic.mean_chunks
        return Fleet(
            samplers,
            vae_decoders=max(1, for_all(chunks * times.render_s + videos * traffic.image * times.media_s, 0)),
            text_encoders=max(1, for_all(videos * times.text_s, 0)),
            most=samplers,
            start_s=config.start_s,
            downscale_delay_s=config.downscale_delay_s,
        )

    def _with(self, most: Fleet, samplers: int) -> Fleet:
        """`most` with so many samplers, and no more of the other parts than these need."""
        fleet = self._fleet(samplers)
        if self._config.traffic.realtime:
            fleet = replace(fleet, vae_decoders=most.vae_decoders, text_encoders=most.text_encoders)
        return fleet

    def _least(self) -> int:
        """Fewer samplers could not do the work: what is watched as it comes, all of a day, and what 95 % of batch asks
        for between any two hours until that is due."""
        traffic, times = self._config.traffic, self._times
        stays = 1 - traffic.leave / 2  # at least so much of what is watched is made
        rate_s = traffic.mean_chunks * times.turn_s / self.cells / HOUR_S
        watched, batch = rate_s * traffic.realtime * stays, rate_s * (1 - traffic.realtime)
        works = [traffic.peak * watched, fmean(traffic.by_hour) * (watched + batch)]
        if (due_s := self._config.targets.batch_p95_s) is not None:
            hours = range(DAY_HOURS + 1)
            works += [
                0.95 * batch * sum(traffic.by_hour[a:b]) / (b - a + due_s / HOUR_S)
                for a in hours
                for b in hours
                if a < b
            ]
        return max(1, math.ceil(max(works)))

    def _missed(self, fleet: Fleet) -> list[str]:
        """The targets that a fleet misses."""
        config = self._config
        missed = self.figures(fleet).missed(config.targets)
        if not missed and 0 < config.traffic.realtime < 1:
            missed = self._figures_of_day(fleet, 1.0).missed(config.targets)
        return missed

    def figures(self, fleet: Fleet, load: float = 1.0) -> Figures:
        """At so many times the traffic: in the busiest minutes, or over the day if nobody watches."""
        return self._busiest(fleet, load) if self._config.traffic.realtime else self._figures_of_day(fleet, load)

    def _figures_of_day(self, fleet: Fleet, load: float) -> Figures:
        day = self.day(fleet, load)
        return Figures.of(day.seen, day.hours.values(), DAY_HOURS * HOUR_S, fleet)

    def _busiest(self, fleet: Fleet, load: float) -> Figures:
        config, traffic = self._config, self._config.traffic
        rate = traffic.peak * load / self.cells
        warm_s = max(300.0, 2 * max(traffic.seconds))
        window_s = max(WINDOW_S, min(DAY_HOURS * HOUR_S, FEWEST_VIDEOS / rate * HOUR_S))
        end_s = warm_s + window_s
        outcome = self._simulate(traffic.asked(lambda _: rate, end_s / HOUR_S, config.seed), fleet, end_s)
        # Whose first fragment may still come when the time is over does not count.
        late_s = 2 * max(config.targets.first_fragment_p95_s or 0.0, self._times.first_fragment_s)
        judged = [each for each in outcome.seen if warm_s <= each.asked.at < end_s - late_s]
        watched = [each for each in judged if each.asked.priority == "realtime"]  # batch is judged by the day
        return Figures.of(watched, outcome.hours.values(), end_s, fleet)

    def day(self, fleet: Fleet, load: float = 1.0) -> Outcome:
        """24 hours. Where there is batch they follow upon 24 like them, of which something may be left to do."""
        traffic, before = self._config.traffic, DAY_HOURS if self._config.traffic.realtime < 1 else 0
        rates = [rate * load / self.cells for rate in traffic.by_hour]
        asked = traffic.asked(lambda hour: rates[hour % DAY_HOURS], before + DAY_HOURS, self._config.seed)
        outcome = self._simulate(asked, fleet, None)
        hours = {hour: outcome.hours[before + hour] for hour in range(DAY_HOURS)}
        for number, hour in hours.items():  # what is left of each when all videos have ended
            idle_s = (before + number + 1) * HOUR_S - outcome.until
            hour.samplers_s += fleet.samplers * min(max(0.0, idle_s), HOUR_S)
        return Outcome([each for each in outcome.seen if each.asked.at >= before * HOUR_S], hours, outcome.until)

    def _simulate(self, asked: Iterator[Asked], fleet: Fleet, until: float | None) -> Outcome:
        config = self._config
        return simulate(asked, self._times, fleet, config.videos_per_sampler, config.queued, until)


def _rows(day: Outcome, fleet: Fleet, cells: int) -> list[HourRow]:
    begin = min((each.asked.at // HOUR_S for each in day.seen), default=0.0) // DAY_HOURS * DAY_HOURS
    seen: dict[int, list[Seen]] = defaultdict(list)
    for each in day.seen:
        seen[int(each.asked.at // HOUR_S - begin)].append(each)
    rows = []
    for number, hour in day.hours.items():
        figures = Figures.of(seen[number], [hour], HOUR_S, fleet)
        samplers, busy = hour.samplers_s / HOUR_S * cells, figures.sampler_busy
        rows.append(HourRow(number, len(seen[number]) * cells, samplers, busy, figures.first_fragment_p95_s))
    return rows


def percentile(values: list[float], share: float) -> float | None:
    """The smallest value that this share of them does not exceed; None of none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else None
