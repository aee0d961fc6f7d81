#!/usr/bin/env python3
"""Runs the service under a little load, a Prometheus with our configuration beside it, and asks every query of deploy/.

    python scripts/deploy_check_live.py                 an engine without a model (benchmarks/fake_service.py)
    python scripts/deploy_check_live.py --model demo    the real engine

Fails if a panel or a rule has no data, if Prometheus cannot scrape with its API key or somebody can without one, if an
alert is there while all is well, or none once the service is gone. Needs the program prometheus (Debian's package has
it); takes two minutes and two cores.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deploy_check
import yaml

ROOT = deploy_check.ROOT
METRICS_KEY, CLIENT_KEY = "metrics-key-of-the-check", "client-key-of-the-check"
WITHOUT_MODEL = {"Prefix cache hits / hits", "Engine steps / tokens in a step"}
"""Queries that have no data with the engine that has no model: it counts no look-ups and no steps."""

OBJECTIVES = ("NanovllmTtft", "NanovllmTpot")
"""Alerts of objectives that a model on two busy cores may well miss."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def fetch(url: str, body: dict[str, Any] | None = None, key: str | None = None) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()
    except OSError:
        return 0, b""


def until(what: str, condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise deploy_check.CheckError(f"{what}: not after {seconds:g} s.")
        time.sleep(0.5)


@contextmanager
def process(command: list[str], log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the background, ended with SIGTERM."""
    with log.open("wb") as output:
        running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=output, stderr=output)
        try:
            yield running
        finally:
            if running.poll() is None:
                running.send_signal(signal.SIGTERM)
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()


def prometheus_config(folder: Path, target: str) -> Path:
    """Ours, with the service's address in place of its DNS name, and quicker."""
    shutil.copytree(deploy_check.DEPLOY / "prometheus" / "rules", folder / "rules")
    (folder / "metrics_key").write_text(METRICS_KEY)
    config = deploy_check.load_yaml(deploy_check.DEPLOY / "prometheus" / "prometheus.yml")[0]
    config["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "5s"}
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "nanovllm")
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [target]}]
    job["authorization"]["credentials_file"] = str(folder / "metrics_key")
    config["scrape_configs"] = [job]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def load(url: str, model: str, seconds: float, concurrency: int) -> int:
    """Streams, whole answers and refused requests for so long; how many were answered."""
    deadline, answered = time.monotonic() + seconds, [0] * concurrency

    def client(number: int) -> None:
        turn = 0
        while time.monotonic() < deadline:
            turn += 1
            prompt = "The same beginning for all of them, long enough for a few blocks of the cache. " * 2 + str(
                turn % 5
            )
            body = {"model": model, "prompt": prompt, "max_tokens": 24, "stream": turn % 2 == 0}
            answered[number] += fetch(f"{url}/v1/completions", body, CLIENT_KEY)[0] == 200
            if turn % 10 == 0:
                fetch(f"{url}/v1/completions", {"model": model, "prompt": prompt, "max_tokens": -1}, CLIENT_KEY)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(answered)


def check(model: str | None, seconds: float) -> Iterator[str]:
    prometheus = deploy_check.tool("prometheus", "Debian's package prometheus has it.")
    port, prometheus_port = free_port(), free_port()
    url, server = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{prometheus_port}"
    service = "service:NanoVLLM" if model else "benchmarks.fake_service:NanoVLLM"

    def api(path: str, **parameters: str) -> Any:
        status, text = fetch(f"{server}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(text or "{}")
        if status != 200:
            raise deploy_check.CheckError(f"{path} {parameters}: {answer.get('error', status)}")
        return answer["data"]

    def alerts() -> set[str]:
        return {alert["labels"]["alertname"] for alert in api("alerts")["alerts"]}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = folder / "api_keys"
        keys.write_text(f"prometheus:{METRICS_KEY}\nclient:{CLIENT_KEY}\n")
        env = {"NANOVLLM_API_KEYS_FILE": str(keys), "NANOVLLM_FAKE_TOKENS_PER_SECOND": "100", "PYTHONPATH": str(ROOT)}
        if model:
            env["NANOVLLM_MODEL"] = model
        bentoml = [sys.executable, "-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(port)]
        config = prometheus_config(folder, f"127.0.0.1:{port}")
        storage = [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{prometheus_port}"]
        with process([prometheus, f"--config.file={config}", *storage], folder / "prometheus.log"):
            with process(bentoml, folder / "service.log", **env):
                until("the service is ready", lambda: fetch(f"{url}/readyz")[0] == 200, 180)
                until("Prometheus is ready", lambda: fetch(f"{server}/-/ready")[0] == 200, 30)
                until("the service is scraped", lambda: api("query", query='up{job="nanovllm"} == 1')["result"], 30)
                if fetch(f"{url}/metrics")[0] != 401:
                    raise deploy_check.CheckError("/metrics can be read without a key.")
                yield "Prometheus scrapes with its key; nobody does without"

                served = json.loads(fetch(f"{url}/v1/models", key=CLIENT_KEY)[1])["data"][0]["id"]
                answered = load(url, served, seconds, concurrency=4)
                queries = [*deploy_check.dashboard_expressions(), *deploy_check.scaler_expressions()]
                empty = []
                for title, query in queries:
                    query = deploy_check.without_variables(query.replace('namespace="nanovllm"', ""))
                    values = [sample["value"][1] for sample in api("query", query=query)["result"]]
                    if all(value == "NaN" for value in values) and "> 0" not in query:
                        empty.append(title)
                for group in api("rules")["groups"]:
                    for rule in group["rules"]:
                        if rule["health"] != "ok":
                            raise deploy_check.CheckError(
                                f"rule {rule['name']}: {rule.get('lastError', rule['health'])}"
                            )
                        if rule["type"] == "recording" and not api("query", query=rule["name"])["result"]:
                            empty.append(rule["name"])
                if set(empty) - (set() if model else WITHOUT_MODEL):
                    raise deploy_check.CheckError(f"No data: {', '.join(empty)}")
                yield f"{len(queries)} queries and all rules have data after {answered} answers (none: {empty or '-'})"

                if found := {name for name in alerts() if not (model and name.startswith(OBJECTIVES))}:
                    raise deploy_check.CheckError(f"Alerts while all is well: {found}")
                yield "no alert while all is well"
            until("alerts once it is gone", lambda: {"NanovllmDown", "NanovllmReplicaDown"} <= alerts(), 30)
            yield f"pending once the service is gone: {', '.join(sorted(alerts()))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="serve this with the real engine; none: an engine without a model")
    parser.add_argument("--seconds", type=float, default=60, help="of load (60)")
    arguments = parser.parse_args()
    try:
        for line in check(arguments.model, arguments.seconds):
            print(f"ok      {line}", flush=True)
    except (deploy_check.CheckError, deploy_check.Skipped) as e:
        print(f"FAILED  {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
