"""The graph as it is deployed: resources and scaling come from the configuration, the README's own included."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.replica import _load_deployment_def_from_import_path
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from deployments.app import SAMPLER, TEXT_ENCODER, VAE_DECODER, application, build_app, deploy
from deployments.config import AppConfig, ConfigError, Pool
from deployments.rendering import serve_config
from deployments.service import verify
from helios_core.demo.stand_in import write_checkpoint
from helios_core.errors import CheckpointError

README = Path(__file__).parents[2] / "README.md"


def readme_config(tmp_path: Path) -> AppConfig:
    (yaml,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    return AppConfig.read(path)


def options(pool: Pool) -> Any:
    return deploy(SAMPLER, "Sampler", pool, at_once=1)


def test_sampler_of_the_readme_gets_an_h100_per_replica_and_is_scaled(tmp_path: Path) -> None:
    sampler = options(readme_config(tmp_path).models[0].sampler)
    assert sampler.ray_actor_options == {"num_cpus": 4, "num_gpus": 1, "accelerator_type": "H100"}
    scaling = sampler._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 8)
    assert (scaling.look_back_period_s, scaling.metrics_interval_s) == (30, 1)
    assert sampler.max_ongoing_requests == 1


def test_defaults_fit_on_a_laptop() -> None:
    config = AppConfig()
    pools = [config.ingress, config.director, config.text_encoder, config.models[0].sampler, config.vae_decoder]
    assert sum(pool.num_cpus * pool.max_replicas for pool in pools) <= 1
    assert all(pool.num_gpus == 0 and pool.accelerator_type is None for pool in pools)
    assert options(config.models[0].sampler).num_replicas == 1


def test_five_deployments_are_wired(tmp_path: Path) -> None:
    ingress, _ = build_app(AppConfig(store=str(tmp_path)).with_model("random"))
    assert ingress._bound_deployment.name == "Ingress"
    director = ingress._bound_deployment.init_args[2]
    assert director._bound_deployment.name == "Director"
    assert parts_of(director) == {"random": ("TextEncoder", "Sampler", "VaeDecoder")}


@pytest.mark.parametrize("path", [TEXT_ENCODER, SAMPLER, VAE_DECODER])
def test_a_replica_finds_its_class_by_the_path_that_it_is_given(path: str) -> None:
    found = _load_deployment_def_from_import_path(path)
    assert f"{found.__module__}.{found.__name__}" == path


def parts_of(director: Any) -> dict[str, tuple[str, ...]]:
    """The names of the deployments of each model."""
    models = director._bound_deployment.init_args[1]
    return {
        model: tuple(part._bound_deployment.name for part in (own.text_encoder, own.sampler, own.vae_decoder))
        for model, own in models.items()
    }


def test_models_with_equal_encoders_and_vaes_share_them(tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_checkpoint(other, seed=1)
    config = AppConfig(store=str(tmp_path / "store")).override(
        models=[{"model": "random"}, {"model": "random-mid"}, {"model": str(other)}]
    )
    ingress, pools = build_app(config)
    assert parts_of(ingress._bound_deployment.init_args[2]) == {
        "random": ("TextEncoder-random", "Sampler-random", "VaeDecoder-random"),
        "random-mid": ("TextEncoder-random", "Sampler-random-mid", "VaeDecoder-random"),
        "other": ("TextEncoder-other", "Sampler-other", "VaeDecoder-other"),
    }
    assert len(pools) == 2 + 2 + 3 + 2
    assert [card.id for card in ingress._bound_deployment.init_args[1]] == ["random", "random-mid", "other"]


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "random")
    config = AppConfig(store=str(tmp_path / "store"))
    with pytest.raises(ConfigError, match="models are random, random; allowed: each id once"):
        build_app(config.override(models=[{"model": "random"}, {"model": str(tmp_path / "random")}]))


def test_replicas_are_told_of_files_by_their_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have other working directories."""
    monkeypatch.chdir(tmp_path)
    config = AppConfig(store="store", trace_file="spans.jsonl", keys="keys.json")
    (own,) = serve_config(config)["applications"]
    expected = {"store": f"{tmp_path}/store", "trace_file": f"{tmp_path}/spans.jsonl", "keys": f"{tmp_path}/keys.json"}
    assert own["args"] == expected


def test_the_graph_that_is_built_from_a_rendered_configuration_is_that_of_the_configuration(tmp_path: Path) -> None:
    pools = readme_config(tmp_path).model_dump(mode="json", include={"models", "vae_decoder", "text_encoder"})
    config = AppConfig(store=str(tmp_path)).override(**pools).with_model("random")
    (own,) = ServeDeploySchema.model_validate(serve_config(config)).applications
    assert AppConfig.parse(own.args, "args") == config
    assert application(own.args)._bound_deployment.init_args[0] == config


def test_what_is_wrong_with_a_configuration_stands_in_the_status_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RayServeException, match=r"^args: modle is 'demo': Extra inputs are not permitted$"):
        application({"modle": "demo"})
    with pytest.raises(RayServeException, match=r"^host is 0.0.0.0, and there are no keys"):
        application({"host": "0.0.0.0"})


def test_a_broken_checkpoint_is_refused_before_anything_is_deployed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index.json|transformer/config.json"):
        build_app(AppConfig().with_model(str(tmp_path)))
    write_checkpoint(tmp_path / "random")
    (tmp_path / "random/vae/diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file"):
        verify(AppConfig().with_model(str(tmp_path / "random")))
