"""`helios config`: what a cluster and its dashboards need of the service, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from helios_core.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="What a cluster needs of the service, as files.")


@app.command()
def render(
    file: Path,
    kustomize: Annotated[
        bool, typer.Option("--kustomize", help="write serve-config.yaml and ray.env beside FILE, as overlays in k8s/")
    ] = False,
) -> None:
    """Print the Ray Serve configuration of the service that FILE describes: for `serve deploy`, or a RayService."""
    from deployments.config import AppConfig
    from deployments.rendering import overlay, serve_config_text

    config = AppConfig.read(file)
    if not kustomize:
        typer.echo(serve_config_text(config), nl=False)
        return
    _write(file.parent, overlay(config, str(file)))


@app.command()
def monitoring(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the files, as k8s/monitoring has them")],
) -> None:
    """Write Grafana dashboards, Prometheus rules and a scrape job, made from the table of metrics."""
    from deployments.monitoring import files

    _write(output, files())


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput("output", str(folder), f"a folder that can be written ({error.strerror})") from None
