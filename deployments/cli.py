"""The command line.

`helios serve | generate | demo | videos | keys | store | config | plan | score | bench | download | trace | openapi`

Heavy imports wait for their command.
"""

from __future__ import annotations

import http.client
import json
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deployments import config_cli, plan_cli, store_check, videos_cli
from deployments.keys import app as keys_cli
from deployments.videos_cli import check_writable
from helios_core.config import CHUNK_FRAMES, Approximations, HistoryRefresh
from helios_core.demo.words import vocabulary
from helios_core.errors import HeliosError, InvalidInput
from helios_core.spec import PromptAt, VideoRequest, parse_steps

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(videos_cli.app, name="videos")
app.add_typer(store_check.app, name="store")
app.add_typer(keys_cli, name="keys")
app.add_typer(config_cli.app, name="config")
app.command()(plan_cli.plan)
console = Console(stderr=True, highlight=False, soft_wrap=True)

WORDS = "\n\n".join(f"{kind}: {', '.join(words)}" for kind, words in vocabulary().items())  # a paragraph for each
Model = Annotated[str, typer.Option(help="demo, a folder in the official layout, or a hub id")]


def main() -> None:
    """Runs the command line. An error of ours ends with its message alone, and status 2 for bad input, else 1."""
    try:
        app()
    except HeliosError as error:
        console.print(f"helios: {error}", style="red", markup=False)
        sys.exit(2 if isinstance(error, InvalidInput) else 1)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="YAML file with everything; the options below override it")
    ] = None,
    model: Annotated[str | None, typer.Option(help="demo, a folder in the official layout, or a hub id")] = None,
    host: str | None = None,
    port: int | None = None,
    store: Annotated[str | None, typer.Option(help="folder, or s3://, gs://, az:// URL")] = None,
    samplers: Annotated[int | None, typer.Option(help="number of sampler replicas")] = None,
    vae_decoders: Annotated[int | None, typer.Option(help="number of VAE decoder replicas")] = None,
    keys: Annotated[str | None, typer.Option(help="file of `helios keys`: only who has one is served")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="serve without keys whoever reaches --host")] = False,
    trace_file: Annotated[Path | None, typer.Option(help="append spans to it, for `helios trace`")] = None,
) -> None:
    """Serve a model over HTTP until interrupted."""
    from deployments.config import AppConfig
    from deployments.ray_calls import log_folder
    from deployments.service import run_service

    settings = AppConfig() if config is None else AppConfig.read(config)
    if trace_file is not None:
        check_writable("trace_file", trace_file)
    settings = settings.override(
        host=host, port=port, store=store, keys=keys, insecure=insecure or None, trace_file=trace_file
    )
    settings = settings.with_model(model).with_replicas(samplers, vae_decoders)
    stop = threading.Event()
    with run_service(settings) as url:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        models = ", ".join(each.model for each in settings.models)
        console.print(f"serving {models} at {url}, logging to {log_folder()}")
        stop.wait()
        console.print("stopping")


@app.command(epilog=f"What the demo model understands, in prompts like 'a red sun over a blue sea':\n\n{WORDS}")
def generate(
    prompt: str,
    output: Annotated[Path, typer.Option("-o", "--output", help="MP4 file to write")] = Path("out.mp4"),
    model: Model = "demo",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's own by default")] = None,
    seconds: float = 5.0,
    seed: int = 42,
    steps: Annotated[str | None, typer.Option(help="transformer steps per stage, for example 2,2,2")] = None,
    preset: Annotated[str | None, typer.Option(help="a named step list, for example realtime or quality")] = None,
    amplify_first_chunk: Annotated[
        bool | None, typer.Option("--amplify-first-chunk/--no-amplify-first-chunk", help="on for Distilled")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="PNG, JPEG or WebP that the video begins with")] = None,
    video: Annotated[Path | None, typer.Option(help="MP4, MOV or WebM that the video goes on from")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 means none; Base and Mid use 5 by default")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what guidance leads away from")] = None,
    prompt_at: Annotated[
        list[str] | None, typer.Option(help='3:"a green moon" changes the prompt after 3 seconds; repeatable')
    ] = None,
    device: str = "auto",
    dtype: str = "auto",
    fp8: Annotated[bool, typer.Option("--fp8", help="products in 8 bits: faster on Hopper, less exact")] = False,
    history_refresh: Annotated[
        HistoryRefresh,
        typer.Option(help="compute the history at each step, or once a stage or chunk: faster, less exact"),
    ] = "step",
    save_latents: Annotated[Path | None, typer.Option(help="also write the latents, as safetensors")] = None,
) -> None:
    """Make one video without a service. The file grows chunk by chunk and can be played while it does."""
    import safetensors.torch
    import torch

    from helios_core.checkpoints import Checkpoint
    from helios_core.helios import Helios
    from helios_core.media.fragments import encode_fragment

    check_writable("output", output)
    if save_latents is not None:
        check_writable("save_latents", save_latents)
    settings: dict[str, Any] = {
        "size": size,
        "seconds": seconds,
        "seed": seed,
        "steps": None if steps is None else parse_steps(steps),
        "preset": preset,
        "amplify_first_chunk": amplify_first_chunk,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "prompts": tuple(parse_prompt_at(text) for text in prompt_at or ()),
    }
    if image is not None and video is not None:
        raise InvalidInput("video", str(video), "an image or a video, not both")
    for option, path in (("image", image), ("video", video)):
        if path is not None and not path.is_file():
            raise InvalidInput(option, str(path), "a file")
    card = Checkpoint.open(model).card
    spec = VideoRequest(prompt, **settings).check(card)  # before minutes go into loading weights
    if note := card.note(*spec.texts):
        console.print(f"note: {note}", style="yellow", markup=False)
    helios = Helios.load(model, device, dtype, approximations=Approximations(fp8, history_refresh))
    chunks = helios.stream(prompt, image=image, video=video, **settings)
    latents = []
    with output.open("wb") as file, progress_bar() as progress:
        task = progress.add_task("", total=spec.frames, chunk=0, chunks=spec.chunks, rate=0.0, real_time=0.0)
        made, start = 0, time.perf_counter()
        for chunk in chunks:
            fragment = encode_fragment(chunk.yuv, chunk_index=chunk.index, first_frame=made, fps=spec.fps)
            file.write((fragment.init if chunk.index == 0 else b"") + fragment.data)
            file.flush()
            made += fragment.frames
            rate = made / (time.perf_counter() - start)
            progress.update(task, chunk=chunk.index + 1, completed=made, rate=rate, real_time=rate / spec.fps)
            if save_latents is not None:
                latents.append(chunk.state.latents.clone())
    if save_latents is not None:
        safetensors.torch.save_file({"latents": torch.cat(latents, dim=2)}, save_latents)
    console.print(f"{output}: {made} frames")


@app.command()
def demo(
    prompt: str,
    output: Annotated[Path, typer.Option("-o", "--output", help="MP4 file to write")] = Path("video.mp4"),
    model: Model = "demo",
    seconds: float = 8.0,
) -> None:
    """Start a service, stream one video of a prompt into a file over HTTP, and stop."""
    from deployments.config import AppConfig, free_port
    from deployments.service import run_service

    check_writable("output", output)
    with tempfile.TemporaryDirectory() as store:
        console.print(f"starting the service on the model {model}")
        with run_service(AppConfig(store=store, port=free_port()).with_model(model)) as url:
            console.print(f"streaming {prompt!r}")
            save_stream(url, prompt, seconds, output)


def save_stream(url: str, prompt: str, seconds: float, output: Path) -> None:
    """POST /v1/videos/stream into a file, with a line for every chunk that arrives.

    Raises HeliosError if the service refuses the video or cannot finish it.
    """
    body = json.dumps({"prompt": prompt, "seconds": seconds}).encode()
    request = urllib.request.Request(f"{url}/v1/videos/stream", data=body, headers={"Content-Type": "application/json"})

    def video(video_id: str) -> Any:
        with urllib.request.urlopen(f"{url}/v1/videos/{video_id}") as answer:
            return json.load(answer)

    begin, made = time.perf_counter(), 0
    try:
        with urllib.request.urlopen(request) as response, output.open("wb") as file:
            video_id = response.headers["X-Video-Id"]
            while data := response.read1():
                file.write(data)
                file.flush()
                status = video(video_id)
                if status["usage"]["chunks"] > made:
                    made, chunks = status["usage"]["chunks"], -(-status["frames"] // CHUNK_FRAMES)
                    elapsed = time.perf_counter() - begin
                    console.print(f"{elapsed:6.2f} s  {made} of {chunks} chunks made, {file.tell()} bytes on disk")
    except urllib.error.HTTPError as error:
        raise HeliosError(json.load(error)["error"]["message"]) from None
    except http.client.IncompleteRead:
        pass  # a video that ends early is cut off; its status says why
    status = video(video_id)
    if status["status"] != "completed":
        why = status["error"]["message"] if status["error"] else "it was stopped"
        raise HeliosError(f"the video is {status['status']}: {why}")
    elapsed = time.perf_counter() - begin
    console.print(f"{output}: {status['frames']} frames, {status['seconds']} s of video in {elapsed:.2f} s")
    if status["note"] is not None:
        console.print(f"note: {status['note']}", style="yellow", markup=False)


@app.command()
def score(
    video: Annotated[Path, typer.Argument(help="a video file of two seconds or more")],
    prompt: Annotated[
        str | None, typer.Option(help="what the demo model was asked for, to see whether it came")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file to write")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="PNG file to write")] = None,
) -> None:
    """Measure how well a video hangs together, and with a prompt whether it is right."""
    from deployments.score_report import document, measure, plot, table

    for option, path in (("json", json_file), ("plot", plot_file)):
        if path is not None:
            check_writable(option, path)
    report = measure(video, prompt)
    Console().print(table(report))
    if json_file is not None:
        json_file.write_text(json.dumps(document(report), indent=2) + "\n")
    if plot_file is not None:
        plot(report, plot_file)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure each part of the model, against diffusers if asked, or with --serve what the service adds to it."""
    if "--serve" in context.args:
        from deployments.serve_bench import main as measure
    else:
        from helios_core.bench import main as measure
    measure(context.args)


@app.command()
def download(model: Annotated[str, typer.Argument(help="hub id or known name")]) -> None:
    """Fetch the files that inference needs into the hub's cache and print their folder."""
    from helios_core.checkpoints import download as fetch

    typer.echo(fetch(model))


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="what `helios serve --trace-file` wrote")],
    video: Annotated[str | None, typer.Option(help="id of a video; by default the one that began last")] = None,
) -> None:
    """Draw where the time of one video went."""
    from deployments.timeline import draw, pick, read

    draw(Console(), pick(read(file), video))


@app.command()
def openapi(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="a file, in place of the screen")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the service, whose limits and models count")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="as a page for people: docs/api.md")] = False,
) -> None:
    """Print the contract of the HTTP API, OpenAPI 3.1. No service needs to run."""
    from deployments.config import AppConfig
    from deployments.contract import contract
    from deployments.reference import markdown as in_words
    from helios_core.checkpoints import Checkpoint

    settings = AppConfig() if config is None else AppConfig.read(config)
    document = contract(settings, [Checkpoint.open(each.model).card for each in settings.models])
    text = in_words(document) if markdown else json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        check_writable("output", output)
        output.write_text(text, encoding="utf-8")


def parse_prompt_at(text: str) -> PromptAt:
    """ "3:a green moon" as a change of the prompt after 3 seconds. Raises InvalidInput."""
    seconds, colon, prompt = text.partition(":")
    try:
        if colon:
            return PromptAt(float(seconds), prompt)
    except ValueError:
        pass  # told below
    raise InvalidInput("prompt_at", text, 'seconds, a colon and a prompt, for example 3:"a green moon"')


def progress_bar() -> Progress:
    """Chunk by chunk: frames, frames per second, real-time factor (seconds of video per second), time left."""
    columns: list[Any] = [
        TextColumn("chunk {task.fields[chunk]}/{task.fields[chunks]}, frame {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[rate]:.1f} frames/s, {task.fields[real_time]:.2f} x real time"),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=console)


if __name__ == "__main__":
    main()
