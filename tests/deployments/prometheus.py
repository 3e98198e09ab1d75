"""A real Prometheus before a service, and every query of the dashboards and rules put to it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from deployments.config import free_port

PATIENCE_S = 120.0  # only who fails waits so long
SCRAPES = 3  # a rate needs two
EVERY = "500ms"
GRAFANA = {"__rate_interval": "1m", "__range": "1h"}


def binary(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is not on the PATH; Debian's package `prometheus` has it: apt-get install prometheus"
    return path


def assert_all_queries_answer(metrics_url: str, token: str | None, folder: Path) -> dict[str, list[float]]:
    """Every query of `folder` (as k8s/monitoring is) has a number for an answer on a Prometheus that scrapes
    `metrics_url`, its rules are evaluated, and its alerts can be asked for. Query's place ▸ numbers.

    Rates see only what happens while they are scraped: videos of two chunks or more have to be made, and completed,
    until this returns. `token`: a key for /metrics; None: the service has no keys.
    """
    with prometheus(metrics_url, token, folder) as http:

        def ask(query: str) -> list[float]:
            answer = http.get("/api/v1/query", params={"query": query}).json()
            assert answer["status"] == "success", (query, answer)
            return [float(series["value"][1]) for series in answer["data"]["result"]]

        def rules() -> list[dict[str, Any]]:
            (group,) = http.get("/api/v1/rules").raise_for_status().json()["data"]["groups"]
            return list(group["rules"])

        def scraped() -> bool:
            return ask(f"sum(sum_over_time(up[1h])) >= {SCRAPES}") != []

        def targets() -> object:
            return http.get("/api/v1/targets").json()["data"]["activeTargets"]

        _wait(scraped, targets)
        answers: dict[str, list[float]] = {}
        missing = queries(folder)

        def all_answered() -> bool:
            for place, query in list(missing.items()):
                answers[place] = ask(query)
                if any(map(math.isfinite, answers[place])):
                    del missing[place]
            return not missing

        _wait(all_answered, lambda: {place: (query, answers[place]) for place, query in missing.items()})
        _wait(lambda: all(rule["health"] == "ok" for rule in rules()), rules)
        assert http.get("/api/v1/alerts").raise_for_status().json()["status"] == "success"
    return answers


def queries(folder: Path) -> dict[str, str]:
    """Place ▸ PromQL: of each dashboard's panels, with their variables; of each rule what it records, and of an alert
    what it compares."""
    found: dict[str, str] = {}
    for path in sorted((folder / "grafana").glob("*.json")):
        board = json.loads(path.read_text())
        values = {each["name"]: each["query"] for each in board["templating"]["list"]} | GRAFANA
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                place = f"{path.stem} ▸ {panel['title']} ▸ {target['legendFormat']}"
                assert place not in found
                found[place] = _filled(target["expr"], values)
    (group,) = yaml.safe_load((folder / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]:
        if "record" in rule:
            found[f"rules ▸ {rule['record']}"] = rule["record"]
            continue
        for part in rule["expr"].split(" and "):
            compared = re.fullmatch(r"absent\((.+)\)|(.+) (?:<|>=?) [\d.]+", part)
            assert compared, part
            found[f"rules ▸ {rule['alert']} ▸ {part}"] = compared[1] or compared[2]
    return found


def _filled(query: str, values: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], query)


@contextmanager
def prometheus(metrics_url: str, token: str | None, folder: Path) -> Iterator[httpx.Client]:
    """One that runs the scrape job and the rules of `folder`, both every half second, on another target."""
    url = urlsplit(metrics_url)
    (job,) = yaml.safe_load((folder / "scrape.yaml").read_text())["scrape_configs"]
    job |= {"scheme": url.scheme, "metrics_path": url.path, "static_configs": [{"targets": [url.netloc]}]}
    job["scrape_interval"] = EVERY
    with tempfile.TemporaryDirectory() as name, Path(name, "log").open("w+") as log:
        if token is None:
            del job["authorization"]
        else:
            job["authorization"]["credentials_file"] = f"{name}/token"
            Path(name, "token").write_text(token)
        config = {
            "global": {"evaluation_interval": EVERY},
            "rule_files": [str((folder / "rules.yaml").resolve())],
            "scrape_configs": [job],
        }
        Path(name, "prometheus.yaml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        options = [f"--config.file={name}/prometheus.yaml", f"--storage.tsdb.path={name}/data", "--log.level=warn"]
        command = [binary("prometheus"), *options, f"--web.listen-address={address}"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            with httpx.Client(base_url=f"http://{address}", timeout=60) as http:

                def ready() -> bool:
                    assert process.poll() is None, Path(name, "log").read_text()
                    try:
                        return http.get("/-/ready").is_success
                    except httpx.ConnectError:
                        return False

                _wait(ready, Path(name, "log").read_text)
                yield http
        finally:
            process.terminate()
            process.wait()


def _wait(reached: Callable[[], bool], state: Callable[[], object]) -> None:
    """Another process tells nobody when it has come so far. `state`: what to show if it never does."""
    until = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < until, state()
        time.sleep(0.1)
