"""How right the demo model's videos are: prompts that it was never trained on, in every way in which it can be asked.

python -m helios_core.demo.evaluate [MODEL] [--prompts N] [--json FILE]     (or: make demo-scores)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from helios_core.config import CHUNK_FRAMES, NATIVE_FPS
from helios_core.demo import world
from helios_core.demo.score import Score, score, score_windows
from helios_core.demo.words import Scene, caption, opened, random_scene
from helios_core.helios import Helios
from helios_core.spec import TRANSITION_CHUNKS, PromptAt

PRESETS = {"1,1,1": ((1, 1, 1), False), "2,2,2, first chunk amplified": ((2, 2, 2), True)}
CHUNKS = 3  # of a video, where its length does not matter
CHUNK_SECONDS = CHUNK_FRAMES / NATIVE_FPS
README_PROMPT = "a red sun over a blue sea, drifting left"
MINUTE_PROMPT = "an orange sun over a purple sea, drifting right"


@dataclass(frozen=True)
class Tally:
    """Videos, and the share of them (in percent) in which an attribute is right, or all that were named."""

    videos: int
    right: dict[str, float]

    @classmethod
    def of(cls, scores: Iterable[Score]) -> Tally:
        scores = list(scores)
        judged: dict[str, list[bool]] = {}
        for each in scores:
            for name, right in each.right.items():
                judged.setdefault(name, []).append(right)
        judged["all"] = [each.all_right for each in scores]
        return cls(len(scores), {name: 100 * sum(right) / len(right) for name, right in judged.items()})


def held_out(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Scenes whose colours of thing and ground no training ever named together, and a prompt for each."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    return [(scene, caption(scene, rng)) for scene in scenes]


def frames(
    helios: Helios, prompt: str, chunks: float = CHUNKS, preset: str = "1,1,1", **settings: Any
) -> NDArray[np.uint8]:
    """A whole video at the demo model's own size, uint8 [T, H, W, 3]."""
    steps, amplify = PRESETS[preset]
    settings |= {"size": "{}x{}".format(*world.SIZE), "steps": steps, "amplify_first_chunk": amplify}
    stream = helios.stream(prompt, seconds=chunks * CHUNK_SECONDS, **settings)
    return np.concatenate([chunk.frames for chunk in stream])


def from_text(helios: Helios, prompt: str, preset: str, seed: int) -> Score:
    """Text-to-video: all that the prompt names."""
    return score(frames(helios, prompt, preset=preset, seed=seed), prompt)


def over_a_minute(helios: Helios, prompt: str, seconds: int = 60, seed: int = 0) -> list[Score]:
    """Each of the first five seconds of a video, then each of its last five."""
    shown = frames(helios, prompt, chunks=seconds / CHUNK_SECONDS, seed=seed)
    begins = [NATIVE_FPS * second for second in (*range(5), *range(seconds - 5, seconds))]
    return score_windows(shown, [(begin, begin + NATIVE_FPS, prompt) for begin in begins])


def from_image(helios: Helios, scene: Scene, prompt: str, seed: int) -> Score:
    """Image-to-video: begins with a true picture of the scene, whose colours its prompt does not tell.

    It is not the first of a film, so that the thing and the waves are where no seed would put them.
    """
    picture = true_film(scene, CHUNK_FRAMES + 8, seed)[-1]
    untold = caption(replace(scene, object_colour=None, ground_colour=None, sky_colour=None), random.Random(seed))
    return score(frames(helios, untold, image=picture, seed=seed), prompt)


def from_video(helios: Helios, scene: Scene, prompt: str, seed: int) -> Score:
    """Video-to-video: goes on from a true film of the scene, of whose motion its prompt does not tell."""
    untold = caption(replace(scene, motion=None), random.Random(seed))
    clip = true_film(scene, 2 * CHUNK_FRAMES + 15, seed)  # 81 frames: waves and thing are in the midst of a chunk
    return score(frames(helios, untold, video=clip, seed=seed), prompt)


def with_a_turn(helios: Helios, scene: Scene, prompt: str, seed: int) -> tuple[Score, Score, Score]:
    """Another colour is asked for after two chunks: the video before that, the transition's last chunk, all of it.

    The second is judged by the new prompt; of the third only the motion means anything.
    """
    rng = random.Random(seed)
    colour = random_scene(rng).object_colour
    while colour in (scene.object_colour, scene.ground_colour, scene.sky_colour):
        colour = random_scene(rng).object_colour
    later = caption(replace(scene, object_colour=colour), rng)
    turn = 2 * CHUNK_FRAMES
    turned = turn + (TRANSITION_CHUNKS - 1) * CHUNK_FRAMES  # the last chunk of the transition has the new prompt alone
    shown = frames(helios, prompt, chunks=7, seed=seed, prompts=[PromptAt(turn / NATIVE_FPS, later)])
    before, after, whole = score_windows(
        shown, [(0, turn, prompt), (turned, turned + CHUNK_FRAMES, later), (0, len(shown), later)]
    )
    return before, after, whole


def true_film(scene: Scene, length: int, seed: int) -> NDArray[np.uint8]:
    """What the world itself shows of a scene, uint8 [T, H, W, 3], at the demo model's own size."""
    rng = random.Random(seed)
    film_TCHW = world.film(scene, world.start_of(rng.random(), rng.random()), length)
    film: NDArray[np.uint8] = (film_TCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return film


def evaluate(helios: Helios, prompts: int, progress: Progress) -> dict[str, Tally]:
    """All of the above: `prompts` held-out prompts with two seeds each; half as many pictures and clips to go on from,
    and an eighth in the ways that take long."""
    asked, few = held_out(prompts), held_out(max(1, prompts // 8), seed=1)
    ways: dict[str, list[Any]] = {}
    for preset in PRESETS:
        ways[f"text, {preset}"] = [(from_text, prompt, preset, seed) for _, prompt in asked for seed in (0, 1)]
    rng = random.Random(2)
    ways["text, some left open"] = [(from_text, caption(opened(scene, rng), rng), "1,1,1", 0) for scene, _ in asked]
    begun = [(*each, seed) for seed, each in enumerate(held_out(max(1, prompts // 2), seed=1))]
    ways["picture, colours untold"] = [(from_image, *each) for each in begun]
    ways["video, motion untold"] = [(from_video, *each) for each in begun]
    tallies: dict[str, Tally] = {}
    for way, calls in ways.items():
        tallies[way] = Tally.of(call(helios, *rest) for call, *rest in progress.track(calls, description=way))
    turns = [with_a_turn(helios, *each, 0) for each in progress.track(few, description="a new colour")]
    for part, name in enumerate(("before a new colour", "at the end of its transition", "across it (motion)")):
        tallies[name] = Tally.of(turn[part] for turn in turns)
    minutes = [over_a_minute(helios, prompt) for _, prompt in progress.track(few, description="a minute")]
    tallies["a minute: first 5 s"] = Tally.of(each for minute in minutes for each in minute[:5])
    tallies["a minute: last 5 s"] = Tally.of(each for minute in minutes for each in minute[5:])
    return tallies


def table(tallies: dict[str, Tally]) -> Table:
    """Percent right, a row for each way."""
    columns = list(dict.fromkeys(name for tally in tallies.values() for name in tally.right))
    drawn = Table("percent right", "videos", *(name.replace("_", " ") for name in columns))
    for way, tally in tallies.items():
        shares = (f"{tally.right[name]:.0f}" if name in tally.right else "" for name in columns)
        drawn.add_row(way, str(tally.videos), *shares)
    return drawn


def pictures(helios: Helios, folder: Path) -> None:
    """The README's pictures: demo.gif, which moves, and minute.png, of a minute a frame every two seconds."""
    shown = frames(helios, README_PROMPT, chunks=4, seed=1)[::2]  # four chunks are once across
    first, *rest = (Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in shown)
    first.save(folder / "demo.gif", save_all=True, append_images=rest, duration=2000 // NATIVE_FPS, loop=0)
    minute = frames(helios, MINUTE_PROMPT, chunks=60 / CHUNK_SECONDS)[:: 2 * NATIVE_FPS]
    rows = [np.concatenate(list(minute[i : i + 6]), axis=1) for i in range(0, len(minute), 6)]
    Image.fromarray(np.concatenate(rows)).quantize(128, dither=Image.Dither.NONE).save(folder / "minute.png")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts, each with two seeds")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--pictures", type=Path, help="write the README's pictures into this folder, and do no more")
    options = parser.parse_args(arguments)
    helios = Helios.load(options.model)
    if options.pictures is not None:
        pictures(helios, options.pictures)
        return
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        tallies = evaluate(helios, options.prompts, progress)
    Console().print(table(tallies))
    if options.json is not None:
        options.json.write_text(json.dumps({way: vars(tally) for way, tally in tallies.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
