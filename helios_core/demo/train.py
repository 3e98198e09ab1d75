"""Rebuilds the demo checkpoint from nothing, on two cores.

    python -m helios_core.demo.train FOLDER [--report FOLDER]     (or: make demo-checkpoint)

The linear code is found first. Then one process trains the VAE and another the transformer with its text encoder.
The checkpoint is written in the official layout, loaded like any other, and evaluated. The report: losses, scores,
pictures. It needs 5 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from helios_core.config import CHUNK_FRAMES
from helios_core.demo import codec, train_transformer, train_vae, world
from helios_core.demo.codec import LinearCodec
from helios_core.demo.evaluate import evaluate, frames, held_out, table
from helios_core.demo.layout import write_layout
from helios_core.demo.words import random_scene
from helios_core.helios import Helios
from helios_core.vae.model import WanVae

FILMS = 300  # of a chunk each, to find the linear code from
TRACKS, FIRSTS = 800, 2400  # geometries: of four chunks, and of a first chunk alone
TRANSFORMER_STEPS = 4000
ALONE_FROM = 2600  # the step from which the transformer has both cores: the VAE is waited for there
DECODER_STEPS, ENCODER_STEPS = 2000, 2400
SHEET = 8  # videos on the sheet of pictures
EVERY = 50  # steps over which the report's losses are means

Losses = dict[str, list[float]]  # of every step, by name


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Rebuilds the demo checkpoint from nothing, on two cores.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--report", type=Path, default=Path("build/demo-checkpoint"))
    options = parser.parse_args(arguments)
    options.report.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    settle()
    linear = find_code()
    columns = (TextColumn("{task.description:12}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}")) as progress:
        losses = train(linear, options.folder, progress)
    report(options.folder, options.report, linear, losses, minutes=(time.perf_counter() - begin) / 60)


def settle() -> None:
    """One thread for each of the two processes; numbers too small to matter count as zero, which is faster."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def find_code() -> LinearCodec:
    """The linear code, from films of any scenes with the thing anywhere."""
    rng = random.Random(0)
    starts = [(rng.random() * world.WIDTH, rng.random()) for _ in range(FILMS)]
    films = [world.film(random_scene(rng), start, CHUNK_FRAMES, codec.SIZE) for start in starts]
    return LinearCodec.fit(films, torch.Generator().manual_seed(0))


def train(linear: LinearCodec, folder: Path, progress: Progress) -> Losses:
    """Trains both models and writes the checkpoint."""
    totals = {"decoder": DECODER_STEPS, "encoder": ENCODER_STEPS, "transformer": TRANSFORMER_STEPS}
    tasks = {name: progress.add_task(name, total=total, loss="") for name, total in totals.items()}
    losses: Losses = {}

    def tell(part: str, step: int, new: dict[str, float]) -> None:
        for name, loss in new.items():
            losses.setdefault(name, []).append(loss)
        last = ", ".join(f"{name} {np.mean(losses[name][-EVERY:]):.4f}" for name in new)
        progress.update(tasks[part], completed=step + 1, loss=last)

    spawn = multiprocessing.get_context("spawn")
    news: SimpleQueue[Any] = spawn.SimpleQueue()
    with tempfile.TemporaryDirectory() as scratch:
        vae_file = Path(scratch) / "vae.safetensors"
        vae_process = spawn.Process(target=train_vae_apart, args=(linear, vae_file, news), daemon=True)
        vae_process.start()
        training = train_transformer.Training(linear, TRANSFORMER_STEPS, TRACKS, FIRSTS)
        for done in training.run():
            tell("transformer", done.step, done.losses)
            while not news.empty():
                tell(*news.get())
            if done.step + 1 == min(ALONE_FROM, TRANSFORMER_STEPS):
                while vae_process.is_alive() or not news.empty():
                    if news.empty():
                        vae_process.join(0.5)
                    else:
                        tell(*news.get())
                if vae_process.exitcode != 0:
                    raise RuntimeError(f"the VAE's process ended with status {vae_process.exitcode}; see above")
                torch.set_num_threads(2)
        vae = safetensors.torch.load_file(vae_file)
    result = training.average
    write_layout(
        folder,
        "distilled",
        text_encoder=(train_transformer.text_config(result.tokenizer), stored(result.text_encoder)),
        transformer=(train_transformer.TRANSFORMER, stored(result.transformer)),
        vae=(train_vae.VAE, vae),
        tokenizer=result.tokenizer,
    )
    return losses


def train_vae_apart(linear: LinearCodec, file: Path, news: SimpleQueue[Any]) -> None:
    """In a process of its own: trains the VAE into `file`, and tells of each step."""
    settle()
    torch.manual_seed(0)
    vae = WanVae(train_vae.VAE)
    for done in train_vae.train(linear, DECODER_STEPS, ENCODER_STEPS, vae):
        news.put((done.part, done.step, {done.part: done.error}))
    safetensors.torch.save_file(stored(vae), file)


def stored(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters as they are stored: bf16."""
    return {name: parameter.detach().bfloat16().contiguous() for name, parameter in module.named_parameters()}


def report(folder: Path, into: Path, linear: LinearCodec, losses: Losses, minutes: float) -> None:
    """Evaluates the checkpoint in `folder`, and writes and prints what was measured."""
    helios = Helios.load(str(folder), device="cpu", threads=2)
    with Progress() as progress:
        tallies = evaluate(helios, 64, progress)
    rows = [frames(helios, prompt, seed=seed)[::11] for seed, (_, prompt) in enumerate(held_out(SHEET, seed=2))]
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(into / "sheet.png")
    facts = {
        "minutes of training": round(minutes, 1),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores, torch {version('torch')}",
        "steps": {name: len(each) for name, each in losses.items()},
        "dB of the VAE": train_vae.fidelity(helios.vae, linear, films=8, seed=1),
        "scores": {way: vars(tally) for way, tally in tallies.items()},
        "losses": {
            name: [round(float(np.mean(each[i : i + EVERY])), 5) for i in range(0, len(each), EVERY)]
            for name, each in losses.items()
        },
    }
    (into / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
    Console().print(table(tallies))
    Console().print(f"{minutes:.0f} minutes of training, {facts['bytes']} bytes in {folder}; the report is in {into}")


if __name__ == "__main__":
    main(sys.argv[1:])
