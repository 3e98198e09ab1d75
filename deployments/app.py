"""The Ray Serve graph, which `serveConfigV2` names: which deployments there are and who calls whom."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from deployments.autoscaling import VIEWERS
from deployments.config import AppConfig, ConfigError, Pool, VaePool
from deployments.graph import RENDERS_AT_ONCE, TEXTS_AT_ONCE, DirectorReplica, ModelHandles
from deployments.ingress import Ingress
from deployments.keys import read_keys
from deployments.safety import hook_class
from helios_core.checkpoints import Checkpoint
from helios_core.errors import HeliosError

# By import path, since they bring torch: who builds the graph would wait seconds for it, and needs it for nothing else.
TEXT_ENCODER = "deployments.text_encoder.TextEncoder"
SAMPLER = "deployments.sampler.Sampler"
VAE_DECODER = "deployments.vae_decoder.VaeDecoder"
MANY = 10_000  # requests at once for those that only wait: Serve's default of 5 would queue a sixth viewer
LONGEST_ANSWER_S = 2.0  # a Director that is to stop has nothing to finish: what it leaves goes on under the next one
LOOK_AGAIN_S = 0.5  # between two looks whether a replica that is to stop has finished, in place of Serve's 2
SERVE_ASKS_EVERY_S = 2.0  # a replica, whether it is well; one that answers late three times running is replaced
DIRECTOR_ANSWERS_S, INGRESS_ANSWERS_S = 2.0, 5.0
# Those that compute are asked by the Director, too, and sooner (SILENT in ray_calls.py). Serve must take longer than to
# find that the Director was stopped: who works for it then answers nobody, as Ray waits for it.
COMPUTING_ANSWERS_S = 10.0
LOOK_BACK_S = 30.0  # so much of what the Director told does the policy see
TELLS_EVERY_S = 1.0  # Serve asks the Director for it; 10 s, as by default, would be most of a cold start
# Replicas that compute keep their freed memory: where glibc gives every large tensor back at once, as service.py has it
# do for all the others, a CPU decodes at half the speed (measured: the kernel clears the pages again and again).
TENSORS = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def application(args: dict[str, Any]) -> Application:
    """The graph of the configuration in `args`, which Serve builds in a process of the cluster. What is wrong with it
    stands in the application's status, in one line."""
    try:
        return build_app(AppConfig.parse(args, "args"))[0]
    except HeliosError as error:
        raise RayServeException(str(error)) from error


def build_app(config: AppConfig) -> tuple[Application, list[Pool]]:
    """Ingress ▸ Director ▸ for each model (TextEncoder, Sampler, VaeDecoder), of which models share what is equal; and
    the pool of each deployment.

    Raises CheckpointError if a model cannot be opened, ConfigError if two have the same id, if the keys cannot be read,
    if there is no such safety hook, or if strangers could come in. Weights are loaded by the replicas, each its own.
    """
    config.check_door()
    if config.keys is not None:
        read_keys(Path(config.keys))  # here, so that a file that cannot be read is one clear message
    if config.safety is not None:
        hook_class(config.safety.hook)  # as above
    checkpoints = [Checkpoint.open(settings.model) for settings in config.models]
    ids = [checkpoint.card.id for checkpoint in checkpoints]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"models are {', '.join(ids)}; allowed: each id once")

    encoders, decoders = _owners(checkpoints, "text_encoder"), _owners(checkpoints, "vae")
    text_encoders, samplers, vae_decoders = {}, {}, {}
    for settings, checkpoint in zip(config.models, checkpoints, strict=True):
        own, source = checkpoint.card.id, checkpoint.source
        if own in encoders:
            name = _name("TextEncoder", own, encoders)
            encoder = deploy(TEXT_ENCODER, name, config.text_encoder, TEXTS_AT_ONCE, environment=TENSORS)
            text_encoders[own] = encoder.bind(config, source)
        if own in decoders:  # one chunk is stored while the next is decoded
            name = _name("VaeDecoder", own, decoders)
            decoder = deploy(VAE_DECODER, name, config.vae_decoder, RENDERS_AT_ONCE, environment=TENSORS)
            vae_decoders[own] = decoder.bind(config, source)
        name = _name("Sampler", own, ids)
        sampler = deploy(SAMPLER, name, settings.sampler, at_once=1, environment=TENSORS)
        samplers[own] = sampler.bind(config, settings.sampler, source)
    models = {
        checkpoint.card.id: ModelHandles(
            checkpoint.fingerprint(),
            text_encoders[encoder],
            samplers[checkpoint.card.id],
            vae_decoders[decoder],
        )
        for checkpoint, encoder, decoder in zip(checkpoints, encoders, decoders, strict=True)
    }
    always = [samplers[own] for own, each in zip(ids, config.models, strict=True) if each.sampler.min_replicas]
    always += text_encoders.values() if config.text_encoder.min_replicas else ()
    always += vae_decoders.values() if config.vae_decoder.min_replicas else ()
    # There is one Director whatever is wanted, but only of a deployment that scales does Serve ask for figures.
    director = deploy(
        DirectorReplica,
        "Director",
        config.director,
        at_once=MANY,
        scales=config.scales,
        answers_s=DIRECTOR_ANSWERS_S,
    ).bind(config, models, always, secrets.token_hex(8))
    ingress: Application = deploy(
        Ingress,
        "Ingress",
        config.ingress,
        at_once=MANY,
        # Behind HAProxy this hands the socket's own `send` to the application, which then waits for a slow viewer.
        environment={"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"} if config.haproxy else None,
        drain_s=config.drain_s,
        answers_s=INGRESS_ANSWERS_S,
    ).bind(config, [checkpoint.card for checkpoint in checkpoints], director)
    pools: list[Pool] = [config.ingress, config.director, *(settings.sampler for settings in config.models)]
    pools += [config.text_encoder] * len(text_encoders) + [config.vae_decoder] * len(vae_decoders)
    return ingress, pools


def _owners(checkpoints: Sequence[Checkpoint], part: str) -> list[str]:
    """For each checkpoint the id of the first one whose `part` has the very files that its own has."""
    if len(checkpoints) == 1:
        return [checkpoints[0].card.id]  # nothing to compare, and the files may be large
    first: dict[str, str] = {}
    return [first.setdefault(checkpoint.digest(part), checkpoint.card.id) for checkpoint in checkpoints]


def _name(kind: str, owner: str, owners: Sequence[str]) -> str:
    """A deployment's name: with its model's only if there are several of its kind."""
    return kind if len(set(owners)) == 1 else f"{kind}-{re.sub(r'[^A-Za-z0-9.]+', '-', owner)}"


def deploy(
    replica: type | str,
    name: str,
    pool: Pool,
    at_once: int,
    environment: dict[str, str] | None = None,
    drain_s: float = LONGEST_ANSWER_S,
    scales: bool = False,
    answers_s: float = COMPUTING_ANSWERS_S,
) -> Any:
    """`replica`, a class or its import path, as a deployment with the resources of `pool`, whose size is asked of the
    policy if it may differ or `scales`; each of its replicas takes `at_once` calls at a time, and has `drain_s` to
    finish them when it is to stop, one that computes the time of its longest; `answers_s`: so long it may take to say
    that it is well."""
    resources: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
    if pool.accelerator_type is not None:
        resources["accelerator_type"] = pool.accelerator_type
    if environment is not None:
        # Serve gives the application's own runtime_env only to deployments that have none.
        around = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
        resources["runtime_env"] = {**around, "env_vars": {**around.get("env_vars", {}), **environment}}
    size: dict[str, Any] = {"num_replicas": pool.min_replicas}
    if pool.scales or scales:
        scaling = pool.model_dump(include={"min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s"})
        told = {"look_back_period_s": LOOK_BACK_S, "metrics_interval_s": TELLS_EVERY_S}
        size = {"autoscaling_config": {**scaling, **told, "target_ongoing_requests": VIEWERS}}
    return serve.deployment(
        name=name,
        max_ongoing_requests=at_once,
        ray_actor_options=resources,
        health_check_period_s=SERVE_ASKS_EVERY_S,
        health_check_timeout_s=answers_s,
        graceful_shutdown_timeout_s=pool.max_call_seconds if isinstance(pool, VaePool) else drain_s,
        graceful_shutdown_wait_loop_s=LOOK_AGAIN_S,
        **size,
    )(replica)
