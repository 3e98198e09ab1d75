"""The Ray Serve graph: five deployments and who calls whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.config import AppConfig, Pool
from deployments.graph import DirectorReplica
from deployments.ingress import Ingress
from deployments.sampler import Sampler
from deployments.store import Store
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from helios_core.checkpoints import Checkpoint

MANY = 10_000  # requests at once for those that only wait: Serve's default of 5 would queue a sixth viewer
LONGEST_CHUNK_S = 60.0  # a computing replica that is to stop may finish its chunk
LONGEST_ANSWER_S = 2.0  # one that only waits has nothing to finish that would not go on elsewhere


def build_app(config: AppConfig) -> Application:
    """Ingress ▸ Director ▸ (TextEncoder, Sampler, VaeDecoder).

    Raises CheckpointError if the model cannot be opened. Weights are loaded by the replicas, each its own.
    """
    checkpoint = Checkpoint.open(config.model)
    if checkpoint.hub_id is None:
        checkpoint.verify()  # here, so that a broken file is one clear message and not five failing replicas
    # Replicas have working directories of their own and may be on other machines: they get what means the same there.
    trace_file = None if config.trace_file is None else str(Path(config.trace_file).absolute())
    config = config.override(model=checkpoint.source, store=Store(config.store).url, trace_file=trace_file)
    text_encoder = deploy(TextEncoder, config.text_encoder, at_once=4).bind(config)
    sampler = deploy(Sampler, config.sampler, at_once=1).bind(config)
    vae_decoder = deploy(VaeDecoder, config.vae_decoder, at_once=2).bind(config)  # one is stored, the next decoded
    director = deploy(DirectorReplica, config.director, at_once=MANY, name="Director").bind(
        config, text_encoder, sampler, vae_decoder
    )
    ingress: Application = deploy(
        Ingress,
        config.ingress,
        at_once=MANY,
        # Behind HAProxy this hands the socket's own `send` to the application, which then waits for a slow viewer.
        environment={"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"} if config.haproxy else None,
    ).bind(config, checkpoint.card, director)
    return ingress


def deploy(
    replica: type, pool: Pool, at_once: int, name: str | None = None, environment: dict[str, str] | None = None
) -> Any:
    """`replica` as a deployment with the resources of `pool`; each of its replicas takes `at_once` calls at a time."""
    resources: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
    if pool.accelerator_type is not None:
        resources["accelerator_type"] = pool.accelerator_type
    if environment is not None:
        resources["runtime_env"] = {"env_vars": environment}
    size: dict[str, Any] = {"num_replicas": pool.min_replicas}
    if pool.max_replicas > pool.min_replicas:
        scaling = pool.model_dump(include={"min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s"})
        size = {"autoscaling_config": {**scaling, "target_ongoing_requests": at_once}}
    return serve.deployment(
        replica,
        name=name or replica.__name__,
        max_ongoing_requests=at_once,
        ray_actor_options=resources,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=LONGEST_ANSWER_S if at_once == MANY else LONGEST_CHUNK_S,
        **size,
    )
