"""The manifests in k8s/: every overlay passes every check, and each kind of mistake is found by one."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import AppConfig
from deployments.rendering import overlay
from tests.k8s import manifests
from tests.k8s.manifests import OVERLAYS, ROOT, ManifestError, Object, ray_service


@pytest.fixture(scope="module")
def built() -> dict[str, list[Object]]:
    return {folder.name: manifests.build(folder) for folder in OVERLAYS}


@pytest.fixture
def objects(built: dict[str, list[Object]]) -> list[Object]:
    """Those of h100, the richest, to be spoilt."""
    return copy.deepcopy(built["h100"])


@pytest.fixture
def service(objects: list[Object]) -> Object:
    return ray_service(objects)


def serve_config(service: Object) -> Any:
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def config_of(service: Object) -> AppConfig:
    return manifests.check_serve_config(service["spec"]["serveConfigV2"])


def test_there_are_overlays() -> None:
    assert [folder.name for folder in OVERLAYS] == ["cpu-demo", "h100", "single-gpu"]


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_an_overlay_passes_every_check(folder: Path, built: dict[str, list[Object]]) -> None:
    manifests.check_all(folder, built[folder.name])


def test_the_field_list_is_read_whole() -> None:
    text = (Path(manifests.__file__).parent / "rayservice-fields.txt").read_text().partition("\n\n")[2]
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("!")]

    def count(field: manifests.Field) -> int:
        return sum(1 + count(each) for each in field.fields.values())

    assert count(manifests.rayservice_fields()) == len(lines) > 100
    spec = manifests.rayservice_fields().fields["spec"]
    assert spec.needs == ["rayClusterConfig"]
    assert spec.fields["rayClusterConfig"].fields["workerGroupSpecs"].needs[0] == "groupName"


def put(thing: Any, path: str, value: Any) -> None:
    """Sets the value at a path like spec.containers.0.image."""
    *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parts:
        thing = thing[part]
    thing[last] = value


CLUSTER = "spec.rayClusterConfig"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.rayClusterDeletionDelaySecond", 60, "rayClusterDeletionDelaySecond is not a field"),
        (f"{CLUSTER}.workerGroupSpecs.0.maxReplica", 3, r"workerGroupSpecs\[0\].maxReplica is not a field"),
        (f"{CLUSTER}.authOptions.mode", "tokens", "authOptions.mode is tokens; allowed: disabled, token"),
        (f"{CLUSTER}.enableInTreeAutoscaling", "yes", "enableInTreeAutoscaling is 'yes'; allowed: boolean"),
        (f"{CLUSTER}.workerGroupSpecs.0.resources.CPU", 4, "resources.CPU is 4; allowed: string"),
        (f"{CLUSTER}.workerGroupSpecs.0", {"groupName": "cpu"}, "maxReplicas is missing"),
        ("spec.rayClusterDeletionDelaySeconds", -1, "is -1; allowed: at least 0"),
        (f"{CLUSTER}.headGroupSpec.template.spec.containers.0.imagee", "x", "'imagee' was unexpected"),
        (f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRf", {}, "'secretKeyRf' was unexpected"),
        (f"{CLUSTER}.autoscalerOptions.volumeMounts.0.path", "/x", "'path' was unexpected"),
        ("status", {}, "status"),
    ],
)
def test_a_wrong_field_of_the_rayservice(service: Object, path: str, value: Any, message: str) -> None:
    put(service, path, value)
    with pytest.raises(ManifestError, match=message):
        manifests.check_fields(service)


@pytest.mark.parametrize(
    "kind", ["Job", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget", "PersistentVolumeClaim"]
)
def test_a_typo_in_a_core_object(objects: list[Object], kind: str) -> None:
    thing = next(each for each in objects if each["kind"] == kind)
    thing["spec"]["selectr"] = {}
    with pytest.raises(ManifestError, match=f"{kind} .*'selectr' was unexpected"):
        manifests.check_core(thing)


HEAD = f"{CLUSTER}.headGroupSpec"
WORKER = f"{CLUSTER}.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("metadata.name", "h" * 48, "at most 47 characters"),
        ("metadata.name", "1helios", "DNS-1035"),
        ("spec.upgradeStrategy.type", "Recreate", "upgradeStrategy.type is Recreate; allowed: NewCluster"),
        (f"{HEAD}.template.spec.restartPolicy", "Always", "head: restartPolicy is Always"),
        (f"{WORKER}.template.spec.restartPolicy", "Always", "cpu: restartPolicy is Always"),
        (f"{WORKER}.rayStartParams", {"num-cpus": "4"}, "both resources and rayStartParams num-cpus"),
        (f"{WORKER}.rayStartParams", {"labels": "a=b"}, "rayStartParams has labels"),
        (f"{WORKER}.labels", {"a": "b c"}, "label a is 'b c'"),
        (f"{WORKER}.minReplicas", 4, "minReplicas 4, maxReplicas 3"),
        (f"{WORKER}.groupName", "h100", "each name once"),
        (f"{WORKER}.groupName", "CPU", "no DNS-1123 label"),
        (f"{HEAD}.template.spec.containers.0.env", [{"name": "REDIS_PASSWORD", "value": "x"}], "has REDIS_PASSWORD"),
        (f"{HEAD}.template.spec.containers.0.env", [{"name": "RAY_REDIS_ADDRESS", "value": "x"}], "RAY_REDIS_ADDRESS"),
        (f"{HEAD}.template.spec.containers.0.ports", [], "no port named serve"),
        (f"{HEAD}.headService", {"metadata": {"name": "x"}}, "headService.metadata.name"),
        (f"{CLUSTER}.gcsFaultToleranceOptions.storage", {}, "without storage"),
        (f"{CLUSTER}.networkPolicy", {}, "not without its feature gate"),
        (f"{CLUSTER}.authOptions.mode", "disabled", "allowed: mode token"),
        (f"{CLUSTER}.authOptions", {}, r"authOptions is \{\}; allowed: mode token"),
        (f"{CLUSTER}.rayVersion", "2.51.0", "2.52.0 or later"),
    ],
)
def test_what_kuberay_would_refuse(service: Object, path: str, value: Any, message: str) -> None:
    put(service, path, value)
    with pytest.raises(ManifestError, match=message):
        manifests.check_kuberay(service)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("http_optoins", {}, "serveConfigV2.http_optoins is not a field of ServeDeploySchema"),
        ("http_options.prt", 8000, "serveConfigV2.http_options.prt is not a field"),
        ("applications.0.import_pth", "x", r"applications\[0\].import_pth is not a field of ServeApplicationSchema"),
        ("applications.0.deployments", [{"name": "x", "num_replica": 1}], "num_replica is not a field"),
        ("http_options.port", "x", "http_options.port is 'x'"),
        ("applications", [], "applications has 0; allowed: 1"),
        ("applications.0.args.modells", [], r"args: modells is \[\]: Extra inputs are not permitted"),
        ("applications.0.import_path", "deployments.app:build", "import_path is deployments.app:build; allowed"),
        (
            "applications.0.autoscaling_policy.policy_function",
            "deployments.scale:f",
            "policy_function is deployments.sc",
        ),
        ("applications.0.args.models.0.sampler.num_gpu", 1, "models.0.sampler.num_gpu is 1: Extra inputs"),
        ("applications.0.args.director", {"max_replicas": 2}, "one Director leads a store"),
    ],
)
def test_a_wrong_serve_config(service: Object, path: str, value: Any, message: str) -> None:
    config = serve_config(service)
    put(config, path, value)
    with pytest.raises(ManifestError, match=message):
        manifests.check_serve_config(yaml.safe_dump(config))


def test_a_stale_serve_config(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "k8s/overlays/h100", tmp_path / "h100")
    source = folder / "helios.yaml"
    for name, text in overlay(AppConfig.read(source), str(source)).items():
        (folder / name).write_text(text)
    manifests.check_current(folder)
    source.write_text(source.read_text().replace("max_replicas: 8", "max_replicas: 7", 1))
    with pytest.raises(ManifestError, match=r"serve-config.yaml is stale: helios config render --kustomize"):
        manifests.check_current(folder)
    source.write_text("haproxi: true\n")
    with pytest.raises(ManifestError, match="haproxi is True: Extra inputs"):
        manifests.check_current(folder)


def test_another_environment(objects: list[Object]) -> None:
    config = config_of(ray_service(objects))
    with pytest.raises(ManifestError, match="head: its environment is"):
        manifests.check_environment(objects, config.override(idle_seconds=60))
    del ray_service(objects)["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0][
        "envFrom"
    ]
    with pytest.raises(ManifestError, match="h100: its environment is"):
        manifests.check_environment(objects, config)


@pytest.mark.parametrize(
    ("pool", "change", "message"),
    [
        ("ingress", {"num_cpus": 5}, "ingress takes 5 CPUs, 0 GPUs, None; allowed"),
        ("vae_decoder", {"num_gpus": 2}, "vae_decoder of helios-distilled takes 4 CPUs, 2 GPUs, L4"),
        ("vae_decoder", {"accelerator_type": "A100"}, "vae_decoder .* A100; allowed: what one machine has"),
        ("vae_decoder", {"max_replicas": 9}, "no room for one of max_replicas"),
        ("text_encoder", {"min_replicas": 2}, "no room for one of min_replicas"),
        ("ingress", {"max_replicas": 99}, "no room for one of max_replicas 99"),
    ],
)
def test_a_replica_that_fits_nowhere(service: Object, pool: str, change: dict[str, Any], message: str) -> None:
    config = config_of(service)
    config = config.override(**{pool: {**getattr(config, pool).model_dump(mode="json"), **change}})
    with pytest.raises(ManifestError, match=message):
        manifests.check_room(service, config)


def test_beside_a_sampler_there_is_room_for_nothing(service: Object) -> None:
    config = config_of(service)
    [sampler] = [each.sampler for each in config.models]
    [group] = [each for each in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if each["groupName"] == "h100"]
    assert float(group["resources"]["CPU"]) == sampler.num_cpus
    assert float(group["resources"]["GPU"]) == sampler.num_gpus
    group["labels"]["ray.io/accelerator-type"] = "H200"
    with pytest.raises(
        ManifestError, match="accelerator-type is H200; allowed: as in its resources, accelerator_type:H100"
    ):
        manifests.check_room(service, config)
    group["labels"]["ray.io/accelerator-type"] = "H100"
    group["resources"]["GPU"] = "2"
    with pytest.raises(
        ManifestError, match=re.escape("h100 tells Ray of (4.0, 2.0) CPUs and GPUs; allowed: its (4.0, 1.0)")
    ):
        manifests.check_room(service, config)


def test_delays_that_are_too_short(service: Object) -> None:
    config = config_of(service)
    with pytest.raises(ManifestError, match=r"rayClusterDeletionDelaySeconds is 3600; allowed: at least .* 7200"):
        manifests.check_delays(service, config.override(limits={"max_open_seconds": 7200.0}))
    with pytest.raises(
        ManifestError, match="terminationGracePeriodSeconds is 660; allowed: at least max_call_seconds or drain_s, 900,"
    ):
        manifests.check_delays(service, config.override(vae_decoder={"max_call_seconds": 900.0}))
    worker = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    worker["terminationGracePeriodSeconds"] = 640  # less than the drain's deadline and its margin
    with pytest.raises(ManifestError, match="RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is 630; allowed: 600 to 610"):
        manifests.check_delays(service, config)
    del service["spec"]["rayClusterDeletionDelaySeconds"]  # KubeRay's default
    with pytest.raises(ManifestError, match="is 60; allowed: at least the longest video's 3600"):
        manifests.check_delays(service, config)


def test_versions_that_differ(service: Object) -> None:
    pyproject, constraints = (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text()
    other = pyproject.replace('"ray[serve]==2.60.0"', '"ray[serve]==2.61.0"')
    assert other != pyproject
    with pytest.raises(ManifestError, match=r"'pyproject.toml': '2.61.0'.* one and the same"):
        manifests.check_versions(service, pyproject=other)
    with pytest.raises(ManifestError, match=r"'constraints.txt': '2.61.0'"):
        manifests.check_versions(service, constraints=constraints.replace("ray==2.60.0", "ray==2.61.0"))
    images = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]
    images["image"] = images["image"].replace("2.60.0", "2.59.0")
    with pytest.raises(ManifestError, match=r"'image of h100': '2\.59\.0'"):
        manifests.check_versions(service)
    images["image"] = "helios-serve:latest"
    with pytest.raises(ManifestError, match="h100: image tag is"):
        manifests.check_versions(service)


def test_weights_of_another_model(objects: list[Object]) -> None:
    config = config_of(ray_service(objects))
    with pytest.raises(ManifestError, match=r"fetches \['helios-distilled'\]; allowed: .*\['helios-base'\]"):
        manifests.check_weights(objects, config.with_model("helios-base"))


def test_a_budget_that_blocks_every_drain(objects: list[Object]) -> None:
    budget = next(each for each in objects if each["kind"] == "PodDisruptionBudget")
    for least in (2, "50%"):
        budget["spec"]["minAvailable"] = least
        with pytest.raises(ManifestError, match=f"minAvailable is {least}"):
            manifests.check_disruption(objects)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("securityContext.runAsNonRoot", False, "allowed: runAsNonRoot"),
        ("securityContext.seccompProfile", {"type": "Unconfined"}, "seccompProfile is"),
        ("automountServiceAccountToken", True, "automountServiceAccountToken is not false"),
        ("hostNetwork", True, "shares the host's"),
        ("containers.0.securityContext.readOnlyRootFilesystem", False, "readOnlyRootFilesystem"),
        ("containers.0.securityContext.capabilities", {"drop": ["ALL"], "add": ["SYS_PTRACE"]}, "SYS_PTRACE"),
        ("containers.0.securityContext.allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
    ],
)
def test_a_pod_that_may_too_much(objects: list[Object], path: str, value: Any, message: str) -> None:
    found = dict(manifests.pods(objects))
    assert found.keys() == {"head", "cpu", "h100", "l4", "helios-redis", "helios-weights"}
    for name, spec in copy.deepcopy(found).items():
        put(spec, path, value)
        with pytest.raises(ManifestError, match=f"^{name}.*{message}"):
            manifests.check_confined(name, spec)


def test_an_autoscaler_that_may_too_much(objects: list[Object]) -> None:
    del ray_service(objects)["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"]
    with pytest.raises(ManifestError, match="head, container autoscaler"):
        manifests.check_confined("head", dict(manifests.pods(objects))["head"])


def test_only_the_autoscaler_has_a_token(service: Object) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    mounts = {
        mount["name"] for _, spec in manifests.ray_pods(service) for mount in spec["containers"][0]["volumeMounts"]
    }
    assert "api-token" not in mounts
    assert "api-token" in {mount["name"] for mount in cluster["autoscalerOptions"]["volumeMounts"]}


def test_doors_that_stand_open(objects: list[Object]) -> None:
    def policy(name: str) -> Object:
        return next(each for each in spoilt if each["kind"] == "NetworkPolicy" and each["metadata"]["name"] == name)

    def found(message: str) -> None:
        with pytest.raises(ManifestError, match=message):
            manifests.check_doors(spoilt)

    spoilt = copy.deepcopy(objects)
    policy("ray")["spec"]["ingress"].append({"ports": [{"port": 8000}]})
    found("head: everybody may come in")
    spoilt = copy.deepcopy(objects)
    policy("ray")["spec"]["ingress"][1]["ports"].append({"port": 8265})
    found("'helios/client': 'true'.* may come in at .*8265")
    spoilt = copy.deepcopy(objects)
    policy("ray-head")["spec"]["ingress"][0]["ports"].append({"port": 10001})
    found("kuberay-operator.* may come in at .*10001")
    spoilt = copy.deepcopy(objects)
    policy("ray")["spec"]["podSelector"] = {"matchLabels": {"app": "ray"}}
    found("no NetworkPolicy lets Ray's pods reach a head")
    spoilt = [each for each in objects if each["metadata"]["name"] != "nothing-else"]
    found("no NetworkPolicy denies by default")


def test_the_image_runs_as_the_pods_do(built: dict[str, list[Object]]) -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", (ROOT / "Dockerfile").read_text(), re.M | re.S))
    assert {"cpu", "cuda"} <= stages.keys()
    assert all("USER 1000:1000" in stages[target] for target in ("cpu", "cuda"))
    users = {
        name: spec["securityContext"]["runAsUser"] for name, spec in manifests.ray_pods(ray_service(built["h100"]))
    }
    assert set(users.values()) == {1000}
    assert "wget" in stages["runtime"]  # KubeRay's probe of a worker
    assert "gcc" not in stages["cpu"] + stages["runtime"]
